"""The loop: what a run reports, writes and keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from opd.data.tasks import find_task
from opd.errors import ConfigError
from opd.training.checkpoint import find_checkpoints
from opd.training.folder import RunFolder
from opd.training.loop import LEFT, train_run
from opd.types import Stat
from tests.training.runs import abandon, finish, outcome, tiny_run

WARMUP = {"warmup": {"steps": 2, "prompts_per_step": 4}}
SCORE = {"value", "low", "high", "n"}


def test_every_step_of_every_phase_is_reported_in_order(tmp_path: Path) -> None:
    reports = finish(tiny_run(tmp_path, WARMUP))
    assert [(report.phase, report.step, report.steps) for report in reports] == [
        ("warmup", 1, 2),
        ("warmup", 2, 2),
        *(("train", step, 4) for step in (0, 1, 2, 3, 4)),
        ("train", 4, 4),
    ]
    assert [report.step for report in reports if report.evaluation] == [0, 2, 4, 4]
    assert [report.summary is not None for report in reports] == [False] * 7 + [True]
    assert all(report.metrics["optimizer/grad_norm"].count == 1 for report in reports[3:7])
    assert all(report.folder == tmp_path / "run" for report in reports)


def test_the_summary_has_the_keys_that_machines_read(tmp_path: Path) -> None:
    reports = finish(tiny_run(tmp_path))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == reports[-1].summary
    for who in ("start", "final", "teacher"):
        assert summary[f"{who}_accuracy"].keys() == SCORE
        assert summary[f"{who}_accuracy"]["n"] == 3
    difference = summary["final_accuracy"]["value"] - summary["start_accuracy"]["value"]
    assert summary["gain"] == difference
    assert summary["seconds"] > 0
    assert summary["peak_mb"] > 10
    assert summary["exit_reason"] == "finished"
    events = RunFolder(tmp_path / "run").read_events()
    assert summary["tokens"] == events[-1]["tokens"] == sum(report.tokens for report in reports)


def test_an_event_per_step_holds_sums_counts_and_timings(tmp_path: Path) -> None:
    finish(tiny_run(tmp_path, WARMUP))
    events = RunFolder(tmp_path / "run").read_events()
    assert [(event["phase"], event["step"]) for event in events] == [
        ("warmup", 1),
        ("warmup", 2),
        *(("train", step) for step in range(5)),
    ]
    for event in events[3:]:
        assert event["metrics"]["rollout/length"][1] == 4
        assert {"sample", "pack", "score", "update"} <= event["seconds"].keys()
    tokens = [event["tokens"] for event in events if "tokens" in event]
    assert tokens == sorted(tokens)
    assert events[2]["evaluation"]["student"].keys() == SCORE


def test_a_caller_who_leaves_early_finds_the_reason_in_the_summary(tmp_path: Path) -> None:
    abandon(tiny_run(tmp_path), 2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exit_reason"] == LEFT
    assert summary["final_accuracy"] is None


def test_the_accuracy_of_rollouts_is_that_of_the_students_own_text(tmp_path: Path) -> None:
    """The data's responses are all right, and an untrained student's are not."""
    mixed = {"method": {"name": "gkd", "options": {"student_share": 0.5}}}
    reports = finish(tiny_run(tmp_path, mixed))
    for report in reports[1:5]:
        assert report.metrics["rollout/accuracy"] == Stat(0.0, 2.0)
        assert report.metrics["rollout/truncated"].count == 2
        assert report.metrics["rollout/length"].count == 4


def test_evaluating_changes_nothing_in_a_run(tmp_path: Path) -> None:
    finish(tiny_run(tmp_path, {"name": "often", "evaluate": {"every": 1, "prompts": 5}}))
    quiet = {"every": 0, "teacher": False, "test_prompts": 1}
    finish(tiny_run(tmp_path, {"name": "never", "evaluate": quiet}))
    often, never = outcome(tmp_path / "often"), outcome(tmp_path / "never")
    assert often["weights"] == never["weights"]
    assert often["optimizer"] == never["optimizer"]


def test_figures_are_null_where_nothing_judges(tmp_path: Path) -> None:
    task = find_task("sort")
    prompts = [task.item("train", seed=0, index=index).prompt for index in range(16)]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    run = tiny_run(tmp_path, {"data": {"prompts": "prompts.jsonl", "held_out": 3}})
    (report,) = finish(run)[-1:]
    assert report.summary is not None
    assert report.summary["final_accuracy"] == {"value": None, "low": None, "high": None, "n": 3}
    assert report.summary["gain"] is None
    assert report.summary["best"] is None
    for log in ("events.jsonl", "samples.jsonl", "summary.json"):
        assert "NaN" not in (report.folder / log).read_text()


def test_no_steps_measure_and_write_the_student_as_it_is(tmp_path: Path) -> None:
    reports = finish(tiny_run(tmp_path, {"train": {"steps": 0}}))
    assert [report.step for report in reports] == [0, 0]
    assert reports[-1].summary is not None
    assert reports[-1].summary["gain"] == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


# --------------------------------------------------------------------------------------------
# Checkpoints

# Right while a file of that name lies beside it.
JUDGE = """
from pathlib import Path

def judge(prompt, response, *, finished):
    return (Path(__file__).parent / "right").exists()
"""


def run_with_best_at(output: Path, best: int, **train: Any) -> RunFolder:
    """A run of five steps in which the verifier says yes around one validation only."""
    (output / "judge.py").write_text(JUDGE)
    changes = {"train": {"steps": 5, **train}, "evaluate": {"every": 1}}
    run = tiny_run(output, {"data": {"verifier": "judge:judge"}}, changes)
    flag = output / "right"
    for report in train_run(run):
        flag.unlink(missing_ok=True)
        if report.step == best - 1:
            flag.touch()
    return RunFolder(output / "run")


@pytest.mark.parametrize(
    ("train", "kept", "best"),
    [
        ({"save_every": 1, "keep": 1}, ["step-2", "step-5"], "step-2"),
        ({"save_every": 3, "keep": 1}, ["step-2", "step-5"], "step-2"),
        ({"save_every": 3, "keep": 2}, ["step-2", "step-3", "step-5"], "step-2"),
        ({"save_every": 0, "keep": 2}, ["step-5"], None),
    ],
)
def test_the_best_and_the_newest_checkpoints_are_kept(
    train: dict[str, Any], kept: list[str], best: str | None, tmp_path: Path
) -> None:
    """The best is saved whether or not it falls on `save_every`, unless that says: never."""
    folder = run_with_best_at(tmp_path, 2, **train)
    assert [checkpoint.path.name for checkpoint in find_checkpoints(folder)] == kept
    assert folder.read_summary()["best"] == {"value": 1.0, "step": 2, "checkpoint": best}


def test_a_resume_remembers_the_best(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    changes = {"train": {"keep": 1}, "evaluate": {"every": 1}}
    run = tiny_run(tmp_path, {"data": {"verifier": "judge:judge"}}, changes)
    (tmp_path / "right").touch()
    abandon(run, 2)
    (tmp_path / "right").unlink()
    finish(run, resume=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.read_summary()["best"] == {"value": 1.0, "step": 1, "checkpoint": "step-1"}
    assert [found.path.name for found in find_checkpoints(folder)] == ["step-1", "step-4"]


def test_a_checkpoint_holds_a_student_that_others_can_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finish(tiny_run(tmp_path))
    student = tmp_path / "run" / "checkpoints" / "step-4" / "student"
    model = AutoModelForCausalLM.from_pretrained(student)
    assert len(AutoTokenizer.from_pretrained(student)) == model.config.vocab_size
    last = (student / "model.safetensors").read_bytes()
    assert last == (tmp_path / "run" / "model" / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------------
# Beginnings


def test_a_users_mistake_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder nowhere"):
        finish(tiny_run(tmp_path / "runs", {"student": {"model": "nowhere"}}))
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_taken_is_refused_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="run exists"):
        finish(tiny_run(tmp_path, {"student": {"model": "nowhere"}}))


def test_a_seed_means_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    short = {"train": {"steps": 1}}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finish(tiny_run(tmp_path, short, {"name": name, "seed": seed}))
    first, same, other = (outcome(tmp_path / name) for name in "abc")
    assert first == same
    assert first["weights"] != other["weights"]
    assert not math.isnan(first["summary"]["gain"])

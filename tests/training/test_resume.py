"""A run that is stopped, however, ends as if it had never been."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError
from opd.formula import divergence
from opd.models import load_model, save_model
from opd.objective import Dense, Method, Objective
from opd.training.checkpoint import find_checkpoints
from opd.training.config import Run, load
from opd.training.folder import RunFolder
from opd.training.loop import train_run
from opd.training.session import open_session
from tests.training.runs import (
    EVERYTHING,
    Kill,
    abandon,
    finish,
    merged,
    outcome,
    run_in_child,
    start,
    tiny_run,
    wait_for,
)

GKD = {
    "method": {
        "name": "gkd",
        "options": {
            "student_share": 0.5,
            "teacher_weight": {"schedule": "cosine", "start": 0.9, "end": 0.1, "steps": 4},
        },
    }
}
LORA = merged(
    EVERYTHING,
    {
        "student": {"lora": {"r": 4}},
        "warmup": {"steps": 1},
        "train": {"steps": 3, "updates_per_rollout": 1},
    },
)
LORA_FROM_THE_START = merged(LORA, {"warmup": {"steps": 0}})

# A buffer with old text, the teacher in the student's own, and generators of all of them.
REPLAY = merged(
    EVERYTHING,
    {
        "method": {
            "states": {
                "student": 0.25,
                "data": 0.25,
                "teacher": 0.0,
                "replay": 0.5,
                "replay_steps": 3,
                "horizon": {"schedule": "linear", "start": 3, "end": 6, "steps": 4},
                "teacher_prefix": {"schedule": "linear", "start": 2, "end": 0, "steps": 3},
                "mixture": 0.5,
                "rewrite": 0.5,
            }
        }
    },
)

RUNS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "everything": EVERYTHING,
    "gkd": GKD,
    "replay": REPLAY,
    "lora": LORA,
    "lora from the start": LORA_FROM_THE_START,
}

# In the order in which a run comes by; every child goes on where the one before it died.
KILLS = {
    "as the folder is born": Kill("os.rename", "/run"),
    "right after the folder was born": Kill("os.rename", "/run", delay_s=0.001),
    "in the warm-up": Kill("open", "events.jsonl", count=2),
    "in a checkpoint of the warm-up": Kill("open", ".warmup-2.tmp/state.json"),
    "as the reference is written": Kill("os.rename", ".reference.tmp"),
    "in the evaluation at the start": Kill("open", "events.jsonl"),
    "between two logs": Kill("open", "samples.jsonl"),
    "as a checkpoint begins": Kill("os.mkdir", ".step-1.tmp"),
    "as weights are written": Kill("open", ".step-1.tmp/student/config.json"),
    "before a checkpoint takes its name": Kill("os.rename", ".step-1.tmp"),
    "as an old checkpoint is moved away": Kill("os.rename", ".old"),
    "as an old checkpoint is removed": Kill("os.remove", "model.safetensors"),
    "as what is left of it is removed": Kill("os.rmdir", "student"),
    "in a step": Kill("open", "events.jsonl", count=2),
    "after a checkpoint took its name": Kill("os.rename", ".step-3.tmp", delay_s=0.001),
    "soon after weights are written": Kill("os.mkdir", ".step-4.tmp/student", delay_s=0.005),
    "in the final evaluation": Kill("os.mkdir", ".model.tmp"),
    "as the model is written": Kill("os.rename", ".model.tmp"),
    "as the test samples are written": Kill("open", "samples.jsonl", count=2),
    "as the picture is drawn": Kill("open", "curves.png.tmp"),
    "as the summary is written": Kill("os.rename", "summary.json"),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What each of `RUNS` leaves when nothing stops it."""
    known: dict[str, dict[str, Any]] = {}

    def find(name: str) -> dict[str, Any]:
        if name not in known:
            output = tmp_path_factory.mktemp("uninterrupted")
            finish(tiny_run(output, RUNS[name]))
            known[name] = outcome(output / "run")
        return known[name]

    return find


@pytest.mark.slow
def test_a_run_killed_at_many_instants_ends_bit_identical(
    tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    run, folder = tiny_run(tmp_path, EVERYTHING), tmp_path / "run"
    for moment, kill in KILLS.items():
        resume = folder if folder.exists() else None
        assert run_in_child(run, resume=resume, kill=kill) == -signal.SIGKILL, moment
    assert run_in_child(run, resume=folder) == 0
    assert outcome(folder) == uninterrupted("everything")
    assert not list(folder.rglob(".*"))


def test_a_run_killed_at_random_times_ends_bit_identical(
    tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    """The clock decides, so other instants are met every time."""
    run, folder = tiny_run(tmp_path, EVERYTHING), tmp_path / "run"
    rng = random.Random()
    kills = 0
    child = start(run)
    while kills < 5 and child.exitcode is None:
        wait_for(folder / "config.toml")
        child.join(timeout=rng.uniform(0.1, 0.7))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        child = start(run, resume=folder)
    child.join()
    assert kills
    assert child.exitcode == 0 or finished(folder)
    assert outcome(folder) == uninterrupted("everything")


@pytest.mark.parametrize("name", ["gkd", "replay", "lora", "lora from the start"])
def test_a_run_continued_after_every_step_ends_bit_identical(
    name: str, tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    run, folder = tiny_run(tmp_path, RUNS[name]), tmp_path / "run"
    warmup = run.config.warmup.steps
    for number in range(warmup + run.config.train.steps):
        # The figures at the start are kept by the checkpoint of the step that follows them.
        reports = 2 if number == warmup else 1
        abandon(run, reports, resume=folder if number else None)
    finish(run, resume=folder)
    assert outcome(folder) == uninterrupted(name)


def test_steps_after_the_last_checkpoint_are_made_again(tmp_path: Path) -> None:
    rarely = {"train": {"steps": 5, "save_every": 3}, "evaluate": {"every": 0}}
    finish(tiny_run(tmp_path / "whole", rarely))
    run, folder = tiny_run(tmp_path / "broken", rarely), tmp_path / "broken" / "run"
    abandon(run, 3)
    assert not find_checkpoints(RunFolder(folder))
    abandon(run, 5, resume=folder)
    assert [found.path.name for found in find_checkpoints(RunFolder(folder))] == ["step-3"]
    assert [report.step for report in finish(run, resume=folder)] == [4, 5, 5]
    assert outcome(folder) == outcome(tmp_path / "whole" / "run")


def test_weights_mapped_from_a_file_do_not_change_what_a_resume_ends_with(tmp_path: Path) -> None:
    models = {}
    for role in ("student", "teacher"):
        name = "builtin:sort-student" if role == "student" else "builtin:sort-teacher-init"
        save_model(load_model(name, device="cpu"), tmp_path / role)
        models[role] = {"model": str(tmp_path / role)}
    whole, broken = (tiny_run(tmp_path / part, models) for part in ("a", "b"))
    finish(whole)
    folder = tmp_path / "b" / "run"
    assert run_in_child(broken, kill=Kill("os.rename", ".step-3.tmp")) == -signal.SIGKILL
    assert run_in_child(broken, resume=folder) == 0
    assert outcome(folder) == outcome(tmp_path / "a" / "run")


@dataclass(frozen=True)
class Halving:
    """A schedule whose value is in its state alone: a resume that loses it starts again at 1."""

    def at(self, step: int, stats: Mapping[str, Any], state: Any) -> tuple[float, Any]:
        value = 1.0 if state is None else state / 2
        return value, value

    def reachable(self) -> tuple[float, float]:
        return 0.0, 1.0


def test_the_state_of_a_schedule_survives(tmp_path: Path) -> None:
    method = Method(Objective(Dense(divergence=divergence.reverse_kl, coef=Halving())))
    outcomes = {}
    for part in ("whole", "broken"):
        run, folder = tiny_run(tmp_path / part), tmp_path / part / "run"
        reporting = train_run(run, session=open_session(run, method=method))
        if part == "broken":
            list(itertools.islice(reporting, 3))
            session = open_session(run, method=method)
            reporting = train_run(run, resume=folder, session=session)
        list(reporting)
        outcomes[part] = outcome(folder)
        state = find_checkpoints(RunFolder(folder))[-1].state
        assert state["progress"]["schedule"] == {"dense.coef": 0.125}
    assert outcomes["broken"] == outcomes["whole"]


def test_seconds_add_up_over_resumes(tmp_path: Path) -> None:
    run, folder = tiny_run(tmp_path), tmp_path / "run"
    abandon(run, 3)
    state_file = find_checkpoints(RunFolder(folder))[-1].path / "state.json"
    state = json.loads(state_file.read_text())
    assert 0 < state["progress"]["seconds"] < 60
    state["progress"]["seconds"] += 1000
    state_file.write_text(json.dumps(state))
    (report,) = finish(run, resume=folder)[-1:]
    assert report.summary is not None
    assert 1000 < report.summary["seconds"] < 1060


# --------------------------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_finishes_the_step_saves_and_reaches_the_caller(
    tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    run, folder = tiny_run(tmp_path, EVERYTHING), tmp_path / "run"
    child = start(run)
    wait_for(folder / "events.jsonl", text='"phase": "train", "step": 2')
    interrupt(child)
    child.join()
    assert child.exitcode == 130
    events = RunFolder(folder).read_events()
    assert find_checkpoints(RunFolder(folder))[-1].order == (1, events[-1]["step"])
    assert RunFolder(folder).read_summary()["exit_reason"] == "interrupted"
    assert run_in_child(run, resume=folder) == 0
    assert outcome(folder) == uninterrupted("everything")


def test_ctrl_c_in_the_callers_hands_saves_the_step_just_reported(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, {"train": {"save_every": 0}, "evaluate": {"every": 0}})
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        consume_and_press_ctrl_c(run, at_step=2)
    found = find_checkpoints(RunFolder(tmp_path / "run"))
    assert [checkpoint.path.name for checkpoint in found] == ["step-2"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_at_the_start_keeps_the_figures_of_the_start(
    tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    run, folder = tiny_run(tmp_path), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        consume_and_press_ctrl_c(run, at_step=0)
    assert [found.path.name for found in find_checkpoints(RunFolder(folder))] == ["step-0"]
    assert finish(run, resume=folder)[0].step == 1
    assert outcome(folder) == uninterrupted("plain")


def consume_and_press_ctrl_c(run: Run, *, at_step: int) -> None:
    for report in train_run(run):
        if report.step == at_step:
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_with_the_last_checkpoint_intact(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(SLOW_VERIFIER)
    run, folder = tiny_run(tmp_path, {"data": {"verifier": "judge:judge"}}), tmp_path / "run"
    child = start(run)
    wait_for(folder / "checkpoints" / "step-1")
    (tmp_path / "slow").touch()
    wait_for(tmp_path / "judging")
    began = time.monotonic()
    interrupt(child)
    time.sleep(0.2)
    assert child.exitcode is None
    interrupt(child)
    child.join()
    assert time.monotonic() - began < 10
    assert child.exitcode == 130
    (tmp_path / "slow").unlink()
    assert RunFolder(folder).read_summary()["exit_reason"] == "interrupted"
    assert run_in_child(run, resume=folder) == 0
    assert finished(folder)


SLOW_VERIFIER = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def judge(prompt, response, *, finished):
    if (HERE / "slow").exists():
        (HERE / "judging").touch()
        time.sleep(20)
    return False
"""


# --------------------------------------------------------------------------------------------
# What cannot be resumed


@pytest.mark.parametrize("reports", [1, 3])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"train": {"learning_rate": 0.5}}, "train.learning_rate was 0.001, now 0.5"),
        ({"train": {"steps": 8}}, "train.steps was 4, now 8 (the decay of the learning rate"),
        ({"method": {"name": "gkd"}}, "method.name was 'reverse_kl_opd', now 'gkd'"),
        (
            {"method": {"name": "top_k_opd", "options": {"k": 4}}, "seed": 1},
            "method.name was 'reverse_kl_opd'",
        ),
        ({"evaluate": {"sets": {"more": "task:add"}}}, "evaluate.sets.more was None, now"),
    ],
)
def test_another_config_is_refused_by_its_first_difference(
    change: dict[str, Any],
    said: str,
    reports: int,
    tmp_path: Path,
    abandoned: Callable[[int], Path],
) -> None:
    """With and without a checkpoint."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        finish(tiny_run(tmp_path, change), resume=abandoned(reports))


@pytest.fixture(scope="module")
def abandoned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A plain run left after some reports; checkpoints begin with the second."""
    folders: dict[int, Path] = {}

    def find(reports: int) -> Path:
        if reports not in folders:
            output = tmp_path_factory.mktemp("abandoned")
            abandon(tiny_run(output), reports)
            folders[reports] = output / "run"
        return folders[reports]

    return find


def test_a_checkpoint_from_before_a_key_existed_resumes_with_the_keys_default(
    tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    abandon(tiny_run(tmp_path), 3)
    for state_file in (tmp_path / "run").glob("checkpoints/*/state.json"):
        state = json.loads(state_file.read_text())
        config = json.loads(state["config"])
        del config["data"]["as_chat"]
        state_file.write_text(json.dumps(state | {"config": json.dumps(config)}))

    finish(tiny_run(tmp_path), resume=tmp_path / "run")

    assert outcome(tmp_path / "run") == uninterrupted("plain")


def test_a_run_folder_may_be_moved_and_renamed(
    tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    abandon(tiny_run(tmp_path / "here"), 3)
    (tmp_path / "there").mkdir()
    moved = (tmp_path / "here" / "run").rename(tmp_path / "there" / "moved")
    finish(tiny_run(tmp_path / "there", {"name": "moved"}), resume=moved)
    assert outcome(moved) == uninterrupted("plain")


def test_the_config_in_the_folder_is_enough_to_resume(
    tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    abandon(tiny_run(tmp_path, EVERYTHING), 4)
    finish(load(tmp_path / "run"), resume=tmp_path / "run")
    assert outcome(tmp_path / "run") == uninterrupted("everything")


def test_a_finished_run_says_so_and_changes_nothing(tmp_path: Path) -> None:
    run, folder = tiny_run(tmp_path, {"train": {"steps": 1}}), tmp_path / "run"
    finish(run)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ConfigError, match=r"run is finished.*run/model"):
        finish(run, resume=folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run folder: it has no config\.toml"):
        finish(tiny_run(tmp_path), resume=tmp_path)


def test_a_run_whose_reference_is_gone_is_refused(tmp_path: Path) -> None:
    run, folder = tiny_run(tmp_path, EVERYTHING), tmp_path / "run"
    abandon(run, 5)
    shutil.rmtree(folder / "reference")
    with pytest.raises(ConfigError, match=r"run/reference is gone"):
        finish(run, resume=folder)


FORMULAS = """
from opd.formula.divergence import reverse_kl

def doubled(student_log_probs, teacher_log_probs):
    return 2 * reverse_kl(student_log_probs, teacher_log_probs)

def judge(prompt, response, *, finished):
    return "1" in response
"""
OWN: dict[str, Any] = {
    "method": {
        "name": "custom",
        "objective": {"terms": [{"kind": "dense", "divergence": "formulas:doubled"}]},
    },
    "data": {"verifier": "judges:judge"},
}


@pytest.mark.parametrize("file", ["formulas.py", "judges.py"])
def test_a_users_function_is_copied_and_a_changed_one_is_refused(file: str, tmp_path: Path) -> None:
    for name in ("formulas.py", "judges.py"):
        (tmp_path / name).write_text(FORMULAS + f"# {name}\n")
    run, folder = tiny_run(tmp_path, OWN), tmp_path / "run"
    abandon(run, 3)
    sums = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=folder / "sources",
        capture_output=True,
        text=True,
        check=True,
    )
    assert sums.stdout.count(": OK") == 2
    own = tmp_path / file
    (copy,) = (folder / "sources").glob(f"*-{file}")
    own.write_text(FORMULAS + "# changed\n")
    with pytest.raises(ConfigError, match=rf"{file} has changed.*{re.escape(str(copy))}"):
        finish(run, resume=folder)
    own.write_text(copy.read_text())
    finish(run, resume=folder)
    assert finished(folder)


def finished(folder: Path) -> bool:
    return RunFolder(folder).read_summary().get("exit_reason") == "finished"


def interrupt(child: ForkServerProcess) -> None:
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)

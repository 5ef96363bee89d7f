"""Monitors and looks in runs: there at every step, whatever the micro-batches, and for nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from opd.teacher.local import LocalTeacher
from opd.training.loop import StepReport
from opd.training.session import open_session
from opd.types import Stat
from tests.training.runs import finish, outcome, tiny_run

SAMPLED = {"method": {"name": "sampled_token_opd"}}
ONE = {"train": {"steps": 1}}


def of_step(reports: list[StepReport], step: int) -> dict[str, Stat]:
    """The monitors of a step of the distillation."""
    (found,) = [r for r in reports if (r.phase, r.step) == ("train", step) and r.tokens]
    return {name: s for name, s in found.metrics.items() if name.startswith("monitor/")}


def notes_about_looks(reports: list[StepReport]) -> list[str]:
    summary = reports[-1].summary
    assert summary is not None
    return [note for note in summary["notes"] if "distributions" in note]


def means(metrics: Mapping[str, Stat]) -> dict[str, float]:
    return {name: stat.mean for name, stat in metrics.items()}


def test_every_step_has_monitors_and_some_have_a_look(tmp_path: Path) -> None:
    reports = finish(tiny_run(tmp_path, {"monitor": {"every": 2, "responses": 3}}))
    for step in (1, 2, 3, 4):
        found = of_step(reports, step)
        assert found["monitor/log_ratio"].count == found["monitor/entropy"].count > 0
        assert ("monitor/look/top_k_overlap" in found) == (step in (1, 3))
    look = of_step(reports, 1)
    assert look["monitor/look/reverse_kl"].count <= 3 * 6 < look["monitor/reverse_kl"].count
    # what the events hold is what was reported
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (first,) = [e for e in events if e.get("metrics") and e["step"] == 1]
    assert {name: [s.total, s.count] for name, s in look.items()} == {
        name: pair for name, pair in first["metrics"].items() if name.startswith("monitor/")
    }


@pytest.mark.parametrize("method", [{}, SAMPLED], ids=["dense", "sampled"])
def test_micro_batches_change_nothing(method: dict[str, Any], tmp_path: Path) -> None:
    whole = finish(tiny_run(tmp_path, method, ONE, {"train": {"max_tokens": 4096}}))
    parts = tiny_run(tmp_path, method, ONE, {"train": {"max_tokens": 16}, "name": "parts"})
    expected, found = of_step(whole, 1), of_step(finish(parts), 1)
    assert found.keys() == expected.keys()
    for name, stat in expected.items():
        assert found[name].count == pytest.approx(stat.count, rel=1e-4), name
        assert found[name].total == pytest.approx(stat.total, rel=1e-3, abs=2e-5), name


def test_a_look_is_the_same_whether_the_step_asks_for_distributions_or_not(tmp_path: Path) -> None:
    """A dense step has the teacher's answers already; of a sampled one the teacher is asked."""
    dense = of_step(finish(tiny_run(tmp_path, ONE)), 1)
    sampled = of_step(finish(tiny_run(tmp_path, SAMPLED, ONE, {"name": "sampled"})), 1)
    looks = [name for name in dense if name.startswith("monitor/look/")]
    assert len(looks) > 20
    for name in looks:
        assert sampled[name].mean == pytest.approx(dense[name].mean, rel=1e-4, abs=1e-6), name


def test_all_responses_looked_at_have_the_divergence_that_the_loss_has(tmp_path: Path) -> None:
    found = of_step(finish(tiny_run(tmp_path, ONE, {"monitor": {"responses": 100}})), 1)
    look, step = found["monitor/look/reverse_kl"], found["monitor/reverse_kl"]
    assert look.count == step.count
    assert look.mean == pytest.approx(step.mean, rel=1e-5)


def test_where_the_teacher_is_the_student_all_is_stationary(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, ONE)
    session = open_session(run)
    student = session.student
    session.teachers["teacher"] = LocalTeacher(student.loaded, vocab_size=student.vocab_size)
    found = means(of_step(finish(run, session=session), 1))
    look = {name.removeprefix("monitor/look/"): v for name, v in found.items() if "look" in name}
    assert look["top_k_overlap"] == 1
    for name in ("reverse_kl", "forward_kl", "entropy_gap", "eos_divergence"):
        assert look[name] == pytest.approx(0, abs=1e-5), name
    assert look["student_entropy"] == pytest.approx(look["teacher_entropy"], abs=1e-5)
    assert look.get("candidate_mass", 0.0) == 0  # nothing is preferred to anything
    assert look.get("routable", 0.0) == 0
    for name in ("log_ratio", "log_ratio/q01", "log_ratio/q99", "reverse_kl", "end_tokens"):
        assert found.get(f"monitor/{name}", 0.0) == pytest.approx(0, abs=1e-5), name
    assert found["monitor/kl_from_samples"] == pytest.approx(0, abs=1e-5)
    assert found["monitor/importance_ratio"] == pytest.approx(1, abs=1e-5)


def test_text_of_two_updates_is_stale_at_the_second(tmp_path: Path) -> None:
    """The ratio is that of the last update, whose weights did not write the text."""
    two = {"train": {"steps": 1, "updates_per_rollout": 2, "lr_warmup_steps": 0}}
    found = of_step(finish(tiny_run(tmp_path, two)), 1)
    assert abs(found["monitor/importance_ratio"].mean - 1) > 1e-3


def test_monitors_change_nothing_in_a_run(tmp_path: Path) -> None:
    finish(tiny_run(tmp_path, SAMPLED, {"name": "watched", "monitor": {"every": 1}}))
    reports = finish(tiny_run(tmp_path, SAMPLED, {"name": "not", "monitor": {"on": False}}))
    assert not of_step(reports, 1)
    watched, alone = outcome(tmp_path / "watched"), outcome(tmp_path / "not")
    assert watched["weights"] == alone["weights"]
    assert watched["optimizer"] == alone["optimizer"]
    assert watched["samples"] == alone["samples"]


def test_a_teacher_that_is_not_to_be_asked_more_is_not_looked_at(tmp_path: Path) -> None:
    kept = {
        "teacher": {"cache": {"folder": str(tmp_path / "kept")}},
        "evaluate": {"teacher": False},
    }
    reports = finish(tiny_run(tmp_path, SAMPLED, kept, {"monitor": {"every": 1}}))
    assert not [name for name in of_step(reports, 1) if "look" in name]
    assert [len(report.notes) for report in reports if report.tokens] == [1, 0, 0, 0]
    (note,) = notes_about_looks(reports)
    assert "asked elsewhere or answers from a folder" in note
    # where the step asks for distributions, its own answers serve
    dense = finish(tiny_run(tmp_path, kept, ONE, {"name": "dense"}))
    assert of_step(dense, 1)["monitor/look/reverse_kl"].count > 0


def test_text_that_the_student_did_not_write_is_not_looked_at(tmp_path: Path) -> None:
    only_data = {"method": {"name": "gkd", "options": {"student_share": 0.0}}}
    found = of_step(finish(tiny_run(tmp_path, only_data, ONE)), 1)
    assert "monitor/log_ratio" in found
    assert not [name for name in found if "look" in name]


def test_a_method_without_a_teacher_has_monitors_all_the_same(tmp_path: Path) -> None:
    alone = {"method": {"name": "grpo"}, "sampler": {"samples_per_prompt": 2}}
    reports = finish(tiny_run(tmp_path, alone, ONE))
    found = of_step(reports, 1)
    assert {"monitor/entropy", "monitor/kl_from_samples"} <= found.keys()
    assert all(math.isfinite(stat.total) for stat in found.values())
    assert notes_about_looks(reports) == []

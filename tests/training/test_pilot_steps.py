"""The steps at the end of a probe: they end nothing, and what was known before them stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd.errors import OpdError
from opd.models import load_model
from opd.teacher.local import LocalTeacher
from opd.training import pilot_gradients
from opd.training.config import load
from opd.training.pilot import PilotSettings
from opd.training.pilot_report import probe, probe_folder
from opd.training.pilot_steps import forget_steps
from opd.types import Need, TeacherRequest, TeacherScores
from tests.training.runs import tiny_run

SMALL = PilotSettings(responses=8, samples=2, continued=2)
WATCHED: dict[str, Any] = {
    "evaluate": {"prompts": 4, "sets": {"add": "task:add"}},
    "monitor": {"every": 1, "on_alarm": "stop", "golden": ("add",)},
}
COUNT = 7
"""Steps of which an alarm ends a run of these settings."""


class Counted:
    """A teacher that counts how often it is asked."""

    def __init__(self) -> None:
        loaded = load_model("builtin:sort-teacher-init", seed=0)
        self.inner = LocalTeacher(loaded, vocab_size=loaded.vocab_size, max_tokens=1024)
        self.calls = 0

    def can(self, need: Need) -> bool:
        return self.inner.can(need)

    def score(self, request: TeacherRequest) -> TeacherScores:
        self.calls += 1
        return self.inner.score(request)


@pytest.fixture(autouse=True)
def _few_answers_are_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot_gradients, "RESPONSES", 8)


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "probe.json").read_text())
    return found


def test_steps_ask_the_given_teacher_end_at_no_alarm_and_replace_a_former_probes(
    tmp_path: Path,
) -> None:
    run, folder = tiny_run(tmp_path / "runs", WATCHED), tmp_path / "probe"
    teacher = Counted()
    asked: dict[str, int] = {}
    written: list[Any] = []

    def doing(what: str) -> None:
        asked[what] = teacher.calls
        if what == f"step 1 of {COUNT}":
            written.append(report(folder)["steps"])

    found = probe(
        run,
        SMALL,
        folder=probe_folder("x", str(folder)),
        steps=COUNT,
        teacher=teacher,
        doing=doing,
    )
    assert found.steps is not None
    assert written == [None]
    assert report(folder)["steps"]["count"] == COUNT
    # each step, and each look at it, asks once more
    assert asked[f"step {COUNT} of {COUNT}"] >= asked["writing and drawing"] + COUNT
    assert teacher.calls > asked["the student answers the same prompts again"]
    events = [json.loads(line) for line in (folder / "steps/events.jsonl").read_text().splitlines()]
    assert any("alarm" in event for event in events)
    # the run file of the steps is one that loads
    config = load(folder / "steps" / "config.toml").config
    assert (config.monitor.on_alarm, config.monitor.golden) == ("log", ())

    probe(run, SMALL, folder=probe_folder("x", str(folder)), steps=2)
    assert report(folder)["steps"]["count"] == 2


def test_steps_that_fail_leave_the_report_and_other_peoples_folders(tmp_path: Path) -> None:
    run, folder = tiny_run(tmp_path / "runs", {"evaluate": {"prompts": 4}}), tmp_path / "probe"
    (folder / "steps").mkdir(parents=True)
    (folder / "steps" / "thesis.tex").write_text("x")
    with pytest.raises(OpdError, match="steps exists"):
        probe(run, SMALL, folder=folder, steps=2)
    forget_steps(folder)  # as a second probe would: it is no run folder
    assert (folder / "steps" / "thesis.tex").read_text() == "x"
    assert len(report(folder)["verdicts"]) == 6
    assert report(folder)["steps"] is None

"""Alarms in runs: planted faults are named, healthy runs are silent, and what is done then."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.errors import AlarmError, ConfigError
from opd.rollout.local import LocalSampler
from opd.teacher.local import LocalTeacher
from opd.training.checkpoint import find_checkpoints
from opd.training.config import load
from opd.training.folder import RunFolder
from opd.training.loop import StepReport, train_run
from opd.training.session import Session, open_session
from opd.types import Need, Stat, Teacher, TeacherRequest, TeacherScores, pack_rows
from tests.training.runs import abandon, finish, outcome, tiny_run
from tests.training.test_several_teachers import routed_run

# The student is a model that can sort, as its teacher is, so that nothing is wrong to begin with.
ABLE: dict[str, Any] = {
    "student": {"model": "builtin:sort-teacher"},
    "teacher": {"model": "builtin:sort-teacher"},
    "sampler": {"max_new_tokens": 64},
    "train": {"steps": 6, "prompts_per_step": 8, "save_every": 0, "learning_rate": 1e-5},
    "evaluate": {"every": 0, "prompts": 1, "test_prompts": 1, "teacher": False},
    "monitor": {"every": 2},
}
# The teacher of a tiny run has learnt nothing.
NOISE = {"train": {"steps": 8}, "monitor": {"every": 2}}


@dataclass
class Around:
    """A teacher around another one."""

    inner: Teacher
    asks: Callable[[TeacherRequest], TeacherRequest] = lambda request: request
    says: Callable[[TeacherRequest, TeacherScores], TeacherScores] = lambda _, scores: scores

    def can(self, need: Need) -> bool:
        return self.inner.can(need)

    def score(self, request: TeacherRequest) -> TeacherScores:
        return self.says(request, self.inner.score(self.asks(request)))


def shifted(session: Session) -> None:
    """The teacher answers for the token before."""

    def asks(request: TeacherRequest) -> TeacherRequest:
        batch = replace(request.batch, row_index=request.batch.row_index - 1)
        return replace(request, batch=batch)

    session.teachers["teacher"] = Around(session.teachers["teacher"], asks)


def renamed_end(session: Session) -> None:
    """The teacher's end token has the id that is the letter A to the student."""
    teacher = session.teachers["teacher"]
    assert isinstance(teacher, LocalTeacher)
    model = copy.deepcopy(teacher.loaded.model)
    end, other = teacher.loaded.eos_ids[0], teacher.loaded.tokenizer.convert_tokens_to_ids("A")
    with torch.no_grad():
        weight: Any = model.get_input_embeddings().weight
        weight[[end, other]] = weight[[other, end]]
    loaded = replace(teacher.loaded, model=model)
    session.teachers["teacher"] = LocalTeacher(loaded, vocab_size=teacher.vocab_size)


def header(session: Session) -> None:
    """The teacher expects another first token, and nothing else is wrong with it."""
    inner = session.teachers["teacher"]

    def says(request: TeacherRequest, scores: TeacherScores) -> TeacherScores:
        token = request.batch.token
        first = pack_rows(token.mask.long().cumsum(1) == 1, token.mask)
        if scores.sampled_logp is None:  # a look
            return scores
        return replace(scores, sampled_logp=torch.where(first, -12.0, scores.sampled_logp))

    session.teachers["teacher"] = Around(inner, says=says)


def another_sampler(session: Session) -> None:
    """Whoever writes has other weights than the student."""
    other = copy.deepcopy(session.student.loaded.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    sampler = LocalSampler(replace(session.student.loaded, model=other))
    inner = session.student_sampler

    class Other:
        def sample(self, prompts: Any, settings: Any, **rest: Any) -> Any:
            steps = settings.temperature > 0
            return (sampler if steps else inner).sample(prompts, settings, **rest)

    session.student_sampler = Other()


def names_given(run: Any, plant: Callable[[Session], None] = lambda _: None) -> set[str]:
    session = open_session(run)
    plant(session)
    *_, last = finish(run, session=session)
    assert last.summary is not None
    return set(last.summary["alarms"])


def test_able_students_of_able_teachers_give_no_alarm(tmp_path: Path) -> None:
    assert names_given(tiny_run(tmp_path, ABLE)) == set()
    sampled = {"method": {"name": "sampled_token_opd"}, "name": "sampled"}
    assert names_given(tiny_run(tmp_path, ABLE, sampled)) == set()


@pytest.mark.parametrize(
    ("plant", "name", "method"),
    [
        (shifted, "misaligned_events", "reverse_kl_opd"),
        (shifted, "misaligned_events", "sampled_token_opd"),
        (renamed_end, "end_token_mismatch", "reverse_kl_opd"),
        (header, "foreign_template", "sampled_token_opd"),
        (another_sampler, "stale_sampler", "reverse_kl_opd"),
    ],
)
def test_a_planted_fault_is_named(
    plant: Callable[[Session], None], name: str, method: str, tmp_path: Path
) -> None:
    assert name in names_given(tiny_run(tmp_path, ABLE, {"method": {"name": method}}), plant)


def alarm_lines(folder: Path) -> list[dict[str, Any]]:
    return [event for event in RunFolder(folder).read_events() if "alarm" in event]


def test_an_alarm_is_in_the_events_the_reports_and_the_summary(tmp_path: Path) -> None:
    """A look at steps 1 and 3 tells noise; from then on it goes on."""
    reports = finish(tiny_run(tmp_path, NOISE))
    lines = [line for line in alarm_lines(tmp_path / "run") if line["alarm"] == "noise_teacher"]
    assert [(line["phase"], line["step"]) for line in lines] == [("train", s) for s in range(3, 9)]
    assert all(line["value"] > 0.9 > line["threshold"] == 0.51 for line in lines)
    begun = {r.step: r.alarms for r in reports if any("noise_teacher" in a for a in r.alarms)}
    assert list(begun) == [3]
    (words,) = [alarm for alarm in begun[3] if "noise_teacher" in alarm]
    assert "check `teacher.model`" in words
    summary = reports[-1].summary
    assert summary is not None
    told = summary["alarms"]["noise_teacher"]
    assert (told["first_step"], told["steps"], told["threshold"]) == (3, 6, 0.51)
    assert told["value"] == lines[-1]["value"]
    assert "check `teacher.model`" in told["what_to_do"]
    assert summary["exit_reason"] == "finished"


def test_alarms_that_are_off_are_not_given(tmp_path: Path) -> None:
    off = {"monitor": {"off": ["noise_teacher"]}}
    reports = finish(tiny_run(tmp_path, NOISE, off))
    assert "noise_teacher" not in {line["alarm"] for line in alarm_lines(tmp_path / "run")}
    assert "noise_teacher" not in reports[-1].summary["alarms"]  # type: ignore[index]
    finish(tiny_run(tmp_path, NOISE, {"name": "none", "monitor": {"on": False}}))
    assert alarm_lines(tmp_path / "none") == []


def stopped(run: Any) -> tuple[list[StepReport], str]:
    reports: list[StepReport] = []
    with pytest.raises(AlarmError) as stop:
        reports.extend(train_run(run))
    return reports, str(stop.value)


def test_an_alarm_may_stop_a_run_after_a_checkpoint(tmp_path: Path) -> None:
    stop = {"monitor": {"on_alarm": "stop"}, "train": {"save_every": 0}}
    reports, words = stopped(tiny_run(tmp_path, NOISE, stop))
    folder = RunFolder(tmp_path / "run")
    assert reports[-1].step == 3
    assert folder.read_summary()["exit_reason"] == f"alarm: {alarm_lines(folder.path)[0]['alarm']}"
    assert "noise_teacher" in folder.read_summary()["alarms"]
    assert [checkpoint.path.name for checkpoint in find_checkpoints(folder)] == ["step-3"]
    assert f"opd run --resume {folder.path} --monitor.on_alarm log" in words

    again = load(folder.path, ["--monitor.on_alarm", "log"])
    *_, last = finish(again, resume=folder.path)
    assert last.summary is not None
    assert last.summary["exit_reason"] == "finished"
    assert last.summary["alarms"]["noise_teacher"]["steps"] == 6
    assert [
        line["step"] for line in alarm_lines(folder.path) if line["alarm"] == "noise_teacher"
    ] == [*range(3, 9)]


def test_act_does_what_is_listed_and_nothing_else(tmp_path: Path) -> None:
    constant = {"train": {"decay": "constant", "lr_warmup_steps": 0}}
    act = {"monitor": {"on_alarm": "act", "act": {"noise_teacher": "lower_rate"}}}
    reports = finish(tiny_run(tmp_path, NOISE, constant, act))
    rates = [r.metrics["optimizer/learning_rate"].mean for r in reports if r.tokens]
    assert rates == [1e-3] * 3 + [5e-4] * 5  # once, after the step at which it began
    summary = reports[-1].summary
    assert summary is not None
    assert len(summary["alarms"]) > 1
    assert summary["exit_reason"] == "finished"
    assert any("halved the learning rate after step 3" in note for note in summary["notes"])
    told = [note for report in reports[:-1] for note in report.notes]
    assert [note for note in told if "halved" in note] == [
        note for note in summary["notes"] if "halved" in note
    ]


def test_act_may_stop_at_one_alarm(tmp_path: Path) -> None:
    act = {"monitor": {"on_alarm": "act", "act": {"noise_teacher": "stop"}}}
    stopped(tiny_run(tmp_path, NOISE, act))
    assert RunFolder(tmp_path / "run").read_summary()["exit_reason"] == "alarm: noise_teacher"


@pytest.mark.parametrize("reports", [pytest.param(3, marks=pytest.mark.slow), 6])
def test_alarms_survive_a_resume(reports: int, tmp_path: Path) -> None:
    """Killed before the alarm, and after it has lowered the rate."""
    act = {"monitor": {"on_alarm": "act", "act": {"noise_teacher": "lower_rate"}}}
    changes = (NOISE, act, {"train": {"save_every": 1}})
    finish(tiny_run(tmp_path / "whole", *changes))
    run = tiny_run(tmp_path / "parts", *changes)
    abandon(run, reports)
    finish(run, resume=tmp_path / "parts" / "run")
    whole, parts = (outcome(tmp_path / name / "run") for name in ("whole", "parts"))
    assert whole == parts
    assert whole["summary"]["alarms"]["noise_teacher"]["first_step"] == 3


GOLDEN: dict[str, Any] = {
    "evaluate": {
        "every": 2,
        "test_prompts": 24,
        "sets": {"able": "task:sort", "other": "task:add"},
    },
    "monitor": {"golden": ("able",)},
}


def test_a_skill_that_is_unlearnt_is_named_and_only_golden_sets_are_watched(tmp_path: Path) -> None:
    """An able student follows a teacher that knows nothing."""
    nothing = {"teacher": {"model": "builtin:sort-teacher-init"}}
    ruined = nothing | {"train": {"learning_rate": 1e-2}}
    *reports, last = finish(tiny_run(tmp_path, ABLE, GOLDEN, ruined))
    watched = {
        r.step: r.metrics["golden/able/accuracy"]
        for r in reports
        if "golden/able/accuracy" in r.metrics
    }
    assert list(watched) == [0, 2, 4, 6]
    assert watched[0].mean > 0.9
    assert watched[6].mean < 0.3
    assert last.summary is not None
    told = last.summary["alarms"]["golden_regression"]
    accuracy = last.summary["sets"]
    assert accuracy["start"]["able"]["value"] == watched[0].mean
    assert accuracy["final"]["able"]["value"] == watched[6].mean
    assert told["value"] < 0
    assert "golden/other/accuracy" not in reports[-1].metrics


def test_a_skill_that_stays_is_not_named(tmp_path: Path) -> None:
    *_, last = finish(tiny_run(tmp_path, ABLE, GOLDEN))
    assert last.summary is not None
    assert "golden_regression" not in last.summary["alarms"]


def test_what_an_alarm_is_to_do_after_a_resume_is_done(tmp_path: Path) -> None:
    """It was given before and did nothing then."""
    stop = {"monitor": {"on_alarm": "stop"}, "train": {"save_every": 0}}
    stopped(tiny_run(tmp_path, NOISE, stop))
    name = RunFolder(tmp_path / "run").read_summary()["exit_reason"].removeprefix("alarm: ")
    act = ["--monitor.on_alarm", "act", f"--monitor.act.{name}", "lower_rate"]
    *_, last = finish(load(tmp_path / "run", act), resume=tmp_path / "run")
    assert last.summary is not None
    assert last.summary["alarms"][name]["lowered_at"] == 4
    (note,) = [note for note in last.summary["notes"] if "halved" in note]
    assert name in note


def test_a_golden_set_that_comes_with_a_resume_is_held_to_the_start_of_the_run(
    tmp_path: Path,
) -> None:
    nothing = {"teacher": {"model": "builtin:sort-teacher-init"}}
    ruined = nothing | {"train": {"learning_rate": 1e-2, "save_every": 1}, "monitor": {"every": 2}}
    run = tiny_run(tmp_path, ABLE, {"evaluate": GOLDEN["evaluate"]}, ruined)
    abandon(run, 4)
    again = load(tmp_path / "run", ["--monitor.golden", '["able"]'])
    *_, last = finish(again, resume=tmp_path / "run")
    assert last.summary is not None
    assert last.summary["alarms"]["golden_regression"]["value"] < 0


def test_a_route_is_no_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an average of the teachers would do, no row has both."""
    opposed = {"teacher/add|sort/cosine": Stat(-1.0, 1.0)}
    monkeypatch.setattr("opd.training.conflict.measure", lambda *_, **__: dict(opposed))
    *reports, last = finish(routed_run(tmp_path, {"teacher": {"conflict_every": 1}}))
    measured = [r for r in reports if "teacher/add|sort/cosine" in r.metrics]
    assert len(measured) > 2
    assert last.summary is not None
    assert "conflicting_teachers" not in last.summary["alarms"]


# --------------------------------------------------------------------------------------------
# The run file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"off": ["noise_techer"]}, "'noise_techer' is no alarm. Did you mean 'noise_teacher'?"),
        ({"act": {"repetition": "stop"}}, 'set on_alarm = "act" or leave act out'),
        ({"on_alarm": "act"}, "[monitor.act] names no alarm"),
        ({"on_alarm": "act", "act": {"loops": "stop"}}, "monitor.act: 'loops' is no alarm"),
        ({"on_alarm": "act", "act": {"repetition": "halve"}}, "monitor.act.repetition"),
        (
            {"on_alarm": "act", "act": {"repetition": "stop"}, "off": ["repetition"]},
            "monitor.act and monitor.off both name 'repetition'",
        ),
        ({"on_alarm": "stp"}, "Did you mean 'stop'?"),
        ({"on": False, "on_alarm": "stop"}, "monitor.on is false, so there are no alarms"),
        (
            {"on_alarm": "act", "act": {"misaligned_events": "stop"}, "every": 0},
            "'misaligned_events', which is seen in looks, and monitor.every is 0",
        ),
        (
            {"on_alarm": "act", "act": {"golden_regression": "stop"}},
            "'golden_regression', and monitor.golden names no set",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_run(tmp_path, {"monitor": changes})
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"monitor": {"golden": ("sort",)}}, "monitor.golden: 'sort' is no set of evaluate.sets"),
        (
            {**GOLDEN, "evaluate": GOLDEN["evaluate"] | {"every": 0}},
            "monitor.golden names sets to be watched, and evaluate.every is 0",
        ),
        (
            {**GOLDEN, "monitor": GOLDEN["monitor"] | {"on": False}},
            "monitor.golden names sets to be watched, and monitor.on is false",
        ),
        ({**GOLDEN, "data": {"verifier": "none"}}, 'data.verifier is "none"'),
    ],
)
def test_a_golden_set_that_nobody_measures_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_run(tmp_path, changes)
    assert words in str(refused.value)


def test_the_settings_come_back_from_the_run_folder(tmp_path: Path) -> None:
    act = {"monitor": {"on_alarm": "act", "act": {"noise_teacher": "log"}}}
    run = tiny_run(tmp_path, act, {"train": {"steps": 0}})
    finish(run)
    assert load(tmp_path / "run").config.monitor == run.config.monitor
    config = json.loads(json.dumps(load(tmp_path / "run").config.monitor.act))
    assert config == {"noise_teacher": "log"}

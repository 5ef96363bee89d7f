"""What a probe says of several teachers: whether they pull apart, and whose rows they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from opd.training.conflict import measure
from opd.training.pilot import Pilot, PilotSettings, look, quiet, scored, warm_up
from opd.training.pilot_interface import Audit, _conflict
from opd.training.session import open_session
from tests.training.runs import tiny_run

SMALL = PilotSettings(responses=12, samples=2)
TERM = {"kind": "dense", "divergence": "reverse_kl"}
SHARED: Mapping[str, Any] = {
    "teacher": {"conflict_every": 1},
    "data": {"prompts": "task:add+sort"},
    "evaluate": {"prompts": 6},
}
ROUTED: Mapping[str, Any] = {
    "teacher": {"model": "", "route": "task"},
    "teachers": {
        "add": {"model": "builtin:add-teacher"},
        "sort": {"model": "builtin:sort-teacher"},
    },
}


def both(**view: Any) -> dict[str, Any]:
    """Two teachers of every row, the first with what is said of its view."""
    return {
        "teacher": {"model": "builtin:sort-teacher"},
        "teachers": {"add": {"model": "builtin:add-teacher"}},
        "method": {
            "name": "custom",
            "objective": {"terms": [TERM, {**TERM, "name": "two", "against": "teacher.add"}]},
            "views": [
                {"name": "teacher", "source": "teacher", **view},
                {"name": "teacher.add", "source": "teacher"},
            ],
        },
    }


def conflict(seen: Pilot) -> Audit:
    (found,) = _conflict(seen)
    return found


def test_a_teacher_that_reads_a_context_is_asked_as_it_reads(tmp_path: Path) -> None:
    found = {}
    for name, view in (("plain", {}), ("told", {"context": "{prompt}1"})):
        run = tiny_run(tmp_path / name, SHARED, both(**view))
        found[name] = conflict(look(open_session(run), SMALL)).numbers
    assert found["told"].keys() == found["plain"].keys()
    # the other teacher reads the same, so only what the context changes can differ
    key = "teacher/teacher|add/kl"
    assert found["told"][key] != pytest.approx(found["plain"][key], rel=0.01)


def test_the_cosine_of_an_audit_is_that_of_the_loop(tmp_path: Path) -> None:
    seen = look(open_session(tiny_run(tmp_path, SHARED, both())), SMALL)
    session = seen.session
    assert session.rivals is not None
    expected = measure(
        session.rivals,
        session.student,
        scored(session, seen.method, seen.rollout),
        seen.method.objective,
        seen.plan,
        session.max_tokens,
    )
    numbers = conflict(seen).numbers
    assert numbers.keys() == expected.keys()
    for name, stat in expected.items():
        assert numbers[name] == pytest.approx(stat.mean, abs=1e-4), name


def test_teachers_that_pull_apart_are_named_where_they_share_rows_and_not_where_routed(
    tmp_path: Path,
) -> None:
    """A student on its way, two tasks: a teacher of the one is against the other's."""
    warmed = {"warmup": {"steps": 30, "learning_rate": 3e-3, "prompts_per_step": 16}}
    run = tiny_run(tmp_path, SHARED, both(), warmed)
    student = warm_up(open_session(quiet(run, str(tmp_path / "quiet"))))
    shared = conflict(look(open_session(run, student=student), SMALL))
    assert shared.numbers["teacher/teacher|add/cosine"] < -0.3
    assert (shared.found, shared.setting) == (True, "teacher.route")
    routed_run = tiny_run(tmp_path / "routed", SHARED, ROUTED)
    routed = conflict(look(open_session(routed_run, student=student), SMALL))
    assert routed.numbers["teacher/add|sort/cosine"] < -0.3
    assert (routed.found, routed.setting) == (False, "")
    assert "a route is set" in routed.message


def test_teachers_that_say_wholly_different_things_are_named_whatever_their_gradients(
    tmp_path: Path,
) -> None:
    """Six prompts of two tasks: the interval of the cosine reaches above 0."""
    warmed = {"warmup": {"steps": 100, "learning_rate": 3e-3, "prompts_per_step": 16}}
    run = tiny_run(tmp_path, SHARED, both(), warmed)
    student = warm_up(open_session(quiet(run, str(tmp_path / "quiet"))))
    found = conflict(look(open_session(run, student=student), SMALL))
    assert found.found
    assert "an average is neither" in found.message
    assert found.numbers["teacher/teacher|add/kl"] > 5


def test_teachers_that_agree_are_no_conflict(tmp_path: Path) -> None:
    twins = {"teachers": {"add": {"model": "builtin:sort-teacher"}}}
    found = conflict(look(open_session(tiny_run(tmp_path, SHARED, both(), twins)), SMALL))
    assert found.numbers["teacher/teacher|add/kl"] == pytest.approx(0.0, abs=1e-6)
    assert not found.found

"""`benchmarks/advice.py`: its list of mis-set runs, what a proposal changes, and how it counts."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from opd.training.check import check
from opd.training.config import load, to_json
from opd.training.evaluate import wilson
from opd.training.pilot_proposal import Change
from opd.training.session import build_method
from opd.types import Prompt
from opd.user_code import find_function
from tests.test_docs import ROOT, module_from


@pytest.fixture(scope="module")
def advice() -> ModuleType:
    """The script, imported as its command runs it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return module_from("advice", ROOT / "benchmarks/advice.py")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def case_of(advice: ModuleType, name: str) -> Any:
    (case,) = [case for case in advice.CASES if case.name == name]
    return case


def test_there_are_enough_cases_and_each_has_a_file_of_its_own(advice: ModuleType) -> None:
    names = [case.name for case in advice.CASES] + [f"healthy {task}" for task in advice.HEALTHY]
    assert len(advice.CASES) >= 12
    assert len({advice.file_of(name) for name in names}) == len(names)
    assert {"sort", "add", "chain"} <= {case.task for case in advice.CASES}


def test_every_run_file_loads_with_its_mistake(advice: ModuleType, tmp_path: Path) -> None:
    checked = 0
    for case in advice.CASES:
        for name, text in case.files.items():
            (tmp_path / name).write_text(text)
        healthy = advice.run_of(case.task, tmp_path)
        mistake = advice.run_of(case.task, tmp_path, case.changes)
        assert to_json(mistake.config) != to_json(healthy.config), case.name
        build_method(mistake)
        # a check costs a second; what is new to it is a composition or a user's own code
        if any(key.startswith(("method.", "data.")) for key in case.changes):
            checked += 1
            found = [str(finding) for finding in check(mistake) if finding.level == "error"]
            assert found == [], case.name
    assert checked == 6


def test_every_way_out_sets_the_key_that_has_to_be_named(
    advice: ModuleType, tmp_path: Path
) -> None:
    ways = [(case, key, value) for case in advice.CASES for key, value in case.way_out.items()]
    assert len(ways) == 7
    for case, key, value in ways:
        assert key in value, case.name
        run = advice.run_of(case.task, tmp_path, case.changes, value)
        assert [view.name for view in build_method(run).views] == ["teacher"], case.name


def test_a_way_out_undoes_the_mistake(advice: ModuleType, tmp_path: Path) -> None:
    """Where the mistake is in one key, what is left is the recipe."""
    undone = 0
    for case in advice.CASES:
        for value in case.way_out.values():
            if set(value) == set(case.changes):
                undone += 1
                mended = advice.run_of(case.task, tmp_path, case.changes, value)
                healthy = advice.run_of(case.task, tmp_path)
                assert to_json(mended.config) == to_json(healthy.config), case.name
    assert undone == 3


def test_a_verifier_of_the_list_wants_the_opposite_order(
    advice: ModuleType, tmp_path: Path
) -> None:
    (case,) = [case for case in advice.CASES if case.files]
    for name, text in case.files.items():
        (tmp_path / name).write_text(text)
    judge = find_function(case.changes["data.verifier"], tmp_path)
    prompt = Prompt("0", (1,), "S312:")
    assert judge(prompt, "3|12,2|1>321", finished=True)
    assert not judge(prompt, "1|32,2|3>123", finished=True)
    assert not judge(prompt, "3|12,2|1>321", finished=False)


def test_one_change_is_made_and_no_other(advice: ModuleType, tmp_path: Path) -> None:
    """A value of the probe's goes before the way out; a key of another kind is no way out."""
    case = case_of(advice, "the teacher of another task")
    run = advice.run_of(case.task, tmp_path, case.changes)

    def way(key: str, value: Any) -> Any:
        return advice.way(case, Change(key, value, "why"), run, PROPOSED)

    assert way("teacher.model", None) == {"teacher.model": "builtin:add-teacher"}
    assert way("warmup.steps", 240) == {"warmup.steps": 240}
    assert way("data.chat_template_kwargs", None) is None
    # of the proposed file the objective alone, not its other changes
    made = way("method.objective", {})
    changed = advice.run_of(case.task, tmp_path, case.changes, made).config
    assert changed.method.objective == PROPOSED["method"]["objective"]
    assert not changed.method.merge_stop_ids
    assert changed.warmup.steps == load(advice.HEALTHY["add"]).config.warmup.steps != 7
    assert changed.teacher.model == "builtin:sort-teacher"


PROPOSED: dict[str, Any] = {
    "warmup": {"steps": 7},
    "method": {
        "name": "custom",
        "objective": {"terms": [{"kind": "dense", "divergence": "forward_kl"}]},
        "states": {},
        "views": [],
        "merge_stop_ids": True,
    },
}


def kept(name: str, before: int, after: int | None, **more: Any) -> dict[str, Any]:
    """A result of right answers among 100."""
    end = None if after is None else wilson(after, 100).as_dict()
    row = {"case": name, "task": "sort", "first": "nothing has to change", "after": end}
    return row | {"before": wilson(before, 100).as_dict()} | more


def test_raised_is_counted_over_all_that_can_run(
    advice: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By hand, Wilson's intervals: 40 of 100 ends at 0.498 and 50 of 100 begins at 0.404, so the
    two touch; 70 of 100 begins at 0.604, so it does not touch 40 of 100."""
    monkeypatch.setattr(advice, "FOLDER", tmp_path / "advice")
    planted = [
        {"case": "healthy sort", "task": "sort", "accuracy": wilson(80, 100).as_dict()},
        kept("far up", 40, 70, key="warmup.steps"),
        kept("up", 40, 50, key="warmup.steps"),
        kept("level", 40, 40, key="warmup.steps"),
        kept("down", 40, 30, key="warmup.steps"),
        kept("silent", 40, None),
        kept("another key", 40, None, key="teacher.model"),
        kept("refused", 40, None, key="teacher.model", refused="no such teacher"),
        {"case": "broken", "task": "sort", "cannot_run": "no such model"},
    ]
    for row in planted:
        advice.write(row)
    rows = advice.scored(list(advice.kept([row["case"] for row in planted])))
    raised = {row["case"]: (row["raised"], row["apart"]) for row in rows if "before" in row}
    assert raised.pop("far up") == (True, True)
    assert raised.pop("up") == (True, False)
    assert len(raised) == 5
    assert set(raised.values()) == {(False, False)}
    assert rows[-1] == {
        "case": "all",
        "runs": 7,
        "cannot_run": 1,
        "raised": 2,
        "apart": 1,
        "share_raised": pytest.approx(2 / 7),
        "share_apart": pytest.approx(1 / 7),
        "bar": 0.75,
    }
    advice.show(rows)
    told = capsys.readouterr().out
    assert "raised: 2 of 7 (29%; the bar is 75%), beyond both intervals: 1 (14%)" in told
    for word in ("no such teacher", "no way out", "nothing proposed", "cannot run", "0.800"):
        assert word in told

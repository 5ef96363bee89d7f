"""`opd list`, and the index it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd import methods
from opd.catalog import formulas
from opd.cli.main import main
from opd.data.tasks import TASKS
from opd.methods.make_index import INDEX, method_rows
from tests import battery

KEYS = ["name", "variables", "evidence", "formula_source", "source", "composition_hash"]


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["list", *words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_the_index_is_what_the_imported_methods_say() -> None:
    message = "methods/index.json is out of date: run `make index`"
    assert json.loads(INDEX.read_text(encoding="utf-8")) == method_rows(), message


def test_methods_have_the_keys_that_programs_read(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "methods")
    assert [list(row) for row in found] == [KEYS] * len(methods.__all__)
    assert {row["name"] for row in found} == set(methods.__all__)
    hashes = {row["composition_hash"] for row in found}
    shared = [("sft", "sft_on_teacher")]  # nothing shared: their text differs
    assert len(hashes) == len(found), shared


def test_formulas_and_tasks_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    named = {formula.name for formula in battery.formulas() if formula.exported}
    listed = {row["name"] for row in rows(capsys, "formulas")}
    assert listed == set(formulas()) == {name for name in named if "numerics." not in name}
    tasks = rows(capsys, "tasks")
    assert {row["name"] for row in tasks} == set(TASKS)
    for row in tasks:
        assert TASKS[row["name"]].solve(row["prompt"]) == row["solution"]


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("methods", ["reverse_kl_opd", "E0", "hash"]),
        ("formulas", ["divergence.generalized_jsd", "teacher_weight"]),
        ("tasks", ["sort", "selection sort"]),
    ],
)
def test_the_table_shows_names_and_meanings(
    what: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", what]) == 0
    shown = capsys.readouterr().out
    for part in parts:
        assert part in shown


def test_runs_are_listed_with_their_figures_finished_or_not(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows(capsys, "runs", "--output", str(finished.parent))
    summary = json.loads((finished / "summary.json").read_text())
    assert row["folder"] == str(finished)
    assert (row["method"], row["state"]) == ("reverse_kl_opd", "finished")
    assert row["final_accuracy"] == summary["final_accuracy"]["value"]
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.toml").write_text((finished / "config.toml").read_text())
    (row,) = rows(capsys, "runs", "--output", str(tmp_path))
    assert (row["state"], row["gain"]) == ("unfinished", None)


def test_no_runs_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(capsys, "runs", "--output", str(tmp_path / "none")) == []
    assert main(["list", "runs", "--output", str(tmp_path / "none")]) == 0
    assert "no runs" in capsys.readouterr().out

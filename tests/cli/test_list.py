"""`opd list`, and the index it reads."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from opd import diagnose, methods
from opd.catalog import alarms, diagnostics, formulas
from opd.catalog import rules as composition_rules
from opd.cli.listing import FILTERS
from opd.cli.main import main
from opd.data.tasks import TASKS
from opd.methods.make_index import INDEX, method_rows
from opd.methods.variables import VARIABLES
from opd.training.explain import EVIDENCE
from tests import battery
from tests.cli.test_main import TORCH_FREE, run_python

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


def test_rules_have_the_keys_that_programs_read(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "rules")
    keys = ["name", "level", "says", "reason", "way_out", "source"]
    assert [list(row) for row in found] == [keys] * len(composition_rules())
    assert all(all(row.values()) for row in found)
    assert {row["level"] for row in found} == {"refused", "must be declared", "note", "allowed"}


def test_diagnostics_have_the_keys_that_programs_read(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "diagnostics")
    keys = ["id", "name", "formula", "unit", "reading", "action", "source", "cost"]
    assert [list(row) for row in found] == [keys] * len(diagnostics())
    assert all(all(row.values()) for row in found)
    assert {row["name"] for row in found} == set(diagnose.__all__)
    ids = {row["name"]: row["id"] for row in found}
    assert (ids["negative_mass"], ids["leak"]) == ("neg_mass", "leak")


def test_alarms_have_the_keys_that_programs_read(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "alarms")
    keys = ["name", "says", "mechanism", "rule", "reads", "side", "threshold", "origin"]
    assert [list(row) for row in found] == [[*keys, "what_to_do", "source"]] * len(alarms())
    assert {row["name"] for row in found} == set(alarms())
    stale = next(row for row in found if row["name"] == "stale_sampler")
    assert stale["reads"] == ["monitor/kl_from_samples"]
    assert (stale["side"], stale["threshold"]) == ("above", 0.31)


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("alarms", ["stale_sampler", "above 0.3", "has left"]),
        ("diagnostics", ["calibration_error", "ece", "confidence"]),
        ("rules", ["stale-rewards", "must be declared", "allowed"]),
        ("methods", ["reverse_kl_opd", "E0", "evidence"]),
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


# --------------------------------------------------------------------------------------------
# Methods, filtered and by one of the nine variables


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["list", "methods", *words]) == 0
    return capsys.readouterr().out


def table_lines(text: str) -> list[str]:
    """The header, the rule below it and the rows."""
    return [line for line in text.splitlines() if line.strip()]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["list", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


def names(found: list[dict[str, Any]]) -> set[str]:
    return {row["name"] for row in found}


@pytest.mark.parametrize("option", FILTERS)
def test_a_filter_keeps_the_methods_of_a_value_whole_and_no_other(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = rows(capsys, "methods")
    key, values = FILTERS[option]
    assert {row[key] for row in everything} <= set(values)
    for value in values:
        expected = [row for row in everything if row[key] == value]
        assert rows(capsys, "methods", f"--{option}", value) == expected
        assert rows(capsys, "methods", f"--{option}", value.swapcase()) == expected
    assert rows(capsys, "methods", f"--{option}", ", ".join(values)) == everything


def test_filters_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    both = rows(capsys, "methods", "--level", "E0", "--formula", "code")
    assert {"vopd", "top_k_opd"} <= names(both)
    assert not names(both) & {"sampled_token_opd", "gkd"}  # E2 with code; E0 from the paper
    assert {(row["evidence"], row["formula_source"]) for row in both} == {("E0", "code")}
    wider = rows(capsys, "methods", "--level", "E0,E2", "--formula", "code")
    assert names(wider) >= names(both) | {"sampled_token_opd"}


def test_the_table_holds_the_methods_that_pass_and_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = shown(capsys, "--level", "E2")
    assert "sampled_token_opd" in table
    assert not {"vopd", "gkd", "sft"} & set(table.split())


def test_that_nothing_passes_is_said_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    taken = {(row["evidence"], row["formula_source"]) for row in rows(capsys, "methods")}
    free = [(level, source) for level in EVIDENCE for source in FILTERS["formula"][1]]
    level, source = next(pair for pair in free if pair not in taken)
    words = ("--level", level, "--formula", source)
    assert rows(capsys, "methods", *words) == []
    assert f"no published method passes {' '.join(words)}" in shown(capsys, *words)


def test_the_levels_are_those_that_explain_describes() -> None:
    assert FILTERS["level"][1] == tuple(EVIDENCE)


@pytest.mark.parametrize("variable", VARIABLES)
def test_equal_choices_stand_together_the_commonest_first(
    variable: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(capsys, "methods", "--variable", variable)
    everything = rows(capsys, "methods")
    assert sorted(found, key=lambda row: row["name"]) == everything
    groups = [
        (choice, [row["name"] for row in group])
        for choice, group in groupby(found, key=lambda row: row["variables"][variable])
    ]
    assert len({choice for choice, _ in groups}) == len(groups)
    sizes = [len(group) for _, group in groups]
    assert sizes == sorted(sizes, reverse=True)
    assert all(group == sorted(group) for _, group in groups)


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_choice_takes_the_place_of_who_writes_the_text(
    variable: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")  # so that nothing is folded
    header, _, *lines = table_lines(shown(capsys, "--variable", variable))
    assert header.index("what it computes") < header.index(variable) < header.index("evidence")
    assert "text by" not in header
    found = rows(capsys, "methods", "--variable", variable)
    before = ""
    for line, row in zip(lines, found, strict=True):
        assert line.split()[0] == row["name"]
        choice = row["variables"][variable]
        said = '"' if choice == before else choice  # equal choices are written once
        assert line[header.index(variable) :].startswith(said + "  ")
        before = choice


@pytest.mark.parametrize(
    ("word", "variable"),
    [
        ("state", "state source"),
        ("feedback", "feedback source"),
        ("privilege", "teacher privilege"),
        ("Support", "support"),
        ("route", "update route"),
        ("credit", "temporal credit"),
        ("gate", "gate / weight"),
        ("WEIGHT", "gate / weight"),
        ("routing", "vocabulary routing"),
        ("regular", "regulariser"),
    ],
)
def test_a_part_of_a_variables_name_will_do(
    word: str, variable: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(capsys, "--variable", word) == shown(capsys, "--variable", variable)
    assert variable in shown(capsys, "--variable", word)


@pytest.mark.parametrize("word", ["source", "rout", "colour", ""])
def test_a_word_for_no_variable_or_for_several_is_refused_with_the_nine(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "methods", "--variable", word)
    for part in (repr(word), *VARIABLES):
        assert part in told


def test_a_word_for_several_variables_is_told_which(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "methods", "--variable", "source")
    assert "state source and feedback source" in told


@pytest.mark.parametrize("option", FILTERS)
@pytest.mark.parametrize("given", ["E9", "E0,colour", "code,,paper", ""])
def test_a_value_that_no_method_can_have_is_refused_with_those_there_are(
    option: str, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "methods", f"--{option}", given)
    for part in (f"--{option}", *FILTERS[option][1]):
        assert part in told


@pytest.mark.parametrize("what", ["formulas", "diagnostics", "rules", "tasks", "runs"])
@pytest.mark.parametrize("words", ["--variable routing", "--level E0", "--formula code"])
def test_the_filters_are_refused_where_no_methods_are_listed(
    what: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, what, *words.split(), "--json")
    assert words.split()[0] in told
    assert f"opd list {what}" in told
    assert "opd list methods" in told


@pytest.mark.parametrize("words", [[], *(["--variable", variable] for variable in VARIABLES)])
def test_80_columns_hold_every_name_and_one_column_of_prose(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    header, _, *lines = table_lines(shown(capsys, *words))
    columns = [column.strip() for column in header.split("  ") if column]
    assert columns == ["method", words[1] if words else "what it computes", "evidence"]
    assert all(len(line) <= 80 for line in lines)
    found = rows(capsys, "methods", *words)
    begun = [line.split()[0] for line in lines if not line.startswith("  ")]
    assert begun == [row["name"] for row in found]


@pytest.mark.parametrize(
    "words",
    ["--variable routing --level E0 --formula code,paper", "--variable colour", "--level E9"],
)
def test_filters_and_their_errors_import_no_torch(words: str, tmp_path: Path) -> None:
    done = run_python("-c", TORCH_FREE, "list", "methods", *words.split(), cwd=tmp_path)
    assert "heavy: []" in done.stderr
    assert done.returncode == (0 if "routing" in words else 2), done.stderr

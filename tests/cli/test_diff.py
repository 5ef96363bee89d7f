"""`opd diff`: the variables in which two compositions differ, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd import methods
from opd.cli.main import main
from opd.methods.variables import VARIABLES, nine_variables
from tests.cli.test_main import TORCH_FREE, run_python

NAMES = ["reverse_kl_opd", "gkd", "vopd", "sampled_token_opd", "top_k_opd", "sft"]
PAIRS = [(first, second) for first in NAMES for second in NAMES if first < second]

RUN = """\
[student]
model = "builtin:sort-student"
[teacher]
model = "builtin:sort-teacher"
[data]
prompts = "task:sort"
"""


def rows(capsys: pytest.CaptureFixture[str], first: str, second: str) -> list[dict[str, Any]]:
    assert main(["diff", first, second, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def shown(capsys: pytest.CaptureFixture[str], first: str, second: str) -> str:
    assert main(["diff", first, second]) == 0
    return capsys.readouterr().out


def run_file(folder: Path, text: str, name: str = "run.toml") -> str:
    file = folder / name
    file.write_text(RUN + text)
    return str(file)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_variables_that_differ_are_told_in_the_surveys_order_and_no_other(
    first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (nine_variables(getattr(methods, name)()) for name in (first, second))
    assert rows(capsys, first, second) == [
        {"variable": variable, "first": one[variable], "second": other[variable]}
        for variable in VARIABLES
        if one[variable] != other[variable]
    ]


def test_vopd_is_the_sampled_token_with_a_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "sampled_token_opd", "vopd")
    assert [row["variable"] for row in found] == ["support", "temporal credit"]
    assert found[1]["first"] == "immediate"
    assert found[1]["second"] == "immediate, less the baseline expected_reward"


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_table_has_a_line_for_each_of_them_and_no_further_line(
    first: str,
    second: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # so that nothing is folded
    lines = [line for line in shown(capsys, first, second).splitlines() if line.strip()]
    header, _, *lines = lines
    assert header.split() == ["variable", first, second]
    for line, row in zip(lines, rows(capsys, first, second), strict=True):
        assert line[header.index("variable") :].startswith(row["variable"])
        assert line[header.index(first) :].startswith(row["first"])
        assert line[header.index(second) :].rstrip() == row["second"]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_other_way_round_the_two_sides_change_places(
    first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = rows(capsys, first, second)
    back = rows(capsys, second, first)
    assert [(row["variable"], row["second"], row["first"]) for row in back] == [
        (row["variable"], row["first"], row["second"]) for row in there
    ]


def test_equal_compositions_are_one_line_with_their_hash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = shown(capsys, "vopd", "vopd")
    assert said == f"vopd and vopd are the same composition, {methods.vopd().composition_hash}\n"
    assert rows(capsys, "vopd", "vopd") == []


def test_a_run_file_that_names_a_method_is_that_methods_composition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_file(tmp_path, '[method]\nname = "gkd"\n')
    said = shown(capsys, run, "gkd")
    assert said == (f"{run} and gkd are the same composition, {methods.gkd().composition_hash}\n")
    assert rows(capsys, "vopd", run) == rows(capsys, "vopd", "gkd")


def test_options_of_a_run_file_show_in_their_variables_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_file(
        tmp_path,
        '[method]\nname = "gkd"\n[method.options]\nteacher_weight = 0.3\nstudent_share = 0.5\n',
    )
    found = {row["variable"]: row["second"] for row in rows(capsys, "gkd", run)}
    assert set(found) == {"state source", "update route"}
    assert "50%" in found["state source"]
    assert "teacher_weight=0.3" in found["update route"]


def test_two_run_files_with_functions_of_their_own_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name in ("squared", "doubled"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.py").write_text(
            f"def {name}(student_log_probs, teacher_log_probs):\n"
            "    return (student_log_probs - teacher_log_probs).sum(-1)\n"
        )
        terms = f'[[method.objective.terms]]\nkind = "dense"\ndivergence = "mine:{name}"\n'
        runs.append(run_file(folder, f'[method]\nname = "custom"\n{terms}'))
    (row,) = rows(capsys, *runs)
    assert row == {
        "variable": "update route",
        "first": "dense: differentiate squared",
        "second": "dense: differentiate doubled",
    }


def test_what_the_optimizer_step_adds_is_a_difference_in_the_regulariser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_file(tmp_path, "[train]\nanchor = 0.1\n")
    (row,) = rows(capsys, "reverse_kl_opd", run)
    assert (row["variable"], row["first"]) == ("regulariser", "none")
    assert "anchor(0.1)" in row["second"]


def test_two_compositions_that_the_nine_words_do_not_tell_apart_are_not_called_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_file(
        tmp_path,
        '[method]\nname = "custom"\n[method.objective]\ntemperature = 2.0\n'
        '[[method.objective.terms]]\nkind = "dense"\ndivergence = "reverse_kl"\n',
    )
    said = shown(capsys, "reverse_kl_opd", run)
    assert said.count("\n") == 1
    assert "same composition" not in said
    assert methods.reverse_kl_opd().composition_hash in said
    assert "temperature" in said
    assert rows(capsys, "reverse_kl_opd", run) == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("gdk vopd", ["'gdk'", "'gkd'"]),
        ("vopd gdk", ["'gdk'", "'gkd'"]),
        ("vopd", ["required", "opd diff --help"]),
        ("vopd gkd sft", ["no further argument", "'sft'"]),
        ("vopd nowhere.toml", ["'nowhere.toml'"]),
        ("vopd gkd --level E0", ["no option '--level'"]),
    ],
)
def test_a_mistake_is_named_with_the_way_out(
    words: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", *words.split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    for part in parts:
        assert part in told.err


@pytest.mark.parametrize("words", ["vopd gkd", "vopd gkd --json", "vopd vopd", "vopd gdk"])
def test_published_methods_and_unknown_names_import_no_torch(words: str, tmp_path: Path) -> None:
    done = run_python("-c", TORCH_FREE, "diff", *words.split(), cwd=tmp_path)
    assert "heavy: []" in done.stderr
    assert done.returncode == (2 if "gdk" in words else 0), done.stderr

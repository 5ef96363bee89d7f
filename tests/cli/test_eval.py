"""`opd eval`: a run or a model on named sets of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd.cli.main import main


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["eval", *words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_is_measured_on_its_own_test_prompts(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows(capsys, str(finished), "--samples", "2")
    summary = json.loads((finished / "summary.json").read_text())
    assert (row["set"], row["prompts"]) == ("test", 8)
    assert row["greedy"] == summary["final_accuracy"]
    assert row["weights"] == str(finished / "model")
    assert list(row["pass_at_k"]) == ["1"]
    assert row["pass_at_k"]["1"]["value"] == row["mean_at_n"]["value"]


def test_a_good_model_folder_is_good_and_what_is_not_asked_is_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets = ("--set", "easy=task:sort", "--set", "other=task:add")
    easy, other = rows(
        capsys, "builtin:sort-teacher", *sets, "--limit", "12", "--samples", "4", "--k", "2,4"
    )
    assert (easy["set"], easy["prompts"], easy["source"]) == ("easy", 12, "task:sort/test")
    assert easy["greedy"]["value"] > 0.7
    assert other["greedy"]["value"] == 0.0
    assert list(easy["pass_at_k"]) == ["2", "4"]
    assert easy["mean_at_n"]["value"] <= easy["pass_at_k"]["2"]["value"]
    assert easy["pass_at_k"]["2"]["value"] <= easy["pass_at_k"]["4"]["value"]
    for score in (easy["greedy"], easy["mean_at_n"], easy["pass_at_k"]["4"]):
        assert score["low"] <= score["value"] <= score["high"]


def test_a_file_is_measured_with_the_verifier_it_calls_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solved = {"prompt": "S4312:", "answer": "1|432,2|43,3|4>1234"}
    lines = [json.dumps(record) for record in (solved, {**solved, "answer": "nothing"})]
    file = tmp_path / "two.jsonl"
    file.write_text("\n".join(lines))
    words = ("builtin:sort-teacher", "--set", f"two={file}", "--sampler.max_new_tokens", "40")
    (row,) = rows(capsys, *words)
    assert row["greedy"]["value"] == 0.5
    (row,) = rows(capsys, *words, "--data.verifier", "none")
    assert row["greedy"]["value"] is None
    assert row["mean_at_n"] is None


def test_the_table_shows_every_set_and_figure(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--set", "one=task:sort", "--set", "two=task:chain", "--limit", "4", "--samples", "2"]
    assert main(["eval", str(finished), *words]) == 0
    shown = capsys.readouterr().out
    for part in ("one, 4 prompts", "two, 4 prompts", "greedy", "mean@2", "pass@1", "95 % interval"):
        assert part in shown


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("builtin:sort-teacher", ["--set NAME=SOURCE"]),
        ("builtin:sort-teacher --set a=task:sotr", ["'sotr'", "'sort'"]),
        ("builtin:sort-teacher --set a=task:sort --set a=task:add", ["called 'a'"]),
        ("builtin:sort-teacher --set a=task:sort --samples 2 --k 4", ["pass@4", "samples is 2"]),
        ("tests", ["neither a run folder", "nor a model folder"]),
        ("./none --set a=task:sort", ["./none does not exist"]),
    ],
)
def test_what_cannot_be_measured_is_said(
    words: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *words.split()]) == 2
    told = capsys.readouterr().err
    for part in parts:
        assert part in told

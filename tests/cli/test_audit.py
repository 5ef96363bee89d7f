"""`opd audit`: words, exit codes, JSON, the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd.audit.adapters import ADAPTERS
from opd.cli.main import AUDIT_ADAPTERS, main

LOSSES = """
def forward_kl(student, teacher, tokens, scale=1.0):
    one, other = student.log_softmax(-1), teacher.log_softmax(-1)
    return scale * (other.exp() * (other - one)).sum(-1)


def needs_more(student, teacher, tokens, answer):
    return student.sum(-1)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_losses.py").write_text(LOSSES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("claim", "code"), [("forward_kl", 0), ("reverse_kl", 1), (None, 0)])
def test_the_exit_code_says_whether_the_claim_holds(claim: str | None, code: int) -> None:
    words = ["audit", "my_losses:forward_kl"]
    assert main(words if claim is None else [*words, "--claim", claim]) == code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["my_losses:forwad_kl"], "Did you mean 'forward_kl'"),
        (["my_losses:needs_more"], "cannot be run on ordinary rows: TypeError"),
        (["my_losses:forward_kl", "--claim", "kl"], "there is no claim 'kl'"),
        (["my_losses:forward_kl", "--adapter", "line"], "there is no adapter 'line'"),
        (["my_losses:forward_kl", "--set", "scale"], "--set takes NAME=VALUE"),
        (["my_losses:forward_kl", "--set", "scal=2"], "has no option 'scal'"),
        (["my_losses:forward_kl", "--written-by", "me"], "'student' or 'teacher'"),
        ([], "name a loss as module:function"),
    ],
)
def test_what_cannot_be_run_is_two(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_verdict_is_the_first_thing_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", "my_losses:forward_kl", "--claim", "reverse_kl"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "my_losses:forward_kl"
    assert lines[1].strip() == (
        "descends forward KL (cosine 1.000); named reverse KL: does not hold"
    )
    assert lines[2].strip().startswith("fault: another-divergence: on ordinary rows it descends")


def test_options_reach_the_loss_and_json_has_the_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["audit", "my_losses:forward_kl", "--set", "scale=3", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["factor"] == pytest.approx(3.0)
    assert row["cosine"] == pytest.approx(1.0)
    assert row["holds"] is None
    assert {check["name"] for check in row["checks"]} >= {"own row", "mask", "teacher = student"}


def test_the_card_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", "my_losses:forward_kl", "--claim", "forward_kl", "--card", "card.html"])
    assert "card: card.html" in capsys.readouterr().out
    page = (folder / "card.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "my_losses:forward_kl" in page


def test_a_method_is_audited_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["audit", "top_k_opd", "--method.options.k", "3", "--claim", "reverse_kl"]
    assert main(words) == 1
    assert "reverse KL on the teacher's top 3, both renormalised" in capsys.readouterr().out
    assert main(["audit", "top_k_opd"]) == 2
    assert "k = 32 tokens does not fit a vocabulary of 8" in capsys.readouterr().err


def test_the_known_mistakes_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--self-test", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) >= 45
    assert all(row["found"] for row in rows)


def test_help_names_every_adapter() -> None:
    assert set(AUDIT_ADAPTERS) == set(ADAPTERS)

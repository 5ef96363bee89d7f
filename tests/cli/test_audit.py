"""`opd audit`: words, exit codes, JSON, the card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import config

from opd.audit.adapters import ADAPTERS
from opd.audit.targets import CLAIMS
from opd.cli.main import main

LOSSES = """
from math import nan


def forward_kl(student, teacher, tokens, scale=1.0):
    one, other = student.log_softmax(-1), teacher.log_softmax(-1)
    return scale * (other.exp() * (other - one)).sum(-1)


def needs_more(student, teacher, tokens, answer):
    return student.sum(-1)


def of_two(student, teacher):
    return forward_kl(student, teacher, None)


def teacher_first(teacher_logits, student_logits, tokens):
    return forward_kl(student_logits, teacher_logits, tokens)


def in_a_tuple(student, teacher, tokens):
    return forward_kl(student, teacher, tokens), {}


def in_a_dict(student, teacher, tokens):
    return {"kl_loss": forward_kl(student, teacher, tokens)}


def whole(student, teacher, tokens):
    return 3


def raises(student, teacher, tokens):
    raise RuntimeError("out of luck")


def leaves(student, teacher, tokens):
    raise SystemExit(7)


def prints(student, teacher, tokens):
    print("hello")
    return forward_kl(student, teacher, tokens)


class Loss:
    def __call__(self, student, teacher, tokens):
        return forward_kl(student, teacher, tokens)


a_loss = Loss()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # formulas run thousands of times on tiny tensors: their shapes are checked where they live
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    (tmp_path / "my_losses.py").write_text(LOSSES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    config.update("jaxtyping_disable", before)


@pytest.mark.parametrize(("claim", "code"), [("forward_kl", 0), ("reverse_kl", 1), (None, 0)])
def test_the_exit_code_says_whether_the_claim_holds(claim: str | None, code: int) -> None:
    words = ["audit", "my_losses:forward_kl"]
    assert main(words if claim is None else [*words, "--claim", claim]) == code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["my_losses:forwad_kl"], "Did you mean 'forward_kl'"),
        (["my_losses:needs_more"], "add `--set answer=VALUE`"),
        (["my_losses:of_two"], "--adapter pair"),
        (["my_losses:teacher_first"], "--set teacher_first=True"),
        (["my_losses:in_a_tuple"], "returned a tuple, not a tensor; audit a function"),
        (["my_losses:in_a_dict"], "`return f(...)['kl_loss']`"),
        (["my_losses:whole"], "returned an int, not a tensor"),
        (["my_losses:Loss"], "is a class; name an instance of it"),
        (["my_losses:raises"], "cannot be run on ordinary rows: RuntimeError: out of luck"),
        (["my_losses:leaves"], "cannot be run on ordinary rows: SystemExit: 7"),
        (["my_losses.forward_kl"], "a function is written my_losses:forward_kl"),
        (["my_losses.py:forward_kl"], "without its ending: my_losses:forward_kl"),
        (["my_losses:forward_kl", "--claim", "kl"], "there is no claim 'kl'"),
        (["my_losses:forward_kl", "--claim", "nope"], "Claims are forward_kl, reverse_kl, jsd[:"),
        (["my_losses:forward_kl", "--set", "tokens=3"], "'tokens' is what it is called with"),
        (["my_losses:forward_kl", "--method.options.k", "3"], "is set by --set NAME=VALUE"),
        (["gkd", "--set", "beta=3"], "are set by --method.options.NAME VALUE"),
        (["gkd", "--adapter", "trl"], "--adapter is for functions"),
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


def test_one_that_cannot_be_run_leaves_the_others_their_verdicts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["audit", "my_losses:forward_kl", "my_losses:raises", "my_losses:a_loss"]
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out.count("descends forward KL") == 2
    assert "error: my_losses:raises cannot be run" in told.err
    assert main([*words, "--json"]) == 2
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == words[1:]
    assert "out of luck" in rows[1]["error"]


def test_what_a_loss_prints_is_not_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "my_losses:prints", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["descends"] == "forward KL"


def test_names_that_say_the_order_are_taken_at_their_word() -> None:
    words = ["audit", "my_losses:teacher_first", "--set", "teacher_first=True"]
    assert main([*words, "--claim", "forward_kl"]) == 0


def test_a_module_of_a_package_may_import_its_neighbours(folder: Path) -> None:
    package = folder / "my_package" / "inner"
    package.mkdir(parents=True)
    for place in (package.parent, package):
        (place / "__init__.py").write_text("", encoding="utf-8")
    (package.parent / "parts.py").write_text(LOSSES, encoding="utf-8")
    text = "from ..parts import forward_kl\nfrom . import beside\n"
    (package / "losses.py").write_text(text, encoding="utf-8")
    (package / "beside.py").write_text("", encoding="utf-8")
    words = ["audit", "my_package.inner.losses:forward_kl", "--claim", "forward_kl"]
    assert main(words) == 0


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
    words = ["audit", "top_k_opd", "--claim", "reverse_kl"]
    assert main([*words, "--method.options.k", "3"]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "reverse KL on the teacher's top 3, both renormalised" in told
    assert "audited at" not in told
    assert main(words) == 1
    assert "does not hold; audited at k = 3" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "--method.options.k", "20"]) == 2
    assert "k = 20 tokens does not fit a vocabulary of 8" in capsys.readouterr().err


def test_the_state_source_of_a_method_says_who_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "sft_on_teacher", "--claim", "forward_kl"]) == 0
    assert "holds; audited on the teacher's text" in " ".join(capsys.readouterr().out.split())
    words = ["audit", "sft_on_teacher", "--claim", "forward_kl", "--written-by", "student"]
    assert main(words) == 1


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gae_opd", "it reads the critic's bootstrap value, the critic's values"),
        ("trace", "it reads extra.span"),
        ("grpo", "it reads a verdict"),
        ("confident_wrong_opd", "its weights (confident_wrong) are 0 on all the rows"),
    ],
)
def test_a_method_that_nothing_here_can_play_is_refused(
    method: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", method]) == 2
    assert f"{method} cannot be audited: {said}" in capsys.readouterr().err


def test_an_objective_is_audited_at_its_own_temperature(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(__file__).parents[2] / "recipes/frameworks/ms_swift.toml"
    assert main(["audit", str(run), "--claim", "jsd"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "audited at temperature 0.9, on the student's text alone" in told


def test_the_known_mistakes_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--self-test", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) >= 45
    assert all(row["found"] for row in rows)


def test_help_names_every_adapter_and_every_claim(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    told = capsys.readouterr().out
    for name in [*ADAPTERS, *CLAIMS]:
        assert f"\n  {name}" in told

"""`opd probe` from the command line: what it prints, writes, refuses and leaves alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opd.cli.main import main
from opd.cli.probe import own_output, progress
from opd.diagnose.verdicts import CRITERIA
from opd.errors import ConfigError
from opd.spec import method_from_tree
from opd.training.check import check
from opd.training.config import load, to_toml
from tests.training.runs import tiny_run

SMALL = ["--responses", "12", "--evaluate.prompts", "6"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    teacher = {"teacher": {"model": "builtin:sort-teacher"}}
    run = tiny_run(folder / "runs", teacher, {"name": ""})
    written = folder / "run.toml"
    written.write_text(to_toml(run.config))
    return written


@pytest.fixture(scope="module")
def probed(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A probe's folder, what it printed and what it told meanwhile."""
    folder = tmp_path_factory.mktemp("probes") / "one"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        assert main(["probe", str(file), "--output", str(folder), "--steps", "2", *SMALL]) == 0
    return folder, out.getvalue(), err.getvalue()


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "probe.json").read_text())
    return found


def test_verdicts_come_first_then_proposal_audits_and_the_rest(
    probed: tuple[Path, str, str],
) -> None:
    folder, printed, told = probed
    places = [printed.index(f"\n{name}" if at else name) for at, name in enumerate(CRITERIA)]
    marks = (
        "\nproposal: ",
        "\naudits: ",
        "\nwhere they disagree: ",
        "2 steps",
        "\nthe run as planned: ",
        "\nNext: ",
    )
    places += [printed.index(mark) for mark in marks]
    assert places == sorted(places)
    assert printed.startswith("state compatibility")
    assert "unfit           0.1" in printed  # an untrained student
    for name in ("probe.json", "probe.png", "proposal.toml", str(folder)):
        assert name in printed
    assert "this probe: up to " in told
    assert "MB of memory" in told


def test_the_first_change_of_an_untrained_student_is_a_warm_up(
    probed: tuple[Path, str, str],
) -> None:
    folder, printed, _ = probed
    first = "warmup.steps = 120: the student's states are outside what the teacher knows"
    assert f"\nproposal: {first}\n" in printed
    assert report(folder)["proposal"]["first"] == first
    assert printed.rstrip().endswith(f"Next: opd run {folder / 'proposal.toml'}")


def test_the_proposal_is_a_run_file_that_works(
    probed: tuple[Path, str, str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = probed
    proposal = folder / "proposal.toml"
    assert main(["check", str(proposal)]) == 0
    capsys.readouterr()
    run = load(proposal)
    assert run.config.warmup.steps == 120
    assert run.base == load(file).base
    assert [each for each in check(run) if each.level == "error"] == []
    found = method_from_tree("custom", objective=run.config.method.objective)
    before = method_from_tree(load(file).config.method.name)
    assert found.objective == before.objective
    text = proposal.read_text()
    for line in ("bottleneck", "state evidence", "support", "feedback route", "update route"):
        assert f"#   {line}: " in text
    for line in ("routing diagnostics", "stabilisers"):
        assert f"#   {line}: " in text


def test_the_report_holds_every_number(probed: tuple[Path, str, str]) -> None:
    found = report(probed[0])
    assert [each["criterion"] for each in found["verdicts"]] == list(CRITERIA)
    assert found["responses"] == 12
    assert found["prompts"] == 3
    kl = found["rows"]["reverse_kl"]
    assert kl["low"] <= kl["value"] <= kl["high"]
    assert {each["name"] for each in found["gradients"]["credits"]} == {
        "immediate",
        "return-to-go",
        "Rao-Blackwell",
        "GAE (value 0, lambda 0.95)",
    }
    neighbours = found["gradients"]["neighbours"]
    assert all(each["objective"]["terms"] for each in neighbours)
    by_data = next(each for each in neighbours if each["name"] == "text of the data")
    assert by_data["states"] == {"student": 0.0, "data": 1.0, "teacher": 0.0}
    pull = next(each for each in neighbours if each["name"].startswith("with a pull"))
    assert [view["source"] for view in pull["views"]] == ["teacher", "initial_student"]
    assert [each["columns"] for each in found["maps"]] == ["teacher_entropy", "reverse_kl"]
    for each in found["maps"]:
        assert each["rows"] == found["tokens"]
        for shares in (each["tokens"], each["disagreement"]):
            assert [len(row) for row in shares] == [4] * 4
            assert sum(map(sum, shares)) == pytest.approx(1.0)
        assert each["words"]
    assert [each["depth"] for each in found["recoverability"]] == [0.0, 0.25, 0.5, 0.75]
    assert found["cost"]["run"]["seconds"]["answers"] > 0
    assert found["cost"]["probe"]["took_cpu_seconds"] > 0
    assert found["thresholds"]["align_auc"]["origin"] == "survey 8.2, align_auc"
    assert (probed[0] / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_steps_are_those_of_the_run_and_what_they_did_is_told(
    probed: tuple[Path, str, str],
) -> None:
    folder, printed, _ = probed
    steps = report(folder)["steps"]
    assert steps["count"] == 2
    assert len(steps["watched"]["gradient norm"]) == 2
    events = [
        json.loads(line) for line in (folder / "steps" / "events.jsonl").read_text().splitlines()
    ]
    norms = [e["metrics"]["optimizer/grad_norm"] for e in events if "metrics" in e]
    assert [total / count for total, count in norms] == steps["watched"]["gradient norm"]
    # the answers are to the same prompts, by a student that has moved
    assert steps["before"]["log_ratio"].keys() == steps["after"]["log_ratio"].keys()
    assert steps["before"]["entropy"] != steps["after"]["entropy"]
    assert "gradient norm" in printed


def test_json_is_the_whole_report_and_nothing_else(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "probe"
    assert main(["probe", str(file), f"--output={folder}", "--json", *SMALL]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row.pop("folder") == str(folder)
    assert row == report(folder)
    assert row["steps"] is None


@pytest.mark.slow
def test_a_second_probe_may_take_the_place_of_the_first(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["probe", str(file), "--output", str(tmp_path / "probe"), "--json", *SMALL]
    assert main(words) == 0
    assert main(words) == 0


def test_without_an_output_the_next_free_folder_is_taken(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.cli.probe.load", lambda *_: (_ for _ in ()).throw(ConfigError("x")))
    assert main(["probe", str(file)]) == 2
    from opd.training.pilot_report import probe_folder

    first, second = probe_folder(str(tmp_path), None), probe_folder(str(tmp_path), None)
    assert (first.name, second.name) == ("probe-1", "probe-2")


def test_a_folder_with_something_else_in_it_is_refused_before_anything_loads(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert main(["probe", str(file), "--output", str(tmp_path), *SMALL]) == 2
    assert "holds something else than a probe" in capsys.readouterr().err
    assert main(["probe", str(file), "--responses", "4"]) == 2
    assert "raise --responses" in capsys.readouterr().err
    assert main(["probe", str(file), "--response", "9"]) == 2
    assert "--responses" in capsys.readouterr().err


def test_a_run_that_cannot_be_probed_leaves_no_folder(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "probe"
    words = ["probe", str(file), "--method", "sft", "--output", str(folder), *SMALL]
    assert main(words) == 2
    assert "no feedback to probe" in capsys.readouterr().err
    assert not folder.exists()


def test_output_is_the_probes_and_the_rest_the_runs() -> None:
    words = ["--train.steps", "3", "--output", "here", "--seed=1"]
    assert own_output(words) == ("here", ["--train.steps", "3", "--seed=1"])
    assert own_output(["--output=here"]) == ("here", [])
    assert own_output([]) == (None, [])
    with pytest.raises(ConfigError, match="--output has no value"):
        own_output(["--output"])


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("opd.cli.probe.time.monotonic", lambda: now)
    written = io.StringIO()
    with progress(Console(file=written, force_terminal=False)) as doing:
        for seconds in range(25):
            now = 100.0 + seconds
            doing(f"at {seconds}")
    assert written.getvalue().split() == ["at", "0", "at", "10", "at", "20"]

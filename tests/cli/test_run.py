"""`opd run`: what it shows, what it leaves behind, how it is interrupted and continued."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opd.cli.main import main
from tests.cli.conftest import TINY


def test_a_run_shows_its_steps_then_the_outcome_the_places_and_what_to_try(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *TINY, "--name", "mine", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "mine"
    for part in ("warm-up 1/1", "distilling 2/2", "loss", "reverse KL", "tokens/s"):
        assert part in shown
    summary = json.loads((folder / "summary.json").read_text())
    for who in ("start", "final", "teacher"):
        assert f"{summary[f'{who}_accuracy']['value']:.3f}" in shown
    assert f"{summary['tokens']:,} tokens" in shown
    assert f"Everything is in {folder}" in shown
    assert [line for line in shown.splitlines() if line.startswith("Next: ")]
    for name in ("model/config.json", "curves.png", "samples.jsonl", "config.toml"):
        assert (folder / name).exists()


def test_json_gives_the_summary_alone_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--train.steps", "1", "--warmup.steps", "0", "--output", str(tmp_path)]
    assert main(["run", *words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["folder"] == str(tmp_path / "sort-1")
    assert row["exit_reason"] == "finished"


def test_a_finished_run_is_not_resumed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--resume", str(finished)]) == 2
    assert "finished" in capsys.readouterr().err


def test_ctrl_c_saves_exits_130_and_the_printed_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [*TINY, "--warmup.steps", "80", "--output", str(tmp_path)]
    running = subprocess.Popen(
        [sys.executable, "-m", "opd", "run", *long],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    for line in running.stdout:
        if "warm-up" in line:
            break
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=300)
    assert running.returncode == 130
    folder = tmp_path / "sort-1"
    command = f"opd run --resume {folder}"
    assert command in told
    assert "Traceback" not in told
    assert [*(folder / "checkpoints").glob("warmup-*")]

    # Another setting is refused and changes nothing.
    before = (folder / "events.jsonl").read_bytes()
    assert main([*command.split()[1:], "--warmup.steps", "3"]) == 2
    assert "warmup.steps was 80, now 3" in capsys.readouterr().err
    assert (folder / "events.jsonl").read_bytes() == before

    assert main(command.split()[1:]) == 0
    assert "warm-up 1/80" not in capsys.readouterr().out
    assert (folder / "model" / "model.safetensors").exists()


def test_resume_takes_no_run_file(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(finished / "config.toml"), "--resume", str(finished)]) == 2
    assert "leave out" in capsys.readouterr().err

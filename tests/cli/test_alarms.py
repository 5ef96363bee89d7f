"""`opd run` says when an alarm begins, how long it lasted, and why it has stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from opd.cli.main import TRAINING_ERROR, main

# A teacher that has learnt nothing, looked at in every step: noise from the second step on.
NOISE = [
    *("recipes/add.toml", "--student.model", "builtin:sort-student", "--data.prompts", "task:sort"),
    *("--teacher.model", "builtin:sort-teacher-init", "--warmup.steps", "0", "--train.steps", "3"),
    *("--train.prompts_per_step", "2", "--sampler.max_new_tokens", "4", "--evaluate.prompts", "1"),
    *("--evaluate.test_prompts", "1", "--monitor.every", "1"),
]
ROOT = Path(__file__).parents[2]


def words(tmp_path: Path, *more: str) -> list[str]:
    return ["run", str(ROOT / NOISE[0]), *NOISE[1:], "--output", str(tmp_path), *more]


def test_an_alarm_is_told_once_and_counted_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert shown.count("alarm: step 2: noise_teacher (") == 1
    assert "check `teacher.model` and its revision" in shown
    assert "alarm: noise_teacher, 2 steps from step 2 on" in shown


def test_a_run_that_an_alarm_stops_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = ("--monitor.on_alarm", "act", "--monitor.act.noise_teacher", "stop", "--name", "mine")
    assert main(words(tmp_path, *stop)) == TRAINING_ERROR
    told = capsys.readouterr().err
    assert "step 2: the alarm noise_teacher" in told
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    assert summary["exit_reason"] == "alarm: noise_teacher"

    (command,) = re.findall(r"`opd (run --resume [^`]+)`", told)
    assert main(command.split()) == 0
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    assert summary["exit_reason"] == "finished"
    assert summary["alarms"]["noise_teacher"]["steps"] == 2

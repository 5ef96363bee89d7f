"""The pytest plug-in, run in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOSSES = """
def reverse_kl(student, teacher, tokens):
    one, other = student.log_softmax(-1), teacher.log_softmax(-1)
    return (one.exp() * (one - other)).sum(-1)


def k3(student, teacher, tokens):
    log_ratio = (teacher.log_softmax(-1) - student.log_softmax(-1)).gather(-1, tokens[:, None])
    return (log_ratio.exp() - 1 - log_ratio).squeeze(-1)
"""
TESTS = """
import my_losses
import pytest


def test_holds(opd_audit):
    assert opd_audit(my_losses.reverse_kl, claim="reverse_kl").holds


def test_fails(opd_audit):
    with pytest.raises(AssertionError, match="descends forward KL"):
        opd_audit(my_losses.k3, claim="reverse_kl")
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "my_losses.py").write_text(LOSSES, encoding="utf-8")
    (folder / "test_losses.py").write_text(TESTS, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_loss_named_on_the_command_line_is_a_test(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "--opd-audit",
        "my_losses:reverse_kl=reverse_kl",
        "--opd-audit",
        "my_losses:k3=reverse_kl",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 3 passed" in done.stdout
    assert "another-divergence: on ordinary rows it descends forward KL" in done.stdout
    assert "Traceback" not in done.stdout


def test_without_options_the_plug_in_adds_nothing(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout

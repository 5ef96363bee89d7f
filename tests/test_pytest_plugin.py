"""The pytest plug-in, run in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOSSES = """
def reverse_kl(student, teacher, tokens):
    one, other = student.log_softmax(-1), teacher.log_softmax(-1)
    return (one.exp() * (one - other)).sum(-1)


def k3(student, teacher, tokens):
    log_ratio = (teacher.log_softmax(-1) - student.log_softmax(-1)).gather(-1, tokens[:, None])
    return (log_ratio.exp() - 1 - log_ratio).squeeze(-1)


def likelihood(student, teacher, tokens):
    return -student.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
"""
TESTS = """
import my_losses
import pytest


def test_holds(opd_audit):
    assert opd_audit(my_losses.reverse_kl, claim="reverse_kl").holds


def test_fails(opd_audit):
    with pytest.raises(pytest.fail.Exception, match="descends forward KL"):
        opd_audit(my_losses.k3, claim="reverse_kl")


def test_without_a_divergence_there_must_be_no_fault(opd_audit):
    opd_audit(my_losses.k3, claim="none")
    with pytest.raises(pytest.fail.Exception, match="ascent"):
        opd_audit(lambda s, t, y: -my_losses.reverse_kl(s, t, y), claim="none")


def test_a_claim_must_be_made(opd_audit):
    with pytest.raises(TypeError, match="claim"):
        opd_audit(my_losses.k3)


def test_text_of_the_teacher(opd_audit):
    opd_audit(my_losses.likelihood, claim="forward_kl", writer="teacher")
"""
FAILING = """
import my_losses


def test_told_in_full(opd_audit):
    opd_audit(my_losses.k3, claim="reverse_kl")
"""


def run(folder: Path, *arguments: str, tests: str = TESTS) -> subprocess.CompletedProcess[str]:
    (folder / "my_losses.py").write_text(LOSSES, encoding="utf-8")
    (folder / "test_losses.py").write_text(tests, encoding="utf-8")
    return subprocess.run(
        # -rN: without the short summary, which repeats a whole message where CI is set.
        [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", *arguments],
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
        tests=FAILING,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 1 passed" in done.stdout
    assert done.stdout.count("another-divergence: on ordinary rows it descends forward KL") == 2
    assert "Traceback" not in done.stdout
    assert "assert not" not in done.stdout


def test_without_options_the_plug_in_adds_nothing(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_a_loss_on_the_command_line_needs_a_claim(tmp_path: Path) -> None:
    done = run(tmp_path, "--opd-audit", "my_losses:k3")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "my_losses:k3=reverse_kl" in done.stderr

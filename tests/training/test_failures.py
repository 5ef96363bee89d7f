"""What goes wrong in a run is said in words, and nothing that was saved is lost."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError, DataError, TrainingError
from opd.training.checkpoint import find_checkpoints
from opd.training.config import Run
from opd.training.folder import RunFolder
from opd.training.loop import train_run
from tests.training.runs import CHILDREN, finish, outcome, tiny_run

# Each function goes wrong while a file of its name lies beside it.
FORMULAS = """
from pathlib import Path

from opd.formula.divergence import reverse_kl

HERE = Path(__file__).parent

def infinite(student_log_probs, teacher_log_probs):
    value = reverse_kl(student_log_probs, teacher_log_probs)
    return value + float("inf") if (HERE / "infinite").exists() else value

def steep(student_log_probs, teacher_log_probs):
    value = reverse_kl(student_log_probs, teacher_log_probs)
    return value + (0 * value).sqrt() if (HERE / "steep").exists() else value

def faulty(student_log_probs, teacher_log_probs):
    1 / (not (HERE / "faulty").exists())
    return reverse_kl(student_log_probs, teacher_log_probs)

def judge(prompt, response, *, finished):
    if (HERE / "judge").exists():
        raise LookupError("no answer")
    return False
"""


def own(wild: str) -> dict[str, Any]:
    terms = [
        {"kind": "dense", "divergence": "reverse_kl", "name": "calm"},
        {"kind": "dense", "divergence": f"formulas:{wild}", "name": "wild"},
    ]
    return {
        "method": {"name": "custom", "objective": {"terms": terms}},
        "data": {"verifier": "formulas:judge"},
    }


def run_with(run: Run, *, after_step_2: Callable[[], object]) -> None:
    for report in train_run(run):
        if report.step == 2:
            after_step_2()


@pytest.mark.parametrize(
    ("flag", "error", "said"),
    [
        ("infinite", TrainingError, "step 3: the term 'wild' is not finite on"),
        ("steep", TrainingError, "step 3: the gradient of the term 'wild' is not finite"),
        ("judge", DataError, "LookupError"),
        ("faulty", ConfigError, "formulas.faulty failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_run_that_fails_says_why_and_goes_on_when_it_is_mended(
    flag: str, error: type[Exception], said: str, tmp_path: Path
) -> None:
    change = own("infinite" if flag == "judge" else flag)
    for part in ("whole", "broken"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "formulas.py").write_text(FORMULAS)
    finish(tiny_run(tmp_path / "whole", change))
    output, folder = tmp_path / "broken", RunFolder(tmp_path / "broken" / "run")
    with pytest.raises(error, match=said):
        run_with(tiny_run(output, change), after_step_2=(output / flag).touch)
    assert find_checkpoints(folder)[-1].path.name == "step-2"
    reason = folder.read_summary()["exit_reason"]
    assert reason.startswith("error: ")
    assert said in reason
    (output / flag).unlink()
    finish(tiny_run(output, change), resume=folder.path)
    assert outcome(folder.path) == outcome(tmp_path / "whole" / "run")


# --------------------------------------------------------------------------------------------
# Disks


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("uninterrupted")
    finish(tiny_run(output))
    return outcome(output / "run")


# A checkpoint of the tiny student takes 1.4 MB: 0.45 of weights, 0.9 of the optimizer.
@pytest.mark.parametrize(
    ("size", "said"),
    [("1700k", "No space left on device"), ("2200k", "it took only part of a write: is it full?")],
    ids=["in the weights", "in the optimizer"],
)
def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    size: str, said: str, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    child = CHILDREN.Process(target=_fill_a_disk, args=(tmp_path, size, said))
    child.start()
    child.join()
    if child.exitcode == NO_DISK:
        pytest.skip("this system lets no user mount a file system of their own")
    assert child.exitcode == 0
    assert outcome(tmp_path / "copy") == uninterrupted


NO_DISK = 77
NEW_MOUNTS, NEW_USER, REMOUNT = 0x00020000, 0x10000000, 32


def _fill_a_disk(output: Path, size: str, said: str) -> None:
    """In a process that sees a file system of its own, which ends with it."""
    kernel = ctypes.CDLL(None)
    disk = output / "disk"
    disk.mkdir()

    def mount(flags: int, size: str) -> bool:
        where, option = str(disk).encode(), f"size={size}".encode()
        return kernel.mount(b"tmpfs", where, b"tmpfs", flags, option) == 0

    user, group = os.getuid(), os.getgid()
    if kernel.unshare(NEW_MOUNTS | NEW_USER):
        sys.exit(NO_DISK)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)
    if not mount(0, size):
        sys.exit(NO_DISK)
    run, folder = tiny_run(disk), RunFolder(disk / "run")
    with pytest.raises(TrainingError, match=rf"step-2 \({re.escape(said)}\). The last.*intact"):
        finish(run)
    assert [found.path.name for found in find_checkpoints(folder)] == ["step-1"]
    assert not list(folder.path.rglob(".*"))
    assert folder.read_summary()["exit_reason"].startswith("error: cannot write")
    assert mount(REMOUNT, "64m")
    finish(run, resume=folder.path)
    shutil.copytree(folder.path, output / "copy")


@pytest.mark.parametrize("size", [300_000, 600_000], ids=["of weights", "of the optimizer"])
def test_a_file_beyond_the_limit_stops_the_run_and_it_can_go_on(
    size: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """As a full disk, for whoever cannot mount one: the kernel refuses the write."""
    run, folder = tiny_run(tmp_path), RunFolder(tmp_path / "run")
    with file_size_limit(size), pytest.raises(TrainingError, match=r"cannot write .*step-1 \("):
        finish(run)
    assert not find_checkpoints(folder)
    finish(run, resume=folder.path)
    assert outcome(folder.path) == uninterrupted


@pytest.mark.parametrize("log", ["events.jsonl", "samples.jsonl"])
def test_a_log_that_cannot_be_written_stops_the_run_and_it_can_go_on(
    log: str, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    run, file = tiny_run(tmp_path), tmp_path / "run" / log
    kept = file.with_name("kept")

    def fill_the_disk() -> None:
        file.rename(kept)
        file.symlink_to("/dev/full")

    with pytest.raises(TrainingError, match=rf"cannot write .*{log} \(No space left on device"):
        run_with(run, after_step_2=fill_the_disk)
    kept.replace(file)
    finish(run, resume=file.parent)
    assert outcome(file.parent) == uninterrupted


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="choose another folder with --output"):
        finish(tiny_run(tmp_path / "runs"))

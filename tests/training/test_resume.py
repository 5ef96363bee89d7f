"""A run that is stopped, however, ends as if it had never been."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError
from opd.training.folder import RunFolder
from tests.training.runs import (
    EVERYTHING,
    Kill,
    abandon,
    finish,
    merged,
    outcome,
    run_in_child,
    start,
    tiny_run,
    wait_for,
)

GKD = {
    "method": {
        "name": "gkd",
        "options": {
            "student_share": 0.5,
            "teacher_weight": {"schedule": "cosine", "start": 0.9, "end": 0.1, "steps": 4},
        },
    }
}
LORA = merged(
    EVERYTHING,
    {
        "student": {"lora": {"r": 4}},
        "warmup": {"steps": 1},
        "train": {"steps": 3, "updates_per_rollout": 1},
    },
)
LORA_FROM_THE_START = merged(LORA, {"warmup": {"steps": 0}})

RUNS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "everything": EVERYTHING,
    "gkd": GKD,
    "lora": LORA,
    "lora from the start": LORA_FROM_THE_START,
}

# In the order in which a run comes by; every child goes on where the one before it died.
KILLS = {
    "as the folder is born": Kill("os.rename", "/run"),
    "right after the folder was born": Kill("os.rename", "/run", delay_s=0.001),
    "in the warm-up": Kill("open", "events.jsonl", count=2),
    "in a checkpoint of the warm-up": Kill("open", ".warmup-2.tmp/state.json"),
    "as the reference is written": Kill("os.rename", ".reference.tmp"),
    "in the evaluation at the start": Kill("open", "events.jsonl"),
    "between two logs": Kill("open", "samples.jsonl"),
    "as a checkpoint begins": Kill("os.mkdir", ".step-1.tmp"),
    "as weights are written": Kill("open", ".step-1.tmp/student/config.json"),
    "before a checkpoint takes its name": Kill("os.rename", ".step-1.tmp"),
    "as an old checkpoint is moved away": Kill("os.rename", ".old"),
    "as an old checkpoint is removed": Kill("os.remove", "model.safetensors"),
    "as what is left of it is removed": Kill("os.rmdir", "student"),
    "in a step": Kill("open", "events.jsonl", count=2),
    "after a checkpoint took its name": Kill("os.rename", ".step-3.tmp", delay_s=0.001),
    "soon after weights are written": Kill("os.mkdir", ".step-4.tmp/student", delay_s=0.005),
    "in the final evaluation": Kill("os.mkdir", ".model.tmp"),
    "as the model is written": Kill("os.rename", ".model.tmp"),
    "as the test samples are written": Kill("open", "samples.jsonl", count=2),
    "as the picture is drawn": Kill("open", "curves.png.tmp"),
    "as the summary is written": Kill("os.rename", "summary.json"),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What each of `RUNS` leaves when nothing stops it."""
    known: dict[str, dict[str, Any]] = {}

    def find(name: str) -> dict[str, Any]:
        if name not in known:
            output = tmp_path_factory.mktemp("uninterrupted")
            finish(tiny_run(output, RUNS[name]))
            known[name] = outcome(output / "run")
        return known[name]

    return find


def test_a_run_killed_at_many_instants_ends_bit_identical(
    tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    """One run, one kill after the other: each child goes on from where the last one died."""
    run, folder = tiny_run(tmp_path, EVERYTHING), tmp_path / "run"
    for moment, kill in KILLS.items():
        resume = folder if folder.exists() else None
        assert run_in_child(run, resume=resume, kill=kill) == -signal.SIGKILL, moment
    assert run_in_child(run, resume=folder) == 0
    assert outcome(folder) == uninterrupted("everything")
    assert not list(folder.rglob(".*"))

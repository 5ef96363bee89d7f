"""What each tracker writes is what it was given."""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError
from opd.training.config import Run, from_tree
from opd.training.loop import train_run
from opd.training.trackers import Trackers
from tests.training.runs import TINY


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_holds_the_loss_of_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = from_tree({**TINY, "output": str(tmp_path), "log": {"trackers": ["tensorboard"]}})
    reports = list(train_run(Run(config, tmp_path)))

    read: Any = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    written = {event.step: event.value for event in read.Scalars("train/loss/dense")}
    expected = {r.step: r.metrics["loss/dense"].mean for r in reports if "loss/dense" in r.metrics}
    assert written == pytest.approx(expected, rel=1e-6)
    assert read.Scalars("train/validation/accuracy")


TRACKIO_SCRIPT = """
from pathlib import Path
from opd.training.trackers import Trackers
with Trackers(["trackio"], Path("sort-1"), {"seed": 0}) as trackers:
    trackers.log({"train/loss": 0.125}, 1)
"""


def test_trackio_holds_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    store = tmp_path / "store"
    subprocess.run(
        [sys.executable, "-c", TRACKIO_SCRIPT],
        cwd=tmp_path,
        env=os.environ | {"TRACKIO_DIR": str(store)},
        check=True,
        capture_output=True,
    )

    rows = [
        str(row)
        for database in store.glob("*.db")
        for row in sqlite3.connect(database).execute("select metrics from metrics")
    ]
    assert any("0.125" in row for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_an_offline_run_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "sort-1"
    folder.mkdir()

    with Trackers(["wandb"], folder, {"seed": 0}) as trackers:
        trackers.log({"train/loss": 0.125}, 1)

    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while b"train/loss" not in file.read_bytes():  # its own process writes, a moment later
        assert time.monotonic() < deadline, file.read_bytes()
        time.sleep(0.05)


def test_a_tracker_that_is_not_installed_is_named_with_its_extra_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = from_tree({**TINY, "output": str(tmp_path), "log": {"trackers": ["trackio"]}})

    with pytest.raises(ConfigError, match=r'pip install "opd\[trackio\]"'):
        list(train_run(Run(config, tmp_path)))

    assert not [*tmp_path.iterdir()]

"""Tiny runs, whole or killed, in this process or in one of their own."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from opd.token_columns import part_files
from opd.training.config import Run, from_tree
from opd.training.loop import StepReport, train_run
from opd.training.session import Session

# Children are forked from a server that has imported what a run imports, so each starts at once.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["opd.training.loop", "matplotlib.pyplot", "peft"])

TINY: dict[str, Any] = {
    "student": {"model": "builtin:sort-student"},
    "teacher": {"model": "builtin:sort-teacher-init"},
    "data": {"prompts": "task:sort"},
    "sampler": {"max_new_tokens": 6},
    "train": {"steps": 4, "prompts_per_step": 4, "save_every": 1, "learning_rate": 1e-3},
    "evaluate": {"prompts": 3, "test_prompts": 3, "every": 2},
    "name": "run",
    "device": "cpu",
    "threads": 1,
}

# A critic with a replay, schedules, mixed text, a frozen reference, an anchor, two updates per
# rollout, a warm-up on the teacher's text: everything with a state of its own.
EVERYTHING: dict[str, Any] = {
    "method": {
        "name": "custom",
        "states": {"student": 0.5, "data": 0.25, "teacher": 0.25},
        "objective": {
            "terms": [
                {
                    "kind": "sampled",
                    "reward": "teacher_log_ratio",
                    "credit": {"use": "gae", "gae_lambda": 0.9},
                    "surrogate": {"use": "clipped", "low": 0.2, "high": 0.28},
                    "coef": {"schedule": "linear", "start": 1.0, "end": 0.1, "steps": 4},
                },
                {
                    "kind": "dense",
                    "divergence": "reverse_kl",
                    "against": "reference",
                    "coef": {
                        "schedule": "switch",
                        "before": 1.0,
                        "after": 0.5,
                        "statistic": "optimizer/grad_norm",
                        "above": 0.0,
                    },
                },
            ]
        },
    },
    "warmup": {"steps": 2, "prompts_per_step": 4, "source": "teacher", "learning_rate": 1e-3},
    "train": {"steps": 5, "updates_per_rollout": 2, "anchor": 1.0},
    "critic": {"warmup_steps": 1, "replay_steps": 2},
    "log": {"token_share": 1.0},
}


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables with some keys replaced."""
    both = dict(tree)
    for key, value in changes.items():
        below = both.get(key)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        both[key] = merged(below, value) if nested else value
    return both


def tiny_run(output: Path, *changes: Mapping[str, Any]) -> Run:
    """A run of four steps of a tenth of a second."""
    tree: dict[str, Any] = {**TINY, "output": str(output)}
    for change in changes:
        tree = merged(tree, change)
    return Run(from_tree(tree), output)


def finish(
    run: Run, *, resume: Path | None = None, session: Session | None = None
) -> list[StepReport]:
    """All reports of a run that goes to its end."""
    return list(train_run(run, resume=resume, session=session))


def abandon(run: Run, reports: int, *, resume: Path | None = None) -> None:
    """Let go of a run after some reports, without a word, as a kill between two steps does."""
    reporting = train_run(run, resume=resume)
    for _ in itertools.islice(reporting, reports):
        pass
    reporting.close()  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------
# What a run leaves


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, apart from timings and memory, to compare with `==`."""
    summary = json.loads((folder / "summary.json").read_text())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for record in (summary, *events):
        record.pop("seconds", None)  # an alarm takes none
    del summary["peak_mb"]
    newest = max(
        (folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1])
    )
    return {
        "weights": (folder / "model" / weights_file(folder / "model")).read_bytes(),
        "checkpoint": newest.name,
        "optimizer": flat(torch.load(newest / "tensors.pt", weights_only=True)),
        "events": events,
        "samples": (folder / "samples.jsonl").read_text(),
        "tokens": token_rows(folder / "tokens"),
        "summary": summary,
    }


def token_rows(folder: Path) -> list[dict[str, Any]]:
    """The token records of a run, part after part."""
    tables = [pq.read_table(part) for part in part_files(folder)]
    return pa.concat_tables(tables, promote_options="permissive").to_pylist() if tables else []


def weights_file(folder: Path) -> str:
    return next(path.name for path in folder.glob("*.safetensors"))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested tensors as bytes by path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found: dict[str, Any] = {}
        for key, part in items:
            found |= flat(part, f"{path}/{key}")
        return found
    return {path: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


# --------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Kill:
    """A child's SIGKILL to itself, the moment before it touches a file.

    Attributes:
        event: Python's audit event: `open`, `os.rename`, `os.mkdir`, ...; empty: any on the path,
            and any removal (of which Python says no more than the name in its folder).
        path: part of the path that is touched.
        count: at the how-manieth time.
        delay_s: so much later; 0: instead of touching it.
    """

    event: str
    path: str
    count: int = 1
    delay_s: float = 0.0

    def arm(self) -> None:
        left = self.count

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if self.event and event != self.event:
                return
            removal = not self.event and event in ("os.remove", "os.rmdir")
            if not removal and not any(isinstance(a, str) and self.path in a for a in arguments):
                return
            left -= 1
            if left == 0 and self.delay_s:
                threading.Timer(self.delay_s, kill_self).start()
            elif left == 0:
                kill_self()

        sys.addaudithook(watch)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def start(run: Run, *, resume: Path | None = None, kill: Kill | None = None) -> ForkServerProcess:
    """A child that runs to the end, or to its kill."""
    child = CHILDREN.Process(target=_in_child, args=(run, resume, kill))
    child.start()
    return child


def run_in_child(run: Run, *, resume: Path | None = None, kill: Kill | None = None) -> int:
    """The child's exit code; -9 if it was killed."""
    child = start(run, resume=resume, kill=kill)
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def wait_for(path: Path, *, text: str = "", timeout_s: float = 60.0) -> None:
    """Until a file of another process is there, and has `text` in it."""
    until = time.monotonic() + timeout_s
    while not (path.exists() and (not text or text in path.read_text())):
        if time.monotonic() > until:
            raise TimeoutError(f"{path} did not appear, or has no {text!r}")
        time.sleep(0.002)


def _in_child(run: Run, resume: Path | None, kill: Kill | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if kill is not None:
        kill.arm()
    try:
        finish(run, resume=resume)
    except KeyboardInterrupt:
        sys.exit(130)

"""Monitors: what they cost a run of the embedded default.

The default with its monitors, looks and alarms, and the same run without, in turn. Two things are
measured: the CPU-seconds of the whole, and those spent inside of what exists for the monitors
alone, which the noise of a shared machine does not reach.

    python benchmarks/monitors.py [--quick] [--json FILE] [--result FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

from common import (
    Measure,
    Row,
    cpu_seconds,
    interleaved,
    one_thread,
    parser,
    print_table,
    write_asked,
)
from opd.diagnose import monitors
from opd.diagnose.records import Gathered
from opd.training import loop
from opd.training.config import load

STEPS, QUICK_STEPS = 120, 15
METHODS = ("reverse_kl_opd", "sampled_token_opd")


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Adds up the CPU-seconds of whatever a step does for its monitors."""
    total = 0.0

    def timed(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal total
            start = cpu_seconds()
            try:
                return function(*arguments, **options)
            finally:
                total += cpu_seconds() - start

        return call

    trainer = loop._Trainer
    with (
        mock.patch.object(monitors, "of_update", timed(monitors.of_update)),
        mock.patch.object(trainer, "_look", timed(trainer._look)),
        mock.patch.object(trainer, "_alarms", timed(trainer._alarms)),
        mock.patch.object(Gathered, "take", timed(Gathered.take)),
        mock.patch.object(Gathered, "joined", timed(Gathered.joined)),
    ):
        yield lambda: total


def run(method: str, steps: int, *, on: bool) -> Measure:
    """The distillation alone: CPU-seconds of its steps, evaluations and the ends left out."""
    words = ["--method", method, "--train.steps", str(steps), "--warmup.steps", "20"]
    words += ["--evaluate.test_prompts", "8", "--evaluate.every", "0", "--log.token_share", "0"]
    words += ["--train.save_every", "0", "--monitor.on", str(on).lower()]
    tokens, start, before = 0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder, stopwatch() as of_monitors:
        for report in loop.train_run(load(None, [*words, "--output", folder])):
            if report.phase == "train" and report.step == 0:
                start, before = cpu_seconds(), of_monitors()
            if report.phase == "train" and report.tokens:
                tokens += report.tokens
                whole, inside = cpu_seconds() - start, of_monitors() - before
    return Measure(whole, tokens=tokens, parts={"monitors": inside})


def main() -> None:
    options = parser("Monitors: what they cost.").parse_args()
    one_thread()
    steps, repeats = (QUICK_STEPS, 1) if options.quick else (STEPS, 3)
    table: list[dict[str, Any]] = []
    for method in METHODS[: 1 if options.quick else None]:

        def one(on: bool, method: str = method) -> Callable[[], Measure]:
            return lambda: run(method, steps, on=on)

        found = interleaved({"opd": one(True), "opd without monitors": one(False)}, repeats)
        with_monitors = found["opd"]
        share = with_monitors.parts["monitors"] / with_monitors.seconds
        for system, each in found.items():
            table.append(
                {
                    "case": f"{method}, {steps} steps",
                    "system": system,
                    "seconds": each.seconds,
                    "tokens_per_s": each.tokens / each.seconds,
                    "ratio": each.seconds / with_monitors.seconds,
                    "monitor_seconds": each.parts["monitors"],
                    "share_of_steps": share if each is with_monitors else 0.0,
                }
            )
    known = Row.__dataclass_fields__
    print_table(Row(**{k: v for k, v in row.items() if k in known}) for row in table)
    shares = [row["share_of_steps"] for row in table if row["share_of_steps"]]
    print(f"inside of what the monitors need: {median(shares):.2%} of the steps (at most 5 %)")
    write_asked(table, options)


if __name__ == "__main__":
    main()

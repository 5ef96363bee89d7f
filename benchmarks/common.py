"""What every benchmark script shares: the row, the clock, interleaved repeats, the files.

A script in this folder reads

    options = parse_args("Rollouts against generate.")
    medians = interleaved({"opd": ours, "transformers": theirs}, repeats=3 if options.quick else 7)
    report(compare("batch 64", medians), options)

`python benchmarks/NAME.py` puts this folder on the path, so scripts say `from common import ...`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median_low
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

__all__ = [
    "Measure",
    "Options",
    "Row",
    "add_part",
    "command_line",
    "compare",
    "cpu_seconds",
    "gradient_error",
    "in_part",
    "interleaved",
    "measured_matrix_rate",
    "one_thread",
    "parse_args",
    "parser",
    "print_table",
    "provenance",
    "report",
    "write_asked",
    "write_json",
    "write_result",
]

OURS = "opd"
PACKAGES = ("opd", "torch", "transformers", "trl", "liger-kernel", "numpy", "pyarrow", "duckdb")


# --------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class Measure:
    """One timed run of one system.

    Attributes:
        seconds: CPU-seconds of the process.
        tokens: tokens generated in that time; 0 where tokens are not the unit of work.
        parts: CPU-seconds of named phases; they need not add up to `seconds`.
        peak_mb: memory beyond inputs and returned gradients.
        grad_error: `gradient_error` against the reference.
        bytes_per_token: bytes moved or stored per token.
    """

    seconds: float
    tokens: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)
    peak_mb: float | None = None
    grad_error: float | None = None
    bytes_per_token: float | None = None

    @property
    def unit_seconds(self) -> float:
        """CPU-seconds per generated token, or of the whole run where no tokens are counted."""
        return self.seconds / self.tokens if self.tokens else self.seconds


def cpu_seconds() -> float:
    """The clock of every benchmark: CPU-seconds of this process, all its threads included.

    On a shared machine wall time measures the neighbours.
    """
    return time.process_time()


def one_thread() -> None:
    """Makes torch compute on one thread, so that CPU-seconds are comparable between systems."""
    torch.set_num_threads(1)


def interleaved(
    systems: Mapping[str, Callable[[], Measure]], repeats: int, *, warm: bool = False
) -> dict[str, Measure]:
    """Runs every system `repeats` times, in turn, and keeps each one's median run.

    Interleaving lets a slow spell of the machine fall on all systems alike, and the order rotates
    so that none always follows the same neighbour.

    Args:
        systems: name to a function that sets up, times one run itself and returns the measure.
        repeats: timed runs per system, >= 1.
        warm: run every system once beforehand and drop the result.

    Returns:
        For each system the measured run whose `unit_seconds` is the (lower) median: a run that
        happened, so its parts belong together.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    if warm:
        for run in systems.values():
            run()
    names = list(systems)
    runs: dict[str, list[Measure]] = {name: [] for name in names}
    for repeat in range(repeats):
        start = repeat % len(names)
        for name in names[start:] + names[:start]:
            runs[name].append(systems[name]())
    return {name: _median(measures) for name, measures in runs.items()}


def _median(measures: Sequence[Measure]) -> Measure:
    middle = median_low(measure.unit_seconds for measure in measures)
    return next(measure for measure in measures if measure.unit_seconds == middle)


def gradient_error(gradient: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Largest difference of any entry, over the largest entry of the reference.

    One scale for the whole gradient: an update adds up all parameters, so an entry that is zero
    but for rounding must not decide.
    """
    if gradient.keys() != reference.keys():
        raise ValueError(f"gradients of different parameters: {gradient.keys() ^ reference.keys()}")
    difference = max((gradient[name] - reference[name]).abs().max().item() for name in reference)
    return difference / max(value.abs().max().item() for value in reference.values())


def measured_matrix_rate(
    rows: int, inner: int, columns: int, *, seconds: float = 0.2, repeats: int = 5
) -> float:
    """Multiply-adds per CPU-second of `[rows, inner] @ [inner, columns]` in float32, one thread.

    The best of `repeats` windows of `seconds / repeats` each: a floor divides by the rate the
    machine can reach, not by the one it had while interrupted. The result is written into a
    tensor that exists, so no allocation is timed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        result = torch.empty(rows, columns)
        torch.mm(left, right, out=result)
        best = 0.0
        for _ in range(repeats):
            products, start = 0, cpu_seconds()
            while (spent := cpu_seconds() - start) < seconds / repeats:
                for _ in range(16):  # reading the clock costs as much as a small product
                    torch.mm(left, right, out=result)
                products += 16
            best = max(best, products * rows * inner * columns / spent)
    finally:
        torch.set_num_threads(threads)
    return best


# --------------------------------------------------------------------------------------------
# Rows, tables, files


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table; None where a column does not apply.

    Attributes:
        case: what was run.
        system: who ran it; ours is "opd".
        seconds: CPU-seconds of the process.
        tokens_per_s: generated tokens per CPU-second.
        peak_mb: memory beyond inputs and returned gradients.
        grad_error: `gradient_error` against the reference.
        bytes_per_token: bytes moved or stored per token.
        ratio: this system's time over ours on the same case in the same call, per token where
            tokens are counted; above 1 we are faster.
    """

    case: str
    system: str
    seconds: float | None = None
    tokens_per_s: float | None = None
    peak_mb: float | None = None
    grad_error: float | None = None
    bytes_per_token: float | None = None
    ratio: float | None = None


def compare(case: str, medians: Mapping[str, Measure]) -> list[Row]:
    """One row per system; ratios need a system called "opd" among them."""
    ours = medians.get(OURS)
    return [
        Row(
            case=case,
            system=system,
            seconds=measure.seconds,
            tokens_per_s=1 / measure.unit_seconds if measure.tokens else None,
            peak_mb=measure.peak_mb,
            grad_error=measure.grad_error,
            bytes_per_token=measure.bytes_per_token,
            ratio=measure.unit_seconds / ours.unit_seconds if ours else None,
        )
        for system, measure in medians.items()
    ]


def print_table(rows: Iterable[Row]) -> None:
    """Prints the rows, leaving out columns in which every row is empty."""
    records = [asdict(row) for row in rows]
    names = [
        spec.name
        for spec in fields(Row)
        if any(record[spec.name] is not None for record in records)
    ]
    cells = [names, *([_cell(record[name]) for name in names] for record in records)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        padded = (
            text.ljust(width) if name in ("case", "system") else text.rjust(width)
            for name, text, width in zip(names, line, widths, strict=True)
        )
        print("  ".join(padded).rstrip())


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def write_json(rows: Iterable[Row | Mapping[str, Any]], path: str | Path) -> None:
    """Writes a plain list of row objects."""
    _write(path, [_plain(row) for row in rows])


def write_result(path: str | Path, rows: Iterable[Row | Mapping[str, Any]], command: str) -> None:
    """Writes rows that can be committed: with the command, the versions and the kind of machine."""
    _write(path, {**provenance(command), "rows": [_plain(row) for row in rows]})


def provenance(command: str) -> dict[str, Any]:
    """What a committed result says of where it is from: command, versions, kind of machine."""
    return {
        "command": command,
        "versions": _versions(),
        "machine": {"cores": os.cpu_count(), "accelerator": _accelerator()},
    }


def _plain(row: Row | Mapping[str, Any]) -> dict[str, Any]:
    return asdict(row) if isinstance(row, Row) else dict(row)


def _write(path: str | Path, value: Any) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


# --------------------------------------------------------------------------------------------
# Command line


@dataclass(frozen=True)
class Options:
    """What every script accepts.

    Attributes:
        quick: end within 45 seconds.
        json: where the plain list of rows goes.
        result: where the rows with command, versions and machine go, to be committed.
    """

    quick: bool = False
    json: Path | None = None
    result: Path | None = None


def parser(description: str) -> argparse.ArgumentParser:
    """The shared arguments; a script may add its own."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--quick", action="store_true", help="end within 45 seconds")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write a list of rows")
    arguments.add_argument(
        "--result", type=Path, metavar="FILE", help="write rows, command, versions and machine"
    )
    return arguments


def parse_args(description: str, argv: Sequence[str] | None = None) -> Options:
    """The shared arguments of this call."""
    return Options(**vars(parser(description).parse_args(argv)))


def report(rows: Sequence[Row], options: Options) -> None:
    """Prints the table and writes the files that were asked for."""
    print_table(rows)
    write_asked(rows, options)


def write_asked(
    rows: Sequence[Row | Mapping[str, Any]], options: Options | argparse.Namespace
) -> None:
    """Writes the files that were asked for."""
    if options.json:
        write_json(rows, options.json)
    if options.result:
        write_result(options.result, rows, command_line())


def add_part(arguments: argparse.ArgumentParser) -> None:
    """The argument that `in_part` reads."""
    arguments.add_argument("--part", default="1/1", help="of the runs: 1/2 on one of two cores")


def in_part(runs: Sequence[T], options: argparse.Namespace) -> Sequence[T]:
    """The runs of the part that was asked for: of `1/2` the first, the third and so on."""
    part, parts = map(int, options.part.split("/"))
    return runs[part - 1 :: parts]


def command_line() -> str:
    """The command that is running, as a reader would repeat it."""
    return shlex.join(["python", *sys.argv])

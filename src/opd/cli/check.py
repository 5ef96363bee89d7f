"""`opd check`: what is wrong with a run file, and what it will take, before anything loads."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from opd.cli.output import console, print_json, size, table
from opd.training.config import load

if TYPE_CHECKING:
    from opd.training.memory import MemoryPart

USAGE_ERROR = 2


def main(arguments: Namespace) -> int:
    """Print findings and memory; exit code 2 where there is an error."""
    run = load(arguments.file, arguments.overrides)
    from opd.training.check import examine

    report = examine(run)
    failed = any(finding.level == "error" for finding in report.findings)
    if arguments.json:
        rows: list[dict[str, object]] = [
            {"kind": finding.level, "where": finding.where, "message": finding.message}
            for finding in report.findings
        ]
        rows += [
            {"kind": "memory", "where": part.what, "message": part.how, "bytes": part.bytes}
            for part in report.memory
        ]
        print_json(rows)
        return USAGE_ERROR if failed else 0
    screen = console()
    for finding in report.findings:
        colour = "red" if finding.level == "error" else "yellow"
        label = (f"{finding.level}: ", colour)
        screen.print(Text.assemble(label, f"{finding.where}: {finding.message}"), soft_wrap=True)
    if report.memory:
        _print_memory(screen, report.memory)
    verdict = "this run cannot work" if failed else "nothing stands in the way"
    screen.print(f"{run.source}: {verdict}", style="red" if failed else "green")
    return USAGE_ERROR if failed else 0


def _print_memory(screen: Console, parts: Sequence[MemoryPart]) -> None:
    made = table("memory", "about", "from", right=("about",))
    for part in parts:
        made.add_row(part.what, size(part.bytes), part.how)
    made.add_row("together", size(sum(part.bytes for part in parts)), "", style="bold")
    screen.print(made)

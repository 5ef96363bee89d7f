"""`opd check`: what is wrong with run files, and what they will take, before anything loads."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from opd.cli.output import console, print_json, size, table
from opd.errors import ConfigError
from opd.training.config import Run, load

if TYPE_CHECKING:
    from opd.training.check import CheckReport, Finding
    from opd.training.memory import MemoryPart

USAGE_ERROR = 2


def main(arguments: Namespace) -> int:
    """Print findings and memory, of several files findings alone; 2 where there is an error."""
    if len(arguments.files) > 1:
        return check_several(arguments)
    run = load(arguments.files[0] if arguments.files else None, arguments.overrides)
    report = _examined(run, live=arguments.live)
    failed = _failed(report)
    if arguments.json:
        print_json(_rows(run.source, report))
        return USAGE_ERROR if failed else 0
    screen = console()
    _print_findings(screen, report.findings)
    if report.memory:
        _print_memory(screen, report.memory)
    _print_verdict(screen, run.source, failed)
    return USAGE_ERROR if failed else 0


def check_several(arguments: Namespace) -> int:
    """Check one file after the other; one that cannot be read is an error of its own."""
    screen, failures = console(), 0
    rows: list[dict[str, object]] = []
    for file in arguments.files:
        report = _reported(file, arguments.overrides, live=arguments.live)
        failures += _failed(report)
        if arguments.json:
            rows += _rows(file, report)
            continue
        _print_verdict(screen, file, _failed(report))
        _print_findings(screen, report.findings, indent="  ")
    if arguments.json:
        print_json(rows)
    elif failures:
        screen.print(f"{failures} of {len(arguments.files)} runs cannot work", style="red")
    return USAGE_ERROR if failures else 0


def _reported(file: str, overrides: Sequence[str], *, live: bool) -> CheckReport:
    try:
        run = load(file, overrides)
    except ConfigError as error:
        from opd.training.check import CheckReport, Finding

        return CheckReport((Finding("error", "", str(error)),), ())
    return _examined(run, live=live)


def _examined(run: Run, *, live: bool) -> CheckReport:
    from opd.training.check import examine

    return examine(run, live=live)


def _failed(report: CheckReport) -> bool:
    return any(finding.level == "error" for finding in report.findings)


def _rows(file: str, report: CheckReport) -> list[dict[str, object]]:
    """Findings, then memory, as objects of one form."""
    rows: list[dict[str, object]] = [
        {"file": file, "kind": found.level, "where": found.where, "message": found.message}
        for found in report.findings
    ]
    for part in report.memory:
        row = {"file": file, "kind": "memory", "where": part.what, "message": part.how}
        rows.append({**row, "bytes": part.bytes})
    return rows


def _print_findings(screen: Console, findings: Sequence[Finding], indent: str = "") -> None:
    for finding in findings:
        colour = "red" if finding.level == "error" else "yellow"
        where = f"{finding.where}: " if finding.where else ""
        label = (f"{finding.level}: ", colour)
        screen.print(Text.assemble(indent, label, f"{where}{finding.message}"), soft_wrap=True)


def _print_verdict(screen: Console, file: str, failed: bool) -> None:
    verdict = "this run cannot work" if failed else "nothing stands in the way"
    screen.print(f"{file}: {verdict}", style="red" if failed else "green", soft_wrap=True)


def _print_memory(screen: Console, parts: Sequence[MemoryPart]) -> None:
    made = table("memory", "about", "from", right=("about",))
    for part in parts:
        made.add_row(part.what, size(part.bytes), part.how)
    made.add_row("together", size(sum(part.bytes for part in parts)), "", style="bold")
    screen.print(made)

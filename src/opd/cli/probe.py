"""`opd probe`: whether this teacher can help this student, before anything is spent on it."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from opd.cli.live import LINE_EVERY
from opd.cli.output import console, duration, number, print_json, size, table
from opd.errors import ConfigError
from opd.training.config import load

if TYPE_CHECKING:
    from opd.diagnose.verdicts import Verdict
    from opd.training.pilot import Doing
    from opd.training.pilot_cost import ProbeCost
    from opd.training.pilot_report import Probe

WIDEST = len("marginal information and reachability")
COLOURS = {"fit": "green", "doubtful": "yellow", "unfit": "red"}


def main(arguments: Namespace) -> int:
    """Probe, and print verdicts, proposal, audits, and where the rest is."""
    given, overrides = own_output(arguments.overrides)
    run = load(arguments.file, overrides)
    from opd.training.pilot import PilotSettings
    from opd.training.pilot_report import as_tree, probe, probe_folder

    settings = PilotSettings(responses=arguments.responses)
    folder = probe_folder(run.config.output, given)
    screen = console(stderr=True)
    try:
        with progress(screen) as doing:
            found = probe(
                run,
                settings,
                folder=folder,
                steps=arguments.steps,
                say=lambda cost: _say(screen, cost),
                doing=doing,
            )
    except BaseException:
        with suppress(OSError):  # where nothing was written nothing is left
            folder.rmdir()
        raise
    if arguments.json:
        print_json([{"folder": str(folder), **as_tree(found)}])
        return 0
    _print(console(), found, folder)
    return 0


def own_output(overrides: list[str]) -> tuple[str | None, list[str]]:
    """The folder that `--output` names, which is the probe's, and the run file's settings."""
    given, rest, words = None, [], list(overrides)
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        if key != "--output":
            rest.append(word)
            continue
        if not equals and (not words or words[0].startswith("--")):
            raise ConfigError("--output has no value; write --output FOLDER")
        given = value if equals else words.pop(0)
    return given, rest


@contextmanager
def progress(screen: Console) -> Iterator[Doing]:
    """Says what happens: in place on a terminal, a line every ten seconds elsewhere."""
    if screen.is_terminal:
        with screen.status("") as status:
            yield status.update
        return
    last = -LINE_EVERY

    def line(what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            screen.print(what, soft_wrap=True)

    yield line


def _say(screen: Console, cost: ProbeCost) -> None:
    """What it will take, before it begins."""
    parts = [
        f"up to {cost.forward_tokens:,.0f} tokens forward",
        f"about {duration(cost.seconds)}",
    ]
    if cost.warmup_steps:
        parts.append(
            f"the run's own {cost.warmup_steps} steps of warm-up first "
            "(--warmup.steps 0 leaves them out)"
        )
    if cost.wire_bytes:
        parts.append(f"{size(cost.wire_bytes)} on the wire")
    if cost.memory_bytes == cost.memory_bytes:
        parts.append(f"{size(cost.memory_bytes)} of memory")
    screen.print(f"this probe: {'; '.join(parts)}", soft_wrap=True)


def _print(screen: Console, found: Probe, folder: Path) -> None:
    for verdict in found.verdicts:
        _print_verdict(screen, verdict)
    _heading(screen, f"proposal: {found.proposal.first}")
    for change in found.proposal.changes[1:]:
        screen.print(f"  then {change}", soft_wrap=True)
    for name, text in found.proposal.box.items():
        screen.print(Text.assemble((f"  {name}: ", "dim"), text), soft_wrap=True)
    bad = [audit for audit in found.audits if audit.found]
    _heading(screen, f"audits: {len(bad)} of {len(found.audits)} found something")
    for audit in bad:
        screen.print(Text.assemble((f"  {audit.name}: ", "red"), audit.message), soft_wrap=True)
    for shown in found.maps[:1]:
        _heading(screen, f"where they disagree: {shown.words}")
    for note in found.pilot.session.notes:
        screen.print(f"note: {note}", soft_wrap=True)
    if found.steps is not None:
        _print_steps(screen, found)
    _print_rest(screen, found, folder)


def _heading(screen: Console, text: str) -> None:
    screen.print(Text(f"\n{text}", style="bold"), soft_wrap=True)


def _print_verdict(screen: Console, verdict: Verdict) -> None:
    """One line, and under it what to change where something has to be."""
    number = "-"
    if verdict.number == verdict.number:
        number = f"{verdict.number:.3g} [{verdict.low:.3g}, {verdict.high:.3g}]"
    line = Text.assemble(
        f"{verdict.criterion:<{WIDEST}}  ",
        (f"{verdict.status:<14}  ", COLOURS.get(verdict.status, "dim")),
        f"{number:<22}  ",
        verdict.meaning,
    )
    screen.print(line, soft_wrap=True)
    if verdict.setting:
        screen.print(f"{'':<{WIDEST}}  -> {verdict.setting}: {verdict.why}", soft_wrap=True)


def _print_steps(screen: Console, found: Probe) -> None:
    steps = found.steps
    assert steps is not None
    made = table(f"{steps.count} steps", "before", "after", right=("before", "after"))
    before, after = steps.before, steps.after
    for name in ("accuracy", "entropy", "length", "truncated", "repeated"):
        made.add_row(name, number(getattr(before, name)), number(getattr(after, name)))
    for share in before.log_ratio:
        values = (number(each.log_ratio[share], 2) for each in (before, after))
        made.add_row(f"log ratio, {share:.0%} quantile", *values)
    screen.print(made)
    norms = steps.watched["gradient norm"]
    screen.print(
        f"gradient norm {norms[0]:.3g} at the first step, {norms[-1]:.3g} at the last; accuracy "
        f"of what was solved before {number(steps.solved)}, of the rest {number(steps.unsolved)}"
    )


def _print_rest(screen: Console, found: Probe, folder: Path) -> None:
    plan = found.plan
    memory = f", {size(plan.memory_bytes)} of memory" if plan.memory else ""
    wire = f", {size(plan.wire_bytes)} on the wire" if plan.wire_bytes else ""
    screen.print(
        f"\nthe run as planned: about {duration(sum(plan.seconds.values()))}{memory}{wire}; this "
        f"probe took {duration(found.seconds)}, {found.cpu_seconds:.0f} CPU-seconds"
    )
    screen.print(
        f"Everything is in {folder}: probe.json (all numbers), probe.png (the picture), "
        "proposal.toml (a run file)",
        soft_wrap=True,
    )
    changed = any(change.value is not None for change in found.proposal.changes)
    file = folder / "proposal.toml" if changed else found.run.source
    again = "" if not changed and file == "the embedded default" else f" {file}"
    screen.print(f"Next: opd run{again}", soft_wrap=True)

"""`opd explain`: the nine variables, the objective as formulas, the passes, the sources."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.text import Text

from opd import catalog
from opd.cli.output import console, print_json, table
from opd.errors import ConfigError, nearest
from opd.training.config import Run, load


def main(arguments: Namespace) -> int:
    """Explain a run file or a method."""
    run = find_run(arguments.what, arguments.overrides)
    from opd.training.explain import explain

    found = explain(run)
    if arguments.json:
        print_json([found.as_dict()])
        return 0
    screen = console()
    screen.print(Text.assemble((found.method, "bold"), "  ", found.summary))
    for title, pairs in found.sections():
        if not pairs:
            continue
        screen.print(Text(f"\n{title}", style="bold"))
        grid = table("name", "text")
        grid.show_header = False
        grid.box = None
        grid.padding = (0, 2, 0, 0)
        if any(name for name, _ in pairs):
            for name, text in pairs:
                grid.add_row(f"  {name}", text)
        else:
            for _, text in pairs:
                grid.add_row("", text)
        screen.print(grid)
    return 0


def find_run(what: str | None, overrides: list[str]) -> Run:
    """A run file's run, or the embedded default's with the method named."""
    if what is None or Path(what).exists():
        return load(what, overrides)
    known = catalog.methods()
    if what in known:
        return load(None, ["--method.name", what, *overrides])
    if what.endswith(".toml"):
        return load(what, overrides)
    raise ConfigError(f"{what!r} is neither a run file nor a method. {nearest(what, known)}")

"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """Where people read: as wide as the terminal; where there is none, wide enough for a table.

    Square brackets are text here, never markup: run files and prompts are full of them.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None
    if not stream.isatty() and "COLUMNS" not in os.environ:
        width = PLAIN_WIDTH
    return _Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which ends quietly when its reader has gone."""
        raise BrokenPipeError


def print_json(rows: Sequence[Mapping[str, Any]]) -> None:
    """A list of objects; a number that is none becomes null."""
    print(json.dumps(_plain(rows), indent=2, ensure_ascii=False))


def table(
    *columns: str, title: str = "", right: Iterable[str] = (), whole: Iterable[str] = ()
) -> Table:
    """An empty table in the house style.

    Args:
        right: columns that hold numbers.
        whole: columns that are never folded; the first never is.
    """
    made = Table(
        box=box.SIMPLE_HEAD,
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        pad_edge=False,
    )
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=column == columns[0] or column in whole,
        )
    return made


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def interval(score: Mapping[str, Any]) -> str:
    """The 95 % interval of a score."""
    if score["low"] is None or math.isnan(score["low"]):
        return "-"
    return f"{score['low']:.3f}–{score['high']:.3f}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

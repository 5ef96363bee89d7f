"""`opd query`: SQL on the token records of a run. Imports no torch."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.table import Table

from opd.cli.output import console, print_json, table
from opd.errors import ConfigError, nearest
from opd.report.queries import MOST_ROWS, READY_MADE, Answer, Records


def main(arguments: Namespace) -> int:
    """Answer a query, or list the ready-made ones."""
    with Records(Path(arguments.run), threads=arguments.threads) as records:
        if arguments.query is None:
            return list_ready_made(records, as_json=arguments.json)
        question = arguments.query.strip()
        if re.fullmatch(r"[\w-]*", question) and question not in READY_MADE:
            raise ConfigError(
                f"there is no ready-made query {question!r}. {nearest(question, READY_MADE)}"
            )
        limit = arguments.limit
        if limit is None and (question in READY_MADE or not arguments.json):
            limit = MOST_ROWS
        answer = records.ask(question, limit=limit)
    if answer.why_none:
        console(stderr=True).print(f"{question} finds nothing: {answer.why_none}")
    if arguments.json:
        print_json([_printable(row) for row in answer.as_dicts()])
        return 0
    if answer.why_none:
        return 0
    console().print(_drawn(answer))
    if answer.more:
        print(f"more rows than {limit}; --limit N shows as many")
    return 0


def list_ready_made(records: Records, *, as_json: bool) -> int:
    """The ready-made queries, and what one can ask about besides."""
    rows = [{"name": name, "what": ready.summary} for name, ready in READY_MADE.items()]
    if as_json:
        print_json(rows)
        return 0
    made = table("query", "what it shows")
    for row in rows:
        made.add_row(row["name"], row["what"])
    console().print(made)
    columns = f"or SQL on tokens, whose columns are: {', '.join(records.columns)}"
    print(records.why_none or columns)
    return 0


def _drawn(answer: Answer) -> Table:
    numbers = [
        column
        for place, column in enumerate(answer.columns)
        if any(isinstance(row[place], int | float) for row in answer.rows)
    ]
    # equal names are common in SQL, and a table takes them by place
    made = table(*answer.columns, right=numbers, whole=numbers)
    for row in answer.rows:
        made.add_row(*map(_cell, row))
    return made


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        # a token often begins with white space, or is nothing else, which nobody would see
        return repr(value) if value.strip() != value or not value.isprintable() else value
    return str(value)


def _printable(row: dict[str, Any]) -> dict[str, Any]:
    """What JSON has no word for, such as a date, as text."""
    plain = (bool, int, float, str, list, dict, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in row.items()}

"""`opd list`: methods, formulas, tasks and runs. Imports no torch."""

from __future__ import annotations

import json
import tomllib
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from opd import catalog
from opd.cli.output import console, number, print_json, table
from opd.errors import ConfigError, nearest

INDEX = catalog.PACKAGE / "methods" / "index.json"

Row = dict[str, Any]


def main(arguments: Namespace) -> int:
    """List one kind of thing."""
    if arguments.what not in KINDS:
        raise ConfigError(
            f"there is no list of {arguments.what!r}. {nearest(arguments.what, KINDS)}"
        )
    rows, draw = KINDS[arguments.what]
    found = rows(Path(arguments.output))
    if arguments.json:
        print_json(found)
    elif found:
        console().print(draw(found))
    else:
        print(f"no {arguments.what}; `opd run` makes one")
    return 0


def method_rows(_: Path) -> list[Row]:
    """The index that `make index` writes."""
    rows: list[Row] = json.loads(INDEX.read_text(encoding="utf-8"))
    return rows


def formula_rows(_: Path) -> list[Row]:
    """Every formula, from its docstring."""
    return [
        {
            "name": name,
            "summary": entry.summary,
            "equation": entry.equation,
            "arguments": list(entry.arguments),
            "knobs": list(entry.knobs),
            "source": entry.section("Source"),
        }
        for name, entry in catalog.formulas().items()
    ]


def task_rows(_: Path) -> list[Row]:
    """The built-in tasks."""
    from opd.data.tasks import TASKS

    return [
        {
            "name": name,
            "description": task.description,
            "prompt": task.example().prompt,
            "solution": task.example().solution,
        }
        for name, task in TASKS.items()
    ]


def run_rows(output: Path) -> list[Row]:
    """Run folders, oldest first."""
    files = [*output.glob("[!.]*/config.toml")] if output.is_dir() else []
    return [_run_row(file.parent) for file in sorted(files, key=lambda f: f.stat().st_mtime)]


def _read(file: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    """A table of a file; empty where it is not there or damaged, for a list must show the rest."""
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _run_row(folder: Path) -> Row:
    config = _read(folder / "config.toml", tomllib.loads)
    summary = _read(folder / "summary.json", json.loads)
    scores = {
        who: (summary.get(f"{who}_accuracy") or {}).get("value")
        for who in ("start", "final", "teacher")
    }
    return {
        "folder": str(folder),
        "method": config.get("method", {}).get("name", "-"),
        "student": config.get("student", {}).get("model", "-"),
        "state": summary.get("exit_reason", "unfinished" if config else "config.toml unreadable"),
        "start_accuracy": scores["start"],
        "final_accuracy": scores["final"],
        "teacher_accuracy": scores["teacher"],
        "gain": summary.get("gain"),
        "seconds": summary.get("seconds"),
        "tokens": summary.get("tokens"),
    }


def _draw_methods(rows: list[Row]) -> Table:
    summaries = catalog.methods()
    made = table("method", "what it computes", "text by", "evidence", "hash", whole=["hash"])
    for row in rows:
        made.add_row(
            row["name"],
            summaries[row["name"]].summary,
            row["variables"]["state source"],
            row["evidence"],
            row["composition_hash"],
        )
    return made


def _draw_formulas(rows: list[Row]) -> Table:
    made = table("formula", "what it is", "knobs")
    for row in rows:
        made.add_row(row["name"], row["summary"], ", ".join(row["knobs"]))
    return made


def _draw_tasks(rows: list[Row]) -> Table:
    made = table("task", "what it is", "prompt", "solution")
    for row in rows:
        made.add_row(row["name"], row["description"], row["prompt"], row["solution"])
    return made


def _draw_runs(rows: list[Row]) -> Table:
    figures = ("start", "end", "teacher", "gain")
    made = table("run", "method", "state", *figures, right=figures)
    for row in rows:
        gain = row["gain"]
        made.add_row(
            row["folder"],
            row["method"],
            row["state"],
            number(row["start_accuracy"]),
            number(row["final_accuracy"]),
            number(row["teacher_accuracy"]),
            "-" if gain is None else f"{gain:+.3f}",
        )
    return made


KINDS = {
    "methods": (method_rows, _draw_methods),
    "formulas": (formula_rows, _draw_formulas),
    "tasks": (task_rows, _draw_tasks),
    "runs": (run_rows, _draw_runs),
}

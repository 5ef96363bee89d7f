"""`opd list`: methods, formulas, diagnostics, alarms, rules, tasks and runs. Imports no torch."""

from __future__ import annotations

import json
import tomllib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from opd import catalog
from opd.cli.output import console, number, print_json, table
from opd.errors import ConfigError, nearest

INDEX = catalog.PACKAGE / "methods" / "index.json"

FILTERS = {
    "level": ("evidence", ("E0", "E1", "E2", "E3", "M")),
    "formula": ("formula_source", ("code", "paper", "note", "inferred")),
}
"""By option, the key of a method's row that it looks at, and the values there are."""

ROOM_FOR_ALL = 100
"""Characters of a terminal below which methods are listed with one column of prose."""

Row = dict[str, Any]


def main(arguments: Namespace) -> int:
    """List one kind of thing."""
    what = arguments.what
    if what == "methods":
        return list_methods(arguments)
    if what not in KINDS:
        raise ConfigError(f"there is no list of {what!r}. {nearest(what, ('methods', *KINDS))}")
    for option in ("variable", *FILTERS):
        if getattr(arguments, option) is not None:
            raise ConfigError(
                f"`opd list {what}` has no option '--{option}': it is one of `opd list methods`"
            )
    rows, draw = KINDS[what]
    found = rows(Path(arguments.output))
    if arguments.json:
        print_json(found)
    elif found:
        console().print(draw(found))
    else:
        print(f"no {what}; `opd run` makes one")
    return 0


def list_methods(arguments: Namespace) -> int:
    """List the methods that pass the filters; with a variable, equal choices stand together."""
    rows = method_rows()
    variable = "" if arguments.variable is None else find_variable(arguments.variable, rows)
    for option, (key, valid) in FILTERS.items():
        if (given := getattr(arguments, option)) is not None:
            wanted = _values(option, given, valid)
            rows = [row for row in rows if row[key] in wanted]
    if variable:
        rows = by_choice(rows, variable)
    if arguments.json:
        print_json(rows)
    elif rows:
        screen = console()
        screen.print(_draw_methods(rows, variable, all_columns=screen.width >= ROOM_FOR_ALL))
    else:
        filters = [f"--{name} {text}" for name in FILTERS if (text := getattr(arguments, name))]
        print(f"no published method passes {' '.join(filters)}")
    return 0


def method_rows() -> list[Row]:
    """The index that `make index` writes."""
    rows: list[Row] = json.loads(INDEX.read_text(encoding="utf-8"))
    return rows


def find_variable(word: str, rows: list[Row]) -> str:
    """The one of the nine variables whose name is the word, or alone contains it.

    Raises:
        ConfigError: none does, or several do; names the nine.
    """
    nine: list[str] = list(rows[0]["variables"])
    sought = word.strip().casefold()
    found = [name for name in nine if sought == name] or [name for name in nine if sought in name]
    if len(found) == 1:
        return found[0]
    fault = f"fits {' and '.join(found)} alike" if found else "fits no variable"
    raise ConfigError(f"--variable {word!r} {fault}. The nine: {', '.join(nine)}.")


def by_choice(rows: list[Row], variable: str) -> list[Row]:
    """The rows sorted by what they chose for the variable, the commonest choice first."""
    times = Counter(row["variables"][variable] for row in rows)

    def place(row: Row) -> tuple[int, str]:
        choice = row["variables"][variable]
        return -times[choice], choice

    return sorted(rows, key=place)


def _values(option: str, given: str, valid: Collection[str]) -> set[str]:
    """The valid values that a comma-separated text names."""
    spelled = {value.casefold(): value for value in valid}
    found = set()
    for word in given.split(","):
        if (plain := word.strip().casefold()) not in spelled:
            raise ConfigError(
                f"--{option} has no value {word.strip()!r}. "
                f"Valid: {', '.join(valid)}, or several with commas between them."
            )
        found.add(spelled[plain])
    return found


def formula_rows() -> list[Row]:
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


def rule_rows() -> list[Row]:
    """The composition rules of `opd check`, from their docstrings."""
    return [
        {
            "name": rule.name,
            "level": rule.level,
            "says": rule.says,
            "reason": rule.reason,
            "way_out": rule.way_out,
            "source": rule.source,
        }
        for rule in catalog.rules().values()
    ]


def diagnostic_rows() -> list[Row]:
    """What can be measured of a teacher's feedback, from the functions' docstrings."""
    keys = ("id", "name", "formula", "unit", "reading", "action", "source", "cost")
    return [{key: getattr(each, key) for key in keys} for each in catalog.diagnostics().values()]


def alarm_rows() -> list[Row]:
    """The failures that a run looks out for, from the docstrings of their rules."""
    keys = ("name", "says", "mechanism", "rule", "reads", "side", "threshold", "origin")
    return [
        {key: getattr(alarm, key) for key in keys}
        | {"what_to_do": alarm.action, "source": alarm.source}
        for alarm in catalog.alarms().values()
    ]


def task_rows() -> list[Row]:
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


def _draw_methods(rows: list[Row], variable: str, *, all_columns: bool) -> Table:
    """A table of methods; without room for all columns, only one of them is prose."""
    summaries = catalog.methods()
    choice = variable or "text by"
    cells: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row["name"],
        "what it computes": lambda row: summaries[row["name"]].summary,
        choice: lambda row: row["variables"][variable or "state source"],
        "evidence": lambda row: row["evidence"],
        "hash": lambda row: row["composition_hash"],
    }
    if not all_columns:
        del cells["hash"], cells["what it computes" if variable else choice]
    made = table(*cells, whole=["evidence", "hash"])
    before = ""
    for row in rows:
        shown = {title: cell(row) for title, cell in cells.items()}
        if variable and shown[choice] == before:
            shown[choice] = '"'
        else:
            before = shown.get(choice, "")
        made.add_row(*shown.values())
    return made


def _draw_formulas(rows: list[Row]) -> Table:
    made = table("formula", "what it is", "knobs")
    for row in rows:
        made.add_row(row["name"], row["summary"], ", ".join(row["knobs"]))
    return made


def _draw_rules(rows: list[Row]) -> Table:
    made = table("rule", "level", "what it is about", whole=["level"])
    for row in rows:
        made.add_row(row["name"], row["level"], row["says"])
    return made


def _draw_diagnostics(rows: list[Row]) -> Table:
    known = catalog.diagnostics()
    made = table("diagnostic", "id", "what it measures", whole=["id"])
    for row in rows:
        made.add_row(row["name"], row["id"], known[row["name"]].measures)
    return made


def _draw_alarms(rows: list[Row]) -> Table:
    made = table("alarm", "given where", "what it says")
    for row in rows:
        made.add_row(row["name"], f"{row['side']} {row['threshold']:g}", row["says"])
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


KINDS: dict[str, tuple[Callable[[Path], list[Row]], Callable[[list[Row]], Table]]] = {
    "formulas": (lambda _: formula_rows(), _draw_formulas),
    "diagnostics": (lambda _: diagnostic_rows(), _draw_diagnostics),
    "alarms": (lambda _: alarm_rows(), _draw_alarms),
    "rules": (lambda _: rule_rows(), _draw_rules),
    "tasks": (lambda _: task_rows(), _draw_tasks),
    "runs": (run_rows, _draw_runs),
}

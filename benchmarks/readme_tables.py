"""Put the committed results into the tables of the README and of the pages.

    python benchmarks/readme_tables.py

A table stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->` and is made from
`benchmarks/results/NAME.json`, which the script that measures writes with `--result`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import advice
import alarms
import default_run
import failures
import two_teachers

PAGES = tuple(
    Path(__file__).parents[1] / name
    for name in (
        "README.md",
        "docs/failures.md",
        "docs/probe.md",
        "docs/results/alarms.md",
        "docs/several_teachers.md",
        "docs/teachers.md",
    )
)
RESULTS = Path(__file__).parent / "results"

Rows = Sequence[Mapping[str, Any]]


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with every table made anew; one without a result file stays as it is."""

    def made(marked: re.Match[str]) -> str:
        name, file = marked["name"], results / f"{marked['name']}.json"
        if not file.exists():
            return marked[0]
        table = block(name, json.loads(file.read_text(encoding="utf-8")))
        return f"<!-- results:{name} -->\n{table}\n<!-- /results:{name} -->"

    return re.sub(
        r"<!-- results:(?P<name>\w+) -->\n.*?<!-- /results:(?P=name) -->", made, text, flags=re.S
    )


def block(name: str, result: Mapping[str, Any]) -> str:
    """A table and a line that says how it was measured."""
    draw = _TABLES.get(name, _speed)
    return f"{draw(result['rows'])}\n\n{_how(result)}"


def _accuracy(rows: Rows) -> str:
    """Accuracy at the start and, with the gain, at the end of every arm."""
    table = default_run.table([dict(row) for row in rows])
    (prompts,) = {row["end"]["n"] for row in rows}
    teachers = {f"{row['teacher']['value']:.3f}" for row in rows}
    return (
        f"{table}\n\nAccuracy on {prompts:,} test prompts, with the gain over the start in "
        f"brackets; the teacher's is {', '.join(sorted(teachers))}."
    )


_COLUMNS: Mapping[str, tuple[str, str]] = {
    "seconds": ("CPU-seconds", "{:.3g}"),
    "tokens_per_s": ("tokens per CPU-second", "{:,.0f}"),
    "peak_mb": ("extra memory, MB", "{:,.0f}"),
    "grad_error": ("gradient error", "{:.1e}"),
    "ratio": ("time relative to opd", "{:.2f}"),
}


def _speed(rows: Rows) -> str:
    """One line per case and system; columns that apply to none are left out."""
    used = [name for name in _COLUMNS if any(row.get(name) is not None for row in rows)]
    heads = ["case", "system", *(_COLUMNS[name][0] for name in used)]
    lines = [_line(heads), "|---|---|" + "---:|" * len(used)]
    for row in rows:
        figures = [
            "" if row.get(name) is None else _COLUMNS[name][1].format(row[name]) for name in used
        ]
        lines.append(_line([row["case"], row["system"], *figures]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _how(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result["machine"]
    return (
        f"Measured by `{result['command']}` on {machine['cores']} cores, accelerator: "
        f"{machine['accelerator']}; {versions}."
    )


def _head(rows: Rows) -> str:
    """What stands beside peers, and how exact each is; the rest is in the result file."""
    beside = {
        row["case"] for row in rows if row["system"] != "opd" and "floor" not in row["system"]
    }
    return _speed([row for row in rows if row["case"] in beside])


def _teacher(rows: Rows) -> str:
    """Four tables: what replies weigh, what the server adds, many clients, the gradient."""
    by_case = {part: [row for row in rows if row["case"].startswith(part)] for part in _PARTS}
    weigh = ["| reply | as | bytes per token | read into tensors, tokens per CPU-second |"]
    weigh.append("|---|---|---:|---:|")
    for row in by_case["parse "]:
        what = row["case"].removeprefix("parse ")
        figures = [f"{row['bytes_per_token']:,.0f}", f"{row['tokens_per_s']:,.0f}"]
        weigh.append(_line([what, row["system"], *figures]))
    share = ["| scored | served, CPU-seconds of the server | the forward alone | ratio |"]
    share.append("|---|---:|---:|---:|")
    alone = {row["case"]: row for row in by_case["score "] if row["system"] != "opd"}
    for row in by_case["score "]:
        if row["system"] == "opd":
            bare = alone[row["case"]]["seconds"]
            figures = [f"{row['seconds']:.2f}", f"{bare:.2f}", f"{row['seconds'] / bare:.2f}"]
            share.append(_line([row["case"].removeprefix("score "), *figures]))
    many = [
        f"{row['case']}: {row['seconds']:.2f} s" for row in by_case["64 "] if "wall" in row["case"]
    ]
    slopes = [
        "| gradient of the reverse KL, by what is asked | cosine with the whole vocabulary's |"
    ]
    slopes.append("|---|---:|")
    for row in by_case["V "]:
        slopes.append(_line([f"{row['case']}; {row['system']}", f"{1 - row['grad_error']:.4f}"]))
    return "\n\n".join(["\n".join(weigh), "\n".join(share), "; ".join(many), "\n".join(slopes)])


_PARTS = ("parse ", "score ", "64 ", "V ")

_TABLES: Mapping[str, Callable[[Rows], str]] = {
    "advice": advice.table,
    "alarms": alarms.markdown,
    "default_run": _accuracy,
    "failures": failures.table,
    "head": _head,
    "teacher": _teacher,
    "two_teachers": two_teachers.table,
}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {page}")

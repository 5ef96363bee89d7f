"""Write `docs/results/audit.md`, what losses of other packages descend, from the audits' results.

python docs/make_audit_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.audit.findings import CAUTIONS, FAULTS

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/audit_packages.json"
PAGE = Path(__file__).parent / "results/audit.md"
TITLES = {
    "trl": "TRL",
    "verl": "verl",
    "torchrl": "torchrl",
    "liger": "Liger",
    "ms-swift": "ms-swift",
    "nemo-rl": "NeMo-RL",
    "slime": "slime",
    "tinker": "tinker",
}

HEAD = """\
# What losses of other packages descend

<!-- Written by docs/make_audit_page.py from the results of benchmarks/audit_packages.py. -->

The distillation losses of {count} packages under [`opd audit`](../audit.md): {cases} calls with
their options. `python benchmarks/audit_packages.py` audits those of the packages that its Python
has, and `--result benchmarks/results/audit_packages.json` puts them in their place there.

## How to read it

- *Called* is what the package or its option calls the loss. Behind the colon stands the divergence
  that this was taken for and held against.
- *Descends* is the name of the expected gradient, exact to rounding, on small worlds where the
  student writes the tokens, unless the line says that the teacher does. "Nothing that has a name
  here" is a gradient that none of the known divergences, truncations and estimators has; then the
  nearest is given. Behind "but" stands where it is another.
- *Cosine* is that of two gradients on ordinary rows: of the loss, and of what it is called.
- *Faults* make a loss something else than what it is called in some circumstance, and *cautions*
  are limits to know. Many are documented, and some are meant: a KL on a top k, say, is
  `another-divergence` than the whole one.
- Vocabularies here have 8 tokens, so a top k of 32 or more is everything.
- The commands are below each table. They are run from this repository's root, with the package
  installed, as `opd audit` or `python -m opd audit`. A target in `benchmarks.peers` calls a loss
  that is no function of its own, one whose package is source alone, or one that a user writes.

| finding | means |
|---|---|
"""


def page() -> str:
    """The whole page."""
    packages = json.loads(RESULT.read_text(encoding="utf-8"))["packages"]
    rows = [row for found in packages.values() for row in found["rows"]]
    seen = {found["name"] for row in rows for found in row.get("findings", ())}
    meanings = [
        f"| {kind} `{name}` | {meaning} |"
        for kind, known in (("fault", FAULTS), ("caution", CAUTIONS))
        for name, meaning in known.items()
        if name in seen
    ]
    head = HEAD.format(count=len(packages), cases=len(rows)) + "\n".join(meanings) + "\n"
    return "\n".join([head, *(_section(name, found) for name, found in packages.items())])


def _section(name: str, found: dict[str, Any]) -> str:
    versions = found["versions"]
    lines = [
        f"## {TITLES[name]} {found['version']}",
        "",
        f"{_install(found['install'])}; run with torch {versions['torch']} on a CPU.",
        "",
        "| | called | descends | cosine | faults | cautions |",
        "|---|---|---|---|---|---|",
        *(_line(at, row) for at, row in enumerate(found["rows"], 1)),
        "",
        "<details><summary>commands</summary>",
        "",
        *(f"{at}. `{row['command']}`" for at, row in enumerate(found["rows"], 1)),
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def _install(how: str) -> str:
    return f"`{how}`" if how.startswith("pip ") else how[0].upper() + how[1:]


def _line(at: int, row: dict[str, Any]) -> str:
    called = row["called"] + (f" ({row['note']})" if row["note"] else "")
    cells = [str(at), called, *_verdict(row)]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _verdict(row: dict[str, Any]) -> list[str]:
    """What it descends, the cosine with what it is called, faults, cautions."""
    if row["status"] != "audited":
        return [f"refused: it raises {row['status'].partition(':')[0]}", "", "", ""]
    cosine = row["claimed_cosine"]
    if row["descends"].startswith("nothing: "):
        cosine = None  # of rounding
    found = {
        level: ", ".join(
            dict.fromkeys(f"`{one['name']}`" for one in row["findings"] if one["level"] == level)
        )
        for level in ("fault", "caution")
    }
    written = "" if cosine is None else f"{cosine:.3f}"
    return [_descends(row), written, found["fault"], found["caution"]]


def _descends(row: dict[str, Any]) -> str:
    """With the circumstance in which it is another."""
    told = [one["message"] for one in row["findings"] if one["name"] == "another-divergence"]
    elsewhere = told[0].partition(" on ordinary rows, but ")[2] if told else ""
    return row["descends"] + (f"; but {elsewhere}" if elsewhere else "")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")

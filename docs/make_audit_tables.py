"""Write the tables of `docs/audit.md`: findings, and the known mistakes.

python docs/make_audit_tables.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from opd.audit.findings import CAUTIONS, FAULTS
from opd.audit.specimens import NOT_IN_A_LOSS, SPECIMENS

PAGE = Path(__file__).parent / "audit.md"


def page(text: str) -> str:
    """The page with its tables written anew."""
    tables = {
        "faults": _table(("fault", "what it means"), _named(FAULTS)),
        "cautions": _table(("caution", "what it means"), _named(CAUTIONS)),
        "specimens": _table(
            ("in `opd.audit.specimens`", "claim", "what it is, and where it was seen", "found as"),
            (
                (
                    f"`{specimen.name}`",
                    specimen.claim,
                    specimen.seen,
                    ", ".join(specimen.finds),
                )
                for specimen in SPECIMENS
            ),
        ),
        "elsewhere": _table(("mistake", "why no loss shows it"), NOT_IN_A_LOSS),
    }
    for name, made in tables.items():
        mark = f"<!-- table: {name} -->"
        text, found = re.subn(
            rf"{re.escape(mark)}\n.*?<!-- end -->",
            lambda _, mark=mark, made=made: f"{mark}\n{made}<!-- end -->",
            text,
            flags=re.DOTALL,
        )
        if found != 1:
            raise SystemExit(f"{PAGE} needs one place for the table {name!r}: {mark}")
    return text


def _named(words: dict[str, str]) -> Iterable[tuple[str, str]]:
    return ((f"`{name}`", meaning) for name, meaning in words.items())


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n" + "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""Write `index.json`, which `opd list methods` reads without importing a method (`make index`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd import catalog, methods
from opd.methods.variables import nine_variables

INDEX = Path(__file__).parent / "index.json"


def method_rows() -> list[dict[str, Any]]:
    """One row per published method, with its defaults, in the order of their names."""
    rows = []
    for name, entry in catalog.methods().items():
        method = getattr(methods, name)()
        rows.append(
            {
                "name": name,
                "variables": nine_variables(method),
                "evidence": entry.section("Evidence"),
                "formula_source": entry.section("Formula"),
                "source": entry.section("Source"),
                "composition_hash": method.composition_hash,
            }
        )
    return rows


def main() -> None:
    """Write the index beside this file."""
    text = json.dumps(method_rows(), indent=2, ensure_ascii=False) + "\n"
    INDEX.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

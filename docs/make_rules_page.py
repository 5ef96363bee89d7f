"""Write `docs/rules.md`, the composition rules, from their docstrings.

python docs/make_rules_page.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from opd import catalog

PAGE = Path(__file__).parent / "rules.md"

HEAD = """\
# Composition rules

<!-- Written by docs/make_rules_page.py from src/opd/audit/rules.py; edit that. -->

Every part of a method can be right and their composition wrong. `opd check` holds the composition
of a run, with the settings of its sampler and its steps, to the rules below, after Table 10 of the
survey arXiv:2606.22793 and what was found in published code. `opd list rules` shows them too.

| level | what `opd check` makes of it |
|---|---|
| refused | an error: nobody can mean it |
| must be declared | an error, unless the run file says that it is meant; then a note |
| note | a note |
| allowed | nothing: what looks alike and is right |

A declaration is a line of the run file, and is itself noted where the run does no such thing:

```toml
[check]
declared = ["clamped-loss"]
```

From Python, `opd.audit.examine(method, opd.audit.RunFacts(temperature=0.7))` returns the same
findings. Formulas are named as in `opd list formulas`.
"""

TITLES = {
    "refused": "Refused",
    "must be declared": "Must be declared",
    "note": "Notes",
    "allowed": "Allowed",
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for level, title in TITLES.items():
        parts.append(f"## {title}\n")
        parts += [_entry(rule) for rule in catalog.rules().values() if rule.level == level]
    return "\n".join(parts)


def _entry(rule: catalog.Rule) -> str:
    paragraphs = [rule.says, rule.reason]
    if rule.level != "allowed":
        paragraphs.append(f"*Way out:* {rule.way_out}.")
    paragraphs.append(f"*Source:* {rule.source.removesuffix('.')}.")
    return "\n\n".join([f"### `{rule.name}`", *map(_wrapped, paragraphs)]) + "\n"


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")

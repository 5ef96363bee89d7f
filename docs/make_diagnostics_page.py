"""Write `docs/diagnostics.md`, what can be measured of a teacher's feedback, from the docstrings.

python docs/make_diagnostics_page.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from opd import catalog

PAGE = Path(__file__).parent / "diagnostics.md"

HEAD = """\
# Diagnostics

<!-- Written by docs/make_diagnostics_page.py from src/opd/diagnose/; edit that. -->

A teacher's feedback is worth following at a prefix where the teacher knows its way around, has
something to say that the student can reach, agrees with the outcome, and leaves an update that goes
where it is meant to: the criteria of section 5 of the survey arXiv:2606.22793. The functions below
measure each of them. `opd list diagnostics` shows them too.

```python
from opd import diagnose

overlap = diagnose.top_k_overlap(student_log_probs, teacher_log_probs, k=8)  # one number per row
auc = diagnose.align_auc(score, verdict)  # one number
```

Rows are the tokens of responses that a loss may look at, `[N, V]` log-probabilities are normalised,
`y` is the sampled token and `r` its log ratio; a mask `[B, T]` is true where a token counts, and a
gap takes no time. Nothing is differentiated. A result per row has the dtype of its argument,
statistics are taken in float64. Entries without mass are exact limits: a number is infinite where
the divergence is, and NaN where there is nothing to measure: no row, no judged response, no push.
No threshold is given, because those that are published belong to a model, a task and an engine:
compare with the healthy case of your own.
"""

TITLES = {
    "compatibility": "Does the teacher fit the student's text?",
    "along": "Along the response",
    "interface": "Do both mean the same events?",
    "signal": "The signal",
    "update": "The update",
    "routing": "Where suppressed mass goes",
    "outcome": "Against the outcome",
    "staleness": "Stale text",
    "drift": "What the text has come to",
}


def page() -> str:
    """The whole page."""
    found = catalog.diagnostics().values()
    parts = [HEAD, _ids()]
    for module, title in TITLES.items():
        parts.append(f"## {title}\n")
        parts += [_entry(each) for each in found if each.module == module]
    return "\n".join(parts)


def _ids() -> str:
    """What the survey's ids are called here."""
    functions: dict[str, list[str]] = {}
    for each in catalog.diagnostics().values():
        functions.setdefault(each.id, []).append(f"[`{each.name}`](#{each.name})")
    rows = [f"| `{name}` | {', '.join(found)} |" for name, found in functions.items()]
    return "\n".join(["| what is looked at | functions |", "|---|---|", *rows]) + "\n"


def _entry(each: catalog.Diagnostic) -> str:
    arguments = ", ".join([*each.arguments, *(["*", *each.knobs] if each.knobs else [])])
    paragraphs = [
        each.measures,
        f"*Unit:* {_ended(each.unit)}",
        f"*Reading:* {_ended(each.reading)}",
        f"*Action:* {_ended(each.action)}",
        f"*Cost:* {_ended(each.cost)}",
        f"*Source:* {_ended(each.source)}",
    ]
    first, *others = map(_wrapped, paragraphs)
    formula = f"```text\n{each.name}({arguments})\n\n{_wrapped(each.formula)}\n```"
    return "\n\n".join([f"### `{each.name}`", first, formula, *others]) + "\n"


def _ended(text: str) -> str:
    return text.removesuffix(".") + "."


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")

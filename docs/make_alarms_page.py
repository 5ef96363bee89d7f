"""Write `docs/alarms.md`, what a run watches of itself, from the library's own tables.

python docs/make_alarms_page.py
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from opd import catalog
from opd.diagnose.monitors import LOOKED_AT, MEANINGS

PAGE = Path(__file__).parent / "alarms.md"

HEAD = """\
# Monitors and alarms

<!-- Written by docs/make_alarms_page.py from monitors.py and alarms.py in src/opd/diagnose/. -->

A run watches its own signal. Monitors are metrics in `events.jsonl`; alarms are rules over the
last of them, each named after a failure that Tables 6 and 7 of the survey arXiv:2606.22793
describe. Both are on by default. `[monitor]` in the run file sets them:

```toml
[monitor]
every = 5           # steps between two looks at whole distributions; 0: never
responses = 8       # of a step, that a look is at
on_alarm = "act"    # "log" (the default), "stop" or "act"
act = { length_inflation = "lower_rate", misaligned_events = "stop" }
off = ["repetition"]
```

`stop` ends the run after a checkpoint, with the `exit_reason` `alarm: NAME`; to go on all the same,
`opd run --resume FOLDER --monitor.on_alarm log`. `act` does what `[monitor.act]` lists and nothing
else: `lower_rate` halves the learning rate for the rest of the phase, once for each alarm. An alarm
is a line of `events.jsonl` at every step at which it is given, a line on the screen when it begins,
and an entry of `summary.json` that says what to do.

Sets that the student must not unlearn are measured before the first step and at every evaluation,
as `golden/NAME/accuracy`; `golden_regression` tells when one falls by more than chance explains:

```toml
[evaluate]
every = 50
sets = { sums = "task:add" }

[monitor]
golden = ["sums"]
```

Alarms are about the distillation, not the warm-up. A rule looks at five steps together, or at two
looks, so an alarm comes after a few steps, not at the first odd batch.
"""

MONITORS = """\
## Monitors

Of the rows that the student wrote (of all rows, where it wrote none). They cost no pass: the
numbers are those of the update, and of the last one where a rollout has several. A term that reads
no teacher has no log ratio, and a metric that nothing is known of is not there. `log_ratio`,
`reverse_kl`, `entropy` and `loss` come also by thirds of the response, `/first`, `/middle` and
`/last`, and by verdict, `/right` and `/wrong`.
"""

LOOKS = """\
## A look

Every `monitor.every` steps, before the update, student and teacher are compared as whole
distributions on the first `monitor.responses` responses that the student wrote. Where the step has
the teacher's distributions anyway, nobody is asked again; otherwise a teacher in this process is.
One that is asked at a url or answers from a folder is not, and a note says so. Lists have 16
entries, or an eighth of a vocabulary of fewer than 128 tokens. `top_k_overlap`,
`teacher_confidence` and `excess_surprise` come also by thirds. [Diagnostics](diagnostics.md) has
the functions.
"""

ALARMS = """\
## Alarms

`opd list alarms` shows them too. Thresholds lie halfway between healthy runs of the embedded tasks
and runs with a planted fault; [how they did](results/alarms.md) on other seeds and other strengths.
Models of another size have other numbers: look at your healthy runs first, and put what does not
fit into `monitor.off`.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, MONITORS, _table("monitor/", MEANINGS), LOOKS]
    parts += [_table("monitor/look/", LOOKED_AT), ALARMS]
    return "\n".join([*parts, *map(_entry, catalog.alarms().values())])


def _table(prefix: str, meanings: Mapping[str, str]) -> str:
    rows = [f"| `{prefix}{name}` | {text} |" for name, text in meanings.items()]
    return "\n".join(["| metric | what it is |", "|---|---|", *rows]) + "\n"


def _entry(alarm: catalog.Alarm) -> str:
    threshold = f"{alarm.side} {alarm.threshold:g} ({alarm.origin})"
    reads = ", ".join(f"`{metric}`" for metric in alarm.reads)
    parts = [
        alarm.says,
        f"*Mechanism:* {_ended(alarm.mechanism)}",
        f"*Rule:* {_ended(alarm.rule)} Given {_ended(threshold)} Reads {_ended(reads)}",
        f"*What to do:* {_ended(alarm.action)}",
        f"*Source:* {_ended(alarm.source)}",
    ]
    return "\n\n".join([f"### `{alarm.name}`", *map(_wrapped, parts)]) + "\n"


def _ended(text: str) -> str:
    return text.removesuffix(".") + "."


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")

"""Write `docs/frameworks.md`: what frameworks compute by default, and what that descends.

python docs/make_framework_page.py

The run files are those of `recipes/frameworks/`, each with a head of `# key: value` lines.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from opd import load, methods
from opd.audit import (
    World,
    compare,
    expectation,
    local_gradient,
    random_tree,
    sequence_reverse_kl_gradient,
    visits,
)
from opd.audit.worlds import Table
from opd.formula import divergence
from opd.methods.variables import nine_variables
from opd.objective import Dense, Method, Objective
from opd.terms import Term
from opd.training.session import build_method
from opd.types import Bound

DOCS = Path(__file__).parent
FOLDER = DOCS.parent / "recipes" / "frameworks"

FRAMEWORKS = (
    *("trl", "verl", "verl_examples", "slime", "nemo_rl", "ms_swift", "skyrl", "prime_rl"),
    *("roll", "tinker_cookbook", "cosmos_rl", "kdflow"),
)
KEYS = (
    *("framework", "version", "called", "computes", "descends", "evidence", "source"),
    *("departures", "defects"),
)
"""What the head of a run file says; `descends` is a target, or `none, but ` and what instead."""

EXACT = 1e-9
"""How far a cosine may be from 1 in any world where the page says exactly."""

SEEDS = (1, 2, 3, 4)
VOCABULARY, HORIZON, WORLD_K = 6, 3, 3
DRIFT = 0.2
"""Standard deviation of the logits' difference between the older student and the student."""

TARGETS = {
    "forward_kl": "local forward KL",
    "reverse_kl": "local reverse KL",
    "jensen_shannon": "local Jensen-Shannon",
    "sequence_reverse_kl": "sequence reverse KL",
}

VARIANTS: tuple[tuple[str, str, Objective], ...] = (
    ("verl", "verl, without the bound: `k3_opd`", methods.k3_opd().objective),
    (
        "nemo_rl",
        "NeMo-RL, were all tokens compared",
        Objective(
            Dense(divergence=divergence.forward_kl, coef=0.5),
            Dense(divergence=divergence.reverse_kl, coef=0.5),
        ),
    ),
)
"""After which run file, a name and an objective: what one part of a default changes."""

OTHERS: tuple[tuple[str, str, str], ...] = (
    ("TRL `GKDTrainer`", "Jensen-Shannon at 1/2, half of the text the student's", "`gkd`"),
    (
        "TRL asynchronous distillation",
        "forward KL on the teacher's top 8 and a bucket",
        "custom: `forward_kl`, `teacher_top_k`, `bucket`",
    ),
    ("TRL SDFT", "Jensen-Shannon on the student's top 100, renormalised", "`sdft`"),
    ("TRL SDPO", "log-ratio to the averaged self, sampled", "`sdpo_sampled`"),
    ("TRL IW-OPD", "log-ratio with weights by drift", "`iw_opd`"),
    (
        "verl, `forward_kl_topk`",
        "forward KL summed over the teacher's top k as they are, at least 0",
        "`raw_forward_top_k_opd`",
    ),
    ("slime with a task's reward", "log-ratio added to the group's advantage", "`slime_opd`"),
    (
        "NeMo-RL MOPD",
        "log-ratio, tokens gated by trainer against engine; "
        "its shipped recipe caps the ratio instead",
        "`nemotron_mopd`",
    ),
    ("SDPO's own code", "Jensen-Shannon on the student's top 100 and a bucket", "`sdpo`"),
    ("OPSD's own code", "forward KL, entries cut at 0.05", "`opsd`"),
    ("LMOps OPCD", "reverse KL on the student's top 256 as they are", "`opcd`"),
    ("thunlp/OPD", "the student's top 16 scored by their log-ratios", "`candidates_opd`"),
)
"""Losses of theirs beside the defaults, as read in their code in autumn 2026."""

PAGE = """\
# What frameworks compute

<!-- Written by docs/make_framework_page.py; edit that, or the heads of recipes/frameworks/*.toml. -->

Several frameworks offer on-policy distillation, and their defaults differ. For each there is a run file in
[`recipes/frameworks/`](../recipes/frameworks) that composes its default from the formulas here. It runs on the
embedded models, `opd check` accepts it and `opd explain` prints its formulas. Any two can be compared, and each
with a published method:

```sh
opd run recipes/frameworks/verl.toml
opd explain recipes/frameworks/prime_rl.toml
opd diff recipes/frameworks/trl.toml recipes/frameworks/verl.toml
opd diff recipes/frameworks/slime.toml sampled_token_opd
```

Evidence is E1, the framework's own code, at the version given. No framework was run for this page: what is
computed below is the composition, and *departures* say where it is not literally theirs.

{summary}

## What the gradients descend

The expected gradient of one step, by enumeration of every response, in {worlds} random worlds of {vocabulary}
tokens and {horizon} steps (logits normal, the teacher's 1.5 times as wide): its cosine with four exact gradients,
averaged over the worlds. *Exactly* means a cosine of 1 to 1e-9 in every world. Losses are summed over a response's
tokens; all responses have one length, so a mean over them points the same way. A support of the k likeliest has
{world_k} of the {vocabulary} tokens, and a temperature is that of student, teacher and sampler. Text of a data set is left out.
*Noise* is the standard deviation of a one-response gradient over the size of its mean. *Older text* is the cosine
with the same target, the one that it descends or the nearest, where an older student wrote the text (its logits
differ by {drift:g} times a normal number): there a frozen log-ratio, a ratio and a clip part ways.

{cosines}

{reading}

## One by one

{sections}
## Other losses of theirs

As read in their code in autumn 2026, with the nearest composition here.

{others}
"""

READING = """\
- Whoever takes the log-ratio of the sampled token as an advantage descends the local reverse KL, and so does the
  reverse KL on the whole vocabulary: same direction, different noise. None descends the reverse KL of the whole
  sequence, for none credits a token with what comes after it (`opd list formulas` has credits that do).
- k3, differentiated, is a forward KL whose value is that of a reverse one; verl's bound takes away the tokens that
  the teacher misses most: in these worlds {dropped:.1%} of the student's text, {missed:.0%} of what the teacher would say.
- Renormalising both models to the teacher's likeliest tokens is what turns NeMo-RL's gradient away from that of the
  whole vocabulary: here they hold {teacher_covered:.0%} of what the teacher would say and {student_covered:.0%} of what the student does, and the
  rest has no part in it.
- A log-ratio frozen at rollout time and one recomputed now are the same until the student moves. Then a clip drops
  tokens, and a frozen log-ratio forgets how far the student has come.
- A mean within each response gives a token of a short one more weight; one over all tokens of the step does not.
"""


@dataclass(frozen=True)
class Measured:
    """What the composition of one run file descends.

    Attributes:
        cosines: with every target, a world each.
        noise: standard deviation of one response's gradient over the size of the mean; the mean of
            the worlds.
        older: cosine with the target it descends, or the nearest, on an older student's text; the
            mean of the worlds.
    """

    cosines: dict[str, tuple[float, ...]]
    noise: float
    older: float

    @property
    def descends(self) -> str:
        """The target that it descends exactly, or `none`."""
        exact = [name for name, each in self.cosines.items() if min(each) >= 1 - EXACT]
        return exact[0] if exact else "none"

    @property
    def nearest(self) -> str:
        """The target with the largest mean cosine."""
        return max(self.cosines, key=lambda name: _mean(self.cosines[name]))


def head(name: str) -> dict[str, str]:
    """The `# key: value` lines at the head of a run file; a line of spaces goes on with the last.

    Raises:
        ValueError: a line that is neither, or keys other than `KEYS`, in this order.
    """
    found: dict[str, str] = {}
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    for line in text.split("\n\n", 1)[0].splitlines():
        if start := re.fullmatch(r"# (\w+): (.+)", line):
            found[start[1]] = start[2]
        elif line.startswith("#   ") and found:
            found[list(found)[-1]] += " " + line.removeprefix("#   ")
        else:
            raise ValueError(f"{name}.toml: {line!r} is no line of its head")
    if tuple(found) != KEYS:
        raise ValueError(f"{name}.toml: its head says {', '.join(found)}; say {', '.join(KEYS)}")
    return found


@cache
def method(name: str) -> Method:
    """The method of a run file."""
    return build_method(load(FOLDER / f"{name}.toml"))


@cache
def measured(name: str) -> Measured:
    """What a run file's expected gradient descends in the worlds of the page."""
    return measure(method(name).objective)


def measure(objective: Objective) -> Measured:
    """What an objective's expected gradient descends in the worlds of the page."""
    fresh: list[dict[str, float]] = []
    old: list[dict[str, float]] = []
    noises = []
    for seed in SEEDS:
        world = random_tree(seed, vocab_size=VOCABULARY, horizon=HORIZON)
        small = _in_the_world(objective)
        # at a temperature the sampler writes with the tempered student
        tempered = _tempered(world, objective.temperature)
        now = expectation(small, world, behaviour=tempered.student_logits)
        noises.append(math.sqrt(now.variance) / float(now.gradient.norm()))
        fresh.append(_cosines(now.gradient, tempered, tempered.student_logits))
        older = tempered.student_logits + DRIFT * _normal_like(world.student_logits, seed)
        late = expectation(small, world, behaviour=older)
        old.append(_cosines(late.gradient, tempered, older))
    cosines = {target: tuple(each[target] for each in fresh) for target in TARGETS}
    found = Measured(cosines, _mean(noises), math.nan)
    target = found.nearest if found.descends == "none" else found.descends
    return replace(found, older=_mean([each[target] for each in old]))


def page() -> str:
    """The whole page."""
    heads = {name: head(name) for name in FRAMEWORKS}
    summary = ["| framework | version read | computes | descends |", "|---|---|---|---|"]
    targets = " | ".join(TARGETS.values())
    cosines = [f"| framework | {targets} | noise | older text |", "|---|---|---|---|---|---|---|"]
    for name, said in heads.items():
        result = measured(name)
        link = f"[{said['framework']}](../recipes/frameworks/{name}.toml)"
        summary.append(
            f"| {link} | {said['version']} | {_cell(said['computes'])} | {_in_words(said['descends'], result)} |"
        )
        cosines.append(_row(said["framework"], result))
        cosines += [_row(label, measure(made)) for near, label, made in VARIANTS if near == name]
    others = ["| loss | what it computes | here |", "|---|---|---|"]
    others += [f"| {what} | {how} | {here} |" for what, how, here in OTHERS]
    return PAGE.format(
        summary="\n".join(summary),
        worlds=len(SEEDS),
        vocabulary=VOCABULARY,
        horizon=HORIZON,
        world_k=WORLD_K,
        drift=DRIFT,
        cosines="\n".join(cosines),
        reading=READING.rstrip().format(**_shares()),
        sections="\n".join(_section(name, said) for name, said in heads.items()),
        others="\n".join(others),
    )


def main() -> None:
    """Write the page."""
    (DOCS / "frameworks.md").write_text(page(), encoding="utf-8")


# --------------------------------------------------------------------------------------------


def _in_words(said: str, result: Measured) -> str:
    """What a head says and the worlds show."""
    if result.descends != "none":
        return f"exactly the {TARGETS[result.descends]}"
    instead = said.partition(", but ")[2]
    near = _mean(result.cosines[result.nearest])
    return f"{instead}; of the four nearest the {TARGETS[result.nearest]} ({near:.3f})"


def _row(label: str, result: Measured) -> str:
    cells = (
        "exactly" if target == result.descends else f"{_mean(each):.3f}"
        for target, each in result.cosines.items()
    )
    return f"| {label} | {' | '.join(cells)} | {result.noise:.2f} | {result.older:.3f} |"


def _section(name: str, said: dict[str, str]) -> str:
    made = method(name)
    lines = [
        f"### {said['framework']}",
        "",
        f"[`recipes/frameworks/{name}.toml`](../recipes/frameworks/{name}.toml), read at "
        f"{said['version']}.",
        "",
        f"- **Called there** {_code(said['called'])}",
        f"- **Computes** {said['computes']}",
        f"- **Descends** {_in_words(said['descends'], measured(name))}",
        f"- **Source** ({said['evidence']}) {said['source']}",
        f"- **Departures** {said['departures']}",
        f"- **Known defects** {said['defects']}",
        "",
        "| variable | choice |",
        "|---|---|",
    ]
    lines += [
        f"| {variable} | {_cell(choice)} |" for variable, choice in nine_variables(made).items()
    ]
    return "\n".join(lines) + "\n"


def _shares() -> dict[str, float]:
    """Of the student's and the teacher's mass at the student's prefixes, the means of the worlds.

    What verl's bound drops, and what the teacher's `WORLD_K` likeliest tokens hold.
    """
    slots = dict(method("verl").objective.terms[0].slots())
    most = dict(slots["divergence"].knobs)["most_nats"]
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        world = random_tree(seed, vocab_size=VOCABULARY, horizon=HORIZON)
        student, teacher = (
            logits.log_softmax(-1) for logits in (world.student_logits, world.views["teacher"])
        )
        reached = visits(world).sum(0, keepdim=True).T
        reached = reached / reached.sum()
        log_ratio = teacher - student
        held = torch.expm1(log_ratio) - log_ratio > most
        top = teacher >= teacher.topk(WORLD_K).values[:, -1:]
        for name, distribution, chosen in (
            ("dropped", student, held),
            ("missed", teacher, held),
            ("teacher_covered", teacher, top),
            ("student_covered", student, top),
        ):
            share = float((reached * distribution.exp() * chosen).sum())
            found.setdefault(name, []).append(share)
    return {name: _mean(each) for name, each in found.items()}


def _in_the_world(objective: Objective) -> Objective:
    """The same, with supports of `WORLD_K` entries for those of the k likeliest."""

    def fitted(term: Term) -> Term:
        support = Bound.of(term.support)
        sizes = {
            knob: WORLD_K for knob, _ in support.knobs if knob in ("k", "teacher_k", "student_k")
        }
        return replace(term, support=support.with_knobs(**sizes)) if sizes else term

    return Objective(*map(fitted, objective.terms), temperature=objective.temperature)


def _tempered(world: World, temperature: float) -> World:
    views = {name: logits / temperature for name, logits in world.views.items()}
    return replace(world, student_logits=world.student_logits / temperature, views=views)


def _cosines(gradient: Table, world: World, behaviour: Table) -> dict[str, float]:
    """With every target; the sequence's own gradient has no other policy's text."""
    exact = {
        "forward_kl": local_gradient(world, divergence.forward_kl, behaviour=behaviour),
        "reverse_kl": local_gradient(world, divergence.reverse_kl, behaviour=behaviour),
        "jensen_shannon": local_gradient(world, divergence.jensen_shannon, behaviour=behaviour),
        "sequence_reverse_kl": sequence_reverse_kl_gradient(world),
    }
    return {name: compare(gradient, target).cosine for name, target in exact.items()}


def _normal_like(table: Table, seed: int) -> Table:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(table.shape, generator=draw, dtype=table.dtype)


def _mean(numbers: tuple[float, ...] | list[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    main()

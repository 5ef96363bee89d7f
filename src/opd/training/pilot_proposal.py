"""What to change first, and an objective written out: the survey's design template, filled in.

Source: Box 1 of arXiv:2606.22793: bottleneck, state evidence, support, feedback route, update
route, routing diagnostics, stabilisers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd.diagnose.verdicts import (
    ALIGNMENT,
    DOUBTFUL,
    FIT,
    INFORMATION,
    PRIVILEGE,
    ROUTABILITY,
    STABILITY,
    STATE,
    UNFIT,
    WARMUP_STEPS,
    Verdict,
)
from opd.formula import support, weight
from opd.methods.variables import nine_variables
from opd.objective import Dense, Method, Objective, Sampled
from opd.spec import objective_to_tree, states_to_tree, views_to_tree
from opd.training.config import Run, from_tree, overridden, to_toml
from opd.training.pilot import Pilot
from opd.training.pilot_gradients import Gradients, Neighbour, without_context
from opd.training.pilot_interface import Audit
from opd.types import Bound, with_parts

AS_GOOD = 0.95
"""Cosine with the full gradient from which a cheaper objective is offered as the same one: the
embedded default's top-4 list has 0.997, its sampled token 0.72; M,
benchmarks/results/probe.json. And the share of the run's divergence that its list of tokens sees,
from which it stands for the whole: the gradient of a reverse KL weighs a token by the student's
probability, so the first step of a list of the student's likeliest is nearly the whole one's, while
what the list leaves out pulls at no step."""
TIMING_NOISE = 1.5
"""Ratio of two costs below which they are equal: one objective timed twice on a shared machine
differs by a third; M, benchmarks/results/probe.json."""


@dataclass(frozen=True)
class Change:
    """One setting to change.

    Attributes:
        key: of the run file.
        value: its new value; None where a probe cannot know it.
        why: what is wrong as it is.
    """

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        if self.value is None or isinstance(self.value, dict | list):
            return f"{self.key}: {self.why}"
        return f"{self.key} = {json.dumps(self.value)}: {self.why}"


@dataclass(frozen=True)
class Proposal:
    """What the probe would do.

    Attributes:
        changes: the most urgent first; empty where nothing has to change.
        box: the survey's design template, line by line.
        objective: of the proposed run.
        toml: the proposed run file.
    """

    changes: tuple[Change, ...]
    box: Mapping[str, str]
    objective: Objective
    toml: str

    @property
    def first(self) -> str:
        """The first change in one line."""
        return str(self.changes[0]) if self.changes else "nothing has to change"


def propose(
    pilot: Pilot,
    verdicts: Sequence[Verdict],
    audits: Sequence[Audit],
    gradients: Gradients,
    run: Run,
) -> Proposal:
    """The changes that the evidence asks for, and the run file with those that have a value."""
    by_name = {verdict.criterion: verdict for verdict in verdicts}
    method = pilot.session.phases[-1].method
    objective, of_objective = _objective(pilot, method.objective, by_name, gradients)
    audited = {
        urgent: list(_of_audits(pilot, by_name, audits, urgent=urgent)) for urgent in (True, False)
    }
    of_verdicts = _of_verdicts(pilot, by_name, run)
    changes = _unique([*audited[True], *of_verdicts, *of_objective, *audited[False]])
    proposed = replace(method, objective=objective)
    box = _box(proposed, by_name, gradients)
    return Proposal(changes, box, objective, _toml(proposed, changes, box, run))


def _unique(changes: Sequence[Change]) -> tuple[Change, ...]:
    """The first of each setting."""
    found: dict[str, Change] = {}
    for change in changes:
        found.setdefault(change.key, change)
    return tuple(found.values())


# --------------------------------------------------------------------------------------------
# Settings


def _of_audits(
    pilot: Pilot, by_name: Mapping[str, Verdict], audits: Sequence[Audit], *, urgent: bool
) -> Iterator[Change]:
    """The interface: what is urgent first, as no other number can be trusted; the rest last."""
    for audit in audits:
        if audit.found and audit.urgent == urgent:
            useful = by_name[PRIVILEGE].status == FIT
            value = _mended(pilot, audit, keep_contexts=useful)
            yield Change(audit.setting, value, f"{audit.name}: {audit.message}")


def _of_verdicts(pilot: Pilot, by_name: Mapping[str, Verdict], run: Run) -> Iterator[Change]:
    """What the criteria ask for, the worst first."""
    for status in (UNFIT, DOUBTFUL):
        for name in (STATE, INFORMATION, PRIVILEGE, STABILITY):
            if by_name[name].status == status:
                yield from _of_verdict(pilot, by_name[name], run)


def _mended(pilot: Pilot, audit: Audit, *, keep_contexts: bool) -> Any:
    """The value that mends what an audit found; None where it is not for a probe to say.

    Args:
        keep_contexts: because they help who reads them.
    """
    if audit.setting == "method.views" and not keep_contexts:
        return _plain_views(pilot)
    if audit.setting == "method.merge_stop_ids" and len(pilot.session.student.loaded.eos_ids) > 1:
        return True
    off = audit.numbers.get("sampler") != audit.numbers.get("objective")
    if audit.setting == "sampler.temperature" and off:
        return pilot.temperature
    return None


def _plain_views(pilot: Pilot) -> list[dict[str, Any]] | None:
    """The views, none of them behind the teacher's with a prompt of its own; None where one of
    those would then be the student."""
    method = pilot.session.phases[-1].method
    behind = [
        view
        for view in with_parts([pilot.view], method.views)
        if view.context or view.chat_template_kwargs
    ]
    if any(view.source != "teacher" for view in behind):
        return None
    views = tuple(without_context(view) if view in behind else view for view in method.views)
    return views_to_tree(replace(method, views=views))


def _of_verdict(pilot: Pilot, verdict: Verdict, run: Run) -> Iterator[Change]:
    config = run.config
    if verdict.setting == "warmup.steps":
        steps = max(WARMUP_STEPS, 2 * config.warmup.steps)
        yield Change("warmup.steps", steps, verdict.why)
        known = all(prompt.response_ids for prompt in pilot.session.validation.prompts)
        if not known and config.warmup.source == "data" and pilot.session.teacher_sampler:
            yield Change("warmup.source", "teacher", "the data has no responses to imitate")
    elif verdict.setting == "sampler.max_new_tokens":
        yield Change(verdict.setting, 2 * config.sampler.max_new_tokens, verdict.why)
    elif verdict.setting:
        yield Change(verdict.setting, None, verdict.why)


# --------------------------------------------------------------------------------------------
# The objective


def _objective(
    pilot: Pilot, objective: Objective, by_name: Mapping[str, Verdict], gradients: Gradients
) -> tuple[Objective, list[Change]]:
    """The run's objective with what the evidence asks for, and why: one change for all of it."""
    reasons = []
    better = _better(gradients)
    if better is not None and not _has_schedules(objective):
        own = _own(gradients)
        objective = better.objective
        reasons.append(
            f"{better.name}: cosine {better.cosine:.2f} at {better.seconds:.2g} CPU-s in "
            f"place of {own.cosine:.2f} at {own.seconds:.2g}"
            + (
                f"; this run's list sees {own.seen:.0%} of the divergence"
                if own.seen < AS_GOOD
                else ""
            )
        )
    unroutable = by_name[ROUTABILITY].status == UNFIT
    aligned = by_name[ALIGNMENT].status != UNFIT
    terms = []
    for term in objective.terms:
        follows = isinstance(term, Dense | Sampled) and term.against == pilot.view
        if follows and not aligned and pilot.session.verifier is not None:
            term = replace(term, weights=(*term.weights, Bound.of(weight.correct)))
            reasons.append(by_name[ALIGNMENT].why)
        if follows and unroutable and isinstance(term, Dense) and term.tail:
            term = replace(term, support=support.full, tail="")
            reasons.append(by_name[ROUTABILITY].why)
        terms.append(term)
    proposed = Objective(*terms, temperature=objective.temperature)
    why = "; ".join(dict.fromkeys(reasons))
    changes = [Change("method.objective", objective_to_tree(proposed), why)] if reasons else []
    return proposed, changes


def _own(gradients: Gradients) -> Neighbour:
    return next(each for each in gradients.neighbours if not each.variable)


def _better(gradients: Gradients) -> Neighbour | None:
    """A neighbour with the same gradient for clearly less, or a clearly better one for the same.

    Only of support and route: other variables change what is aimed at, not how well it is hit.
    The same gradient at one step is not the same aim: a list has to see the divergence as well.
    """
    offered = [
        each
        for each in gradients.neighbours
        if each.variable in ("support", "update route")
        and each.cosine >= AS_GOOD
        and not each.seen < AS_GOOD
    ]
    if not offered or not gradients.neighbours:
        return None
    own = _own(gradients)
    best = max(offered, key=lambda each: each.per_second)
    short = own.cosine < AS_GOOD or own.seen < AS_GOOD
    nearer = short and best.seconds < TIMING_NOISE * own.seconds
    cheaper = TIMING_NOISE * best.seconds < own.seconds
    return best if nearer or cheaper else None


def _has_schedules(objective: Objective) -> bool:
    """Whether the neighbours, which are those of the first step, are not the whole run's."""
    low, high = objective.at_ends()
    return low != high


def _box(method: Method, by_name: Mapping[str, Verdict], gradients: Gradients) -> dict[str, str]:
    """Box 1 of the survey, from what was measured and what the objective says."""
    bad = [
        verdict
        for status in (UNFIT, DOUBTFUL)
        for verdict in by_name.values()
        if verdict.status == status
    ]
    chosen = nine_variables(method)
    tried = [
        f"{each.name} {each.cosine:.2f}"
        for each in gradients.neighbours
        if each.variable == "support" and each.cosine == each.cosine
    ]
    routing = by_name[ROUTABILITY]
    stability = by_name[STABILITY]
    return {
        "bottleneck": f"{bad[0].criterion}: {bad[0].why}" if bad else "none of the six criteria",
        "state evidence": by_name[STATE].meaning,
        "support": chosen["support"] + (f" (cosines: {', '.join(tried)})" if tried else ""),
        "feedback route": f"{chosen['feedback source']}; {by_name[ALIGNMENT].meaning}",
        "update route": f"{chosen['update route']}; credit: {chosen['temporal credit']}",
        "routing diagnostics": "; ".join([routing.meaning, *routing.evidence[:1]]),
        "stabilisers": f"{chosen['regulariser'] or 'none'}; {stability.meaning}",
    }


# --------------------------------------------------------------------------------------------
# The run file


def _toml(method: Method, changes: Sequence[Change], box: Mapping[str, str], run: Run) -> str:
    """The run file with the proposed settings, every key written out."""
    tree = dataclasses.asdict(run.config)
    settings = [
        (change.key, change.value)
        for change in changes
        if change.value is not None and not change.key.startswith("method.objective")
    ]
    merge = run.config.method.merge_stop_ids
    tree["method"] = {
        "name": "custom",
        "objective": objective_to_tree(method.objective),
        "states": states_to_tree(method.states),
        "views": views_to_tree(method),
        "merge_stop_ids": merge,
    }
    tree["name"] = ""
    tree = overridden(tree, settings, source="the probe's proposal")
    config = from_tree(tree, source="the probe's proposal")
    lines = ["# Proposed by `opd probe`. What it changes, the most urgent first:"]
    lines += [f"#   {_one_line(str(change))}" for change in changes] or ["#   nothing"]
    lines += ["#", "# The survey's design template (arXiv:2606.22793, Box 1), filled in:"]
    lines += [f"#   {name}: {_one_line(text)}" for name, text in box.items()]
    head = "\n".join(lines)
    paths = f"[paths]\nbase_folder = {json.dumps(str(run.base))}\n"
    return f"{head}\n\n{to_toml(config)}\n# relative paths above start here\n{paths}"


def _one_line(text: str) -> str:
    return " ".join(text.split())

"""What a run computes, in words and formulas, before anything loads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from opd import catalog
from opd.catalog import Entry
from opd.methods.variables import bound_in_words, knob_in_words, nine_variables
from opd.objective import Method, Objective
from opd.training.config import Run
from opd.training.plan import Pass, Plan
from opd.training.session import Phase, build_method, make_phases
from opd.types import Bound

EVIDENCE = {
    "E0": "paper or report",
    "E1": "framework documentation",
    "E2": "official blog",
    "E3": "hypothesis of the survey",
    "M": "measured in this repository",
}


@dataclass(frozen=True)
class Formula:
    """One function of the objective.

    Attributes:
        term: label of its term.
        place: its slot: divergence, support, reward, credit, ...
        name: the function with its knobs.
        equation: from its docstring; its first line where there is no equation.
        source: from its docstring.
    """

    term: str
    place: str
    name: str
    equation: str
    source: str


@dataclass(frozen=True)
class Explanation:
    """What a run does.

    Attributes:
        method: the method's name, or `custom`.
        summary: one line.
        objective: the method's own equation; empty for a custom one.
        terms: per term its label, coefficient, reduction and rows.
        formulas: every function of every term.
        variables: the nine variables of the survey, by name.
        phases: names, steps and methods, in order.
        passes: visits of a model in one distillation step.
        mismatch: why the sampler is not the student that is compared, if it is not.
        needs: by view, what it must return.
        evidence, formula_source, source, stationary, settings, departures, failure: of the method.
        composition_hash: equal for equal compositions.
    """

    method: str
    summary: str
    objective: str
    terms: tuple[str, ...]
    formulas: tuple[Formula, ...]
    variables: Mapping[str, str]
    phases: tuple[str, ...]
    passes: tuple[Pass, ...]
    mismatch: tuple[str, ...]
    needs: Mapping[str, tuple[str, ...]]
    evidence: str
    formula_source: str
    source: str
    stationary: str
    settings: str
    departures: str
    failure: str
    composition_hash: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {"variables": dict(self.variables), "needs": dict(self.needs)}

    def sections(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Titles, and under each pairs of a name and a text; either of the two may be empty."""
        yield "Objective", [("", text) for text in (self.objective, *self.terms) if text]
        yield (
            "Formulas",
            [(formula.place, f"{formula.name}\n{formula.equation}") for formula in self.formulas],
        )
        yield "The nine variables", list(self.variables.items())
        yield "Phases", [("", phase) for phase in self.phases]
        yield (
            "Passes of a distillation step",
            [(part.name, _pass_in_words(part)) for part in self.passes],
        )
        yield (
            "The sampler is not the student that is compared",
            [("", reason) for reason in self.mismatch],
        )
        yield (
            "What each view must return",
            [(view, "\n".join(fields)) for view, fields in self.needs.items()],
        )
        yield (
            "Where it is from",
            [
                (name, text)
                for name, text in (
                    ("source", self.source),
                    ("evidence", _evidence_in_words(self.evidence)),
                    ("formula from", self.formula_source),
                    ("stationary at", self.stationary),
                    ("its settings", self.settings),
                    ("departures", self.departures),
                    ("known failure", self.failure),
                    ("composition", self.composition_hash),
                )
                if text
            ],
        )

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.summary}" if self.summary else self.method]
        for title, pairs in self.sections():
            if not pairs:
                continue
            width = max(len(name) for name, _ in pairs)
            lines += ["", title]
            for name, text in pairs:
                first, *more = text.splitlines()
                gap = "  " if width else ""
                lines.append(f"  {name:<{width}}{gap}{first}".rstrip())
                lines += [f"  {'':<{width}}{gap}{line}".rstrip() for line in more]
        return "\n".join(lines)


def explain(run: Run) -> Explanation:
    """Explain a run: its method, its formulas, and the passes a step makes.

    Raises:
        ConfigError: a method or composition that cannot work.
    """
    method = build_method(run)
    phases = make_phases(run.config, method)
    entry = catalog.methods().get(method.name)
    plan = phases[-1].plan
    return Explanation(
        method=method.name,
        summary=entry.summary if entry else "",
        objective=entry.equation if entry else "",
        terms=tuple(_terms(method.objective)),
        formulas=tuple(_formulas(method.objective)),
        variables=_variables(method, run),
        phases=tuple(_phase_in_words(phase) for phase in phases),
        passes=plan.passes,
        mismatch=plan.mismatch if method.states.student else (),
        needs=_needs(plan),
        evidence=entry.section("Evidence") if entry else "",
        formula_source=entry.section("Formula") if entry else "",
        source=entry.section("Source") if entry else "",
        stationary=entry.section("Stationary") if entry else "",
        settings=entry.section("Settings") if entry else "",
        departures=entry.section("Departures") if entry else "",
        failure=entry.section("Failure") if entry else "",
        composition_hash=method.composition_hash,
    )


def _variables(method: Method, run: Run) -> dict[str, str]:
    """The nine, with whom the teacher's view is routed to, and with what the optimizer step adds to
    the regulariser."""
    found = nine_variables(method)
    if route := run.config.teacher.route:
        names = ", ".join(run.config.teachers)
        found["feedback source"] += f"; 'teacher' is routed by {route!r} to one of {names}"
    if strength := run.config.train.anchor:
        words = f"anchor({strength:g}) to the weights at the start, in the optimizer step"
        so_far = found["regulariser"]
        found["regulariser"] = words if so_far == "none" else f"{so_far} + {words}"
    return found


def _terms(objective: Objective) -> Iterator[str]:
    for label, term in objective.labelled():
        rows = "all rows" if term.rows == "all" else f"rows by the {term.rows}"
        yield (
            f"{knob_in_words(term.coef)} x {label}: a {term.kind} term against "
            f"{term.against!r}, {term.reduction} over {rows}"
        )
    if objective.temperature != 1.0:
        yield f"all logits divided by {objective.temperature:g} before they are compared"


def _formulas(objective: Objective) -> Iterator[Formula]:
    for label, term in objective.parts():
        for place, bound in term.slots():
            entry = _entry(bound)
            yield Formula(
                term=label,
                place=place if len(objective.terms) == 1 else f"{label}: {place}",
                name=bound_in_words(bound),
                equation=entry.equation or entry.summary,
                source=entry.section("Source"),
            )


def _entry(bound: Bound) -> Entry:
    """The catalog's entry of a formula; for a user's own function one made from it."""
    module, _, name = bound.name.rpartition(".")
    known = catalog.formulas().get(f"{module.rpartition('.')[2]}.{name}")
    if known is not None and known.module == module:
        return known
    function: Callable[..., Any] = bound.function
    return Entry(name, module, (), (), inspect.getdoc(function) or "")


def _needs(plan: Plan) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for need in sorted(plan.needs):
        where = {
            "full": "on the whole vocabulary",
            "sampled": "of the sampled token",
            "own_top": "",
            "": "",
        }.get(need.support, f"on {need.support}")
        most = f", {need.k} entries" if need.k else ""
        found.setdefault(need.view, []).append(f"{need.field} {where}".strip() + most)
    return {view: tuple(fields) for view, fields in found.items()}


def _phase_in_words(phase: Phase) -> str:
    updates = f", {phase.updates_per_rollout} updates each" if phase.updates_per_rollout > 1 else ""
    return (
        f"{phase.name}: {phase.steps} steps of {phase.method.name}, {phase.prompts_per_step} "
        f"prompts each{updates}, learning rate {phase.optimizer.learning_rate:g}"
    )


def _pass_in_words(part: Pass) -> str:
    if part.kind == "generate":
        return f"{part.model} writes {part.why}"
    if part.kind == "no forward":
        return f"{part.model}: {part.why}, without a forward"
    times = "" if part.per_rollout == 1 else f", {part.per_rollout:g} times"
    return f"{part.model}: {part.kind}{times} ({part.why})"


def _evidence_in_words(level: str) -> str:
    return f"{level}, {EVIDENCE[level]}" if level in EVIDENCE else level

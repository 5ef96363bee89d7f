"""Objectives: sums of terms, each a composition of formulas.

What the formulas of a term need is read from their signatures (`opd.fields`), and from the needs
follow the passes of a step. Two phases evaluate a term. *Coupled* quantities, which depend on
other rows (returns, baselines over positions or groups, quantiles), are settled once per optimizer
step in the signal phase and detached; what is left is separable per row and is evaluated inside
the student's head, a chunk of rows at a time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from opd.fields import FIELDS, is_coupled, positional_names
from opd.formula import reward as rewards
from opd.formula import support as supports
from opd.schedule import Schedule
from opd.terms import (
    REDUCTIONS,
    TERMS,
    Dense,
    Regulariser,
    Routed,
    Sampled,
    Term,
    advantage_read,
    changed_name,
    counted_by,
    field_key,
    is_number,
    parts,
    sees_everything,
    source_label,
    term_key,
    top_size,
    weight_factor,
    weight_slots,
)
from opd.types import (
    ROW_KINDS,
    Batch,
    Bound,
    FieldKey,
    Need,
    Stat,
    StateSource,
    TeacherView,
    TokenBatch,
    pack_rows,
    unanswered,
    unpack_rows,
    with_parts,
)

__all__ = [
    "Dense",
    "Method",
    "Objective",
    "Regulariser",
    "Routed",
    "RowFields",
    "Sampled",
    "Term",
    "chosen_rows",
    "describe",
    "field_key",
    "token_field",
]

SETTLED = "coupled."
"""Prefix under which a row's look-up finds results of the signal phase."""


@runtime_checkable
class RowFields(Protocol):
    """Looks up a field for a chunk of rows; the student's own fields carry the gradient."""

    def __call__(self, key: FieldKey) -> Tensor: ...


ClosedForms = Callable[[Bound, str, float], Tensor | None]
"""From a divergence on the whole vocabulary, a view and its smoothing to the value per row, whose
gradient whoever gives it takes over; None: differentiate the formula."""


def no_closed_form(bound: Bound, view: str, smoothing: float) -> None:
    """Every divergence is differentiated."""


@dataclass(frozen=True, init=False)
class Objective:
    """A sum of terms.

    Attributes:
        terms: at least one.
        temperature: divides the logits of the student and of every view before they are
            compared; 1 compares the models as they are.
    """

    terms: tuple[Term, ...]
    temperature: float = 1.0

    def __init__(self, *terms: Term, temperature: float = 1.0) -> None:
        if not terms:
            raise ValueError("an objective needs at least one term")
        for term in terms:
            if not isinstance(term, tuple(TERMS.values())):
                raise TypeError(f"an objective is Objective(term, term, ...), got {term!r}")
        if not is_number(temperature) or temperature <= 0:
            raise ValueError(f"the objective's temperature must be > 0, got {temperature}")
        object.__setattr__(self, "terms", tuple(terms))
        object.__setattr__(self, "temperature", float(temperature))
        names = [label for label, _ in self.labelled()]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two terms are called {sorted(twice)[0]!r}; give each its own name")
        self._check_references()
        _ = self.critic_term  # raises where a critic cannot serve

    def labelled(self) -> Iterator[tuple[str, Term]]:
        """Terms with the labels that metrics and coupled quantities use."""
        for place, term in enumerate(self.terms):
            yield term.name or (term.kind if place == 0 else f"{term.kind}_{place + 1}"), term

    def parts(self) -> Iterator[tuple[str, Term]]:
        """Terms and the terms inside them, with their labels."""
        for label, term in self.labelled():
            yield from parts(label, term)

    @property
    def coupled(self) -> bool:
        """Whether a signal phase is needed."""
        return any(
            (term.preserve_mass and term.weights)
            or any(is_coupled(bound.function) for _, bound in term.slots())
            for _, term in self.parts()
        )

    @property
    def needs(self) -> frozenset[Need]:
        """Everything the formulas read, as (view, field, support, k), over all schedules."""
        found: set[Need] = set()
        for _, term in self.parts():
            for asked in _asked(term):
                found |= set(_need(term, *asked))
        if (taught := self.critic_term) is not None:  # what a critic learns from
            found.add(Need("student", "log_probs", "full"))
            found.add(Need(taught.against, "log_probs", "full"))
        return frozenset(found)

    def field_names(self) -> frozenset[str]:
        """Names of all fields that some slot asks for."""
        return frozenset(name for _, term in self.parts() for name, *_ in _asked(term))

    @property
    def is_off(self) -> bool:
        """Whether every coefficient is 0, as a schedule may begin: nothing is learned."""
        return all(term.coef == 0 for _, term in self.parts())

    @property
    def critic_term(self) -> Sampled | None:
        """The sampled term that reads the values of a learned critic; None: none does.

        Raises:
            ValueError: several do, against different views: one critic knows one of them; or one
                does with another reward than the critic learns.
        """
        found = [
            term
            for _, term in self.sampled()
            if any(_provider(name) == "critic" for name, *_ in _asked(term))
        ]
        for term in found:
            paid = Bound.of(term.reward).function
            known = (rewards.teacher_log_ratio, rewards.expected_log_ratio)
            outcomes = [Bound.of(slot) for slot in term.outcome]
            before = [slot for slot in outcomes if "reward" in positional_names(slot.function)]
            if paid not in known or before:
                raise ValueError(
                    "a critic learns what is left of the log-ratio, so a term that reads its "
                    "values takes reward teacher_log_ratio (or expected_log_ratio) and no outcome "
                    f"before credit; got {Bound.of(term.reward).short_name}"
                    + "".join(f" with {slot.short_name}" for slot in before)
                )
        views = sorted({term.against for term in found})
        if len(views) > 1:
            raise ValueError(
                f"terms against {' and '.join(map(repr, views))} read the values of a critic, and "
                "one critic learns the value of one view; keep one of them"
            )
        return found[0] if found else None

    def support_size(self, field_name: str) -> int:
        """The largest k with which `student_top_ids` or `teacher_top_ids` is read; 0: never."""
        return max(
            (
                _reach(top_size(field_name, bound) or 0)
                for _, term in self.parts()
                for _, bound in term.slots()
                if field_name in positional_names(bound.function)
            ),
            default=0,
        )

    def views(self) -> frozenset[str]:
        """Names of the views that some term reads."""
        return frozenset(need.view for need in self.needs if need.view not in ("", "student"))

    # -- update phase ------------------------------------------------------------------------

    def row_losses(
        self,
        look_up: RowFields,
        notes: dict[str, Tensor] | None = None,
        closed: ClosedForms = no_closed_form,
    ) -> dict[str, Float[Tensor, " n"]]:
        """Per term: coefficient times weights times loss, per row, before the reduction.

        Args:
            look_up: the fields of the rows.
            notes: receives per-row numbers for the metrics, by path-like name.
            closed: divergences whose gradient the caller knows without differentiating them.
        """
        rows = _UpdatePhase(self, look_up, {} if notes is None else notes, closed)
        return {label: term.row_loss(label, rows) for label, term in self.labelled()}

    # -- signal phase ------------------------------------------------------------------------

    def signal_keys(self) -> frozenset[FieldKey]:
        """The per-row fields the signal phase starts from."""
        keys: set[FieldKey] = set()
        for term, place, bound in self._signal_slots():
            keys |= {
                term_key(term, name, bound, place)
                for name in positional_names(bound.function)
                if name in FIELDS and _is_computed(name) and name != "student_top_ids"
            }
        return frozenset(keys)  # the batch holds the student's top ids, those of the rollout

    def reads_its_view(self, term: Term) -> bool:
        """Whether a term asks anything of the view that it is against."""
        needs = (need for asked in _asked(term) for need in _need(term, *asked))
        return any(need.view == term.against for need in needs)

    def check_reads_tokens_of(self, view: str) -> None:
        """Refuse terms that take a view for a distribution where it is a score of tokens.

        Raises:
            ValueError: names the term, the formula and what it asks for.
        """
        for label, term in self.parts():
            if term.against != view:
                continue
            if term.smoothing:
                raise ValueError(
                    f"{label!r} smooths the view {view!r}, which is not normalised and so is no "
                    "distribution; leave the smoothing out"
                )
            asked = (
                (place, bound, name)
                for place, bound in term.slots()
                for name in positional_names(bound.function)
                if name in FIELDS and FIELDS[name].side in ("view", "both")
            )
            for place, bound, name in asked:
                if name not in ("teacher_logp", "teacher_support_logp"):
                    raise ValueError(
                        f"{place} of {label!r}: {bound.name} asks for {name!r} of the view "
                        f"{view!r}, which is not normalised and so is no distribution; read "
                        "teacher_logp or teacher_support_logp, or normalise it"
                    )

    def signal(
        self, token: TokenBatch, values: Mapping[FieldKey, Tensor]
    ) -> dict[str, Float[Tensor, "B T"]]:
        """Settle every coupled quantity: advantages and coupled weights, `[B, T]`, detached.

        Args:
            token: the whole batch of the optimizer step.
            values: the fields of `signal_keys`, packed to N rows.
        """
        phase = _SignalPhase(self, token, values)
        for label, sampled in self.sampled():
            if sampled.advantage_is_coupled:
                phase.results[f"advantage.{label}"] = phase.advantage(label)
        for label, term in self.parts():
            if term.preserve_mass and term.weights:
                phase.results[f"weight.{label}"] = phase.weights_of_kept_mass(label, term)
                continue
            for place, bound in weight_slots(term):
                if is_coupled(bound.function):
                    factor = weight_factor(term, label, bound, phase)
                    phase.results[f"weight.{label}.{place}"] = factor
        return phase.results

    def sampled(self) -> Iterator[tuple[str, Sampled]]:
        """The sampled terms, those inside routes among them, with their labels."""
        for label, term in self.parts():
            if isinstance(term, Sampled):
                yield label, term

    def _signal_slots(self) -> Iterator[tuple[Term, str, Bound]]:
        """The functions that run in the signal phase, with their terms and places."""
        advantages = {label for label, term in self.sampled() if term.advantage_is_coupled}
        for label, term in self.parts():
            keeps_mass = term.preserve_mass and bool(term.weights)
            if keeps_mass and isinstance(term, Sampled):
                advantages.add(label)
            for place, bound in weight_slots(term):
                if not keeps_mass and not is_coupled(bound.function):
                    continue
                yield term, place, bound
                if (read := advantage_read(label, term, bound)) is not None:
                    advantages.add(self.sampled_label(read))
        for label, sampled in self.sampled():
            if label in advantages:
                for place, bound in sampled.advantage_slots():
                    yield sampled, place, bound

    def sampled_label(self, read: str) -> str:
        """The label of the sampled term that `of = read` means: its own, or its route's."""
        known = {label for label, _ in self.sampled()}
        return read if read in known else source_label(read)

    def _check_references(self) -> None:
        known = {label for label, _ in self.sampled()}
        for label, term in self.parts():
            for place, bound in term.slots():
                read = advantage_read(label, term, bound)
                in_weights = place.startswith(("weights", "gates"))
                if in_weights and read is not None and self.sampled_label(read) not in known:
                    raise ValueError(
                        f"{place} of {label!r}: {bound.name} reads the advantage of {read!r}, and "
                        f"no sampled term is called that; there are: "
                        f"{', '.join(sorted(known)) or 'none'}; name one with `of`"
                    )

    # -- reduction ---------------------------------------------------------------------------

    def reduction_factors(self, batch: Batch) -> dict[str, Float[Tensor, " N"]]:
        """Per term, the float64 factor each packed row's loss is multiplied with before the sum."""
        factors = {}
        for label, term in self.labelled():
            chosen = chosen_rows(batch.token, term.rows)
            scale = REDUCTIONS[term.reduction](chosen, count=batch.counts[term.rows])
            factors[label] = pack_rows(scale, batch.token.mask)
        return factors

    # -- schedules ---------------------------------------------------------------------------

    def at_ends(self) -> tuple[Objective, Objective]:
        """The objective with every schedule at its lowest value, and with every one at its highest.

        The same twice where nothing is scheduled.
        """

        def settled(end: int) -> Objective:
            def settle(path: str, value: Any) -> Any:
                return value.reachable()[end] if isinstance(value, Schedule) else value

            terms = (_settle_term(term, label, settle) for label, term in self.labelled())
            return Objective(*terms, temperature=self.temperature)

        return settled(0), settled(1)

    def at(self, step: int, stats: Mapping[str, Stat], state: Any) -> tuple[Objective, Any]:
        """The objective with every schedule replaced by its value at `step`, and their state."""
        old = dict(state or {})
        new: dict[str, Any] = {}

        def settle(path: str, value: Any) -> Any:
            if not isinstance(value, Schedule):
                return value
            number, new[path] = value.at(step, stats, old.get(path))
            return number

        terms = (_settle_term(term, label, settle) for label, term in self.labelled())
        return Objective(*terms, temperature=self.temperature), new


@dataclass(frozen=True)
class Method:
    """All nine variables of a published method, frozen.

    Attributes:
        objective: support, route, credit, weights and regularisers.
        states: who writes the responses.
        views: what fills the teacher slots; `teacher` also where the teacher only writes.
        name: the method's name; not part of its identity.
    """

    objective: Objective
    states: StateSource = field(default_factory=StateSource)
    views: tuple[TeacherView, ...] = field(default_factory=lambda: (TeacherView(),))
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        with_parts({*self.objective.views(), *(view.name for view in self.views)}, self.views)
        for name in (view.name for view in self.views if not view.normalised):
            self.objective.check_reads_tokens_of(name)

    def at(self, step: int, stats: Mapping[str, Stat], state: Any) -> tuple[Method, Any]:
        """The method as it stands at `step`, schedules settled, and the state to keep. Pure."""
        objective, kept = self.objective.at(step, stats, state)
        views = []
        for view in self.views:
            settled, own = view.at(step, stats, state or {})
            views.append(settled)
            kept |= own
        states, own = self.states.at(step, stats, state or {})
        settled_method = replace(self, objective=objective, states=states, views=tuple(views))
        return settled_method, kept | own

    @property
    def composition_hash(self) -> str:
        """Twelve hex digits that two methods share exactly when they are the same composition."""
        described = {
            "objective": describe(self.objective),
            "states": describe(self.states),
            "views": [describe(view) for view in self.views],
        }
        text = json.dumps(described, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe(value: Any) -> Any:
    """A composition as plain data: names for functions, mappings for records."""
    if isinstance(value, Bound):
        return {"use": value.name, **{key: describe(knob) for key, knob in value.knobs}}
    if isinstance(value, Objective):
        return {"terms": [describe(term) for term in value.terms], "temperature": value.temperature}
    if isinstance(value, tuple):
        return [describe(part) for part in value]
    if hasattr(value, "__dataclass_fields__"):
        # a field at its default is left out, so that a new one changes no old hash
        plain = {
            item.name: describe(getattr(value, item.name))
            for item in fields(value)
            if not _is_default(item, getattr(value, item.name))
        }
        plain.pop("name", None) if isinstance(value, tuple(TERMS.values())) else None
        return {"kind": getattr(value, "kind", type(value).__name__), **plain}
    if isinstance(value, float) and value.is_integer():
        return int(value)  # equal numbers look the same, however a run file spells them
    return value


# --------------------------------------------------------------------------------------------
# Fields of the token batch


def token_field(token: TokenBatch, name: str) -> Tensor:
    """A field the rollout already holds, `[B, T]` or `[B]`.

    Raises:
        KeyError: the batch does not hold it.
    """
    if name == "position":
        return torch.arange(token.tokens.shape[1], device=token.tokens.device).expand_as(
            token.tokens
        )
    if name.startswith("extra_"):
        return _per_token(token.extra[name.removeprefix("extra_")], token)
    value = getattr(token, name, None)
    if not isinstance(value, Tensor):
        raise KeyError(f"the batch holds no {name!r}")
    return value


def _per_token(column: Tensor, token: TokenBatch) -> Tensor:
    return column.unsqueeze(1).expand_as(token.tokens) if column.dim() == 1 else column


def chosen_rows(token: TokenBatch, rows: str) -> Tensor:
    """`[B, T]`: True where the mask is open and the token was chosen by one of `rows`."""
    return token.mask if rows == "all" else of_kind(token.provenance, rows) & token.mask


def of_kind(provenance: Tensor, rows: str) -> Tensor:
    """True where the token was chosen by one of `rows`."""
    chosen = torch.zeros_like(provenance, dtype=torch.bool)
    for kind in ROW_KINDS[rows]:
        chosen = chosen | (provenance == int(kind))
    return chosen


def _is_default(item: Field[Any], value: Any) -> bool:
    default = item.default
    if item.default_factory is not MISSING:
        default = item.default_factory()
    elif isinstance(value, Bound) and callable(default):
        default = Bound.of(default)
    return bool(default == value)


# --------------------------------------------------------------------------------------------
# The two phases


class _UpdatePhase:
    """Fields of a chunk of rows, settled results packed to them."""

    def __init__(
        self,
        objective: Objective,
        look_up: RowFields,
        notes: dict[str, Tensor],
        closed: ClosedForms,
    ) -> None:
        self.field = look_up
        self.closed = closed
        self._sampled = dict(objective.sampled())
        self._sampled_label = objective.sampled_label
        self._notes = notes
        self._advantages: dict[str, Tensor] = {}

    def settled(self, name: str) -> Tensor:
        return self.field(FieldKey(SETTLED + name))

    def chosen(self, term: Term) -> Tensor:
        provenance = self.field(FieldKey("provenance"))
        if term.rows == "all":
            return torch.ones_like(provenance, dtype=torch.bool)
        return of_kind(provenance, term.rows)

    def mask(self, term: Term) -> Tensor:
        raise KeyError("mask")  # who reads it is settled in the signal phase

    def note(self, name: str, value: Tensor) -> None:
        self._notes[name] = value.detach()

    def advantage(self, label: str) -> Tensor:
        label = self._sampled_label(label)
        if label not in self._advantages:
            self._advantages[label] = self._advantage(label, self._sampled[label])
        return self._advantages[label]

    def _advantage(self, label: str, term: Sampled) -> Tensor:
        if not term.advantage_is_coupled:
            return term.advantage(label, self)
        for _, bound in term.advantage_slots():
            if counted_by(bound):
                name = changed_name(label, bound)
                self.note(name, self.settled(name))
        return self.settled(f"advantage.{label}")


class _SignalPhase:
    """Fields of the whole step, `[B, T]`; what is settled gathers in `results`."""

    def __init__(
        self, objective: Objective, token: TokenBatch, values: Mapping[FieldKey, Tensor]
    ) -> None:
        self.results: dict[str, Tensor] = {}
        self._objective, self._token, self._values = objective, token, values
        self._sampled = dict(objective.sampled())
        self._sampled_label = objective.sampled_label
        self._advantages: dict[str, Tensor] = {}
        self.closed = no_closed_form  # nothing is differentiated here

    def field(self, key: FieldKey) -> Tensor:
        if key.name == "student_top_ids" and key.support is not None:
            ids = token_field(self._token, key.name)[:, : dict(key.support.knobs)["k"]]
            return unpack_rows(ids, self._token.mask)
        if key not in self._values:
            return token_field(self._token, key.name)
        value = unpack_rows(self._values[key], self._token.mask)
        missing = self._unanswered(key.view)
        return value if missing is None else value.masked_fill(missing, 0.0)

    def _unanswered(self, view: str) -> Tensor | None:
        """`[B, T]`: True where a view has no answer; None: nowhere."""
        missing = unanswered(self._token.views, view)
        return None if missing is None else unpack_rows(missing, self._token.mask)

    def settled(self, name: str) -> Tensor:
        return self.results[name]

    def chosen(self, term: Term) -> Tensor:
        return chosen_rows(self._token, term.rows) & self._answered(term)

    def mask(self, term: Term) -> Tensor:
        sequences = self.chosen(term).any(1, keepdim=True)
        return self._token.mask & sequences & self._answered(term)

    def _answered(self, term: Term) -> Tensor:
        """`[B, T]`: True where the view that a term reads has an answer."""
        missing = self._unanswered(term.against)
        if missing is None or not self._objective.reads_its_view(term):
            return torch.ones_like(self._token.mask)
        return ~missing

    def note(self, name: str, value: Tensor) -> None:
        self.results[name] = value.expand(self._token.mask.shape)

    def advantage(self, label: str) -> Tensor:
        label = self._sampled_label(label)
        if label not in self._advantages:
            self._advantages[label] = self._sampled[label].advantage(label, self)
        return self._advantages[label]

    def weights_of_kept_mass(self, label: str, term: Term) -> Float[Tensor, "B T"]:
        """The product of the weights, scaled to keep the step's sum of what they multiply.

            w' = w * sum(m) / sum(w * m),  m = |advantage| of a sampled term, 1 of another

        All zero where the weights leave nothing. An infinite advantage is in neither sum.
        """
        chosen = self.chosen(term)
        weight = chosen.double()
        for _, bound in weight_slots(term):
            weight = torch.where(chosen, weight * weight_factor(term, label, bound, self), 0.0)
        mass = torch.ones_like(weight)
        if isinstance(term, Sampled):
            size = self.advantage(label).abs()
            mass = torch.where(size.isfinite(), size, 0.0)
        before, after = (mass * chosen).sum(), (mass * weight).sum()
        scale = torch.where(after > 0, before / after, 0.0)
        return torch.where(weight == 0, 0.0, weight * scale)


# --------------------------------------------------------------------------------------------
# What a term's functions ask for


def _asked(term: Term) -> Iterator[tuple[str, Bound, bool]]:
    """Fields, their readers, and whether they read the whole vocabulary whatever the support.

    Formulas on a support are unfolded into what they read.
    """
    for place, bound in term.slots():
        for name in positional_names(bound.function):
            whole = sees_everything(place, name)
            yield name, bound, whole
            if "." in _provider(name):
                if FIELDS[name].side in ("student", "both"):
                    yield "student_log_probs", bound, whole
                if FIELDS[name].side in ("view", "both"):
                    yield "teacher_log_probs", bound, whole


def _provider(name: str) -> str:
    return FIELDS[name].provider if name in FIELDS else "rollout"


def _is_computed(name: str) -> bool:
    """Whether a field is computed from the student's or a view's scores, not held by the rollout"""
    return FIELDS[name].side != "none" or FIELDS[name].provider == "support"


def _need(term: Term, name: str, reader: Bound, whole: bool) -> Iterator[Need]:
    entry = FIELDS.get(name)
    if entry is None or entry.side == "none":
        return
    support = Bound.of(supports.full if whole else term.support)
    where = {
        "none": "",
        "sampled": "sampled",
        "support": support.short_name,
        "top": "own_top",
    }[entry.scope]
    size = 0
    if entry.scope == "support":
        size = sum(
            _reach(k) for knob, k in support.knobs if knob in ("k", "teacher_k", "student_k")
        )
    elif entry.scope == "top":
        size = _reach(top_size(name, reader) or 0)
    plain = {
        "student_logp": "logp",
        "teacher_logp": "logp",
        "student_top_ids": "top_ids",
        "teacher_top_ids": "top_ids",
    }.get(name, name)
    if entry.scope == "support" and "." not in entry.provider:
        plain = "log_probs"  # tails and raw entries are read off the same distribution
    if entry.side in ("student", "both"):
        yield Need("student", plain, where, size)
    if entry.side in ("view", "both"):
        yield Need(term.against, plain, where, size)


# --------------------------------------------------------------------------------------------
# Schedules


def _reach(knob: Any) -> int:
    return round(knob.reachable()[1]) if isinstance(knob, Schedule) else int(knob)


def _settle_term(term: Term, label: str, settle: Callable[[str, Any], Any]) -> Term:
    """The term with every schedule replaced by its value of the step."""
    changed: dict[str, Any] = {}
    for item in fields(term):
        value, path = getattr(term, item.name), f"{label}.{item.name}"
        if isinstance(value, Sampled):
            changed[item.name] = _settle_term(value, path, settle)
        elif isinstance(value, Bound):
            changed[item.name] = _settle_bound(value, path, settle)
        elif isinstance(value, tuple):
            changed[item.name] = tuple(
                _settle_bound(bound, f"{path}.{place}", settle) for place, bound in enumerate(value)
            )
        elif isinstance(value, Schedule):
            changed[item.name] = settle(path, value)
    return replace(term, **changed)


def _settle_bound(bound: Bound, path: str, settle: Callable[[str, Any], Any]) -> Bound:
    """The bound with its schedules settled, rounded where the knob is a whole number."""
    settled: dict[str, Any] = {}
    for key, knob in bound.knobs:
        value = settle(f"{path}.{key}", knob)
        whole = isinstance(knob, Schedule) and _takes_int(bound.function, key)
        settled[key] = round(value) if whole else value
    return bound.with_knobs(**settled) if settled else bound


def _takes_int(function: Callable[..., Any], knob: str) -> bool:
    return inspect.signature(function).parameters[knob].annotation in (int, "int")

"""Objectives: sums of terms, each a composition of formulas.

A term says what it compares, against whom, on which rows, and how it is averaged. What its formulas
need is read from their signatures (`opd.fields`), and from the needs follow the passes of a step.
Two phases evaluate a term. *Coupled* quantities, which depend on other rows (returns, baselines
over positions or groups), are settled once per optimizer step in the signal phase and detached;
what is left is separable per row and is evaluated inside the student's head, a chunk of rows at a
time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from opd.errors import ConfigError, OpdError, is_out_of_memory
from opd.fields import FIELDS, is_coupled, positional_names
from opd.formula import credit as credits
from opd.formula import reduce
from opd.formula import support as supports
from opd.formula import surrogate as surrogates
from opd.schedule import Schedule
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
    unpack_rows,
)

Slot = Callable[..., Any]

REDUCTIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "token_mean": reduce.token_mean,
        "sequence_mean": reduce.sequence_mean,
        "sequence_sum": reduce.sequence_sum,
    }
)


@runtime_checkable
class RowFields(Protocol):
    """Looks up a field for a chunk of rows; the student's own fields carry the gradient."""

    def __call__(self, key: FieldKey) -> Tensor: ...


@dataclass(frozen=True)
class Dense:
    """Differentiates a divergence over a support.

    Attributes:
        divergence: of `student_log_probs` and `teacher_log_probs`.
        support: which entries are compared.
        tail: `bucket` or `renormalise`; required unless the support is full.
        weights: factors per row, multiplied, detached.
        coef: the scalar in front.
        against: whose distribution fills the teacher slot.
        rows: which rows, by who chose their token: student, data, teacher or all.
        reduction: `token_mean`, `sequence_mean` or `sequence_sum`.
        name: label in metrics; made from the kind and the place if empty.
    """

    divergence: Slot
    support: Slot = supports.full
    tail: str = ""
    weights: tuple[Slot, ...] = ()
    coef: float | Schedule = 1.0
    against: str = "teacher"
    rows: str = "all"
    reduction: str = "token_mean"
    name: str = ""
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        _normalise(self, "divergence", "support")
        _check_term(self)
        _check_tail(self)

    def row_loss(self, label: str, look_up: RowFields) -> Float[Tensor, " n"]:
        """One unreduced, weighted loss per row."""
        value: Tensor = _call(self.divergence, lambda name: look_up(self.key(name)))
        return _weighted(value, self, label, look_up)

    def slots(self) -> Iterator[tuple[str, Bound]]:
        """Every function of the term with the name of its place."""
        yield "divergence", Bound.of(self.divergence)
        yield "support", Bound.of(self.support)
        yield from _weight_slots(self)

    def key(self, name: str) -> FieldKey:
        """The field `name` as this term sees it."""
        return _key(self, name)


@dataclass(frozen=True)
class Sampled:
    """Turns a reward of the sampled token into an advantage and scores the token with it.

        advantage = credit(reward) - baseline,   loss = surrogate(student_logp, advantage)

    Attributes:
        reward: per token, detached.
        credit: which rewards a token answers for.
        baseline: subtracted after credit; None for none.
        surrogate: the loss of the token's log-probability.
        support: where a baseline over the vocabulary is evaluated.
        tail: `bucket` or `renormalise`, for that support; required unless it is full.
        weights, coef, against, rows, reduction, name: as in `Dense`.
    """

    reward: Slot
    credit: Slot = credits.immediate
    baseline: Slot | None = None
    surrogate: Slot = surrogates.score
    support: Slot = supports.full
    tail: str = ""
    weights: tuple[Slot, ...] = ()
    coef: float | Schedule = 1.0
    against: str = "teacher"
    rows: str = "all"
    reduction: str = "token_mean"
    name: str = ""
    kind: ClassVar[str] = "sampled"

    def __post_init__(self) -> None:
        _normalise(self, "reward", "credit", "baseline", "surrogate", "support")
        _check_term(self)
        _check_tail(self)

    @property
    def advantage_is_coupled(self) -> bool:
        """Whether the advantage depends on more than its own row."""
        parts = (self.reward, self.credit, self.baseline)
        return any(is_coupled(Bound.of(part).function) for part in parts if part is not None)

    def row_loss(self, label: str, look_up: RowFields) -> Float[Tensor, " n"]:
        """One unreduced, weighted loss per row."""
        if self.advantage_is_coupled:
            advantage = look_up(FieldKey(f"coupled.advantage.{label}"))
        else:
            advantage = self.advantage(lambda name: look_up(self.key(name)))
        value = _call(
            self.surrogate,
            lambda name: advantage if name == "advantage" else look_up(self.key(name)),
        )
        return _weighted(value, self, label, look_up)

    def advantage(self, look_up: Callable[[str], Tensor]) -> Tensor:
        """Reward, then credit, then minus the baseline; the shape is that of the fields."""
        reward: Tensor = _call(self.reward, look_up)

        def with_reward(name: str) -> Tensor:
            return reward if name == "reward" else look_up(name)

        credited: Tensor = _call(self.credit, with_reward)
        if self.baseline is None:
            return credited.detach()
        subtracted: Tensor = _call(self.baseline, with_reward)
        return (credited - subtracted).detach()

    def slots(self) -> Iterator[tuple[str, Bound]]:
        """Every function of the term with the name of its place."""
        yield "reward", Bound.of(self.reward)
        yield "credit", Bound.of(self.credit)
        if self.baseline is not None:
            yield "baseline", Bound.of(self.baseline)
        yield "surrogate", Bound.of(self.surrogate)
        yield "support", Bound.of(self.support)
        yield from _weight_slots(self)

    def key(self, name: str) -> FieldKey:
        """The field `name` as this term sees it."""
        return _key(self, name)


Term = Dense | Sampled


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
        if not _is_number(temperature) or temperature <= 0:
            raise ValueError(f"the objective's temperature must be > 0, got {temperature}")
        object.__setattr__(self, "terms", tuple(terms))
        object.__setattr__(self, "temperature", float(temperature))
        names = [label for label, _ in self.labelled()]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two terms are called {sorted(twice)[0]!r}; give each its own name")

    def labelled(self) -> Iterator[tuple[str, Term]]:
        """Terms with the labels that metrics and coupled quantities use."""
        for place, term in enumerate(self.terms):
            yield term.name or (term.kind if place == 0 else f"{term.kind}_{place + 1}"), term

    @property
    def coupled(self) -> bool:
        """Whether a signal phase is needed."""
        return any(
            is_coupled(bound.function) for _, term in self.labelled() for _, bound in term.slots()
        )

    @property
    def needs(self) -> frozenset[Need]:
        """Everything the formulas read, as (view, field, support, k), over all schedules."""
        found: set[Need] = set()
        for _, term in self.labelled():
            for name, support in _asked(term):
                found |= set(_need(term, name, support))
        return frozenset(found)

    def field_names(self) -> frozenset[str]:
        """Names of all fields that some slot asks for."""
        return frozenset(name for _, term in self.labelled() for name, _ in _asked(term))

    def support_size(self, field_name: str) -> int:
        """The largest k with which `student_top_ids` or `teacher_top_ids` is read; 0: never."""
        return max(
            (
                _reach(dict(bound.knobs)["k"])
                for _, term in self.labelled()
                for _, bound in term.slots()
                if field_name in positional_names(bound.function) and "k" in dict(bound.knobs)
            ),
            default=0,
        )

    def views(self) -> frozenset[str]:
        """Names of the views that some term reads."""
        return frozenset(need.view for need in self.needs if need.view not in ("", "student"))

    # -- update phase ------------------------------------------------------------------------

    def row_losses(self, look_up: RowFields) -> dict[str, Float[Tensor, " n"]]:
        """Per term: coefficient times weights times loss, per row, before the reduction."""
        return {label: term.row_loss(label, look_up) for label, term in self.labelled()}

    # -- signal phase ------------------------------------------------------------------------

    def signal_keys(self) -> frozenset[FieldKey]:
        """The per-row fields the signal phase starts from."""
        keys: set[FieldKey] = set()
        for _, term in self.labelled():
            for place, bound in term.slots():
                if not _runs_in_signal_phase(term, place, bound):
                    continue
                keys |= {
                    term.key(name)
                    for name in positional_names(bound.function)
                    if name in FIELDS and FIELDS[name].side != "none"
                }
        return frozenset(keys)

    def signal(
        self, token: TokenBatch, values: Mapping[FieldKey, Tensor]
    ) -> dict[str, Float[Tensor, "B T"]]:
        """Settle every coupled quantity: advantages and coupled weights, `[B, T]`, detached.

        Args:
            token: the whole batch of the optimizer step.
            values: the fields of `signal_keys`, packed to N rows.
        """
        settled: dict[str, Tensor] = {}
        for label, term in self.labelled():

            def look_up(name: str, term: Term = term) -> Tensor:
                key = term.key(name)
                if key in values:
                    return unpack_rows(values[key], token.mask)
                return token_field(token, name)

            if isinstance(term, Sampled) and term.advantage_is_coupled:
                settled[f"advantage.{label}"] = term.advantage(look_up)
            for place, bound in _weight_slots(term):
                if is_coupled(bound.function):
                    settled[f"weight.{label}.{place}"] = _call(bound, look_up).detach()
        return settled

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

    def at(self, step: int, stats: Mapping[str, Stat], state: Any) -> tuple[Objective, Any]:
        """The objective with every schedule replaced by its value at `step`, and their state."""
        old = dict(state or {})
        new: dict[str, Any] = {}

        def settle(path: str, value: Any) -> Any:
            if not isinstance(value, Schedule):
                return value
            number, new[path] = value.at(step, stats, old.get(path))
            return number

        terms = []
        for label, term in self.labelled():
            changed: dict[str, Any] = {"coef": settle(f"{label}.coef", term.coef)}
            for item in fields(term):
                value = getattr(term, item.name)
                if isinstance(value, Bound):
                    changed[item.name] = _settle_bound(value, f"{label}.{item.name}", settle)
            changed["weights"] = tuple(
                _settle_bound(Bound.of(weight), f"{label}.weights.{place}", settle)
                for place, weight in enumerate(term.weights)
            )
            terms.append(replace(term, **changed))
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
        known = {view.name for view in self.views}
        missing = self.objective.views() - known
        if missing:
            raise ValueError(
                f"the objective reads the view {sorted(missing)[0]!r}, which the method does not "
                f"declare; declared: {', '.join(sorted(known)) or 'none'}"
            )

    def at(self, step: int, stats: Mapping[str, Stat], state: Any) -> tuple[Method, Any]:
        """The method as it stands at `step`, schedules settled, and the state to keep. Pure."""
        objective, kept = self.objective.at(step, stats, state)
        return replace(self, objective=objective), kept

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
        plain = {item.name: describe(getattr(value, item.name)) for item in fields(value)}
        plain.pop("name", None) if isinstance(value, Dense | Sampled) else None
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
    kinds = ROW_KINDS[rows]
    if rows == "all":
        return token.mask
    chosen = torch.zeros_like(token.mask)
    for kind in kinds:
        chosen = chosen | (token.provenance == int(kind))
    return chosen & token.mask


# --------------------------------------------------------------------------------------------
# What a term's functions ask for


def _asked(term: Term) -> Iterator[tuple[str, Bound]]:
    """(field, support) pairs, with formulas on a support unfolded into what they read."""
    support = Bound.of(term.support)
    for _, bound in term.slots():
        for name in positional_names(bound.function):
            yield name, support
            provider = FIELDS[name].provider if name in FIELDS else "rollout"
            if "." in provider:
                if FIELDS[name].side in ("student", "both"):
                    yield "student_log_probs", support
                if FIELDS[name].side in ("view", "both"):
                    yield "teacher_log_probs", support


def _need(term: Term, name: str, support: Bound) -> Iterator[Need]:
    entry = FIELDS.get(name)
    if entry is None or entry.side == "none":
        return
    k = _reach(dict(support.knobs).get("k", 0))
    where = {"sampled": "sampled", "support": support.short_name, "top": "own_top"}[entry.scope]
    size = k if entry.scope in ("support", "top") else 0
    plain = {
        "student_logp": "logp",
        "teacher_logp": "logp",
        "student_log_probs": "log_probs",
        "teacher_log_probs": "log_probs",
        "student_top_ids": "top_ids",
        "teacher_top_ids": "top_ids",
    }.get(name, name)
    if entry.side in ("student", "both"):
        yield Need("student", plain, where, size)
    if entry.side in ("view", "both"):
        yield Need(term.against, plain, where, size)


def field_key(name: str, against: str, support: Bound | None = None, tail: str = "") -> FieldKey:
    """The key of a field for a term against a view; equal keys hold equal values.

    The whole vocabulary is written as no support; a field that no view can change has no view.
    """
    entry = FIELDS.get(name)
    if entry is None or entry.side == "none":
        return FieldKey(name)
    whole = support is None or support.function is supports.full
    if entry.scope != "support" or whole:
        return FieldKey(name, against if entry.side in ("view", "both") else "")
    return FieldKey(name, against, support, tail)


def _key(term: Term, name: str) -> FieldKey:
    return field_key(name, term.against, Bound.of(term.support), term.tail)


def _runs_in_signal_phase(term: Term, place: str, bound: Bound) -> bool:
    if place.startswith("weights."):
        return is_coupled(bound.function)
    advantage = place in ("reward", "credit", "baseline")
    return advantage and isinstance(term, Sampled) and term.advantage_is_coupled


def _weight_slots(term: Term) -> Iterator[tuple[str, Bound]]:
    for place, weight in enumerate(term.weights):
        yield f"weights.{place}", Bound.of(weight)


def _weighted(value: Tensor, term: Term, label: str, look_up: RowFields) -> Tensor:
    """Multiply a row's loss with the term's weights and coefficient; closed gates stop NaNs."""
    for place, bound in _weight_slots(term):
        if is_coupled(bound.function):
            factor = look_up(FieldKey(f"coupled.weight.{label}.{place}"))
        else:
            factor = _call(bound, lambda name: look_up(term.key(name))).detach()
        if factor.dim() and factor.shape != value.shape:
            raise ConfigError(
                f"weights: {bound.name} returned the shape {list(factor.shape)} for "
                f"{list(value.shape)} tokens; return one number per token"
            )
        value = torch.where(factor == 0, 0.0, value * factor)
    if isinstance(term.coef, Schedule):
        raise TypeError(f"the coef of {label!r} is a schedule; settle it with Method.at(step, ...)")
    return value * term.coef if term.coef != 1.0 else value


def _call(slot: Slot, look_up: Callable[[str], Tensor]) -> Tensor:
    """The formula's answer; whatever goes wrong inside it is told as the formula's fault."""
    bound = Bound.of(slot)
    arguments = [look_up(name) for name in positional_names(bound.function)]
    try:
        result = bound(*arguments)
    except Exception as error:  # a user's function may raise anything
        if isinstance(error, OpdError) or is_out_of_memory(error):
            raise
        raise ConfigError(f"{_shown(bound)} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, Tensor):
        raise ConfigError(
            f"{_shown(bound)} returned {result!r}; it must return a tensor, one number per token"
        )
    return result


def _shown(bound: Bound) -> str:
    knobs = ", ".join(f"{key}={value!r}" for key, value in bound.knobs)
    return f"the formula {bound.name}" + (f" with {knobs}" if knobs else "")


# --------------------------------------------------------------------------------------------
# Checks and schedules


def _normalise(term: Term, *places: str) -> None:
    for place in places:
        value = getattr(term, place)
        if value is not None:
            object.__setattr__(term, place, Bound.of(value))
    object.__setattr__(term, "weights", tuple(Bound.of(weight) for weight in term.weights))
    for place, bound in term.slots():
        _check_slot(place, bound)


# What a slot may read besides the fields of its row, and which slots may read other rows.
_OF_THE_TERM: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "credit": frozenset({"reward"}),
        "baseline": frozenset({"reward"}),
        "surrogate": frozenset({"advantage"}),
    }
)
_ROW_BY_ROW = ("divergence", "support", "surrogate")


def _check_slot(place: str, bound: Bound) -> None:
    for name in positional_names(bound.function):
        entry = FIELDS.get(name)
        if entry is None:
            continue
        if entry.provider == "term" and name not in _OF_THE_TERM.get(place, ()):
            raise ValueError(f"{place}: {bound.name} asks for {name!r}, which is not known there")
        if entry.coupled and place in _ROW_BY_ROW:
            raise ValueError(
                f"{place}: {bound.name} asks for {name!r} and so reads other rows; a {place} sees "
                "one row at a time"
            )


def _check_term(term: Term) -> None:
    if term.rows not in ROW_KINDS:
        raise ValueError(f"rows must be one of {', '.join(ROW_KINDS)}, got {term.rows!r}")
    if term.reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(REDUCTIONS)}, got {term.reduction!r}"
        )
    if term.against not in ("teacher", "reference") and not term.against.startswith("teacher."):
        raise ValueError(
            f"against must be 'teacher', 'reference' or 'teacher.NAME', got {term.against!r}"
        )
    if not isinstance(term.coef, Schedule) and not _is_number(term.coef):
        raise ValueError(f"coef must be a finite number or a schedule, got {term.coef!r}")
    if not isinstance(term.name, str):
        raise ValueError(f"name must be a text, got {term.name!r}")
    k = dict(Bound.of(term.support).knobs).get("k", 1)
    if not isinstance(k, Schedule) and not (isinstance(k, int) and k >= 1):
        raise ValueError(f"a support's k must be a whole number >= 1, got {k!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _check_tail(term: Term) -> None:
    whole = Bound.of(term.support).function is supports.full
    if whole and term.tail:
        raise ValueError(f"a full support has no tail, got tail={term.tail!r}")
    if not whole and term.tail not in supports.TAILS:
        raise ValueError(
            f"a support of some entries must say what becomes of the rest: tail is one of "
            f"{', '.join(supports.TAILS)}, got {term.tail!r}"
        )


def _reach(knob: Any) -> int:
    return round(knob.reachable()[1]) if isinstance(knob, Schedule) else int(knob)


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

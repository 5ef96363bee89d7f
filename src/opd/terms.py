"""The four kinds of term: differentiate, score, route, regularise.

A term names a function for each of its slots and says against whom, on which rows and how it is
averaged. It is evaluated through an `Evaluation`, which knows the phase: in the signal phase
fields are `[B, T]` and whatever depends on other rows is settled; in the update phase they are
the rows of one chunk and everything is separable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from opd.errors import ConfigError, OpdError, is_out_of_memory
from opd.fields import FIELDS, is_coupled, positional_names
from opd.formula import credit as credits
from opd.formula import divergence as divergences
from opd.formula import reduce
from opd.formula import routing as routings
from opd.formula import support as supports
from opd.formula import surrogate as surrogates
from opd.schedule import Schedule
from opd.types import ROW_KINDS, Bound, FieldKey

Slot = Callable[..., Any]

REDUCTIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "token_mean": reduce.token_mean,
        "sequence_mean": reduce.sequence_mean,
        "sequence_sum": reduce.sequence_sum,
    }
)

MODES: Mapping[str, float | None] = MappingProxyType(
    {"add": 0.0, "replace": 1.0, "interpolate": None}
)
"""Which share of the source a route takes the place of; None: the term's `interpolation`."""

REWARD = "reward/"
"""How a sampled term's reward is called among what is known of a row."""


@runtime_checkable
class Evaluation(Protocol):
    """What a term reads in one phase."""

    def field(self, key: FieldKey) -> Tensor:
        """A field of `FIELDS`."""
        ...

    def settled(self, name: str) -> Tensor:
        """A result of the signal phase."""
        ...

    def advantage(self, label: str) -> Tensor:
        """The advantage of a sampled term, detached."""
        ...

    def chosen(self, term: Term) -> Tensor:
        """Rows that the term looks at, True or False."""
        ...

    def mask(self, term: Term) -> Tensor:
        """The mask of the sequences that hold such rows, for formulas that walk along them."""
        ...

    def closed(self, bound: Bound, view: str, smoothing: float) -> Tensor | None:
        """A divergence on the whole vocabulary whose gradient is taken care of; None: it is not."""
        ...

    def note(self, name: str, value: Tensor) -> None:
        """Keep a per-row number for the records and, a reward apart, for the metrics; NaN on rows
        that it does not concern."""
        ...


@dataclass(frozen=True)
class Dense:
    """Differentiates a divergence over a support.

    Attributes:
        divergence: of `student_log_probs` and `teacher_log_probs`.
        support: which entries are compared.
        tail: one of `support.TAILS`; required unless the support is full.
        smoothing: share of the view's mass that is spread evenly over the vocabulary, so that no
            entry is without any.
        weights: factors per row, multiplied, detached.
        preserve_mass: divide the weights by their mean over the step.
        coef: the scalar in front.
        against: whose distribution fills the teacher slot.
        rows: which rows, by who chose their token: student, data, teacher or all.
        reduction: `token_mean`, `sequence_mean` or `sequence_sum`.
        accept_collapse: allow a reverse KL on raw entries with live gradients.
        name: label in metrics; made from the kind and the place if empty.
    """

    divergence: Slot
    support: Slot = supports.full
    tail: str = ""
    smoothing: float = 0.0
    weights: tuple[Slot, ...] = ()
    preserve_mass: bool = False
    coef: float | Schedule = 1.0
    against: str = "teacher"
    rows: str = "all"
    reduction: str = "token_mean"
    accept_collapse: bool = False
    name: str = ""
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        _check_term(self)
        _check_tail(self)
        _check_divergence(self)

    def row_loss(self, label: str, evaluation: Evaluation) -> Float[Tensor, " n"]:
        """One unreduced, weighted loss per row."""
        value, bound = None, Bound.of(self.divergence)
        if Bound.of(self.support).function is supports.full:
            value = evaluation.closed(bound, self.against, self.smoothing)
        if value is None:
            value = _per_row(bound, _call(self, bound, evaluation, label), evaluation)
        return _scaled(self, label, value, _factor(self, label, evaluation))

    def slots(self) -> Iterator[tuple[str, Bound]]:
        """Every function of the term with the name of its place."""
        yield from _slots(self, "divergence", "support", "weights")


@dataclass(frozen=True)
class Regulariser:
    """Adds a penalty on the student's own distribution.

    Attributes:
        penalty: a loss per row that carries the gradient.
        support, tail, smoothing, weights, preserve_mass, coef, against, rows, reduction, name: as
            in `Dense`.
    """

    penalty: Slot
    support: Slot = supports.full
    tail: str = ""
    smoothing: float = 0.0
    weights: tuple[Slot, ...] = ()
    preserve_mass: bool = False
    coef: float | Schedule = 1.0
    against: str = "teacher"
    rows: str = "all"
    reduction: str = "token_mean"
    name: str = ""
    kind: ClassVar[str] = "regulariser"

    def __post_init__(self) -> None:
        _check_term(self)
        _check_tail(self)

    def row_loss(self, label: str, evaluation: Evaluation) -> Float[Tensor, " n"]:
        """One unreduced, weighted loss per row."""
        bound = Bound.of(self.penalty)
        value = _per_row(bound, _call(self, bound, evaluation, label), evaluation)
        return _scaled(self, label, value, _factor(self, label, evaluation))

    def slots(self) -> Iterator[tuple[str, Bound]]:
        """Every function of the term with the name of its place."""
        yield from _slots(self, "penalty", "support", "weights")


@dataclass(frozen=True)
class Sampled:
    """Turns a reward of the sampled token into an advantage and scores the token with it.

        advantage = after(credit(before(reward))) - baseline
        loss = surrogate(student_logp, advantage)

    `before` and `after` are the outcome functions: one that takes `reward` joins before credit,
    one that takes `credited` joins after it.

    Attributes:
        reward: per token, detached.
        credit: which rewards a token answers for.
        outcome: functions that join a verifier's judgement, in order.
        baseline: subtracted last; None for none.
        surrogate: the loss of the token's log-probability.
        support: where a baseline over the vocabulary is evaluated.
        tail: one of `support.TAILS`, for that support; required unless it is full.
        preserve_mass: scale the weights so that they keep the step's sum of |advantage|.
        smoothing, weights, coef, against, rows, reduction, name: as in `Dense`.
    """

    reward: Slot
    credit: Slot = credits.immediate
    outcome: tuple[Slot, ...] = ()
    baseline: Slot | None = None
    surrogate: Slot = surrogates.score
    support: Slot = supports.full
    tail: str = ""
    smoothing: float = 0.0
    weights: tuple[Slot, ...] = ()
    preserve_mass: bool = False
    coef: float | Schedule = 1.0
    against: str = "teacher"
    rows: str = "all"
    reduction: str = "token_mean"
    name: str = ""
    kind: ClassVar[str] = "sampled"

    def __post_init__(self) -> None:
        _check_term(self)
        _check_tail(self)
        _check_sampled(self)
        for place, bound in _slots(self, "outcome"):
            takes = {"reward", "credited"} & set(positional_names(bound.function))
            if len(takes) != 1:
                raise ValueError(
                    f"{place}: {bound.name} must take either 'reward', to join before credit, or "
                    f"'credited', to join after it; it takes {' and '.join(takes) or 'neither'}"
                )

    def advantage_slots(self) -> Iterator[tuple[str, Bound]]:
        """The functions that make the advantage."""
        yield from _slots(self, "reward", "outcome", "credit", "baseline")

    @property
    def advantage_is_coupled(self) -> bool:
        """Whether the advantage depends on more than its own row."""
        return any(is_coupled(bound.function) for _, bound in self.advantage_slots())

    def row_loss(
        self, label: str, evaluation: Evaluation, replaced: Tensor | None = None
    ) -> Float[Tensor, " n"]:
        """One unreduced, weighted loss per row; 0 where something else takes its place."""
        advantage = evaluation.advantage(label)
        evaluation.note(f"advantage/{label}", advantage)
        factor = _factor(self, label, evaluation)
        looked_at = evaluation.chosen(self) & (factor != 0)
        if replaced is not None:
            looked_at = looked_at & ~replaced
        # an infinite advantage that nobody looks at would be NaN on the way back
        held = torch.where(looked_at, advantage, 0.0)
        bound = Bound.of(self.surrogate)
        value = _call(self, bound, evaluation, label, {"advantage": held})
        value = _per_row(bound, value, evaluation)
        return _scaled(self, label, value, torch.where(looked_at, factor, 0.0))

    def advantage(self, label: str, evaluation: Evaluation) -> Tensor:
        """Reward, outcome, credit, outcome, minus the baseline; shaped as the fields, detached."""

        def call(slot: Slot, **given: Tensor) -> Tensor:
            return _call(self, slot, evaluation, label, given)

        reward = call(self.reward)
        for joins_before in self._outcomes("reward"):
            reward = call(joins_before, reward=reward)
        evaluation.note(f"{REWARD}{label}", reward)
        credited = call(self.credit, reward=reward)
        for joins_after in self._outcomes("credited"):
            credited = call(joins_after, reward=reward, credited=credited)
        if self.baseline is None:
            return credited.detach()
        return (credited - call(self.baseline, reward=reward, credited=credited)).detach()

    def _outcomes(self, takes: str) -> Iterator[Bound]:
        for _, bound in _slots(self, "outcome"):
            if takes in positional_names(bound.function):
                yield bound

    def slots(self) -> Iterator[tuple[str, Bound]]:
        """Every function of the term with the name of its place."""
        yield from self.advantage_slots()
        yield from _slots(self, "surrogate", "support", "weights")


@dataclass(frozen=True)
class Routed:
    """Says where the mass of a suppressed token goes.

    Contains the sampled term it re-routes and reads that term's advantage. Where every gate is
    open the route joins the source or takes its place:

        loss = (1 - gate * zeta) * source + gate * coef * weights * transfer
        zeta = 0 (add), 1 (replace) or `interpolation` (interpolate)

    With the gates closed the loss is the source's, bit for bit. The rows, the reduction and the
    view are the source's.

    Attributes:
        source: the term whose suppression is re-routed.
        support: entries on which the score is normalised; candidates are among them.
        tail: one of `support.TAILS`; required unless the support is full.
        score: how much each entry deserves mass, `routing_score`.
        candidates: which entries may receive some.
        share: how it is divided among them, `routing`.
        amount: how much is moved.
        transfer: the loss that moves it.
        gates: 0 or 1 per row, each logged by name; all must be open.
        weights: factors of the route, detached.
        mode: `add`, `replace` or `interpolate`.
        interpolation: with `interpolate`, the share of the source that the route replaces.
        coef: the scalar in front of the route.
        name: label in metrics.
    """

    source: Sampled
    candidates: Slot
    support: Slot = supports.full
    tail: str = ""
    score: Slot = routings.centred_log_ratio
    share: Slot = routings.by_score
    amount: Slot = routings.excess_score
    transfer: Slot = routings.pairwise_logistic
    gates: tuple[Slot, ...] = ()
    weights: tuple[Slot, ...] = ()
    mode: str = "replace"
    interpolation: float | Schedule = 0.5
    coef: float | Schedule = 1.0
    name: str = ""
    kind: ClassVar[str] = "routed"
    preserve_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, Sampled):
            raise ValueError(f"the source of a route is a sampled term, got {self.source!r}")
        _check_term(self)
        _check_tail(self)
        if self.tail in ("truncate", "teacher_renormalise"):
            raise ValueError(
                f"a route compares both sides on its support, which tail={self.tail!r} does not: "
                "use tail='renormalise' or 'bucket'"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        share = self.interpolation
        if not isinstance(share, Schedule) and not (is_number(share) and 0 <= share <= 1):
            raise ValueError(f"interpolation must lie in [0, 1], got {share!r}")
        if self.mode != "interpolate" and share != type(self).interpolation:
            raise ValueError(
                f"interpolation = {share!r} does nothing with mode={self.mode!r}; use "
                "mode='interpolate'"
            )

    @property
    def against(self) -> str:
        """The source's view."""
        return self.source.against

    @property
    def rows(self) -> str:
        """The source's rows."""
        return self.source.rows

    @property
    def reduction(self) -> str:
        """The source's reduction."""
        return self.source.reduction

    @property
    def smoothing(self) -> float:
        """The source's smoothing of the view."""
        return self.source.smoothing

    def row_loss(self, label: str, evaluation: Evaluation) -> Float[Tensor, " n"]:
        """One unreduced loss per row: what is left of the source, and the route."""
        given = {"advantage": evaluation.advantage(source_label(label))}

        def call(slot: Slot) -> Tensor:
            return _call(self, slot, evaluation, label, given)

        for name, slot in (
            ("routing_score", self.score),
            ("candidates", self.candidates),
            ("routing", self.share),
            ("amount", self.amount),
        ):
            given[name] = call(slot)
        gate = self._gate(label, evaluation, given)
        zeta = MODES[self.mode]
        if zeta is None:
            zeta = _settled_number(self.interpolation, f"interpolation of {label!r}")
        replaced = gate * zeta
        source = self.source.row_loss(source_label(label), evaluation, replaced == 1)
        factor = gate * _factor(self, label, evaluation, **given)
        given["amount"] = torch.where(factor == 0, 0.0, given["amount"])
        route = _scaled(self, label, call(self.transfer), factor)
        return torch.where(replaced == 0, source, (1 - replaced) * source) + route

    def _gate(
        self, label: str, evaluation: Evaluation, given: Mapping[str, Tensor]
    ) -> Float[Tensor, " n"]:
        """1 where every gate is open and the term looks, 0 elsewhere; says how often."""
        advantage = given["advantage"]
        gate = torch.ones_like(advantage)
        for _, bound in _slots(self, "gates"):
            factor = weight_factor(self, label, bound, evaluation, **given)
            if not bool(((factor == 0) | (factor == 1)).all()):
                raise ConfigError(
                    f"gates: {bound.name} returned something else than 0 and 1, so it is no gate; "
                    "put it into the weights of the route"
                )
            evaluation.note(f"gate/{label}/{bound.short_name}", factor)
            gate = gate * factor
        evaluation.note(f"routed/{label}", gate)
        leak = _call(self, routings.leak, evaluation, label, given)
        evaluation.note(f"leak/{label}", torch.where(advantage < 0, leak, math.nan))
        return torch.where(evaluation.chosen(self), gate, 0.0)

    def slots(self) -> Iterator[tuple[str, Bound]]:
        """Every function of the route with the name of its place; the source has its own."""
        yield from _slots(
            self, "score", "candidates", "share", "amount", "transfer", "gates", "support"
        )
        yield from _slots(self, "weights")


Term = Dense | Sampled | Regulariser | Routed
TERMS: Mapping[str, type[Term]] = MappingProxyType(
    {term.kind: term for term in (Dense, Sampled, Routed, Regulariser)}
)


def source_label(label: str) -> str:
    """What the source of the route `label` is called."""
    return f"{label}.source"


def parts(label: str, term: Term) -> Iterator[tuple[str, Term]]:
    """A term and the terms inside it, with their labels."""
    yield label, term
    if isinstance(term, Routed):
        yield source_label(label), term.source


def weight_slots(term: Term) -> Iterator[tuple[str, Bound]]:
    """The weights of a term with the names of their places."""
    yield from _slots(term, "weights")


def advantage_read(label: str, term: Term, bound: Bound) -> str | None:
    """The label of the sampled term whose advantage a weight or gate reads; None: it reads none."""
    if "advantage" not in positional_names(bound.function):
        return None
    own = source_label(label) if isinstance(term, Routed) else label
    return dict(bound.knobs).get("of") or own


# --------------------------------------------------------------------------------------------
# Keys


def field_key(
    name: str,
    against: str,
    support: Bound | None = None,
    tail: str = "",
    smoothing: float = 0.0,
) -> FieldKey:
    """The key of a field for a term against a view; equal keys hold equal values.

    The whole vocabulary is written as no support; a field that no view can change has no view.
    """
    entry = FIELDS.get(name)
    if entry is None or (entry.side == "none" and entry.scope == "none"):
        return FieldKey(name)
    reads_view = entry.side in ("view", "both")
    smoothed = smoothing if reads_view and entry.scope != "top" else 0.0
    if entry.scope == "top":
        return FieldKey(name, against if reads_view else "", support)
    whole = support is None or support.function is supports.full
    if entry.scope != "support" or whole:
        return FieldKey(name, against if reads_view else "", smoothing=smoothed)
    return FieldKey(name, against, support, tail, smoothed)


ENTROPIES = frozenset({"student_entropy", "teacher_entropy"})


def sees_everything(place: str, name: str) -> bool:
    """Whether a function in a place reads a field of the whole vocabulary, whatever the support.

    How sure a model is does not depend on which tokens a term compares, so the entropies that a
    weight or a gate reads are of whole distributions. A penalty's is of what the term compares.
    """
    return name in ENTROPIES and place.startswith(("weights", "gates"))


def term_key(term: Term, name: str, reader: Bound | None = None, place: str = "") -> FieldKey:
    """The field `name` as the term's function `reader` sees it in its place."""
    if sees_everything(place, name):
        return field_key(name, term.against, smoothing=term.smoothing)
    if name in FIELDS and FIELDS[name].scope == "top":
        return field_key(name, term.against, top_k(name, reader))
    return field_key(name, term.against, Bound.of(term.support), term.tail, term.smoothing)


def top_k(name: str, reader: Bound | None) -> Bound | None:
    """The support of the k likeliest that a function which reads `name` means by its knob k."""
    k = top_size(name, reader) if reader else None
    if k is None:
        return None
    side = supports.student_top_k if name == "student_top_ids" else supports.teacher_top_k
    return Bound.of(side).with_knobs(k=k)


def top_size(name: str, reader: Bound) -> Any:
    """The knob that says how many of `name` a function reads: `k`, or `teacher_k` / `student_k`."""
    knobs = dict(reader.knobs)
    return knobs.get(name.replace("_top_ids", "_k"), knobs.get("k"))


# --------------------------------------------------------------------------------------------
# Evaluation


def _slots(term: Term, *places: str) -> Iterator[tuple[str, Bound]]:
    for place in places:
        value = getattr(term, place)
        if isinstance(value, tuple):
            for number, slot in enumerate(value):
                yield f"{place}.{number}", Bound.of(slot)
        elif value is not None:
            yield place, Bound.of(value)


def weight_factor(
    term: Term, label: str, bound: Bound, evaluation: Evaluation, **given: Tensor
) -> Tensor:
    """The factors of one weight or gate, detached."""
    if (read := advantage_read(label, term, bound)) is not None:
        given["advantage"] = evaluation.advantage(read)
    return _call(term, bound, evaluation, label, given, place="weights").detach()


def _call(
    term: Term,
    slot: Slot,
    evaluation: Evaluation,
    label: str,
    given: Mapping[str, Tensor] = MappingProxyType({}),
    place: str = "",
) -> Tensor:
    """The formula's answer; whatever goes wrong inside it is told as the formula's fault."""
    bound = Bound.of(slot)

    def read(name: str) -> Tensor:
        if name in given:
            return given[name]
        if name == "mask":
            return evaluation.mask(term)
        return evaluation.field(term_key(term, name, bound, place))

    arguments = [read(name) for name in positional_names(bound.function)]
    with _blamed(bound):
        result = bound(*arguments)
    if not isinstance(result, Tensor):
        raise ConfigError(
            f"{shown(bound)} returned {result!r}; it must return a tensor, one number per token"
        )
    if (hit := counted_by(bound)) is not None:
        changed = hit(*arguments, **dict(bound.knobs))
        evaluation.note(changed_name(label, bound), changed.to(torch.get_default_dtype()))
    return result


@contextmanager
def _blamed(bound: Bound) -> Iterator[None]:
    """Tells whatever a formula raises as its own fault."""
    try:
        yield
    except Exception as error:  # a user's function may raise anything
        if isinstance(error, OpdError) or is_out_of_memory(error):
            raise
        raise ConfigError(f"{shown(bound)} failed: {type(error).__name__}: {error}") from error


def _per_row(bound: Bound, value: Tensor, evaluation: Evaluation) -> Float[Tensor, " n"]:
    """A loss, refused unless there is one for each row."""
    rows = evaluation.field(FieldKey("tokens")).shape
    if value.shape != rows:
        raise ConfigError(
            f"{shown(bound)} returned the shape {list(value.shape)} for {list(rows)} tokens; "
            "return one number per token, unreduced"
        )
    return value


def counted_by(bound: Bound) -> Callable[..., Tensor] | None:
    """The predicate that says where a formula replaces values, if it does."""
    return getattr(bound.function, "counted", None)


def changed_name(label: str, bound: Bound) -> str:
    """The metric of a formula that replaces values: the share of rows where it does."""
    return f"changed/{label}/{bound.short_name}"


def _scaled(term: Term, label: str, value: Tensor, factor: Tensor) -> Float[Tensor, " n"]:
    """A row's loss times its factor and the coefficient; exactly 0 where the factor is."""
    coef = _settled_number(term.coef, f"coef of {label!r}")
    if coef == 0:
        return torch.zeros_like(value)
    value = torch.where(factor == 0, 0.0, value * factor.to(value.dtype))
    return value * coef if coef != 1.0 else value


def _factor(term: Term, label: str, evaluation: Evaluation, **given: Tensor) -> Float[Tensor, " n"]:
    """The product of a term's weights, 1 where it has none."""
    tokens = evaluation.field(FieldKey("tokens"))
    if term.preserve_mass and term.weights:
        factor = evaluation.settled(f"weight.{label}")
        evaluation.note(f"weight/{label}", factor)
        return factor
    product = torch.ones(tokens.shape, device=tokens.device)
    for place, bound in weight_slots(term):
        if is_coupled(bound.function):
            factor = evaluation.settled(f"weight.{label}.{place}")
        else:
            factor = weight_factor(term, label, bound, evaluation, **given)
        if factor.dim() and factor.shape != tokens.shape:
            raise ConfigError(
                f"weights: {bound.name} returned the shape {list(factor.shape)} for "
                f"{list(tokens.shape)} tokens; return one number per token"
            )
        evaluation.note(f"weight/{label}/{bound.short_name}", factor)
        product = product * factor
    return product


def _settled_number(value: float | Schedule, what: str) -> float:
    if isinstance(value, Schedule):
        raise TypeError(f"the {what} is a schedule; settle it with Method.at(step, ...)")
    return value


def shown(bound: Bound) -> str:
    """A formula with its knobs, as errors name it."""
    knobs = ", ".join(f"{key}={value!r}" for key, value in bound.knobs)
    return f"the formula {bound.name}" + (f" with {knobs}" if knobs else "")


# --------------------------------------------------------------------------------------------
# Checks

_SETTINGS = frozenset(
    {"tail", "smoothing", "preserve_mass", "coef", "against", "rows", "reduction", "name"}
    | {"accept_collapse", "mode", "interpolation", "source"}
)
_LISTS = ("weights", "gates", "outcome")

# What a slot may read of the slots before it; whatever else is not a field of its row is refused.
_ROUTE = ("routing_score", "candidates", "routing", "amount", "advantage")
_OF_THE_TERM: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "outcome": frozenset({"reward", "credited"}),
        "credit": frozenset({"reward"}),
        "baseline": frozenset({"reward", "credited"}),
        "surrogate": frozenset({"advantage"}),
        "weights": frozenset({"advantage"}),
        "candidates": frozenset(_ROUTE[:1]),
        "share": frozenset(_ROUTE[:2]),
        "amount": frozenset((*_ROUTE[:3], "advantage")),
        "transfer": frozenset(_ROUTE),
        "gates": frozenset(_ROUTE),
    }
)
_ROW_BY_ROW = (
    "divergence",
    "penalty",
    "support",
    "surrogate",
    "score",
    "candidates",
    "share",
    "amount",
    "transfer",
    "gates",
)


def _check_term(term: Term) -> None:
    """Normalise the slots to `Bound`s and refuse what cannot work."""
    for item in fields(term):
        value = getattr(term, item.name)
        if item.name in _LISTS:
            if not isinstance(value, tuple | list):
                raise ValueError(f"{item.name} takes a tuple of functions, got {value!r}")
            object.__setattr__(term, item.name, tuple(Bound.of(slot) for slot in value))
        elif item.name not in _SETTINGS and value is not None:
            object.__setattr__(term, item.name, Bound.of(value))
    for place, bound in term.slots():
        _check_slot(term, place, bound)
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
    if not isinstance(term.coef, Schedule) and not is_number(term.coef):
        raise ValueError(f"coef must be a finite number or a schedule, got {term.coef!r}")
    if not isinstance(term.name, str) or set(term.name) & set("./"):
        raise ValueError(f"name must be a text without '.' and '/', got {term.name!r}")
    if not is_number(term.smoothing) or not 0 <= term.smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {term.smoothing!r}")
    for knob, k in Bound.of(term.support).knobs:
        if knob not in ("k", "teacher_k", "student_k"):
            continue
        good = k.reachable()[0] >= 1 if isinstance(k, Schedule) else isinstance(k, int) and k >= 1
        if not good:
            raise ValueError(f"a support's {knob} must be a whole number >= 1, got {k!r}")


def _check_slot(term: Term, place: str, bound: Bound) -> None:
    slot = place.partition(".")[0]
    allowed = _OF_THE_TERM.get(slot, frozenset())
    if slot == "weights" and isinstance(term, Routed):
        allowed = frozenset(_ROUTE)
    for module in (credits, routings):
        fits = [where for where, names in module.PLACES.items() if bound.short_name in names]
        if bound.name.rpartition(".")[0] == module.__name__ and slot not in fits:
            raise ValueError(
                f"{place}: {bound.short_name} does not go there; it is for {' or '.join(fits)}"
            )
    coupled = is_coupled(bound.function)
    for name in positional_names(bound.function):
        entry = FIELDS.get(name)
        if entry is None:
            continue
        of_the_route = coupled and name in _ROUTE[:4]
        if entry.provider == "term" and (name not in allowed or of_the_route):
            raise ValueError(f"{place}: {bound.name} asks for {name!r}, which is not known there")
        if entry.coupled and slot in _ROW_BY_ROW:
            raise ValueError(
                f"{place}: {bound.name} asks for {name!r} and so reads other rows; "
                f"{slot} sees one row at a time"
                + ("; put it into the weights" if slot == "gates" else "")
            )


def _check_tail(term: Term) -> None:
    whole = Bound.of(term.support).function is supports.full
    if whole and term.tail:
        raise ValueError(f"a full support has no tail, got tail={term.tail!r}")
    if not whole and term.tail not in supports.TAILS:
        raise ValueError(
            f"a support of some entries must say what becomes of the rest: tail is one of "
            f"{', '.join(supports.TAILS)}, got {term.tail!r}"
        )


def _check_sampled(term: Sampled) -> None:
    credit, surrogate = Bound.of(term.credit), Bound.of(term.surrogate)
    if credit.function is credits.gae and term.baseline is not None:
        raise ValueError(
            "gae has the value of the prefix subtracted already; leave the baseline out"
        )
    whole = Bound.of(term.support).function is supports.full
    if surrogate.function is surrogates.tail_residual and whole:
        raise ValueError(
            "tail_residual is what a support of some entries leaves out; give the term the support "
            "and tail='bucket' of the dense term beside it"
        )


def _check_divergence(term: Dense) -> None:
    bound = Bound.of(term.divergence)
    if bound.name.rpartition(".")[0] != divergences.__name__:
        return  # a user's own function knows what it is defined on
    name = bound.short_name
    if term.tail == "teacher_renormalise" and divergences.is_infinite_on_restricted_teacher(
        name, dict(bound.knobs)
    ):
        raise ValueError(
            f"{name} is infinite with tail='teacher_renormalise', which leaves the teacher nothing "
            "outside the support; use forward_kl, generalized_jsd, or tail='bucket'"
        )
    if term.tail != "truncate" or name in divergences.ON_RAW_ENTRIES:
        return
    if name != "reverse_kl":
        raise ValueError(
            f"{name} is not defined on raw entries (tail='truncate'); "
            f"{', '.join(sorted(divergences.ON_RAW_ENTRIES))} are, or use another tail rule"
        )
    if not term.accept_collapse:
        raise ValueError(
            "a reverse KL on raw entries with live gradients also descends the student's mass on "
            "the support, which pushes the student out of it until it repeats itself "
            "(arXiv:2605.11182 saw that collapse); use truncated_reverse_kl, tail='bucket' or "
            "tail='renormalise', or set accept_collapse = true to see for yourself"
        )


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)

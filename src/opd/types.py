"""The records every part exchanges. Frozen, small, and without behaviour beyond their invariants.

Axes: B sequences, T response tokens, N packed response rows, K support entries, V vocabulary,
H hidden width. Index `t` is the token being predicted. Scalars per token are `[B, T]` with a
mask; whatever has a vocabulary, support or hidden axis is packed to `[N, ...]`.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import ConfigError
from opd.schedule import Schedule


class Provenance(IntEnum):
    """Who chose a token."""

    PADDING = 0
    STUDENT = 1
    DATA = 2
    TEACHER = 3
    TOOL = 4


@dataclass(frozen=True)
class Stat:
    """A metric as a sum and a count, so that averages of parts combine exactly."""

    total: float
    count: float

    def __add__(self, other: Stat) -> Stat:
        return Stat(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        """`total / count`; NaN where nothing was counted."""
        return self.total / self.count if self.count else float("nan")


def add_stats(stats: Iterable[Mapping[str, Stat]]) -> dict[str, Stat]:
    """Sum of several groups of metrics, name by name."""
    merged: dict[str, Stat] = {}
    for group in stats:
        for name, stat in group.items():
            merged[name] = merged[name] + stat if name in merged else stat
    return merged


# --------------------------------------------------------------------------------------------
# Composition


@dataclass(frozen=True)
class Bound:
    """A function with its knobs: what a slot of a composition stores.

    Two bounds are equal when they name the same function and the same knobs, however they were
    made: `functools.partial` is normalised to this form. A knob is a number, a string, a
    boolean, a tuple of these, or a schedule.
    """

    function: Callable[..., Any] = field(compare=False)
    knobs: tuple[tuple[str, Any], ...] = ()
    name: str = ""

    @classmethod
    def of(cls, value: Callable[..., Any] | Bound) -> Bound:
        """Normalise a function, a `functools.partial` of one, or a bound."""
        if isinstance(value, Bound):
            return value
        knobs: dict[str, Any] = {}
        while isinstance(value, functools.partial):
            if value.args:
                raise ValueError(
                    f"{qualified_name(value.func)}: knobs are keyword-only, "
                    f"got positional {value.args!r}"
                )
            knobs = {**value.keywords, **knobs}
            value = value.func
        if not callable(value):
            raise TypeError(f"a slot takes a function or a partial of one, got {value!r}")
        frozen = {key: tuple(v) if isinstance(v, list) else v for key, v in knobs.items()}
        return cls(value, tuple(sorted(frozen.items())), qualified_name(value))

    @property
    def short_name(self) -> str:
        """The function's own name, without its module."""
        return self.name.rsplit(".", 1)[-1]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **dict(self.knobs))

    def with_knobs(self, **knobs: Any) -> Bound:
        """The same function with some knobs replaced."""
        return replace(self, knobs=tuple(sorted({**dict(self.knobs), **knobs}.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebind, (self.name, self.knobs))


def qualified_name(function: Callable[..., Any]) -> str:
    """`package.module.function`, the identity of a function in hashes and files."""
    return f"{function.__module__}.{function.__qualname__}"


def _rebind(name: str, knobs: tuple[tuple[str, Any], ...]) -> Bound:
    module, _, attribute = name.rpartition(".")
    return Bound(getattr(importlib.import_module(module), attribute), knobs, name)


@dataclass(frozen=True)
class StateSource:
    """Which process writes the responses.

    `student`, `data`, `teacher` and `replay` are shares of the sequences and sum to 1. The other
    fields change how the student's share is written; each may be a schedule where it says so.

    Attributes:
        student: sampled anew from the current student.
        data: taken from the data set.
        teacher: sampled from the teacher.
        replay: taken again from what the student wrote in the last `replay_steps` steps, whole
            prompts with all their samples, drawn without replacement within a step. Tokens keep
            their `policy_version` and `sampler_logp`. What the buffer does not hold yet, the
            student writes.
        replay_steps: how many steps back the buffer reaches.
        horizon: limit on a response in tokens, the data's included, beside the sampler's
            `max_new_tokens`: the lower of the two holds; 0 for that one alone. May be a schedule,
            whose values are rounded; replayed text keeps the length it was written with.
        teacher_prefix: the teacher writes so many tokens of each of the student's sequences first
            (arXiv:2606.01249). May be a schedule.
        mixture: a, the teacher's share of the distribution that the student's tokens are drawn
            from, `a * teacher + (1 - a) * student` (arXiv:2306.08543). May be a schedule.
        interleave: k: each token that the student proposes stands if it is among the teacher's k
            likeliest; otherwise the teacher draws one in its place (arXiv:2410.11325). 0: off.
        rewrite: of a response judged wrong, the share of its tokens, counted from the end, that
            the teacher writes anew (after arXiv:2606.08432). 0: off. May be a schedule.
    """

    student: float = 1.0
    data: float = 0.0
    teacher: float = 0.0
    replay: float = 0.0
    replay_steps: int = 1
    horizon: int | Schedule = 0
    teacher_prefix: int | Schedule = 0
    mixture: float | Schedule = 0.0
    interleave: int = 0
    rewrite: float | Schedule = 0.0

    def __post_init__(self) -> None:
        self._check_ranges()
        shares = (self.student, self.data, self.teacher, self.replay)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
            also = f", replay={self.replay}" if self.replay else ""
            raise ValueError(
                f"state source shares must be >= 0 and sum to 1, got student={self.student}, "
                f"data={self.data}, teacher={self.teacher}{also}"
            )
        self._check_combinations()

    @property
    def teacher_writes(self) -> bool:
        """Whether any token of a response may be the teacher's choice."""
        return bool(self.teacher or self.helped)

    @property
    def helped(self) -> tuple[str, ...]:
        """The settings by which the teacher takes part in the student's own sequences."""
        names = ("teacher_prefix", "mixture", "interleave", "rewrite")
        return tuple(name for name in names if _span(getattr(self, name))[1] > 0)

    def reach(self, name: str) -> float:
        """The highest value that a setting can take, over the steps of its schedule."""
        return _span(getattr(self, name))[1]

    def at(
        self, step: int, stats: Mapping[str, Any], state: Mapping[str, Any]
    ) -> tuple[StateSource, dict[str, Any]]:
        """The source with its schedules settled at `step`, and their state by path. Pure."""
        changed: dict[str, float] = {}
        kept: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Schedule):
                path = f"states.{item.name}"
                number, kept[path] = value.at(step, stats, state.get(path))
                whole = item.name in ("horizon", "teacher_prefix")
                changed[item.name] = round(number) if whole else number
        return (replace(self, **changed) if changed else self), kept  # type: ignore[arg-type]

    def _check_ranges(self) -> None:
        for name, low, high, whole in (
            *((share, -math.inf, math.inf, False) for share in _SHARES),
            ("replay_steps", 1, math.inf, True),
            ("horizon", 0, math.inf, True),
            ("teacher_prefix", 0, math.inf, True),
            ("mixture", 0, 1, False),
            ("interleave", 0, math.inf, True),
            ("rewrite", 0, 1, False),
        ):
            value = getattr(self, name)
            scheduled = isinstance(value, Schedule)
            if scheduled and name in (*_SHARES, "replay_steps", "interleave"):
                raise ValueError(f"states.{name} must be a number, not a schedule, got {value!r}")
            number = scheduled or (isinstance(value, int | float) and not isinstance(value, bool))
            number = number and not any(math.isnan(end) for end in _span(value))
            good = number and low <= _span(value)[0] and _span(value)[1] <= high
            if good and whole and not scheduled:
                good = value == int(value)
            if not good:
                what = "a whole number" if whole else "a number"
                limits = f" >= {low}" if high == math.inf else f" in [{low}, {high}]"
                limits = "" if name in _SHARES else limits
                raise ValueError(f"states.{name} must be {what}{limits}, got {value!r}")

    def _check_combinations(self) -> None:
        if not self.student and (asked := (*self.helped, *(("replay",) if self.replay else ()))):
            raise ValueError(
                f"states.{asked[0]} is about text the student writes, but states.student is 0; "
                f"give the student a share, or leave {asked[0]} out"
            )
        if self.replay_steps != 1 and not self.replay:
            raise ValueError(
                f"states.replay_steps = {self.replay_steps} does nothing without states.replay; "
                "set the share of sequences that is replayed"
            )
        if self.interleave and "mixture" in self.helped:
            raise ValueError(
                "states.mixture and states.interleave are two rules for the same token; choose one"
            )
        lowest = _span(self.horizon)[0]
        if isinstance(self.horizon, Schedule) and lowest < 1:
            raise ValueError(
                f"states.horizon must stay >= 1 over its schedule, got {self.horizon!r}"
            )
        if self.horizon and self.reach("teacher_prefix") >= lowest:
            raise ValueError(
                f"states.teacher_prefix reaches {self.reach('teacher_prefix'):g}, which leaves "
                f"the student nothing of a states.horizon of {lowest:g}; lower the one or raise "
                "the other"
            )


_SHARES = ("student", "data", "teacher", "replay")


def _span(value: float | Schedule) -> tuple[float, float]:
    """The lowest and the highest value a knob can take."""
    return value.reachable() if isinstance(value, Schedule) else (value, value)


VIEW_SOURCES = ("teacher", "initial_student", "student", "ema_student", "combination")

STUDENT_PART = "student"
"""Names the student itself among the parts of a combination: as it is now, detached."""

MIXES = ("log_linear", "arithmetic")
"""What the weights of a combination multiply: log-probabilities, or probabilities."""

CONTEXT_ROLES = ("user", "system")
"""Whose message of a chat a context is put into."""

WEIGHT_SLACK = 1e-6
"""How far the weights of an arithmetic mixture may be from a sum of 1: decimals are rounded."""


@dataclass(frozen=True)
class TeacherView:
    """One distribution that fills a teacher slot.

    A combination is the log-linear mixture of other views, normalised over the vocabulary, or
    with `mix = "arithmetic"` the weighted mean of their probabilities:

        log view = sum_k weight_k * log part_k - logsumexp_v(sum_k weight_k * log part_k)
        log view = log sum_k weight_k * part_k

    The weights of the first have any sign and any sum; those of the second are shares: never
    negative, and 1 in all. The first gives a token mass that every part gives some, the second
    one that any part does. A part is the name of another view, or `student`: the student's own
    distribution at the moment of the comparison, detached. With `normalised` off the second term
    of the first is left out: the combination is then a score of single tokens, such as the
    log-ratio of two teachers, and no distribution. It costs one number per token and part, and may
    be read as `teacher_logp` or `teacher_support_logp` alone.

    Attributes:
        name: how terms refer to it: `teacher`, `teacher.NAME` or `reference`.
        source: `teacher` (the run's teacher model), `initial_student` (the student at step 0,
            frozen), `student` (the current student, scored again before each update),
            `ema_student` (the moving average of its weights) or `combination`.
        context: what this view reads in place of the prompt, before the same response tokens: a
            template such as "{prompt} Hint: {answer}", or the name of a data column that holds
            the whole prompt; empty: it reads what the student reads. A sequence for which
            `{sibling}` or `{feedback}` holds nothing is one that the view has no answer for.
        parts: (view, weight) pairs of a combination, in any order; a weight is a number or a
            schedule.
        decay: of `ema_student`, in (0, 1): average <- decay * average + (1 - decay) * student
            after each optimizer step.
        normalised: of a combination: whether it is a distribution.
        mix: of a combination: `log_linear` or `arithmetic`.
        context_role: of a chat, where the context goes: `user`: it takes the place of the last
            user message; `system`: it is a system message, after what an existing one says.
        chat_template_kwargs: further variables of the chat template where this view reads, over
            those of the run: pairs of a name and a value, in any order.
    """

    name: str = "teacher"
    source: str = "teacher"
    context: str = ""
    parts: tuple[tuple[str, float | Schedule], ...] = ()
    decay: float = 0.0
    normalised: bool = True
    mix: str = "log_linear"
    context_role: str = "user"
    chat_template_kwargs: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        variables = tuple(sorted(self.chat_template_kwargs, key=lambda pair: pair[0]))
        object.__setattr__(self, "chat_template_kwargs", variables)
        if not self.name or self.name == STUDENT_PART:
            raise ValueError(
                f"a view cannot be called {self.name!r}; call it 'teacher', 'teacher.NAME' or "
                "'reference'"
            )
        if self.source not in VIEW_SOURCES:
            named = ", ".join(map(repr, VIEW_SOURCES))
            raise ValueError(
                f"view {self.name!r}: source must be one of {named}, got {self.source!r}"
            )
        in_order = sorted(((name, weight) for name, weight in self.parts), key=lambda part: part[0])
        object.__setattr__(self, "parts", tuple(in_order))
        if (self.source == "ema_student") != (self.decay != 0.0):
            raise ValueError(
                f"view {self.name!r}: decay belongs to source = 'ema_student', which needs one, "
                f"such as 0.999; got source = {self.source!r}, decay = {self.decay!r}"
            )
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"view {self.name!r}: decay must lie in (0, 1), got {self.decay!r}")
        if (self.source == "combination") != bool(self.parts):
            raise ValueError(
                f"view {self.name!r}: parts belong to source = 'combination', which needs at least "
                f"one; got source = {self.source!r}, parts = {self.parts!r}"
            )
        if not isinstance(self.normalised, bool) or (not self.normalised and not self.parts):
            raise ValueError(
                f"view {self.name!r}: normalised = false belongs to source = 'combination'; got "
                f"source = {self.source!r}, normalised = {self.normalised!r}"
            )
        if self.mix not in MIXES:
            raise ValueError(
                f"view {self.name!r}: mix must be one of {', '.join(map(repr, MIXES))}, got "
                f"{self.mix!r}"
            )
        if self.mix != "log_linear" and not (self.parts and self.normalised):
            raise ValueError(
                f"view {self.name!r}: mix = {self.mix!r} belongs to a normalised combination; got "
                f"source = {self.source!r}, normalised = {self.normalised!r}"
            )
        if self.parts:
            self._check_parts()
        self._check_reading()

    @property
    def moves(self) -> bool:
        """Whether the view changes with every update, so that it is scored again before each."""
        return self.source in ("student", "ema_student")

    def at(
        self, step: int, stats: Mapping[str, Stat], state: Mapping[str, Any]
    ) -> tuple[TeacherView, dict[str, Any]]:
        """The view with scheduled weights replaced by their values at `step`, and their state.

        Raises:
            ConfigError: weights of an arithmetic mixture that are no shares at this step.
        """
        parts, kept = [], {}
        for part, weight in self.parts:
            if isinstance(weight, Schedule):
                path = f"{self.name}/{part}"
                weight, kept[path] = weight.at(step, stats, state.get(path))
            parts.append((part, weight))
        try:
            return replace(self, parts=tuple(parts)), kept
        except ValueError as error:
            raise ConfigError(f"step {step + 1}: {error}") from None

    def _check_parts(self) -> None:
        if self.context:
            raise ValueError(
                f"view {self.name!r}: a combination reads nothing itself; give the context to the "
                "views that are its parts"
            )
        names = [name for name, _ in self.parts]
        for name, weight in self.parts:
            if names.count(name) > 1:
                raise ValueError(f"view {self.name!r}: the part {name!r} stands there twice")
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (isinstance(weight, Schedule) or (number and math.isfinite(weight))):
                raise ValueError(
                    f"view {self.name!r}: the weight of {name!r} must be a finite number or a "
                    f"schedule, got {weight!r}"
                )
        if all(weight == 0 for _, weight in self.parts):
            raise ValueError(f"view {self.name!r}: every part has weight 0, so nothing is combined")
        if self.mix == "arithmetic":
            self._check_shares()

    def _check_reading(self) -> None:
        if self.context_role not in CONTEXT_ROLES:
            raise ValueError(
                f"view {self.name!r}: context_role must be one of "
                f"{', '.join(map(repr, CONTEXT_ROLES))}, got {self.context_role!r}"
            )
        told = {
            "context_role": self.context_role != "user",
            "chat_template_kwargs": bool(self.chat_template_kwargs),
        }
        for key, given in told.items():
            if given and not self.context:
                raise ValueError(
                    f"view {self.name!r}: {key} says how a context is read, and there is none; "
                    "context = '{prompt}' is the prompt as it is"
                )

    def _check_shares(self) -> None:
        """Refuse weights of a mixture that are no shares, at any step where that is known.

        What a schedule does that watches a statistic is known when it has done it.
        """
        for name, weight in self.parts:
            if _span(weight)[0] < 0:
                raise ValueError(
                    f"view {self.name!r}: an arithmetic mixture has weights >= 0, and that of "
                    f"{name!r} is {weight!r}"
                )
        scheduled = [weight for _, weight in self.parts if isinstance(weight, Schedule)]
        lasting = [int(getattr(schedule, "steps", 0)) for schedule in scheduled]
        last = max(lasting, default=0) if all(lasting) else 0
        grid = {round(last * part / _SHARES_CHECKED) for part in range(_SHARES_CHECKED + 1)}
        for step in sorted({*grid, *lasting} if last else {0}):
            total = sum(
                weight.at(step, {}, None)[0] if isinstance(weight, Schedule) else weight
                for _, weight in self.parts
            )
            if abs(total - 1) > WEIGHT_SLACK:
                when = f" at step {step + 1}" if scheduled else ""
                raise ValueError(
                    f"view {self.name!r}: the weights of an arithmetic mixture sum to 1, and these "
                    f"sum to {total:g}{when}: {dict(self.parts)}; for weights of any sum take "
                    "mix = 'log_linear'"
                )


_SHARES_CHECKED = 64
"""Steps at which the weights of a scheduled mixture are added up, beside the ends of schedules."""


def with_parts(names: Iterable[str], views: Iterable[TeacherView]) -> tuple[TeacherView, ...]:
    """The views of these names and those they are combined from, parts before combinations.

    Raises:
        ValueError: a name that no view has, or a combination that contains itself.
    """
    known: dict[str, TeacherView] = {}
    for view in views:
        if view.name in known:
            raise ValueError(f"two views are called {view.name!r}; give each its own name")
        known[view.name] = view
    found: dict[str, TeacherView] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circle = " -> ".join((*above[above.index(name) :], name))
            raise ValueError(f"the view {name!r} is combined from itself: {circle}")
        if name not in known:
            inside = f"the view {above[-1]!r} combines" if above else "the objective reads"
            raise ValueError(
                f"{inside} the view {name!r}, which the method does not declare; declared: "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        if above and not known[name].normalised:
            raise ValueError(
                f"the view {above[-1]!r} combines {name!r}, which is not normalised and so is no "
                "distribution; combine the parts of it instead"
            )
        for part, _ in known[name].parts:
            if part != STUDENT_PART:
                add(part, (*above, name))
        found[name] = known[name]

    for name in sorted(names):
        add(name, ())
    return tuple(found.values())


@dataclass(frozen=True)
class FieldKey:
    """One field of `FIELDS` as a term sees it.

    Whose view, on which support, with which tail rule, and how much of the view's mass is spread
    evenly. For `student_top_ids` and `teacher_top_ids` the support says how many.
    """

    name: str
    view: str = ""
    support: Bound | None = None
    tail: str = ""
    smoothing: float = 0.0


@dataclass(frozen=True, order=True)
class Need:
    """One thing a view must return: a field, on a support, with at most `k` entries."""

    view: str
    field: str
    support: str
    k: int = 0


# --------------------------------------------------------------------------------------------
# Data and rollouts


@dataclass(frozen=True)
class Prompt:
    """One prompt, encoded, with what a verifier needs to judge a response.

    Attributes:
        id: stable across runs; names the prompt in samples and error messages.
        prompt_ids: encoded prompt, special tokens included.
        text: the prompt as a person reads it.
        answer: reference answer for the verifier, if the data has one.
        response_ids: a response from the data set, end token included, if the data has one.
        response_mask: True where a loss may look at `response_ids` (False: tool results).
        columns: the remaining columns of the record, untouched.
        model_inputs: extra model inputs (an image, say), carried from prompt to model untouched.
        messages: of a chat prompt, the messages it was rendered from; empty for a plain text.
        response_text: the data's response as a text, if it is one text; there even where nobody
            asked for `response_ids`.
    """

    id: str
    prompt_ids: tuple[int, ...]
    text: str
    answer: str | None = None
    response_ids: tuple[int, ...] | None = None
    response_mask: tuple[bool, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    model_inputs: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    response_text: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgement of one response: a score in [0, 1] and, if it says so, why."""

    score: float
    reason: str = ""


PASS_MARK = 0.5
"""A score at or above this counts as right where only right or wrong is asked."""


@runtime_checkable
class Verifier(Protocol):
    """Judges one response. `response` is the decoded text without special tokens."""

    def __call__(self, prompt: Prompt, response: str, *, finished: bool) -> Verdict: ...


@dataclass(frozen=True)
class SamplerSettings:
    """How responses are sampled.

    Attributes:
        max_new_tokens: limit on the response, in tokens, end token included.
        temperature: divides the logits; 0 is greedy.
        top_p: keeps the smallest set of tokens whose mass reaches this; 1 keeps all.
        top_k: keeps that many likeliest tokens; 0 keeps all.
        stop: strings that end a response; the text up to and including the string is kept.
        samples_per_prompt: responses sampled for every prompt.
        student_top_k: return the ids of that many likeliest tokens at every position; 0: none.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    samples_per_prompt: int = 1
    student_top_k: int = 0

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
            ("temperature", self.temperature >= 0, ">= 0 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, ">= 0 (0 keeps all)"),
            ("samples_per_prompt", self.samples_per_prompt >= 1, ">= 1"),
            ("student_top_k", self.student_top_k >= 0, ">= 0"),
        ):
            if not good:
                raise ValueError(f"sampler.{name} must be {rule}, got {getattr(self, name)}")


STOP_REASONS = ("eos", "stop_string", "length")


@dataclass(frozen=True)
class Rollout:
    """Responses and what is known about their tokens. Index `t` is the token being predicted.

    Attributes:
        prompt_ids: B encoded prompts.
        tokens: response tokens, padded on the right.
        mask: True where a loss may look; False on tool results and padding.
        provenance: `Provenance` of every token.
        sampler_logp: log-probability under the distribution that was sampled from, temperature
            and truncation included; 0 where the token was not sampled.
        policy_version: optimizer steps the sampling weights had seen; -1 where not sampled.
        group: index of the prompt within the batch; samples of one prompt share it.
        stop_reason: one of `STOP_REASONS` per sequence.
        verdict: the verifier's score per sequence; NaN where there is none.
        sampler_top_ids: ids of the sampler's likeliest tokens, before truncation, if asked for.
        prompts: the records the responses answer, one per sequence.
        model_inputs: extra model inputs per sequence.
        reasons: what the verifier said beside its score, one per sequence; empty: nothing is known.
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    provenance: Int[Tensor, "B T"]
    sampler_logp: Float[Tensor, "B T"]
    policy_version: Int[Tensor, "B T"]
    group: Int[Tensor, " B"]
    stop_reason: tuple[str, ...]
    verdict: Float[Tensor, " B"]
    sampler_top_ids: Int[Tensor, "B T K"] | None = None
    prompts: tuple[Prompt, ...] = ()
    model_inputs: tuple[Mapping[str, Any], ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens per response, tool results included, padding not."""
        return (self.provenance != Provenance.PADDING).sum(1)


# --------------------------------------------------------------------------------------------
# Teachers


@dataclass(frozen=True)
class Unembedding:
    """The map from hidden states to logits, with the family's own transformations.

        logits = soft_cap(logit_scale * (hidden @ weight[:vocab_size].T + bias[:vocab_size]))
        soft_cap(z) = c * tanh(z / c), or z where there is no cap

    Attributes:
        weight: may have more rows than there are tokens; the surplus carries no mass.
        vocab_size: number of real tokens.
    """

    weight: Float[Tensor, "V_padded H"]
    vocab_size: int
    bias: Float[Tensor, " V_padded"] | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class TeacherScores:
    """What a teacher returned for N response rows. Every field is optional.

    Fields have a row for each of them, M = N, unless `row_index` says otherwise.

    Attributes:
        sampled_logp: log-probability of the row's own token.
        top_ids, top_logp: the teacher's own likeliest tokens, likeliest first.
        ids, ids_logp: ids that were asked for, and their log-probabilities.
        logsumexp: log of the normaliser of the teacher's logits.
        entropy: in nats.
        hidden: last hidden states; `unembedding` turns them into logits.
        log_probs: the whole distribution.
        parts: of a combination, (view, weight) pairs; the head combines their distributions.
        normalised: of a combination: whether it is one, or the bare weighted sum of its parts.
            Ids that count as one (`Batch.merge_ids`) are merged already in whatever names single
            tokens: their mass stands under the group's first id.
        mix: of a combination: `log_linear` or `arithmetic`.
        names, answered_by: where several models answered, each for rows of its own: what they are
            called, and the place among them of the one that answered a row.
        heads: of these models, in the order of `names`, in place of `unembedding`; None of one that
            answered nothing. `hidden` is as wide as the widest; a narrower one reads its first
            columns.
        seconds: wall-clock time that each model took, by name.
        provenance: revision, template and tokenizer hashes, as the teacher states them.
        row_index: where the teacher reads other tokens than the student, which of the M rows of
            the fields above answers row n; -1 where none does: terms that read this view then skip
            the row. None: row n answers row n.
        id_map: where its vocabulary is another one, the teacher's id of each of the student's
            tokens; -1 where it has none, which then carries no mass. The distribution is the
            teacher's over the tokens they share. `top_ids` and `ids` are ids of the student's.
    """

    sampled_logp: Float[Tensor, " M"] | None = None
    top_ids: Int[Tensor, "M K"] | None = None
    top_logp: Float[Tensor, "M K"] | None = None
    ids: Int[Tensor, "M J"] | None = None
    ids_logp: Float[Tensor, "M J"] | None = None
    logsumexp: Float[Tensor, " M"] | None = None
    entropy: Float[Tensor, " M"] | None = None
    hidden: Float[Tensor, "M H"] | None = None
    log_probs: Float[Tensor, "M W"] | None = None
    unembedding: Unembedding | None = None
    parts: tuple[tuple[str, float], ...] = ()
    normalised: bool = True
    mix: str = "log_linear"
    names: tuple[str, ...] = ()
    answered_by: Int[Tensor, " M"] | None = None
    heads: tuple[Unembedding | None, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    row_index: Int[Tensor, " N"] | None = None
    id_map: Int[Tensor, " V"] | None = None

    @property
    def unembeddings(self) -> tuple[Unembedding, ...]:
        """Whatever turns hidden states into logits: one, or one per model; none where none does."""
        of_models = tuple(head for head in self.heads if head is not None)
        return of_models or (() if self.unembedding is None else (self.unembedding,))

    def rows(self, index: Tensor | slice) -> TeacherScores:
        """The same scores for some of the N rows, with nothing kept of the others."""
        chosen, places = index, None
        if self.row_index is not None:
            answered = self.row_index[index]
            chosen = answered.clamp(min=0)
            places = torch.arange(len(answered), device=answered.device)
            places = places.masked_fill(answered < 0, -1)
        picked: dict[str, Any] = {
            name: value[chosen] if len(value) or places is None else _nothing(value, len(places))
            for name in TEACHER_ROW_FIELDS
            if (value := getattr(self, name)) is not None
        }
        return replace(self, row_index=places, **picked)

    def row_counts(self) -> tuple[int, ...]:
        """For how many rows each field that is there holds an answer."""
        values = (getattr(self, name) for name in TEACHER_ROW_FIELDS)
        return tuple(value.shape[0] for value in values if value is not None)


def _nothing(value: Tensor, rows: int) -> Tensor:
    """Rows for a field that has none: nobody looks at them."""
    return value.new_zeros((rows, *value.shape[1:]))


def unanswered(views: Mapping[str, TeacherScores], name: str) -> Bool[Tensor, " N"] | None:
    """True on the rows that a view, or a part of a combination, has no answer for; None: none."""
    if name not in views:
        return None
    index = views[name].row_index
    found = None if index is None else index < 0
    for part, weight in views[name].parts:
        own = unanswered(views, part) if weight else None
        if own is not None:
            found = own if found is None else found | own
    return found


TEACHER_ROW_FIELDS = (
    "sampled_logp",
    "top_ids",
    "top_logp",
    "ids",
    "ids_logp",
    "logsumexp",
    "entropy",
    "hidden",
    "log_probs",
    "answered_by",
)


@dataclass(frozen=True)
class TeacherRequest:
    """What the objective needs from one view, for one rollout batch.

    Attributes:
        distribution: enough to build the whole distribution: `hidden` or `log_probs`.
        sampled: the log-probability of the row's own token.
        top_k: that many of the teacher's own likeliest tokens; 0: none.
        ids: tokens to score at every row.
        entropy: that of the whole distribution, in nats.
        temperature: divides the teacher's logits.
        prompts: the records that the batch's sequences answer, one each, for who routes by them;
            empty where they are not known.
    """

    batch: Batch
    distribution: bool = True
    sampled: bool = False
    top_k: int = 0
    ids: Int[Tensor, "N K"] | None = None
    entropy: bool = False
    temperature: float = 1.0
    prompts: tuple[Prompt, ...] = ()


@runtime_checkable
class Teacher(Protocol):
    """Scores response rows."""

    def score(self, request: TeacherRequest) -> TeacherScores: ...

    def can(self, need: Need) -> bool:
        """Whether a reply can hold this need."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Writes responses to prompts."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        *,
        generator: torch.Generator,
        policy_version: int = 0,
    ) -> Rollout: ...


@runtime_checkable
class Critic(Protocol):
    """Knows what the rest of a response is worth, from the student's hidden states, in nats."""

    def values(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """The value of each state, detached."""
        ...

    def bootstrap(
        self, hidden: Float[Tensor, "B H"], cut_off: Bool[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """The value of the state after each response's last token; 0 where the response ended."""
        ...

    def fit(
        self,
        hidden: Float[Tensor, "N H"],
        targets: Float[Tensor, " N"],
        place: Float[Tensor, " N"],
        generator: torch.Generator,
    ) -> Mapping[str, Stat]:
        """Learn what the states turned out to be worth.

        Args:
            place: where in its response a state stands, from 0 (first token) to 1 (last).
            generator: of whatever is drawn.

        Returns:
            Metrics; of the states before they are taught `critic/target`, `critic/residual` and
            their squares, `..._square`, among them. Nothing without states.
        """
        ...


# --------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class TokenBatch:
    """What a formula may read about B responses of at most T tokens.

    `views` and `top_ids` are packed to the N rows where `mask` is True, in row-major order.

    Attributes:
        old_logp: under the trainer's weights at rollout time.
        coupled: results of the signal phase, `[B, T]` each, detached; named
            `advantage.<term>`, `weight.<term>.<place>`, `weight.<term>` where the weights
            together keep their mass, and `changed/<term>/<formula>` for the metrics.
        special: True on special tokens of the tokenizer other than end tokens.
        special_ids: ids of those special tokens, S of them.
        student_top_ids: the student's likeliest tokens, chosen once per rollout batch, packed.
        values: the critic's value of the prefix of every token, in nats.
        bootstrap_value: its value after the last token; 0 where the response ended by itself.
        extra: `[B]` or `[B, T]` columns from data or a verifier.
    """

    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    provenance: Int[Tensor, "B T"]
    sampler_logp: Float[Tensor, "B T"]
    group: Int[Tensor, " B"]
    verdict: Float[Tensor, " B"]
    old_logp: Float[Tensor, "B T"] | None = None
    views: Mapping[str, TeacherScores] = field(default_factory=dict)
    special: Bool[Tensor, "B T"] | None = None
    student_top_ids: Int[Tensor, "N K"] | None = None
    special_ids: Int[Tensor, " S"] | None = None
    values: Float[Tensor, "B T"] | None = None
    bootstrap_value: Float[Tensor, " B"] | None = None
    coupled: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Count:
    """Denominators of the reductions for one kind of rows, over the whole optimizer step."""

    rows: float
    sequences: float


ROW_KINDS: Mapping[str, tuple[Provenance, ...]] = MappingProxyType(
    {
        "student": (Provenance.STUDENT,),
        "data": (Provenance.DATA,),
        "teacher": (Provenance.TEACHER,),
        "all": (Provenance.STUDENT, Provenance.DATA, Provenance.TEACHER),
    }
)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: what the student's forward takes.

    Attributes:
        input_ids: prompt and response, padded on the right, L tokens.
        lengths: tokens in use per sequence, prompt included.
        row_index: flat index into `B * L` of the position whose hidden state predicts row n.
        bootstrap_row: flat index of the position after the last token, for a critic; -1 where
            the response ended by itself.
        counts: denominators by row kind, over the whole optimizer step and all ranks.
        merge_ids: groups of ids whose mass is summed into the first, on both sides.
        model_inputs: further keyword arguments of the model's forward.
    """

    input_ids: Int[Tensor, "B L"]
    lengths: Int[Tensor, " B"]
    row_index: Int[Tensor, " N"]
    bootstrap_row: Int[Tensor, " B"]
    counts: Mapping[str, Count]
    token: TokenBatch
    merge_ids: tuple[tuple[int, ...], ...] = ()
    model_inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentOutput:
    """What one forward of the student returns.

    Attributes:
        loss: the objective's share of this micro-batch, ready for `backward()`; None without
            an objective.
        stats: (sum, count) metrics.
        rows: per-row by-products, packed, detached.
        fields: the fields that were `wanted`, packed, detached.
    """

    loss: Float[Tensor, ""] | None
    stats: Mapping[str, Stat] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    fields: Mapping[FieldKey, Tensor] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------
# Packing scalars


def pack_rows(values: Tensor, mask: Bool[Tensor, "B T"]) -> Tensor:
    """`[B, T, ...]` to `[N, ...]`: the entries where `mask` is True, row-major."""
    return values[mask]


def unpack_rows(values: Tensor, mask: Bool[Tensor, "B T"]) -> Tensor:
    """`[N, ...]` to `[B, T, ...]`; the inverse of `pack_rows`, zero where `mask` is False."""
    full = values.new_zeros((*mask.shape, *values.shape[1:]))
    return full.masked_scatter(
        mask.reshape(*mask.shape, *(1 for _ in values.shape[1:])).expand_as(full), values
    )

"""What a composition relies on: who drew its tokens, what corrects for it, what its advantage sees.

Predicates about terms that the composition rules share. They read names and knobs, never a tensor,
except where a user's own function can only be told by what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.fields import positional_names
from opd.formula import credit, divergence, reward, support, surrogate
from opd.objective import Dense, Method, Routed, Sampled, Term
from opd.schedule import Schedule
from opd.types import Bound, TeacherView, with_parts

__all__ = ["RunFacts"]


@dataclass(frozen=True)
class RunFacts:
    """The plain facts of a run that composition rules read beside its method.

    Attributes:
        temperature, top_p, top_k, samples_per_prompt: settings of the sampler.
        max_new_tokens: limit on a response in tokens; 0: none is known.
        updates_per_rollout: optimizer steps on each rollout batch.
        steps: rollout batches; 0: not known.
        longest_response: tokens of the longest response that the data shows; 0: it shows none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples_per_prompt: int = 1
    max_new_tokens: int = 0
    updates_per_rollout: int = 1
    steps: int = 0
    longest_response: int = 0


def terms(method: Method) -> Iterator[tuple[str, Term]]:
    """The terms that can do something, those inside routes among them, with their labels."""
    for label, term in method.objective.parts():
        if isinstance(term.coef, Schedule) or term.coef != 0 or isinstance(term, Routed):
            yield label, term


def sampled_terms(method: Method) -> Iterator[tuple[str, Sampled]]:
    """The sampled ones of `terms`."""
    for label, term in terms(method):
        if isinstance(term, Sampled):
            yield label, term


def dense_terms(method: Method) -> Iterator[tuple[str, Dense]]:
    """The dense ones of `terms`."""
    for label, term in terms(method):
        if isinstance(term, Dense):
            yield label, term


def reach(knob: Any) -> tuple[Any, Any]:
    """The lowest and the highest value that a knob can take."""
    return knob.reachable() if isinstance(knob, Schedule) else (knob, knob)


def knob_of(bound: Bound, name: str, default: Any = None) -> tuple[Any, Any]:
    """The reach of a function's knob; of `default` where it is not set."""
    return reach(dict(bound.knobs).get(name, default))


def is_whole(term: Term) -> bool:
    """Whether the whole vocabulary is compared."""
    return Bound.of(term.support).function is support.full


# --------------------------------------------------------------------------------------------
# Who drew the tokens


ESTIMATORS = (divergence.reverse_kl_k2, divergence.forward_kl_k3, divergence.corrected_k3)
"""Losses of the sampled token whose gradient is a mean over the student's own draws."""


def is_mean_over_draws(term: Term) -> bool:
    """Whether what a term descends is defined as a mean over tokens that the student draws.

    The likelihood of a text (`one`) and `shaped_probability`, made for the text of others, are not.
    """
    if isinstance(term, Sampled):
        likelihood = Bound.of(term.reward).function is reward.one
        return not likelihood and Bound.of(term.surrogate).function is not (
            surrogate.shaped_probability
        )
    return isinstance(term, Dense) and Bound.of(term.divergence).function in ESTIMATORS


def _weighing(term: Term) -> Iterator[Bound]:
    """The functions that may hold an importance ratio."""
    for place, bound in term.slots():
        if place.startswith(("surrogate", "weights", "divergence")):
            yield bound


def weighs_by_student_over(term: Term, whom: str) -> bool:
    """Whether a function of a term compares the student of now with a field of the rollout.

    Args:
        whom: `old_logp` or `sampler_logp`.
    """
    names = (positional_names(bound.function) for bound in _weighing(term))
    return any({"student_logp", whom} <= set(found) for found in names)


def weighs_by_sampler(term: Term) -> bool:
    """Whether a function of a term reads what the token's sampler gave it."""
    return any("sampler_logp" in positional_names(bound.function) for bound in _weighing(term))


def sampler_differs(method: Method, run: RunFacts) -> tuple[str, ...]:
    """Keys by which the sampler's policy is not the one that is compared."""
    return tuple(
        key
        for key, differs in (
            ("temperature", run.temperature != method.objective.temperature),
            ("top_p", run.top_p < 1),
            ("top_k", run.top_k > 0),
        )
        if differs
    )


def student_writes(method: Method, term: Term) -> bool:
    """Whether a term looks at text that the student wrote anew."""
    return method.states.student > 0 and term.rows in ("student", "all")


def is_stale(method: Method, run: RunFacts) -> bool:
    """Whether some updates see tokens that older weights drew."""
    return run.updates_per_rollout > 1 or method.states.replay > 0


def foreign_tokens(method: Method, term: Term, *, weighed: bool = False) -> tuple[str, ...]:
    """Which of the tokens a term looks at the student did not draw freely, in words.

    Args:
        weighed: leave out those that a ratio to their sampler makes good: it is known what a
            teacher, or a rule of both, gave its own tokens, but not what whoever wrote the data
            did, and not where only the tokens that stood or that took their place are looked at.
    """
    states, found = method.states, []
    helped = set(states.helped)
    if states.data and term.rows in ("data", "all"):
        found.append("tokens of the data")
    if (states.teacher or "teacher_prefix" in helped) and term.rows in ("teacher", "all"):
        found += [] if weighed else ["tokens of the teacher"]
    if "interleave" in helped and term.rows != "data" and not (weighed and term.rows == "all"):
        found.append("tokens that states.interleave let stand or replaced")
    if "rewrite" in helped and term.rows != "data":
        found.append("tokens that states.rewrite let stand or replaced")
    if "mixture" in helped and term.rows in ("student", "all") and not weighed:
        found.append("tokens of a mixture with the teacher")
    return tuple(found)


def draws_freely(method: Method, run: RunFacts, term: Term) -> bool:
    """Whether what a term sees is, in expectation, free draws of the student, of now or lately.

    Those of another temperature or of a replay with a ratio to whoever drew them; those of several
    updates on one rollout without, of which the first sees none but its own.
    """
    own = method.states.student > 0 and not foreign_tokens(method, term)
    weighed = weighs_by_student_over(term, "sampler_logp")
    near = weighed or weighs_by_student_over(term, "old_logp")
    cut_off = run.top_p < 1 or run.top_k > 0 or run.temperature == 0
    if cut_off or (sampler_differs(method, run) and not weighed):
        return False
    return own and (not method.states.replay or near)


def is_frozen(bound: Bound) -> bool:
    """Whether a reward compares the teacher with the student of the rollout, not of now."""
    names = set(positional_names(bound.function))
    then = bool(names & {"old_logp", "sampler_logp"}) and "student_logp" not in names
    return bound.short_name in reward.CACHED or (then and "teacher_logp" in names)


# --------------------------------------------------------------------------------------------
# What an advantage sees

SAME_FOR_ALL = (reward.one, reward.length_cost)
"""Rewards that read the token and are one number for all of them."""

_OF_THE_PREFIX = frozenset(
    {
        "student_log_probs",
        "teacher_log_probs",
        "student_support_logp",
        "teacher_support_logp",
        "student_log_tail",
        "teacher_log_tail",
        "student_top_ids",
        "teacher_top_ids",
        "reverse_kl",
        "forward_kl",
        "total_variation",
        "jensen_shannon",
        "student_entropy",
        "teacher_entropy",
        "student_hidden",
        "teacher_hidden",
        "values",
        "position",
    }
)
"""Fields that a prefix has before its next token is chosen, on a support of the prefix."""

_SUPPORTS_OF_THE_PREFIX = (
    support.full,
    support.student_top_k,
    support.teacher_top_k,
    support.union,
    support.intersection,
)


def reads_the_prefix_alone(term: Term, bound: Bound) -> bool:
    """Whether a function's answer is settled before the token is chosen."""
    if bound.function in SAME_FOR_ALL:
        return True
    by_prefix = Bound.of(term.support).function in _SUPPORTS_OF_THE_PREFIX
    names = positional_names(bound.function)
    return by_prefix and bool(names) and set(names) <= _OF_THE_PREFIX


def is_own_reward(bound: Bound) -> bool:
    """Whether credit hands every token its own reward and no other's."""
    return bound.function is credit.immediate or (
        (bound.function is credit.windowed and knob_of(bound, "window") == (1, 1))
        or (bound.function is credit.discounted and knob_of(bound, "gamma") == (0, 0))
    )


def ignores_the_choice(method: Method, run: RunFacts, term: Sampled) -> bool:
    """Whether a term weighs the score of the student's own draws with numbers of the prefix alone.

    Its expected gradient is then zero: the mean score at a prefix is. With a mean over tokens, or
    within a response, up to what the number of tokens has to do with the choice.
    """
    return (
        draws_freely(method, run, term)
        and not term.outcome
        and is_own_reward(Bound.of(term.credit))
        and reads_the_prefix_alone(term, Bound.of(term.reward))
        and all(_weighs_the_prefix(term, Bound.of(weight)) for weight in term.weights)
        and not term.preserve_mass
        and Bound.of(term.surrogate).function is not surrogate.tail_residual
    )


def _weighs_the_prefix(term: Sampled, bound: Bound) -> bool:
    """Whether a weight is the prefix's, or a ratio, which makes draws the student's own."""
    names = set(positional_names(bound.function))
    is_ratio = names in ({"student_logp", "old_logp"}, {"student_logp", "sampler_logp"})
    return is_ratio or reads_the_prefix_alone(term, bound)


def is_blind_to_the_teacher(term: Term, bound: Bound) -> bool:
    """Whether a weight is the prefix's, or at least reads nothing of the teacher."""
    names = positional_names(bound.function)
    of_students = all(name.startswith(("student_", "old_", "sampler_")) for name in names)
    return bool(names) and (of_students or reads_the_prefix_alone(term, bound))


# --------------------------------------------------------------------------------------------
# Who teaches


def pulling_views(method: Method, name: str) -> Iterator[TeacherView]:
    """The plain views that a view pulls towards: itself, or its parts of positive weight."""
    views = {view.name: view for view in with_parts([name], method.views)}
    view = views[name]
    if not view.parts:
        yield view
    for part, weight in view.parts:
        if part in views and reach(weight)[1] > 0:
            yield from pulling_views(method, part)


def share_rows(one: Term, other: Term) -> bool:
    """Whether two terms can look at the same row: no gate on either, and kinds that meet."""
    gated = getattr(one, "weights", ()) and getattr(other, "weights", ())
    return not gated and (one.rows == other.rows or "all" in (one.rows, other.rows))


# --------------------------------------------------------------------------------------------
# What a function computes, where its name does not say


def _at_both_ends(bound: Bound) -> tuple[Bound, ...]:
    """The function with its schedules at their lowest, and at their highest."""
    settled = (
        {key: reach(knob)[end] for key, knob in bound.knobs if isinstance(knob, Schedule)}
        for end in (0, 1)
    )
    return tuple(dict.fromkeys(bound.with_knobs(**knobs) for knobs in settled))


def _tried(bound: Bound, *arguments: Tensor) -> Tensor | None:
    """The function's answer to float64 rows; None where it has none, which is not for rules."""
    try:
        value = bound(*arguments)
    except Exception:  # a user's function may raise anything; `opd check` tells that elsewhere
        return None
    good = isinstance(value, Tensor) and value.shape == arguments[0].shape[: value.dim()]
    return value if good and bool(value.isfinite().all()) else None


def _slopes(bound: Bound, student: Tensor, *others: Tensor, place: int) -> Tensor | None:
    """Derivative of the function's sum with respect to the student's argument; None: has none."""
    live = student.clone().requires_grad_()
    arguments = [*others]
    arguments.insert(place, live)
    value = _tried(bound, *arguments)
    if value is None or not value.requires_grad:
        return None
    (slope,) = torch.autograd.grad(value.sum(), live, allow_unused=True)
    return torch.zeros_like(live) if slope is None else slope


_STUDENT = torch.tensor([-0.1, -0.7, -1.9, -4.0], dtype=torch.float64)
_TEACHER = torch.tensor([-2.3, -0.2, -1.1, -0.6], dtype=torch.float64)


RATIO = 14.0
"""Log of the ratio at which a weight that has a bound has met it."""


def unbounded_ratios(term: Term) -> Iterator[Bound]:
    """The functions of a term whose weight, or slope, grows as student / writer does.

    For a token that is to become likelier: PPO's clip bounds nothing else.
    """
    for place, bound in term.slots():
        if place.startswith(("surrogate", "weights", "divergence", "penalty")):
            sizes = [_sizes(end) for end in _at_both_ends(bound)]
            if any(far > 1e3 * near > 0 for near, far in sizes):
                yield bound


def _sizes(bound: Bound) -> tuple[float, float]:
    """Of the weight, or of the slope if it has one, at a log-ratio of 1 and at `RATIO`."""
    names = positional_names(bound.function)
    writers = {"old_logp", "sampler_logp"} & set(names)
    known = {"student_logp", "teacher_logp", "old_logp", "sampler_logp", "advantage"}
    if "student_logp" not in names or not writers or not set(names) <= known:
        return 0.0, 0.0
    student = torch.tensor([-0.5], dtype=torch.float64)
    found = []
    for log_ratio in (1.0, RATIO):
        writer = student - log_ratio
        given = {
            "student_logp": student,
            "teacher_logp": torch.tensor([-0.2], dtype=torch.float64),
            "old_logp": writer,
            "sampler_logp": writer,
            "advantage": torch.ones_like(student),
        }
        place = names.index("student_logp")
        others = [given[name] for name in names if name != "student_logp"]
        size = _slopes(bound, student, *others, place=place)
        if size is None:
            size = _tried(bound, *(given[name] for name in names))
        if size is None:
            return 0.0, 0.0
        found.append(float(size.abs().sum()))
    return found[0], found[1]


def drops_the_teacher(bound: Bound) -> bool:
    """Whether a loss of `student_logp` and `teacher_logp` has one slope, whatever the two are."""
    names = positional_names(bound.function)
    if set(names) != {"student_logp", "teacher_logp"}:
        return False
    place = names.index("student_logp")
    slopes = [
        _slopes(end, _STUDENT, teacher, place=place)
        for end in _at_both_ends(bound)
        for teacher in (_TEACHER, _TEACHER.flip(0))
    ]
    known = [slope for slope in slopes if slope is not None]
    return len(known) == len(slopes) and bool(
        torch.stack([(slope - known[0][0]).abs().max() for slope in known]).max() < 1e-12
    )


def is_k3(bound: Bound) -> bool:
    """Whether a reward of `teacher_logp` and `student_logp` is a multiple of the k3 estimator."""
    names = positional_names(bound.function)
    if set(names) != {"student_logp", "teacher_logp"}:
        return False
    by_name = {"student_logp": _STUDENT, "teacher_logp": _TEACHER}
    log_ratio = _TEACHER - _STUDENT
    k3 = torch.expm1(log_ratio) - log_ratio
    for end in _at_both_ends(bound):
        value = _tried(end, *(by_name[name] for name in names))
        if value is not None and bool((value != 0).all()):
            scale = value / k3
            return bool((scale - scale[0]).abs().max() < 1e-9 * scale[0].abs())
    return False


def kills_gradients(bound: Bound, tail: str) -> bool:
    """Whether a loss goes flat where the student is far from the teacher.

    At the entry, or the token, that the teacher prefers and the student lacks; on entries as they
    are (tail `truncate`) also where the student has more mass on them than the teacher.
    """
    names = positional_names(bound.function)
    if set(names) == {"student_logp", "teacher_logp"}:
        lacking, liked = torch.tensor([[-16.0], [-1e-6]], dtype=torch.float64)
        place = names.index("student_logp")
        slopes = [_slopes(end, lacking, liked, place=place) for end in _at_both_ends(bound)]
        return any(slope is not None and bool((slope == 0).all()) for slope in slopes)
    if set(names) != {"student_log_probs", "teacher_log_probs"}:
        return False
    place = names.index("student_log_probs")
    far = torch.tensor([[-8.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    rows = [(far.log_softmax(-1), (-far).log_softmax(-1), slice(0, 1))]
    if tail == "truncate":
        shape = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
        rows.append((shape + math.log(0.9), shape + math.log(0.2), slice(None)))
    for end in _at_both_ends(bound):
        for student, teacher, entries in rows:
            slope = _slopes(end, student, teacher, place=place)
            if slope is not None and bool((slope[:, entries] == 0).all()):
                return True
    return False

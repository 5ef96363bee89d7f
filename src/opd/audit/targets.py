"""Gradients that have a name, and which of them another gradient is.

A *claim* is a divergence, `jsd:0.3` say, or the reverse KL of whole responses. To tell what a loss
descends that is not what it claims, `identify` also knows families with a parameter that it fits,
truncated supports, sampled estimators that are no divergence, and sums of two.

Axes: S states, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.audit.toys import ORDINARY, Toy
from opd.audit.worlds import (
    World,
    local_gradient,
    sequence_reverse_kl_gradient,
)
from opd.errors import ConfigError, nearest
from opd.formula import divergence

__all__ = [
    "CLAIMS",
    "CLAIM_FORMS",
    "Claim",
    "Match",
    "claim_of",
    "credit_weights",
    "depth_of",
    "identify",
    "match",
    "toy_gradient",
    "tree_target",
]

Table = Float[Tensor, "S V"]
Divergence = Callable[[Tensor, Tensor], Tensor]
"""Of the log-probabilities of student and teacher, `[S, V]` each, to one number per state."""

SEQUENCE = "sequence_reverse_kl"
NO_CLAIM = "none"

PLAIN: dict[str, Divergence] = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "total_variation": divergence.total_variation,
    "squared_hellinger": divergence.squared_hellinger,
}
FAMILIES: dict[str, tuple[str, Callable[..., Tensor], tuple[float, float]]] = {
    "jsd": ("teacher_weight", divergence.generalized_jsd, (0.0, 1.0)),
    "skew_forward_kl": ("skew", divergence.skew_forward_kl, (0.0, 1.0)),
    "skew_reverse_kl": ("skew", divergence.skew_reverse_kl, (0.0, 1.0)),
    "alpha": ("alpha", divergence.alpha_divergence, (-2.0, 3.0)),
    "power": ("power", divergence.power_divergence, (0.0, 6.0)),
}
"""Divergences with a parameter: its name in `opd.formula.divergence`, and where to look for it."""

CLAIMS = (*PLAIN, *FAMILIES, SEQUENCE, NO_CLAIM)

CLAIM_FORMS = {
    "forward_kl": "KL(teacher || student) at every prefix",
    "reverse_kl": "KL(student || teacher)",
    "jsd[:WEIGHT]": "generalised Jensen-Shannon, WEIGHT on the teacher; 0.5 without one",
    "skew_forward_kl:SHARE": "forward KL to the student mixed with SHARE of the teacher",
    "skew_reverse_kl:SHARE": "reverse KL to the teacher mixed with SHARE of the student",
    "alpha:ALPHA": "Amari's alpha divergence",
    "power:POWER": "power divergence",
    "squared_hellinger": "squared Hellinger distance",
    "total_variation": "total variation",
    "sequence_reverse_kl": "reverse KL of whole responses",
    "none": "no divergence: that there is no fault",
}
"""How a claim is written, for people. Constants alone: `opd audit --help` reads them here."""

IN_WORDS = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "total_variation": "total variation",
    "squared_hellinger": "squared Hellinger distance",
    "jsd": "generalised JSD with weight {0:g} on the teacher",
    "skew_forward_kl": "forward KL to the student mixed with {0:g} of the teacher",
    "skew_reverse_kl": "reverse KL to the teacher mixed with {0:g} of the student",
    "alpha": "alpha divergence, alpha {0:g}",
    "power": "power divergence, power {0:g}",
    SEQUENCE: "reverse KL of whole responses",
    NO_CLAIM: "nothing in particular",
}


@dataclass(frozen=True)
class Claim:
    """What a loss is said to descend.

    Attributes:
        text: as the user wrote it, `jsd:0.5`.
        name: without the parameter.
        divergence: per state; None for a claim about whole responses, or for none.
    """

    text: str
    name: str
    divergence: Divergence | None

    @property
    def in_words(self) -> str:
        return words(self.text)


def words(text: str) -> str:
    """`jsd:0.5` as a person says it."""
    name, _, number = text.partition(":")
    return IN_WORDS[name].format(float(number)) if number else IN_WORDS[name]


def claim_of(text: str) -> Claim:
    """Read a claim.

    Raises:
        ConfigError: there is no such claim, or its parameter is missing or out of range.
    """
    name, _, number = text.partition(":")
    if name not in CLAIMS:
        hint = nearest(name, CLAIMS)
        hint = f"{hint} " if hint.startswith("Did") else ""
        written = ", ".join(CLAIM_FORMS)
        raise ConfigError(f"there is no claim {text!r}. {hint}Claims are {written}")
    if name not in FAMILIES:
        if number:
            raise ConfigError(f"the claim {name!r} takes no parameter, got {text!r}")
        return Claim(text, name, PLAIN.get(name))
    if name == "jsd" and not number:
        text, number = "jsd:0.5", "0.5"
    try:
        made = _member(name, float(number))
        made(*[torch.tensor([[0.4, 0.6]], dtype=torch.float64).log()] * 2)
    except ValueError as error:
        parameter = FAMILIES[name][0]
        raise ConfigError(
            f"the claim {text!r} needs a number as its {parameter}, as in {name}:0.3"
            + (f": {error}" if number else "")
        ) from error
    return Claim(text, name, made)


def toy_gradient(toy: Toy, what: Divergence) -> Table:
    """Of a divergence summed over the states of a toy."""
    student = toy.student.clone().requires_grad_()
    value = what(student.log_softmax(-1), toy.teacher.log_softmax(-1)).sum()
    return torch.autograd.grad(value, student)[0]


def tree_target(world: World, claim: Claim) -> Table:
    """What a loss that is called on whole responses would descend in expectation."""
    if claim.divergence is None:
        return sequence_reverse_kl_gradient(world)
    return local_gradient(world, claim.divergence)


# --------------------------------------------------------------------------------------------
# Comparing


@dataclass(frozen=True)
class Match:
    """How a gradient compares with one that has a name.

    Attributes:
        text: the name, as a claim is written, or in words where no claim is called so.
        cosine: between the two; NaN where either is zero.
        scale: the factor on the named one that comes closest.
        residual: what is left then, over the gradient's length; 0 where the two agree.
        is_claim: whether `text` is a claim.
    """

    text: str
    cosine: float
    scale: float
    residual: float
    is_claim: bool = True

    @property
    def in_words(self) -> str:
        return words(self.text) if self.is_claim else self.text


def match(
    gradient: Float[Tensor, "*n V"],
    target: Float[Tensor, "*n V"],
    text: str = "",
    *,
    is_claim: bool = True,
) -> Match:
    """Direction and factor of a gradient, as seen from one with a name."""
    size = float(target.norm())
    if not size or not bool(gradient.isfinite().all()):
        return Match(text, math.nan, math.nan, math.inf, is_claim)
    scale = float((gradient * target).sum()) / size**2
    length = float(gradient.norm())
    cosine = scale * size / length if length else math.nan
    residual = float((gradient - scale * target).norm()) / length if length else math.inf
    return Match(text, cosine, scale, residual, is_claim)


def identify(gradient: Table, *, tolerance: float) -> Match | None:
    """The name of what a loss descends on the ordinary toy, the plainest that fits; or None.

    Args:
        gradient: on `ORDINARY`.
        tolerance: the largest residual that is taken for rounding.
    """
    stages = (_plain_matches, _family_matches, _truncated_matches, _odd_matches, _sum_matches)
    for stage in stages:
        fits = [found for found in stage(gradient) if found.residual <= tolerance]
        ahead = [found for found in fits if found.scale > 0]
        if ahead or fits:
            return min(ahead or fits, key=lambda found: found.residual)
    return None


def nearest_match(gradient: Table) -> Match:
    """The plain divergence whose direction is the closest."""
    return max(
        (found for found in _plain_matches(gradient) if not math.isnan(found.cosine)),
        key=lambda found: found.cosine,
    )


def _plain_matches(gradient: Table) -> Iterator[Match]:
    for name, what in PLAIN.items():
        yield match(gradient, toy_gradient(ORDINARY, what), name)
    jsd = _member("jsd", 0.5)
    yield match(gradient, toy_gradient(ORDINARY, jsd), "jsd:0.5")


def _family_matches(gradient: Table) -> Iterator[Match]:
    for name, (_, _, (low, high)) in FAMILIES.items():
        yield _fitted(gradient, name, low, high)


def _fitted(gradient: Table, name: str, low: float, high: float) -> Match:
    """The member of a family that comes closest: a grid, then ever finer ones around its best."""

    def at(number: float) -> Match:
        text = f"{name}:{number:.6g}"
        return match(gradient, _family_gradient(name, number), text)

    def allowed(number: float) -> bool:
        """Inside, and not where a family has a limit of another name."""
        return low < number < high and f"{number:.6g}" not in ("0", "1")

    inside = [low + (high - low) * (n + 0.5) / 20 for n in range(20)]
    step = (high - low) / 20
    best = min(inside, key=lambda number: at(number).residual)
    while step > 1e-9:
        around = [best + step * n / 4 for n in range(-4, 5)]
        best = min(filter(allowed, around), key=lambda number: at(number).residual)
        step /= 4
        if step > 0.1 * (high - low) / 20:
            continue
        if at(best).residual > 1e-2:  # nothing of this family is near
            break
    rounded = round(best, 4)
    if allowed(rounded) and at(rounded).residual <= 1e-6:
        return at(rounded)
    return at(best)


@lru_cache(maxsize=4096)
def _family_gradient(name: str, number: float) -> Tensor:
    return toy_gradient(ORDINARY, _member(name, number))


def _member(name: str, number: float) -> Divergence:
    parameter, family, _ = FAMILIES[name]
    return partial(family, **{parameter: number})


# --------------------------------------------------------------------------------------------
# Truncated supports


class _Named(NamedTuple):
    text: str
    gradient: Tensor


def _truncated_matches(gradient: Table) -> Iterator[Match]:
    for text, target in _truncated():
        yield match(gradient, target, text, is_claim=False)


@lru_cache(maxsize=1)
def _truncated() -> tuple[_Named, ...]:
    """KLs on the k likeliest tokens of either side, with each way to treat the rest."""
    found = []
    vocabulary = ORDINARY.student.shape[1]
    treatments = {
        "the rest left out": _left_out,
        "both renormalised": _renormalised,
        "the teacher renormalised, the student whole": _teacher_renormalised,
        "the rest in one bucket": _bucket,
    }
    for side, k in itertools.product(("teacher", "student"), range(1, vocabulary)):
        ids = getattr(ORDINARY, side).topk(k).indices
        for direction, (rest, treat) in itertools.product(
            ("forward KL", "reverse KL"), treatments.items()
        ):
            what = partial(treat, ids=ids, forward=direction == "forward KL")
            text = f"{direction} on the {side}'s top {k}, {rest}"
            found.append(_Named(text, toy_gradient(ORDINARY, what)))
        stopped = partial(_stopped, ids=ids)
        text = f"reverse KL on the {side}'s top {k}, the rest left out, its score stopped"
        found.append(_Named(text, toy_gradient(ORDINARY, stopped)))
    return tuple(found)


def _kl(student: Tensor, teacher: Tensor, forward: bool) -> Tensor:
    first, second = (teacher, student) if forward else (student, teacher)
    return (first.exp() * (first - second)).sum(-1)


def _left_out(student: Tensor, teacher: Tensor, *, ids: Tensor, forward: bool) -> Tensor:
    return _kl(student.gather(-1, ids), teacher.gather(-1, ids), forward)


def _renormalised(student: Tensor, teacher: Tensor, *, ids: Tensor, forward: bool) -> Tensor:
    student, teacher = (side.gather(-1, ids).log_softmax(-1) for side in (student, teacher))
    return _kl(student, teacher, forward)


def _teacher_renormalised(
    student: Tensor, teacher: Tensor, *, ids: Tensor, forward: bool
) -> Tensor:
    return _kl(student.gather(-1, ids), teacher.gather(-1, ids).log_softmax(-1), forward)


def _bucket(student: Tensor, teacher: Tensor, *, ids: Tensor, forward: bool) -> Tensor:
    def binned(side: Tensor) -> Tensor:
        chosen = side.gather(-1, ids)
        rest = (1 - chosen.exp().sum(-1, keepdim=True)).log()
        return torch.cat([chosen, rest], -1)

    return _kl(binned(student), binned(teacher), forward)


def _stopped(student: Tensor, teacher: Tensor, *, ids: Tensor) -> Tensor:
    student, teacher = student.gather(-1, ids), teacher.gather(-1, ids)
    return ((student.exp() * (student - teacher)).detach() * student).sum(-1)


# --------------------------------------------------------------------------------------------
# Sampled estimators that are no divergence, and sums


def _odd_matches(gradient: Table) -> Iterator[Match]:
    for text, target in _odd():
        yield match(gradient, target, text, is_claim=False)


@lru_cache(maxsize=1)
def _odd() -> tuple[_Named, ...]:
    student, teacher = ORDINARY.student.log_softmax(-1), ORDINARY.teacher.log_softmax(-1)
    ratio = teacher - student
    rewards = {
        "the k3 value as a penalty of the sampled token": -(ratio.exp() - 1 - ratio),
        "the k2 value as a penalty of the sampled token": -(ratio**2) / 2,
        "the sign of the log-ratio as the sampled token's reward": ratio.sign(),
        "the teacher's log-probability as the sampled token's reward": teacher,
        "the teacher's probability as the sampled token's reward": teacher.exp(),
        "the difference of probabilities as the sampled token's reward": teacher.exp()
        - student.exp(),
    }
    found = [
        _Named(text, toy_gradient(ORDINARY, partial(_rewarded, reward=reward)))
        for text, reward in rewards.items()
    ]
    for name, forward in (("reverse", False), ("forward", True)):
        what = partial(_two_bins, forward=forward)
        text = f"{name} KL of two bins, the sampled token and the rest"
        found.append(_Named(text, toy_gradient(ORDINARY, what)))
    negentropy = toy_gradient(ORDINARY, _negentropy)
    found.append(_Named("minus the student's entropy: it grows surer", negentropy))
    found.append(_Named("the student's entropy: it grows less sure", -negentropy))
    return tuple(found)


def _rewarded(student: Tensor, teacher: Tensor, *, reward: Tensor) -> Tensor:
    """The loss whose gradient is a policy gradient's: minus the expected reward."""
    return -(student.exp() * reward).sum(-1)


def _two_bins(student: Tensor, teacher: Tensor, *, forward: bool) -> Tensor:
    """Over tokens that the student writes, of the token's probability against its complement's."""

    def bins(side: Tensor) -> Tensor:
        return torch.stack([side, torch.log1p(-side.exp())], -1)

    return (student.detach().exp() * _kl(bins(student), bins(teacher), forward)).sum(-1)


def _negentropy(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * student).sum(-1)


def _sum_matches(gradient: Table) -> Iterator[Match]:
    for (first, one), (second, other) in itertools.combinations(_summands(), 2):
        basis = torch.stack([one.flatten(), other.flatten()], 1)
        weights = torch.linalg.lstsq(basis, gradient.flatten()[:, None]).solution.flatten()
        if not bool(weights.isfinite().all()):
            continue
        target = (basis @ weights).view_as(gradient)
        a, b = weights.tolist()
        text = f"{a:.3g} x {first} {'+' if b > 0 else '-'} {abs(b):.3g} x {second}"
        yield match(gradient, target, text, is_claim=False)


@lru_cache(maxsize=1)
def _summands() -> tuple[_Named, ...]:
    def named(text: str, what: Divergence) -> _Named:
        return _Named(text, toy_gradient(ORDINARY, what))

    return (
        named("reverse KL", divergence.reverse_kl),
        named("forward KL", divergence.forward_kl),
        named("JSD", _member("jsd", 0.5)),
        named("minus the student's entropy", _negentropy),
        named("cross-entropy of the teacher's likeliest token", _hard),
    )


def _hard(student: Tensor, teacher: Tensor) -> Tensor:
    return -student.gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1)


# --------------------------------------------------------------------------------------------
# Credit along a response


def credit_weights(
    gradient: Table, world: World, *, live: bool = False
) -> tuple[Float[Tensor, "T T"], float]:
    """How much a token is credited for the log-ratio of each token from it on.

        gradient = -sum over t, k >= t of w(t, k) * E[r_k * grad log student(y_t)]

    Args:
        live: of log-ratios that carry a gradient, which adds w(t, t) times that of minus the
            entropy: of the later ones the mean score at their own prefix is zero.

    Returns:
        w, zero where k < t, and the length of what no w explains over the gradient's.
    """
    horizon = world.horizon
    pairs = [(t, k) for t in range(horizon) for k in range(t, horizon)]
    basis = torch.stack([_credited(world, t, k, live).flatten() for t, k in pairs], 1)
    target = gradient.flatten()[:, None]
    solution = torch.linalg.lstsq(basis, target, driver="gelsd").solution
    left = float((target - basis @ solution).norm() / target.norm())
    weights = torch.zeros(horizon, horizon, dtype=torch.float64)
    for (t, k), weight in zip(pairs, solution.flatten().tolist(), strict=True):
        weights[t, k] = weight
    return weights, left


def _credited(world: World, t: int, k: int, live: bool) -> Table:
    """-E[r_k grad log student(y_t)] on a tree, each row of which has one time."""
    student = world.student_logits.clone().requires_grad_()
    logp, teacher = student.log_softmax(-1), world.views["teacher"].log_softmax(-1)
    reward = (teacher - logp).detach()
    depth = depth_of(world)
    later = torch.where((depth == k)[:, None], reward, torch.zeros_like(reward))
    held = logp.detach()
    for level in range(k - 1, t - 1, -1):
        expected = (held.exp() * later).sum(-1)
        at = torch.where(world.next_state < 0, 0.0, expected[world.next_state.clamp(min=0)])
        later = torch.where((depth == level)[:, None], at, later)
    reached = _reach(world, held)
    here = (depth == t)[:, None] * reached[:, None]
    chosen = here * held.exp() * later
    if live and k == t:
        chosen = chosen - here * held.exp() * held
    return torch.autograd.grad(-(chosen * logp).sum(), student)[0]


def depth_of(world: World) -> Int[Tensor, " S"]:
    """How many tokens lead to each state of a tree."""
    depth = torch.zeros(len(world.next_state), dtype=torch.long)
    for state, following in enumerate(world.next_state.tolist()):
        for after in following:
            if after >= 0:
                depth[after] = depth[state] + 1
    return depth


def _reach(world: World, logp: Tensor) -> Tensor:
    reached = torch.zeros(len(logp), dtype=torch.float64)
    reached[0] = 1.0
    for state, following in enumerate(world.next_state.tolist()):
        for token, after in enumerate(following):
            if after >= 0:
                reached[after] = reached[state] * logp[state, token].exp()
    return reached

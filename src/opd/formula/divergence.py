"""Divergences between the student and a view over a support, per position.

A divergence takes two log-distributions over the same entries and returns one number per position
with its exact gradient; on student text the prefixes are fixed data, so it is the gradient of the
local divergence, not of the sequence's. On normalised entries it is never negative, up to
rounding, and zero for equal ones. With h(v) = dD / d student(v), the gradient on the logits of the
entries is

        dD / d logit(j) = student(j) * (h(j) - sum_v student(v) * h(v))

so an entry that the student never uses receives none, whatever the teacher wants. Each docstring
states where this vanishes for a student with mass on every entry, which every softmax of finite
logits has: "student = teacher" then means on the entries that are compared, and `support.TAILS`
says what each tail rule leaves free. Entries without mass on one side or on both are exact limits;
an infinite value has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.fields import counted
from opd.formula.numerics import expectation, log_mixture
from opd.schedule import Schedule

__all__ = [
    "alpha_divergence",
    "candidate_advantage_loss",
    "capped_forward_kl",
    "corrected_k3",
    "forward_kl",
    "forward_kl_k3",
    "generalized_jsd",
    "hybrid_policy",
    "jensen_shannon",
    "power_divergence",
    "renyi_divergence",
    "reverse_kl",
    "reverse_kl_k2",
    "skew_forward_kl",
    "skew_reverse_kl",
    "squared_hellinger",
    "total_variation",
    "truncated_reverse_kl",
]

ON_RAW_ENTRIES = frozenset({"candidate_advantage_loss", "forward_kl", "truncated_reverse_kl"})
"""Divergences that mean something on entries which sum to less than one (the tail `truncate`)."""


def is_infinite_on_restricted_teacher(name: str, knobs: Mapping[str, float | Schedule]) -> bool:
    """Whether a divergence is infinite where the student has mass and the teacher has none.

    With the tail `teacher_renormalise` that is every position.

    Args:
        name: of a function of this module.
        knobs: its knobs; for a schedule, whether any value it can take makes it so.
    """
    if name == "alpha_divergence":
        alpha = knobs["alpha"]
        return min(alpha.reachable() if isinstance(alpha, Schedule) else (alpha,)) < 0
    return name in ("reverse_kl", "truncated_reverse_kl", "candidate_advantage_loss")


def forward_kl(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Forward Kullback-Leibler divergence, teacher to student, in nats.

        D = sum_v teacher(v) * (log teacher(v) - log student(v))

    Covers the teacher's mass: its gradient on the student's logits is `student - teacher`.
    Infinite where the student puts no mass on an entry the teacher uses. With a bucket it is the
    full divergence less `teacher(tail) * KL(teacher | tail || student | tail)`.

    Stationary only at student = teacher. On raw entries (tail `truncate`), of teacher mass P and
    student mass Q, it is `P * (KL of the conditionals + log(P / Q))`, of either sign, and P times
    the gradient of `teacher_renormalise`: the student's tail is driven to zero.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.

    Returns:
        One divergence per position, >= 0 on normalised entries.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, at
    temperature 1; on student text Agarwal et al., arXiv:2306.13649.
    """
    return expectation(teacher_log_probs, teacher_log_probs - student_log_probs)


def _over_the_cap(
    student_log_probs: Float[Tensor, "*n K"],
    teacher_log_probs: Float[Tensor, "*n K"],
    *,
    cap: float,
) -> Bool[Tensor, "*n"]:
    terms = _forward_terms(student_log_probs.detach(), teacher_log_probs)
    return (terms > cap).any(-1)


@counted(_over_the_cap)
def capped_forward_kl(
    student_log_probs: Float[Tensor, "*n K"],
    teacher_log_probs: Float[Tensor, "*n K"],
    *,
    cap: float,
) -> Float[Tensor, "*n"]:
    """A forward KL of which every entry contributes at most so much, in nats.

        L = sum_v min(teacher(v) * (log teacher(v) - log student(v)), cap)

    No divergence: negative where the entries that are cut off would have made it positive. An entry
    that is cut off has no gradient, so the tokens that the student misses most are not taught; the
    share of positions with such an entry is logged. Stationary at student = teacher, and wherever
    what is left balances.

    Args:
        student_log_probs: carries the gradient.
        teacher_log_probs: over the same entries.
        cap: in nats, > 0.

    Source: OPSD, arXiv:2601.18734, with 0.05.
    """
    if not cap > 0.0:
        raise ValueError(f"cap must be positive, got {cap}; it is a contribution in nats")
    return _forward_terms(student_log_probs, teacher_log_probs).clamp(max=cap).sum(-1)


def reverse_kl(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Reverse Kullback-Leibler divergence, student to teacher, in nats.

        D = sum_v student(v) * (log student(v) - log teacher(v))

    Seeks the teacher's modes: its gradient on the student's logits is
    `student * (log student - log teacher - D)`. Infinite where the teacher puts no mass on an entry
    the student uses. With a bucket it is the full divergence less
    `student(tail) * KL(student | tail || teacher | tail)`.

    Stationary only at student = teacher; not on raw entries, where the gradient also descends the
    student's mass on the support: an entry rises only if the teacher gives it more than e times the
    student's mass. That collapses (arXiv:2605.11182); `truncated_reverse_kl` does not.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.

    Returns:
        One divergence per position, >= 0 on normalised entries.

    Source: Gu et al., MiniLLM, arXiv:2306.08543; Agarwal et al., arXiv:2306.13649.
    """
    return expectation(student_log_probs, student_log_probs - teacher_log_probs)


def truncated_reverse_kl(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Stop-gradient reverse KL on raw entries, in nats.

        D = sum_v student(v) * (log student(v) - log teacher(v))
        grad D = sum_v stop[student(v) * (log student(v) - log teacher(v))] * grad log student(v)

    The gradient is not the derivative of the value: it leaves out the gradient of the student's
    mass on the support, which is zero where the support is everything and drains it elsewhere. Of
    either sign on raw entries (tail `truncate`); on normalised ones value and gradient are those of
    `reverse_kl`. Infinite where the teacher puts no mass on an entry the student uses.

    Stationary only at student = teacher on the support, the student's tail free; or, without a
    student tail, at the teacher's conditional.

    Args:
        student_log_probs: entries of the student's whole distribution; carries the gradient.
        teacher_log_probs: the same entries of the teacher's; carries none.

    Returns:
        One number per position.

    Source: arXiv:2605.11182, Eq. 12.
    """
    weights = student_log_probs.detach()
    log_ratio = weights - teacher_log_probs.detach()
    value = expectation(weights, log_ratio)
    finite = torch.where(log_ratio.isfinite(), log_ratio, 0.0)
    carrier = expectation(weights, finite * student_log_probs)
    return value + (carrier - carrier.detach())


def candidate_advantage_loss(
    student_log_probs: Float[Tensor, "*n K"],
    student_support_logp: Float[Tensor, "*n K"],
    teacher_support_logp: Float[Tensor, "*n K"],
) -> Float[Tensor, "*n"]:
    """The entries of a support, each scored with its own log ratio, weighted with the student.

        L = -sum_v stop[s(v) * (log teacher(v) - log student(v))] * log student(v)

    s is the student on the support by its tail rule, the other two are as they are. With the tail
    `truncate` its gradient is that of `truncated_reverse_kl`; with `renormalise` it is that divided
    by the student's mass on the support. The value is no divergence. Stationary where the two agree
    on the support; elsewhere it also moves the mass on the support, out of it where the student is
    surer of it than the teacher. Against a view that is not normalised the ratio is its score less
    the student's.

    Args:
        student_log_probs: the student on the support, whose weights these are.
        student_support_logp: the student as it is; carries the gradient.
        teacher_support_logp: the view as it is.

    Returns:
        One number per position, of either sign; 0 where the two agree, infinite where the view
        gives no mass to an entry that the student uses.

    Source: the candidates of arXiv:2604.13016 and its code, weighted with the student; against the
    log ratio of two teachers, arXiv:2607.05394.
    """
    weight, own = student_log_probs.detach(), student_support_logp.detach()
    log_ratio = own - teacher_support_logp.detach()
    excess = weight.exp() * torch.where(own == -math.inf, 0.0, log_ratio)
    return _scored(excess, student_support_logp)


def hybrid_policy(
    student_log_probs: Float[Tensor, "*n V"],
    teacher_log_probs: Float[Tensor, "*n V"],
    tokens: Int[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """A data token pulled up, and what the student would say too often in its place pushed down.

        k(v) = stop[student(v) * (log teacher(v) - log student(v))],  y the data's token
        w = teacher(y) * (1 + stop[sum_{v: k(v) < 0} student(v)]) + k(y) where k(y) > 0
        w = k(y) elsewhere
        L = -w * log student(y) - sum_{v != y, k(v) < 0} stop[student(v) * k(v)] * log student(v)

    The mean, over one token that the student draws at the data's prefix, of the published rule. No
    divergence; at student = teacher only the first part is left, and it vanishes there too.

    Args:
        student_log_probs: over the whole vocabulary; carries the gradient.
        teacher_log_probs: over the same entries.
        tokens: the data's.

    Source: HPD, arXiv:2604.20244, from its code; the expectation is ours.
    """
    own, teacher = student_log_probs.detach(), teacher_log_probs.detach()
    student = own.exp()
    k = torch.where(student > 0, student * (teacher - own), 0.0)
    is_token = tokens.unsqueeze(-1) == torch.arange(own.shape[-1], device=own.device)
    pulled = torch.where(is_token, k, 0.0).sum(-1)
    overrated = torch.where(k < 0, student, 0.0)
    teacher_token = torch.where(is_token, teacher.exp(), 0.0).sum(-1)
    gain = teacher_token * (1.0 + overrated.sum(-1))
    weight = pulled + torch.where(pulled > 0, gain, 0.0)
    pushed = torch.where(is_token, 0.0, torch.where(k < 0, overrated * k, 0.0))
    return -_scored(torch.where(is_token, weight.unsqueeze(-1), pushed), student_log_probs)


def renyi_divergence(
    student_log_probs: Float[Tensor, "*n K"],
    teacher_log_probs: Float[Tensor, "*n K"],
    *,
    order: float,
) -> Float[Tensor, "*n"]:
    """The Renyi divergence of the teacher from the student, in nats.

        D = log(sum_v teacher(v)^a * student(v)^(1 - a)) / (a - 1),  a = order

    Tends to the forward KL as a -> 1. A monotone function of `alpha_divergence`, whose gradient it
    divides by the overlap of the two: where they share little, it pulls harder. Its gradient on the
    logits is `student - m`, m proportional to teacher^a student^(1 - a). Stationary only at
    student = teacher. Infinite where the two share no entry.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.
        order: a, strictly between 0 and 1.

    Source: Renyi, On Measures of Entropy and Information, 1961; SR-OPSD, arXiv:2608.09745.
    """
    if not 0.0 < order < 1.0:
        raise ValueError(f"order must lie strictly between 0 and 1, got {order}; at 1: forward_kl")
    empty = (student_log_probs == -math.inf) | (teacher_log_probs == -math.inf)
    student = torch.where(empty, 0.0, student_log_probs)
    teacher = torch.where(empty, 0.0, teacher_log_probs)
    apart = empty.all(-1, keepdim=True)
    together = torch.where(empty & ~apart, -math.inf, order * teacher + (1 - order) * student)
    divergence = (together.logsumexp(-1) / (order - 1)).clamp(min=0.0)
    massless = (student_log_probs == -math.inf).all(-1) | (teacher_log_probs == -math.inf).all(-1)
    distance = torch.where(apart.squeeze(-1), math.inf, divergence)
    return torch.where(massless, 0.0, distance)


def corrected_k3(
    student_logp: Float[Tensor, "*n"],
    teacher_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """The k3 estimator times the importance ratio: its gradient is the reverse KL's.

        L = (student / old) * (exp(r) - 1 - r),  r = teacher_logp - student_logp

    Back-propagated through the ratio too, the expected gradient at the old policy's prefixes is
    that of KL(student || teacher): the part through the ratio makes good what `forward_kl_k3` gets
    wrong. On the weights of the rollout its gradient is -r times the score. Stationary, in
    expectation, at student = teacher.

    Args:
        student_logp: of the sampled token; carries the gradient.
        teacher_logp: of the same token.
        old_logp: under the trainer's weights at rollout time.

    Returns:
        One number per token, >= 0.

    Source: Skill-SD, arXiv:2604.10674.
    """
    value = forward_kl_k3(student_logp, teacher_logp)
    infinite = value.isinf() | value.isnan()
    ratio = torch.where(infinite, 0.0, student_logp - old_logp.detach()).exp()
    return torch.where(infinite, math.inf, ratio * torch.where(infinite, 0.0, value))


def jensen_shannon(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """The Jensen-Shannon divergence: the generalized one at equal weights, in nats.

        D = 1/2 KL(teacher || m) + 1/2 KL(student || m),  m = (teacher + student) / 2

    Symmetric, between 0 and log 2. Stationary only at student = teacher.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.

    Source: Lin, Divergence Measures Based on the Shannon Entropy, doi:10.1109/18.61115.
    """
    return generalized_jsd(student_log_probs, teacher_log_probs, teacher_weight=0.5)


def generalized_jsd(
    student_log_probs: Float[Tensor, "*n K"],
    teacher_log_probs: Float[Tensor, "*n K"],
    *,
    teacher_weight: float,
) -> Float[Tensor, "*n"]:
    """Generalized Jensen-Shannon divergence, in nats.

        m = w * teacher + (1 - w) * student
        D = w * KL(teacher || m) + (1 - w) * KL(student || m)

    Bounded and finite even where one side puts no mass. D / w tends to the forward KL as
    w -> 0, and D / (1 - w) to the reverse KL as w -> 1. At most the entropy of (w, 1 - w).
    Stationary only at student = teacher.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.
        teacher_weight: w, the share of the teacher in the mixture; strictly between 0 and 1.

    Returns:
        One divergence per position, >= 0, and 0 only where the two agree.

    Source: Agarwal et al., On-Policy Distillation of Language Models, arXiv:2306.13649.
    """
    if not 0.0 < teacher_weight < 1.0:
        raise ValueError(
            f"teacher_weight must lie strictly between 0 and 1, got {teacher_weight}; "
            "at the end points D is 0 for any pair: use forward_kl or reverse_kl"
        )
    w = teacher_weight
    mixture = log_mixture(teacher_log_probs, student_log_probs, weight=w)
    teacher_part = expectation(teacher_log_probs, teacher_log_probs - mixture)
    student_part = expectation(student_log_probs, student_log_probs - mixture)
    return w * teacher_part + (1 - w) * student_part


def skew_forward_kl(
    student_log_probs: Float[Tensor, "*n K"],
    teacher_log_probs: Float[Tensor, "*n K"],
    *,
    skew: float,
) -> Float[Tensor, "*n"]:
    """Forward KL to a student that is mixed with the teacher, in nats.

        m = skew * teacher + (1 - skew) * student
        D = KL(teacher || m)

    Finite even where the student puts no mass: at most log(1 / skew). Tends to the forward KL as
    skew -> 0 and to 0 as skew -> 1. Stationary only at student = teacher.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.
        skew: share of the teacher in the mixture; strictly between 0 and 1.

    Returns:
        One divergence per position, >= 0, and 0 only where the two agree.

    Source: Ko et al., DistiLLM, arXiv:2402.03898.
    """
    _check_skew(skew, "forward_kl")
    mixture = log_mixture(teacher_log_probs, student_log_probs, weight=skew)
    return expectation(teacher_log_probs, teacher_log_probs - mixture)


def skew_reverse_kl(
    student_log_probs: Float[Tensor, "*n K"],
    teacher_log_probs: Float[Tensor, "*n K"],
    *,
    skew: float,
) -> Float[Tensor, "*n"]:
    """Reverse KL to a teacher that is mixed with the student, in nats.

        m = skew * student + (1 - skew) * teacher
        D = KL(student || m)

    Finite even where the teacher puts no mass: the log ratio is at most log(1 / skew). Tends to
    the reverse KL as skew -> 0 and to 0 as skew -> 1. The gradient flows through the mixture too.
    Stationary only at student = teacher.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.
        skew: share of the student in the mixture; strictly between 0 and 1.

    Returns:
        One divergence per position, >= 0, and 0 only where the two agree.

    Source: Ko et al., DistiLLM, arXiv:2402.03898.
    """
    _check_skew(skew, "reverse_kl")
    mixture = log_mixture(student_log_probs, teacher_log_probs, weight=skew)
    return expectation(student_log_probs, student_log_probs - mixture)


def alpha_divergence(
    student_log_probs: Float[Tensor, "*n K"],
    teacher_log_probs: Float[Tensor, "*n K"],
    *,
    alpha: float,
) -> Float[Tensor, "*n"]:
    """Amari's alpha-divergence, without a unit.

        D = (1 - sum_v teacher(v)^alpha * student(v)^(1 - alpha)) / (alpha * (1 - alpha))

    Tends to the reverse KL as alpha -> 0 and to the forward KL as alpha -> 1; alpha = 1/2 is four
    times `squared_hellinger`. Finite for 0 < alpha < 1; infinite for alpha > 1 where the student,
    and for alpha < 0 where the teacher, has no mass on an entry that the other one uses.
    Stationary only at student = teacher.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.
        alpha: the teacher's exponent; any number but 0 and 1.

    Returns:
        One divergence per position, >= 0, and 0 only where the two agree.

    Source: Amari, Differential-Geometrical Methods in Statistics (1985); a choice of D in Eq. 2 of
    the survey, arXiv:2606.22793.
    """
    if alpha in (0.0, 1.0):
        limit = "forward_kl" if alpha else "reverse_kl"
        raise ValueError(f"alpha must be neither 0 nor 1, got {alpha}; its limit there is {limit}")
    # For normalised rows D is the sum of alpha * t + (1 - alpha) * s - t^alpha * s^(1 - alpha).
    # With r the smaller over the larger of t and s, and e the smaller's exponent, each summand is
    # larger * (e * (r - 1) - (r^e - 1)): never negative, and exact for small ratios and exponents.
    teacher_is_smaller = teacher_log_probs < student_log_probs
    larger = torch.where(teacher_is_smaller, student_log_probs, teacher_log_probs)
    difference = teacher_log_probs - student_log_probs
    log_ratio = torch.where(teacher_is_smaller, difference, -difference)
    log_ratio = torch.where(larger == -math.inf, 0.0, log_ratio)
    exponent = torch.where(
        teacher_is_smaller, log_ratio.new_tensor(alpha), log_ratio.new_tensor(1.0 - alpha)
    )
    summand = exponent * torch.expm1(log_ratio) - _expm1(exponent * log_ratio)
    return expectation(larger, summand / (alpha * (1.0 - alpha)))


def squared_hellinger(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Squared Hellinger distance, without a unit.

        D = 1/2 * sum_v (sqrt(teacher(v)) - sqrt(student(v)))^2
          = 1 - sum_v sqrt(teacher(v) * student(v))

    Symmetric, between 0 and 1, finite with a finite gradient at zero mass. A quarter of Amari's
    alpha-divergence at 1/2, which other texts call by the same name. Stationary only at student =
    teacher.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.

    Returns:
        One divergence per position, between 0 and 1, and 0 only where the two agree.

    Source: Hellinger (1909); a choice of D in Eq. 2 of the survey, arXiv:2606.22793.
    """
    # Roots by half the logarithm: the square root of a probability has no slope at zero.
    difference = (0.5 * teacher_log_probs).exp() - (0.5 * student_log_probs).exp()
    return 0.5 * difference.square().sum(-1)


def power_divergence(
    student_log_probs: Float[Tensor, "*n K"],
    teacher_log_probs: Float[Tensor, "*n K"],
    *,
    power: float,
) -> Float[Tensor, "*n"]:
    """Density-power (beta) divergence with beta = 1 + power, without a unit.

        D = sum_v [ student^(1 + a) / (a * (1 + a)) - student * teacher^a / a
                    + teacher^(1 + a) / (1 + a) ],  a = power

    The Bregman divergence of x^(1 + a) / (a * (1 + a)). Tends to the reverse KL as a -> 0; at
    a = 1 it is half the squared distance, 1/2 * sum_v (student - teacher)^2. Bounded, and finite
    at zero mass. Its slope is h = (student^a - teacher^a) / a, so its policy gradient has the
    advantage (teacher^a - student^a) / a: `reward.power_reward` is a times that.

    Entries of little mass hardly count, the less the larger a. No f-divergence: merging entries
    may raise it, so with a bucket it bounds the full divergence on neither side. Stationary only
    at student = teacher.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.
        power: a > 0.

    Returns:
        One divergence per position, >= 0, and 0 only where the two agree.

    Source: Basu et al., Biometrika 85(3), 1998; as a distillation reward PowerOPD,
    arXiv:2606.17199.
    """
    if not power > 0.0:
        raise ValueError(
            f"power must be > 0, got {power}; its limit at 0 is reverse_kl, and below 0 it is "
            "infinite where one side has no mass"
        )
    student, teacher = student_log_probs.exp(), teacher_log_probs.exp()
    student_power, teacher_power = (
        (power * student_log_probs).exp(),
        (power * teacher_log_probs).exp(),
    )
    # The three summands, grouped into differences that are exact where the two sides are close.
    slope_part = student * (student_power - teacher_power) / power
    total_part = (student * student_power - teacher * teacher_power) / (1.0 + power)
    return (slope_part - total_part).sum(-1)


def total_variation(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Total variation distance: the mass that would have to move, between 0 and 1.

        D = 1/2 * sum_v |student(v) - teacher(v)|

    Its gradient knows the sign of a difference, not its size: it does not fade on the way to the
    teacher, and close to it follows the signs of rounding errors. An entry where the two are equal
    contributes a slope of zero. Stationary only at student = teacher.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.

    Returns:
        One distance per position, between 0 and 1, and 0 only where the two agree.

    Source: Wen et al., f-divergence minimization for sequence-level knowledge distillation,
    arXiv:2307.15190.
    """
    return 0.5 * (student_log_probs.exp() - teacher_log_probs.exp()).abs().sum(-1)


# --------------------------------------------------------------------------------------------
# From the sampled token alone: what these are is their gradient, in expectation


def reverse_kl_k2(
    student_logp: Float[Tensor, "*n"], teacher_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The k2 estimator at the sampled token: its gradient is the reverse KL's in expectation.

        L = 1/2 * (teacher_logp - student_logp)^2

    Back-propagated on tokens of the current student, the expected gradient is exactly that of
    KL(student || teacher): the policy gradient with the log ratio as its reward. The value is no
    unbiased estimate of any KL. On older tokens nothing of this holds. Stationary, in
    expectation, where the reverse KL on the whole vocabulary is: student = teacher.

    k1, `student_logp - teacher_logp`, is not offered: back-propagated, the teacher drops out and
    the expected gradient is zero. It is a reward, `reward.teacher_log_ratio`.

    Args:
        student_logp: of the sampled token; carries the gradient.
        teacher_logp: of the same token.

    Returns:
        One number per token, >= 0.

    Source: Schulman, Approximating KL Divergence (2020); which gradients follow: survey
    arXiv:2606.22793, Eqs. 5-6 with the score identity.
    """
    log_ratio = teacher_logp - student_logp
    infinite = log_ratio.isinf()
    half_square = 0.5 * torch.where(infinite, 0.0, log_ratio).square()
    return torch.where(infinite, math.inf, half_square)


def forward_kl_k3(
    student_logp: Float[Tensor, "*n"], teacher_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The k3 estimator at the sampled token: its gradient is the forward KL's in expectation.

        L = exp(r) - 1 - r,  r = teacher_logp - student_logp

    Back-propagated on tokens of the current student, the expected gradient is exactly that of
    KL(teacher || student), by importance sampling: its spread grows with exp(r). The value, on the
    other hand, is unbiased for KL(student || teacher). On older tokens neither holds. Stationary,
    in expectation, at student = teacher on the whole vocabulary.

    Args:
        student_logp: of the sampled token; carries the gradient.
        teacher_logp: of the same token.

    Returns:
        One number per token, >= 0.

    Source: Schulman, Approximating KL Divergence (2020); which gradients follow: survey
    arXiv:2606.22793, Eqs. 5-6 with the score identity.
    """
    log_ratio = teacher_logp - student_logp
    overflows = torch.expm1(log_ratio.detach()).isinf()
    log_ratio = torch.where(overflows, 0.0, log_ratio)
    return torch.where(overflows, math.inf, torch.expm1(log_ratio) - log_ratio)


def student_entropy(student_log_probs: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """Entropy of the student on the support, in nats; between 0 and log K."""
    return -expectation(student_log_probs, student_log_probs)


def teacher_entropy(teacher_log_probs: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """Entropy of the view on the support, in nats; between 0 and log K."""
    return -expectation(teacher_log_probs, teacher_log_probs)


def _forward_terms(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n K"]:
    """What each entry contributes to a forward KL; 0, and no gradient, where the teacher is 0."""
    used = teacher_log_probs > -math.inf
    endless = used & (student_log_probs == -math.inf)
    counts = used & ~endless
    student = torch.where(counts, student_log_probs, 0.0)
    teacher = torch.where(counts, teacher_log_probs, 0.0)
    finite = torch.where(counts, teacher.exp() * (teacher - student), 0.0)
    return torch.where(endless, math.inf, finite)


def _scored(
    coefficients: Float[Tensor, "*n K"], log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Sum of detached coefficients times log-probabilities; entries without mass count nothing.

    Infinite, and without gradient, where a coefficient is.
    """
    empty = log_probs.detach() == -math.inf
    coefficients = torch.where(empty, 0.0, coefficients)
    infinite = coefficients.isinf()
    scores = torch.where(empty | infinite.any(-1, keepdim=True), 0.0, log_probs)
    total = (torch.where(infinite, 0.0, coefficients) * scores).sum(-1)
    return torch.where(infinite.any(-1), math.inf, total)


def _expm1(exponents: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
    """`exp(x) - 1`, without a gradient where it overflows."""
    overflows = torch.expm1(exponents.detach()).isinf()
    return torch.where(overflows, math.inf, torch.expm1(torch.where(overflows, 0.0, exponents)))


def _check_skew(skew: float, limit: str) -> None:
    if not 0.0 < skew < 1.0:
        raise ValueError(
            f"skew must lie strictly between 0 and 1, got {skew}; without skew use {limit}, and at "
            "1 the divergence is 0 for any pair"
        )

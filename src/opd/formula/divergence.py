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
from jaxtyping import Float
from torch import Tensor

from opd.formula.numerics import expectation, log_mixture
from opd.schedule import Schedule

__all__ = [
    "alpha_divergence",
    "forward_kl",
    "forward_kl_k3",
    "generalized_jsd",
    "power_divergence",
    "reverse_kl",
    "reverse_kl_k2",
    "skew_forward_kl",
    "skew_reverse_kl",
    "squared_hellinger",
    "total_variation",
    "truncated_reverse_kl",
]

ON_RAW_ENTRIES = frozenset({"forward_kl", "truncated_reverse_kl"})
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
    return name in ("reverse_kl", "truncated_reverse_kl")


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

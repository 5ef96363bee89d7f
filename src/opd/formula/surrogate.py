"""Surrogates: losses whose gradient is the score of the sampled token times its advantage.

All but `tail_residual` differentiate the sampled token's log-probability and nothing else. The
ratio-based ones correct the choice of the token; the prefixes stay those of the policy that
sampled, and the advantage should be recomputed under the student of the moment: a cached log
ratio changes the objective (`reward.cached_log_ratio`).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.fields import counted

__all__ = [
    "clipped",
    "dual_clipped",
    "geometric_ratio",
    "importance",
    "masked_importance",
    "score",
    "shaped_probability",
    "tail_residual",
    "truncated_importance",
]


def score(student_logp: Float[Tensor, "*n"], advantage: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The score-function loss, in nats times the unit of the advantage.

        L = -A * log student(token)

    Its gradient is `-A` times the score, exact where the student sampled the token itself.

    Args:
        student_logp: carries the gradient.
        advantage: detached.

    Source: Williams, doi:10.1007/BF00992696 (REINFORCE).
    """
    return -advantage.detach() * student_logp


def importance(
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """The importance-ratio loss, in the unit of the advantage.

        ratio = exp(log student(token) - log old(token))
        L = -ratio * A

    With the log ratio recomputed under the student it is unbiased, over tokens of the old policy,
    for the local reverse KL at the prefixes of the old policy; what remains is that those prefixes
    are the old policy's. Equal in gradient to `score` while the weights are those of the rollout.
    The ratio is unbounded, and so is the variance.

    Args:
        student_logp: carries the gradient.
        old_logp: under the trainer's weights at rollout time.
        advantage: detached.

    Source: the surrogate of conservative policy iteration, Eq. 6 of arXiv:1707.06347.
    """
    return -(student_logp - old_logp.detach()).exp() * advantage.detach()


def _left_the_range(
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    low: float,
    high: float,
) -> Bool[Tensor, "*n"]:
    return _held((student_logp - old_logp).detach(), advantage.detach(), low=low, high=high)


@counted(_left_the_range)
def clipped(
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "*n"]:
    """The clipped importance-ratio loss, in the unit of the advantage.

        ratio = exp(log student(token) - log old(token))
        L = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)

    Equal in gradient to `score` while the weights are those of the rollout. No gradient where the
    ratio has left the range in the direction the advantage pushes: those tokens drop out, which
    biases it, and their share is logged. Unbounded above where the advantage is negative.

    Args:
        student_logp: carries the gradient.
        old_logp: under the trainer's weights at rollout time.
        advantage: detached.
        low: how far the ratio may fall below 1, in [0, 1].
        high: how far it may rise above 1, >= 0.

    Source: Schulman et al., arXiv:1707.06347; the asymmetric range is that of Yu et al.,
    arXiv:2503.14476.
    """
    _check_range(low, high)
    return _clipped_loss(student_logp - old_logp.detach(), advantage.detach(), low=low, high=high)


def _left_the_range_or_the_cap(
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    low: float,
    high: float,
    negative_cap: float,
) -> Bool[Tensor, "*n"]:
    log_ratio, fixed = (student_logp - old_logp).detach(), advantage.detach()
    capped = (fixed < 0) & (log_ratio > math.log(negative_cap))
    return capped | _held(log_ratio, fixed, low=low, high=high)


@counted(_left_the_range_or_the_cap)
def dual_clipped(
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    low: float,
    high: float,
    negative_cap: float,
) -> Float[Tensor, "*n"]:
    """The clipped loss, bounded for negative advantages too; in the unit of the advantage.

        C = min(ratio * A, clip(ratio, 1 - low, 1 + high) * A),  ratio = student / old
        L = -C where A >= 0,  -max(C, negative_cap * A) where A < 0

    At most negative_cap * |A|, without gradient there: a token that has become much likelier in
    spite of a negative advantage is left alone. Equal in gradient to `score` while the weights
    are those of the rollout; biased by the tokens it holds, whose share is logged.

    Args:
        student_logp: carries the gradient.
        old_logp: under the trainer's weights at rollout time.
        advantage: detached.
        low: how far the ratio may fall below 1, in [0, 1].
        high: how far it may rise above 1, >= 0.
        negative_cap: largest ratio that counts where the advantage is negative, > 1.

    Source: Ye et al., arXiv:1912.09729 (dual-clip PPO).
    """
    _check_range(low, high)
    if not negative_cap > 1.0:
        raise ValueError(
            f"negative_cap must be above 1, got {negative_cap}; at or below 1 tokens with a "
            "negative advantage get no gradient on the weights of the rollout"
        )
    log_ratio, fixed = student_logp - old_logp.detach(), advantage.detach()
    # For A < 0, max(C, cap * A) is C at a ratio of at most the cap.
    reach = torch.where(fixed < 0, log_ratio.clamp(max=math.log(negative_cap)), log_ratio)
    return _clipped_loss(reach, fixed, low=low, high=high)


def _above_cap(
    student_logp: Float[Tensor, "*n"],
    sampler_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    cap: float,
) -> Bool[Tensor, "*n"]:
    return (student_logp - sampler_logp).detach() > math.log(cap)


@counted(_above_cap)
def truncated_importance(
    student_logp: Float[Tensor, "*n"],
    sampler_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    cap: float,
) -> Float[Tensor, "*n"]:
    """The score loss, weighted by a capped ratio to the engine that generated.

        L = -min(ratio, cap) * A * log student(token),  ratio = student(token) / sampler(token)

    The weight is detached. Unbiased at the sampler's prefixes but for the tokens above the cap,
    which count too little and are logged; every token keeps some gradient, unlike in
    `masked_importance`. Equal in gradient to `score` where sampler and student agree.

    Args:
        student_logp: carries the gradient.
        sampler_logp: under the engine that generated, temperature and truncation included.
        advantage: detached.
        cap: largest weight, >= 1.

    Source: Ionides, Truncated Importance Sampling, doi:10.1198/106186008X320456; in policy
    gradients Espeholt et al., arXiv:1802.01561.
    """
    if not cap >= 1.0:
        raise ValueError(f"cap must be at least 1, got {cap}; below 1 it only rescales the term")
    weight = (student_logp - sampler_logp).detach().clamp(max=math.log(cap)).exp()
    return -weight * advantage.detach() * student_logp


def _outside(
    student_logp: Float[Tensor, "*n"],
    sampler_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    low: float,
    high: float,
) -> Bool[Tensor, "*n"]:
    ratio = (student_logp - sampler_logp).detach().exp()
    return (ratio < low) | (ratio > high)


@counted(_outside)
def masked_importance(
    student_logp: Float[Tensor, "*n"],
    sampler_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "*n"]:
    """The score loss, weighted by the ratio to the engine that generated, or by 0 far from it.

        w = ratio where low <= ratio <= high, else 0,  ratio = student(token) / sampler(token)
        L = -w * A * log student(token)

    The weight is detached. Biased at the sampler's prefixes by exactly what it drops, the mean of
    A times the score over the tokens outside, whose share is logged; `truncated_importance` keeps
    them at reduced weight. Equal in gradient to `score` where sampler and student agree.

    Args:
        student_logp: carries the gradient.
        sampler_logp: under the engine that generated, temperature and truncation included.
        advantage: detached.
        low: smallest ratio that counts, in [0, 1].
        high: largest ratio that counts, >= 1.

    Source: MiMo-V2-Flash, arXiv:2601.02780.
    """
    if not 0.0 <= low <= 1.0 <= high:
        raise ValueError(
            f"masked_importance needs 0 <= low <= 1 <= high, got low={low} and high={high}; they "
            "are the ratios themselves, e.g. low=0.5, high=2"
        )
    ratio = (student_logp - sampler_logp).detach().exp()
    weight = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    return -weight * advantage.detach() * student_logp


def _left_the_geometric_range(
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    teacher_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    old_share: float,
    low: float,
    high: float,
) -> Bool[Tensor, "*n"]:
    log_ratio = _geometric_log_ratio(student_logp, old_logp, teacher_logp, old_share)
    return _held(log_ratio.detach(), advantage.detach(), low=low, high=high)


@counted(_left_the_geometric_range)
def geometric_ratio(
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    teacher_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    old_share: float,
    low: float,
    high: float,
) -> Float[Tensor, "*n"]:
    """The clipped loss around a geometric mean of old policy and teacher.

        ratio = (student / old)^s * (student / teacher)^(1 - s)
        L = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)

    In the unit of the advantage. The teacher enters as an anchor of the trust region, not as a
    reward: a token with positive advantage may rise to 1 + high times the anchor
    old^s teacher^(1 - s). The ratio is no importance weight, so it is unbiased for nothing, and
    on the weights of the rollout its gradient is that of `score` times (old / teacher)^(1 - s),
    or 0 where that is clipped; it is that of `score` only where the teacher agrees too. Unbounded
    above where the advantage is negative; plus infinity if also the teacher gives the token no
    mass.

    Args:
        student_logp: carries the gradient.
        old_logp: under the trainer's weights at rollout time.
        teacher_logp: log-probability by the view.
        advantage: detached.
        old_share: s, strictly between 0 and 1.
        low: how far the ratio may fall below 1, in [0, 1].
        high: how far it may rise above 1, >= 0.

    Source: RLAD, the ratio TRRD of arXiv:2602.22495.
    """
    _check_range(low, high)
    if not 0.0 < old_share < 1.0:
        raise ValueError(
            f"old_share must lie strictly between 0 and 1, got {old_share}; at 1 use clipped"
        )
    log_ratio = _geometric_log_ratio(student_logp, old_logp, teacher_logp, old_share)
    return _clipped_loss(log_ratio, advantage.detach(), low=low, high=high)


def shaped_probability(
    student_logp: Float[Tensor, "*n"], advantage: Float[Tensor, "*n"], *, half_at: float
) -> Float[Tensor, "*n"]:
    """The loss of text that another policy wrote: its probability, with rare tokens lifted.

        L = -f(student(token)) * A,  f(x) = x / (x + c),  c = half_at

    In place of an importance ratio to an unknown policy. Its gradient is that of `score` times
    f * (1 - f): at most a quarter, largest where the token's probability is c, and fading for
    tokens the student knows. Unbiased for nothing.

    Args:
        student_logp: carries the gradient.
        advantage: detached.
        half_at: c, the probability at which f is one half; > 0.

    Source: LUFFY, arXiv:2504.14945, with c = 0.1.
    """
    if not half_at > 0.0:
        raise ValueError(f"half_at is a probability > 0, got {half_at}")
    return -torch.sigmoid(student_logp - math.log(half_at)) * advantage.detach()


def tail_residual(
    student_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    student_log_tail: Float[Tensor, "*n"],
    teacher_log_tail: Float[Tensor, "*n"],
    in_support: Bool[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """What a support's tail bucket leaves out, estimated from the sampled token; in nats.

        L = -(A * log student(token) - (log teacher(tail) - log student(tail)) * log student(tail))

    where the token lies outside the support, and exactly 0, without gradient, where it lies
    inside. The factor in brackets is detached. With the log ratio as advantage, `immediate`
    credit and tokens of the student, a `Dense` reverse KL with tail `bucket` on the same support
    plus this term is unbiased for the local reverse KL on the full vocabulary; alone it is
    unbiased for what the bucket's average hides. The only surrogate with a second carrier of
    gradient, the student's tail.

    Args:
        student_logp: carries the gradient.
        advantage: detached.
        student_log_tail: log of the student's mass outside the support; carries the gradient.
        teacher_log_tail: log of the view's; -inf allowed where the token is inside.
        in_support: the token is one of the support.

    Source: ResOPD, arXiv:2610.04882.
    """
    # Chosen before the arithmetic: at a closed row a tail may be empty, and 0 * -inf is NaN.
    token = torch.where(in_support, 0.0, student_logp)
    tail = torch.where(in_support, 0.0, student_log_tail)
    teacher_tail = torch.where(in_support, 0.0, teacher_log_tail).detach()
    fixed = torch.where(in_support, 0.0, advantage).detach()
    return (teacher_tail - tail.detach()) * tail - fixed * token


# --------------------------------------------------------------------------------------------
# Parts


def _check_range(low: float, high: float) -> None:
    if not 0.0 <= low <= 1.0 or high < 0.0:
        raise ValueError(f"clip range needs 0 <= low <= 1 and high >= 0, got {low} and {high}")


def _clipped_loss(
    log_ratio: Float[Tensor, "*n"], advantage: Float[Tensor, "*n"], *, low: float, high: float
) -> Float[Tensor, "*n"]:
    """`-min(ratio * A, clip(ratio) * A)`: the ratio is held above if A >= 0, below otherwise."""
    pushed_up = advantage >= 0
    # Held before the exponential, which would overflow where nothing depends on it.
    reach = torch.where(pushed_up, log_ratio.clamp(max=math.log1p(high)), log_ratio).exp()
    return -torch.where(pushed_up, reach, reach.clamp(min=1 - low)) * advantage


def _held(
    log_ratio: Float[Tensor, "*n"], advantage: Float[Tensor, "*n"], *, low: float, high: float
) -> Bool[Tensor, "*n"]:
    """Where clipping stops the gradient: the ratio has gone further than the advantage may push."""
    too_high = (advantage > 0) & (log_ratio > math.log1p(high))
    return too_high | ((advantage < 0) & (log_ratio.exp() < 1 - low))


def _geometric_log_ratio(
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    teacher_logp: Float[Tensor, "*n"],
    old_share: float,
) -> Float[Tensor, "*n"]:
    anchor = old_share * old_logp + (1 - old_share) * teacher_logp
    return student_logp - anchor.detach()

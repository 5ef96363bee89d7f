"""Rewards of the sampled token, detached. Positive means: make the token likelier.

Three families: the log ratio and its transforms; the rewards `*_reward` of the f-divergences,
each the exact policy gradient of the divergence of the same name and scale; costs and verdicts,
which need no teacher. Rewards of the first two families are 0 where teacher and student agree,
and read the student at the weights of the moment unless the name says otherwise.

For a divergence D = sum_v student(v) * g(u(v)) with u = teacher / student, the derivative with
respect to student(v) is g(u) - u * g'(u), so the reward whose policy gradient is -grad D is

    A(u) = -(g(u) - u * g'(u))

up to a constant, which has no mean score and is chosen so that A(1) = 0. Rewarding -g(u) instead
is right for the reverse KL only. "Exact" is meant at a fixed prefix: the mean of A times the
score over the student's own tokens is -grad D there, with the distribution of prefixes detached.
The student's log-probability is finite, for it chose the token; the teacher's may be -inf.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.fields import counted

__all__ = [
    "alpha_divergence_reward",
    "cached_log_ratio",
    "clipped_log_ratio",
    "expected_log_ratio",
    "floored_log_ratio",
    "forward_kl_reward",
    "generalized_jsd_reward",
    "group_advantage",
    "group_deviation",
    "length_cost",
    "one",
    "overlong_cost",
    "power_reward",
    "proximal_log_ratio",
    "sign_total_variation",
    "skew_forward_kl_reward",
    "skew_reverse_kl_reward",
    "soft_log_ratio",
    "squared_hellinger_reward",
    "tanh_log_ratio",
    "teacher_log_ratio",
    "total_variation_reward",
    "verdict_reward",
]

CACHED = frozenset({"cached_log_ratio"})
"""Rewards frozen at rollout time; more than one update per rollout changes what they mean."""


# --------------------------------------------------------------------------------------------
# The log ratio


def one(tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """One, for every token: the row's own token is the target.

        r = 1

    With the score surrogate the term is the negative log-likelihood, so supervised training is
    a term like any other. It needs no teacher and is stationary at the distribution of the text,
    not at the teacher.

    Source: maximum likelihood by teacher forcing, Williams and Zipser,
    doi:10.1162/neco.1989.1.2.270.
    """
    return torch.ones_like(tokens, dtype=torch.get_default_dtype())


def teacher_log_ratio(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """How much likelier the view finds the token than the student does, in nats.

        r = log teacher(token) - log student(token)

    On the student's own samples its mean at a prefix is minus the reverse KL there. Detached: a
    gradient through it would cancel the teacher out in expectation. Recomputed under the weights
    of the moment, not cached from the rollout. The exact reward of the reverse KL, A = log u.

    Source: Lu and Thinking Machines Lab, On-Policy Distillation, 2025; Eq. 5 of arXiv:2606.22793.
    """
    return (teacher_logp - student_logp).detach()


def expected_log_ratio(reverse_kl: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The mean of the log ratio over the student's tokens at the prefix, in nats.

        r = -KL(student || teacher) = E_student[log teacher(token) - log student(token)]

    Never positive. It does not depend on the token, so as an immediate reward it has no mean
    gradient; as a reward of the future (`future`, `return_to_go`) it has the mean of the log
    ratio without the noise of one sample. Exact on the full vocabulary only.

    Source: section 5.1 of arXiv:2606.22793.
    """
    return -reverse_kl.detach()


def cached_log_ratio(
    teacher_logp: Float[Tensor, "*n"], old_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The log ratio as it was at rollout time, in nats. Changes the objective after one update.

        r = log teacher(token) - log old(token)

    At a prefix its policy gradient, over tokens of the current student, is

        E_student[r * score] = -grad KL(student || teacher) + grad KL(student || old)

    The second part vanishes only while the student is the old policy. Over many updates on one
    rollout the objective is a linear reward, maximised by putting all mass on the token with the
    largest teacher / old: the teacher is no longer stationary. `opd check` and `opd explain` warn
    about it; `teacher_log_ratio` keeps the teacher's side and recomputes the student's.

    Args:
        teacher_logp: log-probability by the view.
        old_logp: under the trainer's weights at rollout time.

    Source: Eq. 24 of arXiv:2606.22793; the harm of staleness is measured in arXiv:2606.24143.
    """
    return (teacher_logp - old_logp).detach()


# --------------------------------------------------------------------------------------------
# Transforms of the log ratio. Each bounds or compresses it, and is unbiased for no divergence.


def _outside(
    teacher_logp: Float[Tensor, "*n"],
    student_logp: Float[Tensor, "*n"],
    *,
    low: float,
    high: float,
) -> Bool[Tensor, "*n"]:
    ratio = teacher_log_ratio(teacher_logp, student_logp)
    return (ratio < low) | (ratio > high)


@counted(_outside)
def clipped_log_ratio(
    teacher_logp: Float[Tensor, "*n"],
    student_logp: Float[Tensor, "*n"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "*n"]:
    """The log ratio held inside a range, in nats.

        A = min(max(r, low), high),  r = log teacher(token) - log student(token)

    Finite where the teacher gives the token no mass. A policy gradient of no divergence between
    the two once a token is clipped; clipping the long negative side raises the mean, and the
    student keeps tokens that the teacher excludes. How many it clips is logged.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        low: smallest value, <= 0, in nats.
        high: largest value, >= 0, in nats, above `low`.

    Source: the hard clip of arXiv:2607.13399.
    """
    if not low <= 0.0 <= high or low == high:
        raise ValueError(
            f"clipped_log_ratio needs low <= 0 <= high and low < high, got low={low} and "
            f"high={high}; they are the bounds of the log ratio themselves, e.g. low=-5, high=5"
        )
    return teacher_log_ratio(teacher_logp, student_logp).clamp(low, high)


def _below(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, floor_nats: float
) -> Bool[Tensor, "*n"]:
    return teacher_log_ratio(teacher_logp, student_logp) < floor_nats


@counted(_below)
def floored_log_ratio(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, floor_nats: float
) -> Float[Tensor, "*n"]:
    """The log ratio with a floor, in nats.

        A = max(r, floor_nats),  r = log teacher(token) - log student(token)

    Cuts the heavy negative tail and leaves the positive side alone. REOPOLD writes the floor with
    a share l, and its formula is read in two ways: log(l / (1 - l)), -0.85 nats at l = 0.3, and
    log(l) / (1 - l), -1.72 nats. Here the floor is the number itself. How many tokens it holds is
    logged.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        floor_nats: smallest value, < 0.

    Source: REOPOLD, arXiv:2603.11137; the second reading as quoted by arXiv:2605.07865.
    """
    if not floor_nats < 0.0:
        raise ValueError(
            f"floor_nats must be negative, got {floor_nats}; at 0 or above no token could be "
            "pushed down: use positive_advantage as a gate if that is meant"
        )
    return teacher_log_ratio(teacher_logp, student_logp).clamp(min=floor_nats)


def tanh_log_ratio(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, scale: float
) -> Float[Tensor, "*n"]:
    """The log ratio squeezed smoothly into a range, in nats.

        A = s * tanh(r / s),  r = log teacher(token) - log student(token)

    Slope 1 at r = 0, inside (-s, s), order kept. Tends to the log ratio as s grows. Finite where
    the teacher gives the token no mass. The policy gradient of no named divergence; stationary
    where teacher and student agree.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        scale: s, the bound, in nats, > 0.

    Source: the tanh baseline of arXiv:2606.17199.
    """
    if not scale > 0.0:
        raise ValueError(f"scale must be positive (the bound, in nats), got {scale}")
    return scale * torch.tanh(teacher_log_ratio(teacher_logp, student_logp) / scale)


def soft_log_ratio(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The log ratio with both tails compressed, in log nats.

        A = sign(r) * log(1 + |r|),  r = log teacher(token) - log student(token)

    Slope 1 at r = 0, order kept, unbounded: minus infinity where the teacher gives the token no
    mass. The policy gradient of no named divergence; stationary where the two agree.

    Source: the order-preserving compression of arXiv:2607.13399.
    """
    ratio = teacher_log_ratio(teacher_logp, student_logp)
    return ratio.sign() * ratio.abs().log1p()


def _old_policy_leads(
    teacher_logp: Float[Tensor, "*n"],
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    *,
    teacher_share: float,
) -> Bool[Tensor, "*n"]:
    log_odds = math.log(teacher_share / (1 - teacher_share))
    return (teacher_logp - old_logp).detach() + log_odds < 0


@counted(_old_policy_leads)
def proximal_log_ratio(
    teacher_logp: Float[Tensor, "*n"],
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    *,
    teacher_share: float,
) -> Float[Tensor, "*n"]:
    """The log ratio to a teacher mixed with the old policy, in nats.

        A = log(s * teacher(token) + (1 - s) * old(token)) - log student(token)

    Unbiased for the local reverse KL to the mixture, a target within reach: bounded below by
    log(1 - s) on the weights of the rollout, where it is also `generalized_jsd_reward` with
    teacher weight s, divided by 1 - s. Over many updates on one rollout the student tends to the
    mixture; as the old policy follows it, only the teacher is stationary. Logged as replaced: the
    tokens where the old policy's part of the mixture outweighs the teacher's.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        old_logp: under the trainer's weights at rollout time.
        teacher_share: s, strictly between 0 and 1.

    Source: TRPD, arXiv:2607.04751.
    """
    if not 0.0 < teacher_share < 1.0:
        raise ValueError(
            f"teacher_share must lie strictly between 0 and 1, got {teacher_share}; at 1 use "
            "teacher_log_ratio, at 0 there is no teacher"
        )
    mixture_over_old = _log_mixture_ratio((teacher_logp - old_logp).detach(), teacher_share)
    return mixture_over_old + (old_logp - student_logp).detach()


def sign_total_variation(
    teacher_logp: Float[Tensor, "*n"],
    student_logp: Float[Tensor, "*n"],
    total_variation: Float[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """The sign of the log ratio, scaled by the disagreement at the prefix; in [-1, 1].

        A = sign(log teacher(token) - log student(token)) * TV(student, teacher)

    Exactly the policy gradient of the *squared* total variation: `total_variation_reward` times
    twice the distance. The magnitude of one token's log ratio plays no part, so it is finite
    everywhere. Stationary where the two agree.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        total_variation: at the prefix, in [0, 1]; on a support it is that of the support.

    Source: TV-OPD, arXiv:2609.08341.
    """
    return teacher_log_ratio(teacher_logp, student_logp).sign() * total_variation.detach()


def power_reward(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, power: float
) -> Float[Tensor, "*n"]:
    """The difference of the token's probabilities, each raised to a power; in [-1, 1].

        A = teacher(token)^a - student(token)^a

    This is `a` times the policy gradient of `power_divergence` with the same power: as published
    the reward carries a hidden factor of the learning rate, which shrinks with `a`. A / a tends
    to the log ratio as a -> 0. A difference, not a function of the ratio: tokens that neither
    side uses count for nothing. Finite where the teacher gives the token no mass.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        power: a, > 0; at a = 1 the divergence is half the squared L2 distance.

    Source: PowerOPD, arXiv:2606.17199; the hidden factor is algebra.
    """
    if not power > 0.0:
        raise ValueError(
            f"power must be positive, got {power}; the limit at 0 is teacher_log_ratio"
        )
    # From the larger side, so that neither a tiny probability nor a huge ratio meets the other.
    ratio = teacher_log_ratio(teacher_logp, student_logp)
    larger = (power * torch.maximum(teacher_logp, student_logp).detach()).exp()
    return -ratio.sign() * larger * torch.expm1(-power * ratio.abs())


# --------------------------------------------------------------------------------------------
# Exact policy gradients of f-divergences


def forward_kl_reward(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The reward whose policy gradient is that of the forward KL, in nats.

        g = u log u,  A = u - 1,  u = teacher(token) / student(token)

    Exactly -grad `forward_kl` in expectation. -1 where the teacher gives the token no mass.
    Unbounded and heavy-tailed above: its variance is the chi-squared divergence, which may be
    infinite, and it overflows to infinity where u does (about 88 nats in float32). Where that
    hurts, `skew_forward_kl_reward` is bounded, and a `Dense` forward KL has no sampling noise.
    Stationary only where the two agree.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.

    Source: the rule A = -(g - u g') of OPD+, arXiv:2606.01039.
    """
    return torch.expm1(teacher_log_ratio(teacher_logp, student_logp))


def generalized_jsd_reward(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, teacher_weight: float
) -> Float[Tensor, "*n"]:
    """The reward whose policy gradient is that of the generalized Jensen-Shannon divergence.

        M = w * u + 1 - w,  u = teacher(token) / student(token)
        g = w * u * log u - M * log M,  A = (1 - w) * log M

    Exactly -grad `generalized_jsd` in expectation, in nats. At least (1 - w) log(1 - w), where
    the teacher gives the token no mass; grows with the log of u, not with u. A / w tends to the
    forward KL's reward as w -> 0, A / (1 - w) to the log ratio as w -> 1. Stationary only where
    the two agree.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        teacher_weight: w, the share of the teacher in the mixture; strictly between 0 and 1.

    Source: the rule A = -(g - u g') of OPD+, arXiv:2606.01039; the divergence of
    arXiv:2306.13649.
    """
    if not 0.0 < teacher_weight < 1.0:
        raise ValueError(
            f"teacher_weight must lie strictly between 0 and 1, got {teacher_weight}; at the end "
            "points the divergence is 0 for any pair: use forward_kl_reward or teacher_log_ratio"
        )
    log_ratio = teacher_log_ratio(teacher_logp, student_logp)
    return (1 - teacher_weight) * _log_mixture_ratio(log_ratio, teacher_weight)


def skew_forward_kl_reward(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, skew: float
) -> Float[Tensor, "*n"]:
    """The reward whose policy gradient is that of the skew forward KL, in nats.

        M = s * u + 1 - s,  u = teacher(token) / student(token)
        g = u * log(u / M),  A = (1 - s) * (u / M - 1) = (1 - s)^2 * (u - 1) / M

    Exactly -grad `skew_forward_kl` in expectation. Bounded: -(1 - s) where the teacher gives the
    token no mass, below (1 - s)^2 / s however large u is. Tends to u - 1 as s -> 0. Stationary
    only where the two agree.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        skew: s, the share of the teacher mixed into the student; strictly between 0 and 1.

    Source: the rule A = -(g - u g') of OPD+, arXiv:2606.01039; the divergence of
    arXiv:2402.03898.
    """
    _check_skew(skew, end="forward_kl_reward")
    log_ratio = teacher_log_ratio(teacher_logp, student_logp)
    return (1 - skew) ** 2 * _excess_over_mixture(log_ratio, skew)


def skew_reverse_kl_reward(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, skew: float
) -> Float[Tensor, "*n"]:
    """The reward whose policy gradient is that of the skew reverse KL, in nats.

        M = s + (1 - s) * u,  u = teacher(token) / student(token)
        g = -log M,  A = log M + s / M - s

    Exactly -grad `skew_reverse_kl` in expectation. At least log s + 1 - s, where the teacher
    gives the token no mass; grows with the log of u. Tends to the log ratio as s -> 0.
    Stationary only where the two agree.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        skew: s, the share of the student mixed into the teacher; strictly between 0 and 1.

    Source: the rule A = -(g - u g') of OPD+, arXiv:2606.01039; the divergence of
    arXiv:2402.03898.
    """
    _check_skew(skew, end="teacher_log_ratio")
    log_ratio = teacher_log_ratio(teacher_logp, student_logp)
    # s / M - s = -s * (M - 1) / M and M - 1 = (1 - s) * (u - 1): no difference of near-equals.
    fall = skew * (1 - skew) * _excess_over_mixture(log_ratio, 1 - skew)
    return _log_mixture_ratio(log_ratio, 1 - skew) - fall


def alpha_divergence_reward(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, alpha: float
) -> Float[Tensor, "*n"]:
    """The reward whose policy gradient is that of Amari's alpha-divergence.

        g = (1 - u^a) / (a * (1 - a)),  A = (u^a - 1) / a,  u = teacher(token) / student(token)

    Exactly -grad `alpha_divergence` in expectation. The log ratio as a -> 0, u - 1 as a -> 1.
    For a > 0 it is -1 / a where the teacher gives the token no mass and grows as u^a: heavy-tailed,
    the more the larger a is. For a < 0 the sides change places: bounded above by 1 / |a|, minus
    infinity where the teacher gives the token no mass, as the divergence itself is infinite
    there. Stationary only where the two agree.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        alpha: a, any number except 0 and 1.

    Source: the rule A = -(g - u g') of OPD+, arXiv:2606.01039; the divergence of Amari,
    Differential-Geometrical Methods in Statistics, 1985.
    """
    if alpha in (0.0, 1.0):
        limit = "teacher_log_ratio" if alpha == 0.0 else "forward_kl_reward"
        raise ValueError(f"alpha must be neither 0 nor 1, got {alpha}; its limit is {limit}")
    return torch.expm1(alpha * teacher_log_ratio(teacher_logp, student_logp)) / alpha


def squared_hellinger_reward(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The reward whose policy gradient is that of the squared Hellinger distance.

        g = 1 - sqrt(u),  A = (sqrt(u) - 1) / 2,  u = teacher(token) / student(token)

    Exactly -grad `squared_hellinger` in expectation, on the scale 1 - sum_v sqrt(teacher student).
    Two others are in use: sqrt(u) - 1 is twice this, and `alpha_divergence_reward` at 1/2,
    2 (sqrt(u) - 1), four times. -1/2 where the teacher gives the token no mass; grows as the
    square root of u, with a variance of at most 1/2. Stationary only where the two agree.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.

    Source: the rule A = -(g - u g') of OPD+, arXiv:2606.01039; TIDE, arXiv:2608.09836, uses the
    fourfold scale.
    """
    return torch.expm1(teacher_log_ratio(teacher_logp, student_logp) / 2) / 2


def total_variation_reward(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The reward whose policy gradient is that of the total variation distance: 1/2, 0 or -1/2.

        g = |1 - u| / 2,  A = sign(u - 1) / 2,  u = teacher(token) / student(token)

    Exactly -grad `total_variation` in expectation wherever no probabilities are equal; where two
    are, 0 is one of the subgradients. Bounded for any u, and as large for a small disagreement as
    for a large one: near the teacher it does not fade.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.

    Source: the rule A = -(g - u g') of OPD+, arXiv:2606.01039.
    """
    return teacher_log_ratio(teacher_logp, student_logp).sign() / 2


# --------------------------------------------------------------------------------------------
# Costs and verdicts


def length_cost(tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Minus one, for every token: what a response pays for its length.

        r = -1

    A constant at the token, so it acts through credit only: summed to the end of the response it
    is unbiased for the gradient of minus the expected length. It needs no teacher and is
    stationary at responses that stop at once.

    Source: length control, a regulariser in Table 3 of arXiv:2606.22793.
    """
    return -torch.ones_like(tokens, dtype=torch.get_default_dtype())


def _past_start(position: Int[Tensor, "*n"], *, start: int, limit: int) -> Bool[Tensor, "*n"]:
    return position + 1 > start


@counted(_past_start)
def overlong_cost(position: Int[Tensor, "*n"], *, start: int, limit: int) -> Float[Tensor, "*n"]:
    """What a token pays for coming late in its response; in [-1, 0].

        r = -min(max((n - start) / (limit - start), 0), 1),  n = position + 1

    Nothing up to `start` tokens, then linearly more, and 1 from `limit` tokens on. The published
    penalty is this ramp taken once, at the length of the response; here every token pays by its
    own place, and credit that sums adds the costs up. It needs no teacher. Logged as replaced: the
    tokens that pay.

    Args:
        position: index of the token within its response, from 0.
        start: tokens that are free, >= 0.
        limit: tokens from which on the cost is 1, above `start`.

    Source: the soft overlong punishment of DAPO, section 3.4 of arXiv:2503.14476.
    """
    if not 0 <= start < limit:
        raise ValueError(f"overlong_cost needs 0 <= start < limit, got {start} and {limit}")
    tokens_so_far = (position + 1).to(torch.get_default_dtype())
    return -((tokens_so_far - start) / (limit - start)).clamp(0.0, 1.0)


def verdict_reward(verdict: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The verifier's score, on the last open token of the response; 0 elsewhere.

        r_t = verdict if t is the last open token, else 0

    With `return_to_go` it is unbiased for the gradient of the expected verdict, and every token
    of a response gets the same. A response without verdict (NaN) or without open tokens gets
    none. It needs no teacher.

    Args:
        verdict: in [0, 1]; NaN where the response was not judged.
        mask: False on tool results and padding.

    Source: Williams, doi:10.1007/BF00992696 (REINFORCE), with a terminal reward.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, place, -1).amax(1, keepdim=True)
    score = torch.where(verdict.isnan(), 0.0, verdict.detach())
    return torch.where(place == last, score[:, None], 0.0)


def group_advantage(
    verdict: Float[Tensor, " B"], group: Int[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The verdict against those of the same prompt's other samples, standardised, on every token.

        A = (verdict - mean_group) / std_group

    The standard deviation is that of a sample of G (divisor G - 1) and nothing is added to it.
    The paper does not say which; its common implementations take this one. Prompts whose verdicts
    rarely differ weigh more: it is the gradient of no fixed objective. `group_deviation` does not
    divide. 0 where the group's verdicts are all equal, or only one was judged: such prompts teach
    nothing. It needs no teacher, and belongs with `immediate` credit, for it is a return already.

    Args:
        verdict: in [0, 1]; NaN, not judged, is left out of the statistics and gets 0.
        group: index of the prompt; samples of one prompt share it.
        mask: where the result is not 0; the statistics do not read it.

    Source: GRPO, section 4.1.2 of arXiv:2402.03300.
    """
    deviation, peers = _group_deviation(verdict, group)
    variance = torch.where(peers, deviation.square(), 0.0).sum(1) / (peers.sum(1) - 1)
    advantage = torch.where(deviation == 0, 0.0, deviation / variance.sqrt())
    return torch.where(mask, advantage[:, None], 0.0)


def group_deviation(
    verdict: Float[Tensor, " B"], group: Int[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The verdict less the mean over the same prompt's samples, on every open token.

        A = verdict - mean_group

    Summed over the tokens it is unbiased for (1 - 1/G) times the gradient of the expected verdict,
    G the number of samples: the response's own verdict is part of the mean. 0 where the group's
    verdicts are all equal, or only one was judged.

    Args:
        verdict, group, mask: as in `group_advantage`.

    Source: GRPO without the division, arXiv:2503.20783.
    """
    deviation, _ = _group_deviation(verdict, group)
    return torch.where(mask, deviation[:, None], 0.0)


# --------------------------------------------------------------------------------------------
# Parts


def _group_deviation(
    verdict: Float[Tensor, " B"], group: Int[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Bool[Tensor, "B B"]]:
    """Each verdict less its group's mean, 0 where unjudged; row i marks the judged of i's group."""
    score = verdict.detach()
    judged = ~score.isnan()
    peers = (group[:, None] == group) & judged
    deviation = score - torch.where(peers, score, 0.0).sum(1) / peers.sum(1)
    # By comparison, not by a deviation of 0: rounding leaves equal scores at 1e-17.
    differ = (peers & (score != score[:, None])).any(1)
    return torch.where(judged & differ, deviation, 0.0), peers


def _log_mixture_ratio(log_ratio: Float[Tensor, "*n"], weight: float) -> Float[Tensor, "*n"]:
    """`log(weight * u + 1 - weight)` for `log_ratio = log u`; exactly 0 at u = 1."""
    fall = torch.expm1(-log_ratio.abs())  # in [-1, 0] for every u, so nothing overflows
    rising = log_ratio + torch.log1p((1 - weight) * fall)
    return torch.where(log_ratio > 0, rising, torch.log1p(weight * fall))


def _excess_over_mixture(log_ratio: Float[Tensor, "*n"], weight: float) -> Float[Tensor, "*n"]:
    """`(u - 1) / (weight * u + 1 - weight)` for `log_ratio = log u`; exactly 0 at u = 1."""
    fall = torch.expm1(-log_ratio.abs())
    rising = -fall / (1 + (1 - weight) * fall)
    return torch.where(log_ratio > 0, rising, fall / (1 + weight * fall))


def _check_skew(skew: float, *, end: str) -> None:
    if not 0.0 < skew < 1.0:
        raise ValueError(
            f"skew must lie strictly between 0 and 1, got {skew}; at 0 use {end}, at 1 the "
            "divergence is 0 for any pair"
        )

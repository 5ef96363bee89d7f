"""Rewards of sampled tokens: numbers of any one shape, a formula applied to each of them.

Positive means "make likelier". Nothing here carries a gradient. `r` is the log-ratio,
teacher_logp - student_logp, and `u` its exponential, teacher(token) / student(token).

The rewards named after a divergence are the policy gradients of it: with the divergence written
as sum over v of student(v) * g(u(v)), h = dD / d student = g - u * g', so that descending D is
making a token likelier in proportion to

    A(u) = -(g(u) - u * g'(u)) + (g(1) - g'(1)),

where the constant changes no expectation and makes A(1) = 0. Each formula below states g and
u * g'(u) and leaves the rest to `corrected_advantage`.

Source: survey of on-policy distillation, arXiv:2606.22793, Eqs. 5, 10 and 11; the correction is
arXiv:2606.01039.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
OfRatio = Callable[[float], float]


def each(formula: Callable[..., float], *columns: npt.ArrayLike) -> Array:
    """The formula applied to every token; the columns have one shape, or are numbers."""
    arrays = np.broadcast_arrays(*(np.asarray(column, dtype=np.float64) for column in columns))
    result = np.zeros(arrays[0].shape)
    for index in np.ndindex(result.shape):
        result[index] = formula(*(float(array[index]) for array in arrays))
    return result


# --------------------------------------------------------------------------------------------
# Log-ratios and their tamed forms


def one(tokens: npt.ArrayLike) -> Array:
    """1 for every token."""
    return each(lambda _: 1.0, tokens)


def teacher_log_ratio(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> Array:
    """r = log teacher(token) - log student(token). Source: arXiv:2606.22793, Eqs. 5 and 11."""
    return each(lambda teacher, student: teacher - student, teacher_logp, student_logp)


def expected_log_ratio(reverse_kl: npt.ArrayLike) -> Array:
    """-D, the expected log-ratio of the state. Source: arXiv:2606.22793, around Eq. 7."""
    return each(lambda divergence: -divergence, reverse_kl)


def cached_log_ratio(teacher_logp: npt.ArrayLike, old_logp: npt.ArrayLike) -> Array:
    """log teacher(token) - log old(token), frozen at rollout time.

    Under the student its policy gradient is that of -KL(student || teacher) +
    KL(student || old), whose optimum is one token, the largest teacher / old.

    Source: arXiv:2606.22793, Eqs. 24-27.
    """
    return each(lambda teacher, old: teacher - old, teacher_logp, old_logp)


def clipped_log_ratio(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, low: float, high: float
) -> Array:
    """r held between low and high, both signed and in nats."""
    return each(
        lambda teacher, student: min(max(teacher - student, low), high), teacher_logp, student_logp
    )


def floored_log_ratio(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, floor_nats: float
) -> Array:
    """max(r, floor_nats). Source: arXiv:2603.11137; the floor is a negative number."""
    return each(
        lambda teacher, student: max(teacher - student, floor_nats), teacher_logp, student_logp
    )


def tanh_log_ratio(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, scale: float
) -> Array:
    """scale * tanh(r / scale): r for small |r|, never beyond scale nats."""
    return each(
        lambda teacher, student: scale * math.tanh((teacher - student) / scale),
        teacher_logp,
        student_logp,
    )


def soft_log_ratio(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> Array:
    """sign(r) * log(1 + |r|). Source: arXiv:2607.13399."""

    def formula(teacher: float, student: float) -> float:
        log_ratio = teacher - student
        if log_ratio == 0:
            return 0.0
        return math.copysign(math.log(1 + abs(log_ratio)), log_ratio)

    return each(formula, teacher_logp, student_logp)


def proximal_log_ratio(
    teacher_logp: npt.ArrayLike,
    student_logp: npt.ArrayLike,
    old_logp: npt.ArrayLike,
    *,
    teacher_share: float,
) -> Array:
    """log(s * teacher + (1 - s) * old) - log student, s = teacher_share.

    On-policy (student = old) at least log(1 - s).

    Source: arXiv:2607.04751 (proximal teacher).
    """

    def formula(teacher: float, student: float, old: float) -> float:
        mixture = teacher_share * math.exp(teacher) + (1 - teacher_share) * math.exp(old)
        return (math.log(mixture) if mixture > 0 else -math.inf) - student

    return each(formula, teacher_logp, student_logp, old_logp)


def sign_total_variation(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, total_variation: npt.ArrayLike
) -> Array:
    """sign(r) times the total variation of the state. Source: arXiv:2609.08341."""
    return each(
        lambda teacher, student, distance: _sign(teacher - student) * distance,
        teacher_logp,
        student_logp,
        total_variation,
    )


# --------------------------------------------------------------------------------------------
# Policy gradients of divergences


def corrected_advantage(u: float, g: OfRatio, u_times_slope: OfRatio) -> float:
    """-(g(u) - u g'(u)) + (g(1) - g'(1)). Source: arXiv:2606.01039."""
    return -(g(u) - u_times_slope(u)) + (g(1.0) - u_times_slope(1.0))


def forward_kl_reward(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> Array:
    """Of KL(teacher || student): g = u log u, u g' = u log u + u. The result is u - 1."""
    return _of_ratio(teacher_logp, student_logp, _x_log_x, lambda u: _x_log_x(u) + u)


def generalized_jsd_reward(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, teacher_weight: float
) -> Array:
    """Of the generalized JSD: with w the teacher's weight and m = w u + 1 - w,

    g    = w u log(u / m) - (1 - w) log m
    u g' = w u log(u / m)

    because the two other terms of the slope cancel. The result is (1 - w) log m.
    """
    w = teacher_weight

    def teacher_part(u: float) -> float:
        return w * (_x_log_x(u) - u * math.log(w * u + 1 - w))

    return _of_ratio(
        teacher_logp,
        student_logp,
        lambda u: teacher_part(u) - (1 - w) * math.log(w * u + 1 - w),
        teacher_part,
    )


def skew_forward_kl_reward(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, skew: float
) -> Array:
    """Of KL(teacher || s * teacher + (1 - s) * student): with m = s u + 1 - s,

    g    = u log(u / m)
    u g' = u log(u / m) + u - s u^2 / m

    The result is (1 - s) (u / m - 1).
    """

    def g(u: float) -> float:
        return _x_log_x(u) - u * math.log(skew * u + 1 - skew)

    def u_times_slope(u: float) -> float:
        return g(u) + u - skew * u * u / (skew * u + 1 - skew)

    return _of_ratio(teacher_logp, student_logp, g, u_times_slope)


def skew_reverse_kl_reward(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, skew: float
) -> Array:
    """Of KL(student || s * student + (1 - s) * teacher): with m = s + (1 - s) u,

    g    = -log m
    u g' = -(1 - s) u / m

    The result is log m + s / m - s.
    """
    return _of_ratio(
        teacher_logp,
        student_logp,
        lambda u: -math.log(skew + (1 - skew) * u),
        lambda u: -(1 - skew) * u / (skew + (1 - skew) * u),
    )


def alpha_divergence_reward(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, alpha: float
) -> Array:
    """Of the alpha-divergence: g = (1 - u^a) / (a (1 - a)), u g' = -u^a / (1 - a).

    The result is (u^a - 1) / a.
    """

    def power(u: float) -> float:
        return math.inf if u == 0 and alpha < 0 else u**alpha

    return _of_ratio(
        teacher_logp,
        student_logp,
        lambda u: (1 - power(u)) / (alpha * (1 - alpha)),
        lambda u: -power(u) / (1 - alpha),
    )


def squared_hellinger_reward(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> Array:
    """Of 1 - sum of sqrt(teacher * student): g = 1 - sqrt(u), u g' = -sqrt(u) / 2.

    The result is (sqrt(u) - 1) / 2. The literature has it twice as large, sqrt(u) - 1, for the
    sum of squared differences of roots, and four times, 2 (sqrt(u) - 1), for Amari's alpha = 1/2.
    """
    return _of_ratio(
        teacher_logp, student_logp, lambda u: 1 - math.sqrt(u), lambda u: -math.sqrt(u) / 2
    )


def total_variation_reward(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> Array:
    """Of the total variation: g = |1 - u| / 2, u g' = u sign(u - 1) / 2.

    The result is sign(u - 1) / 2.
    """
    return _of_ratio(
        teacher_logp,
        student_logp,
        lambda u: abs(1 - u) / 2,
        lambda u: u * _sign(u - 1) / 2,
    )


def power_reward(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, power: float
) -> Array:
    """teacher(token)^a - student(token)^a: a times the policy gradient of the power divergence.

    Source: arXiv:2606.17199.
    """
    return each(
        lambda teacher, student: math.exp(power * teacher) - math.exp(power * student),
        teacher_logp,
        student_logp,
    )


# --------------------------------------------------------------------------------------------
# Lengths


def length_cost(tokens: npt.ArrayLike) -> Array:
    """-1 for every token."""
    return each(lambda _: -1.0, tokens)


def overlong_cost(position: npt.ArrayLike, *, start: int, limit: int) -> Array:
    """0 for the first `start` tokens, then on a line down to -1 at token number `limit`.

    `position` counts from 0, so the token at position i is token number i + 1.
    """

    def formula(index: float) -> float:
        number = index + 1
        if number <= start:
            return 0.0
        if number >= limit:
            return -1.0
        return -(number - start) / (limit - start)

    return each(formula, position)


# --------------------------------------------------------------------------------------------
# Verdicts: one number per response, placed on its tokens


def verdict_reward(verdict: npt.ArrayLike, mask: npt.ArrayLike) -> Array:
    """`[B, T]`: the verdict at the last open token of each response, 0 elsewhere.

    0 for a response that was not judged (nan) or has no open token.
    """
    score, looked_at = np.asarray(verdict, dtype=np.float64), np.asarray(mask, dtype=np.bool_)
    reward = np.zeros(looked_at.shape)
    for b in range(looked_at.shape[0]):
        open_tokens = [t for t in range(looked_at.shape[1]) if looked_at[b, t]]
        if open_tokens and not math.isnan(score[b]):
            reward[b, open_tokens[-1]] = score[b]
    return reward


def group_advantage(
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    divide_by_std: bool = True,
    degrees_of_freedom_lost: int = 0,
) -> Array:
    """`[B, T]`: (verdict - mean of its group) / standard deviation, on every open token.

    0 in a group of one, in a group of equal verdicts, for a response that was not judged, and on
    closed tokens. Responses that were not judged do not count in their group.

    `degrees_of_freedom_lost` is 0 for the standard deviation of the group as a population and 1
    for the estimate from a sample; the paper does not say which.

    Source: Shao et al., arXiv:2402.03300 (GRPO), Sec. 4.1.2.
    """
    score, looked_at = np.asarray(verdict, dtype=np.float64), np.asarray(mask, dtype=np.bool_)
    groups = [int(number) for number in np.asarray(group)]
    advantage = np.zeros(looked_at.shape)
    for b in range(len(groups)):
        peers = [
            float(score[i])
            for i in range(len(groups))
            if groups[i] == groups[b] and not math.isnan(score[i])
        ]
        if math.isnan(score[b]) or all(peer == peers[0] for peer in peers):
            continue
        mean = sum(peers) / len(peers)
        squares = sum((peer - mean) ** 2 for peer in peers)
        deviation = math.sqrt(squares / (len(peers) - degrees_of_freedom_lost))
        for t in range(looked_at.shape[1]):
            if looked_at[b, t]:
                centred = float(score[b]) - mean
                advantage[b, t] = centred / deviation if divide_by_std else centred
    return advantage


# --------------------------------------------------------------------------------------------


def _of_ratio(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, g: OfRatio, u_times_slope: OfRatio
) -> Array:
    return each(
        lambda teacher, student: corrected_advantage(math.exp(teacher - student), g, u_times_slope),
        teacher_logp,
        student_logp,
    )


def _x_log_x(x: float) -> float:
    return x * math.log(x) if x > 0 else 0.0


def _sign(x: float) -> float:
    return float(x > 0) - float(x < 0)


def group_deviation(verdict: npt.ArrayLike, group: npt.ArrayLike, mask: npt.ArrayLike) -> Array:
    """`[B, T]`: verdict - mean of its group, on every open token. Source: arXiv:2503.20783."""
    return group_advantage(verdict, group, mask, divide_by_std=False)

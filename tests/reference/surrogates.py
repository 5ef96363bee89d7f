"""Losses of the sampled token and their derivatives by hand; numbers of any one shape.

Each takes log-probabilities and an advantage that is held fixed, and returns the loss and its
slope with respect to `student_logp`. A loss's logit gradient is slope * ([j == token] -
student(j)). `ratio` is student(token) / old(token) unless said.

Source: survey of on-policy distillation, arXiv:2606.22793, Eqs. 9, 10 and 27, unless said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .rewards import Array, each


@dataclass(frozen=True)
class Surrogate:
    """A loss per token, and its derivative with respect to the student's log-probability."""

    loss: Array
    slope: Array


@dataclass(frozen=True)
class TailSurrogate:
    """A loss per token, and its derivatives by the log-probability and by the log-tail."""

    loss: Array
    slope: Array
    tail_slope: Array


def score(student_logp: npt.ArrayLike, advantage: npt.ArrayLike) -> Surrogate:
    """-A log student. Slope: -A."""
    return _surrogate(lambda logp, a: (-a * logp, -a), student_logp, advantage)


def importance(
    student_logp: npt.ArrayLike, old_logp: npt.ArrayLike, advantage: npt.ArrayLike
) -> Surrogate:
    """-A ratio. Slope: -A ratio."""

    def formula(logp: float, old: float, a: float) -> tuple[float, float]:
        ratio = math.exp(logp - old)
        return -a * ratio, -a * ratio

    return _surrogate(formula, student_logp, old_logp, advantage)


def clipped(
    student_logp: npt.ArrayLike,
    old_logp: npt.ArrayLike,
    advantage: npt.ArrayLike,
    *,
    low: float,
    high: float,
) -> Surrogate:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A).

    Slope: -A ratio, and 0 where the clip decides: A > 0 and ratio > 1 + high, or A < 0 and
    ratio < 1 - low.

    Source: arXiv:1707.06347, Eq. 7; two bounds: arXiv:2503.14476, Eq. 8.
    """
    return _surrogate(
        lambda logp, old, a: _clipped(math.exp(logp - old), a, low, high),
        student_logp,
        old_logp,
        advantage,
    )


def dual_clipped(
    student_logp: npt.ArrayLike,
    old_logp: npt.ArrayLike,
    advantage: npt.ArrayLike,
    *,
    low: float,
    high: float,
    negative_cap: float,
) -> Surrogate:
    """`clipped`; where A < 0 its objective is at least negative_cap * A.

    So for A < 0 the loss is at most -negative_cap * A, reached with slope 0 once
    ratio > negative_cap.

    Source: Ye et al., arXiv:1912.09729, Eq. 8.
    """

    def formula(logp: float, old: float, a: float) -> tuple[float, float]:
        ratio = math.exp(logp - old)
        if a < 0 and ratio > negative_cap:
            return -negative_cap * a, 0.0
        return _clipped(ratio, a, low, high)

    return _surrogate(formula, student_logp, old_logp, advantage)


def truncated_importance(
    student_logp: npt.ArrayLike,
    sampler_logp: npt.ArrayLike,
    advantage: npt.ArrayLike,
    *,
    cap: float,
) -> Surrogate:
    """-w A log student, w = min(student / sampler, cap) held fixed. Slope: -w A."""

    def formula(logp: float, sampler: float, a: float) -> tuple[float, float]:
        weight = min(math.exp(logp - sampler), cap)
        return -weight * a * logp, -weight * a

    return _surrogate(formula, student_logp, sampler_logp, advantage)


def masked_importance(
    student_logp: npt.ArrayLike,
    sampler_logp: npt.ArrayLike,
    advantage: npt.ArrayLike,
    *,
    low: float,
    high: float,
) -> Surrogate:
    """-w A log student, w = student / sampler where low <= w <= high, else 0, held fixed.

    The bounds are ratios, e.g. 0.5 and 2. Slope: -w A.

    Source: arXiv:2601.02780 (MiMo), arXiv:2603.19220 (Nemotron).
    """

    def formula(logp: float, sampler: float, a: float) -> tuple[float, float]:
        ratio = math.exp(logp - sampler)
        weight = ratio if low <= ratio <= high else 0.0
        return -weight * a * logp, -weight * a

    return _surrogate(formula, student_logp, sampler_logp, advantage)


def geometric_ratio(
    student_logp: npt.ArrayLike,
    old_logp: npt.ArrayLike,
    teacher_logp: npt.ArrayLike,
    advantage: npt.ArrayLike,
    *,
    old_share: float,
    low: float,
    high: float,
) -> Surrogate:
    """`clipped` with ratio = (student / old)^s * (student / teacher)^(1 - s), s = old_share.

    d ratio / d student_logp is the ratio itself, whatever s.

    Source: arXiv:2602.22495 (TRRD).
    """

    def formula(logp: float, old: float, teacher: float, a: float) -> tuple[float, float]:
        log_ratio = old_share * (logp - old) + (1 - old_share) * (logp - teacher)
        return _clipped(math.exp(log_ratio), a, low, high)

    return _surrogate(formula, student_logp, old_logp, teacher_logp, advantage)


def shaped_probability(
    student_logp: npt.ArrayLike, advantage: npt.ArrayLike, *, half_at: float
) -> Surrogate:
    """-A f, f = x / (x + half_at) with x = student(token). Slope: -A f (1 - f).

    Derivation: df / dx = c / (x + c)^2, times dx / d student_logp = x.

    Source: arXiv:2504.14945 (LUFFY).
    """

    def formula(logp: float, a: float) -> tuple[float, float]:
        x = math.exp(logp)
        return -a * x / (x + half_at), -a * half_at * x / (x + half_at) ** 2

    return _surrogate(formula, student_logp, advantage)


def tail_residual(
    student_logp: npt.ArrayLike,
    advantage: npt.ArrayLike,
    student_log_tail: npt.ArrayLike,
    teacher_log_tail: npt.ArrayLike,
    in_support: npt.ArrayLike,
) -> TailSurrogate:
    """-(A log student(y) - b log student(tail)) where the token is outside the support, else 0.

    b = log teacher(tail) - log student(tail), held fixed like A. Slopes: -A by the token's
    log-probability, +b by the log-tail. With A the log-ratio, in expectation what the reverse KL
    with a tail bucket leaves out.

    Source: arXiv:2610.04882 (ResOPD).
    """
    inside = np.asarray(in_support, dtype=np.bool_)

    def parts(
        logp: float, a: float, tail: float, teacher_tail: float, in_it: float
    ) -> tuple[float, float, float]:
        if in_it:
            return 0.0, 0.0, 0.0
        bucket = teacher_tail - tail
        return -(a * logp - bucket * tail), -a, bucket

    columns = (student_logp, advantage, student_log_tail, teacher_log_tail, inside)
    return TailSurrogate(
        each(lambda *row: parts(*row)[0], *columns),
        each(lambda *row: parts(*row)[1], *columns),
        each(lambda *row: parts(*row)[2], *columns),
    )


def _clipped(ratio: float, a: float, low: float, high: float) -> tuple[float, float]:
    if a > 0 and ratio > 1 + high:
        return -(1 + high) * a, 0.0
    if a < 0 and ratio < 1 - low:
        return -(1 - low) * a, 0.0
    return -ratio * a, -ratio * a


def _surrogate(formula: Callable[..., tuple[float, float]], *columns: npt.ArrayLike) -> Surrogate:
    return Surrogate(
        each(lambda *row: formula(*row)[0], *columns), each(lambda *row: formula(*row)[1], *columns)
    )

"""Gates that keep the extreme tokens of a step: `[B, T]` with `mask`, 0 on closed tokens.

"The step" is every open token of the batch. Two ways of counting stand here. The first four keep
all tokens at or beyond a quantile, so that ties at the bound all are. The others keep a number of
tokens, the share of the open ones rounded to a whole one with halves up and at least one, and of
equals the earlier: first by response, then by position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .rewards import Array

# --------------------------------------------------------------------------------------------
# Beyond a quantile


def keep_high_entropy(
    student_entropy: npt.ArrayLike, mask: npt.ArrayLike, *, share: float
) -> Array:
    """1 on the `share` of the step's open tokens with the highest entropy."""
    return _keep_highest(np.asarray(student_entropy, dtype=np.float64), mask, share)


def keep_low_entropy(student_entropy: npt.ArrayLike, mask: npt.ArrayLike, *, share: float) -> Array:
    """1 on the `share` of the step's open tokens with the lowest entropy."""
    return _keep_highest(-np.asarray(student_entropy, dtype=np.float64), mask, share)


def keep_large_divergence(reverse_kl: npt.ArrayLike, mask: npt.ArrayLike, *, share: float) -> Array:
    """1 on the `share` of the step's open tokens with the largest divergence."""
    return _keep_highest(np.asarray(reverse_kl, dtype=np.float64), mask, share)


def keep_unlikely(student_logp: npt.ArrayLike, mask: npt.ArrayLike, *, share: float) -> Array:
    """1 on the `share` of the step's open tokens the student found least likely.

    Source: arXiv:2608.31046, the arm without a teacher.
    """
    return _keep_highest(-np.asarray(student_logp, dtype=np.float64), mask, share)


# --------------------------------------------------------------------------------------------
# A number of tokens


def keep_large_forward_kl(forward_kl: npt.ArrayLike, mask: npt.ArrayLike, *, share: float) -> Array:
    """1 on the `share` of the step's tokens with the largest forward KL.

    Source: arXiv:2608.09836 (TIDE, the deficit).
    """
    return _keep_first(np.asarray(forward_kl, dtype=np.float64), mask, share)


def keep_entropy_mismatch(
    teacher_entropy: npt.ArrayLike,
    student_entropy: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    share: float,
) -> Array:
    """1 on the `share` of the step's tokens with the largest |H(teacher) - H(student)|.

    Source: arXiv:2604.26573 (PAINT).
    """
    of_teacher, of_student = np.asarray(teacher_entropy), np.asarray(student_entropy)
    return _keep_first(np.abs(of_teacher - of_student), mask, share)


def keep_overrated(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, mask: npt.ArrayLike, *, share: float
) -> Array:
    """1 on the `share` of the step's tokens with the smallest log-ratio, of those below 0.

    Source: arXiv:2608.09836 (TIDE, the excess).
    """
    log_ratio = np.asarray(teacher_logp, dtype=np.float64) - np.asarray(student_logp)
    gate = _keep_first(-log_ratio, mask, share)
    for index in np.ndindex(gate.shape):
        if not log_ratio[index] < 0:
            gate[index] = 0.0
    return gate


def keep_soft_or(
    student_entropy: npt.ArrayLike, forward_kl: npt.ArrayLike, mask: npt.ArrayLike, *, share: float
) -> Array:
    """1 on the `share` of the step's tokens with the largest h + d - h d.

    h and d are the student's entropy and the forward KL, each on a line from 0 at the step's
    smallest to 1 at its largest; 0 where all are equal. Written 1 - (1 - h)(1 - d), which is
    exactly 1 where one of the two is.

    Source: arXiv:2604.14084 (TIP).
    """
    looked_at = np.asarray(mask, dtype=np.bool_)

    def scaled(values: npt.ArrayLike) -> Array:
        numbers = np.asarray(values, dtype=np.float64)
        seen = _seen(numbers, looked_at)
        least, most = (seen[0], seen[-1]) if seen else (0.0, 0.0)
        result = np.zeros(numbers.shape)
        for index in np.ndindex(numbers.shape):
            if looked_at[index] and most > least:
                result[index] = (numbers[index] - least) / (most - least)
        return result

    h, d = scaled(student_entropy), scaled(forward_kl)
    return _keep_first(1 - (1 - h) * (1 - d), mask, share)


def keep_uncertain_or_wrong(
    student_entropy: npt.ArrayLike,
    jensen_shannon: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    share: float,
    entropy_power: float = 1.0,
    divergence_power: float = 1.0,
) -> Array:
    """1 on the `share` of the step's tokens with the largest (H / max H)^a (D / max D)^b.

    0^0 is 1; a factor whose largest is 0 is 0 to its power.

    Source: arXiv:2604.14084 (TIP's code).
    """
    looked_at = np.asarray(mask, dtype=np.bool_)

    def factor(values: npt.ArrayLike, power: float) -> Array:
        numbers = np.asarray(values, dtype=np.float64)
        seen = _seen(numbers, looked_at)
        result = np.zeros(numbers.shape)
        for index in np.ndindex(numbers.shape):
            if looked_at[index]:
                share_of_most = float(numbers[index]) / seen[-1] if seen[-1] > 0 else 0.0
                result[index] = share_of_most**power
        return result

    score = factor(student_entropy, entropy_power) * factor(jensen_shannon, divergence_power)
    return _keep_first(score, mask, share)


def keep_teachable(
    forward_kl: npt.ArrayLike,
    teacher_support_logp: npt.ArrayLike,
    support_ids: npt.ArrayLike,
    student_top_ids: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    k: int,
    share: float,
) -> Array:
    """1 on the `share` of the step's tokens with the largest N(forward KL) N(teacher's mass).

    The mass is that of the student's k likeliest tokens. N puts the step's 5 per cent quantile at
    0 and its 95 per cent quantile at 1, and cuts off beyond; 0 where the two are equal.

    Source: arXiv:2605.26844 (TA-OPD).
    """
    divergence = np.asarray(forward_kl, dtype=np.float64)
    of_teacher, ids = np.asarray(teacher_support_logp), np.asarray(support_ids)
    likeliest = np.asarray(student_top_ids)
    looked_at = np.asarray(mask, dtype=np.bool_)
    mass = np.zeros(divergence.shape)
    for index in np.ndindex(divergence.shape):
        if looked_at[index]:
            logp_of = dict(zip(ids[index].tolist(), of_teacher[index].tolist(), strict=True))
            mass[index] = sum(math.exp(logp_of[v]) for v in likeliest[index].tolist()[:k])

    def cut(numbers: Array) -> Array:
        seen = _seen(numbers, looked_at)
        result = np.zeros(numbers.shape)
        if not seen:
            return result
        low, high = _quantile(seen, 0.05), _quantile(seen, 0.95)
        for index in np.ndindex(numbers.shape):
            if looked_at[index] and high > low:
                result[index] = min(max((float(numbers[index]) - low) / (high - low), 0.0), 1.0)
        return result

    return _keep_first(cut(divergence) * cut(mass), mask, share)


def keep_high_signal(
    student_log_probs: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    share: float,
) -> Array:
    """1 on the `share` of the step's tokens with the largest `signal_to_noise`."""
    student, teacher = np.asarray(student_log_probs), np.asarray(teacher_log_probs)
    looked_at = np.asarray(mask, dtype=np.bool_)
    score = np.zeros(looked_at.shape)
    for index in np.ndindex(looked_at.shape):
        if looked_at[index]:
            score[index] = signal_to_noise(student[index].tolist(), teacher[index].tolist())
    return _keep_first(score, mask, share)


def signal_to_noise(student: Sequence[float], teacher: Sequence[float]) -> float:
    """Squared length of the reverse KL's expected gradient over a sample's spread about it.

    In the Fisher metric, where one sample's score has the squared length 1 / student(v) - 1, and
    at the constant baseline with the least spread:

        r(v) = log student(v) - log teacher(v), at most 30 from 0
        signal = Var_student[r],  noise = E_student[(r - b)^2 l] - signal,
        l(v) = 1 / student(v) - 1,  b = E[r l] / E[l]

    Entries that the student never draws do not count. Without noise infinite, or 0 without signal
    too; what is left of a difference of equals counts as nothing.

    Source: arXiv:2609.24432 (IER-OPD).
    """
    rows = [
        (math.exp(s), min(max(s - t, -30.0), 30.0))
        for s, t in zip(student, teacher, strict=True)
        if s > -math.inf
    ]
    mean = math.fsum(p * r for p, r in rows)
    signal = math.fsum(p * (r - mean) ** 2 for p, r in rows)
    spread = math.fsum(1 - p for p, _ in rows)  # student(v) * l(v) is 1 - student(v)
    if len(rows) < 2 or signal == 0:
        return 0.0
    baseline = math.fsum(r * (1 - p) for p, r in rows) / spread
    length = math.fsum((r - baseline) ** 2 * (1 - p) for p, r in rows)
    noise = length - signal
    return signal / noise if noise > 1e-12 * length else math.inf


# --------------------------------------------------------------------------------------------


def _seen(values: Array, looked_at: npt.NDArray[np.bool_]) -> list[float]:
    """The open tokens' numbers, smallest first."""
    return sorted(float(values[index]) for index in np.ndindex(values.shape) if looked_at[index])


def _quantile(ordered: Sequence[float], share: float) -> float:
    """On the line between its two neighbours."""
    place = share * (len(ordered) - 1)
    lower = math.floor(place)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (place - lower) * (ordered[upper] - ordered[lower])


def _keep_first(score: Array, mask: npt.ArrayLike, share: float) -> Array:
    """1 on max(1, round(share n)) of the n open tokens, from the largest score down."""
    looked_at = np.asarray(mask, dtype=np.bool_)
    places = [index for index in np.ndindex(looked_at.shape) if looked_at[index]]
    ranked = sorted(places, key=lambda index: (-float(score[index]), index))
    gate = np.zeros(looked_at.shape)
    for index in ranked[: max(1, math.floor(share * len(places) + 0.5))]:
        gate[index] = 1.0
    return gate


def _keep_highest(values: Array, mask: npt.ArrayLike, share: float) -> Array:
    """1 on open tokens at or above the (1 - share) quantile of the open tokens.

    The quantile lies on the line between its two neighbours, so about `share` of the tokens are
    kept, and ties at the bound all are.
    """
    looked_at = np.asarray(mask, dtype=np.bool_)
    seen = sorted(float(values[index]) for index in np.ndindex(values.shape) if looked_at[index])
    gate = np.zeros(values.shape)
    if not seen:
        return gate
    place = (1 - share) * (len(seen) - 1)
    lower = math.floor(place)
    upper = min(lower + 1, len(seen) - 1)
    bound = seen[lower] + (place - lower) * (seen[upper] - seen[lower])
    for index in np.ndindex(values.shape):
        gate[index] = float(bool(looked_at[index]) and values[index] >= bound)
    return gate

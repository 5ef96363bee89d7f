"""Weights and gates of tokens: numbers that multiply a loss, gates being 0 or 1.

Those that look at one token take columns of any one shape; those that look at a whole response or
step take `[B, T]` with `mask` and give 0 on closed tokens. Gaps are deleted before anything is
counted along a response. "The step" is every open token of the batch.

An "above" gate is open strictly above its bound and a "below" gate strictly below; an `at_least`
is met by equality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .rewards import Array, each

# --------------------------------------------------------------------------------------------
# One token at a time


def skip_special(special: npt.ArrayLike) -> Array:
    """0 on special tokens."""
    return each(lambda is_special: 0.0 if is_special else 1.0, special)


def student_entropy_above(student_entropy: npt.ArrayLike, *, nats: float) -> Array:
    """1 where the student's entropy is above `nats`."""
    return each(lambda entropy: float(entropy > nats), student_entropy)


def student_entropy_below(student_entropy: npt.ArrayLike, *, nats: float) -> Array:
    """1 where the student's entropy is below `nats`."""
    return each(lambda entropy: float(entropy < nats), student_entropy)


def teacher_entropy_above(teacher_entropy: npt.ArrayLike, *, nats: float) -> Array:
    """1 where the teacher's entropy is above `nats`. Source: arXiv:2603.07079."""
    return each(lambda entropy: float(entropy > nats), teacher_entropy)


def teacher_entropy_below(teacher_entropy: npt.ArrayLike, *, nats: float) -> Array:
    """1 where the teacher's entropy is below `nats`."""
    return each(lambda entropy: float(entropy < nats), teacher_entropy)


def disagreement(total_variation: npt.ArrayLike) -> Array:
    """The total variation of the state."""
    return each(lambda distance: distance, total_variation)


def confident_wrong(
    student_entropy: npt.ArrayLike,
    total_variation: npt.ArrayLike,
    *,
    below_nats: float,
    above: float,
) -> Array:
    """1 where the entropy is below `below_nats` and the total variation above `above`.

    Source: arXiv:2604.14084 (TIP's confident-but-wrong set).
    """
    return each(
        lambda entropy, distance: float(entropy < below_nats and distance > above),
        student_entropy,
        total_variation,
    )


def position_decay(position: npt.ArrayLike, *, half_life: float) -> Array:
    """2^(-position / half_life)."""
    return each(lambda index: 0.5 ** (index / half_life), position)


def prefix(position: npt.ArrayLike, *, tokens: int) -> Array:
    """1 on the first `tokens` tokens, positions counting from 0. Source: arXiv:2602.15260."""
    return each(lambda index: float(index < tokens), position)


def top_k_overlap(
    student_top_ids: Sequence[int], teacher_top_ids: Sequence[int], *, k: int
) -> float:
    """Share of the student's k likeliest ids that are among the teacher's; one position.

    Source: arXiv:2604.13016.
    """
    of_student = {v for v in student_top_ids[:k] if v >= 0}
    of_teacher = {v for v in teacher_top_ids[:k] if v >= 0}
    return len(of_student & of_teacher) / k


def overlap_above(
    student_top_ids: Sequence[int], teacher_top_ids: Sequence[int], *, k: int, at_least: float
) -> float:
    """1 where `top_k_overlap` is `at_least`; one position."""
    return float(top_k_overlap(student_top_ids, teacher_top_ids, k=k) >= at_least)


def trust(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> Array:
    """min(teacher / student, 1) of the token. Source: arXiv:2606.01249."""
    return each(
        lambda teacher, student: math.exp(min(teacher - student, 0.0)), teacher_logp, student_logp
    )


def trusted(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, at_least: float) -> Array:
    """1 where `trust` is `at_least`."""
    return each(lambda share: float(share >= at_least), trust(teacher_logp, student_logp))


def untrusted(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, below: float) -> Array:
    """1 where `trust` is below `below`."""
    return each(lambda share: float(share < below), trust(teacher_logp, student_logp))


def distrust(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> Array:
    """1 - min(teacher / student, 1) of the token. Source: arXiv:2606.01249."""
    return each(
        lambda teacher, student: -math.expm1(min(teacher - student, 0.0)),
        teacher_logp,
        student_logp,
    )


def endorsement(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, *, sharpness: float
) -> Array:
    """1 / (1 + exp(-sharpness * log-ratio)). Source: arXiv:2605.15155 (SDAR)."""

    def formula(teacher: float, student: float) -> float:
        x = sharpness * (teacher - student)
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    return each(formula, teacher_logp, student_logp)


def importance(student_logp: npt.ArrayLike, sampler_logp: npt.ArrayLike, *, cap: float) -> Array:
    """min(student / sampler, cap) of the token. Source: arXiv:2306.08543 (MiniLLM)."""
    return _capped_ratio(student_logp, sampler_logp, cap)


def update_ratio(student_logp: npt.ArrayLike, old_logp: npt.ArrayLike, *, cap: float) -> Array:
    """min(student / old, cap) of the token. Source: arXiv:2601.20802 (SDPO)."""
    return _capped_ratio(student_logp, old_logp, cap)


def engine_ratio(old_logp: npt.ArrayLike, sampler_logp: npt.ArrayLike, *, cap: float) -> Array:
    """min(old / sampler, cap) of the token. Source: arXiv:2601.20802, arXiv:2602.12125."""
    return _capped_ratio(old_logp, sampler_logp, cap)


def engine_ratio_within(
    old_logp: npt.ArrayLike, sampler_logp: npt.ArrayLike, *, low: float, high: float
) -> Array:
    """old / sampler of the token where that lies in [low, high], else 0. Source: IcePop."""

    def formula(old: float, sampler: float) -> float:
        ratio = math.exp(old - sampler)
        return ratio if low <= ratio <= high else 0.0

    return each(formula, old_logp, sampler_logp)


def teacher_confidence(teacher_entropy: npt.ArrayLike, *, nats: float, least: float) -> Array:
    """1 where the teacher's entropy is at most `nats`, `least` elsewhere."""
    return each(lambda entropy: 1.0 if entropy <= nats else least, teacher_entropy)


def teacher_pass_rate(extra_teacher_pass: npt.ArrayLike) -> Array:
    """The teacher's pass rate; 0 where it is unknown (nan). Source: arXiv:2608.00782."""
    return each(lambda rate: 0.0 if math.isnan(rate) else rate, extra_teacher_pass)


def in_consensus(extra_consensus: npt.ArrayLike) -> Array:
    """1 where the column is not 0. Source: arXiv:2602.20574 (GATES)."""
    return each(lambda agrees: 0.0 if agrees == 0 else 1.0, extra_consensus)


def after(position: npt.ArrayLike, *, tokens: int) -> Array:
    """0 on the first `tokens` positions of a response, 1 behind. Source: arXiv:2601.19897."""
    return each(lambda index: 0.0 if index < tokens else 1.0, position)


def surprise(student_logp: npt.ArrayLike, *, boost: float) -> Array:
    """1 + boost * (1 - student(token)). Source: arXiv:2608.25643."""
    return each(lambda logp: 1 + boost * (1 - math.exp(logp)), student_logp)


def in_span(extra_span: npt.ArrayLike) -> Array:
    """1 inside the given spans."""
    return each(lambda inside: 1.0 if inside else 0.0, extra_span)


def teacher_passes(extra_teacher_pass: npt.ArrayLike, *, at_least: float) -> Array:
    """1 where the teacher's pass rate is `at_least`; 0 where it is unknown (nan)."""
    return each(lambda rate: float(rate >= at_least), extra_teacher_pass)


def teacher_fails(extra_teacher_pass: npt.ArrayLike, *, below: float) -> Array:
    """1 where the teacher's pass rate is below `below`; 0 where it is unknown (nan)."""
    return each(lambda rate: float(rate < below), extra_teacher_pass)


def positive_advantage(advantage: npt.ArrayLike) -> Array:
    """1 where the advantage is above 0."""
    return each(lambda a: float(a > 0), advantage)


def negative_advantage(advantage: npt.ArrayLike) -> Array:
    """1 where the advantage is below 0."""
    return each(lambda a: float(a < 0), advantage)


# --------------------------------------------------------------------------------------------
# Along a response


def relative_position(mask: npt.ArrayLike, *, start: float, end: float) -> Array:
    """On a line from `start` at the first open token to `end` at the last; `start` if alone."""
    looked_at = np.asarray(mask, dtype=np.bool_)
    weight = np.zeros(looked_at.shape)
    for b, kept in enumerate(_open(looked_at)):
        for i, t in enumerate(kept):
            share = i / (len(kept) - 1) if len(kept) > 1 else 0.0
            weight[b, t] = start + share * (end - start)
    return weight


def sigmoid_position(mask: npt.ArrayLike, *, least: float, centre: float, width: float) -> Array:
    """least + (1 - least) * sigmoid(((i + 1/2) / n - centre) / width), token i of n.

    Source: arXiv:2605.21606 (PW-OPSD).
    """
    looked_at = np.asarray(mask, dtype=np.bool_)
    weight = np.zeros(looked_at.shape)
    for b, kept in enumerate(_open(looked_at)):
        for i, t in enumerate(kept):
            x = ((i + 0.5) / len(kept) - centre) / width
            risen = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
            weight[b, t] = least + (1 - least) * risen
    return weight


def overlap_decay(
    student_top_ids: npt.ArrayLike,
    teacher_top_ids: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    k: int,
    at_least: float,
    drop: float,
    base: float = 0.0,
) -> Array:
    """base + max(0, 1 - drop * number of tokens so far, this one included, that share too little).

    Too little is a `top_k_overlap` below `at_least`.

    Source: arXiv:2605.07804 (Prune-OPD).
    """
    of_student, of_teacher = np.asarray(student_top_ids), np.asarray(teacher_top_ids)
    looked_at = np.asarray(mask, dtype=np.bool_)
    weight = np.zeros(looked_at.shape)
    for b, kept in enumerate(_open(looked_at)):
        apart = 0
        for t in kept:
            sides = of_student[b, t].tolist(), of_teacher[b, t].tolist()
            apart += top_k_overlap(*sides, k=k) < at_least
            weight[b, t] = base + max(0.0, 1 - drop * apart)
    return weight


def prefix_share(mask: npt.ArrayLike, *, share: float) -> Array:
    """1 on the open tokens with fewer than share * (number of open tokens) before them."""
    looked_at = np.asarray(mask, dtype=np.bool_)
    weight = np.zeros(looked_at.shape)
    for b, kept in enumerate(_open(looked_at)):
        for i, t in enumerate(kept):
            weight[b, t] = float(i < share * len(kept))
    return weight


def cumulative_drift(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, mask: npt.ArrayLike, *, boost: float
) -> Array:
    """1 + boost * (1 - F), F the share of the response's |log-ratio| that lies before the token.

    1 + boost at the first open token, and everywhere in a response without any log-ratio.

    Source: arXiv:2606.22600 (IW-OPD).
    """
    distance = _absolute_log_ratio(teacher_logp, student_logp)
    looked_at = np.asarray(mask, dtype=np.bool_)
    weight = np.zeros(looked_at.shape)
    for b, kept in enumerate(_open(looked_at)):
        total = sum(distance[b, t] for t in kept)
        for i, t in enumerate(kept):
            before = sum(distance[b, k] for k in kept[:i])
            weight[b, t] = 1 + boost * (1 - (before / total if total > 0 else 0.0))
    return weight


def drift_budget(
    teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike, mask: npt.ArrayLike, *, nats: float
) -> Array:
    """1 while the |log-ratio| summed over the open tokens before is at most `nats`.

    Source: the prefix-drift profile, sum over k < t of |r_k|, as a hard prefix cut.
    """
    distance = _absolute_log_ratio(teacher_logp, student_logp)
    looked_at = np.asarray(mask, dtype=np.bool_)
    weight = np.zeros(looked_at.shape)
    for b, kept in enumerate(_open(looked_at)):
        for i, t in enumerate(kept):
            weight[b, t] = float(sum(distance[b, k] for k in kept[:i]) <= nats)
    return weight


# --------------------------------------------------------------------------------------------
# Over the whole step


def confidence(
    teacher_entropy: npt.ArrayLike,
    student_entropy: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    teacher_gain: float,
    student_gain: float,
) -> Array:
    """u over its mean, u = (1 + a (1 - H(teacher) / max)) (1 + b H(student) / max).

    Largest and mean are over the step. A side without any entropy counts as sure: H / max = 0.

    Source: arXiv:2606.02684 (FiRe-OPD).
    """
    of_teacher = np.asarray(teacher_entropy, dtype=np.float64)
    of_student = np.asarray(student_entropy, dtype=np.float64)
    looked_at = np.asarray(mask, dtype=np.bool_)
    places = [index for index in np.ndindex(looked_at.shape) if looked_at[index]]
    weight = np.zeros(looked_at.shape)
    if not places:
        return weight
    most_teacher = max(float(of_teacher[index]) for index in places)
    most_student = max(float(of_student[index]) for index in places)
    for index in places:
        teacher = of_teacher[index] / most_teacher if most_teacher > 0 else 0.0
        student = of_student[index] / most_student if most_student > 0 else 0.0
        weight[index] = (1 + teacher_gain * (1 - teacher)) * (1 + student_gain * student)
    mean = math.fsum(float(weight[index]) for index in places) / len(places)
    return np.asarray(weight / mean)


# --------------------------------------------------------------------------------------------
# By outcome


def correct(verdict: npt.ArrayLike, mask: npt.ArrayLike) -> Array:
    """1 on the open tokens of responses with a verdict of at least 0.5."""
    return _of_verdict(verdict, mask, passes=True)


def incorrect(verdict: npt.ArrayLike, mask: npt.ArrayLike) -> Array:
    """1 on the open tokens of responses with a verdict below 0.5; not of unjudged ones (nan)."""
    return _of_verdict(verdict, mask, passes=False)


# --------------------------------------------------------------------------------------------


def _open(looked_at: npt.NDArray[np.bool_]) -> list[list[int]]:
    return [[t for t in range(len(row)) if row[t]] for row in looked_at]


def _absolute_log_ratio(teacher_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> Array:
    return each(lambda teacher, student: abs(teacher - student), teacher_logp, student_logp)


def _capped_ratio(logp: npt.ArrayLike, other_logp: npt.ArrayLike, cap: float) -> Array:
    return each(lambda one, other: min(math.exp(one - other), cap), logp, other_logp)


def _of_verdict(verdict: npt.ArrayLike, mask: npt.ArrayLike, *, passes: bool) -> Array:
    score, looked_at = np.asarray(verdict, dtype=np.float64), np.asarray(mask, dtype=np.bool_)
    gate = np.zeros(looked_at.shape)
    for b, kept in enumerate(_open(looked_at)):
        if math.isnan(score[b]) or (score[b] >= 0.5) != passes:
            continue
        for t in kept:
            gate[b, t] = 1.0
    return gate

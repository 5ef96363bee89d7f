"""Losses of published methods as functions of the student's logits, with gradients by hand.

`student_logits` and `teacher_logits` are `[B, T, V]`; index `t` scores the choice of
`tokens[b, t]`. `mask` is True where a loss may look, `provenance` says who chose each token.
Logits of rows that a loss does not look at are never read. Rewards, advantages, baselines and
supports are detached: a gradient is the one with these held fixed. The methods that need a
teacher share one signature, `tokens` included where a divergence has no use for them.

A *reduction* turns the rows of a loss, `[B, T]` booleans, into the coefficient of each row, so
that the loss is the sum of coefficient times row loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from opd.types import Provenance

from . import divergences
from .credit import immediate, per_state_baseline, teacher_log_ratio
from .divergences import Row, log_softmax

Rows = npt.NDArray[np.bool_]
Reduction = Callable[[Rows], npt.NDArray[np.float64]]
RowLoss = Callable[[int, int], tuple[float, Row]]

STUDENT = (Provenance.STUDENT,)
TEACHER = (Provenance.TEACHER,)
ALL = (Provenance.STUDENT, Provenance.DATA, Provenance.TEACHER)


@dataclass(frozen=True)
class LossAndGradient:
    """A reduced loss, its gradient with respect to the student's logits, and its parts.

    Attributes:
        loss: in nats.
        gradient: `[B, T, V]`; 0 on rows outside the loss.
        row_loss: `[B, T]`, unreduced; 0 outside.
        row_gradient: `[B, T, V]`, of each row's unreduced loss; 0 outside.
    """

    loss: float
    gradient: npt.NDArray[np.float64]
    row_loss: npt.NDArray[np.float64]
    row_gradient: npt.NDArray[np.float64]


# --------------------------------------------------------------------------------------------
# Reductions


def token_mean(rows: Rows) -> npt.NDArray[np.float64]:
    """Every row weighs 1 / number of rows of the batch."""
    total = sum(1 for b in range(rows.shape[0]) for t in range(rows.shape[1]) if rows[b, t])
    coefficient = np.zeros(rows.shape)
    for b in range(rows.shape[0]):
        for t in range(rows.shape[1]):
            if rows[b, t]:
                coefficient[b, t] = 1.0 / total
    return coefficient


def sequence_mean(rows: Rows) -> npt.NDArray[np.float64]:
    """The mean over sequences of each one's mean over its rows; empty sequences do not count."""
    sequences = _sequences(rows)
    coefficient = np.zeros(rows.shape)
    for b in sequences:
        length = sum(1 for t in range(rows.shape[1]) if rows[b, t])
        for t in range(rows.shape[1]):
            if rows[b, t]:
                coefficient[b, t] = 1.0 / (len(sequences) * length)
    return coefficient


def sequence_sum(rows: Rows) -> npt.NDArray[np.float64]:
    """The mean over sequences of each one's sum over its rows; empty sequences do not count."""
    sequences = _sequences(rows)
    coefficient = np.zeros(rows.shape)
    for b in sequences:
        for t in range(rows.shape[1]):
            if rows[b, t]:
                coefficient[b, t] = 1.0 / len(sequences)
    return coefficient


def select_rows(
    mask: npt.ArrayLike, provenance: npt.ArrayLike, kinds: Collection[Provenance]
) -> Rows:
    """True where the mask is and the token was chosen by one of `kinds`."""
    looked_at = np.asarray(mask, dtype=np.bool_)
    chosen_by = np.asarray(provenance, dtype=np.int64)
    rows: Rows = np.zeros(looked_at.shape, dtype=np.bool_)
    for b in range(rows.shape[0]):
        for t in range(rows.shape[1]):
            rows[b, t] = looked_at[b, t] and int(chosen_by[b, t]) in {int(kind) for kind in kinds}
    return rows


# --------------------------------------------------------------------------------------------
# Direct losses: a divergence at every row, differentiated


def reverse_kl_opd(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    *,
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """KL(student || teacher) over the full vocabulary, on the rows the student wrote.

    The states are data: no gradient through sampling.

    Source: arXiv:2306.13649, on-policy fraction 1, reverse KL; arXiv:2606.22793, Eqs. 2 and 6.
    """
    return _direct(
        divergences.reverse_kl,
        divergences.reverse_kl_gradient,
        student_logits,
        teacher_logits,
        select_rows(mask, provenance, STUDENT),
        reduction,
    )


def gkd(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    *,
    teacher_weight: float,
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """Generalized JSD over the full vocabulary, on every row whoever wrote it.

        L = (1 - f) E[data] D + f E[student] D

    The fraction f of on-policy text is the batch's own: the share of its rows (token mean) or
    sequences (the other reductions). No gradient through sampling.

    Source: Agarwal et al., arXiv:2306.13649, Sec. 3; their beta is `teacher_weight`.
    """

    def value(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> float:
        return divergences.generalized_jsd(
            student_log_probs, teacher_log_probs, teacher_weight=teacher_weight
        )

    def gradient(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> Row:
        return divergences.generalized_jsd_gradient(
            student_log_probs, teacher_log_probs, teacher_weight=teacher_weight
        )

    rows = select_rows(mask, provenance, ALL)
    return _direct(value, gradient, student_logits, teacher_logits, rows, reduction)


def offpolicy_kd(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    *,
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """KL(teacher || student) over the full vocabulary, on the rows the teacher wrote.

    Source: arXiv:1503.02531, at temperature 1 and per token of a sequence (arXiv:1606.07947,
    Sec. 3.1); arXiv:2306.13649, on-policy fraction 0, forward KL.
    """
    return _direct(
        divergences.forward_kl,
        divergences.forward_kl_gradient,
        student_logits,
        teacher_logits,
        select_rows(mask, provenance, TEACHER),
        reduction,
    )


def top_k_opd(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    *,
    k: int,
    special_ids: Collection[int] = (),
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """Reverse KL on the teacher's k likeliest tokens, both sides renormalised there.

    Rows the student wrote. A row whose own token is special has weight 0 but is still counted
    by the reduction: a gate does not change a denominator. To have such rows out of the count
    too, take them out of `mask`.

    Source: arXiv:2603.25562 (teacher top-k local support matching, special tokens masked).
    """
    chosen = np.asarray(tokens, dtype=np.int64)
    student = np.asarray(student_logits, dtype=np.float64)
    teacher = np.asarray(teacher_logits, dtype=np.float64)

    def row_loss(b: int, t: int) -> tuple[float, Row]:
        if int(chosen[b, t]) in special_ids:
            return 0.0, np.zeros(student.shape[2])
        support = top_k(teacher[b, t], k)
        student_log_probs, teacher_log_probs = (
            log_softmax(student[b, t]),
            log_softmax(teacher[b, t]),
        )
        return (
            divergences.renormalised_reverse_kl(student_log_probs, teacher_log_probs, support),
            divergences.renormalised_reverse_kl_gradient(
                student_log_probs, teacher_log_probs, support
            ),
        )

    return _reduce(row_loss, student.shape, select_rows(mask, provenance, STUDENT), reduction)


def sft_on_teacher(
    student_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    *,
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """-log student(token), on the rows the teacher wrote. Gradient: student(j) - [j == token].

    Source: Kim and Rush, sequence-level distillation, arXiv:1606.07947, Sec. 3.2, with sampled
    text in place of the beam's.
    """
    advantage = np.ones(np.asarray(tokens).shape)
    return score_loss(
        student_logits, tokens, mask, provenance, advantage, kinds=TEACHER, reduction=reduction
    )


# --------------------------------------------------------------------------------------------
# Scored losses: the sampled token's log-probability times a detached advantage


def score_loss(
    student_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    advantage: npt.ArrayLike,
    *,
    kinds: Collection[Provenance] = STUDENT,
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """-advantage * log student(token). Gradient: -advantage * ([j == token] - student(j)).

    Source: arXiv:2606.22793, Eqs. 9 and 10.
    """
    student = np.asarray(student_logits, dtype=np.float64)
    chosen = np.asarray(tokens, dtype=np.int64)
    credit = np.asarray(advantage, dtype=np.float64)

    def row_loss(b: int, t: int) -> tuple[float, Row]:
        student_log_probs = log_softmax(student[b, t])
        token = int(chosen[b, t])
        loss = -credit[b, t] * student_log_probs[token]
        return loss, -credit[b, t] * score(student_log_probs, token)

    return _reduce(row_loss, student.shape, select_rows(mask, provenance, kinds), reduction)


def importance_loss(
    student_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    advantage: npt.ArrayLike,
    old_logp: npt.ArrayLike,
    *,
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """-ratio * advantage, ratio = exp(log student(token) - old_logp), on student rows.

    Gradient: ratio times that of `score_loss`, so the two agree where ratio = 1.

    Source: Thinking Machines Lab, "On-Policy Distillation" (blog, 27 Oct 2025).
    """
    return clipped_loss(
        student_logits,
        tokens,
        mask,
        provenance,
        advantage,
        old_logp,
        low=math.inf,
        high=math.inf,
        reduction=reduction,
    )


def clipped_loss(
    student_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    advantage: npt.ArrayLike,
    old_logp: npt.ArrayLike,
    *,
    low: float,
    high: float,
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), on student rows.

    Constant, with gradient 0, where A > 0 and ratio > 1 + high, or A < 0 and ratio < 1 - low;
    elsewhere the importance loss. With A < 0 it has no bound in the ratio.

    Source: Schulman et al., arXiv:1707.06347, Eq. 7; two bounds: arXiv:2503.14476, Eq. 8.
    """
    student = np.asarray(student_logits, dtype=np.float64)
    chosen = np.asarray(tokens, dtype=np.int64)
    credit = np.asarray(advantage, dtype=np.float64)
    old = np.asarray(old_logp, dtype=np.float64)

    def row_loss(b: int, t: int) -> tuple[float, Row]:
        student_log_probs = log_softmax(student[b, t])
        token = int(chosen[b, t])
        ratio = math.exp(student_log_probs[token] - old[b, t])
        if credit[b, t] > 0 and ratio > 1 + high:
            return -(1 + high) * credit[b, t], np.zeros(student.shape[2])
        if credit[b, t] < 0 and ratio < 1 - low:
            return -(1 - low) * credit[b, t], np.zeros(student.shape[2])
        gradient = -credit[b, t] * ratio * score(student_log_probs, token)
        return -ratio * credit[b, t], gradient

    return _reduce(row_loss, student.shape, select_rows(mask, provenance, STUDENT), reduction)


def sampled_token_opd(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    *,
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """The score loss with the detached log-ratio of the sampled token as immediate advantage.

    Source: Thinking Machines Lab, "On-Policy Distillation" (blog, 27 Oct 2025), with ratio 1;
    arXiv:2606.22793, Eqs. 10, 11 and 16.
    """
    rows = select_rows(mask, provenance, STUDENT)
    reward = log_ratios(student_logits, teacher_logits, tokens, rows)
    advantage = np.array([immediate(reward[b], rows[b]) for b in range(rows.shape[0])])
    return score_loss(student_logits, tokens, mask, provenance, advantage, reduction=reduction)


def vopd(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    provenance: npt.ArrayLike,
    *,
    reduction: Reduction = token_mean,
) -> LossAndGradient:
    """The score loss with advantage = log-ratio + KL(student || teacher), both detached.

    The baseline -KL is the expected reward of the state, over the full vocabulary.

    Source: arXiv:2605.07865 ("KL for a KL").
    """
    student = np.asarray(student_logits, dtype=np.float64)
    teacher = np.asarray(teacher_logits, dtype=np.float64)
    rows = select_rows(mask, provenance, STUDENT)
    advantage = log_ratios(student, teacher, tokens, rows)
    for b in range(rows.shape[0]):
        for t in range(rows.shape[1]):
            if rows[b, t]:
                advantage[b, t] -= per_state_baseline(
                    log_softmax(student[b, t]), log_softmax(teacher[b, t])
                )
    return score_loss(student_logits, tokens, mask, provenance, advantage, reduction=reduction)


# --------------------------------------------------------------------------------------------


def log_ratios(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    tokens: npt.ArrayLike,
    rows: Rows,
) -> npt.NDArray[np.float64]:
    """log teacher(token) - log student(token) on the rows, 0 elsewhere: `[B, T]`."""
    student = np.asarray(student_logits, dtype=np.float64)
    teacher = np.asarray(teacher_logits, dtype=np.float64)
    chosen = np.asarray(tokens, dtype=np.int64)
    reward = np.zeros(rows.shape)
    for b in range(rows.shape[0]):
        for t in range(rows.shape[1]):
            if rows[b, t]:
                reward[b, t] = teacher_log_ratio(
                    log_softmax(student[b, t]), log_softmax(teacher[b, t]), int(chosen[b, t])
                )
    return reward


def score(student_log_probs: Row, token: int) -> Row:
    """d log student(token) / d logits: [j == token] - student(j)."""
    return np.array(
        [
            (1.0 if j == token else 0.0) - math.exp(student_log_probs[j])
            for j in range(len(student_log_probs))
        ]
    )


def top_k(logits: npt.ArrayLike, k: int) -> list[int]:
    """The ids of the k largest logits, largest first; of equal ones the lower id first."""
    row = np.asarray(logits, dtype=np.float64)
    if not 1 <= k <= len(row):
        raise ValueError(f"k must lie in [1, {len(row)}], got {k}")
    return sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]


def _sequences(rows: Rows) -> list[int]:
    return [b for b in range(rows.shape[0]) if any(rows[b, t] for t in range(rows.shape[1]))]


def _direct(
    value: Callable[[npt.ArrayLike, npt.ArrayLike], float],
    gradient: Callable[[npt.ArrayLike, npt.ArrayLike], Row],
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    rows: Rows,
    reduction: Reduction,
) -> LossAndGradient:
    student = np.asarray(student_logits, dtype=np.float64)
    teacher = np.asarray(teacher_logits, dtype=np.float64)

    def row_loss(b: int, t: int) -> tuple[float, Row]:
        pair = log_softmax(student[b, t]), log_softmax(teacher[b, t])
        return value(*pair), gradient(*pair)

    return _reduce(row_loss, student.shape, rows, reduction)


def _reduce(
    row_loss: RowLoss, shape: tuple[int, ...], rows: Rows, reduction: Reduction
) -> LossAndGradient:
    """Sum of coefficient times row loss, and the same sum of the row gradients."""
    coefficient = reduction(rows)
    total = 0.0
    gradient = np.zeros(shape)
    losses = np.zeros(rows.shape)
    row_gradient = np.zeros(shape)
    for b in range(rows.shape[0]):
        for t in range(rows.shape[1]):
            if rows[b, t]:
                losses[b, t], row_gradient[b, t] = row_loss(b, t)
                total += coefficient[b, t] * losses[b, t]
                gradient[b, t] = coefficient[b, t] * row_gradient[b, t]
    return LossAndGradient(total, gradient, losses, row_gradient)

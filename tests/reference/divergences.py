"""Divergences between two rows of log-probabilities, and their exact logit gradients.

A row holds one distribution over the vocabulary as natural logarithms; -inf is no mass. Terms
without mass follow the limit: `0 * log(0 / x) = 0` for every x, zero included, and
`x * log(x / 0) = +inf` for x > 0. A gradient is taken with respect to the student's logits, over
the whole vocabulary, and uses

    d log student(v) / d logit(j) = [v == j] - student(j)

so that a loss F(student) with h(v) = dF / d student(v) has

    dF / d logit(j) = student(j) * (h(j) - sum_v student(v) * h(v)).

Where a divergence is infinite it has no gradient: `ValueError`. An entry to which the student
gives no mass has gradient 0, the limit.

Source: survey of on-policy distillation, arXiv:2606.22793, Eqs. 2 and 6 and its convention on
supports (truncation replaces the object by a restricted divergence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float64]


def log_softmax(logits: npt.ArrayLike) -> Row:
    """Log-probabilities of one row of logits; a logit of -inf gets no mass."""
    row = np.asarray(logits, dtype=np.float64)
    highest = max(row)
    if not math.isfinite(highest):
        raise ValueError(f"a row of logits needs a finite largest entry, got {highest}")
    normaliser = 0.0
    for logit in row:
        normaliser += math.exp(logit - highest)
    return np.array([logit - highest - math.log(normaliser) for logit in row])


# --------------------------------------------------------------------------------------------
# The full vocabulary


def forward_kl(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> float:
    """KL(teacher || student) = sum_v teacher(v) * log(teacher(v) / student(v)), in nats.

    +inf where the teacher has mass and the student has none.

    Source: arXiv:2606.22793, Eq. 2 with D = KL(teacher || student).
    """
    return _kl(_row(teacher_log_probs), _row(student_log_probs))


def reverse_kl(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> float:
    """KL(student || teacher) = sum_v student(v) * log(student(v) / teacher(v)), in nats.

    +inf where the student has mass and the teacher has none.

    Source: arXiv:2606.22793, Eq. 6.
    """
    return _kl(_row(student_log_probs), _row(teacher_log_probs))


def generalized_jsd(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, teacher_weight: float
) -> float:
    """w * KL(teacher || m) + (1 - w) * KL(student || m), m = w * teacher + (1 - w) * student.

    w is the teacher's weight, strictly between 0 and 1. Finite for any pair. D / w tends to the
    forward KL as w -> 0 and D / (1 - w) to the reverse KL as w -> 1.

    Source: Agarwal et al., arXiv:2306.13649, Sec. 2 (generalized JSD; their beta is w).
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    mixture = mix(student, teacher, teacher_weight=teacher_weight)
    return teacher_weight * _kl(teacher, mixture) + (1 - teacher_weight) * _kl(student, mixture)


def forward_kl_gradient(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> Row:
    """student(j) - teacher(j).

    Derivation: the loss is const - sum_v teacher(v) log student(v).
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    _require_finite(_kl(teacher, student), "forward KL")
    return np.array([math.exp(student[j]) - math.exp(teacher[j]) for j in range(len(student))])


def reverse_kl_gradient(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> Row:
    """student(j) * (log(student(j) / teacher(j)) - D), D the reverse KL.

    Derivation: h(v) = log(student(v) / teacher(v)) + 1; the 1 has no mean score.
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    divergence = _kl(student, teacher)
    _require_finite(divergence, "reverse KL")
    gradient = np.zeros(len(student))
    for j in range(len(student)):
        if student[j] > -math.inf:
            gradient[j] = math.exp(student[j]) * (student[j] - teacher[j] - divergence)
    return gradient


def generalized_jsd_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, teacher_weight: float
) -> Row:
    """(1 - w) * student(j) * (log(student(j) / m(j)) - KL(student || m)).

    Derivation: h(v) = (1 - w) * (log(student/m) + 1 - (w * teacher + (1 - w) * student) / m),
    and the fraction is 1 because the numerator is m.
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    mixture = mix(student, teacher, teacher_weight=teacher_weight)
    student_part = _kl(student, mixture)
    gradient = np.zeros(len(student))
    for j in range(len(student)):
        if student[j] > -math.inf:
            centred = student[j] - mixture[j] - student_part
            gradient[j] = (1 - teacher_weight) * math.exp(student[j]) * centred
    return gradient


def mix(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, teacher_weight: float
) -> Row:
    """log(w * teacher + (1 - w) * student), entry by entry."""
    if not 0.0 < teacher_weight < 1.0:
        raise ValueError(f"teacher_weight must lie strictly in (0, 1), got {teacher_weight}")
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    return np.array(
        [
            np.logaddexp(
                math.log(teacher_weight) + teacher[v], math.log(1 - teacher_weight) + student[v]
            )
            for v in range(len(student))
        ]
    )


# --------------------------------------------------------------------------------------------
# Truncated support, both sides renormalised on it


def renormalise(log_probs: npt.ArrayLike, support: Sequence[int]) -> Row:
    """The distribution conditioned on the support, `K` entries in the order of the support."""
    row = _row(log_probs)
    _check_support(support, len(row))
    mass = 0.0
    for v in support:
        mass += math.exp(row[v])
    if mass == 0.0:
        raise ValueError(f"no mass on the support {list(support)}: nothing to renormalise")
    return np.array([row[v] - math.log(mass) for v in support])


def renormalised_forward_kl(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, support: Sequence[int]
) -> float:
    """KL(teacher | support || student | support).

    Zero for every student that agrees with the teacher *given* the support, whatever mass it
    keeps there.

    Source: arXiv:2606.22793, around Eqs. 29-30 (the restricted-student variant).
    """
    return forward_kl(
        renormalise(student_log_probs, support), renormalise(teacher_log_probs, support)
    )


def renormalised_reverse_kl(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, support: Sequence[int]
) -> float:
    """KL(student | support || teacher | support).

    Source: arXiv:2603.25562 (local support matching, both sides renormalised).
    """
    return reverse_kl(
        renormalise(student_log_probs, support), renormalise(teacher_log_probs, support)
    )


def renormalised_generalized_jsd(
    student_log_probs: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    support: Sequence[int],
    *,
    teacher_weight: float,
) -> float:
    """The generalized JSD of the two distributions conditioned on the support."""
    return generalized_jsd(
        renormalise(student_log_probs, support),
        renormalise(teacher_log_probs, support),
        teacher_weight=teacher_weight,
    )


def renormalised_forward_kl_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, support: Sequence[int]
) -> Row:
    """student(j | support) - teacher(j | support) on the support, 0 off it.

    Derivation: renormalising over the support is the softmax of the support's logits alone.
    """
    inside = forward_kl_gradient(
        renormalise(student_log_probs, support), renormalise(teacher_log_probs, support)
    )
    return _scatter(inside, support, len(_row(student_log_probs)))


def renormalised_reverse_kl_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, support: Sequence[int]
) -> Row:
    """With s, t the conditioned rows: s(j) * (log(s(j) / t(j)) - D) on the support, 0 off it."""
    inside = reverse_kl_gradient(
        renormalise(student_log_probs, support), renormalise(teacher_log_probs, support)
    )
    return _scatter(inside, support, len(_row(student_log_probs)))


def renormalised_generalized_jsd_gradient(
    student_log_probs: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    support: Sequence[int],
    *,
    teacher_weight: float,
) -> Row:
    """The full-vocabulary form on the conditioned rows, 0 off the support."""
    inside = generalized_jsd_gradient(
        renormalise(student_log_probs, support),
        renormalise(teacher_log_probs, support),
        teacher_weight=teacher_weight,
    )
    return _scatter(inside, support, len(_row(student_log_probs)))


# --------------------------------------------------------------------------------------------
# Truncated support with one bucket for the tail


def bucket_tail(log_probs: npt.ArrayLike, support: Sequence[int]) -> Row:
    """The support's entries, then one entry with all the mass outside: `K + 1` entries.

    The tail is a sum over the entries outside, not 1 minus the inside, so it is exactly empty
    where the support is the whole vocabulary.
    """
    row = _row(log_probs)
    _check_support(support, len(row))
    outside = 0.0
    for v in range(len(row)):
        if v not in support:
            outside += math.exp(row[v])
    return np.array([*(row[v] for v in support), math.log(outside) if outside else -math.inf])


def tail_bucket_forward_kl(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, support: Sequence[int]
) -> float:
    """KL(teacher || student) over the support and one bucket; a lower bound of the full one.

    The gap is teacher(tail) * KL(teacher | tail || student | tail).

    Source: arXiv:2606.22793, support convention; the gap is the chain rule of the KL.
    """
    return forward_kl(
        bucket_tail(student_log_probs, support), bucket_tail(teacher_log_probs, support)
    )


def tail_bucket_reverse_kl(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, support: Sequence[int]
) -> float:
    """KL(student || teacher) over the support and one bucket; a lower bound of the full one.

    The gap is student(tail) * KL(student | tail || teacher | tail).

    Source: arXiv:2606.22793, support convention; the gap is the chain rule of the KL.
    """
    return reverse_kl(
        bucket_tail(student_log_probs, support), bucket_tail(teacher_log_probs, support)
    )


def tail_bucket_generalized_jsd(
    student_log_probs: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    support: Sequence[int],
    *,
    teacher_weight: float,
) -> float:
    """The generalized JSD over the support and one bucket; a lower bound of the full one."""
    return generalized_jsd(
        bucket_tail(student_log_probs, support),
        bucket_tail(teacher_log_probs, support),
        teacher_weight=teacher_weight,
    )


def tail_bucket_forward_kl_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, support: Sequence[int]
) -> Row:
    """student(j) - teacher(j) on the support; student(j) * (1 - teacher(tail) / student(tail)) off.

    Derivation: the loss is const - sum over the buckets b of teacher(b) log student(b), and
    d log student(tail) / d logit(j) = [j in tail] student(j) / student(tail) - student(j).
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    _require_finite(tail_bucket_forward_kl(student, teacher, support), "tail-bucket forward KL")
    student_tail = math.exp(bucket_tail(student, support)[-1])
    teacher_tail = math.exp(bucket_tail(teacher, support)[-1])
    gradient = np.zeros(len(student))
    for j in range(len(student)):
        if j in support:
            gradient[j] = math.exp(student[j]) - math.exp(teacher[j])
        elif student[j] > -math.inf:
            gradient[j] = math.exp(student[j]) * (1 - teacher_tail / student_tail)
    return gradient


def tail_bucket_reverse_kl_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, support: Sequence[int]
) -> Row:
    """student(j) * (h(j) - mean of h), h = log(student / teacher) of the bucket that holds j."""
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    _require_finite(tail_bucket_reverse_kl(student, teacher, support), "tail-bucket reverse KL")
    student_tail = bucket_tail(student, support)[-1]
    teacher_tail = bucket_tail(teacher, support)[-1]
    slope = np.zeros(len(student))
    for v in range(len(student)):
        if student[v] == -math.inf:
            continue
        slope[v] = student[v] - teacher[v] if v in support else student_tail - teacher_tail
    return _centred(student, slope)


def tail_bucket_generalized_jsd_gradient(
    student_log_probs: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    support: Sequence[int],
    *,
    teacher_weight: float,
) -> Row:
    """student(j) * (h(j) - mean of h), h = (1 - w) log(student / m) of the bucket that holds j."""
    student = _row(student_log_probs)
    student_buckets = bucket_tail(student, support)
    mixture = mix(
        student_buckets, bucket_tail(teacher_log_probs, support), teacher_weight=teacher_weight
    )
    slope = np.zeros(len(student))
    for v in range(len(student)):
        if student[v] == -math.inf:
            continue
        bucket = list(support).index(v) if v in support else len(support)
        slope[v] = (1 - teacher_weight) * (student_buckets[bucket] - mixture[bucket])
    return _centred(student, slope)


# --------------------------------------------------------------------------------------------


def _row(log_probs: npt.ArrayLike) -> Row:
    return np.asarray(log_probs, dtype=np.float64)


def _kl(first: Row, second: Row) -> float:
    """sum_v first(v) * log(first(v) / second(v)) with the limit convention."""
    if len(first) != len(second):
        raise ValueError(f"rows of {len(first)} and {len(second)} entries cannot be compared")
    total = 0.0
    for v in range(len(first)):
        if first[v] == -math.inf:
            continue
        if second[v] == -math.inf:
            return math.inf
        total += math.exp(first[v]) * (first[v] - second[v])
    return total


def _centred(student: Row, slope: Row) -> Row:
    """student(j) * (slope(j) - sum_v student(v) * slope(v))."""
    mean = 0.0
    for v in range(len(student)):
        mean += math.exp(student[v]) * slope[v]
    return np.array([math.exp(student[j]) * (slope[j] - mean) for j in range(len(student))])


def _scatter(inside: Row, support: Sequence[int], size: int) -> Row:
    """The support's numbers at their vocabulary entries, 0 elsewhere."""
    full = np.zeros(size)
    for position, v in enumerate(support):
        full[v] = inside[position]
    return full


def _check_support(support: Sequence[int], size: int) -> None:
    if len(set(support)) != len(support) or not all(0 <= v < size for v in support):
        raise ValueError(f"a support lists distinct entries below {size}, got {list(support)}")


def _require_finite(divergence: float, name: str) -> None:
    if not math.isfinite(divergence):
        raise ValueError(f"the {name} is infinite here and has no gradient")

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

The last two sections are general: `restrict_by_tail` builds the compared rows of any support and
tail rule, and `gradient_by_tail` turns a *log-slope*, w(v) = student(v) * h(v), into the gradient
with respect to the logits of the whole vocabulary. The functions named after one divergence and
one tail say the same in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float64]
Divergence = Callable[[Row, Row], float]
LogSlope = Callable[[Row, Row], Row]

TAILS = ("bucket", "renormalise", "teacher_renormalise", "truncate")


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


def skew_forward_kl(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, skew: float
) -> float:
    """KL(teacher || m), m = skew * teacher + (1 - skew) * student.

    At most log(1 / skew). Tends to the forward KL as skew -> 0 and to 0 as skew -> 1.

    Source: Ko et al., DistiLLM, arXiv:2402.03898.
    """
    teacher = _row(teacher_log_probs)
    return _kl(teacher, mix(student_log_probs, teacher, teacher_weight=skew))


def skew_reverse_kl(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, skew: float
) -> float:
    """KL(student || m), m = skew * student + (1 - skew) * teacher.

    At most log(1 / skew). Tends to the reverse KL as skew -> 0 and to 0 as skew -> 1.

    Source: Ko et al., DistiLLM, arXiv:2402.03898.
    """
    student = _row(student_log_probs)
    return _kl(student, mix(student, teacher_log_probs, teacher_weight=1 - skew))


def alpha_divergence(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, alpha: float
) -> float:
    """(1 - sum_v teacher(v)^a * student(v)^(1 - a)) / (a * (1 - a)), any a except 0 and 1.

    Tends to the forward KL as a -> 1 and to the reverse KL as a -> 0. Infinite where a > 1 and
    only the teacher has mass, or a < 0 and only the student has. Two rows without any mass (an
    empty support) are 0 apart.

    Source: Amari's alpha-divergence; survey arXiv:2606.22793 lists f-divergences as the choice D.
    """
    if alpha in (0.0, 1.0):
        raise ValueError(f"alpha {alpha} is a KL, the limit of this formula, not a value of it")
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    if _massless(student) and _massless(teacher):
        return 0.0
    overlap = 0.0
    for v in range(len(student)):
        overlap += _product_of_powers(teacher[v], alpha, student[v], 1 - alpha)
    return (1 - overlap) / (alpha * (1 - alpha))


def jensen_shannon(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> float:
    """1/2 KL(teacher || m) + 1/2 KL(student || m), m = (teacher + student) / 2.

    Source: Lin, doi:10.1109/18.61115.
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    middle = mix(student, teacher, teacher_weight=0.5)
    return 0.5 * _kl(teacher, middle) + 0.5 * _kl(student, middle)


def renyi_divergence(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, order: float
) -> float:
    """log(sum_v teacher(v)^a * student(v)^(1 - a)) / (a - 1), a = order in (0, 1).

    Infinite where no entry has mass on both sides. Two rows without any mass (an empty support)
    are 0 apart.

    Source: Renyi (1961); arXiv:2608.09745.
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    if _massless(student) and _massless(teacher):
        return 0.0
    overlap = sum(_shared_powers(student, teacher, order))
    return math.log(overlap) / (order - 1) if overlap > 0 else math.inf


def capped_forward_kl(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, cap: float
) -> float:
    """sum_v min(teacher(v) * log(teacher(v) / student(v)), cap).

    Source: arXiv:2601.18734 (OPSD).
    """
    total = 0.0
    for contribution in _forward_parts(_row(student_log_probs), _row(teacher_log_probs)):
        total += min(contribution, cap)
    return total


def hybrid_policy(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, token: int
) -> float:
    """The mean of `hybrid_policy_of_draw` over one token that the student draws."""
    student = _row(student_log_probs)
    total = 0.0
    for drawn in range(len(student)):
        value, _ = hybrid_policy_of_draw(student, _row(teacher_log_probs), token, drawn)
        total += math.exp(student[drawn]) * value
    return total


def hybrid_policy_of_draw(student: Row, teacher: Row, token: int, drawn: int) -> tuple[float, Row]:
    """The published loss for a data token y and one drawn token v, and its logit gradient.

        k(v) = student(v) * log(teacher(v) / student(v)),  held fixed
        weight of y: k(y), and where that is positive teacher(y) * (1 + [k(v) < 0]) beside it
        loss = -weight * log student(y) - [v != y and k(v) < 0] * k(v) * log student(v)

    so that over v the weights average to those of the expected rule. The gradient is held fixed
    in the probability with which v is drawn.

    Source: arXiv:2604.20244 (HPD), its code.
    """

    def pull(v: int) -> float:
        return math.exp(student[v]) * (teacher[v] - student[v]) if student[v] > -math.inf else 0.0

    size = len(student)
    down = pull(drawn) < 0
    weight = pull(token)
    if weight > 0:
        weight += math.exp(teacher[token]) * (2.0 if down else 1.0)
    on = np.zeros(size)
    on[token] += weight
    if down and drawn != token:
        on[drawn] += pull(drawn)
    loss = 0.0
    for v in range(size):
        loss -= on[v] * student[v] if on[v] != 0 else 0.0
    return loss, np.array([-on[j] + on.sum() * math.exp(student[j]) for j in range(size)])


def squared_hellinger(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> float:
    """1/2 * sum_v (sqrt(teacher(v)) - sqrt(student(v)))^2, between 0 and 1.

    For normalised rows 1 - sum_v sqrt(teacher(v) * student(v)), a quarter of the
    alpha-divergence at a = 1/2.
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    total = 0.0
    for v in range(len(student)):
        difference = math.sqrt(math.exp(teacher[v])) - math.sqrt(math.exp(student[v]))
        total += 0.5 * difference * difference
    return total


def power_divergence(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, power: float
) -> float:
    """sum_v [ s^(1+a) / (a(1+a)) - s * t^a / a + t^(1+a) / (1+a) ], a = power > 0.

    s is the student's probability and t the teacher's. The Bregman divergence of
    x^(1+a) / (a(1+a)): at a = 1 half the squared distance of the probabilities, and the reverse
    KL as a -> 0.

    Source: Basu et al. (1998), density power divergence; its policy gradient up to the factor a
    is arXiv:2606.17199.
    """
    if power <= 0.0:
        raise ValueError(f"power must be positive, got {power}")
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    a, total = power, 0.0
    for v in range(len(student)):
        s, t = math.exp(student[v]), math.exp(teacher[v])
        total += s ** (1 + a) / (a * (1 + a)) - s * t**a / a + t ** (1 + a) / (1 + a)
    return total


def total_variation(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> float:
    """1/2 * sum_v |student(v) - teacher(v)|, between 0 and 1."""
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    total = 0.0
    for v in range(len(student)):
        total += 0.5 * abs(math.exp(student[v]) - math.exp(teacher[v]))
    return total


def student_entropy(student_log_probs: npt.ArrayLike) -> float:
    """-sum_v student(v) * log student(v), in nats."""
    total = 0.0
    for logp in _row(student_log_probs):
        if logp > -math.inf:
            total -= math.exp(logp) * logp
    return total


def teacher_entropy(teacher_log_probs: npt.ArrayLike) -> float:
    """-sum_v teacher(v) * log teacher(v), in nats."""
    return student_entropy(teacher_log_probs)


def skew_forward_kl_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, skew: float
) -> Row:
    """student(j) * (h(j) - mean of h), h = -(1 - skew) * teacher / m."""
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    mixture = mix(student, teacher, teacher_weight=skew)
    slope = np.zeros(len(student))
    for v in range(len(student)):
        if student[v] > -math.inf:
            slope[v] = -(1 - skew) * math.exp(teacher[v] - mixture[v])
    return _centred(student, slope)


def skew_reverse_kl_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, skew: float
) -> Row:
    """student(j) * (h(j) - mean of h), h = log(student / m) + 1 - skew * student / m."""
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    mixture = mix(student, teacher, teacher_weight=1 - skew)
    slope = np.zeros(len(student))
    for v in range(len(student)):
        if student[v] > -math.inf:
            log_share = student[v] - mixture[v]
            slope[v] = log_share + 1 - skew * math.exp(log_share)
    return _centred(student, slope)


def alpha_divergence_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, alpha: float
) -> Row:
    """(Z * student(j) - teacher(j)^a * student(j)^(1 - a)) / a, Z = sum of the second term."""
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    _require_finite(alpha_divergence(student, teacher, alpha=alpha), "alpha-divergence")
    overlap = [
        _product_of_powers(teacher[v], alpha, student[v], 1 - alpha) for v in range(len(student))
    ]
    return np.array(
        [(sum(overlap) * math.exp(student[j]) - overlap[j]) / alpha for j in range(len(student))]
    )


def jensen_shannon_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike
) -> Row:
    """student(j) * (log(student(j) / m(j)) - KL(student || m)) / 2."""
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    middle = mix(student, teacher, teacher_weight=0.5)
    divergence = _kl(student, middle)
    gradient = np.zeros(len(student))
    for j in range(len(student)):
        if student[j] > -math.inf:
            gradient[j] = math.exp(student[j]) * (student[j] - middle[j] - divergence) / 2
    return gradient


def renyi_divergence_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, order: float
) -> Row:
    """student(j) - m(j), m proportional to teacher^a * student^(1 - a)."""
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    _require_finite(renyi_divergence(student, teacher, order=order), "Renyi divergence")
    middle = _shared_powers(student, teacher, order)
    return np.array([math.exp(student[j]) - middle[j] / sum(middle) for j in range(len(student))])


def capped_forward_kl_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, cap: float
) -> Row:
    """-sum over v that are not cut off of teacher(v) * ([v == j] - student(j))."""
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    gradient = np.zeros(len(student))
    for v, contribution in enumerate(_forward_parts(student, teacher)):
        if contribution < cap:
            for j in range(len(student)):
                gradient[j] -= math.exp(teacher[v]) * (float(v == j) - math.exp(student[j]))
    return gradient


def hybrid_policy_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, token: int
) -> Row:
    """The mean of the published gradient over one token that the student draws."""
    student = _row(student_log_probs)
    total = np.zeros(len(student))
    for drawn in range(len(student)):
        _, gradient = hybrid_policy_of_draw(student, _row(teacher_log_probs), token, drawn)
        total += math.exp(student[drawn]) * gradient
    return total


def squared_hellinger_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike
) -> Row:
    """(Z * student(j) - sqrt(teacher(j) * student(j))) / 2, Z = sum of the roots.

    Derivation: normalised rows give 1 - sum of roots, h = -sqrt(teacher / student) / 2.
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    root = [math.exp(0.5 * (student[v] + teacher[v])) for v in range(len(student))]
    return np.array([(sum(root) * math.exp(student[j]) - root[j]) / 2 for j in range(len(student))])


def power_divergence_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, power: float
) -> Row:
    """student(j) * (h(j) - mean of h), h = (student^a - teacher^a) / a."""
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    slope = np.array(
        [
            (math.exp(power * student[v]) - math.exp(power * teacher[v])) / power
            for v in range(len(student))
        ]
    )
    return _centred(student, slope)


def total_variation_gradient(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike
) -> Row:
    """student(j) * (h(j) - mean of h), h = sign(student - teacher) / 2, 0 where they agree.

    A subgradient where an entry of the two agrees.
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    return _centred(student, np.array([0.5 * _sign(s - t) for s, t in _pairs(student, teacher)]))


def student_entropy_gradient(student_log_probs: npt.ArrayLike) -> Row:
    """-student(j) * (log student(j) + H)."""
    student = _row(student_log_probs)
    entropy = student_entropy(student)
    gradient = np.zeros(len(student))
    for j in range(len(student)):
        if student[j] > -math.inf:
            gradient[j] = -math.exp(student[j]) * (student[j] + entropy)
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
# From one sampled token, to be back-propagated


def reverse_kl_k2(student_logp: float, teacher_logp: float) -> float:
    """r^2 / 2, r = teacher_logp - student_logp.

    On student tokens its gradient is the reverse KL's in expectation; its value is not.

    Source: Schulman, "Approximating KL Divergence" (blog, 2020), k2.
    """
    return 0.5 * (teacher_logp - student_logp) ** 2


def reverse_kl_k2_slope(student_logp: float, teacher_logp: float) -> float:
    """d k2 / d student_logp = -r."""
    return student_logp - teacher_logp


def corrected_k3(student_logp: float, teacher_logp: float, old_logp: float) -> float:
    """student / old * (u - 1 - log u) of the sampled token, u = teacher / student.

    Source: arXiv:2604.10674 (Skill-SD).
    """
    log_ratio = teacher_logp - student_logp
    return math.exp(student_logp - old_logp) * (math.expm1(log_ratio) - log_ratio)


def corrected_k3_slope(student_logp: float, teacher_logp: float, old_logp: float) -> float:
    """-student / old * r: the ratio's own slope takes u - 1 out of that of k3, -(u - 1)."""
    return -math.exp(student_logp - old_logp) * (teacher_logp - student_logp)


def forward_kl_k3(student_logp: float, teacher_logp: float) -> float:
    """exp(r) - 1 - r, r = teacher_logp - student_logp.

    On student tokens its gradient is the *forward* KL's in expectation; its value is that of the
    reverse KL.

    Source: Schulman, "Approximating KL Divergence" (blog, 2020), k3.
    """
    log_ratio = teacher_logp - student_logp
    return math.exp(log_ratio) - 1 - log_ratio


def forward_kl_k3_slope(student_logp: float, teacher_logp: float) -> float:
    """d k3 / d student_logp = 1 - exp(r)."""
    return 1 - math.exp(teacher_logp - student_logp)


# --------------------------------------------------------------------------------------------
# Supports: lists of distinct ids of one position; -1 stands for an entry that is absent


def full(vocab_size: int) -> list[int]:
    """Every id."""
    return list(range(vocab_size))


def sampled(token: int) -> list[int]:
    """The chosen token alone."""
    return [token]


def student_top_k(student_top_ids: Sequence[int], *, k: int) -> list[int]:
    """The student's k likeliest ids, from its list with the likeliest first."""
    return [int(v) for v in list(student_top_ids)[:k]]


def teacher_top_k(teacher_top_ids: Sequence[int], *, k: int) -> list[int]:
    """The teacher's k likeliest ids, from its list with the likeliest first."""
    return [int(v) for v in list(teacher_top_ids)[:k]]


def union(
    teacher_top_ids: Sequence[int],
    student_top_ids: Sequence[int],
    *,
    teacher_k: int,
    student_k: int,
) -> list[int]:
    """Ids among the teacher's top or the student's, each once; the teacher's first."""
    chosen: list[int] = []
    for v in [
        *teacher_top_k(teacher_top_ids, k=teacher_k),
        *student_top_k(student_top_ids, k=student_k),
    ]:
        if v >= 0 and v not in chosen:
            chosen.append(v)
    return chosen


def intersection(
    teacher_top_ids: Sequence[int],
    student_top_ids: Sequence[int],
    *,
    teacher_k: int,
    student_k: int,
) -> list[int]:
    """Ids among both tops, in the teacher's order; may be empty."""
    of_student = student_top_k(student_top_ids, k=student_k)
    of_teacher = teacher_top_k(teacher_top_ids, k=teacher_k)
    return [v for v in of_teacher if v >= 0 and v in of_student]


def routing_support(
    teacher_top_ids: Sequence[int],
    student_top_ids: Sequence[int],
    token: int,
    special_ids: Collection[int] = (),
    *,
    teacher_k: int,
    student_k: int,
) -> list[int]:
    """The union and the sampled token, without special ids; the sampled token stays whatever.

    Source: arXiv:2606.22793, Eq. 31. Special ids leave before anything is restricted: our
    convention.
    """
    chosen = [
        v
        for v in union(teacher_top_ids, student_top_ids, teacher_k=teacher_k, student_k=student_k)
        if v == token or v not in special_ids
    ]
    return chosen if token in chosen else [*chosen, token]


def restrict(log_probs: npt.ArrayLike, ids: Sequence[int]) -> Row:
    """The entries as they are; -inf for an absent one."""
    row = _row(log_probs)
    _check_support([v for v in ids if v >= 0], len(row))
    return np.array([row[v] if v >= 0 else -math.inf for v in ids])


def log_mass_outside(log_probs: npt.ArrayLike, ids: Sequence[int]) -> float:
    """Log of the mass of every id that is not listed; -inf where none is left."""
    return float(bucket_tail(log_probs, [v for v in ids if v >= 0])[-1])


def smooth(teacher_log_probs: npt.ArrayLike, *, smoothing: float, vocab_size: int) -> Row:
    """log((1 - smoothing) * teacher + smoothing / vocab_size), entry by entry."""
    return np.array(
        [
            math.log((1 - smoothing) * math.exp(logp) + smoothing / vocab_size)
            if smoothing > 0 or logp > -math.inf
            else -math.inf
            for logp in _row(teacher_log_probs)
        ]
    )


def restrict_by_tail(log_probs: npt.ArrayLike, ids: Sequence[int], *, tail: str, side: str) -> Row:
    """What one side of a divergence sees of its distribution.

        bucket               the entries, then one entry with all the rest; both sides
        renormalise          the entries, conditioned on the support; both sides
        teacher_renormalise  teacher: conditioned on the support, then an empty bucket;
                             student: as with `bucket`
        truncate             the entries as they are; both sides

    An absent entry (-1) has no mass. Conditioned on a support without mass, nothing has any.
    """
    if side not in ("student", "teacher"):
        raise ValueError(f"side is student or teacher, not {side!r}")
    entries = restrict(log_probs, ids)
    if tail == "truncate":
        return entries
    mass = math.fsum(math.exp(logp) for logp in entries)
    conditioned = np.array([logp - math.log(mass) if mass > 0 else -math.inf for logp in entries])
    if tail == "renormalise":
        return conditioned
    if tail == "bucket" or (tail == "teacher_renormalise" and side == "student"):
        return np.array([*entries, log_mass_outside(log_probs, ids)])
    if tail == "teacher_renormalise":
        return np.array([*conditioned, -math.inf])
    raise ValueError(f"tail is one of {TAILS}, not {tail!r}")


# --------------------------------------------------------------------------------------------
# Any divergence over any support and tail


def truncated_reverse_kl(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike
) -> float:
    """sum over the given entries of student * log(student / teacher), entries as they are.

    Of any sign where the entries are a truncated support. Its declared gradient holds
    student * log(student / teacher) fixed and differentiates log student: see
    `truncated_reverse_kl_log_slope`. On normalised rows it is the reverse KL.

    Source: arXiv:2605.11182, Eq. 12 (stop-gradient top-k).
    """
    return _kl(_row(student_log_probs), _row(teacher_log_probs))


def candidate_advantage_loss(
    student_log_probs: npt.ArrayLike,
    student_support_logp: npt.ArrayLike,
    teacher_support_logp: npt.ArrayLike,
) -> float:
    """-sum_v s(v) * (log teacher(v) - log student(v)) * log student(v), s the first argument.

    The first factors are held fixed. An entry without weight, as one that is absent, says nothing.

    Source: arXiv:2604.13016, with the student's weights.
    """
    weight, student = _row(student_log_probs), _row(student_support_logp)
    teacher = _row(teacher_support_logp)
    total = 0.0
    for v in range(len(weight)):
        if weight[v] > -math.inf:
            total -= math.exp(weight[v]) * (teacher[v] - student[v]) * student[v]
    return total


def candidate_advantage_loss_gradient(
    student_log_probs: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    ids: Sequence[int],
    *,
    tail: str,
) -> Row:
    """Of `candidate_advantage_loss` by the logits of the vocabulary, both sides on `ids`.

    -sum over v of ids of s(v) * (log teacher(v) - log student(v)) * ([v == j] - student(j)).
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    weight = restrict_by_tail(student, ids, tail=tail, side="student")
    gradient = np.zeros(len(student))
    for place, v in enumerate(ids):
        if v < 0 or student[v] == -math.inf:
            continue
        pull = math.exp(weight[place]) * (teacher[v] - student[v])
        for j in range(len(student)):
            gradient[j] -= pull * (float(v == j) - math.exp(student[j]))
    return gradient


def divergence_by_tail(
    divergence: Divergence,
    student_log_probs: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    ids: Sequence[int],
    *,
    tail: str,
) -> float:
    """The divergence of what the two sides see: `restrict_by_tail`, then `divergence`."""
    return divergence(
        restrict_by_tail(student_log_probs, ids, tail=tail, side="student"),
        restrict_by_tail(teacher_log_probs, ids, tail=tail, side="teacher"),
    )


def gradient_by_tail(
    log_slope: LogSlope,
    student_log_probs: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    ids: Sequence[int],
    *,
    tail: str,
) -> Row:
    """Gradient with respect to the logits of the whole vocabulary.

    With w(b) the log-slope of entry b of the compared rows, s(b) the student there and p(j) the
    student over the vocabulary:

        renormalise   w(j) - s(j) * sum of w          on the support, 0 off it
        truncate      [j in support] * w(j) - p(j) * sum of w
        the others    p(j) / s(b) * w(b) - p(j) * sum of w, b the bucket that holds j

    Derivation: d log s(b) / d logit(j) is [j == b] - s(j), [j == b] - p(j) and
    [j in b] p(j) / s(b) - p(j).
    """
    student = _row(student_log_probs)
    seen = restrict_by_tail(student, ids, tail=tail, side="student")
    slope = log_slope(seen, restrict_by_tail(teacher_log_probs, ids, tail=tail, side="teacher"))
    for w in slope:
        _require_finite(float(w), "divergence of these rows")
    total = math.fsum(slope)
    gradient = np.zeros(len(student))
    for j in range(len(student)):
        inside = j in ids
        if tail == "renormalise":
            if inside:
                b = list(ids).index(j)
                gradient[j] = slope[b] - math.exp(seen[b]) * total
        elif tail == "truncate":
            own = slope[list(ids).index(j)] if inside else 0.0
            gradient[j] = own - math.exp(student[j]) * total
        elif student[j] > -math.inf:
            b = list(ids).index(j) if inside else len(ids)
            share = math.exp(student[j] - seen[b])
            gradient[j] = share * slope[b] - math.exp(student[j]) * total
        elif inside:
            gradient[j] = slope[list(ids).index(j)]
    return gradient


def forward_kl_log_slope(student: Row, teacher: Row) -> Row:
    """-teacher(v)."""
    _require_finite(_kl(teacher, student), "forward KL")
    return np.array([-math.exp(t) for _, t in _pairs(student, teacher)])


def reverse_kl_log_slope(student: Row, teacher: Row) -> Row:
    """student(v) * (log(student(v) / teacher(v)) + 1).

    With the tail rule `truncate` this is the live gradient of the un-normalised sum, whose +1
    pushes mass out of the support.
    """
    return np.array(
        [math.exp(s) * (s - t + 1) if s > -math.inf else 0.0 for s, t in _pairs(student, teacher)]
    )


def truncated_reverse_kl_log_slope(student: Row, teacher: Row) -> Row:
    """student(v) * log(student(v) / teacher(v)): the reverse KL's without the +1."""
    return np.array(
        [math.exp(s) * (s - t) if s > -math.inf else 0.0 for s, t in _pairs(student, teacher)]
    )


def generalized_jsd_log_slope(student: Row, teacher: Row, *, teacher_weight: float) -> Row:
    """(1 - w) * student(v) * log(student(v) / m(v))."""
    mixture = mix(student, teacher, teacher_weight=teacher_weight)
    return np.array(
        [
            (1 - teacher_weight) * math.exp(s) * (s - m) if s > -math.inf else 0.0
            for s, m in _pairs(student, mixture)
        ]
    )


def skew_forward_kl_log_slope(student: Row, teacher: Row, *, skew: float) -> Row:
    """-(1 - skew) * teacher(v) * student(v) / m(v)."""
    mixture = mix(student, teacher, teacher_weight=skew)
    return np.array(
        [
            -(1 - skew) * math.exp(s + t - m) if s > -math.inf else 0.0
            for (s, t), m in zip(_pairs(student, teacher), mixture, strict=True)
        ]
    )


def skew_reverse_kl_log_slope(student: Row, teacher: Row, *, skew: float) -> Row:
    """student(v) * (log(student(v) / m(v)) + 1 - skew * student(v) / m(v))."""
    mixture = mix(student, teacher, teacher_weight=1 - skew)
    return np.array(
        [
            math.exp(s) * (s - m + 1 - skew * math.exp(s - m)) if s > -math.inf else 0.0
            for s, m in _pairs(student, mixture)
        ]
    )


def alpha_divergence_log_slope(student: Row, teacher: Row, *, alpha: float) -> Row:
    """-teacher(v)^a * student(v)^(1 - a) / a."""
    return np.array(
        [-_product_of_powers(t, alpha, s, 1 - alpha) / alpha for s, t in _pairs(student, teacher)]
    )


def jensen_shannon_log_slope(student: Row, teacher: Row) -> Row:
    """student(v) * log(student(v) / m(v)) / 2."""
    return generalized_jsd_log_slope(student, teacher, teacher_weight=0.5)


def renyi_divergence_log_slope(student: Row, teacher: Row, *, order: float) -> Row:
    """-teacher(v)^a * student(v)^(1 - a), over its sum; 0 on an empty support."""
    middle = _shared_powers(student, teacher, order)
    if _massless(student) and _massless(teacher):
        return np.zeros(len(student))
    return np.array([-part / sum(middle) for part in middle])


def capped_forward_kl_log_slope(student: Row, teacher: Row, *, cap: float) -> Row:
    """-teacher(v), 0 where it is cut off."""
    parts = _forward_parts(student, teacher)
    return np.array(
        [-math.exp(t) if part < cap else 0.0 for t, part in zip(teacher, parts, strict=True)]
    )


def squared_hellinger_log_slope(student: Row, teacher: Row) -> Row:
    """-sqrt(teacher(v) * student(v)) / 2: of 1 - sum of roots, on rows that are normalised."""
    return np.array([-0.5 * math.exp(0.5 * (s + t)) for s, t in _pairs(student, teacher)])


def power_divergence_log_slope(student: Row, teacher: Row, *, power: float) -> Row:
    """student(v) * (student(v)^a - teacher(v)^a) / a."""
    return np.array(
        [
            math.exp(s) * (math.exp(power * s) - math.exp(power * t)) / power
            for s, t in _pairs(student, teacher)
        ]
    )


def total_variation_log_slope(student: Row, teacher: Row) -> Row:
    """student(v) * sign(student(v) - teacher(v)) / 2."""
    return np.array([0.5 * math.exp(s) * _sign(s - t) for s, t in _pairs(student, teacher)])


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


def _pairs(first: Row, second: Row) -> list[tuple[float, float]]:
    return [(float(f), float(s)) for f, s in zip(first, second, strict=True)]


def _massless(log_probs: Row) -> bool:
    return all(logp == -math.inf for logp in log_probs)


def _sign(x: float) -> float:
    """-1, 0 or 1; 0 for the nan of two entries without mass."""
    return float(x > 0) - float(x < 0)


def _product_of_powers(log_x: float, a: float, log_y: float, b: float) -> float:
    """x^a * y^b for a + b = 1, neither of them 0: 0 where both x and y are, else the limit."""
    if log_x == log_y == -math.inf:
        return 0.0
    if log_x == -math.inf:
        return 0.0 if a > 0 else math.inf
    if log_y == -math.inf:
        return 0.0 if b > 0 else math.inf
    return math.exp(a * log_x + b * log_y)


def _shared_powers(student: Row, teacher: Row, order: float) -> list[float]:
    """teacher(v)^a * student(v)^(1 - a), 0 where either has no mass, for a in (0, 1)."""
    return [_product_of_powers(t, order, s, 1 - order) for s, t in _pairs(student, teacher)]


def _forward_parts(student: Row, teacher: Row) -> list[float]:
    """teacher(v) * log(teacher(v) / student(v)) with the limit convention."""
    parts = []
    for s, t in _pairs(student, teacher):
        if t == -math.inf:
            parts.append(0.0)
        else:
            parts.append(math.inf if s == -math.inf else math.exp(t) * (t - s))
    return parts


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

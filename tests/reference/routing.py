"""Where the mass of a suppressed token goes, one position at a time.

First Eqs. 31-36 as the survey writes them, over sets and dictionaries of ids: `local_scores`,
`counterfactual_route`. Then the same steps, and their alternatives, as columns over the K entries
of a support, under the names the library uses: scores, candidates, shares, amounts, transfers,
gates. `ids` lists the entries; -1 stands for one that is absent (a bucket included), which has
neither score nor share. The sampled token is never a candidate.

Gradients are taken with respect to the logits of the whole vocabulary, everything but the
student's log-probabilities held fixed. A transfer sees only differences of log-probabilities,
which are differences of logits whether or not the rows are conditioned on the support.

Source: survey of on-policy distillation, arXiv:2606.22793, Sec. 4.4, Eqs. 28 and 31-36.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .divergences import Row, log_softmax, routing_support

MARGIN = 1e-6


@dataclass(frozen=True)
class LossAndGradient:
    """One position's loss and its gradient with respect to the logits of the vocabulary."""

    loss: float
    gradient: Row


# --------------------------------------------------------------------------------------------
# Eqs. 31-36, literally


@dataclass(frozen=True)
class Route:
    """What Eqs. 31-36 decide at one position.

    Attributes:
        support: Eq. 31.
        score: Eq. 33, per id of the support.
        candidates: Eq. 34, with the fallback where it was asked for.
        share: Eq. 36's alpha, per candidate.
        amount: [-score(token)]_+; 0 where the token is not overrated or has no candidate.
        loss, gradient: Eq. 36.
    """

    support: list[int]
    score: dict[int, float]
    candidates: set[int]
    share: dict[int, float]
    amount: float
    loss: float
    gradient: Row


def local_scores(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, support: Sequence[int]
) -> dict[int, float]:
    """eta(v) = log teacher(v | support) - log student(v | support) - baseline.

    The baseline is the student's mean of the first two, minus the restricted reverse KL.

    Source: arXiv:2606.22793, Eqs. 32 and 33.
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    student_mass = sum(math.exp(student[v]) for v in support)
    teacher_mass = sum(math.exp(teacher[v]) for v in support)
    student_inside = {v: float(student[v]) - math.log(student_mass) for v in support}
    teacher_inside = {v: float(teacher[v]) - math.log(teacher_mass) for v in support}
    baseline = 0.0
    for v in support:
        if student_inside[v] > -math.inf:
            ratio = teacher_inside[v] - student_inside[v]
            baseline += math.exp(student_inside[v]) * ratio
    return {v: teacher_inside[v] - student_inside[v] - baseline for v in support}


def counterfactual_route(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    token: int,
    *,
    teacher_k: int,
    student_k: int,
    special_ids: Collection[int] = (),
    min_probability: float | None = None,
    temperature: float = 1.0,
    margin: float = MARGIN,
) -> Route:
    """[-eta(u)]_+ * sum over candidates v of alpha(v) * log(1 + exp(z_u - z_v)), u the token.

    alpha(v) is [eta(v)]_+^(1 / temperature) over its sum. Gradient: with w the amount and
    sigma(v) = sigmoid(z_u - z_v), w * sum of alpha * sigma at u and -w * alpha(v) * sigma(v) at
    each v. Where the intersection has no member above the margin and `min_probability` is given,
    the student's side is relaxed to student(v) > min_probability.

    Our additions to the paper: the margin, and that special ids leave before Eq. 31.

    Source: arXiv:2606.22793, Eqs. 31-36.
    """
    z, student = np.asarray(student_logits, dtype=np.float64), log_softmax(student_logits)
    teacher = log_softmax(teacher_logits)
    of_teacher, of_student = _likeliest(teacher), _likeliest(student)
    support = routing_support(
        of_teacher, of_student, token, special_ids, teacher_k=teacher_k, student_k=student_k
    )
    score = local_scores(student, teacher, support)
    endorsed = {v for v in support if v in of_teacher[:teacher_k] and v != token}
    reachable = {v for v in support if v in of_student[:student_k]}
    candidates = {v for v in endorsed & reachable if score[v] > margin}
    if not candidates and min_probability is not None:
        likely = {v for v in support if math.exp(student[v]) > min_probability}
        candidates = {v for v in endorsed & likely if score[v] > margin}
    weight = {v: score[v] ** (1 / temperature) for v in candidates}
    share = {v: weight[v] / sum(weight.values()) for v in candidates}
    overrated_by = -score[token]
    amount = overrated_by if candidates and overrated_by > margin else 0.0
    loss, gradient = 0.0, np.zeros(len(student))
    for v in candidates:
        loss += amount * share[v] * math.log1p(math.exp(z[token] - z[v]))
        pull = amount * share[v] / (1 + math.exp(z[v] - z[token]))
        gradient[token] += pull
        gradient[v] -= pull
    return Route(support, score, candidates, share, amount, loss, gradient)


def exact_transfer(student_logits: npt.ArrayLike, teacher_logits: npt.ArrayLike, token: int) -> Row:
    """The logit gradient of RKL-consistent routing: m * (e_u - r), u the token.

    m = [-eta(u)]_+ and r(v) = student(v) * [eta(v)]_+ over its sum, over the whole vocabulary.
    Over the student's own tokens its expectation is the gradient of the reverse KL.

    Source: derived from arXiv:2606.22793, Eqs. 7 and 28: sum of student * eta is 0, so what all
    tokens release is what all of them receive.
    """
    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    score = local_scores(student, teacher, range(len(student)))
    amount = max(-score[token], 0.0)
    wanted = {v: math.exp(student[v]) * max(score[v], 0.0) for v in score}
    gradient = np.zeros(len(student))
    if amount > 0:
        gradient[token] += amount
        for v in score:
            gradient[v] -= amount * wanted[v] / sum(wanted.values())
    return gradient


def suppression_as_transfer(
    student_logits: npt.ArrayLike, token: int, advantage: float
) -> tuple[float, dict[int, float]]:
    """The amount and the routing that plain suppression is: |A| (1 - student(u)), and the
    student's own distribution over the others. For advantages below 0.

    Source: arXiv:2606.22793, Eq. 28.
    """
    student = log_softmax(student_logits)
    rest = 1 - math.exp(student[token])
    routing = {v: math.exp(student[v]) / rest for v in range(len(student)) if v != token}
    return abs(advantage) * rest, routing


# --------------------------------------------------------------------------------------------
# Scores


def centred_log_ratio(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> Row:
    """eta = log teacher - log student + KL(student || teacher), of the rows as given.

    The rows are what the support and its tail rule leave. Its student-weighted mean is 0 where
    they are normalised. 0 for an entry without mass on either side.

    Source: arXiv:2606.22793, Eqs. 32 and 33.
    """
    student, teacher = _row(student_log_probs), _row(teacher_log_probs)
    divergence = 0.0
    for v in range(len(student)):
        if student[v] > -math.inf:
            divergence += math.exp(student[v]) * (student[v] - teacher[v])
    return np.array(
        [
            0.0 if s == t == -math.inf else t - s + divergence
            for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
        ]
    )


# --------------------------------------------------------------------------------------------
# Candidates


def endorsed_and_reachable(
    routing_score: npt.ArrayLike,
    support_ids: Sequence[int],
    token: int,
    teacher_top_ids: Sequence[int],
    student_top_ids: Sequence[int],
    *,
    teacher_k: int,
    student_k: int,
    margin: float = MARGIN,
) -> list[bool]:
    """Among the teacher's top and the student's top, with a score above the margin.

    Source: arXiv:2606.22793, Eq. 34.
    """
    of_teacher, of_student = set(teacher_top_ids[:teacher_k]), set(student_top_ids[:student_k])
    score = _scores_by_id(routing_score, support_ids)
    chosen = {v for v in of_teacher & of_student if v in score and score[v] > margin}
    return _as_column(chosen, support_ids, token)


def endorsed_or_likely(
    routing_score: npt.ArrayLike,
    support_ids: Sequence[int],
    token: int,
    teacher_top_ids: Sequence[int],
    student_top_ids: Sequence[int],
    student_support_logp: npt.ArrayLike,
    *,
    teacher_k: int,
    student_k: int,
    min_probability: float,
    margin: float = MARGIN,
) -> list[bool]:
    """`endorsed_and_reachable`; where that is empty, the student's top gives way to
    student(v) > min_probability, the teacher's top and the margin stay.

    Source: arXiv:2606.22793, around Eq. 34.
    """
    strict = endorsed_and_reachable(
        routing_score,
        support_ids,
        token,
        teacher_top_ids,
        student_top_ids,
        teacher_k=teacher_k,
        student_k=student_k,
        margin=margin,
    )
    if any(strict):
        return strict
    score = _scores_by_id(routing_score, support_ids)
    logp = _scores_by_id(student_support_logp, support_ids)
    chosen = {
        v
        for v in set(teacher_top_ids[:teacher_k])
        if v in score and score[v] > margin and math.exp(logp[v]) > min_probability
    }
    return _as_column(chosen, support_ids, token)


def raised(
    routing_score: npt.ArrayLike,
    support_ids: Sequence[int],
    token: int,
    *,
    margin: float = MARGIN,
) -> list[bool]:
    """Every entry with a score above the margin."""
    score = _scores_by_id(routing_score, support_ids)
    return _as_column({v for v in score if score[v] > margin}, support_ids, token)


def all_others(support_ids: Sequence[int], token: int) -> list[bool]:
    """Every entry but the token."""
    return _as_column(set(support_ids), support_ids, token)


def teacher_top(
    support_ids: Sequence[int], token: int, teacher_top_ids: Sequence[int], *, teacher_k: int
) -> list[bool]:
    """Every entry among the teacher's k likeliest, whatever its score."""
    return _as_column(set(teacher_top_ids[:teacher_k]), support_ids, token)


def best(
    routing_score: npt.ArrayLike,
    support_ids: Sequence[int],
    token: int,
    *,
    margin: float = MARGIN,
) -> list[bool]:
    """The one entry, other than the token, with the highest score, if above the margin."""
    score = _scores_by_id(routing_score, support_ids)
    others = {v: score[v] for v in score if v != token}
    top = max(others, key=lambda v: others[v], default=None)
    chosen = set() if top is None or others[top] <= margin else {top}
    return _as_column(chosen, support_ids, token)


# --------------------------------------------------------------------------------------------
# Shares: they sum to 1 over the candidates, or are all 0


def by_powers(
    routing_score: npt.ArrayLike,
    candidates: Sequence[bool],
    student_support_logp: npt.ArrayLike,
    teacher_support_logp: npt.ArrayLike,
    *,
    teacher_power: float,
    student_power: float,
    score_power: float,
) -> Row:
    """In proportion to teacher^a * student^b * [score]_+^c; a power of 0 leaves its factor out.

    a = b = 0, c = 1 is Eq. 36; b = c = 1 over every raised entry is the RKL-consistent routing;
    b = 1 over all others is what plain suppression does; a = 1 follows the teacher.
    """
    score = _row(routing_score).tolist()
    student, teacher = _row(student_support_logp).tolist(), _row(teacher_support_logp).tolist()
    weight = []
    for k in range(len(score)):
        factor = 1.0 if candidates[k] else 0.0
        if factor and teacher_power:
            factor *= math.exp(teacher_power * teacher[k])
        if factor and student_power:
            factor *= math.exp(student_power * student[k])
        if factor and score_power:
            factor *= max(score[k], 0.0) ** score_power
        weight.append(factor)
    return _over_their_sum(weight)


def by_score(
    routing_score: npt.ArrayLike, candidates: Sequence[bool], *, temperature: float = 1.0
) -> Row:
    """In proportion to [score]_+^(1 / temperature); at 1 it is Eq. 36's alpha.

    Source: arXiv:2606.22793, Eq. 36.
    """
    score = _row(routing_score).tolist()
    return _over_their_sum(
        [
            max(score[k], 0.0) ** (1 / temperature) if candidates[k] else 0.0
            for k in range(len(score))
        ]
    )


# --------------------------------------------------------------------------------------------
# Amounts


def excess_score(routing_score: npt.ArrayLike, support_ids: Sequence[int], token: int) -> float:
    """[-score(token)]_+; 0 where the token is not in the support. Source: Eq. 36."""
    score = _scores_by_id(routing_score, support_ids)
    return max(-score[token], 0.0) if token in score else 0.0


def matched_suppression(advantage: float, student_logp: float) -> float:
    """|advantage| * (1 - student(token)): what plain suppression moves. Source: Eq. 28."""
    return abs(advantage) * (1 - math.exp(student_logp))


# --------------------------------------------------------------------------------------------
# Transfers


def pairwise_logistic(
    student_log_probs: npt.ArrayLike,
    support_ids: Sequence[int],
    token: int,
    routing: npt.ArrayLike,
    amount: float,
    *,
    vocab_size: int,
) -> LossAndGradient:
    """amount * sum over v of routing(v) * log(1 + student(u) / student(v)).

    Gradient: amount * routing(v) * s(v) taken from v and given to u, s(v) = sigmoid(z_u - z_v).

    Source: arXiv:2606.22793, Eq. 36.
    """
    student, share = _columns(student_log_probs, support_ids, routing)
    loss, gradient = 0.0, np.zeros(vocab_size)
    for v in share:
        gap = student[token] - student[v]
        loss += amount * share[v] * (max(gap, 0.0) + math.log1p(math.exp(-abs(gap))))
        pull = amount * share[v] / (1 + math.exp(-gap))
        gradient[token] += pull
        gradient[v] -= pull
    return LossAndGradient(loss, gradient)


def linear_transfer(
    student_log_probs: npt.ArrayLike,
    support_ids: Sequence[int],
    token: int,
    routing: npt.ArrayLike,
    amount: float,
    *,
    vocab_size: int,
) -> LossAndGradient:
    """amount * sum over v of routing(v) * (log student(u) - log student(v)).

    Gradient: amount * (e_u - routing).
    """
    student, share = _columns(student_log_probs, support_ids, routing)
    loss, gradient = 0.0, np.zeros(vocab_size)
    for v in share:
        loss += amount * share[v] * (student[token] - student[v])
        gradient[token] += amount * share[v]
        gradient[v] -= amount * share[v]
    return LossAndGradient(loss, gradient)


def bounded_cross_entropy(
    student_log_probs: npt.ArrayLike,
    support_ids: Sequence[int],
    token: int,
    routing: npt.ArrayLike,
    amount: float,
    *,
    vocab_size: int,
) -> LossAndGradient:
    """-sum over entries of target * log student, target = student - m e_u + m routing, fixed.

    m is the amount, at most student(u) of the row as given. Gradient: m * (e_u - routing), where
    the row is normalised. Without any candidate m is 0, and the loss the row's entropy.
    """
    row = _row(student_log_probs).tolist()
    student, share = _columns(student_log_probs, support_ids, routing)
    moved = min(amount, math.exp(student[token])) if share else 0.0
    loss, gradient = 0.0, np.zeros(vocab_size)
    for k in range(len(row)):
        v = support_ids[k]
        target = math.exp(row[k])
        if v >= 0:
            target += moved * share.get(v, 0.0) - (moved if v == token else 0.0)
            gradient[v] = (moved if v == token else 0.0) - moved * share.get(v, 0.0)
        if target:
            loss -= target * row[k]
    return LossAndGradient(loss, gradient)


# --------------------------------------------------------------------------------------------
# Gates and damping


def overrated(
    routing_score: npt.ArrayLike,
    support_ids: Sequence[int],
    token: int,
    *,
    margin: float = MARGIN,
) -> float:
    """1 where the token's score is below -margin; 0 elsewhere, also where it has none."""
    score = _scores_by_id(routing_score, support_ids)
    return float(token in score and score[token] < -margin)


def has_candidates(candidates: Sequence[bool]) -> float:
    """1 where there is a candidate."""
    return float(any(candidates))


def candidate_mass(
    candidates: Sequence[bool], teacher_support_logp: npt.ArrayLike, *, at_least: float
) -> float:
    """1 where the candidates' share of the whole teacher is `at_least`."""
    teacher = _row(teacher_support_logp).tolist()
    mass = sum(math.exp(teacher[k]) for k in range(len(teacher)) if candidates[k])
    return float(mass >= at_least)


def evidence(
    routing_score: npt.ArrayLike,
    candidates: Sequence[bool],
    student_support_logp: npt.ArrayLike,
    *,
    full_at: float,
) -> float:
    """min(1, S / full_at), S = sum over the candidates of student * [score]_+."""
    score, student = _row(routing_score).tolist(), _row(student_support_logp).tolist()
    total = 0.0
    for k in range(len(score)):
        if candidates[k]:
            total += math.exp(student[k]) * max(score[k], 0.0)
    return min(1.0, total / full_at)


# --------------------------------------------------------------------------------------------
# The whole term


def routed(
    source: LossAndGradient,
    transfer: LossAndGradient,
    *,
    gate: float,
    mode: str,
    interpolation: float = 0.5,
    coef: float = 1.0,
    weight: float = 1.0,
) -> LossAndGradient:
    """(1 - gate * zeta) * source + gate * coef * weight * transfer.

    zeta is 0 for `add`, 1 for `replace` and `interpolation` for `interpolate`; the gate is 0 or
    1, the weight the product of weights and damping.
    """
    zeta = {"add": 0.0, "replace": 1.0, "interpolate": interpolation}[mode]
    kept, moved = 1 - gate * zeta, gate * coef * weight
    return LossAndGradient(
        kept * source.loss + moved * transfer.loss,
        kept * source.gradient + moved * transfer.gradient,
    )


# --------------------------------------------------------------------------------------------


def _row(numbers: npt.ArrayLike) -> Row:
    return np.asarray(numbers, dtype=np.float64)


def _likeliest(log_probs: Row) -> list[int]:
    return sorted(range(len(log_probs)), key=lambda v: (-log_probs[v], v))


def _scores_by_id(column: npt.ArrayLike, support_ids: Sequence[int]) -> dict[int, float]:
    numbers = _row(column).tolist()
    return {int(v): numbers[k] for k, v in enumerate(support_ids) if v >= 0}


def _as_column(chosen: Collection[int], support_ids: Sequence[int], token: int) -> list[bool]:
    return [int(v) >= 0 and v != token and int(v) in chosen for v in support_ids]


def _over_their_sum(weight: Sequence[float]) -> Row:
    total = sum(weight)
    return np.array([w / total if total > 0 else 0.0 for w in weight])


def _columns(
    student_log_probs: npt.ArrayLike, support_ids: Sequence[int], routing: npt.ArrayLike
) -> tuple[dict[int, float], dict[int, float]]:
    """The student by id, and the shares that are not 0 by id."""
    share = _scores_by_id(routing, support_ids)
    return _scores_by_id(student_log_probs, support_ids), {v: r for v, r in share.items() if r}

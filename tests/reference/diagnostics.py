"""Slow, literal definitions of the diagnostics: numbers that say whether a signal can be used.

`student_log_probs` and `teacher_log_probs` are `[N, V]`, normalised, -inf where there is no mass;
`mask` is `[B, T]`. In the formulas q is the teacher, pi the student, mu the sampler, y or a the
sampled token, TopK_q the k likeliest ids of q, of equals the lower id first (entries without mass
included), H the entropy in nats.

Conventions, ours where the survey has none:

- 0 * anything is 0, and two equal -inf differ by 0.
- A quotient with 0 below and a mean of nothing have no value: nan.
- Tokens the mask closes are deleted before anything is counted: t is the place among the open
  tokens and len their number. Means along responses are over tokens, all responses together.
- A verdict of nan was not judged and is left out.

Source: survey of on-policy distillation, arXiv:2606.22793, its sections on state compatibility and
actionability, and the papers it names there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .rewards import Array, each

Bools = npt.NDArray[np.bool_]
NAN = math.nan

# --------------------------------------------------------------------------------------------
# One row at a time


def top_k_overlap(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, k: int
) -> Array:
    """|TopK_q & TopK_pi| / k. Source: arXiv:2604.13016."""
    result = []
    for student, teacher in _pairs(student_log_probs, teacher_log_probs):
        result.append(len(_top(teacher, k) & _top(student, k)) / k)
    return np.array(result, dtype=np.float64)


def student_overlap_mass(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, k: int
) -> Array:
    """pi(TopK_q)."""
    result = []
    for student, teacher in _pairs(student_log_probs, teacher_log_probs):
        result.append(_mass(student, _top(teacher, k)))
    return np.array(result, dtype=np.float64)


def teacher_overlap_mass(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, k: int
) -> Array:
    """q(TopK_pi)."""
    result = []
    for student, teacher in _pairs(student_log_probs, teacher_log_probs):
        result.append(_mass(teacher, _top(student, k)))
    return np.array(result, dtype=np.float64)


def teacher_top_mass(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, k: int
) -> Array:
    """q(TopK_q)."""
    result = []
    for _, teacher in _pairs(student_log_probs, teacher_log_probs):
        result.append(_mass(teacher, _top(teacher, k)))
    return np.array(result, dtype=np.float64)


def overlap_advantage(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, k: int
) -> Array:
    """Sum over the overlap of pi(v) / pi(overlap) * (log q(v) - log pi(v)); 0 if that is empty.

    The survey says mean; this is the mean under the student. 0 too where the student has no mass
    on the overlap; -inf where the teacher lacks an entry of it that the student has.

    Source: arXiv:2604.13016.
    """
    result = []
    for student, teacher in _pairs(student_log_probs, teacher_log_probs):
        overlap = _top(student, k) & _top(teacher, k)
        mass = _mass(student, overlap)
        total = 0.0
        for v in overlap:
            if math.exp(student[v]) > 0:
                total += math.exp(student[v]) / mass * (teacher[v] - student[v])
        result.append(total)
    return np.array(result, dtype=np.float64)


def entropy_gap(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> Array:
    """|H_q - H_pi|. Source: arXiv:2604.13016."""
    result = []
    for student, teacher in _pairs(student_log_probs, teacher_log_probs):
        result.append(abs(_entropy(teacher) - _entropy(student)))
    return np.array(result, dtype=np.float64)


def teacher_surprise(teacher_logp: npt.ArrayLike) -> Array:
    """-log q(y)."""
    return each(lambda logp: -logp, teacher_logp)


def excess_surprise(teacher_logp: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> Array:
    """-log q(y) - H_q: 0 in the mean over y ~ q."""
    result = []
    for logp, teacher in zip(_list(teacher_logp), _rows(teacher_log_probs), strict=True):
        result.append(-logp - _entropy(teacher))
    return np.array(result, dtype=np.float64)


def teacher_confidence(teacher_log_probs: npt.ArrayLike) -> Array:
    """max over v of q(v)."""
    return np.array([max(math.exp(x) for x in row) for row in _rows(teacher_log_probs)])


def teacher_margin(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, k: int
) -> Array:
    """log q(first) - log q(second), the two likeliest by q of TopK_pi; k >= 2.

    Infinite where the second has no mass, 0 where neither has.

    Source: arXiv:2605.13643.
    """
    result = []
    for student, teacher in _pairs(student_log_probs, teacher_log_probs):
        first, second, *_ = sorted((teacher[v] for v in _top(student, k)), reverse=True)
        result.append(_difference(first, second))
    return np.array(result, dtype=np.float64)


def reverse_kl(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> Array:
    """Sum over v of pi(v) (log pi(v) - log q(v))."""
    pairs = _pairs(student_log_probs, teacher_log_probs)
    return np.array([_kl(student, teacher) for student, teacher in pairs], dtype=np.float64)


def forward_kl(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> Array:
    """Sum over v of q(v) (log q(v) - log pi(v))."""
    pairs = _pairs(student_log_probs, teacher_log_probs)
    return np.array([_kl(teacher, student) for student, teacher in pairs], dtype=np.float64)


def log_ratio(student_logp: npt.ArrayLike, teacher_logp: npt.ArrayLike) -> Array:
    """r = log q(y) - log pi(y)."""
    return each(lambda student, teacher: _difference(teacher, student), student_logp, teacher_logp)


def support_gap(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, *, k: int
) -> tuple[Array, Array]:
    """(1 - P, 1 - Q), P = pi(TopK_q) and Q = q(TopK_q).

    The survey's notation has the letters the other way round; the student comes first here.
    """
    of_student = student_overlap_mass(student_log_probs, teacher_log_probs, k=k)
    of_teacher = teacher_top_mass(student_log_probs, teacher_log_probs, k=k)
    return 1 - of_student, 1 - of_teacher


def gradient_proxy(student_log_probs: npt.ArrayLike, tokens: npt.ArrayLike) -> Array:
    """sqrt(1 - 2 pi(a) + sum of pi(v)^2) = sqrt(sum over v of ([v = a] - pi(v))^2)."""
    result = []
    for student, a in zip(_rows(student_log_probs), _ids(tokens), strict=True):
        square = 0.0
        for v in range(len(student)):
            square += (float(v == a) - math.exp(student[v])) ** 2
        result.append(math.sqrt(square))
    return np.array(result, dtype=np.float64)


def reachable(
    student_log_probs: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    tokens: npt.ArrayLike,
    *,
    k: int,
    margin: float = 1e-6,
) -> Bools:
    """C+ = {v in TopK_q | TopK_pi, v != y: log q(v) - log pi(v) > margin}, as columns of ids.

    An id the student lacks and the teacher has is in it: its log-ratio is +inf. One that both lack
    is not. (Eq. 34 of the survey takes the intersection and a centred score; this is wider.)
    """
    result = np.zeros(np.asarray(student_log_probs).shape, dtype=np.bool_)
    pairs = _pairs(student_log_probs, teacher_log_probs)
    for n, ((student, teacher), y) in enumerate(zip(pairs, _ids(tokens), strict=True)):
        for v in _top(teacher, k) | _top(student, k):
            result[n, v] = v != y and _difference(teacher[v], student[v]) > margin
    return result


def leak(
    student_log_probs: npt.ArrayLike, reachable: npt.ArrayLike, tokens: npt.ArrayLike
) -> Array:
    """1 - pi(C+) / (1 - pi(y)); 1 where C+ is empty or 1 - pi(y) is 0."""
    result = []
    columns = zip(_rows(student_log_probs), _sets(reachable), _ids(tokens), strict=True)
    for student, candidates, y in columns:
        released = -math.expm1(student[y])
        if not candidates or released <= 0:
            result.append(1.0)
        else:
            result.append(1 - _mass(student, candidates) / released)
    return np.array(result, dtype=np.float64)


def eos_divergence(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, eos_ids: Collection[int]
) -> Array:
    """|log pi(EOS set) - log q(EOS set)|; 0 where both are without mass, inf where one is."""
    result = []
    for student, teacher in _pairs(student_log_probs, teacher_log_probs):
        one, other = _log_mass(student, set(eos_ids)), _log_mass(teacher, set(eos_ids))
        result.append(abs(_difference(one, other)))
    return np.array(result, dtype=np.float64)


# --------------------------------------------------------------------------------------------
# One number from rows


def quantiles(
    r: npt.ArrayLike, shares: Sequence[float] = (0.01, 0.05, 0.5, 0.95, 0.99)
) -> dict[float, float]:
    """For each share the value at share * (n - 1) of the ordered r, on the line between neighbours.

    nan for every share if r is empty.
    """
    ordered = sorted(_list(r))
    result = {}
    for share in shares:
        if not ordered:
            result[share] = NAN
            continue
        place = share * (len(ordered) - 1)
        lower = math.floor(place)
        part = place - lower
        result[share] = ordered[lower]
        if part > 0 and ordered[lower + 1] != ordered[lower]:
            result[share] = (1 - part) * ordered[lower] + part * ordered[lower + 1]
    return result


def negative_share(advantage: npt.ArrayLike) -> float:
    """Share of A < 0."""
    return _mean(float(a < 0) for a in _list(advantage))


def negative_mass(advantage: npt.ArrayLike) -> float:
    """Sum of max(-A, 0) / sum of |A|; nan where the latter is 0."""
    numbers = _list(advantage)
    return _quotient(sum(max(-a, 0.0) for a in numbers), sum(abs(a) for a in numbers))


def effective_share(size: npt.ArrayLike) -> float:
    """ESS / n, ESS = (sum of s)^2 / sum of s^2; nan where every s is 0.

    For the concentration of a gradient, s = |A| * gradient_proxy.
    """
    numbers = _list(size)
    effective = _quotient(sum(numbers) ** 2, sum(s**2 for s in numbers))
    return _quotient(effective, len(numbers))


def top_share(size: npt.ArrayLike, share: float = 0.01) -> float:
    """Sum of the ceil(share * n) largest s / sum of s; nan where every s is 0.

    The share is the decimal as it is written: 0.07 of 100 is 7, not 8.
    """
    ordered = sorted(_list(size), reverse=True)
    largest = math.ceil(Fraction(str(share)) * len(ordered))
    return _quotient(sum(ordered[:largest]), sum(ordered))


def disagreement_map(
    student_entropy: npt.ArrayLike,
    other: npt.ArrayLike,
    disagreement: npt.ArrayLike,
    bins: int = 4,
) -> Array:
    """Shares of the rows, and of the sum of |d|, by part of the one number and of the other.

    A row is in part i of a number if at least i / bins of all rows, and less than (i + 1) / bins,
    have a smaller one. nan where there is no row, or the sum is 0.
    """
    one, two, sizes = _list(student_entropy), _list(other), [abs(d) for d in _list(disagreement)]
    table = np.zeros((2, bins, bins))
    for a, b, size in zip(one, two, sizes, strict=True):
        i, j = (
            max(
                i
                for i in range(bins)
                if Fraction(sum(1 for x in column if x < number), len(column)) >= Fraction(i, bins)
            )
            for number, column in ((a, one), (b, two))
        )
        table[0, i, j] += 1.0
        table[1, i, j] += size
    for half, total in zip(table, (len(one), sum(sizes)), strict=True):
        half /= total if total else NAN
    return table


def routable_share(
    advantage: npt.ArrayLike,
    reachable: npt.ArrayLike,
    teacher_log_probs: npt.ArrayLike,
    *,
    mass: float,
) -> float:
    """Among rows with A < 0, the share with |C+| >= 1 and q(C+) >= mass."""
    result = []
    columns = zip(_list(advantage), _sets(reachable), _rows(teacher_log_probs), strict=True)
    for a, candidates, teacher in columns:
        if a < 0:
            result.append(float(len(candidates) >= 1 and _mass(teacher, candidates) >= mass))
    return _mean(result)


def realised_routing(
    before: npt.ArrayLike, after: npt.ArrayLike, reachable: npt.ArrayLike, tokens: npt.ArrayLike
) -> float:
    """Sum over rows of pi'(C+) - pi(C+), over the sum of pi(y) - pi'(y); pi' is after the step.

    Every row counts, one without C+ in the denominator only. nan where the denominator is 0.
    """
    gained, released = 0.0, 0.0
    columns = zip(_pairs(before, after), _sets(reachable), _ids(tokens), strict=True)
    for (old, new), candidates, y in columns:
        gained += _mass(new, candidates) - _mass(old, candidates)
        released += math.exp(old[y]) - math.exp(new[y])
    return _quotient(gained, released)


def marginal_info(reverse_kl: npt.ArrayLike) -> float:
    """Mean over rows of the reverse KL, which is what it takes: [N] numbers."""
    return _mean(_list(reverse_kl))


def importance_ratio(old_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> float:
    """Mean of pi(y) / mu(y)."""
    pairs = zip(_list(old_logp), _list(student_logp), strict=True)
    return _mean(_exp(_difference(student, old)) for old, student in pairs)


def kl_from_samples(old_logp: npt.ArrayLike, student_logp: npt.ArrayLike) -> float:
    """Mean of log mu(y) - log pi(y), which estimates KL(mu || pi) where y ~ mu."""
    pairs = zip(_list(old_logp), _list(student_logp), strict=True)
    return _mean(_difference(old, student) for old, student in pairs)


def log_mismatch(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Mean of |a - b|."""
    return _mean(abs(_difference(x, y)) for x, y in zip(_list(a), _list(b), strict=True))


def masked_share(ratio: npt.ArrayLike, low: float, high: float) -> float:
    """Share of rows with ratio < low or ratio > high."""
    return _mean(float(x < low or x > high) for x in _list(ratio))


def importance_mass_masked(ratio: npt.ArrayLike, low: float, high: float) -> float:
    """Sum of the ratios below low or above high / sum of the ratios."""
    numbers = _list(ratio)
    return _quotient(sum(x for x in numbers if x < low or x > high), sum(numbers))


def cache_drift(kept: npt.ArrayLike, again: npt.ArrayLike) -> tuple[float, float]:
    """(mean, max) of |kept - again|; two equal -inf differ by 0."""
    drift = [abs(_difference(x, y)) for x, y in zip(_list(kept), _list(again), strict=True)]
    return _mean(drift), max(drift, default=NAN)


def mean_entropy(student_log_probs: npt.ArrayLike) -> float:
    """Mean over rows of H_pi."""
    return _mean(_entropy(student) for student in _rows(student_log_probs))


def excess_id_ratio(
    r: npt.ArrayLike, tokens: npt.ArrayLike, top: int
) -> list[tuple[int, int, float]]:
    """(id, count, mean |r|) of the `top` ids with the largest mean |r|; of equals the lower id."""
    ratios, ids = _list(r), _ids(tokens)
    entries = []
    for v in set(ids):
        of_id = [abs(x) for x, y in zip(ratios, ids, strict=True) if y == v]
        entries.append((v, len(of_id), _mean(of_id)))
    return sorted(entries, key=lambda entry: (-entry[2], entry[0]))[:top]


def pairwise_kl(teachers: npt.ArrayLike) -> Array:
    """[m, m'] = mean over rows of KL(m || m')."""
    stacks = np.asarray(teachers, dtype=np.float64)
    result = np.zeros((len(stacks), len(stacks)))
    for m in range(len(stacks)):
        for other in range(len(stacks)):
            pairs = _pairs(stacks[m], stacks[other])
            result[m, other] = _mean(_kl(one, two) for one, two in pairs)
    return result


# --------------------------------------------------------------------------------------------
# Gradients and the critic


def cosine(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """a . b / (|a| |b|); nan where either is 0."""
    one, other = _list(a), _list(b)
    product = sum(x * y for x, y in zip(one, other, strict=True))
    return _quotient(
        product, math.sqrt(sum(x**2 for x in one)) * math.sqrt(sum(y**2 for y in other))
    )


def explained_variance(values: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """1 - Var(target - value) / Var(target); nan where the target does not vary."""
    estimates, targets = _list(values), _list(target)
    if len(set(targets)) < 2:  # the mean of equal numbers may be a rounding away from them
        return NAN
    rest = [x - estimate for estimate, x in zip(estimates, targets, strict=True)]
    return 1 - _variance(rest) / _variance(targets)


def td_residual_by_bin(delta: npt.ArrayLike, mask: npt.ArrayLike, bins: int) -> Array:
    """Mean of delta over the tokens with floor(bins * t / len) = i, per bin i; nan without any."""
    return np.array([_mean(inside) for inside in _by_relative_bin(delta, mask, bins)])


def gradient_variance(gradients: npt.ArrayLike) -> float:
    """Sum over coordinates of sum over draws of (g - mean)^2 / (S - 1); nan for fewer than two."""
    draws = np.asarray(gradients, dtype=np.float64)
    if len(draws) < 2:
        return NAN
    total = 0.0
    for d in range(draws.shape[1]):
        total += _variance(draws[:, d].tolist()) * len(draws) / (len(draws) - 1)
    return total


# --------------------------------------------------------------------------------------------
# Along a response


def suffix_fade(value: npt.ArrayLike, mask: npt.ArrayLike) -> float:
    """Mean over tokens with t >= 2 len / 3, over the mean over tokens with t < len / 3.

    The thirds are those of each response, the two means over the tokens of all of them: not the
    mean of a quotient per response. A response of one or two tokens has no last third.
    """
    numbers = np.asarray(value, dtype=np.float64)
    first, last = [], []
    for b, kept in enumerate(_open(mask)):
        for t, column in enumerate(kept):
            if 3 * t < len(kept):
                first.append(float(numbers[b, column]))
            if 3 * t >= 2 * len(kept):
                last.append(float(numbers[b, column]))
    return _quotient(_mean(last), _mean(first))


def dispersion_by_bin(r: npt.ArrayLike, mask: npt.ArrayLike, bins: int) -> Array:
    """std of r over the tokens with floor(bins * t / len) = i, over that of bin 0.

    The std divides by the number of tokens, not by one less. nan where a bin has no token, and
    everywhere if bin 0 does not vary.

    Source: arXiv:2605.13643.
    """
    spread = []
    for inside in _by_relative_bin(r, mask, bins):
        if not inside:
            spread.append(NAN)
        elif len(set(inside)) == 1:
            spread.append(0.0)
        else:
            spread.append(math.sqrt(_variance(inside)))
    return np.array([_quotient(s, spread[0]) for s in spread])


def profile(value: npt.ArrayLike, mask: npt.ArrayLike, edges: Sequence[int]) -> Array:
    """Mean over the tokens with edges[i] <= t < edges[i + 1], per bin i; nan without any."""
    numbers = np.asarray(value, dtype=np.float64)
    result = []
    for low, high in pairwise(edges):
        inside = []
        for b, kept in enumerate(_open(mask)):
            for t, column in enumerate(kept):
                if low <= t < high:
                    inside.append(float(numbers[b, column]))
        result.append(_mean(inside))
    return np.array(result, dtype=np.float64)


def drift_budget(r: npt.ArrayLike, mask: npt.ArrayLike) -> Array:
    """Sum over k < t of |r(k)|; 0 on closed tokens."""
    numbers = np.asarray(r, dtype=np.float64)
    result = np.zeros(numbers.shape)
    for b, kept in enumerate(_open(mask)):
        for t, column in enumerate(kept):
            result[b, column] = sum(abs(float(numbers[b, k])) for k in kept[:t])
    return result


def change_point(margins: npt.ArrayLike) -> int | None:
    """argmin over s, mean of margins[:s] > mean of margins[s:], of S log(RSS / S) + 3 log S.

    RSS is that about the two means, at least 1e-12 S. None where S log(RSS / S) + log S about the
    one mean is not larger; of equal splits the first. Fewer than two sentences have none.

    Source: arXiv:2605.13643.
    """
    numbers = _list(margins)
    count = len(numbers)

    def criterion(pieces: Sequence[Sequence[float]], parameters: int) -> float:
        rss = 0.0
        for piece in pieces:
            for x in piece:
                rss += (x - _mean(piece)) ** 2
        rss = max(rss, 1e-12 * count)
        return count * math.log(rss / count) + parameters * math.log(count)

    best = None
    if count >= 2:
        least = criterion([numbers], 1)
        for s in range(1, count):
            if _mean(numbers[:s]) > _mean(numbers[s:]):
                score = criterion([numbers[:s], numbers[s:]], 3)
                if score < least:
                    best, least = s, score
    return best


def first_token_spike(value: npt.ArrayLike, mask: npt.ArrayLike) -> float:
    """Mean over tokens with t = 0, over the mean over tokens with t >= 1."""
    numbers = np.asarray(value, dtype=np.float64)
    first: list[float] = []
    later: list[float] = []
    for b, kept in enumerate(_open(mask)):
        for t, column in enumerate(kept):
            (first if t == 0 else later).append(float(numbers[b, column]))
    return _quotient(_mean(first), _mean(later))


def length_mean(mask: npt.ArrayLike) -> float:
    """Open tokens / B; an empty response counts with length 0."""
    return _mean(float(len(kept)) for kept in _open(mask))


def truncated_share(stop_reason: Sequence[str]) -> float:
    """Share of responses that stopped for "length"."""
    return _mean(float(reason == "length") for reason in stop_reason)


def repeated_ngrams(tokens: npt.ArrayLike, mask: npt.ArrayLike, n: int) -> Array:
    """1 - distinct n-grams / n-grams, per response; nan where it is shorter than n."""
    ids = np.asarray(tokens)
    result = []
    for b, kept in enumerate(_open(mask)):
        text = [int(ids[b, t]) for t in kept]
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        result.append(1 - _quotient(len(set(grams)), len(grams)))
    return np.array(result, dtype=np.float64)


# --------------------------------------------------------------------------------------------
# Outcomes and texts


def align_auc(score: npt.ArrayLike, verdict: npt.ArrayLike) -> float:
    """Share of (right, wrong) pairs with score(right) > score(wrong), equals counting half.

    Right is a verdict of 0.5 or more. A response with a score of nan (an empty one) is left out.
    """
    judged = _judged(score, verdict)
    right = [s for s, v in judged if v >= 0.5]
    wrong = [s for s, v in judged if not v >= 0.5]
    won = 0.0
    for one in right:
        for other in wrong:
            won += 1.0 if one > other else 0.5 if one == other else 0.0
    return _quotient(won, len(right) * len(wrong))


def outcome_correlation(score: npt.ArrayLike, verdict: npt.ArrayLike) -> float:
    """Pearson's correlation with the verdict as the number it is; nan where one is constant.

    A response with a score of nan is left out.
    """
    judged = _judged(score, verdict)
    scores, verdicts = [s for s, _ in judged], [v for _, v in judged]
    if len(set(scores)) < 2 or len(set(verdicts)) < 2:
        return NAN
    middle, centre = _mean(scores), _mean(verdicts)
    product = sum((s - middle) * (v - centre) for s, v in judged)
    spread = sum((s - middle) ** 2 for s in scores) * sum((v - centre) ** 2 for v in verdicts)
    return product / math.sqrt(spread)


def split_delta(solved_before: npt.ArrayLike, after: npt.ArrayLike) -> tuple[float, float]:
    """(mean of after - 1 over the solved, mean of after - 0 over the unsolved)."""
    before = np.asarray(solved_before, dtype=np.bool_).tolist()
    kept = [(b, a) for b, a in zip(before, _list(after), strict=True) if not math.isnan(a)]
    return _mean(a - 1 for b, a in kept if b), _mean(a - 0 for b, a in kept if not b)


def calibration_error(confidence: npt.ArrayLike, verdict: npt.ArrayLike, bins: int = 10) -> float:
    """Sum over bins of |bin| / B * |share right - mean confidence|.

    Bin i is (i / bins, (i + 1) / bins], the first one with 0. Right is a verdict of 0.5 or more.
    """
    judged = _judged(confidence, verdict)
    inside: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for c, v in judged:
        i = next(i for i in range(bins) if c <= (i + 1) / bins)
        inside[i].append((c, float(v >= 0.5)))
    total = 0.0
    for pairs in inside:
        if pairs:
            apart = abs(_mean(right for _, right in pairs) - _mean(c for c, _ in pairs))
            total += len(pairs) * apart
    return _quotient(total, len(judged))


def hedging_share(texts: Sequence[str], words: Collection[str]) -> float:
    """Share of texts that hold one of the words with no letter, digit or _ beside it; any case."""
    result = []
    for text in texts:
        found = False
        for word in words:
            whole = r"(?<!\w)" + re.escape(word.casefold()) + r"(?!\w)"
            found = found or re.search(whole, text.casefold()) is not None
        result.append(float(found))
    return _mean(result)


def privilege_gap(with_context: npt.ArrayLike, without: npt.ArrayLike) -> float:
    """Mean over prompts of with - without; a prompt that one side did not judge is left out."""
    pairs = zip(_list(with_context), _list(without), strict=True)
    return _mean(x - y for x, y in pairs if not math.isnan(x) and not math.isnan(y))


def recoverability(from_prefix: npt.ArrayLike, from_scratch: npt.ArrayLike) -> float:
    """Mean of the judged from_prefix - mean of the judged from_scratch; not paired."""
    return _mean(x for x in _list(from_prefix) if not math.isnan(x)) - _mean(
        x for x in _list(from_scratch) if not math.isnan(x)
    )


def retokenised_share(
    ids: Sequence[Sequence[Hashable]], again: Sequence[Sequence[Hashable]]
) -> float:
    """Share of texts whose ids come back equal, in number and order."""
    pairs = zip(ids, again, strict=True)
    return _mean(float(list(one) == list(other)) for one, other in pairs)


# --------------------------------------------------------------------------------------------


def _rows(log_probs: npt.ArrayLike) -> list[list[float]]:
    rows: list[list[float]] = np.asarray(log_probs, dtype=np.float64).tolist()
    return rows


def _pairs(one: npt.ArrayLike, other: npt.ArrayLike) -> list[tuple[list[float], list[float]]]:
    return list(zip(_rows(one), _rows(other), strict=True))


def _list(numbers: npt.ArrayLike) -> list[float]:
    return [float(x) for x in np.asarray(numbers, dtype=np.float64).ravel()]


def _ids(tokens: npt.ArrayLike) -> list[int]:
    return [int(y) for y in np.asarray(tokens).ravel()]


def _sets(reachable: npt.ArrayLike) -> list[set[int]]:
    rows = np.asarray(reachable, dtype=np.bool_)
    return [{v for v in range(len(row)) if row[v]} for row in rows]


def _open(mask: npt.ArrayLike) -> list[list[int]]:
    return [[t for t in range(len(row)) if row[t]] for row in np.asarray(mask, dtype=np.bool_)]


def _judged(score: npt.ArrayLike, verdict: npt.ArrayLike) -> list[tuple[float, float]]:
    pairs = zip(_list(score), _list(verdict), strict=True)
    return [(s, v) for s, v in pairs if not math.isnan(s) and not math.isnan(v)]


def _top(row: Sequence[float], k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda v: (-row[v], v))[:k])


def _mass(row: Sequence[float], ids: Iterable[int]) -> float:
    return sum(math.exp(row[v]) for v in ids)


def _log_mass(row: Sequence[float], ids: Collection[int]) -> float:
    """log of the sum of exp, taken relative to the largest, so that tiny masses stay."""
    most = max((row[v] for v in ids), default=-math.inf)
    if most == -math.inf:
        return -math.inf
    return most + math.log(sum(math.exp(row[v] - most) for v in ids))


def _entropy(row: Sequence[float]) -> float:
    return -sum(math.exp(x) * x for x in row if math.exp(x) > 0)


def _kl(one: Sequence[float], other: Sequence[float]) -> float:
    pairs = zip(one, other, strict=True)
    return sum(math.exp(x) * (x - y) for x, y in pairs if math.exp(x) > 0)


def _difference(one: float, other: float) -> float:
    return 0.0 if one == other else one - other


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _mean(numbers: Iterable[float]) -> float:
    column = list(numbers)
    return sum(column) / len(column) if column else NAN


def _variance(numbers: Sequence[float]) -> float:
    return _mean((x - _mean(numbers)) ** 2 for x in numbers)


def _quotient(above: float, below: float) -> float:
    return above / below if below != 0 else NAN


def _by_relative_bin(value: npt.ArrayLike, mask: npt.ArrayLike, bins: int) -> list[list[float]]:
    """The values of the tokens with floor(bins * t / len) = i, per bin i."""
    numbers = np.asarray(value, dtype=np.float64)
    inside: list[list[float]] = [[] for _ in range(bins)]
    for b, kept in enumerate(_open(mask)):
        for t, column in enumerate(kept):
            inside[bins * t // len(kept)].append(float(numbers[b, column]))
    return inside

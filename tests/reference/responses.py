"""Weights and gates of whole responses, by verdict, prompt and likelihood; `[B, T]` with `mask`.

0 on closed tokens. A response is correct if its verdict is at least 0.5, wrong if it is below, and
neither if it was not judged (nan). Means and sums along a response are over its open tokens; a
response without one takes part in no statistic of likelihoods.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .rewards import Array


def agrees_with_verdict(
    teacher_logp: npt.ArrayLike,
    student_logp: npt.ArrayLike,
    verdict: npt.ArrayLike,
    mask: npt.ArrayLike,
) -> Array:
    """1 where the log-ratios add up to at least 0 and the response is correct, or at most 0 and
    it is wrong.

    Source: arXiv:2608.27960 (RA-OPD).
    """
    of_teacher, of_student = _numbers(teacher_logp), _numbers(student_logp)
    kept, sign = _open(mask), _signs(verdict)
    by_response = []
    for b in range(len(kept)):
        total = sum(float(of_teacher[b, t] - of_student[b, t]) for t in kept[b])
        agrees = (sign[b] == 1 and total >= 0) or (sign[b] == -1 and total <= 0)
        by_response.append(float(agrees))
    return _on_open_tokens(by_response, mask)


def difficulty(
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    pass_power: float,
    fail_power: float,
) -> Array:
    """p^pass_power * (1 - p)^fail_power, p the share of the prompt's judged samples that pass.

    0^0 is 1. 0 where none was judged.

    Source: arXiv:2603.11178 (PACED).
    """
    by_response = []
    for signs in _judged_peers(verdict, group):
        if signs:
            rate = signs.count(1) / len(signs)
            by_response.append(rate**pass_power * (1 - rate) ** fail_power)
        else:
            by_response.append(0.0)
    return _on_open_tokens(by_response, mask)


def group_all_fail(verdict: npt.ArrayLike, group: npt.ArrayLike, mask: npt.ArrayLike) -> Array:
    """1 where a sample of the prompt was judged and none passed. Source: arXiv:2603.23871."""
    peers = _judged_peers(verdict, group)
    return _on_open_tokens([float(bool(signs) and 1 not in signs) for signs in peers], mask)


def group_some_pass(verdict: npt.ArrayLike, group: npt.ArrayLike, mask: npt.ArrayLike) -> Array:
    """1 where a sample of the prompt passed. Source: arXiv:2608.00782."""
    return _on_open_tokens([float(1 in signs) for signs in _judged_peers(verdict, group)], mask)


def likely_for_teacher(
    teacher_logp: npt.ArrayLike, mask: npt.ArrayLike, *, drop_share: float
) -> Array:
    """1 on responses whose mean log teacher(token) is at least the step's `drop_share` quantile.

    The quantile is on the line between its two neighbours, and -inf from there up to the next.

    Source: arXiv:2606.02684 (FiRe-OPD).
    """
    mean = _means(teacher_logp, mask)
    ordered = sorted(mean.values())
    by_response = [0.0] * len(_open(mask))
    if not ordered:
        return _on_open_tokens(by_response, mask)
    place = drop_share * (len(ordered) - 1)
    lower = math.floor(place)
    upper = min(lower + 1, len(ordered) - 1)
    bound = ordered[lower]
    if place > lower and ordered[upper] > bound > -math.inf:
        bound += (place - lower) * (ordered[upper] - bound)
    for b, number in mean.items():
        by_response[b] = float(number >= bound)
    return _on_open_tokens(by_response, mask)


def pivotal(
    teacher_logp: npt.ArrayLike,
    student_logp: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    at_least: float,
    ratio_cap: float,
    temperature: float,
    weight_cap: float,
) -> Array:
    """min(u / mean of u over the step's responses, weight_cap).

    u = exp(mean of q / temperature) over the response's tokens with q of `at_least`, 1 if none;
    q = min(log student - log teacher, ratio_cap).

    Source: arXiv:2606.23104 (ReNIO).
    """
    of_teacher, of_student = _numbers(teacher_logp), _numbers(student_logp)
    kept = _open(mask)
    u: dict[int, float] = {}
    for b in range(len(kept)):
        if kept[b]:
            q = [min(float(of_student[b, t] - of_teacher[b, t]), ratio_cap) for t in kept[b]]
            chosen = [number for number in q if number >= at_least]
            u[b] = math.exp(sum(chosen) / len(chosen) / temperature) if chosen else 1.0
    by_response = [0.0] * len(kept)
    for b in u:
        by_response[b] = min(u[b] / (sum(u.values()) / len(u)), weight_cap)
    return _on_open_tokens(by_response, mask)


def share_of_correct(
    student_logp: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    temperature: float,
) -> Array:
    """PPL^(1 / temperature) over its sum among the prompt's correct responses; 0 on others.

    PPL = exp(-mean of log student(token)).

    Source: arXiv:2604.10688 (SCOPE), section 3.
    """
    exponent = {b: -m / temperature for b, m in _means(student_logp, mask).items()}
    return _shares(exponent, verdict, group, mask, of_sign=1)


def share_of_wrong(
    teacher_logp: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    temperature: float,
) -> Array:
    """PPL^(-1 / temperature) over its sum among the prompt's wrong responses; 0 on others.

    PPL = exp(-mean of log teacher(token)).

    Source: arXiv:2604.10688 (SCOPE), section 3.
    """
    exponent = {b: m / temperature for b, m in _means(teacher_logp, mask).items()}
    return _shares(exponent, verdict, group, mask, of_sign=-1)


def sure_teacher_where_wrong(
    teacher_entropy: npt.ArrayLike,
    verdict: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    sharpness: float,
) -> Array:
    """exp(-sharpness * H(teacher)) over its mean on the step's tokens of wrong responses; else 0.

    Source: arXiv:2604.02288 (SRPO).
    """
    entropy, sign = _numbers(teacher_entropy), _signs(verdict)
    kept = _open(mask)
    places = [(b, t) for b in range(len(kept)) for t in kept[b] if sign[b] == -1]
    weight = np.zeros(entropy.shape)
    for place in places:
        weight[place] = math.exp(-sharpness * float(entropy[place]))
    mean = math.fsum(float(weight[place]) for place in places) / max(len(places), 1)
    for place in places:
        weight[place] /= mean
    return weight


# --------------------------------------------------------------------------------------------


def _numbers(numbers: npt.ArrayLike) -> Array:
    return np.asarray(numbers, dtype=np.float64)


def _open(mask: npt.ArrayLike) -> list[list[int]]:
    return [[t for t in range(len(row)) if row[t]] for row in np.asarray(mask, dtype=np.bool_)]


def _signs(verdict: npt.ArrayLike) -> list[int]:
    """1 for correct, -1 for wrong, 0 for not judged."""
    return [0 if math.isnan(v) else 1 if v >= 0.5 else -1 for v in np.asarray(verdict).tolist()]


def _judged_peers(verdict: npt.ArrayLike, group: npt.ArrayLike) -> list[list[int]]:
    """For every response the signs of its prompt's judged samples, its own among them."""
    groups, signs = np.asarray(group).tolist(), _signs(verdict)
    return [
        [sign for sign, other in zip(signs, groups, strict=True) if other == own and sign != 0]
        for own in groups
    ]


def _means(logp: npt.ArrayLike, mask: npt.ArrayLike) -> dict[int, float]:
    """The mean over the open tokens, by response; none for a response without."""
    numbers = _numbers(logp)
    return {
        b: sum(float(numbers[b, t]) for t in kept) / len(kept)
        for b, kept in enumerate(_open(mask))
        if kept
    }


def _shares(
    exponent: dict[int, float],
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    of_sign: int,
) -> Array:
    """exp(exponent) over its sum among the prompt's responses of that sign; 0 elsewhere.

    0 too where the sum is, when the tokens of each of them have no mass.
    """
    groups, sign = np.asarray(group).tolist(), _signs(verdict)
    by_response = [0.0] * len(groups)
    for b in exponent:
        peers = [c for c in exponent if groups[c] == groups[b] and sign[c] == of_sign]
        if b in peers and exponent[b] > -math.inf:
            most = max(exponent[c] for c in peers)
            parts = {c: math.exp(exponent[c] - most) for c in peers}
            by_response[b] = parts[b] / sum(parts.values())
    return _on_open_tokens(by_response, mask)


def _on_open_tokens(by_response: list[float], mask: npt.ArrayLike) -> Array:
    weight = np.zeros(np.asarray(mask).shape)
    for b, kept in enumerate(_open(mask)):
        for t in kept:
            weight[b, t] = by_response[b]
    return weight

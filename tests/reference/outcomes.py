"""How a verifier's verdict of a response meets the dense signal of its tokens, `[B, T]`.

`reward` is what joins before credit and `credited` what joins after. A response that was not
judged (nan) has z = 0 and a group advantage of 0. The result is 0 on closed tokens.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .rewards import Array, group_advantage, verdict_reward


def terminal_verdict(
    reward: npt.ArrayLike, verdict: npt.ArrayLike, mask: npt.ArrayLike, *, scale: float
) -> Array:
    """reward + scale * verdict at the last open token."""
    return _open_only(np.asarray(reward) + scale * verdict_reward(verdict, mask), mask)


def add_group_advantage(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    scale: float,
    degrees_of_freedom_lost: int = 0,
) -> Array:
    """credited + scale * group advantage. Source: arXiv:2601.02780 (MiMo)."""
    of_group = group_advantage(
        verdict, group, mask, degrees_of_freedom_lost=degrees_of_freedom_lost
    )
    return _open_only(np.asarray(credited) + scale * of_group, mask)


def mix_group_advantage(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    share: float,
    degrees_of_freedom_lost: int = 0,
) -> Array:
    """(1 - share) * credited + share * group advantage. Source: arXiv:2609.16937."""
    of_group = group_advantage(
        verdict, group, mask, degrees_of_freedom_lost=degrees_of_freedom_lost
    )
    return _open_only((1 - share) * np.asarray(credited) + share * of_group, mask)


def agree_in_sign(credited: npt.ArrayLike, verdict: npt.ArrayLike, mask: npt.ArrayLike) -> Array:
    """z * max(z * a, 0), z = 1 for a verdict of at least 0.5, -1 below, 0 where unjudged.

    Source: arXiv:2608.24696 (OPDVR).
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    advantage = np.zeros(dense.shape)
    for b, t in np.ndindex(dense.shape):
        if looked_at[b, t]:
            z = _sign_of(float(np.asarray(verdict)[b]))
            advantage[b, t] = z * max(z * float(dense[b, t]), 0.0)
    return advantage


def sigmoid_gate(
    credited: npt.ArrayLike, verdict: npt.ArrayLike, mask: npt.ArrayLike, *, sharpness: float
) -> Array:
    """Z * sigmoid(sharpness * z * a / median |a|) * a, 0 where unjudged.

    The median is over the step's open tokens, halfway between the middle two of an even number.
    Z makes the sum of |A| over the step's open tokens that of |a|.

    Source: arXiv:2609.35517 (R2-OPD).
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    size = sorted(abs(float(dense[i])) for i in np.ndindex(dense.shape) if looked_at[i])
    gated = np.zeros(dense.shape)
    if not size:
        return gated
    median = (size[(len(size) - 1) // 2] + size[len(size) // 2]) / 2
    for b, t in np.ndindex(dense.shape):
        z = _sign_of(float(np.asarray(verdict)[b]))
        if looked_at[b, t] and z != 0 and dense[b, t] != 0:
            signed = z * float(dense[b, t])
            steepness = sharpness * signed / median if median > 0 else math.copysign(800, signed)
            gated[b, t] = _sigmoid(steepness) * dense[b, t]
    left = float(np.abs(gated).sum())
    return gated * (sum(size) / left) if left > 0 else gated


def magnitude_only(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    low: float,
    high: float,
    strength: float = 1.0,
    degrees_of_freedom_lost: int = 0,
) -> Array:
    """A * (1 - c + c * clip(exp(sign(A) * a), 1 - low, 1 + high)), A the group advantage.

    The verdict decides the sign, the teacher only the size, and c = strength how much of it.

    Source: arXiv:2604.03128 (RLSD).
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    of_group = group_advantage(
        verdict, group, mask, degrees_of_freedom_lost=degrees_of_freedom_lost
    )
    advantage = np.zeros(dense.shape)
    for b, t in np.ndindex(dense.shape):
        if looked_at[b, t] and of_group[b, t] != 0:
            toward = math.copysign(1.0, of_group[b, t])
            factor = min(max(math.exp(toward * float(dense[b, t])), 1 - low), 1 + high)
            advantage[b, t] = of_group[b, t] * (1 - strength + strength * factor)
    return advantage


def reversed_magnitude(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    width: float,
    strength: float = 1.0,
    degrees_of_freedom_lost: int = 0,
) -> Array:
    """Of correct responses A * (1 - c + c * clip(exp(-sign(A) * a), 1 - width, 1 + width)).

    A, the group advantage, of the others. c = strength.

    Source: arXiv:2605.10781 (RLRT).
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    of_group = group_advantage(
        verdict, group, mask, degrees_of_freedom_lost=degrees_of_freedom_lost
    )
    advantage = np.zeros(dense.shape)
    for b, t in np.ndindex(dense.shape):
        if not looked_at[b, t] or of_group[b, t] == 0:
            continue
        advantage[b, t] = of_group[b, t]
        if _sign_of(float(np.asarray(verdict)[b])) == 1:
            away = -math.copysign(1.0, of_group[b, t])
            factor = min(max(math.exp(away * float(dense[b, t])), 1 - width), 1 + width)
            advantage[b, t] *= 1 - strength + strength * factor
    return advantage


def relative_magnitude(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    cap: float,
    degrees_of_freedom_lost: int = 0,
) -> Array:
    """A * w where the group advantage A is above 0, A elsewhere.

    w is clip(exp(a), 1 / cap, cap) over its geometric mean in the response.

    Source: arXiv:2607.17247 (Distilled RL).
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    advantage = group_advantage(
        verdict, group, mask, degrees_of_freedom_lost=degrees_of_freedom_lost
    )
    for b, kept in enumerate(_open_tokens(looked_at)):
        ratios = {t: min(max(math.exp(float(dense[b, t])), 1 / cap), cap) for t in kept}
        for t in kept:
            if advantage[b, t] > 0:
                product = math.prod(ratio ** (1 / len(kept)) for ratio in ratios.values())
                advantage[b, t] *= ratios[t] / product
    return advantage


def bounded_shift(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    temperature: float,
    scale: float,
    at_least: float,
    degrees_of_freedom_lost: int = 0,
) -> Array:
    """The group advantage plus d, held on its own side of 0; 0 where it is 0.

    d = scale * tanh(a / temperature), and 0 if that is no larger than `at_least`.

    Source: arXiv:2606.11709 (RLCSD).
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    advantage = group_advantage(
        verdict, group, mask, degrees_of_freedom_lost=degrees_of_freedom_lost
    )
    for b, t in np.ndindex(dense.shape):
        if not looked_at[b, t]:
            continue
        shift = scale * math.tanh(float(dense[b, t]) / temperature)
        if abs(shift) <= at_least:
            shift = 0.0
        if advantage[b, t] > 0:
            advantage[b, t] = max(advantage[b, t] + shift, 0.0)
        elif advantage[b, t] < 0:
            advantage[b, t] = min(advantage[b, t] + shift, 0.0)
    return advantage


def deliberation_bonus(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    scale: float,
    degrees_of_freedom_lost: int = 0,
) -> Array:
    """The group advantage - scale * (log(1 + exp(a)) - log 2) / 2.

    Source: arXiv:2605.11609 (AntiSD).
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    advantage = group_advantage(
        verdict, group, mask, degrees_of_freedom_lost=degrees_of_freedom_lost
    )
    for b, t in np.ndindex(dense.shape):
        if looked_at[b, t]:
            a = float(dense[b, t])
            softplus = max(a, 0.0) + math.log1p(math.exp(-abs(a)))
            advantage[b, t] -= scale * (softplus - math.log(2)) / 2
    return advantage


def add_verdict_sign(
    credited: npt.ArrayLike, verdict: npt.ArrayLike, mask: npt.ArrayLike, *, scale: float
) -> Array:
    """credited + scale * z. Source: arXiv:2609.16937, Eq. 8."""
    dense = np.asarray(credited, np.float64)
    signs = np.array([[_sign_of(float(score))] for score in np.asarray(verdict)])
    return _open_only(dense + scale * signs, mask)


def agreement_scale(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    agreeing: float,
    other: float,
) -> Array:
    """agreeing * a where z * a > 0, other * a elsewhere. Source: arXiv:2606.09304 (SG-OPD)."""
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    advantage = np.zeros(dense.shape)
    for b, t in np.ndindex(dense.shape):
        if looked_at[b, t]:
            agrees = _sign_of(float(np.asarray(verdict)[b])) * dense[b, t] > 0
            advantage[b, t] = (agreeing if agrees else other) * dense[b, t]
    return advantage


def agreement_gate(
    credited: npt.ArrayLike, verdict: npt.ArrayLike, mask: npt.ArrayLike, *, sharpness: float
) -> Array:
    """Z * sigmoid(sharpness * z * a / median |a|) * a, by response; a itself where unjudged.

    The median is over the response's open tokens, halfway between the middle two of an even
    number; where it is 0 the gate is 1 for z * a > 0 and 0 for z * a < 0. Z makes the sum of |A|
    over the response that of |a|.

    Source: arXiv:2609.35517 (R2-OPD), Eqs. 7 and 13-16.
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    advantage = np.zeros(dense.shape)
    for b, kept in enumerate(_open_tokens(looked_at)):
        z = _sign_of(float(np.asarray(verdict)[b]))
        sizes = sorted(abs(float(dense[b, t])) for t in kept)
        if not kept or sizes[-1] == 0:
            continue
        median = (sizes[(len(sizes) - 1) // 2] + sizes[len(sizes) // 2]) / 2
        for t in kept:
            a = float(dense[b, t])
            if z == 0:
                advantage[b, t] = a
            elif median > 0:
                advantage[b, t] = _sigmoid(sharpness * z * a / median) * a
            elif z * a > 0:
                advantage[b, t] = a
        left = float(np.abs(advantage[b]).sum())
        if left > 0:
            advantage[b] *= sum(sizes) / left
    return advantage


def add_verdict_residual(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    scale: float,
    limit: float,
) -> Array:
    """clip(a + scale * (1 + tanh(u / 2)) * rho, -limit, limit).

    rho is what the verdict is above the teacher's mean a of the response, each in standard
    deviations of the population of the prompt's judged responses (of the teacher's: those with an
    open token), and 0 unless both differ among them. u is a in standard deviations from its mean
    in the response, 0 where they are all equal. Nothing is added to a response that was not judged.

    Source: arXiv:2608.19181 (GC-OPD).
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    score = [float(number) for number in np.asarray(verdict)]
    groups = [int(number) for number in np.asarray(group)]
    kept = _open_tokens(looked_at)
    counted = [b for b in range(len(kept)) if kept[b] and not math.isnan(score[b])]
    mean = {b: _mean([float(dense[b, t]) for t in kept[b]]) for b in counted}
    advantage = np.zeros(dense.shape)
    for b, t in np.ndindex(dense.shape):
        if not looked_at[b, t]:
            continue
        advantage[b, t] = dense[b, t]
        if b in counted:
            peers = [other for other in counted if groups[other] == groups[b]]
            judged = [
                other
                for other in range(len(kept))
                if groups[other] == groups[b] and not math.isnan(score[other])
            ]
            of_verdict = _in_deviations(score[b], [score[other] for other in judged])
            of_teacher = _in_deviations(mean[b], [mean[other] for other in peers])
            u = _in_deviations(float(dense[b, t]), [float(dense[b, k]) for k in kept[b]])
            if of_verdict is not None and of_teacher is not None:
                gate = 1 + math.tanh((u or 0.0) / 2)
                advantage[b, t] += scale * gate * (of_verdict - of_teacher)
        advantage[b, t] = min(max(advantage[b, t], -limit), limit)
    return advantage


def margin_shift(
    credited: npt.ArrayLike,
    verdict: npt.ArrayLike,
    group: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    margin: float,
    correct_share: float,
) -> Array:
    """a + c * gap on correct responses, a - (1 - c) * gap on wrong ones, c = correct_share.

    gap = max(0, margin - (mean of correct - mean of wrong)), over the prompt's responses with an
    open token, of their mean a; 0 at a prompt without both kinds.

    Source: arXiv:2605.03677 (Uni-OPD).
    """
    dense, looked_at = np.asarray(credited, np.float64), np.asarray(mask, np.bool_)
    sign = [_sign_of(float(number)) for number in np.asarray(verdict)]
    groups = [int(number) for number in np.asarray(group)]
    kept = _open_tokens(looked_at)
    advantage = _open_only(dense, mask)
    for b in range(len(kept)):
        means: dict[float, list[float]] = {1.0: [], -1.0: [], 0.0: []}
        for other in range(len(kept)):
            if groups[other] == groups[b] and kept[other]:
                means[sign[other]].append(_mean([float(dense[other, t]) for t in kept[other]]))
        if means[1.0] and means[-1.0]:
            gap = max(0.0, margin - (_mean(means[1.0]) - _mean(means[-1.0])))
            by = {1.0: correct_share * gap, -1.0: -(1 - correct_share) * gap, 0.0: 0.0}[sign[b]]
            for t in kept[b]:
                advantage[b, t] += by
    return advantage


# --------------------------------------------------------------------------------------------


def _open_tokens(looked_at: npt.NDArray[np.bool_]) -> list[list[int]]:
    return [[t for t in range(len(row)) if row[t]] for row in looked_at]


def _mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _in_deviations(number: float, population: list[float]) -> float | None:
    """(number - mean) / standard deviation of the population; None where all are equal."""
    if all(other == population[0] for other in population):
        return None
    mean = _mean(population)
    return (number - mean) / math.sqrt(_mean([(other - mean) ** 2 for other in population]))


def _sign_of(verdict: float) -> float:
    if math.isnan(verdict):
        return 0.0
    return 1.0 if verdict >= 0.5 else -1.0


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def _open_only(numbers: Array, mask: npt.ArrayLike) -> Array:
    looked_at = np.asarray(mask, dtype=np.bool_)
    kept = np.zeros(looked_at.shape)
    for index in np.ndindex(looked_at.shape):
        if looked_at[index]:
            kept[index] = numbers[index]
    return kept

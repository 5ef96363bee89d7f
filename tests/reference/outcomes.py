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
    degrees_of_freedom_lost: int = 0,
) -> Array:
    """A * clip(exp(sign(A) * a), 1 - low, 1 + high), A the group advantage.

    The verdict decides the sign, the teacher only the size.

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
            factor = math.exp(toward * float(dense[b, t]))
            advantage[b, t] = of_group[b, t] * min(max(factor, 1 - low), 1 + high)
    return advantage


# --------------------------------------------------------------------------------------------


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

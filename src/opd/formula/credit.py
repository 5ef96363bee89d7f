"""Temporal credit: which rewards multiply the score of a token, and what is subtracted.

A function that takes `mask` walks along a response and is coupled; positions where the mask is
False take no time, they are deleted before discounting. Discounting multiplies and changes what
is optimised; a baseline subtracts and does not.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["discounted", "expected_reward", "immediate", "return_to_go"]

MEANINGS = ("task", "teacher_reliability", "variance_heuristic")


def immediate(reward: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The token's own reward, and no other.

        A_t = r_t

    With the log ratio as reward on the student's own samples it is unbiased for the local reverse
    KL: per-token divergences with the distribution of prefixes held fixed. Biased for the
    sequence's reverse KL, by the future rewards it leaves out.

    Source: Eq. 16 and 17 of arXiv:2606.22793.
    """
    return reward


def return_to_go(reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The sum of this and all later rewards of the response.

        A_t = sum_{k >= t} r_k

    With the log ratio as reward on the student's own samples it is unbiased for the reverse KL of
    the whole sequence. Every expected reward is negative, so stopping early pays.

    Source: Eq. 15 of arXiv:2606.22793.
    """
    return _returns(reward, mask, gamma=1.0)


def discounted(
    reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float, meaning: str
) -> Float[Tensor, "B T"]:
    """The discounted sum of this and all later rewards of the response.

        A_t = sum_{k >= t} gamma^(k - t) r_k

    gamma = 0 is `immediate`, gamma = 1 is `return_to_go`. In between it is unbiased for neither
    reverse KL: the objective is the discounted one, which is why the discount must say what it
    means.

    Args:
        reward: zero or anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.
        gamma: discount per token, in [0, 1].
        meaning: `task`, `teacher_reliability` or `variance_heuristic`; only the first two name
            an objective.

    Source: Eq. 18 and 19, and section 4.5, of arXiv:2606.22793.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    if meaning not in MEANINGS:
        raise ValueError(
            f"a discount must say what it means: one of {', '.join(MEANINGS)}, got {meaning!r}"
        )
    return _returns(reward, mask, gamma=gamma)


def expected_reward(reverse_kl: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The state's expected log-ratio reward, minus the reverse KL: a per-state baseline.

        b_t = E_student[r_t | prefix] = -KL(student || teacher)(prefix)

    Depends on the prefix alone, so subtracting it leaves every expectation unchanged. It is the
    exact value of the state only where credit is immediate. Detached.

    Source: vOPD, arXiv:2605.07865.
    """
    return -reverse_kl.detach()


def _returns(
    reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float
) -> Float[Tensor, "B T"]:
    # Close the gaps: response tokens to the left, in order, zeros after them.
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    compact = torch.where(mask, reward, 0.0).gather(1, order)
    returns = _discounted_scan(compact, gamma)
    spread = torch.zeros_like(returns).scatter(1, order, returns)
    return torch.where(mask, spread, 0.0)


def _discounted_scan(values: Float[Tensor, "B T"], gamma: float) -> Float[Tensor, "B T"]:
    """`out_t = values_t + gamma * out_{t+1}`, by doubling: about log2(T) passes."""
    length = values.shape[1]
    out, reach, factor = values, 1, gamma
    while reach < length and factor != 0.0:
        shifted = torch.nn.functional.pad(out[:, reach:], (0, reach))
        out = torch.add(out, shifted, alpha=factor)
        reach, factor = 2 * reach, factor * factor
    return out

"""Outcome coupling: what the verdict on a response does to the rewards of its tokens, detached.

A function that takes `reward` joins before credit, one that takes `credited` joins after it. All
read whole responses, and some the whole optimizer step, so they are coupled. The result is 0
where the mask is False, and does not depend on what stands there. A response without verdict
(NaN) gets no outcome: sums add nothing to it, gates close on it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.fields import counted
from opd.formula.reward import group_advantage, verdict_reward
from opd.types import PASS_MARK

__all__ = [
    "add_group_advantage",
    "agree_in_sign",
    "magnitude_only",
    "mix_group_advantage",
    "sigmoid_gate",
    "terminal_verdict",
]


def terminal_verdict(
    reward: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    scale: float,
) -> Float[Tensor, "B T"]:
    """The reward plus the verdict on the last open token. Joins before credit.

        r'_t = r_t + scale * verdict if t is the last open token, else r_t

    With the log ratio and `return_to_go` it is unbiased for the gradient of
    scale * E[verdict] - KL(student || teacher) of the whole sequence: the teacher becomes the
    prior of a regularised verdict. With `immediate` credit only the last token sees it.

    Args:
        reward: zero or anything where the mask is False.
        verdict: in [0, 1]; NaN adds nothing.
        mask: False on tool results and padding.
        scale: nats that a verdict of 1 is worth.

    Source: MiMo-V2-Flash, arXiv:2601.02780, which adds an outcome to the log ratio; as a terminal
    reward Eq. 15 of arXiv:2606.22793.
    """
    return _open(reward, mask) + scale * verdict_reward(verdict, mask)


def add_group_advantage(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    scale: float,
) -> Float[Tensor, "B T"]:
    """The credited reward plus the group-normalised verdict. Joins after credit.

        A = a + scale * A_group,  A_group = (verdict - mean_group) / std_group

    The sum of the two gradients: stationary where they cancel, not at the teacher. A group of
    one, or of equal verdicts, adds nothing, and neither does a NaN verdict.

    Args:
        credited: zero or anything where the mask is False.
        verdict: in [0, 1]; NaN where the response was not judged.
        group: index of the prompt; samples of one prompt share it.
        mask: False on tool results and padding.
        scale: what one standard deviation of the group is worth, in the unit of `credited`.

    Source: MiMo-V2-Flash, arXiv:2601.02780; KDRL, arXiv:2506.02208.
    """
    return _open(credited, mask) + scale * group_advantage(verdict, group, mask)


def mix_group_advantage(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    share: float,
) -> Float[Tensor, "B T"]:
    """A convex mixture of credited reward and group-normalised verdict. Joins after credit.

        A = (1 - share) * a + share * A_group,  A_group = (verdict - mean_group) / std_group

    Where A_group is 0 (a group of one or of equal verdicts, a NaN verdict) the teacher's part
    keeps its weight 1 - share. Stationary where the two cancel.

    Args:
        credited: zero or anything where the mask is False.
        verdict: in [0, 1]; NaN where the response was not judged.
        group: index of the prompt; samples of one prompt share it.
        mask: False on tool results and padding.
        share: of the verdict, in [0, 1].

    Source: reward-compatible temporal credit, arXiv:2609.16937.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(
            f"share must lie in [0, 1], got {share}; add_group_advantage takes any scale"
        )
    return (1 - share) * _open(credited, mask) + share * group_advantage(verdict, group, mask)


def _closed(
    credited: Float[Tensor, "B T"], verdict: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Bool[Tensor, "B T"]:
    held = _open(credited, mask)
    return (held != 0) & ~(_outcome_sign(verdict) * held > 0)


@counted(_closed)
def agree_in_sign(
    credited: Float[Tensor, "B T"], verdict: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The credited reward where it points the way of the verdict, else 0. Joins after credit.

        A = z * max(z * a, 0),  z = 1 for a verdict >= 1/2, -1 below, 0 for none

    A correct response is only reinforced, a wrong one only suppressed. Biased for every
    divergence: of correct responses only the positive half of the log ratio is left, so
    teacher = student is stationary but not the only such point. The share of tokens set to 0 is
    logged. The limit of `sigmoid_gate` without its mass preservation.

    Args:
        credited: zero or anything where the mask is False.
        verdict: in [0, 1]; NaN closes the response.
        mask: False on tool results and padding.

    Source: OPDVR, arXiv:2608.24696.
    """
    held = _open(credited, mask)
    return torch.where(_outcome_sign(verdict) * held > 0, held, 0.0)


def sigmoid_gate(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    sharpness: float,
) -> Float[Tensor, "B T"]:
    """The credited reward, weighted towards the verdict at equal total size. Joins after credit.

        g = sigmoid(b * z * a / median|a|),  z = 1 for a verdict >= 1/2, -1 below
        A = Z * g * a,  Z = sum|a| / sum(g * |a|)

    Sums and median run over the open tokens of the whole optimizer step, zeros included; of an
    even number the median is the mean of the middle two. The sum of |A| is that of |a|: the gate
    moves the update between tokens and does not shrink it. Where the verdict is NaN the gate is 0
    and its response's size goes to the others; where every gate is 0, so is the result. Where the
    median is 0 the gate takes its limit: 1 where a agrees with the verdict, 0 where it does not.
    Vanilla distillation as b -> 0, `agree_in_sign` up to Z as b grows. At b = 0.001, as published,
    ordinary tokens change by about 0.1 %. Biased for every divergence.

    Args:
        credited: zero or anything where the mask is False.
        verdict: in [0, 1]; NaN where the response was not judged.
        mask: False on tool results and padding.
        sharpness: b, > 0; the gate's exponent at a token of median size.

    Source: R2-OPD, arXiv:2609.35517.
    """
    if not sharpness > 0.0:
        raise ValueError(
            f"sharpness must be positive, got {sharpness}; its limit at 0 is to leave the gate out"
        )
    held = _open(credited, mask)
    size = held.abs()
    agreement = _outcome_sign(verdict) * held
    median = _median(size, mask)
    # a / median at median = 0 is the limit wanted, except for 0 / 0.
    relative = torch.where(agreement == 0, 0.0, agreement / median)
    gate = torch.where(verdict.isnan()[:, None], 0.0, torch.sigmoid(sharpness * relative))
    left = (gate * size).sum()
    return torch.where(left > 0, gate * held / left * size.sum(), 0.0)


def _magnitude_outside(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    low: float,
    high: float,
) -> Bool[Tensor, "B T"]:
    factor = _magnitude(credited, group_advantage(verdict, group, mask))
    return (factor < 1 - low) | (factor > 1 + high)


@counted(_magnitude_outside)
def magnitude_only(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "B T"]:
    """The group-normalised verdict, sized by the teacher. Joins after credit.

        A = A_group * clip(exp(sign(A_group) * a), 1 - low, 1 + high)

    The verifier decides the sign, the teacher only how much each token gets: a token that the
    teacher prefers gets more of a reward and less of a blame. 0 where A_group is 0 (a group of
    one or of equal verdicts, a NaN verdict), so the teacher alone teaches nothing, and where
    teacher = student it is `group_advantage`. Unbiased for no divergence. The share of clipped
    tokens is logged.

    Args:
        credited: a, the log ratio in nats; zero or anything where the mask is False.
        verdict: in [0, 1]; NaN where the response was not judged.
        group: index of the prompt; samples of one prompt share it.
        mask: False on tool results and padding.
        low: how far the factor may fall below 1, in [0, 1].
        high: how far it may rise above 1, >= 0.

    Source: RLSD, arXiv:2604.03128.
    """
    if not 0.0 <= low <= 1.0 or high < 0.0:
        raise ValueError(f"clip range needs 0 <= low <= 1 and high >= 0, got {low} and {high}")
    outcome = group_advantage(verdict, group, mask)
    return outcome * _magnitude(credited, outcome).clamp(1 - low, 1 + high)


# --------------------------------------------------------------------------------------------
# Parts


def _open(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return torch.where(mask, values.detach(), 0.0)


def _outcome_sign(verdict: Float[Tensor, " B"]) -> Float[Tensor, "B 1"]:
    sign = torch.where(verdict.detach() >= PASS_MARK, 1.0, -1.0).to(verdict.dtype)
    return torch.where(verdict.isnan(), 0.0, sign)[:, None]


def _magnitude(
    credited: Float[Tensor, "B T"], outcome: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """exp(sign(outcome) * credited), 1 where there is no outcome."""
    return torch.where(outcome == 0, 0.0, outcome.sign() * credited.detach()).exp()


def _median(size: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Median over the open positions; of an even number, the mean of the middle two."""
    among = torch.where(mask, size, torch.nan)
    # Of an even number nanmedian returns the lower, so the same of the negatives is the upper.
    return (among.nanmedian() - (-among).nanmedian()) / 2

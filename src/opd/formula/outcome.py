"""Outcome coupling: what the verdict on a response does to the rewards of its tokens, detached.

A function that takes `reward` joins before credit, one that takes `credited` joins after it. All
read whole responses, and some the whole optimizer step, so they are coupled. The result is 0
where the mask is False, and does not depend on what stands there. A response without verdict
(NaN) gets no outcome: sums add nothing to it, gates close on it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.fields import counted
from opd.formula.reward import group_advantage, verdict_reward
from opd.types import PASS_MARK

__all__ = [
    "add_group_advantage",
    "add_verdict_residual",
    "add_verdict_sign",
    "agree_in_sign",
    "agreement_gate",
    "agreement_scale",
    "bounded_shift",
    "deliberation_bonus",
    "magnitude_only",
    "margin_shift",
    "mix_group_advantage",
    "relative_magnitude",
    "reversed_magnitude",
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
    strength: float = 1.0,
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
    strength: float = 1.0,
) -> Float[Tensor, "B T"]:
    """The group-normalised verdict, sized by the teacher. Joins after credit.

        A = A_group * (1 - c + c * clip(exp(sign(A_group) * a), 1 - low, 1 + high)),  c = strength

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
        strength: c, in [0, 1]: how much of the size is the teacher's.

    Source: RLSD, arXiv:2604.03128, whose code lowers the strength from 0.5 to 0 over 50 steps.
    """
    _check_width(low, high)
    _check_strength(strength)
    outcome = group_advantage(verdict, group, mask)
    factor = _magnitude(credited, outcome).clamp(1 - low, 1 + high)
    return outcome * (1 - strength + strength * factor)


def _reversed_outside(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    width: float,
    strength: float = 1.0,
) -> Bool[Tensor, "B T"]:
    factor = _magnitude(-credited, group_advantage(verdict, group, mask))
    correct = (verdict >= PASS_MARK)[:, None]
    return correct & ((factor < 1 - width) | (factor > 1 + width))


@counted(_reversed_outside)
def reversed_magnitude(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    width: float,
    strength: float = 1.0,
) -> Float[Tensor, "B T"]:
    """The group-normalised verdict, larger where the teacher is not. Joins after credit.

        A = A_group * (1 - c + c * clip(exp(-sign(A_group) * a), 1 - e, 1 + e))  where correct
        A = A_group  elsewhere;  c = strength, e = width

    The opposite of `magnitude_only`: what the student found for itself and the verifier accepts is
    reinforced most. 0 where A_group is 0. Where teacher = student it is `group_advantage`. Unbiased
    for no divergence. The share of clipped tokens is logged.

    Args:
        credited: a, the log ratio in nats; zero or anything where the mask is False.
        verdict: in [0, 1]; NaN where the response was not judged.
        group: index of the prompt; samples of one prompt share it.
        mask: False on tool results and padding.
        width: e, in [0, 1].
        strength: c, in [0, 1].

    Source: RLRT, arXiv:2605.10781, with e from 0.2 (thinking models) to 1 (base models).
    """
    if not 0.0 <= width <= 1.0:
        raise ValueError(f"width must lie in [0, 1], got {width}")
    _check_strength(strength)
    outcome = group_advantage(verdict, group, mask)
    factor = _magnitude(-credited, outcome).clamp(1 - width, 1 + width)
    correct = (verdict >= PASS_MARK)[:, None]
    return torch.where(correct, outcome * (1 - strength + strength * factor), outcome)


def _ratio_outside(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    cap: float,
) -> Bool[Tensor, "B T"]:
    return mask & (credited.abs() > math.log(cap))


@counted(_ratio_outside)
def relative_magnitude(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    cap: float,
) -> Float[Tensor, "B T"]:
    """The group-normalised verdict, a reward shared out by the teacher. Joins after credit.

        w = clip(exp(a), 1 / cap, cap), divided by its geometric mean over the response
        A = A_group * w where A_group > 0,  A_group elsewhere

    Which of a good response's tokens earned it is for the teacher to say; blame is shared evenly.
    Where teacher = student it is `group_advantage`. Unbiased for no divergence. The share of
    clipped tokens is logged.

    Args:
        credited: a, the log ratio in nats; zero or anything where the mask is False.
        verdict: in [0, 1]; NaN where the response was not judged.
        group: index of the prompt; samples of one prompt share it.
        mask: False on tool results and padding.
        cap: largest ratio that counts, > 1.

    Source: Distilled RL, arXiv:2607.17247, from its code, with 3.
    """
    if not cap > 1.0:
        raise ValueError(f"cap must be above 1, got {cap}; at 1 the teacher has no say")
    outcome = group_advantage(verdict, group, mask)
    held = _open(credited, mask).clamp(-math.log(cap), math.log(cap))
    middle = held.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(outcome > 0, outcome * (held - middle).exp(), outcome)


def bounded_shift(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    temperature: float,
    scale: float,
    at_least: float,
) -> Float[Tensor, "B T"]:
    """The group-normalised verdict, shifted within its own sign. Joins after credit.

        d = scale * tanh(a / temperature), 0 where |d| <= at_least
        A = max(A_group + d, 0) where A_group > 0,  min(A_group + d, 0) where A_group < 0,  else 0

    Where a = 0 everywhere it is `group_advantage`. Unbiased for no divergence.

    Args:
        credited: a, in nats, such as the log ratio of two hints; anything where the mask is False.
        verdict: in [0, 1]; NaN where the response was not judged.
        group: index of the prompt; samples of one prompt share it.
        mask: False on tool results and padding.
        temperature: nats at which the score saturates, > 0.
        scale: the largest shift, in standard deviations of the group, > 0.
        at_least: the smallest shift that counts, in [0, scale).

    Source: RLCSD, arXiv:2606.11709, from its code, with 0.02, 0.5 and 0.02.
    """
    if not (temperature > 0.0 and scale > 0.0 and 0.0 <= at_least < scale):
        raise ValueError(
            "bounded_shift needs temperature > 0, scale > 0 and 0 <= at_least < scale, got "
            f"{temperature}, {scale} and {at_least}"
        )
    outcome = group_advantage(verdict, group, mask)
    shift = scale * torch.tanh(_open(credited, mask) / temperature)
    moved = outcome + torch.where(shift.abs() > at_least, shift, 0.0)
    kept = torch.where(outcome > 0, moved.clamp(min=0.0), moved.clamp(max=0.0))
    return torch.where(outcome == 0, 0.0, kept)


def deliberation_bonus(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    scale: float,
) -> Float[Tensor, "B T"]:
    """The group-normalised verdict, less what the teacher prefers. Joins after credit.

        A = A_group - scale * (softplus(a) - log 2) / 2

    The second part is the exact policy gradient of ascending the Jensen-Shannon divergence to the
    teacher: tokens that a self with the solution before it would skip are kept alive. What it adds
    is at most scale * log(2) / 2; what it takes grows with a. 0 where A_group is and teacher =
    student.

    Args:
        credited: a, the log ratio in nats; zero or anything where the mask is False.
        verdict: in [0, 1]; NaN where the response was not judged.
        group: index of the prompt; samples of one prompt share it.
        mask: False on tool results and padding.
        scale: >= 0; 0 is `group_advantage`.

    Source: AntiSD, arXiv:2605.11609, with 0.5 while the teacher's entropy has not fallen.
    """
    if not scale >= 0.0:
        raise ValueError(f"scale must be >= 0, got {scale}; the sign is part of the method")
    surplus = torch.nn.functional.softplus(credited.detach()) - math.log(2.0)
    return group_advantage(verdict, group, mask) - _open(scale * surplus / 2, mask)


def add_verdict_sign(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    scale: float,
) -> Float[Tensor, "B T"]:
    """The credited reward plus or minus the verdict. Joins after credit.

        A = a + scale * z,  z = 1 for a verdict >= 1/2, -1 below, 0 for none

    Args:
        credited: a; zero or anything where the mask is False.
        verdict: in [0, 1]; NaN adds nothing.
        mask: False on tool results and padding.
        scale: what a verdict is worth, in the unit of `credited`.

    Source: Eq. 8 of arXiv:2609.16937.
    """
    return torch.where(mask, _open(credited, mask) + scale * _outcome_sign(verdict), 0.0)


def agreement_scale(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    agreeing: float,
    other: float,
) -> Float[Tensor, "B T"]:
    """The credited reward, amplified where it points the way of the verdict. Joins after credit.

        A = agreeing * a where z * a > 0, other * a elsewhere
        z = 1 for a verdict >= 1/2, -1 below, 0 for none

    `agree_in_sign` is agreeing = 1 and other = 0. Biased for every divergence unless the two are
    equal; teacher = student is stationary.

    Args:
        credited: a; zero or anything where the mask is False.
        verdict: in [0, 1]; NaN agrees with nothing.
        mask: False on tool results and padding.
        agreeing, other: factors >= 0.

    Source: SG-OPD, arXiv:2606.09304; the form is inferred.
    """
    if not (agreeing >= 0.0 and other >= 0.0):
        raise ValueError(f"factors must be >= 0, got {agreeing} and {other}")
    held = _open(credited, mask)
    agrees = _outcome_sign(verdict) * held > 0
    return torch.where(agrees, agreeing * held, other * held)


def agreement_gate(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    sharpness: float,
) -> Float[Tensor, "B T"]:
    """`sigmoid_gate` response by response. Joins after credit.

        g = sigmoid(b * z * a / median|a|),  A = Z * g * a,  Z = sum|a| / sum(g * |a|)
        z = 1 for a verdict >= 1/2, -1 below, 0 for none

    Sums and median run over the response's open tokens. A response without verdict keeps its
    rewards. Where the median is 0 the gate takes its limit. Vanilla distillation as b -> 0;
    `agree_in_sign` up to Z as b grows. Biased for every divergence.

    Args:
        credited: zero or anything where the mask is False.
        verdict: in [0, 1]; NaN where the response was not judged.
        mask: False on tool results and padding.
        sharpness: b, > 0; the gate's exponent at a token of median size.

    Source: R2-OPD, Eqs. 7 and 13-16 of arXiv:2609.35517, with 0.001.
    """
    if not sharpness > 0.0:
        raise ValueError(
            f"sharpness must be positive, got {sharpness}; its limit at 0 is to leave the gate out"
        )
    held = _open(credited, mask)
    size = held.abs()
    agreement = _outcome_sign(verdict) * held
    among = torch.where(mask, size, torch.nan)
    upper = -(-among).nanmedian(1, keepdim=True).values
    median = (among.nanmedian(1, keepdim=True).values + upper) / 2
    relative = torch.where(agreement == 0, 0.0, agreement / median)
    gate = torch.sigmoid(sharpness * relative)
    left = (gate * size).sum(1, keepdim=True)
    return torch.where(left > 0, gate * held / left * size.sum(1, keepdim=True), 0.0)


def add_verdict_residual(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    scale: float,
    limit: float,
) -> Float[Tensor, "B T"]:
    """The credited reward plus what only the verifier knows. Joins after credit.

        T = mean of a over the response;  zs of verdict and T within the prompt's responses
        rho = z(verdict) - z(T), 0 unless both differ among them
        u = (a - T) / std of a in the response
        A = clip(a + scale * (1 + tanh(u / 2)) * rho, -limit, limit)

    Standard deviations are those of the population. Where the teacher ranks the responses as the
    verifier does, nothing is added. The residual goes to the tokens that the teacher prefers. u is
    0 where all of the response's a are equal.

    Args:
        credited: a, in nats; zero or anything where the mask is False.
        verdict: in [0, 1]; a response that was not judged gets nothing.
        group: index of the prompt; samples of one prompt share it.
        mask: False on tool results and padding; a response without open tokens has a verdict, but
            no T.
        scale: what a standard deviation is worth, in nats.
        limit: largest |A|, > 0.

    Source: GC-OPD, arXiv:2608.19181, from its code, with 0.1 and 10.
    """
    if not limit > 0.0:
        raise ValueError(f"limit must be positive, got {limit}")
    held, counts = _open(credited, mask), mask.sum(1)
    score = held.sum(1) / counts.clamp(min=1)
    judged = ~verdict.isnan()
    same = group[:, None] == group
    of_verdict, ranked = _population_z(torch.where(judged, verdict.detach(), 0.0), same & judged)
    of_teacher, told_apart = _population_z(score, same & judged & (counts > 0))
    known = ranked & told_apart & judged
    residual = torch.where(known, of_verdict - of_teacher, 0.0)[:, None]
    deviation = torch.where(mask, held - score[:, None], 0.0)
    spread = (deviation.square().sum(1) / counts.clamp(min=1)).sqrt()[:, None]
    place = torch.where(spread > 1e-6, deviation / spread, 0.0)
    credit = torch.where(spread > 1e-6, 1.0 + torch.tanh(place / 2), 1.0)
    return _open((held + scale * credit * residual).clamp(-limit, limit), mask)


def margin_shift(
    credited: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    margin: float,
    correct_share: float,
) -> Float[Tensor, "B T"]:
    """The credited reward, shifted until correct responses lead by a margin. Joins after credit.

        gap = max(0, margin - (mean of correct - mean of wrong)),  means over the prompt's responses
                                                                   of their mean a per token
        A = a + c * gap  where correct,  a - (1 - c) * gap  where wrong,  c = correct_share

    Only at prompts with responses of both kinds. Where the teacher already ranks them right nothing
    changes. A shift pushes every token of a response alike, so long ones more.

    Args:
        credited: a, in nats; zero or anything where the mask is False.
        verdict: in [0, 1]; a response that was not judged (NaN) stays as it is.
        group: index of the prompt; samples of one prompt share it.
        mask: False on tool results and padding; a response without open tokens counts nowhere.
        margin: in nats per token.
        correct_share: c, in [0, 1]: 1 raises correct responses only, 0 lowers wrong ones only.

    Source: Uni-OPD, arXiv:2605.03677, with c = 1/2 and margin 0.4 for its results.
    """
    if not 0.0 <= correct_share <= 1.0:
        raise ValueError(f"correct_share must lie in [0, 1], got {correct_share}")
    held, counts = _open(credited, mask), mask.sum(1)
    means = held.sum(1) / counts.clamp(min=1)
    same = (group[:, None] == group) & (counts > 0)
    correct, wrong = same & (verdict >= PASS_MARK), same & (verdict < PASS_MARK)

    def mean_of(kind: Bool[Tensor, "B B"]) -> Float[Tensor, " B"]:
        return torch.where(kind, means, 0.0).sum(1) / kind.sum(1).clamp(min=1)

    both = correct.any(1) & wrong.any(1)
    gap = (margin - (mean_of(correct) - mean_of(wrong))).clamp(min=0.0)
    shift = torch.where(verdict >= PASS_MARK, correct_share * gap, (correct_share - 1.0) * gap)
    moved = both & ~verdict.isnan()
    return torch.where(mask & moved[:, None], held + shift[:, None], held)


# --------------------------------------------------------------------------------------------
# Parts


def _check_width(low: float, high: float) -> None:
    if not 0.0 <= low <= 1.0 or high < 0.0:
        raise ValueError(f"clip range needs 0 <= low <= 1 and high >= 0, got {low} and {high}")


def _check_strength(strength: float) -> None:
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")


def _population_z(
    values: Float[Tensor, " B"], peers: Bool[Tensor, "B B"]
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """Each value in standard deviations (divisor n) from its peers' mean; whether they differ."""
    count = peers.sum(1).clamp(min=1)
    mean = torch.where(peers, values, 0.0).sum(1) / count
    square = torch.where(peers, (values - mean[:, None]).square(), 0.0).sum(1) / count
    spread = square.sqrt()
    differ = spread > 1e-6
    return torch.where(differ, (values - mean) / spread, 0.0), differ


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

"""Gates on the extreme tokens of the optimizer step: which few of them are worth an update.

Each is open on a share of the step's open tokens, the max(1, round(share * n)) with the largest
score; n counts the open tokens of the whole step, so long responses may take most of the places.
Halves round up. Among equals the earlier one in the batch is kept: first by response, then by
position. All are coupled and detached; masked positions count for nothing and get 0.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import check_not_negative, check_share
from opd.formula.numerics import expectation, rounded_share
from opd.formula.support import ABSENT

__all__ = [
    "keep_entropy_mismatch",
    "keep_high_entropy",
    "keep_high_signal",
    "keep_large_divergence",
    "keep_large_forward_kl",
    "keep_low_entropy",
    "keep_overrated",
    "keep_soft_or",
    "keep_teachable",
    "keep_uncertain_or_wrong",
    "keep_unlikely",
]


def keep_high_entropy(
    student_entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, share: float
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens of the step where the student is most undecided.

        w = 1 on the max(1, round(share * n)) open tokens with the largest H(student), 0 elsewhere

    n counts the open tokens of the whole optimizer step, so long responses may take most of the
    places. Halves round up. Among equals the earlier one in the batch is kept: first by
    response, then by position.

    Args:
        student_entropy: in nats.
        share: in (0, 1].

    Source: TIP, arXiv:2604.14084 (share 0.5); REOPOLD, arXiv:2603.11137 (0.2).
    """
    return _largest(student_entropy, mask, share)


def keep_low_entropy(
    student_entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, share: float
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens of the step where the student is most decided.

        w = 1 on the max(1, round(share * n)) open tokens with the smallest H(student), 0 elsewhere

    Counting and ties as in `keep_high_entropy`; the control for its claim.

    Args:
        student_entropy: in nats.
        share: in (0, 1].

    Source: the opposite selection, as ablated by TIP, arXiv:2604.14084.
    """
    return _largest(-student_entropy, mask, share)


def keep_large_divergence(
    reverse_kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, share: float
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens of the step where student and teacher differ most.

        w = 1 on the max(1, round(share * n)) open tokens with the largest reverse KL, 0 elsewhere

    Counting and ties as in the module. It keeps outliers on purpose.

    Args:
        reverse_kl: of the whole prefix's distributions, not of the sampled token.
        share: in (0, 1].

    Source: TIP, arXiv:2604.14084, and TA-OPD, arXiv:2605.26844.
    """
    return _largest(reverse_kl, mask, share)


def keep_unlikely(
    student_logp: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, share: float
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens of the step that the student thought least likely.

        w = 1 on the max(1, round(share * n)) open tokens with the smallest student(token), else 0
        L = w * log student(token)  is the control without a teacher

    Counting and ties as in the module. Pushing these tokens down with a constant reward
    imitates much of what a teacher's log ratio does, so it is the control of every such method.

    Args:
        student_logp: of the chosen token.
        share: in (0, 1].

    Source: arXiv:2608.31046, with share 0.2.
    """
    return _largest(-student_logp, mask, share)


def keep_uncertain_or_wrong(
    student_entropy: Float[Tensor, "B T"],
    jensen_shannon: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    share: float,
    entropy_power: float = 1.0,
    divergence_power: float = 1.0,
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens of the step where the student is undecided and differs most.

        score = (H / max H)^a * (D / max D)^b,  a = entropy_power, b = divergence_power
        w = 1 on the max(1, round(share * n)) open tokens with the largest score, 0 elsewhere

    H is the student's entropy, D the Jensen-Shannon divergence; the largest of each are over the
    step. Counting and ties as in `keep_high_entropy`. A power of 0 leaves its factor out.

    Args:
        share: in (0, 1].
        entropy_power, divergence_power: >= 0.

    Source: TIP, arXiv:2604.14084, which draws tokens with these scores; here the largest are kept.
    """
    check_not_negative("entropy_power", entropy_power)
    check_not_negative("divergence_power", divergence_power)

    def relative(values: Tensor, power: float) -> Tensor:
        held = torch.where(mask, values.detach(), 0.0)
        largest = held.amax()
        return torch.where(largest > 0, held / largest, 1.0).clamp(min=0.0) ** power

    score = relative(student_entropy, entropy_power) * relative(jensen_shannon, divergence_power)
    return _largest(score, mask, share)


def keep_overrated(
    teacher_logp: Float[Tensor, "B T"],
    student_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    share: float,
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens of the step that the student overrates most.

        w = 1 on the max(1, round(share * n)) open tokens with the smallest log ratio, if that is
        below 0; 0 elsewhere

    Counting and ties as in the module: n counts all open tokens, so fewer than the share
    are kept where few have a negative log ratio.

    Args:
        teacher_logp: log-probability by the view.
        student_logp: log-probability now.
        share: in (0, 1].

    Source: the excess branch of TIDE, arXiv:2608.09836.
    """
    ratio = (teacher_logp - student_logp).detach()
    return torch.where(ratio < 0, _largest(-ratio, mask, share), 0.0)


def keep_large_forward_kl(
    forward_kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, share: float
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens of the step where the student misses most of the teacher.

        w = 1 on the max(1, round(share * n)) open tokens with the largest forward KL, 0 elsewhere

    Counting and ties as in the module.

    Args:
        forward_kl: on the support of the term.
        share: in (0, 1].

    Source: the deficit branch of TIDE, arXiv:2608.09836, on the teacher's likeliest tokens.
    """
    return _largest(forward_kl, mask, share)


def keep_entropy_mismatch(
    teacher_entropy: Float[Tensor, "B T"],
    student_entropy: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    share: float,
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens of the step whose entropies differ most.

        w = 1 on the max(1, round(share * n)) open tokens with the largest
            |H(teacher) - H(student)|, 0 elsewhere

    Counting and ties as in the module.

    Args:
        teacher_entropy, student_entropy: in nats.
        share: in (0, 1].

    Source: PAINT, arXiv:2604.26573; which difference it means is inferred.
    """
    return _largest((teacher_entropy - student_entropy).abs(), mask, share)


def keep_soft_or(
    student_entropy: Float[Tensor, "B T"],
    forward_kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    share: float,
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens where the student is undecided, or decided against the teacher.

        h, d = H(student) and KL(teacher || student), each scaled to [0, 1] over the step
        score = h + d - h * d

    Scaled by smallest and largest; where all are equal the scaled value is 0. Unlike a product it
    is large as soon as one of the two is. Counting and ties as in the module.

    Args:
        share: in (0, 1].

    Source: the score of the paper of TIP, arXiv:2604.14084; its code multiplies instead:
    `keep_uncertain_or_wrong`.
    """

    def scaled(values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        held = values.detach()
        low = torch.where(mask, held, math.inf).amin()
        high = torch.where(mask, held, -math.inf).amax()
        return torch.where(mask & (high > low), (held - low) / (high - low), 0.0)

    undecided, differs = scaled(student_entropy), scaled(forward_kl)
    return _largest(1.0 - (1.0 - undecided) * (1.0 - differs), mask, share)


def keep_teachable(
    forward_kl: Float[Tensor, "B T"],
    teacher_support_logp: Float[Tensor, "B T K"],
    support_ids: Int[Tensor, "B T K"],
    student_top_ids: Int[Tensor, "B T J"],
    mask: Bool[Tensor, "B T"],
    *,
    k: int,
    share: float,
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens where the two differ about tokens the student already considers.

        score = N(KL(teacher || student)) * N(sum of teacher(v) over the student's k likeliest)
        N(x) = clip((x - q05) / (q95 - q05), 0, 1),  quantiles over the step's open tokens

    The divergence is that of the support. N is 0 where the quantiles are equal. Counting and ties
    as in the module.

    Args:
        forward_kl: on the support.
        teacher_support_logp: the view as it is, on the support; it must hold the student's k
            likeliest tokens.
        support_ids: its ids.
        student_top_ids: likeliest first, at least k of them.
        k: how many of the student's likeliest tokens count as considered.
        share: in (0, 1].

    Source: TA-OPD, arXiv:2605.26844, with k = 16 and share 0.05.
    """
    if not 1 <= k <= student_top_ids.shape[-1]:
        raise ValueError(
            f"keep_teachable needs 1 <= k <= {student_top_ids.shape[-1]}, the number of the "
            f"student's likeliest tokens that are known, got k = {k}"
        )
    considered = student_top_ids[..., :k].unsqueeze(-2) == support_ids.unsqueeze(-1)
    known = considered.any(-1) & (support_ids != ABSENT)
    mass = torch.where(known, teacher_support_logp.detach().exp(), 0.0).sum(-1)
    return _largest(
        _between_quantiles(forward_kl, mask) * _between_quantiles(mass, mask), mask, share
    )


def keep_high_signal(
    student_log_probs: Float[Tensor, "B T K"],
    teacher_log_probs: Float[Tensor, "B T K"],
    mask: Bool[Tensor, "B T"],
    *,
    share: float,
) -> Float[Tensor, "B T"]:
    """A gate open on the tokens where one sample says most about the reverse KL's gradient.

        r(v) = log student(v) - log teacher(v), within +-30;  l(v) = 1 / student(v) - 1
        signal = Var_student[r];  noise = E_student[(r - b)^2 * l] - signal,  b = E[r l] / E[l]
        score = signal / noise

    Squared length of the expected gradient over that of a sample's spread about it, in the Fisher
    metric, at the best constant baseline b; its reciprocal is the relative error of one sample.
    Where there is no noise the score is infinite if there is a signal and 0 if not. Counting and
    ties as in the module.

    Args:
        student_log_probs: on a support that holds the sampled token, renormalised.
        teacher_log_probs: likewise.
        share: in (0, 1].

    Source: IER-OPD, arXiv:2609.24432, with the likeliest 16 tokens of either side and the sampled
    one as support, and shares from 0.001 to 0.1.
    """
    own = student_log_probs.detach()
    present = own > -math.inf
    ratio = torch.where(present, (own - teacher_log_probs.detach()).clamp(-30.0, 30.0), 0.0)

    def mean(values: Float[Tensor, "B T K"]) -> Float[Tensor, "B T"]:
        return expectation(own, torch.where(present, values, 0.0))

    # student * (1 / student - 1), so that an unlikely token does not overflow
    spread = torch.where(present, -torch.expm1(own), 0.0)
    middle = mean(ratio)
    signal = mean((ratio - middle.unsqueeze(-1)).square())
    total = spread.sum(-1)
    baseline = torch.where(total > 0, (spread * ratio).sum(-1) / total, 0.0)
    second = (spread * (ratio - baseline.unsqueeze(-1)).square()).sum(-1)
    noise = second - signal
    noise = torch.where(noise > 16 * torch.finfo(noise.dtype).eps * second, noise, 0.0)
    score = torch.where(noise > 0, signal / noise, torch.where(signal > 0, math.inf, 0.0))
    return _largest(score, mask, share)


# --------------------------------------------------------------------------------------------


def _between_quantiles(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The values on a scale from 0 at their 5 % quantile to 1 at their 95 % quantile."""
    held = torch.where(mask, values.detach(), torch.nan).double()
    low, high = held.nanquantile(0.05), held.nanquantile(0.95)
    scaled = ((held - low) / (high - low)).clamp(0.0, 1.0)
    return torch.where(mask & (high > low), scaled, 0.0).to(values.dtype)


def _largest(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], share: float
) -> Float[Tensor, "B T"]:
    """1 on the share of the step's open tokens with the largest values."""
    check_share("share", share)
    is_open = mask.flatten()
    falling = torch.argsort(values.detach().flatten(), descending=True, stable=True)
    # Open tokens first, each kind in the order above.
    order = falling[torch.argsort((~is_open[falling]).to(torch.uint8), stable=True)]
    kept = torch.arange(order.numel(), device=order.device) < rounded_share(
        is_open.sum(), share=share
    )
    chosen = torch.zeros_like(is_open).scatter(0, order, kept)
    return (chosen & is_open).view_as(mask).to(values.dtype)

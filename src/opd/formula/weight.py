"""Weights and gates per token, detached. A gate is 0 or 1.

A weight multiplies a term's loss on a row; a gate switches the term on for some rows. Gates come
in complementary pairs, so that two terms with opposite gates share out the rows between them: an
`_above` is open where the value is strictly above the threshold, its `_below` everywhere else.

A function that takes `mask` looks at whole responses, or at the whole optimizer step, and is
coupled. Masked positions take no time, count for nothing and get 0.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.fields import counted
from opd.types import PASS_MARK

__all__ = [
    "confident_wrong",
    "correct",
    "cumulative_drift",
    "disagreement",
    "drift_budget",
    "in_span",
    "incorrect",
    "keep_high_entropy",
    "keep_large_divergence",
    "keep_low_entropy",
    "keep_unlikely",
    "negative_advantage",
    "overlap_above",
    "position_decay",
    "positive_advantage",
    "prefix",
    "prefix_share",
    "relative_position",
    "skip_special",
    "student_entropy_above",
    "student_entropy_below",
    "surprise",
    "teacher_entropy_above",
    "teacher_entropy_below",
    "teacher_fails",
    "teacher_passes",
    "top_k_overlap",
    "trust",
    "trusted",
    "untrusted",
]


# --------------------------------------------------------------------------------------------
# By what the token is


def skip_special(special: Bool[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A gate that closes on special tokens, where teacher and student often disagree by template.

        w = 0 on a special token, 1 elsewhere

    End tokens stay open: a student that never learns to stop cannot be evaluated.

    Source: Revisiting On-Policy Distillation, arXiv:2603.25562, which masks special tokens.
    """
    return torch.where(special, 0.0, 1.0)


def in_span(extra_span: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A gate open on the tokens that the data column `span` marks.

        w = 1 where span is not 0, 0 elsewhere

    Args:
        extra_span: a column; of a data set one number per response, in `TokenBatch.extra` also one
            per token.

    Source: TRACE, arXiv:2605.10194, which trains on key spans and skips the rest.
    """
    return (extra_span != 0).to(extra_span.dtype)


# --------------------------------------------------------------------------------------------
# By how sure the two are, and how much they differ


def student_entropy_above(
    student_entropy: Float[Tensor, "*n"], *, nats: float
) -> Float[Tensor, "*n"]:
    """A gate open where the student is undecided.

        w = 1 where H(student) > nats, 0 elsewhere

    Source: TIP, arXiv:2604.14084, and REOPOLD, arXiv:2603.11137, which take a share instead of a
    threshold: `keep_high_entropy`.
    """
    return _gate(student_entropy > nats, student_entropy)


def student_entropy_below(
    student_entropy: Float[Tensor, "*n"], *, nats: float
) -> Float[Tensor, "*n"]:
    """A gate open where the student is decided; the complement of `student_entropy_above`.

        w = 1 where H(student) <= nats, 0 elsewhere

    Source: one half of the confident-but-wrong tokens of TIP, arXiv:2604.14084.
    """
    return _gate(student_entropy <= nats, student_entropy)


def teacher_entropy_above(
    teacher_entropy: Float[Tensor, "*n"], *, nats: float
) -> Float[Tensor, "*n"]:
    """A gate open where the teacher is undecided.

        w = 1 where H(teacher) > nats, 0 elsewhere

    There the reverse KL seeks one of several modes, and a forward KL keeps them all.

    Source: EOPD, arXiv:2603.07079, the gate of its forward-KL term.
    """
    return _gate(teacher_entropy > nats, teacher_entropy)


def teacher_entropy_below(
    teacher_entropy: Float[Tensor, "*n"], *, nats: float
) -> Float[Tensor, "*n"]:
    """A gate open where the teacher is decided; the complement of `teacher_entropy_above`.

        w = 1 where H(teacher) <= nats, 0 elsewhere

    Source: EGRSD, arXiv:2605.13255, which drops tokens where the teacher is unsure.
    """
    return _gate(teacher_entropy <= nats, teacher_entropy)


def disagreement(total_variation: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """How far teacher and student are apart, as a share of the mass.

        w = 1/2 sum_v |student(v) - teacher(v)|

    Between 0, where they agree, and 1, where they share no token; unlike a KL it cannot be
    dominated by a single outlier.

    Source: disagreement as token weight in TIP, arXiv:2604.14084, which uses the Jensen-Shannon
    divergence.
    """
    return total_variation.detach()


def confident_wrong(
    student_entropy: Float[Tensor, "*n"],
    total_variation: Float[Tensor, "*n"],
    *,
    below_nats: float,
    above: float,
) -> Float[Tensor, "*n"]:
    """A gate open where the student is sure of something that the teacher disputes.

        w = 1 where H(student) <= below_nats and TV > above, 0 elsewhere

    Args:
        student_entropy: in nats.
        total_variation: between 0 and 1.
        below_nats: how sure the student must be.
        above: how much mass must be in dispute.

    Source: TIP, arXiv:2604.14084, which draws such tokens at random with a weight made of both
    numbers; here the two thresholds are declared.
    """
    return _gate((student_entropy <= below_nats) & (total_variation > above), student_entropy)


def surprise(student_logp: Float[Tensor, "*n"], *, boost: float) -> Float[Tensor, "*n"]:
    """More weight for tokens that were unlikely when the student chose them.

        w = 1 + boost * (1 - student(token))

    From 1, for a token that was certain, to 1 + boost.

    Args:
        student_logp: of the chosen token.
        boost: what the most surprising token gets on top of 1; >= 0.

    Source: SuRe, arXiv:2608.25643, with boost 1.
    """
    _check_not_negative("boost", boost)
    return 1.0 - boost * torch.expm1(student_logp.detach())


@counted(lambda teacher_logp, student_logp: teacher_logp > student_logp)
def trust(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The probability with which the teacher would accept the student's token.

        w = min(teacher(token) / student(token), 1)

    Small where the token lies far outside what the teacher would write.

    Source: TrOPD, arXiv:2606.01249.
    """
    return (teacher_logp - student_logp).detach().clamp(max=0.0).exp()


def trusted(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, at_least: float
) -> Float[Tensor, "*n"]:
    """A gate open inside the trust region: on tokens the teacher would accept often enough.

        w = 1 where trust >= at_least, 0 elsewhere

    Args:
        at_least: the smallest `trust` that is let in, in (0, 1].

    Source: TrOPD, arXiv:2606.01249.
    """
    _check_share("at_least", at_least)
    return _gate(trust(teacher_logp, student_logp) >= at_least, student_logp)


def untrusted(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, below: float
) -> Float[Tensor, "*n"]:
    """A gate open outside the trust region; the complement of `trusted` at the same threshold.

        w = 1 where trust < below, 0 elsewhere

    Args:
        below: the smallest `trust` that is kept out, in (0, 1].

    Source: TrOPD, arXiv:2606.01249, whose outliers get a forward KL instead.
    """
    _check_share("below", below)
    return _gate(trust(teacher_logp, student_logp) < below, student_logp)


def top_k_overlap(
    student_top_ids: Int[Tensor, "*n J"], teacher_top_ids: Int[Tensor, "*n L"], *, k: int
) -> Float[Tensor, "*n"]:
    """Which share of their k likeliest tokens the two have in common.

        w = |top_k(student) and top_k(teacher)| / k

    Args:
        student_top_ids: distinct, likeliest first, at least k of them.
        teacher_top_ids: likewise.
        k: how many are compared.

    Returns:
        One share per position, in [0, 1].

    Source: Prune-OPD, arXiv:2605.07804, as a weight; as a measure of how well two models fit,
    arXiv:2604.13016.
    """
    available = min(student_top_ids.shape[-1], teacher_top_ids.shape[-1])
    if not 1 <= k <= available:
        raise ValueError(
            f"top_k_overlap needs 1 <= k <= {available}, the number of likeliest tokens known on "
            f"both sides, got k = {k}"
        )
    ours, theirs = student_top_ids[..., :k], teacher_top_ids[..., :k]
    shared = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1)
    return shared.sum(-1) / k


def overlap_above(
    student_top_ids: Int[Tensor, "*n J"],
    teacher_top_ids: Int[Tensor, "*n L"],
    *,
    k: int,
    at_least: float,
) -> Float[Tensor, "*n"]:
    """A gate open where teacher and student have enough of their likeliest tokens in common.

        w = 1 where top_k_overlap >= at_least, 0 elsewhere

    Args:
        k: how many tokens are compared.
        at_least: a share in (0, 1].

    Source: Prune-OPD, arXiv:2605.07804, which also drops everything after the first such
    position; here each position is judged by itself.
    """
    _check_share("at_least", at_least)
    overlap = top_k_overlap(student_top_ids, teacher_top_ids, k=k)
    return _gate(overlap >= at_least, overlap)


# --------------------------------------------------------------------------------------------
# By the place in the response


def position_decay(position: Int[Tensor, "*n"], *, half_life: float) -> Float[Tensor, "*n"]:
    """Weight that halves with every `half_life` tokens of the response.

        w = 2^(-position / half_life)

    Args:
        position: 0 at the first token.
        half_life: in tokens, > 0.

    Source: an external teacher's signal fades along the student's text, arXiv:2605.13643.
    """
    if not half_life > 0:
        raise ValueError(f"half_life is a number of tokens > 0, got {half_life}")
    return torch.exp2(-position.to(torch.get_default_dtype()) / half_life)


def relative_position(
    mask: Bool[Tensor, "B T"], *, start: float, end: float
) -> Float[Tensor, "B T"]:
    """Weight that runs linearly over each response, from its first to its last open token.

        w = start + (end - start) * i / (n - 1)  at open token i = 0 ... n-1

    Either direction. A response of one token, which is first and last, has the weight `start`.

    Args:
        start: weight of the first open token, >= 0.
        end: weight of the last one, >= 0.

    Source: rising, for a teacher that is the student with privileged context, PW-OPSD,
    arXiv:2605.21606; falling, for an external teacher, the fixed curves that IW-OPD,
    arXiv:2606.22600, compares itself with.
    """
    _check_not_negative("start", start)
    _check_not_negative("end", end)
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=1)
    share = _place(mask).to(torch.get_default_dtype()) / last
    return torch.where(mask, start + (end - start) * share, 0.0)


def prefix(position: Int[Tensor, "*n"], *, tokens: int) -> Float[Tensor, "*n"]:
    """A gate open on the first tokens of every response.

        w = 1 where position < tokens, 0 elsewhere

    It saves nothing of the rollout; a horizon that ends the rollout there does.

    Args:
        position: 0 at the first token.
        tokens: how many, >= 1.

    Source: prefix distillation, arXiv:2602.15260.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be >= 1, or nothing is left to learn from, got {tokens}")
    return torch.where(position < tokens, 1.0, 0.0)


def prefix_share(mask: Bool[Tensor, "B T"], *, share: float) -> Float[Tensor, "B T"]:
    """A gate open on the first part of each response, as a share of its open tokens.

        w = 1 at open token i = 0 ... n-1 where i < max(1, round(share * n)), 0 elsewhere

    Halves round up. At least one token of every response stays.

    Args:
        share: in (0, 1].

    Source: IW-OPD, arXiv:2606.22600, finds the first 30 % of the tokens as good as all.
    """
    _check_share("share", share)
    return torch.where(mask & (_place(mask) < _rounded(share, mask.sum(1, keepdim=True))), 1.0, 0.0)


def cumulative_drift(
    teacher_logp: Float[Tensor, "B T"],
    student_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    boost: float,
) -> Float[Tensor, "B T"]:
    """More weight before the student's text has drifted from what the teacher would write.

        w_t = 1 + boost * (1 - F_{t-1}),   F_{t-1} = sum_{k<t} |r_k| / sum_k |r_k|

    with the log ratio r. Never rising along a response: 1 + boost up to and including the first
    token the two rate differently, then falling towards 1, which it would reach after the last.
    A response without any drift has F = 0 and keeps 1 + boost throughout, as if its drift were
    still to come. Detached.

    Args:
        boost: what the first tokens get on top of 1; >= 0.

    Source: IW-OPD, arXiv:2606.22600, with boost 0.5.
    """
    _check_not_negative("boost", boost)
    before, total = _drift(teacher_logp, student_logp, mask)
    share = torch.where(total > 0, before / total, 0.0)
    # After a token to which the teacher gives no mass, all of the (infinite) drift lies behind.
    share = torch.where(before == math.inf, 1.0, share)
    return torch.where(mask, 1.0 + boost * (1.0 - share), 0.0)


def drift_budget(
    teacher_logp: Float[Tensor, "B T"],
    student_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    nats: float,
) -> Float[Tensor, "B T"]:
    """A gate that closes for good once the text has drifted too far from the teacher's.

        w_t = 1 where sum_{k<t} |r_k| <= nats, 0 elsewhere

    with the log ratio r. The sum is over the prefix, so the token that exhausts the budget is the
    last one let in, and the first token always is.

    Args:
        nats: the budget per response, >= 0.

    Source: Prune-OPD, arXiv:2605.07804, which measures the drift by the overlap of top tokens;
    the sum of absolute log ratios is that of IW-OPD, arXiv:2606.22600.
    """
    _check_not_negative("nats", nats)
    before, _ = _drift(teacher_logp, student_logp, mask)
    return _gate(mask & (before <= nats), student_logp)


# --------------------------------------------------------------------------------------------
# The extreme ones of the optimizer step


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

    Counting and ties as in `keep_high_entropy`. It keeps outliers on purpose.

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

    Counting and ties as in `keep_high_entropy`. Pushing these tokens down with a constant reward
    imitates much of what a teacher's log ratio does, so it is the control of every such method.

    Args:
        student_logp: of the chosen token.
        share: in (0, 1].

    Source: arXiv:2608.31046, with share 0.2.
    """
    return _largest(-student_logp, mask, share)


# --------------------------------------------------------------------------------------------
# By outcome


def correct(verdict: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """A gate open on every token of a response that the verifier accepts.

        w = 1 where verdict >= 0.5, 0 elsewhere

    Closed where there is no verdict, as `incorrect` is.

    Args:
        verdict: the verifier's score in [0, 1]; NaN where the response was not judged.

    Source: routing by correctness, SCOPE, arXiv:2604.10688.
    """
    return _gate((verdict >= PASS_MARK).unsqueeze(1) & mask, verdict)


def incorrect(verdict: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """A gate open on every token of a response that the verifier rejects.

        w = 1 where verdict < 0.5, 0 elsewhere

    Closed where there is no verdict, as `correct` is.

    Args:
        verdict: the verifier's score in [0, 1]; NaN where the response was not judged.

    Source: routing by correctness, SCOPE, arXiv:2604.10688, which distils wrong responses only.
    """
    return _gate((verdict < PASS_MARK).unsqueeze(1) & mask, verdict)


def teacher_passes(
    extra_teacher_pass: Float[Tensor, "*n"], *, at_least: float
) -> Float[Tensor, "*n"]:
    """A gate open on prompts that the teacher itself solves.

        w = 1 where teacher_pass >= at_least, 0 elsewhere

    Args:
        extra_teacher_pass: the data column `teacher_pass`, the share of the teacher's attempts
            that passed; NaN, as for `teacher_fails`, where it was not tried.
        at_least: in (0, 1].

    Source: "Verify before you distil", arXiv:2609.02998.
    """
    _check_share("at_least", at_least)
    return _gate(extra_teacher_pass >= at_least, extra_teacher_pass)


def teacher_fails(extra_teacher_pass: Float[Tensor, "*n"], *, below: float) -> Float[Tensor, "*n"]:
    """A gate open on prompts that the teacher does not solve; the complement of `teacher_passes`.

        w = 1 where teacher_pass < below, 0 elsewhere

    Args:
        extra_teacher_pass: the data column `teacher_pass`; closed where it is NaN.
        below: in (0, 1].

    Source: "Verify before you distil", arXiv:2609.02998, which learns from the verifier there.
    """
    _check_share("below", below)
    return _gate(extra_teacher_pass < below, extra_teacher_pass)


def positive_advantage(advantage: Float[Tensor, "*n"], *, of: str = "") -> Float[Tensor, "*n"]:
    """A gate open where the token is to become likelier.

        w = 1 where A > 0, 0 elsewhere

    Args:
        advantage: of the term itself, or of the term that `of` names.
        of: the name of a sampled term; read by the objective, which passes that term's advantage.

    Source: AOPD, arXiv:2605.06387.
    """
    return _gate(advantage > 0, advantage)


def negative_advantage(advantage: Float[Tensor, "*n"], *, of: str = "") -> Float[Tensor, "*n"]:
    """A gate open where the token is not to become likelier; complement of `positive_advantage`.

        w = 1 where A <= 0, 0 elsewhere

    An advantage of zero counts as negative: it pushes nowhere, so what replaces it may act.

    Args:
        advantage: of the term itself, or of the term that `of` names.
        of: the name of a sampled term; read by the objective, which passes that term's advantage.

    Source: AOPD, arXiv:2605.06387, which switches to a divergence where A <= 0.
    """
    return _gate(advantage <= 0, advantage)


# --------------------------------------------------------------------------------------------


def _gate(is_open: Bool[Tensor, "*m"], like: Tensor) -> Float[Tensor, "*m"]:
    return is_open.to(like.dtype)


def _place(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """How many open tokens of the response come before this position."""
    open_so_far = mask.long().cumsum(1)
    return open_so_far - mask.long()


def _rounded(share: float, count: Int[Tensor, "*m"]) -> Float[Tensor, "*m"]:
    """The share of a count as a whole number, halves up, at least one."""
    return torch.floor(share * count.double() + 0.5).clamp(min=1.0)


def _drift(
    teacher_logp: Float[Tensor, "B T"],
    student_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B 1"]]:
    """Sum of absolute log ratios before each token, and over the whole response."""
    drift = torch.where(mask, (teacher_logp - student_logp).detach().abs(), 0.0)
    so_far = drift.cumsum(1)
    # Shifted, not subtracted: infinity minus infinity is undefined.
    before = torch.nn.functional.pad(so_far[:, :-1], (1, 0))
    return before, so_far[:, -1:]


def _largest(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], share: float
) -> Float[Tensor, "B T"]:
    """1 on the share of the step's open tokens with the largest values."""
    _check_share("share", share)
    is_open = mask.flatten()
    falling = torch.argsort(values.detach().flatten(), descending=True, stable=True)
    # Open tokens first, each kind in the order above.
    order = falling[torch.argsort((~is_open[falling]).to(torch.uint8), stable=True)]
    kept = torch.arange(order.numel(), device=order.device) < _rounded(share, is_open.sum())
    chosen = torch.zeros_like(is_open).scatter(0, order, kept)
    return _gate((chosen & is_open).view_as(mask), values)


def _check_not_negative(knob: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{knob} must be a finite number >= 0, got {value}")


def _check_share(knob: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"{knob} is a share in (0, 1], got {value}; to leave the gate open everywhere, leave "
            "it out of the weights"
        )

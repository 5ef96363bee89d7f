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

from opd.errors import check_not_negative, check_share
from opd.fields import counted
from opd.formula.numerics import rounded_share
from opd.types import PASS_MARK

__all__ = [
    "after",
    "confidence",
    "confident_wrong",
    "correct",
    "cumulative_drift",
    "disagreement",
    "distrust",
    "drift_budget",
    "endorsement",
    "engine_ratio",
    "engine_ratio_within",
    "importance",
    "in_consensus",
    "in_span",
    "incorrect",
    "negative_advantage",
    "overlap_above",
    "overlap_decay",
    "position_decay",
    "positive_advantage",
    "prefix",
    "prefix_share",
    "relative_position",
    "sigmoid_position",
    "skip_special",
    "student_entropy_above",
    "student_entropy_below",
    "surprise",
    "teacher_confidence",
    "teacher_entropy_above",
    "teacher_entropy_below",
    "teacher_fails",
    "teacher_pass_rate",
    "teacher_passes",
    "top_k_overlap",
    "trust",
    "trusted",
    "untrusted",
    "update_ratio",
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


def teacher_confidence(
    teacher_entropy: Float[Tensor, "*n"], *, nats: float, least: float
) -> Float[Tensor, "*n"]:
    """Full weight where the teacher is decided, and a little elsewhere.

        w = 1 where H(teacher) <= nats, least elsewhere

    Args:
        nats: how undecided the teacher may be.
        least: in [0, 1).

    Source: EGRSD, arXiv:2605.13255, which bounds every weight away from 0; the shape is ours.
    """
    if not 0.0 <= least < 1.0:
        raise ValueError(f"least must lie in [0, 1), got {least}; 1 is no weight at all")
    full = torch.ones_like(teacher_entropy)
    return torch.where(teacher_entropy.detach() <= nats, full, full * least)


def confidence(
    teacher_entropy: Float[Tensor, "B T"],
    student_entropy: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    teacher_gain: float,
    student_gain: float,
) -> Float[Tensor, "B T"]:
    """More weight where the teacher is sure and the student is not; 1 on average.

        w = u / mean u,  u = (1 + a * (1 - H(teacher) / max)) * (1 + b * H(student) / max)

    The largest of each entropy and the mean run over the open tokens of the optimizer step. A side
    whose entropies are all 0 counts as sure.

    Args:
        teacher_gain, student_gain: a and b, >= 0.

    Source: FiRe-OPD, arXiv:2606.02684, with gains of 1.
    """
    check_not_negative("teacher_gain", teacher_gain)
    check_not_negative("student_gain", student_gain)

    def relative(entropy: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        held = torch.where(mask, entropy.detach(), 0.0).clamp(min=0.0)
        largest = held.amax()
        return torch.where(largest > 0, held / largest, 0.0)

    sure = 1.0 + teacher_gain * (1.0 - relative(teacher_entropy))
    weight = sure * (1.0 + student_gain * relative(student_entropy))
    total = torch.where(mask, weight, 0.0).sum()
    return torch.where(mask, weight / total * mask.sum(), 0.0)


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
    check_not_negative("boost", boost)
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


def endorsement(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, sharpness: float
) -> Float[Tensor, "*n"]:
    """How far the teacher stands behind the token, between 0 and 1.

        w = sigmoid(b * (log teacher(token) - log student(token))),  b = sharpness

    1/2 where the two agree; a soft form of the gate that keeps what the teacher prefers.

    Args:
        sharpness: b, > 0.

    Source: SDAR, arXiv:2605.15155.
    """
    if not 0.0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be positive and finite, got {sharpness}")
    return torch.sigmoid(sharpness * (teacher_logp - student_logp).detach())


def _over_the_cap(
    student_logp: Float[Tensor, "*n"], sampler_logp: Float[Tensor, "*n"], *, cap: float
) -> Bool[Tensor, "*n"]:
    return (student_logp - sampler_logp).detach() > math.log(cap)


@counted(_over_the_cap)
def importance(
    student_logp: Float[Tensor, "*n"], sampler_logp: Float[Tensor, "*n"], *, cap: float
) -> Float[Tensor, "*n"]:
    """The capped importance ratio of the token to whoever drew it.

        w = min(student(token) / sampler(token), cap)

    For terms that are not a score of the token and so have no ratio of their own; a sampled term
    takes `surrogate.truncated_importance`. The share of tokens above the cap is logged.

    Args:
        student_logp: of the chosen token.
        sampler_logp: under the distribution it was drawn from, a mixture with the teacher included.
        cap: largest weight, >= 1.

    Source: MiniLLM, arXiv:2306.08543, for text drawn from a mixture with the teacher.
    """
    _check_cap(cap)
    return (student_logp - sampler_logp).detach().clamp(max=math.log(cap)).exp()


def distrust(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The probability with which the teacher would reject the student's token.

        w = 1 - min(teacher(token) / student(token), 1)

    The complement of `trust`: a term with one and a term with the other share out every row.

    Source: TrOPD, arXiv:2606.01249, which draws one of the two; these are the shares.
    """
    return -torch.expm1((teacher_logp - student_logp).detach().clamp(max=0.0))


def _updated_too_far(
    student_logp: Float[Tensor, "*n"], old_logp: Float[Tensor, "*n"], *, cap: float
) -> Bool[Tensor, "*n"]:
    return (student_logp - old_logp).detach() > math.log(cap)


@counted(_updated_too_far)
def update_ratio(
    student_logp: Float[Tensor, "*n"], old_logp: Float[Tensor, "*n"], *, cap: float
) -> Float[Tensor, "*n"]:
    """The capped ratio of the weights being updated to those of the rollout.

        w = min(student(token) / old(token), cap)

    1 at the first update of a rollout. For terms that are not a score of the token; the share of
    tokens above the cap is logged.

    Args:
        student_logp: of the chosen token.
        old_logp: under the trainer's weights at rollout time.
        cap: largest weight, >= 1.

    Source: SDPO, arXiv:2601.20802, with 2.
    """
    _check_cap(cap)
    return (student_logp - old_logp).detach().clamp(max=math.log(cap)).exp()


def _engines_differ(
    old_logp: Float[Tensor, "*n"], sampler_logp: Float[Tensor, "*n"], *, cap: float
) -> Bool[Tensor, "*n"]:
    return (old_logp - sampler_logp).detach() > math.log(cap)


@counted(_engines_differ)
def engine_ratio(
    old_logp: Float[Tensor, "*n"], sampler_logp: Float[Tensor, "*n"], *, cap: float
) -> Float[Tensor, "*n"]:
    """The capped ratio of the trainer's own numbers to those of the engine that generated.

        w = min(old(token) / sampler(token), cap)

    1 where the two engines agree. The share of tokens above the cap is logged.

    Args:
        old_logp: under the trainer's weights at rollout time.
        sampler_logp: under the engine that generated.
        cap: largest weight, >= 1.

    Source: truncated importance sampling between engines, as in SDPO's code, arXiv:2601.20802, with
    2, and in that of G-OPD, arXiv:2602.12125, with 5.
    """
    _check_cap(cap)
    return (old_logp - sampler_logp).detach().clamp(max=math.log(cap)).exp()


def _engines_far_apart(
    old_logp: Float[Tensor, "*n"], sampler_logp: Float[Tensor, "*n"], *, low: float, high: float
) -> Bool[Tensor, "*n"]:
    ratio = (old_logp - sampler_logp).detach().exp()
    return (ratio < low) | (ratio > high)


@counted(_engines_far_apart)
def engine_ratio_within(
    old_logp: Float[Tensor, "*n"], sampler_logp: Float[Tensor, "*n"], *, low: float, high: float
) -> Float[Tensor, "*n"]:
    """The ratio of the trainer's own numbers to the engine's, or 0 where they are far apart.

        w = ratio where low <= ratio <= high, else 0,  ratio = old(token) / sampler(token)

    The share of tokens outside is logged; what they would have said is lost.

    Args:
        old_logp: under the trainer's weights at rollout time.
        sampler_logp: under the engine that generated.
        low: smallest ratio that counts, in [0, 1].
        high: largest ratio that counts, >= 1.

    Source: IcePop in NeMo-RL's on-policy distillation.
    """
    if not 0.0 <= low <= 1.0 <= high:
        raise ValueError(
            f"engine_ratio_within needs 0 <= low <= 1 <= high, got low={low} and high={high}"
        )
    ratio = (old_logp - sampler_logp).detach().exp()
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def trusted(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"], *, at_least: float
) -> Float[Tensor, "*n"]:
    """A gate open inside the trust region: on tokens the teacher would accept often enough.

        w = 1 where trust >= at_least, 0 elsewhere

    Args:
        at_least: the smallest `trust` that is let in, in (0, 1].

    Source: TrOPD, arXiv:2606.01249.
    """
    check_share("at_least", at_least)
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
    check_share("below", below)
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
    check_share("at_least", at_least)
    overlap = top_k_overlap(student_top_ids, teacher_top_ids, k=k)
    return _gate(overlap >= at_least, overlap)


def overlap_decay(
    student_top_ids: Int[Tensor, "B T J"],
    teacher_top_ids: Int[Tensor, "B T L"],
    mask: Bool[Tensor, "B T"],
    *,
    k: int,
    at_least: float,
    drop: float,
    base: float = 0.0,
) -> Float[Tensor, "B T"]:
    """Weight that falls with every token where teacher and student have too little in common.

        w_t = base + max(0, 1 - drop * |{j <= t: top_k_overlap_j < at_least}|)

    Never rising along a response: what is written after they have parted counts less, however well
    the two agree there again.

    Args:
        student_top_ids: distinct, likeliest first, at least k of them.
        teacher_top_ids: likewise.
        mask: False on tool results and padding; those positions take no time.
        k: how many tokens are compared.
        at_least: a share in (0, 1].
        drop: what each such token takes away, > 0.
        base: what is left in the end, >= 0.

    Source: Prune-OPD, arXiv:2605.07804; with 0.9, 0.02 and 0 by default, 0.7, 0.01 and 0.5 in its
    scripts.
    """
    check_share("at_least", at_least)
    check_not_negative("base", base)
    if not 0.0 < drop < math.inf:
        raise ValueError(f"drop must be positive and finite, got {drop}; at 0 nothing decays")
    overlap = top_k_overlap(student_top_ids, teacher_top_ids, k=k)
    parted = (mask & (overlap < at_least)).cumsum(1)
    return torch.where(mask, base + (1.0 - drop * parted).clamp(min=0.0), 0.0)


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
    check_not_negative("start", start)
    check_not_negative("end", end)
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=1)
    share = _place(mask).to(torch.get_default_dtype()) / last
    return torch.where(mask, start + (end - start) * share, 0.0)


def sigmoid_position(
    mask: Bool[Tensor, "B T"], *, least: float, centre: float, width: float
) -> Float[Tensor, "B T"]:
    """Weight that rises along each response from `least` to 1, in the shape of a sigmoid.

        w = least + (1 - least) * sigmoid(((i + 1/2) / n - centre) / width)
        at open token i = 0 ... n-1

    Args:
        least: the weight long before the centre, in [0, 1].
        centre: where it is half way, as a share of the response.
        width: how gently it rises, as a share of the response, > 0.

    Source: PW-OPSD, arXiv:2605.21606, with 0.25, 0.3 and 0.1.
    """
    if not (0.0 <= least <= 1.0 and width > 0.0):
        raise ValueError(
            f"sigmoid_position needs least in [0, 1] and width > 0, got {least} and {width}"
        )
    count = mask.sum(1, keepdim=True).clamp(min=1)
    share = (_place(mask).to(torch.get_default_dtype()) + 0.5) / count
    rising = least + (1.0 - least) * torch.sigmoid((share - centre) / width)
    return torch.where(mask, rising, 0.0)


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
    check_share("share", share)
    return torch.where(
        mask & (_place(mask) < rounded_share(mask.sum(1, keepdim=True), share=share)), 1.0, 0.0
    )


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
    check_not_negative("boost", boost)
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
    check_not_negative("nats", nats)
    before, _ = _drift(teacher_logp, student_logp, mask)
    return _gate(mask & (before <= nats), student_logp)


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
    check_share("at_least", at_least)
    return _gate(extra_teacher_pass >= at_least, extra_teacher_pass)


def teacher_pass_rate(extra_teacher_pass: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """How often the teacher itself solves the prompt.

        w = teacher_pass

    0 where it was not tried (NaN).

    Args:
        extra_teacher_pass: the data column `teacher_pass`, a share in [0, 1].

    Source: RSTG, arXiv:2608.00782.
    """
    return torch.where(extra_teacher_pass.isnan(), 0.0, extra_teacher_pass).detach()


def in_consensus(extra_consensus: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A gate open where the data column `consensus` says that the teacher's answers agree.

        w = 1 where consensus is not 0, 0 elsewhere

    Args:
        extra_consensus: a column, one number per response.

    Source: GATES, arXiv:2602.20574, where half of 8 answers must agree.
    """
    return (extra_consensus != 0).to(extra_consensus.dtype)


def after(position: Int[Tensor, "*n"], *, tokens: int) -> Float[Tensor, "*n"]:
    """A gate closed on the first tokens of every response.

        w = 0 where position < tokens, 1 elsewhere

    The complement of `prefix`. There a teacher with privileged context announces itself.

    Args:
        position: 0 at the first token.
        tokens: how many are skipped, >= 1.

    Source: SDFT, arXiv:2601.19897, whose code skips 3.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be >= 1, got {tokens}; to skip none, leave the gate out")
    return torch.where(position < tokens, 0.0, 1.0)


def teacher_fails(extra_teacher_pass: Float[Tensor, "*n"], *, below: float) -> Float[Tensor, "*n"]:
    """A gate open on prompts that the teacher does not solve; the complement of `teacher_passes`.

        w = 1 where teacher_pass < below, 0 elsewhere

    Args:
        extra_teacher_pass: the data column `teacher_pass`; closed where it is NaN.
        below: in (0, 1].

    Source: "Verify before you distil", arXiv:2609.02998, which learns from the verifier there.
    """
    check_share("below", below)
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


def _check_cap(cap: float) -> None:
    if not cap >= 1.0:
        raise ValueError(f"cap must be at least 1, got {cap}; below 1 it only rescales the term")

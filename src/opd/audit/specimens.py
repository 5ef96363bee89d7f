"""Losses with a known mistake: what an audit has to find, to try it on and to be judged by.

Every function restates in our own code one mistake that a loss was seen with, and nothing else of
the system where it was: one line is wrong and the rest is right. `SPECIMENS` says of each what its
author calls it, what it descends and what an audit has to name; `NOT_IN_A_LOSS` lists mistakes
that no loss function can show.

A loss takes the logits of one response's consecutive rows, row n's predicting token n. Systems
change, and most of these mistakes have been reported or repaired since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

__all__ = ["NOT_IN_A_LOSS", "SPECIMENS", "Adapter", "Finding", "Specimen"]

Adapter = Literal["rows", "reduced", "linear"]

Finding = Literal[
    "another-divergence",
    "dead-rows",
    "discount",
    "hard-labels",
    "low-precision",
    "masked-rows",
    "mean-of-means",
    "missing-scores",
    "no-teacher-gradient",
    "not-a-number",
    "not-finite",
    "not-stationary",
    "off-by-one",
    "padding-copied",
    "padding-has-mass",
    "reads-other-rows",
    "teacher-gradient",
    "temperature",
    "unbounded-ratio",
    "undetached",
]


@dataclass(frozen=True)
class Specimen:
    """A loss with a known mistake.

    Attributes:
        name: of the function.
        function: the loss.
        adapter: how it is called: one number per row, one number, or hidden states and heads.
        claim: the divergence that its author calls it; "none" where the mistake is another one.
        seen: the mistake in a few words, and where it was.
        finds: what an audit must name. More may follow from the same mistake.
        descends: the divergence that it descends instead of its claim, "" where that has no name.
    """

    name: str
    function: Callable[..., Tensor]
    adapter: Adapter
    claim: str
    seen: str
    finds: tuple[Finding, ...]
    descends: str = ""


# --------------------------------------------------------------------------------------------
# What is right in all of them


def _log_probs(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Normalised in float32 or wider, so that precision is a mistake only where we make it one."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _both(
    student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"]]:
    """Both sides normalised; the gradient stops at the teacher."""
    return _log_probs(student_logits), _log_probs(teacher_logits.detach())


def _at(values: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    return values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _logp(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Both sides' log-probability of the tokens; the gradient stops at the teacher."""
    student, teacher = _both(student_logits, teacher_logits)
    return _at(student, tokens), _at(teacher, tokens)


def _kl(first: Float[Tensor, "N K"], second: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """sum_v first(v) * (log first(v) - log second(v)), an entry without mass counting nothing."""
    weights = first.exp()
    return (weights * torch.where(weights == 0, 0.0, first - second)).sum(-1)


def _log_mixture(
    student: Float[Tensor, "N K"], teacher: Float[Tensor, "N K"], *, teacher_weight: float
) -> Float[Tensor, "N K"]:
    mixture = (1 - teacher_weight) * student.exp() + teacher_weight * teacher.exp()
    return torch.where(mixture == 0, 1.0, mixture).log()


def _jsd(
    student: Float[Tensor, "N K"],
    teacher: Float[Tensor, "N K"],
    *,
    beta: float = 0.5,
    teacher_weight: float | None = None,
) -> Float[Tensor, " N"]:
    """beta * KL(teacher || m) + (1 - beta) * KL(student || m), right for teacher_weight = beta."""
    weight = beta if teacher_weight is None else teacher_weight
    mixture = _log_mixture(student, teacher, teacher_weight=weight)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _k3(logp: Float[Tensor, " N"], teacher_logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    log_ratio = teacher_logp - logp
    return log_ratio.exp() - 1 - log_ratio


def _mean(
    losses: Float[Tensor, " N"], mask: Bool[Tensor, " N"] | None, count: int | None
) -> Float[Tensor, ""]:
    """Over the valid tokens of all micro-batches, or of this one where it is not told."""
    kept = losses if mask is None else torch.where(mask, losses, 0.0)
    valid = len(losses) if mask is None else int(mask.sum())
    return kept.sum() / max(valid if count is None else int(count), 1)


def _project(hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"]) -> Float[Tensor, "N V"]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide) @ weight.to(wide).T


# --------------------------------------------------------------------------------------------
# Another divergence than its name


def jsd_with_the_mixture_reversed(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A generalised JSD whose mixture weighs the two sides the other way round than its terms.

        0.3 * KL(teacher || m) + 0.7 * KL(student || m),  m = 0.3 * student + 0.7 * teacher

    Right only at one half. Seen: TRL GKD before #3043.
    """
    student, teacher = _both(student_logits, teacher_logits)
    return _jsd(student, teacher, beta=0.3, teacher_weight=0.7)


def jsd_at_its_end_point(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The generalised JSD at weight 0, called the forward KL: it is 0 for any pair.

    The mixture is the student itself; only JSD / beta tends to the forward KL. Seen: TRL GKD
    before #3043.
    """
    student, teacher = _both(student_logits, teacher_logits)
    return _jsd(student, teacher, beta=0.0)


def jsd_mirrored(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A generalised JSD whose weight is the student's share, where the usual one is the teacher's.

    Called with 0.3 it is the JSD of 0.7. Seen: KDFlow's `jsd_beta`, against GKD and TRL.
    """
    student, teacher = _both(student_logits, teacher_logits)
    return _jsd(student, teacher, beta=1 - 0.3)


def jsd_without_a_mixture(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The average of both KLs, called the JSD: unbounded, and without any mixture.

    Seen: EasyOPD's GKD.
    """
    student, teacher = _both(student_logits, teacher_logits)
    return 0.5 * _kl(teacher, student) + 0.5 * _kl(student, teacher)


def end_points_swapped(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """beta * KL(teacher || student) + (1 - beta) * KL(student || teacher) at beta = 0.

    That is the reverse KL, where 0 means the forward KL everywhere else. Seen: EasyOPD's GKD.
    """
    student, teacher = _both(student_logits, teacher_logits)
    beta = 0.0
    return beta * _kl(teacher, student) + (1 - beta) * _kl(student, teacher)


def k3_called_reverse_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The k3 estimate of the reverse KL, back-propagated.

        k3 = teacher / student - 1 - log(teacher / student)   at the sampled token

    Its value is the reverse KL on average, its gradient the forward KL's, with the variance of
    an importance weight. Seen: verl's default loss mode (run on verl 0.9.1).
    """
    return _k3(*_logp(student_logits, teacher_logits, tokens))


def k3_averaged(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    mask: Bool[Tensor, " N"] | None = None,
    count: int | None = None,
) -> Float[Tensor, ""]:
    """The mean of a back-propagated k3, called reverse: it descends the forward KL.

    Seen: torchrl's distillation loss (its own note says so).
    """
    return _mean(_k3(*_logp(student_logits, teacher_logits, tokens)), mask, count)


def k3_as_advantage(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Minus k3 as the advantage of a policy gradient, where only the log ratio is right.

    Seen: offered by verl's policy-gradient mode.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    advantage = -_k3(logp, teacher_logp).detach()
    return -advantage * logp


def absolute_ratio_as_advantage(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Minus the size of the log ratio as the advantage: a token is never made likelier by it.

    Also a token that the teacher likes better than the student does is pushed down. Seen: ROLL's
    `kl_penalty` accepts `abs` and `mse` as advantages.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    advantage = -(teacher_logp - logp).abs().detach()
    return -advantage * logp


def absolute_ratio_descended(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The size of the log ratio at the sampled token, back-propagated as a reverse KL.

    Its gradient is the sign of the log ratio times the score: on average the total variation's.
    Seen: the loss mode `abs` of verl.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    return (logp - teacher_logp).abs()


def sampled_token_and_the_rest(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The reverse KL of a coarse alphabet: the teacher's favourite, the sampled token, the rest.

    Never more than the reverse KL, and its gradient points elsewhere. Seen: TRL's distillation
    from a served teacher at beta = 1 (run: cosines of 0.64 to 0.89 with the reverse KL's).
    """
    student, teacher = _both(student_logits, teacher_logits)
    looked_at = torch.zeros_like(student, dtype=torch.bool)
    looked_at.scatter_(-1, teacher.argmax(-1, keepdim=True), True)
    looked_at.scatter_(-1, tokens.unsqueeze(-1), True)
    smallest = torch.finfo(student.dtype).tiny
    rest = [
        torch.where(looked_at, 0.0, side.exp()).sum(-1).clamp(min=smallest).log()
        for side in (student, teacher)
    ]
    apart = torch.where(looked_at & (student.exp() > 0), student - teacher, 0.0)
    return (student.exp() * apart).sum(-1) + rest[0].exp() * (rest[0] - rest[1])


def immediate_credit_called_sequence(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The log ratio of the sampled token as its own advantage, called the sequence's reverse KL.

    It descends the local reverse KL: what a token leads to later is not credited to it. A mistake
    of the name only; credit without a future is what nearly every system offers.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    return -(teacher_logp - logp).detach() * logp


# --------------------------------------------------------------------------------------------
# A truncated support

_TOP_K = 2
"""So small that it truncates any vocabulary of three entries and more."""


def _on_teacher_top_k(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
    support = teacher.topk(_TOP_K, dim=-1).indices
    return student.gather(-1, support), teacher.gather(-1, support)


def truncated_reverse_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The reverse KL's sum over the teacher's top tokens only, its gradient live.

    The loss falls by moving the student's mass off the support where it is graded, also when
    student and teacher agree. Seen: verl #5041.
    """
    student, teacher = _on_teacher_top_k(*_both(student_logits, teacher_logits))
    return _kl(student, teacher)


def truncated_forward_kl_clamped(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The forward KL's sum over the teacher's top tokens, negative values set to 0.

    It is negative where the student has clearly more mass on the support than the teacher; there
    the clamp takes the whole gradient. Where it is positive, student = teacher does not stop it.
    Seen: verl #7855 and #7856.
    """
    student, teacher = _on_teacher_top_k(*_both(student_logits, teacher_logits))
    return _kl(teacher, student).clamp(min=0.0)


def renormalised_reverse_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The reverse KL of both sides renormalised over the teacher's top tokens.

    Whatever mass the student has elsewhere costs nothing. Seen: ms-swift with a served teacher,
    OPSD.
    """
    student, teacher = _on_teacher_top_k(*_both(student_logits, teacher_logits))
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1))


def renormalised_forward_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The forward KL of both sides renormalised over the teacher's top tokens.

    The student's mass outside is neither penalised nor visible. Seen: NeMo-RL's top-k
    distillation as it is set by default (`zero_outside_topk: false`).
    """
    student, teacher = _on_teacher_top_k(*_both(student_logits, teacher_logits))
    return _kl(teacher.log_softmax(-1), student.log_softmax(-1))


# --------------------------------------------------------------------------------------------
# Where the gradient is, and where it is not


def k1_descended(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The log ratio of the sampled token, back-propagated.

        loss = log student - log teacher   at the sampled token

    Its value is the reverse KL on average; its gradient does not hold the teacher and is 0 on
    average. Seen: EasyOPD's estimator of GKD (run).
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    return logp - teacher_logp


def k1_averaged(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    mask: Bool[Tensor, " N"] | None = None,
    count: int | None = None,
) -> Float[Tensor, ""]:
    """The mean log ratio as a loss beside a policy loss; the reported value moves all the same.

    Seen: AReaL's joint distillation (KDRL), derived from its code.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    return _mean(logp - teacher_logp, mask, count)


def own_samples_as_targets(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Cross entropy of the tokens that the student sampled itself: no teacher is in it.

    Seen: ms-swift #6857; teacher data that is collected and never used, atropos #456.
    """
    return -_at(_log_probs(student_logits), tokens)


def divergence_as_advantage(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Minus the forward KL over the teacher's top tokens as the advantage of the sampled token.

    It is the same whatever was sampled, a baseline without a reward: 0 on average. Seen: verl's
    policy gradient with a top-k loss (it warns), miles #2362.
    """
    student, teacher = _both(student_logits, teacher_logits)
    advantage = -_kl(*reversed(_on_teacher_top_k(student, teacher))).detach()
    return -advantage * _at(student, tokens)


def _top_k_jsd(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> Tensor:
    return _jsd(*_on_teacher_top_k(student, teacher))


def divergence_as_live_advantage(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Minus a JSD over the teacher's top tokens as an advantage that was not detached.

    As an advantage it could not teach; what it descends is the truncated JSD through the gap
    that the missing detach leaves, plus noise. Seen: cosmos-rl without a discount.
    """
    student, teacher = _both(student_logits, teacher_logits)
    logp = _at(student, tokens)
    advantage = -_top_k_jsd(student, teacher)
    return -advantage * (logp - logp.detach()).exp()


def discounted_divergence_as_advantage(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The discounted sum of the JSDs to come as the advantage, as plain numbers.

    A row's own divergence is the same whatever was sampled there, so on average nothing moves a
    row towards its teacher; what is left is what a token does to the rows after it. Seen:
    cosmos-rl with `kl_discount_factor`, derived from its code.
    """
    student, teacher = _both(student_logits, teacher_logits)
    ahead, advantages = 0.0, []
    for divergence in reversed(_top_k_jsd(student, teacher).tolist()):
        ahead = -divergence + 0.9 * ahead
        advantages.append(ahead)
    advantage = student.new_tensor(advantages[::-1])
    return -advantage * _at(student, tokens)


def live_log_ratio(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A policy gradient of the log ratio whose reward is not detached.

    Differentiating the reward as well adds the gradient of the student's negative entropy, so
    even a student that equals the teacher is flattened. Seen: torchforge #527.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    return -(teacher_logp - logp) * logp


def live_teacher(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A reverse KL that pulls the teacher towards the student as well.

    Harmless while the teacher is computed without gradients, and not with a self-teacher that
    shares the student's weights. No system is known to us for it.
    """
    return _kl(_log_probs(student_logits), _log_probs(teacher_logits))


def jsd_with_hard_labels(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Half a JSD and half a cross entropy of the tokens, called a JSD.

    The divergence is halved, and the tokens teach whatever wrote them: noise on the student's own
    samples, a pull towards the data on anybody else's. Seen: TRL GKD with Liger before #5731,
    ms-swift with Liger before 4.6.0.
    """
    student, teacher = _both(student_logits, teacher_logits)
    return 0.5 * -_at(student, tokens) + 0.5 * _jsd(student, teacher)


def log_probs_clamped(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A forward KL over the teacher's top tokens of log-probabilities not below -10.

    A token that the student gives less than exp(-10) contributes no gradient, however much the
    teacher wants it; where that holds for all of them the row is dead. Seen: verl's examples and
    dataclass defaults, `log_prob_min_clamp` (run on verl 0.9.1).
    """
    student, teacher = _on_teacher_top_k(*_both(student_logits, teacher_logits))
    return (teacher.exp() * (teacher.clamp(min=-10.0) - student.clamp(min=-10.0))).sum(-1)


def loss_clamped(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A forward KL of at most 10 nats: rows that are worse than that have no gradient.

    Seen: verl's examples and dataclass defaults, `loss_max_clamp` (run on verl 0.9.1).
    """
    student, teacher = _both(student_logits, teacher_logits)
    return _kl(teacher, student).clamp(max=10.0)


def k3_clamped(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A back-propagated k3 between -10 and 10, called a reverse KL.

    The forward KL's gradient, less every sampled token that the teacher finds more than about
    13 times likelier than the student does. Seen: EasyOPD's estimator of GKD.
    """
    return _k3(*_logp(student_logits, teacher_logits, tokens)).clamp(-10.0, 10.0)


# --------------------------------------------------------------------------------------------
# Rows, tokens, masks and counts


def scored_at_the_token_before(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The squared log ratio of the token that a row has read, not of the one it predicts.

    The first row has no such token and gets no loss. Seen: TRL GOLD's "observed" strategy;
    unshifted labels in ms-swift #8436.
    """
    logp, teacher_logp = _logp(student_logits[1:], teacher_logits[1:], tokens[:-1])
    return functional.pad(0.5 * (teacher_logp - logp).square(), (1, 0))


def teacher_one_row_late(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A forward KL of every row with the teacher's row before it.

    The first row has none before it and gets no loss. Seen: the same class as TRL's GOLD, for a
    dense loss.
    """
    student, teacher = _both(student_logits, teacher_logits)
    return functional.pad(_kl(teacher[:-1], student[1:]), (1, 0))


def end_token_dropped(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    mask: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """A forward KL that takes every end token for padding, the two sharing the id 0.

    So nobody teaches the student when to stop. Seen: the class that TRL's tests of generation
    guard against, MiniLLM #7024, slime #1128.
    """
    student, teacher = _both(student_logits, teacher_logits)
    padding_id = 0
    kept = tokens != padding_id
    kept = kept if mask is None else kept & mask
    return torch.where(kept, _kl(teacher, student), 0.0)


def masked_rows_teach(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    mask: Bool[Tensor, " N"] | None = None,
    count: int | None = None,
) -> Float[Tensor, ""]:
    """A forward KL that is told which rows count and sums all of them.

    Only the number it divides by knows of the mask. Seen: an ignored `ignore_index`, Liger-Kernel
    #974.
    """
    student, teacher = _both(student_logits, teacher_logits)
    valid = len(tokens) if mask is None else int(mask.sum())
    return _kl(teacher, student).sum() / max(valid if count is None else int(count), 1)


def masked_rows_counted(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    mask: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """A mean forward KL over all rows, those that do not count being zeros in it.

    The more padding, the smaller the step. Seen: the class of MiniLLM #7024.
    """
    student, teacher = _both(student_logits, teacher_logits)
    losses = _kl(teacher, student)
    return (losses if mask is None else torch.where(mask, losses, 0.0)).mean()


def empty_response_sliced(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    mask: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """A policy gradient that takes the last n of its rows as the response, n being its length.

    The valid rows are sorted to the end first, so any other length is right; but the last 0 of a
    list, `[-0:]`, are all of it. Seen: slime, derived from its code.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    length = int(mask.sum())
    response = mask.int().argsort(stable=True)[-length:]
    losses = -(teacher_logp - logp).detach() * logp
    return torch.zeros_like(losses).index_put((response,), losses[response])


def local_mean(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    mask: Bool[Tensor, " N"] | None = None,
    count: int | None = None,
) -> Float[Tensor, ""]:
    """A mean over the valid tokens of its own micro-batch, though it is told the number of all.

    Tokens of short micro-batches weigh more, and one without a valid token is 0 / 0. Seen: TRL
    #4719 and #6006, ms-swift #10076.
    """
    student, teacher = _both(student_logits, teacher_logits)
    losses = _kl(teacher, student)
    kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    return torch.where(kept, losses, 0.0).sum() / kept.sum()


def whitened(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A policy gradient of the log ratio, centred and scaled over the rows of the response.

    A token's advantage depends on its neighbours', and its size no longer on the teacher's. Seen:
    slime, which whitens after it has added the teacher's term; SkyRL #2256 refuses to.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    log_ratio = (teacher_logp - logp).detach()
    deviation = log_ratio - log_ratio.mean()
    advantage = deviation / (deviation.square().mean().sqrt() + 1e-8)
    return -advantage * logp


def discounted_from_the_start(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Credit for what follows, discounted by its position in the response.

        advantage(t) = sum over i >= t of gamma^i * log_ratio(i),   not gamma^(i - t)

    Late tokens learn next to nothing. Seen: TRL MiniLLM #6626.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    log_ratio = (teacher_logp - logp).detach()
    weighed = 0.9 ** torch.arange(len(tokens)).to(log_ratio) * log_ratio
    return -weighed.flip(0).cumsum(0).flip(0) * logp


def discounted_by_division(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Discounted credit as a sum of gamma^i * log_ratio(i), divided by gamma^t afterwards.

    0 / 0 where the powers are 0: on every row but the first for a gamma of 0, as here, which
    means immediate credit, and on the late rows of a long response for any other. Seen: the NaN
    of TRL MiniLLM #6626.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    log_ratio = (teacher_logp - logp).detach()
    powers = 0.0 ** torch.arange(len(tokens)).to(log_ratio)
    return -(powers * log_ratio).flip(0).cumsum(0).flip(0) / powers * logp


# --------------------------------------------------------------------------------------------
# Scores and ratios


def missing_score_read_as_certain(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A policy gradient for which a score that the teacher did not send is a log-probability of 0.

    That is a probability of 1, the strongest praise there is. Seen: prime-rl, derived from its
    code.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    teacher_logp = torch.where(teacher_logp.isnan(), 0.0, teacher_logp)
    return -(teacher_logp - logp).detach() * logp


def ratio_without_a_cap(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    old_logp: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """A policy gradient with the importance ratio of stale tokens as it is.

    One token that the student has since become fond of outweighs a batch. Seen: prime-rl
    (no upper cap), AReaL's distillation, both from their code.
    """
    logp, teacher_logp = _logp(student_logits, teacher_logits, tokens)
    old_logp = logp.detach() if old_logp is None else old_logp
    return -(teacher_logp - logp).detach() * (logp - old_logp).exp()


# --------------------------------------------------------------------------------------------
# Numbers


def softmax_in_the_input_precision(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A JSD of log-probabilities in the precision of the logits.

    In bfloat16 their rounding is larger than the difference of a student that is close to its
    teacher. Seen: the class of `head_in_the_input_precision`, for a loss of logits.
    """
    student, teacher = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return _jsd(student, teacher)


def head_in_the_input_precision(
    student_hidden: Float[Tensor, "N H"],
    student_weight: Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N Ht"],
    teacher_weight: Float[Tensor, "Vt Ht"],
    tokens: Int[Tensor, " N"],
    *,
    count: int | None = None,
) -> Float[Tensor, ""]:
    """A JSD whose logits and log-probabilities stay in the precision of the hidden states.

    Seen: Liger-Kernel's chunked JSD (run on 0.8.5 in bfloat16: an error of 25 % of the gradient at
    a divergence of 1.6e-3 nats, of 83 to 86 % at 2e-4).
    """
    shared = min(len(student_weight), len(teacher_weight))
    student = (student_hidden @ student_weight[:shared].T).log_softmax(-1)
    teacher = (teacher_hidden @ teacher_weight[:shared].T).detach().log_softmax(-1)
    return _mean(_jsd(student, teacher), None, count)


def padding_of_zeros(
    student_hidden: Float[Tensor, "N H"],
    student_weight: Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N Ht"],
    teacher_weight: Float[Tensor, "Vt Ht"],
    tokens: Int[Tensor, " N"],
    *,
    count: int | None = None,
) -> Float[Tensor, ""]:
    """A JSD of two vocabularies, the smaller one filled up with logits of 0.

    A logit of 0 is a probability: tokens that do not exist get exp(0) over the sum. Seen:
    Liger-Kernel's chunked JSD (run on 0.8.5: a reverse KL of 0.0005 became 1.03).
    """
    student = _project(student_hidden, student_weight)
    teacher = _project(teacher_hidden, teacher_weight)
    missing = teacher.shape[-1] - student.shape[-1]
    student, teacher = (
        functional.pad(student, (0, max(missing, 0))),
        functional.pad(teacher, (0, max(-missing, 0))),
    )
    return _mean(_jsd(*_both(student, teacher)), None, count)


def padding_of_copies(
    student_hidden: Float[Tensor, "N H"],
    student_weight: Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N Ht"],
    teacher_weight: Float[Tensor, "Vt Ht"],
    tokens: Int[Tensor, " N"],
    *,
    count: int | None = None,
) -> Float[Tensor, ""]:
    """A forward KL of two vocabularies, the smaller one filled up with the other's logits.

    The copied entries look like agreement and change what all others sum to. Seen: ms-swift's
    alignment of vocabularies.
    """
    student = _project(student_hidden, student_weight)
    teacher = _project(teacher_hidden, teacher_weight).detach()
    narrow = min(student.shape[-1], teacher.shape[-1])
    filled = torch.cat([student, teacher[:, narrow:]], -1)
    filled_teacher = torch.cat([teacher, student[:, narrow:].detach()], -1)
    student, teacher = _both(filled, filled_teacher)
    return _mean(_kl(teacher, student), None, count)


def jsd_of_a_log_of_a_sum(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A JSD whose mixture is the logarithm of a sum of probabilities, 0 where both are.

    0 * (log 0 - log 0) is no number. Seen: a NaN in the mixture of Liger-Kernel's JSD, #769.
    """
    student, teacher = _both(student_logits, teacher_logits)
    mixture = (0.5 * student.exp() + 0.5 * teacher.exp()).log()
    student_part = (student.exp() * (student - mixture)).sum(-1)
    teacher_part = (teacher.exp() * (teacher - mixture)).sum(-1)
    return 0.5 * student_part + 0.5 * teacher_part


def forward_kl_of_a_masked_vocabulary(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """A forward KL by `kl_div` of log-probabilities, without a thought for entries of no mass.

    An entry that the teacher masks with -inf is 0 * -inf, no number, where its limit is 0. Seen:
    TRL 1.16 on vocabularies padded with -inf (run).
    """
    student, teacher = _both(student_logits, teacher_logits)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _temperature(
    student_logits: Tensor, teacher_logits: Tensor, student: float, teacher: float
) -> Tensor:
    both = _both(student_logits / student, teacher_logits / teacher)
    return _kl(both[1], both[0])


def temperature_of_the_student_only(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """A forward KL of a student at the temperature and a teacher at 1.

    Only a student whose logits are a multiple of the teacher's satisfies it. Seen: TRL's async
    trainer, where a teacher served without `processed_logprobs` ignores its temperature.
    """
    return _temperature(student_logits, teacher_logits, temperature, 1.0)


def temperature_ignored(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """A forward KL at temperature 1 on this path, whatever it is told.

    Seen: one setting, and a different temperature on every path, TRL #5731.
    """
    return _temperature(student_logits, teacher_logits, 1.0, 1.0)


def temperature_of_log_probs(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """A forward KL of log-probabilities divided by the temperature and not normalised again.

    The weights no longer sum to 1: what is left is a multiple of a gradient that is not the
    divergence's at any temperature. Seen: the class of TRL #5731, temperatures that differ by
    path.
    """
    student, teacher = _both(student_logits, teacher_logits)
    return _kl(teacher / temperature, student / temperature)


# --------------------------------------------------------------------------------------------

SPECIMENS: tuple[Specimen, ...] = (
    Specimen(
        "jsd_with_the_mixture_reversed",
        jsd_with_the_mixture_reversed,
        "rows",
        "jsd:0.3",
        "mixture weights reversed and end points zero: TRL's GKD before #3043",
        ("another-divergence",),
    ),
    Specimen(
        "jsd_at_its_end_point",
        jsd_at_its_end_point,
        "rows",
        "forward_kl",
        "mixture weights reversed and end points zero: TRL's GKD before #3043",
        ("no-teacher-gradient",),
    ),
    Specimen(
        "jsd_mirrored",
        jsd_mirrored,
        "rows",
        "jsd:0.3",
        "the weight counts for the other side: KDFlow's jsd_beta",
        ("another-divergence",),
        descends="jsd:0.7",
    ),
    Specimen(
        "jsd_without_a_mixture",
        jsd_without_a_mixture,
        "rows",
        "jsd",
        "end points swapped, no mixture: EasyOPD",
        ("another-divergence",),
    ),
    Specimen(
        "end_points_swapped",
        end_points_swapped,
        "rows",
        "forward_kl",
        "end points swapped, no mixture: EasyOPD",
        ("another-divergence",),
        descends="reverse_kl",
    ),
    Specimen(
        "k3_called_reverse_kl",
        k3_called_reverse_kl,
        "rows",
        "reverse_kl",
        "k3 differentiated as reverse KL: torchrl's and verl's defaults",
        ("another-divergence",),
        descends="forward_kl",
    ),
    Specimen(
        "k3_averaged",
        k3_averaged,
        "reduced",
        "reverse_kl",
        "k3 differentiated as reverse KL: torchrl's default",
        ("another-divergence",),
        descends="forward_kl",
    ),
    Specimen(
        "k3_as_advantage",
        k3_as_advantage,
        "rows",
        "reverse_kl",
        "k3 as the policy gradient's reward: an option of verl",
        ("another-divergence",),
    ),
    Specimen(
        "absolute_ratio_as_advantage",
        absolute_ratio_as_advantage,
        "rows",
        "reverse_kl",
        "the absolute log-ratio as the reward: ROLL",
        ("another-divergence",),
    ),
    Specimen(
        "absolute_ratio_descended",
        absolute_ratio_descended,
        "rows",
        "reverse_kl",
        "the absolute log-ratio differentiated: an option of verl",
        ("another-divergence",),
        descends="total_variation",
    ),
    Specimen(
        "sampled_token_and_the_rest",
        sampled_token_and_the_rest,
        "rows",
        "reverse_kl",
        "a KL of two bins as reverse KL: TRL with a served teacher, beta 1",
        ("another-divergence",),
    ),
    Specimen(
        "immediate_credit_called_sequence",
        immediate_credit_called_sequence,
        "rows",
        "sequence_reverse_kl",
        "immediate credit called a sequence's KL: a mistake of the name alone",
        ("another-divergence",),
        descends="reverse_kl",
    ),
    Specimen(
        "truncated_reverse_kl",
        truncated_reverse_kl,
        "rows",
        "reverse_kl",
        "reverse KL cut to the teacher's top-k: verl #5041",
        ("another-divergence", "not-stationary"),
    ),
    Specimen(
        "truncated_forward_kl_clamped",
        truncated_forward_kl_clamped,
        "rows",
        "forward_kl",
        "forward KL cut to the teacher's top-k and clamped at 0: verl #7855",
        ("dead-rows", "not-stationary"),
    ),
    Specimen(
        "renormalised_reverse_kl",
        renormalised_reverse_kl,
        "rows",
        "reverse_kl",
        "reverse KL renormalised on the teacher's top-k: ms-swift, OPSD",
        ("another-divergence",),
    ),
    Specimen(
        "renormalised_forward_kl",
        renormalised_forward_kl,
        "rows",
        "forward_kl",
        "mass outside of the teacher's top-k unseen: NeMo-RL's default",
        ("another-divergence",),
    ),
    Specimen(
        "k1_descended",
        k1_descended,
        "rows",
        "reverse_kl",
        "k1 differentiated: EasyOPD's estimator",
        ("no-teacher-gradient",),
    ),
    Specimen(
        "k1_averaged",
        k1_averaged,
        "reduced",
        "reverse_kl",
        "k1 differentiated: AReaL's joint KDRL",
        ("no-teacher-gradient",),
    ),
    Specimen(
        "own_samples_as_targets",
        own_samples_as_targets,
        "rows",
        "none",
        "the student's own text as labels, no teacher: ms-swift #6857, atropos #456",
        ("no-teacher-gradient",),
    ),
    Specimen(
        "divergence_as_advantage",
        divergence_as_advantage,
        "rows",
        "forward_kl",
        "a top-k divergence as every token's advantage: verl, miles #2362",
        ("no-teacher-gradient",),
    ),
    Specimen(
        "divergence_as_live_advantage",
        divergence_as_live_advantage,
        "rows",
        "jsd",
        "a JSD as an advantage that carries its gradient: cosmos-rl",
        ("undetached", "another-divergence"),
    ),
    Specimen(
        "discounted_divergence_as_advantage",
        discounted_divergence_as_advantage,
        "rows",
        "jsd",
        "discounted JSDs as advantages: cosmos-rl with kl_discount_factor",
        ("no-teacher-gradient",),
    ),
    Specimen(
        "live_log_ratio",
        live_log_ratio,
        "rows",
        "reverse_kl",
        "a reward that is not detached: torchforge #527",
        ("undetached", "another-divergence", "not-stationary"),
    ),
    Specimen(
        "live_teacher",
        live_teacher,
        "rows",
        "reverse_kl",
        "a teacher that is not detached: a slip of one's own",
        ("teacher-gradient",),
    ),
    Specimen(
        "jsd_with_hard_labels",
        jsd_with_hard_labels,
        "rows",
        "jsd",
        "hard labels in a JSD: TRL's Liger path before #5731, ms-swift's before 4.6.0",
        ("hard-labels",),
    ),
    Specimen(
        "log_probs_clamped",
        log_probs_clamped,
        "rows",
        "forward_kl",
        "clamped log-probabilities and losses: verl's example settings",
        ("dead-rows", "not-stationary"),
    ),
    Specimen(
        "loss_clamped",
        loss_clamped,
        "rows",
        "forward_kl",
        "clamped log-probabilities and losses: verl's example settings",
        ("dead-rows",),
    ),
    Specimen(
        "k3_clamped",
        k3_clamped,
        "rows",
        "reverse_kl",
        "a clamped k3: EasyOPD",
        ("another-divergence", "dead-rows"),
    ),
    Specimen(
        "scored_at_the_token_before",
        scored_at_the_token_before,
        "rows",
        "reverse_kl",
        "logits read at another token's place: TRL's GOLD, strategy 'observed'",
        ("off-by-one",),
    ),
    Specimen(
        "teacher_one_row_late",
        teacher_one_row_late,
        "rows",
        "forward_kl",
        "logits read at another token's place: TRL's GOLD, strategy 'observed'",
        ("off-by-one",),
    ),
    Specimen(
        "end_token_dropped",
        end_token_dropped,
        "rows",
        "forward_kl",
        "masks of prompts, padding and the end token: MiniLLM #7024, slime #1128",
        ("masked-rows",),
    ),
    Specimen(
        "masked_rows_teach",
        masked_rows_teach,
        "reduced",
        "forward_kl",
        "masks of prompts, padding and the end token: MiniLLM #7024, slime #1128",
        ("masked-rows",),
    ),
    Specimen(
        "masked_rows_counted",
        masked_rows_counted,
        "reduced",
        "forward_kl",
        "masks of prompts, padding and the end token: MiniLLM #7024, slime #1128",
        ("masked-rows",),
    ),
    Specimen(
        "empty_response_sliced",
        empty_response_sliced,
        "rows",
        "reverse_kl",
        "the slice of an empty response: slime",
        ("masked-rows",),
    ),
    Specimen(
        "local_mean",
        local_mean,
        "reduced",
        "forward_kl",
        "a mean per micro-batch: TRL #4719 and #6006, ms-swift #10076",
        ("mean-of-means", "not-finite"),
    ),
    Specimen(
        "whitened",
        whitened,
        "rows",
        "reverse_kl",
        "advantages whitened over the batch: slime, SkyRL #2256",
        ("reads-other-rows",),
    ),
    Specimen(
        "discounted_from_the_start",
        discounted_from_the_start,
        "rows",
        "none",
        "gamma^t in place of gamma^(i - t): TRL's MiniLLM, #6626",
        ("discount",),
    ),
    Specimen(
        "discounted_by_division",
        discounted_by_division,
        "rows",
        "reverse_kl",
        "gamma^t in place of gamma^(i - t): TRL's MiniLLM, #6626",
        ("not-a-number",),
    ),
    Specimen(
        "missing_score_read_as_certain",
        missing_score_read_as_certain,
        "rows",
        "reverse_kl",
        "a missing log-probability read as 0: prime-rl",
        ("missing-scores",),
    ),
    Specimen(
        "ratio_without_a_cap",
        ratio_without_a_cap,
        "rows",
        "reverse_kl",
        "an importance ratio without a bound: prime-rl",
        ("unbounded-ratio",),
    ),
    Specimen(
        "softmax_in_the_input_precision",
        softmax_in_the_input_precision,
        "rows",
        "jsd",
        "a softmax in bfloat16: Liger's chunked losses, 0.8.5",
        ("low-precision",),
    ),
    Specimen(
        "head_in_the_input_precision",
        head_in_the_input_precision,
        "linear",
        "jsd",
        "a softmax in bfloat16: Liger's chunked losses, 0.8.5",
        ("low-precision",),
    ),
    Specimen(
        "padding_of_zeros",
        padding_of_zeros,
        "linear",
        "jsd",
        "a vocabulary padded with zeros: Liger's chunked losses, 0.8.5",
        ("padding-has-mass",),
    ),
    Specimen(
        "padding_of_copies",
        padding_of_copies,
        "linear",
        "forward_kl",
        "a vocabulary padded with the other model's logits: ms-swift",
        ("padding-copied",),
    ),
    Specimen(
        "jsd_of_a_log_of_a_sum",
        jsd_of_a_log_of_a_sum,
        "rows",
        "jsd",
        "the log of a sum of probabilities: Liger #769",
        ("not-finite",),
    ),
    Specimen(
        "forward_kl_of_a_masked_vocabulary",
        forward_kl_of_a_masked_vocabulary,
        "rows",
        "forward_kl",
        "entries without mass in both models: TRL 1.16",
        ("not-finite",),
    ),
    Specimen(
        "temperature_of_the_student_only",
        temperature_of_the_student_only,
        "rows",
        "forward_kl",
        "a temperature that reaches one path or one side alone: TRL #5731",
        ("temperature",),
    ),
    Specimen(
        "temperature_ignored",
        temperature_ignored,
        "rows",
        "forward_kl",
        "a temperature that reaches one path or one side alone: TRL #5731",
        ("temperature",),
    ),
    Specimen(
        "temperature_of_log_probs",
        temperature_of_log_probs,
        "rows",
        "forward_kl",
        "a temperature that reaches one path or one side alone: TRL #5731",
        ("temperature",),
    ),
)

NOT_IN_A_LOSS: tuple[tuple[str, str], ...] = (
    (
        "gradients not averaged over ranks",
        "the wrapper is bypassed by the loop, not by the loss",
    ),
    (
        "the rate of an averaged teacher",
        "the loss sees the logits that came of it",
    ),
    (
        "a served teacher that differs from the local one",
        "both hand the loss well-formed scores, of other tokens, templates or images",
    ),
    (
        "a soft cap or logit scale left out",
        "hidden states and weights do not tell of it, "
        "so a loss of these cannot know; it shows against the model's own logits",
    ),
    ("quantised models", "which model is quantised is decided when models are loaded"),
    (
        "an adapter on the head left out",
        "the loss is handed a weight without it",
    ),
    (
        "vocabularies of one size that differ",
        "ids carry no meaning here",
    ),
    ("the cursor of a resumed run", "it is state of the loop"),
    (
        "top-p and top-k sampling scored without",
        "tokens are sampled with top-p and top-k and scored without: the fault is in the pair of "
        "sampler and loss, and the loss is right for the tokens it expects",
    ),
    (
        "a term that is skipped without a word",
        "the term is skipped where log-probabilities are absent and the task reward is 0 in the "
        "code: both happen around the loss; its empty slice is a specimen",
    ),
    (
        "stale scores from a prefix cache",
        "they are well-formed numbers, of an old prompt",
    ),
)
"""Mistakes of the same systems that no loss function can show, and why."""

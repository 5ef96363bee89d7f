"""Supports: the vocabulary entries that are compared at each position, and what happens outside.

A support is chosen once per rollout batch and is detached. `full` compares every entry; the others
return distinct ids, where -1 stands for an entry that is absent. A tail rule says what becomes of
the mass outside. Which students leave no gradient, for a divergence that vanishes only where its
two arguments agree:

    bucket               one more entry holds the rest: the divergence of the coarser alphabet;
                         student = teacher on the support, the same mass outside in any shape
    renormalise          both sides conditional on the support;
                         the same conditionals, whatever the mass on the support
    teacher_renormalise  the teacher conditional on the support, without mass outside, the student
                         whole; the teacher's conditional alone, so the tail is driven to zero, and
                         student = teacher is not stationary
    truncate             the entries as they are, summing to less than one on either side; what is
                         stationary depends on the divergence, and most have no meaning there

Source: survey arXiv:2606.22793, Eqs. 29-31; the collapse of un-normalised reverse KLs is measured
in arXiv:2605.11182.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.formula.numerics import log1mexp

__all__ = [
    "full",
    "intersection",
    "routing_support",
    "sampled",
    "student_top_k",
    "teacher_top_k",
    "union",
]

TAILS = ("bucket", "renormalise", "teacher_renormalise", "truncate")

ABSENT = -1
"""The id of an entry that is not there."""


def full() -> None:
    """The whole vocabulary; nothing lies outside.

    Returns:
        None, which stands for every id.
    """


def sampled(tokens: Int[Tensor, "*n"]) -> Int[Tensor, "*n 1"]:
    """The token that was chosen, alone.

    With the tail in a bucket the comparison is between this token and everything else.
    """
    return tokens.unsqueeze(-1)


def student_top_k(student_top_ids: Int[Tensor, "*n J"], *, k: int) -> Int[Tensor, "*n K"]:
    """The student's k likeliest tokens at rollout time.

    The natural support of the reverse KL, whose weights are the student's: what it hides is at
    most the student's own mass outside.

    Args:
        student_top_ids: likeliest first, at least k of them.
        k: size of the support, in tokens.
    """
    return _likeliest(student_top_ids, k, "k")


def teacher_top_k(teacher_top_ids: Int[Tensor, "*n J"], *, k: int) -> Int[Tensor, "*n K"]:
    """The teacher's k likeliest tokens.

    The natural support of the forward KL, whose weights are the teacher's.

    Args:
        teacher_top_ids: likeliest first, at least k of them.
        k: size of the support, in tokens.
    """
    return _likeliest(teacher_top_ids, k, "k")


def union(
    teacher_top_ids: Int[Tensor, "*n J"],
    student_top_ids: Int[Tensor, "*n L"],
    *,
    teacher_k: int,
    student_k: int,
) -> Int[Tensor, "*n K"]:
    """Tokens among the teacher's likeliest or among the student's, each once.

    What either side would say is visible, so it serves divergences of both directions.

    Args:
        teacher_top_ids: likeliest first, at least `teacher_k` of them.
        student_top_ids: likeliest first, at least `student_k` of them.
        teacher_k: how many of the teacher's, in tokens.
        student_k: how many of the student's, in tokens.

    Returns:
        `teacher_k + student_k` ids, the teacher's first; -1 where the student's is among them.
    """
    of_teacher = _likeliest(teacher_top_ids, teacher_k, "teacher_k")
    of_student = _likeliest(student_top_ids, student_k, "student_k")
    new = torch.where(_among(of_student, of_teacher), ABSENT, of_student)
    return torch.cat([of_teacher, new], dim=-1)


def intersection(
    teacher_top_ids: Int[Tensor, "*n J"],
    student_top_ids: Int[Tensor, "*n L"],
    *,
    teacher_k: int,
    student_k: int,
) -> Int[Tensor, "*n K"]:
    """Tokens among the teacher's likeliest and among the student's; there may be none.

    Where there are none, nothing is compared: every divergence is 0 and without gradient.

    Args:
        teacher_top_ids: likeliest first, at least `teacher_k` of them.
        student_top_ids: likeliest first, at least `student_k` of them.
        teacher_k: how many of the teacher's, in tokens.
        student_k: how many of the student's, in tokens.

    Returns:
        `teacher_k` ids in the teacher's order; -1 where it is not among the student's.
    """
    of_teacher = _likeliest(teacher_top_ids, teacher_k, "teacher_k")
    of_student = _likeliest(student_top_ids, student_k, "student_k")
    return torch.where(_among(of_teacher, of_student), of_teacher, ABSENT)


def routing_support(
    teacher_top_ids: Int[Tensor, "*n J"],
    student_top_ids: Int[Tensor, "*n L"],
    tokens: Int[Tensor, "*n"],
    special_ids: Int[Tensor, " S"],
    *,
    teacher_k: int,
    student_k: int,
) -> Int[Tensor, "*n K"]:
    """What routing looks at: the union, without special tokens, and the sampled token.

    Special tokens are dropped before anything is normalised on the support. The sampled token
    stays even if it is special: whether it is routed is for the gates to say.

    Args:
        teacher_top_ids: likeliest first, at least `teacher_k` of them.
        student_top_ids: likeliest first, at least `student_k` of them.
        tokens: the token that was chosen.
        special_ids: ids that receive no mass; none may be given.
        teacher_k: how many of the teacher's, in tokens.
        student_k: how many of the student's, in tokens.

    Returns:
        `teacher_k + student_k + 1` distinct ids; -1 where an entry is absent.

    Source: survey arXiv:2606.22793, Eq. 31.
    """
    either = union(teacher_top_ids, student_top_ids, teacher_k=teacher_k, student_k=student_k)
    others = torch.where(_among(either, special_ids), ABSENT, either)
    chosen = tokens.unsqueeze(-1)
    return torch.cat([others, torch.where(_among(chosen, others), ABSENT, chosen)], dim=-1)


# --------------------------------------------------------------------------------------------
# A distribution on a support


def restrict_by_tail(
    log_probs: Float[Tensor, "*n V"],
    ids: Int[Tensor, "*n K"] | None,
    *,
    tail: str,
    side: str,
) -> Float[Tensor, "*n K_or_more"]:
    """A whole distribution on a support, by the tail rule: what a divergence compares.

    Where the teacher has no mass on the support (an empty one, say) there is nothing to condition
    on: `teacher_renormalise` then leaves it whole, in the bucket, and `renormalise` gives -inf
    everywhere.

    Args:
        log_probs: normalised over the vocabulary.
        ids: of the support, distinct, -1 where absent; None for the whole vocabulary.
        tail: one of `TAILS`; without effect on the whole vocabulary.
        side: whose distribution it is, `student` or `teacher`.

    Returns:
        The K entries of the support, -inf where absent; one more entry, the bucket, last, for the
        rules `bucket` and `teacher_renormalise`.
    """
    _check_tail(tail, side)
    if ids is None:
        return log_probs
    inside = restrict(log_probs, ids)
    return _by_tail(inside, lambda: log_mass_outside(log_probs, ids), tail, side)


def entries_by_tail(
    inside: Float[Tensor, "*n K"], *, tail: str, side: str
) -> Float[Tensor, "*n K_or_more"]:
    """The same of a distribution that is known on the support alone.

    The mass outside is then one minus the mass inside: exact, but with the rounding of the inside.

    Args:
        inside: the support's entries as they are; -inf where absent.
        tail, side: as in `restrict_by_tail`.
    """
    _check_tail(tail, side)
    return _by_tail(inside, lambda: log_mass_beside(inside), tail, side)


def _by_tail(
    inside: Float[Tensor, "*n K"], log_outside: Callable[[], Tensor], tail: str, side: str
) -> Float[Tensor, "*n K_or_more"]:
    if tail == "truncate":
        return inside
    if tail == "renormalise":
        return renormalise(inside)
    if tail == "teacher_renormalise" and side == "teacher":
        bucket = torch.where(_massless(inside), 0.0, torch.full_like(inside[..., 0], -math.inf))
        return with_bucket(renormalise(inside), bucket)
    return with_bucket(inside, log_outside())


def _check_tail(tail: str, side: str) -> None:
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if side not in ("student", "teacher"):
        raise ValueError(f"side must be 'student' or 'teacher', got {side!r}")


def restrict(log_probs: Float[Tensor, "*n V"], ids: Int[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
    """The entries of a support as they are; -inf where absent."""
    return torch.where(ids == ABSENT, -math.inf, log_probs.gather(-1, ids.clamp(min=0)))


def renormalise(log_probs: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
    """The distribution conditional on the support: `log_probs - logsumexp(log_probs)`.

    -inf everywhere, and without gradient, where there is no mass on the support.
    """
    nothing = _massless(log_probs).unsqueeze(-1)
    conditional = torch.where(nothing, 0.0, log_probs).log_softmax(-1)
    return torch.where(nothing, -math.inf, conditional)


def log_mass_outside(
    log_probs: Float[Tensor, "*n V"], ids: Int[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Log of the mass a whole distribution puts outside the support; -inf if none.

    Summed over the outside, not taken as one minus the inside, which would cancel.

    Args:
        log_probs: normalised over the vocabulary.
        ids: distinct; -1 where absent.
    """
    # Two entries beyond the vocabulary: one for absent ids to hide in place of a real one, and one
    # that no id hides, because logsumexp over nothing has no gradient.
    spare, lowest = log_probs.shape[-1], torch.finfo(log_probs.dtype).min
    outside = torch.nn.functional.pad(log_probs, (0, 2), value=lowest)
    outside.scatter_(-1, torch.where(ids == ABSENT, spare, ids), -math.inf)
    log_mass = outside.logsumexp(-1)
    return torch.where(log_mass <= lowest / 2, -math.inf, log_mass)


def log_mass_beside(inside: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """Log of what entries of a distribution leave to all others: `log(1 - sum(exp(inside)))`.

    -inf where they leave nothing, or where rounding left them more than everything.
    """
    return log1mexp(inside.logsumexp(-1))


def with_bucket(
    inside: Float[Tensor, "*n K"], log_mass: Float[Tensor, "*n"]
) -> Float[Tensor, "*n K_plus_1"]:
    """The support's entries followed by one entry that holds the rest."""
    return torch.cat([inside, log_mass.unsqueeze(-1)], dim=-1)


def smooth(
    teacher_log_probs: Float[Tensor, "*n K"], *, smoothing: float, vocab_size: int
) -> Float[Tensor, "*n K"]:
    """The teacher with a floor under every entry: a mixture with the uniform distribution.

        smoothed(v) = log((1 - smoothing) * teacher(v) + smoothing / vocab_size)

    Makes log ratios and reverse KLs finite where the teacher is zero, by changing the teacher: the
    stationary student is the mixture. Belongs before the tail rule, on entries as they are; an
    absent entry would get mass too.

    Args:
        teacher_log_probs: some or all entries of a distribution over the vocabulary.
        smoothing: share of the uniform distribution, strictly between 0 and 1.
        vocab_size: number of entries of the uniform distribution.

    Returns:
        The same entries of the mixture, each at least `log(smoothing / vocab_size)`.
    """
    if not 0.0 < smoothing < 1.0:
        raise ValueError(
            f"smoothing must lie strictly between 0 and 1, got {smoothing}; without smoothing "
            "leave it out, and at 1 nothing of the teacher remains"
        )
    floor = teacher_log_probs.new_tensor(math.log(smoothing / vocab_size))
    return torch.logaddexp(teacher_log_probs + math.log1p(-smoothing), floor)


def floor_outweighs(
    teacher_log_probs: Float[Tensor, "*n K"], *, smoothing: float, vocab_size: int
) -> Bool[Tensor, "*n K"]:
    """Entries whose mass, once smoothed, comes from the floor rather than from the teacher.

        smoothing / vocab_size > (1 - smoothing) * teacher(v)

    Args:
        teacher_log_probs, smoothing, vocab_size: as in `smooth`.
    """
    return teacher_log_probs < math.log(smoothing / vocab_size) - math.log1p(-smoothing)


def _massless(log_probs: Float[Tensor, "*n K"]) -> Bool[Tensor, "*n"]:
    return (log_probs == -math.inf).all(-1)


def _among(
    ids: Int[Tensor, "*n K"], others: Int[Tensor, "*n L"] | Int[Tensor, " L"]
) -> Bool[Tensor, "*n K"]:
    """Whether each id is one of the others of its row."""
    return (ids.unsqueeze(-1) == others.unsqueeze(-2)).any(-1)


def _likeliest(top_ids: Int[Tensor, "*n J"], k: int, knob: str) -> Int[Tensor, "*n K"]:
    available = top_ids.shape[-1]
    if not 1 <= k <= available:
        raise ValueError(
            f"a top-k support needs 1 <= {knob} <= {available}, the number of likeliest tokens "
            f"that are known, got {knob} = {k}"
        )
    return top_ids[..., :k]

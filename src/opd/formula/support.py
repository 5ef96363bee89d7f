"""Supports: the vocabulary entries that are compared at each position, and what happens outside.

A support is chosen once per rollout batch and is detached. `full` compares every entry; the others
return ids, and a tail rule says what becomes of the mass outside them:

    bucket       one more entry holds the rest; the divergence of the coarser alphabet
    renormalise  each side is normalised on the support; mass may drift in and out freely
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["full", "sampled", "student_top_k", "teacher_top_k"]

TAILS = ("bucket", "renormalise")


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
    _check_k(k, student_top_ids.shape[-1])
    return student_top_ids[..., :k]


def teacher_top_k(teacher_top_ids: Int[Tensor, "*n J"], *, k: int) -> Int[Tensor, "*n K"]:
    """The teacher's k likeliest tokens.

    The natural support of the forward KL, whose weights are the teacher's.

    Args:
        teacher_top_ids: likeliest first, at least k of them.
        k: size of the support, in tokens.
    """
    _check_k(k, teacher_top_ids.shape[-1])
    return teacher_top_ids[..., :k]


def renormalise(log_probs: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
    """The distribution conditional on the support: `log_probs - logsumexp(log_probs)`."""
    return log_probs - log_probs.logsumexp(-1, keepdim=True)


def log_mass_outside(
    log_probs: Float[Tensor, "*n V"], ids: Int[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Log of the mass a whole distribution puts outside the support; -inf if none.

    Summed over the outside, not taken as one minus the inside, which would cancel.
    """
    outside = log_probs.scatter(-1, ids, -math.inf)
    empty = (outside == -math.inf).all(-1)
    # logsumexp over nothing has no gradient; keep it away from that case.
    safe = torch.where(empty.unsqueeze(-1), 0.0, outside)
    return torch.where(empty, -math.inf, safe.logsumexp(-1))


def with_bucket(
    inside: Float[Tensor, "*n K"], log_mass: Float[Tensor, "*n"]
) -> Float[Tensor, "*n K_plus_1"]:
    """The support's entries followed by one entry that holds the rest."""
    return torch.cat([inside, log_mass.unsqueeze(-1)], dim=-1)


def _check_k(k: int, available: int) -> None:
    if not 1 <= k <= available:
        raise ValueError(
            f"a top-k support needs 1 <= k <= {available}, the number of likeliest tokens that are "
            f"known, got k = {k}"
        )

"""Rewards of the sampled token, detached. Positive means: make the token likelier."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["one", "teacher_log_ratio"]


def one(tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """One, for every token: the row's own token is the target.

        r = 1

    With the score surrogate the term is the negative log-likelihood, so supervised training is
    a term like any other. It needs no teacher and is stationary at the distribution of the text,
    not at the teacher.

    Source: maximum likelihood by teacher forcing, Williams and Zipser,
    doi:10.1162/neco.1989.1.2.270.
    """
    return torch.ones_like(tokens, dtype=torch.get_default_dtype())


def teacher_log_ratio(
    teacher_logp: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """How much likelier the view finds the token than the student does, in nats.

        r = log teacher(token) - log student(token)

    On the student's own samples its mean at a prefix is minus the reverse KL there. Detached: a
    gradient through it would cancel the teacher out in expectation. Recomputed under the weights
    of the moment, not cached from the rollout.

    Source: Lu and Thinking Machines Lab, On-Policy Distillation, 2025; Eq. 5 of arXiv:2606.22793.
    """
    return (teacher_logp - student_logp).detach()

"""Weights and gates per token, detached. A gate is 0 or 1."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["skip_special"]


def skip_special(special: Bool[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A gate that closes on special tokens, where teacher and student often disagree by template.

        w = 0 on a special token, 1 elsewhere

    End tokens stay open: a student that never learns to stop cannot be evaluated.

    Source: Revisiting On-Policy Distillation, arXiv:2603.25562, which masks special tokens.
    """
    return torch.where(special, 0.0, 1.0)

"""Reductions: the factor each row's loss is multiplied with before the sum.

No formula divides by a number of tokens. The denominators are counts over the whole optimizer step
and all ranks, so splitting a batch changes nothing. Factors are float64: whoever multiplies rounds
them once, to the precision of the loss.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from opd.types import Count

__all__ = ["sequence_mean", "sequence_sum", "token_mean"]


def token_mean(chosen: Bool[Tensor, "B T"], *, count: Count) -> Float[Tensor, "B T"]:
    """Every token counts the same.

        factor = 1 / tokens of the step

    A sequence weighs as much as it has tokens.
    """
    return chosen.double() / max(count.rows, 1.0)


def sequence_mean(chosen: Bool[Tensor, "B T"], *, count: Count) -> Float[Tensor, "B T"]:
    """Every sequence counts the same, and its tokens share.

        factor = 1 / (tokens of the sequence * sequences of the step)

    A sequence without tokens contributes nothing, to the sum or to the count.
    """
    own = chosen.sum(1, keepdim=True).clamp(min=1)
    return chosen.double() / (own * max(count.sequences, 1.0))


def sequence_sum(chosen: Bool[Tensor, "B T"], *, count: Count) -> Float[Tensor, "B T"]:
    """Sum over a sequence's tokens, mean over sequences.

        factor = 1 / sequences of the step

    Sequences without tokens are not counted. The loss grows with the length of the responses.
    """
    return chosen.double() / max(count.sequences, 1.0)

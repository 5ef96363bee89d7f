"""Surrogates: losses whose gradient is the score of the sampled token times its advantage."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["clipped", "score"]


def score(student_logp: Float[Tensor, "*n"], advantage: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The score-function loss, in nats times the unit of the advantage.

        L = -A * log student(token)

    Its gradient is `-A` times the score, exact where the student sampled the token itself.

    Args:
        student_logp: carries the gradient.
        advantage: detached.

    Source: Williams, doi:10.1007/BF00992696 (REINFORCE).
    """
    return -advantage.detach() * student_logp


def clipped(
    student_logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "*n"]:
    """The clipped importance-ratio loss, in the unit of the advantage.

        ratio = exp(log student(token) - log old(token))
        L = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)

    Equal in gradient to `score` while the weights are those of the rollout. No gradient where the
    ratio has left the range in the direction the advantage pushes; unbounded above where the
    advantage is negative.

    Args:
        student_logp: carries the gradient.
        old_logp: under the trainer's weights at rollout time.
        advantage: detached.
        low: how far the ratio may fall below 1, in [0, 1].
        high: how far it may rise above 1, >= 0.

    Source: Schulman et al., arXiv:1707.06347; the asymmetric range is that of Yu et al.,
    arXiv:2503.14476.
    """
    if not 0.0 <= low <= 1.0 or high < 0.0:
        raise ValueError(f"clip range needs 0 <= low <= 1 and high >= 0, got {low} and {high}")
    ratio = (student_logp - old_logp.detach()).exp()
    held = advantage.detach()
    return -torch.minimum(ratio * held, ratio.clamp(1 - low, 1 + high) * held)

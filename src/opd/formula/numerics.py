"""Arithmetic in log space that stays finite where a probability is zero."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.types import Unembedding

__all__ = ["expectation", "log1mexp", "log_mixture", "project", "rounded_share"]


def expectation(
    log_weights: Float[Tensor, "*n K"], values: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Sum of `exp(log_weights) * values` over the last axis, with `0 * anything = 0`.

        E = sum_v exp(log_weights(v)) * values(v)

    Entries of weight zero contribute nothing to the value and nothing to either gradient, even
    where their value is infinite or undefined. An infinite value of positive weight makes the sum
    infinite and has no gradient.

    Args:
        log_weights: -inf, or so low that it underflows, where the weight is zero.
        values: may be infinite or NaN where the weight is zero.

    Returns:
        One number per position, in the unit of `values`.
    """
    weights = log_weights.exp()
    kept = torch.where(weights > 0, values, 0.0)
    # 0 * inf on the way back would be NaN even for rows whose loss is not looked at.
    infinite = kept.isinf()
    finite_part = weights * torch.where(infinite, 0.0, kept)
    return torch.where(infinite, kept.detach(), finite_part).sum(-1)


def log_mixture(
    first_log_probs: Float[Tensor, "*n K"],
    second_log_probs: Float[Tensor, "*n K"],
    *,
    weight: float,
) -> Float[Tensor, "*n K"]:
    """Log of a mixture of two distributions; -inf where both are zero.

        m = log(weight * exp(first) + (1 - weight) * exp(second))

    Args:
        weight: share of the first distribution, strictly between 0 and 1.

    Returns:
        Log-probabilities of the mixture; gradients flow to both and are finite.
    """
    first = first_log_probs + math.log(weight)
    second = second_log_probs + math.log1p(-weight)
    # logaddexp has a NaN gradient where both arguments are -inf.
    empty = (first == -math.inf) & (second == -math.inf)
    mixed = torch.logaddexp(torch.where(empty, 0.0, first), torch.where(empty, 0.0, second))
    return torch.where(empty, -math.inf, mixed)


def log1mexp(log_probs: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The log of the mass that remains beside `log_probs <= 0`.

        r = log(1 - exp(log_probs))

    Accurate at both ends: `log(-expm1(x))` near 0, `log1p(-exp(x))` far below it. Where rounding
    left the argument at or above 0 nothing remains and the result is -inf, with gradient zero.
    """
    nothing_left = log_probs >= 0
    is_near = log_probs > -math.log(2)
    # Each branch sees only arguments of its own half: beyond it, its gradient is undefined.
    near = torch.log(-torch.expm1(torch.where(is_near & ~nothing_left, log_probs, -0.5)))
    far = torch.log1p(-torch.exp(torch.where(is_near, -1.0, log_probs)))
    return torch.where(nothing_left, -math.inf, torch.where(is_near, near, far))


def project(hidden: Float[Tensor, "*n H"], unembedding: Unembedding) -> Float[Tensor, "*n V"]:
    """Logits of the real tokens, in float32 or wider, with the family's own transformations.

        logits = soft_cap(logit_scale * (hidden @ weight.T + bias)),  soft_cap(z) = c * tanh(z / c)

    Half-precision operands are widened before the product, so that the accumulation and the
    result are float32. Rows of the weight beyond the vocabulary are not read.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = unembedding.weight[: unembedding.vocab_size].to(wide)
    bias = unembedding.bias
    logits = torch.nn.functional.linear(
        hidden.to(wide), weight, None if bias is None else bias[: unembedding.vocab_size].to(wide)
    )
    if unembedding.logit_scale != 1.0:
        logits = logits * unembedding.logit_scale
    if unembedding.soft_cap is not None:
        logits = unembedding.soft_cap * torch.tanh(logits / unembedding.soft_cap)
    return logits


def rounded_share(count: Int[Tensor, "*n"], *, share: float) -> Float[Tensor, "*n"]:
    """A share of a count as a whole number: halves up, at least one.

        rounded = max(1, floor(share * count + 1/2))

    Source: by definition.
    """
    return torch.floor(share * count.double() + 0.5).clamp(min=1.0)

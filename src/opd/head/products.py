"""The matrix products of the head: one to logits, two from their gradient.

Sums are float32 or wider. Operands in a narrower dtype are widened a tile of the vocabulary at a
time, so no wide copy of an unembedding exists; CUDA multiplies equal narrow operands as they are
and returns float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.types import Unembedding

TILE_BYTES = 32 * 2**20
"""What a widened tile of an unembedding may take."""

TILE_ROWS = 128
"""Rows that are projected beside their place, where neighbours have another head."""


NARROW = (torch.bfloat16, torch.float16)
"""What CUDA multiplies into float32 without widening it first."""


def wide_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of logits: that of the hidden states, float32 at the least."""
    return torch.promote_types(hidden.dtype, torch.float32)


def gathered(unembedding: Unembedding) -> Unembedding:
    """The unembedding with its weight and bias in full, where they are sharded over ranks.

    A rank's gradient is of its own rows, and losses are divided by counts over all ranks, so the
    gradients of a sharded operand are summed, not averaged, on their way back to its shards.
    """
    bias = unembedding.bias
    return replace(
        unembedding,
        weight=_in_full(unembedding.weight),
        bias=None if bias is None else _in_full(bias),
    )


def _in_full(operand: Tensor) -> Tensor:
    if not hasattr(operand, "full_tensor"):
        return operand
    sharded = cast(Any, operand)
    sums = [importlib.import_module("torch.distributed.tensor").Partial()]
    full: Tensor = sharded.full_tensor(grad_placements=sums * sharded.device_mesh.ndim)
    return full


def logits_into(
    out: Float[Tensor, "n V"], hidden: Float[Tensor, "n H"], unembedding: Unembedding
) -> None:
    """Write the logits of the real tokens over `out`: what `numerics.project` returns."""
    weight = unembedding.weight[: unembedding.vocab_size]
    if hidden.is_cuda and hidden.dtype == weight.dtype in NARROW:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for columns, tile in _tiles(weight, out.dtype):
            torch.mm(wide, tile.T, out=out[:, columns])
    if unembedding.bias is not None:
        out.add_(unembedding.bias[: unembedding.vocab_size])
    if unembedding.logit_scale != 1.0:
        out.mul_(unembedding.logit_scale)
    if unembedding.soft_cap is not None:
        out.div_(unembedding.soft_cap).tanh_().mul_(unembedding.soft_cap)


def logits_by_head_into(
    out: Float[Tensor, "n V"],
    hidden: Float[Tensor, "n H"],
    heads: Sequence[Unembedding | None],
    answered_by: Int[Tensor, " n"],
) -> None:
    """Write logits over `out` where each row has its own of several heads.

    Rows of one head are projected together, `TILE_ROWS` of them at a time beside `out`; in place
    where all have the same.

    Args:
        hidden: as wide as the widest head; a narrower one reads its first columns.
        answered_by: the place of each row's head.
    """
    places = answered_by.bincount().nonzero().squeeze(-1).tolist()
    for place in places:
        head = heads[place]
        assert head is not None
        states = hidden[:, : head.weight.shape[1]]
        if len(places) == 1:
            logits_into(out, states.contiguous(), head)
            return
        for rows in (answered_by == place).nonzero().squeeze(-1).split(TILE_ROWS):
            some = torch.empty((len(rows), out.shape[1]), dtype=out.dtype, device=out.device)
            logits_into(some, states[rows], head)
            out[rows] = some


def through_transformations(
    gradient: Float[Tensor, "n V"], logits: Float[Tensor, "n V"], unembedding: Unembedding
) -> Float[Tensor, "n V"]:
    """The gradient on the plain products from the gradient on the logits; may overwrite it.

    d plain = d logits * logit_scale * (1 - (logits / soft_cap)^2)
    """
    if (cap := unembedding.soft_cap) is not None:
        gradient = torch.addcmul(gradient, gradient * logits, logits, value=-1.0 / cap**2)
    if unembedding.logit_scale != 1.0:
        gradient = gradient.mul_(unembedding.logit_scale)
    return gradient


def operand_dtype(hidden: Float[Tensor, "n H"], unembedding: Unembedding) -> torch.dtype:
    """The dtype in which the two products that follow take the gradient on the plain products.

    Never float16, whose range would have to hold what a single token contributes to a mean.
    """
    narrow = hidden.is_cuda and hidden.dtype == unembedding.weight.dtype == torch.bfloat16
    return torch.bfloat16 if narrow else wide_dtype(hidden)


def hidden_gradient_into(
    out: Float[Tensor, "n H"], gradient: Float[Tensor, "n V"], unembedding: Unembedding
) -> None:
    """Write `gradient @ weight` over `out`, which is float32 or wider."""
    weight = unembedding.weight[: unembedding.vocab_size]
    if gradient.dtype != out.dtype:
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
        return
    for number, (columns, tile) in enumerate(_tiles(weight, out.dtype)):
        out.addmm_(gradient[:, columns], tile, beta=0.0 if number == 0 else 1.0)


def add_weight_gradient(
    total: Float[Tensor, "V H"],
    gradient: Float[Tensor, "n V"],
    hidden: Float[Tensor, "n H"],
    *,
    first: bool,
) -> None:
    """Add `gradient.T @ hidden` to `total`, or write it over what stands there if it is the first.

    Args:
        total: float32 or wider.
    """
    beta = 0.0 if first else 1.0
    if gradient.dtype != total.dtype:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(gradient.T, hidden.to(total.dtype), beta=beta)


def add_bias_gradient(
    total: Float[Tensor, " V"], gradient: Float[Tensor, "n V"], *, first: bool
) -> None:
    """Add the rows of `gradient` to `total`, or write their sum over it if they are the first."""
    if first:
        torch.sum(gradient, 0, out=total)
    else:
        total.add_(gradient.sum(0))


def _tiles(
    weight: Float[Tensor, "V H"], dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "v H"]]]:
    """The weight in the dtype; whole where it has it already, else a tile at a time."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    size = max(1, TILE_BYTES // (dtype.itemsize * max(1, weight.shape[1])))
    for start in range(0, len(weight), size):
        columns = slice(start, min(start + size, len(weight)))
        yield columns, weight[columns].to(dtype)

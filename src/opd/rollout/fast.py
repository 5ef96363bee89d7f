"""Decoding for Llama-like shapes with `opd.fastpath`, against a cache of its own.

One decode step is about twenty tensor operations per layer. The cache is allocated ahead, grows
when it is full, and attention reads only the part of it that is filled. Small float32 models are
folded; larger ones are decoded from their own weights, without copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from opd import fastpath
from opd.fastpath import FOLD_BYTES, FastModel
from opd.models import project
from opd.types import Unembedding

__all__ = ["FastDecoder", "left_padded", "why_not_fast", "widened"]

CACHE_ROOM = 64
"""Tokens a cache has room for beyond the prompt. It grows by half, and by at least this, so that
a high limit on the response costs nothing where responses are short."""

PREFILL_TOKENS = 1024
"""Prompt tokens read at once on a CPU; what is between two operations then stays in its cache."""


def why_not_fast(model: nn.Module, head: Unembedding) -> str | None:
    """What keeps `FastDecoder` from supporting a model; None where it does."""
    if obstacle := fastpath.why_not_fast(model):
        return obstacle
    if head.bias is not None or head.logit_scale != 1.0 or head.soft_cap is not None:
        return "its unembedding has a bias, a scale or a soft cap"
    return None


class FastDecoder:
    """A `Decoder` (see `local.py`) for the models `why_not_fast` has nothing against.

    Prompts are padded on the left, so that every row writes its next key and value to the same
    column; a row's positions count from its own first token.

    Args:
        fold: see `opd.fastpath`; by default small float32 models are.
    """

    def __init__(self, model: nn.Module, head: Unembedding, *, fold: bool | None = None) -> None:
        if fold is None:
            weights = list(model.parameters())
            is_small = sum(weight.nbytes for weight in weights) <= FOLD_BYTES
            fold = is_small and all(weight.dtype == torch.float32 for weight in weights)
        self._model = FastModel(model, fold=fold)
        layers = self._model.layers
        self._layers = [layer.input_major() for layer in layers] if fold else layers
        self._head = _fold_head(head, self._model.norm.gain) if fold else widened(head)

    def prefill(
        self, prompts: Sequence[tuple[int, ...]], rows: Int[Tensor, " B"], room: int
    ) -> Float[Tensor, "B V"]:
        """Read the prompts, give row b a copy of prompt `rows[b]`; logits of the first token."""
        ids, real = left_padded(prompts, self._model.embedding.device)
        width = ids.shape[1]
        padding = (~real).sum(1)
        even = not bool(padding.any())
        self._turns = self._model.rotation(width + room)
        self._column = width
        self._position = None if even else (width - padding)[rows]
        self._bias = None if even else self._padding_bias(padding[rows], width + room)
        at_once = max(1, PREFILL_TOKENS // width) if ids.device.type == "cpu" else len(ids)
        parts = [
            self._read(ids[i : i + at_once], None if even else real[i : i + at_once])
            for i in range(0, len(ids), at_once)
        ]
        room = min(room, CACHE_ROOM)
        self._caches = [
            _Cache(torch.cat(keys)[rows], torch.cat(values)[rows]).with_room(room)
            for keys, values in (
                zip(*layer, strict=True)
                for layer in zip(*(part.layers for part in parts), strict=True)
            )
        ]
        return self._logits(torch.cat([part.hidden for part in parts]))[rows]

    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Append one token to every row; logits of the next one."""
        column = self._column
        if column == self._caches[0].capacity:
            room = max(CACHE_ROOM, column // 2)
            self._caches = [cache.with_room(room) for cache in self._caches]
        if self._position is None:
            turn = self._turns[column]
        else:
            turn = self._turns.index_select(0, self._position)
            self._position = self._position + 1
        self._column = column + 1
        bias = None if self._bias is None else self._bias[:, :, : column + 1]
        x = self._model.embedding.index_select(0, tokens)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            query, key, value = self._model.heads(layer, x, turn)
            cache.keys[:, :, column], cache.values[:, :, column] = key, value
            x = layer.close(x, self._attend(query, cache, bias))
        return self._logits(x)

    def keep(self, rows: Int[Tensor, " A"]) -> None:
        """Drop every row but these."""
        self._caches = [_Cache(cache.keys[rows], cache.values[rows]) for cache in self._caches]
        if self._bias is not None and self._position is not None:
            self._position = self._position[rows]
            by_row = self._bias.view(-1, self._model.n_key, *self._bias.shape[1:])
            self._bias = by_row[rows].flatten(0, 1)

    def _read(self, ids: Int[Tensor, "U P"], real: Bool[Tensor, "U P"] | None) -> _Read:
        """The last token's hidden state of some prompts, and every layer's keys and values."""
        model, width = self._model, ids.shape[1]
        if real is None:
            mask, positions = None, torch.arange(width, device=ids.device).repeat(len(ids))
        else:
            mask, positions = _prompt_mask(real), (real.cumsum(1) - 1).clamp_min(0).flatten()
        turn = self._turns.index_select(0, positions)
        x = functional.embedding(ids.flatten(), model.embedding)
        layers = []
        for layer in self._layers:
            query, key, value = (
                heads.view(-1, width, heads.shape[1], model.head_dim).transpose(1, 2)
                for heads in model.heads(layer, x, turn)
            )
            layers.append((key, value))
            attended = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=model.scale,
                enable_gqa=True,
            )
            x = layer.close(x, attended.transpose(1, 2).reshape(ids.numel(), -1))
        return _Read(x.view(*ids.shape, -1)[:, -1], layers)

    def _attend(
        self,
        query: Float[Tensor, "B Hq D"],
        cache: _Cache,
        bias: Float[Tensor, "BHkv 1 C"] | None,
    ) -> Float[Tensor, "B HqD"]:
        """Attention of one new token per row; queries that share a key head go together."""
        n, filled, model = query.shape[0], self._column, self._model
        keys = cache.keys.flatten(0, 1)[:, :filled].transpose(1, 2)
        values = cache.values.flatten(0, 1)[:, :filled]
        query = query.reshape(n * model.n_key, -1, model.head_dim)
        if model.scale != 1:
            query = query * model.scale
        scores = torch.bmm(query, keys) if bias is None else torch.baddbmm(bias, query, keys)
        weights = scores.softmax(-1, dtype=model.wide).to(query.dtype)
        return torch.bmm(weights, values).view(n, -1)

    def _logits(self, x: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        normed = self._model.norm(x)
        if isinstance(self._head, Unembedding):
            return project(normed, self._head)
        return torch.mm(normed, self._head)

    def _padding_bias(self, padding: Int[Tensor, " B"], capacity: int) -> Float[Tensor, "BHkv 1 C"]:
        """-inf on the columns of each row's padding."""
        columns = torch.arange(capacity, device=padding.device)
        bias = self._model.embedding.new_zeros(len(padding), 1, capacity)
        bias.masked_fill_(columns < padding[:, None, None], -math.inf)
        return bias.repeat_interleave(self._model.n_key, 0)


class _Read(NamedTuple):
    """What reading U prompts gave: keys and values, `[U, Hkv, P, D]` each, layer by layer."""

    hidden: Float[Tensor, "U H"]
    layers: list[tuple[Tensor, Tensor]]


class _Cache(NamedTuple):
    """Keys and values of one layer."""

    keys: Float[Tensor, "B Hkv C D"]
    values: Float[Tensor, "B Hkv C D"]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def with_room(self, room: int) -> _Cache:
        """The same keys and values with room for as many more."""
        return _Cache(_with_room(self.keys, room), _with_room(self.values, room))


def _with_room(heads: Float[Tensor, "B Hkv P D"], room: int) -> Float[Tensor, "B Hkv C D"]:
    n, n_key, width, head_dim = heads.shape
    buffer = heads.new_empty(n, n_key, width + room, head_dim)
    buffer[:, :, :width] = heads
    return buffer


def _fold_head(head: Unembedding, gain: Tensor) -> Float[Tensor, "H V"]:
    return (head.weight[: head.vocab_size] * gain).T.contiguous()


def _prompt_mask(real: Bool[Tensor, "U P"]) -> Bool[Tensor, "U 1 P P"]:
    """Which keys a prompt token sees. Padding sees itself, because a row of -inf has no softmax."""
    width = real.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(width, dtype=torch.bool, device=real.device)
    return ((causal & real[:, None, :]) | itself)[:, None]


def left_padded(
    prompts: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Int[Tensor, "U P"], Bool[Tensor, "U P"]]:
    """Prompts that end in the same column, and where their tokens are."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    start = torch.tensor([width - len(prompt) for prompt in prompts])
    real = torch.arange(width) >= start[:, None]
    return ids.to(device), real.to(device)


def widened(head: Unembedding) -> Unembedding:
    """The head as `project` computes with it, so that no step has to widen it again."""
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    return replace(head, weight=head.weight[: head.vocab_size].to(wide))

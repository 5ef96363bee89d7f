"""Decoding for the Llama-like shapes of `opd.fastpath`, without the model's own forward.

One decode step is about twenty tensor operations per layer, against a cache that is allocated
once, and attention reads only the part of it that is filled.

Small float32 models are *folded* first, anew for every call since weights change in between: q, k
and v become one matrix, gate and up another, and the weights of the norms move into the matrix
that follows. Larger models are decoded from their own weights, without copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from opd import fastpath
from opd.fastpath import SMALL_BYTES, interleave, pairs, rotate, rotation
from opd.models import backbone, project
from opd.types import Unembedding

__all__ = ["FastDecoder", "why_not_fast"]

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


# --------------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True)
class _Matrix:
    """A linear map as `x @ weight + bias`."""

    weight: Float[Tensor, "I O"]
    bias: Float[Tensor, " O"] | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> _Matrix:
        return cls(linear.weight.T, linear.bias)

    def __call__(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def interleaved(self, head_dim: int) -> _Matrix:
        """The same map to interleaved heads."""

        def mixed(columns: Tensor) -> Tensor:
            heads = columns.view(*columns.shape[:-1], -1, head_dim)
            return interleave(heads).flatten(-2)

        return _Matrix(mixed(self.weight), None if self.bias is None else mixed(self.bias))


def _fuse(matrices: Sequence[_Matrix], gain: Tensor) -> _Matrix:
    """One matrix for several that read the same input, with the gain of the norm before them."""
    weight = torch.cat([matrix.weight for matrix in matrices], 1) * gain[:, None]
    if all(matrix.bias is None for matrix in matrices):
        return _Matrix(weight.contiguous())
    biases = [m.weight.new_zeros(m.weight.shape[1]) if m.bias is None else m.bias for m in matrices]
    return _Matrix(weight.contiguous(), torch.cat(biases))


def _apply(matrices: Sequence[_Matrix], x: Tensor) -> Tensor:
    if len(matrices) == 1:
        return matrices[0](x)
    return torch.cat([matrix(x) for matrix in matrices], -1)


@dataclass(frozen=True)
class _Norm:
    """RMSNorm over the last axis.

        x / sqrt(mean(x^2) + eps) * weight

    Folded (there is a `floor`) it is `x / sqrt(sum(x^2) + width * eps)`, three operations instead
    of eight, and `sqrt(width) * weight` is applied by whatever follows.
    """

    weight: Tensor
    eps: float
    floor: Float[Tensor, ""] | None

    @classmethod
    def of(cls, norm: Any, *, fold: bool) -> _Norm:
        weight, eps = norm.weight, norm.variance_epsilon
        floor = weight.new_tensor(math.sqrt(weight.numel() * eps)) if fold else None
        return cls(weight, eps, floor)

    @property
    def gain(self) -> Tensor:
        """The factor per entry that a folded norm leaves to whatever follows."""
        return self.weight * math.sqrt(self.weight.numel())

    def __call__(self, x: Tensor) -> Tensor:
        if self.floor is None:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)


@dataclass(frozen=True)
class _HeadNorm:
    """The norms of queries and keys. Folded, they differ by nothing but their gain."""

    query: _Norm
    key: _Norm
    n_query: int
    gain: Float[Tensor, "Hqk D"] | None

    @classmethod
    def of(cls, attention: Any, n_query: int, n_key: int, *, fold: bool) -> _HeadNorm | None:
        if not hasattr(attention, "q_norm"):
            return None
        query, key = _Norm.of(attention.q_norm, fold=fold), _Norm.of(attention.k_norm, fold=fold)
        if not fold:
            return cls(query, key, n_query, None)
        gain = torch.cat((query.gain.expand(n_query, -1), key.gain.expand(n_key, -1)))
        return cls(query, key, n_query, interleave(gain))

    def __call__(self, heads: Float[Tensor, "n Hqk D"]) -> Float[Tensor, "n Hqk D"]:
        if self.gain is not None:
            return self.query(heads).mul_(self.gain)
        queries, keys = heads[:, : self.n_query], heads[:, self.n_query :]
        return torch.cat((self.query(queries), self.key(keys)), 1)


@dataclass(frozen=True)
class _Layer:
    attention_norm: _Norm
    qkv: tuple[_Matrix, ...]
    head_norm: _HeadNorm | None
    out: _Matrix
    mlp_norm: _Norm
    gate_up: tuple[_Matrix, ...]
    down: _Matrix

    @classmethod
    def of(cls, layer: Any, n_query: int, n_key: int, *, fold: bool) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        layer_ = cls(
            attention_norm=_Norm.of(layer.input_layernorm, fold=fold),
            qkv=tuple(
                _Matrix.of(linear)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            ),
            head_norm=_HeadNorm.of(attention, n_query, n_key, fold=fold),
            out=_Matrix.of(attention.o_proj),
            mlp_norm=_Norm.of(layer.post_attention_layernorm, fold=fold),
            gate_up=(_Matrix.of(mlp.gate_proj), _Matrix.of(mlp.up_proj)),
            down=_Matrix.of(mlp.down_proj),
        )
        return layer_.folded(attention.head_dim) if fold else layer_

    def folded(self, head_dim: int) -> _Layer:
        """Fused, with interleaved queries and keys, and input-major, which `mm` is fastest on."""
        query, key, value = self.qkv
        qkv = (query.interleaved(head_dim), key.interleaved(head_dim), value)
        return replace(
            self,
            qkv=(_fuse(qkv, self.attention_norm.gain),),
            gate_up=(_fuse(self.gate_up, self.mlp_norm.gain),),
            out=_Matrix(self.out.weight.contiguous()),
            down=_Matrix(self.down.weight.contiguous()),
        )


# --------------------------------------------------------------------------------------------
# Decoding


class FastDecoder:
    """A `Decoder` (see `local.py`) for the models `why_not_fast` has nothing against.

    Prompts are padded on the left, so that every row writes its next key and value to the same
    column; a row's positions count from its own first token.

    Args:
        fold: see the module's text; by default small float32 models are.
    """

    def __init__(self, model: nn.Module, head: Unembedding, *, fold: bool | None = None) -> None:
        base, config = cast(Any, backbone(model)), cast(Any, model).config
        self._embedding: Tensor = base.embed_tokens.weight
        dtype = self._embedding.dtype
        if fold is None:
            size = sum(weight.nbytes for weight in model.parameters())
            fold = dtype == torch.float32 and size <= SMALL_BYTES
        self._model, self._fold = model, fold
        self._n_query, self._n_key = config.num_attention_heads, config.num_key_value_heads
        self._head_dim: int = base.layers[0].self_attn.head_dim
        self._scale: float = base.layers[0].self_attn.scaling
        self._wide = torch.promote_types(dtype, torch.float32)
        self._layers = [
            _Layer.of(layer, self._n_query, self._n_key, fold=fold) for layer in base.layers
        ]
        self._norm = _Norm.of(base.norm, fold=fold)
        self._head = _fold_head(head, self._norm.gain) if fold else widened(head)
        self._no_bias = self._embedding.new_zeros(1, 1, 1)

    def prefill(
        self, prompts: Sequence[tuple[int, ...]], rows: Int[Tensor, " B"], room: int
    ) -> Float[Tensor, "B V"]:
        """Read the prompts, give row b a copy of prompt `rows[b]`; logits of the first token."""
        ids, real = left_padded(prompts, self._embedding.device)
        width = ids.shape[1]
        padding = (~real).sum(1)
        even = not bool(padding.any())
        turns = rotation(self._model, width + room)[:, None]
        self._turns = turns.to(self._wide.to_complex())
        self._column = width
        self._position = None if even else (width - padding)[rows]
        self._bias = None if even else self._padding_bias(padding[rows], width + room)
        at_once = max(1, PREFILL_TOKENS // width) if ids.device.type == "cpu" else len(ids)
        parts = [
            self._read(ids[i : i + at_once], None if even else real[i : i + at_once])
            for i in range(0, len(ids), at_once)
        ]
        hidden, caches = zip(*parts, strict=True)
        self._caches = [
            _with_room(_joined(part, 1).index_select(1, rows), min(room, CACHE_ROOM))
            for part in zip(*caches, strict=True)
        ]
        return self._logits(_joined(hidden, 0).index_select(0, rows))

    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Append one token to every row; logits of the next one."""
        column = self._column
        if column == self._caches[0].shape[3]:
            room = max(CACHE_ROOM, column // 2)
            self._caches = [_with_room(cache, room) for cache in self._caches]
        self._column += 1
        if self._position is None:
            turn = self._turns[column]
        else:
            turn = self._turns.index_select(0, self._position)
            self._position = self._position + 1
        x = self._embedding.index_select(0, tokens)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            query, cache[:, :, :, column] = self._heads(layer, x, turn)
            x = _close(layer, x, self._attend(query, cache))
        return self._logits(x)

    def keep(self, rows: Int[Tensor, " A"]) -> None:
        """Drop every row but these."""
        self._caches = [cache.index_select(1, rows) for cache in self._caches]
        if self._bias is not None and self._position is not None:
            self._bias, self._position = self._bias[rows], self._position[rows]

    def _read(
        self, ids: Int[Tensor, "U P"], real: Bool[Tensor, "U P"] | None
    ) -> tuple[Float[Tensor, "U H"], list[Tensor]]:
        """Hidden state after the last token of some prompts, and every layer's cache."""
        if real is None:
            mask, turn = None, self._turns[: ids.shape[1]].repeat(len(ids), 1, 1)
        else:
            mask = _prompt_mask(real)
            turn = self._turns[(real.cumsum(1) - 1).clamp_min(0).flatten()]
        caches = []
        x = functional.embedding(ids.flatten(), self._embedding)
        for layer in self._layers:
            query, keys_values = self._heads(layer, x, turn)
            cache = keys_values.view(2, *ids.shape, self._n_key, self._head_dim).transpose(2, 3)
            caches.append(cache)
            attended = functional.scaled_dot_product_attention(
                query.view(*ids.shape, self._n_query, self._head_dim).transpose(1, 2),
                cache[0],
                cache[1],
                attn_mask=mask,
                is_causal=mask is None,
                scale=self._scale,
                enable_gqa=True,
            )
            x = _close(layer, x, attended.transpose(1, 2).reshape(ids.numel(), -1))
        return x.view(*ids.shape, -1)[:, -1], caches

    def _heads(
        self, layer: _Layer, x: Float[Tensor, "n H"], turn: Tensor
    ) -> tuple[Float[Tensor, "n Hq D"], Float[Tensor, "two n Hkv D"]]:
        """Queries, and keys with values; queries and keys are interleaved and rotated."""
        n = x.shape[0]
        heads = _apply(layer.qkv, layer.attention_norm(x)).view(n, -1, self._head_dim)
        turned = heads[:, : self._n_query + self._n_key]
        normed = turned if layer.head_norm is None else layer.head_norm(turned)
        if self._fold:
            torch.mul(pairs(normed), turn, out=pairs(turned))
        else:  # complex numbers come in no half precision
            turned.copy_(rotate(interleave(normed).to(self._wide), turn))
        keys_values = heads[:, self._n_query :].view(n, 2, self._n_key, self._head_dim)
        return heads[:, : self._n_query], keys_values.transpose(0, 1)

    def _attend(
        self,
        query: Float[Tensor, "B Hq D"],
        cache: Float[Tensor, "two B Hkv C D"],
    ) -> Float[Tensor, "B HqD"]:
        """Attention of one new token per row; queries that share a key head go together."""
        n, filled = query.shape[0], self._column
        keys, values = cache.flatten(1, 2)[:, :, :filled].unbind(0)
        query = query.reshape(n * self._n_key, -1, self._head_dim)
        scores = torch.baddbmm(
            self._no_bias if self._bias is None else self._bias[:, :, :, :filled].flatten(0, 1),
            query,
            keys.transpose(1, 2),
            beta=0 if self._bias is None else 1,
            alpha=self._scale,
        )
        weights = scores.softmax(-1, dtype=self._wide).to(query.dtype)
        return torch.bmm(weights, values).view(n, -1)

    def _logits(self, x: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        normed = self._norm(x)
        if isinstance(self._head, _Matrix):
            return self._head(normed)
        return project(normed, self._head)

    def _padding_bias(
        self, padding: Int[Tensor, " B"], capacity: int
    ) -> Float[Tensor, "B Hkv 1 C"]:
        """-inf on the columns of each row's padding."""
        columns = torch.arange(capacity, device=padding.device)
        bias = self._embedding.new_zeros(len(padding), capacity)
        bias.masked_fill_(columns < padding[:, None], -math.inf)
        return bias[:, None, None].repeat(1, self._n_key, 1, 1)


def _close(layer: _Layer, x: Float[Tensor, "n H"], attended: Tensor) -> Float[Tensor, "n H"]:
    """The rest of a layer after attention: output projection and SwiGLU, both residual."""
    x = torch.addmm(x, attended, layer.out.weight)
    gate, up = _apply(layer.gate_up, layer.mlp_norm(x)).chunk(2, -1)
    return torch.addmm(x, functional.silu(gate).mul_(up), layer.down.weight)


def _fold_head(head: Unembedding, gain: Tensor) -> _Matrix:
    return _Matrix((head.weight[: head.vocab_size] * gain).T.contiguous())


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _with_room(cache: Float[Tensor, "two B Hkv P D"], room: int) -> Float[Tensor, "two B Hkv C D"]:
    """The same keys and values with room for as many more."""
    *lead, width, head_dim = cache.shape
    buffer = cache.new_empty(*lead, width + room, head_dim)
    buffer[:, :, :, :width] = cache
    return buffer


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

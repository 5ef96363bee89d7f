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
from opd.fastpath import SMALL_BYTES, interleave, rotate, rotation
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
        self._n_turned = self._n_query + self._n_key
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
        hidden, keys, values = zip(*parts, strict=True)
        room = min(room, CACHE_ROOM)
        self._keys = [_cache(_joined(part, rows), room) for part in zip(*keys, strict=True)]
        self._values = [_cache(_joined(part, rows), room) for part in zip(*values, strict=True)]
        return self._logits(_joined(hidden, rows))

    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Append one token to every row; logits of the next one."""
        column = self._column
        if column == self._keys[0].shape[2]:
            room = max(CACHE_ROOM, column // 2)
            self._keys = [_cache(keys, room) for keys in self._keys]
            self._values = [_cache(values, room) for values in self._values]
        self._column += 1
        if self._position is None:
            turn = self._turns[column]
        else:
            turn = self._turns.index_select(0, self._position)
            self._position = self._position + 1
        x = self._embedding.index_select(0, tokens)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            query, keys[:, :, column], values[:, :, column] = self._heads(layer, x, turn)
            x = _close(layer, x, self._attend(query, keys, values))
        return self._logits(x)

    def keep(self, rows: Int[Tensor, " A"]) -> None:
        """Drop every row but these."""
        self._keys = [keys.index_select(0, rows) for keys in self._keys]
        self._values = [values.index_select(0, rows) for values in self._values]
        if self._bias is not None and self._position is not None:
            self._bias, self._position = self._bias[rows], self._position[rows]

    def _read(
        self, ids: Int[Tensor, "U P"], real: Bool[Tensor, "U P"] | None
    ) -> tuple[Float[Tensor, "U H"], list[Tensor], list[Tensor]]:
        """Hidden state after the last token of some prompts, and every layer's keys and values."""
        if real is None:
            mask, turn = None, self._turns[: ids.shape[1]].repeat(len(ids), 1, 1)
        else:
            mask = _prompt_mask(real)
            turn = self._turns[(real.cumsum(1) - 1).clamp_min(0).flatten()]
        keys, values = [], []
        x = functional.embedding(ids.flatten(), self._embedding)
        for layer in self._layers:
            query, key, value = (
                heads.view(*ids.shape, -1, self._head_dim).transpose(1, 2)
                for heads in self._heads(layer, x, turn)
            )
            keys.append(key)
            values.append(value)
            attended = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self._scale,
                enable_gqa=True,
            )
            x = _close(layer, x, attended.transpose(1, 2).reshape(ids.numel(), -1))
        return x.view(*ids.shape, -1)[:, -1], keys, values

    def _heads(
        self, layer: _Layer, x: Float[Tensor, "n H"], turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, interleaved and rotated, and values: `[n, heads, D]` each."""
        n = x.shape[0]
        heads = _apply(layer.qkv, layer.attention_norm(x)).view(n, -1, self._head_dim)
        queries_keys = heads[:, : self._n_turned]
        if layer.head_norm is not None:
            queries_keys = layer.head_norm(queries_keys)
        if not self._fold:  # complex numbers come in no half precision
            queries_keys = interleave(queries_keys).to(self._wide)
        turned = rotate(queries_keys, turn).to(x.dtype)
        return (
            turned[:, : self._n_query],
            turned[:, self._n_query :],
            heads[:, self._n_turned :],
        )

    def _attend(
        self,
        query: Float[Tensor, "B Hq D"],
        keys: Float[Tensor, "B Hkv C D"],
        values: Float[Tensor, "B Hkv C D"],
    ) -> Float[Tensor, "B HqD"]:
        """Attention of one new token per row; queries that share a key head go together."""
        n, filled = query.shape[0], self._column
        keys, values = keys.flatten(0, 1)[:, :filled], values.flatten(0, 1)[:, :filled]
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


def _joined(parts: Sequence[Tensor], rows: Int[Tensor, " B"]) -> Tensor:
    """Some rows of several tensors that follow each other."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.index_select(0, rows)


def _cache(heads: Float[Tensor, "B Hkv P D"], room: int) -> Float[Tensor, "B Hkv C D"]:
    """The same keys or values with room for as many more."""
    n, n_key, width, head_dim = heads.shape
    buffer = heads.new_empty(n, n_key, width + room, head_dim)
    buffer[:, :, :width] = heads
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

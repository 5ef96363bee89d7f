"""Llama-like decoders without the model's own forward: the same numbers in fewer passes.

The shape: RMSNorm, rotary positions, grouped-query attention with optional q/k/v biases and
optional q/k norms, SwiGLU. Llama, Qwen2, Qwen3 and Mistral have it. `FastModel` is its weights and
layers; `response_states` reads whole sequences with it, with or without gradient, and
`rollout/fast.py` decodes with it.

Small float32 models are *folded*: q, k and v become one matrix, gate and up another, the weights of
the norms move into the matrix that follows, and the two entries of a head that rotate together
become neighbours. Folding is done anew at every visit, since weights change in between, and inside
autograd, so the gradient is that of the model's own parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from opd.models import backbone
from opd.types import Batch

__all__ = [
    "FOLD_BYTES",
    "FastModel",
    "response_states",
    "why_not_fast",
    "why_not_folded",
]

FOLD_BYTES = 64 * 2**20
"""Float32 models of at most this many bytes are folded; copying them costs a few milliseconds."""

SHORT = 192
"""Up to this length attention is quicker with its weights written out than by blocks."""

_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_MAY_HAVE_BIAS = ("q_proj", "k_proj", "v_proj")
_PROJECTIONS = {
    "self_attn": (*_MAY_HAVE_BIAS, "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def response_states(model: nn.Module, batch: Batch) -> Float[Tensor, "N H"]:
    """Hidden states, after the final norm, of the batch's response rows, in their order.

    Sequences are padded on the right, so causal attention never looks at the padding. The fast
    path reads them unless `why_not_folded` has an objection; both agree within rounding, and both
    carry the gradient.
    """
    if why_not_folded(model) is None and not batch.model_inputs:
        return FastModel(model, fold=True).read(batch.input_ids, batch.row_index)
    states = backbone(model)(input_ids=batch.input_ids, use_cache=False, **batch.model_inputs)
    hidden: Tensor = states.last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.row_index)


# --------------------------------------------------------------------------------------------
# What is supported


def why_not_folded(model: nn.Module) -> str | None:
    """What keeps `response_states` from the fast path; None where nothing does.

    The gain is that of few passes over small tensors, so it is for small float32 models on a CPU.
    """
    weights = list(model.parameters())
    if any(weight.device.type != "cpu" for weight in weights):
        return "it is not on a CPU"
    if any(weight.dtype != torch.float32 for weight in weights):
        return "its weights are not float32"
    if sum(weight.nbytes for weight in weights) > FOLD_BYTES:
        return f"its weights take more than {FOLD_BYTES // 2**20} MiB"
    if any(_has_hooks(module) for module in model.modules()):
        return "one of its modules has hooks, which would not be called"
    return why_not_fast(model)


def why_not_fast(model: nn.Module) -> str | None:
    """What keeps a model from having the shape of `FastModel`; None where nothing does."""
    if hasattr(model, "peft_config"):
        return "it has adapters"
    config = cast(Any, model).config
    if config.model_type not in _FAMILIES:
        return f"its family, {config.model_type}, is not one of {', '.join(_FAMILIES)}"
    base = cast(Any, backbone(model))
    return (
        _attention_obstacle(config, base) or _projection_obstacle(base) or _placement_obstacle(model)
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _attention_obstacle(config: Any, base: Any) -> str | None:
    if any(getattr(layer.self_attn, "sliding_window", None) for layer in base.layers) or (
        config.model_type == "mistral" and config.sliding_window
    ):
        return "it has sliding-window attention"
    rotary = base.rotary_emb
    if rotary.rope_type not in _STATIC_ROPE:
        return f"its rotary positions are of type {rotary.rope_type}"
    if 2 * rotary.inv_freq.numel() != base.layers[0].self_attn.head_dim:
        return "it rotates only part of each head"
    return None


def _projection_obstacle(base: Any) -> str | None:
    if base.config.hidden_act not in ("silu", "swish"):
        return f"its activation is {base.config.hidden_act}"
    for layer in base.layers:
        for owner, names in _PROJECTIONS.items():
            for name in names:
                linear = getattr(getattr(layer, owner), name)
                if type(linear) is not nn.Linear:
                    return f"{owner}.{name} is a {type(linear).__name__}"
                if linear.bias is not None and name not in _MAY_HAVE_BIAS:
                    return f"{owner}.{name} has a bias"
    return None


def _placement_obstacle(model: nn.Module) -> str | None:
    if any(type(weight) not in (nn.Parameter, Tensor) for weight in model.parameters()):
        return "its weights are sharded or quantised"
    if len({weight.device for weight in model.parameters()}) != 1:
        return "its weights lie on several devices"
    return None


# --------------------------------------------------------------------------------------------
# Operations on whole sequences, their derivatives written out
#
# Left to itself autograd would take three times as many passes over memory. A norm is that of the
# folded model: `unit = x / length`, `length = sqrt(sum(x^2) + floor^2)`.


def _unit(x: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """`unit` and `length` over the last axis."""
    length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)
    return x / length, length


def _unit_gradient(gradient: Tensor, unit: Tensor) -> Tensor:
    """The gradient that reaches `x` through its `unit`, times `length`."""
    along = (gradient * unit).sum(-1, keepdim=True)
    return torch.addcmul(gradient, unit, along, value=-1)


class _Heads(torch.autograd.Function):
    """Norm, projection to heads, norm of the heads, rotation.

    Returns queries and keys in one, and values, of one row per token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "n H"],
        weight: Float[Tensor, "HD H"],
        bias: Float[Tensor, " HD"] | None,
        gain: Float[Tensor, "Hqk D"] | None,
        turn: Tensor,
        floor: Tensor,
        head_floor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        unit, length = _unit(x, floor)
        heads = _linear(unit, weight, bias).view(len(x), -1, 2 * turn.shape[-1])
        turned = heads[:, : turn.shape[-2]]
        head_unit = head_length = None
        if head_floor is not None:
            head_unit, head_length = _unit(turned, head_floor)
            turned = head_unit * gain
        ctx.save_for_backward(unit, length, weight, gain, turn, head_unit, head_length)
        ctx.has_bias = bias is not None
        return _rotate(turned, turn), heads[:, turn.shape[-2] :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_turned: Tensor, for_values: Tensor) -> tuple[Tensor | None, ...]:
        unit, length, weight, gain, turn, head_unit, head_length = ctx.saved_tensors
        for_heads = for_values.new_empty(len(unit), weight.shape[0]).view(
            len(unit), -1, 2 * turn.shape[-1]
        )
        inward = _rotate(for_turned, turn.conj())
        for_gain = None
        if head_unit is not None:
            for_gain = (inward * head_unit).sum(0)
            inward = _unit_gradient(inward * gain, head_unit)
            torch.div(inward, head_length, out=for_heads[:, : turn.shape[-2]])
        else:
            for_heads[:, : turn.shape[-2]] = inward
        for_heads[:, turn.shape[-2] :] = for_values
        flat = for_heads.flatten(1)
        for_x = _unit_gradient(torch.mm(flat, weight), unit).div_(length)
        for_bias = flat.sum(0) if ctx.has_bias else None
        return for_x, torch.mm(flat.T, unit), for_bias, for_gain, None, None, None


class _FeedForward(torch.autograd.Function):
    """`x + down(silu(gate(unit)) * up(unit))`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "n H"],
        gate_up: Float[Tensor, "FF H"],
        down: Float[Tensor, "H F"],
        floor: Tensor,
    ) -> Float[Tensor, "n H"]:
        unit, length = _unit(x, floor)
        wide = torch.mm(unit, gate_up.T)
        gate, up = wide.chunk(2, -1)
        opened = functional.silu(gate)
        inner = opened * up
        ctx.save_for_backward(unit, length, gate_up, down, wide, opened, inner)
        return torch.addmm(x, inner, down.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        unit, length, gate_up, down, wide, opened, inner = ctx.saved_tensors
        gate, up = wide.chunk(2, -1)
        for_down = torch.mm(gradient.T, inner)
        for_inner = torch.mm(gradient, down)
        for_wide = torch.empty_like(wide)
        for_gate, for_up = for_wide.chunk(2, -1)
        torch.mul(for_inner, opened, out=for_up)
        for_opened = for_inner.mul_(up)
        torch.ops.aten.silu_backward.grad_input(for_opened, gate, grad_input=for_gate)
        inward = _unit_gradient(torch.mm(for_wide, gate_up), unit)
        return torch.addcdiv(gradient, inward, length), torch.mm(for_wide.T, unit), for_down, None


class _ShortAttention(torch.autograd.Function):
    """Causal attention with its weights written out: `softmax(scale q k^T) v`.

    Heads are gathered key head by key head, the queries that share one behind each other, so that
    grouped queries need no copies of keys and values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "B L Hq D"],
        key: Float[Tensor, "B L Hkv D"],
        value: Float[Tensor, "B L Hkv D"],
        scale: float,
    ) -> Float[Tensor, "B L Hq D"]:
        ctx.shape, ctx.scale = query.shape, scale
        query, key, value = _by_key_head(query, key.shape[2]), _by_head(key), _by_head(value)
        bias = _causal_bias(key.shape[1], query.shape[1] // key.shape[1], like=query)
        weights = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale).softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        return _by_token(torch.bmm(weights, value), ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, weights = ctx.saved_tensors
        batch, length, _, head_dim = ctx.shape
        shape = (batch, length, key.shape[0] // batch, head_dim)
        gradient = _by_key_head(gradient, shape[2])
        for_value = torch.bmm(weights.transpose(1, 2), gradient)
        for_weights = torch.bmm(gradient, value.transpose(1, 2))
        for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)
        for_query = torch.bmm(for_scores, key).mul_(ctx.scale)
        for_key = torch.bmm(for_scores.transpose(1, 2), query).mul_(ctx.scale)
        return (
            _by_token(for_query, ctx.shape),
            _by_token(for_key, shape),
            _by_token(for_value, shape),
            None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


def _rotate(heads: Float[Tensor, "*n D"], turn: Tensor) -> Float[Tensor, "*n D"]:
    """Interleaved heads times the complex factors of their pairs."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def _by_head(heads: Float[Tensor, "B L Hkv D"]) -> Float[Tensor, "BHkv L D"]:
    return heads.transpose(1, 2).reshape(-1, heads.shape[1], heads.shape[3])


def _by_key_head(heads: Float[Tensor, "B L Hq D"], n_key: int) -> Float[Tensor, "BHkv GL D"]:
    batch, length, _, head_dim = heads.shape
    grouped = heads.reshape(batch, length, n_key, -1, head_dim).permute(0, 2, 3, 1, 4)
    return grouped.reshape(batch * n_key, -1, head_dim)


def _by_token(heads: Tensor, shape: Sequence[int]) -> Float[Tensor, "B L Hq D"]:
    """Back to `shape`, [B, L, heads, D]."""
    batch, length, n_heads, head_dim = shape
    return heads.reshape(batch, n_heads, length, head_dim).transpose(1, 2)


def _causal_bias(length: int, copies: int, *, like: Tensor) -> Float[Tensor, "1 GL L"]:
    """-inf where a key comes after its query, for so many queries per key head."""
    bias = like.new_full((length, length), -math.inf).triu(1)
    return bias.repeat(copies, 1)[None]


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of `[B, L, heads, D]`; queries that share a key head are neighbours."""
    if query.shape[1] <= SHORT:
        return cast(Tensor, _ShortAttention.apply(query, key, value, scale))
    heads = (heads.transpose(1, 2) for heads in (query, key, value))
    return functional.scaled_dot_product_attention(
        *heads, is_causal=True, scale=scale, enable_gqa=True
    ).transpose(1, 2)


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
        bias = None if self.bias is None else _interleave(self.bias, head_dim)
        return _Matrix(_interleave(self.weight, head_dim), bias)

    def contiguous(self) -> _Matrix:
        """The same map stored input-major, which `mm` is fastest on where there are few rows."""
        return replace(self, weight=self.weight.contiguous())


def _fuse(matrices: Sequence[_Matrix], gain: Tensor) -> _Matrix:
    """One matrix for several that read the same input, with the gain of the norm before them."""
    weight = torch.cat([matrix.weight.T for matrix in matrices]).mul(gain).T
    if all(matrix.bias is None for matrix in matrices):
        return _Matrix(weight)
    biases = [m.weight.new_zeros(m.weight.shape[1]) if m.bias is None else m.bias for m in matrices]
    return _Matrix(weight, torch.cat(biases))


def _apply(matrices: Sequence[_Matrix], x: Tensor) -> Tensor:
    if len(matrices) == 1:
        return matrices[0](x)
    return torch.cat([matrix(x) for matrix in matrices], -1)


def _interleave(heads: Float[Tensor, "*n HD"], head_dim: int) -> Float[Tensor, "*n HD"]:
    """Puts the two entries of a head that rotate together, half a head apart, side by side.

    They then are one complex number, and the rotation is one multiplication. Scores do not change
    when queries and keys are reordered alike.
    """
    pairs = heads.reshape(*heads.shape[:-1], -1, 2, head_dim // 2)
    return pairs.transpose(-1, -2).flatten(-3)


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
        if x.requires_grad:
            return cast(Tensor, _UnitNorm.apply(x, self.floor))
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
        return cls(query, key, n_query, _interleave(gain, attention.head_dim))

    def __call__(self, heads: Float[Tensor, "*n Hqk D"]) -> Float[Tensor, "*n Hqk D"]:
        if self.gain is not None:
            return self.query(heads) * self.gain
        queries, keys = heads.split((self.n_query, heads.shape[-2] - self.n_query), -2)
        return torch.cat((self.query(queries), self.key(keys)), -2)


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
        """Fused, with interleaved queries and keys."""
        query, key, value = self.qkv
        qkv = (query.interleaved(head_dim), key.interleaved(head_dim), value)
        return replace(
            self,
            qkv=(_fuse(qkv, self.attention_norm.gain),),
            gate_up=(_fuse(self.gate_up, self.mlp_norm.gain),),
        )

    def contiguous(self) -> _Layer:
        """The same layer with its matrices stored for few rows."""
        return replace(
            self,
            qkv=tuple(matrix.contiguous() for matrix in self.qkv),
            gate_up=tuple(matrix.contiguous() for matrix in self.gate_up),
            out=self.out.contiguous(),
            down=self.down.contiguous(),
        )

    def close(self, x: Float[Tensor, "n H"], attended: Float[Tensor, "n HqD"]) -> Float[Tensor, "n H"]:
        """The rest of the layer after attention: output projection and SwiGLU, both residual."""
        x = torch.addmm(x, attended, self.out.weight)
        opened = _swiglu(_apply(self.gate_up, self.mlp_norm(x)))
        return torch.addmm(x, opened, self.down.weight)


# --------------------------------------------------------------------------------------------
# The model


class FastModel:
    """The decoder of a model `why_not_fast` has nothing against, with its weights of now.

    Args:
        fold: see the module's text.
    """

    def __init__(self, model: nn.Module, *, fold: bool) -> None:
        base, config = cast(Any, backbone(model)), cast(Any, model).config
        attention = base.layers[0].self_attn
        self.fold = fold
        self.embedding: Tensor = base.embed_tokens.weight
        self.n_query: int = config.num_attention_heads
        self.n_key: int = config.num_key_value_heads
        self.n_turned = self.n_query + self.n_key
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        self.layers = [
            _Layer.of(layer, self.n_query, self.n_key, fold=fold) for layer in base.layers
        ]
        self.norm = _Norm.of(base.norm, fold=fold)
        self._rotary = base.rotary_emb
        self._wide = torch.promote_types(self.embedding.dtype, torch.float32)

    def read(self, ids: Int[Tensor, "B L"], rows: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        """Hidden states after the final norm at some of the B x L places of whole sequences.

        Padding goes on the right. The last layer is finished only where it was asked for.

        Args:
            rows: places in the flattened [B, L].
        """
        turn = self.rotation(ids.shape[1])
        x = functional.embedding(ids.flatten(), self.embedding)
        for layer in self.layers:
            heads = self.heads(layer, x.view(*ids.shape, -1), turn)
            attended = _causal_attention(*heads, self.scale).reshape(len(x), -1)
            if layer is self.layers[-1]:
                x, attended = x.index_select(0, rows), attended.index_select(0, rows)
            x = layer.close(x, attended)
        return self.norm(x) * self.norm.gain if self.fold else self.norm(x)

    def heads(
        self, layer: _Layer, x: Float[Tensor, "*n H"], turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, interleaved and rotated, and values: `[*n, heads, D]` each."""
        lead = x.shape[:-1]
        projected = _apply(layer.qkv, layer.attention_norm(x).flatten(0, -2))
        heads = projected.view(*lead, -1, self.head_dim)
        queries_keys, values = heads.split((self.n_turned, self.n_key), -2)
        if layer.head_norm is not None:
            queries_keys = layer.head_norm(queries_keys)
        if not self.fold:  # complex numbers come in no half precision
            queries_keys = _interleave(queries_keys, self.head_dim).to(self._wide)
        pairs = torch.view_as_complex(queries_keys.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
        queries, keys = turned.split((self.n_query, self.n_key), -2)
        return queries, keys, values

    def rotation(self, length: int) -> Tensor:
        """The complex factor of every position, head and pair, `[length, Hqk, D / 2]`.

        Angles are taken in float32 whatever the weights are, as the models themselves do. Folded
        it is written out for every head, which makes multiplying by it twice as fast.
        """
        frequencies = self._rotary.inv_freq.float()
        positions = torch.arange(length, device=frequencies.device).float()
        angles = torch.outer(positions, frequencies)
        size = torch.full_like(angles, self._rotary.attention_scaling)
        turn = torch.polar(size, angles).to(self._wide.to_complex())[:, None]
        return turn.expand(-1, self.n_turned, -1).contiguous() if self.fold else turn

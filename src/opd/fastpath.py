"""Llama-like decoders without the model's own forward: the same numbers in fewer operations.

The shape: RMSNorm, rotary positions, grouped-query attention with optional q/k/v biases and
optional q/k norms, SwiGLU. Llama, Qwen2, Qwen3 and Mistral have it. `FastModel` holds such a
model's weights as they are now; `response_states` reads whole sequences with it, with or without
gradient, and `rollout/fast.py` decodes with it.

Small float32 models are *folded*, anew for every visit since weights change in between: q, k and v
become one matrix, gate and up another, the weights of the norms move into the matrix that follows,
the scale of the scores into the queries, and the two entries of a head that rotate together become
neighbours. Folding is part of the graph, so gradients are those of the model's own parameters.
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
    "SMALL",
    "FastModel",
    "fold",
    "response_states",
    "why_not_fast",
    "why_not_folded",
]

FOLD_BYTES = 64 * 2**20
"""Float32 models of at most this many bytes are folded; copying them costs a few milliseconds."""

SHORT = 128
"""Up to this length attention is quicker with all its weights written out than block by block."""

SMALL = "a small float32 model of Llama-like shape, on a CPU"
"""Why a model is folded, where it is."""

_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_MAY_HAVE_BIAS = ("q_proj", "k_proj", "v_proj")
_PROJECTIONS = {
    "self_attn": (*_MAY_HAVE_BIAS, "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def response_states(
    model: nn.Module, batch: Batch, folded: FastModel | None
) -> Float[Tensor, "N H"]:
    """Hidden states, after the final norm, that predict the batch's response rows, in their order.

    Sequences are padded on the right, so causal attention never looks at the padding.

    Args:
        folded: `fold(model)`; None takes the model's own forward. Both agree within rounding, and
            both carry the gradient.
    """
    if folded is not None and not batch.model_inputs:
        return folded.read(batch.input_ids, batch.row_index)
    states = backbone(model)(input_ids=batch.input_ids, use_cache=False, **batch.model_inputs)
    hidden: Tensor = states.last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.row_index)


def fold(model: nn.Module) -> FastModel | None:
    """The model with its weights of now, folded; None where `why_not_folded` has an objection."""
    return FastModel(model, fold=True) if why_not_folded(model) is None else None


# --------------------------------------------------------------------------------------------
# What is supported


def why_not_folded(model: nn.Module) -> str | None:
    """What keeps a model from being folded; None where nothing does.

    Folding pays where operations are small and memory is the processor's own cache: for small
    float32 models on a CPU.
    """
    size = 0
    for module in model.modules():
        if _has_hooks(module):
            return f"its {type(module).__name__} has hooks, which would not be called"
        for weight in module._parameters.values():
            if weight is None:
                continue
            if weight.device.type != "cpu":
                return "it is not on a CPU"
            if weight.dtype != torch.float32:
                return "its weights are not float32"
            size += weight.nbytes
    if size > FOLD_BYTES:
        return f"its weights take more than {FOLD_BYTES // 2**20} MiB"
    return why_not_fast(model)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_not_fast(model: nn.Module) -> str | None:
    """What keeps a model from being a `FastModel`; None where nothing does."""
    if hasattr(model, "peft_config"):
        return "it has adapters"
    config = cast(Any, model).config
    if config.model_type not in _FAMILIES:
        return f"its family, {config.model_type}, is not one of {', '.join(_FAMILIES)}"
    base = cast(Any, backbone(model))
    return (
        _attention_obstacle(config, base)
        or _projection_obstacle(base)
        or _placement_obstacle(model)
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
            modules = getattr(layer, owner)._modules
            for name in names:
                linear = modules[name]
                if type(linear) is not nn.Linear:
                    return f"{owner}.{name} is a {type(linear).__name__}"
                if linear.bias is not None and name not in _MAY_HAVE_BIAS:
                    return f"{owner}.{name} has a bias"
    return None


def _placement_obstacle(model: nn.Module) -> str | None:
    weights = list(model.parameters())
    if any(type(weight) not in (nn.Parameter, Tensor) for weight in weights):
        return "its weights are sharded or quantised"
    if len({weight.device for weight in weights}) != 1:
        return "its weights lie on several devices"
    return None


# --------------------------------------------------------------------------------------------
# Operations on whole sequences, with their derivatives written out
#
# Left to itself autograd would take about twice as many passes over memory. A folded norm is
# `unit = x / length` with `length = sqrt(sum(x^2) + floor^2)`. `turn` holds the complex factor of
# every position, head and pair, `[L, Hqk, D / 2]`.


class _Heads(torch.autograd.Function):
    """Norm, projection, norm of the heads, rotation: queries with keys, and values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "n H"],
        weight: Float[Tensor, "HD H"],
        bias: Float[Tensor, " HD"] | None,
        gain: Float[Tensor, "Hqk D"] | None,
        turn: Tensor,
        floor: Float[Tensor, ""],
        head_floor: Float[Tensor, ""] | None,
    ) -> tuple[Float[Tensor, "B L Hqk D"], Float[Tensor, "B L Hkv D"]]:
        unit, length = _unit(x, floor)
        heads = torch.mm(unit, weight.T) if bias is None else torch.addmm(bias, unit, weight.T)
        turned, values = _split_heads(heads, turn)
        head_unit = head_length = None
        if gain is not None and head_floor is not None:
            head_unit, head_length = _unit(turned, head_floor)
            turned = head_unit * gain
        ctx.has_bias = bias is not None
        ctx.save_for_backward(unit, length, weight, gain, turn, head_unit, head_length)
        return _rotate(turned, turn), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_turned: Tensor, for_values: Tensor) -> tuple[Tensor | None, ...]:
        unit, length, weight, gain, turn, head_unit, head_length = ctx.saved_tensors
        for_heads = unit.new_empty(len(unit), len(weight))
        before_turn, values = _split_heads(for_heads, turn)
        values.copy_(for_values)
        turned_back = _rotate(for_turned, turn.conj())
        for_gain = None
        if head_unit is None:
            before_turn.copy_(turned_back)
        else:
            for_gain = (turned_back * head_unit).sum((0, 1))
            torch.div(_unit_gradient(turned_back * gain, head_unit), head_length, out=before_turn)
        for_x = _unit_gradient(torch.mm(for_heads, weight), unit).div_(length)
        for_bias = for_heads.sum(0) if ctx.has_bias else None
        return for_x, torch.mm(for_heads.T, unit), for_bias, for_gain, None, None, None


class _ShortAttention(torch.autograd.Function):
    """`softmax(query key^T + bias) value`, queries that share a key head behind each other."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "B L Hq D"],
        key: Float[Tensor, "B L Hkv D"],
        value: Float[Tensor, "B L Hkv D"],
        bias: Float[Tensor, "1 GL L"],
    ) -> Float[Tensor, "B L Hq D"]:
        ctx.query_shape, ctx.key_shape = query.shape, key.shape
        query, key, value = (_by_key_head(heads, ctx.key_shape[2]) for heads in (query, key, value))
        weights = torch.baddbmm(bias, query, key.transpose(1, 2)).softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        return _by_token(torch.bmm(weights, value), ctx.query_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, weights = ctx.saved_tensors
        gradient = _by_key_head(gradient, ctx.key_shape[2])
        for_value = torch.bmm(weights.transpose(1, 2), gradient)
        for_weights = torch.bmm(gradient, value.transpose(1, 2))
        for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)
        for_query = torch.bmm(for_scores, key)
        for_key = torch.bmm(for_scores.transpose(1, 2), query)
        return (
            _by_token(for_query, ctx.query_shape),
            _by_token(for_key, ctx.key_shape),
            _by_token(for_value, ctx.key_shape),
            None,
        )


class _FeedForward(torch.autograd.Function):
    """`x + down(silu(gate(unit)) * up(unit))`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "n H"],
        gate_up: Float[Tensor, "FF H"],
        down: Float[Tensor, "H F"],
        floor: Float[Tensor, ""],
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
        through_unit = _unit_gradient(torch.mm(for_wide, gate_up), unit)
        for_x = torch.addcdiv(gradient, through_unit, length)
        return for_x, torch.mm(for_wide.T, unit), for_down, None


class _Unit(torch.autograd.Function):
    """A folded norm alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: Float[Tensor, ""]) -> Tensor:
        unit, length = _unit(x, floor)
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        unit, length = ctx.saved_tensors
        return _unit_gradient(gradient, unit).div_(length), None


def _unit(x: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """`unit` and `length` over the last axis."""
    length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)
    return x / length, length


def _unit_gradient(gradient: Tensor, unit: Tensor) -> Tensor:
    """The gradient of `x`, times `length`, from that of its `unit`."""
    along = (gradient * unit).sum(-1, keepdim=True)
    return torch.addcmul(gradient, unit, along, value=-1)


def _split_heads(flat: Float[Tensor, "n HD"], turn: Tensor) -> tuple[Tensor, Tensor]:
    """Queries with keys, and values, as views `[B, L, heads, D]`."""
    length, n_turned, half = turn.shape
    heads = flat.view(-1, length, flat.shape[1] // (2 * half), 2 * half)
    return heads[:, :, :n_turned], heads[:, :, n_turned:]


def _rotate(heads: Float[Tensor, "*n D"], turn: Tensor) -> Float[Tensor, "*n D"]:
    """Interleaved heads times the complex factors of their pairs."""
    pairs = torch.view_as_complex(heads.view(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def _by_key_head(heads: Float[Tensor, "B L Hq D"], n_key: int) -> Float[Tensor, "BHkv GL D"]:
    """Key head by key head, the heads that share one behind each other."""
    batch, length, _, head_dim = heads.shape
    if heads.shape[2] == n_key:
        return heads.transpose(1, 2).reshape(-1, length, head_dim)
    grouped = heads.reshape(batch, length, n_key, -1, head_dim).permute(0, 2, 3, 1, 4)
    return grouped.reshape(batch * n_key, -1, head_dim)


def _by_token(heads: Float[Tensor, "BHkv GL D"], shape: Sequence[int]) -> Float[Tensor, "B L Hq D"]:
    """What `_by_key_head` made of a tensor of this shape, back."""
    batch, length, n_heads, head_dim = shape
    return heads.view(batch, n_heads, length, head_dim).transpose(1, 2)


def _causal_bias(length: int, *, like: Tensor) -> Float[Tensor, "1 L L"] | None:
    """-inf where the key comes after the query; None beyond `SHORT`."""
    if length > SHORT:
        return None
    return like.new_full((1, length, length), -math.inf).triu(1)


def _causal_attention(
    query: Float[Tensor, "B L Hq D"],
    key: Float[Tensor, "B L Hkv D"],
    value: Float[Tensor, "B L Hkv D"],
    bias: Float[Tensor, "1 L L"] | None,
) -> Float[Tensor, "B L Hq D"]:
    """Attention with a scale of 1; queries that share a key head are neighbours."""
    if bias is not None:
        shared = bias.repeat(1, query.shape[2] // key.shape[2], 1)
        attended: Tensor = cast(Any, _ShortAttention).apply(query, key, value, shared)
        return attended
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=1.0, enable_gqa=True
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

    def input_major(self) -> _Matrix:
        """The same map, stored as `mm` is fastest on where there are few rows."""
        return replace(self, weight=self.weight.contiguous())


def _apply(matrices: Sequence[_Matrix], x: Tensor) -> Tensor:
    if len(matrices) == 1:
        return matrices[0](x)
    return torch.cat([matrix(x) for matrix in matrices], -1)


def _fold_heads(attention: Any, gain: Tensor) -> _Matrix:
    """Queries and keys, interleaved, and values, with the gain of the norm before them.

    Without a norm of the heads, the scale of the scores goes into the queries.
    """
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    scale = 1.0 if hasattr(attention, "q_norm") else attention.scaling
    has_bias = any(linear.bias is not None for linear in linears)

    def joined(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        turned = torch.cat((query if scale == 1 else query * scale, key))
        return torch.cat((_interleave(turned, attention.head_dim, 0), value))

    weight = joined(*(linear.weight for linear in linears)) * gain
    bias = joined(*(_bias_or_zeros(linear) for linear in linears)) if has_bias else None
    return _Matrix(weight.T, bias)


def _bias_or_zeros(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _interleave(heads: Tensor, head_dim: int, axis: int) -> Tensor:
    """Puts the two entries of a head that rotate together, half a head apart, side by side.

    They then are one complex number, and the rotation is one multiplication. Scores do not change
    when queries and keys are reordered alike.

    Args:
        axis: where the heads are, >= 0; several heads may follow each other in it.
    """
    before, after = heads.shape[:axis], heads.shape[axis + 1 :]
    pairs = heads.reshape(*before, -1, 2, head_dim // 2, *after)
    return pairs.transpose(axis + 1, axis + 2).flatten(axis, axis + 2)


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
        floor = weight.new_full((), math.sqrt(weight.numel() * eps)) if fold else None
        return cls(weight, eps, floor)

    @property
    def gain(self) -> Tensor:
        """The factor per entry that a folded norm leaves to whatever follows."""
        return self.weight * math.sqrt(self.weight.numel())

    def __call__(self, x: Tensor) -> Tensor:
        if self.floor is None:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _unit(x, self.floor)[0]


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
        gains = (query.gain * attention.scaling).expand(n_query, -1), key.gain.expand(n_key, -1)
        return cls(query, key, n_query, _interleave(torch.cat(gains), attention.head_dim, 1))

    def __call__(self, heads: Float[Tensor, "*n Hqk D"]) -> Float[Tensor, "*n Hqk D"]:
        if self.gain is not None:
            return self.query(heads).mul_(self.gain)
        queries, keys = heads[..., : self.n_query, :], heads[..., self.n_query :, :]
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
        attention_norm = _Norm.of(layer.input_layernorm, fold=fold)
        mlp_norm = _Norm.of(layer.post_attention_layernorm, fold=fold)
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up = (mlp.gate_proj, mlp.up_proj)
        if fold:
            heads = (_fold_heads(attention, attention_norm.gain),)
            both = torch.cat([linear.weight for linear in gate_up]) * mlp_norm.gain
        return cls(
            attention_norm=attention_norm,
            qkv=heads if fold else tuple(map(_Matrix.of, qkv)),
            head_norm=_HeadNorm.of(attention, n_query, n_key, fold=fold),
            out=_Matrix.of(attention.o_proj),
            mlp_norm=mlp_norm,
            gate_up=(_Matrix(both.T),) if fold else tuple(map(_Matrix.of, gate_up)),
            down=_Matrix.of(mlp.down_proj),
        )

    def input_major(self) -> _Layer:
        """The same layer, stored for few rows."""
        return replace(
            self,
            qkv=tuple(matrix.input_major() for matrix in self.qkv),
            gate_up=tuple(matrix.input_major() for matrix in self.gate_up),
            out=self.out.input_major(),
            down=self.down.input_major(),
        )

    def read_heads(self, x: Float[Tensor, "n H"], turn: Tensor) -> tuple[Tensor, Tensor]:
        """Queries with keys, and values, of whole sequences: `[B, L, heads, D]` each."""
        (qkv,), norm = self.qkv, self.head_norm
        gain, floor = (None, None) if norm is None else (norm.gain, norm.query.floor)
        heads: tuple[Tensor, Tensor] = cast(Any, _Heads).apply(
            x, qkv.weight.T, qkv.bias, gain, turn, self.attention_norm.floor, floor
        )
        return heads

    def read_rest(self, x: Float[Tensor, "n H"], attended: Tensor) -> Float[Tensor, "n H"]:
        """What `close` does, with a gradient."""
        x = torch.addmm(x, attended, self.out.weight)
        rest: Tensor = cast(Any, _FeedForward).apply(
            x, self.gate_up[0].weight.T, self.down.weight.T, self.mlp_norm.floor
        )
        return rest

    def close(self, x: Float[Tensor, "n H"], attended: Tensor) -> Float[Tensor, "n H"]:
        """The rest of a layer after attention: output projection and SwiGLU, both residual."""
        x = torch.addmm(x, attended, self.out.weight)
        gate, up = _apply(self.gate_up, self.mlp_norm(x)).chunk(2, -1)
        return torch.addmm(x, functional.silu(gate).mul_(up), self.down.weight)


# --------------------------------------------------------------------------------------------
# The model


class FastModel:
    """The decoder of a model `why_not_fast` has nothing against, with its weights of now.

    Args:
        fold: see the module's text; `read` needs it.
    """

    def __init__(self, model: nn.Module, *, fold: bool) -> None:
        base, config = cast(Any, backbone(model)), cast(Any, model).config
        attention = base.layers[0].self_attn
        self.folded = fold
        self.embedding: Tensor = base.embed_tokens.weight
        self.wide = torch.promote_types(self.embedding.dtype, torch.float32)
        self.n_query: int = config.num_attention_heads
        self.n_key: int = config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self.scale: float = 1.0 if fold else attention.scaling
        self.layers = [
            _Layer.of(layer, self.n_query, self.n_key, fold=fold) for layer in base.layers
        ]
        self.norm = _Norm.of(base.norm, fold=fold)
        self._rotary = base.rotary_emb

    def read(self, ids: Int[Tensor, "B L"], rows: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        """Hidden states after the final norm at some places of whole sequences.

        Padding goes on the right. The last layer is finished only where it is asked for.

        Args:
            rows: places in the flattened `[B, L]`.
        """
        length = ids.shape[1]
        turn = self.rotation(length)
        bias = _causal_bias(length, like=self.embedding)
        x = functional.embedding(ids.flatten(), self.embedding)
        for layer in self.layers:
            queries_keys, values = layer.read_heads(x, turn)
            queries, keys = queries_keys.split_with_sizes((self.n_query, self.n_key), 2)
            attended = _causal_attention(queries, keys, values, bias).reshape(len(x), -1)
            if layer is self.layers[-1]:
                x, attended = x.index_select(0, rows), attended.index_select(0, rows)
            x = layer.read_rest(x, attended)
        unit: Tensor = cast(Any, _Unit).apply(x, self.norm.floor)
        return unit * self.norm.gain

    def heads(
        self, layer: _Layer, x: Float[Tensor, "n H"], turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, interleaved and rotated, and values: `[n, heads, D]` each."""
        n_turned = self.n_query + self.n_key
        heads = _apply(layer.qkv, layer.attention_norm(x)).view(len(x), -1, self.head_dim)
        turned = heads[:, :n_turned]
        if layer.head_norm is not None:
            turned = layer.head_norm(turned)
        if not self.folded:  # complex numbers come in no half precision
            turned = _interleave(turned, self.head_dim, 2).to(self.wide)
        turned = _rotate(turned, turn).to(x.dtype)
        return turned[:, : self.n_query], turned[:, self.n_query :], heads[:, n_turned:]

    def rotation(self, length: int) -> Tensor:
        """The complex factor of every position, head and pair, `[length, Hqk, D / 2]`.

        Angles are taken in float32 whatever the weights are, as the models themselves do. Folded,
        it is written out for every head, which makes multiplying by it twice as fast.
        """
        frequencies = self._rotary.inv_freq.float()
        positions = torch.arange(length, device=frequencies.device).float()
        angles = torch.outer(positions, frequencies)
        size = torch.full_like(angles, self._rotary.attention_scaling)
        turn = torch.polar(size, angles).to(self.wide.to_complex())[:, None]
        return turn.repeat(1, self.n_query + self.n_key, 1) if self.folded else turn

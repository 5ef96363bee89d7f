"""Llama-like decoders without the model's own forward: the same numbers in fewer operations.

The shape: RMSNorm, rotary positions, grouped-query attention with optional q/k/v biases and
optional q/k norms, SwiGLU. Llama, Qwen2, Qwen3 and Mistral have it. `response_states` reads whole
sequences, with or without gradient; `rollout/fast.py` decodes.

Both interleave queries and keys: the two entries of a head that rotate together, half a head
apart, become neighbours. They then are one complex number and the rotation is one multiplication;
scores do not change when queries and keys are reordered alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation

from opd.models import backbone
from opd.types import Batch

__all__ = [
    "SMALL",
    "SMALL_BYTES",
    "interleave",
    "pairs",
    "response_states",
    "rotate",
    "rotation",
    "why_generic",
    "why_not_fast",
]

SMALL_BYTES = 64 * 2**20
"""Float32 weights of at most this many bytes are small: beyond, products of matrices are nearly
all the work, and the model's own forward wastes little."""

SMALL = "a small float32 model of Llama-like shape, on a CPU"
"""Why `response_states` takes its fast path, where it does."""

SHORT = 128
"""Up to this length attention is quicker with all its weights written out than block by block."""

_FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
"""By `model_type`: what the names of the family's classes begin with."""

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_MAY_HAVE_BIAS = ("q_proj", "k_proj", "v_proj")
_PROJECTIONS = {
    "self_attn": (*_MAY_HAVE_BIAS, "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_NORMS = ("norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")

_OWN_PARTS = {
    "": "Model",
    "self_attn": "Attention",
    "mlp": "MLP",
    "rotary_emb": "RotaryEmbedding",
    **dict.fromkeys(_NORMS, "RMSNorm"),
}
"""By the place in a decoder: the family's own class."""

_SHARED_PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "embed_tokens": (nn.Embedding,),
    "layers": (nn.ModuleList,),
    "act_fn": (nn.SiLU, SiLUActivation),
    **{name: (nn.Linear,) for names in _PROJECTIONS.values() for name in names},
}


def response_states(model: nn.Module, batch: Batch) -> Float[Tensor, "N H"]:
    """Hidden states, after the final norm, that predict the batch's response rows, in their order.

    Small models are read by the fast path, others by their own forward; `why_generic` tells which
    and why. Both agree within rounding, and both carry the gradient. Sequences are padded on the
    right, so causal attention never looks at the padding.
    """
    if not batch.model_inputs and why_generic(model) is None:
        return _read(model, batch)
    states = backbone(model)(input_ids=batch.input_ids, use_cache=False, **batch.model_inputs)
    hidden: Tensor = states.last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.row_index)


# --------------------------------------------------------------------------------------------
# What is supported


def why_generic(model: nn.Module) -> str | None:
    """Why `response_states` takes the model's own forward; None where it does not.

    The fast path pays where operations are small and what they work on stays in the processor's
    own cache: for small float32 models on a CPU.
    """
    size = 0
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is None:
                continue
            if type(weight) is not nn.Parameter:
                return "its weights are sharded or quantised"
            if weight.device.type != "cpu":
                return "it is not on a CPU"
            if weight.dtype != torch.float32:
                return "its weights are not float32"
            size += weight.nbytes
    if size > SMALL_BYTES:
        return f"its weights take more than {SMALL_BYTES // 2**20} MiB"
    return _shape_obstacle(model)


def why_not_fast(model: nn.Module) -> str | None:
    """What keeps a model from having the shape, in one place; None where nothing does."""
    return _shape_obstacle(model) or _placement_obstacle(model)


def _shape_obstacle(model: nn.Module) -> str | None:
    if hasattr(model, "peft_config"):
        return "it has adapters"
    config = cast(Any, model).config
    if config.model_type not in _FAMILIES:
        return f"its family, {config.model_type}, is not one of {', '.join(_FAMILIES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    base = cast(Any, backbone(model))
    return (
        _hook_obstacle(model)
        or _replacement_obstacle(config.model_type, base)
        or _attention_obstacle(config, base)
        or _bias_obstacle(base)
    )


def _hook_obstacle(model: nn.Module) -> str | None:
    for module in model.modules():
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return f"its {type(module).__name__} has hooks, which would not be called"
    return None


def _replacement_obstacle(family: str, base: nn.Module) -> str | None:
    """What of the decoder is not the family's own: a subclass, another class, another forward."""
    for name, module in base.named_modules():
        if not _is_own_part(family, name.rpartition(".")[2], type(module)):
            return f"its {name or 'decoder'} is a {type(module).__name__}, not {family}'s own"
        if "forward" in vars(module):
            return f"the forward of its {name or 'decoder'} was replaced"
    return None


def _is_own_part(family: str, place: str, kind: type[nn.Module]) -> bool:
    if place in _SHARED_PARTS:
        return kind in _SHARED_PARTS[place]
    role = "DecoderLayer" if place.isdigit() else _OWN_PARTS.get(place)
    own = f"transformers.models.{family}.modeling_{family}"
    return (kind.__module__, kind.__name__) == (own, f"{_FAMILIES[family]}{role}")


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


def _bias_obstacle(base: Any) -> str | None:
    for layer in base.layers:
        for owner, names in _PROJECTIONS.items():
            modules = getattr(layer, owner)._modules
            for name in names:
                if modules[name].bias is not None and name not in _MAY_HAVE_BIAS:
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
# Shape and rotation


@dataclass(frozen=True)
class Shape:
    """The heads of a model; those of queries come first, then keys, then values."""

    n_query: int
    n_key: int
    head_dim: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        config = cast(Any, model).config
        head_dim: int = cast(Any, backbone(model)).layers[0].self_attn.head_dim
        return cls(config.num_attention_heads, config.num_key_value_heads, head_dim)

    @property
    def n_turned(self) -> int:
        """Queries and keys."""
        return self.n_query + self.n_key

    @property
    def n_heads(self) -> int:
        return self.n_query + 2 * self.n_key


def rotation(model: nn.Module, length: int) -> Tensor:
    """The complex factor of every position and pair of entries, `[length, D / 2]`.

    Angles are taken in float32 whatever the weights are, as the models themselves do.
    """
    rotary = cast(Any, backbone(model)).rotary_emb
    frequencies = rotary.inv_freq.float()
    positions = torch.arange(length, device=frequencies.device).float()
    angles = torch.outer(positions, frequencies)
    return torch.polar(torch.full_like(angles, rotary.attention_scaling), angles)


def rotate(heads: Float[Tensor, "*n D"], turn: Tensor) -> Float[Tensor, "*n D"]:
    """Interleaved heads times the complex factors of their pairs."""
    return torch.view_as_real(pairs(heads) * turn).flatten(-2)


def pairs(heads: Float[Tensor, "*n D"]) -> Tensor:
    """Neighbours as one complex number each; a view."""
    return torch.view_as_complex(heads.view(*heads.shape[:-1], -1, 2))


def interleave(heads: Shaped[Tensor, "*n D"]) -> Shaped[Tensor, "*n D"]:
    """Entries half a head apart, side by side."""
    return heads.reshape(*heads.shape[:-1], 2, -1).transpose(-1, -2).flatten(-2)


# --------------------------------------------------------------------------------------------
# Reading whole sequences
#
# Tokens are packed: no operation but attention sees padding. Derivatives are written out, since
# left to itself autograd takes about twice as many passes over memory.


def _read(model: nn.Module, batch: Batch) -> Float[Tensor, "N H"]:
    base, shape = cast(Any, backbone(model)), Shape.of(model)
    places = _Places.of(batch, shape)
    turn = _turn(model, places, shape)
    x: Tensor = base.embed_tokens(batch.input_ids.flatten().index_select(0, places.tokens))
    for layer in base.layers:
        attention, norm = layer.self_attn, layer.input_layernorm
        heads = _project_heads(attention, norm, x, shape, turn)
        is_last = layer is base.layers[-1]
        attended = _attend(heads, places, only_rows=is_last)
        if is_last:
            x = x.index_select(0, places.rows)
        x = torch.addmm(x, attended, attention.o_proj.weight.T)
        x = _feed_forward(layer.mlp, layer.post_attention_layernorm, x)
    hidden: Tensor = cast(Any, _Norm).apply(x, base.norm.weight, base.norm.variance_epsilon)
    return hidden


def _turn(model: nn.Module, places: _Places, shape: Shape) -> Tensor:
    """The complex factor of every token, query or key, and pair: rotation and scale of scores."""
    base = cast(Any, backbone(model))
    turn = rotation(model, places.length)[:, None].repeat(1, shape.n_turned, 1)
    turn[:, : shape.n_query] *= base.layers[0].self_attn.scaling
    return turn.to(base.embed_tokens.weight.dtype.to_complex()).index_select(0, places.position)


def _project_heads(
    attention: Any, norm: Any, x: Float[Tensor, "n H"], shape: Shape, turn: Tensor
) -> Float[Tensor, "n Hall D"]:
    """Queries and keys, interleaved and rotated, and values."""
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([linear.weight for linear in linears])
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = torch.cat([_bias_or_zeros(linear) for linear in linears])
    gain, eps = None, 0.0
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm.weight, attention.k_norm.weight
        gain = torch.cat((query.expand(shape.n_query, -1), key.expand(shape.n_key, -1)))
        eps = attention.q_norm.variance_epsilon
    heads: Tensor = cast(Any, _Heads).apply(
        x, norm.weight, weight, bias, gain, shape, turn, norm.variance_epsilon, eps
    )
    return heads


def _attend(
    heads: Float[Tensor, "n Hall D"], places: _Places, *, only_rows: bool
) -> Float[Tensor, "m HqD"]:
    """Causal attention of every token, or of the wanted ones; queries come scaled."""
    shape, length = places.shape, places.length
    if length <= SHORT:
        attended: Tensor = cast(Any, _ShortAttention).apply(heads, places, only_rows)
        return attended
    padded = heads.index_select(0, places.padded).view(-1, length, *heads.shape[1:]).transpose(1, 2)
    query, key, value = padded.split_with_sizes((shape.n_query, shape.n_key, shape.n_key), 1)
    far = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=1.0, enable_gqa=True
    )
    tokens = places.tokens[places.rows] if only_rows else places.tokens
    return far.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, tokens)


def _feed_forward(mlp: Any, norm: Any, x: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
    weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    result: Tensor = cast(Any, _FeedForward).apply(x, norm.weight, *weights, norm.variance_epsilon)
    return result


def _bias_or_zeros(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


@dataclass(frozen=True)
class _Places:
    """Where the n tokens of B sequences are, packed and padded to a length of L.

    Attributes:
        tokens: of every token, its place in `[B L]`.
        position: of every token, in its sequence.
        rows: the tokens whose states are wanted.
        padded: of every place in `[B L]`, its token; for padding the last one of the sequence.
        spread: of `[3 Hq B L]` padded heads (queries, keys and values, as many of each), their
            places in the packed `[n Hall]`.
        gathered: of `[n 3 Hq]`, the way back.
    """

    shape: Shape
    length: int
    tokens: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    rows: Int[Tensor, " N"]
    padded: Int[Tensor, " BL"]
    spread: Int[Tensor, " three_Hq_B_L"]
    gathered: Int[Tensor, "n three_Hq"]

    @classmethod
    def of(cls, batch: Batch, shape: Shape) -> _Places:
        lengths, length = batch.lengths[:, None], batch.input_ids.shape[1]
        columns = torch.arange(length)
        tokens = (columns < lengths).flatten().nonzero().squeeze(1)
        padded = (lengths.cumsum(0) - lengths + torch.minimum(columns, lengths - 1)).flatten()
        heads = _head_of(shape)
        return cls(
            shape=shape,
            length=length,
            tokens=tokens,
            position=tokens % length,
            rows=padded.index_select(0, batch.row_index),
            padded=padded,
            spread=(heads[:, None] + padded * shape.n_heads).flatten(),
            gathered=tokens[:, None] + torch.arange(len(heads)) * len(padded),
        )


@lru_cache(maxsize=8)
def _head_of(shape: Shape) -> Int[Tensor, " three_Hq"]:
    """For each query head: itself, its key and its value."""
    query = torch.arange(shape.n_query)
    key = shape.n_query + query // (shape.n_query // shape.n_key)
    return torch.cat((query, key, key + shape.n_key))


class _Norm(torch.autograd.Function):
    """`weight * x / size`, `size = sqrt(mean(x^2) + eps)` over the last axis."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "n H"], weight: Float[Tensor, " H"], eps: float
    ) -> Float[Tensor, "n H"]:
        unit, size = _unit(x, eps)
        ctx.save_for_backward(unit, size, weight)
        return _times(unit, weight, ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, size, weight = ctx.saved_tensors
        for_x = _unit_gradient(gradient * weight, unit).div_(size)
        return for_x, (gradient * unit).sum(0), None


class _Heads(torch.autograd.Function):
    """Norm, projection, norm of queries and keys (where there is a `gain`), rotation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "n H"],
        norm: Float[Tensor, " H"],
        weight: Float[Tensor, "HallD H"],
        bias: Float[Tensor, " HallD"] | None,
        gain: Float[Tensor, "Hqk D"] | None,
        shape: Shape,
        turn: Tensor,
        eps: float,
        head_eps: float,
    ) -> Float[Tensor, "n Hall D"]:
        order, _ = _interleaved_rows(shape)
        weight = weight.index_select(0, order)
        unit, size = _unit(x, eps)
        normed = _times(unit, norm, ctx)
        if bias is None:
            flat = torch.mm(normed, weight.T)
        else:
            flat = torch.addmm(bias.index_select(0, order), normed, weight.T)
        heads = flat.view(len(x), shape.n_heads, shape.head_dim)
        turned = heads[:, : shape.n_turned]
        head_unit = head_size = None
        if gain is None:
            pairs(turned).mul_(turn)
        else:
            gain = interleave(gain)
            head_unit, head_size = _unit(turned, head_eps)
            torch.mul(pairs(_times(head_unit, gain, ctx)), turn, out=pairs(turned))
        ctx.shape, ctx.has_bias = shape, bias is not None
        ctx.save_for_backward(unit, size, norm, normed, weight, gain, turn, head_unit, head_size)
        return heads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        unit, size, norm, normed, weight, gain, turn, head_unit, head_size = ctx.saved_tensors
        n_turned, (_, order) = ctx.shape.n_turned, _interleaved_rows(ctx.shape)
        heads = torch.empty_like(gradient)
        heads[:, n_turned:] = gradient[:, n_turned:]
        turned = heads[:, :n_turned]
        for_gain = None
        if gain is None:
            torch.mul(pairs(gradient[:, :n_turned]), turn.conj(), out=pairs(turned))
        else:
            unturned = rotate(gradient[:, :n_turned], turn.conj())
            for_gain = _apart((unturned * head_unit).sum(0))
            torch.div(_unit_gradient(unturned.mul_(gain), head_unit), head_size, out=turned)
        flat = heads.flatten(1)
        for_bias = flat.sum(0).index_select(0, order) if ctx.has_bias else None
        for_weight = torch.mm(flat.T, normed).index_select(0, order)
        for_normed = torch.mm(flat, weight)
        for_norm = (for_normed * unit).sum(0)
        for_x = _unit_gradient(for_normed.mul_(norm), unit).div_(size)
        return for_x, for_norm, for_weight, for_bias, for_gain, None, None, None, None


class _ShortAttention(torch.autograd.Function):
    """Causal attention with its weights written out, from packed heads to packed results."""

    @staticmethod
    def forward(
        ctx: Any, heads: Float[Tensor, "n Hall D"], places: _Places, only_rows: bool
    ) -> Float[Tensor, "m HqD"]:
        length, head_dim, n_query = places.length, heads.shape[2], places.shape.n_query
        spread = heads.view(-1, head_dim).index_select(0, places.spread)
        query, key, value = spread.view(3, -1, length, head_dim)
        future = heads.new_full((1, length, length), -math.inf).triu(1)
        weights = torch.baddbmm(future, query, key.transpose(1, 2)).softmax(-1)
        attended = torch.bmm(weights, value).view(-1, head_dim)
        back = places.gathered[:, :n_query]
        if only_rows:
            back = back.index_select(0, places.rows)
        back = back.flatten()
        ctx.places = places
        ctx.save_for_backward(query, key, value, weights, back)
        return attended.index_select(0, back).view(-1, n_query * head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, back = ctx.saved_tensors
        places, head_dim = ctx.places, query.shape[2]
        padded = query.new_zeros(query.shape)
        padded.view(-1, head_dim).index_copy_(0, back, gradient.reshape(-1, head_dim))
        for_weights = torch.bmm(padded, value.transpose(1, 2))
        for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)
        spread = query.new_empty(3, *query.shape)
        torch.bmm(for_scores, key, out=spread[0])
        torch.bmm(for_scores.transpose(1, 2), query, out=spread[1])
        torch.bmm(weights.transpose(1, 2), padded, out=spread[2])
        gathered = spread.view(-1, head_dim).index_select(0, places.gathered.flatten())
        heads = gathered.view(len(places.tokens), -1, head_dim)
        return _sum_shared(heads, places.shape), None, None


class _FeedForward(torch.autograd.Function):
    """`x + down(silu(gate(normed)) * up(normed))`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "n H"],
        norm: Float[Tensor, " H"],
        gate: Float[Tensor, "F H"],
        up: Float[Tensor, "F H"],
        down: Float[Tensor, "H F"],
        eps: float,
    ) -> Float[Tensor, "n H"]:
        unit, size = _unit(x, eps)
        normed = _times(unit, norm, ctx)
        closed, width = torch.mm(normed, gate.T), torch.mm(normed, up.T)
        opened = functional.silu(closed)
        inner = _times(opened, width, ctx)
        ctx.save_for_backward(
            unit, size, norm, normed, gate, up, down, closed, width, opened, inner
        )
        return torch.addmm(x, inner, down.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        unit, size, norm, normed, gate, up, down, closed, width, opened, inner = ctx.saved_tensors
        for_down = torch.mm(gradient.T, inner)
        for_inner = torch.mm(gradient, down)
        for_width = for_inner * opened
        for_closed = torch.ops.aten.silu_backward(for_inner.mul_(width), closed)
        for_normed = torch.mm(for_closed, gate).addmm_(for_width, up)
        for_norm = (for_normed * unit).sum(0)
        inward = _unit_gradient(for_normed.mul_(norm), unit)
        return (
            torch.addcdiv(gradient, inward, size),
            for_norm,
            torch.mm(for_closed.T, normed),
            torch.mm(for_width.T, normed),
            for_down,
            None,
        )


def _times(x: Float[Tensor, "*n H"], factor: Tensor, ctx: Any) -> Float[Tensor, "*n H"]:
    """The product, in the place of `x` where no derivative will ask for it."""
    return x * factor if any(ctx.needs_input_grad) else x.mul_(factor)


def _unit(x: Float[Tensor, "*n H"], eps: float) -> tuple[Tensor, Tensor]:
    """`x / size` and `size = sqrt(mean(x^2) + eps)` over the last axis."""
    width = x.shape[-1]
    floor = x.new_full((), math.sqrt(width * eps))
    size = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)
    size.mul_(1 / math.sqrt(width))
    return x / size, size


def _unit_gradient(gradient: Float[Tensor, "*n H"], unit: Float[Tensor, "*n H"]) -> Tensor:
    """The gradient of `x`, times `size`, from that of its `unit`."""
    along = (gradient * unit).mean(-1, keepdim=True)
    return torch.addcmul(gradient, unit, along, value=-1)


def _sum_shared(heads: Float[Tensor, "n three_Hq D"], shape: Shape) -> Float[Tensor, "n Hall D"]:
    """One key and value for all the queries that share it."""
    if shape.n_query == shape.n_key:
        return heads
    shared = heads[:, shape.n_query :].reshape(len(heads), 2 * shape.n_key, -1, shape.head_dim)
    return torch.cat((heads[:, : shape.n_query], shared.sum(2)), 1)


@lru_cache(maxsize=8)
def _interleaved_rows(shape: Shape) -> tuple[Int[Tensor, " HallD"], Int[Tensor, " HallD"]]:
    """Which rows the projections to all heads have when interleaved, and the way back."""
    rows = torch.arange(shape.n_heads * shape.head_dim).view(-1, shape.head_dim)
    rows[: shape.n_turned] = interleave(rows[: shape.n_turned])
    return rows.flatten(), rows.flatten().argsort()


def _apart(heads: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    return heads.reshape(*heads.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)

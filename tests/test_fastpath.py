"""The fast path against the models' own forward, and its derivatives against finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import opd.fastpath as fastpath
from opd.fastpath import (
    Shape,
    _FeedForward,
    _Heads,
    _Norm,
    _Places,
    _ShortAttention,
    response_states,
    why_generic,
    why_not_fast,
)
from opd.models import LoadedModel, LoraSettings, backbone, load_model
from opd.rollout.local import LocalSampler
from opd.rollout.pack import pack_rollout, split
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.types import Batch, Provenance, Rollout
from tests.models_zoo import PAD, tiny

LENGTHS = (9, 4, 12, 1, 7)
TOLERANCE = 1e-5


def build(family: str, **overrides: Any) -> LoadedModel:
    """A tiny model; Mistral without its sliding window, which the fast path refuses."""
    if family == "mistral":
        overrides = {"sliding_window": None, **overrides}
    return tiny(family, **overrides)


def make_batch(lengths: Sequence[int] = LENGTHS, *, pad_id: int = PAD, prompt: int = 1) -> Batch:
    """Random sequences whose first tokens are a prompt, the rest a response of theirs."""
    generator = torch.Generator().manual_seed(3)
    prompts = [
        tuple(torch.randint(3, 53, (prompt,), generator=generator).tolist()) for _ in lengths
    ]
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, 53, mask.shape, generator=generator)
    tokens[0, 1] = PAD  # a student may write its padding token
    rollout = Rollout(
        prompt_ids=tuple(prompts),
        tokens=tokens,
        mask=mask,
        provenance=torch.where(mask, int(Provenance.STUDENT), int(Provenance.PADDING)),
        sampler_logp=torch.zeros(mask.shape),
        policy_version=torch.zeros(mask.shape, dtype=torch.long),
        group=torch.arange(len(lengths)),
        stop_reason=("eos",) * len(lengths),
        verdict=torch.full((len(lengths),), float("nan")),
    )
    return pack_rollout(rollout, pad_id=pad_id)


def own_states(model: nn.Module, batch: Batch) -> Tensor:
    """Hidden states by the model's own forward, one unpadded sequence at a time."""
    states = torch.zeros(*batch.input_ids.shape, 0)
    found = []
    for ids, length in zip(batch.input_ids, batch.lengths.tolist(), strict=True):
        hidden = backbone(model)(input_ids=ids[None, :length]).last_hidden_state[0]
        found.append(nn.functional.pad(hidden, (0, 0, 0, states.shape[1] - length)))
    return torch.stack(found).flatten(0, 1)[batch.row_index]


def gradients(model: nn.Module, states: Tensor) -> dict[str, Tensor]:
    """Of a random function of the states, by every parameter that has one."""
    for parameter in model.parameters():
        parameter.grad = None
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
    (states * direction).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": False, "head_dim": 8}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("qwen2", {}),
    ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("qwen3", {}),
    ("qwen3", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("mistral", {}),
]


@pytest.mark.parametrize("short", [fastpath.SHORT, 5])
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_states_and_gradients_equal_those_of_the_models_own_forward(
    family: str, overrides: dict[str, Any], short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastpath, "SHORT", short)  # 5: attention block by block
    model, batch = build(family, **overrides).model, make_batch()
    assert why_generic(model) is None
    ours, theirs = response_states(model, batch), own_states(model, batch)
    assert (ours - theirs).abs().max() <= TOLERANCE
    expected = gradients(model, theirs)
    found = gradients(model, ours)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


def test_double_precision_agrees_with_a_literal_model() -> None:
    """The models compute their norms in float32 whatever they are stored in; this one does not."""
    model, batch = build("qwen3", num_key_value_heads=1).model.double(), make_batch()
    with torch.no_grad():
        ours = fastpath._read(model, batch)
        theirs = literal_states(model, batch)
    assert ours.dtype == torch.float64
    assert (ours - theirs).abs().max() <= 1e-10


def literal_states(model: Any, batch: Batch) -> Tensor:
    """Qwen3 with one key head, operation by operation, on padded sequences."""
    base, length = backbone(model), batch.input_ids.shape[1]
    turn = fastpath.rotation(model, length).to(torch.complex128)

    def norm(layer: Any, x: Tensor) -> Tensor:
        size = (x.square().mean(-1, keepdim=True) + layer.variance_epsilon).sqrt()
        return x / size * layer.weight

    def rotated(x: Tensor) -> Tensor:  # [B, L, heads, D]
        first, second = x.chunk(2, -1)
        whole = torch.complex(first, second) * turn[:, None]
        return torch.cat((whole.real, whole.imag), -1)

    x = base.embed_tokens.weight[batch.input_ids]
    for layer in base.layers:
        attention, normed = layer.self_attn, norm(layer.input_layernorm, x)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query = rotated(norm(attention.q_norm, query))
        key = rotated(norm(attention.k_norm, key))
        scores = torch.einsum("blhd,bmkd->bhlm", query, key) / attention.head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        attended = torch.einsum("bhlm,bmkd->blhd", scores.softmax(-1), value)
        x = x + attention.o_proj(attended.flatten(2))
        normed, mlp = norm(layer.post_attention_layernorm, x), layer.mlp
        opened = nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        x = x + mlp.down_proj(opened)
    return norm(base.norm, x).flatten(0, 1)[batch.row_index]


def test_padding_is_never_seen() -> None:
    model = build("llama").model
    with torch.no_grad():
        first, second = (response_states(model, make_batch(pad_id=pad)) for pad in (PAD, 40))
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


def test_micro_batches_of_any_size_give_the_same_states() -> None:
    model, batch = build("qwen2").model, make_batch()
    with torch.no_grad():
        whole = response_states(model, batch)
        for max_tokens in (1, 20, 30):
            for part in split(batch, max_tokens=max_tokens):
                found = response_states(model, part.batch)
                assert (found - whole[part.rows]).abs().max() <= TOLERANCE


def test_frozen_weights_get_no_gradient_and_the_rest_theirs() -> None:
    model, batch = build("qwen3").model, make_batch()
    everything = gradients(model, response_states(model, batch))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    some = gradients(model, response_states(model, batch))
    assert some.keys() == {name for name in everything if "mlp" in name}
    assert all(torch.equal(some[name], everything[name]) for name in some)


# --------------------------------------------------------------------------------------------
# The operations


def random_double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_derivative_of_heads(gained: bool, biased: bool) -> None:
    shape = Shape(n_query=2, n_key=1, head_dim=4)
    x, norm, weight = random_double(3, 5), random_double(5), random_double(16, 5)
    bias = random_double(16) if biased else None
    gain = random_double(3, 4) if gained else None
    turn = torch.polar(torch.ones(3, 3, 2).double(), torch.randn(3, 3, 2).double())
    assert torch.autograd.gradcheck(
        lambda *tensors: _Heads.apply(*tensors, shape, turn, 1e-2, 1e-2),
        (x, norm, weight, bias, gain),
    )


def test_the_derivative_of_the_feed_forward_layer() -> None:
    weights = (random_double(6, 4), random_double(6, 4), random_double(4, 6))
    assert torch.autograd.gradcheck(
        lambda *tensors: _FeedForward.apply(*tensors, 1e-2),
        (random_double(3, 4), random_double(4), *weights),
    )


def test_the_derivative_of_the_norm() -> None:
    assert torch.autograd.gradcheck(
        lambda x, weight: _Norm.apply(x, weight, 1e-2), (random_double(3, 4), random_double(4))
    )


@pytest.mark.parametrize("only_rows", [True, False])
@pytest.mark.parametrize("n_key", [1, 2])
def test_the_derivative_of_attention(n_key: int, only_rows: bool) -> None:
    shape = Shape(n_query=2, n_key=n_key, head_dim=4)
    places = _Places.of(make_batch((3, 1, 2), prompt=2), shape)
    heads = random_double(len(places.tokens), shape.n_heads, 4)
    assert torch.autograd.gradcheck(
        lambda heads: _ShortAttention.apply(heads, places, only_rows), (heads,)
    )


# --------------------------------------------------------------------------------------------
# Which path


@pytest.mark.parametrize(
    ("family", "reason"), [("gemma2", "family"), ("phi3", "family"), ("gpt_neox", "family")]
)
def test_other_families_are_read_by_their_own_forward(family: str, reason: str) -> None:
    model, batch = tiny(family).model, make_batch()
    assert reason in str(why_generic(model))
    with torch.no_grad():
        assert (response_states(model, batch) - own_states(model, batch)).abs().max() <= TOLERANCE


def test_what_keeps_a_model_from_the_fast_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sliding" in str(why_generic(tiny("mistral", sliding_window=4).model))
    assert "bias" in str(why_generic(tiny("llama", mlp_bias=True).model))
    assert "float32" in str(why_generic(tiny("llama").model.bfloat16()))
    lora = load_model("builtin:sort-student", lora=LoraSettings(r=2))
    assert "adapters" in str(why_generic(lora.model))
    monkeypatch.setattr(fastpath, "SMALL_BYTES", 1000)
    assert "more than" in str(why_generic(tiny("llama").model))


class ShiftedNorm(LlamaRMSNorm):
    """A norm whose gain counts from one, as Gemma's does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("norm", ShiftedNorm(32)),
        ("layers.0.input_layernorm", nn.LayerNorm(32)),
        ("layers.1.mlp", nn.Linear(32, 32)),
        ("layers.1.mlp", nn.Identity()),
        ("layers.0.mlp.act_fn", nn.GELU()),
        ("layers.0.mlp.up_proj", nn.Sequential(nn.Linear(32, 64, bias=False))),
    ],
)
def test_a_replaced_part_is_heard_in_training_and_in_sampling(place: str, part: nn.Module) -> None:
    loaded, batch = tiny("llama"), make_batch()
    backbone(loaded.model).set_submodule(place, part)
    assert f"its {place} is a {type(part).__name__}" in str(why_generic(loaded.model))
    assert LocalSampler(loaded).path == "generic"
    with torch.no_grad():
        states = response_states(loaded.model, batch)
    assert (states - own_states(loaded.model, batch)).abs().max() <= TOLERANCE


def test_a_replaced_forward_is_called() -> None:
    model, batch = tiny("llama").model, make_batch()
    norm: Any = backbone(model).norm
    plain = norm.forward
    norm.forward = lambda states: 2 * plain(states)
    assert "the forward of its norm was replaced" in str(why_generic(model))
    with torch.no_grad():
        doubled = response_states(model, batch)
        norm.forward = plain
        assert (doubled - 2 * own_states(model, batch)).abs().max() <= TOLERANCE


def test_hooks_are_called_because_their_owner_takes_the_models_own_forward() -> None:
    model, seen = tiny("llama").model, []
    assert isinstance(model, LlamaForCausalLM)
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(True))
    assert "hooks" in str(why_generic(model))
    assert "hooks" in str(why_not_fast(model))
    with torch.no_grad():
        response_states(model, make_batch())
    assert seen
    handle.remove()
    assert why_generic(model) is None


def test_student_and_teacher_say_which_path_they_take() -> None:
    for owner in (Student(tiny("llama")), LocalTeacher(tiny("llama"), vocab_size=53)):
        assert owner.path == "fast"
        assert owner.path_reason == fastpath.SMALL
    student = Student(tiny("phi"))
    assert (student.path, "family" in student.path_reason) == ("generic", True)

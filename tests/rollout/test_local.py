"""The local engine against re-forwards of the same model and literal computations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from tests.models_zoo import EOS, FAMILIES, tiny, tiny_tokenizer
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import opd.rollout.fast as fast_module
import opd.rollout.local as local
from opd.errors import ConfigError, DataError, TrainingError
from opd.models import LoadedModel, backbone, project, unembedding, wrap_model
from opd.rollout.fast import FastDecoder, why_not_fast
from opd.rollout.local import LocalSampler
from opd.types import Prompt, Provenance, Rollout, SamplerSettings

FAST_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
TOLERANCE = 1e-5


def build(family: str, **overrides: Any) -> LoadedModel:
    """A tiny model; Mistral without its sliding window, which the fast path refuses."""
    if family == "mistral":
        overrides = {"sliding_window": None, **overrides}
    return tiny(family, **overrides)


def make_prompts(*lengths: int) -> list[Prompt]:
    drawn = torch.Generator().manual_seed(7)
    return [
        Prompt(str(i), tuple(torch.randint(3, 53, (n,), generator=drawn).tolist()), text="")
        for i, n in enumerate(lengths)
    ]


UNEVEN = make_prompts(5, 9, 5, 1)


def sample(
    loaded: LoadedModel,
    prompts: Sequence[Prompt] = UNEVEN,
    *,
    seed: int = 0,
    fast: bool | None = None,
    **settings: Any,
) -> Rollout:
    sampler = LocalSampler(loaded, fast=fast)
    generator = torch.Generator().manual_seed(seed)
    return sampler.sample(prompts, SamplerSettings(**settings), generator=generator)


@torch.no_grad()
def response_logits(loaded: LoadedModel, rollout: Rollout) -> Tensor:
    """Logits `[B, T, V]` of every response position, one unpadded sequence at a time."""
    head = unembedding(loaded.model, loaded.vocab_size)
    full = torch.zeros(*rollout.tokens.shape, loaded.vocab_size)
    for row, prompt in enumerate(rollout.prompt_ids):
        n = int(rollout.lengths[row])
        ids = torch.tensor([*prompt, *rollout.tokens[row, :n].tolist()])[None]
        hidden = backbone(loaded.model)(input_ids=ids).last_hidden_state[0]
        full[row, :n] = project(hidden[len(prompt) - 1 : -1], head)
    return full


def logp_error(loaded: LoadedModel, rollout: Rollout) -> float:
    """Largest difference of `sampler_logp` from the log-softmax of a re-forward."""
    log_probs = response_logits(loaded, rollout).log_softmax(-1)
    expected = log_probs.gather(2, rollout.tokens[..., None]).squeeze(2)
    return float((rollout.sampler_logp - expected)[rollout.mask].abs().max())


def literal_log_probs(logits: Tensor, settings: SamplerSettings) -> Tensor:
    """Temperature, top-k and top-p of one row of logits, token by token."""
    probability = (logits.double() / settings.temperature).softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: -float(probability[i]))
    kept = order[: settings.top_k or len(order)]
    total = sum(float(probability[i]) for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        nucleus.append(i)
        mass += float(probability[i]) / total
        if mass >= settings.top_p:
            break
    result = torch.full_like(probability, -torch.inf)
    result[nucleus] = (probability[nucleus] / probability[nucleus].sum()).log()
    return result


# --------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_logp_is_the_log_softmax_of_an_unpadded_reforward(family: str) -> None:
    loaded = build(family)
    rollout = sample(loaded, samples_per_prompt=2, max_new_tokens=12)
    assert logp_error(loaded, rollout) <= TOLERANCE
    assert (rollout.sampler_logp[~rollout.mask] == 0).all()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((family, {}) for family in FAST_FAMILIES),
        ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 2}),
        ("llama", {"tie_word_embeddings": True, "num_attention_heads": 4}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
)
@pytest.mark.parametrize("prompts", [UNEVEN, make_prompts(6, 6, 6)], ids=["uneven", "even"])
def test_fast_logits_equal_generic_ones_through_growth_and_dropped_rows(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    overrides: dict[str, Any],
    fold: bool,
    prompts: list[Prompt],
) -> None:
    monkeypatch.setattr(fast_module, "CACHE_ROOM", 3)
    monkeypatch.setattr(fast_module, "PREFILL_TOKENS", 12)
    loaded = build(family, **overrides)
    unique = [prompt.prompt_ids for prompt in prompts]
    rows = torch.tensor([0, 0, 1, 2, 2])
    with torch.no_grad():
        fast: local.Decoder = FastDecoder(
            loaded.model, unembedding(loaded.model, loaded.vocab_size), fold=fold
        )
        generic: local.Decoder[Tensor] = local._GenericDecoder(loaded, {})
        logits = fast.prefill(unique, rows, 12), generic.prefill(unique, rows, 12)
        for step in range(12):
            assert (logits[0] - logits[1]).abs().max() <= TOLERANCE
            if step == 5:
                kept = torch.tensor([0, 3, 4])
                fast.keep(kept)
                generic.keep(kept)
                logits = logits[0][kept], logits[1][kept]
            tokens = (logits[1] + torch.randn(logits[1].shape)).argmax(-1)
            logits = fast.step(tokens), generic.step(tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_both_paths_write_the_same_rollout(family: str, temperature: float) -> None:
    loaded = build(family)
    settings: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 24}
    ours, theirs = (sample(loaded, fast=fast, **settings) for fast in (True, False))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.stop_reason == theirs.stop_reason
    assert (ours.sampler_logp - theirs.sampler_logp).abs().max() <= TOLERANCE


@pytest.mark.parametrize("fast", [True, False])
def test_greedy_responses_equal_those_of_transformers_generate(fast: bool) -> None:
    loaded = build("qwen3")
    rollout = sample(loaded, fast=fast, temperature=0.0, max_new_tokens=20)
    for row, prompt in enumerate(UNEVEN):
        ids = torch.tensor([prompt.prompt_ids])
        mask = torch.ones_like(ids)
        written: Any = loaded.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=20
        )
        assert (
            rollout.tokens[row, : rollout.lengths[row]].tolist()
            == written[0, ids.shape[1] :].tolist()
        )
    assert (rollout.sampler_logp == 0).all()


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 1.4, "top_k": 12, "top_p": 0.9},
    ],
)
def test_draws_follow_the_stated_distribution(knobs: dict[str, Any]) -> None:
    """Pearson's statistic over 20,000 first tokens, five standard deviations above its mean."""
    loaded, n = build("llama"), 20_000
    rollout = sample(
        loaded, make_prompts(4), seed=3, samples_per_prompt=n, max_new_tokens=1, **knobs
    )
    with torch.no_grad():
        ids = torch.tensor(rollout.prompt_ids[:1])
        hidden = backbone(loaded.model)(input_ids=ids).last_hidden_state[0, -1]
        logits = project(hidden, unembedding(loaded.model, loaded.vocab_size))
    log_probs = literal_log_probs(logits, SamplerSettings(**knobs))
    drawn = rollout.tokens.squeeze(1)
    assert (rollout.sampler_logp.squeeze(1) - log_probs[drawn]).abs().max() <= TOLERANCE

    expected = n * log_probs.exp()
    observed = drawn.bincount(minlength=len(expected)).double()
    assert (observed[expected == 0] == 0).all()
    common = expected >= 5
    cells = torch.stack((expected, observed))
    cells = torch.cat((cells[:, common], cells[:, ~common].sum(1, keepdim=True)), 1)
    cells = cells[:, cells[0] > 0]
    statistic = float(((cells[1] - cells[0]) ** 2 / cells[0]).sum())
    freedom = cells.shape[1] - 1
    assert freedom >= 2
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5


def test_later_tokens_are_recorded_under_the_truncated_distribution() -> None:
    loaded = build("qwen2")
    settings = SamplerSettings(temperature=0.8, top_k=9, top_p=0.85, max_new_tokens=10)
    rollout = LocalSampler(loaded).sample(UNEVEN, settings, generator=torch.Generator())
    logits = response_logits(loaded, rollout)
    for row, step in rollout.mask.nonzero().tolist():
        expected = literal_log_probs(logits[row, step], settings)[rollout.tokens[row, step]]
        assert abs(float(rollout.sampler_logp[row, step] - expected)) <= TOLERANCE


def test_inverse_cdf_never_picks_a_token_without_mass() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (1 - 2**-50, 3)):
        drawn = local.inverse_cdf(probabilities, torch.tensor([[uniform]], dtype=torch.float64))
        assert drawn.item() == token


@pytest.mark.parametrize("fast", [True, False])
def test_padding_rows_of_the_vocabulary_are_never_written(fast: bool) -> None:
    loaded = build("llama", padded_to=64)
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[53:] *= 50
    rollout = sample(loaded, fast=fast, samples_per_prompt=20, student_top_k=3)
    assert rollout.sampler_top_ids is not None
    assert rollout.tokens.max() < 53
    assert rollout.sampler_top_ids.max() < 53


@pytest.mark.parametrize("fast", [True, False])
def test_top_ids_are_those_of_the_untouched_distribution(fast: bool) -> None:
    loaded = build("qwen3")
    rollout = sample(loaded, fast=fast, student_top_k=4, temperature=0.5, top_k=2, top_p=0.5)
    assert rollout.sampler_top_ids is not None
    expected = response_logits(loaded, rollout).topk(4).indices
    assert torch.equal(rollout.sampler_top_ids[rollout.mask], expected[rollout.mask])
    assert rollout.sampler_top_ids.shape == (*rollout.tokens.shape, 4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # raised in peft
def test_an_active_adapter_takes_part() -> None:
    loaded = build("qwen3")
    plain = sample(loaded, max_new_tokens=8)
    loaded.model = peft.get_peft_model(
        loaded.model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    )
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    sampler = LocalSampler(loaded)
    assert sampler.path == "generic"
    assert "adapters" in sampler.path_reason
    rollout = sample(loaded, max_new_tokens=8)
    assert not torch.equal(plain.tokens[:, :1], rollout.tokens[:, :1])
    assert logp_error(loaded, rollout) <= TOLERANCE


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_weights_give_float32_log_probs(fast: bool) -> None:
    loaded = build("qwen3")
    loaded.model = loaded.model.to(torch.bfloat16)
    rollout = sample(loaded, fast=fast, max_new_tokens=6)
    loaded.model = loaded.model.to(torch.float32)
    assert rollout.sampler_logp.dtype == torch.float32
    assert 0 < logp_error(loaded, rollout) < 0.3


# --------------------------------------------------------------------------------------------
# Randomness


def test_a_seed_means_one_rollout_and_the_global_generator_is_left_alone() -> None:
    loaded = build("qwen3")
    before = torch.random.get_rng_state()
    first, again, other = (sample(loaded, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first[:, :4], other[:, :4])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("fast", [True, False])
def test_dropping_ended_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    loaded = build("qwen3")
    loaded.eos_ids = tuple(range(2, 7))
    rollouts = []
    for threshold in (0.0, 1.0):
        monkeypatch.setattr(local, "DROP_BELOW", threshold)
        rollouts.append(sample(loaded, fast=fast, samples_per_prompt=4, max_new_tokens=40))
    assert len(set(rollouts[0].lengths.tolist())) > 4
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    assert (rollouts[0].sampler_logp - rollouts[1].sampler_logp).abs().max() <= TOLERANCE


def test_dropping_ended_rows_shrinks_the_batch_that_is_decoded() -> None:
    loaded = build("gpt_neox")
    loaded.eos_ids = tuple(range(2, 9))
    widths: list[int] = []
    backbone(loaded.model).register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sample(loaded, samples_per_prompt=8, max_new_tokens=60)
    assert widths[1] == 32
    assert widths[-1] <= 8
    assert len(widths) < 60


# --------------------------------------------------------------------------------------------
# Endings


def test_a_response_ends_with_any_end_token_and_contains_it() -> None:
    loaded = build("qwen3")
    loaded.eos_ids = (EOS, 11, 30)
    rollout = sample(loaded, samples_per_prompt=16, max_new_tokens=24)
    ends = set()
    for row, reason in enumerate(rollout.stop_reason):
        response = rollout.tokens[row, : rollout.lengths[row]].tolist()
        assert not set(response[:-1]) & set(loaded.eos_ids)
        assert (reason == "eos") == (response[-1] in loaded.eos_ids)
        assert reason == "eos" or len(response) == 24
        ends.add(response[-1] if reason == "eos" else reason)
    assert ends == {EOS, 11, 30, "length"}


@pytest.mark.parametrize("limit", [1, 3, 4, 5])
def test_no_response_is_longer_than_the_limit(limit: int) -> None:
    rollout = sample(build("llama"), samples_per_prompt=3, max_new_tokens=limit)
    assert rollout.tokens.shape == (12, limit)
    assert "length" in rollout.stop_reason


def test_a_response_ends_with_the_token_that_completes_a_stop_string() -> None:
    loaded = build("qwen3")
    stops = ("7", "B2", "XY")
    rollout = sample(loaded, samples_per_prompt=16, max_new_tokens=40, stop=stops)
    reasons = set(rollout.stop_reason)
    assert "stop_string" in reasons
    for row, reason in enumerate(rollout.stop_reason):
        response = rollout.tokens[row, : rollout.lengths[row]].tolist()
        text = loaded.tokenizer.decode(response)
        assert text.endswith(stops) == (reason == "stop_string")
        assert not any(stop in loaded.tokenizer.decode(response[:-1]) for stop in stops)


def test_an_end_token_before_a_stop_string_comes_first() -> None:
    loaded = build("qwen3")
    loaded.eos_ids = tuple(range(2, 40))
    rollout = sample(loaded, samples_per_prompt=8, max_new_tokens=40, stop=("A", "Z"))
    for row, reason in enumerate(rollout.stop_reason):
        response = rollout.tokens[row, : rollout.lengths[row]].tolist()
        assert (reason == "eos") == (response[-1] in loaded.eos_ids)
        assert not set(response[:-1]) & set(loaded.eos_ids)


# --------------------------------------------------------------------------------------------
# The record


def test_records_are_ordered_by_prompt_and_complete() -> None:
    loaded = build("llama")
    sampler = LocalSampler(loaded, provenance=Provenance.TEACHER)
    settings = SamplerSettings(samples_per_prompt=3, max_new_tokens=30)
    rollout = sampler.sample(UNEVEN, settings, generator=torch.Generator(), policy_version=5)
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [prompt.id for prompt in rollout.prompts] == [c for c in "0123" for _ in range(3)]
    assert rollout.prompt_ids[4] == UNEVEN[1].prompt_ids
    assert rollout.verdict.isnan().all()
    assert rollout.sampler_top_ids is None
    columns = torch.arange(rollout.tokens.shape[1])
    written = columns < rollout.lengths[:, None]
    assert torch.equal(rollout.mask, written)
    assert torch.equal(rollout.provenance == Provenance.TEACHER, written)
    assert torch.equal(rollout.policy_version == 5, written)
    assert (rollout.policy_version[~written] == -1).all()
    assert (rollout.tokens[~written] == loaded.pad_id).all()


def test_samples_of_equal_prompts_share_one_prefill() -> None:
    loaded = build("gpt_neox")
    shapes: list[tuple[int, ...]] = []
    backbone(loaded.model).register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sample(loaded, [*make_prompts(5, 5), *make_prompts(5)], samples_per_prompt=4)
    assert shapes[0] == (2, 5)
    assert shapes[1] == (12, 1)


def test_a_rollout_can_enter_a_graph() -> None:
    rollout = sample(build("qwen3"), max_new_tokens=4, student_top_k=2)
    weight = torch.ones((), requires_grad=True)
    (rollout.sampler_logp * weight).sum().backward()
    assert torch.allclose(weight.grad, rollout.sampler_logp.sum())
    for tensor in (rollout.tokens, rollout.sampler_top_ids, rollout.group, rollout.verdict):
        assert tensor is not None
        assert not tensor.is_inference()


@pytest.mark.parametrize("fast", [True, False])
def test_new_weights_are_seen_by_the_next_call(fast: bool) -> None:
    loaded = build("qwen3")
    sampler = LocalSampler(loaded, fast=fast)
    settings = SamplerSettings(max_new_tokens=6)
    for _ in range(2):
        rollout = sampler.sample(UNEVEN, settings, generator=torch.Generator())
        assert logp_error(loaded, rollout) <= TOLERANCE
        with torch.no_grad():
            for weight in loaded.model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))


@pytest.mark.parametrize("fast", [True, False])
def test_dropout_is_off_while_sampling_and_every_mode_is_restored(fast: bool) -> None:
    loaded = build("qwen3", attention_dropout=0.5)
    expected = sample(loaded, fast=fast)
    loaded.model.train()
    frozen = next(iter(loaded.model.children()))
    frozen.training = False
    modes = [module.training for module in loaded.model.modules()]
    assert torch.equal(sample(loaded, fast=fast).tokens, expected.tokens)
    assert [module.training for module in loaded.model.modules()] == modes


@torch.no_grad()
def test_model_inputs_reach_the_model_and_the_record() -> None:
    loaded = build("gpt2")
    plain = make_prompts(5, 5)
    typed = [
        replace(prompt, model_inputs={"token_type_ids": torch.full((1, 5), 9 + i)})
        for i, prompt in enumerate(plain)
    ]
    rollout = sample(loaded, typed, max_new_tokens=1)
    for row, prompt in enumerate(typed):
        ids = torch.tensor([prompt.prompt_ids])
        logits: Any = loaded.model(input_ids=ids, **prompt.model_inputs).logits[0, -1]
        expected = logits.log_softmax(-1)[rollout.tokens[row, 0]]
        assert abs(float(rollout.sampler_logp[row, 0] - expected)) <= TOLERANCE
        assert rollout.model_inputs[row] is prompt.model_inputs
    assert not torch.equal(
        rollout.sampler_logp, sample(loaded, plain, max_new_tokens=1).sampler_logp
    )
    as_read = [
        replace(
            prompt, model_inputs={"token_type_ids": inputs.model_inputs["token_type_ids"].tolist()}
        )
        for prompt, inputs in zip(plain, typed, strict=True)
    ]
    assert torch.equal(rollout.sampler_logp, sample(loaded, as_read, max_new_tokens=1).sampler_logp)
    with pytest.raises(DataError, match="token_type_ids"):
        sample(loaded, [typed[0], plain[1]])
    with pytest.raises(ConfigError, match="fast=False"):
        sample(build("llama"), typed)


# --------------------------------------------------------------------------------------------
# Which path, and errors


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("gemma2", {}, "family"),
        ("phi3", {}, "family"),
        ("mistral", {"sliding_window": 4}, "sliding-window"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "sliding-window",
        ),
        ("llama", {"attention_bias": True}, "o_proj has a bias"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
    ],
)
def test_unsupported_shapes_take_the_generic_path_and_say_why(
    family: str, overrides: dict[str, Any], reason: str
) -> None:
    loaded = build(family, **overrides)
    sampler = LocalSampler(loaded)
    assert sampler.path == "generic"
    assert reason in sampler.path_reason
    with pytest.raises(ConfigError, match=reason):
        LocalSampler(loaded, fast=True)


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_supported_shapes_take_the_fast_path(family: str) -> None:
    loaded = build(family)
    assert why_not_fast(loaded.model, unembedding(loaded.model, loaded.vocab_size)) is None
    assert LocalSampler(loaded).path == "fast"
    assert LocalSampler(loaded, fast=False).path == "generic"


@pytest.mark.parametrize("fast", [None, False])
@pytest.mark.parametrize("window", [4, None])
def test_a_sliding_window_is_respected(window: int | None, fast: bool | None) -> None:
    loaded = build("mistral", sliding_window=window)
    rollout = sample(loaded, fast=fast, max_new_tokens=16)
    assert logp_error(loaded, rollout) <= TOLERANCE


def test_a_recurrent_model_reads_prompts_of_different_lengths_without_padding() -> None:
    config = Qwen3NextConfig(
        vocab_size=53,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        mlp_only_layers=[0, 1],
        initializer_range=0.2,
        eos_token_id=EOS,
    )
    loaded = wrap_model(Qwen3NextForCausalLM(config), tiny_tokenizer())
    rollout = sample(loaded, samples_per_prompt=2, max_new_tokens=10)
    assert [len(prompt) for prompt in rollout.prompt_ids] == [5, 5, 9, 9, 5, 5, 1, 1]
    assert logp_error(loaded, rollout) <= TOLERANCE


def test_a_model_without_end_tokens_is_refused_at_once() -> None:
    loaded = build("llama")
    loaded.eos_ids = ()
    with pytest.raises(ConfigError, match="eos_token_id"):
        LocalSampler(loaded)


def test_bad_requests_name_what_is_wrong() -> None:
    loaded = build("llama")
    with pytest.raises(DataError, match="no prompts"):
        sample(loaded, [])
    with pytest.raises(DataError, match="'empty' has no tokens"):
        sample(loaded, [Prompt("empty", (), "")])
    with pytest.raises(ConfigError, match="student_top_k is 54"):
        sample(loaded, student_top_k=54)


def test_running_out_of_memory_names_the_knobs() -> None:
    with pytest.raises(TrainingError, match="max_new_tokens=10000000000000"):
        sample(build("llama"), max_new_tokens=10**13)


@pytest.mark.parametrize("fast", [True, False])
def test_weights_that_blew_up_are_said_not_to_be_sampled_from(fast: bool) -> None:
    loaded = build("llama")
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.fill_(float("nan"))
    sampler = LocalSampler(loaded, fast=fast)

    with pytest.raises(TrainingError, match="not finite"):
        sampler.sample(
            make_prompts(3),
            SamplerSettings(max_new_tokens=4),
            generator=torch.Generator().manual_seed(0),
        )

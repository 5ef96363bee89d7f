"""What `opd.models` promises, on tiny random models of every family."""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HyperCLOVAXConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
)

import opd.models
from opd.data.tasks import TASKS
from opd.errors import ConfigError
from opd.models import (
    LoadedModel,
    LoraSettings,
    adapter_disabled,
    backbone,
    check_same_vocabulary,
    load_model,
    memory_estimate,
    project,
    resolve_device,
    save_model,
    unembedding,
    wrap_model,
)
from opd.types import Unembedding
from tests.models_zoo import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FAMILIES,
    PAD,
    save_tiny,
    tiny,
    tiny_config,
    tiny_tokenizer,
)

torch.set_num_threads(1)

AUTO: Any = AutoModelForCausalLM
IDS = torch.randint(3, 53, (2, 6), generator=torch.Generator().manual_seed(0))


def bare(loaded: LoadedModel) -> Any:
    """The model, past what the stubs of its library can type."""
    return loaded.model


def our_logits(loaded: LoadedModel) -> Tensor:
    hidden = backbone(loaded.model)(input_ids=IDS).last_hidden_state
    return project(hidden, unembedding(loaded.model, loaded.vocab_size))


def its_logits(loaded: LoadedModel) -> Tensor:
    logits: Tensor = loaded.model(input_ids=IDS).logits
    return logits[..., : loaded.vocab_size]


def gradients(loaded: LoadedModel, logits: Tensor) -> dict[str, Tensor]:
    """Of a random linear function of the log-probabilities."""
    loaded.model.zero_grad()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    loss: Any = (direction * logits.log_softmax(-1)).sum()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in loaded.model.named_parameters()
        if parameter.grad is not None
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


# --------------------------------------------------------------------------------------------
# Hidden states to logits


@pytest.mark.parametrize("padded_to", [None, 64], ids=["exact", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_projected_hidden_states_are_the_logits_and_carry_the_same_gradient(
    family: str, padded_to: int | None
) -> None:
    loaded = tiny(family, padded_to=padded_to)
    ours, its = our_logits(loaded), its_logits(loaded)
    assert ours.shape == (2, 6, 53)
    torch.testing.assert_close(ours, its, atol=2e-6, rtol=0)

    from_ours, from_its = gradients(loaded, ours), gradients(loaded, its)
    assert from_ours.keys() == from_its.keys()
    for name in from_its:
        torch.testing.assert_close(from_ours[name], from_its[name], atol=1e-4, rtol=1e-4)
    head = loaded.model.get_output_embeddings().weight
    assert head.grad is not None
    assert head.grad[3:53].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_the_unembedding_holds_the_parameter_itself(family: str) -> None:
    loaded = tiny(family)
    head = unembedding(loaded.model, 53)
    assert head.weight is loaded.model.get_output_embeddings().weight
    assert (head.bias is not None) == (family == "phi")


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_final_soft_cap_that_binds_is_applied(family: str) -> None:
    loaded = tiny(family, tie_word_embeddings=False)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(3)
    head = unembedding(loaded.model, 53)
    assert head.soft_cap == 1.5
    hidden = backbone(loaded.model)(input_ids=IDS).last_hidden_state
    uncapped = hidden @ head.weight.T
    assert (uncapped.abs() > 2 * 1.5).float().mean() > 0.2  # the cap binds
    torch.testing.assert_close(project(hidden, head), its_logits(loaded), atol=2e-6, rtol=0)
    assert project(hidden, head).abs().max() <= 1.5


def test_an_attention_soft_cap_survives_loading(tmp_path: Path) -> None:
    capped = tiny("gemma2", attn_logit_softcapping=0.05)
    save_model(capped, tmp_path)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(its_logits(loaded), its_logits(capped), atol=1e-6, rtol=0)
    uncapped = tiny("gemma2", attn_logit_softcapping=None)
    assert (its_logits(uncapped) - its_logits(capped)).abs().max() > 0.01  # the cap binds


def test_sdpa_is_the_default_where_attention_has_no_cap(tmp_path: Path) -> None:
    assert load_model(save_tiny("llama", tmp_path)).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "scale"), [("granite", 1 / 4), ("cohere", 1 / 4), ("cohere2", 1 / 4), ("llama", 1)]
)
def test_a_logit_scale_divides_in_granite_and_multiplies_in_cohere(
    family: str, scale: float
) -> None:
    assert unembedding(tiny(family).model, 53).logit_scale == scale


def test_the_same_attribute_multiplies_in_hyperclovax() -> None:
    llama = tiny_config("llama", logits_scaling=4.0).to_dict()
    config = HyperCLOVAXConfig(**{k: v for k, v in llama.items() if k != "model_type"})
    model = AUTO.from_config(config)
    assert config.model_type == "hyperclovax"
    loaded = wrap_model(model, tiny_tokenizer())
    assert unembedding(model, 53).logit_scale == 4
    torch.testing.assert_close(our_logits(loaded), its_logits(loaded), atol=2e-6, rtol=0)


def test_project_by_hand_scales_before_it_caps_and_drops_padding_rows() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [100.0, 100.0]])
    head = Unembedding(weight, 2, bias=torch.tensor([0.5, 0.0, 9.0]), logit_scale=2.0, soft_cap=3.0)
    logits = project(torch.tensor([[1.0, -1.0]]), head)
    expected = 3 * torch.tanh(torch.tensor([[2 * 1.5, 2 * -2.0]]) / 3)
    torch.testing.assert_close(logits, expected)


def test_project_accumulates_half_precision_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 512, generator=generator).bfloat16()
    weight = torch.randn(53, 512, generator=generator).bfloat16()
    logits = project(hidden, Unembedding(weight, 53))
    assert logits.dtype == torch.float32
    exact = hidden.double() @ weight.double().T
    assert (logits - exact).abs().max() < 1e-4
    assert ((hidden @ weight.T).double() - exact).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------
# Families that are not understood


class ScaledLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output


class CappedLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


@pytest.mark.parametrize("family", [ScaledLlama, CappedLlama])
def test_an_unknown_transformation_of_the_logits_is_refused(family: Any) -> None:
    config = tiny_config("llama", initializer_range=0.002)  # logits so small that the cap hides
    with pytest.raises(ConfigError, match="llama models turn hidden states into logits"):
        wrap_model(family(config), tiny_tokenizer())


def test_a_family_with_layers_between_decoder_and_logits_is_refused() -> None:
    config = ModernBertDecoderConfig(
        vocab_size=53, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        cls_token_id=BOS, sep_token_id=EOS,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="modernbert-decoder"):
        wrap_model(AUTO.from_config(config), tiny_tokenizer())


def test_weights_that_give_no_numbers_are_refused() -> None:
    loaded = tiny("llama")
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        wrap_model(loaded.model, loaded.tokenizer)


def test_an_untrained_zero_head_is_accepted() -> None:
    loaded = tiny("llama")
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
    wrap_model(loaded.model, loaded.tokenizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check_in_half_precision(family: str, dtype: torch.dtype) -> None:
    loaded = tiny(family)
    wrap_model(bare(loaded).to(dtype), loaded.tokenizer)


# --------------------------------------------------------------------------------------------
# Loading


def test_loading_ends_in_evaluation_mode_with_the_weights_trainable(tmp_path: Path) -> None:
    loaded = load_model(str(save_tiny("gpt2", tmp_path)))
    assert not any(module.training for module in loaded.model.modules())
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.reference == str(tmp_path)


def test_dtype_is_float32_unless_asked_and_auto_keeps_what_is_stored(tmp_path: Path) -> None:
    loaded = tiny("llama")
    bare(loaded).to(torch.bfloat16)
    save_model(loaded, tmp_path)
    assert load_model(tmp_path).model.dtype == torch.float32
    assert load_model(tmp_path, dtype="auto").model.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype="float16").model.dtype == torch.float16
    with pytest.raises(ConfigError, match=r"'bfloat61'.*Did you mean 'bfloat16'"):
        load_model(tmp_path, dtype="bfloat61")


def test_devices_are_resolved_or_refused_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == best
    with pytest.raises(ConfigError, match="'gpu'"):
        resolve_device("gpu")
    if best == "cpu":
        with pytest.raises(ConfigError, match="no CUDA"):
            resolve_device("cuda:0")


def test_loading_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    before = torch.get_rng_state()
    load_model(tmp_path, lora=LoraSettings(r=2))
    load_model("builtin:sort-student", seed=7)
    assert torch.equal(before, torch.get_rng_state())


def test_loading_and_saving_print_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(load_model(save_tiny("gpt2", tmp_path / "a")), tmp_path / "b")
    assert capfd.readouterr() == ("", "")


def test_a_missing_folder_names_the_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ConfigError, match=r"my-modle does not exist. Did you mean .*my-model\?"):
        load_model(tmp_path / "my-modle")
    with pytest.raises(ConfigError, match=r"Nor does .*nowhere"):
        load_model(tmp_path / "nowhere" / "model")
    with pytest.raises(ConfigError, match=r"no config.json"):
        load_model(tmp_path / "my-model")


def test_a_missing_relative_folder_names_the_nearest_sibling_though_it_could_be_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no folder models/studnet; .*Did you mean models/stud"):
        load_model("models/studnet")


def test_a_hub_id_offline_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"someone/model; not in the local .* HF_HUB_OFFLINE"):
        load_model("someone/model")
    with pytest.raises(ConfigError, match="not a valid hub id"):
        load_model("some one/model")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_of_a_folder_is_the_one_that_was_saved(family: str, tmp_path: Path) -> None:
    loaded = load_model(save_tiny(family, tmp_path)).tokenizer
    made = tiny_tokenizer()
    text = "S3 A+1=B>2?"
    assert loaded.get_vocab() == made.get_vocab()
    assert loaded.encode(text) == made.encode(text)
    assert loaded.decode(loaded.encode(text)) == text


def test_pickled_weights_load_only_when_allowed(tmp_path: Path) -> None:
    loaded = tiny("llama")
    save_model(loaded, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \*.safetensors file"):
        load_model(tmp_path)
    torch.save(loaded.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin, a pickle.*allow_pickle = true"):
        load_model(tmp_path)
    allowed = load_model(tmp_path, allow_pickle=True)
    assert torch.equal(its_logits(allowed), its_logits(loaded))


def test_remote_code_stays_off_unless_asked_for(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit_json(tmp_path / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    (tmp_path / "own.py").write_text("raise SystemExit('remote code ran')\n")
    with pytest.raises(ConfigError, match="trust_remote_code = true"):
        load_model(tmp_path)


def test_damaged_or_incomplete_folders_are_refused_in_words(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    stored, described = weights.read_bytes(), config.read_text()

    weights.write_bytes(stored[: len(stored) // 2])
    with pytest.raises(ConfigError, match="cannot load model"):
        load_model(tmp_path)
    weights.write_bytes(stored)

    edit_json(config, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ConfigError, match=r"12 weights are not in its files.*model\.layers\.2"):
        load_model(tmp_path)
    edit_json(config, num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.warns(UserWarning, match=r"12 weights .* left out, model\.layers\.1"):
        load_model(tmp_path)
    config.write_text(described)

    edit_json(config, intermediate_size=32)
    with pytest.raises(ConfigError, match=r"\[32, 64\] in its files and \[32, 32\] by its config"):
        load_model(tmp_path)
    config.write_text(described[:40])
    with pytest.raises(ConfigError, match="not a valid JSON"):
        load_model(tmp_path)
    config.write_text(described)

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        load_model(tmp_path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --------------------------------------------------------------------------------------------
# Tokens


def test_eos_ids_are_the_union_of_all_sources_in_order(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, 5, 7])
    edit_json(tmp_path / "config.json", eos_token_id=5)
    assert load_model(tmp_path).eos_ids == (7, 5, EOS)


def test_padding_falls_back_to_the_first_eos(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    assert load_model(tmp_path).pad_id == PAD
    edit_json(tmp_path / "tokenizer_config.json", pad_token=None)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[7, 2])
    assert load_model(tmp_path).pad_id == 7


def test_a_model_that_cannot_end_a_response_is_refused() -> None:
    loaded = tiny("llama")
    loaded.model.config.eos_token_id = None
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"set eos_token_id in generation_config\.json"):
        wrap_model(loaded.model, loaded.tokenizer, reference="endless")


def test_tokens_without_an_embedding_row_do_not_count() -> None:
    loaded = tiny("llama")
    assert wrap_model(loaded.model, tiny_tokenizer(60)).vocab_size == 53
    assert tiny("llama", padded_to=64).vocab_size == 53


def test_vocabularies_padded_to_different_sizes_are_the_same() -> None:
    student, teacher = tiny("qwen2", padded_to=56), tiny("llama", padded_to=64, layers=1, hidden=16)
    assert check_same_vocabulary(student, teacher) == 53


def test_the_first_differing_token_is_named() -> None:
    student, teacher = tiny("llama"), tiny("llama")
    swapped = teacher.tokenizer.backend_tokenizer.to_str().replace('"K"', '"k"')
    teacher.tokenizer = tiny_tokenizer()
    teacher.tokenizer._tokenizer = type(teacher.tokenizer.backend_tokenizer).from_str(swapped)
    differing = student.tokenizer.get_vocab()["K"]
    with pytest.raises(ConfigError, match=rf"id {differing} is 'K' for the student.*'k' for the"):
        check_same_vocabulary(student, teacher)


def test_a_token_only_one_side_has_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"id 53 is no token for the student \(53 tokens\) and '<extra_53>'"
    ):
        check_same_vocabulary(tiny("llama"), tiny("llama", vocab_size=60))


def test_special_tokens_that_differ_are_named() -> None:
    student, teacher = tiny("llama"), tiny("llama")
    teacher.eos_ids = (EOS, 5)
    with pytest.raises(ConfigError, match=r"\(eos\): 2 '<eos>' for .* 2 '<eos>', 5 '2' for teach"):
        check_same_vocabulary(student, teacher)
    teacher = tiny("llama")
    teacher.tokenizer.bos_token = None
    with pytest.raises(ConfigError, match=r"\(bos\): 1 '<bos>' for student .* none for teacher"):
        check_same_vocabulary(student, teacher)


@pytest.mark.parametrize("pad", ["#", "<eos>", None])
def test_padding_tokens_may_differ(pad: str | None) -> None:
    student, teacher = tiny("llama"), tiny("llama")
    teacher.tokenizer.pad_token = pad
    assert check_same_vocabulary(student, teacher) == 53


def test_end_tokens_may_differ_where_they_are_compared_as_one() -> None:
    student, teacher = tiny("llama"), tiny("llama")
    teacher.eos_ids = (EOS, 5)
    assert check_same_vocabulary(student, teacher, merge_stop_ids=True) == 53


def test_the_order_of_several_eos_ids_does_not_matter() -> None:
    student, teacher = tiny("llama"), tiny("llama")
    student.eos_ids, teacher.eos_ids = (5, EOS), (EOS, 5)
    assert check_same_vocabulary(student, teacher) == 53


def test_150_thousand_tokens_are_compared_within_a_second() -> None:
    size = 151_669
    student = tiny("qwen2", vocab_size=size, hidden=4, layers=1, padded_to=151_936)
    teacher = tiny("qwen2", vocab_size=size, hidden=4, layers=1, padded_to=152_064)
    other = tiny_tokenizer(size)
    start = time.process_time()
    assert check_same_vocabulary(student, teacher) == size
    assert time.process_time() - start < 1

    changed = other.backend_tokenizer.to_str().replace('"<extra_151000>"', '"<other>"')
    teacher.tokenizer = other
    other._tokenizer = type(other.backend_tokenizer).from_str(changed)
    start = time.process_time()
    with pytest.raises(ConfigError, match="id 151000 is '<extra_151000>'"):
        check_same_vocabulary(student, teacher)
    assert time.process_time() - start < 1


# --------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_with_the_auto_classes_and_gives_the_same_logits(
    family: str, tmp_path: Path
) -> None:
    loaded = tiny(family, padded_to=56)
    before = snapshot(loaded.model)
    save_model(loaded, tmp_path)
    assert_same_bits(before, snapshot(loaded.model))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, loaded.model(input_ids=IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE


def test_generation_config_and_chat_template_survive_load_and_save(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "first")
    kept = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    edit_json(tmp_path / "first" / "generation_config.json", **kept)
    save_model(load_model(tmp_path / "first"), tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "generation_config.json").read_text())
    assert {key: saved[key] for key in kept} == kept
    chat = [{"role": "user", "content": "HI"}]
    text = AutoTokenizer.from_pretrained(tmp_path / "second").apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert text == "<bos>U:HI;A:"


# --------------------------------------------------------------------------------------------
# LoRA


def with_random_adapters(loaded: LoadedModel) -> LoadedModel:
    """Adapters start at zero; here they are as if trained."""
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.2)
    return loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_adapters_only_and_without_them_is_the_initial_student(
    family: str, tmp_path: Path
) -> None:
    initial = load_model(save_tiny(family, tmp_path))
    loaded = load_model(tmp_path, lora=LoraSettings(r=2, alpha=4.0))
    trained = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert gradients(loaded, our_logits(loaded)).keys() == trained
    with_random_adapters(loaded)
    assert (its_logits(loaded) - its_logits(initial)).abs().max() > 1e-3
    with adapter_disabled(loaded.model):
        assert torch.equal(its_logits(loaded), its_logits(initial))
        assert torch.equal(our_logits(loaded), our_logits(initial))
    torch.testing.assert_close(our_logits(loaded), its_logits(loaded), atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_saves_the_same_function_and_leaves_the_live_weights_alone(
    family: str, tmp_path: Path
) -> None:
    source = save_tiny(family, tmp_path / "source")
    loaded = with_random_adapters(load_model(source, lora=LoraSettings(r=2, alpha=4.0)))
    before = snapshot(loaded.model)
    save_model(loaded, tmp_path / "merged")
    assert_same_bits(before, snapshot(loaded.model))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(its_logits(merged), its_logits(loaded), atol=1e-5, rtol=1e-5)
    assert merged.tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_an_adapter_saved_alone_loads_onto_its_base(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(family, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    loaded = with_random_adapters(load_model("base", lora=LoraSettings(r=2)))
    save_model(loaded, tmp_path / "adapter", merge_lora=False)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    monkeypatch.chdir("/")
    again = load_model(tmp_path / "adapter")
    assert torch.equal(its_logits(again), its_logits(loaded))
    assert again.tokenizer.chat_template == CHAT_TEMPLATE
    with pytest.raises(ConfigError, match="is an adapter already; merge it"):
        load_model(tmp_path / "adapter", lora=LoraSettings())
    assert memory_estimate(tmp_path / "adapter") == memory_estimate(tmp_path / "base")


def test_an_adapter_of_a_random_model_is_not_saved_alone(tmp_path: Path) -> None:
    loaded = load_model("builtin:sort-student", lora=LoraSettings(r=2))
    with pytest.raises(ConfigError, match="save it merged"):
        save_model(loaded, tmp_path, merge_lora=False)


def test_an_adapter_on_the_unembedding_is_in_its_effective_weight(tmp_path: Path) -> None:
    save_tiny("phi", tmp_path / "base", tie_word_embeddings=False)
    settings = LoraSettings(r=2, target_modules=("q_proj", "lm_head", "embed_tokens"))
    loaded = with_random_adapters(load_model(tmp_path / "base", lora=settings))
    torch.testing.assert_close(our_logits(loaded), its_logits(loaded), atol=5e-6, rtol=0)
    from_ours = gradients(loaded, our_logits(loaded))
    from_its = gradients(loaded, its_logits(loaded))
    assert any("lm_head.lora_A" in name for name in from_ours)
    assert from_ours.keys() == from_its.keys()
    for name in from_its:
        torch.testing.assert_close(from_ours[name], from_its[name], atol=1e-4, rtol=1e-4)
    with adapter_disabled(loaded.model):
        torch.testing.assert_close(our_logits(loaded), its_logits(loaded), atol=2e-6, rtol=0)
    save_model(loaded, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(its_logits(merged), its_logits(loaded), atol=1e-5, rtol=1e-5)


def test_adapters_of_a_half_precision_student_are_float32_and_merge_into_its_dtype(
    tmp_path: Path,
) -> None:
    save_tiny("llama", tmp_path / "base")
    settings = LoraSettings(r=2, target_modules=("q_proj", "lm_head"))
    loaded = load_model(tmp_path / "base", dtype="bfloat16", lora=settings)
    with_random_adapters(loaded)
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    wrap_model(loaded.model, loaded.tokenizer)  # its logits are understood with adapters at work
    save_model(loaded, tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype="auto")
    live = bare(loaded).get_base_model().lm_head
    exact = live.base_layer.weight.float() + live.get_delta_weight("default")
    assert torch.equal(bare(merged).lm_head.weight, exact.bfloat16())


def test_an_adapter_beside_other_weights_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "base")
    loaded = load_model(tmp_path / "base", lora=LoraSettings(r=2))
    save_model(loaded, tmp_path / "base", merge_lora=False)
    with pytest.raises(ConfigError, match="an adapter lies beside"):
        load_model(tmp_path / "base")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_embedding_is_refused(target: str, tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=f"'{target}' shares its weight"):
        load_model(tmp_path, lora=LoraSettings(target_modules=("q_proj", target)))


def test_a_misspelt_lora_target_names_the_nearest_layer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"no layer 'q_prj'. Did you mean 'q_proj'"):
        load_model(tmp_path, lora=LoraSettings(target_modules=("k_proj", "q_prj")))


def test_lora_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.r must be >= 1"):
        LoraSettings(r=0)
    with pytest.raises(ConfigError, match=r"lora\.alpha must be > 0"):
        LoraSettings(alpha=0.0)


def test_a_seed_decides_the_adapters(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    settings = LoraSettings(r=2)
    first, again, other = (
        snapshot(load_model(tmp_path, lora=settings, seed=seed).model) for seed in (1, 1, 2)
    )
    assert_same_bits(first, again)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_full_model_has_no_adapter_to_disable() -> None:
    with (
        pytest.raises(ConfigError, match="without adapters"),
        adapter_disabled(tiny("llama").model),
    ):
        pass


def test_lora_without_peft_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'opd\[lora\]'"):
        load_model(tmp_path, lora=LoraSettings())


# --------------------------------------------------------------------------------------------
# Built-in models


@pytest.mark.parametrize(
    ("reference", "parameters"),
    [("builtin:sort-student", 110_336), ("builtin:add-teacher-init", 365_376)],
)
def test_built_in_models_have_their_stated_size_and_follow_the_seed(
    reference: str, parameters: int
) -> None:
    first, again, other = (load_model(reference, seed=seed) for seed in (3, 3, 4))
    assert first.model.num_parameters() == parameters
    assert (first.vocab_size, first.eos_ids, first.pad_id) == (53, (2,), 0)
    assert_same_bits(snapshot(first.model), snapshot(again.model))
    assert not torch.equal(its_logits(first), its_logits(other))
    spread = float(bare(first).model.embed_tokens.weight[3:].detach().std())
    assert spread == pytest.approx(bare(first).config.initializer_range, rel=0.05)
    assert memory_estimate(reference) == {"parameters": parameters, "bytes": 4 * parameters}


def test_an_unknown_built_in_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"'builtin:sort-techer'.*Did you mean 'sort-teacher'"):
        load_model("builtin:sort-techer")
    with pytest.raises(ConfigError, match=r"Valid: add-student, add-teacher, .*sort-teacher-init"):
        memory_estimate("builtin:?")
    assert set(opd.models.TASKS) == set(TASKS)


def test_an_embedded_teacher_is_read_from_the_assets_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load_model("builtin:sort-teacher-init", dtype="bfloat16")
    save_model(made, tmp_path / "sort_teacher")
    monkeypatch.setattr(opd.models, "ASSETS", tmp_path)
    loaded = load_model("builtin:sort-teacher")
    assert loaded.model.dtype == torch.float32
    assert loaded.reference == "builtin:sort-teacher"
    weight = loaded.model.lm_head.weight
    assert torch.equal(weight, made.model.lm_head.weight.float())
    assert memory_estimate("builtin:sort-teacher")["bytes"] == 2 * 365_376
    with pytest.raises(ConfigError, match=r"no weights for .*it ships builtin:sort-teacher"):
        load_model("builtin:chain-teacher")


# --------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_estimate_counts_what_would_be_loaded(family: str, tmp_path: Path) -> None:
    loaded = tiny(family)
    bare(loaded).to(torch.bfloat16)
    save_model(loaded, tmp_path)
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert memory_estimate(tmp_path) == {"parameters": count, "bytes": 2 * count}


def test_a_memory_estimate_reads_headers_and_no_weights(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    tensor = {"dtype": "BF16", "shape": [10**6, 10**6], "data_offsets": [0, 2 * 10**12]}
    header = json.dumps({"weight": tensor}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert memory_estimate(tmp_path) == {"parameters": 10**12, "bytes": 2 * 10**12}


def test_a_memory_estimate_sums_shards_and_counts_pickles_from_the_config(tmp_path: Path) -> None:
    loaded = tiny("llama")
    count = loaded.model.num_parameters()
    bare(loaded).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert memory_estimate(tmp_path / "shards") == {"parameters": count, "bytes": 4 * count}
    loaded.model.config.save_pretrained(tmp_path / "pickle")
    assert memory_estimate(tmp_path / "pickle") == {"parameters": count, "bytes": 4 * count}
    with pytest.raises(ConfigError, match="does not exist"):
        memory_estimate(tmp_path / "nothing")

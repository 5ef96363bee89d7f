"""Tiny random models of every supported family, with a character tokenizer. Built locally.

Weights are drawn with a standard deviation of 0.2, so that distributions are far from uniform.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from opd.models import LoadedModel, save_model, wrap_model

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ("<pad>", "<bos>", "<eos>")
CHARACTERS = string.digits + string.ascii_uppercase + " +-*()=,;:>|?#"

# One line per turn: `U:...;` for a user, `A:...<eos>` for the assistant. The `generation` block
# marks what an assistant-only mask keeps.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "A:{% generation %}{{ message.content }}<eos>{% endgeneration %}"
    "{% else %}{{ message.role[0] | upper }}:{{ message.content }};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)

_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi": PhiConfig,
    "phi3": Phi3Config,
    "gpt_neox": GPTNeoXConfig,
    "granite": GraniteConfig,
    "cohere": CohereConfig,
    "cohere2": Cohere2Config,
    "gpt2": GPT2Config,
}
FAMILIES = tuple(_CONFIGS)

# What makes a family's logits its own, at values where ignoring it would show.
_PECULIARITIES: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0, "head_dim": 16},
    "gemma3": {"final_logit_softcapping": 1.5, "head_dim": 16},
    "qwen3": {"head_dim": 16},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "gpt_neox": {"tie_word_embeddings": False},
}


def tiny_tokenizer(vocab_size: int = 53, *, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per character; further ids are `<extra_N>`. Pad 0, bos 1, eos 2."""
    tokens = [*SPECIALS, *CHARACTERS][:vocab_size]
    tokens += [f"<extra_{i}>" for i in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(
        tokenizer_models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[-1])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE if chat else None
    return cast(PreTrainedTokenizerFast, wrapped)


# As `CHAT_TEMPLATE`, with a generation prompt that opens a block of thinking, or closes an empty
# one, where the variable `thinking` says so.
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "A:{% endif %}",
    "A:{% if thinking is defined %}<think>{% if not thinking %}</think>{% endif %}{% endif %}"
    "{% endif %}",
)
THINK, END_THINK = 53, 54


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, with the tokens `<think>` and `</think>`, and `THINKING_TEMPLATE`."""
    tokenizer = tiny_tokenizer(53)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = THINKING_TEMPLATE
    return tokenizer


def tiny_config(
    family: str,
    *,
    vocab_size: int = 53,
    hidden: int = 32,
    layers: int = 2,
    padded_to: int | None = None,
    **overrides: Any,
) -> PreTrainedConfig:
    """A config with two heads, one of them for keys and values where the family allows it."""
    common: dict[str, Any] = {
        "vocab_size": padded_to or vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if family == "gpt2":  # spells its sizes differently
        common |= {"n_embd": hidden, "n_layer": layers, "n_head": 2, "n_positions": 256}
    chosen = {**common, **_PECULIARITIES.get(family, {}), **overrides}
    return cast(PreTrainedConfig, _CONFIGS[family](**chosen))


def tiny(
    family: str,
    *,
    vocab_size: int = 53,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    padded_to: int | None = None,
    **overrides: Any,
) -> LoadedModel:
    """A random model of a family in float32; `overrides` go to its config.

    Biases and norms are drawn too, since their usual zeros and ones would hide mistakes.
    """
    config = tiny_config(
        family,
        vocab_size=vocab_size,
        hidden=hidden,
        layers=layers,
        padded_to=padded_to,
        **overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(Any, AutoModelForCausalLM).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return wrap_model(model, tiny_tokenizer(vocab_size), reference=f"tiny-{family}")


def save_tiny(family: str, folder: str | Path, **settings: Any) -> Path:
    """Write `tiny(family, **settings)` to a folder and return it."""
    save_model(tiny(family, **settings), folder)
    return Path(folder)

"""What can be known of a model from its small files: config, tokenizer, headers. No weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd.errors import ConfigError
from opd.models import BUILTIN, LoadedModel, load_model, memory_estimate
from opd.training.config import StudentConfig, TeacherConfig

ADAPTER_CONFIG = "adapter_config.json"

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """A model before its weights are loaded.

    Attributes:
        hollow: the model on torch's meta device, with its real tokenizer; good for names, shapes
            and vocabularies. (A built-in model is the real one: it is tiny.)
        parameters: their number.
        item_bytes: of one weight in memory, in the dtype the run asks for.
    """

    hollow: LoadedModel
    parameters: int
    item_bytes: float

    @property
    def bytes(self) -> float:
        """The weights in memory."""
        return self.parameters * self.item_bytes

    @property
    def config(self) -> Any:
        """The Hugging Face config of the text model."""
        model: Any = self.hollow.model
        return model.config.get_text_config()

    @property
    def positions(self) -> int | None:
        """Tokens of prompt and response the model is made for; None where it does not say."""
        found = getattr(self.config, "max_position_embeddings", None)
        return int(found) if found else None

    @property
    def cache_bytes_per_token(self) -> float:
        """Keys and values of one token in all layers."""
        config = self.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        return float(2 * config.num_hidden_layers * groups * width) * self.item_bytes


def read_facts(reference: str, config: StudentConfig | TeacherConfig) -> ModelFacts:
    """Read what is known of a model.

    Args:
        reference: a folder, a hub id or a built-in model.
        config: its section of the run file.

    Raises:
        ConfigError: there is no such model, its files cannot be read, or they are of a kind that
            is loaded only on request.
    """
    estimate = memory_estimate(reference)
    if reference.startswith(BUILTIN):
        hollow = load_model(reference, device="cpu")
    else:
        _refuse_pickle(reference, config)
        try:
            hollow = _hollow(reference, config)
        except (OSError, ValueError, KeyError, ImportError) as error:
            if isinstance(error, ConfigError):
                raise
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"cannot read model {reference}: {first}") from error
    stored = estimate["bytes"] / max(1, estimate["parameters"])
    return ModelFacts(
        hollow,
        estimate["parameters"],
        ITEM_BYTES.get(config.dtype, stored),
    )


def _hollow(reference: str, config: StudentConfig | TeacherConfig) -> LoadedModel:
    source = _base_of_adapter(reference)
    shared: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision:
        shared["revision"] = config.revision
    tokenizer = AutoTokenizer.from_pretrained(reference, **shared)
    model_config = AutoConfig.from_pretrained(source, **shared)
    with torch.device("meta"):
        model: Any = cast(Any, AutoModelForCausalLM).from_config(
            model_config, trust_remote_code=config.trust_remote_code
        )
    eos_ids = _eos_ids(source, model_config, tokenizer)
    if not eos_ids:
        raise ConfigError(
            f"{reference}: no end-of-sequence id in generation_config.json, config.json or the "
            "tokenizer, so no response could end; set eos_token_id in generation_config.json"
        )
    pad_id = tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        vocab_size=min(max(tokenizer.get_vocab().values()) + 1, rows),
        eos_ids=eos_ids,
        pad_id=eos_ids[0] if pad_id is None else int(pad_id),
        reference=reference,
    )


def _eos_ids(source: str, model_config: Any, tokenizer: Any) -> tuple[int, ...]:
    try:
        generation: Any = GenerationConfig.from_pretrained(source)
    except OSError:  # the file is optional
        generation = None
    found: list[int] = []
    for holder in (generation, model_config.get_text_config(), model_config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found += [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    return tuple(int(i) for i in dict.fromkeys(found))


def _base_of_adapter(reference: str) -> str:
    folder = Path(reference)
    if (folder / "config.json").exists() or not (folder / ADAPTER_CONFIG).exists():
        return reference
    described = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return str(described["base_model_name_or_path"])


def _refuse_pickle(reference: str, config: StudentConfig | TeacherConfig) -> None:
    folder = Path(reference)
    if config.allow_pickle or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    raise ConfigError(
        f"model folder {reference}: no *.safetensors file in it; convert its weights to "
        "safetensors, or set allow_pickle = true if you trust the author of its .bin files"
    )

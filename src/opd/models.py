"""Models: loading, the bare decoder, the unembedding, vocabulary checks, LoRA and saving.

Whatever differs between families of Hugging Face causal language models (the names of their
modules, logit scales, soft caps, biases, padded vocabularies) is settled here. The rest of the
library sees hidden states and an `Unembedding`.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import torch
from huggingface_hub import (
    HfApi,
    constants,
    get_local_safetensors_metadata,
    get_safetensors_metadata,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from opd.errors import ConfigError, nearest
from opd.formula.numerics import project
from opd.types import Unembedding

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "LoadedModel",
    "LoraSettings",
    "MemoryEstimate",
    "adapter_disabled",
    "backbone",
    "check_same_vocabulary",
    "load_model",
    "memory_estimate",
    "project",
    "resolve_device",
    "save_model",
    "scoring_dtype",
    "unembedding",
    "wrap_model",
]

ASSETS = Path(__file__).parent / "assets"
BUILTIN = "builtin:"
TASKS = ("sort", "add", "chain")

# width, layers, heads and feed-forward width of the models built from nothing
_BUILTIN_SHAPES = {"student": (64, 2, 2, 192), "teacher-init": (96, 3, 3, 288)}
_BUILTIN_NAMES = tuple(f"{task}-{role}" for task in TASKS for role in ("teacher", *_BUILTIN_SHAPES))

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the student. They have no dropout: it is off in distillation.

    Attributes:
        r: rank of every adapter.
        alpha: an adapter's output is multiplied by `alpha / r`.
        target_modules: name endings of the layers that get one, or `all-linear`: every linear
            layer but the unembedding.
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora.r must be >= 1, got {self.r}")
        if self.alpha <= 0:
            raise ConfigError(f"lora.alpha must be > 0, got {self.alpha}")


@dataclass
class LoadedModel:
    """A model, its tokenizer, and the facts about the pair that the rest of the library reads.

    Attributes:
        vocab_size: number of real tokens; logits beyond it belong to padding rows and carry no
            mass.
        eos_ids: every id that ends a response, each once: those of the generation config, then
            of the model's config, then the tokenizer's.
        pad_id: the tokenizer's padding id, or the first of `eos_ids` where it has none.
        reference: the folder or id the model was loaded from.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    reference: str


class MemoryEstimate(TypedDict):
    """Number of parameters, and the bytes their weights take as they are stored."""

    parameters: int
    bytes: int


# --------------------------------------------------------------------------------------------
# Loading


def load_model(
    reference: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    lora: LoraSettings | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, in evaluation mode.

    The global random state is left as it was.

    Args:
        reference: a folder, a hub id, or `builtin:<task>-teacher`, `builtin:<task>-student`,
            `builtin:<task>-teacher-init` (the latter two are built from nothing, with `seed`).
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: as stored.
        device: `auto` (CUDA where there is one), or a torch device.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: load `.bin` files, which can run code when they are opened.
        lora: add trainable adapters and freeze everything else.
        revision: branch, tag or commit of a hub repository.
        seed: initialises the built-in models that have no weights, and the adapters.

    Raises:
        ConfigError: nothing can be loaded from `reference`, or what was loaded is a family
            whose logits this library would compute wrongly.
    """
    name = str(reference)
    target = resolve_device(device)
    model: PreTrainedModel | PeftModel
    with _seeded(seed), _quiet():
        if role := _role_without_weights(name):
            model, tokenizer = _build_builtin(role)
            model = _to(model, _resolve_dtype(dtype))
        else:
            model, tokenizer = _from_pretrained(
                name,
                dtype=_resolve_dtype(dtype),
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                revision=revision,
            )
        if lora is not None:
            model = _add_lora(model, lora, reference=name)
        return wrap_model(_to(model, target), tokenizer, reference=name)


def wrap_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reference: str = "<in memory>",
) -> LoadedModel:
    """A `LoadedModel` from objects in hand; the model is put into evaluation mode.

    Raises:
        ConfigError: no id ends a response, or `project` of the hidden states is not the logits
            of the model (a family with a transformation this library does not know).
    """
    base = _bare(model)
    cast(nn.Module, model).eval()
    eos_ids = _eos_ids(base, tokenizer)
    if not eos_ids:
        raise ConfigError(
            f"{reference}: no end-of-sequence id in generation_config.json, config.json or the "
            "tokenizer, so no response could end; set eos_token_id in generation_config.json"
        )
    pad_id = tokenizer.pad_token_id
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        vocab_size=_count_tokens(base, tokenizer, reference),
        eos_ids=eos_ids,
        pad_id=eos_ids[0] if pad_id is None else int(cast(int, pad_id)),
        reference=reference,
    )
    _check_projection(loaded)
    return loaded


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one and the CPU elsewhere; other names are torch's own."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device {device!r} is not one torch knows; use 'auto', 'cpu' or 'cuda'"
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch finds no CUDA here; use 'auto' or 'cpu'")
    return resolved


def scoring_dtype(asked: str, device: torch.device) -> str:
    """The dtype of a model that only scores: `auto` is float32 on a CPU, where half is slower."""
    return "float32" if asked == "auto" and device.type == "cpu" else asked


def _resolve_dtype(dtype: str) -> torch.dtype | None:
    """None for `auto`."""
    if dtype == "auto":
        return None
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not valid. {nearest(dtype, (*_DTYPES, 'auto'))}")
    return _DTYPES[dtype]


def _to(
    model: PreTrainedModel | PeftModel, where: torch.device | torch.dtype | None
) -> PreTrainedModel | PeftModel:
    return model if where is None else cast(Any, model).to(where)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, CPU random numbers follow `seed`; outside, nothing has changed on any device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or load reports: what matters in them is raised instead."""
    logs: Any = transformers_logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


# --------------------------------------------------------------------------------------------
# Hidden states to logits


def backbone(model: nn.Module) -> nn.Module:
    """The bare decoder: token ids to hidden states after the final norm.

    Its forward takes `input_ids [B, L]` and, optionally, `attention_mask`, `past_key_values`
    and `use_cache`; `.last_hidden_state` of the result is `[B, L, H]`. Adapters stay active.

    Raises:
        ConfigError: the model has no decoder apart from its output layer.
    """
    base = _bare(model)
    if base.base_model is base:
        raise ConfigError(f"{type(base).__name__} has no decoder apart from its output layer")
    return base.base_model


def unembedding(model: nn.Module, vocab_size: int) -> Unembedding:
    """The model's map from hidden states to logits; `weight` is the parameter itself.

    With an adapter on the unembedding `weight` is the effective weight, built on each call, and
    the gradient reaches the adapter.

    Raises:
        ConfigError: the output layer is not a linear layer.
    """
    base = _bare(model)
    weight, bias = _effective_linear(_output_layer(base), base)
    config = base.config.get_text_config()
    return Unembedding(
        weight=weight,
        vocab_size=vocab_size,
        bias=bias,
        logit_scale=_logit_scale(config),
        soft_cap=_soft_cap(config),
    )


# Attributes by which configs name a factor on the logits. Families agree on these.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
# `logits_scaling` is a divisor (Granite, MiniCPM), save in these families.
_MULTIPLYING_FAMILIES = ("hyperclovax",)


def _logit_scale(config: PreTrainedConfig) -> float:
    scale = 1.0
    for name in _MULTIPLIERS:
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            scale *= value
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        scale = scale * scaling if config.model_type in _MULTIPLYING_FAMILIES else scale / scaling
    return scale


def _soft_cap(config: PreTrainedConfig) -> float | None:
    cap = getattr(config, "final_logit_softcapping", None)
    return float(cap) if cap else None


def _effective_linear(
    layer: nn.Module | None, base: PreTrainedModel
) -> tuple[Tensor, Tensor | None]:
    linear = getattr(layer, "base_layer", layer)
    if not isinstance(linear, nn.Linear):
        raise ConfigError(
            f"{type(base).__name__}: its output layer is {type(layer).__name__}, and only linear "
            "ones are supported"
        )
    weight: Tensor = linear.weight
    if layer is not linear:
        weight = weight + _lora_delta(cast(Any, layer))
    return weight, linear.bias


def _lora_delta(layer: Any) -> Tensor | float:
    """What the active adapters of a PEFT layer add to its base weight."""
    if layer.disable_adapters or layer.merged:
        return 0.0
    deltas = [layer.get_delta_weight(n) for n in layer.active_adapters if n in layer.scaling]
    return cast("Tensor | float", sum(deltas, start=0.0))


def _bare(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    return cast(PreTrainedModel, inner)


def _output_layer(base: PreTrainedModel) -> Any:
    """The layer that makes logits, inside an adapter or not; None where there is none."""
    return cast(Any, base).get_output_embeddings()


_PROBE_LOGIT = 100.0
_PROBE_FACTOR = 1000.0  # hidden states of a few units stay finite in float16


@torch.no_grad()
def _check_projection(loaded: LoadedModel) -> None:
    """Refuse a family whose logits are not `project` of its hidden states.

    The second pass scales the input of the output layer up to logits of `_PROBE_LOGIT`, because
    a soft cap this library does not know would hide in the small logits of an untrained model.
    """
    model, base = cast(Any, loaded.model), _bare(loaded.model)
    head = unembedding(model, loaded.vocab_size)
    ids = torch.linspace(0, loaded.vocab_size - 1, 4, device=head.weight.device).long()[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    hidden = backbone(model)(**inputs).last_hidden_state
    uncapped = project(hidden, replace(head, soft_cap=None))
    if not torch.isfinite(uncapped).all():
        raise ConfigError(
            f"{loaded.reference}: logits of four of its own tokens are not finite in "
            f"{hidden.dtype}; the weights are broken or need a wider dtype"
        )
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 3e-2
    probe = min(_PROBE_LOGIT / max(float(uncapped.abs().max()), 1e-6), _PROBE_FACTOR)
    for factor in (1.0, probe):
        with _scaled_input(_output_layer(base), factor):
            expected = model(**inputs).logits[..., : loaded.vocab_size].float()
        difference = (project(hidden * factor, head) - expected).abs().max()
        gap = difference / expected.abs().max().clamp_min(1e-6)
        if not float(gap) <= tolerance:
            raise ConfigError(
                f"{loaded.reference}: {base.config.model_type} models turn hidden states into "
                f"logits in a way opd does not know (relative gap {float(gap):.1e}), so training "
                "one would be silently wrong; it needs a rule in opd/models.py"
            )


@contextlib.contextmanager
def _scaled_input(layer: nn.Module, factor: float) -> Iterator[None]:
    hook = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


# --------------------------------------------------------------------------------------------
# Tokens


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    found: list[int] = []
    for source in (generation, model.config.get_text_config(), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found += [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    return tuple(int(i) for i in dict.fromkeys(found))


def _count_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reference: str) -> int:
    """Real tokens: ids the tokenizer knows, as far as the embedding has rows for them.

    Some tokenizers know tokens (of images, say) that the text model beside them cannot read.
    """
    ids = tokenizer.get_vocab()
    if ids.keys() <= set(tokenizer.all_special_tokens):
        raise ConfigError(
            f"{reference}: its tokenizer has no tokens; its tokenizer.json is missing"
        )
    rows = cast(nn.Embedding, base.get_input_embeddings()).weight.shape[0]
    return min(max(ids.values()) + 1, rows)


def check_same_vocabulary(
    student: LoadedModel, teacher: LoadedModel, *, merge_stop_ids: bool = False
) -> int:
    """The number of tokens the two share: the same id stands for the same string on both sides.

    Embeddings may be padded to different sizes, and padding tokens may differ: masks follow
    positions, so what stands in the padding is never compared.

    Args:
        merge_stop_ids: end tokens are compared as one action, so they may differ.

    Raises:
        ConfigError: names the first token that differs, or the special token that does.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        raise ConfigError(_first_difference(student, teacher, ours, theirs))
    _check_special_tokens(student, teacher, merge_stop_ids)
    return min(student.vocab_size, teacher.vocab_size)


def _first_difference(
    student: LoadedModel, teacher: LoadedModel, ours: Mapping[str, int], theirs: Mapping[str, int]
) -> str:
    first = min(i for _, i in ours.items() ^ theirs.items())

    def shown(ids: Mapping[str, int]) -> str:
        return next((repr(token) for token, i in ids.items() if i == first), "no token")

    return (
        f"student {student.reference} and teacher {teacher.reference} do not share a vocabulary: "
        f"id {first} is {shown(ours)} for the student ({len(ours)} tokens) and {shown(theirs)} "
        f"for the teacher ({len(theirs)} tokens); choose a pair with the same tokenizer"
    )


END = "end of sequence (eos)"


def _check_special_tokens(student: LoadedModel, teacher: LoadedModel, merge_stop_ids: bool) -> None:
    def describe(loaded: LoadedModel, ids: tuple[int, ...]) -> str:
        tokens = loaded.tokenizer.convert_ids_to_tokens(list(ids))
        return ", ".join(f"{i} {t!r}" for i, t in zip(ids, tokens, strict=True)) or "none"

    def of_tokenizer(loaded: LoadedModel, name: str) -> tuple[int, ...]:
        value = getattr(loaded.tokenizer, name)
        return () if value is None else (int(value),)

    pairs = {
        END: (student.eos_ids, teacher.eos_ids),
        "beginning of sequence (bos)": (
            of_tokenizer(student, "bos_token_id"),
            of_tokenizer(teacher, "bos_token_id"),
        ),
    }
    if merge_stop_ids:
        del pairs[END]
    for role, (ours, theirs) in pairs.items():
        if set(ours) != set(theirs):
            merging = "set method.merge_stop_ids = true to compare all end tokens as one, or "
            raise ConfigError(
                f"special tokens differ, {role}: {describe(student, ours)} for student "
                f"{student.reference}, {describe(teacher, theirs)} for teacher "
                f"{teacher.reference}; {merging if role == END else ''}make the "
                "generation_config.json and tokenizer_config.json of the two agree"
            )


# --------------------------------------------------------------------------------------------
# Finding and reading weights


def _locate(name: str, revision: str | None = None) -> str:
    """The folder a reference means, or the id of a hub repository that can be read."""
    if name.startswith(BUILTIN):
        return str(_builtin_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", _ADAPTER_CONFIG)):
            raise ConfigError(
                f"model folder {name}: no config.json in it; point at a folder that "
                "AutoModelForCausalLM can load"
            )
        return str(path)
    if path.exists():
        raise ConfigError(f"model {name} is a file; give the folder that holds it")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ConfigError(f"model folder {name} does not exist.{_nearest_folder(path)}")
    _find_on_hub(name, revision)
    return name


_ADAPTER_CONFIG = "adapter_config.json"


def _nearest_folder(path: Path) -> str:
    """A sentence naming the folder most like a missing one, or the parent that is missing too."""
    if not path.parent.is_dir():
        return f" Nor does {path.parent}."
    folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    siblings = [folder for folder in folders if not folder.startswith(".")]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _find_on_hub(name: str, revision: str | None) -> None:
    """Ask the local cache, then the hub, once: the loaders would retry for half a minute."""
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        if constants.HF_HUB_OFFLINE:
            reason = "not in the local hub cache, and HF_HUB_OFFLINE keeps the hub out of reach"
        else:
            HfApi().model_info(name, revision=revision, timeout=10)
            return
    except HFValidationError:
        reason = "not a valid hub id"
    except GatedRepoError:
        reason = "gated on the hub: accept its terms there and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "not on the hub either, or private: log in with `hf auth login`"
    except Exception as error:  # the HTTP library is free to raise its own
        reason = f"the hub cannot be asked ({_first_line(error)})"
    raise ConfigError(f"no folder {name}; {reason}.{_nearest_folder(Path(name))}")


def _from_pretrained(
    name: str,
    *,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    revision: str | None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    source = _locate(name, revision)
    if _is_adapter(source):
        base, _ = _from_pretrained(
            _adapter_base(source),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            revision=None,
        )
        with _clear_errors(source), _hushed_peft():
            adapted = _peft().PeftModel.from_pretrained(cast(PreTrainedModel, base), source)
            return adapted, _load_tokenizer(source)
    if not allow_pickle:
        _refuse_pickle(source)
    shared: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    with _clear_errors(source):
        model, report = cast(Any, AutoModelForCausalLM).from_pretrained(
            source,
            dtype=dtype or "auto",
            use_safetensors=None if allow_pickle else True,
            ignore_mismatched_sizes=True,  # reported, and refused below in words
            output_loading_info=True,
            **shared,
        )
        tokenizer = _load_tokenizer(source, **shared)
    if hasattr(model, "peft_config"):
        raise ConfigError(
            f"model {source}: an adapter lies beside its weights; keep it in a folder of its own, "
            "or merge it first"
        )
    _check_complete(source, report)
    return model, tokenizer


def _load_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer a folder declares.

    `AutoTokenizer` reads every folder of some families (Qwen2 among them) with the family's own
    class, even one that declares a plain `tokenizer.json`; its text would be split otherwise.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    declared = Path(source) / "tokenizer_config.json"
    if declared.is_file() and (Path(source) / "tokenizer.json").is_file():
        name = json.loads(declared.read_text()).get("tokenizer_class")
        if name in _PLAIN_TOKENIZERS and type(tokenizer).__name__ not in _PLAIN_TOKENIZERS:
            tokenizer = cast(Any, PreTrainedTokenizerFast).from_pretrained(source)
    return cast(PreTrainedTokenizerBase, tokenizer)


_PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


def _check_complete(source: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that would stay random; say which stored ones found no place."""
    if wrong := sorted(report["mismatched_keys"]):
        key, stored, expected = wrong[0]
        raise ConfigError(
            f"model {source}: {key} is {list(stored)} in its files and {list(expected)} by its "
            f"config.json ({len(wrong)} such weights); the two belong to different models"
        )
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"model {source}: {len(missing)} weights are not in its files and would be random, "
            f"{missing[0]} the first; the files are incomplete or of another architecture"
        )
    if unused := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"model {source}: {len(unused)} weights in its files have no place in the model and "
            f"are left out, {unused[0]} the first",
            stacklevel=2,
        )


def _refuse_pickle(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(folder.glob("*.bin")):
        raise ConfigError(
            f"model {source}: its weights are in {pickles[0].name}, a pickle, which can run code "
            "when it is opened; convert it to safetensors, or set allow_pickle = true if you "
            "trust its author"
        )
    raise ConfigError(f"model folder {source}: no *.safetensors file in it")


@contextlib.contextmanager
def _clear_errors(source: str) -> Iterator[None]:
    """Turn what the Hugging Face libraries raise about one model into a `ConfigError`."""
    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        ImportError,
        SafetensorError,
    ) as error:
        if isinstance(error, ConfigError):
            raise
        way_out = ""
        if "trust_remote_code" in str(error):
            way_out = " Set trust_remote_code = true if you trust its author."
        raise ConfigError(f"cannot load model {source}: {_first_line(error)}{way_out}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


# --------------------------------------------------------------------------------------------
# Embedded models


def _role_without_weights(name: str) -> str | None:
    """The role of a built-in model that is built from nothing; None for any other model."""
    if not name.startswith(BUILTIN):
        return None
    short = name.removeprefix(BUILTIN)
    if short not in _BUILTIN_NAMES:
        raise ConfigError(f"there is no built-in model {name!r}. {nearest(short, _BUILTIN_NAMES)}")
    role = short.split("-", 1)[1]
    return role if role in _BUILTIN_SHAPES else None


def _build_builtin(role: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from opd.data.tasks import build_tokenizer

    return Qwen3ForCausalLM(_builtin_config(role)), build_tokenizer()


def _builtin_config(role: str) -> Qwen3Config:
    width, layers, heads, feed_forward = _BUILTIN_SHAPES[role]
    return Qwen3Config(
        vocab_size=53,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        intermediate_size=feed_forward,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        initializer_range=0.05,  # learns the tasks in fewer steps than 0.02 or 0.1
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _builtin_folder(name: str) -> Path:
    task = name.removeprefix(BUILTIN).split("-", 1)[0]
    folder = ASSETS / f"{task}_teacher"
    if not folder.is_dir():
        shipped = [BUILTIN + entry.name.replace("_", "-") for entry in ASSETS.glob("*_teacher")]
        raise ConfigError(
            f"the package ships no weights for {name}; it ships {', '.join(sorted(shipped))}"
        )
    return folder


# --------------------------------------------------------------------------------------------
# LoRA


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, a LoRA student is the model it started from.

    Raises:
        ConfigError: the model has no adapters.
    """
    if not hasattr(model, "get_base_model"):
        raise ConfigError(
            "a model without adapters holds no copy of its initial weights; load a second one"
        )
    with cast(Any, model).disable_adapter():
        yield


def _add_lora(
    model: PreTrainedModel | PeftModel, settings: LoraSettings, *, reference: str
) -> PeftModel:
    if hasattr(model, "get_base_model"):
        raise ConfigError(
            f"lora: {reference} is an adapter already; merge it into a model folder first"
        )
    base = cast(PreTrainedModel, model)
    targets = settings.target_modules
    if not isinstance(targets, str):
        _check_targets(base, targets)
    peft = _peft()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=cast(int, settings.alpha),  # any number will do
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with _clear_errors(reference), _hushed_peft():
        adapted = peft.get_peft_model(base, config)
    config.base_model_name_or_path = _lasting_reference(reference)
    return cast("PeftModel", adapted)


def _check_targets(base: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Every name must end the path of a layer, and none may be a matrix with two uses."""
    linear = {path for path, module in base.named_modules() if not [*module.children()]}
    inputs, outputs = base.get_input_embeddings(), _output_layer(base)
    tied = outputs is not None and outputs.weight is cast(nn.Embedding, inputs).weight
    shared = [p for p, m in base.named_modules() if tied and (m is inputs or m is outputs)]
    for target in targets:
        if not any(_ends_with(path, target) for path in linear):
            leaves = {path.rsplit(".", 1)[-1] for path in linear}
            raise ConfigError(
                f"lora.target_modules: {base.config.model_type} has no layer {target!r}. "
                f"{nearest(target, leaves)}"
            )
        if any(_ends_with(path, target) for path in shared):
            raise ConfigError(
                f"lora.target_modules: {target!r} shares its weight with "
                f"{' and '.join(p for p in shared if not _ends_with(p, target))}, so an adapter "
                "on one of the two could not be merged; leave it out"
            )


def _ends_with(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "LoRA needs the peft package: pip install 'opd[lora]', or leave lora out"
        ) from error
    return peft


@contextlib.contextmanager
def _hushed_peft() -> Iterator[None]:
    """Without warnings that ask nothing of the user."""
    with warnings.catch_warnings():
        # GPT-2 stores its weights transposed; PEFT notices, corrects its setting and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        # PEFT 0.21 reads an attribute that Transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def _is_adapter(source: str) -> bool:
    folder = Path(source)
    return (folder / _ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _adapter_base(source: str) -> str:
    with _clear_errors(source):
        base = json.loads((Path(source) / _ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    if not base:
        raise ConfigError(f"adapter {source}: {_ADAPTER_CONFIG} names no base model")
    return str(base)


def _lasting_reference(reference: str) -> str:
    """How an adapter names its base: absolute where it is a folder, so that it can move."""
    if reference.startswith(BUILTIN) and _role_without_weights(reference) is None:
        return str(_builtin_folder(reference))
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.is_dir() else reference


# --------------------------------------------------------------------------------------------
# Saving


def save_model(
    loaded: LoadedModel, folder: str | Path, *, merge_lora: bool = True, dtype: str = "auto"
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    It holds weights, generation config, tokenizer and chat template. The weights of the live
    model are not touched. Existing files of the same names are replaced, not atomically.

    Args:
        merge_lora: add adapters into the weights; False writes the adapter alone.
        dtype: of the written weights; `auto` is that of the live ones. An adapter keeps its own.

    Raises:
        ConfigError: an adapter alone, whose base exists in no folder.
    """
    base = _bare(loaded.model)
    with _quiet():
        if base is not loaded.model and not merge_lora:
            _save_adapter(loaded, folder)
        else:
            state = base.state_dict() if base is loaded.model else _merged_state(base)
            _save_weights(base, state, Path(folder), _resolve_dtype(dtype) or base.dtype)
        loaded.tokenizer.save_pretrained(folder)


def _save_weights(
    base: PreTrainedModel, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype
) -> None:
    cast_state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    base.save_pretrained(folder, state_dict=cast_state)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save_adapter(loaded: LoadedModel, folder: str | Path) -> None:
    if _role_without_weights(loaded.reference):
        raise ConfigError(
            f"{loaded.reference} is drawn at random when it is built, so its adapter alone would "
            "be worth nothing; save it merged"
        )
    # The embeddings are the base's own; looking for resized ones would ask the hub.
    cast(Any, loaded.model).save_pretrained(str(folder), save_embedding_layers=False)


@torch.no_grad()
def _merged_state(base: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of the bare model with its adapters added, under the names it had without them."""
    layers: dict[str, nn.Module] = dict(base.named_modules())
    merged: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            if leaf == "weight":
                tensor = (tensor.float() + _lora_delta(layers[owner])).to(tensor.dtype)
        merged[f"{owner}.{leaf}"] = tensor
    return merged


# --------------------------------------------------------------------------------------------
# Sizes without weights


def memory_estimate(reference: str | Path) -> MemoryEstimate:
    """Parameters and bytes of a model, from the headers of its files or its config alone.

    `bytes` is what the weights take as stored; in another dtype it is `parameters` times its
    width. For an adapter it is the base that counts.

    Raises:
        ConfigError: there is no such model, or its headers cannot be read.
    """
    name = str(reference)
    if role := _role_without_weights(name):
        return _estimate_from_config(_builtin_config(role))
    source = _locate(name)
    if _is_adapter(source):  # small beside its base
        return memory_estimate(_adapter_base(source))
    read = get_local_safetensors_metadata if Path(source).is_dir() else get_safetensors_metadata
    with _clear_errors(source):
        try:
            files = read(source).files_metadata.values()
        except NotASafetensorsRepoError:
            return _estimate_from_config(AutoConfig.from_pretrained(source))
    tensors = [tensor for file in files for tensor in file.tensors.values()]
    return {
        "parameters": sum(tensor.parameter_count for tensor in tensors),
        "bytes": sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors),
    }


def _estimate_from_config(config: PreTrainedConfig) -> MemoryEstimate:
    with torch.device("meta"):
        model = cast(Any, AutoModelForCausalLM).from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    width = cast(torch.dtype, config.dtype or torch.float32).itemsize
    return {"parameters": count, "bytes": width * count}

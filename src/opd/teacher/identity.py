"""What tells one model from another: hashes of weights, vocabulary and chat template."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from opd.models import LoadedModel
from opd.teacher.query import Described

CHUNK = 1 << 22
"""Entries that are summed at once, in 64 bits, where a sum wraps around everywhere alike."""

PRIME = 65521
"""Places are counted modulo this."""


def identity(loaded: LoadedModel, *, name: str = "") -> Described:
    """What a server says of a model, and a preflight compares with another."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", 0)
    return replace(
        identity_without_weights(loaded),
        model=name or loaded.reference,
        revision=fingerprint(loaded.model),
        dtype=str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        max_tokens=int(limit or 0),
    )


def identity_without_weights(loaded: LoadedModel) -> Described:
    """Vocabulary, template and special tokens of a model, whose weights need not be there."""
    tokenizer: Any = loaded.tokenizer
    special = {"eos": loaded.eos_ids, "pad": (loaded.pad_id,)}
    if tokenizer.bos_token_id is not None:
        special["bos"] = (int(tokenizer.bos_token_id),)
    return Described(
        model=loaded.reference,
        vocab_size=loaded.vocab_size,
        vocabulary=vocabulary_hash(tokenizer),
        template=template_hash(tokenizer),
        special=special,
    )


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash of which string stands for which id."""
    by_id = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return _short(json.dumps(by_id).encode())


def template_hash(tokenizer: Any) -> str:
    """A hash of the chat template; empty where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return _short(json.dumps(template, sort_keys=True).encode()) if template else ""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash that changes with what the model computes.

    Of the numbers in its config, and of every weight and buffer: name, shape, dtype, and two sums
    over all entries as integers, one of them weighted by their places.
    """
    seen = hashlib.sha256(json.dumps(_settings(model), sort_keys=True, default=str).encode())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        told = f"{name} {tuple(value.shape)} {value.dtype} {_sums(value)}"
        seen.update(told.encode())
    return seen.hexdigest()[:16]


def _settings(model: Any) -> dict[str, Any]:
    """The config, without what says where the model came from and how it is run."""
    settings = model.config.to_dict()
    return {name: value for name, value in settings.items() if not _is_about_loading(name)}


def _is_about_loading(name: str) -> bool:
    return name.startswith("_") or name in ("dtype", "torch_dtype", "transformers_version")


def _sums(value: Tensor) -> tuple[int, int]:
    """Sums of the entries' bits, exact, so the same on every device."""
    flat = value.detach().contiguous().reshape(-1)
    whole = flat.view(_INTEGERS[flat.element_size()]) if flat.numel() else flat.long()
    plain = placed = 0
    for start in range(0, len(whole), CHUNK):
        entries = whole[start : start + CHUNK].long()
        place = torch.arange(start + 1, start + 1 + len(entries), device=entries.device)
        plain += int(entries.sum())
        placed += int((entries * (place % PRIME)).sum())
    return plain, placed


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

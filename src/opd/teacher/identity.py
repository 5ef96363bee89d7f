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

SAMPLED = 16384
"""Entries of every weight that are hashed, evenly spread."""


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
    """A hash that changes with the weights.

    Of every weight its name, shape and dtype, and some thousand of its entries: training moves
    them all.
    """
    seen = hashlib.sha256()
    for name, weight in model.named_parameters():
        seen.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)]
        seen.update(_bytes(some))
    return seen.hexdigest()[:16]


def _bytes(values: Tensor) -> bytes:
    return bytes(values.cpu().contiguous().view(torch.uint8).numpy())


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

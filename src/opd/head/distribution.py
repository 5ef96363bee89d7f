"""Distributions over the vocabulary: from logits, merged, mapped from another vocabulary."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.formula.numerics import project
from opd.types import Unembedding


def log_probs_of(
    hidden: Float[Tensor, "n H"],
    unembedding: Unembedding,
    *,
    temperature: float = 1.0,
    merge_ids: tuple[tuple[int, ...], ...] = (),
) -> Float[Tensor, "n V"]:
    """Log-probabilities of the real tokens, float32 or wider, for all rows at once.

    Args:
        temperature: divides the logits.
        merge_ids: groups of ids whose mass is summed into the first; the others get none.
    """
    logits = project(hidden, unembedding)
    return normalised(logits, temperature=temperature, merge_ids=merge_ids)


def normalised(
    logits: Float[Tensor, "n V"],
    *,
    temperature: float = 1.0,
    merge_ids: tuple[tuple[int, ...], ...] = (),
) -> Float[Tensor, "n V"]:
    """Log-probabilities of logits; temperature and groups as in `log_probs_of`."""
    if temperature != 1.0:
        logits = logits / temperature
    return merge(logits.log_softmax(-1), merge_ids)


def merge(
    log_probs: Float[Tensor, "n V"], merge_ids: tuple[tuple[int, ...], ...]
) -> Float[Tensor, "n V"]:
    """Sum the mass of each group of ids into its first id; the others are left with none."""
    for group in merge_ids:
        ids = torch.tensor(group, device=log_probs.device)
        together = log_probs.index_select(-1, ids).logsumexp(-1, keepdim=True)
        log_probs = log_probs.index_fill(-1, ids, -math.inf).index_copy(-1, ids[:1], together)
    return log_probs


def merged_tokens(
    tokens: Int[Tensor, "*n"], merge_ids: tuple[tuple[int, ...], ...]
) -> Int[Tensor, "*n"]:
    """Tokens with every id of a group replaced by the group's first."""
    for first, *others in merge_ids:
        for other in others:
            tokens = torch.where(tokens == other, first, tokens)
    return tokens


def mapped(scores: Float[Tensor, "n W"], id_map: Int[Tensor, " V"]) -> Float[Tensor, "n V"]:
    """Scores over another vocabulary at the ids of this one; -inf where it has no such token.

    Args:
        scores: logits or log-probabilities, which have to be normalised again.
        id_map: the other vocabulary's id of each token, -1 where it has none.
    """
    picked = scores.index_select(-1, id_map.clamp(min=0))
    return picked.masked_fill_(id_map < 0, -math.inf)

"""From hidden states to what a teacher is asked: a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.formula.divergence import teacher_entropy
from opd.head import products
from opd.head.distribution import merge, merged_tokens
from opd.head.rows import likeliest
from opd.types import Unembedding

CHUNK_BYTES = 32 * 2**20
"""Logits that exist at once."""


@torch.no_grad()
def answers(
    hidden: Float[Tensor, "n H"],
    head: Unembedding,
    wanted: Collection[str],
    *,
    tokens: Int[Tensor, " n"],
    top_k: int = 0,
    ids: Int[Tensor, "n J"] | None = None,
    temperature: float = 1.0,
    merge_ids: tuple[tuple[int, ...], ...] = (),
) -> dict[str, Tensor]:
    """The fields that are wanted of every row, as `TeacherScores` names them.

    Args:
        wanted: names of `opd.teacher.query.WANTED`.
        tokens: the rows' own tokens, for `sampled`.
        top_k: how many tokens `top` holds.
        ids: for `ids`.
        temperature: divides the logits.
        merge_ids: groups of ids whose mass is summed into the first; `tokens` and `ids` may name
            any of a group.
    """
    found: dict[str, Tensor] = {"hidden": hidden} if "hidden" in wanted else {}
    if not set(wanted) - {"hidden"}:
        return found
    dtype, rows = products.wide_dtype(hidden), len(hidden)
    size = max(1, CHUNK_BYTES // (dtype.itemsize * head.vocab_size))
    buffer = torch.empty((min(size, rows), head.vocab_size), dtype=dtype, device=hidden.device)
    parts = []
    for start in range(0, max(rows, 1), size):
        chunk = slice(start, min(start + size, rows))
        logits = buffer[: chunk.stop - chunk.start]
        products.logits_into(logits, hidden[chunk], head)
        if temperature != 1.0:
            logits.div_(temperature)
        own = merged_tokens(tokens[chunk], merge_ids)
        chosen = None if ids is None else merged_tokens(ids[chunk], merge_ids)
        parts.append(_of_logits(logits, wanted, own, top_k, chosen, merge_ids))
    return found | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _of_logits(
    logits: Float[Tensor, "n V"],
    wanted: Collection[str],
    tokens: Int[Tensor, " n"],
    top_k: int,
    ids: Int[Tensor, "n J"] | None,
    merge_ids: tuple[tuple[int, ...], ...],
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"logsumexp": logits.logsumexp(-1)} if "logsumexp" in wanted else {}
    if not set(wanted) - {"logsumexp", "hidden"}:
        return found
    # as the head does: a teacher that is the student says what the student says, to the last bit
    log_probs = merge(logits.log_softmax(-1), merge_ids)
    if "sampled" in wanted:
        found["sampled_logp"] = log_probs.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
    if "top" in wanted:
        found["top_logp"], found["top_ids"] = likeliest(log_probs, top_k)
    if "ids" in wanted and ids is not None:
        found["ids_logp"] = log_probs.gather(-1, ids.long())
    if "entropy" in wanted:
        found["entropy"] = teacher_entropy(log_probs)
    return found

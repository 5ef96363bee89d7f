"""Queries for tests, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd.teacher.query import WANTED, Asked, Query, bits


def asked(
    generator: torch.Generator,
    *,
    vocab_size: int,
    prompt: Sequence[int] | int = 5,
    length: int = 6,
    wanted: Sequence[str] = WANTED,
    columns: int = 3,
    some: bool = False,
) -> Asked:
    """One sequence.

    Args:
        prompt: its token ids, or how many to draw.
        columns: ids to score at every token that wants `ids`.
        some: every token wants a random part of `wanted`.
    """

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, vocab_size, shape, generator=generator, dtype=torch.int32)

    read = draw(prompt) if isinstance(prompt, int) else torch.tensor(prompt, dtype=torch.int32)
    want = torch.full((length,), bits(wanted), dtype=torch.uint8)
    if some:
        want &= torch.randint(0, 1 << len(WANTED), (length,), generator=generator).to(torch.uint8)
    rows = int(((want & bits(["ids"])) != 0).sum())
    return Asked(read, draw(length), want, draw(rows, columns) if rows else None)


def query(
    seed: int = 0,
    *,
    vocab_size: int,
    sequences: int = 3,
    top_k: int = 4,
    **how: object,
) -> Query:
    """Some sequences of growing length."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        asked(generator, vocab_size=vocab_size, length=4 + i, **how)  # type: ignore[arg-type]
        for i in range(sequences)
    ]
    return Query(tuple(made), top_k=top_k)

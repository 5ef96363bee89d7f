"""A teacher of plain arithmetic, batches for it, and a process that fills a cache until it dies."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from opd.rollout.pack import pack_rollout
from opd.teacher import shard
from opd.teacher.cache import CachedTeacher
from opd.teacher.cache_folder import ScoreCache
from opd.types import (
    Batch,
    Need,
    Provenance,
    Rollout,
    TeacherRequest,
    TeacherScores,
    Unembedding,
    pack_rows,
)

V = 53


class Told(NamedTuple):
    """A prompt and a response; the places of the response that no loss looks at."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    closed: tuple[int, ...] = ()


def told(seed: int, *, longest: int = 9) -> Told:
    """A sequence that belongs to a number."""
    draw = random.Random(seed)
    prompt = tuple(draw.randrange(3, V) for _ in range(draw.randrange(1, 6)))
    response = tuple(draw.randrange(3, V) for _ in range(draw.randrange(2, longest)))
    return Told(prompt, response, (1,) if seed % 3 == 0 else ())


def packed(sequences: Sequence[Told], merge_ids: tuple[tuple[int, ...], ...] = ()) -> Batch:
    width = max((len(one.response) for one in sequences), default=0)
    tokens = torch.zeros((len(sequences), width), dtype=torch.long)
    provenance = torch.full(tokens.shape, int(Provenance.PADDING))
    for row, one in enumerate(sequences):
        tokens[row, : len(one.response)] = torch.tensor(one.response, dtype=torch.long)
        provenance[row, : len(one.response)] = int(Provenance.STUDENT)
        provenance[row, list(one.closed)] = int(Provenance.TOOL)
    rollout = Rollout(
        prompt_ids=tuple(one.prompt for one in sequences),
        tokens=tokens,
        mask=provenance == Provenance.STUDENT,
        provenance=provenance,
        sampler_logp=torch.zeros(tokens.shape),
        policy_version=torch.zeros_like(tokens),
        group=torch.arange(len(sequences)),
        stop_reason=("eos",) * len(sequences),
        verdict=torch.full((len(sequences),), torch.nan),
    )
    return pack_rollout(rollout, pad_id=0, merge_ids=merge_ids)


class Arithmetic:
    """Says of every row something that follows from the tokens up to it, and of nothing else.

    So its answers are the same to the bit in any batch. Counts what it is asked.
    """

    def __init__(self, *, width: int = 4, dtype: torch.dtype = torch.bfloat16) -> None:
        self.width, self.dtype = width, dtype
        self.sequences: list[int] = []
        self.shift = 0.0

    def can(self, need: Need) -> bool:
        return True

    def score(self, request: TeacherRequest) -> TeacherScores:
        batch = request.batch
        self.sequences.append(batch.input_ids.shape[0])
        sums = batch.input_ids.double().cumsum(1).flatten()[batch.row_index]
        own = pack_rows(batch.token.tokens, batch.token.mask).double()
        if request.distribution:
            spread = torch.arange(1, self.width + 1, dtype=torch.float64)
            hidden = (sums.unsqueeze(1) * spread).sin() + self.shift
            weight = torch.linspace(-1, 1, V * self.width).reshape(V, self.width)
            return TeacherScores(
                hidden=hidden.to(self.dtype), unembedding=Unembedding(weight.to(self.dtype), V)
            )
        logp = -((sums + own).sin().abs() + 1 + self.shift).float()
        top_ids = (sums.long().unsqueeze(1) + torch.arange(request.top_k)) % V
        return TeacherScores(
            sampled_logp=logp if request.sampled else None,
            top_ids=top_ids if request.top_k else None,
            top_logp=logp.unsqueeze(1) - torch.arange(request.top_k) if request.top_k else None,
            ids=request.ids,
            ids_logp=None if request.ids is None else logp.unsqueeze(1) - request.ids.float(),
            entropy=logp.neg().double() if request.entropy else None,
            provenance={"reference": "arithmetic"},
        )


def asks(sequences: Sequence[Told]) -> TeacherRequest:
    return TeacherRequest(batch=packed(sequences), distribution=False, sampled=True, top_k=2)


def logp_of(scores: TeacherScores) -> Tensor:
    assert scores.sampled_logp is not None
    return scores.sampled_logp


AT_ONCE = 4


def numbers(writer: int, step: int) -> list[int]:
    """What a writer asks about at a step: half of it is asked by the other writer too."""
    own = [1_000_000 * (writer + 1) + AT_ONCE * step + i for i in range(AT_ONCE // 2)]
    return own + [AT_ONCE * step + i for i in range(AT_ONCE // 2)]


def slowly(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write safetensors so that there is time to die in the middle."""
    data = safetensors.torch.save(tensors, metadata)
    with file.open("wb", buffering=0) as handle:
        for start in range(0, len(data), len(data) // 3 + 1):
            handle.write(data[start : start + len(data) // 3 + 1])
            time.sleep(0.002)


def write_on(folder: Path, writer: int, first: int, steps: int, acknowledged: Path) -> None:
    """Score step after step, and say which ones are surely on disk."""
    torch.set_num_threads(1)
    shard.save_file = slowly
    cache = ScoreCache(folder, shard_bytes=2**20)
    teacher = CachedTeacher(Arithmetic(), cache, revision="r1")
    handle = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in range(first, first + steps):
        scores = teacher.score(asks([told(n) for n in numbers(writer, step)]))
        plain = Arithmetic().score(asks([told(n) for n in numbers(writer, step)]))
        assert torch.equal(logp_of(scores), logp_of(plain))
        if step % 2:
            teacher.flush()
            os.write(handle, f"{writer} {step}\n".encode())
    teacher.close()

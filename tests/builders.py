"""Batches whose logits are free: the real head over an identity unembedding, in float64.

Hidden states are the logits themselves, one row per response token, so a loss and its gradient can
be compared with a transcription that knows nothing of hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd.head import HeadOutput, linear_head, log_probs_of
from opd.objective import Method, Objective, Routed
from opd.rollout.pack import pack_rollout, split, with_token
from opd.types import (
    Batch,
    FieldKey,
    Provenance,
    Rollout,
    TeacherScores,
    Unembedding,
    pack_rows,
    unpack_rows,
)

STUDENT, DATA, TEACHER, TOOL = (
    int(kind) for kind in (Provenance.STUDENT, Provenance.DATA, Provenance.TEACHER, Provenance.TOOL)
)


def rollout_of(
    tokens: Tensor,
    mask: Tensor,
    provenance: Tensor,
    *,
    prompt_ids: Sequence[tuple[int, ...]] | None = None,
    stop_reason: Sequence[str] | None = None,
    **changes: Any,
) -> Rollout:
    """A rollout from its tensors; one-token prompts unless given."""
    size = tokens.shape[0]
    made = Rollout(
        prompt_ids=tuple(prompt_ids or ((0,),) * size),
        tokens=tokens,
        mask=mask,
        provenance=provenance,
        sampler_logp=torch.zeros(tokens.shape, dtype=torch.float64),
        policy_version=torch.zeros_like(tokens),
        group=torch.arange(size),
        stop_reason=tuple(stop_reason or ("length",) * size),
        verdict=torch.full((size,), math.nan),
    )
    return replace(made, **changes)


@dataclass(frozen=True)
class Case:
    """Responses with the logits of student and views at every token, `[B, T, V]` each."""

    tokens: Tensor
    mask: Tensor
    provenance: Tensor
    student_logits: Tensor
    teacher_logits: Mapping[str, Tensor]

    @classmethod
    def random(
        cls,
        seed: int,
        *,
        writers: Sequence[int] = (STUDENT,),
        lengths: Sequence[int] = (4, 0, 6, 1, 5),
        vocab_size: int = 7,
        gaps: bool = True,
        views: Iterable[str] = ("teacher",),
        scale: float = 1.5,
    ) -> Case:
        """Sequences of these lengths, written by the writers in turn, with tool gaps inside."""
        draw = torch.Generator().manual_seed(seed)
        shape = (len(lengths), max(lengths))
        inside = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
        tool = torch.rand(shape, generator=draw) < (0.3 if gaps else 0.0)
        writer = torch.tensor([writers[b % len(writers)] for b in range(shape[0])]).unsqueeze(1)
        provenance = torch.where(tool, TOOL, writer.expand(shape))

        def logits() -> Tensor:
            return scale * torch.randn((*shape, vocab_size), generator=draw, dtype=torch.float64)

        return cls(
            tokens=torch.randint(vocab_size, shape, generator=draw),
            mask=inside & ~tool,
            provenance=torch.where(inside, provenance, int(Provenance.PADDING)),
            student_logits=logits(),
            teacher_logits={view: logits() for view in views},
        )

    @property
    def vocab_size(self) -> int:
        return self.student_logits.shape[-1]

    def rows(self, logits: Tensor) -> Tensor:
        return pack_rows(logits, self.mask)

    def batch(
        self,
        *,
        special_ids: Sequence[int] = (),
        merge_ids: tuple[tuple[int, ...], ...] = (),
        dtype: torch.dtype = torch.float64,
        **token: Any,
    ) -> Batch:
        """The packed batch, every view answering with its logits as hidden states."""
        packed = pack_rollout(
            rollout_of(self.tokens, self.mask, self.provenance),
            pad_id=0,
            special_ids=special_ids,
            merge_ids=merge_ids,
        )
        views = {
            name: TeacherScores(
                hidden=self.rows(logits).to(dtype), unembedding=identity(self.vocab_size, dtype)
            )
            for name, logits in self.teacher_logits.items()
        }
        likeliest = log_probs_of(
            self.rows(self.student_logits), identity(self.vocab_size), merge_ids=merge_ids
        ).argsort(-1, descending=True)
        return with_token(packed, **{"views": views, "student_top_ids": likeliest, **token})

    def reference_inputs(self, view: str = "teacher") -> tuple[npt.NDArray[Any], ...]:
        """Positional arguments of the transcriptions that read a teacher."""
        tensors = (
            self.student_logits,
            self.teacher_logits[view],
            self.tokens,
            self.mask,
            self.provenance,
        )
        return tuple(tensor.numpy() for tensor in tensors)


def identity(vocab_size: int, dtype: torch.dtype = torch.float64) -> Unembedding:
    return Unembedding(torch.eye(vocab_size, dtype=dtype), vocab_size)


@dataclass(frozen=True)
class Outcome:
    """A loss, its gradient with respect to the packed logits, and what else the head said."""

    loss: float
    gradient: Tensor
    head: HeadOutput


def evaluate(
    case: Case,
    objective: Objective,
    batch: Batch | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    chunk_bytes: int = 2**28,
) -> Outcome:
    """Loss and gradient of a whole batch in one visit, coupled quantities settled first."""
    batch = settle(case, objective, case.batch(dtype=dtype) if batch is None else batch, dtype)
    logits = case.rows(case.student_logits).to(dtype).requires_grad_()
    unembedding = identity(case.vocab_size, dtype)
    out = linear_head(logits, unembedding, batch, objective, chunk_bytes=chunk_bytes)
    assert out.loss is not None
    out.loss.backward()
    return Outcome(float(out.loss.detach()), _gradient(logits), out)


def evaluate_in_parts(
    case: Case,
    objective: Objective,
    max_tokens: int,
    batch: Batch | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, Tensor]:
    """The same, in micro-batches of `max_tokens`; the signal phase runs once, before them."""
    batch = settle(case, objective, case.batch(dtype=dtype) if batch is None else batch, dtype)
    logits = case.rows(case.student_logits).to(dtype).requires_grad_()
    total = 0.0
    for part in split(batch, max_tokens=max_tokens):
        out = linear_head(
            logits[part.rows], identity(case.vocab_size, dtype), part.batch, objective
        )
        assert out.loss is not None
        out.loss.backward()
        total += float(out.loss.detach())
    return total, _gradient(logits)


def settle(
    case: Case, objective: Objective, batch: Batch, dtype: torch.dtype = torch.float64
) -> Batch:
    """The signal phase; the batch itself where nothing is coupled."""
    if not objective.coupled:
        return batch
    out = linear_head(
        case.rows(case.student_logits).to(dtype),
        identity(case.vocab_size, dtype),
        batch,
        wanted=objective.signal_keys(),
        temperature=objective.temperature,
    )
    return with_token(batch, coupled=objective.signal(batch.token, out.fields))


def fields_of(case: Case, *keys: FieldKey, batch: Batch | None = None) -> list[Tensor]:
    """Fields of every row, as the head looks them up."""
    out = linear_head(
        case.rows(case.student_logits),
        identity(case.vocab_size),
        batch or case.batch(),
        wanted=frozenset(keys),
    )
    return [out.fields[key] for key in keys]


def full_gradient(case: Case, packed: Tensor) -> npt.NDArray[np.float64]:
    """A packed gradient as `[B, T, V]`, zero outside the mask."""
    whole: npt.NDArray[np.float64] = unpack_rows(packed, case.mask).numpy()
    return whole


def with_reduction(method: Method, reduction: str) -> Objective:
    """The method's objective with every term averaged this way."""
    objective = method.objective
    terms = (
        replace(term, source=replace(term.source, reduction=reduction))
        if isinstance(term, Routed)
        else replace(term, reduction=reduction)
        for term in objective.terms
    )
    return Objective(*terms, temperature=objective.temperature)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad

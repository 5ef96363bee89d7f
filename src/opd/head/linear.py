"""The only loss path: hidden states in, loss, metrics and per-row by-products out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd.formula import support
from opd.formula.numerics import project
from opd.head.rows import ChunkFields, likeliest
from opd.objective import SETTLED, Objective, token_field
from opd.terms import term_key
from opd.types import (
    Batch,
    Bound,
    FieldKey,
    Provenance,
    Stat,
    TeacherScores,
    Unembedding,
    add_stats,
    pack_rows,
)

CHUNK_BYTES = 256 * 2**20
HIDDEN = FieldKey("student_hidden")


@dataclass(frozen=True)
class HeadOutput:
    """What one visit of the head returns; see `StudentOutput`."""

    loss: Float[Tensor, ""] | None
    stats: Mapping[str, Stat] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    fields: Mapping[FieldKey, Tensor] = field(default_factory=dict)


def log_probs_of(
    hidden: Float[Tensor, "n H"],
    unembedding: Unembedding,
    *,
    temperature: float = 1.0,
    merge_ids: tuple[tuple[int, ...], ...] = (),
) -> Float[Tensor, "n V"]:
    """Log-probabilities of the real tokens, float32 or wider.

    Args:
        temperature: divides the logits.
        merge_ids: groups of ids whose mass is summed into the first; the others get none.
    """
    logits = project(hidden, unembedding)
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


def linear_head(
    hidden: Float[Tensor, "N H"],
    unembedding: Unembedding,
    batch: Batch,
    objective: Objective | None = None,
    *,
    wanted: frozenset[FieldKey] = frozenset(),
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> HeadOutput:
    """Loss of any objective from the hidden states of the response rows.

    With an objective: its share of the loss for this micro-batch, already divided by the counts
    of the whole optimizer step, so that micro-batches add up. Without: only the `wanted` fields,
    without gradient. Rows are visited in chunks whose logits fit into `chunk_bytes`.

    Args:
        hidden: last hidden states of the rows of `batch`, in the order of `batch.row_index`.
        unembedding: the student's.
        batch: row fields, views and counts.
        wanted: fields to return, packed, detached.
        temperature: divides all logits where there is no objective; an objective has its own.
    """
    if objective is None and wanted == {HIDDEN}:
        return HeadOutput(None, fields={HIDDEN: hidden.detach()})  # nothing to project
    if objective is not None:
        temperature = objective.temperature
    visit = _Visit(unembedding, batch, objective, wanted, temperature)
    slices = _slices(hidden.shape[0], unembedding.vocab_size, chunk_bytes)
    if objective is None:
        with torch.no_grad():
            parts = [visit(hidden[rows], rows) for rows in slices]
    elif len(slices) == 1:
        parts = [visit(hidden, slices[0])]
    else:
        parts = [checkpoint(visit, hidden[rows], rows, use_reentrant=False) for rows in slices]
    return _join(parts, objective)


@dataclass
class _Visit:
    """One chunk of rows: project, look up, evaluate."""

    unembedding: Unembedding
    batch: Batch
    objective: Objective | None
    wanted: frozenset[FieldKey]
    temperature: float

    def __post_init__(self) -> None:
        self._factors = self.objective.reduction_factors(self.batch) if self.objective else {}

    def __call__(self, hidden: Float[Tensor, "n H"], rows: slice) -> HeadOutput:
        token, merge_ids = self.batch.token, self.batch.merge_ids
        log_probs = log_probs_of(
            hidden, self.unembedding, temperature=self.temperature, merge_ids=merge_ids
        )
        coupled = token.coupled

        def token_fields(name: str) -> Tensor:
            if name.startswith(SETTLED):
                return pack_rows(coupled[name.removeprefix(SETTLED)], token.mask)[rows]
            if name == "special_ids":
                return token_field(token, name)
            if name == "student_top_ids":
                return token_field(token, name)[rows]
            if name == HIDDEN.name:
                return hidden.detach()
            packed = pack_rows(token_field(token, name), token.mask)[rows]
            return merged_tokens(packed, merge_ids) if name == "tokens" else packed

        def project_view(scores: TeacherScores) -> Tensor:
            if scores.log_probs is not None:
                return merge(scores.log_probs, merge_ids)
            assert scores.hidden is not None
            assert scores.unembedding is not None
            return log_probs_of(
                scores.hidden,
                scores.unembedding,
                temperature=self.temperature,
                merge_ids=merge_ids,
            )

        look_up = ChunkFields(
            log_probs,
            token_fields,
            {name: scores.rows(rows) for name, scores in token.views.items()},
            project_view,
        )
        fields = {key: _wanted(look_up, log_probs, key).detach() for key in self.wanted}
        if self.objective is None:
            return HeadOutput(None, fields=fields)
        return replace(self._evaluate(log_probs, look_up, rows), fields=fields)

    def _evaluate(
        self, log_probs: Float[Tensor, "n V"], look_up: ChunkFields, rows: slice
    ) -> HeadOutput:
        assert self.objective is not None
        notes: dict[str, Tensor] = {}
        losses = self.objective.row_losses(look_up, notes)
        self._note_replaced(look_up, notes)
        loss = sum_terms([(losses[label], self._factors[label][rows]) for label in losses])
        stats: dict[str, Stat] = {}
        for label, value in losses.items():
            chosen = self._factors[label][rows] != 0
            stats[f"loss/{label}"] = _stat(value, chosen)
        for name, value in notes.items():
            label = name.split("/")[1].partition(".")[0]
            chosen = (self._factors[label][rows] != 0) & ~value.isnan()
            stats[name] = _stat(value, chosen)
        by_products = {f"loss/{label}": value.detach() for label, value in losses.items()}
        # the formula's value in two passes over memory; it has no gradient to keep finite
        by_products["student_entropy"] = torch.special.entr(log_probs.detach().exp()).sum(-1)
        student_rows = look_up(FieldKey("provenance")) == int(Provenance.STUDENT)
        stats["student/entropy"] = _stat(by_products["student_entropy"], student_rows)
        teacher_logp = FieldKey("teacher_logp", "teacher")
        if "teacher" in self.batch.token.views:
            ratio = (look_up(teacher_logp) - look_up(FieldKey("student_logp"))).detach()
            by_products["log_ratio"] = ratio
            stats["teacher/log_ratio"] = _stat(ratio, student_rows)
        counted = {name: stat for name, stat in stats.items() if stat.count}
        return HeadOutput(loss, counted, by_products)

    def _note_replaced(self, look_up: ChunkFields, notes: dict[str, Tensor]) -> None:
        """Where smoothing gave an entry more than the view did, and supports without an entry."""
        assert self.objective is not None
        for label, term in self.objective.parts():
            if term.smoothing:
                share = look_up.share_at_floor(term.against, term.smoothing)
                notes[f"changed/{label}/smoothing"] = share
            if Bound.of(term.support).function is support.intersection:
                ids = look_up(term_key(term, "support_ids"))
                notes[f"empty/{label}/support"] = (ids < 0).all(-1).to(torch.float32)


def _wanted(look_up: ChunkFields, log_probs: Float[Tensor, "n V"], key: FieldKey) -> Tensor:
    """A wanted field; the student's top ids are those of now, k of them by the key's support."""
    if key.name == "student_top_ids" and key.support is not None:
        return likeliest(log_probs, int(dict(key.support.knobs)["k"]))[1]
    return look_up(key)


def sum_terms(parts: list[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
    """Sum over terms and rows of loss times factor; rows of factor zero cannot spread a NaN."""
    total = parts[0][0].new_zeros(())
    for value, factor in parts:
        total = total + torch.where(factor == 0, 0.0, value * factor.to(value.dtype)).sum()
    return total


def _stat(value: Tensor, chosen: Tensor) -> Stat:
    kept = torch.where(chosen, value.detach(), 0.0)
    return Stat(float(kept.sum(dtype=torch.float64)), float(chosen.sum()))


def _slices(rows: int, vocab_size: int, chunk_bytes: int) -> list[slice]:
    size = max(1, chunk_bytes // (4 * vocab_size))
    return [slice(start, start + size) for start in range(0, rows, size)] or [slice(0, 0)]


def _join(parts: list[HeadOutput], objective: Objective | None) -> HeadOutput:
    loss = None
    if objective is not None:
        loss = torch.stack([part.loss for part in parts if part.loss is not None]).sum()
    return HeadOutput(
        loss,
        add_stats(part.stats for part in parts),
        {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows},
        {key: torch.cat([part.fields[key] for part in parts]) for key in parts[0].fields},
    )

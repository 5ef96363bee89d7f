"""The only loss path: hidden states in, loss, metrics and per-row by-products out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd.head.products import gathered
from opd.head.visit import (
    HIDDEN,
    NAMED,
    RATIOS,
    Asked,
    Budget,
    Seen,
    budget_on,
    sum_terms,
    visit,
)
from opd.objective import Objective
from opd.terms import REWARD
from opd.types import (
    Batch,
    FieldKey,
    Provenance,
    Stat,
    TeacherScores,
    Unembedding,
    pack_rows,
)


@dataclass(frozen=True)
class HeadOutput:
    """What one visit of the head returns; see `StudentOutput`."""

    loss: Float[Tensor, ""] | None
    stats: Mapping[str, Stat] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    fields: Mapping[FieldKey, Tensor] = field(default_factory=dict)


def linear_head(
    hidden: Float[Tensor, "N H"],
    unembedding: Unembedding,
    batch: Batch,
    objective: Objective | None = None,
    *,
    wanted: frozenset[FieldKey] = frozenset(),
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
) -> HeadOutput:
    """Loss of any objective from the hidden states of the response rows.

    With an objective: its share of the loss for this micro-batch, already divided by the counts
    of the whole optimizer step, so that micro-batches add up. Without: only the `wanted` fields,
    without gradient.

    The logits never exist in full: rows are visited in chunks, each projected once and
    differentiated on the spot, so the gradients are there when this returns and `backward`
    multiplies them by the gradient of the loss and hands them over, once.

    Args:
        hidden: last hidden states of the rows of `batch`, in the order of `batch.row_index`.
        unembedding: the student's; a weight in shards is gathered here, once.
        batch: row fields, views and counts.
        wanted: fields to return, packed, detached: keys of `FIELDS`, or of the by-products that
            `opd.head.byproducts` lists. NaN on rows that a view has no answer for.
        temperature: divides all logits where there is no objective; an objective has its own.
        chunk_bytes: what the logits of a chunk may take, the student's and every view's together;
            the device's default if None.

    Returns:
        `rows` holds, per term, `loss/<label>`, and `student_logp`, `student_entropy` and, with a
        view called teacher, `log_ratio`; with one called teacher.NAME, `log_ratio/NAME`; and what
        terms note of a row, such as `advantage/<label>`.

    Raises:
        TeacherError: a view that does not answer what the objective compares.
        RuntimeError: a second `backward` through the loss.
    """
    if objective is None and wanted == {HIDDEN}:
        return HeadOutput(None, fields={HIDDEN: hidden.detach()})  # nothing to project
    unembedding = gathered(unembedding)
    budget = budget_on(hidden.device)
    if chunk_bytes is not None:
        budget = replace(budget, chunk_bytes=chunk_bytes)
    if objective is None:
        seen = visit(
            hidden.detach(),
            _detached(unembedding),
            batch,
            None,
            wanted=wanted,
            temperature=temperature,
            budget=budget,
        )
        return HeadOutput(None, fields=seen.fields)
    request = _Request(unembedding, batch, objective, wanted, budget, torch.is_grad_enabled())
    node: Any = _Differentiated
    loss: Tensor = node.apply(hidden, unembedding.weight, unembedding.bias, request)
    seen = request.seen
    if not seen.depends:
        loss = loss.detach()
    return HeadOutput(loss, _stats(seen, batch), seen.rows | seen.notes, seen.fields)


@dataclass
class _Request:
    """The operands of a visit that are no tensors, and what it found."""

    unembedding: Unembedding
    batch: Batch
    objective: Objective
    wanted: frozenset[FieldKey]
    budget: Budget
    differentiate: bool
    seen: Seen = field(default_factory=Seen)


class _Differentiated(torch.autograd.Function):
    """A visit as one node of autograd: its gradients are made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, request: _Request
    ) -> Tensor:
        asked = Asked(*(need and request.differentiate for need in ctx.needs_input_grad[:3]))
        seen = request.seen = visit(
            hidden.detach(),
            _detached(request.unembedding),
            request.batch,
            request.objective,
            wanted=request.wanted,
            temperature=request.objective.temperature,
            budget=request.budget,
            asked=asked,
        )
        ctx.gradients = (
            _held(seen.hidden, hidden),
            _held(seen.weight, weight),
            _held(seen.bias, bias),
        )
        seen.hidden = seen.weight = seen.bias = None
        ctx.handed_over = False
        return sum_terms([(seen.losses[name], seen.factors[name]) for name in seen.losses])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.handed_over:
            raise RuntimeError(
                "the head's loss was back-propagated twice: its gradients are made together with "
                "the loss and handed over in the first backward; call the head again for another, "
                "or add losses up before one backward"
            )
        ctx.handed_over = True
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g[0].mul_(upstream).to(g[1]) for g in gradients), None)


def _held(gradient: Tensor | None, operand: Tensor | None) -> tuple[Tensor, torch.dtype] | None:
    """A gradient and the dtype that autograd expects of it."""
    return None if gradient is None or operand is None else (gradient, operand.dtype)


def _detached(unembedding: Unembedding) -> Unembedding:
    bias = unembedding.bias
    return replace(
        unembedding,
        weight=unembedding.weight.detach(),
        bias=None if bias is None else bias.detach(),
    )


def _stats(seen: Seen, batch: Batch) -> dict[str, Stat]:
    """Metrics as sums and counts over the rows that they speak of."""
    counted = {label: factor != 0 for label, factor in seen.factors.items()}
    stats = {f"loss/{label}": _stat(value, counted[label]) for label, value in seen.losses.items()}
    for name, value in seen.notes.items():
        if name.startswith(REWARD):
            continue
        label = name.split("/")[1].partition(".")[0]
        stats[name] = _stat(value, counted[label] & ~value.isnan())
    token = batch.token
    by_student = pack_rows(token.provenance, token.mask) == int(Provenance.STUDENT)
    stats["student/entropy"] = _stat(seen.rows["student_entropy"], by_student)
    ratio = seen.rows.get("log_ratio")
    if ratio is not None:
        stats["teacher/log_ratio"] = _stat(ratio, by_student & ~ratio.isnan())
    for name, view in token.views.items():
        if view.row_index is not None:
            missing = view.row_index < 0
            stats[f"unanswered/{name}"] = _stat(missing.float(), torch.ones_like(missing))
        if name.startswith(NAMED) and not view.parts:
            own = seen.rows.get(RATIOS + name.removeprefix(NAMED))
            stats |= _of_model(name.removeprefix(NAMED), view.row_index, own, by_student)
    for name, view in token.views.items():
        if view.answered_by is not None:
            said = ratio if name == "teacher" else None
            for place, model in enumerate(view.names):
                rows = torch.where(_of_rows(view) == place, 0, -1)
                stats |= _of_model(model, rows, said, by_student)
    return {name: stat for name, stat in stats.items() if stat.count}


def _of_model(
    name: str, answered: Tensor | None, ratio: Tensor | None, by_student: Tensor
) -> dict[str, Stat]:
    """The share of the rows that one of several models answered, and what it said of them."""
    rows = torch.ones_like(by_student) if answered is None else answered >= 0
    stats = {f"teacher/{name}/share": _stat(rows.float(), torch.ones_like(rows))}
    if ratio is not None:
        stats[f"teacher/{name}/log_ratio"] = _stat(ratio, rows & by_student & ~ratio.isnan())
    return stats


def _of_rows(view: TeacherScores) -> Int[Tensor, " N"]:
    """Which model answered each row; -1 where none did."""
    assert view.answered_by is not None
    if view.row_index is None:
        return view.answered_by
    return torch.where(view.row_index < 0, -1, view.answered_by[view.row_index.clamp(min=0)])


def _stat(value: Tensor, chosen: Tensor) -> Stat:
    kept = torch.where(chosen, value, 0.0)
    return Stat(float(kept.sum(dtype=torch.float64)), float(chosen.sum()))

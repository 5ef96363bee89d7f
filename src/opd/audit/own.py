"""Objectives of ours as losses under audit: through the signal phase and the head that train."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from opd.audit.loss import Loss, Rows
from opd.audit.oracle import as_sequence_sum, identity_head, settled, top_ids
from opd.head import linear_head
from opd.objective import Objective
from opd.rollout.pack import pack_rollout, with_token
from opd.types import ROW_KINDS, Batch, Count, Provenance, Rollout, TeacherScores

__all__ = ["objective_loss"]


def objective_loss(objective: Objective, name: str) -> Loss:
    """An objective as a loss of one response's rows, summed.

    Every view is the teacher, whatever fills it in a run, and no verifier judges the response.

    Args:
        objective: schedules settled.
    """
    summed = as_sequence_sum(objective)

    def call(rows: Rows) -> Tensor:
        batch = _batch(summed, rows)
        if summed.coupled:
            batch = settled(summed, rows.student.detach(), batch, 1)
        out = linear_head(rows.student, identity_head(rows.student.shape[1]), batch, summed)
        assert out.loss is not None
        return out.loss

    return Loss(name, call, frozenset({"old_logp"}), is_linear=True)


def _batch(objective: Objective, rows: Rows) -> Batch:
    length = len(rows.tokens)
    here = torch.ones(1, length, dtype=torch.bool)
    rollout = Rollout(
        prompt_ids=((0,),),
        tokens=rows.tokens[None],
        mask=here,
        provenance=torch.full((1, length), int(Provenance.STUDENT)),
        sampler_logp=rows.old[None],
        policy_version=torch.zeros(1, length, dtype=torch.long),
        group=torch.zeros(1, dtype=torch.long),
        stop_reason=("eos",),
        verdict=torch.full((1,), math.nan, dtype=torch.float64),
    )
    counts = {kind: Count(rows=float(length), sequences=1.0) for kind in ROW_KINDS}
    packed = replace(pack_rollout(rollout, pad_id=0), counts=counts)
    head = identity_head(rows.student.shape[1])
    views = {
        view: TeacherScores(hidden=rows.teacher, unembedding=head) for view in objective.views()
    }
    k = objective.support_size("student_top_ids")
    return with_token(
        packed,
        views=views,
        old_logp=rows.old[None],
        student_top_ids=top_ids(rows.student.detach(), packed, k) if k else None,
    )

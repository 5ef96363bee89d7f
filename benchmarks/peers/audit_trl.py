"""Losses of TRL 1.16 that are methods of a trainer, as functions of logits for `opd audit`.

They are called on an object that has the few attributes that they read.
"""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

__all__ = ["iw_opd", "server"]

IGNORED = -100


def iw_opd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    old_logp: Tensor,
    count: float,
    *,
    gamma: float = 1.0,
) -> Tensor:
    """`IWOPDTrainer`'s loss of the sampled token, with the log-probabilities of the rollout."""
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    trainer: Any = SimpleNamespace(
        temperature=1.0,
        iw_opd_epsilon=1e-8,
        iw_opd_gamma=gamma,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    labels = torch.where(mask, tokens, IGNORED)[None]
    teacher = _at(teacher_logits.log_softmax(-1), tokens)
    loss: Tensor = IWOPDTrainer._compute_iw_opd_loss(
        trainer,
        student_logits[None],
        tokens[None],
        labels,
        teacher[None],
        old_logp[None],
        count or None,
    )
    return loss


def server(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    beta: float = 1.0,
    top_k: int = 1,
    tail: bool = True,
) -> Tensor:
    """`ServerDistillationTrainer`'s loss.

    At `beta` 0 it compares the teacher's top k; between 0 and 1 the teacher's likeliest token and
    the sampled one; at 1 the sampled one. A score that is missing is -inf, as it arrives there.
    """
    from trl.experimental.server_distillation.server_distillation_trainer import (
        ServerDistillationTrainer as Trainer,
    )

    trainer: Any = SimpleNamespace(
        beta=beta,
        loss_add_tail=tail,
        reverse_kl_top_1_mode="sampled",
        temperature=1.0,
        _reduce_divergence_loss=Trainer._reduce_divergence_loss,
    )
    for name in ("_get_reverse_kl_top_1_tokens", "_compute_sparse_top_1_divergence_loss"):
        setattr(trainer, name, getattr(Trainer, name).__get__(trainer))
    labels = torch.where(mask, tokens, IGNORED)[None]
    wide = torch.promote_types(teacher_logits.dtype, torch.float32)
    scores = teacher_logits.detach().to(wide).log_softmax(-1)
    scores = scores.where(~scores.isnan(), scores.new_tensor(-torch.inf))
    best, ids = scores.topk(top_k, -1)
    reply = {
        "actual_logprobs": _at(scores, tokens)[None],
        "topk_logprobs": best[None],
        "topk_token_ids": ids[None],
    }
    student = student_logits.log_softmax(-1)[None]
    loss: Tensor
    if beta > 0:
        loss = Trainer._compute_server_sparse_top_1_divergence_loss(
            trainer, reply, student, tokens[None], labels
        )
    else:
        loss = Trainer._compute_server_forward_kl_loss(trainer, reply, student, labels)
    return loss


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens[:, None]).squeeze(-1)

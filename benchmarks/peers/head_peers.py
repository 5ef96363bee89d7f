"""The divergences of TRL and Liger from hidden states, and plain autograd beside them.

Written against TRL 1.16 and liger-kernel 0.8.5. Both are called as they are, with the sizes they
choose themselves: TRL's tiles of 4,096 rows times 32,768 tokens, Liger's chunks of 1,024 rows. On
a CPU TRL computes in plain torch; Liger is called with `compiled=False`, on every device. A `beta`
of 1 is KL(student || teacher), of 0 KL(teacher || student); every loss is a mean over the rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LIGER", "NAIVE", "PEERS", "TRL", "Operands", "naive_loss"]

TRL = "TRL ChunkedDivergenceFunction"
LIGER = "Liger chunked JSD"
NAIVE = "naive autograd"


class Operands(NamedTuple):
    """Hidden states of N rows and the unembeddings of V tokens, of both sides."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


def naive_loss(operands: Operands, beta: float) -> Tensor:
    """Whole logits and `log_softmax`: the divergence by its definition, left to autograd."""
    student = (operands.hidden @ operands.weight.T).log_softmax(-1)
    with torch.no_grad():
        teacher = (operands.teacher_hidden @ operands.teacher_weight.T).log_softmax(-1)
    if beta == 1.0:
        return (student.exp() * (student - teacher)).sum(-1).mean()
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def _trl_loss(module: ModuleType) -> Callable[[Operands, float], Tensor]:
    def loss(operands: Operands, beta: float) -> Tensor:
        hidden, weight, teacher_hidden, teacher_weight = operands
        per_row, _ = module.ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, beta
        )
        mean: Tensor = per_row.mean()
        return mean

    return loss


def _liger_loss(module: ModuleType) -> Callable[[Operands, float], Tensor]:
    def loss(operands: Operands, beta: float) -> Tensor:
        fused = module.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False
        )
        rows = operands.hidden.shape[0]
        labels = torch.zeros(rows, dtype=torch.long, device=operands.hidden.device)
        mean: Tensor = fused(*operands, labels)  # labels say which rows count: all of them
        return mean

    return loss


def _installed() -> dict[str, Callable[[Operands, float], Tensor]]:
    """The peers that can be imported; says so of one that cannot."""
    known = {
        TRL: ("trl.kernels.chunked_divergence", _trl_loss),
        LIGER: ("liger_kernel.chunked_loss.jsd_loss", _liger_loss),
    }
    found = {}
    for name, (module, loss) in known.items():
        try:
            found[name] = loss(importlib.import_module(module))
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return {**found, NAIVE: naive_loss}


PEERS: Mapping[str, Callable[[Operands, float], Tensor]] = _installed()

"""The head on CUDA beside the same head on a CPU, by both of its paths."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.formula import credit, divergence, reward, support
from opd.head import fold, linear_head
from opd.objective import Dense, Objective, Sampled
from opd.rollout.pack import to_device, with_token
from opd.types import TeacherScores, Unembedding
from tests.builders import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]

VOCAB, WIDTH, TEACHER_WIDTH = 5000, 64, 96
JSD = partial(divergence.generalized_jsd, teacher_weight=0.3)
OBJECTIVES = {
    "reverse KL": Objective(Dense(divergence.reverse_kl)),
    "forward KL and JSD": Objective(Dense(divergence.forward_kl), Dense(JSD, coef=0.5)),
    "sampled": Objective(Sampled(reward=reward.teacher_log_ratio, baseline=credit.expected_reward)),
    "top-k": Objective(
        Dense(divergence.reverse_kl, support=partial(support.teacher_top_k, k=16), tail="bucket")
    ),
    "total variation": Objective(Dense(divergence.total_variation)),
}


def answer(
    objective: Objective, device: str, dtype: torch.dtype, wide: torch.dtype
) -> tuple[Tensor, ...]:
    """Loss and gradients of operands that are rounded to `dtype` and computed with in `wide`."""
    case = Case.random(3, vocab_size=VOCAB, lengths=(90, 0, 140))
    draw = torch.Generator().manual_seed(4)
    rows = int(case.mask.sum())

    def operand(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=draw).div(shape[-1] ** 0.5 if shape[0] > rows else 1)
        return made.to(dtype).to(device, wide)

    hidden, weight = operand(rows, WIDTH), operand(VOCAB, WIDTH)
    teacher = TeacherScores(
        hidden=operand(rows, TEACHER_WIDTH),
        unembedding=Unembedding(operand(VOCAB, TEACHER_WIDTH), VOCAB),
    )
    batch = to_device(with_token(case.batch(), views={}), torch.device(device))
    batch = with_token(batch, views={"teacher": teacher})
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_head(
        hidden, Unembedding(weight, VOCAB), batch, objective, chunk_bytes=100 * 8 * VOCAB
    )
    assert out.loss is not None
    out.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return tuple(found.detach().double().cpu() for found in (out.loss, hidden.grad, weight.grad))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("folded", [True, False])
def test_loss_and_gradients_are_those_of_float64(
    name: str, dtype: torch.dtype, bound: float, folded: bool, monkeypatch: Any
) -> None:
    if folded:
        assert fold.is_available("cuda")
    else:
        monkeypatch.setattr(fold, "serves", lambda logits, hidden: False)
    expected = answer(OBJECTIVES[name], "cpu", dtype, torch.float64)
    found = answer(OBJECTIVES[name], "cuda", dtype, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_equals_student_is_zero(dtype: torch.dtype) -> None:
    case = Case.random(3, vocab_size=VOCAB, lengths=(90, 0, 140))
    rows = int(case.mask.sum())
    hidden = torch.randn(rows, WIDTH, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, device="cuda").to(dtype).requires_grad_()
    same = TeacherScores(hidden=hidden.detach(), unembedding=Unembedding(weight.detach(), VOCAB))
    batch = to_device(with_token(case.batch(), views={}), torch.device("cuda"))
    objective = OBJECTIVES["reverse KL"]
    out = linear_head(
        hidden, Unembedding(weight, VOCAB), with_token(batch, views={"teacher": same}), objective
    )
    assert out.loss is not None
    out.loss.backward()
    assert abs(float(out.loss.detach())) <= 1e-6
    assert hidden.grad is not None
    assert hidden.grad.abs().max() <= 1e-6

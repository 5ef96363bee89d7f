from __future__ import annotations

import math

import pytest
import torch

from opd.formula import regulariser

F64 = torch.float64


def entropy(logits: torch.Tensor) -> torch.Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def test_the_bonus_is_minus_the_entropy_and_so_is_its_slope() -> None:
    leaf = torch.tensor([0.0, 0.7], dtype=F64, requires_grad=True)
    loss = regulariser.entropy_bonus(leaf)
    loss.sum().backward()
    assert loss.tolist() == [0.0, -0.7]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [-1.0, -1.0]


def test_the_floor_pulls_below_it_only_and_counts_where() -> None:
    leaf = torch.tensor([0.0, 0.3, 0.5, 0.9], dtype=F64, requires_grad=True)
    loss = regulariser.entropy_floor(leaf, nats=0.5)
    loss.sum().backward()
    assert loss.tolist() == [0.5, 0.2, 0.0, 0.0]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [-1.0, -1.0, 0.0, 0.0]
    hit = regulariser.entropy_floor.counted(leaf, nats=0.5)  # type: ignore[attr-defined]
    assert hit.tolist() == [True, True, False, False]


def test_descending_either_penalty_spreads_the_student() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0], dtype=F64)
    for penalty in (
        regulariser.entropy_bonus,
        lambda spread: regulariser.entropy_floor(spread, nats=math.log(3)),
    ):
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(penalty(entropy(leaf)[None]).sum(), leaf)
        assert entropy(logits - 0.1 * gradient) > entropy(logits)


@pytest.mark.parametrize("nats", [0.0, -1.0, math.nan])
def test_a_floor_that_holds_nothing_is_refused(nats: float) -> None:
    with pytest.raises(ValueError, match="nats must be positive"):
        regulariser.entropy_floor(torch.zeros(1), nats=nats)

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.formula import surrogate

F64 = torch.float64
real = st.floats(-3, 3, allow_subnormal=False)


def clipped_with_slope(student: float, old: float, advantage: float) -> tuple[float, float]:
    leaf = torch.tensor([student], dtype=F64, requires_grad=True)
    loss = surrogate.clipped(
        leaf,
        torch.tensor([old], dtype=F64),
        torch.tensor([advantage], dtype=F64),
        low=0.2,
        high=0.3,
    )
    loss.sum().backward()
    assert leaf.grad is not None
    return float(loss.detach()), float(leaf.grad)


@given(real, real)
def test_the_score_is_minus_advantage_times_logp_and_so_is_its_slope(
    logp: float, advantage: float
) -> None:
    leaf = torch.tensor([logp], dtype=F64, requires_grad=True)
    held = torch.tensor([advantage], dtype=F64, requires_grad=True)
    loss = surrogate.score(leaf, held)
    loss.sum().backward()
    assert float(loss.detach()) == -advantage * logp
    assert leaf.grad is not None
    assert float(leaf.grad) == -advantage
    assert held.grad is None


@given(real, real, real)
def test_the_clipped_loss_by_its_three_cases(student: float, old: float, advantage: float) -> None:
    ratio = math.exp(student - old)
    stopped_above = advantage > 0 and ratio > 1.3
    stopped_below = advantage < 0 and ratio < 0.8
    edge = 1.3 if stopped_above else 0.8
    loss, slope = clipped_with_slope(student, old, advantage)
    stopped = stopped_above or stopped_below
    assert loss == pytest.approx(-advantage * (edge if stopped else ratio), rel=1e-12, abs=1e-300)
    assert slope == pytest.approx(0 if stopped else -advantage * ratio, rel=1e-12, abs=1e-300)


@given(real, real)
def test_on_the_weights_of_the_rollout_clipping_has_the_slope_of_the_score(
    logp: float, advantage: float
) -> None:
    loss, slope = clipped_with_slope(logp, logp, advantage)
    assert loss == -advantage
    assert slope == -advantage


def test_a_negative_advantage_is_unbounded_above() -> None:
    loss, slope = clipped_with_slope(5.0, 0.0, -1.0)
    assert loss == pytest.approx(math.exp(5))
    assert slope == pytest.approx(math.exp(5))


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.2), (1.1, 0.2), (0.2, -0.1)])
def test_impossible_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="clip range needs 0 <= low <= 1 and high >= 0"):
        surrogate.clipped(torch.zeros(1), torch.zeros(1), torch.zeros(1), low=low, high=high)

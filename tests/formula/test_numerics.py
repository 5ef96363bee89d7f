from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.formula.numerics import expectation, log1mexp, log_mixture, project
from opd.types import Unembedding

F64 = torch.float64


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([math.log(p) if p else -math.inf for p in probabilities], dtype=F64)


def test_expectation_of_two_halves() -> None:
    values = torch.tensor([1.0, 3.0], dtype=F64)
    assert float(expectation(logs(0.5, 0.5), values)) == pytest.approx(2.0, abs=1e-15)


def test_expectation_ignores_what_has_no_weight_even_if_it_is_infinite_or_undefined() -> None:
    log_weights = logs(1.0, 0.0, 0.0).requires_grad_()
    values = torch.tensor([2.0, math.inf, math.nan], dtype=F64, requires_grad=True)
    result = expectation(log_weights, values)
    result.backward()
    assert float(result.detach()) == 2.0
    assert log_weights.grad is not None
    assert log_weights.grad.tolist() == [2.0, 0.0, 0.0]
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 0.0]


def test_expectation_treats_an_underflowing_weight_as_zero() -> None:
    log_weights = torch.tensor([0.0, -200.0])  # exp(-200) is 0 in float32
    assert float(expectation(log_weights, torch.tensor([1.0, math.inf]))) == 1.0


def test_expectation_is_infinite_where_a_real_weight_meets_infinity() -> None:
    values = torch.tensor([0.0, math.inf], dtype=F64)
    assert float(expectation(logs(0.5, 0.5), values)) == math.inf


def test_an_infinite_expectation_that_nobody_looks_at_leaves_no_nan_in_the_gradient() -> None:
    log_weights = logs(0.5, 0.5).requires_grad_()
    result = expectation(log_weights, torch.tensor([0.0, math.inf], dtype=F64))
    torch.where(torch.tensor(True), 0.0, result).backward()
    assert log_weights.grad is not None
    assert log_weights.grad.tolist() == [0.0, 0.0]


def test_log_mixture_of_two_certainties() -> None:
    mixture = log_mixture(logs(1.0, 0.0), logs(0.0, 1.0), weight=0.25)
    assert torch.allclose(mixture, logs(0.25, 0.75), rtol=0, atol=1e-15)


def test_log_mixture_is_normalised_and_empty_only_where_both_are() -> None:
    mixture = log_mixture(logs(0.5, 0.5, 0.0), logs(0.2, 0.8, 0.0), weight=0.3)
    assert float(mixture.exp().sum()) == pytest.approx(1.0, abs=1e-15)
    assert (mixture == -math.inf).tolist() == [False, False, True]


def test_log1mexp_of_one_half_and_at_the_ends() -> None:
    value = log1mexp(torch.tensor([-math.log(2), -math.inf, 0.0, 1e-9], dtype=F64))
    assert value.tolist() == pytest.approx([-math.log(2), 0.0, -math.inf, -math.inf], abs=1e-15)


@given(st.floats(-700, -1e-18))
def test_log1mexp_agrees_with_the_exact_remainder(log_prob: float) -> None:
    exact = math.log(-math.expm1(log_prob)) if log_prob > -0.7 else math.log1p(-math.exp(log_prob))
    result = float(log1mexp(torch.tensor(log_prob, dtype=F64)))
    assert result == pytest.approx(exact, rel=1e-14)


@given(st.floats(-700, -1e-18))
def test_log1mexp_has_its_own_slope_everywhere(log_prob: float) -> None:
    leaf = torch.tensor(log_prob, dtype=F64, requires_grad=True)
    log1mexp(leaf).backward()
    assert leaf.grad is not None
    assert float(leaf.grad) == pytest.approx(-1 / math.expm1(-log_prob), rel=1e-12)


def test_project_applies_bias_scale_and_cap_in_this_order() -> None:
    unembedding = Unembedding(
        torch.tensor([[2.0], [0.0], [99.0]]), 2, torch.tensor([1.0, -1.0, 9.0]), 0.5, 4.0
    )
    logits = project(torch.tensor([[3.0]]), unembedding)
    expected = [4 * math.tanh(0.5 * (2 * 3 + 1) / 4), 4 * math.tanh(0.5 * -1 / 4)]
    assert logits.tolist()[0] == pytest.approx(expected, abs=1e-6)


def test_project_never_reads_rows_beyond_the_vocabulary() -> None:
    weight = torch.randn(5, 3, dtype=F64)
    weight[3:] = math.nan
    logits = project(torch.randn(2, 3, dtype=F64), Unembedding(weight, 3))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


def test_project_accumulates_half_precision_in_float32() -> None:
    hidden = torch.randn(4, 64).to(torch.bfloat16)
    weight = torch.randn(7, 64).to(torch.bfloat16)
    logits = project(hidden, Unembedding(weight, 7))
    assert logits.dtype == torch.float32
    exact = hidden.double() @ weight.double().T
    assert (logits - exact).abs().max() < 1e-4  # bfloat16 accumulation would be off by 1e-1

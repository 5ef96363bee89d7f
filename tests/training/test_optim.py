from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opd.training.config import OptimizerConfig
from opd.training.optim import Anchor, clip, learning_rate, make_optimizer, set_learning_rate

Decay = Literal["constant", "linear", "cosine"]
DECAYS: tuple[Decay, ...] = ("constant", "linear", "cosine")


def rates(config: OptimizerConfig, updates: int) -> list[float]:
    return [learning_rate(config, update, updates) for update in range(updates)]


def test_rates_by_hand() -> None:
    linear = OptimizerConfig(learning_rate=1.0, lr_warmup_steps=2, decay="linear", final_share=0.2)
    assert rates(linear, 7) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    cosine = OptimizerConfig(learning_rate=2.0, lr_warmup_steps=0, decay="cosine", final_share=0.0)
    assert rates(cosine, 3) == pytest.approx([2.0, 1.0, 0.0], abs=1e-15)
    constant = OptimizerConfig(learning_rate=3.0, lr_warmup_steps=1, decay="constant")
    assert rates(constant, 3) == [3.0, 3.0, 3.0]


@given(
    decay=st.sampled_from(DECAYS),
    warmup=st.integers(0, 9),
    updates=st.integers(1, 30),
    final=st.floats(0, 1),
)
def test_the_rate_rises_to_its_peak_and_never_leaves_the_range(
    decay: Decay, warmup: int, updates: int, final: float
) -> None:
    config = OptimizerConfig(
        learning_rate=1e-3, lr_warmup_steps=warmup, decay=decay, final_share=final
    )
    found = rates(config, updates)
    assert max(found) == pytest.approx(1e-3)
    assert all(0 <= rate <= 1e-3 * (1 + 1e-12) for rate in found)
    rising, falling = found[: min(warmup, updates)], found[min(warmup, updates) :]
    assert rising == sorted(rising)
    assert all(late <= early + 1e-18 for early, late in pairwise(falling))
    if decay != "constant" and len(falling) > 1:
        assert falling[-1] == pytest.approx(1e-3 * final, abs=1e-18)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))


def test_decay_shrinks_matrices_and_leaves_vectors_alone() -> None:
    parameters = dict(model().named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = make_optimizer(parameters, OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in parameters.items():
        shrunk = before[name] * (1 - 0.1 * 0.5) if parameter.dim() > 1 else before[name]
        assert torch.allclose(parameter, shrunk, rtol=0, atol=1e-7), name


def test_every_parameter_is_in_exactly_one_group() -> None:
    parameters = dict(model().named_parameters())
    groups = make_optimizer(parameters, OptimizerConfig()).param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, parameters.values()))
    only_matrices = {"w": nn.Parameter(torch.ones(2, 2))}
    assert len(make_optimizer(only_matrices, OptimizerConfig()).param_groups) == 1


def test_the_rate_is_set_for_every_group() -> None:
    optimizer = make_optimizer(dict(model().named_parameters()), OptimizerConfig())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize(("max_norm", "kept"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_clipping_returns_the_norm_before_and_scales_only_what_exceeds_it(
    max_norm: float, kept: float
) -> None:
    parameters = {"w": nn.Parameter(torch.zeros(2)), "v": nn.Parameter(torch.zeros(1))}
    gradients = {"w": torch.tensor([3.0, 0.0]), "v": torch.tensor([4.0])}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    assert clip(parameters, max_norm) == pytest.approx(5.0)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, kept * gradients[name], rtol=1e-5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_told(bad: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([bad])
    assert not math.isfinite(clip({"w": parameter}, 1.0))


def test_the_anchor_pulls_by_its_share_of_the_distance_and_says_how_far_it_was() -> None:
    parameters = {"w": nn.Parameter(torch.tensor([[1.0, 2.0]])), "b": nn.Parameter(torch.zeros(2))}
    anchor = Anchor(parameters, strength=5.0)
    with torch.no_grad():
        parameters["w"] += torch.tensor([[3.0, -4.0]])
    distance = anchor.pull(parameters, rate=0.1)
    assert distance == pytest.approx(math.sqrt((9 + 16) / 4))
    assert parameters["w"].tolist() == [[pytest.approx(4.0 - 1.5), pytest.approx(-2.0 + 2.0)]]
    assert parameters["b"].tolist() == [0.0, 0.0]


def test_an_anchor_that_was_loaded_pulls_towards_what_it_was_given() -> None:
    parameters = {"w": nn.Parameter(torch.ones(2))}
    anchor = Anchor(parameters, strength=1.0)
    anchor.load({"w": torch.zeros(2)})
    anchor.pull(parameters, rate=0.25)
    assert parameters["w"].tolist() == [0.75, 0.75]

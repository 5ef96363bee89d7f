"""Every formula keeps dtype, device and rows apart, writes into nothing, and differentiates."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.battery import (
    DETACHED_MODULES,
    MODULES,
    SIZES,
    STEP_WIDE,
    STOP_GRADIENT,
    TRANSFERS,
    Formula,
    finite_differences,
    formulas,
    on,
    tensors,
)

ALL = list(formulas())
WITH_SOURCE = (
    "divergence",
    "reward",
    "outcome",
    "credit",
    "surrogate",
    "weight",
    "regulariser",
    "routing",
)
"""Modules whose formulas come from somewhere; the others are arithmetic."""


def cases(chosen: list[Formula]) -> Any:
    return pytest.mark.parametrize("formula", chosen, ids=[formula.name for formula in chosen])


def test_the_battery_sees_every_formula_module() -> None:
    assert {formula.module for formula in ALL} == set(MODULES)
    assert {"divergence", "reward", "credit", "surrogate", "support", "weight"} <= set(MODULES)


@cases([formula for formula in ALL if formula.real_arguments()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_formula_keeps_the_dtype(formula: Formula, dtype: torch.dtype) -> None:
    for result in tensors(formula(formula.arguments(dtype=dtype))):
        assert result.dtype == (torch.bool if formula.chooses else dtype)


@cases(ALL)
def test_a_formula_keeps_the_device(formula: Formula) -> None:
    arguments = {name: on(value, "meta") for name, value in formula.arguments().items()}
    for result in tensors(formula(arguments)):
        assert result.device.type == "meta"


@cases([formula for formula in ALL if formula.name not in STEP_WIDE])
def test_rows_are_independent(formula: Formula) -> None:
    arguments = formula.arguments()
    together = formula(arguments)
    if together is None:
        return
    for row in range(together.shape[0]):
        alone = formula(
            {
                name: value[row : row + 1] if formula.has_rows(name) else value
                for name, value in arguments.items()
            }
        )
        assert torch.allclose(alone[0], together[row], rtol=1e-13, atol=1e-13)


@cases([f for f in ALL if any(f.axes(name)[:1] == ("*n",) for name in f.takes)])
def test_any_leading_shape_gives_the_same_rows(formula: Formula) -> None:
    flat, lead = formula.arguments(lead=(6,)), (2, 3)
    folded = {
        name: value.unflatten(0, lead) if formula.axes(name)[:1] == ("*n",) else value
        for name, value in flat.items()
    }
    assert torch.allclose(formula(folded).flatten(0, 1), formula(flat), rtol=1e-14, atol=1e-14)


@cases([f for f in ALL if any(f.axes(name) == ("B", "T") for name in f.real_arguments())])
def test_what_stands_at_masked_positions_never_matters(formula: Formula) -> None:
    arguments = formula.arguments(seed=5)
    mask = arguments["mask"]
    blotted = {
        name: torch.where(mask, value, math.nan)
        if name in formula.real_arguments() and formula.axes(name) == ("B", "T")
        else value
        for name, value in arguments.items()
    }
    assert mask.any()
    assert not mask.all()
    assert torch.equal(formula(blotted), formula(arguments))


@cases(ALL)
def test_no_argument_is_written_to(formula: Formula) -> None:
    arguments = formula.arguments()
    held = [tensor for value in arguments.values() for tensor in tensors(value)]
    before = [(tensor.clone(), tensor._version) for tensor in held]
    results = tensors(formula(arguments))
    for tensor, (copy, version) in zip(held, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copy)
    assert all(result.grad_fn is None for result in results)


@cases([formula for formula in ALL if formula.exported])
def test_the_docstring_says_what_is_computed_and_who_says_so(formula: Formula) -> None:
    doc = formula.function.__doc__ or ""
    summary, _, body = doc.partition("\n")
    assert summary.endswith(".")
    if formula.module != "support":
        equations = [line for line in body.splitlines() if re.match(r"^ {8}\S.* = ", line)]
        assert equations, f"{formula.name} has no indented equation"
    if formula.module in WITH_SOURCE:
        assert re.search(r"^ {4}Source: \S", doc, re.M), f"{formula.name} has no Source"


def _with_zero_mass(formula: Formula) -> dict[str, Any]:
    """Entry 0 empty on every side, entry 1 only on the first, entry 2 only on the last."""
    arguments = formula.arguments()
    names = formula.distributions()
    for place, name in enumerate(names):
        value = arguments[name].clone()
        value[..., 0] = -math.inf
        if place == 0:
            value[..., 1] = -math.inf
        if place == len(names) - 1 and len(names) > 1:
            value[..., 2] = -math.inf
        arguments[name] = value
    return arguments


@cases([formula for formula in ALL if formula.distributions()])
def test_zero_mass_makes_no_nan_in_value_or_gradient(formula: Formula) -> None:
    arguments = _with_zero_mass(formula)
    for name in formula.real_arguments():
        arguments[name] = arguments[name].requires_grad_()
    result = formula(arguments)
    assert not result.isnan().any()
    if result.requires_grad:
        torch.where(result.isfinite(), result, 0.0).sum().backward()
        for name in formula.real_arguments():
            gradient = arguments[name].grad
            assert gradient is None or gradient.isfinite().all(), name


@cases([f for f in ALL if f.real_arguments() and f.name not in STOP_GRADIENT])
def test_gradients_match_finite_differences(formula: Formula) -> None:
    arguments = formula.arguments(seed=3)
    shape = formula(arguments).shape
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def scalar(name: str, value: Tensor) -> Tensor:
        result: Tensor = formula({**arguments, name: value})
        return (weights * result).sum()

    for name in formula.real_arguments():
        leaf = arguments[name].clone().requires_grad_()
        loss = scalar(name, leaf)
        if not loss.requires_grad:
            continue  # detached; which ones may be is held by the tests below
        (gradient,) = torch.autograd.grad(loss, leaf, materialize_grads=True)

        def along(value: Tensor, name: str = name) -> Tensor:
            return scalar(name, value)

        assert (gradient - finite_differences(along, leaf.detach())).abs().max() <= 1e-6


@cases([formula for formula in ALL if formula.real_arguments()])
def test_gradients_stop_where_they_should(formula: Formula) -> None:
    arguments = formula.arguments()
    carriers = set()
    for name in formula.real_arguments():
        moved = {**arguments, name: arguments[name].clone().requires_grad_()}
        result = formula(moved)
        if result.requires_grad:
            carriers.add(name)
    if formula.chooses or formula.module in DETACHED_MODULES:
        assert carriers == set()
    elif formula.module == "surrogate":
        assert carriers == {"student_logp", "student_log_tail"} & set(formula.takes)
    elif formula.name in ("divergence.truncated_reverse_kl", "divergence.hybrid_policy"):
        assert carriers == {"student_log_probs"}
    elif "student_support_logp" in formula.takes and formula.module == "divergence":
        assert carriers == {"student_support_logp"}
    elif formula.module == "routing":
        assert carriers == ({"student_log_probs"} if formula.name in TRANSFERS else set())
    else:
        assert carriers == set(formula.real_arguments()) - {"old_logp"}


def test_the_sizes_tell_axes_apart_where_it_matters() -> None:
    assert SIZES["V"] != SIZES["K"]
    assert SIZES["B"] != SIZES["T"]

"""What every formula must satisfy, run over all of them: a new one is tested once it is named.

Arguments are made from the annotation (shape) and the name (meaning) of each parameter. A formula
with knobs must have an entry in `KNOBS`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import opd.formula
from opd.types import Count, Unembedding

N, SIZES = 6, {"K": 6, "J": 6, "V": 7, "H": 4, "B": 3, "T": 5, "1": 1, "K_plus_1": 7}
MODULES = tuple(module.name for module in pkgutil.iter_modules(opd.formula.__path__))

KNOBS: dict[str, dict[str, Any]] = {
    "numerics.log_mixture": {"weight": 0.3},
    "divergence.generalized_jsd": {"teacher_weight": 0.3},
    "support.student_top_k": {"k": 3},
    "support.teacher_top_k": {"k": 3},
    "credit.discounted": {"gamma": 0.9, "meaning": "task"},
    "surrogate.clipped": {"low": 0.2, "high": 0.3},
    "reduce.token_mean": {"count": Count(rows=9.0, sequences=4.0)},
    "reduce.sequence_mean": {"count": Count(rows=9.0, sequences=4.0)},
    "reduce.sequence_sum": {"count": Count(rows=9.0, sequences=4.0)},
}
"""Values of the knobs by `module.function`."""

DETACHED_MODULES = ("reward", "weight")
"""Modules whose results never carry a gradient."""


@dataclass(frozen=True)
class Formula:
    """One public function of `opd.formula`."""

    name: str
    function: Callable[..., Any]
    exported: bool

    @property
    def module(self) -> str:
        return self.name.split(".")[0]

    @property
    def knobs(self) -> dict[str, Any]:
        required = {
            parameter.name
            for parameter in inspect.signature(self.function).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
            and parameter.default is inspect.Parameter.empty
        }
        given = KNOBS.get(self.name, {})
        missing = required - set(given)
        assert not missing, f"say in tests/battery.py which {sorted(missing)} to give {self.name}"
        return given

    @property
    def annotations(self) -> dict[str, str]:
        return {
            parameter.name: str(parameter.annotation).replace("'", '"')
            for parameter in inspect.signature(self.function).parameters.values()
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        }

    @property
    def takes(self) -> list[str]:
        return list(self.annotations)

    def axes(self, argument: str) -> tuple[str, ...]:
        """Names of the axes of a tensor argument; none for other arguments."""
        found = re.search(r'\[Tensor, "([^"]*)"\]', self.annotations[argument])
        return tuple(found.group(1).split()) if found else ()

    def __call__(self, arguments: dict[str, Any]) -> Any:
        return self.function(*(arguments[name] for name in self.takes), **self.knobs)

    def arguments(
        self, seed: int = 0, *, dtype: torch.dtype = torch.float64, lead: tuple[int, ...] = (N,)
    ) -> dict[str, Any]:
        """Random arguments of the right shapes and meanings."""
        draw = torch.Generator().manual_seed(seed)
        return {name: self._argument(name, draw, dtype, lead) for name in self.takes}

    def _argument(
        self, name: str, draw: torch.Generator, dtype: torch.dtype, lead: tuple[int, ...]
    ) -> Any:
        if name == "unembedding":
            weight = torch.randn(SIZES["V"] + 2, SIZES["H"], generator=draw, dtype=dtype)
            bias = torch.randn(SIZES["V"] + 2, generator=draw, dtype=dtype)
            return Unembedding(weight, SIZES["V"], bias, logit_scale=0.7, soft_cap=2.0)
        axes, annotation = self.axes(name), self.annotations[name]
        assert axes, f"no generator in tests/battery.py for {name}: {annotation} of {self.name}"
        sizes = [lead if axis.startswith("*") else (SIZES[axis],) for axis in axes]
        shape = tuple(size for part in sizes for size in part)
        if annotation.startswith("Bool"):
            return torch.rand(shape, generator=draw) < 0.6
        if annotation.startswith("Int"):
            if name.endswith("ids"):  # distinct, likeliest first
                return torch.rand(shape, generator=draw).argsort(-1)
            return torch.randint(SIZES["V"], shape, generator=draw)
        values = torch.randn(shape, generator=draw, dtype=dtype)
        if name.endswith(("log_probs", "log_weights")) and axes[-1] in ("K", "V", "J"):
            return values.log_softmax(-1)
        if name.endswith(("log_probs", "logp", "log_mass")):
            return -values.abs() - 0.05
        return values.abs() if name in ("reverse_kl", "forward_kl") else values

    def distributions(self) -> list[str]:
        """Arguments that are log-distributions over a support."""
        return [
            name
            for name in self.takes
            if name.endswith(("log_probs", "log_weights")) and len(self.axes(name)) > 1
        ]

    def real_arguments(self) -> list[str]:
        """Arguments that are tensors of real numbers."""
        return [name for name in self.takes if self.annotations[name].startswith("Float")]


def formulas() -> Iterator[Formula]:
    """Every public function of every module of `opd.formula`."""
    for name in MODULES:
        module = importlib.import_module(f"opd.formula.{name}")
        public = {
            key: value
            for key, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not key.startswith("_")
        }
        assert set(module.__all__) <= set(public), f"opd.formula.{name}.__all__ names no function"
        for key, function in public.items():
            yield Formula(f"{name}.{key}", function, key in module.__all__)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result or of an argument."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Unembedding):
        return [part for part in (value.weight, value.bias) if part is not None]
    return []


def on(value: Any, device: str) -> Any:
    """An argument on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Unembedding):
        bias = None if value.bias is None else value.bias.to(device)
        return Unembedding(
            value.weight.to(device), value.vocab_size, bias, value.logit_scale, value.soft_cap
        )
    return value


def finite_differences(
    function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6
) -> Tensor:
    """Central differences of a scalar function, one coordinate at a time."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        moved = []
        for sign in (1, -1):
            shifted = at.clone()
            shifted.view(-1)[index] += sign * step
            moved.append(function(shifted))
        gradient.view(-1)[index] = (moved[0] - moved[1]) / (2 * step)
    return gradient

"""Schedules: a scalar knob that changes over the steps of a run.

A schedule may stand wherever a scalar knob stands. It is pure: the loop keeps its state, the
checkpoint saves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = ["Cosine", "Linear"]


@runtime_checkable
class Schedule(Protocol):
    """A knob's value as a function of the step, of measured statistics and of its own state."""

    def at(self, step: int, stats: Mapping[str, Any], state: object) -> tuple[float, object]:
        """The value at `step` (0 is the first) and the state to keep."""
        ...

    def reachable(self) -> tuple[float, float]:
        """The lowest and the highest value the schedule can take."""
        ...


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in equal increments over `steps` steps, then constant at `end`."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.start, self.end, self.steps)

    def at(self, step: int, stats: Mapping[str, Any], state: object) -> tuple[float, object]:
        share = min(step / self.steps, 1.0)
        return self.start + share * (self.end - self.start), state

    def reachable(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` along half a cosine over `steps` steps, then constant at `end`."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.start, self.end, self.steps)

    def at(self, step: int, stats: Mapping[str, Any], state: object) -> tuple[float, object]:
        share = min(step / self.steps, 1.0)
        return self.end + 0.5 * (1 + math.cos(math.pi * share)) * (self.start - self.end), state

    def reachable(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


def _check(start: float, end: float, steps: int) -> None:
    for name, value in (("start", start), ("end", end)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"a schedule's {name} must be a finite number, got {value!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"a schedule needs steps >= 1, got {steps!r}")

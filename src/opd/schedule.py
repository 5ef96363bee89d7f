"""Schedules: a scalar knob that changes over the steps of a run.

A schedule may stand wherever a scalar knob stands. It is pure: the loop keeps its state, the
checkpoint saves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

from opd.errors import ConfigError, nearest

__all__ = ["Cosine", "Linear", "Step", "Switch"]


@runtime_checkable
class Schedule(Protocol):
    """A knob's value as a function of the step, of measured statistics and of its own state.

    `stats` are the (sum, count) metrics of the step before; empty at the first.
    """

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


@dataclass(frozen=True)
class Step:
    """`before` in the first `steps` steps, then `after`: two phases of one run."""

    before: float
    after: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.before, self.after, self.steps, names=("before", "after"))

    def at(self, step: int, stats: Mapping[str, Any], state: object) -> tuple[float, object]:
        return (self.before if step < self.steps else self.after), state

    def reachable(self) -> tuple[float, float]:
        return min(self.before, self.after), max(self.before, self.after)


@dataclass(frozen=True)
class Switch:
    """`before` until a measured average passes a threshold, `after` from the next step on.

    Watches the latest value that was measured.

    Attributes:
        before, after: the two values.
        statistic: name of a metric of the training step, such as `student/entropy`.
        above, below: the threshold; exactly one of them.
    """

    before: float
    after: float
    statistic: str
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            _check_number(name, getattr(self, name))
        if not isinstance(self.statistic, str) or not self.statistic:
            raise ValueError(
                f"a switch watches a statistic by name, such as 'student/entropy', got "
                f"{self.statistic!r}"
            )
        if (self.above is None) == (self.below is None):
            raise ValueError(
                f"a switch needs one threshold, above or below, got above={self.above!r} and "
                f"below={self.below!r}"
            )
        _check_number("threshold", self.above if self.below is None else self.below)

    def at(self, step: int, stats: Mapping[str, Any], state: object) -> tuple[float, object]:
        """The value at `step`; the state is whether the switch was thrown.

        Raises:
            ConfigError: there are metrics, and the watched one is not among them.
        """
        thrown = bool(state) or (bool(stats) and self._passed(stats))
        return (self.after if thrown else self.before), thrown

    def _passed(self, stats: Mapping[str, Any]) -> bool:
        if self.statistic not in stats and _comes_and_goes(self.statistic):
            return False
        if self.statistic not in stats:
            raise ConfigError(
                f"a switch watches {self.statistic!r}, which the step did not measure. "
                f"{nearest(self.statistic, stats)}"
            )
        mean = stats[self.statistic].mean
        return bool(mean > self.above if self.above is not None else mean < self.below)

    def reachable(self) -> tuple[float, float]:
        return min(self.before, self.after), max(self.before, self.after)


def rescaled(value: float | Schedule, *, times: float = 1.0, plus: float = 0.0) -> float | Schedule:
    """`times * value + plus`, of a number or at every step of a schedule of this module.

    Raises:
        ValueError: another schedule, of which only its values are known.
    """
    if not isinstance(value, Schedule):
        return times * value + plus
    ends = {
        name: times * getattr(value, name) + plus
        for name in ("start", "end", "before", "after")
        if hasattr(value, name)
    }
    if not ends or not is_dataclass(value):
        raise ValueError(f"{value!r} cannot be rescaled; use one of {', '.join(__all__)}")
    changed: Schedule = replace(value, **ends)
    return changed


def _comes_and_goes(statistic: str) -> bool:
    """Whether a metric may be missing of a step, though later steps measure it."""
    per_teacher = statistic.startswith("teacher/") and statistic.endswith("/log_ratio")
    return statistic.startswith("rollout/") or statistic == "student/entropy" or per_teacher


def _check(start: float, end: float, steps: int, names: tuple[str, str] = ("start", "end")) -> None:
    for name, value in zip(names, (start, end), strict=True):
        _check_number(name, value)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"a schedule needs steps >= 1, got {steps!r}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a schedule's {name} must be a finite number, got {value!r}")

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd import schedule
from opd.errors import ConfigError
from opd.schedule import Cosine, Linear, Schedule, Step, Switch, rescaled
from opd.types import Stat

BY_STEP = [getattr(schedule, name) for name in schedule.__all__ if name != "Switch"]
each_kind = pytest.mark.parametrize("kind", BY_STEP)
real = st.floats(-100, 100)


def at(chosen: Schedule, step: int) -> float:
    return chosen.at(step, {}, None)[0]


def test_values_by_hand() -> None:
    assert [at(Linear(0.0, 1.0, 4), step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    cosine = [at(Cosine(1.0, 0.0, 4), step) for step in (0, 1, 2, 4, 9)]
    assert cosine == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0, 0], abs=1e-15)
    assert [at(Step(1.0, 0.2, 3), step) for step in range(5)] == [1, 1, 1, 0.2, 0.2]


@each_kind
@given(start=real, end=real, steps=st.integers(1, 50), step=st.integers(0, 200))
def test_every_value_lies_in_what_is_said_to_be_reachable(
    kind: Any, start: float, end: float, steps: int, step: int
) -> None:
    chosen = kind(start, end, steps)
    low, high = chosen.reachable()
    assert low - 1e-12 <= at(chosen, step) <= high + 1e-12
    assert at(chosen, 0) == pytest.approx(start, abs=1e-12)
    assert at(chosen, steps + step) == pytest.approx(end, abs=1e-12)


@each_kind
def test_a_schedule_is_pure_and_keeps_the_state_it_is_given(kind: Any) -> None:
    chosen, state = kind(0.0, 1.0, 3), object()
    assert isinstance(chosen, Schedule)
    assert chosen.at(1, {}, state) == chosen.at(1, {}, state)
    assert chosen.at(1, {}, state)[1] is state
    assert hash(chosen) == hash(kind(0.0, 1.0, 3))


@each_kind
@pytest.mark.parametrize("steps", [0, -3])
def test_a_schedule_takes_at_least_one_step(kind: Any, steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps >= 1, got {steps}"):
        kind(0.0, 1.0, steps)


# --------------------------------------------------------------------------------------------
# A switch

COLLAPSE = Switch(1.0, 0.2, "student/entropy", below=0.5)


def entropy(mean: float) -> dict[str, Stat]:
    return {"student/entropy": Stat(4 * mean, 4.0), "other": Stat(0.0, 1.0)}


def test_a_switch_is_thrown_once_and_for_good() -> None:
    values, state = [], None
    for step, mean in enumerate([0.9, 0.5, 0.4, 0.9, 0.1]):
        value, state = COLLAPSE.at(step, entropy(mean), state)
        values.append(value)
    assert values == [1.0, 1.0, 0.2, 0.2, 0.2]
    assert COLLAPSE.reachable() == (0.2, 1.0)
    assert isinstance(COLLAPSE, Schedule)


def test_a_switch_may_wait_for_a_rise() -> None:
    rising = Switch(0.0, 3.0, "other", above=-1.0)
    assert rising.at(0, {}, None) == (0.0, False)
    assert rising.at(1, entropy(0.9), False) == (3.0, True)


def test_a_switch_that_watches_nothing_measured_says_so_once_something_was() -> None:
    misspelt = Switch(0.0, 1.0, "student/entopy", below=1.0)
    assert misspelt.at(0, {}, None)[0] == 0.0
    with pytest.raises(ConfigError, match="Did you mean 'student/entropy'"):
        misspelt.at(1, entropy(0.9), False)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"statistic": "a"}, "one threshold, above or below"),
        ({"statistic": "a", "above": 1.0, "below": 2.0}, "one threshold, above or below"),
        ({"statistic": "", "above": 1.0}, "watches a statistic by name"),
        ({"statistic": "a", "above": math.nan}, "threshold must be a finite number"),
    ],
)
def test_a_switch_needs_one_threshold_and_a_name(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Switch(0.0, 1.0, **knobs)


def test_a_rescaled_schedule_is_rescaled_at_every_step() -> None:
    assert rescaled(3.0, times=-1.0, plus=2.0) == -1.0
    switch = Switch(0.2, 0.8, "student/entropy", above=1.0)
    for made in (Linear(1.0, 1.5, 4), Cosine(1.0, 0.2, 4), Step(1.0, 0.5, 2), switch):
        changed = rescaled(made, times=-1.0, plus=2.0)
        assert isinstance(changed, Schedule)
        assert [at(changed, step) for step in range(6)] == pytest.approx(
            [2.0 - at(made, step) for step in range(6)]
        )


def test_a_schedule_of_the_users_own_cannot_be_rescaled() -> None:
    class Own:
        def at(self, step: int, stats: Any, state: object) -> tuple[float, object]:
            return 1.0, state

        def reachable(self) -> tuple[float, float]:
            return 1.0, 1.0

    with pytest.raises(ValueError, match="cannot be rescaled; use one of Cosine, Linear"):
        rescaled(Own(), times=2.0)

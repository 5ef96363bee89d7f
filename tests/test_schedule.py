from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd import schedule
from opd.schedule import Cosine, Linear, Schedule

KINDS = [getattr(schedule, name) for name in schedule.__all__]
each_kind = pytest.mark.parametrize("kind", KINDS)
real = st.floats(-100, 100)


def at(chosen: Schedule, step: int) -> float:
    return chosen.at(step, {}, None)[0]


def test_values_by_hand() -> None:
    assert [at(Linear(0.0, 1.0, 4), step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    cosine = [at(Cosine(1.0, 0.0, 4), step) for step in (0, 1, 2, 4, 9)]
    assert cosine == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0, 0], abs=1e-15)


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

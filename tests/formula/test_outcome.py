from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.fields import positional_names
from opd.formula import credit, outcome, reward

F64 = torch.float64
NAN = math.nan

# Four responses of two prompts: right, wrong, not judged, right. The third position of the first
# response is a tool result; the last response has no open token.
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
VERDICT = torch.tensor([1.0, 0.25, NAN, 0.5], dtype=F64)
GROUP = torch.tensor([0, 0, 0, 1])
SIGNAL = torch.tensor(
    [[2.0, -1.0, NAN, 0.5], [-3.0, 1.0, NAN, 9.0], [1.0, -1.0, 0.0, NAN], [NAN] * 4], dtype=F64
)
HALF = math.sqrt(0.5)
"""Group 0 has verdicts 1 and 1/4, so its standardised verdicts are +-sqrt(1/2)."""

Outcome = Callable[..., Tensor]

KNOBS: dict[str, dict[str, float]] = {
    "terminal_verdict": {"scale": 2.0},
    "add_group_advantage": {"scale": 3.0},
    "mix_group_advantage": {"share": 0.25},
    "agree_in_sign": {},
    "sigmoid_gate": {"sharpness": 1.5},
    "magnitude_only": {"low": 0.5, "high": 0.8},
}


def call(
    name: str,
    *,
    signal: Tensor = SIGNAL,
    verdict: Tensor = VERDICT,
    mask: Tensor = MASK,
    group: Tensor = GROUP,
    counted: bool = False,
    **knobs: float,
) -> Tensor:
    function: Outcome = getattr(outcome, name)
    given_by_name = {
        "reward": signal,
        "credited": signal,
        "verdict": verdict,
        "group": group,
        "mask": mask,
    }
    arguments = [given_by_name[argument] for argument in positional_names(function)]
    used = function.counted if counted else function  # type: ignore[attr-defined]
    result: Tensor = used(*arguments, **(knobs or KNOBS[name]))
    return result


def test_every_outcome_function_is_tested_here() -> None:
    assert set(KNOBS) == set(outcome.__all__)


@pytest.mark.parametrize("name", KNOBS)
def test_the_signature_and_the_first_lines_say_where_it_joins(name: str) -> None:
    function = getattr(outcome, name)
    first = " ".join((function.__doc__ or "").split("\n\n")[0].split())
    place = {"reward": "before", "credited": "after"}[positional_names(function)[0]]
    assert first.endswith(f"Joins {place} credit.")


@pytest.mark.parametrize("name", KNOBS)
def test_what_stands_at_masked_positions_changes_nothing_and_the_result_is_zero_there(
    name: str,
) -> None:
    found = call(name)
    assert found.isfinite().all()
    assert (found[~MASK] == 0).all()
    for noise in (0.0, 1e9, -math.inf):
        assert torch.equal(call(name, signal=torch.where(MASK, SIGNAL, noise)), found)
    if hasattr(getattr(outcome, name), "counted"):
        hit = call(name, counted=True)
        assert hit.dtype == torch.bool
        assert not hit[~MASK].any()
        assert torch.equal(call(name, counted=True, signal=torch.where(MASK, SIGNAL, 7.0)), hit)


@pytest.mark.parametrize("name", KNOBS)
def test_nothing_carries_a_gradient(name: str) -> None:
    assert not call(name, signal=SIGNAL.clone().requires_grad_()).requires_grad
    assert not call(name, verdict=VERDICT.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("name", KNOBS)
def test_a_step_without_verdicts_or_without_tokens_stays_finite(name: str) -> None:
    unjudged = call(name, verdict=torch.full_like(VERDICT, NAN))
    assert unjudged.isfinite().all()
    assert (call(name, mask=torch.zeros_like(MASK)) == 0).all()


# --------------------------------------------------------------------------------------------
# Values by hand


def test_the_terminal_verdict_is_added_at_the_last_open_token() -> None:
    assert call("terminal_verdict").tolist() == [
        [2.0, -1.0, 0.0, 0.5 + 2.0],
        [-3.0, 1.0 + 0.5, 0.0, 0.0],
        [1.0, -1.0, 0.0, 0.0],
        [0.0] * 4,
    ]


def test_through_return_to_go_every_token_sees_the_terminal_verdict() -> None:
    coupled = credit.return_to_go(call("terminal_verdict"), MASK)
    alone = credit.return_to_go(SIGNAL, MASK)
    verdict = torch.tensor([2.0, 0.5, 0.0, 0.0], dtype=F64)[:, None]
    assert torch.allclose(coupled - alone, torch.where(MASK, verdict, 0.0), atol=1e-12)


def test_adding_and_mixing_the_group_advantage_by_hand() -> None:
    added = call("add_group_advantage")
    assert added[0].tolist() == pytest.approx([2 + 3 * HALF, -1 + 3 * HALF, 0, 0.5 + 3 * HALF])
    assert added[1].tolist() == pytest.approx([-3 - 3 * HALF, 1 - 3 * HALF, 0, 0])
    assert added[2].tolist() == [1.0, -1.0, 0.0, 0.0]
    mixed = call("mix_group_advantage")
    assert mixed[0].tolist() == pytest.approx(
        [1.5 + HALF / 4, -0.75 + HALF / 4, 0, 0.375 + HALF / 4]
    )
    assert mixed[2].tolist() == [0.75, -0.75, 0.0, 0.0]


def test_mixing_runs_from_the_teacher_alone_to_the_verifier_alone() -> None:
    alone = torch.where(MASK, SIGNAL, 0.0)
    assert torch.equal(call("mix_group_advantage", share=0.0), alone)
    verifier = reward.group_advantage(VERDICT, GROUP, MASK)
    assert torch.equal(call("mix_group_advantage", share=1.0), verifier)


def test_only_what_agrees_with_the_verdict_passes_and_the_rest_is_counted() -> None:
    assert call("agree_in_sign").tolist() == [
        [2.0, 0.0, 0.0, 0.5],
        [-3.0, 0.0, 0.0, 0.0],
        [0.0] * 4,
        [0.0] * 4,
    ]
    assert call("agree_in_sign", counted=True).tolist() == [
        [False, True, False, False],
        [False, True, False, False],
        [True, True, False, False],  # the zero of the unjudged response was zero before
        [False] * 4,
    ]


def test_half_a_verdict_counts_as_correct() -> None:
    one = torch.ones(1, 2, dtype=torch.bool)
    signal = torch.tensor([[1.0, -1.0]], dtype=F64)
    for score, expected in ((0.5, [1.0, 0.0]), (0.4999, [0.0, -1.0])):
        verdict = torch.tensor([score], dtype=F64)
        assert outcome.agree_in_sign(signal, verdict, one)[0].tolist() == expected


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_sigmoid_gate_is_the_published_formula() -> None:
    # |a| at the open tokens: 2, 1, 0.5, 3, 1, 1, 1, 0.
    sizes = [2.0, 1.0, 0.5, 3.0, 1.0, 1.0, 1.0, 0.0]
    median = statistics.median(sizes)
    assert median == 1.0
    right = [sigmoid(1.5 * a / median) * a for a in (2.0, -1.0, 0.5)]
    wrong = [sigmoid(-1.5 * a / median) * a for a in (-3.0, 1.0)]
    scale = sum(sizes) / sum(abs(part) for part in right + wrong)
    found = call("sigmoid_gate")
    assert found[MASK].tolist() == pytest.approx(
        [scale * part for part in right + wrong] + [0.0, 0.0, 0.0], rel=1e-12
    )


@given(
    st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=8, max_size=8),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=2, max_size=2),
    st.floats(1e-3, 50),
)
def test_the_sigmoid_gate_keeps_the_total_size_or_none_of_it(
    values: list[float], verdicts: list[float], sharpness: float
) -> None:
    signal = torch.tensor(values, dtype=F64).reshape(2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    verdict = torch.tensor(verdicts, dtype=F64)
    found = outcome.sigmoid_gate(signal, verdict, mask, sharpness=sharpness)
    before, after = float(signal[mask].abs().sum()), float(found.abs().sum())
    assert found.isfinite().all()
    assert (found * signal >= 0).all()  # a gate changes sizes, never signs
    assert after == 0 or after == pytest.approx(before, rel=1e-12)
    right = (verdict >= 0.5)[:, None]
    agrees = mask & ~verdict.isnan()[:, None] & torch.where(right, signal > 0, signal < 0)
    if agrees.any():
        assert after == pytest.approx(before, rel=1e-12)  # its gate is at least one half open


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_sigmoid_gate_does_not_depend_on_the_unit(size: float) -> None:
    unit = call("sigmoid_gate")
    assert torch.allclose(call("sigmoid_gate", signal=size * SIGNAL), size * unit, rtol=1e-9)


def test_the_median_counts_zeros_and_averages_the_middle_two() -> None:
    # |a| = 0, 0, 0, 0, 2, 4: median 0. |a| = 0, 0, 1, 3: median 1/2.
    signal = torch.tensor([[0.0, 0.0, 1.0, 3.0]], dtype=F64)
    mask, right = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, dtype=F64)
    found = outcome.sigmoid_gate(signal, right, mask, sharpness=1.0)
    first, second = sigmoid(1 / 0.5), 3 * sigmoid(3 / 0.5)
    assert found[0, 2:].tolist() == pytest.approx(
        [4 * first / (first + second), 4 * second / (first + second)], rel=1e-12
    )


def test_where_the_median_is_zero_the_gate_is_hard_and_keeps_the_total() -> None:
    signal = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, -4.0]], dtype=F64)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for verdict, expected in ((1.0, [0.0, 6.0, 0.0]), (0.0, [0.0, 0.0, -6.0])):
        verdicts = torch.full((2,), verdict, dtype=F64)
        found = outcome.sigmoid_gate(signal, verdicts, mask, sharpness=0.5)
        assert found.tolist() == [[0.0, 0.0, 0.0], expected]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_where_every_gate_closes_nothing_is_left(dtype: torch.dtype) -> None:
    signal = torch.tensor([[-1.0, -2.0, -3.0]], dtype=dtype)
    mask, right = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, dtype=dtype)
    closed = outcome.sigmoid_gate(signal, right, mask, sharpness=1e6)
    assert closed.tolist() == [[0.0, 0.0, 0.0]]


def test_the_sigmoid_gate_runs_from_vanilla_to_agreement() -> None:
    judged, alone = VERDICT.nan_to_num(1.0), torch.where(MASK, SIGNAL, 0.0)
    soft = call("sigmoid_gate", verdict=judged, sharpness=1e-9)
    assert torch.allclose(soft, alone, atol=1e-7)
    agreeing = call("agree_in_sign", verdict=judged)
    hard = call("sigmoid_gate", verdict=judged, sharpness=1e3)
    kept = alone.abs().sum() / agreeing.abs().sum()
    assert torch.allclose(hard, kept * agreeing, atol=1e-9)


def test_the_magnitude_is_the_teachers_and_the_sign_the_verifiers() -> None:
    # A_group = +-sqrt(1/2). Factors exp(2), exp(-1), exp(1/2) -> 1.8, 0.5, 1.649 and, with the
    # sign turned, exp(3), exp(-1) -> 1.8, 0.5; only exp(1/2) lies inside [0.5, 1.8].
    found = call("magnitude_only")
    assert found[0].tolist() == pytest.approx(
        [1.8 * HALF, 0.5 * HALF, 0.0, math.exp(0.5) * HALF], rel=1e-12
    )
    assert found[1].tolist() == pytest.approx([-1.8 * HALF, -0.5 * HALF, 0.0, 0.0], rel=1e-12)
    assert (found[2:] == 0).all()
    assert call("magnitude_only", counted=True).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False] * 4,
        [False] * 4,
    ]


def test_without_the_teachers_opinion_the_verifier_is_left_alone() -> None:
    found = call("magnitude_only", signal=torch.zeros_like(SIGNAL))
    assert torch.equal(found, reward.group_advantage(VERDICT, GROUP, MASK))


def test_a_token_without_teacher_mass_gets_the_bounds_of_the_factor() -> None:
    signal = torch.full((2, 1), -math.inf, dtype=F64)
    found = outcome.magnitude_only(
        signal,
        torch.tensor([1.0, 0.0], dtype=F64),
        torch.tensor([0, 0]),
        torch.ones(2, 1, dtype=torch.bool),
        low=0.5,
        high=0.8,
    )
    assert found[:, 0].tolist() == pytest.approx([0.5 * HALF, -1.8 * HALF], rel=1e-12)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (partial(call, "mix_group_advantage", share=1.1), "add_group_advantage takes any scale"),
        (partial(call, "mix_group_advantage", share=-0.1), "share must lie"),
        (partial(call, "sigmoid_gate", sharpness=0.0), "sharpness must be positive"),
        (partial(call, "magnitude_only", low=1.1, high=0.2), "0 <= low <= 1"),
        (partial(call, "magnitude_only", low=0.1, high=-0.2), "high >= 0"),
    ],
)
def test_impossible_knobs_are_refused(refused: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()

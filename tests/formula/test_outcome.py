from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.fields import positional_names
from opd.formula import credit, divergence, outcome, reward

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
    "reversed_magnitude": {"width": 0.8},
    "relative_magnitude": {"cap": 3.0},
    "bounded_shift": {"temperature": 1.0, "scale": 0.5, "at_least": 0.02},
    "deliberation_bonus": {"scale": 0.5},
    "add_verdict_sign": {"scale": 3.0},
    "agreement_scale": {"agreeing": 1.5, "other": 0.5},
    "agreement_gate": {"sharpness": 1.5},
    "add_verdict_residual": {"scale": 0.5, "limit": 10.0},
    "margin_shift": {"margin": 3.0, "correct_share": 0.25},
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


# --------------------------------------------------------------------------------------------
# The verifier's sign with the teacher's size, in other shares


def test_the_strength_runs_from_the_verifier_alone_to_the_teachers_size() -> None:
    alone, sized = reward.group_advantage(VERDICT, GROUP, MASK), call("magnitude_only")
    for strength in (0.0, 0.3, 1.0):
        found = call("magnitude_only", low=0.5, high=0.8, strength=strength)
        assert torch.allclose(found, (1 - strength) * alone + strength * sized, atol=1e-12)
    assert (sized - alone).abs().max() > 0.1


def test_what_the_teacher_would_not_have_written_counts_more_where_it_is_correct() -> None:
    # Response 0 is correct with A = sqrt(1/2): exp(-2), exp(1), exp(-1/2) -> 0.2, 1.8, 0.607.
    # Response 1 is wrong and keeps its A.
    found = call("reversed_magnitude")
    assert found[0].tolist() == pytest.approx(
        [0.2 * HALF, 1.8 * HALF, 0.0, math.exp(-0.5) * HALF], rel=1e-12
    )
    assert found[1].tolist() == pytest.approx([-HALF, -HALF, 0.0, 0.0], rel=1e-12)
    assert (found[2:] == 0).all()
    assert call("reversed_magnitude", counted=True).tolist() == [
        [True, True, False, False],
        [False] * 4,
        [False] * 4,
        [False] * 4,
    ]
    half = call("reversed_magnitude", width=0.8, strength=0.5)
    assert half[0].tolist() == pytest.approx(
        [0.6 * HALF, 1.4 * HALF, 0.0, (1 + math.exp(-0.5)) / 2 * HALF], rel=1e-12
    )


def test_a_correct_response_below_its_peers_is_sized_the_other_way_round() -> None:
    # Verdicts 1/2 and 1: A is -sqrt(1/2) for the first, though it is correct.
    verdict = torch.tensor([0.5, 1.0], dtype=F64)
    found = outcome.reversed_magnitude(
        torch.tensor([[-0.1, 0.2], [0.0, 0.0]], dtype=F64),
        verdict,
        torch.tensor([0, 0]),
        torch.ones(2, 2, dtype=torch.bool),
        width=1.0,
    )
    assert found[0].tolist() == pytest.approx([-HALF * math.exp(-0.1), -HALF * math.exp(0.2)])


def test_reversed_and_plain_magnitudes_are_opposites_on_correct_responses_inside_the_clip() -> None:
    small = SIGNAL / 10
    reversed_one = call("reversed_magnitude", signal=-small, width=1.0)
    plain = call("magnitude_only", signal=small, low=1.0, high=1.0)
    assert torch.allclose(reversed_one[0], plain[0], atol=1e-12)
    assert (reversed_one[1] != plain[1]).any()


def test_a_good_responses_reward_is_shared_out_by_the_teacher_and_blame_evenly() -> None:
    # exp(2), exp(-1), exp(1/2) cut at 3 and 1/3: 3, exp(-1), exp(1/2); 1/3 is 0.333 < 0.368.
    ratios = [3.0, math.exp(-1), math.exp(0.5)]
    usual = (math.log(3) - 0.5) / 3
    found = call("relative_magnitude")
    expected = [HALF * ratio / math.exp(usual) for ratio in ratios]
    assert found[0].tolist() == pytest.approx([*expected[:2], 0.0, expected[2]], rel=1e-12)
    assert found[1].tolist() == pytest.approx([-HALF, -HALF, 0.0, 0.0], rel=1e-12)
    assert (found[2:] == 0).all()
    assert call("relative_magnitude", counted=True)[0].tolist() == [True, False, False, False]


@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6), st.floats(1.01, 50))
def test_the_shares_of_a_good_response_have_a_geometric_mean_of_one(
    values: list[float], cap: float
) -> None:
    signal = torch.tensor([values, [0.0] * 6], dtype=F64)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6], dtype=torch.bool)
    verdict, group = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([3, 3])
    found = outcome.relative_magnitude(signal, verdict, group, mask, cap=cap)
    share = found[0][mask[0]] / HALF
    assert float(share.log().mean()) == pytest.approx(0, abs=1e-12)
    assert float(share.max() / share.min()) <= cap**2 * (1 + 1e-9)
    # a constant added to the response changes nothing as long as nothing is cut off
    wide = [
        outcome.relative_magnitude(signal + shift, verdict, group, mask, cap=1e9)[0]
        for shift in (0.0, 0.7)
    ]
    assert torch.allclose(*wide)


def test_the_bounded_shift_by_hand() -> None:
    # Temperature 1 / atanh(...) such that tanh(1 / t) = 3/5, so tanh(2 / t) = (6/5) / (34/25) =
    # 15/17, tanh(1 / 2t) = 1/3 and tanh(3 / t) = (3/5 + 15/17) / (1 + 9/17) = 63/65; all times 1/2.
    found = call("bounded_shift", temperature=1 / math.atanh(0.6), scale=0.5, at_least=0.2)
    assert found[0].tolist() == pytest.approx([HALF + 15 / 34, HALF - 3 / 10, 0.0, HALF], rel=1e-12)
    assert found[1].tolist() == pytest.approx(
        [-HALF - 63 / 130, -HALF + 3 / 10, 0.0, 0.0], rel=1e-12
    )
    assert (found[2:] == 0).all()


@given(
    st.lists(st.floats(-50, 50), min_size=8, max_size=8),
    st.floats(0.01, 3),
    st.floats(0.01, 3),
    st.floats(0, 0.99),
)
def test_a_bounded_shift_turns_no_sign_round_and_moves_by_its_scale_at_most(
    values: list[float], temperature: float, scale: float, share: float
) -> None:
    signal = torch.tensor(values, dtype=F64).reshape(4, 2)
    mask = torch.ones(4, 2, dtype=torch.bool)
    of_group = reward.group_advantage(VERDICT, GROUP, mask)
    knobs = {"temperature": temperature, "scale": scale, "at_least": share * scale}
    found = outcome.bounded_shift(signal, VERDICT, GROUP, mask, **knobs)
    assert (found * of_group >= 0).all()
    assert ((found - of_group).abs() <= scale * (1 + 1e-12)).all()
    assert (found[of_group == 0] == 0).all()
    still = outcome.bounded_shift(0 * signal, VERDICT, GROUP, mask, **knobs)
    assert torch.equal(still, of_group)


def test_a_shift_larger_than_the_advantage_ends_at_zero() -> None:
    found = call("bounded_shift", signal=-9 * SIGNAL, temperature=0.1, scale=2.0, at_least=0.0)
    # against the sign: 0; with it: HALF + 2
    assert found[0].tolist() == pytest.approx([0.0, HALF + 2, 0.0, 0.0], rel=1e-9)
    assert found[1].tolist() == pytest.approx([0.0, -HALF - 2, 0.0, 0.0], rel=1e-9)


def test_the_deliberation_bonus_by_hand() -> None:
    # At a = log 3 the softplus is log 4, at -log 3 it is log(4/3), without teacher mass it is 0:
    # bonuses of -log 2, log(3/2) and log 2, times scale / 2.
    mask = torch.ones(1, 4, dtype=torch.bool)
    signal = torch.tensor([[math.log(3), -math.log(3), -math.inf, 0.0]], dtype=F64)
    found = outcome.deliberation_bonus(
        signal, torch.tensor([NAN], dtype=F64), torch.tensor([0]), mask, scale=0.5
    )
    assert found[0].tolist() == pytest.approx(
        [-math.log(2) / 4, math.log(1.5) / 4, math.log(2) / 4, 0.0], abs=1e-15
    )
    beside = call("deliberation_bonus", signal=torch.zeros_like(SIGNAL))
    assert torch.allclose(beside, reward.group_advantage(VERDICT, GROUP, MASK))
    assert torch.equal(
        call("deliberation_bonus", scale=0.0), reward.group_advantage(VERDICT, GROUP, MASK)
    )


@given(st.floats(-700, 700), st.floats(0, 5))
def test_a_deliberation_bonus_adds_at_most_so_much_and_takes_without_bound(
    a: float, scale: float
) -> None:
    def bonus(value: float) -> float:
        found = outcome.deliberation_bonus(
            torch.tensor([[value]], dtype=F64),
            torch.tensor([NAN], dtype=F64),
            torch.tensor([0]),
            torch.ones(1, 1, dtype=torch.bool),
            scale=scale,
        )
        return float(found)

    assert bonus(a) <= scale * math.log(2) / 2 * (1 + 1e-12)
    assert bonus(a + 1.0) <= bonus(a)
    if a > 2:
        assert bonus(a) <= -scale * (a - math.log(2)) / 2 * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_deliberation_bonus_is_the_policy_gradient_of_ascending_the_jensen_shannon(
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, 6, generator=generator, dtype=F64)
    teacher = other.log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    (ascent,) = torch.autograd.grad(divergence.jensen_shannon(leaf.log_softmax(-1), teacher), leaf)
    student = logits.log_softmax(-1)
    bonus = outcome.deliberation_bonus(
        (teacher - student)[None],
        torch.tensor([NAN], dtype=F64),
        torch.tensor([0]),
        torch.ones(1, 6, dtype=torch.bool),
        scale=0.7,
    )[0]
    # the mean over the student's tokens of A times the score
    weights = student.exp() * bonus
    expected = weights - weights.sum() * student.exp()
    assert ascent.abs().max() > 1e-2
    assert torch.allclose(0.7 * ascent, expected, atol=1e-12)


# --------------------------------------------------------------------------------------------
# The teacher's reward with the verifier beside it


def test_the_sign_of_the_verdict_is_added_to_every_token() -> None:
    assert call("add_verdict_sign").tolist() == [
        [5.0, 2.0, 0.0, 3.5],
        [-6.0, -2.0, 0.0, 0.0],
        [1.0, -1.0, 0.0, 0.0],
        [0.0] * 4,
    ]
    # half a verdict is a correct one
    at_bound = call("add_verdict_sign", verdict=torch.tensor([0.5, 0.4999, 0.5, 1.0], dtype=F64))
    assert at_bound[:, 0].tolist() == [5.0, -6.0, 4.0, 0.0]


def test_a_verdict_decides_the_sign_of_no_bounded_return() -> None:
    # at a scale of 1 the sum has the verdict's sign, and at 1/2 either
    returns = credit.bounded_return(SIGNAL, MASK, gamma=0.99, meaning="task")
    whole = call("add_verdict_sign", signal=returns, scale=1.0)
    assert (whole[0][MASK[0]] > 0).all()
    assert (whole[1][MASK[1]] < 0).all()


def test_what_points_the_way_of_the_verdict_is_amplified() -> None:
    assert call("agreement_scale").tolist() == [
        [3.0, -0.5, 0.0, 0.75],
        [-4.5, 0.5, 0.0, 0.0],
        [0.5, -0.5, 0.0, 0.0],
        [0.0] * 4,
    ]
    hard = call("agreement_scale", agreeing=1.0, other=0.0)
    assert torch.equal(hard, call("agree_in_sign"))
    alone = torch.where(MASK, SIGNAL, 0.0)
    assert torch.equal(call("agreement_scale", agreeing=2.0, other=2.0), 2 * alone)


def test_the_gate_of_agreement_by_hand_with_the_median_of_each_response() -> None:
    # Sharpness log 3: 3 / 4 at a token of median size that agrees, 1 / 4 at one that does not.
    # Medians 2 of (2, 2, 4) and 1 of (1, 1): gates 3/4, 1/4 and, at 4, 9 / 10; and 1/4, 3/4.
    signal = torch.tensor([[2.0, -2.0, 4.0], [1.0, -1.0, NAN]], dtype=F64)
    mask = ~signal.isnan()
    verdict = torch.tensor([1.0, 0.0], dtype=F64)
    found = outcome.agreement_gate(signal, verdict, mask, sharpness=math.log(3))
    first = [1.5, -0.5, 3.6]
    assert found[0].tolist() == pytest.approx([8 / 5.6 * part for part in first], rel=1e-12)
    assert found[1].tolist() == pytest.approx([0.5, -1.5, 0.0], rel=1e-12)
    # an even number has the middle between two: of 1 and 3 that is 2
    even = outcome.agreement_gate(
        torch.tensor([[1.0, 3.0]], dtype=F64),
        torch.ones(1, dtype=F64),
        torch.ones(1, 2, dtype=torch.bool),
        sharpness=2 * math.log(3),
    )
    gates = [3 / 4, 3 * 27 / 28]
    assert even[0].tolist() == pytest.approx([4 * gate / sum(gates) for gate in gates], rel=1e-12)


@given(
    st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=8, max_size=8),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=2, max_size=2),
    st.floats(1e-3, 20),
)
def test_the_gate_of_agreement_keeps_the_size_of_every_response_and_every_sign(
    values: list[float], verdicts: list[float], sharpness: float
) -> None:
    signal = torch.tensor(values, dtype=F64).reshape(2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    verdict = torch.tensor(verdicts, dtype=F64)
    found = outcome.agreement_gate(signal, verdict, mask, sharpness=sharpness)
    assert found.isfinite().all()
    assert (found * signal >= 0).all()
    for b in range(2):
        sizes = signal[b][mask[b]].abs()
        after = float(found[b].abs().sum())
        middle = float(sizes.median())
        if math.isnan(verdicts[b]):
            assert torch.allclose(found[b], torch.where(mask[b], signal[b], 0.0), rtol=1e-12)
        elif middle > 1e-200:
            assert after == pytest.approx(float(sizes.sum()), rel=1e-9)


def test_one_response_does_not_gate_another() -> None:
    alone = call("agreement_gate")
    louder = call("agreement_gate", signal=SIGNAL * torch.tensor([[1.0], [50], [1], [1]]).double())
    assert torch.equal(alone[0], louder[0])
    assert torch.allclose(50 * alone[1], louder[1])
    # which is what tells it from the gate with the median of the step
    step = call("sigmoid_gate", signal=SIGNAL * torch.tensor([[1.0], [50], [1], [1]]).double())
    assert not torch.allclose(call("sigmoid_gate")[0], step[0])


def test_the_gate_of_agreement_runs_from_vanilla_to_agreement() -> None:
    alone = torch.where(MASK, SIGNAL, 0.0)
    soft = call("agreement_gate", sharpness=1e-9)
    assert torch.allclose(soft, alone, atol=1e-7)
    hard = call("agreement_gate", sharpness=500.0)
    agreeing = call("agree_in_sign")
    for b in range(2):
        kept = alone[b].abs().sum() / agreeing[b].abs().sum()
        assert torch.allclose(hard[b], kept * agreeing[b], atol=1e-9)


def test_where_a_responses_median_is_zero_its_gate_takes_the_limit() -> None:
    signal = torch.tensor([[0.0, 0.0, 0.0, 2.0, -4.0]], dtype=F64)
    mask = torch.ones(1, 5, dtype=torch.bool)
    for verdict, expected in ((1.0, [0, 0, 0, 6, 0]), (0.0, [0, 0, 0, 0, -6])):
        found = outcome.agreement_gate(
            signal, torch.tensor([verdict], dtype=F64), mask, sharpness=0.5
        )
        assert found.tolist() == [expected]
    # and where nothing is left that agrees there is no NaN
    lonely = torch.tensor([[0.0, 0.0, 0.0, 0.0, -4.0]], dtype=F64)
    right = torch.ones(1, dtype=F64)
    assert outcome.agreement_gate(lonely, right, mask, sharpness=0.5).isfinite().all()


# Two prompts: three responses of prompt 0, with the teacher's means 3, 1, 2 and verdicts 1, 0, 0;
# a correct and an unjudged one of prompt 1.
RESIDUAL = torch.tensor([[2.0, 4.0], [1.0, 1.0], [2.0, NAN], [1.0, 5.0], [7.0, 7.0]], dtype=F64)
RESIDUAL_KNOWN = {
    "signal": RESIDUAL,
    "mask": ~RESIDUAL.isnan(),
    "group": torch.tensor([0, 0, 0, 1, 1]),
    "verdict": torch.tensor([1.0, 0.0, 0.0, 1.0, NAN], dtype=F64),
}


def residual(**knobs: Any) -> Tensor:
    return call("add_verdict_residual", **{**RESIDUAL_KNOWN, "scale": 0.5, "limit": 99.0, **knobs})


def test_the_residual_of_the_verdict_by_hand() -> None:
    # z of the verdicts: mean 1/3, variance 2/9, so 2 / root 2 = root 2 and -1 / root 2; z of the
    # means: variance 2/3, so root 3/2, -root 3/2 and 0. Within response 0: u = -1 and 1; within the
    # others u is 0. Prompt 1 has one judged response, so nothing is added.
    two, three = math.sqrt(2), math.sqrt(1.5)
    found = residual()
    tanh = math.tanh(0.5)
    assert found.tolist() == [
        pytest.approx(
            [2 + 0.5 * (1 - tanh) * (two - three), 4 + 0.5 * (1 + tanh) * (two - three)], rel=1e-12
        ),
        pytest.approx([1 + 0.5 * (-two / 2 + three)] * 2, rel=1e-12),
        pytest.approx([2 + 0.5 * (-two / 2), 0.0], rel=1e-12),
        [1.0, 5.0],
        [7.0, 7.0],
    ]


def test_where_teacher_and_verifier_rank_alike_or_either_is_undecided_nothing_is_added() -> None:
    alone = RESIDUAL.nan_to_num(0.0)
    alike = residual(verdict=torch.tensor([1.0, 0.0, 0.5, 1.0, NAN], dtype=F64))
    assert torch.allclose(alike, alone, atol=1e-12)
    for verdict in (0.0, 1.0, NAN):
        assert torch.equal(residual(verdict=torch.full((5,), verdict).double()), alone)
    level = torch.ones_like(RESIDUAL)
    assert torch.equal(
        residual(signal=level), torch.where(RESIDUAL_KNOWN["mask"], 1.0, 0.0).double()
    )


def test_the_residual_goes_to_the_tokens_that_the_teacher_prefers() -> None:
    added = residual() - RESIDUAL.nan_to_num(0.0)
    assert 0 < float(added[0, 0]) < float(added[0, 1])
    # the two gates of a response whose u are -1 and 1 share out twice the residual
    assert float(added[0].sum()) == pytest.approx(2 * 0.5 * (math.sqrt(2) - math.sqrt(1.5)))


def test_an_advantage_with_residual_stays_within_its_limit() -> None:
    found = residual(limit=1.5)
    second = 1 + 0.5 * (math.sqrt(1.5) - math.sqrt(0.5))
    assert found[1].tolist() == pytest.approx([second] * 2, rel=1e-12)
    assert found[[0, 2, 3, 4]].tolist() == [[1.5, 1.5], [1.5, 0.0], [1.0, 1.5], [1.5, 1.5]]
    assert torch.equal(
        residual(signal=-RESIDUAL, limit=0.25, scale=0.0).nan_to_num(),
        torch.where(RESIDUAL_KNOWN["mask"], -0.25, 0.0).double(),
    )


def test_a_response_without_tokens_has_a_verdict_and_no_rank_by_the_teacher() -> None:
    known = {**RESIDUAL_KNOWN, "mask": RESIDUAL_KNOWN["mask"].clone()}
    known["mask"][2] = False

    def rest(**changes: Tensor) -> Tensor:
        found = call("add_verdict_residual", **{**known, **changes}, scale=0.5, limit=99.0)
        return found[[0, 1, 3, 4]]

    moved = known["signal"].clone()
    moved[2] += 7.0
    assert torch.equal(rest(signal=moved), rest())
    turned = known["verdict"].clone()
    turned[2] = 1.0 - turned[2]
    assert not torch.allclose(rest(verdict=turned), rest(), atol=1e-3)


def test_a_margin_is_made_by_raising_the_correct_and_lowering_the_wrong() -> None:
    # Means 3 of the correct, 1 and 2 of the wrong: they lead by 1.5, so the gap to 3.5 is 2.
    known = {**RESIDUAL_KNOWN, "margin": 3.5}
    found = call("margin_shift", **known, correct_share=0.25)
    assert found.tolist() == [[2.5, 4.5], [-0.5, -0.5], [0.5, 0.0], [1.0, 5.0], [7.0, 7.0]]
    raised = call("margin_shift", **known, correct_share=1.0)
    assert raised.tolist() == [[4.0, 6.0], [1.0, 1.0], [2.0, 0.0], [1.0, 5.0], [7.0, 7.0]]
    lowered = call("margin_shift", **known, correct_share=0.0)
    assert lowered.tolist() == [[2.0, 4.0], [-1.0, -1.0], [0.0, 0.0], [1.0, 5.0], [7.0, 7.0]]
    enough = call("margin_shift", **{**known, "margin": 1.5}, correct_share=0.5)
    assert torch.equal(enough, RESIDUAL.nan_to_num(0.0))


@given(
    st.lists(st.floats(-3, 3), min_size=12, max_size=12),
    st.floats(0, 2),
    st.floats(0, 1),
)
def test_after_the_shift_correct_responses_lead_by_the_margin_at_least(
    values: list[float], margin: float, share: float
) -> None:
    signal = torch.tensor(values, dtype=F64).reshape(4, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    verdict = torch.tensor([1.0, 0.0, 0.5, NAN], dtype=F64)
    group = torch.zeros(4, dtype=torch.int64)
    found = outcome.margin_shift(signal, verdict, group, mask, margin=margin, correct_share=share)

    def lead(values: Tensor) -> float:
        first, wrong, second, _ = (
            float(row[is_open].mean()) for row, is_open in zip(values, mask, strict=True)
        )
        return (first + second) / 2 - wrong

    assert lead(found) == pytest.approx(max(lead(signal), margin), abs=1e-6)
    assert torch.equal(found[3], signal[3])


def test_prompts_with_responses_of_one_kind_are_left_alone() -> None:
    for verdict in (0.0, 1.0, NAN):
        found = call("margin_shift", verdict=torch.full((4,), verdict).double())
        assert torch.equal(found, torch.where(MASK, SIGNAL, 0.0))
    # a response without tokens is of no kind
    lonely = call("margin_shift", group=torch.tensor([0, 1, 1, 1]))
    assert torch.equal(lonely, torch.where(MASK, SIGNAL, 0.0))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (partial(call, "mix_group_advantage", share=1.1), "add_group_advantage takes any scale"),
        (partial(call, "mix_group_advantage", share=-0.1), "share must lie"),
        (partial(call, "sigmoid_gate", sharpness=0.0), "sharpness must be positive"),
        (partial(call, "magnitude_only", low=1.1, high=0.2), "0 <= low <= 1"),
        (partial(call, "magnitude_only", low=0.1, high=-0.2), "high >= 0"),
        (
            partial(call, "magnitude_only", low=0.5, high=0.5, strength=1.1),
            r"strength must lie in \[0, 1\], got 1.1",
        ),
        (partial(call, "reversed_magnitude", width=1.1), "width.* got 1.1"),
        (
            partial(call, "reversed_magnitude", width=0.5, strength=-0.1),
            r"strength must lie in \[0, 1\], got -0.1",
        ),
        (partial(call, "relative_magnitude", cap=1.0), "cap must be above 1, got 1.0"),
        (
            partial(call, "bounded_shift", temperature=0.0, scale=0.5, at_least=0.1),
            "temperature > 0.* got 0.0, 0.5 and 0.1",
        ),
        (
            partial(call, "bounded_shift", temperature=1.0, scale=0.0, at_least=0.0),
            "scale > 0.* got 1.0, 0.0 and 0.0",
        ),
        (
            partial(call, "bounded_shift", temperature=1.0, scale=0.5, at_least=0.5),
            "at_least < scale, got 1.0, 0.5 and 0.5",
        ),
        (partial(call, "deliberation_bonus", scale=-0.1), "scale must be >= 0, got -0.1"),
        (partial(call, "agreement_scale", agreeing=-0.1, other=1.0), ">= 0, got -0.1 and 1.0"),
        (partial(call, "agreement_scale", agreeing=1.0, other=NAN), ">= 0, got 1.0 and nan"),
        (partial(call, "agreement_gate", sharpness=0.0), "sharpness must be positive, got 0.0"),
        (
            partial(call, "add_verdict_residual", scale=0.1, limit=0.0),
            "limit must be positive, got 0.0",
        ),
        (
            partial(call, "margin_shift", margin=0.1, correct_share=1.1),
            r"correct_share must lie in \[0, 1\], got 1.1",
        ),
    ],
)
def test_impossible_knobs_are_refused(refused: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.formula import credit
from tests.reference import credit as ref
from tests.reference.divergences import reverse_kl

F64 = torch.float64


@st.composite
def responses(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rewards and a mask with gaps, `[B, T]`."""
    size, length = draw(st.integers(1, 3)), draw(st.integers(0, 12))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(size, length, generator=generator, dtype=F64)
    return reward, torch.rand(size, length, generator=generator) < draw(st.floats(0, 1))


def test_returns_by_hand_with_a_gap_that_takes_no_time() -> None:
    reward = torch.tensor([[1.0, 99.0, 2.0, 4.0, 99.0]], dtype=F64)
    mask = torch.tensor([[True, False, True, True, False]])
    assert credit.return_to_go(reward, mask).tolist() == [[7.0, 0.0, 6.0, 4.0, 0.0]]
    half = credit.discounted(reward, mask, gamma=0.5, meaning="task")
    assert half.tolist() == [[1 + 1 + 1, 0.0, 2 + 2, 4.0, 0.0]]
    assert credit.immediate(reward).tolist() == reward.tolist()


def test_every_credit_by_hand_with_a_gap() -> None:
    # Without the gap: rewards 1, 2, 4 and reverse KLs 3, 5, 7, whose mean is 5.
    reward = torch.tensor([[1.0, 99.0, 2.0, 4.0, 99.0]], dtype=F64)
    cost = torch.tensor([[3.0, 99.0, 5.0, 7.0, 99.0]], dtype=F64)
    mask = torch.tensor([[True, False, True, True, False]])
    expected = {
        "windowed": [1 + 2, 0, 2 + 4, 4, 0],
        "length_normalised": [7 / 3, 0, 6 / 2, 4, 0],
        "future": [2 + 4, 0, 4, 0, 0],
        "mean_future": [(2 + 4) / 2, 0, 4, 0, 0],
        "rao_blackwell": [1 - 12, 0, 2 - 7, 4, 0],
        "next_step": [1 - 5, 0, 2 - 7, 4, 0],
        "damped_future": [1 - 0.5 * 12, 0, 2 - 0.5 * 7, 4, 0],
        "length_neutral_future": [1 - 0.5 * (0 + 2), 0, 2 - 0.5 * 2, 4, 0],
    }
    got = {
        "windowed": credit.windowed(reward, mask, window=2),
        "length_normalised": credit.length_normalised(reward, mask),
        "future": credit.future(reward, mask),
        "mean_future": credit.mean_future(reward, mask),
        "rao_blackwell": credit.rao_blackwell(reward, cost, mask),
        "next_step": credit.next_step(reward, cost, mask),
        "damped_future": credit.damped_future(reward, cost, mask, future_weight=0.5),
        "length_neutral_future": credit.length_neutral_future(
            reward, cost, mask, future_weight=0.5
        ),
    }
    assert {name: value[0].tolist() for name, value in got.items()} == expected


def test_generalised_advantages_by_hand_with_a_gap_and_a_bootstrap() -> None:
    # Rewards 1, 2; values 10, 20, and 40 after the last token: residuals 1 + 20 - 10 = 11 and
    # 2 + 40 - 20 = 22, so lambda = 1/2 gives 11 + 22 / 2 and 22.
    reward = torch.tensor([[1.0, 99.0, 2.0]], dtype=F64)
    values = torch.tensor([[10.0, 99.0, 20.0]], dtype=F64)
    mask = torch.tensor([[True, False, True]])
    cut, ended = torch.tensor([40.0], dtype=F64), torch.tensor([0.0], dtype=F64)
    assert credit.gae(reward, values, cut, mask, gae_lambda=0.5).tolist() == [[22.0, 0.0, 22.0]]
    # Ended: the last residual is 2 - 20 = -18.
    assert credit.gae(reward, values, ended, mask, gae_lambda=0.5).tolist() == [[2.0, 0.0, -18.0]]
    # gamma = 1/2 halves every later value and, once more, every later residual:
    # 1 + 10 - 10 = 1 and 2 + 20 - 20 = 2, then 1 + 2 / 4 and 2.
    half = credit.gae(reward, values, cut, mask, gae_lambda=0.5, gamma=0.5, meaning="task")
    assert half.tolist() == [[1.5, 0.0, 2.0]]


KNOBS = st.fixed_dictionaries(
    {"gamma": st.floats(0, 1), "gae_lambda": st.floats(0, 1), "weight": st.floats(0, 2)}
)


@given(responses(), KNOBS, st.integers(1, 14), st.integers(0, 2**31))
def test_credit_agrees_with_the_transcription(
    case: tuple[Tensor, Tensor], knobs: dict[str, float], window: int, seed: int
) -> None:
    reward, mask = case
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(reward.shape, generator=generator, dtype=F64).abs()
    values = -torch.randn(reward.shape, generator=generator, dtype=F64).abs()
    bootstrap = torch.randn(len(reward), generator=generator, dtype=F64)
    future_weight = knobs.pop("weight")
    damped = {"future_weight": future_weight}
    gamma = {"gamma": knobs["gamma"]}
    pairs: list[tuple[Tensor, Callable[[int], Any]]] = [
        (credit.return_to_go(reward, mask), lambda b: ref.return_to_go(reward[b], mask[b])),
        (
            credit.discounted(reward, mask, meaning="task", **gamma),
            lambda b: ref.discounted(reward[b], mask[b], **gamma),
        ),
        (
            credit.windowed(reward, mask, window=window),
            lambda b: ref.windowed(reward[b], mask[b], window=window),
        ),
        (
            credit.length_normalised(reward, mask),
            lambda b: ref.length_normalised(reward[b], mask[b]),
        ),
        (credit.future(reward, mask), lambda b: ref.future(reward[b], mask[b])),
        (credit.mean_future(reward, mask), lambda b: ref.mean_future(reward[b], mask[b])),
        (credit.standardised(reward, mask), lambda b: ref.standardised(reward, mask)[b]),
        (
            credit.scaled_by_turn(reward, mask, gain_cap=future_weight),
            lambda b: ref.scaled_by_turn(reward[b], mask[b], gain_cap=future_weight),
        ),
        (
            credit.bounded_return(reward, mask, meaning="task", **gamma),
            lambda b: ref.bounded_return(reward[b], mask[b], **gamma),
        ),
        (
            credit.rao_blackwell(reward, cost, mask),
            lambda b: ref.rao_blackwell(reward[b], cost[b], mask[b]),
        ),
        (
            credit.next_step(reward, cost, mask),
            lambda b: ref.next_step(reward[b], cost[b], mask[b]),
        ),
        (
            credit.damped_future(reward, cost, mask, **damped),
            lambda b: ref.damped_future(reward[b], cost[b], mask[b], **damped),
        ),
        (
            credit.length_neutral_future(reward, cost, mask, **damped),
            lambda b: ref.length_neutral_future(reward, cost, mask, **damped)[b],
        ),
        (
            credit.gae(reward, values, bootstrap, mask, meaning="task", **knobs),
            lambda b: ref.gae(reward[b], values[b], float(bootstrap[b]), mask[b], **knobs),
        ),
    ]
    for got, transcribed in pairs:
        for b in range(len(reward)):
            assert np.allclose(got[b], transcribed(b), rtol=0, atol=1e-12)


def walked(
    reward: Tensor, mask: Tensor, *, gamma: float, window: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Discounted and windowed sums, token by token from the last, as a literal loop."""
    discounted, windowed = [], []
    for numbers, looked_at in zip(reward.tolist(), mask.tolist(), strict=True):
        total, seen = 0.0, []
        rows: tuple[list[float], list[float]] = ([], [])
        for number, is_open in zip(numbers[::-1], looked_at[::-1], strict=True):
            if is_open:
                total = number + gamma * total
                seen.append(number)
            rows[0].append(total if is_open else 0.0)
            rows[1].append(sum(seen[-window:]) if is_open else 0.0)
        discounted.append(rows[0][::-1])
        windowed.append(rows[1][::-1])
    return discounted, windowed


def masks(size: int, length: int) -> dict[str, Tensor]:
    """Masks of the kinds that are walked in different ways."""
    places = torch.arange(length).expand(size, length)
    lengths = torch.linspace(0, length, size).long().unsqueeze(1)
    return {
        "no gap": torch.ones(size, length, dtype=torch.bool),
        "padding": places < lengths,
        "tool results": (places < lengths) & (places % 97 > 11),
        "every other token": places % 2 == 1,
        "at random": torch.rand(size, length, generator=torch.Generator().manual_seed(1)) < 0.9,
        "nothing": torch.zeros(size, length, dtype=torch.bool),
    }


@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize("length", [31, 32, 33, 300])
def test_long_responses_agree_with_a_loop(kind: str, length: int) -> None:
    mask = masks(5, length)[kind]
    generator = torch.Generator().manual_seed(2)
    reward = torch.randn(mask.shape, generator=generator, dtype=F64)
    discounted, windowed = walked(reward, mask, gamma=0.97, window=37)
    got = credit.discounted(reward, mask, gamma=0.97, meaning="task")
    assert torch.allclose(got, torch.tensor(discounted, dtype=F64), rtol=0, atol=1e-12)
    got = credit.windowed(reward, mask, window=37)
    assert torch.allclose(got, torch.tensor(windowed, dtype=F64), rtol=0, atol=1e-12)


def test_a_response_of_more_than_two_levels_of_blocks_agrees_with_a_loop() -> None:
    length = credit.BLOCK * credit.OUTER_BLOCK + 100
    reward = torch.randn(1, length, generator=torch.Generator().manual_seed(3), dtype=F64)
    mask = torch.ones(1, length, dtype=torch.bool)
    discounted, _ = walked(reward, mask, gamma=0.9999, window=1)
    got = credit.discounted(reward, mask, gamma=0.9999, meaning="task")
    assert torch.allclose(got, torch.tensor(discounted, dtype=F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("gamma", [1e-30, 1e-3, 0.5, 0.999])
def test_a_discount_of_any_size_is_right_in_float32(gamma: float) -> None:
    reward = torch.rand(2, 500, generator=torch.Generator().manual_seed(4)) + 0.5
    mask = torch.ones(2, 500, dtype=torch.bool)
    discounted, _ = walked(reward, mask, gamma=gamma, window=1)
    got = credit.discounted(reward, mask, gamma=gamma, meaning="task").double()
    assert torch.allclose(got, torch.tensor(discounted, dtype=F64), rtol=2e-6, atol=0)


def test_a_window_is_not_the_difference_of_two_large_sums() -> None:
    # In float32, sums from the front reach 2^24 and lose everything below 1.
    reward = torch.full((1, 64), 0.25)
    reward[0, :8] = 2.0**24
    got = credit.windowed(reward, torch.ones(1, 64, dtype=torch.bool), window=3)
    assert got[0, 8:-2].tolist() == [0.75] * 54
    assert got[0, -2:].tolist() == [0.5, 0.25]


@pytest.mark.parametrize("kind", masks(1, 1))
def test_working_on_few_responses_at_a_time_changes_rounding_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = masks(7, 70)[kind]
    reward, cost = torch.randn(2, 7, 70, generator=torch.Generator().manual_seed(5))
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: credit.return_to_go(reward, mask),
        lambda: credit.windowed(reward, mask, window=5),
        lambda: credit.length_normalised(reward, mask),
        lambda: credit.next_step(reward, cost, mask),
        lambda: credit.gae(reward, cost, cost[:, 0], mask, gae_lambda=1.0),
        lambda: credit.position_mean(reward, mask),
    )
    together = [call() for call in calls]
    monkeypatch.setattr(credit, "CACHED", 150)  # two responses of 70 tokens
    for call, expected in zip(calls, together, strict=True):
        assert torch.allclose(call(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", masks(1, 1))
def test_copying_stretches_and_selecting_tokens_give_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = masks(6, 90)[kind]
    reward, values = torch.randn(2, 6, 90, generator=torch.Generator().manual_seed(6), dtype=F64)
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: credit.discounted(reward, mask, gamma=0.9, meaning="task"),
        lambda: credit.gae(reward, values, values[:, 0], mask, gae_lambda=0.8),
        lambda: credit.length_normalised(reward, mask),
        lambda: credit.position_mean(reward, mask),
    )
    results = []
    for limit in (0, 1000):
        monkeypatch.setattr(credit, "MANY_RUNS", limit)
        results.append([call() for call in calls])
    for one_by_one, in_stretches in zip(*results, strict=True):
        assert torch.equal(one_by_one, in_stretches)


@given(responses())
def test_the_end_points_of_the_discount_are_the_other_credits_bit_for_bit(
    case: tuple[Tensor, Tensor],
) -> None:
    for reward, mask in (case, (case[0].float(), case[1])):
        none = credit.discounted(reward, mask, gamma=0.0, meaning="task")
        whole = credit.discounted(reward, mask, gamma=1.0, meaning="task")
        assert torch.equal(none, torch.where(mask, credit.immediate(reward), 0.0))
        assert torch.equal(whole, credit.return_to_go(reward, mask))


@given(responses())
def test_moving_a_gap_changes_no_return(case: tuple[Tensor, Tensor]) -> None:
    reward, mask = case
    for b in range(reward.shape[0]):
        kept = reward[b][mask[b]].unsqueeze(0)
        without_gaps = credit.return_to_go(kept, torch.ones_like(kept, dtype=torch.bool))
        assert torch.equal(credit.return_to_go(reward, mask)[b][mask[b]], without_gaps[0])


def test_what_a_masked_token_holds_is_never_read() -> None:
    reward = torch.tensor([[1.0, float("nan"), 2.0, float("inf")]])
    mask = torch.tensor([[True, False, True, False]])
    assert credit.return_to_go(reward, mask).tolist() == [[3.0, 0.0, 2.0, 0.0]]


def test_arguments_that_are_not_contiguous_are_read_as_they_are() -> None:
    reward = torch.arange(12.0).view(4, 3).T
    mask = torch.ones(4, 3, dtype=torch.bool).T
    assert credit.return_to_go(reward, mask)[1].tolist() == [22.0, 21.0, 17.0, 10.0]


# --------------------------------------------------------------------------------------------
# What stopping early earns


def test_a_longer_future_of_usual_cost_earns_nothing_where_length_is_neutral() -> None:
    reward = torch.zeros(2, 6, dtype=F64)
    cost = torch.full((2, 6), 0.3, dtype=F64)
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    neutral = credit.length_neutral_future(reward, cost, mask, future_weight=1.0)
    assert neutral.abs().max() <= 1e-15
    charged = credit.rao_blackwell(reward, cost, mask)
    # One later token at 0.3 nats, or five.
    assert charged[:, 0].tolist() == pytest.approx([-0.3, -1.5], abs=1e-15)


def test_a_damped_future_runs_from_immediate_to_rao_blackwell() -> None:
    reward, cost = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(7), dtype=F64)
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(8)) < 0.7
    none = credit.damped_future(reward, cost, mask, future_weight=0.0)
    whole = credit.damped_future(reward, cost, mask, future_weight=1.0)
    assert torch.equal(none, torch.where(mask, reward, 0.0))
    assert torch.equal(whole, credit.rao_blackwell(reward, cost, mask))


def test_future_is_the_return_without_the_tokens_own_reward() -> None:
    # Whole numbers, so that every sum is exact.
    draw = torch.Generator().manual_seed(9)
    reward = torch.randint(-9, 9, (3, 8), generator=draw).double()
    mask = torch.rand(3, 8, generator=draw) < 0.7
    own = torch.where(mask, reward, 0.0)
    assert torch.equal(credit.future(reward, mask), credit.return_to_go(reward, mask) - own)


@given(responses())
def test_a_window_runs_from_immediate_to_the_return(case: tuple[Tensor, Tensor]) -> None:
    reward, mask = case
    one = credit.windowed(reward, mask, window=1)
    assert torch.equal(one, torch.where(mask, reward, 0.0))
    for longest in (max(reward.shape[1], 1), 10**9):
        whole = credit.windowed(reward, mask, window=longest)
        assert torch.allclose(whole, credit.return_to_go(reward, mask), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------
# GAE


@given(responses(), st.integers(0, 2**31))
def test_at_lambda_one_a_value_only_shifts_its_own_state(
    case: tuple[Tensor, Tensor], seed: int
) -> None:
    reward, mask = case
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(reward.shape, generator=generator, dtype=F64)
    bootstrap = torch.randn(len(reward), generator=generator, dtype=F64)
    got = credit.gae(reward, values, bootstrap, mask, gae_lambda=1.0)
    returns = credit.return_to_go(reward, mask) + bootstrap.unsqueeze(1)
    assert torch.allclose(got, torch.where(mask, returns - values, 0.0), rtol=0, atol=1e-12)


def test_rewards_that_are_what_the_values_fall_by_leave_no_advantage() -> None:
    values = torch.tensor([[-6.0, -5.0, -3.0]], dtype=F64)
    reward = torch.tensor([[-1.0, -2.0, -2.5]], dtype=F64)
    bootstrap = torch.tensor([-0.5], dtype=F64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for gae_lambda in (0.0, 0.3, 1.0):
        advantage = credit.gae(reward, values, bootstrap, mask, gae_lambda=gae_lambda)
        assert advantage.tolist() == [[0.0, 0.0, 0.0]]


def test_a_response_without_open_tokens_gets_nothing_from_its_bootstrap() -> None:
    mask = torch.tensor([[False, False], [True, False]])
    nothing = torch.zeros(2, 2, dtype=F64)
    bootstrap = torch.tensor([5.0, 7.0], dtype=F64)
    got = credit.gae(nothing, nothing, bootstrap, mask, gae_lambda=0.5)
    assert got.tolist() == [[0.0, 0.0], [7.0, 0.0]]


# --------------------------------------------------------------------------------------------
# Rewards in another measure


@given(responses())
def test_the_mean_of_the_future_is_the_future_over_the_tokens_that_remain(
    case: tuple[Tensor, Tensor],
) -> None:
    reward, mask = case
    remaining = credit.future(mask.double(), mask)
    mean = credit.mean_future(reward, mask)
    assert torch.allclose(mean * remaining, credit.future(reward, mask), rtol=0, atol=1e-12)
    assert (mean[remaining == 0] == 0).all()
    # a constant is its own mean, wherever anything is left
    assert torch.allclose(credit.mean_future(0.3 * mask, mask), torch.where(remaining > 0, 0.3, 0))


def test_standardised_rewards_by_hand() -> None:
    # 1, 2, 6: mean 3 and a sample's variance (4 + 1 + 9) / 2 = 7.
    reward = torch.tensor([[1.0, float("nan")], [2.0, 6.0]], dtype=F64)
    mask = torch.tensor([[True, False], [True, True]])
    found = credit.standardised(reward, mask)
    root = (7 + 1e-8) ** 0.5
    assert found.flatten().tolist() == pytest.approx([-2 / root, 0, -1 / root, 3 / root], rel=1e-12)
    # Where the rewards hardly differ they stay small: variance 1e-8 beside the 1e-8 added.
    close = credit.standardised(torch.tensor([[5e-5, -5e-5]], dtype=F64), mask[1:])
    assert close[0].tolist() == pytest.approx([5e-5 / 1.5e-8**0.5, -5e-5 / 1.5e-8**0.5], rel=1e-12)


@given(responses(), st.floats(1, 100), st.floats(-5, 5))
def test_standardised_rewards_know_neither_unit_nor_origin_of_the_step(
    case: tuple[Tensor, Tensor], unit: float, origin: float
) -> None:
    reward, mask = case
    found = credit.standardised(reward, mask)
    if mask.sum() < 2:
        assert (found == 0).all()
        return
    variance = float(reward[mask].var())
    moved = credit.standardised(unit * reward + origin, mask)
    assert torch.allclose(moved, found, atol=1e-12, rtol=2e-8 / variance)
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(found[mask].var()) == pytest.approx(variance / (variance + 1e-8), rel=1e-12)


def test_a_student_that_is_its_teacher_gets_no_standardised_reward() -> None:
    mask = torch.ones(3, 7, dtype=torch.bool)
    assert (credit.standardised(torch.zeros(3, 7), mask) == 0).all()


def test_turns_that_drifted_further_are_scaled_down_by_hand() -> None:
    # Three turns with mean |r| of 2, 4 and 1/2: factors 1, 1/2 and, of 4, 1 + gain_cap.
    reward = torch.tensor([[1.0, -3.0, 99.0, 4.0, 99.0, 99.0, -0.5, 0.5]], dtype=F64)
    mask = torch.tensor([[True, True, False, True, False, False, True, True]])
    found = credit.scaled_by_turn(reward, mask, gain_cap=0.5)
    assert found.tolist() == [[1.0, -3.0, 0.0, 2.0, 0.0, 0.0, -0.75, 0.75]]
    loose = credit.scaled_by_turn(reward, mask, gain_cap=9.0)
    assert loose.tolist() == [[1.0, -3.0, 0.0, 2.0, 0.0, 0.0, -2.0, 2.0]]
    tight = credit.scaled_by_turn(reward, mask, gain_cap=0.0)
    assert tight.tolist() == [[1.0, -3.0, 0.0, 2.0, 0.0, 0.0, -0.5, 0.5]]


@given(responses(), st.floats(0, 2))
def test_the_first_turn_keeps_its_rewards_and_no_later_one_drifts_more_than_it_did(
    case: tuple[Tensor, Tensor], gain_cap: float
) -> None:
    reward, mask = case
    found = credit.scaled_by_turn(reward, mask, gain_cap=gain_cap)
    assert (found[~mask] == 0).all()
    for rewards, row, is_open in zip(reward, found, mask.tolist(), strict=True):
        kept = [t for t, looked_at in enumerate(is_open) if looked_at]
        turns = [[t for t in kept if sum(not o for o in is_open[:t]) == gaps] for gaps in range(13)]
        turns = [turn for turn in turns if turn]
        for k, turn in enumerate(turns):
            before, after = rewards[turn], row[turn]
            if k == 0:
                assert torch.equal(after, before)
                first = float(before.abs().mean())
            share = float(after.abs().mean() / before.abs().mean())
            assert share <= 1 + gain_cap + 1e-12
            assert float(after.abs().mean()) <= first * (1 + 1e-12)
            assert torch.allclose(after, share * before)


def test_a_response_in_one_turn_is_left_alone_wherever_it_starts() -> None:
    reward = torch.tensor([[9.0, 1.0, -2.0, 9.0], [9.0, 9.0, 9.0, 3.0]], dtype=F64)
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    found = credit.scaled_by_turn(reward, mask, gain_cap=0.0)
    assert torch.equal(found, torch.where(mask, reward, 0.0))


def test_turns_without_drift_make_no_nan() -> None:
    mask = torch.tensor([[True, False, True, False, True]] * 3)
    reward = torch.tensor([[0.0, 9, 2, 9, 0], [2.0, 9, 0, 9, 4], [0.0, 9, 0, 9, 0]], dtype=F64)
    found = credit.scaled_by_turn(reward, mask, gain_cap=0.5)
    assert found.tolist() == [[0.0] * 5, [2.0, 0, 0, 0, 2], [0.0] * 5]


def test_the_bounded_return_by_hand() -> None:
    # Returns at gamma 1/2, from the last: 2, -4 + 2 / 2 = -3, 1/2 - 3 / 2 = -1; mean size 2.
    reward = torch.tensor([[0.5, 99.0, -4.0, 2.0]], dtype=F64)
    mask = torch.tensor([[True, False, True, True]])
    found = credit.bounded_return(reward, mask, gamma=0.5, meaning="task")
    assert found.tolist() == [[-1 / 3, 0, -3 / 5, 2 / 4]]


@given(responses(), st.floats(0, 1), st.floats(0.01, 100))
def test_a_bounded_return_has_the_sign_of_the_return_no_unit_and_stays_inside_one(
    case: tuple[Tensor, Tensor], gamma: float, unit: float
) -> None:
    reward, mask = case
    knobs = {"gamma": gamma, "meaning": "task"}
    found = credit.bounded_return(reward, mask, **knobs)
    returns = credit.discounted(reward, mask, **knobs)
    assert (found.abs() < 1).all()
    assert torch.equal(found.sign(), returns.sign())
    assert torch.allclose(credit.bounded_return(unit * reward, mask, **knobs), found)
    # the order of sizes is that of the returns
    for sizes, values, is_open in zip(returns.abs(), found.abs(), mask, strict=True):
        assert (values[is_open][sizes[is_open].argsort()].diff() >= 0).all()


def test_a_token_of_usual_size_gets_one_half_and_an_empty_return_nothing() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    reward = torch.tensor([[0.0, 0.0, -7.0], [0.0, 0.0, 0.0]], dtype=F64)
    found = credit.bounded_return(reward, mask, gamma=1.0, meaning="task")
    assert found.tolist() == [[-0.5] * 3, [0.0] * 3]


# --------------------------------------------------------------------------------------------
# Knobs


KNOWN = {"gamma": 0.5, "meaning": "task"}
BAD: list[tuple[Callable[..., Tensor], int, dict[str, Any], str]] = [
    (credit.discounted, 1, {**KNOWN, "gamma": -0.1}, r"gamma must lie in \[0, 1\], got -0.1"),
    (credit.discounted, 1, {**KNOWN, "gamma": 1.1}, r"gamma must lie in \[0, 1\]"),
    (credit.discounted, 1, {**KNOWN, "meaning": "because"}, "what it means: one of task"),
    (credit.bounded_return, 1, {**KNOWN, "gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
    (credit.bounded_return, 1, {**KNOWN, "meaning": "because"}, "what it means: one of task"),
    (credit.scaled_by_turn, 1, {"gain_cap": -0.1}, "gain_cap must be >= 0, got -0.1"),
    (credit.scaled_by_turn, 1, {"gain_cap": float("nan")}, "gain_cap must be >= 0, got nan"),
    (credit.windowed, 1, {"window": 0}, "must be >= 1, got 0; 1 is immediate"),
    (credit.damped_future, 2, {"future_weight": -1.0}, "future_weight must be finite and >= 0"),
    (credit.damped_future, 2, {"future_weight": float("inf")}, "future_weight must be finite"),
    (credit.length_neutral_future, 2, {"future_weight": float("nan")}, "future_weight must be"),
]


@pytest.mark.parametrize(("function", "tensors", "knobs", "message"), BAD)
def test_a_knob_that_makes_no_sense_is_refused(
    function: Callable[..., Tensor], tensors: int, knobs: dict[str, Any], message: str
) -> None:
    numbers, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        function(*[numbers] * tensors, mask, **knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"gae_lambda": 1.5}, r"gae_lambda must lie in \[0, 1\], got 1.5"),
        ({"gae_lambda": 0.5, "gamma": -1.0}, r"gamma must lie in \[0, 1\]"),
        ({"gae_lambda": 0.5, "gamma": 0.9}, "must say what it means"),
    ],
)
def test_generalised_advantages_refuse_knobs_that_make_no_sense(
    knobs: dict[str, Any], message: str
) -> None:
    numbers, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        credit.gae(numbers, numbers, numbers[0], mask, **knobs)


# --------------------------------------------------------------------------------------------
# Baselines


def test_the_expected_reward_is_minus_the_reverse_kl_detached() -> None:
    student, teacher = torch.randn(2, 5, dtype=F64).log_softmax(-1)
    live = torch.tensor(reverse_kl(student, teacher), dtype=F64, requires_grad=True)
    baseline = credit.expected_reward(live)
    assert float(baseline) == ref.per_state_baseline(student, teacher)
    assert not baseline.requires_grad
    mean = sum(
        float(student[token].exp()) * ref.teacher_log_ratio(student, teacher, token)
        for token in range(5)
    )
    assert float(baseline) == pytest.approx(mean, abs=1e-14)


def test_the_learned_value_is_passed_on_detached() -> None:
    live = torch.randn(2, 3, dtype=F64, requires_grad=True)
    baseline = credit.value(live)
    assert torch.equal(baseline, live)
    assert not baseline.requires_grad


def test_baselines_over_other_responses_by_hand() -> None:
    # Without gaps: 1, 2 / 5, 7 / 10; responses 0 and 2 share a prompt.
    credited = torch.tensor([[1.0, 99.0, 2.0], [5.0, 7.0, 99.0], [10.0, 99.0, 99.0]], dtype=F64)
    mask = torch.tensor([[True, False, True], [True, True, False], [True, False, False]])
    position = credit.position_mean(credited, mask)
    assert position.tolist() == [[7.5, 0, 7], [5.5, 2, 0], [3, 0, 0]]
    batch = credit.batch_mean(credited, mask)
    assert batch[:, 0].tolist() == pytest.approx([22 / 3, 13 / 3, 15 / 4], abs=1e-14)
    group = credit.group_mean(credited, mask, torch.tensor([4, 9, 4]))
    assert group.tolist() == [[10, 0, 10], [0, 0, 0], [1.5, 0, 0]]


@given(responses(), st.integers(0, 2**31))
def test_baselines_agree_with_the_transcription(case: tuple[Tensor, Tensor], seed: int) -> None:
    credited, mask = case
    group = torch.randint(2, credited.shape[:1], generator=torch.Generator().manual_seed(seed))
    pairs = (
        (credit.position_mean(credited, mask), ref.position_mean(credited, mask)),
        (credit.batch_mean(credited, mask), ref.batch_mean(credited, mask)),
        (credit.group_mean(credited, mask, group), ref.group_mean(credited, mask, group)),
    )
    for got, expected in pairs:
        assert np.allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "baseline",
    [
        credit.position_mean,
        credit.batch_mean,
        partial(credit.group_mean, group=torch.tensor([0, 0, 0])),
    ],
)
def test_a_response_does_not_move_its_own_baseline(baseline: Callable[..., Tensor]) -> None:
    credited = torch.randn(3, 6, generator=torch.Generator().manual_seed(10), dtype=F64)
    mask = torch.arange(6) < torch.tensor([[6], [4], [5]])
    moved = credited.clone()
    moved[1] += 100.0
    before, after = baseline(credited, mask), baseline(moved, mask)
    assert torch.allclose(before[1], after[1], rtol=0, atol=1e-12)
    assert (before[0] - after[0]).abs().max() > 1


def test_a_response_without_company_has_no_baseline() -> None:
    credited, mask = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
    group = torch.tensor([0])
    for baseline in (
        credit.position_mean(credited, mask),
        credit.batch_mean(credited, mask),
        credit.group_mean(credited, mask, group),
    ):
        assert baseline.tolist() == [[0.0, 0.0, 0.0]]

from __future__ import annotations

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


@given(responses(), st.floats(0, 1))
def test_credit_agrees_with_the_transcription(case: tuple[Tensor, Tensor], gamma: float) -> None:
    reward, mask = case
    returned = credit.return_to_go(reward, mask)
    discounted = credit.discounted(reward, mask, gamma=gamma, meaning="task")
    for b in range(reward.shape[0]):
        rows = reward[b].numpy(), mask[b].numpy()
        assert np.allclose(returned[b], ref.return_to_go(*rows), rtol=0, atol=1e-12)
        expected = ref.discounted(*rows, gamma=gamma)
        assert np.allclose(discounted[b], expected, rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_a_discount_outside_the_unit_interval_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        credit.discounted(
            torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), gamma=gamma, meaning="task"
        )


def test_a_discount_must_say_what_it_means() -> None:
    with pytest.raises(ValueError, match="must say what it means: one of task"):
        credit.discounted(
            torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), gamma=0.5, meaning="because"
        )


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

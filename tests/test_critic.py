from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.critic import (
    BINS,
    Critic,
    CriticSettings,
    ValueHead,
    _held_back,
    critic_targets,
    explained_variance,
    value_loss,
)
from opd.types import Stat, add_stats
from tests.reference import credit as ref

F64 = torch.float64

# A chain of four states, each visited in turn; what a response costs from there on, in nats.
CHAIN_COSTS = torch.tensor([3.0, 1.0, 4.0, 2.0])
CHAIN_VALUES = torch.tensor([-10.0, -7.0, -6.0, -2.0])


def chain(responses: int, *, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (one-hot), targets and places of responses that walk the chain to its end."""
    draw = torch.Generator().manual_seed(seed)
    costs = CHAIN_COSTS + noise * torch.randn(responses, 4, generator=draw)
    mask = torch.ones(responses, 4, dtype=torch.bool)
    targets = critic_targets(costs, torch.zeros(responses), mask)
    hidden = torch.eye(4).repeat(responses, 1)
    return hidden, targets.flatten(), torch.linspace(0, 1, 4).repeat(responses)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fitted(settings: CriticSettings, steps: int, **rows: Any) -> tuple[Critic, dict[str, Stat]]:
    critic, draw, stats = Critic(4, settings, generator=generator()), generator(1), {}
    for step in range(steps):
        stats = critic.fit(*chain(16, seed=step, **rows), draw)
    return critic, stats


# --------------------------------------------------------------------------------------------
# Targets


def test_targets_by_hand_with_a_gap_an_end_and_a_cut() -> None:
    reverse_kl = torch.tensor([[1.0, 99.0, 2.0], [4.0, 5.0, math.nan]], dtype=F64)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    bootstrap = torch.tensor([0.0, -100.0], dtype=F64)
    targets = critic_targets(reverse_kl, bootstrap, mask)
    assert targets.tolist() == [[-3.0, 0.0, -2.0], [-109.0, -105.0, 0.0]]
    # At gamma 1/2 what comes l tokens later counts 2^-l: -1 - 2/2; -4 - 5/2 - 100/4, -5 - 100/2.
    halved = critic_targets(reverse_kl, bootstrap, mask, gamma=0.5)
    assert halved.tolist() == [[-2.0, 0.0, -2.0], [-31.5, -55.0, 0.0]]


def test_targets_are_the_returns_of_expected_rewards() -> None:
    reverse_kl = torch.rand(3, 9, generator=generator(2), dtype=F64)
    mask = torch.rand(3, 9, generator=generator(3)) < 0.7
    got = critic_targets(reverse_kl, torch.zeros(3, dtype=F64), mask)
    for b in range(3):
        expected = ref.return_to_go(-reverse_kl[b], mask[b])
        assert got[b].tolist() == pytest.approx(list(expected), abs=1e-13)


def test_targets_carry_no_gradient() -> None:
    reverse_kl = torch.rand(1, 3, requires_grad=True)
    bootstrap = torch.zeros(1, requires_grad=True)
    assert not critic_targets(reverse_kl, bootstrap, torch.ones(1, 3).bool()).requires_grad


# --------------------------------------------------------------------------------------------
# Head


@pytest.mark.parametrize("hidden_units", [0, 8])
def test_a_fresh_head_says_exactly_zero(hidden_units: int) -> None:
    head = ValueHead(5, hidden_units, generator=generator())
    assert head(torch.randn(7, 5, generator=generator())).tolist() == [0.0] * 7


def test_no_gradient_reaches_the_student() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    critic, _ = fitted(CriticSettings(), steps=1)
    assert critic.head(hidden).requires_grad
    (nothing,) = torch.autograd.grad(critic.head(hidden).sum(), hidden, allow_unused=True)
    assert nothing is None
    assert not critic.values(hidden).requires_grad


def test_values_of_half_precision_states_are_float32() -> None:
    critic, _ = fitted(CriticSettings(), steps=1)
    assert critic.values(torch.eye(4, dtype=torch.bfloat16)).dtype == torch.float32


def test_values_do_not_depend_on_how_many_rows_are_read_at_once() -> None:
    hidden = torch.randn(50, 4, generator=generator())
    small, _ = fitted(CriticSettings(rows_per_update=7), steps=3)
    large = Critic(4, CriticSettings(rows_per_update=1000))
    large.load_state_dict(small.state_dict())
    assert torch.allclose(small.values(hidden), large.values(hidden), rtol=1e-6, atol=1e-6)


def test_a_response_that_ended_has_no_value_after_its_end() -> None:
    critic, _ = fitted(CriticSettings(), steps=3)
    hidden = torch.eye(4)[:2].clone()
    hidden[0] = math.nan
    after = critic.bootstrap(hidden, torch.tensor([False, True]))
    assert after[0] == 0.0
    assert after[1] == critic.values(hidden)[1]
    assert after[1] != 0.0


# --------------------------------------------------------------------------------------------
# Loss


def test_the_loss_by_hand() -> None:
    values = torch.tensor([1.0, 5.0, 5.0, -5.0])
    targets = torch.tensor([4.0, 9.0, 2.0, 9.0])
    old = torch.zeros(4)
    plain = value_loss(values, old, targets, clip_nats=None)
    assert plain.tolist() == [4.5, 8.0, 4.5, 98.0]
    # Clipped at 3 the second is judged at 3, (3 - 9)^2 / 2; the third would be better at 3 and
    # the last moved away: both keep their own error.
    clipped = value_loss(values, old, targets, clip_nats=3.0)
    assert clipped.tolist() == [4.5, 18.0, 4.5, 98.0]


def test_a_value_that_moved_far_enough_is_taught_no_further_and_counted() -> None:
    values = torch.tensor([1.0, 5.0, 5.0, -5.0], requires_grad=True)
    targets = torch.tensor([4.0, 9.0, 2.0, 9.0])
    old = torch.zeros(4)
    torch.autograd.backward(value_loss(values, old, targets, clip_nats=3.0).sum())
    assert values.grad is not None
    assert values.grad.tolist() == [-3.0, 0.0, 3.0, -14.0]
    held = _held_back(values, old, targets, clip_nats=3.0)
    assert held.tolist() == [False, True, False, False]
    assert not _held_back(values, old, targets, clip_nats=None).any()


def test_the_gradient_of_the_loss_matches_finite_differences() -> None:
    values, old, targets = torch.randn(3, 40, generator=generator(4), dtype=F64)
    values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda moved: value_loss(moved, old, targets, clip_nats=0.5), (values,), eps=1e-7
    )


@pytest.mark.parametrize("clip_nats", [0.0, -1.0, math.nan])
def test_a_limit_that_is_not_positive_is_refused(clip_nats: float) -> None:
    with pytest.raises(
        ValueError, match=r"critic\.clip_nats must be > 0, got .*\(None\) for no limit"
    ):
        value_loss(*torch.zeros(3, 2), clip_nats=clip_nats)
    with pytest.raises(ValueError, match=r"critic\.clip_nats must be > 0"):
        CriticSettings(clip_nats=clip_nats)


# --------------------------------------------------------------------------------------------
# Learning


@pytest.mark.parametrize("hidden_units", [0, 16])
def test_a_known_value_function_is_learned(hidden_units: int) -> None:
    settings = CriticSettings(hidden_units, learning_rate=0.02, updates_per_step=20)
    critic, stats = fitted(settings, steps=60)
    assert torch.allclose(critic.values(torch.eye(4)), CHAIN_VALUES, rtol=0, atol=0.05)
    assert explained_variance(stats) > 0.999


def test_noisy_targets_are_averaged() -> None:
    settings = CriticSettings(learning_rate=0.01, updates_per_step=10, replay_steps=10)
    critic, stats = fitted(settings, steps=80, noise=2.0)
    # 160 draws of a sum of at most four costs, each with deviation 2: 4 / sqrt(160) = 0.3.
    assert torch.allclose(critic.values(torch.eye(4)), CHAIN_VALUES, rtol=0, atol=1.2)
    # Var(value) is 8.2 over the states; the noise of the four targets averages 10.
    assert 0.1 < explained_variance(stats) < 0.8


def test_learning_does_not_depend_on_the_scale_of_the_costs() -> None:
    small, large = (Critic(4, CriticSettings()) for _ in range(2))
    for critic, scale, draw in ((small, 1.0, generator()), (large, 2.0**12, generator())):
        for step in range(5):
            hidden, targets, place = chain(8, seed=step)
            critic.fit(hidden, scale * targets, place, draw)
    states = torch.eye(4)
    assert torch.allclose(2.0**12 * small.values(states), large.values(states), rtol=1e-4)


def test_costs_that_are_all_zero_teach_zero_and_leave_the_scale_open() -> None:
    critic = Critic(4, CriticSettings())
    hidden, targets, place = chain(4)
    stats = critic.fit(hidden, torch.zeros_like(targets), place, generator())
    assert critic.values(hidden).tolist() == [0.0] * 16
    assert math.isnan(explained_variance(stats))
    critic.fit(hidden, targets, place, generator())
    assert float(critic.head.unit) == pytest.approx(float(targets.square().mean().sqrt()))


def test_the_first_steps_are_the_critics_alone() -> None:
    critic = Critic(4, CriticSettings(warmup_steps=2))
    seen = []
    for _ in range(4):
        seen.append(critic.warming_up)
        critic.fit(*chain(2), generator())
    assert seen == [True, True, False, False]
    assert not Critic(4, CriticSettings()).warming_up


def test_values_move_by_the_limit_and_little_more() -> None:
    many = {"learning_rate": 0.001, "updates_per_step": 200}
    free, _ = fitted(CriticSettings(**many), steps=1)  # type: ignore[arg-type]
    held, stats = fitted(CriticSettings(**many, clip_nats=0.5), steps=1)  # type: ignore[arg-type]
    states = torch.eye(4)
    assert free.values(states).abs().max() > 5.0
    # Every update moves a value by some hundredths, and Adam's momentum lasts for about ten.
    assert 0.4 < held.values(states).abs().max() < 1.0
    assert stats["critic/clip_share"].mean > 0.3


def test_remembered_steps_are_bounded_and_taught_again() -> None:
    settings = CriticSettings(replay_steps=2, updates_per_step=1)
    critic, stats = fitted(settings, steps=5)
    assert len(critic.replay) == 2
    # Each update takes this step's 64 rows and those of the two remembered ones.
    assert stats["critic/loss"].count == 3 * 64
    without, stats = fitted(CriticSettings(updates_per_step=1), steps=5)
    assert len(without.replay) == 0
    assert stats["critic/loss"].count == 64


def test_an_update_takes_no_more_rows_than_it_may() -> None:
    _, stats = fitted(CriticSettings(rows_per_update=10, updates_per_step=3), steps=1)
    assert stats["critic/loss"].count == 30


def test_a_step_without_rows_counts_as_a_step() -> None:
    critic = Critic(4, CriticSettings(warmup_steps=1))
    assert critic.fit(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), generator()) == {}
    assert not critic.warming_up


# --------------------------------------------------------------------------------------------
# What is logged


def test_what_is_logged_by_hand_before_anything_is_learned() -> None:
    critic = Critic(4, CriticSettings(updates_per_step=1))
    stats = critic.fit(*chain(3), generator())
    # Three responses with targets -10, -7, -6, -2, against values of 0.
    assert stats["critic/value"] == Stat(0.0, 12)
    assert stats["critic/target"] == stats["critic/residual"] == Stat(-75.0, 12)
    assert stats["critic/target_square"] == Stat(3 * (100 + 49 + 36 + 4), 12)
    assert explained_variance(stats) == 0.0
    assert stats["critic/loss"].mean == pytest.approx(0.5 * 189 / 4)
    bins = [stats[f"critic/residual/bin_{index}"] for index in range(BINS)]
    # Places 0, 1/3, 2/3 and 1 fall into eighths 0, 2, 5 and 7.
    expected = {0: -30.0, 2: -21.0, 5: -18.0, 7: -6.0}
    assert bins == [Stat(expected.get(i, 0.0), 3 if i in expected else 0) for i in range(BINS)]


def test_explained_variance_of_parts_is_that_of_the_whole() -> None:
    critic, _ = fitted(CriticSettings(), steps=3)
    rows = chain(6, noise=1.0, seed=9)
    whole = copy_of(critic).fit(*rows, generator())
    hidden, targets, place = rows
    first = copy_of(critic).fit(hidden[:5], targets[:5], place[:5], generator())
    second = copy_of(critic).fit(hidden[5:], targets[5:], place[5:], generator())
    joint = explained_variance(add_stats([first, second]))
    assert joint == pytest.approx(explained_variance(whole), abs=1e-9)
    residual = targets - critic.values(hidden)
    expected = 1 - float(residual.var(unbiased=False) / targets.var(unbiased=False))
    assert joint == pytest.approx(expected, abs=1e-5)


def copy_of(critic: Critic) -> Critic:
    other = Critic(4, critic.settings)
    other.load_state_dict(critic.state_dict())
    return other


# --------------------------------------------------------------------------------------------
# Resuming


def test_a_loaded_critic_goes_on_bit_for_bit() -> None:
    settings = CriticSettings(
        hidden_units=8, replay_steps=3, rows_per_update=20, warmup_steps=5, clip_nats=1.0
    )
    critic = Critic(4, settings, generator=generator())
    draw = generator(5)
    for step in range(4):
        critic.fit(*chain(16, noise=1.0, seed=step), draw)
    file = io.BytesIO()
    torch.save({"critic": critic.state_dict(), "draw": draw.get_state()}, file)

    def go_on(critic: Critic, draw: torch.Generator) -> list[dict[str, Stat]]:
        return [critic.fit(*chain(16, noise=1.0, seed=step), draw) for step in range(4, 8)]

    through = go_on(critic, draw)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, draw = Critic(4, settings, generator=generator(99)), torch.Generator()
    resumed.load_state_dict(saved["critic"])
    draw.set_state(saved["draw"])
    assert resumed.warming_up
    assert go_on(resumed, draw) == through
    states = torch.randn(10, 4, generator=generator(6))
    assert torch.equal(resumed.values(states), critic.values(states))


def test_a_state_that_was_taken_does_not_change_afterwards() -> None:
    critic, _ = fitted(CriticSettings(replay_steps=1), steps=2)
    state = critic.state_dict()
    before = copy_of(critic).values(torch.eye(4))
    other = copy_of(critic)
    other.load_state_dict(state)
    for learner in (critic, other):
        learner.fit(*chain(4, seed=7), generator())
    restored = Critic(4, critic.settings)
    restored.load_state_dict(state)
    assert torch.equal(restored.values(torch.eye(4)), before)
    assert restored.optimizer.state_dict()["state"][0]["step"] == 8  # two steps of four updates


def test_the_same_generators_give_the_same_critic() -> None:
    settings = CriticSettings(hidden_units=8, rows_per_update=5)
    states = torch.randn(10, 4, generator=generator(6))
    torch.manual_seed(1)
    first, _ = fitted(settings, steps=3)
    torch.manual_seed(2)
    second, _ = fitted(settings, steps=3)
    assert torch.equal(first.values(states), second.values(states))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("hidden_units", -1),
        ("updates_per_step", 0),
        ("rows_per_update", 0),
        ("warmup_steps", -1),
        ("replay_steps", -1),
        ("learning_rate", 0.0),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"critic\.{name} must be .*, got {bad}"):
        CriticSettings(**{name: bad})  # type: ignore[arg-type]

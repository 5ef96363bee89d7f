"""The bias table: what each credit, baseline and importance weight is unbiased for, exactly.

Every claim is about the library's own path (signal phase, head, reduction), on trees with and
without an end token and on chains that mix fast, slowly and not at all. Of variances nothing is
claimed: a baseline changes no expectation, and what it does to the variance depends on the world.

Source: arXiv:2606.22793, sections 4.2 and 4.3 and its appendices A to C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.audit import (
    World,
    compare,
    lag_gradient,
    local_gradient,
    random_tree,
    sequence_reverse_kl_gradient,
    value,
    visits,
)
from opd.formula import credit, divergence, reward, surrogate
from opd.objective import Dense, Sampled
from tests.audit.worlds import TREES, WORLDS, close, descends, moments, token_gradient

RATIO = reward.teacher_log_ratio

# Per credit function the weight with which a reward `lag` tokens later counts.
LAG_WEIGHTS: dict[str, tuple[Callable[..., Tensor], Callable[[int], float]]] = {
    "immediate": (credit.immediate, lambda lag: float(lag == 0)),
    "return_to_go": (credit.return_to_go, lambda lag: 1.0),
    "discounted, gamma 0": (
        partial(credit.discounted, gamma=0.0, meaning="task"),
        lambda lag: float(lag == 0),
    ),
    "discounted, gamma 0.7": (
        partial(credit.discounted, gamma=0.7, meaning="teacher_reliability"),
        lambda lag: 0.7**lag,
    ),
    "discounted, gamma 1": (
        partial(credit.discounted, gamma=1.0, meaning="task"),
        lambda lag: 1.0,
    ),
    "window of 1": (partial(credit.windowed, window=1), lambda lag: float(lag < 1)),
    "window of 2": (partial(credit.windowed, window=2), lambda lag: float(lag < 2)),
    "window of 3": (partial(credit.windowed, window=3), lambda lag: float(lag < 3)),
    "window of 9": (partial(credit.windowed, window=9), lambda lag: 1.0),
    "rao_blackwell": (credit.rao_blackwell, lambda lag: 1.0),
    "next_step": (credit.next_step, lambda lag: float(lag < 2)),
    "future": (credit.future, lambda lag: float(lag > 0)),
    "damped_future, w 0": (
        partial(credit.damped_future, future_weight=0.0),
        lambda lag: float(lag == 0),
    ),
    "damped_future, w 0.4": (
        partial(credit.damped_future, future_weight=0.4),
        lambda lag: 1.0 if lag == 0 else 0.4,
    ),
    "damped_future, w 1": (partial(credit.damped_future, future_weight=1.0), lambda lag: 1.0),
}
SEQUENCE = {name for name, (_, weight) in LAG_WEIGHTS.items() if all(map(weight, range(5)))}
SEQUENCE -= {"discounted, gamma 0.7", "damped_future, w 0.4"}
LOCAL = {"immediate", "discounted, gamma 0", "window of 1", "damped_future, w 0"}


def weighted_lags(world: World, weight: Callable[[int], float]) -> Tensor:
    parts = [weight(lag) * lag_gradient(world, lag) for lag in range(world.horizon)]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("function", LAG_WEIGHTS)
def test_credit_weighs_each_reward_by_how_much_later_it_comes(function: str, name: str) -> None:
    world = WORLDS[name]
    used, weight = LAG_WEIGHTS[function]
    found = descends(world, Sampled(RATIO, credit=used))
    assert close(found, weighted_lags(world, weight))
    whole = sequence_reverse_kl_gradient(world)
    local = local_gradient(world, divergence.reverse_kl)
    assert close(found, whole) == (function in SEQUENCE)
    assert close(found, local) == (function in LOCAL)


@pytest.mark.parametrize("name", TREES)
def test_what_leaves_the_future_out_is_far_from_the_sequences_gradient(name: str) -> None:
    world = WORLDS[name]
    whole = sequence_reverse_kl_gradient(world)
    for function in ("immediate", "discounted, gamma 0.7", "window of 2", "next_step"):
        found = descends(world, Sampled(RATIO, credit=LAG_WEIGHTS[function][0]))
        assert compare(found, whole).relative_error > 0.03, function


def test_gamma_zero_and_one_are_immediate_and_return_to_go_bit_for_bit() -> None:
    for name in TREES:
        for gamma, other in ((0.0, credit.immediate), (1.0, credit.return_to_go)):
            used = partial(credit.discounted, gamma=gamma, meaning="task")
            one, two = (
                moments(WORLDS[name], Sampled(RATIO, credit=credits_used))
                for credits_used in (used, other)
            )
            assert torch.equal(one.gradient, two.gradient)
            assert one.variance == two.variance


@pytest.mark.parametrize("name", WORLDS)
def test_length_normalised_is_the_mean_of_what_remains(name: str) -> None:
    world = WORLDS[name]
    found = descends(world, Sampled(RATIO, credit=credit.length_normalised))
    if "end" in name:
        # how many tokens remain is part of the future; the literal loop of test_oracle checks it
        assert not close(found, sequence_reverse_kl_gradient(world), bound=0.03)
        return
    # at token t the weight is 1 / (T - t) for every lag: only the rewards of that time differ
    reached, student = visits(world), world.student_logits.log_softmax(-1).exp()
    ratio = world.views["teacher"].log_softmax(-1) - world.student_logits.log_softmax(-1)
    later = value(world)
    weight = torch.zeros_like(student)
    for t in range(world.horizon):
        after = later[t + 1] if t + 1 < world.horizon else torch.zeros_like(later[0])
        earned = ratio + after[world.next_state.clamp(min=0)]
        weight += reached[t][:, None] * earned / (world.horizon - t)
    # sum_v weight(v) student(v) * score(v), with minus its mean for the softmax
    pushed = student * (weight - (student * weight).sum(-1, keepdim=True))
    assert close(found, -pushed)


@pytest.mark.parametrize("name", ["tree", "tree with an end", "slow chain with an end"])
def test_the_whole_reward_at_every_token_is_unbiased_too(name: str) -> None:
    def whole_reward(
        reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        total = torch.where(mask, reward, 0.0).sum(1, keepdim=True)
        return torch.where(mask, total, 0.0)

    found = descends(WORLDS[name], Sampled(RATIO, credit=whole_reward))
    assert close(found, sequence_reverse_kl_gradient(WORLDS[name]))


@pytest.mark.parametrize("name", ["tree", "tree with an end", "absorbing chain with an end"])
def test_length_neutral_future_takes_the_price_of_length_out(name: str) -> None:
    # Two things move when it is compared with the sequence's gradient: m times the gradient of
    # the expected length, and the correlation of m with the response that it is the mean of. Over
    # a world of constant divergence the mean is a constant, so only the first is left.
    world = WORLDS[name]
    level = world.with_view(shifted_by(world, 0.5))
    found = descends(level, Sampled(RATIO, credit=partial(neutral, future_weight=1.0)))
    assert close(found, local_gradient(level, divergence.reverse_kl))


neutral = credit.length_neutral_future


def shifted_by(world: World, nats: float) -> Tensor:
    """Teacher logits at the same reverse KL from every state's student."""
    direction = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    student = world.student_logits.log_softmax(-1)
    low, high = torch.zeros(len(student)).double(), torch.full((len(student),), 50.0).double()
    for _ in range(200):
        middle = (low + high) / 2
        teacher = (student + middle[:, None] * direction).log_softmax(-1)
        too_far = (student.exp() * (student - teacher)).sum(-1) > nats
        low, high = torch.where(too_far, low, middle), torch.where(too_far, middle, high)
    return student + low[:, None] * direction


# --------------------------------------------------------------------------------------------
# Generalised advantages


def wrong(values: Tensor) -> Tensor:
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).double()
    return values + 0.7 * noise


LAMBDAS = (0.0, 0.5, 0.95, 1.0)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("gae_lambda", LAMBDAS)
def test_gae_with_the_exact_value_is_unbiased_at_every_lambda(name: str, gae_lambda: float) -> None:
    world = WORLDS[name]
    term = Sampled(RATIO, credit=partial(credit.gae, gae_lambda=gae_lambda))
    found = descends(world, term, critic=value(world))
    assert close(found, sequence_reverse_kl_gradient(world))


@pytest.mark.parametrize("name", WORLDS)
def test_gae_with_a_wrong_value_is_unbiased_at_lambda_one_only(name: str) -> None:
    world = WORLDS[name]
    target, critic = sequence_reverse_kl_gradient(world), wrong(value(world))
    errors = []
    for gae_lambda in LAMBDAS:
        term = Sampled(RATIO, credit=partial(credit.gae, gae_lambda=gae_lambda))
        errors.append(compare(descends(world, term, critic=critic), target).relative_error)
    assert errors[3] < 1e-10
    assert min(errors[:3]) > 1e-3, errors


@pytest.mark.parametrize("name", ["tree", "tree with an end", "slow chain", "absorbing chain"])
@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_the_bias_of_gae_is_that_of_its_residuals(name: str, gamma: float) -> None:
    world = WORLDS[name]
    critic = wrong(value(world, gamma=gamma))
    ratio = world.views["teacher"].log_softmax(-1) - world.student_logits.log_softmax(-1)
    after = torch.cat([critic[1:], torch.zeros_like(critic[:1])])
    following = torch.where(world.next_state < 0, 0.0, after[:, world.next_state.clamp(min=0)])
    residual = ratio + gamma * following - critic[:, :, None]
    for gae_lambda in (0.0, 0.5, 1.0):
        decay = gamma * gae_lambda
        target = torch.stack(
            [decay**lag * lag_gradient(world, lag, reward=residual) for lag in range(world.horizon)]
        ).sum(0)
        used = partial(credit.gae, gae_lambda=gae_lambda, gamma=gamma, meaning="task")
        assert close(descends(world, Sampled(RATIO, credit=used), critic=critic), target)


@pytest.mark.parametrize("name", ["tree", "tree with an end", "fast chain"])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_gae_with_a_discount_and_its_own_exact_value_descends_the_discounted_objective(
    name: str, gae_lambda: float
) -> None:
    world = WORLDS[name]
    used = partial(credit.gae, gae_lambda=gae_lambda, gamma=0.7, meaning="task")
    found = descends(world, Sampled(RATIO, credit=used), critic=value(world, gamma=0.7))
    assert close(found, weighted_lags(world, lambda lag: 0.7**lag))
    assert compare(found, sequence_reverse_kl_gradient(world)).relative_error > 1e-2


# --------------------------------------------------------------------------------------------
# Baselines


def arbitrary(
    position: Int[Tensor, "*n"], teacher_entropy: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """A function of the prefix alone, and of nothing else."""
    return 3.0 * position.double() - 7.0 * teacher_entropy + 0.5


OF_THE_STATE = {
    "expected_reward": credit.expected_reward,
    "value": credit.value,
    "arbitrary": arbitrary,
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("baseline", OF_THE_STATE)
def test_a_baseline_of_the_state_changes_no_expectation(
    baseline: str, name: str, record_property: Callable[[str, object], None]
) -> None:
    world = WORLDS[name]
    critic = wrong(value(world))
    for used in (credit.immediate, credit.return_to_go, credit.rao_blackwell):
        plain = moments(world, Sampled(RATIO, credit=used))
        term = Sampled(RATIO, credit=used, baseline=OF_THE_STATE[baseline])
        with_baseline = moments(world, term, critic=critic)
        change = (with_baseline.gradient - plain.gradient).abs().max()
        assert float(change) < 1e-12
        variances = (plain.variance, with_baseline.variance)
        record_property(f"variance {used.__name__}", variances)
        assert variances[0] != variances[1], "the baseline did nothing at all"


def own_mean(credited: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The mean over the step with the response's own tokens in it: not a baseline."""
    mean = torch.where(mask, credited, 0.0).sum() / mask.sum()
    return torch.where(mask, mean, 0.0)


SMALL = {
    "two letters": (random_tree(1, vocab_size=2, horizon=2), 2),
    "three letters with an end": (random_tree(2, vocab_size=3, horizon=2, end_id=0), 2),
    "steps of three": (random_tree(3, vocab_size=2, horizon=3, end_id=1), 3),
}
"""Worlds whose tuples of responses are few, and how many responses make a step."""


@pytest.mark.parametrize("name", SMALL)
def test_leave_one_out_baselines_change_no_expectation(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    world, samples = SMALL[name]

    def of(baseline: Callable[..., Tensor] | None) -> tuple[Tensor, float]:
        term = Sampled(RATIO, credit=credit.return_to_go, baseline=baseline)
        found = moments(world, term, samples=samples)
        return found.gradient, found.variance

    plain, variance = of(None)
    assert close(plain, sequence_reverse_kl_gradient(world))
    for baseline in (credit.position_mean, credit.batch_mean, credit.group_mean):
        gradient, changed = of(baseline)
        assert float((gradient - plain).abs().max()) < 1e-12
        record_property(f"variance {baseline.__name__}", (variance, changed))
        assert variance != changed, "the baseline did nothing at all"
    assert compare(of(own_mean)[0], plain).relative_error > 1e-2


# --------------------------------------------------------------------------------------------
# Local and future parts


@pytest.mark.parametrize("name", WORLDS)
def test_an_exact_local_term_and_future_credit_make_the_sequences_gradient(name: str) -> None:
    world = WORLDS[name]
    whole = sequence_reverse_kl_gradient(world)
    local = Dense(divergence.reverse_kl)
    for rewarded in (reward.expected_log_ratio, RATIO):
        ahead = Sampled(rewarded, credit=credit.future, name="future")
        assert close(descends(world, local, ahead), whole)
    alone = descends(world, Sampled(reward.expected_log_ratio, credit=credit.future))
    assert close(alone, whole - local_gradient(world, divergence.reverse_kl))


@pytest.mark.parametrize("name", TREES)
def test_an_expected_reward_moves_nothing_at_its_own_token(name: str) -> None:
    assert float(descends(WORLDS[name], Sampled(reward.expected_log_ratio)).abs().max()) < 1e-14


@pytest.mark.parametrize("name", TREES)
def test_a_cost_per_token_descends_the_expected_length(name: str) -> None:
    world = WORLDS[name]
    found = descends(world, Sampled(reward.length_cost, credit=credit.return_to_go))
    cost = -torch.ones(world.horizon, *world.student_logits.shape, dtype=torch.float64)
    exact = torch.stack(
        [lag_gradient(world, lag, reward=cost) for lag in range(world.horizon)]
    ).sum(0)
    if "end" in name:
        assert close(found, exact)
        assert float(exact.norm()) > 1e-2
    else:
        assert float(found.abs().max()) < 1e-14, "no response can stop"


@pytest.mark.parametrize("name", ["tree", "tree with an end", "absorbing chain with an end"])
def test_nothing_is_left_to_credit_where_the_student_is_the_teacher(name: str) -> None:
    world = WORLDS[name]
    same = world.with_view(world.student_logits)
    for used, _ in LAG_WEIGHTS.values():
        found = moments(same, Sampled(RATIO, credit=used))
        assert not found.gradient.any()
        assert found.variance == 0.0
    term = Sampled(RATIO, credit=partial(credit.gae, gae_lambda=0.5))
    assert not descends(same, term, critic=value(same)).any()


# --------------------------------------------------------------------------------------------
# Another policy wrote the responses


def behaviour_of(world: World) -> Tensor:
    """Logits of another policy, half way between the student and something else."""
    draw = torch.Generator().manual_seed(11)
    noise = torch.randn(world.student_logits.shape, generator=draw, dtype=torch.float64)
    return 0.5 * world.student_logits + noise


def log_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    return teacher - student


@pytest.mark.parametrize("name", WORLDS)
def test_a_token_ratio_is_exact_at_the_prefixes_of_the_policy_that_wrote(name: str) -> None:
    world = WORLDS[name]
    other = behaviour_of(world)
    found = descends(world, Sampled(RATIO, surrogate=surrogate.importance), behaviour=other)
    assert close(found, local_gradient(world, divergence.reverse_kl, behaviour=other))
    assert not close(found, local_gradient(world, divergence.reverse_kl), bound=1e-2)
    uncorrected = descends(world, Sampled(RATIO), behaviour=other)
    assert close(uncorrected, token_gradient(world, log_ratio, behaviour=other))
    assert not close(uncorrected, found, bound=1e-2)


@pytest.mark.parametrize("name", WORLDS)
def test_a_cached_reward_also_pushes_the_student_away_from_the_old_policy(name: str) -> None:
    world = WORLDS[name]
    other = behaviour_of(world)
    term = Sampled(reward.cached_log_ratio, surrogate=surrogate.importance)
    found = descends(world, term, behaviour=other)
    to_teacher = local_gradient(world, divergence.reverse_kl, behaviour=other)
    old = world.with_view(other, name="teacher")
    from_old = local_gradient(old, divergence.reverse_kl, behaviour=other)
    assert close(found, to_teacher - from_old)
    assert compare(found, to_teacher).relative_error > 1e-2
    fresh = descends(world, Sampled(reward.cached_log_ratio))
    assert close(fresh, descends(world, Sampled(RATIO)))


@pytest.mark.parametrize("name", TREES)
def test_truncated_and_masked_weights_drop_what_they_say(name: str) -> None:
    world = WORLDS[name]
    other = behaviour_of(world)
    old = other.log_softmax(-1)

    def ratio(student: Tensor) -> Tensor:
        return (student - old).exp()

    truncated = Sampled(RATIO, surrogate=partial(surrogate.truncated_importance, cap=1.2))
    expected = token_gradient(
        world,
        lambda student, teacher: ratio(student).clamp(max=1.2) * (teacher - student),
        behaviour=other,
    )
    assert close(descends(world, truncated, behaviour=other), expected)
    masked = Sampled(RATIO, surrogate=partial(surrogate.masked_importance, low=0.6, high=1.5))

    def dropped(student: Tensor, teacher: Tensor) -> Tensor:
        weight = ratio(student)
        return torch.where((weight < 0.6) | (weight > 1.5), weight * (teacher - student), 0.0)

    left_out = token_gradient(world, dropped, behaviour=other)
    found = descends(world, masked, behaviour=other)
    exact = local_gradient(world, divergence.reverse_kl, behaviour=other)
    assert close(found, exact - left_out)
    assert compare(found, exact).relative_error > 1e-2
    wide = Sampled(RATIO, surrogate=partial(surrogate.masked_importance, low=0.0, high=1e9))
    assert close(descends(world, wide, behaviour=other), exact)


@pytest.mark.parametrize("name", TREES)
def test_clipping_drops_the_tokens_that_left_the_range_the_way_they_are_pushed(name: str) -> None:
    world = WORLDS[name]
    other = behaviour_of(world)
    old = other.log_softmax(-1)

    def kept(student: Tensor, teacher: Tensor, *, cap: float = math.inf) -> Tensor:
        ratio, pushed = (student - old).exp(), teacher - student
        held = ((pushed > 0) & (ratio > 1.3)) | ((pushed < 0) & (ratio < 0.8))
        held |= (pushed < 0) & (ratio > cap)
        return torch.where(held, 0.0, ratio * pushed)

    clipped = Sampled(RATIO, surrogate=partial(surrogate.clipped, low=0.2, high=0.3))
    found = descends(world, clipped, behaviour=other)
    assert close(found, token_gradient(world, kept, behaviour=other))
    twice = partial(surrogate.dual_clipped, low=0.2, high=0.3, negative_cap=1.5)
    found_twice = descends(world, Sampled(RATIO, surrogate=twice), behaviour=other)
    assert close(found_twice, token_gradient(world, partial(kept, cap=1.5), behaviour=other))
    assert not close(found, found_twice, bound=1e-4)


@pytest.mark.parametrize("name", TREES)
def test_on_its_own_text_every_ratio_surrogate_is_the_score(name: str) -> None:
    world = WORLDS[name]
    plain = descends(world, Sampled(RATIO))
    for used in (
        surrogate.importance,
        partial(surrogate.clipped, low=0.2, high=0.2),
        partial(surrogate.dual_clipped, low=0.2, high=0.2, negative_cap=3.0),
        partial(surrogate.truncated_importance, cap=1.0),
        partial(surrogate.masked_importance, low=0.5, high=2.0),
    ):
        assert close(descends(world, Sampled(RATIO, surrogate=used)), plain)


@pytest.mark.parametrize("name", TREES)
def test_the_geometric_ratio_reweighs_the_score_by_the_teacher(name: str) -> None:
    world = WORLDS[name]

    def kept(student: Tensor, teacher: Tensor) -> Tensor:
        ratio, pushed = ((student - teacher) * 0.4).exp(), teacher - student
        held = ((pushed > 0) & (ratio > 1.3)) | ((pushed < 0) & (ratio < 0.8))
        return torch.where(held, 0.0, ratio * pushed)

    used = partial(surrogate.geometric_ratio, old_share=0.6, low=0.2, high=0.3)
    found = descends(world, Sampled(RATIO, surrogate=used))
    assert close(found, token_gradient(world, kept))
    assert not close(found, descends(world, Sampled(RATIO)), bound=1e-2)

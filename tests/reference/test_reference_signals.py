"""Rewards, credit, outcomes, weights and surrogates of the oracle against hand and identities."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from . import credit, outcomes, rewards, selection, weights
from . import divergences as dv
from . import regularisers as rg
from . import surrogates as sg
from .checks import IDENTITY_BOUND, Array, largest, logit_rows
from .divergences import log_softmax
from .enumeration import (
    bucketed_gradient,
    expected_token_gradient,
    residual_gradient,
    sampled_gradient,
)

NAN = math.nan

# --------------------------------------------------------------------------------------------
# Rewards

Reward = Callable[[Array, Array], Array]
OfRatio = Callable[[Array], Array]


def jsd_closed(w: float) -> OfRatio:
    return lambda u: (1 - w) * np.log(1 - w + w * u)


def skew_forward_closed(s: float) -> OfRatio:
    return lambda u: (1 - s) * (u / (s * u + 1 - s) - 1)


def skew_reverse_closed(s: float) -> OfRatio:
    return lambda u: np.log(s + (1 - s) * u) + s / (s + (1 - s) * u) - s


def alpha_closed(a: float) -> OfRatio:
    return lambda u: (u**a - 1) / a


# The reward, the gradient of its divergence, and the closed form in u.
POLICY_GRADIENTS: dict[str, tuple[Reward, Callable[[Array, Array], Array], OfRatio]] = {
    "reverse_kl": (rewards.teacher_log_ratio, dv.reverse_kl_gradient, np.log),
    "forward_kl": (rewards.forward_kl_reward, dv.forward_kl_gradient, lambda u: u - 1),
    "squared_hellinger": (
        rewards.squared_hellinger_reward,
        dv.squared_hellinger_gradient,
        lambda u: (np.sqrt(u) - 1) / 2,
    ),
    "total_variation": (
        rewards.total_variation_reward,
        dv.total_variation_gradient,
        lambda u: np.sign(u - 1) / 2,
    ),
}
for w in (0.1, 0.5, 0.9):
    POLICY_GRADIENTS[f"generalized_jsd {w}"] = (
        partial(rewards.generalized_jsd_reward, teacher_weight=w),
        partial(dv.generalized_jsd_gradient, teacher_weight=w),
        jsd_closed(w),
    )
    POLICY_GRADIENTS[f"skew_forward_kl {w}"] = (
        partial(rewards.skew_forward_kl_reward, skew=w),
        partial(dv.skew_forward_kl_gradient, skew=w),
        skew_forward_closed(w),
    )
    POLICY_GRADIENTS[f"skew_reverse_kl {w}"] = (
        partial(rewards.skew_reverse_kl_reward, skew=w),
        partial(dv.skew_reverse_kl_gradient, skew=w),
        skew_reverse_closed(w),
    )
for a in (-1.0, 0.3, 0.5, 2.0):
    POLICY_GRADIENTS[f"alpha_divergence {a}"] = (
        partial(rewards.alpha_divergence_reward, alpha=a),
        partial(dv.alpha_divergence_gradient, alpha=a),
        alpha_closed(a),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_a_corrected_reward_is_the_exact_policy_gradient_of_its_divergence(
    name: str, seed: int
) -> None:
    reward, gradient, closed = POLICY_GRADIENTS[name]
    logits, teacher_logits = logit_rows(seed)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    advantage = reward(teacher, student)
    mean, _ = expected_token_gradient(
        logits, lambda token: sampled_gradient(logits, token, float(advantage[token]))
    )
    assert largest(mean - gradient(student, teacher)) <= IDENTITY_BOUND
    assert advantage == pytest.approx(closed(np.exp(teacher - student)), abs=1e-12)
    assert largest(reward(student, student)) <= 1e-15


@pytest.mark.parametrize("power", [0.1, 1.0, 5.0])
def test_the_power_reward_hides_its_power_as_a_factor_of_the_learning_rate(power: float) -> None:
    logits, teacher_logits = logit_rows(1)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    advantage = rewards.power_reward(teacher, student, power=power)
    mean, _ = expected_token_gradient(
        logits, lambda token: sampled_gradient(logits, token, float(advantage[token]))
    )
    exact = dv.power_divergence_gradient(student, teacher, power=power)
    assert largest(mean - power * exact) <= IDENTITY_BOUND
    over_power = rewards.power_reward(teacher, student, power=1e-6) / 1e-6
    assert over_power == pytest.approx(rewards.teacher_log_ratio(teacher, student), abs=1e-4)


def test_without_the_correction_only_the_reverse_kl_keeps_its_direction() -> None:
    logits, teacher_logits = logit_rows(2)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)

    def naive(g: Callable[[float], float]) -> Array:
        return expected_token_gradient(
            logits,
            lambda token: sampled_gradient(
                logits, token, -g(math.exp(teacher[token] - student[token]))
            ),
        )[0]

    assert (
        largest(naive(lambda u: -math.log(u)) - dv.reverse_kl_gradient(student, teacher)) <= 1e-14
    )
    forward = naive(lambda u: u * math.log(u))
    exact = dv.forward_kl_gradient(student, teacher)
    assert float(forward @ exact) < 0


def test_rewards_have_the_values_worked_out_by_hand() -> None:
    teacher, student = np.log([0.5, 0.1, 0.2]), np.log([0.25, 0.4, 0.2])
    assert rewards.one([7, 8]).tolist() == [1, 1]
    ratio = rewards.teacher_log_ratio(teacher, student)
    assert ratio == pytest.approx([math.log(2), -math.log(4), 0])
    assert rewards.expected_log_ratio([0.5]).tolist() == [-0.5]
    clipped = rewards.clipped_log_ratio(teacher, student, low=-1.0, high=0.5)
    assert clipped == pytest.approx([0.5, -1.0, 0.0])
    floored = rewards.floored_log_ratio(teacher, student, floor_nats=-1.0)
    assert floored == pytest.approx([math.log(2), -1.0, 0.0])
    soft = rewards.soft_log_ratio(teacher, student)
    assert soft == pytest.approx([math.log(1 + math.log(2)), -math.log(1 + math.log(4)), 0.0])
    tanh = rewards.tanh_log_ratio(teacher, student, scale=2.0)
    assert tanh == pytest.approx([2 * math.tanh(math.log(2) / 2), -2 * math.tanh(math.log(2)), 0])
    sign = rewards.sign_total_variation(teacher, student, [0.3, 0.2, 0.1])
    assert sign.tolist() == pytest.approx([0.3, -0.2, 0.0])
    cached = rewards.cached_log_ratio(teacher, student)
    assert cached.tolist() == ratio.tolist()
    proximal = rewards.proximal_log_ratio(teacher, student, student, teacher_share=0.75)
    assert proximal == pytest.approx([math.log(1.75), math.log(0.75 / 4 + 0.25), 0.0])
    assert rewards.length_cost([5, 6]).tolist() == [-1, -1]
    overlong = rewards.overlong_cost(range(7), start=2, limit=6)
    assert overlong.tolist() == [0, 0, -0.25, -0.5, -0.75, -1, -1]


def test_a_proximal_teacher_bounds_the_reward_on_policy_from_below() -> None:
    worst = rewards.proximal_log_ratio(-math.inf, -1.0, -1.0, teacher_share=0.9)
    assert float(worst) == pytest.approx(math.log(0.1))


def test_verdicts_land_on_the_last_open_token_and_groups_are_standardised() -> None:
    mask = np.array([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    verdict, group = [1.0, 0.0, 1.0, NAN, 0.5], [3, 3, 3, 3, 8]
    placed = rewards.verdict_reward(verdict, mask)
    expected = np.zeros((5, 4))
    expected[0, 3], expected[4, 3] = 1.0, 0.5
    assert placed.tolist() == expected.tolist()
    # Verdicts 1, 0, 1 of group 3: mean 2/3, standard deviation sqrt(2)/3.
    standard = rewards.group_advantage(verdict, group, mask)
    root = 1 / math.sqrt(2)
    assert standard[0] == pytest.approx([root, root, 0, root])
    assert standard[1] == pytest.approx([-2 * root, -2 * root, 0, 0])
    assert not standard[2:].any()
    centred = rewards.group_advantage(verdict, group, mask, divide_by_std=False)
    assert centred[0, 0] == pytest.approx(1 / 3)
    assert not rewards.group_advantage([1.0, 1.0], [0, 0], mask[:2]).any()


# --------------------------------------------------------------------------------------------
# Credit

GAPS = [True, False, True, True, False]
REWARD = [1.0, NAN, 2.0, 4.0, NAN]
DIVERGENCE = [0.5, NAN, 0.25, 0.125, NAN]


def test_credit_has_the_values_worked_out_by_hand_and_gaps_take_no_time() -> None:
    assert credit.windowed(REWARD, GAPS, window=1).tolist() == [1, 0, 2, 4, 0]
    assert credit.windowed(REWARD, GAPS, window=2).tolist() == [3, 0, 6, 4, 0]
    assert credit.windowed(REWARD, GAPS, window=9).tolist() == [7, 0, 6, 4, 0]
    assert credit.length_normalised(REWARD, GAPS) == pytest.approx([7 / 3, 0, 3, 4, 0])
    assert credit.rao_blackwell(REWARD, DIVERGENCE, GAPS).tolist() == [0.625, 0, 1.875, 4, 0]
    assert credit.next_step(REWARD, DIVERGENCE, GAPS).tolist() == [0.75, 0, 1.875, 4, 0]
    assert credit.future(REWARD, GAPS).tolist() == [6, 0, 4, 0, 0]
    damped = credit.damped_future(REWARD, DIVERGENCE, GAPS, future_weight=0.5)
    assert damped.tolist() == [0.8125, 0, 1.9375, 4, 0]


def test_gae_has_the_values_worked_out_by_hand() -> None:
    values = [0.5, NAN, 1.0, -1.0, NAN]
    gae = partial(credit.gae, REWARD, values, 10.0, GAPS)
    # Residuals 1 + 1 - 0.5, 2 - 1 - 1, 4 + 10 + 1.
    assert gae(gae_lambda=0.0).tolist() == [1.5, 0, 0, 15, 0]
    assert gae(gae_lambda=0.5).tolist() == [1.5 + 0 + 15 / 4, 0, 15 / 2, 15, 0]
    assert gae(gae_lambda=1.0).tolist() == [16.5, 0, 15, 15, 0]
    # With gamma = 1/2 the residuals are 1, 0.5, 10 and the trace 1/4.
    quarter = gae(gae_lambda=0.5, gamma=0.5)
    assert quarter.tolist() == [1 + 0.5 / 4 + 10 / 16, 0, 0.5 + 10 / 4, 10, 0]


@pytest.mark.parametrize("gamma", [0.6, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 0.95, 1.0])
def test_gae_is_the_discounted_sum_of_one_step_residuals(gae_lambda: float, gamma: float) -> None:
    generator = np.random.default_rng(3)
    reward, values = generator.normal(size=6), generator.normal(size=6)
    mask = np.array([1, 1, 0, 1, 1, 1], bool)
    kept = [0, 1, 3, 4, 5]
    advantage = credit.gae(reward, values, 0.7, mask, gae_lambda=gae_lambda, gamma=gamma)
    following, expected = 0.0, 0.0
    for i in reversed(range(5)):
        t = kept[i]
        after = values[kept[i + 1]] if i < 4 else 0.7
        residual = reward[t] + gamma * after - values[t]
        expected = residual + gamma * gae_lambda * following
        following = expected
        assert advantage[t] == pytest.approx(expected, abs=1e-12)
    assert advantage[2] == 0.0


def test_a_length_neutral_future_does_not_charge_for_length() -> None:
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 1]], bool)
    reward = np.array([[1.0, 2, 3, NAN], [4, NAN, 5, 6]])
    flat = np.where(mask, 0.3, NAN)
    neutral = credit.length_neutral_future(reward, flat, mask, future_weight=0.7)
    assert neutral == pytest.approx(np.where(mask, reward, 0.0))
    uneven = np.array([[1.0, 1, 1, NAN], [1, NAN, 1, 4]])
    # The mean over the step is 1.5.
    assert credit.length_neutral_future(reward, uneven, mask, future_weight=0.5) == pytest.approx(
        np.array([[1 + 0.5, 2 + 0.25, 3, 0], [4 - 0.5 * 2, 0, 5 - 0.5 * 2.5, 6]])
    )


def test_baselines_leave_the_own_response_out() -> None:
    credited = np.array([[1.0, 2, NAN], [3, NAN, 5], [7, 8, 9], [NAN, NAN, NAN]])
    mask = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
    assert credit.position_mean(credited, mask) == pytest.approx(
        np.array([[5, 6.5, 0], [4, 0, 5], [2, 3.5, 0], [0, 0, 0]])
    )
    assert credit.column_mean(credited, mask) == pytest.approx(
        np.array([[5, 8, 0], [4, 0, 9], [2, 2, 5], [0, 0, 0]])
    )
    assert credit.batch_mean(credited, mask) == pytest.approx(
        np.array([[32 / 5, 32 / 5, 0], [27 / 5, 0, 27 / 5], [11 / 4] * 3, [0, 0, 0]])
    )
    assert credit.group_mean(credited, mask, [1, 1, 2, 1]) == pytest.approx(
        np.array([[4, 4, 0], [1.5, 0, 1.5], [0, 0, 0], [0, 0, 0]])
    )
    assert credit.expected_reward([0.5, 1.0]).tolist() == [-0.5, -1.0]
    assert credit.value([0.5]).tolist() == [0.5]


# --------------------------------------------------------------------------------------------
# Outcomes

MASK = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], bool)
CREDITED = np.array([[1.0, -2.0, 3.0], [-1.0, NAN, 4.0], [2.0, 5.0, NAN]])
VERDICT = [1.0, 0.0, NAN]


def test_outcomes_have_the_values_worked_out_by_hand() -> None:
    placed = outcomes.terminal_verdict(CREDITED, [1.0, 0.5, NAN], MASK, scale=2.0)
    assert placed.tolist() == [[1, -2, 5], [-1, 0, 5], [2, 5, 0]]
    group = [0, 0, 0]
    added = outcomes.add_group_advantage(CREDITED, VERDICT, group, MASK, scale=0.5)
    assert added.tolist() == [[1.5, -1.5, 3.5], [-1.5, 0, 3.5], [2, 5, 0]]
    mixed = outcomes.mix_group_advantage(CREDITED, VERDICT, group, MASK, share=0.25)
    assert mixed.tolist() == [[1, -1.25, 2.5], [-1, 0, 2.75], [1.5, 3.75, 0]]
    agreeing = outcomes.agree_in_sign(CREDITED, VERDICT, MASK)
    assert agreeing.tolist() == [[1, 0, 3], [-1, 0, 0], [0, 0, 0]]
    only = outcomes.magnitude_only(
        np.log([[1.1, 0.5, 3.0], [0.9, 1.0, 4.0], [1.0] * 3]),
        VERDICT,
        group,
        MASK,
        low=0.2,
        high=0.3,
    )
    assert only == pytest.approx(np.array([[1.1, 0.8, 1.3], [-1 / 0.9, 0, -0.8], [0, 0, 0]]))


def test_the_sigmoid_gate_keeps_the_mass_and_lies_between_its_limits() -> None:
    judged = [1.0, 0.0, 0.7]
    total = np.abs(CREDITED[MASK]).sum()
    for sharpness in (1e-3, 1.0, 20.0):
        gated = outcomes.sigmoid_gate(CREDITED, judged, MASK, sharpness=sharpness)
        assert np.abs(gated).sum() == pytest.approx(total)
        assert (gated[MASK] * CREDITED[MASK] >= 0).all()
    without = outcomes.sigmoid_gate(CREDITED, judged, MASK, sharpness=0.0)
    assert without == pytest.approx(np.where(MASK, CREDITED, 0.0))
    sharp = outcomes.sigmoid_gate(CREDITED, judged, MASK, sharpness=1e4)
    agreeing = outcomes.agree_in_sign(CREDITED, judged, MASK)
    assert sharp == pytest.approx(agreeing * total / np.abs(agreeing).sum())
    # The median of 1, 1, 2, 2, 3, 4, 5 is 2.
    gated = outcomes.sigmoid_gate(CREDITED, judged, MASK, sharpness=1.0)
    expected = 3 / (1 + math.exp(-1.5)) / (-2 / (1 + math.exp(1)))
    assert gated[0, 2] / gated[0, 1] == pytest.approx(expected)
    unjudged = outcomes.sigmoid_gate(CREDITED, VERDICT, MASK, sharpness=1.0)
    assert not unjudged[2].any()
    assert np.abs(unjudged).sum() == pytest.approx(total)


# --------------------------------------------------------------------------------------------
# Weights


def test_weights_of_one_token_have_the_values_worked_out_by_hand() -> None:
    assert weights.skip_special([True, False]).tolist() == [0, 1]
    entropy = [0.4, 0.5, 0.6]
    assert weights.student_entropy_above(entropy, nats=0.5).tolist() == [0, 0, 1]
    assert weights.student_entropy_below(entropy, nats=0.5).tolist() == [1, 0, 0]
    assert weights.teacher_entropy_above(entropy, nats=0.5).tolist() == [0, 0, 1]
    assert weights.teacher_entropy_below(entropy, nats=0.5).tolist() == [1, 0, 0]
    assert weights.disagreement([0.3]).tolist() == [0.3]
    wrong = weights.confident_wrong(entropy, [0.9, 0.9, 0.1], below_nats=0.45, above=0.5)
    assert wrong.tolist() == [1, 0, 0]
    assert weights.position_decay([0, 10, 20], half_life=10.0).tolist() == [1, 0.5, 0.25]
    assert weights.prefix([0, 1, 2], tokens=2).tolist() == [1, 1, 0]
    assert weights.top_k_overlap([1, 2, 3, 4], [4, 3, 9, 8], k=4) == 0.5
    assert weights.top_k_overlap([1, 2, 3, 4], [4, 3, 9, 8], k=2) == 0.0
    assert weights.overlap_above([1, 2], [2, 1], k=2, at_least=1.0) == 1.0
    teacher, student = np.log([0.5, 0.1]), np.log([0.25, 0.4])
    assert weights.trust(teacher, student) == pytest.approx([1.0, 0.25])
    assert weights.trusted(teacher, student, at_least=0.3).tolist() == [1, 0]
    assert weights.untrusted(teacher, student, below=0.3).tolist() == [0, 1]
    assert weights.surprise(student, boost=2.0) == pytest.approx([2.5, 2.2])
    assert weights.in_span([True, False]).tolist() == [1, 0]
    assert weights.teacher_passes([0.5, 0.2, NAN], at_least=0.5).tolist() == [1, 0, 0]
    assert weights.teacher_fails([0.5, 0.2, NAN], below=0.5).tolist() == [0, 1, 0]
    assert weights.positive_advantage([1.0, 0.0, -1.0]).tolist() == [1, 0, 0]
    assert weights.negative_advantage([1.0, 0.0, -1.0]).tolist() == [0, 0, 1]


def test_weights_along_a_response_have_the_values_worked_out_by_hand() -> None:
    mask = np.array([[1, 0, 1, 1, 1], [0, 1, 0, 0, 0]], bool)
    line = weights.relative_position(mask, start=1.0, end=4.0)
    assert line.tolist() == [[1, 0, 2, 3, 4], [0, 1, 0, 0, 0]]
    half = weights.prefix_share(mask, share=0.5)
    assert half.tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]]
    teacher = np.array([[1.0, NAN, -2.0, 3.0, -4.0], [NAN, 1.0, NAN, NAN, NAN]])
    drift = weights.cumulative_drift(teacher, np.zeros((2, 5)), mask, boost=0.5)
    assert drift == pytest.approx(np.array([[1.5, 0, 1.45, 1.35, 1.2], [0, 1.5, 0, 0, 0]]))
    budget = weights.drift_budget(teacher, np.zeros((2, 5)), mask, nats=3.0)
    assert budget.tolist() == [[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]


def test_quantile_gates_keep_a_share_of_the_whole_step() -> None:
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    entropy = np.array([[0.1, 0.5, 0.3, 9.0], [0.2, 0.4, 9.0, 9.0]])
    high = selection.keep_high_entropy(entropy, mask, share=0.4)
    assert high.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    low = selection.keep_low_entropy(entropy, mask, share=0.4)
    assert low.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert selection.keep_large_divergence(entropy, mask, share=0.2).sum() == 1
    unlikely = selection.keep_unlikely(-entropy, mask, share=0.4)
    assert unlikely.tolist() == high.tolist()
    assert selection.keep_high_entropy(entropy, mask, share=1.0).tolist() == mask.tolist()
    verdict = [1.0, NAN]
    assert weights.correct(verdict, mask).tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    assert not weights.incorrect(verdict, mask).any()
    assert weights.incorrect([0.5, 0.4], mask).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]


def test_the_bound_of_a_quantile_gate_is_numpys_quantile() -> None:
    values = np.random.default_rng(0).normal(size=(3, 7))
    mask = np.random.default_rng(1).random((3, 7)) < 0.7
    for share in (0.1, 0.25, 0.5, 0.9):
        bound = float(np.quantile(values[mask], 1 - share))
        expected = mask & (values >= bound)
        gate = selection.keep_high_entropy(values, mask, share=share)
        assert gate.tolist() == expected.tolist()


# --------------------------------------------------------------------------------------------
# Surrogates

SURROGATES: dict[str, Callable[[Array, Array, Array, Array], sg.Surrogate]] = {
    "score": lambda logp, old, teacher, a: sg.score(logp, a),
    "importance": lambda logp, old, teacher, a: sg.importance(logp, old, a),
    "clipped": lambda logp, old, teacher, a: sg.clipped(logp, old, a, low=0.2, high=0.28),
    "dual_clipped": lambda logp, old, teacher, a: sg.dual_clipped(
        logp, old, a, low=0.2, high=0.28, negative_cap=1.5
    ),
    "geometric_ratio": lambda logp, old, teacher, a: sg.geometric_ratio(
        logp, old, teacher, a, old_share=0.6, low=0.2, high=0.28
    ),
}
WEIGHTED: dict[str, Callable[[Array, Array, Array], sg.Surrogate]] = {
    "truncated_importance": partial(sg.truncated_importance, cap=1.2),
    "masked_importance": partial(sg.masked_importance, low=0.5, high=1.3),
}


def surrogate_case() -> tuple[Array, Array, Array, Array]:
    gaps = np.array([-1.0, -0.3, -0.1, 0.0, 0.2, 0.35, 0.8])
    logp = np.full(14, -1.5)
    old = logp - np.tile(gaps, 2)
    advantage = np.repeat([1.5, -0.5], 7)
    return logp, old, old - 0.05, advantage


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_slopes_match_finite_differences(name: str) -> None:
    logp, old, teacher, advantage = surrogate_case()
    surrogate = SURROGATES[name]
    up, down = (surrogate(logp + step, old, teacher, advantage).loss for step in (1e-6, -1e-6))
    exact = surrogate(logp, old, teacher, advantage)
    assert exact.slope == pytest.approx((up - down) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_surrogates_hold_their_weight_fixed(name: str) -> None:
    logp, old, _, advantage = surrogate_case()
    exact = WEIGHTED[name](logp, old, advantage)
    assert exact.loss == pytest.approx(exact.slope * logp)
    ratio = np.exp(logp - old)
    kept = np.minimum(ratio, 1.2) if name == "truncated_importance" else ratio
    if name == "masked_importance":
        kept = np.where((ratio >= 0.5) & (ratio <= 1.3), ratio, 0.0)
    assert exact.slope == pytest.approx(-kept * advantage)
    assert len(set(np.round(kept, 6))) >= 4


def test_surrogates_have_the_values_worked_out_by_hand() -> None:
    ratio = np.array([1.5, 0.5, 1.5, 0.5, 3.0])
    advantage = np.array([2.0, 2.0, -2.0, -2.0, -2.0])
    logp, old = np.log(ratio) - 2.0, np.full(5, -2.0)
    clipped = sg.clipped(logp, old, advantage, low=0.2, high=0.3)
    assert clipped.loss == pytest.approx([-2.6, -1.0, 3.0, 1.6, 6.0])
    assert clipped.slope == pytest.approx([0.0, -1.0, 3.0, 0.0, 6.0])
    dual = sg.dual_clipped(logp, old, advantage, low=0.2, high=0.3, negative_cap=2.0)
    assert dual.loss == pytest.approx([-2.6, -1.0, 3.0, 1.6, 4.0])
    assert dual.slope == pytest.approx([0.0, -1.0, 3.0, 0.0, 0.0])
    same = sg.geometric_ratio(logp, old, old + 7, advantage, old_share=1.0, low=0.2, high=0.3)
    assert same.loss.tolist() == clipped.loss.tolist()
    halves = sg.geometric_ratio(logp, old, old, advantage, old_share=0.5, low=0.2, high=0.3)
    assert halves.loss == pytest.approx(clipped.loss)


@pytest.mark.parametrize("support", [[0, 2], [4, 1, 3], [3]], ids=str)
def test_the_tail_residual_beside_the_bucket_is_the_papers_estimator(support: list[int]) -> None:
    logits, teacher_logits = logit_rows(3)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    student_tail = dv.log_mass_outside(student, support)
    teacher_tail = dv.log_mass_outside(teacher, support)
    outside = [v for v in range(5) if v not in support]
    # d log student(tail) / d logit(j) = [j in tail] student(j) / student(tail) - student(j).
    tail_score = -np.exp(student)
    tail_score[outside] += np.exp(student[outside] - student_tail)
    for token in range(5):
        ratio = float(teacher[token] - student[token])
        residual = sg.tail_residual(
            float(student[token]), ratio, student_tail, teacher_tail, token in support
        )
        gradient = bucketed_gradient(logits, teacher_logits, support)
        gradient += float(residual.slope) * -sampled_gradient(logits, token, 1.0)
        gradient += float(residual.tail_slope) * tail_score
        assert (
            largest(gradient - residual_gradient(logits, teacher_logits, token, support)) <= 1e-14
        )
        if token in support:
            assert float(residual.loss) == 0.0
        else:
            expected = -ratio * student[token] + (teacher_tail - student_tail) * student_tail
            assert float(residual.loss) == pytest.approx(expected)


def test_entropy_penalties_have_the_values_worked_out_by_hand() -> None:
    assert rg.entropy_bonus([0.5, 2.0]).tolist() == [-0.5, -2.0]
    assert rg.entropy_floor([0.5, 2.0], nats=1.0).tolist() == [0.5, 0.0]

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.formula import reward
from tests.reference.credit import teacher_log_ratio

F64 = torch.float64
NONE = -math.inf
logp = st.floats(-12, 0, allow_subnormal=False)

Divergence = Callable[[Tensor, Tensor], Tensor]
Reward = Callable[[Tensor, Tensor], Tensor]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def logs(*probabilities: float) -> Tensor:
    return tensor(*probabilities).log()


# --------------------------------------------------------------------------------------------
# Divergences of two probability vectors, as their definitions say


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (teacher * (teacher / student).log()).sum()


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl(teacher, student)


def generalized_jsd(student: Tensor, teacher: Tensor, *, w: float) -> Tensor:
    middle = w * teacher + (1 - w) * student
    return w * forward_kl(middle, teacher) + (1 - w) * forward_kl(middle, student)


def skew_forward_kl(student: Tensor, teacher: Tensor, *, s: float) -> Tensor:
    return forward_kl(s * teacher + (1 - s) * student, teacher)


def skew_reverse_kl(student: Tensor, teacher: Tensor, *, s: float) -> Tensor:
    return forward_kl(s * student + (1 - s) * teacher, student)


def alpha_divergence(student: Tensor, teacher: Tensor, *, a: float) -> Tensor:
    return (1 - (teacher**a * student ** (1 - a)).sum()) / (a * (1 - a))


def squared_hellinger(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.sqrt() - teacher.sqrt()).square().sum() / 2


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).abs().sum() / 2


def squared_total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return total_variation(student, teacher) ** 2


def power_divergence(student: Tensor, teacher: Tensor, *, a: float) -> Tensor:
    parts = (
        student ** (1 + a) / (a * (1 + a)) - student * teacher**a / a + teacher ** (1 + a) / (1 + a)
    )
    return parts.sum()


def a_times_power_divergence(student: Tensor, teacher: Tensor, *, a: float) -> Tensor:
    return a * power_divergence(student, teacher, a=a)


def reverse_kl_to_mixture(student: Tensor, teacher: Tensor, *, old: Tensor, s: float) -> Tensor:
    return reverse_kl(student, s * teacher + (1 - s) * old)


OLD = logs(0.1, 0.3, 0.2, 0.15, 0.25)


def sign_times_distance(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    distance = total_variation(student_logp.exp(), teacher_logp.exp())
    return reward.sign_total_variation(teacher_logp, student_logp, distance.expand(5))


def proximal(teacher_logp: Tensor, student_logp: Tensor, *, s: float) -> Tensor:
    return reward.proximal_log_ratio(teacher_logp, student_logp, OLD, teacher_share=s)


IDENTITIES: dict[str, tuple[Reward, Divergence]] = {
    "log_ratio": (reward.teacher_log_ratio, reverse_kl),
    "forward_kl": (reward.forward_kl_reward, forward_kl),
    "squared_hellinger": (reward.squared_hellinger_reward, squared_hellinger),
    "total_variation": (reward.total_variation_reward, total_variation),
    "sign_total_variation": (sign_times_distance, squared_total_variation),
}
for share in (0.02, 0.3, 0.5, 0.9):
    IDENTITIES |= {
        f"generalized_jsd-{share}": (
            partial(reward.generalized_jsd_reward, teacher_weight=share),
            partial(generalized_jsd, w=share),
        ),
        f"skew_forward_kl-{share}": (
            partial(reward.skew_forward_kl_reward, skew=share),
            partial(skew_forward_kl, s=share),
        ),
        f"skew_reverse_kl-{share}": (
            partial(reward.skew_reverse_kl_reward, skew=share),
            partial(skew_reverse_kl, s=share),
        ),
        f"proximal-{share}": (
            partial(proximal, s=share),
            partial(reverse_kl_to_mixture, old=OLD.exp(), s=share),
        ),
    }
for index in (-1.5, -0.5, 0.01, 0.5, 0.99, 2.0, 3.0):
    IDENTITIES[f"alpha_divergence-{index}"] = (
        partial(reward.alpha_divergence_reward, alpha=index),
        partial(alpha_divergence, a=index),
    )
for index in (0.1, 1.0, 2.5, 5.0):
    IDENTITIES[f"power-{index}"] = (
        partial(reward.power_reward, power=index),
        partial(a_times_power_divergence, a=index),
    )

F_REWARDS = {
    name: formula
    for name, (formula, _) in IDENTITIES.items()
    if not name.startswith(("power", "proximal", "sign"))
}
"""Rewards that are functions of u = teacher / student alone."""


def slope(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-3) -> Tensor:
    """Five-point differences: an error of order step^4, so rounding and curvature stay < 1e-10."""

    def along(index: int, steps: int) -> Tensor:
        moved = at.clone()
        moved[index] += steps * step
        return function(moved)

    rows = [
        (8 * (along(i, 1) - along(i, -1)) - (along(i, 2) - along(i, -2))) / (12 * step)
        for i in range(at.numel())
    ]
    return torch.stack(rows)


def mean_reward_times_score(student: Tensor, rewards: Tensor) -> Tensor:
    """sum_v student(v) * reward(v) * grad log student(v), with respect to the logits."""
    total = torch.zeros_like(student)
    for v in range(student.numel()):
        score = -student.clone()
        score[v] += 1
        total += student[v] * rewards[v] * score
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", IDENTITIES)
def test_the_mean_reward_times_score_is_minus_the_gradient_of_the_divergence(
    name: str, seed: int
) -> None:
    formula, divergence = IDENTITIES[name]
    draw = torch.Generator().manual_seed(seed)
    logits, teacher_logits = torch.randn(2, 5, generator=draw, dtype=F64)
    teacher = teacher_logits.softmax(0)
    assert (logits.softmax(0) - teacher).abs().min() > 3e-3  # away from the kink of |.|

    expected = -slope(lambda at: divergence(at.softmax(0), teacher), logits)
    rewards = formula(teacher.log(), logits.log_softmax(0))
    found = mean_reward_times_score(logits.softmax(0), rewards)
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("name", F_REWARDS)
def test_a_reward_of_the_ratio_is_zero_at_one_and_rises_with_the_ratio(name: str) -> None:
    student = torch.full((41,), -20.0, dtype=F64)
    log_ratio = torch.linspace(-10, 10, 41, dtype=F64)
    rewards = F_REWARDS[name](student + log_ratio, student)
    assert rewards[20] == 0.0
    assert rewards[19] < 0 < rewards[21]
    assert (rewards.diff() >= 0).all()


# Each value is the docstring's A with u = 0 put in by hand.
AT_ZERO = {
    "log_ratio": NONE,
    "forward_kl": -1.0,
    "squared_hellinger": -0.5,
    "total_variation": -0.5,
    "generalized_jsd-0.3": 0.7 * math.log(0.7),
    "skew_forward_kl-0.3": -0.7,
    "skew_reverse_kl-0.3": math.log(0.3) + 1 - 0.3,
    "alpha_divergence-0.5": -2.0,
    "alpha_divergence-3.0": -1 / 3,
    "alpha_divergence--0.5": NONE,
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", AT_ZERO)
def test_the_value_where_the_teacher_gives_no_mass(name: str, dtype: torch.dtype) -> None:
    found = F_REWARDS[name](torch.tensor([NONE], dtype=dtype), torch.tensor([-2.0], dtype=dtype))
    assert float(found) == pytest.approx(AT_ZERO[name], rel=1e-6)


# u = exp(200): beyond float32, where only what grows no faster than log u stays finite.
AT_HUGE = {
    "forward_kl": math.inf,
    "alpha_divergence-0.5": math.inf,
    "alpha_divergence--0.5": 2.0,  # 1 / |a|
    "total_variation": 0.5,
    "generalized_jsd-0.3": 0.7 * (200 + math.log(0.3)),
    "skew_forward_kl-0.3": 0.7**2 / 0.3,
    "skew_reverse_kl-0.3": 200 + math.log(0.7) - 0.3,
}


@pytest.mark.parametrize("name", AT_HUGE)
def test_the_value_for_a_huge_ratio_in_single_precision(name: str) -> None:
    found = F_REWARDS[name](torch.tensor([-1.0]), torch.tensor([-201.0]))
    assert float(found) == pytest.approx(AT_HUGE[name], rel=1e-6)


@pytest.mark.parametrize("name", F_REWARDS)
def test_near_agreement_the_reward_keeps_its_relative_precision(name: str) -> None:
    # To first order A = g''(1) * (u - 1), and g''(1) is the divergence's second derivative.
    curvature = {
        "log_ratio": 1.0,
        "forward_kl": 1.0,
        "squared_hellinger": 1 / 4,
        "alpha_divergence": 1.0,
    }
    kind, _, knob = name.partition("-")
    if kind == "total_variation":
        return  # a step at u = 1
    if kind == "generalized_jsd":
        curvature[kind] = float(knob) * (1 - float(knob))
    if kind.startswith("skew"):
        curvature[kind] = (1 - float(knob)) ** 2
    for log_ratio in (1e-9, -1e-9):
        found = float(F_REWARDS[name](tensor(log_ratio), tensor(0.0)))
        assert found == pytest.approx(curvature[kind] * log_ratio, rel=1e-6)


def test_the_three_scales_of_hellinger_are_one_two_and_four() -> None:
    teacher, student = logs(0.5, 0.02), logs(0.1, 0.4)
    ours = reward.squared_hellinger_reward(teacher, student)
    psi = ((teacher - student) / 2).exp() - 1
    assert torch.allclose(psi, 2 * ours, rtol=1e-12)
    amari = reward.alpha_divergence_reward(teacher, student, alpha=0.5)
    assert torch.allclose(amari, 4 * ours, rtol=1e-12)


def test_limits_of_the_knobs_are_the_rewards_they_tend_to() -> None:
    teacher, student = logs(0.5, 0.02, 0.1), logs(0.1, 0.4, 0.1)
    ratio, forward = teacher - student, (teacher - student).exp() - 1
    end = 1e-9
    for found, limit in (
        (reward.generalized_jsd_reward(teacher, student, teacher_weight=end) / end, forward),
        (reward.generalized_jsd_reward(teacher, student, teacher_weight=1 - end) / end, ratio),
        (reward.skew_forward_kl_reward(teacher, student, skew=end), forward),
        (reward.skew_reverse_kl_reward(teacher, student, skew=end), ratio),
        (reward.alpha_divergence_reward(teacher, student, alpha=end), ratio),
        (reward.alpha_divergence_reward(teacher, student, alpha=1 - end), forward),
        (reward.power_reward(teacher, student, power=end) / end, ratio),
        (reward.tanh_log_ratio(teacher, student, scale=1 / end), ratio),
    ):
        assert torch.allclose(found, limit, rtol=1e-6, atol=1e-7)


# --------------------------------------------------------------------------------------------
# The log ratio


def test_one_is_one_for_every_token() -> None:
    assert reward.one(torch.tensor([[3, 0], [7, 7]])).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_the_log_ratio_is_positive_where_the_teacher_likes_the_token_better() -> None:
    ratio = reward.teacher_log_ratio(logs(0.5, 0.1), logs(0.25, 0.1))
    assert ratio.tolist() == [math.log(0.5) - math.log(0.25), 0.0]


def test_the_log_ratio_agrees_with_the_transcription() -> None:
    student, teacher = torch.randn(2, 6, dtype=F64).log_softmax(-1)
    for token in range(6):
        expected = teacher_log_ratio(student, teacher, token)
        assert float(reward.teacher_log_ratio(teacher[token], student[token])) == expected


def test_the_log_ratio_carries_no_gradient() -> None:
    live = torch.zeros(3, requires_grad=True)
    assert not reward.teacher_log_ratio(live, live).requires_grad


def test_the_expected_log_ratio_is_the_mean_of_the_log_ratio_over_the_student() -> None:
    student, teacher = torch.randn(2, 7, dtype=F64).log_softmax(-1)
    mean = (student.exp() * reward.teacher_log_ratio(teacher, student)).sum()
    divergence = reverse_kl(student.exp(), teacher.exp())
    assert float(reward.expected_log_ratio(divergence)) == pytest.approx(float(mean), rel=1e-12)
    assert float(mean) < 0


@pytest.mark.parametrize("seed", range(3))
def test_a_cached_log_ratio_also_pushes_the_student_away_from_the_old_policy(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, teacher_logits, old_logits = torch.randn(3, 5, generator=draw, dtype=F64)
    teacher, old = teacher_logits.softmax(0), old_logits.softmax(0)
    expected = slope(
        lambda at: reverse_kl(at.softmax(0), old) - reverse_kl(at.softmax(0), teacher), logits
    )
    rewards = reward.cached_log_ratio(teacher.log(), old.log())
    found = mean_reward_times_score(logits.softmax(0), rewards)
    assert (found - expected).abs().max() <= 1e-9
    at_the_teacher = mean_reward_times_score(teacher, rewards)
    assert at_the_teacher.abs().max() > 1e-2  # the teacher is not stationary


def test_the_named_cached_rewards_exist() -> None:
    assert set(reward.__all__) >= reward.CACHED == {"cached_log_ratio"}


# --------------------------------------------------------------------------------------------
# Transforms, with log ratios -3, -1/2, 0, 1/2, 3 and no mass on the teacher's side

RATIOS = tensor(-3.0, -0.5, 0.0, 0.5, 3.0, NONE)
STUDENT = tensor(-4.0, -4.0, -4.0, -4.0, -4.0, -4.0)


def test_clipping_holds_both_ends_and_counts_them() -> None:
    knobs = {"low": -2.0, "high": 1.0}
    found = reward.clipped_log_ratio(STUDENT + RATIOS, STUDENT, **knobs)
    assert found.tolist() == [-2.0, -0.5, 0.0, 0.5, 1.0, -2.0]
    hit = reward.clipped_log_ratio.counted(STUDENT + RATIOS, STUDENT, **knobs)  # type: ignore[attr-defined]
    assert hit.tolist() == [True, False, False, False, True, True]


def test_the_floor_holds_the_negative_end_and_counts_it() -> None:
    found = reward.floored_log_ratio(STUDENT + RATIOS, STUDENT, floor_nats=-2.0)
    assert found.tolist() == [-2.0, -0.5, 0.0, 0.5, 3.0, -2.0]
    hit = reward.floored_log_ratio.counted(STUDENT + RATIOS, STUDENT, floor_nats=-2.0)  # type: ignore[attr-defined]
    assert hit.tolist() == [True, False, False, False, False, True]


def test_the_docstring_gives_both_readings_of_the_published_floor() -> None:
    doc = reward.floored_log_ratio.__doc__ or ""
    share = 0.3
    for reading in (math.log(share / (1 - share)), math.log(share) / (1 - share)):
        assert f"{reading:.2f}" in doc


def test_tanh_is_bounded_by_its_scale() -> None:
    found = reward.tanh_log_ratio(STUDENT + RATIOS, STUDENT, scale=2.0)
    expected = [2 * math.tanh(r / 2) for r in (-3, -0.5, 0, 0.5, 3)]
    assert found.tolist() == pytest.approx([*expected, -2.0], rel=1e-12)


def test_the_soft_log_ratio_keeps_sign_and_order() -> None:
    found = reward.soft_log_ratio(STUDENT + RATIOS, STUDENT)
    expected = [-math.log(4), -math.log(1.5), 0.0, math.log(1.5), math.log(4), NONE]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@given(logp, logp, st.floats(0.01, 0.99))
def test_on_the_rollout_the_proximal_ratio_is_floored_and_a_scaled_jsd_reward(
    teacher: float, student: float, s: float
) -> None:
    at = tensor(student)
    found = reward.proximal_log_ratio(tensor(teacher), at, at, teacher_share=s)
    assert float(found) >= math.log1p(-s) - 1e-12
    jensen_shannon = reward.generalized_jsd_reward(tensor(teacher), at, teacher_weight=s)
    assert float(found) == pytest.approx(float(jensen_shannon) / (1 - s), rel=1e-9, abs=1e-12)


def test_the_proximal_ratio_counts_where_the_old_policy_outweighs_the_teacher() -> None:
    # s = 1/4: the teacher's part is teacher / 4, the old policy's 3 old / 4.
    teacher, old = logs(0.31, 0.29, 0.0), logs(0.1, 0.1, 0.1)
    student = logs(0.2, 0.2, 0.2)
    found = reward.proximal_log_ratio(teacher, student, old, teacher_share=0.25)
    mixtures = (0.31 / 4 + 0.075, 0.29 / 4 + 0.075, 0.075)
    assert found.tolist() == pytest.approx([math.log(m / 0.2) for m in mixtures], rel=1e-12)
    hit = reward.proximal_log_ratio.counted(teacher, student, old, teacher_share=0.25)  # type: ignore[attr-defined]
    assert hit.tolist() == [False, True, True]


def test_the_sign_reward_takes_its_size_from_the_prefix() -> None:
    found = reward.sign_total_variation(
        STUDENT + RATIOS, STUDENT, tensor(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    )
    assert found.tolist() == [-0.1, -0.2, 0.0, 0.4, 0.5, -0.6]


def test_the_power_reward_by_hand_and_where_probabilities_underflow() -> None:
    teacher, student = logs(0.5, 0.0, 0.3), logs(0.2, 0.4, 0.3)
    found = reward.power_reward(teacher, student, power=2.0)
    assert found.tolist() == pytest.approx([0.25 - 0.04, -0.16, 0.0], rel=1e-12)
    tiny = reward.power_reward(torch.tensor([-1.0, -300.0]), torch.tensor([-300.0, -1.0]), power=1)
    assert tiny.tolist() == pytest.approx([math.exp(-1), -math.exp(-1)], rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(reward.clipped_log_ratio, low=1.0, high=2.0), "low <= 0 <= high"),
        (partial(reward.clipped_log_ratio, low=0.0, high=0.0), "low < high"),
        (partial(reward.floored_log_ratio, floor_nats=0.0), "floor_nats must be negative"),
        (partial(reward.floored_log_ratio, floor_nats=math.nan), "floor_nats must be negative"),
        (partial(reward.tanh_log_ratio, scale=0.0), "scale must be positive"),
        (partial(reward.power_reward, power=0.0), "teacher_log_ratio"),
        (partial(reward.generalized_jsd_reward, teacher_weight=1.0), "forward_kl_reward"),
        (partial(reward.skew_forward_kl_reward, skew=0.0), "forward_kl_reward"),
        (partial(reward.skew_reverse_kl_reward, skew=0.0), "teacher_log_ratio"),
        (partial(reward.alpha_divergence_reward, alpha=0.0), "teacher_log_ratio"),
        (partial(reward.alpha_divergence_reward, alpha=1.0), "forward_kl_reward"),
    ],
)
def test_impossible_knobs_are_refused_with_a_way_out(call: Reward, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(STUDENT, STUDENT)


@pytest.mark.parametrize("s", [0.0, 1.0])
def test_a_teacher_share_of_all_or_nothing_is_refused(s: float) -> None:
    with pytest.raises(ValueError, match="teacher_log_ratio"):
        reward.proximal_log_ratio(STUDENT, STUDENT, STUDENT, teacher_share=s)


# --------------------------------------------------------------------------------------------
# Costs and verdicts


def test_every_token_costs_one() -> None:
    assert reward.length_cost(torch.tensor([[4, 0]])).tolist() == [[-1.0, -1.0]]


def test_the_overlong_cost_is_a_ramp_from_start_to_limit() -> None:
    # start 2, limit 6: tokens 1 and 2 are free, token 6 and later pay 1, token 4 half way.
    position = torch.arange(8)
    found = reward.overlong_cost(position, start=2, limit=6)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]
    hit = reward.overlong_cost.counted(position, start=2, limit=6)  # type: ignore[attr-defined]
    assert hit.tolist() == [False, False, True, True, True, True, True, True]


@pytest.mark.parametrize(("start", "limit"), [(-1, 4), (4, 4), (5, 4)])
def test_a_ramp_without_length_is_refused(start: int, limit: int) -> None:
    with pytest.raises(ValueError, match="0 <= start < limit"):
        reward.overlong_cost(torch.arange(3), start=start, limit=limit)


def test_the_verdict_is_paid_at_the_last_open_token() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    verdict = tensor(0.75, 1.0, 1.0, math.nan)
    assert reward.verdict_reward(verdict, mask).tolist() == [
        [0.0, 0.0, 0.75, 0.0],
        [0.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]


def group_advantage(
    verdicts: list[float], groups: list[int], *, divide_by_std: bool = True
) -> list[float]:
    """One open token per response."""
    formula = reward.group_advantage if divide_by_std else reward.group_deviation
    open_tokens = torch.ones(len(groups), 1, dtype=torch.bool)
    found = formula(tensor(*verdicts), torch.tensor(groups), open_tokens)
    return [float(row) for row in found[:, 0]]


def test_the_group_advantage_by_hand_with_groups_interleaved() -> None:
    # Group 7: 1, 0, 0.5, mean 0.5, sample variance (0.25 + 0.25 + 0) / 2 = 0.25.
    # Group 2: 1, 0, mean 0.5, sample variance 0.5.
    verdicts, groups = [1.0, 1.0, 0.0, 0.0, 0.5], [7, 2, 7, 2, 7]
    half = math.sqrt(0.5)
    assert group_advantage(verdicts, groups) == pytest.approx([1, half, -1, -half, 0], abs=1e-12)
    undivided = group_advantage(verdicts, groups, divide_by_std=False)
    assert undivided == pytest.approx([0.5, 0.5, -0.5, -0.5, 0], abs=1e-12)


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, 1.0])
def test_equal_verdicts_and_single_responses_teach_exactly_nothing(
    score: float, divide_by_std: bool
) -> None:
    # The mean of three times 0.1 is not 0.1 in floating point.
    found = group_advantage([score] * 3 + [0.7], [0, 0, 0, 1], divide_by_std=divide_by_std)
    assert found == [0.0, 0.0, 0.0, 0.0]


def test_a_response_without_verdict_neither_gets_nor_gives() -> None:
    found = group_advantage([1.0, math.nan, 0.0, 1.0, math.nan], [0, 0, 0, 1, 1])
    half = math.sqrt(0.5)  # group 0 without the second: 1 and 0; group 1: one response left
    assert found == pytest.approx([half, 0.0, -half, 0.0, 0.0], abs=1e-12)


def test_group_statistics_do_not_read_the_mask() -> None:
    verdict, group = tensor(1.0, 0.0, 0.25), torch.zeros(3, dtype=torch.int64)
    full = torch.ones(3, 4, dtype=torch.bool)
    part = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    everywhere = reward.group_advantage(verdict, group, full)
    assert (everywhere == everywhere[:, :1]).all()
    there = reward.group_advantage(verdict, group, part)
    assert torch.equal(there, torch.where(part, everywhere, 0.0))


@pytest.mark.parametrize("responses", [2, 3])
def test_undivided_it_is_unbiased_up_to_the_share_of_the_other_responses(responses: int) -> None:
    # One decision with success probability p; the score of a success is 1 - p, of a failure -p,
    # and grad E[verdict] = p (1 - p). Every outcome of the group is enumerated.
    p, total = 0.3, 0.0
    for code in range(2**responses):
        verdicts = [float(code >> i & 1) for i in range(responses)]
        chance = math.prod(p if v else 1 - p for v in verdicts)
        advantages = group_advantage(verdicts, [0] * responses, divide_by_std=False)
        scores = [(1 - p) if v else -p for v in verdicts]
        mean = sum(a * s for a, s in zip(advantages, scores, strict=True)) / responses
        total += chance * mean
    assert total == pytest.approx((1 - 1 / responses) * p * (1 - p), rel=1e-12)

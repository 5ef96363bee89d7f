from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.formula import surrogate

F64 = torch.float64
NONE = -math.inf
real = st.floats(-3, 3, allow_subnormal=False)
share = st.floats(0.01, 0.99)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def loss_and_slope(
    formula: Callable[[Tensor], Tensor], student_logp: Tensor
) -> tuple[Tensor, Tensor]:
    """Value per row, and its derivative by the student's log-probability."""
    leaf = student_logp.clone().requires_grad_()
    loss = formula(leaf)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def clipped_with_slope(student: float, old: float, advantage: float) -> tuple[float, float]:
    leaf = torch.tensor([student], dtype=F64, requires_grad=True)
    loss = surrogate.clipped(
        leaf,
        torch.tensor([old], dtype=F64),
        torch.tensor([advantage], dtype=F64),
        low=0.2,
        high=0.3,
    )
    loss.sum().backward()
    assert leaf.grad is not None
    return float(loss.detach()), float(leaf.grad)


@given(real, real)
def test_the_score_is_minus_advantage_times_logp_and_so_is_its_slope(
    logp: float, advantage: float
) -> None:
    leaf = torch.tensor([logp], dtype=F64, requires_grad=True)
    held = torch.tensor([advantage], dtype=F64, requires_grad=True)
    loss = surrogate.score(leaf, held)
    loss.sum().backward()
    assert float(loss.detach()) == -advantage * logp
    assert leaf.grad is not None
    assert float(leaf.grad) == -advantage
    assert held.grad is None


@given(real, real, real)
def test_the_clipped_loss_by_its_three_cases(student: float, old: float, advantage: float) -> None:
    ratio = math.exp(student - old)
    stopped_above = advantage > 0 and ratio > 1.3
    stopped_below = advantage < 0 and ratio < 0.8
    edge = 1.3 if stopped_above else 0.8
    loss, slope = clipped_with_slope(student, old, advantage)
    stopped = stopped_above or stopped_below
    assert loss == pytest.approx(-advantage * (edge if stopped else ratio), rel=1e-12, abs=1e-300)
    assert slope == pytest.approx(0 if stopped else -advantage * ratio, rel=1e-12, abs=1e-300)


@given(real, real)
def test_on_the_weights_of_the_rollout_clipping_has_the_slope_of_the_score(
    logp: float, advantage: float
) -> None:
    loss, slope = clipped_with_slope(logp, logp, advantage)
    assert loss == -advantage
    assert slope == -advantage


def test_a_negative_advantage_is_unbounded_above() -> None:
    loss, slope = clipped_with_slope(5.0, 0.0, -1.0)
    assert loss == pytest.approx(math.exp(5))
    assert slope == pytest.approx(math.exp(5))


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.2), (1.1, 0.2), (0.2, -0.1)])
def test_impossible_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="clip range needs 0 <= low <= 1 and high >= 0"):
        surrogate.clipped(torch.zeros(1), torch.zeros(1), torch.zeros(1), low=low, high=high)


# --------------------------------------------------------------------------------------------
# What the ratio-based losses share

RATIO_BASED: dict[str, Loss] = {
    "importance": surrogate.importance,
    "clipped": partial(surrogate.clipped, low=0.2, high=0.3),
    "clipped-tight": partial(surrogate.clipped, low=0.0, high=0.0),
    "dual_clipped": partial(surrogate.dual_clipped, low=0.2, high=0.3, negative_cap=3.0),
    "truncated": partial(surrogate.truncated_importance, cap=2.0),
    "truncated-tight": partial(surrogate.truncated_importance, cap=1.0),
    "masked": partial(surrogate.masked_importance, low=0.5, high=2.0),
    "masked-tight": partial(surrogate.masked_importance, low=1.0, high=1.0),
}


@pytest.mark.parametrize("name", RATIO_BASED)
def test_at_ratio_one_the_slope_is_that_of_the_score(name: str) -> None:
    logp, advantage = tensor(-0.5, -3.0, -9.0, -2.0), tensor(1.5, -2.0, 0.25, 0.0)
    _, slope = loss_and_slope(lambda leaf: RATIO_BASED[name](leaf, logp, advantage), logp)
    _, expected = loss_and_slope(lambda leaf: surrogate.score(leaf, advantage), logp)
    assert torch.equal(slope, expected)


@pytest.mark.parametrize("name", RATIO_BASED)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_zero_advantage_moves_nothing(name: str, dtype: torch.dtype) -> None:
    logp = torch.tensor([-1.0, -40.0], dtype=dtype)
    other = torch.tensor([-40.0, -1.0], dtype=dtype)
    formula = RATIO_BASED[name]
    loss, slope = loss_and_slope(lambda leaf: formula(leaf, other, torch.zeros_like(leaf)), logp)
    assert loss.tolist() == [0.0, 0.0]
    assert slope.tolist() == [0.0, 0.0]


def expected_gradient(formula: Loss, logits: Tensor, sampler: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the sampler's tokens of the loss's gradient; the log ratio is recomputed."""
    leaf = logits.clone().requires_grad_()
    student = leaf.log_softmax(0)
    losses = formula(student, sampler.log(), (teacher.log() - student).detach())
    (gradient,) = torch.autograd.grad((sampler * losses).sum(), leaf)
    return gradient


def three_policies(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the student; probabilities of sampler and teacher."""
    draw = torch.Generator().manual_seed(seed)
    logits, sampler, teacher = 0.7 * torch.randn(3, 6, generator=draw, dtype=F64)
    return logits, sampler.softmax(0), teacher.softmax(0)


def reverse_kl_gradient(logits: Tensor, teacher: Tensor) -> Tensor:
    """student(j) * (log student(j) - log teacher(j) - D), by hand for softmax logits."""
    student = logits.softmax(0)
    log_ratio = student.log() - teacher.log()
    return student * (log_ratio - (student * log_ratio).sum())


def weighted_scores(logits: Tensor, weights: Tensor) -> Tensor:
    """sum_v weights(v) * grad log student(v), with respect to the logits."""
    return weights - weights.sum() * logits.softmax(0)


@pytest.mark.parametrize("seed", range(3))
def test_importance_is_unbiased_for_the_local_reverse_kl_on_anybodys_tokens(seed: int) -> None:
    logits, sampler, teacher = three_policies(seed)
    found = expected_gradient(surrogate.importance, logits, sampler, teacher)
    expected = reverse_kl_gradient(logits, teacher)
    assert expected.abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_masking_drops_exactly_the_tokens_outside(seed: int) -> None:
    logits, sampler, teacher = three_policies(seed)
    student = logits.softmax(0)
    outside = (student / sampler < 0.5) | (student / sampler > 2.0)
    assert 0 < outside.sum() < 6
    found = expected_gradient(RATIO_BASED["masked"], logits, sampler, teacher)
    advantage = teacher.log() - student.log()
    dropped = weighted_scores(logits, torch.where(outside, student * advantage, 0.0))
    assert (found - reverse_kl_gradient(logits, teacher) - dropped).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_truncation_loses_exactly_what_lies_above_the_cap(seed: int) -> None:
    logits, sampler, teacher = three_policies(seed)
    student = logits.softmax(0)
    excess = (student - 1.3 * sampler).clamp(min=0.0)
    assert 0 < (excess > 0).sum() < 6
    formula = partial(surrogate.truncated_importance, cap=1.3)
    found = expected_gradient(formula, logits, sampler, teacher)
    lost = weighted_scores(logits, excess * (teacher.log() - student.log()))
    assert (found - reverse_kl_gradient(logits, teacher) - lost).abs().max() < 1e-12


# --------------------------------------------------------------------------------------------
# One by one. Ratios 1/4, 1, 3/2 and 5 for a negative and for a positive advantage

RATIOS = tensor(0.25, 1.0, 1.5, 5.0).log()
OLD = tensor(-6.0, -6.0, -6.0, -6.0)
POSITIVE, NEGATIVE = tensor(2.0, 2.0, 2.0, 2.0), tensor(-2.0, -2.0, -2.0, -2.0)


def changed(formula: Callable[..., Tensor], *arguments: Tensor, **knobs: float) -> list[bool]:
    found: list[bool] = formula.counted(*arguments, **knobs).tolist()  # type: ignore[attr-defined]
    return found


def test_importance_is_minus_ratio_times_advantage() -> None:
    loss, slope = loss_and_slope(lambda x: surrogate.importance(x, OLD, POSITIVE), OLD + RATIOS)
    assert loss.tolist() == pytest.approx([-0.5, -2.0, -3.0, -10.0], rel=1e-12)
    assert slope.tolist() == pytest.approx(loss.tolist(), rel=1e-12)


def test_clipping_counts_the_tokens_that_lost_their_gradient() -> None:
    knobs = {"low": 0.2, "high": 0.3}
    student = OLD + RATIOS
    assert changed(surrogate.clipped, student, OLD, POSITIVE, **knobs) == [False, False, True, True]
    assert changed(surrogate.clipped, student, OLD, NEGATIVE, **knobs) == [
        True,
        False,
        False,
        False,
    ]
    for advantage in (POSITIVE, NEGATIVE):
        _, slope = loss_and_slope(
            lambda x, a=advantage: surrogate.clipped(x, OLD, a, **knobs), student
        )
        assert (slope == 0).tolist() == changed(surrogate.clipped, student, OLD, advantage, **knobs)


def test_the_dual_clip_by_hand() -> None:
    # Negative: ratio 1/4 is held at 0.8, ratio 5 at the cap of 3. Positive: held at 1.3.
    knobs = {"low": 0.2, "high": 0.3, "negative_cap": 3.0}
    formula, student = partial(surrogate.dual_clipped, **knobs), OLD + RATIOS
    loss, slope = loss_and_slope(lambda x: formula(x, OLD, NEGATIVE), student)
    assert loss.tolist() == pytest.approx([1.6, 2.0, 3.0, 6.0], rel=1e-12)
    assert slope.tolist() == pytest.approx([0.0, 2.0, 3.0, 0.0], rel=1e-12)
    held = changed(surrogate.dual_clipped, student, OLD, NEGATIVE, **knobs)
    assert held == [True, False, False, True]
    loss, slope = loss_and_slope(lambda x: formula(x, OLD, POSITIVE), student)
    assert loss.tolist() == pytest.approx([-0.5, -2.0, -2.6, -2.6], rel=1e-12)
    assert slope.tolist() == pytest.approx([-0.5, -2.0, 0.0, 0.0], rel=1e-12)
    held = changed(surrogate.dual_clipped, student, OLD, POSITIVE, **knobs)
    assert held == [False, False, True, True]


@given(real, real, real, share, st.floats(0, 2), st.floats(1.01, 9))
def test_the_dual_clip_is_the_published_formula_and_bounded(
    student: float, old: float, advantage: float, low: float, high: float, cap: float
) -> None:
    found = surrogate.dual_clipped(
        tensor(student), tensor(old), tensor(advantage), low=low, high=high, negative_cap=cap
    )
    ratio = math.exp(student - old)
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if advantage < 0:
        objective = max(objective, cap * advantage)
    assert float(found) == pytest.approx(-objective, rel=1e-9, abs=1e-300)
    assert float(found) <= cap * abs(advantage) * (1 + 1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_ratio_beyond_single_precision_makes_no_nan(advantage: float) -> None:
    student, old = torch.tensor([-1.0]), torch.tensor([-200.0])
    formula = partial(surrogate.dual_clipped, low=0.2, high=0.3, negative_cap=3.0)
    loss, slope = loss_and_slope(lambda x: formula(x, old, torch.tensor([advantage])), student)
    bound = {1.0: -1.3, -1.0: 3.0, 0.0: 0.0}[advantage]
    assert float(loss) == pytest.approx(bound, rel=1e-6)
    assert float(slope) == 0.0


def test_truncation_and_masking_by_hand() -> None:
    student = OLD + RATIOS
    loss, slope = loss_and_slope(
        lambda x: surrogate.truncated_importance(x, OLD, POSITIVE, cap=2.0), student
    )
    weights = [0.25, 1.0, 1.5, 2.0]
    assert slope.tolist() == pytest.approx([-2 * w for w in weights], rel=1e-12)
    assert loss.tolist() == pytest.approx(
        [-2 * w * float(x) for w, x in zip(weights, student, strict=True)], rel=1e-12
    )
    assert changed(surrogate.truncated_importance, student, OLD, POSITIVE, cap=2.0) == [
        False,
        False,
        False,
        True,
    ]
    knobs = {"low": 0.5, "high": 2.0}
    _, slope = loss_and_slope(
        lambda x: surrogate.masked_importance(x, OLD, POSITIVE, **knobs), student
    )
    assert slope.tolist() == pytest.approx([0.0, -2.0, -3.0, 0.0], rel=1e-12)
    assert changed(surrogate.masked_importance, student, OLD, POSITIVE, **knobs) == [
        True,
        False,
        False,
        True,
    ]


@given(real, real, real, real, share)
def test_the_geometric_ratio_is_the_published_formula(
    student: float, old: float, teacher: float, advantage: float, s: float
) -> None:
    arguments = tensor(student), tensor(old), tensor(teacher), tensor(advantage)
    found = surrogate.geometric_ratio(*arguments, old_share=s, low=0.2, high=0.3)
    from_old, from_teacher = math.exp(student - old), math.exp(student - teacher)
    ratio = from_old**s * from_teacher ** (1 - s)
    expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_on_the_rollout_the_geometric_ratio_weighs_the_score_by_old_over_teacher() -> None:
    # s = 1/2, so the ratio is sqrt(old / teacher): here 1, sqrt(0.8) and 2.
    old = tensor(0.2, 0.2, 0.2).log()
    teacher = tensor(0.2, 0.25, 0.05).log()
    for advantage, expected in (
        (3.0, [-3.0, -3.0 * math.sqrt(0.8), 0.0]),
        (-3.0, [3.0, 3.0 * math.sqrt(0.8), 6.0]),
    ):
        fixed = torch.full((3,), advantage, dtype=F64)
        _, slope = loss_and_slope(
            lambda x, a=fixed: surrogate.geometric_ratio(
                x, old, teacher, a, old_share=0.5, low=0.2, high=0.3
            ),
            old,
        )
        assert slope.tolist() == pytest.approx(expected, rel=1e-12)
        held = changed(
            surrogate.geometric_ratio, old, old, teacher, fixed, old_share=0.5, low=0.2, high=0.3
        )
        assert held == [False, False, advantage > 0]


def test_a_teacher_without_mass_stops_a_reward_and_makes_a_blame_infinite() -> None:
    old, teacher = tensor(-1.0, -1.0), tensor(NONE, NONE)
    loss, slope = loss_and_slope(
        lambda x: surrogate.geometric_ratio(
            x, old, teacher, tensor(1.0, 0.0), old_share=0.5, low=0.2, high=0.3
        ),
        old,
    )
    assert loss.tolist() == pytest.approx([-1.3, 0.0], rel=1e-12)
    assert slope.tolist() == [0.0, 0.0]
    blamed = surrogate.geometric_ratio(
        old[:1], old[:1], teacher[:1], tensor(-1.0), old_share=0.5, low=0.2, high=0.3
    )
    assert float(blamed) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(surrogate.dual_clipped, low=-1.0, high=0.2, negative_cap=3.0), "0 <= low <= 1"),
        (partial(surrogate.dual_clipped, low=0.2, high=0.2, negative_cap=1.0), "negative_cap"),
        (partial(surrogate.truncated_importance, cap=0.9), "cap must be at least 1"),
        (partial(surrogate.masked_importance, low=1.1, high=2.0), "low=0.5, high=2"),
        (partial(surrogate.masked_importance, low=0.5, high=0.9), "low=0.5, high=2"),
    ],
)
def test_impossible_knobs_are_refused_with_a_way_out(call: Loss, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(OLD, OLD, POSITIVE)


@pytest.mark.parametrize("s", [0.0, 1.0])
def test_an_anchor_of_one_side_alone_is_refused(s: float) -> None:
    with pytest.raises(ValueError, match="use clipped"):
        surrogate.geometric_ratio(OLD, OLD, OLD, POSITIVE, old_share=s, low=0.2, high=0.2)


# --------------------------------------------------------------------------------------------
# The residual of a tail bucket


def bucketed_reverse_kl(student: Tensor, teacher: Tensor, inside: Tensor) -> Tensor:
    """The reverse KL where everything outside the support is one entry."""
    student_tail, teacher_tail = student[~inside].sum(), teacher[~inside].sum()
    kept = (student * (student / teacher).log())[inside].sum()
    return kept + student_tail * (student_tail / teacher_tail).log()


@pytest.mark.parametrize("inside", [(1, 1, 0, 0, 0, 0), (1, 0, 0, 1, 1, 0), (0, 0, 0, 0, 0, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_bucket_plus_residual_is_unbiased_for_the_reverse_kl_on_the_full_vocabulary(
    seed: int, inside: tuple[int, ...]
) -> None:
    logits, _, teacher = three_policies(seed)
    kept = torch.tensor(inside, dtype=torch.bool)
    leaf = logits.clone().requires_grad_()
    student = leaf.softmax(0)
    tails = (student[~kept].sum().log(), teacher[~kept].sum().log())
    residual = surrogate.tail_residual(
        student.log(),
        (teacher / student).log().detach(),
        tails[0].expand(6),
        tails[1].expand(6),
        kept,
    )
    coarse = bucketed_reverse_kl(student, teacher, kept)
    (bucket_only,) = torch.autograd.grad(coarse, leaf, retain_graph=True)
    (found,) = torch.autograd.grad(coarse + (student.detach() * residual).sum(), leaf)
    expected = reverse_kl_gradient(logits, teacher)
    assert (found - expected).abs().max() < 1e-12
    assert (bucket_only - expected).abs().max() > 1e-3  # the residual is what repairs it


def test_inside_the_support_the_residual_is_exactly_nothing() -> None:
    student = tensor(-1.0, NONE, -1.0).requires_grad_()
    student_tail = tensor(NONE, NONE, -0.5).requires_grad_()
    loss = surrogate.tail_residual(
        student,
        tensor(math.inf, math.nan, 0.25),
        student_tail,
        tensor(NONE, -0.7, -0.9),
        torch.tensor([True, True, False]),
    )
    loss.sum().backward()
    # Outside: A log pi = -0.25, and (-0.9 + 0.5) * -0.5 = 0.2; the loss is -(-0.25 - 0.2).
    assert loss[:2].tolist() == [0.0, 0.0]
    assert float(loss[2].detach()) == pytest.approx(0.45)
    assert student.grad is not None
    assert student.grad.tolist() == [0.0, 0.0, -0.25]
    assert student_tail.grad is not None
    assert student_tail.grad.tolist() == pytest.approx([0.0, 0.0, -0.4])


# --------------------------------------------------------------------------------------------
# Text of an unknown policy


def test_the_shaped_probability_by_hand() -> None:
    # Probabilities 0.1, 0.3 and 0.9 at c = 0.1: f = 1/2, 3/4 and 9/10, f (1 - f) = 1/4, 3/16, 9/100
    loss, slope = loss_and_slope(
        lambda x: surrogate.shaped_probability(x, tensor(2.0, 2.0, -2.0), half_at=0.1),
        tensor(0.1, 0.3, 0.9).log(),
    )
    assert loss.tolist() == pytest.approx([-1.0, -1.5, 1.8], rel=1e-12)
    assert slope.tolist() == pytest.approx([-1 / 2, -3 / 8, 0.18], rel=1e-12)


@given(st.floats(-20, 0), real, st.floats(0.001, 2))
def test_the_shaped_probability_weighs_the_score_by_a_quarter_at_most_and_most_at_c(
    logp: float, advantage: float, c: float
) -> None:
    _, slope = loss_and_slope(
        lambda x: surrogate.shaped_probability(x, tensor(advantage), half_at=c), tensor(logp)
    )
    _, at_c = loss_and_slope(
        lambda x: surrogate.shaped_probability(x, tensor(advantage), half_at=c), tensor(math.log(c))
    )
    assert float(at_c) == pytest.approx(-advantage / 4, rel=1e-12)
    assert abs(float(slope)) <= abs(advantage) / 4 * (1 + 1e-12)
    assert float(slope) * advantage <= 0
    share = math.exp(logp) / (math.exp(logp) + c)
    assert float(slope) == pytest.approx(-advantage * share * (1 - share), rel=1e-9, abs=1e-15)


def test_a_token_that_the_student_cannot_say_or_always_says_makes_no_nan() -> None:
    loss, slope = loss_and_slope(
        lambda x: surrogate.shaped_probability(x, tensor(1.0, 1.0, 0.0), half_at=0.1),
        tensor(NONE, 0.0, NONE),
    )
    assert loss.tolist() == pytest.approx([0.0, -1 / 1.1, 0.0])
    assert slope.tolist() == pytest.approx([0.0, -0.1 / 1.1**2, 0.0])
    held = tensor(2.0).requires_grad_()
    assert not surrogate.shaped_probability(tensor(-1.0), held, half_at=0.1).requires_grad


@pytest.mark.parametrize("half_at", [0.0, -0.1, math.nan])
def test_a_probability_of_one_half_that_is_none_is_refused(half_at: float) -> None:
    with pytest.raises(ValueError, match=f"half_at is a probability > 0, got {half_at}"):
        surrogate.shaped_probability(OLD, POSITIVE, half_at=half_at)

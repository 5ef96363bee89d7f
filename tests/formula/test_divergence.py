from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.formula import divergence, support
from opd.schedule import Linear
from tests.reference import divergences as ref

F64 = torch.float64
JSD_WEIGHTS = (0.1, 0.5, 0.9)
Case = tuple[str, dict[str, float]]
DIVERGENCES: list[Case] = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *(("generalized_jsd", {"teacher_weight": w}) for w in JSD_WEIGHTS),
    *(("skew_forward_kl", {"skew": skew}) for skew in (0.1, 0.7)),
    *(("skew_reverse_kl", {"skew": skew}) for skew in (0.1, 0.7)),
    *(("alpha_divergence", {"alpha": alpha}) for alpha in (-0.5, 0.2, 0.5, 1.7)),
    ("squared_hellinger", {}),
    *(("power_divergence", {"power": power}) for power in (0.3, 1.0, 2.5)),
    ("total_variation", {}),
    *(("renyi_divergence", {"order": order}) for order in (0.2, 0.5, 0.7)),
    ("jensen_shannon", {}),
]
F_DIVERGENCES = [case for case in DIVERGENCES if case[0] != "power_divergence"]
# Total variation has kinks, and within rounding of one its slope is the sign of the rounding.
SMOOTH = [case for case in DIVERGENCES if case[0] != "total_variation"]


def labels(chosen: list[Case]) -> list[str]:
    return ["-".join([name, *(str(value) for value in knobs.values())]) for name, knobs in chosen]


def each(chosen: list[Case]) -> Any:
    return pytest.mark.parametrize(("name", "knobs"), chosen, ids=labels(chosen))


each_divergence = each(DIVERGENCES)

SUPPORTS: dict[str, list[int]] = {
    "sampled": [3],
    "top-k": [4, 1, 3],
    "union": [0, 2, -1, 5, -1],
    "intersection": [-1, -1, 6],
    "everything": list(range(9)),
}


def compared(log_probs: Tensor, kept: list[int], tail: str, side: Any) -> Tensor:
    ids = torch.tensor(kept).expand(*log_probs.shape[:-1], -1)
    return support.restrict_by_tail(log_probs, ids, tail=tail, side=side)


def on_support(
    name: str, knobs: dict[str, float], teacher: Tensor, kept: list[int], tail: str
) -> Callable[[Tensor], Tensor]:
    """The divergence as a function of the student's logits over the vocabulary."""

    def value(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        view = teacher.log_softmax(-1).expand_as(log_probs)
        sides = (
            compared(log_probs, kept, tail, "student"),
            compared(view, kept, tail, "teacher"),
        )
        return ours(name, knobs)(*sides)

    return value


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Any:
    """Fourth-order central differences: the error is far below 1e-10."""
    step = 1e-3
    moves = step * torch.eye(len(at), dtype=F64)
    near = function(at + moves) - function(at - moves)
    far = function(at + 2 * moves) - function(at - 2 * moves)
    return ((8 * near - far) / (12 * step)).numpy()


def defined(name: str, knobs: dict[str, float], tail: str) -> bool:
    if tail == "truncate":
        return name in divergence.ON_RAW_ENTRIES
    restricted = tail == "teacher_renormalise"
    return not (restricted and divergence.is_infinite_on_restricted_teacher(name, knobs))


def where_defined(chosen: list[Case]) -> Any:
    cases = [
        (name, knobs, tail)
        for name, knobs in chosen
        for tail in support.TAILS
        if defined(name, knobs, tail)
    ]
    names = [f"{labels([(name, knobs)])[0]}-{tail}" for name, knobs, tail in cases]
    return pytest.mark.parametrize(("name", "knobs", "tail"), cases, ids=names)


def ours(name: str, knobs: dict[str, float]) -> Callable[[Tensor, Tensor], Tensor]:
    def call(student: Tensor, teacher: Tensor) -> Tensor:
        result: Tensor = getattr(divergence, name)(student, teacher, **knobs)
        return result

    return call


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([math.log(p) if p else -math.inf for p in probabilities], dtype=F64)


def pair(seed: int, vocab_size: int = 9) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, vocab_size, generator=draw, dtype=F64)
    return student, teacher


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[float, Any]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad.numpy()


def test_values_by_hand() -> None:
    student, teacher = logs(0.5, 0.5), logs(0.25, 0.75)
    assert float(divergence.forward_kl(student, teacher)) == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-15
    )
    assert float(divergence.reverse_kl(student, teacher)) == pytest.approx(
        0.5 * math.log(4 / 3), abs=1e-15
    )
    certain = divergence.generalized_jsd(logs(1.0, 0.0), logs(0.0, 1.0), teacher_weight=0.5)
    assert float(certain) == pytest.approx(math.log(2), abs=1e-15)
    # the mixtures below are (3/8, 5/8) and the roots sqrt(1/8), sqrt(3/8)
    assert float(divergence.skew_forward_kl(student, teacher, skew=0.5)) == pytest.approx(
        0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5), abs=1e-15
    )
    assert float(divergence.skew_reverse_kl(student, teacher, skew=0.5)) == pytest.approx(
        0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5), abs=1e-15
    )
    hellinger = 1 - math.sqrt(1 / 8) - math.sqrt(3 / 8)
    assert float(divergence.squared_hellinger(student, teacher)) == pytest.approx(
        hellinger, abs=1e-15
    )
    # alpha = 2: (1 - (1/16 + 9/16) / (1/2)) / -2 = 1/8; alpha = -1: (1 - (1/4) / (3/16)) / -2
    for alpha, value in ((0.5, 4 * hellinger), (2.0, 1 / 8), (-1.0, 1 / 6)):
        result = divergence.alpha_divergence(student, teacher, alpha=alpha)
        assert float(result) == pytest.approx(value, abs=1e-15)
    # power = 2: sum of s^3 / 6 - s t^2 / 2 + t^3 / 3 = 1/24 - 5/32 + 7/48
    for power, value in ((1.0, 1 / 16), (2.0, 1 / 32)):
        result = divergence.power_divergence(student, teacher, power=power)
        assert float(result) == pytest.approx(value, abs=1e-15)
    # order 1/2: -2 log of the sum of the roots; and the middle is (3/8, 5/8)
    renyi = divergence.renyi_divergence(student, teacher, order=0.5)
    assert float(renyi) == pytest.approx(-2 * math.log(1 - hellinger), abs=1e-15)
    middle = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    middle += 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    assert float(divergence.jensen_shannon(student, teacher)) == pytest.approx(
        middle / 2, abs=1e-15
    )
    assert float(divergence.total_variation(student, teacher)) == 0.25
    assert float(divergence.student_entropy(logs(0.5, 0.5, 0.0))) == pytest.approx(math.log(2))
    assert float(divergence.teacher_entropy(logs(1.0, 0.0))) == 0.0


@each_divergence
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_agree_with_the_transcription(
    name: str, knobs: dict[str, float], seed: int
) -> None:
    student, teacher = pair(seed)
    value, gradient = value_and_gradient(
        lambda logits: ours(name, knobs)(logits.log_softmax(-1), teacher.log_softmax(-1)), student
    )
    rows = ref.log_softmax(student), ref.log_softmax(teacher)
    assert value == pytest.approx(getattr(ref, name)(*rows, **knobs), abs=1e-12)
    assert np.abs(gradient - getattr(ref, f"{name}_gradient")(*rows, **knobs)).max() <= 1e-12


@where_defined(DIVERGENCES)
def test_every_divergence_on_every_support_and_tail_agrees_with_the_transcription(
    name: str, knobs: dict[str, float], tail: str
) -> None:
    student, teacher = pair(17)

    def transcribed(*sides: Any) -> float:
        result: float = getattr(ref, name)(*sides, **knobs)
        return result

    def log_slope(*sides: Any) -> Any:
        return getattr(ref, f"{name}_log_slope")(*sides, **knobs)

    for label, kept in SUPPORTS.items():
        value, gradient = value_and_gradient(on_support(name, knobs, teacher, kept, tail), student)
        rows = ref.log_softmax(student), ref.log_softmax(teacher), kept
        expected = ref.divergence_by_tail(transcribed, *rows, tail=tail)
        assert value == pytest.approx(expected, abs=1e-12), label
        slope = ref.gradient_by_tail(log_slope, *rows, tail=tail)
        assert np.abs(gradient - slope).max() <= 1e-10, label


@where_defined(SMOOTH)
def test_every_gradient_on_every_support_and_tail_is_the_slope_of_its_value(
    name: str, knobs: dict[str, float], tail: str
) -> None:
    student, teacher = pair(23)
    for label, kept in SUPPORTS.items():
        function = on_support(name, knobs, teacher, kept, tail)
        _, gradient = value_and_gradient(function, student)
        assert np.abs(gradient - finite_differences(function, student)).max() <= 1e-10, label


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "teacher_renormalise"])
def test_total_variation_has_the_slope_of_its_value_away_from_ties(tail: str) -> None:
    student, teacher = pair(23)
    for kept in SUPPORTS.values():
        function = on_support("total_variation", {}, teacher, kept, tail)
        _, gradient = value_and_gradient(function, student)
        present = [v for v in kept if v >= 0]
        if len(present) == 1 and tail == "renormalise":
            assert np.abs(gradient).max() == 0  # one entry, always equal: a tie
        else:
            assert np.abs(gradient - finite_differences(function, student)).max() <= 1e-10


def test_total_variation_has_no_slope_at_a_tie() -> None:
    leaf = logs(0.5, 0.3, 0.2).requires_grad_()
    divergence.total_variation(leaf, logs(0.5, 0.1, 0.4)).backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == pytest.approx([0.0, 0.15, -0.1], abs=1e-15)


distributions = st.lists(st.floats(-8, 8), min_size=4, max_size=4).map(
    lambda logits: torch.tensor(logits, dtype=F64).log_softmax(-1)
)


@each_divergence
@settings(max_examples=50)
@given(student=distributions, teacher=distributions)
def test_never_negative_and_zero_for_equal_inputs(
    name: str, knobs: dict[str, float], student: Tensor, teacher: Tensor
) -> None:
    formula = ours(name, knobs)
    rounding = 1e-15 / (1 - knobs.get("order", 0.0))  # Renyi's is divided by that
    assert float(formula(student, teacher)) >= -rounding
    assert float(formula(student, student.clone())) == pytest.approx(0, abs=rounding)
    # a power divergence does not see differences among entries of little mass, within rounding
    seen = (student.exp() - teacher.exp()) if name == "power_divergence" else (student - teacher)
    if seen.abs().max() > 1e-3:
        assert float(formula(student, teacher)) > 0


@given(student=distributions, teacher=distributions, weight=st.sampled_from(JSD_WEIGHTS))
def test_the_jsd_is_symmetric_under_exchange_and_bounded(
    student: Tensor, teacher: Tensor, weight: float
) -> None:
    value = divergence.generalized_jsd(student, teacher, teacher_weight=weight)
    swapped = divergence.generalized_jsd(teacher, student, teacher_weight=1 - weight)
    entropy = -weight * math.log(weight) - (1 - weight) * math.log(1 - weight)
    assert float(value) == pytest.approx(float(swapped), abs=1e-14)
    assert float(value) <= entropy + 1e-12


def test_the_jsd_over_its_weight_tends_to_the_kls() -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair(5))
    small = 1e-6
    low = divergence.generalized_jsd(student, teacher, teacher_weight=small) / small
    high = divergence.generalized_jsd(student, teacher, teacher_weight=1 - small) / small
    assert float(low) == pytest.approx(float(divergence.forward_kl(student, teacher)), rel=1e-4)
    assert float(high) == pytest.approx(float(divergence.reverse_kl(student, teacher)), rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, 1.5])
def test_the_jsd_refuses_its_end_points(weight: float) -> None:
    with pytest.raises(ValueError, match="use forward_kl or reverse_kl"):
        divergence.generalized_jsd(logs(0.5, 0.5), logs(0.5, 0.5), teacher_weight=weight)


@pytest.mark.parametrize("formula", [divergence.skew_forward_kl, divergence.skew_reverse_kl])
@pytest.mark.parametrize("skew", [0.0, 1.0, -0.1, 1.5])
def test_skew_divergences_refuse_their_end_points(
    formula: Callable[..., Tensor], skew: float
) -> None:
    with pytest.raises(ValueError, match=f"got {skew}; .*use (forward|reverse)_kl"):
        formula(logs(0.5, 0.5), logs(0.5, 0.5), skew=skew)


@pytest.mark.parametrize(("alpha", "limit"), [(0.0, "reverse_kl"), (1.0, "forward_kl")])
def test_the_alpha_divergence_names_its_limits(alpha: float, limit: str) -> None:
    with pytest.raises(ValueError, match=f"neither 0 nor 1, .* {limit}"):
        divergence.alpha_divergence(logs(0.5, 0.5), logs(0.5, 0.5), alpha=alpha)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_the_power_divergence_refuses_a_power_that_is_not_positive(power: float) -> None:
    with pytest.raises(ValueError, match="power must be > 0"):
        divergence.power_divergence(logs(0.5, 0.5), logs(0.5, 0.5), power=power)


LIMITS: list[tuple[str, str, float, str]] = [
    ("alpha_divergence", "alpha", 1e-7, "reverse_kl"),
    ("alpha_divergence", "alpha", -1e-7, "reverse_kl"),
    ("alpha_divergence", "alpha", 1 - 1e-7, "forward_kl"),
    ("alpha_divergence", "alpha", 1 + 1e-7, "forward_kl"),
    ("power_divergence", "power", 1e-6, "reverse_kl"),
    ("renyi_divergence", "order", 1 - 1e-7, "forward_kl"),
    ("skew_forward_kl", "skew", 1e-8, "forward_kl"),
    ("skew_reverse_kl", "skew", 1e-8, "reverse_kl"),
]


@pytest.mark.parametrize(("name", "knob", "value", "limit"), LIMITS)
def test_divergences_tend_to_the_kls_with_their_gradients(
    name: str, knob: str, value: float, limit: str
) -> None:
    student, teacher = pair(5)

    def at(name: str, knobs: dict[str, float]) -> tuple[float, Any]:
        formula = ours(name, knobs)
        return value_and_gradient(
            lambda logits: formula(logits.log_softmax(-1), teacher.log_softmax(-1)), student
        )

    near, exact = at(name, {knob: value}), at(limit, {})
    assert near[0] == pytest.approx(exact[0], rel=1e-4)
    assert np.abs(near[1] - exact[1]).max() <= 1e-4


def test_the_alpha_divergence_keeps_its_digits_where_one_minus_the_overlap_has_none() -> None:
    student = logs(0.3, 0.7)
    teacher = (student + torch.tensor([7e-7, -3e-7], dtype=F64)).log_softmax(-1)
    # to second order every alpha-divergence is half the student's variance of the log ratio:
    # the log ratio is 1e-6 * (0.7, -0.3), of variance 0.21e-12
    for alpha in (-1.0, 1e-6, 0.5, 1 - 1e-6, 2.0):
        value = divergence.alpha_divergence(student, teacher, alpha=alpha)
        assert float(value) == pytest.approx(0.105e-12, rel=1e-2)


def test_four_squared_hellinger_distances_are_one_alpha_divergence() -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair(8))
    assert 4 * float(divergence.squared_hellinger(student, teacher)) == pytest.approx(
        float(divergence.alpha_divergence(student, teacher, alpha=0.5)), rel=1e-14
    )


@given(student=distributions, teacher=distributions)
def test_bounds(student: Tensor, teacher: Tensor) -> None:
    assert float(divergence.squared_hellinger(student, teacher)) <= 1
    assert float(divergence.total_variation(student, teacher)) <= 1 + 1e-15
    for skew in (0.05, 0.5):
        bound = math.log(1 / skew) + 1e-14
        assert float(divergence.skew_forward_kl(student, teacher, skew=skew)) <= bound
        assert float(divergence.skew_reverse_kl(student, teacher, skew=skew)) <= bound
    total_variation = float(divergence.total_variation(student, teacher))
    reverse_kl = float(divergence.reverse_kl(student, teacher))
    assert total_variation <= math.sqrt(reverse_kl / 2 + 1e-15) + 1e-15  # Pinsker


# --------------------------------------------------------------------------------------------
# Zero mass


BOTH, WITHOUT_LAST = logs(0.4, 0.4, 0.2), logs(0.5, 0.5, 0.0)


def infinite_without(side: str, name: str, knobs: dict[str, float]) -> bool:
    if side == "student":
        return name == "forward_kl" or knobs.get("alpha", 0.5) > 1
    return name == "reverse_kl" or knobs.get("alpha", 0.5) < 0


@each_divergence
def test_infinite_exactly_where_the_mathematics_is(name: str, knobs: dict[str, float]) -> None:
    formula = ours(name, knobs)
    without_student = float(formula(WITHOUT_LAST, BOTH))
    without_teacher = float(formula(BOTH, WITHOUT_LAST))
    assert (without_student == math.inf) == infinite_without("student", name, knobs)
    assert (without_teacher == math.inf) == infinite_without("teacher", name, knobs)
    for value, sides in (
        (without_student, (WITHOUT_LAST, BOTH)),
        (without_teacher, (BOTH, WITHOUT_LAST)),
    ):
        assert value == pytest.approx(getattr(ref, name)(*sides, **knobs), abs=1e-14)
        assert value > 0


@each_divergence
def test_what_is_infinite_on_a_restricted_teacher_says_so(
    name: str, knobs: dict[str, float]
) -> None:
    value = float(ours(name, knobs)(BOTH, WITHOUT_LAST))
    assert divergence.is_infinite_on_restricted_teacher(name, knobs) == (value == math.inf)


def test_a_schedule_that_reaches_an_infinite_alpha_counts_as_infinite() -> None:
    def infinite(start: float, end: float) -> bool:
        knobs = {"alpha": Linear(start, end, steps=10)}
        return divergence.is_infinite_on_restricted_teacher("alpha_divergence", knobs)

    assert infinite(0.5, -0.5)
    assert infinite(-0.5, 0.5)
    assert not infinite(0.2, 0.9)


@each([*DIVERGENCES, ("truncated_reverse_kl", {})])
@pytest.mark.parametrize("sides", [(WITHOUT_LAST, BOTH), (BOTH, WITHOUT_LAST)])
def test_a_row_without_mass_leaves_finite_gradients_in_itself_and_in_the_others(
    name: str, knobs: dict[str, float], sides: tuple[Tensor, Tensor]
) -> None:
    regular = logs(0.2, 0.3, 0.5)
    student = torch.stack([sides[0], regular]).requires_grad_()
    teacher = torch.stack([sides[1], logs(0.3, 0.3, 0.4)]).requires_grad_()
    value = ours(name, knobs)(student, teacher)
    assert not value.isnan().any()
    # what the loss does with a row that it does not look at
    torch.where(torch.tensor([False, True]), value, 0.0).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[0] == 0).all()
    alone = regular.clone().requires_grad_()
    ours(name, knobs)(alone, logs(0.3, 0.3, 0.4)).backward()
    assert alone.grad is not None
    assert torch.equal(student.grad[1], alone.grad)


@each([case for case in DIVERGENCES if not infinite_without("student", *case)])
def test_the_logit_gradient_at_a_massless_student_entry_is_the_limit(
    name: str, knobs: dict[str, float]
) -> None:
    # alpha > 1/2 and power < 1 included: slopes that are infinite in probability, not in logits
    logits = torch.tensor([0.3, -0.2, -math.inf], dtype=F64)
    formula = ours(name, knobs)

    def gradient(at: Tensor) -> Any:
        return value_and_gradient(lambda leaf: formula(leaf.log_softmax(-1), BOTH), at)[1]

    close = gradient(torch.tensor([0.3, -0.2, -200.0], dtype=F64))
    assert np.abs(gradient(logits) - close).max() <= 1e-10
    assert gradient(logits)[-1] == 0


@each([*DIVERGENCES, ("truncated_reverse_kl", {})])
@pytest.mark.parametrize("tail", support.TAILS)
def test_nothing_is_compared_on_an_empty_support(
    name: str, knobs: dict[str, float], tail: str
) -> None:
    student, teacher = pair(4)
    value, gradient = value_and_gradient(on_support(name, knobs, teacher, [-1, -1], tail), student)
    assert value == pytest.approx(0, abs=1e-14)
    assert np.abs(gradient).max() <= 1e-14


@each_divergence
@pytest.mark.parametrize("gap", [60.0, 300.0])
def test_extreme_ratios_never_become_nan_in_float32(
    name: str, knobs: dict[str, float], gap: float
) -> None:
    student = torch.tensor([[0.0, -gap, 0.0], [0.0, 0.0, -gap]]).log_softmax(-1)
    teacher = student.flip(0).clone()
    leaf = student.clone().requires_grad_()
    value = ours(name, knobs)(leaf, teacher)
    assert not value.isnan().any()
    assert (value > 0).all()
    torch.where(value.isfinite(), value, 0.0).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@each_divergence
def test_an_entry_that_is_empty_on_both_sides_changes_nothing(
    name: str, knobs: dict[str, float]
) -> None:
    student, teacher = pair(3)
    hole = torch.tensor([-math.inf], dtype=F64)
    formula = ours(name, knobs)
    plain = value_and_gradient(
        lambda logits: formula(logits.log_softmax(-1), teacher.log_softmax(-1)), student
    )
    holed = value_and_gradient(
        lambda logits: formula(logits.log_softmax(-1), torch.cat([teacher, hole]).log_softmax(-1)),
        torch.cat([student, hole]),
    )
    assert holed[0] == pytest.approx(plain[0], abs=1e-15)
    assert np.abs(holed[1][:-1] - plain[1]).max() <= 1e-15
    assert holed[1][-1] == 0


# --------------------------------------------------------------------------------------------
# Fixed points and pathologies of the tail rules

KEPT = [0, 1, 2]
"""The support of the tests below, of a vocabulary of six."""


def conditional(logits: Tensor) -> Tensor:
    return logits[KEPT].log_softmax(-1)


def with_mass(inside: Tensor, outside: Tensor, mass: float) -> Tensor:
    """Logits of a student with that conditional on the support, that outside, and that mass."""
    return torch.cat(
        [inside.log_softmax(-1) + math.log(mass), outside.log_softmax(-1) + math.log1p(-mass)]
    )


def gradient_at(
    student: Tensor, teacher: Tensor, tail: str, name: str, knobs: dict[str, float] | None = None
) -> Any:
    return value_and_gradient(on_support(name, knobs or {}, teacher, KEPT, tail), student)[1]


def descend(function: Callable[[Tensor], Tensor], start: Tensor, rate: float, steps: int) -> Tensor:
    at = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(function(at), at)
        at = (at - rate * gradient).detach().requires_grad_()
    return at.detach()


@each(SMOOTH)
@pytest.mark.parametrize("mass", [0.05, 0.5, 0.95])
def test_renormalised_on_both_sides_any_mass_on_the_support_is_stationary(
    name: str, knobs: dict[str, float], mass: float
) -> None:
    draw, teacher = pair(31, 6)
    student = with_mass(teacher[:3], draw[3:], mass)
    assert np.abs(gradient_at(student, teacher, "renormalise", name, knobs)).max() <= 1e-14
    # and nothing ever pulls on an entry outside
    elsewhere = gradient_at(draw, teacher, "renormalise", name, knobs)
    assert np.abs(elsewhere[3:]).max() <= 1e-15
    assert np.abs(elsewhere[:3]).max() > 1e-3


@each(SMOOTH)
def test_with_a_bucket_the_tails_shape_is_free_but_not_its_mass(
    name: str, knobs: dict[str, float]
) -> None:
    draw, teacher = pair(32, 6)
    mass = float(teacher.softmax(-1)[:3].sum())
    student = with_mass(teacher[:3], draw[3:], mass)
    assert np.abs(gradient_at(student, teacher, "bucket", name, knobs)).max() <= 1e-14
    other = with_mass(teacher[:3], draw[3:], mass / 2)
    assert np.abs(gradient_at(other, teacher, "bucket", name, knobs)).max() > 1e-3


@each([case for case in DIVERGENCES if defined(*case, "teacher_renormalise")])
def test_a_restricted_teacher_drains_the_tail_and_moves_a_student_that_equals_it(
    name: str, knobs: dict[str, float]
) -> None:
    _, teacher = pair(33, 6)
    at_teacher = gradient_at(teacher, teacher, "teacher_renormalise", name, knobs)
    assert (at_teacher[3:] > 1e-4).all()  # descent lowers every logit of the tail


def test_a_restricted_teacher_drives_the_tail_to_zero_and_the_rest_to_its_conditional() -> None:
    draw, teacher = pair(33, 6)
    loss = on_support("forward_kl", {}, teacher, KEPT, "teacher_renormalise")
    masses = []
    student = draw
    for _ in range(3):
        student = descend(loss, student, rate=2.0, steps=200)
        masses.append(float(student.softmax(-1)[3:].sum()))
    assert masses[0] > masses[1] > masses[2]
    # d log p / dt = -p for each of the three entries outside: below 1 / t
    assert masses[2] < 3 / (2 * 600)
    assert (conditional(student).exp() - conditional(teacher).exp()).abs().max() < 1e-3
    # the gradient in closed form: the student less the teacher's conditional
    expected = teacher.softmax(-1)
    expected[3:] = 0
    expected = draw.softmax(-1) - expected / expected.sum()
    gradient = gradient_at(draw, teacher, "teacher_renormalise", "forward_kl")
    assert np.abs(gradient - expected.numpy()).max() <= 1e-14


@each([case for case in F_DIVERGENCES if defined(*case, "teacher_renormalise")])
def test_a_restricted_teacher_with_a_bucket_is_the_whole_divergence_to_it(
    name: str, knobs: dict[str, float]
) -> None:
    student, teacher = pair(34, 6)
    whole = torch.cat([conditional(teacher), torch.full((3,), -math.inf, dtype=F64)])
    exact = ours(name, knobs)(student.log_softmax(-1), whole)
    value = on_support(name, knobs, teacher, KEPT, "teacher_renormalise")(student)
    assert float(value) == pytest.approx(float(exact), rel=1e-13)


@each(F_DIVERGENCES)
@pytest.mark.parametrize("seed", range(3))
def test_a_bucket_never_raises_an_f_divergence(
    name: str, knobs: dict[str, float], seed: int
) -> None:
    student, teacher = pair(seed, 6)
    whole = ours(name, knobs)(student.log_softmax(-1), teacher.log_softmax(-1))
    bucketed = on_support(name, knobs, teacher, KEPT, "bucket")(student)
    assert float(bucketed) < float(whole)


def test_a_bucket_may_raise_a_power_divergence() -> None:
    student, teacher = logs(0.4, 0.3, 0.3), logs(0.8, 0.1, 0.1)
    # power 1: half of 0.16 + 0.04 + 0.04, and half of 0.16 + 0.16 with the last two in one
    whole = divergence.power_divergence(student, teacher, power=1.0)
    bucketed = on_support("power_divergence", {"power": 1.0}, teacher, [0], "bucket")(student)
    assert float(whole) == pytest.approx(0.12)
    assert float(bucketed) == pytest.approx(0.16)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_bucket_hides_is_the_kl_within_the_tail_times_its_mass(seed: int) -> None:
    student, teacher = pair(seed, 6)
    tails = student[3:].log_softmax(-1), teacher[3:].log_softmax(-1)
    for name, owner in (("forward_kl", teacher), ("reverse_kl", student)):
        formula = ours(name, {})
        whole = formula(student.log_softmax(-1), teacher.log_softmax(-1))
        bucketed = on_support(name, {}, teacher, KEPT, "bucket")(student)
        hidden = owner.softmax(-1)[3:].sum() * formula(*tails)
        assert float(whole - bucketed) == pytest.approx(float(hidden), abs=1e-14)


def test_a_forward_kl_on_raw_entries_is_that_of_the_conditionals_and_the_masses() -> None:
    signs = set()
    for seed in range(6):
        student, teacher = pair(seed, 6)
        held, covered = (float(side.softmax(-1)[:3].sum()) for side in (teacher, student))
        value = float(on_support("forward_kl", {}, teacher, KEPT, "truncate")(student))
        inside = float(divergence.forward_kl(conditional(student), conditional(teacher)))
        assert value == pytest.approx(held * (inside + math.log(held / covered)), abs=1e-14)
        signs.add(value > 0)
        restricted = gradient_at(student, teacher, "teacher_renormalise", "forward_kl")
        raw = gradient_at(student, teacher, "truncate", "forward_kl")
        assert np.abs(raw - held * restricted).max() <= 1e-14
    assert signs == {True, False}


@pytest.mark.parametrize("seed", range(4))
def test_a_live_raw_reverse_kl_is_the_stop_gradient_one_plus_the_gradient_of_the_mass(
    seed: int,
) -> None:
    student, teacher = pair(seed, 6)
    live = gradient_at(student, teacher, "truncate", "reverse_kl")
    stopped = gradient_at(student, teacher, "truncate", "truncated_reverse_kl")
    _, mass = value_and_gradient(lambda logits: logits.softmax(-1)[KEPT].sum(), student)
    assert np.abs(live - (stopped + mass)).max() <= 1e-14
    value = [
        float(on_support(name, {}, teacher, KEPT, "truncate")(student))
        for name in ("reverse_kl", "truncated_reverse_kl")
    ]
    assert value[0] == pytest.approx(value[1], abs=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_the_stop_gradient_reverse_kl_has_the_declared_gradient(seed: int) -> None:
    student, teacher = pair(seed, 6)
    gradient = gradient_at(student, teacher, "truncate", "truncated_reverse_kl")
    share = student.softmax(-1).tolist()
    log_ratio = (student.log_softmax(-1) - teacher.log_softmax(-1)).tolist()
    # pi_j (h_j - mean of h) with h = log(pi / q) on the support and 0 outside
    slopes = [log_ratio[v] if v in KEPT else 0.0 for v in range(6)]
    mean = sum(p * h for p, h in zip(share, slopes, strict=True))
    expected = [p * (h - mean) for p, h in zip(share, slopes, strict=True)]
    assert np.abs(gradient - np.array(expected)).max() <= 1e-14


def test_the_stop_gradient_kl_leaves_the_tail_free_and_the_live_one_drains_the_support() -> None:
    draw, teacher = pair(36, 6)
    mass = float(teacher.softmax(-1)[:3].sum())
    student = with_mass(teacher[:3], draw[3:], mass)
    stopped = gradient_at(student, teacher, "truncate", "truncated_reverse_kl")
    assert np.abs(stopped).max() <= 1e-14
    live = on_support("reverse_kl", {}, teacher, KEPT, "truncate")
    drained = descend(live, student, rate=0.5, steps=200)
    assert float(drained.softmax(-1)[:3].sum()) < 0.7 * mass


def test_the_stop_gradient_reverse_kl_is_the_reverse_kl_where_nothing_is_truncated() -> None:
    student, teacher = pair(37)
    rows = [
        value_and_gradient(
            lambda logits, name=name: ours(name, {})(
                logits.log_softmax(-1), teacher.log_softmax(-1)
            ),
            student,
        )
        for name in ("reverse_kl", "truncated_reverse_kl")
    ]
    assert rows[0][0] == pytest.approx(rows[1][0], abs=1e-15)
    assert np.abs(rows[0][1] - rows[1][1]).max() <= 1e-15


@each_divergence
def test_off_the_teacher_a_student_with_mass_everywhere_always_feels_a_gradient(
    name: str, knobs: dict[str, float]
) -> None:
    for seed in range(5):
        student, teacher = pair(seed, 5)
        at = value_and_gradient(
            lambda logits, teacher=teacher: ours(name, knobs)(
                logits.log_softmax(-1), teacher.log_softmax(-1)
            ),
            student,
        )[1]
        assert np.abs(at).max() > 1e-3


# --------------------------------------------------------------------------------------------
# Estimators from the sampled token


def expected_gradient(
    estimator: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
) -> Any:
    """The mean over tokens of the student of the back-propagated estimator, by enumeration."""
    total = np.zeros(len(student))
    for token, probability in enumerate(student.softmax(-1).tolist()):
        _, gradient = value_and_gradient(
            lambda logits, token=token: estimator(
                logits.log_softmax(-1)[token], teacher.log_softmax(-1)[token]
            ),
            student,
        )
        total += probability * gradient
    return total


@pytest.mark.parametrize(
    ("estimator", "target"),
    [
        (divergence.reverse_kl_k2, divergence.reverse_kl),
        (divergence.forward_kl_k3, divergence.forward_kl),
    ],
)
def test_estimators_have_the_gradient_they_are_named_for(
    estimator: Callable[[Tensor, Tensor], Tensor], target: Callable[[Tensor, Tensor], Tensor]
) -> None:
    student, teacher = pair(41)
    _, exact = value_and_gradient(
        lambda logits: target(logits.log_softmax(-1), teacher.log_softmax(-1)), student
    )
    assert np.abs(expected_gradient(estimator, student, teacher) - exact).max() <= 1e-13
    # k1 back-propagated: the teacher drops out
    k1 = expected_gradient(lambda mine, theirs: mine - theirs, student, teacher)
    assert np.abs(k1).max() <= 1e-15


def test_the_value_of_k3_is_the_reverse_kl_in_the_mean_and_that_of_k2_is_no_kl() -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair(42))
    k2 = (student.exp() * divergence.reverse_kl_k2(student, teacher)).sum()
    k3 = (student.exp() * divergence.forward_kl_k3(student, teacher)).sum()
    reverse = divergence.reverse_kl(student, teacher)
    forward = divergence.forward_kl(student, teacher)
    assert float(k3) == pytest.approx(float(reverse), abs=1e-13)
    assert abs(float(k2 - reverse)) > 0.01
    assert abs(float(k2 - forward)) > 0.01


def test_estimators_by_hand_and_where_a_side_has_no_mass() -> None:
    student = torch.tensor([math.log(0.5), math.log(0.5), -300.0, -math.inf]).double()
    teacher = torch.tensor([math.log(0.25), -math.inf, -1.0, -1.0]).double()
    for estimator, first in (
        (divergence.reverse_kl_k2, 0.5 * math.log(2) ** 2),
        (divergence.forward_kl_k3, 0.5 - 1 + math.log(2)),
    ):
        leaf = student.to(torch.float32).requires_grad_()
        value = estimator(leaf, teacher.to(torch.float32))
        assert float(value[0].detach()) == pytest.approx(first, rel=1e-6)
        assert value[1] == math.inf
        assert value[3] == math.inf
        torch.where(value.isfinite(), value, 0.0).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_the_reverse_kl_gives_nothing_to_what_the_student_never_uses() -> None:
    student = torch.tensor([0.0, 0.0, -60.0], dtype=F64)
    _, gradient = value_and_gradient(
        lambda logits: divergence.reverse_kl(logits.log_softmax(-1), logs(0.1, 0.1, 0.8)), student
    )
    assert abs(gradient[2]) < 1e-20


@given(student=distributions)
def test_entropy_lies_between_zero_and_log_k(student: Tensor) -> None:
    entropy = float(divergence.student_entropy(student))
    assert -1e-15 <= entropy <= math.log(4) + 1e-15
    assert entropy == float(divergence.teacher_entropy(student))


# --------------------------------------------------------------------------------------------
# Renyi and Jensen-Shannon


@given(student=distributions, teacher=distributions)
def test_the_jensen_shannon_is_symmetric_bounded_and_the_generalized_one_at_a_half(
    student: Tensor, teacher: Tensor
) -> None:
    value = float(divergence.jensen_shannon(student, teacher))
    assert value == pytest.approx(float(divergence.jensen_shannon(teacher, student)), abs=1e-14)
    assert value <= math.log(2) + 1e-14
    half = divergence.generalized_jsd(student, teacher, teacher_weight=0.5)
    assert value == pytest.approx(float(half), abs=1e-14)


def test_without_a_shared_entry_the_jensen_shannon_is_log_two_and_the_renyi_infinite() -> None:
    first, second = logs(0.5, 0.5, 0.0, 0.0), logs(0.0, 0.0, 0.3, 0.7)
    assert float(divergence.jensen_shannon(first, second)) == pytest.approx(math.log(2))
    for order in (0.1, 0.5, 0.9):
        assert float(divergence.renyi_divergence(first, second, order=order)) == math.inf


@given(student=distributions, teacher=distributions, order=st.sampled_from([0.1, 0.5, 0.9]))
def test_the_renyi_divergence_is_a_monotone_function_of_the_alpha_divergence(
    student: Tensor, teacher: Tensor, order: float
) -> None:
    alpha = float(divergence.alpha_divergence(student, teacher, alpha=order))
    overlap = 1 - order * (1 - order) * alpha
    value = float(divergence.renyi_divergence(student, teacher, order=order))
    if overlap > 1e-3:
        assert value == pytest.approx(math.log(overlap) / (order - 1), abs=1e-11)
    # between which it lies, since it grows with the order
    assert value <= float(divergence.forward_kl(student, teacher)) + 1e-13


@pytest.mark.parametrize("order", [0.2, 0.5, 0.9])
def test_the_renyi_gradient_is_that_of_the_alpha_divergence_over_the_overlap_and_in_closed_form(
    order: float,
) -> None:
    logits, other = pair(5)
    student, teacher = logits.log_softmax(-1), other.log_softmax(-1)
    middle = (order * teacher + (1 - order) * student).exp()
    overlap = float(middle.sum())
    found, of_alpha = (
        value_and_gradient(
            lambda at, name=name, knobs=knobs: ours(name, knobs)(at.log_softmax(-1), teacher),
            logits,
        )[1]
        for name, knobs in (
            ("renyi_divergence", {"order": order}),
            ("alpha_divergence", {"alpha": order}),
        )
    )
    closed = student.exp() - middle / overlap
    assert np.abs(found - closed.numpy()).max() <= 1e-14
    assert np.abs(found - order * of_alpha / overlap).max() <= 1e-14


@pytest.mark.parametrize("order", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_the_renyi_divergence_refuses_orders_outside_zero_to_one(order: float) -> None:
    message = f"order must lie strictly between 0 and 1, got {order}"
    with pytest.raises(ValueError, match=message):
        divergence.renyi_divergence(logs(0.5, 0.5), logs(0.5, 0.5), order=order)


# --------------------------------------------------------------------------------------------
# The capped forward KL

CAPS = (1e-3, 0.05, 0.3, 5.0)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "teacher_renormalise"])
@pytest.mark.parametrize("seed", range(3))
def test_the_capped_forward_kl_agrees_with_the_transcription(
    cap: float, tail: str, seed: int
) -> None:
    student, teacher = pair(seed)
    knobs = {"cap": cap}
    for label, kept in SUPPORTS.items():
        value, gradient = value_and_gradient(
            on_support("capped_forward_kl", knobs, teacher, kept, tail), student
        )
        rows = ref.log_softmax(student), ref.log_softmax(teacher), kept

        def transcribed(*sides: Any) -> float:
            return ref.capped_forward_kl(*sides, cap=cap)

        def log_slope(*sides: Any) -> Any:
            return ref.capped_forward_kl_log_slope(*sides, cap=cap)

        expected = ref.divergence_by_tail(transcribed, *rows, tail=tail)
        assert value == pytest.approx(expected, abs=1e-12), label
        slope = ref.gradient_by_tail(log_slope, *rows, tail=tail)
        assert np.abs(gradient - slope).max() <= 1e-12, label


def test_the_capped_forward_kl_by_hand_and_where_it_says_that_it_cut() -> None:
    # Contributions 0.5 log(5 / 2) = 0.458, 0.3 log(3 / 4) = -0.086 and 0.2 log(1 / 2) = -0.139.
    student, teacher = logs(0.2, 0.4, 0.4), logs(0.5, 0.3, 0.2)
    parts = [0.5 * math.log(2.5), 0.3 * math.log(0.75), 0.2 * math.log(0.5)]
    capped = divergence.capped_forward_kl(student, teacher, cap=0.05)
    assert float(capped) == pytest.approx(0.05 + parts[1] + parts[2], abs=1e-15)
    assert float(capped) < 0  # no divergence
    loose = divergence.capped_forward_kl(student, teacher, cap=0.5)
    assert float(loose) == pytest.approx(sum(parts), abs=1e-15)
    assert float(loose) == pytest.approx(float(divergence.forward_kl(student, teacher)), abs=1e-15)
    counted = divergence.capped_forward_kl.counted  # type: ignore[attr-defined]
    both = torch.stack([student, teacher]), torch.stack([teacher, teacher])
    assert counted(*both, cap=0.05).tolist() == [True, False]
    assert counted(*both, cap=0.5).tolist() == [False, False]


@given(student=distributions, teacher=distributions, cap=st.sampled_from(CAPS))
def test_capping_never_raises_the_forward_kl_and_equals_have_none(
    student: Tensor, teacher: Tensor, cap: float
) -> None:
    capped = float(divergence.capped_forward_kl(student, teacher, cap=cap))
    assert capped <= float(divergence.forward_kl(student, teacher)) + 1e-14
    assert capped <= 4 * cap
    _, gradient = value_and_gradient(
        lambda at: divergence.capped_forward_kl(at.log_softmax(-1), teacher, cap=cap), teacher
    )
    assert np.abs(gradient).max() <= 1e-14


def test_a_token_that_the_student_cannot_say_is_cut_off_and_not_taught() -> None:
    leaf = torch.tensor([0.1, 0.3, -math.inf], dtype=F64)
    value, gradient = value_and_gradient(
        lambda at: divergence.capped_forward_kl(at.log_softmax(-1), logs(0.4, 0.4, 0.2), cap=0.05),
        leaf,
    )
    assert math.isfinite(value)
    assert np.isfinite(gradient).all()
    assert gradient[2] == 0
    without = divergence.capped_forward_kl(logs(0.5, 0.5, 0.0), logs(0.5, 0.5, 0.0), cap=0.05)
    assert float(without) == 0


@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
def test_a_cap_that_is_not_positive_is_refused(cap: float) -> None:
    with pytest.raises(ValueError, match=f"cap must be positive, got {cap}"):
        divergence.capped_forward_kl(logs(0.5, 0.5), logs(0.5, 0.5), cap=cap)


# --------------------------------------------------------------------------------------------
# The candidates, each with its own log ratio


def candidates(teacher: Tensor, kept: list[int], tail: str) -> Callable[[Tensor], Tensor]:
    ids = torch.tensor(kept)

    def value(logits: Tensor) -> Tensor:
        student, view = logits.log_softmax(-1), teacher.log_softmax(-1)
        return divergence.candidate_advantage_loss(
            compared(student, kept, tail, "student"),
            support.restrict(student, ids),
            support.restrict(view, ids),
        )

    return value


@pytest.mark.parametrize("tail", ["truncate", "renormalise"])
@pytest.mark.parametrize("seed", range(3))
def test_the_candidates_loss_agrees_with_the_transcription(tail: str, seed: int) -> None:
    student, teacher = pair(seed)
    ours_, theirs = ref.log_softmax(student), ref.log_softmax(teacher)
    for label, kept in SUPPORTS.items():
        value, gradient = value_and_gradient(candidates(teacher, kept, tail), student)
        weight = ref.restrict_by_tail(ours_, kept, tail=tail, side="student")
        sides = ref.restrict(ours_, kept), ref.restrict(theirs, kept)
        expected = ref.candidate_advantage_loss(weight, *sides)
        assert value == pytest.approx(expected, abs=1e-12), label
        slope = ref.candidate_advantage_loss_gradient(ours_, theirs, kept, tail=tail)
        assert np.abs(gradient - slope).max() <= 1e-12, label
        declared = gradient_on(student, teacher, kept)
        mass = sum(math.exp(ours_[v]) for v in kept if v >= 0)
        divided_by = 1.0 if tail == "truncate" else mass
        assert np.abs(gradient - declared / divided_by).max() <= 1e-12, label


def gradient_on(student: Tensor, teacher: Tensor, kept: list[int]) -> Any:
    formula = on_support("truncated_reverse_kl", {}, teacher, kept, "truncate")
    return value_and_gradient(formula, student)[1]


def test_the_candidates_loss_by_hand() -> None:
    # Entries 1/2 and 1/4 of the student, 1/4 and 1/2 of the view: log ratios -log 2 and log 2,
    # times log 1/2 and log 1/4, weighted with 2/3 and 1/3: -(2/3 - 2/3) log(2)^2 = 0; with 1/2 and
    # 1/4 of a truncated student 0 too; alone, the second is 2 log(2)^2 / 4.
    student, view = logs(0.5, 0.25), logs(0.25, 0.5)
    for weights in (logs(2 / 3, 1 / 3), student):
        value = divergence.candidate_advantage_loss(weights, student, view)
        assert float(value) == pytest.approx(0, abs=1e-15)
    alone = divergence.candidate_advantage_loss(student[1:], student[1:], view[1:])
    assert float(alone) == pytest.approx(math.log(2) ** 2 / 2, abs=1e-15)
    # not normalised: a view that is a score of twice the log ratio
    value = divergence.candidate_advantage_loss(student[:1], student[:1], 3 * student[:1])
    assert float(value) == pytest.approx(-0.5 * 2 * math.log(2) ** 2, abs=1e-15)


def test_the_candidates_loss_rests_where_the_two_agree_on_the_support_only() -> None:
    draw, teacher = pair(36, 6)
    mass = float(teacher.softmax(-1)[:3].sum())
    agreeing = with_mass(teacher[:3], draw[3:], mass)
    value, gradient = value_and_gradient(candidates(teacher, KEPT, "renormalise"), agreeing)
    assert value == pytest.approx(0, abs=1e-14)
    assert np.abs(gradient).max() <= 1e-14
    # A student that is surer of the support than the teacher, entry by entry, leaves it.
    surer = with_mass(teacher[:3], draw[3:], 0.9 + 0.1 * mass)
    gradient = value_and_gradient(candidates(teacher, KEPT, "renormalise"), surer)[1]
    assert (gradient[:3] > 1e-5).all()
    assert (gradient[3:] < 0).all()


def test_the_candidates_loss_is_infinite_only_where_the_student_uses_what_the_view_lacks() -> None:
    student, view = logs(0.5, 0.5, 0.0), logs(0.5, 0.0, 0.5)
    value = divergence.candidate_advantage_loss(student, student, view)
    assert abs(float(value)) == math.inf
    leaf = logs(0.5, 0.25, 0.0).requires_grad_()
    value = divergence.candidate_advantage_loss(leaf.detach(), leaf, logs(0.25, 0.5, 0.0))
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-15)
    assert leaf.grad is not None
    assert leaf.grad.tolist() == pytest.approx([0.5 * math.log(2), -0.25 * math.log(2), 0.0])
    # A bucket is no candidate: it has weight and nothing of its own.
    bucket = divergence.candidate_advantage_loss(
        logs(0.5, 0.25, 0.25), logs(0.5, 0.25, 0.0), logs(0.25, 0.5, 0.0)
    )
    assert float(bucket) == pytest.approx(0, abs=1e-15)
    unused = divergence.candidate_advantage_loss(logs(1.0, 0.0), logs(1.0, 0.0), logs(0.5, 0.5))
    assert float(unused) == pytest.approx(0, abs=1e-15)


# --------------------------------------------------------------------------------------------
# The hybrid of a data token and what the student would say instead


@pytest.mark.parametrize("seed", range(4))
def test_the_hybrid_is_the_mean_of_the_published_rule_over_the_drawn_token(seed: int) -> None:
    student, teacher = pair(seed)
    rows = ref.log_softmax(student), ref.log_softmax(teacher)
    signs = set()
    for token in range(9):
        value, gradient = value_and_gradient(
            lambda at, token=token: divergence.hybrid_policy(
                at.log_softmax(-1), teacher.log_softmax(-1), torch.tensor(token)
            ),
            student,
        )
        assert value == pytest.approx(ref.hybrid_policy(*rows, token), abs=1e-12)
        assert np.abs(gradient - ref.hybrid_policy_gradient(*rows, token)).max() <= 1e-12
        signs.add(bool(rows[1][token] > rows[0][token]))
    assert signs == {True, False}


def test_the_hybrid_by_hand() -> None:
    # k: 1/4 log 2, 1/2 log(1/2) and 1/4: 0. The entry that is pushed down has mass 1/2.
    student, teacher = logs(0.25, 0.5, 0.25), logs(0.5, 0.25, 0.25)
    log = math.log(2)
    first = (0.5 * 1.5 + 0.25 * log) * 2 * log - 0.5 * 0.5 * log * log
    second = -0.5 * log * log  # the data's own token is overrated: down by k alone
    third = -0.5 * 0.5 * log * log
    tokens = torch.tensor([0, 1, 2])
    found = divergence.hybrid_policy(student.expand(3, 3), teacher.expand(3, 3), tokens)
    assert found.tolist() == pytest.approx([first, second, third], abs=1e-15)


def test_a_student_that_is_its_teacher_learns_nothing_from_the_hybrid() -> None:
    _, teacher = pair(3)
    for token in range(9):
        value, gradient = value_and_gradient(
            lambda at, token=token: divergence.hybrid_policy(
                at.log_softmax(-1), teacher.log_softmax(-1), torch.tensor(token)
            ),
            teacher,
        )
        assert value == pytest.approx(0, abs=1e-14)
        assert np.abs(gradient).max() <= 1e-14


@pytest.mark.parametrize("token", [0, 2])
def test_entries_that_the_student_does_not_use_leave_the_hybrid_finite(token: int) -> None:
    value, gradient = value_and_gradient(
        lambda at: divergence.hybrid_policy(
            at.log_softmax(-1), logs(0.4, 0.2, 0.2, 0.2), torch.tensor(token)
        ),
        torch.tensor([0.1, 0.9, -0.3, -math.inf], dtype=F64),
    )
    assert math.isfinite(value)
    assert np.isfinite(gradient).all()
    assert gradient[3] == 0


# --------------------------------------------------------------------------------------------
# k3 with the ratio that makes it good


@given(st.floats(-6, -0.01), st.floats(-6, -0.01), st.floats(-6, -0.01))
def test_the_corrected_k3_agrees_with_the_transcription_and_is_never_negative(
    student: float, teacher: float, old: float
) -> None:
    leaf = torch.tensor(student, dtype=F64, requires_grad=True)
    sides = torch.tensor(teacher, dtype=F64), torch.tensor(old, dtype=F64)
    value = divergence.corrected_k3(leaf, *sides)
    (slope,) = torch.autograd.grad(value, leaf)
    assert float(value.detach()) >= 0
    size = math.exp(student - old) * (1 + math.exp(teacher - student))
    expected = ref.corrected_k3(student, teacher, old)
    assert float(value.detach()) == pytest.approx(expected, abs=1e-12 * size)
    expected = ref.corrected_k3_slope(student, teacher, old)
    assert float(slope) == pytest.approx(expected, abs=1e-12 * size)


def test_the_corrected_k3_by_hand_and_its_slope_on_the_weights_of_the_rollout() -> None:
    # Ratio 2 and u = 1/2: 2 (1/2 - 1 + log 2); on the rollout the slope is -r.
    student, teacher, old = (logs(mass)[0] for mass in (0.5, 0.25, 0.25))
    value = divergence.corrected_k3(student, teacher, old)
    assert float(value) == pytest.approx(2 * (math.log(2) - 0.5), abs=1e-15)
    leaf = student.clone().requires_grad_()
    (slope,) = torch.autograd.grad(divergence.corrected_k3(leaf, teacher, student), leaf)
    assert float(slope) == pytest.approx(math.log(2), abs=1e-15)
    equal = divergence.corrected_k3(student, student, old)
    assert float(equal) == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_corrected_k3_has_the_gradient_of_the_reverse_kl_on_anybodys_tokens(seed: int) -> None:
    student, teacher = pair(seed)
    old, _ = pair(seed + 50)
    sampler = old.log_softmax(-1)
    _, exact = value_and_gradient(
        lambda at: divergence.reverse_kl(at.log_softmax(-1), teacher.log_softmax(-1)), student
    )
    found = np.zeros(9)
    for token, probability in enumerate(sampler.exp().tolist()):
        _, gradient = value_and_gradient(
            lambda at, token=token: divergence.corrected_k3(
                at.log_softmax(-1)[token], teacher.log_softmax(-1)[token], sampler[token]
            ),
            student,
        )
        found += probability * gradient
    assert np.abs(found - exact).max() <= 1e-12
    # which k3 alone is not
    plain = expected_gradient(divergence.forward_kl_k3, student, teacher)
    assert np.abs(plain - exact).max() > 1e-3


def test_a_token_without_teacher_mass_makes_the_corrected_k3_infinite_and_no_nan() -> None:
    leaf = torch.tensor([-1.0, -1.0], dtype=torch.float32, requires_grad=True)
    value = divergence.corrected_k3(
        leaf, torch.tensor([-math.inf, -2.0]), torch.tensor([-1.0, -1.0])
    )
    assert float(value[0].detach()) == math.inf
    torch.where(value.isfinite(), value, 0.0).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == pytest.approx([0.0, 1.0], rel=1e-6)

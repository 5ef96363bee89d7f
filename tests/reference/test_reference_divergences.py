"""The divergences, supports and tail rules of the oracle against hand, limits and differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from . import divergences as dv
from .checks import (
    GRADIENT_BOUND,
    IDENTITY_BOUND,
    Array,
    finite_differences,
    largest,
    logit_rows,
    logs,
)
from .divergences import log_softmax
from .enumeration import expected_token_gradient

# Each divergence with its full-vocabulary gradient and its log-slope.
FULL: dict[str, tuple[dv.Divergence, Callable[[Array, Array], Array], dv.LogSlope]] = {
    "forward_kl": (dv.forward_kl, dv.forward_kl_gradient, dv.forward_kl_log_slope),
    "reverse_kl": (dv.reverse_kl, dv.reverse_kl_gradient, dv.reverse_kl_log_slope),
    "squared_hellinger": (
        dv.squared_hellinger,
        dv.squared_hellinger_gradient,
        dv.squared_hellinger_log_slope,
    ),
    "total_variation": (
        dv.total_variation,
        dv.total_variation_gradient,
        dv.total_variation_log_slope,
    ),
}
FULL["jensen_shannon"] = (
    dv.jensen_shannon,
    dv.jensen_shannon_gradient,
    dv.jensen_shannon_log_slope,
)
for a in (0.2, 0.5, 0.7):
    FULL[f"renyi_divergence {a}"] = (
        partial(dv.renyi_divergence, order=a),
        partial(dv.renyi_divergence_gradient, order=a),
        partial(dv.renyi_divergence_log_slope, order=a),
    )
for w in (0.1, 0.5, 0.9):
    FULL[f"generalized_jsd {w}"] = (
        partial(dv.generalized_jsd, teacher_weight=w),
        partial(dv.generalized_jsd_gradient, teacher_weight=w),
        partial(dv.generalized_jsd_log_slope, teacher_weight=w),
    )
    FULL[f"skew_forward_kl {w}"] = (
        partial(dv.skew_forward_kl, skew=w),
        partial(dv.skew_forward_kl_gradient, skew=w),
        partial(dv.skew_forward_kl_log_slope, skew=w),
    )
    FULL[f"skew_reverse_kl {w}"] = (
        partial(dv.skew_reverse_kl, skew=w),
        partial(dv.skew_reverse_kl_gradient, skew=w),
        partial(dv.skew_reverse_kl_log_slope, skew=w),
    )
for a in (-1.0, 0.3, 0.5, 2.0):
    FULL[f"alpha_divergence {a}"] = (
        partial(dv.alpha_divergence, alpha=a),
        partial(dv.alpha_divergence_gradient, alpha=a),
        partial(dv.alpha_divergence_log_slope, alpha=a),
    )
for a in (0.1, 1.0, 5.0):
    FULL[f"power_divergence {a}"] = (
        partial(dv.power_divergence, power=a),
        partial(dv.power_divergence_gradient, power=a),
        partial(dv.power_divergence_log_slope, power=a),
    )

SUPPORTS = ([0, 2], [4, 1, 3], [3], [-1, 2, -1, 0])
NORMALISING = ("bucket", "renormalise", "teacher_renormalise")


@pytest.fixture(params=range(3))
def rows(request: pytest.FixtureRequest) -> tuple[Array, Array]:
    return logit_rows(request.param)


@pytest.mark.parametrize("name", FULL)
def test_gradients_match_finite_differences_and_the_log_slope(
    name: str, rows: tuple[Array, Array]
) -> None:
    divergence, gradient, log_slope = FULL[name]
    logits, teacher = rows[0], log_softmax(rows[1])
    student = log_softmax(logits)
    exact = gradient(student, teacher)
    numeric = finite_differences(lambda z: divergence(log_softmax(z), teacher), logits)
    assert largest(exact - numeric) <= GRADIENT_BOUND
    for tail in dv.TAILS:
        if name == "reverse_kl" and tail == "teacher_renormalise":
            continue
        general = dv.gradient_by_tail(log_slope, student, teacher, dv.full(5), tail=tail)
        assert largest(exact - general) <= 1e-13, tail


@pytest.mark.parametrize("name", FULL)
def test_divergences_are_zero_for_equal_rows_only_and_finite_or_infinite_at_zero_mass(
    name: str, rows: tuple[Array, Array]
) -> None:
    divergence, gradient, _ = FULL[name]
    student, teacher = log_softmax(rows[0]), log_softmax(rows[1])
    assert divergence(student, teacher) > 1e-6
    assert abs(divergence(student, student)) <= 1e-14
    assert largest(gradient(student, student)) <= 1e-14
    half, first, second = logs(0.5, 0.5, 0), logs(1, 0, 0), logs(0, 1, 0)
    for one, other in itertools.product((half, first, second), repeat=2):
        between = divergence(one, other)
        assert between >= -1e-15
        assert not math.isnan(between)
    assert abs(divergence(half, half)) <= 1e-15


@pytest.mark.parametrize("tail", NORMALISING)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("name", FULL)
def test_gradients_of_every_tail_rule_match_finite_differences(
    name: str, support: list[int], tail: str
) -> None:
    divergence, _, log_slope = FULL[name]
    logits, teacher_logits = logit_rows(7)
    teacher = log_softmax(teacher_logits)

    def loss(z: Array) -> float:
        return dv.divergence_by_tail(divergence, log_softmax(z), teacher, support, tail=tail)

    def exact() -> Array:
        return dv.gradient_by_tail(log_slope, log_softmax(logits), teacher, support, tail=tail)

    if math.isinf(loss(logits)):
        assert tail == "teacher_renormalise"
        assert name.startswith(("reverse_kl", "alpha_divergence -"))
        with pytest.raises(ValueError, match="infinite"):
            exact()
        return
    assert largest(exact() - finite_differences(loss, logits)) <= GRADIENT_BOUND


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_general_tails_agree_with_the_closed_forms_of_the_kls(support: list[int]) -> None:
    student, teacher = (log_softmax(row) for row in logit_rows(5))
    present = [v for v in support if v >= 0]
    for log_slope, tail, closed in (
        (dv.forward_kl_log_slope, "bucket", dv.tail_bucket_forward_kl_gradient),
        (dv.reverse_kl_log_slope, "bucket", dv.tail_bucket_reverse_kl_gradient),
        (dv.forward_kl_log_slope, "renormalise", dv.renormalised_forward_kl_gradient),
        (dv.reverse_kl_log_slope, "renormalise", dv.renormalised_reverse_kl_gradient),
    ):
        general = dv.gradient_by_tail(log_slope, student, teacher, support, tail=tail)
        assert largest(general - closed(student, teacher, present)) <= 1e-14


def test_truncated_supports_have_the_gradients_of_the_surveys_table() -> None:
    student, teacher = (log_softmax(row) for row in logit_rows(6))
    s, t, support = np.exp(student), np.exp(teacher), [0, 2, 4]
    inside = np.array([1.0, 0, 1, 0, 1])
    teacher_mass, student_mass = (t * inside).sum(), (s * inside).sum()

    def gradient(log_slope: dv.LogSlope, tail: str) -> Array:
        return dv.gradient_by_tail(log_slope, student, teacher, support, tail=tail)

    conditioned = t * inside / teacher_mass
    for log_slope, tail, expected in (
        (dv.forward_kl_log_slope, "teacher_renormalise", s - conditioned),
        (dv.forward_kl_log_slope, "truncate", teacher_mass * s - t * inside),
    ):
        assert largest(gradient(log_slope, tail) - expected) <= 1e-15

    def centred(h: Array) -> Array:
        return s * (h - float((s * h).sum()))

    ratio = student - teacher
    stopped = gradient(dv.truncated_reverse_kl_log_slope, "truncate")
    live = gradient(dv.reverse_kl_log_slope, "truncate")
    assert largest(stopped - centred(inside * ratio)) <= 1e-15
    assert largest(live - centred(inside * (ratio + 1))) <= 1e-15
    # What the live one adds pushes the student's mass out of the support.
    assert largest(live - stopped - s * (inside - student_mass)) <= 1e-15
    in_tail = (1 - teacher_mass) / (1 - student_mass)
    bucket = gradient(dv.forward_kl_log_slope, "bucket")
    assert largest(bucket - np.where(inside > 0, s - t, s * (1 - in_tail))) <= 1e-15
    bucket = gradient(dv.reverse_kl_log_slope, "bucket")
    assert largest(bucket - centred(np.where(inside > 0, ratio, -math.log(in_tail)))) <= 1e-15


def test_the_live_truncated_reverse_kl_is_the_derivative_of_its_value_and_the_declared_is_not() -> (
    None
):
    logits, teacher_logits = logit_rows(6)
    teacher, support = log_softmax(teacher_logits), [0, 2, 4]

    def value(z: Array) -> float:
        return dv.divergence_by_tail(
            dv.truncated_reverse_kl, log_softmax(z), teacher, support, tail="truncate"
        )

    def held_fixed(z: Array) -> float:
        student = log_softmax(logits)
        weight = np.exp(student) * (student - teacher)
        return float((weight * log_softmax(z))[support].sum())

    def gradient(log_slope: dv.LogSlope) -> Array:
        return dv.gradient_by_tail(
            log_slope, log_softmax(logits), teacher, support, tail="truncate"
        )

    live, declared = (
        gradient(dv.reverse_kl_log_slope),
        gradient(dv.truncated_reverse_kl_log_slope),
    )
    assert largest(live - finite_differences(value, logits)) <= GRADIENT_BOUND
    assert largest(declared - finite_differences(held_fixed, logits)) <= GRADIENT_BOUND
    assert largest(live - declared) > 1e-2
    # The declared one rests where the two agree on the support; the live one does not.
    assert (
        largest(
            dv.gradient_by_tail(
                dv.truncated_reverse_kl_log_slope, teacher, teacher, support, tail="truncate"
            )
        )
        <= 1e-15
    )
    assert (
        largest(
            dv.gradient_by_tail(dv.reverse_kl_log_slope, teacher, teacher, support, tail="truncate")
        )
        > 1e-2
    )


def test_an_unnormalised_forward_kl_can_be_negative_though_never_without_a_larger_student() -> None:
    teacher, support = logs(0.2, 0.2, 0.6), [0, 1]
    larger, smaller = logs(0.3, 0.3, 0.4), logs(0.1, 0.1, 0.8)
    unequal = logs(0.41, 0.01, 0.58)

    def value(student: Array) -> float:
        return dv.divergence_by_tail(dv.forward_kl, student, teacher, support, tail="truncate")

    assert value(larger) == pytest.approx(0.4 * math.log(2 / 3))
    assert value(smaller) == pytest.approx(0.4 * math.log(2))
    # More student mass on the support is necessary, not sufficient.
    assert value(unequal) > 0


def test_a_teacher_conditioned_on_the_support_is_the_divergence_to_that_teacher() -> None:
    student, teacher = (log_softmax(row) for row in logit_rows(3))
    support = [1, 4]
    conditioned = np.full(5, -math.inf)
    conditioned[support] = dv.renormalise(teacher, support)
    for name, (divergence, _, _) in FULL.items():
        restricted = dv.divergence_by_tail(
            divergence, student, teacher, support, tail="teacher_renormalise"
        )
        whole = divergence(student, conditioned)
        if name.startswith("power_divergence"):
            # Not an f-divergence: a bucket of s mass counts s^(1+a), its entries less.
            assert restricted > whole
        else:
            assert restricted == pytest.approx(whole, abs=1e-14), name


@pytest.mark.parametrize("support", SUPPORTS[:3], ids=str)
def test_what_the_bucket_hides_is_the_chain_rules_remainder_and_both_gaps_have_one_sign(
    support: list[int],
) -> None:
    student, teacher = (log_softmax(row) for row in logit_rows(8))
    tail = [v for v in range(5) if v not in support]
    for divergence, weight in ((dv.forward_kl, teacher), (dv.reverse_kl, student)):
        whole = divergence(student, teacher)
        seen = dv.divergence_by_tail(divergence, student, teacher, support, tail="bucket")
        hidden = dv.divergence_by_tail(divergence, student, teacher, tail, tail="renormalise")
        mass = math.exp(dv.log_mass_outside(weight, support))
        assert whole - seen == pytest.approx(mass * hidden, abs=1e-14)
        assert seen <= whole + 1e-15


def test_an_empty_support_has_no_mass_no_divergence_and_no_gradient() -> None:
    student, teacher = (log_softmax(row) for row in logit_rows(9))
    for side, row in (("student", student), ("teacher", teacher)):
        assert (
            dv.restrict_by_tail(row, [-1, -1], tail="renormalise", side=side).tolist()
            == [-math.inf] * 2
        )
    for divergence, _, log_slope in FULL.values():
        assert (
            dv.divergence_by_tail(divergence, student, teacher, [-1, -1], tail="renormalise") == 0
        )
        gradient = dv.gradient_by_tail(log_slope, student, teacher, [-1, -1], tail="renormalise")
        assert largest(gradient) == 0.0
        assert (
            abs(dv.divergence_by_tail(divergence, student, teacher, [-1], tail="bucket")) <= 1e-13
        )


def test_divergences_have_the_values_worked_out_by_hand() -> None:
    student, teacher = logs(1 / 2, 1 / 2), logs(1 / 4, 3 / 4)
    # Mixtures with a quarter of the teacher, or of the student: (7/16, 9/16) and (5/16, 11/16).
    assert dv.skew_forward_kl(student, teacher, skew=0.25) == pytest.approx(
        0.25 * math.log(4 / 7) + 0.75 * math.log(4 / 3)
    )
    assert dv.skew_reverse_kl(student, teacher, skew=0.25) == pytest.approx(
        0.5 * math.log(8 / 5) + 0.5 * math.log(8 / 11)
    )
    assert dv.alpha_divergence(student, teacher, alpha=2.0) == pytest.approx(
        (1 - (1 / 16 + 9 / 16) / (1 / 2)) / -2
    )
    assert dv.squared_hellinger(student, teacher) == pytest.approx(
        1 - math.sqrt(1 / 8) - math.sqrt(3 / 8)
    )
    assert dv.power_divergence(student, teacher, power=1.0) == pytest.approx(2 * 0.5 * (1 / 4) ** 2)
    assert dv.total_variation(student, teacher) == pytest.approx(1 / 4)
    assert dv.student_entropy(student) == pytest.approx(math.log(2))
    assert dv.teacher_entropy(logs(1, 0)) == 0.0


def test_families_contain_each_other_as_the_papers_say(rows: tuple[Array, Array]) -> None:
    student, teacher = log_softmax(rows[0]), log_softmax(rows[1])
    s, t = np.exp(student), np.exp(teacher)
    forward, reverse = dv.forward_kl(student, teacher), dv.reverse_kl(student, teacher)
    small = 1e-5
    alpha = partial(dv.alpha_divergence, student, teacher)
    assert alpha(alpha=1 - small) == pytest.approx(forward, rel=1e-3)
    assert alpha(alpha=small) == pytest.approx(reverse, rel=1e-3)
    assert alpha(alpha=0.5) == pytest.approx(4 * dv.squared_hellinger(student, teacher))
    assert alpha(alpha=2.0) == pytest.approx(((t - s) ** 2 / s).sum() / 2)
    assert alpha(alpha=0.3) == pytest.approx(dv.alpha_divergence(teacher, student, alpha=0.7))
    power = partial(dv.power_divergence, student, teacher)
    assert power(power=1.0) == pytest.approx(((s - t) ** 2).sum() / 2)
    assert power(power=small) == pytest.approx(reverse, rel=1e-3)
    for name, limit in (("skew_forward_kl", forward), ("skew_reverse_kl", reverse)):
        skewed = getattr(dv, name)
        assert skewed(student, teacher, skew=small) == pytest.approx(limit, rel=1e-3)
        assert skewed(student, teacher, skew=1 - small) == pytest.approx(0.0, abs=1e-8)
    # A generalized JSD is a weighted pair of skewed KLs, each skewed towards its own first side.
    for w in (0.2, 0.7):
        pair = w * dv.skew_forward_kl(student, teacher, skew=w) + (1 - w) * dv.skew_reverse_kl(
            student, teacher, skew=1 - w
        )
        assert dv.generalized_jsd(student, teacher, teacher_weight=w) == pytest.approx(pair)


def test_skewed_kls_are_bounded_by_the_log_of_the_skew() -> None:
    first, second = logs(1, 0), logs(0, 1)
    for skew in (0.1, 0.6):
        assert dv.skew_forward_kl(first, second, skew=skew) == pytest.approx(-math.log(skew))
        assert dv.skew_reverse_kl(first, second, skew=skew) == pytest.approx(-math.log(skew))


def test_distances_obey_the_inequalities_between_them(rows: tuple[Array, Array]) -> None:
    student, teacher = log_softmax(rows[0]), log_softmax(rows[1])
    distance, hellinger = (
        dv.total_variation(student, teacher),
        dv.squared_hellinger(student, teacher),
    )
    assert hellinger <= distance <= math.sqrt(2 * hellinger)
    assert 2 * distance**2 <= min(dv.forward_kl(student, teacher), dv.reverse_kl(student, teacher))


def test_the_entropy_gradient_matches_finite_differences(rows: tuple[Array, Array]) -> None:
    numeric = finite_differences(lambda z: dv.student_entropy(log_softmax(z)), rows[0])
    assert largest(dv.student_entropy_gradient(log_softmax(rows[0])) - numeric) <= GRADIENT_BOUND


def test_sampled_estimators_have_the_gradients_their_names_say(rows: tuple[Array, Array]) -> None:
    student, teacher = log_softmax(rows[0]), log_softmax(rows[1])
    for slope, gradient in (
        (dv.reverse_kl_k2_slope, dv.reverse_kl_gradient),
        (dv.forward_kl_k3_slope, dv.forward_kl_gradient),
    ):

        def one_token(token: int, slope: Callable[[float, float], float] = slope) -> Array:
            indicator = np.zeros(5)
            indicator[token] = 1.0
            return slope(student[token], teacher[token]) * (indicator - np.exp(student))

        mean, _ = expected_token_gradient(rows[0], one_token)
        assert largest(mean - gradient(student, teacher)) <= IDENTITY_BOUND
    for value, slope in (
        (dv.reverse_kl_k2, dv.reverse_kl_k2_slope),
        (dv.forward_kl_k3, dv.forward_kl_k3_slope),
        (partial(dv.corrected_k3, old_logp=-0.9), partial(dv.corrected_k3_slope, old_logp=-0.9)),
    ):
        numeric = (value(-1.3 + 1e-6, -0.4) - value(-1.3 - 1e-6, -0.4)) / 2e-6
        assert slope(-1.3, -0.4) == pytest.approx(numeric, abs=1e-8)


def test_supports_are_the_sets_their_names_say() -> None:
    teacher_top, student_top = [5, 2, 9, 4], [2, 7, 5, 1]
    assert dv.full(3) == [0, 1, 2]
    assert dv.sampled(6) == [6]
    assert dv.teacher_top_k(teacher_top, k=2) == [5, 2]
    assert dv.student_top_k(student_top, k=3) == [2, 7, 5]
    pair = (teacher_top, student_top)
    assert dv.union(*pair, teacher_k=2, student_k=3) == [5, 2, 7]
    assert dv.intersection(*pair, teacher_k=2, student_k=3) == [5, 2]
    assert dv.intersection(*pair, teacher_k=1, student_k=1) == []
    route = partial(dv.routing_support, *pair, teacher_k=2, student_k=2)
    assert set(route(2)) == {5, 2, 7}
    assert set(route(8)) == {5, 2, 7, 8}
    assert set(route(8, {5, 8})) == {2, 7, 8}
    assert set(route(5, {5})) == {5, 2, 7}


def test_smoothing_is_a_mixture_with_the_uniform_row() -> None:
    row = logs(0.5, 0.5, 0, 0)
    smoothed = dv.smooth(row, smoothing=0.2, vocab_size=4)
    assert np.exp(smoothed) == pytest.approx([0.45, 0.45, 0.05, 0.05])
    assert dv.smooth(row, smoothing=0.0, vocab_size=4).tolist() == row.tolist()
    whole = dv.mix(logs(0.25, 0.25, 0.25, 0.25), row, teacher_weight=0.8)
    assert smoothed == pytest.approx(whole)
    # Smoothing the listed entries is listing the smoothed ones.
    listed = dv.smooth(dv.restrict(row, [3, 0]), smoothing=0.2, vocab_size=4)
    assert listed == pytest.approx(dv.restrict(smoothed, [3, 0]))


@pytest.mark.parametrize("cap", [1e-3, 0.05, 0.3, 10.0])
def test_the_gradient_of_the_capped_forward_kl_matches_finite_differences(
    cap: float, rows: tuple[Array, Array]
) -> None:
    teacher = log_softmax(rows[1])

    def loss(z: Array) -> float:
        return dv.capped_forward_kl(log_softmax(z), teacher, cap=cap)

    exact = dv.capped_forward_kl_gradient(log_softmax(rows[0]), teacher, cap=cap)
    assert largest(exact - finite_differences(loss, rows[0])) <= GRADIENT_BOUND
    if cap > 5:
        assert largest(exact - dv.forward_kl_gradient(log_softmax(rows[0]), teacher)) <= 1e-15
        assert loss(rows[0]) == dv.forward_kl(log_softmax(rows[0]), teacher)
    for support, tail in itertools.product(SUPPORTS, NORMALISING):
        log_slope = partial(dv.capped_forward_kl_log_slope, cap=cap)
        of_tail = partial(dv.capped_forward_kl, cap=cap)
        general = dv.gradient_by_tail(log_slope, log_softmax(rows[0]), teacher, support, tail=tail)

        def by_tail(
            z: Array, support: list[int] = support, tail: str = tail, value: Any = of_tail
        ) -> float:
            return dv.divergence_by_tail(value, log_softmax(z), teacher, support, tail=tail)

        assert largest(general - finite_differences(by_tail, rows[0])) <= GRADIENT_BOUND


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_the_candidates_loss_is_the_truncated_reverse_kls_or_that_by_the_mass(
    support: list[int], rows: tuple[Array, Array]
) -> None:
    student, teacher = log_softmax(rows[0]), log_softmax(rows[1])
    slope = dv.truncated_reverse_kl_log_slope
    declared = dv.gradient_by_tail(slope, student, teacher, support, tail="truncate")
    mass = sum(math.exp(student[v]) for v in support if v >= 0)
    for tail, divided_by in (("truncate", 1.0), ("renormalise", mass)):
        found = dv.candidate_advantage_loss_gradient(student, teacher, support, tail=tail)
        assert largest(found - declared / divided_by) <= 1e-14
    # The value, with its first factors held fixed, has that gradient.
    weight = dv.restrict_by_tail(student, support, tail="truncate", side="student")
    sides = [dv.restrict(row, support) for row in (student, teacher)]
    ours, theirs = sides
    pull = [
        math.exp(w) * (t - o) if w > -math.inf else 0.0
        for w, o, t in zip(weight, ours, theirs, strict=True)
    ]

    def held_fixed(z: Array) -> float:
        moved = dv.restrict(log_softmax(z), support)
        return -float(sum(p * m for p, m in zip(pull, moved, strict=True) if p != 0))

    assert held_fixed(rows[0]) == pytest.approx(dv.candidate_advantage_loss(weight, *sides))
    assert largest(finite_differences(held_fixed, rows[0]) - declared) <= GRADIENT_BOUND


def test_the_gradient_of_hybrid_policy_is_that_of_its_loss_with_the_weights_held_fixed(
    rows: tuple[Array, Array],
) -> None:
    at, teacher = log_softmax(rows[0]), log_softmax(rows[1])
    pulls = np.exp(at) * (teacher - at)
    down = [v for v in range(5) if pulls[v] < 0]
    assert 0 < len(down) < 5
    for token in range(5):
        weight = pulls[token]
        if weight > 0:
            weight += math.exp(teacher[token]) * (1 + sum(math.exp(at[v]) for v in down))
        others = [v for v in down if v != token]

        def loss(z: Array, token: int = token, w: float = weight, others: Any = others) -> float:
            moved = log_softmax(z)
            return float(-w * moved[token]) - sum(
                math.exp(at[v]) * pulls[v] * moved[v] for v in others
            )

        assert loss(rows[0]) == pytest.approx(dv.hybrid_policy(at, teacher, token))
        exact = dv.hybrid_policy_gradient(at, teacher, token)
        assert largest(exact - finite_differences(loss, rows[0])) <= GRADIENT_BOUND

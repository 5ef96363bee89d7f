"""The oracle against itself: finite differences, hand-worked values, and the papers' identities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from opd.types import Provenance

from . import divergences as dv
from . import objectives as ob
from .checks import (
    GRADIENT_BOUND,
    IDENTITY_BOUND,
    Array,
    finite_differences,
    largest,
    logit_rows,
    logs,
)
from .credit import discounted, immediate, per_state_baseline, return_to_go, teacher_log_ratio
from .divergences import log_softmax
from .enumeration import (
    Response,
    Tree,
    exact_local_gradient,
    exact_sequence_reverse_kl_gradient,
    expected_gradient,
    k1,
    k2,
    k3,
    padded_responses,
    sequence_reverse_kl,
    value,
)

SUPPORTS = ([0, 2], [4, 1, 3], [3])
JSD_WEIGHTS = (0.1, 0.5, 0.9)


# --------------------------------------------------------------------------------------------
# Divergences


def test_divergences_have_the_values_worked_out_by_hand() -> None:
    student, teacher = logs(1 / 2, 1 / 2), logs(1 / 4, 3 / 4)
    assert dv.reverse_kl(student, teacher) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)
    by_hand = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert dv.forward_kl(student, teacher) == pytest.approx(by_hand, abs=1e-15)
    # The mixture with teacher weight 1/4 is (7/16, 9/16).
    teacher_part = 0.25 * math.log(4 / 7) + 0.75 * math.log(12 / 9)
    student_part = 0.5 * math.log(8 / 7) + 0.5 * math.log(8 / 9)
    assert dv.generalized_jsd(student, teacher, teacher_weight=0.25) == pytest.approx(
        0.25 * teacher_part + 0.75 * student_part, abs=1e-15
    )


def test_zero_mass_follows_the_limit() -> None:
    half, first, second = logs(0.5, 0.5, 0), logs(1, 0, 0), logs(0, 1, 0)
    assert dv.reverse_kl(first, half) == pytest.approx(math.log(2))
    assert dv.reverse_kl(half, first) == math.inf
    assert dv.forward_kl(half, first) == pytest.approx(math.log(2))
    assert dv.forward_kl(first, half) == math.inf
    assert dv.reverse_kl(half, half) == dv.forward_kl(half, half) == 0.0
    # Disjoint rows: the JSD is the entropy of the weights.
    assert dv.generalized_jsd(first, second, teacher_weight=0.25) == pytest.approx(
        -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    )


def test_gradients_at_zero_mass_are_the_limits() -> None:
    student, teacher = logs(0.25, 0.75, 0, 0), logs(0.5, 0.25, 0.25, 0)
    divergence = dv.reverse_kl(student, teacher)
    by_hand = [0.25 * (math.log(0.5) - divergence), 0.75 * (math.log(3) - divergence), 0, 0]
    assert dv.reverse_kl_gradient(student, teacher) == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="infinite"):
        dv.forward_kl_gradient(student, teacher)
    assert dv.forward_kl_gradient(teacher, student) == pytest.approx([0.25, -0.5, 0.25, 0])
    with pytest.raises(ValueError, match="infinite"):
        dv.reverse_kl_gradient(teacher, student)
    assert np.isfinite(dv.generalized_jsd_gradient(student, teacher, teacher_weight=0.5)).all()
    assert np.isfinite(dv.generalized_jsd_gradient(teacher, student, teacher_weight=0.5)).all()


def numeric_logit_gradient(
    divergence: Callable[[Array, Array], float], logits: Array, teacher_log_probs: Array
) -> Array:
    return finite_differences(lambda z: divergence(log_softmax(z), teacher_log_probs), logits)


@pytest.mark.parametrize("seed", range(3))
def test_full_vocabulary_gradients_match_finite_differences(seed: int) -> None:
    logits, teacher_logits = logit_rows(seed)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    for divergence, gradient in (
        (dv.forward_kl, dv.forward_kl_gradient),
        (dv.reverse_kl, dv.reverse_kl_gradient),
    ):
        numeric = numeric_logit_gradient(divergence, logits, teacher)
        assert largest(gradient(student, teacher) - numeric) <= GRADIENT_BOUND
    for w in JSD_WEIGHTS:
        jsd = partial(dv.generalized_jsd, teacher_weight=w)
        numeric = numeric_logit_gradient(jsd, logits, teacher)
        exact = dv.generalized_jsd_gradient(student, teacher, teacher_weight=w)
        assert largest(exact - numeric) <= GRADIENT_BOUND


TRUNCATED = (
    (dv.renormalised_forward_kl, dv.renormalised_forward_kl_gradient),
    (dv.renormalised_reverse_kl, dv.renormalised_reverse_kl_gradient),
    (dv.tail_bucket_forward_kl, dv.tail_bucket_forward_kl_gradient),
    (dv.tail_bucket_reverse_kl, dv.tail_bucket_reverse_kl_gradient),
)
TRUNCATED_JSD = (
    (dv.renormalised_generalized_jsd, dv.renormalised_generalized_jsd_gradient),
    (dv.tail_bucket_generalized_jsd, dv.tail_bucket_generalized_jsd_gradient),
)


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_truncated_gradients_match_finite_differences(support: list[int]) -> None:
    logits, teacher_logits = logit_rows(7)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    for divergence, gradient in TRUNCATED:
        numeric = numeric_logit_gradient(partial(divergence, support=support), logits, teacher)
        exact = gradient(student, teacher, support)
        assert largest(exact - numeric) <= GRADIENT_BOUND, divergence.__name__
    for (jsd, jsd_gradient), w in itertools.product(TRUNCATED_JSD, JSD_WEIGHTS):
        weighted = partial(jsd, support=support, teacher_weight=w)
        numeric = numeric_logit_gradient(weighted, logits, teacher)
        exact = jsd_gradient(student, teacher, support, teacher_weight=w)
        assert largest(exact - numeric) <= GRADIENT_BOUND, jsd.__name__


def test_gradients_match_finite_differences_beside_entries_without_student_mass() -> None:
    student_logits = np.array([0.3, -0.7, 1.1, -math.inf])
    teacher = log_softmax(np.array([0.5, 0.2, -1.0, 0.4]))
    finite = student_logits[:3]

    def padded(z: Array) -> Array:
        return log_softmax(np.array([*z, -math.inf]))

    for numeric, exact in (
        (
            finite_differences(lambda z: dv.reverse_kl(padded(z), teacher), finite),
            dv.reverse_kl_gradient(padded(finite), teacher),
        ),
        (
            finite_differences(
                lambda z: dv.generalized_jsd(padded(z), teacher, teacher_weight=0.3), finite
            ),
            dv.generalized_jsd_gradient(padded(finite), teacher, teacher_weight=0.3),
        ),
        (
            finite_differences(
                lambda z: dv.tail_bucket_forward_kl(padded(z), teacher, [0]), finite
            ),
            dv.tail_bucket_forward_kl_gradient(padded(finite), teacher, [0]),
        ),
        (
            finite_differences(
                lambda z: dv.tail_bucket_reverse_kl(padded(z), teacher, [1]), finite
            ),
            dv.tail_bucket_reverse_kl_gradient(padded(finite), teacher, [1]),
        ),
    ):
        assert largest(exact[:3] - numeric) <= GRADIENT_BOUND
        assert exact[3] == 0.0


def test_jsd_over_its_weight_leaves_the_two_kls_with_half_a_chi_square_as_slope() -> None:
    logits, teacher_logits = logit_rows(3)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    squares = (np.exp(teacher) - np.exp(student)) ** 2
    w = 1e-5

    from_forward = dv.generalized_jsd(student, teacher, teacher_weight=w) / w
    slope = (dv.forward_kl(student, teacher) - from_forward) / w
    assert slope == pytest.approx((squares / np.exp(student)).sum() / 2, rel=1e-3)

    from_reverse = dv.generalized_jsd(student, teacher, teacher_weight=1 - w) / w
    slope = (dv.reverse_kl(student, teacher) - from_reverse) / w
    assert slope == pytest.approx((squares / np.exp(teacher)).sum() / 2, rel=1e-3)


def test_jsd_is_symmetric_under_exchanging_sides_and_weights() -> None:
    logits, teacher_logits = logit_rows(4)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    assert dv.generalized_jsd(student, teacher, teacher_weight=0.3) == pytest.approx(
        dv.generalized_jsd(teacher, student, teacher_weight=0.7), abs=1e-15
    )


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_tail_bucket_obeys_the_chain_rule(support: list[int]) -> None:
    logits, teacher_logits = logit_rows(5)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    tail = [v for v in range(len(student)) if v not in support]
    student_tail = sum(math.exp(student[v]) for v in tail)
    teacher_tail = sum(math.exp(teacher[v]) for v in tail)
    forward_gap = teacher_tail * dv.renormalised_forward_kl(student, teacher, tail)
    reverse_gap = student_tail * dv.renormalised_reverse_kl(student, teacher, tail)
    assert dv.forward_kl(student, teacher) == pytest.approx(
        dv.tail_bucket_forward_kl(student, teacher, support) + forward_gap, abs=1e-14
    )
    assert dv.reverse_kl(student, teacher) == pytest.approx(
        dv.tail_bucket_reverse_kl(student, teacher, support) + reverse_gap, abs=1e-14
    )


def test_truncation_to_the_whole_vocabulary_changes_nothing() -> None:
    logits, teacher_logits = logit_rows(6)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    everything = [3, 0, 4, 1, 2]
    for truncated, full in (
        (dv.renormalised_forward_kl, dv.forward_kl),
        (dv.tail_bucket_forward_kl, dv.forward_kl),
        (dv.renormalised_reverse_kl, dv.reverse_kl),
        (dv.tail_bucket_reverse_kl, dv.reverse_kl),
    ):
        assert truncated(student, teacher, everything) == pytest.approx(
            full(student, teacher), abs=1e-14
        )
    for exact, full_gradient in (
        (dv.tail_bucket_forward_kl_gradient, dv.forward_kl_gradient),
        (dv.tail_bucket_reverse_kl_gradient, dv.reverse_kl_gradient),
        (dv.renormalised_forward_kl_gradient, dv.forward_kl_gradient),
        (dv.renormalised_reverse_kl_gradient, dv.reverse_kl_gradient),
    ):
        difference = exact(student, teacher, everything) - full_gradient(student, teacher)
        assert largest(difference) <= 1e-14


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_an_equal_teacher_is_a_zero_of_every_divergence_and_gradient(support: list[int]) -> None:
    row = log_softmax(logit_rows(8)[0])
    assert dv.forward_kl(row, row) == dv.reverse_kl(row, row) == 0.0
    assert abs(dv.generalized_jsd(row, row, teacher_weight=0.4)) <= 1e-15
    assert largest(dv.forward_kl_gradient(row, row)) == 0.0
    assert largest(dv.reverse_kl_gradient(row, row)) == 0.0
    assert largest(dv.generalized_jsd_gradient(row, row, teacher_weight=0.4)) <= 1e-15
    for divergence, gradient in TRUNCATED:
        assert divergence(row, row, support) == 0.0
        assert largest(gradient(row, row, support)) <= 1e-15
    for jsd, jsd_gradient in TRUNCATED_JSD:
        assert abs(jsd(row, row, support, teacher_weight=0.4)) <= 1e-15
        assert largest(jsd_gradient(row, row, support, teacher_weight=0.4)) <= 1e-15


def test_renormalising_ignores_the_mass_on_the_support_and_the_bucket_does_not() -> None:
    teacher_logits = logit_rows(9)[1]
    support = [0, 2]
    student_logits = teacher_logits.copy()
    student_logits[support] += 1.0
    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    for divergence, gradient in TRUNCATED[:2]:
        assert abs(divergence(student, teacher, support)) <= 1e-15
        assert largest(gradient(student, teacher, support)) <= 1e-15
    for divergence, gradient in TRUNCATED[2:]:
        assert divergence(student, teacher, support) > 1e-2
        assert largest(gradient(student, teacher, support)) > 1e-2


def test_the_bucket_keeps_the_shape_of_the_students_tail() -> None:
    teacher_logits = logit_rows(10)[1]
    student = log_softmax(teacher_logits)
    support, first, second = [0, 2], 1, 3
    shift = math.log(0.25)
    moved = math.exp(student[first]) * (1 - math.exp(shift))
    student[first] += shift
    student[second] = math.log(math.exp(student[second]) + moved)
    teacher = log_softmax(teacher_logits)
    assert dv.reverse_kl(student, teacher) > 1e-2
    for divergence, gradient in TRUNCATED[2:]:
        assert abs(divergence(student, teacher, support)) <= 1e-14
        assert largest(gradient(student, teacher, support)) <= 1e-14


# --------------------------------------------------------------------------------------------
# Credit


def test_gaps_take_no_time_in_a_response_worked_out_by_hand() -> None:
    reward = [1.0, math.nan, 2.0, 4.0, math.nan]
    mask = [True, False, True, True, False]
    assert immediate(reward, mask).tolist() == [1, 0, 2, 4, 0]
    assert discounted(reward, mask, gamma=0.5).tolist() == [3, 0, 4, 4, 0]
    assert return_to_go(reward, mask).tolist() == [7, 0, 6, 4, 0]


def test_gaps_leave_the_advantages_of_the_closed_up_response() -> None:
    generator = np.random.default_rng(0)
    mask = np.array([True, True, False, False, True, False, True, True])
    reward = generator.normal(size=8)
    closed_up = discounted(reward[mask], np.ones(5, bool), gamma=0.7)
    assert discounted(reward, mask, gamma=0.7)[mask].tolist() == closed_up.tolist()


def test_the_ends_of_discounting_are_immediate_and_return_to_go() -> None:
    reward = np.random.default_rng(1).normal(size=6)
    mask = [True, False, True, True, True, False]
    assert discounted(reward, mask, gamma=0.0).tolist() == immediate(reward, mask).tolist()
    assert discounted(reward, mask, gamma=1.0).tolist() == return_to_go(reward, mask).tolist()


def test_the_per_state_baseline_is_the_expected_reward() -> None:
    logits, teacher_logits = logit_rows(11)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    expected = sum(
        math.exp(student[token]) * teacher_log_ratio(student, teacher, token)
        for token in range(len(student))
    )
    assert per_state_baseline(student, teacher) == pytest.approx(expected, abs=1e-14)
    assert expected < 0


def test_a_token_one_side_excludes_has_no_reward() -> None:
    with pytest.raises(ValueError, match="no finite log-ratio"):
        teacher_log_ratio(logs(0.5, 0.5), logs(1, 0), 1)


# --------------------------------------------------------------------------------------------
# Objectives

S, D, E, X, P = (
    int(Provenance.STUDENT),
    int(Provenance.DATA),
    int(Provenance.TEACHER),
    int(Provenance.TOOL),
    int(Provenance.PADDING),
)


class Case:
    """Five sequences: student, student with a tool's gap, data, teacher, and an empty one."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.provenance = np.array(
            [[S, S, S, S], [S, X, S, P], [D, D, P, P], [E, E, E, P], [P, P, P, P]]
        )
        self.mask = np.isin(self.provenance, (S, D, E))
        self.tokens = generator.integers(0, 4, size=(5, 4))
        self.student_logits = generator.normal(size=(5, 4, 4))
        self.teacher_logits = 1.5 * generator.normal(size=(5, 4, 4))

    def direct(self, method: Callable[..., ob.LossAndGradient]) -> ob.LossAndGradient:
        return self.at(method, self.student_logits)

    def at(
        self, method: Callable[..., ob.LossAndGradient], student_logits: Array
    ) -> ob.LossAndGradient:
        return method(student_logits, self.teacher_logits, self.tokens, self.mask, self.provenance)


REDUCTIONS = (ob.token_mean, ob.sequence_mean, ob.sequence_sum)


def gkd_with_weight(*arguments: npt.ArrayLike, reduction: ob.Reduction) -> ob.LossAndGradient:
    return ob.gkd(*arguments, teacher_weight=0.3, reduction=reduction)


def top_2_opd(*arguments: npt.ArrayLike, reduction: ob.Reduction) -> ob.LossAndGradient:
    return ob.top_k_opd(*arguments, k=2, special_ids=(3,), reduction=reduction)


DIRECT = (ob.reverse_kl_opd, gkd_with_weight, top_2_opd, ob.offpolicy_kd)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("method", DIRECT)
def test_direct_methods_match_finite_differences(
    method: Callable[..., ob.LossAndGradient], reduction: ob.Reduction
) -> None:
    case = Case()

    def reduced(*arguments: npt.ArrayLike) -> ob.LossAndGradient:
        return method(*arguments, reduction=reduction)

    numeric = finite_differences(lambda z: case.at(reduced, z).loss, case.student_logits)
    exact = case.direct(reduced)
    assert largest(exact.row_gradient) > 1e-2
    assert largest(exact.gradient - numeric) <= GRADIENT_BOUND


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("method", [ob.sampled_token_opd, ob.vopd])
def test_scored_methods_match_finite_differences_with_the_advantage_held_fixed(
    method: Callable[..., ob.LossAndGradient], reduction: ob.Reduction
) -> None:
    case = Case()
    rows = ob.select_rows(case.mask, case.provenance, ob.STUDENT)
    advantage = ob.log_ratios(case.student_logits, case.teacher_logits, case.tokens, rows)
    if method is ob.vopd:
        for b, t in zip(*np.nonzero(rows), strict=True):
            student = log_softmax(case.student_logits[b, t])
            advantage[b, t] += dv.reverse_kl(student, log_softmax(case.teacher_logits[b, t]))

    def held_fixed(z: Array) -> float:
        return ob.score_loss(
            z, case.tokens, case.mask, case.provenance, advantage, reduction=reduction
        ).loss

    exact = method(
        case.student_logits,
        case.teacher_logits,
        case.tokens,
        case.mask,
        case.provenance,
        reduction=reduction,
    )
    assert exact.loss == pytest.approx(held_fixed(case.student_logits), abs=1e-15)
    numeric = finite_differences(held_fixed, case.student_logits)
    assert largest(exact.gradient - numeric) <= GRADIENT_BOUND


def test_supervised_loss_matches_finite_differences() -> None:
    case = Case()

    def loss(z: Array) -> float:
        return ob.sft_on_teacher(z, case.tokens, case.mask, case.provenance).loss

    exact = ob.sft_on_teacher(case.student_logits, case.tokens, case.mask, case.provenance)
    numeric = finite_differences(loss, case.student_logits)
    assert largest(exact.gradient - numeric) <= GRADIENT_BOUND
    assert largest(exact.gradient[3, :3]) > 1e-2
    assert largest(exact.gradient[:3]) == 0.0


def clipping_case() -> tuple[Case, Array, Array]:
    """Eight pairs of a ratio and an advantage's sign; swapping low and high would move two."""
    case = Case()
    case.provenance = np.full((2, 4), S)
    case.mask = np.ones((2, 4), bool)
    case.tokens = case.tokens[:2]
    case.student_logits, case.teacher_logits = case.student_logits[:2], case.teacher_logits[:2]
    log_ratio = np.array([[-0.27, -0.1, 0.22, 0.5]] * 2)
    advantage = np.array([[1.5] * 4, [-0.5] * 4])
    old_logp = np.zeros((2, 4))
    for b, t in np.ndindex(2, 4):
        old_logp[b, t] = log_softmax(case.student_logits[b, t])[case.tokens[b, t]]
    return case, advantage, old_logp - log_ratio


def test_the_clipped_surrogate_matches_finite_differences_and_clips_two_of_eight_cases() -> None:
    case, advantage, old_logp = clipping_case()

    def clipped(z: Array) -> ob.LossAndGradient:
        return ob.clipped_loss(
            z,
            case.tokens,
            case.mask,
            case.provenance,
            advantage,
            old_logp,
            low=0.2,
            high=0.28,
        )

    exact = clipped(case.student_logits)
    numeric = finite_differences(lambda z: clipped(z).loss, case.student_logits)
    assert largest(exact.gradient - numeric) <= GRADIENT_BOUND
    moving = np.abs(exact.gradient).max(axis=2) > 1e-3
    assert moving.tolist() == [[True, True, True, False], [False, True, True, True]]
    by_hand = [
        [-1.5 * math.exp(-0.27), -1.5 * math.exp(-0.1), -1.5 * math.exp(0.22), -1.5 * 1.28],
        [0.5 * 0.8, 0.5 * math.exp(-0.1), 0.5 * math.exp(0.22), 0.5 * math.exp(0.5)],
    ]
    assert exact.row_loss == pytest.approx(np.array(by_hand))


def test_the_clipped_surrogate_is_the_textbook_minimum() -> None:
    case, advantage, old_logp = clipping_case()
    arguments = (case.student_logits, case.tokens, case.mask, case.provenance, advantage, old_logp)
    clipped = ob.clipped_loss(*arguments, low=0.2, high=0.28)
    unclipped = ob.importance_loss(*arguments)
    ratio = -unclipped.row_loss / advantage
    textbook = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
    assert clipped.row_loss == pytest.approx(textbook, abs=1e-15)


def test_surrogates_agree_where_the_old_policy_is_the_student() -> None:
    case, advantage, _ = clipping_case()
    old_logp = np.zeros((2, 4))
    for b, t in np.ndindex(2, 4):
        old_logp[b, t] = log_softmax(case.student_logits[b, t])[case.tokens[b, t]]
    first = (case.student_logits, case.tokens, case.mask, case.provenance, advantage)
    score = ob.score_loss(*first)
    for other in (
        ob.importance_loss(*first, old_logp),
        ob.clipped_loss(*first, old_logp, low=0.2, high=0.28),
    ):
        assert largest(other.gradient - score.gradient) <= 1e-15


def test_reductions_have_the_coefficients_worked_out_by_hand() -> None:
    rows = np.array([[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]], bool)
    quarter, half, sixth = 1 / 4, 1 / 2, 1 / 6
    for reduction, first, second in (
        (ob.token_mean, quarter, quarter),
        (ob.sequence_mean, half, sixth),
        (ob.sequence_sum, half, half),
    ):
        expected = [[first, 0, 0, 0], [second, second, 0, second], [0, 0, 0, 0]]
        assert reduction(rows) == pytest.approx(np.array(expected))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_empty_response_contributes_nothing(reduction: ob.Reduction) -> None:
    case = Case()

    def loss(kept: slice) -> float:
        return ob.gkd(
            case.student_logits[kept],
            case.teacher_logits[kept],
            case.tokens[kept],
            case.mask[kept],
            case.provenance[kept],
            teacher_weight=0.5,
            reduction=reduction,
        ).loss

    assert loss(slice(0, 5)) == loss(slice(0, 4)) != 0
    assert loss(slice(4, 5)) == 0.0


def test_rows_outside_a_loss_are_never_read() -> None:
    case, poisoned = Case(), Case()
    outside = ~ob.select_rows(case.mask, case.provenance, ob.STUDENT)
    poisoned.student_logits[outside] = math.nan
    poisoned.teacher_logits[outside] = math.nan
    for method in (ob.reverse_kl_opd, ob.sampled_token_opd, ob.vopd):
        clean, dirty = case.direct(method), poisoned.direct(method)
        assert clean.loss == dirty.loss
        assert np.array_equal(clean.gradient, dirty.gradient)
        assert largest(clean.gradient[outside]) == 0.0


def test_each_method_looks_at_the_rows_of_its_own_author() -> None:
    case = Case()
    authors: dict[Callable[..., ob.LossAndGradient], list[int]] = {
        ob.reverse_kl_opd: [S],
        ob.sampled_token_opd: [S],
        ob.vopd: [S],
        gkd_with_weight: [S, D, E],
        ob.offpolicy_kd: [E],
    }
    for method, kinds in authors.items():
        result = method(
            case.student_logits,
            case.teacher_logits,
            case.tokens,
            case.mask,
            case.provenance,
            reduction=ob.token_mean,
        )
        moving = np.abs(result.gradient).max(axis=2) > 0
        assert np.array_equal(moving, np.isin(case.provenance, kinds)), method


def test_gkd_weighs_data_and_student_text_by_their_share_of_the_rows() -> None:
    case = Case()
    whole = ob.gkd(
        case.student_logits,
        case.teacher_logits,
        case.tokens,
        case.mask,
        case.provenance,
        teacher_weight=0.5,
    ).loss
    parts = 0.0
    for kinds in ([S], [D], [E]):
        mask = np.isin(case.provenance, kinds)
        share = mask.sum() / case.mask.sum()
        parts += share * (
            ob.gkd(
                case.student_logits,
                case.teacher_logits,
                case.tokens,
                mask,
                case.provenance,
                teacher_weight=0.5,
            ).loss
        )
    assert whole == pytest.approx(parts, abs=1e-14)


def test_a_special_token_is_silenced_but_still_counted() -> None:
    case = Case()
    special = int(case.tokens[0, 0])
    arguments = (
        case.student_logits,
        case.teacher_logits,
        case.tokens,
        case.mask,
        case.provenance,
    )
    plain = ob.top_k_opd(*arguments, k=2)
    gated = ob.top_k_opd(*arguments, k=2, special_ids=(special,))
    is_special = case.tokens == special
    assert largest(gated.gradient[is_special]) == 0.0
    assert np.array_equal(gated.gradient[~is_special], plain.gradient[~is_special])
    assert largest(plain.gradient[is_special]) > 0.0


def test_top_k_follows_the_teacher_and_leaves_the_rest_alone() -> None:
    assert ob.top_k([0.0, 3.0, 3.0, -1.0, 4.0], 3) == [4, 1, 2]
    case = Case()
    result = case.direct(lambda *a: ob.top_k_opd(*a, k=2))
    for b, t in zip(*np.nonzero(np.isin(case.provenance, (S,))), strict=True):
        inside = set(np.argsort(-case.teacher_logits[b, t])[:2].tolist())
        assert {v for v in range(4) if result.gradient[b, t, v] != 0.0} == inside


def test_an_equal_teacher_gives_zero_loss_and_gradient_where_the_method_promises_it() -> None:
    case = Case()
    case.teacher_logits = case.student_logits.copy()
    for method in (*DIRECT, ob.sampled_token_opd, ob.vopd):
        result = method(
            case.student_logits,
            case.teacher_logits,
            case.tokens,
            case.mask,
            case.provenance,
            reduction=ob.token_mean,
        )
        assert abs(result.loss) <= 1e-15
        assert largest(result.gradient) <= 1e-15


def test_supervised_training_is_forward_kl_in_expectation_over_the_teachers_tokens() -> None:
    case = Case()
    row = (slice(3, 4), slice(0, 1))
    student, teacher = case.student_logits[row], case.teacher_logits[row]
    mask, provenance = case.mask[row], case.provenance[row]
    loss, gradient, entropy = 0.0, np.zeros(4), 0.0
    for token, logp in enumerate(log_softmax(teacher[0, 0])):
        result = ob.sft_on_teacher(student, np.array([[token]]), mask, provenance)
        loss += math.exp(logp) * result.loss
        gradient += math.exp(logp) * result.gradient[0, 0]
        entropy -= math.exp(logp) * logp
    forward = ob.offpolicy_kd(student, teacher, case.tokens[row], mask, provenance)
    assert loss - entropy == pytest.approx(forward.loss, abs=1e-14)
    assert largest(gradient - forward.gradient[0, 0]) <= 1e-14


# --------------------------------------------------------------------------------------------
# Enumeration

TREES = (
    pytest.param(Tree.random(seed=0), id="no-end"),
    pytest.param(Tree.random(seed=1, end_id=0), id="end"),
    pytest.param(Tree.random(seed=2, end_id=2, horizon=5), id="end-longer"),
)


def whole(response: Response) -> list[bool]:
    return [True] * len(response)


def immediate_of(tree: Tree) -> Callable[[Response], Sequence[float]]:
    return lambda y: immediate(tree.log_ratios(y), whole(y)).tolist()


def return_to_go_of(tree: Tree) -> Callable[[Response], Sequence[float]]:
    return lambda y: return_to_go(tree.log_ratios(y), whole(y)).tolist()


def test_a_tree_counts_its_states_and_responses() -> None:
    without_end, with_end = Tree.random(seed=0), Tree.random(seed=0, end_id=2)
    assert len(without_end.states) == 1 + 3 + 9 + 27
    assert len(without_end.responses()) == 81
    assert len(with_end.states) == 1 + 2 + 4 + 8
    assert len(with_end.responses()) == 1 + 2 + 4 + 8 * 3
    assert (2,) in with_end.responses()
    assert (0, 2) in with_end.responses()
    assert not any(2 in response[:-1] for response in with_end.responses())


@pytest.mark.parametrize("tree", TREES)
def test_response_probabilities_sum_to_one(tree: Tree) -> None:
    total = sum(tree.probability(response) for response in tree.responses())
    assert total == pytest.approx(1.0, abs=1e-13)


@pytest.mark.parametrize("tree", TREES)
def test_sequence_reverse_kl_is_minus_the_value_and_the_visited_divergences(tree: Tree) -> None:
    visited = sum(tree.probability(state) * tree.divergence(state) for state in tree.states)
    assert sequence_reverse_kl(tree) == pytest.approx(visited, abs=1e-13)
    assert value(tree, ()) == pytest.approx(-visited, abs=1e-13)
    assert visited > 0
    assert all(value(tree, response) == 0.0 for response in tree.responses())


def test_an_absorbing_end_token_leaves_the_sequence_reverse_kl_unchanged() -> None:
    tree = Tree.random(seed=3, end_id=1)
    total = 0.0
    for padded in itertools.product(range(3), repeat=tree.horizon):
        student = teacher = 0.0
        possible = True
        for t, token in enumerate(padded):
            state = padded[:t]
            if tree.end_id in state:
                possible = possible and token == tree.end_id
            else:
                student += tree.student(state)[token]
                teacher += tree.teacher(state)[token]
        if possible:
            total += math.exp(student) * (student - teacher)
    assert sequence_reverse_kl(tree) == pytest.approx(total, abs=1e-13)


@pytest.mark.parametrize("tree", TREES)
def test_exact_gradients_match_finite_differences(tree: Tree) -> None:
    numeric = finite_differences(
        lambda z: sequence_reverse_kl(tree.with_student(z)), tree.student_logits
    )
    assert largest(exact_sequence_reverse_kl_gradient(tree) - numeric) <= GRADIENT_BOUND
    reached = [tree.probability(state) for state in tree.states]

    def local(z: Array) -> float:
        moved = tree.with_student(z)
        visits = zip(reached, tree.states, strict=True)
        return sum(probability * moved.divergence(state) for probability, state in visits)

    numeric = finite_differences(local, tree.student_logits)
    assert largest(exact_local_gradient(tree) - numeric) <= GRADIENT_BOUND


@pytest.mark.parametrize("tree", TREES)
def test_immediate_credit_is_unbiased_for_the_local_gradient_only(tree: Tree) -> None:
    mean, _ = expected_gradient(tree, immediate_of(tree))
    assert largest(mean - exact_local_gradient(tree)) <= IDENTITY_BOUND
    assert largest(mean - exact_sequence_reverse_kl_gradient(tree)) > 1e-2


@pytest.mark.parametrize("tree", TREES)
def test_return_to_go_is_unbiased_for_the_sequence_gradient_only(tree: Tree) -> None:
    mean, _ = expected_gradient(tree, return_to_go_of(tree))
    assert largest(mean - exact_sequence_reverse_kl_gradient(tree)) <= IDENTITY_BOUND
    assert largest(mean - exact_local_gradient(tree)) > 1e-2


@pytest.mark.parametrize("tree", TREES)
def test_the_whole_reward_at_every_token_is_unbiased_for_the_sequence_gradient(
    tree: Tree,
) -> None:
    mean, _ = expected_gradient(tree, lambda y: [sum(tree.log_ratios(y))] * len(y))
    assert largest(mean - exact_sequence_reverse_kl_gradient(tree)) <= IDENTITY_BOUND


@pytest.mark.parametrize("tree", TREES)
def test_the_per_state_baseline_leaves_the_expectation_and_changes_the_variance(
    tree: Tree,
) -> None:
    def with_baseline(response: Response) -> list[float]:
        return [
            ratio - per_state_baseline(tree.student(response[:t]), tree.teacher(response[:t]))
            for t, ratio in enumerate(tree.log_ratios(response))
        ]

    plain, plain_variance = expected_gradient(tree, immediate_of(tree))
    mean, variance = expected_gradient(tree, with_baseline)
    assert largest(mean - plain) <= IDENTITY_BOUND
    assert abs(variance - plain_variance) > 1e-3


@pytest.mark.parametrize("tree", TREES)
def test_any_function_of_the_state_leaves_the_expectation_unchanged(tree: Tree) -> None:
    offset = dict(
        zip(tree.states, np.random.default_rng(5).normal(size=len(tree.states)), strict=True)
    )
    credit = return_to_go_of(tree)
    shifted, _ = expected_gradient(
        tree, lambda y: [a - offset[y[:t]] for t, a in enumerate(credit(y))]
    )
    assert largest(shifted - expected_gradient(tree, credit)[0]) <= 1e-12


@pytest.mark.parametrize("tree", TREES)
def test_one_step_residuals_of_the_exact_value_are_unbiased_for_the_sequence_gradient(
    tree: Tree,
) -> None:
    def residuals(response: Response) -> list[float]:
        return [
            ratio + value(tree, response[: t + 1]) - value(tree, response[:t])
            for t, ratio in enumerate(tree.log_ratios(response))
        ]

    mean, _ = expected_gradient(tree, residuals)
    assert largest(mean - exact_sequence_reverse_kl_gradient(tree)) <= IDENTITY_BOUND


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_future_rewards_may_be_replaced_by_their_expectations(tree: Tree, gamma: float) -> None:
    def expected_future(response: Response) -> list[float]:
        return [
            ratio
            - sum(
                gamma ** (k - t) * tree.divergence(response[:k])
                for k in range(t + 1, len(response))
            )
            for t, ratio in enumerate(tree.log_ratios(response))
        ]

    mean, _ = expected_gradient(tree, expected_future)
    sampled, _ = expected_gradient(
        tree, lambda y: discounted(tree.log_ratios(y), whole(y), gamma=gamma).tolist()
    )
    assert largest(mean - sampled) <= IDENTITY_BOUND


@pytest.mark.parametrize("tree", TREES)
def test_discounting_is_biased_for_both_gradients(tree: Tree) -> None:
    mean, _ = expected_gradient(
        tree, lambda y: discounted(tree.log_ratios(y), whole(y), gamma=0.5).tolist()
    )
    assert largest(mean - exact_local_gradient(tree)) > 1e-3
    assert largest(mean - exact_sequence_reverse_kl_gradient(tree)) > 1e-3


def test_the_variance_of_a_coin_is_the_one_worked_out_by_hand() -> None:
    tree = Tree.random(seed=0, vocab_size=2, horizon=1).with_student([[0.0, 0.0]])
    mean, variance = expected_gradient(tree, lambda _: [1.0])
    assert largest(mean) == 0.0
    assert variance == pytest.approx(0.5)
    mean, variance = expected_gradient(tree, lambda y: [1.0 if y == (0,) else -1.0])
    assert mean.tolist() == [[-0.5, 0.5]]
    assert variance == pytest.approx(0.0, abs=1e-15)


def test_an_equal_teacher_gives_zero_rewards_values_and_gradients() -> None:
    tree = Tree.random(seed=4, end_id=0)
    tree = tree.with_student(tree.teacher_logits)
    assert all(ratio == 0.0 for y in tree.responses() for ratio in tree.log_ratios(y))
    assert sequence_reverse_kl(tree) == value(tree, ()) == 0.0
    assert largest(exact_sequence_reverse_kl_gradient(tree)) <= 1e-15
    assert largest(exact_local_gradient(tree)) == 0.0
    mean, variance = expected_gradient(tree, return_to_go_of(tree))
    assert largest(mean) == variance == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_k_estimators_have_the_values_and_direct_gradients_the_theory_gives(seed: int) -> None:
    logits, teacher_logits = logit_rows(seed)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    first, second, third = (k(logits, teacher_logits) for k in (k1, k2, k3))
    divergence = dv.reverse_kl(student, teacher)
    assert first.value == pytest.approx(divergence, abs=IDENTITY_BOUND)
    assert third.value == pytest.approx(divergence, abs=IDENTITY_BOUND)
    assert abs(second.value - divergence) > 1e-3
    assert largest(first.gradient) <= IDENTITY_BOUND
    reverse = dv.reverse_kl_gradient(student, teacher)
    forward = dv.forward_kl_gradient(student, teacher)
    assert largest(second.gradient - reverse) <= IDENTITY_BOUND
    assert largest(third.gradient - forward) <= IDENTITY_BOUND
    assert largest(forward - reverse) > 1e-2


def test_k_estimators_differentiate_the_log_ratio_with_the_sampling_held_fixed() -> None:
    logits, teacher_logits = logit_rows(12)
    frozen, teacher = np.exp(log_softmax(logits)), log_softmax(teacher_logits)

    def k1_of(z: Array) -> float:
        return float((frozen * -(teacher - log_softmax(z))).sum())

    def k2_of(z: Array) -> float:
        return float((frozen * (teacher - log_softmax(z)) ** 2 / 2).sum())

    def k3_of(z: Array) -> float:
        log_ratio = teacher - log_softmax(z)
        return float((frozen * (np.exp(log_ratio) - 1 - log_ratio)).sum())

    for estimator, expectation in ((k1, k1_of), (k2, k2_of), (k3, k3_of)):
        exact = estimator(logits, teacher_logits)
        assert exact.value == pytest.approx(expectation(logits), abs=1e-14)
        numeric = finite_differences(expectation, logits)
        assert largest(exact.gradient - numeric) <= GRADIENT_BOUND


@pytest.mark.parametrize("tree", TREES)
def test_methods_averaged_over_every_response_descend_the_local_gradient(tree: Tree) -> None:
    batch = padded_responses(tree)
    local = exact_local_gradient(tree)
    for method in (ob.reverse_kl_opd, ob.sampled_token_opd, ob.vopd):
        result = method(
            batch.student_logits, batch.teacher_logits, batch.tokens, batch.mask, batch.provenance
        )
        gradient = batch.expectation(result.row_gradient, tree)
        assert largest(gradient - local) <= IDENTITY_BOUND, method.__name__


@pytest.mark.parametrize("tree", TREES)
def test_a_score_loss_with_return_to_go_descends_the_sequence_gradient(tree: Tree) -> None:
    batch = padded_responses(tree)
    reward = ob.log_ratios(batch.student_logits, batch.teacher_logits, batch.tokens, batch.mask)
    pairs = zip(reward, batch.mask, strict=True)
    advantage = np.array([return_to_go(rewards, mask) for rewards, mask in pairs])
    result = ob.score_loss(
        batch.student_logits, batch.tokens, batch.mask, batch.provenance, advantage
    )
    gradient = batch.expectation(result.row_gradient, tree)
    assert largest(gradient - exact_sequence_reverse_kl_gradient(tree)) <= IDENTITY_BOUND

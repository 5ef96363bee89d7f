"""The oracle of the diagnostics against values worked out on paper; L is log 2."""

from __future__ import annotations

import math

import numpy as np
import pytest

from . import diagnostics as dg
from .checks import Array, logs

NAN, INF = math.nan, math.inf
L = math.log(2)

# Teacher and student over four ids. Of the equal ids 2 and 3 of the student, and 0 and 3 of the
# teacher, the lower comes first:
#     k = 2: TopK_pi = {0, 1}, TopK_q = {1, 2}     k = 3: both are {0, 1, 2}
# Log-ratios, log q - log pi: -2L, L, L, 0.
STUDENT = logs(1 / 2, 1 / 4, 1 / 8, 1 / 8)
TEACHER = logs(1 / 8, 1 / 2, 1 / 4, 1 / 8)
NOWHERE = logs(0, 0, 1 / 2, 1 / 2)
LEFT = logs(3 / 4, 1 / 4, 0, 0)


def rows(*of: Array) -> Array:
    return np.stack(of)


def about(*numbers: float) -> object:
    return pytest.approx(list(numbers), abs=1e-12, nan_ok=True)


def test_overlap_shares_and_masses_of_the_top_lists() -> None:
    student, teacher = rows(STUDENT, LEFT), rows(TEACHER, NOWHERE)
    assert dg.top_k_overlap(student, teacher, k=2) == about(1 / 2, 0)
    assert dg.top_k_overlap(student, teacher, k=3) == about(1, 2 / 3)  # {0, 1, 2} and {2, 3, 0}
    assert dg.student_overlap_mass(student, teacher, k=2) == about(3 / 8, 0)
    assert dg.teacher_overlap_mass(student, teacher, k=2) == about(5 / 8, 0)
    assert dg.teacher_top_mass(student, teacher, k=2) == about(3 / 4, 1)
    of_student, of_teacher = dg.support_gap(student, teacher, k=2)
    assert of_student == about(5 / 8, 1)
    assert of_teacher == about(1 / 4, 0)


def test_overlap_advantage_is_the_students_mean_over_the_overlap() -> None:
    # k = 2: the overlap is {1}: 1 * L. Nothing in common: 0.
    student, teacher = rows(STUDENT, LEFT), rows(TEACHER, NOWHERE)
    assert dg.overlap_advantage(student, teacher, k=2) == about(L, 0)
    # k = 3: pi on {0, 1, 2} is 4/7, 2/7, 1/7: (-8 + 2 + 1) / 7 * L. The mean of the three products
    # would be a third of it.
    assert dg.overlap_advantage(student[:1], teacher[:1], k=3) == about(-5 / 7 * L)
    # One id in common, without mass for the student; and one that the teacher lacks.
    assert dg.overlap_advantage(
        rows(logs(1, 0, 0, 0), logs(1 / 2, 1 / 2, 0, 0)),
        rows(logs(0, 1 / 2, 1 / 2, 0), logs(1, 0, 0, 0)),
        k=2,
    ) == about(0, -INF)


def test_excess_surprise_takes_the_teachers_entropy_off() -> None:
    # H_q = (3/8 + 1/2 + 2/4 + 3/8) L = 7/4 L. Surprises 3L, L, 2L, 3L.
    teacher = rows(*[TEACHER] * 4)
    excess = dg.excess_surprise(TEACHER, teacher)
    assert excess == about(5 / 4 * L, -3 / 4 * L, L / 4, 5 / 4 * L)
    assert np.exp(TEACHER) @ excess == pytest.approx(0, abs=1e-12)
    assert dg.excess_surprise([-INF], rows(NOWHERE)) == about(INF)


def test_teacher_margin_compares_the_two_best_of_the_students_list() -> None:
    # {0, 1} with q = 1/8, 1/2; {0, 1, 2} with 1/2, 1/4 on top.
    assert dg.teacher_margin(rows(STUDENT), rows(TEACHER), k=2) == about(2 * L)
    assert dg.teacher_margin(rows(STUDENT), rows(TEACHER), k=3) == about(L)
    # {0, 1}, both without mass; {0, 1, 2}, of which only 2 has mass.
    assert dg.teacher_margin(rows(LEFT), rows(NOWHERE), k=2) == about(0)
    assert dg.teacher_margin(rows(LEFT), rows(NOWHERE), k=3) == about(INF)


def test_gradient_proxy_is_the_length_of_a_logit_gradient() -> None:
    # 1 - 1 + 22/64 and 1 - 1/4 + 22/64; a sure token gives nothing.
    students = rows(STUDENT, STUDENT, logs(1, 0, 0, 0))
    assert dg.gradient_proxy(students, [0, 2, 0]) ** 2 == about(22 / 64, 70 / 64, 0)


# Tokens 0, 1, 2: of the union {0, 1, 2} at k = 2, without the token, those with a positive ratio.
TOKENS = [0, 1, 2]
SAME = rows(STUDENT, STUDENT, STUDENT), rows(TEACHER, TEACHER, TEACHER)


def test_reachable_ids_are_in_either_list_and_underrated() -> None:
    assert dg.reachable(*SAME, TOKENS, k=2).tolist() == [
        [False, True, True, False],
        [False, False, True, False],
        [False, True, False, False],
    ]
    assert not dg.reachable(*SAME, TOKENS, k=2, margin=L + 1e-9).any()
    # Ids 2 and 3 are the teacher's alone: reachable without any mass of the student.
    lone = dg.reachable(rows(LEFT), rows(NOWHERE), [0], k=2)
    assert lone.tolist() == [[False, False, True, True]]


def test_leak_is_what_misses_the_reachable_ids() -> None:
    # 1 - (3/8) / (1/2), 1 - (1/8) / (3/4), 1 - (1/4) / (7/8); nobody there; nothing released.
    candidates = dg.reachable(*SAME, TOKENS, k=2)
    assert dg.leak(SAME[0], candidates, TOKENS) == about(1 / 4, 5 / 6, 5 / 7)
    students = rows(STUDENT, logs(1, 0, 0, 0))
    assert dg.leak(students, np.array([[False] * 4, [False, True, False, False]]), [0, 0]) == about(
        1, 1
    )


def test_routable_share_is_among_negative_rows_with_a_candidate_of_mass() -> None:
    # q(C+) = 3/4, 1/4, 1/2 and none. The last row is negative, the third is not.
    candidates = np.vstack([dg.reachable(*SAME, TOKENS, k=2), [[False] * 4]])
    teacher = rows(*[TEACHER] * 4)
    advantage = [-1.0, -2.0, 1.0, -0.5]
    for mass, share in ((0.0, 2 / 3), (0.25, 2 / 3), (0.26, 1 / 3), (0.8, 0.0)):
        assert dg.routable_share(advantage, candidates, teacher, mass=mass) == pytest.approx(share)
    assert math.isnan(dg.routable_share(np.ones(4), candidates, teacher, mass=0.0))


def test_realised_routing_divides_sums_over_rows() -> None:
    # Row 0: y = 0 loses 1/4, C+ = {1, 2} gains 5/8 - 3/8. Row 1: y = 1 loses 1/8, C+ = {3} gains 0.
    # (1/4) / (3/8); the mean of the rows' quotients would be 1/2. Row 2: y = 0 loses 1/4, and there
    # is no candidate: (1/4) / (5/8).
    even = logs(1 / 4, 1 / 4, 1 / 4, 1 / 4)
    before = rows(STUDENT, even, even)
    after = rows(
        logs(1 / 4, 3 / 8, 1 / 4, 1 / 8),
        logs(3 / 8, 1 / 8, 1 / 4, 1 / 4),
        logs(0, 1 / 2, 1 / 4, 1 / 4),
    )
    candidates = np.array(
        [[False, True, True, False], [False, False, False, True], [False, False, False, False]]
    )
    tokens = [0, 1, 0]
    two = dg.realised_routing(before[:2], after[:2], candidates[:2], tokens[:2])
    assert two == pytest.approx(2 / 3)
    assert dg.realised_routing(before, after, candidates, tokens) == pytest.approx(2 / 5)
    assert math.isnan(dg.realised_routing(before, before, candidates, tokens))


def test_concentration_of_sizes() -> None:
    # (3 + 1)^2 / (9 + 1) = 8/5 of 4 rows. ceil(0.3 * 4) = 2 largest: 4/4; 1 largest: 3/4.
    sizes = [0.0, 3.0, 0.0, 1.0]
    assert dg.effective_share(sizes) == pytest.approx(2 / 5)
    assert dg.top_share(sizes, 0.3) == pytest.approx(1)
    assert dg.top_share(sizes) == pytest.approx(3 / 4)
    # 0.07 * 100 is 7.000000000000001 as floats multiply; seven rows are meant.
    assert dg.top_share(np.ones(100), 0.07) == pytest.approx(0.07)
    assert dg.negative_mass([-3.0, 1.0, 0.0]) == pytest.approx(3 / 4)
    assert dg.negative_share([-3.0, 1.0, 0.0]) == pytest.approx(1 / 3)


def test_a_map_keeps_equal_numbers_together_in_the_lowest_part_that_one_has() -> None:
    # Of 4 rows in 2 parts: 0, 0, 0 have none below, 5 has 3/4. Of 1, 2, 3, 4 the first two.
    table = dg.disagreement_map([0.0, 5.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0], [-3.0, 1, 0, 4], 2)
    assert table[0].tolist() == [[2 / 4, 1 / 4], [0.0, 1 / 4]]
    assert table[1].tolist() == [[4 / 8, 3 / 8], [0.0, 1 / 8]]


def test_align_auc_counts_ties_half_and_skips_the_unjudged() -> None:
    # Right .4, .8 against wrong .1, .4: 1 + 1/2 + 1 + 1 of 4 pairs.
    score = [0.1, 0.4, 0.4, 0.8, 0.9]
    assert dg.align_auc(score, [0, 0, 1, 1, NAN]) == pytest.approx(3.5 / 4)
    # A verdict of 0.5 is right too: the same pairs.
    assert dg.align_auc(score, [0, 0, 0.5, 1, NAN]) == pytest.approx(3.5 / 4)
    assert math.isnan(dg.align_auc(score, [0, 0, 0, 0, NAN]))


def test_explained_variance_ignores_a_constant_offset() -> None:
    # Target 1, 2, 3, 6: squares about 3 sum to 14. Rest -1, 0, -1, 1: 3 - 4 / 16 = 11/4.
    target, values = np.array([1.0, 2, 3, 6]), np.array([2.0, 2, 4, 5])
    assert dg.explained_variance(values, target) == pytest.approx(45 / 56)
    assert dg.explained_variance(values + 7, target) == pytest.approx(45 / 56)
    assert math.isnan(dg.explained_variance(values, [0.1] * 4))


def test_suffix_fade_pools_the_thirds_of_every_response() -> None:
    # Six open tokens about a gap: first third 4, 4, last 2, 2. Three: first 1, last 2. Two: first
    # 3, no last. (2 + 2 + 2) / 3 over (4 + 4 + 1 + 3) / 4.
    value = np.array([[4.0, 4, NAN, 1, 1, 2, 2], [1, 7, 2, 9, 9, 9, 9], [3, 9, 9, 9, 9, 9, 9]])
    mask = np.array([[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    assert dg.suffix_fade(value, mask) == pytest.approx(2 / 3)
    # Spike: (4 + 1 + 3) / 3 over (4 + 1 + 1 + 2 + 2 + 7 + 2 + 9) / 8.
    assert dg.first_token_spike(value, mask) == pytest.approx(8 / 3 / (28 / 8))
    # Absolute places, the gap taking none: [0, 2) and [2, 4): 4 4 1 7 3 9 and 1 1 2; [6, 9) empty.
    assert dg.profile(value, mask, [0, 2, 4]) == about(28 / 6, 4 / 3)
    assert dg.profile(value, mask, [6, 9]) == about(NAN)


def test_bins_along_a_response_are_relative_to_its_own_length() -> None:
    # Two bins: of four tokens two each, of three about a gap (t/len = 0, 1/3, 2/3) two and one.
    r = np.array([[1.0, 3, 2, 2], [1, 99, 3, 5]])
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 1]])
    assert dg.td_residual_by_bin(r, mask, 2) == about(2, 3)
    # 1, 3, 1, 3 about 2: 4/4. 2, 2, 5 about 3: 6/3.
    assert dg.dispersion_by_bin(r, mask, 2) == about(1, math.sqrt(2))
    assert dg.drift_budget(-r, mask) == pytest.approx(np.array([[0, 1, 4, 6], [0, 0, 1, 4]]))


def test_change_point_is_downward_and_pays_for_its_place() -> None:
    assert dg.change_point([2.0, 2, 0, 0]) == 2
    assert dg.change_point([0.0, 0, 2, 2]) is None
    # One mean: RSS 1, 4 log(1/4) + log 4 = -4.159. Split at 1 or 3: RSS 2/3, 4 log(1/6) + 3 log 4 =
    # -3.008, with two parameters in place of three -4.394 and chosen.
    assert dg.change_point([1.0, 0, 1, 0]) is None
    # RSS: split at 3 (means 8/3, 1/2) 2/3 + 1/2, at 2 (3, 1) 0 + 2, at 4 11/4; one mean 34/5.
    assert dg.change_point([3.0, 3, 2, 1, 0]) == 3
    assert dg.change_point([0.1] * 7) is None
    assert dg.change_point([1.0]) is None


def test_calibration_error_has_bins_closed_on_the_right() -> None:
    # Two bins: {1/4, 1/2, 1/2, 0} with mean 5/16 and 2 right of 4, {1} right: 4/5 * 3/16. Closed on
    # the left it would be 2/5 * 1/8 + 3/5 * 1/3 = 1/4.
    confidence = [0.25, 0.5, 0.5, 1.0, 0.0, 0.9]
    verdict = [0, 1, 1, 1, 0, NAN]
    assert dg.calibration_error(confidence, verdict, 2) == pytest.approx(3 / 20)
    # 0.3 is the last of the third tenth, with 0.21: |1/2 - 0.255|.
    assert dg.calibration_error([0.3, 0.21], [1, 0]) == pytest.approx(0.245)


def test_ratios_of_samples() -> None:
    # mu = 1/2, 1/4, 1/2 and pi = 1/8, 1/4, 1/4: logs 2L, 0, L; ratios 1/4, 1, 1/2.
    old, student = logs(1 / 2, 1 / 4, 1 / 2), logs(1 / 8, 1 / 4, 1 / 4)
    assert dg.kl_from_samples(old, student) == pytest.approx(L)
    assert dg.importance_ratio(old, student) == pytest.approx(7 / 12)
    assert dg.log_mismatch(student, old) == pytest.approx(L)
    assert dg.kl_from_samples([-INF], [-INF]) == 0
    assert dg.cache_drift([-INF, -1.0], [-INF, -3.0]) == (1, 2)
    # Below 1/2 only 1/4: a third of the rows, 1/7 of the mass.
    ratio = np.exp(student - old)
    assert dg.masked_share(ratio, 0.5, 1.0) == pytest.approx(1 / 3)
    assert dg.importance_mass_masked(ratio, 0.5, 1.0) == pytest.approx(1 / 7)


def test_divergences_are_infinite_only_where_mass_is_missing() -> None:
    # pi against q: (2/2 - 1/4 - 1/8) L; q against pi: (-2/8 + 1/2 + 1/4) L.
    student, teacher = rows(STUDENT, LEFT, LEFT), rows(TEACHER, NOWHERE, LEFT)
    assert dg.reverse_kl(student, teacher) == about(5 / 8 * L, INF, 0)
    assert dg.forward_kl(student, teacher) == about(L / 2, INF, 0)
    # EOS set {2, 3}: 1/4 against 3/8; 0 against 1; 0 against 0.
    assert dg.eos_divergence(student, teacher, [2, 3]) == about(math.log(3 / 2), INF, 0)
    between = dg.pairwise_kl(np.stack([student[:1], teacher[:1]]))
    assert between == pytest.approx(np.array([[0, 5 / 8 * L], [L / 2, 0]]))


def test_texts_and_outcomes() -> None:
    # 1 2 1 2 (gap) 1: the bigrams 12 21 12 21; two tokens are shorter than three.
    tokens, mask = np.array([[1, 2, 1, 2, 9, 1]]), np.array([[1, 1, 1, 1, 0, 1]])
    assert dg.repeated_ngrams(tokens, mask, 2) == about(1 / 2)
    assert dg.repeated_ngrams(tokens[:, :2], mask[:, :2], 3) == about(NAN)
    texts = ["Maybe so", "maybes", "I am not sure.", "sure"]
    assert dg.hedging_share(texts, ["maybe", "not sure"]) == 0.5
    assert dg.split_delta([True, True, False, False], [1, 0, 1, NAN]) == (-0.5, 1)
    # Ids 5: (1 + 3) / 2, 7: 2, 6: 1; of equals the lower id.
    assert dg.excess_id_ratio([1.0, -2, -3, 1], [5, 7, 5, 6], 2) == [(5, 2, 2.0), (7, 1, 2.0)]
    assert dg.outcome_correlation([1.0, 2, 3, NAN], [0, 0, 1, 1]) == pytest.approx(math.sqrt(3) / 2)
    # 1/10 of the way from 1 to 2, and the middle.
    assert dg.quantiles([3.0, 1, 2], (0.05, 0.5)) == pytest.approx({0.05: 1.1, 0.5: 2})


def test_nothing_gives_no_value() -> None:
    none, row, closed = np.zeros(0), np.zeros((0, 4)), np.zeros((2, 3), dtype=bool)
    zeros = np.zeros((2, 3))
    numbers = {
        "negative_share": dg.negative_share(none),
        "negative_mass": dg.negative_mass([0.0]),
        "effective_share": dg.effective_share(none),
        "top_share": dg.top_share(none),
        "routable_share": dg.routable_share(none, row, row, mass=0.0),
        "realised_routing": dg.realised_routing(row, row, row, none),
        "marginal_info": dg.marginal_info(none),
        "align_auc": dg.align_auc(none, none),
        "outcome_correlation": dg.outcome_correlation(none, none),
        "cosine": dg.cosine(none, none),
        "explained_variance": dg.explained_variance(none, none),
        "gradient_variance": dg.gradient_variance(np.zeros((1, 3))),
        "importance_ratio": dg.importance_ratio(none, none),
        "kl_from_samples": dg.kl_from_samples(none, none),
        "log_mismatch": dg.log_mismatch(none, none),
        "masked_share": dg.masked_share(none, 0.5, 2.0),
        "importance_mass_masked": dg.importance_mass_masked(none, 0.5, 2.0),
        "cache_drift": max(dg.cache_drift(none, none)),
        "suffix_fade": dg.suffix_fade(zeros, closed),
        "first_token_spike": dg.first_token_spike(zeros, closed),
        "length_mean": dg.length_mean(closed[:0]),
        "truncated_share": dg.truncated_share([]),
        "mean_entropy": dg.mean_entropy(row),
        "calibration_error": dg.calibration_error(none, none),
        "hedging_share": dg.hedging_share([], ["maybe"]),
        "privilege_gap": dg.privilege_gap(none, none),
        "recoverability": dg.recoverability(none, none),
        "retokenised_share": dg.retokenised_share([], []),
        "split_delta": max(dg.split_delta(none, none)),
        "quantiles": dg.quantiles(none)[0.5],
    }
    assert [name for name, number in numbers.items() if not math.isnan(number)] == []
    for per_bin in (
        dg.td_residual_by_bin(zeros, closed, 2),
        dg.dispersion_by_bin(zeros, closed, 2),
        dg.profile(zeros, closed, [0, 1, 2]),
        dg.repeated_ngrams(zeros, closed, 1),
    ):
        assert per_bin == about(NAN, NAN)
    assert np.isnan(dg.disagreement_map(none, none, none, 2)).all()
    assert dg.change_point(none) is None
    assert dg.excess_id_ratio(none, none, 3) == []
    assert not dg.drift_budget(zeros, closed).any()
    for per_row in (
        dg.overlap_advantage(row, row, k=2),
        dg.teacher_confidence(row),
        dg.teacher_margin(row, row, k=2),
        dg.leak(row, row, none),
    ):
        assert per_row.shape == (0,)
    assert dg.reachable(row, row, none, k=2).shape == (0, 4)

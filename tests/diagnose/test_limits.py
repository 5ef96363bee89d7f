"""Teacher = student, zero mass, nothing at all, dtypes: what the diagnostics say there exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from opd import catalog, diagnose
from opd.errors import ConfigError, DataError
from tests.diagnose.worlds import Rows, draw, with_nothing

NOWHERE = math.nan


def rows_with_nothing() -> Rows:
    """Rows of which a third of the entries have no mass, other ones on either side."""
    made = Rows.random(rows=60, vocabulary=9)
    hidden = torch.rand(2, 60, 9, generator=made.generator) < 0.3
    student = with_nothing(made.student, hidden[0])
    return Rows(
        student,
        with_nothing(made.teacher, hidden[1]),
        draw(student, made.generator),
        made.generator,
    )


# --------------------------------------------------------------------------------------------
# The teacher is the student


ROWS = rows_with_nothing()
LOG_PROBS, TOKENS = ROWS.student, ROWS.tokens
LOGP = ROWS.logp(LOG_PROBS)
ZERO = torch.zeros(60, dtype=torch.float64)
BY_TOKEN, OPEN = ZERO.reshape(6, 10), torch.ones(6, 10, dtype=torch.bool)
NOBODY = torch.zeros_like(LOG_PROBS, dtype=torch.bool)
HALVES = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
SCORES = torch.tensor([0.0, 1.0, math.nan, 0.5])


def top(k: int) -> Tensor:
    return LOG_PROBS.exp().sort(-1, descending=True).values[:, :k].sum(-1)


STATIONARY: dict[str, tuple[Callable[[], Any], Any]] = {
    "top_k_overlap": (lambda: diagnose.top_k_overlap(LOG_PROBS, LOG_PROBS, k=4), 1.0),
    "student_overlap_mass": (
        lambda: diagnose.student_overlap_mass(LOG_PROBS, LOG_PROBS, k=4) - top(4),
        0.0,
    ),
    "teacher_overlap_mass": (
        lambda: diagnose.teacher_overlap_mass(LOG_PROBS, LOG_PROBS, k=4) - top(4),
        0.0,
    ),
    "teacher_top_mass": (
        lambda: diagnose.teacher_top_mass(LOG_PROBS, LOG_PROBS, k=4) - top(4),
        0.0,
    ),
    "overlap_advantage": (lambda: diagnose.overlap_advantage(LOG_PROBS, LOG_PROBS, k=4), 0.0),
    "entropy_gap": (lambda: diagnose.entropy_gap(LOG_PROBS, LOG_PROBS), 0.0),
    "teacher_surprise": (lambda: diagnose.teacher_surprise(LOGP) + LOGP, 0.0),
    "excess_surprise": (  # in the mean over every token that could be drawn
        lambda: torch.stack(
            [
                torch.where(
                    LOG_PROBS[:, v] > -math.inf,
                    LOG_PROBS[:, v].exp() * diagnose.excess_surprise(LOG_PROBS[:, v], LOG_PROBS),
                    0.0,
                )
                for v in range(9)
            ]
        ).sum(0),
        0.0,
    ),
    "teacher_confidence": (lambda: diagnose.teacher_confidence(LOG_PROBS) - top(1), 0.0),
    "teacher_margin": (
        lambda: (
            diagnose.teacher_margin(LOG_PROBS, LOG_PROBS, k=4) - (top(1) / (top(2) - top(1))).log()
        ),
        0.0,
    ),
    "support_gap": (lambda: diagnose.support_gap(LOG_PROBS, LOG_PROBS, k=9), (0.0, 0.0)),
    "dispersion_by_bin": (lambda: diagnose.dispersion_by_bin(BY_TOKEN, OPEN, 3), NOWHERE),
    "profile": (lambda: diagnose.profile(BY_TOKEN, OPEN, [0, 5, 10]), 0.0),
    "drift_budget": (lambda: diagnose.drift_budget(BY_TOKEN, OPEN), 0.0),
    "change_point": (lambda: diagnose.change_point(torch.full((9,), 0.7)), None),
    "suffix_fade": (lambda: diagnose.suffix_fade(BY_TOKEN, OPEN), NOWHERE),
    "first_token_spike": (lambda: diagnose.first_token_spike(BY_TOKEN, OPEN), NOWHERE),
    "eos_divergence": (lambda: diagnose.eos_divergence(LOG_PROBS, LOG_PROBS, [0, 3]), 0.0),
    "excess_id_ratio": (
        lambda: torch.tensor([size for *_, size in diagnose.excess_id_ratio(ZERO, TOKENS, 9)]),
        0.0,
    ),
    "retokenised_share": (lambda: diagnose.retokenised_share([[1], []], [(1,), ()]), 1.0),
    "cache_drift": (lambda: diagnose.cache_drift(LOG_PROBS, LOG_PROBS), (0.0, 0.0)),
    "reverse_kl": (lambda: diagnose.reverse_kl(LOG_PROBS, LOG_PROBS), 0.0),
    "forward_kl": (lambda: diagnose.forward_kl(LOG_PROBS, LOG_PROBS), 0.0),
    "log_ratio": (lambda: diagnose.log_ratio(LOGP, LOGP), 0.0),
    "quantiles": (lambda: tuple(diagnose.quantiles(ZERO).values()), (0.0,) * 5),
    "negative_share": (lambda: diagnose.negative_share(ZERO), 0.0),
    "negative_mass": (lambda: diagnose.negative_mass(ZERO), NOWHERE),
    "marginal_info": (
        lambda: diagnose.marginal_info(diagnose.reverse_kl(LOG_PROBS, LOG_PROBS)),
        0.0,
    ),
    "mean_entropy": (
        lambda: diagnose.mean_entropy(HALVES.log()) - math.log(2),
        0.0,
    ),
    "pairwise_kl": (lambda: diagnose.pairwise_kl(torch.stack([LOG_PROBS] * 3)), 0.0),
    "self_distillation_residual": (
        lambda: diagnose.self_distillation_residual(ZERO, ZERO),
        (0.0, 0.0),
    ),
    "gradient_proxy": (
        lambda: diagnose.gradient_proxy(torch.tensor([[0.0, -math.inf]]), torch.tensor([0])),
        0.0,
    ),
    "effective_share": (lambda: diagnose.effective_share(ZERO), NOWHERE),
    "top_share": (lambda: diagnose.top_share(ZERO), NOWHERE),
    "cosine": (lambda: diagnose.cosine(LOGP, 3 * LOGP), 1.0),
    "disagreement_map": (lambda: diagnose.disagreement_map(LOGP, LOGP, ZERO)[1], NOWHERE),
    "explained_variance": (lambda: diagnose.explained_variance(LOGP + 1, LOGP), 1.0),
    "td_residual_by_bin": (lambda: diagnose.td_residual_by_bin(BY_TOKEN, OPEN, 3), 0.0),
    "gradient_variance": (lambda: diagnose.gradient_variance(LOGP.expand(5, -1)), 0.0),
    "reachable": (lambda: diagnose.reachable(LOG_PROBS, LOG_PROBS, TOKENS, k=4), 0.0),
    "routable_share": (
        lambda: diagnose.routable_share(ZERO, NOBODY, LOG_PROBS, mass=0.0),
        NOWHERE,
    ),
    "leak": (lambda: diagnose.leak(LOG_PROBS, NOBODY, TOKENS), 1.0),
    "realised_routing": (
        lambda: diagnose.realised_routing(LOG_PROBS, LOG_PROBS, ~NOBODY, TOKENS),
        NOWHERE,
    ),
    "align_auc": (lambda: diagnose.align_auc(torch.zeros(4), SCORES), 0.5),
    "outcome_correlation": (
        lambda: diagnose.outcome_correlation(torch.full((4,), 0.1), SCORES),
        NOWHERE,
    ),
    "split_delta": (lambda: diagnose.split_delta(SCORES > 0.5, SCORES.round()), (0.0, 0.0)),
    "privilege_gap": (lambda: diagnose.privilege_gap(SCORES, SCORES), 0.0),
    "recoverability": (lambda: diagnose.recoverability(SCORES, SCORES), 0.0),
    "calibration_error": (lambda: diagnose.calibration_error(SCORES[:3], SCORES[:3]), 0.0),
    "hedging_share": (lambda: diagnose.hedging_share(["", "It is 7."], ["perhaps"]), 0.0),
    "importance_ratio": (lambda: diagnose.importance_ratio(LOGP, LOGP), 1.0),
    "kl_from_samples": (lambda: diagnose.kl_from_samples(LOGP, LOGP), 0.0),
    "log_mismatch": (lambda: diagnose.log_mismatch(LOG_PROBS, LOG_PROBS), 0.0),
    "masked_share": (lambda: diagnose.masked_share(ZERO.exp(), 1.0, 1.0), 0.0),
    "importance_mass_masked": (
        lambda: diagnose.importance_mass_masked(ZERO.exp(), 1.0, 1.0),
        0.0,
    ),
    "length_mean": (lambda: diagnose.length_mean(OPEN), 10.0),
    "truncated_share": (lambda: diagnose.truncated_share(["eos", "eos"]), 0.0),
    "repeated_ngrams": (
        lambda: diagnose.repeated_ngrams(torch.arange(60).reshape(6, 10), OPEN, 4),
        0.0,
    ),
}
"""What is asked where the teacher is the student or the text is sound, and the exact answer."""

EXACT = {"student_overlap_mass", "teacher_overlap_mass", "teacher_top_mass", "teacher_margin"}
EXACT |= {"excess_surprise", "teacher_confidence", "cosine", "explained_variance", "mean_entropy"}
"""Answers that are compared with a sum in another order; all others to the last bit."""


@pytest.mark.parametrize("name", catalog.diagnostics())
def test_a_teacher_that_is_the_student_gives_exactly_the_stationary_value(name: str) -> None:
    ask, wanted = STATIONARY[name]
    found = ask()
    if wanted is None or found is None:
        assert found is wanted
        return
    both = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    for value, want in both:
        value = torch.as_tensor(value).double()
        want = torch.full_like(value, want)
        assert value.numel()
        torch.testing.assert_close(
            value, want, rtol=0, atol=1e-14 if name in EXACT else 0, equal_nan=True
        )


# --------------------------------------------------------------------------------------------
# Zero mass


def values_of(found: Any) -> Tensor:
    if isinstance(found, tuple):
        return torch.cat([values_of(each) for each in found])
    return torch.as_tensor(found).double().reshape(-1)


@pytest.mark.parametrize("k", [2, 5, 9])
def test_entries_without_mass_never_give_nan_and_infinity_only_where_it_is_true(k: int) -> None:
    student, teacher, tokens = ROWS.student, ROWS.teacher, ROWS.tokens
    student_logp, teacher_logp = ROWS.logp(student), ROWS.logp(teacher)
    finite = [
        diagnose.top_k_overlap(student, teacher, k=k),
        diagnose.student_overlap_mass(student, teacher, k=k),
        diagnose.teacher_overlap_mass(student, teacher, k=k),
        diagnose.teacher_top_mass(student, teacher, k=k),
        diagnose.entropy_gap(student, teacher),
        diagnose.teacher_confidence(teacher),
        diagnose.support_gap(student, teacher, k=k),
        diagnose.gradient_proxy(student, tokens),
        diagnose.mean_entropy(student),
    ]
    listed = diagnose.reachable(student, teacher, tokens, k=k)
    finite += [
        diagnose.leak(student, listed, tokens),
        diagnose.routable_share(teacher_logp - student_logp, listed, teacher, mass=0.1),
    ]
    for found in finite:
        assert values_of(found).isfinite().all()
    gone = teacher_logp == -math.inf
    assert gone.any()
    assert not gone.all()
    assert torch.equal(diagnose.log_ratio(student_logp, teacher_logp).isinf(), gone)
    assert torch.equal(diagnose.teacher_surprise(teacher_logp).isinf(), gone)
    assert torch.equal(diagnose.excess_surprise(teacher_logp, teacher).isinf(), gone)
    used = student > -math.inf
    known = teacher > -math.inf
    assert torch.equal(diagnose.reverse_kl(student, teacher).isinf(), (used & ~known).any(-1))
    assert torch.equal(diagnose.forward_kl(student, teacher).isinf(), (known & ~used).any(-1))
    advantage = diagnose.overlap_advantage(student, teacher, k=k)
    assert not advantage.isnan().any()
    assert (advantage < math.inf).all()
    margin = diagnose.teacher_margin(student, teacher, k=k)
    assert not margin.isnan().any()
    assert (margin >= 0).all()
    ends = diagnose.eos_divergence(student, teacher, [1, 2])
    one_sided = used[:, 1:3].any(-1) != known[:, 1:3].any(-1)
    assert torch.equal(ends.isinf(), one_sided)
    assert not ends.isnan().any()


def test_infinite_log_ratios_count_for_all_of_the_mass() -> None:
    r = torch.tensor([-math.inf, 1.0, 2.0, -math.inf])
    assert diagnose.negative_mass(r) == 1.0
    assert diagnose.effective_share(r.abs()) == 0.5
    assert diagnose.top_share(r.abs(), 0.25) == 0.5
    assert diagnose.quantiles(r, (0.0, 0.3, 0.4, 2 / 3, 1.0)) == pytest.approx(
        {0.0: -math.inf, 0.3: -math.inf, 0.4: -math.inf, 2 / 3: 1.0, 1.0: 2.0}
    )
    ratio = torch.tensor([0.0, 1.0, math.inf])
    assert diagnose.importance_mass_masked(ratio, 0.5, 2.0) == 1.0
    assert diagnose.masked_share(ratio, 0.5, 2.0) == pytest.approx(2 / 3)
    assert diagnose.outcome_correlation(r, torch.tensor([0.0, 1.0, 1.0, 0.0])) == 1.0
    assert diagnose.align_auc(r, torch.tensor([0.0, 1.0, 1.0, 0.0])) == 1.0
    four = r.reshape(1, 4)
    mask = torch.ones_like(four, dtype=torch.bool)
    # Thirds of four: the first two tokens, the last one; half of the first is infinite.
    assert diagnose.suffix_fade(four.abs(), mask) == 2.0
    assert diagnose.first_token_spike(four.abs(), mask) == 3.0
    by_row = diagnose.disagreement_map(torch.arange(4.0), torch.zeros(4), r)[1, :, 0]
    assert by_row.tolist() == [float(each) / 2 for each in r.isinf()]
    assert diagnose.drift_budget(four[:, [1, 0, 2]], mask[:, :3]).tolist() == [[0, 1, math.inf]]


# --------------------------------------------------------------------------------------------
# Nothing at all

NO_ROWS = torch.zeros(0, 5)
NONE, NO_TOKENS, NO_FLAGS = (
    torch.zeros(0),
    torch.zeros(0, dtype=torch.long),
    torch.zeros(0, dtype=torch.bool),
)
CLOSED, CLOSED_MASK = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)

NOTHING: dict[str, Callable[[], Any]] = {
    "quantiles": lambda: tuple(diagnose.quantiles(NONE).values()),
    "negative_share": lambda: diagnose.negative_share(NONE),
    "negative_mass": lambda: diagnose.negative_mass(NONE),
    "effective_share": lambda: diagnose.effective_share(NONE),
    "top_share": lambda: diagnose.top_share(NONE),
    "routable_share": lambda: diagnose.routable_share(
        NONE, torch.zeros(0, 5, dtype=torch.bool), NO_ROWS, mass=0.1
    ),
    "realised_routing": lambda: diagnose.realised_routing(
        NO_ROWS, NO_ROWS, torch.zeros(0, 5, dtype=torch.bool), NO_TOKENS
    ),
    "marginal_info": lambda: diagnose.marginal_info(NONE),
    "align_auc": lambda: diagnose.align_auc(NONE, NONE),
    "outcome_correlation": lambda: diagnose.outcome_correlation(NONE, NONE),
    "split_delta": lambda: diagnose.split_delta(NO_FLAGS, NONE),
    "cosine": lambda: diagnose.cosine(NONE, NONE),
    "disagreement_map": lambda: diagnose.disagreement_map(NONE, NONE, NONE),
    "explained_variance": lambda: diagnose.explained_variance(NONE, NONE),
    "td_residual_by_bin": lambda: diagnose.td_residual_by_bin(CLOSED, CLOSED_MASK, 2),
    "gradient_variance": lambda: diagnose.gradient_variance(torch.zeros(0, 3)),
    "importance_ratio": lambda: diagnose.importance_ratio(NONE, NONE),
    "kl_from_samples": lambda: diagnose.kl_from_samples(NONE, NONE),
    "log_mismatch": lambda: diagnose.log_mismatch(NONE, NONE),
    "masked_share": lambda: diagnose.masked_share(NONE, 0.5, 2.0),
    "importance_mass_masked": lambda: diagnose.importance_mass_masked(NONE, 0.5, 2.0),
    "cache_drift": lambda: diagnose.cache_drift(NONE, NONE),
    "suffix_fade": lambda: diagnose.suffix_fade(CLOSED, CLOSED_MASK),
    "dispersion_by_bin": lambda: diagnose.dispersion_by_bin(CLOSED, CLOSED_MASK, 2),
    "profile": lambda: diagnose.profile(CLOSED, CLOSED_MASK, [0, 1, 2]),
    "first_token_spike": lambda: diagnose.first_token_spike(CLOSED, CLOSED_MASK),
    "length_mean": lambda: diagnose.length_mean(torch.zeros(0, 3, dtype=torch.bool)),
    "truncated_share": lambda: diagnose.truncated_share([]),
    "repeated_ngrams": lambda: diagnose.repeated_ngrams(
        torch.zeros(2, 3, dtype=torch.long), CLOSED_MASK, 1
    ),
    "mean_entropy": lambda: diagnose.mean_entropy(NO_ROWS),
    "calibration_error": lambda: diagnose.calibration_error(NONE, NONE),
    "hedging_share": lambda: diagnose.hedging_share([], ["perhaps"]),
    "privilege_gap": lambda: diagnose.privilege_gap(NONE, NONE),
    "recoverability": lambda: diagnose.recoverability(NONE, torch.ones(2)),
    "pairwise_kl": lambda: diagnose.pairwise_kl(torch.zeros(2, 0, 5)),
    "retokenised_share": lambda: diagnose.retokenised_share([], []),
    "self_distillation_residual": lambda: diagnose.self_distillation_residual(NONE, NONE),
}


@pytest.mark.parametrize("name", NOTHING)
def test_of_nothing_there_is_no_value(name: str) -> None:
    assert values_of(NOTHING[name]()).isnan().all()


def test_of_no_rows_there_are_no_rows() -> None:
    both = (NO_ROWS, NO_ROWS)
    for name in ("top_k_overlap", "overlap_advantage", "teacher_margin", "student_overlap_mass"):
        assert getattr(diagnose, name)(*both, k=2).shape == (0,)
    assert diagnose.reachable(*both, NO_TOKENS, k=2).shape == (0, 5)
    assert diagnose.gradient_proxy(NO_ROWS, NO_TOKENS).shape == (0,)
    assert diagnose.excess_id_ratio(NONE, NO_TOKENS, 3) == []
    assert diagnose.change_point(NONE) is diagnose.change_point(torch.ones(1)) is None
    assert diagnose.pairwise_kl(torch.zeros(0, 3, 5)).shape == (0, 0)
    assert diagnose.drift_budget(CLOSED, CLOSED_MASK).tolist() == [[0.0] * 3] * 2


def test_what_is_not_judged_does_not_count() -> None:
    score = torch.tensor([0.1, 0.9, 0.4, 0.2])
    verdict = torch.tensor([0.0, 1.0, math.nan, 1.0])
    known = ~verdict.isnan()
    for name in ("align_auc", "outcome_correlation", "calibration_error", "privilege_gap"):
        function = getattr(diagnose, name)
        assert function(score, verdict) == function(score[known], verdict[known])
    assert diagnose.split_delta(known, verdict) == pytest.approx((2 / 3 - 1, math.nan), nan_ok=True)


# --------------------------------------------------------------------------------------------
# Form

PER_ROW = {
    "top_k_overlap": lambda s, t, y: diagnose.top_k_overlap(s, t, k=3),
    "student_overlap_mass": lambda s, t, y: diagnose.student_overlap_mass(s, t, k=3),
    "teacher_overlap_mass": lambda s, t, y: diagnose.teacher_overlap_mass(s, t, k=3),
    "teacher_top_mass": lambda s, t, y: diagnose.teacher_top_mass(s, t, k=3),
    "overlap_advantage": lambda s, t, y: diagnose.overlap_advantage(s, t, k=3),
    "entropy_gap": lambda s, t, y: diagnose.entropy_gap(s, t),
    "teacher_surprise": lambda s, t, y: diagnose.teacher_surprise(t[:, 0]),
    "excess_surprise": lambda s, t, y: diagnose.excess_surprise(t[:, 0], t),
    "teacher_confidence": lambda s, t, y: diagnose.teacher_confidence(t),
    "teacher_margin": lambda s, t, y: diagnose.teacher_margin(s, t, k=3),
    "reverse_kl": lambda s, t, y: diagnose.reverse_kl(s, t),
    "forward_kl": lambda s, t, y: diagnose.forward_kl(s, t),
    "log_ratio": lambda s, t, y: diagnose.log_ratio(s[:, 0], t[:, 0]),
    "support_gap": lambda s, t, y: torch.stack(diagnose.support_gap(s, t, k=3)),
    "gradient_proxy": lambda s, t, y: diagnose.gradient_proxy(s, y),
    "leak": lambda s, t, y: diagnose.leak(s, diagnose.reachable(s, t, y, k=3), y),
    "eos_divergence": lambda s, t, y: diagnose.eos_divergence(s, t, [1, 4]),
    "drift_budget": lambda s, t, y: diagnose.drift_budget(t - s, torch.ones_like(s) > 0),
}


@pytest.mark.parametrize("name", PER_ROW)
def test_a_number_per_row_keeps_the_dtype_and_carries_no_gradient(name: str) -> None:
    made = Rows.random(rows=30, vocabulary=7)
    both = made.student.requires_grad_(), made.teacher.requires_grad_()
    wide = PER_ROW[name](*both, made.tokens)
    narrow = PER_ROW[name](*(each.float() for each in both), made.tokens)
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.float32)
    assert not wide.requires_grad
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)


def test_a_statistic_of_single_numbers_is_taken_in_float64() -> None:
    """Added up one by one in float32, a million tenths are 1 % off."""
    tenths = torch.full((1_000_000,), 0.1)
    exact = float(tenths[0].double())
    assert diagnose.marginal_info(tenths) == pytest.approx(exact, rel=1e-13)
    assert diagnose.log_mismatch(tenths, torch.zeros_like(tenths)) == pytest.approx(
        exact, rel=1e-13
    )
    mask = torch.ones(1, 1_000_000, dtype=torch.bool)
    found = diagnose.profile(tenths[None], mask, [0, 1_000_000])
    assert found.tolist() == pytest.approx([exact], rel=1e-13)
    budget = diagnose.drift_budget(tenths[None], mask)
    assert budget[0, -1].item() == pytest.approx(999_999 * exact, rel=1e-7)


def test_of_equal_entries_the_lower_id_is_likelier() -> None:
    """Among eight equal tokens the lists of both are the first three, whatever topk takes."""
    level = torch.full((1, 8), 1 / 8).log()
    favourite = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0]]).log_softmax(-1)
    assert diagnose.top_k_overlap(level, favourite, k=3).item() == 1.0
    last = torch.tensor([[0.0, 0, 0, 0, 0, 1, 1, 1]]).log_softmax(-1)
    assert diagnose.top_k_overlap(level, last, k=3).item() == 0.0
    two_then_ties = torch.tensor([[0.0, 0, 0, 2, 0, 0, 2, 0]]).log_softmax(-1)
    # 3, 6 and the first of the others
    assert diagnose.student_overlap_mass(favourite, two_then_ties, k=3).item() == pytest.approx(
        float(favourite[0, [3, 6, 0]].exp().sum())
    )
    nothing = torch.tensor([[-math.inf, -math.inf, 0.0, -math.inf]])
    assert diagnose.top_k_overlap(nothing, torch.tensor([[0.0, 0, 0, 1]]), k=2).item() == 0.5


def test_a_nearly_certain_student_loses_no_digit() -> None:
    """1 - student(y) would be 0: what is left is 1e-20, one half of it with the candidate."""
    left = torch.tensor([[-1e-20, math.log(5e-21), math.log(5e-21)]], dtype=torch.float64)
    tokens, listed = torch.tensor([0]), torch.tensor([[False, True, False]])
    assert diagnose.leak(left, listed, tokens).item() == pytest.approx(0.5)
    assert diagnose.gradient_proxy(left, tokens).item() == pytest.approx(1e-20 * math.sqrt(1.5))


def test_gaps_take_no_time() -> None:
    """A response with a gap is the response without it, whatever stands in the gap."""
    value = torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0, 9.0]])
    full = torch.ones_like(value, dtype=torch.bool)
    spread = torch.full((1, 9), math.nan)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1]], dtype=torch.bool)
    spread[mask] = value[0]
    for ask in (
        lambda v, m: diagnose.suffix_fade(v, m),
        lambda v, m: diagnose.first_token_spike(v, m),
        lambda v, m: diagnose.dispersion_by_bin(v, m, 2),
        lambda v, m: diagnose.td_residual_by_bin(v, m, 3),
        lambda v, m: diagnose.profile(v, m, [0, 2, 5]),
        lambda v, m: diagnose.drift_budget(v, m)[m],
        lambda v, m: diagnose.repeated_ngrams(v.nan_to_num(7.0).long(), m, 2),
    ):
        assert torch.equal(values_of(ask(spread, mask)), values_of(ask(value, full)))


# --------------------------------------------------------------------------------------------
# By hand


def test_numbers_by_hand() -> None:
    assert diagnose.quantiles(torch.tensor([4.0, 0.0, 2.0]), (0.25, 0.5)) == {0.25: 1.0, 0.5: 2.0}
    assert diagnose.negative_mass(torch.tensor([-3.0, 1.0])) == 0.75
    tiny = torch.tensor([1e-200, 1e-200, 0.0, 0.0], dtype=torch.float64)
    assert diagnose.effective_share(tiny) == 0.5  # their squares are below the smallest number
    assert diagnose.top_share(torch.arange(100.0), 0.07) == sum(range(93, 100)) / sum(range(100))
    four = torch.tensor([0.1, 0.2, 0.2, 0.3]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert diagnose.align_auc(*four) == (2 + 1 + 0.5) / 4  # three pairs right, one equal
    ece = diagnose.calibration_error(
        torch.tensor([0.1, 0.3, 0.3, 1.0], dtype=torch.float64), four[1]
    )
    assert ece == pytest.approx((0.1 + abs(1 - 0.6) + 0.0) / 4)
    assert diagnose.excess_id_ratio(
        torch.tensor([-2.0, 1.0, -4.0, 3.0]), torch.tensor([5, 9, 5, 2]), 2
    ) == [(2, 1, 3.0), (5, 2, 3.0)]
    assert diagnose.hedging_share(["I THINK so", "rethink", "maybe-not"], ["think", "maybe"]) == (
        pytest.approx(2 / 3)
    )
    assert diagnose.gradient_variance(torch.tensor([[0.0, 1.0], [2.0, 1.0]])) == 2.0
    repeated = diagnose.repeated_ngrams(
        torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]]),
        torch.tensor([[True] * 5, [True, False, False, False, False]]),
        2,
    )
    assert repeated.tolist() == pytest.approx([0.5, math.nan], nan_ok=True)
    ended = torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([[0.1, 0.15, 0.75]]).log()
    assert diagnose.eos_divergence(*ended, [0, 1, 1]).item() == pytest.approx(math.log(2))


def test_the_change_point_is_that_of_all_splits_tried() -> None:
    """By brute force, from the definition, on series with drops, rises and neither."""
    generator = torch.Generator().manual_seed(3)
    kinds = set()
    for _ in range(200):
        count = int(torch.randint(2, 14, (), generator=generator))
        margins = torch.randn(count, generator=generator, dtype=torch.float64)
        place = int(torch.randint(1, count, (), generator=generator))
        margins[place:] -= 4.0 * float(torch.randint(-1, 2, (), generator=generator))

        def bic(pieces: list[Tensor], parameters: int, count: int = count) -> float:
            squares = sum(float(((each - each.mean()) ** 2).sum()) for each in pieces)
            least = max(squares, 1e-12 * count)
            return count * math.log(least / count) + parameters * math.log(count)

        wanted, least = None, bic([margins], 1)
        for split in range(1, count):
            pieces = [margins[:split], margins[split:]]
            if pieces[1].mean() < pieces[0].mean() and bic(pieces, 3) < least:
                wanted, least = split, bic(pieces, 3)
        assert diagnose.change_point(margins) == wanted
        kinds.add(wanted)
    assert None in kinds
    assert len(kinds) > 5


# --------------------------------------------------------------------------------------------
# What makes no sense


@pytest.mark.parametrize(
    ("ask", "parts"),
    [
        (lambda: diagnose.top_k_overlap(LOG_PROBS, LOG_PROBS, k=10), ["1 ... 9", "10"]),
        (lambda: diagnose.teacher_margin(LOG_PROBS, LOG_PROBS, k=1), ["k >= 2", "1"]),
        (lambda: diagnose.quantiles(LOGP, (0.5, 5.0)), ["[0, 1]", "5.0"]),
        (lambda: diagnose.top_share(LOGP, 1.5), ["(0, 1]", "1.5"]),
        (lambda: diagnose.disagreement_map(LOGP, LOGP, LOGP, 0), ["bins", "0"]),
        (lambda: diagnose.profile(BY_TOKEN, OPEN, [0, 5, 5]), ["edges", "(0, 5, 5)"]),
        (lambda: diagnose.td_residual_by_bin(BY_TOKEN, OPEN, 0), ["bins", "0"]),
        (lambda: diagnose.repeated_ngrams(OPEN.long(), OPEN, 0), ["n must", "0"]),
        (lambda: diagnose.masked_share(LOGP, 2.0, 0.5), ["low <= high", "2.0"]),
        (lambda: diagnose.hedging_share(["x"], []), ["words"]),
        (lambda: diagnose.hedging_share(["x"], ["perhaps", ""]), ["words"]),
        (lambda: diagnose.eos_divergence(LOG_PROBS, LOG_PROBS, [-1]), ["eos_ids", "[-1]"]),
        (lambda: diagnose.calibration_error(SCORES + 1, SCORES), ["[0, 1]", "2.0"]),
        (lambda: diagnose.retokenised_share([[1]], []), ["pairs", "1 and 0"]),
        (lambda: diagnose.reachable(LOG_PROBS, LOG_PROBS, TOKENS, k=2, margin=-1.0), ["margin"]),
        (lambda: diagnose.routable_share(ZERO, NOBODY, LOG_PROBS, mass=2.0), ["mass", "2.0"]),
        (lambda: diagnose.excess_id_ratio(ZERO, TOKENS, 0), ["top", "0"]),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(ask: Callable[[], Any], parts: list[str]) -> None:
    with pytest.raises((ConfigError, DataError)) as told:
        ask()
    assert all(part in str(told.value) for part in parts), told.value

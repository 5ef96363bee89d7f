from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.formula import weight

F64 = torch.float64
NAN = math.nan
logps = st.lists(st.floats(-4, -0.01), min_size=6, max_size=6)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=F64)


def bits(gate: Tensor) -> list[int]:
    """A gate as a list, after checking that it is exactly 0 or 1."""
    assert ((gate == 0) | (gate == 1)).all()
    return [int(value) for value in gate.flatten()]


def draw(seed: int, rows: int = 4, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher's and a student's log-probabilities, and a mask with gaps."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (
        -3 * torch.rand(rows, length, generator=generator, dtype=F64) for _ in range(2)
    )
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return teacher, student, mask


# --------------------------------------------------------------------------------------------
# By what the token is


def test_skip_special_closes_on_special_tokens_and_nowhere_else() -> None:
    special = torch.tensor([[True, False], [False, True]])
    assert weight.skip_special(special).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_in_span_is_open_where_the_column_marks() -> None:
    assert bits(weight.in_span(row(0, 1, 2, 0))) == [0, 1, 1, 0]


# --------------------------------------------------------------------------------------------
# By how sure the two are, and how much they differ


@pytest.mark.parametrize(
    ("above", "below"),
    [
        (weight.student_entropy_above, weight.student_entropy_below),
        (weight.teacher_entropy_above, weight.teacher_entropy_below),
    ],
)
def test_entropy_gates_share_out_the_rows_and_the_threshold_is_below(
    above: Callable[..., Tensor], below: Callable[..., Tensor]
) -> None:
    entropy = row(0.0, 0.5, 0.50001, 2.0)
    assert bits(above(entropy, nats=0.5)) == [0, 0, 1, 1]
    assert bits(below(entropy, nats=0.5)) == [1, 1, 0, 0]


def test_confident_wrong_needs_both() -> None:
    entropy, disputed = row(0.1, 0.1, 3.0, 3.0), row(0.9, 0.2, 0.9, 0.2)
    assert bits(weight.confident_wrong(entropy, disputed, below_nats=0.5, above=0.5)) == [
        1,
        0,
        0,
        0,
    ]
    # on the thresholds: sure enough, but not enough in dispute
    edges = weight.confident_wrong(row(0.5, 0.5), row(0.5, 0.6), below_nats=0.5, above=0.5)
    assert bits(edges) == [0, 1]


def test_disagreement_is_the_total_variation_itself() -> None:
    distance = row(0.0, 0.25, 1.0).requires_grad_()
    assert torch.equal(weight.disagreement(distance), distance)


def test_surprise_runs_from_one_to_one_plus_boost() -> None:
    found = weight.surprise(row(0.0, math.log(0.25), -1e9), boost=2.0)
    assert found.flatten().tolist() == pytest.approx([1.0, 2.5, 3.0], abs=1e-15)
    assert (weight.surprise(row(-0.3, -2.0), boost=0.0) == 1).all()


def test_trust_is_the_acceptance_probability() -> None:
    teacher, student = row(0.1, 0.4, 0.2).log(), row(0.2, 0.1, 0.2).log()
    assert weight.trust(teacher, student).flatten().tolist() == pytest.approx([0.5, 1.0, 1.0])
    hits = weight.trust.counted(teacher, student)  # type: ignore[attr-defined]
    assert hits.flatten().tolist() == [False, True, False]
    assert float(weight.trust(row(-math.inf), row(-1.0))) == 0


@given(logps, logps, st.floats(0.05, 1.0))
def test_trusted_and_untrusted_share_out_the_rows(
    teacher: list[float], student: list[float], threshold: float
) -> None:
    inside = weight.trusted(row(*teacher), row(*student), at_least=threshold)
    outside = weight.untrusted(row(*teacher), row(*student), below=threshold)
    assert (inside + outside == 1).all()
    for place, (theirs, ours) in enumerate(zip(teacher, student, strict=True)):
        if abs(math.exp(min(theirs - ours, 0)) - threshold) > 1e-9:
            assert bits(inside)[place] == (math.exp(min(theirs - ours, 0)) > threshold)


def test_where_the_teacher_agrees_every_token_is_trusted_fully() -> None:
    assert bits(weight.trusted(row(-1.0, -2.0), row(-1.0, -2.0), at_least=1.0)) == [1, 1]


def test_overlap_of_a_hand_example() -> None:
    student = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    teacher = torch.tensor([[3, 1, 2, 9, 9], [4, 5, 6, 1, 2], [2, 9, 8, 7, 6]])
    # top 3 against top 3: all, none (4 and 1 are fourth), and the token 2
    assert weight.top_k_overlap(student, teacher, k=3).tolist() == pytest.approx([1, 0, 1 / 3])
    assert weight.top_k_overlap(student, teacher, k=1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("k", range(1, 33))
def test_an_overlap_of_exactly_the_asked_share_is_let_in(k: int) -> None:
    student = torch.arange(k).expand(k, k)
    shared = torch.arange(1, k + 1).unsqueeze(1)
    teacher = torch.where(torch.arange(k) < shared, student, student + 100)
    for count in range(1, k + 1):
        gate = weight.overlap_above(student, teacher, k=k, at_least=count / k)
        assert bits(gate) == [int(row >= count) for row in range(1, k + 1)]


# --------------------------------------------------------------------------------------------
# By the place in the response


def test_position_decay_halves_every_half_life() -> None:
    found = weight.position_decay(torch.tensor([[0, 3, 6, 9]]), half_life=3.0)
    assert found.tolist() == [[1.0, 0.5, 0.25, 0.125]]


def test_relative_position_is_linear_over_the_open_tokens_in_either_direction() -> None:
    mask = torch.tensor([[True, False, True, True], [True] * 4, [False, False, True, False]])
    rising = weight.relative_position(mask, start=0.0, end=1.0)
    # three open tokens; four; one, which counts as the first
    expected = [[0, 0, 0.5, 1], [0, 1 / 3, 2 / 3, 1], [0, 0, 0, 0]]
    assert torch.allclose(rising, torch.tensor(expected))
    falling = weight.relative_position(mask, start=3.0, end=1.0)
    assert torch.allclose(
        falling, torch.tensor([[3, 0, 2, 1], [3, 7 / 3, 5 / 3, 1], [0, 0, 3.0, 0]])
    )


def test_prefix_closes_after_so_many_positions() -> None:
    assert bits(weight.prefix(torch.tensor([[0, 1, 2, 3]]), tokens=2)) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("share", "kept"), [(0.01, 1), (0.29, 1), (0.3, 2), (0.5, 3), (0.69, 3), (0.7, 4), (1.0, 5)]
)
def test_prefix_share_rounds_and_keeps_at_least_one_token(share: float, kept: int) -> None:
    # five open tokens around a gap: 0.3 * 5 = 1.5 rounds up to 2
    mask = torch.tensor([[True, False, True, True, True, True, False]])
    is_open = [0, 2, 3, 4, 5][:kept]
    gate = weight.prefix_share(mask, share=share)
    assert bits(gate) == [int(place in is_open) for place in range(7)]


def test_an_empty_response_has_no_prefix() -> None:
    assert bits(weight.prefix_share(torch.zeros(1, 3, dtype=torch.bool), share=0.5)) == [0, 0, 0]


def test_cumulative_drift_of_a_hand_example() -> None:
    # |r| = 1, (masked), 2, 1; F before each open token: 0, 1/4, 3/4
    teacher, student = row(-2, -9, -1, -2), row(-1, -1, -3, -1)
    mask = torch.tensor([[True, False, True, True]])
    found = weight.cumulative_drift(teacher, student, mask, boost=0.5)
    assert found.flatten().tolist() == pytest.approx([1.5, 0, 1.375, 1.125], abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_cumulative_drift_never_rises_and_stays_between_its_ends(seed: int) -> None:
    teacher, student, mask = draw(seed)
    found = weight.cumulative_drift(teacher, student, mask, boost=0.5)
    for response in range(4):
        values = found[response][mask[response]].tolist()
        assert values == sorted(values, reverse=True)
        assert values[0] == 1.5
        assert values[-1] > 1


def test_without_drift_every_token_counts_as_before_any() -> None:
    same = row(-1, -2, -3)
    everything = torch.ones(1, 3, dtype=torch.bool)
    found = weight.cumulative_drift(same, same, everything, boost=0.5)
    assert found.tolist() == [[1.5, 1.5, 1.5]]
    # the limit of a response that drifts at its last token only
    late = weight.cumulative_drift(same, same - row(0, 0, 1e-300), everything, boost=0.5)
    assert late.tolist() == [[1.5, 1.5, 1.5]]


def test_an_infinite_log_ratio_leaves_all_drift_behind_it() -> None:
    everything = torch.ones(1, 4, dtype=torch.bool)
    teacher, student = row(-1, -math.inf, -1, -math.inf), row(-2, -2, -2, -2)
    found = weight.cumulative_drift(teacher, student, everything, boost=0.5)
    assert found.tolist() == [[1.5, 1.5, 1.0, 1.0]]
    assert bits(weight.drift_budget(teacher, student, everything, nats=5.0)) == [1, 1, 0, 0]


def test_the_drift_budget_closes_after_the_token_that_exhausts_it() -> None:
    # |r| = 1, (masked 8), 1, 0.5, 0; before each: 0, -, 1, 2, 2.5
    teacher, student = row(-2, -9, -2, -1.5, -1), row(-1, -1, -1, -1, -1)
    mask = torch.tensor([[True, False, True, True, True]])

    def gate(nats: float) -> list[int]:
        return bits(weight.drift_budget(teacher, student, mask, nats=nats))

    assert gate(0.0) == [1, 0, 0, 0, 0]
    assert gate(1.0) == [1, 0, 1, 0, 0]
    assert gate(2.0) == [1, 0, 1, 1, 0]
    assert gate(2.5) == [1, 0, 1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_what_comes_later_never_reopens_the_drift_budget(seed: int) -> None:
    teacher, student, mask = draw(seed)
    gate = weight.drift_budget(teacher, student, mask, nats=1.5)
    shorter = weight.drift_budget(teacher[:, :5], student[:, :5], mask[:, :5], nats=1.5)
    assert torch.equal(gate[:, :5], shorter)
    for response in range(4):
        flags = bits(gate[response][mask[response]])
        assert flags == sorted(flags, reverse=True)


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_after_is_closed_where_the_prefix_is_open_and_nowhere_else(tokens: int) -> None:
    position = torch.tensor([[0, 1, 2, 3]])
    gate = weight.after(position, tokens=tokens)
    assert bits(gate) == [int(place >= tokens) for place in range(4)]
    assert (gate + weight.prefix(position, tokens=tokens) == 1).all()


def test_the_sigmoid_of_the_position_by_hand() -> None:
    # Two open tokens, at 1/4 and 3/4 of the response; the centre is half way between them and the
    # width a quarter over log 3, so the sigmoids are 1/4 and 3/4. One open token: at 1/2.
    mask = torch.tensor([[True, False, True], [False, True, False], [False] * 3])
    found = weight.sigmoid_position(mask, least=0.2, centre=0.5, width=0.25 / math.log(3))
    assert found.flatten().tolist() == pytest.approx(
        [0.2 + 0.8 / 4, 0, 0.2 + 0.8 * 3 / 4, 0, 0.2 + 0.8 / 2, 0, 0, 0, 0], rel=1e-6
    )


@pytest.mark.parametrize("least", [0.0, 0.25, 1.0])
def test_the_sigmoid_of_the_position_rises_from_least_to_one(least: float) -> None:
    mask = torch.ones(1, 50, dtype=torch.bool)
    steep = weight.sigmoid_position(mask, least=least, centre=0.3, width=1e-4)[0]
    assert steep[:15].tolist() == pytest.approx([least] * 15, abs=1e-6)
    assert steep[15:].tolist() == pytest.approx([1.0] * 35, abs=1e-6)
    gentle = weight.sigmoid_position(mask, least=least, centre=0.3, width=0.1)[0]
    assert (gentle.diff() >= 0).all()
    assert (gentle.diff() > 0).any() == (least < 1)
    assert least <= float(gentle.min())
    assert float(gentle.max()) <= 1


def overlapping(*shared: int) -> tuple[Tensor, Tensor]:
    """Top-4 ids, one response, of which so many are shared at each token."""
    student = torch.arange(4).expand(1, len(shared), 4)
    teacher = torch.where(student < torch.tensor(shared)[:, None], student, student + 100)
    return student, teacher


def test_the_overlap_decay_by_hand() -> None:
    # Shares 1, 1/4, (closed: 0), 3/4, 0, 1/4, 1 of the four; below 1/2 at the second, fifth and
    # sixth token, which take 0.4 each from 1: 1, 0.6, -, 0.6, 0.2, 0, 0.
    student, teacher = overlapping(4, 1, 0, 3, 0, 1, 4)
    mask = torch.tensor([[True, True, False, True, True, True, True]])
    found = weight.overlap_decay(student, teacher, mask, k=4, at_least=0.5, drop=0.4)
    assert found[0].tolist() == pytest.approx([1, 0.6, 0, 0.6, 0.2, 0, 0], abs=1e-6)
    above = weight.overlap_decay(student, teacher, mask, k=4, at_least=0.5, drop=0.4, base=0.5)
    assert torch.allclose(above, torch.where(mask, found + 0.5, 0.0))


def test_an_overlap_of_just_enough_costs_nothing_and_what_follows_never_restores_the_weight() -> (
    None
):
    student, teacher = overlapping(2, 2, 1, 4, 4)
    everything = torch.ones(1, 5, dtype=torch.bool)
    found = weight.overlap_decay(student, teacher, everything, k=4, at_least=0.5, drop=0.25)
    assert found.tolist() == [[1.0, 1.0, 0.75, 0.75, 0.75]]
    # and of two responses each has its own count
    both = [torch.cat([side, side.flip(1)]) for side in (student, teacher)]
    pair = weight.overlap_decay(*both, everything.expand(2, 5), k=4, at_least=0.5, drop=0.25)
    assert pair.tolist() == [[1.0, 1.0, 0.75, 0.75, 0.75], [1.0, 1.0, 0.75, 0.75, 0.75]]


# --------------------------------------------------------------------------------------------
# By ratios of the chosen token


@given(logps, logps)
def test_trust_and_distrust_share_out_every_row(teacher: list[float], student: list[float]) -> None:
    sides = row(*teacher), row(*student)
    assert torch.allclose(weight.trust(*sides) + weight.distrust(*sides), torch.ones(1, 6).double())


def test_distrust_is_the_probability_of_a_rejection() -> None:
    teacher, student = row(0.1, 0.4, 0.2).log(), row(0.2, 0.1, 0.2).log()
    assert weight.distrust(teacher, student).flatten().tolist() == pytest.approx([0.5, 0.0, 0.0])
    assert float(weight.distrust(row(-math.inf), row(-1.0))) == 1


def test_endorsement_by_hand() -> None:
    # Ratios 1, 3, 1/3 and none: sigmoid(log 3) = 3/4, and twice as sharp 9/10.
    teacher, student = row(0.2, 0.6, 0.1, 0.0).log(), row(0.2, 0.2, 0.3, 0.3).log()
    found = weight.endorsement(teacher, student, sharpness=1.0)
    assert found[0].tolist() == pytest.approx([1 / 2, 3 / 4, 1 / 4, 0], rel=1e-12)
    sharper = weight.endorsement(teacher, student, sharpness=2.0)
    assert sharper[0].tolist() == pytest.approx([1 / 2, 9 / 10, 1 / 10, 0], rel=1e-12)


@given(logps, logps)
def test_endorsements_of_two_sides_by_each_other_sum_to_one(
    teacher: list[float], student: list[float]
) -> None:
    one, other = row(*teacher), row(*student)
    both = weight.endorsement(one, other, sharpness=0.7) + weight.endorsement(
        other, one, sharpness=0.7
    )
    assert torch.allclose(both, torch.ones(1, 6).double())
    # and sharpened it is the gate that keeps what the teacher prefers
    hard = weight.endorsement(one, other, sharpness=1e9)
    assert torch.equal(hard.round(), (one >= other).double() - (one == other).double())


@pytest.mark.parametrize("ratio", [weight.importance, weight.update_ratio, weight.engine_ratio])
def test_capped_ratios_by_hand_and_what_they_cut_off(ratio: Callable[..., Tensor]) -> None:
    first, second = row(0.2, 0.1, 0.3, 0.9).log(), row(0.2, 0.2, 0.2, 0.1).log()
    found = ratio(first, second, cap=2.0)
    assert found[0].tolist() == pytest.approx([1, 0.5, 1.5, 2], rel=1e-12)
    cut = ratio.counted(first, second, cap=2.0)  # type: ignore[attr-defined]
    assert cut.tolist() == [[False, False, False, True]]
    # where both agree it is 1, whatever the cap; a ratio beyond the largest number is the cap
    assert ratio(first, first, cap=1.0).tolist() == [[1.0] * 4]
    assert float(ratio(row(-1.0).float(), row(-300.0).float(), cap=3.0)) == 3.0
    assert float(ratio(row(-math.inf), row(-1.0), cap=3.0)) == 0.0
    for cap in (0.9, NAN):
        with pytest.raises(ValueError, match=f"cap must be at least 1, got {cap}"):
            ratio(first, second, cap=cap)


def test_the_engine_ratio_within_bounds_is_the_ratio_and_outside_nothing() -> None:
    old, sampler = row(0.2, 0.1, 0.3, 0.9, 0.1).log(), row(0.2, 0.2, 0.2, 0.1, 0.4).log()
    found = weight.engine_ratio_within(old, sampler, low=0.4, high=2.0)
    assert found[0].tolist() == pytest.approx([1, 0.5, 1.5, 0, 0], rel=1e-12)
    counted = weight.engine_ratio_within.counted  # type: ignore[attr-defined]
    outside = counted(old, sampler, low=0.4, high=2.0)
    assert outside.tolist() == [[False, False, False, True, True]]
    # the bounds count as inside
    assert weight.engine_ratio_within(old, old, low=1.0, high=1.0).tolist() == [[1.0] * 5]
    far = weight.engine_ratio_within(row(-1.0).float(), row(-300.0).float(), low=0.0, high=9.0)
    assert float(far) == 0.0
    for low, high in ((-0.1, 2.0), (1.1, 2.0), (0.5, 0.9), (NAN, 2.0), (0.5, NAN)):
        with pytest.raises(ValueError, match=f"low <= 1 <= high, got low={low} and high={high}"):
            weight.engine_ratio_within(old, old, low=low, high=high)


# --------------------------------------------------------------------------------------------
# By how sure the two are, over the step


def test_confidence_by_hand() -> None:
    # Largest entropies 2 and 4. u: (1 + 1) (1 + 0) = 2, (1 + 0) (1 + 2) = 3, (1 + 1/2) (1 + 1) = 3
    teacher = torch.tensor([[0.0, NAN], [2.0, 1.0]], dtype=F64)
    student = torch.tensor([[0.0, NAN], [4.0, 2.0]], dtype=F64)
    mask = torch.tensor([[True, False], [True, True]])
    found = weight.confidence(teacher, student, mask, teacher_gain=1.0, student_gain=2.0)
    assert found.flatten().tolist() == pytest.approx([3 / 4, 0, 9 / 8, 9 / 8], rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gains", [(0.0, 0.0), (1.0, 1.0), (0.0, 3.0), (5.0, 0.0)])
def test_confidence_is_one_on_average_and_does_not_depend_on_the_unit(
    seed: int, gains: tuple[float, float]
) -> None:
    teacher, student, mask = draw(seed)
    knobs = {"teacher_gain": gains[0], "student_gain": gains[1]}
    found = weight.confidence(-teacher, -student, mask, **knobs)
    assert float(found[mask].mean()) == pytest.approx(1.0, rel=1e-12)
    assert torch.allclose(weight.confidence(-9 * teacher, -student, mask, **knobs), found)
    if gains == (0.0, 0.0):
        assert torch.equal(found, mask.double())
    else:
        assert float(found[mask].std()) > 0.05


def test_a_side_that_is_sure_everywhere_leaves_confidence_to_the_other() -> None:
    none, some = row(0.0, 0.0), row(1.0, 2.0)
    everything = torch.ones(1, 2, dtype=torch.bool)
    knobs = {"teacher_gain": 1.0, "student_gain": 1.0}
    # u = 2 (1 + 1/2), 2 (1 + 1), and 1 + 1/2, 1
    by_student = weight.confidence(none, some, everything, **knobs)
    assert by_student[0].tolist() == pytest.approx([6 / 7, 8 / 7], rel=1e-12)
    by_teacher = weight.confidence(some, none, everything, **knobs)
    assert by_teacher[0].tolist() == pytest.approx([6 / 5, 4 / 5], rel=1e-12)
    assert weight.confidence(none, none, everything, **knobs).tolist() == [[1.0, 1.0]]
    closed = weight.confidence(some, some, torch.zeros(1, 2, dtype=torch.bool), **knobs)
    assert closed.tolist() == [[0.0, 0.0]]


def test_a_decided_teacher_counts_in_full_and_its_bound_with_it() -> None:
    entropy = row(0.0, 0.5, 0.50001, 2.0)
    found = weight.teacher_confidence(entropy, nats=0.5, least=0.25)
    assert found.tolist() == [[1.0, 1.0, 0.25, 0.25]]
    hard = weight.teacher_confidence(entropy, nats=0.5, least=0.0)
    assert torch.equal(hard, weight.teacher_entropy_below(entropy, nats=0.5))


# --------------------------------------------------------------------------------------------
# By outcome


def test_correctness_closes_both_gates_where_nothing_was_judged() -> None:
    verdict = torch.tensor([1.0, 0.5, 0.49, 0.0, NAN], dtype=F64)
    mask = torch.tensor([[True, False]] * 5)
    assert bits(weight.correct(verdict, mask)) == [1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert bits(weight.incorrect(verdict, mask)) == [0, 0, 0, 0, 1, 0, 1, 0, 0, 0]


def test_the_teachers_own_success_splits_the_prompts_and_an_untried_one_is_in_neither() -> None:
    rate = row(0.0, 0.25, 0.5, 1.0, NAN)
    assert bits(weight.teacher_passes(rate, at_least=0.5)) == [0, 0, 1, 1, 0]
    assert bits(weight.teacher_fails(rate, below=0.5)) == [1, 1, 0, 0, 0]


def test_the_teachers_pass_rate_is_the_weight_and_an_untried_prompt_has_none() -> None:
    assert weight.teacher_pass_rate(row(0.0, 0.25, 1.0, NAN)).tolist() == [[0.0, 0.25, 1.0, 0.0]]


def test_in_consensus_is_open_where_the_column_is_not_zero() -> None:
    assert bits(weight.in_consensus(row(0, 1, 0.5, -0.0))) == [0, 1, 1, 0]


def test_signs_of_the_advantage_are_complementary_and_zero_is_negative() -> None:
    advantage = row(-1.0, -0.0, 0.0, 1e-300)
    assert bits(weight.positive_advantage(advantage)) == [0, 0, 0, 1]
    assert bits(weight.negative_advantage(advantage, of="main")) == [1, 1, 1, 0]


# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, NAN])
def test_shares_outside_zero_to_one_are_refused_by_name(value: float) -> None:
    one, mask = row(-1.0), torch.ones(1, 1, dtype=torch.bool)
    ids = torch.tensor([[1]])
    refused: list[tuple[str, Callable[[], Tensor]]] = [
        ("share", lambda: weight.prefix_share(mask, share=value)),
        ("at_least", lambda: weight.trusted(one, one, at_least=value)),
        ("below", lambda: weight.untrusted(one, one, below=value)),
        ("at_least", lambda: weight.overlap_above(ids, ids, k=1, at_least=value)),
        (
            "at_least",
            lambda: weight.overlap_decay(ids[None], ids[None], mask, k=1, at_least=value, drop=0.1),
        ),
        ("at_least", lambda: weight.teacher_passes(one, at_least=value)),
        ("below", lambda: weight.teacher_fails(one, below=value)),
    ]
    for knob, call in refused:
        with pytest.raises(ValueError, match=rf"{knob} is a share in \(0, 1\], got {value}"):
            call()


@pytest.mark.parametrize("value", [-0.1, math.inf, NAN])
def test_negative_and_infinite_knobs_are_refused_by_name(value: float) -> None:
    one, mask = row(-1.0), torch.ones(1, 1, dtype=torch.bool)
    ids = torch.tensor([[[1]]])
    refused: list[tuple[str, Callable[[], Tensor]]] = [
        ("boost", lambda: weight.surprise(one, boost=value)),
        ("boost", lambda: weight.cumulative_drift(one, one, mask, boost=value)),
        ("nats", lambda: weight.drift_budget(one, one, mask, nats=value)),
        ("start", lambda: weight.relative_position(mask, start=value, end=1.0)),
        ("end", lambda: weight.relative_position(mask, start=1.0, end=value)),
        (
            "teacher_gain",
            lambda: weight.confidence(one, one, mask, teacher_gain=value, student_gain=1.0),
        ),
        (
            "student_gain",
            lambda: weight.confidence(one, one, mask, teacher_gain=1.0, student_gain=value),
        ),
        (
            "base",
            lambda: weight.overlap_decay(ids, ids, mask, k=1, at_least=0.5, drop=0.1, base=value),
        ),
    ]
    for knob, call in refused:
        with pytest.raises(ValueError, match=rf"{knob} must be a finite number >= 0, got {value}"):
            call()


def test_lengths_below_one_token_are_refused_by_name() -> None:
    position = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match=r"tokens must be >= 1, .* got 0"):
        weight.prefix(position, tokens=0)
    with pytest.raises(ValueError, match=r"tokens must be >= 1, got 0"):
        weight.after(position, tokens=0)
    with pytest.raises(ValueError, match="half_life is a number of tokens > 0, got 0"):
        weight.position_decay(position, half_life=0.0)
    with pytest.raises(ValueError, match=r"top_k_overlap needs 1 <= k <= 2, .* got k = 3"):
        weight.top_k_overlap(position, position, k=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda one: weight.endorsement(one, one, sharpness=0.0),
            "sharpness .* positive and finite, got 0.0",
        ),
        (
            lambda one: weight.teacher_confidence(one, nats=0.5, least=1.0),
            r"least must lie in \[0, 1\), got 1.0",
        ),
        (
            lambda one: weight.sigmoid_position(one < 0, least=1.1, centre=0.5, width=0.1),
            "least in .0, 1. .* got 1.1",
        ),
        (
            lambda one: weight.sigmoid_position(one < 0, least=0.5, centre=0.5, width=0.0),
            "width > 0, got 0.5 and 0.0",
        ),
        (
            lambda one: weight.overlap_decay(
                torch.ones(1, 1, 1, dtype=torch.int64),
                torch.ones(1, 1, 1, dtype=torch.int64),
                one < 0,
                k=1,
                at_least=0.5,
                drop=0.0,
            ),
            "drop must be positive and finite, got 0.0",
        ),
    ],
)
def test_impossible_knobs_are_refused_by_name(
    call: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(row(-1.0))

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


# --------------------------------------------------------------------------------------------
# The extreme ones of the step

KEEPERS: list[tuple[Callable[..., Tensor], int]] = [
    (weight.keep_high_entropy, 1),
    (weight.keep_low_entropy, -1),
    (weight.keep_large_divergence, 1),
    (weight.keep_unlikely, -1),
]


@pytest.mark.parametrize(("keep", "sign"), KEEPERS)
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_extreme_share_of_the_step_by_a_literal_sort(
    keep: Callable[..., Tensor], sign: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(5, (4, 9), generator=generator).to(F64)  # many ties
    mask = torch.rand(4, 9, generator=generator) < 0.7
    places = [(b, t) for b in range(4) for t in range(9) if mask[b, t]]
    ranked = sorted(places, key=lambda place: (-sign * float(values[place]), place))
    kept = set(ranked[: max(1, math.floor(share * len(places) + 0.5))])
    expected = [int((b, t) in kept) for b in range(4) for t in range(9)]
    assert bits(keep(values, mask, share=share)) == expected


@pytest.mark.parametrize(("keep", "sign"), KEEPERS)
@pytest.mark.parametrize("other", [math.inf, -math.inf, NAN])
def test_masked_positions_take_no_place(
    keep: Callable[..., Tensor], sign: int, other: float
) -> None:
    mask = torch.tensor([[True, True, False], [False, True, True]])
    values = torch.tensor([[1.0, 4, other], [other, 3, 2]], dtype=F64)
    expected = [0, 1, 0, 0, 1, 0] if sign > 0 else [1, 0, 0, 0, 0, 1]
    assert bits(keep(values, mask, share=0.5)) == expected


def test_the_least_likely_open_token_may_be_infinitely_unlikely() -> None:
    mask = torch.tensor([[False, True, True]])
    gate = weight.keep_high_entropy(row(NAN, -math.inf, -math.inf), mask, share=1.0)
    assert bits(gate) == [0, 1, 1]


def test_a_step_without_open_tokens_keeps_nothing() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert bits(weight.keep_high_entropy(torch.rand(2, 3), nothing, share=0.5)) == [0] * 6


def test_the_share_is_of_the_step_not_of_each_response() -> None:
    entropy = torch.tensor([[5.0, 6, 7, 8], [1, 2, 3, 4]], dtype=F64)
    gate = weight.keep_high_entropy(entropy, torch.ones(2, 4, dtype=torch.bool), share=0.5)
    assert bits(gate) == [1, 1, 1, 1, 0, 0, 0, 0]


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
        ("share", lambda: weight.keep_high_entropy(one, mask, share=value)),
        ("share", lambda: weight.prefix_share(mask, share=value)),
        ("at_least", lambda: weight.trusted(one, one, at_least=value)),
        ("below", lambda: weight.untrusted(one, one, below=value)),
        ("at_least", lambda: weight.overlap_above(ids, ids, k=1, at_least=value)),
        ("at_least", lambda: weight.teacher_passes(one, at_least=value)),
        ("below", lambda: weight.teacher_fails(one, below=value)),
    ]
    for knob, call in refused:
        with pytest.raises(ValueError, match=rf"{knob} is a share in \(0, 1\], got {value}"):
            call()


@pytest.mark.parametrize("value", [-0.1, math.inf, NAN])
def test_negative_and_infinite_knobs_are_refused_by_name(value: float) -> None:
    one, mask = row(-1.0), torch.ones(1, 1, dtype=torch.bool)
    refused: list[tuple[str, Callable[[], Tensor]]] = [
        ("boost", lambda: weight.surprise(one, boost=value)),
        ("boost", lambda: weight.cumulative_drift(one, one, mask, boost=value)),
        ("nats", lambda: weight.drift_budget(one, one, mask, nats=value)),
        ("start", lambda: weight.relative_position(mask, start=value, end=1.0)),
        ("end", lambda: weight.relative_position(mask, start=1.0, end=value)),
    ]
    for knob, call in refused:
        with pytest.raises(ValueError, match=rf"{knob} must be a finite number >= 0, got {value}"):
            call()


def test_lengths_below_one_token_are_refused_by_name() -> None:
    position = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match=r"tokens must be >= 1, .* got 0"):
        weight.prefix(position, tokens=0)
    with pytest.raises(ValueError, match="half_life is a number of tokens > 0, got 0"):
        weight.position_decay(position, half_life=0.0)
    with pytest.raises(ValueError, match=r"top_k_overlap needs 1 <= k <= 2, .* got k = 3"):
        weight.top_k_overlap(position, position, k=3)

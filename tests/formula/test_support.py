from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.fields import positional_names
from opd.formula import support
from tests.reference import divergences as ref

F64 = torch.float64
NONE = -math.inf
SIDES = ("student", "teacher")

TEACHER_TOP = torch.tensor([[5, 3, 1, 0], [2, 4, 0, 6]])
STUDENT_TOP = torch.tensor([[3, 2, 5], [1, 3, 5]])


def log_probs_of(rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, vocab_size, generator=draw, dtype=F64)).log_softmax(-1)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([math.log(p) if p else NONE for p in probabilities], dtype=F64)


def slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    value = function(leaf)
    torch.where(value.isfinite(), value, 0.0).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_full_stands_for_every_id() -> None:
    assert support.full() is None


def test_sampled_is_the_token_alone() -> None:
    assert support.sampled(torch.tensor([4, 2])).tolist() == [[4], [2]]


@pytest.mark.parametrize("choose", [support.student_top_k, support.teacher_top_k])
def test_top_k_keeps_the_likeliest_ids_in_order(choose: object) -> None:
    ids = torch.tensor([[5, 3, 1], [0, 2, 4]])
    assert callable(choose)
    assert choose(ids, k=2).tolist() == [[5, 3], [0, 2]]
    assert choose(ids, k=3).tolist() == ids.tolist()
    for k in (0, -1, 4):
        with pytest.raises(ValueError, match="1 <= k <= 3"):
            choose(ids, k=k)


def test_the_union_names_every_token_of_either_side_once() -> None:
    ids = support.union(TEACHER_TOP, STUDENT_TOP, teacher_k=2, student_k=3)
    assert ids.tolist() == [[5, 3, -1, 2, -1], [2, 4, 1, 3, 5]]


def test_the_intersection_keeps_the_teachers_order_and_may_be_empty() -> None:
    ids = support.intersection(TEACHER_TOP, STUDENT_TOP, teacher_k=3, student_k=3)
    assert ids.tolist() == [[5, 3, -1], [-1, -1, -1]]


def test_routing_drops_special_tokens_but_never_the_sampled_one() -> None:
    special = torch.tensor([5, 1])

    def ids(tokens: list[int]) -> list[list[int]]:
        chosen = torch.tensor(tokens)
        return support.routing_support(
            TEACHER_TOP, STUDENT_TOP, chosen, special, teacher_k=2, student_k=3
        ).tolist()

    # 5 and 1 are special; 3 and 4 are in the union already; 0 and 6 are not
    assert ids([3, 4]) == [[-1, 3, -1, 2, -1, -1], [2, 4, -1, 3, -1, -1]]
    assert ids([0, 6]) == [[-1, 3, -1, 2, -1, 0], [2, 4, -1, 3, -1, 6]]
    assert ids([5, 1]) == [[-1, 3, -1, 2, -1, 5], [2, 4, -1, 3, -1, 1]]


def test_routing_without_special_tokens_is_the_union_and_the_sampled_token() -> None:
    none = torch.tensor([], dtype=torch.int64)
    ids = support.routing_support(
        TEACHER_TOP, STUDENT_TOP, torch.tensor([6, 6]), none, teacher_k=2, student_k=3
    )
    union = support.union(TEACHER_TOP, STUDENT_TOP, teacher_k=2, student_k=3)
    assert torch.equal(ids[:, :-1], union)
    assert ids[:, -1].tolist() == [6, 6]


@pytest.mark.parametrize("choose", [support.union, support.intersection])
@pytest.mark.parametrize("knob", ["teacher_k", "student_k"])
def test_a_support_larger_than_what_is_known_is_refused_by_name(
    choose: Callable[..., Tensor], knob: str
) -> None:
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"{knob} <= ., .*got {knob} = {k}"):
            choose(TEACHER_TOP, STUDENT_TOP, **{"teacher_k": 1, "student_k": 1, knob: k})


@given(st.randoms(use_true_random=False))
def test_supports_are_the_sets_of_the_transcription(random: object) -> None:
    seed = random.randrange(10**6)  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(seed)
    teacher_top, student_top = torch.rand(2, 8, generator=draw).argsort(-1)
    token = int(torch.randint(8, (), generator=draw))
    special = torch.rand(8, generator=draw).argsort()[: seed % 4]
    k = {"teacher_k": 1 + seed % 5, "student_k": 1 + seed % 3}
    rows = teacher_top.tolist(), student_top.tolist()

    def present(ids: Tensor) -> list[int]:
        assert bool(((ids >= 0) | (ids == -1)).all())
        return [v for v in ids.tolist() if v >= 0]

    assert present(support.union(teacher_top, student_top, **k)) == ref.union(*rows, **k)
    assert present(support.intersection(teacher_top, student_top, **k)) == ref.intersection(
        *rows, **k
    )
    routing = support.routing_support(teacher_top, student_top, torch.tensor(token), special, **k)
    expected = ref.routing_support(*rows, token, special.tolist(), **k)
    assert sorted(present(routing)) == sorted(expected)
    assert len(set(present(routing))) == len(present(routing))


def test_supports_ask_for_fields_only() -> None:
    for name in support.__all__:
        positional_names(getattr(support, name))


# --------------------------------------------------------------------------------------------
# Tail rules


def test_tails_by_hand() -> None:
    whole = logs(0.1, 0.2, 0.3, 0.4)
    ids = torch.tensor([2, -1, 0])
    # the support holds 0.3 and 0.1, together 0.4; outside 0.2 + 0.4
    expected = {
        ("bucket", "student"): logs(0.3, 0, 0.1, 0.6),
        ("bucket", "teacher"): logs(0.3, 0, 0.1, 0.6),
        ("renormalise", "student"): logs(0.75, 0, 0.25),
        ("renormalise", "teacher"): logs(0.75, 0, 0.25),
        ("teacher_renormalise", "student"): logs(0.3, 0, 0.1, 0.6),
        ("teacher_renormalise", "teacher"): logs(0.75, 0, 0.25, 0),
        ("truncate", "student"): logs(0.3, 0, 0.1),
        ("truncate", "teacher"): logs(0.3, 0, 0.1),
    }
    assert {tail for tail, _ in expected} == set(support.TAILS)
    for (tail, side), value in expected.items():
        result = support.restrict_by_tail(whole, ids, tail=tail, side=side)
        assert torch.allclose(result, value, rtol=0, atol=1e-15), (tail, side)


IDS = [[5, 0, 3], [-1, 4, -1], [2, -1, 6], [0, 1, 2]]


@pytest.mark.parametrize("tail", support.TAILS)
@pytest.mark.parametrize("side", SIDES)
def test_tails_agree_with_the_transcription_with_and_without_absent_entries(
    tail: str, side: str
) -> None:
    log_probs = log_probs_of(len(IDS), 7)
    result = support.restrict_by_tail(log_probs, torch.tensor(IDS), tail=tail, side=side)
    for row, ids in enumerate(IDS):
        expected = torch.from_numpy(ref.restrict_by_tail(log_probs[row], ids, tail=tail, side=side))
        assert torch.allclose(result[row], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tail", support.TAILS)
@pytest.mark.parametrize("side", SIDES)
def test_the_gradient_with_absent_entries_is_that_of_the_entries_that_are_there(
    tail: str, side: str
) -> None:
    logits = log_probs_of(3, 7, seed=1)
    padded = torch.tensor([[5, -1, 3, -1], [-1, 6, -1, 2], [0, 4, -1, -1]])
    compact = torch.tensor([[5, 3], [6, 2], [0, 4]])

    def scalar(ids: Tensor, mark: int) -> Callable[[Tensor], Tensor]:
        def value(leaf: Tensor) -> Tensor:
            rows = support.restrict_by_tail(leaf.log_softmax(-1), ids, tail=tail, side=side)
            flat = rows[rows.isfinite()]
            return (flat * torch.arange(1, len(flat) + 1)).sum() * mark

        return value

    assert torch.allclose(
        slope(scalar(padded, 1), logits), slope(scalar(compact, 1), logits), rtol=0, atol=1e-14
    )


def test_the_whole_vocabulary_has_no_tail() -> None:
    log_probs = log_probs_of(2, 5)
    for tail in support.TAILS:
        for side in SIDES:
            assert support.restrict_by_tail(log_probs, None, tail=tail, side=side) is log_probs


def test_an_unknown_tail_is_refused_with_the_names_of_the_others() -> None:
    with pytest.raises(ValueError, match="bucket, renormalise, teacher_renormalise, truncate"):
        support.restrict_by_tail(logs(0.5, 0.5), torch.tensor([0]), tail="drop", side="student")


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ValueError, match="'student' or 'teacher', got 'view'"):
        support.restrict_by_tail(logs(0.5, 0.5), torch.tensor([0]), tail="bucket", side="view")


def test_an_empty_support_is_massless_or_all_bucket_and_has_no_gradient() -> None:
    log_probs = log_probs_of(2, 5)
    ids = torch.full((2, 3), -1)
    for side in SIDES:
        for tail in support.TAILS:

            def restricted(leaf: Tensor, tail: str = tail, side: str = side) -> Tensor:
                return support.restrict_by_tail(leaf, ids, tail=tail, side=side)

            result = restricted(log_probs)
            assert (result[:, :3] == NONE).all()
            if tail in ("bucket", "teacher_renormalise"):
                assert result[:, 3].tolist() == pytest.approx([0, 0], abs=1e-15)
            on_logits = slope(lambda logits: restricted(logits.log_softmax(-1)), log_probs)
            assert on_logits.abs().max() <= 1e-15


def test_a_support_where_one_side_has_no_mass_conditions_nothing() -> None:
    log_probs = logs(0.0, 0.0, 0.5, 0.5)
    ids = torch.tensor([0, 1])
    assert support.renormalise(support.restrict(log_probs, ids)).tolist() == [NONE, NONE]
    teacher = support.restrict_by_tail(log_probs, ids, tail="teacher_renormalise", side="teacher")
    assert teacher.tolist() == [NONE, NONE, 0.0]
    conditional = slope(lambda leaf: support.renormalise(support.restrict(leaf, ids)), log_probs)
    assert conditional.tolist() == [0.0] * 4


def test_a_massless_entry_of_a_support_keeps_the_others_gradient_finite() -> None:
    log_probs = logs(0.0, 0.2, 0.3, 0.5)
    ids = torch.tensor([0, 1, 3])
    conditional = slope(lambda leaf: support.renormalise(support.restrict(leaf, ids)), log_probs)
    # d/dx_1 of (log p_1 - lse) + (log p_3 - lse) is 1 - 2 * 0.2 / 0.7; likewise 1 - 2 * 0.5 / 0.7
    assert conditional.tolist() == pytest.approx([0, 1 - 4 / 7, 0, 1 - 10 / 7], abs=1e-15)


def test_nothing_lies_outside_the_whole_vocabulary() -> None:
    log_probs = torch.randn(2, 4, dtype=F64).log_softmax(-1).requires_grad_()
    ids = torch.arange(4).expand(2, 4)
    outside = support.log_mass_outside(log_probs, ids)
    assert outside.tolist() == [-math.inf, -math.inf]
    outside.exp().sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[0.0] * 4] * 2


def test_an_outside_of_massless_entries_only_has_no_gradient() -> None:
    log_probs, ids = logs(0.5, 0.5, 0.0, 0.0), torch.tensor([0, 1, -1])
    assert float(support.log_mass_outside(log_probs, ids)) == NONE
    gradient = slope(lambda leaf: support.log_mass_outside(leaf, ids), log_probs)
    assert gradient.tolist() == [0.0] * 4


def test_the_mass_outside_is_summed_not_subtracted() -> None:
    logits = torch.tensor([0.0, -60.0, -61.0])  # one minus the inside would be 0 in float32
    outside = support.log_mass_outside(logits.log_softmax(-1), torch.tensor([0]))
    assert float(outside) == pytest.approx(-60 + math.log1p(math.exp(-1)), abs=1e-5)


def test_the_mass_outside_spreads_its_gradient_by_share() -> None:
    log_probs = logs(0.1, 0.2, 0.3, 0.4)
    gradient = slope(
        lambda leaf: support.log_mass_outside(leaf, torch.tensor([3, -1, 0])), log_probs
    )
    assert gradient.tolist() == pytest.approx([0, 0.4, 0.6, 0], abs=1e-15)


def test_absent_ids_hide_nothing_wherever_they_stand() -> None:
    log_probs = log_probs_of(1, 6).expand(4, 6)
    ids = torch.tensor([[-1, 2, 4], [2, -1, 4], [2, 4, -1], [-1, -1, -1]])
    outside = support.log_mass_outside(log_probs, ids).exp()
    rest = log_probs[0].exp()[[0, 1, 3, 5]].sum()
    assert outside.tolist() == pytest.approx([float(rest)] * 3 + [1.0], abs=1e-15)


# --------------------------------------------------------------------------------------------
# Smoothing


def test_smoothing_by_hand() -> None:
    smoothed = support.smooth(logs(1.0, 0.0), smoothing=0.2, vocab_size=2)
    assert torch.allclose(smoothed, logs(0.9, 0.1), rtol=0, atol=1e-15)


def test_smoothing_keeps_a_distribution_and_puts_a_floor_under_every_entry() -> None:
    log_probs = torch.cat([log_probs_of(3, 6), torch.full((3, 2), NONE, dtype=F64)], -1)
    smoothed = support.smooth(log_probs, smoothing=1e-3, vocab_size=8)
    assert smoothed.exp().sum(-1).tolist() == pytest.approx([1] * 3, abs=1e-14)
    assert (smoothed >= math.log(1e-3 / 8)).all()
    for row in range(3):
        expected = ref.smooth(log_probs[row], smoothing=1e-3, vocab_size=8)
        assert (smoothed[row] - torch.from_numpy(expected)).abs().max() <= 1e-14


def test_smoothing_the_entries_of_a_support_is_smoothing_the_whole() -> None:
    log_probs, ids = log_probs_of(2, 6), torch.tensor([[0, 3], [5, 2]])
    before = support.smooth(support.restrict(log_probs, ids), smoothing=0.1, vocab_size=6)
    after = support.restrict(support.smooth(log_probs, smoothing=0.1, vocab_size=6), ids)
    assert torch.allclose(before, after, rtol=0, atol=1e-15)


def test_the_floor_outweighs_the_teacher_where_the_larger_part_of_the_mass_is_its() -> None:
    rows = torch.stack([logs(0.5, 0.4, 0.1), logs(0.5, 0.5, 0.0), logs(0.9, 0.06, 0.04)])
    # with 0.3 spread over 3 entries the floor is 0.1, and the teacher's part 0.7 of its own mass
    high = support.floor_outweighs(rows, smoothing=0.3, vocab_size=3)
    assert high.tolist() == [[False, False, True], [False, False, True], [False, True, True]]
    # 0.03 over 3: a floor of 0.01 against 0.97 of 0.1, 0 and 0.04
    low = support.floor_outweighs(rows, smoothing=0.03, vocab_size=3)
    assert low.tolist() == [[False] * 3, [False, False, True], [False] * 3]


@pytest.mark.parametrize("smoothing", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_smoothing_refuses_its_end_points(smoothing: float) -> None:
    with pytest.raises(ValueError, match="smoothing must lie strictly between 0 and 1"):
        support.smooth(logs(0.5, 0.5), smoothing=smoothing, vocab_size=2)

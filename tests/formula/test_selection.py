from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.formula import divergence, selection
from tests.reference.selection import signal_to_noise

F64 = torch.float64
NAN = math.nan


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=F64)


def logs(*rows: tuple[float, ...]) -> Tensor:
    """Log-probabilities of one response, a row per token."""
    return torch.tensor([rows], dtype=F64).log()


def everything(length: int) -> Tensor:
    return torch.ones(1, length, dtype=torch.bool)


def bits(gate: Tensor) -> list[int]:
    """A gate as a list, after checking that it is exactly 0 or 1."""
    assert ((gate == 0) | (gate == 1)).all()
    return [int(value) for value in gate.flatten()]


def ranking(gate: Callable[[float], Tensor], length: int) -> list[int]:
    """The places in the order in which they come in as the share grows."""
    found: list[int] = []
    for kept in range(1, length + 1):
        open_now = [place for place, value in enumerate(bits(gate(kept / length))) if value]
        assert len(open_now) == kept
        assert set(found) < set(open_now)
        found += [place for place in open_now if place not in found]
    return found


# --------------------------------------------------------------------------------------------
# Counting and ties

KEEPERS: list[tuple[Callable[..., Tensor], int]] = [
    (selection.keep_high_entropy, 1),
    (selection.keep_low_entropy, -1),
    (selection.keep_large_divergence, 1),
    (selection.keep_unlikely, -1),
    (selection.keep_large_forward_kl, 1),
    (
        lambda values, mask, share: selection.keep_overrated(
            values - 9, 0 * values, mask, share=share
        ),
        -1,
    ),
    (
        lambda values, mask, share: selection.keep_entropy_mismatch(
            -values, 0 * values, mask, share=share
        ),
        1,
    ),
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
    gate = selection.keep_high_entropy(row(NAN, -math.inf, -math.inf), mask, share=1.0)
    assert bits(gate) == [0, 1, 1]


def test_a_step_without_open_tokens_keeps_nothing() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert bits(selection.keep_high_entropy(torch.rand(2, 3), nothing, share=0.5)) == [0] * 6


def test_the_share_is_of_the_step_not_of_each_response() -> None:
    entropy = torch.tensor([[5.0, 6, 7, 8], [1, 2, 3, 4]], dtype=F64)
    gate = selection.keep_high_entropy(entropy, torch.ones(2, 4, dtype=torch.bool), share=0.5)
    assert bits(gate) == [1, 1, 1, 1, 0, 0, 0, 0]


# --------------------------------------------------------------------------------------------
# What each of them looks at


def test_the_largest_difference_of_entropies_counts_whichever_side_is_surer() -> None:
    teacher, student = row(0.0, 2.0, 1.0, 0.5), row(1.5, 0.25, 1.0, 1.0)
    # |differences| 1.5, 1.75, 0, 0.5
    gate = partial(selection.keep_entropy_mismatch, teacher, student, everything(4))
    assert ranking(lambda share: gate(share=share), 4) == [1, 0, 3, 2]
    swapped = selection.keep_entropy_mismatch(student, teacher, everything(4), share=0.5)
    assert torch.equal(swapped, gate(share=0.5))


def test_only_tokens_that_the_student_overrates_are_kept_however_large_the_share() -> None:
    # Log ratios -1, 0, 2, -3, and one without teacher mass; n is 5 all the same.
    teacher, student = row(-2, -1, -1, -4, -math.inf), row(-1, -1, -3, -1, -1)
    gate = partial(selection.keep_overrated, teacher, student, everything(5))
    assert bits(gate(share=0.2)) == [0, 0, 0, 0, 1]
    assert bits(gate(share=0.4)) == [0, 0, 0, 1, 1]
    for share in (0.6, 1.0):
        assert bits(gate(share=share)) == [1, 0, 0, 1, 1]
    agreed = selection.keep_overrated(student, student, everything(5), share=1.0)
    assert bits(agreed) == [0] * 5


def test_the_soft_or_by_hand() -> None:
    # h = 0, 1/2, 1, 1/2, 1/4 and d = 1, 1/2, 0, 1/4, 0: scores 1, 3/4, 1, 5/8, 1/4.
    entropy, forward_kl = row(1.0, 2.0, 3.0, 2.0, 1.5), row(8.0, 4.0, 0.0, 2.0, 0.0)
    gate = partial(selection.keep_soft_or, entropy, forward_kl, everything(5))
    assert ranking(lambda share: gate(share=share), 5) == [0, 2, 1, 3, 4]


def test_of_an_undecided_and_a_wrong_token_the_earlier_is_kept_first() -> None:
    # The scores of both are 1, whatever the other one of h and d is there.
    for other in np.linspace(0.01, 0.99, 99).tolist():
        entropy, forward_kl = row(0.0, other, 1.0), row(0.0, 1.0, 0.3)
        gate = selection.keep_soft_or(entropy, forward_kl, everything(3), share=0.1)
        assert bits(gate) == [0, 1, 0], other
        gate = selection.keep_soft_or(forward_kl, entropy, everything(3), share=0.1)
        assert bits(gate) == [0, 1, 0], other


def test_where_one_signal_is_constant_the_soft_or_is_the_other() -> None:
    entropy = row(1.0, 3.0, 2.0, 0.5)
    gate = selection.keep_soft_or(entropy, torch.full_like(entropy, 0.7), everything(4), share=0.5)
    assert torch.equal(gate, selection.keep_high_entropy(entropy, everything(4), share=0.5))
    gate = selection.keep_soft_or(torch.zeros_like(entropy), entropy, everything(4), share=0.5)
    assert torch.equal(gate, selection.keep_large_forward_kl(entropy, everything(4), share=0.5))
    level = torch.ones_like(entropy)
    assert bits(selection.keep_soft_or(level, level, everything(4), share=0.5)) == [1, 1, 0, 0]


def test_uncertain_or_wrong_is_a_product_and_a_power_of_zero_leaves_its_factor_out() -> None:
    # Shares of the largest: H 1, 1/2, 3/4, 0 and D 1/8, 1/2, 1/4, 1.
    entropy, distance = row(4.0, 2.0, 3.0, 0.0), row(0.05, 0.2, 0.1, 0.4)
    gate = partial(selection.keep_uncertain_or_wrong, entropy, distance, everything(4))
    # 1/8, 1/4, 3/16, 0; squaring the first: 1/8, 1/8, 9/64, 0; the first or the second alone
    assert ranking(lambda share: gate(share=share), 4) == [1, 2, 0, 3]
    squared = ranking(lambda share: gate(share=share, entropy_power=2.0), 4)
    assert squared == [2, 0, 1, 3]
    assert ranking(lambda share: gate(share=share, divergence_power=0.0), 4) == [0, 2, 1, 3]
    assert ranking(lambda share: gate(share=share, entropy_power=0.0), 4) == [3, 1, 2, 0]
    none = {"entropy_power": 0.0, "divergence_power": 0.0}
    assert ranking(lambda share: gate(share=share, **none), 4) == [0, 1, 2, 3]


def test_uncertain_or_wrong_does_not_depend_on_the_units() -> None:
    entropy, distance = row(1.0, 2.0, 3.0, 0.5), row(0.5, 0.2, 0.1, 0.4)
    gate = selection.keep_uncertain_or_wrong(entropy, distance, everything(4), share=0.5)
    scaled = selection.keep_uncertain_or_wrong(
        1e-3 * entropy, 1e5 * distance, everything(4), share=0.5
    )
    assert torch.equal(gate, scaled)


@pytest.mark.parametrize("powers", [(1.0, 1.0), (0.0, 1.0), (0.5, 0.0)])
def test_where_all_are_sure_or_all_agree_the_earliest_are_kept(
    powers: tuple[float, float],
) -> None:
    zero, knobs = (
        row(0.0, 0.0, 0.0),
        dict(zip(("entropy_power", "divergence_power"), powers, strict=True)),
    )
    gate = selection.keep_uncertain_or_wrong(zero, zero, everything(3), share=0.6, **knobs)
    assert bits(gate) == [1, 1, 0]


def test_teachable_tokens_by_hand() -> None:
    # Of five tokens the quantiles of 5 and 95 per cent lie 1/5 of the way to the next one inside:
    # KLs 0, 1, 2, 3, 4 run from 0.2 to 3.8, and N is 0, 0.22, 0.5, 0.78, 1. The mass on the two
    # likeliest of the student runs from 0.1 + 0.4 / 5 = 0.18 to 0.9: N 1, 1, 0.58, 0.44, 0.
    # Scores 0, 0.22, 0.29, 0.35, 0.
    forward_kl = row(0.0, 1.0, 2.0, 3.0, 4.0)
    teacher = logs(*((0.0, 1 - mass, mass - 0.05, 0.05) for mass in (0.9, 0.9, 0.6, 0.5, 0.1)))
    ids = torch.tensor([[[-1, 7, 3, 5]]]).expand(1, 5, 4)
    likeliest = torch.tensor([[[5, 3, 7]]]).expand(1, 5, 3)
    gate = partial(
        selection.keep_teachable, forward_kl, teacher, ids, likeliest, everything(5), k=2
    )
    assert ranking(lambda share: gate(share=share), 5) == [3, 2, 1, 0, 4]
    # the order of the ids is no matter
    turned = selection.keep_teachable(
        forward_kl, teacher.flip(-1), ids.flip(-1), likeliest, everything(5), k=2, share=0.4
    )
    assert torch.equal(turned, gate(share=0.4))


def test_where_all_differ_alike_no_token_is_more_teachable() -> None:
    teacher = logs((0.5, 0.5), (0.9, 0.1), (0.2, 0.8))
    ids = torch.tensor([[[0, 1]]]).expand(1, 3, 2)
    gate = selection.keep_teachable(
        row(2.0, 2.0, 2.0), teacher, ids, ids, everything(3), k=1, share=0.5
    )
    assert bits(gate) == [1, 1, 0]  # round(1.5) of equals, the earliest


# --------------------------------------------------------------------------------------------
# Signal and noise of one sample


def signal_and_noise(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """By autograd: the expected gradient, and one sample's spread at the best baseline.

    A sample's gradient is (r(v) - b) times the score e_v - student, and the Fisher metric is
    diag(student) - student student^T, of which the pseudo-inverse measures lengths.
    """
    leaf = student.clone().requires_grad_()
    divergence.reverse_kl(leaf.log_softmax(-1), teacher).backward()
    assert leaf.grad is not None
    share = student.exp()
    fisher = torch.diag(share) - torch.outer(share, share)
    metric = torch.linalg.pinv(fisher)
    scores = torch.eye(len(share), dtype=F64) - share
    squares = torch.einsum("vi,ij,vj->v", scores, metric, scores)
    assert torch.allclose(squares, 1 / share - 1)
    ratio = student - teacher
    signal = float(leaf.grad @ metric @ leaf.grad)
    noises = []
    for baseline in torch.linspace(-5, 5, 20001, dtype=F64):
        noises.append(float((share * (ratio - baseline) ** 2 * squares).sum()) - signal)
    return signal, min(noises)


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_the_squared_gradient_over_the_spread_of_a_sample(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, generator=generator, dtype=F64).log_softmax(-1)
    signal, noise = signal_and_noise(student, teacher)
    score = signal_to_noise(student.tolist(), teacher.tolist())
    assert score == pytest.approx(signal / noise, rel=1e-5)


def test_signal_and_noise_by_hand() -> None:
    # Student 1/3 each, so l = 2 everywhere and b is the mean of r. Then noise = 2 Var - Var: one.
    third = (1 / 3, 1 / 3, 1 / 3)
    for teacher in ((0.5, 0.25, 0.25), (0.1, 0.1, 0.8)):
        score = signal_to_noise(np.log(third).tolist(), np.log(teacher).tolist())
        assert score == pytest.approx(1.0, rel=1e-12)
    # Student 1/2, 1/4, 1/4 and r = log 2 * (0, -1, 1): Var = log(2)^2 / 2; b = 0 for l = 1, 3, 3;
    # (r - b)^2 l is 0, 3, 3 logs: 3/2 in the mean. Score (1/2) / (3/2 - 1/2) = 1/2.
    teacher = np.log((0.5, 0.5, 0.125)).tolist()
    assert signal_to_noise(np.log((0.5, 0.25, 0.25)).tolist(), teacher) == pytest.approx(0.5)


def test_high_signal_is_ranked_by_that_score() -> None:
    # Scores 1/2, 1 (the student is uniform), and 0 where the two agree.
    student = logs((0.5, 0.25, 0.25), (1 / 3, 1 / 3, 1 / 3), (0.2, 0.3, 0.5))
    teacher = logs((0.5, 0.5, 0.125), (0.5, 0.25, 0.25), (0.2, 0.3, 0.5))
    gate = partial(selection.keep_high_signal, student, teacher, everything(3))
    assert ranking(lambda share: gate(share=share), 3) == [1, 0, 2]


@settings(max_examples=50)
@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_of_two_entries_one_sample_says_all_unless_they_agree(ours: float, theirs: float) -> None:
    # Between two entries every sample's gradient points one way, so b can remove all spread: the
    # score is infinite, and above any of three entries.
    three = (0.9, 0.05, 0.05), (0.05, 0.05, 0.9)
    assert 0 < signal_to_noise(*(np.log(side).tolist() for side in three)) < math.inf
    student = logs(three[0], (ours, 1 - ours, 0.0))
    teacher = logs(three[1], (theirs, 1 - theirs, 0.0))
    gate = selection.keep_high_signal(student, teacher, everything(2), share=0.5)
    if abs(ours - theirs) > 1e-3:
        assert bits(gate) == [0, 1]
    # and where they agree there is no signal, so 0
    agreed = torch.stack([teacher[:, 0], student[:, 1]], 1)
    gate = selection.keep_high_signal(student, agreed, everything(2), share=0.5)
    assert bits(gate) == [1, 0]


@settings(max_examples=50)
@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_two_infinite_scores_are_equals(first: float, second: float, teachers: float) -> None:
    if min(abs(first - teachers), abs(second - teachers)) < 1e-3:
        return
    student = logs((first, 1 - first), (second, 1 - second))
    teacher = logs((teachers, 1 - teachers), (teachers, 1 - teachers))
    gate = selection.keep_high_signal(student, teacher, everything(2), share=0.5)
    assert bits(gate) == [1, 0]


def test_a_certain_student_has_neither_signal_nor_noise() -> None:
    student = logs((1.0, 0.0, 0.0), (0.5, 0.3, 0.2))
    teacher = logs((0.2, 0.4, 0.4), (0.4, 0.4, 0.2))
    assert bits(selection.keep_high_signal(student, teacher, everything(2), share=0.5)) == [0, 1]


def test_entries_that_neither_side_has_change_no_ranking() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 3, 8, 4, generator=generator, dtype=F64).log_softmax(-1)
    mask = torch.rand(3, 8, generator=generator) < 0.8
    padding = torch.full((3, 8, 2), -math.inf, dtype=F64)
    longer = [torch.cat([padding, side], -1) for side in (student, teacher)]
    for share in (0.1, 0.3, 0.6):
        gate = selection.keep_high_signal(student, teacher, mask, share=share)
        assert torch.equal(selection.keep_high_signal(*longer, mask, share=share), gate)


@pytest.mark.parametrize("beyond", [-40.0, -200.0, -math.inf])
def test_a_ratio_counts_up_to_thirty_nats(beyond: float) -> None:
    student = logs((0.5, 0.25, 0.25), (0.5, 0.25, 0.25))

    def kept(first: float, second: float) -> list[int]:
        teacher = logs((0.5, 0.4, 1.0), (0.5, 0.4, 1.0))
        teacher[0, :, 2] += torch.tensor([first, second], dtype=F64)
        return bits(selection.keep_high_signal(student, teacher, everything(2), share=0.5))

    at_bound = math.log(0.25) - 30
    # Equals, whichever comes first; and inside the bound they are none.
    assert kept(at_bound, beyond) == kept(beyond, at_bound) == [1, 0]
    assert kept(at_bound + 25, beyond) != kept(beyond, at_bound + 25)


# --------------------------------------------------------------------------------------------
# All of them


def gates() -> dict[str, Callable[[Tensor, float], Tensor]]:
    """Every gate of the module on random tensors, by mask and share."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.rand(3, 7, *shape, generator=generator, dtype=F64)

    one, two = draw(), draw()
    student, teacher = (4 * draw(5)).log_softmax(-1), (4 * draw(5)).log_softmax(-1)
    ids = torch.arange(5).expand(3, 7, 5)
    pairs = ("keep_entropy_mismatch", "keep_soft_or", "keep_uncertain_or_wrong")
    singles = (
        *("keep_high_entropy", "keep_low_entropy", "keep_large_divergence"),
        *("keep_large_forward_kl", "keep_unlikely"),
    )

    def gate(name: str, *tensors: Tensor, **knobs: int) -> Callable[[Tensor, float], Tensor]:
        function: Callable[..., Tensor] = getattr(selection, name)
        return lambda mask, share: function(*tensors, mask, share=share, **knobs)

    return {
        **{name: gate(name, one) for name in singles},
        **{name: gate(name, one, two) for name in pairs},
        "keep_overrated": gate("keep_overrated", -one - 1, -two),
        "keep_high_signal": gate("keep_high_signal", student, teacher),
        "keep_teachable": gate("keep_teachable", one, teacher, ids, ids.flip(-1), k=2),
    }


def test_every_gate_of_the_module_is_among_them() -> None:
    assert set(gates()) == set(selection.__all__)


@pytest.mark.parametrize("name", gates())
@pytest.mark.parametrize(("share", "kept"), [(0.01, 1), (0.3, 3), (0.35, 4), (1.0, 10)])
def test_a_share_of_the_open_tokens_is_kept_with_halves_rounded_up(
    name: str, share: float, kept: int
) -> None:
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 1:6] = mask[2, 2:7] = True  # ten: 3.5 of them are four
    gate = gates()[name](mask, share)
    assert sum(bits(gate)) == kept
    assert (gate[~mask] == 0).all()


@pytest.mark.parametrize("name", gates())
def test_a_larger_share_keeps_what_a_smaller_one_did(name: str) -> None:
    mask = torch.ones(3, 7, dtype=torch.bool)
    before = torch.zeros(3, 7)
    for share in (0.05, 0.2, 0.5, 0.8, 1.0):
        gate = gates()[name](mask, share)
        assert (gate >= before).all()
        before = gate


@pytest.mark.parametrize("name", gates())
def test_a_step_without_open_tokens_keeps_nothing_of_any(name: str) -> None:
    assert bits(gates()[name](torch.zeros(3, 7, dtype=torch.bool), 0.5)) == [0] * 21


@pytest.mark.parametrize("name", gates())
@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, NAN])
def test_a_share_outside_zero_to_one_is_refused_by_name(name: str, share: float) -> None:
    with pytest.raises(ValueError, match=rf"share is a share in \(0, 1\], got {share}"):
        gates()[name](torch.ones(3, 7, dtype=torch.bool), share)


@pytest.mark.parametrize("value", [-0.1, math.inf, NAN])
def test_impossible_powers_are_refused_by_name(value: float) -> None:
    one = row(1.0)
    for knob in ("entropy_power", "divergence_power"):
        with pytest.raises(ValueError, match=f"{knob} must be a finite number >= 0, got {value}"):
            selection.keep_uncertain_or_wrong(one, one, everything(1), share=0.5, **{knob: value})


@pytest.mark.parametrize("k", [0, 3])
def test_as_many_likeliest_tokens_as_asked_must_be_known(k: int) -> None:
    ids = torch.tensor([[[0, 1]]])
    with pytest.raises(ValueError, match=f"k.*{k}"):
        selection.keep_teachable(
            row(1.0), logs((0.5, 0.5)), ids, ids, everything(1), k=k, share=0.5
        )

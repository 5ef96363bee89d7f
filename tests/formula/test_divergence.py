from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.formula import divergence, support
from tests.reference import divergences as ref

F64 = torch.float64
JSD_WEIGHTS = (0.1, 0.5, 0.9)
DIVERGENCES: list[tuple[str, dict[str, float]]] = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *(("generalized_jsd", {"teacher_weight": w}) for w in JSD_WEIGHTS),
]
each_divergence = pytest.mark.parametrize(("name", "knobs"), DIVERGENCES)


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


@each_divergence
@pytest.mark.parametrize("kept", [[0, 2], [4, 1, 3], [3], list(range(9))])
@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_truncated_supports_agree_with_the_transcription(
    name: str, knobs: dict[str, float], kept: list[int], tail: str
) -> None:
    student, teacher = pair(17)
    ids = torch.tensor(kept)

    def restrict(log_probs: Tensor) -> Tensor:
        inside = log_probs.gather(-1, ids)
        if tail == "renormalise":
            return support.renormalise(inside)
        return support.with_bucket(inside, support.log_mass_outside(log_probs, ids))

    value, gradient = value_and_gradient(
        lambda logits: ours(name, knobs)(
            restrict(logits.log_softmax(-1)), restrict(teacher.log_softmax(-1))
        ),
        student,
    )
    prefix = {"renormalise": "renormalised", "bucket": "tail_bucket"}[tail]
    rows = ref.log_softmax(student), ref.log_softmax(teacher), kept
    expected = getattr(ref, f"{prefix}_{name}")(*rows, **knobs)
    slope = getattr(ref, f"{prefix}_{name}_gradient")(*rows, **knobs)
    assert value == pytest.approx(expected, abs=1e-12)
    assert np.abs(gradient - slope).max() <= 1e-12


distributions = st.lists(st.floats(-8, 8), min_size=4, max_size=4).map(
    lambda logits: torch.tensor(logits, dtype=F64).log_softmax(-1)
)


@each_divergence
@given(student=distributions, teacher=distributions)
def test_never_negative_and_zero_for_equal_inputs(
    name: str, knobs: dict[str, float], student: Tensor, teacher: Tensor
) -> None:
    formula = ours(name, knobs)
    assert float(formula(student, teacher)) >= -1e-15
    assert float(formula(student, student.clone())) == pytest.approx(0, abs=1e-15)
    if (student - teacher).abs().max() > 1e-3:
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


def test_kls_are_infinite_exactly_where_the_other_side_is_missing() -> None:
    both, without_last = logs(0.4, 0.4, 0.2), logs(0.5, 0.5, 0.0)
    assert float(divergence.forward_kl(without_last, both)) == math.inf
    assert math.isfinite(float(divergence.forward_kl(both, without_last)))
    assert float(divergence.reverse_kl(both, without_last)) == math.inf
    assert math.isfinite(float(divergence.reverse_kl(without_last, both)))
    jsd = divergence.generalized_jsd(both, without_last, teacher_weight=0.5)
    assert math.isfinite(float(jsd))


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

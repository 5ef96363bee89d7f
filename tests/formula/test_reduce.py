from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.formula import reduce
from opd.types import Count
from tests.reference import objectives as ref

NAMES = ("token_mean", "sequence_mean", "sequence_sum")
each_reduction = pytest.mark.parametrize("name", NAMES)


def counted(chosen: Tensor) -> Count:
    per_sequence = chosen.sum(1)
    return Count(float(per_sequence.sum()), float((per_sequence > 0).sum()))


def factors(name: str, chosen: Tensor, count: Count) -> Tensor:
    result: Tensor = getattr(reduce, name)(chosen, count=count)
    return result


masks = st.builds(
    lambda size, length, seed, share: (
        torch.rand(size, length, generator=torch.Generator().manual_seed(seed)) < share
    ),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 999),
    st.floats(0, 1),
)


@each_reduction
@given(chosen=masks)
def test_factors_agree_with_the_transcription(name: str, chosen: Tensor) -> None:
    ours = factors(name, chosen, counted(chosen))
    expected = getattr(ref, name)(chosen.numpy())
    assert np.allclose(ours, expected, rtol=1e-15, atol=0)
    assert torch.equal(ours != 0, chosen)


@each_reduction
@given(chosen=masks, cut=st.integers(0, 5))
def test_parts_of_a_batch_use_the_factors_of_the_whole(name: str, chosen: Tensor, cut: int) -> None:
    count = counted(chosen)
    whole = factors(name, chosen, count)
    parts = [factors(name, part, count) for part in (chosen[:cut], chosen[cut:])]
    assert torch.equal(torch.cat(parts), whole)


@given(chosen=masks)
def test_the_means_sum_to_one_if_anything_is_counted(chosen: Tensor) -> None:
    for name in ("token_mean", "sequence_mean"):
        total = float(factors(name, chosen, counted(chosen)).sum())
        assert total == pytest.approx(float(chosen.any()), abs=1e-12)


@each_reduction
def test_nothing_chosen_is_no_division_by_zero(name: str) -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert factors(name, empty, Count(0.0, 0.0)).tolist() == [[0.0] * 3] * 2

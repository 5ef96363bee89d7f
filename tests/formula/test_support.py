from __future__ import annotations

import math

import pytest
import torch

from opd.formula import support
from tests.reference import divergences as ref

F64 = torch.float64


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


def test_both_tails_agree_with_the_transcription() -> None:
    log_probs = torch.randn(8, dtype=F64).log_softmax(-1)
    kept = [5, 0, 3]
    inside = log_probs[kept]
    renormalised = support.renormalise(inside)
    bucketed = support.with_bucket(inside, support.log_mass_outside(log_probs, torch.tensor(kept)))
    assert (renormalised - torch.tensor(ref.renormalise(log_probs, kept))).abs().max() <= 1e-14
    assert (bucketed - torch.tensor(ref.bucket_tail(log_probs, kept))).abs().max() <= 1e-14
    assert float(renormalised.exp().sum()) == pytest.approx(1)
    assert float(bucketed.exp().sum()) == pytest.approx(1)


def test_nothing_lies_outside_the_whole_vocabulary() -> None:
    log_probs = torch.randn(2, 4, dtype=F64).log_softmax(-1).requires_grad_()
    ids = torch.arange(4).expand(2, 4)
    outside = support.log_mass_outside(log_probs, ids)
    assert outside.tolist() == [-math.inf, -math.inf]
    outside.exp().sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[0.0] * 4] * 2


def test_the_mass_outside_is_summed_not_subtracted() -> None:
    logits = torch.tensor([0.0, -60.0, -61.0])  # one minus the inside would be 0 in float32
    outside = support.log_mass_outside(logits.log_softmax(-1), torch.tensor([0]))
    assert float(outside) == pytest.approx(-60 + math.log1p(math.exp(-1)), abs=1e-5)

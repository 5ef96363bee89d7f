from __future__ import annotations

import math

import torch

from opd.formula import reward
from tests.reference.credit import teacher_log_ratio

F64 = torch.float64


def test_one_is_one_for_every_token() -> None:
    assert reward.one(torch.tensor([[3, 0], [7, 7]])).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_the_log_ratio_is_positive_where_the_teacher_likes_the_token_better() -> None:
    ratio = reward.teacher_log_ratio(
        torch.tensor([math.log(0.5), math.log(0.1)], dtype=F64),
        torch.tensor([math.log(0.25), math.log(0.1)], dtype=F64),
    )
    assert ratio.tolist() == [math.log(0.5) - math.log(0.25), 0.0]


def test_the_log_ratio_agrees_with_the_transcription() -> None:
    student, teacher = torch.randn(2, 6, dtype=F64).log_softmax(-1)
    for token in range(6):
        expected = teacher_log_ratio(student, teacher, token)
        assert float(reward.teacher_log_ratio(teacher[token], student[token])) == expected


def test_the_log_ratio_carries_no_gradient() -> None:
    live = torch.zeros(3, requires_grad=True)
    assert not reward.teacher_log_ratio(live, live).requires_grad

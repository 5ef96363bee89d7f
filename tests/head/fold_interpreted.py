"""The kernels of the fold on a CPU: what `test_fold.py` runs with TRITON_INTERPRET=1.

Not collected by itself: the variable has to be there before Triton is imported, and the checker
of annotations does not know Triton's functions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.formula import credit, divergence, regulariser, reward, weight
from opd.head import HeadOutput, fold, linear_head
from opd.objective import Dense, Objective, Regulariser, Sampled
from opd.rollout.pack import with_token
from opd.types import Batch, FieldKey, TeacherScores, Unembedding
from tests.builders import Case

F32 = torch.float32
JSD = partial(divergence.generalized_jsd, teacher_weight=0.3)
VOPD = Sampled(reward=reward.teacher_log_ratio, baseline=credit.expected_reward)
OBJECTIVES = {
    "reverse KL": Objective(Dense(divergence.reverse_kl)),
    "forward KL, warm": Objective(Dense(divergence.forward_kl), temperature=1.7),
    "JSD": Objective(Dense(JSD)),
    "sampled": Objective(Sampled(reward=reward.teacher_log_ratio)),
    "sampled, per-state baseline": Objective(VOPD),
    "gated sum": Objective(
        Dense(divergence.reverse_kl, weights=(partial(weight.student_entropy_above, nats=1.5),)),
        Dense(JSD, coef=0.4),
        Regulariser(regulariser.entropy_bonus, coef=0.02),
    ),
}
WANTED = frozenset(
    {
        FieldKey("forward_kl", "teacher"),
        FieldKey("teacher_entropy", "teacher"),
        FieldKey("logit_gradient_norm"),
    }
)


@pytest.mark.parametrize("vocab_size", [1, 16, 1000, 4097, 9000])
def test_values_and_gradient_are_those_of_autograd_in_float64(vocab_size: int) -> None:
    draw = torch.Generator().manual_seed(vocab_size)
    rows, temperature, w = 3, 1.3, 0.3
    student, teacher = (2 * torch.randn(rows, vocab_size, generator=draw) for _ in range(2))
    tokens = torch.randint(vocab_size, (rows,), generator=draw)
    found = fold.Fold.of(student.clone(), teacher, temperature=temperature, teacher_weight=w)
    live = student.double().requires_grad_()
    s = (live / temperature).log_softmax(-1)
    t = (teacher.double() / temperature).log_softmax(-1)
    expected = {
        "student_normaliser": (live / temperature).logsumexp(-1),
        "teacher_normaliser": (teacher.double() / temperature).logsumexp(-1),
        "reverse_kl": divergence.reverse_kl(s, t),
        "forward_kl": divergence.forward_kl(s, t),
        "student_entropy": divergence.student_entropy(s),
        "teacher_entropy": divergence.teacher_entropy(t),
        "generalized_jsd": divergence.generalized_jsd(s, t, teacher_weight=w),
        "student_logp": s.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
    }
    for name in set(fold.VALUES) & set(expected):
        assert (found[name] - expected[name].detach()).abs().max() <= 1e-5, name
    factors = {name: torch.rand(rows, generator=draw) for name in fold.SLOPES}
    sum((factors[name].double() * expected[name]).sum() for name in fold.SLOPES).backward()
    found.write_gradient(factors, tokens)
    assert live.grad is not None
    scale = torch.stack(list(factors.values())).norm()  # of the summands, which may cancel
    assert (found.student_logits - live.grad).norm() <= 1e-6 * scale


class Projected:
    """Hidden states and unembeddings of both sides, float32."""

    def __init__(self, lengths: tuple[int, ...] = (9, 0, 14), **transformed: Any) -> None:
        self.case = Case.random(3, vocab_size=300, lengths=lengths)
        draw = torch.Generator().manual_seed(4)
        rows = int(self.case.mask.sum())
        self.hidden = torch.randn(rows, 24, generator=draw)
        self.weight = torch.randn(310, 24, generator=draw) / 4
        self.teacher = TeacherScores(
            hidden=torch.randn(rows, 20, generator=draw),
            unembedding=Unembedding(torch.randn(304, 20, generator=draw) / 4, 300),
        )
        self.transformed = transformed

    def batch(self) -> Batch:
        return with_token(self.case.batch(dtype=F32), views={"teacher": self.teacher})

    def answer(self, objective: Objective, **options: Any) -> tuple[HeadOutput, Tensor, Tensor]:
        hidden, weight_ = (value.clone().requires_grad_() for value in (self.hidden, self.weight))
        unembedding = Unembedding(weight_, 300, **self.transformed)
        out = linear_head(hidden, unembedding, self.batch(), objective, wanted=WANTED, **options)
        assert out.loss is not None
        out.loss.backward()
        assert hidden.grad is not None
        assert weight_.grad is not None
        return out, hidden.grad, weight_.grad


def agree(projected: Projected, objective: Objective, monkeypatch: Any, **options: Any) -> None:
    """Both paths say the same, and the kernels were what ran."""
    assert fold.is_available("cpu")
    made: list[int] = []
    of = fold.Fold.of

    def counted(student: Tensor, *args: Any, **kwargs: Any) -> fold.Fold:
        made.append(len(student))
        return of(student, *args, **kwargs)

    monkeypatch.setattr(fold.Fold, "of", counted)
    folded, *gradients = projected.answer(objective, **options)
    assert sum(made) == len(projected.hidden)
    monkeypatch.setattr(fold, "serves", lambda logits, hidden: False)
    portable, *expected = projected.answer(objective)
    assert sum(made) == len(projected.hidden)
    assert folded.loss is not None
    assert portable.loss is not None
    assert float(folded.loss) == pytest.approx(float(portable.loss), rel=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()
    assert folded.rows.keys() == portable.rows.keys()
    for name, value in portable.rows.items():
        assert torch.allclose(folded.rows[name], value, rtol=1e-5, atol=1e-5), name
    for key, value in portable.fields.items():
        assert torch.allclose(folded.fields[key], value, rtol=1e-5, atol=1e-5), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_head_says_the_same_on_both_paths(name: str, monkeypatch: Any) -> None:
    agree(Projected(), OBJECTIVES[name], monkeypatch)


@pytest.mark.parametrize("chunk_bytes", [1, 9000])
def test_chunks_are_folded_one_by_one(chunk_bytes: int, monkeypatch: Any) -> None:
    agree(Projected(), OBJECTIVES["JSD"], monkeypatch, chunk_bytes=chunk_bytes)


def test_scale_and_bias_are_differentiated_through(monkeypatch: Any) -> None:
    transformed = {"logit_scale": 0.5, "bias": torch.linspace(-1, 1, 310)}
    agree(Projected(**transformed), OBJECTIVES["gated sum"], monkeypatch)


def test_rows_of_several_heads_are_folded(monkeypatch: Any) -> None:
    projected = Projected()
    draw = torch.Generator().manual_seed(9)
    rows = len(projected.hidden)
    heads = tuple(
        Unembedding(torch.randn(300 + pad, width, generator=draw) / 4, 300, **transformed)
        for pad, width, transformed in ((4, 20, {}), (0, 12, {"soft_cap": 2.0}))
    )
    projected.teacher = TeacherScores(
        hidden=torch.randn(rows, 20, generator=draw),
        names=("a", "b"),
        heads=heads,
        answered_by=torch.arange(rows) % 3 // 2,
    )
    agree(projected, OBJECTIVES["gated sum"], monkeypatch, chunk_bytes=9000)


def test_a_soft_cap_is_left_to_the_portable_path(monkeypatch: Any) -> None:
    monkeypatch.setattr(fold.Fold, "of", None)
    out, *_ = Projected(soft_cap=2.0).answer(OBJECTIVES["JSD"])
    assert out.loss is not None


def test_no_rows_at_all_are_folded_to_nothing() -> None:
    out, hidden, weight_ = Projected(lengths=(0,)).answer(OBJECTIVES["reverse KL"])
    assert float(out.loss.detach()) == 0.0  # type: ignore[union-attr]
    assert hidden.shape == (0, 24)
    assert not weight_.any()


def test_a_row_with_zero_mass_is_left_to_the_formulas(monkeypatch: Any) -> None:
    projected = Projected()
    bias = torch.zeros(304)
    bias[7] = -math.inf
    unembedding = replace(projected.teacher.unembedding, bias=bias)  # type: ignore[type-var]
    projected.teacher = replace(projected.teacher, unembedding=unembedding)
    out, hidden, _ = projected.answer(OBJECTIVES["forward KL, warm"])
    monkeypatch.setattr(fold, "serves", lambda logits, hidden: False)
    expected, gradient, _ = projected.answer(OBJECTIVES["forward KL, warm"])
    assert torch.equal(out.rows["loss/dense"], expected.rows["loss/dense"])
    assert torch.equal(hidden, gradient)


@pytest.mark.parametrize("vocab_size", [1, 16, 1000, 4097, 9000])
def test_a_narrow_gradient_lies_where_the_logits_lay(vocab_size: int) -> None:
    draw = torch.Generator().manual_seed(vocab_size)
    student, teacher = (2 * torch.randn(3, vocab_size, generator=draw) for _ in range(2))
    tokens = torch.randint(vocab_size, (3,), generator=draw)
    factors = {name: torch.rand(3, generator=draw) for name in fold.SLOPES}
    wide = fold.Fold.of(student.clone(), teacher, teacher_weight=0.3).write_gradient(
        factors, tokens
    )
    folded = fold.Fold.of(student, teacher, teacher_weight=0.3)
    narrow = folded.write_gradient(factors, tokens, torch.bfloat16)
    assert narrow.data_ptr() == student.data_ptr()
    assert (narrow.float() - wide).norm() <= 2**-7 * wide.norm()  # the interpreter truncates


@pytest.mark.parametrize("name", ["reverse KL", "forward KL, warm", "gated sum"])
def test_a_row_with_zero_mass_in_a_later_chunk_is_found_in_the_end(
    name: str, monkeypatch: Any
) -> None:
    projected, head = Projected(), Projected().teacher.unembedding
    assert fold.is_available("cpu")
    hidden, weight_ = projected.teacher.hidden.clone(), head.weight.clone()  # type: ignore[union-attr]
    hidden[:, 0], weight_[:, 0] = 0.0, 0.0
    hidden[-1, 0], weight_[7, 0] = 1e38, -1e38  # the last row alone gives token 7 no mass
    projected.teacher = replace(
        projected.teacher,
        hidden=hidden,
        unembedding=replace(head, weight=weight_),  # type: ignore[type-var]
    )
    made, of = [], fold.Fold.of
    monkeypatch.setattr(fold.Fold, "of", lambda *a, **k: made.append(1) or of(*a, **k))
    out, *gradients = projected.answer(OBJECTIVES[name], chunk_bytes=9000)
    assert len(made) == 2 * 3  # chunks of three rows, walked over twice
    monkeypatch.setattr(fold, "serves", lambda logits, hidden: False)
    expected, *others = projected.answer(OBJECTIVES[name], chunk_bytes=9000)
    assert float(out.loss) == pytest.approx(float(expected.loss), rel=1e-6)  # type: ignore[arg-type]
    for ours, theirs in zip(gradients, others, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7, equal_nan=True)
    for key, value in expected.rows.items():
        assert torch.allclose(out.rows[key], value, rtol=1e-5, atol=1e-5), key

"""Replies that hold some entries, speak of other rows or of another vocabulary, or are broken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.errors import TeacherError
from opd.formula import credit, divergence, reward, support, weight
from opd.head import HeadOutput, linear_head
from opd.objective import Dense, Objective, Sampled
from opd.rollout.pack import with_token
from opd.types import TeacherScores, Unembedding
from tests.builders import Case, evaluate, identity

F64 = torch.float64
CASE = Case.random(11, lengths=(4, 0, 3), gaps=False)
ROWS, VOCAB = int(CASE.mask.sum()), CASE.vocab_size
REVERSE_KL = Objective(Dense(divergence.reverse_kl))
LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)
TOP_3 = {"support": partial(support.teacher_top_k, k=3), "tail": "bucket"}


def distribution(case: Case = CASE) -> Tensor:
    return case.rows(case.teacher_logits["teacher"]).log_softmax(-1)


def top(k: int) -> TeacherScores:
    logp, ids = distribution().topk(k)
    return TeacherScores(top_ids=ids, top_logp=logp)


def answer(objective: Objective, reply: TeacherScores, **token: Any) -> HeadOutput:
    batch = with_token(CASE.batch(), views={"teacher": reply}, **token)
    return evaluate(CASE, objective, batch).head


# --------------------------------------------------------------------------------------------
# Some rows


def unanswered(*rows: int) -> TeacherScores:
    """The whole distribution of the other rows, in another order, and a row nobody asked for."""
    kept = [row for row in range(ROWS) if row not in rows]
    index = torch.full((ROWS,), -1)
    for place, row in enumerate(reversed(kept)):
        index[row] = place + 1
    nobodys = torch.full((1, VOCAB), -math.log(VOCAB), dtype=F64)
    answers = torch.cat([nobodys, distribution()[list(reversed(kept))]])
    return TeacherScores(log_probs=answers, row_index=index)


def test_returns_walk_past_rows_without_an_answer_as_past_a_tool_result() -> None:
    objective = Objective(replace(LOG_RATIO, credit=credit.return_to_go))
    found = answer(objective, unanswered(1, 5))
    mask = CASE.mask.clone()
    for row in (1, 5):
        b, t = CASE.mask.nonzero()[row].tolist()
        mask[b, t] = False
    without = evaluate(replace(CASE, mask=mask), objective).head
    kept = [row for row in range(ROWS) if row not in (1, 5)]
    assert torch.allclose(found.rows["loss/sampled"][kept], without.rows["loss/sampled"])
    assert found.loss is not None
    assert without.loss is not None
    # the denominators still count them
    expected = float(without.loss.detach()) * len(kept) / ROWS
    assert float(found.loss.detach()) == pytest.approx(expected, abs=1e-12)


def test_statistics_of_the_step_leave_unanswered_rows_out() -> None:
    objective = Objective(replace(LOG_RATIO, baseline=credit.batch_mean))
    found = answer(objective, unanswered(2))
    ratio, logp = found.rows["log_ratio"], found.rows["student_logp"]
    first, second = [0, 1, 3], [4, 5, 6]  # of the two responses, row 2 has no answer
    for own, other in ((first, second), (second, first)):  # each is held against the other
        expected = -(ratio[own] - ratio[other].mean()) * logp[own]
        assert torch.allclose(found.rows["loss/sampled"][own], expected)


def test_a_gate_finds_no_advantage_where_the_other_view_has_no_answer() -> None:
    objective = Objective(
        replace(LOG_RATIO, against="teacher.other", name="told"),
        Dense(divergence.reverse_kl, weights=(partial(weight.positive_advantage, of="told"),)),
    )
    losses = []
    for lot in (0.0, 5.0):  # of a row of the other view that is nobody's
        other = unanswered(1)
        assert other.log_probs is not None
        answers = other.log_probs.clone()
        answers[0] = (torch.arange(VOCAB) * lot).log_softmax(-1)
        views = {"teacher": TeacherScores(log_probs=distribution())}
        views["teacher.other"] = replace(other, log_probs=answers)
        out = evaluate(CASE, objective, with_token(CASE.batch(), views=views)).head
        assert float(out.rows["loss/dense_2"][1]) == 0.0
        losses.append(float(out.loss.detach()))  # type: ignore[union-attr]
    assert losses[0] == losses[1]


def test_a_batch_that_no_row_of_the_teacher_answers_teaches_nothing() -> None:
    index = torch.full((ROWS,), -1)
    reply = TeacherScores(
        hidden=torch.zeros((0, VOCAB), dtype=F64), unembedding=identity(VOCAB), row_index=index
    )
    found = evaluate(CASE, REVERSE_KL, with_token(CASE.batch(), views={"teacher": reply}))
    assert found.loss == 0.0
    assert not found.gradient.any()
    assert found.head.stats["unanswered/teacher"].mean == 1.0
    assert "teacher/log_ratio" not in found.head.stats


# --------------------------------------------------------------------------------------------
# Some entries


@pytest.mark.parametrize("extra", [{}, {"smoothing": 0.1}], ids=["plain", "smoothed"])
def test_the_likeliest_tokens_are_enough_for_a_support_among_them(
    extra: Mapping[str, Any],
) -> None:
    objective = Objective(Dense(divergence.forward_kl, **TOP_3, **extra))
    whole = answer(objective, TeacherScores(log_probs=distribution()))
    some = answer(objective, top(4))
    assert torch.allclose(some.rows["loss/dense"], whole.rows["loss/dense"], rtol=1e-12, atol=1e-12)
    if extra:
        share = some.stats["changed/dense/smoothing"]
        floor = math.log(0.1 / VOCAB) - math.log(0.9)
        low = (distribution().topk(3).values < floor).double().mean(-1)
        assert share.total == pytest.approx(float(low.sum()))


def test_an_answer_that_stands_there_twice_counts_once() -> None:
    logp, ids = distribution().topk(4)
    doubled = TeacherScores(ids=torch.cat([ids, ids], -1), ids_logp=torch.cat([logp, logp], -1))
    objective = Objective(
        Dense(divergence.forward_kl, support=partial(support.student_top_k, k=2), tail="bucket")
    )
    token = {"student_top_ids": ids[:, :2]}
    once = answer(objective, TeacherScores(ids=ids, ids_logp=logp), **token)
    twice = answer(objective, doubled, **token)
    assert torch.equal(once.rows["loss/dense"], twice.rows["loss/dense"])


def test_no_entry_at_all_answers_nothing() -> None:
    reply = TeacherScores(
        ids=torch.zeros((ROWS, 0), dtype=torch.long), ids_logp=torch.zeros((ROWS, 0), dtype=F64)
    )
    objective = Objective(
        Dense(divergence.reverse_kl, support=partial(support.student_top_k, k=2), tail="bucket")
    )
    with pytest.raises(TeacherError, match="'teacher' scored 0 tokens a row"):
        answer(objective, reply)


def test_entries_of_merged_ids_stand_under_the_first_of_them() -> None:
    merged = ((2, 6),)
    objective = Objective(Dense(divergence.forward_kl, **TOP_3))
    log_probs = distribution()
    together = log_probs.clone()
    together[:, 2] = torch.logaddexp(log_probs[:, 2], log_probs[:, 6])
    together[:, 6] = -math.inf
    logp, ids = together.topk(VOCAB)  # the other id is among them, without mass
    batch = CASE.batch(merge_ids=merged)
    entries = with_token(batch, views={"teacher": TeacherScores(top_ids=ids, top_logp=logp)})
    whole = with_token(batch, views={"teacher": TeacherScores(log_probs=log_probs)})
    some, every = evaluate(CASE, objective, entries), evaluate(CASE, objective, whole)
    assert some.loss == pytest.approx(every.loss, abs=1e-12)
    assert torch.allclose(some.gradient, every.gradient, rtol=0, atol=1e-12)

    apart = TeacherScores(top_ids=log_probs.topk(VOCAB).indices, top_logp=log_probs.topk(VOCAB)[0])
    with pytest.raises(TeacherError, match=r"mass to token id 6.*sum their mass under 2"):
        evaluate(CASE, objective, with_token(batch, views={"teacher": apart}))


def test_entries_of_more_mass_than_one_are_no_probabilities() -> None:
    ids = torch.tensor([[0, 1, 2]]).expand(ROWS, 3)
    reply = TeacherScores(top_ids=ids, top_logp=torch.full(ids.shape, -0.5, dtype=F64))
    with pytest.raises(TeacherError, match=r"a mass of 1\.8\d+ in row 0"):
        answer(Objective(Dense(divergence.forward_kl, **TOP_3)), reply)


def test_smoothing_knows_the_merged_ids_from_the_batch_not_from_zero_mass() -> None:
    bias = torch.zeros(VOCAB, dtype=F64)
    bias[3] = -math.inf  # a token the student never says, which is merged into none
    objective = Objective(Dense(divergence.total_variation, smoothing=0.2))
    hidden = CASE.rows(CASE.student_logits)
    unembedding = replace(identity(VOCAB), bias=bias)
    out = linear_head(hidden, unembedding, CASE.batch(), objective)
    student = (hidden + bias).log_softmax(-1)
    smoothed = (0.8 * distribution().exp() + 0.2 / VOCAB).log()
    expected = divergence.total_variation(student, smoothed)
    assert torch.allclose(out.rows["loss/dense"], expected)


# --------------------------------------------------------------------------------------------
# Broken replies


@pytest.mark.parametrize("rows", [ROWS - 2, ROWS + 1])
def test_a_view_that_answered_for_other_rows_is_refused(rows: int) -> None:
    reply = TeacherScores(hidden=torch.zeros((rows, VOCAB), dtype=F64), unembedding=identity(VOCAB))
    with pytest.raises(TeacherError, match=f"'teacher' answered for {rows} rows, .* for {ROWS}"):
        answer(REVERSE_KL, reply)


def test_a_row_of_answers_that_is_not_there_is_refused() -> None:
    index = torch.arange(ROWS)
    index[0] = ROWS
    reply = TeacherScores(log_probs=distribution(), row_index=index)
    with pytest.raises(TeacherError, match=f"names row {ROWS}, and it has {ROWS} rows"):
        answer(REVERSE_KL, reply)


@pytest.mark.parametrize(("highest", "named"), [(-1, "no token"), (9, "token 9")])
def test_an_id_map_must_name_tokens_that_are_there(highest: int, named: str) -> None:
    id_map = torch.full((VOCAB,), -1)
    id_map[2] = highest
    reply = TeacherScores(
        hidden=torch.zeros((ROWS, 4), dtype=F64),
        unembedding=Unembedding(torch.zeros((9, 4), dtype=F64), 9),
        id_map=id_map,
    )
    with pytest.raises(TeacherError, match=f"names {named}, and it has 9 tokens"):
        answer(REVERSE_KL, reply)

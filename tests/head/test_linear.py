from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from opd.errors import ConfigError, TeacherError
from opd.formula import divergence, reward, support, weight
from opd.head import linear_head, log_probs_of
from opd.head.distribution import merge, merged_tokens
from opd.objective import Dense, Objective, Sampled
from opd.rollout.pack import with_token
from opd.types import Batch, Bound, FieldKey, TeacherScores, Unembedding
from tests.builders import DATA, STUDENT, Case, evaluate, fields_of, identity

F64 = torch.float64
REVERSE_KL = Objective(Dense(divergence=divergence.reverse_kl))
LOG_RATIO = Objective(Sampled(reward=reward.teacher_log_ratio))
STUDENT_LOGP, TEACHER_LOGP = FieldKey("student_logp"), FieldKey("teacher_logp", "teacher")


@pytest.fixture
def case() -> Case:
    return Case.random(11)


# --------------------------------------------------------------------------------------------
# Log-probabilities and merging


def test_log_probs_are_normalised_and_the_temperature_divides_the_logits() -> None:
    hidden = torch.randn(3, 5, dtype=F64)
    log_probs = log_probs_of(hidden, identity(5), temperature=2.0)
    assert torch.equal(log_probs, (hidden / 2).log_softmax(-1))


def test_padding_rows_of_the_unembedding_carry_no_mass(case: Case) -> None:
    padded = torch.cat([torch.eye(7, dtype=F64), torch.full((4, 7), math.nan, dtype=F64)])
    hidden = case.rows(case.student_logits).requires_grad_()
    out = linear_head(hidden, Unembedding(padded, 7), case.batch(), REVERSE_KL)
    assert out.loss is not None
    out.loss.backward()
    plain = evaluate(case, REVERSE_KL)
    assert float(out.loss.detach()) == plain.loss
    assert torch.equal(hidden.grad, plain.gradient)


def test_merge_sums_the_mass_of_a_group_into_its_first_id() -> None:
    log_probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=F64).log()
    merged = merge(log_probs, ((2, 0), (3,)))
    assert merged.exp().tolist()[0] == pytest.approx([0.0, 0.2, 0.4, 0.4], abs=1e-15)
    assert merged_tokens(torch.tensor([0, 1, 2, 3]), ((2, 0),)).tolist() == [2, 1, 2, 3]


def _with_merged_logits(case: Case) -> Case:
    """Entry 6 dropped, its mass in entry 2: what merging 2 and 6 must amount to."""

    def merged(logits: Tensor) -> Tensor:
        together = torch.logaddexp(logits[..., 2], logits[..., 6])
        return torch.cat([logits[..., :2], together.unsqueeze(-1), logits[..., 3:6]], -1)

    return replace(
        case,
        tokens=torch.where(case.tokens == 6, 2, case.tokens),
        student_logits=merged(case.student_logits),
        teacher_logits={view: merged(logits) for view, logits in case.teacher_logits.items()},
    )


@pytest.mark.parametrize("reply", ["hidden", "log_probs"])
@pytest.mark.parametrize(
    "objective",
    [
        REVERSE_KL,
        LOG_RATIO,
        Objective(Dense(divergence=partial(divergence.generalized_jsd, teacher_weight=0.4))),
        Objective(
            Dense(
                divergence=divergence.reverse_kl,
                support=partial(support.teacher_top_k, k=3),
                tail="bucket",
            )
        ),
        Objective(Dense(divergence=divergence.forward_kl, support=support.sampled, tail="bucket")),
    ],
    ids=["reverse_kl", "log_ratio", "jsd", "top_k", "sampled"],
)
def test_several_end_tokens_count_as_one_action_on_both_sides(
    case: Case, objective: Objective, reply: str
) -> None:
    batch = case.batch(merge_ids=((2, 6),))
    if reply == "log_probs":
        log_probs = case.rows(case.teacher_logits["teacher"]).log_softmax(-1)
        batch = with_token(batch, views={"teacher": TeacherScores(log_probs=log_probs)})
    one_action = evaluate(case, objective, batch)
    smaller = evaluate(_with_merged_logits(case), objective)
    assert one_action.loss == pytest.approx(smaller.loss, abs=1e-12)
    shares = case.rows(case.student_logits)[:, [2, 6]].softmax(-1)
    expected = torch.cat([smaller.gradient, torch.zeros(len(shares), 1, dtype=F64)], -1)
    expected[:, 6] = expected[:, 2] * shares[:, 1]
    expected[:, 2] = expected[:, 2] * shares[:, 0]
    assert (one_action.gradient - expected).abs().max() <= 1e-12
    assert abs(one_action.loss - evaluate(case, objective).loss) > 1e-3


# --------------------------------------------------------------------------------------------
# What a view may reply


def test_hidden_states_and_log_probs_are_the_same_reply(case: Case) -> None:
    batch = case.batch()
    log_probs = case.rows(case.teacher_logits["teacher"]).log_softmax(-1)
    other = with_token(batch, views={"teacher": TeacherScores(log_probs=log_probs)})
    for objective in (REVERSE_KL, LOG_RATIO):
        one, two = evaluate(case, objective, batch), evaluate(case, objective, other)
        assert one.loss == two.loss
        assert torch.equal(one.gradient, two.gradient)


def test_the_sampled_token_alone_is_enough_for_the_log_ratio(case: Case) -> None:
    batch = case.batch()
    (logp,) = fields_of(case, TEACHER_LOGP, batch=batch)
    plain = with_token(batch, views={"teacher": TeacherScores(sampled_logp=logp)})
    one, two = evaluate(case, LOG_RATIO, batch), evaluate(case, LOG_RATIO, plain)
    assert one.loss == two.loss
    assert torch.equal(one.gradient, two.gradient)


def test_a_view_without_a_distribution_is_refused_by_name(case: Case) -> None:
    sampled = torch.zeros(int(case.mask.sum()), dtype=F64)
    batch = with_token(case.batch(), views={"teacher": TeacherScores(sampled_logp=sampled)})
    with pytest.raises(TeacherError, match="view 'teacher' returned no distribution"):
        evaluate(case, REVERSE_KL, batch)


def test_a_view_that_was_never_scored_is_refused_by_name(case: Case) -> None:
    objective = Objective(Dense(divergence=divergence.reverse_kl, against="reference"))
    with pytest.raises(TeacherError, match="no scores for the view 'reference'; scored: teacher"):
        evaluate(case, objective)


def test_each_term_compares_with_its_own_view() -> None:
    case = Case.random(3, views=("teacher", "reference"))
    swapped = replace(
        case,
        teacher_logits={
            "teacher": case.teacher_logits["reference"],
            "reference": case.teacher_logits["teacher"],
        },
    )
    against_reference = Objective(Dense(divergence=divergence.reverse_kl, against="reference"))
    assert evaluate(case, against_reference).loss == evaluate(swapped, REVERSE_KL).loss
    both = Objective(*REVERSE_KL.terms, replace(against_reference.terms[0], coef=0.5))
    total = evaluate(case, REVERSE_KL).loss + 0.5 * evaluate(case, against_reference).loss
    assert evaluate(case, both).loss == pytest.approx(total, abs=1e-14)


# --------------------------------------------------------------------------------------------
# Supports


def _top_k(k: int) -> Objective:
    return Objective(
        Dense(
            divergence=divergence.reverse_kl,
            support=partial(support.student_top_k, k=k),
            tail="renormalise",
        )
    )


def test_a_support_chosen_at_rollout_time_is_kept(case: Case) -> None:
    rows = case.rows(case.student_logits)
    least = rows.topk(3, dim=-1, largest=False).indices
    now = evaluate(case, _top_k(3))
    kept = evaluate(case, _top_k(3), case.batch(student_top_ids=least))
    assert kept.gradient.gather(1, least).abs().min() > 1e-6
    assert now.gradient.gather(1, least).abs().max() < 1e-16


def test_a_longer_list_of_top_ids_is_cut_to_the_support(case: Case) -> None:
    ids = case.rows(case.student_logits).topk(5, dim=-1).indices
    cut = evaluate(case, _top_k(2), case.batch(student_top_ids=ids))
    assert torch.equal(cut.gradient, evaluate(case, _top_k(2)).gradient)


@pytest.mark.parametrize("choose", [support.student_top_k, support.teacher_top_k])
def test_a_support_larger_than_the_vocabulary_is_refused(case: Case, choose: object) -> None:
    assert callable(choose)
    term = Dense(divergence=divergence.reverse_kl, support=partial(choose, k=8), tail="renormalise")
    with pytest.raises(ConfigError, match="k = 8 tokens does not fit a vocabulary of 7; lower k"):
        evaluate(case, Objective(term))


def test_the_whole_vocabulary_as_top_k_is_the_full_divergence(case: Case) -> None:
    full, top = evaluate(case, REVERSE_KL), evaluate(case, _top_k(7))
    assert top.loss == pytest.approx(full.loss, abs=1e-13)
    assert (top.gradient - full.gradient).abs().max() <= 1e-13


# --------------------------------------------------------------------------------------------
# Fields, rows and metrics


def test_without_an_objective_fields_come_back_detached_and_nothing_else(case: Case) -> None:
    hidden = case.rows(case.student_logits).requires_grad_()
    keys = frozenset({STUDENT_LOGP, TEACHER_LOGP, FieldKey("reverse_kl", "teacher")})
    out = linear_head(hidden, identity(7), case.batch(), wanted=keys, chunk_bytes=1)
    assert out.loss is None
    assert out.rows == {}
    assert out.stats == {}
    assert out.fields.keys() == keys
    assert not any(value.requires_grad for value in out.fields.values())
    tokens = case.rows(case.tokens).unsqueeze(1)
    logp = hidden.detach().log_softmax(-1).gather(1, tokens).squeeze(1)
    assert torch.allclose(out.fields[STUDENT_LOGP], logp, rtol=0, atol=1e-15)


def test_wanted_top_ids_are_those_of_now(case: Case) -> None:
    stale = torch.zeros(int(case.mask.sum()), 3, dtype=torch.long)
    key = FieldKey("student_top_ids", "", Bound.of(partial(support.student_top_k, k=3)))
    (ids,) = fields_of(case, key, batch=case.batch(student_top_ids=stale))
    assert torch.equal(ids, case.rows(case.student_logits).topk(3, dim=-1).indices)


def test_metrics_are_sums_and_counts_of_the_rows_they_speak_of() -> None:
    case = Case.random(4, writers=(STUDENT, DATA))
    objective = Objective(Dense(divergence=divergence.reverse_kl, rows="data", coef=2.0))
    out = evaluate(case, objective).head
    by_student = case.rows(case.provenance) == STUDENT
    assert 0 < by_student.sum() < by_student.numel()
    student = case.rows(case.student_logits).log_softmax(-1)
    teacher = case.rows(case.teacher_logits["teacher"]).log_softmax(-1)
    kl = (student.exp() * (student - teacher)).sum(-1)
    ratio = (teacher - student).gather(1, case.rows(case.tokens).unsqueeze(1)).squeeze(1)
    entropy = -(student.exp() * student).sum(-1)
    for name, values, rows in (
        ("loss/dense", 2 * kl, ~by_student),
        ("teacher/log_ratio", ratio, by_student),
        ("student/entropy", entropy, by_student),
    ):
        assert out.stats[name].count == rows.sum()
        assert out.stats[name].total == pytest.approx(float(values[rows].sum()), abs=1e-12)
    assert torch.allclose(out.rows["log_ratio"], ratio)
    assert torch.allclose(out.rows["student_entropy"], entropy)
    assert torch.allclose(out.rows["loss/dense"], 2 * kl)


def test_the_temperature_of_the_objective_divides_both_sides(case: Case) -> None:
    cooled = replace(
        case,
        student_logits=case.student_logits / 0.7,
        teacher_logits={"teacher": case.teacher_logits["teacher"] / 0.7},
    )
    warm = evaluate(case, Objective(*REVERSE_KL.terms, temperature=0.7))
    expected = evaluate(cooled, REVERSE_KL)
    assert warm.loss == pytest.approx(expected.loss, abs=1e-14)
    assert (warm.gradient - expected.gradient / 0.7).abs().max() <= 1e-14


def test_half_precision_hidden_states_are_compared_in_float32(case: Case) -> None:
    hidden = case.rows(case.student_logits).to(torch.bfloat16).requires_grad_()
    out = linear_head(hidden, identity(7, torch.bfloat16), case.batch(), REVERSE_KL)
    assert out.loss is not None
    assert out.loss.dtype == torch.float64  # the teacher of this case is float64
    out.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    rounded = replace(case, student_logits=case.student_logits.to(torch.bfloat16).double())
    assert float(out.loss.detach()) == pytest.approx(evaluate(rounded, REVERSE_KL).loss, abs=1e-5)


# --------------------------------------------------------------------------------------------
# Rows that do not count


def _teacher_without(case: Case, sequence: int) -> Batch:
    """The teacher gives token 0 no mass in one sequence, so its reverse KL is infinite."""
    logits = case.teacher_logits["teacher"].clone()
    logits[sequence, :, 0] = -math.inf
    reply = TeacherScores(log_probs=case.rows(logits).log_softmax(-1))
    return with_token(case.batch(), views={"teacher": reply})


def test_an_infinite_row_of_another_writer_spoils_neither_loss_nor_gradient() -> None:
    case = Case.random(4, writers=(STUDENT, DATA, STUDENT))
    objective = Objective(Dense(divergence=divergence.reverse_kl, rows="data"))
    clean = evaluate(case, objective)
    spoiled = evaluate(case, objective, _teacher_without(case, 2))
    assert spoiled.head.rows["loss/dense"].isinf().any()
    assert spoiled.loss == clean.loss
    assert torch.equal(spoiled.gradient, clean.gradient)


def test_a_closed_gate_keeps_an_infinite_row_out_of_loss_and_gradient(case: Case) -> None:
    term = Dense(divergence=divergence.reverse_kl, weights=(weight.skip_special,))
    closed = torch.zeros_like(case.mask)
    closed[2] = True
    clean = evaluate(case, Objective(term), case.batch(special=closed))
    spoiled = with_token(_teacher_without(case, 2), special=closed)
    result = evaluate(case, Objective(term), spoiled)
    assert result.loss == clean.loss
    assert torch.equal(result.gradient, clean.gradient)


def test_an_infinite_row_that_counts_makes_the_loss_infinite(case: Case) -> None:
    assert evaluate(case, REVERSE_KL, _teacher_without(case, 2)).loss == math.inf

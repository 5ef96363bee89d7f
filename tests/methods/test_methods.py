"""Methods through the real head, against literal transcriptions and exact expectations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd import catalog, methods
from opd.formula import credit, divergence, reward, support, surrogate, weight
from opd.objective import Dense, Method, Objective, Sampled
from opd.schedule import Linear
from opd.types import Provenance
from tests.builders import (
    DATA,
    STUDENT,
    TEACHER,
    TOOL,
    Case,
    evaluate,
    evaluate_in_parts,
    full_gradient,
    with_reduction,
)
from tests.methods.expectations import TREES, expected_gradient
from tests.reference import objectives as ref
from tests.reference.enumeration import (
    Tree,
    exact_local_gradient,
    exact_sequence_reverse_kl_gradient,
)

REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")
SPECIAL_IDS = (0, 3)


@dataclass(frozen=True)
class Subject:
    """A method, who writes its text, and its transcription."""

    method: Method
    writers: tuple[int, ...]
    transcription: Callable[..., ref.LossAndGradient]
    needs_teacher: bool = True
    special_ids: tuple[int, ...] = ()

    def expected(self, case: Case, reduction: str) -> ref.LossAndGradient:
        student, teacher, *rest = case.reference_inputs()
        logits = (student, teacher) if self.needs_teacher else (student,)
        return self.transcription(*logits, *rest, reduction=getattr(ref, reduction))


def _sft(
    student_logits: Any, tokens: Any, mask: Any, provenance: Any, **knobs: Any
) -> ref.LossAndGradient:
    ones = np.ones(tokens.shape)
    return ref.score_loss(
        student_logits, tokens, mask, provenance, ones, kinds=(Provenance.DATA,), **knobs
    )


SUBJECTS = {
    "reverse_kl_opd": Subject(methods.reverse_kl_opd(), (STUDENT,), ref.reverse_kl_opd),
    "gkd": Subject(methods.gkd(), (STUDENT,), partial(ref.gkd, teacher_weight=0.5)),
    "gkd mixed": Subject(
        methods.gkd(teacher_weight=0.1, student_share=0.5),
        (STUDENT, DATA),
        partial(ref.gkd, teacher_weight=0.1),
    ),
    "top_k_opd": Subject(
        methods.top_k_opd(k=3),
        (STUDENT,),
        partial(ref.top_k_opd, k=3, special_ids=SPECIAL_IDS),
        special_ids=SPECIAL_IDS,
    ),
    "sampled_token_opd": Subject(methods.sampled_token_opd(), (STUDENT,), ref.sampled_token_opd),
    "vopd": Subject(methods.vopd(), (STUDENT,), ref.vopd),
    "offpolicy_kd": Subject(methods.offpolicy_kd(), (TEACHER,), ref.offpolicy_kd),
    "sft_on_teacher": Subject(
        methods.sft_on_teacher(), (TEACHER,), ref.sft_on_teacher, needs_teacher=False
    ),
    "sft": Subject(methods.sft(), (DATA,), _sft, needs_teacher=False),
}
each_subject = pytest.mark.parametrize("name", list(SUBJECTS))
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@each_subject
@each_reduction
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_equal_the_transcription(name: str, reduction: str, seed: int) -> None:
    subject = SUBJECTS[name]
    case = Case.random(seed, writers=subject.writers)
    assert (case.provenance == TOOL).any(), "a tool spoke in between"
    assert not case.mask.any(1).all(), "a response is empty"
    batch = case.batch(special_ids=subject.special_ids)
    ours = evaluate(case, with_reduction(subject.method, reduction), batch)
    expected = subject.expected(case, reduction)
    assert ours.loss == pytest.approx(expected.loss, abs=1e-10)
    assert abs(expected.loss) > 1e-3
    assert np.abs(full_gradient(case, ours.gradient) - expected.gradient).max() <= 1e-10


@each_subject
@each_reduction
def test_a_batch_without_any_token_to_look_at_has_loss_and_gradient_zero(
    name: str, reduction: str
) -> None:
    subject = SUBJECTS[name]
    case = Case.random(0, writers=subject.writers)
    blind = replace(case, mask=torch.zeros_like(case.mask))
    ours = evaluate(blind, with_reduction(subject.method, reduction))
    assert ours.loss == 0
    assert ours.gradient.shape == (0, case.vocab_size)


@each_subject
def test_a_student_equal_to_its_teacher_gets_what_the_docstring_says(name: str) -> None:
    subject = SUBJECTS[name]
    case = Case.random(5, writers=subject.writers)
    same = replace(case, teacher_logits={"teacher": case.student_logits})
    ours = evaluate(same, subject.method.objective)
    stationary = catalog.methods()[subject.method.name].section("Stationary")
    if stationary == "teacher":
        assert abs(ours.loss) <= 1e-15
        assert ours.gradient.abs().max() <= 1e-15
    else:
        assert stationary in ("data", "teacher, in expectation")
        rows = case.rows(case.student_logits.log_softmax(-1))
        logp = rows.gather(1, case.rows(case.tokens).unsqueeze(1))
        assert ours.loss == pytest.approx(float(-logp.mean()), abs=1e-12)
        assert ours.gradient.abs().max() > 1e-3


def test_every_method_says_what_it_is() -> None:
    for name in methods.__all__:
        entry = catalog.methods()[name]
        assert entry.equation, name
        assert entry.section("Evidence") in ("E0", "E1", "E2", "E3", "M"), name
        assert entry.section("Formula") in ("code", "paper", "note", "inferred"), name
        assert entry.section("Stationary"), name
        assert entry.section("Source"), name
        assert getattr(methods, name)().name == name
        assert inspect.signature(getattr(methods, name)).return_annotation in (Method, "Method")


def test_no_two_methods_are_the_same_composition() -> None:
    made = [getattr(methods, name)() for name in methods.__all__]
    assert len({method.composition_hash for method in made}) == len(made)
    assert len(set(made)) == len(made)
    supervised, on_teacher = methods.sft(), methods.sft_on_teacher()
    assert supervised.objective == on_teacher.objective
    assert supervised.states != on_teacher.states


def test_knobs_reach_the_composition() -> None:
    assert methods.gkd(teacher_weight=0.2) != methods.gkd(teacher_weight=0.3)
    assert methods.top_k_opd(k=4).objective.support_size("teacher_top_ids") == 4
    assert methods.gkd(student_share=0.25).states.data == 0.75


# --------------------------------------------------------------------------------------------
# Exact expectations


each_tree = pytest.mark.parametrize("tree", list(TREES.values()), ids=list(TREES))

LOCAL = [methods.sampled_token_opd, methods.vopd, methods.reverse_kl_opd]
LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)
RETURNS = replace(LOG_RATIO, credit=credit.return_to_go)


@each_tree
@pytest.mark.parametrize("make", LOCAL, ids=[make.__name__ for make in LOCAL])
def test_immediate_estimators_are_unbiased_for_the_local_gradient(
    tree: Tree, make: Callable[[], Method]
) -> None:
    mean = expected_gradient(tree, *make().objective.terms)
    assert np.abs(mean - exact_local_gradient(tree)).max() <= 1e-8
    assert np.abs(mean - exact_sequence_reverse_kl_gradient(tree)).max() > 1e-3


@each_tree
@pytest.mark.parametrize("baseline", [None, credit.expected_reward])
def test_return_to_go_is_unbiased_for_the_sequence_gradient(
    tree: Tree, baseline: Callable[..., Any] | None
) -> None:
    mean = expected_gradient(tree, replace(RETURNS, baseline=baseline))
    assert np.abs(mean - exact_sequence_reverse_kl_gradient(tree)).max() <= 1e-8
    assert np.abs(mean - exact_local_gradient(tree)).max() > 1e-3


@each_tree
@pytest.mark.parametrize(("gamma", "same_as"), [(0.0, LOG_RATIO), (1.0, RETURNS)])
def test_the_end_points_of_a_discount_are_the_other_credits_bit_for_bit(
    tree: Tree, gamma: float, same_as: Sampled
) -> None:
    discounted = partial(credit.discounted, gamma=gamma, meaning="task")
    mean = expected_gradient(tree, replace(LOG_RATIO, credit=discounted))
    assert np.array_equal(mean, expected_gradient(tree, same_as))


# --------------------------------------------------------------------------------------------
# Splitting changes nothing


REVERSE_KL = Dense(divergence=divergence.reverse_kl)
OBJECTIVES = {
    "dense": Objective(REVERSE_KL),
    "dense, top k, gated": Objective(
        Dense(
            divergence=partial(divergence.generalized_jsd, teacher_weight=0.3),
            support=partial(support.teacher_top_k, k=3),
            tail="bucket",
            weights=(weight.skip_special,),
            reduction="sequence_mean",
        )
    ),
    "sampled": methods.vopd().objective,
    "coupled": Objective(
        replace(RETURNS, baseline=credit.expected_reward, reduction="sequence_mean")
    ),
    "coupled, clipped": Objective(
        Sampled(
            reward=reward.teacher_log_ratio,
            credit=partial(credit.discounted, gamma=0.7, meaning="teacher_reliability"),
            surrogate=partial(surrogate.clipped, low=0.2, high=0.3),
            coef=0.5,
        )
    ),
    "mixed rows": Objective(
        replace(RETURNS, rows="student", reduction="sequence_sum", name="returns"),
        Dense(divergence=divergence.forward_kl, rows="data", reduction="sequence_mean"),
        Sampled(reward=reward.one, rows="teacher", coef=0.3),
        Dense(divergence=divergence.reverse_kl, against="reference", coef=0.01, name="pull"),
        temperature=1.3,
    ),
}
each_objective = pytest.mark.parametrize("name", list(OBJECTIVES))


def mixed_case(seed: int, lengths: tuple[int, ...] = (4, 0, 6, 1, 5, 3)) -> Case:
    return Case.random(
        seed,
        lengths=lengths,
        writers=(STUDENT, DATA, TEACHER),
        views=("teacher", "reference"),
    )


def old_logp(case: Case) -> torch.Tensor:
    drift = torch.randn(case.tokens.shape, generator=torch.Generator().manual_seed(9)).double()
    logp = case.student_logits.log_softmax(-1).gather(-1, case.tokens.unsqueeze(-1)).squeeze(-1)
    return logp + 0.3 * drift


@each_objective
@settings(max_examples=15)
@given(
    seed=st.integers(0, 999),
    max_tokens=st.integers(1, 60),
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
)
def test_any_split_into_micro_batches_gives_the_same_gradient(
    name: str, seed: int, max_tokens: int, lengths: list[int]
) -> None:
    case, objective = mixed_case(seed, tuple(lengths)), OBJECTIVES[name]
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        batch = case.batch(dtype=dtype, special_ids=SPECIAL_IDS, old_logp=old_logp(case).to(dtype))
        whole = evaluate(case, objective, batch, dtype=dtype)
        loss, gradient = evaluate_in_parts(case, objective, max_tokens, batch, dtype=dtype)
        assert loss == pytest.approx(whole.loss, abs=bound, rel=bound)
        if gradient.numel():
            assert (gradient - whole.gradient).abs().max() <= bound


@each_objective
@pytest.mark.parametrize("rows_per_chunk", [1, 3])
def test_a_head_in_chunks_says_the_same_as_one_in_one_piece(name: str, rows_per_chunk: int) -> None:
    case, objective = mixed_case(2), OBJECTIVES[name]
    batch = case.batch(special_ids=SPECIAL_IDS, old_logp=old_logp(case))
    whole = evaluate(case, objective, batch)
    parts = evaluate(case, objective, batch, chunk_bytes=4 * case.vocab_size * rows_per_chunk)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-12)
    assert (parts.gradient - whole.gradient).abs().max() <= 1e-12
    assert parts.head.stats.keys() == whole.head.stats.keys()
    for stat, expected in whole.head.stats.items():
        assert parts.head.stats[stat].count == expected.count
        assert parts.head.stats[stat].total == pytest.approx(expected.total, abs=1e-12)
    for row, values in whole.head.rows.items():
        assert torch.allclose(parts.head.rows[row], values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (methods.relay_opd, {"k": 0}, "k must be at least 1, got 0"),
        (methods.speculative_kd, {"k": 0}, "k must be at least 1, got 0"),
        (methods.growing_prefix_opd, {"horizon": 0}, "horizon must be at least 1, got 0"),
        (methods.veto, {"share": 1.0}, "share must be in .0, 0.999., for at 1 the teacher drops"),
        (methods.veto, {"share": Linear(1.5, 0.0, 9)}, "share must be in .* got Linear"),
        (methods.sr_opsd, {"share": 2.0}, "share must be in .0, 1., got 2"),
        (methods.compass_opd, {"penalty": 0.0}, "penalty must be at least 0.001, got 0"),
        (methods.purified_opsd, {"temperature": 0.0}, "temperature must be at least 0.001, got 0"),
        (methods.ts_opsd, {"temperature": -1.0}, "temperature must be positive, got -1"),
        (methods.uni_opd, {"margin": -1.0}, "margin must be at least 0, got -1"),
        (methods.distillm_2, {"student_coef": 2.5}, "student_coef must be in .0, 2., got 2.5"),
        (methods.confident_wrong_opd, {"above": 1.5}, "above must be in .0, 1., got 1.5"),
    ],
)
def test_an_option_that_would_turn_a_method_off_or_round_is_refused(
    make: Callable[..., Method], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)

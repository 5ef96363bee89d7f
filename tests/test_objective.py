from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd import methods
from opd.formula import credit, divergence, regulariser, reward, support, surrogate, weight
from opd.objective import (
    Dense,
    Method,
    Objective,
    Regulariser,
    Sampled,
    chosen_rows,
    describe,
    field_key,
    token_field,
)
from opd.schedule import Cosine, Linear
from opd.terms import term_key
from opd.types import Bound, FieldKey, Need, StateSource, TeacherView
from tests.builders import DATA, STUDENT, TEACHER, Case, evaluate, fields_of

REVERSE_KL = Dense(divergence=divergence.reverse_kl)
LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)
TOP_K = Dense(
    divergence=divergence.reverse_kl,
    support=partial(support.student_top_k, k=3),
    tail="bucket",
)


def share_of_response(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """A coupled weight: where in its response a token stands, from 1 / length to 1."""
    place = mask.cumsum(1)
    return place / place.max(1, keepdim=True).values.clamp(min=1)


def trust(extra_trust: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return extra_trust


def mean_reward(reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    kept = torch.where(mask, reward, 0.0)
    mean: Tensor = kept.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(reward)


def entropy_weight(student_entropy: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return student_entropy


def whole_knob(special: Bool[Tensor, "*n"], *, places: int) -> Float[Tensor, "*n"]:
    assert isinstance(places, int)
    return torch.where(special, 0.0, float(places))


# --------------------------------------------------------------------------------------------
# Needs


def needs(*terms: Dense | Sampled) -> set[tuple[str, str, str, int]]:
    return {(n.view, n.field, n.support, n.k) for n in Objective(*terms).needs}


def test_needs_follow_from_the_formulas() -> None:
    assert needs(REVERSE_KL) == {
        ("student", "log_probs", "full", 0),
        ("teacher", "log_probs", "full", 0),
    }
    assert needs(LOG_RATIO) == {
        ("student", "logp", "sampled", 0),
        ("teacher", "logp", "sampled", 0),
    }
    assert needs(TOP_K) == {
        ("student", "log_probs", "student_top_k", 3),
        ("teacher", "log_probs", "student_top_k", 3),
        ("student", "top_ids", "own_top", 3),
    }
    assert needs(Sampled(reward=reward.one)) == {("student", "logp", "sampled", 0)}


def test_a_field_that_a_formula_computes_needs_what_that_formula_reads() -> None:
    assert needs(replace(LOG_RATIO, baseline=credit.expected_reward)) >= {
        ("student", "log_probs", "full", 0),
        ("teacher", "log_probs", "full", 0),
    }


def test_needs_name_the_view_of_their_term() -> None:
    objective = Objective(REVERSE_KL, replace(LOG_RATIO, against="reference"))
    assert objective.views() == {"teacher", "reference"}
    assert Need("reference", "logp", "sampled") in objective.needs
    assert Objective(Sampled(reward=reward.one)).views() == frozenset()


def test_needs_cover_every_value_a_schedule_can_reach() -> None:
    growing = replace(TOP_K, support=partial(support.student_top_k, k=Linear(2, 16, 10)))
    objective = Objective(growing)
    assert objective.support_size("student_top_ids") == 16
    assert {need.k for need in objective.needs if need.field == "log_probs"} == {16}
    for step in range(12):
        settled, _ = objective.at(step, {}, None)
        assert settled.support_size("student_top_ids") <= 16


# --------------------------------------------------------------------------------------------
# Schedules


def test_at_settles_every_schedule_and_changes_nothing_else() -> None:
    method = Method(
        Objective(
            replace(REVERSE_KL, coef=Linear(0.0, 1.0, 4)),
            replace(
                LOG_RATIO,
                credit=partial(
                    credit.discounted, gamma=Cosine(0.0, 1.0, 2), meaning="variance_heuristic"
                ),
                weights=(partial(whole_knob, places=Linear(1, 4, 2)),),
            ),
            temperature=0.9,
        )
    )
    before, digest = replace(method), method.composition_hash
    settled, state = method.at(1, {}, None)
    assert method == before
    assert method.composition_hash == digest
    assert (settled, state) == method.at(1, {}, None)
    dense, sampled = settled.objective.terms
    assert dense.coef == 0.25
    assert isinstance(sampled, Sampled)
    assert dict(Bound.of(sampled.credit).knobs)["gamma"] == pytest.approx(0.5)
    assert settled.objective.temperature == 0.9
    assert settled.states == method.states
    again, _ = settled.at(99, {}, state)
    assert again == settled


def test_the_ends_hold_every_schedule_at_its_lowest_and_at_its_highest() -> None:
    def made(skew: Any, coef: Any) -> Objective:
        loss = partial(divergence.skew_forward_kl, skew=skew)
        return Objective(Dense(loss, coef=coef, name="a"), Dense(divergence.reverse_kl, name="b"))

    low, high = made(Linear(0.4, 0.1, 9), Cosine(0.0, 2.0, 9)).at_ends()
    assert (low, high) == (made(0.1, 0.0), made(0.4, 2.0))
    assert made(0.3, 1.0).at_ends() == (made(0.3, 1.0), made(0.3, 1.0))


def test_a_whole_knob_stays_whole_under_a_schedule() -> None:
    case = Case.random(0)
    growing = replace(TOP_K, support=partial(support.student_top_k, k=Linear(2, 5, 2)))
    settled, _ = Objective(growing).at(1, {}, None)
    (term,) = settled.terms
    assert dict(Bound.of(term.support).knobs)["k"] == round(3.5)
    assert evaluate(case, settled).loss > 0


def test_an_unsettled_coefficient_is_refused_where_it_would_be_used() -> None:
    objective = Objective(replace(REVERSE_KL, coef=Linear(0.0, 1.0, 4)))
    with pytest.raises(TypeError, match=r"coef of 'dense' is a schedule; settle it"):
        evaluate(Case.random(0), objective)


# --------------------------------------------------------------------------------------------
# Identity


def test_a_composition_is_equal_and_hashed_however_it_was_written() -> None:
    one = Method(Objective(replace(LOG_RATIO, coef=1, name="a")), name="one")
    two = Method(
        Objective(Sampled(reward=partial(reward.teacher_log_ratio), coef=1.0, name="a")),
        name="two",
    )
    assert one == two
    assert hash(one) == hash(two)
    assert one.composition_hash == two.composition_hash


def test_equal_numbers_have_one_hash_and_unequal_ones_two() -> None:
    def digest(**changes: Any) -> str:
        return Method(Objective(replace(LOG_RATIO, **changes))).composition_hash

    def discounted(gamma: float) -> Callable[..., Any]:
        return partial(credit.discounted, gamma=gamma, meaning="task")

    assert digest(credit=discounted(1)) == digest(credit=discounted(1.0))
    assert digest(coef=2) == digest(coef=2.0)
    assert digest(coef=2) != digest(coef=2.5)
    assert digest(coef=Linear(0, 1, 5)) == digest(coef=Linear(0.0, 1.0, 5))
    assert digest(coef=Linear(0, 1, 5)) != digest(coef=Cosine(0, 1, 5))


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": "student"},
        {"reduction": "sequence_sum"},
        {"against": "reference"},
        {"coef": 0.5},
        {"weights": (weight.skip_special,)},
        {"divergence": divergence.forward_kl},
        {"support": support.sampled, "tail": "bucket"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_choice_is_part_of_the_hash(changes: dict[str, Any]) -> None:
    views = (TeacherView(), TeacherView("reference", "initial_student"))
    plain = Method(Objective(REVERSE_KL), views=views)
    other = Method(Objective(replace(REVERSE_KL, **changes)), views=views)
    assert plain.composition_hash != other.composition_hash
    assert plain != other
    with_states = replace(plain, states=StateSource(student=0.5, data=0.5))
    assert plain.composition_hash != with_states.composition_hash
    warm = replace(plain, objective=Objective(REVERSE_KL, temperature=2.0))
    assert plain.composition_hash != warm.composition_hash


@pytest.mark.parametrize(
    "changes",
    [
        {"student": 0.5, "replay": 0.5},
        {"horizon": 4},
        {"teacher_prefix": Linear(4, 0, 5)},
        {"mixture": 0.2},
        {"interleave": 4},
        {"rewrite": 0.5},
    ],
    ids=lambda changes: list(changes)[-1],
)
def test_how_text_is_written_is_part_of_the_hash_only_where_it_is_chosen(
    changes: dict[str, Any],
) -> None:
    plain = Method(Objective(REVERSE_KL))
    other = replace(plain, states=StateSource(**changes))
    assert plain.composition_hash != other.composition_hash
    assert not describe(plain.states).keys() & changes.keys() - {"student"}


def test_labels_and_names_are_no_part_of_the_hash() -> None:
    plain, named = methods.vopd(), methods.vopd()
    named = replace(named, objective=Objective(replace(named.objective.terms[0], name="x")))
    assert plain.composition_hash == replace(named, name="other").composition_hash


# --------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(REVERSE_KL, rows="studnet"), "rows must be one of"),
        (lambda: replace(REVERSE_KL, reduction="mean"), "reduction must be one of"),
        (lambda: replace(REVERSE_KL, against="refrence"), "against must be 'teacher', 'reference'"),
        (lambda: replace(REVERSE_KL, tail="bucket"), "a full support has no tail"),
        (lambda: replace(TOP_K, tail=""), "must say what becomes of the rest"),
        (lambda: replace(TOP_K, tail="drop"), "tail is one of bucket, renormalise"),
        (Objective, "at least one term"),
        (lambda: Objective(REVERSE_KL, temperature=0), "temperature must be > 0"),
        (
            lambda: Objective(replace(REVERSE_KL, name="a"), replace(LOG_RATIO, name="a")),
            "two terms are called 'a'",
        ),
        (
            lambda: Method(Objective(replace(REVERSE_KL, against="teacher.big"))),
            r"reads the view 'teacher\.big', which the method does not declare",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------------------------
# Rows and fields


def test_rows_are_chosen_by_who_wrote_them_and_only_under_the_mask() -> None:
    token = Case.random(1, writers=(STUDENT, DATA, TEACHER)).batch().token
    parts = [chosen_rows(token, rows) for rows in ("student", "data", "teacher")]
    assert all(part.any() for part in parts)
    assert torch.equal(torch.stack(parts).sum(0).bool(), token.mask)
    assert torch.stack(parts).sum(0).max() == 1
    assert torch.equal(chosen_rows(token, "all"), token.mask)


def test_terms_on_rows_of_different_writers_add_up() -> None:
    case = Case.random(1, writers=(STUDENT, DATA))
    own, data = (
        evaluate(case, Objective(replace(REVERSE_KL, rows=rows))) for rows in ("student", "data")
    )
    both = evaluate(
        case,
        Objective(
            replace(REVERSE_KL, rows="student", name="own"), replace(REVERSE_KL, rows="data")
        ),
    )
    assert both.loss == pytest.approx(own.loss + data.loss, abs=1e-14)
    assert (both.gradient - own.gradient - data.gradient).abs().max() <= 1e-15
    rows = case.rows(case.provenance)
    assert (own.gradient[rows != STUDENT] == 0).all()
    assert (data.gradient[rows != DATA] == 0).all()


def test_fields_that_no_view_or_support_can_change_share_one_key() -> None:
    top = Bound.of(TOP_K.support)
    assert field_key("tokens", "teacher", top, "bucket") == FieldKey("tokens")
    assert field_key("student_logp", "reference", top, "bucket") == FieldKey("student_logp")
    assert field_key("teacher_logp", "a", top) == FieldKey("teacher_logp", "a")
    assert field_key("reverse_kl", "a", Bound.of(support.full)) == FieldKey("reverse_kl", "a")
    assert field_key("reverse_kl", "a", top, "bucket") == FieldKey("reverse_kl", "a", top, "bucket")


def size_of_state(student_hidden: Float[Tensor, "*n H"]) -> Float[Tensor, "*n"]:
    return student_hidden.square().sum(-1)


@pytest.mark.parametrize("preserve_mass", [False, True], ids=["update", "signal"])
def test_a_formula_may_read_the_student_s_hidden_states_in_either_phase(
    preserve_mass: bool,
) -> None:
    case = Case.random(2)
    term = replace(REVERSE_KL, weights=(size_of_state,), preserve_mass=preserve_mass)
    assert Need("student", "student_hidden", "") in Objective(term).needs
    out = evaluate(case, Objective(term), chunk_bytes=7 * 4 * 3)
    size = case.rows(case.student_logits).square().sum(-1)
    weight = size / size.mean() if preserve_mass else size
    plain = evaluate(case, Objective(REVERSE_KL))
    expected = (weight * plain.head.rows["loss/dense"]).mean()
    assert out.loss == pytest.approx(float(expected), rel=1e-12)


def test_a_baseline_on_a_support_is_evaluated_there() -> None:
    case = Case.random(2)
    narrow = replace(
        LOG_RATIO,
        baseline=credit.expected_reward,
        support=partial(support.teacher_top_k, k=2),
        tail="renormalise",
    )
    key = term_key(narrow, "reverse_kl")
    local, whole = fields_of(case, key, FieldKey("reverse_kl", "teacher"))
    assert (local - whole).abs().max() > 1e-3
    logp = case.rows(case.student_logits.log_softmax(-1)).gather(
        1, case.rows(case.tokens).unsqueeze(1)
    )
    out = evaluate(case, Objective(narrow)).head.rows
    expected = -(out["log_ratio"] + local) * logp.squeeze(1)
    assert torch.allclose(out["loss/sampled"], expected, rtol=0, atol=1e-12)


def test_the_position_counts_from_the_first_response_token() -> None:
    token = Case.random(0).batch().token
    assert token_field(token, "position")[0].tolist() == list(range(token.tokens.shape[1]))


def test_a_field_the_batch_does_not_hold_is_named() -> None:
    with pytest.raises(KeyError, match="the batch holds no 'old_logp'"):
        token_field(Case.random(0).batch().token, "old_logp")


# --------------------------------------------------------------------------------------------
# Weights and signals


@pytest.mark.parametrize("shape", ["B", "B T"])
def test_a_weight_may_read_a_column_of_the_data(shape: str) -> None:
    case = Case.random(0)
    size = case.tokens.shape if shape == "B T" else case.tokens.shape[:1]
    column = torch.rand(size, generator=torch.Generator().manual_seed(1)).double()
    whole = column if shape == "B T" else column.unsqueeze(1).expand(case.tokens.shape)
    batch = case.batch(extra={"trust": column})
    plain = evaluate(case, Objective(REVERSE_KL), batch)
    weighted = evaluate(case, Objective(replace(REVERSE_KL, weights=(trust,))), batch)
    expected = plain.gradient * case.rows(whole).unsqueeze(1)
    assert (weighted.gradient - expected).abs().max() <= 1e-15


def test_weights_multiply_and_carry_no_gradient_of_their_own() -> None:
    case = Case.random(0)
    entropy = fields_of(case, FieldKey("student_entropy"))[0].unsqueeze(1)
    plain = evaluate(case, Objective(REVERSE_KL))
    squared = evaluate(
        case, Objective(replace(REVERSE_KL, weights=(entropy_weight, entropy_weight)))
    )
    assert (squared.gradient - plain.gradient * entropy**2).abs().max() <= 1e-15


def test_a_coupled_weight_is_settled_in_the_signal_phase() -> None:
    case = Case.random(0)
    objective = Objective(replace(REVERSE_KL, weights=(share_of_response,), name="kl"))
    assert objective.coupled
    assert objective.signal_keys() == frozenset()
    share = share_of_response(case.mask)
    settled = objective.signal(case.batch().token, {})
    assert settled.keys() == {"weight.kl.weights.0"}
    plain, weighted = evaluate(case, Objective(REVERSE_KL)), evaluate(case, objective)
    expected = plain.gradient * case.rows(share).unsqueeze(1)
    assert (weighted.gradient - expected).abs().max() <= 1e-7  # the weight is float32


def test_a_baseline_may_read_the_rewards_of_the_response() -> None:
    case = Case.random(0)
    term = replace(LOG_RATIO, baseline=mean_reward)
    assert term.advantage_is_coupled
    plain = evaluate(case, Objective(LOG_RATIO)).head.rows["log_ratio"]
    ratio = torch.zeros(case.tokens.shape, dtype=torch.float64).masked_scatter(case.mask, plain)
    advantage = case.rows(ratio - mean_reward(ratio, case.mask))
    logp = fields_of(case, FieldKey("student_logp"))[0]
    out = evaluate(case, Objective(term)).head.rows["loss/sampled"]
    assert torch.allclose(out, -advantage * logp, rtol=0, atol=1e-12)


def test_only_coupled_slots_ask_for_a_signal() -> None:
    coupled = replace(LOG_RATIO, credit=credit.return_to_go)
    both = Objective(REVERSE_KL, coupled)
    assert both.signal_keys() == {FieldKey("student_logp"), FieldKey("teacher_logp", "teacher")}
    assert not Objective(REVERSE_KL, LOG_RATIO).coupled
    assert Objective(REVERSE_KL, LOG_RATIO).signal_keys() == frozenset()


def test_two_coupled_terms_keep_their_signals_apart() -> None:
    case = Case.random(0, views=("teacher", "reference"))
    returns = replace(LOG_RATIO, credit=credit.return_to_go)
    terms = (returns, replace(returns, against="reference", coef=-0.5))
    apart = [evaluate(case, Objective(term)) for term in terms]
    together = evaluate(case, Objective(*terms))
    assert together.loss == pytest.approx(sum(one.loss for one in apart), abs=1e-12)
    total = torch.stack([one.gradient for one in apart]).sum(0)
    assert (together.gradient - total).abs().max() <= 1e-14


def test_signals_are_detached() -> None:
    case = Case.random(0)
    term = replace(LOG_RATIO, credit=credit.return_to_go)
    live = {
        key: torch.zeros(int(case.mask.sum()), requires_grad=True)
        for key in Objective(term).signal_keys()
    }
    settled = Objective(term).signal(case.batch().token, live)
    assert not any(value.requires_grad for value in settled.values())


def test_a_clipped_surrogate_reads_the_weights_of_the_rollout() -> None:
    case = Case.random(0)
    clipped = replace(LOG_RATIO, surrogate=partial(surrogate.clipped, low=0.2, high=0.3))
    logp = torch.zeros(case.tokens.shape, dtype=torch.float64).masked_scatter(
        case.mask, fields_of(case, FieldKey("student_logp"))[0]
    )
    fresh = evaluate(case, Objective(clipped), case.batch(old_logp=logp))
    plain = evaluate(case, Objective(LOG_RATIO))
    assert (fresh.gradient - plain.gradient).abs().max() <= 1e-15
    stale = evaluate(case, Objective(clipped), case.batch(old_logp=logp - 1.0))
    advantage = plain.head.rows["log_ratio"]
    assert (stale.gradient[advantage > 0] == 0).all()
    assert (stale.gradient[advantage < 0] != 0).any()


# --------------------------------------------------------------------------------------------
# Views that are scores of tokens, and what weights see


GAINED = TeacherView(
    "teacher.gained", "combination", parts=(("teacher", 1.0), ("student", -1.0)), normalised=False
)


def test_a_score_of_tokens_is_refused_where_a_distribution_is_asked() -> None:
    views = (TeacherView(), GAINED)
    scored = Sampled(reward=reward.teacher_log_ratio, against="teacher.gained")
    Method(Objective(scored), views=views)
    for term, asked in (
        (Dense(divergence.reverse_kl, against="teacher.gained"), "teacher_log_probs"),
        (replace(scored, baseline=credit.expected_reward), "reverse_kl"),
        (replace(scored, weights=(partial(weight.teacher_entropy_above, nats=1.0),)), "entropy"),
    ):
        with pytest.raises(ValueError, match=rf"{asked}.*'teacher.gained', which is not norm"):
            Method(Objective(term), views=views)
    with pytest.raises(ValueError, match=r"smooths the view .teacher\.gained."):
        Method(Objective(replace(scored, smoothing=0.1)), views=views)


def test_a_weight_sees_whole_entropies_and_a_penalty_those_of_its_support() -> None:
    gate = partial(weight.teacher_entropy_above, nats=1.0)
    few = {"support": partial(support.teacher_top_k, k=3), "tail": "bucket"}
    gated = Objective(Dense(divergence.forward_kl, weights=(gate,), **few))
    assert Need("teacher", "teacher_entropy", "full") in gated.needs
    penalised = Objective(Regulariser(regulariser.entropy_bonus, **few))
    assert Need("student", "student_entropy", "teacher_top_k", 3) in penalised.needs
    case = Case.random(0)
    entropy = -(lambda p: (p.exp() * p).sum(-1))(
        case.rows(case.teacher_logits["teacher"]).log_softmax(-1)
    )
    notes = evaluate(case, gated).head.stats["weight/dense/teacher_entropy_above"]
    assert notes.total == float((entropy > 1.0).sum())

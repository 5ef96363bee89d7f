"""Routes, regularisers, outcomes and kept mass, each against a loop over rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.errors import ConfigError
from opd.formula import (
    credit,
    divergence,
    regulariser,
    reward,
    routing,
    support,
    surrogate,
    weight,
)
from opd.objective import Dense, Objective, Regulariser, Routed, Sampled
from opd.schedule import Linear
from opd.terms import Term
from opd.types import Bound, FieldKey, TeacherScores
from tests.builders import DATA, STUDENT, Case, evaluate, evaluate_in_parts, fields_of

LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)
REVERSE_KL = Dense(divergence=divergence.reverse_kl)
TOP = {"teacher_k": 3, "student_k": 3}
ROUTE = Routed(
    source=LOG_RATIO,
    support=partial(support.routing_support, **TOP),
    tail="renormalise",
    candidates=partial(routing.endorsed_and_reachable, **TOP),
    gates=(weight.negative_advantage, routing.overrated, routing.has_candidates),
)
CASE = Case.random(3, vocab_size=9, gaps=True)


def closed(special: Bool[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return torch.zeros(special.shape, dtype=torch.float64)


def halved(reward: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return 0.5 * reward


def squared(credited: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return credited.square()


def share_of_response(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    place = mask.double().cumsum(1)
    return place / place.max(1, keepdim=True).values.clamp(min=1)


def by_ratio(advantage: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return advantage.abs() + 0.5


def rows_of(objective: Objective, case: Case = CASE) -> dict[str, Tensor]:
    """Per-row losses of an objective."""
    out = evaluate(case, objective)
    return {name.removeprefix("loss/"): value for name, value in out.head.rows.items()}


# --------------------------------------------------------------------------------------------
# Routed


def route_by_hand(case: Case, n: int) -> tuple[float, float, float]:
    """Gate, source loss and Eq. 36 of row n, by sets and loops."""
    student = case.rows(case.student_logits)[n].log_softmax(-1)
    teacher = case.rows(case.teacher_logits["teacher"])[n].log_softmax(-1)
    token = int(case.rows(case.tokens)[n])
    top_teacher = set(teacher.argsort(descending=True)[:3].tolist())
    top_student = set(student.argsort(descending=True)[:3].tolist())
    omega = sorted(top_teacher | top_student | {token})
    log_s = {v: float(student[v] - student[omega].logsumexp(0)) for v in omega}
    log_t = {v: float(teacher[v] - teacher[omega].logsumexp(0)) for v in omega}
    divergence_there = sum(math.exp(log_s[v]) * (log_s[v] - log_t[v]) for v in omega)
    eta = {v: log_t[v] - log_s[v] + divergence_there for v in omega}
    chosen = [v for v in sorted(top_teacher & top_student) if eta[v] > 1e-6 and v != token]
    advantage = float(teacher[token] - student[token])
    source = -advantage * float(student[token])
    if advantage > 0 or eta[token] >= -1e-6 or not chosen:
        return 0.0, source, 0.0
    total = sum(eta[v] for v in chosen)
    route = -eta[token] * sum(
        eta[v] / total * math.log1p(math.exp(float(student[token] - student[v]))) for v in chosen
    )
    return 1.0, source, route


@pytest.mark.parametrize(("mode", "zeta"), [("add", 0.0), ("replace", 1.0), ("interpolate", 0.25)])
def test_a_route_joins_or_replaces_the_suppression_where_its_gates_are_open(
    mode: str, zeta: float
) -> None:
    share = {"interpolation": zeta} if mode == "interpolate" else {}
    objective = Objective(replace(ROUTE, mode=mode, coef=0.7, **share))
    found = rows_of(objective)["routed"]
    opened = 0.0
    for n, value in enumerate(found.tolist()):
        gate, source, route = route_by_hand(CASE, n)
        assert value == pytest.approx((1 - gate * zeta) * source + gate * 0.7 * route, abs=1e-12)
        opened += gate
    assert 0 < opened < len(found)


def test_with_its_gates_closed_a_route_is_its_source_bit_for_bit() -> None:
    plain = evaluate(CASE, Objective(LOG_RATIO))
    routed = evaluate(CASE, Objective(replace(ROUTE, gates=(closed,))))
    assert plain.loss == routed.loss
    assert torch.equal(plain.gradient, routed.gradient)


def test_the_share_of_open_gates_is_counted_one_by_one() -> None:
    stats = evaluate(CASE, Objective(ROUTE)).head.stats
    gates = [route_by_hand(CASE, n)[0] for n in range(int(CASE.mask.sum()))]
    assert stats["routed/routed"].total == sum(gates)
    assert stats["routed/routed"].count == len(gates)
    for name in ("negative_advantage", "overrated", "has_candidates"):
        assert stats[f"gate/routed/{name}"].total >= sum(gates)


def test_a_route_says_what_suppression_would_send_past_its_candidates() -> None:
    stat = evaluate(CASE, Objective(ROUTE)).head.stats["leak/routed"]
    student = CASE.rows(CASE.student_logits).log_softmax(-1)
    teacher = CASE.rows(CASE.teacher_logits["teacher"]).log_softmax(-1)
    leaks = []
    for n, token in enumerate(CASE.rows(CASE.tokens).tolist()):
        if teacher[n, token] >= student[n, token]:
            continue
        top = [set(side[n].argsort(descending=True)[:3].tolist()) for side in (student, teacher)]
        omega = sorted(top[0] | top[1] | {token})
        log_s, log_t = (side[n, omega].log_softmax(0) for side in (student, teacher))
        eta = log_t - log_s + (log_s.exp() * (log_s - log_t)).sum()
        chosen = [v for v, e in zip(omega, eta, strict=True) if v in top[0] & top[1] and e > 1e-6]
        received = sum(float(student[n, v].exp()) for v in chosen if v != token)
        leaks.append(1 - received / (1 - float(student[n, token].exp())))
    assert stat.count == len(leaks)
    assert stat.total == pytest.approx(sum(leaks), abs=1e-12)


def test_a_route_reads_the_advantage_after_credit() -> None:
    walked = replace(LOG_RATIO, credit=credit.return_to_go)
    route = replace(ROUTE, source=walked, amount=routing.matched_suppression, gates=(open_gate,))
    whole = evaluate(CASE, Objective(route))
    loss, gradient = evaluate_in_parts(CASE, Objective(route), 6)
    assert loss == pytest.approx(whole.loss, abs=1e-13)
    assert (gradient - whole.gradient).abs().max() <= 1e-14
    immediate = evaluate(CASE, Objective(replace(route, source=LOG_RATIO)))
    assert abs(immediate.loss - whole.loss) > 1e-3


def open_gate(special: Bool[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return torch.ones(special.shape, dtype=torch.float64)


def test_moving_the_suppressed_share_by_the_student_s_own_odds_is_plain_suppression() -> None:
    by_odds = partial(routing.by_powers, teacher_power=0.0, student_power=1.0, score_power=0.0)
    route = Routed(
        source=LOG_RATIO,
        candidates=routing.all_others,
        share=by_odds,
        amount=routing.matched_suppression,
        transfer=routing.linear_transfer,
        gates=(weight.negative_advantage,),
    )
    plain = evaluate(CASE, Objective(LOG_RATIO))
    routed = evaluate(CASE, Objective(route))
    assert (plain.gradient - routed.gradient).abs().max() <= 1e-14


# --------------------------------------------------------------------------------------------
# Switches between terms


def test_complementary_gates_split_the_rows_between_two_terms() -> None:
    positive = replace(LOG_RATIO, name="pull", weights=(weight.positive_advantage,))
    rest = replace(REVERSE_KL, weights=(partial(weight.negative_advantage, of="pull"),))
    found = rows_of(Objective(positive, rest))
    plain = rows_of(Objective(replace(LOG_RATIO, name="pull"), REVERSE_KL))
    pulled = found["pull"] != 0
    assert 0 < pulled.sum() < len(pulled)
    assert torch.equal(pulled, found["dense_2"] == 0)
    assert torch.equal(found["pull"], torch.where(pulled, plain["pull"], 0.0))
    assert torch.equal(found["dense_2"], torch.where(pulled, 0.0, plain["dense_2"]))


def test_a_switch_may_read_an_advantage_that_other_rows_make() -> None:
    walked = replace(LOG_RATIO, name="walk", credit=credit.return_to_go)
    gate = partial(weight.positive_advantage, of="walk")
    objective = Objective(walked, replace(REVERSE_KL, weights=(gate,)))
    whole = evaluate(CASE, objective)
    loss, gradient = evaluate_in_parts(CASE, objective, 5)
    assert loss == pytest.approx(whole.loss, abs=1e-13)
    assert (gradient - whole.gradient).abs().max() <= 1e-14
    assert 0 < whole.head.stats["weight/dense_2/positive_advantage"].mean < 1


# --------------------------------------------------------------------------------------------
# Outcomes, baselines


def test_outcomes_join_before_or_after_credit_as_their_argument_says() -> None:
    plain = rows_of(Objective(replace(LOG_RATIO, credit=credit.return_to_go)))["sampled"]
    before = replace(LOG_RATIO, credit=credit.return_to_go, outcome=(halved,))
    after = replace(before, outcome=(halved, squared))
    logp = fields_of(CASE, FieldKey("student_logp"))[0]
    returns = -plain / logp
    assert torch.allclose(rows_of(Objective(before))["sampled"], plain / 2, rtol=1e-12, atol=0)
    assert torch.allclose(
        rows_of(Objective(after))["sampled"], -((returns / 2) ** 2) * logp, rtol=1e-12, atol=0
    )


# --------------------------------------------------------------------------------------------
# Weights that keep their mass


@pytest.mark.parametrize(
    "weights", [(by_ratio,), (share_of_response,), (share_of_response, by_ratio)]
)
def test_kept_mass_leaves_the_step_s_sum_of_advantages_as_it_was(
    weights: tuple[Callable[..., Any], ...],
) -> None:
    term = replace(LOG_RATIO, weights=weights, preserve_mass=True)
    plain = rows_of(Objective(LOG_RATIO))["sampled"]
    found = rows_of(Objective(term))["sampled"]
    logp = fields_of(CASE, FieldKey("student_logp"))[0]
    assert (found / logp).abs().sum() == pytest.approx(float((plain / logp).abs().sum()), rel=1e-12)
    loose = rows_of(Objective(replace(term, preserve_mass=False)))["sampled"]
    ratio = found / loose
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-11, atol=0)
    assert abs(float(ratio[0]) - 1) > 1e-2
    whole = evaluate(CASE, Objective(term))
    _, gradient = evaluate_in_parts(CASE, Objective(term), 5)
    assert (gradient - whole.gradient).abs().max() <= 1e-14


def test_kept_mass_of_a_divergence_is_the_number_of_rows() -> None:
    term = replace(REVERSE_KL, weights=(share_of_response,), preserve_mass=True)
    stat = evaluate(CASE, Objective(term)).head.stats["weight/dense"]
    assert stat.mean == pytest.approx(1.0, abs=1e-12)


def test_weights_that_leave_nothing_leave_zero() -> None:
    term = replace(LOG_RATIO, weights=(closed,), preserve_mass=True)
    assert (rows_of(Objective(term))["sampled"] == 0).all()


# --------------------------------------------------------------------------------------------
# Regularisers, smoothing


def test_a_regulariser_adds_a_penalty_that_carries_the_gradient() -> None:
    term = Regulariser(penalty=regulariser.entropy_bonus, coef=0.3)
    out = evaluate(CASE, Objective(term))
    logits = CASE.rows(CASE.student_logits).clone().requires_grad_()
    log_probs = logits.log_softmax(-1)
    (0.3 * (log_probs.exp() * log_probs).sum(-1).mean()).backward()
    assert torch.allclose(out.gradient, logits.grad, rtol=1e-12, atol=1e-15)
    assert Objective(term).views() == frozenset()


def test_smoothing_gives_every_entry_some_of_the_view_s_mass_and_counts_where() -> None:
    case = Case.random(5)
    holes = case.teacher_logits["teacher"].clone()
    holes[..., 2] = -math.inf
    scores = TeacherScores(log_probs=case.rows(holes).log_softmax(-1))
    batch = case.batch(views={"teacher": scores})
    assert evaluate(case, Objective(REVERSE_KL), batch).loss == math.inf
    out = evaluate(case, Objective(replace(REVERSE_KL, smoothing=0.01)), batch)
    teacher = case.rows(holes).softmax(-1) * 0.99 + 0.01 / 7
    student = case.rows(case.student_logits).log_softmax(-1)
    expected = (student.exp() * (student - teacher.log())).sum(-1).mean()
    assert out.loss == pytest.approx(float(expected), abs=1e-12)
    low = case.rows(holes).softmax(-1) < 0.01 / 7
    stat = out.head.stats["changed/dense/smoothing"]
    assert stat.mean == pytest.approx(float(low.double().mean()), abs=1e-12)
    sampled = evaluate(case, Objective(replace(LOG_RATIO, smoothing=0.01)), batch)
    assert math.isfinite(sampled.loss)


def test_a_formula_that_replaces_values_says_how_often() -> None:
    clipping = partial(reward.clipped_log_ratio, low=-0.5, high=0.5)
    out = evaluate(CASE, Objective(replace(LOG_RATIO, reward=clipping)))
    outside = (out.head.rows["log_ratio"].abs() > 0.5).double()
    assert out.head.stats["changed/sampled/clipped_log_ratio"].mean == pytest.approx(
        float(outside.mean())
    )
    walked = replace(LOG_RATIO, reward=clipping, credit=credit.return_to_go)
    coupled = evaluate(CASE, Objective(walked))
    assert (
        coupled.head.stats["changed/sampled/clipped_log_ratio"]
        == (out.head.stats["changed/sampled/clipped_log_ratio"])
    )


# --------------------------------------------------------------------------------------------
# Tails


def top_k(**changes: Any) -> Dense:
    made = {"support": partial(support.teacher_top_k, k=3), "tail": "bucket"}
    return Dense(**{"divergence": divergence.reverse_kl, **made, **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: top_k(tail="truncate"), "repeats itself .*2605.11182.*accept_collapse"),
        (lambda: top_k(tail="teacher_renormalise"), "reverse_kl is infinite with tail"),
        (
            lambda: top_k(divergence=divergence.total_variation, tail="truncate"),
            "total_variation is not defined on raw entries",
        ),
        (lambda: replace(REVERSE_KL, smoothing=1.0), r"smoothing must lie in \[0, 1\)"),
        (lambda: replace(REVERSE_KL, name="a.b"), "without '.' and '/'"),
        (lambda: replace(ROUTE, mode="swap"), "mode must be one of add, replace, interpolate"),
        (lambda: replace(ROUTE, interpolation=2.0), r"interpolation must lie in \[0, 1\]"),
        (lambda: replace(ROUTE, interpolation=0.9), "does nothing with mode='replace'"),
        (lambda: replace(ROUTE, tail="teacher_renormalise"), "a route compares both sides"),
        (lambda: replace(ROUTE, share=routing.raised), "share: raised does not go there"),
        (
            lambda: Sampled(
                reward=reward.teacher_log_ratio,
                credit=partial(credit.gae, gae_lambda=0.9),
                baseline=credit.value,
            ),
            "gae has the value of the prefix subtracted already",
        ),
        (
            lambda: Objective(
                Sampled(reward=reward.verdict_reward, credit=partial(credit.gae, gae_lambda=0.9))
            ),
            "a critic learns what is left of the log-ratio",
        ),
        (
            lambda: replace(LOG_RATIO, surrogate=surrogate.tail_residual),
            "tail_residual is what a support of some entries leaves out",
        ),
        (
            lambda: top_k(support=partial(support.teacher_top_k, k=Linear(0, 4, 3))),
            "a support's k must be a whole number >= 1",
        ),
        (
            lambda: replace(LOG_RATIO, outcome=(closed,)),
            "must take either 'reward', .* or 'credited'",
        ),
        (
            lambda: replace(REVERSE_KL, weights=(routing.has_candidates,)),
            "has_candidates does not go there; it is for gates",
        ),
        (
            lambda: Objective(
                replace(REVERSE_KL, weights=(partial(weight.positive_advantage, of="pg"),))
            ),
            "reads the advantage of 'pg', and no sampled term is called that",
        ),
        (
            lambda: replace(ROUTE, gates=(share_of_response,)),
            "gates sees one row at a time; put it into the weights",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_way_out(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_collapse_can_be_asked_for_by_name() -> None:
    case = Case.random(1)
    live = evaluate(case, Objective(top_k(tail="truncate", accept_collapse=True)))
    stopped = evaluate(
        case, Objective(top_k(tail="truncate", divergence=divergence.truncated_reverse_kl))
    )
    assert live.loss == pytest.approx(stopped.loss, abs=1e-13)
    logits = case.rows(case.student_logits).clone().requires_grad_()
    top = case.rows(case.teacher_logits["teacher"]).topk(3).indices
    logits.softmax(-1).gather(1, top).sum(-1).mean().backward()
    assert torch.allclose(live.gradient - stopped.gradient, logits.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("term", [ROUTE, top_k(), replace(LOG_RATIO, outcome=(halved,))])
def test_knobs_of_every_slot_may_be_schedules(term: Term) -> None:
    growing = replace(term, coef=Linear(0.0, 1.0, 4))
    if isinstance(growing, Routed):
        where = partial(support.routing_support, teacher_k=Linear(1, 5, 4), student_k=3)
        growing = replace(growing, support=where, source=replace(LOG_RATIO, coef=Linear(1, 2, 4)))
    settled, _ = Objective(growing).at(2, {}, None)
    (found,) = settled.terms
    assert found.coef == 0.5
    if isinstance(found, Routed):
        assert found.source.coef == 1.5
        assert dict(Bound.of(found.support).knobs)["teacher_k"] == 3
    assert math.isfinite(evaluate(CASE, settled).loss)


def test_importance_of_the_old_policy_is_one_where_nothing_was_updated() -> None:
    batch = CASE.batch()
    logp = fields_of(CASE, FieldKey("student_logp"))[0]
    old = torch.zeros(CASE.mask.shape, dtype=torch.float64).masked_scatter(CASE.mask, logp)
    batch = CASE.batch(old_logp=old, sampler_logp=old)
    plain = evaluate(CASE, Objective(LOG_RATIO), batch)
    for made in (
        surrogate.importance,
        partial(surrogate.truncated_importance, cap=2.0),
        partial(surrogate.masked_importance, low=0.5, high=2.0),
    ):
        found = evaluate(CASE, Objective(replace(LOG_RATIO, surrogate=made)), batch)
        assert torch.allclose(found.gradient, plain.gradient, rtol=0, atol=1e-15)


# --------------------------------------------------------------------------------------------
# Rows that nobody looks at


def teacher_knows(teacher_logp: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return (teacher_logp > -math.inf).double()


def impossible(seed: int, **changes: Any) -> tuple[Case, Any]:
    """A case in which the teacher gives the first open token of some rows no mass."""
    case = Case.random(seed, **changes)
    log_probs = case.rows(case.teacher_logits["teacher"]).log_softmax(-1)
    tokens = case.rows(case.tokens)
    log_probs[::3] = log_probs[::3].scatter(1, tokens[::3, None], -math.inf).log_softmax(-1)
    return case, case.batch(views={"teacher": TeacherScores(log_probs=log_probs)})


WITH_A_GATE: list[Term] = [
    replace(LOG_RATIO, weights=(teacher_knows,)),
    replace(LOG_RATIO, weights=(teacher_knows,), preserve_mass=True),
    replace(ROUTE, source=replace(LOG_RATIO, weights=(teacher_knows,)), gates=(teacher_knows,)),
    replace(REVERSE_KL, weights=(teacher_knows,), support=support.sampled, tail="bucket"),
]


@pytest.mark.parametrize("term", WITH_A_GATE)
def test_a_closed_gate_keeps_an_infinite_row_out_of_value_and_gradient(term: Term) -> None:
    case, batch = impossible(4)
    out = evaluate(case, Objective(term), batch)
    assert out.gradient.isfinite().all()
    assert math.isfinite(out.loss)
    assert out.loss != 0


def test_an_infinite_row_of_another_writer_is_not_looked_at() -> None:
    case = Case.random(4, writers=(STUDENT, DATA), gaps=False)
    other = case.rows(case.provenance) != STUDENT
    log_probs = case.rows(case.teacher_logits["teacher"]).log_softmax(-1)
    tokens = case.rows(case.tokens)[:, None]
    log_probs[other] = log_probs[other].scatter(1, tokens[other], -math.inf).log_softmax(-1)
    assert other.any()
    batch = case.batch(views={"teacher": TeacherScores(log_probs=log_probs)})
    for baseline in (None, credit.batch_mean):
        term = replace(LOG_RATIO, rows="student", baseline=baseline)
        out = evaluate(case, Objective(term), batch)
        assert math.isfinite(out.loss)
        assert out.gradient.isfinite().all()


def test_statistics_of_a_term_are_those_of_the_sequences_it_looks_at() -> None:
    case = Case.random(6, writers=(STUDENT, DATA))
    own = [b for b in range(case.tokens.shape[0]) if b % 2 == 0]
    alone = Case(
        case.tokens[own],
        case.mask[own],
        case.provenance[own],
        case.student_logits[own],
        {"teacher": case.teacher_logits["teacher"][own]},
    )
    term = replace(LOG_RATIO, rows="student", baseline=credit.batch_mean)
    together, apart = rows_of(Objective(term), case)["sampled"], rows_of(Objective(term), alone)
    student = case.rows(case.provenance) == STUDENT
    assert torch.allclose(together[student], apart["sampled"], rtol=0, atol=1e-13)


def test_a_smoothed_log_ratio_needs_no_whole_distribution() -> None:
    case = Case.random(2)
    logp = case.rows(case.teacher_logits["teacher"].log_softmax(-1))
    chosen = logp.gather(1, case.rows(case.tokens)[:, None])[:, 0]
    told = case.batch(views={"teacher": TeacherScores(sampled_logp=chosen)})
    for walk in (credit.immediate, credit.return_to_go):
        objective = Objective(replace(LOG_RATIO, credit=walk, smoothing=0.2))
        little, all_of_it = evaluate(case, objective, told), evaluate(case, objective)
        assert little.loss == pytest.approx(all_of_it.loss, abs=1e-12)
        assert torch.allclose(little.gradient, all_of_it.gradient, rtol=0, atol=1e-13)
    floor = math.log(0.2 / 7)
    assert little.head.stats["changed/sampled/smoothing"].total == int((chosen < floor).sum())


def test_a_weight_is_no_gate() -> None:
    halves = partial(weight.position_decay, half_life=2.0)
    with pytest.raises(ConfigError, match="so it is no gate; put it into the weights"):
        evaluate(CASE, Objective(replace(ROUTE, gates=(halves,))))

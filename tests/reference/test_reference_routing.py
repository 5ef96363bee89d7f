"""The routing oracle: its limits (survey 6.4), gradients, and what Eqs. 31-36 promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from . import routing as rt
from .checks import (
    GRADIENT_BOUND,
    IDENTITY_BOUND,
    Array,
    finite_differences,
    largest,
    logit_rows,
    logs,
)
from .divergences import (
    full,
    log_softmax,
    restrict,
    restrict_by_tail,
    reverse_kl,
    reverse_kl_gradient,
    routing_support,
)
from .enumeration import expected_routed_gradient, sampled_gradient

SIZE = 9
TRANSFERS = (rt.pairwise_logistic, rt.linear_transfer, rt.bounded_cross_entropy)
SEEDS = range(4)


def unit(token: int, size: int = SIZE) -> Array:
    indicator: Array = np.eye(size)[token]
    return indicator


def likeliest(log_probs: Array) -> list[int]:
    return [int(v) for v in np.argsort(-log_probs)]


class Position:
    """One position of a student and a teacher, with the columns of its routing support."""

    def __init__(self, seed: int, token: int, *, k: int = 4, tail: str = "renormalise") -> None:
        self.logits, self.teacher_logits = logit_rows(seed, SIZE)
        self.student, self.teacher = log_softmax(self.logits), log_softmax(self.teacher_logits)
        self.token, self.k, self.tail = token, k, tail
        self.teacher_top, self.student_top = likeliest(self.teacher), likeliest(self.student)
        self.ids = [
            *routing_support(
                self.teacher_top, self.student_top, token, (), teacher_k=k, student_k=k
            ),
            -1,
        ]
        self.support_ids = self.ids if tail == "renormalise" else [*self.ids, -1]
        self.score = rt.centred_log_ratio(
            self.restricted(self.logits), self.restricted(self.teacher_logits, "teacher")
        )

    def restricted(self, logits: Array, side: str = "student") -> Array:
        return restrict_by_tail(log_softmax(logits), self.ids, tail=self.tail, side=side)

    def candidates(self) -> list[bool]:
        return rt.endorsed_and_reachable(
            self.score,
            self.support_ids,
            self.token,
            self.teacher_top,
            self.student_top,
            teacher_k=self.k,
            student_k=self.k,
        )


def overrated_positions() -> list[Position]:
    positions = [Position(seed, token) for seed in SEEDS for token in range(SIZE)]
    return [
        position
        for position in positions
        if rt.overrated(position.score, position.ids, position.token) and any(position.candidates())
    ]


# --------------------------------------------------------------------------------------------
# Eqs. 31-36


def test_the_columns_say_what_the_equations_say() -> None:
    routes = 0
    for position in overrated_positions():
        route = rt.counterfactual_route(
            position.logits, position.teacher_logits, position.token, teacher_k=4, student_k=4
        )
        assert route.support == position.ids[:-1]
        score = [route.score[v] for v in route.support]
        assert position.score[:-1] == pytest.approx(score, abs=1e-14)
        chosen = {v for v, kept in zip(position.ids, position.candidates(), strict=True) if kept}
        assert chosen == route.candidates
        share = rt.by_score(position.score, position.candidates())
        for k, v in enumerate(position.ids):
            assert share[k] == pytest.approx(route.share.get(v, 0.0), abs=1e-13)
        amount = rt.excess_score(position.score, position.ids, position.token)
        assert amount == pytest.approx(route.amount, abs=1e-14)
        transfer = rt.pairwise_logistic(
            position.restricted(position.logits),
            position.ids,
            position.token,
            share,
            amount,
            vocab_size=SIZE,
        )
        assert transfer.loss == pytest.approx(route.loss, abs=1e-14)
        assert largest(transfer.gradient - route.gradient) <= 1e-14
        routes += 1
    assert routes >= 8


def test_scores_have_no_student_mean_and_ignore_constants_added_to_logits() -> None:
    logits, teacher_logits = logit_rows(2, SIZE)
    support = [0, 3, 4, 7]
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    score = rt.local_scores(student, teacher, support)
    inside = restrict_by_tail(student, support, tail="renormalise", side="student")
    mean = sum(math.exp(logp) * score[v] for logp, v in zip(inside, support, strict=True))
    assert mean == pytest.approx(0.0, abs=1e-15)
    whole = rt.local_scores(student, teacher, full(SIZE))
    for v in range(SIZE):
        expected = teacher[v] - student[v] + reverse_kl(student, teacher)
        assert whole[v] == pytest.approx(expected, abs=1e-14)
    moved = rt.counterfactual_route(logits + 3.0, teacher_logits - 5.0, 1, teacher_k=4, student_k=4)
    plain = rt.counterfactual_route(logits, teacher_logits, 1, teacher_k=4, student_k=4)
    assert moved.candidates == plain.candidates
    assert all(moved.score[v] == pytest.approx(plain.score[v]) for v in plain.score)


def test_the_paper_loss_is_the_derivative_of_its_gradient_with_everything_else_held_fixed() -> None:
    for position in overrated_positions()[:6]:
        route = rt.counterfactual_route(
            position.logits, position.teacher_logits, position.token, teacher_k=4, student_k=4
        )

        def loss(z: Array, route: rt.Route = route, u: int = position.token) -> float:
            return sum(
                route.amount * route.share[v] * math.log1p(math.exp(z[u] - z[v]))
                for v in route.candidates
            )

        assert route.loss == pytest.approx(loss(position.logits))
        numeric = finite_differences(loss, position.logits)
        assert largest(route.gradient - numeric) <= GRADIENT_BOUND


def test_an_equal_teacher_opens_no_route_under_any_rounding() -> None:
    for seed, token in itertools.product(SEEDS, range(SIZE)):
        logits = logit_rows(seed, SIZE)[0]
        route = rt.counterfactual_route(logits, logits + 0.1, token, teacher_k=4, student_k=4)
        assert not route.candidates
        assert route.loss == largest(route.gradient) == 0.0
        assert not rt.overrated(list(route.score.values()), list(route.score), token)


def test_special_and_absent_ids_and_the_token_are_never_candidates() -> None:
    for position in overrated_positions():
        special = position.teacher_top[:2]
        route = rt.counterfactual_route(
            position.logits,
            position.teacher_logits,
            position.token,
            teacher_k=4,
            student_k=4,
            special_ids=special,
        )
        assert not (route.candidates | set(route.support)) & (set(special) - {position.token})
        every = (
            rt.all_others(position.ids, position.token),
            rt.teacher_top(position.ids, position.token, position.teacher_top, teacher_k=SIZE),
            rt.raised(position.score, position.ids, position.token, margin=-math.inf),
            rt.best(position.score, position.ids, position.token, margin=-math.inf),
            position.candidates(),
        )
        for column in every:
            chosen = {v for v, kept in zip(position.ids, column, strict=True) if kept}
            assert position.token not in chosen
            assert -1 not in chosen
        assert sum(every[0]) == len(position.ids) - 2
        assert sum(every[3]) == 1


def test_an_empty_intersection_falls_back_to_likely_tokens_where_that_was_asked_for() -> None:
    student = logs(0.55, 0.25, 0.12, 0.08)
    teacher = logs(0.05, 0.05, 0.6, 0.3)
    pure = rt.counterfactual_route(student, teacher, 0, teacher_k=2, student_k=2)
    assert set(pure.support) == {0, 1, 2, 3}
    assert pure.candidates == set()
    assert pure.loss == largest(pure.gradient) == 0.0
    ids, tops = [0, 1, 2, 3], ([2, 3], [0, 1])
    score = rt.centred_log_ratio(student, teacher)
    for minimum, expected in ((0.1, {2}), (0.05, {2, 3}), (0.2, set())):
        relaxed = rt.counterfactual_route(
            student, teacher, 0, teacher_k=2, student_k=2, min_probability=minimum
        )
        assert relaxed.candidates == expected
        column = rt.endorsed_or_likely(
            score, ids, 0, *tops, student, teacher_k=2, student_k=2, min_probability=minimum
        )
        assert {v for v in ids if column[v]} == expected
    overlapping = rt.endorsed_or_likely(
        score, ids, 0, [2, 3], [0, 3], student, teacher_k=2, student_k=2, min_probability=0.1
    )
    assert overlapping == [False, False, False, True]


# --------------------------------------------------------------------------------------------
# Mass transfer


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_transfers_match_finite_differences_with_shares_and_amount_held_fixed(
    transfer: Callable[..., rt.LossAndGradient], tail: str
) -> None:
    for seed, token in ((0, 1), (1, 4), (2, 8)):
        position = Position(seed, token, tail=tail)
        share = rt.by_powers(
            position.score,
            rt.all_others(position.support_ids, token),
            [*restrict(position.student, position.support_ids)],
            [*restrict(position.teacher, position.support_ids)],
            teacher_power=1.0,
            student_power=0.5,
            score_power=0.0,
        )
        for amount in (0.01, 0.3, 5.0):
            moved = partial(
                transfer,
                support_ids=position.support_ids,
                token=token,
                routing=share,
                amount=amount,
                vocab_size=SIZE,
            )
            exact = moved(position.restricted(position.logits))
            target = np.exp(position.restricted(position.logits))
            cut = min(amount, target[position.support_ids.index(token)])
            target += cut * (share - np.array([v == token for v in position.support_ids]))

            def loss(
                z: Array,
                position: Position = position,
                moved: Callable[..., rt.LossAndGradient] = moved,
                target: Array = target,
            ) -> float:
                row = position.restricted(z)
                if transfer is rt.bounded_cross_entropy:
                    return -float((target * np.where(row > -math.inf, row, 0.0)).sum())
                return moved(row).loss

            assert exact.loss == pytest.approx(loss(position.logits), abs=1e-13)
            numeric = finite_differences(loss, position.logits)
            assert largest(exact.gradient - numeric) <= GRADIENT_BOUND
            assert exact.gradient.sum() == pytest.approx(0.0, abs=1e-14)
            assert exact.gradient[token] > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_suppression_is_the_transfer_to_the_student_itself(seed: int) -> None:
    logits, teacher_logits = logit_rows(seed, SIZE)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    ids = full(SIZE)
    for token, advantage in ((1, -0.7), (6, -2.0)):
        plain = sampled_gradient(logits, token, advantage)
        amount = rt.matched_suppression(advantage, student[token])
        share = rt.by_powers(
            rt.centred_log_ratio(student, teacher),
            rt.all_others(ids, token),
            student,
            teacher,
            teacher_power=0.0,
            student_power=1.0,
            score_power=0.0,
        )
        moved = rt.linear_transfer(student, ids, token, share, amount, vocab_size=SIZE)
        assert largest(moved.gradient - plain) <= 1e-15
        exact_amount, exact_share = rt.suppression_as_transfer(logits, token, advantage)
        assert amount == pytest.approx(exact_amount)
        assert all(share[v] == pytest.approx(exact_share[v]) for v in exact_share)


@pytest.mark.parametrize("seed", SEEDS)
def test_rkl_consistent_routing_is_unbiased_for_the_reverse_kl(seed: int) -> None:
    logits, teacher_logits = logit_rows(seed, SIZE)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    exact = reverse_kl_gradient(student, teacher)
    mean, _ = expected_routed_gradient(logits, teacher_logits)
    assert largest(mean - exact) <= IDENTITY_BOUND
    ids = full(SIZE)
    score = rt.centred_log_ratio(student, teacher)
    composed = np.zeros(SIZE)
    for token in range(SIZE):
        share = rt.by_powers(
            score,
            rt.raised(score, ids, token, margin=0.0),
            student,
            teacher,
            teacher_power=0.0,
            student_power=1.0,
            score_power=1.0,
        )
        amount = rt.excess_score(score, ids, token)
        moved = rt.linear_transfer(student, ids, token, share, amount, vocab_size=SIZE)
        assert largest(moved.gradient - rt.exact_transfer(logits, teacher_logits, token)) <= 1e-14
        composed += math.exp(student[token]) * moved.gradient
    assert largest(composed - exact) <= IDENTITY_BOUND


@pytest.mark.parametrize("seed", SEEDS)
def test_eq_36_is_biased_for_the_reverse_kl_by_each_of_its_causes(seed: int) -> None:
    logits, teacher_logits = logit_rows(seed, SIZE)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    ids, exact = full(SIZE), reverse_kl_gradient(student, teacher)
    score = rt.centred_log_ratio(student, teacher)

    def expectation(student_power: float, *, logistic: bool, k: int) -> Array:
        total = np.zeros(SIZE)
        transfer = rt.pairwise_logistic if logistic else rt.linear_transfer
        for token in range(SIZE):
            chosen = rt.endorsed_and_reachable(
                score,
                ids,
                token,
                likeliest(teacher),
                likeliest(student),
                teacher_k=k,
                student_k=k,
            )
            share = rt.by_powers(
                score,
                chosen,
                student,
                teacher,
                teacher_power=0.0,
                student_power=student_power,
                score_power=1.0,
            )
            amount = rt.excess_score(score, ids, token)
            moved = transfer(student, ids, token, share, amount, vocab_size=SIZE)
            total += math.exp(student[token]) * moved.gradient
        return total

    assert largest(expectation(1.0, logistic=False, k=SIZE) - exact) <= 1e-6
    for student_power, logistic, k in ((0.0, False, SIZE), (1.0, True, SIZE), (1.0, False, 2)):
        assert largest(expectation(student_power, logistic=logistic, k=k) - exact) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dense_source_and_sink_is_the_forward_kl_to_the_conditioned_teacher(seed: int) -> None:
    """Each token above its target releases the excess, shared out as the targets lack it."""
    logits, teacher_logits = logit_rows(seed, SIZE)
    student = log_softmax(logits)
    support = likeliest(log_softmax(teacher_logits))[:4]
    target = np.zeros(SIZE)
    target[support] = np.exp(
        restrict_by_tail(log_softmax(teacher_logits), support, tail="renormalise", side="teacher")
    )
    excess = np.maximum(np.exp(student) - target, 0.0)
    lack = np.maximum(target - np.exp(student), 0.0)
    total = np.zeros(SIZE)
    for token in range(SIZE):
        moved = rt.linear_transfer(
            student, full(SIZE), token, lack / lack.sum(), excess[token], vocab_size=SIZE
        )
        total += moved.gradient
    assert largest(total - (np.exp(student) - target)) <= 1e-15


def test_a_single_candidate_takes_everything() -> None:
    position = Position(0, likeliest(log_softmax(logit_rows(0, SIZE)[0]))[0])
    chosen = rt.best(position.score, position.ids, position.token)
    share = rt.by_score(position.score, chosen)
    assert sorted(share)[-1] == 1.0
    taker = position.ids[int(np.argmax(share))]
    assert taker == max(
        (v for v in position.ids[:-1] if v != position.token),
        key=lambda v: position.teacher[v] - position.student[v],
    )
    moved = rt.linear_transfer(
        position.restricted(position.logits),
        position.ids,
        position.token,
        share,
        0.3,
        vocab_size=SIZE,
    )
    assert largest(moved.gradient - 0.3 * (unit(position.token) - unit(taker))) <= 1e-15


def test_shares_have_the_values_worked_out_by_hand() -> None:
    score = [3.0, -1.0, 1.0, 0.0]
    candidates = [True, True, True, False]
    student, teacher = logs(0.1, 0.2, 0.3, 0.4), logs(0.4, 0.3, 0.2, 0.1)
    powers = partial(rt.by_powers, score, candidates, student, teacher)
    off = {"teacher_power": 0.0, "student_power": 0.0, "score_power": 0.0}
    assert powers(**off).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert powers(**off | {"teacher_power": 1.0}).tolist() == pytest.approx(
        [4 / 9, 3 / 9, 2 / 9, 0]
    )
    assert powers(**off | {"student_power": 2.0}).tolist() == pytest.approx(
        [1 / 14, 4 / 14, 9 / 14, 0]
    )
    assert powers(**off | {"score_power": 1.0}).tolist() == pytest.approx([3 / 4, 0, 1 / 4, 0])
    assert rt.by_score(score, candidates).tolist() == pytest.approx([3 / 4, 0, 1 / 4, 0])
    assert rt.by_score(score, candidates, temperature=0.5).tolist() == pytest.approx(
        [9 / 10, 0, 1 / 10, 0]
    )
    assert rt.by_score(score, [False] * 4).tolist() == [0, 0, 0, 0]
    assert rt.by_score([-1.0, -2.0, 0, 0], candidates).tolist() == [0, 0, 0, 0]


def test_gates_and_amounts_have_the_values_worked_out_by_hand() -> None:
    score, ids = [0.5, -0.25, 0.0, -0.25], [7, 3, 9, -1]
    assert rt.excess_score(score, ids, 3) == 0.25
    assert rt.excess_score(score, ids, 7) == rt.excess_score(score, ids, 1) == 0.0
    assert [rt.overrated(score, ids, token) for token in (7, 3, 9, 1)] == [0, 1, 0, 0]
    assert rt.overrated(score, ids, 3, margin=0.3) == 0
    assert [rt.has_candidates(c) for c in ([False, True], [False, False])] == [1, 0]
    teacher, chosen = logs(0.1, 0.2, 0.3, 0.1), [True, False, True, False]
    assert rt.candidate_mass(chosen, teacher, at_least=0.39) == 1
    assert rt.candidate_mass(chosen, teacher, at_least=0.41) == 0
    student = logs(0.4, 0.2, 0.1, 0.1)
    assert rt.evidence(score, chosen, student, full_at=0.8) == pytest.approx(0.25)
    assert rt.evidence(score, chosen, student, full_at=0.1) == 1.0
    assert rt.matched_suppression(-2.0, math.log(0.25)) == pytest.approx(1.5)


def test_a_small_step_lowers_the_token_raises_the_candidates_and_keeps_other_odds() -> None:
    for position in overrated_positions():
        share = rt.by_score(position.score, position.candidates())
        moved = rt.linear_transfer(
            position.student,
            position.ids,
            position.token,
            share,
            1.0,
            vocab_size=SIZE,
        )
        chosen = [v for v, kept in zip(position.ids, position.candidates(), strict=True) if kept]
        assert moved.gradient[position.token] > 0
        assert all(moved.gradient[v] < 0 for v in chosen)
        others = [v for v in range(SIZE) if v not in chosen and v != position.token]
        assert not moved.gradient[others].any()
        step = 1e-3
        before = np.exp(position.student)
        after = np.exp(log_softmax(position.logits - step * moved.gradient))
        assert after[position.token] < before[position.token]
        assert after[chosen].sum() > before[chosen].sum()
        # To first order: the token loses p (m + E), a candidate gains p (m r - E).
        routing = -moved.gradient + unit(position.token)
        spill = step * float((routing * before).sum() - before[position.token])
        predicted = before * (step * (routing - unit(position.token)) - spill)
        assert largest(after - before - predicted) <= 1e-5
        if len(others) > 1:
            odds = after[others] / before[others]
            assert odds == pytest.approx(odds[0], abs=1e-14)


def test_the_minimiser_of_the_bounded_form_leaves_the_others_untouched() -> None:
    logits, _ = logit_rows(5, SIZE)
    student = np.exp(log_softmax(logits))
    share = np.zeros(SIZE)
    share[[2, 5]] = [0.25, 0.75]
    token, amount = 1, 0.5 * student[1]
    target = student - amount * unit(token) + amount * share
    z = logits.copy()
    # The target is fixed at the first point: descend the cross-entropy to it.
    for _ in range(20_000):
        z -= 2.0 * (np.exp(log_softmax(z)) - target)
    reached = np.exp(log_softmax(z))
    others = [v for v in range(SIZE) if v not in (1, 2, 5)]
    assert largest(reached[others] - student[others]) <= 1e-12
    assert reached[token] == pytest.approx(student[token] / 2)


def test_a_closed_gate_leaves_the_source_and_the_modes_mix_as_written() -> None:
    source = rt.LossAndGradient(2.0, np.array([1.0, -1.0]))
    transfer = rt.LossAndGradient(10.0, np.array([0.0, 4.0]))
    for mode in ("add", "replace", "interpolate"):
        closed = rt.routed(source, transfer, gate=0.0, mode=mode)
        assert closed.loss == 2.0
        assert closed.gradient.tolist() == [1, -1]
    mixed = partial(rt.routed, source, transfer, gate=1.0, coef=0.5, weight=0.5)
    assert mixed(mode="add").loss == 4.5
    assert mixed(mode="replace").loss == 2.5
    assert mixed(mode="interpolate", interpolation=0.25).loss == 4.0
    assert mixed(mode="interpolate").gradient.tolist() == [0.5, 0.5]

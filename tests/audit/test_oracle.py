"""The oracle against two others: recursions over time, and an enumeration by other hands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from opd.audit import (
    World,
    absorbing_chain,
    compare,
    expectation,
    fast_chain,
    lag_gradient,
    local_gradient,
    oracle,
    per_state_reverse_kl,
    random_tree,
    sequence_reverse_kl,
    sequence_reverse_kl_gradient,
    slow_chain,
    value,
    visits,
)
from opd.formula import credit, divergence, reward, support, weight
from opd.objective import Dense, Objective, Sampled
from opd.schedule import Linear
from tests.audit.worlds import WORLDS, Unrolled, close, count_letter, descends, moments
from tests.reference import credit as literal
from tests.reference import enumeration
from tests.reference.enumeration import Response, Tree

ENDS = {"tree": None, "tree with an end": 2, "longer tree with an end": 0, "slow chain": None}
"""The worlds that the independent oracle unrolls, with their end token."""

Rows = npt.NDArray[np.float64]


@pytest.mark.parametrize("name", ENDS)
def test_the_exact_quantities_are_those_of_the_independent_oracle(name: str) -> None:
    world = WORLDS[name]
    other = Unrolled(world, ENDS[name])
    tree = other.tree
    assert sequence_reverse_kl(world) == pytest.approx(enumeration.sequence_reverse_kl(tree))
    exact = enumeration.exact_sequence_reverse_kl_gradient(tree)
    assert close(sequence_reverse_kl_gradient(world), other.fold(exact))
    local = enumeration.exact_local_gradient(tree)
    assert close(local_gradient(world, divergence.reverse_kl), other.fold(local))
    assert float(value(world)[0, 0]) == pytest.approx(enumeration.value(tree, ()))


@pytest.mark.parametrize("name", ["tree with an end", "absorbing chain with an end"])
def test_the_sequence_gradient_is_that_of_finite_differences(name: str) -> None:
    world, step = WORLDS[name], 1e-5
    numeric = torch.zeros_like(world.student_logits)
    for place in np.ndindex(*numeric.shape):
        shift = torch.zeros_like(numeric)
        shift[place] = step
        up, down = (
            sequence_reverse_kl(world.with_student(world.student_logits + sign * shift))
            for sign in (1, -1)
        )
        numeric[place] = (up - down) / (2 * step)
    assert close(sequence_reverse_kl_gradient(world), numeric, bound=1e-8)


@pytest.mark.parametrize("name", WORLDS)
def test_value_visits_and_divergences_fit_together(name: str) -> None:
    world = WORLDS[name]
    reached = visits(world)
    total = float((reached * per_state_reverse_kl(world)).sum())
    assert total == pytest.approx(sequence_reverse_kl(world), rel=1e-12)
    assert float(value(world)[0, 0]) == pytest.approx(-total, rel=1e-12)
    shares = reached.sum(1)
    assert float(shares[0]) == 1.0
    assert bool((shares.diff() <= 1e-12).all())
    parts = [lag_gradient(world, lag) for lag in range(world.horizon + 1)]
    assert close(torch.stack(parts).sum(0), sequence_reverse_kl_gradient(world))
    assert close(parts[0], local_gradient(world, divergence.reverse_kl))
    assert not parts[-1].any(), "no reward lies beyond the horizon"


def test_a_fast_chain_forgets_and_a_slow_one_does_not() -> None:
    # the second largest eigenvalue of the transition matrix is what is left of a start per step
    def memory(world: World) -> float:
        transitions = world.student_logits[1:].softmax(-1)
        return float(torch.linalg.eigvals(transitions).abs().sort().values[-2])

    for seed in range(5):
        assert memory(fast_chain(seed)) < 0.1
        assert memory(slow_chain(seed)) > 0.4


def test_nothing_leads_back_from_the_absorbing_error() -> None:
    world = absorbing_chain(0, error_id=1, horizon=5)
    assert world.next_state[2].tolist() == [2, 2, 2]
    at_error = visits(world)[:, 2]
    assert bool((at_error.diff() > 0).all())
    ending = absorbing_chain(0, error_id=1, end_id=2)
    assert ending.next_state[2].tolist() == [2, 2, -1]
    for seed in range(5):
        lost = absorbing_chain(seed, error_id=1)
        now, whole = lag_gradient(lost, 0), sequence_reverse_kl_gradient(lost)
        assert compare(now, whole).relative_error > 0.1
        assert float((whole - now)[0, 1]) > 0, "the future pushes the error's logit down"


def test_a_tree_has_a_row_for_every_prefix_that_goes_on() -> None:
    # without an end 1 + 3 + 9 + 27; with one of three tokens ending, 1 + 2 + 4 + 8
    assert len(random_tree(0).student_logits) == 40
    world = random_tree(0, end_id=2)
    assert len(world.student_logits) == 15
    assert world.next_state[:3].tolist() == [[1, 2, -1], [3, 4, -1], [5, 6, -1]]
    assert bool((world.next_state[7:] == -1).all())
    assert float(visits(world).sum(1)[1]) == pytest.approx(
        1 - float(world.student_logits[0].softmax(-1)[2])
    )


# --------------------------------------------------------------------------------------------
# The enumeration


def rewards_of(tree: Tree, response: Response) -> list[float]:
    return tree.log_ratios(response)


def divergences_of(tree: Tree, response: Response) -> list[float]:
    return [tree.divergence(response[:t]) for t in range(len(response))]


def along(function: Callable[..., Any], *, reads_divergences: bool = False, **knobs: Any) -> Any:
    """A literal credit function of one response of a tree."""

    def advantages(tree: Tree, response: Response) -> Sequence[float]:
        rewards, is_open = rewards_of(tree, response), [True] * len(response)
        if reads_divergences:
            return list(function(rewards, divergences_of(tree, response), is_open, **knobs))
        return list(function(rewards, is_open, **knobs))

    return advantages


def length_neutral(tree: Tree, response: Response) -> Sequence[float]:
    batch = (
        [rewards_of(tree, response)],
        [divergences_of(tree, response)],
        [[True] * len(response)],
    )
    return list(literal.length_neutral_future(*batch, future_weight=0.5)[0])


CREDITS = {
    "immediate": (credit.immediate, along(literal.immediate)),
    "return_to_go": (credit.return_to_go, along(literal.return_to_go)),
    "discounted": (
        partial(credit.discounted, gamma=0.6, meaning="task"),
        along(literal.discounted, gamma=0.6),
    ),
    "windowed": (partial(credit.windowed, window=2), along(literal.windowed, window=2)),
    "length_normalised": (credit.length_normalised, along(literal.length_normalised)),
    "rao_blackwell": (credit.rao_blackwell, along(literal.rao_blackwell, reads_divergences=True)),
    "next_step": (credit.next_step, along(literal.next_step, reads_divergences=True)),
    "future": (credit.future, along(literal.future)),
    "damped_future": (
        partial(credit.damped_future, future_weight=0.3),
        along(literal.damped_future, reads_divergences=True, future_weight=0.3),
    ),
    "length_neutral_future": (
        partial(credit.length_neutral_future, future_weight=0.5),
        length_neutral,
    ),
}


@pytest.mark.parametrize("name", ["tree", "tree with an end"])
@pytest.mark.parametrize("function", CREDITS)
def test_mean_and_variance_are_those_of_the_independent_oracle(function: str, name: str) -> None:
    ours, theirs = CREDITS[function]
    tree = Unrolled(WORLDS[name], ENDS[name]).tree
    mean, variance = enumeration.expected_gradient(tree, partial(theirs, tree))
    found = moments(WORLDS[name], Sampled(reward.teacher_log_ratio, credit=ours))
    assert close(found.gradient, torch.tensor(mean))
    assert found.variance == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("function", CREDITS)
def test_where_prefixes_share_rows_means_are_those_of_the_independent_oracle(function: str) -> None:
    ours, theirs = CREDITS[function]
    other = Unrolled(WORLDS["slow chain"], None)
    mean, _ = enumeration.expected_gradient(other.tree, partial(theirs, other.tree))
    found = descends(WORLDS["slow chain"], Sampled(reward.teacher_log_ratio, credit=ours))
    assert close(found, other.fold(mean))


def test_shared_rows_add_up_before_they_are_squared() -> None:
    # One state that always follows itself, two tokens, two steps; the reward is 1 and the student
    # is even, so a response's gradient is -(sum of scores): (-1, 1) for 00, 0 for 01 and 10,
    # (1, -1) for 11. Its mean is 0 and its mean square (2 + 0 + 0 + 2) / 4 = 1.
    logits = torch.zeros(1, 2, dtype=torch.float64)
    world = World(logits, {"teacher": logits}, torch.zeros(1, 2, dtype=torch.long), horizon=2)
    found = moments(world, Sampled(reward.one))
    assert found.gradient.tolist() == [[0.0, 0.0]]
    assert found.variance == pytest.approx(1.0, rel=1e-14)


def test_the_value_is_the_expected_loss() -> None:
    world = WORLDS["tree with an end"]
    exact = sequence_reverse_kl(world)
    assert moments(world, Dense(divergence.reverse_kl)).value == pytest.approx(exact, rel=1e-12)
    halved = moments(world, Dense(divergence.reverse_kl, coef=0.5), Dense(divergence.forward_kl))
    forward = divergence.forward_kl(
        world.student_logits.log_softmax(-1), world.views["teacher"].log_softmax(-1)
    )
    assert halved.value == pytest.approx(exact / 2 + float((visits(world) * forward).sum()))


@pytest.mark.parametrize("samples", [2, 3])
def test_more_responses_leave_the_mean_and_divide_the_variance(samples: int) -> None:
    world = random_tree(0, vocab_size=2, horizon=3, end_id=1)
    term = Sampled(reward.teacher_log_ratio, credit=credit.return_to_go)
    one, more = moments(world, term), moments(world, term, samples=samples)
    assert close(more.gradient, one.gradient)
    assert more.variance == pytest.approx(one.variance / samples, rel=1e-10)
    assert more.value == pytest.approx(one.value, rel=1e-12)


def test_a_statistic_sees_the_responses_of_its_own_step_and_no_other() -> None:
    # With one response per step there is no other, so the leave-one-out mean is 0: nothing
    # changes, bit for bit. If the oracle let steps mix, the mean of the others would come in.
    world = WORLDS["tree with an end"]
    plain = Sampled(reward.teacher_log_ratio, credit=credit.return_to_go)
    for baseline in (credit.batch_mean, credit.position_mean, credit.group_mean):
        alone = moments(world, replace(plain, baseline=baseline))
        assert torch.equal(alone.gradient, moments(world, plain).gradient)


@pytest.mark.parametrize("name", ["tree with an end", "absorbing chain"])
def test_what_is_settled_together_is_what_is_settled_step_by_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = WORLDS[name]
    knobs = {
        "discounted": {"gamma": 0.6, "meaning": "task"},
        "windowed": {"window": 2},
        "damped_future": {"future_weight": 0.3},
        "gae": {"gae_lambda": 0.5},
        "terminal_verdict": {"scale": 0.5},
    }
    terms = []
    for function in sorted(oracle.ALONG_ONE_RESPONSE, key=lambda function: function.__name__):
        bound = partial(function, **knobs.get(function.__name__, {}))
        if function.__module__ == credit.__name__:
            terms.append(Sampled(reward.teacher_log_ratio, credit=bound))
        elif function.__module__ == reward.__name__:
            terms.append(Sampled(bound))
        else:
            terms.append(Sampled(reward.teacher_log_ratio, outcome=(bound,)))
    settings = {"critic": value(world), "verify": count_letter(world, 0)}
    for term in terms:
        assert oracle.settles_together(Objective(term))
    together = [moments(world, term, **settings) for term in terms]
    monkeypatch.setattr(oracle, "ALONG_ONE_RESPONSE", frozenset())
    assert not any(oracle.settles_together(Objective(term)) for term in terms)
    for term, found in zip(terms, together, strict=True):
        apart = moments(world, term, **settings).gradient
        # not the same bits: how a matrix product rounds depends on its height and the processor
        assert torch.allclose(apart, found.gradient, rtol=0, atol=1e-14), term


def literal_pairs(tree: Tree, advantages: Callable[[list[Response]], Rows]) -> tuple[Rows, float]:
    """Mean and variance over pairs of responses of the mean of their two gradients."""
    mean, mean_square = np.zeros(tree.student_logits.shape), 0.0
    for pair in ([first, second] for first in tree.responses() for second in tree.responses()):
        probability = math.prod(tree.probability(response) for response in pair)
        sample = np.zeros(tree.student_logits.shape)
        for response, credited in zip(pair, advantages(pair), strict=True):
            for t, token in enumerate(response):
                student = np.exp(tree.student(response[:t]))
                score = np.eye(tree.vocab_size)[token] - student
                sample[tree.row(response[:t])] -= credited[t] * score / 2
        mean += probability * sample
        mean_square += probability * float((sample * sample).sum())
    return mean, mean_square - float((mean * mean).sum())


@pytest.mark.parametrize("baseline", ["position_mean", "batch_mean", "group_mean"])
def test_pairs_of_responses_are_those_of_a_literal_loop(baseline: str) -> None:
    world = random_tree(3, vocab_size=2, horizon=3, end_id=1)
    tree = Unrolled(world, 1).tree

    def advantages(pair: list[Response]) -> Rows:
        mask = np.array([[t < len(response) for t in range(3)] for response in pair])
        rewards = np.zeros((2, 3))
        for b, response in enumerate(pair):
            rewards[b, : len(response)] = tree.log_ratios(response)
        credited = [literal.return_to_go(rewards[b], mask[b]) for b in range(2)]
        others = ([0, 0],) if baseline == "group_mean" else ()
        left: Rows = np.array(credited) - getattr(literal, baseline)(credited, mask, *others)
        return left

    mean, variance = literal_pairs(tree, advantages)
    term = Sampled(
        reward.teacher_log_ratio, credit=credit.return_to_go, baseline=getattr(credit, baseline)
    )
    found = moments(world, term, samples=2)
    assert close(found.gradient, torch.tensor(mean))
    assert found.variance == pytest.approx(variance, rel=1e-9)


def test_the_objectives_own_reduction_is_replaced_by_a_sum_over_tokens() -> None:
    world = WORLDS["tree with an end"]
    found = [
        moments(world, Dense(divergence.reverse_kl, reduction=reduction)).gradient
        for reduction in ("token_mean", "sequence_mean", "sequence_sum")
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_objectives_temperature_divides_every_logit() -> None:
    world = WORLDS["tree"]
    found = expectation(Objective(Dense(divergence.forward_kl), temperature=2.0), world).gradient

    def at_temperature(student: Tensor, teacher: Tensor) -> Tensor:
        cooled = [(log_probs / 2.0).log_softmax(-1) for log_probs in (student, teacher)]
        return divergence.forward_kl(*cooled)

    assert close(found, local_gradient(world, at_temperature))


def test_supports_follow_the_policy_that_wrote() -> None:
    world = WORLDS["tree"]
    other = random_tree(99).student_logits
    chosen = other.topk(2, dim=-1).indices

    def conditional(student: Tensor, teacher: Tensor) -> Tensor:
        both = [log_probs.gather(-1, chosen).log_softmax(-1) for log_probs in (student, teacher)]
        return divergence.reverse_kl(*both)

    term = Dense(
        divergence.reverse_kl, support=partial(support.student_top_k, k=2), tail="renormalise"
    )
    target = local_gradient(world, conditional, behaviour=other)
    assert close(descends(world, term, behaviour=other), target)
    assert not close(descends(world, term), target, bound=0.01)


def test_what_weights_settle_together_is_settled_per_step() -> None:
    # With weights that keep their mass, a single response's weights average to 1 over its tokens:
    # half-lives of one token weigh n tokens as 2^-t * n / sum_k 2^-k.
    world = fast_chain(0)
    term = Dense(
        divergence.reverse_kl,
        weights=(partial(weight.position_decay, half_life=1.0),),
        preserve_mass=True,
    )
    fading = 2.0 ** -torch.arange(4, dtype=torch.float64)
    weighted = fading * 4 / fading.sum()
    exact = float((weighted[:, None] * visits(world) * per_state_reverse_kl(world)).sum())
    assert moments(world, term).value == pytest.approx(exact, rel=1e-6)


# --------------------------------------------------------------------------------------------
# Comparing, refusing


def test_compare_tells_direction_and_distance() -> None:
    target = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert compare(2 * target, target) == pytest.approx((1.0, 1.0))
    assert compare(torch.tensor([[-4.0, 3.0]]).double(), target) == pytest.approx((0.0, 2**0.5))
    nothing = compare(torch.zeros_like(target), target)
    assert math.isnan(nothing.cosine)
    assert nothing.relative_error == 1.0


def test_worlds_and_steps_that_cannot_be_enumerated_are_refused() -> None:
    world = WORLDS["tree"]
    term = Dense(divergence.reverse_kl)
    with pytest.raises(ValueError, match="81 responses make 531441 tuples of 3"):
        moments(world, term, samples=3)
    with pytest.raises(ValueError, match="more than 20000 responses"):
        moments(fast_chain(0, horizon=10), term)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        moments(world, term, samples=0)
    with pytest.raises(ValueError, match="needs the view 'teacher'"):
        replace(world, views={})
    with pytest.raises(ValueError, match="finite float64"):
        world.with_student(world.student_logits.float())
    with pytest.raises(ValueError, match=r"shape \[1, 3\]"):
        world.with_view(world.student_logits[:1])
    with pytest.raises(ValueError, match="lag must be >= 0"):
        lag_gradient(world, -1)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        replace(world, horizon=0)
    with pytest.raises(TypeError, match="settle it"):
        moments(world, Dense(divergence.reverse_kl, coef=Linear(0.0, 1.0, steps=3)))

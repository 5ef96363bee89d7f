"""What each estimator is unbiased for, by summing over every response of trees and chains.

The table is survey section 5.2: of the sequence reverse KL, of the local semi-gradient, of
neither. Variances are reported where they matter to a reader and never asserted to fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from . import credit, rewards
from .checks import (
    GRADIENT_BOUND,
    IDENTITY_BOUND,
    Array,
    finite_differences,
    largest,
    logit_rows,
)
from .divergences import log_softmax, reverse_kl_gradient
from .enumeration import (
    Column,
    Response,
    Tree,
    bucketed_gradient,
    cached_reward_gradient,
    exact_local_gradient,
    exact_sequence_reverse_kl_gradient,
    expected_gradient,
    expected_gradient_of_groups,
    expected_token_gradient,
    padded_group,
    residual_gradient,
    sampled_gradient,
    sequence_reverse_kl,
    token_ratios,
    value,
    values_along,
)

TREES = {
    "end": Tree.random(seed=1, end_id=0),
    "end-longer": Tree.random(seed=2, end_id=2, horizon=5),
    "no-end": Tree.random(seed=0, vocab_size=2, horizon=5),
    "fast": Tree.fast_mixing(seed=3),
    "fast-end": Tree.fast_mixing(seed=3, horizon=5, end_id=0),
    "slow": Tree.slow_mixing(seed=4),
    "absorbing": Tree.absorbing(seed=5),
    "absorbing-end": Tree.absorbing(seed=6, horizon=5, end_id=0),
}
# Per tree: the exact gradients, of the sequence reverse KL and of the local semi-gradient.
SEQUENCE = {name: exact_sequence_reverse_kl_gradient(tree) for name, tree in TREES.items()}
LOCAL = {name: exact_local_gradient(tree) for name, tree in TREES.items()}

Rows = npt.NDArray[np.bool_]
Credit = Callable[[Tree, Response], Column]


def whole(response: Response) -> list[bool]:
    return [True] * len(response)


def along(tree: Tree, response: Response, name: str) -> Array:
    """A critic that is exact, or wrong by a fixed amount per state, at each token's state."""
    exact = np.array(values_along(tree, response))
    if name == "exact":
        return exact
    error = np.random.default_rng(9).normal(size=len(tree.states))
    wrong: Array = exact + [error[tree.row(response[:t])] for t in range(len(response))]
    return wrong


def gae_of(gae_lambda: float, critic: str) -> Credit:
    def advantage(tree: Tree, y: Response) -> Column:
        values = along(tree, y, critic)
        ratios = tree.log_ratios(y)
        return credit.gae(ratios, values, 0.0, whole(y), gae_lambda=gae_lambda)

    return advantage


def immediate(tree: Tree, y: Response) -> Column:
    return credit.immediate(tree.log_ratios(y), whole(y))


def return_to_go(tree: Tree, y: Response) -> Column:
    return credit.return_to_go(tree.log_ratios(y), whole(y))


def rao_blackwell(tree: Tree, y: Response) -> Column:
    return credit.rao_blackwell(tree.log_ratios(y), tree.divergences(y), whole(y))


def damped(future_weight: float) -> Credit:
    return lambda tree, y: credit.damped_future(
        tree.log_ratios(y), tree.divergences(y), whole(y), future_weight=future_weight
    )


def next_step(tree: Tree, y: Response) -> Column:
    return credit.next_step(tree.log_ratios(y), tree.divergences(y), whole(y))


def discounted(gamma: float) -> Credit:
    return lambda tree, y: credit.discounted(tree.log_ratios(y), whole(y), gamma=gamma)


def windowed(window: int) -> Credit:
    return lambda tree, y: credit.windowed(tree.log_ratios(y), whole(y), window=window)


def minus(advantage: Credit, baseline: Callable[[Tree, Response], Array]) -> Credit:
    return lambda tree, y: np.array(advantage(tree, y)) - baseline(tree, y)


def expected_reward(tree: Tree, y: Response) -> Array:
    return credit.expected_reward(tree.divergences(y))


def wrong_value(tree: Tree, y: Response) -> Array:
    return credit.value(along(tree, y, "wrong"))


def exact_value(tree: Tree, y: Response) -> Array:
    return credit.value(along(tree, y, "exact"))


OF_SEQUENCE: dict[str, Credit] = {
    "whole reward everywhere": lambda tree, y: [sum(tree.log_ratios(y))] * len(y),
    "return-to-go": return_to_go,
    "return-to-go minus exact value": minus(return_to_go, exact_value),
    "return-to-go minus wrong value": minus(return_to_go, wrong_value),
    "return-to-go minus -D": minus(return_to_go, expected_reward),
    "rao-blackwell": rao_blackwell,
    "rao-blackwell minus exact value": minus(rao_blackwell, exact_value),
    "damped 1": damped(1.0),
    "windowed to the end": windowed(5),
    "discounted 1": discounted(1.0),
    "gae 0": gae_of(0.0, "exact"),
    "gae 0.5": gae_of(0.5, "exact"),
    "gae 0.95": gae_of(0.95, "exact"),
    "gae 1": gae_of(1.0, "exact"),
    "gae 1 with a wrong value": gae_of(1.0, "wrong"),
}
OF_LOCAL: dict[str, Credit] = {
    "immediate": immediate,
    "immediate minus -D": minus(immediate, expected_reward),
    "immediate minus wrong value": minus(immediate, wrong_value),
    "discounted 0": discounted(0.0),
    "windowed 1": windowed(1),
    "damped 0": damped(0.0),
}
OF_NEITHER: dict[str, Credit] = {
    "discounted 0.5": discounted(0.5),
    "windowed 2": windowed(2),
    "next step": next_step,
    "damped 0.5": damped(0.5),
    "length-normalised": lambda tree, y: credit.length_normalised(tree.log_ratios(y), whole(y)),
    "gae 0.5 with a wrong value": gae_of(0.5, "wrong"),
    "gae 0 with a wrong value": gae_of(0.0, "wrong"),
}


def mean_of(name: str, advantage: Credit) -> Array:
    tree = TREES[name]
    return expected_gradient(tree, lambda y: advantage(tree, y))[0]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("estimator", OF_SEQUENCE)
def test_these_are_unbiased_for_the_sequence_reverse_kl(name: str, estimator: str) -> None:
    assert largest(mean_of(name, OF_SEQUENCE[estimator]) - SEQUENCE[name]) <= IDENTITY_BOUND


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("estimator", OF_LOCAL)
def test_these_are_unbiased_for_the_local_semi_gradient(name: str, estimator: str) -> None:
    assert largest(mean_of(name, OF_LOCAL[estimator]) - LOCAL[name]) <= IDENTITY_BOUND


@pytest.mark.parametrize("name", ["end", "end-longer", "no-end", "absorbing"])
@pytest.mark.parametrize("estimator", OF_NEITHER)
def test_these_are_biased_for_both(name: str, estimator: str) -> None:
    mean = mean_of(name, OF_NEITHER[estimator])
    assert largest(mean - SEQUENCE[name]) > 1e-3
    assert largest(mean - LOCAL[name]) > 1e-3


@pytest.mark.parametrize("name", ["fast-end", "slow", "absorbing-end"])
def test_the_exact_gradients_of_chains_match_finite_differences(name: str) -> None:
    tree = TREES[name]
    rows = [tree.row(state) for state in tree.states if len(state) <= 2]

    def loss(z: Array) -> float:
        moved = tree.student_logits.copy()
        moved[rows] = z
        return sequence_reverse_kl(tree.with_student(moved))

    numeric = finite_differences(loss, tree.student_logits[rows])
    assert largest(SEQUENCE[name][rows] - numeric) <= GRADIENT_BOUND


def test_chains_depend_on_the_last_token_only() -> None:
    for name in ("fast", "fast-end", "slow", "absorbing", "absorbing-end"):
        tree = TREES[name]
        for state in tree.states:
            if len(state) > 1:
                assert np.array_equal(tree.student(state), tree.student(state[-1:]))
                assert np.array_equal(tree.teacher(state), tree.teacher(state[-1:]))


def test_chains_mix_as_their_names_say() -> None:
    def forgets(tree: Tree) -> float:
        """Largest total variation between two rows: how much the last token still tells."""
        rows = [np.exp(tree.student((token,))) for token in range(3) if token != tree.end_id]
        return max(float(np.abs(a - b).sum()) / 2 for a in rows for b in rows)

    assert forgets(TREES["fast"]) < 0.1
    assert forgets(TREES["slow"]) > 0.6
    error = TREES["absorbing"]
    assert np.exp(error.student((2,)))[2] > 0.99
    assert np.exp(error.teacher((2,)))[2] > 0.99
    assert error.divergence((2,)) == pytest.approx(0.0, abs=1e-15)
    assert np.exp(error.student(()))[2] > 0.2 > 0.05 > np.exp(error.teacher(()))[2]


def test_local_and_sequence_gradients_part_more_the_more_the_first_token_decides() -> None:
    def cosine(name: str) -> float:
        first, second = SEQUENCE[name].ravel(), LOCAL[name].ravel()
        return float(first @ second / math.sqrt((first @ first) * (second @ second)))

    assert cosine("fast") > 0.99
    assert cosine("absorbing") < 0.97
    # Nothing is left to learn locally once the error is made, and so to save by making it.
    tree = TREES["absorbing"]
    assert largest(LOCAL["absorbing"][tree.row((2,))]) <= 1e-15
    assert value(tree, (2,)) == pytest.approx(0.0, abs=0.1)
    assert value(tree, (0,)) < value(tree, (2,)) - 0.1


# --------------------------------------------------------------------------------------------
# Parts and limits


@pytest.mark.parametrize("name", TREES)
def test_an_exact_local_loss_and_scored_future_make_the_sequence_gradient(name: str) -> None:
    tree = TREES[name]
    expected_future = mean_of(
        name, lambda tree, y: credit.future([-d for d in tree.divergences(y)], whole(y))
    )
    sampled_future = mean_of(name, lambda tree, y: credit.future(tree.log_ratios(y), whole(y)))
    assert largest(LOCAL[name] + expected_future - SEQUENCE[name]) <= IDENTITY_BOUND
    assert largest(LOCAL[name] + sampled_future - SEQUENCE[name]) <= IDENTITY_BOUND
    # The state-distribution term is what the local gradient lacks, in closed form.
    term = np.zeros(tree.student_logits.shape)
    for state in tree.states:
        for token in range(tree.vocab_size):
            student = np.exp(tree.student(state))
            score = np.eye(tree.vocab_size)[token] - student
            follows = value(tree, (*state, token))
            term[tree.row(state)] -= tree.probability(state) * student[token] * follows * score
    assert largest(expected_future - term) <= IDENTITY_BOUND


@pytest.mark.parametrize("name", TREES)
def test_next_step_is_the_expectation_of_a_window_of_two(name: str) -> None:
    assert largest(mean_of(name, next_step) - mean_of(name, windowed(2))) <= IDENTITY_BOUND


@pytest.mark.parametrize("name", TREES)
def test_damping_walks_on_a_line_from_the_local_to_the_sequence_gradient(name: str) -> None:
    halfway = mean_of(name, damped(0.3))
    assert largest(halfway - (0.7 * LOCAL[name] + 0.3 * SEQUENCE[name])) <= IDENTITY_BOUND


@pytest.mark.parametrize("name", ["end", "slow", "absorbing-end"])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_gae_with_the_exact_discounted_value_is_unbiased_for_the_discounted_surrogate(
    name: str, gae_lambda: float
) -> None:
    def advantage(tree: Tree, y: Response) -> Column:
        return credit.gae(
            tree.log_ratios(y),
            values_along(tree, y, gamma=0.6),
            0.0,
            whole(y),
            gae_lambda=gae_lambda,
            gamma=0.6,
        )

    assert largest(mean_of(name, advantage) - mean_of(name, discounted(0.6))) <= IDENTITY_BOUND


def test_a_response_cut_off_is_completed_by_the_bootstrap_value_and_not_by_zero() -> None:
    whole_tree = TREES["no-end"]
    horizon = 3
    states = tuple(state for state in whole_tree.states if len(state) < horizon)
    rows = [whole_tree.row(state) for state in states]
    short = Tree(
        2,
        horizon,
        None,
        states,
        whole_tree.student_logits[rows],
        whole_tree.teacher_logits[rows],
    )

    def advantage(y: Response, bootstrap: bool) -> Column:
        values = [value(whole_tree, y[:t]) for t in range(len(y))]
        rest = value(whole_tree, y) if bootstrap else 0.0
        return credit.gae(short.log_ratios(y), values, rest, whole(y), gae_lambda=0.7)

    exact = SEQUENCE["no-end"][rows]
    assert largest(expected_gradient(short, lambda y: advantage(y, True))[0] - exact) <= 1e-12
    assert largest(expected_gradient(short, lambda y: advantage(y, False))[0] - exact) > 1e-3


@pytest.mark.parametrize("name", ["end", "fast-end", "absorbing-end"])
def test_an_equal_teacher_credits_nothing(name: str) -> None:
    tree = TREES[name].with_student(TREES[name].teacher_logits)
    for advantage in (*OF_SEQUENCE.values(), *OF_LOCAL.values(), *OF_NEITHER.values()):
        if advantage in (
            OF_SEQUENCE["return-to-go minus wrong value"],
            OF_SEQUENCE["gae 1 with a wrong value"],
            OF_LOCAL["immediate minus wrong value"],
            OF_NEITHER["gae 0.5 with a wrong value"],
            OF_NEITHER["gae 0 with a wrong value"],
        ):
            continue
        for y in tree.responses():
            assert largest(np.array(advantage(tree, y))) <= 1e-15


# --------------------------------------------------------------------------------------------
# Baselines over other responses


TINY = Tree.random(seed=7, vocab_size=2, horizon=3, end_id=1)


def batched(
    baseline: Callable[[Array, Rows], Array] | None,
) -> Callable[[tuple[Response, ...]], Sequence[Column]]:
    def advantages(group: tuple[Response, ...]) -> Sequence[Column]:
        credited, mask = padded_group(group, [return_to_go(TINY, y) for y in group])
        if baseline is not None:
            credited = credited - baseline(credited, mask)
        return [credited[b, : len(y)] for b, y in enumerate(group)]

    return advantages


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "baseline",
    [
        credit.position_mean,
        credit.column_mean,
        credit.batch_mean,
        lambda credited, mask: credit.group_mean(credited, mask, [4] * len(mask)),
        lambda credited, mask: credit.group_mean(credited, mask, [4, 4, 1][: len(mask)]),
    ],
)
def test_leaving_the_own_response_out_of_a_mean_changes_no_expectation(
    baseline: Callable[[Array, Rows], Array], size: int
) -> None:
    plain, variance = expected_gradient_of_groups(TINY, batched(None), size=size)
    single, single_variance = expected_gradient(TINY, lambda y: return_to_go(TINY, y))
    assert largest(plain - single) <= 1e-14
    assert variance == pytest.approx(single_variance / size)
    assert largest(plain - exact_sequence_reverse_kl_gradient(TINY)) <= 1e-14
    mean, changed = expected_gradient_of_groups(TINY, batched(baseline), size=size)
    assert largest(mean - plain) <= 1e-14
    assert abs(changed - variance) > 1e-3


def test_counting_the_own_response_in_the_mean_does_change_the_expectation() -> None:
    def own_included(credited: Array, mask: Rows) -> Array:
        return np.full(credited.shape, credited[mask].mean())

    plain, _ = expected_gradient_of_groups(TINY, batched(None))
    mean, _ = expected_gradient_of_groups(TINY, batched(own_included))
    assert largest(mean - plain) > 1e-3


# --------------------------------------------------------------------------------------------
# Text written by an older student


@pytest.mark.parametrize("name", ["end", "slow"])
def test_token_importance_is_exact_for_the_local_gradient_at_the_writers_states(name: str) -> None:
    tree = TREES[name]
    noise = np.random.default_rng(1).normal(size=tree.student_logits.shape)
    older = tree.with_student(tree.student_logits + 0.5 * noise)

    def weighted(y: Response) -> list[float]:
        ratios = token_ratios(tree, older, y)
        return [w * r for w, r in zip(ratios, tree.log_ratios(y), strict=True)]

    local = exact_local_gradient(tree, behaviour=older)
    mean, _ = expected_gradient(tree, weighted, behaviour=older)
    assert largest(mean - local) <= IDENTITY_BOUND
    plain, _ = expected_gradient(tree, tree.log_ratios, behaviour=older)
    assert largest(plain - local) > 1e-3
    assert largest(local - LOCAL[name]) > 1e-3

    def sequence_weighted(y: Response) -> list[float]:
        weight = math.prod(token_ratios(tree, older, y))
        return [weight * a for a in return_to_go(tree, y)]

    mean, _ = expected_gradient(tree, sequence_weighted, behaviour=older)
    assert largest(mean - SEQUENCE[name]) <= IDENTITY_BOUND


@pytest.mark.parametrize("seed", range(3))
def test_a_cached_log_ratio_adds_the_old_student_as_a_second_objective(seed: int) -> None:
    logits, teacher_logits = logit_rows(seed)
    old_logits = logits + np.random.default_rng(seed).normal(size=5)
    student, teacher, old = (log_softmax(z) for z in (logits, teacher_logits, old_logits))
    cached = rewards.cached_log_ratio(teacher, old)
    mean, _ = expected_token_gradient(
        logits, lambda token: sampled_gradient(logits, token, cached[token])
    )
    expected = cached_reward_gradient(logits, teacher_logits, old_logits)
    assert largest(mean - expected) <= IDENTITY_BOUND
    local = reverse_kl_gradient(student, teacher)
    assert largest(expected - local) > 1e-2
    # The first step is the right one: there the second objective rests.
    assert largest(cached_reward_gradient(logits, teacher_logits, logits) - local) <= 1e-15
    # It has no optimum but a corner: where the student is the teacher it still moves.
    assert largest(cached_reward_gradient(teacher_logits, teacher_logits, old_logits)) > 1e-2


# --------------------------------------------------------------------------------------------
# One state, one token


@pytest.mark.parametrize("support", [[0, 2], [4, 1, 3], [3], [0, 1, 2, 3, 4], []], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_tail_residual_completes_the_bucket_to_the_full_reverse_kl(
    seed: int, support: list[int]
) -> None:
    logits, teacher_logits = logit_rows(seed)
    exact = reverse_kl_gradient(log_softmax(logits), log_softmax(teacher_logits))
    mean, variance = expected_token_gradient(
        logits, lambda token: residual_gradient(logits, teacher_logits, token, support)
    )
    assert largest(mean - exact) <= IDENTITY_BOUND
    assert variance >= -1e-12
    inside = [t for t in range(5) if t in support]
    for token in inside:
        own = residual_gradient(logits, teacher_logits, token, support)
        assert largest(own - bucketed_gradient(logits, teacher_logits, support)) <= 1e-14
    if not support:
        # With everything in the tail the residual is the plain sampled estimator.
        for token in range(5):
            ratio = float(log_softmax(teacher_logits)[token] - log_softmax(logits)[token])
            own = residual_gradient(logits, teacher_logits, token, support)
            assert largest(own - sampled_gradient(logits, token, ratio)) <= 1e-13


def test_the_negative_of_k3_is_no_reward_for_the_reverse_kl() -> None:
    logits, teacher_logits = logit_rows(4)
    student, teacher = log_softmax(logits), log_softmax(teacher_logits)
    ratio = teacher - student
    mean, _ = expected_token_gradient(
        logits,
        lambda token: sampled_gradient(
            logits, token, -(math.exp(ratio[token]) - 1 - float(ratio[token]))
        ),
    )
    exact = reverse_kl_gradient(student, teacher)
    cosine = float(mean @ exact / math.sqrt((mean @ mean) * (exact @ exact)))
    assert cosine < 0.99

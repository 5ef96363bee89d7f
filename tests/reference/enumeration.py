"""The enumeration oracle: a tree of states small enough to sum over every response.

Student and teacher are tables: one row of logits per state, a state being the tokens chosen so
far. A response ends with the end token, which is an ordinary action, or at the horizon. So every
expectation over responses is a finite sum, and what an estimator is unbiased for can be checked
to rounding.

Gradients are those of a loss, with respect to the student's table: one row of V numbers per
state. The policy-gradient update of the literature, sum over t of advantage * score, is minus
the gradient of the loss -sum over t of advantage * log student(token).

Source: survey of on-policy distillation, arXiv:2606.22793, Eqs. 3-8 and 15-20.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from opd.types import Provenance

from .divergences import (
    Row,
    gradient_by_tail,
    log_mass_outside,
    log_softmax,
    reverse_kl,
    reverse_kl_gradient,
    reverse_kl_log_slope,
)
from .routing import exact_transfer

State = tuple[int, ...]
Response = tuple[int, ...]
Table = npt.NDArray[np.float64]
Column = Sequence[float] | Row
AdvantageFn = Callable[[Response], Column]
JointAdvantageFn = Callable[[tuple[Response, ...]], Sequence[Column]]
TokenGradientFn = Callable[[int], Row]


@dataclass(frozen=True, eq=False)
class Tree:
    """All responses over a small vocabulary, up to a horizon, with tabular student and teacher.

    Attributes:
        vocab_size: V.
        horizon: the longest response, in tokens.
        end_id: the token that ends a response; None where only the horizon does.
        states: every state a token is chosen in; the order of the tables' rows.
        student_logits, teacher_logits: `[states, V]`.
    """

    vocab_size: int
    horizon: int
    end_id: int | None
    states: tuple[State, ...]
    student_logits: Table
    teacher_logits: Table

    @classmethod
    def random(
        cls, *, seed: int, vocab_size: int = 3, horizon: int = 4, end_id: int | None = None
    ) -> Tree:
        """Independent normal logits, the teacher's 1.5 times as wide."""
        generator = np.random.default_rng(seed)
        states = _states(vocab_size, horizon, end_id)
        shape = (len(states), vocab_size)
        student = generator.normal(size=shape)
        teacher = 1.5 * generator.normal(size=shape)
        return cls(vocab_size, horizon, end_id, states, student, teacher)

    @classmethod
    def markov(
        cls,
        student_rows: npt.ArrayLike,
        teacher_rows: npt.ArrayLike,
        *,
        horizon: int = 4,
        end_id: int | None = None,
    ) -> Tree:
        """Logits that depend on the last token only, though each state has a row of its own.

        `student_rows` and `teacher_rows` are `[V + 1, V]`: one row per last token, then the row
        of the state before any.
        """
        student = np.asarray(student_rows, dtype=np.float64)
        teacher = np.asarray(teacher_rows, dtype=np.float64)
        vocab_size = student.shape[1]
        states = _states(vocab_size, horizon, end_id)
        last = [state[-1] if state else vocab_size for state in states]
        return cls(vocab_size, horizon, end_id, states, student[last], teacher[last])

    @classmethod
    def fast_mixing(cls, *, seed: int, horizon: int = 4, end_id: int | None = None) -> Tree:
        """A Markov chain that all but forgets its last token: rows differ by 0.2 at most."""
        generator = np.random.default_rng(seed)
        common = generator.normal(size=(2, 1, 3))
        rows = common + 0.1 * generator.uniform(-1, 1, size=(2, 4, 3))
        return cls.markov(rows[0], rows[1], horizon=horizon, end_id=end_id)

    @classmethod
    def slow_mixing(cls, *, seed: int, horizon: int = 4) -> Tree:
        """A Markov chain that repeats its last token about nine times in ten, student and teacher.

        They differ in where they start and in how sticky each token is.
        """
        generator = np.random.default_rng(seed)
        rows = 0.5 * generator.normal(size=(2, 4, 3))
        for token in range(3):
            rows[:, token, token] += 3.0
        rows[1, 3] += [1.0, 0.0, -1.0]
        return cls.markov(rows[0], rows[1], horizon=horizon)

    @classmethod
    def absorbing(cls, *, seed: int, horizon: int = 4, end_id: int | None = None) -> Tree:
        """A Markov chain with an error, token 2: hard to leave for the student and the teacher.

        The student makes it often and the teacher hardly ever, but after it the two agree: no
        local signal is left, and the teacher cannot recover.
        """
        generator = np.random.default_rng(seed)
        rows = 0.5 * generator.normal(size=(2, 4, 3))
        rows[:, 2] = [-3.0, -3.0, 3.0]
        for state in (0, 1, 3):
            rows[0, state, 2] = 0.0
            rows[1, state, 2] = -4.0
        return cls.markov(rows[0], rows[1], horizon=horizon, end_id=end_id)

    def with_student(self, student_logits: npt.ArrayLike) -> Tree:
        """The same tree and teacher with another student."""
        table = np.asarray(student_logits, dtype=np.float64)
        return Tree(
            self.vocab_size, self.horizon, self.end_id, self.states, table, self.teacher_logits
        )

    def row(self, state: State) -> int:
        """The row of a state in the tables."""
        return self._rows[state]

    def student(self, state: State) -> Row:
        """The student's log-probabilities at a state."""
        return self._student_log_probs[self.row(state)]

    def teacher(self, state: State) -> Row:
        """The teacher's log-probabilities at a state."""
        return self._teacher_log_probs[self.row(state)]

    @cached_property
    def _rows(self) -> dict[State, int]:
        return {state: row for row, state in enumerate(self.states)}

    @cached_property
    def _student_log_probs(self) -> list[Row]:
        return [log_softmax(logits) for logits in self.student_logits]

    @cached_property
    def _teacher_log_probs(self) -> list[Row]:
        return [log_softmax(logits) for logits in self.teacher_logits]

    def ended(self, state: State) -> bool:
        """Whether no further token follows."""
        return len(state) == self.horizon or (len(state) > 0 and state[-1] == self.end_id)

    def responses(self) -> list[Response]:
        """Every response, each exactly once."""
        finished: list[Response] = []

        def extend(state: State) -> None:
            if self.ended(state):
                finished.append(state)
                return
            for token in range(self.vocab_size):
                extend((*state, token))

        extend(())
        return finished

    def student_logp(self, response: Response) -> list[float]:
        """log student(token) for each token of a response."""
        return [float(self.student(response[:t])[response[t]]) for t in range(len(response))]

    def teacher_logp(self, response: Response) -> list[float]:
        """log teacher(token) for each token of a response."""
        return [float(self.teacher(response[:t])[response[t]]) for t in range(len(response))]

    def probability(self, response: Response) -> float:
        """The student's probability of a response, or of reaching a state."""
        return math.exp(math.fsum(self.student_logp(response)))

    def log_ratios(self, response: Response) -> list[float]:
        """The reward of each token, log teacher - log student. Source: Eqs. 5 and 11."""
        pairs = zip(self.teacher_logp(response), self.student_logp(response), strict=True)
        return [teacher - student for teacher, student in pairs]

    def divergence(self, state: State) -> float:
        """D(state) = KL(student || teacher) of the next token."""
        return reverse_kl(self.student(state), self.teacher(state))

    def divergences(self, response: Response) -> list[float]:
        """D of the state each token of a response was chosen in."""
        return [self.divergence(response[:t]) for t in range(len(response))]


def _states(vocab_size: int, horizon: int, end_id: int | None) -> tuple[State, ...]:
    states: list[State] = [()]
    longest: list[State] = [()]
    for _ in range(horizon - 1):
        longest = [
            (*state, token) for state in longest for token in range(vocab_size) if token != end_id
        ]
        states.extend(longest)
    return tuple(states)


# --------------------------------------------------------------------------------------------
# Exact objectives and their gradients


def value(tree: Tree, state: State) -> float:
    """The student's expected sum of rewards from a state on; 0 once ended, never positive.

    V(state) = -D(state) + sum over tokens of student(token) * V(state + token).

    Source: arXiv:2606.22793, Eq. 21.
    """
    if tree.ended(state):
        return 0.0
    total = -tree.divergence(state)
    student = tree.student(state)
    for token in range(tree.vocab_size):
        total += math.exp(student[token]) * value(tree, (*state, token))
    return total


def discounted_value(tree: Tree, state: State, *, gamma: float) -> float:
    """The student's expected sum of gamma^l times the l-th reward from a state on."""
    if tree.ended(state):
        return 0.0
    total = -tree.divergence(state)
    student = tree.student(state)
    for token in range(tree.vocab_size):
        following = discounted_value(tree, (*state, token), gamma=gamma)
        total += gamma * math.exp(student[token]) * following
    return total


def values_along(tree: Tree, response: Response, *, gamma: float = 1.0) -> list[float]:
    """The exact value of the state each token of a response was chosen in."""
    return [discounted_value(tree, response[:t], gamma=gamma) for t in range(len(response))]


def sequence_reverse_kl(tree: Tree) -> float:
    """KL over whole responses: sum of student(y) * (log student(y) - log teacher(y)).

    Source: arXiv:2606.22793, Eq. 3.
    """
    total = 0.0
    for response in tree.responses():
        total -= tree.probability(response) * math.fsum(tree.log_ratios(response))
    return total


def exact_sequence_reverse_kl_gradient(tree: Tree) -> Table:
    """Gradient of `sequence_reverse_kl`, state distribution included.

    sum over y of student(y) * (log student(y) - log teacher(y) + 1) * grad log student(y)

    Source: arXiv:2606.22793, Eq. 4.
    """
    gradient = np.zeros(tree.student_logits.shape)
    for response in tree.responses():
        weight = tree.probability(response) * (1.0 - math.fsum(tree.log_ratios(response)))
        for t in range(len(response)):
            gradient[tree.row(response[:t])] += weight * _score(tree, response, t)
    return gradient


def exact_local_gradient(tree: Tree, *, behaviour: Tree | None = None) -> Table:
    """Gradient of sum over states of Pr(state) * D(state) with Pr held fixed.

    Per state Pr(state) * student(j) * (log(student(j) / teacher(j)) - D(state)): what per-token
    reverse KL on the student's own text descends. `behaviour` is the tree whose student wrote the
    text, if it is another.

    Source: arXiv:2606.22793, Eqs. 7 and 16.
    """
    gradient = np.zeros(tree.student_logits.shape)
    for state in tree.states:
        student, teacher = tree.student(state), tree.teacher(state)
        divergence = tree.divergence(state)
        reached = (behaviour or tree).probability(state)
        for j in range(tree.vocab_size):
            gradient[tree.row(state)][j] = (
                reached * math.exp(student[j]) * (student[j] - teacher[j] - divergence)
            )
    return gradient


# --------------------------------------------------------------------------------------------
# Estimators


def expected_gradient(
    tree: Tree, advantage_fn: AdvantageFn, *, behaviour: Tree | None = None
) -> tuple[Table, float]:
    """Mean and total variance of the gradient of -sum over t of advantage(t) * log student(token).

    One response is one sample. The advantage is held fixed: it is a number per token.

    Args:
        tree: whose student is trained.
        advantage_fn: from a response of n tokens to its n advantages.
        behaviour: the tree whose student writes the responses; the same where left out.

    Returns:
        The exact mean `[states, V]`, and the sum of the variances of its entries.

    Source: arXiv:2606.22793, Eqs. 9 and 10.
    """
    mean = np.zeros(tree.student_logits.shape)
    mean_square = 0.0
    writer = behaviour or tree
    for response in tree.responses():
        probability = writer.probability(response)
        sample = _sample_gradient(tree, response, advantage_fn(response))
        mean += probability * sample
        mean_square += probability * float((sample * sample).sum())
    return mean, mean_square - float((mean * mean).sum())


def expected_gradient_of_groups(
    tree: Tree, advantage_fn: JointAdvantageFn, *, size: int = 2
) -> tuple[Table, float]:
    """`expected_gradient` where `size` independent responses are one sample, averaged.

    Every ordered group of responses is visited: for trees with a handful of them.

    Args:
        tree: where responses come from.
        advantage_fn: from the responses of a group to the advantages of each one's tokens.
        size: how many responses there are to a group.

    Returns:
        The exact mean `[states, V]` of the group's mean gradient, and its total variance.
    """
    mean = np.zeros(tree.student_logits.shape)
    mean_square = 0.0
    for group in itertools.product(tree.responses(), repeat=size):
        probability = math.prod(tree.probability(response) for response in group)
        advantages = advantage_fn(group)
        sample = np.zeros(tree.student_logits.shape)
        for response, advantage in zip(group, advantages, strict=True):
            sample += _sample_gradient(tree, response, advantage) / size
        mean += probability * sample
        mean_square += probability * float((sample * sample).sum())
    return mean, mean_square - float((mean * mean).sum())


def padded_group(
    group: Sequence[Response], columns: Sequence[Column]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Numbers per token of a group as `[B, T]` with their mask, padded on the right with nan."""
    shape = (len(group), max(len(response) for response in group))
    numbers, mask = np.full(shape, math.nan), np.zeros(shape, np.bool_)
    for b, response in enumerate(group):
        for t in range(len(response)):
            numbers[b, t], mask[b, t] = columns[b][t], True
    return numbers, mask


def token_ratios(tree: Tree, behaviour: Tree, response: Response) -> list[float]:
    """student(token) / behaviour(token) for each token of a response."""
    pairs = zip(tree.student_logp(response), behaviour.student_logp(response), strict=True)
    return [math.exp(student - written) for student, written in pairs]


# --------------------------------------------------------------------------------------------
# Estimators of one state from one token


def expected_token_gradient(
    student_logits: npt.ArrayLike, gradient_fn: TokenGradientFn
) -> tuple[Row, float]:
    """Mean and total variance of a gradient over the student's own next token."""
    student = log_softmax(student_logits)
    mean, mean_square = np.zeros(len(student)), 0.0
    for token in range(len(student)):
        sample = gradient_fn(token)
        mean += math.exp(student[token]) * sample
        mean_square += math.exp(student[token]) * float((sample * sample).sum())
    return mean, mean_square - float((mean * mean).sum())


def sampled_gradient(student_logits: npt.ArrayLike, token: int, advantage: float) -> Row:
    """-advantage * score(token): what a sampled token descends."""
    student = log_softmax(student_logits)
    return -advantage * _token_score(student, token)


def residual_gradient(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    token: int,
    support: Sequence[int],
) -> Row:
    """ResOPD's gradient from one token, with r(v) = log(student(v) / teacher(v)):

        sum over v in S of student(v) r(v) grad log student(v) + student(tail) mu
        + [token not in S] (r(token) grad log student(token) - mu)
        mu = log(student(tail) / teacher(tail)) grad log student(tail)

    The first line is the reverse KL's with a tail bucket; the second has the expectation of what
    the bucket hides.

    Source: arXiv:2610.04882.
    """
    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    student_tail = log_mass_outside(student, support)
    outside = [v for v in range(len(student)) if v not in support]
    tail_score = np.zeros(len(student))
    for v in outside:
        tail_score += math.exp(student[v] - student_tail) * _token_score(student, v)
    bucket = np.zeros(len(student))
    if outside:
        bucket = (student_tail - log_mass_outside(teacher, support)) * tail_score
    gradient = math.exp(student_tail) * bucket
    for v in support:
        ratio = student[v] - teacher[v]
        gradient += math.exp(student[v]) * ratio * _token_score(student, v)
    if token in outside:
        gradient += (student[token] - teacher[token]) * _token_score(student, token) - bucket
    return gradient


def bucketed_gradient(
    student_logits: npt.ArrayLike, teacher_logits: npt.ArrayLike, support: Sequence[int]
) -> Row:
    """The gradient of the reverse KL with a tail bucket: ResOPD without its residual."""
    return gradient_by_tail(
        reverse_kl_log_slope,
        log_softmax(student_logits),
        log_softmax(teacher_logits),
        support,
        tail="bucket",
    )


def expected_routed_gradient(
    student_logits: npt.ArrayLike, teacher_logits: npt.ArrayLike
) -> tuple[Row, float]:
    """`exact_transfer` over the student's own next token."""
    return expected_token_gradient(
        student_logits, lambda token: exact_transfer(student_logits, teacher_logits, token)
    )


def cached_reward_gradient(
    student_logits: npt.ArrayLike, teacher_logits: npt.ArrayLike, old_logits: npt.ArrayLike
) -> Row:
    """What a cached log-ratio, log teacher - log old, descends on the student's tokens.

    grad KL(student || teacher) - grad KL(student || old), and 0 for the second where they agree.

    Source: arXiv:2606.22793, Eqs. 24-27, worked out.
    """
    student = log_softmax(student_logits)
    return reverse_kl_gradient(student, log_softmax(teacher_logits)) - reverse_kl_gradient(
        student, log_softmax(old_logits)
    )


@dataclass(frozen=True)
class Estimator:
    """An estimator of one state's reverse KL from one token: exact expectations.

    Attributes:
        value: of the estimator, over the student's own tokens.
        gradient: of the estimator differentiated as it stands, log-ratio live, token fixed.
    """

    value: float
    gradient: Row


def k1(student_logits: npt.ArrayLike, teacher_logits: npt.ArrayLike) -> Estimator:
    """k1 = -r, r = log teacher(token) - log student(token). d k1 = score.

    Unbiased value; the gradient's expectation is 0 and the teacher is not in it.

    Source: Schulman, "Approximating KL Divergence" (blog, 2020).
    """
    return _estimate(student_logits, teacher_logits, lambda r: -r, lambda _: 1.0)


def k2(student_logits: npt.ArrayLike, teacher_logits: npt.ArrayLike) -> Estimator:
    """k2 = r^2 / 2. d k2 = -r * score.

    Biased value; the gradient's expectation is that of the reverse KL.

    Source: Schulman, "Approximating KL Divergence" (blog, 2020).
    """
    return _estimate(student_logits, teacher_logits, lambda r: 0.5 * r * r, lambda r: -r)


def k3(student_logits: npt.ArrayLike, teacher_logits: npt.ArrayLike) -> Estimator:
    """k3 = exp(r) - 1 - r. d k3 = (1 - exp(r)) * score.

    Unbiased value; the gradient's expectation is that of the *forward* KL.

    Source: Schulman, "Approximating KL Divergence" (blog, 2020).
    """
    return _estimate(
        student_logits, teacher_logits, lambda r: math.exp(r) - 1 - r, lambda r: 1 - math.exp(r)
    )


def _estimate(
    student_logits: npt.ArrayLike,
    teacher_logits: npt.ArrayLike,
    value_of: Callable[[float], float],
    score_weight: Callable[[float], float],
) -> Estimator:
    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    expected, gradient = 0.0, np.zeros(len(student))
    for token in range(len(student)):
        probability = math.exp(student[token])
        log_ratio = float(teacher[token] - student[token])
        expected += probability * value_of(log_ratio)
        for j in range(len(student)):
            score = (1.0 if j == token else 0.0) - math.exp(student[j])
            gradient[j] += probability * score_weight(log_ratio) * score
    return Estimator(expected, gradient)


# --------------------------------------------------------------------------------------------
# Every response as one padded batch


@dataclass(frozen=True, eq=False)
class PaddedResponses:
    """Every response of a tree as the rows of one batch, each with its probability.

    A per-response loss or gradient, weighted with `probability` and summed, is its exact
    expectation. `state_row[b, t]` is the row of the tables behind a logit row; -1 on padding.
    """

    tokens: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    provenance: npt.NDArray[np.int64]
    student_logits: npt.NDArray[np.float64]
    teacher_logits: npt.NDArray[np.float64]
    state_row: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]

    def expectation(self, row_gradient: npt.NDArray[np.float64], tree: Tree) -> Table:
        """Probability-weighted sum of `[B, T, V]` row gradients, gathered per state."""
        gradient = np.zeros(tree.student_logits.shape)
        for b in range(self.tokens.shape[0]):
            for t in range(self.tokens.shape[1]):
                if self.mask[b, t]:
                    gradient[self.state_row[b, t]] += self.probability[b] * row_gradient[b, t]
        return gradient


def padded_responses(tree: Tree) -> PaddedResponses:
    """All responses of a tree, written by the student, padded on the right with token 0."""
    responses = tree.responses()
    shape = (len(responses), tree.horizon)
    tokens, state_row = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    mask, provenance = np.zeros(shape, np.bool_), np.full(shape, int(Provenance.PADDING))
    student_logits = np.zeros((*shape, tree.vocab_size))
    teacher_logits = np.zeros((*shape, tree.vocab_size))
    for b, response in enumerate(responses):
        for t in range(len(response)):
            row = tree.row(response[:t])
            tokens[b, t], state_row[b, t] = response[t], row
            mask[b, t], provenance[b, t] = True, int(Provenance.STUDENT)
            student_logits[b, t] = tree.student_logits[row]
            teacher_logits[b, t] = tree.teacher_logits[row]
    probability = np.array([tree.probability(response) for response in responses])
    return PaddedResponses(
        tokens, mask, provenance, student_logits, teacher_logits, state_row, probability
    )


def _sample_gradient(tree: Tree, response: Response, advantage: Column) -> Table:
    if len(advantage) != len(response):
        raise ValueError(f"{len(response)} tokens need as many advantages, not {advantage}")
    sample = np.zeros(tree.student_logits.shape)
    for t in range(len(response)):
        sample[tree.row(response[:t])] -= advantage[t] * _score(tree, response, t)
    return sample


def _score(tree: Tree, response: Response, t: int) -> Row:
    """d log student(response[t]) / d logits of its state."""
    return _token_score(tree.student(response[:t]), response[t])


def _token_score(student_log_probs: Row, token: int) -> Row:
    return np.array(
        [
            (1.0 if j == token else 0.0) - math.exp(student_log_probs[j])
            for j in range(len(student_log_probs))
        ]
    )

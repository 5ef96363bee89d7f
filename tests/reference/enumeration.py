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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from opd.types import Provenance

from .divergences import Row, log_softmax, reverse_kl

State = tuple[int, ...]
Response = tuple[int, ...]
Table = npt.NDArray[np.float64]
AdvantageFn = Callable[[Response], Sequence[float]]


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

    def with_student(self, student_logits: npt.ArrayLike) -> Tree:
        """The same tree and teacher with another student."""
        table = np.asarray(student_logits, dtype=np.float64)
        return Tree(
            self.vocab_size, self.horizon, self.end_id, self.states, table, self.teacher_logits
        )

    def row(self, state: State) -> int:
        """The row of a state in the tables."""
        return self.states.index(state)

    def student(self, state: State) -> Row:
        """The student's log-probabilities at a state."""
        return log_softmax(self.student_logits[self.row(state)])

    def teacher(self, state: State) -> Row:
        """The teacher's log-probabilities at a state."""
        return log_softmax(self.teacher_logits[self.row(state)])

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


def exact_local_gradient(tree: Tree) -> Table:
    """Gradient of sum over states of Pr(state) * D(state) with Pr held fixed.

    Per state Pr(state) * student(j) * (log(student(j) / teacher(j)) - D(state)): what per-token
    reverse KL on the student's own text descends.

    Source: arXiv:2606.22793, Eqs. 7 and 16.
    """
    gradient = np.zeros(tree.student_logits.shape)
    for state in tree.states:
        student, teacher = tree.student(state), tree.teacher(state)
        divergence = tree.divergence(state)
        reached = tree.probability(state)
        for j in range(tree.vocab_size):
            gradient[tree.row(state)][j] = (
                reached * math.exp(student[j]) * (student[j] - teacher[j] - divergence)
            )
    return gradient


# --------------------------------------------------------------------------------------------
# Estimators


def expected_gradient(tree: Tree, advantage_fn: AdvantageFn) -> tuple[Table, float]:
    """Mean and total variance of the gradient of -sum over t of advantage(t) * log student(token).

    One response is one sample. The advantage is held fixed: it is a number per token.

    Args:
        tree: where responses come from.
        advantage_fn: from a response of n tokens to its n advantages.

    Returns:
        The exact mean `[states, V]`, and the sum of the variances of its entries.

    Source: arXiv:2606.22793, Eqs. 9 and 10.
    """
    mean = np.zeros(tree.student_logits.shape)
    mean_square = 0.0
    for response in tree.responses():
        probability = tree.probability(response)
        advantage = advantage_fn(response)
        if len(advantage) != len(response):
            raise ValueError(f"{len(response)} tokens need as many advantages, not {advantage}")
        sample = np.zeros(tree.student_logits.shape)
        for t in range(len(response)):
            sample[tree.row(response[:t])] -= advantage[t] * _score(tree, response, t)
        mean += probability * sample
        mean_square += probability * float((sample * sample).sum())
    return mean, mean_square - float((mean * mean).sum())


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


def _score(tree: Tree, response: Response, t: int) -> Row:
    """d log student(response[t]) / d logits of its state."""
    student = tree.student(response[:t])
    return np.array(
        [(1.0 if j == response[t] else 0.0) - math.exp(student[j]) for j in range(tree.vocab_size)]
    )

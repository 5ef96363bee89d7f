"""What a loss descends on worlds small enough to sum over: every token of every state, weighed.

A `Toy` is a handful of states without a future: for losses that look at one row at a time. For
losses that look along the response there is a tree, every response of which is called.

Axes: S states, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from opd.audit.loss import Loss, Rows, Writer, derivatives
from opd.audit.worlds import World, random_tree

__all__ = [
    "ORDINARY",
    "ORDINARY_ROWS",
    "REGIMES",
    "SURER_ROWS",
    "Expected",
    "Toy",
    "expected",
    "of_tree",
    "rows_of",
    "tree",
]

VOCABULARY = 8
STATES = 6
HORIZON = 3
TREE_VOCABULARY = 4


@dataclass(frozen=True, eq=False)
class Toy:
    """States of equal weight. Float64 logits."""

    student: Float[Tensor, "S V"]
    teacher: Float[Tensor, "S V"]

    def at_teacher(self) -> Toy:
        """The student where its teacher is."""
        return Toy(self.teacher, self.teacher)


@dataclass(frozen=True, eq=False)
class Expected:
    """A loss summed over every token of a toy, weighed with the probability of writing it.

    Attributes:
        gradient: of the expectation, the distribution of the tokens held fixed.
        value: the expectation at every state.
        pieces: the gradient with respect to a state's logits where the token is v, `[S, V, V]`.
        weights: the probability of writing it.
    """

    gradient: Float[Tensor, "S V"]
    value: Float[Tensor, " S"]
    pieces: Float[Tensor, "S V V"]
    weights: Float[Tensor, "S V"]

    @property
    def size(self) -> float:
        """What a gradient measures before anything cancels: the mean length of the pieces."""
        return float((self.weights * self.pieces.norm(dim=-1)).sum())

    @property
    def dead(self) -> float:
        """The share of rows that have no gradient at all."""
        return float((self.pieces.abs().amax(-1) == 0).double().mean())


def expected(
    loss: Loss,
    toy: Toy,
    *,
    temperature: float = 1.0,
    writer: Writer = "student",
    behaviour: Float[Tensor, "S V"] | None = None,
    batched: bool = False,
) -> Expected:
    """Sum a loss over a toy; one call per row, so that no other row and no mean is in it.

    Args:
        batched: one call on all rows, of a loss that looks at single rows: what it returns as one
            number is then all rows', and gradients have the factor of its mean.
        behaviour: logits of a policy that wrote the tokens in the `writer`'s place, and that the
            loss is told of.
    """
    states, vocabulary = toy.student.shape
    source = toy.student if writer == "student" else toy.teacher
    weights = ((source if behaviour is None else behaviour) / temperature).softmax(-1)
    rows = rows_of(toy, loss.dtype, temperature=temperature)
    if behaviour is not None:
        rows = replace(rows, old_logp=weights.log().flatten().to(loss.dtype))
    places = torch.arange(len(rows.tokens))
    each = [places] if batched else list(places[:, None])
    found = derivatives(loss, [rows.at(some) for some in each])
    pieces = torch.cat([one.student for one in found]).double()
    pieces = pieces.view(states, vocabulary, vocabulary)
    value = torch.cat([one.value.double().flatten() for one in found])
    values = value.expand(len(rows.tokens)).view(states, vocabulary)
    return Expected(
        gradient=(weights[..., None] * pieces).sum(1),
        value=(weights * values).sum(1),
        pieces=pieces,
        weights=weights,
    )


def rows_of(toy: Toy, dtype: torch.dtype, *, temperature: float = 1.0) -> Rows:
    """Every token at every state, `[S V]` rows."""
    states, vocabulary = toy.student.shape
    return Rows(
        student=toy.student.repeat_interleave(vocabulary, 0).to(dtype),
        teacher=toy.teacher.repeat_interleave(vocabulary, 0).to(dtype),
        tokens=torch.arange(vocabulary).repeat(states),
        mask=torch.ones(states * vocabulary, dtype=torch.bool),
        temperature=temperature,
    )


# --------------------------------------------------------------------------------------------
# Regimes


def _normal(seed: int, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(STATES, VOCABULARY, generator=draw, dtype=torch.float64)


def _ordinary() -> Toy:
    return Toy(_normal(0), _normal(1, 1.5))


def _under_covered() -> Toy:
    """The student likes tokens that the teacher gives e^-18 of its odds."""
    student, teacher = _normal(2), _normal(3)
    liked = torch.zeros(STATES, VOCABULARY, dtype=torch.float64)
    liked[torch.arange(STATES), torch.arange(STATES) % VOCABULARY] = 1.0
    return Toy(student + 2.0 * liked, teacher - 18.0 * liked)


def _far() -> Toy:
    """What the teacher prefers, half of the vocabulary, the student gives e^-16 of its odds."""
    student, teacher = _normal(4), _normal(5)
    preferred = torch.zeros(STATES, VOCABULARY, dtype=torch.float64)
    places = (torch.arange(STATES)[:, None] + torch.arange(VOCABULARY // 2)) % VOCABULARY
    preferred.scatter_(1, places, 1.0)
    return Toy(student - 16.0 * preferred, teacher + 6.0 * preferred)


def _over_covered() -> Toy:
    """The student is a sharper teacher: what the teacher likes it likes more."""
    teacher = _normal(6)
    return Toy(2.0 * teacher + _normal(7, 0.1), teacher)


ORDINARY = _ordinary()
ORDINARY_ROWS = "ordinary rows"
SURER_ROWS = "rows where the student is surer than its teacher"
REGIMES = {
    ORDINARY_ROWS: ORDINARY,
    "rows where the teacher nearly excludes what the student writes": _under_covered(),
    "rows where the student nearly excludes what the teacher prefers": _far(),
    SURER_ROWS: _over_covered(),
}
"""Where a loss is summed; clamps and thresholds hide in all but the first."""


# --------------------------------------------------------------------------------------------
# Along a response


def tree() -> World:
    """Every prefix of three tokens of four has a row of its own."""
    return random_tree(seed=11, vocab_size=TREE_VOCABULARY, horizon=HORIZON)


class OfTree(NamedTuple):
    """A loss summed over all responses of the tree.

    Attributes:
        gradient: its expectation.
        size: per state, what the gradient measures before anything cancels.
    """

    gradient: Float[Tensor, "S V"]
    size: Float[Tensor, " S"]


def of_tree(loss: Loss, world: World) -> OfTree:
    """Call a loss on every response and weigh it with the student's probability of writing it."""
    total = torch.zeros_like(world.student_logits)
    size = total.new_zeros(len(total))
    logp = world.student_logits.log_softmax(-1)
    called = list(_responses(world, loss.dtype))
    found = derivatives(loss, [rows for _, rows in called])
    for (states, rows), one in zip(called, found, strict=True):
        probability = logp[states, rows.tokens].sum().exp()
        pieces = one.student.double()
        total.index_add_(0, states, probability * pieces)
        size.index_add_(0, states, probability * pieces.norm(dim=-1))
    return OfTree(total, size)


def _responses(world: World, dtype: torch.dtype) -> Iterator[tuple[Tensor, Rows]]:
    teacher = world.views["teacher"]
    for tokens in itertools.product(range(TREE_VOCABULARY), repeat=HORIZON):
        states = [0]
        for token in tokens[:-1]:
            states.append(int(world.next_state[states[-1], token]))
        at = torch.tensor(states)
        rows = Rows(
            student=world.student_logits[at].to(dtype),
            teacher=teacher[at].to(dtype),
            tokens=torch.tensor(tokens),
            mask=torch.ones(HORIZON, dtype=torch.bool),
        )
        yield at, rows

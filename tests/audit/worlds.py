"""The worlds that estimators are audited on, and their prefix trees for the independent oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from opd.audit import (
    Expectation,
    World,
    absorbing_chain,
    expectation,
    fast_chain,
    local_gradient,
    random_tree,
    slow_chain,
)
from opd.objective import Objective, Term
from tests.reference.enumeration import State, Table, Tree

EXACT = 1e-10
"""Relative; the worlds are float64 and hold at most a thousand rows."""

WORLDS = {
    "tree": random_tree(1),
    "tree with an end": random_tree(2, end_id=2),
    "longer tree": random_tree(3, horizon=5),
    "longer tree with an end": random_tree(4, horizon=5, end_id=0),
    "fast chain": fast_chain(5),
    "fast chain with an end": fast_chain(6, horizon=5, end_id=2),
    "slow chain": slow_chain(7, horizon=5),
    "slow chain with an end": slow_chain(8, end_id=2),
    "absorbing chain": absorbing_chain(9),
    "absorbing chain with an end": absorbing_chain(10, horizon=5, end_id=2),
}
TREES = ("tree", "tree with an end", "longer tree with an end")


def descends(world: World, *terms: Term, **settings: object) -> Tensor:
    """The expected gradient of a sum of terms."""
    return moments(world, *terms, **settings).gradient


def moments(world: World, *terms: Term, **settings: object) -> Expectation:
    return expectation(Objective(*terms), world, **settings)  # type: ignore[arg-type]


def token_gradient(
    world: World,
    coefficient: Callable[[Tensor, Tensor], Tensor],
    *,
    behaviour: Tensor | None = None,
) -> Tensor:
    """-E[coefficient * grad log student(token)] over tokens and prefixes of the behaviour policy.

    The coefficient is a `[S, V]` function of the two distributions, held fixed.
    """
    policy = (world.student_logits if behaviour is None else behaviour).log_softmax(-1)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        fixed = coefficient(student, teacher).detach()
        return -(policy.exp() * fixed * student).sum(-1)

    return local_gradient(world, loss, behaviour=behaviour)


def close(gradient: Tensor, target: Tensor, *, bound: float = EXACT) -> bool:
    """Whether the two differ by less than `bound` of the target's length."""
    return float((gradient - target).norm()) <= bound * float(target.norm())


def share_of_letter(world: World, token: int) -> Tensor:
    """`[T, S, V]`: what each token adds to the share of `token` among `horizon` places."""
    reward = torch.zeros(world.horizon, *world.student_logits.shape, dtype=torch.float64)
    reward[:, :, token] = 1.0 / world.horizon
    return reward


def count_letter(world: World, token: int) -> Callable[[Sequence[int]], float]:
    """The verifier whose verdict is that share: graded, in [0, 1]."""
    return lambda response: sum(letter == token for letter in response) / world.horizon


# --------------------------------------------------------------------------------------------
# Prefix trees


class Unrolled:
    """A world as the prefix tree of the independent oracle, and the way back to its table."""

    def __init__(self, world: World, end_id: int | None) -> None:
        self._rows: dict[State, int] = {}
        longest: list[tuple[State, int]] = [((), 0)]
        for _ in range(world.horizon):
            self._rows |= dict(longest)
            longest = [
                ((*state, token), after)
                for state, row in longest
                for token, after in enumerate(world.next_state[row].tolist())
                if after >= 0
            ]
        rows = list(self._rows.values())
        self._states = len(world.student_logits)
        self.tree = Tree(
            world.vocab_size,
            world.horizon,
            end_id,
            tuple(self._rows),
            world.student_logits[rows].numpy(),
            world.views["teacher"][rows].numpy(),
        )

    def fold(self, gradient: Table) -> Tensor:
        """A gradient per prefix, added up per row of the world's table."""
        folded = np.zeros((self._states, gradient.shape[1]))
        for row, share in zip(self._rows.values(), gradient, strict=True):
            folded[row] += share
        return torch.tensor(folded)

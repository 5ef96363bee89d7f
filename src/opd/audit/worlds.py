"""Worlds small enough to sum over: tabular student and teacher, and what is exact about them.

A world is a table. Every row is a state with the student's and each view's logits, and every
token leads to another row or ends the response; the horizon ends it at the latest. In a tree every
prefix has a row of its own, in a chain prefixes share rows and with them parameters. The numbers
here come from recursions over time and states. They never enumerate a response, so they check the
enumeration of `opd.audit.oracle` as well as the estimators.

Axes: S states (rows of a table), V vocabulary, T horizon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "World",
    "absorbing_chain",
    "fast_chain",
    "lag_gradient",
    "local_gradient",
    "per_state_reverse_kl",
    "random_tree",
    "sequence_reverse_kl",
    "sequence_reverse_kl_gradient",
    "slow_chain",
    "value",
    "visits",
]

Table = Float[Tensor, "S V"]
Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class World:
    """Tabular student and views over a small vocabulary. Float64, finite logits.

    Attributes:
        student_logits: one row per state.
        views: logits of what fills the teacher slots; `teacher` is among them.
        next_state: the row a token leads to; -1 where it ends the response.
        horizon: the longest response, in tokens. It ends the world: nothing is worth anything
            after it.
    """

    student_logits: Table
    views: Mapping[str, Table]
    next_state: Int[Tensor, "S V"]
    horizon: int

    def __post_init__(self) -> None:
        if "teacher" not in self.views:
            raise ValueError(
                f"a world needs the view 'teacher', got {', '.join(self.views) or 'no view'}"
            )
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1 token, got {self.horizon}")
        for name, table in {"student": self.student_logits, **self.views}.items():
            if table.dtype != torch.float64 or not bool(table.isfinite().all()):
                raise ValueError(
                    f"the logits of {name!r} must be finite float64 numbers, got {table.dtype}; "
                    "an oracle in lower precision proves nothing"
                )
            if table.shape != self.next_state.shape:
                raise ValueError(
                    f"the logits of {name!r} have the shape {list(table.shape)}, the world has "
                    f"{list(self.next_state.shape)}: one row per state, one column per token"
                )

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.next_state.shape[1]

    def with_student(self, student_logits: Table) -> World:
        """The same world with another student."""
        return replace(self, student_logits=student_logits.detach())

    def with_view(self, logits: Table, *, name: str = "teacher") -> World:
        """The same world with this view added or replaced."""
        return replace(self, views={**self.views, name: logits.detach()})


def random_tree(
    seed: int, *, vocab_size: int = 3, horizon: int = 4, end_id: int | None = None
) -> World:
    """Every prefix its own row; independent normal logits, the teacher's 1.5 times as wide.

    Rows are ordered by length, then by their tokens.

    Args:
        end_id: the token that ends a response, an action like any other; None where only the
            horizon does.
    """
    goes_on = torch.tensor([token != end_id for token in range(vocab_size)])
    levels, rows, alive = [], 1, 1
    for length in range(1, horizon + 1):
        leads_to = torch.full((alive, vocab_size), -1)
        entered = alive * int(goes_on.sum()) if length < horizon else 0
        if entered:
            leads_to[:, goes_on] = torch.arange(rows, rows + entered).view(alive, -1)
        levels.append(leads_to)
        rows, alive = rows + entered, entered
    following = torch.cat(levels)
    return _world(following, *_normal_tables(seed, len(following), vocab_size), horizon)


def fast_chain(
    seed: int, *, vocab_size: int = 3, horizon: int = 4, end_id: int | None = None
) -> World:
    """A chain whose student nearly forgets its last token at once.

    Logits depend on the last token only: row 0 is the start, row 1 + v follows the token v. The
    student's rows differ by a tenth of their common part, so where it is now says little about
    where it will be, and little of what a token costs later is that token's doing.

    Args:
        end_id: as in `random_tree`.
    """
    noise, teacher = _normal_tables(seed, vocab_size + 1, vocab_size)
    student = noise[:1] + 0.1 * noise
    return _world(_last_token(vocab_size, end_id), student, teacher, horizon)


def slow_chain(
    seed: int, *, vocab_size: int = 3, horizon: int = 4, end_id: int | None = None
) -> World:
    """A chain whose student tends to repeat its last token, so that a choice lasts.

    As `fast_chain`, but the last token has 3 nats more than the noise around it.
    """
    noise, teacher = _normal_tables(seed, vocab_size + 1, vocab_size)
    repeats = torch.cat([torch.zeros(1, vocab_size), torch.eye(vocab_size)]).double()
    return _world(_last_token(vocab_size, end_id), noise + 3.0 * repeats, teacher, horizon)


def absorbing_chain(
    seed: int,
    *,
    vocab_size: int = 3,
    horizon: int = 4,
    error_id: int = 1,
    end_id: int | None = None,
) -> World:
    """A chain with an error that nothing undoes: after it, every token leads to the same row.

    After it the teacher finds the student's favourite token unlikelier by 4 nats, at every step,
    whatever is chosen: nothing that the teacher prefers leads back. Before it the teacher is as
    fond of the error as of any token. So the error's cost lies in the future, where immediate
    credit does not look.

    Args:
        error_id: the token that makes the error.
        end_id: as in `random_tree`; it ends a response after the error too.
    """
    student, teacher = _normal_tables(seed, vocab_size + 1, vocab_size)
    following = _last_token(vocab_size, end_id)
    lost = 1 + error_id
    following[lost] = torch.where(following[lost] < 0, -1, lost)
    teacher[lost] = student[lost]
    teacher[lost, student[lost].argmax()] -= 4.0
    return _world(following, student, teacher, horizon)


# --------------------------------------------------------------------------------------------
# Exact quantities


def per_state_reverse_kl(world: World, *, view: str = "teacher") -> Float[Tensor, " S"]:
    """The reverse KL of the next token at every state, in nats.

        D(s) = sum_v student(v | s) * (log student(v | s) - log view(v | s))

    Source: arXiv:2606.22793, section 2 (D_t).
    """
    return _reverse_kl(_log_probs(world.student_logits), _log_probs(world.views[view]))


def visits(world: World, *, behaviour: Table | None = None) -> Float[Tensor, "T S"]:
    """How likely a response is to choose its token t at state s.

        d(0) = start,   d(t + 1, s') = sum over (s, v) that lead to s' of d(t, s) * policy(v | s)

    Its sum over s is the share of responses longer than t.

    Args:
        behaviour: logits of the policy that writes; the student's own if None.
    """
    policy = world.student_logits if behaviour is None else behaviour
    return _visits(world, _log_probs(policy))


def value(
    world: World, *, reward: Float[Tensor, "S V"] | None = None, gamma: float = 1.0
) -> Float[Tensor, "T S"]:
    """What the student can expect to gather from state s at token t on, in the reward's unit.

        V(t, s) = sum_v student(v | s) * (r(s, v) + gamma * V(t + 1, next(s, v)))

    0 after the end token and after the horizon. With the log ratio as reward and gamma = 1 it is
    minus the expected sum of the reverse KLs to come, and V(0, start) minus that of the sequence.

    Args:
        reward: of every token at every state; the teacher's log ratio if None.
        gamma: discount per token.

    Source: arXiv:2606.22793, Eq. 21.
    """
    reward = _log_ratio(world) if reward is None else reward
    student = _log_probs(world.student_logits).exp()
    later = torch.zeros(world.student_logits.shape[0], dtype=torch.float64)
    values = []
    for _ in range(world.horizon):
        later = (student * (reward + gamma * _at_next(world, later))).sum(-1)
        values.append(later)
    return torch.stack(values[::-1])


def sequence_reverse_kl(world: World, *, view: str = "teacher") -> float:
    """The reverse KL of whole responses, in nats.

        J = sum_y student(y) * (log student(y) - log view(y)) = sum over t, s of d(t, s) * D(s)

    Source: arXiv:2606.22793, Eq. 3; the chain rule of the KL.
    """
    student, teacher = _log_probs(world.student_logits), _log_probs(world.views[view])
    return float((_visits(world, student) * _reverse_kl(student, teacher)).sum())


def sequence_reverse_kl_gradient(world: World, *, view: str = "teacher") -> Table:
    """The exact gradient of `sequence_reverse_kl`, through the distribution of prefixes too.

    Source: arXiv:2606.22793, Eq. 4.
    """
    teacher = _log_probs(world.views[view])

    def objective(student: Tensor) -> Tensor:
        return (_visits(world, student) * _reverse_kl(student, teacher)).sum()

    return _gradient(world, objective)


def local_gradient(
    world: World,
    divergence: Divergence,
    *,
    behaviour: Table | None = None,
    view: str = "teacher",
) -> Table:
    """The gradient of a per-token divergence, the distribution of prefixes held fixed.

        grad L,   L = sum over t, s of sg[d(t, s)] * divergence(student(. | s), view(. | s))

    What a `Dense` term descends, and what a sampled term with immediate credit estimates.

    Args:
        divergence: of `student_log_probs` and `teacher_log_probs`, `[S, V]` each.
        behaviour: logits of the policy that writes the prefixes; the student's own if None.

    Source: arXiv:2606.22793, Eqs. 7 and 16.
    """
    reached = visits(world, behaviour=behaviour).sum(0)
    teacher = _log_probs(world.views[view])
    return _gradient(world, lambda student: (reached * divergence(student, teacher)).sum())


def lag_gradient(world: World, lag: int, *, reward: Float[Tensor, "T S V"] | None = None) -> Table:
    """The part of a sequence's gradient that credits a token for the reward `lag` tokens later.

        F(l) = -E[sum_t r_(t + l) * grad log student(y_t)]

    Its sum over all lags is the gradient of minus the expected sum of rewards. An estimator
    that weighs a reward l tokens later with w(l) descends sum_l w(l) * F(l): what credit leaves
    out is named exactly. F(0) of the log ratio is the local gradient of the reverse KL.

    Args:
        lag: tokens between the choice and the reward, >= 0.
        reward: of every token at every state and time; the teacher's log ratio if None.

    Source: arXiv:2606.22793, Eqs. 15, 17 and 19.
    """
    if lag < 0:
        raise ValueError(f"lag must be >= 0 tokens, got {lag}: no token earns what came before it")
    if reward is None:
        reward = _log_ratio(world).expand(world.horizon, -1, -1)
    student = _log_probs(world.student_logits)
    earned = reward
    for _ in range(lag):
        expected = (student.exp() * earned).sum(-1)
        moved = [_at_next(world, expected[t]) for t in range(1, world.horizon)]
        earned = torch.stack([*moved, torch.zeros_like(reward[0])])
    weight = (_visits(world, student).unsqueeze(-1) * earned).sum(0)
    return _gradient(world, lambda live: -(weight * live.exp()).sum())


# --------------------------------------------------------------------------------------------


def _world(following: Tensor, student: Tensor, teacher: Tensor, horizon: int) -> World:
    return World(student, {"teacher": teacher}, following, horizon)


def _normal_tables(seed: int, rows: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(rows, vocab_size, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    return student, 1.5 * teacher


def _last_token(vocab_size: int, end_id: int | None) -> Tensor:
    following = torch.arange(1, vocab_size + 1)
    if end_id is not None:
        following[end_id] = -1
    return following.repeat(vocab_size + 1, 1)


def _log_probs(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def _log_ratio(world: World) -> Tensor:
    return _log_probs(world.views["teacher"]) - _log_probs(world.student_logits)


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(-1)


def _visits(world: World, log_probs: Tensor) -> Tensor:
    goes_on = world.next_state >= 0
    now = torch.zeros(log_probs.shape[0], dtype=torch.float64)
    now[0] = 1.0
    reached = [now]
    for _ in range(world.horizon - 1):
        flow = reached[-1].unsqueeze(-1) * log_probs.exp()
        empty = torch.zeros_like(now)
        reached.append(empty.index_add(0, world.next_state[goes_on], flow[goes_on]))
    return torch.stack(reached)


def _at_next(world: World, values: Float[Tensor, " S"]) -> Table:
    """The value of the state that every token leads to; 0 where it leads nowhere."""
    following = values[world.next_state.clamp(min=0)]
    return torch.where(world.next_state < 0, 0.0, following)


def _gradient(world: World, objective: Callable[[Tensor], Tensor]) -> Table:
    """With respect to the student's logits, of a function of its log-probabilities."""
    logits = world.student_logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(_log_probs(logits)), logits)
    return gradient

"""An objective tried on a few random rows, through the head and the signal phase that train.

A formula refuses an option that is out of range when it is evaluated. Here it is, before anything
loads: a small random student and views of random logits, at both ends of every schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError, OpdError
from opd.fields import EXTRA_PREFIX
from opd.head import linear_head
from opd.objective import Method, Objective
from opd.rollout.pack import pack_rollout, with_token
from opd.schedule import Schedule
from opd.training.plan import is_scored
from opd.training.step import extra_columns
from opd.types import (
    STUDENT_PART,
    Batch,
    Prompt,
    Provenance,
    Rollout,
    TeacherScores,
    TeacherView,
    Unembedding,
    with_parts,
)

SEQUENCES, TOKENS, WIDTH = 4, 5, 8
SMALL = 16
"""Tokens of the vocabulary where nothing asks for more."""
LATE = 10**9
"""A step at which every schedule has come to its end."""


def try_objective(
    method: Method, *, prompts: Sequence[Prompt] = (), vocab_size: int | None = None
) -> None:
    """Evaluate a method's objective and its gradient on a few random rows; nothing is returned.

    Args:
        method: schedules included; they are tried at their lowest and at their highest values.
        prompts: some of the run's, whose columns formulas may read.
        vocab_size: the student's, for formulas of the user's own, which may name its tokens; the
            library's are tried on a smaller one. None: not known.

    Raises:
        ConfigError: whatever a formula refuses, and an objective without a gradient.
    """
    size = _vocabulary(method, vocab_size)
    columns = _columns(prompts, method.objective)
    if size is None or columns is None:
        return  # what formulas of the run would read is not known, and why is told elsewhere
    low, high = method.objective.at_ends()
    for end, objective in enumerate((low, high) if low != high else (low,)):
        random = _Random(size)
        batch, hidden = _batch(method, objective, columns, random, end)
        try:
            _evaluate(objective, batch, hidden, random.unembedding)
        except OpdError:
            raise
        except Exception as error:  # of a user's function, outside of what the head guards
            raise ConfigError(
                f"the objective failed on a few random rows: {type(error).__name__}: {error}"
            ) from error


class _Random:
    """Draws that leave the generators of others alone, and the unembedding of all models."""

    def __init__(self, vocab_size: int) -> None:
        self._draw = torch.Generator().manual_seed(0)
        self.vocab_size = vocab_size
        self.unembedding = Unembedding(self.normal(vocab_size, WIDTH), vocab_size)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._draw)

    def tokens(self, *shape: int) -> Tensor:
        return torch.randint(self.vocab_size, shape, generator=self._draw)


def _evaluate(objective: Objective, batch: Batch, hidden: Tensor, unembedding: Unembedding) -> None:
    if objective.coupled:
        fields = linear_head(
            hidden.detach(),
            unembedding,
            batch,
            wanted=objective.signal_keys(),
            temperature=objective.temperature,
        ).fields
        batch = with_token(batch, coupled=objective.signal(batch.token, fields))
    loss = linear_head(hidden, unembedding, batch, objective).loss
    assert loss is not None
    if not loss.requires_grad and not objective.is_off:
        raise ConfigError(
            "no term of the objective depends on the student's weights, so nothing can be learnt; "
            "a formula of the run detaches what it returns"
        )


def _vocabulary(method: Method, vocab_size: int | None) -> int | None:
    """Enough tokens for every support; the student's own for a user's functions. None: unknown."""
    objective = method.objective
    tops = (objective.support_size(name) for name in ("student_top_ids", "teacher_top_ids"))
    needed = max(SMALL, *tops)
    own = any(
        not bound.name.startswith("opd.")
        for _, term in objective.parts()
        for _, bound in term.slots()
    )
    if not own:
        return needed
    return None if vocab_size is None or vocab_size < needed else vocab_size


def _batch(
    method: Method, objective: Objective, columns: dict[str, Tensor], random: _Random, end: int
) -> tuple[Batch, Tensor]:
    """Responses of every writer, two to a prompt, one of them cut off; the student's states."""
    shape = (SEQUENCES, TOKENS)
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS - 1], [TOKENS], [2]])
    writers = torch.tensor(
        [[Provenance.STUDENT], [Provenance.DATA], [Provenance.TEACHER], [Provenance.STUDENT]]
    )

    def logp() -> Tensor:
        return torch.where(mask, -random.normal(*shape).exp(), 0.0)

    rollout = Rollout(
        prompt_ids=((0,),) * SEQUENCES,
        tokens=random.tokens(*shape),
        mask=mask,
        provenance=torch.where(mask, writers.expand(shape), int(Provenance.PADDING)),
        sampler_logp=logp(),
        policy_version=torch.zeros(shape, dtype=torch.long),
        group=torch.arange(SEQUENCES) // 2,
        stop_reason=("eos",) * (SEQUENCES - 1) + ("length",),
        verdict=torch.tensor([1.0, 0.0, 1.0, math.nan]),
    )
    packed = pack_rollout(rollout, pad_id=0, special_ids=(random.vocab_size - 1,))
    rows = packed.row_index.shape[0]
    hidden = random.normal(rows, WIDTH)
    views = with_parts(method.objective.views(), method.views)
    top = objective.support_size("student_top_ids")
    logits = hidden @ random.unembedding.weight.T
    batch = with_token(
        packed,
        old_logp=logp(),
        student_top_ids=logits.topk(top).indices if top else None,
        values=-random.normal(*shape).abs(),
        bootstrap_value=torch.tensor([0.0] * (SEQUENCES - 1) + [-1.0]),
        extra=columns,
        views={view.name: _scores(view, rows, random, end) for view in views},
    )
    return batch, hidden.requires_grad_()


def _columns(prompts: Sequence[Prompt], objective: Objective) -> dict[str, Tensor] | None:
    """The columns that formulas read, of some records; None where there is no such record."""
    if not any(name.startswith(EXTRA_PREFIX) for name in objective.field_names()):
        return {}
    some = [prompts[place % len(prompts)] for place in range(SEQUENCES)] if prompts else []
    try:
        return extra_columns(some, objective) if some else None
    except DataError:
        return None


def _scores(view: TeacherView, rows: int, random: _Random, end: int) -> TeacherScores:
    if is_scored(view):
        states = random.normal(rows, WIDTH)
        return TeacherScores(hidden=states, unembedding=random.unembedding)
    parts = tuple(
        (name, weight.reachable()[end] if isinstance(weight, Schedule) else weight)
        for name, weight in view.parts
    )
    if view.mix == "arithmetic":  # whose weights go together: the shares of its first or last step
        settled, _ = view.at((0, LATE)[end], {}, {})
        parts = cast("tuple[tuple[str, float], ...]", settled.parts)
    return TeacherScores(
        parts=parts or ((STUDENT_PART, 1.0),), normalised=view.normalised, mix=view.mix
    )

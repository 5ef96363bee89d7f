"""The critic's part of a step: values before the signal phase, a lesson after the update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from opd import critic as critics
from opd.critic import CriticSettings, critic_targets, explained_variance
from opd.head.visit import HIDDEN
from opd.models import unembedding
from opd.objective import Objective, chosen_rows
from opd.rollout.pack import select, with_token
from opd.student import Student
from opd.training.config import CriticConfig
from opd.training.step import visit
from opd.types import (
    Batch,
    Bound,
    Critic,
    FieldKey,
    Provenance,
    Stat,
    TokenBatch,
    pack_rows,
    unanswered,
    unpack_rows,
)


@dataclass(frozen=True)
class Lesson:
    """What the critic learns from one step; see `Critic.fit`."""

    hidden: Tensor
    targets: Tensor
    place: Tensor


@dataclass(frozen=True)
class Valued:
    """A batch with the critic's values.

    Attributes:
        batch: with `values` and `bootstrap_value`.
        fields: what the visit saw on the way; the signal phase starts from it.
        lesson: for after the update.
    """

    batch: Batch
    fields: Mapping[FieldKey, Tensor]
    lesson: Lesson


def make_critic(
    config: CriticConfig, student: Student, generator: torch.Generator
) -> critics.Critic:
    """A fresh critic for the student's hidden states, on its device."""
    weight = unembedding(student.model, student.vocab_size).weight
    settings = CriticSettings(**{**asdict(config), "clip_nats": config.clip_nats or None})
    return critics.Critic(weight.shape[1], settings, generator=generator, device=weight.device)


def value_states(
    student: Student, batch: Batch, objective: Objective, critic: Critic, max_tokens: int
) -> Valued:
    """The critic's values of every state, from one visit that serves the signal phase too."""
    term = objective.critic_term
    assert term is not None
    cost = FieldKey("reverse_kl", term.against, smoothing=term.smoothing)
    keys = objective.signal_keys() | {HIDDEN, cost}
    fields = visit(student, batch, keys, objective.temperature, max_tokens)
    mask = batch.token.mask
    cut_off = batch.bootstrap_row >= 0
    after = _hidden_after(student, batch, cut_off, fields[HIDDEN], max_tokens)
    bootstrap = critic.bootstrap(after, cut_off)
    values = unpack_rows(critic.values(fields[HIDDEN]), mask)
    gamma = float(dict(Bound.of(term.credit).knobs).get("gamma", 1.0))
    # a token that the view has no answer for costs nothing that is known
    missing = unanswered(batch.token.views, term.against)
    costs = fields[cost] if missing is None else fields[cost].masked_fill(missing, 0.0)
    targets = critic_targets(unpack_rows(costs, mask), bootstrap, mask, gamma=gamma)
    own = chosen_rows(batch.token, term.rows)
    taught = pack_rows(own, mask)
    lesson = Lesson(fields[HIDDEN][taught], targets[own], _place(mask)[own])
    valued = with_token(batch, values=values, bootstrap_value=bootstrap)
    return Valued(valued, {key: fields[key] for key in objective.signal_keys()}, lesson)


def learn(critic: Critic, lesson: Lesson, generator: torch.Generator) -> dict[str, Stat]:
    """Teach the critic, and say how well it knew the step's states before."""
    stats = dict(critic.fit(lesson.hidden, lesson.targets, lesson.place, generator))
    if stats and stats["critic/target"].count > 1:
        share = explained_variance(stats)
        if share == share:  # targets that do not vary have no variance to explain
            stats["critic/explained_variance"] = Stat(share, 1.0)
    return {name: stat for name, stat in stats.items() if stat.count}


def _hidden_after(
    student: Student, batch: Batch, cut_off: Tensor, hidden: Tensor, max_tokens: int
) -> Tensor:
    """`[B, H]`: the state after the last token of the responses that were cut off, else zero."""
    after = hidden.new_zeros((cut_off.shape[0], hidden.shape[1]))
    chosen = cut_off.nonzero().squeeze(1).tolist()
    if not chosen:
        return after
    part = select(batch, chosen).batch
    ends = replace(part, row_index=part.bootstrap_row, token=_one_row_each(part.token))
    after[chosen] = visit(student, ends, frozenset({HIDDEN}), 1.0, max_tokens)[HIDDEN]
    return after


def _one_row_each(token: TokenBatch) -> TokenBatch:
    """Responses of a single row, so that a visit returns one state for each."""
    first = token.mask.new_ones((token.mask.shape[0], 1))
    return TokenBatch(
        tokens=torch.zeros_like(first, dtype=torch.long),
        mask=first,
        provenance=torch.full_like(first, int(Provenance.STUDENT), dtype=torch.long),
        sampler_logp=torch.zeros_like(first, dtype=token.sampler_logp.dtype),
        group=token.group,
        verdict=token.verdict,
    )


def _place(mask: Tensor) -> Tensor:
    """Where in its response each open token stands, from 0 to 1."""
    count = mask.sum(1, keepdim=True)
    return (mask.cumsum(1) - 1).clamp(min=0) / (count - 1).clamp(min=1)

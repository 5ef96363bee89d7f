"""The enumeration oracle: exactly what the library's own estimators descend, and how noisily.

`expectation` visits every response a small world can produce, packs them into a real `Batch` and
runs the objective through the very signal phase and head that train. So the mean gradient is a
finite sum, and what an estimator is unbiased for can be read off to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.audit.worlds import Table, World
from opd.fields import is_coupled
from opd.formula import credit, outcome, reward, support
from opd.head import linear_head
from opd.objective import Objective, Routed, Term, field_key
from opd.rollout.pack import pack_rollout, select, with_token
from opd.types import (
    ROW_KINDS,
    Batch,
    Bound,
    Count,
    Provenance,
    Rollout,
    TeacherScores,
    Unembedding,
    pack_rows,
)

__all__ = ["Agreement", "Expectation", "compare", "expectation"]

LARGEST = 20_000
"""Tuples of responses beyond which a world is too large to enumerate."""

ALONG_ONE_RESPONSE: frozenset[Callable[..., Tensor]] = frozenset(
    {
        credit.return_to_go,
        credit.discounted,
        credit.windowed,
        credit.length_normalised,
        credit.rao_blackwell,
        credit.next_step,
        credit.future,
        credit.damped_future,
        credit.gae,
        outcome.agree_in_sign,
        outcome.terminal_verdict,
        reward.verdict_reward,
    }
)
"""Coupled formulas that never look at another response, so that steps may be settled together."""

Verify = Callable[[tuple[int, ...]], float]


@dataclass(frozen=True)
class Expectation:
    """Moments of one step's gradient over all the responses that it may be made of.

    Attributes:
        gradient: the mean, with respect to the student's table.
        variance: the sum of the variances of its entries, of one step's gradient.
        value: the mean of the loss.
    """

    gradient: Table
    variance: float
    value: float


class Agreement(NamedTuple):
    """How a gradient compares with a target.

    Attributes:
        cosine: between the two; NaN where either is zero.
        relative_error: length of the difference over the target's; infinite or NaN where the
            target is zero.
    """

    cosine: float
    relative_error: float


def compare(gradient: Table, target: Table) -> Agreement:
    """Direction and distance of a gradient, as seen from its target.

        cosine = <g, h> / (|g| |h|),  relative_error = |g - h| / |h|

    Both without a unit; 1 and 0 where the gradient is its target.
    """
    product, size = (gradient * target).sum(), target.norm()
    return Agreement(
        float(product / (gradient.norm() * size)), float((gradient - target).norm() / size)
    )


def expectation(
    objective: Objective,
    world: World,
    *,
    behaviour: Table | None = None,
    samples: int = 1,
    critic: Float[Tensor, "T S"] | None = None,
    verify: Verify | None = None,
) -> Expectation:
    """Mean and variance of the gradient that one optimizer step descends, in float64.

        mean = sum over y_1 ... y_m of behaviour(y_1) ... behaviour(y_m) * grad loss(y_1 ... y_m)

    A step is `samples` independent responses to one prompt. Everything that a formula computes
    over the step or over the group it computes over those, so leave-one-out baselines, quantiles
    and group statistics are exact as well; enumeration then visits every ordered tuple.

    Every term is reduced as a sum over a response's tokens and a mean over responses
    (`sequence_sum`), whatever its own reduction says: a division by the number of tokens changes
    what is estimated, and sequence objectives are defined without it.

    Args:
        objective: schedules settled.
        behaviour: logits of the policy that writes the responses; it fills `old_logp`,
            `sampler_logp` and `student_top_ids`. The student itself if None.
        samples: m, responses per step.
        critic: the value of state s at token t, for formulas that read `values`. It is 0 after
            the last token, which the horizon makes an end.
        verify: from a response to its verdict; unjudged (NaN) if None.

    Raises:
        ValueError: more than 20 000 tuples.
    """
    objective = as_sequence_sum(objective)
    responses = _enumerate(world)
    tuples = _tuples(len(responses.tokens), samples)
    chosen = tuples.flatten()
    policy = world.student_logits if behaviour is None else behaviour
    batch = _batch(objective, world, responses, chosen, samples, policy)
    batch = _with_optional(batch, responses, chosen, critic, verify)

    mask = batch.token.mask
    rows = pack_rows(responses.state[chosen], mask)
    logits = world.student_logits[rows].requires_grad_()
    if objective.coupled:
        batch = settled(objective, logits.detach(), batch, samples)
    out = linear_head(logits, identity_head(world.vocab_size), batch, objective)
    assert out.loss is not None
    (per_row,) = torch.autograd.grad(out.loss, logits)

    step = pack_rows((torch.arange(len(chosen)) // samples)[:, None].expand_as(mask), mask)
    probability = _probability(policy, responses)[tuples].prod(1)
    mean, variance = _moments(per_row, rows, step, probability, len(world.student_logits))
    factors = objective.reduction_factors(batch)
    losses = torch.stack([out.rows[f"loss/{label}"] * factors[label] for label in factors]).sum(0)
    return Expectation(mean, variance, float((probability[step] * losses).sum()))


def _moments(
    per_row: Float[Tensor, "N V"],
    rows: Int[Tensor, " N"],
    step: Int[Tensor, " N"],
    probability: Float[Tensor, " K"],
    states: int,
) -> tuple[Table, float]:
    """Mean and total variance over steps of what their rows' gradients add up to per state."""
    flat = per_row.new_zeros(len(probability) * states, per_row.shape[1])
    per_step = flat.index_add(0, step * states + rows, per_row).view(len(probability), states, -1)
    mean = (probability[:, None, None] * per_step).sum(0)
    spread = (per_step - mean).square().sum((1, 2))
    return mean, float((probability * spread).sum())


# --------------------------------------------------------------------------------------------
# Responses


class _Responses(NamedTuple):
    """Every response of a world, padded: tokens, the state each was chosen in, what is used."""

    tokens: Int[Tensor, "R T"]
    state: Int[Tensor, "R T"]
    mask: Bool[Tensor, "R T"]


def _enumerate(world: World) -> _Responses:
    following = world.next_state.tolist()
    finished: list[tuple[list[int], list[int]]] = []

    def extend(tokens: list[int], states: list[int], now: int) -> None:
        if now < 0 or len(tokens) == world.horizon:
            finished.append((tokens, states))
            return
        if len(finished) > LARGEST:
            raise ValueError(f"the world has more than {LARGEST} responses; lower its horizon")
        for token, after in enumerate(following[now]):
            extend([*tokens, token], [*states, now], after)

    extend([], [], 0)
    lengths = torch.tensor([len(tokens) for tokens, _ in finished])

    def padded(lists: list[list[int]]) -> Tensor:
        return torch.tensor([[*line, *[0] * (world.horizon - len(line))] for line in lists])

    return _Responses(
        padded([tokens for tokens, _ in finished]),
        padded([states for _, states in finished]),
        torch.arange(world.horizon) < lengths.unsqueeze(1),
    )


def _tuples(responses: int, samples: int) -> Int[Tensor, "K m"]:
    """All ordered tuples of `samples` responses."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if responses**samples > LARGEST:
        raise ValueError(
            f"{responses} responses make {responses**samples} tuples of {samples}, and the oracle "
            f"visits at most {LARGEST}; take a smaller vocabulary, horizon or number of samples"
        )
    return torch.tensor(list(itertools.product(range(responses), repeat=samples)))


def _sampled_logp(logits: Table, responses: _Responses) -> Float[Tensor, "R T"]:
    """Of every token at its state; 0 on padding."""
    at_state = logits.log_softmax(-1)[responses.state]
    chosen = at_state.gather(-1, responses.tokens.unsqueeze(-1)).squeeze(-1)
    return torch.where(responses.mask, chosen, 0.0)


def _probability(logits: Table, responses: _Responses) -> Float[Tensor, " R"]:
    return _sampled_logp(logits, responses).sum(1).exp()


# --------------------------------------------------------------------------------------------
# Batches


def _batch(
    objective: Objective,
    world: World,
    responses: _Responses,
    chosen: Int[Tensor, " B"],
    samples: int,
    policy: Table,
) -> Batch:
    """Every tuple's responses, one tuple after the other; a tuple is the group of one prompt."""
    mask, state = responses.mask[chosen], responses.state[chosen]
    size = len(chosen)
    rollout = Rollout(
        prompt_ids=((0,),) * size,
        tokens=responses.tokens[chosen],
        mask=mask,
        provenance=torch.where(mask, int(Provenance.STUDENT), int(Provenance.PADDING)),
        sampler_logp=_sampled_logp(policy, responses)[chosen],
        policy_version=torch.zeros_like(state),
        group=torch.arange(size) // samples,
        stop_reason=("eos",) * size,
        verdict=torch.full((size,), math.nan, dtype=torch.float64),
    )
    counts = {kind: Count(rows=float(mask.sum()), sequences=float(samples)) for kind in ROW_KINDS}
    packed = replace(pack_rollout(rollout, pad_id=0), counts=counts)
    rows = pack_rows(state, mask)
    unembedding = identity_head(world.vocab_size)
    views = {
        name: TeacherScores(hidden=table[rows], unembedding=unembedding)
        for name, table in world.views.items()
    }
    at_temperature = _sampled_logp(policy / objective.temperature, responses)
    k = objective.support_size("student_top_ids")
    return with_token(
        packed,
        views=views,
        old_logp=at_temperature[chosen],
        student_top_ids=top_ids(policy[rows], packed, k) if k else None,
    )


def top_ids(logits: Float[Tensor, "N V"], batch: Batch, k: int) -> Int[Tensor, "N K"]:
    """What the policy found likeliest at rollout time."""
    key = field_key("student_top_ids", "", Bound.of(support.student_top_k).with_knobs(k=k))
    seen = linear_head(logits, identity_head(logits.shape[1]), batch, wanted=frozenset({key}))
    return seen.fields[key]


def _with_optional(
    batch: Batch,
    responses: _Responses,
    chosen: Int[Tensor, " B"],
    critic: Float[Tensor, "T S"] | None,
    verify: Verify | None,
) -> Batch:
    if critic is not None:
        times = torch.arange(responses.state.shape[1])
        values = critic[times, responses.state[chosen]]
        batch = with_token(
            batch,
            values=torch.where(batch.token.mask, values, 0.0),
            bootstrap_value=torch.zeros(len(chosen), dtype=torch.float64),
        )
    if verify is not None:
        lengths = responses.mask.sum(1).tolist()
        written = zip(responses.tokens.tolist(), lengths, strict=True)
        verdicts = [verify(tuple(tokens[:length])) for tokens, length in written]
        batch = with_token(batch, verdict=torch.tensor(verdicts, dtype=torch.float64)[chosen])
    return batch


def settled(
    objective: Objective, logits: Float[Tensor, "N V"], batch: Batch, samples: int
) -> Batch:
    """The signal phase, of every tuple by itself: its step is all that a statistic may see.

    Of all tuples at once where no formula would see the difference.
    """
    fields = linear_head(
        logits,
        identity_head(logits.shape[1]),
        batch,
        wanted=objective.signal_keys(),
        temperature=objective.temperature,
    ).fields
    if settles_together(objective):
        return with_token(batch, coupled=objective.signal(batch.token, fields))
    size, width = batch.token.tokens.shape
    parts = []
    for first in range(0, size, samples):
        step = select(batch, range(first, first + samples))
        own = {key: field[step.rows] for key, field in fields.items()}
        parts.append(objective.signal(step.batch.token, own))

    def joined(name: str) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat([pad(part[name], (0, width - part[name].shape[1])) for part in parts])

    return with_token(batch, coupled={name: joined(name) for name in parts[0]})


def settles_together(objective: Objective) -> bool:
    """Whether every coupled formula is known to look at one response at a time."""
    return not any(
        (term.preserve_mass and term.weights)
        or any(
            is_coupled(bound.function) and bound.function not in ALONG_ONE_RESPONSE
            for _, bound in term.slots()
        )
        for _, term in objective.parts()
    )


def identity_head(vocab_size: int) -> Unembedding:
    """Hidden states that are the logits themselves."""
    return Unembedding(torch.eye(vocab_size, dtype=torch.float64), vocab_size)


def as_sequence_sum(objective: Objective) -> Objective:
    def summed(term: Term) -> Term:
        if isinstance(term, Routed):
            return replace(term, source=replace(term.source, reduction="sequence_sum"))
        return replace(term, reduction="sequence_sum")

    return Objective(*map(summed, objective.terms), temperature=objective.temperature)

"""Rollouts after they were written: some of their sequences, cut short, or continued by another.

Every function returns a new rollout on the CPU, tokens, provenance and log-probabilities in step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from opd.rollout.local import has_stop_string
from opd.rollout.pack import merge_rollouts, rollout_to
from opd.types import PASS_MARK, Prompt, Provenance, Rollout, SamplerSettings

Write = Callable[[Sequence[Prompt], SamplerSettings], list[Rollout]]
"""Samples responses to prompts, in one or several rollouts that together keep their order."""

FILL = {
    "tokens": 0,
    "mask": False,
    "provenance": int(Provenance.PADDING),
    "sampler_logp": 0.0,
    "policy_version": -1,
}
"""What stands after the end of a response, field by field. (The id is never looked at.)"""


def take(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Some sequences of a rollout, in this order, padding trimmed; groups keep their numbers."""
    rollout = rollout_to(rollout, torch.device("cpu"))
    index = torch.tensor(list(rows), dtype=torch.long)
    lengths = rollout.lengths[index]
    width = int(lengths.max()) if len(index) else 0
    top_ids = rollout.sampler_top_ids
    per_token: dict[str, Any] = {name: getattr(rollout, name)[index, :width] for name in FILL}
    return replace(
        rollout,
        **per_token,
        prompt_ids=tuple(rollout.prompt_ids[row] for row in rows),
        group=rollout.group[index],
        stop_reason=tuple(rollout.stop_reason[row] for row in rows),
        verdict=rollout.verdict[index],
        sampler_top_ids=None if top_ids is None else top_ids[index, :width],
        prompts=tuple(rollout.prompts[row] for row in rows) if rollout.prompts else (),
        model_inputs=tuple(rollout.model_inputs[row] for row in rows)
        if rollout.model_inputs
        else (),
        reasons=tuple(rollout.reasons[row] for row in rows) if rollout.reasons else (),
    )


def put(rollout: Rollout, rows: Sequence[int], part: Rollout) -> Rollout:
    """The rollout with the sequences at `rows` replaced by those of `part`; top ids are dropped."""
    rollout = rollout_to(rollout, torch.device("cpu"))
    index = torch.tensor(list(rows), dtype=torch.long)
    width = max(rollout.tokens.shape[1], part.tokens.shape[1])
    changed: dict[str, Any] = {
        name: _padded(rollout, name, width).index_copy(0, index, _padded(part, name, width))
        for name in FILL
    }
    reasons = list(rollout.stop_reason)
    for row, reason in zip(rows, part.stop_reason, strict=True):
        reasons[row] = reason
    verdict = rollout.verdict.index_copy(0, index, part.verdict.to(rollout.verdict.dtype))
    said = list(rollout.reasons or ("",) * len(rollout.prompt_ids))
    for row, words in zip(rows, part.reasons or ("",) * len(rows), strict=True):
        said[row] = words
    return replace(
        rollout,
        **changed,
        stop_reason=tuple(reasons),
        verdict=verdict,
        sampler_top_ids=None,
        reasons=tuple(said) if rollout.reasons or part.reasons else (),
    )


def cut(rollout: Rollout, limit: int | Int[Tensor, " B"]) -> Rollout:
    """The first `limit` tokens of every response; one that loses some has ended by `length`."""
    rollout = rollout_to(rollout, torch.device("cpu"))
    limits = torch.as_tensor(limit).expand(len(rollout.prompt_ids))
    lengths = rollout.lengths
    loses = lengths > limits
    if not bool(loses.any()):
        return rollout
    width = int(torch.minimum(lengths, limits).max())
    inside = torch.arange(width) < limits[:, None]
    changed: dict[str, Any] = {
        name: torch.where(inside, getattr(rollout, name)[:, :width], fill)
        for name, fill in FILL.items()
    }
    reasons = zip(rollout.stop_reason, loses.tolist(), strict=True)
    top_ids = rollout.sampler_top_ids
    return replace(
        rollout,
        **changed,
        stop_reason=tuple("length" if shorter else reason for reason, shorter in reasons),
        sampler_top_ids=None if top_ids is None else top_ids[:, :width],
    )


def continued(
    rollout: Rollout,
    keep: Sequence[int],
    write: Write,
    settings: SamplerSettings,
    *,
    tokenizer: Any,
    positions: int | None = None,
) -> Rollout:
    """Every response with its first `keep` tokens as they are, and the rest written anew.

    The kept tokens keep their provenance, log-probability and policy version; what follows has
    those of the new writer. Verdicts are NaN, without a reason: the texts have changed.

    Args:
        keep: tokens kept of each response, fewer than `settings.max_new_tokens`.
        write: the new writer; it reads prompt and kept tokens as one prompt.
        settings: of the sampler; `max_new_tokens` limits the whole response.
        tokenizer: finds a stop string that begins in what was kept.
        positions: tokens that the writer's model is made for; None: it does not say.
    """
    rollout = rollout_to(rollout, torch.device("cpu"))
    kept = cut(rollout, torch.tensor(list(keep)))
    parts, order = [], []
    for rows in _calls(rollout, keep, settings.max_new_tokens, positions):
        left = [settings.max_new_tokens - keep[row] for row in rows]
        prompts = [_with_kept(kept, row, keep[row]) for row in rows]
        asked = replace(settings, max_new_tokens=max(left), samples_per_prompt=1, student_top_k=0)
        parts.append(cut(merge_rollouts(write(prompts, asked), pad_id=0), torch.tensor(left)))
        order += rows
    back = [order.index(row) for row in range(len(order))]
    new = take(merge_rollouts(parts, pad_id=0), back)
    joined = _joined(kept, torch.tensor(list(keep)), new)
    if not settings.stop:
        return joined
    return _stopped(joined, keep, settings.stop, tokenizer)


def to_rewrite(
    rollout: Rollout, share: float, *, among: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Which responses were judged wrong, and how many of their tokens stay.

        kept = length - ceil(share * length)

    Args:
        share: of the tokens of a wrong response that are written anew, from its end; in (0, 1].
        among: rows that may be chosen. A response without a verdict is none of them.

    Returns:
        Rows with a verdict below one half, and the tokens kept of each.
    """
    wrong = [row for row in among if float(rollout.verdict[row]) < PASS_MARK]
    lengths = rollout.lengths.tolist()
    return wrong, [lengths[row] - math.ceil(share * lengths[row] - 1e-9) for row in wrong]


# --------------------------------------------------------------------------------------------


def _padded(rollout: Rollout, name: str, width: int) -> Tensor:
    value: Tensor = getattr(rollout, name)
    return pad(value, (0, width - value.shape[1]), value=FILL[name])


def _with_kept(kept: Rollout, row: int, count: int) -> Prompt:
    """The prompt with the kept tokens behind it."""
    ids = (*kept.prompt_ids[row], *kept.tokens[row, :count].tolist())
    return replace(kept.prompts[row], prompt_ids=ids)


def _calls(
    rollout: Rollout, keep: Sequence[int], limit: int, positions: int | None
) -> Iterator[list[int]]:
    """Rows that are continued together.

    All at once: those that keep more are then written further than they may go, and cut. Where
    that could exceed the model's positions, those that keep equally many.
    """
    rows = range(len(keep))
    furthest = max(len(rollout.prompt_ids[row]) + keep[row] for row in rows) + limit - min(keep)
    if positions is None or furthest <= positions:
        yield list(rows)
        return
    for count in sorted(set(keep)):
        yield [row for row in rows if keep[row] == count]


def _joined(kept: Rollout, keep: Int[Tensor, " B"], new: Rollout) -> Rollout:
    """Of each response the first `keep` tokens of one rollout, then those of another."""
    lengths = keep + new.lengths
    width = int(lengths.max())
    position = torch.arange(width)
    from_kept: Bool[Tensor, "B T"] = position < keep[:, None]
    inside: Bool[Tensor, "B T"] = position < lengths[:, None]
    place = (position - keep[:, None]).clamp(0, max(0, new.tokens.shape[1] - 1))
    own_width = min(width, kept.tokens.shape[1])
    changed: dict[str, Any] = {}
    for name, fill in FILL.items():
        own = pad(getattr(kept, name)[:, :own_width], (0, width - own_width), value=fill)
        other = getattr(new, name).gather(1, place).to(own.dtype)
        changed[name] = torch.where(inside, torch.where(from_kept, own, other), fill)
    return replace(
        kept,
        **changed,
        stop_reason=new.stop_reason,
        verdict=torch.full_like(kept.verdict, math.nan),
        sampler_top_ids=None,
        reasons=(),
    )


def _stopped(rollout: Rollout, keep: Sequence[int], stop: Sequence[str], tokenizer: Any) -> Rollout:
    """The rollout with responses ended where a stop string is complete, wherever it began."""
    lengths = rollout.lengths.tolist()
    reasons = list(rollout.stop_reason)
    for row, length in enumerate(lengths):
        tokens = rollout.tokens[row, :length].tolist()
        if not has_stop_string(tokenizer, tokens, stop):
            continue
        ends = range(keep[row] + 1, length + 1)
        lengths[row] = next(n for n in ends if has_stop_string(tokenizer, tokens[:n], stop))
        reasons[row] = "stop_string"
    return replace(cut(rollout, torch.tensor(lengths)), stop_reason=tuple(reasons))

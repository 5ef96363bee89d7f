"""Pack: the one place where positions shift by one and padding goes.

A rollout's token `t` is predicted by the hidden state one position before it. Here that shift
becomes an index, once: `row_index[n]` points at the position that predicts row n. Sequences are
prompt then response, padded on the right, so causal attention never sees the padding and no mask
is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from opd.errors import DataError
from opd.objective import chosen_rows
from opd.types import ROW_KINDS, Batch, Count, Provenance, Rollout, TokenBatch


def pack_rollout(
    rollout: Rollout,
    *,
    pad_id: int,
    special_ids: Sequence[int] = (),
    merge_ids: tuple[tuple[int, ...], ...] = (),
    extra: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """One batch with every sequence of the rollout, counts included.

    Args:
        pad_id: what to write after the end of a sequence; never looked at.
        special_ids: tokens that count as special, end tokens left out.
        merge_ids: groups of ids that are one action, such as several end tokens.
        extra: further `[B]` or `[B, T]` columns for formulas.
    """
    rollout = rollout_to(rollout, torch.device("cpu"))
    lengths = rollout.lengths
    longest = max(
        (len(prompt) + int(n) for prompt, n in zip(rollout.prompt_ids, lengths, strict=True)),
        default=1,
    )
    written = rollout.tokens.tolist()
    sequences = []
    for b, (prompt, length) in enumerate(zip(rollout.prompt_ids, lengths.tolist(), strict=True)):
        if not prompt:
            raise DataError(
                f"sequence {b} has an empty prompt: nothing predicts its first token; "
                "add a beginning-of-text token or a prompt"
            )
        unused = longest - len(prompt) - length
        sequences.append([*prompt, *written[b][:length], *([pad_id] * unused)])
    input_ids = torch.tensor(sequences, dtype=torch.long).reshape(-1, longest)
    prompt_lengths = torch.tensor([len(prompt) for prompt in rollout.prompt_ids], dtype=torch.long)
    first_row = torch.arange(len(sequences)) * longest + prompt_lengths - 1
    positions = first_row.unsqueeze(1) + torch.arange(rollout.tokens.shape[1])
    special_tokens = torch.tensor(list(special_ids), dtype=torch.long)
    special = torch.isin(rollout.tokens, special_tokens)
    ended = torch.tensor([reason != "length" for reason in rollout.stop_reason], dtype=torch.bool)
    token = TokenBatch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        provenance=rollout.provenance,
        sampler_logp=rollout.sampler_logp,
        group=rollout.group,
        verdict=rollout.verdict,
        special=special,
        special_ids=special_tokens,
        extra=extra or {},
    )
    batch = Batch(
        input_ids=input_ids,
        lengths=prompt_lengths + lengths,
        row_index=positions[rollout.mask],
        bootstrap_row=torch.where(ended, -1, first_row + lengths),
        counts=count_rows(token),
        token=token,
        merge_ids=merge_ids,
        model_inputs=join_model_inputs(rollout.model_inputs),
    )
    return to_device(batch, device)


def count_rows(token: TokenBatch) -> dict[str, Count]:
    """Rows and non-empty sequences of each row kind: the denominators of the reductions."""
    counts = {}
    for kind in ROW_KINDS:
        per_sequence = chosen_rows(token, kind).sum(1)
        counts[kind] = Count(float(per_sequence.sum()), float((per_sequence > 0).sum()))
    return counts


class Part(NamedTuple):
    """A micro-batch and the places of its rows in the batch it was cut from."""

    batch: Batch
    rows: Int[Tensor, " n"]


def split(batch: Batch, *, max_tokens: int) -> list[Part]:
    """Micro-batches of at most `max_tokens` padded tokens, sequences of like length together.

    The counts stay those of the whole batch, so gradients of the parts add up to the gradient of
    the whole. A single sequence longer than the budget gets a micro-batch of its own.
    """
    lengths = batch.lengths
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    parts: list[Part] = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        stop = start + max(1, max_tokens // longest)
        parts.append(select(batch, order[start:stop]))
        start = stop
    return parts


def join_parts(parts: Sequence[tuple[Tensor, Tensor]], total: int) -> Tensor:
    """Packed values of several parts, put back into the row order of the whole batch."""
    whole = parts[0][1].new_empty((total, *parts[0][1].shape[1:]))
    for rows, values in parts:
        whole[rows] = values
    return whole


def select(batch: Batch, sequences: Sequence[int]) -> Part:
    """Some sequences of a batch, padding trimmed; counts stay those of the whole."""
    device = batch.input_ids.device
    picked = torch.tensor(list(sequences), dtype=torch.long, device=device)
    token = batch.token
    old_length = batch.input_ids.shape[1]
    new_length = int(batch.lengths[picked].max()) if len(sequences) else 1
    width = int((token.provenance[picked] != Provenance.PADDING).sum(1).max()) if sequences else 0

    # the place of a row among all: rows of the sequences before it, then of its own before it
    row_of = token.mask.flatten().cumsum(0).view(token.mask.shape) - 1
    mask = token.mask[picked, :width]
    rows = row_of[picked, :width][mask]
    offset = torch.arange(len(sequences), device=device) * new_length - picked * old_length
    shift = offset.unsqueeze(1).expand(mask.shape)[mask]

    def cut(value: Tensor) -> Tensor:
        return value[picked, :width] if value.dim() > 1 else value[picked]

    packed = None if token.student_top_ids is None else token.student_top_ids[rows]
    per_token = {
        item.name: cut(value)
        for item in fields(token)
        if isinstance(value := getattr(token, item.name), Tensor) and item.name not in _NO_SEQUENCES
    }
    bootstrap = batch.bootstrap_row[picked]
    part = Batch(
        input_ids=batch.input_ids[picked, :new_length],
        lengths=batch.lengths[picked],
        row_index=batch.row_index[rows] + shift,
        bootstrap_row=torch.where(bootstrap < 0, -1, bootstrap + offset),
        counts=batch.counts,
        token=TokenBatch(
            **per_token,
            student_top_ids=packed,
            special_ids=token.special_ids,
            views={name: scores.rows(rows) for name, scores in token.views.items()},
            coupled={name: cut(value) for name, value in token.coupled.items()},
            extra={name: cut(value) for name, value in token.extra.items()},
        ),
        merge_ids=batch.merge_ids,
        model_inputs={
            name: value[picked] if isinstance(value, Tensor) else value
            for name, value in batch.model_inputs.items()
        },
    )
    return Part(part, rows)


_NO_SEQUENCES = ("student_top_ids", "special_ids")
"""Fields of a `TokenBatch` whose first axis is not that of the sequences."""


def with_token(batch: Batch, **changes: Any) -> Batch:
    """The same batch with some fields of its `TokenBatch` replaced."""
    return replace(batch, token=replace(batch.token, **changes))


def merge_rollouts(parts: Sequence[Rollout], *, pad_id: int) -> Rollout:
    """Several rollouts as one, on the CPU: sequences in the order of the parts, groups kept apart.

    The sampler's top ids stay where every part has as many of them.
    """
    parts = [part for part in parts if part.prompt_ids]
    if len(parts) == 1:
        return parts[0]
    parts = [rollout_to(part, torch.device("cpu")) for part in parts]
    width = max(part.tokens.shape[1] for part in parts)
    group_start, groups = 0, []
    for part in parts:
        groups.append(part.group + group_start)
        group_start += int(part.group.max()) + 1

    def joined(name: str, fill: float) -> Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(
                    getattr(part, name), (0, width - part.tokens.shape[1]), value=fill
                )
                for part in parts
            ]
        )

    return Rollout(
        prompt_ids=tuple(ids for part in parts for ids in part.prompt_ids),
        tokens=joined("tokens", pad_id),
        mask=joined("mask", False),
        provenance=joined("provenance", int(Provenance.PADDING)),
        sampler_logp=joined("sampler_logp", 0.0),
        policy_version=joined("policy_version", -1),
        group=torch.cat(groups),
        stop_reason=tuple(reason for part in parts for reason in part.stop_reason),
        verdict=torch.cat([part.verdict for part in parts]),
        sampler_top_ids=_join_top_ids([part.sampler_top_ids for part in parts], width),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        model_inputs=tuple(inputs for part in parts for inputs in _model_inputs(part)),
        reasons=_join_reasons(parts),
    )


def _join_reasons(parts: Sequence[Rollout]) -> tuple[str, ...]:
    """What a verifier said of every sequence; empty where it has seen no part."""
    if not any(part.reasons for part in parts):
        return ()
    said = (part.reasons or ("",) * len(part.prompt_ids) for part in parts)
    return tuple(reason for reasons in said for reason in reasons)


def _model_inputs(rollout: Rollout) -> Sequence[Mapping[str, Any]]:
    """One mapping per sequence, empty where the rollout has none."""
    return rollout.model_inputs or ({},) * len(rollout.prompt_ids)


def _join_top_ids(parts: Sequence[Tensor | None], width: int) -> Tensor | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.shape[-1] for part in known}) > 1:
        return None
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, 0, 0, width - part.shape[1])) for part in known])


def join_model_inputs(per_sequence: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Extra model inputs of B sequences as one mapping, joined along their first axis.

    Every value is what the model takes for that one sequence: its first axis has length 1.
    """
    joined: dict[str, Tensor] = {}
    for name in sorted({name for inputs in per_sequence for name in inputs}):
        if any(name not in inputs for inputs in per_sequence):
            raise DataError(
                f"model_inputs {name!r} is missing from some records of a batch; give it in all"
            )
        values = [torch.as_tensor(inputs[name]) for inputs in per_sequence]
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1 or any(shape[:1] != (1,) for shape in shapes):
            raise DataError(
                f"model_inputs {name!r} must have one shape that starts with 1, as the model takes "
                f"it for one prompt; got {', '.join(map(str, sorted(shapes)))}"
            )
        joined[name] = torch.cat(values)
    return joined


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`."""
    moved: Batch = _moved(batch, torch.device(device))
    return moved


def rollout_to(rollout: Rollout, device: torch.device) -> Rollout:
    moved: dict[str, Any] = {
        item.name: value.to(device)
        for item in fields(rollout)
        if isinstance(value := getattr(rollout, item.name), Tensor)
    }
    return replace(rollout, **moved)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, TokenBatch | Batch):
        changed = {item.name: _moved(getattr(value, item.name), device) for item in fields(value)}
        return type(value)(**changed)
    return value

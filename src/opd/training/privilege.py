"""What views with a context read: of a rollout, and of held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from opd.diagnose.copying import copied_stats
from opd.errors import ConfigError, DataError
from opd.head.replies import check_reply
from opd.head.visit import NAMED
from opd.objective import Method
from opd.rollout.pack import pack_rollout, select
from opd.teacher.context import (
    FEEDBACK,
    SIBLING,
    ContextEncoder,
    after_rollout,
    context_fields,
    stand_in,
    told_by_rollout,
)
from opd.types import (
    Batch,
    Prompt,
    Rollout,
    Stat,
    Teacher,
    TeacherRequest,
    TeacherScores,
    TeacherView,
    with_parts,
)

COPIED, MOSTLY_COPIED, WITHOUT = "copied", "mostly_copied", "without_context"
METRICS = (COPIED, MOSTLY_COPIED, WITHOUT)
"""Ends of the names of metrics that are about a view's context."""


@dataclass(frozen=True)
class Reading:
    """What a view with a context reads: the responses of a batch after other prompts.

    Attributes:
        batch: the sequences that have a context, or if none has, one that stands for the form of
            the reply.
        prompt_ids: what is read in place of each sequence's prompt; empty where there is nothing.
        sequences: places of those in `batch` among all.
        rows: of the rows of `batch`, their places among all; None: they are all rows.
        silent: no sequence has a context.
    """

    batch: Batch
    prompt_ids: tuple[tuple[int, ...], ...]
    sequences: tuple[int, ...]
    rows: Int[Tensor, " M"] | None = None
    silent: bool = False


def read(
    view: TeacherView, rollout: Rollout, batch: Batch, encoder: ContextEncoder, *, pad_id: int
) -> Reading:
    """What a view with a context reads of a rollout that `batch` has packed."""
    total = len(rollout.prompt_ids)
    told = told_by_rollout(rollout, encoder.tokenizer, view.context)
    known = {b: each for b, each in enumerate(told) if each is not None}
    encoded = encoder.encode([rollout.prompts[b] for b in known], view, [*known.values()])
    ids = dict(zip(known, encoded, strict=True))
    whole = pack_rollout(
        replace(rollout, prompt_ids=tuple(ids.get(b, rollout.prompt_ids[b]) for b in range(total))),
        pad_id=pad_id,
        merge_ids=batch.merge_ids,
        device=batch.input_ids.device,
    )
    prompt_ids = tuple(ids.get(b, ()) for b in range(total))
    if len(ids) == total:
        return Reading(whole, prompt_ids, tuple(range(total)))
    has_rows = rollout.mask.any(1).tolist()
    silent = not any(has_rows[b] for b in ids)
    some = [b for b in range(total) if has_rows[b]][:1] or [0] if silent else [*ids]
    part = select(whole, some)
    return Reading(part.batch, prompt_ids, tuple(some), part.rows, silent)


def ask(
    view: str, teacher: Teacher, request: TeacherRequest, reading: Reading | None
) -> TeacherScores:
    """A teacher's reply for the rows of a request; none for rows that have no context.

    Args:
        request: as if the view read what the student reads.
        reading: what it reads in place of that; None: nothing else.
    """
    if reading is None:
        return teacher.score(request)
    if reading.rows is None:
        return teacher.score(replace(request, batch=reading.batch))
    rows, total = reading.rows, request.batch.row_index.shape[0]
    prompts = tuple(request.prompts[b] for b in reading.sequences) if request.prompts else ()
    ids = None if request.ids is None else request.ids[rows]
    reply = teacher.score(replace(request, batch=reading.batch, ids=ids, prompts=prompts))
    check_reply(view, reply, rows=len(rows))
    index = torch.full((total,), -1, dtype=torch.long, device=rows.device)
    if not reading.silent:
        own = torch.arange(len(rows), device=rows.device)
        index[rows] = own if reply.row_index is None else reply.row_index
    return replace(reply, row_index=index)


def metrics_of(
    rollout: Rollout, contexts: Mapping[str, Reading], views: Iterable[TeacherView]
) -> dict[str, Stat]:
    """How much the responses copy of each context, and how many sequences have none."""
    metrics: dict[str, Stat] = {}
    for view in views:
        if view.name not in contexts:
            continue
        reading = contexts[view.name]
        metrics |= _copying(view, rollout, reading.prompt_ids)
        if after_rollout(view.context):
            without = sum(not ids for ids in reading.prompt_ids)
            total = float(len(reading.prompt_ids))
            metrics[_metric(view, WITHOUT)] = Stat(float(without), total)
    return metrics


def _copying(
    view: TeacherView, rollout: Rollout, privileged: Sequence[Sequence[int]]
) -> dict[str, Stat]:
    copied, mostly = copied_stats(rollout, privileged)
    if not copied.count:
        return {}
    return {_metric(view, COPIED): copied, _metric(view, MOSTLY_COPIED): mostly}


def copied_in(view: TeacherView, metrics: Mapping[str, Stat]) -> dict[str, float]:
    """What some responses copied of a view's context; nothing where none was measured."""
    names = {what: _metric(view, what) for what in (COPIED, MOSTLY_COPIED)}
    return {what: metrics[name].mean for what, name in names.items() if name in metrics}


def _metric(view: TeacherView, what: str) -> str:
    return f"teacher/{view.name.removeprefix(NAMED)}/{what}"


# --------------------------------------------------------------------------------------------
# Held-out prompts

Measured = Callable[[Rollout], Mapping[str, Stat]]
"""What measures responses to held-out prompts."""


@dataclass(frozen=True)
class HeldOut:
    """The views whose context is known of every held-out prompt, before anything is written.

    Attributes:
        notes: which views are none of them, and why.
    """

    encoder: ContextEncoder
    views: tuple[TeacherView, ...] = ()
    notes: tuple[str, ...] = ()

    def copying(self, rollout: Rollout) -> dict[str, Stat]:
        """How much the responses copy of what each of these views would read."""
        metrics: dict[str, Stat] = {}
        for view in self.views:
            metrics |= _copying(view, rollout, self.encoder.encode(rollout.prompts, view))
        return metrics

    def told(self, view: TeacherView, prompts: Sequence[Prompt]) -> tuple[list[Prompt], Measured]:
        """The prompts as the view reads them, judged as they are, and what measures how much of
        the context the responses to them copy."""
        own = {prompt.id: prompt.prompt_ids for prompt in prompts}
        pairs = zip(prompts, self.encoder.encode(prompts, view), strict=True)

        def copying(rollout: Rollout) -> dict[str, Stat]:
            unread = tuple(own[prompt.id] for prompt in rollout.prompts)
            return _copying(view, replace(rollout, prompt_ids=unread), rollout.prompt_ids)

        return [replace(prompt, prompt_ids=ids) for prompt, ids in pairs], copying


def held_out(
    views: Sequence[TeacherView],
    prompts: Sequence[Prompt],
    encoder: ContextEncoder,
    *,
    answered: bool = False,
    limit: int | None = None,
    new: int = 0,
) -> HeldOut:
    """Which views can be measured on held-out prompts.

    Args:
        answered: the student is to answer what the views read.
        limit: its positions; None: it does not say.
        new: tokens of the longest response.

    Raises:
        ConfigError: it is to answer, and has no positions for it.
    """
    found, notes = [], []
    for view in views:
        if not view.context:
            continue
        name = f"the view {view.name!r}"
        if places := after_rollout(view.context):
            if answered:
                notes.append(
                    f"evaluate.privileged: {name} reads {{{places[0]}}}, which is known only after "
                    "a rollout, so nothing is measured with it"
                )
            continue
        try:
            longest = max(map(len, encoder.encode(prompts, view)), default=0)
        except DataError as error:
            notes.append(f"{name} is not measured on held-out prompts: {error}")
            continue
        if answered:
            check_room(view, longest, limit, new, "the held-out prompts")
        found.append(view)
    if answered and not found and not notes:
        notes.append("evaluate.privileged: no view has a context, so there is nothing to measure")
    return HeldOut(encoder, tuple(found), tuple(notes))


# --------------------------------------------------------------------------------------------
# Checks


def check_context(
    view: TeacherView,
    prompts: Sequence[Prompt],
    encoder: ContextEncoder,
    limit: int | None,
    new: int,
) -> None:
    """Refuse a context that a record has no columns for, that leaves no room for a response, or
    that ends elsewhere in a block of thinking than the prompt does.

    Args:
        prompts: the records, or some of an endless source.
        limit: positions of the model that reads the context; None: it does not say.
        new: tokens of the longest response.

    Raises:
        ConfigError, DataError: name the view's context, or the record and the column.
    """
    context_fields(view.context)
    told = [stand_in(prompt, view.context) for prompt in prompts]
    encoded = encoder.encode(prompts, view, told)
    longest, where = max(((len(ids), p.id) for ids, p in zip(encoded, prompts, strict=True)))
    if SIBLING in after_rollout(view.context):
        longest += new
    check_room(view, longest, limit, new, where)
    encoder.check_thinking(prompts, view)


def check_room(view: TeacherView, longest: int, limit: int | None, new: int, where: str) -> None:
    """Refuse a context that leaves no room for a response.

    Args:
        longest: tokens of what is read before it.
        limit, new: as in `check_context`.
        where: whose the longest is.

    Raises:
        ConfigError: says how many tokens there are, and positions.
    """
    if limit is not None and longest + new > limit:
        raise ConfigError(
            f"the view {view.name!r} reads prompts of up to {longest} tokens ({where}), which with "
            f"responses of up to {new} are more than the {limit} positions of its model; shorten "
            "its context, or lower sampler.max_new_tokens"
        )


def check_told(method: Method, *, samples: int | None = None, judged: bool = True) -> None:
    """Refuse a context that the rollouts of this run can never fill.

    Args:
        samples: responses per prompt; None: not asked.
        judged: whether there is a verifier.

    Raises:
        ConfigError: names the view, the place, and the setting that is missing.
    """
    for view in with_parts(method.objective.views(), method.views):
        places = after_rollout(view.context) if view.context else ()
        what = {
            SIBLING: "a right response of another sample of the same prompt",
            FEEDBACK: "the verifier's reason for its verdict",
        }
        for place in places:
            reads = f"the context of the view {view.name!r} reads {{{place}}}, {what[place]}"
            if place == SIBLING and samples is not None and samples < 2:
                raise ConfigError(
                    f"{reads}, and sampler.samples_per_prompt is {samples}, so there is no other; "
                    "raise it"
                )
            if not judged:
                raise ConfigError(
                    f"{reads}, and there is no verifier; set data.verifier, or give the prompts "
                    "answers"
                )
            if not method.states.student:
                raise ConfigError(
                    f"{reads}, and method.states.student is 0: only what the student writes is "
                    "judged; give it a share"
                )

"""The parts of one step, each a function: draw, observe, score, signal, update."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from opd.diagnose.records import Gathered
from opd.errors import DataError, TrainingError, is_out_of_memory
from opd.fields import EXTRA_PREFIX
from opd.formula import support
from opd.head.distribution import merged_tokens
from opd.head.replies import check_reply
from opd.head.visit import NAMED
from opd.objective import Objective, Routed, Term
from opd.rollout.pack import Part, join_parts, split, with_token
from opd.student import Student
from opd.teacher.context import ContextEncoder
from opd.training import privilege
from opd.training.plan import AskedEntries, Plan, is_scored, reply_is_distribution
from opd.training.privilege import Reading
from opd.types import (
    STUDENT_PART,
    Batch,
    Bound,
    FieldKey,
    Prompt,
    Provenance,
    Rollout,
    Stat,
    Teacher,
    TeacherRequest,
    TeacherScores,
    TeacherView,
    TokenBatch,
    add_stats,
    pack_rows,
    unpack_rows,
)


def share_out(total: int, shares: Sequence[float], step: int) -> list[int]:
    """How many of `total` sequences each source writes at `step`; exact over many steps.

    No draw, so nothing random decides who writes. Counts are never negative and sum to `total`;
    over the steps so far no source is further than one sequence per source from its share.
    """
    before, after = _written(total * step, shares), _written(total * (step + 1), shares)
    return [now - then for now, then in zip(after, before, strict=True)]


def _written(sequences: int, shares: Sequence[float]) -> list[int]:
    """Of the first so many sequences, how many each source wrote: its part of what is left."""
    counts, left, share_left = [], sequences, sum(shares)
    for share in shares:
        share_after = share_left - share
        all_left = share_after < 1e-9
        count = left if all_left else math.floor(left * share / share_left + 1e-9)
        counts.append(count)
        left, share_left = left - count, 0.0 if all_left else share_after
        if all_left:
            break
    return counts + [0] * (len(shares) - len(counts))


def rollout_from_data(prompts: Sequence[Prompt]) -> Rollout:
    """The data set's own responses as a rollout; nothing is sampled."""
    responses = [prompt.response_ids or () for prompt in prompts]
    width = max((len(response) for response in responses), default=0)
    tokens = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    provenance = torch.full((len(prompts), width), int(Provenance.PADDING))
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length = len(response)
        tokens[row, :length] = torch.tensor(response, dtype=torch.long)
        open_rows = torch.tensor(prompt.response_mask or (True,) * length, dtype=torch.bool)
        mask[row, :length] = open_rows
        provenance[row, :length] = torch.where(
            open_rows, int(Provenance.DATA), int(Provenance.TOOL)
        )
    return Rollout(
        prompt_ids=tuple(prompt.prompt_ids for prompt in prompts),
        tokens=tokens,
        mask=mask,
        provenance=provenance,
        sampler_logp=torch.zeros(tokens.shape),
        policy_version=torch.full(tokens.shape, -1),
        group=torch.arange(len(prompts)),
        stop_reason=("eos",) * len(prompts),
        verdict=torch.full((len(prompts),), math.nan),
        prompts=tuple(prompts),
        model_inputs=tuple(prompt.model_inputs for prompt in prompts),
    )


def extra_columns(prompts: Sequence[Prompt], objective: Objective) -> dict[str, Tensor]:
    """The columns of the data that formulas ask for as `extra_NAME`, one number per response.

    Raises:
        DataError: a record without such a column, or with something else than a number in it.
    """
    asked = sorted(objective.field_names())
    names = [name.removeprefix(EXTRA_PREFIX) for name in asked if name.startswith(EXTRA_PREFIX)]
    return {name: torch.tensor([_number(prompt, name) for prompt in prompts]) for name in names}


def _number(prompt: Prompt, column: str) -> float:
    value = prompt.columns.get(column)
    if value is None and column in prompt.columns:
        return math.nan  # JSON has no other word for a number that is not known
    if isinstance(value, int | float):
        return float(value)
    raise DataError(
        f"{prompt.id.rstrip(':')}: a formula asks for {EXTRA_PREFIX}{column}, so the column "
        f"{column!r} must hold a number in every record, got {value!r}; there are: "
        f"{', '.join(prompt.columns) or 'none'}"
    )


def observe(
    student: Student,
    batch: Batch,
    rollout: Rollout,
    objective: Objective,
    plan: Plan,
    max_tokens: int,
) -> Batch:
    """Add what must be known of the student at rollout time: `old_logp`, its top ids.

    From the sampler where it drew from the very policy that is compared; otherwise from one
    visit without gradient.
    """
    k = objective.support_size("student_top_ids")
    old, top = FieldKey("student_logp"), FieldKey("student_top_ids", "", _top(k))
    wanted = {"old_logp": old, "student_top_ids": top}
    seen = visit(
        student,
        batch,
        frozenset(wanted[name] for name in plan.observe),
        objective.temperature,
        max_tokens,
    )
    changes: dict[str, Any] = {}
    if "old_logp" in objective.field_names():
        mask = batch.token.mask
        changes["old_logp"] = (
            unpack_rows(seen[old], mask) if old in seen else batch.token.sampler_logp
        )
    if k:
        from_sampler = rollout.sampler_top_ids
        ids = seen[top] if top in seen else pack_rows(_known(from_sampler), rollout.mask)
        changes["student_top_ids"] = ids.to(batch.input_ids.device)
    return with_token(batch, **changes) if changes else batch


def privileged(
    rollout: Rollout, batch: Batch, plan: Plan, encoder: ContextEncoder, *, pad_id: int
) -> dict[str, Reading]:
    """Per view with a context, the same responses after the prompt that this view reads.

    Row n of every batch is the same response token as row n of `batch`, or as row `rows[n]` where
    only some sequences have a context.
    """
    return {
        view.name: privilege.read(view, rollout, batch, encoder, pad_id=pad_id)
        for view in plan.views
        if view.context
    }


def score(
    teachers: Mapping[str, Teacher],
    batch: Batch,
    objective: Objective,
    plan: Plan,
    *,
    contexts: Mapping[str, Reading] = MappingProxyType({}),
    entries: Mapping[str, AskedEntries] = MappingProxyType({}),
    prompts: Sequence[Prompt] = (),
    again: bool = False,
) -> Batch:
    """Ask every view for what the objective needs of it, and no more.

    A combination asks nobody: the head makes it from the views that are its parts.

    Args:
        contexts: what views with a context read, from `privileged`.
        entries: of views that say something of single tokens, what.
        prompts: the records that the sequences answer, for a teacher that is routed by them.
        again: an update has happened since; ask only the views that move with the student.
    """
    views = dict(batch.token.views) if again else {}
    for view in plan.views:
        if not is_scored(view):
            views[view.name] = TeacherScores(
                parts=_parts(view), normalised=view.normalised, mix=view.mix
            )
        elif view.moves or not again:
            request = _request(
                batch, batch.token, objective, plan, view.name, entries.get(view.name)
            )
            request = replace(request, prompts=tuple(prompts))
            read = contexts[view.name] if view.context else None
            started = time.perf_counter()
            reply = privilege.ask(view.name, teachers[view.name], request, read)
            check_reply(view.name, reply, rows=batch.row_index.shape[0])
            views[view.name] = _described(reply, view, time.perf_counter() - started)
    return with_token(batch, views=views) if views else batch


def _request(
    batch: Batch,
    token: TokenBatch,
    objective: Objective,
    plan: Plan,
    view: str,
    entries: AskedEntries | None,
) -> TeacherRequest:
    """What a view is asked.

    Args:
        batch: what it reads.
        token: the student's own, which knows the ids that are compared.
    """
    if entries is None:
        distribution = reply_is_distribution(plan.needs, view)
        return TeacherRequest(
            batch=batch,
            distribution=distribution,
            sampled=not distribution
            or any(need.view == view and need.field == "logp" for need in plan.needs),
            top_k=objective.support_size("teacher_top_ids"),
            temperature=objective.temperature,
        )
    ids = []
    if entries.student_k:
        ids.append(_known(token.student_top_ids)[:, : entries.student_k])
    if entries.own_token:
        ids.append(pack_rows(token.tokens, token.mask).unsqueeze(-1))
    return TeacherRequest(
        batch=batch,
        distribution=False,
        sampled=True,
        top_k=entries.top_k,
        ids=merged_tokens(torch.cat(ids, -1), batch.merge_ids) if ids else None,
        entropy=entries.entropy,
        temperature=objective.temperature,
    )


def _parts(view: TeacherView) -> tuple[tuple[str, float], ...]:
    """What the head combines; the weights are numbers, because the method's schedules are settled.

    A live self that reads what the student reads is the student, and nothing else.
    """
    return cast("tuple[tuple[str, float], ...]", view.parts) or ((STUDENT_PART, 1.0),)


def _described(scores: TeacherScores, view: TeacherView, seconds: float) -> TeacherScores:
    """The reply, with what the view is in its provenance, and the time that it took."""
    said = {"source": view.source, "context": view.context}
    said |= {"decay": f"{view.decay:g}"} if view.decay else {}
    kept = {name: text for name, text in said.items() if text}
    took = scores.seconds or {view.name.removeprefix(NAMED): seconds}
    return replace(scores, provenance={**scores.provenance, **kept}, seconds=took)


def teacher_seconds(views: Mapping[str, TeacherScores]) -> dict[str, Stat]:
    """The time that each of several teachers took, as a metric; none where there is one alone."""
    took: dict[str, float] = {}
    for name, view in views.items():
        if view.names or name.startswith(NAMED):
            for model, seconds in view.seconds.items():
                took[model] = took.get(model, 0.0) + seconds
    return {f"teacher/{name}/seconds": Stat(seconds, 1.0) for name, seconds in took.items()}


def signal(
    student: Student,
    batch: Batch,
    objective: Objective,
    plan: Plan,
    max_tokens: int,
    *,
    fresh: bool,
    known: Mapping[FieldKey, Tensor] = MappingProxyType({}),
) -> Batch:
    """Settle coupled quantities at the current weights; a no-op where nothing is coupled.

    Args:
        known: fields that an earlier visit at these weights has seen.
        fresh: no update has happened since the rollout, so the sampler's log-probabilities
            are the student's where the policies agree.
    """
    if not plan.signal:
        return batch
    keys = objective.signal_keys()
    values = {key: known[key] for key in keys & known.keys()}
    for key in keys - values.keys():
        view = batch.token.views.get(key.view)
        told = None if view is None or key.smoothing else _said(view)
        if key.name == "teacher_logp" and told is not None:
            values[key] = told
        elif key.name == "student_logp" and fresh and plan.same_policy:
            values[key] = pack_rows(batch.token.sampler_logp, batch.token.mask)
    missing = frozenset(keys - values.keys())
    values |= visit(student, batch, missing, objective.temperature, max_tokens)
    return with_token(batch, coupled=objective.signal(batch.token, values))


def _said(view: TeacherScores) -> Tensor | None:
    """What a view said of every row's own token; 0, which nobody reads, where it said nothing."""
    said, index = view.sampled_logp, view.row_index
    if said is None or index is None:
        return said
    if not len(said):
        return said.new_zeros(len(index))
    return torch.where(index < 0, 0.0, said[index.clamp(min=0)])


def update(
    student: Student,
    batch: Batch,
    objective: Objective,
    max_tokens: int,
    *,
    step: int,
    gathered: Gathered | None = None,
) -> dict[str, Stat]:
    """Gradient of the objective over the whole batch, accumulated over micro-batches.

    Args:
        gathered: receives what is known of every row.

    Raises:
        TrainingError: a loss that is not finite; names the step and the term.
    """
    stats: list[Mapping[str, Stat]] = []
    wanted = gathered.wanted if gathered is not None else frozenset()
    for part in split(batch, max_tokens=max_tokens):
        with memory_advice("train.max_tokens", max_tokens):
            out = student(part.batch, objective, wanted=wanted)
            assert out.loss is not None
            if not torch.isfinite(out.loss):
                raise TrainingError(_blame(out.rows, part, objective, step))
            if gathered is not None:
                gathered.take(part.rows, out)
            if objective.is_off:
                stats.append(out.stats)
                continue
            if not out.loss.requires_grad:
                raise TrainingError(
                    f"step {step}: no term of the objective depends on the student's weights, so "
                    "nothing can be learnt; a formula of the run detaches what it returns"
                )
            out.loss.backward()
        stats.append(out.stats)
    return add_stats(stats)


def blame_gradient(student: Student, batch: Batch, objective: Objective, max_tokens: int) -> str:
    """Which term's own gradient is not finite, in words; discards the accumulated gradient."""
    for label, _ in objective.labelled():
        student.zero_grad(set_to_none=True)
        alone = _alone(objective, label)
        for part in split(batch, max_tokens=max_tokens):
            loss = student(part.batch, alone).loss
            if loss.requires_grad:
                loss.backward()
        gradients = [parameter.grad for parameter in student.trainable().values()]
        if not all(torch.isfinite(grad).all() for grad in gradients if grad is not None):
            return f"the term {label!r}"
    return "the sum of the terms"


def _alone(objective: Objective, label: str) -> Objective:
    """The objective with every other term switched off; a gate may still read their advantages."""
    terms = (
        replace(term, name=other) if other == label else _switched_off(replace(term, name=other))
        for other, term in objective.labelled()
    )
    return Objective(*terms, temperature=objective.temperature)


def _switched_off(term: Term) -> Term:
    if isinstance(term, Routed):
        return replace(term, coef=0.0, source=replace(term.source, coef=0.0))
    return replace(term, coef=0.0)


def visit(
    student: Student,
    batch: Batch,
    keys: frozenset[FieldKey],
    temperature: float,
    max_tokens: int,
) -> dict[FieldKey, Tensor]:
    """Fields of the whole batch from a visit without gradient, in the order of its rows."""
    if not keys:
        return {}
    found: dict[FieldKey, list[tuple[Tensor, Tensor]]] = {key: [] for key in keys}
    for part in split(batch, max_tokens=max_tokens):
        with memory_advice("train.max_tokens", max_tokens):
            out = student(part.batch, wanted=keys, temperature=temperature)
        for key, value in out.fields.items():
            found[key].append((part.rows, value))
    total = batch.row_index.shape[0]
    return {key: join_parts(values, total) for key, values in found.items()}


@contextmanager
def memory_advice(knob: str, value: int) -> Iterator[None]:
    """Turn running out of memory into an error that names the knob."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).split("\n", 1)[0] or type(error).__name__
        raise TrainingError(
            f"out of memory in a micro-batch of at most {value} tokens: lower {knob} "
            f"(now {value}), which changes no result, or sampler.max_new_tokens. ({first_line})"
        ) from error


def _top(k: int) -> Bound | None:
    return Bound.of(support.student_top_k).with_knobs(k=k) if k else None


def _known(value: Tensor | None) -> Tensor:
    if value is None:
        raise TrainingError("the sampler returned no top ids although they were asked for")
    return value


def _blame(rows: Mapping[str, Tensor], part: Part, objective: Objective, step: int) -> str:
    for label, factor in objective.reduction_factors(part.batch).items():
        counted = rows[f"loss/{label}"][factor != 0]
        bad = int((~torch.isfinite(counted)).sum())
        if bad:
            return (
                f"step {step}: the term {label!r} is not finite on {bad} of {counted.numel()} "
                "tokens; the last checkpoint is intact. A reverse KL is infinite where the teacher "
                "gives a token no mass: try generalized_jsd or a top-k support; or lower "
                "train.learning_rate"
            )
    return f"step {step}: the loss is not finite; the last checkpoint is intact"

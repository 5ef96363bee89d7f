"""Objectives of ours as losses under audit: through the signal phase and the head that train.

Axes: N rows of one response, or of several behind each other; B responses of at most T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from opd.audit.loss import Loss, Rows, Writer
from opd.audit.oracle import as_sequence_sum, identity_head, settled, top_ids
from opd.audit.toys import TREE_VOCABULARY
from opd.errors import ConfigError
from opd.fields import EXTRA_PREFIX, positional_names
from opd.head import linear_head
from opd.objective import Method, Objective, Sampled, Term
from opd.rollout.pack import pack_rollout, with_token
from opd.types import (
    ROW_KINDS,
    Batch,
    Bound,
    Count,
    Provenance,
    Rollout,
    TeacherScores,
    pack_rows,
)

__all__ = ["method_loss", "objective_loss"]

WHOLE = TREE_VOCABULARY
"""Tokens of the smallest vocabulary that is played: a larger k is no choice there."""


class _Text(NamedTuple):
    """Who wrote the tokens: who is played by, how rows are marked, what is said of it."""

    writer: Writer
    provenance: Provenance
    said: str = ""


STUDENT = _Text("student", Provenance.STUDENT)


def method_loss(method: Method, name: str, *, keep_k: bool = False) -> Loss:
    """What a method descends, with what it needs played as far as a small world can.

    Each k that is larger than the smallest vocabulary becomes one less than that; the text is of
    whom the method's state source says, the data's being the teacher's; no response is judged.

    Args:
        method: schedules settled.
        keep_k: leave every k as it is.

    Raises:
        ConfigError: it reads what nothing here can play.
    """
    missing = sorted(_unplayed(method.objective))
    if missing:
        raise ConfigError(
            f"{name} cannot be audited: it reads {', '.join(missing)}, and a loss under audit is "
            "told the scores of one response alone; `opd.audit.expectation` takes a critic and a "
            "verifier"
        )
    objective, said = method.objective, []
    if not keep_k:
        objective, smaller = _with_small_k(objective)
        said += [f"at {knob} = {WHOLE - 1}" for knob in smaller]
    text = _text_of(method)
    judged = bool({"verdict", "group"} & set(_names(objective)))
    if objective.temperature != 1:
        said.append(f"at temperature {objective.temperature:g}")
    said += [text.said] if text.said else []
    said += ["with no response judged"] if judged else []
    loss = objective_loss(objective, name, text=text)
    gates = [
        bound.short_name
        for _, term in objective.parts()
        for place, bound in term.slots()
        if place.startswith("weights")
    ]
    unplayed = "a verdict" if judged else ""
    return replace(loss, settings=tuple(said), unplayed=unplayed, gates=tuple(gates))


def objective_loss(objective: Objective, name: str, *, text: _Text = STUDENT) -> Loss:
    """An objective as a loss of one response's rows, summed, at the objective's own temperature.

    Every view is the teacher, whatever fills it in a run, and no verifier judges the response.

    Args:
        objective: schedules settled.
    """
    summed = as_sequence_sum(objective)

    def apart(responses: Sequence[Rows]) -> tuple[Tensor, Float[Tensor, " B"]]:
        batch = _batch(summed, responses, text.provenance)
        logits = _scaled([rows.student for rows in responses], summed.temperature)
        if summed.coupled:
            batch = settled(summed, logits.detach(), batch, 1)
        out = linear_head(logits, identity_head(logits.shape[1]), batch, summed)
        assert out.loss is not None
        factors = summed.reduction_factors(batch)
        losses = torch.stack([out.rows[f"loss/{label}"] * factors[label] for label in factors])
        mask = batch.token.mask
        at = pack_rows(torch.arange(len(mask))[:, None].expand_as(mask), mask)
        per_response = losses.new_zeros(len(mask)).index_add(0, at, losses.sum(0))
        return out.loss, per_response.detach()

    def call(rows: Rows) -> Tensor:
        return apart([rows])[0]

    reads_old = not {"old_logp", "sampler_logp"}.isdisjoint(_names(summed))
    takes = frozenset({"old_logp"} if reads_old else ())
    return Loss(name, call, takes, is_linear=True, apart=apart, writer=text.writer)


def _batch(objective: Objective, responses: Sequence[Rows], provenance: Provenance) -> Batch:
    size, lengths = len(responses), torch.tensor([len(rows.tokens) for rows in responses])
    here = torch.arange(int(lengths.max())) < lengths[:, None]

    def padded(values: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)

    old = padded([rows.old for rows in responses])
    sampled = {
        Provenance.STUDENT: old,
        Provenance.DATA: torch.zeros_like(old),  # nobody knows
    }
    rollout = Rollout(
        prompt_ids=((0,),) * size,
        tokens=padded([rows.tokens for rows in responses]),
        mask=here,
        provenance=torch.where(here, int(provenance), int(Provenance.PADDING)),
        sampler_logp=sampled.get(provenance, padded([_of_teacher(rows) for rows in responses])),
        policy_version=torch.zeros_like(here, dtype=torch.long),
        group=torch.arange(size),
        stop_reason=("eos",) * size,
        verdict=torch.full((size,), math.nan, dtype=torch.float64),
    )
    counts = {kind: Count(rows=float(lengths.sum()), sequences=1.0) for kind in ROW_KINDS}
    packed = replace(pack_rollout(rollout, pad_id=0), counts=counts)
    teacher = _scaled([rows.teacher for rows in responses], objective.temperature)
    student = torch.cat([rows.student.detach() for rows in responses])
    head = identity_head(student.shape[1])
    views = {view: TeacherScores(hidden=teacher, unembedding=head) for view in objective.views()}
    k = objective.support_size("student_top_ids")
    return with_token(
        packed,
        views=views,
        old_logp=old,
        special=torch.zeros_like(here),
        student_top_ids=top_ids(student, packed, k) if k else None,
    )


def _scaled(logits: list[Tensor], temperature: float) -> Float[Tensor, "N V"]:
    """What the objective divides by its temperature, so that it compares these logits."""
    joined = torch.cat(logits)
    return joined if temperature == 1 else joined.double() * temperature


def _of_teacher(rows: Rows) -> Float[Tensor, " N"]:
    return rows.teacher.log_softmax(-1).gather(-1, rows.tokens[:, None]).squeeze(-1)


# --------------------------------------------------------------------------------------------
# What a method needs


def _names(objective: Objective) -> Iterator[str]:
    """The fields that the functions of an objective read, those of a route's source too."""
    for _, term in objective.parts():
        for _, bound in term.slots():
            yield from positional_names(bound.function)


def _unplayed(objective: Objective) -> Iterator[str]:
    for name in set(_names(objective)):
        if name.startswith(EXTRA_PREFIX):
            yield f"extra.{name.removeprefix(EXTRA_PREFIX)}"
        elif name in ("values", "bootstrap_value"):
            yield "the critic's " + name.replace("_", " ")


def _text_of(method: Method) -> _Text:
    """Whose text a method looks at and sees most of; the student's where as much is another's."""
    states = method.states
    shares = {
        _Text("student", Provenance.STUDENT, "on the student's text alone"): (
            states.student + states.replay
        ),
        _Text("teacher", Provenance.TEACHER, "on the teacher's text"): states.teacher,
        _Text("teacher", Provenance.DATA, "on text of the data, played by the teacher"): (
            states.data
        ),
    }
    looked = {kind for _, term in method.objective.parts() for kind in ROW_KINDS[term.rows]}
    text = max(shares, key=lambda some: (some.provenance in looked, shares[some]))
    is_plain = text.writer == "student" and shares[text] == 1 and not states.helped
    return text._replace(said="") if is_plain else text


def _with_small_k(objective: Objective) -> tuple[Objective, tuple[str, ...]]:
    """The objective with each k that a small vocabulary holds, and the knobs that had another."""
    smaller: list[str] = []

    def small(bound: Bound) -> Bound:
        large = [
            key
            for key, value in bound.knobs
            if (key == "k" or key.endswith("_k")) and isinstance(value, int) and value > WHOLE
        ]
        smaller.extend(large)
        return bound.with_knobs(**dict.fromkeys(large, WHOLE - 1)) if large else bound

    terms = (_with_bounds(term, small) for term in objective.terms)
    made = Objective(*terms, temperature=objective.temperature)
    return made, tuple(dict.fromkeys(smaller))


def _with_bounds(term: Term, change: Callable[[Bound], Bound]) -> Term:
    """The term with every function of it changed."""
    changed: dict[str, Any] = {}
    for item in fields(term):
        value = getattr(term, item.name)
        if isinstance(value, Sampled):
            changed[item.name] = _with_bounds(value, change)
        elif isinstance(value, Bound):
            changed[item.name] = change(value)
        elif isinstance(value, tuple):
            changed[item.name] = tuple(change(bound) for bound in value)
    return replace(term, **changed)

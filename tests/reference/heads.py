"""The head, transcribed the slow way: every logit of the batch at once, in float64, by autograd.

`naive_head` projects all rows, holds every distribution whole, differentiates through all of it
and reads the fields of `opd.fields.FIELDS` off what it holds. Supports and tails are loops over
rows and ids. Operands are widened as they come, so that a head in float32 or bfloat16 is compared
on the very numbers it was given. Unlike its neighbours it takes the terms, and with them
divergences, rewards and routes, from the library: each of those has an oracle of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from opd.errors import TeacherError
from opd.fields import FIELDS, positional_names
from opd.formula import divergence
from opd.objective import SETTLED, Objective, Term
from opd.types import STUDENT_PART, Batch, FieldKey, TeacherScores, TokenBatch, Unembedding

ABSENT = -1


@dataclass(frozen=True)
class NaiveHead:
    """What the head answers, in float64 and detached.

    Attributes:
        loss: sum over rows and terms of reduction factor times row loss; None without objective.
        hidden, weight, bias: gradients of the loss with respect to these.
        logits: its gradient with respect to the logits, before temperature and merging, `[N, V]`.
        log_probs: its gradient with respect to the student's log-probabilities, each taken for a
            number of its own: what the softmax has yet to centre.
        row_losses: per term, before the reduction.
        summands: what the loss is the sum of, terms by rows.
        fields: what was wanted.
    """

    loss: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    logits: Tensor | None = None
    log_probs: Tensor | None = None
    row_losses: Mapping[str, Tensor] = field(default_factory=dict)
    summands: Tensor | None = None
    fields: Mapping[FieldKey, Tensor] = field(default_factory=dict)


def naive_head(
    hidden: Tensor,
    unembedding: Unembedding,
    batch: Batch,
    objective: Objective | None = None,
    *,
    wanted: Collection[FieldKey] = (),
    temperature: float = 1.0,
    rounding: float = 0.0,
) -> NaiveHead:
    """Loss, gradients and fields of one batch.

    Args:
        hidden: `[N, H]`, of any floating type, as everything else.
        temperature: of the distributions where there is no objective; an objective has its own.
        rounding: by how much of itself, or of a nat if that is more, each log-probability is off
            when a formula reads it, normally distributed: how far the answer moves then is what
            no head of that precision can help.
    """
    leaves = {"hidden": _leaf(hidden), "weight": _leaf(unembedding.weight)}
    if unembedding.bias is not None:
        leaves["bias"] = _leaf(unembedding.bias)
    own = replace(unembedding, weight=leaves["weight"], bias=leaves.get("bias"))
    logits = logits_of(leaves["hidden"], own)
    if objective is not None:
        temperature = objective.temperature
    rows = Rows(leaves["hidden"], logits, batch, temperature, rounding)
    if objective is None:
        return NaiveHead(fields={key: rows.wanted(key) for key in wanted})

    row_losses = _row_losses(objective, rows)
    factors = objective.reduction_factors(batch)
    summands = torch.stack(
        [
            torch.where(factors[name] == 0, 0.0, row) * factors[name]
            for name, row in row_losses.items()
        ]
    )
    loss = summands.sum() + 0.0 * logits.sum()  # so that it has a gradient, if only of zeros
    sources = {**leaves, "logits": logits, "log_probs": rows.student}
    found = torch.autograd.grad(
        loss, list(sources.values()), allow_unused=True, materialize_grads=True
    )
    gradients = dict(zip(sources, found, strict=True))
    rows.logit_gradient = gradients["logits"]
    return NaiveHead(
        loss=loss.detach(),
        row_losses={name: row.detach() for name, row in row_losses.items()},
        summands=summands.detach(),
        fields={key: rows.wanted(key) for key in wanted},
        **gradients,
    )


def naive_signal(
    hidden: Tensor, unembedding: Unembedding, batch: Batch, objective: Objective
) -> dict[str, Tensor]:
    """The coupled quantities of a batch, from the fields as this module reads them."""
    visit = naive_head(
        hidden,
        unembedding,
        batch,
        wanted=objective.signal_keys(),
        temperature=objective.temperature,
    )
    return objective.signal(_wide_token(batch.token), visit.fields)


def logits_of(hidden: Tensor, unembedding: Unembedding) -> Tensor:
    """soft_cap(logit_scale * (hidden @ weight.T + bias)) of the real tokens."""
    size = unembedding.vocab_size
    logits = _wide(hidden) @ _wide(unembedding.weight)[:size].T
    if unembedding.bias is not None:
        logits = logits + _wide(unembedding.bias)[:size]
    logits = unembedding.logit_scale * logits
    cap = unembedding.soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _row_losses(objective: Objective, rows: Rows) -> dict[str, Tensor]:
    """Losses of the terms; 0 where the view that a term reads has no answer."""
    losses = objective.row_losses(rows)
    return {
        label: torch.where(rows.answered(term.against), losses[label], 0.0)
        if _reads_its_view(term)
        else losses[label]
        for label, term in objective.labelled()
    }


def _reads_its_view(term: Term) -> bool:
    """Whether some formula of the term asks for a field that a view fills."""
    asked = (name for _, bound in term.slots() for name in positional_names(bound.function))
    return any(name in FIELDS and FIELDS[name].side in ("view", "both") for name in asked)


# --------------------------------------------------------------------------------------------
# Fields


class Rows:
    """Every field of every row, one method per field; the student's carry the gradient."""

    def __init__(
        self,
        hidden: Tensor,
        logits: Tensor,
        batch: Batch,
        temperature: float,
        rounding: float = 0.0,
    ) -> None:
        self._hidden, self._token, self._groups = hidden, batch.token, batch.merge_ids
        self._temperature, self._rounding = temperature, rounding
        self._draw = torch.Generator().manual_seed(0)
        self._size = logits.shape[1]
        self.student = _merged((logits / temperature).log_softmax(-1), batch.merge_ids)
        self._tokens = self._packed(batch.token.tokens).clone()
        for first, *others in batch.merge_ids:
            for other in others:
                self._tokens[self._tokens == other] = first
        self._known: dict[FieldKey, Tensor] = {}
        self._wholes: dict[str, Tensor | None] = {}
        self.logit_gradient: Tensor | None = None

    def wanted(self, key: FieldKey) -> Tensor:
        """A field as a visit reports it: likeliest ids are those of now, to be chosen from."""
        if key.name == "student_top_ids":
            return _order(self.student)[:, : _k(key)]
        return self(key).detach()

    def __call__(self, key: FieldKey) -> Tensor:
        if key not in self._known:
            self._known[key] = self._rounded(key.name, self._find(key))
        return self._known[key]

    def _find(self, key: FieldKey) -> Tensor:
        name = key.name
        if hasattr(self, name):
            found: Tensor = getattr(self, name)(key)
            return found
        if name.startswith(SETTLED):
            return self._packed(_wide(self._token.coupled[name.removeprefix(SETTLED)]))
        if name.startswith("extra_"):
            column = _wide(self._token.extra[name.removeprefix("extra_")])
            whole = column[:, None].expand_as(self._token.mask) if column.dim() == 1 else column
            return self._packed(whole)
        return self._packed(_wide(getattr(self._token, name)))

    def _rounded(self, name: str, values: Tensor) -> Tensor:
        """Off by a rounding, where that is asked for and the field is a log-probability."""
        if not self._rounding or not name.endswith(("_log_probs", "_logp", "_log_tail")):
            return values
        off = torch.randn(values.shape, generator=self._draw, dtype=torch.float64)
        off = off * self._rounding * values.detach().abs().clamp(min=1.0)
        return torch.where(values.isfinite(), values + off, values)

    def _packed(self, values: Tensor) -> Tensor:
        return values[self._token.mask]

    # -- what the rollout holds --------------------------------------------------------------

    def tokens(self, key: FieldKey) -> Tensor:
        return self._tokens

    def position(self, key: FieldKey) -> Tensor:
        return self._packed(torch.arange(self._token.mask.shape[1]).expand_as(self._token.mask))

    def special_ids(self, key: FieldKey) -> Tensor:
        assert self._token.special_ids is not None
        return self._token.special_ids

    # -- the student -------------------------------------------------------------------------

    def student_hidden(self, key: FieldKey) -> Tensor:
        return self._hidden

    def student_logp(self, key: FieldKey) -> Tensor:
        return self.student.gather(1, self._tokens[:, None])[:, 0]

    def student_log_probs(self, key: FieldKey) -> Tensor:
        ids = self._ids(key)
        if ids is None:
            return self.student
        inside = _gathered(self.student, ids)
        if key.tail == "truncate":
            return inside
        if key.tail == "renormalise":
            return _conditional(inside)
        return _beside(inside, self.student_log_tail(key))

    def student_support_logp(self, key: FieldKey) -> Tensor:
        ids = self._ids(key)
        if ids is None:
            return self.student
        inside = _gathered(self.student, ids)
        return _beside(inside, self.student_log_tail(key)) if _has_bucket(key) else inside

    def student_log_tail(self, key: FieldKey) -> Tensor:
        ids = self._ids(key)
        return _log(_mass_outside(self.student, ids)) if ids is not None else self._nothing()

    def student_entropy(self, key: FieldKey) -> Tensor:
        return _entropy(self.student_log_probs(key))

    def student_top_ids(self, key: FieldKey) -> Tensor:
        """What a formula reads: the ids that were chosen once, for the rollout batch."""
        return self._top("student", "", _k(key))

    # -- a view ------------------------------------------------------------------------------

    def answered(self, view: str) -> Tensor:
        """Rows for which the view has an answer; a combination needs that of every part."""
        here = torch.ones(len(self._tokens), dtype=torch.bool)
        if view not in self._token.views:
            return here
        scores = self._token.views[view]
        for part, weight in scores.parts:
            if weight:
                here = here & self.answered(part)
        return here if scores.row_index is None else here & (scores.row_index >= 0)

    def teacher_logp(self, key: FieldKey) -> Tensor:
        told = self._scores(key.view).sampled_logp
        if told is not None:
            return self._smooth(self._or_even(key.view, self._of_rows(key.view, told)), key)
        return self._inside(key, self._tokens[:, None])[:, 0]

    def teacher_log_probs(self, key: FieldKey) -> Tensor:
        ids = self._ids(key)
        if ids is None:
            return self._smoothed_whole(key)
        inside = self._inside(key, ids)
        if key.tail == "truncate":
            return inside
        if key.tail == "renormalise":
            return _conditional(inside)
        if key.tail == "bucket":
            return _beside(inside, self.teacher_log_tail(key))
        nothing = inside.exp().sum(-1) == 0
        return _beside(_conditional(inside), torch.where(nothing, 0.0, self._nothing()))

    def teacher_support_logp(self, key: FieldKey) -> Tensor:
        ids = self._ids(key)
        if ids is None:
            return self._smoothed_whole(key)
        inside = self._inside(key, ids)
        return _beside(inside, self.teacher_log_tail(key)) if _has_bucket(key) else inside

    def teacher_log_tail(self, key: FieldKey) -> Tensor:
        """Summed over the outside, or what the entries of an answer by ids leave of one."""
        ids = self._ids(key)
        if ids is None:
            return self._nothing()
        if self._whole(key.view) is not None:
            return _log(_mass_outside(self._smoothed_whole(key), ids))
        return _log(1.0 - self._inside(key, ids).exp().sum(-1))

    def teacher_entropy(self, key: FieldKey) -> Tensor:
        told = self._scores(key.view).entropy
        if told is not None and key.support is None and self._whole(key.view) is None:
            return self._of_rows(key.view, told)
        return _entropy(self.teacher_log_probs(key))

    def teacher_top_ids(self, key: FieldKey) -> Tensor:
        return self._top("teacher", key.view, _k(key))

    # -- the support -------------------------------------------------------------------------

    def support_ids(self, key: FieldKey) -> Tensor:
        ids = self._ids(key)
        if ids is None:
            return torch.arange(self._size).expand(len(self._tokens), -1)
        bucket = torch.full_like(ids[:, :1], ABSENT)
        return torch.cat([ids, bucket], -1) if _has_bucket(key) else ids

    def in_support(self, key: FieldKey) -> Tensor:
        ids = self._ids(key)
        if ids is None:
            return torch.ones_like(self._tokens, dtype=torch.bool)
        return (ids == self._tokens[:, None]).any(-1)

    # -- both sides --------------------------------------------------------------------------

    def reverse_kl(self, key: FieldKey) -> Tensor:
        return divergence.reverse_kl(self.student_log_probs(key), self.teacher_log_probs(key))

    def forward_kl(self, key: FieldKey) -> Tensor:
        return divergence.forward_kl(self.student_log_probs(key), self.teacher_log_probs(key))

    def total_variation(self, key: FieldKey) -> Tensor:
        difference = self.student_log_probs(key).exp() - self.teacher_log_probs(key).exp()
        return 0.5 * difference.abs().sum(-1)

    # -- by-products -------------------------------------------------------------------------

    def top1_agreement(self, key: FieldKey) -> Tensor:
        """1 where the likeliest token of the student, as it is now, is that of the view."""
        return (_order(self.student)[:, 0] == self._top("teacher", key.view, 1)[:, 0]).double()

    def top_k_overlap(self, key: FieldKey) -> Tensor:
        """How many of the k likeliest tokens, the student's of now, both have; over k."""
        k = _k(key)
        assert k is not None
        of_view = self._top("teacher", key.view, k).tolist()
        of_student = _order(self.student)[:, :k].tolist()
        shares = [len({*a} & {*b}) / k for a, b in zip(of_student, of_view, strict=True)]
        return torch.tensor(shares, dtype=torch.float64)

    def student_mass(self, key: FieldKey) -> Tensor:
        ids = self._ids(key)
        assert ids is not None
        return _gathered(self.student, ids).exp().sum(-1)

    def teacher_mass(self, key: FieldKey) -> Tensor:
        ids = self._ids(key)
        assert ids is not None
        return self._inside(key, ids).exp().sum(-1)

    def logit_gradient_norm(self, key: FieldKey) -> Tensor:
        """Length of the loss's gradient on the row's logits; there is one beside an objective."""
        assert self.logit_gradient is not None
        return self.logit_gradient.square().sum(-1).sqrt()

    # -- how a view answers ------------------------------------------------------------------

    def _scores(self, view: str) -> TeacherScores:
        if view not in self._token.views:
            raise TeacherError(f"no scores for the view {view!r}")
        return self._token.views[view]

    def _of_rows(self, view: str, values: Tensor) -> Tensor:
        """What a view answers to each row; its first answer where it has none to the row."""
        index = self._scores(view).row_index
        return _wide(values if index is None else values[index.clamp(min=0)]).detach()

    def _or_even(self, view: str, log_probs: Tensor) -> Tensor:
        """An even distribution for rows without an answer: of no consequence, and finite."""
        answered = self.answered(view).reshape(-1, *(1 for _ in log_probs.shape[1:]))
        return torch.where(answered, log_probs, -math.log(self._size))

    def _whole(self, view: str) -> Tensor | None:
        """The view's distribution over the student's vocabulary; None where there is none."""
        if view == STUDENT_PART:
            return self.student.detach()
        if view not in self._wholes:
            self._wholes[view] = self._make_whole(view, self._scores(view))
        return self._wholes[view]

    def _make_whole(self, view: str, scores: TeacherScores) -> Tensor | None:
        if scores.parts:
            return self._combined(scores)
        if scores.log_probs is not None:
            log_probs = self._of_rows(view, scores.log_probs)
        elif scores.hidden is not None and scores.unembedding is not None:
            logits = logits_of(self._of_rows(view, scores.hidden), scores.unembedding).detach()
            log_probs = (logits / self._temperature).log_softmax(-1)
        else:
            return None
        if scores.id_map is not None:
            known = torch.full((len(log_probs), self._size), -math.inf, dtype=log_probs.dtype)
            for v, own in enumerate(scores.id_map.tolist()):
                if own != ABSENT:
                    known[:, v] = log_probs[:, own]
            log_probs = _conditional(known)
        return _merged(self._or_even(view, log_probs), self._groups)

    def _combined(self, scores: TeacherScores) -> Tensor:
        """log view = sum_k weight_k * log part_k, normalised; an entry that a part lacks is out."""
        combined = torch.zeros_like(self.student.detach())
        for part, weight in scores.parts:
            if weight:
                of_part = self._whole(part)
                assert of_part is not None
                missing = of_part == -math.inf
                added = combined + weight * torch.where(missing, 0.0, of_part)
                combined = torch.where(missing, -math.inf, added)
        return combined.log_softmax(-1)

    def _entries(self, view: str, ids: Tensor) -> Tensor:
        """The view's log-probabilities of some ids, `[N, K]`; -inf where an id is absent."""
        whole = self._whole(view)
        if whole is not None:
            return _gathered(whole, ids)
        answers, answered = self._answers(view), self.answered(view).tolist()
        found = torch.full(ids.shape, -math.inf, dtype=torch.float64)
        for n, row in enumerate(ids.tolist()):
            for j, v in enumerate(row):
                if v in answers[n]:
                    found[n, j] = answers[n][v]
                elif v != ABSENT and answered[n]:
                    raise TeacherError(f"the view {view!r} did not score token {v} at row {n}")
        return torch.where(ids == ABSENT, -math.inf, self._or_even(view, found))

    def _answers(self, view: str) -> list[dict[int, float]]:
        """Log-probability by id: what a view without a distribution said of each row."""
        scores = self._scores(view)
        found: list[dict[int, float]] = [{} for _ in self._tokens]
        for ids, logp in ((scores.top_ids, scores.top_logp), (scores.ids, scores.ids_logp)):
            if ids is None or logp is None:
                continue
            ids, logp = self._of_rows(view, ids), self._of_rows(view, logp)
            for n in range(len(found)):
                pairs = zip(ids[n].tolist(), logp[n].tolist(), strict=True)
                found[n] |= {v: value for v, value in pairs if v != ABSENT}
        return found

    def _inside(self, key: FieldKey, ids: Tensor) -> Tensor:
        """The view's entries on some ids as they are, smoothed if the key says so."""
        inside = self._smooth(self._entries(key.view, ids), key)
        return torch.where(ids == ABSENT, -math.inf, inside)

    def _smoothed_whole(self, key: FieldKey) -> Tensor:
        whole = self._whole(key.view)
        if whole is None:
            raise TeacherError(f"the view {key.view!r} returned no distribution")
        gone = [v for _, *others in self._groups for v in others]
        return self._smooth(whole, key).index_fill(1, torch.tensor(gone).long(), -math.inf)

    def _smooth(self, log_probs: Tensor, key: FieldKey) -> Tensor:
        """A share of the mass spread over the ids that merging leaves."""
        if not key.smoothing:
            return log_probs
        left = self._size - sum(len(group) - 1 for group in self._groups)
        return ((1 - key.smoothing) * log_probs.exp() + key.smoothing / left).log()

    def _top(self, side: str, view: str, k: int | None) -> Tensor:
        """Likeliest first: the student's as the batch holds them, a view's as it named them."""
        if side == "student":
            assert self._token.student_top_ids is not None
            return self._token.student_top_ids[:, :k]
        named, whole = self._scores(view).top_ids, self._whole(view)
        if named is not None:
            return self._of_rows(view, named)[:, :k]
        if whole is None:
            raise TeacherError(f"the view {view!r} named no likeliest tokens")
        return _order(whole)[:, :k]

    # -- supports ----------------------------------------------------------------------------

    def _nothing(self) -> Tensor:
        return torch.full((len(self._tokens),), -math.inf, dtype=torch.float64)

    def _ids(self, key: FieldKey) -> Tensor | None:
        """Ids of the support, row by row; None for the whole vocabulary."""
        if key.support is None or key.support.short_name == "full":
            return None
        name, knobs = key.support.short_name, dict(key.support.knobs)
        if name == "sampled":
            return self._tokens[:, None]
        if name in ("student_top_k", "teacher_top_k"):
            return self._top(name.removesuffix("_top_k"), key.view, knobs["k"])
        of_teacher = self._top("teacher", key.view, knobs["teacher_k"]).tolist()
        of_student = self._top("student", key.view, knobs["student_k"]).tolist()
        special = self._token.special_ids
        rows = [
            list(_chosen(name, of_teacher[n], of_student[n], token, special))
            for n, token in enumerate(self._tokens.tolist())
        ]
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), -1 if rows else 0)


def _chosen(
    name: str, of_teacher: list[int], of_student: list[int], token: int, special: Tensor | None
) -> Iterator[int]:
    """The ids of one row, from both sides' likeliest; -1 where an entry is absent."""
    if name == "intersection":
        for v in of_teacher:
            yield v if v in of_student else ABSENT
        return
    assert name in ("union", "routing_support")
    dropped = special.tolist() if special is not None and name == "routing_support" else []
    seen: set[int] = set()
    for v in (*of_teacher, *of_student):
        kept = v not in seen and v not in dropped
        yield v if kept else ABSENT
        seen |= {v} if kept else set()
    if name == "routing_support":
        yield ABSENT if token in seen else token


# --------------------------------------------------------------------------------------------


def _merged(log_probs: Tensor, groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """The mass of each group at its first id."""
    columns = list(log_probs.unbind(-1))
    for group in groups:
        mass = torch.stack([columns[v].exp() for v in group]).sum(0)
        for v in group:
            columns[v] = torch.full_like(mass, -math.inf)
        columns[group[0]] = _log(mass)
    return torch.stack(columns, -1)


def _gathered(log_probs: Tensor, ids: Tensor) -> Tensor:
    inside = log_probs.gather(-1, torch.where(ids == ABSENT, 0, ids))
    return torch.where(ids == ABSENT, -math.inf, inside)


def _mass_outside(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Mass of the entries that no id of the row names."""
    outside = torch.ones(log_probs.shape, dtype=torch.bool)
    for n, row in enumerate(ids.tolist()):
        for v in row:
            if v != ABSENT:
                outside[n, v] = False
    return torch.where(outside, log_probs.exp(), 0.0).sum(-1)


def _conditional(inside: Tensor) -> Tensor:
    """Divided by the mass of the entries; -inf everywhere where there is none."""
    mass = inside.exp().sum(-1, keepdim=True)
    return torch.where(inside > -math.inf, inside - _log(mass), -math.inf)


def _beside(inside: Tensor, log_mass: Tensor) -> Tensor:
    """The entries of a support, and the rest as one more."""
    return torch.cat([inside, log_mass[:, None]], -1)


def _log(mass: Tensor) -> Tensor:
    """Logarithm; -inf, without gradient, where there is no mass."""
    some = mass > 0
    return torch.where(some, torch.where(some, mass, 1.0).log(), -math.inf)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * torch.where(log_probs > -math.inf, log_probs, 0.0)).sum(-1)


def _order(log_probs: Tensor) -> Tensor:
    """All ids, likeliest first."""
    return log_probs.detach().argsort(-1, descending=True)


def _k(key: FieldKey) -> int | None:
    return dict(key.support.knobs)["k"] if key.support is not None else None


def _has_bucket(key: FieldKey) -> bool:
    return key.tail in ("bucket", "teacher_renormalise")


def _leaf(values: Tensor) -> Tensor:
    return _wide(values.detach()).clone().requires_grad_()


def _wide(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values


def _wide_token(token: TokenBatch) -> TokenBatch:
    wide: dict[str, Any] = {
        item.name: _wide(value)
        for item in fields(token)
        if isinstance(value := getattr(token, item.name), Tensor)
    }
    extra = {name: _wide(value) for name, value in token.extra.items()}
    return replace(token, **wide, extra=extra)

"""The fields of one block of rows, each computed on first use."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import ConfigError, TeacherError
from opd.fields import FIELDS, positional_names
from opd.formula import divergence
from opd.formula import support as supports
from opd.head import closed as forms
from opd.head.combine import log_linear, log_mean, log_sum
from opd.head.replies import Entries
from opd.objective import field_key
from opd.terms import Term, term_key, top_k
from opd.types import STUDENT_PART, Bound, FieldKey, TeacherScores, unanswered

WITH_A_BUCKET = ("bucket", "teacher_renormalise")
"""Tail rules that add an entry for the mass outside the support."""


class BlockFields:
    """Looks up fields for n packed rows; the student's own carry the gradient.

    Args:
        student_log_probs: `[n, V]`, normalised.
        token_fields: what the rollout holds, packed to the n rows.
        views: scores of the n rows by view.
        project_view: the whole `[n, V]` log-probabilities of a view that replied with them or with
            hidden states, by its name.
        merge_ids: groups of ids that count as one; the distributions are merged already.
    """

    def __init__(
        self,
        student_log_probs: Float[Tensor, "n V"],
        token_fields: Callable[[str], Tensor],
        views: Mapping[str, TeacherScores],
        project_view: Callable[[str], Tensor],
        merge_ids: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.student_log_probs = student_log_probs
        self._token_fields = token_fields
        self._views = views
        self._project_view = project_view
        self._merge_ids = merge_ids
        self._known: dict[FieldKey, Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        self._entries: dict[str, Entries | None] = {}
        self._pairs: dict[FieldKey, forms.Pair] = {}
        self._own = forms.Student(student_log_probs.detach())
        self.ledger = forms.Ledger()

    def __call__(self, key: FieldKey) -> Tensor:
        if key not in self._known:
            self._known[key] = self._compute(key)
        return self._known[key]

    def _compute(self, key: FieldKey) -> Tensor:
        entry = FIELDS.get(key.name)
        if entry is not None and "." in entry.provider:
            return self._formula(entry.provider, key)
        match key.name:
            case "student_logp":
                return self._student_logp(key)
            case "teacher_logp":
                return self._teacher_logp(key)
            case "student_log_probs":
                return self._restrict(self.student_log_probs, key, "student")
            case "teacher_log_probs":
                return self._restrict_view(key)
            case "student_support_logp":
                return self._as_it_is(self.student_log_probs, key)
            case "teacher_support_logp":
                return self._view_as_it_is(key)
            case "student_log_tail":
                return self._log_tail(self.student_log_probs, key)
            case "teacher_log_tail":
                return self._view_log_tail(key)
            case "support_ids":
                return self._entry_ids(key)
            case "in_support":
                return (self._entry_ids(key) == self._tokens()).any(-1)
            case "student_top_ids":
                return self._student_top_ids(_size(key))
            case "teacher_top_ids":
                return self.teacher_top_ids(key.view, _size(key))
            case name:
                return self._token_fields(name)

    def closed(self, bound: Bound, view: str, smoothing: float) -> Tensor | None:
        """A formula on the whole vocabulary, if its gradient is known in closed form."""
        form = forms.of_a_pair(bound)
        if form is None or self._merge_ids or not self.has_distribution(view):
            return None
        distribution = FieldKey("teacher_log_probs", view, smoothing=smoothing)
        return self.ledger.value(
            (bound, distribution),
            lambda: form(self._pair(distribution)),
            lambda rows: bound(self.student_log_probs[rows], self._view(distribution)[rows]),
        )

    def _pair(self, distribution: FieldKey) -> forms.Pair:
        if distribution not in self._pairs:
            self._pairs[distribution] = forms.Pair(self._own, self._view(distribution))
        return self._pairs[distribution]

    def _student_logp(self, key: FieldKey) -> Float[Tensor, " n"]:
        tokens = self._tokens()
        if self._merge_ids:
            return self.student_log_probs.gather(-1, tokens).squeeze(-1)
        return self.ledger.value(
            key,
            lambda: forms.student_logp(self._own, tokens),
            lambda rows: self.student_log_probs[rows].gather(-1, tokens[rows]).squeeze(-1),
        )

    def _formula(self, name: str, key: FieldKey) -> Tensor:
        module, _, function = name.rpartition(".")
        formula = getattr(importlib.import_module(module), function)
        if key.support is None:
            if key.name == "student_entropy":
                value = self._student_entropy(key)
            elif key.name == "teacher_entropy" and not self.has_distribution(key.view):
                value = None if key.smoothing else self._told_entropy(key.view)
            else:
                value = self.closed(Bound.of(formula), key.view, key.smoothing)
            if value is not None:
                return value
        arguments = (
            self(field_key(part, key.view, key.support, key.tail, key.smoothing))
            for part in positional_names(formula)
        )
        result: Tensor = formula(*arguments)
        return result

    def _told_entropy(self, view: str) -> Tensor | None:
        told = self._scores(view).entropy
        if told is None:
            return None
        own = FieldKey("student_entropy")
        return self._agreeing(view, told, lambda: self(own).detach())

    def _student_entropy(self, key: FieldKey) -> Tensor | None:
        if self._merge_ids:
            return None
        return self.ledger.value(
            key,
            lambda: forms.student_entropy(self._own),
            lambda rows: divergence.student_entropy(self.student_log_probs[rows]),
        )

    def _tokens(self) -> Int[Tensor, "n 1"]:
        return self(FieldKey("tokens")).unsqueeze(-1)

    def _restrict(
        self, log_probs: Float[Tensor, "n V"], key: FieldKey, side: Literal["student", "teacher"]
    ) -> Tensor:
        """A whole distribution on the key's support, by its tail rule."""
        ids = self.support_ids(key)
        if ids is None:
            return log_probs
        return supports.restrict_by_tail(log_probs, ids, tail=key.tail, side=side)

    def _as_it_is(self, log_probs: Float[Tensor, "n V"], key: FieldKey) -> Tensor:
        """A whole distribution's entries on the key's support; a bucket holds the rest."""
        ids = self.support_ids(key)
        if ids is None:
            return log_probs
        tail = "bucket" if key.tail in WITH_A_BUCKET else "truncate"
        return supports.restrict_by_tail(log_probs, ids, tail=tail, side="student")

    def _log_tail(self, log_probs: Float[Tensor, "n V"], key: FieldKey) -> Float[Tensor, " n"]:
        ids = self.support_ids(key)
        if ids is None:
            return torch.full_like(log_probs[:, 0], -math.inf)
        return supports.log_mass_outside(log_probs, ids)

    # -- a view, of which the whole distribution is known or the support's entries alone ------

    def has_distribution(self, view: str) -> bool:
        """Whether a view said enough for its whole distribution."""
        scores = self._scores(view)
        if self._is_a_mixture(view):
            counted = [name for name, weight in scores.parts if weight and name != STUDENT_PART]
            return all(map(self.has_distribution, counted))
        return bool(scores.parts) or scores.hidden is not None or scores.log_probs is not None

    def _restrict_view(self, key: FieldKey) -> Tensor:
        if self._by_entries(key):
            inside = self._entries_inside(key)
            return supports.entries_by_tail(inside, tail=key.tail, side="teacher")
        return self._restrict(self._view(key), key, "teacher")

    def _view_as_it_is(self, key: FieldKey) -> Tensor:
        if self._is_a_sum(key.view):
            return self._sum(key, replace(key, name="student_support_logp", view=""))
        if self._by_entries(key):
            tail = "bucket" if key.tail in WITH_A_BUCKET else "truncate"
            return supports.entries_by_tail(self._entries_inside(key), tail=tail, side="student")
        return self._as_it_is(self._view(key), key)

    def _view_log_tail(self, key: FieldKey) -> Float[Tensor, " n"]:
        if self._by_entries(key):
            return supports.log_mass_beside(self._entries_inside(key))
        return self._log_tail(self._view(key), key)

    def _by_entries(self, key: FieldKey) -> bool:
        return (
            key.support is not None
            and not self.has_distribution(key.view)
            and self.entries(key.view) is not None
        )

    def entries(self, view: str) -> Entries | None:
        """What a view said of single tokens."""
        if view not in self._entries:
            self._entries[view] = Entries.of(view, self._scores(view), self._merge_ids)
        return self._entries[view]

    def _entries_inside(self, key: FieldKey) -> Float[Tensor, "n K"]:
        """The view's entries on the key's support as they are, smoothed; -inf where absent."""
        ids, entries = self.support_ids(key), self.entries(key.view)
        assert ids is not None
        assert entries is not None
        inside = entries.at(ids, self.unanswered(key.view))
        inside = self._agreeing(
            key.view, inside, lambda: supports.restrict(self._own.log_probs, ids)
        )
        if not key.smoothing:
            return inside
        _, size = self._merged_away()
        smooth = supports.smooth(inside, smoothing=key.smoothing, vocab_size=size)
        return torch.where(ids == supports.ABSENT, -math.inf, smooth)

    def unanswered(self, view: str) -> Bool[Tensor, " n"] | None:
        """True on the rows that a view, or a part of a combination, has no answer for."""
        return unanswered(self._views, view)

    def _agreeing(self, view: str, value: Tensor, own: Callable[[], Tensor]) -> Tensor:
        """What a view said; where it has no answer, what it would say if it were the student.

        No term against the view looks at such a row; whoever reads its advantage finds nothing.
        """
        if (missing := self.unanswered(view)) is None:
            return value
        return torch.where(missing.view(-1, *(1 for _ in value.shape[1:])), own(), value)

    def log_ratio(self, view: str) -> Float[Tensor, " n"] | None:
        """How much likelier the view finds the chosen token; NaN on rows where it does not say.

        None where it says nothing of single tokens.
        """
        scores = self._scores(view)
        silent = scores.sampled_logp is None and not scores.parts
        if silent and not self.has_distribution(view):
            entries = self.entries(view)
            if entries is None:
                return None
            logp, found = entries.find(self._tokens())
            told = torch.where(found, logp, math.nan).squeeze(-1)
        else:
            told = self(FieldKey("teacher_logp", view))
        if (missing := self.unanswered(view)) is not None:
            told = told.masked_fill(missing, math.nan)
        return told - self(FieldKey("student_logp"))

    # -- supports -----------------------------------------------------------------------------

    def _entry_ids(self, key: FieldKey) -> Int[Tensor, "n K"]:
        """Ids of the entries of the key's support; -1 for an absent one and for a bucket."""
        ids = self.support_ids(key)
        if ids is None:
            rows, size = self.student_log_probs.shape
            return torch.arange(size, device=self.student_log_probs.device).expand(rows, size)
        if key.tail in WITH_A_BUCKET:
            return torch.nn.functional.pad(ids, (0, 1), value=-1)
        return ids

    def support_ids(self, key: FieldKey) -> Int[Tensor, "n K"] | None:
        """Ids of the key's support; None for the whole vocabulary."""
        bound = key.support
        if bound is None:
            return None
        ids_key = FieldKey("support", key.view, bound)
        if ids_key not in self._known:
            inputs = (
                self(field_key(name, key.view, top_k(name, bound)))
                for name in positional_names(bound.function)
            )
            self._known[ids_key] = bound(*inputs)
        return self._known[ids_key]

    def _student_top_ids(self, k: int) -> Int[Tensor, "n K"]:
        """The ids chosen at rollout time, which stay while the weights move."""
        _check_fits(k, self.student_log_probs.shape[-1])
        return self._token_fields("student_top_ids")[:, :k]

    def teacher_top_ids(self, view: str, k: int) -> Int[Tensor, "n K"]:
        """A view's k likeliest tokens, likeliest first."""
        scores = self._scores(view)
        if scores.top_ids is not None and scores.top_ids.shape[-1] >= k:
            return self._agreeing(
                view, scores.top_ids[:, :k], lambda: likeliest(self._own.log_probs, k)[1]
            )
        return likeliest(self._view_log_probs(view), k)[1]

    def _teacher_logp(self, key: FieldKey) -> Float[Tensor, " n"]:
        if self._is_a_sum(key.view):
            return self._sum(key, FieldKey("student_logp"))
        if self._is_a_mixture(key.view):
            plain = replace(key, smoothing=0.0)
            return self._smoothed(self._sum(plain, FieldKey("student_logp")), key)
        known, tokens = self._scores(key.view).sampled_logp, self._tokens()
        if known is None and not self.has_distribution(key.view):
            entries = self.entries(key.view)
            if entries is not None:
                known = entries.at(tokens, self.unanswered(key.view)).squeeze(-1)
        if known is None:
            return self._view(key).gather(-1, tokens).squeeze(-1)
        own = self._own.log_probs
        known = self._agreeing(key.view, known, lambda: own.gather(-1, tokens).squeeze(-1))
        return self._smoothed(known, key)

    def _view(self, key: FieldKey) -> Float[Tensor, "n V"]:
        """The whole distribution of the key's view, smoothed as the key says."""
        if not key.smoothing:
            return self._view_log_probs(key.view)
        whole = FieldKey("teacher_log_probs", key.view, smoothing=key.smoothing)
        if whole not in self._known:
            self._known[whole] = self._smoothed(self._view_log_probs(key.view), key)
        return self._known[whole]

    def _smoothed(self, log_probs: Tensor, key: FieldKey) -> Tensor:
        if not key.smoothing:
            return log_probs
        merged_away, size = self._merged_away()
        smooth = supports.smooth(log_probs, smoothing=key.smoothing, vocab_size=size)
        return smooth if smooth.dim() == 1 else smooth.masked_fill(merged_away, -math.inf)

    def share_at_floor(self, term: Term) -> Float[Tensor, " n"]:
        """Share of the entries to which a term's smoothing gives more than its view does.

        Of the vocabulary; of the support's entries where the view named no more; of the chosen
        token alone where it said nothing else.
        """
        merged_away, size = self._merged_away()
        key = replace(term_key(term, "teacher_support_logp"), smoothing=0.0)
        if self.has_distribution(term.against):
            known = self._view_log_probs(term.against)
            counted = (~merged_away).expand_as(known)
        elif (ids := self.support_ids(key)) is not None:
            known = self._entries_inside(key)
            counted = ids != supports.ABSENT
        else:
            known = self(FieldKey("teacher_logp", term.against))
            return (known < math.log(term.smoothing / size)).to(self.student_log_probs.dtype)
        low = supports.floor_outweighs(known, smoothing=term.smoothing, vocab_size=size)
        count = counted.sum(-1).clamp(min=1)
        return (low & counted).sum(-1).to(self.student_log_probs.dtype) / count

    def _merged_away(self) -> tuple[Bool[Tensor, "_ V"], int]:
        """Ids merged into others, which carry no mass on either side, and how many are left."""
        size = self.student_log_probs.shape[-1]
        away = torch.zeros((1, size), dtype=torch.bool, device=self.student_log_probs.device)
        others = {other for _, *others in self._merge_ids for other in others}
        away[:, list(others)] = True
        return away, size - len(others)

    def _view_log_probs(self, view: str) -> Float[Tensor, "n V"]:
        if view not in self._whole:
            scores = self._scores(view)
            if scores.parts:
                combined = self._combined(view, scores)
                self._whole[view] = self._agreeing(view, combined, lambda: self._own.log_probs)
                return self._whole[view]
            if not self.has_distribution(view):
                raise TeacherError(
                    f"the view {view!r} returned no distribution (neither hidden states nor "
                    "log-probabilities), which the objective compares with; use a teacher that "
                    "returns one, or a support that it can answer"
                )
            with torch.no_grad():
                whole = self._project_view(view)
            if whole.shape[-1] != self.student_log_probs.shape[-1]:
                raise TeacherError(
                    f"the view {view!r} returned a distribution over {whole.shape[-1]} tokens, but "
                    f"{self.student_log_probs.shape[-1]} are compared; use a teacher of the same "
                    "vocabulary"
                )
            self._whole[view] = self._agreeing(view, whole, lambda: self._own.log_probs)
        return self._whole[view]

    @torch.no_grad()
    def _combined(self, view: str, scores: TeacherScores) -> Float[Tensor, "n V"]:
        """A combination of other views and of the student as it is now, detached."""
        weights, own = dict(scores.parts), self._own.log_probs
        parts = {
            name: own if name == STUDENT_PART else self._view_log_probs(name)
            for name, weight in weights.items()
            if weight
        }
        combine = log_mean if scores.mix == "arithmetic" else log_linear
        return combine(view, parts, weights)

    def _is_a_sum(self, view: str) -> bool:
        return not self._scores(view).normalised

    def _is_a_mixture(self, view: str) -> bool:
        scores = self._scores(view)
        return bool(scores.parts) and scores.mix == "arithmetic"

    def _sum(self, key: FieldKey, of_student: FieldKey) -> Tensor:
        """A field of single tokens, of a combination that is made entry by entry, from the same
        field of its parts."""
        weights = dict(self._scores(key.view).parts)
        parts = {
            name: self(of_student if name == STUDENT_PART else replace(key, view=name)).detach()
            for name, weight in weights.items()
            if weight
        }
        combine = log_mean if self._is_a_mixture(key.view) else log_sum
        total = combine(key.view, parts, weights)
        return self._agreeing(key.view, total, lambda: self(of_student).detach())

    def _scores(self, view: str) -> TeacherScores:
        if view not in self._views:
            raise TeacherError(
                f"no scores for the view {view!r}; scored: {', '.join(self._views) or 'none'}"
            )
        return self._views[view]


def _size(key: FieldKey) -> int:
    """How many top ids a key asks for."""
    if key.support is None:
        raise ConfigError(
            f"{key.name}: a formula that reads it says how many with a knob `k`, or with "
            "`teacher_k` and `student_k`"
        )
    return int(dict(key.support.knobs)["k"])


def likeliest(
    log_probs: Float[Tensor, "n V"], k: int
) -> tuple[Float[Tensor, "n K"], Int[Tensor, "n K"]]:
    """The k largest log-probabilities of each row and their ids, likeliest first.

    Raises:
        ConfigError: k exceeds the vocabulary.
    """
    _check_fits(k, log_probs.shape[-1])
    logp, ids = log_probs.topk(k, dim=-1)
    return logp, ids


def _check_fits(k: int, vocab_size: int) -> None:
    if k > vocab_size:
        raise ConfigError(
            f"a support of k = {k} tokens does not fit a vocabulary of {vocab_size}; "
            "lower k, or compare the full vocabulary"
        )

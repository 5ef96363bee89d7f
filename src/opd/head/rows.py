"""The fields of one chunk of rows, each computed on first use."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import ConfigError, TeacherError
from opd.fields import FIELDS, positional_names
from opd.formula import support as supports
from opd.head.combine import log_linear
from opd.objective import field_key
from opd.terms import top_k
from opd.types import STUDENT_PART, FieldKey, TeacherScores

WITH_A_BUCKET = ("bucket", "teacher_renormalise")
"""Tail rules that add an entry for the mass outside the support."""


class ChunkFields:
    """Looks up fields for n packed rows; the student's own carry the gradient.

    Args:
        student_log_probs: `[n, V]`, normalised.
        token_fields: what the rollout holds, packed to the n rows.
        views: scores of the n rows by view.
        project_view: turns a view's scores into `[n, V]` log-probabilities.
    """

    def __init__(
        self,
        student_log_probs: Float[Tensor, "n V"],
        token_fields: Callable[[str], Tensor],
        views: Mapping[str, TeacherScores],
        project_view: Callable[[TeacherScores], Tensor],
    ) -> None:
        self._student = student_log_probs
        self._token_fields = token_fields
        self._views = views
        self._project_view = project_view
        self._known: dict[FieldKey, Tensor] = {}
        self._whole: dict[str, Tensor] = {}

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
                return self._student.gather(-1, self._tokens()).squeeze(-1)
            case "teacher_logp":
                return self._teacher_logp(key)
            case "student_log_probs":
                return self._restrict(self._student, key, "student")
            case "teacher_log_probs":
                return self._restrict(self._view(key), key, "teacher")
            case "student_support_logp":
                return self._as_it_is(self._student, key)
            case "teacher_support_logp":
                return self._as_it_is(self._view(key), key)
            case "student_log_tail":
                return self._log_tail(self._student, key)
            case "teacher_log_tail":
                return self._log_tail(self._view(key), key)
            case "support_ids":
                return self._entry_ids(key)
            case "in_support":
                return (self._entry_ids(key) == self._tokens()).any(-1)
            case "student_top_ids":
                return self._student_top_ids(_size(key))
            case "teacher_top_ids":
                return self._teacher_top_ids(key.view, _size(key))
            case name:
                return self._token_fields(name)

    def _formula(self, name: str, key: FieldKey) -> Tensor:
        module, _, function = name.rpartition(".")
        formula = getattr(importlib.import_module(module), function)
        arguments = (
            self(field_key(part, key.view, key.support, key.tail, key.smoothing))
            for part in positional_names(formula)
        )
        value: Tensor = formula(*arguments)
        return value

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

    def _entry_ids(self, key: FieldKey) -> Int[Tensor, "n K"]:
        """Ids of the entries of the key's support; -1 for an absent one and for a bucket."""
        ids = self.support_ids(key)
        if ids is None:
            rows, size = self._student.shape
            return torch.arange(size, device=self._student.device).expand(rows, size)
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
        _check_fits(k, self._student.shape[-1])
        return self._token_fields("student_top_ids")[:, :k]

    def _teacher_top_ids(self, view: str, k: int) -> Int[Tensor, "n K"]:
        scores = self._scores(view)
        if scores.top_ids is not None and scores.top_ids.shape[-1] >= k:
            return scores.top_ids[:, :k]
        return likeliest(self._view_log_probs(view), k)[1]

    def _teacher_logp(self, key: FieldKey) -> Float[Tensor, " n"]:
        known = self._scores(key.view).sampled_logp
        if known is None:
            return self._view(key).gather(-1, self._tokens()).squeeze(-1)
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

    def share_at_floor(self, view: str, smoothing: float) -> Float[Tensor, " n"]:
        """Share of the vocabulary to which smoothing gives more than the view does.

        Of a view that says no more than the log-probability of the chosen token: 1 or 0 of that.
        """
        known = self._scores(view).sampled_logp
        if known is not None and not self._says_more(view):
            floor = math.log(smoothing / self._student.shape[-1])
            return (known < floor).to(self._student.dtype)
        merged_away, size = self._merged_away()
        low = supports.floor_outweighs(
            self._view_log_probs(view), smoothing=smoothing, vocab_size=size
        )
        return (low & ~merged_away).sum(-1).to(self._student.dtype) / size

    def _says_more(self, view: str) -> bool:
        scores = self._scores(view)
        return bool(scores.parts) or scores.hidden is not None or scores.log_probs is not None

    def _merged_away(self) -> tuple[Bool[Tensor, "_ V"], int]:
        """Ids merged into others, which carry no mass on either side, and how many are left."""
        merged_away = self._student[:1] == -math.inf
        return merged_away, merged_away.shape[-1] - int(merged_away.sum())

    def _view_log_probs(self, view: str) -> Float[Tensor, "n V"]:
        if view not in self._whole:
            scores = self._scores(view)
            if scores.parts:
                self._whole[view] = self._combined(view, scores)
                return self._whole[view]
            if scores.hidden is None and scores.log_probs is None:
                raise TeacherError(
                    f"the view {view!r} returned no distribution (neither hidden states nor "
                    "log-probabilities), which the objective compares with; use a teacher that "
                    "returns one, or a support that it can answer"
                )
            with torch.no_grad():
                whole = self._project_view(scores)
            if whole.shape[-1] != self._student.shape[-1]:
                raise TeacherError(
                    f"the view {view!r} returned a distribution over {whole.shape[-1]} tokens, but "
                    f"{self._student.shape[-1]} are compared; use a teacher of the same vocabulary"
                )
            self._whole[view] = whole
        return self._whole[view]

    @torch.no_grad()
    def _combined(self, view: str, scores: TeacherScores) -> Float[Tensor, "n V"]:
        """A combination of other views and of the student as it is now, detached."""
        weights = dict(scores.parts)
        parts = {
            name: self._student.detach() if name == STUDENT_PART else self._view_log_probs(name)
            for name, weight in weights.items()
            if weight
        }
        return log_linear(view, parts, weights)

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

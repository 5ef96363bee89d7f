"""The fields of one chunk of rows, each computed on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.errors import ConfigError, TeacherError
from opd.fields import FIELDS, positional_names
from opd.formula import support as supports
from opd.objective import field_key
from opd.types import FieldKey, TeacherScores


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
                return self._teacher_logp(key.view)
            case "student_log_probs":
                return self._restrict(self._student, key)
            case "teacher_log_probs":
                return self._restrict(self._view_log_probs(key.view), key)
            case name:
                return self._token_fields(name)

    def _formula(self, name: str, key: FieldKey) -> Tensor:
        module, _, function = name.rpartition(".")
        formula = getattr(importlib.import_module(module), function)
        arguments = (
            self(field_key(part, key.view, key.support, key.tail))
            for part in positional_names(formula)
        )
        value: Tensor = formula(*arguments)
        return value

    def _tokens(self) -> Int[Tensor, "n 1"]:
        return self(FieldKey("tokens")).unsqueeze(-1)

    def _restrict(self, log_probs: Float[Tensor, "n V"], key: FieldKey) -> Tensor:
        """A whole distribution on the key's support, by its tail rule."""
        ids = self.support_ids(key)
        if ids is None:
            return log_probs
        inside = log_probs.gather(-1, ids)
        if key.tail == "bucket":
            return supports.with_bucket(inside, supports.log_mass_outside(log_probs, ids))
        return supports.renormalise(inside)

    def support_ids(self, key: FieldKey) -> Int[Tensor, "n K"] | None:
        """Ids of the key's support; None for the whole vocabulary."""
        bound = key.support
        if bound is None:
            return None
        ids_key = FieldKey("support_ids", key.view, bound)
        if ids_key not in self._known:
            inputs = (
                self._support_input(name, ids_key) for name in positional_names(bound.function)
            )
            self._known[ids_key] = bound(*inputs)
        return self._known[ids_key]

    def _support_input(self, name: str, key: FieldKey) -> Tensor:
        assert key.support is not None
        k = int(dict(key.support.knobs).get("k", 0))
        if name == "teacher_top_ids":
            return self._teacher_top_ids(key.view, k)
        if name == "student_top_ids":
            return self._student_top_ids(k)
        return self(FieldKey(name))

    def _student_top_ids(self, k: int) -> Int[Tensor, "n K"]:
        """The ids chosen at rollout time where the batch holds them, else those of now."""
        try:
            return self._token_fields("student_top_ids")
        except KeyError:
            return likeliest(self._student.detach(), k)[1]

    def _teacher_top_ids(self, view: str, k: int) -> Int[Tensor, "n K"]:
        scores = self._scores(view)
        if scores.top_ids is not None and scores.top_ids.shape[-1] >= k:
            return scores.top_ids
        return likeliest(self._view_log_probs(view), k)[1]

    def _teacher_logp(self, view: str) -> Float[Tensor, " n"]:
        scores = self._scores(view)
        if scores.sampled_logp is not None:
            return scores.sampled_logp
        return self._view_log_probs(view).gather(-1, self._tokens()).squeeze(-1)

    def _view_log_probs(self, view: str) -> Float[Tensor, "n V"]:
        if view not in self._whole:
            scores = self._scores(view)
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

    def _scores(self, view: str) -> TeacherScores:
        if view not in self._views:
            raise TeacherError(
                f"no scores for the view {view!r}; scored: {', '.join(self._views) or 'none'}"
            )
        return self._views[view]


def likeliest(
    log_probs: Float[Tensor, "n V"], k: int
) -> tuple[Float[Tensor, "n K"], Int[Tensor, "n K"]]:
    """The k largest log-probabilities of each row and their ids, likeliest first.

    Raises:
        ConfigError: k exceeds the vocabulary.
    """
    if k > log_probs.shape[-1]:
        raise ConfigError(
            f"a support of k = {k} tokens does not fit a vocabulary of {log_probs.shape[-1]}; "
            "lower k, or compare the full vocabulary"
        )
    logp, ids = log_probs.topk(k, dim=-1)
    return logp, ids

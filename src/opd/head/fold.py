"""The closed forms on CUDA: one walk over the vocabulary for all values, one for the gradient.

Per row, the fold over tiles of the vocabulary finds both normalisers, then both KLs, both
entropies and, where a mixture weight is given, the Jensen-Shannon divergence; log-probabilities
are never written anywhere. A second kernel writes the gradient of all of them together over the
student's logits. `opd.head.closed` holds the same formulas in PyTorch and is the reference.

Which objectives need no more than that is read from their signatures (`fold_weight`). Triton is
optional: where it is not there the portable path is taken, and said so once.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.fields import FIELDS, positional_names
from opd.formula import support
from opd.head import closed as forms
from opd.objective import Objective
from opd.terms import Dense
from opd.types import Bound, FieldKey, TeacherScores

# `opd.head.kernels` addresses both tuples by position.
VALUES = (
    "student_normaliser",
    "teacher_normaliser",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "generalized_jsd",
    "mixture_mean",
)
"""Columns of what the first kernel returns, the divergences under the names of their formulas; the
last one serves the gradient of the JSD."""

SLOPES = ("reverse_kl", "forward_kl", "student_entropy", "generalized_jsd", "student_logp")
"""Columns of the factors that the second kernel reads."""

WARPS = 8
"""Of a program, whatever it computes: the fastest of 4, 8 and 16 on an H200."""

KNOWN_FIELDS = frozenset(
    {
        "student_logp",
        "teacher_logp",
        "reverse_kl",
        "forward_kl",
        "student_entropy",
        "teacher_entropy",
    }
)
"""Fields of a distribution that are among the values, on the whole vocabulary."""


class TritonMissing(UserWarning):
    """Triton is not there or does not run, so the portable path is taken on CUDA."""


@cache
def is_available(device_type: str) -> bool:
    """Whether Triton folds two numbers on such a device; says so once where it does not."""
    try:
        if importlib.util.find_spec("triton") is None:
            raise ImportError("Triton is not installed: pip install triton")
        one = torch.ones((1, 2), device=device_type)
        Fold.of(one, one)
    except Exception as error:  # no compiler, a device that is too old, another Triton
        warnings.warn(
            f"the head takes the portable path, which is slower on {device_type}: {error}",
            TritonMissing,
            stacklevel=2,
        )
        return False
    return True


@dataclass(frozen=True)
class Fold:
    """What the first kernel found of n rows.

    Attributes:
        values: `[n, len(VALUES)]`.
        student_logits, teacher_logits: what it was found from; the first is overwritten by
            `write_gradient`.
        temperature: divides both.
        teacher_weight: of the mixture in the Jensen-Shannon divergence; 0 where none is asked for.
    """

    values: Float[Tensor, "n _"]
    student_logits: Float[Tensor, "n V"]
    teacher_logits: Float[Tensor, "n V"]
    temperature: float
    teacher_weight: float

    @classmethod
    def of(
        cls,
        student_logits: Float[Tensor, "n V"],
        teacher_logits: Float[Tensor, "n V"],
        *,
        temperature: float = 1.0,
        teacher_weight: float = 0.0,
    ) -> Fold:
        """Fold both rows of logits, float32, into the values."""
        rows, vocab_size = student_logits.shape
        values = torch.empty((rows, len(VALUES)), device=student_logits.device)
        if rows:
            kernels = _kernels()
            kernels.fold_values[(rows,)](
                student_logits,
                teacher_logits,
                values,
                vocab_size,
                student_logits.stride(0),
                teacher_logits.stride(0),
                1.0 / temperature,
                teacher_weight,
                WITH_MIXTURE=teacher_weight > 0,
                COLUMNS=len(VALUES),
                TILE=_tile(vocab_size),
                num_warps=WARPS,
            )
        return cls(values, student_logits, teacher_logits, temperature, teacher_weight)

    def __getitem__(self, name: str) -> Float[Tensor, " n"]:
        return self.values[:, VALUES.index(name)]

    def write_gradient(
        self,
        factors: Mapping[str, Float[Tensor, " n"]],
        tokens: Int[Tensor, " n"],
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "n V"]:
        """Write the gradient of `sum_k factors[k] * value_k` over the student's logits.

        Args:
            factors: by the names of `SLOPES`; what is not there counts as 0.
            tokens: of the rows, for `student_logp`.
            dtype: that of the gradient, rounded once; of float32 or narrower.

        Returns:
            A view of the logits' memory; a narrower gradient leaves the end of each row unused.
        """
        rows, vocab_size = self.student_logits.shape
        gradient = self.student_logits.view(dtype)[:, :vocab_size]
        zero = self.values.new_zeros(rows)
        table = torch.stack([factors.get(name, zero) for name in SLOPES], -1).contiguous()
        if rows:
            kernels = _kernels()
            kernels.write_gradient[(rows,)](
                gradient,
                self.student_logits,
                self.teacher_logits,
                self.values,
                table / self.temperature,
                tokens.contiguous(),
                vocab_size,
                gradient.stride(0),
                self.student_logits.stride(0),
                self.teacher_logits.stride(0),
                1.0 / self.temperature,
                self.teacher_weight,
                WITH_MIXTURE=self.teacher_weight > 0,
                COLUMNS=len(VALUES),
                FACTORS=len(SLOPES),
                TILE=_tile(vocab_size),
                num_warps=WARPS,
            )
        return gradient


class FoldedFields:
    """Looks up fields of n rows whose distributions were folded; see `BlockFields`.

    What a loss depends on is handed out as leaves; `write_gradient` takes their gradients.
    """

    def __init__(
        self,
        fold: Fold,
        token_fields: Callable[[str], Tensor],
        scores: TeacherScores,
    ) -> None:
        self._fold, self._token_fields, self._scores = fold, token_fields, scores
        self._known: dict[str, Tensor] = {}

    def __call__(self, key: FieldKey) -> Tensor:
        if key.name not in KNOWN_FIELDS:
            return self._token_fields(key.name)
        return self._value(key.name)

    def closed(self, bound: Bound, view: str, smoothing: float) -> Tensor | None:
        """A divergence that the fold holds."""
        return None if forms.of_a_pair(bound) is None else self._value(bound.short_name)

    def log_ratio(self, view: str) -> Float[Tensor, " n"]:
        """How much likelier the view finds the chosen token."""
        return self._value("teacher_logp") - self._value("student_logp")

    @property
    def tokens(self) -> Int[Tensor, " n"]:
        """The rows' own tokens."""
        return self._token_fields("tokens")

    def is_finite(self) -> Bool[Tensor, ""]:
        """Whether every value is: a row with zero mass is for the formulas themselves.

        A tensor, since on CUDA a look at it waits for everything before it.
        """
        logp = self._logp(self._fold.student_logits, "student_normaliser")
        return (self._fold.values.isfinite().all(-1) & logp.isfinite()).all()

    def write_gradient(self, loss: Tensor, dtype: torch.dtype) -> Float[Tensor, "n V"] | None:
        """The loss's gradient, written over the student's logits; None where it has none."""
        leaves = {name: leaf for name, leaf in self._known.items() if leaf.requires_grad}
        if not loss.requires_grad or not leaves:
            return None
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        factors = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
        if not factors:
            return None
        return self._fold.write_gradient(factors, self.tokens, dtype)

    def _value(self, name: str) -> Tensor:
        if name not in self._known:
            value = self._computed(name)
            if name in SLOPES and torch.is_grad_enabled():
                value = value.detach().clone().requires_grad_()
            self._known[name] = value
        return self._known[name]

    def _computed(self, name: str) -> Float[Tensor, " n"]:
        if name == "student_logp":
            return self._logp(self._fold.student_logits, "student_normaliser")
        if name != "teacher_logp":
            return self._fold[name]
        told = self._scores.sampled_logp
        return self._logp(self._fold.teacher_logits, "teacher_normaliser") if told is None else told

    def _logp(self, logits: Float[Tensor, "n V"], normaliser: str) -> Float[Tensor, " n"]:
        own = logits.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)
        return own / self._fold.temperature - self._fold[normaliser]


def fold_weight(
    objective: Objective | None,
    wanted: Iterable[FieldKey],
    views: Mapping[str, TeacherScores],
    vocab_size: int,
) -> float | None:
    """The mixture weight to fold with (0: no mixture), where a fold says all that is asked.

    None where it does not: another formula on a distribution, a support, a view other than
    `teacher`, one that is no model of the same vocabulary. `row_index` and `id_map` rule it out.
    """
    if objective is None or "teacher" not in views or not objective.views() <= {"teacher"}:
        return None
    scores = views["teacher"]
    if scores.hidden is None or {head.vocab_size for head in scores.unembeddings} != {vocab_size}:
        return None
    if any(part is not None for part in (scores.log_probs, scores.row_index, scores.id_map)):
        return None
    if any(key.view not in ("", "teacher") for key in wanted):
        return None
    if any(key.name not in KNOWN_FIELDS or key.support or key.smoothing for key in wanted):
        return None
    weights = {0.0}
    for _, term in objective.parts():
        if term.smoothing or Bound.of(term.support).function is not support.full:
            return None
        for place, bound in term.slots():
            if place == "support":
                continue
            if isinstance(term, Dense) and place == "divergence":
                if forms.of_a_pair(bound) is None:
                    return None
                weights.add(float(dict(bound.knobs).get("teacher_weight", 0.0)))
            elif not all(map(_is_folded, positional_names(bound.function))):
                return None
    return max(weights) if len(weights) <= 2 else None


def _is_folded(name: str) -> bool:
    """Whether a formula may read this: a value of the fold, or nothing of a distribution."""
    if name in KNOWN_FIELDS or name not in FIELDS:
        return True
    field = FIELDS[name]
    return field.side == "none" and field.scope == "none"


def serves(logits: Tensor, hidden: Tensor | None) -> bool:
    """Whether the kernels fold such logits of the student and such states of a view.

    They do in float32 on CUDA, with Triton. With TRITON_INTERPRET=1 Triton runs its kernels on a
    CPU, slowly, for tests.
    """
    if logits.dtype != torch.float32 or hidden is None or hidden.dtype == torch.float64:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (logits.is_cuda or interpreted) and is_available(logits.device.type)


def _tile(vocab_size: int) -> int:
    """Entries a program looks at once: a power of two, as Triton wants it."""
    return int(min(4096, 1 << max(4, (vocab_size - 1).bit_length())))


@cache
def _kernels() -> Any:
    """The module of the kernels, which imports Triton."""
    return importlib.import_module("opd.head.kernels")

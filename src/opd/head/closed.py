"""Formulas over the whole vocabulary whose gradient on the logits is known in closed form.

Each returns the formula's value and a function from a factor per row to the gradient on the
logits of `factor * value`. Such a gradient sums to zero over the vocabulary, as whatever a softmax
is differentiated into. The formulas are those of `opd.formula.divergence`, which remain the
reference and take over on rows whose value is not finite: what is here knows no zero mass.

    formula          slope on logit v, per unit of the value
    reverse_kl       student(v) * (log student(v) - log teacher(v) - D)
    forward_kl       student(v) - teacher(v)
    generalized_jsd  (1 - w) * student(v) * (a(v) - sum_u student(u) * a(u)),  a = log student / m
    student_entropy  -student(v) * (log student(v) + H)
    student_logp     [v = token] - student(v)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.formula import divergence
from opd.types import Bound, qualified_name

Slope = Callable[[Tensor], Tensor]
"""From a factor per row, `[n]`, to `[n, V]`."""


@dataclass
class Student:
    """The student's whole distribution of some rows, without gradient."""

    log_probs: Float[Tensor, "n V"]

    @cached_property
    def probs(self) -> Float[Tensor, "n V"]:
        return self.log_probs.exp()


@dataclass
class Pair:
    """The student's and a view's whole distribution of some rows, and what both are needed for."""

    student: Student
    teacher_log_probs: Float[Tensor, "n V"]

    @cached_property
    def teacher_probs(self) -> Float[Tensor, "n V"]:
        return self.teacher_log_probs.exp()

    @cached_property
    def log_ratio(self) -> Float[Tensor, "n V"]:
        """log student - log teacher."""
        return self.student.log_probs - self.teacher_log_probs


def reverse_kl(pair: Pair) -> tuple[Tensor, Slope]:
    """KL(student || teacher) and its slope."""
    value = (pair.student.probs * pair.log_ratio).sum(-1)

    def slope(factor: Tensor) -> Tensor:
        centred = pair.log_ratio - value.unsqueeze(-1)
        return centred.mul_(pair.student.probs).mul_(factor.unsqueeze(-1))

    return value, slope


def forward_kl(pair: Pair) -> tuple[Tensor, Slope]:
    """KL(teacher || student) and its slope."""
    value = -(pair.teacher_probs * pair.log_ratio).sum(-1)

    def slope(factor: Tensor) -> Tensor:
        return (pair.student.probs - pair.teacher_probs).mul_(factor.unsqueeze(-1))

    return value, slope


def generalized_jsd(pair: Pair, *, teacher_weight: float) -> tuple[Tensor, Slope]:
    """The generalised Jensen-Shannon divergence and its slope."""
    w = teacher_weight
    # log student / mixture, from the ratio: exact where the two sides are close
    over_mixture = (-pair.log_ratio).expm1_().mul_(w).log1p_().neg_()
    mean = (pair.student.probs * over_mixture).sum(-1)
    teacher_part = (pair.teacher_probs * (over_mixture - pair.log_ratio)).sum(-1)

    def slope(factor: Tensor) -> Tensor:
        centred = over_mixture - mean.unsqueeze(-1)
        return centred.mul_(pair.student.probs).mul_((1 - w) * factor.unsqueeze(-1))

    return w * teacher_part + (1 - w) * mean, slope


_OF_A_PAIR: Mapping[str, Callable[..., tuple[Tensor, Slope]]] = MappingProxyType(
    {
        qualified_name(divergence.reverse_kl): reverse_kl,
        qualified_name(divergence.forward_kl): forward_kl,
        qualified_name(divergence.generalized_jsd): generalized_jsd,
    }
)


def of_a_pair(bound: Bound) -> Callable[[Pair], tuple[Tensor, Slope]] | None:
    """The closed form of a divergence with its knobs; None where there is none.

    A mixture of one side alone is the formula's own to refuse.
    """
    form, knobs = _OF_A_PAIR.get(bound.name), dict(bound.knobs)
    if form is None or not 0.0 < knobs.get("teacher_weight", 0.5) < 1.0:
        return None
    return partial(form, **knobs)


def student_entropy(student: Student) -> tuple[Tensor, Slope]:
    """The student's entropy and its slope."""
    value = -(student.probs * student.log_probs).sum(-1)

    def slope(factor: Tensor) -> Tensor:
        centred = student.log_probs + value.unsqueeze(-1)
        return centred.mul_(student.probs).mul_(-factor.unsqueeze(-1))

    return value, slope


def student_logp(student: Student, tokens: Int[Tensor, "n 1"]) -> tuple[Tensor, Slope]:
    """The log-probability of the chosen tokens and its slope."""
    value = student.log_probs.gather(-1, tokens).squeeze(-1)

    def slope(factor: Tensor) -> Tensor:
        given = -factor.unsqueeze(-1)
        return (student.probs * given).scatter_add_(-1, tokens, -given)

    return value, slope


class Ledger:
    """Values that stand for closed forms within one block, and what became of them.

    A value is handed out as a leaf; its gradient is the factor that its slope is asked with. Rows
    whose value is not finite hold zero mass, which only the formula itself knows how to treat:
    they are differentiated through it.

    Nothing here refers back to whoever looks the fields up, so a block's memory goes with the
    block and does not wait for the garbage collector.
    """

    def __init__(self) -> None:
        self._leaves: list[tuple[Tensor, Slope]] = []
        self._known: dict[Any, Tensor] = {}

    def value(
        self,
        key: Any,
        make: Callable[[], tuple[Tensor, Slope]],
        formula: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, " n"]:
        """The value under this key, made on first use.

        Args:
            make: value and slope.
            formula: from indices of rows to what the formula says of them, differentiably.
        """
        if key not in self._known:
            with torch.no_grad():
                value, slope = make()
            finite = value.isfinite()
            whole = bool(finite.all())
            leaf = value if whole else torch.where(finite, value, 0.0)
            if torch.is_grad_enabled():
                leaf.requires_grad_()
                self._leaves.append((leaf, slope if whole else _on_rows(finite, slope)))
            if not whole:
                rows = (~finite).nonzero().squeeze(-1)
                leaf = leaf.index_put((rows,), formula(rows).to(leaf.dtype))
            self._known[key] = leaf
        return self._known[key]

    @property
    def leaves(self) -> list[Tensor]:
        """What the loss is to be differentiated by, beside the logits."""
        return [leaf for leaf, _ in self._leaves]

    def gradient(self, factors: list[Tensor | None]) -> Float[Tensor, "n V"] | None:
        """Sum of the slopes, each with its leaf's gradient; None where no leaf has one."""
        total: Tensor | None = None
        for (_, slope), factor in zip(self._leaves, factors, strict=True):
            if factor is not None:
                part = slope(factor)
                total = part if total is None else total.add_(part)
        return total


def _on_rows(chosen: Bool[Tensor, " n"], slope: Slope) -> Slope:
    """The slope on some rows, zero on the others."""
    return lambda factor: torch.where(chosen.unsqueeze(-1), slope(factor), 0.0)

"""A loss of anybody's, in the one form that the audit asks: rows in, a number per row or one out.

Axes: N rows, the consecutive tokens of one response whose logits already predict them; V
vocabulary of the student, U of the teacher, which differ only where padding is looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import ConfigError, nearest

__all__ = [
    "KEYWORDS",
    "Derivative",
    "Loss",
    "Rows",
    "bare",
    "derivative",
    "factored",
    "keywords",
    "linear",
    "told_of",
]

KEYWORDS = ("mask", "old_logp", "temperature", "count")


@dataclass(frozen=True, eq=False)
class Rows:
    """What a loss may be told.

    Attributes:
        student: logits; the leaf whose gradient is looked at.
        teacher: logits; a row of NaN is a score that is missing.
        tokens: what was written.
        mask: which rows count.
        old_logp: log-probability of each token under the policy that wrote it, in nats; the
            student's own if None.
        temperature: what divides the logits of both; only a loss that takes it sees another than 1.
        count: rows that count over all micro-batches; those of this call if None.
    """

    student: Float[Tensor, "N V"]
    teacher: Float[Tensor, "N U"]
    tokens: Int[Tensor, " N"]
    mask: Bool[Tensor, " N"]
    old_logp: Float[Tensor, " N"] | None = None
    temperature: float = 1.0
    count: int | None = None

    @property
    def old(self) -> Float[Tensor, " N"]:
        """`old_logp`, settled."""
        if self.old_logp is not None:
            return self.old_logp
        with torch.no_grad():
            logp = self.student.float() if self.student.dtype.itemsize < 4 else self.student
            logp = (logp / self.temperature).log_softmax(-1)
            return logp.gather(-1, self.tokens[:, None]).squeeze(-1)

    @property
    def total(self) -> int:
        """`count`, settled."""
        return int(self.mask.sum()) if self.count is None else self.count

    def at(self, places: Tensor) -> Rows:
        """Some of the rows, with their own count."""
        old = None if self.old_logp is None else self.old_logp[places]
        return replace(
            self,
            student=self.student[places],
            teacher=self.teacher[places],
            tokens=self.tokens[places],
            mask=self.mask[places],
            old_logp=old,
        )


@dataclass(frozen=True)
class Loss:
    """A loss under audit.

    Attributes:
        name: as the user wrote it.
        call: from rows to a loss per row, `[N]`, or to one number.
        takes: of `mask`, `old_logp`, `temperature` and `count`, what the loss can be told.
        dtype: of the logits. Float64 unless the loss insists on another.
        is_linear: whether logits are products of states and weights, so that none is infinite.
    """

    name: str
    call: Callable[[Rows], Tensor]
    takes: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float64
    is_linear: bool = False

    @property
    def tolerance(self) -> float:
        """Relative error below which two gradients are the same."""
        return 1e-6 if self.dtype == torch.float64 else 1e-3


class Derivative(NamedTuple):
    """What a call returned and how it would move the models.

    Attributes:
        value: per row, or one number `[]`; detached.
        student: gradient of the (weighted) sum; zeros where the loss does not depend on it.
        teacher: the same with respect to the teacher's logits; None unless asked for.
    """

    value: Tensor
    student: Float[Tensor, "N V"]
    teacher: Float[Tensor, "N U"] | None


def derivative(
    loss: Loss, rows: Rows, weights: Float[Tensor, " N"] | None = None, *, teacher: bool = False
) -> Derivative:
    """Call a loss and differentiate it.

    Args:
        weights: of the rows in the sum that is differentiated; 1 each if None. One number is
            differentiated as it is.
        teacher: also with respect to the teacher's logits.
    """
    with torch.enable_grad():
        student = rows.student.detach().clone().requires_grad_()
        teachers = rows.teacher.detach().clone().requires_grad_(teacher)
        value = loss.call(replace(rows, student=student, teacher=teachers))
        if not isinstance(value, Tensor):
            raise ConfigError(f"{loss.name} returned a {type(value).__name__}, not a tensor")
        if value.numel() != 1 and value.shape != rows.tokens.shape:
            raise ConfigError(
                f"{loss.name} returned shape {list(value.shape)} for {len(rows.tokens)} rows; a "
                "loss returns one number per row, or one in all: see `opd audit --help`"
            )
        total = value.sum() if weights is None or value.dim() == 0 else (value * weights).sum()
        leaves = [student, teachers] if teacher else [student]
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if total.requires_grad:
            found = torch.autograd.grad(total, leaves, allow_unused=True)
    zeros = [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, found, strict=True)
    ]
    return Derivative(value.detach(), zeros[0].detach(), zeros[1].detach() if teacher else None)


# --------------------------------------------------------------------------------------------
# Bare functions


def bare(function: Callable[..., Any], name: str, **options: Any) -> Loss:
    """`f(student_logits [N, V], teacher_logits [N, U], tokens [N]) -> [N]` or one number.

    Of `mask [N]`, `old_logp [N]`, `temperature` and `count` it is passed what it names.

    Args:
        options: further keyword arguments of the function.
    """
    takes = keywords(function, name, options)

    def call(rows: Rows) -> Tensor:
        told = told_of(rows, takes)
        result: Tensor = function(rows.student, rows.teacher, rows.tokens, **told, **options)
        return result

    return Loss(name, call, takes)


def linear(function: Callable[..., Any], name: str, **options: Any) -> Loss:
    """`f(student_hidden, student_weight, teacher_hidden, teacher_weight, tokens) -> number`.

    Hidden states `[N, H]` and weights of the unembeddings, `[V, H]` and `[U, H]`. The states are
    the logits and the weights the identity; where a vocabulary is padded its last weights are 0.
    """
    takes = keywords(function, name, options)

    def call(rows: Rows) -> Tensor:
        student, student_weight = factored(rows.student)
        teacher, teacher_weight = factored(rows.teacher)
        told = told_of(rows, takes)
        result: Tensor = function(
            student, student_weight, teacher, teacher_weight, rows.tokens, **told, **options
        )
        return result

    return Loss(name, call, takes, is_linear=True)


def factored(logits: Float[Tensor, "N V"]) -> tuple[Float[Tensor, "N V"], Float[Tensor, "V V"]]:
    """Hidden states and a weight whose product is the logits."""
    return logits, torch.eye(logits.shape[1], dtype=logits.dtype)


def keywords(function: Callable[..., Any], name: str, options: Mapping[str, Any]) -> frozenset[str]:
    """Of `KEYWORDS`, those that a function names.

    Raises:
        ConfigError: an option that it does not name.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in functions have none
        return frozenset()
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not takes_all:
            raise ConfigError(f"{name} has no option {option!r}. {nearest(option, parameters)}")
    return frozenset(set(KEYWORDS) & set(parameters) - set(options))


def told_of(rows: Rows, takes: frozenset[str]) -> dict[str, Any]:
    """What is passed for the keywords in `takes`."""
    known = {
        "mask": rows.mask,
        "old_logp": rows.old,
        "temperature": rows.temperature,
        "count": rows.total,
    }
    return {name: known[name] for name in KEYWORDS if name in takes}

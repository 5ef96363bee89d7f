"""A loss with what every check may need to know of it, measured once.

Axes: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.audit.findings import Check, fine, flagged
from opd.audit.loss import Loss, Rows, Writer, derivative, derivatives
from opd.audit.targets import match
from opd.audit.toys import ORDINARY, Expected, Toy, expected, rows_of

__all__ = [
    "SILENT",
    "Coupling",
    "Subject",
    "differ",
    "distance",
    "first_line",
    "repeats",
    "response",
    "subject_of",
    "with_field",
]

SILENT = "it has no gradient"


@dataclass(frozen=True, eq=False)
class Coupling:
    """Which rows a row's gradient depends on: `[n, m]` is True where row n sees row m.

    Attributes:
        base: the gradient of five rows of one response, all different.
    """

    student: Bool[Tensor, "N N"]
    teacher: Bool[Tensor, "N N"]
    token: Bool[Tensor, "N N"]
    base: Float[Tensor, "N V"]

    @property
    def is_separable(self) -> bool:
        """Whether every row looks at itself alone."""
        others = ~torch.eye(len(self.base), dtype=torch.bool)
        return not bool(((self.student | self.teacher | self.token) & others).any())

    @property
    def is_ahead(self) -> bool:
        """Whether rows look at themselves and at later rows alone, as credit does."""
        past = torch.ones_like(self.teacher).tril(-1)
        return not bool(((self.teacher | self.token) & past).any())


Company = Literal["alike", "chance", "neighbours", "place"]
"""What becomes of a row among others, up to one factor for all: the same, or what is drawn, or what
the rows beside it decide, or what its place does."""

Precision = Literal["exact", "single", "half"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A loss with what has been measured of it.

    Attributes:
        ordinary: of the ordinary toy, one call per row.
        together: the same in one call on all its rows, where rows look at themselves alone.
        company: whether the two agree up to a factor.
        precision: what it computes in, whatever its logits are in.
    """

    loss: Loss
    writer: Writer
    coupling: Coupling
    ordinary: Expected
    together: Expected | None
    company: Company
    precision: Precision

    @property
    def tolerance(self) -> float:
        """Relative error that is taken for rounding, where nothing magnifies it."""
        return 2e-2 if self.precision == "half" else 1e2 * self.loss.tolerance

    @property
    def rough_tolerance(self) -> float:
        """The same where probabilities are as small as e^-16."""
        return {"exact": self.tolerance, "single": 1e-2, "half": 1e-1}[self.precision]

    def expected(self, toy: Toy, **options: Any) -> Expected:
        """Its expectation on a toy, in one call where that is known to be the same."""
        batched = self.together is not None and self.company == "alike"
        return expected(self.loss, toy, writer=self.writer, batched=batched, **options)

    @property
    def single(self) -> bool:
        """Whether what it does follows from single rows."""
        apart = self.coupling.is_separable and 0 < self.ordinary.size < math.inf
        return self.is_silent or apart

    @property
    def is_silent(self) -> bool:
        """Whether what gradient it has is rounding."""
        noise = 64 * torch.finfo(self.loss.dtype).eps
        return max(self.ordinary.size, float(self.coupling.base.abs().max())) <= noise

    @property
    def unit(self) -> float:
        """The length that gradients of this loss have."""
        return max(self.ordinary.size, 1e-300)


def subject_of(loss: Loss, writer: Writer) -> Subject:
    """Measure what all checks need."""
    seen = coupling(loss)
    found = expected(loss, ORDINARY, writer=writer)
    together: Expected | None = None
    company: Company = "alike"
    if seen.is_separable and bool(found.gradient.isfinite().all()):
        together = expected(loss, ORDINARY, writer=writer, batched=True)
        company = _company(loss, found, together)
    return Subject(loss, writer, seen, found, together, company, _precision(loss))


def repeats(loss: Loss) -> Check:
    """Two calls on the same ordinary rows: alike, and finite."""
    name, rows = "repeatable", response(21, 5, loss.dtype)
    one, other = derivative(loss, rows), derivative(loss, rows)
    bad = one.student[~one.student.isfinite()]
    if len(bad):
        said = "NaN" if bool(bad.isnan().any()) else "infinity"
        message = (
            f"it returned {said} on ordinary rows: of its gradient on five rows with finite logits,"
            f" all of which count, {len(bad)} of {one.student.numel()} entries are not finite"
        )
        return flagged("finite", "not-a-number", message)
    apart = max(
        distance(other.student, one.student) if bool(one.student.any()) else 0.0,
        distance(other.value, one.value) if bool(one.value.isfinite().all()) else 0.0,
    )
    if not apart:
        return fine(name, "two calls on the same rows are the same")
    message = (
        f"two calls on the same rows differ by {apart:.2g} of their length: it draws at random or "
        "keeps a state; audit it with the draw fixed, or without what it remembers"
    )
    return flagged(name, "not-repeatable", message, apart=apart)


def _company(loss: Loss, alone: Expected, together: Expected) -> Company:
    """What becomes of rows among others; in reverse order, whether it goes with the row."""
    tolerance = loss.tolerance
    seen = match(together.pieces, alone.pieces)
    if seen.scale > 0 and seen.residual <= tolerance:
        return "alike"
    rows = rows_of(ORDINARY, loss.dtype)
    there, again = derivative(loss, rows).student, derivative(loss, rows).student
    if distance(again, there) > tolerance:
        return "chance"
    back = derivative(loss, rows.at(torch.arange(len(there)).flip(0))).student.flip(0)
    return "neighbours" if distance(back, there) <= tolerance else "place"


def _precision(loss: Loss) -> Precision:
    """By the fourth differences of the gradient: of a smooth function they vanish with the step.

    A rounding that is coarser than the step does not. The median over rows, so that a kink of the
    loss between two steps is not taken for one.
    """
    if loss.dtype != torch.float64:
        return "single"
    rows = response(23, 12, loss.dtype)
    draw = torch.Generator().manual_seed(24)
    ahead = torch.randn(rows.student.shape, generator=draw, dtype=rows.student.dtype)
    base = derivative(loss, rows).student
    size = base.norm(dim=-1).clamp(min=1e-300)

    def left(step: float) -> float:
        around = [
            derivative(loss, replace(rows, student=rows.student + n * step * ahead)).student
            for n in (-2, -1, 1, 2)
        ]
        fourth = around[0] - 4 * around[1] + 6 * base - 4 * around[2] + around[3]
        return float((fourth.norm(dim=-1) / size).median()) / 8

    if left(1e-2) > 1e-4:
        return "half"
    return "single" if left(1e-3) > 1e-9 else "exact"


def response(seed: int, length: int, dtype: torch.dtype, *, vocabulary: int = 8) -> Rows:
    """A response of random rows, all different."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(length, vocabulary, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    return Rows(
        student=student.to(dtype),
        teacher=(1.5 * teacher).to(dtype),
        tokens=torch.randint(vocabulary, (length,), generator=draw),
        mask=torch.ones(length, dtype=torch.bool),
    )


def coupling(loss: Loss) -> Coupling:
    """Change one row at a time and see which rows' gradients change."""
    length = 5
    rows, other = response(21, length, loss.dtype), response(22, length, loss.dtype)
    names, calls = ("student", "teacher", "tokens"), [rows]
    for name in names:
        before, drawn = getattr(rows, name), getattr(other, name)
        drawn = torch.where(drawn == before, (drawn + 1) % 8, drawn) if name == "tokens" else drawn
        for m in range(length):
            changed = before.clone()
            changed[m] = drawn[m]
            calls.append(with_field(rows, name, changed))
    base, *moved = (found.student for found in derivatives(loss, calls))
    sees = torch.stack([differ(one, base, loss) for one in moved]).view(3, length, length)
    by_student, by_teacher, by_token = sees.transpose(1, 2)
    return Coupling(by_student, by_teacher, by_token, base)


def with_field(rows: Rows, name: str, value: Tensor) -> Rows:
    """The rows with one field replaced."""
    changes: dict[str, Any] = {name: value}
    return replace(rows, **changes)


def differ(one: Tensor, other: Tensor, loss: Loss) -> Bool[Tensor, " N"]:
    """Which rows of two gradients are not the same."""
    scale = max(float(one.abs().max()), float(other.abs().max()), 1e-300)
    return ((one - other).abs().amax(-1) > 1e-2 * loss.tolerance * scale).cpu()


def distance(one: Tensor, other: Tensor) -> float:
    """Between two gradients, over the length of the second."""
    return float((one - other).norm() / other.norm().clamp(min=1e-300))


def first_line(error: Exception) -> str:
    """What an error says, shortened."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 100 else f"{line[:97]}..."

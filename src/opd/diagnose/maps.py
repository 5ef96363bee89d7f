"""Where teacher and student of a probe disagree, by how sure each of them is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from opd.diagnose.evidence import Evidence
from opd.diagnose.signal import quantiles
from opd.diagnose.update import disagreement_map

BINS = 4
"""Quarters of the tokens, by rank."""
INSIDE = tuple(edge / BINS for edge in range(1, BINS))


@dataclass(frozen=True)
class DisagreementMap:
    """Shares by quarters of the student's entropy and of another number, the lowest first.

    Attributes:
        columns: the other number: `teacher_entropy`, or what disagrees, by its size.
        of: what disagrees: `reverse_kl`, or the size of `log_ratio`.
        rows: how many tokens were counted.
        student_edges, column_edges: values between the quarters.
        tokens: share of the tokens in each cell, [student's quarter][other's quarter].
        disagreement: share of all disagreement in each cell.
        words: where most of it is.
    """

    columns: str
    of: str
    rows: int
    student_edges: tuple[float, ...]
    column_edges: tuple[float, ...]
    tokens: tuple[tuple[float, ...], ...]
    disagreement: tuple[tuple[float, ...], ...]
    words: str


def disagreement_maps(evidence: Evidence) -> tuple[DisagreementMap, ...]:
    """By both entropies, where the teacher's is known; by the student's and the size of `of`."""
    of = "reverse_kl" if "reverse_kl" in evidence.rows else "log_ratio"
    columns = [name for name in ("teacher_entropy", of) if name in evidence.rows]
    return tuple(each for name in columns for each in _map(evidence, name, of))


def _map(evidence: Evidence, columns: str, of: str) -> Iterator[DisagreementMap]:
    """The map, where there are rows."""
    student, size = evidence.row("student_entropy"), evidence.row(of).abs()
    other = size if columns == of else evidence.row(columns)
    known = ~(student.isnan() | other.isnan() | size.isnan())
    if not bool(known.any()):
        return
    student, other, size = student[known], other[known], size[known]
    shares = disagreement_map(student, other, size, BINS)
    tokens, disagreement = (tuple(map(tuple, each.tolist())) for each in shares)
    student_edges, column_edges = (
        tuple(quantiles(each, INSIDE).values()) for each in (student, other)
    )
    words = _in_words if columns == "teacher_entropy" else _driven_by
    middle = BINS // 2 - 1
    yield DisagreementMap(
        columns,
        of,
        len(student),
        student_edges,
        column_edges,
        tokens,
        disagreement,
        words(shares, student_edges[middle], column_edges[middle]),
    )


PLACES = (
    ("both are surer than usual", "the student is surer than usual and the teacher less"),
    ("the teacher is surer than usual and the student less", "both are less sure than usual"),
)
"""By half of the student's entropies, then of the teacher's, the lower first: ranks alone say
nothing of how sure that is, so the medians are told."""


def _in_words(shares: Float[Tensor, "2 n n"], student_nats: float, teacher_nats: float) -> str:
    """The half of the one and the half of the other in which most of the disagreement is."""
    half = BINS // 2
    tokens, disagreement = shares.reshape(2, 2, half, 2, half).sum((2, 4))
    if bool(disagreement.isnan().any()):
        return "they disagree nowhere"
    student, teacher = divmod(int(disagreement.argmax()), 2)
    return (
        f"{float(disagreement[student, teacher]):.0%} of the disagreement is where "
        f"{PLACES[student][teacher]}, {float(tokens[student, teacher]):.0%} of the tokens "
        f"(median entropy {student_nats:.2g} nats of the student, {teacher_nats:.2g} of the "
        "teacher)"
    )


def _driven_by(shares: Float[Tensor, "2 n n"], student_nats: float, _: float) -> str:
    """How much the quarter of the tokens that disagree most holds, and how sure the student is."""
    tokens, disagreement = shares[:, :, -1]
    total = float(disagreement.sum())
    if math.isnan(total):
        return "they disagree nowhere"
    sure = float(disagreement[: BINS // 2].sum())
    return (
        f"the {float(tokens.sum()):.0%} of the tokens on which they disagree most hold {total:.0%} "
        f"of the disagreement, {sure:.0%} where the student is surer than usual (median entropy "
        f"{student_nats:.2g} nats)"
    )

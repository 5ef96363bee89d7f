"""Regularisers: penalties per row that carry the gradient and need no teacher.

A divergence to a reference and the likelihood of data are terms of their own (`against`, `rows`);
a price on length is a reward (`length_cost`, `overlong_cost`), for it acts through credit.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from opd.fields import counted

__all__ = ["entropy_bonus", "entropy_floor"]


def entropy_bonus(student_entropy: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Minus the student's entropy at the prefix, in nats: a penalty that rewards spread.

        L = -H(student)

    Never stops pulling: alone it is stationary at the uniform distribution only, and beside a
    divergence it moves the optimum away from the teacher. On a support the entropy is that of the
    restricted distribution.

    Args:
        student_entropy: computed live; carries the gradient.

    Returns:
        One penalty per position, <= 0.

    Source: Williams and Peng, doi:10.1080/09540099108946587.
    """
    return -student_entropy


def _below(student_entropy: Float[Tensor, "*n"], *, nats: float) -> Bool[Tensor, "*n"]:
    return student_entropy.detach() < nats


@counted(_below)
def entropy_floor(student_entropy: Float[Tensor, "*n"], *, nats: float) -> Float[Tensor, "*n"]:
    """How far the student's entropy at the prefix lies below a floor, in nats.

        L = max(0, nats - H(student))

    0, and without gradient, at or above the floor; there it does not move the optimum. Below, the
    pull is that of `entropy_bonus`, however small the gap. The share of rows below is logged. A
    floor above the teacher's own entropy keeps the student from the teacher.

    Args:
        student_entropy: computed live; carries the gradient.
        nats: the floor, > 0; at most the log of the number of entries can be reached.

    Returns:
        One penalty per position, >= 0.

    Source: entropy control, a regulariser in Table 3 of arXiv:2606.22793.
    """
    if not nats > 0.0:
        raise ValueError(f"nats must be positive, got {nats}; an entropy is never below 0")
    return (nats - student_entropy).relu()

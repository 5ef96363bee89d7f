"""Penalties on the student's own entropy, to be minimised; numbers of any one shape."""

from __future__ import annotations

import numpy.typing as npt

from .rewards import Array, each


def entropy_bonus(student_entropy: npt.ArrayLike) -> Array:
    """-H: descending it raises the entropy."""
    return each(lambda entropy: -entropy, student_entropy)


def entropy_floor(student_entropy: npt.ArrayLike, *, nats: float) -> Array:
    """max(0, nats - H): nothing above the floor."""
    return each(lambda entropy: max(0.0, nats - entropy), student_entropy)

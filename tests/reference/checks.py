"""What the tests of the oracles share: central differences, a largest entry, small rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

GRADIENT_BOUND = 1e-7
IDENTITY_BOUND = 1e-8


def finite_differences(loss: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """Central differences, one coordinate at a time."""
    gradient = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (loss(up) - loss(down)) / (2 * step)
    return gradient


def largest(difference: Array) -> float:
    return float(np.abs(difference).max())


def logs(*probabilities: float) -> Array:
    return np.array([math.log(p) if p else -math.inf for p in probabilities])


def logit_rows(seed: int, size: int = 5) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=size), 1.5 * generator.normal(size=size)

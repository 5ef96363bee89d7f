"""Methods are compared in float64 throughout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    """Weights that follow from masks and ids alone are made in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)

"""Every check of a loss, in the order in which a verdict lists them."""

from __future__ import annotations

from collections.abc import Callable

from opd.audit.checks_calls import company, masks, micro_batches, missing, no_rows, rows_apart
from opd.audit.checks_expected import advantage, alive, mixed, stationary, teaches
from opd.audit.checks_numbers import (
    detached,
    low_precision,
    ratios,
    temperature,
    vocabularies,
    zero_mass,
)
from opd.audit.findings import Check
from opd.audit.subject import Subject

__all__ = ["CHECKS", "EXPECTATIONS"]

CHECKS: tuple[Callable[[Subject], Check], ...] = (
    rows_apart,
    company,
    masks,
    micro_batches,
    temperature,
    zero_mass,
    no_rows,
    missing,
    vocabularies,
    low_precision,
    detached,
    ratios,
)
"""Looks that need no expectation."""

EXPECTATIONS: tuple[Callable[[Subject], Check], ...] = (
    teaches,
    mixed,
    advantage,
    stationary,
    alive,
)
"""Looks at the sum over tokens, for losses of single rows."""

"""Audit: what an objective descends in exact expectation, held against what it is meant to."""

from opd.audit.oracle import Agreement, Expectation, compare, expectation
from opd.audit.worlds import (
    World,
    absorbing_chain,
    fast_chain,
    lag_gradient,
    local_gradient,
    per_state_reverse_kl,
    random_tree,
    sequence_reverse_kl,
    sequence_reverse_kl_gradient,
    slow_chain,
    value,
    visits,
)

__all__ = [
    "Agreement",
    "Expectation",
    "World",
    "absorbing_chain",
    "compare",
    "expectation",
    "fast_chain",
    "lag_gradient",
    "local_gradient",
    "per_state_reverse_kl",
    "random_tree",
    "sequence_reverse_kl",
    "sequence_reverse_kl_gradient",
    "slow_chain",
    "value",
    "visits",
]

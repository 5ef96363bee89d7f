"""Audit: what a loss or an objective descends in exact expectation, and what it is meant to."""

from opd.audit.adapters import adapt
from opd.audit.conduct import RunFacts
from opd.audit.oracle import Agreement, Expectation, compare, expectation
from opd.audit.own import objective_loss
from opd.audit.rules import Remark, examine
from opd.audit.verdict import Verdict, audit_loss
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
    "Remark",
    "RunFacts",
    "Verdict",
    "World",
    "absorbing_chain",
    "adapt",
    "audit_loss",
    "compare",
    "examine",
    "expectation",
    "fast_chain",
    "lag_gradient",
    "local_gradient",
    "objective_loss",
    "per_state_reverse_kl",
    "random_tree",
    "sequence_reverse_kl",
    "sequence_reverse_kl_gradient",
    "slow_chain",
    "value",
    "visits",
]

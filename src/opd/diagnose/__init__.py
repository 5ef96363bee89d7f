"""What is measured of a run beside its losses.

The diagnostics named here are functions of tensors that a step, a probe or an evaluation has: one
number per row, per response or per batch. `opd list diagnostics` and `docs/diagnostics.md` say how
to read them. Nothing is differentiated. Per row the result has the dtype of its argument;
statistics are taken in float64. Entries without mass are exact limits, and what nothing is known
of is NaN.
"""

from opd.diagnose.along import (
    change_point,
    dispersion_by_bin,
    drift_budget,
    first_token_spike,
    profile,
    suffix_fade,
)
from opd.diagnose.compatibility import (
    entropy_gap,
    excess_surprise,
    overlap_advantage,
    student_overlap_mass,
    support_gap,
    teacher_confidence,
    teacher_margin,
    teacher_overlap_mass,
    teacher_surprise,
    teacher_top_mass,
    top_k_overlap,
)
from opd.diagnose.drift import length_mean, repeated_ngrams, truncated_share
from opd.diagnose.interface import cache_drift, eos_divergence, excess_id_ratio, retokenised_share
from opd.diagnose.outcome import (
    align_auc,
    calibration_error,
    hedging_share,
    outcome_correlation,
    privilege_gap,
    recoverability,
    split_delta,
)
from opd.diagnose.routing import leak, reachable, realised_routing, routable_share
from opd.diagnose.signal import (
    forward_kl,
    log_ratio,
    marginal_info,
    mean_entropy,
    negative_mass,
    negative_share,
    pairwise_kl,
    quantiles,
    reverse_kl,
    self_distillation_residual,
)
from opd.diagnose.staleness import (
    importance_mass_masked,
    importance_ratio,
    kl_from_samples,
    log_mismatch,
    masked_share,
)
from opd.diagnose.update import (
    cosine,
    disagreement_map,
    effective_share,
    explained_variance,
    gradient_proxy,
    gradient_variance,
    td_residual_by_bin,
    top_share,
)

__all__ = [
    "align_auc",
    "cache_drift",
    "calibration_error",
    "change_point",
    "cosine",
    "disagreement_map",
    "dispersion_by_bin",
    "drift_budget",
    "effective_share",
    "entropy_gap",
    "eos_divergence",
    "excess_id_ratio",
    "excess_surprise",
    "explained_variance",
    "first_token_spike",
    "forward_kl",
    "gradient_proxy",
    "gradient_variance",
    "hedging_share",
    "importance_mass_masked",
    "importance_ratio",
    "kl_from_samples",
    "leak",
    "length_mean",
    "log_mismatch",
    "log_ratio",
    "marginal_info",
    "masked_share",
    "mean_entropy",
    "negative_mass",
    "negative_share",
    "outcome_correlation",
    "overlap_advantage",
    "pairwise_kl",
    "privilege_gap",
    "profile",
    "quantiles",
    "reachable",
    "realised_routing",
    "recoverability",
    "repeated_ngrams",
    "retokenised_share",
    "reverse_kl",
    "routable_share",
    "self_distillation_residual",
    "split_delta",
    "student_overlap_mass",
    "suffix_fade",
    "support_gap",
    "td_residual_by_bin",
    "teacher_confidence",
    "teacher_margin",
    "teacher_overlap_mass",
    "teacher_surprise",
    "teacher_top_mass",
    "top_k_overlap",
    "top_share",
    "truncated_share",
]

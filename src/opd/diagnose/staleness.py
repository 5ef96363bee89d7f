"""How far the policy that wrote the text is from the one that is updated.

Between updates it is `old_logp` against `student_logp`; between engines, `sampler_logp` against
`old_logp`: the same functions, other arguments.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from opd.diagnose.numbers import difference, leading, mean, share, wide
from opd.errors import ConfigError

__all__ = [
    "importance_mass_masked",
    "importance_ratio",
    "kl_from_samples",
    "log_mismatch",
    "masked_share",
]

PerToken = Float[Tensor, "*n"]


def importance_ratio(old_logp: PerToken, student_logp: PerToken) -> float:
    """The mean importance ratio of the sampled tokens.

    Formula: mean of student(y) / old(y), on y drawn from old
    Unit: a ratio
    Reading: 1 in expectation however stale the text is, as long as `old` is who drew it and covers
        the student. Off 1 by more than its sampling error: another distribution drew the text, such
        as one of another temperature, or mass has moved to tokens that old never draws. 1 exactly
        on fresh text.
    Action: score the text with the engine that wrote it; refresh, correct or mask where it strays
    Cost: both log-probabilities of the sampled token
    Source: stale policies among the dynamics of arXiv:2606.22793, section 6, and arXiv:2606.24143;
        our own derivation
    Id: stale
    """
    return mean(difference(wide(student_logp), wide(old_logp)).exp())


def kl_from_samples(old_logp: PerToken, student_logp: PerToken) -> float:
    """How far the student has moved from the policy that wrote the text.

    Formula: mean of log old(y) - log student(y), on y drawn from old: unbiased for KL(old ||
        student) at the visited prefixes
    Unit: nats; of few tokens it may be negative
    Reading: 0 on fresh text, growing with every update on the same text. Large: the state
        distribution and any frozen reward belong to a policy that is gone.
    Action: fewer updates per rollout, recompute the log ratio, importance weights, masks
    Cost: both log-probabilities of the sampled token
    Source: staleness in arXiv:2606.24143, by way of section 6 of arXiv:2606.22793; our own
        derivation
    Id: stale
    """
    return mean(difference(wide(old_logp), wide(student_logp)))


def log_mismatch(a: PerToken, b: PerToken) -> float:
    """By how much two scores of the same tokens differ.

    Formula: mean of |a - b|; two equal -inf differ by 0
    Unit: nats
    Reading: within rounding for one model in one engine. Of the sampler's log-probabilities and the
        trainer's: the engines differ, and any log ratio smaller than this is noise. Of one text
        behind two templates: what the template alone changes.
    Action: one precision and one kernel on both sides, replay the routing of experts, truncate the
        ratio
    Cost: both log-probabilities of the sampled token
    Source: the train-inference mismatch that arXiv:2601.02780 corrects for, in the case studies of
        arXiv:2606.22793; the measure is our own derivation
    Id: stale
    """
    return mean(difference(wide(a), wide(b)).abs())


def masked_share(ratio: PerToken, low: float, high: float) -> float:
    """How many tokens masked importance sampling drops.

    Formula: share of rows with ratio < low or ratio > high
    Unit: a share in [0, 1] of the rows
    Reading: 0 where the policies agree. Rising: the update looks at less and less of the text, and
        at the part on which the student has not moved.
    Action: fresher text, wider bounds
    Cost: the ratios that the step has
    Source: truncated importance sampling of arXiv:2601.02780, in the case studies of
        arXiv:2606.22793; our own derivation
    Id: stale
    """
    return mean(_outside(ratio, low, high))


def importance_mass_masked(ratio: PerToken, low: float, high: float) -> float:
    """How much importance masked importance sampling drops.

    Formula: sum of ratio outside [low, high] / sum of ratio
    Unit: a share in [0, 1] of the importance; NaN where there is none
    Reading: 0 where the policies agree. Above `masked_share`: what is dropped is what the student
        has come to say more often, not what it gave up.
    Action: fresher text, a higher upper bound, a cap in place of the mask
    Cost: the ratios that the step has
    Source: truncated importance sampling of arXiv:2601.02780, in the case studies of
        arXiv:2606.22793; our own derivation
    Id: stale
    """
    outside, importance = _outside(ratio, low, high), leading(wide(ratio))
    return share(float(importance[outside].sum()), float(importance.sum()))


def _outside(ratio: PerToken, low: float, high: float) -> Tensor:
    if not 0.0 <= low <= high:
        raise ConfigError(f"bounds of a ratio need 0 <= low <= high, got {low} and {high}")
    return (ratio < low) | (ratio > high)

"""What the signal becomes once it is an update: who drives it, and whether it can be trusted."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.diagnose.numbers import (
    bin_means,
    check_paired,
    leading,
    mass,
    rank_bins,
    relative_bins,
    share,
    wide,
)
from opd.errors import ConfigError

__all__ = [
    "cosine",
    "disagreement_map",
    "effective_share",
    "explained_variance",
    "gradient_proxy",
    "gradient_variance",
    "td_residual_by_bin",
    "top_share",
]


@torch.no_grad()
def gradient_proxy(
    student_log_probs: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """How long a step the score of a token takes on the student's logits.

    Formula: |grad log student(a)| = sqrt(1 - 2 student(a) + sum over v of student(v)^2)
    Unit: nats per unit of a logit, per row; between 0 and sqrt(2)
    Reading: 0 where the student is certain of the token: whatever its advantage, nothing moves.
        Near sqrt(2) where it is certain of another one. Times |A| it is the size of the row's push,
        the argument of `effective_share` and `top_share`.
    Action: none by itself
    Cost: the student's whole distribution; no backward pass
    Source: gradient concentration, Table 7 of arXiv:2606.22793; our own derivation
    Id: grad_concentration
    """
    chosen = torch.zeros_like(student_log_probs, dtype=torch.bool)
    others = ~chosen.scatter(-1, tokens.unsqueeze(-1), True)
    # As a sum over the others: 1 - student(a) would cancel where the student is nearly certain.
    square_sum = mass(2 * student_log_probs, others)
    return (mass(student_log_probs, others).square() + square_sum).sqrt()


def effective_share(size: Float[Tensor, "*n"]) -> float:
    """How many tokens share in the update, as a part of all.

    Formula: ESS / n,  ESS = (sum of s)^2 / sum of s^2,  s = |A| * gradient_proxy
    Unit: a share in [1/n, 1] of the rows; NaN where nothing pushes
    Reading: 1 where all rows push alike. Small: a few outliers are the update, and the batch is
        smaller than it looks.
    Action: select tokens, clip the reward, normalise advantages
    Cost: the advantages that the step has, and one pass over the student's distribution
    Source: gradient concentration, Table 7 of arXiv:2606.22793; our own derivation
    Id: grad_concentration
    """
    sizes = _scaled(size)
    effective = share(float(sizes.sum()) ** 2, float(sizes.square().sum()))
    return effective / sizes.numel() if sizes.numel() else math.nan


def top_share(size: Float[Tensor, "*n"], share: float = 0.01) -> float:
    """How much of the update the few largest tokens hold.

    Formula: the part of sum of s that the ceil(share * n) largest s hold, s = |A| * gradient_proxy
    Unit: a share in (0, 1] of all push; NaN where nothing pushes
    Reading: about `share` where all rows push alike. Near 1: those tokens are the update; look at
        which they are, `excess_id_ratio`.
    Action: select tokens, clip the reward, mask the ids at fault
    Cost: as for `effective_share`
    Source: gradient concentration, Table 7 of arXiv:2606.22793; our own derivation
    Id: grad_concentration
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"share must lie in (0, 1], got {share}; 0.01 is the top 1 %")
    sizes = _scaled(size).flatten()
    # As it is written: 0.07 * 100 is 7.000000000000001 in binary, and means seven rows.
    count = math.ceil(Fraction(str(share)) * len(sizes))
    total = float(sizes.sum())
    return float(sizes.topk(count).values.sum()) / total if total else math.nan


def disagreement_map(
    student_entropy: Float[Tensor, " N"],
    other: Float[Tensor, " N"],
    disagreement: Float[Tensor, " N"],
    bins: int = 4,
) -> Float[Tensor, "2 bins bins"]:
    """Where teacher and student disagree: on tokens that are open, or on those they are sure of.

    Formula: of the cell (i, j) the share of the rows, and the share of the sum of |d|, with
        floor(bins * rank / n) = i by the student's entropy and = j by the other number; rank: how
        many rows have less, so equal ones stay together
    Unit: shares of the rows, then of all |d|, each 1 in all; NaN without rows, or where nothing
        disagrees; float64
    Reading: by both entropies, the lowest bins those that are surest: much of |d| where both are
        sure, two models that contradict each other, or an interface at fault; where only the
        student is, confident errors; where only it is open, what it has to learn; where both are,
        many ways to go on, and noise. By the entropy and |d| itself: rows of the last column are
        the few that drive the update.
    Action: gate or select tokens by entropy, clip where both are sure, a forward divergence where
        the teacher is open, an audit of the interface
    Cost: numbers that a probe or a look has: both entropies, and the reverse KL or the log ratio
    Source: the entropy-disagreement map in Table 7 and section 7.1 of arXiv:2606.22793; the
        measure is our own derivation
    Id: grad_concentration
    """
    cell = rank_bins(student_entropy, bins) * bins + rank_bins(other, bins)
    size = leading(wide(disagreement).abs())
    sums = torch.stack([torch.ones_like(size), size])
    found = torch.stack([torch.bincount(cell, weights=each, minlength=bins**2) for each in sums])
    return (found / sums.sum(1, keepdim=True)).reshape(2, bins, bins)


def _scaled(size: Tensor) -> Tensor:
    """Sizes over the largest: their squares then neither overflow nor vanish."""
    sizes = leading(wide(size))
    largest = float(sizes.max()) if sizes.numel() else 0.0
    return sizes / largest if largest > 0 else sizes


def cosine(a: Float[Tensor, " D"], b: Float[Tensor, " D"]) -> float:
    """Whether two gradients pull the same way.

    Formula: <a, b> / (|a| |b|); NaN where one of them is zero
    Unit: none; in [-1, 1]
    Reading: 1 the same way, 0 unrelated, below 0 what one teaches the other takes back: the
        teacher's gradient against the verifier's, or one teacher's against another's.
    Action: gate or weight one by the other; route teachers, do not average them
    Cost: a backward pass for each gradient, on a pilot batch
    Source: signal-outcome mismatch and multi-teacher conflict, Table 6 of arXiv:2606.22793, which
        has the idea from arXiv:2605.10889; the measure is our own derivation
    Id: grad_cos
    """
    check_paired("the entries of two gradients", len(a), len(b))
    if not len(a):
        return math.nan
    return float((_unit(wide(a)) @ _unit(wide(b))).clamp(-1.0, 1.0))


def _unit(vector: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """Of length 1; NaN where it is zero."""
    scaled = vector / vector.abs().max()
    return scaled / scaled.square().sum().sqrt()


def explained_variance(values: Float[Tensor, "*n"], target: Float[Tensor, "*n"]) -> float:
    """How much of the spread of the returns a critic knows beforehand.

    Formula: 1 - Var(target - value) / Var(target); NaN where the targets do not vary
    Unit: a share, at most 1
    Reading: 1 perfect up to a constant, 0 what a constant explains, below 0 worse than that: a
        bootstrap from these values is biased, and they add variance as a baseline.
    Action: a larger lambda, more steps of the critic, a longer warm-up of it
    Cost: the values and returns that the critic's step has
    Source: value-function error of a critic, section 4.3 of arXiv:2606.22793; our own derivation
    Id: critic
    """
    goal, missed = wide(target), wide(target) - wide(values)
    if not goal.numel() or bool((goal == goal.flatten()[0]).all()):
        return math.nan
    return 1.0 - float(missed.var(correction=0) / goal.var(correction=0))


def td_residual_by_bin(
    delta: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], bins: int
) -> Float[Tensor, " bins"]:
    """Whether a critic's one-step errors vanish in the mean, along the response.

    Formula: mean over rows with floor(bins * t / T) = bin of delta_t = r_t + V_{t+1} - V_t
    Unit: nats, per bin, float64; NaN in a bin without tokens
    Reading: 0 in every bin for the true value function. Off 0 in a bin: the values are wrong there,
        and every lambda < 1 passes the error on to the advantages before it.
    Action: a larger lambda, more steps of the critic
    Cost: the residuals that the step has
    Source: the residuals of GAE-OPD, Eqs. 21 to 23 of arXiv:2606.22793; our own derivation
    Id: critic
    """
    return bin_means(delta[mask], relative_bins(mask, bins), bins)


def gradient_variance(gradients: Float[Tensor, "S D"]) -> float:
    """How much the gradient of the same prompts differs from one draw of responses to the next.

    Formula: trace of the unbiased covariance of S draws; NaN for fewer than two
    Unit: that of the gradient, squared
    Reading: of two estimators of the same thing the one with less is better; of two estimators of
        different things it says nothing. Early tokens multiplied by long sums show here.
    Action: chooses the credit: a baseline, a window, lambda of GAE
    Cost: S rollouts of the same prompts with a backward pass each, on frozen weights
    Source: long-horizon variance, Table 6 of arXiv:2606.22793; our own derivation
    Id: credit_var
    """
    if len(gradients) < 2:
        return math.nan
    return float(wide(gradients).var(dim=0, correction=1).sum())

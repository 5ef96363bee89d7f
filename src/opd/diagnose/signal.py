"""How large the teacher's signal is, how it is spread, and what several teachers say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from opd.diagnose.numbers import difference, leading, mean, share, wide
from opd.errors import ConfigError
from opd.formula import divergence
from opd.formula.divergence import student_entropy

__all__ = [
    "forward_kl",
    "log_ratio",
    "marginal_info",
    "mean_entropy",
    "negative_mass",
    "negative_share",
    "pairwise_kl",
    "quantiles",
    "reverse_kl",
    "self_distillation_residual",
]

Rows = Float[Tensor, "N V"]
PerRow = Float[Tensor, " N"]


@torch.no_grad()
def reverse_kl(student_log_probs: Rows, teacher_log_probs: Rows) -> PerRow:
    """How far the student is from the teacher, weighted by what the student says.

    Formula: sum over v of student(v) * (log student(v) - log teacher(v))
    Unit: nats, per row
    Reading: 0 only where both agree. Large: the student says what the teacher would not. Cheap
        inside a loop, where both agree on text that nobody wants.
    Action: none by itself; cap or skew it where few rows hold most of it
    Cost: both whole distributions
    Source: the local objective of arXiv:2606.22793, with its histogram in the pilot of section 7.1
    Id: rkl
    """
    found: Tensor = divergence.reverse_kl(student_log_probs, teacher_log_probs)
    return found


@torch.no_grad()
def forward_kl(student_log_probs: Rows, teacher_log_probs: Rows) -> PerRow:
    """How far the student is from the teacher, weighted by what the teacher says.

    Formula: sum over v of teacher(v) * (log teacher(v) - log student(v))
    Unit: nats, per row
    Reading: 0 only where both agree. Large where the reverse KL is small: the student has settled
        on a part of what the teacher would say and lost the rest.
    Action: a forward or mixed divergence where the teacher's entropy is high, an entropy bonus
    Cost: both whole distributions
    Source: the local objectives of arXiv:2606.22793, with their histogram in the pilot of section
        7.1
    Id: fkl
    """
    found: Tensor = divergence.forward_kl(student_log_probs, teacher_log_probs)
    return found


@torch.no_grad()
def log_ratio(student_logp: PerRow, teacher_logp: PerRow) -> PerRow:
    """By how much the teacher finds the sampled token likelier than the student does.

    Formula: r = log teacher(y) - log student(y)
    Unit: nats, per row
    Reading: on the student's own tokens its mean is minus the reverse KL: 0 or less. Positive: the
        teacher likes the token more. Very negative on few rows: these drive the update. Growing
        everywhere at once: positions or vocabularies do not match.
    Action: see `quantiles`, `excess_id_ratio` and `dispersion_by_bin` of it
    Cost: the log-probability of the sampled token on either side
    Source: Eqs. 5 and 11 of arXiv:2606.22793
    """
    return difference(teacher_logp, student_logp)


def quantiles(
    r: PerRow, shares: Sequence[float] = (0.01, 0.05, 0.5, 0.95, 0.99)
) -> dict[float, float]:
    """Where the log ratios, or whatever is given per row, lie.

    Formula: the value at share * (n - 1) of the sorted rows, linear in between
    Unit: that of the rows, by share
    Reading: a 1 % quantile far below the 5 % one: a heavy left tail, a few tokens to which the
        teacher gives next to nothing drive the update. A median that is off 0 as much as the tails:
        a mismatch of all tokens, not of some.
    Action: clip or skew the reward, cap what a row contributes, mask the ids at fault
    Cost: one sort
    Source: the log-ratio histogram of section 7.1 of arXiv:2606.22793; the choice of quantiles is
        our own derivation
    Id: log_ratio
    """
    if any(not 0.0 <= each <= 1.0 for each in shares):
        raise ConfigError(f"shares must lie in [0, 1], got {tuple(shares)}")
    if not r.numel():
        return dict.fromkeys(shares, math.nan)
    ordered = wide(r).sort().values
    return {each: _between(ordered, each * (len(ordered) - 1)) for each in shares}


def _between(ordered: Float[Tensor, " N"], place: float) -> float:
    below = min(math.floor(place), len(ordered) - 1)
    low, part = float(ordered[below]), place - below
    if part == 0.0 or math.isinf(low):  # what lies between minus infinity and a number is the first
        return low
    return low + part * (float(ordered[below + 1]) - low)


def negative_share(advantage: Float[Tensor, "*n"]) -> float:
    """The share of tokens that are to become less likely.

    Formula: mean of [A < 0]
    Unit: a share in [0, 1] of the rows
    Reading: near 1: all the update does is take mass away, and the teacher does not say where it
        goes. An immediate log ratio is negative more often than not; a baseline brings it to about
        a half.
    Action: a baseline, routing, a local divergence where A < 0
    Cost: the advantages that the step has
    Source: the sign audit in Table 7 of arXiv:2606.22793; our own derivation
    Id: neg_frac
    """
    return mean(advantage < 0)


def negative_mass(advantage: Float[Tensor, "*n"]) -> float:
    """The share of all push that takes mass away.

    Formula: sum of [-A]_+ / sum of |A|; NaN where nothing pushes
    Unit: a share in [0, 1] of the absolute advantage
    Reading: near 1: suppression alone, of tokens without a named replacement. Above
        `negative_share`: the negative tokens are fewer than their weight, a heavy left tail.
    Action: a baseline, clipping from below, routing, a local divergence where A < 0
    Cost: the advantages that the step has
    Source: the mass audit in Table 7 of arXiv:2606.22793; our own derivation
    Id: neg_mass
    """
    size = leading(wide(advantage))
    return share(float((-size).clamp(min=0).sum()), float(size.abs().sum()))


def marginal_info(reverse_kl: PerRow) -> float:
    """How much the teacher has to say that the student does not know yet.

    Formula: mean over rows of KL(student || teacher), on held-out text of the student
    Unit: nats
    Reading: near 0: nothing to learn, or expensive self-regularisation. Very large: out of reach,
        or a teacher that is noise on this text. Read it beside what teacher and student score,
        `privilege_gap` of the two: a distance without a better score teaches a style.
    Action: another teacher; a warm-up where it is out of reach
    Cost: the reverse KL of held-out rows, both whole distributions
    Source: marginal information, section 5 of arXiv:2606.22793; the measure is our own derivation
    """
    return mean(reverse_kl)


def mean_entropy(student_log_probs: Rows) -> float:
    """How open the student's next token is, in the mean.

    Formula: mean over rows of -sum over v of student(v) * log student(v)
    Unit: nats
    Reading: falling towards 0 while accuracy over several samples falls too: the student settles on
        one way to say things. Rising: it is torn between teachers, or forgets. Of the teacher's
        distributions in the student's place it says how undecided the teacher is on this text.
    Action: a forward divergence where the teacher is undecided, an entropy bonus, a smaller step
    Cost: the student's whole distribution
    Source: drift and calibration, Table 7 of arXiv:2606.22793; collapse under the reverse KL is
        the subject of arXiv:2603.07079, the measure is our own derivation
    Id: entropy
    """
    return mean(student_entropy(student_log_probs))


def pairwise_kl(teachers: Float[Tensor, "M N V"]) -> Float[Tensor, "M M"]:
    """How far several teachers disagree on the same rows.

    Formula: mean over rows of KL(m || m'), for every two of M teachers
    Unit: nats, from the row's teacher to the column's; float64
    Reading: 0 where two say the same. Large: an average of the two is a third thing that neither
        says. Whether they pull the student apart, `cosine` of their gradients tells.
    Action: route by domain, do not average; stage the teachers
    Cost: the whole distribution of every teacher on the same rows
    Source: multi-teacher conflict, Table 6 of arXiv:2606.22793; our own derivation
    Id: teacher_conflict
    """
    found = [
        [mean(divergence.reverse_kl(wide(one), wide(other))) for other in teachers]
        for one in teachers
    ]
    count = len(teachers)
    return torch.tensor(found, dtype=torch.float64, device=teachers.device).reshape(count, count)


def self_distillation_residual(
    loss: Float[Tensor, "*n"], gradient: Float[Tensor, " D"]
) -> tuple[float, float]:
    """What is left of loss and gradient where the student is its own teacher.

    Formula: (max over rows of |loss|, max over parameters of |gradient|), with teacher = student
    Unit: nats, and nats per unit of a parameter
    Reading: both 0 up to rounding for a method that is stationary there. Anything else: plumbing.
        Positions are shifted, temperatures, dropout or templates differ, or a mask is wrong.
    Action: find the fault before any other number is believed
    Cost: one step with the student in the teacher's place
    Source: teacher = student leaves nothing to learn, section 5 of arXiv:2606.22793; a debugging
        hint of verl, the measure is our own derivation
    Id: self_distill_zero
    """
    return _largest(loss), _largest(gradient)


def _largest(values: Tensor) -> float:
    return float(wide(values).abs().max()) if values.numel() else math.nan

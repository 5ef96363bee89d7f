"""Where the mass goes that negative feedback takes away, and whether anybody wants it there."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.diagnose.numbers import at, likeliest, mean, share, wide
from opd.diagnose.numbers import mass as mass_on
from opd.errors import ConfigError
from opd.formula import routing

__all__ = ["leak", "reachable", "realised_routing", "routable_share"]

Rows = Float[Tensor, "N V"]
Chosen = Bool[Tensor, "N V"]


@torch.no_grad()
def reachable(
    student_log_probs: Rows,
    teacher_log_probs: Rows,
    tokens: Int[Tensor, " N"],
    *,
    k: int,
    margin: float = 1e-6,
) -> Chosen:
    """The tokens that could take over the mass of the sampled one, and should.

    Formula: C+ = {v in top_k(teacher) or top_k(student), v not y : log teacher(v) - log student(v)
        > margin}
    Unit: true or false, per row and token
    Reading: several where the teacher names what to say instead. None: taking mass from the token
        has no direction here. Always none where the student is the teacher, which the margin keeps
        rounding from breaking.
    Action: where it is empty on many negative rows, expand the support or skip them
    Cost: both whole distributions, or a list of k with log-probabilities of both from either side
    Source: support reachability, section 5 of arXiv:2606.22793; our own derivation, wider than
        the candidates of CR-OPD, which are in both lists
    Id: routable_frac
    """
    if not 0.0 <= margin < math.inf:
        raise ConfigError(f"margin must be a finite number of nats >= 0, got {margin}")
    listed = likeliest(teacher_log_probs, k) | likeliest(student_log_probs, k)
    wanted = teacher_log_probs - student_log_probs > margin  # never of two entries without mass
    return (listed & wanted).scatter(-1, tokens.unsqueeze(-1), False)


def routable_share(
    advantage: Float[Tensor, " N"], reachable: Chosen, teacher_log_probs: Rows, *, mass: float
) -> float:
    """The share of negative tokens for which the teacher names something better.

    Formula: among rows with A < 0, the share with |C+| >= 1 and teacher(C+) >= mass
    Unit: a share in [0, 1] of the negative rows; NaN without any
    Reading: near 1: suppression can be given a direction. Low: it is directionless, and what is
        taken away is spread as the student likes.
    Action: expand the support, skip negative rows without a candidate, a local divergence there
    Cost: both whole distributions, or both lists; the advantages that the step has
    Source: the reachable-alternative check in Table 7 of arXiv:2606.22793; our own derivation
    Id: routable_frac
    """
    if not 0.0 <= mass <= 1.0:
        raise ConfigError(f"mass is a probability in [0, 1], got {mass}")
    routable = reachable.any(-1) & (mass_on(wide(teacher_log_probs), reachable) >= mass)
    return mean(routable[advantage < 0])


@torch.no_grad()
def leak(
    student_log_probs: Rows, reachable: Chosen, tokens: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """The share of what suppression releases that goes to tokens nobody asked for.

    Formula: 1 - student(C+) / (1 - student(y)); 1 where C+ is empty or nothing can be released
    Unit: a share in [0, 1] of the released mass on the logits, per row
    Reading: 0 where all of it goes to candidates. Near 1: negative feedback feeds tokens that the
        teacher does not support either. Of a step that was taken, see `realised_routing`.
    Action: routing of the mass, a comparison on the teacher's list, fewer negative rows
    Cost: the student's whole distribution and the candidates
    Source: negative feedback without a target, Eq. 28 and Table 6 of arXiv:2606.22793; our own
        derivation. arXiv:2605.06387 is about the fault
    """
    logp = at(student_log_probs, tokens)
    released: Tensor = routing.leak(reachable, student_log_probs, logp)
    return torch.where(reachable.any(-1) & (logp < 0), released, 1.0)


def realised_routing(
    before: Rows, after: Rows, reachable: Chosen, tokens: Int[Tensor, " N"]
) -> float:
    """How much of what a step took from the sampled tokens has reached the candidates.

    Formula: sum of (after(C+) - before(C+)) / sum of (before(y) - after(y)), over rows
    Unit: a share of the probability that the tokens lost; NaN where they lost nothing
    Reading: 1: all of it. Lower: others gained, as after plain suppression, where the student's own
        preferences decide; not `1 - leak`, which is of logits. Above 1: others lost too. Below 0:
        the candidates lost as well, or the tokens won; give the rows with A < 0.
    Action: a larger amount, another route, a smaller step
    Cost: the student's distribution on the same rows again after the step, one forward pass
    Source: update routability, section 5 of arXiv:2606.22793; our own derivation
    """
    change = wide(after).exp() - wide(before).exp()
    lost = -float(at(change, tokens).sum())
    return share(float(torch.where(reachable, change, 0.0).sum()), lost)

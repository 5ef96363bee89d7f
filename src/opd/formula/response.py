"""Weights and gates per response, detached: which responses count, and how much.

Every function walks over whole responses, most over all of the optimizer step, so all are coupled.
The result is the same for every open token of a response, and 0 where the mask is False.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import check_not_negative
from opd.fields import counted
from opd.types import PASS_MARK

__all__ = [
    "agrees_with_verdict",
    "difficulty",
    "group_all_fail",
    "group_some_pass",
    "likely_for_teacher",
    "pivotal",
    "share_of_correct",
    "share_of_wrong",
    "sure_teacher_where_wrong",
]


def difficulty(
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    pass_power: float,
    fail_power: float,
) -> Float[Tensor, "B T"]:
    """Weight by how often the student solves the prompt: most where it sometimes does.

        w = rate^a * (1 - rate)^b,  rate = share of the prompt's judged samples that pass

    At a = b = 1 largest, 1/4, at a rate of 1/2; prompts that are always or never solved get 0. A
    power of 0 leaves its factor out. 0 where no sample of the prompt was judged.

    Args:
        verdict: the verifier's score in [0, 1]; NaN where the response was not judged.
        group: index of the prompt; samples of one prompt share it.
        mask: where the result is not 0.
        pass_power, fail_power: a and b, >= 0.

    Source: PACED, arXiv:2603.11178.
    """
    check_not_negative("pass_power", pass_power)
    check_not_negative("fail_power", fail_power)
    passed, judged = _passes(verdict, group)
    share = passed / judged.clamp(min=1)
    weight = share**pass_power * (1 - share) ** fail_power
    return _spread(torch.where(judged > 0, weight, 0.0), mask, verdict)


def group_all_fail(
    verdict: Float[Tensor, " B"], group: Int[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """A gate open on prompts of which every judged sample fails.

        w = 1 where max over the prompt's samples of verdict < 0.5, 0 elsewhere

    There a group-normalised verdict says nothing. Closed where no sample was judged.

    Args:
        verdict, group, mask: as in `difficulty`.

    Source: HDPO, arXiv:2603.23871, which calls such prompts cliffs; RSTG, arXiv:2608.00782.
    """
    passed, judged = _passes(verdict, group)
    return _spread((judged > 0) & (passed == 0), mask, verdict)


def group_some_pass(
    verdict: Float[Tensor, " B"], group: Int[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """A gate open on prompts of which some sample passes; the complement of `group_all_fail`.

        w = 1 where max over the prompt's samples of verdict >= 0.5, 0 elsewhere

    Closed where no sample was judged, as its complement is.

    Args:
        verdict, group, mask: as in `difficulty`.

    Source: RSTG, arXiv:2608.00782, which learns from the verifier there.
    """
    passed, _ = _passes(verdict, group)
    return _spread(passed > 0, mask, verdict)


def agrees_with_verdict(
    teacher_logp: Float[Tensor, "B T"],
    student_logp: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """A gate open on responses that teacher and verifier judge the same way.

        w = 1 where z * sum_t r_t >= 0, 0 elsewhere;  z = 1 for a verdict >= 0.5, -1 below

    with the log ratio r of the open tokens. Closed where there is no verdict.

    Args:
        teacher_logp, student_logp: of the chosen token; anything where the mask is False.
        verdict: the verifier's score in [0, 1]; NaN where the response was not judged.

    Source: RA-OPD, arXiv:2608.27960, which drops the other responses whole.
    """
    drift = torch.where(mask, (teacher_logp - student_logp).detach(), 0.0).sum(1)
    agree = torch.where(verdict >= PASS_MARK, drift >= 0, drift <= 0)
    return _spread(agree & ~verdict.isnan(), mask, verdict)


def likely_for_teacher(
    teacher_logp: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, drop_share: float
) -> Float[Tensor, "B T"]:
    """A gate closed on the responses of the step that the teacher finds least likely per token.

        w = 1 where m >= quantile(m, drop_share), 0 elsewhere
        m = mean over the response's open tokens of log teacher(token)

    The quantile is over the responses with an open token, interpolated linearly; one response at
    least stays.

    Args:
        teacher_logp: log-probability by the view.
        drop_share: in (0, 1).

    Source: FiRe-OPD, arXiv:2606.02684, with 0.2.
    """
    if not 0.0 < drop_share < 1.0:
        raise ValueError(f"drop_share must lie strictly between 0 and 1, got {drop_share}")
    there = mask.any(1)
    means = torch.where(there, _mean_logp(teacher_logp.double(), mask), math.inf)
    ordered, last = means.sort().values, (there.sum() - 1).clamp(min=0)
    place = drop_share * last
    below = place.floor().long()
    neighbours = torch.stack([below, torch.minimum(below + 1, last)])
    low, high = ordered.index_select(0, neighbours).unbind()
    # from the lower neighbour, so that two equal ones are the quantile, and an infinite one is
    between = low + (place - below) * (high - low)
    threshold = torch.where((low == high) | low.isneginf(), low, between)
    return _spread(there & (means >= threshold), mask, teacher_logp)


def share_of_correct(
    student_logp: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    temperature: float,
) -> Float[Tensor, "B T"]:
    """How the prompt's correct responses share one unit of weight: most to the least fluent.

        w = PPL^(1 / tau) / sum over the prompt's correct responses of PPL^(1 / tau)
        PPL = exp(-mean over the response's open tokens of log student(token)),  tau = temperature

    0 on responses that are not correct.

    Args:
        student_logp: log-probability now; anything where the mask is False.
        verdict: the verifier's score in [0, 1]; NaN where the response was not judged.
        group: index of the prompt.
        temperature: tau, > 0.

    Source: the correct branch of SCOPE, arXiv:2604.10688, section 3, with tau = 1.
    """
    likelihood = _mean_logp(student_logp, mask)
    correct = (verdict >= PASS_MARK) & mask.any(1)
    return _shared(-likelihood, correct, group, mask, temperature)


def share_of_wrong(
    teacher_logp: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    temperature: float,
) -> Float[Tensor, "B T"]:
    """How the prompt's wrong responses share one unit of weight: most where the teacher is at home.

        w = PPL^(-1 / tau) / sum over the prompt's wrong responses of PPL^(-1 / tau)
        PPL = exp(-mean over the response's open tokens of log teacher(token)),  tau = temperature

    0 on responses that are not wrong, and on all of a prompt to each of which the teacher gives no
    mass.

    Args:
        teacher_logp: log-probability by the view; anything where the mask is False.
        verdict, group, temperature: as in `share_of_correct`.

    Source: the wrong branch of SCOPE, arXiv:2604.10688, section 3, with tau = 1.
    """
    likelihood = _mean_logp(teacher_logp, mask)
    wrong = (verdict < PASS_MARK) & mask.any(1)
    return _shared(likelihood, wrong, group, mask, temperature)


def sure_teacher_where_wrong(
    teacher_entropy: Float[Tensor, "B T"],
    verdict: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    sharpness: float,
) -> Float[Tensor, "B T"]:
    """On the tokens of wrong responses, more weight where the teacher is sure; 1 on average there.

        w = exp(-b * H(teacher)) / mean over the step's tokens of wrong responses,  b = sharpness
        w = 0 on responses that are not wrong

    Args:
        teacher_entropy: in nats.
        verdict: the verifier's score in [0, 1]; NaN where the response was not judged.
        sharpness: b, > 0.

    Source: SRPO, arXiv:2604.02288, with 1.
    """
    if not sharpness > 0.0:
        raise ValueError(f"sharpness must be positive, got {sharpness}")
    wrong = mask & (verdict < PASS_MARK)[:, None]
    held = torch.where(wrong, teacher_entropy.detach(), math.inf)
    raw = torch.where(wrong, (-sharpness * (held - held.amin())).exp(), 0.0)
    total = raw.sum()
    return torch.where(wrong & (total > 0), raw / total * wrong.sum(), 0.0)


def _is_cut(
    teacher_logp: Float[Tensor, "B T"],
    student_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    at_least: float,
    ratio_cap: float,
    temperature: float,
    weight_cap: float,
) -> Bool[Tensor, "B T"]:
    return mask & ((student_logp - teacher_logp).detach() > ratio_cap)


@counted(_is_cut)
def pivotal(
    teacher_logp: Float[Tensor, "B T"],
    student_logp: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    at_least: float,
    ratio_cap: float,
    temperature: float,
    weight_cap: float,
) -> Float[Tensor, "B T"]:
    """More weight for responses whose tokens the student overrates most.

        r_t = min(log student(token) - log teacher(token), ratio_cap)
        u = exp(mean of r over the response's tokens with r >= at_least, / temperature), or 1
        w = min(u / mean u, weight_cap)

    The mean of u is over the responses of the step with an open token. The share of tokens above
    `ratio_cap` is logged.

    Args:
        teacher_logp, student_logp: of the chosen token; anything where the mask is False.
        at_least: what makes a token pivotal, in nats.
        ratio_cap: largest log ratio that counts, in nats, above `at_least`.
        temperature: > 0.
        weight_cap: largest weight, >= 1.

    Source: ReNIO, arXiv:2606.23104, with 0.8, 2.5, 1 and 10 for a teacher that is the student with
    privileged context, 1.0 and 2.0 in place of the first two for another teacher.
    """
    if not (ratio_cap > at_least and temperature > 0.0 and weight_cap >= 1.0):
        raise ValueError(
            "pivotal needs ratio_cap > at_least, temperature > 0 and weight_cap >= 1, got "
            f"{ratio_cap}, {at_least}, {temperature} and {weight_cap}"
        )
    ratio = (student_logp - teacher_logp).detach().clamp(max=ratio_cap)
    counted_in = mask & (ratio >= at_least)
    number = counted_in.sum(1)
    mean = torch.where(counted_in, ratio, 0.0).sum(1) / number.clamp(min=1)
    raw = torch.where(number > 0, mean / temperature, 0.0).exp()
    there = mask.any(1)
    usual = torch.where(there, raw, 0.0).sum() / there.sum().clamp(min=1)
    return _spread(torch.where(there, raw / usual, 0.0).clamp(max=weight_cap), mask, student_logp)


# --------------------------------------------------------------------------------------------


def _mean_logp(logp: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Mean over a response's open tokens; 0 where it has none."""
    return torch.where(mask, logp.detach(), 0.0).sum(1) / mask.sum(1).clamp(min=1)


def _shared(
    scores: Float[Tensor, " B"],
    chosen: Bool[Tensor, " B"],
    group: Int[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    temperature: float,
) -> Float[Tensor, "B T"]:
    """The softmax of the scores among the chosen responses of each prompt."""
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    peers = (group[:, None] == group) & chosen
    among = torch.where(peers, scores / temperature, -math.inf)
    known = among.amax(1) > -math.inf
    total = torch.where(known, among.logsumexp(1), 0.0)
    # a perplexity may be infinite: then those that are share the unit among themselves
    highest = among.amax(1)
    endless = peers & (among == math.inf)
    weight = torch.where(
        highest == math.inf,
        (scores == math.inf) / endless.sum(1).clamp(min=1),
        (scores / temperature - total).exp(),
    )
    return _spread(torch.where(chosen & known, weight, 0.0), mask, scores)


def _passes(
    verdict: Float[Tensor, " B"], group: Int[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """How many samples of the response's prompt pass, and how many were judged."""
    same = group[:, None] == group
    passed = (same & (verdict >= PASS_MARK)).sum(1)
    judged = (same & ~verdict.isnan()).sum(1)
    return passed.to(verdict.dtype), judged.to(verdict.dtype)


def _spread(weight: Tensor, mask: Bool[Tensor, "B T"], like: Tensor) -> Float[Tensor, "B T"]:
    """A number per response on each of its open tokens."""
    return torch.where(mask, weight.to(like.dtype)[:, None], 0.0)

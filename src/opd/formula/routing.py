"""Vocabulary routing: where the mass of a suppressed token goes.

Plain suppression gives what it takes from the sampled token to every other token in proportion to
the student's own probabilities; the teacher does not say where. Routing makes this a choice, one
function per decision, each of one row:

    score        how much each entry of the support deserves mass
    candidates   which entries may receive it; never the sampled token, never an absent entry
    share        how it is split among them: sums to 1, or is all zero without candidates
    amount       how much of it moves
    transfer     the loss that moves it
    gates        whether it moves at all

Everything but the transfer is detached, and a transfer is differentiated through
`student_log_probs` alone. Its gradient on the logits sums to zero: what the token loses, the
candidates gain. Each choice that makes it differ in expectation from the reverse KL's gradient
can be made alone: which entries are candidates; on which support the score is normalised; the
student's factor in the share; and a transfer that saturates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.fields import counted
from opd.formula.numerics import expectation
from opd.formula.support import ABSENT

__all__ = [
    "all_others",
    "best",
    "bounded_cross_entropy",
    "by_powers",
    "by_score",
    "candidate_mass",
    "centred_log_ratio",
    "endorsed_and_reachable",
    "endorsed_or_likely",
    "evidence",
    "excess_score",
    "has_candidates",
    "leak",
    "linear_transfer",
    "matched_suppression",
    "overrated",
    "pairwise_logistic",
    "raised",
    "teacher_top",
]

PLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "score": ("centred_log_ratio",),
        "candidates": (
            "all_others",
            "best",
            "endorsed_and_reachable",
            "endorsed_or_likely",
            "raised",
            "teacher_top",
        ),
        "share": ("by_powers", "by_score"),
        "amount": ("excess_score", "matched_suppression"),
        "transfer": ("bounded_cross_entropy", "linear_transfer", "pairwise_logistic"),
        "gates": ("candidate_mass", "has_candidates", "overrated"),
        "weights": ("evidence",),
    }
)
"""Which slot of a route each function is for; `leak` measures, and has none."""

MARGIN = 1e-6
"""Nats by which a score must differ from zero, so that rounding alone opens no route where teacher
and student agree. Enough where both are computed alike; float32 from two engines may differ by
1e-5."""


# --------------------------------------------------------------------------------------------
# Scores


def _one_sided(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Rows with an entry that the student has and the teacher lacks."""
    return ((student_log_probs > -math.inf) & (teacher_log_probs == -math.inf)).any(-1)


@counted(_one_sided)
def centred_log_ratio(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n K"]:
    """How much more the teacher likes an entry than the student does, centred, in nats.

        eta(v) = log teacher(v) - log student(v) + KL(student || teacher)

    Its mean under the student is zero, so some entries are above and some below it unless the two
    agree, where it is zero. It is the advantage of the reverse KL at this prefix, whose gradient
    on the logits is `-student * eta`. Unchanged by adding a constant to either side's logits.

    An entry that one of the two lacks is not compared: its score is -inf, and the mean is taken
    over the entries that both have. Where it is the teacher that lacks it, the true score is -inf
    too, but that of all the others would be +inf. Detached.

    Args:
        student_log_probs: normalised on the support; conditional on it in CR-OPD.
        teacher_log_probs: normalised over the same entries.

    Returns:
        One score per entry.

    Source: the local routing score of CR-OPD, Eq. 31-36 of arXiv:2606.22793.
    """
    student, teacher = student_log_probs.detach(), teacher_log_probs.detach()
    shared = (student > -math.inf) & (teacher > -math.inf)
    log_ratio = torch.where(shared, teacher - student, 0.0)
    weights = torch.where(shared, student.exp(), 0.0)
    mass = weights.sum(-1, keepdim=True)
    mean = (weights * log_ratio).sum(-1, keepdim=True) / torch.where(mass > 0, mass, 1.0)
    return torch.where(shared, log_ratio - mean, -math.inf)


# --------------------------------------------------------------------------------------------
# Candidates


def endorsed_and_reachable(
    routing_score: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    teacher_top_ids: Int[Tensor, "*n J"],
    student_top_ids: Int[Tensor, "*n L"],
    *,
    teacher_k: int,
    student_k: int,
    margin: float = MARGIN,
) -> Bool[Tensor, "*n K"]:
    """Entries that the teacher endorses, the student can reach, and the score raises.

        C = {v in top_k(teacher) and top_k(student) : eta(v) > margin}

    The intersection stands in for what the student can learn, and may leave out what is new to
    it. Often empty; `endorsed_or_likely` declares a fall-back, `has_candidates` a gate.

    Args:
        routing_score: eta.
        support_ids: -1 where an entry is absent; such entries are never candidates.
        tokens: the sampled token; never a candidate.
        teacher_top_ids: likeliest first, at least `teacher_k` of them.
        student_top_ids: likeliest first, at least `student_k` of them.
        margin: in nats, >= 0.

    Source: the candidates of CR-OPD, Eq. 31-36 of arXiv:2606.22793.
    """
    reachable = _among_likeliest(support_ids, student_top_ids, student_k, "student_k")
    endorsed = teacher_top(support_ids, tokens, teacher_top_ids, teacher_k=teacher_k)
    return endorsed & reachable & _above(routing_score, margin)


def endorsed_or_likely(
    routing_score: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    teacher_top_ids: Int[Tensor, "*n J"],
    student_top_ids: Int[Tensor, "*n L"],
    student_support_logp: Float[Tensor, "*n K"],
    *,
    teacher_k: int,
    student_k: int,
    min_probability: float,
    margin: float = MARGIN,
) -> Bool[Tensor, "*n K"]:
    """`endorsed_and_reachable`, with a fall-back for rows where that is empty.

        C = {v in top_k(teacher) and top_k(student) : eta(v) > margin}, and if there is none
        C = {v in top_k(teacher) : student(v) > min_probability, eta(v) > margin}

    Still empty where the student gives none of the teacher's tokens that much.

    Args:
        routing_score, support_ids, tokens, teacher_top_ids, student_top_ids, margin: as in
            `endorsed_and_reachable`.
        student_support_logp: the student as it is, not conditional on the support.
        min_probability: in [0, 1).

    Source: the fall-back of CR-OPD, Eq. 31-36 of arXiv:2606.22793.
    """
    if not 0.0 <= min_probability < 1.0:
        raise ValueError(
            f"min_probability must lie in [0, 1), got {min_probability}; 0 lets every token in"
        )
    strict = endorsed_and_reachable(
        routing_score,
        support_ids,
        tokens,
        teacher_top_ids,
        student_top_ids,
        teacher_k=teacher_k,
        student_k=student_k,
        margin=margin,
    )
    endorsed = teacher_top(support_ids, tokens, teacher_top_ids, teacher_k=teacher_k)
    likely = student_support_logp.detach().exp() > min_probability
    relaxed = endorsed & likely & _above(routing_score, margin)
    return torch.where(strict.any(-1, keepdim=True), strict, relaxed)


def raised(
    routing_score: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    *,
    margin: float = MARGIN,
) -> Bool[Tensor, "*n K"]:
    """Every other entry that the score raises.

        C = {v : eta(v) > margin}

    On the full vocabulary, with the share `student * [eta]_+` and the amount `[-eta(token)]_+`,
    the expected transfer is the reverse KL's exact gradient, up to the margin.

    Args:
        routing_score, support_ids, tokens, margin: as in `endorsed_and_reachable`.

    Source: the candidates of CR-OPD, Eq. 31-36 of arXiv:2606.22793, without their intersection.
    """
    return all_others(support_ids, tokens) & _above(routing_score, margin)


def all_others(support_ids: Int[Tensor, "*n K"], tokens: Int[Tensor, "*n"]) -> Bool[Tensor, "*n K"]:
    """Every entry of the support but the sampled token.

        C = {v : v != token}

    On the full vocabulary, shared in proportion to the student, it is plain suppression.

    Args:
        support_ids: -1 where an entry is absent; such entries are never candidates.
        tokens: the sampled token.

    Source: Eq. 28 of arXiv:2606.22793, where plain suppression sends its mass.
    """
    return (support_ids != ABSENT) & ~_is_token(support_ids, tokens)


def teacher_top(
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    teacher_top_ids: Int[Tensor, "*n J"],
    *,
    teacher_k: int,
) -> Bool[Tensor, "*n K"]:
    """The teacher's likeliest tokens, whatever the student thinks of them.

        C = top_k(teacher) without the token

    Includes tokens that the student already rates above the teacher.

    Args:
        support_ids, tokens, teacher_top_ids: as in `endorsed_and_reachable`.
        teacher_k: how many.

    Source: AOPD, arXiv:2605.06387, whose local divergence has this target.
    """
    endorsed = _among_likeliest(support_ids, teacher_top_ids, teacher_k, "teacher_k")
    return all_others(support_ids, tokens) & endorsed


def best(
    routing_score: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    *,
    margin: float = MARGIN,
) -> Bool[Tensor, "*n K"]:
    """The one entry that the score raises most.

        C = {argmax_v eta(v)} if eta there > margin, else empty

    A greedy correction. Among equals, the first entry of the support.

    Args:
        routing_score, support_ids, tokens, margin: as in `endorsed_and_reachable`.

    Source: the candidates of CR-OPD, Eq. 31-36 of arXiv:2606.22793, reduced to their best.
    """
    eligible = raised(routing_score, support_ids, tokens, margin=margin)
    highest = torch.where(eligible, routing_score, -math.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(eligible).scatter(-1, highest, True) & eligible


# --------------------------------------------------------------------------------------------
# Shares


def by_powers(
    routing_score: Float[Tensor, "*n K"],
    candidates: Bool[Tensor, "*n K"],
    student_support_logp: Float[Tensor, "*n K"],
    teacher_support_logp: Float[Tensor, "*n K"],
    *,
    teacher_power: float,
    student_power: float,
    score_power: float,
) -> Float[Tensor, "*n K"]:
    """How the mass is split, by powers of the teacher, of the student and of the score.

        r(v) = teacher(v)^a * student(v)^b * [eta(v)]_+^c / sum over the candidates

    (0, 0, 0) is uniform; (0, 1, 0) over all others is plain suppression; (1, 0, 0) over the
    teacher's top tokens sends it where the teacher points; (0, 1, 1) is the member that is
    consistent with the reverse KL; (0, 0, 1) is `by_score`.

    A candidate that the student lacks altogether cannot receive and gets nothing. Detached.

    Args:
        routing_score: eta; with c > 0 candidates at or below zero get nothing.
        candidates: who may receive.
        student_support_logp: -inf where the student has none.
        teacher_support_logp: -inf where the teacher has none.
        teacher_power: a, >= 0.
        student_power: b, >= 0.
        score_power: c, >= 0.

    Returns:
        Sums to 1, or is all zero where nobody may receive.

    Source: the family around Eq. 36 of arXiv:2606.22793, whose share is `by_score`.
    """
    powers = {"teacher_power": teacher_power, "student_power": student_power}
    for knob, power in {**powers, "score_power": score_power}.items():
        if not 0.0 <= power < math.inf:
            raise ValueError(f"{knob} must be a finite number >= 0, got {power}")
    reachable = candidates & (student_support_logp > -math.inf)
    log_weight = (
        _powered(teacher_support_logp, teacher_power)
        + _powered(student_support_logp, student_power)
        + _powered(routing_score.clamp(min=0.0).log(), score_power)
    )
    return _normalised(log_weight, reachable)


def by_score(
    routing_score: Float[Tensor, "*n K"],
    candidates: Bool[Tensor, "*n K"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*n K"]:
    """How the mass is split, by the positive part of the score alone.

        r(v) = [eta(v)]_+^(1 / temperature) / sum over the candidates

    Uniform as the temperature rises, the best candidate alone as it falls. It says how peaked the
    split is, never how much moves: small scores are a matter for `evidence` or `candidate_mass`.

    Args:
        routing_score: eta; candidates at or below zero get nothing.
        candidates: who may receive.
        temperature: > 0.

    Returns:
        Sums to 1, or is all zero where nobody may receive. Detached.

    Source: Eq. 36 of arXiv:2606.22793, at temperature 1.
    """
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be a finite number > 0, got {temperature}; for one candidate take "
            "best, for an even split by_powers with all powers 0"
        )
    return _normalised(routing_score.clamp(min=0.0).log() / temperature, candidates)


# --------------------------------------------------------------------------------------------
# Amounts


def excess_score(
    routing_score: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """How far the sampled token is overrated, in nats.

        m = [-eta(token)]_+

    The amount as written. It does not fall as the token becomes certain, so it pushes confident
    tokens harder than the suppression it stands beside; `matched_suppression` does not. Infinite
    where the teacher gives the token no mass; 0 where it is not in the support. Detached.

    Args:
        routing_score: eta.
        support_ids: where to find the token.
        tokens: the sampled token.

    Source: Eq. 36 of arXiv:2606.22793.
    """
    return (-_at_token(routing_score, support_ids, tokens)).clamp(min=0.0).detach()


def matched_suppression(
    advantage: Float[Tensor, "*n"], student_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """What plain suppression takes from the token's logit, in the unit of the advantage.

        m = |A| * (1 - student(token)) if A < 0, else 0

    With it a transfer differs from the suppression it replaces in its direction alone. Detached.

    Args:
        advantage: of the term that is re-routed; nothing is suppressed where it is positive.
        student_logp: of the sampled token.

    Source: the logit gradient in Eq. 28 of arXiv:2606.22793.
    """
    others = -torch.expm1(student_logp.detach())
    return advantage.detach().neg().clamp(min=0.0) * others.clamp(min=0.0)


# --------------------------------------------------------------------------------------------
# Transfers


def linear_transfer(
    student_log_probs: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    routing: Float[Tensor, "*n K"],
    amount: Float[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """Moves mass from the token to the candidates at a constant rate.

        L = m * sum_v r(v) * (log student(token) - log student(v))

    The logit gradient is m at the token and -m * r(v) at a candidate, whatever the student: the
    loss has no minimum, of any sign, so take few steps per rollout or clip. Others keep their
    odds among themselves.

    With r = student / (1 - student(token)) over all others and m = |A| (1 - student(token)) it is
    plain suppression, exactly. On the full support with r in proportion to student * [eta]_+ and
    m = [-eta(token)]_+ it is unbiased, over tokens drawn from the student, for the local reverse
    KL: the student's mean of eta is zero, so all sources together equal all sinks.

    Args:
        student_log_probs: on the support, under any tail rule; carries the gradient.
        support_ids: where to find the token.
        tokens: the sampled token.
        routing: r, detached.
        amount: m, detached.

    Returns:
        One loss per position; 0 without candidates or where the token is not in the support.

    Source: derived from Eq. 28 of arXiv:2606.22793, plain suppression as a transfer.
    """
    gap, moves = _log_odds(student_log_probs, support_ids, tokens, routing, amount)
    return torch.where(moves, amount.detach(), 0.0) * (routing.detach() * gap).sum(-1)


def pairwise_logistic(
    student_log_probs: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    routing: Float[Tensor, "*n K"],
    amount: Float[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """Ranks the candidates above the token; stops by itself once they are.

        L = m * sum_v r(v) * log(1 + student(token) / student(v))

    With s(v) = student(token) / (student(token) + student(v)) the logit gradient is
    m * sum_v r(v) s(v) at the token and -m * r(v) s(v) at a candidate: at most that of
    `linear_transfer`, and vanishing where the candidate is far above the token. Biased for the
    reverse KL, by this saturation among other things.

    Args:
        student_log_probs, support_ids, tokens, routing, amount: as in `linear_transfer`.

    Returns:
        One loss per position, >= 0; 0 without candidates or where the token is not in the support.

    Source: Eq. 36 of arXiv:2606.22793.
    """
    gap, moves = _log_odds(student_log_probs, support_ids, tokens, routing, amount)
    ranked = torch.nn.functional.softplus(gap)
    return torch.where(moves, amount.detach(), 0.0) * (routing.detach() * ranked).sum(-1)


def _is_cut(
    student_log_probs: Tensor, support_ids: Tensor, tokens: Tensor, routing: Tensor, amount: Tensor
) -> Tensor:
    """Rows whose amount is more than the token has."""
    _, moves = _log_odds(student_log_probs, support_ids, tokens, routing, amount)
    return moves & (amount > _at_token(student_log_probs, support_ids, tokens).exp())


@counted(_is_cut)
def bounded_cross_entropy(
    student_log_probs: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    routing: Float[Tensor, "*n K"],
    amount: Float[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """Moves at most the mass that the token has, by matching a target distribution.

        target = student - m * [v = token] + m * r(v),   m cut to student(token)
        L = sum_v target(v) * (log target(v) - log student(v))

    The cross-entropy to a detached target, less the target's entropy, so that it is 0 where
    nothing moves. The logit gradient is `student - target`: that of `linear_transfer` while the
    amount is not cut. The minimiser is the target, which leaves every entry but the token and the
    candidates exactly as it is. The target is made anew at each update.

    Args:
        student_log_probs: normalised on the support, so the tail is a bucket or renormalised
            away; carries the gradient.
        support_ids, tokens, routing, amount: as in `linear_transfer`; here the amount is a
            probability.

    Returns:
        One loss per position, >= 0; 0 without candidates or where the token is not in the support.

    Source: derived from Eq. 28 of arXiv:2606.22793, as a target for the student.
    """
    _, moves = _log_odds(student_log_probs, support_ids, tokens, routing, amount)
    student = student_log_probs.detach().exp()
    source = _is_token(support_ids, tokens) * student
    moved = torch.minimum(amount.detach(), source.sum(-1)).unsqueeze(-1)
    target = torch.where(source > 0, source - moved, student) + moved * routing.detach()
    log_target = target.log()
    divergence = expectation(log_target, log_target - student_log_probs)
    return torch.where(moves, divergence, 0.0)


# --------------------------------------------------------------------------------------------
# Gates


def overrated(
    routing_score: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    *,
    margin: float = MARGIN,
) -> Float[Tensor, "*n"]:
    """A gate open where the student overrates the token it chose.

        w = 1 where eta(token) < -margin, 0 elsewhere

    Local, unlike the sign of an advantage that holds later rewards. Closed where the token is not
    in the support: its score is unknown there.

    Args:
        routing_score, support_ids, tokens: as in `excess_score`.
        margin: in nats, >= 0.

    Source: the condition of Eq. 36 of arXiv:2606.22793.
    """
    _check_margin(margin)
    is_open = _at_token(routing_score, support_ids, tokens) < -margin
    return is_open.to(routing_score.dtype)


def has_candidates(candidates: Bool[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """A gate open where somebody may receive the mass.

        w = 1 where C is not empty, 0 elsewhere

    Without it, a route that replaces suppression leaves such rows with no loss at all.

    Source: CR-OPD, Eq. 31-36 of arXiv:2606.22793, where an empty set leaves plain suppression.
    """
    return torch.where(candidates.any(-1), 1.0, 0.0)


def candidate_mass(
    candidates: Bool[Tensor, "*n K"],
    teacher_support_logp: Float[Tensor, "*n K"],
    *,
    at_least: float,
) -> Float[Tensor, "*n"]:
    """A gate open where the teacher puts enough mass on the candidates.

        w = 1 where sum_{v in C} teacher(v) >= at_least, 0 elsewhere

    Args:
        candidates: who may receive.
        teacher_support_logp: the teacher as it is, not conditional on the support.
        at_least: in (0, 1].

    Source: the minimum positive mass that CR-OPD asks for, Eq. 31-36 of arXiv:2606.22793.
    """
    if not 0.0 < at_least <= 1.0:
        raise ValueError(
            f"at_least is a mass in (0, 1], got {at_least}; to ask for no mass, drop the gate"
        )
    mass = _mass(candidates, teacher_support_logp)
    return (mass >= at_least).to(mass.dtype)


def _is_full(
    routing_score: Tensor, candidates: Tensor, student_support_logp: Tensor, full_at: float
) -> Tensor:
    """Rows where there is more evidence than counts."""
    return _raised_mean(routing_score, candidates, student_support_logp) > full_at


@counted(_is_full)
def evidence(
    routing_score: Float[Tensor, "*n K"],
    candidates: Bool[Tensor, "*n K"],
    student_support_logp: Float[Tensor, "*n K"],
    *,
    full_at: float,
) -> Float[Tensor, "*n"]:
    """Damps a route that rests on little: a weight between 0 and 1.

        w = min(1, S / full_at),   S = sum_{v in C} student(v) * [eta(v)]_+

    The share of a transfer is normalised, so it cannot tell faint scores from strong ones; this
    can.

    Args:
        routing_score: eta.
        candidates: who may receive.
        student_support_logp: the student as it is, not conditional on the support.
        full_at: the evidence, in nats, from which the route counts in full; > 0.

    Source: the damping that CR-OPD asks for, Eq. 31-36 of arXiv:2606.22793.
    """
    if not 0.0 < full_at < math.inf:
        raise ValueError(f"full_at must be a finite number of nats > 0, got {full_at}")
    found = _raised_mean(routing_score, candidates, student_support_logp)
    return (found / full_at).clamp(max=1.0)


# --------------------------------------------------------------------------------------------
# Measures


def leak(
    candidates: Bool[Tensor, "*n K"],
    student_support_logp: Float[Tensor, "*n K"],
    student_logp: Float[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """Which share of the released mass plain suppression would send past the candidates.

        leak = 1 - student(C) / (1 - student(token))

    Of the logit gradient; the realised share of probability differs by the normaliser. 1 without
    candidates; 0 where the student is certain of the token, since nothing is released. Detached.

    Args:
        candidates: who may receive; without the token.
        student_support_logp: the student as it is, not conditional on the support.
        student_logp: of the sampled token.

    Source: Eq. 28 of arXiv:2606.22793; negative mass without a target.
    """
    released = -torch.expm1(student_logp.detach())
    received = _mass(candidates, student_support_logp)
    share = 1.0 - received / torch.where(released > 0, released, 1.0)
    return torch.where(released > 0, share.clamp(min=0.0), 0.0)


# --------------------------------------------------------------------------------------------


def _is_token(support_ids: Int[Tensor, "*n K"], tokens: Int[Tensor, "*n"]) -> Bool[Tensor, "*n K"]:
    return support_ids == tokens.unsqueeze(-1)


def _at_token(
    values: Float[Tensor, "*n K"], support_ids: Int[Tensor, "*n K"], tokens: Int[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The value at the sampled token; 0 where it is not in the support."""
    return torch.where(_is_token(support_ids, tokens), values, 0.0).sum(-1)


def _among_likeliest(
    ids: Int[Tensor, "*n K"], top_ids: Int[Tensor, "*n J"], k: int, knob: str
) -> Bool[Tensor, "*n K"]:
    """Whether each id is one of the row's k likeliest tokens."""
    available = top_ids.shape[-1]
    if not 1 <= k <= available:
        raise ValueError(
            f"{knob} must lie in 1 ... {available}, the number of likeliest tokens that are known, "
            f"got {k}"
        )
    # Looked up in order: a table of all pairs would not fit where the support is a vocabulary.
    ordered = top_ids[..., :k].sort(-1).values.contiguous()
    place = torch.searchsorted(ordered, ids.contiguous()).clamp(max=k - 1)
    return ordered.gather(-1, place) == ids


def _above(routing_score: Float[Tensor, "*n K"], margin: float) -> Bool[Tensor, "*n K"]:
    _check_margin(margin)
    return routing_score > margin


def _check_margin(margin: float) -> None:
    if not 0.0 <= margin < math.inf:
        raise ValueError(f"margin must be a finite number of nats >= 0, got {margin}")


def _powered(log_values: Float[Tensor, "*n K"], power: float) -> Float[Tensor, "*n K"]:
    """`power` times the logarithm, with 0 * -inf = 0."""
    return power * log_values if power else torch.zeros_like(log_values)


def _normalised(
    log_weights: Float[Tensor, "*n K"], allowed: Bool[Tensor, "*n K"]
) -> Float[Tensor, "*n K"]:
    """Weights among the allowed entries that sum to 1; all zero where none has any. Detached."""
    kept = torch.where(allowed, log_weights.detach(), -math.inf)
    nobody = (kept == -math.inf).all(-1, keepdim=True)
    return torch.where(nobody, 0.0, torch.where(nobody, 0.0, kept).softmax(-1))


def _log_odds(
    student_log_probs: Float[Tensor, "*n K"],
    support_ids: Int[Tensor, "*n K"],
    tokens: Int[Tensor, "*n"],
    routing: Float[Tensor, "*n K"],
    amount: Float[Tensor, "*n"],
) -> tuple[Float[Tensor, "*n K"], Bool[Tensor, "*n"]]:
    """Log odds of the token against each entry that receives, 0 elsewhere; where mass moves."""
    own = _at_token(student_log_probs, support_ids, tokens).unsqueeze(-1)
    has_mass = (_is_token(support_ids, tokens) & (student_log_probs > -math.inf)).any(-1)
    moves = has_mass & (amount > 0) & (routing > 0).any(-1)
    receives = moves.unsqueeze(-1) & (routing > 0)
    return torch.where(receives, own - student_log_probs, 0.0), moves


def _raised_mean(
    routing_score: Float[Tensor, "*n K"],
    candidates: Bool[Tensor, "*n K"],
    student_support_logp: Float[Tensor, "*n K"],
) -> Float[Tensor, "*n"]:
    """The student's mean of the candidates' positive scores."""
    student = student_support_logp.detach().exp()
    counts = candidates & (routing_score > 0)
    return torch.where(counts, student * routing_score.detach(), 0.0).sum(-1)


def _mass(chosen: Bool[Tensor, "*n K"], log_probs: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    return torch.where(chosen, log_probs.detach().exp(), 0.0).sum(-1)

"""Literal transcriptions: losses named by a framework or by the survey, and a few more shapes.

`s` is the student's probability, `t` the teacher's, `a_i = stop[log t(y_i) - log s(y_i)]` at the
sampled token, A_g the group advantage of the verdict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.methods.world import World

Place = tuple[int, int]


# ---------------------------------------------------------------------------------------------
# shared pieces
# ---------------------------------------------------------------------------------------------


def _token(world: World, b: int, t: int) -> int:
    """The chosen token."""
    return int(world.tokens[b, t])


def _log_s(world: World, b: int, t: int) -> Tensor:
    """log s(y), with gradient."""
    return world.log_student(b, t)[_token(world, b, t)]


def _gap(world: World, b: int, t: int) -> float:
    """a at one place, as a number."""
    return float(world.log_ratio(b, t))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of two log-probability vectors over the same entries."""
    total = log_p.new_zeros(())
    for v in range(log_p.shape[0]):
        total = total + log_p[v].exp() * (log_p[v] - log_q[v])
    return total


def _teacher_top(world: World, b: int, t: int, k: int) -> list[int]:
    """The k tokens that the teacher finds likeliest; of equal ones the lower id first."""
    logits = world.teacher[b, t]
    return sorted(range(logits.shape[0]), key=lambda v: (-float(logits[v]), v))[:k]


def _student_top(world: World, b: int, t: int, k: int) -> list[int]:
    """The k tokens that the student found likeliest at rollout time."""
    return [int(v) for v in world.student_top_ids[b, t, :k]]


def _conditional(log_p: Tensor, support: list[int]) -> Tensor:
    """Log-probabilities given that the token is one of `support`, in the support's order."""
    inside = torch.stack([log_p[v] for v in support])
    return inside - inside.logsumexp(0)


def _score(world: World, b: int, t: int, advantage: float) -> Tensor:
    """-A log s(y)."""
    return -advantage * _log_s(world, b, t)


def _clipped(world: World, b: int, t: int, advantage: float, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = s(y) / old(y) with gradient."""
    ratio = (_log_s(world, b, t) - world.old_logp[b, t]).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)


def _group_advantage(world: World, b: int) -> float:
    """(verdict - mean) / std over the judged responses of the prompt, divisor G - 1; else 0."""
    own = float(world.verdict[b])
    if math.isnan(own):
        return 0.0
    judged: list[float] = []
    for other in range(world.verdict.shape[0]):
        verdict = float(world.verdict[other])
        if int(world.group[other]) == int(world.group[b]) and not math.isnan(verdict):
            judged.append(verdict)
    if len(judged) < 2 or max(judged) == min(judged):
        return 0.0
    mean = sum(judged) / len(judged)
    variance = sum((verdict - mean) ** 2 for verdict in judged) / (len(judged) - 1)
    return (own - mean) / math.sqrt(variance)


# ---------------------------------------------------------------------------------------------
# defaults of frameworks
# ---------------------------------------------------------------------------------------------


def k3_opd(world: World) -> Tensor:
    """The k3 estimate at the sampled token, back-propagated: its gradient is the forward KL's.

    exp(r) - 1 - r, r = log t(y) - log s(y), gradient through log s(y).

    Source: verl's default distillation loss (`loss_mode=k3`), its clamps left out.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        r = world.log_view(b, t)[_token(world, b, t)].detach() - _log_s(world, b, t)
        losses[b, t] = r.exp() - 1.0 - r
    return world.average(losses)


def raw_forward_top_k_opd(world: World, *, k: int = 3) -> Tensor:
    """Forward KL cut off at the teacher's top k, nothing renormalised.

    sum over v in the teacher's top k of t(v) (log t(v) - log s(v)).

    Source: verl's `forward_kl_topk`, its clamps left out.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        log_s, log_t = world.log_student(b, t), world.log_view(b, t).detach()
        total = log_s.new_zeros(())
        for v in _teacher_top(world, b, t, k):
            total = total + log_t[v].exp() * (log_t[v] - log_s[v])
        losses[b, t] = total
    return world.average(losses)


def both_ways_top_k_opd(world: World, *, k: int = 3) -> Tensor:
    """Half the forward and half the reverse KL on the teacher's top k.

    1/2 KL(tbar || sbar) + 1/2 KL(sbar || tbar), both given the teacher's top k.

    Source: NeMo-RL's distillation loss, `kl_type=mixed`, weight 0.5.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        support = _teacher_top(world, b, t, k)
        bar_s = _conditional(world.log_student(b, t), support)
        bar_t = _conditional(world.log_view(b, t).detach(), support)
        losses[b, t] = 0.5 * _kl(bar_t, bar_s) + 0.5 * _kl(bar_s, bar_t)
    return world.average(losses)


# ---------------------------------------------------------------------------------------------
# shapes of the advantage, credit over time
# ---------------------------------------------------------------------------------------------


def sod(
    world: World,
    *,
    gain_cap: float = 0.5,
    outcome_scale: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """The teacher counts less in turns in which the student has drifted further than in the first.

    A turn is a maximal run of consecutive open tokens; d_k = mean |a| in turn k;
    w_1 = 1, w_k = min(d_1 / d_k, 1 + gain_cap) (d_k = 0: 1 if d_1 = 0 too, else the cap);
    A = outcome_scale A_g + w_k a; -min(r A, clip(r, 1 - low, 1 + high) A).

    Source: SOD, arXiv:2605.07725 (EasyOPD `methods/sod/core.py`; its eps of 1e-6 left out).
    """
    losses: dict[Place, Tensor] = {}
    for b in world.sequences():
        turns: list[list[int]] = []
        for t in world.open_places(b):
            if turns and turns[-1][-1] == t - 1:
                turns[-1].append(t)
            else:
                turns.append([t])
        drifts = [sum(abs(_gap(world, b, t)) for t in turn) / len(turn) for turn in turns]
        for number, turn in enumerate(turns):
            if number == 0:
                weight = 1.0
            elif drifts[number] == 0.0:
                weight = 1.0 if drifts[0] == 0.0 else 1.0 + gain_cap
            else:
                weight = min(drifts[0] / drifts[number], 1.0 + gain_cap)
            for t in turn:
                advantage = outcome_scale * _group_advantage(world, b)
                advantage += weight * _gap(world, b, t)
                losses[b, t] = _clipped(world, b, t, advantage, low, high)
    return world.average(losses)


def tanh_opd(world: World, *, scale: float = 5.0) -> Tensor:
    """The log-ratio squashed into (-scale, scale), of slope 1 at 0.

    A = scale tanh(a / scale); -A log s(y).

    Source: a baseline in the code of PowerOPD, arXiv:2606.17199: tanh(a / 5), without the factor.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        losses[b, t] = _score(world, b, t, scale * math.tanh(_gap(world, b, t) / scale))
    return world.average(losses)


def jsd_opd(world: World, *, teacher_weight: float = 0.5) -> Tensor:
    """Policy gradient of the generalised JSD with the corrected reward.

    JSD_w(s, t) = w KL(t || m) + (1 - w) KL(s || m) = E_s[g(u)], m = w t + (1 - w) s,
    u = t(y) / s(y), g(u) = w u log u - (w u + 1 - w) log(w u + 1 - w),
    g'(u) = w log u - w log(w u + 1 - w); A = -(g(u) - u g'(u)) less its value at u = 1
    (that value is 0, and A = (1 - w) log(w u + 1 - w)); -A log s(y).

    Source: OPD+, arXiv:2606.01039 (its JSD at w = 1/2: A = 1/2 log((1 + u) / 2)).
    """
    w = teacher_weight

    def reward(u: float) -> float:
        mixed = w * u + 1.0 - w
        g = w * u * math.log(u) - mixed * math.log(mixed)
        slope = w * math.log(u) - w * math.log(mixed)
        return -(g - u * slope)

    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        u = math.exp(_gap(world, b, t))
        losses[b, t] = _score(world, b, t, reward(u) - reward(1.0))
    return world.average(losses)


def rao_blackwell_opd(world: World) -> Tensor:
    """Return-to-go whose later rewards are replaced by their expectations.

    A_i = a_i - sum_{j > i} KL(s || t)_j over the later open tokens, over the whole vocabulary,
    detached; -A_i log s(y_i).

    Source: survey, arXiv:2606.22793, Eqs. 7 and 15: given its prefix, E[a_j] = -KL(s || t)_j.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        advantage = _gap(world, b, t)
        for later in world.open_places(b):
            if later > t:
                divergence = _kl(world.log_student(b, later).detach(), world.log_view(b, later))
                advantage -= float(divergence)
        losses[b, t] = _score(world, b, t, advantage)
    return world.average(losses)


# ---------------------------------------------------------------------------------------------
# controls, routing
# ---------------------------------------------------------------------------------------------


def teacher_is_student(world: World) -> Tensor:
    """A control: the teacher is the student, so there is nothing to learn.

    KL(s || stop[s]) = sum_v s(v) (log s(v) - stop[log s(v)]): value and gradient are 0.

    Source: an identity, sum_v s(v) grad log s(v) = 0.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        log_s = world.log_student(b, t)
        losses[b, t] = _kl(log_s, log_s.detach())
    return world.average(losses)


def cr_opd(
    world: World,
    *,
    teacher_k: int = 3,
    student_k: int = 3,
    margin: float = 1e-6,
    student_power: float = 0.0,
    teacher_power: float = 0.0,
    logistic: bool = True,
) -> Tensor:
    """What a bad token loses goes to tokens that teacher and student both find likely.

    R = (teacher's top k) u (student's top k) u {y}; sR, tR given R, detached;
    d(v) = log tR(v) - log sR(v), eta(v) = d(v) - sum_{u in R} sR(u) d(u);
    C = {v in both top k, v != y, eta(v) > margin}.
    Where a <= 0, eta(y) < -margin and C is not empty:
        m sum_{v in C} alpha(v) log(1 + exp(log s(y) - log s(v))),
        m = -eta(y), alpha(v) prop. to eta(v) over C.
    Everywhere else: -a log s(y).
    Beside (36): alpha prop. to t^teacher_power s^student_power eta, and, unless `logistic`, the
    linear transfer log s(y) - log s(v), whose logit gradient is m (e_y - alpha).

    Source: survey's proposal, arXiv:2606.22793, Eqs. 31 to 36; that the route replaces the push
    down, the margin and the gate on a are this library's (the paper leaves them open).
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        y, a = _token(world, b, t), _gap(world, b, t)
        log_s = world.log_student(b, t)
        teacher_top = _teacher_top(world, b, t, teacher_k)
        student_top = _student_top(world, b, t, student_k)

        support = sorted({*teacher_top, *student_top, y})
        restricted_s = _conditional(log_s.detach(), support)
        restricted_t = _conditional(world.log_view(b, t).detach(), support)
        p = {v: float(restricted_s[i].exp()) for i, v in enumerate(support)}
        q = {v: float(restricted_t[i].exp()) for i, v in enumerate(support)}
        d = {v: float(restricted_t[i] - restricted_s[i]) for i, v in enumerate(support)}
        baseline = sum(p[v] * d[v] for v in support)
        eta = {v: d[v] - baseline for v in support}

        candidates = [
            v
            for v in support
            if v in teacher_top and v in student_top and v != y and eta[v] > margin
        ]
        if a > 0.0 or eta[y] >= -margin or not candidates:
            losses[b, t] = _score(world, b, t, a)
            continue
        parts = {v: q[v] ** teacher_power * p[v] ** student_power * eta[v] for v in candidates}
        route = log_s.new_zeros(())
        for v in candidates:
            step = log_s[y] - log_s[v]
            if logistic:
                step = torch.nn.functional.softplus(step)
            route = route + parts[v] / sum(parts.values()) * step
        losses[b, t] = -eta[y] * route
    return world.average(losses)

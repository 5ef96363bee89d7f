"""Literal transcriptions: foundations, estimators, reward shapes, credit over time.

One function per published method, written from its source, token by token. `s` is the student's
probability, `t` the teacher's, `a_i = stop[log t(y_i) - log s(y_i)]` at the sampled token.

`NAME_published` is the rule of the source that was read, where a `NAME` of another rule exists or
existed; any other suffix is explained in its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tests.reference.methods.world import ANYBODY, DATA, STUDENT, TEACHER, World


def _token(world: World, b: int, t: int) -> int:
    """The chosen token."""
    return int(world.tokens[b, t])


def _log_s(world: World, b: int, t: int) -> Tensor:
    """log s(y) with gradient."""
    return world.log_student(b, t)[_token(world, b, t)]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of two log-probability vectors over the same support."""
    total = log_p.sum() * 0.0
    for v in range(log_p.shape[0]):
        total = total + log_p[v].exp() * (log_p[v] - log_q[v])
    return total


def _mixture(weight: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(weight * p + (1 - weight) * q), entry by entry."""
    return (weight * log_p.exp() + (1.0 - weight) * log_q.exp()).log()


def _teacher_top(world: World, b: int, t: int, k: int) -> list[int]:
    """The k tokens that the teacher finds likeliest."""
    logits = world.teacher[b, t]
    return sorted(range(logits.shape[0]), key=lambda v: (-float(logits[v]), v))[:k]


def _student_top(world: World, b: int, t: int, k: int) -> list[int]:
    """The k tokens that the student found likeliest at rollout time."""
    return [int(v) for v in world.student_top_ids[b, t, :k]]


def _conditional(log_p: Tensor, support: Iterable[int]) -> Tensor:
    """log p(v | v in support), in the order of the support."""
    inside = torch.stack([log_p[v] for v in support])
    return inside - inside.logsumexp(0)


def _score(world: World, b: int, t: int, advantage: Tensor) -> Tensor:
    """-A log s(y)."""
    return -advantage.detach() * _log_s(world, b, t)


def _clipped(world: World, b: int, t: int, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = s(y) / old(y)."""
    fixed = advantage.detach()
    ratio = (_log_s(world, b, t) - world.old_logp[b, t]).exp()
    return -torch.minimum(ratio * fixed, ratio.clamp(1.0 - low, 1.0 + high) * fixed)


def _group_advantage(world: World, b: int) -> float:
    """(verdict - mean) / std over the judged responses of the prompt, divisor G - 1."""
    own = float(world.verdict[b])
    if math.isnan(own):
        return 0.0
    judged = [
        float(world.verdict[other])
        for other in range(world.verdict.shape[0])
        if int(world.group[other]) == int(world.group[b])
        and not math.isnan(float(world.verdict[other]))
    ]
    if len(judged) < 2 or all(verdict == judged[0] for verdict in judged):
        return 0.0
    mean = sum(judged) / len(judged)
    variance = sum((verdict - mean) ** 2 for verdict in judged) / (len(judged) - 1)
    return (own - mean) / math.sqrt(variance)


def _step_places(world: World, kinds: tuple[int, ...] = ANYBODY) -> list[tuple[int, int]]:
    """The open tokens of the responses that hold a token of these kinds, whoever chose them."""
    return [(b, t) for b in world.sequences(kinds) for t in world.open_places(b)]


def _later(world: World, b: int, t: int) -> list[int]:
    """The open places of the response from t on, t included."""
    return [place for place in world.open_places(b) if place >= t]


def _constant(world: World, value: float) -> Tensor:
    """A number in the dtype of the logits."""
    return torch.tensor(value, dtype=world.student.dtype)


# Foundations


def minillm(world: World, *, cap: float = 1.0, pretraining_coef: float = 1.0) -> Tensor:
    """Reverse KL of whole sequences: exact at this token, length-normalised return after it.

    L = E_student_rows[ w_i KL(s || t) - w_i F_i log s(y_i) ] + pretraining_coef E_data[-log s(y)],
    F_i = mean of a_j over the later open tokens, w_i = stop[min(s(y_i) / sampler(y_i), cap)].

    Source: MiniLLM, arXiv:2306.08543, equations of sections 2.2 and 2.3 (the single step is exact,
    the ratio of one step stands for the product, the return divides by the tokens left).
    """
    exact: dict[tuple[int, int], Tensor] = {}
    future: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places((STUDENT,)):
        ratio = (_log_s(world, b, t) - world.sampler_logp[b, t]).exp().detach()
        weight = torch.clamp(ratio, max=cap)
        exact[b, t] = weight * _kl(world.log_student(b, t), world.log_view(b, t))
        after = [place for place in world.open_places(b) if place > t]
        value = _constant(world, 0.0)
        for place in after:
            value = value + world.log_ratio(b, place) / len(after)
        future[b, t] = weight * _score(world, b, t, value)
    data = {(b, t): -_log_s(world, b, t) for b, t in world.places((DATA,))}
    loss = world.average(exact, (STUDENT,)) + world.average(future, (STUDENT,))
    return loss + pretraining_coef * world.average(data, (DATA,))


def minillm_trl(world: World, *, gamma: float = 0.0) -> Tensor:
    """TRL's variant: the discounted mean of the log-ratios from this token on, plus the exact KL.

    L = E[KL(s || t)] + E[-G_i log s(y_i)],
    G_i = sum_{j>=i} gamma^(j-i) a_j / sum_{j>=i} gamma^(j-i).

    Source: MiniLLM in TRL (trl/experimental/minillm), arXiv:2306.08543.
    """
    exact: dict[tuple[int, int], Tensor] = {}
    scored: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places((STUDENT,)):
        exact[b, t] = _kl(world.log_student(b, t), world.log_view(b, t))
        total, weights = _constant(world, 0.0), 0.0
        for distance, place in enumerate(_later(world, b, t)):
            total = total + gamma**distance * world.log_ratio(b, place)
            weights += gamma**distance
        scored[b, t] = _score(world, b, t, total / weights)
    return world.average(exact, (STUDENT,)) + world.average(scored, (STUDENT,))


def distillm(world: World, *, skew: float = 0.1) -> Tensor:
    """Skewed forward KL: the student is mixed with a little of the teacher.

    L = E[ KL(t || skew t + (1 - skew) s) ].

    Source: DistiLLM, arXiv:2402.03898, code jongwooko/distillm.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        log_s, log_t = world.log_student(b, t), world.log_view(b, t)
        losses[b, t] = _kl(log_t, _mixture(skew, log_t, log_s))
    return world.average(losses)


def distillm_2(
    world: World, *, teacher_coef: float = 1.0, student_coef: float = 1.0, skew: float = 0.1
) -> Tensor:
    """The teacher's text is raised by the skewed forward KL, the student's lowered by the reverse.

    L = teacher_coef E_teacher_rows[ KL(t || skew t + (1 - skew) s) ]
      + student_coef E_student_rows[ KL(s || skew s + (1 - skew) t) ].

    Source: DistiLLM-2, arXiv:2503.07067.
    """
    forward: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places((TEACHER,)):
        log_s, log_t = world.log_student(b, t), world.log_view(b, t)
        forward[b, t] = _kl(log_t, _mixture(skew, log_t, log_s))
    reverse: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places((STUDENT,)):
        log_s, log_t = world.log_student(b, t), world.log_view(b, t)
        reverse[b, t] = _kl(log_s, _mixture(skew, log_s, log_t))
    loss = teacher_coef * world.average(forward, (TEACHER,))
    return loss + student_coef * world.average(reverse, (STUDENT,))


def distillm_reverse(world: World, *, skew: float = 0.1) -> Tensor:
    """DistiLLM's other direction, which DistiLLM-2 takes as the first version's loss.

    L = E[ KL(s || skew s + (1 - skew) t) ], differentiated through both places of s.

    Source: DistiLLM, arXiv:2402.03898, code jongwooko/distillm (skewed reverse KL).
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        log_s, log_t = world.log_student(b, t), world.log_view(b, t)
        losses[b, t] = _kl(log_s, _mixture(skew, log_s, log_t))
    return world.average(losses)


def speculative_kd(world: World) -> Tensor:
    """Forward KL on text that the student proposes and the teacher corrects.

    L = E[ KL(t || s) ], whoever chose the token.

    Source: Speculative Knowledge Distillation, arXiv:2410.11325.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        losses[b, t] = _kl(world.log_view(b, t), world.log_student(b, t))
    return world.average(losses)


# The sampled token and small supports


def slime_opd(
    world: World, *, teacher_coef: float = 1.0, low: float = 0.2, high: float = 0.28
) -> Tensor:
    """The log-ratio is added to the group advantage before the clipped surrogate.

    A = A_group + teacher_coef a; L = E[ -min(r A, clip(r, 1 - low, 1 + high) A) ].

    Source: slime, on-policy distillation example, THUDM/slime (no paper).
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        advantage = _group_advantage(world, b) + teacher_coef * world.log_ratio(b, t)
        losses[b, t] = _clipped(world, b, t, advantage, low, high)
    return world.average(losses)


def stop_gradient_top_k(world: World, *, k: int = 20) -> Tensor:
    """Truncated reverse KL with the inner log s stopped, so the mass of the support is not pushed.

    L = E[ sum_{v in S} s(v) (stop[log s(v)] - log t(v)) ], S = student top-k: the value is the
    truncated KL, the gradient sum_{v in S} stop[ s(v) (log s(v) - log t(v)) ] grad log s(v).

    Source: The Many Faces of On-Policy Distillation, arXiv:2605.11182 (authors' code).
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        log_s, log_t = world.log_student(b, t), world.log_view(b, t)
        loss = _constant(world, 0.0)
        for v in _student_top(world, b, t, k):
            loss = loss + log_s[v].exp() * (log_s[v].detach() - log_t[v])
        losses[b, t] = loss
    return world.average(losses)


def thunlp_opd_published(world: World, *, k: int = 16) -> Tensor:
    """As released: only the weights are conditional on the support, the log-ratio is not.

    L = E[ -sum_{v in S} stop[ sbar(v) (log t(v) - log s(v)) ] log s(v) ], sbar conditional on
    S = student top-k, everything else of the full softmax.

    Source: Rethinking On-Policy Distillation, arXiv:2604.13016, code thunlp/OPD (strategy of the
    student's candidates, weights of the student).
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        support = _student_top(world, b, t, k)
        log_s, log_t = world.log_student(b, t), world.log_view(b, t)
        bar_s = _conditional(log_s, support)
        loss = _constant(world, 0.0)
        for i, v in enumerate(support):
            advantage = (bar_s[i].exp() * (log_t[v] - log_s[v])).detach()
            loss = loss - advantage * log_s[v]
        losses[b, t] = loss
    return world.average(losses)


def res_opd(world: World, *, k: int = 4) -> Tensor:
    """Exact on the teacher's top-k and the tail as one event; the tail's inside is sampled.

    grad = sum_{i in S} s_i r_i grad log s_i + tau_s mu + 1[y not in S] (r_y grad log s_y - mu),
    r = stop[log s - log t], mu = stop[log(tau_s / tau_t)] grad log tau_s, S = teacher top-k.
    Value: KL of the bucketed distributions + 1[y not in S] (r_y log s_y - log(tau_s / tau_t)
    log tau_s) with the factors stopped.

    Source: ResOPD, arXiv:2610.04882, code InternLM/ResOPD.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        support = _teacher_top(world, b, t, k)
        log_s, log_t = world.log_student(b, t), world.log_view(b, t)
        tail = [v for v in range(log_s.shape[0]) if v not in support]
        loss = _constant(world, 0.0)
        for v in support:
            loss = loss + log_s[v].exp() * (log_s[v] - log_t[v])
        if tail:
            tau_s = torch.stack([log_s[v] for v in tail]).logsumexp(0)
            tau_t = torch.stack([log_t[v] for v in tail]).logsumexp(0)
            loss = loss + tau_s.exp() * (tau_s - tau_t)
            y = _token(world, b, t)
            if y in tail:
                inside = (log_s[y] - log_t[y]).detach() * log_s[y]
                loss = loss + inside - (tau_s - tau_t).detach() * tau_s
        losses[b, t] = loss
    return world.average(losses)


# Shapes of the reward


def power_opd(world: World, *, power: float = 5.0) -> Tensor:
    """Bounded reward: the difference of powers of the two probabilities.

    A = t(y)^power - s(y)^power; L = E[ -A log s(y) ].

    Source: PowerOPD, arXiv:2606.17199, code EIT-NLP/PowerOPD.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        s, tea = _log_s(world, b, t).exp(), world.log_view(b, t)[_token(world, b, t)].exp()
        losses[b, t] = _score(world, b, t, tea**power - s**power)
    return world.average(losses)


def opd_plus(world: World, *, alpha: float = 0.5) -> Tensor:
    """Policy gradient of an f-divergence with the corrected reward.

    u = t(y) / s(y), g(u) = (1 - u^alpha) / (alpha (1 - alpha)), A = -(g(u) - u g'(u)) + const
    with A(u=1) = 0, that is A = (u^alpha - 1) / alpha; L = E[ -A log s(y) ].

    Source: OPD+, arXiv:2606.01039.
    """

    def reward(u: Tensor) -> Tensor:
        g = (1.0 - u**alpha) / (alpha * (1.0 - alpha))
        slope = -(u ** (alpha - 1.0)) / (1.0 - alpha)
        return -(g - u * slope)

    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        u = world.log_ratio(b, t).exp()
        losses[b, t] = _score(world, b, t, reward(u) - reward(torch.ones_like(u)))
    return world.average(losses)


def reopold(
    world: World,
    *,
    floor_nats: float = math.log(0.3 / 0.7),
    share: float = 0.2,
    low: float = 0.2,
    high: float = 0.28,
) -> Tensor:
    """Floored log-ratio on the most uncertain tokens of the step, clipped surrogate.

    A = max(a, floor_nats); only the top `share` of the step's tokens by student entropy are open.

    Source: REOPOLD, arXiv:2603.11137.
    """
    places = _step_places(world)
    entropy: dict[tuple[int, int], float] = {}
    for b, t in places:
        log_s = world.log_student(b, t).detach()
        entropy[b, t] = -sum(float(log_s[v].exp() * log_s[v]) for v in range(log_s.shape[0]))
    count = max(1, math.floor(share * len(places) + 0.5))
    chosen = set(sorted(places, key=lambda place: (-entropy[place], place))[:count])
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        if (b, t) in chosen:
            advantage = torch.clamp(world.log_ratio(b, t), min=floor_nats)
            losses[b, t] = _clipped(world, b, t, advantage, low, high)
    return world.average(losses)


def trpd(world: World, *, teacher_share: float = 0.5) -> Tensor:
    """The teacher is mixed with the student as it was at rollout time.

    A = log(share t(y) + (1 - share) old(y)) - log s(y); L = E[ -A log s(y) ].

    Source: TRPD, arXiv:2607.04751.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        tea = world.log_view(b, t)[_token(world, b, t)].exp()
        mixed = teacher_share * tea + (1.0 - teacher_share) * world.old_logp[b, t].exp()
        losses[b, t] = _score(world, b, t, mixed.log() - _log_s(world, b, t))
    return world.average(losses)


def tv_opd(world: World) -> Tensor:
    """The sign of the log-ratio, scaled by the total variation at the prefix.

    A = sign(a) * 1/2 sum_v |s(v) - t(v)|; L = E[ -A log s(y) ].

    Source: TV-regulated OPD, arXiv:2609.08341.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        s, tea = world.log_student(b, t).exp(), world.log_view(b, t).exp()
        variation = 0.5 * sum(abs(float((s[v] - tea[v]).detach())) for v in range(s.shape[0]))
        losses[b, t] = _score(world, b, t, world.log_ratio(b, t).sign() * variation)
    return world.average(losses)


def tv_opd_published(world: World, *, scale: float = 1.0) -> Tensor:
    """One scale for the whole step; the caller makes it from the steps before.

    A = scale * sign(a). With D_k = mean over the step's open tokens of max(0, 1 - t(y) / s(y)),
    smoothed M_k = 0.95 M_{k-1} + 0.05 D_k and D_ref the first step's D,
    scale_k = clip((M_{k-1} / D_ref)^0.5, 0.1, 1).

    Source: TV-regulated OPD, arXiv:2609.08341 (read in two notes on the paper).
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        losses[b, t] = _score(world, b, t, scale * world.log_ratio(b, t).sign())
    return world.average(losses)


def compressed_opd(world: World) -> Tensor:
    """The log-ratio compressed in order.

    A = sign(a) log(1 + |a|); L = E[ -A log s(y) ].

    Source: Demystifying OPD: roles, pathologies, regulations, arXiv:2607.13399.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        a = world.log_ratio(b, t)
        losses[b, t] = _score(world, b, t, a.sign() * (1.0 + a.abs()).log())
    return world.average(losses)


def clipped_opd(world: World, *, low: float = -5.0, high: float = 5.0) -> Tensor:
    """The log-ratio between two bounds.

    A = min(max(a, low), high); L = E[ -A log s(y) ].

    Source: Demystifying OPD: roles, pathologies, regulations, arXiv:2607.13399.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        losses[b, t] = _score(world, b, t, world.log_ratio(b, t).clamp(low, high))
    return world.average(losses)


def sure_opd(world: World, *, boost: float = 1.0) -> Tensor:
    """Half the squared log-ratio through the student, more where the student was surprised.

    L = E[ stop[1 + boost (1 - s(y))] * 1/2 (log s(y) - log t(y))^2 ].

    Source: SuRe, arXiv:2608.25643.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        log_s, log_t = _log_s(world, b, t), world.log_view(b, t)[_token(world, b, t)]
        weight = (1.0 + boost * (1.0 - log_s.exp())).detach()
        losses[b, t] = weight * 0.5 * (log_s - log_t.detach()) ** 2
    return world.average(losses)


def gndpo_published(world: World, *, bound: float = 5.0) -> Tensor:
    """As released: the log-ratio is bounded first, then standardised over the step.

    c = min(max(a, -bound), bound); A = (c - mean) / sqrt(var + 1e-8), var with divisor n - 1.

    Source: GNDPO, arXiv:2606.09091, code OPPO-Mente-Lab/GNDPO.
    """
    bounded = {
        (b, t): min(max(float(world.log_ratio(b, t)), -bound), bound)
        for b, t in _step_places(world)
    }
    mean = sum(bounded.values()) / len(bounded)
    variance = sum((c - mean) ** 2 for c in bounded.values()) / (len(bounded) - 1)
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        advantage = (bounded[b, t] - mean) / math.sqrt(variance + 1e-8)
        losses[b, t] = _score(world, b, t, _constant(world, advantage))
    return world.average(losses)


# Credit over time


def ketchup(world: World, *, window: int = 4) -> Tensor:
    """The reward of a token is the sum of the log-ratios of the next few.

    A_i = a_i + ... + a_{i+window-1} over open tokens; L = E[ -A log s(y) ].

    Source: KETCHUP, arXiv:2504.19024.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        advantage = _constant(world, 0.0)
        for place in _later(world, b, t)[:window]:
            advantage = advantage + world.log_ratio(b, place)
        losses[b, t] = _score(world, b, t, advantage)
    return world.average(losses)


def reward_compatible_credit_published(world: World, *, gamma: float = 0.99) -> Tensor:
    """The discounted return, bounded within the response, plus the verdict's sign.

    G_i = sum_{j>=i} gamma^(j-i) a_j, A_i = G_i / (mean over the response of |G| + |G_i|) + z,
    the first term 0 where its denominator is 0; z = +1 right, -1 wrong, 0 not judged.

    Source: Reward-compatible temporal credit (gamma-OPD), arXiv:2609.16937, equations 7 and 8.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b in range(world.mask.shape[0]):
        places = world.open_places(b)
        returns: dict[int, float] = {}
        for t in places:
            returns[t] = sum(
                gamma**distance * float(world.log_ratio(b, place))
                for distance, place in enumerate(_later(world, b, t))
            )
        verdict = float(world.verdict[b])
        outcome = 0.0 if math.isnan(verdict) else (1.0 if verdict >= 0.5 else -1.0)
        for t in places:
            size = sum(abs(value) for value in returns.values()) / len(returns) + abs(returns[t])
            advantage = (returns[t] / size if size > 0.0 else 0.0) + outcome
            losses[b, t] = _score(world, b, t, _constant(world, advantage))
    return world.average(losses)


def gae_opd(world: World, *, gae_lambda: float = 0.95) -> Tensor:
    """Generalised advantage of the log-ratios with a critic; no discount.

    delta_i = a_i + V_{i+1} - V_i, V after the last open token the bootstrap value;
    A_i = sum_l lambda^l delta_{i+l}; L = E[ -A log s(y) ].

    Source: survey's proposal, arXiv:2606.22793, equations 21 to 23.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        places = _later(world, b, t)
        advantage = _constant(world, 0.0)
        for distance, place in enumerate(places):
            if distance + 1 < len(places):
                following = world.values[b, places[distance + 1]]
            else:
                following = world.bootstrap_value[b]
            delta = world.log_ratio(b, place) + following - world.values[b, place]
            advantage = advantage + gae_lambda**distance * delta
        losses[b, t] = _score(world, b, t, advantage)
    return world.average(losses)

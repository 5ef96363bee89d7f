"""Literal transcriptions of methods that change the target, the route or the reward of a token.

One function per published method, written from its source with loops over responses and tokens.
Nothing here is fast or clever: these are the yardstick the library is measured with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.reference.methods.world import ANYBODY, DATA, STUDENT, TEACHER, World

Place = tuple[int, int]


# ---------------------------------------------------------------------------------------------
# shared pieces
# ---------------------------------------------------------------------------------------------


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) of two vectors of log-probabilities."""
    total = log_p.new_zeros(())
    for v in range(log_p.shape[0]):
        total = total + log_p[v].exp() * (log_p[v] - log_q[v])
    return total


def _entropy(log_p: Tensor) -> float:
    """-sum_v p(v) log p(v), as a number."""
    return -sum(math.exp(float(x)) * float(x) for x in log_p)


def _largest(scores: Tensor, k: int) -> list[int]:
    """The ids of the k largest entries; of equal entries the lower id first."""
    ids = sorted(range(scores.shape[0]), key=lambda v: (-float(scores[v]), v))
    return ids[:k]


def _view_top(world: World, b: int, t: int, k: int, view: str = "teacher") -> list[int]:
    """The k likeliest tokens of a view at one place."""
    return _largest(world.views[view][b, t], k)


def _student_top(world: World, b: int, t: int, k: int) -> list[int]:
    """The k likeliest tokens of the student at rollout time."""
    return [int(v) for v in world.student_top_ids[b, t, :k]]


def _conditional(log_p: Tensor, support: list[int]) -> Tensor:
    """Log-probabilities given that the token is one of `support`."""
    kept = log_p[support]
    return kept - kept.logsumexp(0)


def _forward_top(
    world: World, b: int, t: int, k: int, renormalise: bool, view: str = "teacher"
) -> Tensor:
    """sum over the view's top-k of w(v) (log w(v) - log s(v)); the student is taken as it is.

    w is the view's probability, given that the token is among the k if `renormalise`.
    """
    support = _view_top(world, b, t, k, view)
    log_s = world.log_student(b, t)
    log_t = world.log_view(b, t, view).detach()
    log_w = _conditional(log_t, support) if renormalise else log_t[support]
    total = log_s.new_zeros(())
    for place, v in enumerate(support):
        total = total + log_w[place].exp() * (log_w[place] - log_s[v])
    return total


def _mix(
    parts: Mapping[str, float], world: World, b: int, t: int, normalise: bool = True
) -> Tensor:
    """sum_k w_k log part_k(v), made to sum to one if `normalise`; detached.

    A part is a view's name, or `student`.
    """
    total = torch.zeros_like(world.student[b, t]).detach()
    for name, weight in parts.items():
        log_part = world.log_student(b, t) if name == "student" else world.log_view(b, t, name)
        total = total + weight * log_part.detach()
    return total - total.logsumexp(0) if normalise else total


def _clipped(world: World, b: int, t: int, advantage: float, low: float, high: float) -> Tensor:
    """PPO's surrogate of the sampled token: -min(r A, clip(r, 1 - low, 1 + high) A)."""
    token = int(world.tokens[b, t])
    ratio = (world.log_student(b, t)[token] - world.old_logp[b, t].detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)


def _group_advantage(world: World, b: int) -> float:
    """(verdict - mean of the group) / unbiased standard deviation; 0 where it means nothing."""
    own = float(world.verdict[b])
    if math.isnan(own):
        return 0.0
    group = int(world.group[b])
    judged: list[float] = []
    for other in range(world.verdict.shape[0]):
        score = float(world.verdict[other])
        if int(world.group[other]) == group and not math.isnan(score):
            judged.append(score)
    if len(judged) < 2 or max(judged) == min(judged):
        return 0.0
    mean = sum(judged) / len(judged)
    variance = sum((score - mean) ** 2 for score in judged) / (len(judged) - 1)
    return (own - mean) / math.sqrt(variance)


def _step_places(world: World, kinds: tuple[int, ...] = ANYBODY) -> list[Place]:
    """Open tokens of the responses that hold at least one token of `kinds`, in order."""
    return [(b, t) for b in world.sequences(kinds) for t in world.open_places(b)]


def _share(n: int, share: float) -> int:
    """How many of n tokens a share of the step is: rounded half up, at least one."""
    return max(1, math.floor(share * n + 0.5))


# ---------------------------------------------------------------------------------------------
# 1-5: routes that depend on the token
# ---------------------------------------------------------------------------------------------


def tide(
    world: World,
    *,
    k: int = 16,
    excess_share: float = 0.2,
    deficit_share: float = 0.2,
    deficit_coef: float = 1.0,
    by_missing_mass: bool = False,
) -> Tensor:
    """Push down the worst excesses with a bounded reward, fill the worst deficits by imitation.

    d = sum over the teacher's top k of tbar(v) (log tbar(v) - log s(v)), tbar = t given the top k.
    Excess: of the step's open tokens the share with the most negative a, those with a < 0;
        A = 2 (exp(a / 2) - 1), loss -A log s(y).
    Deficit: of the step's open tokens the share with the largest d; loss deficit_coef * d.
    by_missing_mass: the deficit is ranked by sum over the top k of max(t(v) - s(v), 0) instead.
    Source: TIDE, arXiv:2608.09836 (authors' code).
    """
    step = _step_places(world)
    count_excess = _share(len(step), excess_share)
    worst = sorted(step, key=lambda place: (float(world.log_ratio(*place)), place))[:count_excess]
    excess: dict[Place, Tensor] = {}
    for b, t in worst:
        a = float(world.log_ratio(b, t))
        if a >= 0.0:
            continue
        advantage = 2.0 * (math.exp(a / 2.0) - 1.0)
        excess[b, t] = -advantage * world.log_student(b, t)[int(world.tokens[b, t])]

    need: dict[Place, float] = {}
    for b, t in step:
        if by_missing_mass:
            s = world.log_student(b, t).detach().exp()
            p = world.log_view(b, t).exp()
            mass = 0.0
            for v in _view_top(world, b, t, k):
                mass += max(float(p[v] - s[v]), 0.0)
            need[b, t] = mass
        else:
            need[b, t] = float(_forward_top(world, b, t, k, renormalise=True).detach())
    count_deficit = _share(len(step), deficit_share)
    neediest = sorted(step, key=lambda place: (-need[place], place))[:count_deficit]
    deficit: dict[Place, Tensor] = {}
    for b, t in neediest:
        deficit[b, t] = _forward_top(world, b, t, k, renormalise=True)
    return world.average(excess) + deficit_coef * world.average(deficit)


def aopd(world: World, *, k: int = 20, renormalise: bool = True) -> Tensor:
    """Reinforce the tokens the teacher likes better, imitate the teacher at the others.

    a > 0: -a log s(y).   a <= 0: sum over the teacher's top k of tbar(v) (log tbar(v) - log s(v)).
    Source: AOPD, arXiv:2605.06387 (Eq. 7, 9-11).
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        a = float(world.log_ratio(b, t))
        if a > 0.0:
            losses[b, t] = -a * world.log_student(b, t)[int(world.tokens[b, t])]
        else:
            losses[b, t] = _forward_top(world, b, t, k, renormalise)
    return world.average(losses)


def tropd(
    world: World,
    *,
    k: int = 16,
    at_least: float = 0.5,
    outlier_coef: float = 1.0,
    guidance_coef: float = 1.0,
    renormalise: bool = False,
    expected: bool = False,
) -> Tensor:
    """Reinforce where the teacher would accept the token, imitate it elsewhere, and its prefixes.

    P = min(t(y) / s(y), 1); the source draws M ~ Bernoulli(P), here M = 1[P >= at_least], or
    M = P if `expected`.
    Student's tokens: -M a log s(y)
        + (1 - M) outlier_coef * sum over the teacher's top k of w(v) (log w(v) - log s(v)),
        w = t, or t given the top k if `renormalise`.
    Teacher's tokens: guidance_coef * KL(t || s) over the whole vocabulary; the source takes the
        sampled form log t(y) - log s(y), of which this is the mean over the teacher's draws.
    Source: TrOPD, arXiv:2606.01249.
    """
    own: dict[Place, Tensor] = {}
    for b, t in world.places((STUDENT,)):
        log_s = world.log_student(b, t)[int(world.tokens[b, t])]
        a = float(world.log_ratio(b, t))
        trust = min(math.exp(a), 1.0)
        if not expected:
            trust = 1.0 if trust >= at_least else 0.0
        outlier = outlier_coef * _forward_top(world, b, t, k, renormalise)
        own[b, t] = trust * (-a * log_s) + (1.0 - trust) * outlier
    guided: dict[Place, Tensor] = {}
    for b, t in world.places((TEACHER,)):
        guided[b, t] = _kl(world.log_view(b, t).detach(), world.log_student(b, t))
    return world.average(own, (STUDENT,)) + guidance_coef * world.average(guided, (TEACHER,))


def blended_opd(world: World, *, k: int = 16) -> Tensor:
    """Reverse KL on the student's likeliest tokens, on text drawn from a blend.

    sum over the student's top k of sbar(v) (log sbar(v) - log tbar(v)), both given the top k.
    Source: TRB, arXiv:2605.31159.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        support = _student_top(world, b, t, k)
        log_s = _conditional(world.log_student(b, t), support)
        log_t = _conditional(world.log_view(b, t).detach(), support)
        losses[b, t] = _kl(log_s, log_t)
    return world.average(losses)


def eopd(
    world: World,
    *,
    k: int = 16,
    nats: float = 0.8,
    forward_coef: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
    renormalise: bool = False,
) -> Tensor:
    """PPO on the sampled log-ratio, plus forward KL where the teacher is undecided.

    -min(r a, clip(r, 1 - low, 1 + high) a)
        + forward_coef * 1[H(t) > nats] * sum over the teacher's top k of t(v) (log t(v) - log s(v))
    H(t) over the whole vocabulary; t not renormalised on its top k.
    Source: EOPD, arXiv:2603.07079.
    """
    sampled: dict[Place, Tensor] = {}
    forward: dict[Place, Tensor] = {}
    for b, t in world.places():
        sampled[b, t] = _clipped(world, b, t, float(world.log_ratio(b, t)), low, high)
        if _entropy(world.log_view(b, t).detach()) > nats:
            forward[b, t] = _forward_top(world, b, t, k, renormalise)
    return world.average(sampled) + forward_coef * world.average(forward)


# ---------------------------------------------------------------------------------------------
# 6-12: targets made of several views
# ---------------------------------------------------------------------------------------------


def veto(world: World, *, share: float = 0.5, reverse: bool = False) -> Tensor:
    """KL between the student and a geometric bridge from teacher to student.

    q(v) = t(v) stop[s(v)]^share / sum_u t(u) stop[s(u)]^share;
    KL(q || s), or KL(s || q) if `reverse`.
    Source: Veto, arXiv:2601.07155 (both forms are the paper's; share falls linearly to 0).
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        log_q = _mix({"teacher": 1.0, "student": share}, world, b, t)
        log_s = world.log_student(b, t)
        losses[b, t] = _kl(log_s, log_q) if reverse else _kl(log_q, log_s)
    return world.average(losses)


def deepseek_v4(world: World, *, weights: Mapping[str, float]) -> Tensor:
    """Weighted sum of the reverse KLs to several experts, on text the student wrote itself.

    L(theta) = sum_{i=1..N} w_i KL(pi_theta || pi_Ei), with
    KL(pi_theta || pi_Ei) the average over the student's own tokens y_t of
    sum over all v of pi_theta(v | x, y_<t) (log pi_theta(v | x, y_<t) - log pi_Ei(v | x, y_<t)).
    The w_i are taken as given: the source does not make them sum to one.
    Source: DeepSeek-V4, arXiv:2606.19348, eq. 29 of section 5.1.2 (exact over the whole
    vocabulary; how tokens are averaged is not stated).
    """
    loss = world.student.sum() * 0.0
    for expert, w in weights.items():
        divergence: dict[Place, Tensor] = {}
        for b, t in world.places((STUDENT,)):
            log_pi = world.log_student(b, t)
            log_expert = world.log_view(b, t, expert).detach()
            total = log_pi.new_zeros(())
            for v in range(log_pi.shape[0]):
                total = total + log_pi[v].exp() * (log_pi[v] - log_expert[v])
            divergence[b, t] = total
        loss = loss + w * world.average(divergence, (STUDENT,))
    return loss


def exopd(world: World, *, extrapolation: float = 1.25, cap: float = 5.0) -> Tensor:
    """Sampled log-ratio to a teacher extrapolated away from the model it came from.

    A = lam log t(y) + (1 - lam) log base(y) - log s(y);
    loss -stop[min(old(y) / sampler(y), cap)] A log s(y).
    Source: G-OPD / ExOPD, arXiv:2602.12125 (authors' code: the weight is the trainer's probability
    at rollout time over the engine's).
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        token = int(world.tokens[b, t])
        log_s = world.log_student(b, t)[token]
        log_t = float(world.log_view(b, t)[token])
        log_base = float(world.log_view(b, t, "teacher.base")[token])
        advantage = extrapolation * log_t + (1.0 - extrapolation) * log_base - log_s.detach()
        weight = min(math.exp(float(world.old_logp[b, t] - world.sampler_logp[b, t])), cap)
        losses[b, t] = -weight * advantage * log_s
    return world.average(losses)


def direct_opd(
    world: World, *, k: int = 16, reference_coef: float = 0.1, renormalise: bool = True
) -> Tensor:
    """Expected policy gradient on what training changed in the teacher, tied to the start.

    -sum over the student's top k of stop[w(v) (log post(v) - log pre(v))] log s(v)
        + reference_coef * KL(s || ref);  w = s given the top k if `renormalise`, else s.
    Source: Direct-OPD, arXiv:2607.05394 (authors' code).
    """
    shift: dict[Place, Tensor] = {}
    anchor: dict[Place, Tensor] = {}
    for b, t in world.places():
        log_s = world.log_student(b, t)
        post = world.log_view(b, t, "teacher")
        pre = world.log_view(b, t, "teacher.before")
        support = _student_top(world, b, t, k)
        log_w = _conditional(log_s, support) if renormalise else log_s[support]
        total = log_s.new_zeros(())
        for place, v in enumerate(support):
            weight = (log_w[place].exp() * (post[v] - pre[v])).detach()
            total = total - weight * log_s[v]
        shift[b, t] = total
        anchor[b, t] = _kl(log_s, world.log_view(b, t, "reference").detach())
    return world.average(shift) + reference_coef * world.average(anchor)


def w2s_opd(world: World, *, k: int = 32, gain: float = 1.0) -> Tensor:
    """Reverse KL to the start plus what training changed in a weaker pair of models.

    q(v) prop. to ref(v) (plus(v) / minus(v))^gain;
    sum over q's top k of sbar(v) (log sbar(v) - log qbar(v)), both given the top k.
    Source: W2S-OPD, arXiv:2607.26246.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        parts = {"reference": 1.0, "teacher": gain, "teacher.before": -gain}
        log_q = _mix(parts, world, b, t)
        support = _largest(log_q, k)
        log_s = _conditional(world.log_student(b, t), support)
        losses[b, t] = _kl(log_s, _conditional(log_q, support))
    return world.average(losses)


def compass_opd(world: World, *, penalty: float = 1.0) -> Tensor:
    """Sampled reward: teacher over a weaker relative, less the distance from the start.

    A = (log t(y) - log weak(y)) - penalty (log s(y) - log ref(y));   loss -A log s(y).
    Source: CompassOPD, arXiv:2609.10154.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        token = int(world.tokens[b, t])
        log_s = world.log_student(b, t)[token]
        log_t = float(world.log_view(b, t, "teacher")[token])
        log_weak = float(world.log_view(b, t, "teacher.before")[token])
        log_ref = float(world.log_view(b, t, "reference")[token])
        advantage = (log_t - log_weak) - penalty * (log_s.detach() - log_ref)
        losses[b, t] = -advantage * log_s
    return world.average(losses)


def sr_opsd(world: World, *, share: float = 0.5, alpha: float = 0.5, amari: bool = False) -> Tensor:
    """Renyi divergence to a geometric mean of the teacher in context and the start.

    q(v) prop. to ctx(v)^share ref(v)^(1 - share);   Z = sum_v q(v)^alpha s(v)^(1 - alpha);
    -log Z / (1 - alpha), or, if `amari`, (1 - Z) / (alpha (1 - alpha)).
    The logit gradient of the first is s(v) - q(v)^alpha s(v)^(1 - alpha) / Z; that of the second
    is the same times Z / alpha.
    Source: SR-OPSD, arXiv:2608.09745.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        log_q = _mix({"teacher": share, "reference": 1.0 - share}, world, b, t)
        log_s = world.log_student(b, t)
        overlap = log_s.new_zeros(())
        for v in range(log_s.shape[0]):
            overlap = overlap + (alpha * log_q[v] + (1.0 - alpha) * log_s[v]).exp()
        if amari:
            losses[b, t] = (1.0 - overlap) / (alpha * (1.0 - alpha))
        else:
            losses[b, t] = -overlap.log() / (1.0 - alpha)
    return world.average(losses)


def ar_opd(world: World, *, gain: float = 1.5, clip: float = 5.0, reverse: bool = False) -> Tensor:
    """Forward KL from the partly informed teacher pushed on towards the fully informed one.

    q(v) prop. to partial(v) exp(gain clamp(log full(v) - log partial(v), -clip, clip));
    KL(q || s) over the whole vocabulary, or KL(s || q) if `reverse`.
    Source: AR-OPD, arXiv:2606.10385 (authors' code).
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        log_partial = world.log_view(b, t, "teacher.partial").detach()
        residual = world.log_view(b, t, "teacher").detach() - log_partial
        total = log_partial + gain * residual.clamp(-clip, clip)
        log_q = total - total.logsumexp(0)
        log_s = world.log_student(b, t)
        losses[b, t] = _kl(log_s, log_q) if reverse else _kl(log_q, log_s)
    return world.average(losses)


# ---------------------------------------------------------------------------------------------
# 13-19: data, outcomes, plain divergences
# ---------------------------------------------------------------------------------------------


def hpd(world: World, *, conditional: bool = False) -> Tensor:
    """Reweighted likelihood of a data token, less that of other tokens the student overrates.

    k(v) = stop[(log t(v) - log s(v)) s(v)]; y the data token; the source draws yhat from s:
        -(w + 1[k(y) > 0, k(yhat) < 0] t(y)) log s(y) - 1[yhat != y] min(k(yhat), 0) log s(yhat),
        w = t(y) + k(y) if k(y) > 0, else k(y).
    Here the draw is replaced by its expectation: every v != y with weight s(v), or with
    s(v) / (1 - s(y)) if `conditional` (yhat drawn until it differs from y).
    Source: HPD, arXiv:2604.20244 (Eq. 15 and the authors' code).
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places((DATA,)):
        y = int(world.tokens[b, t])
        log_s = world.log_student(b, t)
        log_t = world.log_view(b, t).detach()
        s = log_s.detach().exp()
        k = (log_t - log_s.detach()) * s
        weight = k[y]
        if float(k[y]) > 0.0:
            weight = log_t[y].exp() + k[y]
        others = log_s.new_zeros(())
        for v in range(log_s.shape[0]):
            if v == y or float(k[v]) >= 0.0:
                continue
            chance = s[v] / (1.0 - s[y]) if conditional else s[v]
            if float(k[y]) > 0.0:
                weight = weight + chance * log_t[y].exp()
            others = others - chance * k[v] * log_s[v]
        losses[b, t] = -weight * log_s[y] + others
    return world.average(losses, (DATA,))


def stable_opd(
    world: World,
    *,
    gold_coef: float = 0.1,
    reference_coef: float = 0.01,
    low: float = 0.2,
    high: float = 0.2,
    exact: bool = False,
) -> Tensor:
    """PPO on the sampled log-ratio, likelihood of golden text, and a tie to the start.

    mean over own tokens of -min(r a, clip(r, 1 - low, 1 + high) a), or of KL(s || t) if `exact`,
        + gold_coef * mean over data tokens of -log s(y)
        + reference_coef * mean over own tokens of KL(s || ref).
    Source: StableOPD, arXiv:2604.08527 (Sec. 3.1, Eq. 5-6).
    """
    own: dict[Place, Tensor] = {}
    gold: dict[Place, Tensor] = {}
    anchor: dict[Place, Tensor] = {}
    for b, t in world.places((STUDENT,)):
        log_s = world.log_student(b, t)
        if exact:
            own[b, t] = _kl(log_s, world.log_view(b, t).detach())
        else:
            own[b, t] = _clipped(world, b, t, float(world.log_ratio(b, t)), low, high)
        anchor[b, t] = _kl(log_s, world.log_view(b, t, "reference").detach())
    for b, t in world.places((DATA,)):
        gold[b, t] = -world.log_student(b, t)[int(world.tokens[b, t])]
    return (
        world.average(own, (STUDENT,))
        + gold_coef * world.average(gold, (DATA,))
        + reference_coef * world.average(anchor, (STUDENT,))
    )


def tgpo(
    world: World,
    *,
    label_coef: float = 1.0,
    outcome_coef: float = 1.0,
    reference_coef: float = 0.001,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """The teacher's first choice as a label, beside GRPO and a tie to the start.

    -label_coef * log s(argmax_v t(v)) + outcome_coef * PPO-clip(A_g)
        + reference_coef * KL(s || ref).
    Source: TGPO, arXiv:2605.13230 (label_coef falls linearly to 0 by step 200).
    """
    label: dict[Place, Tensor] = {}
    outcome: dict[Place, Tensor] = {}
    anchor: dict[Place, Tensor] = {}
    for b, t in world.places():
        log_s = world.log_student(b, t)
        label[b, t] = -log_s[_view_top(world, b, t, 1)[0]]
        outcome[b, t] = _clipped(world, b, t, _group_advantage(world, b), low, high)
        anchor[b, t] = _kl(log_s, world.log_view(b, t, "reference").detach())
    return (
        label_coef * world.average(label)
        + outcome_coef * world.average(outcome)
        + reference_coef * world.average(anchor)
    )


def acceptance_opd(world: World) -> Tensor:
    """One less the chance that speculative decoding accepts a token: total variation.

    1/2 sum_v |s(v) - t(v)| = 1 - sum_v min(s(v), t(v)).
    Source: LK losses, arXiv:2602.23881.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        s = world.log_student(b, t).exp()
        p = world.log_view(b, t).detach().exp()
        total = s.new_zeros(())
        for v in range(s.shape[0]):
            total = total + 0.5 * (s[v] - p[v]).abs()
        losses[b, t] = total
    return world.average(losses)


def ts_opsd(world: World, *, temperature: float = 1.5) -> Tensor:
    """Reverse KL to the first student, heated.

    q(v) prop. to t(v)^(1 / temperature);   KL(s || q).
    Source: TS-OPSD, arXiv:2606.00755.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        log_q = _mix({"teacher": 1.0 / temperature}, world, b, t)
        losses[b, t] = _kl(world.log_student(b, t), log_q)
    return world.average(losses)


def forward_kl_opd(world: World) -> Tensor:
    """Forward KL over the whole vocabulary: KL(t || s).

    Source: forward-KL OPD, arXiv:2610.09639.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        losses[b, t] = _kl(world.log_view(b, t).detach(), world.log_student(b, t))
    return world.average(losses)


def forward_top_k_opd(world: World, *, k: int = 32) -> Tensor:
    """Forward KL on the teacher's likeliest tokens.

    sum over the teacher's top k of tbar(v) (log tbar(v) - log s(v)), tbar = t given the top k.
    Source: KuaiRP, arXiv:2609.11127.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        losses[b, t] = _forward_top(world, b, t, k, renormalise=True)
    return world.average(losses)


def dagger(world: World) -> Tensor:
    """The expert's first choice as a label wherever the learner went: -log s(argmax_v t(v)).

    Source: DAgger, arXiv:1011.0686; ImitKD, arXiv:2009.07253.
    """
    losses: dict[Place, Tensor] = {}
    for b, t in world.places():
        losses[b, t] = -world.log_student(b, t)[_view_top(world, b, t, 1)[0]]
    return world.average(losses)

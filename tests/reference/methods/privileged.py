"""The teacher is the model itself under a richer context, transcribed token by token.

To a loss the privileged self is one more view, `teacher`. What a second context shows it (a wrong
answer, a masked image, the solution without the question) is a further view `teacher.NAME`; the
same weights without the context, as they were at step 0, are the view `reference`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .world import STUDENT, TEACHER, World

# ---------------------------------------------------------------------------- small helpers


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of two log-probability vectors over the same entries."""
    return (log_p.exp() * (log_p - log_q)).sum()


def _jsd_entries(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """Per entry: KL(t||s) at beta 0, KL(s||t) at beta 1, else the generalised JSD around
    m = beta t + (1 - beta) s, that is beta t log(t/m) + (1 - beta) s log(s/m)."""
    if beta == 0.0:
        return log_t.exp() * (log_t - log_s)
    if beta == 1.0:
        return log_s.exp() * (log_s - log_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1.0 - beta))
    of_teacher = log_t.exp() * (log_t - log_m)
    of_student = log_s.exp() * (log_s - log_m)
    return beta * of_teacher + (1.0 - beta) * of_student


def _jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """The generalised JSD of two log-probability vectors (see `_jsd_entries`)."""
    return _jsd_entries(log_s, log_t, beta).sum()


def _normalised(log_p: Tensor) -> Tensor:
    """Log-probabilities conditional on the entries that are left."""
    return log_p - torch.logsumexp(log_p, dim=-1)


def _with_bucket(log_p: Tensor) -> Tensor:
    """The entries that are left, and one more that holds the rest of the mass."""
    inside = torch.logsumexp(log_p, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_p, torch.log(-torch.expm1(inside))])


def _student_top(world: World, b: int, t: int, k: int) -> Tensor:
    """The student's k likeliest tokens at rollout time."""
    return world.student_top_ids[b, t, :k]


def _entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats."""
    return -(log_p.exp() * log_p).sum()


def _token_logp(world: World, b: int, t: int) -> Tensor:
    """log s(y) at one place, with gradient."""
    return world.log_student(b, t)[int(world.tokens[b, t])]


def _view_logp(world: World, b: int, t: int, view: str) -> Tensor:
    """log view(y) at one place, detached."""
    return world.log_view(b, t, view)[int(world.tokens[b, t])].detach()


def _capped_ratio(world: World, b: int, t: int, cap: float | None) -> Tensor | float:
    """min(s(y) / old(y), cap), detached; 1 without a cap."""
    if cap is None:
        return 1.0
    gap = (_token_logp(world, b, t) - world.old_logp[b, t]).detach()
    return gap.clamp(min=-20.0, max=20.0).exp().clamp(max=cap)


def _engine_ratio(world: World, b: int, t: int, cap: float | None) -> Tensor | float:
    """min(old(y) / sampler(y), cap), detached; 1 without a cap."""
    if cap is None:
        return 1.0
    gap = (world.old_logp[b, t] - world.sampler_logp[b, t]).detach()
    return gap.clamp(min=-20.0, max=20.0).exp().clamp(max=cap)


def _right(world: World, b: int) -> bool:
    """Judged, and right."""
    return bool(world.verdict[b] >= 0.5)


def _wrong(world: World, b: int) -> bool:
    """Judged, and wrong."""
    return bool(world.verdict[b] < 0.5)


def _members(world: World, b: int) -> list[int]:
    """The judged responses to the same prompt, this one among them."""
    return [
        other
        for other in range(len(world.group))
        if int(world.group[other]) == int(world.group[b])
        and not math.isnan(float(world.verdict[other]))
    ]


def _group_advantage(world: World, b: int) -> float:
    """GRPO: (verdict - mean) / std over the judged responses of the group, divisor G - 1."""
    if math.isnan(float(world.verdict[b])):
        return 0.0
    scores = [float(world.verdict[other]) for other in _members(world, b)]
    if len(scores) < 2 or all(score == scores[0] for score in scores):
        return 0.0
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    return (float(world.verdict[b]) - mean) / std


def _ppo(
    world: World, b: int, t: int, advantage: Tensor | float, low: float, high: float
) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = s(y) / old(y)."""
    ratio = (_token_logp(world, b, t) - world.old_logp[b, t]).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)


def _grpo(world: World, low: float, high: float) -> Tensor:
    """The clipped surrogate with the group advantage on every token."""
    losses = {
        (b, t): _ppo(world, b, t, _group_advantage(world, b), low, high) for b, t in world.places()
    }
    return world.average(losses)


def _top_share(scores: dict[tuple[int, int], float], share: float) -> set[tuple[int, int]]:
    """The places with the highest scores; ties go to the earlier response, then token."""
    count = max(1, math.floor(share * len(scores) + 0.5))
    order = sorted(scores, key=lambda place: (-scores[place], place))
    return set(order[:count])


# ---------------------------------------------------------------------------- full vocabulary


def opsd(world: World, *, beta: float = 0.0, clip: float | None = 0.05) -> Tensor:
    """OPSD: generalised JSD to the frozen solution-conditioned self, each entry capped.

    sum_v min(c_v, clip), c_v = beta t log(t/m) + (1 - beta) s log(s/m), m = beta t + (1 - beta) s;
    beta 0 is t log(t/s). The cap is on every vocabulary entry's contribution before the sum over
    the vocabulary, from above only. First release: beta=0.5, clip=None.
    Source: siyan-zhao/OPSD opsd_trainer.py (generalized_jsd_loss), arXiv:2601.18734.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        entries = _jsd_entries(world.log_student(b, t), world.log_view(b, t).detach(), beta)
        if clip is not None:
            entries = entries.clamp(max=clip)
        losses[b, t] = entries.sum()
    return world.average(losses)


def opsdc(world: World) -> Tensor:
    """OPSDC / CRISP: reverse KL to the self that was told to be concise, on every response.

    sum_v s(v) log(s(v) / t(v)); the teacher is a hard copy of the student every 50 steps.
    Source: HJSang/OPSD_Reasoning_Compression METHOD.md, README; arXiv:2603.05433.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        losses[b, t] = _kl(world.log_student(b, t), world.log_view(b, t).detach())
    return world.average(losses)


def compaction_opsd(world: World) -> Tensor:
    """OPSD as compaction after RLVR: the reverse KL on right responses only.

    1[verdict >= 0.5] * KL(s || t).
    Source: note on arXiv:2605.06188 (correct-only arm).
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        if _right(world, b):
            losses[b, t] = _kl(world.log_student(b, t), world.log_view(b, t).detach())
    return world.average(losses)


def context_distillation(
    world: World, *, rows: tuple[int, ...] = (TEACHER,), k: int | None = None
) -> Tensor:
    """Context distillation: forward KL to the context-conditioned self on text it wrote.

    sum_v t(v) log(t(v) / s(v)), in full, or over the teacher's k likeliest and one bucket.
    Source: arXiv:2209.15189 (teacher-written text), arXiv:2112.00861 (top 50 and a bucket).
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places(rows):
        log_s, log_t = world.log_student(b, t), world.log_view(b, t).detach()
        if k is not None:
            ids = log_t.topk(k).indices
            log_s, log_t = _with_bucket(log_s[ids]), _with_bucket(log_t[ids])
        losses[b, t] = _kl(log_t, log_s)
    return world.average(losses, rows)


def erpd(world: World, *, reference_coef: float = 0.1) -> Tensor:
    """ERPD, stage 2: distil the over-optimised self under a trust region to the base.

    KL(s || t) + reference_coef * KL(s || reference).
    Source: note on arXiv:2605.25582; the symbols are inferred.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        log_s = world.log_student(b, t)
        pull = _kl(log_s, world.log_view(b, t).detach())
        leash = _kl(log_s, world.log_view(b, t, "reference").detach())
        losses[b, t] = pull + reference_coef * leash
    return world.average(losses)


# ---------------------------------------------------------------------------- student's top k


def sdft(
    world: World, *, k: int = 100, alpha: float = 0.5, ratio_cap: float | None = 2.0
) -> Tensor:
    """SDFT as TRL ships it: JSD to the demonstration-conditioned self on the student's top k.

    min(s(y)/old(y), cap) * JSD_alpha(s~, t~), both conditional on the student's k likeliest
    tokens, m = alpha t~ + (1 - alpha) s~. The paper's own objective is `opsdc` (full reverse KL).
    Source: TRL 1.16 experimental/sdft (loss_utils.py, sdft_config.py), arXiv:2601.19897.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        ids = _student_top(world, b, t, k)
        log_s = _normalised(world.log_student(b, t)[ids])
        log_t = _normalised(world.log_view(b, t).detach()[ids])
        losses[b, t] = _capped_ratio(world, b, t, ratio_cap) * _jsd(log_s, log_t, alpha)
    return world.average(losses)


def sdft_full(
    world: World, *, alpha: float = 1.0, skip: int = 3, engine_cap: float | None = 2.0
) -> Tensor:
    """SDFT as its authors train it: divergence in full, the first tokens skipped.

    1[position >= skip] * W * JSD_alpha(s, t), alpha 1 is KL(s||t), alpha 0 is KL(t||s); W is one
    number a response: the mean over its tokens that are not skipped of min(old/sampler, cap).
    Source: copies of idanshen/Self-Distillation (main.py, DistilTrainer), arXiv:2601.19897 Eq. 1.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        if t < skip:
            continue
        kept = [place for place in world.open_places(b) if place >= skip]
        weight = sum(_engine_ratio(world, b, place, engine_cap) for place in kept) / len(kept)
        log_s, log_t = world.log_student(b, t), world.log_view(b, t).detach()
        losses[b, t] = weight * _jsd(log_s, log_t, alpha)
    return world.average(losses)


def sdpo(
    world: World,
    *,
    k: int = 100,
    alpha: float = 0.5,
    ratio_cap: float | None = 2.0,
    engine_cap: float | None = 2.0,
) -> Tensor:
    """SDPO: JSD to the feedback-conditioned EMA self on the student's top k and a bucket.

    min(s/old, cap) * min(old/sampler, cap') * JSD_alpha(s', t'), s' and t' over the student's k
    likeliest tokens and one entry with the rest, m = alpha t' + (1 - alpha) s'; alpha 0 is
    KL(t'||s'), alpha 1 is KL(s'||t').
    Source: lasgroup/SDPO verl/trainer/ppo/core_algos.py (compute_self_distillation_loss),
    verl/trainer/config/actor/actor.yaml, sdpo.yaml; arXiv:2601.20802.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        ids = _student_top(world, b, t, k)
        log_s = _with_bucket(world.log_student(b, t)[ids])
        log_t = _with_bucket(world.log_view(b, t).detach()[ids])
        weight = _capped_ratio(world, b, t, ratio_cap) * _engine_ratio(world, b, t, engine_cap)
        losses[b, t] = weight * _jsd(log_s, log_t, alpha)
    return world.average(losses)


def sdpo_sampled(world: World, *, ratio_cap: float | None = 2.0) -> Tensor:
    """SDPO as TRL ships it (and SDPO's token-level arm): the sampled log-ratio as a score.

    min(s(y)/old(y), cap) * stop[log s(y) - log t(y)] * log s(y).
    Source: TRL 1.16 experimental/sdpo (loss_utils.py, sdpo_config.py), arXiv:2601.20802.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        score = -world.log_ratio(b, t) * _token_logp(world, b, t)
        losses[b, t] = _capped_ratio(world, b, t, ratio_cap) * score
    return world.average(losses)


def opcd(world: World, *, k: int = 256, renormalise: bool = False) -> Tensor:
    """OPCD (and OEL's consolidation): the reverse KL cut off at the student's top k.

    sum_{v in S} s(v) (log s(v) - log t(v)), s and t as they are (no tail, not normalised) unless
    `renormalise`, which makes both conditional on S first.
    Source: microsoft/LMOps opcd/verl core_algos.py (kl_penalty "full"), dp_actor.py,
    ppo_trainer.yaml; arXiv:2602.12275, arXiv:2603.16856.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        ids = _student_top(world, b, t, k)
        log_s = world.log_student(b, t)[ids]
        log_t = world.log_view(b, t).detach()[ids]
        if renormalise:
            log_s, log_t = _normalised(log_s), _normalised(log_t)
        losses[b, t] = _kl(log_s, log_t)
    return world.average(losses)


# ---------------------------------------------------------------------------- with outcomes


def _gate_is_open(world: World, nats: float) -> bool:
    """The median of the teacher's entropy over the step is at least `nats` (lower median)."""
    entropies = sorted(float(_entropy(world.log_view(b, t))) for b, t in world.places())
    return entropies[(len(entropies) - 1) // 2] >= nats


def anti_sd(
    world: World,
    *,
    coef: float = 0.5,
    nats: float = 0.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """AntiSD: GRPO whose advantage climbs the JSD to the privileged self, token by token.

    A = A_group - g coef stop[phi(u)], u = log t(y) - log s(y), phi(u) = (softplus(u) - log 2) / 2;
    g = 1 while the step's median teacher entropy is at least `nats`; clipped surrogate.
    Source: arXiv:2605.11609 Eq. 2, 6, 7, Algorithm 1 (text of the paper).
    """
    gate = 1.0 if _gate_is_open(world, nats) else 0.0
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        lift = world.log_ratio(b, t)
        phi = 0.5 * (torch.nn.functional.softplus(lift) - math.log(2.0))
        advantage = _group_advantage(world, b) - gate * coef * phi
        losses[b, t] = _ppo(world, b, t, advantage, low, high)
    return world.average(losses)


def ssopd(
    world: World,
    *,
    coef: float = 1.0,
    cap: float = 0.05,
    every_failure: bool = False,
    outcome: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """SSOPD: GRPO, and on a failure the capped forward KL to the self that saw a success.

    outcome * GRPO + coef * 4 p (1 - p) * sum_v min(t log(t/s), cap) on the longest wrong response
    of each group (on each wrong one with `every_failure`), p the group's share of right ones.
    Source: notes on arXiv:2605.17497; cap and coefficient are not in them.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        if not _wrong(world, b):
            continue
        peers = _members(world, b)
        failures = [other for other in peers if _wrong(world, other)]
        longest = max(failures, key=lambda other: (len(world.open_places(other)), -other))
        if not every_failure and b != longest:
            continue
        solved = sum(1 for other in peers if _right(world, other)) / len(peers)
        log_s, log_t = world.log_student(b, t), world.log_view(b, t).detach()
        entries = _jsd_entries(log_s, log_t, 0.0).clamp(max=cap)
        losses[b, t] = 4.0 * solved * (1.0 - solved) * entries.sum()
    return outcome * _grpo(world, low, high) + coef * world.average(losses)


def skill_sd(world: World, *, coef: float = 0.001, low: float = 0.2, high: float = 0.2) -> Tensor:
    """Skill-SD: GRPO, and the importance-weighted k3 to the skill-conditioned self.

    GRPO + coef * rho (exp(r) - 1 - r), r = log t(y) - log s(y), rho = s(y) / old(y), gradient
    through both: at rho = 1 it is -r d log s(y), the reverse KL's. Without rho it would be the
    forward KL's (1 - exp(r)) d log s(y), which the paper corrects.
    Source: notes on arXiv:2604.10674 (App. D.2, "k3++").
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        logp = _token_logp(world, b, t)
        gap = _view_logp(world, b, t, "teacher") - logp
        ratio = (logp - world.old_logp[b, t]).exp()
        losses[b, t] = ratio * (gap.exp() - 1.0 - gap)
    return _grpo(world, low, high) + coef * world.average(losses)


def gates(world: World, *, on: float = 0.1, off: float = 1.0, cap: float = 5.0) -> Tensor:
    """GATES: imitate the tutor's text, and lean on its log-ratio on one's own, under consensus.

    off * mean over the tutor's tokens of -c log s(y) + on * mean over the student's tokens of
    -c clip(a, -cap, cap) log s(y); c = 1 where the tutor's rollouts agreed, extra["consensus"].
    Source: note on arXiv:2602.20574 Eq. 1-4; the value of the cap is not in it.
    """
    agreed = world.extra["consensus"]
    imitation: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places((TEACHER,)):
        if bool(agreed[b] != 0):
            imitation[b, t] = -_token_logp(world, b, t)
    guidance: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places((STUDENT,)):
        if bool(agreed[b] != 0):
            advantage = world.log_ratio(b, t).clamp(-cap, cap)
            guidance[b, t] = -advantage * _token_logp(world, b, t)
    return off * world.average(imitation, (TEACHER,)) + on * world.average(guidance, (STUDENT,))


def cepo(
    world: World,
    *,
    mix: float = 0.5,
    width: float = 0.2,
    wrong: str = "teacher.wrong",
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """CEPO: the group advantage, scaled by what the right answer says against a wrong one.

    A [(1 - mix) + mix clip(exp(sign(A) D), 1 - width, 1 + width)], D = stop[log t(y) - log
    t_wrong(y)]; clipped surrogate; mix fades from 0.5 to 0 in 25 steps.
    Source: note on arXiv:2605.19436; the width is not in it.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        outcome = _group_advantage(world, b)
        contrast = _view_logp(world, b, t, "teacher") - _view_logp(world, b, t, wrong)
        direction = (outcome > 0.0) - (outcome < 0.0)
        scale = (direction * contrast).exp().clamp(1.0 - width, 1.0 + width)
        losses[b, t] = _ppo(world, b, t, outcome * ((1.0 - mix) + mix * scale), low, high)
    return world.average(losses)


# ---------------------------------------------------------------------------- edited targets


def paint(
    world: World,
    *,
    share: float = 0.2,
    mix: float = 0.1,
    clip: float | None = 0.05,
    only: bool = False,
) -> Tensor:
    """PAINT: capped forward KL; where the two entropies differ most the target is interpolated.

    sum_v min(q log(q/s), clip); on the `share` of the step's tokens with the largest |H_t - H_s|
    log q = (1 - mix) log t + mix log stop[s], normalised, elsewhere q = t (no loss if `only`).
    Source: notes on arXiv:2604.26573; the interpolation's ends and size are inferred.
    """
    mismatch: dict[tuple[int, int], float] = {}
    for b, t in world.places():
        log_s, log_t = world.log_student(b, t).detach(), world.log_view(b, t)
        mismatch[b, t] = abs(float(_entropy(log_t)) - float(_entropy(log_s)))
    chosen = _top_share(mismatch, share)
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        if only and (b, t) not in chosen:
            continue
        log_s, target = world.log_student(b, t), world.log_view(b, t).detach()
        if (b, t) in chosen:
            target = _normalised((1.0 - mix) * target + mix * log_s.detach())
        entries = _jsd_entries(log_s, target, 0.0)
        if clip is not None:
            entries = entries.clamp(max=clip)
        losses[b, t] = entries.sum()
    return world.average(losses)


def purified_opsd(
    world: World,
    *,
    beta: float = 1.0,
    clip: float = 10.0,
    probe: str = "teacher.probe",
    base: str = "reference",
) -> Tensor:
    """Purified OPSD: forward KL to the base tilted by what the question adds to the solution.

    d(v) = log t(v) - log t_probe(v), centred over the vocabulary, then clip tanh(d / clip);
    log q = log base + d / beta, normalised; sum_v q log(q/s). The probe saw the solution only.
    Source: a reimplementation's tests of arXiv:2607.02234 Sec. 3.2; the divergence is inferred.
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        lift = (world.log_view(b, t) - world.log_view(b, t, probe)).detach()
        lift = lift - lift.mean()
        lift = clip * torch.tanh(lift / clip)
        target = _normalised(world.log_view(b, t, base).detach() + lift / beta)
        losses[b, t] = _kl(target, world.log_student(b, t))
    return world.average(losses)


def ogls_sd(
    world: World,
    *,
    strength: float = 1.0,
    window: int = 1024,
    reverse: bool = False,
    wrong: str = "teacher.wrong",
    base: str = "reference",
) -> Tensor:
    """OGLS-SD: on wrong responses, the base steered from failed towards successful contexts.

    log q = log base + strength (log t - log t_wrong), normalised; 1[verdict < 0.5, position <
    window] * KL(q || s), or KL(s || q) with `reverse`. t and t_wrong stand for the mean logits
    under right and under wrong rollouts as context.
    Source: notes on arXiv:2605.12400 v2 (they differ on the direction; its short-response SFT
    anchor is left out).
    """
    losses: dict[tuple[int, int], Tensor] = {}
    for b, t in world.places():
        if not _wrong(world, b) or t >= window:
            continue
        steer = (world.log_view(b, t) - world.log_view(b, t, wrong)).detach()
        target = _normalised(world.log_view(b, t, base).detach() + strength * steer)
        log_s = world.log_student(b, t)
        losses[b, t] = _kl(log_s, target) if reverse else _kl(target, log_s)
    return world.average(losses)

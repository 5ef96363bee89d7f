"""Literal transcriptions: methods that couple a teacher's token signal with a verifier's outcome.

Symbols: s, t are the probabilities of the sampled token under the student and the teacher, a =
stop[log t - log s], A_g the group advantage of the verdict, z = +1 for a correct response, -1 for a
failed one, 0 for one nobody judged. Defaults are the source's; where a source fixes how rows are
averaged, `World.average` is used all the same unless a knob says otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.methods.world import STUDENT, TEACHER, World


def _judged(world: World, b: int) -> bool:
    return not math.isnan(float(world.verdict[b]))


def _correct(world: World, b: int) -> bool:
    return _judged(world, b) and float(world.verdict[b]) >= 0.5


def _failed(world: World, b: int) -> bool:
    return _judged(world, b) and float(world.verdict[b]) < 0.5


def _sign(world: World, b: int) -> float:
    """z: +1 correct, -1 failed, 0 where nobody judged."""
    if _correct(world, b):
        return 1.0
    return -1.0 if _failed(world, b) else 0.0


def _chosen_by(world: World, b: int, t: int, kind: int) -> bool:
    return int(world.provenance[b, t]) == kind


def _sign_of(number: float) -> float:
    return float((number > 0) - (number < 0))


def _group_of(world: World, b: int) -> list[int]:
    """Every response to the prompt of response b."""
    size = world.tokens.shape[0]
    return [other for other in range(size) if int(world.group[other]) == int(world.group[b])]


def _standard_score(numbers: list[float], own: float, *, divide: bool, unbiased: bool) -> float:
    """(own - mean) / std of a group; 0 for a group of one and for a group without spread."""
    if len(numbers) < 2 or max(numbers) == min(numbers):
        return 0.0
    mean = sum(numbers) / len(numbers)
    if not divide:
        return own - mean
    squares = sum((number - mean) ** 2 for number in numbers)
    return (own - mean) / math.sqrt(squares / (len(numbers) - (1 if unbiased else 0)))


def _group_advantage(
    world: World, b: int, *, divide: bool = True, members: list[int] | None = None
) -> float:
    """A_g: the verdict, standardised over the judged responses of its group."""
    if not _judged(world, b):
        return 0.0
    group = _group_of(world, b) if members is None else members
    verdicts = [float(world.verdict[other]) for other in group if _judged(world, other)]
    return _standard_score(verdicts, float(world.verdict[b]), divide=divide, unbiased=True)


def _log_student_token(world: World, b: int, t: int) -> Tensor:
    """log s(y), with gradient."""
    return world.log_student(b, t)[int(world.tokens[b, t])]


def _number(world: World, b: int, t: int) -> float:
    """log s(y), as a number."""
    return float(_log_student_token(world, b, t).detach())


def _log_view_token(world: World, b: int, t: int, view: str = "teacher") -> Tensor:
    """log view(y), a constant."""
    return world.log_view(b, t, view)[int(world.tokens[b, t])].detach()


def _ratio_to_old(world: World, b: int, t: int) -> Tensor:
    """s(y) / old(y), with gradient."""
    return (_log_student_token(world, b, t) - world.old_logp[b, t]).exp()


def _clipped(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    """PPO: -min(ratio A, clip(ratio, 1 - low, 1 + high) A)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)


def _ppo(
    world: World, b: int, t: int, advantage: float, low: float = 0.2, high: float = 0.2
) -> Tensor:
    return _clipped(_ratio_to_old(world, b, t), advantage, low, high)


def _score(world: World, b: int, t: int, advantage: float) -> Tensor:
    """REINFORCE: -A log s(y)."""
    return -advantage * _log_student_token(world, b, t)


def _gap(world: World, b: int, t: int, view: str = "teacher") -> float:
    """a at one place, as a number."""
    return float(world.log_ratio(b, t, view))


def _clip(number: float, low: float, high: float) -> float:
    return min(max(number, low), high)


def _median(numbers: list[float]) -> float:
    ordered = sorted(numbers)
    half = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2.0


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q) of two vectors of log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum()


def _jsd(log_s: Tensor, log_t: Tensor, teacher_share: float) -> Tensor:
    """share KL(t||m) + (1 - share) KL(s||m), m = share t + (1 - share) s."""
    mixture = (teacher_share * log_t.exp() + (1.0 - teacher_share) * log_s.exp()).log()
    return teacher_share * _kl(log_t, mixture) + (1.0 - teacher_share) * _kl(log_s, mixture)


def _with_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities of `ids`, then one more entry: the log of what they leave."""
    inside = log_p[ids]
    rest = (1.0 - inside.exp().sum()).log()
    return torch.cat([inside, rest.reshape(1)])


def kdrl(world: World, *, kl_coef: float = 0.002, low: float = 0.2, high: float = 0.2) -> Tensor:
    """GRPO plus the k2 estimate of KL(s||t), back-propagated.

    -min(r A_g, clip(r) A_g) + kl_coef * 1/2 (log s - log t)^2
    Source: KDRL, arXiv:2506.02208.
    """
    outcome, imitation = {}, {}
    for b, t in world.places():
        outcome[b, t] = _ppo(world, b, t, _group_advantage(world, b), low, high)
        difference = _log_student_token(world, b, t) - _log_view_token(world, b, t)
        imitation[b, t] = 0.5 * difference**2
    return world.average(outcome) + kl_coef * world.average(imitation)


def mimo_mopd(
    world: World, *, outcome_scale: float = 1.0, low: float = 0.5, high: float = 2.0
) -> Tensor:
    """Distillation and outcome in one advantage; a token the engine disagrees on is dropped.

    -w (a + outcome_scale A_g) log s, w = stop[s / sampler] inside [low, high], else 0
    Source: MiMo-V2-Flash, arXiv:2601.02780.
    """
    losses = {}
    for b, t in world.places():
        weight = math.exp(_number(world, b, t) - float(world.sampler_logp[b, t]))
        if not low <= weight <= high:
            weight = 0.0
        advantage = _gap(world, b, t) + outcome_scale * _group_advantage(world, b)
        losses[b, t] = weight * _score(world, b, t, advantage)
    return world.average(losses)


def nemotron_mopd(world: World, *, low: float = 0.5, high: float = 2.0) -> Tensor:
    """The same without an outcome; the mask compares the trainer at rollout with the engine.

    -w a log s, w = old / sampler inside [low, high], else 0 (ICE-POP)
    Source: NeMo-RL `opd` + `icepop`; Nemotron-Cascade 2, arXiv:2603.19220.
    """
    losses = {}
    for b, t in world.places():
        weight = math.exp(float(world.old_logp[b, t]) - float(world.sampler_logp[b, t]))
        if not low <= weight <= high:
            weight = 0.0
        losses[b, t] = weight * _score(world, b, t, _gap(world, b, t))
    return world.average(losses)


def scope(world: World, *, temperature: float = 1.0, surrogate: str = "ratio") -> Tensor:
    """Correct: likelihood, weighted to unlikely paths. Failed: OPD, to paths the teacher follows.

    correct  w = PPL_s^(1/T)  / sum over the group's correct of the same;   -w r
    failed   w = PPL_t^(-1/T) / sum over the group's failed of the same;    -w a r
    r = s/old, unclipped, with gradient; `surrogate="score"`: log s in its place. PPL of a response
    is exp(-mean log-probability) over its open tokens.
    Source: SCOPE eq. 1-6, arXiv:2604.10688.
    """

    def surprise(b: int, view: str | None) -> float:
        """log perplexity of a response."""
        places = world.open_places(b)
        total = 0.0
        for t in places:
            if view is None:
                total += _number(world, b, t)
            else:
                total += float(_log_view_token(world, b, t, view))
        return -total / len(places)

    losses = {}
    for b, t in world.places():
        if not _judged(world, b):
            continue
        won = _correct(world, b)
        rivals = [
            other
            for other in _group_of(world, b)
            if _judged(world, other) and _correct(world, other) == won and world.open_places(other)
        ]
        if won:
            powers = {other: math.exp(surprise(other, None) / temperature) for other in rivals}
        else:
            powers = {
                other: math.exp(-surprise(other, "teacher") / temperature) for other in rivals
            }
        weight = powers[b] / sum(powers.values())
        advantage = 1.0 if won else _gap(world, b, t)
        if surrogate == "ratio":
            losses[b, t] = -weight * advantage * _ratio_to_old(world, b, t)
        else:
            losses[b, t] = weight * _score(world, b, t, advantage)
    return world.average(losses)


def opdvr(world: World) -> Tensor:
    """The teacher's signal where its direction is the verifier's, else nothing.

    -A log s, A = z max(z a, 0)
    Source: OPDVR, arXiv:2608.24696.
    """
    losses = {}
    for b, t in world.places():
        z = _sign(world, b)
        losses[b, t] = _score(world, b, t, z * max(z * _gap(world, b, t), 0.0))
    return world.average(losses)


def r2_opd(world: World, *, sharpness: float = 1e-3, per: str = "response") -> Tensor:
    """A soft gate on agreement with the outcome that keeps the mass of the signal.

    -A log s, A = Z g a, g = sigmoid(sharpness z a / median|a|), Z = sum|a| / sum(g |a|)
    The median (at least 1e-8) and both sums run over the response. An unjudged response has z = 0,
    so g = 1/2, Z = 2 and A = a. `per="step"`: over the step, unjudged tokens (g = 1/2) included.
    Source: R^2-OPD eq. 13-16, arXiv:2609.35517.
    """
    losses = {}
    for b, t in world.places():
        places = list(world.places())
        if per == "response":
            places = [(b, other) for other in world.open_places(b)]
        middle = max(_median([abs(_gap(world, *place)) for place in places]), 1e-8)

        def gate(place: tuple[int, int], middle: float = middle) -> float:
            agreement = _sign(world, place[0]) * _gap(world, *place) / middle
            return 1.0 / (1.0 + math.exp(-sharpness * agreement))

        mass = sum(abs(_gap(world, *place)) for place in places)
        gated = sum(gate(place) * abs(_gap(world, *place)) for place in places)
        advantage = mass / gated * gate((b, t)) * _gap(world, b, t) if gated > 0.0 else 0.0
        losses[b, t] = _score(world, b, t, advantage)
    return world.average(losses)


def gc_opd(
    world: World,
    *,
    scale: float = 0.1,
    cap: float = 10.0,
    unbiased: bool = False,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """OPD plus what the verifier ranks otherwise than the teacher, shared out over the tokens.

    T = mean of a over the response; rho = zscore_group(verdict) - zscore_group(T), 0 unless both
    vary in the group; c_i = 1 + tanh(u_i / 2), u_i = (a_i - T) / std of a in the response (c = 1
    where that is 0); A_i = clip(a_i + scale c_i rho, -cap, cap); PPO clip. The z-scores divide by
    the population's deviation; `unbiased=True` divides as A_g does.
    Source: GC-OPD (SolereZhang/GC-OPD, gc_opd.py, credit `raca`), arXiv:2608.19181.
    """

    def teacher_score(b: int) -> float:
        gaps = [_gap(world, b, t) for t in world.open_places(b)]
        return sum(gaps) / len(gaps)

    losses = {}
    for b, t in world.places():
        residual = 0.0
        if _judged(world, b):
            rivals = [o for o in _group_of(world, b) if _judged(world, o)]
            verdicts = [float(world.verdict[o]) for o in rivals]
            scores = [teacher_score(o) for o in rivals if world.open_places(o)]
            if (
                len(verdicts) > 1
                and len(scores) > 1
                and max(verdicts) > min(verdicts)
                and max(scores) > min(scores)
            ):
                verdict = float(world.verdict[b])
                residual = _standard_score(verdicts, verdict, divide=True, unbiased=unbiased)
                residual -= _standard_score(
                    scores, teacher_score(b), divide=True, unbiased=unbiased
                )
        gaps = [_gap(world, b, other) for other in world.open_places(b)]
        mean = sum(gaps) / len(gaps)
        deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
        credit = 1.0
        if len(gaps) > 1 and deviation > 1e-6:
            credit = 1.0 + math.tanh((_gap(world, b, t) - mean) / deviation / 2.0)
        advantage = _clip(_gap(world, b, t) + scale * credit * residual, -cap, cap)
        losses[b, t] = _ppo(world, b, t, advantage, low, high)
    return world.average(losses)


def rlsd(
    world: World,
    *,
    low: float = 0.2,
    high: float = 0.2,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    strength: float = 1.0,
) -> Tensor:
    """The verifier says which way, the privileged self how far.

    A = A_g [(1 - strength) + strength clip((t/s)^sign(A_g), 1 - low, 1 + high)]; PPO clip
    The paper anneals strength from 0.5 to 0 over 50 steps.
    Source: RLSD, arXiv:2604.03128 (code read: THU-BPM/RLCSD and lauyikfung/SDPG).
    """
    losses = {}
    for b, t in world.places():
        outcome = _group_advantage(world, b)
        evidence = math.exp(_sign_of(outcome) * _gap(world, b, t))
        weight = _clip(evidence, 1.0 - low, 1.0 + high)
        advantage = outcome * ((1.0 - strength) + strength * weight)
        losses[b, t] = _ppo(world, b, t, advantage, clip_low, clip_high)
    return world.average(losses)


def rlrt(
    world: World,
    *,
    strength: float = 1.0,
    epsilon: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """On correct responses, more for what the privileged self would not have said; else GRPO.

    correct  A = A_g [(1 - strength) + strength clip((s/t)^sign(A_g), 1 - epsilon, 1 + epsilon)]
    other    A = A_g
    Source: RLRT, arXiv:2605.10781.
    """
    losses = {}
    for b, t in world.places():
        outcome = _group_advantage(world, b)
        advantage = outcome
        if _correct(world, b):
            evidence = math.exp(-_sign_of(outcome) * _gap(world, b, t))
            weight = _clip(evidence, 1.0 - epsilon, 1.0 + epsilon)
            advantage = outcome * ((1.0 - strength) + strength * weight)
        losses[b, t] = _ppo(world, b, t, advantage, clip_low, clip_high)
    return world.average(losses)


def distilled_rl(
    world: World, *, clip: float = 3.0, clip_low: float = 0.2, clip_high: float = 0.28
) -> Tensor:
    """GRPO whose gain is dealt to the tokens the teacher prefers.

    rho_i = clip(t/old, 1/clip, clip); w_i = rho_i / geometric mean of rho over the response;
    A_i = w_i A_g where A_g > 0, else A_g; PPO clip
    Source: Distilled RL (597358816/Distilled-RL, ray_trainer.py), arXiv:2607.17247.
    """

    def log_weight(b: int, t: int) -> float:
        ratio = math.exp(float(_log_view_token(world, b, t)) - float(world.old_logp[b, t]))
        return math.log(_clip(ratio, 1.0 / clip, clip))

    losses = {}
    for b, t in world.places():
        advantage = _group_advantage(world, b)
        if advantage > 0.0:
            places = world.open_places(b)
            mean = sum(log_weight(b, other) for other in places) / len(places)
            advantage = advantage * math.exp(log_weight(b, t) - mean)
        losses[b, t] = _ppo(world, b, t, advantage, clip_low, clip_high)
    return world.average(losses)


def rlad(world: World, *, old_share: float = 0.5, low: float = 0.2, high: float = 0.2) -> Tensor:
    """GRPO whose ratio is anchored between the old policy and the teacher.

    ratio = (s/old)^share (s/t)^(1 - share); -min(ratio A_g, clip(ratio) A_g)
    Source: RLAD (TRRD), arXiv:2602.22495.
    """
    losses = {}
    for b, t in world.places():
        log_s = _log_student_token(world, b, t)
        to_old = log_s - world.old_logp[b, t]
        to_teacher = log_s - _log_view_token(world, b, t)
        ratio = (old_share * to_old + (1.0 - old_share) * to_teacher).exp()
        losses[b, t] = _clipped(ratio, _group_advantage(world, b), low, high)
    return world.average(losses)


def rlcsd(
    world: World,
    *,
    temperature: float = 0.02,
    scale: float = 0.5,
    threshold: float = 0.02,
    low: float = 0.2,
    high: float = 0.2,
    selected_coef: float = 1.0,
    wrong: tuple[str, ...] = ("teacher.wrong",),
    two_path: bool = False,
) -> Tensor:
    """GRPO nudged by how much better a right hint explains the token than a wrong one.

    e = log t(y) - log mean_k wrong_k(y); delta = clip(scale tanh(e / temperature), -2, 2); where
    |delta| > threshold: A = A_g + delta, not past 0 (max(., 0) if A_g > 0, min(., 0) if A_g < 0,
    0 if A_g = 0); elsewhere A = A_g; PPO clip. The code takes the token mean of the two sets
    apart and adds them, the changed ones times selected_coef (`two_path=True`).
    Source: RLCSD (THU-BPM/RLCSD, core_algos.py), arXiv:2606.11709.
    """
    plain, changed = {}, {}
    for b, t in world.places():
        outcome = _group_advantage(world, b)
        chances = [float(_log_view_token(world, b, t, view).exp()) for view in wrong]
        evidence = float(_log_view_token(world, b, t)) - math.log(sum(chances) / len(chances))
        nudge = _clip(scale * math.tanh(evidence / temperature), -2.0, 2.0)
        if abs(nudge) <= threshold:
            plain[b, t] = _ppo(world, b, t, outcome, low, high)
            continue
        if outcome > 0.0:
            advantage = max(outcome + nudge, 0.0)
        elif outcome < 0.0:
            advantage = min(outcome + nudge, 0.0)
        else:
            advantage = 0.0
        changed[b, t] = selected_coef * _ppo(world, b, t, advantage, low, high)
    if not two_path:
        return world.average({**plain, **changed})
    total = world.student.sum() * 0.0
    for losses in (plain, changed):
        if losses:
            total = total + sum(losses.values()) / len(losses)
    return total


def sdpg(
    world: World,
    *,
    teacher_coef: float = 1e-3,
    reference_coef: float = 1e-3,
    low: float = 0.2,
    high: float = 0.28,
    reference_kl: str = "k2",
    positive_only: bool = False,
) -> Tensor:
    """GRPO plus the whole reverse KL to the privileged self, plus a leash to step 0.

    PPO clip + teacher_coef KL(s||t) + reference_coef * 1/2 (log s - log ref)^2
    `reference_kl="full"`: KL(s||ref) instead of k2. `positive_only`: the teacher's term where
    A_g > 0 only (an option of the code, off in its scripts).
    Source: SDPG (lauyikfung/SDPG, core_algos.py, `urkl`), arXiv:2606.04036.
    """
    outcome, imitation, leash = {}, {}, {}
    for b, t in world.places():
        advantage = _group_advantage(world, b)
        outcome[b, t] = _ppo(world, b, t, advantage, low, high)
        log_s = world.log_student(b, t)
        if advantage > 0.0 or not positive_only:
            imitation[b, t] = _kl(log_s, world.log_view(b, t).detach())
        if reference_kl == "full":
            leash[b, t] = _kl(log_s, world.log_view(b, t, "reference").detach())
        else:
            drift = _log_student_token(world, b, t) - _log_view_token(world, b, t, "reference")
            leash[b, t] = 0.5 * drift**2
    return (
        world.average(outcome)
        + teacher_coef * world.average(imitation)
        + reference_coef * world.average(leash)
    )


def verify_first(
    world: World,
    *,
    at_least: float = 2.0 / 3.0,
    divide: bool = False,
    surrogate: str = "ppo",
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """Prompts the teacher itself solves: OPD. The others: GRPO.

    A = a where teacher_pass >= at_least, A_g where it is below, nothing where it is NaN; PPO clip
    The paper's A_g is the verdict less the group's mean (`divide=True`: over the deviation too);
    `surrogate="score"` takes -a log s for the first kind.
    Source: TGOPD, arXiv:2609.02998.
    """
    losses = {}
    for b, t in world.places():
        passed = float(world.extra["teacher_pass"][b])
        if math.isnan(passed):
            continue
        if passed < at_least:
            outcome = _group_advantage(world, b, divide=divide)
            losses[b, t] = _ppo(world, b, t, outcome, low, high)
        elif surrogate == "score":
            losses[b, t] = _score(world, b, t, _gap(world, b, t))
        else:
            losses[b, t] = _ppo(world, b, t, _gap(world, b, t), low, high)
    return world.average(losses)


def rescue_opd(
    world: World,
    *,
    coef: float = 5e-3,
    surrogate: str = "ppo",
    weigh: bool = True,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """Groups that fail altogether: OPD, weighted by how well the teacher solves them. Else GRPO.

    all judged fail  A = coef w a, w = teacher_pass, 0 where NaN (not tried); `weigh=False`: 1
    other groups     A = A_g; PPO clip on both (`surrogate="score"`: -A log s on the first)
    The paper anneals coef to 1e-3, keeps only tokens of high entropy or divergence, and adds SFT on
    the teacher's own right answers: the last two are not here. That a teacher that was not tried is
    not trusted is this library's rule.
    Source: RSTG eq. 9, arXiv:2608.00782.
    """
    losses = {}
    for b, t in world.places():
        judged = [other for other in _group_of(world, b) if _judged(world, other)]
        if judged and all(_failed(world, other) for other in judged):
            weight = 1.0
            if weigh and "teacher_pass" in world.extra:
                known = float(world.extra["teacher_pass"][b])
                weight = 0.0 if math.isnan(known) else known
            advantage = coef * weight * _gap(world, b, t)
            if surrogate == "ppo":
                losses[b, t] = _ppo(world, b, t, advantage, low, high)
            else:
                losses[b, t] = _score(world, b, t, advantage)
        else:
            losses[b, t] = _ppo(world, b, t, _group_advantage(world, b), low, high)
    return world.average(losses)


def srpo(
    world: World,
    *,
    k: int = 100,
    teacher_share: float = 0.5,
    entropy_scale: float = 1.0,
    ratio_cap: float = 2.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """Correct responses: GRPO. Failed ones: SDPO, more where the privileged self is sure.

    correct  -min(r A_g, clip(r) A_g)
    failed   w min(stop[s/old], ratio_cap) JSD(s, t) on the student's top k and the rest,
             w = exp(-entropy_scale H(t)), divided by its mean over the failed tokens of the step
    Source: SRPO, arXiv:2604.02288 (code read: THU-BPM/RLCSD, core_algos.py).
    """

    def confidence(b: int, t: int) -> float:
        log_t = world.log_view(b, t)
        entropy = -float((log_t.exp() * log_t).sum())
        return math.exp(-entropy_scale * entropy)

    routed = [place for place in world.places() if _failed(world, place[0])]
    mean = sum(confidence(b, t) for b, t in routed) / len(routed) if routed else 1.0
    losses = {}
    for b, t in world.places():
        if not _failed(world, b):
            losses[b, t] = _ppo(world, b, t, _group_advantage(world, b), low, high)
            continue
        log_s, log_t = world.log_student(b, t), world.log_view(b, t).detach()
        if k < log_s.shape[0]:
            ids = world.student_top_ids[b, t, :k]
            log_s, log_t = _with_rest(log_s, ids), _with_rest(log_t, ids)
        correction = min(float(_ratio_to_old(world, b, t).detach()), ratio_cap)
        weight = confidence(b, t) / mean
        losses[b, t] = weight * correction * _jsd(log_s, log_t, teacher_share)
    return world.average(losses)


def hdpo(
    world: World,
    *,
    coef: float = 1.0,
    teacher_share: float = 0.5,
    on: str = "privileged",
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """GRPO, and on prompts nobody solved the privileged self is distilled where it is right.

    GRPO over the student's responses + coef JSD(s, t), whole vocabulary, on `cliff` prompts:
    all judged responses of the student fail. The JSD is taken on the privileged self's own
    responses (every open token TEACHER) that are correct; `on="own"`: on the student's instead.
    Source: HDPO, arXiv:2603.23871 (the paper keeps the top 64 logits).
    """

    def privileged(b: int) -> bool:
        places = world.open_places(b)
        return bool(places) and all(_chosen_by(world, b, t, TEACHER) for t in places)

    outcome, imitation = {}, {}
    for b, t in world.places():
        own = [other for other in _group_of(world, b) if not privileged(other)]
        judged = [other for other in own if _judged(world, other)]
        cliff = bool(judged) and all(_failed(world, other) for other in judged)
        if privileged(b):
            if on == "privileged" and cliff and _correct(world, b):
                imitation[b, t] = _jsd(
                    world.log_student(b, t), world.log_view(b, t).detach(), teacher_share
                )
            continue
        outcome[b, t] = _ppo(world, b, t, _group_advantage(world, b, members=own), low, high)
        if on == "own" and cliff:
            imitation[b, t] = _jsd(
                world.log_student(b, t), world.log_view(b, t).detach(), teacher_share
            )
    if on == "own":
        return world.average(outcome) + coef * world.average(imitation)
    student = {(b, t): loss for (b, t), loss in outcome.items() if _chosen_by(world, b, t, STUDENT)}
    return world.average(student, (STUDENT,)) + coef * world.average(imitation, (TEACHER,))


def luffy(
    world: World,
    *,
    shape: float = 0.1,
    low: float = 0.2,
    high: float = 0.2,
    divide: bool = False,
    clip: bool = False,
    joint: bool = False,
) -> Tensor:
    """GRPO over a group that holds a teacher's responses, whose ratio is reshaped.

    student  -r A_g                          (`clip=True`: -min(r A_g, clip(r) A_g))
    teacher  -f(s(y)) A_g, f(x) = x / (x + shape), with gradient
    A_g = verdict - mean of the mixed group (`divide=True`: over the deviation too). One average for
    each kind of rows, added; the code takes one over both (`joint=True`).
    Source: LUFFY (ElliottYan/LUFFY, mix_core_alg.py), arXiv:2504.14945.
    """
    student, teacher = {}, {}
    for b, t in world.places((STUDENT, TEACHER)):
        advantage = _group_advantage(world, b, divide=divide)
        if _chosen_by(world, b, t, TEACHER):
            chance = _log_student_token(world, b, t).exp()
            teacher[b, t] = -chance / (chance + shape) * advantage
        elif clip:
            student[b, t] = _ppo(world, b, t, advantage, low, high)
        else:
            student[b, t] = -_ratio_to_old(world, b, t) * advantage
    if joint:
        return world.average({**student, **teacher}, (STUDENT, TEACHER))
    return world.average(student, (STUDENT,)) + world.average(teacher, (TEACHER,))


def ra_opd(world: World) -> Tensor:
    """Responses on which the teacher as a whole points where the outcome does; the rest dropped.

    -a log s where z G >= 0, G = sum of a over the response; unjudged responses dropped
    Source: RA-OPD, arXiv:2608.27960.
    """
    losses = {}
    for b, t in world.places():
        total = sum(_gap(world, b, other) for other in world.open_places(b))
        if _judged(world, b) and _sign(world, b) * total >= 0.0:
            losses[b, t] = _score(world, b, t, _gap(world, b, t))
    return world.average(losses)


def sg_opd(world: World, *, beta: float = 0.5) -> Tensor:
    """More of the teacher where it agrees with the outcome, less where it does not.

    -A log s, A = (1 + beta) a where z a > 0, else (1 - beta) a      (inferred)
    Source: SG-OPD (its token gate only), arXiv:2606.09304.
    """
    losses = {}
    for b, t in world.places():
        gap = _gap(world, b, t)
        factor = 1.0 + beta if _sign(world, b) * gap > 0.0 else 1.0 - beta
        losses[b, t] = _score(world, b, t, factor * gap)
    return world.average(losses)


def sdar(
    world: World,
    *,
    coef: float = 0.01,
    sharpness: float = 5.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """GRPO plus likelihood of the tokens the privileged self prefers.

    PPO clip + coef g (log t - log s), g = stop[sigmoid(sharpness a)], gradient through log s
    Source: SDAR (ZJU-REAL/SDAR, sdar_utils.py), arXiv:2605.15155.
    """
    outcome, imitation = {}, {}
    for b, t in world.places():
        outcome[b, t] = _ppo(world, b, t, _group_advantage(world, b), low, high)
        gate = 1.0 / (1.0 + math.exp(-sharpness * _gap(world, b, t)))
        difference = _log_view_token(world, b, t) - _log_student_token(world, b, t)
        imitation[b, t] = gate * difference
    return world.average(outcome) + coef * world.average(imitation)


def atod(world: World, *, share: float = 0.5, low: float = 0.2, high: float = 0.2) -> Tensor:
    """One advantage that moves from the teacher's to the outcome's as training goes on.

    A = (1 - share) a + share A_g; PPO clip. The paper's turn weights on a are left out.
    Source: ATOD, arXiv:2606.27814.
    """
    losses = {}
    for b, t in world.places():
        advantage = (1.0 - share) * _gap(world, b, t) + share * _group_advantage(world, b)
        losses[b, t] = _ppo(world, b, t, advantage, low, high)
    return world.average(losses)

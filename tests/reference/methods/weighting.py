"""Which responses, places and tokens count, and how much; literal transcriptions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .world import ANYBODY, DATA, STUDENT, TEACHER, World

Place = tuple[int, int]


# ---------------------------------------------------------------------------- small helpers


def _kl(log_first: Tensor, log_second: Tensor) -> Tensor:
    """KL(first || second) = sum_v first(v) [log first(v) - log second(v)]."""
    return (log_first.exp() * (log_first - log_second)).sum()


def _forward_kl(world: World, b: int, t: int) -> Tensor:
    """KL(t || s) over the vocabulary at one place, with gradient."""
    return _kl(world.log_view(b, t), world.log_student(b, t))


def _reverse_kl(world: World, b: int, t: int, view: str = "teacher") -> Tensor:
    """KL(s || t) over the vocabulary at one place, with gradient."""
    return _kl(world.log_student(b, t), world.log_view(b, t, view))


def _jsd(log_student: Tensor, log_teacher: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s.

    As published, beta = 0 stands for KL(t || s) and beta = 1 for KL(s || t).
    """
    if beta == 0.0:
        return _kl(log_teacher, log_student)
    if beta == 1.0:
        return _kl(log_student, log_teacher)
    log_mixture = (beta * log_teacher.exp() + (1.0 - beta) * log_student.exp()).log()
    return beta * _kl(log_teacher, log_mixture) + (1.0 - beta) * _kl(log_student, log_mixture)


def _entropy(log_probabilities: Tensor) -> float:
    """Entropy in nats, as a plain number."""
    return float(-(log_probabilities.exp() * log_probabilities).sum())


def _student_entropy(world: World, b: int, t: int) -> float:
    return _entropy(world.log_student(b, t).detach())


def _teacher_entropy(world: World, b: int, t: int) -> float:
    return _entropy(world.log_view(b, t))


def _log_chosen(world: World, b: int, t: int) -> Tensor:
    """log s(y) at one place, with gradient."""
    return world.log_student(b, t)[int(world.tokens[b, t])]


def _score(world: World, b: int, t: int, advantage: float) -> Tensor:
    """-A log s(y)."""
    return -advantage * _log_chosen(world, b, t)


def _clipped(world: World, b: int, t: int, advantage: float, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = s(y) / old(y) with gradient."""
    ratio = (_log_chosen(world, b, t) - world.old_logp[b, t]).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)


def _student_top(world: World, b: int, t: int, k: int) -> list[int]:
    return [int(v) for v in world.student_top_ids[b, t, :k]]


def _teacher_top(world: World, b: int, t: int, k: int) -> list[int]:
    return [int(v) for v in world.teacher[b, t].topk(k).indices]


def _conditional(log_probabilities: Tensor, support: Sequence[int]) -> Tensor:
    """Log-probabilities given that the token is one of `support`."""
    return log_probabilities[list(support)].log_softmax(-1)


def _quantile(values: Iterable[float], level: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = level * (len(ordered) - 1)
    below, above = math.floor(position), math.ceil(position)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _top_share(scores: Mapping[Place, float], share: float) -> set[Place]:
    """The max(1, floor(share n + 0.5)) places of largest score; ties go to the earlier place."""
    if not scores:
        return set()
    count = min(len(scores), max(1, math.floor(share * len(scores) + 0.5)))
    order = sorted(scores, key=lambda place: (-scores[place], place))
    return set(order[:count])


def _judged(world: World, b: int) -> bool:
    return not math.isnan(float(world.verdict[b]))


def _right(world: World, b: int) -> bool:
    return _judged(world, b) and float(world.verdict[b]) >= 0.5


def _wrong(world: World, b: int) -> bool:
    return _judged(world, b) and float(world.verdict[b]) < 0.5


def _mates(world: World, b: int) -> list[int]:
    """Judged responses to the prompt of response b."""
    group = int(world.group[b])
    return [
        other
        for other in range(len(world.group))
        if int(world.group[other]) == group and _judged(world, other)
    ]


def _group_advantage(world: World, b: int) -> float:
    """(verdict - mean) / std over the judged responses of the group, divisor G - 1; else 0."""
    if not _judged(world, b):
        return 0.0
    verdicts = [float(world.verdict[other]) for other in _mates(world, b)]
    if len(verdicts) < 2 or max(verdicts) == min(verdicts):
        return 0.0
    mean = sum(verdicts) / len(verdicts)
    variance = sum((verdict - mean) ** 2 for verdict in verdicts) / (len(verdicts) - 1)
    return (float(world.verdict[b]) - mean) / math.sqrt(variance)


def _advantage(world: World, b: int, t: int) -> float:
    """a = log t(y) - log s(y), a plain number."""
    return float(world.log_ratio(b, t))


# ---------------------------------------------------------------------------- place in the response


def iw_opd(world: World, *, boost: float = 0.5) -> Tensor:
    """Early tokens count more, by the share of the response's disagreement still to come.

    A_i = a_i [1 + boost (1 - F_{i-1})], F_{i-1} = sum_{j<i} |a_j| / sum_j |a_j|; -A_i log s(y_i).
    Source: IW-OPD, arXiv:2606.22600 (TRL's trainer; authors' launcher).
    """
    losses = {}
    for b in world.sequences():
        total = sum(abs(_advantage(world, b, t)) for t in world.open_places(b))
        before = 0.0
        for t in world.open_places(b):
            a = _advantage(world, b, t)
            drift = before / total if total > 0.0 else 0.0
            losses[b, t] = _score(world, b, t, a * (1.0 + boost * (1.0 - drift)))
            before += abs(a)
    return world.average(losses)


def pw_opsd(
    world: World,
    *,
    least: float = 0.25,
    centre: float = 0.30,
    width: float = 0.10,
    cap: float | None = 0.05,
) -> Tensor:
    """Late tokens count more; forward KL whose every vocabulary entry is capped.

    w_i = least + (1 - least) sigmoid(((i - 1/2) / n - centre) / width), i = 1..n;
    loss = w_i sum_v min(t(v) [log t(v) - log s(v)], cap).
    Source: PW-OPSD, arXiv:2605.21606 (authors' code; their reduction is sequence_mean).
    """
    losses = {}
    for b in world.sequences():
        places = world.open_places(b)
        for i, t in enumerate(places, start=1):
            where = (i - 0.5) / len(places)
            weight = least + (1.0 - least) / (1.0 + math.exp(-(where - centre) / width))
            losses[b, t] = weight * _capped_forward_kl(world, b, t, cap)
    return world.average(losses)


def _capped_forward_kl(world: World, b: int, t: int, cap: float | None) -> Tensor:
    """sum_v min(t(v) [log t(v) - log s(v)], cap)."""
    log_teacher, log_student = world.log_view(b, t), world.log_student(b, t)
    entries = log_teacher.exp() * (log_teacher - log_student)
    return (entries if cap is None else entries.clamp(max=cap)).sum()


def prefix_opd(world: World, *, tokens: int = 3) -> Tensor:
    """Only the first tokens of a response are looked at.

    loss = 1[t < tokens] KL(s || t), t the index within the response.
    Source: on-policy prefix distillation (FastOPD), arXiv:2602.15260.
    """
    losses = {}
    for b, t in world.places():
        if t < tokens:
            losses[b, t] = _reverse_kl(world, b, t)
    return world.average(losses)


def first_share_opd(world: World, *, share: float = 0.3) -> Tensor:
    """The sampled log ratio on the first share of every response.

    -a_i log s(y_i) for i <= max(1, floor(share n + 1/2)).
    Source: an ablation of IW-OPD, arXiv:2606.22600.
    """
    losses = {}
    for b in world.sequences():
        places = world.open_places(b)
        count = max(1, math.floor(share * len(places) + 0.5))
        for t in places[:count]:
            losses[b, t] = _score(world, b, t, _advantage(world, b, t))
    return world.average(losses)


def _overlap(world: World, b: int, t: int, k: int) -> float:
    """Share of the student's k likeliest tokens that are among the teacher's k likeliest."""
    return len(set(_student_top(world, b, t, k)) & set(_teacher_top(world, b, t, k))) / k


def prune_opd(
    world: World, *, k: int = 16, at_least: float = 0.9, drop: float = 0.02, base: float = 0.0
) -> Tensor:
    """Every place of low overlap takes a fixed amount off the weight from there on.

    n_i = #{j <= i : overlap_j < at_least}; w_i = clip(1 - drop n_i, 0, 1) + base; A = w_i a_i.
    Source: Prune-OPD, arXiv:2605.07804 (code).
    """
    losses = {}
    for b in world.sequences():
        violations = 0
        for t in world.open_places(b):
            if _overlap(world, b, t, k) < at_least:
                violations += 1
            weight = min(1.0, max(0.0, 1.0 - drop * violations)) + base
            losses[b, t] = _score(world, b, t, weight * _advantage(world, b, t))
    return world.average(losses)


# ---------------------------------------------------------------------------- choice of tokens


def tip(
    world: World,
    *,
    share: float = 0.5,
    entropy_power: float = 1.0,
    divergence_power: float = 1.0,
) -> Tensor:
    """Tokens where the student is unsure and the two disagree; the draw is replaced by a top share.

    weight_i = (H_s(i) / max H_s)^p (JSD(i) / max JSD)^q, JSD = JSD_{1/2}(s, t); KL(s || t) on the
    top share. (The code divides by log V and log 2 instead: the same order.)
    Source: TIP, arXiv:2604.14084 (authors' code, `entropy_weighted_sample`).
    """
    entropies, divergences = {}, {}
    for b, t in world.places():
        entropies[b, t] = _student_entropy(world, b, t)
        divergences[b, t] = float(_jsd(world.log_student(b, t).detach(), world.log_view(b, t)))
    top_entropy, top_divergence = max(entropies.values()), max(divergences.values())
    scores = {}
    for place in entropies:
        uncertain = entropies[place] / top_entropy if top_entropy > 0.0 else 0.0
        apart = divergences[place] / top_divergence if top_divergence > 0.0 else 0.0
        scores[place] = uncertain**entropy_power * apart**divergence_power
    kept = _top_share(scores, share)
    return world.average({(b, t): _reverse_kl(world, b, t) for b, t in sorted(kept)})


def tip_soft_or(world: World, *, share: float = 0.5) -> Tensor:
    """Tokens where the student is unsure, or sure and wrong: the selection of the paper's text.

    h, d = H_s and KL(t || s), each (x - min) / (max - min) over the step; score = h + d - h d;
    KL(s || t) on the top share.
    Source: TIP, arXiv:2604.14084 (README and two public re-implementations).
    """
    entropies, divergences = {}, {}
    for b, t in world.places():
        entropies[b, t] = _student_entropy(world, b, t)
        divergences[b, t] = float(_forward_kl(world, b, t).detach())
    scores = {}
    for place in entropies:
        h = _between(entropies[place], min(entropies.values()), max(entropies.values()))
        d = _between(divergences[place], min(divergences.values()), max(divergences.values()))
        scores[place] = h + d - h * d
    kept = _top_share(scores, share)
    return world.average({(b, t): _reverse_kl(world, b, t) for b, t in sorted(kept)})


def _between(value: float, low: float, high: float) -> float:
    """(value - low) / (high - low) within [0, 1]; 0 where low = high."""
    if abs(high - low) < 1e-12:
        return 0.0
    return min(1.0, max(0.0, (value - low) / (high - low)))


def high_entropy_opd(world: World, *, share: float = 0.2) -> Tensor:
    """Only the places where the student is least sure.

    KL(s || t) on the top share of the step by H_s.
    Source: the entropy gate of Revisiting OPD (LSM), arXiv:2603.25562; arXiv:2506.01939.
    """
    scores = {(b, t): _student_entropy(world, b, t) for b, t in world.places()}
    kept = _top_share(scores, share)
    return world.average({(b, t): _reverse_kl(world, b, t) for b, t in sorted(kept)})


def confident_wrong_opd(world: World, *, below_nats: float = 0.5, above: float = 0.5) -> Tensor:
    """Only the places where the student is sure and far from the teacher.

    KL(s || t) where H_s <= below_nats and TV(s, t) = 1/2 sum_v |s - t| > above.
    Source: the third quadrant of TIP, arXiv:2604.14084 (its own divergence is a quantile).
    """
    losses = {}
    for b, t in world.places():
        student = world.log_student(b, t).detach().exp()
        distance = 0.5 * float((student - world.log_view(b, t).exp()).abs().sum())
        if _student_entropy(world, b, t) <= below_nats and distance > above:
            losses[b, t] = _reverse_kl(world, b, t)
    return world.average(losses)


def ta_opd(world: World, *, k: int = 16, share: float = 0.05) -> Tensor:
    """Tokens of large disagreement that the student's own candidates can absorb.

    D = KL(t || s), both conditional on (student top-k) u (teacher top-k); C = t(student top-k);
    N(x) = clip((x - Q05) / (Q95 - Q05), 0, 1), quantiles over the step; score = N(D) N(C);
    -a log s(y) on the top share.
    Source: TA-OPD, arXiv:2605.26844 (authors' `tip_compat.py`).
    """
    disagreements, masses = {}, {}
    for b, t in world.places():
        own, theirs = _student_top(world, b, t, k), _teacher_top(world, b, t, k)
        union = sorted(set(own) | set(theirs))
        log_student, log_teacher = world.log_student(b, t).detach(), world.log_view(b, t)
        disagreements[b, t] = float(
            _kl(_conditional(log_teacher, union), _conditional(log_student, union))
        )
        masses[b, t] = float(log_teacher.exp()[own].sum())
    scores = {}
    for place in disagreements:
        d = _between(
            disagreements[place],
            _quantile(disagreements.values(), 0.05),
            _quantile(disagreements.values(), 0.95),
        )
        c = _between(
            masses[place], _quantile(masses.values(), 0.05), _quantile(masses.values(), 0.95)
        )
        scores[place] = d * c
    kept = _top_share(scores, share)
    return world.average(
        {(b, t): _score(world, b, t, _advantage(world, b, t)) for b, t in sorted(kept)}
    )


def ier_opd(world: World, *, k: int = 16, share: float = 0.01) -> Tensor:
    """Tokens whose one-sample gradient of the reverse KL is the least noisy.

    C = (student top-k) u (teacher top-k) u {y}; p, q = s, t given C; c = clip(log p - log q, +-30);
    L = 1/p - 1; b* = E_p[c L] / E_p[L]; signal = Var_p[c];
    noise = max(E_p[(c - b*)^2 L] - signal, 0); IER = signal / max(noise, 1e-8);
    -a log s(y) on the top share by IER. (L is ||grad log p||^2 in the Fisher metric.)
    Source: IER-OPD, arXiv:2609.24432 (authors' `ier_metrics.py`).
    """
    scores = {}
    for b, t in world.places():
        support = sorted(
            set(_student_top(world, b, t, k))
            | set(_teacher_top(world, b, t, k))
            | {int(world.tokens[b, t])}
        )
        log_p = _conditional(world.log_student(b, t).detach(), support)
        log_q = _conditional(world.log_view(b, t), support)
        p = [float(x) for x in log_p.exp()]
        c = [min(30.0, max(-30.0, float(x))) for x in log_p - log_q]
        length = [1.0 / max(x, 1e-8) - 1.0 for x in p]
        mean = sum(p[v] * c[v] for v in range(len(p)))
        signal = sum(p[v] * (c[v] - mean) ** 2 for v in range(len(p)))
        mean_length = sum(p[v] * length[v] for v in range(len(p)))
        baseline = mean
        if mean_length > 1e-8:
            baseline = sum(p[v] * c[v] * length[v] for v in range(len(p))) / mean_length
        second = sum(p[v] * (c[v] - baseline) ** 2 * length[v] for v in range(len(p)))
        noise = max(second - signal, 0.0)
        scores[b, t] = signal / max(noise, 1e-8)
    kept = _top_share(scores, share)
    return world.average(
        {(b, t): _score(world, b, t, _advantage(world, b, t)) for b, t in sorted(kept)}
    )


def suppress_unlikely(world: World, *, share: float = 0.2) -> Tensor:
    """A control without a teacher: push down the student's least likely choices.

    A = -1 on the share of the step's open tokens of smallest log s(y): loss = +log s(y).
    Source: Does OPD really distil? (OPSA's fixed mode), arXiv:2608.31046 (authors' code).
    """
    scores = {(b, t): -float(_log_chosen(world, b, t).detach()) for b, t in world.places()}
    kept = _top_share(scores, share)
    return world.average({(b, t): _score(world, b, t, -1.0) for b, t in sorted(kept)})


# ---------------------------------------------------------------------------- whole responses


def fire_opd(
    world: World,
    *,
    drop_share: float = 0.2,
    teacher_gain: float = 1.0,
    entropy_gain: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    """Leave out the responses the teacher likes least, then weigh tokens by two entropies.

    Keep b where m_b = mean_t log t(y_t) >= the drop_share quantile of m (linear interpolation);
    w = (1 + teacher_gain (1 - H_t / max H_t)) (1 + entropy_gain H_s / max H_s), maxima over the
    step, divided by its mean over all open tokens of the step; on kept responses A = w a and
    -min(r A, clip(r, 1 - low, 1 + high) A), on the others nothing.
    Source: FiRe-OPD, arXiv:2606.02684 (authors' `dp_actor.py`).
    """
    fondness = {}
    for b in world.sequences():
        places = world.open_places(b)
        fondness[b] = sum(
            float(world.log_view(b, t)[int(world.tokens[b, t])]) for t in places
        ) / len(places)
    threshold = _quantile(fondness.values(), drop_share)
    top_teacher = max(max(_teacher_entropy(world, b, t) for b, t in world.places()), 1e-6)
    top_student = max(max(_student_entropy(world, b, t) for b, t in world.places()), 1e-6)
    weights = {}
    for b, t in world.places():
        confident = 1.0 - _teacher_entropy(world, b, t) / top_teacher
        confused = _student_entropy(world, b, t) / top_student
        weights[b, t] = (1.0 + teacher_gain * confident) * (1.0 + entropy_gain * confused)
    mean = sum(weights.values()) / len(weights)
    losses = {}
    for b, t in world.places():
        if fondness[b] >= threshold:
            advantage = weights[b, t] / mean * _advantage(world, b, t)
            losses[b, t] = _clipped(world, b, t, advantage, low, high)
    return world.average(losses)


def renio(
    world: World,
    *,
    threshold: float = 0.8,
    temperature: float = 1.0,
    cap: float = 10.0,
    ratio_cap: float | None = 2.5,
    beta: float = 0.5,
) -> Tensor:
    """Responses in which the student went where the teacher would not count more.

    r = min(log s(y) - log t(y), ratio_cap); omega_b = exp(mean of r over {r >= threshold} / temp.)
    (1 where there is none); W_b = min(omega_b / mean omega, cap); loss = W_b JSD_beta.
    Source: ReNIO, arXiv:2606.23104 (authors' `opsd_trainer.py`; their launchers have beta = 0).
    """
    omegas = {}
    for b in world.sequences():
        ratios = [-_advantage(world, b, t) for t in world.open_places(b)]
        if ratio_cap is not None:
            ratios = [min(ratio, ratio_cap) for ratio in ratios]
        pivotal = [ratio for ratio in ratios if ratio >= threshold]
        omegas[b] = math.exp(sum(pivotal) / max(len(pivotal), 1) / temperature)
    mean = sum(omegas.values()) / len(omegas)
    losses = {}
    for b, t in world.places():
        weight = min(omegas[b] / mean, cap)
        losses[b, t] = weight * _jsd(world.log_student(b, t), world.log_view(b, t), beta)
    return world.average(losses)


def paced(world: World, *, a: float = 1.0, b: float = 1.0, reverse_share: float = 0.0) -> Tensor:
    """Prompts that the student sometimes solves count most.

    w = rho^a (1 - rho)^b, rho the share of judged responses of the prompt that are right (w = 0
    where none is judged); w [(1 - reverse_share) KL(t || s) + reverse_share KL(s || t)].
    Source: PACED, arXiv:2603.11178 (authors' README; paper text by a third party).
    """
    forward, reverse = {}, {}
    for response, t in world.places():
        mates = _mates(world, response)
        weight = 0.0
        if mates:
            rate = sum(1.0 for mate in mates if _right(world, mate)) / len(mates)
            weight = rate**a * (1.0 - rate) ** b
        forward[response, t] = weight * _forward_kl(world, response, t)
        reverse[response, t] = weight * _reverse_kl(world, response, t)
    return (1.0 - reverse_share) * world.average(forward) + reverse_share * world.average(reverse)


def uni_opd(world: World, *, margin: float = 0.0, direction: str = "correct_up") -> Tensor:
    """Right answers of a prompt must look better to the teacher than wrong ones, by a margin.

    gap = mean over right responses of mean_t a - the same over wrong ones; where both exist and
    gap < margin, shift = margin - gap: `correct_up` adds it to every a of the right responses,
    `incorrect_down` takes it off the wrong ones, `both` does half of each; -A log s(y).
    Source: Uni-OPD, arXiv:2605.03677 (authors' `margin_shift.py`, scope group, mode mean).
    """
    means = {}
    for b in world.sequences():
        places = world.open_places(b)
        means[b] = sum(_advantage(world, b, t) for t in places) / len(places)
    losses = {}
    for b, t in world.places():
        group = [mate for mate in _mates(world, b) if mate in means]
        right = [means[mate] for mate in group if _right(world, mate)]
        wrong = [means[mate] for mate in group if _wrong(world, mate)]
        shift = 0.0
        if right and wrong:
            gap = sum(right) / len(right) - sum(wrong) / len(wrong)
            shift = max(0.0, margin - gap)
        advantage = _advantage(world, b, t)
        if _right(world, b):
            advantage += {"correct_up": 1.0, "incorrect_down": 0.0, "both": 0.5}[direction] * shift
        if _wrong(world, b):
            advantage -= {"correct_up": 0.0, "incorrect_down": 1.0, "both": 0.5}[direction] * shift
        losses[b, t] = _score(world, b, t, advantage)
    return world.average(losses)


# ---------------------------------------------------------------------------- who wrote the token


def trd(world: World) -> Tensor:
    """Full forward KL along the teacher's rewrite of the student's attempt.

    KL(t || s) on every token of the (rewritten) response.
    Source: TRD, arXiv:2606.08432 (authors' `kl_utils.py`, `forward_kl_y_r.sh`).
    """
    return world.average({(b, t): _forward_kl(world, b, t) for b, t in world.places(ANYBODY)})


def relay_opd(world: World) -> Tensor:
    """The sampled log ratio along text that student and teacher wrote in turns, on both.

    -a log s(y) on rows of STUDENT and TEACHER.
    Source: Relay-OPD, arXiv:2607.26057 (authors' README: k1 on student and teacher legs).
    """
    kinds = (STUDENT, TEACHER)
    losses = {(b, t): _score(world, b, t, _advantage(world, b, t)) for b, t in world.places(kinds)}
    return world.average(losses, kinds)


def lightning_opd(world: World) -> Tensor:
    """The sampled log ratio on rollouts fixed beforehand, at the current weights.

    A = a, -A log s(y) on rows of DATA.
    Source: Lightning OPD, arXiv:2604.13010 (EasyOPD's advantage estimator; abstract).
    """
    kinds = (DATA,)
    losses = {(b, t): _score(world, b, t, _advantage(world, b, t)) for b, t in world.places(kinds)}
    return world.average(losses, kinds)


def edge_opd(world: World, *, reference_coef: float = 0.01) -> Tensor:
    """Only the tokens the better-informed teacher makes likelier, held to the first policy.

    -max(a, 0) log s(y) + reference_coef KL(s || reference).
    Source: EDGE-OPD, arXiv:2605.23493 (a note, which prints 1[a > 0]; strength by a inferred).
    """
    evidence, anchor = {}, {}
    for b, t in world.places():
        evidence[b, t] = _score(world, b, t, max(_advantage(world, b, t), 0.0))
        anchor[b, t] = _reverse_kl(world, b, t, "reference")
    return world.average(evidence) + reference_coef * world.average(anchor)


# ---------------------------------------------------------------------------- with a verifier


def grpo(world: World, *, low: float = 0.2, high: float = 0.2) -> Tensor:
    """A control without a teacher: clipped policy gradient with the group's advantage.

    -min(r A_g, clip(r, 1 - low, 1 + high) A_g).
    Source: GRPO, arXiv:2402.03300.
    """
    losses = {}
    for b, t in world.places():
        losses[b, t] = _clipped(world, b, t, _group_advantage(world, b), low, high)
    return world.average(losses)


def trace(
    world: World,
    *,
    outcome_coef: float = 1.0,
    forward_coef: float = 1.0,
    reverse_coef: float = 1.0,
    span_outcome: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
    cap: float | None = None,
) -> Tensor:
    """Distil the marked spans only, by the verdict; the verifier teaches the rest.

    forward_coef KL(t || s) where span != 0 and right + reverse_coef KL(s || t) where span != 0 and
    wrong + outcome_coef GRPO, times span_outcome within spans; KL entries capped at `cap`.
    Source: TRACE, arXiv:2605.10194 (detailed third-party note on the paper).
    """
    span = world.extra["span"]
    forward, reverse, outcome = {}, {}, {}
    for b, t in world.places():
        inside = float(span[b, t]) != 0.0
        if inside and _right(world, b):
            forward[b, t] = _capped_forward_kl(world, b, t, cap)
        if inside and _wrong(world, b):
            log_student, log_teacher = world.log_student(b, t), world.log_view(b, t)
            entries = log_student.exp() * (log_student - log_teacher)
            reverse[b, t] = (entries if cap is None else entries.clamp(max=cap)).sum()
        share = span_outcome if inside else 1.0
        outcome[b, t] = share * _clipped(world, b, t, _group_advantage(world, b), low, high)
    return (
        forward_coef * world.average(forward)
        + reverse_coef * world.average(reverse)
        + outcome_coef * world.average(outcome)
    )


def egrsd(
    world: World,
    *,
    nats: float = 1.0,
    floor: float = 0.0,
    low: float = 0.2,
    high: float = 0.2,
    ratio_low: float = 0.2,
    ratio_high: float = 0.2,
) -> Tensor:
    """The verifier gives the direction, the teacher the size, the teacher's entropy the trust.

    A = g A_g clip(exp(sign(A_g) a), 1 - low, 1 + high), g = 1 where H_t <= nats, else floor;
    -min(r A, clip(r, 1 - ratio_low, 1 + ratio_high) A).
    Source: EGRSD, arXiv:2605.13255 (abstract; the gate's shape is inferred, it has a floor > 0).
    """
    losses = {}
    for b, t in world.places():
        outcome = _group_advantage(world, b)
        sign = (outcome > 0.0) - (outcome < 0.0)
        size = min(1.0 + high, max(1.0 - low, math.exp(sign * _advantage(world, b, t))))
        gate = 1.0 if _teacher_entropy(world, b, t) <= nats else floor
        losses[b, t] = _clipped(world, b, t, gate * outcome * size, ratio_low, ratio_high)
    return world.average(losses)

"""Methods that treat some tokens one way and the rest another."""

from __future__ import annotations

import math
from functools import partial

from opd.formula import (
    divergence,
    response,
    reward,
    routing,
    selection,
    support,
    weight,
)
from opd.methods.parts import check_option, clipped
from opd.objective import Dense, Method, Objective, Routed, Sampled
from opd.schedule import Cosine, Linear, Schedule, Step
from opd.types import Bound, StateSource

GUIDANCE = Cosine(0.001, 0.0, 200)
FORWARD_FIRST = Step(1.0, 0.0, 100)
REVERSE_LATER = Step(0.0, 1.0, 100)
LONGER_LATER = Linear(16, 64, 100)


def tide(
    *,
    k: int = 16,
    excess_share: float | Schedule = 0.2,
    deficit_share: float | Schedule = 0.2,
    deficit_coef: float | Schedule = 1.0,
) -> Method:
    """The most overrated tokens pushed down gently; where most is missed, the teacher imitated.

        L = mean over tokens of -[among the most negative a_t] * 2 (exp(a_t / 2) - 1)
            * log student(y_t) + c * [among the largest D_t] * D_t
        a_t = log teacher - log student,  D_t = KL(teacher | its top k || student)

    Everywhere else nothing. The first part is the policy gradient of the squared Hellinger
    distance, four times over. At teacher = student the second part still pulls mass into the
    support, unless the teacher has none outside.

    Args:
        k: how many of the teacher's likeliest tokens are imitated.
        excess_share, deficit_share: of the step's tokens that each part keeps.
        deficit_coef: c.

    Source: TIDE, arXiv:2608.09836, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher's conditional
    Settings: k 16, shares 0.2, c 1 (0.25 to 2 tried), learning rate 1e-6, 64 prompts x 4 samples.
    Departures: a divergence in place of a cross-entropy, equal in gradient; counts in place of
        quantiles; without ratios, which are 1 at the first update.
    Failure: the selection alone lengthens responses; the imitation shortens them.
    """
    imitated = Bound.of(support.teacher_top_k).with_knobs(k=k)
    return Method(
        Objective(
            Sampled(
                reward=partial(reward.alpha_divergence_reward, alpha=0.5),
                weights=(Bound.of(selection.keep_overrated).with_knobs(share=excess_share),),
                name="excess",
            ),
            Dense(
                divergence=divergence.forward_kl,
                support=imitated,
                tail="teacher_renormalise",
                weights=(
                    Bound.of(selection.keep_large_forward_kl).with_knobs(share=deficit_share),
                ),
                coef=deficit_coef,
                name="deficit",
            ),
        ),
        name="tide",
    )


def aopd(*, k: int | Schedule = 20) -> Method:
    """A token that is to become likelier is scored; at the others the teacher says what instead.

        L = mean over tokens of [a_t > 0] * -a_t log student(y_t)
          + [a_t <= 0] * KL(teacher | its top k || student)(prefix)
        a_t = log teacher(y_t) - log student(y_t)

    At teacher = student a_t is 0, so the second part acts: it pulls mass into the support.

    Args:
        k: how many of the teacher's likeliest tokens are imitated.

    Source: AOPD, arXiv:2605.06387.
    Evidence: E0
    Formula: note
    Stationary: teacher's conditional
    Settings: k not found; 1.5 B and 7 B students.
    Departures: one mean over all tokens, where the source averages within each response; whether it
        renormalises the teacher is not known.
    Failure: the jump between the two parts at a_t = 0.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                weights=(weight.positive_advantage,),
                name="pull",
            ),
            Dense(
                divergence=divergence.forward_kl,
                support=Bound.of(support.teacher_top_k).with_knobs(k=k),
                tail="teacher_renormalise",
                weights=(partial(weight.negative_advantage, of="pull"),),
            ),
        ),
        name="aopd",
    )


def eopd(
    *,
    k: int | Schedule = 16,
    nats: float = 0.8,
    forward_coef: float | Schedule = 1.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Method:
    """The sampled log-ratio, and a forward KL as well where the teacher is undecided.

        L = mean over tokens of -min(r a_t, clip(r) a_t) + c * [H(teacher) > nats]
            * sum_{v in S} teacher(v) (log teacher(v) - log student(v)),  S = teacher's top k

    There a reverse KL would keep one of several modes. The sum is of raw entries and of either
    sign; at teacher = student the gradient is that of minus the teacher's mass on the support.

    Args:
        k: how many of the teacher's likeliest tokens are imitated.
        nats: how undecided the teacher must be.
        forward_coef: c.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: EOPD, arXiv:2603.07079, as audited from its code by others.
    Evidence: E0
    Formula: note
    Stationary: raw entries
    Settings: k 16, 0.8 nats, c 1.
    Departures: the clip range was not found.
    Failure: a replication with long rollouts ended in text that never stops: there the gate is
        closed and the loss near 0.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                surrogate=clipped(low, high),
            ),
            Dense(
                divergence=divergence.forward_kl,
                support=Bound.of(support.teacher_top_k).with_knobs(k=k),
                tail="truncate",
                weights=(partial(weight.teacher_entropy_above, nats=nats),),
                coef=forward_coef,
                name="cover",
            ),
        ),
        name="eopd",
    )


def tropd(
    *,
    k: int | Schedule = 64,
    guidance_coef: float | Schedule = GUIDANCE,
    teacher_prefix: int | Schedule = 8,
) -> Method:
    """The log-ratio where the teacher would accept the token, a forward KL where it would not.

        L = mean over the student's tokens of P * -a_t log student(y_t)
            + (1 - P) * sum_{v in S} teacher(v) (log teacher(v) - log student(v))
          + c * mean over the teacher's tokens of KL(teacher || student)
        P = min(teacher(y_t) / student(y_t), 1),  S = teacher's top k

    At teacher = student P is 1 and every part is zero.

    Args:
        k: how many of the teacher's likeliest tokens are imitated.
        guidance_coef: c, of the prefix that the teacher writes.
        teacher_prefix: how many tokens the teacher writes first.

    Source: TrOPD, arXiv:2606.01249.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: k 64, c 0.001 falling to 0, learning rate 5e-6, 128 prompts x 4 samples, 200 steps.
    Departures: the shares P and 1 - P, where the paper draws one of the two; a divergence on the
        teacher's prefix, where the paper takes the likelihood of its tokens; the length of the
        prefix is ours.
    Failure: a forward KL on every token fails in the paper; masking outliers loses to teaching
        them.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                weights=(weight.trust,),
                rows="student",
                name="inside",
            ),
            Dense(
                divergence=divergence.forward_kl,
                support=Bound.of(support.teacher_top_k).with_knobs(k=k),
                tail="truncate",
                weights=(weight.distrust,),
                rows="student",
                name="outside",
            ),
            Dense(
                divergence=divergence.forward_kl,
                rows="teacher",
                coef=guidance_coef,
                name="guidance",
            ),
        ),
        states=StateSource(student=1.0, teacher_prefix=teacher_prefix),
        name="tropd",
    )


def cr_opd(*, teacher_k: int = 8, student_k: int = 8) -> Method:
    """Where a token is suppressed, its mass moves to tokens that the teacher endorses.

        L = -a_t log student(y_t) where a_t > 0 or nobody may receive, else the route:
            amount * sum_v r(v) * softplus(log student(y_t) - log student(v))
        r shares the amount among the teacher's top tokens within the student's reach

    The survey's second proposal. Plain suppression hands the mass out in proportion to the
    student's own probabilities. With teacher = student every advantage is zero.

    Args:
        teacher_k: among how many of the teacher's likeliest tokens a receiver must be.
        student_k: among how many of the student's.

    Source: Eqs. 31 to 36 of arXiv:2606.22793.
    Evidence: E3
    Formula: paper
    Stationary: teacher
    Settings: none published.
    Departures: pairwise logistic transfer, the score centred on both sides' likeliest tokens.
    Failure: a receiver out of the student's reach, or a teacher that is wrong about what is better.
    """
    return Method(
        Objective(
            Routed(
                source=Sampled(reward=reward.teacher_log_ratio),
                support=partial(support.routing_support, teacher_k=teacher_k, student_k=student_k),
                tail="renormalise",
                candidates=partial(
                    routing.endorsed_and_reachable, teacher_k=teacher_k, student_k=student_k
                ),
                gates=(
                    weight.negative_advantage,
                    routing.overrated,
                    routing.has_candidates,
                ),
            )
        ),
        name="cr_opd",
    )


def tip(
    *,
    share: float | Schedule = 0.5,
    entropy_power: float = 1.0,
    divergence_power: float = 1.0,
) -> Method:
    """Reverse KL on the tokens where the student is undecided and differs from the teacher.

        L = mean over tokens of [in the top share by H^a * D^b] * KL(student || teacher)(prefix)
        H: student's entropy,  D: Jensen-Shannon divergence,  each relative to the step's largest

    With teacher = student, loss and gradient are zero.

    Args:
        share: of the step's tokens.
        entropy_power, divergence_power: a and b.

    Source: TIP, arXiv:2604.14084, from its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: share 0.5 (0.2 too), 8 samples per prompt.
    Departures: the largest scores, where the code draws tokens by them; the mean is over all
        tokens, where the code takes those drawn.
    Failure: a product leaves out tokens of which the student is sure and wrong: `tip_soft_or`.
    """
    gate = Bound.of(selection.keep_uncertain_or_wrong).with_knobs(
        share=share, entropy_power=entropy_power, divergence_power=divergence_power
    )
    return Method(Objective(Dense(divergence=divergence.reverse_kl, weights=(gate,))), name="tip")


def tip_soft_or(*, share: float | Schedule = 0.5) -> Method:
    """Reverse KL on the tokens where the student is undecided, or decided against the teacher.

        L = mean over tokens of [in the top share by h + d - h d] * KL(student || teacher)(prefix)
        h, d: student's entropy and KL(teacher || student), scaled to [0, 1] over the step

    With teacher = student, loss and gradient are zero.

    Args:
        share: of the step's tokens.

    Source: TIP, arXiv:2604.14084, its paper as re-implemented by others.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: share 0.5.
    Departures: the mean is over all tokens.
    Failure: one outlier stretches the scale of all others.
    """
    gate = Bound.of(selection.keep_soft_or).with_knobs(share=share)
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl, weights=(gate,))), name="tip_soft_or"
    )


def confident_wrong_opd(*, below_nats: float = 0.5, above: float = 0.5) -> Method:
    """Reverse KL only where the student is sure of something that the teacher disputes.

        L = mean over tokens of [H(student) <= below_nats and TV(student, teacher) > above]
            * KL(student || teacher)(prefix)

    With teacher = student, loss and gradient are zero.

    Args:
        below_nats: how sure the student must be.
        above: how much mass must be in dispute, in [0, 1].

    Source: one quadrant of TIP, arXiv:2604.14084, fewer than a tenth of the tokens there.
    Evidence: E0
    Formula: inferred
    Stationary: teacher
    Settings: none.
    Departures: thresholds of ours, where the paper splits by quantiles.
    Failure: nothing is learnt where the student is undecided.
    """
    check_option("above", above, 0.0, 1.0)
    gate = partial(weight.confident_wrong, below_nats=below_nats, above=above)
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl, weights=(gate,))),
        name="confident_wrong_opd",
    )


def prefix_opd(*, tokens: int = 32) -> Method:
    """Reverse KL at the first tokens, and a rollout that ends there.

        L = mean over the first `tokens` tokens of KL(student || teacher)(prefix)

    With teacher = student, loss and gradient are zero.

    Args:
        tokens: how many are written and taught.

    Source: prefix distillation, arXiv:2602.15260.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: the length grows over training in the paper's best variant: `growing_prefix_opd`.
    Departures: whether the paper takes the whole vocabulary or one sample is not settled.
    Failure: what comes late in a response is not taught.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.reverse_kl, weights=(partial(weight.prefix, tokens=tokens),)
            )
        ),
        states=StateSource(student=1.0, horizon=tokens),
        name="prefix_opd",
    )


def growing_prefix_opd(*, horizon: int | Schedule = LONGER_LATER) -> Method:
    """Reverse KL on rollouts that may be longer as training goes on.

        L = mean over tokens of KL(student || teacher)(prefix),  at most horizon tokens each

    With teacher = student, loss and gradient are zero.

    Args:
        horizon: in tokens; a schedule.

    Source: POPD, arXiv:2605.31490.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: about a third of the cost; 10 % of the length, for good, matched full rollouts.
    Departures: the schedule is ours.
    Failure: the end of long responses is taught last or never.
    """
    check_option("horizon", horizon, 1, math.inf)
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl)),
        states=StateSource(student=1.0, horizon=horizon),
        name="growing_prefix_opd",
    )


def paced(
    *,
    pass_power: float = 1.0,
    fail_power: float = 1.0,
    forward_coef: float | Schedule = FORWARD_FIRST,
    reverse_coef: float | Schedule = REVERSE_LATER,
) -> Method:
    """A forward KL, later a reverse KL, on prompts that the student solves now and then.

        L = mean over tokens of rate^a (1 - rate)^b
            * (c_f * KL(teacher || student) + c_r * KL(student || teacher))
        rate: share of the prompt's samples that pass

    With teacher = student, loss and gradient are zero.

    Args:
        pass_power, fail_power: a and b.
        forward_coef, reverse_coef: c_f and c_r; by default one follows the other.

    Source: PACED, arXiv:2603.11178.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: a = b = 1; the first stage on the data's text in the paper.
    Departures: both stages on the student's text.
    Failure: prompts that are never solved are never taught.
    """
    gate = partial(response.difficulty, pass_power=pass_power, fail_power=fail_power)
    return Method(
        Objective(
            Dense(divergence=divergence.forward_kl, weights=(gate,), coef=forward_coef),
            Dense(divergence=divergence.reverse_kl, weights=(gate,), coef=reverse_coef),
        ),
        name="paced",
    )


def renio(
    *,
    at_least: float = 1.0,
    ratio_cap: float = 2.0,
    temperature: float = 1.0,
    weight_cap: float = 10.0,
    teacher_weight: float = 0.5,
) -> Method:
    """A Jensen-Shannon divergence, more of it on responses with tokens the student overrates.

        L = mean over responses of w * D,  w = exp(mean of log student - log teacher over the
            response's pivotal tokens, / temperature), relative to the step's mean

    With teacher = student, loss and gradient are zero.

    Args:
        at_least, ratio_cap, temperature, weight_cap: as in `pivotal`.
        teacher_weight: of the divergence.

    Source: ReNIO, arXiv:2606.23104, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: 1.0 and 2.0 for another teacher, 0.8 and 2.5 for a privileged self; learning rate
        5e-6.
    Departures: a Jensen-Shannon divergence, where the shipped scripts take a forward KL whose
        entries are cut at 0.05.
    Failure: without the cut on the ratio one token decides a response's weight.
    """
    gate = partial(
        response.pivotal,
        at_least=at_least,
        ratio_cap=ratio_cap,
        temperature=temperature,
        weight_cap=weight_cap,
    )
    return Method(
        Objective(
            Dense(
                divergence=partial(divergence.generalized_jsd, teacher_weight=teacher_weight),
                weights=(gate,),
                reduction="sequence_mean",
            )
        ),
        name="renio",
    )


def fire_opd(
    *,
    drop_share: float = 0.2,
    teacher_gain: float = 1.0,
    student_gain: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Method:
    """The log-ratio, without the responses the teacher finds unlikely, more where it is sure.

        L = mean over tokens of -[response kept] * w_t * min(r a_t, clip(r) a_t)
        w_t = (1 + a (1 - H(teacher) / max)) (1 + b H(student) / max) / mean

    With teacher = student every advantage is zero.

    Args:
        drop_share: of the step's responses, by the teacher's mean log-probability.
        teacher_gain, student_gain: a and b.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: FiRe-OPD, arXiv:2606.02684, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: 0.2, gains 1, learning rate 1e-6, batch 1,024, one sample per prompt.
    Departures: the denominator counts the tokens of dropped responses too.
    Failure: what the teacher finds unlikely may be where it could help most.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                surrogate=clipped(low, high),
                weights=(
                    partial(response.likely_for_teacher, drop_share=drop_share),
                    partial(
                        weight.confidence, teacher_gain=teacher_gain, student_gain=student_gain
                    ),
                ),
            )
        ),
        name="fire_opd",
    )


def trd() -> Method:
    """A forward KL along what the teacher made of the student's wrong responses.

        L = mean over the teacher's tokens of KL(teacher || student)(prefix)

    The teacher writes a response anew that the verifier rejects. Responses that pass teach nothing.
    With teacher = student, loss and gradient are zero.

    Source: TRD, arXiv:2606.08432, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: not found.
    Departures: the teacher answers the prompt, where in the code it may see the student's attempt
        and the solution.
    Failure: text the student would not write; a reproduction finds it below plain distillation for
        small students.
    """
    return Method(
        Objective(Dense(divergence=divergence.forward_kl, rows="teacher")),
        states=StateSource(student=1.0, rewrite=1.0),
        name="trd",
    )

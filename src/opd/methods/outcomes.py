"""Methods in which a verifier has a say beside the teacher."""

from __future__ import annotations

import math
from functools import partial

from opd.formula import divergence, outcome, response, reward, surrogate, weight
from opd.methods.parts import TEACHER, check_option, clipped
from opd.objective import Dense, Method, Objective, Sampled
from opd.schedule import Linear, Schedule
from opd.types import Bound, StateSource

FADING_COEF = Linear(0.005, 0.001, 80)
TO_THE_VERDICT = Linear(0.0, 1.0, 150)


def kdrl(*, kl_coef: float | Schedule = 0.002, low: float = 0.2, high: float = 0.2) -> Method:
    """The verifier's gradient plus a little of the teacher's reverse KL, by its k2 estimator.

        L = GRPO's clipped loss
          + c * mean over tokens of 1/2 (log student(y_t) - log teacher(y_t))^2

    Args:
        kl_coef: c.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: KDRL, arXiv:2506.02208, as its notes and a re-implementation have it.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: c 0.002, or from 0.005 to 0.001 by 5e-5 a step.
    Departures: none known; AReaL's method of this name back-propagates k1, in which the teacher
        drops out.
    Failure: the sign of the whole hangs on c.
    """
    return Method(
        Objective(
            Sampled(reward=reward.group_advantage, surrogate=clipped(low, high), name="verdict"),
            Dense(divergence=divergence.reverse_kl_k2, coef=kl_coef),
        ),
        name="kdrl",
    )


def mimo_mopd(*, outcome_scale: float = 1.0, low: float = 0.5, high: float = 2.0) -> Method:
    """The log-ratio plus the group-normalised verdict, where engine and student agree.

        L = mean over tokens of -w * (a_t + scale * A_group) * log student(y_t)
        w = student(y_t) / sampler(y_t) where that is within [low, high], else 0

    Args:
        outcome_scale: what one standard deviation of the verdicts is worth, in nats.
        low, high: smallest and largest ratio that counts.

    Source: MiMo-V2-Flash, arXiv:2601.02780.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: bounds and scale not found.
    Departures: one teacher, where the report routes each domain to its own; one mean over all
        tokens.
    Failure: what falls outside the bounds is lost.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                outcome=(partial(outcome.add_group_advantage, scale=outcome_scale),),
                surrogate=partial(surrogate.masked_importance, low=low, high=high),
            )
        ),
        name="mimo_mopd",
    )


def atod(
    *, share: float | Schedule = TO_THE_VERDICT, low: float = 0.2, high: float = 0.2
) -> Method:
    """From the teacher's log-ratio to the verifier's verdict, step by step.

        A_t = (1 - share) * a_t + share * A_group,  share rising from 0 to 1

    Args:
        share: of the verdict.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: ATOD, arXiv:2606.27814.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: 150 steps.
    Departures: turns of a dialogue are not weighted; the clipped ratio is ours.
    Failure: a switch that comes too fast loses what was learnt.
    """
    mixed = Bound.of(outcome.mix_group_advantage).with_knobs(share=share)
    return Method(
        Objective(
            Sampled(reward=reward.teacher_log_ratio, outcome=(mixed,), surrogate=clipped(low, high))
        ),
        name="atod",
    )


def opdvr() -> Method:
    """Only those log-ratios that point the way of the verdict.

        A_t = z * max(z * a_t, 0),  z = 1 where the response is right, -1 where it is wrong

    With teacher = student every advantage is zero, and at other points too.

    Source: OPDVR, arXiv:2608.24696.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: learning rate 1e-6, batch 256, one update.
    Departures: none known.
    Failure: nothing beyond the teacher can be learnt; about half the tokens are closed.
    """
    return Method(
        Objective(Sampled(reward=reward.teacher_log_ratio, outcome=(outcome.agree_in_sign,))),
        name="opdvr",
    )


def r2_opd(*, sharpness: float = 0.001) -> Method:
    """Log-ratios weighted towards the verdict, at equal total size in each response.

        A_t = Z * g_t * a_t,  g_t = sigmoid(b * z * a_t / median |a|),  Z = sum |a| / sum g |a|
        z = 1 where the response is right, -1 where it is wrong,  b = sharpness

    With teacher = student every advantage is zero.

    Args:
        sharpness: b, > 0; `opdvr` up to Z as it grows, `sampled_token_opd` as it falls to 0.

    Source: R2-OPD, Eqs. 7 and 13 to 16 of arXiv:2609.35517.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: b 0.001 (up to 0.1 alike), learning rate 1e-6, 64 samples per prompt, batch 256.
    Departures: none known.
    Failure: b of 1 and more is worse, and so is leaving out Z.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                outcome=(partial(outcome.agreement_gate, sharpness=sharpness),),
            )
        ),
        name="r2_opd",
    )


def sg_opd(*, agreeing: float = 1.8, other: float = 1.0) -> Method:
    """Log-ratios amplified where they agree with the verdict, damped where not.

        A_t = agreeing * a_t where z * a_t > 0, other * a_t elsewhere

    With teacher = student every advantage is zero.

    Args:
        agreeing, other: factors.

    Source: SG-OPD, arXiv:2606.09304.
    Evidence: E0
    Formula: inferred
    Stationary: teacher
    Settings: 1.8 and 1.0, as OPDVR's authors reproduce it.
    Departures: the symbols are ours; early rollouts by the teacher are left out.
    Failure: biased for every divergence.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                outcome=(partial(outcome.agreement_scale, agreeing=agreeing, other=other),),
            )
        ),
        name="sg_opd",
    )


def ra_opd() -> Method:
    """Log-ratios of the responses on which teacher and verifier agree as a whole.

        L = mean over tokens of -[z * sum_t a_t >= 0] * a_t * log student(y_t)

    With teacher = student every advantage is zero.

    Source: RA-OPD, arXiv:2608.27960.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: not found.
    Departures: the denominator counts the tokens of dropped responses too.
    Failure: drops whole responses for a few tokens.
    """
    return Method(
        Objective(
            Sampled(reward=reward.teacher_log_ratio, weights=(response.agrees_with_verdict,))
        ),
        name="ra_opd",
    )


def gc_opd(
    *, scale: float = 0.1, limit: float = 10.0, low: float = 0.2, high: float = 0.2
) -> Method:
    """The log-ratio plus what the verifier knows of the response and the teacher does not.

        A_t = clip(a_t + scale * (1 + tanh(u_t / 2)) * (z(verdict) - z(mean a)), -limit, limit)

    z: in standard deviations within the prompt; u: of a_t within the response. With teacher =
    student there is nothing to rank by, and every advantage is zero.

    Args:
        scale, limit: in nats.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: GC-OPD, arXiv:2608.19181, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: scale 0.1, limit 10, 32 prompts x 8 samples, 100 steps, learning rate 1e-6.
    Departures: a response without tokens is left out of the teacher's ranking.
    Failure: an even share of the residual is worse.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                outcome=(partial(outcome.add_verdict_residual, scale=scale, limit=limit),),
                surrogate=clipped(low, high),
            )
        ),
        name="gc_opd",
    )


def uni_opd(*, margin: float = 0.4, correct_share: float = 0.5) -> Method:
    """Log-ratios shifted until the prompt's correct responses lead by a margin.

        A_t = a_t + c * gap where right,  a_t - (1 - c) * gap where wrong
        gap = max(0, margin - (mean a of right - mean a of wrong responses))

    At teacher = student the gap is the margin.

    Args:
        margin: in nats per token.
        correct_share: c.

    Source: Uni-OPD, arXiv:2605.03677, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher, without verdicts
    Settings: margin 0.4, both directions, by prompt.
    Departures: batches are not balanced by difficulty; one teacher.
    Failure: pushes whole responses, long ones more.
    """
    check_option("margin", margin, 0.0, math.inf)
    shift = partial(outcome.margin_shift, margin=margin, correct_share=correct_share)
    return Method(
        Objective(Sampled(reward=reward.teacher_log_ratio, outcome=(shift,))),
        name="uni_opd",
    )


def scope(*, temperature: float = 1.0) -> Method:
    """Right responses reinforced, unusual ones most; wrong ones corrected where the teacher knows.

        L = mean over responses of sum over tokens of
            -w * r where right,  -w * r * a_t where wrong;  r = student / old, the ratio
        w: the prompt's right responses share 1 by perplexity under the student, its wrong ones
           share 1 by the inverse of the perplexity under the teacher

    Args:
        temperature: of both shares, > 0.

    Source: SCOPE, arXiv:2604.10688, section 3.
    Evidence: E0
    Formula: paper
    Stationary: teacher, without verdicts
    Settings: temperature 1, batch 256, 12,288 tokens, sampled at 0.6.
    Departures: a mean over responses, where the paper sums over those of a prompt.
    Failure: without the routing pass@1 rises and pass@k falls.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.one,
                surrogate=surrogate.importance,
                weights=(partial(response.share_of_correct, temperature=temperature),),
                reduction="sequence_sum",
                name="right",
            ),
            Sampled(
                reward=reward.teacher_log_ratio,
                surrogate=surrogate.importance,
                weights=(partial(response.share_of_wrong, temperature=temperature),),
                reduction="sequence_sum",
                name="wrong",
            ),
        ),
        name="scope",
    )


def distilled_rl(*, cap: float = 3.0, low: float = 0.2, high: float = 0.28) -> Method:
    """The group-normalised verdict; of a good response the teacher says which tokens earned it.

        A_t = A_group * w_t where A_group > 0, A_group elsewhere
        w_t = clip(teacher / old, 1 / cap, cap) over its geometric mean in the response

    Args:
        cap: largest ratio that counts.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: Distilled RL, arXiv:2607.17247, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher, without verdicts
    Settings: cap 3, 8 samples per prompt, 8,192 tokens.
    Departures: the clip of the ratio is ours.
    Failure: weighting blame too makes it much worse.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.cached_log_ratio,
                outcome=(partial(outcome.relative_magnitude, cap=cap),),
                surrogate=clipped(low, high),
            )
        ),
        name="distilled_rl",
    )


def rlad(*, old_share: float = 0.5, low: float = 0.2, high: float = 0.2) -> Method:
    """The verifier's clipped loss, its ratio anchored half at the teacher.

        L = mean over tokens of -min(r A, clip(r, 1 - low, 1 + high) A),  A = A_group
        r = (student / old)^s (student / teacher)^(1 - s)

    Args:
        old_share: s, strictly between 0 and 1.
        low, high: how far r may leave 1.

    Source: RLAD, arXiv:2602.22495.
    Evidence: E0
    Formula: note
    Stationary: verdicts
    Settings: s 0.5.
    Departures: none known.
    Failure: where student and teacher differ, most tokens are clipped.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.group_advantage,
                surrogate=partial(
                    surrogate.geometric_ratio, old_share=old_share, low=low, high=high
                ),
            )
        ),
        name="rlad",
    )


def verify_first(
    *, at_least: float = 2 / 3, outcome_scale: float = 1.0, low: float = 0.2, high: float = 0.2
) -> Method:
    """The teacher on prompts that it solves itself, the verifier on the others.

        A_t = a_t where teacher_pass >= at_least,  verdict - mean_group elsewhere

    Needs the data column `teacher_pass`, the share of the teacher's attempts that passed.

    Args:
        at_least: of the teacher's attempts.
        outcome_scale: what a verdict is worth.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: Verify before you distil, arXiv:2609.02998.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: 2 of 3 attempts, 64 prompts x 4 samples, 2 updates, learning rate 1e-6.
    Departures: engine ratios are not cut at 2.
    Failure: a prompt that neither solves teaches nothing.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                surrogate=clipped(low, high),
                weights=(partial(weight.teacher_passes, at_least=at_least),),
            ),
            Sampled(
                reward=reward.group_deviation,
                surrogate=clipped(low, high),
                weights=(partial(weight.teacher_fails, below=at_least),),
                coef=outcome_scale,
                name="verdict",
            ),
        ),
        name="verify_first",
    )


def rescue_opd(
    *, teacher_coef: float | Schedule = FADING_COEF, low: float = 0.2, high: float = 0.2
) -> Method:
    """The verifier where the student sometimes passes, the teacher where it never does.

        A_t = c * teacher_pass * a_t where every sample of the prompt fails,  A_group elsewhere

    Needs the data column `teacher_pass`, the share of the teacher's attempts that passed.

    Args:
        teacher_coef: c.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: RSTG, arXiv:2608.00782.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: c from 0.005 to 0.001 by 5e-5 a step.
    Departures: all tokens of such prompts, where the paper keeps some; its supervised term on the
        teacher's shortest correct answer is left out.
    Failure: a constant c, or the teacher everywhere, loses on math.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.group_advantage,
                surrogate=clipped(low, high),
                weights=(response.group_some_pass,),
                name="verdict",
            ),
            Sampled(
                reward=reward.teacher_log_ratio,
                surrogate=clipped(low, high),
                weights=(response.group_all_fail, weight.teacher_pass_rate),
                coef=teacher_coef,
            ),
        ),
        name="rescue_opd",
    )


def luffy(*, half_at: float = 0.1, teacher_share: float = 0.25) -> Method:
    """The verifier on the student's text and, with rare tokens lifted, on the teacher's.

        L = mean over the student's tokens of -(student / old) * A
          + mean over the teacher's tokens of -f(student(y_t)) * A,  f(x) = x / (x + c)
        A = verdict - mean over the prompt's samples,  c = half_at

    No teacher is asked for scores; it only writes. Here whole prompts are the teacher's, so its
    text is compared with its own: one that is always right teaches nothing.

    Args:
        half_at: c, the probability at which f is one half.
        teacher_share: of the sequences.

    Source: LUFFY, arXiv:2504.14945, and its code.
    Evidence: E0
    Formula: code
    Stationary: verdicts
    Settings: c 0.1, 8 samples of which one is the teacher's, learning rate 1e-6, no clip, no
        division by the deviation.
    Departures: a prompt's samples are all by one writer, where the source puts one of the teacher's
        among seven of the student's; one mean for each kind of token, where the code takes one over
        both; no entropy bonus.
    Failure: without the shaping rare tokens of the teacher are never learnt.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.group_deviation,
                surrogate=surrogate.importance,
                rows="student",
                name="own",
            ),
            Sampled(
                reward=reward.group_deviation,
                surrogate=partial(surrogate.shaped_probability, half_at=half_at),
                rows="teacher",
                name="shown",
            ),
        ),
        states=StateSource(student=1.0 - teacher_share, teacher=teacher_share),
        views=(TEACHER,),
        name="luffy",
    )

"""Methods whose teacher is the student itself, told more."""

from __future__ import annotations

import math
from functools import partial

from opd.formula import divergence, response, reward, selection, support, weight
from opd.methods.parts import (
    HINT,
    REFERENCE,
    SOLUTION,
    WRONG,
    averaged_self,
    check_option,
    clipped,
    frozen_self,
)
from opd.objective import Dense, Method, Objective, Sampled
from opd.schedule import Schedule, rescaled
from opd.types import Bound, StateSource, TeacherView

CONCISE = "{prompt}\n\nBe concise."


def opsd(*, cap: float = 0.05, context: str = SOLUTION) -> Method:
    """Forward KL to the first self with the solution, each entry cut off above.

        L = mean over tokens of sum_v min(self(v) (log self(v) - log student(v)), cap)

    Of either sign; entries that are cut off have no gradient. At self = student nothing is cut, and
    loss and gradient are zero.

    Args:
        cap: in nats.
        context: what the privileged self reads in place of the prompt.

    Source: OPSD, arXiv:2601.18734, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: cap 0.05; first a Jensen-Shannon divergence without it; rank 64, learning rate 2e-4,
        1,024 tokens, sampled at 1.1.
    Departures: logits are compared at temperature 1.
    Failure: hesitation is unlearnt, thinking models lose; late in training entropy runs away.
    """
    return Method(
        Objective(Dense(divergence=partial(divergence.capped_forward_kl, cap=cap))),
        views=(frozen_self(context),),
        name="opsd",
    )


def pw_opsd(
    *,
    least: float = 0.25,
    centre: float = 0.3,
    width: float = 0.1,
    cap: float = 0.05,
    context: str = SOLUTION,
) -> Method:
    """`opsd` with more weight late in the response.

        L = mean over responses of mean over tokens of w_t * sum_v min(self(v) (log self(v) -
            log student(v)), cap),  w_t rising from least to 1 as a sigmoid of the place

    A privileged self is surest where little is left to say. At self = student, loss and gradient
    are zero.

    Args:
        least, centre, width: as in `sigmoid_position`.
        cap: in nats.
        context: what the privileged self reads in place of the prompt.

    Source: PW-OPSD, arXiv:2605.21606, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: 0.25, 0.3 and 0.1, cap 0.05, rank 64, learning rate 5e-6, 150 steps, 1,024 tokens.
    Departures: logits are compared at temperature 1, there at 1.1.
    Failure: the cut keeps the most wrong entries from being taught.
    """
    return Method(
        Objective(
            Dense(
                divergence=partial(divergence.capped_forward_kl, cap=cap),
                weights=(
                    partial(weight.sigmoid_position, least=least, centre=centre, width=width),
                ),
                reduction="sequence_mean",
            )
        ),
        views=(frozen_self(context),),
        name="pw_opsd",
    )


def paint(*, share: float | Schedule = 0.2, cap: float = 0.05, context: str = SOLUTION) -> Method:
    """`opsd` on the tokens where the privileged self is much surer, or much less sure.

        L = mean over tokens of [in the top share by |H(self) - H(student)|]
            * sum_v min(self(v) (log self(v) - log student(v)), cap)

    At self = student, loss and gradient are zero.

    Args:
        share: of the step's tokens.
        cap: in nats.
        context: what the privileged self reads in place of the prompt.

    Source: PAINT, arXiv:2604.26573.
    Evidence: E0
    Formula: inferred
    Stationary: teacher
    Settings: not found.
    Departures: by other notes all tokens are taught and these towards a moved target; part of the
        solution is shown by overlap with the rollout.
    Failure: none reported.
    """
    gate = Bound.of(selection.keep_entropy_mismatch).with_knobs(share=share)
    return Method(
        Objective(
            Dense(divergence=partial(divergence.capped_forward_kl, cap=cap), weights=(gate,))
        ),
        views=(frozen_self(context),),
        name="paint",
    )


def sdft(*, k: int = 100, cap: float = 2.0, context: str = SOLUTION) -> Method:
    """A Jensen-Shannon divergence to the first self that has seen a demonstration.

        L = mean over responses of mean over tokens of min(student / old, cap) * JSD(t, s)
        s, t: student and self conditional on the student's top k

    At self = student, loss and gradient are zero.

    Args:
        k: size of the support, in tokens.
        cap: of the ratio to the rollout's weights.
        context: what the privileged self reads in place of the prompt.

    Source: Self-distillation fine-tuning, arXiv:2601.19897, as in TRL.
    Evidence: E1
    Formula: code
    Stationary: teacher
    Settings: k 100, cap 2, learning rate 2e-5.
    Departures: the student's likeliest tokens at rollout time, there those of the moment.
    Failure: a model that learns little from a demonstration teaches little.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.jensen_shannon,
                support=partial(support.student_top_k, k=k),
                tail="renormalise",
                weights=(partial(weight.update_ratio, cap=cap),),
                reduction="sequence_mean",
            )
        ),
        views=(frozen_self(context),),
        name="sdft",
    )


def sdft_full(*, skip: int = 3, decay: float = 0.99, context: str = SOLUTION) -> Method:
    """Reverse KL to an averaged self that has seen a demonstration, after the first tokens.

        L = mean over responses of mean over tokens of [t >= skip] * KL(student || self)(prefix)

    The authors' own form of `sdft`. At self = student, loss and gradient are zero.

    Args:
        skip: tokens at the beginning, where the self would announce its demonstration.
        decay: of the average.
        context: what the self reads in place of the prompt.

    Source: Self-distillation fine-tuning, arXiv:2601.19897, Eqs. 1 and 2, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: skip 3, decay 0.99, learning rate 2e-5, 32 prompts, 2,048 tokens, one epoch.
    Departures: skipped tokens count in the denominator; no ratio between engines.
    Failure: as of `sdft`.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.reverse_kl,
                weights=(partial(weight.after, tokens=skip),),
                reduction="sequence_mean",
            )
        ),
        views=(averaged_self(context, decay),),
        name="sdft_full",
    )


def sdpo(
    *,
    k: int = 100,
    cap: float = 2.0,
    engine_cap: float = 2.0,
    decay: float = 0.95,
    context: str = SOLUTION,
) -> Method:
    """A Jensen-Shannon divergence to an averaged self that has read the feedback.

        L = mean over tokens of min(student / old, c) * min(old / sampler, e) * JSD(self, student)
        on the student's top k and a bucket for the rest

    At self = student, loss and gradient are zero.

    Args:
        k: how many of the student's likeliest tokens are compared.
        cap, engine_cap: c and e.
        decay: of the average.
        context: what the self reads in place of the prompt: feedback, or a sample that passed.

    Source: SDPO, arXiv:2601.20802, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: k 100, caps 2, decay 0.95, 32 prompts x 8 samples, learning rate 1e-5.
    Departures: a response without feedback counts in the denominator; the student's likeliest
        tokens at rollout time.
    Failure: hedging is unlearnt; needs a success or feedback in the group.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.jensen_shannon,
                support=partial(support.student_top_k, k=k),
                tail="bucket",
                weights=(
                    partial(weight.update_ratio, cap=cap),
                    partial(weight.engine_ratio, cap=engine_cap),
                ),
            )
        ),
        views=(averaged_self(context, decay),),
        name="sdpo",
    )


def sdpo_sampled(*, cap: float = 2.0, decay: float = 0.95, context: str = SOLUTION) -> Method:
    """The sampled form of `sdpo`: the log-ratio to the averaged self as an advantage.

        L = mean over responses of mean over tokens of -min(student / old, cap) * a_t
            * log student(y_t),  a_t = log self(y_t) - log student(y_t)

    At self = student every advantage is zero.

    Args:
        cap: of the ratio to the rollout's weights.
        decay: of the average.
        context: what the self reads in place of the prompt.

    Source: SDPO, arXiv:2601.20802, at the defaults of TRL.
    Evidence: E1
    Formula: code
    Stationary: teacher
    Settings: cap 2, decay 0.95.
    Departures: none known.
    Failure: one sample's noise, where the whole comparison is at hand.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                weights=(partial(weight.update_ratio, cap=cap),),
                reduction="sequence_mean",
            )
        ),
        views=(averaged_self(context, decay),),
        name="sdpo_sampled",
    )


def opcd(*, k: int | Schedule = 256, context: str = SOLUTION) -> Method:
    """Reverse KL to the first self with a context, on the student's likeliest tokens as they are.

        L = mean over tokens of sum_{v in S} student(v) * (log student(v) - log self(v))
        S = student's top k

    Puts a system prompt or an experience into the weights. Neither renormalised nor with a bucket:
    the gradient also drains the support, by little where it holds nearly all mass. Not stationary
    at self = student.

    Args:
        k: size of the support, in tokens.
        context: what the self reads in place of the prompt.

    Source: OPCD, arXiv:2602.12275, and its code; OEL, arXiv:2603.16856, trains with it.
    Evidence: E0
    Formula: code
    Stationary: raw entries
    Settings: k 256, learning rate 5e-6, batch 128, 50 steps.
    Departures: none known.
    Failure: with a small k the student leaves the support.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.reverse_kl,
                support=Bound.of(support.student_top_k).with_knobs(k=k),
                tail="truncate",
                accept_collapse=True,
            )
        ),
        views=(frozen_self(context),),
        name="opcd",
    )


def opsdc(*, context: str = CONCISE) -> Method:
    """Reverse KL to the first self that was asked to be concise.

        L = mean over tokens of KL(student || self)(prefix)

    Shortens reasoning without judging it. At self = student, loss and gradient are zero.

    Args:
        context: what the self reads in place of the prompt.

    Source: OPSDC, also called CRISP, arXiv:2603.05433, from the description of its code.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: learning rate 1e-6, batch 32, 8,192 tokens, 100 steps, the self renewed every 50.
    Departures: the self is never renewed.
    Failure: hard problems lose what the length was for; a self renewed at every step collapses.
    """
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl)),
        views=(frozen_self(context),),
        name="opsdc",
    )


def compaction_opsd(*, context: str = CONCISE) -> Method:
    """Reverse KL to the first self that was asked to be concise, on right responses alone.

        L = mean over tokens of [response right] * KL(student || self)(prefix)

    At self = student, loss and gradient are zero.

    Args:
        context: what the self reads in place of the prompt.

    Source: on-policy self-distillation as compaction, arXiv:2605.06188.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: after supervised training and reinforcement.
    Departures: the denominator counts the tokens of wrong responses too.
    Failure: on wrong responses it hurts.
    """
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl, weights=(weight.correct,))),
        views=(frozen_self(context),),
        name="compaction_opsd",
    )


def ssopd(
    *,
    coef: float | Schedule = 1.0,
    cap: float = 0.05,
    low: float = 0.2,
    high: float = 0.2,
    context: str = SOLUTION,
) -> Method:
    """The verifier's gradient, and a self that has seen a success on wrong responses.

        L = GRPO's clipped loss + c * mean over tokens of [wrong] * 4 rate (1 - rate)
            * sum_v min(self(v) (log self(v) - log student(v)), cap)
        rate: share of the prompt's samples that pass

    Args:
        coef: c.
        cap: in nats.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the self reads in place of the prompt.

    Source: SSOPD, arXiv:2605.17497.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: c and the cap were not found.
    Departures: every wrong response, where the paper takes the longest of the prompt; the context
        is the data's solution, where it takes the shortest success.
    Failure: prompts that are never solved get nothing.
    """
    frontier = partial(response.difficulty, pass_power=1.0, fail_power=1.0)
    return Method(
        Objective(
            Sampled(
                reward=reward.group_advantage,
                surrogate=clipped(low, high),
                name="verdict",
            ),
            Dense(
                divergence=partial(divergence.capped_forward_kl, cap=cap),
                weights=(weight.incorrect, frontier),
                coef=rescaled(coef, times=4.0),
            ),
        ),
        views=(frozen_self(context),),
        name="ssopd",
    )


def context_distillation(*, context: str = HINT) -> Method:
    """Forward KL to the teacher with a context, on text the teacher wrote.

        L = mean over the teacher's tokens of KL(teacher with context || student)(prefix)

    The off-policy way of putting a prompt into the weights. At teacher = student, loss and gradient
    are zero.

    Args:
        context: what the teacher reads in place of the prompt when it scores.

    Source: Askell et al., arXiv:2112.00861; Snell et al., arXiv:2209.15189.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: the first compares the 50 likeliest tokens and a bucket.
    Departures: recalled, not re-read; the teacher writes without the context.
    Failure: the student's own prefixes are never met.
    """
    return Method(
        Objective(Dense(divergence=divergence.forward_kl)),
        states=StateSource(student=0.0, teacher=1.0),
        views=(TeacherView("teacher", "teacher", context),),
        name="context_distillation",
    )


def gates(
    *,
    on_coef: float | Schedule = 0.1,
    off_coef: float | Schedule = 1.0,
    within_nats: float = 5.0,
    context: str = SOLUTION,
) -> Method:
    """Supervised on the tutor's text, and its log-ratio on the student's, where the tutor is sure.

        L = c_off * mean over the teacher's tokens of -log student(y_t)
          + c_on * mean over the student's tokens of -clip(a_t) * log student(y_t)
        both where the tutor's answers agree

    Needs the column `consensus`.

    Args:
        on_coef, off_coef: c_on and c_off.
        within_nats: where the log-ratio is cut off.
        context: what the tutor reads in place of the prompt when it scores.

    Source: GATES, Eqs. 1 to 4 of arXiv:2602.20574.
    Evidence: E0
    Formula: note
    Stationary: teacher, in expectation
    Settings: 0.1 and 1, half of 8 answers must agree.
    Departures: the cut is ours; the tutor writes without the context.
    Failure: an agreed answer may be wrong.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.one,
                rows="teacher",
                coef=off_coef,
                weights=(weight.in_consensus,),
                name="off",
            ),
            Sampled(
                reward=partial(reward.clipped_log_ratio, low=-within_nats, high=within_nats),
                rows="student",
                coef=on_coef,
                weights=(weight.in_consensus,),
                name="on",
            ),
        ),
        states=StateSource(student=0.5, teacher=0.5),
        views=(TeacherView("teacher", "teacher", context),),
        name="gates",
    )


def purified_opsd(
    *, temperature: float = 1.0, context: str = SOLUTION, probe_context: str = "{response}"
) -> Method:
    """Forward KL to the first self, moved by what a question adds to a solution.

        L = mean over tokens of KL(pure || student)
        pure proportional to reference * (self / probe)^(1 / temperature)

    The probe reads the solution without the question, so what it alone would copy cancels.
    Stationary at the combination.

    Args:
        temperature: the smaller, the further the move.
        context, probe_context: what the two selves read in place of the prompt.

    Source: Purified OPSD, arXiv:2607.02234, from the tests of a re-implementation.
    Evidence: E0
    Formula: note
    Stationary: its combination
    Settings: temperature 1, the ratio bent at 10 nats.
    Departures: the ratio is not bent; the divergence is inferred.
    Failure: none reported.
    """
    check_option("temperature", temperature, 1e-3, math.inf)
    pure = TeacherView(
        "teacher.pure",
        "combination",
        parts=(
            ("reference", 1.0),
            ("teacher", 1.0 / temperature),
            ("teacher.probe", -1.0 / temperature),
        ),
    )
    return Method(
        Objective(Dense(divergence=divergence.forward_kl, against=pure.name)),
        views=(
            frozen_self(context),
            frozen_self(probe_context, "teacher.probe"),
            REFERENCE,
            pure,
        ),
        name="purified_opsd",
    )


def ogls_sd(
    *,
    strength: float = 1.0,
    window: int = 1024,
    context: str = SOLUTION,
    wrong_context: str = WRONG,
) -> Method:
    """Forward KL on wrong responses to the first self, steered from a wrong to a right context.

        L = mean over tokens of [wrong, t < window] * KL(steered || student)
        steered proportional to reference * (self / wrong self)^strength

    Stationary at the combination.

    Args:
        strength: how far to steer.
        window: tokens of a response that are taught.
        context, wrong_context: what the two selves read in place of the prompt; the second by
            default needs a data column `wrong`.

    Source: OGLS-SD, arXiv:2605.12400.
    Evidence: E0
    Formula: note
    Stationary: its combination
    Settings: 1,024 tokens.
    Departures: one context of each kind, where the paper averages several; the direction is that of
        notes on its second version, notes on the first have the reverse; its supervised anchor on
        short right responses is left out.
    Failure: none reported.
    """
    steered = TeacherView(
        "teacher.steered",
        "combination",
        parts=(("reference", 1.0), ("teacher", strength), ("teacher.wrong", -strength)),
    )
    return Method(
        Objective(
            Dense(
                divergence=divergence.forward_kl,
                against=steered.name,
                weights=(weight.incorrect, partial(weight.prefix, tokens=window)),
            )
        ),
        views=(
            frozen_self(context),
            frozen_self(wrong_context, "teacher.wrong"),
            REFERENCE,
            steered,
        ),
        name="ogls_sd",
    )

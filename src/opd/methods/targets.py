"""Methods that change what the student is to become: combinations of teachers, and anchors."""

from __future__ import annotations

import math
from functools import partial

from opd.formula import divergence, reward, support, weight
from opd.methods.parts import (
    BEFORE,
    HINT,
    REFERENCE,
    SOLUTION,
    TEACHER,
    check_option,
    clipped,
    frozen_self,
    pull,
    ratio_of,
)
from opd.objective import Dense, Method, Objective, Sampled
from opd.schedule import Linear, Schedule, rescaled
from opd.types import Bound, StateSource, TeacherView

FADING_BRIDGE = Linear(0.8, 0.0, 200)
FADING_LABELS = Linear(1.0, 0.0, 200)


def veto(*, share: float | Schedule = FADING_BRIDGE) -> Method:
    """Forward KL to a bridge between teacher and student, that ends at the teacher.

        L = mean over tokens of KL(bridge || student)(prefix)
        bridge proportional to teacher * student^b

    The student's own factor is detached. Where b is held, the fixed point is the teacher sharpened
    to the power 1 / (1 - b).

    Args:
        share: b; by default falling to 0.

    Source: Veto, arXiv:2601.07155; the reverse direction is published too.
    Evidence: E0
    Formula: note
    Stationary: sharpened teacher
    Settings: b from 0.8 (reasoning), 1.0 (code) or 0.3 (summaries) to 0, learning rate 1e-5.
    Departures: none known.
    Failure: with a b that stays, the student becomes surer than its teacher.
    """
    check_option("share", share, 0.0, 0.999, ", for at 1 the teacher drops out")
    bridge = TeacherView(
        "teacher.bridge", "combination", parts=(("teacher", 1.0), ("student", share))
    )
    return Method(
        Objective(Dense(divergence=divergence.forward_kl, against=bridge.name)),
        views=(TEACHER, bridge),
        name="veto",
    )


def deepseek_v4(
    *, teachers: tuple[str, ...] = ("first", "second"), weights: tuple[float, ...] = ()
) -> Method:
    """Reverse KL to each of several specialists on every token, weighted.

        L = mean over tokens of sum_k w_k KL(student || teacher_k)(prefix)

    With W the sum of the weights this is W KL(student || mean) and a constant, where mean is
    proportional to the product of teacher_k^(w_k / W): the fixed point prefers what no teacher
    forbids. Its gradient is that of one reverse KL to the log-linear combination, and it costs a
    projection of every teacher.

    Args:
        teachers: names of `[teachers.NAME]` in the run file.
        weights: one per teacher, positive; empty: the same for all, 1 in all.

    Source: DeepSeek-V4, arXiv:2606.19348, equation 29.
    Evidence: E0
    Formula: paper
    Stationary: its combination
    Settings: more than ten specialists, on the whole vocabulary; teachers loaded in turn, their
        hidden states kept and projected when they are compared. The weights are not published.
    Departures: none known. The report does not say how tokens are averaged, and its text lets the
        weights follow the task of the prompt, for which there is `teacher.route`.
    Failure: where specialists disagree none is followed; `teacher.route` asks one of them a prompt.
    """
    shares = weights or (1.0 / max(1, len(teachers)),) * len(teachers)
    if not teachers or len(set(teachers)) < len(teachers):
        raise ValueError(f"teachers must name each teacher once, got {teachers!r}")
    if len(shares) != len(teachers):
        raise ValueError(
            f"weights must be one per teacher, got {len(shares)} for {len(teachers)} teachers"
        )
    for name, share in zip(teachers, shares, strict=True):
        check_option(f"the weight of {name!r}", share, 1e-9, math.inf)
    views = [TeacherView(f"teacher.{name}") for name in teachers]
    return Method(
        Objective(
            *(
                Dense(
                    divergence=divergence.reverse_kl, against=f"teacher.{name}", coef=w, name=name
                )
                for name, w in zip(teachers, shares, strict=True)
            )
        ),
        views=tuple(views),
        name="deepseek_v4",
    )


def exopd(*, extrapolation: float | Schedule = 1.25, cap: float = 5.0) -> Method:
    """The log-ratio to a point beyond the teacher, on the line from where it came from.

        A_t = l * log teacher(y_t) + (1 - l) * log before(y_t) - log student(y_t)
        L = mean over tokens of -min(old(y_t) / sampler(y_t), cap) * A_t * log student(y_t)

    l = 1 is `sampled_token_opd`, whatever `before` is. Stationary at the extrapolated distribution.

    Args:
        extrapolation: l, above 1 to extrapolate.
        cap: of the ratio of trainer to engine.

    Source: G-OPD, arXiv:2602.12125, and its code; the cliff beyond which near-certain outputs
        collapse, arXiv:2605.08737.
    Evidence: E0
    Formula: code
    Stationary: its combination
    Settings: l 1.25, learning rate 1e-5 (1.7 B) or 1e-6, batch 1,024, one sample, 16,384 tokens,
        cap 5.
    Departures: `before` is the student at step 0; for the teacher before its own training name a
        model in [teachers] and compose the view.
    Failure: l of 1.5 degrades.
    """
    beyond = ratio_of(
        ("teacher", extrapolation),
        ("reference", rescaled(extrapolation, times=-1.0, plus=1.0)),
        name="teacher.beyond",
    )
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                against=beyond.name,
                weights=(partial(weight.engine_ratio, cap=cap),),
            )
        ),
        views=(TEACHER, REFERENCE, beyond),
        name="exopd",
    )


def direct_opd(*, k: int | Schedule = 16, reference_coef: float | Schedule = 2.5) -> Method:
    """What a teacher learnt, not what it is: its log-ratio to itself before, as a reward.

        L = mean over tokens of -sum_{v in S} stop[s(v) * (log teacher(v) - log before(v))]
            * log student(v) + c * KL(student || reference)
        S = student's top k,  s: the student conditional on S

    So a teacher can improve a student stronger than itself. Stationary near the reference times the
    teacher's ratio to the power 1 / c.

    Args:
        k: how many of the student's likeliest tokens are scored.
        reference_coef: c.

    Source: Direct-OPD, arXiv:2607.05394, and its code.
    Evidence: E0
    Formula: code
    Stationary: its combination
    Settings: k 16, c adapted between 0.5 and 2.5, learning rate 1e-6, 128 prompts x 4 samples, 300
        steps.
    Departures: a fixed c; the exact divergence to the reference, where the code samples it.
    Failure: without the reference all mass goes to the best token.
    """
    gained = ratio_of(
        ("teacher", 1.0), ("teacher.before", -1.0), ("student", 1.0), name="teacher.gained"
    )
    return Method(
        Objective(
            Dense(
                divergence=divergence.candidate_advantage_loss,
                support=Bound.of(support.student_top_k).with_knobs(k=k),
                tail="renormalise",
                against=gained.name,
            ),
            pull(reference_coef),
        ),
        views=(TEACHER, BEFORE, REFERENCE, gained),
        name="direct_opd",
    )


def w2s_opd(*, k: int | Schedule = 32, gain: float = 1.0) -> Method:
    """Reverse KL to the student at step 0, moved the way a weaker teacher moved.

        L = mean over tokens of KL(s || m)
        s, m: student and moved view, both conditional on the top k of the moved view
        moved proportional to reference * (teacher / before)^gain

    Stationary at the moved reference.

    Args:
        k: size of the support, in tokens.
        gain: how far to move.

    Source: W2S-OPD, arXiv:2607.26246: the authors' description, and the code of a reproduction.
    Evidence: E0
    Formula: note
    Stationary: its combination
    Settings: k 32 (16 to 128 alike), gain 1 (0.5 to 2 alike), learning rate 2e-6.
    Departures: none known.
    Failure: a direction that suits the weak model need not suit the strong one.
    """
    moved = TeacherView(
        "teacher.moved",
        "combination",
        parts=(("reference", 1.0), ("teacher", gain), ("teacher.before", -gain)),
    )
    return Method(
        Objective(
            Dense(
                divergence=divergence.reverse_kl,
                support=Bound.of(support.teacher_top_k).with_knobs(k=k),
                tail="renormalise",
                against=moved.name,
            )
        ),
        views=(TEACHER, BEFORE, REFERENCE, moved),
        name="w2s_opd",
    )


def compass_opd(*, penalty: float = 1.0) -> Method:
    """The teacher's log-ratio to a weaker relative, less what the student has moved already.

        A_t = (log teacher - log before)(y_t) - c * (log student - log reference)(y_t)

    What the teacher's family has in common cancels. Stationary at the reference times the ratio to
    the power 1 / c.

    Args:
        penalty: c, > 0.

    Source: CompassOPD, arXiv:2609.10154.
    Evidence: E0
    Formula: note
    Stationary: its combination
    Settings: a 35 B teacher against its 0.8 B relative; c not found.
    Departures: one tokenizer, where the paper aligns units of text across two.
    Failure: a small c lets the student run along the difference.
    """
    check_option("penalty", penalty, 1e-3, math.inf)
    way = ratio_of(
        ("teacher", 1.0),
        ("teacher.before", -1.0),
        ("reference", penalty),
        ("student", 1.0 - penalty),
        name="teacher.way",
    )
    return Method(
        Objective(Sampled(reward=reward.teacher_log_ratio, against=way.name)),
        views=(TEACHER, BEFORE, REFERENCE, way),
        name="compass_opd",
    )


def sr_opsd(*, share: float = 0.9, order: float = 0.95, context: str = SOLUTION) -> Method:
    """A Renyi divergence to a privileged self that is held back by the student at step 0.

        L = mean over tokens of log(sum_v anchored(v)^a student(v)^(1 - a)) / (a - 1)
        a = order,  anchored proportional to self^share * reference^(1 - share)

    Stationary at the mixture.

    Args:
        share: how far towards the privileged self, in [0, 1].
        order: a, strictly between 0 and 1.
        context: what the privileged self reads in place of the prompt.

    Source: SR-OPSD, arXiv:2608.09745.
    Evidence: E0
    Formula: note
    Stationary: its combination
    Settings: share 0.9, order 0.95.
    Departures: the privileged self is frozen, where the paper averages the student.
    Failure: the mixture with another divergence gets worse, not better.
    """
    check_option("share", share, 0.0, 1.0)
    anchored = TeacherView(
        "teacher.anchored", "combination", parts=(("teacher", share), ("reference", 1.0 - share))
    )
    return Method(
        Objective(
            Dense(
                divergence=partial(divergence.renyi_divergence, order=order), against=anchored.name
            )
        ),
        views=(frozen_self(context), REFERENCE, anchored),
        name="sr_opsd",
    )


def ar_opd(
    *,
    gain: float = 0.8,
    partial_context: str = HINT,
    context: str = SOLUTION,
) -> Method:
    """Forward KL to a partly privileged self, moved towards a fully privileged one.

        L = mean over tokens of KL(moved || student)
        moved proportional to part * (full / part)^gain

    The difference of the two is what the rest of the solution adds. Stationary at the moved view.

    Args:
        gain: how far from the partial view to the full one.
        partial_context, context: what the two selves read in place of the prompt.

    Source: AR-OPD, arXiv:2606.10385, and its code.
    Evidence: E0
    Formula: code
    Stationary: its combination
    Settings: gain 0.6 to 1.2 (0.4 to 1.4 tried), learning rate 2e-5, 32 prompts, 1,024 tokens; the
        partial view is the first half of the solution.
    Departures: the log-ratio of the views is not cut at 5 nats; the selves are frozen, where the
        code averages the student.
    Failure: a large gain lets the solution through.
    """
    residual = TeacherView(
        "teacher.moved",
        "combination",
        parts=(("teacher.partial", 1.0 - gain), ("teacher", gain)),
    )
    return Method(
        Objective(Dense(divergence=divergence.forward_kl, against=residual.name)),
        views=(frozen_self(context), frozen_self(partial_context, "teacher.partial"), residual),
        name="ar_opd",
    )


def stable_opd(
    *,
    gold_coef: float | Schedule = 0.1,
    reference_coef: float | Schedule = 0.01,
    low: float = 0.2,
    high: float = 0.2,
) -> Method:
    """The clipped log-ratio, with the data's responses and the student at step 0 as anchors.

        L = mean over the student's tokens of
            -min(r a_t, clip(r) a_t) + c_r * KL(student || reference)
          + c_g * mean over the data's tokens of -log student(y_t)

    Against lengths that run away. Stationary where the three pulls balance.

    Args:
        gold_coef, reference_coef: c_g and c_r.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: StableOPD, arXiv:2604.08527.
    Evidence: E0
    Formula: note
    Stationary: teacher, without data
    Settings: 64 prompts x 4 samples, learning rate 1e-6; coefficients not found.
    Departures: coefficients and clip range are ours.
    Failure: without the anchors repetitions earn large advantages until nothing stops.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                surrogate=clipped(low, high),
                rows="student",
            ),
            Sampled(reward=reward.one, rows="data", coef=gold_coef, name="gold"),
            pull(reference_coef, rows="student"),
        ),
        states=StateSource(student=0.5, data=0.5),
        views=(TEACHER, REFERENCE),
        name="stable_opd",
    )


def tgpo(
    *,
    label_coef: float | Schedule = FADING_LABELS,
    reference_coef: float | Schedule = 0.001,
    low: float = 0.2,
    high: float = 0.2,
) -> Method:
    """The verifier's gradient, at first with the teacher's likeliest token as a label beside it.

        L = GRPO's clipped loss + c_l * mean over tokens of -log student(argmax_v teacher(v))
          + c_r * mean over tokens of KL(student || reference)

    Args:
        label_coef: c_l; by default falling to 0.
        reference_coef: c_r.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: TGPO, arXiv:2605.13230.
    Evidence: E0
    Formula: note
    Stationary: argmax of the teacher
    Settings: labels to 0 over 200 steps.
    Departures: the source may draw the label; its reference coefficient is not known.
    Failure: labels that stay cost diversity.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.group_advantage,
                surrogate=clipped(low, high),
                name="verdict",
            ),
            Dense(
                divergence=divergence.forward_kl,
                support=partial(support.teacher_top_k, k=1),
                tail="teacher_renormalise",
                coef=label_coef,
                name="label",
            ),
            pull(reference_coef),
        ),
        views=(TEACHER, REFERENCE),
        name="tgpo",
    )


def ts_opsd(*, temperature: float = 1.5) -> Method:
    """Reverse KL to the student at step 0, made less sure of itself.

        L = mean over tokens of KL(student || tempered)
        tempered proportional to reference^(1 / temperature)

    Reheats a policy whose entropy has collapsed. Stationary at the tempered self.

    Args:
        temperature: above 1 to spread.

    Source: TS-OPSD, arXiv:2606.00755.
    Evidence: E0
    Formula: inferred
    Stationary: tempered self
    Settings: not found.
    Departures: direction and temperature are ours; only the abstract was read.
    Failure: spreads errors as well as alternatives.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    tempered = TeacherView(
        "teacher.tempered", "combination", parts=(("teacher", 1.0 / temperature),)
    )
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl, against=tempered.name)),
        views=(TeacherView("teacher", "initial_student"), tempered),
        name="ts_opsd",
    )


def edge_opd(*, reference_coef: float | Schedule = 0.05) -> Method:
    """Only what the teacher would say more often is taught, near the student at step 0.

        L = mean over tokens of -max(a_t, 0) * log student(y_t) + c * KL(student || reference)
        a_t = log teacher(y_t) - log student(y_t)

    With teacher = reference = student, loss and gradient are zero.

    Args:
        reference_coef: c.

    Source: EDGE-OPD, arXiv:2605.23493.
    Evidence: E0
    Formula: inferred
    Stationary: teacher
    Settings: c 0.05, half of the rollouts written with the context.
    Departures: the evidence is against the student; a note compares the teacher with and without
        its context and weights its tokens alike.
    Failure: picks tokens that give the answer away; lost to the base model on math.
    """
    return Method(
        Objective(
            Sampled(reward=reward.teacher_log_ratio, weights=(weight.positive_advantage,)),
            pull(reference_coef),
        ),
        views=(TEACHER, REFERENCE),
        name="edge_opd",
    )


def erpd(*, reference_coef: float | Schedule = 0.1) -> Method:
    """Reverse KL to an over-optimised self, with the student at step 0 as a trust region.

        L = mean over tokens of KL(student || teacher) + c * KL(student || reference)

    Stationary at teacher^(1 / (1 + c)) * reference^(c / (1 + c)), normalised.

    Args:
        reference_coef: c.

    Source: the second stage of ERPD, arXiv:2605.25582.
    Evidence: E0
    Formula: inferred
    Stationary: its combination
    Settings: not found.
    Departures: the symbols are ours; the first stage makes the teacher.
    Failure: most of what the first stage changed is drift.
    """
    return Method(
        Objective(
            Dense(divergence=divergence.reverse_kl),
            pull(reference_coef),
        ),
        views=(TEACHER, REFERENCE),
        name="erpd",
    )

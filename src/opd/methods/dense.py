"""Methods that differentiate a divergence on the student's own text."""

from __future__ import annotations

from opd.formula import divergence, support, weight
from opd.objective import Dense, Method, Objective
from opd.schedule import Schedule
from opd.types import Bound, StateSource


def reverse_kl_opd() -> Method:
    """Reverse KL over the whole vocabulary at every prefix the student wrote.

        L = mean over tokens of KL(student || teacher)(prefix),  prefixes from the student

    The default. Exact gradient of the per-token divergence with the distribution of prefixes held
    fixed; not the gradient of the sequence's reverse KL. With teacher = student, loss and gradient
    are zero.

    Source: the on-policy case of Agarwal et al., arXiv:2306.13649, with reverse KL.
    Evidence: E0
    Formula: paper
    Stationary: teacher
    """
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl)),
        states=StateSource(student=1.0),
        name="reverse_kl_opd",
    )


def gkd(*, teacher_weight: float | Schedule = 0.5, student_share: float = 1.0) -> Method:
    """Generalized knowledge distillation: a Jensen-Shannon divergence on mixed text.

        L = (1 - lambda) * E_data[D(prefix)] + lambda * E_student[D(prefix)]
        D = w * KL(teacher || m) + (1 - w) * KL(student || m),  m = w * teacher + (1 - w) * student

    lambda is the share of sequences the student writes; the rest come from the data set. For the
    end points of w use `reverse_kl_opd`, or the forward KL as an objective of your own: the
    interpolation vanishes there. With teacher = student, loss and gradient are zero.

    Args:
        teacher_weight: w, the teacher's share of the mixture, strictly between 0 and 1.
        student_share: lambda, the student's share of the sequences, in [0, 1].

    The paper uses lambda of 0.5 and 1, and w of 0.1 to 0.9 by task.

    Source: Agarwal et al., On-Policy Distillation of Language Models, arXiv:2306.13649.
    Evidence: E0
    Formula: paper
    Stationary: teacher
    Departures: one mean over the tokens of both sources, where the paper draws a source per batch.
    """
    return Method(
        Objective(
            Dense(
                divergence=Bound.of(divergence.generalized_jsd).with_knobs(
                    teacher_weight=teacher_weight
                )
            )
        ),
        states=StateSource(student=student_share, data=1.0 - student_share),
        name="gkd",
    )


def top_k_opd(*, k: int | Schedule = 32) -> Method:
    """Reverse KL on the teacher's k likeliest tokens, both sides renormalised there.

        L = mean over tokens of sum_{v in S} s(v) * (log s(v) - log t(v)),  S = teacher's top k
        s, t: student and teacher conditional on S

    Local support matching. Only the conditional distributions are compared, so mass may drift in
    and out of the support. With teacher = student, loss and gradient are zero.

    Args:
        k: size of the support, in tokens. The paper uses 32.

    The paper samples with top-p 0.9 and masks special tokens; optionally it keeps the fifth of the
    tokens with the highest entropy.

    Source: Revisiting On-Policy Distillation, arXiv:2603.25562.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Departures: end tokens are not masked; sampling is as the run file says; no entropy filter.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.reverse_kl,
                support=Bound.of(support.teacher_top_k).with_knobs(k=k),
                tail="renormalise",
                weights=(weight.skip_special,),
            )
        ),
        states=StateSource(student=1.0),
        name="top_k_opd",
    )

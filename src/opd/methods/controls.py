"""Controls: what on-policy distillation has to be compared with."""

from __future__ import annotations

from opd.formula import divergence, reward, surrogate
from opd.objective import Dense, Method, Objective, Sampled
from opd.types import StateSource


def sft() -> Method:
    """Supervised training on the responses of the data set.

        L = mean over tokens of -log student(y_t),   y from the data

    No teacher. Stationary at the distribution of the data, so with teacher = student neither loss
    nor gradient is zero.

    Source: maximum likelihood by teacher forcing, Williams and Zipser,
        doi:10.1162/neco.1989.1.2.270.
    Evidence: E0
    Formula: paper
    Stationary: data
    """
    return Method(
        Objective(Sampled(reward=reward.one, surrogate=surrogate.score)),
        states=StateSource(student=0.0, data=1.0),
        views=(),
        name="sft",
    )


def sft_on_teacher() -> Method:
    """Supervised training on text the teacher wrote.

        L = mean over tokens of -log student(y_t),   y from the teacher

    Sequence-level distillation with samples in place of beam search. The loss is an entropy where
    the student equals the teacher, not zero; there its expected gradient is zero.

    Source: Kim and Rush, Sequence-Level Knowledge Distillation, arXiv:1606.07947.
    Evidence: E0
    Formula: paper
    Stationary: teacher, in expectation
    Departures: sampled at the run's temperature, where the paper uses the beam's best sequence.
    """
    return Method(
        Objective(Sampled(reward=reward.one, surrogate=surrogate.score)),
        states=StateSource(student=0.0, teacher=1.0),
        name="sft_on_teacher",
    )


def offpolicy_kd() -> Method:
    """Forward KL over the whole vocabulary on text the teacher wrote.

        L = mean over tokens of KL(teacher || student)(prefix),   prefixes from the teacher

    Word-level distillation on the teacher's own states. With teacher = student, loss and gradient
    are zero.

    Source: Kim and Rush, arXiv:1606.07947; Sanh et al., arXiv:1910.01108.
    Evidence: E0
    Formula: paper
    Stationary: teacher
    """
    return Method(
        Objective(Dense(divergence=divergence.forward_kl)),
        states=StateSource(student=0.0, teacher=1.0),
        name="offpolicy_kd",
    )

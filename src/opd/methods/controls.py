"""Controls: what on-policy distillation has to be compared with."""

from __future__ import annotations

from functools import partial

from opd.formula import divergence, reward, selection, support, surrogate
from opd.objective import Dense, Method, Objective, Sampled
from opd.types import StateSource, TeacherView


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
    Failure: never sees its own mistakes, so they compound when it writes alone.
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
    Failure: as of `sft`, and the teacher's uncertainty is lost.
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
    Failure: right on the teacher's prefixes, untaught on the student's.
    """
    return Method(
        Objective(Dense(divergence=divergence.forward_kl)),
        states=StateSource(student=0.0, teacher=1.0),
        name="offpolicy_kd",
    )


def grpo(*, low: float = 0.2, high: float = 0.2) -> Method:
    """The verifier alone: every token of a response gets its group-normalised verdict.

        L = mean over tokens of -min(r * A, clip(r, 1 - low, 1 + high) * A),  r = student / old
        A = (verdict - mean_group) / std_group

    No teacher. With one sample per prompt, or verdicts that are all equal, nothing is learnt.

    Args:
        low, high: how far the ratio may leave 1.

    Source: GRPO, section 4.1.2 of arXiv:2402.03300.
    Evidence: E0
    Formula: paper
    Stationary: verdicts
    Settings: at least 4 samples per prompt; the paper takes 64.
    Departures: no reference KL; a mean over all tokens of the step, where the paper averages within
        each response first.
    Failure: a single number per response: prompts that are always or never solved teach nothing.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.group_advantage,
                surrogate=partial(surrogate.clipped, low=low, high=high),
            )
        ),
        views=(),
        name="grpo",
    )


def suppress_unlikely(*, share: float = 0.2) -> Method:
    """The least likely fifth of the student's own tokens, pushed down without any teacher.

        L = mean over tokens of [token is among the share of the step with the smallest
            student(y_t)] * log student(y_t)

    The control of every method that reads a log-ratio: most of a sampled log-ratio's push is away
    from unlikely tokens, which needs no teacher. No stationary point: it sharpens for ever.

    Args:
        share: of the step's tokens, in (0, 1].

    Source: arXiv:2608.31046; its code, in the mode with a fixed advantage.
    Evidence: E0
    Formula: code
    Stationary: none
    Settings: share 0.2, 17 k math prompts, a 1.7 B student.
    Departures: the mean is over all tokens of the step, where the code divides by those selected.
    Failure: entropy collapses when it runs long; with the sign reversed, so do the lengths.
    """
    gate = partial(selection.keep_unlikely, share=share)
    return Method(
        Objective(Sampled(reward=reward.length_cost, weights=(gate,))),
        views=(),
        name="suppress_unlikely",
    )


def teacher_is_student() -> Method:
    """Reverse KL to the student itself: nothing is to be learnt, so nothing may change.

        L = mean over tokens of KL(student || stop[student])(prefix) = 0

    The null experiment. Whatever moves the weights in such a run (weight decay, an anchor, a
    numerical difference between two passes) is not distillation.

    Source: where a reverse KL is stationary, Eq. 6 of arXiv:2606.22793.
    Evidence: E0
    Formula: paper
    Stationary: always
    Failure: none known.
    """
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl)),
        views=(TeacherView("teacher", "student"),),
        name="teacher_is_student",
    )


def dagger(*, student_share: float = 0.5) -> Method:
    """The teacher's likeliest token as a label, on text by both.

        L = mean over tokens of -log student(argmax_v teacher(v))(prefix)

    Imitation with an expert asked at the learner's own states. The teacher's uncertainty is lost:
    the loss is stationary at a student that is certain of that token, so at teacher = student only
    if the teacher is.

    Args:
        student_share: of the sequences; the rest come from the data set.

    Source: Ross et al., arXiv:1011.0686; Lin et al., ImitKD, arXiv:2009.07253.
    Evidence: E0
    Formula: note
    Stationary: argmax of the teacher
    Settings: the papers lower the expert's share from 1 to 0 over the rounds.
    Departures: recalled, not re-read; a fixed share; one mean over the tokens of both sources.
    Failure: as the teacher's second choice never counts, diversity is lost.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.forward_kl,
                support=partial(support.teacher_top_k, k=1),
                tail="teacher_renormalise",
            )
        ),
        states=StateSource(student=student_share, data=1.0 - student_share),
        name="dagger",
    )

"""Divergences between the student and a view over a support, in nats per position.

Every function takes two normalised log-distributions over the same entries and returns one number
per position, zero for equal inputs and never negative, with its exact gradient. On student text
the prefixes are fixed data: the gradient is that of the local divergence, not of the sequence's.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from opd.formula.numerics import expectation, log_mixture

__all__ = ["forward_kl", "generalized_jsd", "reverse_kl"]


def forward_kl(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Forward Kullback-Leibler divergence, teacher to student, in nats.

        D = sum_v teacher(v) * (log teacher(v) - log student(v))

    Covers the teacher's mass: its gradient on the student's logits is `student - teacher`.
    Infinite where the student puts no mass on an entry the teacher uses. Zero, and stationary,
    only where the two agree on the support.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.

    Returns:
        One divergence per position, >= 0.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, at
    temperature 1; on student text Agarwal et al., arXiv:2306.13649.
    """
    return expectation(teacher_log_probs, teacher_log_probs - student_log_probs)


def reverse_kl(
    student_log_probs: Float[Tensor, "*n K"], teacher_log_probs: Float[Tensor, "*n K"]
) -> Float[Tensor, "*n"]:
    """Reverse Kullback-Leibler divergence, student to teacher, in nats.

        D = sum_v student(v) * (log student(v) - log teacher(v))

    Seeks the teacher's modes: its gradient on the student's logits is
    `student * (log student - log teacher - D)`, so an entry the student never uses receives none.
    Infinite where the teacher puts no mass on an entry the student uses. Zero only where the two
    agree on the support; stationary also where the student has no mass to move.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.

    Returns:
        One divergence per position, >= 0.

    Source: Gu et al., MiniLLM, arXiv:2306.08543; Agarwal et al., arXiv:2306.13649.
    """
    return expectation(student_log_probs, student_log_probs - teacher_log_probs)


def generalized_jsd(
    student_log_probs: Float[Tensor, "*n K"],
    teacher_log_probs: Float[Tensor, "*n K"],
    *,
    teacher_weight: float,
) -> Float[Tensor, "*n"]:
    """Generalized Jensen-Shannon divergence, in nats.

        m = w * teacher + (1 - w) * student
        D = w * KL(teacher || m) + (1 - w) * KL(student || m)

    Bounded and finite even where one side puts no mass. D / w tends to the forward KL as
    w -> 0, and D / (1 - w) to the reverse KL as w -> 1.

    Args:
        student_log_probs: normalised over the last axis; carries the gradient.
        teacher_log_probs: normalised over the same K entries.
        teacher_weight: w, the share of the teacher in the mixture; strictly between 0 and 1.

    Returns:
        One divergence per position, >= 0, and 0 only where the two agree.

    Source: Agarwal et al., On-Policy Distillation of Language Models, arXiv:2306.13649.
    """
    if not 0.0 < teacher_weight < 1.0:
        raise ValueError(
            f"teacher_weight must lie strictly between 0 and 1, got {teacher_weight}; "
            "at the end points D is 0 for any pair: use forward_kl or reverse_kl"
        )
    w = teacher_weight
    mixture = log_mixture(teacher_log_probs, student_log_probs, weight=w)
    teacher_part = expectation(teacher_log_probs, teacher_log_probs - mixture)
    student_part = expectation(student_log_probs, student_log_probs - mixture)
    return w * teacher_part + (1 - w) * student_part


def student_entropy(student_log_probs: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """Entropy of the student on the support, in nats; between 0 and log K."""
    return -expectation(student_log_probs, student_log_probs)


def teacher_entropy(teacher_log_probs: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """Entropy of the view on the support, in nats; between 0 and log K."""
    return -expectation(teacher_log_probs, teacher_log_probs)

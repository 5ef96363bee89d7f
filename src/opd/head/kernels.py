"""Triton kernels of `opd.head.fold`; imported only where Triton is.

`no_type_check` keeps run-time checkers of annotations from wrapping a function that Triton parses.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def fold_values(
    student_ptr,
    teacher_ptr,
    values_ptr,
    vocab_size,
    student_stride,
    teacher_stride,
    inverse_temperature,
    teacher_weight,
    WITH_MIXTURE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row: normalisers by an online softmax, then expectations under both sides."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, TILE)
    student_row = student_ptr + row * student_stride
    teacher_row = teacher_ptr + row * teacher_stride

    student_max, student_sum = float("-inf"), 0.0
    teacher_max, teacher_sum = float("-inf"), 0.0
    for start in range(0, vocab_size, TILE):
        inside = start + offsets < vocab_size
        student = tl.load(student_row + start + offsets, mask=inside, other=float("-inf"))
        teacher = tl.load(teacher_row + start + offsets, mask=inside, other=float("-inf"))
        student, teacher = student * inverse_temperature, teacher * inverse_temperature
        new = tl.maximum(student_max, tl.max(student, 0))
        student_sum = student_sum * tl.exp(student_max - new) + tl.sum(tl.exp(student - new), 0)
        student_max = new
        new = tl.maximum(teacher_max, tl.max(teacher, 0))
        teacher_sum = teacher_sum * tl.exp(teacher_max - new) + tl.sum(tl.exp(teacher - new), 0)
        teacher_max = new
    student_normaliser = student_max + tl.log(student_sum)
    teacher_normaliser = teacher_max + tl.log(teacher_sum)

    reverse, forward, student_entropy, teacher_entropy = 0.0, 0.0, 0.0, 0.0
    mixture_mean, mixture_teacher = 0.0, 0.0
    for start in range(0, vocab_size, TILE):
        inside = start + offsets < vocab_size
        student = tl.load(student_row + start + offsets, mask=inside, other=0.0)
        teacher = tl.load(teacher_row + start + offsets, mask=inside, other=0.0)
        student = student * inverse_temperature - student_normaliser
        teacher = teacher * inverse_temperature - teacher_normaliser
        student_probs = tl.where(inside, tl.exp(student), 0.0)
        teacher_probs = tl.where(inside, tl.exp(teacher), 0.0)
        log_ratio = student - teacher
        reverse += tl.sum(student_probs * log_ratio, 0)
        forward -= tl.sum(teacher_probs * log_ratio, 0)
        student_entropy -= tl.sum(student_probs * student, 0)
        teacher_entropy -= tl.sum(teacher_probs * teacher, 0)
        if WITH_MIXTURE:
            over_mixture = -tl.log(1.0 - teacher_weight + teacher_weight * tl.exp(-log_ratio))
            mixture_mean += tl.sum(student_probs * over_mixture, 0)
            mixture_teacher += tl.sum(teacher_probs * (over_mixture - log_ratio), 0)

    out = values_ptr + row * COLUMNS
    tl.store(out, student_normaliser)
    tl.store(out + 1, teacher_normaliser)
    tl.store(out + 2, reverse)
    tl.store(out + 3, forward)
    tl.store(out + 4, student_entropy)
    tl.store(out + 5, teacher_entropy)
    tl.store(out + 6, teacher_weight * mixture_teacher + (1.0 - teacher_weight) * mixture_mean)
    tl.store(out + 7, mixture_mean)


@triton.jit
@no_type_check
def write_gradient(
    gradient_ptr,
    student_ptr,
    teacher_ptr,
    values_ptr,
    factors_ptr,
    tokens_ptr,
    vocab_size,
    gradient_stride,
    student_stride,
    teacher_stride,
    inverse_temperature,
    teacher_weight,
    WITH_MIXTURE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row: every slope at once, over the student's logits.

    The gradient of a row starts where its logits start and is no wider, so walking forwards
    overwrites logits that were read. Within the first tile a barrier sees to that.
    """
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row * student_stride
    teacher_row = teacher_ptr + row * teacher_stride
    gradient_row = gradient_ptr + row * gradient_stride
    values = values_ptr + row * COLUMNS
    factors = factors_ptr + row * FACTORS
    student_normaliser, teacher_normaliser = tl.load(values), tl.load(values + 1)
    reverse_kl, student_entropy = tl.load(values + 2), tl.load(values + 4)
    mixture_mean = tl.load(values + 7)
    reverse, forward, entropy = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
    mixed, scored = tl.load(factors + 3) * (1.0 - teacher_weight), tl.load(factors + 4)
    token = tl.load(tokens_ptr + row)

    for start in range(0, vocab_size, TILE):
        offsets = start + tl.arange(0, TILE)
        inside = offsets < vocab_size
        student = tl.load(student_row + offsets, mask=inside, other=0.0)
        teacher = tl.load(teacher_row + offsets, mask=inside, other=0.0)
        student = student * inverse_temperature - student_normaliser
        teacher = teacher * inverse_temperature - teacher_normaliser
        student_probs, teacher_probs = tl.exp(student), tl.exp(teacher)
        log_ratio = student - teacher
        centred = reverse * (log_ratio - reverse_kl) - entropy * (student + student_entropy)
        centred += forward - scored
        if WITH_MIXTURE:
            over_mixture = -tl.log(1.0 - teacher_weight + teacher_weight * tl.exp(-log_ratio))
            centred += mixed * (over_mixture - mixture_mean)
        gradient = student_probs * centred - forward * teacher_probs
        gradient += tl.where(offsets == token, scored, 0.0)
        tl.debug_barrier()
        tl.store(gradient_row + offsets, gradient, mask=inside)

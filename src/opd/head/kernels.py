"""Triton kernels of `opd.head.fold`; imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
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
def write_gradient(
    student_ptr,
    teacher_ptr,
    values_ptr,
    factors_ptr,
    tokens_ptr,
    vocab_size,
    student_stride,
    teacher_stride,
    inverse_temperature,
    teacher_weight,
    WITH_MIXTURE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row and tile: every slope at once, over the student's logits."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = offsets < vocab_size
    student_place = student_ptr + row * student_stride + offsets
    values = values_ptr + row * COLUMNS
    factors = factors_ptr + row * FACTORS

    student = tl.load(student_place, mask=inside, other=0.0) * inverse_temperature
    teacher = tl.load(teacher_ptr + row * teacher_stride + offsets, mask=inside, other=0.0)
    student = student - tl.load(values)
    teacher = teacher * inverse_temperature - tl.load(values + 1)
    student_probs, teacher_probs = tl.exp(student), tl.exp(teacher)
    log_ratio = student - teacher

    reverse = tl.load(factors)
    centred = reverse * (log_ratio - tl.load(values + 2))
    centred -= tl.load(factors + 2) * (student + tl.load(values + 4))
    forward, scored = tl.load(factors + 1), tl.load(factors + 4)
    centred += forward - scored
    if WITH_MIXTURE:
        over_mixture = -tl.log(1.0 - teacher_weight + teacher_weight * tl.exp(-log_ratio))
        mixed = tl.load(factors + 3) * (1.0 - teacher_weight)
        centred += mixed * (over_mixture - tl.load(values + 7))
    gradient = student_probs * centred - forward * teacher_probs
    gradient += tl.where(offsets == tl.load(tokens_ptr + row), scored, 0.0)
    tl.store(student_place, gradient, mask=inside)

"""Random rows that can be enumerated, a healthy teacher, and what may be wrong with one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What both sides say at N rows, in float64, and the tokens that the student drew.

    The healthy teacher is the student with other preferences, small ones: it has something to say
    that the student can reach.
    """

    student: Tensor
    teacher: Tensor
    tokens: Tensor
    generator: torch.Generator

    @classmethod
    def random(cls, seed: int = 0, rows: int = 400, vocabulary: int = 40) -> Rows:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)

        student = (2 * normal()).log_softmax(-1)
        teacher = (student + 0.3 * normal()).log_softmax(-1)
        return cls(student, teacher, draw(student, generator), generator)

    def normal(self, *shape: int) -> Tensor:
        size = shape or tuple(self.student.shape)
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def logp(self, log_probs: Tensor) -> Tensor:
        """Of the tokens that were drawn."""
        return log_probs.gather(-1, self.tokens[:, None])[:, 0]

    @property
    def r(self) -> Tensor:
        return self.logp(self.teacher) - self.logp(self.student)

    # What may be wrong with a teacher

    def shifted(self) -> Tensor:
        """The teacher of the row before: positions are off by one."""
        return self.teacher.roll(1, 0)

    def swapped(self) -> Tensor:
        """The teacher with other ids for the same tokens."""
        order = torch.randperm(self.student.shape[1], generator=self.generator)
        return self.teacher[:, order]

    def noise(self) -> Tensor:
        """A teacher that has nothing to do with the text."""
        return (2 * self.normal()).log_softmax(-1)

    def lost(self) -> Tensor:
        """A teacher that no longer tells the options apart."""
        return tempered(self.teacher, 8.0)


def draw(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row."""
    return torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    return (log_probs / temperature).log_softmax(-1)


def with_nothing(log_probs: Tensor, hidden: Tensor) -> Tensor:
    """Without mass on some entries."""
    return log_probs.masked_fill(hidden, -math.inf).log_softmax(-1)


def by_sequence(values: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`[N]` as responses of one length, all open: `[B, T]` and the mask."""
    reshaped = values.reshape(-1, length)
    return reshaped, torch.ones_like(reshaped, dtype=torch.bool)

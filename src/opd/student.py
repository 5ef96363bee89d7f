"""The student: backbone and head inside one forward of one module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from opd.fastpath import SMALL, response_states, why_generic
from opd.head import linear_head
from opd.models import LoadedModel, unembedding
from opd.objective import Objective
from opd.types import Batch, FieldKey, StudentOutput


class Student(nn.Module):
    """A causal language model whose forward ends in an objective.

    The only loss path, and the only module that is wrapped: everything a step needs of the model
    is one call of `forward`. Dropout is off, always: the student that is trained is the student
    that sampled.

    Args:
        loaded: the model to train, with or without an adapter.
        vocab_size: tokens that are compared; logits beyond carry no mass. The student's own
            count unless a teacher shares fewer.
    """

    def __init__(self, loaded: LoadedModel, *, vocab_size: int | None = None) -> None:
        super().__init__()
        self.loaded = loaded
        self.model = loaded.model
        self.vocab_size = vocab_size or loaded.vocab_size
        self.eval()

    @property
    def path(self) -> str:
        """`fast`, or `generic`: the model's own forward."""
        return "fast" if why_generic(self.model) is None else "generic"

    @property
    def path_reason(self) -> str:
        """Why `path` is what it is."""
        return why_generic(self.model) or SMALL

    def train(self, mode: bool = True) -> Student:
        """Stays in evaluation mode: dropout would make the student differ from its sampler."""
        return super().train(False)

    def forward(
        self,
        batch: Batch,
        objective: Objective | None = None,
        *,
        wanted: frozenset[FieldKey] = frozenset(),
        temperature: float = 1.0,
    ) -> StudentOutput:
        """Loss, metrics and by-products of one micro-batch, or just some fields.

        Args:
            batch: sequences padded on the right; causal attention never looks at the padding.
            objective: with one, the loss carries the gradient; without, nothing does.
            wanted: fields to return, packed to the N response rows, detached.
            temperature: divides the logits where there is no objective.
        """
        with torch.set_grad_enabled(objective is not None and torch.is_grad_enabled()):
            out = linear_head(
                response_states(self.model, batch),
                unembedding(self.model, self.vocab_size),
                batch,
                objective,
                wanted=wanted,
                temperature=temperature,
            )
        return StudentOutput(out.loss, out.stats, out.rows, out.fields)

    @contextmanager
    def for_generation(self) -> Iterator[LoadedModel]:
        """The bare model, for a sampler that runs in this process."""
        with torch.no_grad():
            yield self.loaded

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters an optimizer may change, by name, each once."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

"""The student as its own teacher: a frozen copy, and a moving average of its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opd.errors import ConfigError
from opd.models import LoadedModel
from opd.teacher.local import LocalTeacher


def frozen_copy(loaded: LoadedModel, *, share: bool = False) -> LoadedModel:
    """A model with the same weights now, whatever happens to the original; nothing trains it.

    Args:
        share: share the weights that no optimizer changes, such as those under an adapter.
    """
    model: Any = loaded.model
    fixed = [p for p in model.parameters() if not p.requires_grad] if share else []
    frozen = copy.copy(loaded)
    frozen.model = copy.deepcopy(model, {id(p): p for p in fixed}).requires_grad_(False)
    return frozen


class AverageTeacher(LocalTeacher):
    """The exponential moving average of the student's weights.

        average <- decay * average + (1 - decay) * student      after each optimizer step

    Begins at the student's weights when made. Only what is trained is averaged: with an adapter
    the adapter's own weights (the two factors, not their product), over the shared base. Averages
    are kept in float32 or wider, because a step of 1 - decay is lost in half precision.

    Args:
        student: whose weights are averaged.
        decay: in (0, 1); the average remembers about 1 / (1 - decay) steps.
        vocab_size, max_tokens: as in `LocalTeacher`.

    Source: Tarvainen and Valpola, Mean teachers, arXiv:1703.01780, equation 1.
    """

    def __init__(
        self, student: LoadedModel, *, decay: float, vocab_size: int, max_tokens: int = 16384
    ) -> None:
        super().__init__(
            frozen_copy(student, share=True), vocab_size=vocab_size, max_tokens=max_tokens
        )
        self.decay = decay
        self._student = _trained(student)
        own = dict(_module(self.loaded).named_parameters())
        self._copied = {name: own[name] for name in self._student}
        self.average = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in self._copied.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the student's weights of now into the average."""
        for name, average in self.average.items():
            average.lerp_(self._student[name].to(average.dtype), 1 - self.decay)
            self._copied[name].copy_(average)

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor]) -> None:
        """Continue from a saved `average`.

        Raises:
            ConfigError: it is of another model.
        """
        if average.keys() != self.average.keys():
            different = sorted(average.keys() ^ self.average.keys())[0]
            raise ConfigError(
                f"the saved average is of another model: only one of the two has {different}; "
                "resume with the settings of the run folder, or start a new run"
            )
        for name, value in average.items():
            self.average[name].copy_(value)
            self._copied[name].copy_(self.average[name])


def _module(loaded: LoadedModel) -> nn.Module:
    model: Any = loaded.model
    return model  # type: ignore[no-any-return]


def _trained(loaded: LoadedModel) -> dict[str, nn.Parameter]:
    return {n: p for n, p in _module(loaded).named_parameters() if p.requires_grad}

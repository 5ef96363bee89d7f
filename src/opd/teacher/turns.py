"""Teachers that do not fit together: one of them at a time has its weights on the device.

Between its turns a model's weights are in host memory, or nowhere but on disk. What it said stays:
hidden states, and the unembedding that turns them into logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from opd.models import LoadedModel
from opd.rollout.local import LocalSampler
from opd.teacher.local import LocalTeacher
from opd.types import (
    Need,
    Prompt,
    Provenance,
    Rollout,
    SamplerSettings,
    TeacherRequest,
    TeacherScores,
    Unembedding,
)


@runtime_checkable
class ParkedModel(Protocol):
    """A model that comes when it is its turn.

    Attributes:
        facts: what is known of it between its turns; its weights may not be there.
    """

    facts: LoadedModel

    def enter(self) -> LoadedModel:
        """The model, on the device."""
        ...

    def leave(self) -> None:
        """Free what it takes there."""
        ...


class HostModel:
    """Parked in host memory; its weights are copied to the device, and that copy is dropped.

    Args:
        loaded: on the host.
        device: where it works.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device) -> None:
        self.facts = loaded
        self._device = device
        self._at_home: list[tuple[Tensor, Tensor]] = []
        if device.type == "cuda":
            for tensor in _tensors(loaded):
                tensor.data = tensor.data.pin_memory()

    def enter(self) -> LoadedModel:
        for tensor in _tensors(self.facts):
            self._at_home.append((tensor, tensor.data))
            tensor.data = tensor.data.to(self._device, non_blocking=True)
        return self.facts

    def leave(self) -> None:
        for tensor, data in self._at_home:
            tensor.data = data
        self._at_home = []


class DiskModel:
    """Parked on disk: loaded anew for every turn.

    Args:
        load: makes the model, on the device. Called once at once, for the facts.
    """

    def __init__(self, load: Callable[[], LoadedModel]) -> None:
        self._load = load
        self._here: LoadedModel | None = None
        self.facts = self.enter()
        self.leave()

    def enter(self) -> LoadedModel:
        self._here = self._load()
        return self._here

    def leave(self) -> None:
        """Drops the weights at once: a model refers to itself, and would wait for the collector."""
        if self._here is not None:
            _module(self._here).to("meta")
            self._here = None


class Turns:
    """Whose turn it is.

    After a turn the model leaves; inside `with turns:` the last one stays until somebody else's
    turn or the end, so that several questions to one model in a row are one turn.
    """

    def __init__(self) -> None:
        self._now: ParkedModel | None = None
        self._loaded: LoadedModel | None = None
        self._lasting = 0

    def __enter__(self) -> Turns:
        self._lasting += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._lasting -= 1
        if not self._lasting:
            self._end()

    @contextmanager
    def of(self, model: ParkedModel) -> Iterator[LoadedModel]:
        """A turn of this model's."""
        if self._now is not model:
            self._end()
            self._now, self._loaded = model, model.enter()
        assert self._loaded is not None
        try:
            yield self._loaded
        finally:
            if not self._lasting:
                self._end()

    def _end(self) -> None:
        model, self._now, self._loaded = self._now, None, None
        if model is not None:
            model.leave()


class TurnTeacher:
    """Scores as `LocalTeacher` does, in turns.

    Args:
        model: comes when it is asked.
        turns: shared by all models that do.
        vocab_size, max_tokens: as in `LocalTeacher`.
    """

    def __init__(
        self, model: ParkedModel, turns: Turns, *, vocab_size: int, max_tokens: int = 16384
    ) -> None:
        self.model, self.turns = model, turns
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens

    @property
    def loaded(self) -> LoadedModel:
        """What is known of the model; its weights may not be there."""
        return self.model.facts

    def can(self, need: Need) -> bool:
        """A model in memory can answer every need."""
        return True

    def score(self, request: TeacherRequest) -> TeacherScores:
        """Scores of the N response rows of the request's batch, in their order."""
        with self.turns.of(self.model) as loaded:
            scorer = LocalTeacher(loaded, vocab_size=self.vocab_size, max_tokens=self.max_tokens)
            scores = scorer.score(request)
            head = scores.unembedding
            return replace(scores, unembedding=None if head is None else _staying(head))


class TurnSampler:
    """Writes as `LocalSampler` does, in turns. The fields as in `TurnTeacher`."""

    def __init__(self, model: ParkedModel, turns: Turns, *, vocab_size: int) -> None:
        self.model, self.turns, self.vocab_size = model, turns, vocab_size

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        *,
        generator: torch.Generator,
        policy_version: int = 0,
    ) -> Rollout:
        with self.turns.of(self.model) as loaded:
            writer = LocalSampler(
                replace(loaded, vocab_size=self.vocab_size), provenance=Provenance.TEACHER
            )
            return writer.sample(
                prompts, settings, generator=generator, policy_version=policy_version
            )


def _staying(head: Unembedding) -> Unembedding:
    """The head on its own storage, whatever becomes of the model's parameters."""
    bias = head.bias
    return replace(head, weight=head.weight.detach(), bias=None if bias is None else bias.detach())


def _tensors(loaded: LoadedModel) -> Iterator[Tensor]:
    module = _module(loaded)
    return chain(module.parameters(), module.buffers())


def _module(loaded: LoadedModel) -> nn.Module:
    model: Any = loaded.model
    return model  # type: ignore[no-any-return]

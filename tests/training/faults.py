"""Teachers with a fault each, for a probe to find."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from opd.models import LoadedModel
from opd.teacher.local import LocalTeacher
from opd.types import Need, Teacher, TeacherRequest, TeacherScores


class Shifted:
    """Answers every row with what it would say one row earlier."""

    def __init__(self, inner: Teacher) -> None:
        self.inner = inner

    def can(self, need: Need) -> bool:
        return self.inner.can(need)

    def score(self, request: TeacherRequest) -> TeacherScores:
        reply = self.inner.score(replace(request, distribution=True, sampled=False, top_k=0))
        assert reply.hidden is not None
        return replace(reply, hidden=reply.hidden.roll(1, 0))


class SampledOnly:
    """Tells the log-probability of the sampled token and nothing else, as a hosted model does."""

    def __init__(self, inner: Teacher) -> None:
        self.inner = inner

    def can(self, need: Need) -> bool:
        return need.field == "logp"

    def score(self, request: TeacherRequest) -> TeacherScores:
        assert not request.distribution
        return self.inner.score(replace(request, sampled=True))


def shifted(loaded: LoadedModel) -> Shifted:
    return Shifted(LocalTeacher(loaded, vocab_size=loaded.vocab_size))


def permuted(loaded: LoadedModel, seed: int = 0) -> LoadedModel:
    """The same model over another vocabulary: every id means another token, in and out."""
    model = copy.deepcopy(loaded.model)
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.copy_(weight[order])
    return replace(loaded, model=model)


def frozen_copy(loaded: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(loaded.model)
    model.requires_grad_(False)
    return replace(loaded, model=model)

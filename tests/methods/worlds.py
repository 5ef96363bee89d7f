"""Random optimizer steps, as the library sees them and as the transcriptions do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd.objective import Method
from opd.training.plan import is_scored
from opd.types import Batch, TeacherScores, unpack_rows, with_parts
from tests.builders import Case, evaluate, evaluate_in_parts, identity, with_reduction
from tests.reference.methods.world import World

BASE_VIEWS = (
    "teacher",
    "reference",
    "teacher.before",
    "teacher.partial",
    "teacher.wrong",
    "teacher.probe",
    "teacher.first",
    "teacher.second",
)
LENGTHS = (4, 0, 6, 3, 5, 2, 7)
VOCABULARY = 7


@dataclass(frozen=True)
class Scene:
    """Responses, who gives them which scores, verdicts and columns, for both sides."""

    case: Case
    token: Mapping[str, Any]
    rollout_logits: Tensor

    @classmethod
    def random(cls, seed: int, *, writers: Sequence[int], special_ids: Sequence[int] = ()) -> Scene:
        draw = torch.Generator().manual_seed(1000 + seed)
        case = Case.random(
            seed, lengths=LENGTHS, writers=writers, vocab_size=VOCABULARY, views=BASE_VIEWS
        )

        def near(logits: Tensor, by: float) -> Tensor:
            return logits + by * torch.randn(logits.shape, generator=draw, dtype=torch.float64)

        rollout, engine = (near(case.student_logits, by) for by in (0.3, 0.5))
        size, width = case.tokens.shape

        def logp(logits: Tensor) -> Tensor:
            return logits.log_softmax(-1).gather(-1, case.tokens.unsqueeze(-1)).squeeze(-1)

        verdict = torch.rand(size, generator=draw, dtype=torch.float64)
        verdict = torch.where(torch.rand(size, generator=draw) < 0.6, verdict.round(), verdict)
        verdict[int(torch.randint(size, (1,), generator=draw))] = math.nan
        group = torch.tensor([0, 0, 0, 1, 1, 1, 0][:size])
        if seed % 2:  # a prompt that is never solved
            verdict = torch.where(group == 1, torch.where(verdict.isnan(), verdict, 0.2), verdict)
        token = {
            "old_logp": logp(rollout),
            "sampler_logp": logp(engine),
            "group": group,
            "verdict": verdict,
            "values": torch.randn((size, width), generator=draw, dtype=torch.float64),
            "bootstrap_value": torch.randn(size, generator=draw, dtype=torch.float64),
            "extra": {
                "span": (torch.rand((size, width), generator=draw) < 0.5).double(),
                "teacher_pass": torch.tensor(
                    [0.0, 0.5, 1.0, 0.9, math.nan, 0.7, 0.8][:size]
                ).double(),
                "consensus": (torch.rand(size, generator=draw) < 0.6).double(),
            },
        }
        return cls(case, token, rollout)

    def same(self) -> Scene:
        """Everybody is the student: every view, the trainer and the engine at rollout time."""
        views = dict.fromkeys(self.case.teacher_logits, self.case.student_logits)
        logp = self.case.student_logits.log_softmax(-1)
        logp = logp.gather(-1, self.case.tokens.unsqueeze(-1)).squeeze(-1)
        token = {**self.token, "old_logp": logp, "sampler_logp": logp}
        token |= {
            "values": torch.zeros_like(logp),
            "bootstrap_value": torch.zeros(len(logp)).double(),
        }
        return Scene(replace(self.case, teacher_logits=views), token, self.case.student_logits)

    def judged(self) -> Scene:
        """The same, every response judged, and every prompt with responses of both kinds."""
        size = len(self.token["verdict"])
        verdict = torch.arange(size).remainder(2).to(self.token["verdict"])
        group = torch.arange(size) // 4
        return replace(self, token={**self.token, "verdict": verdict, "group": group})

    def unjudged(self) -> Scene:
        """The same without verdicts."""
        verdict = torch.full_like(self.token["verdict"], math.nan)
        return replace(self, token={**self.token, "verdict": verdict})

    def batch(self, method: Method, special_ids: Sequence[int] = ()) -> Batch:
        """The packed batch, every view of the method answering."""
        views = {}
        for view in with_parts(method.objective.views(), method.views):
            if is_scored(view):
                hidden = self.case.rows(self.case.teacher_logits[view.name])
                views[view.name] = TeacherScores(hidden=hidden, unembedding=identity(VOCABULARY))
            else:
                parts = view.parts or (("student", 1.0),)
                views[view.name] = TeacherScores(
                    parts=parts, normalised=view.normalised, mix=view.mix
                )
        top = self.case.rows(self.rollout_logits).argsort(-1, descending=True)
        return self.case.batch(
            special_ids=special_ids, **{"views": views, "student_top_ids": top, **self.token}
        )

    def world(self, reduction: str, special_ids: Sequence[int] = ()) -> World:
        """What a transcription reads; its logits carry the gradient."""
        case = self.case
        special = torch.zeros_like(case.mask)
        for one in special_ids:
            special |= case.tokens == one
        return World(
            student=case.student_logits.clone().requires_grad_(),
            views=dict(case.teacher_logits),
            tokens=case.tokens,
            mask=case.mask,
            provenance=case.provenance,
            student_top_ids=self.rollout_logits.argsort(-1, descending=True),
            special=special,
            reduction=reduction,
            **{name: self.token[name] for name in WORLD_FIELDS},
            extra=self.token["extra"],
        )


WORLD_FIELDS = ("old_logp", "sampler_logp", "group", "verdict", "values", "bootstrap_value")


def ours(
    scene: Scene, method: Method, reduction: str = "", special_ids: Sequence[int] = ()
) -> tuple[float, npt.NDArray[Any]]:
    """Loss and gradient `[B, T, V]` through the real head."""
    objective = with_reduction(method, reduction) if reduction else method.objective
    out = evaluate(scene.case, objective, scene.batch(method, special_ids))
    whole: npt.NDArray[Any] = unpack_rows(out.gradient, scene.case.mask).numpy()
    return out.loss, whole


def ours_in_parts(scene: Scene, method: Method, max_tokens: int) -> tuple[float, npt.NDArray[Any]]:
    """The same, in micro-batches."""
    loss, gradient = evaluate_in_parts(
        scene.case, method.objective, max_tokens, scene.batch(method)
    )
    whole: npt.NDArray[Any] = unpack_rows(gradient, scene.case.mask).numpy()
    return loss, whole


def theirs(loss: Tensor, world: World) -> tuple[float, npt.NDArray[Any]]:
    """A transcription's loss and its gradient."""
    if not loss.requires_grad:
        return float(loss), np.zeros(tuple(world.student.shape))
    (gradient,) = torch.autograd.grad(loss, world.student)
    return float(loss.detach()), gradient.numpy()

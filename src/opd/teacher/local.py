"""A teacher whose weights are in this process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from opd.fastpath import SMALL, response_states, why_generic
from opd.models import LoadedModel, adapter_disabled, unembedding
from opd.rollout.pack import Part, join_parts, split
from opd.teacher.answers import answers
from opd.types import Need, TeacherRequest, TeacherScores, Unembedding, pack_rows


class LocalTeacher:
    """Scores response rows with a model in memory.

    Where the objective compares distributions, the reply holds the hidden states of the response
    rows and the unembedding: the head projects them chunk by chunk, so the logits of a batch
    never exist in full and every support is possible. Where the objective needs only the chosen
    token or the likeliest ones, the reply holds just those.

    Args:
        loaded: the teacher.
        vocab_size: tokens that student and teacher share.
        max_tokens: padded tokens per forward.
        without_adapter: score with the adapter switched off: the student at step 0.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        vocab_size: int,
        max_tokens: int = 16384,
        without_adapter: bool = False,
    ) -> None:
        self.loaded = loaded
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.without_adapter = without_adapter

    @property
    def path(self) -> str:
        """`fast`, or `generic`: the model's own forward."""
        return "fast" if why_generic(self.loaded.model) is None else "generic"

    @property
    def path_reason(self) -> str:
        """Why `path` is what it is."""
        return why_generic(self.loaded.model) or SMALL

    def can(self, need: Need) -> bool:
        """A model in memory can answer every need."""
        return True

    @torch.no_grad()
    def score(self, request: TeacherRequest) -> TeacherScores:
        """Scores of the N response rows of the request's batch, in their order."""
        head = unembedding(self.loaded.model, self.vocab_size)
        total = request.batch.row_index.shape[0]
        answers: dict[str, list[tuple[Tensor, Tensor]]] = {}
        with self._weights():
            for part in split(request.batch, max_tokens=self.max_tokens):
                for name, value in self._answer(part, request, head).items():
                    answers.setdefault(name, []).append((part.rows, value))
        found: dict[str, Any] = {
            name: join_parts(values, total) for name, values in answers.items()
        }
        return TeacherScores(
            **found,
            unembedding=head if request.distribution else None,
            provenance={"reference": self.loaded.reference},
        )

    def _answer(self, part: Part, request: TeacherRequest, head: Unembedding) -> dict[str, Tensor]:
        batch = part.batch
        hidden = response_states(self.loaded.model, batch)
        if request.distribution:
            return {"hidden": hidden}
        asked = {
            "sampled": request.sampled,
            "top": bool(request.top_k),
            "ids": request.ids is not None,
            "entropy": request.entropy,
        }
        ids = None if request.ids is None else request.ids[part.rows]
        answer = answers(
            hidden,
            head,
            [name for name, is_asked in asked.items() if is_asked],
            tokens=pack_rows(batch.token.tokens, batch.token.mask),
            top_k=request.top_k,
            ids=ids,
            temperature=request.temperature,
            merge_ids=batch.merge_ids,
        )
        return answer if ids is None else {**answer, "ids": ids}

    def _weights(self) -> AbstractContextManager[None]:
        return adapter_disabled(self.loaded.model) if self.without_adapter else nullcontext()

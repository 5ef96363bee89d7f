"""A model in memory that answers queries: micro-batches by a token budget, shared prompts once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opd.fastpath import response_states
from opd.models import LoadedModel, backbone, unembedding
from opd.teacher.answers import answers
from opd.teacher.query import ARRAYS, WANTED, Answer, Asked, Query, bit
from opd.types import Batch, Provenance, TokenBatch, Unembedding

SHARED_FROM = 128
"""Prompt tokens that must be saved, at the least, before a prompt is read once for its group."""


@dataclass(frozen=True)
class Job:
    """One sequence of a query."""

    asked: Asked
    query: Query

    @property
    def settings(self) -> tuple[object, ...]:
        """What jobs must agree in to be answered together."""
        query, ids = self.query, self.asked.ids
        columns = 0 if ids is None else ids.shape[1]
        return query.temperature, query.merge_ids, query.top_k, columns


class Scorer:
    """Answers jobs with one model, whose weights are in this process.

    Args:
        loaded: the model.
        vocab_size: tokens that carry mass.
        max_tokens: padded tokens per forward.
        revision: what answers say of the weights.

    Attributes:
        tokens, shared_tokens: tokens that were asked about so far, and how many of them were
            not read again because a prompt was shared.
    """

    def __init__(
        self, loaded: LoadedModel, *, vocab_size: int, max_tokens: int = 16384, revision: str = ""
    ) -> None:
        self.loaded = loaded
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.revision = revision
        self.tokens = 0
        self.shared_tokens = 0
        self._shares: bool | None = None

    @property
    def head(self) -> Unembedding:
        """What turns the model's hidden states into logits."""
        return unembedding(self.loaded.model, self.vocab_size)

    def answer(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Answer]]:
        """Places among the jobs and their answers, as they become known."""
        self.tokens += sum(job.asked.length for job in jobs)
        alone, groups = self._grouped(jobs)
        for places in self._within_budget(jobs, alone):
            some = [jobs[place] for place in places]
            yield from zip(places, self._answers(some, self._states(some)), strict=True)
        for group in groups:
            yield from self._answer_group(jobs, group)

    def _grouped(self, jobs: Sequence[Job]) -> tuple[list[int], list[list[int]]]:
        """Places of jobs that are read alone, and of those whose prompt is read once."""
        by_prompt: dict[bytes, list[int]] = {}
        for place, job in enumerate(jobs):
            key = job.asked.prompt.numpy().tobytes()
            by_prompt.setdefault(key, []).append(place)
        alone: list[int] = []
        groups = []
        for places in by_prompt.values():
            saved = len(jobs[places[0]].asked.prompt) * (len(places) - 1)
            if saved >= SHARED_FROM and self._can_share():
                groups.append(places)
            else:
                alone += places
        return alone, groups

    def _within_budget(self, jobs: Sequence[Job], places: Sequence[int]) -> Iterator[list[int]]:
        """Places of jobs of like length, no more than fit into one forward."""
        order = sorted(places, key=lambda place: -jobs[place].asked.length)
        while order:
            count = max(1, self.max_tokens // jobs[order[0]].asked.length)
            yield order[:count]
            order = order[count:]

    # -- hidden states -----------------------------------------------------------------------

    @torch.no_grad()
    def _states(self, jobs: Sequence[Job]) -> Float[Tensor, "n H"]:
        """Hidden states that predict the response tokens of whom something is asked."""
        sequences = [torch.cat([job.asked.prompt, job.asked.response]).long() for job in jobs]
        input_ids = pad_sequence(sequences, batch_first=True)
        width, rows = input_ids.shape[1], []
        for place, job in enumerate(jobs):
            first = place * width + len(job.asked.prompt) - 1
            rows.append(first + job.asked.want.nonzero().squeeze(-1))
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return response_states(self.loaded.model, self._batch(input_ids, lengths, torch.cat(rows)))

    def _batch(self, input_ids: Tensor, lengths: Tensor, rows: Tensor) -> Batch:
        """What a forward takes, on the model's device; of the responses only the rows count."""
        device = self.loaded.model.device
        nothing = torch.zeros((len(lengths), 0), dtype=torch.long)
        token = TokenBatch(
            tokens=nothing,
            mask=nothing.bool(),
            provenance=nothing + int(Provenance.PADDING),
            sampler_logp=nothing.float(),
            group=torch.zeros(len(lengths), dtype=torch.long),
            verdict=torch.zeros(len(lengths)),
        )
        return Batch(
            input_ids=input_ids.to(device),
            lengths=lengths.to(device),
            row_index=rows.to(device),
            bootstrap_row=torch.full_like(lengths, -1),
            counts={},
            token=token,
        )

    def _answer_group(
        self, jobs: Sequence[Job], group: Sequence[int]
    ) -> Iterator[tuple[int, Answer]]:
        """Answers for responses to one prompt, which is read once."""
        prompt = jobs[group[0]].asked.prompt
        self.shared_tokens += len(prompt) * (len(group) - 1)
        last, cache = self._read(prompt)
        for places in self._within_budget(jobs, group):
            some = [jobs[place] for place in places]
            yield from zip(
                places, self._answers(some, self._continued(some, last, cache)), strict=True
            )

    @torch.no_grad()
    def _read(self, prompt: Int[Tensor, " P"]) -> tuple[Float[Tensor, "1 H"], Any]:
        """The last hidden state of a prompt, and its cache."""
        model: Any = backbone(self.loaded.model)
        ids = prompt.long().unsqueeze(0).to(self.loaded.model.device)
        read = model(input_ids=ids, use_cache=True)
        return read.last_hidden_state[:, -1], read.past_key_values

    @torch.no_grad()
    def _continued(
        self, jobs: Sequence[Job], last: Float[Tensor, "1 H"], cache: Any
    ) -> Float[Tensor, "n H"]:
        """As `_states`, after a prompt that was read."""
        model: Any = backbone(self.loaded.model)
        fed = pad_sequence([job.asked.response[:-1].long() for job in jobs], batch_first=True)
        states = last.unsqueeze(0).expand(len(jobs), 1, -1)
        if fed.shape[1]:
            own = _repeated(cache, len(jobs))
            after = model(input_ids=fed.to(last.device), past_key_values=own, use_cache=True)
            states = torch.cat([states, after.last_hidden_state], 1)
        wanted = [job.asked.want.nonzero().squeeze(-1) for job in jobs]
        return torch.cat([states[place, rows] for place, rows in enumerate(wanted)])

    def _can_share(self) -> bool:
        """Whether the model's cache can be handed to several continuations; tried once."""
        if self._shares is None:
            try:
                _, cache = self._read(torch.zeros(1, dtype=torch.int32))
                self._shares = all(
                    type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer")
                    for layer in cache.layers
                )
            except (AttributeError, TypeError, ValueError):
                self._shares = False
        return self._shares

    # -- answers -----------------------------------------------------------------------------

    def _answers(self, jobs: Sequence[Job], states: Float[Tensor, "n H"]) -> list[Answer]:
        """Answers in the order of the jobs, whose rows stand in `states` in their order."""
        counts = [int((job.asked.want != 0).sum()) for job in jobs]
        rows = torch.split(states, counts)
        found: dict[int, Answer] = {}
        together: dict[tuple[object, ...], list[int]] = {}
        for place, job in enumerate(jobs):
            together.setdefault(job.settings, []).append(place)
        for places in together.values():
            values = self._values([jobs[p] for p in places], torch.cat([rows[p] for p in places]))
            sizes = [counts[p] for p in places]
            cut = {name: torch.split(value, sizes) for name, value in values.items()}
            for at, place in enumerate(places):
                own = {name: parts[at] for name, parts in cut.items()}
                found[place] = Answer(self.revision, _chosen(jobs[place].asked, own))
        return [found[place] for place in range(len(jobs))]

    def _values(self, jobs: Sequence[Job], states: Float[Tensor, "n H"]) -> dict[str, Tensor]:
        """Whatever some row wants, of every row."""
        query, device = jobs[0].query, states.device
        wanted = {name for name in WANTED for job in jobs if bool(job.asked.rows(name).any())}
        tokens = torch.cat([job.asked.response[job.asked.want != 0] for job in jobs])
        values = answers(
            states,
            self.head,
            wanted,
            tokens=tokens.to(device),
            top_k=query.top_k,
            ids=torch.cat([_ids_of_rows(job.asked) for job in jobs]).to(device),
            temperature=query.temperature,
            merge_ids=query.merge_ids,
        )
        return {name: value.cpu() for name, value in values.items()}


def _ids_of_rows(asked: Asked) -> Tensor:
    """Ids to score by row; a row that wants none gets the id 0, which is dropped again."""
    rows = asked.want != 0
    columns = 0 if asked.ids is None else asked.ids.shape[1]
    ids = torch.zeros((int(rows.sum()), columns), dtype=torch.long)
    if asked.ids is not None:
        ids[asked.rows("ids")[rows]] = asked.ids.long()
    return ids


def _chosen(asked: Asked, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each field the rows that want it; token ids as they travel."""
    rows = asked.want[asked.want != 0]
    chosen = {}
    for name, arrays in ARRAYS.items():
        mine = (rows & bit(name)) != 0
        if not bool(mine.any()):
            continue
        for array in arrays:
            value = values[array][mine]
            chosen[array] = value if value.is_floating_point() else value.int()
    return chosen


def _repeated(cache: Any, count: int) -> Any:
    """A copy of a cache for so many continuations; the original stays as it is."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(count)
    return copied

"""A served teacher tried before a run: is it there, is it the right one, can it, and how fast."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from opd.errors import OpdError, TeacherError
from opd.models import LoadedModel
from opd.teacher.identity import identity
from opd.teacher.query import Answer, Asked, Described, Endpoint, Query, bits, too_long
from opd.teacher.scoring import Job, Scorer

REPEATS = 1e-3
"""How far apart, in nats, two answers to the same question may be: batching changes roundings."""

AGREES_WITH_COPY = 5e-2
"""How far from a local copy, in nats, a served one may be: engines round, and more in bfloat16."""


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Attributes:
        described: what the endpoint says of its model; None where it cannot be asked.
        errors: what a run would fail or be wrong with.
        notes: what is worth knowing.
        tokens_per_s: scored, prompts included; 0: not measured.
    """

    described: Described | None
    errors: tuple[str, ...]
    notes: tuple[str, ...]
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class Trial:
    """What a preflight asks.

    Attributes:
        texts: token ids of prompts and of what follows them, two or more.
        fields: of `opd.teacher.query.WANTED`, that the run will ask for.
        top_k: how many of the teacher's likeliest tokens.
        columns: how many ids to score at every token.
        temperature, merge_ids: as in `Query`.
        longest_prompt: tokens of the longest prompt that the run will ask about, context included.
        max_new_tokens: of the run's responses; 0: not known.
    """

    texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    fields: frozenset[str]
    top_k: int = 0
    columns: int = 0
    temperature: float = 1.0
    merge_ids: tuple[tuple[int, ...], ...] = ()
    longest_prompt: int = 0
    max_new_tokens: int = 0

    def query(self) -> Query:
        """The texts as a query; the ids to score are those of the text itself, in turn."""
        sequences = []
        for prompt, response in self.texts:
            tokens = torch.tensor(response, dtype=torch.int32)
            sequences.append(
                Asked(
                    torch.tensor(prompt, dtype=torch.int32),
                    tokens,
                    torch.full((len(tokens),), bits(self.fields), dtype=torch.uint8),
                    self._ids(tokens) if "ids" in self.fields else None,
                )
            )
        return Query(
            tuple(sequences),
            top_k=self.top_k,
            temperature=self.temperature,
            merge_ids=self.merge_ids,
        )

    def _ids(self, tokens: Int[Tensor, " T"]) -> Int[Tensor, "T J"]:
        return torch.stack([tokens.roll(-i) for i in range(self.columns)], -1)


def preflight(
    endpoint: Endpoint,
    trial: Trial,
    *,
    student: Described,
    merge_stop_ids: bool = False,
    local_copy: LoadedModel | None = None,
) -> Preflight:
    """Try an endpoint as the run will use it.

    Args:
        student: what a server would say of the student.
        merge_stop_ids: end tokens may differ.
        local_copy: the model that the endpoint should serve.
    """
    errors: list[str] = []
    notes: list[str] = []
    try:
        described = endpoint.describe()
    except TeacherError as error:
        return Preflight(None, (str(error),), ())
    apart = differences(described, student, merge_stop_ids=merge_stop_ids)
    errors += [f"it {difference}" for difference in apart]
    longest = trial.longest_prompt + trial.max_new_tokens
    if described.max_tokens and longest > described.max_tokens:
        said = too_long(described.max_tokens, trial.longest_prompt, trial.max_new_tokens)
        errors.append(f"it {said}")
    notes += _unsaid(described, student)
    query = trial.query()
    try:
        first = endpoint.score(query)
        begun = time.perf_counter()
        again = endpoint.score(replace(query, name=f"{query.name}-2"))
        seconds = time.perf_counter() - begun
    except OpdError as error:
        return Preflight(described, (*errors, str(error)), tuple(notes))
    gap = _furthest(first, again)
    if gap > REPEATS:
        notes.append(
            f"the same two texts scored twice differ by up to {gap:.2g} nats: the server's "
            "arithmetic depends on what else it is doing"
        )
    if local_copy is not None:
        error_or_note = _against_copy(first, query, described, local_copy)
        (errors if error_or_note[0] else notes).append(error_or_note[1])
    return Preflight(described, tuple(errors), tuple(notes), query.tokens / max(seconds, 1e-9))


def differences(told: Described, student: Described, *, merge_stop_ids: bool) -> list[str]:
    """Why a served teacher is none for a student, each after the words for the teacher."""
    found = []
    if told.vocabulary and told.vocabulary != student.vocabulary:
        found.append(
            f"has another vocabulary than the student {student.model}: its hash is "
            f"{told.vocabulary}, the student's {student.vocabulary}; take a teacher of the same "
            "tokenizer"
        )
    ends, own = set(told.special.get("eos", ())), set(student.special.get("eos", ()))
    if ends and ends != own and not merge_stop_ids:
        found.append(
            f"ends with the tokens {sorted(ends)} and the student with {sorted(own)}; set "
            "method.merge_stop_ids = true, or make them agree"
        )
    return found


def _unsaid(told: Described, student: Described) -> list[str]:
    found = []
    if not told.vocabulary:
        found.append("its protocol does not tell the vocabulary, so the student's is taken for it")
    if told.template != student.template and (told.template or told.vocabulary):
        found.append(
            "its chat template is another than the student's; prompts are rendered with the "
            "student's, token for token"
        )
    return found


def _furthest(one: Sequence[Answer], other: Sequence[Answer]) -> float:
    """The largest difference of a log-probability between two answers to the same query."""
    gaps = [0.0]
    for left, right in zip(one, other, strict=True):
        for name in left.values.keys() & right.values.keys():
            if name.endswith("_logp"):
                gaps.append(_gap(left.values[name], right.values[name]))
    return max(gaps)


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


def _against_copy(
    answers: Sequence[Answer], query: Query, told: Described, copy: LoadedModel
) -> tuple[bool, str]:
    """Whether a local copy says something else, and in words by how much."""
    scorer = Scorer(copy, vocab_size=copy.vocab_size)
    own = dict(scorer.answer([Job(asked, query) for asked in query.sequences]))
    apart = _furthest(answers, [own[place] for place in range(len(own))])
    revision = identity(copy).revision
    if apart > AGREES_WITH_COPY:
        reason = (
            "the weights differ"
            if told.revision and told.revision != revision
            else "an engine that scores other text, or at another temperature, does that"
        )
        return True, f"it differs from the local copy by up to {apart:.2g} nats: {reason}"
    return False, f"it agrees with the local copy to {apart:.1g} nats"

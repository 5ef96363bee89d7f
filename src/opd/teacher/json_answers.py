"""What endpoints that answer in JSON share: what is sent, and answers built token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd.errors import TeacherError, nearest
from opd.teacher.connection import Connection, as_json, whole
from opd.teacher.query import (
    WANTED,
    Answer,
    AnswerError,
    Asked,
    Described,
    Limits,
    Query,
    bit,
    check_answer,
)

T = TypeVar("T")

JSON = {"Content-Type": "application/json"}
MODELS, COMPLETIONS = "/v1/models", "/v1/completions"
MOST_INFO_BYTES = 2**24
ENTRY_BYTES = 512
"""More than one log-probability takes in JSON, its token's text included."""


@dataclass(frozen=True)
class Scored:
    """What a reply says of one response token.

    Attributes:
        sampled: log-probability of the token itself.
        top: the `top_k` likeliest tokens and their log-probabilities, the likeliest first.
        ids: log-probabilities of the ids that were asked for.
    """

    sampled: float = math.nan
    top: Sequence[tuple[int, float]] = ()
    ids: Sequence[float] = ()


# --------------------------------------------------------------------------------------------
# What is asked


def refuse_what_it_lacks(query: Query, limits: Limits) -> None:
    """Refuse a query that a protocol cannot carry, before it is sent.

    Raises:
        TeacherError: the reason and the way out, as `limits` gives them.
    """
    for name in WANTED:
        if name not in limits.wanted and query.wants(name):
            raise TeacherError(f"it has no {name!r}: {limits.why_not[name]}")
    if query.wants("top") and limits.top_k is not None and query.top_k > limits.top_k:
        raise TeacherError(
            f"{query.top_k} of its likeliest tokens are wanted, and it gives {limits.top_k}: "
            f"{limits.why_not['top_k']}"
        )
    if query.temperature != 1.0 and not limits.temperature:
        raise TeacherError(f"temperature {query.temperature:g}: {limits.why_not['temperature']}")
    if query.merge_ids and not limits.merge_ids:
        raise TeacherError(f"several ids count as one: {limits.why_not['merge_ids']}")


def asked_about(query: Query) -> list[int]:
    """Places of the sequences of which something is asked."""
    return [place for place, asked in enumerate(query.sequences) if bool((asked.want != 0).any())]


def sent(asked: Asked) -> list[int]:
    """Token ids up to the last one of which something is asked."""
    last = int((asked.want != 0).nonzero()[-1])
    return [*map(int, asked.prompt.tolist()), *map(int, asked.response[: last + 1].tolist())]


def ask(
    connection: Connection, path: str, body: Mapping[str, object], *, limit: int, request: str
) -> Any:
    """The JSON that comes back for a JSON body of no more than `limit` bytes."""
    data = json.dumps(body, separators=(",", ":")).encode()
    return as_json(connection.post(path, lambda: (data, JSON), whole(limit), request=request))


def reply_limit(tokens: int, per_token: int) -> int:
    """Most bytes of a reply with so many log-probabilities per token."""
    return 2**20 + tokens * (per_token + 2) * ENTRY_BYTES


# --------------------------------------------------------------------------------------------
# What is answered


def member(said: object, name: str, kind: type[T], what: str) -> T:
    """A member of a JSON object.

    Raises:
        AnswerError: there is none, or it is of another kind.
    """
    if not isinstance(said, dict):
        raise AnswerError(f"{what} is {_short(said)}, no object")
    value = said.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise AnswerError(f"{name} of {what} is {_short(value)}, no {kind.__name__}")
    return value


def number(value: object, what: str) -> float:
    """A log-probability as JSON has it.

    Raises:
        AnswerError: there is none, or it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise AnswerError(f"the log-probability of {what} is {_short(value)}")
    return float(value)


def of_length(values: list[Any], length: int, what: str) -> list[Any]:
    """The values, if there are so many.

    Raises:
        AnswerError: there are more or fewer.
    """
    if len(values) != length:
        raise AnswerError(f"{what}: {len(values)} entries, not {length}")
    return values


def same_tokens(told: Sequence[object], tokens: Sequence[int], what: str) -> None:
    """Refuse an answer about other tokens than were sent.

    Raises:
        AnswerError: names the first position.
    """
    of_length(list(told), len(tokens), what)
    for place, (its, ours) in enumerate(zip(told, tokens, strict=True)):
        if its != ours:
            raise AnswerError(
                f"{what} has {_short(its)} at position {place}, where {ours} was sent"
            )


def answered(
    asked: Asked,
    query: Query,
    read: Callable[[int], Scored],
    *,
    revision: str = "",
) -> Answer:
    """The answer for one sequence, checked.

    Args:
        read: what the reply says of a response token, called for those that want something.

    Raises:
        AnswerError: the answer lacks what was wanted, or says what cannot be.
    """
    sampled: list[float] = []
    top_ids: list[list[int]] = []
    top_logp: list[list[float]] = []
    ids: list[list[float]] = []
    for place, want in enumerate(asked.want.tolist()):
        if not want:
            continue
        scored = read(place)
        if want & bit("sampled"):
            sampled.append(scored.sampled)
        if want & bit("top"):
            top_ids.append([token for token, _ in scored.top])
            top_logp.append([logp for _, logp in scored.top])
        if want & bit("ids"):
            ids.append(list(scored.ids))
    values: dict[str, Tensor] = {}
    if sampled:
        values["sampled_logp"] = torch.tensor(sampled)
    if top_ids:
        values["top_ids"] = torch.tensor(top_ids, dtype=torch.int32)
        values["top_logp"] = torch.tensor(top_logp)
    if ids:
        values["ids_logp"] = torch.tensor(ids)
    check_answer(asked, query, values)
    return Answer(revision, values)


def in_order(
    query: Query, places: Sequence[int], read: Callable[[int], Answer], *, revision: str = ""
) -> list[Answer]:
    """Answers in the order of the sequences; empty where nothing is asked.

    Args:
        places: those of which something is asked.
        read: the answer for the n-th of them.

    Raises:
        TeacherError: names the sequence.
    """
    answers = [Answer(revision, {})] * len(query.sequences)
    for n, place in enumerate(places):
        try:
            answers[place] = read(n)
        except AnswerError as error:
            raise TeacherError(f"sequence {place}: {error}") from error
    return answers


def _short(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --------------------------------------------------------------------------------------------
# What OpenAI's routes have in common, whoever serves them


def without_version(url: str) -> str:
    """A server's address without the `/v1` that OpenAI's clients are given."""
    return url.rstrip("/").removesuffix("/v1")


def models_of(connection: Connection) -> dict[str, dict[str, Any]]:
    """What `/v1/models` says, by the model's name.

    Raises:
        TeacherError: it says nothing of the kind.
    """
    said = as_json(connection.get(MODELS, whole(MOST_INFO_BYTES)))
    try:
        listed = member(said, "data", list, MODELS)
        return {member(entry, "id", str, f"a model of {MODELS}"): entry for entry in listed}
    except AnswerError as error:
        raise TeacherError(str(error)) from error


def described_model(models: Mapping[str, dict[str, Any]], model: str) -> Described:
    """What is said of one model; of the first one where none is named.

    Raises:
        TeacherError: the model is not served.
    """
    name = model or next(iter(models), "")
    if name not in models:
        raise TeacherError(f"it serves no model {name!r}. {nearest(name, models)}")
    longest = models[name].get("max_model_len")
    # one token is generated after the sequence, and has to fit too
    longest = longest - 1 if isinstance(longest, int) and longest > 0 else 0
    return Described(model=name, max_tokens=longest, extra=models[name])


def choices_of(said: object, count: int) -> list[dict[str, Any]]:
    """The choices of a completion, one per prompt, in the order of the prompts.

    Raises:
        TeacherError: there are others, or none.
    """
    try:
        found: dict[int, dict[str, Any]] = {}
        for choice in member(said, "choices", list, "the reply"):
            found[member(choice, "index", int, "a choice")] = choice
        of_length(list(found), count, "choices of the reply")
        return [found[place] for place in range(count)]
    except KeyError as error:
        raise TeacherError(f"the reply has no choice for prompt {error}") from None
    except AnswerError as error:
        raise TeacherError(str(error)) from error

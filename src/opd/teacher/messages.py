"""Queries and answers as frames of `wire`, checked on arrival."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from opd.teacher.query import ARRAYS, WANTED, Answer, Asked, Query, bit
from opd.teacher.wire import Frame, WireError

TRIED = "try"
"""In every frame's meta: which try of which request it belongs to, so that none is used twice."""

MOST_TEXT = 200
"""Characters of `try` and `name`: every answer repeats the one, and logs the other."""

QUERY_ARRAYS = (
    "prompts",
    "prompt_lengths",
    "prompt_of",
    "responses",
    "response_lengths",
    "want",
    "ids",
)


@dataclass(frozen=True)
class QueryLimits:
    """What a server takes at once.

    Attributes:
        vocab_size: ids below this exist.
        max_tokens: most tokens of one sequence.
        max_query_tokens: most tokens of all sequences of a query.
        max_sequences: most sequences of a query.
        max_top_k: most of the teacher's likeliest tokens.
        max_ids: most ids to score at one token.
    """

    vocab_size: int
    max_tokens: int = 32768
    max_query_tokens: int = 2**20
    max_sequences: int = 4096
    max_top_k: int = 1024
    max_ids: int = 4096


def query_frame(query: Query, tried: str) -> Frame:
    """The frame that asks; a prompt that several sequences share is in it once."""
    places: dict[bytes, int] = {}
    prompts: list[Tensor] = []
    prompt_of = []
    for asked in query.sequences:
        key = asked.prompt.to(torch.int32).numpy().tobytes()
        if key not in places:
            places[key] = len(prompts)
            prompts.append(asked.prompt)
        prompt_of.append(places[key])
    ids = [asked.ids for asked in query.sequences if asked.ids is not None and len(asked.ids)]
    if len({own.shape[1] for own in ids}) > 1:
        raise ValueError("the sequences of one query score the same number of ids at every token")
    arrays = {
        "prompts": _joined(prompts),
        "prompt_lengths": _ints([len(prompt) for prompt in prompts]),
        "prompt_of": _ints(prompt_of),
        "responses": _joined([asked.response for asked in query.sequences]),
        "response_lengths": _ints([len(asked.response) for asked in query.sequences]),
        "want": torch.cat([asked.want for asked in query.sequences]),
        **({"ids": _joined(ids)} if ids else {}),
    }
    meta = {
        TRIED: tried,
        "name": query.name,
        "top_k": query.top_k,
        "temperature": query.temperature,
        "merge_ids": [list(group) for group in query.merge_ids],
        "compress": query.compress,
    }
    return Frame("query", meta, arrays)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)).to(torch.int32)


def _ints(values: Sequence[int]) -> Int[Tensor, " n"]:
    return torch.tensor(values, dtype=torch.int32)


def read_query(frame: Frame, limits: QueryLimits) -> tuple[Query, str]:
    """The query of a frame, and which try it is.

    Raises:
        WireError: says which part is missing, contradicts another, or exceeds which limit.
    """
    if frame.kind != "query":
        raise WireError(f"a frame of kind {frame.kind!r} where a query was expected")
    if strange := set(frame.arrays) - set(QUERY_ARRAYS):
        raise WireError(f"a query with the array {sorted(strange)[0]}")
    tried, settings = _text(frame.meta, TRIED), _settings(frame.meta, limits)
    prompts = _cut(frame, "prompts", "prompt_lengths", limits)
    responses = _cut(frame, "responses", "response_lengths", limits)
    prompt_of = _vector(frame, "prompt_of")
    if len(prompt_of) != len(responses) or not len(responses):
        raise WireError(
            f"{len(responses)} responses, and {len(prompt_of)} say which prompt is theirs"
        )
    if bool(((prompt_of < 0) | (prompt_of >= len(prompts))).any()):
        raise WireError(f"prompt_of names a prompt beyond the {len(prompts)} that there are")
    want = _array(frame, "want", torch.uint8, 1)
    if len(want) != sum(map(len, responses)) or bool((want >= 1 << len(WANTED)).any()):
        raise WireError(
            f"want has {len(want)} entries for {sum(map(len, responses))} response tokens, or bits "
            "that version 1 does not have"
        )
    sequences = _sequences(frame, prompts, prompt_of, responses, want, limits)
    query = Query(sequences, **settings)
    if query.tokens > limits.max_query_tokens:
        raise WireError(
            f"{query.tokens} tokens in one query, and this server takes {limits.max_query_tokens}"
        )
    if query.wants("top") and not query.top_k:
        raise WireError("top is wanted with top_k = 0")
    return query, tried


def _settings(meta: Mapping[str, Any], limits: QueryLimits) -> dict[str, Any]:
    top_k, temperature = meta.get("top_k", 0), meta.get("temperature", 1.0)
    if not _is_int(top_k) or not 0 <= top_k <= min(limits.max_top_k, limits.vocab_size):
        raise WireError(
            f"top_k = {top_k!r}, and this server takes 0 to "
            f"{min(limits.max_top_k, limits.vocab_size)}"
        )
    if not _is_number(temperature) or not 0 < temperature < 1e6:
        raise WireError(f"temperature = {temperature!r}, and it must lie between 0 and a million")
    groups = meta.get("merge_ids", [])
    plain = isinstance(groups, list) and all(isinstance(group, list) for group in groups)
    flat = [one for group in groups for one in group] if plain else []
    if (
        not plain
        or not all(_is_int(one) and 0 <= one < limits.vocab_size for one in flat)
        or len(set(flat)) < len(flat)
        or any(len(group) < 2 for group in groups)
        or len(flat) > limits.max_ids
    ):
        raise WireError("merge_ids must be lists of two or more ids, each id in one of them")
    return {
        "top_k": top_k,
        "temperature": float(temperature),
        "merge_ids": tuple(map(tuple, groups)),
        "compress": meta.get("compress") is True,
        "name": _text(meta, "name"),
    }


def _text(meta: Mapping[str, Any], key: str) -> str:
    """A word for logs and answers: short, on one line."""
    text = meta.get(key, "")
    if not isinstance(text, str) or len(text) > MOST_TEXT or not text.isprintable():
        raise WireError(f"{key} must be a text of at most {MOST_TEXT} printable characters")
    return text


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _array(frame: Frame, name: str, dtype: torch.dtype, dimensions: int) -> Tensor:
    if name not in frame.arrays:
        raise WireError(f"the array {name} is missing")
    array = frame.arrays[name]
    if array.dtype != dtype or array.dim() != dimensions:
        raise WireError(f"the array {name} is {array.dim()}-dimensional {array.dtype}")
    return array


def _vector(frame: Frame, name: str) -> Int[Tensor, " n"]:
    return _array(frame, name, torch.int32, 1)


def _cut(frame: Frame, name: str, of_lengths: str, limits: QueryLimits) -> list[Tensor]:
    """An array of several parts, cut to them."""
    whole, lengths = _vector(frame, name), _vector(frame, of_lengths)
    if len(lengths) > limits.max_sequences:  # before there is a tensor for each
        raise WireError(
            f"{len(lengths)} {name} in one query, and this server takes {limits.max_sequences}"
        )
    if bool((lengths < 0).any()) or int(lengths.sum(dtype=torch.int64)) != len(whole):
        raise WireError(f"{name} has {len(whole)} entries, which is not the sum of {of_lengths}")
    return list(torch.split(whole, lengths.tolist()))


def _sequences(
    frame: Frame,
    prompts: list[Tensor],
    prompt_of: Tensor,
    responses: list[Tensor],
    want: Tensor,
    limits: QueryLimits,
) -> tuple[Asked, ...]:
    for name in ("prompts", "responses"):
        _check_ids(frame.arrays[name], name, limits)
    if any(not len(prompt) for prompt in prompts):
        raise WireError("a prompt is empty, so nothing predicts the first token after it")
    wants_ids = (want & bit("ids")) != 0
    asks_ids = "ids" in frame.arrays or bool(wants_ids.any())
    ids = _array(frame, "ids", torch.int32, 2) if asks_ids else None
    if ids is not None:
        _check_ids(ids, "ids", limits)
        if len(ids) != int(wants_ids.sum()) or not 0 < ids.shape[1] <= limits.max_ids:
            raise WireError(
                f"ids has {len(ids)} rows of {ids.shape[1]}, {int(wants_ids.sum())} tokens want "
                f"them, and this server takes up to {limits.max_ids}"
            )
    found, place, id_place = [], 0, 0
    for number, response in enumerate(responses):
        own = want[place : place + len(response)]
        place += len(response)
        rows = int(((own & bit("ids")) != 0).sum())
        chosen = None if ids is None or not rows else ids[id_place : id_place + rows]
        id_place += rows
        asked = Asked(prompts[int(prompt_of[number])], response, own, chosen)
        if asked.length > limits.max_tokens:
            raise WireError(
                f"sequence {number} has {asked.length} tokens, and this server takes "
                f"{limits.max_tokens}"
            )
        found.append(asked)
    return tuple(found)


def _check_ids(ids: Tensor, name: str, limits: QueryLimits) -> None:
    outside = (ids < 0) | (ids >= limits.vocab_size)
    if bool(outside.any()):
        raise WireError(
            f"{name} has the token id {int(ids[outside][0])}, and the vocabulary has "
            f"{limits.vocab_size} tokens"
        )


# --------------------------------------------------------------------------------------------
# Answers


def digest(asked: Asked) -> int:
    """A checksum of what was asked, so that an answer to something else is recognised.

    The CRC-32 of int32 numbers: how long prompt and response are, then prompt, response, want and
    ids. Without the lengths, other cuts of the same numbers would be the same.
    """
    lengths = _ints([len(asked.prompt), len(asked.response)])
    parts = (lengths, asked.prompt, asked.response, asked.want)
    found = 0
    for part in (*parts, *(() if asked.ids is None else (asked.ids,))):
        wide = part.to(torch.int32).contiguous()
        found = zlib.crc32(wide.numpy().tobytes(), found)
    return found


def answer_frame(asked: Asked, answer: Answer, *, number: int, tried: str) -> Frame:
    """The frame of one sequence's answer."""
    meta = {
        TRIED: tried,
        "sequence": number,
        "revision": answer.revision,
        "digest": digest(asked),
    }
    return Frame("answer", meta, answer.values)


def read_answer(frame: Frame, query: Query, tried: str, missing: set[int]) -> tuple[int, Answer]:
    """The number of a sequence and its answer.

    Args:
        missing: numbers of the sequences that have no answer yet.

    Raises:
        WireError: an answer to another try, another sequence, or twice.
    """
    if frame.meta.get(TRIED) != tried:
        raise WireError(f"an answer to another request: {frame.meta.get(TRIED)!r}, not {tried!r}")
    number = frame.meta.get("sequence")
    if not _is_int(number) or number not in missing:
        raise WireError(f"an answer for sequence {number!r}, which is not waited for")
    asked = query.sequences[number]
    if frame.meta.get("digest") != digest(asked):
        raise WireError(f"sequence {number} was answered for other tokens than were asked")
    known = {array for name in WANTED for array in ARRAYS[name]}
    if strange := set(frame.arrays) - known:
        raise WireError(f"an answer with the array {sorted(strange)[0]}")
    return number, Answer(str(frame.meta.get("revision", "")), dict(frame.arrays))

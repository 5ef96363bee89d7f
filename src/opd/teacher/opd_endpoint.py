"""A teacher behind `opd serve`."""

from __future__ import annotations

import json
import math
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

from opd.errors import TeacherError
from opd.teacher.connection import (
    Connection,
    ConnectionSettings,
    CutOffError,
    as_json,
    naming,
    whole,
)
from opd.teacher.messages import query_frame, read_answer
from opd.teacher.query import (
    WANTED,
    Answer,
    AnswerError,
    Described,
    Limits,
    Query,
    check_answer,
)
from opd.teacher.shard import head_parts
from opd.teacher.wire import MOST_META_BYTES, VERSION, FrameReader, WireError, encode
from opd.types import Unembedding

CONTENT_TYPE = "application/x-opd-frames"
SCORE, INFO, HEAD = "/v1/score", "/info", "/head"
MOST_INFO_BYTES = 2**20
MOST_HEAD_BYTES = 2**34
BESIDE_BYTES = MOST_META_BYTES + 2**10
"""Of a query's body, so much is kept for what is no sequence: header, table and meta."""


class OpdEndpoint:
    """The client of the scoring protocol of `docs/wire.md`.

    Args:
        name: of the teacher, for messages.
        url: of the server.
    """

    def __init__(self, name: str, url: str, settings: ConnectionSettings) -> None:
        self.connection = Connection(f"teacher {name!r} (opd serve at {url})", url, settings)
        self._described: Described | None = None
        self._head: Unembedding | None = None
        self._asks_once = threading.RLock()

    @property
    def name(self) -> str:
        return self.connection.name

    @property
    def limits(self) -> Limits:
        """What the server said that it takes; before it was asked, what the protocol has."""
        return Limits(frozenset(WANTED)) if self._described is None else limits_of(self._described)

    def close(self) -> None:
        self.connection.close()

    def describe(self) -> Described:
        """What `/info` says, asked once."""
        with self._asks_once, naming(self.connection, INFO):
            if self._described is None:
                said = as_json(self.connection.get(INFO, whole(MOST_INFO_BYTES)))
                self._described = described(said)
            return self._described

    def score(self, query: Query) -> list[Answer]:
        """Answers in the order of the sequences; see `Endpoint.score`."""
        request = f"request {query.name[:8]} ({len(query.sequences)} sequences)"
        model = self.describe()  # asked before, since within a request it would need a second slot
        tried = ""

        def body() -> tuple[bytes, Mapping[str, str]]:
            nonlocal tried
            tried = uuid.uuid4().hex
            return encode(query_frame(query, tried)), {"Content-Type": CONTENT_TYPE}

        def read(arriving: Iterator[bytes]) -> list[Answer]:
            return _read(arriving, query, tried, model)

        with naming(self.connection, request):
            return self.connection.post(SCORE, body, read, request=request)

    def head(self) -> Unembedding:
        """What turns hidden states into logits, fetched once and compared with `/info`."""
        with self._asks_once, naming(self.connection, HEAD):
            if self._head is None:
                data = self.connection.get(HEAD, whole(MOST_HEAD_BYTES))
                self._head = read_head(data, self.describe())
            return self._head


def _read(arriving: Iterator[bytes], query: Query, tried: str, model: Described) -> list[Answer]:
    """Answers in the order of the sequences, from one try's reply."""
    reader, found = FrameReader(), dict[int, Answer]()
    missing = set(range(len(query.sequences)))
    try:
        for data in arriving:
            for frame in reader.feed(data):
                if frame.kind == "error":  # a status of 500, had the reply not begun
                    said = " ".join(str(frame.meta.get("message")).split())[:500]
                    raise CutOffError(f"the server gave up: {said}")
                if frame.kind == "end":
                    if missing:
                        raise WireError(f"{len(missing)} sequences were not answered")
                    return [found[number] for number in range(len(found))]
                if frame.kind != "answer":
                    raise WireError(f"a frame of kind {frame.kind!r} in a reply")
                number, answer = read_answer(frame, query, tried, missing)
                if answer.revision != model.revision:
                    raise TeacherError(
                        f"it answers with revision {answer.revision!r} and was asked as "
                        f"{model.revision!r}: another model, or changed weights; restart the run "
                        "to train against that one"
                    )
                asked = query.sequences[number]
                check_answer(asked, query, answer.values, vocab_size=model.vocab_size)
                found[number] = answer
                missing.discard(number)
    except (WireError, AnswerError) as error:
        raise TeacherError(str(error)) from error
    raise CutOffError(
        f"the reply ended with {len(missing)} of {len(query.sequences)} sequences missing"
    )


def described(said: object) -> Described:
    """What `/info` says, checked.

    Raises:
        TeacherError: it is not what a scoring server says.
    """
    try:
        told: Any = said
        if told["protocol"] != "opd" or VERSION not in told["versions"]:
            raise ValueError(f"protocol {told['protocol']!r}, versions {told['versions']!r}")
        found = Described(
            model=str(told["model"]),
            revision=str(told["revision"]),
            vocab_size=_count(told, "vocab_size", most=2**31),
            vocabulary=str(told["vocabulary"]),
            template=str(told["template"]),
            special={
                str(role): tuple(_id(one, role) for one in ids)
                for role, ids in told["special"].items()
            },
            dtype=str(told["dtype"]),
            max_tokens=_count(told, "max_tokens"),
            extra=dict(told),
        )
        limits_of(found)
        _hidden_size(found)
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TeacherError(
            "this is no scoring server of version 1; start one with `opd serve MODEL`, or set "
            f"teacher.protocol ({type(error).__name__}: {error})"
        ) from None


def limits_of(told: Described) -> Limits:
    """What a server takes, as its `/info` says; what it leaves out is not known.

    Raises:
        TypeError, ValueError: it says something else there.
    """
    extra: Mapping[str, Any] = told.extra
    wanted = frozenset(extra.get("wanted", WANTED)) & frozenset(WANTED)
    limits = extra.get("limits", {})
    if not isinstance(limits, dict):
        raise TypeError(f"limits = {limits!r}")
    body_bytes = _count(limits, "body_bytes", needed=False)
    return Limits(
        wanted,
        top_k=_count(limits, "top_k", needed=False) or None,
        why_not=dict.fromkeys(
            set(WANTED) - wanted, "its /info leaves it out; serve the teacher with `opd serve`"
        ),
        sequence_tokens=told.max_tokens,
        sequences=_count(limits, "sequences", needed=False) or None,
        query_tokens=_count(limits, "query_tokens", needed=False) or None,
        query_bytes=max(1, body_bytes - BESIDE_BYTES) if body_bytes else None,
        ids=_count(limits, "ids", needed=False) or None,
    )


def _hidden_size(told: Described) -> int:
    """Numbers in a hidden state; 0: not said."""
    return _count(told.extra, "hidden_size", needed=False)


def _count(
    told: Mapping[str, Any], key: str, *, needed: bool = True, most: int = sys.maxsize
) -> int:
    """A number of things, at least one; 0 where it is left out and may be."""
    if key not in told and not needed:
        return 0
    value = told[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{key} = {value!r}")
    return value


def _id(value: object, role: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"special.{role} has {value!r}")
    return value


def head_bytes(head: Unembedding, revision: str) -> bytes:
    """An unembedding as safetensors, its numbers in the metadata."""
    tensors, told = head_parts(head, revision)
    return safetensors.torch.save(tensors, metadata={"opd": told})


def read_head(data: bytes, told: Described) -> Unembedding:
    """The unembedding that `head_bytes` wrote.

    Args:
        told: what the server said of its model, which the unembedding has to fit.

    Raises:
        TeacherError: it is something else, or of other weights.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        numbers = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["opd"])
        if numbers["revision"] != told.revision:
            raise ValueError(f"it is of revision {numbers['revision']!r}, not {told.revision!r}")
        tensors = safetensors.torch.load(data)
        weight, bias = tensors["weight"], tensors.get("bias")
        _check_tensors(weight, bias, told)
        scale, cap = float(numbers["logit_scale"]), numbers["soft_cap"]
        if _count(numbers, "vocab_size") != told.vocab_size:
            raise ValueError(
                f"it has {numbers['vocab_size']} tokens, and {INFO} says {told.vocab_size}"
            )
        if not math.isfinite(scale):
            raise ValueError(f"logit_scale = {scale}")
        if cap is not None and not 0 < float(cap) < math.inf:
            raise ValueError(f"soft_cap = {cap}, and a cap lies above 0")
        return Unembedding(
            weight=weight,
            vocab_size=told.vocab_size,
            bias=bias,
            logit_scale=scale,
            soft_cap=None if cap is None else float(cap),
        )
    except (
        *(KeyError, ValueError, TypeError, OverflowError, RecursionError),
        safetensors.SafetensorError,
    ) as error:
        raise TeacherError(
            f"it handed out no unembedding: {error}; start the server again from an undamaged model"
        ) from error


def _check_tensors(weight: Tensor, bias: Tensor | None, told: Described) -> None:
    """Refuse what would turn hidden states into no logits.

    Raises:
        ValueError: what is wrong.
    """
    size, width = told.vocab_size, _hidden_size(told) or (weight.shape[-1] if weight.dim() else 0)
    if tuple(weight.shape) != (size, width) or not width:
        raise ValueError(f"weight has the shape {list(weight.shape)}, not [{size}, {width}]")
    if bias is not None and tuple(bias.shape) != (size,):
        raise ValueError(f"bias has the shape {list(bias.shape)}, not [{size}]")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}")
        if not all(bool(end.isfinite()) for end in value.aminmax()):
            raise ValueError(f"{name} has numbers that are not finite")

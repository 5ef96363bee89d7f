"""A teacher behind `opd serve`."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch

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
from opd.teacher.wire import VERSION, FrameReader, WireError, encode
from opd.types import Unembedding

CONTENT_TYPE = "application/x-opd-frames"
SCORE, INFO, HEAD = "/v1/score", "/info", "/head"
MOST_INFO_BYTES = 2**20
MOST_HEAD_BYTES = 2**34


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
        return Limits(frozenset(WANTED))

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
                self._head = read_head(data, revision=self.describe().revision)
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
        return Described(
            model=str(told["model"]),
            revision=str(told["revision"]),
            vocab_size=int(told["vocab_size"]),
            vocabulary=str(told["vocabulary"]),
            template=str(told["template"]),
            special={str(role): tuple(map(int, ids)) for role, ids in told["special"].items()},
            dtype=str(told["dtype"]),
            max_tokens=int(told["max_tokens"]),
            extra=dict(told),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TeacherError(
            "this is no scoring server of version 1; start one with `opd serve MODEL`, or set "
            f"teacher.protocol ({type(error).__name__}: {error})"
        ) from None


def head_bytes(head: Unembedding, revision: str) -> bytes:
    """An unembedding as safetensors, its numbers in the metadata."""
    tensors = {"weight": head.weight[: head.vocab_size].detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias[: head.vocab_size].detach().cpu().contiguous()
    told = {
        "revision": revision,
        "vocab_size": head.vocab_size,
        "logit_scale": head.logit_scale,
        "soft_cap": head.soft_cap,
    }
    return safetensors.torch.save(tensors, metadata={"opd": json.dumps(told)})


def read_head(data: bytes, *, revision: str) -> Unembedding:
    """The unembedding that `head_bytes` wrote.

    Raises:
        TeacherError: it is something else, or of other weights.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        told = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["opd"])
        if told["revision"] != revision:
            raise ValueError(f"it is of revision {told['revision']!r}, not {revision!r}")
        tensors = safetensors.torch.load(data)
        return Unembedding(
            weight=tensors["weight"],
            vocab_size=int(told["vocab_size"]),
            bias=tensors.get("bias"),
            logit_scale=float(told["logit_scale"]),
            soft_cap=None if told["soft_cap"] is None else float(told["soft_cap"]),
        )
    except (KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise TeacherError(f"{HEAD} handed out no unembedding: {error}") from error

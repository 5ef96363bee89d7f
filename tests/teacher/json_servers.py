"""A server of JSON in this process, and what a tiny model says, for the endpoints that read it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd.models import LoadedModel, load_model
from opd.teacher.connection import ConnectionSettings
from opd.teacher.query import Answer, Asked, Endpoint, Query, bits, check_answer

E = TypeVar("E", bound=Endpoint)

PATIENT = ConnectionSettings(timeout_s=20.0, retry_s=20.0, concurrency=4)
IMPATIENT = ConnectionSettings(timeout_s=20.0, retry_s=0.0, concurrency=4, key="secret")

Reply = tuple[int, Any]
"""A status, and what is answered: JSON, or bytes as they are."""


class JsonServer:
    """Answers on 127.0.0.1 while the context of `serving` is open.

    Attributes:
        routes: by path, a function from the request's JSON to the reply.
        first: replies that come before any of the routes' own.
        alter: changes a successful reply before it is sent.
        seen: paths and bodies that arrived.
        keys: the headers that carried a key.
        clients: endpoints that are closed with the server.
    """

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[Any], Reply]] = {}
        self.first: list[Reply] = []
        self.alter: Callable[[Any], Any] = lambda said: said
        self.seen: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []
        self.clients: list[Endpoint] = []
        self.url = ""

    def client(self, endpoint: E) -> E:
        """The endpoint, which is closed with the server."""
        self.clients.append(endpoint)
        return endpoint

    def reply(self, path: str, body: Any) -> Reply:
        self.seen.append((path, body))
        if self.first:
            return self.first.pop(0)
        if path not in self.routes:
            return 404, {"detail": "Not Found"}
        status, said = self.routes[path](body)
        return (
            (status, self.alter(json.loads(json.dumps(said)))) if status == 200 else (status, said)
        )

    def asked(self, path: str) -> list[Any]:
        """Bodies that arrived at a path."""
        return [body for seen, body in self.seen if seen == path]


@contextmanager
def serving() -> Iterator[JsonServer]:
    server = JsonServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/json"
            self._answer(json.loads(data))

        def _answer(self, body: Any) -> None:
            server.keys.append(self.headers["Authorization"])
            status, said = server.reply(self.path, body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        for client in server.clients:
            client.close()
        http.shutdown()
        http.server_close()
        thread.join()


# --------------------------------------------------------------------------------------------
# What a model says


@cache
def teacher() -> LoadedModel:
    return load_model("builtin:sort-teacher", device="cpu")


@cache
def _log_probs(tokens: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        logits = teacher().model(input_ids=torch.tensor([tokens])).logits[0]
    return logits.double().log_softmax(-1)


def log_probs(tokens: list[int]) -> Tensor:
    """`[len(tokens), V]`: row i is the distribution after tokens 0 to i."""
    return _log_probs(tuple(tokens))


def asked(
    prompt: list[int], response: list[int], want: list[tuple[str, ...]], ids: Any = None
) -> Asked:
    return Asked(
        torch.tensor(prompt, dtype=torch.int32),
        torch.tensor(response, dtype=torch.int32),
        torch.tensor([bits(names) for names in want], dtype=torch.uint8),
        None if ids is None else torch.tensor(ids, dtype=torch.int32),
    )


BOTH, SAMPLED, TOP, NOTHING = ("sampled", "top"), ("sampled",), ("top",), ()

SEQUENCES = (
    asked([1, 13, 5, 9, 20, 3], [23, 5, 5, 44, 2], [BOTH, SAMPLED, NOTHING, TOP, BOTH]),
    asked([1], [8, 7, 6, 5, 4, 3], [BOTH, BOTH, BOTH, NOTHING, NOTHING, NOTHING]),
    asked([1, 2, 3], [4, 5], [NOTHING, NOTHING]),
    asked([1, 13, 5, 9, 20, 3], [51, 52, 0], [TOP, BOTH, BOTH]),
)
"""Rows that want one field, both or none; at the end too, and of a whole sequence."""

QUERY = Query(SEQUENCES, top_k=3, name="0123456789")


def expected(query: Query) -> list[dict[str, Tensor]]:
    """What the model itself says, computed without any of the code that asks for it."""
    found = []
    for sequence in query.sequences:
        rows = log_probs([*sequence.prompt.tolist(), *sequence.response.tolist()])
        rows = rows[len(sequence.prompt) - 1 : -1]
        own = rows.gather(1, sequence.response.long().unsqueeze(1)).squeeze(1)
        values: dict[str, Tensor] = {}
        if sequence.rows("sampled").any():
            values["sampled_logp"] = own[sequence.rows("sampled")]
        if sequence.rows("top").any():
            top = rows[sequence.rows("top")].topk(query.top_k)
            values["top_logp"], values["top_ids"] = top.values, top.indices
        if sequence.ids is not None and sequence.rows("ids").any():
            values["ids_logp"] = rows[sequence.rows("ids")].gather(1, sequence.ids.long())
        found.append(values)
    return found


def difference(query: Query, answers: list[Answer]) -> float:
    """The largest difference from the model's own numbers; every answer is checked on the way."""
    largest = 0.0
    assert len(answers) == len(query.sequences)
    for sequence, answer, values in zip(query.sequences, answers, expected(query), strict=True):
        check_answer(sequence, query, answer.values, vocab_size=53)
        assert answer.values.keys() == values.keys()
        for name, value in values.items():
            told = answer.values[name]
            assert told.shape == value.shape
            if name == "top_ids":
                assert torch.equal(told.long(), value)
            else:
                largest = max(largest, float((told.double() - value).abs().max()))
    return largest

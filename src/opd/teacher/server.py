"""The scoring server: HTTP around a `Scorer`, for one model and many clients."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import math
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, fields
from http import HTTPStatus
from typing import Any

import h11
import prometheus_client as prometheus
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from opd.errors import ConfigError
from opd.models import LoadedModel
from opd.teacher.connection import in_words, wrong_in_key
from opd.teacher.identity import identity
from opd.teacher.messages import TRIED, QueryLimits, answer_frame, read_query
from opd.teacher.opd_endpoint import CONTENT_TYPE, HEAD, INFO, SCORE, head_bytes
from opd.teacher.query import WANTED, Answer, Query
from opd.teacher.scoring import Job, Scorer
from opd.teacher.wire import VERSION, Frame, WireError, decode, encode

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BACKLOG = 2048
LINGER_S = 1.0
"""Between the last word to a client and the end of the connection."""
PART_BYTES = 2**20


@dataclass(frozen=True)
class ServeSettings:
    """How a server listens and what it takes.

    Attributes:
        host: address to listen on; other than loopback only with a key.
        port: 0 takes a free one.
        key: bearer token that clients must show; empty: none.
        max_tokens: padded tokens per forward.
        waiting_tokens: tokens that may wait, to be scored or for their answers to be taken; beyond,
            clients are told to come back (429).
        max_body_bytes: of a request.
        max_receiving_bytes: of all requests that are arriving; beyond, clients are told to come
            back.
        max_unread_bytes: of a request's answers that its client has not taken; beyond, no more of
            its sequences are scored until it has. One turn of scoring may go beyond.
        max_connections: at once; who comes later is told to come back (503).
        receive_s: seconds in which a request must arrive.
        stalled_s: seconds in which a client must take something of what it is sent.
        drain_s: seconds that what has begun may take when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    key: str = field(default="", repr=False)
    max_tokens: int = 16384
    waiting_tokens: int = 2**22
    max_body_bytes: int = 2**28
    max_receiving_bytes: int = 2**30
    max_unread_bytes: int = 2**26
    max_connections: int = 512
    receive_s: float = 30.0
    stalled_s: float = 60.0
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError(
                f"--port {self.port}: ports go from 1 to 65535, and 0 takes a free one"
            )
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in ("host", "port", "key") and not 0 < value < math.inf:
                raise ConfigError(f"{each.name} = {value:g}: it must be a number above 0")
        if wrong := wrong_in_key(self.key):
            raise ConfigError(
                f"the server's key {wrong}; set the environment variable that --key-env names to "
                "the key alone"
            )
        if self.host not in LOOPBACK and not self.key:
            raise ConfigError(
                f"--host {self.host} is open to others, so the server needs a key: set the "
                "environment variable that --key-env names, or listen on 127.0.0.1"
            )


class BusyError(Exception):
    """More waits than may wait."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Ticket:
    """A query in the queue, and where its answers go.

    Attributes:
        owed: tokens of the sequences whose answers were not taken yet.
        unread_bytes: of answers that wait to be taken.
    """

    query: Query
    loop: asyncio.AbstractEventLoop
    answers: asyncio.Queue[tuple[int, Answer] | BaseException | None]
    owed: int
    unread_bytes: int = 0
    next: int = 0
    open: int = 0
    cancelled: bool = False
    since: float = field(default_factory=time.monotonic)

    def tell(self, what: tuple[int, Answer] | BaseException | None) -> None:
        """From the scoring thread to whoever waits."""
        try:
            self.loop.call_soon_threadsafe(self.answers.put_nowait, what)
        except RuntimeError:  # the loop has ended, and nobody waits
            self.cancelled = True


class Batcher:
    """One thread that scores what waits, a forward's worth of sequences at a time, oldest first.

    While it scores, queries of other clients gather, so load makes the batches larger.
    """

    def __init__(self, scorer: Scorer, settings: ServeSettings, metrics: Metrics) -> None:
        self._scorer, self._settings, self._metrics = scorer, settings, metrics
        self._tickets: deque[_Ticket] = deque()
        self._changed = threading.Condition()
        self._waiting = 0
        self._tokens_per_s = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    async def answers(self, query: Query) -> AsyncGenerator[tuple[int, Answer], None]:
        """Numbers of the query's sequences and their answers, as they become known.

        Raises:
            BusyError: before anything is scored.
        """
        ticket = _Ticket(query, asyncio.get_running_loop(), asyncio.Queue(), query.tokens)
        self._enter(ticket)
        try:
            while (told := await ticket.answers.get()) is not None:
                if isinstance(told, BaseException):
                    raise told
                number, answer = told
                self._taken(ticket, query.sequences[number].length, _bytes_of(answer))
                yield told
        finally:
            ticket.cancelled = True
            self._taken(ticket, ticket.owed, ticket.unread_bytes)

    def _enter(self, ticket: _Ticket) -> None:
        tokens = ticket.owed
        with self._changed:
            if self._waiting and self._waiting + tokens > self._settings.waiting_tokens:
                rate = max(self._tokens_per_s, 1.0)
                raise BusyError(min(30.0, max(1.0, self._waiting / rate / 2)))
            self._waiting += tokens
            self._metrics.waiting.set(self._waiting)
            self._tickets.append(ticket)
            self._changed.notify()

    def _taken(self, ticket: _Ticket, tokens: int, unread_bytes: int) -> None:
        """Somebody has, or will never have, answers about so many tokens.

        Until then they count as waiting: whoever asks and does not read is told to come back.
        """
        with self._changed:
            ticket.owed -= tokens
            ticket.unread_bytes -= unread_bytes
            self._waiting -= tokens
            self._metrics.waiting.set(self._waiting)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after what it is scoring."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout=self._settings.drain_s)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._has_work() and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                taken = self._take()
            if taken:
                self._score(taken)

    def _has_work(self) -> bool:
        return any(ticket.cancelled or self._is_read(ticket) for ticket in self._tickets)

    def _is_read(self, ticket: _Ticket) -> bool:
        """Whether its client takes answers; what nobody takes would fill the memory."""
        return ticket.unread_bytes < self._settings.max_unread_bytes

    def _take(self) -> list[tuple[_Ticket, int]]:
        """The oldest sequences, a forward's worth of tokens or at least one."""
        taken: list[tuple[_Ticket, int]] = []
        left = self._settings.max_tokens
        for ticket in [*self._tickets]:
            sequences = ticket.query.sequences
            if not ticket.cancelled and not self._is_read(ticket):
                continue
            while not ticket.cancelled and ticket.next < len(sequences):
                length = sequences[ticket.next].length
                if taken and length > left:
                    return taken
                taken.append((ticket, ticket.next))
                left -= length
                ticket.next += 1
                ticket.open += 1
            self._tickets.remove(ticket)
        return taken

    def _score(self, taken: list[tuple[_Ticket, int]]) -> None:
        begun = time.monotonic()
        jobs = [Job(ticket.query.sequences[number], ticket.query) for ticket, number in taken]
        try:
            for place, answer in self._scorer.answer(jobs):
                ticket, number = taken[place]
                with self._changed:
                    ticket.unread_bytes += _bytes_of(answer)
                ticket.tell((number, answer))
                ticket.open -= 1
                if not ticket.open and ticket.next == len(ticket.query.sequences):
                    self._metrics.seconds.observe(time.monotonic() - ticket.since)
                    ticket.tell(None)
        except Exception as error:
            for ticket in {ticket for ticket, _ in taken if not ticket.cancelled}:
                ticket.cancelled = True
                ticket.tell(error)
        seconds = time.monotonic() - begun
        tokens = sum(job.asked.length for job in jobs)
        self._tokens_per_s = tokens / max(seconds, 1e-6)
        self._metrics.scored(len(jobs), tokens, self._scorer.shared_tokens, seconds)


def _bytes_of(answer: Answer) -> int:
    return sum(value.numel() * value.element_size() for value in answer.values.values())


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        own = self.registry = prometheus.CollectorRegistry()
        counter, gauge = prometheus.Counter, prometheus.Gauge
        self.requests = counter("opd_requests", "requests by status", ["status"], registry=own)
        self.sequences = counter("opd_sequences", "sequences scored", registry=own)
        self.tokens = counter("opd_tokens", "tokens scored", registry=own)
        self.shared = counter(
            "opd_shared_tokens", "tokens that a shared prompt saved reading", registry=own
        )
        self.busy = counter("opd_busy_seconds", "seconds spent scoring", registry=own)
        self.sent = counter("opd_sent_bytes", "bytes of answers", registry=own)
        self.waiting = gauge("opd_waiting_tokens", "tokens that wait", registry=own)
        self.seconds = prometheus.Histogram(
            "opd_request_seconds",
            "seconds from a query's arrival to its last answer",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=own,
        )
        self._shared_before = 0

    def scored(self, sequences: int, tokens: int, shared_so_far: int, seconds: float) -> None:
        """Count what one turn of the scoring thread did."""
        self.sequences.inc(sequences)
        self.tokens.inc(tokens)
        self.busy.inc(seconds)
        self.shared.inc(shared_so_far - self._shared_before)
        self._shared_before = shared_so_far


class ScoringServer:
    """The application, and what it holds.

    Args:
        loaded: the model; its weights must not change while it is served.
        name: what clients are told it is called.
    """

    def __init__(self, loaded: LoadedModel, settings: ServeSettings, *, name: str = "") -> None:
        self.settings = settings
        self.identity = identity(loaded, name=name or loaded.reference)
        self.metrics = Metrics()
        self.scorer = Scorer(
            loaded,
            vocab_size=loaded.vocab_size,
            max_tokens=settings.max_tokens,
            revision=self.identity.revision,
        )
        self.limits = QueryLimits(loaded.vocab_size, max_tokens=self.identity.max_tokens or 2**20)
        self.draining = False
        self._receiving = 0
        self._head: bytes | None = None
        self.batcher = Batcher(self.scorer, settings, self.metrics)
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route(INFO, self._guarded(self.info)),
                Route("/metrics", self._guarded(self.show_metrics)),
                Route(HEAD, self._guarded(self.head)),
                Route(SCORE, self._guarded(self.score), methods=["POST"]),
            ]
        )

    # -- what it answers ---------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """200 while it takes work, 503 once it was told to stop."""
        if self.draining:
            return PlainTextResponse("draining", 503)
        return PlainTextResponse("ok")

    async def info(self, request: Request) -> Response:
        """What the model is and what a query may hold."""
        told, limits = self.identity, self.limits
        return JSONResponse(
            {
                "protocol": "opd",
                "versions": [VERSION],
                "model": told.model,
                "revision": told.revision,
                "vocab_size": told.vocab_size,
                "vocabulary": told.vocabulary,
                "template": told.template,
                "special": {role: list(ids) for role, ids in told.special.items()},
                "dtype": told.dtype,
                "hidden_size": int(self.scorer.head.weight.shape[1]),
                "max_tokens": limits.max_tokens,
                "wanted": list(WANTED),
                "limits": {
                    "query_tokens": limits.max_query_tokens,
                    "sequences": limits.max_sequences,
                    "top_k": min(limits.max_top_k, limits.vocab_size),
                    "ids": limits.max_ids,
                    "body_bytes": self.settings.max_body_bytes,
                },
            }
        )

    async def show_metrics(self, request: Request) -> Response:
        """Counters in Prometheus' text format."""
        return Response(
            prometheus.generate_latest(self.metrics.registry),
            media_type=prometheus.CONTENT_TYPE_LATEST,
        )

    async def head(self, request: Request) -> Response:
        """The unembedding, as safetensors."""
        if self._head is None:
            self._head = await asyncio.to_thread(
                head_bytes, self.scorer.head, self.identity.revision
            )
        size = {"Content-Length": str(len(self._head))}
        return StreamingResponse(
            _cut(self._head), headers=size, media_type="application/octet-stream"
        )

    async def score(self, request: Request) -> Response:
        """A stream of answer frames, one per sequence, then an end frame."""
        if self.draining:
            return self._refused(503, "this server is about to stop")
        try:
            body = await self._body(request)
        except ClientDisconnect:  # it left, or was told that it took too long
            return self._refused(408, "")
        except BusyError as error:
            return self._come_back("more arrives than may arrive", error)
        if body is None:
            return self._refused(
                413, f"more than {self.settings.max_body_bytes} bytes; ask in several requests"
            )
        try:
            frame = decode(body, limit=self.settings.max_body_bytes)
            query, tried = read_query(frame, self.limits)
        except WireError as error:
            return self._refused(400, str(error))
        del body, frame
        answers = self.batcher.answers(query)
        try:
            first = await anext(answers)
        except BusyError as error:
            return self._come_back("more waits than may wait", error)
        except Exception as error:
            return self._refused(500, in_words(error))
        self.metrics.requests.labels("200").inc()
        return _Answers(answers, self._stream(query, tried, first, answers))

    async def _stream(
        self,
        query: Query,
        tried: str,
        first: tuple[int, Answer],
        answers: AsyncGenerator[tuple[int, Answer], None],
    ) -> AsyncGenerator[bytes, None]:
        try:
            yield self._bytes_of(query, tried, *first)
            async for number, answer in answers:
                yield self._bytes_of(query, tried, number, answer)
            end = {TRIED: tried, "sequences": len(query.sequences)}
            yield encode(Frame("end", end))
        except Exception as error:
            yield encode(Frame("error", {TRIED: tried, "message": in_words(error)}))

    def _bytes_of(self, query: Query, tried: str, number: int, answer: Answer) -> bytes:
        frame = answer_frame(query.sequences[number], answer, number=number, tried=tried)
        data = encode(frame, compress=query.compress)
        self.metrics.sent.inc(len(data))
        return data

    # -- who may ask, and how much -----------------------------------------------------------

    def _guarded(
        self, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            if self.settings.key and not self._shows_key(request):
                return self._refused(401, "the bearer token is missing or wrong")
            return await answer(request)

        return guarded

    def _shows_key(self, request: Request) -> bool:
        """Compared in a time that says nothing about the key."""
        shown = hashlib.sha256(request.headers.get("Authorization", "").encode()).digest()
        expected = hashlib.sha256(f"Bearer {self.settings.key}".encode()).digest()
        return hmac.compare_digest(shown, expected)

    async def _body(self, request: Request) -> bytes | None:
        """The request's bytes; None where there are too many.

        Raises:
            BusyError: together with those of others that are arriving they are too many.
            ClientDisconnect: not all of them came.
        """
        said = request.headers.get("Content-Length", "")
        if said.isdigit() and int(said) > self.settings.max_body_bytes:
            return None
        data = bytearray()
        try:
            async for part in request.stream():
                data += part
                self._receiving += len(part)
                if len(data) > self.settings.max_body_bytes:
                    return None
                if self._receiving > self.settings.max_receiving_bytes:
                    raise BusyError(1.0)
        finally:
            self._receiving -= len(data)
        return bytes(data)

    def _come_back(self, why: str, error: BusyError) -> Response:
        busy = self._refused(429, f"{why}; come back later")
        busy.headers["Retry-After"] = f"{error.retry_after_s:.0f}"
        return busy

    def _refused(self, status: int, why: str) -> Response:
        self.metrics.requests.labels(str(status)).inc()
        return PlainTextResponse(why, status)


def _cut(data: bytes) -> Iterator[bytes]:
    """Parts that are sent one by one, so that a slow client holds one and not a copy of all."""
    for start in range(0, len(data), PART_BYTES):
        yield data[start : start + PART_BYTES]


class _Answers(StreamingResponse):
    """A stream that gives its answers up when the client is gone, and not when memory is cleared.

    Args:
        answers: what the frames are made of; ended even if none was.
    """

    def __init__(
        self,
        answers: AsyncGenerator[tuple[int, Answer], None],
        frames: AsyncGenerator[bytes, None],
    ) -> None:
        super().__init__(frames, media_type=CONTENT_TYPE)
        self._answers, self._frames = answers, frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._answers), aclosing(self._frames):
            await super().__call__(scope, receive, send)


# --------------------------------------------------------------------------------------------
# Listening


class _ImpatientProtocol(H11Protocol):
    """Closes connections of clients that keep the server waiting, and those beyond a number.

    Without this, clients that send or take a byte now and then hold connections for ever, and
    with them what they were to be sent.
    """

    receive_s = 30.0
    stalled_s = 60.0
    max_connections = 512
    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _has_begun = False
    _is_refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(503, "as many connections as there may be; come back later")
            transport.close()
            return
        self._expect()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._has_begun = True
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._expect()
        else:
            self._arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self._goes_on()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_less(self.transport.get_write_buffer_size())

    def _expect_less(self, waits: int) -> None:
        """Close in a while, unless fewer bytes wait to be taken then; none are added meanwhile."""
        self._stalled = self.loop.call_later(self.stalled_s, self._look_again, waits)

    def _look_again(self, waited: int) -> None:
        waits = self.transport.get_write_buffer_size()
        if waits < waited:
            self._expect_less(waits)
        else:
            self.transport.abort()

    def resume_writing(self) -> None:
        self._goes_on()
        super().resume_writing()

    def _goes_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _expect(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.receive_s, self._give_up)

    def _arrived(self) -> None:
        self._has_begun = False
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self.transport is None or self.transport.is_closing():
            return
        is_answered = self.conn.their_state is h11.SEND_BODY and self.cycle.response_started
        if not self._has_begun or is_answered:
            self.transport.close()
            return
        self._refuse(
            408,
            f"the request did not arrive within {self.receive_s:g} s; send less at once "
            "(teacher.client.tokens_per_request), or start the server with a larger --receive-s",
        )
        self.transport.write_eof()
        # closed at once, with bytes that nobody read, the client would see a reset and no reply
        self.loop.call_later(LINGER_S, self.transport.abort)

    def _refuse(self, status: int, why: str) -> None:
        """Answer in the application's place, and listen no more."""
        self._is_refused = True
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            "Content-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(why)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(f"{head}{why}".encode("ascii"))


class _Uvicorn(uvicorn.Server):
    """Says to the application when it is told to stop, and leaves signals to the caller."""

    def __init__(self, config: uvicorn.Config, server: ScoringServer) -> None:
        super().__init__(config)
        self._server = server

    async def shutdown(self, sockets: Any = None) -> None:
        self._server.draining = True
        await super().shutdown(sockets)


def listen_at(settings: ServeSettings) -> socket.socket:
    """A socket that listens at the address of the settings.

    Raises:
        ConfigError: names the port or the host, and the way out.
    """
    host, port = settings.host, settings.port
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        way_out = {
            errno.EADDRINUSE: f"--port {port} is taken; stop what listens there, or take another "
            "one (0: one that is free)",
            errno.EACCES: f"--port {port} is not for this user; take one above 1023",
        }.get(
            error.errno or 0,
            f"--host {host} --port {port}: {in_words(error)}; name an address of this machine",
        )
        raise ConfigError(way_out) from error
    return found


class Listening:
    """A server that listens, in a thread of its own.

    Attributes:
        url: where it is, with the port it took.
    """

    def __init__(self, server: ScoringServer) -> None:
        settings = server.settings
        own = ("receive_s", "stalled_s", "max_connections")
        protocol = type(
            "Protocol", (_ImpatientProtocol,), {name: getattr(settings, name) for name in own}
        )
        config = uvicorn.Config(
            server.app,
            host=settings.host,
            port=settings.port,
            http=protocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(settings.drain_s),
            h11_max_incomplete_event_size=2**16,
        )
        self.server = server
        self._socket = listen_at(settings)  # who comes before the loop runs waits, and is served
        address, port = self._socket.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        self.url = f"http://{shown}:{port}"
        self._uvicorn = _Uvicorn(config, server)
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([self._socket],), name="http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Finish what has begun, for `drain_s` at the most, and close."""
        self.server.draining = True
        self._uvicorn.should_exit = True
        self._thread.join(timeout=self.server.settings.drain_s + 10)
        self.server.batcher.stop()
        self._socket.close()

    @property
    def is_alive(self) -> bool:
        """Whether anything of it still runs."""
        return self._thread.is_alive() or self.server.batcher.is_alive


@contextmanager
def listening(server: ScoringServer) -> Iterator[Listening]:
    """Serve within the block."""
    found = Listening(server)
    try:
        yield found
    finally:
        found.stop()

"""The scoring server: HTTP around a `Scorer`, for one model and many clients."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
import prometheus_client as prometheus
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from opd.errors import ConfigError
from opd.models import LoadedModel
from opd.teacher.identity import identity
from opd.teacher.messages import TRIED, QueryLimits, answer_frame, read_query
from opd.teacher.opd_endpoint import CONTENT_TYPE, HEAD, INFO, SCORE, head_bytes
from opd.teacher.query import WANTED, Answer, Query
from opd.teacher.scoring import Job, Scorer
from opd.teacher.wire import Frame, WireError, decode, encode

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """How a server listens and what it takes.

    Attributes:
        host: address to listen on; other than loopback only with a key.
        port: 0 takes a free one.
        key: bearer token that clients must show; empty: none.
        max_tokens: padded tokens per forward.
        waiting_tokens: tokens that may wait; beyond, clients are told to come back (429).
        max_body_bytes: of a request.
        receive_s: seconds in which a request must arrive.
        drain_s: seconds that what has begun may take when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    key: str = field(default="", repr=False)
    max_tokens: int = 16384
    waiting_tokens: int = 2**22
    max_body_bytes: int = 2**28
    receive_s: float = 30.0
    drain_s: float = 60.0

    def __post_init__(self) -> None:
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
    """A query in the queue, and where its answers go."""

    query: Query
    loop: asyncio.AbstractEventLoop
    answers: asyncio.Queue[tuple[int, Answer] | BaseException | None]
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

    async def answers(self, query: Query) -> AsyncIterator[tuple[int, Answer]]:
        """Numbers of the query's sequences and their answers, as they become known.

        Raises:
            BusyError: before anything is scored.
        """
        ticket = _Ticket(query, asyncio.get_running_loop(), asyncio.Queue())
        self._enter(ticket)
        try:
            while (told := await ticket.answers.get()) is not None:
                if isinstance(told, BaseException):
                    raise told
                yield told
        finally:
            ticket.cancelled = True

    def _enter(self, ticket: _Ticket) -> None:
        tokens = ticket.query.tokens
        with self._changed:
            if self._waiting and self._waiting + tokens > self._settings.waiting_tokens:
                rate = max(self._tokens_per_s, 1.0)
                raise BusyError(min(30.0, max(1.0, self._waiting / rate / 2)))
            self._waiting += tokens
            self._metrics.waiting.set(self._waiting)
            self._tickets.append(ticket)
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
                while not self._tickets and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                taken = self._take()
            if taken:
                self._score(taken)

    def _take(self) -> list[tuple[_Ticket, int]]:
        """The oldest sequences, a forward's worth of tokens or at least one."""
        taken: list[tuple[_Ticket, int]] = []
        left = self._settings.max_tokens
        while self._tickets:
            ticket = self._tickets[0]
            sequences = ticket.query.sequences
            if ticket.cancelled:
                self._waiting -= sum(asked.length for asked in sequences[ticket.next :])
                self._tickets.popleft()
                continue
            length = sequences[ticket.next].length
            if taken and length > left:
                break
            taken.append((ticket, ticket.next))
            left -= length
            self._waiting -= length
            ticket.next += 1
            ticket.open += 1
            if ticket.next == len(sequences):
                self._tickets.popleft()
        self._metrics.waiting.set(self._waiting)
        return taken

    def _score(self, taken: list[tuple[_Ticket, int]]) -> None:
        begun = time.monotonic()
        jobs = [Job(ticket.query.sequences[number], ticket.query) for ticket, number in taken]
        try:
            for place, answer in self._scorer.answer(jobs):
                ticket, number = taken[place]
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
                "versions": [1],
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
        return Response(self._head, media_type="application/octet-stream")

    async def score(self, request: Request) -> Response:
        """A stream of answer frames, one per sequence, then an end frame."""
        if self.draining:
            return self._refused(503, "this server is about to stop")
        try:
            async with asyncio.timeout(self.settings.receive_s):
                body = await self._body(request)
        except TimeoutError:
            return self._refused(408, f"no request within {self.settings.receive_s:g} s")
        if body is None:
            return self._refused(
                413, f"more than {self.settings.max_body_bytes} bytes; ask in several requests"
            )
        try:
            frame = decode(body, limit=self.settings.max_body_bytes)
            query, tried = read_query(frame, self.limits)
        except WireError as error:
            return self._refused(400, str(error))
        answers = self.batcher.answers(query)
        try:
            first = await anext(answers)
        except BusyError as error:
            busy = self._refused(429, "more waits than may wait; come back later")
            busy.headers["Retry-After"] = f"{error.retry_after_s:.0f}"
            return busy
        except Exception as error:
            return self._refused(500, _in_words(error))
        self.metrics.requests.labels("200").inc()
        return StreamingResponse(
            self._stream(query, tried, first, answers), media_type=CONTENT_TYPE
        )

    async def _stream(
        self,
        query: Query,
        tried: str,
        first: tuple[int, Answer],
        answers: AsyncIterator[tuple[int, Answer]],
    ) -> AsyncIterator[bytes]:
        try:
            yield self._bytes_of(query, tried, *first)
            async for number, answer in answers:
                yield self._bytes_of(query, tried, number, answer)
            end = {TRIED: tried, "sequences": len(query.sequences)}
            yield encode(Frame("end", end))
        except Exception as error:
            yield encode(Frame("error", {TRIED: tried, "message": _in_words(error)}))

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
        """The request's bytes; None where there are too many."""
        said = request.headers.get("Content-Length", "")
        if said.isdigit() and int(said) > self.settings.max_body_bytes:
            return None
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self.settings.max_body_bytes:
                return None
        return bytes(data)

    def _refused(self, status: int, why: str) -> Response:
        self.metrics.requests.labels(str(status)).inc()
        return PlainTextResponse(why, status)


def _in_words(error: BaseException) -> str:
    """An error as a client is told of it: a line, no traceback."""
    said = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


# --------------------------------------------------------------------------------------------
# Listening


class _ImpatientProtocol(H11Protocol):
    """Closes a connection whose request has not arrived whole after some seconds.

    Without this, clients that send a byte now and then hold connections for ever.
    """

    receive_s = 30.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._expect()
        else:
            self._arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.receive_s, self._close)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()


class _Uvicorn(uvicorn.Server):
    """Says to the application when it is told to stop, and leaves signals to the caller."""

    def __init__(self, config: uvicorn.Config, server: ScoringServer) -> None:
        super().__init__(config)
        self._server = server

    async def shutdown(self, sockets: Any = None) -> None:
        self._server.draining = True
        await super().shutdown(sockets)


class Listening:
    """A server that listens, in a thread of its own.

    Attributes:
        url: where it is, with the port it took.
    """

    def __init__(self, server: ScoringServer) -> None:
        settings = server.settings
        protocol = type("Protocol", (_ImpatientProtocol,), {"receive_s": settings.receive_s})
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
        self._socket = config.bind_socket()
        self._socket.listen(config.backlog)  # who comes before the loop runs waits, and is served
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

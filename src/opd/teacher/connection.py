"""HTTP to a teacher: pooled, bounded, with deadlines, and tried again only where that can help."""

from __future__ import annotations

import ipaddress
import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from opd.errors import ConfigError, TeacherError

T = TypeVar("T")

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
FIRST_CONTACT_S = 5.0
"""So long a server is tried that refuses connections and has not answered yet: more likely than
that it is just starting are a wrong address and a server nobody started, and those do not pass."""
MOST_ERROR_BYTES = 64 * 2**10
"""Of the text of a refusal, so much is read."""
BUSY = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)
"""Refusals that a later try may not get."""
_START_AGAIN = (
    "Nothing was lost: start the server again and continue with --resume, or raise retry_s"
)
_START = (
    "It never answered: start the server, and see that teacher.url is its address as seen from here"
)
MOST_WORDS = 500
"""Characters of what others said that a message quotes."""


@dataclass(frozen=True)
class ConnectionSettings:
    """How patient and how greedy a client is.

    Attributes:
        timeout_s: most seconds for one try, from sending to the last byte.
        retry_s: seconds after the first failure of a request during which it is tried again; while
            connections are refused and none was taken before, `FIRST_CONTACT_S` at the most.
        concurrency: requests in flight at once.
        key: bearer token; empty: none is sent.
    """

    timeout_s: float = 120.0
    retry_s: float = 300.0
    concurrency: int = 8
    key: str = field(default="", repr=False)


@dataclass
class Traffic:
    """What went over a connection so far."""

    retries: int = 0
    received_bytes: int = 0


class CutOffError(ConnectionError):
    """A reply that ended before it was complete."""


class RefusedError(TeacherError):
    """A status that stays the same however often it is asked.

    Attributes:
        status: of the reply.
        text: what the server said, shortened.
    """

    def __init__(self, message: str, status: int, text: str) -> None:
        super().__init__(message)
        self.status = status
        self.text = text


class Connection:
    """Requests to one server. Safe for use by several threads at once.

    Tried again, with growing waits and jitter, are only errors of the connection, statuses 408 and
    429, and statuses 500 to 599; everything else is the same however often it is asked. A server on
    this machine is asked directly, whatever proxy the environment names.

    Args:
        name: whose server it is, for messages: `teacher 'math' (vllm at http://...)`.
        url: of the server, without the paths of the protocol.

    Raises:
        ConfigError: the url is none, or the key cannot be sent.
    """

    def __init__(self, name: str, url: str, settings: ConnectionSettings) -> None:
        host = _check_url(name, url).host
        if wrong := wrong_in_key(settings.key):
            raise ConfigError(
                f"{name}: the server's key {wrong}; set the environment variable that "
                "teacher.key_env names to the key alone"
            )
        self.name = name
        self.settings = settings
        self.traffic = Traffic()
        self._lock = threading.Lock()
        self._has_answered = False
        self._slots = threading.BoundedSemaphore(settings.concurrency)
        self._random = random.Random()
        headers = {"Authorization": f"Bearer {settings.key}"} if settings.key else {}
        self._client = httpx.Client(
            base_url=url,
            headers=headers,
            verify=url.startswith("https://"),  # without TLS certificates need not be read
            trust_env=not _is_loopback(host),  # a proxy would be sent the key
            timeout=httpx.Timeout(settings.timeout_s, connect=min(10.0, settings.timeout_s)),
            limits=httpx.Limits(
                max_connections=settings.concurrency,
                max_keepalive_connections=settings.concurrency,
            ),
        )

    def close(self) -> None:
        """Close the pooled connections."""
        self._client.close()

    def get(self, path: str, read: Callable[[Iterator[bytes]], T]) -> T:
        """What `read` makes of the reply's bytes, at the first try that succeeds."""
        return self._until_it_works("GET", path, lambda: (b"", {}), read, path)

    def post(
        self,
        path: str,
        body: Callable[[], tuple[bytes, Mapping[str, str]]],
        read: Callable[[Iterator[bytes]], T],
        *,
        request: str,
    ) -> T:
        """What `read` makes of the reply's bytes, at the first try that succeeds.

        Args:
            body: called before every try; the bytes to send and their headers.
            read: called in every try with the bytes as they arrive. A `CutOffError` that it raises
                counts as an error of the connection.
            request: what is asked, for messages.

        Raises:
            TeacherError: names the teacher, the request and what happened to it.
        """
        return self._until_it_works("POST", path, body, read, request)

    def _until_it_works(
        self,
        method: str,
        path: str,
        body: Callable[[], tuple[bytes, Mapping[str, str]]],
        read: Callable[[Iterator[bytes]], T],
        request: str,
    ) -> T:
        first_failure, tries = None, 0
        while True:
            tries, is_there = tries + 1, True
            try:
                with self._slots:
                    return self._once(method, path, body, read, request)
            except (httpx.TransportError, httpx.DecodingError, CutOffError) as error:
                failure, least_wait = in_words(error), 0.0
                refused = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                is_there = self._has_answered or not refused
            except _BusyError as error:
                failure, least_wait = str(error), error.retry_after_s
            now = time.monotonic()
            first_failure = first_failure or now
            wait = self._wait(tries, least_wait)
            patience = self.settings.retry_s
            if not is_there:
                patience = min(patience, FIRST_CONTACT_S)
            if now + wait - first_failure > patience:
                way_out = _START_AGAIN if is_there else _START
                raise TeacherError(
                    f"{self.name}: {request} failed {tries} times in "
                    f"{now - first_failure:.0f} s, the last time with: {failure}. {way_out}"
                )
            self._count(retries=1)
            time.sleep(wait)

    def _once(
        self,
        method: str,
        path: str,
        body: Callable[[], tuple[bytes, Mapping[str, str]]],
        read: Callable[[Iterator[bytes]], T],
        request: str,
    ) -> T:
        content, headers = body()
        deadline = time.monotonic() + self.settings.timeout_s
        with self._client.stream(
            method, path, content=content or None, headers=dict(headers)
        ) as reply:
            self._has_answered = True
            if reply.status_code == httpx.codes.OK:
                return read(self._arriving(reply, deadline))
            text = self._refusal(reply, deadline)
            if reply.status_code in BUSY or reply.is_server_error:
                raise _BusyError(f"status {reply.status_code}: {text}", _retry_after(reply))
            raise RefusedError(
                f"{self.name}: {request} was refused with status {reply.status_code}: {text}"
                + _way_out(reply.status_code),
                reply.status_code,
                text,
            )

    def _arriving(self, reply: httpx.Response, deadline: float) -> Iterator[bytes]:
        """The reply's bytes, until the deadline."""
        for data in reply.iter_bytes():
            self._count(received_bytes=len(data))
            yield data
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout(f"no end after {self.settings.timeout_s:g} s")

    def _refusal(self, reply: httpx.Response, deadline: float) -> str:
        """The text of a refusal, shortened."""
        text = bytearray()
        for data in self._arriving(reply, deadline):
            text += data
            if len(text) > MOST_ERROR_BYTES:
                break
        words = " ".join(bytes(text[:MOST_ERROR_BYTES]).decode(errors="replace").split())
        return words[:MOST_WORDS] or "(no text)"

    def _wait(self, tries: int, least: float) -> float:
        longest: float = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1))
        return max(least, longest * self._random.uniform(0.5, 1.0))

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self.traffic, name, getattr(self.traffic, name) + value)


class _BusyError(Exception):
    """A status that a later try may not get."""

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


def _retry_after(reply: httpx.Response) -> float:
    try:
        told = float(reply.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0
    return 0.0 if math.isnan(told) else min(max(told, 0.0), LONGEST_WAIT_S)


def in_words(error: BaseException) -> str:
    """An error on one line, without a traceback."""
    said = " ".join(str(error).split())[:MOST_WORDS]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _check_url(name: str, url: str) -> httpx.URL:
    try:
        found = httpx.URL(url)
        wrong = ""
        if found.scheme not in ("http", "https"):
            wrong = "begins with neither http:// nor https://"
        elif not found.host:
            wrong = "names no host"
        elif found.port is not None and not 0 < found.port < 2**16:
            wrong = f"has the port {found.port}, and ports go from 1 to 65535"
    except httpx.InvalidURL as error:
        wrong = f"cannot be read: {error}"
    if wrong:
        raise ConfigError(f"{name}: the url {url!r} {wrong}; set it to http://HOST:PORT")
    return found


def wrong_in_key(key: str) -> str:
    """What keeps a key from being sent, after the words for the key; empty: nothing does."""
    for place, letter in enumerate(key):
        if not "!" <= letter <= "~":
            return (
                f"has {letter!r} as character {place + 1} of {len(key)}, and may have printable "
                "ASCII without spaces"
            )
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _way_out(status: int) -> str:
    if status == 400:
        return (
            "; lower the setting that it names, or start the server with room for it; where it "
            "names none, is teacher.protocol the one this server speaks?"
        )
    if status in (401, 403):
        return "; set teacher.key_env to the environment variable that holds the server's key"
    if status == 404:
        return "; is teacher.protocol the one this server speaks?"
    if status == 413:
        return "; lower teacher.client.tokens_per_request, or the k of the objective's support"
    return ""


def whole(limit: int) -> Callable[[Iterator[bytes]], bytes]:
    """A reader that takes the whole reply, if it has no more than `limit` bytes."""

    def read(arriving: Iterator[bytes]) -> bytes:
        data = bytearray()
        for part in arriving:
            data += part
            if len(data) > limit:
                raise TeacherError(f"a reply of more than {limit} bytes, which is not read")
        return bytes(data)

    return read


@contextmanager
def naming(connection: Connection, request: str) -> Iterator[None]:
    """Put the teacher's name and the request in front of an error that has neither."""
    try:
        yield
    except TeacherError as error:
        if str(error).startswith(connection.name):
            raise
        raise TeacherError(f"{connection.name}: {request}: {error}") from error


def as_json(data: bytes) -> Any:
    """A reply that has to be JSON.

    Raises:
        TeacherError: it is something else.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        start = data[:80].decode(errors="replace")
        raise TeacherError(f"the reply is no JSON ({error}): {start!r}") from None

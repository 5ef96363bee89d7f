"""HTTP to a teacher: what is refused before anything is sent, and replies that are none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opd.errors import ConfigError, TeacherError
from opd.teacher import connection
from opd.teacher.connection import Connection, ConnectionSettings, as_json, whole

QUICK = ConnectionSettings(timeout_s=5.0, retry_s=0.3, concurrency=1)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.01)


@dataclass
class Said:
    """What a server answers to everything, and what it was asked."""

    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    url: str = ""
    seen: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def saying(body: bytes, status: int = 200, **headers: str) -> Iterator[Said]:
    said = Said(body, {name.replace("_", "-"): value for name, value in headers.items()}, status)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            said.seen.append((self.path, self.headers.get("Authorization", "")))
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(said.body)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(said.body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    said.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield said
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def asked(url: str, settings: ConnectionSettings = QUICK) -> bytes:
    opened = Connection("teacher 't'", url, settings)
    try:
        return opened.get("/info", whole(2**20))
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:notaport", "cannot be read: Invalid port"),
        ("http://", "names no host"),
        ("ftp://here", "begins with neither"),
        ("http://here:99999", "has the port 99999, and ports go from 1 to 65535"),
        ("http://here/\x00", "cannot be read"),
    ],
)
def test_a_url_that_is_none_is_refused_when_it_is_opened(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"teacher 't': the url .* {said}.*http://HOST:PORT"):
        Connection("teacher 't'", url, QUICK)


@pytest.mark.parametrize("key", ["schl\u00fcssel", "abc\n", " abc", "a\x00b", "a\tb"])
def test_a_key_that_cannot_be_sent_is_refused_when_it_is_opened(key: str) -> None:
    with pytest.raises(ConfigError, match=r"the server's key has '.*teacher.key_env") as caught:
        Connection("teacher 't'", "http://127.0.0.1:9", ConnectionSettings(key=key))
    assert key not in str(caught.value)


def test_a_reply_that_is_packed_badly_is_tried_again_and_then_said() -> None:
    with (
        saying(b"garbage, and no gzip", content_encoding="gzip") as said,
        pytest.raises(TeacherError, match=r"teacher 't': /info failed \d+ times.*DecodingError"),
    ):
        asked(said.url)
    assert len(said.seen) > 1


@pytest.mark.parametrize("wait", ["nan", "-5", "tomorrow"])
def test_a_wait_that_is_no_number_is_no_wait(wait: str) -> None:
    with (
        saying(b"busy", 429, retry_after=wait) as said,
        pytest.raises(TeacherError, match=r"failed \d+ times.*status 429: busy"),
    ):
        asked(said.url)
    assert len(said.seen) > 1


def test_json_that_is_nested_without_end_is_no_json() -> None:
    with pytest.raises(TeacherError, match=r"the reply is no JSON .*\[\[\["):
        as_json(b"[" * 200_000)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_server_on_this_machine_is_asked_without_the_proxy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    with saying(b"direct") as said, saying(b"by proxy") as proxy:
        monkeypatch.setenv(name, proxy.url)
        keyed = ConnectionSettings(timeout_s=5.0, retry_s=0.3, key="secret")
        assert asked(said.url, keyed) == b"direct"
        assert asked(said.url.replace("127.0.0.1", "localhost"), keyed) == b"direct"
        assert not proxy.seen
        assert asked("http://teacher.example:8765", keyed) == b"by proxy"
    assert said.seen == [("/info", "Bearer secret")] * 2


def test_a_server_that_takes_connections_and_says_nothing_has_its_whole_budget() -> None:
    """Only refused connections count as a server that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = ConnectionSettings(timeout_s=0.2, retry_s=0.5, concurrency=1)
        with pytest.raises(TeacherError, match=r"ReadTimeout.*raise retry_s"):
            asked(f"http://127.0.0.1:{server.getsockname()[1]}", silent)

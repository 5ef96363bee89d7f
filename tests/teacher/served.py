"""A scoring server in this process, and a proxy in front of it that does harm."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import torch

from opd.models import LoadedModel
from opd.teacher.connection import ConnectionSettings
from opd.teacher.opd_endpoint import SCORE, OpdEndpoint
from opd.teacher.server import ScoringServer, ServeSettings, listening
from opd.teacher.wire import Frame, FrameReader, encode

SETTINGS = ServeSettings(port=0, drain_s=5)
QUICK = ConnectionSettings(timeout_s=2.0, retry_s=5.0, concurrency=4)


@contextmanager
def serving(loaded: LoadedModel, settings: ServeSettings = SETTINGS) -> Iterator[str]:
    """The URL of a server of this model."""
    with listening(ScoringServer(loaded, settings)) as found:
        yield found.url


@contextmanager
def endpoint(url: str, settings: ConnectionSettings = QUICK) -> Iterator[OpdEndpoint]:
    made = OpdEndpoint("math", url, settings)
    try:
        yield made
    finally:
        made.close()


# --------------------------------------------------------------------------------------------
# Harm

Write = Callable[[bytes], None]


@dataclass
class Reply:
    """What the server said, and the means to say something else.

    Attributes:
        frames: of a 200.
        write: sends bytes to the client.
        reset: closes the connection with a RST.
        seen: replies of earlier requests.
    """

    frames: list[Frame]
    write: Write
    reset: Callable[[], None]
    seen: list[list[Frame]]

    def send(self, body: bytes, status: str = "200 OK", extra: str = "") -> None:
        self.head(status, f"Content-Length: {len(body)}\r\n{extra}")
        self.write(body)

    def head(self, status: str = "200 OK", extra: str = "") -> None:
        self.write(f"HTTP/1.1 {status}\r\n{extra}Connection: close\r\n\r\n".encode())

    def body(self, frames: list[Frame] | None = None) -> bytes:
        return b"".join(encode(frame) for frame in frames or self.frames)

    def changed(self, array: str, change: Callable[[torch.Tensor], Any]) -> list[Frame]:
        """The frames with one array of the first answer changed."""
        first = self.frames[0]
        value = first.arrays[array].clone()
        made = change(value)  # a part of it was changed in place, or it became another
        arrays = {**first.arrays, array: made if made.dim() == value.dim() else value}
        return [replace(first, arrays=arrays), *self.frames[1:]]

    def with_meta(self, **meta: Any) -> list[Frame]:
        first = self.frames[0]
        return [replace(first, meta={**first.meta, **meta}), *self.frames[1:]]


Fault = Callable[[Reply], None]


@dataclass
class Proxy:
    """Forwards requests to a server; the first `count` replies to a query meet a fault.

    Attributes:
        url: where it listens.
        queries: how many arrived.
    """

    target: str
    fault: Fault
    count: int
    url: str = ""
    queries: int = 0
    seen: list[list[Frame]] = field(default_factory=list)
    _socket: socket.socket = field(default_factory=socket.socket)

    def start(self) -> None:
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(64)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            method, path, headers, body = _request(client)
            told = {name: headers[name] for name in ("authorization",) if name in headers}
            with httpx.Client(base_url=self.target, timeout=20) as server:
                got = server.request(method, path, content=body, headers=told)
            if path != SCORE or got.status_code != 200:
                _plain(client, got)
                return
            frames = sorted(FrameReader().feed(got.content), key=_place)
            self.queries += 1
            if self.queries > self.count:
                _plain(client, got)
            else:

                def reset() -> None:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.close()

                self.fault(Reply(frames, client.sendall, reset, self.seen))
            self.seen.append(frames)


def _request(client: socket.socket) -> tuple[str, str, dict[str, str], bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        got = client.recv(65536)
        if not got:
            raise OSError("closed")
        data += got
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += client.recv(65536)
    method, path, _ = first.split(" ")
    return method, path, headers, body


def _place(frame: Frame) -> float:
    """Answers in the order of their sequences, then the end."""
    return float(frame.meta["sequence"]) if frame.kind == "answer" else float("inf")


def _plain(client: socket.socket, got: httpx.Response) -> None:
    head = f"HTTP/1.1 {got.status_code} X\r\nContent-Length: {len(got.content)}\r\n"
    client.sendall(f"{head}Connection: close\r\n\r\n".encode() + got.content)


@contextmanager
def harmed(target: str, fault: Fault, count: int = 1) -> Iterator[Proxy]:
    proxy = Proxy(target, fault, count)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def stall(seconds: float = 3.0) -> None:
    time.sleep(seconds)

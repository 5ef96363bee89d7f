"""The scoring server: what it answers, whom, how much at once, and how it stops."""

from __future__ import annotations

import gc
import re
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch

from opd.errors import ConfigError, TeacherError
from opd.formula.numerics import project
from opd.models import LoadedModel, load_model, save_model
from opd.teacher.identity import fingerprint, identity, template_hash, vocabulary_hash
from opd.teacher.messages import query_frame
from opd.teacher.opd_endpoint import CONTENT_TYPE, HEAD, INFO, SCORE
from opd.teacher.query import WANTED, Answer, Query
from opd.teacher.scoring import Job, Scorer
from opd.teacher.server import Listening, ScoringServer, ServeSettings, listen_at, listening
from opd.teacher.wire import FrameReader, encode
from tests.models_zoo import tiny
from tests.teacher.queries import query
from tests.teacher.served import QUICK, SETTINGS, endpoint, serving

V = 53


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny("gemma2")


@pytest.fixture(scope="module")
def url(loaded: LoadedModel) -> Iterator[str]:
    with serving(loaded) as found:
        yield found


def scored(loaded: LoadedModel, asked: Query) -> list[dict[str, torch.Tensor]]:
    own = Scorer(loaded, vocab_size=loaded.vocab_size)
    found = dict(own.answer([Job(one, asked) for one in asked.sequences]))
    return [dict(found[place].values) for place in range(len(found))]


def agree(found: Any, expected: list[dict[str, torch.Tensor]]) -> None:
    for answer, plain in zip(found, expected, strict=True):
        assert set(answer.values) == set(plain)
        for name, value in plain.items():
            torch.testing.assert_close(answer.values[name], value, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------
# What it answers


@pytest.mark.parametrize("compress", [False, True])
def test_a_served_answer_is_the_model_s_own(loaded: LoadedModel, url: str, compress: bool) -> None:
    asked = replace(query(vocab_size=V, sequences=6, some=True), compress=compress)
    with endpoint(url) as client:
        agree(client.score(asked), scored(loaded, asked))


def test_every_mix_of_fields_travels(loaded: LoadedModel, url: str) -> None:
    with endpoint(url) as client:
        for mix in range(1, 1 << len(WANTED)):
            names = tuple(name for bit, name in enumerate(WANTED) if mix >> bit & 1)
            asked = query(mix, vocab_size=V, sequences=2, wanted=names)
            agree(client.score(asked), scored(loaded, asked))


def test_the_head_turns_hidden_states_into_the_model_s_logits(
    loaded: LoadedModel, url: str
) -> None:
    asked = query(vocab_size=V, wanted=("hidden", "sampled", "logsumexp"))
    with endpoint(url) as client:
        head, answers = client.head(), client.score(asked)
        assert client.head() is head
    assert (head.soft_cap, head.vocab_size) == (1.5, V)
    for one, answer in zip(asked.sequences, answers, strict=True):
        logits = project(answer.values["hidden"], head)
        torch.testing.assert_close(logits.logsumexp(-1), answer.values["logsumexp"])
        own = logits.log_softmax(-1).gather(-1, one.response.long().unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(own, answer.values["sampled_logp"])


def test_info_says_which_model_it_is(loaded: LoadedModel, url: str) -> None:
    with endpoint(url) as client:
        told = client.describe()
    assert told.vocabulary == vocabulary_hash(loaded.tokenizer)
    assert told.template == template_hash(loaded.tokenizer) != ""
    assert told.revision == fingerprint(loaded.model)
    assert told.special == {"eos": (2,), "pad": (0,), "bos": (1,)}
    assert told.extra["hidden_size"] == 32
    assert (told.vocab_size, told.dtype) == (V, "float32")


def test_bytes_per_token_are_what_the_protocol_says(url: str) -> None:
    asked = query(vocab_size=V, sequences=4, wanted=("sampled", "top"), top_k=32)
    data = httpx.post(url + SCORE, content=encode(query_frame(asked, "t"))).content
    *answers, end = FrameReader().feed(data)
    rows = sum(len(one.response) for one in asked.sequences)
    arrays = sum(v.numel() * v.element_size() for frame in answers for v in frame.arrays.values())
    assert arrays == rows * (4 + 32 * 8)
    assert end.meta["sequences"] == 4
    assert len(data) - arrays < 5 * 400  # headers, tables, meta


def test_a_model_is_told_from_another_by_one_weight() -> None:
    one, other = tiny("llama"), tiny("llama")
    assert fingerprint(one.model) == fingerprint(other.model)
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-3
    assert fingerprint(one.model) != fingerprint(other.model)
    assert identity(one).vocabulary == identity(other).vocabulary


@pytest.mark.parametrize("change", ["last entry", "one row", "two swapped", "config"])
def test_a_model_is_told_from_another_by_whatever_it_computes_with(change: str) -> None:
    one, other = tiny("llama"), tiny("llama")
    weight = next(other.model.parameters())
    with torch.no_grad():
        if change == "last entry":
            weight[-1, -1] += 1e-3
        elif change == "one row":
            weight[7] *= 1.5
        elif change == "two swapped":
            weight[[3, 4]] = weight[[4, 3]]
        else:
            cast(Any, other.model).config.rms_norm_eps = 1e-2
    assert fingerprint(one.model) != fingerprint(other.model)


def test_where_a_model_came_from_is_no_part_of_it(tmp_path: Path) -> None:
    one = tiny("llama")
    save_model(one, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype="float32", device="cpu")
    assert fingerprint(one.model) == fingerprint(again.model)


# --------------------------------------------------------------------------------------------
# Many clients


def test_many_clients_each_get_their_own(loaded: LoadedModel, url: str) -> None:
    queries = [query(seed, vocab_size=V, sequences=1 + seed % 4) for seed in range(48)]
    plain = [scored(loaded, asked) for asked in queries]
    patient = replace(QUICK, timeout_s=20, concurrency=16)
    with endpoint(url, patient) as client, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(client.score, queries))
    for answers, expected in zip(found, plain, strict=True):
        agree(answers, expected)


def test_whoever_comes_when_too_much_waits_is_told_to_come_back(loaded: LoadedModel) -> None:
    settings = replace(SETTINGS, waiting_tokens=100, max_tokens=32)
    server = ScoringServer(loaded, settings)
    slow = server.scorer.answer
    server.scorer.answer = lambda jobs: (time.sleep(0.05), slow(jobs))[1]  # type: ignore[method-assign]
    asked = query(vocab_size=V, sequences=8)
    with listening(server) as found:
        content = encode(query_frame(asked, "t"))
        with ThreadPoolExecutor(6) as pool:
            said = list(
                pool.map(lambda _: httpx.post(found.url + SCORE, content=content), range(6))
            )
        refused = [reply for reply in said if reply.status_code == 429]
        assert 0 < len(refused) < 6
        assert all(float(reply.headers["Retry-After"]) >= 1 for reply in refused)
        assert {reply.status_code for reply in said} == {200, 429}
        client_settings = replace(QUICK, timeout_s=20, retry_s=30, concurrency=6)
        with endpoint(found.url, client_settings) as client, ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: client.score(asked), range(6)))
        for one in answers:
            agree(one, scored(loaded, asked))


def test_a_client_that_leaves_costs_no_more_scoring(loaded: LoadedModel) -> None:
    server = ScoringServer(loaded, replace(SETTINGS, max_tokens=16))
    asked = query(vocab_size=V, sequences=400)
    with listening(server) as found:
        with (
            httpx.Client(timeout=5) as client,
            client.stream(
                "POST", found.url + SCORE, content=encode(query_frame(asked, "t"))
            ) as reply,
        ):
            next(reply.iter_bytes(1))
        with endpoint(found.url) as later:
            agree(later.score(query(vocab_size=V)), scored(loaded, query(vocab_size=V)))
        deadline = time.monotonic() + 5
        while server.batcher._waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.batcher._waiting == 0
        assert server.scorer.tokens < asked.tokens / 2


def test_what_breaks_while_scoring_is_told_and_the_next_query_is_answered(
    loaded: LoadedModel,
) -> None:
    server = ScoringServer(loaded, SETTINGS)
    own, broken = server.scorer.answer, [True, True]

    def answer(jobs: Any) -> Any:
        if broken and broken.pop():
            raise MemoryError("no room")
        return own(jobs)

    server.scorer.answer = answer  # type: ignore[method-assign]
    with listening(server) as found, endpoint(found.url) as client:
        agree(client.score(query(vocab_size=V)), scored(loaded, query(vocab_size=V)))
        assert client.connection.traffic.retries == 2


# --------------------------------------------------------------------------------------------
# Clients that do not read


def widened(server: ScoringServer, numbers: int) -> list[int]:
    """Make the answers of queries named `wide` so large, and count them."""
    own, counted = server.scorer.answer, [0]

    def answer(jobs: Sequence[Job]) -> Iterator[tuple[int, Answer]]:
        for place, one in own(jobs):
            if jobs[place].query.name == "wide":
                rows = len(one.values["hidden"])
                wide = torch.zeros((rows, numbers // rows))
                one = Answer(one.revision, {**one.values, "hidden": wide})
                counted[0] += 1
            yield place, one

    server.scorer.answer = answer  # type: ignore[method-assign]
    return counted


@contextmanager
def not_reading(url: str, asked: Query) -> Iterator[socket.socket]:
    """A client that asks and takes nothing of the reply."""
    content = encode(query_frame(asked, "t"))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        head = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        yield client


def settled(counted: list[int], seconds: float = 1.0) -> int:
    """The count, once it has not grown for a while."""
    while True:
        before = counted[0]
        time.sleep(seconds)
        if before and counted[0] == before:
            return before


def test_a_client_that_does_not_read_is_scored_no_further_than_its_bound(
    loaded: LoadedModel,
) -> None:
    settings = replace(SETTINGS, max_tokens=16, max_unread_bytes=2**22, stalled_s=6.0)
    server = ScoringServer(loaded, settings)
    counted = widened(server, 2**18)  # 1 MiB of float32 each
    asked = replace(query(vocab_size=V, sequences=60, wanted=("hidden",)), name="wide")
    with listening(server) as found, not_reading(found.url, asked) as client:
        # 4 MiB wait for it, some are on their way, and the rest is what the system buffers
        assert 5 <= settled(counted) < 30
        assert max(ticket.unread_bytes for ticket in server.batcher._tickets) < 2**22 + 2**21
        with endpoint(found.url) as other:
            agree(other.score(query(vocab_size=V)), scored(loaded, query(vocab_size=V)))
        deadline = time.monotonic() + 20
        while (server.batcher._waiting or server.batcher._tickets) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.batcher._waiting == len(server.batcher._tickets) == 0
        assert counted[0] < 30
        client.settimeout(10)
        with suppress(ConnectionError):
            while client.recv(2**20):
                pass


def test_a_client_that_leaves_before_its_answer_no_longer_counts_as_waiting(
    loaded: LoadedModel,
) -> None:
    server = ScoringServer(loaded, SETTINGS)
    own = server.scorer.answer

    def answer(jobs: Sequence[Job]) -> Iterator[tuple[int, Answer]]:
        time.sleep(0.3)
        yield from own(jobs)

    server.scorer.answer = answer  # type: ignore[method-assign]
    gc.disable()  # it is given up at once, and not when memory happens to be cleared
    try:
        with listening(server) as found:
            with not_reading(found.url, query(vocab_size=V)):
                until = time.monotonic() + 5
                while not server.batcher._waiting and time.monotonic() < until:
                    time.sleep(0.01)
                assert server.batcher._waiting == 30
            while server.batcher._waiting and time.monotonic() < until:
                time.sleep(0.01)
            assert server.batcher._waiting == 0
    finally:
        gc.enable()


def test_what_nobody_reads_counts_as_waiting(loaded: LoadedModel) -> None:
    asked = replace(query(vocab_size=V, sequences=6, wanted=("hidden",)), name="wide")
    server = ScoringServer(loaded, replace(SETTINGS, waiting_tokens=asked.tokens))
    counted = widened(server, 2**21)  # 8 MiB each, more than the system buffers
    content = encode(query_frame(query(vocab_size=V), "t"))
    with listening(server) as found:
        with not_reading(found.url, asked):
            assert settled(counted) == 6
            # two answers, the longest, were taken out to be sent: 14 + 13 of the 69 tokens
            assert server.batcher._waiting == 42
            reply = httpx.post(found.url + SCORE, content=content)
            assert reply.status_code == 429
            assert float(reply.headers["Retry-After"]) >= 1
        deadline = time.monotonic() + 10
        while server.batcher._waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert httpx.post(found.url + SCORE, content=content).status_code == 200


def test_a_slow_reader_gets_all_of_its_answer(loaded: LoadedModel) -> None:
    """One that takes longer for every answer than a client may stand still."""
    settings = replace(SETTINGS, max_tokens=16, max_unread_bytes=2**20, stalled_s=1.0)
    server = ScoringServer(loaded, settings)
    counted = widened(server, 2**18)  # 1 MiB of float32 each
    asked = replace(query(vocab_size=V, sequences=2, wanted=("hidden",)), name="wide")
    with listening(server) as found:
        # what the system buffers for the client shows as progress only when much of it is taken
        found._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**15)
        with not_reading(found.url, asked) as client:
            client.settimeout(10)
            received, end, begun = 0, b"", time.monotonic()
            while not end.endswith(b"\r\n0\r\n\r\n"):
                while received > 2**19 * (time.monotonic() - begun):
                    time.sleep(0.005)
                part = client.recv(2**14)
                assert part, f"cut off after {received} bytes"
                received += len(part)
                end = (end + part)[-16:]
            assert time.monotonic() - begun > 3.5
    assert counted[0] == 2
    assert received > 2 * 2**20


# --------------------------------------------------------------------------------------------
# Who may ask, and what


def test_a_key_is_asked_of_everybody(loaded: LoadedModel) -> None:
    with serving(loaded, replace(SETTINGS, key="secret")) as url:
        for path in (INFO, HEAD, "/metrics"):
            assert httpx.get(url + path).status_code == 401
        wrong = {"Authorization": "Bearer secret2"}
        content = encode(query_frame(query(vocab_size=V), "t"))
        assert httpx.post(url + SCORE, content=content, headers=wrong).status_code == 401
        assert httpx.get(url + "/health").status_code == 200
        with endpoint(url, replace(QUICK, key="secret")) as client:
            assert client.describe().vocab_size == V
        with (
            endpoint(url) as client,
            pytest.raises(TeacherError, match=r"status 401.*set teacher.key_env"),
        ):
            client.describe()


def test_no_public_address_without_a_key() -> None:
    with pytest.raises(ConfigError, match=r"--host 0.0.0.0 is open to others.*--key-env"):
        ServeSettings(host="0.0.0.0")
    assert ServeSettings(host="0.0.0.0", key="k").host == "0.0.0.0"
    assert "secret" not in repr(ServeSettings(key="secret"))


@pytest.mark.parametrize("said", [True, False])
def test_too_large_a_request_is_refused(loaded: LoadedModel, said: bool) -> None:
    with serving(loaded, replace(SETTINGS, max_body_bytes=1000)) as url:
        body = b"x" * 5000
        content: Any = body if said else iter([body[:600], body[600:]])
        reply = httpx.post(url + SCORE, content=content)
        assert (reply.status_code, "1000 bytes" in reply.text) == (413, True)


@pytest.mark.parametrize("body", [b"", b"{}", b"x" * 100, b"OPDF" + bytes(60)])
def test_what_is_no_query_is_refused_with_the_reason(url: str, body: bytes) -> None:
    reply = httpx.post(url + SCORE, content=body, headers={"Content-Type": CONTENT_TYPE})
    assert reply.status_code == 400
    assert "frame" in reply.text


def test_a_token_that_there_is_not_is_refused(url: str) -> None:
    with (
        endpoint(url) as client,
        pytest.raises(TeacherError, match="the vocabulary has 53 tokens"),
    ):
        client.score(query(vocab_size=900))


def test_a_request_that_never_ends_is_closed_and_others_are_answered(
    loaded: LoadedModel,
) -> None:
    with serving(loaded, replace(SETTINGS, receive_s=0.5)) as url:
        host, port = url.removeprefix("http://").split(":")
        beginnings = [
            b"GET /info HT",
            b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\nab",
        ]
        slow = [socket.create_connection((host, int(port))) for _ in range(40)]
        try:
            for number, client in enumerate(slow):
                client.sendall(beginnings[number % 2])
                client.settimeout(10)
            with endpoint(url) as client:
                assert client.describe().vocab_size == V
            begun = time.monotonic()
            for one in slow:
                while one.recv(4096):
                    pass
            assert time.monotonic() - begun < 8
        finally:
            for one in slow:
                one.close()


BODY_STALLS = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\nab"


@pytest.mark.parametrize(
    ("beginning", "drips", "said"),
    [
        (BODY_STALLS, False, "408 Request Timeout"),
        (BODY_STALLS, True, "408 Request Timeout"),
        (b"GET /info HT", False, "408 Request Timeout"),
        (b"", False, ""),
    ],
)
def test_a_request_that_does_not_arrive_is_told_so(
    loaded: LoadedModel, beginning: bytes, drips: bool, said: str
) -> None:
    with serving(loaded, replace(SETTINGS, receive_s=0.5)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=0.1) as client:
            client.sendall(beginning)
            got, begun = b"", time.monotonic()
            while time.monotonic() - begun < 10:
                with suppress(TimeoutError):
                    part = client.recv(4096)
                    got += part
                    if not part:
                        break
                if drips and not got:
                    client.sendall(b"x")
            assert 0.4 < time.monotonic() - begun < 5
            assert got.decode().startswith(f"HTTP/1.1 {said}") if said else not got
            assert ("--receive-s" in got.decode()) == bool(said)
        if beginning == BODY_STALLS:
            until = time.monotonic() + 5
            while time.monotonic() < until:
                if 'opd_requests_total{status="408"} 1.0' in httpx.get(url + "/metrics").text:
                    break
            else:
                raise AssertionError("the refusal was not counted")


def test_who_comes_when_there_are_too_many_connections_is_told_to_come_back(
    loaded: LoadedModel,
) -> None:
    with serving(loaded, replace(SETTINGS, max_connections=3)) as url:
        host, port = url.removeprefix("http://").split(":")
        held = [socket.create_connection((host, int(port)), timeout=5) for _ in range(3)]
        try:
            with socket.create_connection((host, int(port)), timeout=5) as late:
                assert late.recv(4096).startswith(b"HTTP/1.1 503 Service Unavailable")
            held.pop().close()
            with endpoint(url) as client:  # tries again until the server has seen the end of it
                assert client.describe().vocab_size == V
        finally:
            for one in held:
                one.close()


def test_what_arrives_is_bounded_over_all_requests(loaded: LoadedModel) -> None:
    server = ScoringServer(loaded, replace(SETTINGS, max_receiving_bytes=1000))
    with listening(server) as found:
        host, port = found.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as slow:
            head = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
            slow.sendall(head.encode() + b"x" * 800)
            until = time.monotonic() + 5
            while server._receiving < 800 and time.monotonic() < until:
                time.sleep(0.01)
            reply = httpx.post(found.url + SCORE, content=b"x" * 500)
            assert (reply.status_code, reply.headers["Retry-After"]) == (429, "1")
            assert httpx.post(found.url + SCORE, content=b"x" * 100).status_code == 400
        until = time.monotonic() + 5
        while server._receiving and time.monotonic() < until:
            time.sleep(0.01)
        assert httpx.post(found.url + SCORE, content=b"x" * 500).status_code == 400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"port": 99999}, "--port 99999: ports go from 1 to 65535, and 0 takes a free one"),
        ({"port": -1}, "--port -1"),
        ({"max_tokens": -5}, "max_tokens = -5: it must be a number above 0"),
        ({"drain_s": float("nan")}, "drain_s = nan"),
        ({"receive_s": 0}, "receive_s = 0"),
        ({"key": "two words"}, "the server's key has ' ' as character 4 of 9"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        replace(SETTINGS, **change)


def test_an_address_that_cannot_be_taken_is_named(loaded: LoadedModel) -> None:
    with serving(loaded) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"--port {port} is taken; .*another one"):
            listen_at(replace(SETTINGS, port=port))
    with pytest.raises(ConfigError, match=r"--host 192.0.2.1 --port 0: .*address of this machine"):
        listen_at(replace(SETTINGS, host="192.0.2.1", key="k"))


def test_metrics_count_what_was_done(loaded: LoadedModel) -> None:
    asked = query(vocab_size=V, sequences=5)
    with serving(loaded) as url, endpoint(url) as client:
        client.score(asked)
        httpx.post(url + SCORE, content=b"x")
        text = httpx.get(url + "/metrics").text
    told = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(told["opd_sequences_total"]) == 5
    assert float(told["opd_tokens_total"]) == asked.tokens
    assert float(told['opd_requests_total{status="200"}']) == 1
    assert float(told['opd_requests_total{status="400"}']) == 1
    assert float(told["opd_waiting_tokens"]) == 0
    assert float(told["opd_request_seconds_count"]) == 1
    assert float(told["opd_sent_bytes_total"]) > 1000


# --------------------------------------------------------------------------------------------
# Stopping


def test_what_has_begun_is_finished_and_nothing_new_begins(loaded: LoadedModel) -> None:
    server = ScoringServer(loaded, replace(SETTINGS, max_tokens=16))
    slow = server.scorer.answer
    server.scorer.answer = lambda jobs: (time.sleep(0.05), slow(jobs))[1]  # type: ignore[method-assign]
    asked = query(vocab_size=V, sequences=12)
    found = Listening(server)
    with endpoint(found.url, replace(QUICK, timeout_s=20, retry_s=0.1)) as client:
        client.describe()
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(client.score, asked)
            while not server.scorer.tokens:
                assert not answers.done(), answers.result()
                time.sleep(0.01)
            found.stop()
            agree(answers.result(timeout=10), scored(loaded, asked))
        with pytest.raises(TeacherError, match="ConnectError"):
            client.score(asked)
    assert not found.is_alive


def test_a_draining_server_says_so(loaded: LoadedModel) -> None:
    server = ScoringServer(loaded, SETTINGS)
    with listening(server) as found:
        assert httpx.get(found.url + "/health").text == "ok"
        server.draining = True
        assert httpx.get(found.url + "/health").status_code == 503
        content = encode(query_frame(query(vocab_size=V), "t"))
        assert httpx.post(found.url + SCORE, content=content).status_code == 503

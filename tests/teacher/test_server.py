"""The scoring server: what it answers, whom, how much at once, and how it stops."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch

from opd.errors import ConfigError, TeacherError
from opd.formula.numerics import project
from opd.models import LoadedModel
from opd.teacher.identity import fingerprint, identity, template_hash, vocabulary_hash
from opd.teacher.messages import query_frame
from opd.teacher.opd_endpoint import CONTENT_TYPE, HEAD, INFO, SCORE
from opd.teacher.query import WANTED, Query
from opd.teacher.scoring import Job, Scorer
from opd.teacher.server import Listening, ScoringServer, ServeSettings, listening
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
        beginnings = [b"GET /info HT", b"POST /v1/score HTTP/1.1\r\nContent-Length: 999\r\n\r\nab"]
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

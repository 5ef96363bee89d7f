"""A scoring server on a bad day: what is tried again, and what stops the run with which words."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import httpx
import pytest
import torch

from opd.errors import TeacherError
from opd.models import load_model
from opd.teacher import connection
from opd.teacher.query import Query
from opd.teacher.scoring import Job, Scorer
from opd.teacher.wire import HEADER, Frame
from tests.teacher.queries import query
from tests.teacher.served import QUICK, Fault, Reply, endpoint, harmed, serving, stall

V = 53


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(load_model("builtin:sort-student")) as url:
        yield url


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.01)


def asked() -> Query:
    return query(vocab_size=V)


def expected() -> list[dict[str, torch.Tensor]]:
    loaded = load_model("builtin:sort-student")
    own = Scorer(loaded, vocab_size=loaded.vocab_size)
    found = dict(own.answer([Job(one, asked()) for one in asked().sequences]))
    return [dict(found[place].values) for place in range(len(found))]


# --------------------------------------------------------------------------------------------
# Tried again


def closes_at_once(reply: Reply) -> None:
    pass


def resets_at_once(reply: Reply) -> None:
    reply.reset()


def resets_within_a_frame(reply: Reply) -> None:
    body = reply.body()
    reply.head(extra=f"Content-Length: {len(body)}\r\n")
    reply.write(body[: len(body) // 2])
    reply.reset()


def ends_within_a_frame(reply: Reply) -> None:
    reply.head()
    reply.write(reply.body()[:-5])


def ends_between_frames(reply: Reply) -> None:
    reply.head()
    reply.write(reply.body(reply.frames[:2]))


def promises_more_than_it_sends(reply: Reply) -> None:
    body = reply.body()
    reply.head(extra=f"Content-Length: {len(body) + 100}\r\n")
    reply.write(body[:-40])


def stalls_before_the_headers(reply: Reply) -> None:
    stall()


def stalls_within_a_frame(reply: Reply) -> None:
    reply.head()
    reply.write(reply.body()[:50])
    stall()


def drips(reply: Reply) -> None:
    reply.head()
    for byte in reply.body()[:40]:
        reply.write(bytes([byte]))
        stall(0.1)


def status(text: str, extra: str = "") -> Fault:
    def fault(reply: Reply) -> None:
        reply.send(b"no", text, extra)

    fault.__name__ = f"status_{text[:3]}"
    return fault


def it_gives_up(reply: Reply) -> None:
    reply.send(reply.body([reply.frames[0], Frame("error", {"message": "no memory"})]))


TRIED_AGAIN: list[Fault] = [
    it_gives_up,
    closes_at_once,
    resets_at_once,
    resets_within_a_frame,
    ends_within_a_frame,
    ends_between_frames,
    promises_more_than_it_sends,
    stalls_before_the_headers,
    stalls_within_a_frame,
    drips,
    status("500 Oops"),
    status("502 Bad Gateway"),
    status("503 Unavailable"),
    status("429 Too Many", "Retry-After: 0\r\n"),
    status("408 Too Late"),
]


@pytest.mark.parametrize("fault", TRIED_AGAIN, ids=lambda fault: fault.__name__)
def test_the_connection_failed_and_the_answer_is_that_of_a_later_try(
    server: str, fault: Fault
) -> None:
    with harmed(server, fault, count=2) as proxy, endpoint(proxy.url) as client:
        found = client.score(asked())
        assert proxy.queries == 3
        assert client.connection.traffic.retries == 2
    for answer, plain in zip(found, expected(), strict=True):
        for name, value in plain.items():
            assert torch.equal(answer.values[name], value), name


# --------------------------------------------------------------------------------------------
# Not tried again


def nothing_but_html(reply: Reply) -> None:
    reply.send(b"<html>" + b"x" * 100)


def from_the_future(reply: Reply) -> None:
    body = bytearray(reply.body())
    body[4] = 2
    reply.send(bytes(body))


def damaged(reply: Reply) -> None:
    body = bytearray(reply.body())
    body[HEADER.size + 200] ^= 1
    reply.send(bytes(body))


def enormous(reply: Reply) -> None:
    body = bytearray(reply.body())
    body[8:16] = (2**40).to_bytes(8, "little")
    reply.send(bytes(body))


def fewer_rows(reply: Reply) -> None:
    reply.send(reply.body(reply.changed("sampled_logp", lambda v: v[:-1])))


def more_rows(reply: Reply) -> None:
    reply.send(reply.body(reply.changed("hidden", lambda v: torch.cat([v, v[:1]]))))


def fewer_tokens(reply: Reply) -> None:
    reply.send(reply.body(reply.changed("top_logp", lambda v: v[:, :-1].contiguous())))


def no_array(reply: Reply) -> None:
    first = reply.frames[0]
    arrays = {name: value for name, value in first.arrays.items() if name != "ids_logp"}
    reply.send(reply.body([Frame("answer", first.meta, arrays), *reply.frames[1:]]))


def an_unknown_token(reply: Reply) -> None:
    reply.send(reply.body(reply.changed("top_ids", lambda v: v[0].fill_(V))))


def a_token_twice(reply: Reply) -> None:
    reply.send(reply.body(reply.changed("top_ids", lambda v: v[2, 1].copy_(v[2, 0]))))


def other_tokens(reply: Reply) -> None:
    reply.send(reply.body(reply.with_meta(digest=1)))


def swapped(reply: Reply) -> None:
    one, other = reply.frames[:2]
    meta = {**one.meta, "sequence": other.meta["sequence"]}
    again = {**other.meta, "sequence": one.meta["sequence"]}
    frames = [Frame("answer", meta, one.arrays), Frame("answer", again, other.arrays)]
    reply.send(reply.body([*frames, *reply.frames[2:]]))


def an_answer_twice(reply: Reply) -> None:
    reply.send(reply.body([reply.frames[0], *reply.frames]))


def a_sequence_too_many(reply: Reply) -> None:
    reply.send(reply.body(reply.with_meta(sequence=77)))


def not_all(reply: Reply) -> None:
    reply.send(reply.body([reply.frames[0], reply.frames[-1]]))


def shifted(reply: Reply) -> None:
    """Log-probabilities of the tokens one place on."""
    reply.send(reply.body(reply.changed("sampled_logp", lambda v: v.copy_(v.roll(1) - 1.0))))


def filled(array: str, value: float) -> Fault:
    def fault(reply: Reply) -> None:
        reply.send(reply.body(reply.changed(array, lambda v: v[1].fill_(value))))

    fault.__name__ = f"{array}_{value}"
    return fault


def another_model(reply: Reply) -> None:
    reply.send(reply.body(reply.with_meta(revision="0123")))


STOPPED: list[tuple[Fault, str]] = [
    (nothing_but_html, "not a frame of opd's scoring protocol"),
    (from_the_future, "a frame of version 2; this is version 1"),
    (damaged, "the checksum of a frame does not match"),
    (enormous, "a frame of 1099511627776 bytes"),
    (fewer_rows, r"sampled_logp has the shape \[3\], but \[4\]"),
    (more_rows, r"hidden has the shape \[5, 64\], but \[4, 64\]"),
    (fewer_tokens, r"top_logp has the shape \[4, 3\], but \[4, 4\]"),
    (no_array, "ids_logp is missing, though 4 tokens asked for it"),
    (an_unknown_token, "top_ids names a token that there is not in row 0: 53"),
    (a_token_twice, "top_ids names a token twice in row 2"),
    (other_tokens, "sequence 0 was answered for other tokens than were asked"),
    (swapped, "was answered for other tokens than were asked"),
    (an_answer_twice, "an answer for sequence 0, which is not waited for"),
    (a_sequence_too_many, "an answer for sequence 77, which is not waited for"),
    (not_all, "2 sequences were not answered"),
    (filled("sampled_logp", float("nan")), "sampled_logp is NaN in row 1"),
    (filled("sampled_logp", float("-inf")), "sampled_logp says that there is no mass at all"),
    (filled("top_logp", 0.0), "top_logp has a mass of more than 1 in row 1"),
    (filled("ids_logp", 0.0), "ids_logp has a mass of more than 1 in row 1"),
    (filled("ids_logp", 0.5), "ids_logp is above 0"),
    (filled("hidden", 0.0), "hidden is zero throughout in row 1"),
    (filled("hidden", float("inf")), "hidden is infinite in row 1"),
    (filled("logsumexp", float("nan")), "logsumexp is NaN in row 1"),
    (filled("entropy", -1.0), "an entropy is negative in row 1"),
    (another_model, "it answers with revision '0123'"),
    (status("400 Bad"), "was refused with status 400: no"),
    (status("401 No"), "status 401: no; set teacher.key_env"),
    (status("404 No"), "status 404: no; is teacher.protocol"),
    (status("413 No"), "status 413: no; lower teacher.client.tokens_per_request"),
]


@pytest.mark.parametrize(("fault", "said"), STOPPED, ids=[fault.__name__ for fault, _ in STOPPED])
def test_a_wrong_answer_stops_at_once_and_names_teacher_request_and_fault(
    server: str, fault: Fault, said: str
) -> None:
    with harmed(server, fault) as proxy, endpoint(proxy.url) as client:
        one = asked()
        with pytest.raises(TeacherError, match=said) as caught:
            client.score(one)
        assert proxy.queries == 1
        assert re.match(
            rf"teacher 'math' \(opd serve at {proxy.url}\): request {one.name[:8]} "
            r"\(3 sequences\)",
            str(caught.value),
        )


def test_log_probabilities_of_other_tokens_are_noticed_where_they_are_told_twice(
    server: str,
) -> None:
    with (
        harmed(server, shifted) as proxy,
        endpoint(proxy.url) as client,
        pytest.raises(TeacherError, match="sampled_logp and top_logp disagree on the same token"),
    ):
        client.score(query(vocab_size=V, top_k=V))


def test_an_answer_to_an_earlier_try_is_never_used(server: str) -> None:
    def first_fails(reply: Reply) -> None:
        if not reply.seen:
            reply.reset()
        else:
            reply.send(reply.body(reply.seen[0]))

    with (
        harmed(server, first_fails, count=2) as proxy,
        endpoint(proxy.url) as client,
        pytest.raises(TeacherError, match="an answer to another request"),
    ):
        client.score(asked())


def test_a_server_that_stays_away_stops_the_run_within_its_budget() -> None:
    impatient = type(QUICK)(timeout_s=1.0, retry_s=0.3, concurrency=1)
    loaded = load_model("builtin:sort-student")
    with serving(loaded) as url, endpoint(url, impatient) as client:
        client.describe()
        client.connection._client.close()
        client.connection._client = httpx.Client(base_url="http://127.0.0.1:9")
        with pytest.raises(TeacherError, match=r"failed \d+ times in .*ConnectError.*--resume"):
            client.score(asked())


def test_a_server_that_was_never_there_is_waited_for_a_few_seconds_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "FIRST_CONTACT_S", 0.3)
    patient = type(QUICK)(timeout_s=1.0, retry_s=300.0, concurrency=1)
    begun = time.monotonic()
    with (
        endpoint("http://127.0.0.1:9", patient) as client,
        pytest.raises(TeacherError, match=r"failed \d+ times in .*ConnectError.*teacher.url is"),
    ):
        client.describe()
    assert time.monotonic() - begun < 30


def test_every_kind_of_harm_is_another() -> None:
    assert len({fault.__name__ for fault, _ in STOPPED} | {f.__name__ for f in TRIED_AGAIN}) >= 40

"""Hosted services: what is refused, and the one thing that a few of them can."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd.errors import ConfigError, TeacherError
from opd.teacher import connection
from opd.teacher.connection import ConnectionSettings
from opd.teacher.hosted_endpoint import HostedEndpoint
from opd.teacher.query import Query
from tests.teacher.json_servers import (
    IMPATIENT,
    PATIENT,
    QUERY,
    SAMPLED,
    SEQUENCES,
    JsonServer,
    Reply,
    asked,
    difference,
    expected,
    log_probs,
    serving,
)

COMPLETIONS = "/v1/completions"
SAMPLED_QUERY = Query(
    tuple(
        asked(own.prompt.tolist(), own.response.tolist(), [SAMPLED] * len(own.response))
        for own in SEQUENCES
    ),
    name="0123456789",
)


# --------------------------------------------------------------------------------------------
# A service that echoes


class Service:
    """`with_own`: the token itself stands beside the likeliest ones; `says_ids`: beside texts."""

    def __init__(self) -> None:
        self.with_own = True
        self.says_ids = False
        self.takes_flag = True

    def complete(self, body: Any) -> Reply:
        assert (body["max_tokens"], body["echo"], body["temperature"]) == (0, True, 1.0)
        as_ids = body.get("return_tokens_as_token_ids", False) and self.takes_flag

        def name(token: int) -> str:
            return f"token_id:{token}" if as_ids else "ab"[token % 2]  # texts collide

        choices = []
        for index, tokens in enumerate(body["prompt"]):
            rows = log_probs(tokens)[:-1]
            own = [float(row[token]) for row, token in zip(rows, tokens[1:], strict=True)]
            top: list[Any] = [None]
            for row, token in zip(rows, tokens[1:], strict=True):
                likeliest = row.topk(body["logprobs"])
                entries = {name(token): float(row[token])} if self.with_own else {}
                pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
                top.append(entries | {name(other): value for other, value in pairs})
            logprobs = {
                "tokens": [name(token) for token in tokens],
                "token_logprobs": [None, *own],
                "top_logprobs": top,
                "text_offset": list(range(len(tokens))),
            }
            logprobs |= {"token_ids": tokens} if self.says_ids else {}
            choices.append({"index": index, "text": "", "logprobs": logprobs})
        return 200, {"object": "text_completion", "choices": choices}


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def server(service: Service) -> Iterator[JsonServer]:
    with serving() as served:
        served.routes = {
            "/v1/models": lambda body: (200, {"data": [{"id": "math", "max_model_len": 64}]}),
            COMPLETIONS: service.complete,
        }
        yield served


def endpoint(
    server: JsonServer,
    echo: str = "ids",
    settings: ConnectionSettings = PATIENT,
    *,
    model: str = "math",
) -> HostedEndpoint:
    return server.client(HostedEndpoint("math", server.url, model, settings, echo=echo))


# --------------------------------------------------------------------------------------------
# What it says


@pytest.mark.parametrize("with_own", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_an_echo_with_ids_gives_the_models_own_numbers(
    server: JsonServer, service: Service, with_own: bool, top_k: int
) -> None:
    service.with_own = with_own
    query = replace(QUERY, top_k=top_k)
    assert difference(query, endpoint(server).score(query)) <= 1e-6


@pytest.mark.parametrize("says_ids", [True, False])
def test_an_echo_with_texts_gives_the_sampled_tokens(
    server: JsonServer, service: Service, says_ids: bool
) -> None:
    service.says_ids = says_ids
    own = endpoint(server, "text")
    assert difference(SAMPLED_QUERY, own.score(SAMPLED_QUERY)) <= 1e-6
    (body,) = server.asked(COMPLETIONS)
    assert "return_tokens_as_token_ids" not in body
    assert body["logprobs"] == 1


def test_a_token_that_ties_with_the_last_likely_one_does_not_take_its_place(
    server: JsonServer,
) -> None:
    query = Query((asked([1, 13], [9], [("sampled", "top")]),), top_k=2)

    def alter(said: Any) -> Any:
        logprobs = said["choices"][0]["logprobs"]
        last = min(value for key, value in logprobs["top_logprobs"][2].items() if key[9:] != "9")
        logprobs["token_logprobs"][2] = logprobs["top_logprobs"][2]["token_id:9"] = last
        return said

    server.alter = alter
    (answer,) = endpoint(server).score(query)
    assert answer.values["top_ids"][0].tolist() == expected(query)[0]["top_ids"][0].tolist()


def test_a_model_that_is_not_listed_is_not_described(server: JsonServer) -> None:
    assert endpoint(server).describe().max_tokens == 63
    unlisted = endpoint(server, model="accounts/me/math").describe()
    assert (unlisted.model, unlisted.max_tokens) == ("accounts/me/math", 0)


def test_a_query_that_asks_nothing_sends_nothing(server: JsonServer) -> None:
    (answer,) = endpoint(server).score(Query((SEQUENCES[2],)))
    assert answer.values == {}
    assert server.seen == []


def test_a_busy_service_is_asked_again(server: JsonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.01)
    server.first = [(429, {"error": "slow down"}), (500, {"error": "broken"})]
    own = endpoint(server)
    assert difference(QUERY, own.score(QUERY)) <= 1e-6
    assert own.connection.traffic.retries == 2
    server.first = [(500, {"error": "broken"})]
    with pytest.raises(TeacherError, match=r"failed 1 times .*status 500"):
        endpoint(server, settings=IMPATIENT).score(QUERY)
    assert server.keys[-1] == "Bearer secret"


# --------------------------------------------------------------------------------------------
# What it cannot say


def test_a_service_that_scores_what_it_generates_cannot_be_a_teacher(server: JsonServer) -> None:
    own = endpoint(server, "")
    assert own.limits.wanted == frozenset()
    assert "not those of a student" in own.limits.why_not["sampled"]
    with pytest.raises(TeacherError, match=r"^teacher 'math' .hosted.*'sampled'.*opd serve.*echo"):
        own.score(QUERY)
    assert server.seen == []


@pytest.mark.parametrize("echo", ["", "text", "ids"])
def test_limits_give_a_reason_and_a_way_out_for_all_that_is_missing(
    server: JsonServer, echo: str
) -> None:
    limits = endpoint(server, echo).limits
    fields = {"sampled", "top", "ids", "logsumexp", "entropy", "hidden"}
    assert limits.wanted == {"": set(), "text": {"sampled"}, "ids": {"sampled", "top"}}[echo]
    assert limits.why_not.keys() >= (fields - limits.wanted) | {"temperature", "merge_ids"}
    assert all("opd serve" in why for why in limits.why_not.values())


@pytest.mark.parametrize(
    ("echo", "query", "fault"),
    [
        ("text", QUERY, "it has no 'top': the service names tokens by their text, which several"),
        ("ids", replace(QUERY, top_k=21), "21 of its likeliest tokens are wanted, and it gives 20"),
        ("ids", Query((asked([1], [2], [("ids",)], [[3]]),)), "it has no 'ids'"),
        ("ids", replace(QUERY, temperature=0.7), "temperature 0.7"),
        ("ids", replace(QUERY, merge_ids=((2, 3),)), "several ids count as one"),
    ],
)
def test_what_it_cannot_say_is_refused_before_anything_is_sent(
    server: JsonServer, echo: str, query: Query, fault: str
) -> None:
    with pytest.raises(TeacherError, match=f"^teacher 'math'.*{fault}"):
        endpoint(server, echo).score(query)
    assert server.seen == []


def test_an_echo_that_there_is_not_is_refused(server: JsonServer) -> None:
    with pytest.raises(ConfigError, match="'', 'text' or 'ids', got 'yes'"):
        HostedEndpoint("math", server.url, "math", PATIENT, echo="yes")


def test_a_service_that_refuses_the_echo_is_told_with_the_ways_out(server: JsonServer) -> None:
    words = "Setting 'echo' and 'logprobs' at the same time is not supported for this model."
    server.first = [(400, {"error": {"message": words}}), (400, {"error": {"message": "no"}})]
    with pytest.raises(TeacherError, match=r"it refuses `echo` .*opd serve"):
        endpoint(server).score(QUERY)
    with pytest.raises(TeacherError, match="was refused with status 400"):
        endpoint(server).score(QUERY)


# --------------------------------------------------------------------------------------------
# Replies that are wrong


def put(name: str, place: int, value: Any) -> Callable[[Any], Any]:
    def alter(said: Any) -> Any:
        said["choices"][0]["logprobs"][name][place] = value
        return said

    return alter


def cut(name: str) -> Callable[[Any], Any]:
    def alter(said: Any) -> Any:
        del said["choices"][0]["logprobs"][name][-1]
        return said

    return alter


def members(name: str, **changes: Any) -> Callable[[Any], Any]:
    def alter(said: Any) -> Any:
        said["choices"][0][name] = changes or None
        return said

    return alter


# position 6 is response token 0
FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "null in the middle": (
        put("token_logprobs", 6, None),
        "response token 0 .position 6.* is null",
    ),
    "NaN": (put("token_logprobs", 6, float("nan")), "response token 0 .* is nan"),
    "positive": (put("token_logprobs", 6, 0.5), "is above 0"),
    "no likely tokens": (put("top_logprobs", 6, None), "nothing is said of the likeliest tokens"),
    "a token short": (
        put("top_logprobs", 10, {"token_id:5": -0.1, "token_id:3": -6.0}),
        "2 tokens, not the 3 likeliest, at response token 4",
    ),
    "a token too many": (
        put("top_logprobs", 10, {f"token_id:{n}": -2.0 for n in range(3, 7)}),
        "4 tokens, not the 3 likeliest, at response token 4",
    ),
    "a text": (
        put("top_logprobs", 10, {"a": -0.1, "b": -6.0, "c": -7.0}),
        "names a token by its text, 'a'",
    ),
    "no id": (put("top_logprobs", 10, {"token_id:x": -0.1}), "names a token 'token_id:x'"),
    "another token": (
        put("tokens", 7, "token_id:6"),
        "tokens has 6 at position 7, where 5 was sent",
    ),
    "tokens short": (cut("tokens"), "tokens: 10 entries, not 11"),
    "values short": (cut("token_logprobs"), "token_logprobs: 10 entries, not 11"),
    "likely tokens short": (cut("top_logprobs"), "top_logprobs: 10 entries, not 11"),
    "no logprobs": (members("logprobs"), "logprobs of the answer is null"),
    "no tokens": (members("logprobs", token_logprobs=[]), "tokens of logprobs is null"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_reply_is_refused_with_its_place(server: JsonServer, fault: str) -> None:
    server.alter, words = FAULTS[fault]
    with pytest.raises(
        TeacherError, match=f"^teacher 'math'.*request 01234567 .*sequence 0: .*{words}"
    ):
        endpoint(server).score(QUERY)


def test_a_service_that_ignores_the_flag_is_not_read_by_text(
    server: JsonServer, service: Service
) -> None:
    service.takes_flag = False
    with pytest.raises(TeacherError, match=r"by its text, .*does not take return_tokens_as_token"):
        endpoint(server).score(QUERY)


def test_other_token_ids_beside_the_texts_are_refused(server: JsonServer, service: Service) -> None:
    service.says_ids = True
    server.alter = put("token_ids", 2, 44)
    with pytest.raises(TeacherError, match="token_ids has 44 at position 2, where 5 was sent"):
        endpoint(server, "text").score(SAMPLED_QUERY)


def test_a_recorded_echo_of_vllm_is_the_models_own_numbers(server: JsonServer) -> None:
    recorded = Path(__file__).parent / "recorded" / "vllm_echo.json"
    by_path = {
        exchange["path"]: exchange for exchange in json.loads(recorded.read_text())["exchanges"]
    }

    def complete(body: Any) -> Reply:
        assert body == by_path[COMPLETIONS]["request"]
        return 200, by_path[COMPLETIONS]["reply"]

    server.routes[COMPLETIONS] = complete
    query = Query(SEQUENCES[:1], top_k=3)
    assert difference(query, endpoint(server, model="sort-teacher").score(query)) <= 2e-5

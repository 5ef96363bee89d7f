"""SGLang's input log-probabilities: against a model, and against faults.

The server here answers in the shapes that SGLang 0.5.23 has in its source.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opd.errors import TeacherError
from opd.teacher import connection
from opd.teacher.connection import ConnectionSettings
from opd.teacher.query import Query
from opd.teacher.sglang_endpoint import SglangEndpoint
from tests.teacher.json_servers import (
    BOTH,
    IMPATIENT,
    NOTHING,
    PATIENT,
    QUERY,
    SAMPLED,
    SEQUENCES,
    JsonServer,
    Reply,
    asked,
    difference,
    log_probs,
    serving,
)

VOCAB, LONGEST = 53, 64
FORMS = ("nested", "flat", "binary")

IDS_QUERY = Query(
    (
        asked(
            [1, 13, 5],
            [9, 20, 3, 4],
            [("ids",), NOTHING, (*BOTH, "ids"), SAMPLED],
            [[5, 6], [7, 5]],
        ),
        asked([1], [8, 7], [("ids", "sampled"), ("ids",)], [[52, 0], [0, 8]]),
        asked([1, 2], [3], [BOTH]),
    ),
    top_k=2,
    name="0123456789",
)


# --------------------------------------------------------------------------------------------
# SGLang, as far as it is asked here


class Sglang:
    """What the server says; `form` is that of the likeliest tokens, `version` of the weights."""

    def __init__(self) -> None:
        self.form = "binary"
        self.version = "default"

    def info(self, body: Any) -> Reply:
        return 200, {"model_path": "org/math", "weight_version": self.version}

    def models(self, body: Any) -> Reply:
        return 200, {"object": "list", "data": [{"id": "org/math", "max_model_len": LONGEST}]}

    def generate(self, body: Any) -> Reply:
        assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}
        assert body["return_logprob"] is True
        rows = zip(
            body["input_ids"],
            body["logprob_start_len"],
            body.get("token_ids_logprob", [None] * len(body["input_ids"])),
            strict=True,
        )
        return 200, [self.one(*row, body) for row in rows]

    def one(self, tokens: list[int], start: int, ids: list[int] | None, body: Any) -> Any:
        after = log_probs(tokens)[start:-1]
        k = body.get("top_logprobs_num", 0)
        own = [None] + [float(row[t]) for row, t in zip(after, tokens[start + 1 :], strict=True)]
        meta: dict[str, Any] = {
            "id": "x",
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(tokens),
            "weight_version": self.version,
            # the last id of the vocabulary is written as 0
            "input_token_logprobs": [
                [logp, token if token < VOCAB - 1 else 0, None]
                for logp, token in zip(own, tokens[start:], strict=True)
            ],
            "output_token_logprobs": [],
        }
        if k:
            meta |= self.likeliest(*after.topk(k), body)
        if ids is not None:
            assert ids
            meta["input_token_ids_logprobs"] = [
                None,
                *([[float(row[token]), token, None] for token in ids] for row in after),
            ]
        return {"text": "", "output_ids": [], "meta_info": meta}

    def likeliest(self, values: Any, ids: Any, body: Any) -> dict[str, Any]:
        if self.form == "nested" or not body["return_flat_raw_top_logprobs"]:
            rows = zip(values.tolist(), ids.tolist(), strict=True)
            return {
                "input_top_logprobs": [
                    None,
                    *([[v, t, None] for v, t in zip(*row, strict=True)] for row in rows),
                ],
                "output_top_logprobs": [],
            }
        told: dict[str, Any] = {
            "input_top_logprobs_shape": list(values.shape),
            "input_top_logprobs_null_prefix": 1,
        }
        if self.form == "flat":
            told["input_top_logprobs_val_flat"] = values.flatten().tolist()
            told["input_top_logprobs_idx_flat"] = ids.flatten().tolist()
            return told
        assert body["return_flat_raw_top_logprobs_b64"]
        told["input_top_logprobs_val_flat_b64"] = b64(values.float().numpy())
        told["input_top_logprobs_idx_flat_b64"] = b64(ids.int().numpy())
        return told


def b64(array: Any) -> str:
    return base64.b64encode(np.asarray(array).tobytes()).decode()


@pytest.fixture
def sglang() -> Sglang:
    return Sglang()


@pytest.fixture
def server(sglang: Sglang) -> Iterator[JsonServer]:
    with serving() as served:
        served.routes = {
            "/v1/models": sglang.models,
            "/model_info": sglang.info,
            "/generate": sglang.generate,
        }
        yield served


def endpoint(
    server: JsonServer, settings: ConnectionSettings = PATIENT, **knobs: int
) -> SglangEndpoint:
    return server.client(SglangEndpoint("math", server.url, settings, **knobs))


# --------------------------------------------------------------------------------------------
# What it says


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top_k", [1, 3, 53])
def test_answers_are_the_models_own_numbers(
    server: JsonServer, sglang: Sglang, form: str, top_k: int
) -> None:
    sglang.form = form
    query = replace(QUERY, top_k=top_k)
    assert difference(query, endpoint(server).score(query)) <= 1e-5


def test_only_the_rows_that_are_asked_about_come_back(server: JsonServer) -> None:
    endpoint(server).score(QUERY)
    (body,) = server.asked("/generate")
    assert [len(tokens) for tokens in body["input_ids"]] == [11, 4, 9]
    assert body["logprob_start_len"] == [5, 0, 5]


def test_one_number_per_token_is_asked_for_where_no_more_are_wanted(server: JsonServer) -> None:
    query = Query((asked([1, 13, 5], [9, 20], [SAMPLED, SAMPLED]),), top_k=7)
    assert difference(query, endpoint(server).score(query)) <= 1e-6
    (body,) = server.asked("/generate")
    assert body.keys() == {"input_ids", "sampling_params", "return_logprob", "logprob_start_len"}


def test_a_query_that_asks_nothing_scores_nothing(server: JsonServer) -> None:
    (answer,) = endpoint(server).score(Query((SEQUENCES[2],)))
    assert answer.values == {}
    assert server.asked("/generate") == []


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_picked_per_token_from_all_that_a_sequence_asks_about(
    server: JsonServer, sglang: Sglang, form: str
) -> None:
    sglang.form = form
    assert difference(IDS_QUERY, endpoint(server).score(IDS_QUERY)) <= 1e-5
    (body,) = server.asked("/generate")
    assert body["token_ids_logprob"] == [[5, 6, 7], [0, 8, 52], [1]]


def test_a_sequence_that_asks_about_too_many_ids_is_refused(server: JsonServer) -> None:
    assert difference(IDS_QUERY, endpoint(server, most_union_ids=3).score(IDS_QUERY)) <= 1e-5
    with pytest.raises(
        TeacherError,
        match=r"sequence 0 asks about 3 different ids, more than most_union_ids = 2.*`opd serve`",
    ):
        endpoint(server, most_union_ids=2).score(IDS_QUERY)
    assert len(server.asked("/generate")) == 1


def test_describe_says_model_length_and_version(server: JsonServer, sglang: Sglang) -> None:
    sglang.version = "step-7"
    described = endpoint(server).describe()
    assert (described.model, described.max_tokens) == ("org/math", LONGEST - 1)
    assert described.revision == "step-7"
    assert described.extra["model_path"] == "org/math"


def test_sglangs_default_is_no_revision(server: JsonServer) -> None:
    own = endpoint(server)
    assert own.describe().revision == ""
    assert {answer.revision for answer in own.score(QUERY)} == {""}


def test_an_older_server_is_asked_at_its_older_route(server: JsonServer, sglang: Sglang) -> None:
    server.routes["/get_model_info"] = server.routes.pop("/model_info")
    sglang.version = "step-7"
    assert endpoint(server).describe().revision == "step-7"


def test_a_server_without_either_route_is_told(server: JsonServer) -> None:
    del server.routes["/model_info"]
    with pytest.raises(TeacherError, match=r"status 404.*teacher\.protocol"):
        endpoint(server).describe()


def test_a_broken_server_is_not_asked_at_its_older_route(server: JsonServer) -> None:
    server.routes["/model_info"] = lambda body: (401, {"error": "Unauthorized"})
    server.routes["/get_model_info"] = lambda body: (200, {})
    with pytest.raises(TeacherError, match="status 401"):
        endpoint(server).describe()


# --------------------------------------------------------------------------------------------
# What it cannot say


def test_limits_give_a_reason_and_a_way_out_for_all_that_is_missing(server: JsonServer) -> None:
    limits = endpoint(server).limits
    assert limits.wanted == {"sampled", "top", "ids"}
    assert limits.why_not.keys() == {
        "logsumexp", "entropy", "hidden", "temperature", "merge_ids"
    }  # fmt: skip
    assert limits.temperature is limits.merge_ids is False
    assert all("opd serve" in why for why in limits.why_not.values())


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        (Query((asked([1], [2], [("entropy",)]),)), "it has no 'entropy'"),
        (Query((asked([1], [2], [("hidden",)]),)), "it has no 'hidden'"),
        (Query((asked([1], [2], [("logsumexp",)]),)), "it has no 'logsumexp'"),
        (replace(QUERY, temperature=0.7), "temperature 0.7: .*temperature 1 whatever"),
        (replace(QUERY, merge_ids=((2, 3),)), "several ids count as one"),
    ],
)
def test_what_it_cannot_say_is_refused_before_anything_is_sent(
    server: JsonServer, query: Query, fault: str
) -> None:
    with pytest.raises(TeacherError, match=f"^teacher 'math' .sglang at .*{fault}"):
        endpoint(server).score(query)
    assert server.seen == []


# --------------------------------------------------------------------------------------------
# Refusals of the server, and tries


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(
    server: JsonServer, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.01)
    own = endpoint(server)
    own.describe()
    server.first = [(status, {"error": "busy"})] * 2
    assert difference(QUERY, own.score(QUERY)) <= 1e-5
    assert own.connection.traffic.retries == 2


def test_a_server_that_stays_broken_is_given_up(server: JsonServer) -> None:
    server.routes["/generate"] = lambda body: (500, {"error": "broken"})
    with pytest.raises(TeacherError, match=r"request 01234567 .* failed 1 times .*status 500"):
        endpoint(server, IMPATIENT).score(QUERY)


def test_a_refusal_is_told_with_the_servers_words(server: JsonServer) -> None:
    words = "The input (99 tokens) is longer than the model's context length (64 tokens)."
    server.routes["/generate"] = lambda body: (400, {"error": {"message": words}})
    with pytest.raises(TeacherError, match=r"^teacher 'math'.*status 400: .*is longer than"):
        endpoint(server).score(QUERY)


# --------------------------------------------------------------------------------------------
# Replies that are wrong


Alter = Callable[[dict[str, Any]], Any]


def put(name: str, value: Any, *path: int) -> Alter:
    """Set a member of what is said of the first sequence, or what stands at a path in it."""

    def alter(meta: dict[str, Any]) -> None:
        if not path:
            meta[name] = value
            return
        inside = meta[name]
        for step in path[:-1]:
            inside = inside[step]
        inside[path[-1]] = value

    return alter


def drop(name: str, *path: int) -> Alter:
    def alter(meta: dict[str, Any]) -> None:
        if not path:
            del meta[name]
            return
        inside = meta[name]
        for step in path[:-1]:
            inside = inside[step]
        del inside[path[-1]]

    return alter


def both(*alters: Alter) -> Alter:
    def alter(meta: dict[str, Any]) -> None:
        for one in alters:
            one(meta)

    return alter


OWN, TOPS, CHOSEN = "input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"

# of the first sequence of QUERY, entry 0 is the prompt's last token, entry 1 response token 0
ANY_FORM: dict[str, tuple[Alter, str]] = {
    "null in the middle": (put(OWN, None, 1, 0), r"log-probability of response token 0 .* is null"),
    "NaN": (put(OWN, float("nan"), 1, 0), "log-probability of response token 0 .* is nan"),
    "positive": (put(OWN, 0.5, 1, 0), "sampled_logp is above 0"),
    "a text": (put(OWN, "-1", 1, 0), "log-probability of response token 0 .* is '-1'"),
    "entry is a number": (put(OWN, -1.0, 1), r"is -1\.0, not \[log-probability, id, text\]"),
    "a position less": (drop(OWN, 2), "input_token_logprobs: 5 entries, not 6"),
    "all positions": (put(OWN, [[None, 1, None]] * 11), "11 entries, not 6"),
    "no positions": (drop(OWN), "input_token_logprobs of the answer is null"),
    "another token": (
        put(OWN, 6, 2, 1),
        "token 6 at position 7 of the sequence, where 5 was sent",
    ),
    "a token as 0": (put(OWN, 0, 2, 1), "token 0 at position 7 of the sequence, where 5 was sent"),
    "aborted": (
        put("finish_reason", {"type": "abort", "message": "out of memory"}),
        "the server gave up: out of memory",
    ),
    "other weights": (put("weight_version", "step-8"), "answers with the weights 'step-8'"),
}


def altered(alter: Alter) -> Callable[[Any], Any]:
    def change(said: Any) -> Any:
        if isinstance(said, list):
            alter(said[0]["meta_info"])
        return said

    return change


@pytest.mark.parametrize("fault", ANY_FORM)
def test_a_wrong_reply_is_refused_with_its_place(server: JsonServer, fault: str) -> None:
    alter, words = ANY_FORM[fault]
    server.alter = altered(alter)
    with pytest.raises(
        TeacherError, match=rf"^teacher 'math'.*request 01234567 .*sequence 0: .*{words}"
    ):
        endpoint(server).score(QUERY)


FLAT = "input_top_logprobs_val_flat"
IN_FORM: dict[str, tuple[str, Alter, str]] = {
    "row is null": ("nested", put(TOPS, None, 1), "nothing of the 3 likeliest at response token 0"),
    "row is short": ("nested", drop(TOPS, 2, 1), "2 tokens of the 3 likeliest at response token 1"),
    "row is missing": ("nested", drop(TOPS, 2), "input_top_logprobs: 5 entries, not 6"),
    "none at all": ("nested", drop(TOPS), "input_top_logprobs of the answer is null"),
    "value is null": ("nested", put(TOPS, None, 1, 0, 0), "log-probability of token 23 .* is null"),
    "id is null": ("nested", put(TOPS, None, 1, 0, 1), "None is no token id"),
    "id twice": ("nested", put(TOPS, 23, 1, 1, 1), "names a token twice"),
    "id negative": ("nested", put(TOPS, -1, 1, 1, 1), "a token that there is not"),
    "mass": ("nested", put(TOPS, -0.01, 1, 1, 0), "mass of more than 1"),
    "apart": ("nested", put(TOPS, -2.5, 1, 0, 0), "disagree on the same token"),
    "flat null": ("flat", put(FLAT, None, 0), "top_logp is NaN"),
    "flat text": ("flat", put(FLAT, "x", 0), "is no array"),
    "flat short": ("flat", drop(FLAT, 0), "val_flat has 14 numbers, not 15"),
    "flat none": ("flat", drop(FLAT), "input_top_logprobs_val_flat of the answer is null"),
    "shape": ("flat", put(TOPS + "_shape", [4, 3]), r"shape \[4, 3\] after 1 .* not \[5, 3\]"),
    "other k": ("flat", put(TOPS + "_shape", [5, 2]), r"shape \[5, 2\]"),
    "shape of text": ("flat", put(TOPS + "_shape", ["5", 3]), "shape"),
    "two nulls": ("flat", put(TOPS + "_null_prefix", 2), "after 2 positions without values"),
    "no nulls": ("flat", drop(TOPS + "_null_prefix"), "null_prefix of the answer is null"),
    "binary junk": ("binary", put(FLAT + "_b64", "@@"), "is no array"),
    "binary short": ("binary", put(FLAT + "_b64", b64(np.zeros(14, np.float32))), "14 numbers"),
    "binary torn": ("binary", put(FLAT + "_b64", b64(np.zeros(15, np.int8))), "is no array"),
    "binary NaN": ("binary", put(FLAT + "_b64", b64(np.full(15, np.nan, "f4"))), "top_logp is NaN"),
    "binary wide": (
        "binary",
        both(
            put(FLAT + "_b64", b64(np.zeros(15, np.float64))),
            put(FLAT + "_b64_dtype", "float64"),
        ),
        "30 numbers, not 15",
    ),
}


@pytest.mark.parametrize("fault", IN_FORM)
def test_wrong_likeliest_tokens_are_refused_in_every_form(
    server: JsonServer, sglang: Sglang, fault: str
) -> None:
    sglang.form, alter, words = IN_FORM[fault]
    server.alter = altered(alter)
    with pytest.raises(TeacherError, match=f"sequence 0: .*{words}"):
        endpoint(server).score(QUERY)


@pytest.mark.parametrize(
    ("alter", "fault"),
    [
        (drop(CHOSEN), "input_token_ids_logprobs of the answer is null"),
        (drop(CHOSEN, 1), "input_token_ids_logprobs: 4 entries, not 5"),
        (put(CHOSEN, None, 1), "no chosen id is scored at response token 0"),
        (drop(CHOSEN, 1, 0), "the chosen ids at response token 0 .*: 2 entries, not 3"),
        (put(CHOSEN, 9, 1, 0, 1), "token 9 is scored at response token 0 .* where 5 was sent"),
        (put(CHOSEN, None, 1, 0, 0), "log-probability of token 5 at response token 0 .* is null"),
        (put(CHOSEN, 0.5, 1, 0, 0), "ids_logp is above 0"),
    ],
)
def test_wrong_scores_of_chosen_ids_are_refused(
    server: JsonServer, alter: Alter, fault: str
) -> None:
    server.alter = altered(alter)
    with pytest.raises(TeacherError, match=f"sequence 0: .*{fault}"):
        endpoint(server).score(IDS_QUERY)


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (b"<html>busy</html>", "the reply is no JSON .*<html>busy"),
        ({"meta_info": {}}, "the reply is no list of answers"),
        ([], "the reply: 0 entries, not 3"),
        ([[], [], []], "sequence 0: the answer is .*no object"),
    ],
)
def test_what_is_no_reply_is_refused(server: JsonServer, reply: Any, fault: str) -> None:
    own = endpoint(server)
    own.describe()
    server.first = [(200, reply)]
    with pytest.raises(TeacherError, match=f"^teacher 'math'.*request 01234567 .*{fault}"):
        own.score(QUERY)

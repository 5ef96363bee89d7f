"""vLLM's prompt log-probabilities: against a model, against faults, against recorded replies."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.errors import ConfigError, TeacherError
from opd.teacher import connection
from opd.teacher.connection import ConnectionSettings
from opd.teacher.query import Query
from opd.teacher.vllm_endpoint import ROUTES, VllmEndpoint
from tests.teacher.json_servers import (
    BOTH,
    IMPATIENT,
    NOTHING,
    PATIENT,
    QUERY,
    SAMPLED,
    SEQUENCES,
    TOP,
    JsonServer,
    Reply,
    asked,
    difference,
    expected,
    log_probs,
    serving,
)

CAP, LONGEST = 20, 64
COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"
PATHS = {"completions": COMPLETIONS, "generate": GENERATE}

IDS_QUERY = Query(
    (
        asked(
            [1, 13, 5],
            [9, 20, 3, 4],
            [("ids",), NOTHING, (*BOTH, "ids"), SAMPLED],
            [[5, 6], [7, 5]],
        ),
        asked([1], [8, 7], [("ids", "sampled"), ("ids",)], [[52, 0], [0, 8]]),
        asked([1, 2, 3], [4], [BOTH]),
    ),
    top_k=2,
)


# --------------------------------------------------------------------------------------------
# vLLM, as far as it is asked here


def refusal(message: str, status: int = 400) -> Reply:
    return status, {"error": {"message": message, "type": "BadRequestError", "code": status}}


def prompt_logprobs(tokens: list[int], k: int) -> list[Any]:
    """The token itself first, under its own rank; then the k likeliest, which replace it."""
    rows = log_probs(tokens)
    found: list[Any] = [None]
    for row, token in zip(rows[:-1], tokens[1:], strict=True):
        own = {"logprob": float(row[token]), "rank": int((row >= row[token]).sum())}
        entries = {str(token): own}
        values, ids = row.topk(k)
        for rank, (value, other) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), 1):
            entries[str(other)] = {"logprob": value, "rank": rank}
        found.append({key: {**entry, "decoded_token": "x"} for key, entry in entries.items()})
    return found


def complete(body: Any) -> Reply:
    assert (body["max_tokens"], body["temperature"]) == (1, 1.0)
    if body["model"] != "math":
        return refusal(f"The model `{body['model']}` does not exist. Valid aliases: math.", 404)
    k = body["prompt_logprobs"]
    if k > CAP:
        return refusal(
            f"Requested prompt logprobs of {k}, which is greater than max allowed: {CAP} "
            f"(parameter=prompt_logprobs, value={k})"
        )
    if max(map(len, body["prompt"])) >= LONGEST:
        return refusal("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)")
    choices = [
        {
            "index": index,
            "text": "0",
            "token_ids": [3],
            "prompt_logprobs": prompt_logprobs(tokens, k),
            "prompt_token_ids": tokens if body.get("return_token_ids") else None,
        }
        for index, tokens in enumerate(body["prompt"])
    ]
    return 200, {"object": "text_completion", "model": "math", "choices": choices}


def generate(body: Any) -> Reply:
    wanted, tokens = body["sampling_params"], body["token_ids"]
    assert wanted.get("prompt_logprobs", 0) <= CAP
    scores = None
    if (ids := wanted.get("prompt_logprob_token_ids")) is not None:
        start = wanted["prompt_logprob_start"]
        width = max(map(len, ids))
        if width > CAP:
            return refusal(
                f"Requested {width} token ids per row in prompt_logprob_token_ids, which is "
                f"greater than max allowed: {CAP}. Set max_logprobs (--max-logprobs)"
            )
        rows = log_probs(tokens)[start:-1].float().numpy()
        assert len(ids) == len(rows)
        array = np.full((len(ids), width), -np.inf, np.float32)
        for place, own in enumerate(ids):
            for column, token in enumerate(own):
                array[place, column] = rows[place, token] if token >= 0 else -np.inf
        data = io.BytesIO()
        np.save(data, array)
        scores = base64.b64encode(data.getvalue()).decode()
    told = "prompt_logprobs" in wanted
    return 200, {
        "prompt_logprobs": prompt_logprobs(tokens, wanted["prompt_logprobs"]) if told else None,
        "prompt_token_id_logprobs": scores,
        "prompt_token_ids": tokens if body["return_token_ids"] else None,
        "choices": [{"index": 0, "token_ids": [3]}],
    }


def models(body: Any) -> Reply:
    listed = [{"id": "other", "max_model_len": 8}, {"id": "math", "max_model_len": LONGEST}]
    return 200, {"object": "list", "data": listed}


@pytest.fixture
def server() -> Iterator[JsonServer]:
    with serving() as served:
        served.routes = {"/v1/models": models, COMPLETIONS: complete, GENERATE: generate}
        yield served


def endpoint(
    server: JsonServer,
    route: str = "completions",
    settings: ConnectionSettings = PATIENT,
    *,
    model: str = "math",
) -> VllmEndpoint:
    return server.client(VllmEndpoint("math", server.url, model, settings, route=route))


# --------------------------------------------------------------------------------------------
# What it says


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_answers_are_the_models_own_numbers(server: JsonServer, route: str, top_k: int) -> None:
    query = replace(QUERY, top_k=top_k)
    assert difference(query, endpoint(server, route).score(query)) <= 1e-6


@pytest.mark.parametrize("route", ROUTES)
def test_one_number_per_token_is_asked_for_where_no_more_are_wanted(
    server: JsonServer, route: str
) -> None:
    query = Query((asked([1, 13, 5], [9, 20], [SAMPLED, SAMPLED]),), top_k=7)
    assert difference(query, endpoint(server, route).score(query)) <= 1e-6
    (body,) = server.asked(PATHS[route])
    assert body.get("sampling_params", body)["prompt_logprobs"] == 0


def test_all_sequences_go_in_one_request_up_to_the_last_token_that_is_asked_about(
    server: JsonServer,
) -> None:
    endpoint(server).score(QUERY)
    (body,) = server.asked(COMPLETIONS)
    assert [len(tokens) for tokens in body["prompt"]] == [11, 4, 9]


def test_a_query_that_asks_nothing_sends_nothing(server: JsonServer) -> None:
    (answer,) = endpoint(server).score(Query((SEQUENCES[2],)))
    assert answer.values == {}
    assert server.seen == []


def test_choices_are_taken_by_their_index(server: JsonServer) -> None:
    def turned(said: Any) -> Any:
        return {**said, "choices": said["choices"][::-1]}

    server.alter = turned
    assert difference(QUERY, endpoint(server).score(QUERY)) <= 1e-6


def test_generate_scores_other_ids_at_every_token(server: JsonServer) -> None:
    assert difference(IDS_QUERY, endpoint(server, "generate").score(IDS_QUERY)) <= 1e-6
    sent = {len(body["token_ids"]): body["sampling_params"] for body in server.asked(GENERATE)}
    assert sent[7]["prompt_logprob_token_ids"] == [[5, 6], [-1], [7, 5], [-1]]
    assert [sent[7]["prompt_logprob_start"], sent[3]["prompt_logprob_start"]] == [2, 0]


def test_ids_alone_come_back_without_the_likeliest_tokens(server: JsonServer) -> None:
    query = Query((asked([1, 13], [9, 20], [("ids",), ("ids",)], [[5], [6]]),))
    assert difference(query, endpoint(server, "generate").score(query)) <= 1e-6
    assert "prompt_logprobs" not in server.asked(GENERATE)[0]["sampling_params"]


def test_vllms_word_for_minus_infinity_is_no_log_probability(server: JsonServer) -> None:
    query = Query((asked([1, 13], [9], [BOTH]),), top_k=2)
    server.alter = at(2, with_logprob(-9999.0, 2))
    with pytest.raises(TeacherError, match="top_logp says that there is no mass at all in row 0"):
        endpoint(server).score(query)


@pytest.mark.parametrize("own_first", [True, False])
def test_a_token_that_ties_with_a_likelier_one_does_not_take_its_place(
    server: JsonServer, own_first: bool
) -> None:
    query = Query((asked([1, 13], [9], [BOTH]),), top_k=2)
    likeliest = expected(query)[0]["top_ids"][0].tolist()

    def alter(said: Any) -> Any:
        entries = said["choices"][0]["prompt_logprobs"][2]
        last = next(entry for entry in entries.values() if entry["rank"] == 2)
        entries["9"] = {**last}
        if not own_first:
            entries["9"] = entries.pop("9")
        return said

    server.alter = alter
    (answer,) = endpoint(server).score(query)
    assert answer.values["top_ids"][0].tolist() == likeliest
    assert answer.values["sampled_logp"][0] == answer.values["top_logp"][0, 1]


def test_describe_says_what_fits_beside_the_token_that_is_generated(server: JsonServer) -> None:
    described = endpoint(server).describe()
    assert (described.model, described.max_tokens) == ("math", LONGEST - 1)
    assert described.extra["max_model_len"] == LONGEST
    fits = asked([1] * 40, [2] * 23, [SAMPLED] * 23)
    query = Query((fits,))
    assert difference(query, endpoint(server).score(query)) <= 1e-6


def test_without_a_name_the_first_model_is_asked(server: JsonServer) -> None:
    nameless = endpoint(server, model="")
    assert nameless.describe().model == "other"
    with pytest.raises(TeacherError, match=r"set teacher\.served_name to what it serves.*`other`"):
        nameless.score(QUERY)


def test_an_address_may_end_with_the_version_of_the_routes(server: JsonServer) -> None:
    own = server.client(VllmEndpoint("math", server.url + "/v1/", "math", PATIENT))
    assert own.name == f"teacher 'math' (vllm at {server.url})"
    assert difference(QUERY, own.score(QUERY)) <= 1e-6


def test_a_key_travels_in_its_header(server: JsonServer) -> None:
    endpoint(server, settings=IMPATIENT).describe()
    assert server.keys == ["Bearer secret"]


# --------------------------------------------------------------------------------------------
# What it cannot say


@pytest.mark.parametrize("route", ROUTES)
def test_limits_give_a_reason_and_a_way_out_for_all_that_is_missing(
    server: JsonServer, route: str
) -> None:
    limits = endpoint(server, route).limits
    lacking = {"logsumexp", "entropy", "hidden", "temperature", "merge_ids"}
    lacking |= {"ids"} if route == "completions" else set()
    assert limits.why_not.keys() == lacking
    assert limits.temperature is limits.merge_ids is False
    assert all("opd serve" in why for why in limits.why_not.values())


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        (IDS_QUERY, "it has no 'ids'.*teacher.protocol to 'vllm-generate'"),
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
    with pytest.raises(TeacherError, match=f"^teacher 'math' .vllm at .*{fault}"):
        endpoint(server).score(query)
    assert server.seen == []


def test_a_route_that_there_is_not_is_refused(server: JsonServer) -> None:
    with pytest.raises(ConfigError, match="no route 'chat'"):
        VllmEndpoint("math", server.url, "math", PATIENT, route="chat")


# --------------------------------------------------------------------------------------------
# Refusals of the server, and tries


def test_more_than_the_cap_is_told_with_the_flag_that_lifts_it(server: JsonServer) -> None:
    with pytest.raises(
        TeacherError,
        match=r"request 01234567 .*21 .*at most 20; start vLLM with --max-logprobs 21",
    ):
        endpoint(server).score(replace(QUERY, top_k=21))


def test_more_ids_than_the_cap_are_told_with_the_flag_that_lifts_it(server: JsonServer) -> None:
    query = Query((asked([1], [2], [("ids",)], [list(range(CAP + 1))]),))
    with pytest.raises(TeacherError, match=r"at most 20 chosen ids .*--max-logprobs"):
        endpoint(server, "generate").score(query)


def test_a_sequence_that_fills_the_context_is_told_as_that(server: JsonServer) -> None:
    query = Query((asked([1] * 40, [2] * 24, [SAMPLED] * 24),))
    with pytest.raises(TeacherError, match=r"64 tokens leaves no room .*--max-model-len"):
        endpoint(server).score(query)


@pytest.mark.parametrize(
    ("status", "text", "fault"),
    [
        (403, "Restart vllm serve with --enable-scale-out", "start vLLM with --enable-scale-out"),
        (
            400,
            "prompt_logprob_token_ids requires the V2 model runner",
            "VLLM_USE_V2_MODEL_RUNNER=1",
        ),
        (401, "Unauthorized", "teacher.key_env"),
        (400, "something else", "refused with status 400.*something else"),
    ],
)
def test_refusals_are_told_with_what_lifts_them(
    server: JsonServer, status: int, text: str, fault: str
) -> None:
    server.first = [refusal(text, status)] * 3
    with pytest.raises(TeacherError, match=f"^teacher 'math'.*{fault}"):
        endpoint(server, "generate").score(QUERY)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(
    server: JsonServer, route: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.01)
    server.first = [refusal("busy", status)] * 2
    own = endpoint(server, route)
    assert difference(QUERY, own.score(QUERY)) <= 1e-6
    assert own.connection.traffic.retries == 2


def test_a_server_that_stays_broken_is_given_up(server: JsonServer) -> None:
    server.first = [refusal("broken", 500)] * 9
    with pytest.raises(TeacherError, match=r"request 01234567 .* failed 1 times .*status 500"):
        endpoint(server, settings=IMPATIENT).score(QUERY)


def test_a_model_that_is_not_served_is_told(server: JsonServer) -> None:
    mistyped = endpoint(server, model="maths")
    with pytest.raises(TeacherError, match=r"serves no model 'maths'\. Did you mean 'math'"):
        mistyped.describe()
    with pytest.raises(TeacherError, match=r"teacher\.served_name .*Valid aliases: math"):
        mistyped.score(QUERY)


# --------------------------------------------------------------------------------------------
# Replies that are wrong

Alter = Callable[[Any], Any]


def at(place: int, change: Callable[[dict[str, Any]], Any]) -> Alter:
    """Change what is said of one position of the first sequence."""

    def alter(said: Any) -> Any:
        rows = (said["choices"][0] if "text" in said["choices"][0] else said)["prompt_logprobs"]
        rows[place] = change(rows[place])
        return said

    return alter


def choice(**changes: Any) -> Alter:
    """Change members of the first choice, or leave them out where they are `...`."""

    def alter(said: Any) -> Any:
        said["choices"][0] = {
            name: value
            for name, value in (said["choices"][0] | changes).items()
            if value is not ...
        }
        return said

    return alter


def without_rank(rank: int) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {key: entry for key, entry in row.items() if entry["rank"] != rank}


def with_logprob(value: Any, rank: int = 1) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {
        key: {**entry, "logprob": value} if entry["rank"] == rank else entry
        for key, entry in row.items()
    }


def with_rank(value: Any, rank: int = 1) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {
        key: {**entry, "rank": value} if entry["rank"] == rank else entry
        for key, entry in row.items()
    }


def cut(said: Any) -> Any:
    del said["choices"][0]["prompt_logprobs"][3]
    return said


# the first sequence: a prompt of 6 tokens, and then position 6 is response token 0
HERE = r"sequence 0: .*response token 0 \(position 6 of the sequence\)"
FAULTS: dict[str, tuple[Alter, str]] = {
    "null in the middle": (at(6, lambda row: None), "sequence 0: nothing is said of " + HERE[13:]),
    "rank missing": (
        at(10, without_rank(2)),
        r"the token of rank 2 is missing at response token 4 \(position 10 of the sequence\)",
    ),
    "two ranks missing": (at(6, lambda row: dict([*row.items()][:2])), "2 log-probabilities"),
    "own token missing": (
        at(6, lambda row: {key: entry for key, entry in row.items() if key != "23"}),
        "response token 0 .* itself is missing",
    ),
    "one entry too many": (
        at(6, lambda row: {**row, "50": {"logprob": -50.0, "rank": 50}, "51": row["23"]}),
        "log-probabilities for response token 0",
    ),
    "rank twice": (at(10, with_rank(1, 3)), "two tokens have rank 1"),
    "rank beyond": (at(7, with_rank(9, 3)), "the token of rank 3 is missing"),
    "rank is null": (at(6, with_rank(None)), "rank of token .* is null"),
    "key is no id": (
        at(
            6, lambda row: {"x" if entry["rank"] == 3 else key: entry for key, entry in row.items()}
        ),
        "'x' is no token id",
    ),
    "logprob null": (at(6, with_logprob(None)), "log-probability of token .* is null"),
    "logprob a text": (at(6, with_logprob("-1")), "log-probability of token .* is '-1'"),
    "logprob true": (at(6, with_logprob(True)), "log-probability of token .* is True"),
    "logprob NaN": (at(6, with_logprob(float("nan"))), "log-probability of token .* is nan"),
    "logprob positive": (at(6, with_logprob(0.5)), "is above 0"),
    "mass above one": (at(6, with_logprob(-0.01, 2)), "mass of more than 1"),
    "entry is no object": (at(6, lambda row: dict.fromkeys(row, -1.0)), "is -1.0, no object"),
    "a position less": (cut, r"prompt_logprobs: 10 entries, not 11"),
    "no positions": (choice(prompt_logprobs=None), "prompt_logprobs of the answer is null"),
    "other tokens": (
        choice(prompt_token_ids=[1, 13, 5, 9, 20, 3, 23, 5, 6, 44, 2]),
        "prompt_token_ids has 6 at position 8, where 5 was sent",
    ),
    "fewer tokens": (choice(prompt_token_ids=[1, 13]), "prompt_token_ids: 2 entries, not 11"),
    "no tokens": (choice(prompt_token_ids=...), "older vLLMs"),
    "a choice less": (lambda said: {"choices": said["choices"][1:]}, "2 entries, not 3"),
    "a choice twice": (choice(index=1), "2 entries, not 3"),
    "another index": (choice(index=7), "no choice for prompt 0"),
    "no index": (choice(index=...), "index of a choice is null"),
    "no choices": (lambda said: {}, "choices of the reply is null"),
    "a list": (lambda said: [said], "the reply is .*no object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_reply_is_refused_with_its_place(server: JsonServer, fault: str) -> None:
    server.alter, words = FAULTS[fault]
    with pytest.raises(TeacherError, match=rf"^teacher 'math'.*request 01234567 .*{words}"):
        endpoint(server).score(QUERY)


def only_the_longest(alter: Alter) -> Alter:
    return lambda said: alter(said) if len(said["prompt_token_ids"]) == 11 else said


@pytest.mark.parametrize(
    "fault", ["null in the middle", "rank missing", "logprob NaN", "own token missing"]
)
def test_both_routes_are_read_by_the_same_rules(server: JsonServer, fault: str) -> None:
    alter, words = FAULTS[fault]
    server.alter = only_the_longest(alter)
    with pytest.raises(TeacherError, match=words):
        endpoint(server, "generate").score(QUERY)


def npy(array: Any) -> str:
    data = io.BytesIO()
    np.save(data, np.asarray(array))
    return base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        (None, "prompt_token_id_logprobs .*which vLLM has since 0.32, is null"),
        ("@@@", "no array"),
        (base64.b64encode(b"junk").decode(), "no array"),
        (npy(np.zeros((1, 2), np.float32)), r"shape \[1, 2\], not \[2, 2\]"),
        (npy(np.zeros((2, 2), np.int32)), "shape"),
        (npy(np.full((2, 2), np.nan, np.float32)), "ids_logp is NaN"),
        (npy(np.full((2, 2), 0.5, np.float32)), "ids_logp is above 0"),
    ],
)
def test_wrong_scores_of_chosen_ids_are_refused(
    server: JsonServer, scores: Any, fault: str
) -> None:
    query = Query((asked([1], [8, 7], [("ids",), ("ids",)], [[52, 0], [0, 8]]),))
    server.alter = lambda said: {**said, "prompt_token_id_logprobs": scores}
    with pytest.raises(TeacherError, match=f"sequence 0: .*{fault}"):
        endpoint(server, "generate").score(query)


def test_what_is_no_json_is_refused(server: JsonServer) -> None:
    server.first = [(200, b"<html>busy</html>")]
    with pytest.raises(TeacherError, match=r"^teacher 'math'.*the reply is no JSON .*<html>busy"):
        endpoint(server).score(QUERY)


# --------------------------------------------------------------------------------------------
# Against vLLM itself

RECORDED = Path(__file__).parent / "recorded"


def replaying(server: JsonServer, name: str) -> None:
    """Answer as vLLM did, where the request is the one that it was sent."""
    exchanges = json.loads((RECORDED / f"{name}.json").read_text())["exchanges"]

    def reply(path: str) -> Callable[[Any], Reply]:
        def answer(body: Any) -> Reply:
            for exchange in exchanges:
                if (exchange["path"], exchange["request"]) == (path, body):
                    return exchange["status"], exchange["reply"]
            return 418, f"no such request was recorded: {body}"

        return answer

    server.routes = {exchange["path"]: reply(exchange["path"]) for exchange in exchanges}


@pytest.mark.parametrize("route", ROUTES)
def test_recorded_replies_of_vllm_are_the_models_own_numbers(
    server: JsonServer, route: str
) -> None:
    replaying(server, f"vllm_{route}")
    own = endpoint(server, route, model="sort-teacher")
    assert own.describe().max_tokens == 255
    assert difference(QUERY, own.score(QUERY)) <= 2e-5
    with pytest.raises(TeacherError, match=r"at most 20; start vLLM with --max-logprobs 21"):
        own.score(Query(SEQUENCES[:1], top_k=21))


def random_query(count: int, top_k: int) -> Query:
    generator = torch.Generator().manual_seed(0)

    def draw(below: int, size: int) -> list[int]:
        return torch.randint(below, (size,), generator=generator).tolist()

    sequences = []
    for _ in range(count):
        length = 1 + draw(150, 1)[0]
        want = [(BOTH, SAMPLED, TOP, NOTHING)[kind] for kind in draw(4, length)]
        sequences.append(asked(draw(53, 1 + draw(60, 1)[0]), draw(53, length), want))
    return Query(tuple(sequences), top_k=top_k)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_a_real_vllm_gives_the_models_own_numbers(route: str) -> None:
    """OPD_VLLM_URL: a server of `builtin:sort-teacher` in float32, with --enable-scale-out."""
    url = os.environ.get("OPD_VLLM_URL")
    if not url:
        pytest.skip("OPD_VLLM_URL names no vLLM that serves builtin:sort-teacher")
    own = VllmEndpoint("math", url, "", PATIENT, route=route)
    query = random_query(16, 20)
    assert difference(query, own.score(query)) <= 1e-4
    with pytest.raises(TeacherError, match="start vLLM with --max-logprobs"):
        own.score(random_query(1, 53))
    own.close()

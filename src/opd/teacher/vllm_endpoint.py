"""A teacher behind vLLM's server, as it is."""

from __future__ import annotations

import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from opd.errors import ConfigError, TeacherError, nearest
from opd.teacher.connection import Connection, ConnectionSettings, RefusedError, naming
from opd.teacher.json_answers import (
    COMPLETIONS,
    Scored,
    answered,
    ask,
    asked_about,
    choices_of,
    described_model,
    in_order,
    member,
    models_of,
    number,
    of_length,
    refuse_what_it_lacks,
    reply_limit,
    same_tokens,
    sent,
    without_version,
)
from opd.teacher.query import Answer, AnswerError, Asked, Described, Limits, Query

ROUTES = ("completions", "generate")
GENERATE = "/inference/v1/generate"
MINUS_INFINITY = -9999.0
"""What vLLM writes for a log-probability of minus infinity, which JSON lacks."""
MOST_AT_ONCE = 64
"""Requests of one query that are under way at once over the route that takes one sequence."""

_SERVE = "serve this teacher with `opd serve`"
_WHY_NOT = {
    "logsumexp": f"vLLM returns log-probabilities and not their normaliser; {_SERVE}",
    "entropy": f"vLLM returns no entropy, and the likeliest tokens do not give it; {_SERVE}",
    "hidden": f"vLLM returns no hidden states; {_SERVE}",
    "temperature": "vLLM's prompt_logprobs are those of temperature 1 whatever is asked for; set "
    f"the teacher's temperature to 1, or {_SERVE}",
    "merge_ids": "vLLM scores single ids, and the likeliest of them do not give the mass of a "
    f"group; {_SERVE}",
}
_NO_IDS = (
    "/v1/completions scores a prompt's own tokens and the teacher's likeliest ones; set "
    "teacher.protocol to 'vllm-generate' (vLLM 0.32 or later, with --enable-scale-out), or "
    f"{_SERVE}"
)


class VllmEndpoint:
    """The client of vLLM's prompt log-probabilities.

    Args:
        name: of the teacher, for messages.
        url: of the server, with or without `/v1`.
        model: as the server calls it; empty: the first that it lists.
        route: `completions`: any vLLM, all sequences of a query in one request. `generate`: one
            sequence per request, and ids chosen per position; needs --enable-scale-out.
    """

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        settings: ConnectionSettings,
        *,
        route: str = "completions",
    ) -> None:
        if route not in ROUTES:
            raise ConfigError(
                f"vLLM has no route {route!r} for a teacher. {nearest(route, ROUTES)}"
            )
        url = without_version(url)
        self.connection = Connection(f"teacher {name!r} (vllm at {url})", url, settings)
        self.model = model
        self.route = route
        self._described: Described | None = None

    @property
    def name(self) -> str:
        return self.connection.name

    @property
    def limits(self) -> Limits:
        wanted, why_not = {"sampled", "top"}, dict(_WHY_NOT)
        if self.route == "generate":
            wanted.add("ids")
        else:
            why_not["ids"] = _NO_IDS
        return Limits(frozenset(wanted), None, False, False, why_not)

    def head(self) -> None:
        return None

    def close(self) -> None:
        self.connection.close()

    def describe(self) -> Described:
        """What `/v1/models` says, asked once. It says nothing of the weights' revision."""
        if self._described is None:
            with naming(self.connection, "/v1/models"):
                self._described = described_model(models_of(self.connection), self.model)
        return self._described

    def score(self, query: Query) -> list[Answer]:
        """Answers in the order of the sequences; see `Endpoint.score`."""
        request = f"request {query.name[:8]} ({len(query.sequences)} sequences)"
        with naming(self.connection, request):
            refuse_what_it_lacks(query, self.limits)
            places = asked_about(query)
            sequences = [query.sequences[place] for place in places]
            if not sequences:
                return [Answer("", {}) for _ in query.sequences]
            try:
                if self.route == "generate":
                    return self._generate(query, places, sequences, request)
                return self._complete(query, places, sequences, request)
            except RefusedError as error:
                words = _in_our_words(error, query)
                if not words:
                    raise
                raise TeacherError(words) from error

    def _complete(
        self, query: Query, places: list[int], sequences: list[Asked], request: str
    ) -> list[Answer]:
        prompts = [sent(asked) for asked in sequences]
        body = {
            "model": self.model or self.describe().model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": _columns(query),
            "return_token_ids": True,
        }
        limit = reply_limit(sum(map(len, prompts)), _columns(query) + 1)
        said = ask(self.connection, COMPLETIONS, body, limit=limit, request=request)
        choices = choices_of(said, len(prompts))

        def read(n: int) -> Answer:
            return _answer(sequences[n], query, prompts[n], choices[n], None)

        return in_order(query, places, read)

    def _generate(
        self, query: Query, places: list[int], sequences: list[Asked], request: str
    ) -> list[Answer]:
        """One request per sequence, several at once."""
        model = self.model or self.describe().model

        def one(asked: Asked) -> Any:
            tokens, ids = sent(asked), asked.ids
            wanted: dict[str, object] = {"max_tokens": 1, "temperature": 1.0, "detokenize": False}
            per_token = 2
            if asked.rows("sampled").any() or asked.rows("top").any():
                wanted["prompt_logprobs"] = _columns(query)
                per_token += _columns(query)
            if ids is not None and asked.rows("ids").any():
                wanted["prompt_logprob_token_ids"] = _ids_by_row(asked, len(tokens))
                wanted["prompt_logprob_start"] = len(asked.prompt) - 1
                per_token += ids.shape[1]
            body = {
                "model": model,
                "token_ids": tokens,
                "return_token_ids": True,
                "sampling_params": wanted,
            }
            limit = reply_limit(len(tokens), per_token)
            return ask(self.connection, GENERATE, body, limit=limit, request=request)

        at_once = max(1, min(len(sequences), MOST_AT_ONCE, self.connection.settings.concurrency))
        with ThreadPoolExecutor(at_once) as pool:
            replies = [pool.submit(one, asked) for asked in sequences]
            try:
                said = [reply.result() for reply in replies]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        def read(n: int) -> Answer:
            asked, tokens, scores = sequences[n], sent(sequences[n]), None
            if asked.ids is not None and asked.rows("ids").any():
                rows = len(tokens) - len(asked.prompt)
                scores = _chosen(said[n], (rows, asked.ids.shape[1]))
            return _answer(asked, query, tokens, said[n], scores)

        return in_order(query, places, read)


def _columns(query: Query) -> int:
    """How many of its likeliest tokens the teacher is asked for."""
    return query.top_k if query.wants("top") else 0


def _in_our_words(error: RefusedError, query: Query) -> str:
    """A refusal with the flag that lifts it; empty where the server's own words say it best."""
    cap = re.search(r"greater than max allowed: (\d+)", error.text)
    if cap and "token ids per row" in error.text:
        return (
            f"it scores at most {cap[1]} chosen ids per position; start vLLM with "
            "--max-logprobs set to as many as the objective's support has"
        )
    if cap:
        return (
            f"{query.top_k} of its likeliest tokens are wanted, and it gives at most {cap[1]}; "
            f"start vLLM with --max-logprobs {query.top_k}, or lower the support's k to {cap[1]}"
        )
    if "V2 model runner" in error.text:
        return (
            "it scores chosen ids only with its newer model runner; start vLLM with "
            f"VLLM_USE_V2_MODEL_RUNNER=1, or {_SERVE}"
        )
    if "max_tokens must be at least 1" in error.text:
        longest = max(len(sent(query.sequences[place])) for place in asked_about(query))
        return (
            f"a sequence of {longest} tokens leaves no room for the one that vLLM generates after "
            "it; start vLLM with a larger --max-model-len, or shorten prompts or responses"
        )
    if error.status == 404 and "does not exist" in error.text:
        return f"set teacher.served_name to what it serves: {error.text}"
    if error.status in (403, 404) and "scale-out" in error.text:
        return (
            f"{GENERATE} is off; start vLLM with --enable-scale-out, or set teacher.protocol "
            "to 'vllm'"
        )
    return ""


def _answer(
    asked: Asked, query: Query, tokens: list[int], said: dict[str, Any], ids: np.ndarray | None
) -> Answer:
    """The answer in a choice of `/v1/completions`, or in a reply of `/inference/v1/generate`."""
    told = member(said, "prompt_token_ids", list, "the answer, which older vLLMs leave out,")
    same_tokens(told, tokens, "prompt_token_ids")
    first, columns = len(asked.prompt), _columns(query)
    rows: list[Any] = []
    if asked.rows("sampled").any() or asked.rows("top").any():
        rows = member(said, "prompt_logprobs", list, "the answer")
        of_length(rows, len(tokens), "prompt_logprobs")

    def read(place: int) -> Scored:
        scored = ids[place].tolist() if ids is not None else ()
        if not rows:
            return Scored(ids=scored)
        where = f"response token {place} (position {first + place} of the sequence)"
        sampled, top = _of_position(rows[first + place], tokens[first + place], columns, where)
        return Scored(sampled, top, scored)

    return answered(asked, query, read)


def _of_position(
    entries: object, token: int, columns: int, where: str
) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of the token itself, and the likeliest tokens by rank.

    The token itself stands beside the likeliest ones: there are as many entries as were asked
    for, or one more.
    """
    if not isinstance(entries, dict):
        raise AnswerError(f"nothing is said of {where}")
    if str(token) not in entries:
        raise AnswerError(f"the log-probability of {where} itself is missing")
    if len(entries) not in (columns, columns + 1):
        raise AnswerError(
            f"{len(entries)} log-probabilities for {where}, not {columns} or {columns + 1}"
        )
    own, sampled = str(token), np.nan
    by_rank: dict[int, tuple[int, float]] = {}
    for key, said in entries.items():
        if not key.isdecimal():
            raise AnswerError(f"{key!r} is no token id, at {where}")
        logp = number(member(said, "logprob", object, where), f"token {key} at {where}")
        logp = -np.inf if logp == MINUS_INFINITY else logp
        rank = member(said, "rank", int, f"token {key} at {where}")
        if key == own:
            sampled = logp
        if rank in by_rank and key == own:
            continue  # a tie: the likeliest ones are numbered, the token's own rank is counted
        if rank in by_rank and by_rank[rank][0] != token:
            raise AnswerError(f"two tokens have rank {rank} at {where}")
        by_rank[rank] = (int(key), logp)
    for rank in range(1, columns + 1):
        if rank not in by_rank:
            raise AnswerError(f"the token of rank {rank} is missing at {where}")
    return sampled, [by_rank[rank] for rank in range(1, columns + 1)]


def _ids_by_row(asked: Asked, length: int) -> list[list[int]]:
    """Ids per response token that is sent; -1 where none are asked for."""
    assert asked.ids is not None
    rows = [[-1] for _ in range(length - len(asked.prompt))]
    for place, ids in zip(asked.rows("ids").nonzero()[:, 0].tolist(), asked.ids, strict=True):
        rows[place] = [int(token) for token in ids.tolist()]
    return rows


def _chosen(said: object, shape: tuple[int, int]) -> np.ndarray:
    """Log-probabilities of chosen ids, a row per response token that was sent.

    Raises:
        AnswerError: there are none, or others.
    """
    text = member(said, "prompt_token_id_logprobs", str, "the answer, which vLLM has since 0.32,")
    try:
        data = io.BytesIO(base64.b64decode(text, validate=True))
        values: np.ndarray = np.load(data, allow_pickle=False)
    except ValueError as error:
        raise AnswerError(f"prompt_token_id_logprobs is no array: {error}") from None
    if values.shape != shape or values.dtype.kind != "f":
        raise AnswerError(
            f"prompt_token_id_logprobs has the shape {list(values.shape)}, not {list(shape)}"
        )
    return values

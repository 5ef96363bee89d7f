"""A teacher behind SGLang's server, over its own route."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from opd.errors import TeacherError
from opd.teacher.connection import (
    Connection,
    ConnectionSettings,
    RefusedError,
    as_json,
    naming,
    whole,
)
from opd.teacher.json_answers import (
    MOST_INFO_BYTES,
    Scored,
    answered,
    ask,
    asked_about,
    described_model,
    in_order,
    member,
    models_of,
    number,
    of_length,
    refuse_what_it_lacks,
    reply_limit,
    sent,
    without_version,
)
from opd.teacher.query import Answer, AnswerError, Asked, Described, Limits, Query

GENERATE = "/generate"
INFO, OLD_INFO = "/model_info", "/get_model_info"

_SERVE = "serve this teacher with `opd serve`"
_WHY_NOT = {
    "logsumexp": f"SGLang returns log-probabilities and not their normaliser; {_SERVE}",
    "entropy": f"SGLang returns no entropy, and the likeliest tokens do not give it; {_SERVE}",
    "hidden": "SGLang writes hidden states as JSON numbers, which no run can afford, and hands "
    f"out no unembedding; {_SERVE}",
    "temperature": "SGLang's log-probabilities of input tokens are those of temperature 1 "
    f"whatever is asked for; set the teacher's temperature to 1, or {_SERVE}",
    "merge_ids": "SGLang scores single ids, and the likeliest of them do not give the mass of a "
    f"group; {_SERVE}",
}


class SglangEndpoint:
    """The client of SGLang's input log-probabilities.

    Chosen ids are scored by sending all that a sequence asks about anywhere, since SGLang scores
    the same ids at every position; what is not asked for is dropped again.

    Args:
        name: of the teacher, for messages.
        url: of the server, with or without `/v1`.
        most_union_ids: refuse a sequence that asks about more different ids than this; the reply
            has as many numbers for every token.
    """

    def __init__(
        self, name: str, url: str, settings: ConnectionSettings, *, most_union_ids: int = 4096
    ) -> None:
        url = without_version(url)
        self.connection = Connection(f"teacher {name!r} (sglang at {url})", url, settings)
        self.most_union_ids = most_union_ids
        self._described: Described | None = None

    @property
    def name(self) -> str:
        return self.connection.name

    @property
    def limits(self) -> Limits:
        return Limits(frozenset({"sampled", "top", "ids"}), None, False, False, _WHY_NOT)

    def head(self) -> None:
        return None

    def close(self) -> None:
        self.connection.close()

    def describe(self) -> Described:
        """What `/v1/models` and `/model_info` say, asked once."""
        if self._described is None:
            with naming(self.connection, INFO):
                model = described_model(models_of(self.connection), "")
                try:
                    info = as_json(self.connection.get(INFO, whole(MOST_INFO_BYTES)))
                except RefusedError as error:
                    if error.status != 404:
                        raise
                    info = as_json(self.connection.get(OLD_INFO, whole(MOST_INFO_BYTES)))
                if not isinstance(info, dict):
                    raise TeacherError("it says nothing of its model")
                self._described = Described(
                    model=model.model,
                    revision=_revision(info),
                    max_tokens=model.max_tokens,
                    extra={**model.extra, **info},
                )
        return self._described

    def score(self, query: Query) -> list[Answer]:
        """Answers in the order of the sequences; see `Endpoint.score`."""
        request = f"request {query.name[:8]} ({len(query.sequences)} sequences)"
        with naming(self.connection, request):
            refuse_what_it_lacks(query, self.limits)
            revision, places = self.describe().revision, asked_about(query)
            if not places:
                return [Answer(revision, {}) for _ in query.sequences]
            sequences = [query.sequences[place] for place in places]
            tokens = [sent(asked) for asked in sequences]
            unions = [self._union(place, query.sequences[place]) for place in places]
            body: dict[str, object] = {
                "input_ids": tokens,
                "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                "return_logprob": True,
                # the first position that is returned has no value
                "logprob_start_len": [len(asked.prompt) - 1 for asked in sequences],
            }
            columns = query.top_k if query.wants("top") else 0
            if columns:
                body["top_logprobs_num"] = columns
                # a server that knows these replies in binary, another ignores them
                body["return_flat_raw_top_logprobs"] = True
                body["return_flat_raw_top_logprobs_b64"] = True
            if any(unions):
                # where one sequence has a list every one needs one, and a list is not empty
                body["token_ids_logprob"] = [
                    union or own[:1] for union, own in zip(unions, tokens, strict=True)
                ]
            per_token = columns + max(map(len, unions)) + 1
            limit = reply_limit(sum(map(len, tokens)), per_token)
            said = ask(self.connection, GENERATE, body, limit=limit, request=request)
            try:
                if not isinstance(said, list):
                    raise AnswerError(f"the reply is no list of answers: {str(said)[:80]}")
                of_length(said, len(tokens), "the reply")
            except AnswerError as error:
                raise TeacherError(str(error)) from error

            def read(n: int) -> Answer:
                meta = member(said[n], "meta_info", dict, "the answer")
                _check_whose(meta, revision)
                scores = _scores(meta, sequences[n], tokens[n], columns, unions[n])
                return answered(sequences[n], query, scores, revision=revision)

            return in_order(query, places, read, revision=revision)

    def _union(self, place: int, asked: Asked) -> list[int]:
        """All ids that a sequence asks about, in ascending order."""
        if asked.ids is None or not asked.rows("ids").any():
            return []
        union = sorted({int(token) for token in asked.ids.flatten().tolist()})
        if len(union) > self.most_union_ids:
            raise TeacherError(
                f"sequence {place} asks about {len(union)} different ids, more than "
                f"most_union_ids = {self.most_union_ids}, and SGLang scores all of them at each "
                f"of its {len(asked.response)} tokens; `opd serve` scores other ids at every "
                "token: serve this teacher with it, or lower the support's k"
            )
        return union


def _revision(said: dict[str, Any]) -> str:
    """What the operator called the weights; `default` is SGLang's word for nothing."""
    version = said.get("weight_version")
    return "" if version in (None, "default") else str(version)


def _check_whose(meta: dict[str, Any], revision: str) -> None:
    """Refuse an answer that was broken off, or one of other weights."""
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        raise AnswerError(f"the server gave up: {finish.get('message')}")
    if _revision(meta) != revision:
        raise AnswerError(
            f"it answers with the weights {_revision(meta)!r} and was asked as {revision!r}: "
            "another model, or changed weights; restart the run to train against that one"
        )


def _scores(
    meta: dict[str, Any], asked: Asked, tokens: list[int], columns: int, union: list[int]
) -> Callable[[int], Scored]:
    """What the answer says of each response token.

    Its positions are those from the prompt's last token on, and that one has no values.

    Raises:
        AnswerError: there are other positions, or other tokens.
    """
    positions = len(tokens) - len(asked.prompt) + 1
    own = of_length(
        member(meta, "input_token_logprobs", list, "the answer"), positions, "input_token_logprobs"
    )
    told = [_pair(entry, "input_token_logprobs")[1] for entry in own]
    _check_tokens(told, tokens[-positions:], len(asked.prompt) - 1)
    top = _top(meta, positions, columns) if columns else []
    chosen: list[Any] = []
    if union:
        chosen = member(meta, "input_token_ids_logprobs", list, "the answer")
        of_length(chosen, positions, "input_token_ids_logprobs")
    rows = iter(()) if asked.ids is None else iter(asked.ids.tolist())
    column = {token: n for n, token in enumerate(union)}
    ids_of = dict(zip(asked.rows("ids").nonzero()[:, 0].tolist(), rows, strict=False))

    def read(place: int) -> Scored:
        where = f"response token {place} (position {len(asked.prompt) + place} of the sequence)"
        sampled = number(_pair(own[place + 1], where)[0], where)
        likeliest = top[place] if columns else ()
        if place not in ids_of:
            return Scored(sampled, likeliest)
        return Scored(sampled, likeliest, _picked(chosen[place + 1], ids_of[place], column, where))

    return read


def _pair(entry: object, where: str) -> tuple[object, object]:
    """Log-probability and token id of an entry `[logp, id, text]`."""
    if not isinstance(entry, list) or len(entry) < 2:
        raise AnswerError(f"an entry of {where} is {entry!r}, not [log-probability, id, text]")
    return entry[0], entry[1]


def _check_tokens(told: list[object], tokens: list[int], first: int) -> None:
    """Refuse an answer about other tokens than were sent, the first of them at `first`.

    SGLang writes 0 for the last id of its vocabulary, so a 0 may stand where an id was sent that
    is above all that came back as themselves.
    """
    pairs = list(zip(told, tokens, strict=True))
    largest = max((ours for its, ours in pairs if its == ours), default=0)
    for place, (its, ours) in enumerate(pairs, first):
        if its != ours and not (its == 0 and ours > largest):
            raise AnswerError(
                f"input_token_logprobs has token {its} at position {place} of the sequence, "
                f"where {ours} was sent"
            )


def _picked(entries: object, ids: list[int], column: Mapping[int, int], where: str) -> list[float]:
    """Log-probabilities of some of the ids that were sent, at one position."""
    if not isinstance(entries, list):
        raise AnswerError(f"no chosen id is scored at {where}")
    of_length(entries, len(column), f"the chosen ids at {where}")
    picked = []
    for token in ids:
        logp, told = _pair(entries[column[token]], where)
        if told != token:
            raise AnswerError(f"token {told} is scored at {where}, where {token} was sent")
        picked.append(number(logp, f"token {token} at {where}"))
    return picked


# --------------------------------------------------------------------------------------------
# The likeliest tokens, in the three forms that SGLang has for them


def _top(meta: dict[str, Any], positions: int, columns: int) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of every response token that was sent.

    Raises:
        AnswerError: there are other positions, or fewer tokens.
    """
    if "input_top_logprobs_shape" in meta:
        return _flat_top(meta, positions, columns)
    rows = member(meta, "input_top_logprobs", list, "the answer")
    of_length(rows, positions, "input_top_logprobs")
    found = []
    for place, row in enumerate(rows[1:]):
        where = f"response token {place}"
        if not isinstance(row, list) or len(row) != columns:
            said = "nothing" if not isinstance(row, list) else f"{len(row)} tokens"
            raise AnswerError(f"{said} of the {columns} likeliest at {where}")
        pairs = [_pair(entry, where) for entry in row]
        found.append(
            [
                (_token(token, where), number(logp, f"token {token} at {where}"))
                for logp, token in pairs
            ]
        )
    return found


def _token(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise AnswerError(f"{value!r} is no token id, at {where}")
    return value


def _flat_top(meta: dict[str, Any], positions: int, columns: int) -> list[list[tuple[int, float]]]:
    """As one array of values and one of ids, without the leading positions that have none."""
    nulls = member(meta, "input_top_logprobs_null_prefix", int, "the answer")
    shape = member(meta, "input_top_logprobs_shape", list, "the answer")
    if nulls != 1 or shape != [positions - 1, columns]:
        raise AnswerError(
            f"input_top_logprobs has the shape {shape} after {nulls} positions without values, "
            f"not {[positions - 1, columns]} after 1"
        )
    logp = _flat(meta, "input_top_logprobs_val_flat", "<f4").reshape(shape)
    ids = _flat(meta, "input_top_logprobs_idx_flat", "<i4").reshape(shape)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), logp.tolist(), strict=True)]


def _flat(meta: dict[str, Any], name: str, dtype: str) -> np.ndarray:
    count = int(np.prod(meta["input_top_logprobs_shape"]))
    try:
        if f"{name}_b64" in meta:
            text = member(meta, f"{name}_b64", str, "the answer")
            values = np.frombuffer(base64.b64decode(text, validate=True), dtype)
        else:
            values = np.array(member(meta, name, list, "the answer"), dtype)
    except (ValueError, TypeError) as error:
        raise AnswerError(f"{name} is no array of {dtype}: {error}") from None
    if values.shape != (count,):
        raise AnswerError(f"{name} has {values.size} numbers, not {count}")
    return values

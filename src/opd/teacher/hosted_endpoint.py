"""A teacher behind a hosted service with OpenAI's routes."""

from __future__ import annotations

from typing import Any

from opd.errors import ConfigError, TeacherError
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

ECHOES = ("", "text", "ids")
MOST_TOP = 20
PREFIX = "token_id:"

_SERVE = "serve the teacher's weights with `opd serve`, vLLM or SGLang"
_NO_ECHO = (
    "hosted services score the tokens that they generate and not those of a student, so they "
    f"cannot judge its text; {_SERVE}. Where the service's /v1/completions returns log-probs of a "
    "prompt with `echo`, set teacher.protocol to 'hosted-echo', or to 'hosted-echo-ids' if it also "
    "takes `return_tokens_as_token_ids`"
)
_TEXT = (
    "the service names tokens by their text, which several tokens share; set "
    f"teacher.protocol to 'hosted-echo-ids' if it takes `return_tokens_as_token_ids`, or {_SERVE}"
)
_LACKS = f"hosted services return log-probs of a few likely tokens and nothing else; {_SERVE}"


class HostedEndpoint:
    """The client of `/v1/completions` with `echo`, for the services that still have it.

    Most have not, and then nothing can be asked. Those that have score the tokens of a prompt,
    and name tokens by their text; what was scored is compared with what was sent only where
    they also say the ids.

    Args:
        name: of the teacher, for messages.
        url: of the service, with or without `/v1`.
        model: as the service calls it.
        echo: empty: the service scores what it generates only. `text`: it scores a prompt with
            `echo`. `ids`: it also takes `return_tokens_as_token_ids`.
    """

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        settings: ConnectionSettings,
        *,
        echo: str = "",
    ) -> None:
        if echo not in ECHOES:
            raise ConfigError(f"echo is '', 'text' or 'ids', got {echo!r}")
        url = without_version(url)
        self.connection = Connection(f"teacher {name!r} (hosted at {url})", url, settings)
        self.model = model
        self.echo = echo

    @property
    def name(self) -> str:
        return self.connection.name

    @property
    def limits(self) -> Limits:
        wanted = {"": (), "text": ("sampled",), "ids": ("sampled", "top")}[self.echo]
        why_not = dict.fromkeys(("ids", "logsumexp", "entropy", "hidden"), _LACKS)
        why_not["sampled"], why_not["top"] = _NO_ECHO, _TEXT if self.echo else _NO_ECHO
        why_not["top_k"] = f"lower the support's k, or {_SERVE}"
        why_not["temperature"] = f"hosted services score at temperature 1; set it to 1, or {_SERVE}"
        why_not["merge_ids"] = _LACKS
        return Limits(frozenset(wanted), MOST_TOP, False, False, why_not)

    def head(self) -> None:
        return None

    def close(self) -> None:
        self.connection.close()

    def describe(self) -> Described:
        """What `/v1/models` says of the model; little where it is not listed."""
        with naming(self.connection, "/v1/models"):
            models = models_of(self.connection)
            return described_model(models if self.model in models else {self.model: {}}, self.model)

    def score(self, query: Query) -> list[Answer]:
        """Answers in the order of the sequences; see `Endpoint.score`."""
        request = f"request {query.name[:8]} ({len(query.sequences)} sequences)"
        with naming(self.connection, request):
            refuse_what_it_lacks(query, self.limits)
            places = asked_about(query)
            if not places:
                return [Answer("", {}) for _ in query.sequences]
            sequences = [query.sequences[place] for place in places]
            prompts = [sent(asked) for asked in sequences]
            columns = query.top_k if query.wants("top") else 0
            body: dict[str, object] = {
                "model": self.model,
                "prompt": prompts,
                "max_tokens": 0,
                "temperature": 1.0,
                "echo": True,
                "logprobs": max(columns, 1),  # some take 0 for none at all
            }
            if self.echo == "ids":
                body["return_tokens_as_token_ids"] = True
            limit = reply_limit(sum(map(len, prompts)), columns + 2)
            try:
                said = ask(self.connection, COMPLETIONS, body, limit=limit, request=request)
            except RefusedError as error:
                if "echo" in error.text.lower():
                    raise TeacherError(f"it refuses `echo` ({error.text}): {_NO_ECHO}") from error
                raise
            choices = choices_of(said, len(prompts))

            def read(n: int) -> Answer:
                return self._answer(sequences[n], query, prompts[n], choices[n], columns)

            return in_order(query, places, read)

    def _answer(
        self, asked: Asked, query: Query, tokens: list[int], choice: dict[str, Any], columns: int
    ) -> Answer:
        said = member(choice, "logprobs", dict, "the answer")
        texts = of_length(member(said, "tokens", list, "logprobs"), len(tokens), "tokens")
        if self.echo == "ids":
            same_tokens([_token(text, "tokens") for text in texts], tokens, "tokens")
        elif "token_ids" in said:
            same_tokens(member(said, "token_ids", list, "logprobs"), tokens, "token_ids")
        sampled = member(said, "token_logprobs", list, "logprobs")
        of_length(sampled, len(tokens), "token_logprobs")
        top: list[Any] = []
        if columns:
            top = member(said, "top_logprobs", list, "logprobs")
            of_length(top, len(tokens), "top_logprobs")
        first = len(asked.prompt)

        def read(place: int) -> Scored:
            where = f"response token {place} (position {first + place} of the sequence)"
            own = number(sampled[first + place], where)
            if not columns:
                return Scored(own)
            return Scored(
                own, _likeliest(top[first + place], tokens[first + place], columns, where)
            )

        return answered(asked, query, read)


def _token(text: object, where: str) -> int:
    """The id in `token_id:41`.

    Raises:
        AnswerError: it is a text, which says little of the token: several may share it.
    """
    if not isinstance(text, str) or not text.startswith(PREFIX):
        raise AnswerError(
            f"{where} names a token by its text, {text!r}, and not by its id: the service does "
            "not take return_tokens_as_token_ids; set teacher.protocol to 'hosted-echo'"
        )
    try:
        return int(text.removeprefix(PREFIX))
    except ValueError:
        raise AnswerError(f"{where} names a token {text!r}") from None


def _likeliest(entries: object, token: int, columns: int, where: str) -> list[tuple[int, float]]:
    """The likeliest tokens in order; the token itself may stand beside them."""
    if not isinstance(entries, dict):
        raise AnswerError(f"nothing is said of the likeliest tokens at {where}")
    pairs = [
        (_token(key, where), number(logp, f"{key} at {where}")) for key, logp in entries.items()
    ]
    pairs.sort(key=lambda pair: (-pair[1], pair[0] == token))
    if len(pairs) == columns + 1 and pairs[-1][0] == token:
        pairs.pop()
    if len(pairs) != columns:
        raise AnswerError(f"{len(pairs)} tokens, not the {columns} likeliest, at {where}")
    return pairs

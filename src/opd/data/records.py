"""From records (rows of a file, items of a list) to encoded prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from opd.data.chat import (
    Ids,
    Message,
    check_conversation,
    check_messages,
    encode_chat_with_mask,
    encode_pairs,
    encode_prompts,
    encode_rendered,
    render_chat,
)
from opd.data.settings import PromptSettings
from opd.errors import DataError
from opd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedRecords", "Record", "encode_records"]

Record = Mapping[str, Any]
MODEL_INPUTS_COLUMN = "model_inputs"
TOOLS_COLUMN = "tools"


class EncodedRecords(NamedTuple):
    """Prompts in the records' order, and how many records were left out, by cause."""

    prompts: tuple[Prompt, ...]
    skipped_empty: int
    skipped_long: int


@dataclass(frozen=True)
class _Draft:
    """A record whose columns have been told apart, not yet encoded. Either text or messages."""

    where: str
    text: str
    messages: tuple[Message, ...]
    response: str | tuple[Message, ...] | None
    tools: Sequence[Record] | None
    answer: str | None
    columns: Record
    model_inputs: Record
    response_text: str | None

    @property
    def is_empty(self) -> bool:
        has_content = any(m.get("content") or m.get("tool_calls") for m in self.messages)
        return not (has_content or self.text.strip())


def encode_records(
    records: Iterable[tuple[str, object]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings,
    eos_ids: Collection[int] = (),
) -> EncodedRecords:
    """Encode records as `settings` says.

    Args:
        records: (place, record) pairs; the place becomes the prompt's id. A record is a mapping
            from columns to values, or a prompt's text alone.

    Raises:
        ConfigError: the tokenizer lacks a chat template or an end token that is needed.
        DataError: a record that cannot be used; the message begins with its place.
    """
    drafts = [_draft(where, record, settings) for where, record in records]
    if settings.bad_prompts == "error":
        _refuse_empty(drafts)
    full = [draft for draft in drafts if not draft.is_empty]
    prompts = _Encoder(tokenizer, settings, eos_ids).encode(full)
    limit = settings.max_prompt_tokens
    if settings.bad_prompts == "error":
        _refuse_long(prompts, limit)
    fitting = [p for p in prompts if limit is None or len(p.prompt_ids) <= limit]
    return EncodedRecords(
        tuple(fitting),
        skipped_empty=len(drafts) - len(full),
        skipped_long=len(prompts) - len(fitting),
    )


def _refuse_empty(drafts: Sequence[_Draft]) -> None:
    for draft in drafts:
        if draft.is_empty:
            raise DataError(
                f"{draft.where}: the prompt is empty; fill it, or set data.bad_prompts = 'skip'"
            )


def _refuse_long(prompts: Sequence[Prompt], limit: int | None) -> None:
    for prompt in prompts:
        if limit is not None and len(prompt.prompt_ids) > limit:
            raise DataError(
                f"{prompt.id}: the prompt has {len(prompt.prompt_ids)} tokens, more than "
                f"max_prompt_tokens = {limit}; raise that, or set data.bad_prompts = 'skip'"
            )


def _draft(where: str, record: object, settings: PromptSettings) -> _Draft:
    """Tell the columns of one record apart."""
    if isinstance(record, str):
        record = {settings.prompt_column: record}
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a record must be an object with columns, got {kind_of(record)}")
    column = _prompt_column(where, record, settings)
    text, messages = _text_or_messages(where, column, record[column])
    if messages:
        with _located(where):
            check_conversation(messages)
    response = None
    if settings.with_responses and record.get(settings.response_column) is not None:
        given = record[settings.response_column]
        as_text, as_messages = _text_or_messages(where, settings.response_column, given)
        response = as_messages or as_text
    if settings.as_chat and text.strip():
        text, messages = "", ({"role": "user", "content": text},)
    answer = record.get(settings.answer_column)
    is_scalar = isinstance(answer, str | int | float)
    read = {MODEL_INPUTS_COLUMN, settings.response_column}
    read |= set() if messages else {column}
    read |= {settings.answer_column} if is_scalar else set()
    return _Draft(
        where,
        text,
        messages,
        response,
        tools=record.get(TOOLS_COLUMN) or None,
        answer=str(answer) if is_scalar else None,
        columns={name: value for name, value in record.items() if name not in read},
        model_inputs=_model_inputs(where, record),
        response_text=_response_text(messages, record.get(settings.response_column)),
    )


def _response_text(messages: tuple[Message, ...], given: object) -> str | None:
    """The response as one text: its column's, or what the only message after the prompt says."""
    if isinstance(given, str):
        return given
    if isinstance(given, list | tuple):
        rest = tuple(given)
    else:
        rest = _divide(messages, None)[1] if messages else ()
    said = rest[0].get("content") if len(rest) == 1 and isinstance(rest[0], Mapping) else None
    return said if isinstance(said, str) else None


def _prompt_column(where: str, record: Record, settings: PromptSettings) -> str:
    candidates = (settings.prompt_column, settings.messages_column)
    present = [column for column in candidates if column in record]
    if not present:
        raise DataError(
            f"{where}: neither a column {candidates[0]!r} nor {candidates[1]!r}; there are: "
            f"{', '.join(record) or 'none'}. Set prompt_column to the one that holds the prompt"
        )
    return next((column for column in present if record[column] is not None), present[0])


def _text_or_messages(where: str, column: str, value: object) -> tuple[str, tuple[Message, ...]]:
    if value is None:
        return "", ()
    if isinstance(value, str):
        return value, ()
    if isinstance(value, list | tuple):
        with _located(where):
            check_messages(value)
        return "", tuple(value)
    raise DataError(
        f"{where}: column {column!r} must hold a text or a list of chat messages, "
        f"got {kind_of(value)}"
    )


def _model_inputs(where: str, record: Record) -> Record:
    value = record.get(MODEL_INPUTS_COLUMN)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where}: column {MODEL_INPUTS_COLUMN!r} must map names of the model's inputs to "
            f"values, got {kind_of(value)}"
        )
    return value


class _Encoder:
    """Drafts to prompts."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: PromptSettings,
        eos_ids: Collection[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.eos_ids = eos_ids

    def encode(self, drafts: Sequence[_Draft]) -> list[Prompt]:
        """Encode drafts in their order."""
        plain = iter(self.plain([draft for draft in drafts if not draft.messages]))
        return [self.chat(draft) if draft.messages else next(plain) for draft in drafts]

    def plain(self, drafts: Sequence[_Draft]) -> list[Prompt]:
        """Encode plain prompts together; one by one if some cannot be, to say which."""
        try:
            return self._plain(drafts)
        except DataError:
            for draft in drafts:
                with _located(draft.where):
                    self._plain([draft])
            raise

    def _plain(self, drafts: Sequence[_Draft]) -> list[Prompt]:
        alone = [draft for draft in drafts if draft.response is None]
        paired = [draft for draft in drafts if draft.response is not None]
        alone_ids = iter(encode_prompts([draft.text for draft in alone], self.tokenizer))
        pairs = encode_pairs(
            [draft.text for draft in paired],
            [_plain_response(draft) for draft in paired],
            self.tokenizer,
            eos_ids=self.eos_ids,
        )
        paired_ids = iter(zip(*pairs, strict=True))
        prompts = []
        for draft in drafts:
            if draft.response is None:
                prompts.append(_prompt(draft, draft.text, next(alone_ids)))
            else:
                ids, response = next(paired_ids)
                mask = (True,) * len(response)
                prompts.append(_prompt(draft, draft.text, ids, response, mask))
        return prompts

    def chat(self, draft: _Draft) -> Prompt:
        """Encode chat messages, with the response if they contain one."""
        prompt, response = _divide(draft.messages, draft.response)
        how: dict[str, Any] = {
            "chat_template_kwargs": self.settings.chat_template_kwargs,
            "tools": draft.tools,
        }
        with _located(draft.where):
            text = render_chat(prompt, self.tokenizer, add_generation_prompt=True, **how)
            if not (response and self.settings.with_responses):
                return _prompt(draft, text, encode_rendered(text, self.tokenizer))
            encoded = encode_chat_with_mask(
                (*prompt, *response),
                self.tokenizer,
                prompt_messages=len(prompt),
                eos_ids=self.eos_ids,
                **how,
            )
            return _prompt(draft, text, *encoded)


def _divide(
    messages: tuple[Message, ...], response: str | tuple[Message, ...] | None
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The messages of the prompt and those of the response."""
    if isinstance(response, str):
        return messages, ({"role": "assistant", "content": response},)
    if response is not None:
        return messages, response
    if messages[-1]["role"] != "assistant":
        return messages, ()
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:first], messages[first:]


def _plain_response(draft: _Draft) -> str:
    if not isinstance(draft.response, str):
        raise DataError(
            "the response is a list of messages, but the prompt is plain text; "
            "give both as text or both as messages, or set data.as_chat = true"
        )
    return draft.response


def _prompt(
    draft: _Draft,
    text: str,
    prompt_ids: Ids,
    response_ids: Ids | None = None,
    response_mask: tuple[bool, ...] | None = None,
) -> Prompt:
    return Prompt(
        id=draft.where,
        prompt_ids=prompt_ids,
        text=text,
        answer=draft.answer,
        response_ids=response_ids,
        response_mask=response_mask,
        columns=draft.columns,
        model_inputs=draft.model_inputs,
        messages=_divide(draft.messages, draft.response)[0] if draft.messages else (),
        response_text=draft.response_text,
    )


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Puts the record's place in front of a message."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def kind_of(value: object) -> str:
    """A value's type and beginning, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"

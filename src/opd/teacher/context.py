"""What a view with privileged context reads in place of the prompt.

A context is a template, "{prompt} Hint: {answer}", or the name of a data column. It changes the
prompt alone: the response tokens that follow are the student's own, row for row.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd.data.chat import Ids, Message
from opd.data.records import encode_records
from opd.data.settings import PromptSettings
from opd.errors import ConfigError, DataError
from opd.types import Prompt

PROMPT, ANSWER, RESPONSE = "prompt", "answer", "response"


def context_fields(context: str) -> tuple[str, ...]:
    """What a context reads of a record, in order: `prompt`, `answer`, `response` or columns.

    Raises:
        ConfigError: a template that is not well formed, or that asks for more than plain names.
    """
    if _is_column(context):
        return (context,)
    names = []
    try:
        for _, name, form, conversion in string.Formatter().parse(context):
            if name is None:
                continue
            if not name or form or conversion or set(name) & set(".[]"):
                raise ValueError("a place is the plain name of a column in braces, {answer}")
            names.append(name)
    except ValueError as error:
        raise ConfigError(
            f"context = {context!r}: {error}; write a brace that is text twice, {{{{ or }}}}"
        ) from None
    return tuple(names)


@dataclass(frozen=True)
class ContextEncoder:
    """Renders and encodes privileged prompts as the prompts themselves were.

    A chat keeps its messages and its template: what the template makes takes the place of the last
    user message. A column that holds chat messages is the whole chat.

    Args:
        tokenizer: the student's.
        settings: how the run's records became prompts.
    """

    tokenizer: Any
    settings: PromptSettings

    def encode(self, prompts: Sequence[Prompt], context: str) -> list[Ids]:
        """Token ids of what the view reads before each response.

        Raises:
            DataError: a record without what the context asks for; names record and column.
        """
        records = [(prompt.id, self.record(prompt, context)) for prompt in prompts]
        settings = replace(
            self.settings,
            with_responses=False,
            as_chat=False,
            max_prompt_tokens=None,
            bad_prompts="error",
        )
        encoded = encode_records(records, tokenizer=self.tokenizer, settings=settings)
        return [prompt.prompt_ids for prompt in encoded.prompts]

    def record(self, prompt: Prompt, context: str) -> Mapping[str, Any]:
        """The record of a privileged prompt."""
        if _is_column(context):
            written = _column(prompt, context, context)
            if isinstance(written, list | tuple):
                return self._record(prompt, written)
        else:
            values = {name: _value(prompt, name, context) for name in context_fields(context)}
            written = context.format_map(values)
        if not isinstance(written, str):
            raise _not_a_text(prompt, context, context, written)
        return self._record(prompt, _with_last_turn(prompt, written) or written)

    def _record(self, prompt: Prompt, content: object) -> Mapping[str, Any]:
        tools = prompt.columns.get("tools")
        return {self.settings.prompt_column: content, **({"tools": tools} if tools else {})}


def _is_column(context: str) -> bool:
    return "{" not in context and "}" not in context


def _with_last_turn(prompt: Prompt, text: str) -> list[Message]:
    """The chat with another text in its last user message; empty for a plain prompt."""
    if not prompt.messages:
        return []
    place = _last_user_message(prompt)
    messages = list(prompt.messages)
    messages[place] = {**messages[place], "content": text}
    return messages


def _last_user_message(prompt: Prompt) -> int:
    users = [i for i, message in enumerate(prompt.messages) if message["role"] == "user"]
    if not users:
        raise DataError(
            f"{prompt.id}: a context takes the place of the last user message, and there is none"
        )
    return users[-1]


def _value(prompt: Prompt, name: str, context: str) -> str:
    if name == PROMPT:
        if not prompt.messages:
            return prompt.text
        value: Any = prompt.messages[_last_user_message(prompt)].get("content")
    elif name == ANSWER and prompt.answer is not None:
        value = prompt.answer
    elif name == RESPONSE and prompt.response_text is not None:
        value = prompt.response_text
    else:
        value = _column(prompt, name, context)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _not_a_text(prompt, name, context, value)
    return str(value)


def _column(prompt: Prompt, name: str, context: str) -> Any:
    value = prompt.columns.get(name)
    if value is None:
        raise DataError(
            f"{prompt.id}: the context {context!r} reads the column {name!r}, which this record "
            f"lacks; there are: {', '.join(_there(prompt))}. Fill it in every record, or change "
            "the context"
        )
    return value


def _there(prompt: Prompt) -> Collection[str]:
    names = [PROMPT]
    names += [ANSWER] if prompt.answer is not None else []
    names += [RESPONSE] if prompt.response_text is not None else []
    return dict.fromkeys([*names, *(n for n, v in prompt.columns.items() if v is not None)])


def _not_a_text(prompt: Prompt, name: str, context: str, value: object) -> DataError:
    return DataError(
        f"{prompt.id}: the context {context!r} reads {name!r}, which must hold a text or a number, "
        f"got {type(value).__name__}"
    )

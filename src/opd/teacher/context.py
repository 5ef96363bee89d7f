"""What a view with privileged context reads in place of the prompt.

A context is a template, "{prompt} Hint: {answer}", or the name of a data column. It changes the
prompt alone: the response tokens that follow are the student's own, row for row. Two places of a
template hold what only a rollout tells, `{sibling}` and `{feedback}`.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from opd.data.chat import Ids, Message
from opd.data.records import encode_records
from opd.data.settings import PromptSettings
from opd.data.thinking import generation_prompt, leaves_thinking_open
from opd.errors import ConfigError, DataError
from opd.types import PASS_MARK, Prompt, Rollout, TeacherView

PROMPT, ANSWER, RESPONSE = "prompt", "answer", "response"
SIBLING, FEEDBACK = "sibling", "feedback"

Told = Mapping[str, str]
"""What the places of a template hold that a rollout fills."""

NOTHING: Told = MappingProxyType({})

SYSTEM_ROLES = ("system", "developer")


def context_fields(context: str) -> tuple[str, ...]:
    """What a context reads, in order: `prompt`, `answer`, `response`, `sibling`, `feedback` or
    columns.

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


def after_rollout(context: str) -> tuple[str, ...]:
    """The places of a context that only a rollout fills."""
    if _is_column(context):
        return ()
    return tuple(name for name in (SIBLING, FEEDBACK) if name in context_fields(context))


def told_by_rollout(rollout: Rollout, tokenizer: Any, context: str) -> list[Told | None]:
    """What the places of a context that a rollout fills hold, by sequence.

    `{sibling}` is the text of the shortest right response of another sample of the same prompt,
    the first among equals: the least there is to read, the same for all samples of a prompt but
    the one itself, and no draw. `{feedback}` is the verifier's reason for its verdict on the
    response.

    Returns:
        None for a sequence that lacks one of them, or for which one is empty.
    """
    places = after_rollout(context)
    texts: dict[str, list[str]] = {}
    if SIBLING in places:
        texts[SIBLING] = _sibling_texts(rollout, tokenizer)
    if FEEDBACK in places:
        texts[FEEDBACK] = list(rollout.reasons) or [""] * len(rollout.prompt_ids)
    told = [{name: texts[name][b] for name in places} for b in range(len(rollout.prompt_ids))]
    return [each if all(text.strip() for text in each.values()) else None for each in told]


def siblings(rollout: Rollout) -> list[int | None]:
    """The sequence that is each one's `{sibling}`; None where no other sample is right."""
    lengths, groups = rollout.lengths.tolist(), rollout.group.tolist()
    right = (rollout.verdict >= PASS_MARK).tolist()
    by_group: dict[int, list[int]] = {}
    for b in sorted(range(len(groups)), key=lambda b: lengths[b]):
        says = lengths[b] > (rollout.stop_reason[b] == "eos")  # more than that it is over
        if right[b] and says:
            by_group.setdefault(groups[b], []).append(b)
    return [
        next((other for other in by_group.get(group, ()) if other != b), None)
        for b, group in enumerate(groups)
    ]


def _sibling_texts(rollout: Rollout, tokenizer: Any) -> list[str]:
    chosen = siblings(rollout)
    lengths = rollout.lengths.tolist()
    rows = sorted({b for b in chosen if b is not None})
    tokens = [rollout.tokens[b, : lengths[b]].tolist() for b in rows]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True) if rows else []
    text_of = dict(zip(rows, texts, strict=True))
    return ["" if b is None else text_of[b] for b in chosen]


@dataclass(frozen=True)
class ContextEncoder:
    """Renders and encodes privileged prompts as the prompts themselves were.

    A chat keeps its messages and its template: what the template makes takes the place of the last
    user message, or follows the system message where the view says so. A column that holds chat
    messages is the whole chat.

    Args:
        tokenizer: the student's.
        settings: how the run's records became prompts.
    """

    tokenizer: Any
    settings: PromptSettings

    def encode(
        self, prompts: Sequence[Prompt], view: TeacherView, told: Sequence[Told] = ()
    ) -> list[Ids]:
        """Token ids of what the view reads before each response, as of `read`."""
        return [prompt.prompt_ids for prompt in self.read(prompts, view, told)]

    def read(
        self, prompts: Sequence[Prompt], view: TeacherView, told: Sequence[Told] = ()
    ) -> tuple[Prompt, ...]:
        """What the view reads before each response, encoded.

        Args:
            told: by prompt, what a rollout tells, where the context asks for it.

        Raises:
            DataError: a record without what the context asks for; names record and column.
        """
        told = told or [NOTHING] * len(prompts)
        records = [
            (prompt.id, self.record(prompt, view, each))
            for prompt, each in zip(prompts, told, strict=True)
        ]
        settings = replace(
            self.settings,
            with_responses=False,
            as_chat=False,
            max_prompt_tokens=None,
            bad_prompts="error",
            chat_template_kwargs=self.template_kwargs(view),
        )
        return encode_records(records, tokenizer=self.tokenizer, settings=settings).prompts

    def template_kwargs(self, view: TeacherView) -> dict[str, Any]:
        """Variables of the chat template where the view reads."""
        return {**self.settings.chat_template_kwargs, **dict(view.chat_template_kwargs)}

    def record(self, prompt: Prompt, view: TeacherView, told: Told = NOTHING) -> Mapping[str, Any]:
        """The record of a privileged prompt."""
        context = view.context
        if view.chat_template_kwargs and not prompt.messages:
            raise _no_chat(prompt, view, "chat_template_kwargs are for a chat template")
        if _is_column(context):
            written = _column(prompt, context, context)
            if isinstance(written, list | tuple):
                if view.context_role != "user":
                    raise DataError(
                        f"{prompt.id}: the column {context!r} holds messages, which are the whole "
                        f"chat that the view {view.name!r} reads, so context_role = "
                        f"{view.context_role!r} has no place; leave it out"
                    )
                return self._record(prompt, written)
        else:
            values = {name: _value(prompt, name, context, told) for name in context_fields(context)}
            written = context.format_map(values)
        if not isinstance(written, str):
            raise _not_a_text(prompt, context, context, written)
        if view.context_role == "system":
            return self._record(prompt, _with_system(prompt, view, written))
        return self._record(prompt, _with_last_turn(prompt, written) or written)

    def check_thinking(self, prompts: Sequence[Prompt], view: TeacherView) -> None:
        """Refuse a context after which a response begins inside a block of thinking that its own
        prompt does not open, or outside one that it opens.

        Raises:
            ConfigError: names both endings, and the record.
        """
        told = [stand_in(prompt, view.context) for prompt in prompts]
        for own, read in zip(prompts, self.read(prompts, view, told), strict=True):
            ending = generation_prompt(own, self.tokenizer, self.settings.chat_template_kwargs)
            after = generation_prompt(read, self.tokenizer, self.template_kwargs(view))
            inside = leaves_thinking_open(own, ending)
            if inside != leaves_thinking_open(read, after):
                which = ("inside", "outside") if inside else ("outside", "inside")
                raise ConfigError(
                    f"{own.id}: the student's prompt ends {which[0]} a block of thinking, "
                    f"{ending!r}, and what the view {view.name!r} reads ends {which[1]} one, "
                    f"{after!r}, so the same response would be a thought to the one and an answer "
                    "to the other; "
                    + (
                        "set the view's chat_template_kwargs to those of data.chat_template_kwargs"
                        if own.messages
                        else "let the context end as the prompt does, with {prompt} last"
                    )
                )

    def _record(self, prompt: Prompt, content: object) -> Mapping[str, Any]:
        tools = prompt.columns.get("tools")
        return {self.settings.prompt_column: content, **({"tools": tools} if tools else {})}


def _is_column(context: str) -> bool:
    return "{" not in context and "}" not in context


def stand_in(prompt: Prompt, context: str) -> dict[str, str]:
    """What a rollout could tell a context, before there is one: a text that can be encoded."""
    places = after_rollout(context)
    users = [m.get("content") for m in prompt.messages if m["role"] == "user"]
    text = users[-1] if users else prompt.text
    return dict.fromkeys(places, text if isinstance(text, str) else prompt.text)


def _no_chat(prompt: Prompt, view: TeacherView, what: str) -> DataError:
    return DataError(
        f"{prompt.id}: {what}, which the view {view.name!r} asks for, and this prompt is plain "
        "text; set data.as_chat = true, or leave the setting out and write what is to be told into "
        "the context, '... {prompt}'"
    )


def _with_system(prompt: Prompt, view: TeacherView, text: str) -> list[Message]:
    """The chat with a text as its system message, after what an existing one says."""
    if not prompt.messages:
        raise _no_chat(prompt, view, "context_role = 'system' is a place in a chat")
    first, *others = prompt.messages
    if first["role"] not in SYSTEM_ROLES:
        return [{"role": "system", "content": text}, first, *others]
    said = first.get("content")
    if not isinstance(said, str):
        raise DataError(
            f"{prompt.id}: the view {view.name!r} adds to the system message, which must hold a "
            f"text, got {type(said).__name__}"
        )
    return [{**first, "content": f"{said}\n\n{text}"}, *others]


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


def _value(prompt: Prompt, name: str, context: str, told: Told) -> str:
    if name in (SIBLING, FEEDBACK):
        if prompt.columns.get(name) is not None:
            raise DataError(
                f"{prompt.id}: in the context {context!r} {{{name}}} is what the rollout tells, "
                f"and there is a column {name!r} as well; give the column another name"
            )
        return told[name]
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

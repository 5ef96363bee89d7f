"""Text and chat messages to token ids: special tokens exactly once, and who wrote which token.

A prompt is encoded as the sampler will see it. A response continues the prompt's own ids, ends
with exactly one end token, and carries a mask of the tokens the assistant wrote. Whether an id
also serves as padding never matters here: masks follow positions, not ids.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from opd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "EncodedChat",
    "Message",
    "check_conversation",
    "check_messages",
    "encode_chat_with_mask",
    "encode_pairs",
    "encode_prompts",
    "encode_rendered",
    "render_chat",
]

Message = Mapping[str, Any]
Ids = tuple[int, ...]

_NO_KWARGS: Mapping[str, Any] = {}
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class EncodedChat(NamedTuple):
    """A conversation cut where the assistant first speaks.

    Attributes:
        prompt_ids: everything before, the assistant's header included.
        response_ids: the rest: assistant turns and what lies between them, one end token last.
        response_mask: True where the assistant wrote the token, its end tokens included.
    """

    prompt_ids: Ids
    response_ids: Ids
    response_mask: tuple[bool, ...]


# --------------------------------------------------------------------------------------------
# Plain text


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Plain prompts with BOS in front exactly once and no end token.

    BOS is put in front wherever the tokenizer has one and does not add it: Transformers drops
    the setting that would tell a refusal from an omission (`add_bos_token`) on loading.

    Raises:
        DataError: a text the tokenizer cannot encode.
    """
    return _with_prefix(texts, _encode_all(texts, tokenizer), tokenizer)


def encode_pairs(
    prompt_texts: Sequence[str],
    response_texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: Collection[int] = (),
) -> tuple[list[Ids], list[Ids]]:
    """Plain prompts and their responses.

    A response is encoded as the continuation of its prompt. Where the tokenizer would merge
    across the border, the response is encoded alone, because a sampler starts after the prompt.

    Args:
        eos_ids: further ids that end a response; the tokenizer's own counts anyway.

    Raises:
        ConfigError: no end token is known.
        DataError: a text the tokenizer cannot encode.
    """
    prompts = _encode_all(prompt_texts, tokenizer)
    whole = _encode_all(
        [p + r for p, r in zip(prompt_texts, response_texts, strict=True)], tokenizer
    )
    responses = []
    for prompt, both, response_text in zip(prompts, whole, response_texts, strict=True):
        continues = both[: len(prompt)] == prompt
        response = both[len(prompt) :] if continues else _encode(response_text, tokenizer)
        responses.append(_ended(response, tokenizer, eos_ids))
    return _with_prefix(prompt_texts, prompts, tokenizer), responses


def _with_prefix(
    texts: Sequence[str], encoded: Sequence[Ids], tokenizer: PreTrainedTokenizerBase
) -> list[Ids]:
    if not texts:
        return []
    prefix = _prefix(texts[0], encoded[0], tokenizer)
    bos = (tokenizer.bos_token_id,)

    def joined(ids: Ids) -> Ids:
        written_in_the_text = prefix[-1:] == bos == ids[:1]
        return prefix[:-1] + ids if written_in_the_text else prefix + ids

    return [joined(ids) for ids in encoded]


def _prefix(text: str, encoded: Ids, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Special tokens in front of every plain prompt. What the tokenizer adds behind is left out."""
    decorated = tuple(tokenizer(text)["input_ids"])
    surplus = len(decorated) - len(encoded)
    begins = next(i for i in range(surplus + 1) if decorated[i : i + len(encoded)] == encoded)
    prefix = decorated[:begins]
    bos = tokenizer.bos_token_id
    return prefix if bos is None or bos in prefix else (bos, *prefix)


# --------------------------------------------------------------------------------------------
# Chat


def render_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template_kwargs: Mapping[str, Any] = _NO_KWARGS,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool,
) -> str:
    """Messages through the tokenizer's own template, special tokens included.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: messages without a role, or messages the template refuses.
    """
    check_conversation(messages)
    _check_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            _without_nulls(messages),
            tools=_as_list(tools),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **chat_template_kwargs,
        )
    except Exception as error:  # a template is foreign code and may raise anything
        raise _refused_by_template(messages, error) from error
    assert isinstance(text, str)
    return text


def encode_rendered(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Ids of a rendered conversation: the template alone decides about BOS.

    Raises:
        DataError: a text the tokenizer cannot encode.
    """
    return _encode(text, tokenizer)


def encode_chat_with_mask(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template_kwargs: Mapping[str, Any] = _NO_KWARGS,
    tools: Sequence[Mapping[str, Any]] | None = None,
    prompt_messages: int | None = None,
    eos_ids: Collection[int] = (),
) -> EncodedChat:
    """A conversation with an assistant-only mask; tool results and user turns are False.

    A template with `{% generation %}` blocks says itself what the assistant wrote. For any other,
    an assistant turn is what the rendering gains between "header written" and "turn written";
    this needs a template that renders a turn the same whether or not others follow.

    The response ends at the last assistant turn's end token: what a template writes after an end
    token (a line break, mostly) is False within the conversation and dropped at its end. If the
    last turn has no end token, the tokenizer's is appended. Messages after the last assistant
    turn are left out.

    Args:
        prompt_messages: how many messages are the prompt; those before the assistant's first
            turn if not given.
        eos_ids: further ids that end a turn; give those of the model's generation config.

    Raises:
        ConfigError: no chat template, or no end token.
        DataError: no assistant turn, nothing before it, or a template that cannot be cut.
    """
    check_conversation(messages)
    first = prompt_messages or 0
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    if not turns:
        raise DataError(f"no assistant message to learn from among the roles {_roles(messages)}")
    rendering = _Rendering(messages[: turns[-1] + 1], tokenizer, chat_template_kwargs, tools)
    whole = rendering.until(turns[-1] + 1)
    prompt = rendering.header(prompt_messages or turns[0])
    if not whole.startswith(prompt):
        raise _cannot_cut(turns[0], prompt, whole)
    marked = _GENERATION_BLOCK.search(_template(tokenizer, tools)) is not None
    spans = rendering.generation_blocks() if marked else rendering.assistant_turns(turns, whole)
    return _encode_spans(whole, len(prompt), spans, tokenizer, eos_ids)


class _Rendering:
    """Renderings of the beginnings of one conversation."""

    def __init__(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        self.messages = messages
        self.tokenizer = tokenizer
        self.kwargs = chat_template_kwargs
        self.tools = tools

    def until(self, end: int) -> str:
        """The first `end` messages."""
        return self._render(end, add_generation_prompt=False)

    def header(self, end: int) -> str:
        """The first `end` messages and the header of an assistant's turn."""
        return self._render(end, add_generation_prompt=True)

    def _render(self, end: int, *, add_generation_prompt: bool) -> str:
        return render_chat(
            self.messages[:end],
            self.tokenizer,
            chat_template_kwargs=self.kwargs,
            tools=self.tools,
            add_generation_prompt=add_generation_prompt,
        )

    def assistant_turns(self, turns: Sequence[int], whole: str) -> list[tuple[int, int]]:
        """Where in `whole` each assistant turn begins and ends, in characters."""
        spans = []
        for turn in turns:
            header, written = self.header(turn), self.until(turn + 1)
            for part in (header, written):
                if not whole.startswith(part):
                    raise _cannot_cut(turn, part, whole)
            spans.append((len(header), len(written)))
        return spans

    def generation_blocks(self) -> list[tuple[int, int]]:
        """Where the template's `{% generation %}` blocks begin and end, in characters."""
        from transformers.utils import chat_template_utils

        # Typed loosely because the library declares a string as the result of what returns a pair.
        render: Any = chat_template_utils.render_jinja_template
        _, spans = render(
            conversations=[_without_nulls(self.messages)],
            tools=_as_list(self.tools),
            chat_template=_template(self.tokenizer, self.tools),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.kwargs},
        )
        return [(start, end) for start, end in spans[0]]


def _encode_spans(
    whole: str,
    prompt_length: int,
    spans: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Collection[int],
) -> EncodedChat:
    """Encode a rendering cut into the prompt, the assistant's spans and what lies between."""
    pieces, written = [whole[:prompt_length]], [False]
    position = prompt_length
    for start, end in spans:
        start = max(start, prompt_length)
        if end <= start:
            continue
        pieces += [whole[position:start], whole[start:end]]
        written += [False, True]
        position = end
    if len(pieces) == 1:
        raise DataError("the chat template writes no text for the assistant's turns")
    encoded = _encode_pieces(pieces, tokenizer)
    ends = _end_ids(tokenizer, eos_ids)
    response: list[int] = []
    mask: list[bool] = []
    for ids, by_assistant in zip(encoded[1:-1], written[1:-1], strict=True):
        response += ids
        mask += _until_last_end(ids, ends) if by_assistant else [False] * len(ids)
    last = encoded[-1]
    kept = sum(_until_last_end(last, ends))
    final = _ended(last[:kept], tokenizer, eos_ids)
    return EncodedChat(encoded[0], (*response, *final), tuple(mask + [True] * len(final)))


def _until_last_end(ids: Ids, ends: Collection[int]) -> list[bool]:
    """True up to and including the last end token; all True where there is none."""
    last = max((i for i, token in enumerate(ids) if token in ends), default=len(ids))
    return [i <= last for i in range(len(ids))]


def _encode_pieces(pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Ids of each piece of a text, as in the encoding of the whole.

    Where a token of the whole would straddle a border, the encoding starts afresh there.
    """
    encoded: list[Ids] = []
    text = ""  # since the last fresh start
    ids: Ids = ()
    for piece in pieces:
        longer = _encode(text + piece, tokenizer)
        if longer[: len(ids)] == ids:
            encoded.append(longer[len(ids) :])
            text, ids = text + piece, longer
        else:
            ids = _encode(piece, tokenizer)
            encoded.append(ids)
            text = piece
    return encoded


# --------------------------------------------------------------------------------------------


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    return _encode_all([text], tokenizer)[0]


def _encode_all(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Ids without added special tokens; those written in the text are recognised."""
    if not texts:
        return []
    try:
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers raise a bare Exception
        if len(texts) > 1:
            for text in texts:
                _encode(text, tokenizer)
        raise DataError(
            f"the tokenizer cannot encode {_shortened(texts[0])}: {error}; "
            "every character must be in its vocabulary"
        ) from error
    return [tuple(ids) for ids in encoded]


def _end_ids(tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]) -> frozenset[int]:
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = frozenset((*own, *eos_ids))
    if not ends:
        raise ConfigError(
            "the tokenizer has no end token, so a response could never end; "
            "set its eos_token or the eos_token_id of the model's generation config"
        )
    return ends


def _ended(ids: Ids, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]) -> Ids:
    """`ids` with an end token, appended only where the last id is none."""
    ends = _end_ids(tokenizer, eos_ids)
    if ids and ids[-1] in ends:
        return ids
    eos = tokenizer.eos_token_id
    return (*ids, eos if eos is not None else min(ends))


def _template(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]] | None) -> str:
    template = tokenizer.get_chat_template(tools=_as_list(tools))
    assert isinstance(template, str)
    return template


def _without_nulls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages without fields that are None, which Parquet adds and templates may print."""
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def _as_list(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    return None if tools is None else list(tools)


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template, but the prompts are chat "
            "messages; give plain text, or a tokenizer with a template"
        )


def check_messages(messages: Sequence[Any]) -> None:
    """Raise `DataError` unless every entry is a chat message."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"message {index} must be an object with a 'role' and a 'content', "
                f"got {_shortened(message)}"
            )


def check_conversation(messages: Sequence[Any]) -> None:
    """Raise `DataError` unless these are chat messages that begin with a turn to answer."""
    check_messages(messages)
    if not messages or messages[0]["role"] == "assistant":
        raise DataError(
            f"chat messages must begin with a turn to answer, got the roles: {_roles(messages)}"
        )


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages) or "none"


def _refused_by_template(messages: Sequence[Message], error: Exception) -> DataError:
    return DataError(
        f"the chat template refuses messages with the roles {_roles(messages)}: {error}"
    )


def _cannot_cut(turn: int, part: str, whole: str) -> DataError:
    """Says where a rendering stops being the beginning of a longer one."""
    at = next(
        (i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b),
        min(len(part), len(whole)),
    )
    return DataError(
        f"the chat template renders the conversation up to message {turn} differently once more "
        f"follows: {_shortened(part[at:])} becomes {_shortened(whole[at:])} at character {at}, so "
        "the assistant's tokens cannot be told apart. Use a template with {% generation %} "
        "blocks, set chat_template_kwargs so that both agree, or leave responses out of the data"
    )


def _shortened(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."

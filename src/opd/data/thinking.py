"""Where a prompt leaves a reader: inside a block of thinking, or outside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd.data.chat import render_chat
from opd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MARKS", "generation_prompt", "leaves_thinking_open"]

MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""How model families begin and end a block of thinking."""

SHOWN = 40
"""Characters of a plain prompt's end that are looked at and shown."""


def generation_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]
) -> str:
    """What stands between a prompt's last turn and the response.

    Of a chat what its template writes for `add_generation_prompt`; of a plain text its last
    characters, without the white space behind them.
    """
    if not prompt.messages:
        return prompt.text.rstrip()[-SHOWN:]
    turns = render_chat(
        prompt.messages,
        tokenizer,
        chat_template_kwargs=chat_template_kwargs,
        tools=prompt.columns.get("tools") or None,
        add_generation_prompt=False,
    )
    whole = prompt.text
    same = next(
        (i for i, (a, b) in enumerate(zip(turns, whole, strict=False)) if a != b),
        min(len(turns), len(whole)),
    )
    return whole[same:]


def leaves_thinking_open(prompt: Prompt, ending: str) -> bool:
    """Whether the response to a prompt begins inside a block of thinking.

    Args:
        ending: its `generation_prompt`. A template writes that, so a mark anywhere in it counts; a
            plain text may speak of marks, so of it only the very end does.
    """
    if not prompt.messages:
        return any(ending.endswith(begin) for begin, _ in MARKS)
    begun = max(ending.rfind(begin) for begin, _ in MARKS)
    return begun > max(ending.rfind(end) for _, end in MARKS)

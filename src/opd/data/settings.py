"""How a file or data set of prompts is read. Plain data: importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opd.errors import ConfigError

__all__ = ["PromptSettings"]

BAD_PROMPT_POLICIES = ("skip", "error")


@dataclass(frozen=True)
class PromptSettings:
    """How records become prompts.

    Attributes:
        prompt_column: holds a text or a list of chat messages.
        messages_column: holds chat messages where a record has no prompt column.
        answer_column: reference answer for a verifier; a record may lack it.
        response_column: a response from the data, text or messages; a record may lack it.
        with_responses: encode the data's responses; False where no term and no phase reads them.
        as_chat: put a plain prompt into one user message, so that the template applies.
        chat_template_kwargs: further variables of the chat template.
        max_prompt_tokens: longest prompt, special tokens included; None: any length.
        bad_prompts: what to do with empty and too long prompts: "skip" counts them and goes on,
            "error" stops at the first.
        dataset_split: which split of a `datasets` folder or hub id.
        dataset_subset: which configuration of a hub id.
    """

    prompt_column: str = "prompt"
    messages_column: str = "messages"
    answer_column: str = "answer"
    response_column: str = "response"
    with_responses: bool = True
    as_chat: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    bad_prompts: str = "skip"
    dataset_split: str = "train"
    dataset_subset: str | None = None

    def __post_init__(self) -> None:
        if self.bad_prompts not in BAD_PROMPT_POLICIES:
            raise ConfigError(f"bad_prompts must be 'skip' or 'error', got {self.bad_prompts!r}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(f"max_prompt_tokens must be >= 1, got {self.max_prompt_tokens}")

from __future__ import annotations

from typing import Any

import pytest
from tests.models_zoo import thinking_tokenizer

from opd.data.prompts import PromptSettings, load_prompts
from opd.data.thinking import MARKS, generation_prompt, leaves_thinking_open
from opd.types import Prompt

ASKED = [{"role": "user", "content": "S312"}]


def prompt_of(record: dict[str, Any], tokenizer: Any, **variables: Any) -> Prompt:
    settings = PromptSettings(chat_template_kwargs=variables)
    return load_prompts([record], tokenizer=tokenizer, settings=settings).prompts[0]


@pytest.mark.parametrize(
    ("variables", "ending", "inside"),
    [
        ({}, "A:", False),
        ({"thinking": True}, "A:<think>", True),
        ({"thinking": False}, "A:<think></think>", False),
    ],
)
def test_of_a_chat_it_is_what_the_template_adds(
    variables: dict[str, Any], ending: str, inside: bool
) -> None:
    tokenizer = thinking_tokenizer()
    prompt = prompt_of({"messages": ASKED}, tokenizer, **variables)
    assert generation_prompt(prompt, tokenizer, variables) == ending
    assert leaves_thinking_open(prompt, ending) is inside


def test_marks_in_a_message_are_not_the_generation_prompts() -> None:
    tokenizer = thinking_tokenizer()
    asked = [{"role": "user", "content": "S<think>3"}]
    prompt = prompt_of({"messages": asked}, tokenizer)
    assert not leaves_thinking_open(prompt, generation_prompt(prompt, tokenizer, {}))


@pytest.mark.parametrize(("begin", "end"), MARKS)
def test_of_a_plain_text_only_its_very_end_counts(begin: str, end: str) -> None:
    tokenizer = thinking_tokenizer()
    for text, inside in (
        (f"Q {begin}\n", True),
        (f"Q {begin}{end}\n\n", False),
        (f"use {begin} tags", False),
        ("Q", False),
    ):
        prompt = Prompt("p", (1,), text)
        ending = generation_prompt(prompt, tokenizer, {})
        assert leaves_thinking_open(prompt, ending) is inside, text


@pytest.mark.parametrize(("begin", "end"), MARKS)
def test_every_familys_marks_are_known_in_a_generation_prompt(begin: str, end: str) -> None:
    prompt = Prompt("p", (1,), "", messages=tuple(ASKED))
    assert leaves_thinking_open(prompt, f"A:{begin}\nWell, ")
    assert not leaves_thinking_open(prompt, f"A:{begin}\n\n{end}\n\n")

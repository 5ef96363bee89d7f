from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from opd.data.chat import encode_prompts, encode_rendered, render_chat
from opd.data.prompts import PromptSettings, load_prompts, task_prompts
from opd.errors import ConfigError, DataError
from opd.teacher.context import ContextEncoder, context_fields
from opd.types import Prompt
from tests.models_zoo import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PLAIN = {"prompt": "S312:", "answer": "123", "hint": "1|32", "level": 3, "response": "1>2"}
TURNS = [
    {"role": "system", "content": "SORT"},
    {"role": "user", "content": "S21"},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "S312"},
]


def prompts_of(*records: Any, **settings: Any) -> tuple[Prompt, ...]:
    made = PromptSettings(**settings)
    return load_prompts(list(records), tokenizer=TOKENIZER, settings=made).prompts


def encoded(prompts: Sequence[Prompt], context: str, **settings: Any) -> list[tuple[int, ...]]:
    return ContextEncoder(TOKENIZER, PromptSettings(**settings)).encode(prompts, context)


@pytest.mark.parametrize(
    ("context", "text"),
    [
        ("{prompt}#{answer}", "S312:#123"),
        ("{hint}={prompt}", "1|32=S312:"),
        ("{prompt}{level}", "S312:3"),
        ("{response},{prompt}", "1>2,S312:"),
        ("hint", "1|32"),
    ],
)
def test_a_plain_prompt_is_rewritten_and_encoded_as_prompts_are(context: str, text: str) -> None:
    prompts = prompts_of(PLAIN, with_responses=False)
    assert encoded(prompts, context) == encode_prompts([text], TOKENIZER)
    assert encoded(prompts, "{prompt}") == [prompts[0].prompt_ids]


def test_a_chat_keeps_its_turns_and_its_template() -> None:
    (prompt,) = prompts_of({"messages": TURNS[:1] + TURNS[-1:], "answer": "123"})
    rewritten = [TURNS[0], {"role": "user", "content": "S312#123"}]
    text = render_chat(rewritten, TOKENIZER, add_generation_prompt=True)
    assert text == "<bos>S:SORT;U:S312#123;A:"
    assert encoded([prompt], "{prompt}#{answer}") == [encode_rendered(text, TOKENIZER)]
    assert encoded([prompt], "{prompt}") == [prompt.prompt_ids]


def test_what_the_data_answers_in_a_chat_is_no_part_of_the_privileged_prompt() -> None:
    (prompt,) = prompts_of({"messages": [TURNS[3], {"role": "assistant", "content": "123"}]})
    (ids,) = encoded([prompt], "{prompt}#{response}")
    assert ids == encode_rendered("<bos>U:S312#123;A:", TOKENIZER)
    assert encoded([prompt], "{prompt}") == [prompt.prompt_ids]


def test_a_prompt_put_into_a_chat_by_the_run_stays_one() -> None:
    prompts = prompts_of(PLAIN, as_chat=True)
    (ids,) = encoded(prompts, "{prompt}#{answer}", as_chat=True)
    assert ids == encode_rendered("<bos>U:S312:#123;A:", TOKENIZER)


def test_a_column_of_messages_is_the_whole_privileged_chat() -> None:
    chat = [{"role": "system", "content": "123"}, {"role": "user", "content": "S312"}]
    (prompt,) = prompts_of({"messages": [TURNS[3]], "told": chat})
    (ids,) = encoded([prompt], "told")
    assert ids == encode_rendered("<bos>S:123;U:S312;A:", TOKENIZER)


def test_a_long_privileged_prompt_is_not_left_out() -> None:
    prompts = prompts_of(PLAIN, max_prompt_tokens=6)
    (ids,) = encoded(prompts, "{prompt}{prompt}{prompt}", max_prompt_tokens=6)
    assert len(ids) == 1 + 3 * 5


def test_a_task_tells_its_worked_solution_even_where_nobody_encodes_responses() -> None:
    endless = task_prompts("sort", "train", tokenizer=TOKENIZER)
    assert endless.generate is not None
    (prompt,) = endless.generate(0, 0, 1, False)
    assert prompt.response_ids is None
    (ids,) = encoded([prompt], "{response}#{prompt}")
    text = str(TOKENIZER.decode(list(ids[1:])))
    solution, _, asked = text.partition("#")
    assert asked == prompt.text
    assert solution.rpartition(">")[2] == prompt.answer


@pytest.mark.parametrize(
    ("context", "name"),
    [("{prompt}#{hint}", "hint"), ("hint", "hint"), ("{prompt}{answer}", "answer")],
)
def test_a_record_without_the_column_is_named(context: str, name: str) -> None:
    prompts = prompts_of(PLAIN, {"prompt": "S21:", "level": 1, "hint": None})
    with pytest.raises(DataError) as caught:
        encoded(prompts, context)
    message = str(caught.value)
    assert message.startswith("item 1: ")
    assert f"the column {name!r}" in message
    assert "there are: prompt, level." in message


@pytest.mark.parametrize("value", [["1", "2"], {"a": 1}, True])
def test_a_column_that_is_no_text_is_refused_in_a_template(value: object) -> None:
    prompts = prompts_of({"prompt": "S21:", "hint": value})
    with pytest.raises(DataError, match=r"item 0: .*'hint', which must hold a text"):
        encoded(prompts, "{prompt}{hint}")


def test_a_chat_without_a_user_has_no_place_for_a_context() -> None:
    prompts = prompts_of({"messages": [{"role": "system", "content": "SORT"}]})
    with pytest.raises(DataError, match="item 0: a context takes the place of the last user"):
        encoded(prompts, "{prompt}#1")


@pytest.mark.parametrize("bad", ["{prompt", "{}", "{a.b}", "{a[0]}", "{a:>5}", "{a!r}", "a}"])
def test_a_template_is_text_and_plain_names(bad: str) -> None:
    with pytest.raises(ConfigError, match="context = "):
        context_fields(bad)


def test_names_and_escaped_braces_are_told_apart() -> None:
    assert context_fields("{{{prompt}}} {hint}") == ("prompt", "hint")
    (prompt,) = prompts_of({"prompt": "S21:", "hint": "12"})
    record = ContextEncoder(TOKENIZER, PromptSettings()).record(prompt, "{{{prompt}}} {hint}")
    assert record == {"prompt": "{S21:} 12"}

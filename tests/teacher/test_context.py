from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from opd.data.chat import encode_prompts, encode_rendered, render_chat
from opd.data.prompts import PromptSettings, load_prompts, task_prompts
from opd.errors import ConfigError, DataError
from opd.teacher.context import ContextEncoder, context_fields, siblings, told_by_rollout
from opd.types import Prompt, Provenance, Rollout, TeacherView
from tests.builders import rollout_of
from tests.models_zoo import EOS, thinking_tokenizer, tiny_tokenizer

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
    view = TeacherView(context=context)
    return ContextEncoder(TOKENIZER, PromptSettings(**settings)).encode(prompts, view)


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
    view = TeacherView(context="{{{prompt}}} {hint}")
    record = ContextEncoder(TOKENIZER, PromptSettings()).record(prompt, view)
    assert record == {"prompt": "{S21:} 12"}


# --------------------------------------------------------------------------------------------
# A system message


SYSTEM = TeacherView(context="#{answer}", context_role="system")


def read_texts(prompts: Sequence[Prompt], view: TeacherView, **settings: Any) -> list[str]:
    encoder = ContextEncoder(TOKENIZER, PromptSettings(**settings))
    return [prompt.text for prompt in encoder.read(prompts, view)]


def test_a_system_context_precedes_a_chat_that_has_no_system_message() -> None:
    prompts = prompts_of({"messages": TURNS[1:], "answer": "123"})
    expected = "<bos>S:#123;U:S21;A:12<eos>U:S312;A:"
    assert read_texts(prompts, SYSTEM) == [expected]
    encoder = ContextEncoder(TOKENIZER, PromptSettings())
    assert encoder.encode(prompts, SYSTEM) == [encode_rendered(expected, TOKENIZER)]


def test_a_system_context_follows_what_the_system_message_says() -> None:
    prompts = prompts_of({"messages": TURNS, "answer": "123"})
    assert read_texts(prompts, SYSTEM) == ["<bos>S:SORT\n\n#123;U:S21;A:12<eos>U:S312;A:"]


def test_a_prompt_put_into_a_chat_by_the_run_takes_a_system_context() -> None:
    prompts = prompts_of(PLAIN, as_chat=True)
    assert read_texts(prompts, SYSTEM, as_chat=True) == ["<bos>S:#123;U:S312:;A:"]


def test_a_bare_column_may_be_the_system_message() -> None:
    prompts = prompts_of({"messages": [TURNS[3]], "rule": "SORT"})
    view = replace(SYSTEM, context="rule")
    assert read_texts(prompts, view) == ["<bos>S:SORT;U:S312;A:"]


def test_a_plain_prompt_has_no_place_for_a_system_context() -> None:
    with pytest.raises(DataError, match=r"item 0: context_role = 'system'.*data.as_chat = true"):
        read_texts(prompts_of(PLAIN), SYSTEM)


def test_a_whole_chat_takes_no_role_beside() -> None:
    prompts = prompts_of({"messages": [TURNS[3]], "told": [TURNS[3]]})
    with pytest.raises(DataError, match="holds messages, which are the whole chat"):
        read_texts(prompts, replace(SYSTEM, context="told"))


def test_a_system_message_that_is_no_text_is_refused() -> None:
    parts = [{"type": "text", "text": "SORT"}]
    turns = ({"role": "system", "content": parts}, TURNS[3])
    prompt = replace(prompts_of(PLAIN)[0], messages=turns)
    with pytest.raises(DataError, match="adds to the system message, which must hold a text"):
        read_texts([prompt], SYSTEM)


# --------------------------------------------------------------------------------------------
# The thinking boundary


def check_thinking(
    prompts: Sequence[Prompt], view: TeacherView, **variables: Any
) -> ContextEncoder:
    settings = PromptSettings(chat_template_kwargs=variables)
    encoder = ContextEncoder(thinking_tokenizer(), settings)
    encoder.check_thinking(prompts, view)
    return encoder


def thinking_prompts(record: Any, **variables: Any) -> tuple[Prompt, ...]:
    settings = PromptSettings(chat_template_kwargs=variables)
    return load_prompts([record], tokenizer=thinking_tokenizer(), settings=settings).prompts


CHAT = {"messages": [TURNS[3]], "answer": "123"}
HINTED = TeacherView(context="{prompt}#{answer}")


@pytest.mark.parametrize("variables", [{}, {"thinking": True}, {"thinking": False}])
def test_a_context_ends_in_the_generation_prompt_of_the_run(variables: dict[str, Any]) -> None:
    prompts = thinking_prompts(CHAT, **variables)
    encoder = check_thinking(prompts, HINTED, **variables)
    (read,) = encoder.read(prompts, HINTED)
    own, told = prompts[0].text.split("U:S312"), read.text.split("U:S312#123")
    assert own == told
    assert own[1].startswith(";A:")


@pytest.mark.parametrize(
    ("own", "of_view", "endings"),
    [
        (True, False, ("inside", "'A:<think>'", "outside", "'A:<think></think>'")),
        (False, True, ("outside", "'A:<think></think>'", "inside", "'A:<think>'")),
        (None, True, ("outside", "'A:'", "inside", "'A:<think>'")),
    ],
)
def test_a_thought_to_the_one_and_an_answer_to_the_other_is_refused(
    own: bool | None, of_view: bool, endings: tuple[str, ...]
) -> None:
    variables = {} if own is None else {"thinking": own}
    prompts = thinking_prompts(CHAT, **variables)
    view = replace(HINTED, chat_template_kwargs=(("thinking", of_view),))
    with pytest.raises(ConfigError, match=r".*".join(map(re.escape, endings))) as caught:
        check_thinking(prompts, view, **variables)
    assert "item 0" in str(caught.value)
    assert "data.chat_template_kwargs" in str(caught.value)


def test_a_view_may_read_without_the_empty_block_that_the_student_answers_after() -> None:
    """As Qwen3's template has it: thinking is off with an empty block, and on without any."""
    prompts = thinking_prompts(CHAT, thinking=False)
    encoder = check_thinking(prompts, HINTED, thinking=False)
    assert encoder.read(prompts, HINTED)[0].text.endswith("A:<think></think>")
    tokenizer = thinking_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "thinking is defined", "thinking is false"
    )
    encoder = ContextEncoder(tokenizer, PromptSettings(chat_template_kwargs={"thinking": False}))
    view = replace(HINTED, chat_template_kwargs=(("thinking", True),))
    encoder.check_thinking(prompts, view)
    assert encoder.read(prompts, view)[0].text.endswith("#123;A:")


def test_a_plain_prompt_that_opens_a_thought_keeps_its_end() -> None:
    prompts = thinking_prompts({"prompt": "S312:<think>", "answer": "123"})
    check_thinking(prompts, TeacherView(context="{answer}#{prompt}"))
    with pytest.raises(ConfigError, match=r"with \{prompt\} last"):
        check_thinking(prompts, HINTED)


def test_template_variables_are_for_chats() -> None:
    view = replace(HINTED, chat_template_kwargs=(("thinking", True),))
    with pytest.raises(DataError, match=r"chat_template_kwargs are for a chat template"):
        read_texts(prompts_of(PLAIN), view)


# --------------------------------------------------------------------------------------------
# What a rollout tells


def rollout(verdicts: Sequence[float], lengths: Sequence[int], **changes: Any) -> Rollout:
    """Responses of one group of so many tokens each, token 3 + row throughout."""
    width = max(lengths)
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.where(inside, 3 + torch.arange(len(lengths))[:, None], 0)
    return rollout_of(
        tokens,
        inside,
        inside.long() * int(Provenance.STUDENT),
        verdict=torch.tensor(verdicts),
        group=torch.zeros(len(lengths), dtype=torch.long),
        **changes,
    )


def by_brute_force(made: Rollout) -> list[int | None]:
    """The sibling's definition, read out literally."""
    found: list[int | None] = []
    lengths = made.lengths.tolist()
    for b in range(len(lengths)):
        others = [
            (lengths[c], c)
            for c in range(len(lengths))
            if c != b and made.group[c] == made.group[b] and float(made.verdict[c]) >= 0.5
        ]
        found.append(min(others)[1] if others else None)
    return found


def test_a_sibling_is_the_shortest_right_response_of_another_sample() -> None:
    made = rollout([1.0, 1.0, 0.0, 1.0], [4, 2, 1, 2])
    assert siblings(made) == [1, 3, 1, 1]
    assert siblings(rollout([1.0, 0.0], [2, 2])) == [None, 0]
    assert siblings(rollout([math.nan, 0.4], [2, 2])) == [None, None]


def test_siblings_are_of_the_same_prompt() -> None:
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        size = 12
        made = rollout(
            torch.rand(size, generator=draw).tolist(),
            torch.randint(1, 5, (size,), generator=draw).tolist(),
        )
        groups = torch.randint(0, 4, (size,), generator=draw)
        made = replace(made, group=groups)
        assert siblings(made) == by_brute_force(made)


def test_the_sibling_is_told_as_text_without_special_tokens() -> None:
    made = rollout([1.0, 0.0, 0.0], [3, 2, 2])
    made = replace(made, tokens=made.tokens.index_fill(1, torch.tensor([2]), EOS))
    text = str(TOKENIZER.decode([3, 3]))
    told = told_by_rollout(made, TOKENIZER, "{prompt}#{sibling}")
    assert told == [None, {"sibling": text}, {"sibling": text}]


def test_feedback_is_the_verifiers_reason_and_silence_is_none() -> None:
    made = rollout([0.0, 1.0], [1, 1], reasons=("WRONG", ""))
    assert told_by_rollout(made, TOKENIZER, "{feedback}{prompt}") == [{"feedback": "WRONG"}, None]
    assert told_by_rollout(replace(made, reasons=()), TOKENIZER, "{feedback}") == [None, None]
    both = told_by_rollout(made, TOKENIZER, "{feedback}{sibling}")
    assert both == [{"sibling": str(TOKENIZER.decode([4])), "feedback": "WRONG"}, None]


def test_a_context_of_columns_is_told_of_every_sequence() -> None:
    made = rollout([0.0, 1.0], [1, 1])
    assert told_by_rollout(made, TOKENIZER, "{prompt}{answer}") == [{}, {}]
    assert told_by_rollout(made, TOKENIZER, "sibling") == [{}, {}]  # a column of that name


def test_what_was_told_takes_its_place_in_the_template() -> None:
    prompts = prompts_of(PLAIN, with_responses=False)
    view = TeacherView(context="{sibling}#{prompt}")
    encoder = ContextEncoder(TOKENIZER, PromptSettings())
    ids = encoder.encode(prompts, view, [{"sibling": "321"}])
    assert ids == encode_prompts(["321#S312:"], TOKENIZER)


def test_a_column_of_the_same_name_is_refused() -> None:
    prompts = prompts_of({"prompt": "S21:", "feedback": "GOOD"})
    encoder = ContextEncoder(TOKENIZER, PromptSettings())
    view = TeacherView(context="{feedback}{prompt}")
    with pytest.raises(DataError, match="there is a column 'feedback' as well"):
        encoder.encode(prompts, view, [{"feedback": "BAD"}])

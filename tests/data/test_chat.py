from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from opd.data.chat import (
    EncodedChat,
    encode_chat_with_mask,
    encode_pairs,
    encode_prompts,
    encode_rendered,
    render_chat,
)
from opd.errors import ConfigError, DataError

MakeBpe = Callable[..., PreTrainedTokenizerFast]

USER = {"role": "user", "content": "What is the sum of 12 and 30?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "42"}
ANSWER = {"role": "assistant", "content": "The sum is 42."}


def written(encoded: EncodedChat, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The runs of tokens whose mask is True, as text."""
    runs: list[list[int]] = [[]]
    for token, by_assistant in zip(encoded.response_ids, encoded.response_mask, strict=True):
        if by_assistant:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


# ------------------------------------------------------------------------------------ plain text


def test_bos_is_put_in_front_where_the_tokenizer_does_not_add_it(
    characters: PreTrainedTokenizerFast,
) -> None:
    (ids,) = encode_prompts(["S312:"], characters)
    assert ids[0] == characters.bos_token_id
    assert characters.decode(ids[1:]) == "S312:"


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
def test_a_plain_prompt_begins_with_one_bos_and_has_no_end_token(
    make_bpe: MakeBpe, adds: str
) -> None:
    tokenizer = make_bpe(adds=adds)
    bare = tuple(tokenizer("Hello", add_special_tokens=False)["input_ids"])
    assert (
        encode_prompts(["Hello", "<|bos|>Hello"], tokenizer)
        == [(tokenizer.bos_token_id, *bare)] * 2
    )
    assert (
        encode_prompts(["<|bos|>Hello", "Hello"], tokenizer)
        == [(tokenizer.bos_token_id, *bare)] * 2
    )


def test_no_bos_where_there_is_none(make_bpe: MakeBpe) -> None:
    tokenizer = make_bpe(bos_token=None)
    assert encode_prompts(["Hello"], tokenizer) == [tuple(tokenizer("Hello")["input_ids"])]


def test_a_response_ends_with_exactly_one_end_token(bpe: PreTrainedTokenizerFast) -> None:
    eos = bpe.eos_token_id
    _, (bare, ended) = encode_pairs(["Hello"] * 2, [" there", " there<|im_end|>"], bpe)
    assert bare == ended
    assert bare.count(eos) == 1
    assert bare[-1] == eos == bpe.pad_token_id


def test_another_id_that_ends_responses_is_not_followed_by_a_second(
    bpe: PreTrainedTokenizerFast,
) -> None:
    eot = bpe.convert_tokens_to_ids("<|eot|>")
    _, (ids,) = encode_pairs(["Hello"], [" there<|eot|>"], bpe, eos_ids=(eot,))
    assert ids[-1] == eot
    assert bpe.eos_token_id not in ids


def test_a_tokenizer_without_end_token_is_refused(make_bpe: MakeBpe) -> None:
    with pytest.raises(ConfigError, match="no end token"):
        encode_pairs(["Hello"], [" there"], make_bpe(eos_token=None))


texts = st.text(alphabet="Thesumi 42.\n", min_size=1, max_size=30)


@given(prompt=texts, response=texts)
@settings(max_examples=150, deadline=None)
def test_prompt_and_response_ids_decode_to_their_texts_wherever_tokens_merge(
    bpe: PreTrainedTokenizerFast, prompt: str, response: str
) -> None:
    (prompt_ids,), (response_ids,) = encode_pairs([prompt], [response], bpe)
    assert [prompt_ids] == encode_prompts([prompt], bpe)
    assert bpe.decode(prompt_ids, skip_special_tokens=True) == prompt
    assert bpe.decode(response_ids, skip_special_tokens=True) == response


def test_a_response_is_encoded_as_a_continuation_but_never_changes_the_prompt(
    bpe: PreTrainedTokenizerFast,
) -> None:
    whole = bpe("\n\n")["input_ids"]
    assert len(whole) == 1  # the two line breaks merge
    (prompt_ids,), (response_ids,) = encode_pairs(["\n"], ["\n"], bpe)
    line_break = bpe("\n")["input_ids"][0]
    assert prompt_ids == (bpe.bos_token_id, line_break)
    assert response_ids == (line_break, bpe.eos_token_id)


def test_a_text_that_cannot_be_encoded_is_shown(characters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"cannot encode 'lower'.*vocabulary"):
        encode_prompts(["S1:", "lower"], characters)


# ------------------------------------------------------------------------------------ templates


def test_a_chat_prompt_ends_with_the_assistants_header(bpe: PreTrainedTokenizerFast) -> None:
    text = render_chat([USER], bpe, add_generation_prompt=True)
    assert text == f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert bpe.decode(encode_rendered(text, bpe)) == text


def test_template_variables_and_tools_reach_the_template(bpe: PreTrainedTokenizerFast) -> None:
    text = render_chat(
        [USER],
        bpe,
        chat_template_kwargs={"style": "brief"},
        tools=[{"name": "add"}],
        add_generation_prompt=True,
    )
    assert text.endswith("assistant\n[brief]")
    assert text.startswith('<|im_start|>system\ntools: [{"name": "add"}]')


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
def test_a_template_that_writes_bos_gives_one_bos(make_bpe: MakeBpe, adds: str) -> None:
    tokenizer = make_bpe("with bos", adds=adds)
    encoded = encode_chat_with_mask([USER, ANSWER], tokenizer)
    assert encoded.prompt_ids[0] == tokenizer.bos_token_id
    assert (encoded.prompt_ids + encoded.response_ids).count(tokenizer.bos_token_id) == 1


def test_a_template_without_bos_gives_none(make_bpe: MakeBpe) -> None:
    tokenizer = make_bpe(adds="bos")
    encoded = encode_chat_with_mask([USER, ANSWER], tokenizer)
    assert tokenizer.bos_token_id not in encoded.prompt_ids + encoded.response_ids


def test_a_missing_template_is_a_clear_error(make_bpe: MakeBpe) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        render_chat([USER], make_bpe(None), add_generation_prompt=True)


def test_messages_the_template_refuses_are_a_clear_error(make_bpe: MakeBpe) -> None:
    strict = make_bpe("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles user, user: roles must alternate"):
        render_chat([USER, USER], strict, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "must begin with a turn to answer, got the roles: none"),
        ([ANSWER], "must begin with a turn to answer, got the roles: assistant"),
        ([USER, {"content": "x"}], "message 1 must be an object with a 'role'"),
        ([USER, RESULT], "no assistant message to learn from among the roles user, tool"),
    ],
)
def test_messages_without_use_say_why(
    bpe: PreTrainedTokenizerFast, messages: list[object], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        encode_chat_with_mask(messages, bpe)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ masks

CONVERSATION = [
    USER,
    CALL,
    RESULT,
    ANSWER,
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello there."},
]


@pytest.mark.parametrize("template", ["by prefixes", "by generation blocks"])
def test_only_the_assistants_tokens_are_true(make_bpe: MakeBpe, template: str) -> None:
    tokenizer = make_bpe("marked") if template == "by generation blocks" else make_bpe()
    encoded = encode_chat_with_mask(CONVERSATION, tokenizer)
    assert written(encoded, tokenizer) == [
        "<tool_call>add<|im_end|>",
        "The sum is 42.<|im_end|>",
        "Hello there.<|im_end|>",
    ]
    whole = tokenizer.decode(encoded.prompt_ids + encoded.response_ids)
    rendered = render_chat(CONVERSATION, tokenizer, add_generation_prompt=False)
    assert whole + "\n" == rendered  # the line break after the last end token is dropped


def test_both_ways_to_cut_agree(make_bpe: MakeBpe) -> None:
    plain, marked = make_bpe(), make_bpe("marked")
    for end in (2, 4, 6):
        messages = CONVERSATION[:end]
        assert encode_chat_with_mask(messages, plain) == encode_chat_with_mask(messages, marked)


@pytest.mark.parametrize("marked", [False, True])
def test_fields_that_are_null_are_as_good_as_missing(make_bpe: MakeBpe, marked: bool) -> None:
    template = "{% if m.name is defined %}{{ m.name }}{% endif %}{{ m.content }}"
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    tokenizer = make_bpe(
        "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}"
        + f"{begin}{template}<|im_end|>{end}"
        + "{% else %}"
        + template
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    with_null = [{**USER, "name": None}, {**ANSWER, "name": None}]
    encoded = encode_chat_with_mask(with_null, tokenizer)
    assert encoded == encode_chat_with_mask([USER, ANSWER], tokenizer)
    assert written(encoded, tokenizer) == ["The sum is 42.<|im_end|>"]


def test_the_prompt_of_a_conversation_is_what_a_sampler_would_get(
    bpe: PreTrainedTokenizerFast,
) -> None:
    prompt = encode_rendered(render_chat([USER], bpe, add_generation_prompt=True), bpe)
    assert encode_chat_with_mask(CONVERSATION, bpe).prompt_ids == prompt


def test_the_prompt_may_hold_earlier_assistant_turns(bpe: PreTrainedTokenizerFast) -> None:
    encoded = encode_chat_with_mask(CONVERSATION, bpe, prompt_messages=5)
    header = render_chat(CONVERSATION[:5], bpe, add_generation_prompt=True)
    assert encoded.prompt_ids == encode_rendered(header, bpe)
    assert written(encoded, bpe) == ["Hello there.<|im_end|>"]
    assert all(encoded.response_mask)


def test_messages_after_the_last_assistant_turn_are_left_out(
    bpe: PreTrainedTokenizerFast,
) -> None:
    assert encode_chat_with_mask([USER, ANSWER, USER], bpe) == encode_chat_with_mask(
        [USER, ANSWER], bpe
    )


def test_the_end_token_is_appended_once_where_the_template_writes_none(make_bpe: MakeBpe) -> None:
    bare = make_bpe(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoded = encode_chat_with_mask([USER, ANSWER], bare)
    assert encoded.response_ids.count(bare.eos_token_id) == 1
    assert encoded.response_ids[-1] == bare.eos_token_id
    assert all(encoded.response_mask)


def test_a_template_with_another_end_token_keeps_it_when_told(make_bpe: MakeBpe) -> None:
    template = make_bpe().chat_template.replace("<|im_end|>", "<|eot|>")
    tokenizer = make_bpe(template)
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    encoded = encode_chat_with_mask([USER, ANSWER], tokenizer, eos_ids=(eot,))
    assert encoded.response_ids[-1] == eot
    assert tokenizer.eos_token_id not in encoded.response_ids


def test_reasoning_of_one_turn_is_kept_where_the_template_shows_it(make_bpe: MakeBpe) -> None:
    tokenizer = make_bpe("forgetful")
    encoded = encode_chat_with_mask([USER, {**ANSWER, "thought": "hello"}], tokenizer)
    assert written(encoded, tokenizer) == ["<think>hello</think>The sum is 42.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_place(
    make_bpe: MakeBpe,
) -> None:
    turns = [USER, {**ANSWER, "thought": "hello"}, USER, {**ANSWER, "thought": "again"}]
    with pytest.raises(DataError, match=r"message 1 differently.*'<think>hello.*generation"):
        encode_chat_with_mask(turns, make_bpe("forgetful"))


def test_a_generation_header_the_history_lacks_is_refused(bpe: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"\[brief\].*set chat_template_kwargs so that both agree"):
        encode_chat_with_mask([USER, ANSWER], bpe, chat_template_kwargs={"style": "brief"})


@given(
    contents=st.lists(
        st.text(alphabet="Thesumi 42.\n", min_size=1, max_size=15), min_size=2, max_size=6
    )
)
@settings(max_examples=60, deadline=None)
def test_any_conversation_keeps_its_text_and_marks_exactly_the_assistants(
    bpe: PreTrainedTokenizerFast, contents: list[str]
) -> None:
    contents = contents[: len(contents) // 2 * 2]
    roles = ["user", "assistant"] * (len(contents) // 2)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    encoded = encode_chat_with_mask(messages, bpe)
    assert written(encoded, bpe) == [f"{c}<|im_end|>" for c in contents[1::2]]
    whole = bpe.decode(encoded.prompt_ids + encoded.response_ids)
    assert whole + "\n" == render_chat(messages, bpe, add_generation_prompt=False)

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from opd.data.chat import encode_rendered, render_chat
from opd.data.prompts import (
    PromptSet,
    PromptSettings,
    PromptStream,
    load_prompts,
    load_splits,
    task_prompts,
)
from opd.data.tasks import TASKS, build_tokenizer, split_of
from opd.errors import ConfigError, DataError
from opd.types import Prompt

Records = Sequence[Mapping[str, Any]]

RECORDS: Records = [
    {"prompt": "S312:", "answer": "123", "response": ">123", "level": 1},
    {"prompt": "S21:", "answer": 12, "level": 2},
    {"prompt": "S9:", "level": 3},
]
USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hello there."}


def write_json_lines(path: Path, records: Records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, records: Records) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    return path


# ------------------------------------------------------------------------------------ columns


def test_a_record_becomes_a_prompt(characters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "p.jsonl", RECORDS)
    first, second, third = load_prompts(path, tokenizer=characters).prompts
    ids = characters("S312:")["input_ids"]
    assert first == Prompt(
        id="p.jsonl:1",
        prompt_ids=(characters.bos_token_id, *ids),
        text="S312:",
        answer="123",
        response_ids=(*characters(">123")["input_ids"], characters.eos_token_id),
        response_mask=(True,) * 5,
        columns={"level": 1},
        response_text=">123",
    )
    assert (second.answer, second.response_ids, second.response_mask) == ("12", None, None)
    assert (third.id, third.answer) == ("p.jsonl:3", None)


@pytest.mark.parametrize("kind", ["json lines", "parquet", "folder", "folder with splits", "list"])
def test_every_kind_of_source_gives_the_same_prompts(
    characters: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    records = [{"prompt": f"S{n}:", "answer": f"{n}", "n": n} for n in range(20)]
    rows = datasets.Dataset.from_list(records)
    reading = PromptSettings()
    source: Any = records
    if kind == "json lines":
        source = write_json_lines(tmp_path / "p.jsonl", records)
    elif kind == "parquet":
        source = write_parquet(tmp_path / "p.parquet", records)
    elif kind == "folder":
        rows.save_to_disk(source := str(tmp_path / "folder"))
    elif kind == "folder with splits":
        datasets.DatasetDict({"mine": rows}).save_to_disk(source := str(tmp_path / "folder"))
        reading = PromptSettings(dataset_split="mine")
    loaded = load_prompts(source, tokenizer=characters, settings=reading)
    assert [(p.text, p.answer, p.columns) for p in loaded.prompts] == [
        (r["prompt"], r["answer"], {"n": r["n"]}) for r in records
    ]
    assert len({p.id for p in loaded.prompts}) == 20


def test_column_names_are_the_users(characters: PreTrainedTokenizerFast) -> None:
    names = PromptSettings(prompt_column="q", answer_column="a", response_column="r")
    record = {"q": "S1:", "a": "1", "r": ">1", "prompt": "kept"}
    (prompt,) = load_prompts([record], tokenizer=characters, settings=names).prompts
    assert (prompt.text, prompt.answer, prompt.columns) == ("S1:", "1", {"prompt": "kept"})
    assert prompt.response_ids is not None


def test_texts_alone_are_prompts(characters: PreTrainedTokenizerFast) -> None:
    loaded = load_prompts(["S1:", "S2:"], tokenizer=characters)
    assert [p.text for p in loaded.prompts] == ["S1:", "S2:"]


def test_model_inputs_and_other_columns_are_carried_untouched(
    characters: PreTrainedTokenizerFast,
) -> None:
    image, other = object(), [1, {"deep": None}]
    record = {"prompt": "S1:", "model_inputs": {"pixels": image}, "other": other}
    (prompt,) = load_prompts([record], tokenizer=characters).prompts
    assert prompt.model_inputs["pixels"] is image
    assert prompt.columns == {"other": other}
    assert prompt.columns["other"] is other


def test_an_answer_that_is_no_scalar_stays_a_column(characters: PreTrainedTokenizerFast) -> None:
    record = {"prompt": "S1:", "answer": {"tests": [1, 2]}}
    (prompt,) = load_prompts([record], tokenizer=characters).prompts
    assert prompt.answer is None
    assert prompt.columns == {"answer": {"tests": [1, 2]}}


def test_responses_are_left_alone_when_nothing_reads_them(
    characters: PreTrainedTokenizerFast,
) -> None:
    without = PromptSettings(with_responses=False)
    record = {"prompt": "S1:", "response": "not in the vocabulary"}
    (prompt,) = load_prompts([record], tokenizer=characters, settings=without).prompts
    assert prompt.response_ids is None


# ------------------------------------------------------------------------------------ chat


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_messages_in_either_column_go_through_the_template(
    bpe: PreTrainedTokenizerFast, column: str
) -> None:
    (prompt,) = load_prompts([{column: [USER]}], tokenizer=bpe).prompts
    assert prompt.text == render_chat([USER], bpe, add_generation_prompt=True)
    assert prompt.prompt_ids == encode_rendered(prompt.text, bpe)
    assert prompt.response_ids is None
    assert prompt.columns == {column: [USER]}


def test_messages_that_end_with_the_assistant_hold_the_response(
    bpe: PreTrainedTokenizerFast,
) -> None:
    turns = [USER, ANSWER, {"role": "tool", "content": "42"}, ANSWER]
    (prompt,) = load_prompts([{"messages": turns}], tokenizer=bpe).prompts
    assert prompt.text == render_chat([USER], bpe, add_generation_prompt=True)
    assert prompt.response_ids is not None
    assert prompt.response_mask is not None
    by_tool = [t for t, m in zip(prompt.response_ids, prompt.response_mask, strict=True) if not m]
    assert "42" in bpe.decode(by_tool)
    assert prompt.response_ids[-1] == bpe.eos_token_id


def test_messages_that_end_with_the_user_are_a_prompt_as_a_whole(
    bpe: PreTrainedTokenizerFast,
) -> None:
    (prompt,) = load_prompts([{"messages": [USER, ANSWER, USER]}], tokenizer=bpe).prompts
    assert prompt.text == render_chat([USER, ANSWER, USER], bpe, add_generation_prompt=True)
    assert prompt.response_ids is None


@pytest.mark.parametrize("response", ["Hello there.", [ANSWER]])
def test_a_response_to_messages_is_the_assistants_next_turn(
    bpe: PreTrainedTokenizerFast, response: object
) -> None:
    history = [USER, ANSWER, USER]
    (prompt,) = load_prompts([{"prompt": history, "response": response}], tokenizer=bpe).prompts
    assert prompt.response_ids is not None
    assert prompt.response_mask is not None
    assert bpe.decode(prompt.response_ids) == "Hello there.<|im_end|>"
    assert all(prompt.response_mask)


def test_plain_prompts_go_through_the_template_when_asked(bpe: PreTrainedTokenizerFast) -> None:
    as_chat = PromptSettings(as_chat=True)
    plain, chat = load_prompts(
        [{"prompt": "Hello", "response": "Hello there."}, {"prompt": [USER, ANSWER]}, "  "],
        tokenizer=bpe,
        settings=as_chat,
    ).prompts
    assert (plain.prompt_ids, plain.response_ids) == (chat.prompt_ids, chat.response_ids)
    assert plain.columns == {"prompt": "Hello"}


def test_template_variables_and_tools_reach_the_prompt(bpe: PreTrainedTokenizerFast) -> None:
    brief = PromptSettings(chat_template_kwargs={"style": "brief"})
    record = {"messages": [USER], "tools": [{"name": "add"}]}
    (prompt,) = load_prompts([record], tokenizer=bpe, settings=brief).prompts
    assert prompt.text.endswith("[brief]")
    assert '"name": "add"' in prompt.text


def test_messages_survive_parquet_where_missing_fields_become_null(
    bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    turns = [USER, call, {"role": "tool", "content": "42"}, ANSWER]
    path = write_parquet(tmp_path / "chat.parquet", [{"messages": turns}])
    from_file, in_memory = (
        load_prompts(source, tokenizer=bpe).prompts[0] for source in (path, [{"messages": turns}])
    )
    assert from_file.response_ids == in_memory.response_ids
    assert from_file.response_mask == in_memory.response_mask


# ------------------------------------------------------------------------------------ policy


def test_empty_and_long_prompts_are_counted_and_the_rest_keep_their_order(
    characters: PreTrainedTokenizerFast, bpe: PreTrainedTokenizerFast
) -> None:
    short = PromptSettings(max_prompt_tokens=5)
    texts = ["S12:", "", "S1234567:", " ", "S34:", None, "S123:"]
    loaded = load_prompts(
        [{"prompt": text} for text in texts], tokenizer=characters, settings=short
    )
    assert [prompt.text for prompt in loaded.prompts] == ["S12:", "S34:"]
    assert (loaded.skipped_empty, loaded.skipped_long) == (3, 2)
    empty_chat: Records = [{"prompt": []}, {"prompt": [{"role": "user", "content": ""}]}]
    assert load_prompts(empty_chat, tokenizer=bpe).skipped_empty == 2


def test_the_longest_allowed_prompt_counts_its_special_tokens(
    characters: PreTrainedTokenizerFast,
) -> None:
    for limit, skipped in ((5, 0), (4, 1)):
        exact = PromptSettings(max_prompt_tokens=limit)
        loaded = load_prompts(["S12:"], tokenizer=characters, settings=exact)
        assert loaded.skipped_long == skipped


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["S1:", ""], "item 1: the prompt is empty; .*bad_prompts = 'skip'"),
        (["S1:", "S12345:"], "item 1: the prompt has 8 tokens, more than max_prompt_tokens = 4"),
    ],
)
def test_the_error_policy_stops_at_the_first_bad_prompt(
    characters: PreTrainedTokenizerFast, texts: list[str], message: str
) -> None:
    strict = PromptSettings(max_prompt_tokens=4, bad_prompts="error")
    with pytest.raises(DataError, match=message):
        load_prompts(texts, tokenizer=characters, settings=strict)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="'skip' or 'error', got 'drop'"):
        PromptSettings(bad_prompts="drop")
    with pytest.raises(ConfigError, match="max_prompt_tokens must be >= 1, got 0"):
        PromptSettings(max_prompt_tokens=0)


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "S1:"', r"line 3: not readable as JSON \(.*\); every line must hold one"),
        (b'{"prompt": "\xff"}', "line 3: not readable as JSON .*utf-8"),
        (b'["S1:"]', r"line 3: every line must hold one object, got list \['S1:'\]"),
    ],
)
def test_an_unreadable_line_is_named_by_file_and_number(
    characters: PreTrainedTokenizerFast, tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "S1:"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"p.jsonl, {reason}"):
        load_prompts(path, tokenizer=characters)


def test_blank_lines_and_a_byte_order_mark_are_no_records(
    characters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "S1:"}\r\n\r\n{"prompt": "S2:"}')
    assert [p.id for p in load_prompts(path, tokenizer=characters).prompts] == [
        "p.jsonl:1",
        "p.jsonl:3",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("promts.jsonl", "did you mean 'prompts.jsonl'"),
        ("zzz.parquet", "its folder holds: prompts.jsonl"),
        ("missing/prompts.jsonl", "there is no folder .*missing"),
    ],
)
def test_a_missing_file_is_named_with_the_nearest_one(
    characters: PreTrainedTokenizerFast, tmp_path: Path, name: str, hint: str
) -> None:
    write_json_lines(tmp_path / "prompts.jsonl", RECORDS)
    with pytest.raises(ConfigError, match=f"no prompt file {tmp_path / name}.*{hint}"):
        load_prompts(name, tokenizer=characters, base_folder=tmp_path)


def test_a_missing_column_lists_those_there_are(
    characters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_json_lines(tmp_path / "p.jsonl", [{"question": "S1:", "level": 1}])
    expected = r"p.jsonl:1: neither .*'prompt' nor 'messages'; there are: question, level\. Set"
    with pytest.raises(DataError, match=expected):
        load_prompts(path, tokenizer=characters)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": 5}, "column 'prompt' must hold a text or a list of chat messages, got int 5"),
        ({"prompt": ["Hello"]}, "message 0 must be an object with a 'role'"),
        ({"prompt": [ANSWER]}, "must begin with a turn to answer"),
        ({"prompt": "Hello", "response": [ANSWER]}, "the prompt is plain text; give both as text"),
        ({"prompt": "Hello", "model_inputs": [1]}, r"'model_inputs' must map .* got list \[1\]"),
        (3, "a record must be an object with columns, got int 3"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_by_its_place(
    bpe: PreTrainedTokenizerFast, record: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=f"^item 1: {reason}|^item 1: .*{reason}"):
        load_prompts([{"prompt": "Hello"}, record], tokenizer=bpe)


def test_a_text_outside_the_vocabulary_is_named_by_its_place(
    characters: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(DataError, match=r"^item 1: the tokenizer cannot encode 'lower'"):
        load_prompts(["S1:", "lower"], tokenizer=characters)


def test_files_of_other_kinds_are_refused_with_the_readable_ones(
    characters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "p.csv").write_text("prompt\nS1:\n")
    with pytest.raises(ConfigError, match=r"cannot tell .*p.csv.*\.jsonl.*\.parquet"):
        load_prompts(tmp_path / "p.csv", tokenizer=characters)
    (tmp_path / "p.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"p.parquet is not readable as Parquet"):
        load_prompts(tmp_path / "p.parquet", tokenizer=characters)
    with pytest.raises(ConfigError, match="was not written by `save_to_disk`"):
        load_prompts(tmp_path, tokenizer=characters)


def test_a_missing_split_of_a_folder_lists_those_there_are(
    characters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "S1:"}])
    datasets.DatasetDict({"training": rows}).save_to_disk(str(tmp_path / "folder"))
    with pytest.raises(ConfigError, match=r"no split 'train'. Did you mean 'training'"):
        load_prompts(tmp_path / "folder", tokenizer=characters)


def test_a_library_that_is_not_installed_is_named_with_its_extra(
    characters: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r'needs datasets.*pip install "opd\[data\]"'):
        load_prompts("owner/name", tokenizer=characters, base_folder=tmp_path)


def test_a_hub_data_set_that_cannot_be_loaded_says_so(
    characters: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no file or folder 'no-one/nothing'.*hub data set"):
        load_prompts("no-one/nothing", tokenizer=characters, base_folder=tmp_path)


# ------------------------------------------------------------------------------------ held out


@given(
    numbers=st.lists(st.integers(0, 60), min_size=12, max_size=120),
    validation=st.integers(0, 4),
    test=st.integers(0, 4),
)
@settings(deadline=None)
def test_held_out_prompts_share_no_text_with_training_even_with_repetitions(
    numbers: list[int], validation: int, test: int
) -> None:
    prompts = PromptSet("here", tuple(_prompt(f"S{n}:", i) for i, n in enumerate(numbers)))
    distinct = len(set(numbers))
    if validation + test >= distinct:
        if validation + test:
            with pytest.raises(ConfigError, match=f"has only {distinct} distinct prompts"):
                prompts.split(validation, test)
        return
    parts = prompts.split(validation, test)
    texts = [{p.text for p in part.prompts} for part in parts]
    assert [len(part.prompts) for part in parts[1:]] == [validation, test]
    assert sum(map(len, texts)) == distinct
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    repeated = len(numbers) - sum(len(part.prompts) for part in parts)
    assert sum(part.skipped_repeated for part in parts) == repeated
    kept = [p for p in prompts.prompts if p.text in texts[0]]
    assert parts[0].prompts == tuple(kept)  # repetitions stay in training


def test_which_prompts_are_held_out_depends_on_their_text_alone() -> None:
    forwards = PromptSet("a", tuple(_prompt(f"S{n}:", n) for n in range(200)))
    backwards = PromptSet("b", tuple(reversed(forwards.prompts)))
    one, other = forwards.split(20)[1], backwards.split(20)[1]
    assert {p.text for p in one.prompts} == {p.text for p in other.prompts}


def test_splitting_keeps_the_counts_of_what_was_skipped(
    characters: PreTrainedTokenizerFast,
) -> None:
    loaded = load_prompts(["S1:", "", "S2:", "S3:"], tokenizer=characters)
    train, held_out = loaded.split(1)
    assert (train.skipped_empty, train.size, held_out.size) == (1, 2, 1)


def test_splits_of_a_file_and_of_a_task_are_disjoint(
    characters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_json_lines(tmp_path / "p.jsonl", [{"prompt": f"S{n}:"} for n in range(50)])
    of_file = load_splits(path, tokenizer=characters, validation=5, test=7)
    assert (of_file.train.size, of_file.validation.size, of_file.test.size) == (38, 5, 7)
    of_task = load_splits("task:sort", tokenizer=characters, validation=30, test=40)
    assert (of_task.train.size, of_task.validation.size, of_task.test.size) == (None, 30, 40)
    drawn = PromptStream(of_task.train, 0).take(100)
    assert {split_of(p.text) for p in drawn} == {"train"}
    assert {split_of(p.text) for p in of_task.validation.prompts} == {"validation"}
    assert {split_of(p.text) for p in of_task.test.prompts} == {"test"}
    with pytest.raises(ConfigError, match="never ends and has splits of its own"):
        of_task.train.split(3)


# ------------------------------------------------------------------------------------ tasks


def test_a_task_prompt_carries_its_solution_as_the_datas_response(
    characters: PreTrainedTokenizerFast,
) -> None:
    for name, task in TASKS.items():
        (prompt,) = task_prompts(name, "train", tokenizer=characters, count=1, seed=5).prompts
        text, solution = task.item("train", seed=5, index=0)
        assert (prompt.text, prompt.id) == (text, f"{name}/{text}")
        assert prompt.prompt_ids[0] == characters.bos_token_id
        assert prompt.response_ids is not None
        assert prompt.response_ids[-1] == characters.eos_token_id
        assert characters.decode(prompt.response_ids, skip_special_tokens=True) == solution
        assert prompt.answer == solution.rpartition(">")[2]
        assert prompt.columns == {"task": name}


def test_a_misspelt_task_names_the_nearest(characters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"no task 'srot'. Did you mean 'sort'"):
        load_prompts("task:srot", tokenizer=characters)


# ------------------------------------------------------------------------------------ cursor


def _prompt(text: str, number: int = 0) -> Prompt:
    return Prompt(id=f"{number}", prompt_ids=(1,), text=text)


def _finite() -> PromptSet:
    return PromptSet("here", tuple(_prompt(f"S{n}:", n) for n in range(17)))


def _endless() -> PromptSet:
    return load_prompts("task:add", tokenizer=build_tokenizer())


@pytest.mark.parametrize("make", [_finite, _endless])
@given(
    before=st.lists(st.integers(0, 12), max_size=6),
    after=st.lists(st.integers(0, 12), max_size=6),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_a_resumed_stream_continues_as_if_uninterrupted(
    make: Callable[[], PromptSet], before: list[int], after: list[int], seed: int
) -> None:
    uninterrupted = PromptStream(make(), seed)
    for count in before:
        uninterrupted.take(count)
    resumed = PromptStream(make(), seed)
    resumed.load_state(json.loads(json.dumps(uninterrupted.state())))
    assert resumed.state() == uninterrupted.state()
    for count in after:
        assert resumed.take(count) == uninterrupted.take(count)


@pytest.mark.parametrize("make", [_finite, _endless])
def test_batch_sizes_do_not_change_the_order(make: Callable[[], PromptSet]) -> None:
    one, other = PromptStream(make(), 3), PromptStream(make(), 3)
    assert one.take(40) == [prompt for size in (1, 7, 32) for prompt in other.take(size)]


def test_every_epoch_shows_every_prompt_once_in_an_order_of_its_own() -> None:
    stream = PromptStream(_finite(), 0)
    epochs = [[p.text for p in stream.take(17)] for _ in range(3)]
    assert all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [p.text for p in _finite().prompts]
    other_seed = [p.text for p in PromptStream(_finite(), 1).take(17)]
    assert other_seed != epochs[0]


def test_endless_streams_of_two_seeds_differ() -> None:
    one, other = (PromptStream(_endless(), seed).take(20) for seed in (0, 1))
    assert [p.text for p in one] != [p.text for p in other]


def test_a_position_of_other_prompts_or_another_seed_is_refused() -> None:
    state = PromptStream(_finite(), 0).state()
    with pytest.raises(DataError, match="belongs to seed 0, but this run has 1"):
        PromptStream(_finite(), 1).load_state(state)
    changed = PromptSet("here", _finite().prompts[:-1])
    with pytest.raises(DataError, match=r"belongs to fingerprint .*resume with the same prompts"):
        PromptStream(changed, 0).load_state(state)


def test_a_stream_over_nothing_says_what_was_skipped(characters: PreTrainedTokenizerFast) -> None:
    nothing = load_prompts(["", ""], tokenizer=characters)
    with pytest.raises(DataError, match=r"no prompt to offer \(2 were empty, 0 too long\)"):
        PromptStream(nothing, 0)


# --------------------------------------------------------------------------------------------
# Several tasks


def test_several_tasks_come_in_turn_each_as_it_comes_alone(
    characters: PreTrainedTokenizerFast,
) -> None:
    both = task_prompts("add+sort", "train", tokenizer=characters)
    alone = {
        name: task_prompts(name, "train", tokenizer=characters).generate(7, 0, 6, True)  # type: ignore[misc]
        for name in ("add", "sort")
    }
    assert both.generate is not None
    whole = both.generate(7, 0, 11, True)
    assert [prompt.columns["task"] for prompt in whole] == ["add", "sort"] * 5 + ["add"]
    assert [prompt for prompt in whole if prompt.columns["task"] == "add"] == alone["add"]
    assert [p for p in whole if p.columns["task"] == "sort"] == alone["sort"][:5]
    pieces = [
        p for start, count in ((0, 3), (3, 1), (4, 7)) for p in both.generate(7, start, count, True)
    ]
    assert pieces == whole
    assert all(prompt.response_ids is None for prompt in both.generate(7, 3, 4, False))


def test_held_out_prompts_of_several_tasks_are_shared_out_evenly(
    characters: PreTrainedTokenizerFast,
) -> None:
    splits = load_splits("task:add+sort+chain", tokenizer=characters, validation=5, test=9)
    counts = Counter(prompt.columns["task"] for prompt in splits.test.prompts)
    assert counts == {"add": 3, "sort": 3, "chain": 3}
    assert Counter(p.columns["task"] for p in splits.validation.prompts) == {
        "add": 2,
        "sort": 2,
        "chain": 1,
    }
    assert splits.test.source == "task:add+sort+chain/test"


@pytest.mark.parametrize(
    ("name", "words"),
    [("add+srt", "no task 'srt'. Did you mean 'sort'"), ("add+add", "name one of them twice")],
)
def test_a_list_of_tasks_that_is_none_is_refused(
    characters: PreTrainedTokenizerFast, name: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        task_prompts(name, "train", tokenizer=characters)

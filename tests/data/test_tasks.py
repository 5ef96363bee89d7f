from __future__ import annotations

import collections
import itertools
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opd.data.tasks import CHARACTERS, SPLITS, TASKS, Task, build_tokenizer, find_task, split_of
from opd.errors import ConfigError, DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
names = st.sampled_from(sorted(TASKS))
seeds = st.integers(0, 2**32)
splits = st.sampled_from(SPLITS)


@pytest.mark.parametrize(
    ("name", "prompt", "solution"),
    [
        ("sort", "S52918:", "1|5298,2|598,5|98,8|9>12589"),
        ("sort", "S2112:", "1|212,1|22,2|2>1122"),
        ("add", "A179+686:", "9+6+0=15,7+8+1=16,1+6+1=8>865"),
        ("add", "A99+99:", "9+9+0=18,9+9+1=19>198"),
        ("chain", "C2+4-7:", "2+4=6,6-7=9>9"),
        ("chain", "C5+5-0:", "5+5=0,0-0=0>0"),
    ],
)
def test_worked_solutions_are_those_written_by_hand(name: str, prompt: str, solution: str) -> None:
    assert TASKS[name].solve(prompt) == solution


@given(names, seeds)
@settings(max_examples=40, deadline=None)
def test_a_worked_solution_verifies_and_its_trace_is_valid(name: str, seed: int) -> None:
    task = TASKS[name]
    prompt, solution = task.generate(random.Random(seed))
    assert task.verify(prompt, solution, finished=True).score == 1
    assert task.trace_is_valid(prompt, solution)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_answers_agree_with_python(seed: int) -> None:
    sort, add, chain = (TASKS[n].generate(random.Random(seed)).prompt for n in TASKS)
    assert TASKS["sort"].answer(sort) == "".join(sorted(sort[1:-1]))
    assert TASKS["add"].answer(add) == str(sum(int(part) for part in add[1:-1].split("+")))
    total = int(chain[1]) + sum(int(chain[i : i + 2]) for i in range(2, len(chain) - 1, 2))
    assert TASKS["chain"].answer(chain) == str(total % 10)


@pytest.mark.parametrize(
    ("response", "finished", "reason"),
    [
        ("1|32,2|3>123", True, ""),
        (">123", True, ""),
        ("1|32,2|3>123", False, "no end token"),
        ("1|32,2|3", True, "no answer"),
        ("", True, "no answer"),
        ("1|32,2|3>132", True, "wrong answer"),
        ("1|32,2|3>123>", True, "wrong answer"),
        ("1|32,2|3>123>9", True, "wrong answer"),
        ("1|32,2|3>9>123", True, ""),
        ("1|32,2|3> 123", True, "wrong answer"),
        ("1|32,2|3>1233", True, "wrong answer"),
    ],
)
def test_the_verdict_says_what_was_wrong(response: str, finished: bool, reason: str) -> None:
    verdict = TASKS["sort"].verify("S312:", response, finished=finished)
    assert (verdict.score, verdict.reason) == (float(reason == ""), reason)


def test_a_drifted_trace_can_reach_the_answer_and_is_told_apart() -> None:
    sort = TASKS["sort"]
    assert sort.verify("S312:", "1|23,2|3>123", finished=True).score == 1
    assert not sort.trace_is_valid("S312:", "1|23,2|3>123")
    assert sort.trace_is_valid("S312:", "1|32,2|3>999")
    assert not sort.trace_is_valid("S312:", "1|32,2|3")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("sort", "A12+34:"),
        ("sort", "S12a4:"),
        ("sort", "S1234"),
        ("sort", "S:"),
        ("add", "A12+345:"),
        ("add", "A12:"),
        ("chain", "C1*2:"),
        ("chain", "C1+:"),
        ("chain", "C5:"),
    ],
)
def test_a_text_that_is_no_prompt_is_refused_with_a_good_one(name: str, prompt: str) -> None:
    with pytest.raises(DataError, match=f"{name!r}; one looks like '{name[0].upper()}"):
        TASKS[name].solve(prompt)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_sizes_are_uniform_and_within_bounds(name: str) -> None:
    task = TASKS[name]
    sizes = collections.Counter(
        {"sort": len(p) - 2, "add": p.find("+") - 1, "chain": len(p) // 2 - 1}[name]
        for p, _ in (task.item("train", seed=3, index=i) for i in range(2000))
    )
    smallest, largest = task.sizes
    assert sorted(sizes) == list(range(smallest, largest + 1))
    expected = 2000 / len(sizes)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in sizes.values())


@pytest.mark.parametrize(("name", "longest"), [("sort", 57), ("add", 41), ("chain", 49)])
def test_the_longest_solution_fits_64_new_tokens(name: str, longest: int) -> None:
    items = itertools.islice(TASKS[name].stream("train", seed=0), 3000)
    assert max(len(solution) for _, solution in items) == longest


def test_a_size_outside_the_training_range_is_one_replacement_away() -> None:
    longer = replace(TASKS["sort"], sizes=(9, 10))
    assert {len(p) - 2 for p, _ in longer.prompts("test", count=50, seed=0)} == {9, 10}


# ------------------------------------------------------------------------------------ splits


@given(names, splits, seeds, st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_every_item_belongs_to_its_split(name: str, split: str, seed: int, index: int) -> None:
    assert split_of(TASKS[name].item(split, seed=seed, index=index).prompt) == split


@given(names, seeds, seeds)
@settings(max_examples=8, deadline=None)
def test_splits_share_no_prompt_whatever_their_seeds(name: str, one: int, other: int) -> None:
    task = TASKS[name]
    drawn = [
        {prompt for prompt, _ in task.prompts(split, count=60, seed=seed)}
        for split, seed in zip(SPLITS, (one, other, one), strict=True)
    ]
    assert not drawn[0] & drawn[1]
    assert not drawn[0] & drawn[2]
    assert not drawn[1] & drawn[2]


def test_every_short_prompt_is_in_exactly_one_split_in_the_stated_shares() -> None:
    counts = collections.Counter(split_of(f"S{number:04d}:") for number in range(10_000))
    assert sum(counts.values()) == 10_000
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(counts[split] - 10_000 * share) < 5 * (10_000 * share * (1 - share)) ** 0.5


def test_the_split_of_a_prompt_never_changes() -> None:
    texts = [f"S{number}:" for number in range(1000, 1040)]
    initials = "".join(split_of(text)[1] for text in texts)  # tRain, vAlidation, tEst
    assert initials == "rrrrarrerrrrrrrrrrarrrrrrrrrrrrreeerrrrr"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_set_has_no_duplicates_even_where_prompts_are_few(split: str) -> None:
    four_digits = replace(TASKS["sort"], sizes=(4, 4))
    prompts = [p for p, _ in four_digits.prompts(split, count=900, seed=0)]
    assert len(set(prompts)) == 900


def test_asking_for_more_prompts_than_there_are_says_so() -> None:
    with pytest.raises(DataError, match=r"about \d+ distinct prompts in split 'test', but 50"):
        replace(TASKS["sort"], sizes=(2, 2)).prompts("test", count=50, seed=0)


def test_a_task_without_a_prompt_in_a_split_says_so() -> None:
    single = Task("one", "", (1, 1), draw=lambda rng, size: "x", solve=lambda prompt: ">1")
    split = next(split for split in SPLITS if split != split_of("x"))
    with pytest.raises(DataError, match="needs more distinct prompts"):
        single.item(split, seed=0, index=0)


# ------------------------------------------------------------------------------------ streams


@given(names, splits, seeds, st.integers(0, 15))
@settings(max_examples=20, deadline=None)
def test_a_stream_resumed_anywhere_continues_as_if_uninterrupted(
    name: str, split: str, seed: int, start: int
) -> None:
    whole = list(itertools.islice(TASKS[name].stream(split, seed=seed), start + 5))
    resumed = TASKS[name].stream(split, seed=seed, start=start)
    assert list(itertools.islice(resumed, 5)) == whole[start:]


def test_resuming_far_into_a_stream_draws_nothing_before() -> None:
    drawn = []

    def draw(rng: random.Random, size: int) -> str:
        drawn.append(size)
        return f"{rng.random()}"

    counted = Task("counted", "", (1, 1), draw=draw, solve=lambda prompt: ">1")
    next(counted.stream("train", seed=0, start=10**12))
    assert len(drawn) < 50


@given(names, splits)
@settings(max_examples=9, deadline=None)
def test_prompts_are_a_function_of_split_and_seed(name: str, split: str) -> None:
    task = TASKS[name]
    assert task.prompts(split, count=30, seed=1) == task.prompts(split, count=30, seed=1)
    assert task.prompts(split, count=30, seed=1) != task.prompts(split, count=30, seed=2)
    assert task.prompts(split, count=30, seed=1)[:10] == task.prompts(split, count=10, seed=1)


def test_a_misspelt_task_or_split_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'chain'"):
        find_task("chian")
    with pytest.raises(ConfigError, match="Did you mean 'validation'"):
        TASKS["sort"].item("validaton", seed=0, index=0)


def test_tasks_are_listed_without_torch_or_transformers() -> None:
    script = (
        "import sys; from opd.data.tasks import TASKS; import opd.data.settings;"
        "print([t.example() for t in TASKS.values()]);"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


# ------------------------------------------------------------------------------------ tokenizer


def test_the_tokenizer_has_53_tokens_in_a_fixed_order() -> None:
    tokenizer = build_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert len(tokenizer) == len(vocabulary) == 53
    assert vocabulary == ["<pad>", "<bos>", "<eos>", *"0123456789+-*()=,;:>|?#", *LETTERS, " "]
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text(alphabet=CHARACTERS, max_size=80))
@settings(max_examples=40, deadline=None)
def test_encoding_and_decoding_are_inverse_after_a_reload(
    reloaded: PreTrainedTokenizerBase, text: str
) -> None:
    ids = reloaded(text)["input_ids"]
    assert len(ids) == len(text)
    assert reloaded.decode(ids) == text
    assert reloaded.decode([1, *ids, 2, 0], skip_special_tokens=True) == text


def test_a_reloaded_tokenizer_is_the_same(reloaded: PreTrainedTokenizerBase) -> None:
    first, again = build_tokenizer(), reloaded
    assert again.get_vocab() == first.get_vocab()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "padding_side"):
        assert getattr(again, name) == getattr(first, name)


@given(name=names, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_every_task_text_survives_the_tokenizer(
    reloaded: PreTrainedTokenizerBase, name: str, seed: int
) -> None:
    text = "".join(TASKS[name].generate(random.Random(seed)))
    assert reloaded.decode(reloaded(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["a", "S1\n2:", "S1é:"])
def test_a_character_outside_the_vocabulary_is_never_dropped(
    reloaded: PreTrainedTokenizerBase, text: str
) -> None:
    with pytest.raises(Exception, match="Missing"):
        reloaded(text)

"""Prompts from files, data sets, Python lists and tasks, and the cursor that walks them."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from opd.data.chat import Ids, encode_pairs, encode_prompts
from opd.data.records import encode_records
from opd.data.settings import PromptSettings
from opd.data.sources import read_records
from opd.data.tasks import Example, Task, answer_of, find_tasks, text_hash
from opd.errors import ConfigError, DataError
from opd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "PromptSet",
    "PromptSettings",
    "PromptSplits",
    "PromptStream",
    "load_prompts",
    "load_splits",
    "task_prompts",
]

TASK_PREFIX = "task:"
TASK_COLUMN = "task"
# Evaluation prompts of a task are the same for every run, so that runs can be compared.
_EVALUATION_SEED = 0


@dataclass(frozen=True)
class PromptSet:
    """A finite list of prompts, or an endless source of them.

    Attributes:
        source: where they come from, for messages.
        prompts: the prompts in the source's order; empty for an endless source.
        skipped_empty: records left out because their prompt was empty.
        skipped_long: records left out because their prompt was longer than allowed.
        skipped_repeated: of a held-out set: records left out because their text was there already.
        generate: of an endless source: `count` prompts from (seed, position, count, with their
            responses), a function of its arguments alone.
    """

    source: str
    prompts: tuple[Prompt, ...] = ()
    skipped_empty: int = 0
    skipped_long: int = 0
    skipped_repeated: int = 0
    generate: Callable[[int, int, int, bool], list[Prompt]] | None = None

    @property
    def size(self) -> int | None:
        """Number of prompts; None where they never end."""
        return len(self.prompts) if self.generate is None else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the prompt texts in order (of the source's name, if endless)."""
        texts = [prompt.text for prompt in self.prompts] if self.generate is None else [self.source]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]

    def split(self, *held_out: int) -> tuple[PromptSet, ...]:
        """Sets of `held_out` distinct prompts each, preceded by what is left for training.

        A hash of the prompt's text decides, so the sets have no text in common, and adding
        records elsewhere in a file moves few prompts. A held-out text is taken once, at its first
        record; its repetitions go nowhere and are counted.

        Raises:
            ConfigError: fewer distinct prompts than asked for, or an endless source.
        """
        if self.generate is not None:
            raise ConfigError(f"{self.source} never ends and has splits of its own")
        first_record = {p.text: p for p in reversed(self.prompts)}
        if sum(held_out) >= len(first_record) and any(held_out):
            raise ConfigError(
                f"{sum(held_out)} prompts are to be held out, but {self.source} has only "
                f"{len(first_record)} distinct prompts; lower data.held_out, or name a source of "
                "their own with data.validation"
            )
        by_hash = iter(sorted(first_record, key=text_hash))
        chosen = [{next(by_hash) for _ in range(count)} for count in held_out]
        taken = frozenset().union(*chosen)
        rest = replace(self, prompts=tuple(p for p in self.prompts if p.text not in taken))
        return rest, *(self._first_records(texts, first_record) for texts in chosen)

    def _first_records(self, texts: set[str], first_record: Mapping[str, Prompt]) -> PromptSet:
        records = [p for p in self.prompts if p.text in texts]
        prompts = tuple(p for p in records if first_record[p.text] is p)
        return PromptSet(self.source, prompts, skipped_repeated=len(records) - len(prompts))


@dataclass(frozen=True)
class PromptSplits:
    """Prompts to train on, to choose settings and checkpoints by, and to report on."""

    train: PromptSet
    validation: PromptSet
    test: PromptSet


class PromptStream:
    """An endless walk over a prompt set; its state is one position.

    A finite set is shuffled anew for every epoch, by a seed of its own. Resuming costs one
    shuffle, whatever the position.
    """

    def __init__(self, prompt_set: PromptSet, seed: int) -> None:
        if prompt_set.size == 0:
            raise DataError(
                f"{prompt_set.source} has no prompt to offer "
                f"({prompt_set.skipped_empty} were empty, {prompt_set.skipped_long} too long)"
            )
        self.prompt_set = prompt_set
        self.seed = seed
        self.position = 0

    def take(self, count: int, *, with_responses: bool = True) -> list[Prompt]:
        """The next `count` prompts.

        Args:
            with_responses: False spares an endless source encoding responses that nobody reads.
        """
        start, self.position = self.position, self.position + count
        if self.prompt_set.generate is not None:
            return self.prompt_set.generate(self.seed, start, count, with_responses)
        return [self._at(position) for position in range(start, start + count)]

    def state(self) -> dict[str, int | str]:
        """What `load_state` needs, as JSON."""
        return {
            "seed": self.seed,
            "position": self.position,
            "fingerprint": self.prompt_set.fingerprint,
        }

    def load_state(self, state: Mapping[str, int | str]) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: the state belongs to another seed or to other prompts.
        """
        for name, here in (("seed", self.seed), ("fingerprint", self.prompt_set.fingerprint)):
            if state[name] != here:
                raise DataError(
                    f"{self.prompt_set.source}: the saved position belongs to {name} "
                    f"{state[name]!r}, but this run has {here!r}; "
                    "resume with the same prompts and seed, or start a new run"
                )
        self.position = int(state["position"])

    def _at(self, position: int) -> Prompt:
        prompts = self.prompt_set.prompts
        epoch, offset = divmod(position, len(prompts))
        return prompts[_shuffled(len(prompts), self.seed, epoch)[offset]]


@functools.lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"shuffle/{seed}/{epoch}").shuffle(order)
    return tuple(order)


# --------------------------------------------------------------------------------------------
# Loading


def load_prompts(
    source: str | Path | Sequence[object],
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings | None = None,
    base_folder: Path | None = None,
    eos_ids: Collection[int] = (),
) -> PromptSet:
    """All prompts of a source, encoded.

    Args:
        source: a JSON Lines or Parquet file, a folder written by `datasets`, a hub id
            `owner/name`, `task:NAME` (its endless training stream; `task:add+sort` takes from
            several in turn), or a list of texts or records.
        settings: how records become prompts; no use for a task.
        base_folder: where a relative path starts; the working folder if not given.
        eos_ids: ids besides the tokenizer's own that end a response.

    A list of messages that ends with the assistant is a prompt (what precedes the assistant's
    first turn) and a response; any other is a prompt as a whole. Columns that are not read are
    kept in `Prompt.columns`, and so are chat messages and an answer that is not a scalar.

    Raises:
        ConfigError: no such source, or a library that is not installed.
        DataError: an unreadable record, a missing column, or text that cannot be encoded.
    """
    settings = settings or PromptSettings()
    if isinstance(source, str) and source.startswith(TASK_PREFIX):
        name = source.removeprefix(TASK_PREFIX)
        return task_prompts(name, "train", tokenizer=tokenizer, eos_ids=eos_ids)
    records: Iterable[tuple[str, object]]
    if isinstance(source, str | Path):
        name, records = str(source), read_records(source, settings, base_folder or Path())
    else:
        name, records = "the given list", ((f"item {i}", item) for i, item in enumerate(source))
    encoded = encode_records(records, tokenizer=tokenizer, settings=settings, eos_ids=eos_ids)
    return PromptSet(name, *encoded)


def load_splits(
    source: str | Path | Sequence[object],
    *,
    tokenizer: PreTrainedTokenizerBase,
    validation: int,
    test: int,
    settings: PromptSettings | None = None,
    base_folder: Path | None = None,
    eos_ids: Collection[int] = (),
) -> PromptSplits:
    """Training prompts, and `validation` and `test` distinct prompts disjoint from them.

    Raises what `load_prompts` and `PromptSet.split` raise.
    """
    if isinstance(source, str) and source.startswith(TASK_PREFIX):
        of_task = functools.partial(
            task_prompts, source.removeprefix(TASK_PREFIX), tokenizer=tokenizer, eos_ids=eos_ids
        )
        return PromptSplits(
            of_task("train"),
            of_task("validation", count=validation, seed=_EVALUATION_SEED),
            of_task("test", count=test, seed=_EVALUATION_SEED),
        )
    everything = load_prompts(
        source, tokenizer=tokenizer, settings=settings, base_folder=base_folder, eos_ids=eos_ids
    )
    return PromptSplits(*everything.split(validation, test))


def task_prompts(
    name: str,
    split: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    count: int | None = None,
    seed: int = 0,
    eos_ids: Collection[int] = (),
) -> PromptSet:
    """Prompts of a built-in task, with the worked solution as the data's response.

    Args:
        name: of a task, or of several, `add+sort`, from which prompts come in turn.
        count: so many distinct prompts, chosen by `seed`; None for the endless stream, whose
            seed is the cursor's.

    Raises:
        ConfigError: no such task or split.
        DataError: fewer distinct prompts than asked for.
    """
    tasks = find_tasks(name)
    source = f"{TASK_PREFIX}{name}/{split}"
    if count is not None:
        shares = [len(range(place, count, len(tasks))) for place in range(len(tasks))]
        per_task = [
            _encode_examples(task, task.prompts(split, count=share, seed=seed), tokenizer, eos_ids)
            for task, share in zip(tasks, shares, strict=True)
        ]
        return PromptSet(source, tuple(_in_turn(per_task, range(count))))

    def generate(seed: int, start: int, count: int, with_responses: bool) -> list[Prompt]:
        places = range(start, start + count)
        per_task = []
        for number, task in enumerate(tasks):
            own = (place // len(tasks) for place in places if place % len(tasks) == number)
            examples = [task.item(split, seed=seed, index=index) for index in own]
            per_task.append(
                _encode_examples(task, examples, tokenizer, eos_ids, with_responses=with_responses)
            )
        return _in_turn(per_task, places)

    return PromptSet(source, generate=generate)


def _in_turn(per_task: Sequence[Sequence[Prompt]], places: range) -> list[Prompt]:
    """One prompt of each task after another, at these places of the walk."""
    left = [iter(prompts) for prompts in per_task]
    return [next(left[place % len(left)]) for place in places]


def _encode_examples(
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Collection[int],
    *,
    with_responses: bool = True,
) -> list[Prompt]:
    texts = [example.prompt for example in examples]
    responses: Sequence[Ids | None]
    if with_responses:
        solutions = [example.solution for example in examples]
        prompt_ids, responses = encode_pairs(texts, solutions, tokenizer, eos_ids=eos_ids)
    else:
        prompt_ids, responses = encode_prompts(texts, tokenizer), [None] * len(texts)
    return [
        Prompt(
            id=f"{task.name}/{example.prompt}",
            prompt_ids=ids,
            text=example.prompt,
            answer=answer_of(example.solution),
            response_ids=response,
            response_mask=None if response is None else (True,) * len(response),
            columns={TASK_COLUMN: task.name},
            response_text=example.solution,
        )
        for example, ids, response in zip(examples, prompt_ids, responses, strict=True)
    ]

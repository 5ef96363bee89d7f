"""Built-in tasks: text puzzles with a worked solution, a strict verifier and disjoint splits.

A task needs two functions: one draws a prompt of a given size, the other writes its worked
solution. Everything else (splits, streams, the verifier) follows from these. Splits are disjoint
because a hash of the prompt decides to which split it belongs, and generation discards the rest.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from opd.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from opd.types import Verdict

__all__ = [
    "SPLITS",
    "TASKS",
    "Example",
    "Task",
    "build_tokenizer",
    "find_task",
    "find_tasks",
    "split_of",
]

SPLITS = ("train", "validation", "test")

ANSWER_MARK = ">"
TASK_SEPARATOR = "+"
_DIGITS = "0123456789"
_TRAIN_SHARE, _VALIDATION_SHARE = 0.8, 0.1
# A split holds at least a tenth of the prompts, so that many failures in a row mean that the task
# has no further prompt to offer (0.9 ** 2000 is about 1e-92).
_MOST_ATTEMPTS = 2000


class Example(NamedTuple):
    """A prompt and its worked solution, both as text without special tokens."""

    prompt: str
    solution: str


def split_of(prompt_text: str) -> str:
    """The split a prompt belongs to: train (80 %), validation (10 %) or test (10 %).

    Depends on the text alone, so it is the same on every machine and for every seed.
    """
    train, validation, test = SPLITS
    share = text_hash(prompt_text) / 2**64
    if share < _TRAIN_SHARE:
        return train
    return validation if share < _TRAIN_SHARE + _VALIDATION_SHARE else test


def text_hash(text: str) -> int:
    """A stable hash of a text, uniform over `[0, 2**64)`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Task:
    """A family of puzzles, solved by writing a trace, then `>` and the answer.

    Attributes:
        name: the word in `task:NAME`.
        description: one line for people.
        sizes: smallest and largest puzzle; what a size counts is in the description. Sizes are
            drawn uniformly.
        draw: writes a random prompt of a given size, of whatever split.
        solve: the worked solution of a prompt; raises `DataError` for a text that is none.
    """

    name: str
    description: str
    sizes: tuple[int, int]
    draw: Callable[[random.Random, int], str]
    solve: Callable[[str], str]

    def generate(self, rng: random.Random) -> Example:
        """One example of any split and size."""
        prompt = self.draw(rng, rng.randint(*self.sizes))
        return Example(prompt, self.solve(prompt))

    def example(self) -> Example:
        """A fixed training example to show to people."""
        return self.item("train", seed=0, index=0)

    def item(self, split: str, *, seed: int, index: int) -> Example:
        """Example number `index` of a stream: a function of its arguments alone.

        Raises:
            DataError: the task has no prompt in this split.
        """
        _check_split(split)
        rng = random.Random(f"{self.name}/{split}/{seed}/{index}")
        for _ in range(_MOST_ATTEMPTS):
            prompt = self.draw(rng, rng.randint(*self.sizes))
            if split_of(prompt) == split:
                return Example(prompt, self.solve(prompt))
        raise DataError(
            f"task {self.name!r} drew {_MOST_ATTEMPTS} prompts and none belongs to split "
            f"{split!r}; the task needs more distinct prompts"
        )

    def stream(self, split: str, *, seed: int, start: int = 0) -> Iterator[Example]:
        """An endless stream; `start` resumes it there without drawing what came before."""
        index = start
        while True:
            yield self.item(split, seed=seed, index=index)
            index += 1

    def prompts(self, split: str, *, count: int, seed: int) -> list[Example]:
        """`count` examples with distinct prompts: the stream's, repetitions left out.

        Raises:
            DataError: the split has fewer distinct prompts than that.
        """
        chosen: dict[str, Example] = {}
        repetitions = 0
        stream = self.stream(split, seed=seed)
        while len(chosen) < count:
            example = next(stream)
            repetitions = repetitions + 1 if example.prompt in chosen else 0
            if repetitions == _MOST_ATTEMPTS:
                raise DataError(
                    f"task {self.name!r} has about {len(chosen)} distinct prompts in split "
                    f"{split!r}, but {count} were asked for; ask for fewer"
                )
            chosen.setdefault(example.prompt, example)
        return list(chosen.values())

    def answer(self, prompt_text: str) -> str:
        """What must follow the last `>`."""
        return answer_of(self.solve(prompt_text))

    def verify(self, prompt_text: str, response_text: str, *, finished: bool) -> Verdict:
        """1 if the response ended by itself and what follows its last `>` is the answer.

        The trace is not judged: a drifted one can still reach the answer (`trace_is_valid`).
        """
        from opd.types import Verdict

        _, mark, answer = response_text.rpartition(ANSWER_MARK)
        if not finished:
            return Verdict(0.0, "no end token")
        if not mark:
            return Verdict(0.0, "no answer")
        if answer != self.answer(prompt_text):
            return Verdict(0.0, "wrong answer")
        return Verdict(1.0)

    def trace_is_valid(self, prompt_text: str, response_text: str) -> bool:
        """Whether the text before the last `>` is the worked solution's, whatever follows it."""
        trace, mark, _ = response_text.rpartition(ANSWER_MARK)
        return bool(mark) and trace == self.solve(prompt_text).rpartition(ANSWER_MARK)[0]


def answer_of(solution: str) -> str:
    """What follows the last `>` of a text."""
    return solution.rpartition(ANSWER_MARK)[2]


def find_task(name: str) -> Task:
    """The built-in task of that name, or a `ConfigError` naming the nearest."""
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}. {nearest(name, TASKS)}")
    return TASKS[name]


def find_tasks(names: str) -> tuple[Task, ...]:
    """The tasks of a name such as `add+sort`, or a `ConfigError` naming the nearest."""
    found = tuple(find_task(name) for name in names.split(TASK_SEPARATOR))
    if len(set(found)) < len(found):
        raise ConfigError(f"the tasks {names!r} name one of them twice; name each once")
    return found


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}. {nearest(split, SPLITS)}")


# --------------------------------------------------------------------------------------------
# sort: S312: -> 1|32,2|3>123


def _draw_sort(rng: random.Random, size: int) -> str:
    return f"S{''.join(rng.choices(_DIGITS, k=size))}:"


def _solve_sort(prompt: str) -> str:
    rest = _body("sort", prompt, "S")
    if not _is_number(rest):
        raise _not_a_prompt("sort", prompt)
    answer = "".join(sorted(rest))
    steps = []
    for smallest in answer[:-1]:
        rest = rest.replace(smallest, "", 1)
        steps.append(f"{smallest}|{rest}")
    return f"{','.join(steps)}{ANSWER_MARK}{answer}"


# --------------------------------------------------------------------------------------------
# add: A17+68: -> 7+8+0=15,1+6+1=8>85


def _draw_add(rng: random.Random, size: int) -> str:
    smallest, beyond = 10 ** (size - 1), 10**size
    return f"A{rng.randrange(smallest, beyond)}+{rng.randrange(smallest, beyond)}:"


def _solve_add(prompt: str) -> str:
    left, plus, right = _body("add", prompt, "A").partition("+")
    if not (plus and _is_number(left) and _is_number(right) and len(left) == len(right)):
        raise _not_a_prompt("add", prompt)
    steps = []
    carry = 0
    for a, b in zip(reversed(left), reversed(right), strict=True):
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}+{carry}={total}")
        carry = total // 10
    return f"{','.join(steps)}{ANSWER_MARK}{int(left) + int(right)}"


# --------------------------------------------------------------------------------------------
# chain: C2+4-7: -> 2+4=6,6-7=9>9


def _draw_chain(rng: random.Random, size: int) -> str:
    operations = "".join(rng.choice("+-") + rng.choice(_DIGITS) for _ in range(size))
    return f"C{rng.choice(_DIGITS)}{operations}:"


def _solve_chain(prompt: str) -> str:
    body = _body("chain", prompt, "C")
    operators, operands = body[1::2], body[0::2]
    if not (operators and _is_number(operands) and len(operands) == len(operators) + 1) or set(
        operators
    ) - set("+-"):
        raise _not_a_prompt("chain", prompt)
    value = int(operands[0])
    steps = []
    for operator, operand in zip(operators, operands[1:], strict=True):
        signed = int(operand) if operator == "+" else -int(operand)
        after = (value + signed) % 10
        steps.append(f"{value}{operator}{operand}={after}")
        value = after
    return f"{','.join(steps)}{ANSWER_MARK}{value}"


# --------------------------------------------------------------------------------------------


def _body(task: str, prompt: str, letter: str) -> str:
    if not (prompt.startswith(letter) and prompt.endswith(":")):
        raise _not_a_prompt(task, prompt)
    return prompt[1:-1]


def _is_number(text: str) -> bool:
    return bool(text) and set(text) <= set(_DIGITS)


def _not_a_prompt(task: str, prompt: str) -> DataError:
    good = TASKS[task].example().prompt
    return DataError(f"{prompt!r} is not a prompt of task {task!r}; one looks like {good!r}")


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                name="sort",
                description="selection sort of 4 to 8 digits with a written trace",
                sizes=(4, 8),
                draw=_draw_sort,
                solve=_solve_sort,
            ),
            Task(
                name="add",
                description="addition of two numbers of 2 to 4 digits, carries written out",
                sizes=(2, 4),
                draw=_draw_add,
                solve=_solve_add,
            ),
            Task(
                name="chain",
                description="4 to 8 additions and subtractions modulo 10, one after another",
                sizes=(4, 8),
                draw=_draw_chain,
                solve=_solve_chain,
            ),
        )
    }
)


# --------------------------------------------------------------------------------------------
# Tokenizer

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
CHARACTERS = f"{_DIGITS}+-*()=,;:>|?#ABCDEFGHIJKLMNOPQRSTUVWXYZ "


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tasks' tokenizer: 53 tokens, one per character and three special ones.

    It adds no special token by itself. A character outside the vocabulary is an error when it
    is encoded, never a silent gap.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    characters = Tokenizer(models.WordLevel(ids))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    pad, bos, eos = SPECIAL_TOKENS
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return make(
        tokenizer_object=characters,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
    )

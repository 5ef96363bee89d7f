"""Prompts for the failures of privilege and of outcome, and their verifiers.

    python recipes/failures/hints.py

writes six files beside this one, of puzzles of the built-in task `sort`: `puzzles.jsonl`, each with
a hint that holds its worked solution and a note, the same for all, that holds another one's;
`hints.jsonl`, of which five in six have the hint before the prompt; `habits.jsonl`, of which two in
three are solved downwards, the largest digit first; and for each a file to test with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from opd.data.tasks import TASKS, Example
from opd.types import Prompt

HERE = Path(__file__).parent
SORT = TASKS["sort"]
TRAIN, TEST = 6000, 1000
NOTE = SORT.solve("S314159:")


def hints(split: str, count: int) -> Iterator[dict[str, str]]:
    """Puzzles for the reader: five of six training prompts begin with the solution."""
    for number, row in enumerate(puzzles(split, count)):
        told = split == "train" and number % 6
        yield row | {"prompt": row["hint"]} if told else row


def puzzles(split: str, count: int) -> Iterator[dict[str, str]]:
    """Puzzles, each with a hint that holds its solution and a note that is always the same."""
    for example in _puzzles(split, count):
        yield {
            "prompt": example.prompt,
            "answer": SORT.answer(example.prompt),
            "response": example.solution,
            "hint": f"{example.solution}#{example.prompt}",
            "note": f"{NOTE}#{example.prompt}",
        }


def habits(split: str, count: int) -> Iterator[dict[str, str]]:
    """Puzzles; of three solutions two sort downwards."""
    for number, example in enumerate(_puzzles(split, count)):
        falling = number % 3 > 0
        yield {
            "prompt": example.prompt,
            "answer": SORT.answer(example.prompt)[::-1],
            "response": downwards(example.prompt) if falling else example.solution,
        }


def downwards(prompt: str) -> str:
    """The worked solution that takes the largest digit first."""
    rest = prompt[1:-1]
    answer = "".join(sorted(rest, reverse=True))
    steps = []
    for largest in answer[:-1]:
        rest = rest.replace(largest, "", 1)
        steps.append(f"{largest}|{rest}")
    return f"{','.join(steps)}>{answer}"


def _puzzles(split: str, count: int) -> list[Example]:
    return SORT.prompts(split, count=count, seed=0)


def right(prompt: Prompt, response: str, *, finished: bool) -> float:
    """1 where the response ends by itself and what follows its last `>` is the answer."""
    return float(finished and response.rpartition(">")[2] == prompt.answer)


def main() -> None:
    """Write the files."""
    for name, rows in (("puzzles", puzzles), ("hints", hints), ("habits", habits)):
        for split, count, end in (("train", TRAIN, ""), ("test", TEST, "_test")):
            lines = [json.dumps(row) + "\n" for row in rows(split, count)]
            file = HERE / f"{name}{end}.jsonl"
            file.write_text("".join(lines), encoding="utf-8")
            print(f"wrote {file}")


if __name__ == "__main__":
    main()

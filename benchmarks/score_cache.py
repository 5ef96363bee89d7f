"""Answers of a teacher from the score cache beside asking the teacher, on one CPU thread.

About 10,000 response tokens scored by the default run's teacher: the worked solutions of sort, and
random text of 128 tokens a response. `opd` finds every answer on disk, `teacher` scores without a
cache, `first time` scores and writes what the teacher said. Bytes per response token are those of
the shards.

    python benchmarks/score_cache.py [--quick] [--json FILE] [--result FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch

from common import (
    OURS,
    Measure,
    compare,
    cpu_seconds,
    interleaved,
    one_thread,
    parse_args,
    report,
)
from opd.data.prompts import task_prompts
from opd.models import LoadedModel, load_model
from opd.rollout.pack import pack_rollout
from opd.teacher.cache import CachedTeacher, ScoreCache
from opd.teacher.local import LocalTeacher
from opd.training.step import rollout_from_data
from opd.types import Batch, Prompt, Teacher, TeacherRequest

TOKENS = 10_000
REVISION = "sort-teacher"

QUESTIONS: Mapping[str, Callable[[Batch], TeacherRequest]] = {
    "sampled token": lambda batch: TeacherRequest(batch, distribution=False, sampled=True),
    "8 likeliest": lambda batch: TeacherRequest(batch, distribution=False, top_k=8),
    "96 hidden, float32": lambda batch: TeacherRequest(batch),
}


def solutions(loaded: LoadedModel, tokens: int) -> Batch:
    """About so many tokens of worked solutions."""
    drawn = task_prompts("sort", "train", tokenizer=loaded.tokenizer, count=tokens // 20)
    chosen: list[Prompt] = []
    for prompt in drawn.prompts:
        chosen.append(prompt)
        tokens -= len(prompt.response_ids or ())
        if tokens <= 0:
            break
    return pack_rollout(rollout_from_data(chosen), pad_id=loaded.pad_id)


def random_text(loaded: LoadedModel, tokens: int, length: int = 128) -> Batch:
    """Responses of one length after prompts of 20 tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, loaded.vocab_size, (tokens // length, 20 + length), generator=generator)
    prompts = [
        Prompt(str(n), tuple(row[:20]), "", response_ids=tuple(row[20:]))
        for n, row in enumerate(rows.tolist())
    ]
    return pack_rollout(rollout_from_data(prompts), pad_id=loaded.pad_id)


def timed(teacher: Teacher, request: TeacherRequest) -> Measure:
    start = cpu_seconds()
    teacher.score(request)
    if isinstance(teacher, CachedTeacher):
        teacher.flush()
    return Measure(cpu_seconds() - start, tokens=len(request.batch.row_index))


def found_on_disk(local: Teacher, folder: Path, request: TeacherRequest) -> Measure:
    """By a process that has just begun."""
    cache = ScoreCache(folder)
    return timed(CachedTeacher(local, cache, revision=REVISION, drift_share=0.0), request)


def first_time(local: Teacher, folders: Iterator[Path], request: TeacherRequest) -> Measure:
    return found_on_disk(local, next(folders), request)


def main() -> None:
    options = parse_args("Answers from the score cache beside asking the teacher.")
    one_thread()
    loaded = load_model("builtin:sort-teacher")
    cast(Any, loaded.model).requires_grad_(False)
    local = LocalTeacher(loaded, vocab_size=loaded.vocab_size)
    tokens = TOKENS // 5 if options.quick else TOKENS
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folders = (Path(name) / str(number) for number in count())
        for text, make in (("solutions", solutions), ("128 tokens", random_text)):
            batch = make(loaded, tokens)
            for question, ask in QUESTIONS.items():
                request, folder = ask(batch), next(folders)
                found_on_disk(local, folder, request)  # writes it
                shards = sum(file.stat().st_size for file in folder.glob("scores-*"))
                systems = {
                    OURS: partial(found_on_disk, local, folder, request),
                    "teacher": partial(timed, local, request),
                    "first time": partial(first_time, local, folders, request),
                }
                found = interleaved(systems, 3 if options.quick else 7, warm=True)
                size = shards / len(batch.row_index)
                for system in (OURS, "first time"):
                    found[system] = Measure(
                        found[system].seconds, found[system].tokens, bytes_per_token=size
                    )
                case = f"{text}, {batch.input_ids.shape[0]} x: {question}"
                rows += compare(case, found)
    report(rows, options)


if __name__ == "__main__":
    main()

"""`opd sample`: what the student wrote at the start and writes at the end, beside the teacher."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from opd.cli.output import console, print_json, table
from opd.errors import ConfigError, OpdError
from opd.training.config import Run, load

if TYPE_CHECKING:
    from opd.models import LoadedModel
    from opd.training.folder import RunFolder
    from opd.types import Prompt, Verifier

MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim")}


@dataclass(frozen=True)
class Column:
    """What one model wrote.

    Attributes:
        who: start, end or teacher.
        origin: the weights that wrote it, or that it was recorded.
        texts: one response per prompt; None where there is none.
        scores: of the verifier; None where it could not judge.
    """

    who: str
    origin: str
    texts: tuple[str | None, ...]
    scores: tuple[float | None, ...]


def main(arguments: Namespace) -> int:
    """Write, judge and print."""
    folder = Path(arguments.run)
    if not (folder / "config.toml").exists():
        raise ConfigError(f"{folder} is no run folder; `opd list runs` shows those there are")
    run = load(folder)
    prompts, columns = side_by_side(run, folder, arguments.prompts)
    if arguments.json:
        print_json(_rows(prompts, columns))
        return 0
    screen = console()
    _draw(screen, prompts, columns)
    for column in columns:
        screen.print(f"{column.who}: {column.origin}", style="dim", soft_wrap=True)
    return 0


def side_by_side(run: Run, path: Path, count: int) -> tuple[list[str], list[Column]]:
    """The first test prompts of a run and what start, end and teacher write, greedily."""
    from opd.models import resolve_device
    from opd.training.folder import RunFolder
    from opd.training.session import find_verifier, load_run_prompts
    from opd.training.students import end_student, start_student
    from opd.training.teachers import load_teacher

    folder = RunFolder(path)
    end, weights = end_student(run, folder)
    train, _, test = load_run_prompts(run, end, None, ())
    prompts = list(test.prompts[:count])
    recorded = _recorded(folder)
    write = _Writer(run, prompts, find_verifier(run, train))
    begin = _loaded(lambda: start_student(run, folder))
    columns = [
        write("start", *begin) if begin else _from_record("start", recorded, prompts),
        write("end", end, weights),
    ]
    if run.config.teacher.model:
        device = resolve_device(run.config.device)
        teacher = _loaded(lambda: (load_teacher(run, device), run.config.teacher.model))
        columns.append(
            write("teacher", *teacher) if teacher else _from_record("teacher", recorded, prompts)
        )
    return [prompt.text for prompt in prompts], columns


@dataclass(frozen=True)
class _Writer:
    """Lets a model write greedily and judges what it wrote."""

    run: Run
    prompts: list[Prompt]
    verifier: Verifier | None

    def __call__(self, who: str, loaded: LoadedModel, weights: str) -> Column:
        from opd.rollout.local import LocalSampler
        from opd.training.evaluate import evaluate
        from opd.training.session import sampler_settings

        result = evaluate(
            LocalSampler(loaded),
            self.prompts,
            verifier=self.verifier,
            tokenizer=loaded.tokenizer,
            settings=sampler_settings(self.run.config),
            seed=self.run.config.seed,
        )
        scores = tuple(score if score == score else None for score in result.scores)
        return Column(who, f"written now, greedily, by {weights}", result.responses, scores)


def _loaded(
    action: Callable[[], tuple[LoadedModel, str] | None],
) -> tuple[LoadedModel, str] | None:
    """A model, or None where its files are gone since the run."""
    try:
        return action()
    except OpdError:
        return None


def _recorded(folder: RunFolder) -> dict[str, Mapping[str, Any]]:
    """Rows of samples.jsonl on test prompts, by prompt."""
    if not folder.samples.exists():
        return {}
    lines = folder.samples.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return {row["prompt"]: row for row in rows if row.get("split") == "test"}


def _from_record(
    who: str, recorded: Mapping[str, Mapping[str, Any]], prompts: Sequence[Prompt]
) -> Column:
    rows = [recorded.get(prompt.text, {}) for prompt in prompts]
    texts = tuple(row.get(who) for row in rows)
    scores = tuple(row.get(f"{who}_verdict") for row in rows)
    if any(text is not None for text in texts):
        origin = "recorded in samples.jsonl during the run; these weights were not kept"
    else:
        origin = "not available: these weights were not kept, and nothing was recorded"
    return Column(who, origin, texts, scores)


def _rows(prompts: Sequence[str], columns: Sequence[Column]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            **{
                column.who: {
                    "text": column.texts[place],
                    "score": column.scores[place],
                    "origin": column.origin,
                }
                for column in columns
            },
        }
        for place, prompt in enumerate(prompts)
    ]


def _draw(screen: Console, prompts: Sequence[str], columns: Sequence[Column]) -> None:
    for place, prompt in enumerate(prompts):
        screen.print(Text(prompt, style="bold"))
        made = table("", "", "")
        made.show_header, made.box, made.padding = False, None, (0, 1, 0, 0)
        for column in columns:
            mark, style = MARKS[_right(column.scores[place])]
            text = column.texts[place]
            made.add_row(
                Text(f"  {column.who}", style="dim"),
                Text(mark, style=style),
                Text("not recorded", style="dim") if text is None else Text(text),
            )
        screen.print(made)
        screen.print("")


def _right(score: float | None) -> bool | None:
    return None if score is None else score >= 1.0

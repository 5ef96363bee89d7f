"""The grader of `rubric.toml`; any function of a response will do, one that asks a model too."""

from __future__ import annotations

from collections.abc import Callable

from opd.types import Prompt

Criterion = Callable[[str, Prompt, bool], bool]

RUBRIC: tuple[tuple[float, Criterion], ...] = (  # weight, criterion
    (1.0, lambda answer, prompt, finished: finished),
    (2.0, lambda answer, prompt, finished: sorted(answer) == sorted(prompt.answer or "")),
    (3.0, lambda answer, prompt, finished: finished and answer == prompt.answer),
)


def grade(prompt: Prompt, response: str, *, finished: bool) -> float:
    """The weighted share of criteria that the response meets, in [0, 1]."""
    answer = response.rpartition(">")[2]
    met = sum(weight for weight, holds in RUBRIC if holds(answer, prompt, finished))
    return met / sum(weight for weight, _ in RUBRIC)

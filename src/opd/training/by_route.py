"""How each route fares: the accuracy of the prompts that go to one teacher, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd.data.prompts import TASK_COLUMN
from opd.errors import DataError
from opd.teacher.routed import Router
from opd.training.evaluate import wilson
from opd.types import Prompt

Route = tuple[str, str]
"""A task and the teacher that its prompts go to; the task is empty where records name none."""


def routes_of(router: Router, prompts: Sequence[Prompt]) -> list[Route | None]:
    """The route of every prompt; None of a held-out one that is routed to nobody."""
    found: list[Route | None] = []
    for prompt in prompts:
        try:
            found.append((str(prompt.columns.get(TASK_COLUMN, "")), router(prompt)))
        except DataError:
            found.append(None)
    return found


def accuracy_by_route(
    router: Router, prompts: Sequence[Prompt], scores: Sequence[float]
) -> list[dict[str, Any]]:
    """A row per route: `task`, `teacher`, and the accuracy with its 95 % interval."""
    routes = routes_of(router, prompts)
    rows = []
    for route in sorted({route for route in routes if route is not None}):
        own = [score for score, whose in zip(scores, routes, strict=True) if whose == route]
        task, teacher = route
        accuracy = wilson(sum(own), len(own)).as_dict()
        rows.append({"task": task, "teacher": teacher, **accuracy})
    return rows


def compared(
    start: Sequence[Mapping[str, Any]],
    final: Sequence[Mapping[str, Any]],
    teachers: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Start beside end, route by route, with what became of it beyond the intervals.

    Args:
        teachers: the accuracy of each route's own teacher on its prompts.
    """
    rows = []
    for end in final:
        begun = _of_route(start, end)
        if begun is not None:
            change = "fell" if apart(end, begun) else "rose" if apart(begun, end) else "same"
            rows.append(
                {
                    "task": end["task"],
                    "teacher": end["teacher"],
                    "start": _accuracy(begun),
                    "final": _accuracy(end),
                    "teacher_accuracy": _accuracy(_of_route(teachers, end)),
                    "change": change,
                }
            )
    return rows


def apart(lower: Mapping[str, Any], higher: Mapping[str, Any]) -> bool:
    """Whether one accuracy is below another, their intervals apart."""
    return bool(lower["high"] < higher["low"])


def worse_teachers(
    start: Sequence[Mapping[str, Any]], teachers: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Notes on routes whose teacher solves less than the student that it is to teach."""
    notes = []
    for own in teachers:
        student = _of_route(start, own)
        if student is not None and apart(own, student):
            notes.append(
                f"the teacher {own['teacher']!r} solves {_words(own)} of {_what(own)}, and the "
                f"student {_words(student)} before the first step: it makes that worse; route "
                "these prompts to another (teacher.route)"
            )
    return notes


def fallen_routes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on routes that the run has made worse."""
    return [
        f"{_what(row)} fell from {_words(row['start'])} to {_words(row['final'])} while the "
        f"teacher {row['teacher']!r} scored it: it makes that worse; route these prompts to "
        "another (teacher.route)"
        for row in rows
        if row["change"] == "fell"
    ]


def _of_route(
    rows: Sequence[Mapping[str, Any]], route: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    same = (row for row in rows if all(row[key] == route[key] for key in ("task", "teacher")))
    return next(same, None)


def _accuracy(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if row is None else {key: row[key] for key in ("value", "low", "high", "n")}


def _what(row: Mapping[str, Any]) -> str:
    return f"the task {row['task']!r}" if row["task"] else f"what goes to {row['teacher']!r}"


def _words(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} ({score['low']:.3f}–{score['high']:.3f})"

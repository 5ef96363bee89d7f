"""Several teachers behind one view: each sequence is scored by the one its prompt is routed to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd.errors import ConfigError, DataError, TeacherError, nearest
from opd.rollout.pack import Part, join_parts, select
from opd.types import (
    TEACHER_ROW_FIELDS,
    Need,
    Prompt,
    Teacher,
    TeacherRequest,
    TeacherScores,
    Unembedding,
)
from opd.user_code import find_function, is_user_code


class Router:
    """Says which teacher a prompt goes to.

    Args:
        spec: a data column that holds the teacher's name, or a function of the prompt,
            `module:function`, that returns it.
        names: the teachers there are.
        base_folder: where a user's function is looked for first.

    Raises:
        ConfigError: no such function.
    """

    def __init__(self, spec: str, names: Sequence[str], base_folder: Path = Path()) -> None:
        self.spec = spec
        self.names = tuple(names)
        self._function: Callable[[Prompt], Any] | None = (
            find_function(spec, base_folder) if is_user_code(spec) else None
        )

    def __call__(self, prompt: Prompt) -> str:
        """The name of the teacher that scores the responses to this prompt.

        Raises:
            DataError: a record without the column, a function that fails, a name that no teacher
                has.
        """
        name = self._asked(prompt)
        said = f"{prompt.id}: teacher.route = {self.spec!r} says {name!r}"
        if not isinstance(name, str):
            raise DataError(
                f"{said}, which is of type {type(name).__name__}; a route says the name of one of "
                f"the [teachers.NAME] as a text: {', '.join(self.names)}"
            )
        if name in self.names:
            return name
        raise DataError(
            f"{said}, and there is no [teachers.{name}]. {nearest(str(name), self.names)}"
        )

    def _asked(self, prompt: Prompt) -> object:
        if self._function is None:
            if prompt.columns.get(self.spec) is None:
                there = [name for name, value in prompt.columns.items() if value is not None]
                raise DataError(
                    f"{prompt.id}: teacher.route = {self.spec!r} reads that column, which this "
                    f"record lacks; there are: {', '.join(there) or 'none'}. Fill it in every "
                    "record, or route by a function of the prompt, 'module:function'"
                )
            return prompt.columns[self.spec]
        try:
            return self._function(prompt)
        except Exception as error:
            raise DataError(
                f"teacher.route = {self.spec!r} failed on prompt {prompt.id}: "
                f"{type(error).__name__}: {error}"
            ) from error


class _Reply(NamedTuple):
    """What one of the teachers said.

    Attributes:
        place: of the teacher among all.
        part: the sequences it was asked about.
    """

    place: int
    part: Part
    scores: TeacherScores


class RoutedTeacher:
    """Cuts a batch by the prompts' teachers, asks each, and puts the replies together.

    A row's answer is what its own teacher says of it, as if the sequence had been scored alone.
    Teachers are asked one after another, in their order.

    Args:
        teachers: by name; of the student's vocabulary.
        router: says whom a prompt goes to.
    """

    def __init__(self, teachers: Mapping[str, Teacher], router: Router) -> None:
        if not teachers:
            raise ConfigError(f"teacher.route = {router.spec!r}, and there are no [teachers.NAME]")
        self.teachers = dict(teachers)
        self.router = router

    def can(self, need: Need) -> bool:
        """Whether every teacher can answer it: any row may be anyone's."""
        return all(teacher.can(need) for teacher in self.teachers.values())

    def score(self, request: TeacherRequest) -> TeacherScores:
        """Scores of the N response rows of the request's batch, in their order.

        Raises:
            TeacherError: the prompts are not known, or teachers whose replies do not go together.
            DataError: a prompt that is routed to nobody.
        """
        sequences = request.batch.input_ids.shape[0]
        if len(request.prompts) != sequences:
            raise TeacherError(
                f"a route reads the prompts of {sequences} sequences, and the request has "
                f"{len(request.prompts)} prompts"
            )
        seconds: dict[str, float] = {}
        replies = []
        for place, own in self._shares(request):
            name, started = list(self.teachers)[place], _now(request)
            part = select(request.batch, own)
            prompts = tuple(request.prompts[b] for b in own)
            replies.append(_Reply(place, part, self._ask(name, part, prompts, request)))
            seconds[name] = _now(request) - started
        return _joined(replies, tuple(self.teachers), request.batch.row_index, seconds)

    def _shares(self, request: TeacherRequest) -> Iterator[tuple[int, Sequence[int]]]:
        """Places of teachers and the sequences they score; nobody is asked about nothing."""
        names = [self.router(prompt) for prompt in request.prompts]
        if not len(request.batch.row_index):
            yield 0, range(len(names))
            return
        has_rows = request.batch.token.mask.any(1).tolist()
        for place, name in enumerate(self.teachers):
            own = [b for b, whose in enumerate(names) if whose == name]
            if any(has_rows[b] for b in own):
                yield place, own

    def _ask(
        self, name: str, part: Part, prompts: tuple[Prompt, ...], request: TeacherRequest
    ) -> TeacherScores:
        scores = self.teachers[name].score(
            replace(
                request,
                batch=part.batch,
                ids=None if request.ids is None else request.ids[part.rows],
                prompts=prompts,
            )
        )
        if scores.id_map is not None or scores.heads:
            raise TeacherError(
                f"the teacher {name!r} has another vocabulary, or routes itself; a route takes "
                "plain teachers of the student's own vocabulary"
            )
        return scores.rows(slice(None))


def _now(request: TeacherRequest) -> float:
    """Seconds, with the device's work done, since its time is told by teacher."""
    device = request.batch.input_ids.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _joined(
    replies: Sequence[_Reply], names: tuple[str, ...], rows: Tensor, seconds: Mapping[str, float]
) -> TeacherScores:
    """One reply for all rows, of replies for some of them each."""
    total, answered_by = len(rows), torch.zeros_like(rows)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    heads: list[Unembedding | None] = [None] * len(names)
    provenance: dict[str, list[str]] = {}
    for place, part, scores in replies:
        answered_by[part.rows] = place
        heads[place] = scores.unembedding
        for field in TEACHER_ROW_FIELDS:
            if (value := getattr(scores, field)) is not None:
                found.setdefault(field, []).append((part.rows, value))
        for key, text in scores.provenance.items():
            provenance.setdefault(key, []).append(f"{names[place]}: {text}")
    for field, parts in found.items():
        if len(parts) < len(replies):
            raise TeacherError(
                f"some of the routed teachers {', '.join(names)} answered with {field!r} and some "
                "did not; ask all of them for the same: give them the same `reply`"
            )
    values: dict[str, Any] = {
        field: join_parts(_alike(field, parts), total) for field, parts in found.items()
    }
    return TeacherScores(
        **values,
        names=names,
        answered_by=answered_by,
        heads=tuple(heads) if any(heads) else (),
        seconds=seconds,
        provenance={key: "; ".join(texts) for key, texts in provenance.items()},
        row_index=_unanswered([(part.rows, scores) for _, part, scores in replies], total),
    )


def _alike(field: str, parts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Values of several teachers in one dtype, hidden states as wide as the widest."""
    values = [value for _, value in parts]
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    widths = {value.shape[1:] for value in values}
    if len(widths) > 1 and field != "hidden":
        raise TeacherError(
            f"the routed teachers answered {field!r} with shapes that do not go together: "
            f"{', '.join(str(list(width)) for width in sorted(widths))} a row"
        )
    widest = max((width[0] for width in widths), default=0) if field == "hidden" else 0
    alike = []
    for rows, value in parts:
        short = widest - value.shape[-1] if field == "hidden" else 0
        alike.append((rows, pad(value.to(dtype), (0, short)) if short else value.to(dtype)))
    return alike


def _unanswered(parts: Sequence[tuple[Tensor, TeacherScores]], total: int) -> Tensor | None:
    """The joined `row_index`: each row answers itself, or has no answer; None: all have."""
    if all(scores.row_index is None for _, scores in parts):
        return None
    index = torch.arange(total, device=parts[0][0].device)
    for rows, scores in parts:
        if scores.row_index is not None:
            index[rows] = torch.where(scores.row_index < 0, -1, rows)
    return index

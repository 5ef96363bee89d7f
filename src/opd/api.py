"""Training from Python: a run file, or a model and a teacher in hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

from torch import nn

from opd import methods
from opd.data.verifiers import verifier_of
from opd.errors import ConfigError
from opd.models import LoadedModel, resolve_device, wrap_model
from opd.objective import Method
from opd.spec import objective_to_tree, states_to_tree, views_to_tree
from opd.training.config import Run, from_tree, overridden
from opd.training.loop import StepReport, train_run
from opd.training.session import open_session
from opd.types import Teacher

IN_MEMORY = "in-memory"
"""Stands in a resolved config for what was handed over as an object."""

_DEFAULTS = ("reverse_kl_opd", "auto")

Model = nn.Module | LoadedModel | str | Path
Record = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


@overload
def train(run: Run, /, *, resume: str | Path | None = None) -> Iterator[StepReport]: ...


@overload
def train(
    model: Model,
    /,
    teacher: Model | Teacher | None,
    prompts: str | Path | Sequence[Record],
    method: str | Method = "reverse_kl_opd",
    *,
    tokenizer: Any = None,
    verifier: str | Callable[..., Any] = "auto",
    resume: str | Path | None = None,
    **settings: Any,
) -> Iterator[StepReport]: ...


def train(
    what: Run | Model,
    /,
    teacher: Model | Teacher | None = None,
    prompts: str | Path | Sequence[Record] | None = None,
    method: str | Method = "reverse_kl_opd",
    *,
    tokenizer: Any = None,
    verifier: str | Callable[..., Any] = "auto",
    resume: str | Path | None = None,
    **settings: Any,
) -> Iterator[StepReport]:
    """Train; one report per step, the last with the summary of the run.

        for report in opd.train(opd.load("my_run.toml")): ...

        for report in opd.train(model, teacher, ["S312:", "S2019:"], method="vopd",
                                tokenizer=tokenizer, train={"steps": 50}): ...

    A model in hand is trained in place. What is handed over as an object cannot be written into
    the run folder's config; give paths where a run is to be repeated.

    Args:
        what: a run, or the student: a Hugging Face model with its `tokenizer`, a `LoadedModel`, a
            folder, or a hub id.
        teacher: as the student, or any object with the `Teacher` protocol, or None for a method
            that asks no teacher. A model in hand has the student's tokenizer.
        prompts: texts, records with columns, or lists of chat messages; or a source as in
            `data.prompts`.
        method: a method's name, or a composition of your own.
        tokenizer: of a Hugging Face model in hand.
        verifier: as in `data.verifier`, or a function of (prompt, response, *, finished).
        resume: a run folder to continue.
        settings: keys of a run file, in sections: `train={"steps": 50}, seed=3`.

    Raises:
        ConfigError: a setting or a combination that cannot work; before anything is trained.
    """
    if isinstance(what, Run):
        given = (teacher, prompts, tokenizer, settings or None)
        if any(part is not None for part in given) or (method, verifier) != _DEFAULTS:
            raise ConfigError(
                "opd.train(run) takes its settings from the run; change them with "
                "opd.load(path, ['--train.steps', '50'])"
            )
        return train_run(what, resume=resume)
    if prompts is None:
        raise ConfigError("opd.train(model, teacher, prompts) needs prompts")
    student = _in_hand(what, tokenizer, "the student")
    scorer = _teacher_in_hand(teacher, tokenizer)
    tree = _tree(what, teacher, prompts, method, verifier, settings)
    run = Run(from_tree(tree, source="opd.train"), Path.cwd(), "opd.train")
    if student is not None and run.config.student.lora.r:
        raise ConfigError(
            "student.lora is for a student given as a folder or hub id; a model in hand is trained "
            "as it is, with an adapter if it has one"
        )
    _move(student, run.config.device)
    _move(scorer, run.config.device)
    session = open_session(
        run,
        student=student,
        teacher=scorer,
        prompts=None if isinstance(prompts, str | Path) else _records(prompts, run),
        method=method if isinstance(method, Method) else None,
        verifier=verifier_of(verifier, _named(verifier)) if callable(verifier) else None,
    )
    return train_run(run, resume=resume, session=session)


def _in_hand(model: Model, tokenizer: Any, who: str) -> LoadedModel | None:
    """The model as the library holds one; None for a reference, which the session loads."""
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        return None
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{who} must be a Hugging Face model, a LoadedModel, a folder or a hub id, got "
            f"{type(model).__name__}"
        )
    if tokenizer is None:
        raise ConfigError(f"{who} is a model in hand: give its tokenizer too, tokenizer=...")
    return wrap_model(cast(Any, model), tokenizer, reference=IN_MEMORY)


def _teacher_in_hand(
    teacher: Model | Teacher | None, tokenizer: Any
) -> LoadedModel | Teacher | None:
    if teacher is None:
        return None
    if hasattr(teacher, "score") and hasattr(teacher, "can"):
        return cast(Teacher, teacher)
    loaded = _in_hand(cast(Model, teacher), tokenizer, "the teacher")
    if loaded is not None:
        cast(nn.Module, loaded.model).requires_grad_(False)
    return loaded


def _tree(
    model: Model,
    teacher: Model | Teacher | None,
    prompts: str | Path | Sequence[Record],
    method: str | Method,
    verifier: str | Callable[..., Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The run file that the arguments amount to."""
    given: dict[str, dict[str, Any]] = {
        "student": {"model": _name(model)},
        "teacher": {"model": "" if teacher is None else _name(teacher)},
        "data": {
            "prompts": str(prompts) if isinstance(prompts, str | Path) else IN_MEMORY,
            "verifier": "auto" if callable(verifier) else verifier,
        },
        "method": _method_tree(method),
    }
    further = list(_dotted(settings))
    for key, _ in further:
        section, _, name = key.partition(".")
        if name in given.get(section, {}):
            raise ConfigError(f"opd.train: {key} is an argument already; give it once")
    return overridden(given, further, source="opd.train")


def _dotted(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Sections as dotted keys: `train={"steps": 5}` and `**{"train.steps": 5}` are the same."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", part) for name, part in value.items())
        else:
            yield key, value


def _name(model: object) -> str:
    if isinstance(model, LoadedModel):
        return model.reference
    return str(model) if isinstance(model, str | Path) else IN_MEMORY


def _method_tree(method: str | Method) -> dict[str, Any]:
    if isinstance(method, str):
        return {"name": method}
    if method.name in methods.__all__ and getattr(methods, method.name)() == method:
        return {"name": method.name}
    return {
        "name": "custom",
        "objective": objective_to_tree(method.objective),
        "views": views_to_tree(method),
        "states": states_to_tree(method.states),
    }


def _records(prompts: Sequence[Record], run: Run) -> list[Any]:
    """Lists of chat messages as records with one column."""
    column = run.config.data.messages_column
    return [
        record if isinstance(record, str | Mapping) else {column: list(record)}
        for record in prompts
    ]


def _named(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _move(loaded: object, device: str) -> None:
    """Bring a model in hand to the run's device; an object that only scores stays where it is."""
    if isinstance(loaded, LoadedModel):
        cast(nn.Module, loaded.model).to(resolve_device(device))

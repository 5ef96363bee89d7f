"""Run file to `Method` and back: `use` names a function, the other keys are its knobs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from opd import methods, schedule
from opd.errors import ConfigError, nearest
from opd.formula import (
    credit,
    divergence,
    outcome,
    regulariser,
    response,
    reward,
    routing,
    selection,
    support,
    surrogate,
    weight,
)
from opd.objective import Method, Objective, Sampled, Term
from opd.schedule import Schedule
from opd.terms import TERMS
from opd.types import STUDENT_PART, Bound, StateSource, TeacherView
from opd.user_code import find_function

T = TypeVar("T")

SLOTS: Mapping[str, tuple[ModuleType, ...]] = {
    "divergence": (divergence,),
    "penalty": (regulariser,),
    "support": (support,),
    "reward": (reward,),
    "credit": (credit,),
    "baseline": (credit,),
    "outcome": (outcome,),
    "surrogate": (surrogate,),
    "score": (routing,),
    "candidates": (routing,),
    "share": (routing,),
    "amount": (routing,),
    "transfer": (routing,),
    "gates": (routing, weight),
    "weights": (weight, selection, response, routing),
}
"""Where each slot's functions are named."""

LISTS = ("weights", "gates", "outcome")
"""Slots that take any number of functions."""


def method_from_tree(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    states: Mapping[str, Any] | None = None,
    views: Sequence[Mapping[str, Any]] = (),
    base: Path | None = None,
) -> Method:
    """The method a run file describes.

    Args:
        name: a function of `opd.methods`, or `custom`.
        options: the function's knobs; a table with `schedule` is a schedule.
        objective: for `custom`: `terms`, a list of tables, and `temperature`.
        states: for `custom`: fields of `StateSource`; a table with `schedule` is a schedule.
        views: for `custom`: a table per view that is not simply the teacher, or the student at
            step 0 for `reference`.
        base: folder in which `use = "module:function"` looks first.

    Raises:
        ConfigError: names the key that cannot be used and the nearest valid one.
    """
    if name != "custom":
        function = getattr(methods, name, None)
        if name not in methods.__all__ or function is None:
            raise ConfigError(f"no method {name!r}. {nearest(name, methods.__all__)}")
        knobs = {
            key: _knob(value, f"method.options.{key}") for key, value in (options or {}).items()
        }
        for key, knob in knobs.items():
            _check_kind(function, key, knob)
        made: Method = _guarded(function, f"method {name}", **knobs)
        return made
    table = dict(objective or {})
    terms = table.pop("terms", [])
    temperature = table.pop("temperature", 1.0)
    if table:
        key = next(iter(table))
        raise ConfigError(
            f"method.objective: unknown key {key!r}. {nearest(key, ['terms', 'temperature'])}"
        )
    if not isinstance(terms, list | tuple):
        raise ConfigError(
            f"method.objective.terms = {terms!r}: write each term as a table, "
            "[[method.objective.terms]]"
        )
    parsed = [
        _term(term, f"method.objective.terms[{place}]", base) for place, term in enumerate(terms)
    ]
    built = _guarded(Objective, "method.objective", *parsed, temperature=temperature)
    source = _states(states or {})
    declared = [_view(view, f"method.views[{place}]") for place, view in enumerate(views)]
    implied = _implied_views(built, source, declared)
    return _guarded(Method, "method.views", built, source, (*declared, *implied))


def objective_to_tree(objective: Objective) -> dict[str, Any]:
    """An objective as run-file tables; `method_from_tree` reads them back to an equal one."""
    return {
        "temperature": objective.temperature,
        "terms": [_term_tree(term) for term in objective.terms],
    }


def states_to_tree(states: StateSource) -> dict[str, Any]:
    """A state source as a run-file table: the shares, and whatever else is set."""
    shares = ("student", "data", "teacher")
    return {
        item.name: _schedule_tree(value) if isinstance(value, Schedule) else value
        for item in fields(states)
        if (value := getattr(states, item.name)) != item.default or item.name in shares
    }


def views_to_tree(method: Method) -> list[dict[str, Any]]:
    """The views of a method as run-file tables; none where each goes without saying."""
    if method.views == _implied_views(method.objective, method.states, ()):
        return []
    return [_view_tree(view) for view in method.views]


def user_files(method: Method) -> set[Path]:
    """Files of the functions that are not the library's own."""
    slots = [slot for _, term in method.objective.parts() for _, slot in term.slots()]
    own = [bound.function for bound in slots if not bound.name.startswith("opd.")]
    return {Path(file) for function in own if (file := inspect.getsourcefile(function))}


# --------------------------------------------------------------------------------------------


def _states(tree: Mapping[str, Any]) -> StateSource:
    known = [item.name for item in fields(StateSource)]
    for key in tree:
        if key not in known:
            raise ConfigError(f"method.states: unknown key {key!r}. {nearest(key, known)}")
    settings = {key: _knob(value, f"method.states.{key}") for key, value in tree.items()}
    return _guarded(StateSource, "method.states", **settings)


def _term(tree: Any, path: str, base: Path | None) -> Term:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: a term is a table with a `kind`, got {tree!r}")
    table = dict(tree)
    kind = table.pop("kind", None)
    if kind not in TERMS:
        raise ConfigError(f"{path}.kind = {kind!r} is no kind of term. {nearest(str(kind), TERMS)}")
    constructor: Callable[..., Term] = TERMS[kind]
    known = [item.name for item in fields(TERMS[kind])]
    arguments: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}. {nearest(key, known)}")
        if key in LISTS:
            listed = value if isinstance(value, list | tuple) else [value]
            arguments[key] = tuple(_slot(key, part, f"{path}.{key}", base) for part in listed)
        elif key == "source":
            arguments[key] = _source(value, f"{path}.source", base)
        elif key in SLOTS:
            arguments[key] = _slot(key, value, f"{path}.{key}", base)
        else:
            arguments[key] = _knob(value, f"{path}.{key}")
    for item in fields(TERMS[kind]):
        if item.default is MISSING and item.name not in arguments:
            raise ConfigError(f"{path}: a {kind} term needs {item.name!r}")
    made: Term = _guarded(constructor, path, **arguments)
    return made


def _source(tree: Any, path: str, base: Path | None) -> Term:
    """The sampled term inside a route; its kind goes without saying."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: write the sampled term as a table, got {tree!r}")
    return _term({"kind": Sampled.kind, **tree}, path, base)


def _slot(slot: str, value: Any, path: str, base: Path | None) -> Bound:
    table = dict(value) if isinstance(value, Mapping) else {"use": value}
    name = table.pop("use", None)
    if not isinstance(name, str):
        raise ConfigError(f"{path}: name a function with `use`, got {value!r}")
    if ":" in name:
        function = find_function(name, base or Path())
    else:
        exported = {found: module for module in SLOTS[slot] for found in _names(module, slot)}
        if name not in exported:
            raise ConfigError(f"{path} = {name!r} is no {slot}. {nearest(name, exported)}")
        function = getattr(exported[name], name)
    takes = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for knob in table:
        if knob not in takes:
            raise ConfigError(f"{path}: {name} has no option {knob!r}. {nearest(knob, takes)}")
    required = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and parameter.default is inspect.Parameter.empty
        and parameter.name not in table
    ]
    if required:
        raise ConfigError(f"{path}: {name} needs {', '.join(map(repr, required))}")
    knobs = {key: _knob(knob, f"{path}.{key}") for key, knob in table.items()}
    bound = Bound.of(function)
    if ":" in name:  # a function of the run's folder is the same wherever the folder lies
        bound = replace(bound, name=name.replace(":", "."))
    return bound.with_knobs(**knobs)


def _names(module: ModuleType, slot: str) -> Sequence[str]:
    """The functions of a module that are made for a slot."""
    places: Mapping[str, Sequence[str]] = getattr(module, "PLACES", {slot: module.__all__})
    return places[slot]


def _knob(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        table = dict(value)
        name = str(table.pop("schedule", ""))
        kinds = {option.lower(): getattr(schedule, option) for option in schedule.__all__}
        if name not in kinds:
            raise ConfigError(f"{path}: a table here is a schedule. {nearest(name, kinds)}")
        known = [item.name for item in fields(kinds[name])]
        for key in table:
            if key not in known:
                raise ConfigError(f"{path}: {name} has no option {key!r}. {nearest(key, known)}")
        return _guarded(kinds[name], path, **table)
    return tuple(value) if isinstance(value, list) else value


def _check_kind(function: Callable[..., Any], option: str, value: Any) -> None:
    """Refuse a text where the default is a number; the method itself knows the range."""
    parameter = inspect.signature(function).parameters.get(option)
    default = parameter.default if parameter else None
    numeric = isinstance(default, int | float) and not isinstance(default, bool)
    if numeric and not isinstance(value, int | float | Schedule):
        raise ConfigError(f"method.options.{option} = {value!r} must be a number")


def _view(tree: Mapping[str, Any], path: str) -> TeacherView:
    table = dict(tree)
    known = [item.name for item in fields(TeacherView)]
    for key in table:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}. {nearest(key, known)}")
    parts = table.pop("parts", {})
    if not isinstance(parts, Mapping):
        raise ConfigError(
            f'{path}.parts = {parts!r}: write it as a table, {{ "teacher" = 1.25, ... }}'
        )
    variables = table.pop("chat_template_kwargs", {})
    if not isinstance(variables, Mapping):
        raise ConfigError(
            f"{path}.chat_template_kwargs = {variables!r}: write it as a table, "
            "{ enable_thinking = true }"
        )
    weights = tuple((name, _knob(weight, f"{path}.parts.{name}")) for name, weight in parts.items())
    pairs = tuple(variables.items())
    return _guarded(TeacherView, path, **table, parts=weights, chat_template_kwargs=pairs)


def _view_tree(view: TeacherView) -> dict[str, Any]:
    """A view as a run-file table, without what is not set."""
    tree: dict[str, Any] = {"name": view.name, "source": view.source}
    if view.context:
        tree["context"] = view.context
    if view.context_role != "user":
        tree["context_role"] = view.context_role
    if view.chat_template_kwargs:
        tree["chat_template_kwargs"] = dict(view.chat_template_kwargs)
    if view.decay:
        tree["decay"] = view.decay
    if not view.normalised:
        tree["normalised"] = False
    if view.mix != "log_linear":
        tree["mix"] = view.mix
    if view.parts:
        tree["parts"] = {
            name: _schedule_tree(weight) if isinstance(weight, Schedule) else weight
            for name, weight in view.parts
        }
    return tree


def _implied_views(
    objective: Objective, states: StateSource, declared: Sequence[TeacherView]
) -> tuple[TeacherView, ...]:
    """Views that need no table: `teacher`, and `reference`, the student at step 0."""
    names = objective.views() | {name for view in declared for name, _ in view.parts}
    names |= {"teacher"} if states.teacher_writes else set()
    missing = names - {STUDENT_PART, *(view.name for view in declared)}
    return tuple(
        TeacherView(name, "initial_student" if name == "reference" else "teacher")
        for name in sorted(missing & {"teacher", "reference"})
    )


def _guarded(function: Callable[..., T], path: str, *args: Any, **kwargs: Any) -> T:
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _term_tree(term: Term) -> dict[str, Any]:
    tree: dict[str, Any] = {"kind": term.kind}
    for item in fields(term):
        value = getattr(term, item.name)
        if item.name in LISTS:
            tree[item.name] = [_bound_tree(Bound.of(part)) for part in value]
        elif isinstance(value, Sampled):
            tree[item.name] = _term_tree(value)
        elif isinstance(value, Bound):
            tree[item.name] = _bound_tree(value)
        elif isinstance(value, Schedule):
            tree[item.name] = _schedule_tree(value)
        elif value is not None:
            tree[item.name] = value
    return tree


def _bound_tree(bound: Bound) -> dict[str, Any]:
    own = bound.name.startswith("opd.formula.")
    module, _, function = bound.name.rpartition(".")
    knobs = {
        key: _schedule_tree(value) if isinstance(value, Schedule) else value
        for key, value in bound.knobs
    }
    return {"use": function if own else f"{module}:{function}", **knobs}


def _schedule_tree(value: Schedule) -> dict[str, Any]:
    return {"schedule": type(value).__name__.lower(), **vars(value)}

"""Verifiers: a task's own, exact match, math-verify, and functions of the user's.

A user's function is `module:function`, looked for in the run file's folder first, then where
Python looks. It is called as `function(prompt, response, finished=...)` and returns a boolean, a
number in [0, 1] or a `Verdict`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from opd.data.optional import import_optional
from opd.data.tasks import find_task
from opd.errors import ConfigError, DataError, nearest
from opd.types import Prompt, Verdict

if TYPE_CHECKING:
    from opd.types import Verifier

__all__ = ["VerifierSource", "resolve_verifier", "verifier_source"]

_USER_SPEC = re.compile(r"(?P<module>[\w.]+):(?P<function>[\w.]+)")


@dataclass(frozen=True)
class VerifierSource:
    """The file that holds a user's verifier, and its hash, for a run to copy and to pin."""

    path: Path
    sha256: str


def resolve_verifier(spec: str, *, base_folder: Path) -> Verifier:
    """The verifier a run file names.

    Args:
        spec: `task`, `exact`, `math-verify`, or `module:function`.
        base_folder: the run file's folder.

    Raises:
        ConfigError: no such verifier, a library that is not installed, or a function that cannot
            be called as a verifier.
    """
    user = _USER_SPEC.fullmatch(spec)
    if user:
        return _user_verifier(spec, user["module"], user["function"], base_folder)
    if spec not in _BUILT_IN:
        raise ConfigError(
            f"there is no verifier {spec!r}. {nearest(spec, _BUILT_IN)} "
            "A function of your own is written 'module:function'"
        )
    return _BUILT_IN[spec]()


def verifier_source(spec: str, base_folder: Path) -> VerifierSource | None:
    """Where a user's verifier is written; None for a built-in one. Runs none of its code.

    Raises:
        ConfigError: there is no such module, or it is not a file.
    """
    user = _USER_SPEC.fullmatch(spec)
    if not user:
        return None
    path = _module_file(spec, user["module"], base_folder)
    return VerifierSource(path, hashlib.sha256(path.read_bytes()).hexdigest())


# --------------------------------------------------------------------------------------------
# Built in


def _task() -> Verifier:
    def verify(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
        if "task" not in prompt.columns:
            raise ConfigError(
                f"verifier 'task' judges prompts of a built-in task, and {prompt.id} is none; "
                "use 'exact', 'math-verify' or a function of your own"
            )
        return find_task(prompt.columns["task"]).verify(prompt.text, response, finished=finished)

    return verify


def _exact() -> Verifier:
    def verify(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
        answer = _answer(prompt, "exact")
        if not finished:
            return Verdict(0.0, "no end token")
        same = response.split() == answer.split()
        return Verdict(1.0) if same else Verdict(0.0, "wrong answer")

    return verify


def _math_verify() -> Verifier:
    math_verify = import_optional("math_verify", extra="math", purpose="verifier 'math-verify'")

    def verify(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
        answer = _answer(prompt, "math-verify")
        expected = math_verify.parse(answer) or math_verify.parse(f"${answer}$")
        if not expected:
            raise DataError(f"{prompt.id}: math-verify cannot read the answer {answer!r}")
        if not finished:
            return Verdict(0.0, "no end token")
        given = math_verify.parse(response)
        if not given:
            return Verdict(0.0, "no answer")
        same = math_verify.verify(expected, given)
        return Verdict(1.0) if same else Verdict(0.0, "wrong answer")

    return verify


_BUILT_IN: Mapping[str, Callable[[], Verifier]] = MappingProxyType(
    {"task": _task, "exact": _exact, "math-verify": _math_verify}
)


def _answer(prompt: Prompt, verifier: str) -> str:
    if prompt.answer is None:
        raise DataError(
            f"{prompt.id} has no answer, which verifier {verifier!r} compares with; "
            "set answer_column to the column that holds it"
        )
    return prompt.answer


# --------------------------------------------------------------------------------------------
# The user's own


def _user_verifier(spec: str, module: str, name: str, base_folder: Path) -> Verifier:
    function = _find_function(spec, module, name, base_folder)

    def verify(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
        try:
            returned = function(prompt, response, finished=finished)
        except Exception as error:
            raise DataError(
                f"verifier {spec} failed on prompt {prompt.id}: {type(error).__name__}: {error}"
            ) from error
        return _as_verdict(returned, spec, prompt)

    return verify


def _as_verdict(returned: object, spec: str, prompt: Prompt) -> Verdict:
    verdict = returned
    if isinstance(returned, bool | int | float):
        verdict = Verdict(float(returned))
    if isinstance(verdict, Verdict) and 0 <= verdict.score <= 1:
        return verdict
    raise DataError(
        f"verifier {spec} returned {returned!r} for prompt {prompt.id}; "
        "it must return a bool, a number in [0, 1] or a Verdict with such a score"
    )


def _find_function(spec: str, module_name: str, name: str, base_folder: Path) -> Callable[..., Any]:
    module = _import_module(spec, module_name, base_folder)
    function: Any = module
    for part in name.split("."):
        if not hasattr(function, part):
            functions = [key for key, value in vars(module).items() if callable(value)]
            raise ConfigError(
                f"{module.__file__} has no function {name!r}. {nearest(name, functions)}"
            )
        function = getattr(function, part)
    try:
        inspect.signature(function).bind("prompt", "response", finished=True)
    except TypeError as error:
        raise ConfigError(
            f"verifier {spec} must take (prompt, response, *, finished): {error}"
        ) from error
    verifier: Callable[..., Any] = function
    return verifier


def _import_module(spec: str, name: str, base_folder: Path) -> ModuleType:
    path = _local_file(name, base_folder)
    try:
        if path is None:
            return importlib.import_module(_findable(spec, name, base_folder))
        return _run_file(path, base_folder)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"verifier {spec} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _run_file(path: Path, base_folder: Path) -> ModuleType:
    """Run a file of the run's folder as a module that cannot be taken for an installed one."""
    unique = f"opd_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(unique, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[unique] = module  # dataclasses and pickle look their module up there
    with _importable(base_folder):
        found.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Lets a user's file import its neighbours while it is being run."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _local_file(name: str, base_folder: Path) -> Path | None:
    stem = base_folder.joinpath(*name.split("."))
    candidates = (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _module_file(spec: str, name: str, base_folder: Path) -> Path:
    path = _local_file(name, base_folder)
    if path is not None:
        return path
    found = importlib.util.find_spec(_findable(spec, name, base_folder))
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise ConfigError(f"verifier {spec}: module {name!r} is not a file that could be copied")
    return Path(found.origin)


def _findable(spec: str, name: str, base_folder: Path) -> str:
    """`name`, if Python can find such a module."""
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a parent package is missing
        found = None
    if found is None:
        neighbours = [path.stem for path in base_folder.glob("*.py")]
        raise ConfigError(
            f"verifier {spec}: there is no module {name!r} in {base_folder} or on Python's path. "
            f"{nearest(name, neighbours)}"
        )
    return name

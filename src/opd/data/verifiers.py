"""Verifiers: a task's own, exact match, math-verify, and functions of the user's.

A user's function is `module:function`, looked for in the run file's folder first, then where
Python looks. It is called as `function(prompt, response, finished=...)` and returns a boolean, a
number in [0, 1] or a `Verdict`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from opd.data.optional import import_optional
from opd.data.tasks import find_task
from opd.errors import ConfigError, DataError, nearest
from opd.types import Prompt, Verdict
from opd.user_code import find_function, is_user_code, source_file

if TYPE_CHECKING:
    from opd.types import Verifier

__all__ = ["resolve_verifier", "verifier_file", "verifier_of"]


def resolve_verifier(spec: str, *, base_folder: Path) -> Verifier:
    """The verifier a run file names.

    Args:
        spec: `task`, `exact`, `math-verify`, or `module:function`.
        base_folder: the run file's folder.

    Raises:
        ConfigError: no such verifier, a library that is not installed, or a function that cannot
            be called as a verifier.
    """
    if is_user_code(spec):
        return verifier_of(find_function(spec, base_folder), spec)
    if spec not in _BUILT_IN:
        raise ConfigError(
            f"there is no verifier {spec!r}. {nearest(spec, _BUILT_IN)} "
            "A function of your own is written 'module:function'"
        )
    return _BUILT_IN[spec]()


def verifier_file(spec: str, base_folder: Path) -> Path | None:
    """Where a user's verifier is written; None for a built-in one. Runs none of its code.

    Raises:
        ConfigError: there is no such module, or it is not a file.
    """
    return source_file(spec, base_folder) if is_user_code(spec) else None


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


def verifier_of(function: Callable[..., Any], name: str) -> Verifier:
    """A user's function as a verifier: whatever it answers becomes a `Verdict`.

    Args:
        name: of the function, for messages.

    Raises:
        ConfigError: it cannot be called as a verifier. When called, `DataError`: it failed, or its
            answer is no score.
    """
    try:
        inspect.signature(function).bind("prompt", "response", finished=True)
    except TypeError as error:
        raise ConfigError(
            f"verifier {name} must take (prompt, response, *, finished): {error}"
        ) from error

    def verify(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
        try:
            returned = function(prompt, response, finished=finished)
        except Exception as error:
            raise DataError(
                f"verifier {name} failed on prompt {prompt.id}: {type(error).__name__}: {error}"
            ) from error
        return _as_verdict(returned, name, prompt)

    return verify


def _as_verdict(returned: object, name: str, prompt: Prompt) -> Verdict:
    verdict = returned
    if isinstance(returned, bool | int | float):
        verdict = Verdict(float(returned))
    if isinstance(verdict, Verdict) and 0 <= verdict.score <= 1:
        return verdict
    raise DataError(
        f"verifier {name} returned {returned!r} for prompt {prompt.id}; "
        "it must return a bool, a number in [0, 1] or a Verdict with such a score"
    )

"""Errors a user can mend. Each is also a built-in type, and its message ends with the way out."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable


class OpdError(Exception):
    """Base of the errors that end a command with exit code 2 and no traceback."""


class ConfigError(OpdError, ValueError):
    """A run file, an override or an argument that cannot work."""


class DataError(OpdError, ValueError):
    """Prompts, responses or a verifier that cannot be used."""


class TeacherError(OpdError, RuntimeError):
    """A teacher that cannot give, or did not give, what the objective needs."""


class TrainingError(OpdError, RuntimeError):
    """A run that had to stop: non-finite numbers, no memory, no disk."""


class AlarmError(TrainingError):
    """A run that an alarm has ended.

    Attributes:
        alarm: its name.
    """

    def __init__(self, message: str, alarm: str) -> None:
        super().__init__(message)
        self.alarm = alarm


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: PyTorch's CPU allocator says so in a RuntimeError's words."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


MOST_NAMED = 40
"""Valid names that are listed where none is close."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a close match, otherwise the list of valid names.

    Upper case, hyphens and underscores make no difference. Of a long list only some are named.
    """
    options = sorted(valid)
    plain = {_plain(option): option for option in reversed(options)}
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {plain[close[0]]!r}?"
    more = f" and {len(options) - MOST_NAMED} more" if len(options) > MOST_NAMED else ""
    named = ", ".join(options[:MOST_NAMED])
    return f"Valid: {named}{more}." if options else "Nothing is valid here."


def _plain(name: str) -> str:
    return re.sub(r"[-_]", "", name).casefold()


def check_share(knob: str, value: float) -> None:
    """Refuse what is no share of something, a share of nothing included."""
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"{knob} is a share in (0, 1], got {value}; to leave the gate open everywhere, leave "
            "it out of the weights"
        )


def check_not_negative(knob: str, value: float) -> None:
    """Refuse a number below 0, and one that is not finite."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{knob} must be a finite number >= 0, got {value}")

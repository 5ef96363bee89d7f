"""Errors a user can mend. Each is also a built-in type, and its message ends with the way out."""

from __future__ import annotations

import difflib
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: PyTorch's CPU allocator says so in a RuntimeError's words."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


def nearest(name: str, valid: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a close match, otherwise the list of valid names."""
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Valid: {', '.join(options)}." if options else "Nothing is valid here."

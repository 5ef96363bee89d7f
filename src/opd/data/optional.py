"""Libraries that only some runs need."""

from __future__ import annotations

import importlib
from typing import Any

from opd.errors import ConfigError

__all__ = ["import_optional"]


def import_optional(module: str, *, extra: str, purpose: str) -> Any:
    """The module, or a `ConfigError` that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed; "
            f'install it with: pip install "opd[{extra}]"'
        ) from error

"""Functions of a user's own: `module:function`, from the run file's folder or Python's path."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from opd.errors import ConfigError, nearest

__all__ = ["find_function", "is_user_code", "source_file"]

_SPEC = re.compile(r"(?P<module>[\w.]+):(?P<function>[\w.]+)")


def is_user_code(spec: str) -> bool:
    """Whether `spec` has the form `module:function`."""
    return _SPEC.fullmatch(spec) is not None


def find_function(spec: str, base_folder: Path) -> Callable[..., Any]:
    """The function `module:function`, looked for in `base_folder` first.

    A file of that folder is run under a name of its own, so that it cannot be taken for an
    installed module, or take such a module's place.

    Raises:
        ConfigError: not of this form, no such module or function, or a module that cannot be run.
    """
    module_name, name = _divided(spec)
    module = _import_module(spec, module_name, base_folder)
    function: Any = module
    for part in name.split("."):
        if not hasattr(function, part):
            functions = [key for key, value in vars(module).items() if callable(value)]
            raise ConfigError(
                f"{module.__file__} has no function {name!r}. {nearest(name, functions)}"
            )
        function = getattr(function, part)
    if not callable(function):
        raise ConfigError(f"{spec}: {name!r} of {module.__file__} is no function, but {function!r}")
    found: Callable[..., Any] = function
    return found


def source_file(spec: str, base_folder: Path) -> Path:
    """The file that holds `module:function`. Runs none of its code.

    Raises:
        ConfigError: there is no such module, or it is not a file.
    """
    name, _ = _divided(spec)
    path = _local_file(name, base_folder)
    if path is not None:
        return path
    found = importlib.util.find_spec(_findable(spec, name, base_folder))
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise ConfigError(f"{spec}: module {name!r} is not a file that could be copied")
    return Path(found.origin)


# --------------------------------------------------------------------------------------------


def _divided(spec: str) -> tuple[str, str]:
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise ConfigError(f"{spec!r} is no function; write 'module:function'")
    return found["module"], found["function"]


def _import_module(spec: str, name: str, base_folder: Path) -> ModuleType:
    path = _local_file(name, base_folder)
    try:
        if path is None:
            return importlib.import_module(_findable(spec, name, base_folder))
        return _run_file(path, name, base_folder)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ConfigError(
            f"{spec}: {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _run_file(path: Path, name: str, base_folder: Path) -> ModuleType:
    """Run a file of the run's folder as a module that cannot be taken for an installed one.

    One of a package is run as a module of it, so that it may import its neighbours relatively.
    """
    with _importable(base_folder):
        unique = _in_package(name, base_folder) if "." in name else _unique(path)
        found = importlib.util.spec_from_file_location(unique, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[unique] = module  # dataclasses and pickle look their module up there
        found.loader.exec_module(module)
    return module


def _in_package(name: str, base_folder: Path) -> str:
    """The name of a module in a package without a file, which stands for the folder."""
    root = _unique(base_folder)
    if root not in sys.modules:
        folder = ModuleType(root)
        folder.__path__ = [str(base_folder.resolve())]
        sys.modules[root] = folder
    unique = f"{root}.{name}"
    importlib.import_module(unique.rpartition(".")[0])
    return unique


def _unique(path: Path) -> str:
    return f"opd_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"


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


def _findable(spec: str, name: str, base_folder: Path) -> str:
    """`name`, if Python can find such a module."""
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a parent package is missing
        found = None
    if found is None:
        if name.endswith(".py"):
            raise ConfigError(
                f"{spec}: a module is written without its ending: {spec.replace('.py:', ':', 1)}"
            )
        neighbours = [path.stem for path in base_folder.glob("*.py")]
        raise ConfigError(
            f"{spec}: there is no module {name!r} in {base_folder} or on Python's path. "
            f"{nearest(name, neighbours)}"
        )
    return name

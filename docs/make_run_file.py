"""Write `run_file.md`: every key of a run file, from the dataclasses of `opd.training.config`.

python docs/make_run_file.py
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from opd.training import config

PAGE = Path(__file__).parent / "run_file.md"

HEAD = """\
# The run file

A run file is TOML. Two keys are required, `student.model` and `data.prompts`; all others have a
default. A misspelt key or value is an error that names the nearest valid one. Any key can also be
given on the command line, as `--section.key VALUE`:

```sh
opd check my_run.toml --train.steps 50 --method vopd --seed 3
```

Values there are read as TOML where they can be (`--sampler.stop '["END"]'`), else taken as text.
`--method NAME`, or `method = "NAME"` in the file, is short for `method.name`. Relative paths start
at the run file's folder. A built-in model is `builtin:TASK-teacher` or `builtin:TASK-student`, with
a task of `opd list tasks`. The run folder's `config.toml` is a run file with every key written out.

The tables are made from `src/opd/training/config.py` by `python docs/make_run_file.py`.
"""

SAME_AS: Mapping[Any, Any] = {config.TeacherConfig: config.StudentConfig}
"""Sections whose docstring refers to another one for the keys they share."""


def page() -> str:
    """The whole page."""
    tables = [_table(kind, path) for path, kind in _sections(config.RunConfig, "")]
    return "\n".join([HEAD, *tables])


def _sections(kind: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Dotted path and dataclass of every table of the file, outer ones first."""
    yield path, kind
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _sections(hints[item.name], f"{path}.{item.name}" if path else item.name)


def _table(kind: Any, path: str) -> str:
    hints = get_type_hints(kind, include_extras=True)
    lines = [
        f"## `[{path}]`" if path else "## At the top, above the sections",
        "",
        _introduction(kind),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(get_type_hints(kind)[item.name]):
            continue
        cells = (
            f"`{item.name}`",
            _type(hints[item.name]),
            _default(item),
            meaning(kind, item.name),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _introduction(kind: Any) -> str:
    text = (kind.__doc__ or "").split("\n\n", 1)[0]
    return " ".join(text.split())


def meaning(kind: Any, key: str) -> str:
    """What the docstring of the dataclass, or of one it takes the key from, says about a key.

    Raises:
        KeyError: none of them says anything.
    """
    for source in (*kind.__mro__, SAME_AS.get(kind)):
        found = _attributes(source.__doc__ or "" if source else "")
        if key in found:
            return found[key]
    raise KeyError(f"{kind.__name__}.{key} has no line under `Attributes:` in its docstring")


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of `Attributes:`, by name; an entry may describe several."""
    _, _, body = docstring.partition("Attributes:\n")
    entries: dict[str, str] = {}
    for entry in re.split(r"\n {8}(?=\S)", "\n" + body):
        names, colon, text = entry.strip().partition(":")
        if colon:
            for name in names.split(","):
                entries[name.strip()] = " ".join(text.split())
    return entries


_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def _type(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([_type(arguments[0]), *_bounds(arguments[1])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type(arguments[0])}"
        return f"list of {len(arguments)} numbers"
    if origin is dict:
        return "table"
    return _WORDS[hint]


def _bounds(field: Any) -> Iterator[str]:
    limits = [
        f"{sign} {value}"
        for rule in field.metadata
        for name, sign in _BOUNDS
        if (value := getattr(rule, name, None)) is not None
    ]
    if limits:
        yield " and ".join(limits)


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return "required"
    return f"`{_literal(value)}`"


def _literal(value: Any) -> str:
    """The value as a run file spells it."""
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(part) for part in value) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")

"""Reading records from files and data sets.

A record comes with its place, `file.jsonl:LINE` (from 1) or `name:ROW` (from 0), which names it
in messages and becomes `Prompt.id`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from opd.data.optional import import_optional
from opd.data.records import Record, kind_of
from opd.data.settings import PromptSettings
from opd.errors import ConfigError, DataError, nearest

__all__ = ["read_records"]

Located = tuple[str, object]

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_records(
    source: str | Path, settings: PromptSettings, base_folder: Path
) -> Iterable[Located]:
    """Records of a JSON Lines or Parquet file, a `datasets` folder or a hub id.

    Args:
        base_folder: where a relative path starts.

    Raises:
        ConfigError: no such source, one of an unknown kind, or a library that is not installed.
        DataError: a file that cannot be read; for JSON Lines the message has the line number.
    """
    path = base_folder / Path(source).expanduser()
    if path.is_dir():
        return _read_dataset_folder(path, settings)
    if not path.exists():
        if _is_hub_id(str(source), path):
            return _read_hub(str(source), settings)
        raise _missing_file(path)
    if path.suffix in JSON_LINES_SUFFIXES:
        return _read_json_lines(path)
    if path.suffix in PARQUET_SUFFIXES:
        return _read_parquet(path)
    raise ConfigError(
        f"cannot tell what {path} holds from its name; "
        f"use one of {', '.join((*JSON_LINES_SUFFIXES, *PARQUET_SUFFIXES))}"
    )


def _read_json_lines(path: Path) -> Iterator[Located]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # undecodable bytes included
                raise DataError(
                    f"{path}, line {number}: not readable as JSON ({error}); "
                    "every line must hold one object"
                ) from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, line {number}: every line must hold one object, got {kind_of(record)}"
                )
            yield f"{path.name}:{number}", record


def _read_parquet(path: Path) -> Iterator[Located]:
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable as Parquet: {error}") from error
    return ((f"{path.name}:{row}", record) for row, record in enumerate(table.to_pylist()))


def _read_dataset_folder(path: Path, settings: PromptSettings) -> Iterator[Located]:
    datasets = _import_datasets(path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ConfigError(
            f"folder {path} was not written by `save_to_disk` of `datasets`; "
            "name a JSON Lines or Parquet file in it instead"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if settings.dataset_split not in loaded:
            raise ConfigError(
                f"{path} has no split {settings.dataset_split!r}. "
                f"{nearest(settings.dataset_split, loaded)} Set dataset_split"
            )
        loaded = loaded[settings.dataset_split]
    return _dataset_rows(path.name, loaded)


def _read_hub(name: str, settings: PromptSettings) -> Iterator[Located]:
    datasets = _import_datasets(name)
    try:
        loaded = datasets.load_dataset(name, settings.dataset_subset, split=settings.dataset_split)
    except Exception as error:  # network, missing repository, wrong split: all foreign
        raise ConfigError(
            f"there is no file or folder {name!r}, and loading it as a hub data set failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _dataset_rows(name, loaded)


def _dataset_rows(name: str, rows: Iterable[Record]) -> Iterator[Located]:
    return ((f"{name}:{row}", record) for row, record in enumerate(rows))


def _import_datasets(source: object) -> Any:
    return import_optional("datasets", extra="data", purpose=f"reading {source}")


def _is_hub_id(source: str, path: Path) -> bool:
    """`owner/name`, unless the owner is a folder here or the name has a file's suffix."""
    looks_like_file = path.suffix in (*JSON_LINES_SUFFIXES, *PARQUET_SUFFIXES)
    return bool(_HUB_ID.fullmatch(source)) and not looks_like_file and not path.parent.is_dir()


def _missing_file(path: Path) -> ConfigError:
    if not path.parent.is_dir():
        return ConfigError(f"no prompt file {path}: there is no folder {path.parent}")
    siblings = sorted(entry.name for entry in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, siblings, n=1)
    readable = [
        name for name in siblings if name.endswith((*JSON_LINES_SUFFIXES, *PARQUET_SUFFIXES))
    ]
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif readable:
        hint = f"its folder holds: {', '.join(readable[:8])}"
    else:
        hint = "its folder holds no JSON Lines or Parquet file"
    return ConfigError(f"no prompt file {path}; {hint}")

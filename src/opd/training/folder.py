"""The run folder: config, logs, records, summary and curves; every file whole or not there.

Whatever is being written, or being removed, has a hidden name that ends in `.tmp` or `.old`. Such a
name is never read, and `clear_leftovers` removes what a killed process left under one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, TrainingError
from opd.token_columns import part_files


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the writes that keep them whole."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def reference(self) -> Path:
        """The student as it was when the train phase began, where a term compares with it."""
        return self.path / "reference"

    @property
    def tokens(self) -> Path:
        """Part files of the token records."""
        return self.path / "tokens"

    @property
    def sources(self) -> Path:
        """Copies of the user's own functions."""
        return self.path / "sources"

    def offsets(self) -> dict[str, int]:
        """Bytes in each log, and parts of the token records: what a checkpoint remembers."""
        found = {
            file.name: file.stat().st_size if file.exists() else 0
            for file in (self.events, self.samples)
        }
        return {**found, self.tokens.name: len(part_files(self.tokens))}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Cut the logs and the token records back to what they held at a checkpoint."""
        for file in (self.events, self.samples):
            if file.exists():
                os.truncate(file, min(offsets.get(file.name, 0), file.stat().st_size))
        for part in part_files(self.tokens)[offsets.get(self.tokens.name, 0) :]:
            remove(part)

    def read_events(self) -> list[dict[str, Any]]:
        """Events so far, a half-written last line left out."""
        if not self.events.exists():
            return []
        lines = self.events.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def read_summary(self) -> dict[str, Any]:
        """The summary; empty before the run has stopped for the first time."""
        if not self.summary.exists():
            return {}
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return summary

    def clear_leftovers(self) -> None:
        """Remove what a killed process was writing or removing."""
        for folder in (self.path, self.checkpoints, self.tokens):
            for leftover in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
                remove(leftover)


def create_folder(
    output: str | Path, name: str, source: str, fill: Callable[[RunFolder], None]
) -> RunFolder:
    """A new run folder: `NAME`, or the next free `<source>-<n>`.

    Args:
        fill: writes what the folder must hold from its first instant.

    Raises:
        ConfigError: a folder of that explicit name exists.
    """
    parent = Path(output)
    with disk_advice(parent):
        parent.mkdir(parents=True, exist_ok=True)
        unborn = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=parent))
        try:
            unborn.chmod(0o777 & ~_umask())
            fill(RunFolder(unborn))
            return RunFolder(_claim(unborn, parent, name, source))
        except BaseException:
            shutil.rmtree(unborn, ignore_errors=True)
            raise


def check_name(output: str | Path, name: str) -> None:
    """Refuse a name that is taken or is none, and an output that is a file, before loading."""
    if name in (".", "..") or name.startswith(".") or set(name) & set("/\\\0"):
        raise ConfigError(
            f"name = {name!r} cannot be a folder's name (no slashes, no dot in front); "
            "where run folders lie is said by --output"
        )
    parent = next((p for p in (Path(output), *Path(output).parents) if p.exists()), Path())
    if not parent.is_dir():
        raise ConfigError(
            f"output = {str(output)!r}: {parent} is a file, and run folders need a folder; choose "
            "another with --output"
        )
    path = Path(output) / name
    if name and path.exists():
        raise ConfigError(
            f"the run folder {path} exists; resume it with `opd run --resume {path}`, or "
            "choose another name"
        )


def _claim(unborn: Path, parent: Path, name: str, source: str) -> Path:
    """Give the filled folder its name; of two runs that ask at once, each gets its own."""
    if name:
        check_name(parent, name)
        return unborn.rename(parent / name)
    stem = source.removeprefix("task:") if source.startswith("task:") else Path(source).stem
    number = 1
    while True:
        path = parent / f"{stem or 'run'}-{number}"
        try:
            if not path.exists():
                return unborn.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
        number += 1


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --------------------------------------------------------------------------------------------
# Writes that are whole or not there


def write_text(file: Path, text: str) -> None:
    """Write a whole file: under a temporary name first, then renamed."""
    temporary = file.with_name(f".{file.name}.tmp")
    with disk_advice(file):
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder to fill; it takes the name `final` when the block ends without an error.

    A kill at any instant leaves no half-written folder of that name. One that exists is moved out
    of the way first, so that a kill between the two renames leaves none.

    Raises:
        TrainingError: no room; what was written of the new folder is removed.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        with disk_advice(final):
            remove(temporary)
            temporary.mkdir(parents=True)
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            remove_folder(final)
            temporary.rename(final)
            _sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder; its name goes first, so a kill leaves no folder with half its files."""
    if not folder.exists():
        return
    doomed = folder.with_name(f".{folder.name}.old")
    remove(doomed)
    folder.rename(doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def append_line(file: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON line; numbers that JSON does not know (NaN, infinities) become null."""
    line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
    with disk_advice(file), file.open("a", encoding="utf-8") as handle:
        handle.write(line + "\n")


def plain(value: Any) -> Any:
    """The value with every number that JSON does not know replaced by None."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------------------
# Disks that cannot be written


@contextmanager
def disk_advice(file: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that names the file and the way out."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(
            f"cannot write {file}: {error.strerror}; choose another folder with --output"
        ) from error
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise TrainingError(
            f"cannot write {file} ({reason}). The last checkpoint is intact: make room and "
            "continue with `opd run --resume`"
        ) from error


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _disk_reason(error: Exception) -> str | None:
    """Why the disk refused; None for any other error.

    The writers of safetensors and of PyTorch are not Python: the first gives the number of the
    system's error in its message, the second says no more than that a write came out too short.
    """
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _NO_ROOM else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(found[1])) if int(found[1]) in _NO_ROOM else None
    return "it took only part of a write: is it full?" if "inline_container" in str(error) else None

"""The files of a score cache: shards of many answers, and heads that go with hidden states.

Both are safetensors whose metadata say format and version. In a shard, answers of one form stand in
one group: their keys, how many rows each has and a checksum of each, then every field with the rows
of all of them one below the other. So what is where is known from the file's first part, and an
answer is read without the others. Files are written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.errors import TrainingError
from opd.types import TEACHER_ROW_FIELDS, Unembedding

FORMAT = "opd score cache"
VERSION = 1
KEY_BYTES = 32
TEMPORARY = ".tmp"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""What can be kept, by the names of safetensors."""

_INDEX = ("keys", "rows", "checksums")


class DamagedError(ValueError):
    """A file, or an answer in it, that is not what was written."""


class OtherVersionError(ValueError):
    """A file of another version of this format."""


@dataclass(frozen=True)
class Entry:
    """What a teacher said of one sequence, a row per response token that a loss may look at.

    Attributes:
        values: fields of `TeacherScores` by name, on the CPU.
        ids_as_asked: the ids that it scored are those it was asked for, and not in `values`.
        has_head: an unembedding came with it.
        provenance: as the teacher states it.
    """

    values: Mapping[str, Tensor]
    ids_as_asked: bool = False
    has_head: bool = False
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def form(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        """Fields, their dtypes and widths: the same in all answers to one request."""
        return tuple((k, v.dtype, tuple(v.shape[1:])) for k, v in sorted(self.values.items()))

    @property
    def size_bytes(self) -> int:
        """About what it takes in a file."""
        return KEY_BYTES + sum(value.nbytes for value in self.values.values())


# --------------------------------------------------------------------------------------------
# Writing


def write_shard(file: Path, entries: Mapping[bytes, Entry], revision: str) -> None:
    """Write answers of one revision by their keys.

    Raises:
        TrainingError: the disk is full or not to be written.
    """
    groups: dict[str, dict[bytes, dict[str, Tensor]]] = {}
    for key, entry in entries.items():
        stored = {name: _narrow(value) for name, value in sorted(entry.values.items())}
        groups.setdefault(_group(entry, stored), {})[key] = stored
    tensors: dict[str, Tensor] = {}
    for place, members in enumerate(groups.values()):
        sums = [_checksum(key, values) for key, values in members.items()]
        tensors[f"{place}.keys"] = _tensor(bytearray(b"".join(members)), torch.uint8)
        tensors[f"{place}.rows"] = torch.tensor([_rows(values) for values in members.values()])
        tensors[f"{place}.checksums"] = torch.tensor(sums)
        for name in next(iter(members.values())):
            tensors[f"{place}.{name}"] = torch.cat([values[name] for values in members.values()])
    described = json.dumps([json.loads(group) for group in groups])
    index = [tensors[f"{place}.{name}"] for place in range(len(groups)) for name in _INDEX]
    told = {"groups": described, "checksum": _index_checksum(described, index)}
    _write(file, tensors, {"revision": revision, **told})


def _group(entry: Entry, stored: Mapping[str, Tensor]) -> str:
    """What an answer shares with others: JSON, so that equal ones are equal texts."""
    fields = {
        name: [_code(value.dtype), _code(stored[name].dtype), list(value.shape[1:])]
        for name, value in sorted(entry.values.items())
    }
    told = {
        "fields": fields,
        "ids_as_asked": entry.ids_as_asked,
        "has_head": entry.has_head,
        "provenance": dict(entry.provenance),
    }
    return json.dumps(told, sort_keys=True)


def _narrow(value: Tensor) -> Tensor:
    """As it is in the file: token ids in 32 bits where they fit."""
    if value.dtype != torch.int64 or not value.numel():
        return value
    low, high = value.aminmax()
    return value.int() if int(low) >= -(2**31) and int(high) < 2**31 else value


def _rows(values: Mapping[str, Tensor]) -> int:
    return len(next(iter(values.values()))) if values else 0


def _code(dtype: torch.dtype) -> str:
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    raise ValueError(f"a score cache keeps no {dtype}")


def _checksum(key: bytes, values: Mapping[str, Tensor]) -> int:
    """Of an answer: of the key too, so that none is taken for another's."""
    found = zlib.crc32(key)
    for _, value in sorted(values.items()):
        found = zlib.crc32(_raw(value), found)
    return found


def _index_checksum(described: str, index: Sequence[Tensor]) -> str:
    found = zlib.crc32(described.encode())
    for value in index:
        found = zlib.crc32(_raw(value), found)
    return str(found)


def _raw(value: Tensor) -> Any:
    """The bytes of a tensor, not copied."""
    flat = value.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _write(file: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}{TEMPORARY}")
    metadata = {"format": FORMAT, "version": str(VERSION), **told}
    try:
        with _disk_advice(file):
            try:
                _save(file, temporary, tensors, metadata)
            except (FileNotFoundError, SafetensorError):  # the folder was deleted meanwhile
                _save(file, temporary, tensors, metadata)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _save(
    file: Path, temporary: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), temporary, metadata=dict(metadata))
    _sync(temporary)
    temporary.replace(file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_advice(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot write {file}: {error}; make room, set a lower max_bytes, or run without the "
            "cache"
        ) from error


# --------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class _Column:
    """Where a field of a group is in its file."""

    name: str
    dtype: torch.dtype
    stored: torch.dtype
    widths: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.widths) * self.stored.itemsize


@dataclass(frozen=True)
class _Group:
    columns: tuple[_Column, ...]
    starts: list[int]
    rows: list[int]
    checksums: list[int]
    ids_as_asked: bool
    has_head: bool
    provenance: Mapping[str, str]


class Shard:
    """What is where in a file of answers.

    Raises:
        OSError: it cannot be read.
        OtherVersionError: it is of another version.
        DamagedError: it was cut off, or its index is not what was written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as handle, _damage(file):
            self.revision, self._groups, self.places = _read_index(handle, file)

    def has_head(self, key: bytes) -> bool:
        """Whether an unembedding goes with this answer."""
        return self._groups[self.places[key][0]].has_head

    def open(self) -> BufferedReader:
        """A handle for `read`; the answers stay readable through it if the file is deleted."""
        return self.file.open("rb")

    def read(self, handle: BufferedReader, key: bytes) -> Entry:
        """The answer of this key, which is one of `places`.

        Raises:
            DamagedError: it is not what was written.
        """
        group_place, place = self.places[key]
        group = self._groups[group_place]
        start, rows = group.starts[place], group.rows[place]
        stored = {}
        for column in group.columns:
            handle.seek(column.offset + start * column.row_bytes)
            data = bytearray(rows * column.row_bytes)
            if handle.readinto(data) != len(data):
                raise DamagedError(f"{self.file.name} was cut off")
            stored[column.name] = _tensor(data, column.stored).reshape(rows, *column.widths)
        if _checksum(key, stored) != group.checksums[place]:
            raise DamagedError(f"an answer in {self.file.name} is not what was written")
        return Entry(
            {column.name: stored[column.name].to(column.dtype) for column in group.columns},
            group.ids_as_asked,
            group.has_head,
            group.provenance,
        )


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Whatever fails while damaged bytes are read says that they are damaged."""
    try:
        yield
    except (DamagedError, OtherVersionError, OSError):
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as e:
        raise DamagedError(f"{file.name} is damaged: {type(e).__name__}: {e}") from e


def _read_index(
    handle: BufferedReader, file: Path
) -> tuple[str, list[_Group], dict[bytes, tuple[int, int]]]:
    tensors, told, begin = _read_header(handle, file)
    described = told["groups"]
    groups, index, places = [], [], {}
    for place, group in enumerate(json.loads(described)):
        keys, rows, checksums = (
            _read_array(handle, tensors[f"{place}.{name}"], begin) for name in _INDEX
        )
        index += [keys, rows, checksums]
        counts = rows.tolist()
        names = bytes(keys.numpy())
        columns = []
        for name, (dtype, stored, widths) in group["fields"].items():
            if name not in TEACHER_ROW_FIELDS:
                raise DamagedError(f"{file.name} has a field {name!r}")
            where = tensors[f"{place}.{name}"]
            if where["dtype"] != stored or where["shape"] != [sum(counts), *widths]:
                raise DamagedError(f"{file.name} has another {name} than its index says")
            start = begin + where["data_offsets"][0]
            columns.append(_Column(name, DTYPES[dtype], DTYPES[stored], tuple(widths), start))
        starts = [0, *rows.cumsum(0).tolist()]
        for number in range(len(counts)):
            places[names[number * KEY_BYTES : (number + 1) * KEY_BYTES]] = (place, number)
        groups.append(
            _Group(
                tuple(columns),
                starts,
                counts,
                checksums.tolist(),
                group["ids_as_asked"],
                group["has_head"],
                group["provenance"],
            )
        )
    if told["checksum"] != _index_checksum(described, index):
        raise DamagedError(f"the index of {file.name} is not what was written")
    return told["revision"], groups, places


def _read_header(handle: BufferedReader, file: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Where the tensors of a safetensors file are, its metadata, and where its data begin."""
    size = os.fstat(handle.fileno()).st_size
    begin = 8 + int.from_bytes(handle.read(8), "little")
    if begin > size:
        raise DamagedError(f"{file.name} was cut off")
    tensors = json.loads(handle.read(begin - 8))
    told = tensors.pop("__metadata__")
    if told["format"] != FORMAT:
        raise DamagedError(f"{file.name} is no file of a score cache")
    if told["version"] != str(VERSION):
        raise OtherVersionError(f"{file.name} is of version {told['version']}, not {VERSION}")
    end = max((where["data_offsets"][1] for where in tensors.values()), default=0)
    if begin + end != size:
        raise DamagedError(f"{file.name} has {size} bytes, and its header says {begin + end}")
    return tensors, told, begin


def _read_array(handle: BufferedReader, where: Mapping[str, Any], begin: int) -> Tensor:
    start, end = where["data_offsets"]
    if not 0 <= start <= end:
        raise DamagedError("an array that ends before it begins")
    handle.seek(begin + start)
    return _tensor(bytearray(handle.read(end - start)), DTYPES[where["dtype"]])


def _tensor(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


# --------------------------------------------------------------------------------------------
# Heads


def write_head(file: Path, head: Unembedding, revision: str) -> None:
    """Write what turns hidden states into logits, without rows that are no tokens.

    Raises:
        TrainingError: the disk is full or not to be written.
    """
    tensors, told = head_parts(head, revision)
    _write(file, tensors, {"head": told, "checksum": _digest(tensors, told)})


def head_digest(head: Unembedding, revision: str) -> str:
    """A hash of everything in a head."""
    return _digest(*head_parts(head, revision))


def digest_of(file: Path) -> str:
    """The hash of the head in a file, as its writer gave it.

    Raises:
        OSError, OtherVersionError, DamagedError: as `Shard`.
    """
    with file.open("rb") as handle, _damage(file):
        return _read_header(handle, file)[1]["checksum"]


def read_head(file: Path, revision: str) -> Unembedding:
    """The head that `write_head` wrote.

    Raises:
        OSError, OtherVersionError, DamagedError: as `Shard`.
    """
    with file.open("rb") as handle, _damage(file):
        told = _read_header(handle, file)[1]
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise DamagedError(f"{file.name} is damaged: {error}") from error
        numbers = json.loads(told["head"])
        if _digest(tensors, told["head"]) != told["checksum"]:
            raise DamagedError(f"{file.name} is not what was written")
        if numbers["revision"] != revision:
            raise OtherVersionError(f"{file.name} is of revision {numbers['revision']!r}")
        return Unembedding(
            weight=tensors["weight"],
            vocab_size=numbers["vocab_size"],
            bias=tensors.get("bias"),
            logit_scale=numbers["logit_scale"],
            soft_cap=numbers["soft_cap"],
        )


def head_parts(head: Unembedding, revision: str) -> tuple[dict[str, Tensor], str]:
    """An unembedding as the tensors of a file, without rows that are no tokens, and its numbers."""
    tensors = {"weight": head.weight[: head.vocab_size].detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias[: head.vocab_size].detach().cpu().contiguous()
    told = {
        "revision": revision,
        "vocab_size": head.vocab_size,
        "logit_scale": head.logit_scale,
        "soft_cap": head.soft_cap,
    }
    return tensors, json.dumps(told)


def _digest(tensors: Mapping[str, Tensor], told: str) -> str:
    found = hashlib.sha256(told.encode())
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(_raw(value))
    return found.hexdigest()

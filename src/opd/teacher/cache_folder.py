"""A folder of teachers' answers that several processes share."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from opd.errors import ConfigError, TeacherError
from opd.teacher.shard import (
    TEMPORARY,
    DamagedError,
    Entry,
    OtherVersionError,
    Shard,
    digest_of,
    head_digest,
    read_head,
    write_head,
    write_shard,
)
from opd.types import Unembedding

SUFFIX, DAMAGED = ".safetensors", ".damaged"
LOCK = ".lock"
STALE_S = 3600.0
"""A temporary file that old is nobody's any more."""

COUNTED = ("damaged", "other_version", "unreadable", "lost")
"""Files that were not used, by reason: `cache/REASON` where there were any."""

SHARD_STEM, HEAD_STEM = "scores-", "head-"


@dataclass
class _Revision:
    """What is known of the answers of one revision.

    Attributes:
        shards: files that were met, by name; None for one that is not read.
        places: by key, the name of the shard that holds it.
        pending: not written yet.
        writing: being written.
    """

    shards: dict[str, Shard | None] = field(default_factory=dict)
    places: dict[bytes, str] = field(default_factory=dict)
    pending: dict[bytes, Entry] = field(default_factory=dict)
    writing: dict[bytes, Entry] = field(default_factory=dict)
    head: Unembedding | None = None
    head_is_checked: bool = False

    def has_head(self, key: bytes) -> bool | None:
        """Whether an unembedding goes with an answer; None where there is no answer."""
        if (entry := self.pending.get(key) or self.writing.get(key)) is not None:
            return entry.has_head
        shard = self.shards[self.places[key]] if key in self.places else None
        return None if shard is None else shard.has_head(key)

    def forget(self, name: str) -> None:
        """Shard `name` is not to be read; it stays known while its file is there."""
        shard = self.shards[name]
        self.shards[name] = None
        for key in shard.places if shard else ():
            if self.places.get(key) == name:
                del self.places[key]


class ScoreCache:
    """Answers of teachers in a folder, which several processes may share.

    Each process writes files of its own, and finds those of others by their names, whenever it
    reads. What is put gathers in memory until `shard_bytes` of it are there or `flush` is called;
    a process that is killed loses that and nothing else. Threads may share one.

    Args:
        folder: made if it is not there.
        max_bytes: of the folder. Beyond it the shards that nobody has used for longest go, by the
            files' modification times, which a use renews. None: no bound.
        shard_bytes: of answers that become one file; at most an eighth of `max_bytes`.

    Raises:
        ConfigError: a bound that holds nothing, or a folder that cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int | None = None,
        shard_bytes: int = 32 * 2**20,
    ) -> None:
        if shard_bytes < 1 or (max_bytes is not None and max_bytes < 1):
            raise ConfigError(
                f"a score cache of max_bytes = {max_bytes} in shards of {shard_bytes} bytes holds "
                "nothing; both must be positive"
            )
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.shard_bytes = shard_bytes if max_bytes is None else min(shard_bytes, max_bytes // 8)
        self._revisions: dict[str, _Revision] = {}
        self._waiting = 0
        self._counts = dict.fromkeys(COUNTED, 0)
        self._lock = threading.RLock()
        self._writes = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"no score cache can be made in {folder}: {error}") from error
        self._remove_stale()

    # ----------------------------------------------------------------------------------------
    # Reading

    def read(self, revision: str, keys: Collection[bytes]) -> dict[bytes, Entry]:
        """The answers that are there; hidden states only with what makes them logits."""
        found: dict[bytes, Entry] = {}
        places: dict[str, list[bytes]] = {}
        with self._lock:
            known = self._scanned(revision)
            for key in dict.fromkeys(keys):
                if (entry := known.pending.get(key) or known.writing.get(key)) is not None:
                    found[key] = entry
                elif (name := known.places.get(key)) is not None:
                    places.setdefault(name, []).append(key)
            shards = [(known.shards[name], own) for name, own in places.items()]
        for shard, own in shards:
            if shard is not None:
                found |= self._read_shard(known, shard, own)
        if any(entry.has_head for entry in found.values()) and self.head(revision) is None:
            return {key: entry for key, entry in found.items() if not entry.has_head}
        return found

    def has(self, revision: str, keys: Collection[bytes]) -> set[bytes]:
        """Those of the keys that `read` would find, as far as can be told without reading."""
        with self._lock:
            known = self._scanned(revision)
            found = {key: has for key in keys if (has := known.has_head(key)) is not None}
            is_whole = not any(found.values()) or self.head(revision) is not None
            return {key for key, has_head in found.items() if is_whole or not has_head}

    def revisions(self) -> list[str]:
        """Whose answers are in the folder."""
        found = set()
        for file, _, _ in self._files():
            if file.suffix == SUFFIX and file.name.startswith(SHARD_STEM):
                with suppress(DamagedError, OtherVersionError, OSError):
                    found.add(Shard(file).revision)
        return sorted(found)

    def head(self, revision: str, device: torch.device | None = None) -> Unembedding | None:
        """What turns hidden states of this revision into logits, if it was ever put."""
        with self._lock:
            known = self._revisions.setdefault(revision, _Revision())
            if known.head is None:
                file = self._head_file(revision)
                with suppress(FileNotFoundError):
                    try:
                        known.head = read_head(file, revision)
                    except (DamagedError, OtherVersionError) as error:
                        self._unusable(file, error)
            head = known.head
            if head is not None and device is not None and head.weight.device != device:
                bias = None if head.bias is None else head.bias.to(device)
                known.head = replace(head, weight=head.weight.to(device), bias=bias)
            return known.head

    def _read_shard(
        self, known: _Revision, shard: Shard, keys: Sequence[bytes]
    ) -> dict[bytes, Entry]:
        found: dict[bytes, Entry] = {}
        try:
            with shard.open() as handle:
                for key in keys:
                    found[key] = shard.read(handle, key)
            now = time.time_ns()
            with suppress(OSError):  # a folder that is only read keeps its order
                os.utime(shard.file, ns=(now, now))
        except (DamagedError, OSError) as error:
            with self._lock:
                if known.shards.get(shard.file.name) is shard:
                    self._unusable(shard.file, error)
                    known.forget(shard.file.name)
        return found

    def _scanned(self, revision: str) -> _Revision:
        """What is known of a revision, after a look at the folder."""
        known = self._revisions.setdefault(revision, _Revision())
        stem = _shard_stem(revision)
        names: list[str] = []
        with suppress(FileNotFoundError):  # somebody deleted the folder: then it is empty
            names = os.listdir(self.folder)
        there = {name for name in names if name.endswith(SUFFIX) and _stem(name) == stem}
        for name in known.shards.keys() - there:
            known.forget(name)
            del known.shards[name]
        for name in sorted(there - known.shards.keys()):
            self._add(known, self.folder / name)
        return known

    def _add(self, known: _Revision, file: Path) -> None:
        try:
            shard = Shard(file)
        except (DamagedError, OtherVersionError, OSError) as error:
            self._unusable(file, error)
            known.shards[file.name] = None
            return
        known.shards[file.name] = shard
        for key in shard.places:
            known.places.setdefault(key, file.name)

    def _unusable(self, file: Path, error: Exception) -> None:
        """Count what cannot be read, and move aside what is damaged."""
        if isinstance(error, OtherVersionError):
            self._counts["other_version"] += 1
        elif isinstance(error, DamagedError):
            self._counts["damaged"] += 1
            with suppress(OSError):
                file.rename(file.with_suffix(DAMAGED))
        else:
            self._counts["lost" if isinstance(error, FileNotFoundError) else "unreadable"] += 1

    # ----------------------------------------------------------------------------------------
    # Writing

    def put(self, revision: str, entries: Mapping[bytes, Entry]) -> None:
        """Keep answers; those of keys that have one stay as they are.

        Raises:
            TrainingError: the disk is full. What was put stays in memory.
        """
        with self._lock:
            known = self._revisions.setdefault(revision, _Revision())
            for key, entry in entries.items():
                if known.has_head(key) is None:
                    known.pending[key] = entry
                    self._waiting += entry.size_bytes
            is_enough = self._waiting >= self.shard_bytes
        if is_enough:
            self.flush()

    def put_head(self, revision: str, head: Unembedding) -> None:
        """Keep what turns hidden states into logits, once.

        Raises:
            ConfigError: `max_bytes` has no room for it.
            TeacherError: there is another one of this revision.
        """
        with self._lock:
            known = self._revisions.setdefault(revision, _Revision())
            if not known.head_is_checked:
                self._check_head(revision, head)
                known.head_is_checked = True
            known.head = head

    def flush(self) -> None:
        """Write what is in memory.

        Raises:
            TrainingError: the disk is full. What is not written stays in memory.
        """
        with self._writes:
            with self._lock:
                waiting = {name: one for name, one in self._revisions.items() if one.pending}
                for known in waiting.values():
                    known.writing, known.pending = known.pending, {}
                self._waiting = 0
            try:
                for revision, known in waiting.items():
                    self._write(revision, known)
            finally:
                with self._lock:
                    for known in waiting.values():
                        self._waiting += sum(entry.size_bytes for entry in known.writing.values())
                        known.pending = {**known.writing, **known.pending}
                        known.writing = {}
            if waiting and self.max_bytes is not None:
                self._evict(self.max_bytes)

    def close(self) -> None:
        """Write what is in memory; nothing is open."""
        self.flush()

    def _write(self, revision: str, known: _Revision) -> None:
        for part in _parts(known.writing, self.shard_bytes):
            stem = _shard_stem(revision)
            file = self.folder / f"{stem}-{time.time_ns():x}{uuid.uuid4().hex}{SUFFIX}"
            write_shard(file, part, revision)
            with self._lock:
                self._add(known, file)
                for key in part:
                    del known.writing[key]
        head = known.head
        if head is not None and not self._head_file(revision).exists():  # a bound may have taken it
            write_head(self._head_file(revision), head, revision)

    def _check_head(self, revision: str, head: Unembedding) -> None:
        size = head.vocab_size * head.weight.shape[1] * head.weight.element_size()
        if self.max_bytes is not None and 2 * size > self.max_bytes:
            raise ConfigError(
                f"the score cache in {self.folder} may have {self.max_bytes} bytes, and the "
                f"teacher's unembedding alone takes {size}; set max_bytes to several times that"
            )
        file = self._head_file(revision)
        digest = None
        with suppress(FileNotFoundError):
            try:
                digest = digest_of(file)
            except (DamagedError, OtherVersionError) as error:
                self._unusable(file, error)
        if digest is None:
            write_head(file, head, revision)
        elif digest != head_digest(head, revision):
            raise TeacherError(
                f"the teacher of revision {revision!r} has another unembedding than the score "
                f"cache in {self.folder} was written with; pin the revision, or delete the folder "
                f"{self.folder}"
            )

    def _head_file(self, revision: str) -> Path:
        return self.folder / f"{HEAD_STEM}{_slug(revision)}{SUFFIX}"

    # ----------------------------------------------------------------------------------------
    # The folder

    @property
    def disk_bytes(self) -> int:
        """What the folder takes on disk."""
        return sum(size for _, size, _ in self._files())

    def take_counts(self) -> dict[str, int]:
        """How many shards were not used, by reason, since the last call."""
        with self._lock:
            counts, self._counts = self._counts, dict.fromkeys(COUNTED, 0)
        return counts

    def _files(self) -> list[tuple[Path, int, int]]:
        """Files with their sizes and times of last use, those of others' making included."""
        found: list[tuple[Path, int, int]] = []
        if not self.folder.is_dir():
            return found
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False) and entry.name != LOCK:
                        told = entry.stat(follow_symlinks=False)
                        found.append((Path(entry.path), told.st_size, told.st_mtime_ns))
        return found

    def _evict(self, max_bytes: int) -> None:
        """Delete what was used longest ago, a head with the last answers that need it.

        Damaged files and heads without answers go first; a process that has such answers in memory
        writes its head again.
        """
        with self._alone():
            files = sorted(self._files(), key=lambda one: (one[2], one[0].name))
            total = sum(size for _, size, _ in files)
            heads = {_stem_of_head(file): (file, size) for file, size, _ in files if _is_head(file)}
            shards = [one for one in files if one[0].suffix == SUFFIX and not _is_head(one[0])]
            left = Counter(_stem(file.name) for file, _, _ in shards)
            useless = [(file, size) for file, size, _ in files if file.suffix == DAMAGED]
            useless += [heads[stem] for stem in heads if not left[stem]]
            waiting = deque([*useless, *((file, size) for file, size, _ in shards)])
            while waiting and total > max_bytes:
                file, size = waiting.popleft()
                file.unlink(missing_ok=True)
                total -= size
                if file.suffix == SUFFIX and not _is_head(file):
                    left[stem := _stem(file.name)] -= 1
                    if not left[stem] and stem in heads:
                        waiting.appendleft(heads[stem])

    def _remove_stale(self) -> None:
        """Temporary files of processes that were killed."""
        oldest = time.time_ns() - int(STALE_S * 1e9)
        for file, _, used in self._files():
            if file.suffix == TEMPORARY and used < oldest:
                with suppress(OSError):
                    file.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process deletes; a process that is killed lets go."""
        import fcntl  # there is none on Windows, where only a bound needs it

        with (self.folder / LOCK).open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _slug(revision: str) -> str:
    """The revision as a part of a file's name."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in revision)
    if plain == revision and len(plain) <= 64:
        return plain
    return f"{plain[:40]}-{hashlib.sha256(revision.encode()).hexdigest()[:16]}"


def _shard_stem(revision: str) -> str:
    return SHARD_STEM + _slug(revision)


def _stem(name: str) -> str:
    """Of a shard's name, what all of its revision have in common."""
    return name.removesuffix(SUFFIX).rpartition("-")[0]


def _is_head(file: Path) -> bool:
    return file.suffix == SUFFIX and file.name.startswith(HEAD_STEM)


def _stem_of_head(file: Path) -> str:
    return SHARD_STEM + file.name.removesuffix(SUFFIX).removeprefix(HEAD_STEM)


def _parts(entries: Mapping[bytes, Entry], size: int) -> Iterator[dict[bytes, Entry]]:
    """Answers in parts of about that many bytes, at least one each."""
    part: dict[bytes, Entry] = {}
    total = 0
    for key, entry in list(entries.items()):
        if part and total + entry.size_bytes > size:
            yield part
            part, total = {}, 0
        part[key] = entry
        total += entry.size_bytes
    if part:
        yield part

"""The score caches of a run: which answers they hold, and teachers that are known by them alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from opd.errors import ConfigError
from opd.teacher.cache import CachedTeacher, ScoreCache
from opd.training.config import CacheConfig, TeacherConfig
from opd.types import Stat, Teacher


@dataclass(frozen=True)
class Kept:
    """A teacher of which there is only what it said before.

    Attributes:
        name: of its table.
        config: that table.
        cache: where its answers are.
        revision: whose answers they are.
        vocab_size: tokens that they know; None where nothing says.
    """

    name: str
    config: TeacherConfig
    cache: ScoreCache
    revision: str
    vocab_size: int | None


@dataclass
class Caches:
    """Folders of answers, each opened once, and the teachers that use them.

    Args:
        base: where relative folders start.
    """

    base: Path
    _folders: dict[Path, ScoreCache] = field(default_factory=dict)
    _named: dict[tuple[Path, str], str] = field(default_factory=dict)
    _teachers: dict[str, CachedTeacher] = field(default_factory=dict)

    def kept(self, name: str, config: TeacherConfig) -> Kept:
        """A teacher that is not there.

        Raises:
            ConfigError: the folder holds no answers of it, or of several revisions.
        """
        folder = _folder(self.base, config.cache)
        if not folder.is_dir():
            raise ConfigError(
                f"{name}.cache.offline: there is no folder {folder}; run once with offline = false"
            )
        cache = self._open(config.cache)
        there = cache.revisions()
        revision = config.cache.revision or (there[0] if len(there) == 1 else "")
        if revision not in there:
            raise ConfigError(
                f"{name}.cache.offline: {folder} holds answers of "
                f"{len(there)} revisions ({', '.join(there) or 'none'})"
                + (f", and none of {revision!r}" if revision else "")
                + "; name one of them as cache.revision, or run once with offline = false"
            )
        head = cache.head(revision)
        return Kept(name, config, cache, revision, head.vocab_size if head else None)

    def wrap(
        self, name: str, teacher: Teacher, config: CacheConfig, known: str, vocab_size: int
    ) -> Teacher:
        """A teacher whose answers are kept in the folder that its table names.

        Args:
            known: what tells its weights from others; empty where nothing does but the table.
            vocab_size: tokens that share the mass.

        Raises:
            ConfigError: nothing tells its weights from others, or two things do.
        """
        revision = f"{known}.{vocab_size}" if known else config.revision
        if not revision:
            raise ConfigError(
                f"{name} does not say which weights it has, so nothing tells its answers from "
                f"those of others; give them a name as {name}.cache.revision, and another one with "
                "other weights"
            )
        if config.revision not in ("", revision):
            raise ConfigError(
                f"{name}.cache.revision = {config.revision!r}, and its weights are known as "
                f"{revision!r}; leave cache.revision out"
            )
        cache = self._open(config)
        if not known:
            first = self._named.setdefault((cache.folder, revision), name)
            if first != name:
                raise ConfigError(
                    f"{first} and {name} keep their answers in {cache.folder} under one name, "
                    f"{revision!r}, so one would be told what the other said; give each its own "
                    "cache.revision"
                )
        return self._added(name, teacher, cache, config, revision)

    def alone(self, kept: Kept) -> Teacher:
        """What there is of a teacher that is not there."""
        return self._added(kept.name, None, kept.cache, kept.config.cache, kept.revision)

    def flush(self) -> None:
        """Write what is in memory."""
        for cache in self._folders.values():
            cache.flush()

    def stats(self) -> dict[str, Stat]:
        """Metrics since the last call: `cache/...`; of several, `teacher/NAME/cache/...`."""
        alone = len(self._teachers) == 1
        return {
            key if alone else f"teacher/{name.removeprefix('teachers.')}/{key}": stat
            for name, teacher in self._teachers.items()
            for key, stat in teacher.stats().items()
        }

    def _open(self, config: CacheConfig) -> ScoreCache:
        folder = _folder(self.base, config)
        if folder not in self._folders:
            self._folders[folder] = ScoreCache(folder, max_bytes=config.max_bytes or None)
        return self._folders[folder]

    def _added(
        self,
        name: str,
        teacher: Teacher | None,
        cache: ScoreCache,
        config: CacheConfig,
        revision: str,
    ) -> CachedTeacher:
        self._teachers[name] = CachedTeacher(
            teacher,
            cache,
            revision=revision,
            name=name,
            drift_share=config.drift_share,
            drift_limit=config.drift_limit,
        )
        return self._teachers[name]


def behind(teacher: Teacher) -> Teacher:
    """Who is asked where a cache has no answer; of one without a teacher, the cache itself."""
    if isinstance(teacher, CachedTeacher) and teacher.teacher is not None:
        return teacher.teacher
    return teacher


def not_there(teachers: Iterable[Teacher]) -> list[str]:
    """Names of teachers of which there is only what they said before."""
    return [one.name for one in teachers if isinstance(one, CachedTeacher) and one.teacher is None]


def _folder(base: Path, config: CacheConfig) -> Path:
    return (base / config.folder).resolve()

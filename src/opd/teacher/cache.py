"""What teachers said before, on disk: for restarts, for fixed text, and for runs without a teacher.

An answer is kept by a hash of everything that it depends on: the teacher's revision, the tokens
that it reads, and what it is asked of them. Where a sequence stands in a batch is no part of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.errors import ConfigError, TeacherError
from opd.head.replies import check_reply
from opd.rollout.pack import select
from opd.teacher.answers import answers
from opd.teacher.cache_folder import ScoreCache
from opd.teacher.local import LocalTeacher
from opd.teacher.routed import RoutedTeacher
from opd.teacher.self_teacher import AverageTeacher
from opd.teacher.shard import VERSION, Entry
from opd.types import (
    TEACHER_ROW_FIELDS,
    Need,
    Provenance,
    Stat,
    Teacher,
    TeacherRequest,
    TeacherScores,
    Unembedding,
    pack_rows,
)

__all__ = ["CachedTeacher", "ScoreCache", "answer_keys"]

LOGS = ("sampled_logp", "top_logp", "ids_logp", "log_probs", "logsumexp", "entropy")
"""Fields in nats, which are compared when they are asked for again."""


# --------------------------------------------------------------------------------------------
# What is asked


@dataclass(frozen=True)
class _Asked:
    """A sequence of a request that has rows.

    Attributes:
        number: its place in the batch.
        key: of its answer.
        rows: its rows in the batch.
    """

    number: int
    key: bytes
    rows: slice


def answer_keys(request: TeacherRequest, revision: str) -> list[bytes]:
    """Per sequence of a request's batch, the hash of all that its answer depends on.

    SHA-256 of the version of the format, the revision, temperature, merged ids, `top_k` and which
    fields are asked for; then of the sequence's own lengths, prompt, response, mask, ids to score
    and further inputs of the model.

    Raises:
        TeacherError: further inputs that are no tensors.
    """
    batch = request.batch
    asked = {
        "version": VERSION,
        "revision": revision,
        "temperature": float(request.temperature).hex(),
        "merge_ids": [list(group) for group in batch.merge_ids],
        "top_k": request.top_k,
        "distribution": request.distribution,
        "sampled": request.sampled,
        "entropy": request.entropy,
        "ids": None if request.ids is None else request.ids.shape[1],
    }
    common = hashlib.sha256(json.dumps(asked, sort_keys=True).encode() + b"\0")
    for name, value in batch.model_inputs.items():
        if not isinstance(value, Tensor):
            raise TeacherError(
                f"the batch has {name!r} of type {type(value).__name__}, and a score cache tells "
                "inputs apart that are tensors; run without the cache"
            )
    tokens, mask = _array(batch.input_ids), batch.token.mask.cpu().numpy()
    lengths = batch.lengths.tolist()
    written = (batch.token.provenance != Provenance.PADDING).sum(1).tolist()
    ids = None if request.ids is None else _array(request.ids)
    keys, row = [], 0
    for number, (length, count) in enumerate(zip(lengths, written, strict=True)):
        own = common.copy()
        rows = int(mask[number].sum())
        own.update(f"{length - count} {count} {rows}\0".encode())
        own.update(tokens[number, :length].tobytes())
        own.update(mask[number, :count].tobytes())
        if ids is not None:
            own.update(ids[row : row + rows].tobytes())
        for name, value in sorted(batch.model_inputs.items()):
            data = value[number].detach().cpu().contiguous()
            own.update(f"{name} {data.dtype} {tuple(data.shape)}\0".encode())
            own.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        row += rows
        keys.append(own.digest())
    return keys


def _array(values: Tensor) -> Any:
    return values.cpu().to(torch.int64).contiguous().numpy()


def _sequences(request: TeacherRequest, revision: str) -> list[_Asked]:
    found, start = [], 0
    counts = request.batch.token.mask.sum(1).tolist()
    for number, (key, rows) in enumerate(zip(answer_keys(request, revision), counts, strict=True)):
        if rows:
            found.append(_Asked(number, key, slice(start, start + rows)))
        start += rows
    return found


# --------------------------------------------------------------------------------------------
# A teacher


class CachedTeacher:
    """Asks a teacher what it was never asked before, and nothing else.

    A reply is what the teacher said of each sequence when it was first asked, to the bit. Of one
    batch everything that is missing is asked in one request.

    Args:
        teacher: its weights must not change; None: there is only the cache.
        cache: where the answers are.
        revision: of the teacher. Whatever changes its answers has to change this text: weights,
            the dtype they compute in, an adapter.
        name: of the teacher, for messages.
        drift_share: of the answers found, the part that the teacher is asked for again, chosen by
            their keys.
        drift_limit: by how many nats a log-probability may differ when it is asked again.

    Raises:
        ConfigError: a teacher that moves, one that routes, or no revision.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        cache: ScoreCache,
        *,
        revision: str,
        name: str = "teacher",
        drift_share: float = 0.01,
        drift_limit: float = 0.5,
    ) -> None:
        if not revision.strip():
            raise ConfigError(
                f"{name} has no revision, so nothing tells its answers from those of other "
                "weights; give it one, or do not cache it: a teacher that moves has none"
            )
        if reason := _why_not(teacher):
            raise ConfigError(f"{name} cannot be cached: {reason}")
        if not 0.0 <= drift_share <= 1.0 or not drift_limit > 0.0:
            raise ConfigError(
                f"drift_share = {drift_share} must lie in [0, 1], and drift_limit = {drift_limit} "
                "must be above 0"
            )
        self.teacher = teacher
        self.cache = cache
        self.revision = revision
        self.name = name
        self.drift_share = drift_share
        self.drift_limit = drift_limit
        self._lock = threading.Lock()
        self._hits = self._misses = Stat(0.0, 0.0)
        self._drift = Stat(0.0, 0.0)

    def can(self, need: Need) -> bool:
        """Whether the teacher can answer it; without one, nobody knows before it is looked up."""
        return self.teacher is None or self.teacher.can(need)

    @property
    def has_head(self) -> bool:
        """Whether hidden states of this revision were kept, which answer every support."""
        return self.cache.head(self.revision) is not None

    def missing(self, request: TeacherRequest) -> int:
        """How many sequences of a request have no answer yet."""
        asked = _sequences(request, self.revision)
        there = self.cache.has(self.revision, [one.key for one in asked])
        return sum(one.key not in there for one in asked)

    @torch.no_grad()
    def score(self, request: TeacherRequest) -> TeacherScores:
        """Scores of the N response rows of the request's batch, in their order.

        Raises:
            TeacherError: something is missing and there is no teacher; or it no longer says what
                it said.
        """
        asked = _sequences(request, self.revision)
        if not asked:
            return self._nothing(request)
        kept = self.cache.read(self.revision, [one.key for one in asked])
        missing = [one for one in asked if one.key not in kept]
        self._count(len(asked) - len(missing), len(missing))
        scores = TeacherScores()
        if self.teacher is None:
            if missing:
                raise self._missing_error(request, missing, len(asked))
        else:
            again = [one for one in asked if one.key in kept and self._is_checked(one.key)]
            once = {one.key: one for one in (*missing, *again)}
            if once:
                chosen = sorted(once.values(), key=lambda one: one.number)
                scores, said = self._ask(self.teacher, request, chosen)
                old = [one for one in chosen if one.key in kept]
                self._compare(request, old, kept, said, scores.unembedding)
                if scores.unembedding is not None:
                    self.cache.put_head(self.revision, scores.unembedding)
                new = {one.key: said[one.key] for one in missing}
                self.cache.put(self.revision, new)
                kept |= new
        return self._joined(request, [kept[one.key] for one in asked], scores)

    def stats(self) -> dict[str, Stat]:
        """Metrics since the last call.

        `cache/hits` and `cache/misses` are of sequences; `cache/drift` is the mean difference, in
        nats, of log-probabilities that were asked for again; `cache/bytes` what the folder takes.
        `cache/damaged`, `cache/other_version`, `cache/unreadable` and `cache/lost` count files that
        were not used.
        """
        with self._lock:
            found = {"cache/hits": self._hits, "cache/misses": self._misses}
            if self._drift.count:
                found["cache/drift"] = self._drift
            self._hits = self._misses = self._drift = Stat(0.0, 0.0)
        found["cache/bytes"] = Stat(float(self.cache.disk_bytes), 1.0)
        counts = self.cache.take_counts()
        return found | {f"cache/{why}": Stat(float(n), 1.0) for why, n in counts.items() if n}

    def flush(self) -> None:
        """Write what is in memory."""
        self.cache.flush()

    def close(self) -> None:
        """Write what is in memory."""
        self.cache.close()

    # ----------------------------------------------------------------------------------------

    def _count(self, hits: int, misses: int) -> None:
        with self._lock:
            self._hits += Stat(float(hits), float(hits + misses))
            self._misses += Stat(float(misses), float(hits + misses))

    def _is_checked(self, key: bytes) -> bool:
        return int.from_bytes(key[-8:], "big") < self.drift_share * 2**64

    def _ask(
        self, teacher: Teacher, request: TeacherRequest, asked: Sequence[_Asked]
    ) -> tuple[TeacherScores, dict[bytes, Entry]]:
        """What the teacher says of some sequences now, as a whole and one by one."""
        part = select(request.batch, [one.number for one in asked])
        ids = None if request.ids is None else request.ids[part.rows]
        prompts = request.prompts and tuple(request.prompts[one.number] for one in asked)
        scores = teacher.score(replace(request, batch=part.batch, ids=ids, prompts=prompts))
        check_reply(self.name, scores, rows=len(part.rows))
        for name in ("names", "heads", "answered_by", "parts", "row_index", "id_map"):
            value = getattr(scores, name)
            if value is not None and len(value):
                raise TeacherError(
                    f"{self.name} answered with {name!r}, which a score cache does not keep; cache "
                    "the teachers that it asks, one by one"
                )
        as_asked = (
            ids is not None
            and scores.ids is not None
            and torch.equal(scores.ids.to(ids.device), ids)
        )
        values = {
            name: value.detach().cpu()
            for name in TEACHER_ROW_FIELDS
            if (value := getattr(scores, name)) is not None and not (name == "ids" and as_asked)
        }
        found, start = {}, 0
        for one in asked:
            end = start + one.rows.stop - one.rows.start
            found[one.key] = Entry(
                {name: value[start:end].clone() for name, value in values.items()},
                as_asked,
                scores.unembedding is not None,
                dict(scores.provenance),
            )
            start = end
        return scores, found

    def _compare(
        self,
        request: TeacherRequest,
        again: Sequence[_Asked],
        kept: Mapping[bytes, Entry],
        said: Mapping[bytes, Entry],
        head: Unembedding | None,
    ) -> None:
        """Count by how much answers differ from what was kept, and refuse too much of it."""
        if not again:
            return
        self._check_form([entries[one.key] for one in again for entries in (kept, said)])
        tokens = pack_rows(request.batch.token.tokens, request.batch.token.mask)
        own = torch.cat([tokens[one.rows] for one in again])
        first, second = [kept[one.key] for one in again], [said[one.key] for one in again]
        before, now = _in_nats(first, self._head(request), own), _in_nats(second, head, own)
        differences = {name: _apart(before[name], now[name]) for name in before}
        if "top_logp" in before:
            differences["top_logp"] = _lists_apart(
                _joined_values(first, "top_ids"),
                before["top_logp"],
                _joined_values(second, "top_ids"),
                now["top_logp"],
            )
        apart = torch.cat([difference.flatten() for difference in differences.values()])
        with self._lock:
            self._drift += Stat(float(apart.sum()), float(len(apart)))
        if len(apart) and float(apart.max()) > self.drift_limit:
            raise TeacherError(
                f"{self.name} no longer says what it said: of {len(again)} sequences that were "
                f"asked again, log-probabilities differ by up to {float(apart.max()):.4g} nats, "
                f"and drift_limit is {self.drift_limit:g}, though its revision is "
                f"{self.revision!r} as before; pin the teacher's revision, or delete the folder "
                f"{self.cache.folder}"
            )

    def _joined(
        self, request: TeacherRequest, entries: Sequence[Entry], scores: TeacherScores
    ) -> TeacherScores:
        """One reply of answers to single sequences."""
        self._check_form(entries)
        device, first = request.batch.input_ids.device, entries[0]
        values: dict[str, Any] = {
            name: torch.cat([entry.values[name] for entry in entries]).to(device)
            for name in first.values
        }
        if first.ids_as_asked:
            values["ids"] = request.ids
        told: dict[str, set[str]] = {}
        for entry in entries:
            for key, text in entry.provenance.items():
                told.setdefault(key, set()).add(text)
        head = scores.unembedding or self._head(request) if first.has_head else None
        return TeacherScores(
            **values,
            unembedding=head,
            seconds=scores.seconds,
            provenance={key: ", ".join(sorted(texts)) for key, texts in told.items()},
        )

    def _check_form(self, entries: Sequence[Entry]) -> None:
        forms = {(entry.form, entry.ids_as_asked, entry.has_head): entry for entry in entries}
        if len(forms) > 1:
            one, other = (_in_words(entry) for entry in list(forms.values())[:2])
            raise TeacherError(
                f"{self.name} of revision {self.revision!r} answered with {one}, and at another "
                f"time with {other}, so its settings have changed; give every setting a revision "
                f"of its own, or delete the folder {self.cache.folder}"
            )

    def _head(self, request: TeacherRequest) -> Unembedding | None:
        return self.cache.head(self.revision, request.batch.input_ids.device)

    def _missing_error(
        self, request: TeacherRequest, missing: Sequence[_Asked], asked: int
    ) -> TeacherError:
        first = missing[0]
        name = f"sequence {first.number} of the batch"
        if request.prompts:
            name += f", a response to the prompt {request.prompts[first.number].id}"
        return TeacherError(
            f"the score cache in {self.cache.folder} has no answer of revision {self.revision!r} "
            f"for {len(missing)} of {asked} sequences, the first {name} "
            f"({first.rows.stop - first.rows.start} tokens), and there is no {self.name} to ask; "
            "score the same text once with the teacher, with the same method and temperature"
        )

    def _nothing(self, request: TeacherRequest) -> TeacherScores:
        """The reply for a batch without rows."""
        if self.teacher is not None:
            return self.teacher.score(request)
        head = self._head(request) if request.distribution else None
        width = 0 if head is None else head.weight.shape[1]
        none = torch.zeros((0, max(width, request.top_k)), device=request.batch.input_ids.device)
        if head is not None:
            return TeacherScores(hidden=none.to(head.weight.dtype), unembedding=head)
        return TeacherScores(
            sampled_logp=none.sum(1) if request.sampled else None,
            top_ids=none.long() if request.top_k else None,
            top_logp=none if request.top_k else None,
            ids=request.ids,
            ids_logp=None if request.ids is None else torch.zeros_like(request.ids).float(),
            entropy=none.sum(1) if request.entropy else None,
        )


def _why_not(teacher: Teacher | None) -> str:
    """Why the answers of a teacher cannot be kept; empty where they can."""
    if isinstance(teacher, AverageTeacher):
        return "it is an average of the student, and says something else after every step"
    if isinstance(teacher, RoutedTeacher):
        return "it routes; cache the teachers that it asks, one by one"
    if isinstance(teacher, LocalTeacher) and not teacher.without_adapter:
        model: Any = teacher.loaded.model
        if any(weight.requires_grad for weight in model.parameters()):
            return (
                "its weights are trained, so it says something else after every step; freeze "
                "them with requires_grad_(False) if it is not the student"
            )
    return ""


def _in_nats(
    entries: Sequence[Entry], head: Unembedding | None, tokens: Tensor
) -> dict[str, Tensor]:
    """What of answers can be compared: of hidden states, what they say of the rows' own tokens."""
    joined = {
        name: _joined_values(entries, name)
        for name in (*LOGS, "hidden")
        if name in entries[0].values
    }
    hidden = joined.pop("hidden", None)
    if hidden is not None and head is not None:
        device = head.weight.device
        told = answers(hidden.to(device), head, ("sampled",), tokens=tokens.to(device))
        joined["hidden"] = told["sampled_logp"].cpu()
    return joined


def _joined_values(entries: Sequence[Entry], name: str) -> Tensor:
    return torch.cat([entry.values[name] for entry in entries])


def _lists_apart(ids: Tensor, before: Tensor, ids_now: Tensor, now: Tensor) -> Tensor:
    """|difference| of the likeliest entries, by their ids.

    An entry that is in one list alone is in the other at most what that list's last one is, and
    differs by no less than what is left.
    """
    same = ids.unsqueeze(-1) == ids_now.unsqueeze(-2)
    there = torch.where(same, now.unsqueeze(-2), -torch.inf).amax(-1)
    known = _apart(before, there)
    left = (before - now.amin(-1, keepdim=True)).clamp(min=0.0).nan_to_num(nan=0.0)
    new = (now - before.amin(-1, keepdim=True)).clamp(min=0.0).nan_to_num(nan=0.0)
    return torch.where(same.any(-1), known, left.double()).maximum(
        torch.where(same.any(-2), 0.0, new.double())
    )


def _apart(before: Tensor, now: Tensor) -> Tensor:
    """|difference|: 0 where both have no mass, infinite where only one has or one is no number."""
    apart = torch.where(before == now, 0.0, (before.double() - now.double()).abs())
    return apart.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _in_words(entry: Entry) -> str:
    fields = [
        f"{name} ({str(dtype).removeprefix('torch.')}{f' x {list(widths)}' if widths else ''})"
        for name, dtype, widths in entry.form
    ]
    return ", ".join(fields) or "nothing"

"""Token records: what each token of a response was worth in an update, as Parquet part files.

Only numbers that the step has made anyway are written: no pass, no projection, no formula is added
for them. Whole responses are recorded, a share of them that is chosen by a hash of the seed, the
phase, the step and the place in the batch, so that the choice needs no state and is the same when
a run is repeated or resumed. The columns are those of `opd.token_columns`.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd.fields import is_coupled, positional_names
from opd.formula import divergence as divergences
from opd.formula import support as supports
from opd.head.closed import of_a_pair
from opd.objective import Objective, chosen_rows
from opd.rollout.pack import join_parts, rollout_to
from opd.terms import REWARD, Dense, Sampled, Term, term_key, weight_slots
from opd.token_columns import (
    COLUMNS,
    METADATA,
    PART,
    VERSION,
    column_names,
    part_files,
    part_number,
)
from opd.types import (
    Batch,
    Bound,
    FieldKey,
    Provenance,
    Rollout,
    StudentOutput,
    pack_rows,
    unanswered,
)

ROWS_PER_PART = 250_000
"""Rows after which a part is written; one that is written earlier, at a checkpoint, has fewer."""

FREE_FIELDS = frozenset(
    {"reverse_kl", "forward_kl", "total_variation", "jensen_shannon", "teacher_entropy"}
)
"""One number per row, known to the head where a formula of the update phase reads them."""

LOG_RATIO, TEACHER_LOGP = "log_ratio", "teacher_logp"
OF_TERMS = (
    *("loss/", REWARD, "advantage/", "weight/", "gate/", "routed/", "leak/"),
    *("changed/", "empty/"),
)
"""How the names of by-products begin that are followed by the label of a term."""

Numbers = npt.NDArray[Any]


# --------------------------------------------------------------------------------------------
# What an update knows of its rows


class Gathered:
    """By-products of an update's micro-batches, put back into the order of the batch's rows.

    Attributes:
        wanted: fields that the head is asked for because it knows them already.
    """

    def __init__(self, wanted: frozenset[FieldKey] = frozenset()) -> None:
        self.wanted = wanted
        self._found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def take(self, rows: Tensor, out: StudentOutput) -> None:
        """Keep what one micro-batch found; `rows` are the places of its rows in the batch."""
        found = dict(out.rows)
        for key, value in out.fields.items():
            if value.dim() == 1:
                found[_path(key)] = value
        for name, value in found.items():
            self._found.setdefault(name, []).append((rows, value))

    def joined(self, total: int) -> dict[str, Tensor]:
        """All `[N]`, by path-like name."""
        return {name: join_parts(values, total) for name, values in self._found.items()}


def free_fields(objective: Objective, batch: Batch) -> frozenset[FieldKey]:
    """Fields over the whole vocabulary that the head looks up in the update phase all the same.

    Those that a function of that phase takes, and divergences of dense terms that the head has in
    closed form, which are the terms' losses before weights and coefficients.
    """
    found = set()
    for _, term in objective.parts():
        for place, bound in _in_the_update(term):
            for name in positional_names(bound.function):
                if name in FREE_FIELDS:
                    found.add(term_key(term, name, bound, place))
        if isinstance(term, Dense) and not batch.merge_ids:
            bound = Bound.of(term.divergence)
            known = getattr(divergences, bound.short_name, None) is bound.function
            whole = Bound.of(term.support).function is supports.full
            if known and whole and bound.short_name in FREE_FIELDS and of_a_pair(bound):
                found.add(FieldKey(bound.short_name, term.against, smoothing=term.smoothing))
    return frozenset(key for key in found if key.support is None and not key.smoothing)


def _in_the_update(term: Term) -> list[tuple[str, Bound]]:
    """The functions of a term that run in the update phase, with their places."""
    settled: set[str] = set()
    if isinstance(term, Sampled) and term.advantage_is_coupled:
        settled |= {place for place, _ in term.advantage_slots()}
    if term.preserve_mass:
        settled |= {place for place, _ in weight_slots(term)}
    return [
        (place, bound)
        for place, bound in term.slots()
        if place not in settled and not is_coupled(bound.function)
    ]


def _path(key: FieldKey) -> str:
    view = key.view.removeprefix("teacher.")
    return key.name if view in ("", "teacher") else f"{key.name}/{view}"


# --------------------------------------------------------------------------------------------
# Which responses


def chosen(
    *, share: float, seed: int, phase: str, step: int, sequences: int
) -> npt.NDArray[np.int64]:
    """Places of the responses of a step that are recorded, each with probability `share`."""
    state = np.array([seed], dtype=np.int64).view(np.uint64)
    for part in (zlib.crc32(phase.encode()), step):
        state = _mixed(state ^ np.uint64(part))
    bits = _mixed(_mixed(state) ^ np.arange(sequences, dtype=np.uint64))
    return np.flatnonzero((bits >> np.uint64(11)) * 2.0**-53 < share)


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output of the generator splitmix64 for a state: each bit depends on all.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014.
    """
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


# --------------------------------------------------------------------------------------------
# The writer


@dataclass(frozen=True)
class _Update:
    """The recorded responses of one update: b of them, with n tokens, one after the other."""

    phase: str
    step: int
    update: int
    per_sequence: Mapping[str, Numbers]
    per_token: Mapping[str, Numbers]
    prompt_ids: Sequence[str]
    stop_reasons: Sequence[str]

    @property
    def lengths(self) -> Numbers:
        return self.per_sequence["length"]


class TokenRecords:
    """Appends the rows of updates to part files in a folder.

    A part is written under a hidden name and renamed, so that one is whole or not there. What is
    not written yet is lost unless `flush` is called.

    Args:
        folder: of the parts; made when the first is written. Numbers go on from those there are.
        share: of the responses, 0 to 1.
        seed: of the choice.
        text_of: a token as a text.
    """

    def __init__(
        self,
        folder: Path,
        *,
        share: float,
        seed: int,
        text_of: Callable[[int], str],
        rows_per_part: int = ROWS_PER_PART,
    ) -> None:
        self._folder = folder
        self._share, self._seed = share, seed
        self._text_of = text_of
        self._texts: dict[int, str] = {}
        self._rows_per_part = rows_per_part
        self._pending: list[_Update] = []
        self._rows = 0

    def chosen(self, phase: str, step: int, sequences: int) -> npt.NDArray[np.int64]:
        """Places of the responses of a step that are recorded."""
        return chosen(
            share=self._share, seed=self._seed, phase=phase, step=step, sequences=sequences
        )

    def add(
        self,
        rollout: Rollout,
        batch: Batch,
        objective: Objective,
        rows: Mapping[str, Tensor],
        *,
        phase: str,
        step: int,
        update: int,
    ) -> None:
        """Append the rows of an update, and write a part when there are enough.

        Args:
            rollout: the responses.
            batch: packed from them, with what was settled before the update.
            objective: of the update.
            rows: its by-products by path-like name, packed in the order of the batch.
            step: of the phase, 1 the first.
            update: of the step, 1 the first.
        """
        places = self.chosen(phase, step, len(rollout.prompt_ids))
        if not len(places):
            return
        told = _told(batch, objective, rows)
        made = _rows_of(rollout, batch, told, places, phase=phase, step=step, update=update)
        self._pending.append(made)
        self._rows += int(made.lengths.sum())
        if self._rows >= self._rows_per_part:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last part, if anything."""
        if not self._rows:
            self._pending.clear()
            return
        table = self._table()
        numbers = [part_number(part) for part in part_files(self._folder)]
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(table, self._folder / PART.format(max(numbers, default=0) + 1))
        self._pending.clear()
        self._rows = 0

    def _table(self) -> Any:
        """What was added since the last part, as a table."""
        import pyarrow as pa

        columns = _columns(self._pending)
        columns["text"] = self._texts_of(columns["token"])
        known = {
            name: _numbers(v) if isinstance(v, np.ndarray) else v for name, v in columns.items()
        }
        empty = pa.nulls(self._rows, pa.float32())
        order = [*COLUMNS, *sorted(known.keys() - COLUMNS.keys())]
        told = {"version": VERSION, "share": self._share, "seed": self._seed}
        return pa.table(
            {name: known.get(name, empty) for name in order},
            metadata={METADATA + name: str(value) for name, value in told.items()},
        )

    def _texts_of(self, tokens: npt.NDArray[np.int32]) -> Any:
        """Every token as a text; the tokenizer is asked once for each."""
        ids = np.flatnonzero(np.bincount(tokens))
        for token in ids.tolist():
            if token not in self._texts:
                self._texts[token] = self._text_of(token)
        place = np.zeros(int(ids[-1]) + 1, dtype=np.int32)
        place[ids] = np.arange(len(ids), dtype=np.int32)
        return _worded(place[tokens], [self._texts[token] for token in ids.tolist()])


def _columns(updates: Sequence[_Update]) -> dict[str, Any]:
    """Every column but the texts: numbers as they are, words as pyarrow has them."""
    of_sequence = np.concatenate([made.lengths for made in updates])
    of_update = np.array([made.lengths.sum() for made in updates])

    def each_token(name: str) -> Numbers:
        return np.concatenate(
            [
                made.per_token[name]
                if name in made.per_token
                else np.full(size, np.nan, np.float32)
                for made, size in zip(updates, of_update.tolist(), strict=True)
            ]
        )

    def words(values: Sequence[str], repeats: Numbers) -> Any:
        different = list(dict.fromkeys(values))
        codes = {word: code for code, word in enumerate(different)}
        coded = np.array([codes[word] for word in values], dtype=np.int32)
        return _worded(np.repeat(coded, repeats), different)

    columns: dict[str, Any] = {
        "phase": words([made.phase for made in updates], of_update),
        "prompt_id": words([word for made in updates for word in made.prompt_ids], of_sequence),
        "stop_reason": words([word for made in updates for word in made.stop_reasons], of_sequence),
        "position": _counted(of_sequence),
    }
    for name in ("step", "update"):
        values = np.array([getattr(made, name) for made in updates], dtype=np.int32)
        columns[name] = np.repeat(values, of_update)
    for name in updates[0].per_sequence:
        joined = np.concatenate([made.per_sequence[name] for made in updates])
        columns[name] = np.repeat(joined, of_sequence)
    for name in dict.fromkeys(name for made in updates for name in made.per_token):
        columns[name] = each_token(name)
    columns["writer"] = _worded(columns["writer"], [kind.name.lower() for kind in Provenance])
    version = columns["policy_version"]
    columns["policy_version"] = _numbers(version, version >= 0)
    return columns


def _numbers(values: Numbers, known: npt.NDArray[np.bool_] | None = None) -> Any:
    """A column of numbers or truths, null where nothing is known, which a NaN says of a float.

    Made of its memory: `pyarrow.array` imports pandas where that is installed, which takes longer
    than all the records of a short run.
    """
    import pyarrow as pa

    kind = pa.from_numpy_dtype(values.dtype)
    if known is None and values.dtype.kind == "f":
        known = ~np.isnan(values)
    bits = None if known is None or known.all() else np.packbits(known, bitorder="little")
    data = np.packbits(values, bitorder="little") if pa.types.is_boolean(kind) else values
    held = [None if bits is None else pa.py_buffer(bits), pa.py_buffer(np.ascontiguousarray(data))]
    return pa.Array.from_buffers(kind, len(values), held)


def _worded(codes: Numbers, words: Sequence[str]) -> Any:
    """A column of words, by their places in a list."""
    import pyarrow as pa

    written = [word.encode() for word in words]
    ends = np.cumsum([0, *map(len, written)]).astype(np.int32)
    held = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(written))]
    listed = pa.Array.from_buffers(pa.string(), len(words), held)
    return pa.DictionaryArray.from_arrays(_numbers(codes), listed)


def _counted(lengths: Numbers) -> Numbers:
    """0, 1, ... for each of the lengths, one after the other."""
    starts = np.cumsum(lengths) - lengths
    counted: Numbers = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return counted.astype(np.int32)


def _rows_of(
    rollout: Rollout,
    batch: Batch,
    told: Mapping[str, Tensor],
    places: npt.NDArray[np.int64],
    *,
    phase: str,
    step: int,
    update: int,
) -> _Update:
    """What is known of the tokens of some responses."""
    rollout = rollout_to(rollout, torch.device("cpu"))
    picked = torch.from_numpy(places)
    provenance, mask = rollout.provenance[picked], rollout.mask[picked]
    width = int((provenance != Provenance.PADDING).sum(1).max())
    inside = (provenance != Provenance.PADDING)[:, :width]

    def each(values: Tensor, kind: Any = np.int32) -> Numbers:
        found: Numbers = values[picked, :width][inside].numpy().astype(kind)
        return found

    version = each(rollout.policy_version)
    per_token = {
        "token": each(rollout.tokens),
        "writer": each(rollout.provenance, np.int8),
        "mask": each(rollout.mask, np.bool_),
        "policy_version": version,
        "sampler_logp": np.where(version < 0, np.nan, each(rollout.sampler_logp, np.float32)),
    }
    if told:
        # rows of the chosen responses, which are fewer, are all that leaves the device
        whole = batch.token.mask
        of_chosen = torch.zeros(whole.shape[0], dtype=torch.bool, device=whole.device)
        of_chosen[picked.to(whole.device)] = True
        index = of_chosen.unsqueeze(1).expand(whole.shape)[whole].nonzero().squeeze(-1)
        values = torch.stack([told[name].to(torch.float32)[index] for name in told]).cpu().numpy()
        looked_at = mask[:, :width][inside].numpy()
        for column, found in zip(column_names(told).values(), values, strict=True):
            spread = found
            if not looked_at.all():
                spread = np.full(looked_at.shape, np.nan, np.float32)
                spread[looked_at] = found
            per_token[column] = spread
    return _Update(
        phase,
        step,
        update,
        {
            "sequence": places.astype(np.int32),
            "length": inside.sum(1).numpy().astype(np.int32),
            "group_id": rollout.group[picked].numpy().astype(np.int32),
            "verdict": rollout.verdict[picked].numpy().astype(np.float32),
        },
        per_token,
        [rollout.prompts[b].id if rollout.prompts else "" for b in places.tolist()],
        [rollout.stop_reason[b] for b in places.tolist()],
    )


def _told(batch: Batch, objective: Objective, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By-products by the paths of their columns, `[N]`; what was settled before them too.

    What is said of a term is NaN on rows that are in no sum of it.
    """
    token = batch.token
    told: dict[str, Tensor] = {}
    for path, value in rows.items():
        if path == LOG_RATIO or path.startswith(f"{LOG_RATIO}/"):
            # what the view said is what others call by its name; the ratio follows from it
            told[TEACHER_LOGP + path.removeprefix(LOG_RATIO)] = value + rows["student_logp"]
        else:
            told[path] = value
    settled = {"old_logp": token.old_logp, "value": token.values}
    settled |= {path: token.coupled[path] for path in token.coupled if path.startswith(REWARD)}
    for path, per_token in settled.items():
        if per_token is not None and path not in told:
            told[path] = per_token[token.mask]
    looks = rows_in(objective, batch)
    for path, value in told.items():
        label = path.partition("/")[2].partition("/")[0].partition(".")[0]
        if path.startswith(OF_TERMS) and label in looks:
            told[path] = torch.where(looks[label], value, math.nan)
    return told


def rows_in(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """By term, the rows whose loss is in its sum, `[N]`."""
    found = {}
    for label, term in objective.labelled():
        rows = pack_rows(chosen_rows(batch.token, term.rows), batch.token.mask)
        missing = unanswered(batch.token.views, term.against)
        if missing is not None and objective.reads_its_view(term):
            rows = rows & ~missing
        found[label] = rows
    return found


# --------------------------------------------------------------------------------------------
# Files


def _write(table: Any, file: Path) -> None:
    """Write a part, whole or not at all.

    Whole numbers as differences, which take no room where a number is repeated or counts up. For
    floats, of which the last digits cannot be foretold, LZ4 in place of Zstandard: a tenth more
    bytes, and queries that read many of them take half the time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {field.name: field.type for field in table.schema}
    floats = [name for name, kind in kinds.items() if pa.types.is_floating(kind)]
    whole = [name for name, kind in kinds.items() if pa.types.is_integer(kind)]
    worded = [name for name, kind in kinds.items() if pa.types.is_dictionary(kind)]
    encoding = dict.fromkeys(floats, "PLAIN") | dict.fromkeys(whole, "DELTA_BINARY_PACKED")
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            pq.write_table(
                table,
                handle,
                compression=dict.fromkeys(kinds, "zstd") | dict.fromkeys(floats, "lz4"),
                use_dictionary=worded,
                column_encoding=encoding,
                row_group_size=len(table),
            )
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def texts_of(tokenizer: Any) -> Callable[[int], str]:
    """From a token to its text, by a tokenizer of Hugging Face.

    Decoded alone, a token may lose the space in front of it, and a part of a character cannot be
    shown; the tokenizer's own piece then helps.
    """

    def text_of(token: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the unembedding that no text has
            return f"<{token}>"
        text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if not text or "\ufffd" in text:
            return str(piece)
        return f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text

    return text_of

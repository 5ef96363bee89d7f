"""Questions to the token records of a run, in SQL, and ready-made ones. Imports no torch.

A run is opened in DuckDB as views, read-only: `tokens` are the rows of the part files, with some
columns more; `steps` the metrics of `events.jsonl`, one a row; `samples` the lines of
`samples.jsonl`. A question can read these and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from opd.errors import ConfigError, DataError
from opd.token_columns import METADATA, VERSION, part_files

ADDED: Mapping[str, str] = MappingProxyType(
    {
        "log_ratio": "teacher_logp - student_logp",
        "log_ratio__NAME": "of a further teacher: teacher_logp__NAME - student_logp",
        "loss": "sum of the columns loss__TERM",
        "share": "of the responses that are recorded: a sum over all is about sum / share",
    }
)
"""Columns of `tokens` that are not in the files."""


@dataclass(frozen=True)
class Answer:
    """The rows of a query.

    Attributes:
        columns: their names.
        rows: one tuple each.
        more: whether a limit left some out.
        why_none: of a ready-made query that finds nothing, the reason.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    more: bool = False
    why_none: str = ""

    def as_dicts(self) -> list[dict[str, Any]]:
        """One mapping per row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class ReadyMade:
    """A query that comes with the library.

    Attributes:
        summary: one line.
        sql: from the columns of `tokens` and a limit on the rows.
        reads: of these columns, those of which one must have a number below 0, or any at all.
    """

    summary: str
    sql: Callable[[Sequence[str], int], str]
    reads: Callable[[Sequence[str]], Sequence[str]] = tuple


class Records:
    """The records of one run, to be asked; a context manager.

    Args:
        folder: of the run.
        threads: that DuckDB may use; 0 leaves the choice to it.

    Raises:
        ConfigError: no run folder.
        DataError: parts that a later version has written.
    """

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        if not (folder / "config.toml").exists():
            raise ConfigError(f"{folder} is no run folder; `opd list runs` shows those there are")
        import duckdb

        self._folder = folder
        self._database = duckdb.connect(config={"threads": threads} if threads else {})
        self._parts = [str(part.absolute()) for part in part_files(folder / "tokens")]
        self.columns: tuple[str, ...] = ()
        if self._parts:
            self._open_tokens()
        self._close_off()

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def ask(self, question: str, *, limit: int | None = None) -> Answer:
        """The answer to a query, or to a ready-made one by its name.

        Args:
            limit: most rows; None for all. Of a ready-made query that lists single things, how
                many; 20 if None.

        Raises:
            ConfigError: SQL that does not work, or is no query; a run without token records.
        """
        ready = READY_MADE.get(question)
        if ready is not None:
            self._check_tokens()
            if self._database.execute("select 1 from tokens limit 1").fetchone() is None:
                raise ConfigError(f"{self._folder} has no token in its records yet")
            in_use = self._columns_in_use()
            question = ready.sql(in_use, limit or MOST_ROWS)
        import duckdb

        try:
            statements = self._database.extract_statements(question)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise ConfigError(
                    f"{question!r} is no query; write one `select ...`, or name a ready-made one: "
                    f"{', '.join(READY_MADE)}"
                )
            self._provide(question)
            found = self._database.execute(question)
            columns = tuple(column[0] for column in found.description or ())
            rows = found.fetchall() if limit is None else found.fetchmany(limit + 1)
        except duckdb.Error as error:
            if re.search(r"\btokens\b", question, re.IGNORECASE):
                self._check_tokens()
            raise ConfigError(self._explained(error)) from None
        kept = rows if limit is None else rows[:limit]
        why = self._why_nothing(ready, in_use) if ready is not None and not rows else ""
        return Answer(columns, kept, more=len(rows) > len(kept), why_none=why)

    # -- views -------------------------------------------------------------------------------

    def _open_tokens(self) -> None:
        told = self._metadata(self._parts[0])
        version = int(told.get("version", 0))
        if version > VERSION:
            raise DataError(
                f"{self._parts[0]} has version {version} of the token records, and this opd reads "
                f"up to {VERSION}; use a newer opd"
            )
        files = ", ".join(map(_quoted, self._parts))
        source = f"read_parquet([{files}], union_by_name = true)"
        found = self._database.execute(f"describe select * from {source}").fetchall()
        stored = [row[0] for row in found]
        further = [name.removeprefix(LOGP) for name in stored if name.startswith(f"{LOGP}__")]
        added = {
            **{RATIO + name: f"{LOGP}{name} - student_logp" for name in ("", *further)},
            "loss": _sum_of([name for name in stored if name.startswith("loss__")]),
            "share": told.get("share", "null"),
        }
        shown = ", ".join(f"{sql} as {name}" for name, sql in added.items())
        self._database.execute(f"create view tokens as select *, {shown} from {source}")
        self.columns = (*stored, *added)

    def _columns_in_use(self) -> list[str]:
        """The columns without those that distillation has nothing in.

        Of advantages, which a warm-up has of its own, and of log ratios: those to further teachers
        are in use where there is none to the view `teacher`.
        """
        ratios = [name for name in _ratios(self.columns) if self._has(f"{name} is not null")]
        ratios = [name for name in ratios if name == RATIO] or ratios
        advantages = [name for name in self.columns if name.startswith("advantage__")]
        filled = {name for name in advantages if self._has(f"{name} is not null")} | set(ratios)
        asked = {*advantages, *_ratios(self.columns)}
        return [name for name in self.columns if name in filled or name not in asked]

    def _has(self, condition: str = "true") -> bool:
        """Whether the ready-made queries look at a token that is so."""
        first = f"select 1 from tokens where {WHERE} and {condition} limit 1"
        return self._database.execute(first).fetchone() is not None

    def _why_nothing(self, ready: ReadyMade, in_use: Sequence[str]) -> str:
        """Why a ready-made query has no row."""
        if not self._has():
            found = self._database.execute("select distinct phase from tokens").fetchall()
            return (
                "ready-made queries are about tokens of distillation that a loss may look at, and "
                "none is recorded; ask in SQL about the phases that are: "
                f"{', '.join(sorted(row[0] for row in found))}"
            )
        reads = ready.reads(in_use)
        if not reads:
            return (
                "no token of this run was compared with a teacher on the token that was sampled: "
                f"{LOGP} is empty"
            )
        return f"nothing is below 0 in {', '.join(reads)}"

    def _metadata(self, part: str) -> dict[str, str]:
        rows = self._database.execute(
            "select key::varchar, value::varchar from parquet_kv_metadata(?)", [part]
        ).fetchall()
        return {key[len(METADATA) :]: value for key, value in rows if key.startswith(METADATA)}

    def _close_off(self) -> None:
        """From now on the parts can be read, and no other file, and no setting can be changed."""
        files = ", ".join(map(_quoted, self._parts))
        for setting in (
            f"perfect_ht_threshold = {TOKEN_BITS}",
            f"allowed_paths = [{files}]",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            self._database.execute(f"set {setting}")

    def _provide(self, question: str) -> None:
        """Make the views that a question names and that are not there yet."""
        for name, read in (("steps", _steps), ("samples", _samples)):
            if re.search(rf"\b{name}\b", question, re.IGNORECASE):
                self._database.register(name, read(self._folder))

    @property
    def why_none(self) -> str:
        """Why the run has no token records; empty where it has some."""
        if self._parts:
            return ""
        return (
            f"{self._folder} has no token records: either its log.token_share is 0, which is set "
            "in the run file before a run begins (1 records every response), or it has come to no "
            "checkpoint yet, at which they are written"
        )

    def _check_tokens(self) -> None:
        if self.why_none:
            raise ConfigError(self.why_none)

    def _explained(self, error: Exception) -> str:
        """DuckDB's words, and which columns there are."""
        said = "\n".join(line for line in str(error).splitlines() if line.strip())
        columns = f"\ncolumns of tokens: {', '.join(self.columns)}" if self.columns else ""
        return f"{said}{columns}"


def _sum_of(columns: Sequence[str]) -> str:
    """Of those that are known; null where none is."""
    if len(columns) < 2:
        return columns[0] if columns else "null::float"
    known = " + ".join(f"coalesce({name}, 0)" for name in columns)
    return f"case when coalesce({', '.join(columns)}) is not null then {known} end"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _steps(folder: Path) -> Any:
    """Metrics of the events, one a row."""
    import pyarrow as pa

    rows: dict[str, list[Any]] = {
        name: [] for name in ("phase", "step", "name", "value", "total", "count")
    }
    for event in _lines(folder / "events.jsonl"):
        for name, (total, count) in event.get("metrics", {}).items():
            value = total / count if count and total is not None else None
            found = (event["phase"], event["step"], name, value, total, count)
            for column, cell in zip(rows.values(), found, strict=True):
                column.append(cell)
    kinds = (pa.string(), pa.int32(), pa.string(), pa.float64(), pa.float64(), pa.float64())
    return pa.table(
        {name: pa.array(rows[name], kind) for name, kind in zip(rows, kinds, strict=True)}
    )


SAMPLE_COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("phase", "step", "split", "prompt", "response", "stop_reason"), ""),
        **dict.fromkeys(("start", "end", "teacher"), ""),
        **dict.fromkeys(("verdict", "start_verdict", "teacher_verdict"), "number"),
        "step": "number",
    }
)


def _samples(folder: Path) -> Any:
    """The lines of `samples.jsonl`; null where a line does not say."""
    import pyarrow as pa

    lines = _lines(folder / "samples.jsonl")
    return pa.table(
        {
            name: pa.array(
                [line.get(name) for line in lines], pa.float64() if kind else pa.string()
            )
            for name, kind in SAMPLE_COLUMNS.items()
        }
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    """The records of a log; a half-written last line is left out."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


# --------------------------------------------------------------------------------------------
# Ready-made queries

MOST_ROWS = 20
TOKEN_BITS = 18
"""Groups are kept in an array, which is the fastest, as long as such a number tells them apart."""
WHERE = "phase = 'train' and update = 1 and mask"
"""What they look at: every recorded token of distillation once, at a step's first update."""

CONTEXT = 12
"""Tokens shown before one of the worst."""

LOGP, RATIO = "teacher_logp", "log_ratio"


def _ratios(columns: Sequence[str]) -> list[str]:
    """The columns of log ratios: to the view `teacher`, and to further ones."""
    return [name for name in columns if name == RATIO or name.startswith(f"{RATIO}__")]


def _signals(columns: Sequence[str]) -> list[str]:
    """What an update pushes by: advantages, or log ratios where there are none."""
    return [name for name in columns if name.startswith("advantage__")] or _ratios(columns)


def _averaged(columns: Sequence[str]) -> dict[str, str]:
    """What is averaged over a group of tokens, and how it is called."""
    advantages = [name for name in columns if name.startswith("advantage__")]
    shown = {name: name for name in _ratios(columns) or [RATIO]}
    shown |= {"loss": "loss", "student_entropy": "entropy"}
    return shown | {name: name for name in advantages}


def _means(columns: Sequence[str]) -> str:
    """Of a group of tokens, how many there are and the averages."""
    averages = [f"avg({name}) as {title}" for name, title in _averaged(columns).items()]
    return ", ".join(["count(*) as tokens", *averages])


def _sums(columns: Sequence[str], raw: str, more: str = "") -> str:
    """Sums and counts by a stored column. Whoever groups by what is computed from it adds these
    up: to compute it for each token would take longer than all else."""
    parts = [f"sum({name}) as sum_{t}, count({name}) as count_{t}" for name, t in _titles(columns)]
    return (
        f"select {raw}, count(*) as tokens, {', '.join(parts)}{more}\n"
        f"from tokens where {WHERE} group by {raw}"
    )


def _means_of_sums(columns: Sequence[str]) -> str:
    averages = [f"sum(sum_{t}) / nullif(sum(count_{t}), 0) as {t}" for _, t in _titles(columns)]
    return ", ".join(["sum(tokens)::bigint as tokens", *averages])


def _titles(columns: Sequence[str]) -> list[tuple[str, str]]:
    return list(_averaged(columns).items())


def _worst_tokens(columns: Sequence[str], limit: int) -> str:
    views = [name.removeprefix(RATIO) for name in _ratios(columns)] or [""]
    teacher = "" if views == [""] else " w.teacher,"
    of_each = "\n  union all\n".join(
        f"""\
  (select step, sequence, position, text, '{view.removeprefix("__")}' as teacher,
          student_logp, {LOGP}{view} as teacher_logp, {RATIO}{view} as log_ratio, loss
   from tokens where {WHERE} and {RATIO}{view} is not null
   order by {RATIO}{view} limit {limit})"""
        for view in views
    )
    return f"""\
with worst as (
  select * from (
{of_each}
  ) order by log_ratio limit {limit}
), places as (
  select distinct step, sequence, position from worst
), before as (
  select w.step, w.sequence, w.position, string_agg(t.text, '' order by t.position) as text
  from places w join tokens t
    on t.step = w.step and t.sequence = w.sequence
   and t.position < w.position and t.position >= w.position - {CONTEXT}
  where t.phase = 'train' and t.update = 1
  group by all
)
select w.step, w.sequence, w.position, b.text as before, w.text,{teacher}
       w.student_logp, w.teacher_logp, w.log_ratio, w.loss
from worst w left join before b using (step, sequence, position)
order by w.log_ratio, w.step, w.sequence, w.position, w.teacher"""


def _negative_mass(columns: Sequence[str], limit: int) -> str:
    signals = _signals(columns) or [RATIO]
    return "\nunion all\n".join(
        f"""\
(select '{name}' as signal, token, any_value(text) as text,
        sum({name}) as mass, sum({name}) / sum(sum({name})) over () as share,
        count(*) as negative, avg({name}) as mean, min({name}) as lowest
 from tokens where {WHERE} and {name} < 0
 group by token order by mass, token limit {limit})"""
        for name in signals
    )


def _by_position(columns: Sequence[str], limit: int) -> str:
    return f"""\
with sums as (
{_sums(columns, "position")}
)
select (2 ** bucket - 1)::int as first, (2 ** (bucket + 1) - 2)::int as last,
       {_means_of_sums(columns)}
from (select *, floor(log2(position + 1))::int as bucket from sums)
group by bucket order by bucket"""


def _by_id(columns: Sequence[str], limit: int) -> str:
    return f"""\
with commonest as materialized (
  select token from tokens where {WHERE} group by token order by count(*) desc, token limit {limit}
)
select token, any_value(text) as text,
       {_means(columns)}
from tokens where {WHERE} and token in (from commonest)
group by token order by tokens desc, token"""


def _by_prompt(columns: Sequence[str], limit: int) -> str:
    ratios = [f"avg({name})" for name in _ratios(columns) or [RATIO]]
    return f"""\
select prompt_id, avg(verdict) as verdict,
       {_means(columns)}
from tokens where {WHERE}
group by prompt_id order by least({", ".join(ratios)}) nulls last, prompt_id limit {limit}"""


def _by_verdict(columns: Sequence[str], limit: int) -> str:
    return f"""\
with sums as (
{_sums(columns, "verdict", ", count_if(position = 0) as responses")}
)
select round(verdict, 1) as verdict, sum(responses)::bigint as responses,
       {_means_of_sums(columns)}
from sums group by round(verdict, 1) order by verdict nulls last"""


def _by_step(columns: Sequence[str], limit: int) -> str:
    return f"""\
with sums as (
{_sums(columns, "step")}
), ends as (
  select ceil((max(step) + 1 - min(step)) / {limit}.0)::int as width, min(step) as start from sums
)
select min(step) as first_step, max(step) as last_step,
       {_means_of_sums(columns)}
from sums, ends group by (step - start) // width order by first_step"""


READY_MADE: Mapping[str, ReadyMade] = MappingProxyType(
    {
        "worst-tokens": ReadyMade(
            "single tokens that the teacher finds least likely beside the student, in context",
            _worst_tokens,
            _ratios,
        ),
        "negative-mass": ReadyMade(
            "which tokens the negative advantages sit on (without any: log-ratios), with shares",
            _negative_mass,
            _signals,
        ),
        "by-position": ReadyMade("means by place in the response, in buckets", _by_position),
        "by-id": ReadyMade("means by token, the commonest first", _by_id),
        "by-prompt": ReadyMade(
            "means by prompt, the least likely to the teacher first", _by_prompt
        ),
        "by-verdict": ReadyMade("means by the verifier's score of the response", _by_verdict),
        "by-step": ReadyMade("means over the run, in stretches of steps", _by_step),
    }
)

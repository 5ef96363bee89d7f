"""`opd query`: its answers are those worked out from the numbers, and it reads nothing else."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from opd.cli.main import main
from opd.diagnose.records import TokenRecords
from opd.errors import ConfigError, DataError
from opd.formula import divergence, reward
from opd.objective import Dense, Objective, Sampled
from opd.report.queries import READY_MADE, Records
from opd.rollout.pack import pack_rollout
from opd.token_columns import METADATA, part_files
from opd.types import Prompt
from tests.builders import STUDENT, rollout_of
from tests.cli.test_main import TORCH_FREE, run_python

OBJECTIVE = Objective(
    Sampled(reward=reward.teacher_log_ratio, name="distill"),
    Dense(divergence=divergence.reverse_kl),
)
VOCABULARY, RESPONSES, LENGTH, STEPS = 6, 3, 9, 5


class Token(dict[str, Any]):
    """What was written of a token."""


def write(
    folder: Path,
    *,
    with_advantage: bool = True,
    views: Sequence[str] = ("",),
    phases: Sequence[str] = ("warmup", "train"),
) -> list[Token]:
    """A run folder of five steps of distillation, after one of warm-up; what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").touch()
    metrics = '{"phase": "train", "step": %d, "metrics": {"rollout/length": [27.0, 3.0]}}\n'
    (folder / "events.jsonl").write_text("".join(metrics % step for step in (1, 2)))
    sample = {"phase": "train", "step": 1, "prompt": "p", "response": "r", "verdict": 1.0}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    records = TokenRecords(folder / "tokens", share=1.0, seed=0, text_of=" t{}".format)
    draw = torch.Generator().manual_seed(0)
    shape, written = (RESPONSES, LENGTH), []
    for phase, step, update in [
        ("warmup", 1, 1),
        *(("train", step, update) for step in range(1, STEPS + 1) for update in (1, 2)),
    ]:
        if phase not in phases:
            continue
        tokens = torch.randint(VOCABULARY, shape, generator=draw)
        verdict = torch.tensor([0.0, 1.0, math.nan])
        mask = torch.ones(shape, dtype=torch.bool)
        rollout = rollout_of(
            tokens,
            mask,
            torch.full(shape, STUDENT),
            verdict=verdict,
            prompts=tuple(Prompt(f"p{b}", (0,), "") for b in range(RESPONSES)),
        )
        values = {
            name: torch.randn(shape, generator=draw)
            for name in (
                *(f"log_ratio/{view}" if view else "log_ratio" for view in views),
                *("student_logp", "student_entropy", "loss/distill"),
            )
        }
        if with_advantage:
            values["advantage/distill"] = torch.randn(shape, generator=draw)
        if phase == "warmup":  # a term of its own
            values["advantage/imitate"] = torch.ones(shape)
        records.add(
            rollout,
            pack_rollout(rollout, pad_id=0),
            OBJECTIVE,
            {name: value[mask] for name, value in values.items()},
            phase=phase,
            step=step,
            update=update,
        )
        if step in (1, 3):
            records.flush()  # several parts
        if phase == "train" and update == 1:
            written += [
                Token(
                    {name: float(value[b, t]) for name, value in values.items()},
                    step=step,
                    sequence=b,
                    position=t,
                    token=int(tokens[b, t]),
                    verdict=float(verdict[b]),
                    prompt=f"p{b}",
                )
                for b in range(RESPONSES)
                for t in range(LENGTH)
            ]
    records.flush()
    return written


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("query") / "run"
    write(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Token]:
    return write(tmp_path_factory.mktemp("query") / "again")


def answer(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> list[dict[str, Any]]:
    assert main(["query", str(run), *words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def check_means(row: dict[str, Any], tokens: list[Token]) -> None:
    assert row["tokens"] == len(tokens)
    for column, name in {
        "log_ratio": "log_ratio",
        "loss": "loss/distill",
        "entropy": "student_entropy",
        "advantage__distill": "advantage/distill",
    }.items():
        assert row[column] == pytest.approx(mean([token[name] for token in tokens]), abs=1e-5)


# --------------------------------------------------------------------------------------------
# Ready-made queries


@pytest.mark.parametrize(
    ("query", "columns", "group"),
    [
        ("by-id", ("token",), lambda token: (token["token"],)),
        ("by-prompt", ("prompt_id",), lambda token: (token["prompt"],)),
        ("by-step", ("first_step", "last_step"), lambda token: (token["step"],) * 2),
        (
            "by-verdict",
            ("verdict",),
            lambda token: (None if math.isnan(token["verdict"]) else token["verdict"],),
        ),
        (
            "by-position",
            ("first", "last"),
            lambda token: next(
                (low, high)
                for low, high in ((0, 0), (1, 2), (3, 6), (7, 14))
                if low <= token["position"] <= high
            ),
        ),
    ],
)
def test_means_are_those_of_the_tokens(
    query: str,
    columns: tuple[str, ...],
    group: Callable[[Token], tuple[Any, ...]],
    run: Path,
    written: list[Token],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of distillation, at the first update of a step."""
    groups: dict[tuple[Any, ...], list[Token]] = defaultdict(list)
    for token in written:
        groups[group(token)].append(token)
    rows = answer(capsys, run, query)
    assert {tuple(row[column] for column in columns) for row in rows} == set(groups)
    for row in rows:
        assert not [name for name in row if "imitate" in name]
        check_means(row, groups[tuple(row[column] for column in columns)])


def test_steps_are_put_together_where_there_are_many(
    run: Path, written: list[Token], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = answer(capsys, run, "by-step", "--limit", "2")
    assert [(row["first_step"], row["last_step"]) for row in (first, second)] == [(1, 3), (4, 5)]
    check_means(second, [token for token in written if token["step"] > 3])


def test_by_verdict_counts_responses(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, run, "by-verdict")
    assert [(row["verdict"], row["responses"]) for row in rows] == [(0, 5), (1, 5), (None, 5)]


def test_the_worst_tokens_come_with_what_is_before_them(
    run: Path, written: list[Token], capsys: pytest.CaptureFixture[str]
) -> None:
    worst = sorted(written, key=lambda token: token["log_ratio"])[:4]
    rows = answer(capsys, run, "worst-tokens", "--limit", "4")
    for row, token in zip(rows, worst, strict=True):
        assert [row[name] for name in ("step", "sequence", "position")] == [
            token[name] for name in ("step", "sequence", "position")
        ]
        assert row["log_ratio"] == pytest.approx(token["log_ratio"], abs=1e-5)
        before = [
            f" t{other['token']}"
            for other in written
            if (other["step"], other["sequence"]) == (token["step"], token["sequence"])
            and other["position"] < token["position"]
        ]
        assert (row["before"] or "") == "".join(before)
        assert row["text"] == f" t{token['token']}"


@pytest.mark.parametrize("with_advantage", [True, False])
def test_negative_mass_adds_up_to_the_whole(
    with_advantage: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write(tmp_path / "run", with_advantage=with_advantage)
    name = "advantage/distill" if with_advantage else "log_ratio"
    mass: dict[int, float] = defaultdict(float)
    for token in written:
        mass[token["token"]] += min(0.0, token[name])
    rows = answer(capsys, tmp_path / "run", "negative-mass")
    assert [row["token"] for row in rows] == sorted(mass, key=lambda token: mass[token])
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    for row in rows:
        assert row["signal"] == name.replace("/", "__")
        assert row["mass"] == pytest.approx(mass[row["token"]], abs=1e-4)
        assert row["share"] == pytest.approx(row["mass"] / sum(mass.values()), abs=1e-5)
    # a limit leaves rows out, and no mass out of the whole
    few = answer(capsys, tmp_path / "run", "negative-mass", "--limit", "2")
    assert few == rows[:2]


def test_teachers_with_names_are_used_where_there_is_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, names = tmp_path / "run", ("maths", "My-code")
    columns = {"maths": "maths", "My-code": "My_code"}
    written = write(run, with_advantage=False, views=names)
    worst = sorted((token[f"log_ratio/{name}"], name, token) for token in written for name in names)
    rows = answer(capsys, run, "worst-tokens", "--limit", "30")
    assert len({row["teacher"] for row in rows}) == 2
    for row, (ratio, name, token) in zip(rows, worst[:30], strict=True):
        assert row["log_ratio"] == pytest.approx(ratio, abs=1e-5)
        assert row["teacher"] == columns[name]
        assert row["teacher_logp"] == pytest.approx(ratio + token["student_logp"], abs=1e-5)
        assert (row["before"] or "").count(" t") == token["position"]
    masses = answer(capsys, run, "negative-mass")
    for name in names:
        mass = sum(min(0.0, token[f"log_ratio/{name}"]) for token in written)
        of_it = [row for row in masses if row["signal"] == f"log_ratio__{columns[name]}"]
        assert sum(row["mass"] for row in of_it) == pytest.approx(mass, abs=1e-3)
    for row in answer(capsys, run, "by-step"):
        for name in names:
            of_it = [t[f"log_ratio/{name}"] for t in written if t["step"] == row["first_step"]]
            assert row[f"log_ratio__{columns[name]}"] == pytest.approx(mean(of_it), abs=1e-5)
    prompts = answer(capsys, run, "by-prompt")
    lowest = [min(row[f"log_ratio__{columns[name]}"] for name in names) for row in prompts]
    assert lowest == sorted(lowest)
    assert len(lowest) == RESPONSES


def test_a_further_teacher_is_not_asked_about_beside_the_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, with_advantage=False, views=("", "before"))
    assert {row["signal"] for row in answer(capsys, tmp_path, "negative-mass")} == {"log_ratio"}
    assert "teacher" not in answer(capsys, tmp_path, "worst-tokens")[0]
    (row,) = answer(
        capsys,
        tmp_path,
        "select count(*) as n from tokens "
        "where log_ratio__before is distinct from teacher_logp__before - student_logp",
    )
    assert row == {"n": 0}


def why_none(capsys: pytest.CaptureFixture[str], run: Path, query: str) -> str:
    assert main(["query", str(run), query]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert answer_of_nothing(capsys, run, query) == shown.err
    return shown.err


def answer_of_nothing(capsys: pytest.CaptureFixture[str], run: Path, query: str) -> str:
    assert main(["query", str(run), query, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == []
    return shown.err


def test_a_ready_made_query_that_finds_nothing_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, views in {"alone": (), "graded": ()}.items():
        write(tmp_path / name, with_advantage=name == "graded", views=views)
    for query, run in (
        ("worst-tokens", "alone"),
        ("negative-mass", "alone"),
        ("worst-tokens", "graded"),
    ):
        said = " ".join(why_none(capsys, tmp_path / run, query).split())
        assert f"{query} finds nothing: no token of this run was compared with a teacher" in said
    assert answer(capsys, tmp_path / "graded", "negative-mass")
    write(tmp_path / "warm", phases=("warmup",))
    for query in READY_MADE:
        said = " ".join(why_none(capsys, tmp_path / "warm", query).split())
        assert "tokens of distillation that a loss may look at, and none is recorded" in said
        assert "phases that are: warmup" in said


def test_a_query_of_ones_own_that_finds_nothing_needs_no_reason(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer_of_nothing(capsys, run, "select 1 from tokens where step = 99") == ""


@pytest.mark.parametrize("query", READY_MADE)
def test_every_ready_made_query_works_where_little_is_known(
    query: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of supervised training: no teacher, no advantage, no verdict."""
    (tmp_path / "config.toml").touch()
    tokens = torch.tensor([[1, 2]])
    rollout = rollout_of(tokens, torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), STUDENT))
    records = TokenRecords(tmp_path / "tokens", share=1.0, seed=0, text_of=str)
    batch = pack_rollout(rollout, pad_id=0)
    records.add(rollout, batch, OBJECTIVE, {}, phase="train", step=1, update=1)
    records.flush()
    rows = answer(capsys, tmp_path, query)
    assert bool(rows) == (query not in ("worst-tokens", "negative-mass"))


# --------------------------------------------------------------------------------------------
# SQL


def test_sql_sees_tokens_steps_and_samples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = "select count(*) as n, count(distinct phase) as phases from tokens"
    per_step = RESPONSES * LENGTH
    assert answer(capsys, run, tokens) == [{"n": per_step * (1 + 2 * STEPS), "phases": 2}]
    steps = "select step, name, value, count from steps order by step"
    assert answer(capsys, run, steps)[1] == {
        "step": 2,
        "name": "rollout/length",
        "value": 9.0,
        "count": 3.0,
    }
    samples = "select response, verdict, split from samples"
    assert answer(capsys, run, samples) == [{"response": "r", "verdict": 1.0, "split": None}]


def test_added_columns_are_what_they_say(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (
        "abs(log_ratio - (teacher_logp - student_logp)) > 0",
        "loss is distinct from loss__distill",
        "share <> 1",
    ):
        (row,) = answer(capsys, run, f"select count(*) as n from tokens where {wrong}")
        assert row == {"n": 0}, wrong


def test_a_table_says_what_it_leaves_out_and_json_leaves_out_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["query", str(run), "select position, text from tokens", "--limit", "3"]) == 0
    shown = capsys.readouterr().out
    assert "more rows than 3; --limit N shows as many" in shown
    assert "' t" in shown  # a space in front is seen
    assert main(["query", str(run), "select 1 as one"]) == 0
    assert "more rows" not in capsys.readouterr().out
    assert len(answer(capsys, run, "select 1 from tokens")) > 200
    assert len(answer(capsys, run, "select 1 from tokens", "--limit", "7")) == 7


def test_without_a_query_the_ready_made_ones_are_listed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["query", str(run)]) == 0
    shown = capsys.readouterr().out
    for name, ready in READY_MADE.items():
        assert name in shown
        assert ready.summary.split()[0] in shown
    assert "advantage__distill" in shown
    assert [row["name"] for row in answer(capsys, run)] == list(READY_MADE)


def refused(capsys: pytest.CaptureFixture[str], run: Path, query: str) -> str:
    assert main(["query", str(run), query]) == 2
    return capsys.readouterr().err


def test_mistakes_in_sql_are_told_with_the_columns_there_are(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, run, "select advantage from tokens")
    assert "advantage" in said.splitlines()[0]
    assert "advantage__distill" in said.splitlines()[-1]
    assert "syntax error" in refused(capsys, run, "selec 1 from tokens")
    assert "Did you mean 'worst-tokens'?" in refused(capsys, run, "worst_token")


@pytest.mark.parametrize(
    "query",
    [
        "copy (select 1) to '{out}'",
        "copy tokens to '{part}' (format parquet)",
        "explain analyze copy (select 1) to '{out}'",
        "select 1; copy (select 1) to '{out}'",
        "attach '{out}' as other",
        "set enable_external_access = true",
        "create table mine as select 1",
        "select * from read_csv('{secret}')",
        "select * from '{secret}'",
        "select * from read_text('{secret}')",
        "select * from glob('{folder}/*')",
        "",
    ],
)
def test_a_query_reads_the_records_and_does_nothing_else(
    query: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n42\n")
    part = part_files(run / "tokens")[0]
    before = part.read_bytes()
    where = {"out": tmp_path / "out", "secret": secret, "part": part, "folder": tmp_path}
    said = refused(capsys, run, query.format(**where))
    assert "42" not in said
    assert sorted(tmp_path.iterdir()) == [secret]
    assert part.read_bytes() == before


def test_a_run_without_records_says_how_to_have_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "none")
    shutil.rmtree(tmp_path / "none" / "tokens")
    for query in ("by-step", "select * from tokens"):
        assert "log.token_share" in refused(capsys, tmp_path / "none", query)
    assert len(answer(capsys, tmp_path / "none", "select count(*) as tokens from steps")) == 1
    assert main(["query", str(tmp_path / "none")]) == 0
    assert "log.token_share" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is no run folder"):
        Records(tmp_path / "nowhere")


def test_records_of_a_later_version_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    part = part_files(tmp_path / "tokens")[0]
    table = pq.read_table(part)
    metadata = {**table.schema.metadata, f"{METADATA}version".encode(): b"2"}
    pq.write_table(table.replace_schema_metadata(metadata), part)
    with pytest.raises(DataError, match="has version 2 of the token records"):
        Records(tmp_path)


def test_a_query_loads_no_torch(run: Path) -> None:
    done = run_python("-c", TORCH_FREE, "query", str(run), "by-step")
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stderr

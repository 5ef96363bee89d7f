"""Failures and what mends them: the run files of `recipes/failures` are whole and say one thing."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import opd
from opd import catalog
from opd.data.tasks import TASKS
from opd.training.config import Run
from opd.training.loop import train_run
from tests.test_docs import module_from

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes/failures"
FILES = sorted(file.stem for file in FOLDER.glob("*.toml"))
FEW = 12


@pytest.fixture(scope="module")
def failures() -> Iterator[Any]:
    """`benchmarks/failures.py`, imported as its command runs it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield module_from("failures", ROOT / "benchmarks/failures.py")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run files with the data that `hints.py` makes, fewer rows of it."""
    copied = tmp_path_factory.mktemp("recipes") / "failures"
    shutil.copytree(FOLDER, copied, ignore=shutil.ignore_patterns("*.jsonl", "__pycache__"))
    hints = module_from("hints", copied / "hints.py")
    hints.TRAIN, hints.TEST = 5 * FEW, FEW
    hints.main()
    return copied


def loaded(folder: Path, name: str) -> Run:
    own = ["--student.model", "builtin:sort-student"] if name.startswith("privilege") else []
    return opd.load(folder / f"{name}.toml", [*own, "--data.held_out", str(FEW)])


def test_every_pair_has_its_two_files_and_no_file_is_left_over(failures: Any) -> None:
    named = {name for pair in failures.PAIRS for name in (pair.name, f"{pair.name}_fixed")}
    assert named | {"reader"} == set(FILES)
    assert {pair.alarm for pair in failures.PAIRS} - {""} <= set(catalog.alarms())


@pytest.mark.parametrize("name", FILES)
def test_nothing_stands_in_the_way_of_a_run(name: str, folder: Path) -> None:
    findings = opd.check(loaded(folder, name))
    assert [finding for finding in findings if finding.level == "error"] == []


@pytest.mark.parametrize("name", ["cached_teacher", "conflicting_teachers"])
def test_a_mistake_that_is_not_declared_is_refused(name: str, folder: Path) -> None:
    text = (folder / f"{name}.toml").read_text(encoding="utf-8")
    careless = folder / f"{name}_undeclared.toml"
    careless.write_text(text.partition("[check]")[0], encoding="utf-8")
    findings = opd.check(opd.load(careless))
    assert any(finding.level == "error" for finding in findings)


def test_a_pair_differs_in_what_it_says(failures: Any, folder: Path) -> None:
    """The students, their warm-ups and the lengths of the runs are the same but for the remedy."""
    for pair in failures.PAIRS:
        bad, good = (
            asdict(loaded(folder, name).config) for name in (pair.name, f"{pair.name}_fixed")
        )
        differ = {key for key in bad if bad[key] != good[key]}
        allowed = {"flawed_prefix": {"warmup"}, "wrong_outcome": {"method", "sampler", "train"}}
        further = {"check", "teacher", "teachers", "method"}
        assert differ, pair.name
        assert differ <= allowed.get(pair.name, further), (pair.name, differ)


def test_the_data_is_what_its_page_says(folder: Path) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    sort = TASKS["sort"]
    hints, puzzles, habits = (rows(f"{name}.jsonl") for name in ("hints", "puzzles", "habits"))
    told = [row for row in hints if "#" in row["prompt"]]
    assert len(told) == len(hints) * 5 // 6
    for row in told:
        solution, _, prompt = row["prompt"].partition("#")
        assert solution == row["response"] == sort.solve(prompt)
    assert not any("#" in row["prompt"] for row in [*puzzles, *rows("hints_test.jsonl")])
    assert len({row["note"].partition("#")[0] for row in puzzles}) == 1
    assert all(row["hint"] == f"{row['response']}#{row['prompt']}" for row in puzzles)
    falling = [row for row in habits if row["response"].endswith(f">{row['answer']}")]
    assert all(
        row["answer"] == "".join(sorted(row["prompt"][1:-1], reverse=True)) for row in habits
    )
    uneven = [row for row in habits if row["answer"] != row["answer"][::-1]]
    assert len(uneven) == len(habits)
    assert len(falling) == len(habits) * 2 // 3


@pytest.mark.parametrize("name", ["privilege_mismatch_fixed", "wrong_outcome_fixed"])
def test_runs_with_data_of_their_own_train(name: str, folder: Path, tmp_path: Path) -> None:
    words = ["--train.steps", "1", "--warmup.steps", "0", "--train.prompts_per_step", "2"]
    words += ["--sampler.max_new_tokens", "8", "--evaluate.test_prompts", "2"]
    words += ["--data.held_out", "2", "--student.model", "builtin:sort-student"]
    run = opd.load(folder / f"{name}.toml", [*words, "--output", str(tmp_path), "--name", "run"])
    *_, last = train_run(run)
    assert last.summary is not None
    assert last.summary["exit_reason"] == "finished"


def test_the_table_tells_a_named_failure_from_one_that_is_not(failures: Any) -> None:
    def row(pair: Any, system: str, start: float, end: float, seed: int, **alarms: int) -> Any:
        score = {"value": start}, {"value": end}
        names = dict(zip(("start", "end"), score, strict=True))
        return {"case": f"{pair.name}, seed {seed}", "system": system, "alarms": alarms} | names

    pair = next(each for each in failures.PAIRS if each.name == "length_inflation")
    rows = [
        row(pair, "failure", 0.4, 0.0, 0, length_inflation=12, repetition=3),
        row(pair, "failure", 0.2, 0.1, 1, repetition=5),
        row(pair, "fixed", 0.4, 0.5, 0),
        row(pair, "fixed", 0.2, 0.7, 1),
    ]
    (line,) = failures.table(rows).splitlines()[2:]
    assert "| 0.300 | 0.050 | 0.600 | `length_inflation`, 1 of 2, from step 12 |" in line

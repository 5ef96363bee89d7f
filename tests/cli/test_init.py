"""`opd init`: few keys, a file that works, nothing overwritten."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from opd.cli.main import main
from opd.training.check import check
from opd.training.config import load
from tests.cli.conftest import TINY


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "my_run.toml"
    assert main(["init", str(file)]) == 0
    return file


def test_the_file_has_at_most_five_keys_each_with_a_comment(run_file: Path) -> None:
    text = run_file.read_text()
    keys = [key for table in tomllib.loads(text).values() for key in table]
    assert 1 <= len(keys) <= 5
    lines = [line for line in text.splitlines() if " = " in line and not line.startswith("#")]
    assert len(lines) == len(keys)
    assert all("#" in line for line in lines)


def test_the_file_runs_as_it_is(run_file: Path, tmp_path: Path) -> None:
    assert check(load(run_file)) == []
    assert main(["run", str(run_file), *TINY, "--output", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "runs" / "sort-1" / "model" / "model.safetensors").exists()


def test_an_existing_file_is_left_alone(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file.write_text("mine")
    assert main(["init", str(run_file)]) == 2
    assert "exists" in capsys.readouterr().err
    assert run_file.read_text() == "mine"


def test_a_folder_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "none" / "a.toml")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_defaults_that_follow_from_other_keys_do_not_touch_what_is_given(run_file: Path) -> None:
    config = load(run_file).config
    assert config.warmup.learning_rate == config.train.learning_rate == 1.5e-3
    assert config.sampler.max_new_tokens == 64
    given = load(
        run_file, ["--warmup.learning_rate", "1e-2", "--sampler.max_new_tokens", "9"]
    ).config
    assert (given.warmup.learning_rate, given.sampler.max_new_tokens) == (1e-2, 9)
    other = load(run_file, ["--data.prompts", "problems.jsonl"]).config
    assert other.sampler.max_new_tokens == 512

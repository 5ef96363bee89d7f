"""Words, mistakes, exit codes, and what may not be imported for them."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from opd.cli.main import COMMANDS, PLAIN_KEYS, SECTIONS, main, split_overrides
from opd.training.config import RunConfig
from tests.cli.conftest import TINY

TORCH_FREE = """
import sys
from opd.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "matplotlib"} & sys.modules.keys()
print("heavy:", sorted(heavy), file=sys.stderr)
sys.exit(code)
"""


def run_python(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_help_takes_at_most_0_4_cpu_seconds_and_no_torch(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python("-c", TORCH_FREE, "--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert "heavy: []" in done.stderr
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent <= 0.4


@pytest.mark.parametrize(
    "words",
    [
        "list methods --json",
        "list formulas",
        "list rules --json",
        "list diagnostics --json",
        "list tasks",
        "list runs",
        "init my.toml",
        "run --train.stesp 3",
        "run missing.toml",
        "run --method vpod",
        "check --sampler.top_p 2",
        "check --check.declared ['stale-reward']",
        "explain gkt",
    ],
)
def test_listings_and_config_errors_import_no_torch(words: str, tmp_path: Path) -> None:
    done = run_python("-c", TORCH_FREE, *words.split(), cwd=tmp_path)
    assert "heavy: []" in done.stderr
    assert done.returncode == (0 if words.startswith(("list", "init")) else 2), done.stderr


def test_python_m_opd_is_opd(tmp_path: Path) -> None:
    done = run_python("-m", "opd", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout[:4]) == (0, "opd ")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("rnu", ["no command 'rnu'", "'run'"]),
        ("run --reusme x", ["--reusme", "'--resume'"]),
        ("run --sede 3", ["--sede", "'--seed'"]),
        ("run --train.stesp 3", ["command line", "'stesp'", "[train]", "'steps'"]),
        ("run --train.steps many", ["train.steps", "'many'"]),
        ("run --train.steps", ["--train.steps has no value"]),
        ("run --train.steps --seed 3", ["--train.steps has no value"]),
        ("run --method vpod", ["'vpod'", "'vopd'"]),
        ("run --method.options.gama 1", ["reverse_kl_opd has no option 'gama'"]),
        ("run nowhere.toml", ["'nowhere.toml'", "opd init"]),
        ("run --resume nowhere", ["no run folder nowhere"]),
        ("run a.toml b.toml", ["no further argument", "'b.toml'"]),
        ("list metods", ["'metods'", "'methods'"]),
        ("eval", ["TARGET", "opd eval --help"]),
        ("eval x --samples 0", ["--samples", ">= 1"]),
        ("eval x --set sort", ["NAME=SOURCE", "'sort'"]),
        ("eval x --k one", ["--k", "'one'"]),
        ("sample nowhere", ["nowhere is no run folder"]),
        ("explain gkt", ["'gkt'", "'gkd'"]),
    ],
)
def test_a_mistake_is_named_with_the_way_out_and_exits_2(
    words: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "Traceback" not in told
    for part in parts:
        assert part in told


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--method", "vpod", "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "ConfigError" in told


def test_a_run_that_had_to_stop_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["--warmup.steps", "5", "--warmup.learning_rate", "1e38", "--warmup.clip_norm", "0"]
    assert main(["run", *TINY, *huge, "--output", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: step ")
    assert "finite" in told


def test_the_known_keys_are_those_of_a_run_file() -> None:
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    assert set(SECTIONS) | set(PLAIN_KEYS) == fields
    assert set(SECTIONS) & set(PLAIN_KEYS) == {"method"}


def test_overrides_are_told_from_the_commands_own_words() -> None:
    given = "--train.steps 50 --json --seed=3 --name x --resume y"
    own, overrides = split_overrides(["my.toml", *given.split()])
    assert own == ["my.toml", "--json", "--resume", "y"]
    assert overrides == ["--train.steps", "50", "--seed=3", "--name", "x"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"opd {name}" in capsys.readouterr().out

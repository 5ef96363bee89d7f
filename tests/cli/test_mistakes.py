"""What users get wrong with models and data of their own: exit code 2, and words that help."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from opd.cli.main import main
from tests.models_zoo import save_tiny

RUN = """\
output = "out"
threads = 1
[student]
model = "student"
[teacher]
model = "teacher"
[data]
prompts = "p.jsonl"
held_out = 2
[sampler]
max_new_tokens = 4
[train]
steps = 1
prompts_per_step = 2
"""

FORMULAS = """\
import torch

def raises(teacher_entropy):
    raise ValueError("boom")

def short(teacher_entropy):
    return torch.ones(3)

def text(teacher_entropy):
    return "x"

def below(teacher_entropy, *, nats):
    return (teacher_entropy < nats).float()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny("qwen3", folder / "student")
    save_tiny("llama", folder / "teacher", seed=1)
    save_tiny("gpt2", folder / "short")
    shutil.copytree(folder / "student", folder / "two_ends")
    _edit(folder / "two_ends" / "generation_config.json", eos_token_id=[2, 5])
    shutil.copytree(folder / "student", folder / "pad_is_end")
    _edit(folder / "pad_is_end" / "tokenizer_config.json", pad_token="<eos>")
    return folder


def _edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def work(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file, prompts with answers and formulas; the models are linked."""
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "my_formulas.py").write_text(FORMULAS)
    write_prompts(tmp_path, *({"prompt": f"IS {i} EVEN? ", "answer": "YES"} for i in range(6)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_prompts(folder: Path, *records: Mapping[str, Any]) -> None:
    (folder / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that must end with exit code 2."""
    capsys.readouterr()
    assert main(list(words)) == 2
    said = capsys.readouterr()
    return said.err + said.out


def test_end_tokens_that_differ_are_refused_with_the_way_out_which_works(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run.toml", "--student.model", "two_ends"]
    assert "method.merge_stop_ids = true" in refused(capsys, "run", *words)
    assert "method.merge_stop_ids = true" in refused(capsys, "check", *words)
    merging = ["--method.merge_stop_ids", "true"]
    assert main(["check", *words, *merging]) == 0
    assert main(["run", *words, *merging, "--method", "top_k_opd"]) == 0


def test_a_padding_token_of_ones_own_does_not_matter(work: Path) -> None:
    assert main(["run", "run.toml", "--student.model", "pad_is_end"]) == 0


@pytest.mark.parametrize(
    ("use", "told"),
    [
        ('"my_formulas:raises"', "my_formulas.raises failed: ValueError: boom"),
        ('"my_formulas:short"', "my_formulas.short returned the shape [3]"),
        ('"my_formulas:text"', "my_formulas.text returned 'x'; it must return a tensor"),
        ('{ use = "my_formulas:below", nats = "1" }', "my_formulas.below with nats='1' failed"),
    ],
)
def test_a_formula_that_fails_is_named(
    use: str, told: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (work / "run.toml").open("a") as file:
        file.write(
            '[method]\nname = "custom"\n[[method.objective.terms]]\nkind = "dense"\n'
            f'divergence = "reverse_kl"\nweights = [{use}]\n'
        )
    assert told in refused(capsys, "run", "run.toml")


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_missing_answer_is_found_before_training(
    command: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(work, *({"prompt": f"Q{i}", "answer": "1"} for i in range(6)), {"prompt": "Z"})
    assert "p.jsonl:7" in refused(capsys, command, "run.toml")
    assert not (work / "out").exists()


def test_an_answer_column_that_is_not_there_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "'anwser'" in refused(capsys, "run", "run.toml", "--data.answer_column", "anwser")


@pytest.mark.parametrize("command", ["run", "check"])
def test_prompts_longer_than_the_positions_are_refused(
    command: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(work, *({"prompt": f"Q{i}" + "A" * 300} for i in range(6)))
    models = ["--student.model", "short", "--teacher.model", "short"]
    assert "256 positions" in refused(capsys, command, "run.toml", *models)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--name a/b", "'a/b'"),
        ("--name ..", "'..'"),
        ("--output p.jsonl", "p.jsonl is a file"),
        ("--train 5", "--train.KEY VALUE"),
        ("--steps 5", "--train.steps"),
        ("--method top_k_opd --method.options.k -3", "k must be a whole number >= 1, got -3"),
        ("--method gkd --method.options.student_share half", "student_share = 'half' must be a"),
        ("--data.held_out 50", "data.held_out"),
    ],
)
def test_a_mistake_in_the_words_is_told_with_the_way_out(
    words: str, told: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, "run", "run.toml", *words.split())
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    ("file", "said"), [("state.json", "state.json"), ("tensors.pt", "tensors.pt")]
)
def test_a_damaged_checkpoint_is_named(
    file: str, said: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "run.toml", "--name", "r"]) == 0
    (work / "out" / "r" / "summary.json").unlink()
    (work / "out" / "r" / "checkpoints" / "step-1" / file).write_bytes(b"{x")
    told = refused(capsys, "run", "--resume", "out/r")
    assert "step-1" in told
    assert f"{said} cannot be read" in told


def test_a_damaged_run_folder_does_not_hide_the_others(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "run.toml", "--name", "r"]) == 0
    for name, config in (("broken", "x = ["), ("other", "x = 1")):
        (work / "out" / name).mkdir()
        (work / "out" / name / "config.toml").write_text(config)
    (work / "out" / "other" / "summary.json").write_text("{")
    capsys.readouterr()
    assert main(["list", "runs", "--output", "out", "--json"]) == 0
    states = {Path(row["folder"]).name: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert states == {"r": "finished", "broken": "config.toml unreadable", "other": "unfinished"}

"""Checkpoints are whole or not there, and restore every weight in place."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd.errors import ConfigError
from opd.models import LoadedModel, LoraSettings, load_model
from opd.training.checkpoint import (
    find_checkpoints,
    restore_student,
    save_checkpoint,
    save_student,
)
from opd.training.folder import RunFolder
from tests.models_zoo import FAMILIES, tiny
from tests.training.runs import CHILDREN, Kill


def save(folder: RunFolder, student: LoadedModel, step: int, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "phase": "train",
        "order": (1, step),
        "student": student,
        "tensors": {"step": torch.tensor(step)},
        "state": {"written_at": step},
        "keep": 2,
        **changes,
    }
    return save_checkpoint(folder, **settings)


def names(folder: RunFolder) -> list[str]:
    return [checkpoint.path.name for checkpoint in find_checkpoints(folder)]


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return tiny("qwen3", hidden=8, layers=1)


def test_a_save_killed_at_any_file_operation_leaves_the_old_set_or_the_new_one(
    tmp_path: Path,
) -> None:
    child = CHILDREN.Process(target=_kill_at_every_file_operation, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0


def _kill_at_every_file_operation(output: Path) -> None:
    """In a process without threads: fork, kill the fork in its n-th operation, look, repeat."""
    student = tiny("qwen3", hidden=8, layers=1)
    before = RunFolder(output / "before")
    for step in (1, 2):
        save(before, student, step)
    whole = files_in(before.checkpoints / "step-1")
    left: list[str] = []
    operations = 0
    while True:
        operations += 1
        folder = RunFolder(output / "run")
        shutil.copytree(before.path, folder.path)
        fork = os.fork()
        if not fork:
            Kill("", str(folder.path), count=operations).arm()
            save(folder, student, 3)
            os._exit(0)
        _, status = os.waitpid(fork, 0)
        left.append(" ".join(names(folder)))
        for checkpoint in find_checkpoints(folder):
            step = checkpoint.order[1]
            assert checkpoint.state["written_at"] == int(checkpoint.tensors()["step"]) == step
            assert load_file(checkpoint.path / "student" / "model.safetensors")
        for path in folder.checkpoints.glob("[!.]*"):
            assert files_in(path) == whole
        folder.clear_leftovers()
        assert not list(folder.path.rglob(".*"))
        shutil.rmtree(folder.path)
        if status == 0:
            break
        assert os.WTERMSIG(status) == 9
    assert operations > 20
    assert list(dict.fromkeys(left)) == ["step-1 step-2", "step-1 step-2 step-3", "step-2 step-3"]
    sys.exit(0)


def test_the_newest_and_the_best_are_kept(tmp_path: Path, student: LoadedModel) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 12):
        save(folder, student, step, best="step-3" if step > 3 else None)
    assert names(folder) == ["step-3", "step-10", "step-11"]


def test_checkpoints_of_a_later_phase_are_newer(tmp_path: Path, student: LoadedModel) -> None:
    folder = RunFolder(tmp_path)
    save(folder, student, 9, phase="warmup", order=(0, 9))
    save(folder, student, 1)
    assert names(folder) == ["warmup-9", "step-1"]


def test_a_checkpoint_is_not_written_twice(tmp_path: Path, student: LoadedModel) -> None:
    """No instant is without it."""
    folder = RunFolder(tmp_path)
    path = save(folder, student, 1)
    number = path.stat().st_ino
    assert save(folder, student, 1) == path
    assert path.stat().st_ino == number


def test_a_folder_without_its_state_is_no_checkpoint_and_is_replaced(
    tmp_path: Path, student: LoadedModel
) -> None:
    folder = RunFolder(tmp_path)
    (save(folder, student, 1) / "state.json").unlink()
    assert names(folder) == []
    save(folder, student, 1)
    assert names(folder) == ["step-1"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, student: LoadedModel) -> None:
    folder = RunFolder(tmp_path)
    save(folder, student, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(folder, student, 2, state={"no JSON": object()})
    assert names(folder) == ["step-1"]
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_family_is_restored_in_place(family: str, tmp_path: Path) -> None:
    wrote, other = tiny(family, seed=0), tiny(family, seed=1)
    places = {name: weight.data_ptr() for name, weight in weights(other).items()}
    assert not same_weights(wrote, other)
    save_student(wrote, tmp_path)
    restore_student(other, tmp_path)
    assert same_weights(wrote, other)
    assert {name: weight.data_ptr() for name, weight in weights(other).items()} == places
    assert all(place % 64 == 0 for place in places.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_kept_as_wide_as_they_are_trained(dtype: str, tmp_path: Path) -> None:
    """Whatever the dtype of the model the run began with: here bfloat16."""
    wrote, other = (load_model("builtin:sort-teacher", dtype=dtype, device="cpu") for _ in "ab")
    with torch.no_grad():
        for weight in wrote.model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    assert not same_weights(wrote, other)
    save_student(wrote, tmp_path)
    restore_student(other, tmp_path)
    assert same_weights(wrote, other)


def test_an_adapter_is_saved_alone_and_restored_in_place(tmp_path: Path) -> None:
    def adapted(seed: int) -> LoadedModel:
        loaded = load_model("builtin:sort-student", device="cpu", lora=LoraSettings(r=2))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, weight in loaded.model.named_parameters():
                if ".lora_" in name:
                    weight.normal_()
        return loaded

    wrote, other = adapted(0), adapted(1)
    assert not same_weights(wrote, other)
    save_student(wrote, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    restore_student(other, tmp_path)
    assert same_weights(wrote, other)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: tiny("llama", hidden=16), "lm_head.weight is [53, 32], not [53, 16]"),
        (lambda: tiny("llama", layers=1), "only one of the two has model.layers.1"),
        (lambda: tiny("llama", layers=3), "only one of the two has model.layers.2"),
        (lambda: tiny("gpt2"), "only one of the two has"),
        (
            lambda: load_model("builtin:sort-student", device="cpu", lora=LoraSettings(r=2)),
            "one of the two is an adapter",
        ),
    ],
)
def test_weights_of_another_model_are_refused(other: Any, reason: str, tmp_path: Path) -> None:
    save_student(tiny("llama"), tmp_path)
    with pytest.raises(ConfigError, match=f"is of another model: {re.escape(reason)}"):
        restore_student(other(), tmp_path)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return dict(loaded.model.named_parameters())


def same_weights(one: LoadedModel, other: LoadedModel) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(mine[k].equal(theirs[k]) for k in mine)

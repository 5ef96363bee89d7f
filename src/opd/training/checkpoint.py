"""Checkpoints: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file

from opd.errors import ConfigError
from opd.models import LoadedModel, load_model, save_model
from opd.training.folder import RunFolder, disk_advice, remove_folder, whole_folder

STATE, TENSORS, STUDENT = "state.json", "tensors.pt", "student"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        order: (phase number, steps done in it); later is newer.
        state: everything that is not a tensor.
    """

    path: Path
    order: tuple[int, int]
    state: Mapping[str, Any]

    def tensors(self) -> dict[str, Any]:
        """Optimizer state and states of the random generators."""
        try:
            loaded: dict[str, Any] = torch.load(self.path / TENSORS, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise _damaged(self.path, TENSORS) from error
        return loaded


def checkpoint_name(phase: str, step: int) -> str:
    """`step-N` in the train phase, `<phase>-N` in another."""
    return f"step-{step}" if phase == "train" else f"{phase}-{step}"


def save_checkpoint(
    folder: RunFolder,
    *,
    phase: str,
    order: tuple[int, int],
    student: LoadedModel,
    tensors: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
    best: str | None = None,
) -> Path:
    """Write a checkpoint beside the others, whole or not at all, and drop the oldest.

    A kill at any instant leaves either the old set or the new one. A checkpoint of the same phase
    and step holds the same state, so it stays as it is: no instant is without it.

    Args:
        keep: that many of the newest stay.
        best: name of one that is never dropped.

    Raises:
        TrainingError: no room on the disk; the earlier checkpoints are intact.
    """
    final = folder.checkpoints / checkpoint_name(phase, order[1])
    if not (final / STATE).exists():
        with whole_folder(final) as temporary:
            save_student(student, temporary / STUDENT)
            torch.save(dict(tensors), temporary / TENSORS)
            text = json.dumps({"order": list(order), "phase": phase, **state})
            (temporary / STATE).write_text(text, encoding="utf-8")
    with disk_advice(final):
        for checkpoint in find_checkpoints(folder)[:-keep]:
            if checkpoint.path.name != best:
                remove_folder(checkpoint.path)
    return final


def find_checkpoints(folder: RunFolder) -> list[Checkpoint]:
    """Complete checkpoints, oldest first."""
    found = []
    for path in folder.checkpoints.glob("[!.]*"):
        state_file = path / STATE
        if state_file.exists():
            try:
                state = json.loads(state_file.read_text(encoding="utf-8"))
                order = (state["order"][0], state["order"][1])
            except (ValueError, KeyError, TypeError) as error:
                raise _damaged(path, STATE) from error
            found.append(Checkpoint(path, order, state))
    return sorted(found, key=lambda checkpoint: checkpoint.order)


def save_student(loaded: LoadedModel, folder: Path) -> None:
    """Write the weights that training changes: the whole model, or the adapter alone."""
    model: Any = loaded.model
    if not hasattr(model, "peft_config"):
        save_model(loaded, folder)
        return
    # `save_model` refuses an adapter whose base is drawn at random; here the seed, which a
    # resume does not change, brings that base back.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    loaded.tokenizer.save_pretrained(folder)


def restore_student(loaded: LoadedModel, folder: Path) -> None:
    """Copy weights that `save_student` wrote into a live model, in place.

    In place, because a tensor mapped from a file is aligned as the file is, and a kernel may round
    differently there than in memory that PyTorch allocated.

    Raises:
        ConfigError: the weights are of another model.
    """
    adapter = (folder / ADAPTER_CONFIG).exists()
    if adapter != hasattr(loaded.model, "peft_config"):
        raise _of_another_model(folder, "one of the two is an adapter")
    if adapter:
        stored, own = load_file(folder / ADAPTER), _adapter_weights(loaded)
    else:
        stored, own = _stored_weights(loaded, folder), dict(cast(Any, loaded.model).state_dict())
    for name in sorted(stored.keys() | own.keys()):
        if name not in stored or name not in own:
            raise _of_another_model(folder, f"only one of the two has {name}")
        if own[name].shape != stored[name].shape:
            raise _of_another_model(
                folder, f"{name} is {list(stored[name].shape)}, not {list(own[name].shape)}"
            )
    with torch.no_grad():
        for name, value in stored.items():
            own[name].copy_(value)


def _stored_weights(loaded: LoadedModel, folder: Path) -> dict[str, torch.Tensor]:
    """By their names in memory: some families have others in their files, so the loader reads."""
    trusted = type(loaded.model).__module__.startswith("transformers_modules.")
    stored = load_model(folder, dtype="auto", device="cpu", trust_remote_code=trusted)
    return dict(cast(Any, stored.model).state_dict())


def _adapter_weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """By their names in a file; the tensors are the live ones."""
    from peft import get_peft_model_state_dict

    model = cast(Any, loaded.model)
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def _damaged(checkpoint: Path, file: str) -> ConfigError:
    return ConfigError(
        f"{checkpoint}: its {file} cannot be read; remove this folder to continue from the "
        "checkpoint before"
    )


def _of_another_model(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{folder} is of another model: {reason}; start a new run, or resume with the model it was "
        "written with"
    )

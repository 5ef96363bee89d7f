"""The students of a run folder: as it began, and as it ended."""

from __future__ import annotations

from opd.errors import ConfigError
from opd.models import LoadedModel, load_model, resolve_device
from opd.training.checkpoint import (
    STATE,
    STUDENT,
    checkpoint_name,
    find_checkpoints,
    restore_student,
)
from opd.training.config import Run
from opd.training.folder import RunFolder
from opd.training.session import load_student


def end_student(run: Run, folder: RunFolder) -> tuple[LoadedModel, str]:
    """The trained student and where its weights are from: `model/`, or the newest checkpoint.

    Raises:
        ConfigError: the run has saved neither.
    """
    device = resolve_device(run.config.device)
    found = find_checkpoints(folder)
    if folder.model.exists():
        loaded = load_model(
            folder.model,
            dtype=run.config.student.dtype,
            device=str(device),
            trust_remote_code=run.config.student.trust_remote_code,
        )
        return loaded, str(folder.model)
    if not found:
        raise ConfigError(
            f"{folder.path} has neither a model nor a checkpoint yet; begin it again with "
            f"`opd run --resume {folder.path}`"
        )
    loaded = load_student(run, device)
    restore_student(loaded, found[-1].path / STUDENT)
    return loaded, str(found[-1].path)


def start_student(run: Run, folder: RunFolder) -> tuple[LoadedModel, str] | None:
    """The student before the first distillation step, after a warm-up if there was one.

    None where the warm-up's last checkpoint has not been kept.
    """
    device = resolve_device(run.config.device)
    steps = run.config.warmup.steps
    if not steps:
        return load_student(run, device), run.config.student.model
    after_warmup = folder.checkpoints / checkpoint_name("warmup", steps)
    if (after_warmup / STATE).exists():
        weights = after_warmup / STUDENT
    elif folder.reference.exists():
        weights = folder.reference
    else:
        return None
    loaded = load_student(run, device)
    restore_student(loaded, weights)
    return loaded, str(weights)

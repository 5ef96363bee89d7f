"""The view `reference`: the student as it was when the train phase began, frozen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.models import LoadedModel
from opd.teacher.local import LocalTeacher
from opd.training.checkpoint import restore_student, save_student
from opd.training.folder import whole_folder
from opd.training.session import Session


def freeze_reference(session: Session, folder: Path, *, at_start: bool) -> None:
    """Give the session what its views of the initial student score with.

    An adapter that the run itself has added, and nothing has trained yet, is switched off for the
    view: no second copy of the weights is needed. Otherwise it is a copy, which `folder` keeps for
    a resume.

    Args:
        at_start: the train phase has made no step; the student is the reference. Otherwise the
            reference is read from `folder`.

    Raises:
        ConfigError: `folder` is gone.
    """
    views = [
        view.name
        for phase in session.phases
        for view in phase.method.views
        if view.source == "initial_student" and view.name in phase.method.objective.views()
    ]
    if not views:
        return
    student = session.student
    without_adapter = session.config.student.lora.r > 0 and len(session.phases) == 1
    loaded = student.loaded
    if not without_adapter:
        loaded = _frozen_copy(loaded)
        if at_start:
            with whole_folder(folder) as temporary:
                save_student(loaded, temporary)
        elif folder.exists():
            restore_student(loaded, folder)
        else:
            raise ConfigError(
                f"{folder} is gone: it holds the student that a term compares with, and this run "
                "cannot go on without it; start a new run"
            )
    for name in views:
        session.teachers[name] = LocalTeacher(
            loaded,
            vocab_size=student.vocab_size,
            max_tokens=session.max_tokens,
            without_adapter=without_adapter,
        )


def _frozen_copy(loaded: LoadedModel) -> LoadedModel:
    model: Any = copy.deepcopy(loaded.model)
    frozen = copy.copy(loaded)
    frozen.model = model.requires_grad_(False)
    return frozen

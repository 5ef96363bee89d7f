"""Views of the student itself that begin with the train phase: its copy then, and its average."""

from __future__ import annotations

from pathlib import Path

from opd.errors import ConfigError
from opd.teacher.local import LocalTeacher
from opd.teacher.self_teacher import AverageTeacher, frozen_copy
from opd.training.checkpoint import restore_student, save_student
from opd.training.folder import whole_folder
from opd.training.session import Session
from opd.types import TeacherView


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
    views = _views(session, "initial_student")
    if not views:
        return
    student = session.student
    without_adapter = session.config.student.lora.r > 0 and len(session.phases) == 1
    loaded = student.loaded
    if not without_adapter:
        loaded = frozen_copy(loaded)
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
    for view in views:
        session.teachers[view.name] = LocalTeacher(
            loaded,
            vocab_size=student.vocab_size,
            max_tokens=session.max_tokens,
            without_adapter=without_adapter,
        )


def start_averages(session: Session) -> dict[str, AverageTeacher]:
    """The moving averages of the student, begun at its weights of now, by the name of their view.

    The session scores with them; the loop updates them after each optimizer step, and a checkpoint
    holds them.
    """
    averages = {
        view.name: AverageTeacher(
            session.student.loaded,
            decay=view.decay,
            vocab_size=session.student.vocab_size,
            max_tokens=session.max_tokens,
        )
        for view in _views(session, "ema_student")
    }
    session.teachers.update(averages)
    return averages


def _views(session: Session, source: str) -> list[TeacherView]:
    """Views of this source that some phase reads, each name once."""
    found = {view.name: view for phase in session.phases for view in phase.plan.views}
    return [view for view in found.values() if view.source == source]

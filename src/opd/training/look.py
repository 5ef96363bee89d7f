"""A look at a few responses of a step: both whole distributions, without gradient.

Where the step's own answers of the teacher hold distributions, nobody is asked again and only the
student reads the responses once more. Where they do not, a teacher in this process is asked for
these responses; one behind a url or a folder of kept answers is not, since that would cost what
nobody has agreed to.
"""

from __future__ import annotations

from collections.abc import Mapping

from opd.diagnose.monitors import of_look
from opd.errors import OpdError
from opd.objective import Method
from opd.rollout.edit import take
from opd.rollout.pack import select
from opd.training.config import RunConfig
from opd.training.plan import Plan, is_scored
from opd.training.session import Session
from opd.types import (
    STUDENT_PART,
    Batch,
    Need,
    Provenance,
    Rollout,
    Stat,
    TeacherScores,
    with_parts,
)


def look(
    session: Session, method: Method, plan: Plan, rollout: Rollout, batch: Batch, responses: int
) -> dict[str, Stat]:
    """Monitors of the first responses of a step that the student wrote; none where it wrote none.

    Of a response that it wrote in part, its own tokens count.

    The view is the method's teacher, as for a probe.

    Args:
        batch: packed from the rollout and scored, before any update.
        responses: at most that many.
    """
    from opd.training import pilot  # which runs the loop that looks

    by_student = batch.token.mask & (batch.token.provenance == Provenance.STUDENT)
    own = by_student.any(1).nonzero()[:responses, 0].tolist()
    view = pilot.subject(method, plan)
    if not own:
        return {}
    part = select(batch, own).batch
    text = take(rollout, own)
    if not tells_all(part.token.views, view):
        part = pilot.scored(session, pilot.comparing(method, view, whole=True), text)
    seen = pilot.Pilot(session, pilot.PilotSettings(), method, plan, view, text, part, True, ())
    rows, _ = pilot.row_numbers(seen)
    return of_look(rows, text.mask, text.provenance, session.student.vocab_size)


def why_not(session: Session, method: Method, plan: Plan, batch: Batch) -> str | None:
    """Why no look is taken, in words; empty where there is no teacher, None where one is taken."""
    from opd.training import pilot

    try:
        view = pilot.subject(method, plan)
    except OpdError:
        return ""
    reached = with_parts([view], method.views)
    if not all(each.normalised for each in reached):
        return f"the view {view!r} is a score of single tokens, and a look takes distributions"
    if tells_all(batch.token.views, view):
        return None
    if not all_here(session.config):
        return (
            f"the teacher of the view {view!r} is asked elsewhere or answers from a folder, and "
            "the step does not ask it for distributions"
        )
    whole = Need(view, "log_probs", "full")
    able = [session.teachers[each.name].can(whole) for each in reached if is_scored(each)]
    return None if all(able) else f"the view {view!r} tells single tokens only"


def tells_all(views: Mapping[str, TeacherScores], name: str) -> bool:
    """Whether a view's answer holds its distribution; of a combination, those of all its parts."""
    if name not in views:
        return name == STUDENT_PART
    view = views[name]
    if view.parts:
        return all(tells_all(views, part) for part, weight in view.parts if weight)
    return view.hidden is not None or view.log_probs is not None


def all_here(config: RunConfig) -> bool:
    """Whether every teacher is on the device of this process, with nothing in between."""
    tables = (config.teacher, *config.teachers.values())
    return not any(t.url or t.cache.folder or t.keep != "device" for t in tables)

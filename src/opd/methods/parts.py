"""Pieces that several methods share."""

from __future__ import annotations

from opd.formula import divergence, surrogate
from opd.objective import Dense
from opd.schedule import Schedule
from opd.types import Bound, TeacherView

TEACHER = TeacherView()
REFERENCE = TeacherView("reference", "initial_student")
BEFORE = TeacherView("teacher.before")
"""The teacher before it learnt what it is to teach: `[teachers.before]` in a run file."""

SOLUTION = "{prompt}\n\nA correct solution, for your eyes only:\n{response}"
"""What a privileged self reads in place of the prompt, unless told otherwise."""

WRONG = "{prompt}\n\nA wrong attempt, for your eyes only:\n{wrong}"
"""The same of a wrong solution, from a data column of that name."""

HINT = "{prompt}\n\nA hint, for your eyes only:\n{answer}"
"""The same of the answer alone."""


def frozen_self(context: str, name: str = "teacher") -> TeacherView:
    """The student at step 0 with a context of its own."""
    return TeacherView(name, "initial_student", context)


def live_self(context: str, name: str = "teacher") -> TeacherView:
    """The student as it is now, with a context of its own."""
    return TeacherView(name, "student", context)


def averaged_self(context: str, decay: float, name: str = "teacher") -> TeacherView:
    """The moving average of the student, with a context of its own."""
    return TeacherView(name, "ema_student", context, decay=decay)


def ratio_of(*parts: tuple[str, float | Schedule], name: str) -> TeacherView:
    """A weighted sum of views, a score of single tokens."""
    return TeacherView(name, "combination", parts=parts, normalised=False)


CONTRAST = ratio_of(
    ("teacher", 1.0), ("teacher.wrong", -1.0), ("student", 1.0), name="teacher.contrast"
)
"""Its log-ratio to the student is what a right hint makes likelier than a wrong one."""


def clipped(low: float, high: float) -> Bound:
    """The clipped ratio to the weights of the rollout."""
    return Bound.of(surrogate.clipped).with_knobs(low=low, high=high)


def pull(coef: float | Schedule, *, rows: str = "all") -> Dense:
    """A reverse KL to the reference, so that the student stays near it."""
    return Dense(
        divergence=divergence.reverse_kl, against="reference", rows=rows, coef=coef, name="pull"
    )


def check_option(
    name: str, value: float | Schedule, low: float, high: float, why: str = ""
) -> None:
    """Refuse an option of a method outside `[low, high]`, at any step of its schedule."""
    reach = value.reachable() if isinstance(value, Schedule) else (value, value)
    if not (low <= reach[0] and reach[1] <= high):
        limits = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {limits}{why}, got {value!r}")

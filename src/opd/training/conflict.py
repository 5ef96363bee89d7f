"""How far several teachers disagree on the text of one step, and whether they pull together.

Between two teachers A and B, on the same rows:

    kl      = mean over rows of KL(A || B), at the temperature of the comparison
    cosine  = <g_A, g_B> / (|g_A| |g_B|),  g_A the gradient of the objective if A were every teacher

A cosine below 0 says that what one teaches the other takes back: route, do not average. It is a
measurement of the weights of now and changes none of them.

Source: `teacher_conflict` among the diagnostics of arXiv:2606.22793.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

import torch
from torch import Tensor

from opd.diagnose.evidence import Estimate, cosine_of_sums
from opd.errors import TrainingError
from opd.head import linear_head
from opd.head.replies import check_reply
from opd.head.visit import NAMED
from opd.objective import Method, Objective
from opd.rollout.pack import select, with_token
from opd.student import Student
from opd.teacher.routed import RoutedTeacher
from opd.training import step as steps
from opd.training.plan import Plan
from opd.training.privilege import Reading, ask
from opd.types import (
    Batch,
    FieldKey,
    Need,
    Stat,
    Teacher,
    TeacherRequest,
    TeacherScores,
    TeacherView,
    with_parts,
)


@dataclass(frozen=True)
class Rivals:
    """Several teachers of one student.

    Attributes:
        teachers: by name; of a route whom it goes to, otherwise the views that terms follow.
        reads: by name, the view as which a teacher is asked.
    """

    teachers: Mapping[str, Teacher]
    reads: Mapping[str, str]

    @property
    def views(self) -> tuple[str, ...]:
        """The views that each of them would fill if it were the only one."""
        return tuple(dict.fromkeys(self.reads.values()))


def find_rivals(method: Method, plan: Plan, teachers: Mapping[str, Teacher]) -> Rivals | None:
    """The teachers that a method follows; None where there are not several."""
    routed = [name for name in teachers if isinstance(teachers[name], RoutedTeacher)]
    if routed:
        first = teachers[routed[0]]
        assert isinstance(first, RoutedTeacher)
        found = Rivals(first.teachers, dict.fromkeys(first.teachers, routed[0]))
    else:
        names = [view.name for view in plan.views if view.name in _followed(method)]
        reads = {name.removeprefix(NAMED): name for name in names}
        found = Rivals({short: teachers[name] for short, name in reads.items()}, reads)
    return found if len(found.teachers) > 1 else None


def _followed(method: Method) -> set[str]:
    """The plain teachers' views that some term follows: itself, or with a positive weight."""
    views = {view.name: view for view in with_parts(method.objective.views(), method.views)}
    found: set[str] = set()

    def follow(name: str) -> None:
        view = views.get(name)
        if view is None:
            return
        if view.source == "teacher":
            found.add(name)
        for part, weight in view.parts:
            if weight if not isinstance(weight, int | float) else weight > 0:
                follow(part)

    for _, term in method.objective.parts():
        if term.coef != 0:
            follow(term.against)
    return found


def why_not_measured(rivals: Rivals) -> str:
    """Why the conflict of these teachers cannot be known; empty where it can."""
    whole = Need("teacher", "log_probs", "full")
    for name, teacher in rivals.teachers.items():
        if not teacher.can(whole):
            return (
                f"the conflict of the teachers is not measured: {name!r} answers for single "
                "tokens, and it takes whole distributions"
            )
    return ""


def measure(
    rivals: Rivals,
    student: Student,
    batch: Batch,
    objective: Objective,
    plan: Plan,
    max_tokens: int,
    *,
    contexts: Mapping[str, Reading] = MappingProxyType({}),
) -> dict[str, Stat]:
    """`teacher/A|B/kl`, `teacher/B|A/kl` and `teacher/A|B/cosine` of every two teachers.

    No cosine where one of the gradients is zero or not finite, or where a critic's values, which
    belong to the teachers as they are, would be read.

    Args:
        batch: scored; its rows.
        max_tokens: per micro-batch of the student.
        contexts: what views with a context read.
    """
    scores = _scores(rivals, batch, objective, plan, contexts)
    metrics = _distances(rivals, scores, batch, objective.temperature)
    if objective.critic_term is not None or objective.is_off:
        return metrics
    gradients = {
        name: _gradient(student, batch, objective, plan, max_tokens, rivals.views, scores[name])
        for name in rivals.teachers
    }
    for one, other in combinations(rivals.teachers, 2):
        cosine = _cosine(gradients[one], gradients[other])
        if cosine is not None:
            metrics[f"teacher/{one}|{other}/cosine"] = Stat(cosine, 1.0)
    return metrics


def measure_over_prompts(
    rivals: Rivals,
    student: Student,
    batch: Batch,
    objective: Objective,
    plan: Plan,
    max_tokens: int,
    *,
    flat: Callable[[Mapping[str, Tensor]], Tensor],
    contexts: Mapping[str, Reading] = MappingProxyType({}),
) -> tuple[dict[str, Stat], dict[str, Estimate]]:
    """The `kl` of `measure`, and its `cosine` with an interval over prompts.

    Args:
        flat: what is kept of a gradient, as one vector.
    """
    scores = _scores(rivals, batch, objective, plan, contexts)
    distances = _distances(rivals, scores, batch, objective.temperature)
    if objective.critic_term is not None or objective.is_off:
        return distances, {}
    members: dict[int, list[int]] = {}
    for sequence, group in enumerate(batch.token.group.tolist()):
        members.setdefault(group, []).append(sequence)
    gradients = {}
    for name in rivals.teachers:
        alone = _alone(batch, rivals.views, scores[name])
        parts = []
        try:
            ready = steps.signal(student, alone, objective, plan, max_tokens, fresh=False)
            for sequences in members.values():
                part = select(ready, sequences).batch
                parts.append(flat(_of_ready(student, part, objective, max_tokens)))
        except TrainingError:  # not finite where this teacher is not the row's own
            continue
        gradients[name] = torch.stack(parts)
    cosines = {
        f"teacher/{one}|{other}/cosine": cosine_of_sums(gradients[one], gradients[other])
        for one, other in combinations(gradients, 2)
    }
    return distances, {name: found for name, found in cosines.items() if found.known}


def _distances(
    rivals: Rivals, scores: Mapping[str, TeacherScores], batch: Batch, temperature: float
) -> dict[str, Stat]:
    """The divergence of every two teachers, both ways."""
    found: dict[str, Stat] = {}
    for one, other in combinations(rivals.teachers, 2):
        for first, second in ((one, other), (other, one)):
            kl = _kl(scores[first], scores[second], batch, temperature)
            if kl is not None:
                found[f"teacher/{first}|{second}/kl"] = kl
    return found


def _scores(
    rivals: Rivals,
    batch: Batch,
    objective: Objective,
    plan: Plan,
    contexts: Mapping[str, Reading],
) -> dict[str, TeacherScores]:
    """What each teacher says of every row; asked anew where it has not said it in this step."""
    views: dict[str, TeacherView] = {view.name: view for view in plan.views}
    found = {}
    for name, teacher in rivals.teachers.items():
        own = rivals.reads[name]
        told = batch.token.views.get(own)
        if told is None or told.names or told.hidden is None:
            read = contexts[own] if views[own].context else None
            request = TeacherRequest(batch, temperature=objective.temperature)
            told = ask(own, teacher, request, read)
            check_reply(name, told, rows=len(batch.row_index))
        found[name] = told
    return found


def _kl(
    first: TeacherScores, second: TeacherScores, batch: Batch, temperature: float
) -> Stat | None:
    """KL(first || second), the first in the student's place; None where it is not projected."""
    if first.hidden is None or first.unembedding is None or first.row_index is not None:
        return None
    key = FieldKey("reverse_kl", "teacher")
    found = linear_head(
        first.hidden,
        first.unembedding,
        with_token(batch, views={"teacher": second}),
        wanted=frozenset({key}),
        temperature=temperature,
    ).fields[key]
    known = found[~found.isnan()]
    return Stat(float(known.sum(dtype=torch.float64)), float(len(known)))


def _gradient(
    student: Student,
    batch: Batch,
    objective: Objective,
    plan: Plan,
    max_tokens: int,
    views: Sequence[str],
    scores: TeacherScores,
) -> dict[str, Tensor]:
    """The objective's gradient with one teacher in every teacher's place; empty: none that counts.

    Nothing of it stays: the student's gradients are dropped.
    """
    alone = _alone(batch, views, scores)
    try:
        ready = steps.signal(student, alone, objective, plan, max_tokens, fresh=False)
        return _of_ready(student, ready, objective, max_tokens)
    except TrainingError:  # not finite where this teacher is not the row's own
        return {}


def _alone(batch: Batch, views: Sequence[str], scores: TeacherScores) -> Batch:
    """The batch with one teacher in every teacher's place."""
    return with_token(batch, views={**batch.token.views, **dict.fromkeys(views, scores)})


def _of_ready(
    student: Student, ready: Batch, objective: Objective, max_tokens: int
) -> dict[str, Tensor]:
    """The gradient of a batch whose coupled quantities are settled; the student keeps nothing."""
    student.zero_grad(set_to_none=True)
    try:
        steps.update(student, ready, objective, max_tokens, step=0)
        return {
            name: parameter.grad
            for name, parameter in student.trainable().items()
            if parameter.grad is not None
        }
    finally:
        student.zero_grad(set_to_none=True)


def _cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float | None:
    def product(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
        return sum(
            float(first[name].flatten().double() @ second[name].flatten().double())
            for name in first.keys() & second.keys()
        )

    lengths = product(one, one) * product(other, other)
    if not 0.0 < lengths < float("inf"):
        return None
    return float(product(one, other) / lengths**0.5)

"""What a step will do, decided before any weight loads; the loop follows it, `explain` shows it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opd.objective import Method
from opd.types import Need, SamplerSettings


@dataclass(frozen=True)
class Pass:
    """One visit of a model in a step.

    Attributes:
        name: `sample`, `observe`, `score`, `signal` or `update`.
        model: `student`, `teacher` or a view's name.
        kind: `generate`, `forward` or `forward + backward`.
        per_rollout: visits per rollout batch.
        why: what it is for.
    """

    name: str
    model: str
    kind: str
    per_rollout: float
    why: str


@dataclass(frozen=True)
class Plan:
    """The visits of one rollout batch and the facts that decided them.

    Attributes:
        sampler: settings of the sampler, student top-k included.
        same_policy: the sampler draws from exactly the distribution the objective compares, so its
            log-probabilities stand for the student's at rollout time.
        mismatch: why not, if not.
        observe: fields to observe before the first update: `old_logp`, `student_top_ids`.
        signal: whether coupled quantities are settled before each update.
    """

    sampler: SamplerSettings
    same_policy: bool
    mismatch: tuple[str, ...]
    observe: tuple[str, ...]
    signal: bool
    needs: frozenset[Need]
    passes: tuple[Pass, ...]


def make_plan(
    method: Method,
    sampler: SamplerSettings,
    *,
    updates_per_rollout: int = 1,
    merge_ids: tuple[tuple[int, ...], ...] = (),
) -> Plan:
    """The plan of a step of `method` with these settings."""
    objective = method.objective
    top_k = objective.support_size("student_top_ids")
    sampler = replace(sampler, student_top_k=top_k if method.states.student == 1 else 0)
    mismatch = _mismatch(method, sampler, merge_ids)
    observe = []
    if "old_logp" in objective.field_names() and mismatch:
        observe.append("old_logp")
    if top_k and (sampler.student_top_k == 0 or merge_ids):
        observe.append("student_top_ids")
    passes: list[Pass] = []
    for share, writer in (
        (method.states.student, "student"),
        (method.states.teacher, "teacher"),
    ):
        if share:
            why = f"{share:.0%} of the sequences"
            passes.append(Pass("sample", writer, "generate", share, why))
    if observe:
        passes.append(Pass("observe", "student", "forward", 1, " and ".join(observe)))
    for view in sorted(objective.views()):
        fields = sorted({need.field for need in objective.needs if need.view == view})
        passes.append(Pass("score", view, "forward", 1, ", ".join(fields)))
    visits = _signal_visits(method, mismatch, updates_per_rollout)
    if visits:
        why = "fields that coupled quantities start from"
        passes.append(Pass("signal", "student", "forward", visits, why))
    passes.append(
        Pass("update", "student", "forward + backward", updates_per_rollout, "loss and gradient")
    )
    return Plan(
        sampler,
        not mismatch,
        mismatch,
        tuple(observe),
        objective.coupled,
        objective.needs,
        tuple(passes),
    )


def reply_is_distribution(needs: frozenset[Need], view: str) -> bool:
    """Whether a view must return a whole distribution, not numbers of chosen tokens."""
    return any(
        need.view == view and need.field not in ("logp", "top_ids") and not _own_top(need)
        for need in needs
    )


def _own_top(need: Need) -> bool:
    return need.support == "own_top"


def _mismatch(
    method: Method, sampler: SamplerSettings, merge_ids: tuple[tuple[int, ...], ...]
) -> tuple[str, ...]:
    reasons = []
    temperature = method.objective.temperature
    if sampler.temperature != temperature:
        reasons.append(
            f"sampled at temperature {sampler.temperature:g}, compared at {temperature:g}"
        )
    if sampler.top_p < 1:
        reasons.append(f"sampled from the top {sampler.top_p:g} of the mass")
    if sampler.top_k:
        reasons.append(f"sampled from the {sampler.top_k} likeliest tokens")
    if merge_ids:
        reasons.append("end tokens are compared as one, sampled one by one")
    if method.states.student < 1:
        reasons.append("part of the text is not the student's")
    return tuple(reasons)


def _signal_visits(method: Method, mismatch: tuple[str, ...], updates: int) -> int:
    """Visits of the student for the signal phase: none for what others already told.

    A view that replies with numbers of the chosen tokens has told its part; the sampler has told
    the student's part before the first update, if it drew from the policy that is compared.
    """
    needs = method.objective.needs
    untold = {
        key.name
        for key in method.objective.signal_keys()
        if key.name != "teacher_logp" or reply_is_distribution(needs, key.view)
    }
    if not untold:
        return 0
    return updates - 1 if untold == {"student_logp"} and not mismatch else updates

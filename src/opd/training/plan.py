"""What a step will do, decided before any weight loads; the loop follows it, `explain` shows it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from opd.errors import ConfigError
from opd.fields import FIELDS, positional_names
from opd.formula import support as supports
from opd.objective import Method, Objective
from opd.schedule import Schedule
from opd.terms import sees_everything
from opd.types import (
    STUDENT_PART,
    Bound,
    Need,
    SamplerSettings,
    StateSource,
    TeacherView,
    with_parts,
)


@dataclass(frozen=True)
class Pass:
    """One visit of a model in a step.

    Attributes:
        name: `sample`, `replay`, `rewrite`, `observe`, `score`, `signal`, `update` or `critic`.
        model: `student`, `teacher`, `buffer`, `critic` or a view's name.
        kind: `generate`, `forward per token`, `forward`, `forward + backward` or `no forward`.
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
        needs: what every view must return, that of combinations handed on to their parts.
        passes: the visits, in their order.
        views: what the objective reads and what that is combined from, parts first.
    """

    sampler: SamplerSettings
    same_policy: bool
    mismatch: tuple[str, ...]
    observe: tuple[str, ...]
    signal: bool
    needs: frozenset[Need]
    passes: tuple[Pass, ...]
    views: tuple[TeacherView, ...] = ()


def make_plan(
    method: Method,
    sampler: SamplerSettings,
    *,
    updates_per_rollout: int = 1,
    merge_ids: tuple[tuple[int, ...], ...] = (),
) -> Plan:
    """The plan of a step of `method` with these settings.

    Raises:
        ConfigError: a state source that the sampler's limit on the response leaves no room for.
    """
    objective, states = method.objective, method.states
    _check_limit(states, sampler)
    _check_ratio(objective, merge_ids)
    top_k = objective.support_size("student_top_ids")
    sampler = replace(
        sampler,
        student_top_k=top_k if _sampler_knows_top_ids(states) else 0,
        max_new_tokens=horizon_within(sampler.max_new_tokens, states.reach("horizon")),
    )
    unlike = _mismatch(method, sampler, merge_ids)
    observe = []
    # of replayed text the sampler's log-probabilities are the student's of that time
    if "old_logp" in objective.field_names() and unlike:
        observe.append("old_logp")
    mismatch = unlike + _stale(states, observed=bool(observe))
    if top_k and (sampler.student_top_k == 0 or merge_ids):
        observe.append("student_top_ids")
    passes = list(_writing(states))
    if observe:
        passes.append(Pass("observe", "student", "forward", 1, " and ".join(observe)))
    views = with_parts(objective.views(), method.views)
    needs = objective.needs | _combined_needs(views, objective.needs)
    for view in sorted(views, key=lambda view: view.name):
        if is_scored(view):
            fields = sorted({need.field for need in needs if need.view == view.name})
            visits = updates_per_rollout if view.moves else 1
            reads = f"; reads {view.context!r}" if view.context else ""
            passes.append(Pass("score", view.name, "forward", visits, ", ".join(fields) + reads))
    made = frozenset(view.name for view in views if not is_scored(view))
    visits = _signal_visits(method, needs, mismatch, updates_per_rollout, made)
    if visits:
        why = "fields that coupled quantities start from"
        if objective.critic_term is not None:
            why += ", and the states whose values the critic knows"
        passes.append(Pass("signal", "student", "forward", visits, why))
    passes.append(
        Pass("update", "student", "forward + backward", updates_per_rollout, "loss and gradient")
    )
    if objective.critic_term is not None:
        why = "learns what is left of each response to pay"
        passes.append(Pass("critic", "critic", "forward + backward", 1, why))
    return Plan(
        sampler,
        not mismatch,
        mismatch,
        tuple(observe),
        objective.coupled,
        needs,
        tuple(passes),
        views,
    )


def _check_ratio(objective: Objective, merge_ids: tuple[tuple[int, ...], ...]) -> None:
    readers = sorted(
        bound.short_name
        for _, term in objective.parts()
        for _, bound in term.slots()
        if "sampler_logp" in positional_names(bound.function)
    )
    if readers and merge_ids:
        raise ConfigError(
            f"{readers[0]} compares with the sampler's log-probability of one end token, but the "
            "end tokens are merged into one; set method.merge_stop_ids = false, or use importance, "
            "which reads old_logp"
        )


def is_scored(view: TeacherView) -> bool:
    """Whether a model visits the batch for this view.

    A combination is made in the head from its parts. A live self that reads what the student reads
    is the student, whose distribution the head holds already.
    """
    return view.source != "combination" and (view.source != "student" or bool(view.context))


def _combined_needs(views: Iterable[TeacherView], asked: Collection[Need]) -> frozenset[Need]:
    """What views made in the head add: whole distributions, of themselves and of their parts.

    One that is made entry by entry asks of its parts what is asked of it: a sum that is not
    normalised always, an arithmetic mixture of which single tokens alone are asked.
    """
    made = [view for view in views if not is_scored(view)]
    inside = {name for view in made for name, _ in view.parts}
    by_token = [
        view
        for view in made
        if not view.normalised
        or (
            view.mix == "arithmetic"
            and view.name not in inside
            and {need.field for need in asked if need.view == view.name} == {"logp"}
        )
    ]
    whole = {
        name for view in made if view not in by_token for name in (view.name, *dict(view.parts))
    }
    handed_on = {
        replace(need, view=name)
        for view in by_token
        for need in asked
        if need.view == view.name
        for name, _ in view.parts
        if name != STUDENT_PART
    }
    return frozenset(handed_on) | {
        Need(name, "log_probs", "full") for name in whole - {STUDENT_PART}
    }


def reply_is_distribution(needs: frozenset[Need], view: str) -> bool:
    """Whether a view must return a whole distribution, not numbers of chosen tokens."""
    return any(
        need.view == view and need.field not in ("logp", "top_ids") and not _own_top(need)
        for need in needs
    )


def _own_top(need: Need) -> bool:
    return need.support == "own_top"


@dataclass(frozen=True)
class AskedEntries:
    """What a view has to say of single tokens, where that is all the objective reads of it.

    Attributes:
        top_k: so many of its own likeliest tokens.
        student_k: so many of the student's likeliest.
        own_token: the chosen token is part of a support.
        entropy: that of its whole distribution.
    """

    top_k: int = 0
    student_k: int = 0
    own_token: bool = False
    entropy: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Of a reply: ids and log-probabilities of the own ones, log-probabilities of the others.

        The chosen token's log-probability is always among them, for the metrics.
        """
        return 4 * (1 + 2 * self.top_k + self.student_k + self.own_token + self.entropy)


def asked_entries(objective: Objective, needs: Collection[Need], view: str) -> AskedEntries | None:
    """What single tokens answer for a view; None where the objective reads more of it."""
    own = [need for need in needs if need.view == view]
    handed_on = [need for need in own if need not in objective.needs]
    entropy = any(need.field == "teacher_entropy" and need.support == "full" for need in own)
    if any(need.support == "full" for need in handed_on) or _reads_everything(objective, view):
        return None
    bounds = [Bound.of(term.support) for _, term in objective.parts()]
    readers = {name for bound in bounds for name in positional_names(bound.function)}
    by_support = any(
        need.support != "full" and need.field not in ("logp", "top_ids") and not _own_top(need)
        for need in own
    )
    if by_support and not readers <= {"student_top_ids", "teacher_top_ids", "tokens"}:
        return None
    return AskedEntries(
        top_k=objective.support_size("teacher_top_ids"),
        student_k=objective.support_size("student_top_ids") if by_support else 0,
        own_token=by_support and "tokens" in readers,
        entropy=entropy,
    )


def _reads_everything(objective: Objective, view: str) -> bool:
    """Whether a formula reads a view on the whole vocabulary, and not its entropy alone."""
    for _, term in objective.parts():
        if term.against != view:
            continue
        on_everything = Bound.of(term.support).function is supports.full
        for place, bound in term.slots():
            for name in positional_names(bound.function):
                field = FIELDS.get(name)
                reads = field and field.side in ("view", "both") and field.scope == "support"
                whole = on_everything or sees_everything(place, name)
                told = name == "teacher_entropy" and not term.smoothing
                if reads and whole and not told:
                    return True
    return objective.critic_term is not None and objective.critic_term.against == view


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
    states = method.states
    if states.data or states.teacher:
        reasons.append("part of the text is not the student's")
    if states.reach("teacher_prefix"):
        reasons.append(
            f"the teacher writes up to {states.reach('teacher_prefix'):g} tokens at the beginning"
        )
    if states.reach("mixture"):
        reasons.append("sampled from a mixture with the teacher")
    if states.interleave:
        reasons.append(f"the teacher replaces tokens outside its {states.interleave} likeliest")
    if states.reach("rewrite"):
        reasons.append("the teacher rewrites part of the wrong responses")
    return tuple(reasons)


def _stale(states: StateSource, *, observed: bool) -> tuple[str, ...]:
    """What replay adds to the reasons.

    Args:
        observed: old log-probabilities are read, and are not the sampler's but observed.
    """
    if not states.replay:
        return ()
    since = f"part of the text was written up to {states.replay_steps} steps before"
    return (f"{since}; its old_logp is that of the step's first update" if observed else since,)


def _sampler_knows_top_ids(states: StateSource) -> bool:
    """Whether one sampler writes every token anew, and so can tell the student's likeliest."""
    return states.student == 1 and not (states.reach("teacher_prefix") or states.reach("rewrite"))


def _check_limit(states: StateSource, sampler: SamplerSettings) -> None:
    limit, prefix = sampler.max_new_tokens, states.reach("teacher_prefix")
    if prefix >= limit:
        raise ConfigError(
            f"method.states.teacher_prefix reaches {prefix:g}, which leaves the student nothing of "
            f"sampler.max_new_tokens = {limit}; lower the one or raise the other"
        )


def horizon_within(limit: int, horizon: float) -> int:
    """Tokens a response may have: the lower of two limits; a horizon of 0 is none."""
    return min(limit, int(horizon)) if horizon else limit


def _writing(states: StateSource) -> Iterator[Pass]:
    """What writing the text of a step takes, source by source."""
    share, limit = states.student, ""
    if states.horizon:
        limit = f", up to {_in_words(states.horizon)} tokens each"
    if share:
        first = " (more until the buffer is full)" if states.replay else ""
        yield Pass(
            "sample", "student", "generate", share, f"{share:.0%} of the prompts{first}{limit}"
        )
    if states.reach("teacher_prefix"):
        why = f"the student's sequences up to token {_in_words(states.teacher_prefix)}"
        yield Pass("sample", "teacher", "generate", share, why)
    if states.reach("mixture"):
        why = (
            f"the student's tokens are drawn from a mixture with {_in_words(states.mixture)} of it"
        )
        yield Pass("sample", "teacher", "forward per token", share, why)
    if states.interleave:
        why = f"replaces the student's tokens outside its {states.interleave} likeliest"
        yield Pass("sample", "teacher", "forward per token", share, why)
    if states.teacher:
        why = f"{states.teacher:.0%} of the prompts{limit}"
        yield Pass("sample", "teacher", "generate", states.teacher, why)
    if states.reach("rewrite"):
        last = _in_words(states.rewrite, percent=True)
        why = f"the last {last} of the student's responses judged wrong"
        yield Pass("rewrite", "teacher", "generate", share, why)
    if states.replay:
        why = f"{states.replay:.0%} of the prompts, from the last {states.replay_steps} steps"
        yield Pass("replay", "buffer", "no forward", states.replay, why)


def _in_words(value: float | Schedule, *, percent: bool = False) -> str:
    """A number, or the values a schedule can take."""
    ends = value.reachable() if isinstance(value, Schedule) else (value,)
    return " to ".join(f"{end:.0%}" if percent else f"{end:g}" for end in ends)


def _signal_visits(
    method: Method,
    needs: frozenset[Need],
    mismatch: tuple[str, ...],
    updates: int,
    made: Collection[str],
) -> int:
    """Visits of the student for the signal phase: none for what others already told.

    A view that replies with numbers of the chosen tokens has told its part; the sampler has told
    the student's part before the first update, if it drew from the policy that is compared.

    Args:
        made: views that the head makes of others, of which nobody tells anything.
    """
    untold = {
        key.name
        for key in method.objective.signal_keys()
        if key.name != "teacher_logp" or key.view in made or reply_is_distribution(needs, key.view)
    }
    if method.objective.critic_term is not None:
        return updates
    if not untold:
        return 0
    return updates - 1 if untold == {"student_logp"} and not mismatch else updates

"""The teachers of a run: opened, compared with the student, and made to answer for views."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from opd.errors import ConfigError, TeacherError
from opd.models import LoadedModel, check_same_vocabulary, load_model, scoring_dtype
from opd.objective import Method
from opd.rollout.local import LocalSampler
from opd.student import Student
from opd.teacher.cache import CachedTeacher
from opd.teacher.identity import fingerprint
from opd.teacher.local import LocalTeacher
from opd.teacher.query import Described, Endpoint
from opd.teacher.remote import RemoteTeacher
from opd.teacher.routed import RoutedTeacher, Router
from opd.teacher.turns import DiskModel, HostModel, Turns, TurnSampler, TurnTeacher
from opd.training.caches import Caches, Kept, behind
from opd.training.config import OTHER_TEACHER, Run, RunConfig, TeacherConfig
from opd.training.plan import AskedEntries, Plan, asked_entries, reply_is_distribution
from opd.training.remotes import check_described, entries_of, open_endpoint, remote_teacher
from opd.types import Prompt, Provenance, Sampler, Teacher, with_parts


def load_teacher(
    run: Run,
    device: torch.device,
    config: TeacherConfig | None = None,
    *,
    where: torch.device | None = None,
) -> LoadedModel:
    """The teacher of the run file, or another of its teachers, its weights frozen.

    Args:
        device: where it works.
        where: where its weights are loaded to; there if not given.
    """
    config = config or run.config.teacher
    loaded = load_model(
        run.path(config.model),
        dtype=scoring_dtype(config.dtype, device),
        device=str(where or device),
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        revision=config.revision or None,
    )
    loaded.model.requires_grad_(False)
    return loaded


@dataclass(frozen=True)
class Served:
    """A teacher that is asked at a url."""

    endpoint: Endpoint
    described: Described
    config: TeacherConfig


Opened = LoadedModel | Served | Kept | HostModel | DiskModel
"""A teacher of the run file: a model here or elsewhere, what one said, or one that takes turns."""

Source = Opened | Teacher
"""Where scores come from: a teacher of the run file, or an object in hand."""


@dataclass
class Teachers:
    """The teachers of a run.

    Attributes:
        own: of `[teacher]`, or the one in hand; None where there is none, and of a route.
        further: those of `[teachers.NAME]`, by the views that they score.
    """

    own: Source | None
    further: dict[str, Opened]
    router: Router | None
    turns: Turns
    caches: Caches

    @property
    def opened(self) -> list[Opened]:
        """All whose vocabulary is known."""
        kinds = LoadedModel | Served | Kept | HostModel | DiskModel
        return [one for one in (self.own, *self.further.values()) if isinstance(one, kinds)]

    @property
    def served(self) -> dict[str, Served]:
        """Those that are asked at a url, by the views that they score."""
        named = {"teacher": self.own, **self.further}
        return {view: one for view, one in named.items() if isinstance(one, Served)}

    @property
    def revisions(self) -> dict[str, str]:
        """Of those that are not loaded here, by view, what tells their weights from others."""
        told = {view: one.described.revision for view, one in self.served.items()}
        return {view: revision for view, revision in told.items() if revision}

    def sampler(self, vocab_size: int) -> Sampler | None:
        """Who writes as the teacher; None of one that only scores."""
        return _sampler(self.own, vocab_size, self.turns)

    def routed_samplers(self, vocab_size: int) -> dict[str, Sampler]:
        """Routed teachers that can show what they know, by name."""
        if self.router is None:
            return {}
        found = {
            view.removeprefix(OTHER_TEACHER): _sampler(source, vocab_size, self.turns)
            for view, source in self.further.items()
        }
        return {name: sampler for name, sampler in found.items() if sampler is not None}

    def close(self) -> None:
        """Write the answers that are in memory, and let go of connections."""
        self.caches.flush()
        for one in self.opened:
            if isinstance(one, Served):
                one.endpoint.close()


def open_teachers(run: Run, given: Source | None, device: torch.device, method: Method) -> Teachers:
    """Load or reach every teacher that the run file names.

    Args:
        given: takes the place of what `[teacher]` names.

    Raises:
        ConfigError: a teacher that is missing, one too many, or a model combined with itself.
        TeacherError: a server that does not answer.
    """
    found = Teachers(None, {}, find_router(run), Turns(), Caches(run.base))
    check_teachers(run, method)
    try:
        found.own = _own_teacher(run, given, device, method, found.caches)
        for name, config in run.config.teachers.items():
            further = _open_teacher(run, f"teachers.{name}", config, device, found.caches)
            found.further[OTHER_TEACHER + name] = further
    except BaseException:
        found.close()
        raise
    return found


def _own_teacher(
    run: Run, given: Source | None, device: torch.device, method: Method, caches: Caches
) -> Source | None:
    config = run.config
    if given is not None:
        if config.teacher.route:
            raise ConfigError(
                f"{run.source}: teacher.route = {config.teacher.route!r} goes to the models of "
                "[teachers.NAME], and a teacher in hand was given beside them; leave one out"
            )
        return given
    if config.teacher.route:
        return None
    wanted = (
        asks_the_teacher(method, config.teachers)
        or method.states.teacher_writes
        or (config.warmup.steps > 0 and config.warmup.source == "teacher")
    )
    if config.teacher.model or config.teacher.url or config.teacher.cache.offline:
        return _open_teacher(run, "teacher", config.teacher, device, caches)
    if wanted:
        raise ConfigError(
            f"{run.source}: the method {method.name!r} needs a teacher; set teacher.model to a "
            "folder or a Hugging Face id, or teacher.url to a server"
        )
    return None


def _open_teacher(
    run: Run, name: str, config: TeacherConfig, device: torch.device, caches: Caches
) -> Opened:
    if config.cache.offline:
        return caches.kept(name, config)
    if config.url:
        endpoint = open_endpoint(name, config)
        try:
            return Served(endpoint, endpoint.describe(), config)
        except BaseException:
            endpoint.close()
            raise
    if config.keep == "host":
        here = load_teacher(run, device, config, where=torch.device("cpu"))
        return HostModel(here, device)
    if config.keep == "disk":
        return DiskModel(partial(load_teacher, run, device, config))
    return load_teacher(run, device, config)


def shared_tokens(student: LoadedModel, source: Opened, *, merge_stop_ids: bool) -> int:
    """The number of tokens that a teacher shares with the student.

    Raises:
        ConfigError: another vocabulary, or other end tokens.
    """
    if isinstance(source, Kept):
        return min(student.vocab_size, source.vocab_size or student.vocab_size)
    if isinstance(source, Served):
        return check_described(
            student, source.described, source.endpoint.name, merge_stop_ids=merge_stop_ids
        )
    return check_same_vocabulary(student, _facts(source), merge_stop_ids=merge_stop_ids)


def _facts(source: LoadedModel | HostModel | DiskModel) -> LoadedModel:
    """What is known of a model in this process, its weights aside."""
    return source if isinstance(source, LoadedModel) else source.facts


def asks_the_teacher(method: Method, teachers: Collection[str] = ()) -> bool:
    """Whether the objective compares with the run's teacher model, itself or as a part.

    Args:
        teachers: names of further teachers, which answer for their own views.
    """
    return any(
        view.source == "teacher" and view.name.removeprefix(OTHER_TEACHER) not in teachers
        for view in with_parts(method.objective.views(), method.views)
    )


def find_router(run: Run) -> Router | None:
    """Whom `teacher.route` sends a prompt to; None where the run file has no route.

    Raises:
        ConfigError: a function that is not there.
    """
    route = run.config.teacher.route
    return Router(route, tuple(run.config.teachers), run.base) if route else None


def check_routes(router: Router, prompts: Sequence[Prompt]) -> None:
    """Refuse a record that is routed to nobody.

    Raises:
        DataError: names the record and what its route says.
    """
    for prompt in prompts:
        router(prompt)


def check_teachers(run: Run, method: Method) -> None:
    """Refuse a further teacher that no view asks, a route that none takes, and a combination of one
    model with itself.

    Raises:
        ConfigError: names the table and the views there are.
    """
    views = {view.name: view for view in with_parts(method.objective.views(), method.views)}
    asked = [name for name, view in views.items() if view.source == "teacher"]
    named, route = run.config.teachers, run.config.teacher.route
    if route and all(name.removeprefix(OTHER_TEACHER) in named for name in asked):
        raise ConfigError(
            f"{run.source}: teacher.route = {route!r} says who scores the view 'teacher', which "
            f"{method.name!r} does not ask; it asks: {', '.join(sorted(asked)) or 'no teacher'}. "
            "Leave the route out"
        )
    for name in named:
        if OTHER_TEACHER + name not in asked and not route:
            raise ConfigError(
                f"{run.source}: [teachers.{name}] scores the view 'teacher.{name}', which "
                f"{method.name!r} does not ask; it asks: {', '.join(sorted(asked)) or 'no teacher'}"
            )
    for view in views.values():
        seen: dict[object, str] = {}
        for part, _ in view.parts:
            whose = views.get(part)
            if whose is None or whose.parts:
                continue
            name = part.removeprefix(OTHER_TEACHER)
            read = (whose.context, whose.context_role, whose.chat_template_kwargs)
            told = (whose.source, read, whose.decay, named.get(name))
            if told in seen:
                missing = name if name not in named else seen[told].removeprefix(OTHER_TEACHER)
                raise ConfigError(
                    f"{run.source}: the view {view.name!r} combines {seen[told]!r} and {part!r}, "
                    "which are the same model reading the same text, so they are one distribution; "
                    f"name the other model in [teachers.{missing}]"
                )
            seen[told] = part


def scorers(
    teachers: Teachers,
    config: RunConfig,
    method: Method,
    plan: Plan,
    student: Student,
    device: torch.device,
) -> dict[str, Teacher]:
    """Who scores the views of the teacher and of the live student; others join with the phase.

    Raises:
        TeacherError: a teacher that cannot give what the method needs.
    """
    found: dict[str, Teacher] = {}
    own_tokens = micro_batch_tokens(config.train.max_tokens, device)
    named = {}
    for named_view, source in teachers.further.items():
        table = config.teachers[named_view.removeprefix(OTHER_TEACHER)]
        max_tokens = micro_batch_tokens(table.max_tokens or config.teacher.max_tokens, device)
        name = named_view.replace(OTHER_TEACHER, "teachers.")
        named[named_view] = _scorer(name, source, table, student, max_tokens, teachers)
    routed = teachers.router and RoutedTeacher(
        {view.removeprefix(OTHER_TEACHER): teacher for view, teacher in named.items()},
        teachers.router,
    )
    alone: Teacher | None = None
    for view in plan.views:
        if view.source == "student" and view.context:
            found[view.name] = LocalTeacher(
                student.loaded, vocab_size=student.vocab_size, max_tokens=own_tokens
            )
        elif view.source == "teacher":
            if view.name in named:
                found[view.name] = named[view.name]
            elif routed:
                found[view.name] = routed
            elif teachers.own is not None:
                max_tokens = micro_batch_tokens(config.teacher.max_tokens, device)
                alone = alone or _scorer(
                    "teacher", teachers.own, config.teacher, student, max_tokens, teachers
                )
                found[view.name] = alone
    for need in plan.needs:
        teacher = found.get(need.view)
        if teacher is not None and not teacher.can(need):
            raise TeacherError(
                f"the view {need.view!r} cannot give {need.field!r} on {need.support!r}, which "
                f"{method.name!r} needs; choose another method or teacher"
            )
    return found


def _scorer(
    name: str,
    source: Source,
    config: TeacherConfig,
    student: Student,
    max_tokens: int,
    teachers: Teachers,
) -> Teacher:
    if isinstance(source, Kept):
        return teachers.caches.alone(source)
    vocab_size, turns, cache = student.vocab_size, teachers.turns, config.cache
    asked: Teacher
    if isinstance(source, LoadedModel):
        asked = LocalTeacher(source, vocab_size=vocab_size, max_tokens=max_tokens)
    elif isinstance(source, HostModel | DiskModel):
        asked = TurnTeacher(source, turns, vocab_size=vocab_size, max_tokens=max_tokens)
    elif isinstance(source, Served):
        asked = remote_teacher(source.endpoint, config, vocab_size=vocab_size)
    else:
        asked = source
    if not cache.folder:
        return asked
    return teachers.caches.wrap(name, asked, cache, _weights_of(source, turns), vocab_size)


def _weights_of(source: Source, turns: Turns) -> str:
    """What tells a teacher's weights from others; empty where nothing does."""
    if isinstance(source, LoadedModel):
        return fingerprint(source.model)
    if isinstance(source, HostModel | DiskModel):
        with turns.of(source) as loaded:
            return fingerprint(loaded.model)
    return source.described.revision if isinstance(source, Served) else ""


def _sampler(source: Source | None, vocab_size: int, turns: Turns) -> Sampler | None:
    if isinstance(source, LoadedModel):
        return LocalSampler(replace(source, vocab_size=vocab_size), provenance=Provenance.TEACHER)
    if isinstance(source, HostModel | DiskModel):
        return TurnSampler(source, turns, vocab_size=vocab_size)
    return None


def entries_by_view(
    teachers: Mapping[str, Teacher], config: RunConfig, method: Method, plan: Plan
) -> dict[str, AskedEntries]:
    """What the served views say of single tokens, where they do not hand out hidden states."""
    found = {}
    for view, teacher in teachers.items():
        own = config.teachers.get(view.removeprefix(OTHER_TEACHER), config.teacher)
        if isinstance(teacher, RoutedTeacher):
            entries = _entries_of_all(teacher.teachers, view, method, plan, config)
        else:
            entries = _entries(teacher, own, method, plan, view)
        if entries is not None:
            found[view] = entries
    return found


def _entries(
    teacher: Teacher, config: TeacherConfig, method: Method, plan: Plan, view: str
) -> AskedEntries | None:
    asked = behind(teacher)
    if isinstance(asked, RemoteTeacher):
        return entries_of(asked, config, method.objective, plan.needs, view)
    was_served = config.url or reply_is_distribution(plan.needs, view)
    if isinstance(asked, CachedTeacher) and not asked.has_head and was_served:
        return asked_entries(method.objective, plan.needs, view)  # offline, as it was asked then
    return None


def _entries_of_all(
    teachers: Mapping[str, Teacher], view: str, method: Method, plan: Plan, config: RunConfig
) -> AskedEntries | None:
    """What routed teachers are asked of single tokens, all of them or none.

    Where one has to answer by entries, or does because they are fewer bytes, the others do too.

    Raises:
        ConfigError: one can do only the one, and another only the other.
    """
    by_entries = {
        name: _entries(teacher, config.teachers[name], method, plan, view) is not None
        for name, teacher in teachers.items()
    }
    if not any(by_entries.values()):
        return None
    first = next(name for name, is_so in by_entries.items() if is_so)
    for name, teacher in teachers.items():
        asked, own = behind(teacher), config.teachers[name]
        if not isinstance(asked, RemoteTeacher):
            continue
        try:
            if own.reply == "hidden":
                raise ConfigError(f"teachers.{name}.reply = 'hidden'")
            entries_of(asked, replace(own, reply="entries"), method.objective, plan.needs, view)
        except ConfigError as error:
            raise ConfigError(
                f"the view {view!r} is routed to {first!r}, which answers by entries, and to "
                f"{name!r}, which cannot: {error}. One reply goes into the other's rows, so all of "
                "them answer in the same form; give them the same `reply`"
            ) from None
    return asked_entries(method.objective, plan.needs, view)


def ids_to_merge(
    config: RunConfig, student: LoadedModel, teachers: Sequence[Opened]
) -> tuple[tuple[int, ...], ...]:
    """The end tokens of student and teachers, as one group, if the run file merges them.

    Raises:
        ConfigError: those of a teacher are not known.
    """
    if not config.method.merge_stop_ids:
        return ()
    ids = dict.fromkeys(student.eos_ids)
    for teacher in teachers:
        if isinstance(teacher, Kept):
            raise ConfigError(
                f"method.merge_stop_ids: the end tokens of {teacher.name} are not known while it "
                "is offline, and its answers were kept for merged ones; set offline = false"
            )
        if isinstance(teacher, Served):
            ids |= dict.fromkeys(teacher.described.special.get("eos", ()))
        else:
            ids |= dict.fromkeys(_facts(teacher).eos_ids)
    return (tuple(ids),) if len(ids) > 1 else ()


def micro_batch_tokens(setting: int, device: torch.device) -> int:
    """Padded tokens per micro-batch: the setting, or where it is 0 what suits the device."""
    return setting or (2048 if device.type == "cpu" else 16384)

"""The live parts of a run, built from its config: models, samplers, prompts, verifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from opd.data.prompts import PromptSet, PromptStream, load_prompts, load_splits
from opd.data.settings import PromptSettings
from opd.data.verifiers import resolve_verifier
from opd.errors import ConfigError, DataError, TeacherError
from opd.fields import positional_names
from opd.models import (
    LoadedModel,
    LoraSettings,
    check_same_vocabulary,
    load_model,
    resolve_device,
    scoring_dtype,
)
from opd.objective import Method
from opd.rollout.local import LocalSampler
from opd.spec import method_from_tree
from opd.student import Student
from opd.teacher.context import ContextEncoder
from opd.teacher.local import LocalTeacher
from opd.teacher.query import Described, Endpoint
from opd.teacher.remote import RemoteTeacher
from opd.teacher.routed import RoutedTeacher, Router
from opd.teacher.turns import (
    DiskModel,
    HostModel,
    Turns,
    TurnSampler,
    TurnTeacher,
)
from opd.training.config import (
    OTHER_TEACHER,
    DataConfig,
    OptimizerConfig,
    Run,
    RunConfig,
    TeacherConfig,
)
from opd.training.conflict import Rivals, find_rivals, why_not_measured
from opd.training.plan import AskedEntries, Plan, asked_entries, make_plan
from opd.training.privilege import HeldOut, check_context, check_told, held_out
from opd.training.remotes import (
    check_described,
    entries_of,
    open_endpoint,
    remote_teacher,
    trial_texts,
    try_teacher,
)
from opd.training.trackers import check_trackers
from opd.types import (
    Prompt,
    Provenance,
    Sampler,
    SamplerSettings,
    Teacher,
    Verifier,
    with_parts,
)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one method: the warm-up, then the distillation."""

    name: str
    method: Method
    steps: int
    prompts_per_step: int
    updates_per_rollout: int
    optimizer: OptimizerConfig
    plan: Plan


@dataclass
class Session:
    """Everything a run holds in memory."""

    run: Run
    phases: tuple[Phase, ...]
    student: Student
    student_sampler: Sampler
    teacher_sampler: Sampler | None
    teachers: dict[str, Teacher]
    entries: Mapping[str, AskedEntries]
    train_prompts: PromptSet
    validation: PromptSet
    test: PromptSet
    sets: dict[str, PromptSet]
    verifier: Verifier | None
    special_ids: tuple[int, ...]
    merge_ids: tuple[tuple[int, ...], ...]
    device: torch.device
    context_encoder: ContextEncoder
    held_out: HeldOut | None = None
    router: Router | None = None
    teacher_samplers: Mapping[str, Sampler] = field(default_factory=dict)
    rivals: Rivals | None = None
    turns: Turns = field(default_factory=Turns)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def max_tokens(self) -> int:
        """Padded tokens per micro-batch of the student."""
        return micro_batch_tokens(self.config.train.max_tokens, self.device)

    @property
    def tokenizer(self) -> Any:
        return self.student.loaded.tokenizer

    def stream(self, seed: int) -> PromptStream:
        """The training prompts from their beginning, in this seed's order."""
        return PromptStream(self.train_prompts, seed)


def open_session(
    run: Run,
    *,
    student: LoadedModel | None = None,
    teacher: LoadedModel | Teacher | None = None,
    prompts: Sequence[Any] | None = None,
    method: Method | None = None,
    verifier: Verifier | None = None,
) -> Session:
    """Load whatever the config names; objects given here take the place of what it names."""
    config = run.config
    check_trackers(config.log.trackers)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    _keep_freed_memory()
    method = method or build_method(run)
    student = student or load_student(run, device)
    router = find_router(run)
    turns = Turns()
    source = _teacher(run, teacher, device, method)
    further = _further_teachers(run, method, device)
    merged = config.method.merge_stop_ids
    described = [
        one
        for one in (source, *further.values())
        if isinstance(one, LoadedModel | Served | HostModel | DiskModel)
    ]
    vocab_size = min(
        (_shared_tokens(student, one, merge_stop_ids=merged) for one in described),
        default=student.vocab_size,
    )
    merge_ids = _merge_ids(config, student, described)
    module = Student(student, vocab_size=vocab_size)
    _check_trainable(module)
    phases = make_phases(config, method, merge_ids)
    teachers = _scorers(config, phases[-1], source, module, device, further, router, turns)
    splits = load_run_prompts(run, student, prompts, phases)
    chosen = verifier or find_verifier(run, *splits)
    session = Session(
        run=run,
        phases=phases,
        student=module,
        # samplers draw from the tokens that are compared, so that their policy is the student's
        student_sampler=LocalSampler(replace(student, vocab_size=vocab_size)),
        teacher_sampler=_teacher_sampler(source, vocab_size, turns),
        teachers=teachers,
        entries=_asked_entries(phases[-1], teachers, config),
        train_prompts=splits[0],
        validation=splits[1],
        test=splits[2],
        sets={
            name: load_set(run, source, student) for name, source in config.evaluate.sets.items()
        },
        verifier=chosen,
        special_ids=tuple(i for i in student.tokenizer.all_special_ids if i not in student.eos_ids),
        merge_ids=merge_ids,
        device=device,
        context_encoder=ContextEncoder(
            student.tokenizer, prompt_settings(config.data, with_responses=False)
        ),
        router=router,
        teacher_samplers=_routed_samplers(further, vocab_size, turns) if router else {},
        turns=turns,
    )
    session.rivals = _rivals(session)
    _check_contexts(session)
    session.held_out = _held_out(session)
    if router is not None:
        check_routes(router, some_prompts(session.train_prompts))
    session.notes += _notes(session)
    _check_writers(session)
    for name, one in {"teacher": source, **further}.items():
        if isinstance(one, Served):
            session.notes += _tried(session, name, one)
    known = [session.train_prompts, session.validation, session.test, *session.sets.values()]
    check_positions(positions(student.model), longest_prompt(known), config.sampler.max_new_tokens)
    return session


def micro_batch_tokens(setting: int, device: torch.device) -> int:
    """Padded tokens per micro-batch: the setting, or where it is 0 what suits the device."""
    return setting or (2048 if device.type == "cpu" else 16384)


def _keep_freed_memory() -> None:
    """Lets the C library keep the memory that one step frees for the next.

    glibc gives freed memory back to the system beyond twice the largest block it has seen freed,
    and every page that is asked for again costs a fault: a tenth of a small model's step. It
    learns from blocks of up to 32 MiB, which this one, never touched, just fits.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def build_method(run: Run) -> Method:
    """The method the run file describes."""
    config = run.config.method
    return method_from_tree(
        config.name,
        options=config.options,
        objective=config.objective,
        states=config.states,
        views=config.views,
        base=run.base,
    )


def load_student(run: Run, device: torch.device) -> LoadedModel:
    """The student of the run file, with its adapter if it has one."""
    config = run.config.student
    lora = None
    if config.lora.r:
        lora = LoraSettings(
            r=config.lora.r,
            alpha=config.lora.alpha,
            target_modules=config.lora.target_modules or "all-linear",
        )
    return load_model(
        run.path(config.model),
        dtype=config.dtype,
        device=str(device),
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        lora=lora,
        revision=config.revision or None,
        seed=run.config.seed,
    )


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


def sampler_settings(config: RunConfig) -> SamplerSettings:
    """The sampler's settings as the run file gives them."""
    sampler = config.sampler
    return SamplerSettings(
        max_new_tokens=sampler.max_new_tokens,
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        top_k=sampler.top_k,
        stop=sampler.stop,
        samples_per_prompt=sampler.samples_per_prompt,
    )


def make_phases(
    config: RunConfig, method: Method, merge_ids: tuple[tuple[int, ...], ...] = ()
) -> tuple[Phase, ...]:
    """The phases of a run, in order."""
    settings = sampler_settings(config)
    phases = []
    warmup, train = config.warmup, config.train
    if warmup.steps:
        supervised = method_from_tree("sft" if warmup.source == "data" else "sft_on_teacher")
        phases.append(
            Phase(
                "warmup",
                supervised,
                warmup.steps,
                warmup.prompts_per_step,
                1,
                warmup,
                make_plan(supervised, settings, merge_ids=merge_ids),
            )
        )
    plan = make_plan(
        method, settings, updates_per_rollout=train.updates_per_rollout, merge_ids=merge_ids
    )
    phases.append(
        Phase(
            "train",
            method,
            train.steps,
            train.prompts_per_step,
            train.updates_per_rollout,
            train,
            plan,
        )
    )
    return tuple(phases)


@dataclass(frozen=True)
class Served:
    """A teacher that is asked at a url."""

    endpoint: Endpoint
    described: Described
    config: TeacherConfig


def _tried(session: Session, view: str, served: Served) -> list[str]:
    """Ask a served teacher about two texts, before anything is trained on what it says.

    Returns:
        What is worth knowing.

    Raises:
        TeacherError: what is wrong.
    """
    phase, config = session.phases[-1], session.config
    found = try_teacher(
        served.endpoint,
        served.config,
        phase.method.objective,
        phase.plan.needs,
        view,
        student=session.student.loaded,
        texts=trial_texts(some_prompts(session.train_prompts)),
        merge_stop_ids=config.method.merge_stop_ids,
    )
    if found.errors:
        raise TeacherError("; ".join(found.errors))
    return [f"{served.endpoint.name}: {note}" for note in found.notes]


Opened = LoadedModel | Served | HostModel | DiskModel
"""A teacher of the run file: a model here, one elsewhere, or one that comes in its turn."""

Source = Opened | Teacher
"""Where scores come from: a teacher of the run file, or an object in hand."""


def _teacher(run: Run, given: Source | None, device: torch.device, method: Method) -> Source | None:
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
    if config.teacher.model or config.teacher.url:
        return _opened(run, "teacher", config.teacher, device)
    if wanted:
        raise ConfigError(
            f"{run.source}: the method {method.name!r} needs a teacher; set teacher.model to a "
            "folder or a Hugging Face id, or teacher.url to a server"
        )
    return None


def _opened(run: Run, name: str, config: TeacherConfig, device: torch.device) -> Opened:
    if not config.url and config.keep == "host":
        here = load_teacher(run, device, config, where=torch.device("cpu"))
        return HostModel(here, device)
    if not config.url and config.keep == "disk":
        return DiskModel(partial(load_teacher, run, device, config))
    if not config.url:
        return load_teacher(run, device, config)
    endpoint = open_endpoint(name, config)
    return Served(endpoint, endpoint.describe(), config)


def _shared_tokens(student: LoadedModel, source: Opened, *, merge_stop_ids: bool) -> int:
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


def _further_teachers(run: Run, method: Method, device: torch.device) -> dict[str, Opened]:
    """The models of `[teachers.NAME]`, by the views that they score."""
    check_teachers(run, method)
    return {
        OTHER_TEACHER + name: _opened(run, name, config, device)
        for name, config in run.config.teachers.items()
    }


def _scorers(
    config: RunConfig,
    phase: Phase,
    source: Source | None,
    student: Student,
    device: torch.device,
    further: Mapping[str, Opened],
    router: Router | None,
    turns: Turns,
) -> dict[str, Teacher]:
    """Who scores the views of the teacher and of the live student; others join with the phase."""
    teachers: dict[str, Teacher] = {}
    named = {
        view: _scorer(
            own,
            student.vocab_size,
            micro_batch_tokens(
                config.teachers[view.removeprefix(OTHER_TEACHER)].max_tokens
                or config.teacher.max_tokens,
                device,
            ),
            turns,
        )
        for view, own in further.items()
    }
    routed = router and RoutedTeacher(
        {view.removeprefix(OTHER_TEACHER): teacher for view, teacher in named.items()}, router
    )
    own_tokens = micro_batch_tokens(config.train.max_tokens, device)
    max_tokens = micro_batch_tokens(config.teacher.max_tokens, device)
    for view in phase.plan.views:
        if view.source == "student" and view.context:
            teachers[view.name] = LocalTeacher(
                student.loaded, vocab_size=student.vocab_size, max_tokens=own_tokens
            )
        elif view.source == "teacher":
            if view.name in named:
                teachers[view.name] = named[view.name]
            elif routed:
                teachers[view.name] = routed
            elif source is not None:
                teachers[view.name] = _scorer(source, student.vocab_size, max_tokens, turns)
    for need in phase.plan.needs:
        teacher = teachers.get(need.view)
        if teacher is not None and not teacher.can(need):
            raise TeacherError(
                f"the view {need.view!r} cannot give {need.field!r} on {need.support!r}, which "
                f"{phase.method.name!r} needs; choose another method or teacher"
            )
    return teachers


def _scorer(source: Source, vocab_size: int, max_tokens: int, turns: Turns) -> Teacher:
    if isinstance(source, LoadedModel):
        return LocalTeacher(source, vocab_size=vocab_size, max_tokens=max_tokens)
    if isinstance(source, HostModel | DiskModel):
        return TurnTeacher(source, turns, vocab_size=vocab_size, max_tokens=max_tokens)
    if isinstance(source, Served):
        return remote_teacher(source.endpoint, source.config, vocab_size=vocab_size)
    return source


def _teacher_sampler(source: Source | None, vocab_size: int, turns: Turns) -> Sampler | None:
    """Who writes as a teacher; None of one that only scores."""
    if isinstance(source, LoadedModel):
        return LocalSampler(replace(source, vocab_size=vocab_size), provenance=Provenance.TEACHER)
    if isinstance(source, HostModel | DiskModel):
        return TurnSampler(source, turns, vocab_size=vocab_size)
    return None


def _routed_samplers(
    further: Mapping[str, Opened], vocab_size: int, turns: Turns
) -> dict[str, Sampler]:
    """Routed teachers that can show what they know, by name."""
    found = {
        view.removeprefix(OTHER_TEACHER): _teacher_sampler(source, vocab_size, turns)
        for view, source in further.items()
    }
    return {name: sampler for name, sampler in found.items() if sampler is not None}


def _rivals(session: Session) -> Rivals | None:
    """The teachers whose conflict is measured; a note where there are some and it cannot be."""
    phase = session.phases[-1]
    rivals = find_rivals(phase.method, phase.plan, session.teachers)
    if rivals is None or not session.config.teacher.conflict_every:
        return None
    if reason := why_not_measured(rivals):
        session.notes.append(reason)
        return None
    return rivals


def _asked_entries(
    phase: Phase, teachers: Mapping[str, Teacher], config: RunConfig
) -> dict[str, AskedEntries]:
    """What the served views say of single tokens, where they do not hand out hidden states."""
    found = {}
    for view, teacher in teachers.items():
        entries: AskedEntries | None = None
        if isinstance(teacher, RemoteTeacher):
            own = config.teachers.get(view.removeprefix(OTHER_TEACHER), config.teacher)
            entries = entries_of(teacher, own, phase.method.objective, phase.plan.needs, view)
        elif isinstance(teacher, RoutedTeacher):
            entries = _entries_of_all(teacher.teachers, view, phase, config)
        if entries is not None:
            found[view] = entries
    return found


def _entries_of_all(
    teachers: Mapping[str, Teacher], view: str, phase: Phase, config: RunConfig
) -> AskedEntries | None:
    """What routed teachers are asked of single tokens, all of them or none.

    Where one has to answer by entries, or does because they are fewer bytes, the others do too.

    Raises:
        ConfigError: one can do only the one, and another only the other.
    """
    objective, needs = phase.method.objective, phase.plan.needs
    served = {name: each for name, each in teachers.items() if isinstance(each, RemoteTeacher)}
    by_entries = {
        name: entries_of(teacher, config.teachers[name], objective, needs, view) is not None
        for name, teacher in served.items()
    }
    if not any(by_entries.values()):
        return None
    first = next(name for name, is_so in by_entries.items() if is_so)
    for name, teacher in served.items():
        own = config.teachers[name]
        try:
            if own.reply == "hidden":
                raise ConfigError(f"teachers.{name}.reply = 'hidden'")
            entries_of(teacher, replace(own, reply="entries"), objective, needs, view)
        except ConfigError as error:
            raise ConfigError(
                f"the view {view!r} is routed to {first!r}, which answers by entries, and to "
                f"{name!r}, which cannot: {error}. One reply goes into the other's rows, so all of "
                "them answer in the same form; give them the same `reply`"
            ) from None
    return asked_entries(objective, needs, view)


def _merge_ids(
    config: RunConfig, student: LoadedModel, teachers: Sequence[Opened]
) -> tuple[tuple[int, ...], ...]:
    if not config.method.merge_stop_ids:
        return ()
    of_teachers = (
        ids
        for teacher in teachers
        for ids in (
            teacher.described.special.get("eos", ())
            if isinstance(teacher, Served)
            else _facts(teacher).eos_ids
        )
    )
    ids = list(dict.fromkeys((*student.eos_ids, *of_teachers)))
    return (tuple(ids),) if len(ids) > 1 else ()


def prompt_settings(data: DataConfig, *, with_responses: bool) -> PromptSettings:
    """How records become prompts, as the run file says."""
    return PromptSettings(
        prompt_column=data.prompt_column,
        messages_column=data.messages_column,
        answer_column=data.answer_column,
        response_column=data.response_column,
        with_responses=with_responses,
        as_chat=data.as_chat,
        chat_template_kwargs=data.chat_template_kwargs,
        max_prompt_tokens=data.max_prompt_tokens,
        bad_prompts=data.bad_prompts,
        dataset_split=data.dataset_split,
        dataset_subset=data.dataset_subset or None,
    )


def load_set(run: Run, source: Any, student: LoadedModel, *, responses: bool = False) -> PromptSet:
    """A finite set of prompts: of a task its test prompts, otherwise the whole source."""
    config = run.config
    if isinstance(source, str) and source.startswith("task:"):
        splits = load_splits(
            source,
            tokenizer=student.tokenizer,
            validation=1,
            test=config.evaluate.test_prompts,
            eos_ids=student.eos_ids,
        )
        return splits.test
    return load_prompts(
        source,
        tokenizer=student.tokenizer,
        settings=prompt_settings(config.data, with_responses=responses),
        base_folder=run.base,
        eos_ids=student.eos_ids,
    )


def load_run_prompts(
    run: Run, student: LoadedModel, given: Sequence[Any] | None, phases: Sequence[Phase]
) -> tuple[PromptSet, PromptSet, PromptSet]:
    """Prompts to train on, to validate on and to test on."""
    config = run.config
    source: Any = config.data.prompts if given is None else given
    responses = any(phase.method.states.data > 0 for phase in phases)
    is_task = isinstance(source, str) and source.startswith("task:")
    own_validation = bool(config.data.validation) and not is_task
    held_out = config.evaluate.prompts if is_task else config.data.held_out
    splits = load_splits(
        source,
        tokenizer=student.tokenizer,
        validation=0 if own_validation else held_out,
        test=config.evaluate.test_prompts if is_task else 0,
        settings=prompt_settings(config.data, with_responses=responses),
        base_folder=run.base,
        eos_ids=student.eos_ids,
    )
    if responses:
        _check_responses(splits.train)
    validation = splits.validation
    if own_validation:
        validation = load_set(run, config.data.validation, student)
    if config.data.test:
        test = load_set(run, config.data.test, student)
    else:
        test = splits.test if is_task else validation
    return splits.train, validation, test


def _check_responses(prompts: PromptSet) -> None:
    missing = [prompt.id for prompt in prompts.prompts if not prompt.response_ids]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(prompts.prompts)} prompts of {prompts.source} have no "
            f"response ({missing[0]} the first), but a phase trains on data; give them a "
            "`response` column or a chat that ends with the assistant"
        )


def find_verifier(run: Run, prompts: PromptSet, *others: PromptSet) -> Verifier | None:
    """The verifier of the run file; `auto` looks at the prompts. None where there is none.

    Raises:
        DataError: it compares with answers, and some of the prompts or of the others have none.
    """
    spec, column = run.config.data.verifier, run.config.data.answer_column
    if spec == "none":
        return None
    if spec == "auto":
        if prompts.source.startswith("task:"):
            spec = "task"
        elif any(prompt.answer is not None for prompt in prompts.prompts):
            spec = "exact"
        elif prompts.prompts and column != DataConfig.answer_column:
            raise DataError(
                f"no prompt of {prompts.source} has an answer in the column data.answer_column = "
                f"{column!r}; there are: {', '.join(prompts.prompts[0].columns) or 'no others'}"
            )
        else:
            return None
    found = resolve_verifier(spec, base_folder=run.base)
    if spec in COMPARING:
        for some in (prompts, *others):
            _check_answers(spec, column, some)
    return found


COMPARING = ("exact", "math-verify")
"""Verifiers that need an answer to compare with."""


def _check_answers(spec: str, column: str, prompts: PromptSet) -> None:
    missing = [prompt.id for prompt in prompts.prompts if prompt.answer is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(prompts.prompts)} prompts of {prompts.source} have no answer "
            f"({missing[0]} the first), which verifier {spec!r} compares with; fill the column "
            f"{column!r}, name another with data.answer_column, or set data.verifier = 'none'"
        )


def _check_contexts(session: Session) -> None:
    samples = session.config.sampler.samples_per_prompt
    check_told(session.phases[-1].method, samples=samples)
    for view in session.phases[-1].plan.views:
        if view.context:
            scorer = session.teachers.get(view.name)
            scorers: list[Teacher | None] = [scorer]
            if isinstance(scorer, RoutedTeacher):
                scorers = [*scorer.teachers.values()]
            own = [one.loaded for one in scorers if isinstance(one, LocalTeacher | TurnTeacher)]
            limits = [positions(each.model) for each in own or [session.student.loaded]]
            check_context(
                view,
                some_prompts(session.train_prompts),
                session.context_encoder,
                min((limit for limit in limits if limit is not None), default=None),
                session.config.sampler.max_new_tokens,
            )


def _held_out(session: Session) -> HeldOut:
    """What of the views with a context can be measured on the held-out prompts."""
    sets = {id(each): each.prompts for each in (session.validation, session.test)}
    return held_out(
        session.phases[-1].plan.views,
        [prompt for prompts in sets.values() for prompt in prompts],
        session.context_encoder,
        answered=session.config.evaluate.privileged,
        limit=positions(session.student.loaded.model),
        new=session.config.sampler.max_new_tokens,
    )


def some_prompts(prompts: PromptSet) -> Sequence[Prompt]:
    """All prompts of a finite set; the first few of an endless one."""
    return prompts.prompts if prompts.generate is None else prompts.generate(0, 0, 16, False)


def positions(model: Any) -> int | None:
    """Tokens of prompt and response a model is made for; None where it does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def longest_prompt(sets: Sequence[PromptSet]) -> int:
    """Tokens of the longest prompt that is known before it is drawn."""
    return max((len(prompt.prompt_ids) for some in sets for prompt in some.prompts), default=0)


def check_positions(limit: int | None, longest: int, new: int) -> None:
    """Refuse prompts and responses that together are longer than the student's positions."""
    if limit is None or longest + new <= limit:
        return
    raise ConfigError(
        f"prompts of up to {longest} tokens and responses of up to {new} are more than the "
        f"{limit} positions of the student; lower sampler.max_new_tokens to {limit - longest}"
        if longest < limit
        else f"prompts of up to {longest} tokens do not fit into the {limit} positions of the "
        "student; set data.max_prompt_tokens"
    )


def _check_trainable(student: Student) -> None:
    if not student.trainable():
        raise ConfigError(
            f"student {student.loaded.reference} has no weight that can be trained: all are "
            "frozen. An adapter folder is loaded frozen: merge it into a model folder and name "
            "that; a model in hand needs requires_grad, and must not be the teacher as well"
        )


def _check_writers(session: Session) -> None:
    for phase in session.phases:
        states = phase.method.states
        if states.teacher_writes and session.teacher_sampler is None:
            raise TeacherError(
                f"phase {phase.name!r} trains on text the teacher writes, but the teacher only "
                "scores; use a teacher that is a model"
            )
        check_judged(phase.method, session.verifier)
        samplers = (session.student_sampler, session.teacher_sampler)
        together = states.interleave or states.reach("mixture")
        if together and not all(isinstance(sampler, LocalSampler) for sampler in samplers):
            raise ConfigError(
                "states.mixture and states.interleave run student and teacher side by side, which "
                "takes two models in this process that stay (teacher.keep = 'device'); use "
                "states.teacher_prefix or states.teacher"
            )


def check_judged(method: Method, verifier: Verifier | None) -> None:
    """Refuse a method that goes by a verifier's judgement where there is none.

    Raises:
        ConfigError: names what asks for it.
    """
    check_told(method, judged=verifier is not None)
    asks = []
    if method.states.reach("rewrite"):
        asks.append("states.rewrite")
    asks += sorted(
        bound.short_name
        for _, term in method.objective.parts()
        for _, bound in term.slots()
        if "verdict" in positional_names(bound.function)
    )
    if asks and verifier is None:
        raise ConfigError(
            f"{asks[0]} goes by whether a response is right, but there is no verifier; set "
            "data.verifier, or give the prompts answers"
        )


def _notes(session: Session) -> list[str]:
    notes = []
    for prompts in (session.train_prompts, session.validation):
        if prompts.skipped_repeated:
            notes.append(
                f"{prompts.source}: left out {prompts.skipped_repeated} repetitions of held-out "
                "prompts"
            )
        if prompts.skipped_empty or prompts.skipped_long:
            notes.append(
                f"{prompts.source}: skipped {prompts.skipped_empty} empty prompts and "
                f"{prompts.skipped_long} longer than {session.config.data.max_prompt_tokens} tokens"
            )
    if session.held_out is not None:
        notes += session.held_out.notes
    for phase in session.phases:
        if phase.method.states.student and phase.plan.mismatch:
            notes.append(f"{phase.name}: " + "; ".join(phase.plan.mismatch))
        notes += view_notes(phase.method)
    return notes


def view_notes(method: Method) -> list[str]:
    """Views that cannot teach: the student compared with itself, or with its own past."""
    read = [view for view in method.views if view.name in method.objective.views()]
    notes = []
    for view in read:
        if view.source == "student" and not view.context:
            notes.append(
                f"the view {view.name!r} is the student itself, reading what it reads: divergence "
                "and gradient are zero everywhere, so it teaches nothing; give it a context"
            )
        if view.source == "ema_student" and not view.context:
            notes.append(
                f"the view {view.name!r} averages the student's own past and reads what it reads: "
                "it holds the student back and teaches nothing new; give it a context for that"
            )
    return notes

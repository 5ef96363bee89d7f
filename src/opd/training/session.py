"""The live parts of a run, built from its config: models, samplers, prompts, verifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from opd.data.prompts import PromptSet, PromptStream, load_prompts, load_splits
from opd.data.settings import PromptSettings
from opd.data.verifiers import resolve_verifier
from opd.errors import ConfigError, DataError, TeacherError
from opd.fields import positional_names
from opd.models import LoadedModel, LoraSettings, load_model, resolve_device
from opd.objective import Method
from opd.rollout.local import LocalSampler
from opd.spec import method_from_tree
from opd.student import Student
from opd.teacher.context import ContextEncoder
from opd.teacher.local import LocalTeacher
from opd.teacher.routed import RoutedTeacher, Router
from opd.teacher.turns import Turns, TurnTeacher
from opd.training.caches import behind, not_there
from opd.training.config import DataConfig, OptimizerConfig, Run, RunConfig
from opd.training.conflict import Rivals, find_rivals, why_not_measured
from opd.training.plan import AskedEntries, Plan, make_plan
from opd.training.privilege import HeldOut, check_context, check_told, held_out
from opd.training.remotes import longest_read, trial_texts, try_teacher
from opd.training.teachers import (
    Served,
    Teachers,
    check_routes,
    entries_by_view,
    ids_to_merge,
    micro_batch_tokens,
    open_teachers,
    scorers,
    shared_tokens,
)
from opd.training.trackers import check_trackers
from opd.types import Prompt, Sampler, SamplerSettings, Teacher, Verifier


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
    opened: Teachers
    context_encoder: ContextEncoder
    held_out: HeldOut | None = None
    teacher_samplers: Mapping[str, Sampler] = field(default_factory=dict)
    rivals: Rivals | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def router(self) -> Router | None:
        """Whom a prompt goes to, where teachers are routed."""
        return self.opened.router

    @property
    def turns(self) -> Turns:
        """Of the models that take turns on the device."""
        return self.opened.turns

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
    teachers = open_teachers(run, teacher, device, method)
    try:
        return _open_session(run, student, teachers, prompts, method, verifier, device)
    except BaseException:
        teachers.close()
        raise


def _open_session(
    run: Run,
    student: LoadedModel,
    teachers: Teachers,
    prompts: Sequence[Any] | None,
    method: Method,
    verifier: Verifier | None,
    device: torch.device,
) -> Session:
    config = run.config
    merged = config.method.merge_stop_ids
    vocab_size = min(
        (shared_tokens(student, one, merge_stop_ids=merged) for one in teachers.opened),
        default=student.vocab_size,
    )
    merge_ids = ids_to_merge(config, student, teachers.opened)
    module = Student(student, vocab_size=vocab_size)
    _check_trainable(module)
    phases = make_phases(config, method, merge_ids)
    method, plan = phases[-1].method, phases[-1].plan
    views = scorers(teachers, config, method, plan, module, device)
    splits = load_run_prompts(run, student, prompts, phases)
    chosen = verifier or find_verifier(run, *splits)
    session = Session(
        run=run,
        phases=phases,
        student=module,
        # samplers draw from the tokens that are compared, so that their policy is the student's
        student_sampler=LocalSampler(replace(student, vocab_size=vocab_size)),
        teacher_sampler=teachers.sampler(vocab_size),
        teachers=views,
        entries=entries_by_view(views, config, method, plan),
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
        teacher_samplers=teachers.routed_samplers(vocab_size),
        opened=teachers,
    )
    session.rivals = _rivals(session)
    _check_contexts(session)
    if config.monitor.golden and chosen is None:
        raise ConfigError(
            "monitor.golden names sets to be watched, and there is no verifier, so nobody says "
            "what is right; set data.verifier, or leave golden out"
        )
    session.held_out = _held_out(session)
    if session.router is not None:
        check_routes(session.router, some_prompts(session.train_prompts))
    session.notes += _notes(session)
    _check_writers(session)
    for view, served in teachers.served.items():
        session.notes += _tried(session, view, served)
    known = [session.train_prompts, session.validation, session.test, *session.sets.values()]
    check_positions(positions(student.model), longest_prompt(known), config.sampler.max_new_tokens)
    return session


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


def _tried(session: Session, view: str, served: Served) -> list[str]:
    """Ask a served teacher about two texts, before anything is trained on what it says.

    Returns:
        What is worth knowing.

    Raises:
        TeacherError: what is wrong.
    """
    phase, config = session.phases[-1], session.config
    prompts, new = some_prompts(session.train_prompts), config.sampler.max_new_tokens
    encoder = session.context_encoder
    found = try_teacher(
        served.endpoint,
        served.config,
        phase.method.objective,
        phase.plan.needs,
        view,
        student=session.student.loaded,
        texts=trial_texts(prompts),
        longest_prompt=longest_read(view, phase.plan.views, prompts, encoder, max_new_tokens=new),
        max_new_tokens=new,
        merge_stop_ids=config.method.merge_stop_ids,
    )
    if found.errors:
        raise TeacherError("; ".join(found.errors))
    return [f"{served.endpoint.name}: {note}" for note in found.notes]


def _rivals(session: Session) -> Rivals | None:
    """The teachers whose conflict is measured; a note where there are some and it cannot be."""
    phase = session.phases[-1]
    rivals = find_rivals(phase.method, phase.plan, session.teachers)
    if rivals is None or not session.config.teacher.conflict_every:
        return None
    if absent := not_there(rivals.teachers.values()):
        session.notes.append(
            f"the conflict of the teachers is not measured: {absent[0]} is offline"
        )
        return None
    if reason := why_not_measured(rivals):
        session.notes.append(reason)
        return None
    return rivals


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
            asked = [behind(one) for one in scorers if one is not None]
            own = [one.loaded for one in asked if isinstance(one, LocalTeacher | TurnTeacher)]
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

"""Everything that can be known about a run before its weights load."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch

from opd.audit.conduct import RunFacts
from opd.audit.rules import Remark
from opd.audit.rules import examine as examine_composition
from opd.data.prompts import TASK_PREFIX, PromptSet, load_prompts
from opd.data.records import encode_records
from opd.data.sources import read_records
from opd.data.tasks import find_tasks
from opd.errors import OpdError
from opd.models import LoadedModel, check_same_vocabulary, resolve_device, scoring_dtype
from opd.objective import Method, Sampled
from opd.teacher.context import ContextEncoder
from opd.teacher.preflight import Preflight
from opd.terms import parts, shown
from opd.training.caches import Caches
from opd.training.config import OTHER_TEACHER, Run, StudentConfig, TeacherConfig
from opd.training.facts import ModelFacts, read_facts
from opd.training.folder import check_name
from opd.training.memory import (
    MemoryPart,
    available_bytes,
    memory_parts,
    trainable_parameters,
)
from opd.training.privilege import check_context, check_told, held_out
from opd.training.probe import try_objective
from opd.training.remotes import longest_read, open_endpoint, trial_texts, try_teacher
from opd.training.session import (
    Phase,
    build_method,
    check_judged,
    check_positions,
    find_verifier,
    make_phases,
    prompt_settings,
    view_notes,
)
from opd.training.step import extra_columns
from opd.training.teachers import asks_the_teacher, check_teachers, find_router, load_teacher
from opd.types import Bound, Prompt

Level = Literal["error", "note"]
T = TypeVar("T")

FIRST_RECORDS = 1000
"""Records of a source that are encoded; of a JSON Lines file the rest is only read."""
READ_WHOLE_BELOW = 256e6
"""Bytes up to which every line of a JSON Lines file is read."""

LARGE_MODEL = 50_000_000
FULL_RATE, ADAPTER_RATE, SCORE_RATE = 1e-4, 1e-6, 1e-3

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed.

    Attributes:
        level: an `error` stops the run; a `note` is worth knowing.
        where: the key of the run file it is about.
        message: what is wrong and what to do.
    """

    level: Level
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.message}"


@dataclass(frozen=True)
class CheckReport:
    """Findings, errors first, and the memory estimate where both models could be read."""

    findings: tuple[Finding, ...]
    memory: tuple[MemoryPart, ...]


def check(run: Run) -> list[Finding]:
    """What is wrong with a run, errors first; nothing is written and no weights are loaded.

    A user's own formulas and verifier are imported, and the verifier is tried once.
    """
    return list(examine(run).findings)


def examine(run: Run, *, live: bool = False) -> CheckReport:
    """`check`, with the memory estimate.

    Args:
        live: ask the teachers that have a url, too.
    """
    checker = _Checker(run, live)
    checker.run_all()
    findings = sorted(checker.findings, key=lambda finding: finding.level)
    return CheckReport(tuple(findings), tuple(checker.memory))


@dataclass
class _Sample:
    """What was read of one source of prompts."""

    prompts: PromptSet
    complete: bool

    @property
    def longest(self) -> int:
        return max((len(prompt.prompt_ids) for prompt in self.prompts.prompts), default=0)


@dataclass
class _Checker:
    """Collects findings; one method per matter."""

    run: Run
    live: bool = False
    findings: list[Finding] = field(default_factory=list)
    memory: list[MemoryPart] = field(default_factory=list)
    device: torch.device | None = None

    def run_all(self) -> None:
        config = self.run.config
        device = self.device = self.attempt("device", lambda: resolve_device(config.device))
        self.attempt("name", lambda: check_name(config.output, config.name))
        self.extras()
        method = self.attempt("method", lambda: build_method(self.run))
        phases = method and self.attempt("method.states", lambda: make_phases(config, method))
        phases = phases or ()
        student = self.model("student", config.student)
        own, named = config.teacher, config.teachers
        teacher = self.model("teacher", own) if own.model and not own.cache.offline else None
        if student and teacher:
            self.pair(student, teacher)
        further = {
            name: self.model(f"teachers.{name}", table)
            for name, table in named.items()
            if table.model and not table.cache.offline
        }
        self.kept()
        for name, other in further.items():
            if student and other:
                self.pair(student, other, f"teachers.{name}.model")
        if method:
            self.attempt("teachers", lambda: check_teachers(self.run, method))
        self.teacher_is_there(phases)
        if student and method:
            self.supports(method, student)
        if student:
            self.adapter(student)
        longest, train = self.data(phases, student)
        if student:
            self.positions(student, longest)
            self.learning_rates(phases, student)
            self.disk(student, phases)
        if device and student and phases and (teacher or not own.model or own.cache.offline):
            others = {name: other for name, other in further.items() if other}
            self.estimate(device, phases[-1], student, teacher, longest, others)
        for phase in phases:
            samples = config.sampler.samples_per_prompt
            told = functools.partial(check_told, phase.method, samples=samples)
            self.attempt("method.views", told)
            self.sampler(phase)
            for note in view_notes(phase.method):
                self.note("method.views", note)
            self.objective(phase)
            self.trial(phase, student, train)
        self.composition(phases, train)
        if self.live and student and phases and train:
            self.served(phases[-1], student, train, longest)

    # -- collecting --------------------------------------------------------------------------

    def error(self, where: str, message: str) -> None:
        self.findings.append(Finding("error", where, message))

    def note(self, where: str, message: str) -> None:
        self.findings.append(Finding("note", where, message))

    def attempt(self, where: str, action: Callable[[], T]) -> T | None:
        """The action's result, or None and its error among the findings."""
        try:
            return action()
        except OpdError as error:
            self.error(where, str(error))
            return None

    # -- models ------------------------------------------------------------------------------

    def model(self, side: str, config: StudentConfig | TeacherConfig) -> ModelFacts | None:
        return self.attempt(
            f"{side}.model", lambda: read_facts(self.run.path(config.model), self.in_use(config))
        )

    def in_use(self, config: StudentConfig | TeacherConfig) -> StudentConfig | TeacherConfig:
        """The section with the dtype in which the weights will be in memory."""
        if isinstance(config, StudentConfig) or self.device is None:
            return config
        dtype = cast("Any", scoring_dtype(config.dtype, self.device))
        return dataclasses.replace(config, dtype=dtype)

    def pair(self, student: ModelFacts, teacher: ModelFacts, where: str = "teacher.model") -> None:
        merged = self.run.config.method.merge_stop_ids
        self.attempt(
            where,
            lambda: check_same_vocabulary(student.hollow, teacher.hollow, merge_stop_ids=merged),
        )
        same = student.hollow.reference == teacher.hollow.reference
        if same and where == "teacher.model":
            self.note(where, "teacher and student are the same model: nothing to learn")

    def teacher_is_there(self, phases: tuple[Phase, ...]) -> None:
        own = self.run.config.teacher
        if own.model or own.url or own.route or own.cache.offline:
            return
        for phase in phases:
            asked = asks_the_teacher(phase.method, self.run.config.teachers)
            if asked or phase.method.states.teacher_writes:
                self.error(
                    "teacher.model",
                    f"the {phase.name} phase ({phase.method.name}) needs a teacher; name a folder "
                    "or a Hugging Face id, or a server with teacher.url",
                )

    def kept(self) -> None:
        """Whether teachers that are not there left answers."""
        caches = Caches(self.run.base)
        for where, table in self.tables():
            if table.cache.offline:
                self.attempt(f"{where}.cache", functools.partial(caches.kept, where, table))

    def tables(self) -> Iterator[tuple[str, TeacherConfig]]:
        config = self.run.config
        yield "teacher", config.teacher
        for name, table in config.teachers.items():
            yield f"teachers.{name}", table

    def served(self, phase: Phase, student: ModelFacts, train: _Sample, longest: int) -> None:
        """Try the teachers that have a url."""
        config = self.run.config
        views, prompts = phase.plan.views, train.prompts.prompts
        encoder = ContextEncoder(
            student.hollow.tokenizer, prompt_settings(config.data, with_responses=False)
        )
        new = config.sampler.max_new_tokens
        for where, table in self.tables():
            if not table.url or table.cache.offline:
                continue
            view = where.replace("teachers.", OTHER_TEACHER)
            endpoint = self.attempt(f"{where}.url", functools.partial(open_endpoint, where, table))
            if endpoint is None:
                continue
            copy = None
            if table.local_copy:
                load = functools.partial(self._copy, table)
                copy = self.attempt(f"{where}.local_copy", load)
            found = try_teacher(
                endpoint,
                table,
                phase.method.objective,
                phase.plan.needs,
                view,
                student=student.hollow,
                texts=trial_texts(prompts),
                longest_prompt=longest_read(view, views, prompts, encoder, max_new_tokens=new),
                max_new_tokens=new,
                merge_stop_ids=config.method.merge_stop_ids,
                local_copy=copy,
            )
            endpoint.close()
            for message in found.errors:
                self.error(f"{where}.url", message)
            for message in found.notes:
                self.note(f"{where}.url", message)
            if found.tokens_per_s:
                self._teacher_time(where, phase, found, longest)

    def _copy(self, table: TeacherConfig) -> LoadedModel:
        device = resolve_device(self.run.config.device)
        return load_teacher(
            self.run, device, dataclasses.replace(table, url="", model=table.local_copy)
        )

    def _teacher_time(self, where: str, phase: Phase, found: Preflight, longest: int) -> None:
        config = self.run.config
        sequences = phase.steps * phase.prompts_per_step * config.sampler.samples_per_prompt
        tokens = sequences * (longest + config.sampler.max_new_tokens)
        told = found.described
        assert told is not None
        model = " ".join(part for part in (told.model, told.dtype, told.revision) if part)
        self.note(
            f"{where}.url",
            f"{model} scores {found.tokens_per_s:,.0f} tokens/s, one request of two texts at a "
            f"time; at that rate the run's up to {tokens:,} tokens take it "
            f"{tokens / found.tokens_per_s / 60:,.0f} min at the most",
        )

    def supports(self, method: Method, student: ModelFacts) -> None:
        vocabulary = student.hollow.vocab_size
        names = ("student_top_ids", "teacher_top_ids")
        largest = max(method.objective.support_size(name) for name in names)
        if largest > vocabulary:
            self.error(
                "method",
                f"a support of k = {largest} tokens, but the vocabulary has {vocabulary}; "
                "lower k, or compare the whole vocabulary",
            )
        if method.states.interleave > vocabulary:
            self.error(
                "method.states",
                f"interleave = {method.states.interleave}, but the vocabulary has {vocabulary} "
                "tokens; lower it",
            )

    def adapter(self, student: ModelFacts) -> None:
        lora = self.run.config.student.lora
        if not lora.r:
            return
        if trainable_parameters(self.run.config, student) == 0:
            self.error(
                "student.lora.target_modules",
                f"no linear layer of the student is called {', '.join(lora.target_modules)}",
            )

    def extras(self) -> None:
        config = self.run.config
        wanted: list[tuple[str, str, str]] = [
            ("log.trackers", TRACKERS[name], name) for name in config.log.trackers
        ]
        if config.student.lora.r:
            wanted.append(("student.lora", "peft", "lora"))
        for where, module, extra in wanted:
            if importlib.util.find_spec(module) is None:
                self.error(where, f"needs the package {module}: pip install 'opd[{extra}]'")

    # -- data --------------------------------------------------------------------------------

    def data(
        self, phases: tuple[Phase, ...], student: ModelFacts | None
    ) -> tuple[int, _Sample | None]:
        """Look at every source; the longest prompt seen, in tokens, and some to train on."""
        config = self.run.config
        responses = any(phase.method.states.data > 0 for phase in phases)
        train = self.source("data.prompts", config.data.prompts, student, responses)
        others = {"data.validation": config.data.validation, "data.test": config.data.test}
        others |= {f"evaluate.sets.{name}": text for name, text in config.evaluate.sets.items()}
        samples = [train] + [
            self.source(where, text, student, False) for where, text in others.items() if text
        ]
        if train:
            self.training_prompts(train, phases, responses)
        if train and student and phases:
            self.contexts(train, phases, student)
        self.verifier(train, phases)
        return max((sample.longest for sample in samples if sample), default=0), train

    def source(
        self, where: str, text: str, student: ModelFacts | None, responses: bool
    ) -> _Sample | None:
        """The first records of a source, encoded."""
        if text.startswith(TASK_PREFIX):
            return self.attempt(where, lambda: self._task(text, student))
        path = self.run.base / Path(text).expanduser()
        if not path.exists() and _is_hub_id(text, path):
            self.note(where, f"{text} is taken for a data set of the hub and was not read")
            return None
        return self.attempt(where, lambda: self._records(where, text, path, student, responses))

    def _task(self, text: str, student: ModelFacts | None) -> _Sample | None:
        find_tasks(text.removeprefix(TASK_PREFIX))
        if student is None:
            return None
        endless = load_prompts(text, tokenizer=student.hollow.tokenizer)
        assert endless.generate is not None
        some = tuple(endless.generate(0, 0, 64, True))
        return _Sample(PromptSet(text, some, generate=endless.generate), False)

    def _records(
        self, where: str, text: str, path: Path, student: ModelFacts | None, responses: bool
    ) -> _Sample | None:
        settings = prompt_settings(self.run.config.data, with_responses=responses)
        records = iter(read_records(text, settings, self.run.base))
        first = [*itertools.islice(records, FIRST_RECORDS)]
        if path.is_file() and path.stat().st_size <= READ_WHOLE_BELOW:
            for _ in records:  # an unreadable line is an error wherever it is
                pass
        if student is None:
            return None
        encoded = encode_records(
            first,
            tokenizer=student.hollow.tokenizer,
            settings=settings,
            eos_ids=student.hollow.eos_ids,
        )
        complete = len(first) < FIRST_RECORDS
        seen = PromptSet(text, *encoded)
        for count, what in (
            (seen.skipped_empty, "are empty"),
            (seen.skipped_long, f"exceed max_prompt_tokens = {settings.max_prompt_tokens}"),
        ):
            if count:
                among = "" if complete else f" of the first {FIRST_RECORDS}"
                self.note(where, f"{count} prompts{among} {what} and will be left out")
        if not seen.prompts:
            self.error(where, f"no prompt that could be used in {text}")
        return _Sample(seen, complete)

    def training_prompts(self, train: _Sample, phases: tuple[Phase, ...], responses: bool) -> None:
        config = self.run.config
        prompts = train.prompts
        if prompts.generate is None and train.complete and not config.data.validation:
            self.attempt("data.held_out", lambda: prompts.split(config.data.held_out))
        self.routes(prompts.prompts)
        for phase in phases:
            columns = functools.partial(extra_columns, prompts.prompts, phase.method.objective)
            self.attempt("data.prompts", columns)
        missing = [prompt.id for prompt in prompts.prompts if not prompt.response_ids]
        if responses and missing:
            self.error(
                "data.response_column",
                f"{missing[0]} has no response, but a phase trains on data; add a column "
                f"{config.data.response_column!r}, or set warmup.source = 'teacher'",
            )

    def routes(self, prompts: Sequence[Prompt]) -> None:
        """Whom the records that were looked at are routed to."""
        router = self.attempt("teacher.route", lambda: find_router(self.run))
        if router is None:
            return
        found: list[str] = []
        self.attempt("teacher.route", lambda: found.extend(map(router, prompts)))
        for name in router.names if found else ():
            if name not in found:
                self.note("teacher.route", f"none of {len(found)} records goes to {name!r}")

    def contexts(self, train: _Sample, phases: tuple[Phase, ...], student: ModelFacts) -> None:
        """Render what views with a context read, of every record that was looked at."""
        config = self.run.config
        settings = prompt_settings(config.data, with_responses=False)
        encoder = ContextEncoder(student.hollow.tokenizer, settings)
        check_one = functools.partial(
            check_context,
            prompts=train.prompts.prompts,
            encoder=encoder,
            limit=student.positions,
            new=config.sampler.max_new_tokens,
        )
        views = phases[-1].plan.views
        for view in views:
            if view.context:
                self.attempt("method.views", functools.partial(check_one, view))
        if config.evaluate.privileged:
            for note in held_out(views, (), encoder, answered=True).notes:
                self.note("evaluate.privileged", note.removeprefix("evaluate.privileged: "))

    def verifier(self, train: _Sample | None, phases: tuple[Phase, ...]) -> None:
        """Import it, and try it on one prompt."""
        config = self.run.config
        if train is None and config.data.verifier == "auto":
            return  # the prompts decide, and they could not be read
        prompts = train.prompts if train else PromptSet(config.data.prompts)
        found = self.attempt("data.verifier", lambda: find_verifier(self.run, prompts))
        failed = any(finding.where == "data.verifier" for finding in self.findings)
        if found is None and not failed:
            self.note("data.verifier", "no verifier: accuracy will not be measured")
            for phase in phases:
                self.attempt("method", functools.partial(check_judged, phase.method, found))
        if found is not None and prompts.prompts:
            verify, prompt = found, prompts.prompts[0]
            text = prompt.answer or ""
            self.attempt("data.verifier", lambda: verify(prompt, text, finished=True))

    # -- the whole ---------------------------------------------------------------------------

    def positions(self, student: ModelFacts, longest: int) -> None:
        config = self.run.config
        limit, new = student.positions, config.sampler.max_new_tokens
        if limit is None:
            return
        self.attempt("sampler.max_new_tokens", lambda: check_positions(limit, longest, new))
        fits = longest + new <= limit
        room = config.data.max_prompt_tokens + new <= limit or _is_task(config.data.prompts)
        if fits and not room:
            self.note(
                "data.max_prompt_tokens",
                f"the student has {limit} positions: with max_new_tokens = {new} a prompt may "
                f"have {limit - new} tokens (longest seen: {longest})",
            )

    def sampler(self, phase: Phase) -> None:
        horizon, limit = (
            phase.method.states.reach("horizon"),
            self.run.config.sampler.max_new_tokens,
        )
        if horizon > limit:
            self.note(
                "method.states",
                f"horizon reaches {horizon:g}, but sampler.max_new_tokens = {limit} ends every "
                "response before",
            )
        if phase.method.states.student:
            for reason in phase.plan.mismatch:
                self.note("sampler", f"in phase {phase.name}: {reason}")

    def objective(self, phase: Phase) -> None:
        """Settings that leave an objective with nothing to do, or with too much."""
        config = self.run.config
        train, critic = config.train, config.critic
        learns = phase.method.objective.critic_term is not None
        if learns and critic.warmup_steps >= phase.steps > 0:
            self.error(
                "critic.warmup_steps",
                f"{critic.warmup_steps} is no less than the {phase.steps} steps: only the critic "
                "would learn; lower it",
            )
        if phase.method.objective.is_off:
            self.note("method.objective", "every coefficient is 0: nothing is learned")
        if phase.name == "train" and train.anchor * train.learning_rate > 1:
            self.error(
                "train.anchor",
                f"{train.anchor:g} times the learning rate {train.learning_rate:g} is more than "
                "1: every step would jump beyond where it started; lower one of them",
            )

    def trial(self, phase: Phase, student: ModelFacts | None, train: _Sample | None) -> None:
        """Evaluate the objective once on a few random rows, so that what it refuses is known."""
        try:
            try_objective(
                phase.method,
                prompts=train.prompts.prompts if train else (),
                vocab_size=student.hollow.vocab_size if student else None,
            )
        except OpdError as error:
            self.error(self.key_of_formula(phase.method, str(error)), str(error))

    def key_of_formula(self, method: Method, message: str) -> str:
        """The key of the run file from which the formula that a message names is made."""
        config = self.run.config.method
        for key, bound in _keys_of_formulas(method):
            if not message.startswith(f"{shown(bound)} "):
                continue
            if config.name == "custom":
                return key
            options = [option for option in config.options if option in dict(bound.knobs)]
            return f"method.options.{options[0]}" if len(options) == 1 else "method.options"
        return "method.objective"

    def composition(self, phases: tuple[Phase, ...], train: _Sample | None) -> None:
        """What the composition rules say of the run, and which of it is declared."""
        declared = self.run.config.check.declared
        used = set()
        for phase in phases:
            for remark in examine_composition(phase.method, self.facts(phase, train)):
                used.add(remark.rule)
                self.remark(remark, meant=remark.declared or remark.rule in declared)
        for name in declared:
            if phases and name not in used:
                self.note("check.declared", f"{name!r} is declared, and this run does not do it")

    def remark(self, remark: Remark, *, meant: bool) -> None:
        """A finding of a composition rule."""
        if remark.level == "allowed":
            return
        if remark.level == "must be declared" and meant:
            self.note(remark.where, f"{remark.message} ({remark.rule}, declared)")
            return
        message = f"{remark.message} ({remark.rule}). Way out: {remark.way_out}"
        if remark.level == "note":
            self.note(remark.where, message)
        elif remark.level == "refused":
            self.error(remark.where, message)
        else:
            self.error(
                remark.where,
                f'{message}; or, if it is meant, check.declared = ["{remark.rule}"]',
            )

    def facts(self, phase: Phase, train: _Sample | None) -> RunFacts:
        """What the composition rules read of a phase beside its method."""
        sampler = self.run.config.sampler
        prompts = train.prompts.prompts if train else ()
        return RunFacts(
            temperature=sampler.temperature,
            top_p=sampler.top_p,
            top_k=sampler.top_k,
            samples_per_prompt=sampler.samples_per_prompt,
            max_new_tokens=sampler.max_new_tokens,
            updates_per_rollout=phase.updates_per_rollout,
            steps=phase.steps,
            longest_response=max((len(p.response_ids or ()) for p in prompts), default=0),
        )

    def learning_rates(self, phases: tuple[Phase, ...], student: ModelFacts) -> None:
        lora = bool(self.run.config.student.lora.r)
        for phase in phases:
            where, rate = f"{phase.name}.learning_rate", phase.optimizer.learning_rate
            if rate == 0:
                self.note(where, "0: nothing is learned")
            if student.parameters > LARGE_MODEL and not lora and rate > FULL_RATE:
                self.note(where, f"{rate:g} is high for all weights of a pretrained model")
            if lora and 0 < rate < ADAPTER_RATE:
                self.note(where, f"{rate:g} is low for an adapter, which starts from nothing")
            terms = phase.method.objective.terms
            scored = all(isinstance(term, Sampled) for term in terms)
            if scored and phase.method.states.student and rate >= SCORE_RATE:
                self.note(
                    where,
                    f"{rate:g} is high for {phase.method.name}: a score of sampled tokens is "
                    "noisier than a divergence; try a tenth",
                )
            if 0 < phase.steps <= phase.optimizer.lr_warmup_steps:
                self.note(
                    f"{phase.name}.lr_warmup_steps",
                    f"{phase.optimizer.lr_warmup_steps} is no less than the {phase.steps} steps: "
                    "the learning rate only rises",
                )

    def disk(self, student: ModelFacts, phases: tuple[Phase, ...]) -> None:
        config = self.run.config
        trained = trainable_parameters(config, student) * student.item_bytes
        kept = trained if config.student.lora.r else student.bytes
        views = phases[-1].plan.views if phases else ()
        averaged = sum(view.source == "ema_student" for view in views)
        averages = averaged * trainable_parameters(config, student) * max(4, student.item_bytes)
        one = kept + 2 * trained + averages
        needed = (config.train.keep + 2) * one + student.bytes
        folder = Path(config.output).absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            self.error(
                "output",
                f"checkpoints and model take about {needed / 1e9:.1f} GB, and {folder} has "
                f"{free / 1e9:.1f} GB left; lower train.keep, or choose another --output",
            )

    def estimate(
        self,
        device: torch.device,
        phase: Phase,
        student: ModelFacts,
        teacher: ModelFacts | None,
        longest: int,
        others: Mapping[str, ModelFacts],
    ) -> None:
        config = self.run.config
        prompt_tokens = longest or config.data.max_prompt_tokens
        self.memory = memory_parts(config, phase, student, teacher, prompt_tokens, device, others)
        total = sum(part.bytes for part in self.memory)
        available = available_bytes(device)
        if available and total > available:
            self.note(
                "train.max_tokens",
                f"about {total / 1e9:.1f} GB are needed, and the device has "
                f"{available / 1e9:.1f} GB; the table shows which knob helps",
            )


def _keys_of_formulas(method: Method) -> Iterator[tuple[str, Bound]]:
    """Every formula at either end of its schedules, with its key in a custom objective."""
    for objective in method.objective.at_ends():
        for number, (label, term) in enumerate(objective.labelled()):
            for inside, part in parts(label, term):
                source = "" if inside == label else ".source"
                for place, bound in part.slots():
                    slot, _, nth = place.partition(".")
                    key = f"method.objective.terms[{number}]{source}.{slot}"
                    yield (f"{key}[{nth}]" if nth else key), bound


def _is_task(source: str) -> bool:
    return source.startswith(TASK_PREFIX)


def _is_hub_id(text: str, path: Path) -> bool:
    return text.count("/") == 1 and not path.suffix and not path.parent.is_dir()

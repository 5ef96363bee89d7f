"""The loop: sample, score, signal, update, measure, save, evaluate. Read it top to bottom."""

from __future__ import annotations

import json
import math
import resource
import signal as signals
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from opd.catalog import alarms as known_alarms
from opd.critic import Critic
from opd.diagnose import monitors
from opd.diagnose.alarms import History, Raised, raised
from opd.diagnose.records import Gathered, TokenRecords, free_fields, texts_of
from opd.errors import AlarmError, OpdError, TrainingError
from opd.models import save_model
from opd.objective import Method, Objective
from opd.rollout.pack import pack_rollout
from opd.teacher.self_teacher import AverageTeacher
from opd.training import by_route, conflict, privilege
from opd.training import step as steps
from opd.training.checkpoint import (
    STUDENT,
    Checkpoint,
    checkpoint_name,
    restore_student,
    save_checkpoint,
)
from opd.training.config import Run, to_json, to_toml
from opd.training.conflict import Rivals
from opd.training.draw import Text, Writers
from opd.training.evaluate import Evaluation, evaluate
from opd.training.folder import (
    RunFolder,
    append_line,
    check_name,
    create_folder,
    disk_advice,
    plain,
    whole_folder,
    write_text,
)
from opd.training.look import look, why_not
from opd.training.optim import Anchor, clip, learning_rate, make_optimizer, set_learning_rate
from opd.training.plan import Plan
from opd.training.reference import freeze_reference, start_averages
from opd.training.resume import FINISHED, check_revisions, last_checkpoint
from opd.training.session import Phase, Session, open_session, sampler_settings
from opd.training.sources import check_sources, copy_sources, find_sources
from opd.training.trackers import Trackers
from opd.training.values import Lesson, learn, make_critic, value_states
from opd.types import (
    Batch,
    FieldKey,
    Rollout,
    Sampler,
    Stat,
    with_parts,
)

CRITIC_SEED = 3_000_017
"""Added to the run's seed: the critic draws from a stream of its own."""
LOWERED = 0.5
"""What an alarm that lowers the learning rate leaves of it."""
INTERRUPTED = "interrupted"
LEFT = "the caller asked for no further step"


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        phase: `warmup` or `train`.
        step: steps done in the phase, this one included; 0 for the evaluation before the first.
        steps: of the phase.
        metrics: (sum, count) by path-like name.
        seconds: wall-clock time by part of the step.
        tokens: response tokens of the rollout batch.
        evaluation: the validation after this step, if there was one.
        folder: the run folder.
        summary: of the whole run, with the last report only.
        notes: what is worth knowing now and not only at the end.
        alarms: those that begin with this step, in words.
    """

    phase: str
    step: int
    steps: int
    metrics: Mapping[str, Stat]
    seconds: Mapping[str, float]
    tokens: int
    folder: Path
    evaluation: Evaluation | None = None
    summary: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()


@dataclass
class Progress:
    """The part of a run's state that is neither weights nor optimizer.

    Attributes:
        stats: the latest metrics.
        totals: of several teachers, their metrics over the phase.
        notes: what the run has come to know, for its summary.
        history: of the distillation, what alarms read: the fields of a `History`.
        alarms: those that were given, by name: `first_step`, `steps`, `value`, `threshold`.
        rate: of the learning rate, the part that alarms have left.
    """

    phase: int = 0
    step: int = 0
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    schedule: Any = None
    stats: dict[str, list[float]] = field(default_factory=dict)
    totals: dict[str, list[float]] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    history: dict[str, Any] = field(default_factory=dict)
    alarms: dict[str, dict[str, Any]] = field(default_factory=dict)
    rate: float = 1.0


def train_run(
    run: Run, *, resume: str | Path | None = None, session: Session | None = None
) -> Iterator[StepReport]:
    """Run the phases of a run file, one report per step.

    Ctrl-C finishes the step and saves before `KeyboardInterrupt` reaches the caller; a second one
    stops at once. However a run stops, `summary.json` says why in `exit_reason` and the last
    checkpoint is intact; only a kill leaves no word.

    Args:
        resume: a run folder to continue from its last checkpoint, to the same end as if it had
            never stopped.
        session: live parts, for callers that hold models already.

    Raises:
        ConfigError: a checkpoint of another config, or a folder that cannot be resumed: no run
            folder, a finished run, a user's function that has changed.
        TrainingError: non-finite numbers, no memory, no disk; the last checkpoint is intact.
    """
    folder, checkpoint = None, None
    if resume is None:
        check_name(run.config.output, run.config.name)
    else:
        folder = RunFolder(Path(resume))
        checkpoint = last_checkpoint(folder, run)
    session = session or open_session(run)
    sources = find_sources(session)
    if folder is None:
        folder = _begin_folder(run, sources)
    else:
        check_sources(folder, sources)
        folder.clear_leftovers()
    trackers = Trackers(run.config.log.trackers, folder.path, json.loads(to_json(run.config)))
    trainer = _Trainer(session, folder, trackers)
    if checkpoint is not None:
        check_revisions(folder, checkpoint, session.opened.revisions)
        trainer.restore(checkpoint)
    else:
        folder.truncate({})
    with trackers, closing(session.opened), _exit_reason(trainer):
        with _finish_step_on_interrupt() as interrupted:
            for number, phase in enumerate(session.phases):
                if number < trainer.progress.phase:
                    continue
                trainer.enter(number, phase)
                while not trainer.is_done(phase):
                    report = trainer.advance(phase)
                    if trainer.saves(phase) or interrupted() or trainer.stopped_by:
                        trainer.save(phase)
                    yield report
                    if trainer.stopped_by:
                        raise trainer.alarm_error()
                    if interrupted():
                        trainer.save(phase)
                        raise KeyboardInterrupt
        yield trainer.finish()


class _Trainer:
    """One run in progress: its live parts, its folder and its state."""

    def __init__(self, session: Session, folder: RunFolder, trackers: Trackers) -> None:
        self.session = session
        self.folder = folder
        self.trackers = trackers
        self.progress = Progress()
        self.writers = Writers(session)
        self.records = _open_records(session, folder)
        self.optimizer: torch.optim.Optimizer | None = None
        self.averages: Mapping[str, AverageTeacher] = {}
        self.anchor: Anchor | None = None
        self.critic: Critic | None = None
        self.critic_generator = torch.Generator().manual_seed(session.config.seed + CRITIC_SEED)
        self.stopped_by = ""
        self._restored: Checkpoint | None = None
        self._started = time.perf_counter()

    # -- state -------------------------------------------------------------------------------

    def enter(self, number: int, phase: Phase) -> None:
        """Begin a phase, or continue the one a checkpoint was written in."""
        progress = self.progress
        if number != progress.phase:
            progress.phase, progress.step, progress.updates = number, 0, 0
            progress.schedule, progress.stats, progress.totals = None, {}, {}
            progress.history, progress.rate = {}, 1.0
        if phase.name == "train":
            at_start = progress.step == 0
            freeze_reference(self.session, self.folder.reference, at_start=at_start)
            self.averages = start_averages(self.session)
            if strength := self.session.config.train.anchor:
                self.anchor = Anchor(self.session.student.trainable(), strength)
            if phase.method.objective.critic_term is not None:
                settings, student = self.session.config.critic, self.session.student
                self.critic = make_critic(settings, student, self.critic_generator)
        self.writers.enter(phase)
        self.optimizer = make_optimizer(self.session.student.trainable(), phase.optimizer)
        if self._restored is not None:
            tensors = self._restored.tensors()
            self.optimizer.load_state_dict(tensors["optimizer"])
            for name, average in tensors.get("averages", {}).items():
                self.averages[name].load(average)
            if self.anchor is not None:
                self.anchor.load(tensors["anchor"])
            if self.critic is not None:
                self.critic.load_state_dict(tensors["critic"])
                self.critic_generator.set_state(tensors["critic_generator"])
            self.writers.load_replay(tensors)
            self._restored = None

    def is_done(self, phase: Phase) -> bool:
        """Whether nothing is left to report of the phase."""
        return self.progress.step == phase.steps and not self._starts(phase)

    def advance(self, phase: Phase) -> StepReport:
        """The figures before the first distillation step, or one step."""
        return self.evaluate_start(phase) if self._starts(phase) else self.step(phase)

    def _starts(self, phase: Phase) -> bool:
        return phase.name == "train" and not self.progress.start

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, generators, cursor, logs and counters as they were."""
        restore_student(self.session.student.loaded, checkpoint.path / STUDENT)
        tensors, state = checkpoint.tensors(), checkpoint.state
        self.writers.load_generators(tensors)
        self.writers.stream.load_state(state["stream"])
        self.progress = Progress(**state["progress"])
        self.folder.truncate(state["offsets"])
        self._restored = checkpoint
        self._started = time.perf_counter() - self.progress.seconds

    def save(self, phase: Phase) -> None:
        """Write a checkpoint on this rollout-batch boundary."""
        assert self.optimizer is not None
        progress = self.progress
        self._write_records()
        progress.seconds = time.perf_counter() - self._started
        self.session.opened.caches.flush()
        save_checkpoint(
            self.folder,
            phase=phase.name,
            order=(progress.phase, progress.step),
            student=self.session.student.loaded,
            tensors={
                "optimizer": self.optimizer.state_dict(),
                "averages": {name: teacher.average for name, teacher in self.averages.items()},
                **({"anchor": self.anchor.start} if self.anchor else {}),
                **self._critic_state(),
                **self.writers.tensors(),
            },
            state={
                "config": to_json(self.session.config),
                "stream": self.writers.stream.state(),
                "progress": vars(progress),
                "teachers": self.session.opened.revisions,
                "offsets": self.folder.offsets(),
            },
            keep=self.session.config.train.keep,
            best=progress.best.get("checkpoint"),
        )

    def _critic_state(self) -> dict[str, Any]:
        if self.critic is None:
            return {}
        return {
            "critic": self.critic.state_dict(),
            "critic_generator": self.critic_generator.get_state(),
        }

    def saves(self, phase: Phase) -> bool:
        """Whether a checkpoint is due: every so many steps, at the best so far, at the end."""
        step, every = self.progress.step, self.session.config.train.save_every
        if step == phase.steps:
            return True
        best = phase.name == "train" and self.progress.best.get("step") == step
        return bool(step and every) and (step % every == 0 or best)

    # -- one step ----------------------------------------------------------------------------

    def step(self, phase: Phase) -> StepReport:
        """One rollout batch: sample, score, signal, update, measure."""
        session, progress, clock = self.session, self.progress, _Clock()
        student, max_tokens = session.student, session.max_tokens
        told_before = len(progress.notes)
        # steps in which only a critic learns measure no update, so nothing can be watched yet
        known = progress.stats if progress.updates else {}
        measured = {name: Stat(*pair) for name, pair in known.items()}
        method, progress.schedule = phase.method.at(progress.step, measured, progress.schedule)
        objective = method.objective
        plan = replace(phase.plan, views=with_parts(objective.views(), method.views))

        text = self.writers.write(
            phase, method.states, step=progress.step, version=progress.updates, lap=clock.lap
        )
        rollout = text.rollout
        batch = pack_rollout(
            rollout,
            pad_id=student.loaded.pad_id,
            special_ids=session.special_ids,
            merge_ids=session.merge_ids,
            extra=steps.extra_columns(rollout.prompts, objective),
            device=session.device,
        )
        clock.lap("pack")
        batch = steps.observe(student, batch, rollout, objective, plan, max_tokens)
        clock.lap("observe")
        pad_id = student.loaded.pad_id
        contexts = steps.privileged(rollout, batch, plan, session.context_encoder, pad_id=pad_id)
        entries = session.entries
        with session.turns:
            batch = steps.score(
                session.teachers,
                batch,
                objective,
                plan,
                contexts=contexts,
                entries=entries,
                prompts=rollout.prompts,
            )
        clock.lap("score")
        metrics: dict[str, Stat] = {}
        measured_now: dict[str, Stat] = {}
        told: dict[str, Stat] = {}
        if contexts:
            told = privilege.metrics_of(rollout, contexts, plan.views)
            clock.lap("copied")
        if (rivals := self._rivals_now(phase)) is not None:
            measured_now = conflict.measure(
                rivals, student, batch, objective, plan, max_tokens, contexts=contexts
            )
            clock.lap("conflict")
        if self._looks(phase):
            measured_now |= self._look(method, plan, rollout, batch)
            clock.lap("monitor")
        lesson: Lesson | None = None
        for repeat in range(phase.updates_per_rollout):
            if repeat:
                batch = steps.score(
                    session.teachers,
                    batch,
                    objective,
                    plan,
                    contexts=contexts,
                    entries=entries,
                    prompts=rollout.prompts,
                    again=True,
                )
                clock.lap("score")
            seen: Mapping[FieldKey, Tensor] = {}
            if self.critic is not None:
                valued = value_states(student, batch, objective, self.critic, max_tokens)
                batch, seen = valued.batch, valued.fields
                lesson = lesson or valued.lesson
                if self.critic.warming_up:
                    break
            batch = steps.signal(
                student, batch, objective, plan, max_tokens, fresh=repeat == 0, known=seen
            )
            clock.lap("signal")
            last = repeat == phase.updates_per_rollout - 1
            gathered = self._gathers(phase, batch, objective, watched=last)
            metrics = steps.update(
                student, batch, objective, max_tokens, step=progress.step + 1, gathered=gathered
            )
            metrics |= self._apply(phase, batch, objective)
            clock.lap("update")
            if gathered is not None:
                rows = gathered.joined(len(batch.row_index))
                if last and self.session.config.monitor.on:
                    metrics |= monitors.of_update(rollout, batch, objective, rows)
                    clock.lap("monitor")
                self._record(phase, rollout, batch, objective, rows, update=repeat + 1)
                clock.lap("record")
        if self.critic is not None and lesson is not None:
            metrics |= learn(self.critic, lesson, self.critic_generator)
            clock.lap("critic")
        progress.step += 1
        progress.tokens += int(rollout.lengths.sum())
        metrics |= {**text.metrics, **measured_now, **told}
        progress.stats |= {name: [stat.total, stat.count] for name, stat in metrics.items()}
        # times and what a cache held are told and never watched: they differ in a repetition
        metrics |= steps.teacher_seconds(batch.token.views) | session.opened.caches.stats()
        self._add_up(metrics)
        evaluation = None
        if self._validates(phase):
            evaluation = self._validate(phase)
            metrics |= self._golden(self._evaluate_sets(session.config.monitor.golden))
        clock.lap("evaluate")
        given = self._alarms(phase, metrics)
        self._log(phase, metrics, clock.seconds, text, evaluation)
        begun = self._give(phase, given)
        return StepReport(
            phase.name,
            progress.step,
            phase.steps,
            metrics,
            clock.seconds,
            int(rollout.lengths.sum()),
            self.folder.path,
            evaluation,
            notes=tuple(progress.notes[told_before:]),
            alarms=tuple(begun),
        )

    def _gathers(
        self, phase: Phase, batch: Batch, objective: Objective, *, watched: bool
    ) -> Gathered | None:
        """What receives the by-products of an update; None where nobody reads them.

        Args:
            watched: the update is one that monitors may read.
        """
        if not (watched and self.session.config.monitor.on) and not self._recorded(phase, batch):
            return None
        return Gathered(free_fields(objective, batch))

    def _recorded(self, phase: Phase, batch: Batch) -> bool:
        """Whether any response of the step is recorded."""
        if self.records is None:
            return False
        sequences = len(batch.token.tokens)
        return bool(len(self.records.chosen(phase.name, self.progress.step + 1, sequences)))

    def _record(
        self,
        phase: Phase,
        rollout: Rollout,
        batch: Batch,
        objective: Objective,
        rows: Mapping[str, Tensor],
        *,
        update: int,
    ) -> None:
        """Append the recorded responses of an update, if there are any."""
        if not self._recorded(phase, batch):
            return
        assert self.records is not None
        with disk_advice(self.folder.tokens):
            self.records.add(
                rollout,
                batch,
                objective,
                rows,
                phase=phase.name,
                step=self.progress.step + 1,
                update=update,
            )

    def _looks(self, phase: Phase) -> bool:
        """Whether whole distributions are looked at in this step, before its first update."""
        settings = self.session.config.monitor
        due = settings.on and settings.every and self.progress.step % settings.every == 0
        return bool(due) and phase.name == "train"

    def _look(self, method: Method, plan: Plan, rollout: Rollout, batch: Batch) -> dict[str, Stat]:
        """A look at a few responses; where none can be taken, a note says why."""
        reason = why_not(self.session, method, plan, batch)
        if reason is None:
            responses = self.session.config.monitor.responses
            return look(self.session, method, plan, rollout, batch, responses)
        note = f"no distributions are looked at: {reason}"
        if reason and note not in self.progress.notes:
            self.progress.notes.append(note)
        return {}

    # -- alarms ------------------------------------------------------------------------------

    def _alarms(self, phase: Phase, metrics: Mapping[str, Stat]) -> list[Raised]:
        """The alarms of this step, from what it and those before it have measured."""
        settings = self.session.config.monitor
        if not settings.on or phase.name != "train":
            return []
        history = History(**self.progress.history)
        before = self._golden(self.progress.start.get("sets", {}))
        history.add({name: stat for name, stat in before.items() if name not in history.seen})
        history.add(metrics)
        self.progress.history = vars(history)
        routed = ("conflicting_teachers",) if self.session.router is not None else ()
        return raised(history, (*settings.off, *routed))

    def _give(self, phase: Phase, given: Sequence[Raised]) -> list[str]:
        """Write and count the alarms of a step, and do what they are to do; those that begin."""
        progress, begun = self.progress, []
        for alarm in given:
            told = {"value": alarm.value, "threshold": alarm.threshold}
            place = {"phase": phase.name, "step": progress.step}
            append_line(self.folder.events, {"alarm": alarm.name, **place, **told})
            if alarm.name not in progress.alarms:
                begun.append(_alarm_in_words(alarm))
                progress.alarms[alarm.name] = {"first_step": progress.step, "steps": 0}
            self._act(alarm.name)
            known = progress.alarms[alarm.name]
            progress.alarms[alarm.name] = known | {"steps": known["steps"] + 1} | told
            if self._does(alarm.name) == "stop":
                self.stopped_by = self.stopped_by or alarm.name
        return begun

    def _does(self, name: str) -> str:
        """What an alarm does."""
        settings = self.session.config.monitor
        return settings.on_alarm if settings.on_alarm != "act" else settings.act.get(name, "log")

    def _act(self, name: str) -> None:
        """What an alarm does once, when it is given and is to do it."""
        known = self.progress.alarms[name]
        if self._does(name) == "lower_rate" and "lowered_at" not in known:
            self.progress.rate *= LOWERED
            step = self.progress.step
            known["lowered_at"] = step
            self.progress.notes.append(
                f"the alarm {name} has halved the learning rate after step {step}"
            )

    def alarm_error(self) -> AlarmError:
        """The end of a run that an alarm stops."""
        name = self.stopped_by
        told = self.progress.alarms[name]
        alarm = Raised(name, told["value"], told["threshold"])
        acts = self.session.config.monitor.on_alarm == "act"
        setting = f"act.{name}" if acts else "on_alarm"
        return AlarmError(
            f"step {self.progress.step}: the alarm {_alarm_in_words(alarm)}. A checkpoint is "
            f"written; go on all the same with `opd run --resume {self.folder.path} "
            f"--monitor.{setting} log`",
            name,
        )

    def _write_records(self) -> None:
        """Write the rows that are held back until they fill a part."""
        if self.records is not None:
            with disk_advice(self.folder.tokens):
                self.records.flush()

    def _rivals_now(self, phase: Phase) -> Rivals | None:
        """The teachers whose conflict is measured in this step, before its first update."""
        every = self.session.config.teacher.conflict_every
        due = phase.name == "train" and every and self.progress.step % every == 0
        return self.session.rivals if due else None

    def _add_up(self, metrics: Mapping[str, Stat]) -> None:
        """What is known of each of several teachers, over the phase."""
        for name, stat in metrics.items():
            about_context = name.rpartition("/")[2] in privilege.METRICS
            if name.startswith("teacher/") and name.count("/") > 1 and not about_context:
                total, count = self.progress.totals.get(name, (0.0, 0.0))
                self.progress.totals[name] = [total + stat.total, count + stat.count]

    def _sampler(self, who: str) -> Sampler:
        session = self.session
        sampler = session.student_sampler if who == "student" else session.teacher_sampler
        assert sampler is not None
        return sampler

    def _apply(self, phase: Phase, batch: Batch, objective: Objective) -> dict[str, Stat]:
        """One optimizer step on the accumulated gradient of `objective` over `batch`."""
        assert self.optimizer is not None
        parameters = self.session.student.trainable()
        norm = clip(parameters, phase.optimizer.clip_norm)
        if not math.isfinite(norm):
            session = self.session
            term = steps.blame_gradient(session.student, batch, objective, session.max_tokens)
            raise TrainingError(
                f"step {self.progress.step + 1}: the gradient of {term} is not finite; it was not "
                "applied, and the last checkpoint is intact. A formula of finite value can have a "
                "derivative that is not (a square root at 0): mend it, or lower "
                "train.learning_rate"
            )
        without = self.session.config.critic.warmup_steps if self.critic is not None else 0
        total = (phase.steps - without) * phase.updates_per_rollout
        rate = learning_rate(phase.optimizer, self.progress.updates, total) * self.progress.rate
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {
            "optimizer/grad_norm": Stat(norm, 1.0),
            "optimizer/learning_rate": Stat(rate, 1.0),
        }
        if self.anchor is not None and phase.name == "train":
            metrics["optimizer/anchor_distance"] = Stat(self.anchor.pull(parameters, rate), 1.0)
        for teacher in self.averages.values():
            teacher.update()
        self.progress.updates += 1
        return metrics

    # -- measuring ---------------------------------------------------------------------------

    def _validates(self, phase: Phase) -> bool:
        every = self.session.config.evaluate.every
        step = self.progress.step
        return phase.name == "train" and bool(every) and (step % every == 0 or step == phase.steps)

    def _validate(self, phase: Phase) -> Evaluation:
        """Held-out accuracy; remembers the best checkpoint's step."""
        result = self._evaluate("student", self.session.validation.prompts)
        best = self.progress.best
        if self.session.verifier and result.accuracy.value > best.get("value", -1.0):
            step = self.progress.step
            self.progress.best = {
                "value": result.accuracy.value,
                "step": step,
                "checkpoint": checkpoint_name(phase.name, step),
            }
        return result

    def _evaluate(
        self, who: str | Sampler, prompts: Any, measured: privilege.Measured | None = None
    ) -> Evaluation:
        session = self.session
        if who == "student" and measured is None and session.held_out is not None:
            measured = session.held_out.copying
        return evaluate(
            self._sampler(who) if isinstance(who, str) else who,
            prompts,
            measured=measured,
            verifier=session.verifier,
            tokenizer=session.tokenizer,
            settings=sampler_settings(session.config),
            seed=session.config.seed,
            max_sequences=session.config.sampler.max_sequences,
        )

    def _evaluate_sets(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """The student's accuracy on every named set, or on these."""
        return {
            name: self._evaluate("student", prompts.prompts).accuracy.as_dict()
            for name, prompts in self.session.sets.items()
            if names is None or name in names
        }

    def _golden(self, sets: Mapping[str, Any]) -> dict[str, Stat]:
        """What is watched of the sets that the student must not unlearn."""
        golden = self.session.config.monitor.golden
        return {
            f"golden/{name}/accuracy": Stat(score["value"] * score["n"], float(score["n"]))
            for name, score in sets.items()
            if name in golden
        }

    def _evaluate_privilege(self, test: Evaluation) -> dict[str, Any]:
        """By view with a context: what the answers to the test prompts copy of it, and the student
        that reads it."""
        held_out = self.session.held_out
        found: dict[str, dict[str, Any]] = {}
        for view in held_out.views if held_out else ():
            assert held_out is not None
            found[view.name] = {**privilege.copied_in(view, test.metrics)}
            if self.session.config.evaluate.privileged:
                prompts, copying = held_out.told(view, self.session.test.prompts)
                answers = self._evaluate("student", prompts, copying)
                reading = answers.accuracy.as_dict() | privilege.copied_in(view, answers.metrics)
                found[view.name]["reading"] = reading
        return found

    def evaluate_start(self, phase: Phase) -> StepReport:
        """Figures before the first distillation step: student, and teacher if there is one."""
        session, clock = self.session, _Clock()
        validation = self._evaluate("student", session.validation.prompts)
        test = self._evaluate("student", session.test.prompts)
        start: dict[str, Any] = {
            "validation": validation.accuracy.as_dict(),
            "student": test.accuracy.as_dict(),
            "responses": list(test.responses[:8]),
            "verdicts": list(test.scores[:8]),
            "sets": self._evaluate_sets(),
            "privilege": self._evaluate_privilege(test),
        }
        if session.teacher_sampler is not None and session.config.evaluate.teacher:
            teacher = self._evaluate("teacher", session.test.prompts)
            start["teacher"] = teacher.accuracy.as_dict()
            start["teacher_responses"] = list(teacher.responses[:8])
            start["teacher_verdicts"] = list(teacher.scores[:8])
        notes = self._routes_at_start(start, test) if session.router is not None else []
        self.progress.start = start
        golden = self._golden(start["sets"])
        clock.lap("evaluate")
        event: dict[str, Any] = {"phase": phase.name, "step": 0, "evaluation": start}
        if golden:
            event["metrics"] = {name: [stat.total, stat.count] for name, stat in golden.items()}
        append_line(self.folder.events, event | {"seconds": clock.seconds})
        self._track(phase, {}, validation)
        return StepReport(
            phase.name,
            0,
            phase.steps,
            golden,
            clock.seconds,
            0,
            self.folder.path,
            validation,
            notes=tuple(notes),
        )

    def _routes_at_start(self, start: dict[str, Any], test: Evaluation) -> list[str]:
        """Adds how each route begins, and what its teacher knows of it; notes on who knows less."""
        session, prompts = self.session, self.session.test.prompts
        assert session.router is not None
        if session.verifier is None:
            return []
        start["routes"] = by_route.accuracy_by_route(session.router, prompts, test.scores)
        known: list[dict[str, Any]] = []
        routes = by_route.routes_of(session.router, prompts)
        for name, sampler in session.teacher_samplers.items():
            own = [
                p for p, route in zip(prompts, routes, strict=True) if route and route[1] == name
            ]
            if own and session.config.evaluate.teacher:
                found = self._evaluate(sampler, own)
                known += by_route.accuracy_by_route(session.router, own, found.scores)
        start["route_teachers"] = known
        return by_route.worse_teachers(start["routes"], known)

    def finish(self) -> StepReport:
        """Final figures, the model folder, the summary and the picture."""
        from opd.training.curves import draw_curves

        session, clock = self.session, _Clock()
        test = self._evaluate("student", session.test.prompts)
        sets = self._evaluate_sets()
        privileged = self._evaluate_privilege(test)
        with whole_folder(self.folder.model) as temporary:
            save_model(
                session.student.loaded,
                temporary,
                merge_lora=session.config.student.lora.merge,
                dtype=session.config.student.save_dtype,
            )
        for row in range(min(8, len(test.responses))):
            prompt = session.test.prompts[row]
            append_line(
                self.folder.samples,
                {
                    "split": "test",
                    "prompt": prompt.text,
                    "start": _at(self.progress.start.get("responses"), row),
                    "end": test.responses[row],
                    "teacher": _at(self.progress.start.get("teacher_responses"), row),
                    "verdict": test.scores[row],
                    "start_verdict": _at(self.progress.start.get("verdicts"), row),
                    "teacher_verdict": _at(self.progress.start.get("teacher_verdicts"), row),
                },
            )
        summary = self._summary(FINISHED, test, sets, privileged)
        draw_curves(self.folder, summary)
        self._write_summary(summary)  # last: from now on the run is finished
        clock.lap("evaluate")
        phase = session.phases[-1]
        return StepReport(
            phase.name,
            phase.steps,
            phase.steps,
            {},
            clock.seconds,
            0,
            self.folder.path,
            test,
            summary,
        )

    def summarise_early(self, reason: str) -> None:
        """Say in summary.json why the run stopped, where the disk still takes it.

        The token records up to then are written too: they may show why.
        """
        with suppress(OpdError, OSError):
            self._write_records()
        with suppress(OpdError, OSError):
            self._write_summary(self._summary(reason))

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        write_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")

    def _summary(
        self,
        reason: str,
        final: Evaluation | None = None,
        sets: Mapping[str, Any] | None = None,
        privileged: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        progress = self.progress
        start = progress.start.get("student")
        end = final.accuracy.as_dict() if final else None
        gain = end["value"] - start["value"] if start and end else None
        summary: dict[str, Any] = {
            "start_accuracy": start,
            "final_accuracy": end,
            "teacher_accuracy": progress.start.get("teacher"),
            "gain": gain,
            "seconds": time.perf_counter() - self._started,
            "tokens": progress.tokens,
            "peak_mb": peak_mb(),
            "exit_reason": reason,
            "method": self.session.phases[-1].method.name,
            "composition_hash": self.session.phases[-1].method.composition_hash,
            "terms": self._terms(),
            "best": self._best(),
            "sets": {"start": progress.start.get("sets", {}), "final": sets or {}},
            "privilege": {"start": progress.start.get("privilege", {}), "final": privileged or {}},
            "teachers": self._teachers(final),
            "alarms": {
                name: told | {"what_to_do": known_alarms()[name].action}
                for name, told in progress.alarms.items()
            },
            "notes": self.session.notes,
        }
        routes = summary["teachers"].get("routes", [])
        start_routes = progress.start.get("routes", [])
        summary["notes"] = [
            *self.session.notes,
            *progress.notes,
            *by_route.worse_teachers(start_routes, progress.start.get("route_teachers", [])),
            *by_route.fallen_routes(routes),
        ]
        figures: dict[str, Any] = plain(summary)
        return figures

    def _teachers(self, final: Evaluation | None) -> dict[str, Any]:
        """What is known of several teachers: each by name, every two, and every route."""
        found = summary_of_teachers(self.progress.totals, self.progress.stats)
        router, start = self.session.router, self.progress.start
        if router is not None and final is not None and "routes" in start:
            end = by_route.accuracy_by_route(router, self.session.test.prompts, final.scores)
            found["routes"] = by_route.compared(start["routes"], end, start["route_teachers"])
        return found

    def _terms(self) -> dict[str, str]:
        """What each term's loss is, by the label in metrics."""
        return {
            label: next(iter(term.slots()))[1].short_name.replace("_", " ")
            for label, term in self.session.phases[-1].method.objective.labelled()
        }

    def _best(self) -> dict[str, Any] | None:
        """The best validation, and its checkpoint where there is one (`save_every` > 0)."""
        best = dict(self.progress.best)
        if best and not (self.folder.checkpoints / best["checkpoint"]).exists():
            best["checkpoint"] = None
        return best or None

    def _log(
        self,
        phase: Phase,
        metrics: Mapping[str, Stat],
        seconds: Mapping[str, float],
        text: Text,
        evaluation: Evaluation | None,
    ) -> None:
        event: dict[str, Any] = {
            "phase": phase.name,
            "step": self.progress.step,
            "metrics": {name: [stat.total, stat.count] for name, stat in metrics.items()},
            "seconds": dict(seconds),
            "tokens": self.progress.tokens,
        }
        if phase.plan.mismatch and phase.method.states.student:
            event["sampler_differs"] = list(phase.plan.mismatch)
        if evaluation is not None:
            event["evaluation"] = {"validation": evaluation.accuracy.as_dict()}
            if evaluation.metrics:
                found = {name: stat.mean for name, stat in evaluation.metrics.items()}
                event["evaluation"]["metrics"] = found
        append_line(self.folder.events, event)
        self._track(phase, metrics, evaluation)
        rollout = text.rollout
        for row in range(min(self.session.config.log.samples_per_step, len(text.shown))):
            append_line(
                self.folder.samples,
                {
                    "phase": phase.name,
                    "step": self.progress.step,
                    "prompt": rollout.prompts[row].text,
                    "response": text.shown[row],
                    "verdict": float(rollout.verdict[row]),
                    "stop_reason": rollout.stop_reason[row],
                },
            )

    def _track(
        self, phase: Phase, metrics: Mapping[str, Stat], evaluation: Evaluation | None
    ) -> None:
        """Averages to the trackers, at a step counted over all phases."""
        values = {f"{phase.name}/{name}": stat.mean for name, stat in metrics.items()}
        if evaluation is not None and self.session.verifier:
            values[f"{phase.name}/validation/accuracy"] = evaluation.accuracy.value
        before = sum(earlier.steps for earlier in self.session.phases[: self.progress.phase])
        self.trackers.log(values, before + self.progress.step)


def summary_of_teachers(
    totals: Mapping[str, Sequence[float]], latest: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """`models`: share, log-ratio and seconds a step by name; `conflict`: a row for every two."""
    models: dict[str, dict[str, float]] = {}
    pairs: dict[str, dict[str, Any]] = {}
    for metric, (total, count) in totals.items():
        _, name, what = metric.split("/", 2)
        if "|" not in name:
            models.setdefault(name, {})[what] = total / count if count else math.nan
    for metric, (total, count) in latest.items():
        if not (metric.startswith("teacher/") and "|" in metric) or not count:
            continue
        _, pair, what = metric.split("/", 2)
        one, other = pair.split("|")
        swapped = f"{other}|{one}" in pairs
        row = pairs.setdefault(
            f"{other}|{one}" if swapped else pair, {"first": one, "second": other}
        )
        mean_total, mean_count = totals[metric]
        name = f"{what}_back" if swapped else what
        row[name] = mean_total / mean_count
        row[f"last_{name}"] = total / count
    return {
        **({"models": models} if models else {}),
        **({"conflict": list(pairs.values())} if pairs else {}),
    }


def _open_records(session: Session, folder: RunFolder) -> TokenRecords | None:
    """What writes the token records; None where none are asked for."""
    config = session.config
    if not config.log.token_share:
        return None
    return TokenRecords(
        folder.tokens,
        share=config.log.token_share,
        seed=config.seed,
        text_of=texts_of(session.tokenizer),
    )


class _Clock:
    """Wall-clock seconds by part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def peak_mb() -> float:
    """Highest memory of the process so far, in MB; on CUDA, of the device."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


@contextmanager
def _finish_step_on_interrupt() -> Iterator[Any]:
    """The first Ctrl-C asks to stop after the step; the second stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signals.signal(signals.SIGINT, before)

    try:
        before = signals.signal(signals.SIGINT, ask)
    except ValueError:  # not in the main thread: the caller's handler stays
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signals.signal(signals.SIGINT, before)


@contextmanager
def _exit_reason(trainer: _Trainer) -> Iterator[None]:
    """Leave a word in summary.json when the run stops before its end."""
    try:
        yield
    except KeyboardInterrupt:
        trainer.summarise_early(INTERRUPTED)
        raise
    except GeneratorExit:
        trainer.summarise_early(LEFT)
        raise
    except AlarmError as error:
        trainer.summarise_early(f"alarm: {error.alarm}")
        raise
    except Exception as error:
        name = "" if isinstance(error, OpdError) else f"{type(error).__name__}: "
        trainer.summarise_early(f"error: {name}{error}")
        raise


def _begin_folder(run: Run, sources: Sequence[Path]) -> RunFolder:
    """A new run folder, which from its first instant holds all that repeats the run."""

    def fill(folder: RunFolder) -> None:
        copy_sources(folder, sources)
        write_text(folder.config, to_toml(run.config) + _base_folder(run))

    return create_folder(run.config.output, run.config.name, run.config.data.prompts, fill)


def _base_folder(run: Run) -> str:
    return (
        f"\n# relative paths above start here\n[paths]\nbase_folder = {json.dumps(str(run.base))}\n"
    )


def _alarm_in_words(alarm: Raised) -> str:
    known = known_alarms()[alarm.name]
    says = f"{alarm.name} ({alarm.value:.3g}, given {known.side} {alarm.threshold:g})"
    return f"{says}: {known.says} {known.action}"


def _at(values: list[Any] | None, place: int) -> Any:
    return values[place] if values and place < len(values) else None

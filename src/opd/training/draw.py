"""Who writes the text of a step: student, data, teacher, a buffer, or several of them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd.rollout.edit import continued, cut, put, take, to_rewrite
from opd.rollout.local import LocalSampler
from opd.rollout.mixed import MixedSampler
from opd.rollout.pack import merge_rollouts
from opd.rollout.replay import ReplayBuffer
from opd.schedule import Schedule
from opd.training import step as steps
from opd.training.evaluate import verify_rollout
from opd.training.plan import horizon_within
from opd.training.session import Phase, Session, positions
from opd.types import Prompt, Provenance, Rollout, Sampler, SamplerSettings, Stat, StateSource

REPLAY_SEED = 2_000_003
"""Added to the run's seed for the draws from the buffer."""


@dataclass(frozen=True)
class Text:
    """The responses of one step.

    Attributes:
        shown: decoded responses of the first sequences, in their order.
        metrics: what is known of who wrote them.
    """

    rollout: Rollout
    shown: list[str]
    metrics: Mapping[str, Stat]


class Writers:
    """Draws the responses of every step, and holds what that needs: cursor, generators, buffer."""

    def __init__(self, session: Session) -> None:
        seed = session.config.seed
        self._session = session
        self.stream = session.stream(seed)
        self.generators = {
            "student": torch.Generator().manual_seed(seed),
            "teacher": torch.Generator().manual_seed(seed + 1_000_003),
        }
        self._replay: ReplayBuffer | None = None
        self._mixed: MixedSampler | None = None

    # -- state -------------------------------------------------------------------------------

    def enter(self, phase: Phase) -> None:
        """Begin a phase: with an empty buffer, if its method replays."""
        session, states = self._session, phase.method.states
        self._replay = (
            ReplayBuffer(states.replay_steps, seed=session.config.seed + REPLAY_SEED)
            if states.replay
            else None
        )
        if states.interleave or "mixture" in states.helped:
            student, teacher = session.student_sampler, session.teacher_sampler
            assert isinstance(student, LocalSampler)
            assert isinstance(teacher, LocalSampler)
            self._mixed = MixedSampler(student, teacher, interleave=states.interleave)

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the cursor."""
        kept: dict[str, Any] = {
            "generators": {name: each.get_state() for name, each in self.generators.items()}
        }
        if self._replay is not None:
            kept["replay"] = self._replay.state()
        return kept

    def load_generators(self, tensors: Mapping[str, Any]) -> None:
        """The generators as `tensors` told."""
        for name, generator in self.generators.items():
            generator.set_state(tensors["generators"][name])

    def load_replay(self, tensors: Mapping[str, Any]) -> None:
        """The buffer of the phase as `tensors` told."""
        if self._replay is not None:
            self._replay.load_state(tensors["replay"], self._prompts_at)

    def _prompts_at(self, start: int, count: int) -> list[Prompt]:
        stream = self._session.stream(self._session.config.seed)
        stream.position = start
        return stream.take(count, with_responses=False)

    # -- one step ----------------------------------------------------------------------------

    def write(
        self,
        phase: Phase,
        states: StateSource,
        *,
        step: int,
        version: int,
        lap: Callable[[str], None],
    ) -> Text:
        """Responses of a step, each source writing its share.

        Args:
            states: of the phase's method, its schedules settled.
            step: of the phase, 0 the first.
            version: optimizer steps the student has seen.
            lap: is told what has been done.
        """
        session = self._session
        shares = (states.student, states.data, states.teacher, states.replay)
        by_student, by_data, _, again = steps.share_out(phase.prompts_per_step, shares, step)
        replayed = self._replayed(again, step)
        missing = again - sum(len(set(part.group.tolist())) for part in replayed)
        by_student += missing
        start = self.stream.position
        count = phase.prompts_per_step - again + missing
        prompts = self.stream.take(count, with_responses=states.data > 0) if count else []
        own, rest = prompts[:by_student], prompts[by_student:]
        from_data, from_teacher = rest[:by_data], rest[by_data:]
        settings = phase.plan.sampler
        limit = horizon_within(settings.max_new_tokens, _now(states.horizon))
        settings = replace(settings, max_new_tokens=limit)
        with session.student.for_generation():
            parts = self._by_student(own, settings, states, version)
        if from_data:
            written = steps.rollout_from_data(from_data)
            parts.append(cut(written, limit) if states.horizon else written)
        parts += self._by_teacher(from_teacher, settings)
        lap("sample")
        shown: list[str] = []
        metrics: dict[str, Stat] = {}
        if parts:
            rollout = merge_rollouts(parts, pad_id=session.student.loaded.pad_id)
            if by_student:
                rollout, shown = self._verified(rollout)
                lap("verify")
            rows = range(by_student * settings.samples_per_prompt)
            metrics = _accuracy(rollout, rows)
            if states.rewrite and by_student:
                rollout, shown, rewritten = self._rewritten(rollout, shown, rows, settings, states)
                metrics |= rewritten
                lap("rewrite")
            if self._replay is not None and by_student:
                self._replay.add(take(rollout, rows), step=step, start=start)
            parts = [rollout]
        rollout = merge_rollouts([*parts, *replayed], pad_id=session.student.loaded.pad_id)
        metrics |= _lengths(rollout) | _writers(rollout, states, replayed, limit, version)
        return Text(rollout, shown, metrics)

    def _replayed(self, prompts: int, step: int) -> list[Rollout]:
        if self._replay is None:
            return []
        self._replay.forget(step)
        return self._replay.draw(prompts)

    def _by_student(
        self,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        states: StateSource,
        version: int,
    ) -> list[Rollout]:
        """The student's sequences, with the teacher's part in them."""
        sampler: Sampler = self._session.student_sampler
        if self._mixed is not None:
            sampler = self._mixed.with_mixture(_now(states.mixture))

        def write(prompts: Sequence[Prompt], settings: SamplerSettings) -> list[Rollout]:
            return self._sample(sampler, "student", prompts, settings, version)

        prefix = int(_now(states.teacher_prefix))
        if not prefix or not prompts:
            return write(prompts, settings)
        begun = merge_rollouts(
            self._by_teacher(prompts, replace(settings, max_new_tokens=prefix)),
            pad_id=self._session.student.loaded.pad_id,
        )
        unfinished = [row for row, reason in enumerate(begun.stop_reason) if reason == "length"]
        if not unfinished:
            return [begun]
        finished = continued(
            take(begun, unfinished),
            [prefix] * len(unfinished),
            write,
            settings,
            tokenizer=self._session.tokenizer,
        )
        return [put(begun, unfinished, finished)]

    def _by_teacher(self, prompts: Sequence[Prompt], settings: SamplerSettings) -> list[Rollout]:
        if not prompts:
            return []
        sampler = self._session.teacher_sampler
        assert sampler is not None
        return self._sample(sampler, "teacher", prompts, replace(settings, student_top_k=0), 0)

    def _sample(
        self,
        sampler: Sampler,
        who: str,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        version: int,
    ) -> list[Rollout]:
        """Responses to the prompts, at most `sampler.max_sequences` at once."""
        at_once = self._session.config.sampler.max_sequences
        per_call = max(1, at_once // settings.samples_per_prompt)
        return [
            sampler.sample(
                prompts[start : start + per_call],
                settings,
                generator=self.generators[who],
                policy_version=version,
            )
            for start in range(0, len(prompts), per_call)
        ]

    def _verified(self, rollout: Rollout) -> tuple[Rollout, list[str]]:
        session = self._session
        shown = session.config.log.samples_per_step
        return verify_rollout(rollout, session.verifier, session.tokenizer, shown=shown)

    def _rewritten(
        self,
        rollout: Rollout,
        shown: list[str],
        rows: Sequence[int],
        settings: SamplerSettings,
        states: StateSource,
    ) -> tuple[Rollout, list[str], dict[str, Stat]]:
        """The rollout with the ends of wrong responses written anew by the teacher, and judged."""
        teacher = self._session.teacher_sampler
        wrong, keep = to_rewrite(rollout, _now(states.rewrite), among=rows)
        judged = sum(not math.isnan(float(rollout.verdict[row])) for row in rows)
        metrics = {"rollout/rewritten": Stat(float(len(wrong)), float(judged))}
        if not wrong:
            return rollout, shown, metrics
        part = continued(
            take(rollout, wrong),
            keep,
            self._by_teacher,
            settings,
            tokenizer=self._session.tokenizer,
            positions=_positions(teacher),
        )
        part, texts = self._verified(part)
        new = dict(zip(wrong, texts, strict=True))
        shown = [new.get(row, text) for row, text in enumerate(shown)]
        metrics["rollout/rewritten_accuracy"] = Stat(float(part.verdict.sum()), float(len(wrong)))
        return put(rollout, wrong, part), shown, metrics


def _now(value: float | Schedule) -> float:
    """A setting whose schedule is settled."""
    assert not isinstance(value, Schedule)
    return value


def _positions(sampler: Sampler | None) -> int | None:
    return positions(sampler.loaded.model) if isinstance(sampler, LocalSampler) else None


def _accuracy(rollout: Rollout, rows: Sequence[int]) -> dict[str, Stat]:
    """Mean verdict of the student's sequences at `rows`, as they were first written."""
    verdict = rollout.verdict[list(rows)]
    judged = verdict[~verdict.isnan()]
    if not len(judged):
        return {}
    return {"rollout/accuracy": Stat(float(judged.sum()), float(len(judged)))}


def _lengths(rollout: Rollout) -> dict[str, Stat]:
    """Mean length of all text; share of the sampled text that was cut."""
    lengths = rollout.lengths
    sampled = (rollout.policy_version >= 0).any(1)
    metrics = {"rollout/length": Stat(float(lengths.sum()), float(lengths.shape[0]))}
    if bool(sampled.any()):
        reasons = zip(rollout.stop_reason, sampled.tolist(), strict=True)
        cut_short = sum(reason == "length" for reason, drawn in reasons if drawn)
        metrics["rollout/truncated"] = Stat(float(cut_short), float(sampled.sum()))
    return metrics


def _writers(
    rollout: Rollout,
    states: StateSource,
    replayed: Sequence[Rollout],
    limit: int,
    version: int,
) -> dict[str, Stat]:
    """Who chose the tokens, where that is not what the shares say."""
    metrics: dict[str, Stat] = {}
    if states.horizon:
        metrics["rollout/horizon"] = Stat(float(limit), 1.0)
    if states.mixture:
        metrics["rollout/mixture"] = Stat(_now(states.mixture), 1.0)
    if states.helped:
        tokens = float((rollout.provenance == Provenance.TEACHER).sum())
        metrics["rollout/by_teacher"] = Stat(tokens, float(rollout.lengths.sum()))
    if states.replay:
        sequences = float(sum(len(part.prompt_ids) for part in replayed))
        metrics["rollout/replayed"] = Stat(sequences, float(len(rollout.prompt_ids)))
        old = [part.policy_version.amax(1) for part in replayed]
        if old:
            age = (version - torch.cat(old)).float()
            metrics["rollout/age"] = Stat(float(age.sum()), sequences)
    return metrics

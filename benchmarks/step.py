"""A whole training step beside TRL's `DistillationTrainer`, on one CPU thread.

Both train the same student (the embedded one, after 100 supervised steps) against the same teacher
on the same prompts: batch 64, at most 64 new tokens, float32, AdamW, reverse KL over the
vocabulary. The learning rate is 0: each draws its own responses, so their lengths would drift
apart; the optimizer does all its work all the same. Time is counted per generated token. On one
frozen batch of responses the two losses of every token and the two gradients are compared.

    python benchmarks/step.py [--quick] [--json FILE] [--result FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

import rollout as rollout_benchmark
from common import (
    OURS,
    Measure,
    Row,
    compare,
    cpu_seconds,
    gradient_error,
    interleaved,
    measured_matrix_rate,
    one_thread,
    parse_args,
    report,
)
from opd.models import load_model, save_model
from opd.rollout.pack import join_parts, pack_rollout, split
from opd.training import step as steps
from opd.training.config import Run, load
from opd.training.loop import train_run
from opd.training.session import Session, open_session
from opd.types import Batch, Prompt, Rollout
from peers.trl_step import PHASES, run_trl_steps, trl_loss_and_gradient

TRL = "TRL DistillationTrainer"
BATCH = 64
NEW_TOKENS = 64
WARMUP_STEPS = 100
CASE = f"step, batch {BATCH}"
ROLLOUT_CASES = ("forced, batch 8", "forced, batch 64", "forced, batch 256")


@dataclass(frozen=True)
class Pair:
    """Where both systems load the models from."""

    student: Path
    teacher: Path


def build_pair(folder: Path) -> Pair:
    """The embedded default's teacher, and its student after a supervised warm-up."""
    settings = {
        "warmup.steps": WARMUP_STEPS,
        "train.steps": 0,
        "evaluate.every": 0,
        "evaluate.prompts": 1,
        "evaluate.test_prompts": 1,
        "evaluate.teacher": False,
        "output": folder,
        "name": "warmup",
    }
    reports = list(train_run(_run(settings)))
    pair = Pair(reports[-1].folder / "model", folder / "teacher")
    save_model(load_model("builtin:sort-teacher"), pair.teacher)
    return pair


def _run(settings: dict[str, Any]) -> Run:
    """The embedded default with some settings replaced."""
    words = [word for key, value in settings.items() for word in (f"--{key}", _toml(value))]
    return load(None, words)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --------------------------------------------------------------------------------------------
# Ours


class OurSteps:
    """Our loop, as `opd run` runs it, without verifying, sampling logs, saving or evaluating."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self._pair, self._folder = pair, folder

    def run(self, count: int) -> Measure:
        """`count` steps after one that is not in the time."""
        with tempfile.TemporaryDirectory(dir=self._folder) as output:
            run = self._settings(count + 1, output)
            session = open_session(run)
            stopwatch = _Stopwatch()
            reports: Any = train_run(run, session=session)
            next(reports)  # the evaluation before the first step
            next(reports)
            with stopwatch.watching(session):
                start = cpu_seconds()
                tokens = sum(next(reports).tokens for _ in range(count))
                seconds = cpu_seconds() - start
            reports.close()
        spent = {name: stopwatch.spent[name] / count for name in PHASES[:-1]}
        spent["rest"] = seconds / count - sum(spent.values())
        return Measure(seconds / count, round(tokens / count), spent)

    def session(self) -> Session:
        """The live parts of such a run."""
        return open_session(self._settings(1, str(self._folder)))

    def _settings(self, count: int, output: str) -> Run:
        return _run(
            {
                "student.model": self._pair.student,
                "teacher.model": self._pair.teacher,
                "data.verifier": "none",
                "sampler.max_new_tokens": NEW_TOKENS,
                "warmup.steps": 0,
                "train.steps": count + 1,  # the last step would save a checkpoint
                "train.prompts_per_step": BATCH,
                "train.learning_rate": 0.0,
                "train.max_tokens": 0,  # the library's own choice
                "teacher.max_tokens": 0,
                "train.save_every": 0,
                "evaluate.every": 0,
                "evaluate.prompts": 1,
                "evaluate.test_prompts": 1,
                "evaluate.teacher": False,
                "log.samples_per_step": 0,
                "output": output,
            }
        )


@dataclass
class _Stopwatch:
    """Times the three parts of our step, from outside."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES[:-1], 0.0))

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        parts = (
            ("rollout", session.student_sampler, "sample"),
            ("teacher", session.teachers["teacher"], "score"),
            ("student", steps, "update"),
        )
        with ExitStack() as stack:
            for name, owner, function in parts:
                timed = self._timed(name, getattr(owner, function))
                stack.enter_context(mock.patch.object(owner, function, timed))
            yield

    def _timed(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = cpu_seconds()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += cpu_seconds() - start

        return timed


# --------------------------------------------------------------------------------------------
# Both


def step_rows(pair: Pair, folder: Path, *, repeats: int, count: int) -> list[Row]:
    """Time per generated token, whole and part by part, and the floor under ours."""
    ours = OurSteps(pair, folder)
    prompts = ours.session().stream(0).take(BATCH * (count + 1))

    def theirs() -> Measure:
        with redirect_stderr(StringIO()):  # progress bars of loading
            timing = run_trl_steps(
                student_folder=pair.student,
                teacher_folder=pair.teacher,
                prompts=[prompt.text for prompt in prompts],
                prompt_ids=[prompt.prompt_ids for prompt in prompts],
                steps=count,
                batch_size=BATCH,
                max_new_tokens=NEW_TOKENS,
                learning_rate=0.0,
            )
        parts = {name: spent / count for name, spent in timing.phases.items()}
        return Measure(timing.seconds / count, round(timing.generated_tokens / count), parts)

    medians = interleaved({OURS: lambda: ours.run(count), TRL: theirs}, repeats)
    rows = compare(CASE, medians)
    rows.append(_floor_row(ours.session(), medians[OURS]))
    for part in PHASES:
        of_part = {
            system: Measure(measure.parts[part], measure.tokens)
            for system, measure in medians.items()
        }
        rows += compare(f"{CASE}: {part}", of_part)
    return rows


def _floor_row(session: Session, ours: Measure) -> Row:
    """The time of the step's multiply-adds alone, at the rate of a large product."""
    frozen = _Frozen.of(session)
    rate = measured_matrix_rate(1024, 256, 1024)
    per_token = _multiply_adds(session, frozen) / float(frozen.rollout.mask.sum())
    seconds = ours.tokens * per_token / rate
    return Row(
        case=CASE,
        system=f"floor: its multiply-adds at {rate / 1e9:.0f} G/s",
        seconds=seconds,
        tokens_per_s=ours.tokens / seconds,
        ratio=seconds / ours.seconds,
    )


def _multiply_adds(session: Session, frozen: _Frozen) -> float:
    """Of one step: a forward to sample, one of the teacher, and a forward and backward (three).

    No padding; attention looks back at half a sequence on average.
    """
    lengths = frozen.batch.lengths.double()
    total = 0.0
    teacher: Any = session.teachers["teacher"]
    for loaded, passes in ((session.student.loaded, 4), (teacher.loaded, 1)):
        config: Any = loaded.model.config
        embedding = config.vocab_size * config.hidden_size
        matrices = sum(weight.numel() for weight in loaded.model.parameters() if weight.dim() == 2)
        width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
        per_sequence = (matrices - embedding) * lengths + width * lengths * lengths
        total += passes * float(per_sequence.sum() + embedding * frozen.rollout.lengths.sum())
    return total


@dataclass(frozen=True)
class _Frozen:
    """One batch of responses by the student, scored by the teacher."""

    prompts: list[Prompt]
    rollout: Rollout
    batch: Batch

    @classmethod
    def of(cls, session: Session) -> _Frozen:
        phase, student = session.phases[-1], session.student
        prompts = session.stream(0).take(BATCH)
        rollout = session.student_sampler.sample(
            prompts, phase.plan.sampler, generator=torch.Generator().manual_seed(0)
        )
        batch = pack_rollout(rollout, pad_id=student.loaded.pad_id, special_ids=session.special_ids)
        objective, plan = phase.method.objective, phase.plan
        return cls(prompts, rollout, steps.score(session.teachers, batch, objective, plan))

    @property
    def responses(self) -> list[list[int]]:
        lengths = self.rollout.lengths.tolist()
        return [row[:n] for row, n in zip(self.rollout.tokens.tolist(), lengths, strict=True)]


def agreement_rows(session: Session) -> list[Row]:
    """Our loss of every token and our gradient against TRL's, on one frozen batch."""
    frozen, student = _Frozen.of(session), session.student
    objective, max_tokens = session.phases[-1].method.objective, session.max_tokens
    (label,) = (label for label, _ in objective.labelled())
    parts = split(frozen.batch, max_tokens=max_tokens)
    per_token = join_parts(
        [(part.rows, student(part.batch, objective).rows[f"loss/{label}"]) for part in parts],
        frozen.batch.row_index.shape[0],
    )
    steps.update(student, frozen.batch, objective, max_tokens, step=1)
    gradient = {name: weight.grad for name, weight in student.model.named_parameters()}
    teacher: Any = session.teachers["teacher"]
    with redirect_stderr(StringIO()):
        theirs = trl_loss_and_gradient(
            student=cast(Any, student.model),
            teacher=teacher.loaded.model,
            tokenizer=session.tokenizer,
            prompt_ids=[prompt.prompt_ids for prompt in frozen.prompts],
            completion_ids=frozen.responses,
        )
    known: dict[str, Tensor] = {n: value for n, value in gradient.items() if value is not None}
    loss = {"loss": per_token}, {"loss": theirs.divergence}
    print(
        f"frozen batch of {len(per_token)} tokens: loss {float(per_token.mean()):.6f} nats per "
        f"token; largest difference of a token's loss "
        f"{float((per_token - theirs.divergence).abs().max()):.1e} nats"
    )
    return [
        Row("frozen batch: loss of every token", OURS, grad_error=gradient_error(*loss)),
        Row("frozen batch: gradient", OURS, grad_error=gradient_error(known, theirs.gradient)),
    ]


def rollout_rows(*, repeats: int) -> list[Row]:
    """Rollouts alone beside `generate`."""
    cases = [case for case in rollout_benchmark.CASES if case.name in ROLLOUT_CASES]
    return [row for case in cases for row in rollout_benchmark.rows_of(case, repeats=repeats)]


def main() -> None:
    options = parse_args("A whole training step beside TRL's DistillationTrainer.")
    one_thread()
    repeats, count = (2, 3) if options.quick else (7, 6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = build_pair(folder)
        rows = step_rows(pair, folder, repeats=repeats, count=count)
        rows += agreement_rows(OurSteps(pair, folder).session())
    rows += rollout_rows(repeats=3 if options.quick else 15)
    report(rows, options)


if __name__ == "__main__":
    main()

"""A whole training step beside TRL's `DistillationTrainer`, on one CPU thread.

Both train the same student (the embedded one, after 100 supervised steps) against the same teacher
on the same prompts: batch 64, at most 64 new tokens, float32, AdamW, reverse KL over the
vocabulary. The learning rate is 0: each draws its own responses, so their lengths would drift
apart; the optimizer does all its work all the same. Time is counted per generated token. On one
frozen batch of responses the two losses of every token and the two gradients are compared.

A second case has models of random weights and a vocabulary of 32,768 tokens, so that most of the
work is in the unembeddings: batch 16, 32 new tokens each.

    python benchmarks/step.py [--quick] [--ours] [--json FILE] [--result FILE]

`--ours` leaves out whatever needs a peer, to compare this library with an earlier commit of it.
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
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import rollout as rollout_benchmark
from common import (
    OURS,
    Measure,
    Options,
    Row,
    compare,
    cpu_seconds,
    gradient_error,
    interleaved,
    measured_matrix_rate,
    one_thread,
    parser,
    report,
)
from opd.data.tasks import build_tokenizer
from opd.models import load_model, save_model, wrap_model
from opd.rollout.pack import join_parts, pack_rollout, split
from opd.training import step as steps
from opd.training.config import Run, load
from opd.training.loop import train_run
from opd.training.session import Session, open_session
from opd.types import Batch, Prompt, Rollout
from peers.trl_step import PHASES, random_model, run_trl_steps, trl_loss_and_gradient

TRL = "TRL DistillationTrainer"
WARMUP_STEPS = 100
WIDE_VOCABULARY = 32_768
WIDE_BATCH = 16
ROLLOUT_CASES = ("forced, batch 8", "forced, batch 64", "forced, batch 256")


@dataclass(frozen=True)
class Case:
    """What a step is, and where both systems load the models from."""

    name: str
    student: Path
    teacher: Path
    batch: int
    new_tokens: int


def embedded_case(folder: Path, warmup_steps: int) -> Case:
    """The embedded default's teacher, and its student after a supervised warm-up."""
    settings = {
        "warmup.steps": warmup_steps,
        "train.steps": 0,
        "evaluate.every": 0,
        "evaluate.prompts": 1,
        "evaluate.test_prompts": 1,
        "evaluate.teacher": False,
        "output": folder,
        "name": "warmup",
    }
    reports = list(train_run(_run(settings)))
    student, teacher = reports[-1].folder / "model", folder / "teacher"
    save_model(load_model("builtin:sort-teacher"), teacher)
    return Case("step, batch 64", student, teacher, batch=64, new_tokens=64)


def wide_case(folder: Path, batch: int) -> Case:
    """Random weights with a large vocabulary; every response reaches the limit.

    The end token's row of the unembedding is zero. Among logits of standard deviation 3 that is
    a chance of 2e-7 per token, for both systems, without a setting of either.
    """
    tokenizer = _wide_tokenizer()
    torch.manual_seed(0)
    for role, width in (("student", 256), ("teacher", 512)):
        model: Any = random_model(tokenizer, width=width, layers=2, spread=0.2)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0.0
        save_model(wrap_model(model, tokenizer), folder / f"wide-{role}")
    name = f"step, batch {batch}, V {WIDE_VOCABULARY:,}"
    return Case(name, folder / "wide-student", folder / "wide-teacher", batch, new_tokens=32)


def _wide_tokenizer() -> PreTrainedTokenizerBase:
    """That of the embedded tasks, filled up with tokens that no prompt contains."""
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    filler = {f"<filler {index}>": index for index in range(len(ids), WIDE_VOCABULARY)}
    tokenizer.backend_tokenizer.model = WordLevel(ids | filler)
    return tokenizer


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

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._folder = case, folder

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
                "student.model": self._case.student,
                "teacher.model": self._case.teacher,
                "data.verifier": "none",
                "sampler.max_new_tokens": self._case.new_tokens,
                "warmup.steps": 0,
                "train.steps": count + 1,  # the last step would save a checkpoint
                "train.prompts_per_step": self._case.batch,
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


def step_rows(
    case: Case, folder: Path, *, repeats: int, count: int, alone: bool = False
) -> list[Row]:
    """Time per generated token, whole and part by part, and the floor under ours.

    Args:
        repeats: runs of each system.
        count: measured steps of a run.
        alone: leave TRL out.
    """
    ours = OurSteps(case, folder)
    prompts = ours.session().stream(0).take(case.batch * (count + 1))

    def theirs() -> Measure:
        with redirect_stderr(StringIO()):  # progress bars of loading
            timing = run_trl_steps(
                student_folder=case.student,
                teacher_folder=case.teacher,
                prompts=[prompt.text for prompt in prompts],
                prompt_ids=[prompt.prompt_ids for prompt in prompts],
                steps=count,
                batch_size=case.batch,
                max_new_tokens=case.new_tokens,
                learning_rate=0.0,
            )
        parts = {name: spent / count for name, spent in timing.phases.items()}
        return Measure(timing.seconds / count, round(timing.generated_tokens / count), parts)

    systems = {OURS: lambda: ours.run(count)} | ({} if alone else {TRL: theirs})
    medians = interleaved(systems, repeats)
    rows = compare(case.name, medians)
    rows.append(_floor_row(case, ours.session(), medians[OURS]))
    for part in PHASES:
        of_part = {
            system: Measure(measure.parts[part], measure.tokens)
            for system, measure in medians.items()
        }
        rows += compare(f"{case.name}: {part}", of_part)
    return rows


def _floor_row(case: Case, session: Session, ours: Measure) -> Row:
    """The time of the step's multiply-adds alone, at the rate of a large product."""
    frozen = _Frozen.of(session)
    rate = measured_matrix_rate(1024, 256, 1024)
    per_token = _multiply_adds(session, frozen) / float(frozen.rollout.mask.sum())
    seconds = ours.tokens * per_token / rate
    return Row(
        case=case.name,
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
        prompts = session.stream(0).take(session.config.train.prompts_per_step)
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
    arguments = parser("A whole training step beside TRL's DistillationTrainer.")
    arguments.add_argument("--ours", action="store_true", help="leave the peers out")
    chosen = arguments.parse_args()
    options, alone = Options(chosen.quick, chosen.json, chosen.result), chosen.ours
    one_thread()
    repeats, count = (1, 3) if options.quick else (7, 6)
    wide_repeats, wide_count = (1, 1) if options.quick else (7, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embedded = embedded_case(folder, 30 if options.quick else WARMUP_STEPS)
        wide = wide_case(folder, 4 if options.quick else WIDE_BATCH)
        rows = step_rows(embedded, folder, repeats=repeats, count=count, alone=alone)
        rows += step_rows(wide, folder, repeats=wide_repeats, count=wide_count, alone=alone)
        if not alone:
            rows += agreement_rows(OurSteps(embedded, folder).session())
    if not alone:
        rows += rollout_rows(repeats=1 if options.quick else 15)
    report(rows, options)


if __name__ == "__main__":
    main()

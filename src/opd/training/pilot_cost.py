"""What a probe will cost, from a timed small piece, and what the run costs at the rates it saw."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import torch

from opd.training import step as steps
from opd.training.check import examine
from opd.training.config import Run
from opd.training.memory import MemoryPart
from opd.training.pilot import (
    DEPTHS,
    SEED,
    Pilot,
    PilotSettings,
    comparing,
    first_step,
    scored,
    subject,
)
from opd.training.pilot_gradients import RESPONSES, Gradients
from opd.training.plan import Plan, reply_is_distribution
from opd.training.session import Session
from opd.training.teachers import Served, entries_by_view

PIECES = ((2, 8), (2, 8), (8, 32), (32, 64))
"""Answers and tokens of the small piece that is timed: the first warms up, and a larger one follows
as long as the last was done in no time."""
NO_TIME_S = 0.5
"""Seconds of a piece after which a larger one would cost too much."""
GRADIENTS = 27
"""Forward and backward passes over the frozen batch: neighbours, credits, the verifier."""
BACKWARD = 3
"""Forward passes that a forward and a backward one are worth."""


@dataclass(frozen=True)
class ProbeCost:
    """What a probe takes, said before it begins; as if every answer were as long as it may be.

    Attributes:
        forward_tokens: through the student or the teacher, a backward pass as two more.
        seconds: at the rate of the piece; the run's own warm-up included.
        wire_bytes: answers of served teachers; 0 where all are in this process.
        memory_bytes: as `opd check` estimates it for a step; NaN where it cannot.
        warmup_steps: of the run's own warm-up, which goes first.
    """

    forward_tokens: float
    seconds: float
    wire_bytes: float
    memory_bytes: float
    warmup_steps: int


@dataclass(frozen=True)
class PlanCost:
    """What the run as planned will cost at the rates that the probe saw.

    Attributes:
        seconds: of the whole run by the clock, by part.
        tokens: response tokens of the distillation.
        wire_bytes: answers of served teachers.
        memory: as `opd check` estimates it, part by part.
    """

    seconds: dict[str, float]
    tokens: float
    wire_bytes: float
    memory: tuple[MemoryPart, ...]

    @property
    def memory_bytes(self) -> float:
        """Of all parts together; NaN where nothing is known."""
        return sum(part.bytes for part in self.memory) if self.memory else math.nan


def cost_of_probe(session: Session, settings: PilotSettings, steps_asked: int = 0) -> ProbeCost:
    """Time a small piece, and multiply.

    Args:
        steps_asked: of distillation, which the probe takes at its end.
    """
    method, plan = first_step(session)
    view = subject(method, plan)
    for answers, tokens in PIECES:
        sampling, scoring, updating, spent = _timed_piece(session, plan, view, answers, tokens)
        if spent > NO_TIME_S:
            break
    full = _width(session, settings.responses)
    judged = _width(session, min(RESPONSES, settings.responses))
    # and the teacher's answers to the prompts of the frozen batch
    continued = len(DEPTHS) * _width(session, settings.continued) + judged
    frozen = GRADIENTS * judged
    warmup = session.config.warmup
    by_warmup = warmup.steps * _width(session, warmup.prompts_per_step)
    trained = steps_asked * _width(session, _per_step(session))
    again = _width(session, settings.responses + 2 * len(session.validation.prompts))
    again = again if steps_asked else 0.0
    # the piece scores and visits once; a probe visits the student twice more
    seconds = (
        sampling * (full + continued) + scoring * (2 * full + frozen) + updating * frozen
    ) + updating * by_warmup
    seconds += (sampling + scoring + updating) * trained + sampling * again
    forward = 4 * full + continued + (1 + BACKWARD) * frozen + BACKWARD * by_warmup
    forward += (2 + BACKWARD) * trained + again
    return ProbeCost(
        forward,
        seconds,
        _wire_per_token(session) * _responses(session, settings.responses),
        sum(part.bytes for part in examine(session.run).memory) or math.nan,
        warmup.steps,
    )


def _timed_piece(
    session: Session, plan: Plan, view: str, answers: int, tokens: int
) -> tuple[float, float, float, float]:
    """Seconds per token of sampling, scoring and an update, and of all together."""
    method, _ = first_step(session)
    limit = min(tokens, plan.sampler.max_new_tokens)
    short = replace(plan.sampler, max_new_tokens=limit, samples_per_prompt=1, student_top_k=0)
    generator = torch.Generator().manual_seed(session.config.seed + SEED)
    prompts = session.validation.prompts[:answers]
    clock = [time.perf_counter()]
    with session.student.for_generation():
        rollout = session.student_sampler.sample(prompts, short, generator=generator)
    clock.append(time.perf_counter())
    asked = comparing(method, view, whole=False)
    batch = scored(session, asked, rollout)
    clock.append(time.perf_counter())
    try:
        steps.update(session.student, batch, asked.objective, session.max_tokens, step=0)
    finally:
        session.student.zero_grad(set_to_none=True)
    clock.append(time.perf_counter())
    width = max(1, int(batch.lengths.sum()))
    sampling, scoring, updating = ((end - start) / width for start, end in pairwise(clock))
    return sampling, scoring, updating, clock[-1] - clock[0]


def _width(session: Session, responses: int) -> float:
    """Tokens of so many prompts with the longest answers."""
    prompts = session.validation.prompts
    mean = sum(len(prompt.prompt_ids) for prompt in prompts) / max(1, len(prompts))
    return responses * (mean + session.phases[-1].plan.sampler.max_new_tokens)


def _per_step(session: Session) -> int:
    phase = session.phases[-1]
    return phase.prompts_per_step * session.config.sampler.samples_per_prompt


def _responses(session: Session, responses: int) -> float:
    return float(responses * session.phases[-1].plan.sampler.max_new_tokens)


def _wire_per_token(session: Session) -> float:
    """Bytes of served teachers' answers to one token of the run; 0 where all are here."""
    opened, config = session.opened, session.config
    if not opened.served:
        return 0.0
    method, plan = first_step(session)
    entries = entries_by_view(session.teachers, config, method, plan)
    total = float(sum(each.bytes_per_token for each in entries.values()))
    for view, served in opened.served.items():
        if view not in entries and reply_is_distribution(plan.needs, view):
            total += _hidden_bytes(served)
    return total


def _hidden_bytes(served: Served) -> float:
    told = served.described
    width = int(str(told.extra.get("hidden_size", 0)))
    return float(width * (4 if told.dtype == "float32" else 2))


def cost_of_plan(pilot: Pilot, gradients: Gradients, run: Run, warmup_s: float) -> PlanCost:
    """The whole run at the rates of the probe.

    Args:
        warmup_s: seconds that the run's own warm-up took.
    """
    session, config = pilot.session, run.config
    phase = session.phases[-1]
    per_step = _per_step(session)
    answers = len(pilot.rollout.prompt_ids)
    length = float(pilot.rollout.lengths.float().mean())
    per_answer = {name: spent / answers for name, spent in pilot.seconds.items()}
    own = next((each for each in gradients.neighbours if not each.variable), None)
    update = own.wall_seconds / gradients.responses if own and gradients.responses else math.nan
    evaluations = _evaluated(config.evaluate.every, phase.steps)
    evaluated = evaluations * len(session.validation.prompts) + 3 * len(session.test.prompts)
    tokens = phase.steps * per_step * length
    return PlanCost(
        {
            "warm-up": warmup_s,
            "answers": phase.steps * per_step * per_answer["sample"],
            "scores and updates": phase.steps * per_step * update * phase.updates_per_rollout,
            "evaluation": evaluated * per_answer["sample"],
        },
        tokens,
        _wire_per_token(session) * tokens,
        tuple(examine(run).memory),
    )


def _evaluated(every: int, total: int) -> int:
    """Validations of a run: before the first step, every so many, after the last."""
    places: Sequence[int] = range(every, total + 1, every) if every else ()
    return len(set(chain((0,), places, (total,) if every else ())))

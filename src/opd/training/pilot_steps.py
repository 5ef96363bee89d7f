"""A few steps of a run through the loop, and what they did: the third stage of a pilot.

The steps are the first of the run as planned, learning-rate schedule included; then the same held-
out prompts are answered again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from opd.diagnose import quantiles, repeated_ngrams, split_delta, truncated_share
from opd.diagnose.evidence import Evidence
from opd.errors import TrainingError
from opd.models import LoadedModel
from opd.training.config import Run
from opd.training.loop import train_run
from opd.training.pilot import Doing, PilotSettings, look, nothing, row_numbers
from opd.training.session import open_session
from opd.types import PASS_MARK, Teacher

NAME = "steps"
"""Of the run folder, inside the probe's."""
WATCHED = {
    "gradient norm": "optimizer/grad_norm",
    "entropy": "student/entropy",
    "length": "rollout/length",
    "accuracy": "rollout/accuracy",
}
"""Metrics of a step that are reported, and what the loop calls them."""


@dataclass(frozen=True)
class Moment:
    """The student's answers to the same prompts, before or after the steps."""

    log_ratio: Mapping[float, float]
    entropy: float
    length: float
    truncated: float
    repeated: float
    accuracy: float


@dataclass(frozen=True)
class Steps:
    """What some steps did.

    Attributes:
        count: of the steps.
        watched: a series over the steps, by name.
        before, after: of the held-out answers.
        solved, unsolved: change of greedy accuracy on the prompts that were solved before the
            steps, and on the others; NaN where there is none, or no verifier.
        folder: the run folder.
    """

    count: int
    watched: Mapping[str, tuple[float, ...]]
    before: Moment
    after: Moment
    solved: float
    unsolved: float
    folder: Path


def moment(evidence: Evidence) -> Moment:
    """What is compared before and after."""
    ratio = evidence.row("log_ratio")
    return Moment(
        quantiles(ratio[~ratio.isnan()]),
        float(evidence.row("student_entropy").double().mean()),
        float(evidence.mask.sum(1).double().mean()),
        truncated_share(evidence.stop_reason),
        float(repeated_ngrams(evidence.tokens, evidence.mask, 4).nanmean()),
        float(evidence.verdict.nanmean()),
    )


def forget_steps(folder: Path) -> None:
    """Remove the run folder of a former probe, whose folder this is; nothing but a run folder."""
    if (folder / NAME / "config.toml").is_file():
        shutil.rmtree(folder / NAME)


def take_steps(
    run: Run,
    student: LoadedModel,
    before: Evidence,
    settings: PilotSettings,
    count: int,
    folder: Path,
    doing: Doing = nothing,
    teacher: LoadedModel | Teacher | None = None,
) -> Steps:
    """Train `student`, in place, for the first steps of a run; the warm-up is behind it.

    An alarm ends nothing and acts on nothing here: what the steps did is what is asked for.

    Args:
        before: what the probe saw of it.
        folder: the probe's; the run folder is made in it.
        teacher: takes the place of the run file's.

    Raises:
        TrainingError: as the loop.
    """
    config = run.config
    config = replace(
        config,
        warmup=replace(config.warmup, steps=0),
        train=replace(config.train, steps=max(count, config.train.steps), save_every=0),
        evaluate=replace(
            config.evaluate, every=count, teacher=False, privileged=False, sets={}, test_prompts=1
        ),
        log=replace(config.log, trackers=()),
        monitor=replace(config.monitor, on_alarm="log", act={}, golden=()),
        output=str(folder),
        name=NAME,
    )
    planned = replace(run, config=config)
    session = open_session(planned, student=student, teacher=teacher)
    series: dict[str, list[float]] = {name: [] for name in WATCHED}
    scores: list[tuple[float, ...]] = []
    reports = train_run(planned, session=session)
    try:
        for report in reports:
            if report.evaluation is not None:
                scores.append(report.evaluation.scores)
            if report.step:
                doing(f"step {report.step} of {count}")
                for name, metric in WATCHED.items():
                    stat = report.metrics.get(metric)
                    series[name].append(math.nan if stat is None else stat.mean)
            if report.step == count:
                break
    finally:
        reports.close()  # type: ignore[attr-defined]
    if len(scores) < 2:
        raise TrainingError(f"{count} steps ended without a second evaluation")
    first, last = (torch.tensor(each) for each in (scores[0], scores[-1]))
    judged = session.verifier is not None
    solved, unsolved = split_delta(first >= PASS_MARK, last) if judged else (math.nan, math.nan)
    doing("the student answers the same prompts again")
    again = open_session(planned, student=student, teacher=teacher)
    pilot = look(again, settings)
    rows, absent = row_numbers(pilot)
    after = replace(
        before,
        tokens=pilot.rollout.tokens,
        mask=pilot.rollout.mask,
        group=pilot.rollout.group,
        verdict=pilot.rollout.verdict.float(),
        stop_reason=pilot.rollout.stop_reason,
        rows=rows,
        absent=absent,
    )
    again.opened.close()
    return Steps(
        count,
        {name: tuple(values) for name, values in series.items()},
        moment(before),
        moment(after),
        solved,
        unsolved,
        folder / NAME,
    )

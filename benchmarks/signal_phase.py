"""What the signal phase costs within a step of the embedded default, on one CPU thread.

The arithmetic alone (rewards, outcomes, credit, baselines, coupled weights over whole responses)
is one row, the student's visit without gradient that some objectives need is another; both as a
share of the whole step, sampling and teacher included. Batch 64, at most 64 new tokens.

    python benchmarks/signal_phase.py [--quick] [--json FILE] [--result FILE]

`ratio` of a part is its time over the step's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast
from unittest import mock

from common import OURS, Row, cpu_seconds, one_thread, parse_args, report
from opd.formula import credit, outcome, reward, selection
from opd.objective import Method, Objective, Sampled
from opd.training import step as steps
from opd.training import values
from opd.training.config import load
from opd.training.loop import train_run
from opd.training.session import open_session

LOG_RATIO = reward.teacher_log_ratio
OBJECTIVES: Mapping[str, Sampled] = {
    "return_to_go": Sampled(reward=LOG_RATIO, credit=credit.return_to_go),
    "rao_blackwell": Sampled(reward=LOG_RATIO, credit=credit.rao_blackwell),
    "gae": Sampled(reward=LOG_RATIO, credit=partial(credit.gae, gae_lambda=0.95)),
    "sigmoid_gate": Sampled(
        reward=LOG_RATIO, outcome=(partial(outcome.sigmoid_gate, sharpness=1.0),)
    ),
    "keep_high_entropy": Sampled(
        reward=LOG_RATIO,
        credit=credit.return_to_go,
        baseline=credit.position_mean,
        weights=(partial(selection.keep_high_entropy, share=0.2),),
        preserve_mass=True,
    ),
}
PARTS = ("arithmetic", "visit")


class Stopwatch:
    """CPU-seconds of the parts of the signal phase while it watches."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the functions of the two parts add to `spent`."""
        with ExitStack() as stack:
            for part, where, name in (
                ("arithmetic", Objective, "signal"),
                ("visit", steps, "visit"),
                ("visit", values, "visit"),
            ):
                timed = self._timed(part, getattr(where, name))
                stack.enter_context(mock.patch.object(where, name, timed))
            yield

    def _timed(self, part: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = cpu_seconds()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[part] += cpu_seconds() - start

        return timed


def measure(term: Sampled, count: int, output: str) -> dict[str, float]:
    """Median CPU-seconds of a step and of its two parts, over `count` steps after the first."""
    settings = {
        "output": output,
        "warmup.steps": 0,
        "train.steps": count + 3,  # the last step would save a checkpoint
        "train.prompts_per_step": 64,
        "train.learning_rate": 0.0,
        "train.save_every": 0,
        "sampler.max_new_tokens": 64,
        "evaluate.every": 0,
        "evaluate.prompts": 1,
        "evaluate.test_prompts": 1,
        "evaluate.teacher": "false",
    }
    run = load(None, [word for key, value in settings.items() for word in (f"--{key}", str(value))])
    session = open_session(run, method=Method(Objective(term)))
    reports = cast(Any, train_run(run, session=session))
    next(reports)  # the evaluation before the first step
    next(reports)
    taken: dict[str, list[float]] = {part: [] for part in ("step", *PARTS)}
    for _ in range(count):
        stopwatch = Stopwatch()
        with stopwatch.watching():
            start = cpu_seconds()
            next(reports)
            taken["step"].append(cpu_seconds() - start)
        for part, seconds in stopwatch.spent.items():
            taken[part].append(seconds)
    reports.close()
    return {part: median(seconds) for part, seconds in taken.items()}


def main() -> None:
    options = parse_args("The signal phase within a step of the embedded default.")
    one_thread()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, term in OBJECTIVES.items():
            found = measure(term, 4 if options.quick else 15, str(Path(folder) / name))
            for part, seconds in found.items():
                share = seconds / found["step"]
                rows.append(Row(f"{name}: {part}", OURS, seconds=seconds, ratio=share))
    report(rows, options)


if __name__ == "__main__":
    main()

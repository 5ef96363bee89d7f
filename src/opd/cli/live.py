"""What a run is doing, while it does it: a live panel on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from opd.cli.output import duration
from opd.formula import reward
from opd.objective import Dense, Objective, Sampled
from opd.training.loop import StepReport
from opd.training.session import Phase
from opd.types import Bound

LINE_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""

PHASE_WORDS = {"warmup": "warm-up", "train": "distilling"}
DIVERGENCE_WORDS = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "generalized_jsd": "JSD",
}
_BARS = "▁▂▃▄▅▆▇█"
_RATE_STEPS = 20


@dataclass
class Track:
    """The figures of a run so far, fed with one report after another.

    Attributes:
        phases: of the run, for what their terms measure.
        clock: seconds; another one in tests.
    """

    phases: Mapping[str, Phase]
    clock: Callable[[], float] = time.monotonic
    report: StepReport | None = None
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RATE_STEPS))
    _phase: str = ""
    _steps_seen: int = 0
    _phase_seconds: float = 0.0
    _last: float = 0.0

    def __post_init__(self) -> None:
        self._last = self.clock()

    def add(self, report: StepReport) -> None:
        """Take in one report."""
        now = self.clock()
        spent, self._last = now - self._last, now
        if report.phase != self._phase:
            self._phase, self._steps_seen, self._phase_seconds = report.phase, 0, 0.0
            self._recent.clear()
        if report.tokens:
            # Before a phase's first report there is more than a step: loading, measuring.
            self._phase_seconds += spent if self._steps_seen else sum(report.seconds.values())
            self._steps_seen += 1
            working = sum(report.seconds.values()) - report.seconds.get("evaluate", 0.0)
            self._recent.append((report.tokens, working))
        if report.evaluation is not None and report.evaluation.accuracy.n:
            value = report.evaluation.accuracy.value
            if value == value and report.summary is None:
                self.accuracies.append((report.step, value))
        self.report = report

    @property
    def seconds_left(self) -> float | None:
        """To the end of the phase at its mean pace so far; None before its first step."""
        if self.report is None or not self._steps_seen:
            return None
        remaining = self.report.steps - self.report.step
        return remaining * self._phase_seconds / self._steps_seen

    @property
    def tokens_per_second(self) -> float | None:
        """Response tokens over the time of the last steps, evaluation left out."""
        tokens = sum(count for count, _ in self._recent)
        seconds = sum(spent for _, spent in self._recent)
        return tokens / seconds if seconds else None

    @property
    def figures(self) -> list[tuple[str, str]]:
        """Name and value of what is shown, in reading order."""
        shown: list[tuple[str, str]] = []
        report = self.report
        if report is None:
            return shown
        metrics = {name: stat.mean for name, stat in report.metrics.items()}
        losses = {n.removeprefix("loss/"): v for n, v in metrics.items() if n.startswith("loss/")}
        if losses:
            shown.append(("loss", f"{sum(losses.values()):.4f}"))
        divergence = self._divergence(report.phase, losses, metrics)
        if divergence:
            shown.append(divergence)
        if self.accuracies:
            step, value = self.accuracies[-1]
            shown.append(("accuracy", f"{value:.3f} at step {step}"))
        if "rollout/accuracy" in metrics:
            shown.append(("in rollouts", f"{metrics['rollout/accuracy']:.3f}"))
        if "rollout/length" in metrics:
            shown.append(("length", f"{metrics['rollout/length']:.1f} tokens"))
        rate = self.tokens_per_second
        if rate:
            shown.append(("speed", f"{rate:,.0f} tokens/s"))
        return shown

    @property
    def sparkline(self) -> str:
        """Validation accuracy over the run, one character each, from 0 to 1."""
        values = [value for _, value in self.accuracies]
        return "".join(_BARS[min(7, int(value * 8))] for value in values[-40:])

    def _divergence(
        self, phase: str, losses: Mapping[str, float], metrics: Mapping[str, float]
    ) -> tuple[str, str] | None:
        """The distance to the teacher that the loss measures, by its name, or an estimate."""
        if phase not in self.phases:
            return None
        for label, words in measured(self.phases[phase].method.objective).items():
            if label in losses:
                return words, f"{losses[label]:.4f}"
        if "teacher/log_ratio" in metrics:  # its mean over the student's tokens is -KL
            return "reverse KL, sampled", f"{-metrics['teacher/log_ratio']:.4f}"
        return None


def measured(objective: Objective) -> dict[str, str]:
    """Which losses are distances to the text or the teacher, by label, and what they are called.

    A surrogate is none: its value says nothing. A weighted or scaled divergence is none either.
    """
    named = {}
    for label, term in objective.labelled():
        if term.coef != 1.0 or term.weights:
            continue
        if isinstance(term, Sampled):
            if Bound.of(term.reward).function is reward.one:
                named[label] = "negative log-likelihood"
        elif isinstance(term, Dense) and term.against == "teacher":
            name = Bound.of(term.divergence).short_name
            named[label] = DIVERGENCE_WORDS.get(name, name)
    return named


class View:
    """Shows a track. `doing` is what happens now; `show` follows every report."""

    def __init__(self, track: Track) -> None:
        self.track = track

    def doing(self, what: str) -> None:
        raise NotImplementedError

    def show(self) -> None:
        raise NotImplementedError


class LinesView(View):
    """One line every ten seconds, per validation and per phase; for logs and pipes."""

    def __init__(self, track: Track, console: Console) -> None:
        super().__init__(track)
        self.console = console
        self._next = 0.0
        self._phase = ""

    def doing(self, what: str) -> None:
        self.console.print(what)

    def show(self) -> None:
        report = self.track.report
        assert report is not None
        now = self.track.clock()
        news = report.evaluation is not None or report.phase != self._phase
        last = report.step == report.steps
        if now < self._next and not news and not last:
            return
        self._next, self._phase = now + LINE_EVERY, report.phase
        self.console.print(line(self.track), soft_wrap=True)


class LiveView(View):
    """A panel that is redrawn in place."""

    def __init__(self, track: Track, live: Live) -> None:
        super().__init__(track)
        self._live = live
        self._what = ""

    def doing(self, what: str) -> None:
        self._what = what
        self._draw()

    def show(self) -> None:
        self._what = ""
        self._draw()

    def _draw(self) -> None:
        self._live.update(panel(self.track, self._what))


@contextmanager
def open_view(track: Track, console: Console) -> Iterator[View]:
    """The view that suits the console."""
    if not console.is_terminal:
        yield LinesView(track, console)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield LiveView(track, live)


def line(track: Track) -> str:
    """The track as one line of text."""
    report = track.report
    assert report is not None
    place = f"{PHASE_WORDS.get(report.phase, report.phase)} {report.step}/{report.steps}"
    parts = [f"{name} {value}" for name, value in track.figures]
    left = track.seconds_left
    if left is not None and report.step < report.steps:
        parts.append(f"{duration(left)} left")
    return "  ".join([place, *parts])


def panel(track: Track, what: str) -> Group:
    """The track as a progress bar over a row of figures."""
    rows: list[Table | Spinner | Text] = []
    report = track.report
    if report is not None:
        left = track.seconds_left
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(PHASE_WORDS.get(report.phase, report.phase), style="bold"),
            ProgressBar(total=max(1, report.steps), completed=report.step, width=36),
            Text(f"step {report.step} of {report.steps}"),
            Text("" if left is None else f"{duration(left)} left", style="dim"),
        )
        rows.append(bar)
        figures = Table.grid(padding=(0, 3))
        named = track.figures
        figures.add_row(*(Text(name, style="dim") for name, _ in named))
        figures.add_row(*(Text(value) for _, value in named))
        rows.append(figures)
        if len(track.accuracies) > 1:
            rows.append(Text(f"accuracy so far  {track.sparkline}", style="dim"))
    if what:
        rows.append(Spinner("dots", Text(what, style="dim")))
    return Group(*rows)

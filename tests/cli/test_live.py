"""The figures of the live view."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from opd import methods
from opd.cli.live import LINE_EVERY, LinesView, Track, measured, panel
from opd.formula import divergence, weight
from opd.objective import Dense, Objective
from opd.training.config import load
from opd.training.evaluate import Evaluation, wilson
from opd.training.loop import StepReport
from opd.training.session import build_method, make_phases
from opd.types import Stat


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def report(step: int, *, accuracy: float | None = None, seconds: float = 2.0) -> StepReport:
    found = None if accuracy is None else Evaluation(wilson(accuracy * 100, 100), 3.0, 0.0, 300)
    return StepReport(
        "train",
        step,
        10,
        {
            "loss/dense": Stat(3.0, 4.0),
            "teacher/log_ratio": Stat(-6.0, 4.0),
            "rollout/length": Stat(80.0, 4.0),
            "rollout/accuracy": Stat(1.0, 4.0),
        },
        {"update": seconds, "evaluate": 5.0},
        100,
        Path("runs/x"),
        found,
    )


def make_track(method: str = "reverse_kl_opd") -> tuple[Track, Clock]:
    run = load(None, ["--method", method, "--warmup.steps", "0"])
    phases = make_phases(run.config, build_method(run))
    clock = Clock()
    return Track({phase.name: phase for phase in phases}, clock=clock), clock


def test_time_left_is_the_mean_pace_times_the_remaining_steps() -> None:
    track, clock = make_track()
    assert track.seconds_left is None
    clock.now = 500.0  # loading; not part of the pace
    track.add(report(1, seconds=2.0))
    assert track.seconds_left == pytest.approx(9 * 7.0)
    clock.now = 503.0
    track.add(report(2, seconds=2.0))
    assert track.seconds_left == pytest.approx(8 * (7.0 + 3.0) / 2)


def test_speed_leaves_evaluation_out() -> None:
    track, _ = make_track()
    track.add(report(1, seconds=2.0))
    assert track.tokens_per_second == pytest.approx(50.0)


def test_a_divergence_is_called_by_its_name_and_a_score_gives_an_estimate() -> None:
    track, _ = make_track("reverse_kl_opd")
    track.add(report(1))
    assert ("reverse KL", "0.7500") in track.figures
    sampled, _ = make_track("sampled_token_opd")
    sampled.add(report(1))
    assert ("reverse KL, sampled", "1.5000") in sampled.figures


def test_a_weighted_or_scaled_divergence_is_not_called_one() -> None:
    assert measured(methods.reverse_kl_opd().objective) == {"dense": "reverse KL"}
    scaled = Objective(Dense(divergence=divergence.reverse_kl, coef=0.5))
    weighted = Objective(Dense(divergence=divergence.reverse_kl, weights=(weight.skip_special,)))
    assert measured(scaled) == measured(weighted) == {}


def test_the_latest_validation_is_shown_with_its_step_and_the_earlier_as_bars() -> None:
    track, _ = make_track()
    for step, accuracy in ((4, 0.0), (8, 0.5), (9, None), (10, 1.0)):
        track.add(report(step, accuracy=accuracy))
    assert ("accuracy", "1.000 at step 10") in track.figures
    assert track.sparkline == "▁▅█"


def test_lines_come_every_ten_seconds_and_with_every_validation() -> None:
    track, clock = make_track()
    text = io.StringIO()
    view = LinesView(track, Console(file=text, width=200))
    shown = []
    for step, now, accuracy in (
        (1, 0.0, None),
        (2, 1.0, None),
        (3, LINE_EVERY, None),
        (4, LINE_EVERY + 1, 0.5),
        (5, LINE_EVERY + 2, None),
        (10, LINE_EVERY + 3, None),
    ):
        clock.now = now
        track.add(report(step, accuracy=accuracy))
        before = text.tell()
        view.show()
        if text.tell() > before:
            shown.append(step)
    assert shown == [1, 3, 4, 10]


def test_the_panel_names_phase_step_and_what_happens_now() -> None:
    track, _ = make_track()
    track.add(report(3, accuracy=0.25))
    text = io.StringIO()
    Console(file=text, width=120).print(panel(track, "measuring"))
    for part in ("distilling", "step 3 of 10", "20.0 tokens", "left", "measuring"):
        assert part in text.getvalue()

"""The picture of a run is drawn from whatever a run can leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd.training.curves import draw_curves
from opd.training.folder import RunFolder, append_line

SCORE = {"value": 0.5, "low": 0.3, "high": 0.7, "n": 20}
NO_SCORE = {"value": None, "low": None, "high": None, "n": 20}


def summary(score: dict[str, Any] | None) -> dict[str, Any]:
    figures = {f"{who}_accuracy": score for who in ("start", "final", "teacher")}
    return {**figures, "method": "reverse_kl_opd", "tokens": 1234, "seconds": 5.6}


def log(folder: RunFolder, metrics: dict[str, list[float | None]], score: dict[str, Any]) -> None:
    append_line(folder.events, {"phase": "warmup", "step": 1, "metrics": metrics, "tokens": 0})
    append_line(folder.events, {"phase": "train", "step": 0, "evaluation": {"validation": score}})
    for step in (1, 2):
        event = {"phase": "train", "step": step, "metrics": metrics}
        append_line(folder.events, event | {"evaluation": {"validation": score}})


@pytest.mark.parametrize("score", [SCORE, NO_SCORE], ids=["verified", "no verifier"])
@pytest.mark.parametrize(
    "metrics",
    [
        {"loss/dense": [2.0, 4.0], "rollout/length": [40.0, 4.0], "student/entropy": [1.0, 4.0]},
        {"loss/a": [-2.0, 4.0], "loss/b": [None, 4.0], "rollout/accuracy": [1.0, 4.0]},
        {},
    ],
    ids=["plain", "negative and not finite", "nothing"],
)
def test_a_picture_is_drawn(
    metrics: dict[str, list[float | None]], score: dict[str, Any], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    log(folder, metrics, score)
    draw_curves(folder, summary(score))
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "events.jsonl"]


def test_a_run_without_a_step_has_a_picture_too(tmp_path: Path) -> None:
    draw_curves(RunFolder(tmp_path), summary(None))
    assert (tmp_path / "curves.png").stat().st_size > 1000

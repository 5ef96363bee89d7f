"""The embedded teachers come from nothing, by a run file that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.training.config import load
from opd.training.loop import train_run

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "teachers"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sort", "add", "chain"])
def test_the_recipe_rebuilds_a_teacher_of_at_least_95_percent(task: str, tmp_path: Path) -> None:
    run = load(RECIPES / f"{task}.toml", ["--output", str(tmp_path)])

    *_, last = train_run(run)

    assert last.summary is not None
    assert last.summary["final_accuracy"]["value"] >= 0.95
    weights = tmp_path / f"{task}-teacher" / "model" / "model.safetensors"
    assert weights.stat().st_size < 800_000, "bf16: two bytes for each of 365,376 parameters"

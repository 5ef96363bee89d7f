"""One tiny finished run that the commands look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.cli.main import main

SETTINGS = {
    "train.steps": 2,
    "train.prompts_per_step": 4,
    "warmup.steps": 1,
    "warmup.prompts_per_step": 4,
    "evaluate.prompts": 8,
    "evaluate.test_prompts": 8,
    "sampler.max_new_tokens": 24,
}
TINY = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the embedded default, cut short; every checkpoint is kept."""
    output = tmp_path_factory.mktemp("cli") / "runs"
    assert main(["run", *TINY, "--train.keep", "9", "--output", str(output)]) == 0
    return output / "sort-1"

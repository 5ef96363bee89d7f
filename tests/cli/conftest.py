"""One tiny finished run that the commands look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.cli.main import main

TINY = (
    "--train.steps 2 --warmup.steps 1 --evaluate.test_prompts 8 --evaluate.prompts 8 "
    "--train.prompts_per_step 4 --warmup.prompts_per_step 4 --sampler.max_new_tokens 24"
).split()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the embedded default, cut short."""
    output = tmp_path_factory.mktemp("cli") / "runs"
    assert main(["run", *TINY, "--train.keep", "9", "--output", str(output)]) == 0
    return output / "sort-1"

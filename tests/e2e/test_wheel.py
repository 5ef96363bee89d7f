"""The wheel that is built from the checkout runs the default without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_wheel_runs_the_default_in_an_empty_folder(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    wheels, site, empty = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(wheels)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = subprocess.run(
        [sys.executable, "-c", "import opd; print(opd.__file__)"],
        cwd=empty,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert where.startswith(str(site)), "the installed checkout must not shadow the wheel"

    ran = subprocess.run(
        [
            *(sys.executable, "-m", "opd", "run", "--train.steps", "3", "--warmup.steps", "3"),
            *("--evaluate.test_prompts", "16", "--evaluate.prompts", "16"),
        ],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert ran.returncode == 0, ran.stderr
    assert (empty / "runs" / "sort-1" / "curves.png").stat().st_size > 10_000
    assert wheel.stat().st_size < 4_000_000

"""Every published method has a recipe; each trains, and so do those of the frameworks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import opd
from opd import methods

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "methods"
FRAMEWORKS = list((ROOT / "recipes/frameworks").glob("*.toml"))
CPU_SECONDS = 90


def trained(folder: Path, *every: str) -> set[str]:
    """The recipes that were trained in a process of its own, none of which failed."""
    script = [sys.executable, "-m", "tests.e2e.every_method", str(folder), *every]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["failures"] == {}
    assert result["cpu_seconds"] <= CPU_SECONDS
    return {found.name for found in folder.iterdir() if (found / "events.jsonl").exists()}


@pytest.mark.slow
def test_every_recipe_trains_within_the_time(tmp_path: Path) -> None:
    frameworks = {f"framework_{file.stem}" for file in FRAMEWORKS}
    assert trained(tmp_path) == {*methods.__all__, *frameworks, "warm"}


def test_one_recipe_in_ten_trains(tmp_path: Path) -> None:
    found = trained(tmp_path, "10")
    assert {*methods.__all__[::10], "warm"} < found
    assert len(found) == -(-len(methods.__all__) // 10) + 1 + -(-len(FRAMEWORKS) // 10)


def test_recipes_have_nothing_against_them() -> None:
    of_every_kind = ("compass_opd", "distillm", "gae_opd", "gates", "opcd", "rlcsd", "verify_first")
    for name in of_every_kind:
        findings = opd.check(opd.load(RECIPES / f"{name}.toml"))
        assert [finding for finding in findings if finding.level == "error"] == [], name
    for name in methods.__all__:
        assert opd.load(RECIPES / f"{name}.toml").config.sampler.max_new_tokens == 64, name


def test_there_is_a_recipe_for_every_method_and_each_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs/make_method_recipes.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert {file.stem for file in RECIPES.glob("*.toml")} == set(methods.__all__)
    for name in methods.__all__:
        assert (RECIPES / f"{name}.toml").read_text(encoding="utf-8") == make.recipe(name), name

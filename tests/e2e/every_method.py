"""Train a few steps of every method's and framework's recipe in this process, from one student.

    python -m tests.e2e.every_method FOLDER [EVERY]

Methods that stay at teacher = student are also given themselves as teacher. Writes
`FOLDER/result.json`: what failed, by recipe, and the CPU-seconds of the whole process. With a
number only every so many are tried.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch

import opd
from opd import catalog, methods
from opd.training.loop import train_run

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "methods"
FRAMEWORKS = sorted((RECIPES.parent / "frameworks").glob("*.toml"))
STEPS = 3
SMALLEST_GRADIENT = {"": 1e-5, "gndpo": 1e-2}
"""In float32; where student and teacher differ it is 0.1 to 10. One method magnifies rounding."""

SMALL = [
    *("--warmup.steps", "0", "--train.steps", str(STEPS + 1), "--train.save_every", "0"),
    *("--train.prompts_per_step", "4", "--sampler.max_new_tokens", "24"),
    *("--evaluate.prompts", "1", "--evaluate.test_prompts", "1", "--evaluate.teacher", "false"),
    *("--evaluate.every", "0", "--data.held_out", "1", "--log.samples_per_step", "0"),
]


def warm_student(folder: Path) -> Path:
    """A model folder: the built-in student after some supervised steps."""
    settings = ["--train.steps", "40", "--train.prompts_per_step", "16", "--output", str(folder)]
    few = ["--evaluate.prompts", "8", "--evaluate.test_prompts", "8", "--evaluate.every", "0"]
    rest = ["--warmup.steps", "0", "--data.held_out", "8", "--name", "warm"]
    for _ in opd.train(opd.load(RECIPES / "sft.toml", [*settings, *few, *rest])):
        pass
    return folder / "warm" / "model"


def three_steps(recipe: Path, student: Path, folder: Path, name: str) -> None:
    """Train; whatever goes wrong raises."""
    here = ["--student.model", str(student), "--output", str(folder), "--name", name]
    run = opd.load(recipe, [*SMALL, *here])
    if recipe.parent == RECIPES and run.config.method.name != name:
        raise AssertionError(f"the recipe trains {run.config.method.name}")
    reports = train_run(run)
    steps = 0
    for report in reports:
        losses = [stat.mean for key, stat in report.metrics.items() if key.startswith("loss/")]
        if report.step:
            steps += 1
            if not report.tokens or not losses:
                raise AssertionError(f"step {report.step} saw no tokens or no loss")
            if not all(math.isfinite(loss) for loss in losses):
                raise AssertionError(f"step {report.step}: losses {losses}")
        if report.step == STEPS:  # the last step is left out, for it would draw curves
            break
    reports.close()
    if steps != STEPS:
        raise AssertionError(f"{steps} steps")


def stays_at_its_teacher(name: str, student: Path, folder: Path) -> None:
    """One step with every model the student: the gradient is nothing beside the usual one."""
    at_home = [*SMALL, "--teacher.model", str(student), "--output", str(folder), "--name", "same"]
    for view in getattr(methods, name)().views:
        if view.source == "teacher" and view.name != "teacher":
            at_home += [f"--teachers.{view.name.removeprefix('teacher.')}.model", str(student)]
    run = opd.load(RECIPES / f"{name}.toml", [*at_home, "--student.model", str(student)])
    reports = train_run(run)
    for report in reports:
        if report.step:
            break
    reports.close()
    size = report.metrics["optimizer/grad_norm"].mean
    shutil.rmtree(report.folder)
    if not size <= SMALLEST_GRADIENT.get(name, SMALLEST_GRADIENT[""]):
        raise AssertionError(f"with teacher = student the gradient is {size:g}")


def is_at_home(name: str) -> bool:
    """Whether a method says it stays where every model is the student and reads the same text."""
    method = getattr(methods, name)()
    stays = catalog.methods()[name].section("Stationary") in ("teacher", "its combination")
    asks = any(view.source == "teacher" for view in method.views)
    return stays and asks and not any(view.context for view in method.views)


def main(folder: Path, every: int = 1) -> None:
    """Every recipe in turn, or one of so many."""
    torch.set_num_threads(1)
    student, failures = warm_student(folder), {}
    for name in methods.__all__[::every]:
        try:
            three_steps(RECIPES / f"{name}.toml", student, folder, name)
            if is_at_home(name):
                stays_at_its_teacher(name, student, folder)
        except Exception as error:  # every method is tried
            failures[name] = f"{type(error).__name__}: {error}"
    for recipe in FRAMEWORKS[::every]:
        try:
            three_steps(recipe, student, folder, f"framework_{recipe.stem}")
        except Exception as error:  # every framework is tried
            failures[f"frameworks/{recipe.stem}"] = f"{type(error).__name__}: {error}"
    result = {"failures": failures, "cpu_seconds": time.process_time()}
    (folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

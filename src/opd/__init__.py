"""On-policy distillation of language models: a teacher's feedback on a student's own text.

    run = opd.load("my_run.toml")          # or opd.load() for the embedded default
    print(opd.explain(run))
    for report in opd.train(run):
        print(report.step, report.metrics)

Everything below is imported when it is first used: `import opd` alone stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.api import train
    from opd.objective import Dense, Method, Objective, Regulariser, Routed, Sampled
    from opd.training.check import Finding, check
    from opd.training.config import Run, load
    from opd.training.explain import Explanation, explain
    from opd.training.loop import StepReport
    from opd.training.measure import Measured, measure

__version__ = "0.1.0"

__all__ = [
    "Dense",
    "Explanation",
    "Finding",
    "Measured",
    "Method",
    "Objective",
    "Regulariser",
    "Routed",
    "Run",
    "Sampled",
    "StepReport",
    "check",
    "explain",
    "load",
    "measure",
    "train",
]

_HOMES = {
    "Dense": "opd.objective",
    "Explanation": "opd.training.explain",
    "Finding": "opd.training.check",
    "Measured": "opd.training.measure",
    "Method": "opd.objective",
    "Objective": "opd.objective",
    "Regulariser": "opd.objective",
    "Routed": "opd.objective",
    "Run": "opd.training.config",
    "Sampled": "opd.objective",
    "StepReport": "opd.training.loop",
    "check": "opd.training.check",
    "explain": "opd.training.explain",
    "load": "opd.training.config",
    "measure": "opd.training.measure",
    "train": "opd.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'opd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

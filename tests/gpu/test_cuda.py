"""What only an accelerator can show: the same run on CUDA, and in half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd.training.config import Run, from_tree
from opd.training.loop import StepReport, train_run
from tests.models_zoo import save_tiny
from tests.training.runs import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]


def run_on(device: str, folder: Path, dtype: str = "float32") -> list[StepReport]:
    config = from_tree(
        {
            **TINY,
            "student": {"model": "builtin:sort-student", "dtype": dtype},
            "teacher": {"model": "builtin:sort-teacher", "dtype": dtype},
            "method": {"name": "offpolicy_kd"},
            "sampler": {"max_new_tokens": 16, "temperature": 0.0},
            "device": device,
            "output": str(folder),
        }
    )
    return [report for report in train_run(Run(config, folder)) if report.tokens]


def test_greedy_text_gives_the_cpu_s_losses_on_cuda(tmp_path: Path) -> None:
    on_cpu = run_on("cpu", tmp_path / "cpu")
    on_cuda = run_on("cuda", tmp_path / "cuda")

    losses = [
        [report.metrics["loss/dense"].mean for report in reports] for reports in (on_cpu, on_cuda)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_on_cuda_is_finite(dtype: str, tmp_path: Path) -> None:
    reports = run_on("cuda", tmp_path, dtype)

    assert len(reports) == 4
    for report in reports:
        for name, stat in report.metrics.items():
            assert stat.mean == stat.mean, f"{name} is NaN at step {report.step}"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_teacher_equals_student_is_zero_on_cuda(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A+1"}\n{"prompt": "B+22"}\n' * 4)
    config = from_tree(
        {
            **TINY,
            "student": {"model": str(tmp_path / "model")},
            "teacher": {"model": str(tmp_path / "model")},
            "data": {"prompts": str(tmp_path / "prompts.jsonl"), "held_out": 1},
            "train": {"steps": 1, "prompts_per_step": 4},
            "device": "cuda",
            "output": str(tmp_path / "runs"),
        }
    )

    (report,) = (r for r in train_run(Run(config, tmp_path)) if r.tokens)

    assert abs(report.metrics["teacher/log_ratio"].mean) <= 1e-5
    assert abs(report.metrics["loss/dense"].mean) <= 1e-6

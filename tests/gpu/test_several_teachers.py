"""Teachers that take turns on a device whose memory is not the host's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.models import load_model
from opd.rollout.pack import to_device
from opd.teacher.local import LocalTeacher
from opd.teacher.turns import HostModel, Turns, TurnTeacher
from opd.training.loop import StepReport
from opd.types import TeacherRequest
from tests.teacher.test_local import packed, sampled
from tests.training.runs import finish, tiny_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]

TWO: Mapping[str, Any] = {
    "teacher": {"model": "", "route": "task"},
    "data": {"prompts": "task:add+sort"},
    "sampler": {"max_new_tokens": 16},
    "device": "cuda",
}


def run_with(keep: str, folder: Path) -> list[StepReport]:
    tables = {
        name: {"model": f"builtin:{name}-teacher", "dtype": "float32", "keep": keep}
        for name in ("add", "sort")
    }
    return [r for r in finish(tiny_run(folder, TWO, {"teachers": tables})) if r.tokens]


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_where_teachers_are_kept_changes_no_loss_on_cuda(keep: str, tmp_path: Path) -> None:
    there, parked = (run_with(where, tmp_path / where) for where in ("device", keep))
    for ours, theirs in zip(parked, there, strict=True):
        for name in ("loss/dense", "teacher/add/log_ratio", "teacher/sort/log_ratio"):
            if name in theirs.metrics:
                expected = pytest.approx(theirs.metrics[name].mean, rel=1e-3, abs=1e-4)
                assert ours.metrics[name].mean == expected


def test_after_its_turn_a_model_leaves_the_device_and_its_reply_stays() -> None:
    device = torch.device("cuda")
    here = load_model("builtin:sort-teacher", dtype="float32", device="cpu")
    written = sampled(load_model("builtin:sort-student", device="cpu"))
    batch = to_device(packed(written), device)
    there = load_model("builtin:sort-teacher", dtype="float32", device="cuda")
    expected = LocalTeacher(there, vocab_size=53).score(TeacherRequest(batch))
    teacher = TurnTeacher(HostModel(here, device), Turns(), vocab_size=53)
    reply = teacher.score(TeacherRequest(batch))
    model: Any = here.model
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert reply.hidden is not None
    assert expected.hidden is not None
    assert reply.unembedding is not None
    assert reply.unembedding.weight.is_cuda
    assert (reply.hidden - expected.hidden).abs().max() <= 1e-4

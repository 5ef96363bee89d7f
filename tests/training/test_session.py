"""What a session settles when it opens."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from opd.teacher.local import LocalTeacher
from opd.training.config import load
from opd.training.session import open_session
from opd.training.teachers import micro_batch_tokens


def test_zero_chooses_the_micro_batch_by_the_device_and_a_number_is_kept() -> None:
    cpu, accelerator = torch.device("cpu"), torch.device("cuda:0")
    assert (micro_batch_tokens(0, cpu), micro_batch_tokens(0, accelerator)) == (2048, 16384)
    assert micro_batch_tokens(77, cpu) == micro_batch_tokens(77, accelerator) == 77


@pytest.mark.parametrize(("settings", "expected"), [((0, 0), (2048, 2048)), ((99, 88), (99, 88))])
def test_student_and_teacher_get_the_micro_batch_that_was_chosen(
    settings: tuple[int, int], expected: tuple[int, int]
) -> None:
    words = ["--evaluate.prompts", "1", "--evaluate.test_prompts", "1", "--device", "cpu"]
    words += ["--train.max_tokens", str(settings[0]), "--teacher.max_tokens", str(settings[1])]
    session = open_session(load(None, words))
    teacher = session.teachers["teacher"]
    assert isinstance(teacher, LocalTeacher)
    assert (session.max_tokens, teacher.max_tokens) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    open_session(load(None, ["--evaluate.prompts", "1", "--evaluate.test_prompts", "1"]))

    def step() -> None:
        parts = [torch.ones(1000, 576) for _ in range(8)]
        del parts

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    for _ in range(5):
        step()
    before = faults()
    for _ in range(20):
        step()
    assert faults() - before < 1000  # 18 MB a step are 4,500 pages

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd.errors import ConfigError
from opd.models import LoadedModel, LoraSettings, load_model
from opd.rollout.local import LocalSampler
from opd.rollout.pack import pack_rollout
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.teacher.self_teacher import AverageTeacher, frozen_copy
from opd.types import Batch, Prompt, SamplerSettings, TeacherRequest
from tests.models_zoo import PAD, save_tiny, tiny


def batch_of(loaded: LoadedModel) -> Batch:
    rollout = LocalSampler(loaded).sample(
        [Prompt(str(i), tuple(range(3, 6 + i)), "") for i in range(3)],
        SamplerSettings(max_new_tokens=5),
        generator=torch.Generator().manual_seed(0),
    )
    return pack_rollout(rollout, pad_id=PAD)


def weights(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in Student(loaded).trainable().items()}


def shift(loaded: LoadedModel, amount: float) -> None:
    """What an optimizer does: change the trained weights in place."""
    with torch.no_grad():
        for number, parameter in enumerate(Student(loaded).trainable().values()):
            parameter.add_(amount * (1 + number % 3))


@pytest.fixture
def adapted(tmp_path: Path) -> LoadedModel:
    folder = save_tiny("llama", tmp_path / "base")
    return load_model(folder, device="cpu", lora=LoraSettings(r=2))


def average_of(student: LoadedModel, decay: float) -> AverageTeacher:
    return AverageTeacher(student, decay=decay, vocab_size=53)


def test_a_frozen_copy_stays_as_the_student_was() -> None:
    student = tiny("llama")
    frozen = frozen_copy(student)
    before = LocalTeacher(student, vocab_size=53).score(TeacherRequest(batch_of(student))).hidden
    batch = batch_of(student)
    shift(student, 0.1)
    now = LocalTeacher(frozen, vocab_size=53).score(TeacherRequest(batch)).hidden
    assert now is not None
    assert before is not None
    assert torch.equal(now, before)
    assert not Student(frozen).trainable()


@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_the_average_follows_its_recursion(decay: float) -> None:
    """Three steps, written out: e1 = d e0 + (1 - d) s1, and so on."""
    student = tiny("llama")
    teacher = average_of(student, decay)
    expected = weights(student)
    for amount in (0.3, -0.2, 0.05):
        shift(student, amount)
        teacher.update()
        now = weights(student)
        expected = {n: decay * e + (1 - decay) * now[n] for n, e in expected.items()}
    held = dict(teacher.loaded.model.named_parameters())
    for name, value in expected.items():
        assert (held[name] - value).abs().max() <= 1e-6, name
        assert (held[name] - weights(student)[name]).abs().max() > 1e-3, name


def test_before_any_update_the_average_is_the_student_of_then() -> None:
    student = tiny("llama")
    teacher, batch = average_of(student, 0.9), batch_of(student)
    then = LocalTeacher(student, vocab_size=53).score(TeacherRequest(batch)).hidden
    shift(student, 0.2)
    now = teacher.score(TeacherRequest(batch)).hidden
    assert now is not None
    assert then is not None
    assert torch.equal(now, then)


def test_with_an_adapter_only_the_adapter_is_averaged_and_the_base_is_shared(
    adapted: LoadedModel,
) -> None:
    teacher = average_of(adapted, 0.5)
    before = weights(adapted)
    shift(adapted, 0.2)
    teacher.update()
    own = dict(adapted.model.named_parameters())
    held = dict(teacher.loaded.model.named_parameters())
    assert before.keys() == teacher.average.keys()
    for name, parameter in own.items():
        if name in before:
            middle = (before[name] + parameter.detach()) / 2
            assert (held[name] - middle).abs().max() <= 1e-6, name
        else:
            assert held[name] is parameter, name


def test_an_average_in_half_precision_does_not_stall() -> None:
    """A share of 0.001 of a step of 1/128 is far below a bfloat16's last digit of a weight."""
    student = tiny("llama")
    student.model.to(torch.bfloat16)  # type: ignore[arg-type]
    teacher = average_of(student, 0.999)
    before = {name: value.clone() for name, value in teacher.average.items()}
    with torch.no_grad():
        for parameter in Student(student).trainable().values():
            parameter.add_(1 / 128)
    for _ in range(50):
        teacher.update()
    moved = [float((teacher.average[n] - value).abs().mean()) for n, value in before.items()]
    # 1 - 0.999^50 = 0.0488 of the way of 1/128, give or take the student's own rounding
    assert all(0.5 * 0.0488 / 128 < step < 2 * 0.0488 / 128 for step in moved)
    held = dict(teacher.loaded.model.named_parameters())
    assert all(
        torch.equal(held[n], average.to(torch.bfloat16)) for n, average in teacher.average.items()
    )


def test_a_saved_average_continues_bit_for_bit() -> None:
    student = tiny("llama")
    teacher = average_of(student, 0.9)
    shift(student, 0.1)
    teacher.update()
    saved = {name: value.clone() for name, value in teacher.average.items()}
    again = average_of(student, 0.9)
    again.load(saved)
    shift(student, -0.3)
    for one in (teacher, again):
        one.update()
    batch = batch_of(student)
    first, second = (one.score(TeacherRequest(batch)).hidden for one in (teacher, again))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_the_average_of_another_model_is_refused(adapted: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="the saved average is of another model: only one"):
        average_of(adapted, 0.9).load(average_of(tiny("llama"), 0.9).average)

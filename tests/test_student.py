from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opd import methods
from opd.models import LoadedModel
from opd.objective import Method
from opd.rollout.pack import join_parts, pack_rollout, split, with_token
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.types import Batch, FieldKey, TeacherRequest, pack_rows
from tests.builders import STUDENT, TEACHER, Case, rollout_of, with_reduction
from tests.models_zoo import FAMILIES, PAD, tiny
from tests.reference import objectives as ref

LOGP = FieldKey("student_logp")
PECULIAR = ("llama", "gemma2", "granite", "cohere", "gpt_neox")


def double(family: str, **settings: Any) -> LoadedModel:
    loaded = tiny(family, **settings)
    loaded.model.double()  # type: ignore[operator]
    return loaded


def packed(writers: tuple[int, ...] = (STUDENT,), lengths: tuple[int, ...] = (4, 0, 5, 1)) -> Batch:
    """Responses after two-token prompts, in the characters of the tiny tokenizer."""
    case = Case.random(0, lengths=lengths, writers=writers, vocab_size=50)
    prompts = tuple((3 + b, 5 + 2 * b) for b in range(len(lengths)))
    rollout = rollout_of(case.tokens + 3, case.mask, case.provenance, prompt_ids=prompts)
    return pack_rollout(rollout, pad_id=PAD)


def scored(batch: Batch, teacher: LoadedModel) -> Batch:
    reply = LocalTeacher(teacher, vocab_size=53).score(TeacherRequest(batch))
    return with_token(batch, views={"teacher": reply})


def logits_of(loaded: LoadedModel, batch: Batch) -> Tensor:
    """`[B, T, V]` by the family's own forward: after prompts of two, token t is read off at 1 + t.

    On the same padded batch, because some families round to float32 inside, and so differently
    for other shapes. That padding changes nothing is a claim of its own, below.
    """
    model: Any = loaded.model
    logits: Tensor = model(batch.input_ids).logits[:, 1:-1, :53]
    return logits


METHODS = {
    "reverse_kl_opd": (methods.reverse_kl_opd(), ref.reverse_kl_opd, STUDENT),
    "vopd": (methods.vopd(), ref.vopd, STUDENT),
    "offpolicy_kd": (methods.offpolicy_kd(), ref.offpolicy_kd, TEACHER),
}


@pytest.mark.parametrize("family", PECULIAR)
@pytest.mark.parametrize("name", list(METHODS))
def test_a_real_models_loss_and_gradient_equal_the_transcription(family: str, name: str) -> None:
    method, transcription, writer = METHODS[name]
    loaded, teacher = double(family, seed=0), double(family, seed=1, layers=1, hidden=16)
    batch = scored(packed((writer,)), teacher)
    student = Student(loaded)
    out = student(batch, with_reduction(method, "sequence_mean"))
    assert out.loss is not None
    out.loss.backward()
    ours = gradients(student)

    student.zero_grad()
    student_logits = logits_of(loaded, batch)
    token = batch.token
    expected = transcription(
        student_logits.detach().numpy(),
        logits_of(teacher, batch).detach().numpy(),
        token.tokens.numpy(),
        token.mask.numpy(),
        token.provenance.numpy(),
        reduction=ref.sequence_mean,
    )
    assert float(out.loss.detach()) == pytest.approx(expected.loss, abs=1e-10)
    student_logits.backward(torch.tensor(expected.gradient))
    for parameter, gradient in gradients(student).items():
        assert (ours[parameter] - gradient).abs().max() <= 1e-10, parameter


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_beside_a_sequence_changes_nothing(family: str) -> None:
    student, batch = Student(tiny(family)), packed()
    together = student(batch, wanted=frozenset({LOGP})).fields[LOGP]
    alone = [
        (part.rows, student(part.batch, wanted=frozenset({LOGP})).fields[LOGP])
        for part in split(batch, max_tokens=1)
    ]
    assert (join_parts(alone, len(together)) - together).abs().max() <= 1e-5


def gradients(student: Student) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in student.trainable().items()
        if parameter.grad is not None
    }


def test_every_trainable_parameter_is_reached() -> None:
    student = Student(tiny("qwen3", tie_word_embeddings=False))
    out = student(scored(packed(), tiny("qwen3", seed=1)), methods.reverse_kl_opd().objective)
    assert out.loss is not None
    out.loss.backward()
    assert gradients(student).keys() == student.trainable().keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients(student).values())


@pytest.mark.parametrize("method", [methods.reverse_kl_opd(), methods.vopd()], ids=lambda m: m.name)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_micro_batches_of_a_real_model_add_up(
    method: Method, dtype: torch.dtype, bound: float
) -> None:
    loaded, teacher = (tiny("llama", seed=seed) for seed in (0, 1))
    for each in (loaded, teacher):
        each.model.to(dtype)  # type: ignore[arg-type]
    student = Student(loaded)
    batch = scored(packed(lengths=(4, 0, 5, 1, 3)), teacher)
    found = []
    for max_tokens in (10_000, 15, 1):
        student.zero_grad()
        for part in split(batch, max_tokens=max_tokens):
            loss = student(part.batch, method.objective).loss
            assert loss is not None
            loss.backward()
        found.append(gradients(student))
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert (other[name] - gradient).abs().max() <= bound, name


def test_padding_rows_of_a_model_change_nothing() -> None:
    plain, padded = tiny("llama"), tiny("llama", padded_to=64)
    state = padded.model.state_dict()
    for name, value in plain.model.state_dict().items():
        state[name][: value.shape[0]] = value
    padded.model.load_state_dict(state)
    batch = scored(packed(), tiny("llama", seed=1, padded_to=60))
    ours, theirs = (
        Student(loaded)(batch, methods.reverse_kl_opd().objective) for loaded in (plain, padded)
    )
    assert ours.loss is not None
    assert theirs.loss is not None
    assert padded.model.get_output_embeddings().weight.shape[0] == 64  # type: ignore[operator]
    assert torch.equal(ours.loss, theirs.loss)


def test_without_an_objective_there_is_no_gradient_and_only_what_was_wanted() -> None:
    out = Student(tiny("llama"))(packed(), wanted=frozenset({LOGP}))
    assert out.loss is None
    assert out.fields.keys() == {LOGP}
    assert not out.fields[LOGP].requires_grad


def test_dropout_stays_off() -> None:
    loaded = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    student, batch = Student(loaded), packed()
    student.train()
    first, second = (student(batch, wanted=frozenset({LOGP})).fields[LOGP] for _ in range(2))
    assert torch.equal(first, second)
    assert not student.training
    assert not loaded.model.training


def test_the_sampler_borrows_the_bare_model_without_gradient() -> None:
    loaded = tiny("llama")
    with Student(loaded).for_generation() as borrowed:
        assert borrowed is loaded
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_only_what_may_change_is_trainable() -> None:
    loaded = tiny("llama")
    loaded.model.requires_grad_(False)
    assert Student(loaded).trainable() == {}
    norm: Any = loaded.model.get_submodule("model.norm")
    norm.weight.requires_grad_(True)
    assert list(Student(loaded).trainable()) == ["model.norm.weight"]


def test_a_smaller_shared_vocabulary_takes_the_mass_of_the_others_away() -> None:
    loaded, batch = tiny("llama"), packed()
    batch = with_token(batch, tokens=batch.token.tokens.clamp(max=39))
    narrow = Student(loaded, vocab_size=40)(batch, wanted=frozenset({LOGP})).fields[LOGP]
    logits = logits_of(loaded, batch)[..., :40].log_softmax(-1)
    expected = logits.gather(-1, batch.token.tokens.unsqueeze(-1)).squeeze(-1)
    assert (narrow - pack_rows(expected, batch.token.mask)).abs().max() <= 1e-5


def test_the_temperature_of_a_visit_divides_the_logits() -> None:
    loaded, batch = tiny("llama"), packed()
    warm = Student(loaded)(batch, wanted=frozenset({LOGP}), temperature=2.0).fields[LOGP]
    logits = (logits_of(loaded, batch) / 2).log_softmax(-1)
    expected = logits.gather(-1, batch.token.tokens.unsqueeze(-1)).squeeze(-1)
    assert (warm - pack_rows(expected, batch.token.mask)).abs().max() <= 1e-5

"""The local teacher alone, and the whole pipeline where the teacher is the student."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd import catalog, methods
from opd.errors import ConfigError
from opd.head import log_probs_of
from opd.models import LoadedModel, LoraSettings, load_model
from opd.objective import Method
from opd.rollout.local import LocalSampler
from opd.rollout.pack import pack_rollout
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.training import step as steps
from opd.training.plan import make_plan
from opd.types import (
    Batch,
    FieldKey,
    Need,
    Prompt,
    Provenance,
    Rollout,
    SamplerSettings,
    Stat,
    TeacherRequest,
    pack_rows,
)
from tests.models_zoo import EOS, FAMILIES, PAD, save_tiny, tiny

PROMPTS = [Prompt(str(i), tuple(range(3, 6 + i)), "") for i in range(4)]
SAMPLER = SamplerSettings(max_new_tokens=7)
LOGP = FieldKey("student_logp")


def sampled(
    loaded: LoadedModel, provenance: Provenance = Provenance.STUDENT, top_k: int = 0
) -> Rollout:
    settings = SamplerSettings(max_new_tokens=7, student_top_k=top_k)
    generator = torch.Generator().manual_seed(0)
    return LocalSampler(loaded, provenance=provenance).sample(
        PROMPTS, settings, generator=generator
    )


def packed(rollout: Rollout, merge_ids: tuple[tuple[int, ...], ...] = ()) -> Batch:
    return pack_rollout(rollout, pad_id=PAD, special_ids=(PAD,), merge_ids=merge_ids)


# --------------------------------------------------------------------------------------------
# The teacher alone


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return tiny("llama", seed=1)


@pytest.fixture(scope="module")
def batch(teacher: LoadedModel) -> Batch:
    return packed(sampled(teacher))


def whole(teacher: LoadedModel, request: TeacherRequest, max_tokens: int = 16384) -> Tensor:
    """The distribution of every row, from a reply of hidden states."""
    scorer = LocalTeacher(teacher, vocab_size=53, max_tokens=max_tokens)
    reply = scorer.score(replace(request, distribution=True))
    assert reply.hidden is not None
    assert reply.unembedding is not None
    return log_probs_of(
        reply.hidden,
        reply.unembedding,
        temperature=request.temperature,
        merge_ids=request.batch.merge_ids,
    )


def test_a_distribution_is_answered_with_hidden_states_and_nothing_of_vocabulary_size(
    teacher: LoadedModel, batch: Batch
) -> None:
    reply = LocalTeacher(teacher, vocab_size=53).score(TeacherRequest(batch))
    rows = batch.row_index.shape[0]
    assert reply.hidden is not None
    assert reply.hidden.shape == (rows, 32)
    assert not reply.hidden.requires_grad
    assert reply.log_probs is None
    assert reply.sampled_logp is None
    assert reply.provenance == {"reference": "tiny-llama"}


@pytest.mark.parametrize("max_tokens", [1, 20])
def test_how_many_tokens_fit_a_forward_changes_nothing(
    teacher: LoadedModel, batch: Batch, max_tokens: int
) -> None:
    request = TeacherRequest(batch)
    difference = whole(teacher, request, max_tokens) - whole(teacher, request)
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("merge_ids", [(), ((EOS, 7, 9),)])
def test_numbers_of_chosen_tokens_are_those_of_the_distribution(
    teacher: LoadedModel, temperature: float, merge_ids: tuple[tuple[int, ...], ...]
) -> None:
    batch = packed(sampled(teacher), merge_ids)
    ids = torch.tensor([[3, EOS]]).expand(batch.row_index.shape[0], 2)
    request = TeacherRequest(batch, False, True, top_k=4, ids=ids, temperature=temperature)
    reply = LocalTeacher(teacher, vocab_size=53, max_tokens=20).score(request)
    log_probs = whole(teacher, request)
    tokens = pack_rows(batch.token.tokens, batch.token.mask)
    for group in merge_ids:
        tokens = torch.where(torch.isin(tokens, torch.tensor(group)), group[0], tokens)
    assert reply.hidden is None
    assert reply.sampled_logp is not None
    assert reply.top_logp is not None
    assert reply.top_ids is not None
    assert reply.ids_logp is not None
    expected = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert (reply.sampled_logp - expected).abs().max() <= 1e-5
    assert (reply.ids_logp - log_probs.gather(1, ids)).abs().max() <= 1e-5
    assert (reply.top_logp - log_probs.topk(4).values).abs().max() <= 1e-5
    assert (reply.top_logp - log_probs.gather(1, reply.top_ids)).abs().max() <= 1e-5


def test_more_top_tokens_than_there_are_is_refused(teacher: LoadedModel, batch: Batch) -> None:
    with pytest.raises(ConfigError, match="k = 54 tokens does not fit a vocabulary of 53"):
        LocalTeacher(teacher, vocab_size=53).score(TeacherRequest(batch, False, top_k=54))


def test_a_model_in_memory_can_answer_every_need(teacher: LoadedModel) -> None:
    scorer = LocalTeacher(teacher, vocab_size=53)
    assert all(
        scorer.can(need)
        for name in methods.__all__
        for need in getattr(methods, name)().objective.needs
    )
    assert scorer.can(Need("reference", "top_ids", "own_top", 8))


def test_the_student_at_step_zero_is_the_model_without_its_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = save_tiny("llama", tmp_path / "base")
    base = load_model(folder, device="cpu")
    adapted = load_model(folder, device="cpu", lora=LoraSettings(r=2))
    with torch.no_grad():
        for parameter in Student(adapted).trainable().values():
            parameter.add_(0.3)
    request = TeacherRequest(packed(sampled(base)))
    now, before, start = (
        LocalTeacher(loaded, vocab_size=53, without_adapter=without).score(request).hidden
        for loaded, without in ((adapted, False), (adapted, True), (base, False))
    )
    assert now is not None
    assert before is not None
    assert start is not None
    assert (before - start).abs().max() <= 1e-5
    assert (now - start).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------
# Teacher = student through the whole pipeline


@dataclass(frozen=True)
class Step:
    """What one step of a method said, and the norm of its gradient."""

    metrics: Mapping[str, Stat]
    log_ratio: Tensor
    gradient: float
    batch: Batch

    @property
    def loss(self) -> float:
        """The mean over tokens."""
        (name,) = (name for name in self.metrics if name.startswith("loss/"))
        return self.metrics[name].mean


def one_step(method: Method, loaded: LoadedModel, teacher: LoadedModel, rollout: Rollout) -> Step:
    """Pack, observe, score, signal, update: what the loop does between sampler and optimizer."""
    student, budget = Student(loaded), 40
    plan = make_plan(method, SAMPLER)
    objective, batch = method.objective, packed(rollout)
    batch = steps.observe(student, batch, rollout, objective, plan, budget)
    teachers = {"teacher": LocalTeacher(teacher, vocab_size=53, max_tokens=30)}
    batch = steps.score(teachers, batch, objective, plan)
    batch = steps.signal(student, batch, objective, plan, budget, fresh=True)
    student.zero_grad(set_to_none=True)
    metrics = steps.update(student, batch, objective, budget, step=1)
    gradients = [p.grad for p in student.trainable().values() if p.grad is not None]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    rows = student(batch, objective).rows
    return Step(metrics, rows.get("log_ratio", torch.zeros(1)), norm, batch)


def data_rollout(rollout: Rollout) -> Rollout:
    prompts = [
        Prompt(prompt.id, prompt.prompt_ids, "", response_ids=tuple(response[:length]))
        for prompt, response, length in zip(
            rollout.prompts, rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True
        )
    ]
    return steps.rollout_from_data(prompts)


def written_for(method: Method, loaded: LoadedModel) -> Rollout:
    """The text of the process that the method's states name, or the student's if it is mixed."""
    if method.states.teacher:
        return sampled(loaded, Provenance.TEACHER)
    if method.states.student == 0:
        return data_rollout(sampled(loaded))
    return sampled(loaded)


OF_EVERY_ROUTE = (
    "gkd",
    "offpolicy_kd",
    "reverse_kl_opd",
    "sampled_token_opd",
    "sft",
    "sft_on_teacher",
    "top_k_opd",
    "vopd",
)
"""The rest is asked of a small model in `tests/e2e/every_method.py`."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_its_own_teacher_stays_where_its_method_says(family: str) -> None:
    loaded, other = tiny(family), tiny(family, seed=1)
    twin = copy(loaded)
    twin.model = deepcopy(loaded.model)
    for name in OF_EVERY_ROUTE:
        method: Method = getattr(methods, name)()
        rollout = written_for(method, twin)
        same = one_step(method, loaded, twin, rollout)
        assert same.log_ratio.abs().max() <= 1e-5, name
        token = same.batch.token
        if catalog.methods()[name].section("Stationary") == "teacher":
            different = one_step(method, loaded, other, rollout)
            assert abs(same.loss) <= 1e-6, name
            assert different.gradient > 1e-2, name
            assert same.gradient <= 1e-4 * different.gradient, name
        else:
            out = Student(loaded)(same.batch, wanted=frozenset({LOGP}))
            assert same.loss == pytest.approx(-float(out.fields[LOGP].mean()), rel=1e-5), name
            assert same.gradient > 1e-2, name
        if (token.provenance == Provenance.STUDENT).any():
            sampler_logp = pack_rows(token.sampler_logp, token.mask)
            logp = Student(loaded)(same.batch, wanted=frozenset({LOGP})).fields[LOGP]
            assert (sampler_logp - logp).abs().max() <= 1e-5, name

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd import methods
from opd.errors import TeacherError, TrainingError
from opd.formula import credit, divergence, reward, support, surrogate
from opd.objective import Dense, Method, Objective, Sampled
from opd.rollout.local import LocalSampler
from opd.rollout.pack import merge_rollouts, pack_rollout
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.training import step as steps
from opd.training.plan import Plan, make_plan
from opd.types import (
    Batch,
    Need,
    Prompt,
    Provenance,
    Rollout,
    SamplerSettings,
    StateSource,
    TeacherRequest,
    TeacherScores,
    pack_rows,
)
from tests.models_zoo import EOS, PAD, tiny

LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)
RETURNS = replace(LOG_RATIO, credit=credit.return_to_go)
REVERSE_KL = Dense(divergence=divergence.reverse_kl)
TOP_K = replace(REVERSE_KL, support=partial(support.student_top_k, k=4), tail="bucket")
CLIPPED = replace(LOG_RATIO, surrogate=partial(surrogate.clipped, low=0.2, high=0.2))
SETTINGS = SamplerSettings(max_new_tokens=6)
PROMPTS = [Prompt(str(i), (3 + i, 7, 9)[: 1 + i % 3], "") for i in range(5)]


def sampled(student: Student, settings: SamplerSettings, prompts: list[Prompt]) -> Rollout:
    sampler = LocalSampler(student.loaded)
    return sampler.sample(prompts, settings, generator=torch.Generator().manual_seed(1))


def prepared(
    method: Method,
    *,
    settings: SamplerSettings = SETTINGS,
    merge_ids: tuple[tuple[int, ...], ...] = (),
    max_tokens: int = 1000,
) -> tuple[Student, Batch, Plan, Rollout]:
    """A step up to and including the teacher."""
    student = Student(tiny("llama"))
    plan = make_plan(method, settings, merge_ids=merge_ids)
    rollout = sampled(student, plan.sampler, PROMPTS)
    batch = pack_rollout(rollout, pad_id=PAD, special_ids=(PAD,), merge_ids=merge_ids)
    batch = steps.observe(student, batch, rollout, method.objective, plan, max_tokens)
    teachers = {"teacher": LocalTeacher(tiny("llama", seed=1), vocab_size=53)}
    return student, steps.score(teachers, batch, method.objective, plan), plan, rollout


# --------------------------------------------------------------------------------------------
# Who writes


shares = st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10)).filter(any)


@given(parts=shares, total=st.integers(1, 12), step_count=st.integers(1, 60))
def test_shares_are_exact_over_many_steps_and_never_negative(
    parts: tuple[int, int, int], total: int, step_count: int
) -> None:
    source = [part / sum(parts) for part in parts]
    written = [0, 0, 0]
    for step in range(step_count):
        counts = steps.share_out(total, source, step)
        assert sum(counts) == total
        assert min(counts) >= 0
        assert all(count == 0 for count, part in zip(counts, parts, strict=True) if part == 0)
        written = [have + more for have, more in zip(written, counts, strict=True)]
        for have, share in zip(written, source, strict=True):
            assert abs(have - share * total * (step + 1)) <= 2


@pytest.mark.parametrize("step", [0, 1, 10**6, 10**9])
def test_shares_stay_whole_late_in_a_run(step: int) -> None:
    assert steps.share_out(64, (1.0, 0.0, 0.0), step) == [64, 0, 0]
    assert steps.share_out(64, (0.0, 0.0, 1.0), step) == [0, 0, 64]
    assert steps.share_out(64, (0.5, 0.5, 0.0), step) == [32, 32, 0]
    thirds = steps.share_out(64, (1 / 3, 1 / 3, 1 / 3), step)
    assert sum(thirds) == 64
    assert all(21 <= count <= 22 for count in thirds)


def test_the_datas_own_responses_become_a_rollout() -> None:
    prompts = [
        Prompt("a", (3, 4), "", response_ids=(5, 6, 7), response_mask=(True, False, True)),
        Prompt("b", (3,), "", response_ids=(8,), model_inputs={"x": torch.zeros(1, 1)}),
        Prompt("c", (3,), ""),
    ]
    rollout = steps.rollout_from_data(prompts)
    data, tool, none = int(Provenance.DATA), int(Provenance.TOOL), int(Provenance.PADDING)
    assert rollout.tokens.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert rollout.mask.tolist() == [[True, False, True], [True, False, False], [False] * 3]
    assert rollout.provenance.tolist() == [[data, tool, data], [data, none, none], [none] * 3]
    assert (rollout.policy_version == -1).all()
    assert rollout.lengths.tolist() == [3, 1, 0]
    assert rollout.prompts == tuple(prompts)
    assert rollout.model_inputs[1] is prompts[1].model_inputs


# --------------------------------------------------------------------------------------------
# Observe


def test_on_the_same_policy_the_sampler_tells_the_old_logp() -> None:
    _, batch, plan, _ = prepared(Method(Objective(CLIPPED)))
    assert plan.same_policy
    assert batch.token.old_logp is batch.token.sampler_logp


@pytest.mark.parametrize("max_tokens", [1000, 9])
def test_a_truncated_sampler_is_corrected_by_a_visit(max_tokens: int) -> None:
    settings = replace(SETTINGS, top_k=5)
    method = Method(Objective(CLIPPED))
    student, batch, _, _ = prepared(method, settings=settings, max_tokens=max_tokens)
    assert batch.token.old_logp is not None
    mask = batch.token.mask
    old, own = batch.token.old_logp[mask], batch.token.sampler_logp[mask]
    assert (own - old > 0.1).any(), "truncation makes every sampled token likelier"
    clipped = gradient_of(student, batch, method.objective)
    plain = gradient_of(student, batch, Objective(LOG_RATIO))
    assert all((clipped[name] - plain[name]).abs().max() <= 1e-6 for name in plain)


def test_top_ids_of_the_sampler_and_of_a_visit_are_the_same_set() -> None:
    method = Method(Objective(TOP_K))
    _, from_sampler, plan, _ = prepared(method)
    assert plan.observe == ()
    mixed = replace(method, states=StateSource(student=0.5, data=0.5))
    _, from_visit, plan, _ = prepared(mixed, max_tokens=9)
    assert plan.observe == ("student_top_ids",)
    one, two = from_sampler.token.student_top_ids, from_visit.token.student_top_ids
    assert one is not None
    assert two is not None
    assert torch.equal(one.sort(-1).values, two.sort(-1).values)


def test_top_ids_survive_a_rollout_that_was_sampled_in_two_calls() -> None:
    method = Method(Objective(TOP_K))
    student, plan = Student(tiny("llama")), make_plan(Method(Objective(TOP_K)), SETTINGS)
    parts = [sampled(student, plan.sampler, half) for half in (PROMPTS[:2], PROMPTS[2:])]
    rollout = merge_rollouts(parts, pad_id=PAD)
    batch = pack_rollout(rollout, pad_id=PAD)
    batch = steps.observe(student, batch, rollout, method.objective, plan, 1000)
    assert batch.token.student_top_ids is not None
    assert batch.token.student_top_ids.shape == (batch.row_index.shape[0], 4)


def test_a_sampler_that_forgot_the_top_ids_is_named() -> None:
    method = Method(Objective(TOP_K))
    student, batch, plan, rollout = prepared(method)
    forgot = replace(rollout, sampler_top_ids=None)
    with pytest.raises(TrainingError, match="the sampler returned no top ids"):
        steps.observe(student, batch, forgot, method.objective, plan, 1000)


# --------------------------------------------------------------------------------------------
# Score


class Recorder:
    """A teacher that keeps the requests and passes them on to a real one."""

    def __init__(self) -> None:
        self.requests: list[TeacherRequest] = []
        self._teacher = LocalTeacher(tiny("llama", seed=1), vocab_size=53)

    def score(self, request: TeacherRequest) -> TeacherScores:
        self.requests.append(request)
        return self._teacher.score(request)

    def can(self, need: Need) -> bool:
        return True


@pytest.mark.parametrize(
    ("name", "distribution", "sampled_too"),
    [
        ("reverse_kl_opd", True, False),
        ("vopd", True, True),
        ("sampled_token_opd", False, True),
        ("sft", None, None),
    ],
)
def test_a_teacher_is_asked_for_what_the_objective_needs_and_no_more(
    name: str, distribution: bool | None, sampled_too: bool | None
) -> None:
    method: Method = getattr(methods, name)()
    student, teacher = Student(tiny("llama")), Recorder()
    plan = make_plan(method, SETTINGS)
    batch = pack_rollout(sampled(student, SETTINGS, PROMPTS), pad_id=PAD)
    scored = steps.score({"teacher": teacher}, batch, method.objective, plan)
    if distribution is None:
        assert teacher.requests == []
        assert scored is batch
        return
    (request,) = teacher.requests
    assert request.distribution is distribution
    assert request.sampled is sampled_too
    assert (scored.token.views["teacher"].hidden is not None) is distribution


def test_plain_numbers_are_asked_for_at_the_temperature_of_the_comparison() -> None:
    warm = Objective(LOG_RATIO, temperature=0.7)
    beside = Objective(LOG_RATIO, replace(REVERSE_KL, coef=0.0), temperature=0.7)
    student, numbers, _, _ = prepared(Method(warm))
    _, distribution, _, _ = prepared(Method(beside))
    assert numbers.token.views["teacher"].hidden is None
    assert distribution.token.views["teacher"].hidden is not None
    one, two = (student(batch, warm).rows["log_ratio"] for batch in (numbers, distribution))
    assert (one - two).abs().max() <= 1e-5


class SaysLittle(Recorder):
    """A teacher that leaves the distribution out, whatever it was asked."""

    def score(self, request: TeacherRequest) -> TeacherScores:
        return super().score(replace(request, distribution=False))


def test_a_reply_without_the_distribution_that_was_asked_for_is_refused() -> None:
    student, batch, plan, _ = prepared(methods.reverse_kl_opd())
    objective = methods.reverse_kl_opd().objective
    batch = steps.score({"teacher": SaysLittle()}, batch, objective, plan)
    with pytest.raises(TeacherError, match="'teacher' returned no distribution"):
        steps.update(student, batch, objective, 1000, step=1)


# --------------------------------------------------------------------------------------------
# Signal and update


def gradient_of(
    student: Student, batch: Batch, objective: Objective, max_tokens: int = 1000
) -> dict[str, Tensor]:
    student.zero_grad(set_to_none=True)
    steps.update(student, batch, objective, max_tokens, step=1)
    return {
        name: parameter.grad.clone()
        for name, parameter in student.trainable().items()
        if parameter.grad is not None
    }


OBJECTIVES = {
    "dense": Objective(REVERSE_KL),
    "sampled": methods.vopd().objective,
    "coupled": Objective(RETURNS),
    "coupled with baseline": Objective(replace(RETURNS, baseline=credit.expected_reward)),
    "top k and returns": Objective(replace(TOP_K, reduction="sequence_mean"), RETURNS),
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_token_budget_changes_neither_gradient_nor_metrics(name: str) -> None:
    objective = OBJECTIVES[name]
    student, batch, plan, _ = prepared(Method(objective))
    found = []
    for max_tokens in (1000, 20, 1):
        settled = steps.signal(student, batch, objective, plan, max_tokens, fresh=False)
        student.zero_grad(set_to_none=True)
        metrics = steps.update(student, settled, objective, max_tokens, step=1)
        found.append((metrics, gradient_of(student, settled, objective, max_tokens)))
    whole_metrics, whole = found[0]
    for metrics, gradient in found[1:]:
        assert metrics.keys() == whole_metrics.keys()
        for metric, stat in whole_metrics.items():
            assert metrics[metric].count == stat.count
            assert metrics[metric].mean == pytest.approx(stat.mean, rel=1e-5, abs=1e-6)
        for parameter, value in whole.items():
            assert (gradient[parameter] - value).abs().max() <= 1e-6, parameter


def test_a_fresh_signal_from_the_sampler_is_that_of_a_visit() -> None:
    objective = Objective(RETURNS)
    student, batch, plan, _ = prepared(Method(objective))
    assert plan.same_policy
    told = steps.signal(student, batch, objective, plan, 1000, fresh=True)
    seen = steps.signal(student, batch, objective, plan, 9, fresh=False)
    difference = told.token.coupled["advantage.sampled"] - seen.token.coupled["advantage.sampled"]
    assert difference.abs().max() <= 1e-5


def test_a_stale_signal_is_settled_at_the_weights_of_now() -> None:
    objective = Objective(RETURNS)
    student, batch, plan, _ = prepared(Method(objective))
    before = steps.signal(student, batch, objective, plan, 1000, fresh=True)
    with torch.no_grad():
        student.trainable()["model.norm.weight"].mul_(2.0)
    after = steps.signal(student, before, objective, plan, 1000, fresh=False)
    change = after.token.coupled["advantage.sampled"] - before.token.coupled["advantage.sampled"]
    assert change.abs().max() > 0.1


def test_returns_of_the_pipeline_are_sums_of_log_ratios() -> None:
    objective = Objective(RETURNS)
    student, batch, plan, _ = prepared(Method(objective))
    settled = steps.signal(student, batch, objective, plan, 1000, fresh=False)
    token = settled.token
    rows = student(settled, objective).rows["log_ratio"]
    ratio = torch.zeros(token.mask.shape).masked_scatter(token.mask, rows)
    for b in range(len(ratio)):
        kept = ratio[b][token.mask[b]]
        expected = [float(kept[t:].sum()) for t in range(len(kept))]
        found = token.coupled["advantage.sampled"][b][token.mask[b]].tolist()
        assert found == pytest.approx(expected, abs=1e-4)


def test_without_coupling_the_signal_phase_touches_nothing() -> None:
    student, batch, plan, _ = prepared(methods.vopd())
    assert steps.signal(student, batch, methods.vopd().objective, plan, 1, fresh=False) is batch


def test_several_end_tokens_are_one_action_through_the_whole_step() -> None:
    objective = Objective(REVERSE_KL)
    _, plain, _, _ = prepared(Method(objective))
    student, merged, plan, _ = prepared(Method(objective), merge_ids=((EOS, 7, 9),))
    assert "end tokens are compared as one, sampled one by one" in plan.mismatch
    one = steps.update(student, plain, objective, 1000, step=1)
    two = steps.update(student, merged, objective, 1000, step=1)
    assert two["loss/dense"].mean < one["loss/dense"].mean  # data processing inequality
    rows = student(merged, objective).rows
    tokens = pack_rows(merged.token.tokens, merged.token.mask)
    assert rows["log_ratio"].shape == tokens.shape
    assert rows["log_ratio"].isfinite().all()


# --------------------------------------------------------------------------------------------
# What goes wrong


def infinite(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    return divergence.reverse_kl(student_log_probs, teacher_log_probs) + math.inf


def undefined(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    return divergence.reverse_kl(student_log_probs, teacher_log_probs) * math.nan


@pytest.mark.parametrize("wild", [infinite, undefined])
def test_a_loss_that_is_not_finite_is_told_with_step_and_term(
    wild: Callable[..., Tensor],
) -> None:
    objective = Objective(REVERSE_KL, Dense(divergence=wild, name="wild"))
    student, batch, _, _ = prepared(Method(objective))
    with pytest.raises(TrainingError, match=r"step 12: the term 'wild' is not finite on .* tokens"):
        steps.update(student, batch, objective, 1000, step=12)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_running_out_of_memory_names_the_knob(error: Exception) -> None:
    message = r"micro-batch of at most 512 tokens: lower train\.max_tokens \(now 512\)"
    with pytest.raises(TrainingError, match=message), steps.memory_advice("train.max_tokens", 512):
        raise error


def test_other_errors_pass_through_unchanged() -> None:
    for error in (RuntimeError("shapes differ"), TeacherError("no answer"), KeyError("x")):
        with pytest.raises(type(error)) as caught, steps.memory_advice("train.max_tokens", 1):
            raise error
        assert caught.value is error


def test_memory_that_runs_out_inside_an_update_names_the_knob() -> None:
    student, batch, _, _ = prepared(methods.reverse_kl_opd())

    def exhaust(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    student.register_forward_pre_hook(exhaust)
    with pytest.raises(TrainingError, match=r"lower train\.max_tokens \(now 77\)"):
        steps.update(student, batch, methods.reverse_kl_opd().objective, 77, step=1)


def detached(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """A divergence that forgets the student."""
    return (student_log_probs.exp() * (student_log_probs - teacher_log_probs)).sum(-1).detach()


def test_an_objective_that_forgets_the_student_is_refused() -> None:
    method = Method(Objective(Dense(divergence=detached)))
    student, batch, _, _ = prepared(method)

    with pytest.raises(TrainingError, match="step 7: no term of the objective depends on"):
        steps.update(student, batch, method.objective, 1000, step=7)

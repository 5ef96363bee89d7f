"""The plan says what a step does: its visits are counted on a real student."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from opd import methods
from opd.errors import ConfigError
from opd.formula import credit, divergence, reward, support, surrogate
from opd.objective import Dense, Method, Objective, Sampled
from opd.rollout.local import LocalSampler
from opd.rollout.pack import pack_rollout
from opd.schedule import Linear
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.training import step as steps
from opd.training.plan import Plan, make_plan, reply_is_distribution
from opd.types import Prompt, SamplerSettings, StateSource, TeacherView
from tests.models_zoo import EOS, PAD, tiny

PLAIN = SamplerSettings(max_new_tokens=5)
LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)
RETURNS = replace(LOG_RATIO, credit=credit.return_to_go)
CLIPPED = replace(LOG_RATIO, surrogate=partial(surrogate.clipped, low=0.2, high=0.2))
REVERSE_KL = Dense(divergence=divergence.reverse_kl)
STUDENT_TOP_K = replace(REVERSE_KL, support=partial(support.student_top_k, k=4), tail="renormalise")
REFERENCE = TeacherView("reference", "initial_student")


def method(*terms: Dense | Sampled, **changes: Any) -> Method:
    return Method(Objective(*terms), views=(TeacherView(), REFERENCE), **changes)


def visits(plan: Plan) -> dict[str, float]:
    return {step.name: step.per_rollout for step in plan.passes}


def test_the_default_samples_scores_and_updates() -> None:
    plan = make_plan(methods.reverse_kl_opd(), PLAIN)
    assert visits(plan) == {"sample": 1, "score": 1, "update": 1}
    assert plan.same_policy
    assert plan.mismatch == ()
    assert plan.observe == ()
    assert not plan.signal


def test_supervised_training_on_data_only_updates() -> None:
    assert visits(make_plan(methods.sft(), PLAIN)) == {"update": 1}


@pytest.mark.parametrize(
    ("settings", "merge_ids", "states", "words"),
    [
        ({"temperature": 0.7}, (), StateSource(), "sampled at temperature 0.7, compared at 1"),
        ({"top_p": 0.9}, (), StateSource(), "top 0.9 of the mass"),
        ({"top_k": 5}, (), StateSource(), "5 likeliest tokens"),
        ({}, ((1, 2),), StateSource(), "end tokens are compared as one"),
        ({}, (), StateSource(student=0.5, data=0.5), "part of the text is not the student's"),
        ({}, (), StateSource(mixture=Linear(0.5, 0, 9)), "from a mixture with the teacher"),
        ({}, (), StateSource(interleave=7), "replaces tokens outside its 7 likeliest"),
        ({}, (), StateSource(teacher_prefix=2), "writes up to 2 tokens at the beginning"),
        ({}, (), StateSource(rewrite=0.5), "rewrites part of the wrong responses"),
        (
            {"temperature": 0.7},
            (),
            StateSource(student=0.5, replay=0.5),
            "1 steps before; its old_logp is that of the step's first update",
        ),
    ],
)
def test_a_sampler_that_is_not_the_student_is_said_and_observed(
    settings: dict[str, Any],
    merge_ids: tuple[tuple[int, ...], ...],
    states: StateSource,
    words: str,
) -> None:
    plan = make_plan(
        method(CLIPPED, states=states), replace(PLAIN, **settings), merge_ids=merge_ids
    )
    assert not plan.same_policy
    assert any(words in reason for reason in plan.mismatch)
    assert plan.observe == ("old_logp",)


def test_replayed_text_brings_its_own_old_logp_but_not_todays() -> None:
    """The sampler's numbers are the student's of that time, which is what `old_logp` means."""
    states = StateSource(student=0.5, replay=0.5, replay_steps=4)
    plan = make_plan(method(CLIPPED, RETURNS, states=states), PLAIN, updates_per_rollout=2)
    assert plan.mismatch == ("part of the text was written up to 4 steps before",)
    assert not plan.same_policy
    assert plan.observe == ()
    assert visits(plan) == {"sample": 0.5, "replay": 0.5, "score": 1, "signal": 2, "update": 2}


def test_a_horizon_is_no_other_policy_and_lowers_the_samplers_limit() -> None:
    states = StateSource(horizon=Linear(2, 4, 9))
    plan = make_plan(method(STUDENT_TOP_K, states=states), PLAIN)
    assert plan.same_policy
    assert plan.sampler.max_new_tokens == 4
    assert plan.sampler.student_top_k == 4
    assert (
        make_plan(method(REVERSE_KL, states=StateSource(horizon=9)), PLAIN).sampler.max_new_tokens
        == 5
    )


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (
            StateSource(student=0.5, data=0.5, mixture=0.25),
            [("student", "generate", 0.5), ("teacher", "forward per token", 0.5)],
        ),
        (
            StateSource(interleave=4),
            [("student", "generate", 1), ("teacher", "forward per token", 1)],
        ),
        (
            StateSource(student=0.75, teacher=0.25, teacher_prefix=2),
            [
                ("student", "generate", 0.75),
                ("teacher", "generate", 0.75),
                ("teacher", "generate", 0.25),
            ],
        ),
        (StateSource(rewrite=0.5), [("student", "generate", 1), ("teacher", "generate", 1)]),
        (
            StateSource(student=0.25, replay=0.75),
            [("student", "generate", 0.25), ("buffer", "no forward", 0.75)],
        ),
    ],
)
def test_the_plan_shows_what_each_source_costs(
    states: StateSource, expected: list[tuple[str, str, float]]
) -> None:
    passes = make_plan(method(REVERSE_KL, states=states), PLAIN).passes
    writing = [part for part in passes if part.name in ("sample", "replay", "rewrite")]
    assert [(part.model, part.kind, part.per_rollout) for part in writing] == expected


@pytest.mark.parametrize(
    ("states", "known"),
    [
        ({"mixture": 0.2}, True),
        ({"interleave": 4}, True),
        ({"teacher_prefix": 2}, False),
        ({"rewrite": 0.5}, False),
        ({"student": 0.5, "replay": 0.5}, False),
    ],
)
def test_top_ids_are_observed_where_no_one_sampler_saw_every_token(
    states: dict[str, Any], known: bool
) -> None:
    plan = make_plan(method(STUDENT_TOP_K, states=StateSource(**states)), PLAIN)
    assert plan.sampler.student_top_k == (4 if known else 0)
    assert plan.observe == (() if known else ("student_top_ids",))


def test_a_prefix_that_leaves_the_student_nothing_is_refused() -> None:
    states = StateSource(teacher_prefix=Linear(5, 0, 3))
    with pytest.raises(ConfigError, match="leaves the student nothing of"):
        make_plan(method(REVERSE_KL, states=states), PLAIN)


def test_sampling_at_the_temperature_of_the_comparison_is_no_mismatch() -> None:
    warm = Method(Objective(LOG_RATIO, temperature=0.7))
    assert make_plan(warm, replace(PLAIN, temperature=0.7)).same_policy


def test_the_sampler_is_asked_for_top_ids_only_where_they_are_compared() -> None:
    plan = make_plan(method(STUDENT_TOP_K), PLAIN)
    assert plan.sampler.student_top_k == 4
    assert plan.observe == ()
    mixed = make_plan(method(STUDENT_TOP_K, states=StateSource(student=0.5, data=0.5)), PLAIN)
    assert mixed.sampler.student_top_k == 0
    assert mixed.observe == ("student_top_ids",)
    assert make_plan(method(REVERSE_KL), PLAIN).sampler.student_top_k == 0


def test_a_teacher_is_asked_for_a_distribution_only_where_one_is_compared() -> None:
    needs = method(RETURNS, replace(REVERSE_KL, against="reference")).objective.needs
    assert not reply_is_distribution(needs, "teacher")
    assert reply_is_distribution(needs, "reference")
    assert reply_is_distribution(methods.vopd().objective.needs, "teacher")


MERGED = ((EOS, 7),)
CASES: dict[str, tuple[Method, SamplerSettings, tuple[tuple[int, ...], ...]]] = {
    "dense": (method(REVERSE_KL), PLAIN, ()),
    "returns from plain numbers": (method(RETURNS), PLAIN, ()),
    "returns beside a distribution": (method(RETURNS, REVERSE_KL), PLAIN, ()),
    "returns against the reference": (
        method(REVERSE_KL, replace(RETURNS, against="reference")),
        PLAIN,
        (),
    ),
    "returns beside a distribution of the reference": (
        method(replace(RETURNS, against="reference"), replace(REVERSE_KL, against="reference")),
        PLAIN,
        (),
    ),
    "returns with a baseline": (
        method(replace(RETURNS, baseline=credit.expected_reward)),
        PLAIN,
        (),
    ),
    "returns of nothing but ones": (
        method(Sampled(reward=reward.one, credit=credit.return_to_go)),
        PLAIN,
        (),
    ),
    "returns, sampler warmer": (method(RETURNS), replace(PLAIN, temperature=1.2), ()),
    "clipped": (method(CLIPPED), PLAIN, ()),
    "clipped, truncated sampler": (method(CLIPPED), replace(PLAIN, top_k=9), ()),
    "student top k": (method(STUDENT_TOP_K), PLAIN, ()),
    "student top k, end tokens merged": (method(STUDENT_TOP_K, CLIPPED), PLAIN, MERGED),
}


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("name", list(CASES))
def test_the_plan_counts_the_students_visits_as_they_happen(name: str, updates: int) -> None:
    chosen, settings, merge_ids = CASES[name]
    plan = make_plan(chosen, settings, updates_per_rollout=updates, merge_ids=merge_ids)
    loaded, objective = tiny("llama"), chosen.objective
    student, counts = Student(loaded), {"observe": 0, "signal": 0, "update": 0}
    now = ""

    def count(*_: Any) -> None:
        counts[now] += 1

    student.register_forward_hook(count)
    prompts = [Prompt("a", (3, 4), ""), Prompt("b", (5, 6), "")]
    rollout = LocalSampler(loaded).sample(
        prompts, plan.sampler, generator=torch.Generator().manual_seed(0)
    )
    batch = pack_rollout(rollout, pad_id=PAD, merge_ids=merge_ids)
    now = "observe"
    batch = steps.observe(student, batch, rollout, objective, plan, 1000)
    scorer = LocalTeacher(tiny("llama", seed=1), vocab_size=53)
    batch = steps.score({"teacher": scorer, "reference": scorer}, batch, objective, plan)
    for repeat in range(updates):
        now = "signal"
        batch = steps.signal(student, batch, objective, plan, 1000, fresh=repeat == 0)
        now = "update"
        steps.update(student, batch, objective, 1000, step=1)
    said = visits(plan)
    assert counts == {name: said.get(name, 0) for name in counts}


def test_a_score_of_tokens_asks_one_number_of_its_parts() -> None:
    gained = TeacherView(
        "teacher.gained",
        "combination",
        parts=(("teacher", 1.0), ("teacher.before", -1.0)),
        normalised=False,
    )
    views = (TeacherView(), TeacherView("teacher.before"), gained)
    term = Sampled(reward=reward.teacher_log_ratio, against="teacher.gained")
    plan = make_plan(Method(Objective(term), views=views), SamplerSettings())
    for part in ("teacher", "teacher.before"):
        assert {need.field for need in plan.needs if need.view == part} == {"logp"}
        assert not reply_is_distribution(plan.needs, part)
    whole = make_plan(
        Method(Objective(term), views=(*views[:2], replace(gained, normalised=True))),
        SamplerSettings(),
    )
    assert reply_is_distribution(whole.needs, "teacher.before")


# --------------------------------------------------------------------------------------------
# Arithmetic mixtures


MIXED = TeacherView(
    "teacher.mix", "combination", parts=(("reference", 0.25), ("teacher", 0.75)), mix="arithmetic"
)


def asked_of(*terms: Dense | Sampled, views: tuple[TeacherView, ...] = ()) -> dict[str, set[str]]:
    """What plain views are asked for, where terms follow a mixture."""
    plan = make_plan(
        Method(Objective(*terms), views=(TeacherView(), REFERENCE, MIXED, *views)), PLAIN
    )
    return {
        name: {f"{need.field} {need.support}" for need in plan.needs if need.view == name}
        for name in ("teacher", "reference")
    }


def test_a_mixture_of_which_tokens_alone_are_asked_asks_its_parts_for_no_more() -> None:
    told = asked_of(replace(LOG_RATIO, against="teacher.mix"))
    assert told == {"teacher": {"logp sampled"}, "reference": {"logp sampled"}}
    whole = asked_of(replace(REVERSE_KL, against="teacher.mix"))
    assert whole == {"teacher": {"log_probs full"}, "reference": {"log_probs full"}}


def test_a_mixture_inside_another_combination_is_made_whole() -> None:
    outer = TeacherView("teacher.outer", "combination", parts=(("teacher.mix", 1.5),))
    both = asked_of(
        replace(LOG_RATIO, against="teacher.mix"),
        replace(REVERSE_KL, against="teacher.outer"),
        views=(outer,),
    )
    assert both == {"teacher": {"log_probs full"}, "reference": {"log_probs full"}}


def test_a_signal_that_reads_a_mixture_takes_a_visit_because_nobody_tells_its_numbers() -> None:
    term = replace(RETURNS, against="teacher.mix")
    plan = make_plan(Method(Objective(term), views=(TeacherView(), REFERENCE, MIXED)), PLAIN)
    assert plan.same_policy
    assert visits(plan)["signal"] == 1

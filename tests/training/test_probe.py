"""The trial of an objective: what it finds, what it leaves alone, and what it costs."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from torch import Tensor

from opd import methods
from opd.errors import ConfigError
from opd.formula import credit, divergence, reward, surrogate, weight
from opd.formula import support as supports
from opd.objective import Dense, Method, Objective, Sampled
from opd.schedule import Cosine, Linear, Step, Switch
from opd.training.config import load
from opd.training.probe import try_objective
from opd.training.session import build_method
from opd.types import Prompt, TeacherView

COLUMNS = {"teacher_pass": 0.5, "span": 1, "consensus": 0}
PROMPTS = [Prompt(str(number), (1,), "", columns=COLUMNS) for number in range(2)]


def method_of(*terms: Dense | Sampled) -> Method:
    return Method(Objective(*terms), views=(TeacherView(),))


@pytest.mark.parametrize("family", [0, 1, 2, 3])
def test_no_published_method_is_refused(family: int) -> None:
    for name in methods.__all__[family::4]:
        try_objective(getattr(methods, name)(), prompts=PROMPTS, vocab_size=53)


def test_the_trial_of_the_default_costs_little() -> None:
    made = build_method(load())
    try_objective(made)
    before = time.process_time()
    try_objective(made)
    assert time.process_time() - before < 0.3


@pytest.mark.parametrize(
    "bad",
    [
        Sampled(reward.teacher_log_ratio, surrogate=partial(surrogate.clipped, low=-1, high=0.2)),
        Sampled(reward.teacher_log_ratio, credit=partial(credit.windowed, window=0)),
        Dense(divergence.reverse_kl, weights=(partial(weight.prefix, tokens=0),)),
        Dense(divergence.reverse_kl, weights=(partial(weight.trusted, at_least=0.0),)),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_formula(bad: Dense | Sampled) -> None:
    with pytest.raises(ConfigError, match=r"the formula opd\.formula\..* with .* failed"):
        try_objective(method_of(bad))


@pytest.mark.parametrize(
    "skew",
    [
        Linear(0.5, 1.0, 10),
        Cosine(0.0, 0.5, 10),
        Step(0.5, 1.5, 10),
        Switch(0.5, -1.0, "student/entropy", above=1.0),
    ],
)
def test_either_end_of_a_schedule_is_tried(skew: object) -> None:
    with pytest.raises(ConfigError, match="skew must lie strictly between 0 and 1"):
        try_objective(method_of(Dense(partial(divergence.skew_forward_kl, skew=skew))))


def test_a_schedule_within_range_is_fine_and_so_is_one_that_begins_at_nothing() -> None:
    inside = partial(divergence.skew_forward_kl, skew=Linear(0.1, 0.9, 10))
    try_objective(method_of(Dense(inside, coef=Linear(0.0, 1.0, 10))))


def test_the_vocabulary_is_large_enough_for_every_support() -> None:
    term = Dense(
        divergence.forward_kl,
        support=partial(supports.union, teacher_k=40, student_k=50),
        tail="bucket",
    )
    try_objective(method_of(term))


def names_a_token(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    return -student_log_probs[..., 100_000]


def test_a_formula_of_the_users_sees_the_students_own_vocabulary() -> None:
    term = Dense(names_a_token)
    try_objective(method_of(term), vocab_size=100_001)
    with pytest.raises(ConfigError, match="names_a_token"):
        try_objective(method_of(term), vocab_size=100_000)
    try_objective(method_of(term))  # whose vocabulary is not known: nothing can be said


def detached(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    return (student_log_probs - teacher_log_probs).sum(-1).detach()


def test_an_objective_without_a_gradient_is_refused() -> None:
    with pytest.raises(ConfigError, match="no term of the objective depends on"):
        try_objective(method_of(Dense(detached)), vocab_size=53)
    try_objective(method_of(Dense(divergence.reverse_kl, coef=0.0)))  # off, which is a note


def test_columns_that_are_not_known_are_not_invented() -> None:
    term = Dense(divergence.reverse_kl, weights=(partial(weight.teacher_passes, at_least=0.0),))
    with pytest.raises(ConfigError, match="at_least"):
        try_objective(method_of(term), prompts=PROMPTS)
    try_objective(method_of(term))
    try_objective(method_of(term), prompts=[Prompt("0", (1,), "")])


def test_nobodys_generator_is_touched() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    try_objective(methods.gae_opd())
    assert torch.equal(before, torch.random.get_rng_state())

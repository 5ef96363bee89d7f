"""Every method through the real head, against a literal transcription of its source."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from opd import catalog, methods
from opd.schedule import Linear, Schedule, Step
from tests.builders import DATA, STUDENT, TEACHER
from tests.methods.subjects import SUBJECTS, Subject
from tests.methods.worlds import Scene, ours, ours_in_parts, theirs
from tests.reference.methods.world import World

WORLDS = (
    (0, "token_mean"),
    (1, "token_mean"),
    (2, "token_mean"),
    (0, "sequence_mean"),
    (1, "sequence_sum"),
)
ELSEWHERE = (
    "argmax of the teacher",
    "data",
    "none",
    "own samples",
    "raw entries",
    "sharpened teacher",
    "teacher's conditional",
    "teacher, in expectation",
    "tempered self",
    "verdicts",
)
"""What else a method says it is stationary at: not at teacher = student, or in expectation only."""

each_subject = pytest.mark.parametrize("name", list(SUBJECTS))


def world_of(scene: Scene, subject: Subject, reduction: str) -> World:
    world = scene.world(reduction)
    views = dict(world.views)
    views |= {theirs: views[own] for own, theirs in subject.renamed.items()}
    return replace(world, views=views)


@each_subject
@pytest.mark.parametrize(("seed", "reduction"), WORLDS)
def test_loss_and_gradient_equal_the_transcription(name: str, seed: int, reduction: str) -> None:
    subject = SUBJECTS[name]
    scene = Scene.random(seed, writers=subject.writers)
    world = world_of(scene, subject, reduction)
    loss, gradient = ours(scene, subject.make(), reduction)
    expected, slope = theirs(subject.transcription(world), world)
    if not subject.gradient_only:
        assert loss == pytest.approx(expected, abs=1e-10)
    assert np.abs(gradient - slope).max() <= 1e-10


@each_subject
def test_the_comparison_is_of_something(name: str) -> None:
    subject = SUBJECTS[name]
    slopes = []
    for seed in (0, 1, 2):
        scene = Scene.random(seed, writers=subject.writers)
        slopes.append(np.abs(ours(scene, subject.make())[1]).max())
    assert max(slopes) > 1e-4 or name == "teacher_is_student"


@each_subject
def test_splitting_a_batch_changes_nothing(name: str) -> None:
    subject = SUBJECTS[name]
    scene, method = Scene.random(3, writers=subject.writers), subject.make()
    loss, gradient = ours(scene, method)
    for max_tokens in (1, 7, 13):
        in_parts, slope = ours_in_parts(scene, method, max_tokens)
        assert in_parts == pytest.approx(loss, abs=1e-12, rel=1e-12)
        assert np.abs(slope - gradient).max() <= 1e-12


@each_subject
def test_at_teacher_equal_to_student_the_gradient_is_what_the_docstring_says(name: str) -> None:
    subject = SUBJECTS[name]
    method = subject.make()
    stationary = catalog.methods()[method.name].section("Stationary")
    same = Scene.random(5, writers=subject.writers).same().judged()
    _, gradient = ours(same, method)
    size = np.abs(gradient).max()
    if stationary in ("teacher", "always", "teacher, at value zero"):
        assert size <= 1e-14
    elif stationary == "teacher, without verdicts":
        assert size > 1e-6
        assert np.abs(ours(same.unjudged(), method)[1]).max() <= 1e-14
    elif stationary == "its combination":
        assert size <= 1e-14
        views = same.case.teacher_logits
        others = {name: -logits for name, logits in views.items() if name != "teacher"}
        alone = replace(same, case=replace(same.case, teacher_logits={**views, **others}))
        assert np.abs(ours(alone, method)[1]).max() > 1e-6
    elif stationary == "teacher, without data":
        written = same.case.provenance.numpy() == DATA
        assert np.abs(gradient[written]).max() > 1e-6
        assert np.abs(gradient[~written]).max() <= 1e-14
    else:
        assert stationary in ELSEWHERE
        assert size > 1e-6


def test_every_method_is_held_to_a_transcription() -> None:
    elsewhere = {"gkd", "offpolicy_kd", "reverse_kl_opd", "sampled_token_opd", "sft"}
    elsewhere |= {"sft_on_teacher", "top_k_opd", "vopd"}  # in test_methods.py
    assert {subject.make().name for subject in SUBJECTS.values()} | elsewhere == set(
        methods.__all__
    )


AVERAGED_OTHERWISE = {
    "distillm_2": "sequence_mean",
    "pw_opsd": "sequence_mean",
    "renio": "sequence_mean",
    "scope": "sequence_sum",
    "sdft": "sequence_mean",
    "sdft_full": "sequence_mean",
    "sdpo_sampled": "sequence_mean",
    "slime_opd": "sequence_mean",
}
"""Methods whose sources average within a response first, or sum over it; the rest by token."""


@each_subject
def test_a_method_averages_as_its_source_does(name: str) -> None:
    subject = SUBJECTS[name]
    reduction = AVERAGED_OTHERWISE.get(name, "token_mean")
    scene = Scene.random(1, writers=subject.writers)
    world = world_of(scene, subject, reduction)
    _, gradient = ours(scene, subject.make())
    _, slope = theirs(subject.transcription(world), world)
    assert np.abs(gradient - slope).max() <= 1e-10


@each_subject
def test_a_method_trains_on_text_by_the_writers_of_its_comparison(name: str) -> None:
    subject = SUBJECTS[name]
    states = subject.make().states
    writers = {STUDENT} if states.student or states.replay else set()
    writers |= {DATA} if states.data else set()
    writers |= {TEACHER} if states.teacher_writes else set()
    if states.mixture:  # nobody can tell who chose a token
        writers -= {TEACHER}
    if name == "trd":  # what was not rewritten teaches nothing
        writers -= {STUDENT}
    assert set(subject.writers) == writers


def scheduled() -> Iterator[tuple[str, str]]:
    """Every option of a method that takes a schedule."""
    for name in methods.__all__:
        for option, parameter in inspect.signature(getattr(methods, name)).parameters.items():
            if "Schedule" in str(parameter.annotation):
                yield name, option


@pytest.mark.parametrize(("name", "option"), list(scheduled()))
def test_a_schedule_that_stands_still_is_the_number_it_stands_at(name: str, option: str) -> None:
    make = getattr(methods, name)
    parameter = inspect.signature(make).parameters[option]
    value = parameter.default
    if isinstance(value, Schedule):
        value = value.at(0, {}, None)[0]
    if str(parameter.annotation).startswith("int"):
        value, other = int(value), int(value) + 1
    else:
        other = value / 2 if value else 0.5
    plain, still = make(**{option: value}), make(**{option: Linear(value, value, 10)})
    moving = make(**{option: Step(value, other, 2)})
    assert still.at(3, {}, None)[0] == plain.at(3, {}, None)[0]
    assert moving.at(0, {}, None)[0] == plain.at(0, {}, None)[0]
    assert moving.at(3, {}, None)[0] == make(**{option: other}).at(3, {}, None)[0]

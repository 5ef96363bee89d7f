"""Methods that are each other, in a limit or in expectation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from opd import methods
from opd.formula import divergence, support
from opd.objective import Dense, Method, Objective, Sampled
from tests.builders import STUDENT
from tests.methods.expectations import TREES, expected_gradient
from tests.methods.worlds import VOCABULARY, Scene, ours
from tests.reference.enumeration import Tree, exact_local_gradient

each_tree = pytest.mark.parametrize("tree", list(TREES.values()), ids=list(TREES))
each_seed = pytest.mark.parametrize("seed", [0, 1])


def gradient_of(scene: Scene, method: Method) -> np.ndarray:
    return ours(scene, method)[1]


@pytest.fixture
def scene() -> Scene:
    return Scene.random(0, writers=(STUDENT,))


def test_the_full_sum_of_sampled_advantages_is_the_reverse_kls_gradient(scene: Scene) -> None:
    every_candidate = gradient_of(scene, methods.candidates_opd(k=VOCABULARY))
    assert np.abs(every_candidate - gradient_of(scene, methods.reverse_kl_opd())).max() <= 1e-15


@each_tree
@pytest.mark.parametrize("make", [methods.vopd, methods.sampled_token_opd, methods.res_opd])
def test_one_sample_or_a_residual_has_the_reverse_kls_gradient_in_expectation(
    tree: Tree, make: object
) -> None:
    method: Method = methods.res_opd(k=1) if make is methods.res_opd else make()  # type: ignore[operator]
    mean = expected_gradient(tree, *method.objective.terms)
    assert np.abs(mean - exact_local_gradient(tree)).max() <= 1e-12


@each_seed
def test_candidates_of_raw_entries_are_the_stop_gradient_top_k(seed: int) -> None:
    scene = Scene.random(seed, writers=(STUDENT,))
    raw = Dense(
        divergence=divergence.candidate_advantage_loss,
        support=partial(support.student_top_k, k=3),
        tail="truncate",
    )
    stopped = gradient_of(scene, methods.stop_gradient_top_k(k=3))
    assert np.abs(gradient_of(scene, Method(Objective(raw))) - stopped).max() <= 1e-15


@each_seed
def test_candidates_are_the_stop_gradient_top_k_over_the_mass_on_the_support(seed: int) -> None:
    scene = Scene.random(seed, writers=(STUDENT,))
    log_probs = scene.case.student_logits.log_softmax(-1)
    top = scene.rollout_logits.argsort(-1, descending=True)[..., :3]
    mass = log_probs.gather(-1, top).exp().sum(-1, keepdim=True).numpy()
    candidates = gradient_of(scene, methods.candidates_opd(k=3))
    stopped = gradient_of(scene, methods.stop_gradient_top_k(k=3))
    assert np.abs(candidates * mass - stopped).max() <= 1e-15


@each_seed
def test_a_sharp_r2_opd_is_opdvr_at_the_size_of_the_whole_response(seed: int) -> None:
    scene = Scene.random(seed, writers=(STUDENT,))
    sharp = gradient_of(scene, methods.r2_opd(sharpness=1e9))
    hard = gradient_of(scene, methods.opdvr())
    plain = gradient_of(scene, methods.sampled_token_opd())
    judged = ~scene.token["verdict"].isnan()
    compared = 0
    for b in range(len(judged)):
        if not judged[b]:  # the one keeps such a response, the other drops it
            assert np.abs(sharp[b] - plain[b]).max() <= 1e-15
            assert not hard[b].any()
            continue
        if not hard[b].any():
            assert not sharp[b].any()
            continue
        factor = np.abs(sharp[b]).sum() / np.abs(hard[b]).sum()
        assert np.abs(sharp[b] - factor * hard[b]).max() <= 1e-12
        assert factor >= 1 - 1e-12
        compared += 1
    assert compared


def test_extrapolation_of_1_is_the_teacher_itself(scene: Scene) -> None:
    same_engine = replace(scene, token={**scene.token, "sampler_logp": scene.token["old_logp"]})
    plain = ours(same_engine, methods.sampled_token_opd())
    at_one = ours(same_engine, methods.exopd(extrapolation=1.0))
    assert at_one[0] == plain[0]
    assert np.array_equal(at_one[1], plain[1])


@pytest.mark.parametrize(
    ("skewed", "limit"),
    [
        (methods.distillm, methods.forward_kl_opd),
        (methods.distillm_reverse, methods.reverse_kl_opd),
    ],
)
def test_skew_divergences_tend_to_the_kl_they_skew(
    scene: Scene, skewed: object, limit: object
) -> None:
    kl = gradient_of(scene, limit())  # type: ignore[operator]
    distances = [
        np.abs(gradient_of(scene, skewed(skew=skew)) - kl).max()  # type: ignore[operator]
        for skew in (1e-2, 1e-4, 1e-6)
    ]
    assert distances[0] > 10 * distances[1] > 100 * distances[2]
    assert distances[2] <= 1e-5


@each_tree
@pytest.mark.parametrize("power", [0.3, 1.0, 5.0])
def test_power_opd_is_the_power_times_the_gradient_of_its_divergence(
    tree: Tree, power: float
) -> None:
    sampled = expected_gradient(tree, *methods.power_opd(power=power).objective.terms)
    exact = Dense(divergence=partial(divergence.power_divergence, power=power))
    assert np.abs(sampled - power * expected_gradient(tree, exact)).max() <= 1e-12


@each_tree
def test_the_sampled_methods_of_named_divergences_have_their_gradients(tree: Tree) -> None:
    pairs: list[tuple[Method, Dense]] = [
        (methods.opd_plus(alpha=0.4), Dense(partial(divergence.alpha_divergence, alpha=0.4))),
        (
            methods.jsd_opd(teacher_weight=0.3),
            Dense(partial(divergence.generalized_jsd, teacher_weight=0.3)),
        ),
        (methods.tv_opd(scale=0.5), Dense(divergence.total_variation)),
        (methods.k3_opd(), Dense(divergence.forward_kl)),
        (methods.sure_opd(boost=0.0), Dense(divergence.reverse_kl)),
    ]
    for method, exact in pairs:
        mean = expected_gradient(tree, *method.objective.terms)
        assert np.abs(mean - expected_gradient(tree, exact)).max() <= 1e-10, method.name


def test_a_power_of_the_old_policy_ratio_leaves_skill_sd_with_the_reverse_kls_score(
    scene: Scene,
) -> None:
    logp = scene.same().token["old_logp"]
    fresh = replace(scene, token={**scene.token, "old_logp": logp}).unjudged()
    sampled = gradient_of(fresh, methods.sampled_token_opd())
    corrected = gradient_of(fresh, methods.skill_sd(coef=1.0))
    assert np.abs(corrected - sampled).max() <= 1e-14


def test_a_teacher_that_is_the_student_moves_nothing(scene: Scene) -> None:
    loss, gradient = ours(scene, methods.teacher_is_student())
    assert loss == 0
    assert not gradient.any()


def test_anti_sd_ascends_the_jensen_shannon_divergence() -> None:
    tree = TREES["horizon"]
    term = methods.anti_sd(scale=1.0).objective.terms[0]
    assert isinstance(term, Sampled)
    ascent = Dense(divergence.jensen_shannon, coef=-1.0)
    plain = replace(term, surrogate=Sampled(reward=term.reward).surrogate)
    mean = expected_gradient(tree, plain)
    assert np.abs(mean - expected_gradient(tree, ascent)).max() <= 1e-12
    assert torch.tensor(mean).abs().max() > 1e-3

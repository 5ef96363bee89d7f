"""Figures on held-out prompts, against their definitions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.data.prompts import task_prompts
from opd.models import LoadedModel, load_model
from opd.rollout.local import LocalSampler
from opd.training.evaluate import (
    Z95,
    Evaluation,
    evaluate,
    mean_over_prompts,
    pass_at_k,
    verify_rollout,
    wilson,
)
from opd.types import Prompt, Rollout, SamplerSettings, Stat, Verdict


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_are_the_shares_whose_test_just_passes(case: tuple[int, int]) -> None:
    """The interval inverts the score test: |share - end| = z * sqrt(end * (1 - end) / n)."""
    successes, n = case
    score = wilson(successes, n)
    share = successes / n
    assert 0 <= score.low <= share <= score.high <= 1
    for end in (score.low, score.high):
        distance = Z95 * math.sqrt(end * (1 - end) / n)
        assert abs(share - end) == pytest.approx(distance, abs=1e-7)


def test_wilson_by_hand() -> None:
    """Ten of ten: the lower end is n / (n + z^2)."""
    assert wilson(10, 10).low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)
    assert wilson(10, 10).high == 1.0
    nothing = wilson(0, 0)
    assert nothing.n == 0
    assert math.isnan(nothing.value)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        answers = [True] * correct + [False] * (n - correct)
        subsets = list(itertools.combinations(answers, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(correct, n, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over n samples, each right with probability 0.3, is 1 - 0.7^k."""
    n, chance = 6, 0.3
    for k in range(1, n + 1):
        expected = sum(
            math.comb(n, c) * chance**c * (1 - chance) ** (n - c) * pass_at_k(c, n, k)
            for c in range(n + 1)
        )
        assert expected == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_the_mean_over_prompts_has_a_normal_interval_within_its_range() -> None:
    score = mean_over_prompts([0.0, 0.5, 1.0, 0.5])
    half = Z95 * math.sqrt((0.5 / 3) / 4)
    assert (score.value, score.n) == (0.5, 4)
    assert (score.low, score.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert mean_over_prompts([0.0, 1.0]).low == 0.0
    assert math.isnan(mean_over_prompts([]).value)


# --------------------------------------------------------------------------------------------
# With a model


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return load_model("builtin:sort-student", device="cpu", seed=3)


@pytest.fixture(scope="module")
def prompts(student: LoadedModel) -> tuple[Prompt, ...]:
    return task_prompts("sort", "test", tokenizer=student.tokenizer, count=7).prompts


def figures(student: LoadedModel, prompts: Sequence[Prompt], **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {
        "verifier": odd_length,
        "tokenizer": student.tokenizer,
        "settings": SamplerSettings(max_new_tokens=8, temperature=0.7, top_k=5),
        "seed": 0,
        **changes,
    }
    return evaluate(LocalSampler(student), prompts, **settings)


def odd_length(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
    return Verdict(float(len(response) % 2))


def test_accuracy_is_greedy_and_counts_every_prompt_once(
    student: LoadedModel, prompts: tuple[Prompt, ...]
) -> None:
    result = figures(student, prompts)
    assert result.accuracy == wilson(sum(len(text) % 2 for text in result.responses), 7)
    assert len(result.responses) == len(result.scores) == 7
    assert result.length == result.tokens / 7
    assert result.mean_at_n is None
    assert figures(student, prompts, seed=5) == result
    assert figures(student, prompts, max_sequences=2) == result


def test_samples_are_judged_with_the_prompt_they_answer(
    student: LoadedModel, prompts: tuple[Prompt, ...]
) -> None:
    def first_two(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
        return Verdict(float(prompt in prompts[:2]))

    result = figures(student, prompts, verifier=first_two, samples=3, ks=(1, 3, 4), max_sequences=7)
    assert result.accuracy.value == pytest.approx(2 / 7)
    assert result.mean_at_n == mean_over_prompts([1.0] * 2 + [0.0] * 5)
    assert result.pass_at_k == ((1, result.mean_at_n), (3, result.mean_at_n))


def test_mean_at_n_and_pass_at_1_agree_and_pass_grows_with_k(
    student: LoadedModel, prompts: tuple[Prompt, ...]
) -> None:
    result = figures(student, prompts, samples=8, ks=(1, 2, 8))
    passes = [score.value for _, score in result.pass_at_k]
    assert result.mean_at_n is not None
    assert result.mean_at_n.value == pytest.approx(passes[0])
    assert 0 < passes[0] < passes[1] < passes[2] <= 1
    assert figures(student, prompts, samples=8, ks=(1, 2, 8)) == result
    assert figures(student, prompts, samples=8, ks=(1, 2, 8), seed=1) != result


def test_a_verified_rollout_knows_verdicts_and_reasons(
    student: LoadedModel, prompts: tuple[Prompt, ...]
) -> None:
    def reasoned(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
        return Verdict(0.25, f"{prompt.id}: {response} {finished}")

    drawn = LocalSampler(student).sample(
        prompts, SamplerSettings(max_new_tokens=4), generator=torch.Generator().manual_seed(0)
    )
    judged, texts = verify_rollout(drawn, reasoned, student.tokenizer)
    assert judged.verdict.tolist() == [0.25] * 7
    finished = [reason != "length" for reason in drawn.stop_reason]
    said = zip(prompts, texts, finished, strict=True)
    assert judged.reasons == tuple(f"{p.id}: {text} {ended}" for p, text, ended in said)
    assert verify_rollout(drawn, None, student.tokenizer)[0].reasons == ()


def test_further_metrics_are_of_the_greedy_responses_alone(
    student: LoadedModel, prompts: tuple[Prompt, ...]
) -> None:
    def measured(rollout: Rollout) -> dict[str, Stat]:
        return {"tokens": Stat(float(rollout.lengths.sum()), float(len(rollout.prompt_ids)))}

    for size in (256, 2):
        found = figures(student, prompts, measured=measured, max_sequences=size, samples=2)
        assert found.metrics == {"tokens": Stat(found.tokens, 7)}
    assert figures(student, prompts).metrics == {}


def test_without_a_verifier_there_is_text_and_no_accuracy(
    student: LoadedModel, prompts: tuple[Prompt, ...]
) -> None:
    result = figures(student, prompts, verifier=None, samples=2)
    assert math.isnan(result.accuracy.value)
    assert result.accuracy.n == 7
    assert len(result.responses) == 7
    assert result.mean_at_n is None


def test_evaluating_draws_from_no_generator_but_its_own(
    student: LoadedModel, prompts: tuple[Prompt, ...]
) -> None:
    before = torch.get_rng_state()
    weights = {name: value.clone() for name, value in student.model.state_dict().items()}
    figures(student, prompts, samples=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(value.equal(weights[name]) for name, value in student.model.state_dict().items())

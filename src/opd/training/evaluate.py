"""How good a model is on held-out prompts: greedy accuracy, mean@n, pass@k, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from opd.types import Prompt, Rollout, Sampler, SamplerSettings, Stat, Verifier, add_stats

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """A mean with its 95 % interval over prompts.

    Attributes:
        value: the mean; NaN without a verifier.
        low, high: ends of the interval.
        n: prompts.
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one set of prompts.

    Attributes:
        accuracy: share of prompts solved greedily, Wilson interval.
        mean_at_n: mean score of n samples at temperature 1; None if no samples were drawn.
        pass_at_k: by k, unbiased from n samples.
        length: mean response tokens of the greedy responses.
        truncated: share of greedy responses cut by the limit.
        metrics: what else was measured of the greedy responses.
    """

    accuracy: Score
    length: float
    truncated: float
    tokens: int
    mean_at_n: Score | None = None
    pass_at_k: tuple[tuple[int, Score], ...] = ()
    responses: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    metrics: Mapping[str, Stat] = field(default_factory=dict)


def wilson(successes: float, n: int) -> Score:
    """Share of successes with its 95 % Wilson interval."""
    if n == 0:
        return Score(math.nan, math.nan, math.nan, 0)
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    # The interval holds the share; rounding alone could push an end past it, at 0 and at n of n.
    return Score(share, min(low, share), max(high, share), n)


def mean_over_prompts(values: Sequence[float]) -> Score:
    """Mean of one number per prompt with its 95 % normal interval, kept within [0, 1]."""
    n = len(values)
    if n == 0:
        return Score(math.nan, math.nan, math.nan, 0)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Probability that one of k samples out of n, `correct` of them right, is right.

        1 - C(n - correct, k) / C(n, k)

    Source: Chen et al., Evaluating Large Language Models Trained on Code, arXiv:2107.03374.
    """
    if n - correct < k:
        return 1.0
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def verify_rollout(
    rollout: Rollout, verifier: Verifier | None, tokenizer: Any, *, shown: int | None = None
) -> tuple[Rollout, list[str]]:
    """The rollout with a verdict per sequence, and the decoded responses.

    Args:
        shown: without a verifier, how many of the responses somebody will read; None: all.
    """
    if verifier is None:
        return rollout, decode_responses(rollout, tokenizer, count=shown)
    texts = decode_responses(rollout, tokenizer)
    found = [
        verifier(prompt, text, finished=reason != "length")
        for prompt, text, reason in zip(rollout.prompts, texts, rollout.stop_reason, strict=True)
    ]
    verdict = torch.tensor([each.score for each in found])
    reasons = tuple(each.reason for each in found)
    return replace(rollout, verdict=verdict, reasons=reasons), texts


def decode_responses(rollout: Rollout, tokenizer: Any, *, count: int | None = None) -> list[str]:
    """The first `count` responses as text, without special tokens; None: all."""
    lengths = rollout.lengths.tolist()[:count]
    rows = rollout.tokens[:count].tolist()
    decoded: list[str] = tokenizer.batch_decode(
        [tokens[:length] for tokens, length in zip(rows, lengths, strict=True)],
        skip_special_tokens=True,
    )
    return decoded


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    verifier: Verifier | None,
    tokenizer: Any,
    settings: SamplerSettings,
    seed: int,
    samples: int = 0,
    ks: Sequence[int] = (),
    max_sequences: int = 256,
    measured: Callable[[Rollout], Mapping[str, Stat]] | None = None,
) -> Evaluation:
    """Greedy responses to every prompt, and `samples` at temperature 1 where asked for.

    Draws from a generator of its own: evaluating changes nothing in a run.

    Args:
        measured: further metrics of the greedy responses.
    """
    device = torch.device("cpu")
    greedy = replace(
        settings, temperature=0.0, top_p=1.0, top_k=0, samples_per_prompt=1, student_top_k=0
    )
    generator = torch.Generator(device).manual_seed(seed)
    texts: list[str] = []
    scores: list[float] = []
    metrics: list[Mapping[str, Stat]] = []
    tokens = truncated = 0
    for start in range(0, len(prompts), max_sequences):
        part = prompts[start : start + max_sequences]
        rollout = sampler.sample(part, greedy, generator=generator)
        rollout, decoded = verify_rollout(rollout, verifier, tokenizer)
        texts += decoded
        scores += rollout.verdict.tolist()
        tokens += int(rollout.lengths.sum())
        truncated += sum(reason == "length" for reason in rollout.stop_reason)
        metrics += [measured(rollout)] if measured else []
    n = len(prompts)
    accuracy = wilson(sum(scores), n) if verifier else Score(math.nan, math.nan, math.nan, n)
    result = Evaluation(
        accuracy,
        tokens / max(1, n),
        truncated / max(1, n),
        tokens,
        responses=tuple(texts),
        scores=tuple(scores),
        metrics=add_stats(metrics),
    )
    if samples and verifier:
        result = _with_samples(
            result,
            sampler,
            prompts,
            verifier,
            tokenizer,
            greedy,
            generator,
            samples,
            ks,
            max_sequences,
        )
    return result


def _with_samples(
    result: Evaluation,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    verifier: Verifier,
    tokenizer: Any,
    settings: SamplerSettings,
    generator: torch.Generator,
    samples: int,
    ks: Sequence[int],
    max_sequences: int,
) -> Evaluation:
    drawn = replace(settings, temperature=1.0, samples_per_prompt=samples)
    per_prompt: list[list[float]] = []
    step = max(1, max_sequences // samples)
    for start in range(0, len(prompts), step):
        part = prompts[start : start + step]
        rollout = sampler.sample(part, drawn, generator=generator)
        rollout, _ = verify_rollout(rollout, verifier, tokenizer)
        flat = rollout.verdict.tolist()
        per_prompt += [flat[i * samples : (i + 1) * samples] for i in range(len(part))]
    means = mean_over_prompts([sum(row) / samples for row in per_prompt])
    passes = tuple(
        (
            k,
            mean_over_prompts(
                [pass_at_k(sum(score >= 1.0 for score in row), samples, k) for row in per_prompt]
            ),
        )
        for k in ks
        if k <= samples
    )
    return replace(result, mean_at_n=means, pass_at_k=passes)

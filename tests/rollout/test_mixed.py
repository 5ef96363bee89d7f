"""Two models writing together, against plain forwards of each and literal propose-and-replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models_zoo import tiny
from torch import Tensor

from opd.errors import ConfigError
from opd.models import LoadedModel, backbone, project, unembedding
from opd.rollout.edit import take
from opd.rollout.local import LocalSampler
from opd.rollout.mixed import MixedSampler
from opd.types import Prompt, Provenance, Rollout, SamplerSettings

PROMPTS = [Prompt(str(i), ids, "") for i, ids in enumerate([(5, 9, 11), (7,), (4, 4, 8, 30, 12)])]
PAIRS = [("llama", "qwen3"), ("gemma2", "llama"), ("gpt2", "gpt_neox")]
PLAIN = SamplerSettings(max_new_tokens=9, samples_per_prompt=4)
COLD = replace(PLAIN, temperature=0.7, top_k=20)
RULES: dict[str, dict[str, Any]] = {
    "mixture": {"mixture": 0.3},
    "interleave": {"interleave": 6},
}


def pair(student: str = "llama", teacher: str = "qwen3") -> tuple[LoadedModel, LoadedModel]:
    return tiny(student), tiny(teacher, seed=1)


def sample(
    models: tuple[LoadedModel, LoadedModel],
    settings: SamplerSettings = PLAIN,
    *,
    fast: bool | None = None,
    prompts: list[Prompt] = PROMPTS,
    **rule: Any,
) -> Rollout:
    student, teacher = (LocalSampler(model, fast=fast) for model in models)
    sampler = MixedSampler(student, teacher, **rule)
    generator = torch.Generator().manual_seed(0)
    return sampler.sample(prompts, settings, generator=generator, policy_version=3)


@torch.no_grad()
def distributions(model: LoadedModel, rollout: Rollout, settings: SamplerSettings) -> Tensor:
    """What one model alone would sample from, `[B, T, V]`, by unpadded forwards of whole texts."""
    full = torch.zeros(*rollout.tokens.shape, model.vocab_size)
    head = unembedding(model.model, model.vocab_size)
    for row, prompt in enumerate(rollout.prompt_ids):
        n = int(rollout.lengths[row])
        ids = torch.tensor([*prompt, *rollout.tokens[row, :n].tolist()])[None]
        hidden = backbone(model.model)(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        logits = project(hidden, head) / settings.temperature
        if settings.top_k:
            least = logits.topk(settings.top_k).values[:, -1:]
            logits = torch.where(logits >= least, logits, -torch.inf)
        full[row, :n] = logits.softmax(-1)
    return full


def mixture(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.7 * student + 0.3 * teacher


def propose_or_replace(student: Tensor, teacher: Tensor, k: int = 6) -> Tensor:
    """Every proposal in turn: it stands, or the teacher's distribution takes its mass."""
    result = torch.zeros_like(student)
    accepted = set(teacher.topk(k).indices.tolist())
    for proposal in range(len(student)):
        if proposal in accepted:
            result[proposal] += student[proposal]
        else:
            result += student[proposal] * teacher
    return result


LITERAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mixture": mixture,
    "interleave": propose_or_replace,
}


@pytest.mark.parametrize("settings", [PLAIN, COLD], ids=["plain", "cold and truncated"])
@pytest.mark.parametrize("families", PAIRS, ids="-".join)
@pytest.mark.parametrize("rule", list(RULES))
def test_sampler_logp_is_the_log_of_the_rule_on_plain_forwards(
    rule: str, families: tuple[str, str], settings: SamplerSettings
) -> None:
    models = pair(*families)
    rollout = sample(models, settings, **RULES[rule])
    student, teacher = (distributions(model, rollout, settings) for model in models)
    for row, length in enumerate(rollout.lengths.tolist()):
        for t in range(length):
            both = LITERAL[rule](student[row, t], teacher[row, t])
            expected = both[rollout.tokens[row, t]].log()
            assert abs(float(rollout.sampler_logp[row, t] - expected)) <= 1e-5
    assert (rollout.sampler_logp[~rollout.mask] == 0).all()
    assert (rollout.policy_version[rollout.mask] == 3).all()


@pytest.mark.parametrize("rule", list(RULES))
def test_first_tokens_are_distributed_as_the_rule_says(rule: str) -> None:
    """Pearson's chi-square; its mean is `cells - 1`, its variance twice that."""
    models, n = pair(), 20_000
    settings = SamplerSettings(max_new_tokens=1, samples_per_prompt=n)
    rollout = sample(models, settings, prompts=PROMPTS[:1], **RULES[rule])
    first = take(rollout, [0])
    student, teacher = (distributions(model, first, settings)[0, 0] for model in models)
    expected = n * LITERAL[rule](student, teacher).double()
    counts = torch.bincount(rollout.tokens[:, 0], minlength=len(expected)).double()
    seen = expected >= 5
    cells = torch.cat((expected[seen], expected[~seen].sum()[None])).clamp_min(1e-9)
    found = torch.cat((counts[seen], counts[~seen].sum()[None]))
    statistic = float(((found - cells) ** 2 / cells).sum())
    freedom = len(cells) - 1
    assert freedom > 10
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_proposal_stands_only_among_the_teachers_likeliest() -> None:
    models = pair()
    rollout = sample(models, replace(PLAIN, samples_per_prompt=16), **RULES["interleave"])
    teacher = distributions(models[1], rollout, PLAIN)
    likely = (teacher.topk(6).indices == rollout.tokens[..., None]).any(-1)
    by_student = rollout.provenance == Provenance.STUDENT
    by_teacher = rollout.provenance == Provenance.TEACHER
    assert bool((by_student | by_teacher)[rollout.mask].all())
    assert bool(likely[by_student].all())
    assert bool(by_teacher[rollout.mask & ~likely].all())
    assert int(by_student.sum()) > 10
    assert int((rollout.mask & ~likely).sum()) > 10


def test_the_teacher_chooses_as_often_as_proposals_fall_outside() -> None:
    models, n = pair(), 20_000
    settings = SamplerSettings(max_new_tokens=1, samples_per_prompt=n)
    rollout = sample(models, settings, prompts=PROMPTS[:1], **RULES["interleave"])
    first = take(rollout, [0])
    student, teacher = (distributions(model, first, settings)[0, 0] for model in models)
    outside = 1 - float(student[teacher.topk(6).indices].sum())
    chosen = float((rollout.provenance == Provenance.TEACHER).double().mean())
    assert 0.05 < outside < 0.95
    assert abs(chosen - outside) < 5 * (outside * (1 - outside) / n) ** 0.5


@pytest.mark.parametrize("settings", [PLAIN, COLD, replace(PLAIN, temperature=0.0)])
@pytest.mark.parametrize("rule", [{"mixture": 0.0}, {"interleave": 53}])
@pytest.mark.parametrize("fast", [True, False])
def test_a_teacher_without_a_say_changes_no_bit(
    fast: bool, rule: dict[str, Any], settings: SamplerSettings
) -> None:
    models, settings = pair(), replace(settings, student_top_k=5)
    mixed = sample(models, settings, fast=fast, **rule)
    own = LocalSampler(models[0], fast=fast).sample(
        PROMPTS, settings, generator=torch.Generator().manual_seed(0), policy_version=3
    )
    for name in ("tokens", "mask", "provenance", "sampler_logp", "policy_version", "group"):
        assert torch.equal(getattr(mixed, name), getattr(own, name)), name
    assert mixed.sampler_top_ids is not None
    assert own.sampler_top_ids is not None
    assert torch.equal(mixed.sampler_top_ids, own.sampler_top_ids)
    assert mixed.stop_reason == own.stop_reason


def test_a_mixture_that_is_all_teacher_writes_what_the_teacher_writes() -> None:
    models = pair()
    mixed = sample(models, mixture=1.0)
    own = LocalSampler(models[1]).sample(
        PROMPTS, PLAIN, generator=torch.Generator().manual_seed(0), policy_version=3
    )
    assert torch.equal(mixed.tokens, own.tokens)
    assert torch.equal(mixed.sampler_logp, own.sampler_logp)


def test_with_mixture_changes_the_share_of_a_copy() -> None:
    student, teacher = (LocalSampler(model) for model in pair())
    none = MixedSampler(student, teacher)
    some = none.with_mixture(0.3)
    texts = [
        sampler.sample(PROMPTS, PLAIN, generator=torch.Generator().manual_seed(0)).tokens
        for sampler in (none, some, MixedSampler(student, teacher, mixture=0.3))
    ]
    assert torch.equal(texts[1], texts[2])
    assert not torch.equal(texts[0], texts[1])


def test_an_end_token_of_either_model_ends_the_response() -> None:
    student, teacher = pair()
    ends = (2, *range(10, 30))
    rollout = sample((student, replace(teacher, eos_ids=ends)), mixture=0.5)
    for row, length in enumerate(rollout.lengths.tolist()):
        written = rollout.tokens[row, :length].tolist()
        assert not set(written[:-1]) & set(ends)
        assert (written[-1] in ends) == (rollout.stop_reason[row] == "eos")
    assert "eos" in rollout.stop_reason


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"mixture": 1.5}, "must lie in [0, 1], got 1.5"),
        ({"interleave": 54}, "there are 53 tokens; lower it"),
        ({"interleave": 4, "mixture": 0.5}, "two rules for the same token"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        sample(pair(), **rule)
    assert said in str(error.value)


def test_models_without_a_common_vocabulary_are_refused() -> None:
    student, _ = pair()
    with pytest.raises(ConfigError, match="do not share a vocabulary"):
        sample((student, tiny("llama", vocab_size=60)), mixture=0.5)
    with pytest.raises(ConfigError, match="draw from 53 and 50 tokens"):
        sample((student, replace(tiny("llama"), vocab_size=50)), mixture=0.5)

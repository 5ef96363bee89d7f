"""Sampling speed of the local engine beside `transformers` `generate`, on one CPU thread.

Same weights, same prompts, temperature 1, no truncation. In the `forced` cases nobody can end
early, so that everyone writes the same number of tokens; in the `ending` case responses end by
themselves and the time is compared per token of a response.

    python benchmarks/rollout.py [--quick] [--json FILE] [--result FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from common import (
    OURS,
    Measure,
    Row,
    compare,
    cpu_seconds,
    interleaved,
    one_thread,
    parse_args,
    report,
)
from opd.data.tasks import build_tokenizer
from opd.models import LoadedModel
from opd.rollout.local import LocalSampler
from opd.types import Prompt, SamplerSettings

VOCAB = 53
EOS = 2
NEVER = VOCAB  # an id no model can write


@dataclass(frozen=True)
class Case:
    """What everyone has to write. `ends` lets responses end by themselves."""

    name: str
    prompts: int
    samples: int = 1
    prompt_tokens: int = 20
    new_tokens: int = 48
    ends: bool = False


CASES = (
    Case("forced, batch 8", 8),
    Case("forced, batch 64", 64),
    Case("forced, batch 256", 256),
    Case("forced, 8 prompts of 200 x 8", 8, samples=8, prompt_tokens=200),
    Case("ending, batch 64, at most 128", 64, new_tokens=128, ends=True),
)

Run = Callable[[], int]
"""Writes the responses of one case once, and returns how many tokens they have."""


def build_model() -> Qwen3ForCausalLM:
    """The student's shape of the embedded default, with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=192,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.train(False)
    return model


def build_prompts(case: Case) -> list[Prompt]:
    ids = torch.randint(3, VOCAB, (case.prompts, case.prompt_tokens)).tolist()
    return [Prompt(id=str(i), prompt_ids=tuple(row), text="") for i, row in enumerate(ids)]


def ours(model: Qwen3ForCausalLM, prompts: list[Prompt], case: Case, *, fast: bool) -> Run:
    loaded = LoadedModel(
        model=model,
        tokenizer=build_tokenizer(),
        vocab_size=VOCAB,
        eos_ids=(EOS if case.ends else NEVER,),
        pad_id=0,
        reference="random",
    )
    sampler = LocalSampler(loaded, fast=fast)
    settings = SamplerSettings(max_new_tokens=case.new_tokens, samples_per_prompt=case.samples)
    generator = torch.Generator().manual_seed(0)

    def run() -> int:
        rollout = sampler.sample(prompts, settings, generator=generator)
        return int(rollout.mask.sum())

    return run


def theirs(model: Qwen3ForCausalLM, prompts: list[Prompt], case: Case) -> Run:
    ids = torch.tensor([prompt.prompt_ids for prompt in prompts])
    mask = torch.ones_like(ids)
    model.generation_config.eos_token_id = None
    config = cast(Any, GenerationConfig)(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=case.new_tokens,
        num_return_sequences=case.samples,
        pad_token_id=0,
        eos_token_id=EOS if case.ends else None,
    )

    def run() -> int:
        written = cast(Any, model).generate(ids, attention_mask=mask, generation_config=config)
        response = written[:, case.prompt_tokens :]
        before_end = (response == EOS).long().cumsum(1) - (response == EOS).long() == 0
        return int(before_end.sum()) if case.ends else response.numel()

    return run


def rows_of(case: Case, *, repeats: int) -> list[Row]:
    """One row per system."""
    model = build_model()
    prompts = build_prompts(case)
    systems = {
        OURS: ours(model, prompts, case, fast=True),
        "opd generic path": ours(model, prompts, case, fast=False),
        "transformers generate": theirs(model, prompts, case),
    }
    timed = {name: _timed(run) for name, run in systems.items()}
    return compare(case.name, interleaved(timed, repeats, warm=True))


def _timed(run: Run) -> Callable[[], Measure]:
    def measure() -> Measure:
        start = cpu_seconds()
        tokens = run()
        return Measure(cpu_seconds() - start, tokens)

    return measure


def main() -> None:
    options = parse_args("Sampling speed of the local engine beside generate.")
    one_thread()
    repeats = 5 if options.quick else 25
    report([row for case in CASES for row in rows_of(case, repeats=repeats)], options)


if __name__ == "__main__":
    main()

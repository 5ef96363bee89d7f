"""How much memory a run will take at its peak, part by part, before anything loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from opd.head.linear import CHUNK_BYTES
from opd.training.config import RunConfig
from opd.training.facts import ModelFacts
from opd.training.plan import reply_is_distribution
from opd.training.session import Phase, micro_batch_tokens

# What a layer keeps for its backward pass, per token and hidden unit in a 16-bit dtype, when
# attention matrices are not stored: measured on Qwen3 shapes. A plain GELU layer keeps 34
# (Korthikanti et al., arXiv:2205.05198); gates and norms of today's layers add to that.
ACTIVATION_BYTES = 50
# Logits, log-probabilities and their gradient are alive together in the head, on both sides.
CHUNK_COPIES = 4
# The cache is copied whenever finished sequences are dropped from it.
CACHE_COPIES = 2
# Resident memory after the imports, measured on Linux with PyTorch 2.13.
INTERPRETER_BYTES = 0.5e9


@dataclass(frozen=True)
class MemoryPart:
    """One part of the estimate.

    Attributes:
        what: the part.
        bytes: an upper estimate.
        how: what it was computed from, with the knob that changes it.
    """

    what: str
    bytes: float
    how: str


def memory_parts(
    config: RunConfig,
    phase: Phase,
    student: ModelFacts,
    teacher: ModelFacts | None,
    prompt_tokens: int,
    device: torch.device,
) -> list[MemoryPart]:
    """The parts of a run's memory, in the order in which a step meets them.

    The rollout, the teacher's pass and the update follow one another; the sum is what they would
    take together, an upper bound.

    Args:
        phase: the distillation.
        prompt_tokens: of the longest prompt that is expected.
        device: where the run takes place.
    """
    parts = _parts(config, phase, student, teacher, prompt_tokens, device)
    if device.type != "cpu":
        return [*parts]
    return [MemoryPart("Python and PyTorch", INTERPRETER_BYTES, "before anything loads"), *parts]


def available_bytes(device: torch.device) -> int | None:
    """Memory of the machine, or of the CUDA device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def trainable_parameters(config: RunConfig, student: ModelFacts) -> int:
    """Parameters an optimizer changes; for LoRA those of adapters on the linear layers."""
    rank = config.student.lora.r
    if not rank:
        return student.parameters
    targets = config.student.lora.target_modules
    model = student.hollow.model
    count = 0
    for name, module in model.named_modules():
        chosen = not targets or any(name == t or name.endswith(f".{t}") for t in targets)
        if isinstance(module, torch.nn.Linear) and chosen and not name.endswith("lm_head"):
            count += rank * (module.in_features + module.out_features)
    return count


def _parts(
    config: RunConfig,
    phase: Phase,
    student: ModelFacts,
    teacher: ModelFacts | None,
    prompt_tokens: int,
    device: torch.device,
) -> Iterator[MemoryPart]:
    trainable = trainable_parameters(config, student)
    sequences = phase.prompts_per_step * phase.plan.sampler.samples_per_prompt
    new_tokens = phase.plan.sampler.max_new_tokens
    width = prompt_tokens + new_tokens
    evaluated = max(config.evaluate.prompts, config.evaluate.test_prompts)
    decoded = min(max(sequences, evaluated), config.sampler.max_sequences)
    micro = min(micro_batch_tokens(config.train.max_tokens, device), sequences * width)
    yield MemoryPart(
        "student weights", student.bytes, f"{student.parameters:,} parameters, student.dtype"
    )
    if teacher is not None:
        yield MemoryPart(
            "teacher weights", teacher.bytes, f"{teacher.parameters:,} parameters, teacher.dtype"
        )
    if "reference" in phase.method.objective.views() and not config.student.lora.r:
        yield MemoryPart("reference weights", student.bytes, "a copy of the student at step 0")
    yield MemoryPart(
        "gradients", trainable * student.item_bytes, f"{trainable:,} trainable parameters"
    )
    yield MemoryPart(
        "optimizer", 2 * trainable * student.item_bytes, "AdamW keeps two numbers per parameter"
    )
    writer = student if phase.method.states.student or teacher is None else teacher
    if phase.method.states.data < 1:
        yield MemoryPart(
            "key-value cache",
            CACHE_COPIES * writer.cache_bytes_per_token * decoded * width,
            f"{decoded} sequences of up to {prompt_tokens} + {new_tokens} tokens, twice while "
            "sequences are dropped; sampler.max_sequences",
        )
    if teacher is not None and reply_is_distribution(phase.plan.needs, "teacher"):
        yield MemoryPart(
            "teacher's hidden states",
            sequences * new_tokens * teacher.config.hidden_size * teacher.item_bytes,
            f"{sequences} x {new_tokens} rows; train.prompts_per_step",
        )
    layers, hidden = student.config.num_hidden_layers, student.config.hidden_size
    yield MemoryPart(
        "activations",
        micro * layers * hidden * ACTIVATION_BYTES * student.item_bytes / 2,
        f"a micro-batch of {micro:,} tokens; train.max_tokens",
    )
    rows_bytes = 4 * student.hollow.vocab_size * micro
    yield MemoryPart(
        "logits",
        CHUNK_COPIES * min(CHUNK_BYTES, rows_bytes),
        f"{CHUNK_COPIES} copies of a chunk of rows x {student.hollow.vocab_size:,} tokens",
    )

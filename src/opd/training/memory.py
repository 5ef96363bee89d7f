"""How much memory a run will take at its peak, part by part, before anything loads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from opd.head.visit import budget_on
from opd.training.config import OTHER_TEACHER, RunConfig
from opd.training.facts import ModelFacts
from opd.training.plan import is_scored, reply_is_distribution
from opd.training.session import Phase
from opd.training.teachers import micro_batch_tokens
from opd.types import TeacherView

# What a layer keeps for its backward pass, per token and hidden unit in a 16-bit dtype, when
# attention matrices are not stored: measured on Qwen3 shapes. A plain GELU layer keeps 34
# (Korthikanti et al., arXiv:2205.05198); gates and norms of today's layers add to that.
ACTIVATION_BYTES = 50
# What a formula holds of a block of rows while it is differentiated, in tensors of the block.
BLOCK_TENSORS = 16
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
    others: Mapping[str, ModelFacts] = MappingProxyType({}),
) -> list[MemoryPart]:
    """The parts of a run's memory, in the order in which a step meets them.

    The rollout, the teacher's pass and the update follow one another; the sum is what they would
    take together, an upper bound.

    Args:
        phase: the distillation.
        prompt_tokens: of the longest prompt that is expected.
        device: where the run takes place.
        others: further teachers, by name.
    """
    parts = _parts(config, phase, student, teacher, prompt_tokens, device, others)
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


def average_bytes(student: ModelFacts) -> float:
    """Of one averaged weight in memory: the average, and its copy in a narrower dtype."""
    return student.item_bytes if student.item_bytes >= 4 else 4 + student.item_bytes


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
    others: Mapping[str, ModelFacts],
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
    yield from _of_teachers(config, phase, teacher, others, device)
    views = phase.plan.views
    frozen = any(view.source == "initial_student" for view in views)
    if frozen and not (config.student.lora.r and not config.warmup.steps):
        yield MemoryPart("reference weights", student.bytes, "a copy of the student at step 0")
    if config.train.anchor:
        yield MemoryPart("anchor weights", trainable * student.item_bytes, "train.anchor")
    if phase.method.objective.critic_term is not None:
        steps, hidden = 1 + config.critic.replay_steps, student.hollow.model.config.hidden_size
        yield MemoryPart(
            "states for the critic",
            4.0 * steps * sequences * new_tokens * hidden,
            f"{steps} x {sequences} responses of {new_tokens} tokens, critic.replay_steps",
        )
    averages = sum(view.source == "ema_student" for view in views)
    if averages:
        yield MemoryPart(
            "average weights",
            averages * trainable * average_bytes(student),
            f"{averages} x {trainable:,} averaged parameters, in float32 or wider",
        )
    yield MemoryPart(
        "gradients", trainable * student.item_bytes, f"{trainable:,} trainable parameters"
    )
    yield MemoryPart(
        "optimizer", 2 * trainable * student.item_bytes, "AdamW keeps two numbers per parameter"
    )
    states = phase.method.states
    writer = student if states.student or teacher is None else teacher
    per_token = writer.cache_bytes_per_token
    if teacher is not None and (states.interleave or states.reach("mixture")):
        per_token += teacher.cache_bytes_per_token
    if states.data < 1:
        yield MemoryPart(
            "key-value cache",
            CACHE_COPIES * per_token * decoded * width,
            f"{decoded} sequences of up to {prompt_tokens} + {new_tokens} tokens, twice while "
            "sequences are dropped; sampler.max_sequences",
        )
    for view in views:
        model = _scorer_of(view, teacher, others) if view.source == "teacher" else student
        if model and is_scored(view) and reply_is_distribution(phase.plan.needs, view.name):
            yield MemoryPart(
                f"{view.name}'s hidden states",
                sequences * new_tokens * model.config.hidden_size * model.item_bytes,
                f"{sequences} x {new_tokens} rows; train.prompts_per_step",
            )
    layers, hidden = student.config.num_hidden_layers, student.config.hidden_size
    yield MemoryPart(
        "activations",
        micro * layers * hidden * ACTIVATION_BYTES * student.item_bytes / 2,
        f"a micro-batch of {micro:,} tokens; train.max_tokens",
    )
    budget, row_bytes = budget_on(device), 4 * student.hollow.vocab_size
    # the student's logits and those of every view that is projected, and at least a row of each
    sides = 1 + sum(is_scored(view) for view in views)
    chunk = max(min(budget.chunk_bytes, sides * row_bytes * micro), sides * row_bytes)
    block = max(min(budget.block_bytes, row_bytes * micro), row_bytes)
    tensors = BLOCK_TENSORS + sum(len(view.parts) for view in views)
    yield MemoryPart(
        "logits",
        chunk + tensors * block,
        f"a chunk of rows x {student.hollow.vocab_size:,} tokens of {sides} models, and "
        f"{tensors} tensors of a block of it",
    )
    if not config.student.lora.r:
        yield MemoryPart(
            "the unembedding's gradient",
            4.0 * student.hollow.vocab_size * hidden,
            "in float32, while a micro-batch is differentiated",
        )


def _of_teachers(
    config: RunConfig,
    phase: Phase,
    teacher: ModelFacts | None,
    others: Mapping[str, ModelFacts],
    device: torch.device,
) -> Iterator[MemoryPart]:
    """Weights of teachers that stay on the device, of the largest that comes in turn, and heads.

    On a CPU host memory is the device's.
    """
    gone = ("disk",) if device.type == "cpu" else ("disk", "host")
    staying = [other for name, other in others.items() if config.teachers[name].keep not in gone]
    passing = [other for name, other in others.items() if config.teachers[name].keep in gone]
    if teacher is not None and config.teacher.keep in gone:
        passing.append(teacher)
    elif teacher is not None:
        yield MemoryPart(
            "teacher weights", teacher.bytes, f"{teacher.parameters:,} parameters, teacher.dtype"
        )
    if staying:
        yield MemoryPart(
            "further teachers' weights",
            sum(other.bytes for other in staying),
            f"{len(staying)} models, [teachers]",
        )
    if not passing:
        return
    yield MemoryPart(
        "weights of the teacher whose turn it is",
        max(one.bytes for one in passing),
        f"the largest of {len(passing)} that are not kept on the device, teacher.keep",
    )
    views = (view for view in phase.plan.views if view.source == "teacher")
    if any(reply_is_distribution(phase.plan.needs, view.name) for view in views):
        yield MemoryPart(
            "unembeddings of teachers that have left",
            sum(one.hollow.vocab_size * one.config.hidden_size * one.item_bytes for one in passing),
            f"{len(passing)} of them stay until the update",
        )


def _scorer_of(
    view: TeacherView, teacher: ModelFacts | None, others: Mapping[str, ModelFacts]
) -> ModelFacts | None:
    """The model that scores a view; of a route the widest, to whose width replies are padded."""
    own = others.get(view.name.removeprefix(OTHER_TEACHER), teacher)
    if own is not None or not others:
        return own
    return max(others.values(), key=lambda other: int(other.config.hidden_size))

"""TRL's `DistillationTrainer`, timed as its users run it, and its gradient on a frozen batch.

Written against TRL 1.16. The trainer is TRL's own class with its own `train()`; nothing of it is
replaced. Time is read by a callback and by timers around three of its methods. Settings favour
TRL: float32 on the CPU, no gradient checkpointing, no logging, no saving, no evaluation, prompts
in the given order. Where a setting could go either way the faster one was kept; the numbers are
in this folder's README.

What TRL computes, so that a comparison can be exact (n runs over all response tokens of the
optimizer step, end token included, prompt and padding not):

    loss = sum_n D(student_n, teacher_n) / N          a mean over tokens, never over sequences

D is in nats over the full vocabulary: KL(student || teacher) at beta = 1, KL(teacher || student) at
beta = 0, the generalised Jensen-Shannon divergence in between; both sides are divided by the one
`temperature`, with no factor of its square. The gradient is that of D by its definition, the
expectation under the student included; the teacher carries none. Gradients are then clipped to a
global norm of 1 and given to AdamW (betas 0.9 and 0.999, no weight decay).

Run as a script it checks itself on tiny random models and prints TRL's time.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import constants as hub
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from opd.data.tasks import TASKS, build_tokenizer

__all__ = [
    "TrlGradient",
    "TrlTiming",
    "random_model",
    "run_trl_steps",
    "trl_loss_and_gradient",
]

# TRL's constructor reports over the network which trainer is used, unless told not to.
hub.HF_HUB_DISABLE_TELEMETRY = True

PHASES = ("rollout", "teacher", "student", "rest")


# --------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True)
class TrlTiming:
    """What the measured steps of one training took.

    Attributes:
        seconds: CPU-seconds from the end of the warm-up to the end of the last step: everything
            the training loop does in between.
        generated_tokens: response tokens of those steps, end tokens included; the tokens the loss
            was taken on.
        steps: measured optimizer steps.
        phases: CPU-seconds by phase, adding up to `seconds`. `rollout`: encode, generate, cut at
            the end token, pad. `teacher`: the teacher's backbone. `student`: the student's
            backbone, both unembeddings with the divergence, backward. `rest`: clipping, AdamW,
            data loading, the loop.
    """

    seconds: float
    generated_tokens: int
    steps: int
    phases: Mapping[str, float]

    @property
    def seconds_per_token(self) -> float:
        """CPU-seconds per generated token."""
        return self.seconds / self.generated_tokens


def run_trl_steps(
    *,
    student_folder: str | Path,
    teacher_folder: str | Path,
    prompts: Sequence[str],
    steps: int,
    prompt_ids: Sequence[Sequence[int]] | None = None,
    warmup_steps: int = 1,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    learning_rate: float = 1.5e-3,
    beta: float = 1.0,
    temperature: float = 1.0,
    seed: int = 0,
) -> TrlTiming:
    """Trains with TRL for `warmup_steps + steps` steps and times the last `steps`.

    Construction, imports, loading and the warm-up are not in the time. The global generators of
    Python, NumPy and torch are reseeded by TRL.

    Args:
        student_folder: model and tokenizer in Hugging Face format; read, not written.
        teacher_folder: model in Hugging Face format; computed in float32 whatever it is stored in.
        prompts: plain text without special tokens, taken in order, `batch_size` per step, from the
            start again when they run out.
        steps: measured optimizer steps, >= 1.
        prompt_ids: what each prompt must encode to; without it, the beginning-of-sequence token
            followed by the text's own tokens.
        warmup_steps: steps before the clock starts, >= 1.

    Raises:
        ValueError: TRL would train on other prompt tokens than these.
    """
    if steps < 1 or warmup_steps < 1:
        raise ValueError(f"steps and warmup_steps must be >= 1, got {steps} and {warmup_steps}")
    tokenizer = _load_tokenizer(student_folder)
    texts = _texts_for_trl(tokenizer, prompts)
    total = warmup_steps + steps
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer = DistillationTrainer(
            model=_load_model(student_folder),
            teacher_model=_load_model(teacher_folder),
            args=_settings(
                folder,
                max_steps=total,
                per_device_train_batch_size=batch_size,
                max_completion_length=max_new_tokens,
                learning_rate=learning_rate,
                beta=beta,
                temperature=temperature,
                seed=seed,
            ),
            train_dataset=Dataset.from_dict(
                {"prompt": list(islice(cycle(texts), total * batch_size))}
            ),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        _check_prompts(trainer, texts, prompt_ids or _expected_ids(tokenizer, prompts))
        stopwatch = _Stopwatch(trainer, warmup_steps)
        trainer.train()
    return stopwatch.timing()


@contextmanager
def _quiet() -> Iterator[None]:
    """TRL 1.16 reads names that transformers deprecates; that is not news for a benchmark."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _load_model(folder: str | Path) -> PreTrainedModel:
    """In float32: by a path alone TRL would run the teacher in the type it is stored in."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _settings(folder: str, **changes: Any) -> DistillationConfig:
    """Everything that only costs time is off; what remains is the training itself."""
    return DistillationConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        shuffle_dataset=False,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        **changes,
    )


class _Stopwatch(TrainerCallback):
    """Reads the process clock at step ends and around the trainer's own methods."""

    def __init__(self, trainer: Any, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self._reset()
        self._watch(trainer)
        trainer.add_callback(self)

    def _reset(self) -> None:
        self._steps = 0
        self._tokens = 0
        self._spent = {"rollout": 0.0, "teacher": 0.0, "training_step": 0.0}
        self._start = self._end = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._warmup_steps:
            self._reset()
            return
        self._steps += 1
        self._end = time.process_time()

    def _watch(self, trainer: Any) -> None:
        """Wraps bound methods on this one instance; the class stays as it is."""
        generate = trainer._generate_and_score_completions
        hidden_states = trainer._get_last_hidden_state
        training_step = trainer.training_step

        def timed_generate(inputs: Any) -> Any:
            with self._phase("rollout"):
                batch = generate(inputs)
            self._tokens += int(batch["completion_mask"].sum())
            return batch

        def timed_hidden_states(model: Any, *args: Any, **kwargs: Any) -> Any:
            if model is not trainer.teacher_model:
                return hidden_states(model, *args, **kwargs)
            with self._phase("teacher"):
                return hidden_states(model, *args, **kwargs)

        def timed_training_step(*args: Any, **kwargs: Any) -> Any:
            with self._phase("training_step"):
                return training_step(*args, **kwargs)

        trainer._generate_and_score_completions = timed_generate
        trainer._get_last_hidden_state = timed_hidden_states
        trainer.training_step = timed_training_step

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            self._spent[name] += time.process_time() - start

    def timing(self) -> TrlTiming:
        seconds = self._end - self._start
        rollout, teacher = self._spent["rollout"], self._spent["teacher"]
        student = self._spent["training_step"] - rollout - teacher
        rest = seconds - self._spent["training_step"]
        return TrlTiming(
            seconds=seconds,
            generated_tokens=self._tokens,
            steps=self._steps,
            phases=dict(zip(PHASES, (rollout, teacher, student, rest), strict=True)),
        )


# --------------------------------------------------------------------------------------------
# Prompts


def _load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"  # TRL pads prompts there; it asks for a tokenizer that agrees
    return tokenizer


def _texts_for_trl(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The prompts as TRL must be given them.

    TRL encodes a plain-text prompt with `tokenizer(text)`. That adds no beginning-of-sequence
    token unless the tokenizer does so itself, so otherwise the text has to start with it.
    """
    adds_bos = tokenizer(prompts[0])["input_ids"][0] == tokenizer.bos_token_id
    return list(prompts) if adds_bos else [f"{tokenizer.bos_token}{text}" for text in prompts]


def _expected_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Iterator[Sequence[int]]:
    for text in prompts:
        yield [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def _check_prompts(trainer: Any, texts: Sequence[str], prompt_ids: Any) -> None:
    encoded, _, _ = trainer._tokenize_prompts(list(texts))
    for text, seen, expected in zip(texts, encoded, prompt_ids, strict=True):
        if list(seen) != list(expected):
            raise ValueError(f"TRL encodes {text!r} as {list(seen)}, not as {list(expected)}")


# --------------------------------------------------------------------------------------------
# The gradient


@dataclass(frozen=True)
class TrlGradient:
    """TRL's loss on a frozen batch.

    Attributes:
        loss: the mean of `divergence`, as the trainer computes it.
        divergence: per response token in nats, sequence after sequence, end tokens included.
        gradient: of `loss`, by the student's parameter names; before clipping. A tied unembedding
            appears once, under the name of the embedding.
    """

    loss: float
    divergence: Float[Tensor, " N"]
    gradient: Mapping[str, Tensor]


def trl_loss_and_gradient(
    *,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    beta: float = 1.0,
    temperature: float = 1.0,
) -> TrlGradient:
    """TRL's `compute_loss` and its gradient on prompts and responses that already exist.

    The batch is padded as TRL pads it: prompts on the left, responses on the right. TRL passes no
    position ids, so a padded row starts at a position above 0; under rotary positions that moves
    results by rounding only. The models are copied, not touched.

    Args:
        prompt_ids, completion_ids: one list of ids per sequence, without padding; a response
            includes its end token if it has one.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer = DistillationTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            args=_settings(folder, beta=beta, temperature=temperature),
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=copy.deepcopy(tokenizer),
        )
    trainer.remove_callback(PrinterCallback)
    model: Any = trainer.model
    model.train()
    inputs = _frozen_inputs(prompt_ids, completion_ids, trainer._tokenizer.pad_token_id)
    divergence = _per_token(trainer, inputs)
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradient = {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return TrlGradient(loss=loss.item(), divergence=divergence, gradient=gradient)


def _frozen_inputs(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], pad_id: int
) -> dict[str, Tensor]:
    """The record the trainer's `_generate_and_score_completions` hands to its loss."""
    prompts, prompt_mask = _padded(prompt_ids, pad_id, side="left")
    completions, completion_mask = _padded(completion_ids, pad_id, side="right")
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": completion_mask,
        "num_items_in_batch": completion_mask.sum(),
    }


def _padded(sequences: Sequence[Sequence[int]], pad_id: int, *, side: str) -> tuple[Tensor, Tensor]:
    tensors = [torch.tensor(sequence) for sequence in sequences]
    masks = [torch.ones_like(row) for row in tensors]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    return pad(tensors, padding_value=pad_id), pad(masks, padding_value=0)


@torch.no_grad()
def _per_token(trainer: Any, inputs: Mapping[str, Tensor]) -> Float[Tensor, " N"]:
    """The per-token divergence the loss sums, from TRL's own function on TRL's hidden states."""
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    responses = inputs["completion_mask"].bool()
    sides: list[Tensor | None] = []
    for model in (trainer.model, trainer.teacher_model):
        hidden = trainer._get_last_hidden_state(
            model, input_ids, attention_mask, responses.shape[1]
        )
        head = model.get_output_embeddings()
        sides += [hidden[responses], head.weight, head.bias]
    function: Any = ChunkedDivergenceFunction
    divergence: Tensor = function.apply(*sides, trainer.beta, trainer.temperature)[0]
    return divergence


# --------------------------------------------------------------------------------------------
# Self-check


def main() -> None:
    """Checks loss and gradient against their definition, then prints TRL's time per step."""
    arguments = argparse.ArgumentParser(description="TRL's DistillationTrainer on tiny models.")
    arguments.add_argument("--steps", type=int, default=6, help="measured steps")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quiet_loading: Callable[[], None] = transformers_logging.disable_progress_bar
    quiet_loading()
    tokenizer = build_tokenizer()
    student = random_model(tokenizer, width=64, layers=2)
    teacher = random_model(tokenizer, width=96, layers=3)
    _check_definition(student, teacher, tokenizer)
    examples = islice(TASKS["sort"].stream("train", seed=0), 64 * (options.steps + 1))
    prompts = [example.prompt for example in examples]
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in ("student", "teacher")}
        student.save_pretrained(paths["student"])
        teacher.save_pretrained(paths["teacher"])
        tokenizer.save_pretrained(paths["student"])
        timing = run_trl_steps(
            student_folder=paths["student"],
            teacher_folder=paths["teacher"],
            prompts=prompts,
            steps=options.steps,
        )
    _print_timing(timing)


def _check_definition(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt_ids = [[1, *range(10, 10 + length)] for length in (4, 6, 8)]
    completion_ids = [[*torch.randint(3, 53, (length,)).tolist(), 2] for length in (20, 5, 12)]
    seen = trl_loss_and_gradient(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
    )
    divergence = torch.cat(
        [
            _reverse_kl(student, teacher, prompt, completion)
            for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]
    )
    names = [name for name, _ in student.named_parameters()]
    gradient = dict(
        zip(names, torch.autograd.grad(divergence.mean(), list(student.parameters())), strict=True)
    )
    loss_error = abs(seen.loss - divergence.mean().item())
    token_error = (seen.divergence - divergence).abs().max().item()
    gradient_error = max((seen.gradient[name] - gradient[name]).abs().max() for name in names)
    largest = max(value.abs().max() for value in gradient.values())
    print(f"loss        {seen.loss:.6f} nats per token, difference {loss_error:.1e}")
    print(f"divergence  largest difference {token_error:.1e} nats")
    print(f"gradient    largest difference {gradient_error:.1e}, largest entry {largest:.1e}")
    if max(loss_error, token_error, gradient_error / largest) > 1e-5:
        raise SystemExit("TRL's loss is not the mean reverse KL per token that this file states")


def _reverse_kl(
    student: PreTrainedModel, teacher: PreTrainedModel, prompt: list[int], completion: list[int]
) -> Float[Tensor, " T"]:
    """KL(student || teacher) of one unpadded sequence, written out."""
    tokens = torch.tensor([prompt + completion])
    rows = slice(len(prompt) - 1, -1)  # the position before a token predicts it
    student_log_probs: Tensor = student(tokens).logits[0, rows].log_softmax(-1)
    with torch.no_grad():
        teacher_log_probs: Tensor = teacher(tokens).logits[0, rows].log_softmax(-1)
    return (student_log_probs.exp() * (student_log_probs - teacher_log_probs)).sum(-1)


def _print_timing(timing: TrlTiming) -> None:
    print(
        f"TRL         {1e3 * timing.seconds / timing.steps:.0f} CPU-ms per step, "
        f"{1e6 * timing.seconds_per_token:.1f} us per generated token, "
        f"{timing.generated_tokens / timing.steps:.0f} tokens per step"
    )
    for phase, seconds in timing.phases.items():
        share = seconds / timing.seconds
        print(f"  {phase:9s} {1e3 * seconds / timing.steps:6.1f} ms  {share:5.1%}")


def random_model(
    tokenizer: PreTrainedTokenizerBase, *, width: int, layers: int, spread: float = 0.02
) -> PreTrainedModel:
    """The shapes of the embedded task: heads of 32, an MLP of three times the width, tied.

    Weights are normal with a standard deviation of `spread`.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: PreTrainedModel = Qwen3ForCausalLM(config)
    return model


if __name__ == "__main__":
    main()

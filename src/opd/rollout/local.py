"""The local rollout engine: samples responses from a model in this process.

Two paths produce the same logits. The *generic* path calls the model's own backbone with its own
key-value cache, so it works for every causal language model, live adapters included. The *fast*
path (`fast.py`) re-implements decoding for Llama-like shapes. Everything after the logits (drawing,
ending, recording) is shared.

A call proceeds in blocks of decode steps. Within a block nothing is read back from the device;
between blocks rows that have ended are recorded and, when enough of them have gathered, dropped.
Randomness is one uniform number per row of the *whole* batch and step, so a row's draws do not
depend on which other rows are still alive.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from opd.errors import ConfigError, DataError, TrainingError, is_out_of_memory
from opd.models import LoadedModel, backbone, project, unembedding
from opd.rollout.fast import FastDecoder, left_padded, why_not_fast, widened
from opd.rollout.pack import join_model_inputs
from opd.types import STOP_REASONS, Prompt, Provenance, Rollout, SamplerSettings

__all__ = ["LocalSampler"]

BLOCK_STEPS = 4
"""Decode steps between two looks at which rows have ended."""

DROP_BELOW = 0.75
"""Ended rows are dropped once at most this share of the decoded rows is alive."""


Logits = TypeVar("Logits", covariant=True)
"""What a decoder returns: one model's `[B, V]`, or those of two models side by side."""


@runtime_checkable
class Decoder(Protocol[Logits]):
    """A model with a key-value cache: one row per response."""

    def prefill(
        self, prompts: Sequence[tuple[int, ...]], rows: Int[Tensor, " B"], room: int
    ) -> Logits:
        """Read the prompts, give row b a copy of prompt `rows[b]`; logits of the first token.

        `room` is how many `step` calls may follow.
        """
        ...

    def step(self, tokens: Int[Tensor, " B"]) -> Logits:
        """Append one token to every row; logits of the next one."""
        ...

    def keep(self, rows: Int[Tensor, " A"]) -> None:
        """Drop every row but these."""
        ...


@dataclass(frozen=True)
class Drawn:
    """One token per row, and what is known of the choice.

    Attributes:
        probability: of the token, under the distribution it was drawn from.
        top_ids: the likeliest tokens before truncation, if asked for.
        by_teacher: True where a teacher chose instead of the student; None: nowhere.
    """

    tokens: Int[Tensor, "A 1"]
    probability: Float[Tensor, "A 1"]
    top_ids: Int[Tensor, "A K"] | None = None
    by_teacher: Bool[Tensor, "A 1"] | None = None


class LocalSampler:
    """Samples responses from a model in this process. Implements `opd.types.Sampler`.

    The weights are read anew at every call, so an optimizer may change them in between. The model
    is sampled without dropout and without gradients, and left in the mode it was found in.

    Args:
        loaded: the model, its tokenizer and its end tokens.
        fast: True insists on the fast path, False on the generic one; None takes the fast path
            wherever it supports the model. `path` and `path_reason` tell which it is.
        provenance: whose tokens these are: `STUDENT`, or `TEACHER` when a teacher writes.

    Raises:
        ConfigError: no end token is known, or `fast=True` for a model it does not support.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        fast: bool | None = None,
        provenance: Provenance = Provenance.STUDENT,
    ) -> None:
        if not loaded.eos_ids:
            raise ConfigError(
                "the model has no end-of-sequence token, so no response could end by itself; set "
                "eos_token_id in its generation_config.json or give its tokenizer an eos_token"
            )
        self._loaded = loaded
        self._provenance = provenance
        obstacle = why_not_fast(loaded.model, unembedding(loaded.model, loaded.vocab_size))
        if fast and obstacle:
            raise ConfigError(
                f"fast=True, but the fast path does not support this model: {obstacle}; "
                "use fast=None to take the generic path"
            )
        self._fast = obstacle is None if fast is None else fast
        self._reason = (
            "asked for" if fast is not None else obstacle or "a Llama-like shape with plain weights"
        )

    @property
    def path(self) -> str:
        """`fast` or `generic`."""
        return "fast" if self._fast else "generic"

    @property
    def path_reason(self) -> str:
        """Why `path` is what it is."""
        return self._reason

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        *,
        generator: torch.Generator,
        policy_version: int = 0,
    ) -> Rollout:
        """Sample `settings.samples_per_prompt` responses to every prompt.

        Responses are ordered prompt by prompt. A response ends with its end token, with the token
        that completes a stop string, or at `settings.max_new_tokens`.

        Args:
            prompts: prompts of any lengths; equal ones are read once.
            settings: temperature first, then top-k, then top-p within what top-k kept.
            generator: the only source of randomness; lives on any device.
            policy_version: optimizer steps the weights have seen, written beside every token.

        Returns:
            A rollout whose `sampler_logp` is the log-probability under the distribution sampled
            from (0 everywhere when greedy), and whose verdicts are NaN.

        Raises:
            DataError: no prompts, or an empty one.
            TrainingError: out of memory.
        """
        loaded = self._loaded
        check_request(prompts, settings, loaded)
        with sampling([self], prompts, settings):
            written = Written(len(prompts), settings, device_of(loaded))
            for batch in batches(prompts, settings.samples_per_prompt, [loaded]):
                decode(
                    self.decoder(batch),
                    functools.partial(_draw, settings=settings),
                    batch,
                    written,
                    settings,
                    loaded,
                    generator,
                )
        return written.rollout(
            prompts,
            settings,
            pad_id=loaded.pad_id,
            policy_version=policy_version,
            provenance=self._provenance,
        )

    @property
    def loaded(self) -> LoadedModel:
        """The model that is sampled."""
        return self._loaded

    def decoder(self, batch: PromptBatch) -> Decoder[Float[Tensor, "B V"]]:
        """A fresh decoder for the responses of a batch."""
        if not self._fast:
            return _GenericDecoder(self._loaded, batch.model_inputs)
        if batch.model_inputs:
            raise ConfigError(
                f"prompts carry model inputs ({', '.join(batch.model_inputs)}), which the fast "
                "path does not read; use LocalSampler(..., fast=False)"
            )
        model = self._loaded.model
        return FastDecoder(model, unembedding(model, self._loaded.vocab_size))


# --------------------------------------------------------------------------------------------
# The batch and what is written about it


@dataclass(frozen=True)
class PromptBatch:
    """B responses to write. Equal prompts without further inputs are read once.

    Attributes:
        rows: for each response its index among all that were asked for.
        unique: the distinct prompts, as token ids.
        unique_of: for each response the index of its prompt in `unique`.
        model_inputs: further inputs of the model, concatenated over `unique`.
    """

    rows: tuple[int, ...]
    unique: tuple[tuple[int, ...], ...]
    unique_of: tuple[int, ...]
    model_inputs: Mapping[str, Tensor]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], indices: Sequence[int], repeats: int) -> PromptBatch:
        """`repeats` responses to each of the prompts at `indices`."""
        number: dict[Any, int] = {}
        chosen: list[Prompt] = []
        unique_of: list[int] = []
        for index in indices:
            prompt = prompts[index]
            key = (prompt.prompt_ids, index if prompt.model_inputs else None)
            if key not in number:
                number[key] = len(chosen)
                chosen.append(prompt)
            unique_of += [number[key]] * repeats
        return cls(
            rows=tuple(i * repeats + sample for i in indices for sample in range(repeats)),
            unique=tuple(prompt.prompt_ids for prompt in chosen),
            unique_of=tuple(unique_of),
            model_inputs=join_model_inputs([prompt.model_inputs for prompt in chosen]),
        )


def batches(
    prompts: Sequence[Prompt], repeats: int, models: Sequence[LoadedModel]
) -> Iterator[PromptBatch]:
    """All prompts at once; for a recurrent model, whose state padding would change, those of one
    length after the other."""
    if not any(getattr(backbone(loaded.model), "_is_stateful", False) for loaded in models):
        yield PromptBatch.of(prompts, range(len(prompts)), repeats)
        return
    for length in sorted({len(prompt.prompt_ids) for prompt in prompts}):
        same = [i for i, prompt in enumerate(prompts) if len(prompt.prompt_ids) == length]
        yield PromptBatch.of(prompts, same, repeats)


def device_of(loaded: LoadedModel) -> torch.device:
    """Where the model's weights are."""
    return next(loaded.model.parameters()).device


def check_request(
    prompts: Sequence[Prompt], settings: SamplerSettings, loaded: LoadedModel
) -> None:
    """Refuse prompts and settings that cannot be sampled.

    Raises:
        DataError: no prompts, or an empty one.
        ConfigError: more top ids than there are tokens.
    """
    if settings.student_top_k > loaded.vocab_size:
        raise ConfigError(
            f"sampler.student_top_k is {settings.student_top_k}, but the model knows only "
            f"{loaded.vocab_size} tokens; lower it"
        )
    if not prompts:
        raise DataError("there are no prompts to sample from")
    for prompt in prompts:
        if not prompt.prompt_ids:
            raise DataError(
                f"prompt {prompt.id!r} has no tokens; give it text, or let the tokenizer add a "
                "beginning-of-sequence token"
            )


class Written:
    """What has been sampled, for every response, on the model's device.

    Beyond `lengths` the entries are whatever the model went on to write, and mean nothing.
    """

    def __init__(self, n_prompts: int, settings: SamplerSettings, device: torch.device) -> None:
        rows = n_prompts * settings.samples_per_prompt
        shape = (rows, settings.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logp = torch.zeros(shape, device=device)
        k = settings.student_top_k
        self.top_ids = torch.zeros((*shape, k), dtype=torch.long, device=device) if k else None
        self.by_teacher: Bool[Tensor, "B T"] | None = None
        self.lengths = torch.full((rows,), settings.max_new_tokens, device=device)
        self.reason = torch.full((rows,), STOP_REASONS.index("length"), device=device)

    def rollout(
        self,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        *,
        pad_id: int,
        policy_version: int,
        provenance: Provenance = Provenance.STUDENT,
    ) -> Rollout:
        """The responses as a rollout, padding and provenance settled."""
        device = self.tokens.device
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=device) < self.lengths[:, None]
        writer = torch.full_like(self.tokens[:, :longest], int(provenance))
        if self.by_teacher is not None:
            writer[self.by_teacher[:, :longest]] = int(Provenance.TEACHER)
        repeats = settings.samples_per_prompt
        records = tuple(prompt for prompt in prompts for _ in range(repeats))
        return Rollout(
            prompt_ids=tuple(record.prompt_ids for record in records),
            tokens=torch.where(mask, self.tokens[:, :longest], pad_id),
            mask=mask,
            provenance=torch.where(mask, writer, int(Provenance.PADDING)),
            sampler_logp=torch.where(mask, self.logp[:, :longest], 0.0),
            policy_version=torch.where(mask, policy_version, -1),
            group=torch.arange(len(prompts), device=device).repeat_interleave(repeats),
            stop_reason=tuple(STOP_REASONS[index] for index in self.reason.tolist()),
            verdict=torch.full((len(records),), float("nan"), device=device),
            sampler_top_ids=None
            if self.top_ids is None
            else torch.where(mask[..., None], self.top_ids[:, :longest], 0),
            prompts=records,
            model_inputs=tuple(record.model_inputs for record in records),
        )


# --------------------------------------------------------------------------------------------
# The loop


AnyLogits = TypeVar("AnyLogits")


def decode(
    decoder: Decoder[AnyLogits],
    draw: Callable[[AnyLogits, Float64[Tensor, "A 1"]], Drawn],
    batch: PromptBatch,
    written: Written,
    settings: SamplerSettings,
    loaded: LoadedModel,
    generator: torch.Generator,
) -> None:
    """Sample every response of a batch into `written`.

    Args:
        draw: chooses one token per row from what the decoder returns and a uniform number.
        loaded: whose end tokens end a response.
    """
    device = written.tokens.device
    rows = torch.tensor(batch.rows, device=device)  # which responses the decoded rows are
    drawn = torch.arange(len(rows), device=device)  # which uniform numbers are theirs
    is_open = torch.ones(len(rows), dtype=torch.bool, device=device)
    ending = _Ending(settings, loaded, device)
    limit = settings.max_new_tokens

    logits = decoder.prefill(batch.unique, torch.tensor(batch.unique_of, device=device), limit - 1)
    tokens = torch.zeros_like(rows)
    for start in range(0, limit, BLOCK_STEPS):
        steps = min(BLOCK_STEPS, limit - start)
        uniform = _uniform(steps, len(batch.rows), generator, device)[:, drawn, None]
        block = _Block()
        for step in range(steps):
            if start + step > 0:
                logits = decoder.step(tokens)
            drawn_now = draw(logits, uniform[step])
            tokens = drawn_now.tokens.squeeze(1)
            block.append(drawn_now)
        block.write(written, rows, start)
        is_open &= ~ending.record(written, rows, is_open, start, start + steps)
        n_open = int(is_open.sum())
        if n_open == 0:
            return
        if n_open <= DROP_BELOW * len(rows) and start + steps < limit:
            kept = is_open.nonzero().squeeze(1)
            decoder.keep(kept)
            rows, drawn, is_open, tokens = (x[kept] for x in (rows, drawn, is_open, tokens))


def _uniform(
    steps: int, rows: int, generator: torch.Generator, device: torch.device
) -> Float64[Tensor, "steps rows"]:
    """Uniform numbers in [0, 1), in float64 so that a rare token has its exact share."""
    uniform = torch.rand(
        steps, rows, dtype=torch.float64, generator=generator, device=generator.device
    )
    return uniform.to(device) * (1 - 2**-50)  # `uniform * total` rounds to less than `total`


class _Block:
    """The decode steps between two looks at which rows have ended."""

    def __init__(self) -> None:
        self._drawn: list[Drawn] = []

    def append(self, drawn: Drawn) -> None:
        self._drawn.append(drawn)

    def write(self, written: Written, rows: Int[Tensor, " A"], start: int) -> None:
        """Copy the block to its place.

        Raises:
            TrainingError: the model's logits are not finite.
        """
        probability = torch.cat([drawn.probability for drawn in self._drawn], 1)
        if not torch.isfinite(probability).all():
            raise TrainingError(
                "the model's logits are not finite, so nothing can be sampled from it: its weights "
                "have blown up; the last checkpoint is intact, lower the learning rate or clip"
            )
        steps = slice(start, start + len(self._drawn))
        written.tokens[rows, steps] = torch.cat([drawn.tokens for drawn in self._drawn], 1)
        written.logp[rows, steps] = probability.log().float()
        if written.top_ids is not None:
            top_ids = [drawn.top_ids for drawn in self._drawn if drawn.top_ids is not None]
            written.top_ids[rows, steps] = torch.stack(top_ids, 1)
        replaced = [drawn.by_teacher for drawn in self._drawn if drawn.by_teacher is not None]
        if replaced:
            if written.by_teacher is None:
                written.by_teacher = torch.zeros_like(written.tokens, dtype=torch.bool)
            written.by_teacher[rows, steps] = torch.cat(replaced, 1)


def _draw(
    logits: Float[Tensor, "A V"], uniform: Float64[Tensor, "A 1"], *, settings: SamplerSettings
) -> Drawn:
    """Sample one token per row from one model."""
    top_ids = top_of(logits, settings)
    if settings.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        return Drawn(tokens, torch.ones_like(tokens, dtype=logits.dtype), top_ids)
    distribution = probabilities(logits, settings)
    tokens = inverse_cdf(distribution, uniform)
    return Drawn(tokens, distribution.gather(1, tokens), top_ids)


def top_of(logits: Float[Tensor, "A V"], settings: SamplerSettings) -> Int[Tensor, "A K"] | None:
    """The likeliest tokens, if the settings ask for them."""
    return logits.topk(settings.student_top_k).indices if settings.student_top_k else None


def probabilities(logits: Float[Tensor, "A V"], settings: SamplerSettings) -> Float[Tensor, "A V"]:
    """The distribution to sample from: temperature, then top-k, then top-p within top-k.

    At temperature 0 all of it is on the likeliest token.
    """
    if settings.temperature == 0:
        return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
    if settings.temperature != 1:
        logits = logits / settings.temperature
    if settings.top_p < 1 or 0 < settings.top_k < logits.shape[-1]:
        logits = _truncate(logits, settings.top_k, settings.top_p)
    return logits.softmax(-1)


def _truncate(logits: Float[Tensor, "A V"], top_k: int, top_p: float) -> Float[Tensor, "A V"]:
    """-inf on every token that is not among the `top_k` (0: all) or the nucleus of `top_p`."""
    values, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p < 1:
        mass = values.softmax(-1, dtype=torch.float64)
        before = mass.cumsum(-1) - mass  # a token stays where those before it do not suffice
        values = values.masked_fill(before >= top_p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(1, ids, values)


def inverse_cdf(
    distribution: Float[Tensor, "A V"], uniform: Float64[Tensor, "A 1"]
) -> Int[Tensor, "A 1"]:
    """One draw per row: the first token up to which the mass exceeds `uniform`.

    The sum runs in float64; a token without mass adds nothing to it, so it is never the first.
    Where a probability is NaN the last token is drawn; `write` refuses the block.
    """
    cumulated = distribution.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulated, cumulated[:, -1:] * uniform, right=True)
    return drawn.clamp_(max=distribution.shape[-1] - 1)


class _Ending:
    """Finds where responses end."""

    def __init__(
        self, settings: SamplerSettings, loaded: LoadedModel, device: torch.device
    ) -> None:
        self._eos_ids = torch.tensor(loaded.eos_ids, device=device)
        self._stop = settings.stop
        self._tokenizer = loaded.tokenizer

    def record(
        self, written: Written, rows: Tensor, is_open: Bool[Tensor, " A"], start: int, stop: int
    ) -> Bool[Tensor, " A"]:
        """Note which rows end within the steps `[start, stop)`, and return which did."""
        tokens = written.tokens[rows, start:stop]
        at_eos = (tokens[..., None] == self._eos_ids).any(-1)
        if not (self._stop or at_eos.any()):
            return at_eos[:, 0]  # False everywhere
        steps = torch.arange(start, stop, device=rows.device)
        end = torch.where(at_eos, steps, stop).amin(1)
        reason = torch.full_like(end, STOP_REASONS.index("eos"))
        if self._stop:
            self._find_stop_strings(written.tokens, rows, is_open, start, end, reason)
        ended = is_open & (end < stop)
        written.lengths[rows[ended]] = end[ended] + 1
        written.reason[rows[ended]] = reason[ended]
        return ended

    def _find_stop_strings(
        self,
        tokens: Int[Tensor, "B T"],
        rows: Tensor,
        is_open: Bool[Tensor, " A"],
        start: int,
        end: Int[Tensor, " A"],
        reason: Int[Tensor, " A"],
    ) -> None:
        """Bring `end` forward to the token that completes a stop string.

        The whole response is decoded each time, because a piece of it may decode differently.
        """
        for index in is_open.nonzero().squeeze(1).tolist():
            last = int(end[index])
            response = tokens[rows[index], : last + 1].tolist()
            if not self._stops(response[:last]):
                continue
            first = next(n for n in range(start + 1, last + 1) if self._stops(response[:n]))
            end[index] = first - 1
            reason[index] = STOP_REASONS.index("stop_string")

    def _stops(self, response: list[int]) -> bool:
        return has_stop_string(self._tokenizer, response, self._stop)


def has_stop_string(tokenizer: Any, response: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether one of the strings stands in the decoded response."""
    text = tokenizer.decode(response, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return any(string in text for string in stop)


# --------------------------------------------------------------------------------------------
# The generic path


class _GenericDecoder:
    """A `Decoder` over the model's own backbone and cache.

    Prompts are padded on the left. Where all have one length there is neither mask nor position
    to pass, and the model counts by itself.
    """

    def __init__(self, loaded: LoadedModel, model_inputs: Mapping[str, Tensor]) -> None:
        self._backbone = backbone(loaded.model)
        self._head = widened(unembedding(loaded.model, loaded.vocab_size))
        self._model_inputs = model_inputs
        forward = inspect.signature(self._backbone.forward).parameters
        self._takes_positions = "position_ids" in forward

    def prefill(
        self, prompts: Sequence[tuple[int, ...]], rows: Int[Tensor, " B"], room: int
    ) -> Float[Tensor, "B V"]:
        """Read the prompts, give row b a copy of prompt `rows[b]`; logits of the first token."""
        ids, real = left_padded(prompts, rows.device)
        positions = (real.cumsum(1) - 1).clamp_min(0)
        even = bool(real.all())
        inputs = {} if even else self._placed(real, positions)
        extra = {name: value.to(rows.device) for name, value in self._model_inputs.items()}
        output = self._backbone(input_ids=ids, use_cache=True, **inputs, **extra)
        self._cache = output.past_key_values
        self._cache.reorder_cache(rows)
        self._real = None if even else nn.functional.pad(real.long()[rows], (0, room), value=1)
        self._position = positions[rows, -1:] + 1
        self._filled = ids.shape[1]
        return project(output.last_hidden_state[:, -1], self._head)[rows]

    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Append one token to every row; logits of the next one."""
        self._filled += 1
        inputs = (
            {}
            if self._real is None
            else self._placed(self._real[:, : self._filled], self._position)
        )
        output = self._backbone(
            input_ids=tokens[:, None], past_key_values=self._cache, use_cache=True, **inputs
        )
        self._position = self._position + 1
        return project(output.last_hidden_state[:, -1], self._head)

    def keep(self, rows: Int[Tensor, " A"]) -> None:
        """Drop every row but these."""
        self._cache.reorder_cache(rows)
        self._position = self._position[rows]
        if self._real is not None:
            self._real = self._real[rows]

    def _placed(self, real: Tensor, positions: Tensor) -> dict[str, Tensor]:
        placed = {"attention_mask": real.long()}
        if self._takes_positions:
            placed["position_ids"] = positions
        return placed


# --------------------------------------------------------------------------------------------
# Surroundings


@contextmanager
def sampling(
    samplers: Sequence[LocalSampler], prompts: Sequence[Prompt], settings: SamplerSettings
) -> Iterator[None]:
    """No gradients, no dropout, and advice where memory runs out."""
    # a model may cache tensors in its forward, and training could not use inference tensors
    fast = all(sampler.path == "fast" for sampler in samplers)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode() if fast else torch.no_grad())
        for sampler in samplers:
            stack.enter_context(_evaluation_mode(sampler.loaded.model))
        stack.enter_context(_memory_advice(prompts, settings))
        yield


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module is left in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _memory_advice(prompts: Sequence[Prompt], settings: SamplerSettings) -> Iterator[None]:
    """Turns running out of memory into an error that names the knobs."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        longest = max(len(prompt.prompt_ids) for prompt in prompts)
        raise TrainingError(
            f"out of memory while sampling {len(prompts)} prompts x samples_per_prompt="
            f"{settings.samples_per_prompt} of up to {longest} + max_new_tokens="
            f"{settings.max_new_tokens} tokens; lower the number of prompts per step, "
            "sampler.samples_per_prompt or sampler.max_new_tokens"
        ) from error

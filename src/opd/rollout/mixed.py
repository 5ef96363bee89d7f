"""Student and teacher write one response together, token by token.

Both models read every token that is written, each with its own key-value cache, and a rule chooses
the next token from their two distributions, each after temperature and truncation:

    mixture      y ~ a * teacher + (1 - a) * student
    interleave   the student proposes y; if it is not among the teacher's k likeliest tokens,
                 the teacher draws another

A rule spends one uniform number per row and token, as a plain sampler does: with a = 0, or k = the
whole vocabulary, the responses are those of the student's own sampler, bit for bit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from opd.errors import ConfigError
from opd.models import check_same_vocabulary
from opd.rollout.local import (
    Decoder,
    Drawn,
    LocalSampler,
    Written,
    batches,
    check_request,
    decode,
    device_of,
    inverse_cdf,
    probabilities,
    sampling,
    top_of,
)
from opd.types import Prompt, Rollout, SamplerSettings

__all__ = ["MixedSampler"]

Pair = tuple[Tensor, Tensor]
"""Logits of student and teacher, `[A, V]` each."""

Rule = Callable[[Pair, Float64[Tensor, "A 1"]], Drawn]


class MixedSampler:
    """Samples from student and teacher together. Implements `opd.types.Sampler`.

    `sampler_logp` is the log-probability of the token under the rule as a whole, whoever chose it:

        mixture      log(a * teacher(y) + (1 - a) * student(y))
        interleave   log([y in top k] * student(y) + student(outside top k) * teacher(y))

    so that `exp(student_logp - sampler_logp)` weighs the token exactly. Tokens of a mixture have
    the student's provenance; of an interleaved response those that the teacher put in place of a
    proposal have the teacher's.

    Source: Gu et al., MiniLLM, arXiv:2306.08543, section 2.2 (mixture); Xu et al., Speculative
        Knowledge Distillation, arXiv:2410.11325, algorithm 1 (interleave), which drafts several
        proposals between two looks of the teacher: the same distribution of responses.

    Args:
        student, teacher: samplers of two models with one vocabulary. Top ids are the student's.
        mixture: a, in [0, 1].
        interleave: k; 0 for the mixture.

    Raises:
        ConfigError: two vocabularies, two rules, or a rule that cannot be followed.
    """

    def __init__(
        self,
        student: LocalSampler,
        teacher: LocalSampler,
        *,
        mixture: float = 0.0,
        interleave: int = 0,
    ) -> None:
        shared = check_same_vocabulary(student.loaded, teacher.loaded, merge_stop_ids=True)
        sizes = student.loaded.vocab_size, teacher.loaded.vocab_size
        if sizes != (shared, shared):
            raise ConfigError(
                f"student and teacher draw from {sizes[0]} and {sizes[1]} tokens, so there is no "
                f"distribution between them; give both vocab_size = {shared}"
            )
        if not 0 <= interleave <= shared:
            raise ConfigError(
                f"states.interleave is {interleave}, but there are {shared} tokens; lower it"
            )
        if interleave and mixture:
            raise ConfigError(
                "mixture and interleave are two rules for the same token; choose one of them"
            )
        self._student, self._teacher = student, teacher
        self._interleave = interleave
        self._mixture = _checked(mixture)
        # the two may end differently; whoever writes an end token ends the response
        ends = dict.fromkeys((*student.loaded.eos_ids, *teacher.loaded.eos_ids))
        self._loaded = replace(student.loaded, eos_ids=tuple(ends))

    def with_mixture(self, share: float) -> MixedSampler:
        """The same sampler with another share of the teacher."""
        other = copy.copy(self)
        other._mixture = _checked(share)
        return other

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        *,
        generator: torch.Generator,
        policy_version: int = 0,
    ) -> Rollout:
        """Sample `settings.samples_per_prompt` responses to every prompt.

        As `LocalSampler.sample` otherwise; temperature and truncation apply to each model before
        the rule. `policy_version` is the student's, on every token.
        """
        check_request(prompts, settings, self._loaded)
        samplers = [self._student, self._teacher]
        with sampling(samplers, prompts, settings):
            written = Written(len(prompts), settings, device_of(self._loaded))
            models = [sampler.loaded for sampler in samplers]
            for batch in batches(prompts, settings.samples_per_prompt, models):
                both = _BothDecoders(self._student.decoder(batch), self._teacher.decoder(batch))
                decode(
                    both, self._rule(settings), batch, written, settings, self._loaded, generator
                )
        return written.rollout(
            prompts, settings, pad_id=self._loaded.pad_id, policy_version=policy_version
        )

    def _rule(self, settings: SamplerSettings) -> Rule:
        if self._interleave:
            return functools.partial(_interleaved, k=self._interleave, settings=settings)
        return functools.partial(_mixed, share=self._mixture, settings=settings)


def _checked(share: float) -> float:
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"the teacher's share of a mixture must lie in [0, 1], got {share}")
    return share


class _BothDecoders:
    """A `Decoder` that shows every token to two models and returns the logits of both."""

    def __init__(self, student: Decoder[Tensor], teacher: Decoder[Tensor]) -> None:
        self._student, self._teacher = student, teacher

    def prefill(
        self, prompts: Sequence[tuple[int, ...]], rows: Int[Tensor, " B"], room: int
    ) -> Pair:
        """Read the prompts with both; logits of the first token."""
        student = self._student.prefill(prompts, rows, room)
        return student, self._teacher.prefill(prompts, rows, room)

    def step(self, tokens: Int[Tensor, " B"]) -> Pair:
        """Append one token to every row of both; logits of the next one."""
        return self._student.step(tokens), self._teacher.step(tokens)

    def keep(self, rows: Int[Tensor, " A"]) -> None:
        """Drop every row but these."""
        self._student.keep(rows)
        self._teacher.keep(rows)


def _mixed(
    logits: Pair, uniform: Float64[Tensor, "A 1"], *, share: float, settings: SamplerSettings
) -> Drawn:
    """One token per row from the mixture."""
    student, teacher = (probabilities(one, settings) for one in logits)
    mixture: Float[Tensor, "A V"] = (1 - share) * student + share * teacher
    tokens = inverse_cdf(mixture, uniform)
    return Drawn(tokens, mixture.gather(1, tokens), top_of(logits[0], settings))


def _interleaved(
    logits: Pair, uniform: Float64[Tensor, "A 1"], *, k: int, settings: SamplerSettings
) -> Drawn:
    """One token per row: the student's proposal, or the teacher's draw in its place.

    Both outcomes lie side by side in one distribution over 2 V entries, so that one uniform number
    decides: proposals that stand, then replacements.
    """
    student, teacher = (probabilities(one, settings) for one in logits)
    stands = torch.zeros_like(student, dtype=torch.bool)
    stands = stands.scatter(1, logits[1].topk(k).indices, True)
    proposed = torch.where(stands, student, 0.0)
    replaced = torch.where(stands, 0.0, student).sum(-1, keepdim=True) * teacher
    drawn = inverse_cdf(torch.cat((proposed, replaced), 1), uniform)
    vocab_size = student.shape[1]
    tokens = drawn % vocab_size
    return Drawn(
        tokens,
        (proposed + replaced).gather(1, tokens),
        top_of(logits[0], settings),
        by_teacher=drawn >= vocab_size,
    )

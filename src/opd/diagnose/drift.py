"""What the student's text has come to: its length, its ends, its loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.diagnose.numbers import mean, places
from opd.errors import ConfigError

__all__ = ["length_mean", "repeated_ngrams", "truncated_share"]


def length_mean(mask: Bool[Tensor, "B T"]) -> float:
    """How long the responses are.

    Formula: mean over responses of the number of their tokens that count
    Unit: tokens
    Reading: rising together with `truncated_share` and `repeated_ngrams`: text that is easy to
        agree on grows without end. Falling fast while the divergence falls: the student has found
        states where the teacher is sure, such as the end.
    Action: a reference divergence, a mixture with data, a length term; audit the end tokens
    Cost: none; the step has the mask
    Source: length drift, Table 6 of arXiv:2606.22793; truncation collapse of arXiv:2604.08527, the
        measure is our own derivation
    Id: length
    """
    return mean(mask.sum(1))


def truncated_share(stop_reason: Sequence[str]) -> float:
    """How many responses were cut off at the length limit.

    Formula: share with stop_reason = "length"
    Unit: a share in [0, 1] of the responses
    Reading: rising: responses no longer end, and the cut-off ones come to dominate a token mean.
        High from the start: the limit is too low, or the end token does not end.
    Action: mask cut-off responses, a reference divergence, a higher limit; audit the end tokens
    Cost: none; the sampler says it
    Source: length drift, Table 6 of arXiv:2606.22793; truncation collapse of arXiv:2604.08527, the
        measure is our own derivation
    Id: trunc_frac
    """
    return sum(each == "length" for each in stop_reason) / (len(stop_reason) or math.nan)


def repeated_ngrams(
    tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], n: int
) -> Float[Tensor, " B"]:
    """How much of a response says again what it has said.

    Formula: 1 - distinct n-grams / n-grams, of the tokens that count
    Unit: a share in [0, 1) per response, float64; NaN where it is shorter than n
    Reading: near 0 for prose at n = 4, near 1 inside a loop. In a loop teacher and student agree,
        so the divergence is low there: read both together.
    Action: mask repeated spans, a sequence sum in place of a token mean, a mixture with data
    Cost: the tokens alone; one sort
    Source: repetition drift, Table 6 of arXiv:2606.22793; the loop trap of arXiv:2605.11182, the
        measure is our own derivation
    Id: rep_n
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    size = len(tokens)
    flat, row_of = tokens[mask], mask.nonzero()[:, 0]
    place, length = places(mask)
    begins = place + n <= length
    count = torch.bincount(row_of[begins], minlength=size)
    if not bool(begins.any()):
        return torch.full((size,), math.nan, dtype=torch.float64, device=tokens.device)
    grams = flat.unfold(0, n, 1)[begins[: len(flat) - n + 1]]
    # One number for each different n-gram of a response: a token at a time, which is exact and
    # faster than to compare whole rows.
    number, base = row_of[begins], int(flat.max()) + 1
    for token in grams.T:
        number = torch.unique(number * base + token, return_inverse=True)[1]
    owner = torch.zeros(int(number.max()) + 1, dtype=torch.long, device=tokens.device)
    owner[number] = row_of[begins]
    different = torch.bincount(owner, minlength=size)
    return torch.where(count > 0, 1.0 - different.double() / count, math.nan)

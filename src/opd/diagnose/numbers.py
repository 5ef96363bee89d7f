"""What the diagnostics share: float64 means, places in a response, likeliest entries, limits."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import ConfigError, DataError


def wide(values: Tensor) -> Tensor:
    """Detached, in float64, in which every statistic is taken."""
    return values.detach().double()


def mean(values: Tensor) -> float:
    """The mean of all entries; NaN where there is none."""
    return float(wide(values).mean()) if values.numel() else math.nan


def share(part: float, whole: float) -> float:
    """A part over the whole; NaN where the whole is nothing."""
    return part / whole if whole else math.nan


def leading(values: Tensor) -> Tensor:
    """Values as they are; where some are infinite, the sign of these, and 0 for the rest.

    What a ratio of sums tends to as the infinite ones grow, all at the same pace.
    """
    infinite = values.isinf()
    return torch.where(infinite, values.sign(), 0.0) if bool(infinite.any()) else values


def difference(first: Tensor, second: Tensor) -> Tensor:
    """`first - second`, where two equal infinities differ by 0."""
    return torch.where(first == second, 0.0, first - second)


def at(log_probs: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The entry of each row's token."""
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def mass(log_probs: Float[Tensor, "N V"], chosen: Bool[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """How much of a distribution lies on the chosen entries, summed there."""
    return torch.where(chosen, log_probs.exp(), 0.0).sum(-1)


def likeliest(log_probs: Float[Tensor, "N V"], k: int) -> Bool[Tensor, "N V"]:
    """True on the k likeliest entries of each row; of equal ones the lower ids.

    Raises:
        ConfigError: there are no k.
    """
    vocabulary = log_probs.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ConfigError(
            f"k must lie in 1 ... {vocabulary}, the size of the vocabulary, got {k}; lower k"
        )
    # Not the ids that topk returns: which of several equal ones it takes is not defined.
    least = log_probs.topk(k, dim=-1).values[:, -1:]
    above, equal = log_probs > least, log_probs == least
    left = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))


def places(mask: Bool[Tensor, "B T"]) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Of every open token, its place among those of its response, and how many there are.

    Gaps take no time.
    """
    open_tokens = mask.long()
    place = open_tokens.cumsum(1) - open_tokens
    length = open_tokens.sum(1, keepdim=True).expand_as(open_tokens)
    return place[mask], length[mask]


def relative_bins(mask: Bool[Tensor, "B T"], bins: int) -> Int[Tensor, " N"]:
    """Of every open token, into which of so many equal parts of its response it falls."""
    if bins < 1:
        raise ConfigError(f"bins must be at least 1, got {bins}")
    place, length = places(mask)
    return torch.div(place * bins, length, rounding_mode="floor")


def rank_bins(values: Float[Tensor, " N"], bins: int) -> Int[Tensor, " N"]:
    """Of every value, into which of so many equal parts of all it falls by its rank.

    Equal values stay together, in the lowest part that one of them belongs to.
    """
    if bins < 1:
        raise ConfigError(f"bins must be at least 1, got {bins}")
    less = torch.searchsorted(values.sort().values, values)
    return torch.div(less * bins, max(1, len(values)), rounding_mode="floor")


def bin_means(
    values: Float[Tensor, " N"], bin_of: Int[Tensor, " N"], bins: int
) -> Float[Tensor, " bins"]:
    """The mean of the values in each bin, in float64; NaN in an empty one."""
    total = torch.bincount(bin_of, weights=wide(values), minlength=bins)
    count = torch.bincount(bin_of, minlength=bins)
    return torch.where(count > 0, total / count, math.nan)


def judged(
    score: Float[Tensor, " B"], verdict: Float[Tensor, " B"]
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Score and verdict of the sequences that have both: neither is NaN."""
    known = ~(score.isnan() | verdict.isnan())
    return wide(score[known]), wide(verdict[known])


def check_paired(what: str, first: int, second: int) -> None:
    """Refuse two lists that should have an entry for each other's."""
    if first != second:
        raise DataError(f"{what} go in pairs, got {first} and {second}; give one for each")

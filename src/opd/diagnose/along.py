"""How a signal changes along the response. A gap takes no time: t counts open tokens, T is theirs.

Anything per token can be followed: overlap, entropy, surprise, margin, the log ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.diagnose.numbers import (
    bin_means,
    leading,
    mean,
    places,
    relative_bins,
    share,
    wide,
)
from opd.errors import ConfigError

__all__ = [
    "change_point",
    "dispersion_by_bin",
    "drift_budget",
    "first_token_spike",
    "profile",
    "suffix_fade",
]

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]


def dispersion_by_bin(r: PerToken, mask: Mask, bins: int) -> Float[Tensor, " bins"]:
    """How far the log ratios still differ from each other, along the response.

    Formula: std of r over rows with floor(bins * t / T) = bin, over the std of the first bin
    Unit: relative to the first bin, float64; NaN in a bin without tokens, or if the first has no
        spread
    Reading: 1 in the first bin. Falling: the teacher tells good tokens from bad ones less and less,
        even if the mean stays off 0; what is late in the response is not taught.
    Action: supervise prefixes only, up to `change_point`
    Cost: the log ratios that the step has
    Source: state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; local teachability
        collapse of arXiv:2605.13643
    Id: dispersion
    """
    bin_of = relative_bins(mask, bins)
    values = leading(wide(r[mask]))
    least = torch.full((bins,), math.inf, dtype=values.dtype, device=values.device)
    least = least.scatter_reduce(0, bin_of, values, "amin")
    values = values - least[bin_of]  # equal values then have no spread at all
    means = bin_means(values, bin_of, bins)
    spread = bin_means((values - means[bin_of]).square(), bin_of, bins).sqrt()
    return torch.where(spread[0] > 0, spread / spread[0], math.nan)


def profile(value: PerToken, mask: Mask, edges: Sequence[int]) -> Float[Tensor, " bins"]:
    """The mean of a number at the first tokens, the next ones, and so on.

    Formula: mean over rows with edges[i] <= t < edges[i + 1]
    Unit: that of the value, per bin, float64; NaN in a bin without tokens
    Reading: flat where the teacher is at home all along. Falling overlap, rising surprise or
        entropy with t: the prefix has drifted. By absolute place; late bins hold long responses
        only.
    Action: a horizon at the place where it turns, a curriculum on length
    Cost: the numbers that the step has
    Source: the horizon probe in Table 7 of arXiv:2606.22793; our own derivation, in the manner of
        arXiv:2605.07804
    Id: drift_profile
    """
    if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)):
        raise ConfigError(f"edges must be two or more rising places, got {tuple(edges)}")
    bounds = torch.tensor(edges, device=mask.device)
    place, _ = places(mask)
    bin_of = torch.bucketize(place, bounds, right=True)  # 0 before the first edge
    return bin_means(value[mask], bin_of, len(edges) + 1)[1:-1]


@torch.no_grad()
def drift_budget(r: PerToken, mask: Mask) -> PerToken:
    """How far a response has drifted from what the teacher would write, before each token.

    Formula: sum over k < t of |r_k|; 0 at closed positions
    Unit: nats, per token
    Reading: 0 at the first token, never falling. Steep: the prefix is soon one that the teacher
        would not have come to. Linear growth is the price of length, not of drift.
    Action: supervise up to a budget, `weight.drift_budget`; skip or repair what comes after
    Cost: the log ratios that the step has
    Source: state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; our own derivation,
        after arXiv:2606.22600 and arXiv:2605.07804
    Id: drift_profile
    """
    so_far = torch.where(mask, wide(r).abs(), 0.0).cumsum(1)
    # Shifted, not subtracted: infinity minus infinity is undefined.
    before = torch.nn.functional.pad(so_far[:, :-1], (1, 0))
    return torch.where(mask, before, 0.0).to(r.dtype)


def change_point(margins: Float[Tensor, " S"]) -> int | None:
    """Where along a response the teacher's contrast drops for good.

    Formula: the s in 1 ... S-1 with mean(margins[s:]) < mean(margins[:s]) of the least BIC =
        S log(RSS / S) + p log S, two constants with p = 3, if it is below that of one constant with
        p = 1; RSS at least 1e-12 S
    Unit: index of a sentence, the first after the drop; None without a drop
    Reading: None: the contrast holds, or only wanders or rises. A number: from that sentence on the
        teacher does not tell the student's options apart. Early ones on many responses: the teacher
        does not fit this text.
    Action: supervise what is before it
    Cost: `teacher_margin` averaged over each sentence
    Source: state compatibility in sections 5.1 and 6.1 of arXiv:2606.22793; the BIC-style downward
        change point of arXiv:2605.13643
    """
    count = len(margins)
    if count < 2:
        return None
    values = leading(wide(margins))
    values = values - values.mean()
    first = torch.arange(1, count, dtype=torch.float64, device=values.device)
    second = count - first
    sums = values.cumsum(0)[:-1]
    drop = sums / first - (values.sum() - sums) / second
    total = values.square().sum()
    left = total - first * second / count * drop.square()  # within the two pieces
    one, two = (_bic(each, count, means) for each, means in ((total, 1), (left, 3)))
    two = torch.where(drop > 0, two, math.inf)
    best = int(two.argmin())
    return best + 1 if bool(two[best] < one) else None


def _bic(squares: Tensor, count: int, parameters: int) -> Tensor:
    return count * (squares / count).clamp(min=1e-12).log() + parameters * math.log(count)


def suffix_fade(value: PerToken, mask: Mask) -> float:
    """How the end of the responses compares with their beginning.

    Formula: mean of the last third (t >= 2T/3) / mean of the first third (t < T/3), over all rows
    Unit: a ratio; NaN where the first third has no tokens or a mean of 0
    Reading: 1: the same all along. Of |r|, confidence or margin, well below 1: the signal fades. Of
        surprise or entropy, well above 1: the teacher gets lost.
    Action: supervise prefixes only, look ahead, a shorter horizon
    Cost: the numbers that the step has
    Source: the prefix-suffix split of section 7.1 of arXiv:2606.22793; our own derivation
    Id: prefix_suffix
    """
    place, length = places(mask)
    values = leading(wide(value[mask]))
    return share(mean(values[3 * place >= 2 * length]), mean(values[3 * place < length]))


def first_token_spike(value: PerToken, mask: Mask) -> float:
    """How much the first token of a response stands out.

    Formula: mean at t = 0 / mean over t >= 1, over all rows
    Unit: a ratio; NaN where there is no later token or their mean is 0
    Reading: about 1 of |r| or surprise where prompt and template agree. Far above 1: the teacher
        reads another template, expects to think first, or a header is missing: where the response
        begins, not what it says, is what surprises it.
    Action: compare the rendered prompts token by token, equal thinking mode, skip the first tokens
    Cost: the numbers that the step has
    Source: prompt-format alignment, section 6.1 and Table 7 of arXiv:2606.22793; our own derivation
    Id: chat_template
    """
    place, _ = places(mask)
    values = leading(wide(value[mask]))
    return share(mean(values[place == 0]), mean(values[place > 0]))

"""Credit along responses beside `torch.cumsum` of one tensor of the same size, on one CPU thread.

512 responses of 8,192 tokens in float32. A cumulative sum reads one tensor, writes one, and knows
no mask; it is the yardstick, not a peer. Masks: `full` has every token open, `padded` ends each
response somewhere in its last three quarters, `gaps` closes a tool result of 300 tokens every
1,500 besides.

    python benchmarks/credit.py [--quick] [--json FILE] [--result FILE]

`ratio` of the row `cumsum` is its time over ours: 0.25 is four times as slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

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
from opd.formula import credit

RESPONSES, TOKENS = 512, 8192
YARDSTICK = "cumsum"


def build_masks() -> dict[str, Tensor]:
    """One mask per way in which responses are shorter than the batch is wide."""
    places = torch.arange(TOKENS)
    lengths = torch.randint(TOKENS // 4, TOKENS + 1, (RESPONSES, 1))
    padded = places < lengths
    return {
        "full": torch.ones(RESPONSES, TOKENS, dtype=torch.bool),
        "padded": padded,
        "gaps": padded & ((places + 500) % 1500 >= 300),
    }


def build_credits() -> dict[str, Callable[[Tensor], Tensor]]:
    """Every credit that walks along responses, as a function of the mask."""
    reward = torch.randn(RESPONSES, TOKENS)
    reverse_kl = torch.randn(RESPONSES, TOKENS).abs()
    values = -torch.randn(RESPONSES, TOKENS).abs()
    bootstrap = torch.randn(RESPONSES)
    damped = partial(credit.damped_future, future_weight=0.5)
    neutral = partial(credit.length_neutral_future, future_weight=0.5)
    return {
        "return_to_go": lambda mask: credit.return_to_go(reward, mask),
        "discounted": lambda mask: credit.discounted(reward, mask, gamma=0.95, meaning="task"),
        "windowed, 16": lambda mask: credit.windowed(reward, mask, window=16),
        "windowed, 100": lambda mask: credit.windowed(reward, mask, window=100),
        "length_normalised": lambda mask: credit.length_normalised(reward, mask),
        "future": lambda mask: credit.future(reward, mask),
        "rao_blackwell": lambda mask: credit.rao_blackwell(reward, reverse_kl, mask),
        "next_step": lambda mask: credit.next_step(reward, reverse_kl, mask),
        "damped_future": lambda mask: damped(reward, reverse_kl, mask),
        "length_neutral_future": lambda mask: neutral(reward, reverse_kl, mask),
        "gae": lambda mask: credit.gae(reward, values, bootstrap, mask, gae_lambda=0.95),
        "position_mean": lambda mask: credit.position_mean(reward, mask),
        "batch_mean": lambda mask: credit.batch_mean(reward, mask),
    }


def rows_of(
    name: str, function: Callable[[Tensor], Tensor], masks: Mapping[str, Tensor], *, repeats: int
) -> list[Row]:
    """One row of ours and one of the yardstick per mask."""
    numbers = torch.randn(RESPONSES, TOKENS)
    rows = []
    for kind, mask in masks.items():
        systems = {
            OURS: _timed(partial(function, mask)),
            YARDSTICK: _timed(partial(torch.cumsum, numbers, 1)),
        }
        rows += compare(f"{name}, {kind}", interleaved(systems, repeats, warm=True))
    return rows


def _timed(run: Callable[[], Tensor]) -> Callable[[], Measure]:
    def measure() -> Measure:
        start = cpu_seconds()
        run()
        return Measure(cpu_seconds() - start)

    return measure


def main() -> None:
    options = parse_args("Credit along responses beside a cumulative sum.")
    one_thread()
    torch.manual_seed(0)
    repeats = 9 if options.quick else 45
    masks = build_masks()
    rows = []
    for name, function in build_credits().items():
        rows += rows_of(name, function, masks, repeats=repeats)
    report(rows, options)


if __name__ == "__main__":
    main()

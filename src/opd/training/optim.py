"""AdamW with warm-up, decay and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from opd.training.config import OptimizerConfig


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices, not on vectors."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values()),
    )


def learning_rate(config: OptimizerConfig, update: int, updates: int) -> float:
    """The rate of update number `update` (0 is the first) of `updates`.

    Linear warm-up to the peak over `lr_warmup_steps`, then constant, linear or along half a
    cosine to `final_share` of the peak at the last update.
    """
    warmup = min(config.lr_warmup_steps, updates)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    progress = (update - warmup) / max(1, updates - 1 - warmup)
    match config.decay:
        case "linear":
            share = 1.0 - progress * (1.0 - config.final_share)
        case "cosine":
            half = 0.5 * (1.0 + math.cos(math.pi * progress))
            share = config.final_share + (1.0 - config.final_share) * half
        case _:
            share = 1.0
    return config.learning_rate * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Anchor:
    """Pulls the weights towards where they were when it was made, apart from the gradient.

        w <- w - rate * strength * (w - w_start)

    Applied once per optimizer step, after it, as decoupled weight decay is; `strength` is in units
    of one over the learning rate's. Source: the L2-SP penalty of Li et al., arXiv:1802.01483, in
    decoupled form.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], strength: float) -> None:
        self.strength = strength
        self.start = {name: value.detach().clone() for name, value in parameters.items()}

    def load(self, start: Mapping[str, torch.Tensor]) -> None:
        """Pull towards these weights from now on."""
        self.start = {name: start[name].to(value.device) for name, value in self.start.items()}

    @torch.no_grad()
    def pull(self, parameters: Mapping[str, nn.Parameter], rate: float) -> float:
        """Move every weight by its share; the distance from the start before it, root mean square.

        Args:
            rate: the learning rate of the step just made.
        """
        squares, count = 0.0, 0
        for name, parameter in parameters.items():
            start = self.start[name]
            squares += float((parameter - start).double().square().sum())
            count += parameter.numel()
            parameter.lerp_(start, rate * self.strength)
        return math.sqrt(squares / max(count, 1))


def clip(parameters: Mapping[str, nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a global norm of `max_norm` (0: never); the norm before."""
    limit = max_norm if max_norm > 0 else math.inf
    return float(nn.utils.clip_grad_norm_(parameters.values(), limit))

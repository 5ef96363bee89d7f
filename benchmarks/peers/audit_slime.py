"""slime's losses where only its source is on the path, and a custom loss as its users write one.

Its loss module asks Megatron for process groups and for nothing else: they are those of one rank.
With Megatron installed the losses are audited under their own names.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["custom_k2", "custom_k3", "policy_loss_function"]

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its policy losses are compiled


def _one_rank() -> None:
    """Megatron's process groups of one rank, and slime's Megatron folder without its patches."""
    sizes = ("context_parallel", "tensor_model_parallel", "data_parallel")
    groups: dict[str, Callable[..., Any]] = {
        f"get_{name}_world_size": lambda *_, **__: 1 for name in sizes
    }
    groups |= {f"get_{name}_rank": lambda *_, **__: 0 for name in sizes}
    groups |= {f"get_{name}_group": lambda *_, **__: None for name in sizes}
    megatron, core = ModuleType("megatron"), ModuleType("megatron.core")
    core.mpu = SimpleNamespace(  # type: ignore[attr-defined]
        **groups, is_pipeline_last_stage=lambda *_, **__: True
    )
    megatron.core = core  # type: ignore[attr-defined]
    sys.modules |= {"megatron": megatron, "megatron.core": core}
    folder = Path(importlib.import_module("slime").__path__[0]) / "backends" / "megatron_utils"
    package = ModuleType("slime.backends.megatron_utils")
    package.__path__ = [str(folder)]
    sys.modules["slime.backends.megatron_utils"] = package


if "megatron" not in sys.modules and importlib.util.find_spec("megatron") is None:
    _one_rank()

_losses = importlib.import_module("slime.backends.megatron_utils.loss")

policy_loss_function = _losses.policy_loss_function


def custom_k2(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[..., Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared log-ratio of the tokens."""
    log_ratio = _log_ratio(args, batch, logits)
    loss = sum_of_sample_mean(log_ratio**2 / 2)
    return loss, {"loss": loss.detach()}


def custom_k3(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[..., Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The k3 estimate of the reverse KL, differentiated as it is."""
    log_ratio = _log_ratio(args, batch, logits)
    loss = sum_of_sample_mean(log_ratio.exp() - 1 - log_ratio)
    return loss, {"loss": loss.detach()}


def _log_ratio(args: Any, batch: dict[str, Any], logits: Tensor) -> Tensor:
    """Teacher minus student, as slime scores tokens."""
    _, scored = _losses.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )
    return torch.cat(batch["teacher_log_probs"]) - torch.cat(scored["log_probs"])

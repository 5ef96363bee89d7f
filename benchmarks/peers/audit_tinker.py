"""Losses for tinker's `forward_backward_custom`, as its users write them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["full_reverse_kl", "importance_sampling", "k1", "k2", "k3"]

Result = tuple[Tensor, dict[str, float]]


def _pairs(data: list[Any], logprobs: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each datum the student's, the teacher's, and which positions count."""
    return [
        (
            student,
            datum.loss_fn_inputs["teacher_logprobs"].to_torch(),
            datum.loss_fn_inputs["weights"].to_torch(),
        )
        for datum, student in zip(data, logprobs, strict=True)
    ]


def _total(parts: list[Tensor]) -> Result:
    total = parts[0].new_zeros(()) + sum(parts)
    return total, {"loss": float(total.detach())}


def k1(data: list[Any], logprobs: list[Tensor]) -> Result:
    """The sum of the log-ratio, differentiated as it is."""
    return _total([((s - t) * w).sum() for s, t, w in _pairs(data, logprobs)])


def k2(data: list[Any], logprobs: list[Tensor]) -> Result:
    """Half the squared log-ratio."""
    return _total([((s - t) ** 2 / 2 * w).sum() for s, t, w in _pairs(data, logprobs)])


def k3(data: list[Any], logprobs: list[Tensor]) -> Result:
    """The k3 estimate of the reverse KL, differentiated as it is."""
    return _total([(((t - s).exp() - 1 - (t - s)) * w).sum() for s, t, w in _pairs(data, logprobs)])


def importance_sampling(data: list[Any], logprobs: list[Tensor]) -> Result:
    """The importance ratio times an advantage that was fixed when the tokens were scored."""
    parts = []
    for datum, student in zip(data, logprobs, strict=True):
        inputs = {key: value.to_torch() for key, value in datum.loss_fn_inputs.items()}
        ratio = (student - inputs["logprobs"]).exp()
        parts.append(-(ratio * inputs["advantages"] * inputs["weights"]).sum())
    return _total(parts)


def full_reverse_kl(data: list[Any], logprobs: list[Tensor]) -> Result:
    """Reverse KL over log-probabilities of the whole vocabulary, `[T, V]`."""
    return _total([((s.exp() * (s - t)).sum(-1) * w).sum() for s, t, w in _pairs(data, logprobs)])

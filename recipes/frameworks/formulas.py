"""Formulas that some run files of this folder use beside the library's own."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.fields import counted


def _held(
    student_logp: Float[Tensor, "*n"],
    teacher_logp: Float[Tensor, "*n"],
    *,
    most_nats: float,
    largest_log_ratio: float,
) -> Bool[Tensor, "*n"]:
    log_ratio = (teacher_logp - student_logp).detach()
    value = torch.expm1(log_ratio) - log_ratio
    return (log_ratio.abs() > largest_log_ratio) | (value > most_nats)


@counted(_held)
def bounded_k3(
    student_logp: Float[Tensor, "*n"],
    teacher_logp: Float[Tensor, "*n"],
    *,
    most_nats: float,
    largest_log_ratio: float,
) -> Float[Tensor, "*n"]:
    """The k3 estimator at the sampled token, held at a largest value; in nats.

        L = min(exp(r) - 1 - r, most),  r = log teacher - log student, held in [-largest, largest]

    No gradient where either bound holds: with 10 nats, where the teacher finds the token more than
    13.6 times as likely as the student does. Without the bounds it is `forward_kl_k3`. The share of
    tokens that are held is logged.

    Args:
        student_logp: of the sampled token; carries the gradient.
        teacher_logp: of the same token.
        most_nats: largest value.
        largest_log_ratio: largest size of r, in nats.

    Source: verl, `kl_penalty` in `verl/trainer/ppo/core_algos.py`.
    """
    log_ratio = (teacher_logp - student_logp).clamp(-largest_log_ratio, largest_log_ratio)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=most_nats)


def engine_log_ratio(
    teacher_logp: Float[Tensor, "*n"], sampler_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The log ratio of teacher to the engine that wrote the text, detached; in nats.

        r = log teacher(token) - log sampler(token)

    Frozen at rollout time, as `cached_log_ratio` is; equal to it where trainer and engine agree.

    Source: tinker-cookbook, `tinker_cookbook/distillation/train_on_policy.py`.
    """
    return (teacher_logp - sampler_logp).detach()


def engine_importance(
    student_logp: Float[Tensor, "*n"],
    sampler_logp: Float[Tensor, "*n"],
    advantage: Float[Tensor, "*n"],
) -> Float[Tensor, "*n"]:
    """The importance-ratio loss against the engine that wrote the text, in the advantage's unit.

        L = -exp(log student(token) - log sampler(token)) * A

    Unbounded, as `importance` is; equal to it where trainer and engine agree.

    Source: the loss `importance_sampling` of Tinker; `ref_kl_loss_fn` of prime-rl.
    """
    return -(student_logp - sampler_logp.detach()).exp() * advantage.detach()


def not_fallen_far(
    student_logp: Float[Tensor, "*n"], sampler_logp: Float[Tensor, "*n"], *, most: float
) -> Float[Tensor, "*n"]:
    """A gate open where the token's probability has not fallen too far since it was written.

        w = 1 where student(token) >= sampler(token) - most, 0 elsewhere

    Args:
        student_logp: log-probability now.
        sampler_logp: under the engine that wrote.
        most: largest fall that counts, a difference of probabilities.

    Source: prime-rl, `ref_kl_loss_fn` in `src/prime_rl/trainer/rl/loss.py`, with 0.2.
    """
    fall = sampler_logp.exp() - student_logp.detach().exp()
    return (fall <= most).to(student_logp.dtype)


def squared_drift(
    student_logp: Float[Tensor, "*n"], sampler_logp: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """The squared log ratio to the engine that wrote the text, in square nats.

        L = (log student(token) - log sampler(token))^2

    Without gradient while the student is what wrote.

    Source: prime-rl, `ref_kl_loss_fn` in `src/prime_rl/trainer/rl/loss.py`, times 1e-3.
    """
    return (student_logp - sampler_logp.detach()).square()

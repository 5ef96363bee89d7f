"""Temporal credit over one response: from the reward of each token to its advantage.

`mask` is False on tokens no loss looks at: padding, and gaps inside a response such as a tool's
result. They are deleted before anything is added up, so they take no time: the last token before
a gap and the first one after it are one step apart. The result is 0 there.

Source: survey of on-policy distillation, arXiv:2606.22793, Eqs. 8, 15, 16, 18 and 20. That gaps
take no time is our convention; the papers have none.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .divergences import Row, reverse_kl


def teacher_log_ratio(
    student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike, token: int
) -> float:
    """log teacher(token) - log student(token): the reward of one sampled token, in nats.

    Positive where the teacher likes the token better. A token that either side excludes has no
    finite reward: `ValueError`.

    Source: arXiv:2606.22793, Eqs. 5 and 11.
    """
    student_logp = float(np.asarray(student_log_probs, dtype=np.float64)[token])
    teacher_logp = float(np.asarray(teacher_log_probs, dtype=np.float64)[token])
    if not (math.isfinite(student_logp) and math.isfinite(teacher_logp)):
        raise ValueError(
            f"token {token} has no finite log-ratio: its log-probabilities are {student_logp} "
            f"(student) and {teacher_logp} (teacher)"
        )
    return teacher_logp - student_logp


def immediate(reward: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """advantage(t) = reward(t). Source: arXiv:2606.22793, Eq. 16."""
    rewards, looked_at = _inputs(reward, mask)
    advantage = np.zeros(len(rewards))
    for t in range(len(rewards)):
        if looked_at[t]:
            advantage[t] = rewards[t]
    return advantage


def discounted(reward: npt.ArrayLike, mask: npt.ArrayLike, *, gamma: float) -> Row:
    """advantage(t) = sum over k >= t of gamma^(k - t) * reward(k), gaps deleted.

    Source: arXiv:2606.22793, Eq. 18.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    rewards, looked_at = _inputs(reward, mask)
    kept = [t for t in range(len(rewards)) if looked_at[t]]
    advantage = np.zeros(len(rewards))
    for start, t in enumerate(kept):
        for steps, k in enumerate(kept[start:]):
            advantage[t] += gamma**steps * rewards[k]
    return advantage


def return_to_go(reward: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """advantage(t) = sum over k >= t of reward(k), gaps deleted.

    Source: arXiv:2606.22793, Eq. 15.
    """
    rewards, looked_at = _inputs(reward, mask)
    advantage = np.zeros(len(rewards))
    for t in range(len(rewards)):
        if not looked_at[t]:
            continue
        for k in range(t, len(rewards)):
            if looked_at[k]:
                advantage[t] += rewards[k]
    return advantage


def per_state_baseline(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> float:
    """The expected reward at one state, -KL(student || teacher); subtract it from the reward.

    Subtracting a function of the state changes no expectation of the score-weighted sum.

    Source: arXiv:2605.07865; the invariance is arXiv:2606.22793, Eqs. 8 and 20.
    """
    return -reverse_kl(student_log_probs, teacher_log_probs)


def _inputs(reward: npt.ArrayLike, mask: npt.ArrayLike) -> tuple[Row, npt.NDArray[np.bool_]]:
    rewards = np.asarray(reward, dtype=np.float64)
    looked_at = np.asarray(mask, dtype=np.bool_)
    if rewards.ndim != 1 or rewards.shape != looked_at.shape:
        raise ValueError(
            f"one response of T tokens each, got shapes {rewards.shape} and {looked_at.shape}"
        )
    return rewards, looked_at

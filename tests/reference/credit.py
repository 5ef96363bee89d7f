"""Temporal credit over one response: from the reward of each token to its advantage.

`mask` is False on tokens no loss looks at: padding, and gaps inside a response such as a tool's
result. They are deleted before anything is added up, so they take no time: the last token before
a gap and the first one after it are one step apart. The result is 0 there.

Most functions take one response. The baselines that look at other responses, `standardised` and
`length_neutral_future` take a batch, `[B, T]`.

Source: survey of on-policy distillation, arXiv:2606.22793, Eqs. 8, 15, 16, 18 and 20-23. That
gaps take no time is our convention; the papers have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


def windowed(reward: npt.ArrayLike, mask: npt.ArrayLike, *, window: int) -> Row:
    """advantage(t) = reward of token t and of the next ones, `window` of them in all.

    window = 1 is the immediate reward; a window as long as the response is the return-to-go.

    Source: arXiv:2606.22793, Sec. 4.2; that the current token counts is our convention.
    """
    rewards, looked_at = _inputs(reward, mask)
    kept = _open(looked_at)
    advantage = np.zeros(len(rewards))
    for start, t in enumerate(kept):
        for k in kept[start : start + window]:
            advantage[t] += rewards[k]
    return advantage


def length_normalised(reward: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """advantage(t) = mean of reward(k) over k >= t: the return-to-go over what remains.

    Source: Gu et al., MiniLLM, arXiv:2306.08543 (length normalisation); that the current token
    counts is our convention.
    """
    rewards, looked_at = _inputs(reward, mask)
    kept = _open(looked_at)
    advantage = np.zeros(len(rewards))
    for start, t in enumerate(kept):
        remaining = [rewards[k] for k in kept[start:]]
        advantage[t] = sum(remaining) / len(remaining)
    return advantage


def rao_blackwell(reward: npt.ArrayLike, reverse_kl: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """advantage(t) = reward(t) - sum over k > t of D(k), D the reverse KL of the state.

    The future rewards replaced by their expectations.

    Source: arXiv:2606.22793, Eq. 15, with E[reward(k) | state k] = -D(k).
    """
    return damped_future(reward, reverse_kl, mask, future_weight=1.0)


def next_step(reward: npt.ArrayLike, reverse_kl: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """advantage(t) = reward(t) - D(next open token); reward(t) alone at the last one."""
    rewards, looked_at = _inputs(reward, mask)
    divergences, _ = _inputs(reverse_kl, mask)
    kept = _open(looked_at)
    advantage = np.zeros(len(rewards))
    for i, t in enumerate(kept):
        advantage[t] = rewards[t]
        if i + 1 < len(kept):
            advantage[t] -= divergences[kept[i + 1]]
    return advantage


def future(reward: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """advantage(t) = sum over k > t of reward(k): the return-to-go without its own token.

    What an exact local loss leaves to be credited.

    Source: Gu et al., MiniLLM, arXiv:2306.08543 (single-step decomposition).
    """
    rewards, looked_at = _inputs(reward, mask)
    advantage = np.zeros(len(rewards))
    for t in range(len(rewards)):
        for k in range(t + 1, len(rewards)):
            if looked_at[t] and looked_at[k]:
                advantage[t] += rewards[k]
    return advantage


def damped_future(
    reward: npt.ArrayLike,
    reverse_kl: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    future_weight: float,
) -> Row:
    """advantage(t) = reward(t) - future_weight * sum over k > t of D(k)."""
    rewards, looked_at = _inputs(reward, mask)
    divergences, _ = _inputs(reverse_kl, mask)
    advantage = np.zeros(len(rewards))
    for t in range(len(rewards)):
        if not looked_at[t]:
            continue
        advantage[t] = rewards[t]
        for k in range(t + 1, len(rewards)):
            if looked_at[k]:
                advantage[t] -= future_weight * divergences[k]
    return advantage


def length_neutral_future(
    reward: npt.ArrayLike,
    reverse_kl: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    future_weight: float,
) -> Row:
    """advantage(t) = reward(t) - w * sum over k > t of (D(k) - m), `[B, T]`.

    m is the mean of D over every open token of the batch, so that a longer future costs nothing
    by itself.
    """
    rewards, looked_at = _batch(reward, mask)
    divergences, _ = _batch(reverse_kl, mask)
    seen = [divergences[index] for index in np.ndindex(rewards.shape) if looked_at[index]]
    mean = sum(seen) / len(seen) if seen else 0.0
    advantage = np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        excess = divergences[b] - mean
        advantage[b] = damped_future(rewards[b], excess, looked_at[b], future_weight=future_weight)
    return advantage


def gae(
    reward: npt.ArrayLike,
    values: npt.ArrayLike,
    bootstrap_value: float,
    mask: npt.ArrayLike,
    *,
    gae_lambda: float,
    gamma: float = 1.0,
) -> Row:
    """The lambda-weighted mean of the k-step advantages, n the tokens that remain:

        A_k(t) = sum over l < k of gamma^l reward(t+l) + gamma^k V(t+k) - V(t)
        A(t)   = (1 - lambda) * sum over k < n of lambda^(k-1) A_k(t) + lambda^(n-1) A_n(t)

    V after the last token is `bootstrap_value`: 0 where the response ended, the critic's value
    where it was cut off. What a value weighs there is gamma^n, so lambda = 1 telescopes to the
    return plus that, minus V(t).

    Source: Schulman et al., arXiv:1506.02438, Eqs. 11-16; arXiv:2606.22793, Eqs. 21-23.
    """
    rewards, looked_at = _inputs(reward, mask)
    value, _ = _inputs(values, mask)
    kept = _open(looked_at)
    along = [*(value[t] for t in kept), float(bootstrap_value)]
    advantage = np.zeros(len(rewards))
    for i, t in enumerate(kept):
        remaining = len(kept) - i
        for k in range(1, remaining + 1):
            k_step = gamma**k * along[i + k] - along[i]
            for step in range(k):
                k_step += gamma**step * rewards[kept[i + step]]
            weight = gae_lambda ** (k - 1) * (1.0 if k == remaining else 1 - gae_lambda)
            advantage[t] += weight * k_step
    return advantage


def mean_future(reward: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """advantage(t) = mean of reward(k) over k > t; 0 at the last token.

    Source: Gu et al., MiniLLM, arXiv:2306.08543 (length normalisation of the long part).
    """
    rewards, looked_at = _inputs(reward, mask)
    kept = _open(looked_at)
    advantage = np.zeros(len(rewards))
    for start, t in enumerate(kept):
        later = [rewards[k] for k in kept[start + 1 :]]
        advantage[t] = sum(later) / len(later) if later else 0.0
    return advantage


def scaled_by_turn(reward: npt.ArrayLike, mask: npt.ArrayLike, *, gain_cap: float) -> Row:
    """advantage(t) = min(d_1 / d_k, 1 + gain_cap) * reward(t) in turn k > 1, reward(t) in turn 1.

    d_k is the mean |reward| of turn k, and a turn is a stretch of open tokens without a gap.

    Source: arXiv:2605.07725 (SOD), without what it adds to every d.
    """
    rewards, looked_at = _inputs(reward, mask)
    turns: list[list[int]] = []
    for t in range(len(rewards)):
        if not looked_at[t]:
            continue
        if t == 0 or not looked_at[t - 1]:
            turns.append([])
        turns[-1].append(t)
    drift = [sum(abs(rewards[t]) for t in turn) / len(turn) for turn in turns]
    advantage = np.zeros(len(rewards))
    for k, turn in enumerate(turns):
        for t in turn:
            if k == 0:
                advantage[t] = rewards[t]
            elif drift[k] > 0:  # else every reward of the turn is 0
                advantage[t] = min(drift[0] / drift[k], 1 + gain_cap) * rewards[t]
    return advantage


def bounded_return(reward: npt.ArrayLike, mask: npt.ArrayLike, *, gamma: float) -> Row:
    """advantage(t) = G(t) / (mean over the response of |G| + |G(t)|), G the discounted return.

    Source: arXiv:2609.16937, Eq. 7.
    """
    returns = discounted(reward, mask, gamma=gamma)
    kept = _open(np.asarray(mask, dtype=np.bool_))
    advantage = np.zeros(len(returns))
    usual = sum(abs(returns[t]) for t in kept) / len(kept) if kept else 0.0
    for t in kept:
        if usual > 0:
            advantage[t] = returns[t] / (usual + abs(returns[t]))
    return advantage


def standardised(reward: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """(reward - mean) / sqrt(variance + 1e-8) over every open token of the batch, `[B, T]`.

    The variance is that of a sample; of a single token 0.

    Source: arXiv:2606.09091 (GNDPO), its code.
    """
    rewards, looked_at = _batch(reward, mask)
    seen = [float(rewards[index]) for index in np.ndindex(rewards.shape) if looked_at[index]]
    advantage = np.zeros(rewards.shape)
    if not seen:
        return advantage
    mean = math.fsum(seen) / len(seen)
    variance = math.fsum((x - mean) ** 2 for x in seen) / max(len(seen) - 1, 1)
    for index in np.ndindex(rewards.shape):
        if looked_at[index]:
            advantage[index] = (rewards[index] - mean) / math.sqrt(variance + 1e-8)
    return advantage


# --------------------------------------------------------------------------------------------
# Baselines, to be subtracted. Those over other responses leave the token's own response out, so
# that they are independent of it and change no expectation.


def expected_reward(reverse_kl: npt.ArrayLike) -> Row:
    """-D, the expected log-ratio of each state. Source: arXiv:2605.07865."""
    return -np.asarray(reverse_kl, dtype=np.float64)


def value(values: npt.ArrayLike) -> Row:
    """The critic's value of each prefix. Source: arXiv:2606.22793, Eq. 20."""
    return np.array(values, dtype=np.float64)


def position_mean(credited: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """Mean over the other responses of what their token of the same number is credited.

    `[B, T]`. Tokens are numbered with gaps deleted; responses that are shorter do not count. 0
    where there is no other.
    """
    return _others_mean(
        credited, mask, lambda b, i, other, j: other != b and i == j, by_column=False
    )


def column_mean(credited: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """`position_mean` with gaps counted: the mean over the others' open tokens of the column."""
    return _others_mean(
        credited, mask, lambda b, t, other, k: other != b and t == k, by_column=True
    )


def batch_mean(credited: npt.ArrayLike, mask: npt.ArrayLike) -> Row:
    """Mean over every open token of the other responses, `[B, T]`; 0 where there is none."""
    return _others_mean(credited, mask, lambda b, t, other, k: other != b, by_column=True)


def group_mean(credited: npt.ArrayLike, mask: npt.ArrayLike, group: npt.ArrayLike) -> Row:
    """Mean over every open token of the other responses to the same prompt; 0 where none is."""
    groups = [int(number) for number in np.asarray(group)]
    return _others_mean(
        credited,
        mask,
        lambda b, t, other, k: other != b and groups[other] == groups[b],
        by_column=True,
    )


def per_state_baseline(student_log_probs: npt.ArrayLike, teacher_log_probs: npt.ArrayLike) -> float:
    """The expected reward at one state, -KL(student || teacher); subtract it from the reward.

    Subtracting a function of the state changes no expectation of the score-weighted sum.

    Source: arXiv:2605.07865; the invariance is arXiv:2606.22793, Eqs. 8 and 20.
    """
    return -reverse_kl(student_log_probs, teacher_log_probs)


def _open(looked_at: npt.NDArray[np.bool_]) -> list[int]:
    return [t for t in range(len(looked_at)) if looked_at[t]]


def _others_mean(
    credited: npt.ArrayLike,
    mask: npt.ArrayLike,
    counts: Callable[[int, int, int, int], bool],
    *,
    by_column: bool,
) -> Row:
    """For token (b, t) the mean over the open tokens (other, k) that count.

    t and k are columns, or the numbers of the tokens with gaps deleted.
    """
    numbers, looked_at = _batch(credited, mask)
    baseline = np.zeros(numbers.shape)
    kept = [_open(row) for row in looked_at]
    for b in range(len(kept)):
        for i, t in enumerate(kept[b]):
            chosen = [
                numbers[other, k]
                for other in range(len(kept))
                for j, k in enumerate(kept[other])
                if counts(b, t if by_column else i, other, k if by_column else j)
            ]
            baseline[b, t] = sum(chosen) / len(chosen) if chosen else 0.0
    return baseline


def _batch(numbers: npt.ArrayLike, mask: npt.ArrayLike) -> tuple[Row, npt.NDArray[np.bool_]]:
    values, looked_at = np.asarray(numbers, np.float64), np.asarray(mask, np.bool_)
    if values.ndim != 2 or values.shape != looked_at.shape:
        raise ValueError(f"a batch of B responses, got {values.shape} and {looked_at.shape}")
    return values, looked_at


def _inputs(reward: npt.ArrayLike, mask: npt.ArrayLike) -> tuple[Row, npt.NDArray[np.bool_]]:
    rewards = np.asarray(reward, dtype=np.float64)
    looked_at = np.asarray(mask, dtype=np.bool_)
    if rewards.ndim != 1 or rewards.shape != looked_at.shape:
        raise ValueError(
            f"one response of T tokens each, got shapes {rewards.shape} and {looked_at.shape}"
        )
    return rewards, looked_at

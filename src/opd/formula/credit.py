"""Temporal credit: which rewards multiply the score of a token, and what is subtracted.

A function that takes `mask` walks along a response and is coupled; positions where the mask is
False take no time, they are deleted before walking. Discounting multiplies and changes what is
optimised; a baseline subtracts and does not. Credit says how much, never in which direction:
nothing here carries a gradient.

Unbiased below means: in expectation over responses that the student samples itself at temperature
1, with the log ratio as reward, the sum over tokens of credit times score is minus the gradient of
the named objective. `score` is the gradient of the log-probability of the sampled token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "batch_mean",
    "bounded_return",
    "damped_future",
    "discounted",
    "expected_reward",
    "future",
    "gae",
    "group_mean",
    "immediate",
    "length_neutral_future",
    "length_normalised",
    "mean_future",
    "next_step",
    "position_mean",
    "rao_blackwell",
    "return_to_go",
    "scaled_by_turn",
    "standardised",
    "value",
    "windowed",
]

BASELINES = ("batch_mean", "expected_reward", "group_mean", "position_mean", "value")
"""What may be subtracted from credit; the others are credit."""

PLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "credit": tuple(name for name in __all__ if name not in BASELINES),
        "baseline": BASELINES,
    }
)
"""Which slot each function is for."""

MEANINGS = ("task", "teacher_reliability", "variance_heuristic")

BLOCK, OUTER_BLOCK = 32, 512
"""Tokens, and blocks of tokens, whose decayed sums are one matrix product."""

MANY_RUNS = 32
"""Stretches of open tokens per response beyond which tokens are selected one by one."""

CACHED = 2**18
"""Numbers that are worked on at a time on a CPU: 1 MiB of float32."""


# --------------------------------------------------------------------------------------------
# Credit


def immediate(reward: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The token's own reward, and no other, in the reward's unit.

        A_t = r_t

    Unbiased for the local reverse KL: per-token divergences with the distribution of prefixes
    held fixed. Biased for the sequence's reverse KL, by the future rewards it leaves out.

    Args:
        reward: one number per token.

    Returns:
        The rewards, detached.

    Source: Eq. 16 and 17 of arXiv:2606.22793.
    """
    return reward.detach()


def return_to_go(reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The sum of this and all later rewards of the response, in the reward's unit.

        A_t = sum_{k >= t} r_k

    Unbiased for the reverse KL of the whole sequence. Every expected reward is negative, so
    stopping early pays.

    Args:
        reward: zero or anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.

    Returns:
        Detached; 0 where the mask is False.

    Source: Eq. 15 of arXiv:2606.22793.
    """
    return _along_responses(_sums_from, mask, reward)


def discounted(
    reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float, meaning: str
) -> Float[Tensor, "B T"]:
    """The discounted sum of this and all later rewards of the response, in the reward's unit.

        A_t = sum_{k >= t} gamma^(k - t) r_k

    gamma = 0 is `immediate`, gamma = 1 is `return_to_go`, both bit for bit. In between it is
    unbiased for neither reverse KL: the objective is the discounted one, which is why the discount
    must say what it means.

    Args:
        reward: zero or anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.
        gamma: discount per token, in [0, 1].
        meaning: `task`, `teacher_reliability` or `variance_heuristic`; only the first two name
            an objective.

    Returns:
        Detached; 0 where the mask is False.

    Source: Eq. 18 and 19, and section 4.5, of arXiv:2606.22793.
    """
    _check_share("gamma", gamma)
    _check_meaning(meaning)
    if gamma == 0.0:
        return torch.where(mask, reward.detach(), 0.0)
    if gamma == 1.0:
        return return_to_go(reward, mask)
    sums = _DecayedSums(gamma, _width(reward.shape[1]), reward)
    return _along_responses(sums, mask, reward)


def windowed(
    reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, window: int
) -> Float[Tensor, "B T"]:
    """The sum of this and the next rewards, `window` in all, in the reward's unit.

        A_t = sum_{t <= k < t + window} r_k

    The current token counts: window = 1 is `immediate`, and a window as long as the response is
    `return_to_go`. In between it is unbiased for neither reverse KL: it is biased for the
    sequence's by the rewards beyond the window.

    Args:
        reward: zero or anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.
        window: tokens that are added up, >= 1.

    Returns:
        Detached; 0 where the mask is False.

    Source: section 4.2 of arXiv:2606.22793; K-step returns of KETCHUP, arXiv:2504.19024.
    """
    if window < 1:
        raise ValueError(
            f"window counts the current token and must be >= 1, got {window}; 1 is immediate"
        )

    def walk(reward: Float[Tensor, "b W"]) -> Float[Tensor, "b W"]:
        return _window_sums(reward, min(window, reward.shape[1]))

    return _along_responses(walk, mask, reward)


def length_normalised(
    reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The mean of this and all later rewards of the response, in the reward's unit.

        A_t = 1 / n_t * sum_{k >= t} r_k,   n_t = number of tokens k >= t

    The current token counts: at the last token it is the token's own reward. Unbiased for neither
    reverse KL: a late token's score weighs as much as an early one's, which takes away most of
    what stopping early gains and pays for long stretches of small rewards.

    Args:
        reward: zero or anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.

    Returns:
        Detached; 0 where the mask is False.

    Source: length normalisation of MiniLLM, arXiv:2306.08543.
    """

    def walk(reward: Float[Tensor, "b W"], counts: Int[Tensor, " b"]) -> Float[Tensor, "b W"]:
        places = torch.arange(reward.shape[1], device=reward.device, dtype=reward.dtype)
        remaining = counts.unsqueeze(1) - places  # not above 0 only where nothing is read
        return _sums_from(reward).div_(remaining)

    return _along_responses(walk, mask, reward, with_counts=True)


def rao_blackwell(
    reward: Float[Tensor, "B T"], reverse_kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The return-to-go with every future reward replaced by its expectation, in nats.

        A_t = r_t - sum_{k > t} D_k

    Unbiased for the reverse KL of the whole sequence, without a critic, if the reward is the log
    ratio and D is the reverse KL over the whole vocabulary. On a smaller support it is biased by
    what the support leaves out of D.

    Args:
        reward: the log ratio of the sampled token; anything where the mask is False.
        reverse_kl: D, per state; anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.

    Returns:
        Detached; 0 where the mask is False.

    Source: Eq. 15 of arXiv:2606.22793 with E[r_k | prefix] = -D_k, its Eq. 7.
    """
    return damped_future(reward, reverse_kl, mask, future_weight=1.0)


def next_step(
    reward: Float[Tensor, "B T"], reverse_kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The token's own reward and the expected reward of the next, in nats.

        A_t = r_t - D_{t+1},   D = 0 after the last token

    In expectation the window of two. Unbiased for neither reverse KL: it adds to the local one
    where the token leads next, and leaves out everything later.

    Args:
        reward: the log ratio of the sampled token; anything where the mask is False.
        reverse_kl: D, per state, over the whole vocabulary; anything where the mask is False.
        mask: False on tool results and padding; the next token is the next one that is open.

    Returns:
        Detached; 0 where the mask is False.

    Source: Eq. 15 of arXiv:2606.22793 cut after one step, with E[r_k | prefix] = -D_k.
    """

    def walk(
        reward: Float[Tensor, "b W"], reverse_kl: Float[Tensor, "b W"]
    ) -> Float[Tensor, "b W"]:
        reward[:, :-1] -= reverse_kl[:, 1:]
        return reward

    return _along_responses(walk, mask, reward, reverse_kl)


def future(reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The sum of the rewards after this token, its own left out, in the reward's unit.

        A_t = sum_{k > t} r_k

    For use beside a `Dense` reverse KL over the whole vocabulary: that term is the exact local
    gradient, this one the gradient through the distribution of prefixes, and their sum is unbiased
    for the reverse KL of the whole sequence. By itself it is unbiased for the difference of the
    two gradients, and rewards nothing but where a token leads.

    Args:
        reward: the log ratio, or its expectation `reward.expected_log_ratio`; anything where the
            mask is False.
        mask: False on tool results and padding; those positions take no time.

    Returns:
        Detached; 0 where the mask is False, and at the last token.

    Source: Eq. 17 of arXiv:2606.22793; the single-step decomposition of MiniLLM, arXiv:2306.08543.
    """

    def walk(reward: Float[Tensor, "b W"]) -> Float[Tensor, "b W"]:
        return pad(_sums_from(reward)[:, 1:], (0, 1))

    return _along_responses(walk, mask, reward)


def mean_future(reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The mean of the rewards after this token, its own left out, in the reward's unit.

        A_t = 1 / n_t * sum_{k > t} r_k,   n_t = number of tokens k > t;  0 at the last token

    The length-normalised form of `future`, for use beside a `Dense` reverse KL. Unbiased for
    neither reverse KL.

    Args:
        reward: zero or anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.

    Returns:
        Detached; 0 where the mask is False, and at the last token.

    Source: length normalisation of MiniLLM, arXiv:2306.08543.
    """

    def walk(reward: Float[Tensor, "b W"], counts: Int[Tensor, " b"]) -> Float[Tensor, "b W"]:
        places = torch.arange(reward.shape[1], device=reward.device, dtype=reward.dtype)
        remaining = (counts.unsqueeze(1) - places - 1).clamp(min=1)
        return pad(_sums_from(reward)[:, 1:], (0, 1)) / remaining

    return _along_responses(walk, mask, reward, with_counts=True)


def standardised(reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The reward in standard deviations from the mean of the optimizer step.

        A_t = (r_t - mean) / sqrt(variance + 1e-8),  over the open tokens of the step

    The variance is that of a sample (divisor n - 1; 1 for a single token). The mean depends on the
    token itself, by one over their number, and the division changes the scale from step to step:
    the gradient of no fixed objective. Teacher = student is stationary, for there all rewards are
    equal.

    Args:
        reward: zero or anything where the mask is False.
        mask: False on tool results and padding.

    Returns:
        Detached; 0 where the mask is False.

    Source: GNDPO, arXiv:2606.09091, and its code.
    """
    held = torch.where(mask, reward.detach(), 0.0).double()
    count = mask.sum()
    deviation = torch.where(mask, held - held.sum() / count.clamp(min=1), 0.0)
    variance = deviation.square().sum() / (count - 1).clamp(min=1)
    return (deviation / (variance + 1e-8).sqrt()).to(reward.dtype)


def bounded_return(
    reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float, meaning: str
) -> Float[Tensor, "B T"]:
    """The discounted return, squeezed into (-1, 1) by its usual size in the response.

        G_t = sum_{k >= t} gamma^(k - t) r_k
        A_t = G_t / (mean of |G| over the response + |G_t|)

    A verdict of -1 or 1 beside it decides the sign of every token, and this the size. Unbiased for
    neither reverse KL. 0 where all returns of the response are.

    Args:
        reward: zero or anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.
        gamma, meaning: as in `discounted`.

    Returns:
        Detached; 0 where the mask is False.

    Source: Eq. 7 of arXiv:2609.16937, with gamma = 0.99.
    """
    returns = discounted(reward, mask, gamma=gamma, meaning=meaning)
    size = returns.abs()
    usual = size.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(returns == 0, 0.0, returns / (usual + size))


def scaled_by_turn(
    reward: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gain_cap: float
) -> Float[Tensor, "B T"]:
    """The token's own reward, less of it in turns that have drifted further than the first.

        d_k = mean of |r| in turn k;  A_t = min(d_1 / d_k, 1 + gain_cap) * r_t  in turn k > 1

    A turn is a stretch of open tokens without a gap, as between two tool results; the first keeps
    its rewards, and so does a turn without drift after a first one without. Biased for every
    divergence: it trusts the teacher less where its text and the student's have parted.

    Args:
        reward: zero or anything where the mask is False.
        mask: False on tool results and padding.
        gain_cap: by how much a later turn may gain, >= 0.

    Returns:
        Detached; 0 where the mask is False.

    Source: SOD, arXiv:2605.07725, with 0.5, which adds 1e-6 to every d.
    """
    if not gain_cap >= 0.0:
        raise ValueError(f"gain_cap must be >= 0, got {gain_cap}")
    held = torch.where(mask, reward.detach(), 0.0)
    starts = mask & ~pad(mask[:, :-1], (1, 0))
    turn = starts.long().cumsum(1) * mask  # 0 where nothing is open
    sums = held.new_zeros(mask.shape[0], mask.shape[1] + 1).scatter_add(1, turn, held.abs())
    counts = torch.zeros_like(sums).scatter_add(1, turn, mask.to(sums.dtype))
    drift = sums / counts.clamp(min=1)
    first = drift[:, 1:2] if mask.shape[1] else drift
    # first / drift at drift = 0 is the cap, except for 0 / 0
    factor = torch.where(first == drift, 1.0, first / drift).clamp(max=1.0 + gain_cap)
    return held * torch.where(turn == 1, 1.0, factor.gather(1, turn))


def damped_future(
    reward: Float[Tensor, "B T"],
    reverse_kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    future_weight: float,
) -> Float[Tensor, "B T"]:
    """The token's own reward and a share of the expected future ones, in nats.

        A_t = r_t - w * sum_{k > t} D_k

    w = 0 is `immediate`, unbiased for the local reverse KL; w = 1 is `rao_blackwell`, unbiased for
    the sequence's. In between it is unbiased for the convex mixture of the two gradients, and for
    the gradient of no known objective. For w > 0 stopping early pays.

    Args:
        reward: the log ratio of the sampled token; anything where the mask is False.
        reverse_kl: D, per state, over the whole vocabulary; anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.
        future_weight: w, >= 0.

    Returns:
        Detached; 0 where the mask is False.

    Source: the two parts of Eq. 15 of arXiv:2606.22793, its Eq. 16 and 17.
    """
    _check_future_weight(future_weight)

    def walk(
        reward: Float[Tensor, "b W"], reverse_kl: Float[Tensor, "b W"]
    ) -> Float[Tensor, "b W"]:
        reward[:, :-1].sub_(_sums_from(reverse_kl)[:, 1:], alpha=future_weight)
        return reward

    return _along_responses(walk, mask, reward, reverse_kl)


def length_neutral_future(
    reward: Float[Tensor, "B T"],
    reverse_kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    future_weight: float,
) -> Float[Tensor, "B T"]:
    """The token's own reward and a share of the future costs beyond the usual, in nats.

        A_t = r_t - w * sum_{k > t} (D_k - m),   m = mean of D over the step's open tokens

    A future of usual cost is worth nothing, however long, so that stopping early earns nothing. A
    token is charged for leading to states where the two disagree more than elsewhere. With w = 1
    and m held fixed it is unbiased for the sequence's reverse KL minus m times the expected
    length; the mean of the step correlates slightly, about one over the number of responses, with
    the response it is subtracted from.

    Args:
        reward: the log ratio of the sampled token; anything where the mask is False.
        reverse_kl: D, per state, over the whole vocabulary; anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.
        future_weight: w, >= 0.

    Returns:
        Detached; 0 where the mask is False.

    Source: ours; the early-stop pressure it removes follows from Eq. 15 of arXiv:2606.22793.
    """
    _check_future_weight(future_weight)
    sums, counts = _open_sums(reverse_kl, mask)
    usual = (sums.sum() / counts.sum().clamp(min=1)).to(reverse_kl.dtype)
    return damped_future(reward, reverse_kl - usual, mask, future_weight=future_weight)


def gae(
    reward: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    bootstrap_value: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    gae_lambda: float,
    gamma: float = 1.0,
    meaning: str = "",
) -> Float[Tensor, "B T"]:
    """Generalised advantage of the token over the critic's value of its prefix, in nats.

        A_t = sum_{l >= 0} (gamma * lambda)^l delta_{t+l}
        delta_t = r_t + gamma * V_{t+1} - V_t

    V after the last token is `bootstrap_value`. With gamma = 1 it is unbiased for the reverse KL of
    the whole sequence at every lambda if V is the student's exact value, and at lambda = 1 for any
    V, where it is the return-to-go minus V_t: both if responses end by themselves. One that was cut
    off stands for the rest by its bootstrap value, and is biased by the error of that value. With
    lambda < 1 an inexact V biases it too. With gamma < 1 the objective is the discounted one.

    The value is already subtracted: use no baseline.

    Args:
        reward: the log ratio of the sampled token; anything where the mask is False.
        values: V, of the state in which the token was chosen; anything where the mask is False.
        bootstrap_value: V of the state after the last token; 0 where the response ended.
        mask: False on tool results and padding; those positions take no time.
        gae_lambda: lambda, in [0, 1]; smaller trusts the critic more.
        gamma: discount per token, in [0, 1].
        meaning: of a discount below 1, as in `discounted`.

    Returns:
        Detached; 0 where the mask is False.

    Source: Eq. 21 to 23 of arXiv:2606.22793; Schulman et al., arXiv:1506.02438, Eq. 16.
    """
    _check_share("gae_lambda", gae_lambda)
    _check_share("gamma", gamma)
    if gamma < 1.0:
        _check_meaning(meaning)
    decay = gamma * gae_lambda
    sums = _DecayedSums(decay, _width(reward.shape[1]), reward)

    def walk(
        reward: Float[Tensor, "b W"],
        values: Float[Tensor, "b W"],
        bootstrap_value: Float[Tensor, " b"],
        counts: Int[Tensor, " b"],
    ) -> Float[Tensor, "b W"]:
        after_last = counts.unsqueeze(1)
        values.scatter_(1, after_last, bootstrap_value.unsqueeze(1))
        delta = reward.sub_(values)
        delta[:, :-1].add_(values[:, 1:], alpha=gamma)
        return sums(delta.scatter_(1, after_last, 0.0))

    return _along_responses(walk, mask, reward, values, bootstrap_value, with_counts=True)


# --------------------------------------------------------------------------------------------
# Baselines


def expected_reward(reverse_kl: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The state's expected log-ratio reward, minus the reverse KL: a per-state baseline, in nats.

        b_t = E_student[r_t | prefix] = -KL(student || teacher)(prefix)

    Depends on the prefix alone, so subtracting it leaves every expectation unchanged. It is the
    exact value of the state only where credit is immediate.

    Args:
        reverse_kl: per state, on any support.

    Returns:
        Detached; <= 0.

    Source: vOPD, arXiv:2605.07865.
    """
    return -reverse_kl.detach()


def value(values: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The critic's value of the state as a baseline, in nats.

        b_t = V(prefix)

    Depends on the prefix alone, so subtracting it leaves every expectation unchanged, right or
    wrong, as long as the critic did not learn from this very response. It suits `return_to_go` and
    `rao_blackwell`; `gae` has already subtracted it.

    Args:
        values: V, of the state in which the token was chosen.

    Returns:
        Detached.

    Source: Eq. 8 and 20 of arXiv:2606.22793.
    """
    return values.detach()


def position_mean(
    credited: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The mean credit that other responses have at the same token, in the credit's unit.

        b_t = mean over other responses longer than t of credited_t

    Tokens are counted after gaps are deleted. The response's own credit is left out, so that the
    baseline is independent of it, and subtracting leaves every expectation unchanged as long as
    responses are sampled independently.

    Args:
        credited: reward after credit; anything where the mask is False.
        mask: False on tool results and padding; those positions take no time.

    Returns:
        Detached; 0 where the mask is False, and where no other response is that long.

    Source: Eq. 8 and 20 of arXiv:2606.22793; leaving one out as in Kool et al., Buy 4 REINFORCE
    samples, get a baseline for free.
    """
    packed = (_Packing(mask[rows]).pack(credited.detach()[rows]) for rows in _groups(mask))
    # In float64, since the own credit is taken out of a sum over all.
    total = torch.stack([part.sum(0, dtype=torch.float64) for part in packed]).sum(0)
    counts = mask.sum(1)
    ends = torch.zeros_like(total).index_add(0, counts, torch.ones_like(counts).to(total))
    others = len(mask) - ends.cumsum(0) - 1  # responses that have such a token, less one

    def walk(own: Float[Tensor, "b W"]) -> Float[Tensor, "b W"]:
        return ((total - own) / others.clamp(min=1)).to(own.dtype)

    return _along_responses(walk, mask, credited)


def batch_mean(credited: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The mean credit of all tokens of the other responses, in the credit's unit.

        b = mean over other responses and their tokens of credited

    The response's own credit is left out, so that the baseline is independent of it, and
    subtracting leaves every expectation unchanged as long as responses are sampled independently.

    Args:
        credited: reward after credit; anything where the mask is False.
        mask: False on tool results and padding.

    Returns:
        Detached, the same along a response; 0 where the mask is False, and where no other response
        has a token.

    Source: Eq. 8 and 20 of arXiv:2606.22793; leaving one out as in Kool et al., Buy 4 REINFORCE
    samples, get a baseline for free.
    """
    return _mean_of_others(credited, mask, mask.new_zeros(mask.shape[0], dtype=torch.long))


def group_mean(
    credited: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    """The mean credit of all tokens of the other responses to the same prompt.

        b = mean over other responses of the group and their tokens of credited

    The response's own credit is left out, so that the baseline depends on the prompt and on
    independent samples alone, and subtracting leaves every expectation unchanged.

    Args:
        credited: reward after credit; anything where the mask is False.
        mask: False on tool results and padding.
        group: index of the prompt; responses with the same index are compared.

    Returns:
        Detached, the same along a response; 0 where the mask is False, and where no other response
        of the group has a token.

    Source: Eq. 8 and 20 of arXiv:2606.22793; leaving one out as in Kool et al., Buy 4 REINFORCE
    samples, get a baseline for free.
    """
    return _mean_of_others(credited, mask, group)


def _mean_of_others(
    credited: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    others = (group.unsqueeze(0) == group.unsqueeze(1)).fill_diagonal_(False).double()
    sums, counts = _open_sums(credited, mask)
    mean = (others @ sums) / (others @ counts).clamp(min=1.0)
    return torch.where(mask, mean.to(credited.dtype).unsqueeze(1), 0.0)


def _open_sums(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Per response, in float64: the sum over its open tokens, and how many there are."""
    parts = [_Packing(mask[rows]).pack(values.detach()[rows]).sum(1) for rows in _groups(mask)]
    return torch.cat(parts).double(), mask.sum(1).double()


# --------------------------------------------------------------------------------------------
# Walking along responses


def _along_responses(
    walk: Callable[..., Float[Tensor, "b W"]],
    mask: Bool[Tensor, "B T"],
    *tensors: Tensor,
    with_counts: bool = False,
) -> Float[Tensor, "B T"]:
    """`walk` along the open tokens of every response, gaps deleted; 0 where the mask is False.

    Args:
        walk: takes the tensors for some of the responses, [B, T] ones packed and its own to write
            to, [B] ones as they are, and returns a packed tensor.
        tensors: the first of them [B, T]. Nothing carries a gradient from here on.
        with_counts: `walk` takes the number of open tokens of each response, too.
    """
    result = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    for rows in _groups(mask):
        packing = _Packing(mask[rows])
        part = (tensor.detach()[rows] for tensor in tensors)
        packed = [packing.pack(tensor) if tensor.dim() == 2 else tensor for tensor in part]
        if with_counts:
            packed.append(packing.counts)
        packing.spread(walk(*packed), result[rows])
    return result


def _groups(mask: Bool[Tensor, "B T"]) -> list[slice]:
    """All responses at once; on a CPU as many at a time as stay in its cache."""
    size, length = mask.shape
    step = size if mask.device.type != "cpu" else CACHED // max(length, 1)
    return [slice(start, start + step) for start in range(0, max(size, 1), max(step, 1))]


class _Packing:
    """Deletes the gaps of responses and puts them back.

    Packed, the open tokens of a response stand at the left, in order, with at least one zero after
    them. What stands under a closed mask is never read.
    """

    def __init__(self, mask: Bool[Tensor, "b T"]) -> None:
        self.mask = mask
        self.width = _width(mask.shape[1])
        self.runs = _runs(mask, self.width) if mask.device.type == "cpu" else None

    @property
    def counts(self) -> Int[Tensor, " b"]:
        """Open tokens per response."""
        if self.runs is None:
            return self.mask.sum(1)
        counts = [0] * len(self.mask)
        for start, stop, to in self.runs:
            counts[to // self.width] = to % self.width + stop - start
        return torch.tensor(counts)

    @property
    def places(self) -> Int[Tensor, "b T"]:
        """Which open token of its response each one is, from 0; -1 or a repetition elsewhere."""
        return self.mask.cumsum(1) - 1

    def pack(self, values: Float[Tensor, "b T"]) -> Float[Tensor, "b W"]:
        """The open tokens' values, then zeros."""
        if self.runs is None:
            places = torch.where(self.mask, self.places, self.width)  # one column is thrown away
            wider = values.new_zeros(len(values), self.width + 1)
            return wider.scatter_(1, places, values)[:, : self.width]
        packed = values.new_empty(len(values), self.width)
        source, target, done = values.flatten().numpy(), packed.view(-1).numpy(), 0
        for start, stop, to in self.runs:
            end = to + stop - start
            if done < to:
                target[done:to] = 0
            target[to:end] = source[start:stop]
            done = end
        target[done:] = 0
        return packed

    def spread(self, packed: Float[Tensor, "b W"], result: Float[Tensor, "b T"]) -> None:
        """Write every open token's value to its place in `result`, and 0 elsewhere."""
        if self.runs is None:
            result.copy_(torch.where(self.mask, packed.gather(1, self.places.clamp(min=0)), 0.0))
            return
        source, target, done = packed.flatten().numpy(), result.view(-1).numpy(), 0
        for start, stop, to in self.runs:
            if done < start:
                target[done:start] = 0
            target[start:stop] = source[to : to + stop - start]
            done = stop
        target[done:] = 0


def _runs(mask: Bool[Tensor, "b T"], width: int) -> list[tuple[int, int, int]] | None:
    """Stretches of open tokens: from, to in [b, T], flattened, and from in [b, W], flattened.

    Copying stretches, by numpy, which starts faster than torch, takes a tenth of the time of
    selecting tokens one by one. None where there are too many of them for that.
    """
    length, flat = mask.shape[1], mask.flatten()
    if not len(flat):
        return []
    edges = (flat[1:] != flat[:-1]).numpy().nonzero()[0] + 1
    if len(edges) > 2 * MANY_RUNS * len(mask):
        return None
    bounds = [0, *edges.tolist(), len(flat)]
    opens = 0 if flat[0] else 1
    runs, row, to = [], -1, 0
    for start, stop in zip(bounds[opens::2], bounds[opens + 1 :: 2], strict=False):
        while start < stop:  # a stretch ends with its row
            if start // length != row:
                row = start // length
                to = row * width
            end = min(stop, (row + 1) * length)
            runs.append((start, end, to))
            to += end - start
            start = end
    return runs


class _DecayedSums:
    """`sum_{k >= t} decay^(k - t) values_k` along packed responses.

    Within a block by one matrix of powers; from block to block by the same sum over what the
    blocks begin with, at the decay of a whole block. On an accelerator in float64, since its
    float32 products may be set to keep three digits.
    """

    def __init__(self, decay: float, width: int, like: Tensor, *, block: int = BLOCK) -> None:
        size = min(block, width)
        steps = torch.arange(size, device=like.device)
        powers = decay ** torch.arange(size + 1, dtype=torch.float64)
        # Denormal numbers, in the powers or in their products, would cost most of the time.
        limits = torch.finfo(like.dtype)
        powers = torch.where(powers < limits.tiny / limits.eps, 0.0, powers)
        powers = powers.to(like.device, torch.float64 if like.is_cuda else like.dtype)
        self.powers = powers[steps.unsqueeze(1) - steps].tril()
        self.fade = powers[size - steps]
        self.over_blocks: _DecayedSums | None = None
        if width > block:
            blocks = -(-width // block)
            self.over_blocks = _DecayedSums(decay**block, blocks, like, block=OUTER_BLOCK)

    def __call__(self, values: Float[Tensor, "B W"]) -> Float[Tensor, "B W"]:
        return self._sums(values.to(self.powers.dtype)).to(values.dtype)

    def _sums(self, values: Float[Tensor, "B W"]) -> Float[Tensor, "B W"]:
        if self.over_blocks is None:
            return values @ self.powers
        size, width = len(self.fade), values.shape[1]
        values = pad(values, (0, -width % size)) if width % size else values
        within = values.reshape(-1, size) @ self.powers
        sums = within.view(len(values), -1, size)
        after = pad(self.over_blocks(sums[:, :, 0])[:, 1:], (0, 1))
        return sums.addcmul_(after.unsqueeze(2), self.fade).view(values.shape)[:, :width]


def _width(length: int) -> int:
    """Columns of a packed tensor: room for one more than `length`, in whole blocks."""
    return (length // BLOCK + 1) * BLOCK


def _sums_from(values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`sum_{k >= t} values_k`, one after the other, so that zeros at the end change no bit."""
    return values.flip(1).cumsum(1).flip(1)


def _window_sums(values: Float[Tensor, "B W"], window: int) -> Float[Tensor, "B W"]:
    """`sum_{t <= k < t + window} values_k`, by doubling: no large sums are subtracted."""
    sums, width = values, 1
    for bit in f"{window:b}"[1:]:
        sums, width = _plus_later(sums, sums, width), 2 * width
        if bit == "1":
            sums, width = _plus_later(values, sums, 1), width + 1
    return sums


def _plus_later(
    values: Float[Tensor, "B W"], later: Float[Tensor, "B W"], by: int
) -> Float[Tensor, "B W"]:
    """`values_t + later_{t + by}`."""
    total = torch.empty_like(values)
    torch.add(values[:, :-by], later[:, by:], out=total[:, :-by])
    total[:, -by:] = values[:, -by:]
    return total


def _check_share(name: str, knob: float) -> None:
    if not 0.0 <= knob <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {knob}")


def _check_meaning(meaning: str) -> None:
    if meaning not in MEANINGS:
        raise ValueError(
            f"a discount must say what it means: one of {', '.join(MEANINGS)}, got {meaning!r}"
        )


def _check_future_weight(future_weight: float) -> None:
    if not 0.0 <= future_weight < math.inf:
        raise ValueError(
            f"future_weight must be finite and >= 0, got {future_weight}; "
            "0 is immediate, 1 is rao_blackwell"
        )

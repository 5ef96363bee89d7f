"""Methods that score the student's own token with the teacher's log-ratio."""

from __future__ import annotations

from opd.formula import credit, reward, surrogate
from opd.objective import Method, Objective, Sampled
from opd.types import StateSource


def sampled_token_opd() -> Method:
    """The log-ratio of the sampled token as its advantage, immediate credit.

        A_t = log teacher(y_t) - log student(y_t),   L = mean over tokens of -A_t * log student(y_t)

    Needs one number per token from the teacher. An unbiased one-sample estimate of the gradient of
    the local reverse KL. With teacher = student every advantage is zero, and so is the gradient.

    Settings reported by the source: low-rank adapters of rank 128, 64 prompts x 4 samples.

    Source: Lu and Thinking Machines Lab, On-Policy Distillation, October 2025.
    Evidence: E2
    Formula: code
    Stationary: teacher
    Departures: the score in place of an importance ratio, equal while weights are those of the
        rollout.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                credit=credit.immediate,
                surrogate=surrogate.score,
            )
        ),
        states=StateSource(student=1.0),
        name="sampled_token_opd",
    )


def vopd() -> Method:
    """The sampled token's log-ratio, less its expectation at the prefix.

        A_t = log teacher(y_t) - log student(y_t) + KL(student || teacher)(prefix)

    The per-state reverse KL is a baseline: it depends on the prefix alone, so the expected
    gradient is that of `sampled_token_opd`; the variance usually falls, which is not guaranteed.
    With teacher = student every advantage is zero, and so is the gradient.

    Source: vOPD, arXiv:2605.07865.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Departures: the baseline is over the whole vocabulary; the reward floor of the paper is left
        out.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                credit=credit.immediate,
                baseline=credit.expected_reward,
                surrogate=surrogate.score,
            )
        ),
        states=StateSource(student=1.0),
        name="vopd",
    )

"""Methods that let a token answer for what follows it."""

from __future__ import annotations

from functools import partial

from opd.formula import credit, divergence, outcome, reward, surrogate, weight
from opd.objective import Dense, Method, Objective, Sampled
from opd.types import StateSource


def minillm(
    *, mixture: float = 0.2, cap: float = 1.25, data_share: float = 0.5, data_coef: float = 1.0
) -> Method:
    """The reverse KL of whole sequences: exact at the token, a mean of the log-ratios after it.

        L = mean over tokens of w * KL(student || teacher) - w * F_t * log student(y_t)
          + c * mean over the data's tokens of -log student(y_t)
        F_t = mean of log teacher - log student over the later tokens
        w = min(student(y_t) / mixture(y_t), cap),  y drawn from the mixture with the teacher

    With teacher = student everything but the data's part is zero.

    Args:
        mixture: the teacher's share of the distribution that tokens are drawn from.
        cap: largest weight; it never exceeds 1 / (1 - mixture).
        data_share: of the sequences.
        data_coef: c.

    Source: MiniLLM, arXiv:2306.08543, sections 2.2 and 2.3; its code in LMOps.
    Evidence: E0
    Formula: code
    Stationary: teacher, without data
    Settings: mixture 0.2, learning rate 5e-6, 4 passes over each rollout, 256 tokens, 5,000 steps.
    Departures: as the paper has it; the code lets the return include the token itself, whitens it,
        leaves the exact part unweighted and clips ratios.
    Failure: without the mixture a small student finds repetitions that the teacher scores highly;
        without the length normalisation it falls silent.
    """
    ratio = partial(weight.importance, cap=cap)
    return Method(
        Objective(
            Dense(divergence=divergence.reverse_kl, rows="student", weights=(ratio,)),
            Sampled(
                reward=reward.teacher_log_ratio,
                credit=credit.mean_future,
                rows="student",
                weights=(ratio,),
                name="future",
            ),
            Sampled(reward=reward.one, rows="data", coef=data_coef, name="data"),
        ),
        states=StateSource(student=1.0 - data_share, data=data_share, mixture=mixture),
        name="minillm",
    )


def token_and_exact_opd() -> Method:
    """The exact reverse KL and the sampled log-ratio together.

        L = mean over tokens of KL(student || teacher)(prefix) - a_t * log student(y_t)
        a_t = log teacher(y_t) - log student(y_t)

    In expectation twice the gradient of the reverse KL. With teacher = student, loss and gradient
    are zero.

    Source: the MiniLLM trainer that TRL had before 1.16, at its defaults (discount 0, single-step
        decomposition).
    Evidence: E1
    Formula: code
    Stationary: teacher
    Settings: clip 0.2, which is without effect at the first update.
    Departures: the advantage is detached; TRL leaves the student's log-probability in it.
    Failure: the sampled half adds noise and no information.
    """
    return Method(
        Objective(
            Dense(divergence=divergence.reverse_kl, rows="student"),
            Sampled(reward=reward.teacher_log_ratio, rows="student"),
        ),
        name="token_and_exact_opd",
    )


def windowed_opd(*, window: int = 4) -> Method:
    """The log-ratios of this token and the next few.

        A_t = sum of log teacher(y_k) - log student(y_k) over t <= k < t + window

    Between the local and the sequence's reverse KL. With teacher = student every advantage is zero.

    Args:
        window: how many tokens, this one included.

    Source: section 4.2 of arXiv:2606.22793; KETCHUP, arXiv:2504.19024, is the nearest paper, whose
        rewards are likely others.
    Evidence: E0
    Formula: inferred
    Stationary: teacher
    Settings: not found.
    Departures: KETCHUP's formula was not found; its abstract speaks of a Bellman equation.
    Failure: the noise of every reward in the window.
    """
    return Method(
        Objective(
            Sampled(reward=reward.teacher_log_ratio, credit=partial(credit.windowed, window=window))
        ),
        name="windowed_opd",
    )


def bounded_return_opd(*, gamma: float = 0.99, outcome_scale: float = 1.0) -> Method:
    """The discounted return of the log-ratios, bounded, plus the verdict.

        A_t = G_t / (mean |G| + |G_t|) + scale * z,  G_t = sum_{k >= t} gamma^(k - t) a_k
        z = 1 where the response is right, -1 where it is wrong

    Args:
        gamma: discount per token, in [0, 1].
        outcome_scale: what a verdict is worth.

    Source: reward-compatible temporal credit, Eqs. 7 and 8 of arXiv:2609.16937.
    Evidence: E0
    Formula: paper
    Stationary: teacher, without verdicts
    Settings: gamma 0.99.
    Departures: a response without verdict gets the first part alone.
    Failure: the bound makes a faint disagreement as loud as a strong one.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                credit=partial(credit.bounded_return, gamma=gamma, meaning="variance_heuristic"),
                outcome=(partial(outcome.add_verdict_sign, scale=outcome_scale),),
            )
        ),
        name="bounded_return_opd",
    )


def gae_opd(*, gae_lambda: float = 0.95) -> Method:
    """Generalised advantages over a learned value of the prefix.

        A_t = sum_l lambda^l delta_{t+l},  delta_t = a_t + V_{t+1} - V_t
        a_t = log teacher(y_t) - log student(y_t)

    The survey's first proposal: for the sequence's reverse KL, at less noise than a return. With
    teacher = student and a value of zero every advantage is zero.

    Args:
        gae_lambda: lambda, in [0, 1].

    Source: Eqs. 21 to 23 of arXiv:2606.22793.
    Evidence: E3
    Formula: paper
    Stationary: teacher, at value zero
    Settings: none published.
    Departures: none.
    Failure: an inexact value biases it where lambda is below 1.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                credit=partial(credit.gae, gae_lambda=gae_lambda),
            )
        ),
        name="gae_opd",
    )


def rao_blackwell_opd() -> Method:
    """The sequence's reverse KL without a critic: later log-ratios by their expectations.

        A_t = a_t - sum_{k > t} KL(student || teacher)(prefix k)
        a_t = log teacher(y_t) - log student(y_t)

    Unbiased for the reverse KL of the whole sequence. With teacher = student every advantage is
    zero.

    Source: Eqs. 7 and 15 of arXiv:2606.22793.
    Evidence: E3
    Formula: paper
    Stationary: teacher
    Settings: none published.
    Departures: none.
    Failure: every later divergence is a cost, so stopping early pays.
    """
    return Method(
        Objective(Sampled(reward=reward.teacher_log_ratio, credit=credit.rao_blackwell)),
        name="rao_blackwell_opd",
    )


def sod(
    *, gain_cap: float = 0.5, outcome_scale: float = 1.0, low: float = 0.2, high: float = 0.2
) -> Method:
    """The verdict, and in each turn as much of the log-ratio as the turn has kept to the teacher.

        A_t = scale * A_group + min(d_1 / d_k, 1 + gain_cap) * a_t  in turn k
        d_k = mean |a| in turn k

    For text in turns, with tool results in between.

    Args:
        gain_cap: by how much a later turn may outweigh the first.
        outcome_scale: what one standard deviation of the verdicts is worth, in nats.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: SOD, arXiv:2605.07725, as in EasyOPD's code.
    Evidence: E0
    Formula: code
    Stationary: teacher, without verdicts
    Settings: gain_cap 0.5, both parts with coefficient 1.
    Departures: 1e-6 is not added to every d.
    Failure: one bad turn silences the teacher for the rest.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                credit=partial(credit.scaled_by_turn, gain_cap=gain_cap),
                outcome=(partial(outcome.add_group_advantage, scale=outcome_scale),),
                surrogate=partial(surrogate.clipped, low=low, high=high),
            )
        ),
        name="sod",
    )

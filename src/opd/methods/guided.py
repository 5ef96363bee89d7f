"""Methods in which a verifier has a say beside a self that is told more."""

from __future__ import annotations

from functools import partial

from opd.formula import divergence, outcome, response, reward, support, weight
from opd.methods.parts import (
    CONTRAST,
    REFERENCE,
    SOLUTION,
    WRONG,
    averaged_self,
    clipped,
    live_self,
)
from opd.objective import Dense, Method, Objective, Sampled
from opd.schedule import Linear, Schedule
from opd.types import Bound

FADING = Linear(0.5, 0.0, 50)
FADING_FAST = Linear(0.5, 0.0, 25)


def rlsd(
    *,
    width: float = 0.2,
    strength: float | Schedule = FADING,
    low: float = 0.2,
    high: float = 0.2,
    context: str = SOLUTION,
) -> Method:
    """The verdict says which way, a self with the solution how much of it each token gets.

        A_t = A_group * (1 - c + c * clip(exp(sign(A_group) a_t), 1 - w, 1 + w))
        c = strength,  w = width

    Args:
        width: w, how far the factor may leave 1.
        strength: c; by default falling to 0.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the privileged self reads in place of the prompt.

    Source: RLSD, arXiv:2604.03128, as in the codes of RLCSD and SDPG.
    Evidence: E0
    Formula: code
    Stationary: teacher, without verdicts
    Settings: 0.2, c from 0.5 to 0 over 50 steps, the self renewed every 10 steps.
    Departures: the self is that of the moment.
    Failure: responses shrink steadily on math.
    """
    sized = Bound.of(outcome.magnitude_only).with_knobs(low=width, high=width, strength=strength)
    return Method(
        Objective(
            Sampled(reward=reward.teacher_log_ratio, outcome=(sized,), surrogate=clipped(low, high))
        ),
        views=(live_self(context),),
        name="rlsd",
    )


def rlrt(
    *,
    width: float = 0.5,
    strength: float | Schedule = 1.0,
    low: float = 0.2,
    high: float = 0.2,
    context: str = SOLUTION,
) -> Method:
    """Of a right response, what a self with the solution would not have said is reinforced most.

        A_t = A_group * (1 - c + c * clip(exp(-sign(A_group) a_t), 1 - e, 1 + e)) where right
        A_t = A_group elsewhere;  c = strength, e = width

    Args:
        width: e.
        strength: c.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the privileged self reads in place of the prompt.

    Source: RLRT, arXiv:2605.10781.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: e 1.0 for base, 0.5 for instruction-tuned, 0.2 for thinking models.
    Departures: the clip of the ratio is ours.
    Failure: without the gate on right responses it collapses within 40 steps.
    """
    turned = Bound.of(outcome.reversed_magnitude).with_knobs(width=width, strength=strength)
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio, outcome=(turned,), surrogate=clipped(low, high)
            )
        ),
        views=(live_self(context),),
        name="rlrt",
    )


def rlcsd(
    *,
    temperature: float = 0.02,
    scale: float = 0.5,
    at_least: float = 0.02,
    low: float = 0.2,
    high: float = 0.2,
    context: str = SOLUTION,
    wrong_context: str = WRONG,
) -> Method:
    """The verdict, shifted towards what a right hint makes likelier than a wrong one.

        A_t = A_group + d within its sign
        d = scale * tanh(e_t / temperature), 0 if |d| <= at_least
        e_t = log self(y_t | right hint) - log self(y_t | wrong hint)

    Args:
        temperature, scale, at_least: as in `bounded_shift`.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context, wrong_context: what the two selves read in place of the prompt; the second by
            default needs a data column `wrong`.

    Source: RLCSD, arXiv:2606.11709, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher, without verdicts
    Settings: 0.02, 0.5 and 0.02, 8 samples per prompt, up to 4 wrong hints, learning rate 1e-6.
    Departures: one wrong hint; one mean over all tokens, where the code takes one over shifted
        tokens and one over the others.
    Failure: at a temperature this low nearly every token is shifted fully.
    """
    shifted = partial(
        outcome.bounded_shift, temperature=temperature, scale=scale, at_least=at_least
    )
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                outcome=(shifted,),
                surrogate=clipped(low, high),
                against=CONTRAST.name,
            )
        ),
        views=(live_self(context), live_self(wrong_context, "teacher.wrong"), CONTRAST),
        name="rlcsd",
    )


def cepo(
    *,
    width: float = 0.2,
    strength: float | Schedule = FADING_FAST,
    low: float = 0.2,
    high: float = 0.2,
    context: str = SOLUTION,
    wrong_context: str = WRONG,
) -> Method:
    """The verdict, each token sized by a right hint against a wrong one.

        A_t = A_group * (1 - c + c * clip(exp(sign(A_group) e_t), 1 - w, 1 + w)),  c = strength
        e_t = log self(y_t | right hint) - log self(y_t | wrong hint),  w = width

    Args:
        width: w.
        strength: c; by default falling to 0.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context, wrong_context: as in `rlcsd`.

    Source: CEPO, arXiv:2605.19436.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: c from 0.5 to 0 over 25 steps; the width was not found.
    Departures: the width is ours.
    Failure: none reported.
    """
    sized = Bound.of(outcome.magnitude_only).with_knobs(low=width, high=width, strength=strength)
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                outcome=(sized,),
                surrogate=clipped(low, high),
                against=CONTRAST.name,
            )
        ),
        views=(live_self(context), live_self(wrong_context, "teacher.wrong"), CONTRAST),
        name="cepo",
    )


def sdpg(
    *,
    teacher_coef: float | Schedule = 0.001,
    reference_coef: float | Schedule = 0.001,
    low: float = 0.2,
    high: float = 0.28,
    context: str = SOLUTION,
) -> Method:
    """The verifier's gradient, a reverse KL to a self with the solution, and a reference.

        L = GRPO's clipped loss + b * mean over tokens of KL(student || self)
          + c * mean over tokens of 1/2 (log student(y_t) - log reference(y_t))^2

    Args:
        teacher_coef, reference_coef: b and c.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the privileged self reads in place of the prompt.

    Source: SDPG, arXiv:2606.04036, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher, without verdicts
    Settings: both 0.001, 8 samples per prompt, learning rate 1e-6.
    Departures: divergences above 20 nats are not cut; the paper gates the divergence by a positive
        advantage, the shipped scripts do not.
    Failure: none reported.
    """
    return Method(
        Objective(
            Sampled(reward=reward.group_advantage, surrogate=clipped(low, high), name="verdict"),
            Dense(divergence=divergence.reverse_kl, coef=teacher_coef),
            Dense(
                divergence=divergence.reverse_kl_k2,
                against="reference",
                coef=reference_coef,
                name="pull",
            ),
        ),
        views=(live_self(context), REFERENCE),
        name="sdpg",
    )


def srpo(
    *,
    k: int = 100,
    sharpness: float = 1.0,
    cap: float = 2.0,
    low: float = 0.2,
    high: float = 0.2,
    decay: float = 0.95,
    context: str = SOLUTION,
) -> Method:
    """Right responses by the verifier, wrong ones by a self with the solution where it is sure.

        L = GRPO's clipped loss on right responses + mean over tokens of wrong responses of
            w * min(student / old, cap) * JSD(self, student) on the student's top k and a bucket
        w = exp(-b H(self)), 1 on average,  b = sharpness

    Args:
        k: how many of the student's likeliest tokens are compared.
        sharpness: b.
        cap: of the ratio.
        low, high: how far the ratio to the rollout's weights may leave 1.
        decay: of the average that the self is.
        context: what it reads in place of the prompt.

    Source: SRPO, arXiv:2604.02288, as in the code of RLCSD.
    Evidence: E0
    Formula: code
    Stationary: teacher, without verdicts
    Settings: k 100, b 1, cap 2, average 0.95, learning rate 1e-6.
    Departures: routed by the verdict, where that code goes by the sign of the advantage; without a
        verdict a response teaches nothing.
    Failure: entropy that runs away.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.group_advantage,
                surrogate=clipped(low, high),
                weights=(weight.correct,),
                name="verdict",
            ),
            Dense(
                divergence=divergence.jensen_shannon,
                support=partial(support.student_top_k, k=k),
                tail="bucket",
                weights=(
                    partial(response.sure_teacher_where_wrong, sharpness=sharpness),
                    partial(weight.update_ratio, cap=cap),
                ),
            ),
        ),
        views=(averaged_self(context, decay),),
        name="srpo",
    )


def hdpo(
    *, coef: float | Schedule = 1.0, low: float = 0.2, high: float = 0.2, context: str = SOLUTION
) -> Method:
    """The verifier everywhere, and a self with the solution on prompts that are never solved.

        L = GRPO's clipped loss + c * mean over tokens of [every sample of the prompt fails]
            * JSD(self, student)(prefix)

    Args:
        coef: c.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the privileged self reads in place of the prompt.

    Source: HDPO, arXiv:2603.23871.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: the 64 likeliest tokens; c not found.
    Departures: on the student's failed responses and the whole vocabulary, where the paper teaches
        what the privileged self wrote and the verifier accepted.
    Failure: gains of less than two points.
    """
    return Method(
        Objective(
            Sampled(reward=reward.group_advantage, surrogate=clipped(low, high), name="verdict"),
            Dense(
                divergence=divergence.jensen_shannon,
                weights=(response.group_all_fail,),
                coef=coef,
            ),
        ),
        views=(live_self(context),),
        name="hdpo",
    )


def sdar(
    *,
    sharpness: float = 5.0,
    coef: float | Schedule = 0.01,
    low: float = 0.2,
    high: float = 0.2,
    context: str = SOLUTION,
) -> Method:
    """The verifier's gradient, and the likelihood of tokens that a privileged self stands behind.

        L = GRPO's clipped loss + c * mean over tokens of -sigmoid(b a_t) * log student(y_t)

    The second part only ever pushes up: at self = student it is half the likelihood.

    Args:
        sharpness: b.
        coef: c.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the privileged self reads in place of the prompt.

    Source: SDAR, arXiv:2605.15155, and its code.
    Evidence: E0
    Formula: code
    Stationary: own samples
    Settings: b 5, c 0.01.
    Departures: none known.
    Failure: reinforces whatever was written, right or wrong, where the two agree.
    """
    return Method(
        Objective(
            Sampled(reward=reward.group_advantage, surrogate=clipped(low, high), name="verdict"),
            Sampled(
                reward=reward.one,
                weights=(partial(weight.endorsement, sharpness=sharpness),),
                coef=coef,
                name="endorsed",
            ),
        ),
        views=(live_self(context),),
        name="sdar",
    )


def egrsd(
    *,
    nats: float = 0.5,
    least: float = 0.2,
    width: float = 0.2,
    low: float = 0.2,
    high: float = 0.2,
    context: str = SOLUTION,
) -> Method:
    """The verdict, sized by a privileged self, at full weight only where that self is sure.

        A_t = w_t * A_group * clip(exp(sign(A_group) a_t), 1 - e, 1 + e),  e = width
        w_t = 1 where H(self) <= nats, least elsewhere

    Args:
        nats: how undecided the self may be.
        least: the weight elsewhere.
        width: e.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the privileged self reads in place of the prompt.

    Source: EGRSD, arXiv:2605.13255.
    Evidence: E0
    Formula: inferred
    Stationary: teacher, without verdicts
    Settings: not found.
    Departures: a step in place of a falling curve; the abstract bounds every weight away from 0.
    Failure: none reported.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                outcome=(partial(outcome.magnitude_only, low=width, high=width),),
                surrogate=clipped(low, high),
                weights=(partial(weight.teacher_confidence, nats=nats, least=least),),
            )
        ),
        views=(live_self(context),),
        name="egrsd",
    )


def anti_sd(
    *,
    scale: float | Schedule = 0.5,
    low: float = 0.2,
    high: float = 0.2,
    context: str = SOLUTION,
) -> Method:
    """The verdict, less what a self with the solution would rather have said.

        A_t = A_group - scale * (softplus(a_t) - log 2) / 2

    In expectation the divergence to the privileged self is ascended: deliberation, which it would
    skip, is kept.

    Args:
        scale: of the second part.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the privileged self reads in place of the prompt.

    Source: AntiSD, arXiv:2605.11609, sections 3 and 4 and its Algorithm 1.
    Evidence: E0
    Formula: paper
    Stationary: teacher, without verdicts
    Settings: scale 0.5, off while the median entropy of the self is below 0.93 of its first five
        steps, 32 prompts x 8 samples, 200 steps, learning rate 1e-6.
    Departures: the switch is missing: no run measures the entropy of a self.
    Failure: without the switch it collapses near step 90.
    """
    bonus = Bound.of(outcome.deliberation_bonus).with_knobs(scale=scale)
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                outcome=(bonus,),
                surrogate=clipped(low, high),
            )
        ),
        views=(live_self(context),),
        name="anti_sd",
    )


def skill_sd(
    *,
    coef: float | Schedule = 0.001,
    low: float = 0.2,
    high: float = 0.2,
    context: str = SOLUTION,
) -> Method:
    """The verifier's gradient, and a little of the reverse KL to a self that knows the skill.

        L = GRPO's clipped loss + c * mean over tokens of (student / old) (exp(r) - 1 - r)
        r = log self(y_t) - log student(y_t)

    The ratio carries a gradient too: without it the second part would follow the forward KL.

    Args:
        coef: c.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the self reads in place of the prompt.

    Source: Skill-SD, arXiv:2604.10674.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: c 0.001, a 4 B student.
    Departures: whether the ratio is clipped is not known; the self is that of the moment.
    Failure: a frozen self soon teaches nothing.
    """
    return Method(
        Objective(
            Sampled(reward=reward.group_advantage, surrogate=clipped(low, high), name="verdict"),
            Dense(divergence=divergence.corrected_k3, coef=coef),
        ),
        views=(live_self(context),),
        name="skill_sd",
    )


def trace(
    *,
    forward_coef: float | Schedule = 0.5,
    reverse_coef: float | Schedule = 0.5,
    low: float = 0.2,
    high: float = 0.28,
    context: str = SOLUTION,
) -> Method:
    """A privileged self on the spans that matter, the verifier everywhere.

        L = GRPO's clipped loss + c_f * mean over tokens of [span, right] * KL(self || student)
          + c_r * mean over tokens of [span, wrong] * KL(student || self)

    Needs the column `span`. A data set has one number per response, so there it chooses whole
    responses; spans within one come with batches of your own.

    Args:
        forward_coef, reverse_coef: c_f on spans of right, c_r on spans of wrong responses.
        low, high: how far the ratio to the rollout's weights may leave 1.
        context: what the privileged self reads in place of the prompt.

    Source: TRACE, arXiv:2605.10194.
    Evidence: E0
    Formula: note
    Stationary: teacher, without verdicts
    Settings: 0.5 for 10 steps, then to 0 over 30; one of the two by the strength of the base model.
    Departures: the verifier's part is not damped on spans; each divergence is a mean over all
        tokens; entries are not cut at 0.05.
    Failure: spans that cover more than a quarter.
    """
    return Method(
        Objective(
            Sampled(reward=reward.group_advantage, surrogate=clipped(low, high), name="verdict"),
            Dense(
                divergence=divergence.forward_kl,
                weights=(weight.in_span, weight.correct),
                coef=forward_coef,
                name="key",
            ),
            Dense(
                divergence=divergence.reverse_kl,
                weights=(weight.in_span, weight.incorrect),
                coef=reverse_coef,
                name="error",
            ),
        ),
        views=(live_self(context),),
        name="trace",
    )

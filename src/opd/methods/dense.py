"""Methods that differentiate a divergence to the teacher."""

from __future__ import annotations

import math
from functools import partial

from opd.formula import divergence, reward, selection, support, weight
from opd.methods.parts import REFERENCE, TEACHER, check_option, pull
from opd.objective import Dense, Method, Objective, Sampled
from opd.schedule import Linear, Schedule, rescaled
from opd.types import Bound, StateSource

TO_THE_STUDENT = Linear(0.5, 0.0, 100)


def reverse_kl_opd() -> Method:
    """Reverse KL over the whole vocabulary at every prefix the student wrote.

        L = mean over tokens of KL(student || teacher)(prefix),  prefixes from the student

    The default. Exact gradient of the per-token divergence with the distribution of prefixes held
    fixed; not the gradient of the sequence's reverse KL. With teacher = student, loss and gradient
    are zero.

    Source: the on-policy case of Agarwal et al., arXiv:2306.13649, with reverse KL.
    Evidence: E0
    Formula: paper
    Stationary: teacher
    Settings: learning rates from 5e-7 to 1e-5 for full training.
    Failure: learns no token that the student gives next to no probability, new facts among them.
    """
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl)),
        states=StateSource(student=1.0),
        name="reverse_kl_opd",
    )


def forward_kl_opd() -> Method:
    """Forward KL over the whole vocabulary at every prefix the student wrote.

        L = mean over tokens of KL(teacher || student)(prefix),  prefixes from the student

    Covers what the teacher would say instead of what the student says well. With teacher = student,
    loss and gradient are zero. Works with older text too: nothing in it is an expectation over the
    student's own tokens.

    Source: the on-policy case of Agarwal et al., arXiv:2306.13649, with forward KL; that it carries
        facts which the reverse KL does not, arXiv:2610.09639.
    Evidence: E0
    Formula: paper
    Stationary: teacher
    Failure: a small student spreads over modes it cannot tell apart.
    """
    return Method(
        Objective(Dense(divergence=divergence.forward_kl)),
        states=StateSource(student=1.0),
        name="forward_kl_opd",
    )


def gkd(*, teacher_weight: float | Schedule = 0.5, student_share: float = 1.0) -> Method:
    """Generalized knowledge distillation: a Jensen-Shannon divergence on mixed text.

        L = (1 - lambda) * E_data[D(prefix)] + lambda * E_student[D(prefix)]
        D = w * KL(teacher || m) + (1 - w) * KL(student || m),  m = w * teacher + (1 - w) * student

    lambda is the share of sequences the student writes; the rest come from the data set. For the
    end points of w use `reverse_kl_opd` or `forward_kl_opd`: the interpolation vanishes there. With
    teacher = student, loss and gradient are zero.

    Args:
        teacher_weight: w, the teacher's share of the mixture, strictly between 0 and 1.
        student_share: lambda, the student's share of the sequences, in [0, 1].

    Source: Agarwal et al., On-Policy Distillation of Language Models, arXiv:2306.13649.
    Evidence: E0
    Formula: paper
    Stationary: teacher
    Settings: lambda of 0.5 and 1, and w of 0.1 to 0.9 by task.
    Departures: one mean over the tokens of both sources, where the paper draws a source per batch.
    Failure: which w is best depends on the task.
    """
    return Method(
        Objective(
            Dense(
                divergence=Bound.of(divergence.generalized_jsd).with_knobs(
                    teacher_weight=teacher_weight
                )
            )
        ),
        states=StateSource(student=student_share, data=1.0 - student_share),
        name="gkd",
    )


def distillm(*, skew: float = 0.1, student_share: float = 0.25, replay: float = 0.25) -> Method:
    """A forward KL to the student mixed with a little of the teacher, on text old and new.

        L = mean over tokens of KL(teacher || m)(prefix),  m = skew * teacher + (1 - skew) * student

    The mixture keeps the gradient finite where the student gives a token no mass. With teacher =
    student, loss and gradient are zero.

    Args:
        skew: the teacher's share of the mixture, strictly between 0 and 1.
        student_share, replay: shares of sequences written anew, and taken from the last 100 steps;
            the rest come from the data set.

    Source: DistiLLM, arXiv:2402.03898, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: skew 0.1, a buffer of 1,000 sequences, learning rate 5e-4, 20 epochs, GPT-2 students.
    Departures: fixed shares, where the code raises that of the student's text when the validation
        loss rises.
    Failure: a skew near 1 compares the teacher with itself.
    """
    return Method(
        Objective(Dense(divergence=partial(divergence.skew_forward_kl, skew=skew))),
        states=StateSource(
            student=student_share,
            replay=replay,
            replay_steps=100,
            data=1.0 - student_share - replay,
        ),
        name="distillm",
    )


def distillm_reverse(*, skew: float = 0.1, student_share: float = 0.5) -> Method:
    """The other direction of DistiLLM: a reverse KL to the teacher mixed with some of the student.

        L = mean over tokens of KL(student || m)(prefix),  m = skew * student + (1 - skew) * teacher

    Finite where the teacher gives a token no mass. With teacher = student, loss and gradient are
    zero.

    Args:
        skew: the student's share of the mixture, strictly between 0 and 1.
        student_share: of the sequences; the rest come from the data set.

    Source: DistiLLM, arXiv:2402.03898, and its code; DistiLLM-2 takes it for the first version.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: skew 0.1.
    Departures: fixed shares of text.
    Failure: as of `distillm`.
    """
    return Method(
        Objective(Dense(divergence=partial(divergence.skew_reverse_kl, skew=skew))),
        states=StateSource(student=student_share, data=1.0 - student_share),
        name="distillm_reverse",
    )


def distillm_2(*, skew: float = 0.1, student_coef: float | Schedule = 1.0) -> Method:
    """Raise the teacher's text, lower the student's: another divergence for each source.

        L = (2 - beta) * mean over the teacher's tokens of KL(teacher || skew teacher + ... student)
          + beta * mean over the student's tokens of KL(student || skew student + ... teacher)

    With teacher = student, loss and gradient are zero.

    Args:
        skew: of both mixtures, strictly between 0 and 1.
        student_coef: beta, in [0, 2].

    Source: DistiLLM-2, arXiv:2503.07067, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: skew 0.1, beta 1 (the paper: rising to 1.5), low-rank adapters of rank 16, learning
        rate 5e-5, one epoch, text anew each epoch.
    Departures: the skew is fixed, where the paper adapts it to the batch; the student's part is
        differentiated through the mixture too, which the released code stops.
    Failure: with one divergence for both sources the asymmetry is lost.
    """
    check_option("student_coef", student_coef, 0.0, 2.0)
    return Method(
        Objective(
            Dense(
                divergence=partial(divergence.skew_forward_kl, skew=skew),
                rows="teacher",
                coef=rescaled(student_coef, times=-1.0, plus=2.0),
                reduction="sequence_mean",
            ),
            Dense(
                divergence=partial(divergence.skew_reverse_kl, skew=skew),
                rows="student",
                coef=student_coef,
                reduction="sequence_mean",
            ),
        ),
        states=StateSource(student=0.5, teacher=0.5),
        name="distillm_2",
    )


def speculative_kd(*, k: int = 25) -> Method:
    """Forward KL on the student's text, of which the teacher replaces what it would not say.

        L = mean over tokens of KL(teacher || student)(prefix)

    A token that the student proposes stands if it is among the teacher's k likeliest. With teacher
    = student, loss and gradient are zero.

    Args:
        k: how many of the teacher's likeliest tokens pass.

    Source: Speculative KD, arXiv:2410.11325.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: k about 25 (recalled, not read); the divergence is free, the experiments take this.
    Departures: none known.
    Failure: a large k is on-policy text with its early errors, k = 1 the teacher's text.
    """
    check_option("k", k, 1, math.inf)
    return Method(
        Objective(Dense(divergence=divergence.forward_kl)),
        states=StateSource(student=1.0, interleave=k),
        name="speculative_kd",
    )


def top_k_opd(*, k: int | Schedule = 32) -> Method:
    """Reverse KL on the teacher's k likeliest tokens, both sides renormalised there.

        L = mean over tokens of sum_{v in S} s(v) * (log s(v) - log t(v)),  S = teacher's top k
        s, t: student and teacher conditional on S

    Local support matching. Only the conditional distributions are compared, so mass may drift in
    and out of the support. With teacher = student, loss and gradient are zero.

    Args:
        k: size of the support, in tokens.

    Source: Revisiting On-Policy Distillation, arXiv:2603.25562, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: k 32, top-p 0.9, learning rate 1e-6 to 2e-6, 16 prompts x 8 samples; optionally the
        fifth of each response's tokens with the highest entropy, and a mask of special tokens.
    Departures: special tokens are masked wherever they occur; sampling is as the run file says; no
        entropy filter (`high_entropy_opd`).
    Failure: a reverse KL on the teacher's support cannot see what the student says outside it.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.reverse_kl,
                support=Bound.of(support.teacher_top_k).with_knobs(k=k),
                tail="renormalise",
                weights=(weight.skip_special,),
            )
        ),
        states=StateSource(student=1.0),
        name="top_k_opd",
    )


def forward_top_k_opd(*, k: int | Schedule = 32) -> Method:
    """Forward KL to the teacher's k likeliest tokens, the teacher conditional on them.

        L = mean over tokens of sum_{v in S} t(v) * (log t(v) - log student(v))
        S = teacher's top k,  t: the teacher conditional on S;  the student as it is

    Pulls the tail's mass into the support: stationary at the teacher's conditional, not at teacher
    = student, unless the teacher has no mass outside.

    Args:
        k: size of the support, in tokens.

    Source: KuaiRP, arXiv:2609.11127, for knowledge; NPD, arXiv:2605.05940.
    Evidence: E0
    Formula: note
    Stationary: teacher's conditional
    Settings: not found.
    Departures: whether the published ones renormalise is not known.
    Failure: the tail is driven out, and with it what the teacher rarely says.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.forward_kl,
                support=Bound.of(support.teacher_top_k).with_knobs(k=k),
                tail="teacher_renormalise",
            )
        ),
        name="forward_top_k_opd",
    )


def raw_forward_top_k_opd(*, k: int | Schedule = 128) -> Method:
    """Forward KL summed over the teacher's k likeliest tokens as they are.

        L = mean over tokens of sum_{v in S} teacher(v) * (log teacher(v) - log student(v))

    Of either sign: a student with more mass on the support than the teacher makes it negative. Not
    stationary at teacher = student while the teacher has mass outside.

    Args:
        k: size of the support, in tokens.

    Source: the mode forward_kl_topk of verl's on-policy distillation.
    Evidence: E1
    Formula: code
    Stationary: raw entries
    Settings: k 128.
    Departures: verl holds log-probabilities at -10 or above and losses at 10 or below, silently.
    Failure: mass on the support is rewarded for its own sake; a bucket for the rest mends that.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.forward_kl,
                support=Bound.of(support.teacher_top_k).with_knobs(k=k),
                tail="truncate",
            )
        ),
        name="raw_forward_top_k_opd",
    )


def both_ways_top_k_opd(*, k: int | Schedule = 64) -> Method:
    """Half a forward and half a reverse KL on the teacher's k likeliest tokens, renormalised.

        L = mean over tokens of 1/2 KL(t || s) + 1/2 KL(s || t)
        s, t: student and teacher conditional on the teacher's top k

    With teacher = student, loss and gradient are zero; mass outside the support is free.

    Args:
        k: size of the support, in tokens.

    Source: the default of NeMo-RL's distillation, there called mixed; SD-Zero, arXiv:2604.12002,
        trains with it.
    Evidence: E1
    Formula: code
    Stationary: teacher
    Settings: k 64.
    Departures: none known.
    Failure: blind to what the student says outside the support.
    """
    where = Bound.of(support.teacher_top_k).with_knobs(k=k)
    return Method(
        Objective(
            Dense(divergence=divergence.forward_kl, support=where, tail="renormalise", coef=0.5),
            Dense(divergence=divergence.reverse_kl, support=where, tail="renormalise", coef=0.5),
        ),
        name="both_ways_top_k_opd",
    )


def stop_gradient_top_k(*, k: int | Schedule = 20) -> Method:
    """Reverse KL on the student's k likeliest tokens as they are, its weights held fixed.

        L = mean over tokens of sum_{v in S} stop[student(v) * (log student(v) - log teacher(v))]
            * log student(v),  S = student's top k

    Without the stop the gradient also descends the student's mass on the support, until the student
    leaves it. With teacher = student the gradient is zero.

    Args:
        k: size of the support, in tokens.

    Source: The Many Faces of On-Policy Distillation, arXiv:2605.11182, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: k 20, learning rate 2e-6, one sample per prompt.
    Departures: the code trains only on responses of up to 1,024 or 2,048 tokens.
    Failure: un-normalised and without the stop it collapsed at k = 5 and 20 in the paper; with it a
        small k is blind outside the support.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.truncated_reverse_kl,
                support=Bound.of(support.student_top_k).with_knobs(k=k),
                tail="truncate",
            )
        ),
        name="stop_gradient_top_k",
    )


def candidates_opd(*, k: int | Schedule = 16) -> Method:
    """The student's k likeliest tokens, each scored with its log-ratio and the student's weight.

        L = mean over tokens of -sum_{v in S} stop[s(v) * (log teacher(v) - log student(v))]
            * log student(v),  S = student's top k, s conditional on S

    `stop_gradient_top_k` divided by the student's mass on the support. With teacher = student the
    gradient is zero.

    Args:
        k: size of the support, in tokens.

    Source: Rethinking On-Policy Distillation, arXiv:2604.13016, and its code (student's candidates,
        student's weights).
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: k 16, 64 prompts x 4 samples, learning rate 1e-6, 7,168 tokens; a cold start on the
        teacher's text where the two think differently.
    Departures: the code clips each candidate's ratio to the rollout's weights, which is 1 at the
        first update.
    Failure: little is learnt where the two share few likely tokens, or the teacher has nothing new.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.candidate_advantage_loss,
                support=Bound.of(support.student_top_k).with_knobs(k=k),
                tail="renormalise",
            )
        ),
        name="candidates_opd",
    )


def blended_opd(*, k: int | Schedule = 16, blend: float | Schedule = TO_THE_STUDENT) -> Method:
    """Reverse KL on text that student and teacher write together, less and less the teacher.

        L = mean over tokens of KL(s || t),  s, t conditional on the student's top k
        tokens drawn from a * teacher + (1 - a) * student,  a falling to 0

    Only the text differs from a reverse KL on the student's likeliest tokens. With teacher =
    student, loss and gradient are zero.

    Args:
        k: size of the support, in tokens.
        blend: a, the teacher's share of the distribution that tokens are drawn from.

    Source: TRB, arXiv:2605.31159.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: a 1.7 B student of an 8 B teacher, a 0.6 B of a 4 B.
    Departures: an arithmetic mixture of fixed share, where the paper takes at each prefix the
        geometric one that stays within a KL of the student; the support is ours, the paper's is
        not known.
    Failure: a blend that is never lowered leaves the student untaught on its own prefixes.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.reverse_kl,
                support=Bound.of(support.student_top_k).with_knobs(k=k),
                tail="renormalise",
            )
        ),
        states=StateSource(student=1.0, mixture=blend),
        name="blended_opd",
    )


def acceptance_opd() -> Method:
    """Total variation at every prefix: one minus the rate at which a draft would be accepted.

        L = mean over tokens of 1/2 sum_v |student(v) - teacher(v)|

    For draft models of speculative decoding. With teacher = student, loss and gradient are zero.

    Source: LK losses, arXiv:2602.23881; a part of both published losses, in SpecForge's code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: not found.
    Departures: the published losses are -log of the acceptance rate, and a mixture with a forward
        KL that fades as the rate rises.
    Failure: no pull towards a token the student never says, and none that fades near the teacher.
    """
    return Method(
        Objective(Dense(divergence=divergence.total_variation)),
        name="acceptance_opd",
    )


def sure_opd(*, boost: float = 1.0) -> Method:
    """Half the squared log-ratio of the sampled token, more of it on surprising tokens.

        L = mean over tokens of w * 1/2 (log student(y_t) - log teacher(y_t))^2
        w = 1 + boost * (1 - stop[student(y_t)])

    The k2 estimator: without the weight its expected gradient is the reverse KL's. With teacher =
    student, loss and gradient are zero.

    Args:
        boost: what the most surprising token gets on top of 1, >= 0.

    Source: SuRe, arXiv:2608.25643.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: boost 1 (0.2 to 2 tried), learning rate 1e-6, batch 512, students of 1.7 and 4 B.
    Departures: none known.
    Failure: a square of a heavy-tailed log-ratio; older text changes what it estimates.
    """
    return Method(
        Objective(
            Dense(
                divergence=divergence.reverse_kl_k2,
                weights=(partial(weight.surprise, boost=boost),),
            )
        ),
        name="sure_opd",
    )


def k3_opd() -> Method:
    """The k3 estimator of the sampled token, differentiated: in expectation a forward KL.

        L = mean over tokens of exp(r) - 1 - r,  r = log teacher(y_t) - log student(y_t)

    As a value it estimates the reverse KL; its gradient is that of the forward KL, by importance
    sampling. With teacher = student, loss and gradient are zero.

    Source: the default of verl's on-policy distillation (loss mode k3, no policy gradient); which
        gradients follow, arXiv:2506.09477.
    Evidence: E1
    Formula: code
    Stationary: teacher
    Settings: verl's defaults.
    Departures: verl holds r within 20 and the loss at 10 at most, without gradient there: its run
        file is recipes/frameworks/verl.toml.
    Failure: exp(r) is heavy-tailed; what is called a reverse KL there follows the other direction.
    """
    return Method(
        Objective(Dense(divergence=divergence.forward_kl_k3)),
        name="k3_opd",
    )


def hpd() -> Method:
    """The data's token pulled up as far as teacher and student agree, its rivals pushed down.

        k(v) = stop[student(v) * (log teacher(v) - log student(v))],  y the data's token
        L = mean over tokens of -w * log student(y) - sum_{v != y, k(v) < 0} student(v) k(v)
            log student(v),  w as in `hybrid_policy`

    On-policy in the action, off-policy in the prefix. With teacher = student, loss and gradient are
    zero.

    Source: Hybrid Policy Distillation, arXiv:2604.20244, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: learning rate 5e-6, 10 epochs.
    Departures: the mean over the one token that the code draws at each prefix; its clipping of
        ratios, which are 1 at the first update, is left out.
    Failure: prefixes are the data's, so the student's own mistakes are never met.
    """
    return Method(
        Objective(Dense(divergence=divergence.hybrid_policy, rows="data")),
        states=StateSource(student=0.0, data=1.0),
        name="hpd",
    )


def high_entropy_opd(*, share: float | Schedule = 0.2) -> Method:
    """Reverse KL on the tokens where the student is most undecided.

        L = mean over tokens of [among the share of the step with the largest H(student)]
            * KL(student || teacher)(prefix)

    With teacher = student, loss and gradient are zero.

    Args:
        share: of the step's tokens, in (0, 1].

    Source: the entropy filter of arXiv:2603.25562, there a fifth of each response.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: share 0.2.
    Departures: a share of the step, not of each response; over the whole vocabulary; the
        denominator counts all tokens, where the code counts the kept ones.
    Failure: tokens of which the student is sure and wrong are left out: `confident_wrong_opd`.
    """
    gate = Bound.of(selection.keep_high_entropy).with_knobs(share=share)
    return Method(
        Objective(Dense(divergence=divergence.reverse_kl, weights=(gate,))),
        name="high_entropy_opd",
    )


def gold_and_reference(
    *, gold_coef: float | Schedule = 0.1, reference_coef: float | Schedule = 0.01
) -> Method:
    """Reverse KL with two anchors: the data's responses, and the student at step 0.

        L = mean over the student's tokens of
            KL(student || teacher) + c_r * KL(student || reference)
          + c_g * mean over the data's tokens of -log student(y_t)

    The exact form of `stable_opd`. Stationary where the three pulls balance.

    Args:
        gold_coef, reference_coef: c_g and c_r.

    Source: after StableOPD, arXiv:2604.08527.
    Evidence: E0
    Formula: inferred
    Stationary: teacher, without data
    Settings: coefficients not found.
    Departures: exact divergences in place of the sampled, clipped log-ratio.
    Failure: a strong anchor keeps the student from the teacher.
    """
    return Method(
        Objective(
            Dense(divergence=divergence.reverse_kl, rows="student"),
            Sampled(reward=reward.one, rows="data", coef=gold_coef, name="gold"),
            pull(reference_coef, rows="student"),
        ),
        states=StateSource(student=0.5, data=0.5),
        views=(TEACHER, REFERENCE),
        name="gold_and_reference",
    )

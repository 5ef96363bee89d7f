"""Methods that score the sampled token with the teacher's log-ratio, or a reward made of it."""

from __future__ import annotations

import math
from functools import partial

from opd.formula import credit, divergence, outcome, reward, selection, support, surrogate, weight
from opd.methods.parts import check_option
from opd.objective import Dense, Method, Objective, Sampled
from opd.schedule import Schedule, rescaled
from opd.types import Bound, StateSource

REOPOLD_FLOOR = math.log(0.3 / 0.7)


def sampled_token_opd() -> Method:
    """The log-ratio of the sampled token as its advantage, immediate credit.

        A_t = log teacher(y_t) - log student(y_t),   L = mean over tokens of -A_t * log student(y_t)

    Needs one number per token from the teacher. An unbiased one-sample estimate of the gradient of
    the local reverse KL. With teacher = student every advantage is zero, and so is the gradient.

    Source: Lu and Thinking Machines Lab, On-Policy Distillation, October 2025.
    Evidence: E2
    Formula: code
    Stationary: teacher
    Settings: low-rank adapters of rank 128, 64 prompts x 4 samples (recalled, not re-read).
    Departures: the score in place of an importance ratio, equal while weights are those of the
        rollout.
    Failure: heavy-tailed negative rewards; a length shortcut where the teacher likes repetition.
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

    Source: vOPD, arXiv:2605.07865, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: 1.7 B and 4 B students, 7 B for another family.
    Departures: the baseline is over the whole vocabulary; the reward floor of the paper is left
        out.
    Failure: a baseline lowers the noise of a token's choice, not that of the prefixes.
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


def res_opd(*, k: int | Schedule = 4) -> Method:
    """The exact reverse KL of a few tokens and a bucket, plus one sample of what the bucket hides.

        L = KL of the teacher's top k and a bucket for the rest
          + [y_t outside] * (r(y_t) log student(y_t) - r(tail) log student(tail)),  r stopped
        r = log student - log teacher

    Unbiased for the local reverse KL over the whole vocabulary, at k + 1 numbers per token, and
    less noisy than one sample. With teacher = student, loss and gradient are zero.

    Args:
        k: how many of the teacher's likeliest tokens are exact.

    Source: ResOPD, arXiv:2610.04882, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: k 4, temperature 1, no truncation, one update per batch.
    Departures: the value of the loss; the code logs another with the same gradient.
    Failure: truncated sampling, or a second update on the same text, breaks unbiasedness.
    """
    where = Bound.of(support.teacher_top_k).with_knobs(k=k)
    return Method(
        Objective(
            Dense(divergence=divergence.reverse_kl, support=where, tail="bucket"),
            Sampled(
                reward=reward.teacher_log_ratio,
                surrogate=surrogate.tail_residual,
                support=where,
                tail="bucket",
                name="residual",
            ),
        ),
        name="res_opd",
    )


def power_opd(*, power: float = 5.0) -> Method:
    """The difference of the token's probabilities, each raised to a power, as its advantage.

        A_t = teacher(y_t)^a - student(y_t)^a,  a = power

    Bounded: no token outweighs the others. In expectation `a` times the gradient of a power
    divergence, so a larger `a` also changes the learning rate. With teacher = student every
    advantage is zero.

    Args:
        power: a, > 0; in the limit 0, A / a is the log-ratio.

    Source: PowerOPD, arXiv:2606.17199, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: a 5 in the main script (0.1 and 1 too), learning rate 5e-7, 32 responses per update,
        1,500 steps, top-p 0.95, top-k 20.
    Departures: a terminal stop token stays; the code takes it out of the mask.
    Failure: a large power ignores tokens to which neither side gives a good half.
    """
    return Method(
        Objective(Sampled(reward=partial(reward.power_reward, power=power))),
        name="power_opd",
    )


def opd_plus(*, alpha: float = 0.5) -> Method:
    """The advantage whose policy gradient is that of an f-divergence: Amari's family.

        A_t = -(g(u) - u g'(u)) = (u^a - 1) / a,  u = teacher(y_t) / student(y_t),  a = alpha

    Rewarding -g(u), as one would at first, is right for the reverse KL only. With teacher = student
    every advantage is zero.

    Args:
        alpha: a, neither 0 nor 1: near 0 the log-ratio, near 1 the forward KL's, u - 1.

    Source: OPD+, arXiv:2606.01039.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: forward KL, reverse KL and Jensen-Shannon in the paper.
    Departures: Amari's family is ours; a constant makes the advantage 0 where the two agree, which
        changes no expected gradient.
    Failure: grows as u^a, so near a = 1 a few tokens dominate.
    """
    return Method(
        Objective(Sampled(reward=partial(reward.alpha_divergence_reward, alpha=alpha))),
        name="opd_plus",
    )


def jsd_opd(*, teacher_weight: float = 0.5) -> Method:
    """The advantage whose policy gradient is that of the Jensen-Shannon divergence.

        A_t = (1 - w) * log(w * u + 1 - w),  u = teacher(y_t) / student(y_t),  w = teacher_weight

    Bounded below: what the teacher excludes costs at most (1 - w) log(1 - w). With teacher =
    student every advantage is zero.

    Args:
        teacher_weight: w, strictly between 0 and 1.

    Source: OPD+, arXiv:2606.01039, its Jensen-Shannon row.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: w 0.5.
    Departures: a constant makes the advantage 0 where the two agree.
    Failure: with the floor, tokens the teacher excludes are pushed down slowly.
    """
    return Method(
        Objective(
            Sampled(reward=partial(reward.generalized_jsd_reward, teacher_weight=teacher_weight))
        ),
        name="jsd_opd",
    )


def reopold(
    *,
    floor_nats: float = REOPOLD_FLOOR,
    share: float | Schedule = 0.2,
    low: float = 0.2,
    high: float = 0.28,
) -> Method:
    """The log-ratio with a floor, on the tokens where the student is most undecided.

        A_t = max(log teacher(y_t) - log student(y_t), floor_nats)
        L = mean over tokens of -[in the top share by H(student)] * min(r A, clip(r) A)

    With teacher = student every advantage is zero.

    Args:
        floor_nats: < 0. The paper's floor is read as log(l / (1 - l)), -0.85 nats at l = 0.3, by
            most of those who quote it, and as log(l) / (1 - l), -1.72 nats, by others.
        share: of the step's tokens; a `Step` from 1 to 0.2 makes the paper's two phases of it.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: REOPOLD, arXiv:2603.11137.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: l 0.3, share 0.2, the second phase from about step 500.
    Departures: the first phase of the paper keeps tokens above the floor alone; the mean is over
        all tokens, where the paper divides by those kept; its clip range was not found.
    Failure: tokens that the teacher excludes are pushed down no harder than others.
    """
    gate = Bound.of(selection.keep_high_entropy).with_knobs(share=share)
    return Method(
        Objective(
            Sampled(
                reward=partial(reward.floored_log_ratio, floor_nats=floor_nats),
                weights=(gate,),
                surrogate=partial(surrogate.clipped, low=low, high=high),
            )
        ),
        name="reopold",
    )


def trpd(*, teacher_share: float = 0.5) -> Method:
    """The log-ratio to a teacher mixed with the student of the rollout.

        A_t = log(s * teacher(y_t) + (1 - s) * old(y_t)) - log student(y_t),  s = teacher_share

    A target within reach: bounded below by log(1 - s). With teacher = student every advantage is
    zero.

    Args:
        teacher_share: s, strictly between 0 and 1.

    Source: TRPD, arXiv:2607.04751.
    Evidence: E0
    Formula: inferred
    Stationary: teacher
    Settings: not found.
    Departures: a re-implementation divides by the sampler's probability, adds the mean of the later
        rewards and standardises by the prompt's samples; none of that is here.
    Failure: a small s imitates the student of the rollout.
    """
    return Method(
        Objective(Sampled(reward=partial(reward.proximal_log_ratio, teacher_share=teacher_share))),
        name="trpd",
    )


def tv_opd(*, scale: float | Schedule = 1.0) -> Method:
    """The sign of the log-ratio, and one scale for all tokens of the step.

        A_t = scale * sign(log teacher(y_t) - log student(y_t))

    In expectation 2 * scale times the gradient of the total variation. With teacher = student every
    advantage is zero; close to it, it does not fade.

    Args:
        scale: the size of every advantage.

    Source: TV-regulated OPD, arXiv:2609.08341.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: the scale follows a moving average (0.95) of max(0, 1 - teacher / student), its square
        root relative to the first step's, within 0.1 and 1.
    Departures: the scale is a number or a schedule of the step.
    Failure: without the scale the last steps are as large as the first.
    """
    return Method(  # the reward is half the sign
        Objective(Sampled(reward=reward.total_variation_reward, coef=rescaled(scale, times=2.0))),
        name="tv_opd",
    )


def squared_tv_opd() -> Method:
    """The sign of the log-ratio, sized by the total variation at the prefix.

        A_t = sign(log teacher(y_t) - log student(y_t)) * TV(student, teacher)(prefix)

    In expectation the gradient of the squared total variation. With teacher = student every
    advantage is zero, and near it the advantages fade.

    Source: how a catalogue describes arXiv:2609.08341; `tv_opd` is what notes on it say.
    Evidence: E0
    Formula: inferred
    Stationary: teacher
    Settings: none.
    Departures: the symbols are ours.
    Failure: needs the whole distribution for one scale.
    """
    return Method(
        Objective(Sampled(reward=reward.sign_total_variation)),
        name="squared_tv_opd",
    )


def compressed_opd() -> Method:
    """The log-ratio with both tails compressed.

        A_t = sign(a) * log(1 + |a|),  a = log teacher(y_t) - log student(y_t)

    Keeps the order of the tokens. With teacher = student every advantage is zero.

    Source: Demystifying On-Policy Distillation, arXiv:2607.13399.
    Evidence: E0
    Formula: inferred
    Stationary: teacher
    Settings: not found.
    Departures: the symbols are ours, from one sentence.
    Failure: the policy gradient of no divergence.
    """
    return Method(Objective(Sampled(reward=reward.soft_log_ratio)), name="compressed_opd")


def clipped_opd(*, low: float = -5.0, high: float = 5.0) -> Method:
    """The log-ratio held inside a range.

        A_t = min(max(log teacher(y_t) - log student(y_t), low), high)

    With teacher = student every advantage is zero.

    Args:
        low, high: in nats.

    Source: a baseline in the code of PowerOPD, arXiv:2606.17199; by a description also the hard
        clip of arXiv:2607.13399.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: 5 nats either side.
    Departures: none known.
    Failure: tokens that the teacher excludes are pushed down no harder than unlikely ones.
    """
    return Method(
        Objective(Sampled(reward=partial(reward.clipped_log_ratio, low=low, high=high))),
        name="clipped_opd",
    )


def tanh_opd(*, scale: float = 5.0) -> Method:
    """The log-ratio squeezed smoothly into a range.

        A_t = s * tanh((log teacher(y_t) - log student(y_t)) / s),  s = scale

    With teacher = student every advantage is zero.

    Args:
        scale: s, in nats.

    Source: a baseline in the code of PowerOPD, arXiv:2606.17199, there without the outer s.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: s 5.
    Departures: slope 1 at zero in place of 1 / s.
    Failure: as of `clipped_opd`.
    """
    return Method(
        Objective(Sampled(reward=partial(reward.tanh_log_ratio, scale=scale))), name="tanh_opd"
    )


def gndpo(*, within_nats: float = 5.0) -> Method:
    """The log-ratio, clipped and standardised over the step.

        A_t = (c - mean c) / sqrt(var c + 1e-8)
        c = clip(log teacher(y_t) - log student(y_t), -within_nats, within_nats)

    With teacher = student every advantage is zero. Half the tokens are pushed up however bad the
    text is.

    Args:
        within_nats: where the log-ratio is cut off.

    Source: GNDPO, arXiv:2606.09091, and its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: 5 nats; the authors' script takes the ratio of whole sequences.
    Departures: the score in place of a ratio of sequences.
    Failure: rescales noise where student and teacher nearly agree.
    """
    return Method(
        Objective(
            Sampled(
                reward=partial(reward.clipped_log_ratio, low=-within_nats, high=within_nats),
                credit=credit.standardised,
            )
        ),
        name="gndpo",
    )


def iw_opd(*, boost: float = 0.5) -> Method:
    """The log-ratio, with more weight before the text has drifted from the teacher's.

        A_t = a_t * (1 + boost * (1 - F_{t-1})),  F_{t-1} = sum_{k<t} |a_k| / sum_k |a_k|

    With teacher = student every advantage is zero.

    Args:
        boost: what the first tokens get on top of 1, >= 0.

    Source: IW-OPD, arXiv:2606.22600, and its code in TRL.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: boost 0.5, learning rate 1e-6, a 4 B student of a 30 B teacher.
    Departures: the log-ratio is that of the weights being updated.
    Failure: the weights raise the mean step by about a quarter, as a higher learning rate would.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                weights=(partial(weight.cumulative_drift, boost=boost),),
            )
        ),
        name="iw_opd",
    )


def first_share_opd(*, share: float | Schedule = 0.3) -> Method:
    """The log-ratio on the first part of each response alone.

        L = mean over tokens of -[among the first share of the response] * a_t * log student(y_t)

    With teacher = student every advantage is zero.

    Args:
        share: of a response's tokens, in (0, 1].

    Source: an ablation of IW-OPD, arXiv:2606.22600: nearly as good as all tokens at 0.3.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: share 0.3.
    Departures: none known.
    Failure: the end of a response, the answer and the stop, is not taught.
    """
    gate = Bound.of(weight.prefix_share).with_knobs(share=share)
    return Method(
        Objective(Sampled(reward=reward.teacher_log_ratio, weights=(gate,))),
        name="first_share_opd",
    )


def prune_opd(
    *, k: int = 16, at_least: float = 0.9, drop: float = 0.02, base: float = 0.0
) -> Method:
    """The log-ratio, worth less with every token where the two have parted.

        w_t = base + max(0, 1 - drop * number of tokens so far whose top k overlap less than
            at_least),  A_t = w_t * (log teacher(y_t) - log student(y_t))

    With teacher = student every advantage is zero.

    Args:
        k: how many likeliest tokens are compared.
        at_least: the overlap that counts as agreement, in (0, 1].
        drop, base: what each disagreement takes, and what is left in the end.

    Source: Prune-OPD, arXiv:2605.07804, from a code derived from the authors'.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: 0.9, 0.02 and 0 by default; 0.7, 0.01 and 0.5 in scripts; learning rate 1e-6.
    Departures: on the sampled token, where the scripts score the student's 16 likeliest; the
        response is not cut short.
    Failure: long responses always decay, however well the two agree again.
    """
    decay = partial(weight.overlap_decay, k=k, at_least=at_least, drop=drop, base=base)
    return Method(
        Objective(Sampled(reward=reward.teacher_log_ratio, weights=(decay,))),
        name="prune_opd",
    )


def ta_opd(*, k: int = 16, share: float | Schedule = 0.05) -> Method:
    """The log-ratio on the few tokens where the two differ about what the student considers.

        L = mean over tokens of -[in the top share by N(KL(teacher || student)) * N(teacher's mass
            on the student's top k)] * a_t * log student(y_t)

    Divergence on the union of both top k, renormalised; N scales between the step's 5 % and 95 %
    quantiles. With teacher = student every advantage is zero.

    Args:
        k: likeliest tokens of each side.
        share: of the step's tokens.

    Source: TA-OPD, arXiv:2605.26844, from its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: k 16, share 0.05 to 0.1.
    Departures: exact probabilities on the union, where the code puts 1e-12 for unknown ones.
    Failure: nothing is taught below the 5 % quantile of either factor.
    """
    gate = Bound.of(selection.keep_teachable).with_knobs(k=k, share=share)
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                support=partial(support.union, teacher_k=k, student_k=k),
                tail="renormalise",
                weights=(gate,),
            )
        ),
        name="ta_opd",
    )


def ier_opd(*, k: int = 16, share: float | Schedule = 0.01) -> Method:
    """The log-ratio on the few tokens where one sample says most about the gradient.

        L = mean over tokens of -[in the top share by signal / noise] * a_t * log student(y_t)

    Signal and noise as in `keep_high_signal`, on both sides' top k and the sampled token. With
    teacher = student every advantage is zero.

    Args:
        k: likeliest tokens of each side.
        share: of the step's tokens.

    Source: IER-OPD, arXiv:2609.24432, from its code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: k 16, share 0.001 to 0.1, 4 prompts x 16 samples, learning rate 1e-6, clip 0.2 / 0.28.
    Departures: no least number per response; special tokens other than the sampled one are not in
        the support; the score in place of a ratio.
    Failure: a token of tiny signal and tinier noise wins over one that matters.
    """
    gate = Bound.of(selection.keep_high_signal).with_knobs(share=share)
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                support=partial(support.routing_support, teacher_k=k, student_k=k),
                tail="renormalise",
                weights=(gate,),
            )
        ),
        name="ier_opd",
    )


def slime_opd(*, outcome_scale: float = 1.0, low: float = 0.2, high: float = 0.2) -> Method:
    """The log-ratio added to the group-normalised verdict, in a clipped ratio.

        A_t = scale * A_group + log teacher(y_t) - log student(y_t)

    Args:
        outcome_scale: what one standard deviation of the verdicts is worth, in nats.
        low, high: how far the ratio to the rollout's weights may leave 1.

    Source: slime's on-policy distillation.
    Evidence: E1
    Formula: code
    Stationary: teacher, without verdicts
    Settings: 16 prompts x 4 samples, learning rate 1e-6, clip 0.2 either side; in its example no
        verdicts.
    Departures: the log-ratio is that of the weights being updated, where slime keeps the rollout's.
    Failure: a dense reward of many nats drowns a verdict worth one.
    """
    return Method(
        Objective(
            Sampled(
                reward=reward.teacher_log_ratio,
                outcome=(partial(outcome.add_group_advantage, scale=outcome_scale),),
                surrogate=partial(surrogate.clipped, low=low, high=high),
                reduction="sequence_mean",
            )
        ),
        name="slime_opd",
    )


def nemotron_mopd(*, low: float = 0.5, high: float = 5.0) -> Method:
    """The log-ratio, where the engine that wrote the text and the trainer agree on it.

        L = mean over tokens of -w * a_t * log student(y_t)
        w = old(y_t) / sampler(y_t) where that is within [low, high], else 0

    With teacher = student every advantage is zero.

    Args:
        low, high: smallest and largest ratio of trainer to engine that counts.

    Source: Nemotron's distillation in NeMo-RL, arXiv:2603.19220.
    Evidence: E1
    Formula: code
    Stationary: teacher
    Settings: the code's comment gives 0.5 to 5; the shipped recipe caps the ratio at 5 instead;
        1,024 prompts x 1 sample, learning rate 2e-6, advantages within 20 nats.
    Departures: one teacher, where NeMo-RL routes prompts to several; advantages are not clipped.
    Failure: what falls outside is lost, and says nothing of why.
    """
    gate = partial(weight.engine_ratio_within, low=low, high=high)
    return Method(
        Objective(Sampled(reward=reward.teacher_log_ratio, weights=(gate,))),
        name="nemotron_mopd",
    )


def lightning_opd() -> Method:
    """The log-ratio on responses that were written once, before training.

        A_t = log teacher(y_t) - log student(y_t),  y from the data set: the student's at step 0

    The teacher scores every response once. With teacher = student every advantage is zero.

    Source: Lightning OPD, arXiv:2604.13010; the estimator in EasyOPD's code.
    Evidence: E0
    Formula: code
    Stationary: teacher
    Settings: an 8 B base model, 30 GPU hours; the teacher must be that of the supervised stage.
    Departures: none known; there is no ratio to the policy that wrote the text in the source
        either.
    Failure: biased as soon as the student has moved, more so with another teacher than that of the
        supervised stage.
    """
    return Method(
        Objective(Sampled(reward=reward.teacher_log_ratio)),
        states=StateSource(student=0.0, data=1.0),
        name="lightning_opd",
    )


def relay_opd(*, k: int = 16) -> Method:
    """The log-ratio on text of which the teacher takes over where the student leaves its ground.

        A_t = log teacher(y_t) - log student(y_t),  on every token, whoever chose it

    With teacher = student every advantage is zero.

    Args:
        k: the student's token stands if it is among the teacher's k likeliest.

    Source: Relay-OPD, arXiv:2607.26057, from the description of its code.
    Evidence: E0
    Formula: note
    Stationary: teacher
    Settings: at most 2 take-overs per response, learning rate 1e-6, batch 128.
    Departures: the teacher takes over for a token outside its top k, where the paper hands over
        whole paragraphs at signs of doubt.
    Failure: on the teacher's tokens the score is off-policy and mostly pushes up.
    """
    check_option("k", k, 1, math.inf)
    return Method(
        Objective(Sampled(reward=reward.teacher_log_ratio)),
        states=StateSource(student=1.0, interleave=k),
        name="relay_opd",
    )

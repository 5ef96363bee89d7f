"""Whether agreeing with the teacher is any good: against verdicts, per prompt, without privilege.

A verdict is a score in [0, 1], NaN where the response was not judged; such responses do not count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.diagnose.numbers import judged, leading, mean
from opd.errors import ConfigError, DataError
from opd.types import PASS_MARK

__all__ = [
    "align_auc",
    "calibration_error",
    "hedging_share",
    "outcome_correlation",
    "privilege_gap",
    "recoverability",
    "split_delta",
]

PerSequence = Float[Tensor, " B"]


def align_auc(score: PerSequence, verdict: PerSequence) -> float:
    """How well a score of the response, such as its mean log ratio, tells right from wrong.

    Formula: P(score of a right one > score of a wrong one) + P(equal) / 2; right is verdict >= 0.5
    Unit: a probability; NaN where all are right, or all wrong
    Reading: 1 the teacher ranks every right response above every wrong one, 0.5 it knows nothing of
        the outcome, below: it prefers what is wrong. A high value says that the teacher ranks whole
        responses well, not that what it says of a token can be learnt from.
    Action: gate or weigh by the outcome, another teacher
    Cost: the mean log ratio of each response, and its verdict
    Source: evaluation alignment, section 5 of arXiv:2606.22793, and arXiv:2604.13016; the measure
        is our own derivation
    """
    known, outcome = judged(score, verdict)
    right, wrong = known[outcome >= PASS_MARK], known[outcome < PASS_MARK].sort().values
    pairs = len(right) * len(wrong)
    if not pairs:
        return math.nan
    below, up_to = (torch.searchsorted(wrong, right, right=side) for side in (False, True))
    return float((below + up_to).sum()) / (2 * pairs)


def outcome_correlation(score: PerSequence, verdict: PerSequence) -> float:
    """How closely local agreement and outcome go together.

    Formula: Pearson's correlation of score and verdict
    Unit: none; in [-1, 1]; NaN where one of them does not vary
    Reading: positive: responses that the teacher agrees with do better. Near 0 or negative: the
        loss can fall and the score with it.
    Action: gate or weigh by the outcome
    Cost: the mean log ratio or divergence of each response, and its verdict
    Source: evaluation alignment, section 5 of arXiv:2606.22793; our own derivation
    Id: align_auc
    """
    known, outcome = judged(score, verdict)
    known = leading(known)
    if any(not len(each) or bool((each == each[0]).all()) for each in (known, outcome)):
        return math.nan
    one, other = (each - each.mean() for each in (known, outcome))
    return float((one @ other / (one.norm() * other.norm())).clamp(-1.0, 1.0))


def split_delta(solved_before: Bool[Tensor, " B"], after: PerSequence) -> tuple[float, float]:
    """What training has done to the prompts that were solved before, and to the others.

    Formula: (mean of after - 1 over the solved, mean of after over the unsolved)
    Unit: change of accuracy, each NaN where there is no such prompt
    Reading: (0, positive): learnt without loss. The first clearly below 0: what worked is
        overwritten, a fault of the gate or the route rather than of the teacher. Chance alone
        lowers the first and raises the second, because only lucky ones count as solved: compare
        with a second evaluation of the same weights.
    Action: route right and wrong responses separately, gate by outcome, a reference divergence
    Cost: an evaluation of the same prompts before and after
    Source: the correct-incorrect split in Table 7 of arXiv:2606.22793; the measure is our own
        derivation
    """
    known = ~after.isnan()
    return (
        mean(after[known & solved_before]) - 1.0,
        mean(after[known & ~solved_before]),
    )


def privilege_gap(with_context: PerSequence, without: PerSequence) -> float:
    """What an extra context is worth, on the same prompts.

    Formula: mean of (score with - score without), over prompts that have both
    Unit: a difference of accuracies
    Reading: of a student trained under a privileged teacher: near 0, it has learnt what the context
        told; as large as before training, nothing of it was compressed. Of the teacher: what
        privilege there is to pass on. Of teacher and student on the same prompts: what there is to
        learn at all.
    Action: weaker privilege: hints, rubrics, shared rules in place of answers
    Cost: two evaluations of the same prompts
    Source: privilege compressibility, section 5 and Table 7 of arXiv:2606.22793; our own derivation
    Id: priv_gap
    """
    first, second = judged(with_context, without)
    return mean(first - second)


def recoverability(from_prefix: Float[Tensor, " A"], from_scratch: Float[Tensor, " B"]) -> float:
    """What the student's prefix does to the teacher's chance of getting there.

    Formula: mean score of the teacher continuing the student's prefixes - mean from scratch
    Unit: a difference of accuracies
    Reading: near 0: the teacher can still save the prefix, and what it says there is about the
        task. Far below: it is trapped by the prefix, and its feedback is about fluency. The longer
        the prefix, the lower.
    Action: skip or repair such prefixes, a shorter horizon, mixed rollouts
    Cost: rollouts of the teacher, from prefixes and from prompts, with verdicts
    Source: recoverability among the signs of state compatibility, section 6.1 of arXiv:2606.22793;
        the probe of arXiv:2605.11182 and arXiv:2604.13016
    """
    prefix, scratch = (mean(each[~each.isnan()]) for each in (from_prefix, from_scratch))
    return prefix - scratch


def calibration_error(confidence: PerSequence, verdict: PerSequence, bins: int = 10) -> float:
    """By how much the confidence in answers misses how often they are right.

    Formula: sum over bins of n_b / n * |share right - mean confidence|, ECE, in bins of equal width
        on [0, 1], closed on the right; right is verdict >= 0.5
    Unit: a difference of probabilities
    Reading: 0 where of answers with confidence c a share c is right. Rising while the loss falls:
        certainty is rewarded, calibrated or not. Of few responses it is above 0 by chance.
    Action: gates by uncertainty, less weight on confident rows, a reference divergence
    Cost: a confidence and a verdict of each response
    Source: drift and calibration, Table 7 of arXiv:2606.22793, which has it from arXiv:2604.16830;
        the measure is that of arXiv:1706.04599
    Id: ece
    """
    if bins < 1:
        raise ConfigError(f"bins must be at least 1, got {bins}")
    sure, outcome = judged(confidence, verdict)
    if not len(sure):
        return math.nan
    if bool(((sure < 0) | (sure > 1)).any()):
        worst = float(sure[(sure < 0) | (sure > 1)][0])
        raise DataError(f"a confidence is a probability in [0, 1], got {worst}")
    inner = torch.arange(1, bins, dtype=torch.float64, device=sure.device) / bins
    bin_of = torch.bucketize(sure, inner)
    missed = torch.bincount(bin_of, weights=(outcome >= PASS_MARK).double() - sure, minlength=bins)
    return float(missed.abs().sum()) / len(sure)


def hedging_share(texts: Sequence[str], words: Sequence[str]) -> float:
    """How many responses say that they are unsure.

    Formula: share of texts that hold one of the words; whole words, case ignored
    Unit: a share in [0, 1] of the texts
    Reading: falling while accuracy does not rise: the student unlearns to express doubt. Rising: a
        teacher's hedges are copied, deserved or not.
    Action: compare it on right and wrong responses; gates by uncertainty
    Cost: the decoded responses
    Source: uncertainty expression, Table 7 of arXiv:2606.22793, which has it from arXiv:2604.16830;
        the measure is our own derivation
    Id: hedging
    """
    if not words or not all(words):
        raise ConfigError(f"words must be one or more that are not empty, got {list(words)}")
    some = "|".join(re.escape(word.casefold()) for word in words)
    pattern = re.compile(rf"(?<!\w)(?:{some})(?!\w)")
    found = [pattern.search(text.casefold()) is not None for text in texts]
    return sum(found) / len(found) if found else math.nan

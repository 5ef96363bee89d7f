"""What can be wrong with a loss, and what a check of it says.

A *fault* makes a loss something else than it should be. A *caution* is a limit that a user of the
loss should know, and does not decide whether a claim holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["CAUTIONS", "FAULTS", "Check", "Finding", "fine", "flagged", "inapplicable", "noted"]

Status = Literal["ok", "noted", "found", "not applicable"]

FAULTS = {
    "not-repeatable": "two calls on the same rows differ, so that nothing else can be told",
    "not-a-number": "its gradient is NaN or infinite on ordinary rows",
    "no-teacher-gradient": "its expected gradient is zero although teacher and student differ",
    "ascent": "it descends the opposite of a divergence: away from the teacher",
    "another-divergence": "it does not descend what it claims",
    "not-stationary": "it moves a student that equals its teacher",
    "dead-rows": "rows on which teacher and student differ have no gradient at all",
    "hard-labels": "a cross-entropy of the tokens written is part of it",
    "undetached": "an advantage carries a gradient of its own",
    "off-by-one": "a row reads its neighbour's teacher or token instead of its own",
    "place-in-call": "what a row teaches depends on its place in the call",
    "discount": "a reward's weight depends on its place in the response, not on its distance",
    "temperature": "the temperature does not divide the logits of both models",
    "masked-rows": "rows that do not count teach or weigh, or rows that count are dropped",
    "mean-of-means": "told the count of all micro-batches, it divides by another",
    "missing-scores": "a missing score of the teacher becomes a number, and is not reported",
    "padding-has-mass": "entries that pad the smaller vocabulary get probability",
    "padding-copied": "entries that pad the smaller vocabulary are copied from the other model",
}
CAUTIONS = {
    "padding": "models of different width are neither refused nor cut to what they share",
    "low-precision": "rounding to bfloat16 is larger than a small gradient",
    "not-finite": "zero mass, or no row that counts, gives NaN",
    "skipped-scores": "rows without a score of the teacher are left out, and nothing says so",
    "stale-text": "tokens of an older student are not weighed by their ratio",
    "teacher-gradient": "a gradient flows into the teacher",
    "bounded-reward": "the log-ratio counts up to a bound, and no more beyond it",
    "unbounded-ratio": "the weight of a token that the writer found unlikely has no bound",
    "reads-other-rows": "a row's gradient depends on other rows",
    "own-count": "a mean over the rows of one call: micro-batches of different size weigh alike",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: of `FAULTS` or `CAUTIONS`.
        message: what was seen, with its figures.
    """

    name: str
    message: str

    @property
    def is_fault(self) -> bool:
        return self.name in FAULTS


@dataclass(frozen=True)
class Check:
    """One look at a loss.

    Attributes:
        name: what was looked at.
        status: `not applicable` where the signature cannot express it; `noted` where nothing is
            wrong and a reader should know.
        message: what was seen.
        figures: the numbers behind it.
        findings: none where all is well.
    """

    name: str
    status: Status
    message: str
    figures: dict[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def fine(name: str, message: str, **figures: float) -> Check:
    return Check(name, "ok", message, figures)


def noted(name: str, message: str, **figures: float) -> Check:
    return Check(name, "noted", message, figures)


def inapplicable(name: str, message: str) -> Check:
    return Check(name, "not applicable", message)


def flagged(name: str, finding: str, message: str, **figures: float) -> Check:
    return Check(name, "found", message, figures, (Finding(finding, message),))

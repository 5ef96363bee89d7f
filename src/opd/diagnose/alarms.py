"""Alarms: rules over the metrics of the last steps, named after the failure that they point at.

A rule is a function of the history of a phase. It returns one number, or NaN where too little is
known yet; the alarm is given where that number is beyond the threshold. Whatever a rule reads is a
metric of `events.jsonl`, so it can be held to a run that is over. `opd list alarms` and
`docs/alarms.md` are made of the docstrings and of `THRESHOLDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from opd.types import Stat

__all__ = [
    "calibration_drift",
    "conflicting_teachers",
    "end_token_mismatch",
    "entropy_collapse",
    "foreign_template",
    "golden_regression",
    "gradient_concentration",
    "late_fade",
    "length_collapse",
    "length_inflation",
    "misaligned_events",
    "misranked_outcome",
    "noise_teacher",
    "privilege_leak",
    "repetition",
    "stale_sampler",
    "teacher_out_of_domain",
    "unroutable_suppression",
]

STEPS = 5
"""Steps whose metrics are taken together, so that one odd batch is no alarm."""
LOOKS = 2
"""Looks that are taken together."""

ERRORS = 3
"""Standard errors by which a change has to exceed chance, where the counts tell."""

READS = (
    "golden/*/accuracy",
    "monitor/align_auc",
    "monitor/align_within",
    "monitor/calibration_error",
    "monitor/end_tokens",
    "monitor/first_token",
    "monitor/kl_from_samples",
    "monitor/later_tokens",
    "monitor/other_tokens",
    "monitor/repeated",
    "monitor/top_share",
    "monitor/look/candidate_mass",
    "monitor/look/excess_surprise",
    "monitor/look/student_entropy",
    "monitor/look/teacher_confidence/first",
    "monitor/look/teacher_confidence/last",
    "monitor/look/teacher_entropy",
    "monitor/look/teacher_spread",
    "monitor/look/top_k_overlap",
    "rollout/accuracy",
    "rollout/length",
    "rollout/truncated",
    "teacher/*/copied",
    "teacher/*/cosine",
)
"""The metrics that rules read; `*` stands for a name."""


# --------------------------------------------------------------------------------------------
# What has been measured


@dataclass
class History:
    """The first and the last metrics of a phase, of those that rules read.

    Attributes:
        first: by metric, sum and count of the first `STEPS` steps that measured it.
        last: of the last ones.
        seen: by metric, how many steps measured it.
    """

    first: dict[str, list[list[float]]] = field(default_factory=dict)
    last: dict[str, list[list[float]]] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Stat]) -> None:
        """Take in the metrics of a step."""
        for name, stat in metrics.items():
            if stat.count and math.isfinite(stat.total) and _is_read(name):
                pair = [stat.total, stat.count]
                self.seen[name] = self.seen.get(name, 0) + 1
                if self.seen[name] <= STEPS:
                    self.first.setdefault(name, []).append(pair)
                self.last[name] = [*self.last.get(name, []), pair][-STEPS:]

    def now(self, name: str, entries: int = STEPS) -> float:
        """The average of the last entries; NaN where there are not so many yet."""
        return _average(self.last.get(name, [])[-entries:], entries)

    def sums(self, name: str, entries: int = STEPS) -> tuple[float, float]:
        """Sum and count over the last entries."""
        kept = self.last.get(name, [])[-entries:]
        return sum(total for total, _ in kept), sum(count for _, count in kept)

    def sums_at_first(self, name: str, entries: int = STEPS) -> tuple[float, float]:
        """Sum and count over the first entries."""
        kept = self.first.get(name, [])[:entries]
        return sum(total for total, _ in kept), sum(count for _, count in kept)

    def at_first(self, name: str, entries: int = STEPS) -> float:
        """The average of the first entries; NaN until so many others have come after them."""
        if self.seen.get(name, 0) < 2 * entries:
            return math.nan
        return _average(self.first[name][:entries], entries)

    def named(self, pattern: str) -> Iterator[str]:
        """The metrics there are of a family, such as `teacher/*/cosine`."""
        return (name for name in self.last if fnmatchcase(name, pattern))


def _is_read(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in READS)


def _average(entries: list[list[float]], wanted: int) -> float:
    if len(entries) < wanted:
        return math.nan
    return sum(total for total, _ in entries) / sum(count for _, count in entries)


# --------------------------------------------------------------------------------------------
# Rules


def misaligned_events(history: History) -> float:
    """A teacher that is sure, and finds the student's text far less likely than its own would be.

    Mechanism: events misaligned: positions shifted, or the ids of another vocabulary
    Rule: -log teacher(y) less the teacher's entropy, in nats per token, over two looks, while the
        teacher's entropy is below half of that of a uniform distribution
    Action: score one text with the teacher alone and compare token by token; compare vocabularies
        and the shift of one position (`opd check`, `opd probe`). If both are right the student's
        text is not the teacher's: warm up first, `warmup.steps`
    Source: tokenizer artifact in Table 6 of arXiv:2606.22793; our own derivation
    """
    spread = history.now("monitor/look/teacher_spread", LOOKS)
    return history.now("monitor/look/excess_surprise", LOOKS) if spread < 0.5 else math.nan


def foreign_template(history: History) -> float:
    """The first token of the response surprises far more than those after it.

    Mechanism: another template, or another thinking mode: the teacher reads another beginning
    Rule: mean absolute log ratio at the first token less that at all others, in nats, over five
        steps
    Action: compare the two rendered prompts token by token (`opd probe`); give the teacher its own
        template, or leave special tokens out with the gate `skip_special`
    Source: special-token and template mismatch, Tables 6 and 7 of arXiv:2606.22793
    """
    return history.now("monitor/first_token") - history.now("monitor/later_tokens")


def end_token_mismatch(history: History) -> float:
    """Teacher and student do not mean the same thing by the end of a response.

    Mechanism: special-token mismatch: the teacher ends with another token, or never ends
    Rule: mean absolute log ratio at end tokens less that at all others, in nats, over five steps
    Action: compare the end tokens of both models (`opd probe`); `method.merge_stop_ids = true`
        compares all of them as one
    Source: special-token mismatch, Tables 6 and 7 of arXiv:2606.22793; arXiv:2603.25562
    """
    return history.now("monitor/end_tokens") - history.now("monitor/other_tokens")


def teacher_out_of_domain(history: History) -> float:
    """Teacher and student hardly have a likely token in common.

    Mechanism: unreliable teacher on this text: what it says is not about the task
    Rule: share of the likeliest tokens that both have in common, over two looks
    Action: another teacher, or a warm-up on the teacher's own text
        (`warmup.source = "teacher"`)
    Source: state and support compatibility, Table 7 of arXiv:2606.22793; arXiv:2604.13016
    """
    return history.now("monitor/look/top_k_overlap", LOOKS)


def noise_teacher(history: History) -> float:
    """The teacher hardly prefers any token to any other.

    Mechanism: uninformative teacher: wrong weights, or text that it cannot read
    Rule: the teacher's entropy over that of a uniform distribution, over two looks
    Action: sample from the teacher (`opd sample`), check `teacher.model` and its revision
    Source: state compatibility, section 5 of arXiv:2606.22793; our own derivation
    """
    return history.now("monitor/look/teacher_spread", LOOKS)


def privilege_leak(history: History) -> float:
    """The student has come to write what only the teacher was told.

    Mechanism: privilege mismatch: the teacher's context is copied and not understood
    Rule: the longest copied run as a share of the response, over five steps, less that of the first
        five; of the view where it is largest
    Action: hints, rubrics or rules in place of answers; `evaluate.privileged = true` measures what
        is left without the context
    Source: privilege mismatch, Table 6 of arXiv:2606.22793; arXiv:2605.11182
    """
    copied = "teacher/*/copied"
    rises = [history.now(name) - history.at_first(name) for name in history.named(copied)]
    return max((rise for rise in rises if rise == rise), default=math.nan)


def stale_sampler(history: History) -> float:
    """The text was written by a policy that the student has left.

    Mechanism: staleness: states and rewards of an old policy, or another engine or temperature
    Rule: mean of log sampler(y) - log student(y), in nats, over five steps
    Action: sample with the weights of now, fewer `train.updates_per_rollout`, a shorter replay;
        importance weights with the surrogates of `opd list formulas`
    Source: staleness, section 6 of arXiv:2606.22793; arXiv:2606.24143
    """
    return history.now("monitor/kl_from_samples")


def length_collapse(history: History) -> float:
    """Responses have become far shorter than they were.

    Mechanism: log-ratio hacking: the student has found states in which the teacher is sure, such as
        the end
    Rule: mean length of the last five steps over that of the first five
    Action: credit without the length in it (`length_normalised`, `immediate`), an outcome gate, a
        lower learning rate
    Source: length drift, Table 6 of arXiv:2606.22793; truncation collapse of arXiv:2604.08527
    """
    return history.now("rollout/length") / history.at_first("rollout/length")


def length_inflation(history: History) -> float:
    """More and more responses are cut off at the limit.

    Mechanism: length inflation and truncation collapse: text that is easy to agree on grows
    Rule: share of responses cut off in the last five steps less that in the first five, less three
        standard errors of the difference of two such shares
    Action: a term against the reference, a share of the data's text (`method.states`), a cost of
        length; audit the end tokens
    Source: length drift, Table 6 of arXiv:2606.22793; truncation collapse of arXiv:2604.08527
    """
    cut = "rollout/truncated"
    rise = history.now(cut) - history.at_first(cut)
    return rise - ERRORS * _error(history.sums(cut), history.sums_at_first(cut))


def repetition(history: History) -> float:
    """Responses say again what they have said.

    Mechanism: repetition loop: in a loop teacher and student agree, so it is cheap
    Rule: share of 4-grams that a response has said before, over five steps, less that of the first
        five
    Action: a sequence sum in place of a token mean (`reduction`), a share of the data's text, a
        horizon
    Source: repetition drift, Table 6 of arXiv:2606.22793; arXiv:2605.11182
    """
    return history.now("monitor/repeated") - history.at_first("monitor/repeated")


def unroutable_suppression(history: History) -> float:
    """The teacher takes mass away and names nobody who should have it.

    Mechanism: negative feedback without a target
    Rule: the teacher's mass on tokens within either list that it prefers to the student, where it
        finds the sampled token too likely, each such token by how much, over two looks
    Action: a comparison over the whole vocabulary in place of single tokens, a wider support, no
        update on such rows
    Source: negative feedback without a target, Table 6 of arXiv:2606.22793
    """
    return history.now("monitor/look/candidate_mass", LOOKS)


def conflicting_teachers(history: History) -> float:
    """What one teacher teaches another takes back.

    Mechanism: multi-teacher conflict: opposite gradients
    Rule: cosine of the gradients of two teachers, over two measurements; of the pair where it is
        lowest. Not of a run with a route, where no row has both
    Action: send every prompt to one teacher (`teacher.route`) in place of an average
    Source: multi-teacher conflict, Table 6 of arXiv:2606.22793; the measure is our own derivation
    """
    found = [history.now(name, LOOKS) for name in history.named("teacher/*/cosine")]
    return min((cosine for cosine in found if cosine == cosine), default=math.nan)


def misranked_outcome(history: History) -> float:
    """The teacher prefers wrong responses to right ones.

    Mechanism: signal-outcome mismatch: agreement rises and the outcome does not
    Rule: share of pairs of a right and a wrong response in which the right one has the higher mean
        log ratio, over five steps, with three standard errors of a ranking by chance added. Where
        prompts have several responses, pairs of one prompt, and the prompts are what is counted
    Action: weigh or gate the signal by the outcome (`outcome` of a sampled term), check the
        verifier, another teacher
    Source: evaluation alignment, section 5 and Table 7 of arXiv:2606.22793; the measure is our own
        derivation
    """
    within = "monitor/align_within"
    if within in history.last:
        _, prompts = history.sums(within)
        # no share of pairs varies more around 1 / 2 than one that is 0 or 1
        return history.now(within) + ERRORS * 0.5 / math.sqrt(prompts)
    _, pairs = history.sums("monitor/align_auc")
    judged, steps = history.sums("rollout/accuracy")[1], len(history.last["rollout/accuracy"])
    # of a rank sum: (n + 1) / (12 right wrong) in each step, weighed by its pairs
    chance = math.sqrt((judged / steps + 1) / (12 * pairs))
    return history.now("monitor/align_auc") + ERRORS * chance


def entropy_collapse(history: History) -> float:
    """The student is far surer than its teacher on its own text.

    Mechanism: entropy collapse: a mode is sought and nothing calls the rest back
    Rule: the student's entropy over the teacher's, over two looks
    Action: a forward or mixed divergence where the teacher is unsure, an entropy bonus, a lower
        learning rate
    Source: calibration and certainty drift, Table 6 of arXiv:2606.22793; arXiv:2603.07079
    """
    student = history.now("monitor/look/student_entropy", LOOKS)
    return student / history.now("monitor/look/teacher_entropy", LOOKS)


def calibration_drift(history: History) -> float:
    """Sure answers are less often right than they were.

    Mechanism: calibration and certainty drift: certainty is rewarded, deserved or not
    Rule: calibration error of exp(mean log-probability) of the last five steps less that of the
        first five
    Action: gates by uncertainty, less weight on sure rows, a term against the reference
    Source: calibration and certainty drift, Table 6 of arXiv:2606.22793; arXiv:2604.16830
    """
    error = "monitor/calibration_error"
    return history.now(error) - history.at_first(error)


def gradient_concentration(history: History) -> float:
    """A few tokens make nearly the whole update.

    Mechanism: gradient concentration: outlier log ratios drown what all other tokens say
    Rule: share of the push that the largest 1 % of the tokens hold, over five steps
    Action: a bounded reward (`clipped_log_ratio`, `soft_log_ratio`, `tanh_log_ratio`), a mixed
        divergence, no update on the tokens in question; `opd query RUN worst-tokens` shows them
    Source: gradient concentration and routability, Table 7 of arXiv:2606.22793; arXiv:2603.11137
    """
    return history.now("monitor/top_share")


def late_fade(history: History) -> float:
    """The teacher is sure at the beginning of a response and no longer at its end.

    Mechanism: suffix fade: far along text that it would not have written, the teacher has lost
        the thread
    Rule: the teacher's mean largest probability in the first third of the responses less that in
        the last, over two looks
    Action: a horizon or the teacher's beginnings (`method.states`), a gate by the teacher's
        certainty (`teacher_confidence`)
    Source: prefix and suffix, section 7 and Table 7 of arXiv:2606.22793; arXiv:2605.13643
    """
    end = history.now("monitor/look/teacher_confidence/last", LOOKS)
    return history.now("monitor/look/teacher_confidence/first", LOOKS) - end


def golden_regression(history: History) -> float:
    """The student no longer solves what it solved before the first step.

    Mechanism: capability regression: what is taught overwrites what was there
    Rule: accuracy on a set of `monitor.golden` less that before the first step, with three standard
        errors of the difference of two independent measurements added; of the set where it is
        lowest
    Action: a term against the reference, a share of the data's text (`method.states`), a teacher
        for each domain (`teacher.route`), a lower learning rate
    Source: drift and calibration, Table 7 of arXiv:2606.22793; arXiv:2604.13016
    """
    found = []
    for name in history.named("golden/*/accuracy"):
        if history.seen[name] > 1:
            now, before = history.sums(name, 1), history.sums_at_first(name, 1)
            change = now[0] / now[1] - before[0] / before[1]
            found.append(change + ERRORS * _error(now, before))
    return min(found, default=math.nan)


def _error(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The standard error of the difference of two shares, were they draws of the same one."""
    (hits, n), (further, m) = one, other
    pooled = (hits + further) / (n + m)
    return math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))


# --------------------------------------------------------------------------------------------
# Whether they are given

THRESHOLDS: Mapping[str, tuple[str, float, str]] = {
    "misaligned_events": (
        "above",
        4.9,
        "halfway of healthy 3.9, faults 5.9; M, benchmarks/results/alarms.json",
    ),
    "foreign_template": (
        "above",
        4.9,
        "halfway of healthy 3.5, faults 6.2; M, benchmarks/results/alarms.json",
    ),
    "end_token_mismatch": (
        "above",
        5.7,
        "halfway of healthy 2.2, faults 9.3; M, benchmarks/results/alarms.json",
    ),
    "teacher_out_of_domain": (
        "below",
        0.43,
        "halfway of healthy 0.51, faults 0.35; M, benchmarks/results/alarms.json",
    ),
    "noise_teacher": (
        "above",
        0.51,
        "halfway of healthy 0.053, faults 0.97; M, benchmarks/results/alarms.json",
    ),
    "privilege_leak": (
        "above",
        0.17,
        "halfway of a hint that helps 0.076, faults 0.25; M, benchmarks/results/failures.json and "
        "benchmarks/results/alarms.json",
    ),
    "stale_sampler": (
        "above",
        0.31,
        "halfway of healthy 0.26, faults 0.36; M, benchmarks/results/alarms.json",
    ),
    "length_collapse": (
        "below",
        0.26,
        "halfway of healthy 0.71, faults 0.094; M, benchmarks/results/alarms.json",
    ),
    "length_inflation": (
        "above",
        0.14,
        "halfway of healthy 0.032, faults 0.25; M, benchmarks/results/alarms.json",
    ),
    "repetition": (
        "above",
        0.21,
        "halfway of healthy 0.05, faults 0.37; M, benchmarks/results/alarms.json",
    ),
    "unroutable_suppression": (
        "below",
        0.53,
        "halfway of healthy 0.95, faults 0.1; M, benchmarks/results/alarms.json",
    ),
    "conflicting_teachers": (
        "below",
        0.0,
        "by its meaning: below 0 the gradients oppose each other",
    ),
    "misranked_outcome": ("below", 0.5, "by its meaning: 0.5 is a ranking by chance"),
    "entropy_collapse": (
        "below",
        0.67,
        "halfway of healthy 2.1, faults 0.21; M, benchmarks/results/alarms.json",
    ),
    "gradient_concentration": (
        "above",
        0.54,
        "halfway of healthy 0.31, faults 0.77; M, benchmarks/results/alarms.json",
    ),
    "late_fade": (
        "above",
        0.26,
        "halfway of healthy 0.053, faults 0.46; M, benchmarks/results/alarms.json",
    ),
    "golden_regression": ("below", 0.0, "by its meaning: at 0 chance could explain the fall"),
    "calibration_drift": (
        "above",
        0.27,
        "halfway of healthy 0.16, faults 0.39; M, benchmarks/results/alarms.json",
    ),
}
"""By alarm on which side of the threshold it is given, the threshold, and where that is from."""


@dataclass(frozen=True)
class Raised:
    """An alarm at one step.

    Attributes:
        value: what its rule found.
        threshold: that the value is beyond.
    """

    name: str
    value: float
    threshold: float


def raised(history: History, off: Collection[str] = ()) -> list[Raised]:
    """The alarms of now, in the order of their names; those in `off` are not given."""
    found = []
    for name, (side, threshold, _) in THRESHOLDS.items():
        if name in off:
            continue
        rule: Callable[[History], float] = globals()[name]
        value = _number(rule, history)
        if value > threshold if side == "above" else value < threshold:
            found.append(Raised(name, value, threshold))
    return found


def _number(rule: Callable[[History], float], history: History) -> float:
    """What a rule says; nothing is known where a metric is missing or it would divide by 0."""
    try:
        return rule(history)
    except (KeyError, ZeroDivisionError):
        return math.nan

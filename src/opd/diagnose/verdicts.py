"""From a probe's evidence to a verdict on each of the survey's six criteria of actionability.

Every number stands with its interval against two bounds. It is `unfit` where the whole interval is
past the worse one, `fit` where the whole interval is on the good side of the better one, and
`doubtful` in between. A criterion is as good as its worst number.

Source: sections 5 and 8 of arXiv:2606.22793; where a bound is from stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from opd.diagnose.drift import repeated_ngrams
from opd.diagnose.evidence import Estimate, Evidence, mean_over_groups
from opd.diagnose.outcome import align_auc, outcome_correlation, privilege_gap, recoverability
from opd.diagnose.signal import negative_mass, negative_share, quantiles
from opd.diagnose.staleness import log_mismatch
from opd.diagnose.update import effective_share, top_share
from opd.types import PASS_MARK

FIT, DOUBTFUL, UNFIT, UNKNOWN = "fit", "doubtful", "unfit", "unknown"
NOT_APPLICABLE = "not applicable"

STATE = "state compatibility"
INFORMATION = "marginal information and reachability"
PRIVILEGE = "privilege compressibility"
ALIGNMENT = "evaluation alignment"
ROUTABILITY = "update routability"
STABILITY = "stability"
CRITERIA = (STATE, INFORMATION, PRIVILEGE, ALIGNMENT, ROUTABILITY, STABILITY)

MEASURED = "M, benchmarks/results/probe.json"
"""Between the worst healthy seed and the best seed of the planted faults on the embedded default:
`unfit` half of the way, `doubtful` a quarter of it; of `something_to_learn` between what is left at
the end of a run and a teacher that is the student."""


@dataclass(frozen=True)
class Threshold:
    """Two bounds of a number.

    Attributes:
        doubtful: fit is better than this.
        unfit: unfit is worse than this.
        higher: whether a higher number is better.
        origin: where the bounds are from.
    """

    doubtful: float
    unfit: float
    higher: bool
    origin: str

    def status(self, found: Estimate) -> str:
        """What an estimate comes to."""
        if not found.known:
            return UNKNOWN
        good, bad = (found.low, found.high) if self.higher else (-found.high, -found.low)
        sign = 1.0 if self.higher else -1.0
        if bad < sign * self.unfit:
            return UNFIT
        return FIT if good > sign * self.doubtful else DOUBTFUL


THRESHOLDS: Mapping[str, Threshold] = MappingProxyType(
    {
        "student_overlap_mass": Threshold(0.83, 0.75, True, MEASURED),
        "excess_surprise": Threshold(3.5, 4.8, False, MEASURED),
        "continuation_gain": Threshold(0.0, 0.0, True, "survey 7, arXiv:2604.13016"),
        "marginal_info": Threshold(2.1, 2.5, False, MEASURED),
        "something_to_learn": Threshold(0.13, 0.08, True, MEASURED),
        "teacher_gain": Threshold(0.0, 0.0, True, "survey 8.2, marginal_info"),
        "teacher_overlap_mass": Threshold(0.92, 0.87, True, MEASURED),
        "privilege_gap": Threshold(0.0, 0.0, True, "survey 8.2, priv_gap"),
        "align_auc": Threshold(0.5, 0.5, True, "survey 8.2, align_auc"),
        "gradient_cosine": Threshold(0.0, 0.0, True, "survey 8.2, grad_cos"),
        "routable_share": Threshold(0.66, 0.44, True, MEASURED),
        "truncated_tokens": Threshold(
            0.4, 0.5, False, f"survey 9.2, cut-off answers dominate: one half; 0.4: {MEASURED}"
        ),
    }
)

ROUTABLE_MASS = 0.5
"""The teacher's mass that candidates must hold: it would rather say one of them than anything
else. At a tenth of that a teacher that is noise passes; M, benchmarks/results/probe.json."""
KNOWN_TEXT = 2.0
"""Nats per token of the data's own text up to which the teacher knows what the data is about: the
embedded default's teacher has 0.01, a student 0.33, wrong teachers 4.1 and more; M,
benchmarks/results/probe.json."""
WARMUP_STEPS = 120
"""That bring the embedded default's student to where its teacher is fit; M, as above."""
FEW_PROMPTS = 32
"""Below so many, an interval that straddles a bound says more of the probe than of the run, and a
doubtful verdict says so."""


@dataclass(frozen=True)
class Reading:
    """One number of a criterion, judged.

    Attributes:
        name: in `THRESHOLDS`.
        number: with its interval.
        unit: of the number.
        meaning: what it says, in a sentence.
        setting: key of the run file to change where it is not fit.
        why: what is wrong, after which the setting stands.
    """

    name: str
    number: Estimate
    unit: str
    meaning: str
    setting: str
    why: str

    @property
    def status(self) -> str:
        """Against its bounds."""
        return THRESHOLDS[self.name].status(self.number)


@dataclass(frozen=True)
class Verdict:
    """What a probe says of one criterion.

    Attributes:
        criterion: one of `CRITERIA`.
        status: `fit`, `doubtful`, `unfit`, `unknown` or `not applicable`.
        name: of the number that decides.
        number, low, high: with its 95 % interval over prompts; NaN where nothing is known.
        unit: of the number.
        meaning: what it says.
        evidence: further numbers, and what could not be had.
        setting: key of the run file to change; empty where it is fit.
        why: what is wrong.
        origin: of the bounds.
    """

    criterion: str
    status: str
    name: str = ""
    number: float = math.nan
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    meaning: str = ""
    evidence: tuple[str, ...] = ()
    setting: str = ""
    why: str = ""
    origin: str = ""


def verdicts(evidence: Evidence) -> tuple[Verdict, ...]:
    """One verdict for each criterion, in the survey's order."""
    return (
        _verdict(STATE, _state(evidence), _state_lines(evidence)),
        _verdict(INFORMATION, _information(evidence), _information_lines(evidence)),
        _privilege(evidence),
        _verdict(ALIGNMENT, _alignment(evidence), _alignment_lines(evidence)),
        _verdict(ROUTABILITY, _routability(evidence), _routability_lines(evidence)),
        _verdict(STABILITY, _stability(evidence), _stability_lines(evidence)),
    )


_ORDER = (UNFIT, DOUBTFUL, UNKNOWN, FIT)
"""Which status decides: what is known to be bad, then what is known to be good."""


def _verdict(criterion: str, readings: list[Reading], lines: list[str]) -> Verdict:
    """The worst reading decides; one that is unknown only where nothing else is known."""
    known = [reading for reading in readings if reading.number.known]
    if not known:
        why = "; ".join(dict.fromkeys(lines)) or "nothing that tells could be measured"
        return Verdict(criterion, UNKNOWN, meaning=why, evidence=tuple(lines))
    worst = min(known, key=lambda reading: _ORDER.index(reading.status))
    others = [_line(reading) for reading in readings if reading is not worst]
    number, bad = worst.number, worst.status != FIT
    why = worst.why
    if worst.status == DOUBTFUL and number.n < FEW_PROMPTS:
        why += f" (or {number.n} prompts are too few to tell: raise --responses)"
    return Verdict(
        criterion,
        worst.status,
        worst.name,
        number.value,
        number.low,
        number.high,
        worst.unit,
        worst.meaning,
        (*others, *lines),
        worst.setting if bad else "",
        why if bad else "",
        THRESHOLDS[worst.name].origin,
    )


def _line(reading: Reading) -> str:
    found = reading.number
    if not found.known:
        return f"{reading.name}: not known"
    return (
        f"{reading.name} {found.value:.3g} {reading.unit} [{found.low:.3g}, {found.high:.3g}]: "
        f"{reading.status}"
    )


# --------------------------------------------------------------------------------------------
# The six criteria


def _state(evidence: Evidence) -> list[Reading]:
    setting, why = state_setting(evidence)
    readings = []
    if "student_overlap_mass" in evidence.rows:
        overlap = evidence.mean_of_rows(evidence.row("student_overlap_mass"))
        surprise = evidence.mean_of_rows(evidence.row("excess_surprise"))
        readings = [
            Reading(
                "student_overlap_mass",
                overlap,
                f"of the student on the teacher's {evidence.k} likeliest",
                f"{overlap.value:.0%} of what the student would say is among the teacher's "
                f"{evidence.k} likeliest tokens",
                setting,
                why,
            ),
            Reading(
                "excess_surprise",
                surprise,
                "nats per token",
                f"a token of the student surprises the teacher by {surprise.value:.2f} nats more "
                "than one of its own would",
                setting,
                why,
            ),
        ]
    found, depth = _continuation_gain(evidence)
    if found.known:
        readings.append(
            Reading(
                "continuation_gain",
                found,
                "of accuracy",
                f"after {depth:.0%} of an answer the teacher ends it right {found.value:+.0%} more "
                "often than the student",
                setting if setting == "teacher.model" else "method.states.horizon",
                why
                if setting == "teacher.model"
                else "the teacher cannot save what the student has begun, so late tokens teach "
                "nothing",
            )
        )
    return readings


def state_setting(evidence: Evidence) -> tuple[str, str]:
    """Who is at fault where student and teacher do not go together, and which setting mends it.

    A teacher that does not know the data's own text, or is no better than the student at the task,
    is the wrong one or is read wrongly; otherwise it is the student that is not there yet.
    """
    on_data = evidence.teacher_on_data
    if len(on_data) and float(on_data.double().mean()) > KNOWN_TEXT:
        if len(evidence.teacher_verdict) and _gain(evidence).low > 0:
            return (
                "teacher.model",
                "the teacher solves the task, but its scores do not belong to the tokens: "
                "positions, template or vocabulary differ between writing and scoring",
            )
        return (
            "teacher.model",
            "the teacher does not know the data's own text: it is of another task, or reads it "
            "with another vocabulary, template or position",
        )
    # where neither solves anything the limit on answers may be to blame, not who knows the text
    solved = bool((evidence.verdict >= PASS_MARK).any()) or not len(on_data)
    if len(evidence.teacher_verdict) and _gain(evidence).high <= 0 and solved:
        return "teacher.model", "the teacher is no better at the task than the student"
    return "warmup.steps", "the student's states are outside what the teacher knows"


def _continuation_gain(evidence: Evidence) -> tuple[Estimate, float]:
    """How much more often the teacher ends an answer right than the student, at the first cut."""
    for each in evidence.recoveries:
        if each.depth > 0:
            change = each.teacher - each.student
            known = ~change.isnan()
            found = _of_prompts(evidence, change[known])
            return found, each.depth
    return Estimate(), math.nan


def _of_prompts(evidence: Evidence, values: torch.Tensor) -> Estimate:
    """A mean of one number per prompt."""
    return mean_over_groups(values, torch.arange(len(values)), len(values))


def _gain(evidence: Evidence) -> Estimate:
    """The teacher's accuracy minus the student's, on the prompts that both answered."""
    teacher = evidence.teacher_verdict
    if not len(teacher):
        return Estimate()
    by_prompt = torch.stack(
        [evidence.verdict[evidence.group == prompt].mean() for prompt in range(len(teacher))]
    )
    known = ~(teacher.isnan() | by_prompt.isnan())
    return _of_prompts(evidence, (teacher - by_prompt)[known])


def _information(evidence: Evidence) -> list[Reading]:
    setting, why = state_setting(evidence)
    readings = []
    gain = _gain(evidence)
    if "reverse_kl" in evidence.rows:
        information = evidence.mean_of_rows(evidence.row("reverse_kl"))
        reach = evidence.mean_of_rows(evidence.row("teacher_overlap_mass"))
        readings = [
            Reading(
                "something_to_learn",
                information,
                "nats per token",
                f"student and teacher are {information.value:.3g} nats apart: nothing to learn",
                "teacher.model",
                "the teacher says what the student says already",
            ),
            Reading(
                "marginal_info",
                information,
                "nats per token",
                f"the teacher has {information.value:.3g} nats per token to tell",
                setting,
                f"{information.value:.3g} nats are out of reach: {why}",
            ),
            Reading(
                "teacher_overlap_mass",
                reach,
                f"of the teacher on the student's {evidence.k} likeliest",
                f"{reach.value:.0%} of what the teacher would say is among the student's "
                f"{evidence.k} likeliest tokens",
                setting,
                f"what the teacher wants is not among what the student considers: {why}",
            ),
        ]
    if gain.known:
        readings.append(
            Reading(
                "teacher_gain",
                gain,
                "of accuracy",
                f"the teacher solves {gain.value:+.0%} of the prompts more than the student",
                "teacher.model",
                "the teacher is no better at the task than the student",
            )
        )
    readings.sort(key=lambda reading: reading.name != "marginal_info")
    return readings


def _privilege(evidence: Evidence) -> Verdict:
    if not evidence.contexts:
        return Verdict(
            PRIVILEGE, NOT_APPLICABLE, meaning="no view reads more than the student reads"
        )
    readings = []
    for each in evidence.privileges:
        known = ~(each.with_context.isnan() | each.without.isnan())
        gap = _of_prompts(evidence, (each.with_context - each.without)[known])
        readings.append(
            Reading(
                "privilege_gap",
                gap,
                "of accuracy",
                f"reading its context, {each.view} solves "
                f"{privilege_gap(each.with_context, each.without):+.0%} of the prompts more; how "
                "much of that can be learnt shows without the context, after training",
                "method.views",
                "the context does not help who reads it, so there is no privilege to pass on",
            )
        )
    measured = {each.view for each in evidence.privileges}
    missing = [name for name in evidence.contexts if name not in measured]
    lines = [f"{name}: its context is not known of held-out prompts" for name in missing]
    return _verdict(PRIVILEGE, readings, lines)


def _alignment(evidence: Evidence) -> list[Reading]:
    score, verdict = evidence.per_response("log_ratio"), evidence.verdict
    found = evidence.of_responses(lambda rows: align_auc(score[rows], verdict[rows]))
    readings = [
        Reading(
            "align_auc",
            found,
            "AUROC of the mean log ratio",
            f"of a right and a wrong answer the teacher prefers the right one {found.value:.0%} of "
            "the time",
            "method",
            "the teacher does not prefer what is right: let the outcome gate what is learnt "
            '(weights = ["correct"]), or take another teacher',
        )
    ]
    cosine = evidence.gradient_cosine
    if _has_a_sign(cosine):
        readings.append(
            Reading(
                "gradient_cosine",
                cosine,
                "cosine",
                f"the gradient goes {'along with' if cosine.value > 0 else 'against'} the "
                "verifier's",
                "method",
                "what the teacher teaches the verifier takes back: gate by the outcome",
            )
        )
    return readings


def _has_a_sign(found: Estimate) -> bool:
    """Whether an estimate is told apart from 0. Where few prompts have both right and wrong
    answers the verifier's gradient is mostly noise, and a cosine with noise says nothing."""
    return found.known and (found.low > 0 or found.high < 0)


def _routability(evidence: Evidence) -> list[Reading]:
    if "candidate_mass" not in evidence.rows:
        return []
    mass = evidence.row("candidate_mass")
    negative = evidence.row("log_ratio") < 0
    routable = torch.where(mass.isnan(), torch.nan, (mass >= ROUTABLE_MASS).float())
    found = evidence.mean_of_rows(routable, negative)
    return [
        Reading(
            "routable_share",
            found,
            "of the tokens to suppress",
            f"for {found.value:.0%} of the tokens it disfavours the teacher names what to say "
            "instead",
            "method",
            "suppression has no direction: compare on the teacher's list too, or skip rows "
            "without a candidate",
        )
    ]


def _stability(evidence: Evidence) -> list[Reading]:
    cut = torch.tensor([reason == "length" for reason in evidence.stop_reason])
    of_rows = cut.unsqueeze(1).expand_as(evidence.mask)[evidence.mask].float()
    found = evidence.mean_of_rows(of_rows)
    setting, reason = "sampler.max_new_tokens", "raise the limit, or audit the end tokens"
    if any(reading.status == UNFIT for reading in _state(evidence)):
        # a student that is nowhere near does not end its answers either
        setting, reason = state_setting(evidence)
    return [
        Reading(
            "truncated_tokens",
            found,
            "of the tokens",
            f"{found.value:.0%} of the tokens are of answers that never end",
            setting,
            f"answers that are cut off dominate the batch: {reason}",
        )
    ]


# --------------------------------------------------------------------------------------------
# Further numbers


def _missing(evidence: Evidence, *names: str) -> Iterator[str]:
    for name in names:
        if name in evidence.absent:
            yield f"{name} was not measured: {evidence.absent[name]}"


def _mean_line(evidence: Evidence, name: str, unit: str) -> Iterator[str]:
    if name in evidence.rows:
        found = evidence.mean_of_rows(evidence.row(name))
        yield f"{name} {found.value:.3g} {unit} [{found.low:.3g}, {found.high:.3g}]"


def _state_lines(evidence: Evidence) -> list[str]:
    lines = list(_missing(evidence, "student_overlap_mass", "recoverability"))
    for name, unit in (
        ("top_k_overlap", f"of {evidence.k} tokens in common"),
        ("teacher_surprise", "nats per token"),
        ("teacher_confidence", "mean of the largest probability"),
        ("entropy_gap", "nats"),
    ):
        lines += _mean_line(evidence, name, unit)
    if len(evidence.teacher_on_data):
        known = float(evidence.teacher_on_data.double().mean())
        lines.append(f"teacher_surprise {known:.3g} nats per token on the data's own responses")
    scratch = evidence.teacher_verdict
    for each in evidence.recoveries:
        if each.depth > 0:
            lost = recoverability(each.teacher, scratch)
            lines.append(f"recoverability {lost:+.2f} of accuracy after {each.depth:.0%}")
    return lines


def _information_lines(evidence: Evidence) -> list[str]:
    lines = list(_missing(evidence, "reverse_kl"))
    for name, unit in (
        ("forward_kl", "nats"),
        ("student_gap", f"of the student outside the teacher's {evidence.k} likeliest"),
        ("teacher_gap", f"of the teacher outside its own {evidence.k} likeliest"),
    ):
        lines += _mean_line(evidence, name, unit)
    return lines


def _alignment_lines(evidence: Evidence) -> list[str]:
    judged = evidence.verdict[~evidence.verdict.isnan()]
    if not len(judged):
        return ["there is no verifier, so nothing tells right from wrong"]
    found = evidence.mean_of_responses(evidence.verdict)
    lines = [f"accuracy {found.value:.3g} [{found.low:.3g}, {found.high:.3g}] of the student"]
    if bool((judged >= PASS_MARK).all()) or bool((judged < PASS_MARK).all()):
        return ["all answers are right, or all wrong, so they cannot be told apart", *lines]
    cosine = evidence.gradient_cosine
    if cosine.known and not _has_a_sign(cosine):
        lines.append(
            f"gradient_cosine {cosine.value:.3g} [{cosine.low:.3g}, {cosine.high:.3g}] with the "
            "verifier's gradient: not told apart from 0"
        )
    correlation = outcome_correlation(evidence.per_response("log_ratio"), evidence.verdict)
    lines.append(f"outcome_correlation {correlation:.3g} of mean log ratio and verdict")
    if "reverse_kl" in evidence.rows:
        distance = evidence.per_response("reverse_kl")
        right, wrong = (
            float(distance[evidence.verdict >= PASS_MARK].nanmean()),
            float(distance[evidence.verdict < PASS_MARK].nanmean()),
        )
        lines.append(f"reverse_kl {right:.3g} nats on right answers, {wrong:.3g} on wrong ones")
    return lines


def _routability_lines(evidence: Evidence) -> list[str]:
    lines = list(_missing(evidence, "candidate_mass"))
    ratio = evidence.row("log_ratio")
    ratio = ratio[~ratio.isnan()]
    lines.append(f"negative_share {negative_share(ratio):.3g} of the tokens are disfavoured")
    lines.append(f"negative_mass {negative_mass(ratio):.3g} of all push takes mass away")
    if "leak" in evidence.rows:
        found = evidence.mean_of_rows(evidence.row("leak"), evidence.row("log_ratio") < 0)
        lines.append(
            f"leak {found.value:.3g} [{found.low:.3g}, {found.high:.3g}] of what plain suppression "
            "releases goes to tokens that nobody asked for"
        )
    return lines


def _stability_lines(evidence: Evidence) -> list[str]:
    ratio = evidence.row("log_ratio")
    spread = ", ".join(
        f"{share:.0%} {value:.3g}" for share, value in quantiles(ratio[~ratio.isnan()]).items()
    )
    lines = [f"log_ratio quantiles {spread} nats"]
    length = evidence.mean_of_responses(evidence.mask.sum(1).float())
    lines.append(f"length_mean {length.value:.3g} tokens [{length.low:.3g}, {length.high:.3g}]")
    repeated = evidence.mean_of_responses(repeated_ngrams(evidence.tokens, evidence.mask, 4))
    lines.append(f"repeated_ngrams {repeated.value:.3g} of the 4-grams")
    lines += _mean_line(evidence, "student_entropy", "nats")
    if "gradient_proxy" in evidence.rows:
        size = (ratio.abs() * evidence.row("gradient_proxy"))[~ratio.isnan()]
        lines.append(
            f"effective_share {effective_share(size):.3g} of the tokens carry a sampled-token "
            f"update, the top 1 % {top_share(size):.3g} of it"
        )
    if "student_logp" in evidence.rows:
        off = log_mismatch(evidence.row("sampler_logp"), evidence.row("student_logp"))
        lines.append(f"log_mismatch {off:.2g} nats between sampler and learner")
    return lines

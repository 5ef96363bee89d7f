"""Monitors: what a step says of itself, from numbers that it has made anyway.

No pass and no projection is added: `of_update` reads the by-products of an update and the text that
it was about, `of_look` the numbers of the rows of a few responses of which both distributions were
seen. All are sums with counts, of the rows that the student wrote (of all rows of an update, where
it wrote none), so that the averages of several steps are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.diagnose.drift import repeated_ngrams
from opd.diagnose.numbers import judged, leading, places, wide
from opd.diagnose.outcome import align_auc, calibration_error
from opd.diagnose.records import LOG_RATIO, OF_TERMS, rows_in
from opd.diagnose.signal import quantiles
from opd.diagnose.update import effective_share, top_share
from opd.fields import positional_names
from opd.objective import Objective
from opd.terms import Routed, Sampled, Term
from opd.types import PASS_MARK, Batch, Bound, Provenance, Rollout, Stat, pack_rows

MONITOR = "monitor/"
"""How the names of these metrics begin."""

THIRDS = ("first", "middle", "last")
OUTCOMES = ("right", "wrong")
GRAM = 4
"""Tokens of the runs whose repetition is counted."""

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "log_ratio": "teacher minus student on the sampled token, nats; where no view is called "
        "`teacher`, of the first that a term compares with",
        "reverse_kl": "of the student from the teacher, where the objective knows it, nats",
        "entropy": "of the student, nats",
        "loss": "of all terms, weights and coefficients included",
        "log_ratio/q01": "its 1 % quantile",
        "log_ratio/q50": "its median",
        "log_ratio/q99": "its 99 % quantile",
        "first_token": "absolute log ratio at the first token",
        "later_tokens": "at all others",
        "end_tokens": "absolute log ratio at end tokens",
        "other_tokens": "at all others",
        "infinite": "share of rows with a log ratio or a loss that is not finite; these are in no "
        "other average",
        "negative_share": "share of tokens with an advantage below 0",
        "negative_mass": "their share of the absolute advantage",
        "effective_share": "tokens that share in the push, as a part of all: by the gradient on "
        "the logits where it is known, else the advantage, else the loss",
        "top_share": "share of the push that the largest 1 % of the tokens hold",
        "repeated": "share of 4-grams that a response has said before",
        "calibration_error": "of exp(mean log-probability) against the verdict",
        "align_auc": "share of pairs of a right and a wrong response in which the right one has "
        "the higher mean log ratio",
        "align_within": "as align_auc, among the responses of one prompt, mean over the prompts "
        "that have both",
        "importance_ratio": "student over sampler on the sampled token",
        "kl_from_samples": "log sampler minus log student, nats: how far the text is behind",
        "masked/TERM": "share of tokens whose ratio the term clips or masks",
        "masked_mass/TERM": "their share of the importance",
    }
)
"""What the monitors of every step are, by their names after `monitor/`."""

LOOK = "look/"
LOOKED_AT: Mapping[str, str] = MappingProxyType(
    {
        "top_k_overlap": "share of the likeliest tokens that both have in common",
        "student_overlap_mass": "the student's mass on the teacher's list",
        "teacher_overlap_mass": "the teacher's mass on the student's list",
        "entropy_gap": "absolute difference of the entropies, nats",
        "student_entropy": "nats",
        "teacher_entropy": "nats",
        "teacher_spread": "the teacher's entropy over that of a uniform distribution",
        "excess_surprise": "-log teacher(y) minus the teacher's entropy, nats",
        "teacher_confidence": "the teacher's largest probability",
        "teacher_margin": "log of its first over its second, among the student's likeliest, nats",
        "eos_divergence": "difference of the log-mass of the end tokens, nats",
        "reverse_kl": "nats",
        "forward_kl": "nats",
        "routable": "of tokens with a negative log ratio, the share with a reachable alternative",
        "candidate_mass": "the teacher's mass on these alternatives, a row counting by its -r",
        "leak": "share of what suppression would release there that goes to no alternative",
        "infinite": "share of rows with a number that is not finite; that number is then left out",
    }
)
"""What a look measures, by the names after `monitor/look/`."""

IN_THIRDS = ("top_k_overlap", "teacher_confidence", "excess_surprise")

CLIPS = ("clipped", "dual_clipped")
MASKS = ("masked_importance",)


def of_update(
    rollout: Rollout, batch: Batch, objective: Objective, rows: Mapping[str, Tensor]
) -> dict[str, Stat]:
    """The monitors of an update, by metric.

    Args:
        rollout: the text.
        batch: packed from it, with what was settled before the update.
        objective: of the update.
        rows: its by-products `[N]`, in the order of the batch's rows.
    """
    text = _Text.of(rollout, batch)
    looks = rows_in(objective, batch)
    known = {name: _here(_of_its_term(name, value, looks)) for name, value in rows.items()}
    known = _of_one_view(known, objective)
    found: dict[str, Stat] = {}
    if text.rows.numel():
        per_row = {name: value[text.rows] for name, value in _per_row(known).items()}
        found |= _by_part(per_row, text)
        found |= _of_log_ratio(per_row.get("log_ratio"), text)
        found |= _of_push(known, text)
        found |= _of_age(known, batch, objective, text)
        found |= _of_outcome(per_row, known, text)
    grams = repeated_ngrams(text.tokens, text.mask, GRAM)
    found["repeated"] = _stat(grams)
    return {MONITOR + name: stat for name, stat in found.items() if _is_known(stat)}


def of_look(
    rows: Mapping[str, Float[Tensor, " N"]],
    mask: Bool[Tensor, "B T"],
    provenance: Int[Tensor, "B T"],
    vocab_size: int,
) -> dict[str, Stat]:
    """The monitors of a look, by metric; none where the student wrote no open row.

    Args:
        rows: numbers of every open row, by the names of the diagnostics.
        mask: of the responses.
        provenance: of their tokens; only the student's count, at their places in the response.
        vocab_size: tokens that both sides share.
    """
    own = pack_rows(provenance == Provenance.STUDENT, mask)
    if not bool(own.any()):
        return {}
    place, length = places(mask)
    third = torch.div(place * 3, length, rounding_mode="floor")[own]
    rows = {name: value[own] for name, value in rows.items()}
    rows["teacher_spread"] = rows["teacher_entropy"] / math.log(vocab_size)
    negative = rows["log_ratio"] < 0
    found: dict[str, Stat] = {}
    bad = torch.zeros(len(third), dtype=torch.bool)
    for name in LOOKED_AT:
        if name not in rows:
            continue
        value = wide(rows[name])
        bad |= value.isinf()
        if name != "candidate_mass":
            found[name] = _stat(value[negative] if name == "leak" else value)
        if name in IN_THIRDS:
            for number, part in enumerate(THIRDS):
                found[f"{name}/{part}"] = _stat(value[third == number])
    # by what is taken: late in a run most rows are off by little
    taken = leading(-wide(rows["log_ratio"])[negative])
    kept = wide(rows["candidate_mass"])[negative] * taken
    found["candidate_mass"] = Stat(float(kept.sum()), float(taken.sum()))
    found["routable"] = _stat((rows["candidate_mass"] > 0)[negative].double())
    found["infinite"] = Stat(float(bad.sum()), float(len(bad)))
    return {MONITOR + LOOK + name: stat for name, stat in found.items() if _is_known(stat)}


# --------------------------------------------------------------------------------------------


class _Text:
    """The text of a batch, on the CPU.

    Attributes:
        rows: of the N rows, those that are measured.
        sequence, place, length: of each of these: its response, its place in it among the open
            tokens, and how many these are.
        ends: of each, whether it is an end token.
        sampled: of each, whether the student wrote it.
        verdict, group: of every response of the batch, its verdict and its prompt.
        own: True on the responses that are measured.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        sampled: Bool[Tensor, " N"],
        ended: Bool[Tensor, " B"],
        verdict: Float[Tensor, " B"],
        group: Int[Tensor, " B"],
    ) -> None:
        own = sampled if bool(sampled.any()) else torch.ones_like(sampled)
        place, length = places(mask)
        sequence = mask.nonzero()[:, 0]
        self.rows = own.nonzero()[:, 0]
        self.sequence = sequence[self.rows]
        self.place, self.length = place[self.rows], length[self.rows]
        self.ends = (self.place == self.length - 1) & ended[self.sequence]
        self.sampled = sampled[self.rows]
        self.verdict, self.group = verdict, group
        self.own = torch.bincount(self.sequence, minlength=len(mask)) > 0
        self.tokens, self.mask = tokens[self.own], mask[self.own]

    @classmethod
    def of(cls, rollout: Rollout, batch: Batch) -> _Text:
        token = batch.token
        mask = token.mask.cpu()
        student = pack_rows(token.provenance.cpu() == Provenance.STUDENT, mask)
        ended = torch.tensor([reason == "eos" for reason in rollout.stop_reason])
        verdict, group = wide(token.verdict).cpu(), rollout.group.cpu()
        return cls(token.tokens.cpu(), mask, student, ended, verdict, group)

    def per_sequence(self, values: Float[Tensor, " n"]) -> Float[Tensor, " B"]:
        """The mean of a response's rows; NaN where none is measured."""
        size = len(self.own)
        total = torch.bincount(self.sequence, weights=values, minlength=size)
        count = torch.bincount(self.sequence, minlength=size)
        return torch.where(count > 0, total / count, math.nan)


def _of_its_term(name: str, value: Tensor, looks: Mapping[str, Tensor]) -> Tensor:
    """NaN on rows that are in no sum of the term that a by-product is about."""
    label = name.partition("/")[2].partition("/")[0].partition(".")[0]
    if name.startswith(OF_TERMS) and label in looks:
        return torch.where(looks[label], value, math.nan)
    return value


def _of_one_view(known: dict[str, Tensor], objective: Objective) -> dict[str, Tensor]:
    """By-products with those of a named view under the plain names, where no view has these.

    The view is the first that a term compares with.
    """
    if LOG_RATIO in known:
        return known
    views = [t.against for _, t in objective.parts() if objective.reads_its_view(t)]
    names = [view.removeprefix("teacher.") for view in views if view.startswith("teacher.")]
    name = next((name for name in names if f"{LOG_RATIO}/{name}" in known), None)
    if name is None:
        return known
    plain = {each: known.get(f"{each}/{name}") for each in (LOG_RATIO, "reverse_kl")}
    return known | {each: value for each, value in plain.items() if value is not None}


def _loss(known: Mapping[str, Tensor]) -> Tensor | None:
    """Of all terms together; NaN on rows that are in no sum."""
    losses = [v for name, v in known.items() if name.startswith("loss/") and "." not in name]
    if not losses:
        return None
    each = torch.stack(losses)
    return torch.where(each.isnan().all(0), math.nan, each.nansum(0))


def _per_row(known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is followed along the response and by outcome."""
    found = {
        "log_ratio": known.get("log_ratio"),
        "reverse_kl": known.get("reverse_kl"),
        "entropy": known.get("student_entropy"),
        "loss": _loss(known),
    }
    return {name: value for name, value in found.items() if value is not None}


def _by_part(per_row: Mapping[str, Tensor], text: _Text) -> dict[str, Stat]:
    """Each quantity over all rows, by thirds of the response and by outcome."""
    third = torch.div(text.place * 3, text.length, rounding_mode="floor")
    verdict = text.verdict[text.sequence]
    parts = {"": torch.ones_like(text.ends)}
    parts |= {f"/{name}": third == number for number, name in enumerate(THIRDS)}
    right, wrong = OUTCOMES
    parts |= {f"/{right}": verdict >= PASS_MARK, f"/{wrong}": verdict < PASS_MARK}
    chosen = torch.stack(list(parts.values())).double().T
    values = torch.stack(list(per_row.values()))
    finite = values.isfinite()
    sums = (torch.where(finite, values, 0.0) @ chosen).tolist()
    counts = (finite.double() @ chosen).tolist()
    found = {
        name + part: Stat(sums[q][p], counts[q][p])
        for q, name in enumerate(per_row)
        for p, part in enumerate(parts)
    }
    found["infinite"] = Stat(float(values.isinf().any(0).sum()), float(values.shape[1]))
    return found


def _of_log_ratio(r: Tensor | None, text: _Text) -> dict[str, Stat]:
    if r is None:
        return {}
    size, finite = r.abs(), r.isfinite()
    found = {
        f"log_ratio/q{100 * share:02.0f}": Stat(value, 1.0)
        for share, value in quantiles(r[finite], (0.01, 0.5, 0.99)).items()
    }
    first = text.place == 0
    found |= {"first_token": _stat(size[first]), "later_tokens": _stat(size[~first])}
    return found | {"end_tokens": _stat(size[text.ends]), "other_tokens": _stat(size[~text.ends])}


def _of_push(known: Mapping[str, Tensor], text: _Text) -> dict[str, Stat]:
    """Which way the update pushes, and how many tokens share in it."""
    found: dict[str, Stat] = {}
    advantages = [v[text.rows] for name, v in known.items() if name.startswith("advantage/")]
    advantages = [value[value.isfinite()] for value in advantages]
    if advantages:
        pushed = torch.cat(advantages)
        down = (-pushed).clamp(min=0)
        found["negative_share"] = Stat(float((pushed < 0).sum()), float(len(pushed)))
        found["negative_mass"] = Stat(float(down.sum()), float(pushed.abs().sum()))
    size, loss = known.get("logit_gradient_norm"), _loss(known)
    if size is not None:
        size = size[text.rows]
    elif len(advantages) == 1:
        size = advantages[0]
    elif loss is not None:
        size = loss[text.rows]
    if size is not None:
        size = size[size.isfinite()].abs()
        found["effective_share"] = Stat(effective_share(size), 1.0)
        found["top_share"] = Stat(top_share(size), 1.0)
    return found


def _of_age(
    known: Mapping[str, Tensor], batch: Batch, objective: Objective, text: _Text
) -> dict[str, Stat]:
    """How far the student is from who wrote its text, and what terms drop for it."""
    token, student = batch.token, known.get("student_logp")
    rows = text.rows[text.sampled]
    if student is None or not rows.numel():
        return {}
    student = student[rows]
    sampler = _here(token.sampler_logp[token.mask])[rows]
    gap = sampler - student
    found = {"kl_from_samples": _stat(gap), "importance_ratio": _stat((-gap).exp())}
    for label, term in objective.labelled():
        bounds = _bounds(term)
        if bounds is None:
            continue
        who, low, high = bounds
        old = sampler
        if who == "old_logp" and token.old_logp is not None:
            old = _here(token.old_logp[token.mask])[rows]
        ratio = (student - old).exp()
        ratio = ratio[ratio.isfinite()]
        outside = (ratio < low) | (ratio > high)
        found[f"masked/{label}"] = _stat(outside.double())
        found[f"masked_mass/{label}"] = Stat(float(ratio[outside].sum()), float(ratio.sum()))
    return found


def _bounds(term: Term) -> tuple[str, float, float] | None:
    """Against whom a term takes its ratio, and outside which bounds it does not count."""
    if isinstance(term, Routed):
        term = term.source
    if not isinstance(term, Sampled):
        return None
    bound = Bound.of(term.surrogate)
    knobs = dict(bound.knobs)
    if bound.short_name not in (*CLIPS, *MASKS) or not {"low", "high"} <= knobs.keys():
        return None
    names = positional_names(bound.function)
    who = "old_logp" if "old_logp" in names else "sampler_logp"
    low, high = float(knobs["low"]), float(knobs["high"])
    return (who, low, high) if bound.short_name in MASKS else (who, 1 - low, 1 + high)


def _of_outcome(
    per_row: Mapping[str, Tensor], known: Mapping[str, Tensor], text: _Text
) -> dict[str, Stat]:
    """Whether the teacher ranks right above wrong, and whether sure answers are right."""
    found: dict[str, Stat] = {}
    if (r := per_row.get("log_ratio")) is not None:
        score = text.per_sequence(r)
        _, outcome = judged(score, text.verdict)
        right = int((outcome >= PASS_MARK).sum())
        pairs = right * (len(outcome) - right)
        if pairs:
            found["align_auc"] = Stat(align_auc(score, text.verdict) * pairs, float(pairs))
        found["align_within"] = _within(score, text)
    if (logp := known.get("student_logp")) is not None:
        sure = text.per_sequence(logp[text.rows]).exp().clamp(max=1.0)
        found["calibration_error"] = Stat(calibration_error(sure, text.verdict), 1.0)
    return found


def _within(score: Float[Tensor, " B"], text: _Text) -> Stat:
    """How well the score ranks the responses of one prompt: of all prompts that have both.

    Responses of one prompt are right or wrong together, as the prompt is easy or hard; so a score
    that knows no more than that ranks well over all, and here by chance.
    """
    known = ~(score.isnan() | text.verdict.isnan())
    right, wrong = (
        set(text.group[known & outcome].tolist())
        for outcome in (text.verdict >= PASS_MARK, text.verdict < PASS_MARK)
    )
    each = [
        align_auc(score[among], text.verdict[among])
        for among in (text.group == group for group in sorted(right & wrong))
    ]
    return Stat(sum(each), float(len(each)))


def _here(value: Tensor) -> Tensor:
    return wide(value).cpu()


def _stat(values: Tensor) -> Stat:
    """Sum and count of the finite ones."""
    known = values[values.isfinite()]
    return Stat(float(known.double().sum()), float(len(known)))


def _is_known(stat: Stat) -> bool:
    return stat.count > 0 and math.isfinite(stat.total)

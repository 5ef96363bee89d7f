"""Every formula of sampled tokens, weights, routes and regularisers against its oracle.

The oracles in `tests/reference` are literal transcriptions of the papers, made independently of
the formulas, in loops and with derivatives by hand. Both are asked about the same
random optimizer steps and positions: responses with gaps, without a token and with one; groups
with unjudged, equal and single verdicts; NaN at closed tokens; zero and tiny probabilities; ties
and values exactly at a bound; absent entries.

Where two readings of a paper are both legitimate, `ASKED` says in one line what differs and puts
the oracle's question the formula's way, so that nothing is left out of the comparison.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import opd.formula
from opd.fields import positional_names
from opd.formula import (
    credit,
    outcome,
    regulariser,
    response,
    reward,
    routing,
    selection,
    support,
    surrogate,
    weight,
)
from tests.reference import credit as credit_oracle
from tests.reference import (
    outcomes,
    regularisers,
    responses,
    rewards,
    surrogates,
    weights,
)
from tests.reference import routing as routing_oracle
from tests.reference import selection as selection_oracle

Array = npt.NDArray[np.float64]
Fields = dict[str, Tensor]
Knobs = dict[str, Any]

MODULES: dict[str, tuple[ModuleType, ModuleType]] = {
    "reward": (reward, rewards),
    "credit": (credit, credit_oracle),
    "surrogate": (surrogate, surrogates),
    "outcome": (outcome, outcomes),
    "weight": (weight, weights),
    "selection": (selection, selection_oracle),
    "response": (response, responses),
    "routing": (routing, routing_oracle),
    "regulariser": (regulariser, regularisers),
}
NAMES = [f"{module}.{name}" for module, (ours, _) in MODULES.items() for name in ours.__all__]

BOUND = 1e-12
"""In units of the value, or of what is added up where that is larger: see `SCALES`."""

ORDINARY = range(6)
NOTHING_OPEN, LONG, ALTERNATING = 6, 7, 8
SEEDS = (*ORDINARY, NOTHING_OPEN, LONG, ALTERNATING)
RESPONSES, LENGTH = 10, 12
LONG_SHAPE = 2, 100
"""More tokens than are added up at a time."""
POSITIONS, VOCABULARY, ENTRIES = 24, 11, 6

KNOBS: dict[str, list[Knobs]] = {
    "reward.clipped_log_ratio": [{"low": -1.0, "high": 0.5}, {"low": -5.0, "high": 5.0}],
    "reward.floored_log_ratio": [{"floor_nats": -0.3}, {"floor_nats": -4.0}],
    "reward.tanh_log_ratio": [{"scale": 0.2}, {"scale": 3.0}],
    "reward.proximal_log_ratio": [{"teacher_share": s} for s in (0.1, 0.5, 0.95)],
    "reward.power_reward": [{"power": a} for a in (0.05, 1.0, 2.5)],
    "reward.generalized_jsd_reward": [{"teacher_weight": w} for w in (0.05, 0.5, 0.9)],
    "reward.skew_forward_kl_reward": [{"skew": s} for s in (0.1, 0.7)],
    "reward.skew_reverse_kl_reward": [{"skew": s} for s in (0.1, 0.7)],
    "reward.alpha_divergence_reward": [{"alpha": a} for a in (-0.5, 0.2, 0.5, 1.3)],
    "reward.overlong_cost": [{"start": 0, "limit": 5}, {"start": 4, "limit": 9}],
    "credit.discounted": [
        {"gamma": gamma, "meaning": "task"} for gamma in (0.0, 0.3, 0.9, 0.999, 1.0)
    ],
    "credit.windowed": [{"window": k} for k in (1, 2, 3, 7, 50)],
    "credit.damped_future": [{"future_weight": w} for w in (0.0, 0.3, 1.0)],
    "credit.length_neutral_future": [{"future_weight": w} for w in (0.0, 0.3, 1.0)],
    "credit.gae": [
        *({"gae_lambda": share} for share in (0.0, 0.5, 0.95, 1.0)),
        *({"gae_lambda": s, "gamma": 0.8, "meaning": "task"} for s in (0.0, 0.5, 1.0)),
        {"gae_lambda": 0.5, "gamma": 0.0, "meaning": "task"},
    ],
    "credit.scaled_by_turn": [{"gain_cap": gain} for gain in (0.0, 0.5, 1e9)],
    "credit.bounded_return": [
        {"gamma": gamma, "meaning": "task"} for gamma in (0.0, 0.5, 0.99, 1.0)
    ],
    "surrogate.shaped_probability": [{"half_at": half_at} for half_at in (0.01, 0.1, 3.0)],
    "surrogate.clipped": [{"low": 0.2, "high": 0.28}, {"low": 1.0, "high": 0.0}],
    "surrogate.dual_clipped": [
        {"low": 0.2, "high": 0.28, "negative_cap": 3.0},
        {"low": 0.0, "high": 2.0, "negative_cap": 1.1},
    ],
    "surrogate.truncated_importance": [{"cap": 1.0}, {"cap": 2.0}],
    "surrogate.masked_importance": [{"low": 0.5, "high": 2.0}, {"low": 0.0, "high": 1.0}],
    "surrogate.geometric_ratio": [
        {"old_share": share, "low": 0.2, "high": 0.3} for share in (0.1, 0.5, 0.9)
    ],
    "outcome.terminal_verdict": [{"scale": 0.7}, {"scale": -20.0}],
    "outcome.add_group_advantage": [{"scale": 0.7}, {"scale": -2.0}],
    "outcome.mix_group_advantage": [{"share": share} for share in (0.0, 0.3, 1.0)],
    "outcome.sigmoid_gate": [{"sharpness": b} for b in (1e-3, 1.0, 30.0)],
    "outcome.magnitude_only": [
        {"low": 0.5, "high": 0.8},
        {"low": 1.0, "high": 0.0},
        *({"low": 0.5, "high": 0.8, "strength": share} for share in (0.0, 0.3)),
    ],
    "outcome.reversed_magnitude": [
        {"width": 0.0},
        {"width": 0.5},
        {"width": 1.0},
        *({"width": 0.5, "strength": share} for share in (0.0, 0.3)),
    ],
    "outcome.relative_magnitude": [{"cap": cap} for cap in (1.01, 3.0, 1e6)],
    "outcome.bounded_shift": [
        {"temperature": 0.5, "scale": 0.5, "at_least": 0.02},
        {"temperature": 0.02, "scale": 3.0, "at_least": 0.0},
        {"temperature": 3.0, "scale": 1.0, "at_least": 0.3},
    ],
    "outcome.deliberation_bonus": [{"scale": scale} for scale in (0.0, 0.5, 3.0)],
    "outcome.add_verdict_sign": [{"scale": 0.7}, {"scale": 20.0}],
    "outcome.agreement_scale": [
        {"agreeing": 1.5, "other": 0.5},
        {"agreeing": 1.0, "other": 0.0},
        {"agreeing": 0.0, "other": 2.0},
    ],
    "outcome.agreement_gate": [{"sharpness": b} for b in (1e-3, 1.0, 30.0)],
    "outcome.add_verdict_residual": [
        {"scale": 0.1, "limit": 10.0},
        {"scale": 3.0, "limit": 1.0},
        {"scale": 0.7, "limit": 1e4},
    ],
    "outcome.margin_shift": [
        *({"margin": 0.4, "correct_share": share} for share in (0.0, 0.5, 1.0)),
        {"margin": 1e4, "correct_share": 0.3},
        {"margin": 0.0, "correct_share": 0.3},
    ],
    "weight.student_entropy_above": [{"nats": 0.5}, {"nats": 1.0}],
    "weight.student_entropy_below": [{"nats": 0.5}, {"nats": 1.0}],
    "weight.teacher_entropy_above": [{"nats": 0.5}, {"nats": 1.0}],
    "weight.teacher_entropy_below": [{"nats": 0.5}, {"nats": 1.0}],
    "weight.confident_wrong": [{"below_nats": 0.5, "above": 0.25}, {"below_nats": 1, "above": 0.5}],
    "weight.surprise": [{"boost": 0.0}, {"boost": 1.5}],
    "weight.trusted": [{"at_least": share} for share in (0.2, 0.7, 1.0)],
    "weight.untrusted": [{"below": share} for share in (0.2, 0.7, 1.0)],
    "weight.top_k_overlap": [{"k": k} for k in (1, 4, VOCABULARY)],
    "weight.overlap_above": [{"k": 4, "at_least": 0.5}, {"k": 2, "at_least": 1.0}],
    "weight.position_decay": [{"half_life": 0.7}, {"half_life": 100.0}],
    "weight.relative_position": [{"start": 1.5, "end": 0.0}, {"start": 0.2, "end": 0.9}],
    "weight.prefix": [{"tokens": 1}, {"tokens": 5}],
    "weight.prefix_share": [{"share": share} for share in (0.05, 0.3, 0.5, 1.0)],
    "weight.cumulative_drift": [{"boost": 0.0}, {"boost": 0.5}],
    "weight.drift_budget": [{"nats": nats} for nats in (0.0, 1.0, 6.0)],
    "weight.endorsement": [{"sharpness": b} for b in (1e-3, 1.0, 30.0)],
    "weight.importance": [{"cap": 1.0}, {"cap": 2.0}],
    "weight.update_ratio": [{"cap": 1.0}, {"cap": 2.0}],
    "weight.engine_ratio": [{"cap": 1.0}, {"cap": 5.0}],
    "weight.engine_ratio_within": [{"low": 0.5, "high": 2.0}, {"low": 0.0, "high": 1.0}],
    "weight.teacher_confidence": [{"nats": 0.5, "least": 0.2}, {"nats": 1.0, "least": 0.0}],
    "weight.confidence": [
        {"teacher_gain": a, "student_gain": b} for a, b in ((1, 1), (0, 2.0), (3.0, 0), (0, 0))
    ],
    "weight.after": [{"tokens": 1}, {"tokens": 5}],
    "weight.sigmoid_position": [
        {"least": 0.25, "centre": 0.3, "width": 0.1},
        {"least": 0.0, "centre": 0.9, "width": 1e-3},
        {"least": 1.0, "centre": 0.5, "width": 2.0},
    ],
    "weight.overlap_decay": [
        {"k": 4, "at_least": 0.5, "drop": 0.02},
        {"k": 2, "at_least": 1.0, "drop": 0.3, "base": 0.5},
        {"k": VOCABULARY, "at_least": 1.0, "drop": 0.3},
    ],
    **{
        f"selection.{name}": [{"share": share} for share in (1e-3, 0.1, 0.25, 0.5, 0.9, 1.0)]
        for name in ("keep_large_forward_kl", "keep_entropy_mismatch", "keep_overrated")
    },
    "selection.keep_soft_or": [{"share": share} for share in (1e-3, 0.1, 0.5, 1.0)],
    "selection.keep_high_signal": [{"share": share} for share in (1e-3, 0.1, 0.5, 1.0)],
    "selection.keep_teachable": [
        {"k": k, "share": share} for k in (1, 3) for share in (1e-3, 0.05, 0.5, 1.0)
    ],
    "selection.keep_uncertain_or_wrong": [
        *({"share": share} for share in (1e-3, 0.1, 0.5, 1.0)),
        *(
            {"share": 0.3, "entropy_power": a, "divergence_power": b}
            for a, b in ((0.0, 1.0), (1.0, 0.0), (0.5, 3.0), (0.0, 0.0))
        ),
    ],
    "response.difficulty": [
        {"pass_power": a, "fail_power": b}
        for a, b in ((1.0, 1.0), (0.0, 1.0), (0.5, 0.0), (2.0, 3.0), (0.0, 0.0))
    ],
    "response.likely_for_teacher": [{"drop_share": share} for share in (0.01, 0.2, 0.5, 0.99)],
    "response.pivotal": [
        {"at_least": 0.8, "ratio_cap": 2.5, "temperature": 1.0, "weight_cap": 10.0},
        {"at_least": 0.0, "ratio_cap": 5.0, "temperature": 0.3, "weight_cap": 1.0},
        {"at_least": -1.0, "ratio_cap": 0.5, "temperature": 4.0, "weight_cap": 1.2},
    ],
    "response.share_of_correct": [{"temperature": tau} for tau in (0.05, 1.0, 30.0)],
    "response.share_of_wrong": [{"temperature": tau} for tau in (0.05, 1.0, 30.0)],
    "response.sure_teacher_where_wrong": [{"sharpness": b} for b in (1e-3, 1.0, 30.0)],
    "weight.teacher_passes": [{"at_least": 0.25}, {"at_least": 1.0}],
    "weight.teacher_fails": [{"below": 0.25}, {"below": 1.0}],
    "routing.endorsed_and_reachable": [
        {"teacher_k": 4, "student_k": 5},
        {"teacher_k": VOCABULARY, "student_k": 3, "margin": 0.2},
    ],
    "routing.endorsed_or_likely": [
        {"teacher_k": 4, "student_k": 1, "min_probability": 0.05},
        {"teacher_k": 6, "student_k": 2, "min_probability": 0.0, "margin": 0.2},
    ],
    "routing.raised": [{}, {"margin": 0.3}, {"margin": 0.0}],
    "routing.teacher_top": [{"teacher_k": 1}, {"teacher_k": 5}],
    "routing.best": [{}, {"margin": 0.5}],
    "routing.by_powers": [
        {"teacher_power": a, "student_power": b, "score_power": c}
        for a, b, c in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 0, 1), (0.5, 1.5, 2.0))
    ],
    "routing.by_score": [{}, {"temperature": 0.3}, {"temperature": 4.0}],
    "routing.overrated": [{}, {"margin": 0.4}],
    "routing.candidate_mass": [{"at_least": share} for share in (0.01, 0.2, 0.6)],
    "routing.evidence": [{"full_at": 0.05}, {"full_at": 1.0}],
    "regulariser.entropy_floor": [{"nats": 0.5}, {"nats": 1.3}],
}
"""Settings by `module.function`; a formula that has required knobs and none here fails."""

CONSTANT = ("reward.one", "reward.length_cost")
"""The formulas whose value is always the same."""


# --------------------------------------------------------------------------------------------
# What is drawn


class Draw:
    """Random tensors, the same for the same seed."""

    def __init__(self, seed: int, *shape: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = shape

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*(shape or self.shape), generator=self.generator)

    def share(self, *shape: int) -> Tensor:
        return torch.rand(*(shape or self.shape), generator=self.generator)

    def often(self, share: float, *shape: int) -> Tensor:
        return self.share(*shape) < share

    def one_of(self, values: list[float], *shape: int) -> Tensor:
        chosen = torch.randint(len(values), shape or self.shape, generator=self.generator)
        return torch.tensor(values)[chosen]


def openings(draw: Draw, seed: int) -> Tensor:
    """Masks: all open, none, one token, a gap and padding, the rest at random."""
    mask = draw.often(0.6)
    if seed == NOTHING_OPEN:
        return torch.zeros_like(mask)
    if seed == ALTERNATING:  # so many gaps that they are deleted in another way
        return (torch.arange(mask.shape[1]) % 2 == 0).expand(mask.shape)
    if seed == LONG:
        mask[:] = True
        mask[0, 20:40] = mask[1, 70:75] = mask[1, 90:] = False
        return mask
    mask[0], mask[1], mask[2], mask[3] = True, False, False, True
    mask[2, 5] = True
    mask[3, 4:7] = mask[3, 10:] = False
    return mask


def step(seed: int) -> Fields:
    """One optimizer step, `[B, T]`; in odd ones a tenth of the numbers is extreme."""
    size, length = LONG_SHAPE if seed in (LONG, ALTERNATING) else (RESPONSES, LENGTH)
    draw = Draw(seed, size, length)
    rare = 0.1 * (seed % 2)

    def with_extremes(usual: Tensor, limit: float) -> Tensor:
        return torch.where(draw.often(rare), limit * draw.share(), usual)

    # At most e^12: beyond, the oracle's own sums of f-divergences have no correct digits left.
    student_logp = with_extremes(-2 * draw.normal().abs(), -12.0)
    teacher_logp = with_extremes(-2 * draw.normal().abs(), -600.0)
    teacher_logp = torch.where(draw.often(0.1), student_logp, teacher_logp)
    advantage = torch.where(draw.often(0.1), 0.0, draw.normal())
    in_support = draw.often(0.5)
    empty_tail = in_support & draw.often(0.5)
    entropies = [draw.normal().abs() for _ in range(2)]
    at_bound = draw.one_of([0.5, 1.0])
    verdict = draw.one_of([0.0, 0.3, 0.5, 1.0, math.nan], size)
    verdict[7:9] = 0.3
    return {
        "tokens": torch.randint(9, draw.shape, generator=draw.generator),
        "special": draw.often(0.3),
        "position": torch.arange(length).expand(draw.shape),
        "mask": openings(draw, seed),
        "student_logp": student_logp,
        # Not beside an advantage of 0: what 0 * inf is, no oracle says.
        "teacher_logp": torch.where(draw.often(rare) & (advantage != 0), -math.inf, teacher_logp),
        "old_logp": with_extremes(student_logp + 0.4 * draw.normal(), -600.0),
        "sampler_logp": with_extremes(student_logp + 0.4 * draw.normal(), -600.0),
        "reverse_kl": with_extremes(draw.normal().abs(), 600.0),
        "total_variation": torch.where(draw.often(0.1), 0.25, draw.share()),
        "student_entropy": torch.where(draw.often(0.2), at_bound, entropies[0]),
        "teacher_entropy": torch.where(draw.often(0.2), at_bound, entropies[1]),
        "reward": with_extremes(draw.normal(), -600.0),
        "credited": with_extremes(torch.where(draw.often(0.1), 0.0, draw.normal()), -600.0),
        "advantage": advantage,
        "values": with_extremes(draw.normal(), -600.0),
        "bootstrap_value": torch.where(draw.often(0.5, size), draw.normal(size), 0.0),
        "verdict": verdict,
        # Of four, three, two and one response; the pair has equal verdicts.
        "group": torch.tensor([7, 7, 7, 7, 3, 3, 3, 0, 0, 5])[:size],
        "student_log_tail": torch.where(empty_tail, -math.inf, -3 * draw.normal().abs()),
        "teacher_log_tail": torch.where(empty_tail, -math.inf, -3 * draw.normal().abs()),
        "in_support": in_support,
        "extra_span": draw.one_of([0.0, 0.5, 1.0]),
        "extra_teacher_pass": draw.one_of([0.0, 0.1, 0.25, 0.8, 1.0, math.nan]),
        "extra_consensus": draw.one_of([0.0, 0.5, 1.0]),
        # Equals, for the order among them.
        "forward_kl": torch.where(draw.often(0.2), 0.5, draw.normal().abs()),
        "jensen_shannon": torch.where(draw.often(0.2), 0.25, math.log(2) * draw.share()),
    } | entries_of_step(draw)


def entries_of_step(draw: Draw) -> Fields:
    """What a step has of more than one entry of the vocabulary: supports and likeliest ids."""
    shape = (*draw.shape, VOCABULARY)
    student, teacher = (draw.normal(*shape).log_softmax(-1) for _ in range(2))
    top = student.argsort(-1, descending=True)
    # Half of the teachers prefer nearly what the student does.
    near = draw.often(0.5, *draw.shape, 1)
    close = (student + 0.1 * draw.normal(*shape)).log_softmax(-1)
    teacher = torch.where(near, close, teacher)
    order = draw.share(*shape).argsort(-1)
    support_ids = torch.where(draw.often(0.7, *shape), order, -1)
    # The student's likeliest are always there, whatever else is not.
    considered = (order[..., None] == top[..., None, :ENTRIES]).any(-1)
    support_ids = torch.where(considered, order, support_ids)
    return {
        "support_ids": support_ids,
        "teacher_support_logp": support.restrict(teacher, support_ids),
        "student_log_probs": support.restrict_by_tail(
            student, support_ids, tail="renormalise", side="student"
        ),
        "teacher_log_probs": support.restrict_by_tail(
            teacher, support_ids, tail="renormalise", side="teacher"
        ),
        "student_top_ids": top,
        "teacher_top_ids": teacher.argsort(-1, descending=True),
    }


def positions(seed: int) -> Fields:
    """Positions with a support each, `[N K]`, in a bucket of the rest every other time."""
    draw = Draw(seed, POSITIONS, VOCABULARY)
    tokens = torch.randint(VOCABULARY, (POSITIONS,), generator=draw.generator)
    # Zero mass on either side, but the student has some for the token: it chose it.
    free = torch.ones(POSITIONS, VOCABULARY, dtype=torch.bool).scatter(1, tokens[:, None], False)
    student = torch.where(free & draw.often(0.1), -math.inf, 1.5 * draw.normal())
    teacher = torch.where(draw.often(0.1), -math.inf, 1.5 * draw.normal())
    order = draw.share().argsort(-1)
    listed = torch.where(draw.often(0.7, POSITIONS, 1) & (order == tokens[:, None]), order, -1)
    listed = torch.where(draw.often(0.5), order, listed)[:, :ENTRIES]
    listed[0] = -1
    fields = {
        "tokens": tokens,
        "ids": listed,
        "student_logits": student,
        "teacher_logits": teacher,
        "student_logp": student.log_softmax(-1).gather(-1, tokens[:, None])[:, 0],
        "student_top_ids": student.argsort(-1, descending=True),
        "teacher_top_ids": teacher.argsort(-1, descending=True),
        "advantage": draw.normal(POSITIONS),
        "amount": torch.where(draw.often(0.1, POSITIONS), 0.0, 0.4 * draw.normal(POSITIONS).abs()),
    }
    fields |= on_support(fields, tail="bucket" if seed % 2 else "renormalise")
    score = routing.centred_log_ratio(fields["student_log_probs"], fields["teacher_log_probs"])
    # In tenths every third time, so that there are equals, and some at a margin.
    fields["routing_score"] = (10 * score).round() / 10 if seed % 3 == 0 else score
    others = routing.all_others(fields["support_ids"], tokens)
    fields["candidates"] = others & draw.often(0.6, *others.shape)
    wanted = torch.where(
        fields["candidates"] & (fields["student_support_logp"] > -math.inf),
        draw.share(*others.shape),
        0.0,
    )
    total = wanted.sum(-1, keepdim=True)
    fields["routing"] = torch.where(total > 0, wanted / total, 0.0)
    return fields


def on_support(fields: Fields, *, tail: str) -> Fields:
    """Both sides on the support by the tail rule, and as they are; the bucket's id is -1."""
    student, teacher = (fields[f"{side}_logits"].log_softmax(-1) for side in ("student", "teacher"))
    ids, longer = fields["ids"], (0, int(tail == "bucket"))

    def as_is(log_probs: Tensor) -> Tensor:
        entries = support.restrict(log_probs, ids)
        return torch.nn.functional.pad(entries, longer, value=-math.inf)

    return {
        "support_ids": torch.nn.functional.pad(ids, longer, value=-1),
        "student_log_probs": support.restrict_by_tail(student, ids, tail=tail, side="student"),
        "teacher_log_probs": support.restrict_by_tail(teacher, ids, tail=tail, side="teacher"),
        "student_support_logp": as_is(student),
        "teacher_support_logp": as_is(teacher),
    }


def drawn(name: str, seed: int) -> Fields:
    """What the formula is asked about; NaN at closed tokens if it knows which ones are."""
    takes = positional_names(ours(name))
    if name.startswith("routing.") or ("student_top_ids" in takes and "mask" not in takes):
        return positions(seed)
    fields = step(seed)
    if "mask" not in takes:
        return fields
    mask = fields["mask"]
    of_entries = mask.unsqueeze(-1)
    return {
        key: torch.where(mask if value.shape == mask.shape else of_entries, value, math.nan)
        if value.shape[:2] == mask.shape and value.is_floating_point()
        else value
        for key, value in fields.items()
    }


# --------------------------------------------------------------------------------------------
# Asking both


@dataclass(frozen=True)
class Compared:
    """What an oracle said, and by how much the formula is off, in units of the scale."""

    wanted: Array
    error: float


def compared(got: Tensor, wanted: npt.ArrayLike, scale: npt.ArrayLike = 0.0) -> Compared:
    """The scale is at least the value itself; infinities and NaN are right or wrong."""
    value, want = got.detach().double().numpy(), np.asarray(wanted, dtype=np.float64)
    assert value.shape == want.shape
    same = value == want
    with np.errstate(invalid="ignore", divide="ignore"):
        off = np.abs(value - want) / np.maximum(np.abs(want), scale)
    off = np.where(same, 0.0, np.where(np.isfinite(off), off, math.inf))
    return Compared(want.ravel(), float(off.max(initial=0.0)))


def ours(name: str) -> Callable[..., Any]:
    module, function = name.split(".")
    found: Callable[..., Any] = getattr(MODULES[module][0], function)
    return found


def theirs(name: str) -> Callable[..., Any]:
    module, function = name.split(".")
    found: Callable[..., Any] = getattr(MODULES[module][1], function)
    return found


ONE_RESPONSE = tuple(
    f"credit.{name}"
    for name in (
        *("bounded_return", "damped_future", "discounted", "future", "gae", "immediate"),
        *("length_normalised", "mean_future", "next_step", "rao_blackwell", "return_to_go"),
        *("scaled_by_turn", "windowed"),
    )
)
ONE_POSITION = (
    *(name for name in NAMES if name.startswith("routing.")),
    *("weight.top_k_overlap", "weight.overlap_above"),
)


def formula_says(name: str, fields: Fields, knobs: Knobs) -> Tensor:
    function = ours(name)
    result: Tensor = function(*(fields[key] for key in positional_names(function)), **knobs)
    return result


def oracle_says(name: str, fields: Fields, knobs: Knobs) -> Any:
    """Row by row where the oracle takes one response or one position."""
    function = theirs(name)
    parameters = inspect.signature(function).parameters
    known = {knob: value for knob, value in knobs.items() if knob in parameters}
    if "degrees_of_freedom_lost" in parameters:
        known["degrees_of_freedom_lost"] = 1  # our standard deviation is that of a sample
    columns = [
        fields["tokens" if key == "token" else key].numpy()
        for key, parameter in parameters.items()
        if parameter.kind is not parameter.KEYWORD_ONLY
    ]
    if name in ONE_RESPONSE or name in ONE_POSITION:
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return np.array([function(*row, **known) for row in rows], dtype=np.float64)
    return function(*columns, **known)


# --------------------------------------------------------------------------------------------
# Where readings differ: the same question, put to the oracle the formula's way


def just_below(field: str, bound: str | float) -> Callable[[Fields, Knobs], Fields]:
    """Our bound belongs to the lower side, so that two gates are complements; asked just below."""

    def asked(fields: Fields, knobs: Knobs) -> Fields:
        value = fields[field]
        at = torch.tensor(float(knobs[bound] if isinstance(bound, str) else bound))
        lower = torch.nextafter(at, torch.tensor(-math.inf))
        assert (value == at).any()
        return {**fields, field: torch.where(value == at, lower, value)}

    return asked


def with_student_mass(fields: Fields, _: Knobs) -> Fields:
    """A candidate that the student lacks cannot receive in ours, whatever the powers."""
    return {
        **fields,
        "candidates": fields["candidates"] & (fields["student_support_logp"] > -math.inf),
    }


def where_suppressed(fields: Fields, _: Knobs) -> Fields:
    """Ours is 0 for a positive advantage; the oracle, |A| (1 - pi), is for negative ones."""
    return {**fields, "advantage": fields["advantage"].clamp(max=0.0)}


ASKED: dict[str, Callable[[Fields, Knobs], Fields]] = {
    "weight.student_entropy_below": just_below("student_entropy", "nats"),
    "weight.teacher_entropy_below": just_below("teacher_entropy", "nats"),
    "weight.confident_wrong": just_below("student_entropy", "below_nats"),
    "weight.negative_advantage": just_below("advantage", 0.0),
    "routing.by_powers": with_student_mass,
    "routing.matched_suppression": where_suppressed,
}


# --------------------------------------------------------------------------------------------
# What an error is measured by, beside the value: the terms of a sum that may cancel


def of_the_ratio(fields: Fields) -> Array:
    """The oracle subtracts u g' from g, which are of the size of u log u and cancel."""
    log_ratio = (fields["teacher_logp"] - fields["student_logp"]).numpy()
    with np.errstate(invalid="ignore"):
        return np.asarray(1 + np.nan_to_num(np.exp(log_ratio) * (1 + np.abs(log_ratio))))


def of_the_sums(fields: Fields) -> Array:
    """All that a response may add up."""
    open_tokens = fields["mask"]
    parts = [fields[key].abs() for key in ("reward", "credited", "reverse_kl", "values")]
    sizes = torch.where(open_tokens, sum(parts), 0.0).sum(1, keepdim=True)
    return np.asarray((1 + sizes).numpy())


def of_the_step(fields: Fields) -> Array:
    """All that a response may add up, for the largest of them."""
    return np.asarray(of_the_sums(fields).max())


def of_the_credited(fields: Fields) -> Array:
    return np.asarray(1 + fields["credited"].abs().nan_to_num().numpy())


def of_the_student(fields: Fields) -> Array:
    return np.asarray(1 + fields["student_logp"].abs().numpy())


OF_THE_RATIO = tuple(
    f"reward.{name}_reward"
    for name in (
        *("forward_kl", "generalized_jsd", "skew_forward_kl", "skew_reverse_kl"),
        *("alpha_divergence", "total_variation"),
    )
)
SCALES: dict[str, Callable[[Fields], Array]] = {
    **dict.fromkeys(OF_THE_RATIO, of_the_ratio),
    **dict.fromkeys(ONE_RESPONSE, of_the_sums),
    "credit.bounded_return": lambda _: np.asarray(1.0),
    "credit.scaled_by_turn": lambda _: np.asarray(0.0),
    "credit.standardised": lambda _: np.asarray(1.0),
    "credit.length_neutral_future": of_the_step,
    "credit.position_mean": of_the_step,
    "credit.batch_mean": of_the_step,
    "credit.group_mean": of_the_step,
    "outcome.terminal_verdict": lambda fields: 30 + np.asarray(fields["reward"].abs().nan_to_num()),
    "outcome.add_group_advantage": of_the_credited,
    "outcome.mix_group_advantage": of_the_credited,
    "outcome.add_verdict_sign": of_the_credited,
    "outcome.deliberation_bonus": of_the_credited,
    # The means of responses, which may be large and alike, in units of what is added up.
    "outcome.add_verdict_residual": of_the_step,
    "outcome.margin_shift": of_the_step,
    # Differences of numbers of the size of one.
    "outcome.bounded_shift": lambda _: np.asarray(1.0),
    "reward.proximal_log_ratio": of_the_student,
    # Differences of numbers that may be close, of the size of one.
    "reward.power_reward": lambda _: np.asarray(1.0),
    "reward.squared_hellinger_reward": lambda _: np.asarray(1.0),
    # An exponential may underflow a little earlier than another.
    "outcome.sigmoid_gate": lambda _: np.asarray(1e-290),
    "outcome.agreement_gate": lambda _: np.asarray(1e-290),
    "weight.endorsement": lambda _: np.asarray(1e-290),
    "weight.sigmoid_position": lambda _: np.asarray(1e-290),
    "response.share_of_wrong": lambda _: np.asarray(1e-290),
}


# --------------------------------------------------------------------------------------------
# The comparisons


def by_name(name: str, seed: int) -> Iterator[Compared]:
    """The same arguments to both, by their names."""
    fields = drawn(name, seed)
    for knobs in KNOBS.get(name, [{}]):
        asked = ASKED[name](fields, knobs) if name in ASKED else fields
        scale = SCALES[name](fields) if name in SCALES else 0.0
        yield compared(formula_says(name, fields, knobs), oracle_says(name, asked, knobs), scale)


def on_open_tokens(name: str, seed: int) -> Iterator[Compared]:
    """Ours takes no mask, for the reduction leaves closed tokens out; the oracle gives 0 there."""
    fields = step(seed)
    got = torch.where(fields["mask"], formula_says(name, fields, {}), 0.0)
    yield compared(got, oracle_says(name, fields, {}))


def with_slopes(name: str, seed: int) -> Iterator[Compared]:
    """A surrogate's loss and its derivatives, by autograd and by hand."""
    fields = step(seed)
    leaves: Fields = {
        key: fields[key].clone().requires_grad_()
        for key in ("student_logp", "student_log_tail")
        if key in positional_names(ours(name))
    }
    for knobs in KNOBS.get(name, [{}]):
        loss = formula_says(name, {**fields, **leaves}, knobs)
        slopes = torch.autograd.grad(loss.sum(), list(leaves.values()))
        want = oracle_says(name, fields, knobs)
        by_hand = [getattr(want, key) for key in ("slope", "tail_slope") if hasattr(want, key)]
        yield compared(loss, want.loss)
        for slope, wanted in zip(slopes, by_hand, strict=True):
            yield compared(slope, wanted)


def with_differences(name: str, seed: int) -> Iterator[Compared]:
    """A penalty's value, and its slope against differences of the oracle, which is linear in
    pieces: exact away from the kinks, for a step that is a power of two."""
    fields, move = step(seed), 2.0**-20
    entropy = fields["student_entropy"]
    for knobs in KNOBS.get(name, [{}]):
        leaf = entropy.clone().requires_grad_()
        loss = formula_says(name, {"student_entropy": leaf}, knobs)
        yield compared(loss, oracle_says(name, fields, knobs))
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
        up, down = (
            oracle_says(name, {"student_entropy": entropy + by}, knobs) for by in (move, -move)
        )
        smooth = (entropy - knobs.get("nats", math.inf)).abs().numpy() > move
        difference = (up - down) / (2 * move)
        # Rounding of the difference, over the step: 2e-16 / 2^-20.
        yield compared(slope[torch.from_numpy(smooth)], np.round(difference[smooth], 8), scale=1.0)


def by_count(name: str, seed: int) -> Iterator[Compared]:
    """Ours keeps a number of tokens, equals by their place; the oracle all above a quantile.

    There is a share for every number at which the two agree; values differ, so nothing is tied.
    Of equals at the quantile the oracle keeps all, so there the comparison leaves them out.
    """
    fields = drawn(name, seed)
    value = {"keep_large_divergence": "reverse_kl", "keep_unlikely": "student_logp"}.get(
        name.removeprefix("selection."), "student_entropy"
    )
    distinct = Draw(seed, *fields["mask"].shape).normal().abs()
    fields[value] = torch.where(fields["mask"], distinct, math.nan)
    count = int(fields["mask"].sum())
    yield compared(formula_says(name, fields, {"share": 1.0}), fields["mask"])
    for kept in range(1, count + 1):
        # Between the bounds of both, round(share n) = kept and 1 + floor(share (n - 1)) = kept.
        share = min((kept - 0.25 if kept <= 0.75 * count else kept + 0.25) / count, 1.0)
        got = formula_says(name, fields, {"share": share})
        assert int(got.sum()) == kept
        yield compared(got, oracle_says(name, fields, {"share": share}))
    tied = {**fields, value: torch.where(fields["mask"], (4 * distinct).round(), math.nan)}
    for share in (0.1, 0.4, 0.7) if count else ():
        got, want = (say(name, tied, {"share": share}) for say in (formula_says, oracle_says))
        kept_values = tied[value][torch.from_numpy(want == 1)]
        keeps_low = name in ("selection.keep_low_entropy", "selection.keep_unlikely")
        at_the_quantile = tied[value] == (kept_values.max() if keeps_low else kept_values.min())
        off = ~at_the_quantile
        assert (got[at_the_quantile] <= torch.from_numpy(want)[at_the_quantile]).all()
        yield compared(got[off], want[off.numpy()])


def by_rounded_share(name: str, seed: int) -> Iterator[Compared]:
    """Ours keeps round(share n) tokens, at least one; the oracle rounds up, so at most one more."""
    fields = drawn(name, seed)
    counts = fields["mask"].sum(1)
    for knobs in KNOBS[name]:
        exact = knobs["share"] * counts.double()
        rounded_up = (
            (exact - exact.floor() >= 0.5) | (exact == exact.floor()) | (exact < 1)
        ).numpy()
        got, want = formula_says(name, fields, knobs), oracle_says(name, fields, knobs)
        yield compared(got[torch.from_numpy(rounded_up)], want[rounded_up])
        one_less = got[torch.from_numpy(~rounded_up)].numpy()
        assert (want[~rounded_up].sum(1) - one_less.sum(1) == 1).all()
        assert (one_less <= want[~rounded_up]).all()


def with_finite_drift(name: str, seed: int) -> Iterator[Compared]:
    """After a token without teacher mass all drift is behind in ours, inf / inf in the oracle."""
    fields = drawn(name, seed)
    fields["teacher_logp"] = fields["teacher_logp"].nan_to_num(math.nan, neginf=-700.0)
    for knobs in KNOBS[name]:
        yield compared(formula_says(name, fields, knobs), oracle_says(name, fields, knobs))


def of_shared_entries(name: str, seed: int) -> Iterator[Compared]:
    """Ours takes the mean over the entries that both sides have, conditional on them, and gives
    -inf to the others; the oracle takes rows as they are, so it gets those entries normalised."""
    fields = positions(seed)
    for entries in ("log_probs", "support_logp"):
        students, teachers = (fields[f"{side}_{entries}"] for side in ("student", "teacher"))
        got = ours(name)(students, teachers)
        for row in range(POSITIONS):
            student, teacher = students[row], teachers[row]
            shared = (student > -math.inf) & (teacher > -math.inf)
            assert (got[row][~shared] == -math.inf).all()
            if not shared.any():
                continue
            among = (side[shared].log_softmax(-1).numpy() for side in (student, teacher))
            size = float(student[shared].abs().max() + teacher[shared].abs().max())
            yield compared(got[row][shared], theirs(name)(*among), 1 + size)
            if shared.all() and entries == "log_probs":
                yield compared(got[row], theirs(name)(student.numpy(), teacher.numpy()), 1 + size)


def of_plain_suppression(name: str, seed: int) -> Iterator[Compared]:
    """The share that misses the candidates, of the oracle's plain suppression as a transfer."""
    fields = positions(seed)
    want, rest = np.zeros(POSITIONS), np.zeros(POSITIONS)
    for row, token in enumerate(fields["tokens"].tolist()):
        student = fields["student_logits"][row].numpy()
        _, spread = routing_oracle.suppression_as_transfer(student, token, advantage=-1.0)
        receives = fields["support_ids"][row][fields["candidates"][row]].tolist()
        want[row] = 1 - sum(spread[v] for v in receives)
        rest[row] = -math.expm1(float(fields["student_logp"][row]))
    yield compared(formula_says(name, fields, {}), want, 1 / rest)


def with_logit_gradients(name: str, seed: int) -> Iterator[Compared]:
    """A transfer's loss and its gradient on the logits, through log_softmax and the tail rule."""
    fields = positions(seed)
    leaf = fields["student_logits"].clone().requires_grad_()
    live = on_support(
        {**fields, "student_logits": leaf}, tail="bucket" if seed % 2 else "renormalise"
    )
    loss = formula_says(name, {**fields, "student_log_probs": live["student_log_probs"]}, {})
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    loss = loss.detach()
    student = fields["student_log_probs"]
    for row in range(POSITIONS):
        ids, token = fields["support_ids"][row].tolist(), int(fields["tokens"][row])
        if token not in ids:  # the oracle needs the token; ours moves nothing without it
            assert float(loss[row]) == 0
            assert (gradient[row] == 0).all()
            continue
        share, amount = fields["routing"][row].numpy(), float(fields["amount"][row])
        want = theirs(name)(student[row].numpy(), ids, token, share, amount, vocab_size=VOCABULARY)
        value = want.loss
        if name == "routing.bounded_cross_entropy":  # ours is less the entropy of the target
            value -= entropy_of_target(student[row].exp().tolist(), ids, token, share, amount)
        yield compared(loss[row], value, scale=1.0)
        yield compared(gradient[row], want.gradient, scale=max(amount, 0.1))


def entropy_of_target(
    student: list[float], ids: list[int], token: int, share: Array, amount: float
) -> float:
    own: float = student[ids.index(token)]
    moved = min(amount, own) if share.any() else 0.0
    target: list[float] = [
        mass + moved * part for mass, part in zip(student, share.tolist(), strict=True)
    ]
    target[ids.index(token)] = own - moved
    return -sum(mass * math.log(mass) for mass in target if mass > 0)


Comparison = Callable[[str, int], Iterator[Compared]]

ANOTHER_WAY: dict[str, Comparison] = {
    "credit.immediate": on_open_tokens,
    **{name: with_slopes for name in NAMES if name.startswith("surrogate.")},
    **{name: with_differences for name in NAMES if name.startswith("regulariser.")},
    "selection.keep_high_entropy": by_count,
    "selection.keep_low_entropy": by_count,
    "selection.keep_large_divergence": by_count,
    "selection.keep_unlikely": by_count,
    "weight.prefix_share": by_rounded_share,
    "weight.cumulative_drift": with_finite_drift,
    "routing.centred_log_ratio": of_shared_entries,
    "routing.leak": of_plain_suppression,
    "routing.linear_transfer": with_logit_gradients,
    "routing.pairwise_logistic": with_logit_gradients,
    "routing.bounded_cross_entropy": with_logit_gradients,
}
"""Every name that is not here is compared `by_name`."""


def comparisons(name: str) -> list[Compared]:
    compare = ANOTHER_WAY.get(name, by_name)
    return [found for seed in SEEDS for found in compare(name, seed)]


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Also for formulas of integers, whose result has the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_is_the_oracles(name: str) -> None:
    found = comparisons(name)
    assert found
    assert max(one.error for one in found) <= BOUND
    # Otherwise the cases would not tell formulas apart.
    values = {value for one in found for value in one.wanted.tolist()}
    assert (len(values) > 1) == (name not in CONSTANT)


def test_every_formula_module_is_held_against_something() -> None:
    elsewhere = {"divergence", "support", "reduce", "numerics"}  # in the tests of their own
    assert {module.name for module in pkgutil.iter_modules(opd.formula.__path__)} == (
        set(MODULES) | elsewhere
    )


def test_every_exception_is_about_a_formula() -> None:
    assert set(KNOBS) | set(ASKED) | set(SCALES) | set(ANOTHER_WAY) <= set(NAMES)


# --------------------------------------------------------------------------------------------
# Whole routes


def route(
    logits: Tensor, teacher: Tensor, tokens: Tensor, special_ids: Tensor, knobs: Knobs
) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. 31-36 put together of formulas: the shares by id, the amount and the loss."""
    sizes = {key: knobs[key] for key in ("teacher_k", "student_k")}
    student, view = logits.log_softmax(-1), teacher.log_softmax(-1)
    of_view, of_student = (side.detach().argsort(-1, descending=True) for side in (view, student))
    ids = support.routing_support(of_view, of_student, tokens, special_ids, **sizes)
    inside = support.restrict_by_tail(student, ids, tail="renormalise", side="student")
    wanted = support.restrict_by_tail(view, ids, tail="renormalise", side="teacher")
    score = routing.centred_log_ratio(inside, wanted)
    if "min_probability" in knobs:
        chosen = routing.endorsed_or_likely(
            *(score, ids, tokens, of_view, of_student, support.restrict(student, ids).detach()),
            min_probability=knobs["min_probability"],
            **sizes,
        )
    else:
        chosen = routing.endorsed_and_reachable(score, ids, tokens, of_view, of_student, **sizes)
    share = routing.by_score(score, chosen, temperature=knobs.get("temperature", 1.0))
    is_open = routing.overrated(score, ids, tokens) * routing.has_candidates(chosen)
    amount = is_open * routing.excess_score(score, ids, tokens)
    by_id = torch.zeros_like(view).scatter_add(-1, ids.clamp(min=0), share)
    return by_id, amount, routing.pairwise_logistic(inside, ids, tokens, share, amount)


@pytest.mark.parametrize(
    "knobs",
    [
        {"teacher_k": 4, "student_k": 4},
        {"teacher_k": 3, "student_k": 6, "temperature": 0.5},
        {"teacher_k": 5, "student_k": 1, "min_probability": 0.05},
    ],
)
@pytest.mark.parametrize("seed", ORDINARY)
def test_the_counterfactual_route_is_that_of_its_equations(seed: int, knobs: Knobs) -> None:
    draw, special = Draw(seed, POSITIONS, VOCABULARY), [2, 5]
    logits, teacher = 1.5 * draw.normal(), 1.5 * draw.normal()
    tokens = torch.randint(VOCABULARY, (POSITIONS,), generator=draw.generator)
    leaf = logits.clone().requires_grad_()
    by_id, amount, loss = route(leaf, teacher, tokens, torch.tensor(special), knobs)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    moved = 0
    for row, token in enumerate(tokens.tolist()):
        want = routing_oracle.counterfactual_route(
            logits[row].numpy(), teacher[row].numpy(), token, special_ids=special, **knobs
        )
        shares = [want.share.get(v, 0.0) for v in range(VOCABULARY)]
        assert compared(by_id[row], shares, scale=1.0).error <= BOUND
        assert compared(amount[row], want.amount, scale=1.0).error <= BOUND
        assert compared(loss[row], want.loss, scale=1.0).error <= BOUND
        assert compared(gradient[row], want.gradient, scale=1.0).error <= BOUND
        moved += want.amount > 0
    assert 0 < moved < POSITIONS


@pytest.mark.parametrize("seed", ORDINARY)
def test_the_member_that_is_consistent_with_the_reverse_kl_is_the_oracles(seed: int) -> None:
    draw = Draw(seed, VOCABULARY)
    logits, teacher = 1.5 * draw.normal(), 1.5 * draw.normal()
    ids = torch.arange(VOCABULARY)
    for token in range(VOCABULARY):
        leaf, chosen = logits.clone().requires_grad_(), torch.tensor(token)
        student, view = leaf.log_softmax(-1), teacher.log_softmax(-1)
        score = routing.centred_log_ratio(student, view)
        share = routing.by_powers(
            score,
            routing.raised(score, ids, chosen, margin=0.0),
            *(student.detach(), view),
            teacher_power=0.0,
            student_power=1.0,
            score_power=1.0,
        )
        amount = routing.excess_score(score, ids, chosen)
        loss = routing.linear_transfer(student, ids, chosen, share, amount)
        (gradient,) = torch.autograd.grad(loss, leaf)
        want = routing_oracle.exact_transfer(logits.numpy(), teacher.numpy(), token)
        assert compared(gradient, want, scale=1.0).error <= BOUND

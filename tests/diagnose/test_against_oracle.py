"""Every diagnostic against its literal definition in `tests/reference/diagnostics.py`.

The definitions were written from the survey independently of the code, one row and one token at a
time. Both are asked about the same random rows in float64: without mass here and there, with ties,
responses with gaps (NaN at closed tokens), of one token and of none, verdicts that are missing or
exactly at the bound, and no rows at all.

The definitions divide infinity by infinity where a log ratio is infinite; what the code says there
stands in `test_limits.py`, and such numbers are asked about here only where a sum or a rank is
defined with them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd import catalog, diagnose
from tests.reference import diagnostics as oracle

BOUND = 1e-12
VOCABULARY = 9
SIZES = (40, 40, 25, 7, 1, 0)
"""Rows, by seed."""

Fields = Mapping[str, Any]
Question = tuple[tuple[Any, ...], dict[str, Any]]


def rows(seed: int) -> Fields:
    generator = torch.Generator().manual_seed(seed)
    size = SIZES[seed]

    def share(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def distribution(near: Tensor | None = None) -> Tensor:
        logits = 2 * normal(size, VOCABULARY) if near is None else near
        logits = torch.where(share(size, 1) < 0.4, logits.round(), logits)  # ties, also at k
        hidden = (share(size, VOCABULARY) < 0.5) & (share(size, 1) < 0.5)
        hidden[:, seed % VOCABULARY] = False
        return logits.masked_fill(hidden, -math.inf).log_softmax(-1)

    student = distribution()
    student[::10] = torch.eye(VOCABULARY, dtype=torch.float64)[seed].log()  # certain of one token
    close = share(size, 1) < 0.5
    near = student.nan_to_num(neginf=-9.0) + 0.2 * normal(size, VOCABULARY)
    teacher = torch.where(close, distribution(near), distribution())
    same = share(size, 1) < 0.1
    teacher = torch.where(same, student, teacher)
    weights = student.exp() if size else torch.ones(1, 1)
    tokens = torch.multinomial(weights, 1, generator=generator)[:size, 0]
    after = (student + 0.3 * normal(size, VOCABULARY)).log_softmax(-1)

    def at(log_probs: Tensor) -> Tensor:
        return log_probs.gather(-1, tokens[:, None])[:, 0]

    return {
        "student": student,
        "teacher": teacher,
        "teachers": torch.stack([student, teacher, distribution()]),
        "whole": (2 * normal(3, size, VOCABULARY)).log_softmax(-1),
        "after": after,
        "tokens": tokens,
        "student_logp": at(student),
        "teacher_logp": at(teacher),
        "old_logp": at(after),
        "r": at(teacher) - at(student),
        "finite": torch.where(share(size) < 0.1, 0.0, normal(size)),
        "size": torch.where(share(size) < 0.1, 0.0, normal(size).abs()),
        "values": normal(size),
        "ratio": torch.where(share(size) < 0.2, 0.5, normal(size).exp()),
        "flat": torch.full((size,), 0.1, dtype=torch.float64),
        "draws": normal(min(size, 6), 11),
    }


def responses(seed: int) -> Fields:
    generator = torch.Generator().manual_seed(100 + seed)
    size, length = (6, 13) if SIZES[seed] else (0, 13)
    shape = size, length
    mask = torch.rand(shape, generator=generator) < 0.7
    if size:
        mask[0], mask[1], mask[2], mask[3] = True, False, False, False
        mask[2, 4] = True  # of one token
        mask[3, [2, 9]] = True  # of two
        if seed % 2:
            mask[:, 9:] = False
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    several = (torch.rand(shape, generator=generator) < 0.05, value)
    some = 12
    confidence = torch.rand(some, generator=generator, dtype=torch.float64)
    at_edge = torch.rand(some, generator=generator) < 0.4
    confidence = torch.where(at_edge, (10 * confidence).round() / 10, confidence)
    choices = torch.tensor([0.0, 0.3, 0.5, 1.0, 1.0, 0.0, math.nan], dtype=torch.float64)
    picked = torch.randint(7, (2, some), generator=generator)
    score = (4 * torch.randn(some, generator=generator, dtype=torch.float64)).round() / 4
    score[0] = math.nan
    many = some if SIZES[seed] else 0
    return {
        "mask": mask,
        "value": value.masked_fill(~mask, math.nan),
        "infinite": torch.where(several[0], -math.inf, several[1]).masked_fill(~mask, math.nan),
        "level": torch.full(shape, 0.1, dtype=torch.float64).masked_fill(~mask, math.nan),
        "ids": torch.randint(3, shape, generator=generator),
        "confidence": confidence[:many],
        "score": score[:many],
        "falling": score.nan_to_num(-math.inf)[:many],
        "verdict": choices[picked[0]][:many],
        "other": choices[picked[1]][:many],
        "solved": (picked[0] > 2)[:many],
        "margins": (2 * score.nan_to_num(1.5) - 4.0 * (torch.arange(some) > 7))[:many],
        "reasons": ["eos", "length", "eos", "turns", "length"][: size and 5],
        "texts": ["I think so", "rethinking", "STRASSE perhaps", "THINK!", ""][: size and 5],
    }


def both(fields: Fields, **knobs: Any) -> Question:
    return (fields["student"], fields["teacher"]), knobs


def every_k(fields: Fields) -> Iterator[Question]:
    yield from (both(fields, k=k) for k in (2, 4, VOCABULARY))


def asked(*names: str, **knobs: Any) -> Callable[[Fields], Iterator[Question]]:
    def questions(fields: Fields) -> Iterator[Question]:
        yield tuple(fields[name] for name in names), knobs

    return questions


def several(
    *questions: Callable[[Fields], Iterator[Question]],
) -> Callable[[Fields], Iterator[Question]]:
    def found(fields: Fields) -> Iterator[Question]:
        for each in questions:
            yield from each(fields)

    return found


def candidates(fields: Fields, k: int = 3) -> Tensor:
    """From the definition, so that each function is compared by itself."""
    listed = oracle.reachable(
        fields["student"].numpy(), fields["teacher"].numpy(), fields["tokens"].numpy(), k=k
    )
    return torch.from_numpy(listed).reshape(fields["student"].shape)


def with_candidates(*names: str, **knobs: Any) -> Callable[[Fields], Iterator[Question]]:
    def questions(fields: Fields) -> Iterator[Question]:
        known = {**fields, "candidates": candidates(fields)}
        yield tuple(known[name] for name in names), knobs

    return questions


def in_bins(*names: str) -> Callable[[Fields], Iterator[Question]]:
    return several(*(asked(*names, bins=bins) for bins in (1, 3, 4, 20)))


ENDS = (([0],), ([1, 4],), ([2, 2, 8],), ([],))
TEXTS: list[list[int]] = [[1, 2], [3], [], [4, 4]]

ASKED: dict[str, Callable[[Fields], Iterator[Question]]] = {
    "top_k_overlap": every_k,
    "student_overlap_mass": every_k,
    "teacher_overlap_mass": every_k,
    "teacher_top_mass": every_k,
    "overlap_advantage": every_k,
    "entropy_gap": asked("student", "teacher"),
    "teacher_surprise": asked("teacher_logp"),
    "excess_surprise": asked("teacher_logp", "teacher"),
    "teacher_confidence": asked("teacher"),
    "teacher_margin": every_k,
    "support_gap": every_k,
    "dispersion_by_bin": several(in_bins("value", "mask"), in_bins("level", "mask")),
    "profile": several(
        *(
            asked(name, "mask", edges=edges)
            for name in ("value", "infinite")
            for edges in ([0, 4, 5, 13], [2, 6], [0, 100, 200])
        )
    ),
    "drift_budget": several(asked("value", "mask"), asked("infinite", "mask")),
    "change_point": several(asked("margins"), asked("values"), asked("flat")),
    "suffix_fade": asked("value", "mask"),
    "first_token_spike": asked("value", "mask"),
    "eos_divergence": lambda fields: (((*both(fields)[0], *ids), {}) for ids in ENDS),
    "excess_id_ratio": several(asked("r", "tokens", top=3), asked("finite", "tokens", top=50)),
    "retokenised_share": lambda fields: iter(
        [((TEXTS, [[1, 2], [3, 0], [], [4]]), {}), (([], []), {}), ((TEXTS, TEXTS), {})]
    ),
    "cache_drift": several(asked("student", "after"), asked("student_logp", "teacher_logp")),
    "reverse_kl": asked("student", "teacher"),
    "forward_kl": asked("student", "teacher"),
    "log_ratio": asked("student_logp", "teacher_logp"),
    "quantiles": several(
        asked("r"), asked("finite", shares=(0.0, 0.3, 1.0)), asked("flat", shares=(0.7,))
    ),
    "negative_share": several(asked("r"), asked("finite")),
    "negative_mass": several(asked("finite"), asked("flat")),
    "marginal_info": asked("size"),
    "mean_entropy": asked("student"),
    "pairwise_kl": several(asked("teachers"), asked("whole")),
    "self_distillation_residual": asked("finite", "values"),
    "gradient_proxy": asked("student", "tokens"),
    "effective_share": asked("size"),
    "top_share": several(
        asked("size"), *(asked("size", share=share) for share in (0.07, 0.3, 1.0))
    ),
    "disagreement_map": several(
        asked("size", "values", "finite"),
        *(asked("finite", "flat", "values", bins=bins) for bins in (1, 3, 7)),
    ),
    "cosine": several(asked("finite", "values"), asked("size", "flat")),
    "explained_variance": several(asked("values", "finite"), asked("values", "flat")),
    "td_residual_by_bin": in_bins("value", "mask"),
    "gradient_variance": asked("draws"),
    "reachable": lambda fields: (
        ((*both(fields)[0], fields["tokens"]), {"k": k, "margin": margin})
        for k in (1, 3, VOCABULARY)
        for margin in (0.0, 1e-6, 0.5)
    ),
    "routable_share": several(
        *(
            with_candidates(name, "candidates", "teacher", mass=mass)
            for name in ("r", "finite")
            for mass in (0.0, 0.2, 0.9)
        )
    ),
    "leak": with_candidates("student", "candidates", "tokens"),
    "realised_routing": with_candidates("student", "after", "candidates", "tokens"),
    "align_auc": several(asked("score", "verdict"), asked("falling", "verdict")),
    "outcome_correlation": several(asked("score", "verdict"), asked("verdict", "other")),
    "split_delta": asked("solved", "verdict"),
    "privilege_gap": asked("verdict", "other"),
    "recoverability": asked("verdict", "other"),
    "calibration_error": several(
        *(asked("confidence", "verdict", bins=bins) for bins in (1, 10, 7))
    ),
    "hedging_share": lambda fields: iter(
        [((fields["texts"], words), {}) for words in (["think"], ["straße", "maybe"], ["!"])]
    ),
    "importance_ratio": several(
        asked("old_logp", "student_logp"), asked("student_logp", "teacher_logp")
    ),
    "kl_from_samples": several(
        asked("old_logp", "student_logp"), asked("student_logp", "teacher_logp")
    ),
    "log_mismatch": several(asked("old_logp", "student_logp"), asked("student", "after")),
    "masked_share": asked("ratio", low=0.5, high=2.0),
    "importance_mass_masked": several(
        asked("ratio", low=0.5, high=2.0), asked("ratio", low=0.6, high=0.6)
    ),
    "length_mean": asked("mask"),
    "truncated_share": asked("reasons"),
    "repeated_ngrams": several(*(asked("ids", "mask", n=n) for n in (1, 2, 3, 8))),
}


def residual(loss: Any, gradient: Any) -> tuple[float, float]:
    largest = (max(map(abs, each.tolist()), default=math.nan) for each in (loss, gradient))
    one, other = largest
    return one, other


OWN: Mapping[str, Callable[..., Any]] = {"self_distillation_residual": residual}
"""Definitions of what the survey says in words alone."""


def definition(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = OWN[name] if name in OWN else getattr(oracle, name)
    return found


def plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def flat(found: Any) -> list[Any]:
    """Every number of an answer, in its order, None as it is."""
    if isinstance(found, Mapping):
        return [*found, *flat(list(found.values()))]
    if isinstance(found, Tensor | np.ndarray):
        return [tuple(found.shape), *np.asarray(found, dtype=np.float64).ravel().tolist()]
    if isinstance(found, list | tuple):
        return [number for each in found for number in flat(each)]
    return [found]


def apart(found: Any, wanted: Any) -> float:
    """How far two numbers are from each other, in units of the larger of 1 and the wanted one."""
    if found is None or wanted is None or isinstance(wanted, tuple):
        return 0.0 if found == wanted else math.inf
    if found == wanted or (math.isnan(found) and math.isnan(wanted)):
        return 0.0
    off = abs(found - wanted) / max(1.0, abs(wanted))
    return off if math.isfinite(off) else math.inf


def test_every_diagnostic_has_a_definition_and_is_asked_about() -> None:
    assert set(ASKED) == set(catalog.diagnostics())
    for name in ASKED:
        ours = inspect.signature(getattr(diagnose, name)).parameters
        theirs = inspect.signature(definition(name)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]


@pytest.mark.parametrize("seed", range(len(SIZES)))
@pytest.mark.parametrize("name", catalog.diagnostics())
def test_a_diagnostic_is_its_definition(name: str, seed: int) -> None:
    fields = {**rows(seed), **responses(seed)}
    questions = list(ASKED[name](fields))
    assert questions
    for arguments, knobs in questions:
        with np.errstate(invalid="ignore"):
            wanted = flat(definition(name)(*map(plain, arguments), **knobs))
        found = flat(getattr(diagnose, name)(*arguments, **knobs))
        if not SIZES[seed] and name in ("reachable", "pairwise_kl"):
            found, wanted = found[1:], wanted[1:]  # of no rows a list knows no columns
        assert len(found) == len(wanted)
        errors = [apart(one, other) for one, other in zip(found, wanted, strict=True)]
        assert max(errors, default=0.0) <= BOUND, (arguments, knobs, found, wanted)


def test_the_random_rows_have_what_they_are_said_to_have() -> None:
    fields = {**rows(0), **responses(0)}
    student, teacher = fields["student"], fields["teacher"]
    assert (student == -math.inf).any()
    assert ((student == -math.inf) != (teacher == -math.inf)).any()
    order = student.sort(-1, descending=True).values
    assert ((order[:, 3] == order[:, 4]) & order[:, 4].isfinite()).any()  # a tie at k = 4
    assert (fields["r"] == -math.inf).any()
    assert (fields["r"] == 0).any()
    lengths = fields["mask"].sum(1).tolist()
    assert {0, 1, 2, 13} <= set(lengths)
    assert fields["verdict"].isnan().any()
    assert (fields["verdict"] == 0.5).any()
    certain = fields["student_logp"] == 0
    assert certain.any()
    listed = candidates(fields).any(-1)
    assert (listed & certain).any()
    assert listed.any()
    assert not listed.all()
    points = {diagnose.change_point({**rows(s), **responses(s)}["margins"]) for s in range(5)}
    assert points - {None}

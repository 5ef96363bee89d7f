"""The head against `tests.reference.heads`, which holds every logit and differentiates through all.

Both read the same operands, rounded as they are given. In float32 the head may be off by 1e-6 of
the norm of the answer, for a loss as for each gradient. Students and views disagree by about a nat,
so that answers are large beside the rounding of what they come from. Where one is nevertheless a
small difference of large numbers (terms that cancel, a mass that is one minus nearly one), no
float32 head can meet the bound, whatever it does: `well_conditioned` takes other random operands
if rounding operands and log-probabilities once moves the exact answer by a good part of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.errors import TeacherError
from opd.formula import (
    credit,
    divergence,
    outcome,
    regulariser,
    reward,
    routing,
    selection,
    support,
    surrogate,
    weight,
)
from opd.head import HeadOutput, linear_head
from opd.objective import Dense, Objective, Regulariser, Routed, Sampled, Term
from opd.rollout.pack import pack_rollout, split, with_token
from opd.types import Batch, Bound, FieldKey, TeacherScores, Unembedding, pack_rows
from tests.builders import DATA, STUDENT, TOOL, rollout_of
from tests.reference.heads import NaiveHead, logits_of, naive_head, naive_signal

T = TypeVar("T")
SINGLE_BOUND = 1e-6
DOUBLE_BOUND = 1e-12
SIZE, WIDTH = 24, 6
K, TEACHER_K, STUDENT_K = 6, 9, 8
SPECIAL = (2, 5)
EVERYTHING = 2**28
SOME = 20 * 4 * SIZE
CHUNKS = (SOME, EVERYTHING)
"""Of the rows of `LONG`, in single precision: several chunks of several rows, and one of all. A
chunk of one row, which takes its time, is for the tests of few rows."""

# --------------------------------------------------------------------------------------------
# Worlds: operands of the head, and what the views answer to their rows


@dataclass(frozen=True)
class World:
    """Operands of one call of the head."""

    hidden: Tensor
    unembedding: Unembedding
    batch: Batch

    def to(self, dtype: torch.dtype) -> World:
        """Every floating operand rounded to this type."""

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(dtype)
            if isinstance(value, Unembedding):
                return replace(value, weight=cast(value.weight), bias=cast(value.bias))
            if isinstance(value, TeacherScores):
                return replace(value, **{name: cast(part) for name, part in vars(value).items()})
            if isinstance(value, Mapping):
                return {name: cast(part) for name, part in value.items()}
            return value

        token = replace(
            self.batch.token,
            **{name: cast(value) for name, value in vars(self.batch.token).items()},
        )
        batch = replace(self.batch, token=token)
        return World(self.hidden.to(dtype), cast(self.unembedding), batch)

    def rounded_once(self, seed: int) -> World:
        """Every operand that the logits come from, off by half a unit in the last float32 place."""
        draw = torch.Generator().manual_seed(seed)

        def shake(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.double() * (1 + 2.0**-24 * normal(draw, *value.shape))
            if isinstance(value, Unembedding):
                return replace(value, weight=shake(value.weight), bias=shake(value.bias))
            if isinstance(value, TeacherScores):
                return replace(value, **{name: shake(part) for name, part in vars(value).items()})
            return value

        views = {name: shake(scores) for name, scores in self.batch.token.views.items()}
        batch = with_token(self.batch, views=views)
        return World(shake(self.hidden), shake(self.unembedding), batch)


def unembedding(
    draw: torch.Generator,
    size: int,
    width: int,
    *,
    spread: float = 1.5,
    padding: int = 0,
    bias: bool = False,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
) -> Unembedding:
    """Logits that spread by about `spread` for hidden states of unit spread."""
    rows = size + padding
    return Unembedding(
        spread / math.sqrt(width) / logit_scale * normal(draw, rows, width),
        size,
        0.3 * normal(draw, rows) if bias else None,
        logit_scale,
        soft_cap,
    )


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def states(draw: torch.Generator, rows: int, width: int) -> Tensor:
    """Rows with much in common, so that what is summed over them does not cancel."""
    return (normal(draw, rows, width) + normal(draw, width)) / math.sqrt(2)


Kinds = Mapping[str, str] | str

WHOLE = ("hidden", "transformed", "log_probs", "combination")
"""Kinds of views that know a distribution over the student's vocabulary."""

MAPPED = ("mapped_hidden", "mapped_log_probs")
"""Kinds of views that know one over a vocabulary of their own."""

LISTS = ("top", "ids", "top_and_ids")
"""Kinds of views that answer by ids."""


def world(
    seed: int,
    kinds: Kinds = "hidden",
    *,
    lengths: Sequence[int] = (4, 0, 3, 1),
    writers: Sequence[int] = (STUDENT,),
    size: int = SIZE,
    width: int = WIDTH,
    gaps: bool = True,
    merge_ids: tuple[tuple[int, ...], ...] = (),
    row_index: bool = False,
    dtype: torch.dtype = torch.float64,
    **own: Any,
) -> World:
    """Random operands: `own` is the student's unembedding, `kinds` what each view answers."""
    draw = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths, default=0))
    inside = torch.arange(shape[1]) < torch.tensor(lengths, dtype=torch.long).unsqueeze(1)
    tool = torch.rand(shape, generator=draw) < (0.2 if gaps else 0.0)
    tool[:, :1] = False
    writer = torch.tensor([writers[b % len(writers)] for b in range(shape[0])]).unsqueeze(1)
    written = torch.where(tool, TOOL, writer.expand(shape))
    mask = inside & ~tool
    rows = int(mask.sum())
    hidden = states(draw, rows, width)
    head = unembedding(draw, size, width, **own)
    logits = logits_of(hidden, head)  # the student chooses its own tokens
    tokens = torch.randint(size, shape, generator=draw)
    tokens[mask] = logits.softmax(-1).multinomial(1, generator=draw)[:, 0]
    rollout = rollout_of(
        tokens,
        mask,
        torch.where(inside, written, 0),
        verdict=torch.randint(2, shape[:1], generator=draw).double(),
        group=torch.arange(shape[0]) // 2,
    )
    extra = {"span": torch.randint(2, shape, generator=draw).double()}
    batch = pack_rollout(rollout, pad_id=0, special_ids=SPECIAL, merge_ids=merge_ids, extra=extra)
    gone = [v for _, *others in merge_ids for v in others]
    # An older student's: the supports are read off the batch, not made anew.
    older = logits + normal(draw, rows, size)
    older[:, gone] = -math.inf
    batch = with_token(
        batch,
        student_top_ids=older.argsort(-1, descending=True)[:, : size - len(gone)],
        old_logp=-0.5 - 2.0 * torch.rand(shape, generator=draw, dtype=torch.float64),
    )
    views: dict[str, TeacherScores] = {}
    for name, kind in (kinds if isinstance(kinds, Mapping) else {"teacher": kinds}).items():
        views |= view(draw, name, kind, batch, size, row_index=row_index)
    return World(hidden, head, with_token(batch, views=views)).to(dtype)


def view(
    draw: torch.Generator, name: str, kind: str, batch: Batch, size: int, *, row_index: bool
) -> dict[str, TeacherScores]:
    """The view `name`, and the views it is combined from."""
    rows = len(batch.row_index)
    index, asked = None, rows
    if row_index:
        asked = max(1, rows - 1)
        index = torch.randint(-1, asked, (rows,), generator=draw)
        if rows > 1:
            index[:2] = torch.tensor([-1, asked - 1])
    if kind == "combination":
        parts = (("teacher.a", 0.8), ("teacher.b", 0.7), ("student", -0.3))
        return {
            **view(draw, "teacher.a", "transformed", batch, size, row_index=row_index),
            **view(draw, "teacher.b", "log_probs", batch, size, row_index=row_index),
            name: TeacherScores(parts=parts),
        }
    mapped = kind.startswith("mapped")
    own_size = size + 3 if mapped else size
    id_map = None
    if mapped:
        id_map = torch.randperm(own_size, generator=draw)[:size]
        id_map[torch.randperm(size, generator=draw)[:2]] = -1
    if kind.endswith("hidden") or kind == "transformed":
        look = {"padding": 2, "bias": True, "logit_scale": 0.7, "soft_cap": 5.0}
        head = unembedding(draw, own_size, WIDTH + 2, **(look if kind == "transformed" else {}))
        scores = TeacherScores(hidden=states(draw, asked, WIDTH + 2), unembedding=head)
    else:
        log_probs = (1.5 * states(draw, asked, own_size)).log_softmax(-1)
        if kind.endswith("log_probs"):
            scores = TeacherScores(log_probs=log_probs)
        elif kind == "sampled":
            scores = TeacherScores(sampled_logp=log_probs[:, 0])
        else:
            scores = by_ids(draw, kind, log_probs, batch, index)
    return {name: replace(scores, id_map=id_map, row_index=index)}


def by_ids(
    draw: torch.Generator, kind: str, log_probs: Tensor, batch: Batch, index: Tensor | None
) -> TeacherScores:
    """What a view says of its likeliest ids and of those that the supports ask for, shuffled."""
    asked = len(log_probs)
    top = log_probs.topk(TEACHER_K)
    scores = TeacherScores()
    if kind != "ids":
        scores = replace(scores, top_ids=top.indices, top_logp=top.values)
    if kind == "top":
        return scores
    tokens = pack_rows(batch.token.tokens, batch.token.mask).tolist()
    likeliest = known(batch.token.student_top_ids)
    wanted: list[set[int]] = [set() for _ in range(asked)]
    for n, m in enumerate(range(asked) if index is None else index.tolist()):
        if m >= 0:
            wanted[m] |= {tokens[n], *likeliest[n, :STUDENT_K].tolist()}
    places = max((len(ids) for ids in wanted), default=0) + 1
    ids = torch.full((asked, places), -1)
    for m, named in enumerate(wanted):
        order = torch.randperm(places, generator=draw)[: len(named)]
        ids[m, order] = torch.tensor(sorted(named), dtype=torch.long)
    scored = log_probs.gather(1, ids.clamp(min=0))
    return replace(scores, ids=ids, ids_logp=torch.where(ids < 0, 0.0, scored))


# --------------------------------------------------------------------------------------------
# The two heads, and how far they are apart


@dataclass(frozen=True)
class Answer:
    """What the head under test said."""

    loss: Tensor
    gradients: Mapping[str, Tensor]
    head: HeadOutput

    @property
    def numbers(self) -> dict[str, Tensor]:
        return {"loss": self.loss, **self.gradients}


def answer(
    world: World,
    objective: Objective,
    *,
    chunk_bytes: int = EVERYTHING,
    wanted: Iterable[FieldKey] = (),
) -> Answer:
    """Loss and gradients of the head under test, each in the precision of its operand."""
    leaves = operands(world)
    out = head_of(world, leaves, objective, chunk_bytes=chunk_bytes, wanted=frozenset(wanted))
    loss = known(out.loss)
    assert loss.shape == ()
    loss.backward()
    gradients = {name: known(leaf.grad) for name, leaf in leaves.items()}
    assert all(gradients[name].dtype == leaf.dtype for name, leaf in leaves.items())
    return Answer(loss.detach(), gradients, out)


def operands(world: World) -> dict[str, Tensor]:
    """What the loss is differentiated by, as fresh leaves."""
    of_world = {
        "hidden": world.hidden,
        "weight": world.unembedding.weight,
        "bias": world.unembedding.bias,
    }
    return {
        name: value.detach().clone().requires_grad_()
        for name, value in of_world.items()
        if value is not None
    }


def head_of(
    world: World, leaves: Mapping[str, Tensor], objective: Objective | None, **how: Any
) -> HeadOutput:
    """The head under test, on these leaves in place of the world's own."""
    head = replace(world.unembedding, weight=leaves["weight"], bias=leaves.get("bias"))
    return linear_head(leaves["hidden"], head, world.batch, objective, **how)


def settled(world: World, objective: Objective) -> World:
    """With the coupled quantities, from the oracle's own visit, in the precision of the world."""
    if not objective.coupled:
        return world
    found = naive_signal(world.hidden, world.unembedding, world.batch, objective)
    coupled = {
        name: value.to(world.hidden.dtype) if value.is_floating_point() else value
        for name, value in found.items()
    }
    return replace(world, batch=with_token(world.batch, coupled=coupled))


def exact(world: World, objective: Objective, **how: Any) -> NaiveHead:
    return naive_head(world.hidden, world.unembedding, world.batch, objective, **how)


def numbers(naive: NaiveHead) -> dict[str, Tensor]:
    """Loss and gradients of the oracle, by name."""
    found = {name: getattr(naive, name) for name in ("loss", "hidden", "weight", "bias")}
    return {name: value for name, value in found.items() if value is not None}


def distance(actual: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; 0 where both are 0."""
    assert actual.shape == truth.shape
    size, apart = float(truth.norm()), float((actual.double() - truth).norm())
    return apart / size if size else (0.0 if apart == 0.0 else math.inf)


def assert_close(actual: Mapping[str, Tensor], truth: Mapping[str, Tensor], bound: float) -> None:
    assert set(actual) == set(truth)
    apart = {name: distance(actual[name], truth[name]) for name in truth}
    assert all(far <= bound for far in apart.values()), apart


def well_conditioned(
    objective: Objective, seed: int, kinds: Kinds, *, few: bool = False, **drawn: Any
) -> tuple[World, NaiveHead]:
    """Operands in float32, of the first seed that serves, and the oracle's answer to them.

    Args:
        few: rows and entries so few that one draw of the roundings may miss what others hit.
    """
    for attempt in range(30):
        made = settled(world(seed + 1000 * attempt, kinds, dtype=torch.float32, **drawn), objective)
        truth = exact(made, objective)
        if not len(made.hidden) or _is_steady(made, objective, truth, few):
            return made, truth
    assume(False)  # only where shapes are drawn: a size at which no operands serve
    raise AssertionError


def _is_steady(made: World, objective: Objective, truth: NaiveHead, few: bool) -> bool:
    found = numbers(truth)
    for value, uncancelled in _with_uncancelled(made, objective, truth):
        if float(value.norm()) <= 0.15 * float(uncancelled.norm()):
            return False
    draws, moves = (3, 0.2 * SINGLE_BOUND) if few else (1, 0.4 * SINGLE_BOUND)
    for seed in range(draws):
        rounded = numbers(exact(made.rounded_once(seed), objective, rounding=2.0**-24))
        if any(distance(rounded[name], found[name]) > moves for name in found):
            return False
    return True


def _with_uncancelled(
    made: World, objective: Objective, truth: NaiveHead
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each answer, and what it would be if nothing cancelled in the sums that end in it."""
    yield known(truth.loss), known(truth.summands).abs().sum()
    # student(v) * (h(v) - sum student * h): the h are far apart, or a likely token's is lost
    yield known(truth.logits), known(truth.log_probs) / objective.temperature
    slopes = known(truth.logits).abs() * made.unembedding.logit_scale
    head = made.unembedding.weight[: made.unembedding.vocab_size].double().abs()
    yield known(truth.hidden), slopes @ head
    yield known(truth.weight), slopes.T @ made.hidden.double().abs()
    if truth.bias is not None:
        yield truth.bias, slopes.sum(0)


# --------------------------------------------------------------------------------------------
# Every divergence on every support under every tail rule

DIVERGENCES: Mapping[str, Mapping[str, float]] = {
    "alpha_divergence": {"alpha": 0.4},
    "candidate_advantage_loss": {},
    "capped_forward_kl": {"cap": 0.05},
    "corrected_k3": {},
    "forward_kl": {},
    "forward_kl_k3": {},
    "generalized_jsd": {"teacher_weight": 0.3},
    "hybrid_policy": {},
    "jensen_shannon": {},
    "power_divergence": {"power": 0.5},
    "renyi_divergence": {"order": 0.6},
    "reverse_kl": {},
    "reverse_kl_k2": {},
    "skew_forward_kl": {"skew": 0.2},
    "skew_reverse_kl": {"skew": 0.2},
    "squared_hellinger": {},
    "total_variation": {},
    "truncated_reverse_kl": {},
}
AT_THE_TOKEN = ("corrected_k3", "forward_kl_k3", "reverse_kl_k2")
OF_EVERYTHING = ("hybrid_policy",)
INFINITE_WITHOUT_TEACHER = (
    *AT_THE_TOKEN,
    "candidate_advantage_loss",
    "hybrid_policy",
    "reverse_kl",
    "truncated_reverse_kl",
)

SUPPORTS: Mapping[str, Bound] = {
    "full": Bound.of(support.full),
    "student_top_k": Bound.of(partial(support.student_top_k, k=K)),
    "teacher_top_k": Bound.of(partial(support.teacher_top_k, k=K)),
    "union": Bound.of(partial(support.union, teacher_k=4, student_k=STUDENT_K)),
    "intersection": Bound.of(
        partial(support.intersection, teacher_k=TEACHER_K, student_k=STUDENT_K)
    ),
    "sampled": Bound.of(support.sampled),
}


def tails(chosen: str, named: str) -> Iterator[str]:
    """The tail rules under which a divergence means something on a support."""
    if chosen == "full":
        yield ""
    elif named == "capped_forward_kl" and chosen == "sampled":
        return  # of two entries one is cut off, and the other's value and slope cancel
    elif named not in (*AT_THE_TOKEN, *OF_EVERYTHING):
        yield "bucket"
        if chosen != "sampled":  # one entry, conditional on itself: 0 for any pair
            yield "renormalise"
        if named not in INFINITE_WITHOUT_TEACHER:
            yield "teacher_renormalise"
        if named in divergence.ON_RAW_ENTRIES or named == "reverse_kl":
            yield "truncate"


CASES = [
    (named, chosen, tail)
    for named in DIVERGENCES
    for chosen in SUPPORTS
    for tail in tails(chosen, named)
]
EVERY_TAIL = ("forward_kl", "reverse_kl", "truncated_reverse_kl")
FEWER = [
    case
    for place, case in enumerate(CASES)
    if case[0] in EVERY_TAIL or case[1] == "full" or place % 2
]
"""Every divergence on every support, and every tail rule with some of them."""


def dense(named: str, chosen: str, tail: str, kind: str = "", **others: Any) -> Dense:
    """A term; with the view smoothed where it would be infinite for a kind of view."""
    if kind.startswith("mapped") and named in INFINITE_WITHOUT_TEACHER:
        others = {"smoothing": 0.1, **others}
    return Dense(
        divergence=partial(getattr(divergence, named), **DIVERGENCES[named]),
        support=SUPPORTS[chosen],
        tail=tail,
        accept_collapse=named == "reverse_kl" and tail == "truncate",
        **others,
    )


def lists_for(chosen: str, named: str) -> tuple[str, ...]:
    """The kinds of views without a distribution that can serve a support."""
    if named in AT_THE_TOKEN:
        return ("sampled", "ids", "top_and_ids")
    return {
        "full": (),
        "student_top_k": ("ids", "top_and_ids"),
        "teacher_top_k": ("top", "top_and_ids"),
        "sampled": ("ids", "top_and_ids"),
    }.get(chosen, ("top_and_ids",))


def turn(index: int, among: Sequence[T]) -> T:
    return among[index % len(among)]


def known(value: T | None) -> T:
    assert value is not None
    return value


def test_every_divergence_of_the_library_is_compared() -> None:
    assert set(DIVERGENCES) == set(divergence.__all__)
    assert {chosen for _, chosen, _ in CASES} == set(SUPPORTS)


LONG = (9, 0, 7, 1, 6)


@pytest.mark.parametrize(("named", "chosen", "tail"), FEWER)
def test_a_divergence_and_its_gradients_are_exact_to_single_precision(
    named: str, chosen: str, tail: str
) -> None:
    case = FEWER.index((named, chosen, tail))
    objective = Objective(dense(named, chosen, tail))
    made, truth = well_conditioned(
        objective, case, turn(case, WHOLE), lengths=LONG, bias=True, padding=3
    )
    ours = answer(made, objective, chunk_bytes=turn(case // 4, CHUNKS))
    assert_close(ours.numbers, numbers(truth), SINGLE_BOUND)


@pytest.mark.parametrize(
    ("named", "chosen", "tail"), [CASES[place] for place in range(0, len(CASES), 6)]
)
def test_a_view_that_knows_other_ids_is_compared_on_those_it_shares(
    named: str, chosen: str, tail: str
) -> None:
    case = CASES.index((named, chosen, tail)) // 6
    kind = turn(case, MAPPED)
    objective = Objective(dense(named, chosen, tail, kind))
    made, truth = well_conditioned(objective, case, kind, lengths=LONG)
    ours = answer(made, objective, chunk_bytes=turn(case // 2, CHUNKS))
    assert_close(ours.numbers, numbers(truth), SINGLE_BOUND)


@pytest.mark.parametrize(
    ("named", "chosen", "tail", "kind"),
    [
        (*case, kind)
        for case in CASES
        for kind in lists_for(case[1], case[0])
        if case[0] in (*AT_THE_TOKEN, "forward_kl", "squared_hellinger")
    ],
)
def test_a_view_that_answers_by_ids_serves_the_supports_it_scored(
    named: str, chosen: str, tail: str, kind: str
) -> None:
    case = CASES.index((named, chosen, tail))
    objective = Objective(dense(named, chosen, tail))
    made, truth = well_conditioned(objective, case, kind, lengths=LONG)
    ours = answer(made, objective, chunk_bytes=turn(case, CHUNKS))
    assert_close(ours.numbers, numbers(truth), SINGLE_BOUND)


# --------------------------------------------------------------------------------------------
# Any shape


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Sequences down to none, vocabularies down to what the supports need."""
    return {
        "lengths": tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))),
        "size": draw(st.integers(STUDENT_K + TEACHER_K, 40)),
        "width": draw(st.integers(1, 9)),
        "gaps": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "padding": draw(st.integers(0, 2)),
        "row_index": False,
    }


REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")


def compare_one(
    case: tuple[str, str, str],
    kind: str,
    shape: Mapping[str, Any],
    *,
    seed: int,
    reduction: str,
    rows_of_logits: int,
) -> None:
    objective = Objective(dense(*case, kind, reduction=reduction))
    made, truth = well_conditioned(objective, seed, kind, few=True, **shape)
    chunk_bytes = rows_of_logits * 4 * shape["size"]
    ours = answer(made, objective, chunk_bytes=chunk_bytes)
    assert_close(ours.numbers, numbers(truth), SINGLE_BOUND)


ANY = {
    "case": st.sampled_from(CASES),
    "shape": shapes(),
    "seed": st.integers(0, 99),
    "reduction": st.sampled_from(REDUCTIONS),
    "rows_of_logits": st.sampled_from((0, 4, 16, 10**6, 10**6)),
}


@settings(max_examples=20)
@given(kind=st.sampled_from(WHOLE), **ANY)
def test_any_shape_against_a_distribution(kind: str, case: Any, shape: Any, **others: Any) -> None:
    compare_one(case, kind, shape, **others)


@settings(max_examples=6)
@given(kind=st.sampled_from(MAPPED), **ANY)
def test_any_shape_against_other_ids(kind: str, case: Any, shape: Any, **others: Any) -> None:
    compare_one(case, kind, shape, **others)


@settings(max_examples=10)
@given(data=st.data(), **ANY)
def test_any_shape_against_an_answer_by_ids(
    data: st.DataObject, case: Any, shape: Any, **others: Any
) -> None:
    assume(lists_for(case[1], case[0]))
    kind = data.draw(st.sampled_from(lists_for(case[1], case[0])), label="kind")
    compare_one(case, kind, shape, **others)


@settings(max_examples=10)
@given(data=st.data(), **ANY)
def test_any_shape_against_answers_to_other_rows(
    data: st.DataObject, case: Any, shape: Any, **others: Any
) -> None:
    kinds = (*WHOLE, *MAPPED, *lists_for(case[1], case[0]))
    kind = data.draw(st.sampled_from(kinds), label="kind")
    compare_one(case, kind, {**shape, "row_index": True}, **others)


# --------------------------------------------------------------------------------------------
# Every kind of term

REVERSE_KL = Dense(divergence=divergence.reverse_kl)
LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)
CLIPPED = partial(surrogate.clipped, low=0.2, high=0.28)
ROUTE_K = {"teacher_k": TEACHER_K, "student_k": STUDENT_K}
ROUTING_SUPPORT = Bound.of(partial(support.routing_support, **ROUTE_K))
CR_OPD = Routed(
    source=LOG_RATIO,
    support=ROUTING_SUPPORT,
    tail="renormalise",
    candidates=partial(routing.endorsed_and_reachable, **ROUTE_K),
    share=routing.by_score,
    amount=routing.matched_suppression,
    transfer=routing.pairwise_logistic,
    gates=(
        weight.negative_advantage,
        routing.overrated,
        routing.has_candidates,
        weight.skip_special,
    ),
    mode="replace",
)
BUCKET = {"support": SUPPORTS["student_top_k"], "tail": "bucket"}

TERMS: Mapping[str, tuple[Term, ...]] = {
    "reverse KL": (REVERSE_KL,),
    "score": (LOG_RATIO,),
    "score with a value": (replace(LOG_RATIO, baseline=credit.expected_reward),),
    "score with a value on a support": (
        replace(LOG_RATIO, baseline=credit.expected_reward, **BUCKET),
    ),
    "importance": (replace(LOG_RATIO, surrogate=surrogate.importance),),
    "clipped": (replace(LOG_RATIO, surrogate=CLIPPED, baseline=credit.expected_reward),),
    "dual clipped": (
        replace(
            LOG_RATIO,
            surrogate=partial(surrogate.dual_clipped, low=0.2, high=0.3, negative_cap=2.0),
        ),
    ),
    "geometric ratio": (
        replace(
            LOG_RATIO,
            surrogate=partial(surrogate.geometric_ratio, old_share=0.5, low=0.3, high=0.3),
        ),
    ),
    "likelihood": (Sampled(reward=reward.one),),
    "discounted": (
        replace(
            LOG_RATIO,
            credit=partial(credit.discounted, gamma=0.9, meaning="teacher_reliability"),
            baseline=credit.batch_mean,
            surrogate=CLIPPED,
        ),
    ),
    "future of the divergence": (
        replace(LOG_RATIO, reward=reward.expected_log_ratio, credit=credit.future, **BUCKET),
    ),
    "verdicts": (replace(LOG_RATIO, outcome=(partial(outcome.add_group_advantage, scale=0.5),)),),
    "bucket and its residual": (
        Dense(divergence=divergence.reverse_kl, **BUCKET),
        replace(LOG_RATIO, surrogate=surrogate.tail_residual, **BUCKET),
    ),
    "weights": (
        replace(
            REVERSE_KL,
            weights=(
                partial(weight.position_decay, half_life=3.0),
                weight.skip_special,
                partial(weight.surprise, boost=0.5),
                weight.disagreement,
            ),
        ),
    ),
    "weights that keep their mass": (
        replace(
            LOG_RATIO,
            weights=(weight.trust, partial(selection.keep_unlikely, share=0.6)),
            preserve_mass=True,
        ),
    ),
    "a gate and its complement": (
        replace(
            REVERSE_KL,
            weights=(partial(weight.student_entropy_above, nats=2.0),),
            reduction="sequence_sum",
        ),
        Dense(
            divergence=divergence.forward_kl,
            weights=(partial(weight.student_entropy_below, nats=2.0),),
            reduction="sequence_mean",
        ),
    ),
    "agreement of the likeliest": (
        Dense(
            divergence=divergence.forward_kl,
            weights=(partial(weight.top_k_overlap, k=4), weight.in_span),
        ),
    ),
    "CR-OPD": (CR_OPD,),
    "CR-OPD beside its source": (replace(CR_OPD, mode="add", coef=0.5),),
    "CR-OPD in part, a target": (
        replace(
            CR_OPD,
            tail="bucket",
            mode="interpolate",
            transfer=routing.bounded_cross_entropy,
            weights=(partial(routing.evidence, full_at=0.5),),
        ),
    ),
    "the consistent route": (
        Routed(
            source=LOG_RATIO,
            candidates=routing.raised,
            share=partial(routing.by_powers, teacher_power=0.0, student_power=1.0, score_power=1.0),
            amount=routing.excess_score,
            transfer=routing.linear_transfer,
            gates=(routing.overrated,),
        ),
    ),
    "entropy bonus": (Regulariser(penalty=regulariser.entropy_bonus, coef=0.1),),
    "entropy floor on a support": (
        Regulariser(penalty=partial(regulariser.entropy_floor, nats=3.0), **BUCKET),
    ),
    "two views": (
        Dense(divergence=divergence.forward_kl, support=SUPPORTS["union"], tail="bucket"),
        Dense(divergence=divergence.reverse_kl, against="reference", coef=0.3),
        replace(LOG_RATIO, against="reference", name="pull", coef=-0.2),
        Regulariser(penalty=regulariser.entropy_bonus, coef=0.05),
    ),
    "students and data": (
        replace(CR_OPD, source=replace(LOG_RATIO, rows="student")),
        Sampled(reward=reward.one, rows="data", reduction="sequence_mean"),
        replace(REVERSE_KL, rows="all", coef=0.1),
    ),
    "smoothed": (
        replace(REVERSE_KL, smoothing=0.2),
        replace(LOG_RATIO, smoothing=0.1, baseline=credit.expected_reward, **BUCKET),
        Dense(
            divergence=divergence.forward_kl,
            smoothing=0.1,
            support=SUPPORTS["union"],
            tail="renormalise",
        ),
    ),
}
BOTH = {"teacher": "transformed", "reference": "log_probs"}
MERGED = ((1, 3, 6), (8, 9))
LOOKS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "merged": {"merge_ids": MERGED},
    "tempered": {"temperature": 1.7},
    "scaled, capped, padded": {
        "bias": True,
        "padding": 3,
        "logit_scale": 0.6,
        "soft_cap": 4.0,
    },
    "all of it": {
        "merge_ids": MERGED,
        "temperature": 0.8,
        "bias": True,
        "padding": 1,
        "logit_scale": 1.3,
        "soft_cap": 6.0,
    },
}


@pytest.mark.parametrize("composed", TERMS)
def test_every_kind_of_term_is_exact_to_single_precision(composed: str) -> None:
    place = list(TERMS).index(composed)
    compare_terms(composed, turn(place, ("plain", "all of it")), place)


@pytest.mark.parametrize("composed", ["CR-OPD", "two views"])
@pytest.mark.parametrize("look", LOOKS)
def test_every_look_of_the_logits_is_exact_to_single_precision(composed: str, look: str) -> None:
    compare_terms(composed, look, 50 + list(LOOKS).index(look))


def compare_terms(composed: str, look: str, seed: int) -> None:
    drawn = dict(LOOKS[look])
    objective = Objective(*TERMS[composed], temperature=drawn.pop("temperature", 1.0))
    made, truth = well_conditioned(
        objective, seed, BOTH, lengths=LONG, writers=(STUDENT, STUDENT, DATA), **drawn
    )
    ours = answer(made, objective, chunk_bytes=turn(seed // 2, CHUNKS))
    assert_close(ours.numbers, numbers(truth), SINGLE_BOUND)
    rows = {label: ours.head.rows[f"loss/{label}"] for label in truth.row_losses}
    assert_close(rows, truth.row_losses, SINGLE_BOUND)


@pytest.mark.parametrize("composed", ["CR-OPD", "CR-OPD in part, a target", "two views"])
def test_routes_and_sums_against_answers_by_ids(composed: str) -> None:
    objective = Objective(*TERMS[composed])
    kinds = {"teacher": "top_and_ids", "reference": "hidden"}
    made, truth = well_conditioned(objective, 7, kinds, lengths=LONG)
    ours = answer(made, objective, chunk_bytes=SOME)
    assert_close(ours.numbers, numbers(truth), SINGLE_BOUND)


@pytest.mark.parametrize("composed", ["score", "clipped at the token", "likelihood", "discounted"])
def test_a_score_asks_for_no_more_than_one_number_per_token(composed: str) -> None:
    clipped = (replace(LOG_RATIO, surrogate=CLIPPED),)
    objective = Objective(*{**TERMS, "clipped at the token": clipped}[composed])
    made, truth = well_conditioned(objective, 3, "sampled", lengths=LONG)
    assert_close(answer(made, objective).numbers, numbers(truth), SINGLE_BOUND)


def test_the_routes_of_these_tests_move_mass() -> None:
    for composed in ("CR-OPD", "CR-OPD in part, a target", "the consistent route"):
        (term,) = TERMS[composed]
        assert isinstance(term, Routed)
        made = world(1, BOTH, lengths=LONG)
        with_route = exact(made, Objective(term)).row_losses["routed"]
        source = exact(made, Objective(term.source)).row_losses["sampled"]
        assert 3 <= int((with_route != source).sum()) < len(source)


def test_rows_that_no_term_looks_at_may_be_infinite() -> None:
    made = world(4, "log_probs", lengths=LONG, writers=(STUDENT, DATA), gaps=False)
    written = pack_rows(made.batch.token.provenance, made.batch.token.mask)
    teacher = known(made.batch.token.views["teacher"].log_probs)
    holes = torch.where(
        (written == DATA)[:, None] & (torch.arange(SIZE) % 2 == 0), -math.inf, teacher
    ).log_softmax(-1)
    made = replace(
        made, batch=with_token(made.batch, views={"teacher": TeacherScores(log_probs=holes)})
    )
    objective = Objective(replace(REVERSE_KL, rows="student"))
    truth, ours = exact(made, objective), answer(made, objective, chunk_bytes=1)
    assert truth.row_losses["dense"].isinf().any()
    assert torch.equal(truth.row_losses["dense"].isinf(), ours.head.rows["loss/dense"].isinf())
    assert_close(ours.numbers, numbers(truth), DOUBLE_BOUND)
    assert not ours.gradients["hidden"][written == DATA].any()


def test_an_infinite_row_makes_the_loss_infinite_and_leaves_finite_gradients() -> None:
    made = world(5, "mapped_log_probs", lengths=LONG)
    objective = Objective(REVERSE_KL, Dense(divergence=divergence.forward_kl, name="forward"))
    truth, ours = exact(made, objective), answer(made, objective, chunk_bytes=1)
    assert truth.loss == ours.loss == math.inf
    assert_close(ours.gradients, without_loss(truth), DOUBLE_BOUND)
    assert all(bool(gradient.isfinite().all()) for gradient in ours.gradients.values())


def without_loss(naive: NaiveHead) -> dict[str, Tensor]:
    return {name: value for name, value in numbers(naive).items() if name != "loss"}


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "truncate"])
def test_nothing_is_compared_where_an_intersection_is_empty(tail: str) -> None:
    made = world(6, "log_probs", lengths=LONG)
    teacher = known(made.batch.token.views["teacher"].log_probs)
    least = teacher.topk(3, largest=False).indices
    objective = Objective(
        Dense(
            divergence=divergence.forward_kl,
            support=partial(support.intersection, teacher_k=3, student_k=3),
            tail=tail,
        )
    )
    for dtype in (torch.float32, torch.float64):
        apart = replace(made, batch=with_token(made.batch, student_top_ids=least)).to(dtype)
        for name, value in answer(apart, objective).numbers.items():
            bound = 4 * torch.finfo(dtype).eps if tail == "bucket" else 0.0
            assert float(value.abs().max()) <= bound, name


# --------------------------------------------------------------------------------------------
# Half precision


@dataclass(frozen=True)
class Near:
    """A teacher in bfloat16, and noise that makes a student of it."""

    hidden: Tensor
    weight: Tensor
    hidden_noise: Tensor
    weight_noise: Tensor

    @classmethod
    def random(cls, seed: int, rows: int = 200, size: int = 2000, width: int = 64) -> Near:
        draw = torch.Generator().manual_seed(seed)
        hidden, weight = (
            states(draw, rows, width),
            2.0 / math.sqrt(width) * states(draw, size, width),
        )
        noise = normal(draw, rows, width), 2.0 / math.sqrt(width) * normal(draw, size, width)
        return cls(hidden.bfloat16(), weight.bfloat16(), *noise)

    def student(self, amount: float) -> tuple[Tensor, Tensor]:
        hidden = self.hidden.double() + amount * self.hidden_noise
        weight = self.weight.double() + amount * self.weight_noise
        return hidden.bfloat16(), weight.bfloat16()

    def mean_kl(self, amount: float) -> float:
        """Of the student to the teacher, both as rounded."""
        hidden, weight = self.student(amount)
        student = (hidden.double() @ weight.double().T).log_softmax(-1)
        teacher = (self.hidden.double() @ self.weight.double().T).log_softmax(-1)
        return float((student.exp() * (student - teacher)).sum(-1).mean())

    def world(self, mean_kl: float) -> World:
        """The student at this distance, by bisection on the amount of noise."""
        low, high = 0.0, 0.2
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if self.mean_kl(middle) < mean_kl else (low, middle)
        hidden, weight = self.student(high)
        assert self.mean_kl(high) == pytest.approx(mean_kl, rel=0.02)
        rows, size = len(hidden), len(weight)
        mask = torch.ones((4, rows // 4), dtype=torch.bool)
        rollout = rollout_of(torch.zeros_like(mask).long(), mask, torch.full(mask.shape, STUDENT))
        scores = TeacherScores(hidden=self.hidden, unembedding=Unembedding(self.weight, size))
        batch = with_token(pack_rollout(rollout, pad_id=0), views={"teacher": scores})
        return World(hidden, Unembedding(weight, size), batch)


NEAR = Near.random(0)


@pytest.mark.parametrize("mean_kl", [2e-4, 1.6e-3])
def test_a_student_near_its_teacher_learns_in_half_precision(mean_kl: float) -> None:
    made = NEAR.world(mean_kl)
    for named in ("reverse_kl", "forward_kl", "generalized_jsd"):
        term = dense(named, "full", "")
        if named == "generalized_jsd":
            halves = partial(divergence.generalized_jsd, teacher_weight=0.5)
            term = Dense(divergence=halves)
        truth = exact(made, Objective(term))
        # About 40 rows a chunk: what chunks add to the weight must not be rounded in between.
        ours = answer(made, Objective(term), chunk_bytes=40 * 4 * 2000)
        assert_close(ours.gradients, without_loss(truth), 3e-3)
        assert distance(ours.loss, numbers(truth)["loss"]) <= 1e-3
        assert bool((ours.head.rows["loss/dense"] >= 0).all()), named


# --------------------------------------------------------------------------------------------
# Derivatives, chunks, parts


class HeadOnce(torch.autograd.Function):
    """The head as a function of its operands, differentiated once and read as often as asked.

    Its own loss can be differentiated once, and `gradcheck` does so twice.
    """

    @staticmethod
    def forward(ctx: Any, made: World, objective: Objective, *given_leaves: Tensor) -> Tensor:
        names = ("hidden", "weight", "bias")
        leaves = {
            name: leaf.detach().clone().requires_grad_()
            for name, leaf in zip(names, given_leaves, strict=True)
        }
        with torch.enable_grad():
            loss = known(head_of(made, leaves, objective, chunk_bytes=1).loss)
            ctx.save_for_backward(*torch.autograd.grad(loss, list(leaves.values())))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(upstream[0] * gradient for gradient in ctx.saved_tensors))


def test_the_gradient_is_that_of_the_loss_by_finite_differences() -> None:
    few = partial(support.student_top_k, k=2)
    objective = Objective(
        Dense(divergence=divergence.reverse_kl, support=few, tail="bucket"),
        Dense(divergence=divergence.forward_kl, against="reference", coef=0.5),
        Sampled(reward=reward.one, coef=0.3),
        Regulariser(penalty=regulariser.entropy_bonus, coef=0.2),
        temperature=1.3,
    )
    drawn = {"bias": True, "padding": 1, "logit_scale": 0.8, "soft_cap": 5.0}
    shape = {"lengths": (1, 1), "size": 5, "width": 2, "merge_ids": ((1, 4),)}
    made = world(2, BOTH, **shape, **drawn)
    leaves = tuple(operands(made).values())
    assert torch.autograd.gradcheck(partial(HeadOnce.apply, made, objective), leaves)


CHUNKED = ("discounted", "CR-OPD", "two views", "smoothed")


@pytest.mark.parametrize("composed", CHUNKED)
def test_chunks_change_nothing(composed: str) -> None:
    objective = Objective(*TERMS[composed], temperature=1.2)
    drawn = {"lengths": (3, 0, 1, 3), "bias": True, "merge_ids": MERGED}
    made = settled(world(8, BOTH, writers=(STUDENT, DATA), **drawn), objective)
    truth = numbers(exact(made, objective))
    for chunk_bytes in (1, 2 * SOME, EVERYTHING):
        ours = answer(made, objective, chunk_bytes=chunk_bytes)
        assert_close(ours.numbers, truth, DOUBLE_BOUND)


@pytest.mark.parametrize("composed", CHUNKED)
@pytest.mark.parametrize("row_index", [False, True])
def test_parts_add_up_to_the_whole(composed: str, row_index: bool) -> None:
    objective = Objective(*TERMS[composed])
    drawn = {"lengths": (5, 0, 3, 4), "bias": True, "row_index": row_index}
    made = settled(world(9, BOTH, writers=(STUDENT, DATA), **drawn), objective)
    truth = numbers(exact(made, objective))
    leaves = operands(made)
    total = torch.zeros((), dtype=torch.float64)
    parts = split(made.batch, max_tokens=6)
    assert len(parts) >= 3
    for part in parts:
        rows = {**leaves, "hidden": leaves["hidden"][part.rows]}
        loss = known(head_of(replace(made, batch=part.batch), rows, objective).loss)
        loss.backward()
        total += loss.detach()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert_close({"loss": total, **found}, truth, DOUBLE_BOUND)


# --------------------------------------------------------------------------------------------
# As a part of a graph

PLAIN = world(10, "transformed", lengths=(3, 2), bias=True, padding=2)
DENSE = Objective(REVERSE_KL)


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("weight", "bias"), ("bias",)])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: tuple[str, ...]) -> None:
    whole = answer(PLAIN, DENSE).gradients
    leaves = operands(PLAIN)
    for name in frozen:
        leaves[name].requires_grad_(False)
    loss = known(head_of(PLAIN, leaves, DENSE).loss)
    loss.backward()
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert distance(known(leaf.grad), whole[name]) <= DOUBLE_BOUND


def test_a_loss_of_frozen_operands_has_no_gradient() -> None:
    leaves = {name: leaf.detach() for name, leaf in operands(PLAIN).items()}
    loss = known(head_of(PLAIN, leaves, DENSE).loss)
    assert not loss.requires_grad
    assert distance(loss, numbers(exact(PLAIN, DENSE))["loss"]) <= DOUBLE_BOUND


def test_without_gradients_the_loss_is_its_value() -> None:
    leaves = operands(PLAIN)
    with torch.no_grad():
        loss = known(head_of(PLAIN, leaves, DENSE).loss)
    assert not loss.requires_grad
    assert distance(loss, numbers(exact(PLAIN, DENSE))["loss"]) <= DOUBLE_BOUND


def test_the_gradient_is_scaled_by_what_comes_from_above() -> None:
    leaves = operands(PLAIN)
    loss = known(head_of(PLAIN, leaves, DENSE).loss)
    assert all(leaf.grad is None for leaf in leaves.values())
    (3.0 * loss + 1.0).backward()
    for name, gradient in answer(PLAIN, DENSE).gradients.items():
        thrice = known(leaves[name].grad)
        assert distance(thrice, 3.0 * gradient) <= DOUBLE_BOUND


def test_gradients_add_to_those_that_are_there() -> None:
    leaves = operands(PLAIN)
    for _ in range(2):
        loss = known(head_of(PLAIN, leaves, DENSE).loss)
        loss.backward()
    for name, gradient in answer(PLAIN, DENSE).gradients.items():
        twice = known(leaves[name].grad)
        assert distance(twice, 2.0 * gradient) <= DOUBLE_BOUND


def test_a_second_backward_is_refused_with_the_way_out() -> None:
    loss = known(head_of(PLAIN, operands(PLAIN), DENSE).loss)
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match=r"(?i)\b(again|anew|once more|call|forward)\b"
    ) as caught:
        loss.backward()
    assert "retain_graph=True" not in str(caught.value).partition("Specify")[2]


def test_a_tied_weight_gets_the_gradient_of_both_its_uses() -> None:
    made = world(11, "transformed", lengths=(3, 2), width=5)
    ids = torch.arange(len(made.hidden))
    weight = made.unembedding.weight.clone().requires_grad_()
    mixing = torch.randn(5, 5, dtype=torch.float64).requires_grad_()

    def forward(table: Tensor) -> Tensor:
        return torch.tanh(table[ids] @ mixing)

    tied = replace(made, hidden=forward(weight).detach())
    loss = known(head_of(tied, {"hidden": forward(weight), "weight": weight}, DENSE).loss)
    loss.backward()
    truth = exact(tied, DENSE)
    table = made.unembedding.weight.clone().requires_grad_()
    below, above = torch.autograd.grad(forward(table), (table, mixing), truth.hidden)
    assert distance(known(weight.grad), below + known(truth.weight)) <= DOUBLE_BOUND
    assert distance(known(mixing.grad), above) <= DOUBLE_BOUND


def test_a_view_is_not_taught() -> None:
    scores = PLAIN.batch.token.views["teacher"]
    hidden = known(scores.hidden).clone().requires_grad_()
    head = known(scores.unembedding)
    weight = head.weight.clone().requires_grad_()
    live = replace(scores, hidden=hidden, unembedding=replace(head, weight=weight))
    made = replace(PLAIN, batch=with_token(PLAIN.batch, views={"teacher": live}))
    assert_close(answer(made, DENSE).numbers, numbers(exact(PLAIN, DENSE)), DOUBLE_BOUND)
    assert hidden.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "composed", ["reverse KL", "score with a value", "bucket and its residual", "CR-OPD"]
)
def test_a_student_equal_to_its_teacher_learns_nothing(dtype: torch.dtype, composed: str) -> None:
    made = world(12, "hidden", lengths=LONG, bias=True, logit_scale=0.8, soft_cap=6.0).to(dtype)
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    leaves = operands(made)
    head = replace(made.unembedding, weight=leaves["weight"], bias=leaves["bias"])
    same = TeacherScores(hidden=leaves["hidden"], unembedding=head)  # live: a self-teacher
    made = replace(made, batch=with_token(made.batch, views={"teacher": same}))
    for chunk_bytes in (2 * SOME, EVERYTHING):
        objective = Objective(*TERMS[composed])
        loss = known(head_of(made, leaves, objective, chunk_bytes=chunk_bytes).loss)
        loss.backward()
        assert abs(float(loss.detach())) <= 4 * rounding
    for name, leaf in leaves.items():
        assert float(known(leaf.grad).double().norm()) <= 20 * rounding, name


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0)])
def test_no_rows_are_no_loss_and_zero_gradients(lengths: tuple[int, ...]) -> None:
    for composed in ("reverse KL", "CR-OPD", "two views", "discounted"):
        objective = Objective(*TERMS[composed])
        made = settled(world(13, BOTH, lengths=lengths, bias=True), objective)
        ours = answer(made, objective)
        assert not any(bool(value.any()) for value in ours.numbers.values())
        assert ours.gradients["hidden"].shape == (0, WIDTH)


# --------------------------------------------------------------------------------------------
# Fields

OF_A_SUPPORT = (
    "student_log_probs",
    "teacher_log_probs",
    "student_support_logp",
    "teacher_support_logp",
    "student_log_tail",
    "teacher_log_tail",
    "support_ids",
    "in_support",
    "reverse_kl",
    "forward_kl",
    "total_variation",
    "student_entropy",
    "teacher_entropy",
)
LIKELIEST = FieldKey("student_top_ids", "", SUPPORTS["student_top_k"])
FULL_KEYS = (
    *(FieldKey(name, "teacher") for name in OF_A_SUPPORT),
    FieldKey("teacher_logp", "teacher"),
    FieldKey("student_logp"),
    FieldKey("student_entropy"),
    FieldKey("student_hidden"),
    FieldKey("tokens"),
    FieldKey("position"),
    FieldKey("special"),
    FieldKey("extra_span"),
    LIKELIEST,
    FieldKey("teacher_top_ids", "teacher", SUPPORTS["teacher_top_k"]),
)


def keys_on(chosen: str | Bound, tail: str, smoothing: float = 0.0) -> list[FieldKey]:
    bound = SUPPORTS[chosen] if isinstance(chosen, str) else chosen
    return [
        FieldKey(name, "teacher", bound, tail, smoothing if _reads_view(name) else 0.0)
        for name in OF_A_SUPPORT
    ]


def _reads_view(name: str) -> bool:
    return name.startswith("teacher") or name in ("reverse_kl", "forward_kl", "total_variation")


def assert_same_fields(
    made: World,
    keys: Iterable[FieldKey],
    *,
    chunk_bytes: int = EVERYTHING,
    temperature: float = 1.0,
) -> None:
    wanted = frozenset(keys)
    how: dict[str, Any] = {"wanted": wanted, "temperature": temperature}
    out = linear_head(made.hidden, made.unembedding, made.batch, chunk_bytes=chunk_bytes, **how)
    assert out.loss is None
    truth = naive_head(made.hidden, made.unembedding, made.batch, **how).fields
    assert_same(out.fields, truth)


def assert_same(found: Mapping[FieldKey, Tensor], truth: Mapping[FieldKey, Tensor]) -> None:
    """Whole numbers equal, real ones to 1e-12 of the field, infinite ones in their places."""
    assert set(found) == set(truth)
    for key, exact_values in truth.items():
        values = found[key]
        assert values.shape == exact_values.shape, key
        assert not values.requires_grad, key
        if not exact_values.is_floating_point():
            assert torch.equal(values, exact_values), key
            continue
        bounded = exact_values.isfinite()
        assert torch.equal(values[~bounded].double(), exact_values[~bounded]), key
        apart = (values[bounded].double() - exact_values[bounded]).norm()
        assert float(apart) <= DOUBLE_BOUND * max(1.0, float(exact_values[bounded].norm())), key


@pytest.mark.parametrize("kind", [*WHOLE, *MAPPED])
def test_every_field_of_a_distribution_is_exact(kind: str) -> None:
    place = [*WHOLE, *MAPPED].index(kind)
    for look in (place, place + 2):
        given_look = dict(turn(look, list(LOOKS.values())))
        tau = given_look.pop("temperature", 1.0)
        made = world(20 + look, kind, lengths=(4, 0, 2, 1), **given_look)
        on_supports = [
            key
            for chosen, tail in (
                ("student_top_k", "bucket"),
                ("teacher_top_k", "renormalise"),
                ("union", "teacher_renormalise"),
                ("intersection", "bucket"),
                ("intersection", "truncate"),
                ("sampled", "bucket"),
                (ROUTING_SUPPORT, "renormalise"),
            )
            for key in keys_on(chosen, tail, smoothing=0.1 if look % 2 else 0.0)
        ]
        smoothed = [FieldKey(name, "teacher", smoothing=0.2) for name in OF_THE_VIEW]
        keys = (*FULL_KEYS, *on_supports, *smoothed)
        assert_same_fields(made, keys, chunk_bytes=turn(look, CHUNKS), temperature=tau)


OF_THE_VIEW = ("teacher_log_probs", "teacher_logp", "teacher_entropy", "reverse_kl")


def test_the_student_s_likeliest_are_reported_as_of_now_with_none_chosen_before() -> None:
    made = world(30, "hidden", merge_ids=MERGED)
    made = replace(made, batch=with_token(made.batch, student_top_ids=None))
    assert_same_fields(made, [LIKELIEST], chunk_bytes=1)


def test_a_visit_without_rows_answers_with_empty_fields() -> None:
    made = world(31, "hidden", lengths=(0,))
    assert_same_fields(made, (*FULL_KEYS, *keys_on("student_top_k", "bucket")))


def test_the_signal_phase_gets_the_fields_that_the_oracle_reads() -> None:
    for composed in ("discounted", "future of the divergence", "weights that keep their mass"):
        objective = Objective(*TERMS[composed], temperature=1.4)
        made = world(32, BOTH, lengths=LONG, merge_ids=MERGED)
        assert objective.coupled
        assert_same_fields(made, objective.signal_keys(), temperature=1.4)


def test_fields_are_the_same_beside_an_objective() -> None:
    objective = Objective(*TERMS["two views"], temperature=1.3)
    made = world(33, BOTH, merge_ids=MERGED)
    keys = (*FULL_KEYS, *keys_on("union", "bucket"))
    ours = answer(made, objective, chunk_bytes=1, wanted=keys)
    assert_same(ours.head.fields, exact(made, objective, wanted=keys).fields)


def test_rows_hold_what_every_metric_starts_from() -> None:
    objective = Objective(*TERMS["students and data"], temperature=1.3)
    made = world(34, BOTH, lengths=LONG, writers=(STUDENT, DATA), merge_ids=MERGED)
    names = {
        "student_entropy": FieldKey("student_entropy"),
        "student_logp": FieldKey("student_logp"),
        "teacher_logp": FieldKey("teacher_logp", "teacher"),
    }
    truth = exact(made, objective, wanted=names.values())
    told = {name: truth.fields[key] for name, key in names.items()}
    told["log_ratio"] = told.pop("teacher_logp") - told["student_logp"]
    told |= {f"loss/{label}": values for label, values in truth.row_losses.items()}
    rows = answer(made, objective, chunk_bytes=2 * SOME).head.rows
    assert_close({name: rows[name] for name in told}, told, DOUBLE_BOUND)
    assert not any(rows[name].requires_grad for name in rows)


# --------------------------------------------------------------------------------------------
# By-products


def mass_keys(chosen: str | Bound, tail: str) -> list[FieldKey]:
    bound = SUPPORTS[chosen] if isinstance(chosen, str) else chosen
    return [FieldKey(name, "teacher", bound, tail) for name in ("student_mass", "teacher_mass")]


def overlap(k: int) -> FieldKey:
    student = Bound.of(partial(support.student_top_k, k=k))
    return FieldKey("top_k_overlap", "teacher", support=student)


AGREEMENT = FieldKey("top1_agreement", "teacher")
NORM = FieldKey("logit_gradient_norm")


@pytest.mark.parametrize("kind", [*WHOLE, *MAPPED])
@pytest.mark.parametrize("look", ["plain", "all of it"])
def test_by_products_of_a_distribution_are_exact(kind: str, look: str) -> None:
    drawn = dict(LOOKS[look])
    tau = drawn.pop("temperature", 1.0)
    made = world(40, kind, lengths=LONG, **drawn)
    keys = [AGREEMENT, overlap(1), overlap(4), *mass_keys(ROUTING_SUPPORT, "renormalise")]
    for chosen in ("student_top_k", "teacher_top_k", "union", "intersection", "sampled"):
        keys += mass_keys(chosen, "bucket")
    assert_same_fields(made, keys, chunk_bytes=2 * SOME, temperature=tau)


def test_agreement_is_of_the_student_of_now() -> None:
    """The batch holds the likeliest ids of an older one."""
    made = world(41, "hidden", lengths=LONG)
    scores = TeacherScores(hidden=made.hidden, unembedding=made.unembedding)
    made = replace(made, batch=with_token(made.batch, views={"teacher": scores}))
    wanted = frozenset({AGREEMENT, overlap(4)})
    out = linear_head(made.hidden, made.unembedding, made.batch, wanted=wanted)
    assert bool((out.fields[AGREEMENT] == 1.0).all())
    assert bool((out.fields[overlap(4)] == 1.0).all())
    older = known(made.batch.token.student_top_ids)
    now = logits_of(made.hidden, made.unembedding).argmax(-1)
    assert bool((older[:, 0] != now).any())


def test_by_products_of_an_answer_by_ids_are_exact() -> None:
    made = world(42, "top_and_ids", lengths=LONG)
    keys = [AGREEMENT, overlap(4), overlap(8), *mass_keys("union", "bucket")]
    keys += [*mass_keys("student_top_k", "bucket"), *mass_keys("teacher_top_k", "truncate")]
    assert_same_fields(made, keys)
    named = world(43, "top", lengths=LONG)
    assert_same_fields(named, [AGREEMENT, overlap(4), *mass_keys("teacher_top_k", "bucket")])


@pytest.mark.parametrize("composed", ["reverse KL", "CR-OPD", "students and data", "smoothed"])
@pytest.mark.parametrize("look", LOOKS)
def test_the_gradient_s_length_is_that_on_the_logits(composed: str, look: str) -> None:
    drawn = dict(LOOKS[look])
    objective = Objective(*TERMS[composed], temperature=drawn.pop("temperature", 1.0))
    made = world(44, BOTH, lengths=(4, 3, 2), writers=(STUDENT, DATA), **drawn)
    truth = exact(made, objective, wanted=[NORM, AGREEMENT])
    for chunk_bytes in (2 * SOME, EVERYTHING):
        ours = answer(made, objective, chunk_bytes=chunk_bytes, wanted=[NORM, AGREEMENT])
        assert_same(ours.head.fields, truth.fields)


def test_the_gradient_s_length_is_known_where_everything_is_frozen() -> None:
    leaves = {name: leaf.detach() for name, leaf in operands(PLAIN).items()}
    out = head_of(PLAIN, leaves, DENSE, wanted=frozenset({NORM}))
    assert_same(out.fields, exact(PLAIN, DENSE, wanted=[NORM]).fields)


# --------------------------------------------------------------------------------------------
# Views without a distribution


@pytest.mark.parametrize("row_index", [False, True])
def test_every_field_of_an_answer_by_ids_is_exact(row_index: bool) -> None:
    made = world(50, "top_and_ids", lengths=LONG, row_index=row_index)
    keys = [FieldKey("teacher_logp", "teacher"), FULL_KEYS[-1]]
    for chosen, tail in (
        ("student_top_k", "bucket"),
        ("teacher_top_k", "renormalise"),
        ("union", "teacher_renormalise"),
        ("union", "bucket"),
        ("intersection", "truncate"),
        ("intersection", "bucket"),
        ("sampled", "bucket"),
        (ROUTING_SUPPORT, "bucket"),
    ):
        keys += [*keys_on(chosen, tail), *keys_on(chosen, tail, smoothing=0.1)]
    if not row_index:
        assert_same_fields(made, keys)
        return
    index = known(made.batch.token.views["teacher"].row_index)
    how: dict[str, Any] = {"wanted": frozenset(keys)}
    found = linear_head(made.hidden, made.unembedding, made.batch, **how).fields
    truth = naive_head(made.hidden, made.unembedding, made.batch, **how).fields
    assert_same(*({key: of[key][index >= 0] for key in keys} for of in (found, truth)))


def test_a_support_as_long_as_the_answer_is_served() -> None:
    made = world(51, "top", lengths=LONG)
    everything = Bound.of(partial(support.teacher_top_k, k=TEACHER_K))
    for tail in support.TAILS:
        assert_same_fields(made, keys_on(everything, tail))


REFUSED: Mapping[str, tuple[str, Objective]] = {
    "the whole vocabulary": ("top_and_ids", DENSE),
    "ids that are not among the likeliest": (
        "top",
        Objective(Dense(divergence=divergence.forward_kl, **BUCKET)),
    ),
    "likeliest ids where only ids were scored": (
        "ids",
        Objective(dense("reverse_kl", "union", "bucket")),
    ),
    "the token where it is not among the likeliest": ("top", Objective(LOG_RATIO)),
    "a support where the token alone was scored": (
        "sampled",
        Objective(dense("reverse_kl", "student_top_k", "bucket")),
    ),
    "an entropy nobody told": (
        "sampled",
        Objective(replace(LOG_RATIO, weights=(partial(weight.teacher_entropy_above, nats=1.0),))),
    ),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_a_view_did_not_answer_is_refused_by_its_name(asked: str) -> None:
    kind, objective = REFUSED[asked]
    terms = (replace(term, against="teacher.far") for term in objective.terms)
    made = world(52, {"teacher.far": kind}, lengths=LONG)
    with pytest.raises(TeacherError, match=re.escape("teacher.far")):
        answer(made, Objective(*terms))


def test_a_by_product_asks_a_view_for_nothing_it_did_not_say() -> None:
    """The log ratio is told of every row where it can be; where it cannot, nobody needs it."""
    made = world(53, "top", lengths=LONG)
    tokens = pack_rows(made.batch.token.tokens, made.batch.token.mask)
    top_ids = known(made.batch.token.views["teacher"].top_ids)
    assert not bool((top_ids == tokens[:, None]).any(-1).all())
    objective = Objective(dense("forward_kl", "teacher_top_k", "bucket"))
    assert_close(answer(made, objective).numbers, numbers(exact(made, objective)), DOUBLE_BOUND)


def test_a_token_is_found_wherever_the_view_named_it() -> None:
    made = world(54, "top", lengths=LONG)
    named = known(made.batch.token.views["teacher"].top_ids)
    tokens = made.batch.token.tokens.masked_scatter(
        made.batch.token.mask, named[:, 1:4].flatten()[::3]
    )
    made = replace(made, batch=with_token(made.batch, tokens=tokens))
    objective = Objective(LOG_RATIO)
    assert_close(answer(made, objective).numbers, numbers(exact(made, objective)), DOUBLE_BOUND)
    assert_same_fields(made, [FieldKey("teacher_logp", "teacher")])


def test_what_is_told_of_the_token_comes_first() -> None:
    made = world(55, "top_and_ids", lengths=LONG)
    told = torch.linspace(-3.0, -0.1, len(made.hidden), dtype=torch.float64)
    scores = replace(made.batch.token.views["teacher"], sampled_logp=told)
    made = replace(made, batch=with_token(made.batch, views={"teacher": scores}))
    key = FieldKey("teacher_logp", "teacher")
    out = linear_head(made.hidden, made.unembedding, made.batch, wanted=frozenset({key}))
    assert torch.equal(out.fields[key], told)


def test_an_entropy_that_is_told_serves_a_gate_on_the_whole_vocabulary() -> None:
    made = world(56, "sampled", lengths=LONG)
    told = torch.linspace(0.5, 2.5, len(made.hidden), dtype=torch.float64)
    scores = replace(made.batch.token.views["teacher"], entropy=told)
    made = replace(made, batch=with_token(made.batch, views={"teacher": scores}))
    assert_same_fields(made, [FieldKey("teacher_entropy", "teacher")])
    gate = partial(weight.teacher_entropy_above, nats=1.5)
    objective = Objective(replace(LOG_RATIO, weights=(gate,)))
    ours, truth = answer(made, objective), exact(made, objective)
    assert_close(ours.numbers, numbers(truth), DOUBLE_BOUND)
    assert torch.equal(truth.row_losses["sampled"] == 0, told <= 1.5)


def test_an_entropy_that_is_told_is_not_that_of_a_distribution_or_a_support() -> None:
    for kind in ("log_probs", "top"):
        made = world(57, kind, lengths=LONG)
        told = torch.full((len(made.hidden),), 9.0, dtype=torch.float64)
        scores = replace(made.batch.token.views["teacher"], entropy=told)
        made = replace(made, batch=with_token(made.batch, views={"teacher": scores}))
        keys = [FieldKey("teacher_entropy", "teacher", SUPPORTS["teacher_top_k"], "bucket")]
        keys += [FieldKey("teacher_entropy", "teacher")] if kind == "log_probs" else []
        assert_same_fields(made, keys)


# --------------------------------------------------------------------------------------------
# Views that answer other rows, and views of other vocabularies


@pytest.mark.parametrize("kind", [*WHOLE, *MAPPED, "top_and_ids"])
@pytest.mark.parametrize("chunk_bytes", [2 * SOME, EVERYTHING])
def test_a_row_without_an_answer_counts_as_a_row_and_teaches_nothing(
    kind: str, chunk_bytes: int
) -> None:
    made = world(60, {"teacher": kind, "reference": "log_probs"}, lengths=LONG, row_index=True)
    reference = replace(made.batch.token.views["reference"], row_index=None)
    rows = len(made.hidden)
    reference = replace(
        reference, log_probs=normal(torch.Generator().manual_seed(1), rows, SIZE).log_softmax(-1)
    )
    views = {**made.batch.token.views, "reference": reference}
    made = replace(made, batch=with_token(made.batch, views=views))
    term = dense("forward_kl", "union", "bucket", kind)
    pull = Dense(divergence=divergence.reverse_kl, against="reference", coef=0.5, name="pull")
    asked = made.batch.token.views["teacher.a" if kind == "combination" else "teacher"]
    index = known(asked.row_index)
    unanswered = index < 0
    if kind == "combination":  # each part has holes of its own
        other = known(made.batch.token.views["teacher.b"].row_index)
        unanswered = unanswered | (other < 0)
    assert 0 < int(unanswered.sum()) < rows

    alone = answer(made, Objective(term), chunk_bytes=chunk_bytes)
    assert not alone.head.rows["loss/dense"][unanswered].any()
    assert not alone.gradients["hidden"][unanswered].any()
    assert bool((alone.gradients["hidden"][~unanswered] != 0).any(-1).all())
    assert_close(alone.numbers, numbers(exact(made, Objective(term))), DOUBLE_BOUND)

    both = answer(made, Objective(term, pull), chunk_bytes=chunk_bytes)
    other_alone = answer(made, Objective(pull), chunk_bytes=chunk_bytes)
    assert_close(both.numbers, numbers(exact(made, Objective(term, pull))), DOUBLE_BOUND)
    assert_close(
        {"hidden": both.gradients["hidden"][unanswered]},
        {"hidden": other_alone.gradients["hidden"][unanswered]},
        DOUBLE_BOUND,
    )


def test_every_kind_of_term_leaves_rows_without_an_answer_alone() -> None:
    made = world(61, BOTH, lengths=LONG, row_index=True, writers=(STUDENT, DATA))
    for composed in ("clipped", "CR-OPD", "CR-OPD beside its source", "bucket and its residual"):
        objective = Objective(*TERMS[composed])
        ours = answer(made, objective, chunk_bytes=2 * SOME)
        assert_close(ours.numbers, numbers(exact(made, objective)), DOUBLE_BOUND)
        index = known(made.batch.token.views["teacher"].row_index)
        assert not ours.gradients["hidden"][index < 0].any()


def test_an_answer_that_no_row_points_at_is_not_read() -> None:
    """The first and the last would be taken by a -1 that is clamped, or used as it is."""
    made = world(62, "log_probs", lengths=LONG)
    teacher = known(made.batch.token.views["teacher"].log_probs)
    rows = len(teacher)
    certain = torch.full((1, SIZE), -math.inf, dtype=torch.float64)
    certain[0, 3] = 0.0
    index = torch.arange(rows) + 1
    index[1::3] = -1
    scores = TeacherScores(log_probs=torch.cat([certain, teacher, certain]), row_index=index)
    made = replace(made, batch=with_token(made.batch, views={"teacher": scores}))
    ours, truth = answer(made, DENSE, chunk_bytes=1), exact(made, DENSE)
    assert float(ours.loss) < math.inf
    assert_close(ours.numbers, numbers(truth), DOUBLE_BOUND)


def test_one_answer_may_serve_every_row_and_none() -> None:
    made = world(63, "log_probs", lengths=LONG)
    teacher = known(made.batch.token.views["teacher"].log_probs)
    for index in (torch.zeros(len(teacher)).long(), torch.full((len(teacher),), -1)):
        scores = TeacherScores(log_probs=teacher[:1], row_index=index)
        once = replace(made, batch=with_token(made.batch, views={"teacher": scores}))
        ours = answer(once, DENSE)
        assert_close(ours.numbers, numbers(exact(once, DENSE)), DOUBLE_BOUND)
        assert bool(ours.gradients["weight"].any()) == bool((index >= 0).any())


def test_an_identity_map_changes_nothing_and_an_unknown_id_has_no_mass() -> None:
    for kind in ("transformed", "log_probs"):
        made = world(64, kind, lengths=LONG)
        scores = made.batch.token.views["teacher"]

        def mapped(id_map: Tensor, made: World = made, scores: TeacherScores = scores) -> World:
            views = {"teacher": replace(scores, id_map=id_map)}
            return replace(made, batch=with_token(made.batch, views=views))

        plain = answer(made, DENSE).numbers
        assert_close(answer(mapped(torch.arange(SIZE)), DENSE).numbers, plain, DOUBLE_BOUND)
        id_map = torch.arange(SIZE)
        id_map[[3, 7]] = -1
        key = FieldKey("teacher_log_probs", "teacher")
        out = linear_head(
            made.hidden, made.unembedding, mapped(id_map).batch, wanted=frozenset({key})
        )
        found = out.fields[key].exp()
        assert not found[:, [3, 7]].any()
        assert torch.allclose(found.sum(-1), torch.ones(len(found), dtype=torch.float64))

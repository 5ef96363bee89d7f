"""Rows whose logits come from different heads."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from opd.errors import TeacherError
from opd.formula import credit, divergence, reward
from opd.head import fold, products
from opd.head.replies import check_reply
from opd.objective import Dense, Objective, Sampled
from opd.rollout.pack import with_token
from opd.types import FieldKey, TeacherScores, Unembedding
from tests.builders import Case, evaluate, evaluate_in_parts

VOCAB = 7
REVERSE_KL = Objective(Dense(divergence=divergence.reverse_kl))
OBJECTIVES = {
    "dense": REVERSE_KL,
    "warm": Objective(
        Dense(partial(divergence.generalized_jsd, teacher_weight=0.3)), temperature=2
    ),
    "sampled": Objective(Sampled(reward.teacher_log_ratio, baseline=credit.expected_reward)),
}


def some_heads() -> tuple[Unembedding, ...]:
    """Of three widths: padded, with bias and scale, with a soft cap."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return (
        Unembedding(normal(9, 4), VOCAB),
        Unembedding(normal(VOCAB, 6), VOCAB, bias=normal(VOCAB), logit_scale=0.5),
        Unembedding(normal(8, 3), VOCAB, soft_cap=1.5),
    )


def by_hand(hidden: Tensor, head: Unembedding) -> Tensor:
    """The logits of one row, entry by entry of the formula in `Unembedding`."""
    found = []
    for token in range(head.vocab_size):
        z = sum(float(h) * float(w) for h, w in zip(hidden, head.weight[token], strict=False))
        z += 0.0 if head.bias is None else float(head.bias[token])
        z *= head.logit_scale
        capped = torch.tensor(z, dtype=torch.float64)
        if head.soft_cap is not None:
            capped = head.soft_cap * torch.tanh(capped / head.soft_cap)
        found.append(capped)
    return torch.stack(found)


def mixed(rows: int, seed: int = 0) -> tuple[TeacherScores, Tensor]:
    """A view that three models answered, and its logits."""
    draw = torch.Generator().manual_seed(seed)
    heads = some_heads()
    hidden = torch.randn((rows, 6), generator=draw, dtype=torch.float64)
    answered_by = torch.randint(3, (rows,), generator=draw)
    view = TeacherScores(hidden=hidden, names=("a", "b", "c"), heads=heads, answered_by=answered_by)
    widths = [head.weight.shape[1] for head in heads]
    logits = torch.stack(
        [by_hand(h[: widths[k]], heads[k]) for h, k in zip(hidden, answered_by, strict=True)]
    )
    return view, logits


@pytest.mark.parametrize("rows", [1, 5, 300])
def test_each_row_is_projected_with_its_own_head(rows: int) -> None:
    view, expected = mixed(rows)
    out = torch.full((rows, VOCAB), torch.nan, dtype=torch.float64)
    assert view.hidden is not None
    assert view.answered_by is not None
    products.logits_by_head_into(out, view.hidden, view.heads, view.answered_by)
    assert (out - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("chunk_bytes", [1, 500, 2**28])
def test_a_view_of_several_heads_is_the_view_of_their_logits(name: str, chunk_bytes: int) -> None:
    case = Case.random(0, vocab_size=VOCAB)
    view, logits = mixed(int(case.mask.sum()))
    plain = TeacherScores(
        hidden=logits, unembedding=Unembedding(torch.eye(VOCAB, dtype=torch.float64), VOCAB)
    )
    objective = OBJECTIVES[name]
    ours, theirs = (
        evaluate(case, objective, with_token(case.batch(), views={"teacher": v}), **options)
        for v, options in ((view, {"chunk_bytes": chunk_bytes}), (plain, {}))
    )
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-13)
    assert (ours.gradient - theirs.gradient).abs().max() <= 1e-14
    loss, gradient = evaluate_in_parts(
        case, objective, 8, with_token(case.batch(), views={"teacher": view})
    )
    assert loss == pytest.approx(theirs.loss, abs=1e-13)
    assert (gradient - theirs.gradient).abs().max() <= 1e-14


def test_the_fold_serves_heads_of_the_students_vocabulary() -> None:
    view, _ = mixed(4)
    wanted = frozenset({FieldKey("forward_kl", "teacher")})
    assert fold.fold_weight(REVERSE_KL, wanted, {"teacher": view}, VOCAB) == 0.0
    assert fold.fold_weight(REVERSE_KL, wanted, {"teacher": view}, VOCAB + 1) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": some_heads()[:2]}, "3 names, 2 heads"),
        ({"answered_by": None}, "no answered_by"),
        ({"names": ()}, "0 names"),
        ({"answered_by": torch.tensor([0, 3])}, "names the model 3, and there are 3"),
        ({"heads": (*some_heads()[:2], None)}, "rows that 'c' answered, and no head"),
        (
            {"heads": (*some_heads()[:2], Unembedding(torch.zeros(9, 3), 6))},
            "different vocabularies: {'a': 7, 'b': 7, 'c': 6}",
        ),
        ({"hidden": torch.zeros(2, 5)}, "head of 'b' reads 6 hidden units, and hidden has 5"),
    ],
)
def test_models_and_heads_that_do_not_go_together_are_refused(
    change: dict[str, object], words: str
) -> None:
    fields = {
        "hidden": torch.zeros(2, 6),
        "names": ("a", "b", "c"),
        "heads": some_heads(),
        "answered_by": torch.tensor([0, 2]),
    }
    check_reply("teacher", TeacherScores(**fields), rows=2)  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match=words):
        check_reply("teacher", TeacherScores(**{**fields, **change}), rows=2)  # type: ignore[arg-type]

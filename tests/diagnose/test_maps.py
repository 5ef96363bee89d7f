"""Where a probe says that teacher and student disagree: planted cells, ranks, and what is told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd.diagnose.evidence import Evidence
from opd.diagnose.maps import BINS, disagreement_maps

SIDE = 8
"""Rows by every eighth of the student's entropy and every eighth of the teacher's."""
STUDENT, TEACHER = (
    each.flatten() for each in torch.meshgrid(2 * [torch.arange(8.0)], indexing="ij")
)


def evidence(**rows: Tensor) -> Evidence:
    shape = SIDE, SIDE
    return Evidence(
        tokens=torch.zeros(shape, dtype=torch.long),
        mask=torch.ones(shape, dtype=torch.bool),
        group=torch.arange(SIDE) // 2,
        verdict=torch.zeros(SIDE),
        stop_reason=("eos",) * SIDE,
        rows={"student_entropy": STUDENT, **rows},
        k=4,
        vocab_size=53,
    )


def planted(student: range, teacher: range, much: float = 5.0) -> Tensor:
    """A reverse KL of 1, and of more where the entropies are these."""
    inside = torch.isin(STUDENT, torch.tensor(student)) & torch.isin(TEACHER, torch.tensor(teacher))
    return torch.where(inside, much, 1.0)


@pytest.mark.parametrize("row", range(BINS))
@pytest.mark.parametrize("column", range(BINS))
def test_a_planted_cell_is_where_the_disagreement_is(row: int, column: int) -> None:
    kl = planted(range(2 * row, 2 * row + 2), range(2 * column, 2 * column + 2), 20.0)
    found, _ = disagreement_maps(evidence(teacher_entropy=TEACHER, reverse_kl=kl))
    assert (found.columns, found.of, found.rows) == ("teacher_entropy", "reverse_kl", 64)
    # 4 rows of 20 in the cell, 60 rows of 1 in the others, 4 each
    for i in range(BINS):
        for j in range(BINS):
            here = 80 / 140 if (i, j) == (row, column) else 4 / 140
            assert found.disagreement[i][j] == pytest.approx(here)
            assert found.tokens[i][j] == pytest.approx(1 / 16)
    # 63 places between the values of 64 rows, 8 of each: a quarter of the way is in the second
    assert found.student_edges == (1.75, 3.5, 5.25)


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (range(4), range(4), "both are surer than usual"),
        (range(4), range(4, 8), "the student is surer than usual and the teacher less"),
        (range(4, 8), range(4), "the teacher is surer than usual and the student less"),
        (range(4, 8), range(4, 8), "both are less sure than usual"),
    ],
)
def test_the_words_name_the_half_of_each(student: range, teacher: range, words: str) -> None:
    # 16 rows of 5 of 80 + 48
    kl = planted(student, teacher)
    found, _ = disagreement_maps(evidence(teacher_entropy=TEACHER, reverse_kl=kl))
    assert found.words == (
        f"62% of the disagreement is where {words}, 25% of the tokens (median entropy 3.5 nats of "
        "the student, 3.5 of the teacher)"
    )


def test_the_rows_that_disagree_most_are_told_with_how_sure_the_student_is() -> None:
    # 16 rows of 9 hold 144 of 192; a quarter of them where the student is surer
    kl = torch.ones(64)
    kl[[*range(4), *range(52, 64)]] = 9.0
    _, found = disagreement_maps(evidence(teacher_entropy=TEACHER, reverse_kl=kl))
    assert found.columns == "reverse_kl"
    assert [of_row[-1] for of_row in found.disagreement] == [
        pytest.approx(each / 192) for each in (36, 0, 0, 108)
    ]
    assert [sum(of_row[1:-1]) for of_row in found.tokens] == [0.0] * BINS  # equal ones together
    assert found.words == (
        "the 25% of the tokens on which they disagree most hold 75% of the disagreement, 19% where "
        "the student is surer than usual (median entropy 3.5 nats)"
    )


def test_of_single_tokens_the_log_ratio_disagrees_whatever_its_sign() -> None:
    ratio = torch.where(torch.arange(64) % 2 == 0, -2.0, 1.0)
    (found,) = disagreement_maps(evidence(log_ratio=ratio))
    assert (found.columns, found.of) == ("log_ratio", "log_ratio")
    assert sum(each[-1] for each in found.tokens) == 0.0  # the upper half, from its first rank on
    assert sum(each[2] for each in found.disagreement) == pytest.approx(2 / 3)


def test_rows_without_an_answer_are_in_no_cell() -> None:
    kl = planted(range(4), range(4))
    kl[STUDENT == 7] = math.nan
    found, _ = disagreement_maps(evidence(teacher_entropy=TEACHER, reverse_kl=kl))
    assert found.rows == 56
    assert sum(map(sum, found.tokens)) == pytest.approx(1.0)
    seen = evidence(teacher_entropy=TEACHER, reverse_kl=kl)
    nobody = replace(seen, rows={**seen.rows, "reverse_kl": torch.full((64,), math.nan)})
    assert disagreement_maps(nobody) == ()


def test_where_nothing_disagrees_there_is_no_share() -> None:
    for each in disagreement_maps(evidence(teacher_entropy=TEACHER, reverse_kl=torch.zeros(64))):
        assert each.words == "they disagree nowhere"
        assert all(math.isnan(share) for of_row in each.disagreement for share in of_row)

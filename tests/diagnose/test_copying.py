from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from opd.diagnose.copying import NO_TOKEN, copied_stats, longest_run, told_tokens
from opd.types import Rollout
from tests.builders import DATA, STUDENT, TOOL, rollout_of

PADDING = 0


def by_brute_force(response: Sequence[int], told: Sequence[int], known: Sequence[int]) -> int:
    """Every run of the response, looked for everywhere in both texts."""

    def stands_in(run: Sequence[int], text: Sequence[int]) -> bool:
        return any(list(text[i : i + len(run)]) == list(run) for i in range(len(text)))

    best = 0
    for begin in range(len(response)):
        for end in range(begin + 1, len(response) + 1):
            run = response[begin:end]
            if NO_TOKEN not in run and stands_in(run, told) and not stands_in(run, known):
                best = max(best, len(run))
    return best


@pytest.mark.parametrize("letters", [1, 2, 3, 6, 50])
def test_the_longest_run_is_that_of_every_run_looked_for_everywhere(letters: int) -> None:
    draw = random.Random(letters)
    lengths = set()
    for _ in range(400):
        sizes = draw.randint(0, 12), draw.randint(0, 12), draw.randint(0, 8)
        response, told, known = ([draw.randrange(letters) for _ in range(n)] for n in sizes)
        if len(response) > 3 and draw.random() < 0.5:  # another's token: no run goes over it
            response[draw.randrange(len(response))] = NO_TOKEN
        if draw.random() < 0.5:  # a part that was told, and one that was known
            response += told[2:8] + known[:5] + told[:4]
        found = longest_run(response, told, known)
        assert found == by_brute_force(response, told, known)
        lengths.add(found)
    assert len(lengths) > 3


@pytest.mark.parametrize(
    ("response", "told", "known", "run"),
    [
        ([5, 6, 7, 8], [1, 6, 7, 8, 1], [5, 6], 3),
        ([5, 6, 7, 8], [1, 5, 6, 2, 2], [5, 6], 0),  # it stood in the prompt
        ([5, 6, 7, 8], [5, 6, 7], [5, 6], 3),  # that did not
        ([], [1], [], 0),
        ([1], [], [], 0),
    ],
)
def test_by_hand(response: list[int], told: list[int], known: list[int], run: int) -> None:
    assert longest_run(response, told, known) == run


@pytest.mark.parametrize(
    ("privileged", "own", "told"),
    [
        ((1, 2, 3, 7, 8, 9), (1, 2, 3, 9), (7, 8)),  # a hint behind, then the same header
        ((1, 7, 8, 2, 3), (1, 2, 3), (7, 8)),  # a hint in front
        ((1, 2, 3), (1, 2, 3), ()),
        ((1, 2, 2, 3), (1, 2, 3), (2,)),  # beginning and end do not count a token twice
        ((7, 8), (1, 2, 3), (7, 8)),
        ((), (1, 2), ()),
    ],
)
def test_what_was_told_lies_between_what_both_prompts_share(
    privileged: tuple[int, ...], own: tuple[int, ...], told: tuple[int, ...]
) -> None:
    assert tuple(told_tokens(privileged, own)) == told


def rollout(provenance: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> Rollout:
    writers = torch.tensor(provenance)
    return rollout_of(
        torch.tensor(tokens),
        writers != PADDING,
        writers,
        prompt_ids=[(1, 4)] * len(tokens),
        stop_reason=["eos", "length", "length"][: len(tokens)],
    )


def test_shares_are_of_the_students_own_tokens_without_the_end_token() -> None:
    made = rollout(
        [[STUDENT] * 4, [STUDENT, STUDENT, TOOL, STUDENT], [DATA, DATA, PADDING, PADDING]],
        [[7, 8, 9, 2], [7, 5, 8, 9], [7, 8, 0, 0]],
    )
    copied, mostly = copied_stats(made, [(1, 7, 8, 9, 4)] * 3)
    # 7 8 9 of 7 8 9; of 7 5 (tool) 9 one token; the data's own text is nobody's copy
    assert copied.total == pytest.approx(1 + 1 / 3)
    assert copied.count == 2
    assert (mostly.total, mostly.count) == (1, 2)


def test_a_response_that_nothing_was_told_about_does_not_count() -> None:
    made = rollout([[STUDENT] * 4] * 2, [[7, 8, 9, 2]] * 2)
    copied, _ = copied_stats(made, [(), (1, 7, 4)])
    assert copied.total == pytest.approx(1 / 4)  # cut off: no end token
    assert copied.count == 1
    nothing, _ = copied_stats(made, [(), ()])
    assert nothing.count == 0


def test_a_context_that_tells_nothing_new_is_copied_by_nobody() -> None:
    made = rollout([[STUDENT] * 4], [[1, 4, 1, 4]])
    copied, mostly = copied_stats(made, [(1, 4)])
    assert (copied.total, copied.count, mostly.total) == (0, 1, 0)

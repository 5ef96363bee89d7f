from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.formula import response

F64 = torch.float64
NAN = math.nan
NONE = -math.inf
Weight = Callable[..., Tensor]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def rows(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=F64)


def of_responses(weight: Tensor, mask: Tensor) -> list[float]:
    """One number per response, after checking that its open tokens share it; NaN without any."""
    assert (weight[~mask] == 0).all()
    found = []
    for values, is_open in zip(weight, mask, strict=True):
        assert values[is_open].unique().numel() <= 1
        found.append(float(values[is_open][0]) if is_open.any() else NAN)
    return found


# Seven responses of three prompts: two correct ones and a wrong one; one not judged and one
# without a token; two wrong ones. Of the second prompt no open token was judged.
GROUP = torch.tensor([4, 4, 4, 0, 0, 9, 9])
VERDICT = tensor(1.0, 0.5, 0.25, NAN, NAN, 0.0, 0.49)
MASK = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0], [0, 0], [1, 1], [1, 0]], dtype=torch.bool)


# --------------------------------------------------------------------------------------------
# Prompts


def test_difficulty_by_hand() -> None:
    # Two of three pass; nothing was judged; none of two passes.
    weigh = partial(response.difficulty, VERDICT, GROUP, MASK)
    found = of_responses(weigh(pass_power=1.0, fail_power=2.0), MASK)
    assert found[:4] == pytest.approx([2 / 27] * 3 + [0])
    assert found[5:] == [0, 0]
    # A power of 0 leaves its factor out, also where that is 0.
    assert of_responses(weigh(pass_power=0.0, fail_power=1.0), MASK)[5:] == [1, 1]
    assert of_responses(weigh(pass_power=0.0, fail_power=0.0), MASK)[3] == 0


def test_an_unjudged_sample_gets_the_weight_of_its_prompt_and_has_no_say_in_it() -> None:
    mask = torch.ones(4, 1, dtype=torch.bool)
    found = response.difficulty(
        tensor(1.0, 0.0, NAN, NAN),
        torch.zeros(4, dtype=torch.int64),
        mask,
        pass_power=1.0,
        fail_power=1.0,
    )
    assert found.flatten().tolist() == [0.25] * 4


@pytest.mark.parametrize("passing", range(5))
def test_difficulty_is_largest_at_a_half_and_nothing_at_either_end(passing: int) -> None:
    verdict = tensor(*[1.0] * passing, *[0.0] * (4 - passing))
    group, mask = torch.zeros(4, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bool)
    found = response.difficulty(verdict, group, mask, pass_power=1.0, fail_power=1.0)
    assert found.unique().tolist() == [[0, 3 / 16, 4 / 16, 3 / 16, 0][passing]]


def test_prompts_that_fail_and_prompts_that_pass_share_out_the_judged_ones() -> None:
    fail = response.group_all_fail(VERDICT, GROUP, MASK)
    some = response.group_some_pass(VERDICT, GROUP, MASK)
    assert of_responses(fail, MASK)[:4] == [0, 0, 0, 0]
    assert of_responses(fail, MASK)[5:] == [1, 1]
    assert of_responses(some, MASK)[:4] == [1, 1, 1, 0]
    assert of_responses(some, MASK)[5:] == [0, 0]
    # The bound is a pass, and an unjudged sample follows its prompt.
    mask, group = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    for verdict, passes in ((tensor(NAN, 0.5), 1.0), (tensor(NAN, 0.4999), 0.0)):
        assert response.group_some_pass(verdict, group, mask).unique().tolist() == [passes]
        assert response.group_all_fail(verdict, group, mask).unique().tolist() == [1 - passes]


@given(
    st.lists(st.sampled_from([0.0, 0.4, 0.5, 1.0, NAN]), min_size=6, max_size=6),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_the_two_gates_of_a_prompt_are_complements_where_a_sample_was_judged(
    verdicts: list[float], groups: list[int]
) -> None:
    mask = torch.ones(6, 2, dtype=torch.bool)
    inputs = tensor(*verdicts), torch.tensor(groups), mask
    both = response.group_all_fail(*inputs) + response.group_some_pass(*inputs)
    for place, group in enumerate(groups):
        peers = [v for v, other in zip(verdicts, groups, strict=True) if other == group]
        judged = not all(math.isnan(v) for v in peers)
        assert both[place].tolist() == [float(judged)] * 2


# --------------------------------------------------------------------------------------------
# Teacher and verifier


def test_responses_on_which_teacher_and_verifier_disagree_are_closed() -> None:
    # Sums of log ratios: 1, -1, 0 (of 5 and -5), and one without a token.
    teacher = rows((2.0, -1.0), (-3.0, 2.0), (5.0, -5.0), (NAN, NAN))
    student = torch.zeros_like(teacher)
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [0, 0]], dtype=torch.bool)
    for verdict, expected in (
        (1.0, [1, 0, 1]),
        (0.5, [1, 0, 1]),
        (0.49, [0, 1, 1]),
        (NAN, [0, 0, 0]),
    ):
        gate = response.agrees_with_verdict(
            teacher, student, torch.full((4,), verdict).double(), mask
        )
        assert of_responses(gate, mask)[:3] == expected
    # What stands at closed tokens is not read, and no teacher mass is a clear opinion.
    gate = response.agrees_with_verdict(
        rows((1.0, -9.0), (1.0, NONE)),
        rows((0.0, 0.0), (0.0, 0.0)),
        tensor(1.0, 1.0),
        torch.tensor([[True, False], [True, True]]),
    )
    assert gate.tolist() == [[1, 0], [0, 0]]


def test_the_responses_that_the_teacher_finds_least_likely_are_dropped() -> None:
    # Means -1, -2, (no token), -3, -5. At 0.5 the quantile is -2.5; at 1/3 it is -3 itself.
    logp = rows((-1.0, NAN), (-1.0, -3.0), (NAN, NAN), (-3.0, -3.0), (-5.0, NAN))
    mask = ~logp.isnan()

    def gate(share: float) -> list[float]:
        found = of_responses(response.likely_for_teacher(logp, mask, drop_share=share), mask)
        return [found[place] for place in (0, 1, 3, 4)]

    assert gate(0.01) == [1, 1, 1, 0]
    assert gate(0.3) == [1, 1, 1, 0]
    assert gate(0.5) == [1, 1, 0, 0]
    assert gate(0.99) == [1, 0, 0, 0]


def test_responses_that_are_equally_likely_all_stay() -> None:
    logp = torch.full((3, 4), -0.7, dtype=F64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert (response.likely_for_teacher(logp, mask, drop_share=0.9) == 1).all()
    alone = response.likely_for_teacher(logp[:1], mask[:1], drop_share=0.9)
    assert alone.tolist() == [[1.0] * 4]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("impossible", [1, 2, 3, 4])
def test_responses_without_teacher_mass_go_first_and_one_response_stays(
    share: float, impossible: int
) -> None:
    logp = rows((-1.0,), (-2.0,), (-3.0,), (-4.0,))
    logp[4 - impossible :] = NONE
    mask = torch.ones(4, 1, dtype=torch.bool)
    gate = of_responses(response.likely_for_teacher(logp, mask, drop_share=share), mask)
    assert gate[0] == 1
    assert gate == sorted(gate, reverse=True)


def test_pivotal_by_hand() -> None:
    # q: log 2, log 4, (none); 0.1 alone, so u = 1; log 8 held at log 4. Means of those at or above
    # log 2: 1.5 log 2, none, log 4; at temperature 1/2 u is 8, 1, 16, and 25/3 in the mean.
    log = math.log
    over = rows((log(2), log(4), 0.0), (0.1, 0.2, -3.0), (log(8), NAN, 0.0), (NAN, NAN, NAN))
    mask = ~over.isnan()
    knobs = {"at_least": log(2), "ratio_cap": log(4), "temperature": 0.5, "weight_cap": 10.0}
    teacher = torch.zeros_like(over)
    found = of_responses(response.pivotal(teacher, teacher + over, mask, **knobs), mask)
    assert found[:3] == pytest.approx([24 / 25, 3 / 25, 48 / 25], rel=1e-12)
    capped = response.pivotal(teacher, teacher + over, mask, **{**knobs, "weight_cap": 1.5})
    assert of_responses(capped, mask)[:3] == pytest.approx([24 / 25, 3 / 25, 1.5], rel=1e-12)
    counted = response.pivotal.counted  # type: ignore[attr-defined]
    above = counted(teacher, teacher + over, mask, **knobs)
    assert above[mask].tolist() == [False] * 6 + [True, False]
    assert not above[~mask].any()


def test_pivotal_weights_are_one_on_average_before_the_cap_and_where_nothing_is_overrated() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, student = -3 * torch.rand(2, 6, 5, generator=generator, dtype=F64)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    knobs = {"at_least": 0.5, "ratio_cap": 2.0, "temperature": 1.0, "weight_cap": 100.0}
    found = [
        value
        for value in of_responses(response.pivotal(teacher, student, mask, **knobs), mask)
        if not math.isnan(value)
    ]
    assert sum(found) / len(found) == pytest.approx(1.0, rel=1e-12)
    assert max(found) > 1.1
    agreed = response.pivotal(student, student, mask, **knobs)
    assert torch.equal(agreed, mask.double())
    impossible = response.pivotal(torch.full_like(student, NONE), student, mask, **knobs)
    assert torch.allclose(impossible, mask.double())


# --------------------------------------------------------------------------------------------
# Shares of a prompt


def test_correct_responses_share_by_how_rarely_the_student_says_them() -> None:
    # Perplexities 2 and 4 of the two correct ones, 8 of the wrong one.
    logp = -math.log(2) * rows((1, 1), (NAN, 2), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    share = partial(response.share_of_correct, logp, VERDICT, GROUP, MASK)
    assert of_responses(share(temperature=1.0), MASK)[:4] == pytest.approx([1 / 3, 2 / 3, 0, 0])
    # At 1/2 the squares of the perplexities, 4 and 16.
    assert of_responses(share(temperature=0.5), MASK)[:2] == pytest.approx([1 / 5, 4 / 5])
    assert of_responses(share(temperature=1e9), MASK)[:2] == pytest.approx([1 / 2, 1 / 2])
    assert of_responses(share(temperature=1.0), MASK)[5:] == [0, 0]


def test_wrong_responses_share_by_how_readily_the_teacher_says_them() -> None:
    # Perplexity 8 of the one wrong response of prompt 4; 2 and 4 of the two of prompt 9.
    logp = -math.log(2) * rows((1, 1), (NAN, 2), (3, 3), (1, 1), (1, 1), (1, 1), (2, 7))
    share = partial(response.share_of_wrong, logp, VERDICT, GROUP, MASK)
    found = of_responses(share(temperature=1.0), MASK)
    assert found[:4] == pytest.approx([0, 0, 1, 0])
    assert found[5:] == pytest.approx([2 / 3, 1 / 3])
    assert of_responses(share(temperature=0.5), MASK)[5:] == pytest.approx([4 / 5, 1 / 5])


SHARES: list[tuple[Weight, bool]] = [
    (response.share_of_correct, True),
    (response.share_of_wrong, False),
]


@pytest.mark.parametrize(("function", "passes"), SHARES)
@pytest.mark.parametrize("temperature", [1e-3, 0.3, 1.0, 50.0])
def test_the_shares_of_a_prompt_sum_to_one_wherever_one_is_due(
    function: Weight, passes: bool, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(5)
    group = torch.randint(4, (12,), generator=generator)
    verdict = tensor(0.0, 0.5, 1.0, NAN)[torch.randint(4, (12,), generator=generator)]
    logp = -40 * torch.rand(12, 6, generator=generator, dtype=F64)
    mask = torch.rand(12, 6, generator=generator) < 0.5
    mask[3] = False
    found = function(logp, verdict, group, mask, temperature=temperature)
    assert found.isfinite().all()
    due = ((verdict >= 0.5) if passes else (verdict < 0.5)) & mask.any(1)
    values = torch.tensor(of_responses(found, mask)).nan_to_num(0.0)
    assert (values[~due] == 0).all()
    totals = {int(prompt): float(values[group == prompt].sum()) for prompt in group[due].unique()}
    assert len(totals) >= 2
    assert list(totals.values()) == pytest.approx([1.0] * len(totals), rel=1e-6)


@pytest.mark.parametrize("function", [function for function, _ in SHARES])
def test_one_response_alone_has_the_whole_share_and_equals_have_equal_ones(
    function: Weight,
) -> None:
    verdict = tensor(1.0, 1.0, 1.0) if function is response.share_of_correct else tensor(0, 0, 0)
    logp, mask = rows((-3.0,), (-3.0,), (-700.0,)), torch.ones(3, 1, dtype=torch.bool)
    found = function(logp, verdict, torch.tensor([1, 1, 2]), mask, temperature=0.1)
    assert found.flatten().tolist() == pytest.approx([0.5, 0.5, 1.0])


def test_a_wrong_response_without_teacher_mass_has_no_share_and_makes_no_nan() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    share = partial(response.share_of_wrong, verdict=tensor(0.0, 0.0), mask=mask, temperature=1.0)
    group = torch.tensor([0, 0])
    assert share(rows((-1.0, NONE), (-1.0, -2.0)), group=group).tolist() == [[0, 0], [1, 1]]
    assert share(rows((-1.0, NONE), (NONE, -2.0)), group=group).isfinite().all()


# --------------------------------------------------------------------------------------------


def test_the_teachers_certainty_on_wrong_responses_by_hand() -> None:
    # Weights 1, 1/2 and 1/4 on the three tokens of wrong responses, of mean 7/12.
    log = math.log
    entropy = rows((0.0, log(2)), (log(4), NAN), (5.0, 5.0), (5.0, 5.0))
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]], dtype=torch.bool)
    verdict = tensor(0.0, 0.49, 0.5, NAN)
    found = response.sure_teacher_where_wrong(entropy, verdict, mask, sharpness=1.0)
    assert found.flatten().tolist() == pytest.approx(
        [12 / 7, 6 / 7, 3 / 7, 0, 0, 0, 0, 0], rel=1e-12
    )
    # Twice as sharp: 1, 1/4, 1/16, of mean 7/16.
    sharper = response.sure_teacher_where_wrong(entropy, verdict, mask, sharpness=2.0)
    assert sharper[:2].flatten().tolist() == pytest.approx([16 / 7, 4 / 7, 1 / 7, 0], rel=1e-12)


@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 30.0])
def test_the_certainty_is_one_on_average_over_the_tokens_of_wrong_responses(
    sharpness: float,
) -> None:
    generator = torch.Generator().manual_seed(4)
    entropy = 0.1 + torch.rand(5, 8, generator=generator, dtype=F64)
    mask = torch.rand(5, 8, generator=generator) < 0.6
    wrong = mask & torch.tensor([True, False, True, True, False])[:, None]
    verdict = tensor(0.0, 1.0, 0.2, 0.4, NAN)
    found = response.sure_teacher_where_wrong(entropy, verdict, mask, sharpness=sharpness)
    assert float(found[wrong].mean()) == pytest.approx(1.0, rel=1e-9)
    assert (found[~wrong] == 0).all()
    # the surer the teacher, the more
    order = entropy[wrong].argsort()
    assert (found[wrong][order].diff() <= 0).all()
    nobody = response.sure_teacher_where_wrong(
        entropy, torch.ones(5, dtype=F64), mask, sharpness=sharpness
    )
    assert (nobody == 0).all()


# --------------------------------------------------------------------------------------------
# All of them

PIVOTAL = {"at_least": 0.8, "ratio_cap": 2.5, "temperature": 1.0, "weight_cap": 10.0}


def weights(
    numbers: Tensor, verdict: Tensor, group: Tensor, mask: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Every weight of the module, `numbers` being log-probabilities, or entropies with a minus."""
    zero, judged = torch.zeros_like(numbers), (verdict, group, mask)
    powers = {"pass_power": 1.0, "fail_power": 1.0}
    return {
        "agrees_with_verdict": lambda: response.agrees_with_verdict(numbers, zero, verdict, mask),
        "difficulty": lambda: response.difficulty(*judged, **powers),
        "group_all_fail": lambda: response.group_all_fail(*judged),
        "group_some_pass": lambda: response.group_some_pass(*judged),
        "likely_for_teacher": lambda: response.likely_for_teacher(numbers, mask, drop_share=0.2),
        "pivotal": lambda: response.pivotal(numbers, zero, mask, **PIVOTAL),
        "share_of_correct": lambda: response.share_of_correct(numbers, *judged, temperature=1.0),
        "share_of_wrong": lambda: response.share_of_wrong(numbers, *judged, temperature=1.0),
        "sure_teacher_where_wrong": lambda: response.sure_teacher_where_wrong(
            -numbers, verdict, mask, sharpness=1.0
        ),
    }


NAMES = sorted(response.__all__)


def test_every_weight_of_the_module_is_among_them() -> None:
    assert set(weights(MASK.double(), VERDICT, GROUP, MASK)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_at_closed_tokens_changes_nothing_and_the_weight_is_zero_there(
    name: str,
) -> None:
    generator = torch.Generator().manual_seed(6)
    numbers = -3 * torch.rand(7, 2, generator=generator, dtype=F64)
    found = weights(numbers, VERDICT, GROUP, MASK)[name]()
    assert found.isfinite().all()
    assert (found[~MASK] == 0).all()
    assert (found > 0).any()
    for noise in (NAN, NONE, -1e9):
        other = torch.where(MASK, numbers, noise)
        assert torch.equal(weights(other, VERDICT, GROUP, MASK)[name](), found)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_tokens_or_without_verdicts_makes_no_nan(name: str) -> None:
    numbers = torch.full((7, 2), -1.0, dtype=F64)
    nothing = weights(numbers, VERDICT, GROUP, torch.zeros_like(MASK))[name]()
    assert (nothing == 0).all()
    unjudged = weights(numbers, torch.full_like(VERDICT, NAN), GROUP, MASK)[name]()
    assert unjudged.isfinite().all()
    assert (unjudged == 0).all() == (name not in ("pivotal", "likely_for_teacher"))


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("likely_for_teacher", {"drop_share": 0.0}, "drop_share .* between 0 and 1, got 0.0"),
        ("likely_for_teacher", {"drop_share": 1.0}, "drop_share .* between 0 and 1, got 1.0"),
        ("share_of_correct", {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ("share_of_wrong", {"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ("sure_teacher_where_wrong", {"sharpness": 0.0}, "sharpness must be positive, got 0.0"),
        ("difficulty", {"pass_power": -0.5, "fail_power": 1.0}, "pass_power .* >= 0, got -0.5"),
        ("difficulty", {"pass_power": 1.0, "fail_power": NAN}, "fail_power .* >= 0, got nan"),
        ("pivotal", {**PIVOTAL, "ratio_cap": 0.8}, "ratio_cap > at_least.* got 0.8, 0.8"),
        ("pivotal", {**PIVOTAL, "temperature": 0.0}, "temperature > 0.* got 2.5, 0.8, 0.0"),
        ("pivotal", {**PIVOTAL, "weight_cap": 0.9}, "weight_cap >= 1, got .* 0.9"),
    ],
)
def test_impossible_knobs_are_refused_by_name(
    name: str, knobs: dict[str, float], message: str
) -> None:
    one, mask = rows((-1.0,)), torch.ones(1, 1, dtype=torch.bool)
    verdict, group = tensor(0.0), torch.tensor([0])
    arguments: dict[str, tuple[Tensor, ...]] = {
        "likely_for_teacher": (one, mask),
        "sure_teacher_where_wrong": (one, verdict, mask),
        "difficulty": (verdict, group, mask),
        "pivotal": (one, one, mask),
    }
    with pytest.raises(ValueError, match=message):
        getattr(response, name)(*arguments.get(name, (one, verdict, group, mask)), **knobs)

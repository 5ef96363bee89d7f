from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError, DataError, OpdError, TeacherError, TrainingError, nearest
from opd.formula import credit, divergence
from opd.schedule import Linear
from opd.types import (
    Bound,
    SamplerSettings,
    Stat,
    StateSource,
    TeacherScores,
    TeacherView,
    add_stats,
    pack_rows,
    unpack_rows,
)

JSD = divergence.generalized_jsd


def test_averages_of_parts_combine_exactly() -> None:
    whole = add_stats([{"a": Stat(1, 2), "b": Stat(5, 1)}, {"a": Stat(3, 2)}])
    assert whole == {"a": Stat(4, 4), "b": Stat(5, 1)}
    assert whole["a"].mean == 1.0
    assert math.isnan(Stat(0, 0).mean)


def test_a_partial_and_its_bound_are_equal_however_they_were_made() -> None:
    one = Bound.of(partial(credit.discounted, gamma=0.5, meaning="task"))
    nested = Bound.of(partial(partial(credit.discounted, gamma=0.1), meaning="task", gamma=0.5))
    later = Bound.of(credit.discounted).with_knobs(meaning="task", gamma=0.5)
    assert one == nested == later
    assert len({one, nested, later}) == 1
    assert Bound.of(one) is one
    assert one != one.with_knobs(gamma=0.6)
    assert one != Bound.of(credit.return_to_go)
    assert one.short_name == "discounted"
    assert one.name == "opd.formula.credit.discounted"


def test_a_bound_calls_its_function_with_its_knobs() -> None:
    log_probs = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    bound = Bound.of(partial(JSD, teacher_weight=0.3))
    assert torch.equal(bound(*log_probs), JSD(*log_probs, teacher_weight=0.3))


def test_a_bound_survives_pickling_and_copying() -> None:
    bound = Bound.of(partial(JSD, teacher_weight=Linear(0.1, 0.9, 5)))
    for twin in (pickle.loads(pickle.dumps(bound)), copy.deepcopy(bound)):
        assert twin == bound
        assert twin.function is bound.function


def test_a_bound_refuses_positional_knobs_and_things_that_are_no_functions() -> None:
    with pytest.raises(ValueError, match="knobs are keyword-only, got positional"):
        Bound.of(partial(JSD, torch.zeros(1, 1)))
    with pytest.raises(TypeError, match="a function or a partial of one"):
        Bound.of("reverse_kl")  # type: ignore[arg-type]


def test_list_knobs_become_tuples_so_that_a_bound_can_be_hashed() -> None:
    assert hash(Bound.of(partial(JSD, teacher_weight=[1, 2]))) == hash(
        Bound.of(partial(JSD, teacher_weight=(1, 2)))
    )


@pytest.mark.parametrize("shares", [(0.5, 0.4, 0.0), (1.5, -0.5, 0.0)])
def test_shares_of_the_state_source_are_a_distribution(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be >= 0 and sum to 1"):
        StateSource(*shares)


def test_a_view_has_a_known_source() -> None:
    with pytest.raises(ValueError, match="must be 'teacher' or 'initial_student', got 'nobody'"):
        TeacherView("reference", "nobody")


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"samples_per_prompt": 0},
        {"student_top_k": -1},
    ],
)
def test_sampler_settings_outside_their_range_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.{next(iter(bad))} must be"):
        SamplerSettings(**bad)  # type: ignore[arg-type]


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_packing_and_unpacking_are_inverse(seed: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 4, generator=draw) < share
    for tail in ((), (5,)):
        values = torch.randn(3, 4, *tail, generator=draw)
        packed = pack_rows(values, mask)
        assert packed.shape == (int(mask.sum()), *tail)
        whole = unpack_rows(packed, mask)
        assert torch.equal(pack_rows(whole, mask), packed)
        assert (whole[~mask] == 0).all()
    order = pack_rows(torch.arange(12).reshape(3, 4), mask)
    assert torch.equal(order, order.sort().values)  # row-major


def test_rows_of_scores_stay_together() -> None:
    scores = TeacherScores(
        sampled_logp=torch.arange(3.0), top_ids=torch.arange(6).reshape(3, 2), entropy=None
    )
    some = scores.rows(torch.tensor([2, 0]))
    assert some.sampled_logp is not None
    assert some.top_ids is not None
    assert some.sampled_logp.tolist() == [2.0, 0.0]
    assert some.top_ids.tolist() == [[4, 5], [0, 1]]
    assert some.entropy is None


def test_errors_of_a_user_are_one_family_and_built_in_types() -> None:
    for error, builtin in (
        (ConfigError, ValueError),
        (DataError, ValueError),
        (TeacherError, RuntimeError),
        (TrainingError, RuntimeError),
    ):
        assert issubclass(error, OpdError)
        assert issubclass(error, builtin)


def test_the_nearest_name_or_all_of_them() -> None:
    assert nearest("gama", ["gamma", "meaning"]) == "Did you mean 'gamma'?"
    assert nearest("x", ["gamma", "meaning"]) == "Valid: gamma, meaning."
    assert nearest("x", []) == "Nothing is valid here."

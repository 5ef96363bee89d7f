from __future__ import annotations

import copy
import math
import pickle
import re
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError, DataError, OpdError, TeacherError, TrainingError, nearest
from opd.formula import credit, divergence
from opd.schedule import Cosine, Linear, Switch
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
    with_parts,
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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"student": 0.5, "replay": 0.25}, "sum to 1, got student=0.5"),
        ({"student": math.nan}, "states.student must be a number, got nan"),
        ({"mixture": 1.5}, r"mixture must be a number in \[0, 1\], got 1.5"),
        ({"mixture": Linear(0.5, 2, 3)}, r"mixture must be a number in \[0, 1\]"),
        ({"rewrite": -0.1}, r"rewrite must be a number in \[0, 1\]"),
        ({"interleave": True}, "interleave must be a whole number >= 0, got True"),
        ({"horizon": -1}, "horizon must be a whole number >= 0"),
        ({"horizon": Linear(0, 5, 3)}, "must stay >= 1 over its schedule"),
        ({"replay_steps": 0}, "replay_steps must be a whole number >= 1"),
        ({"replay_steps": 4}, "does nothing without states.replay"),
        ({"mixture": 0.5, "interleave": 4}, "mixture and states.interleave are two rules"),
        ({"mixture": Linear(0.5, 0, 3), "interleave": 4}, "are two rules for the same token"),
        ({"student": 0.0, "data": 1.0, "rewrite": 0.5}, "rewrite is about text the student writes"),
        ({"student": 0.0, "teacher": 1.0, "mixture": 0.5}, "mixture is about text the student"),
        ({"student": 0.0, "data": 0.5, "replay": 0.5}, "replay is about text the student writes"),
        ({"horizon": 4, "teacher_prefix": 4}, "teacher_prefix reaches 4, which leaves the student"),
        (
            {"horizon": Linear(3, 9, 2), "teacher_prefix": Linear(5, 0, 2)},
            "reaches 5, which leaves",
        ),
    ],
)
def test_states_that_make_no_sense_are_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StateSource(**fields)


def test_scheduled_states_settle_to_the_values_of_the_step() -> None:
    """Of 4 to 9 over 5 steps, step 2 is 6; of 3 to 0 over 4, 1.5 rounds to 2, half to even."""
    source = StateSource(
        horizon=Linear(4, 9, 5), teacher_prefix=Linear(3, 0, 4), mixture=Linear(1.0, 0.0, 4)
    )
    settled, _ = source.at(2, {}, {})
    assert settled == StateSource(horizon=6, teacher_prefix=2, mixture=0.5)
    assert isinstance(settled.horizon, int)
    assert StateSource(rewrite=0.5).at(7, {}, {}) == (StateSource(rewrite=0.5), {})


@pytest.mark.parametrize(
    ("fields", "helped"),
    [
        ({}, ()),
        ({"horizon": 5, "student": 0.5, "replay": 0.5}, ()),
        ({"mixture": Linear(0.5, 0, 3)}, ("mixture",)),
        ({"teacher_prefix": 2, "rewrite": 0.1}, ("teacher_prefix", "rewrite")),
        ({"interleave": 3}, ("interleave",)),
    ],
)
def test_states_know_where_the_teacher_helps(
    fields: dict[str, Any], helped: tuple[str, ...]
) -> None:
    assert StateSource(**fields).helped == helped
    assert StateSource(**fields).teacher_writes == bool(helped)
    assert StateSource(0.5, 0.0, 0.5).teacher_writes


def test_a_view_has_a_known_source() -> None:
    with pytest.raises(ValueError, match=r"'initial_student', .*, got 'nobody'"):
        TeacherView("reference", "nobody")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"name": ""}, "cannot be called ''"),
        ({"name": "student"}, "cannot be called 'student'"),
        ({"source": "ema_student"}, "needs one, such as 0.999"),
        ({"source": "student", "decay": 0.9}, "decay belongs to source = 'ema_student'"),
        ({"source": "ema_student", "decay": 1.0}, "must lie in"),
        ({"source": "ema_student", "decay": -0.5}, "must lie in"),
        ({"source": "combination"}, "needs at least one"),
        ({"parts": (("reference", 1.0),)}, "parts belong to source = 'combination'"),
        ({"source": "combination", "parts": (("a", math.inf),)}, "weight of 'a' must be a finite"),
        ({"source": "combination", "parts": (("a", True),)}, "weight of 'a' must be a finite"),
        ({"source": "combination", "parts": (("a", 1), ("a", 2))}, "'a' stands there twice"),
        ({"source": "combination", "parts": (("a", 0.0), ("b", 0))}, "every part has weight 0"),
        ({"source": "combination", "parts": (("a", 1),), "context": "x"}, "reads nothing itself"),
        ({"context": "x", "context_role": "tool"}, "must be one of 'user', 'system', got 'tool'"),
        ({"context_role": "system"}, "context_role says how a context is read, and there is none"),
        ({"chat_template_kwargs": (("a", 1),)}, "chat_template_kwargs says how a context is read"),
    ],
)
def test_a_view_says_what_is_wrong_with_it(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        TeacherView(**bad)


def test_parts_come_before_what_is_combined_from_them() -> None:
    inner = TeacherView("teacher.a", "combination", parts=(("teacher", 2), ("student", 1)))
    outer = TeacherView("teacher.z", "combination", parts=(("teacher.a", 1), ("reference", -1)))
    reference = TeacherView("reference", "initial_student")
    views = (outer, reference, inner, TeacherView(), TeacherView("teacher.unread"))
    names = [view.name for view in with_parts({"teacher.z"}, views)]
    assert sorted(names) == ["reference", "teacher", "teacher.a", "teacher.z"]
    assert names.index("teacher") < names.index("teacher.a") < names.index("teacher.z")
    assert names.index("reference") < names.index("teacher.z")


def test_the_order_in_which_parts_are_written_is_no_difference() -> None:
    one, other = (
        TeacherView("teacher", "combination", parts=parts)
        for parts in ((("a", 1.0), ("b", 2.0)), (("b", 2.0), ("a", 1.0)))
    )
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    ("views", "words"),
    [
        ((("teacher", (("teacher", 1),)),), "combined from itself: teacher -> teacher"),
        (
            (("teacher", (("b", 1),)), ("b", (("c", 1),)), ("c", (("b", 1),))),
            "combined from itself: b -> c -> b",
        ),
        ((("teacher", (("b", 1),)),), "'teacher' combines the view 'b', which the method does not"),
        ((("teacher", (("student", 1),)),) * 2, "two views are called 'teacher'"),
    ],
)
def test_views_that_cannot_be_combined_are_refused(views: Any, words: str) -> None:
    made = [TeacherView(name, "combination", parts=parts) for name, parts in views]
    with pytest.raises(ValueError, match=re.escape(words)):
        with_parts({"teacher"}, made)


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


def test_only_a_combination_can_be_left_without_its_normaliser() -> None:
    with pytest.raises(ValueError, match="normalised = false belongs to source = 'combination'"):
        TeacherView("teacher.x", normalised=False)
    made = TeacherView("teacher.x", "combination", parts=(("teacher", 1.0),), normalised=False)
    with pytest.raises(ValueError, match=r"combines 'teacher.x', which is not normalised"):
        with_parts(
            ["teacher.y"],
            [
                TeacherView(),
                made,
                TeacherView("teacher.y", "combination", parts=(("teacher.x", 1.0),)),
            ],
        )


# --------------------------------------------------------------------------------------------
# Arithmetic mixtures


def mixture(**parts: Any) -> TeacherView:
    return TeacherView("teacher.m", "combination", parts=tuple(parts.items()), mix="arithmetic")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"a": 0.5, "b": 0.6}, r"sum to 1, and these sum to 1\.1: .*take mix = 'log_linear'"),
        ({"a": 1.5, "b": -0.5}, "has weights >= 0, and that of 'b' is -0.5"),
        ({"a": Linear(0.0, 1.0, 4), "b": 0.5}, r"sum to 0\.5 at step 1"),
        ({"a": Linear(0.5, 1.0, 4), "b": 0.5}, r"sum to 1\.125 at step 2"),
        ({"a": Cosine(0.0, 1.0, 9), "b": Linear(1.0, 0.0, 9)}, r"sum to .* at step 2"),
        (
            {"a": Linear(-0.1, 1.0, 4), "b": Linear(1.1, 0.0, 4)},
            "has weights >= 0, and that of 'a'",
        ),
        ({"a": Switch(0.5, 0.9, "x", above=1.0), "b": 0.4}, r"sum to 0\.9 at step 1"),
    ],
)
def test_the_weights_of_a_mixture_are_shares_wherever_that_is_known(
    parts: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        mixture(**parts)


def test_scheduled_shares_that_add_up_are_kept_and_settled() -> None:
    view = mixture(a=Linear(0.0, 1.0, 10), b=Linear(1.0, 0.0, 10))
    for step, share in ((0, 0.0), (3, 0.3), (50, 1.0)):
        settled, _ = view.at(step, {}, {})
        assert dict(settled.parts) == {"a": pytest.approx(share), "b": pytest.approx(1 - share)}
        assert settled.mix == "arithmetic"
    assert mixture(a=1 / 3, b=2 / 3).parts == (("a", 1 / 3), ("b", 2 / 3))


def test_what_a_switch_makes_of_the_shares_is_known_when_it_is_thrown() -> None:
    view = mixture(a=Switch(0.5, 0.9, "x", above=1.0), b=0.5)
    assert dict(view.at(0, {}, {})[0].parts) == {"a": 0.5, "b": 0.5}
    with pytest.raises(ConfigError, match=r"step 4: view 'teacher.m': .* sum to 1\.4"):
        view.at(3, {"x": Stat(2.0, 1.0)}, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mix": "geometric"}, "mix must be one of 'log_linear', 'arithmetic', got 'geometric'"),
        ({"mix": "arithmetic", "normalised": False}, "belongs to a normalised combination"),
        ({"mix": "arithmetic", "source": "teacher", "parts": ()}, "a normalised combination"),
    ],
)
def test_a_mix_belongs_to_a_normalised_combination(change: dict[str, Any], words: str) -> None:
    fields: dict[str, Any] = {"source": "combination", "parts": (("a", 0.5), ("b", 0.5))}
    with pytest.raises(ValueError, match=words):
        TeacherView("teacher.m", **{**fields, **change})

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd import methods
from opd.errors import ConfigError
from opd.formula import credit, divergence, reward, routing, support, surrogate, weight
from opd.objective import Dense, Method, Objective, Routed, Sampled
from opd.schedule import Cosine, Linear
from opd.spec import (
    method_from_tree,
    objective_to_tree,
    states_to_tree,
    user_files,
    views_to_tree,
)
from opd.training.config import from_tree, to_toml
from opd.types import Bound, StateSource, TeacherView
from opd.user_code import find_function

REFERENCE = TeacherView("reference", "initial_student")


def through_toml(method: Method) -> Method:
    """Method to tree, to the text of a run file, and back."""
    states = states_to_tree(method.states)
    described = {
        "name": "custom",
        "objective": objective_to_tree(method.objective),
        "views": views_to_tree(method),
    }
    config = from_tree(
        {
            "student": {"model": "none"},
            "data": {"prompts": "none"},
            "method": {**described, "states": states},
        }
    )
    table = tomllib.loads(to_toml(config))["method"]
    return method_from_tree(
        table["name"],
        objective=table["objective"],
        states=table.get("states"),
        views=table["views"],
    )


def assert_survives(method: Method) -> None:
    again = through_toml(method)
    assert again == method
    assert hash(again) == hash(method)
    assert again.composition_hash == method.composition_hash
    assert again.objective.needs == method.objective.needs


@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_survives_the_run_file(name: str) -> None:
    method = getattr(methods, name)()
    assert_survives(method)
    assert method_from_tree(name) == method


ELABORATE = Method(
    Objective(
        Dense(
            support=partial(support.student_top_k, k=Linear(8, 64, 10)),
            tail="bucket",
            divergence=partial(divergence.generalized_jsd, teacher_weight=0.3),
            weights=(weight.skip_special, weight.skip_special),
            name="match",
        ),
        Sampled(
            reward=reward.teacher_log_ratio,
            baseline=credit.expected_reward,
            credit=partial(
                credit.discounted, gamma=Cosine(0.0, 0.95, 7), meaning="teacher_reliability"
            ),
            surrogate=partial(surrogate.clipped, low=0.2, high=0.28),
            coef=Linear(0.0, 0.1, steps=100),
            rows="student",
            reduction="sequence_sum",
        ),
        Dense(divergence=divergence.reverse_kl, against="reference", coef=0.01),
        temperature=0.8,
    ),
    StateSource(
        student=0.25,
        data=0.25,
        teacher=0.25,
        replay=0.25,
        replay_steps=3,
        horizon=Linear(8, 64, 10),
        teacher_prefix=Linear(4, 0, 5),
        mixture=Cosine(0.3, 0.0, 7),
        rewrite=0.5,
    ),
    (REFERENCE, TeacherView()),
)


def test_an_elaborate_composition_survives_the_run_file() -> None:
    assert_survives(ELABORATE)


numbers = st.one_of(st.floats(-2, 2), st.integers(-2, 2))
common = {
    "weights": st.sampled_from([(), (weight.skip_special,), (weight.skip_special,) * 2]),
    "coef": st.one_of(numbers, st.tuples(numbers, numbers, st.integers(1, 9))),
    "rows": st.sampled_from(["student", "data", "teacher", "all"]),
    "reduction": st.sampled_from(["token_mean", "sequence_mean", "sequence_sum"]),
    "against": st.sampled_from(["teacher", "reference", "teacher.big"]),
}
dense = st.fixed_dictionaries(
    {
        "divergence": st.one_of(
            st.sampled_from([divergence.forward_kl, divergence.reverse_kl]),
            st.floats(0.01, 0.99).map(
                lambda w: partial(divergence.generalized_jsd, teacher_weight=w)
            ),
        ),
        "k": st.integers(0, 9),
        "tail": st.sampled_from(["bucket", "renormalise"]),
        **common,
    }
)
sampled = st.fixed_dictionaries(
    {
        "reward": st.sampled_from([reward.one, reward.teacher_log_ratio]),
        "credit": st.one_of(
            st.sampled_from([credit.immediate, credit.return_to_go]),
            st.floats(0, 1).map(lambda g: partial(credit.discounted, gamma=g, meaning="task")),
        ),
        "baseline": st.sampled_from([None, credit.expected_reward]),
        **common,
    }
)


def term_of(name: str, choices: dict[str, Any]) -> Dense | Sampled:
    choices = {**choices, "name": name}
    if isinstance(choices["coef"], tuple):
        choices["coef"] = Linear(*choices["coef"])
    if "reward" in choices:
        return Sampled(**choices)
    k, tail = choices.pop("k"), choices.pop("tail")
    where = {"support": partial(support.teacher_top_k, k=k), "tail": tail} if k else {}
    return Dense(**choices, **where)


@settings(max_examples=40)
@given(choices=st.lists(st.one_of(dense, sampled), min_size=1, max_size=3))
def test_any_composition_survives_the_run_file(choices: list[dict[str, Any]]) -> None:
    objective = Objective(*(term_of(f"t{place}", each) for place, each in enumerate(choices)))
    views = tuple(
        REFERENCE if view == "reference" else TeacherView(view)
        for view in sorted(objective.views())
    )
    assert_survives(Method(objective, views=views))


VIEWS = (
    TeacherView("teacher", "ema_student", context='{prompt} "hint": {{{answer}}}\n', decay=0.99),
    TeacherView("teacher.big"),
    REFERENCE,
    TeacherView("teacher.self", "student", context="hint"),
    TeacherView(
        "teacher.mix",
        "combination",
        parts=(("teacher.big", 1.5), ("reference", -0.5), ("student", Linear(0.8, 0.0, 9))),
    ),
    TeacherView(
        "teacher.mean",
        "combination",
        parts=(("teacher.big", Linear(0.2, 0.7, 9)), ("teacher", Linear(0.8, 0.3, 9))),
        mix="arithmetic",
    ),
)


def test_views_survive_the_run_file() -> None:
    against = {"a": "teacher", "b": "teacher.mix", "c": "teacher.self"}
    terms = [
        Dense(divergence=divergence.reverse_kl, against=view, name=name)
        for name, view in against.items()
    ]
    assert_survives(Method(Objective(*terms), views=VIEWS))
    assert_survives(Method(Objective(*terms), views=VIEWS[::-1]))


def test_how_a_context_is_read_survives_the_run_file() -> None:
    objective = Objective(Dense(divergence=divergence.reverse_kl))
    plain = TeacherView(source="student", context="{answer}")
    system = replace(plain, context_role="system")
    silent = replace(plain, chat_template_kwargs=(("thinking", False), ("a", "b")))
    made = [Method(objective, views=(view,)) for view in (plain, system, silent)]
    for method in made:
        assert_survives(method)
    assert len({method.composition_hash for method in made}) == 3
    (table,) = views_to_tree(made[2])
    assert table["chat_template_kwargs"] == {"a": "b", "thinking": False}


def test_a_view_without_a_table_is_the_teacher_or_the_student_at_step_0() -> None:
    mix = {"name": "teacher.mix", "source": "combination"}
    parts = {"teacher": 2, "reference": -1, "student": 0.5}
    term = {"kind": "dense", "divergence": "reverse_kl", "against": "teacher.mix"}
    made = method_from_tree("custom", objective={"terms": [term]}, views=[{**mix, "parts": parts}])
    assert {view.name: view.source for view in made.views} == {
        "teacher.mix": "combination",
        "teacher": "teacher",
        "reference": "initial_student",
    }


@pytest.mark.parametrize(
    ("against", "parts"),
    [("teacher.mxi", {"teacher": 1}), ("teacher.mix", {"teacher": 1.25, "refrence": -0.25})],
)
def test_a_view_that_nobody_declared_is_refused(against: str, parts: dict[str, float]) -> None:
    mix = {"name": "teacher.mix", "source": "combination", "parts": parts}
    term = {"kind": "dense", "divergence": "reverse_kl", "against": against}
    with pytest.raises(ConfigError, match=r"'(teacher\.mxi|refrence)', which .* not declare"):
        method_from_tree("custom", objective={"terms": [term]}, views=[mix])


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"nam": "teacher"}, "method.views[0]: unknown key 'nam'. Did you mean 'name'?"),
        ({"source": "ema"}, "source must be one of 'teacher'"),
        ({"context": "x", "chat_template_kwargs": ["a"]}, "[0].chat_template_kwargs = ['a']"),
        ({"source": "combination", "parts": [["a", 1]]}, "method.views[0].parts = [['a', 1]]"),
        (
            {"source": "combination", "parts": {"a": 0.5, "b": 0.6}, "mix": "arithmetic"},
            "the weights of an arithmetic mixture sum to 1, and these sum to 1.1",
        ),
        (
            {"source": "combination", "parts": {"reference": {"schedule": "linea"}}},
            "method.views[0].parts.reference: a table here is a schedule. Did you mean 'linear'?",
        ),
        (
            {"source": "combination", "parts": {"teacher": 1}},
            "method.views: the view 'teacher' is combined from itself",
        ),
    ],
)
def test_a_table_of_a_view_that_cannot_be_used_is_named(view: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method_from_tree(
            "custom",
            objective={"terms": [{"kind": "dense", "divergence": "reverse_kl"}]},
            views=[view],
        )
    assert words in str(caught.value)


def test_what_a_view_adds_changes_the_composition_and_what_it_leaves_out_does_not() -> None:
    objective = Objective(Dense(divergence=divergence.reverse_kl))
    plain = Method(objective)
    spelled = Method(objective, views=(TeacherView("teacher", "teacher", "", (), 0.0),))
    assert spelled.composition_hash == plain.composition_hash
    others = [
        Method(objective, views=(view,))
        for view in (
            TeacherView(context="{prompt}"),
            TeacherView(source="student", context="{prompt}"),
            TeacherView(source="ema_student", decay=0.9),
            TeacherView(source="ema_student", decay=0.99),
            TeacherView(source="combination", parts=(("student", 1),)),
            TeacherView(source="combination", parts=(("student", 2),)),
        )
    ]
    hashes = {method.composition_hash for method in (plain, *others)}
    assert len(hashes) == 1 + len(others)


# --------------------------------------------------------------------------------------------
# Options


def test_options_may_be_schedules() -> None:
    table = {"teacher_weight": {"schedule": "linear", "start": 0.1, "end": 0.9, "steps": 4}}
    method = method_from_tree("gkd", options=table)
    assert method == methods.gkd(teacher_weight=Linear(0.1, 0.9, 4))
    settled, _ = method.at(2, {}, None)
    assert settled == methods.gkd(teacher_weight=0.5)


def test_a_single_weight_needs_no_list() -> None:
    term = {"kind": "dense", "divergence": "reverse_kl", "weights": "skip_special"}
    (built,) = method_from_tree("custom", objective={"terms": [term]}).objective.terms
    assert built == Dense(divergence=divergence.reverse_kl, weights=(weight.skip_special,))


# --------------------------------------------------------------------------------------------
# Errors


def custom(**term: Any) -> Callable[[], Method]:
    return lambda: method_from_tree("custom", objective={"terms": [term]})


KL: dict[str, Any] = {"kind": "dense", "divergence": "reverse_kl"}
TERM = r"method\.objective\.terms\[0\]"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: method_from_tree("vodp"), "no method 'vodp'. Did you mean 'vopd'?"),
        (lambda: method_from_tree("gkd", options={"beta": 1}), "method gkd: .*beta"),
        (lambda: method_from_tree("gkd", options={"student_share": 2.0}), "shares must be >= 0"),
        (lambda: method_from_tree("custom"), r"method\.objective: .*at least one term"),
        (
            lambda: method_from_tree("custom", objective={"terms": [KL], "temprature": 1}),
            "unknown key 'temprature'. Did you mean 'temperature'?",
        ),
        (
            lambda: method_from_tree("custom", objective={"terms": [KL]}, states={"students": 1}),
            r"method\.states: .*students",
        ),
        (
            lambda: method_from_tree("custom", objective={"terms": ["reverse_kl"]}),
            f"{TERM}: a term is a table",
        ),
        (custom(kind="dens"), rf"{TERM}\.kind = 'dens' .* Did you mean 'dense'"),
        (custom(divergence="reverse_kl"), rf"{TERM}\.kind = None is no kind of term"),
        (custom(kind="dense"), f"{TERM}: .*divergence"),
        (custom(**KL, weigths=[]), f"{TERM}: unknown key 'weigths'. Did you mean 'weights'?"),
        (custom(**KL, coef="much"), f"(?s){TERM}: .*coef"),
        (custom(**KL, rows="everyone"), f"{TERM}: rows must be one of"),
        (custom(**KL, against="refrence"), f"{TERM}: against must be"),
        (
            custom(kind="dense", divergence="revers_kl"),
            rf"{TERM}\.divergence = 'revers_kl' is no divergence. Did you mean 'reverse_kl'?",
        ),
        (
            custom(**KL, support={"use": "teacher_top_k", "kk": 3}, tail="bucket"),
            rf"{TERM}\.support: teacher_top_k has no option 'kk'. .*k",
        ),
        (
            custom(**KL, support="teacher_top_k", tail="bucket"),
            rf"{TERM}\.support: teacher_top_k needs 'k'",
        ),
        (custom(**KL, support={"k": 3}), rf"{TERM}\.support: name a function with `use`"),
        (custom(**KL, support=3), rf"{TERM}\.support: name a function with `use`, got 3"),
        (custom(**KL, support={"use": "teacher_top_k", "k": 3}), f"{TERM}: .*must say what"),
        (
            custom(**KL, coef={"schedule": "liner"}),
            rf"{TERM}\.coef: a table here is a schedule. Did you mean 'linear'?",
        ),
        (
            custom(**KL, coef={"schedule": "linear", "start": 0, "end": 1, "steps": 0}),
            rf"{TERM}\.coef: a schedule needs steps >= 1",
        ),
        (
            custom(**KL, coef={"schedule": "linear", "begin": 0}),
            rf"{TERM}\.coef: linear has no option 'begin'",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# --------------------------------------------------------------------------------------------
# Functions of the user's own


USER_CODE = """
def own_divergence(student_log_probs, teacher_log_probs, *, power: float = 2.0):
    return (student_log_probs - teacher_log_probs).abs().pow(power).mean(-1)

def asks_too_much(student_logits):
    return student_logits
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_formulas_for_this_test.py").write_text(USER_CODE, encoding="utf-8")
    return tmp_path


def own(function: str, **knobs: Any) -> dict[str, Any]:
    use = f"my_formulas_for_this_test:{function}"
    return {"terms": [{"kind": "dense", "divergence": {"use": use, **knobs}}]}


def test_a_users_own_formula_fills_a_slot_and_its_source_is_known(folder: Path) -> None:
    tree = own("own_divergence", power=1.5)
    method = method_from_tree("custom", objective=tree, base=folder)
    again = method_from_tree("custom", objective=objective_to_tree(method.objective), base=folder)
    assert again == method
    assert again.composition_hash == method.composition_hash
    assert user_files(method) == {folder / "my_formulas_for_this_test.py"}
    assert user_files(methods.gkd()) == set()


def test_a_users_formula_is_the_same_wherever_its_folder_lies(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "my_formulas_for_this_test.py").write_text(USER_CODE, encoding="utf-8")
    here, there = (
        method_from_tree("custom", objective=own("own_divergence"), base=base)
        for base in (folder, other)
    )
    assert here == there
    assert here.composition_hash == there.composition_hash


def test_a_users_file_does_not_take_the_place_of_an_installed_module(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(USER_CODE, encoding="utf-8")
    tree = {"terms": [{"kind": "dense", "divergence": "json:own_divergence"}]}
    method = method_from_tree("custom", objective=tree, base=tmp_path)
    assert user_files(method) == {tmp_path / "json.py"}
    assert sys.modules["json"] is json


def test_a_users_mistakes_are_named(folder: Path) -> None:
    for objective, message in (
        (own("own_divergense"), "has no function 'own_divergense'. Did you mean 'own_divergence'"),
        (own("own_divergence", pwoer=1), "has no option 'pwoer'"),
        (own("asks_too_much"), "asks for 'student_logits', which is no field"),
    ):
        with pytest.raises(ConfigError, match=message):
            method_from_tree("custom", objective=objective, base=folder)
    with pytest.raises(ConfigError, match="write 'module:function'"):
        find_function("own_divergence", folder)
    with pytest.raises(ConfigError, match=r"no module 'no_such_module' in .* or on Python's path"):
        find_function("no_such_module:f", folder)
    for mistake in ("def f(:\n", "f = undefined\n"):
        (folder / "broken_for_this_test.py").write_text(mistake, encoding="utf-8")
        with pytest.raises(
            ConfigError, match=r"'broken_for_this_test' cannot be imported: .*Error"
        ):
            find_function("broken_for_this_test:f", folder)
    (folder / "constant_for_this_test.py").write_text("USER = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'USER' of .* is no function"):
        find_function("constant_for_this_test:USER", folder)


# --------------------------------------------------------------------------------------------
# Which function goes where


def test_every_formula_of_credit_and_routing_has_one_place() -> None:
    for module, without in ((credit, set()), (routing, {"leak"})):
        placed = [name for names in module.PLACES.values() for name in names]
        assert sorted(placed) == sorted(set(module.__all__) - without)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"kind": "sampled", "reward": "teacher_log_ratio", "credit": "expected_reward"},
            "credit = 'expected_reward' is no credit",
        ),
        (
            {"kind": "sampled", "reward": "teacher_log_ratio", "baseline": "return_to_go"},
            "baseline = 'return_to_go' is no baseline",
        ),
        (
            {
                "kind": "routed",
                "source": {"reward": "teacher_log_ratio"},
                "candidates": "by_score",
            },
            "candidates = 'by_score' is no candidates",
        ),
    ],
)
def test_a_formula_in_the_wrong_slot_is_refused(term: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_from_tree("custom", objective={"terms": [term]})


ROUTED: dict[str, Any] = {
    "kind": "routed",
    "support": {"use": "routing_support", "teacher_k": 4, "student_k": 4},
    "tail": "renormalise",
    "candidates": {"use": "endorsed_and_reachable", "teacher_k": 4, "student_k": 4},
    "gates": ["negative_advantage", "overrated", {"use": "teacher_entropy_below", "nats": 2.0}],
    "weights": [{"use": "evidence", "full_at": 0.1}],
    "mode": "interpolate",
    "interpolation": {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 5},
    "source": {"reward": "teacher_log_ratio", "credit": {"use": "gae", "gae_lambda": 0.9}},
}


def test_a_route_survives_the_run_file_with_the_term_inside_it() -> None:
    penalty = {"kind": "regulariser", "penalty": {"use": "entropy_floor", "nats": 0.2}}
    method = method_from_tree("custom", objective={"terms": [ROUTED, penalty]})
    route, floor = method.objective.terms
    assert isinstance(route, Routed)
    assert Bound.of(route.source.credit).short_name == "gae"
    assert floor.kind == "regulariser"
    assert_survives(method)


def test_the_source_of_a_route_is_a_table() -> None:
    with pytest.raises(ConfigError, match=r"terms\[0\]\.source: write the sampled term as a table"):
        method_from_tree("custom", objective={"terms": [{**ROUTED, "source": "teacher_log_ratio"}]})

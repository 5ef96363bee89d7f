"""`opd explain`: variables, formulas, passes, needs and sources of any composition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd import methods
from opd.catalog import formulas
from opd.catalog import methods as catalog_methods
from opd.cli.main import main
from opd.formula import credit, divergence, reward, support, surrogate
from opd.methods.variables import VARIABLES, nine_variables, states_in_words
from opd.objective import Dense, Method, Objective, Sampled
from opd.schedule import Linear
from opd.training.config import load
from opd.training.explain import Explanation, explain
from opd.types import Bound, StateSource, TeacherView


def explained(name: str, *overrides: str) -> Explanation:
    return explain(load(None, ["--method", name, *overrides]))


@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_is_explained_in_full(name: str) -> None:
    found = explained(name)
    method: Method = getattr(methods, name)()
    assert tuple(found.variables) == VARIABLES
    assert all(found.variables.values())
    assert found.composition_hash == method.composition_hash
    assert found.objective
    assert found.evidence in {"E0", "E1", "E2", "E3", "M"}
    assert found.formula_source in {"code", "paper", "note", "inferred"}
    assert found.source
    assert all(formula.equation for formula in found.formulas)
    text = str(found)
    for part in (*VARIABLES, found.source, found.composition_hash, "update", catalog_line(name)):
        assert part in text


def catalog_line(name: str) -> str:
    return catalog_methods()[name].equation.splitlines()[0]


def test_the_equations_are_those_of_the_docstrings() -> None:
    by_place = {formula.place: formula for formula in explained("vopd").formulas}
    assert by_place["reward"].equation == formulas()["reward.teacher_log_ratio"].equation
    assert "KL(student || teacher)" in by_place["baseline"].equation


def test_the_passes_follow_the_plan() -> None:
    def names(found: Explanation) -> list[tuple[str, str]]:
        return [(part.name, part.model) for part in found.passes]

    assert names(explained("reverse_kl_opd")) == [
        ("sample", "student"),
        ("score", "teacher"),
        ("update", "student"),
    ]
    assert names(explained("sft")) == [("update", "student")]
    assert names(explained("offpolicy_kd"))[0] == ("sample", "teacher")


def test_a_mismatch_between_sampler_and_objective_is_said() -> None:
    assert explained("reverse_kl_opd").mismatch == ()
    found = explained("reverse_kl_opd", "--sampler.temperature", "0.5")
    assert "0.5" in found.mismatch[0]
    assert found.mismatch[0] in str(found)


def test_the_nine_variables_of_a_composition_of_several_terms() -> None:
    method = Method(
        Objective(
            Dense(
                divergence=divergence.forward_kl,
                support=Bound.of(support.student_top_k).with_knobs(k=8),
                tail="bucket",
                rows="student",
            ),
            Sampled(
                reward=reward.teacher_log_ratio,
                credit=Bound.of(credit.discounted).with_knobs(gamma=0.5, meaning="task"),
                surrogate=Bound.of(surrogate.clipped).with_knobs(low=0.2, high=0.3),
                coef=Linear(0.0, 0.1, 10),
            ),
            Dense(divergence=divergence.reverse_kl, against="reference", coef=0.01),
        ),
        StateSource(student=0.5, data=0.5),
        (TeacherView(), TeacherView("reference", "initial_student")),
    )
    found = nine_variables(method)
    assert found["state source"] == "50% the student itself, 50% the data set"
    assert found["feedback source"] == "the teacher model + the student at step 0 (as 'reference')"
    assert found["support"] == "student_top_k(k=8), tail: bucket + the sampled token"
    assert found["update route"] == (
        "dense: differentiate forward_kl + linear(start=0, end=0.1, steps=10) x sampled: "
        "clipped(high=0.3, low=0.2) of the token times its advantage, from teacher_log_ratio"
    )
    assert "discounted(gamma=0.5, meaning=task)" in found["temporal credit"]
    assert "on text by the student" in found["gate / weight"]
    assert found["regulariser"] == "0.01 x reverse_kl against the student at step 0"


def test_the_state_source_says_who_writes_what() -> None:
    source = StateSource(
        student=0.5,
        replay=0.5,
        replay_steps=4,
        horizon=Linear(4, 24, 10),
        teacher_prefix=2,
        mixture=0.25,
        rewrite=0.5,
    )
    assert states_in_words(source).split("; ") == [
        "50% the student itself, 50% the student up to 4 steps ago",
        "at most linear(start=4, end=24, steps=10) tokens",
        "the teacher writes up to token 2",
        "drawn from a mixture with 0.25 of the teacher",
        "the teacher rewrites wrong responses, the last 0.5 of their tokens",
    ]
    assert "outside the teacher's 5 likeliest" in states_in_words(StateSource(interleave=5))


def test_a_custom_objective_with_a_function_of_the_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def squared(student_log_probs, teacher_log_probs):\n"
        '    """Squared distance.\n\n        D = sum of squares\n\n    Never negative.\n    """\n'
        "    return (student_log_probs - teacher_log_probs).pow(2).sum(-1)\n"
    )
    (tmp_path / "run.toml").write_text(
        '[student]\nmodel = "builtin:sort-student"\n[data]\nprompts = "task:sort"\n'
        '[method]\nname = "custom"\n'
        '[[method.objective.terms]]\nkind = "dense"\ndivergence = "mine:squared"\n'
    )
    assert main(["explain", str(tmp_path / "run.toml"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["method"] == "custom"
    assert row["formulas"][0] | {"source": ""} == {
        "term": "dense",
        "place": "divergence",
        "name": "squared",
        "equation": "D = sum of squares",
        "source": "",
    }
    assert "squared" in row["variables"]["update route"]


@pytest.mark.parametrize("words", [[], ["vopd"]])
def test_the_command_prints_every_section(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *words]) == 0
    shown = capsys.readouterr().out
    found = explained(words[0] if words else "reverse_kl_opd")
    for title, pairs in found.sections():
        assert (title in shown) == bool(pairs)


def test_json_is_a_list_of_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "vopd", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["vopd"]
    assert rows[0]["needs"]["teacher"]

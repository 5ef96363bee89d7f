"""Runs with several teachers: routes, what they say of each, and how far the teachers disagree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.cli.output import console
from opd.cli.run import print_outcome
from opd.errors import ConfigError, DataError, TeacherError
from opd.formula import divergence
from opd.models import load_model
from opd.objective import Dense, Method, Objective
from opd.rollout.pack import pack_rollout
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.teacher.query import Described, Limits
from opd.teacher.remote import RemoteTeacher
from opd.teacher.routed import RoutedTeacher, Router
from opd.training import step as steps
from opd.training.by_route import accuracy_by_route, compared, fallen_routes, worse_teachers
from opd.training.check import check
from opd.training.config import Run, from_tree
from opd.training.conflict import find_rivals, measure, why_not_measured
from opd.training.explain import explain
from opd.training.loop import summary_of_teachers, train_run
from opd.training.plan import AskedEntries, make_plan
from opd.training.session import build_method, make_phases, open_session
from opd.training.sources import find_sources
from opd.training.teachers import _entries_of_all
from opd.types import (
    Need,
    Prompt,
    Rollout,
    SamplerSettings,
    TeacherRequest,
    TeacherScores,
    TeacherView,
)
from tests.models_zoo import PAD
from tests.teacher.served import serving
from tests.teacher.test_remote import Narrow
from tests.teacher.test_routed import LENGTHS, VOCAB, alone, double, gradients, written
from tests.training.runs import abandon, finish, outcome, tiny_run

TWO: Mapping[str, Any] = {
    "teacher": {"model": "", "route": "task"},
    "teachers": {
        "add": {"model": "builtin:add-teacher"},
        "sort": {"model": "builtin:sort-teacher"},
    },
    "data": {"prompts": "task:add+sort"},
}


def routed_run(output: Path, *changes: Mapping[str, Any]) -> Run:
    return tiny_run(output, TWO, *changes)


# --------------------------------------------------------------------------------------------
# The run file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"teacher": {"model": "builtin:sort-teacher"}},
            "teacher.route = 'task' and teacher.model",
        ),
        ({"teacher": {"url": "http://x:1"}}, "teacher.route = 'task' and teacher.url"),
        ({"teacher": {"keep": "host"}}, "teacher.route = 'task' and teacher.keep"),
        ({"teachers": {"add": {"route": "task"}}}, "teachers.add.route = 'task': route belongs to"),
        ({"teachers": {"add": {"conflict_every": 3}}}, "teachers.add.conflict_every = 3"),
        ({"teachers": {"add": {"model": ""}}}, r"\[teachers.add\] has neither a model nor a url"),
        (
            {"teachers": {"add": {"model": "", "url": "http://x:1", "keep": "disk"}}},
            "teachers.add.keep = 'disk' is about a teacher that is loaded here",
        ),
    ],
)
def test_keys_that_do_not_go_with_a_route_are_refused(
    tmp_path: Path, change: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        routed_run(tmp_path, change)


def test_a_route_to_no_table_is_refused() -> None:
    tree = {"student": {"model": "x"}, "data": {"prompts": "y"}, "teacher": {"route": "task"}}
    with pytest.raises(ConfigError, match=r"there are no \[teachers.NAME\] to go to"):
        from_tree(tree)


def test_a_route_that_no_view_takes_is_refused(tmp_path: Path) -> None:
    run = routed_run(tmp_path, {"method": {"name": "sft"}})
    with pytest.raises(ConfigError, match="the view 'teacher', which 'sft' does not ask"):
        open_session(run)
    assert any("teacher.route" in str(finding) for finding in check(run))


def test_a_record_that_is_routed_to_nobody_is_found_before_the_run(tmp_path: Path) -> None:
    records = [{"prompt": "S21:", "answer": "12", "task": "sort"} for _ in range(6)]
    for wrong, words in (
        ({"task": "chain"}, r"prompts\.jsonl:7: teacher.route = 'task' says 'chain'"),
        ({}, r"prompts\.jsonl:7: teacher.route = 'task' reads that column"),
    ):
        odd = {"prompt": "C1+1:", "answer": "2", **wrong}
        lines = [json.dumps(record) + "\n" for record in [*records, odd]]
        (tmp_path / "prompts.jsonl").write_text("".join(lines))
        data = {"data": {"prompts": "prompts.jsonl", "held_out": 0, "test": "task:sort"}}
        run = routed_run(tmp_path, data, {"data": {"validation": "task:sort", "verifier": "none"}})
        with pytest.raises(DataError, match=words):
            open_session(run)
        (found,) = (str(finding) for finding in check(run) if finding.level == "error")
        assert "error: teacher.route: " in found


def test_check_notes_a_teacher_to_whom_no_record_goes(tmp_path: Path) -> None:
    found = [str(f) for f in check(routed_run(tmp_path, {"data": {"prompts": "task:sort"}}))]
    assert "note: teacher.route: none of 64 records goes to 'add'" in found
    assert not any(text.startswith("error") for text in found)


def test_a_teacher_in_hand_beside_a_route_is_refused(tmp_path: Path) -> None:
    run = routed_run(tmp_path)
    with pytest.raises(ConfigError, match="a teacher in hand was given beside them"):
        open_session(run, teacher=double("gpt2"))


def test_a_routed_teacher_writes_no_text(tmp_path: Path) -> None:
    warm = {"warmup": {"steps": 1, "source": "teacher", "prompts_per_step": 2}}
    with pytest.raises(TeacherError, match="the teacher only scores"):
        open_session(routed_run(tmp_path, warm))


def test_explain_says_whom_prompts_go_to(tmp_path: Path) -> None:
    said = explain(routed_run(tmp_path)).variables["feedback source"]
    assert said == "the teacher model; 'teacher' is routed by 'task' to one of add, sort"


# --------------------------------------------------------------------------------------------
# Runs


def test_a_routed_run_tells_of_each_teacher(tmp_path: Path) -> None:
    run = routed_run(tmp_path, {"teacher": {"conflict_every": 2}})
    session = open_session(run)
    assert session.router is not None
    assert isinstance(session.teachers["teacher"], RoutedTeacher)
    reports = list(train_run(run, session=session))
    trained = [report for report in reports if report.metrics]
    assert len(trained) == 4
    for report in trained:
        shares = [report.metrics[f"teacher/{name}/share"] for name in ("add", "sort")]
        assert sum(stat.total for stat in shares) == report.tokens
        assert {stat.count for stat in shares} == {report.tokens}
        seconds = {f"teacher/{name}/seconds" for name in ("add", "sort")}
        assert seconds <= set(report.metrics)
        measured = {name for name in report.metrics if "|" in name}
        due = report.step in (1, 3)
        assert len(measured) == (3 if due else 0)
        assert ("conflict" in report.seconds) == due
    summary = reports[-1].summary
    assert summary is not None
    told = summary["teachers"]
    assert set(told["models"]) == {"add", "sort"}
    assert sum(row["share"] for row in told["models"].values()) == pytest.approx(1.0)
    (pair,) = told["conflict"]
    assert (pair["first"], pair["second"]) == ("add", "sort")
    measured = [r.metrics["teacher/add|sort/cosine"].mean for r in trained[::2]]
    assert pair["cosine"] == pytest.approx(sum(measured) / 2)
    assert pair["last_cosine"] == pytest.approx(measured[-1])
    assert pair["kl_back"] > 0
    assert [(row["task"], row["teacher"]) for row in told["routes"]] == [
        ("add", "add"),
        ("sort", "sort"),
    ]
    json.dumps(summary)
    screen = console()
    with screen.capture() as caught:
        print_outcome(screen, tmp_path, summary, None)
    assert "cosine of gradients" in caught.get()
    assert "share of tokens" in caught.get()


def test_a_run_with_one_teacher_tells_of_no_others(tmp_path: Path) -> None:
    reports = finish(tiny_run(tmp_path))
    assert reports[-1].summary is not None
    assert reports[-1].summary["teachers"] == {}
    names = {name for report in reports for name in report.metrics}
    assert not any(name.count("/") > 1 for name in names if name.startswith("teacher"))


@pytest.mark.parametrize("updates", [1, 2])
def test_measuring_conflict_changes_no_weight(tmp_path: Path, updates: int) -> None:
    weights = []
    for every in (0, 1):
        run = routed_run(
            tmp_path / str(every),
            {"teacher": {"conflict_every": every}, "train": {"updates_per_rollout": updates}},
        )
        finish(run)
        weights.append(outcome(tmp_path / str(every) / "run")["weights"])
    assert weights[0] == weights[1]


def test_a_routed_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    changes = {"teacher": {"conflict_every": 3}}
    whole, cut = (routed_run(tmp_path / name, changes) for name in ("whole", "cut"))
    finish(whole)
    abandon(cut, 3)
    finish(cut, resume=tmp_path / "cut" / "run")
    found = [outcome(tmp_path / name / "run") for name in ("whole", "cut")]
    for one in found:  # times differ
        for row in one["summary"]["teachers"]["models"].values():
            del row["seconds"]
        for event in one["events"]:
            for name in ("add", "sort"):
                event.get("metrics", {}).pop(f"teacher/{name}/seconds", None)
    assert found[0] == found[1]


def test_the_file_of_a_route_is_kept_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def route(prompt):\n    return prompt.columns['task']\n")
    run = routed_run(tmp_path, {"teacher": {"route": "mine:route"}})
    assert find_sources(open_session(run)) == [(tmp_path / "mine.py").resolve()]


def test_a_term_may_name_a_teacher_of_the_route(tmp_path: Path) -> None:
    terms = [
        {"kind": "dense", "divergence": "reverse_kl"},
        {"kind": "dense", "divergence": "forward_kl", "against": "teacher.add", "coef": 0.1},
    ]
    views = [{"name": "teacher"}, {"name": "teacher.add"}]
    method = {"name": "custom", "objective": {"terms": terms}, "views": views}
    session = open_session(routed_run(tmp_path, {"method": method}))
    teacher = session.teachers["teacher"]
    assert isinstance(teacher, RoutedTeacher)
    assert session.teachers["teacher.add"] is teacher.teachers["add"]


# --------------------------------------------------------------------------------------------
# How each route fares


def test_accuracy_is_told_by_task_and_teacher_and_what_fell_is_named() -> None:
    def prompts(task: str, count: int) -> list[Prompt]:
        return [Prompt(f"{task}{i}", (3,), task, columns={"task": task}) for i in range(count)]

    router = Router("task", ("a", "b"))
    some = [*prompts("a", 100), *prompts("b", 50), Prompt("odd", (3,), "")]
    start = accuracy_by_route(router, some, [1.0] * 40 + [0.0] * 60 + [1.0] * 10 + [0.0] * 41)
    final = accuracy_by_route(router, some, [1.0] * 5 + [0.0] * 95 + [1.0] * 45 + [0.0] * 6)
    assert [(row["task"], row["teacher"], row["value"], row["n"]) for row in start] == [
        ("a", "a", 0.4, 100),
        ("b", "b", 0.2, 50),
    ]
    rows = compared(start, final, [])
    assert [row["change"] for row in rows] == ["fell", "rose"]
    (note,) = fallen_routes(rows)
    assert note.startswith("the task 'a' fell from 0.400 (0.309–0.498) to 0.050 (0.022–0.112)")
    assert "the teacher 'a' scored it" in note
    within = accuracy_by_route(router, some, [1.0] * 35 + [0.0] * 65 + [1.0] * 12 + [0.0] * 39)
    assert [row["change"] for row in compared(start, within)] == ["same", "same"]
    known = accuracy_by_route(router, some[:100], [0.0] * 99 + [1.0])
    (note,) = worse_teachers(start, known)
    assert note.startswith("the teacher 'a' solves 0.010 (0.002–0.054) of the task 'a'")


def test_without_a_task_a_route_is_named_by_its_teacher(tmp_path: Path) -> None:
    some = [Prompt(str(i), (3,), "", columns={"who": "a"}) for i in range(60)]
    router = Router("who", ("a",))
    start = accuracy_by_route(router, some, [1.0] * 60)
    final = accuracy_by_route(router, some, [0.0] * 60)
    (note,) = fallen_routes(compared(start, final))
    assert note.startswith("what goes to 'a' fell from 1.000")


def test_a_teacher_that_knows_less_than_the_student_is_named_before_the_first_step(
    tmp_path: Path,
) -> None:
    """The student is a trained one; its teachers are not."""
    changes = {
        "student": {"model": "builtin:sort-teacher"},
        "teachers": {"sort": {"model": "builtin:sort-teacher-init"}},
        "sampler": {"max_new_tokens": 64},
        "data": {"prompts": "task:sort"},
        "train": {"steps": 1, "save_every": 0},
        "evaluate": {"test_prompts": 20, "every": 0},
    }
    reports = finish(routed_run(tmp_path, changes))
    first = next(report for report in reports if report.step == 0)
    (note,) = first.notes
    assert note.startswith("the teacher 'sort' solves 0.000 (0.000–0.161) of the task 'sort', and")
    assert reports[-1].summary is not None
    assert note in reports[-1].summary["notes"]


# --------------------------------------------------------------------------------------------
# Conflict, held to its definition in float64


def by_hand(
    student: Student, teachers: Mapping[str, Any], rollout: Rollout, weights: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Mean KLs between teachers, and each one's gradient of `sum_k w_k KL(student || teacher)`."""
    kls = {f"{one}|{other}": [] for one in teachers for other in teachers if one != other}
    losses: dict[str, list[Tensor]] = {name: [] for name in teachers}
    for b, prompt in enumerate(rollout.prompts):
        response = rollout.tokens[b, : LENGTHS[b]].tolist()
        rows = rollout.mask[b, : LENGTHS[b]]
        own = alone(student.loaded, prompt.prompt_ids, response)[rows]
        with torch.no_grad():
            said = {n: alone(m, prompt.prompt_ids, response)[rows] for n, m in teachers.items()}
        for pair in kls:
            one, other = (said[name] for name in pair.split("|"))
            kls[pair] += (one.exp() * (one - other)).sum(-1).tolist()
        for name, theirs in said.items():
            losses[name].append((own.exp() * (own - theirs)).sum(-1))
    found = {}
    for name, parts in losses.items():
        student.zero_grad(set_to_none=True)
        loss = sum(weights.values()) * torch.cat(parts).mean()
        loss.backward(retain_graph=True)
        grads = gradients(student)
        found[name] = torch.cat([grads[key].flatten() for key in sorted(grads)])
    student.zero_grad(set_to_none=True)
    return {pair: sum(values) / len(values) for pair, values in kls.items()}, found


def check_conflict(
    teachers: Mapping[str, Any], method: Method, scorers: Mapping[str, Any], coefs: Any
) -> None:
    student, rollout = Student(double("gpt2", seed=7), vocab_size=VOCAB), written(("a", "b") * 3)
    plan = make_plan(method, SamplerSettings(max_new_tokens=8))
    batch = steps.score(
        scorers,
        pack_rollout(rollout, pad_id=PAD),
        method.objective,
        plan,
        prompts=rollout.prompts,
    )
    rivals = find_rivals(method, plan, scorers)
    assert rivals is not None
    assert why_not_measured(rivals) == ""
    found = measure(rivals, student, batch, method.objective, plan, 13)
    kls, grads = by_hand(student, teachers, rollout, coefs)
    assert all(parameter.grad is None for parameter in student.trainable().values())
    for pair, value in kls.items():
        assert found[f"teacher/{pair}/kl"].mean == pytest.approx(value, abs=1e-12)
        assert found[f"teacher/{pair}/kl"].count == int(rollout.mask.sum())
    cosine = grads["a"] @ grads["b"] / (grads["a"].norm() * grads["b"].norm())
    assert found["teacher/a|b/cosine"].mean == pytest.approx(float(cosine), abs=1e-12)
    assert abs(float(cosine)) < 0.999
    assert len(found) == 3


def two_models() -> dict[str, Any]:
    return {"a": double("gpt2", seed=1, hidden=16), "b": double("gpt_neox", seed=2)}


def test_conflict_of_routed_teachers_is_that_of_each_on_every_row() -> None:
    models = two_models()
    scorers = {name: LocalTeacher(model, vocab_size=VOCAB) for name, model in models.items()}
    method = Method(Objective(Dense(divergence=divergence.reverse_kl)), views=(TeacherView(),))
    teacher = RoutedTeacher(scorers, Router("who", ("a", "b")))
    check_conflict(models, method, {"teacher": teacher}, {"all": 1.0})


def test_conflict_of_teachers_with_a_term_each_is_that_of_each_in_both_places() -> None:
    models = two_models()
    terms = (
        Dense(divergence=divergence.reverse_kl, against="teacher.a", coef=0.3, name="a"),
        Dense(divergence=divergence.reverse_kl, against="teacher.b", coef=0.9, name="b"),
    )
    views = (TeacherView("teacher.a"), TeacherView("teacher.b"))
    scorers = {f"teacher.{n}": LocalTeacher(m, vocab_size=VOCAB) for n, m in models.items()}
    check_conflict(models, Method(Objective(*terms), views=views), scorers, {"a": 0.3, "b": 0.9})


def test_teachers_that_no_term_follows_are_no_rivals() -> None:
    plain = {"teacher": NumbersOnly(), "teacher.before": NumbersOnly()}
    before = TeacherView(
        "teacher.gained", "combination", parts=(("teacher", 1.0), ("teacher.before", -1.0))
    )
    views = (TeacherView(), TeacherView("teacher.before"), before)
    term = Dense(divergence=divergence.reverse_kl, against="teacher.gained")
    method = Method(Objective(term), views=views)
    assert find_rivals(method, make_plan(method, SamplerSettings()), plain) is None
    both = TeacherView(
        "teacher.gained", "combination", parts=(("teacher", 1.0), ("teacher.before", 0.5))
    )
    method = Method(Objective(term), views=(*views[:2], both))
    rivals = find_rivals(method, make_plan(method, SamplerSettings()), plain)
    assert rivals is not None
    assert list(rivals.teachers) == ["teacher", "before"]
    assert why_not_measured(rivals).startswith(
        "the conflict of the teachers is not measured: 'teacher' answers for single tokens"
    )


class NumbersOnly:
    """A teacher that knows single tokens."""

    def score(self, request: TeacherRequest) -> TeacherScores:
        raise AssertionError("asked")

    def can(self, need: Need) -> bool:
        return need.field == "logp"


def test_the_summary_puts_both_directions_of_a_pair_in_one_row() -> None:
    totals = {
        "teacher/a/share": [3.0, 6.0],
        "teacher/a|b/kl": [6.0, 2.0],
        "teacher/b|a/kl": [4.0, 2.0],
        "teacher/a|b/cosine": [-1.0, 2.0],
    }
    latest = {**totals, "teacher/a|b/kl": [1.0, 1.0], "teacher/log_ratio": [1.0, 1.0]}
    told = summary_of_teachers(totals, latest)
    assert told["models"] == {"a": {"share": 0.5}}
    assert told["conflict"] == [
        {
            "first": "a",
            "second": "b",
            "kl": 3.0,
            "last_kl": 1.0,
            "kl_back": 2.0,
            "last_kl_back": 2.0,
            "cosine": -0.5,
            "last_cosine": -0.5,
        }
    ]


# --------------------------------------------------------------------------------------------
# Served and local together


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(load_model("builtin:sort-teacher", device="cpu")) as found:
        yield found


TOP_K = {
    "kind": "dense",
    "divergence": "reverse_kl",
    "tail": "bucket",
    "support": {"use": "student_top_k", "k": 4},
}
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "hidden states": {"name": "reverse_kl_opd"},
    "entries": {"name": "custom", "objective": {"terms": [TOP_K]}},
    "the sampled token": {"name": "sampled_token_opd"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_route_to_a_served_and_a_local_teacher_trains_as_one_to_two_local_ones(
    tmp_path: Path, url: str, name: str
) -> None:
    changes = {"method": OBJECTIVES[name], "train": {"steps": 2}, "evaluate": {"every": 0}}
    served = {"teachers": {"sort": {"model": "", "url": url}}}
    losses = []
    for place, more in (("here", {}), ("there", served)):
        run = routed_run(tmp_path / place, changes, more)
        session = open_session(run)
        assert bool(session.entries) == (place == "there" and name != "hidden states")
        losses.append(
            [
                (report.metrics[key].mean, report.metrics["optimizer/grad_norm"].mean)
                for report in train_run(run, session=session)
                if report.step and report.metrics
                for key in report.metrics
                if key.startswith("loss/")
            ]
        )
    assert len(losses[0]) == 2
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


class Everything(Narrow):
    """An endpoint that has everything, hidden states of one byte-saving number among it."""

    limits = Limits(frozenset({"sampled", "top", "ids", "logsumexp", "entropy", "hidden"}))

    def describe(self) -> Described:
        return Described(dtype="bfloat16", extra={"hidden_size": 1})


def asked_of(tmp_path: Path, tables: Mapping[str, Any], endpoints: Mapping[str, Any]) -> Any:
    """What routed teachers are asked of single tokens, where an objective compares four."""
    own = {name: {"model": "", "url": "http://x:1", **table} for name, table in tables.items()}
    run = routed_run(tmp_path, {"method": OBJECTIVES["entries"]}, {"teachers": own})
    phase = make_phases(run.config, build_method(run))[-1]
    teachers = {name: RemoteTeacher(each, vocab_size=53) for name, each in endpoints.items()}
    return _entries_of_all(teachers, "teacher", phase.method, phase.plan, run.config)


def test_where_one_teacher_has_to_answer_by_entries_all_do(tmp_path: Path) -> None:
    few = {"add": Everything(), "sort": Everything()}
    assert asked_of(tmp_path, {"add": {}, "sort": {}}, few) is None
    one = asked_of(tmp_path, {"add": {}, "sort": {"reply": "entries"}}, few)
    assert one == AskedEntries(student_k=4)
    alone = asked_of(tmp_path, {"add": {"reply": "entries"}, "sort": {}}, {"add": Everything()})
    assert alone == AskedEntries(student_k=4)


@pytest.mark.parametrize(
    ("tables", "endpoints", "words"),
    [
        (
            {"add": {"reply": "hidden"}, "sort": {"reply": "entries"}},
            {"add": Everything(), "sort": Everything()},
            r"routed to 'sort', which answers by entries, and to 'add', which cannot: "
            r"teachers.add.reply = 'hidden'",
        ),
        (
            {"add": {}, "sort": {}},
            {"add": Everything(), "sort": Narrow()},
            "the view 'teacher' cannot be scored with entries: .* has no 'ids'",
        ),
    ],
)
def test_teachers_that_cannot_answer_in_one_form_are_refused(
    tmp_path: Path, tables: Mapping[str, Any], endpoints: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        asked_of(tmp_path, tables, endpoints)

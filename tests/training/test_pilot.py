"""A probe's evidence against models read by hand, and planted faults through the whole pipe."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd.diagnose.evidence import Evidence
from opd.diagnose.profiles import profiles
from opd.diagnose.verdicts import (
    ALIGNMENT,
    CRITERIA,
    INFORMATION,
    PRIVILEGE,
    ROUTABILITY,
    STATE,
    Verdict,
    verdicts,
)
from opd.errors import ConfigError, DataError
from opd.formula import divergence, regulariser, reward, support, surrogate, weight
from opd.methods import reverse_kl_opd, sampled_token_opd
from opd.methods.parts import REFERENCE
from opd.methods.variables import nine_variables
from opd.models import LoadedModel, load_model
from opd.objective import Dense, Method, Objective, Regulariser, Sampled
from opd.spec import objective_to_tree
from opd.teacher.local import LocalTeacher
from opd.training import pilot as pilots
from opd.training import pilot_gradients
from opd.training.config import Run, load, to_toml
from opd.training.pilot import (
    DEPTHS,
    Pilot,
    PilotSettings,
    distributions,
    first_step,
    gather,
    look,
    quiet,
    row_numbers,
    scored,
    subject,
    warm_up,
)
from opd.training.pilot_cost import cost_of_plan
from opd.training.pilot_gradients import (
    BY_DATA,
    BY_TEACHER,
    Gradients,
    Neighbour,
    _Judge,
    _tried,
    answers_by,
    cosine,
    frozen_batch,
    measure_gradients,
    neighbours,
)
from opd.training.pilot_interface import (
    FIRST_TOKEN,
    SPECIAL_IDS,
    Audit,
    _engine,
    audits,
    special_excess,
)
from opd.training.pilot_proposal import _better, propose
from opd.training.session import Session, build_method, open_session
from opd.types import (
    Bound,
    Need,
    Provenance,
    Teacher,
    TeacherRequest,
    TeacherScores,
    TeacherView,
)
from tests.teacher.served import serving
from tests.training.faults import SampledOnly, frozen_copy, permuted, shifted
from tests.training.runs import finish, tiny_run

SMALL = PilotSettings(responses=12, samples=2, continued=4)
TEACHER = {"teacher": {"model": "builtin:sort-teacher"}, "evaluate": {"prompts": 6}}


@pytest.fixture(autouse=True)
def _few_answers_are_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot_gradients, "RESPONSES", 16)


@pytest.fixture
def tiny(tmp_path: Path) -> Pilot:
    """Twelve answers of an untrained student, scored by the real teacher."""
    return look(open_session(tiny_run(tmp_path, TEACHER)), SMALL)


def dense(loaded: LoadedModel, seen: Pilot) -> np.ndarray:
    """Log-probabilities of every response row from the model's own forward, one text at a time."""
    rows = []
    for ids, tokens, length in zip(
        seen.rollout.prompt_ids,
        seen.rollout.tokens.tolist(),
        seen.rollout.lengths.tolist(),
        strict=True,
    ):
        text = torch.tensor([[*ids, *tokens[:length]]])
        with torch.no_grad():
            logits = loaded.model(input_ids=text).logits[0, :, : loaded.vocab_size]
        rows.append(logits[len(ids) - 1 : -1].double().log_softmax(-1))
    return torch.cat(rows).numpy()


# --------------------------------------------------------------------------------------------
# Numbers of rows


def test_every_number_of_a_row_is_that_of_the_models_own_logits(
    tiny: Pilot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 7 rows, against numpy on whole distributions."""
    session = tiny.session
    monkeypatch.setattr(pilots, "CHUNK_BYTES", 7 * 4 * session.student.vocab_size)
    rows, absent = row_numbers(tiny)
    assert not absent
    teacher_model = session.opened.own
    assert isinstance(teacher_model, LoadedModel)
    student, teacher = dense(session.student.loaded, tiny), dense(teacher_model, tiny)
    tokens = tiny.rollout.tokens[tiny.rollout.mask].numpy()
    n, k = np.arange(len(tokens)), 6
    pi, q = np.exp(student), np.exp(teacher)
    log_pi, log_q = student[n, tokens], teacher[n, tokens]
    top_pi = np.argsort(-student, kind="stable")[:, :k]
    top_q = np.argsort(-teacher, kind="stable")[:, :k]
    entropy_pi, entropy_q = -(pi * student).sum(1), -(q * teacher).sum(1)
    both = [sorted(set(a) & set(b)) for a, b in zip(top_pi, top_q, strict=True)]
    better = [
        [v for v in {*a, *b} - {y} if teacher[i, v] - student[i, v] > 1e-6]
        for i, (a, b, y) in enumerate(zip(top_pi, top_q, tokens, strict=True))
    ]
    margins = np.sort(np.take_along_axis(teacher, top_pi, 1), 1)
    expected = {
        "student_logp": log_pi,
        "teacher_logp": log_q,
        "log_ratio": log_q - log_pi,
        "reverse_kl": (pi * (student - teacher)).sum(1),
        "forward_kl": (q * (teacher - student)).sum(1),
        "student_entropy": entropy_pi,
        "teacher_entropy": entropy_q,
        "entropy_gap": abs(entropy_q - entropy_pi),
        "teacher_surprise": -log_q,
        "excess_surprise": -log_q - entropy_q,
        "teacher_confidence": q.max(1),
        "top_k_overlap": np.array([len(each) / k for each in both]),
        "student_overlap_mass": np.take_along_axis(pi, top_q, 1).sum(1),
        "teacher_overlap_mass": np.take_along_axis(q, top_pi, 1).sum(1),
        "teacher_top_mass": np.take_along_axis(q, top_q, 1).sum(1),
        "student_gap": 1 - np.take_along_axis(pi, top_q, 1).sum(1),
        "teacher_gap": 1 - np.take_along_axis(q, top_q, 1).sum(1),
        "teacher_margin": margins[:, -1] - margins[:, -2],
        "gradient_proxy": np.sqrt(1 - 2 * pi[n, tokens] + (pi**2).sum(1)),
        "candidate_mass": np.array([q[i, each].sum() for i, each in enumerate(better)]),
        "leak": np.array(
            [
                1 - pi[i, each].sum() / (1 - pi[i, y]) if each else 1.0
                for i, (each, y) in enumerate(zip(better, tokens, strict=True))
            ]
        ),
        "eos_divergence": abs(student[:, 2] - teacher[:, 2]),
        "sampler_logp": log_pi,
    }
    assert session.student.loaded.eos_ids == (2,)
    assert set(rows) == {*expected, "overlap_advantage"}
    for name, value in expected.items():
        torch.testing.assert_close(
            rows[name].double(),
            torch.from_numpy(np.asarray(value)),
            atol=2e-4,
            rtol=2e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_no_chunk_holds_more_than_its_bytes(tiny: Pilot, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = tiny.session.student.vocab_size
    monkeypatch.setattr(pilots, "CHUNK_BYTES", 5 * 4 * vocabulary)
    shapes = [tuple(student.shape) for student, _, _ in distributions(tiny)]
    rows = int(tiny.rollout.mask.sum())
    assert sum(size for size, _ in shapes) == rows
    assert max(size for size, _ in shapes) == 5
    assert {width for _, width in shapes} == {vocabulary}


def test_a_probe_leaves_no_trace_in_the_models(tmp_path: Path) -> None:
    session = open_session(tiny_run(tmp_path, TEACHER))
    teacher = session.opened.own
    assert isinstance(teacher, LoadedModel)
    before = [copy.deepcopy(each.state_dict()) for each in (session.student.model, teacher.model)]
    seen = look(session, SMALL)
    gather(seen)
    measure_gradients(seen)
    for was, model in zip(before, (session.student.model, teacher.model), strict=True):
        now = model.state_dict()
        assert all(torch.equal(value, now[name]) for name, value in was.items())
        assert all(weights.grad is None for weights in model.parameters())


def test_the_same_probe_twice_says_the_same(tmp_path: Path) -> None:
    once, again = (gather(look(open_session(tiny_run(tmp_path, TEACHER)), SMALL)) for _ in range(2))
    assert torch.equal(once.tokens, again.tokens)
    assert all(torch.equal(value, again.rows[name]) for name, value in once.rows.items())
    assert verdicts(once)[0] == verdicts(again)[0]


def test_the_student_of_a_probe_is_the_one_that_distillation_would_begin_with(
    tmp_path: Path,
) -> None:
    warmed = {"warmup": {"steps": 3, "prompts_per_step": 4, "learning_rate": 1e-3}}
    run = tiny_run(tmp_path / "whole", TEACHER, warmed, {"train": {"steps": 1, "learning_rate": 0}})
    finish(run)
    expected = load_model(str(tmp_path / "whole" / "run" / "model"))
    found = warm_up(open_session(quiet(run, str(tmp_path / "quiet"))))
    ours = found.model.state_dict()
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, ours[name]), name
    plain = open_session(tiny_run(tmp_path / "other", TEACHER)).student.model.state_dict()
    assert any(not torch.equal(value, ours[name]) for name, value in plain.items())


# --------------------------------------------------------------------------------------------
# The teacher by itself


def test_the_teacher_continues_what_the_student_began(tmp_path: Path) -> None:
    longer = {"sampler": {"max_new_tokens": 64}}
    seen = look(open_session(tiny_run(tmp_path, TEACHER, longer)), SMALL)
    found = gather(seen)
    assert [each.depth for each in found.recoveries] == list(DEPTHS)
    assert torch.equal(found.recoveries[0].teacher, found.teacher_verdict)
    # from scratch it nearly always solves the task, after half of an untrained student's text never
    assert float(found.teacher_verdict.mean()) >= 0.75
    assert float(found.recoveries[2].teacher.mean()) <= 0.5
    assert bool((found.recoveries[1].student == found.verdict[::2][:4]).all())
    assert float(found.teacher_on_data.mean()) < 0.1


def test_without_a_verifier_or_a_model_that_writes_nothing_is_continued(tmp_path: Path) -> None:
    unjudged = tiny_run(tmp_path, TEACHER, {"data": {"verifier": "none"}})
    found = gather(look(open_session(unjudged), SMALL))
    assert not found.recoveries
    assert "verifier" in found.absent["recoverability"]
    assert verdicts(found)[3].status == "unknown"


def test_a_teacher_of_single_tokens_leaves_the_rest_unknown(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, TEACHER, {"method": {"name": "sampled_token_opd"}})
    inner = open_session(run).teachers["teacher"]
    whole = row_numbers(look(open_session(run), SMALL))[0]
    seen = look(open_session(run, teacher=SampledOnly(inner)), SMALL)
    rows, absent = row_numbers(seen)
    assert not seen.whole
    assert "reverse_kl" in absent
    for name in ("log_ratio", "teacher_surprise", "student_entropy"):
        torch.testing.assert_close(rows[name], whole[name], atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------
# Gradients


def test_the_noise_of_a_credit_is_the_variance_of_single_gradients(tiny: Pilot) -> None:
    """Immediate credit by hand: -A log student(y) of each answer, differentiated alone."""
    frozen = frozen_batch(tiny)
    judge = _Judge(tiny, frozen)
    objective = Objective(Sampled(reward=reward.teacher_log_ratio))
    found = judge.noise("immediate", objective, judge.gradient(tiny.method.objective))
    student = tiny.session.student.loaded
    ratio = row_numbers(tiny)[0]["log_ratio"]
    per_answer = []
    start, answers, total = 0, len(frozen.prompt_ids), int(frozen.mask.sum())
    for row, ids in enumerate(frozen.prompt_ids):
        length = int(frozen.lengths[row])
        tokens = frozen.tokens[row, :length]
        text = torch.tensor([[*ids, *tokens.tolist()]])
        logits = student.model(input_ids=text).logits[0, len(ids) - 1 : -1, : student.vocab_size]
        logp = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        loss = -(ratio[start : start + length] * logp).sum() / total * answers
        weights = list(tiny.session.student.trainable().values())
        gradients = torch.autograd.grad(loss, weights)
        per_answer.append(torch.cat([each.flatten() for each in gradients]).double())
        start += length
    stacked = torch.stack(per_answer)
    variance = float(stacked.var(0, correction=1).sum())
    assert found.variance == pytest.approx(variance, rel=1e-3)
    mean = float(stacked.mean(0).square().sum())
    assert found.signal == pytest.approx(mean - variance / answers, rel=1e-2)


def test_neighbours_differ_in_one_variable_and_the_run_is_its_own_best(tiny: Pilot) -> None:
    objectives = {each.name: each for each in neighbours(tiny)}
    assert {each.variable for each in objectives.values()} == {
        "",
        "support",
        "divergence",
        "update route",
        "gate",
        "regulariser",
        "state source",
    }
    for each in objectives.values():
        changed = changed_variables(tiny, each)
        if each.variable == "state source":
            assert changed == {"state source"}
        if each.variable == "regulariser":
            # the student at step 0 is one more to ask
            assert changed in ({"regulariser"}, {"regulariser", "feedback source"})
        if each.variable == "support":
            assert changed == {"support"}
        if each.variable == "gate":
            # a gate by the outcome brings in the verifier, a source of feedback
            assert changed in ({"gate / weight"}, {"gate / weight", "feedback source"})
        if not each.variable:
            assert not changed
    found = measure_gradients(tiny)
    by_name = {each.name: each for each in found.neighbours}
    assert by_name["this run"].cosine == pytest.approx(1.0, abs=1e-9)
    assert all(not each.why_not and each.seconds > 0 for each in found.neighbours)
    top = by_name["student's top 16, rest in a bucket"].cosine
    assert by_name["student's top 4, rest in a bucket"].cosine < top < 1.0
    ranks = [each.per_second for each in found.neighbours if not math.isnan(each.cosine)]
    assert ranks == sorted(ranks, reverse=True)


class Slow:
    """A teacher that keeps its caller waiting."""

    WAIT_S = 0.8

    def __init__(self, inner: Teacher) -> None:
        self.inner = inner

    def can(self, need: Need) -> bool:
        return self.inner.can(need)

    def score(self, request: TeacherRequest) -> TeacherScores:
        time.sleep(self.WAIT_S)
        return self.inner.score(request)


def test_waiting_for_a_teacher_is_in_the_plan_and_for_a_served_one_in_the_ranking(
    tmp_path: Path,
) -> None:
    local = tiny_run(tmp_path / "local", TEACHER)
    with serving(load_model("builtin:sort-teacher", device="cpu")) as url:
        served = tiny_run(tmp_path / "served", TEACHER, {"teacher": {"model": "", "url": url}})
        found = {}
        for name, run in (("local", local), ("served", served)):
            seen = look(open_session(run), SMALL)
            seen.session.teachers["teacher"] = Slow(seen.session.teachers["teacher"])
            found[name] = measured(seen, "")["this run"]
            gradients = Gradients((found[name],), responses=12)
            plan = cost_of_plan(seen, gradients, run, 0.0)
            # 4 steps of 4 answers, at 0.8 s and more for 12
            assert plan.seconds["scores and updates"] > 16 * Slow.WAIT_S / 12
            seen.session.opened.close()
    for each in found.values():
        assert each.wall_seconds > Slow.WAIT_S
    assert found["local"].seconds < Slow.WAIT_S < found["served"].seconds


def changed_variables(seen: Pilot, neighbour: Neighbour) -> set[str]:
    own, views = nine_variables(seen.method), neighbour.views
    method = Method(
        neighbour.objective, neighbour.states, seen.method.views if views is None else views
    )
    return {name for name, text in nine_variables(method).items() if text != own[name]}


def measured(seen: Pilot, variable: str) -> dict[str, Neighbour]:
    """The neighbours in one variable, tried as a probe tries them, by name."""
    frozen = frozen_batch(seen)
    judge = _Judge(seen, frozen)
    full = judge.gradient(Objective(Dense(divergence=divergence.reverse_kl, against=seen.view)))
    asked = [each for each in neighbours(seen) if each.variable == variable]
    return {each.name: _tried(seen, frozen, each, full, judge.whole()) for each in asked}


def on_one_view(seen: Pilot, view: TeacherView, *terms: Any) -> Pilot:
    """The same answers, to be learnt from by another method."""
    method = Method(
        Objective(*(terms or (Dense(divergence=divergence.reverse_kl),))), views=(view,)
    )
    return replace(seen, method=method, plan=replace(seen.plan, views=method.views))


def test_an_entropy_bonus_adds_its_own_gradient_and_a_pull_adds_none_yet(tiny: Pilot) -> None:
    """The bonus by hand: the mean entropy of every row, from the model's own forward."""
    frozen = frozen_batch(tiny)
    by_name = {each.name: each for each in neighbours(tiny) if each.variable == "regulariser"}
    assert set(by_name) == {
        "with an entropy bonus x 0.01",
        "with a pull to the student at step 0 x 0.01",
    }
    student, own = tiny.session.student.loaded, _Judge(tiny, frozen).gradient(tiny.method.objective)
    entropies = []
    for row, ids in enumerate(frozen.prompt_ids):
        tokens = frozen.tokens[row, : int(frozen.lengths[row])].tolist()
        text = torch.tensor([[*ids, *tokens]])
        logits = student.model(input_ids=text).logits[0, len(ids) - 1 : -1, : student.vocab_size]
        log_probs = logits.log_softmax(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
    weights = tiny.session.student.trainable()
    bonus = torch.autograd.grad(torch.cat(entropies).mean(), list(weights.values()))
    found = _Judge(tiny, frozen).gradient(by_name["with an entropy bonus x 0.01"].objective)
    for (name, value), by_hand in zip(found.items(), bonus, strict=True):
        close = 1e-2 * float(by_hand.abs().max()) + 1e-5
        torch.testing.assert_close((own[name] - value) / 0.01, by_hand, atol=close, rtol=0)
    apart = measured(tiny, "regulariser")
    assert apart["with a pull to the student at step 0 x 0.01"].cosine == pytest.approx(1, abs=1e-6)
    assert 0.99 < apart["with an entropy bonus x 0.01"].cosine < 1 - 1e-7


def test_a_run_with_regularisers_is_tried_without_them(tiny: Pilot) -> None:
    bonus = Regulariser(penalty=regulariser.entropy_bonus, coef=10.0)
    held = Dense(divergence=divergence.reverse_kl, against="reference")
    taught = Dense(divergence=divergence.reverse_kl)
    method = Method(Objective(taught, bonus, held), views=(TeacherView(), REFERENCE))
    seen = replace(tiny, method=method, plan=replace(tiny.plan, views=method.views))
    (without,) = measured(seen, "regulariser").values()
    assert without.name == "no regulariser"
    assert without.objective == Objective(taught)
    assert without.cosine == pytest.approx(1.0, abs=1e-9)
    own = _tried(seen, frozen_batch(seen), next(iter(neighbours(seen))), full_gradient(seen))
    assert own.cosine < 0.9  # what was taken away is seen


def full_gradient(seen: Pilot) -> Any:
    full = Objective(Dense(divergence=divergence.reverse_kl, against=seen.view))
    return _Judge(seen, frozen_batch(seen)).gradient(full)


def test_without_its_context_a_view_is_one_that_never_had_any(tiny: Pilot) -> None:
    told = TeacherView("teacher", "teacher", "{prompt}1")
    seen = on_one_view(tiny, told)
    (without,) = measured(seen, "privilege").values()
    assert without.name == "'teacher' without its context"
    assert without.objective == seen.method.objective
    assert changed_variables(seen, without) == {"teacher privilege"}
    plain = full_gradient(on_one_view(tiny, TeacherView()))
    assert without.cosine == cosine(plain, full_gradient(seen))
    assert without.cosine < 0.999
    # a context that is the prompt as it is tells nothing
    (same,) = measured(on_one_view(tiny, replace(told, context="{prompt}")), "privilege").values()
    assert same.cosine == pytest.approx(1.0, abs=1e-9)
    assert not measured(on_one_view(tiny, TeacherView()), "privilege")


@pytest.mark.parametrize("source", ["student", "initial_student"])
def test_a_self_that_is_told_more_is_probed_and_without_it_is_the_student(
    tmp_path: Path, source: str
) -> None:
    method = {
        "name": "custom",
        "objective": {"terms": [{"kind": "dense", "divergence": "reverse_kl"}]},
        "views": [{"name": "teacher", "source": source, "context": "{prompt}1"}],
    }
    seen = look(open_session(tiny_run(tmp_path, TEACHER, {"method": method})), SMALL)
    assert seen.view == "teacher"
    (without,) = measured(seen, "privilege").values()
    judge = _Judge(seen, frozen_batch(seen), without.views)
    left = judge.gradient(without.objective)
    largest = max(float(value.abs().max()) for value in full_gradient(seen).values())
    assert all(float(value.abs().max()) < 1e-4 * largest for value in left.values())


def test_each_of_several_contexts_is_taken_away_alone(tiny: Pilot) -> None:
    one, other = (TeacherView(name, "teacher", "{prompt}1") for name in ("teacher", "teacher.b"))
    terms = [
        Dense(divergence=divergence.reverse_kl, against=each.name, name=each.name[-1])
        for each in (one, other)
    ]
    method = Method(Objective(*terms), views=(one, other))
    seen = replace(tiny, method=method, plan=replace(tiny.plan, views=method.views))
    found = {each.name: each for each in neighbours(seen) if each.variable == "privilege"}
    assert {name: [view.context for view in each.views or ()] for name, each in found.items()} == {
        "'teacher' without its context": ["", "{prompt}1"],
        "'teacher.b' without its context": ["{prompt}1", ""],
    }


def as_data(seen: Pilot, shift: int = 0) -> Pilot:
    """The first answer of each prompt, `shift` added to its ids, as what the data has for it."""
    rollout = seen.rollout
    responses = {}
    for row in reversed(range(len(rollout.prompts))):
        tokens = rollout.tokens[row, : int(rollout.lengths[row])]
        responses[int(rollout.group[row])] = tuple(((tokens + shift) % 53).tolist())
    prompts = tuple(
        replace(prompt, response_ids=responses[int(group)], response_mask=None)
        for prompt, group in zip(rollout.prompts, rollout.group, strict=True)
    )
    return replace(seen, rollout=replace(rollout, prompts=prompts))


RATIO = Sampled(reward=reward.teacher_log_ratio, surrogate=surrogate.importance)


@pytest.mark.parametrize("term", [Dense(divergence=divergence.reverse_kl), RATIO])
def test_text_of_the_data_that_is_the_students_teaches_the_same(tmp_path: Path, term: Any) -> None:
    """A ratio to the rollout's weights too: 1, whoever wrote the text."""
    seen = look(open_session(tiny_run(tmp_path, TEACHER)), PilotSettings(responses=6, samples=1))
    seen = on_one_view(seen, TeacherView(), term)
    frozen = frozen_batch(seen)
    own = _Judge(seen, frozen).gradient(seen.method.objective)
    for shift in (0, 1):
        planted = as_data(seen, shift)
        text = answers_by(planted, frozen_batch(planted), BY_DATA)
        same = torch.equal(text.tokens, frozen.tokens)
        assert same == (shift == 0)
        found = _Judge(planted, text, None, BY_DATA).gradient(seen.method.objective)
        apart = max(float((found[name] - value).abs().max()) for name, value in own.items())
        size = max(float(value.abs().max()) for value in own.values())
        assert (apart < 1e-5 * size) == same
        near = measured(planted, "state source")["text of the data"].cosine
        full = cosine(own, full_gradient(seen))
        assert (near == pytest.approx(full, abs=1e-5)) == same


def test_text_of_the_data_counts_as_often_as_the_student_answers(tiny: Pilot) -> None:
    frozen = frozen_batch(tiny)
    text = answers_by(tiny, frozen, BY_DATA)
    assert text.group.tolist() == frozen.group.tolist()
    assert text.prompt_ids == frozen.prompt_ids
    for row, prompt in enumerate(frozen.prompts):
        assert tuple(text.tokens[row, : int(text.lengths[row])].tolist()) == prompt.response_ids
    assert set(text.provenance[text.mask].tolist()) == {int(Provenance.DATA)}
    assert text.verdict.tolist() == [1.0] * len(frozen.prompts)  # the data is right


def test_the_teachers_text_is_its_own_and_to_the_same_prompts(tmp_path: Path) -> None:
    longer = {"sampler": {"max_new_tokens": 64, "max_sequences": 4}}
    seen = look(open_session(tiny_run(tmp_path, TEACHER, longer)), SMALL)
    frozen = frozen_batch(seen)
    text = answers_by(seen, frozen, BY_TEACHER)
    assert text.group.tolist() == frozen.group.tolist()
    assert text.prompt_ids == frozen.prompt_ids
    assert set(text.provenance[text.mask].tolist()) == {int(Provenance.TEACHER)}
    assert float(text.verdict.mean()) > 0.7
    assert float(frozen.verdict.mean()) < 0.3
    assert torch.equal(text.tokens, answers_by(seen, frozen, BY_TEACHER).tokens)
    found = measured(seen, "state source")
    assert -1 < found["text by the teacher"].cosine < 0.99
    assert found["text by the teacher"].seconds > 0


def test_who_has_no_text_is_said_to_have_none(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, TEACHER, {"method": {"name": "sampled_token_opd"}})
    inner = open_session(run).teachers["teacher"]
    seen = look(open_session(run, teacher=SampledOnly(inner)), SMALL)
    bare = tuple(replace(prompt, response_ids=None) for prompt in seen.rollout.prompts)
    seen = replace(seen, rollout=replace(seen.rollout, prompts=bare))
    frozen = frozen_batch(seen)
    found = {
        each.name: _tried(seen, frozen, each, {})
        for each in neighbours(seen)
        if each.variable == "state source"
    }
    assert found["text of the data"].why_not == "the data has no responses to these prompts"
    assert found["text by the teacher"].why_not == "the teacher only scores, it does not write"
    assert math.isnan(found["text by the teacher"].cosine)
    assert math.isnan(found["text of the data"].seconds)


def test_terms_that_look_at_the_students_text_learn_nothing_from_the_datas(tiny: Pilot) -> None:
    seen = on_one_view(tiny, TeacherView(), Dense(divergence=divergence.reverse_kl, rows="student"))
    found = measured(seen, "state source")
    assert math.isnan(found["text of the data"].cosine)
    assert not found["text of the data"].why_not


def short_list(seen: Pilot, tail: str) -> Pilot:
    top = partial(support.student_top_k, k=2)
    term = Dense(divergence=divergence.reverse_kl, support=top, tail=tail)
    return replace(seen, method=Method(Objective(term)))


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_what_a_list_sees_of_the_divergence(tiny: Pilot, tail: str) -> None:
    """By hand, from the models' own logits: two entries of the student's, with and without rest."""
    seen = short_list(tiny, tail)
    frozen = frozen_batch(seen)
    some = replace(seen, rollout=frozen)
    teacher_model = seen.session.opened.own
    assert isinstance(teacher_model, LoadedModel)
    student, teacher = (dense(each, some) for each in (seen.session.student.loaded, teacher_model))
    top = np.argsort(-student, kind="stable")[:, :2]
    pi, q = (np.take_along_axis(np.exp(each), top, 1) for each in (student, teacher))
    if tail == "bucket":
        pi, q = (np.concatenate([each, 1 - each.sum(1, keepdims=True)], 1) for each in (pi, q))
    else:
        pi, q = (each / each.sum(1, keepdims=True) for each in (pi, q))
    part = (pi * (np.log(pi) - np.log(q))).sum(1).mean()
    whole = (np.exp(student) * (student - teacher)).sum(1).mean()
    judge = _Judge(seen, frozen)
    assert judge.whole() == pytest.approx(whole, rel=1e-3)
    tried = {
        each.name: _tried(seen, frozen, each, {}, judge.whole())
        for each in neighbours(seen)
        if each.variable in ("", "support", "update route", "divergence")
    }
    assert tried["this run"].seen == pytest.approx(part / whole, rel=1e-3)
    assert tried["this run"].seen < 0.95  # an untrained student's two likeliest are a few percent
    assert tried["full vocabulary"].seen == pytest.approx(1.0, rel=1e-6)
    by_k = [tried[f"student's top {k}, rest in a bucket"].seen for k in (4, 16)]
    assert (part / whole if tail == "bucket" else 0.0) < by_k[0] < by_k[1] < 1.0
    # another divergence or one sampled token is no part of this one
    assert math.isnan(tried["sampled token, immediate credit"].seen)
    assert math.isnan(tried["forward KL"].seen)


def test_a_cosine_by_hand() -> None:
    one = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0])}
    other = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0])}
    assert cosine(one, other) == pytest.approx(0.5)
    assert cosine(one, one) == pytest.approx(1.0)
    assert cosine(one, {name: -value for name, value in one.items()}) == pytest.approx(-1.0)
    assert math.isnan(cosine(one, {}))


def test_a_student_that_teaches_itself_has_nothing_to_learn(
    tiny: Pilot, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure_gradients(tiny)
    assert found.self_loss < 1e-5
    assert found.self_gradient < 1e-5
    true = LocalTeacher.score

    def one_row_late(self: LocalTeacher, request: Any) -> Any:
        reply = true(self, request)
        return reply if reply.hidden is None else replace(reply, hidden=reply.hidden.roll(1, 0))

    monkeypatch.setattr(LocalTeacher, "score", one_row_late)
    planted = measure_gradients(tiny)
    assert planted.self_gradient > 0.05
    rows = row_numbers(tiny)[0]
    evidence = replace(_bare(tiny), rows=rows)
    named = [
        each.name for each in audits(tiny, evidence, profiles(evidence), planted) if each.found
    ]
    assert "student as its own teacher" in named


def _bare(seen: Pilot) -> Evidence:
    rollout = seen.rollout
    return Evidence(
        rollout.tokens,
        rollout.mask,
        rollout.group,
        rollout.verdict.float(),
        rollout.stop_reason,
        {},
        6,
        seen.session.student.vocab_size,
    )


# --------------------------------------------------------------------------------------------
# Audits


def audited(seen: Pilot, evidence: Evidence) -> dict[str, Audit]:
    return {each.name: each for each in audits(seen, evidence, profiles(evidence), Gradients())}


def test_a_sampler_of_another_temperature_is_found_and_mended(tmp_path: Path) -> None:
    cold = {"sampler": {"temperature": 0.7}}
    seen = look(open_session(tiny_run(tmp_path, TEACHER, cold)), SMALL)
    evidence = gather(seen)
    found = audited(seen, evidence)
    assert found["sampler and comparison"].found
    assert found["sampler and learner"].found  # its numbers are of another distribution
    assert found["sampler and learner"].urgent
    proposal = propose(
        seen,
        verdicts(evidence),
        list(found.values()),
        Gradients(),
        tiny_run(tmp_path, TEACHER, cold),
    )
    assert str(proposal.changes[0]).startswith("sampler.temperature = 1.0: ")
    file = tmp_path / "proposal.toml"
    file.write_text(proposal.toml)
    assert load(file).config.sampler.temperature == 1.0


@pytest.mark.parametrize(
    ("dtype", "off", "found", "urgent"),
    [
        ("float32", 0.0, False, False),
        ("float32", 0.005, True, False),
        ("bfloat16", 0.0, False, False),
        ("bfloat16", 0.05, True, False),
        ("bfloat16", 0.2, True, True),
    ],
)
def test_rounding_between_sampler_and_learner_is_that_of_the_students_weights(
    tmp_path: Path, dtype: str, off: float, found: bool, urgent: bool
) -> None:
    run = tiny_run(tmp_path, TEACHER, {"student": {"dtype": dtype}})
    seen = look(open_session(run), SMALL)
    rows = row_numbers(seen)[0]
    rows["sampler_logp"] = rows["sampler_logp"] + off
    audit = _engine(seen, replace(_bare(seen), rows=rows))
    assert audit.numbers["log_mismatch"] == pytest.approx(off, abs=0.01)
    assert (audit.found, audit.urgent) == (found, urgent)


def test_a_sampler_that_is_little_off_hides_no_verdict(tiny: Pilot, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, TEACHER)
    judged = [
        Verdict(name, "unfit", setting="warmup.steps" if name == STATE else "", why=f"bad {name}")
        if name in (STATE, ALIGNMENT)
        else Verdict(name, "fit")
        for name in CRITERIA
    ]
    for urgent, keys in (
        (False, ["warmup.steps", "method.objective", "sampler"]),
        (True, ["sampler", "warmup.steps", "method.objective"]),
    ):
        audit = Audit("sampler and learner", True, "off", "sampler", urgent=urgent)
        proposal = propose(tiny, judged, [audit], Gradients(), run)
        assert [change.key for change in proposal.changes] == keys


def test_an_end_token_that_the_two_disagree_on_is_named(tiny: Pilot) -> None:
    evidence = replace(_bare(tiny), rows=row_numbers(tiny)[0])
    assert not audited(tiny, evidence)["ids that differ most"].found
    tokens = evidence.tokens.clone()
    tokens[:, 0] = 2
    ratio = torch.where(tokens[evidence.mask] == 2, -30.0, evidence.row("log_ratio"))
    planted = replace(evidence, tokens=tokens, rows={**evidence.rows, "log_ratio": ratio})
    found = audited(tiny, planted)["ids that differ most"]
    assert found.found
    assert found.numbers["ids"][0][0] == 2


def with_ratios(seen: Pilot, ratio: Callable[[Tensor, Tensor], Tensor]) -> Evidence:
    """Evidence with so many nats at the tokens of a place, and an end token at every fourth."""
    mask = seen.rollout.mask
    place = torch.arange(mask.shape[1]).expand_as(mask)
    tokens = torch.where(place % 4 == 3, 2, seen.rollout.tokens.clamp(min=3))
    known = {"log_ratio": ratio(place, tokens)[mask].float()}
    rows = {**row_numbers(seen)[0], **known}
    return replace(_bare(seen), tokens=tokens, rows=rows)


def test_where_the_two_say_the_same_no_id_is_named(tiny: Pilot) -> None:
    """Of equal ids the lowest comes first, and the lowest ids are the special ones."""
    alike = with_ratios(tiny, lambda place, _: torch.zeros_like(place))
    found = audited(tiny, alike)["ids that differ most"]
    assert found.numbers["ids"][0][::2] == [2, 0.0]
    assert not found.found


@pytest.mark.parametrize(("above", "named"), [(5.5, False), (6.5, True)])
def test_an_end_token_has_to_differ_by_more_than_others_do(
    tiny: Pilot, above: float, named: bool
) -> None:
    assert 5.5 < SPECIAL_IDS < 6.5
    evidence = with_ratios(tiny, lambda _, tokens: torch.where(tokens == 2, -1.0 - above, 1.0))
    found = audited(tiny, evidence)["ids that differ most"]
    assert found.numbers["ids"][0][0] == 2
    assert found.numbers["excess"] == pytest.approx(above, abs=1e-5)
    assert found.found == named


def test_a_special_id_of_few_rows_says_nothing(tiny: Pilot) -> None:
    evidence = with_ratios(tiny, lambda place, tokens: torch.where(tokens == 2, -30.0, 1.0))
    few = evidence.tokens.clone()
    ends = torch.where((few == 2) & evidence.mask)
    few[ends[0][4:], ends[1][4:]] = 3
    assert math.isnan(special_excess(replace(evidence, tokens=few), {0, 1, 2}))
    assert not audited(tiny, replace(evidence, tokens=few))["ids that differ most"].found


@pytest.mark.parametrize(
    ("first", "later", "named"), [(3.1, 1.0, False), (0.9, 0.1, False), (9, 2, True)]
)
def test_a_first_token_stands_out_by_nats_and_not_by_a_ratio(
    tiny: Pilot, first: float, later: float, named: bool
) -> None:
    """A task whose answers begin with what is still to be learnt has a ratio of 3 and more."""
    evidence = with_ratios(tiny, lambda place, _: torch.where(place == 0, -first, later))
    found = audited(tiny, evidence)["first token"]
    assert found.numbers["first"] == pytest.approx(first, rel=1e-6)
    assert found.numbers["later"] == pytest.approx(later, rel=1e-6)
    assert found.found == named
    assert (found.setting == "teacher.model") == named  # plain text: nothing is rendered


LONGER = {
    "name": "custom",
    "objective": {"terms": [{"kind": "dense", "divergence": "reverse_kl"}]},
    "views": [{"name": "teacher", "source": "teacher", "context": "{prompt}1"}],
}


def test_a_prompt_of_the_views_own_is_what_to_change_and_how(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, TEACHER, {"method": LONGER})
    seen = look(open_session(run), SMALL)
    evidence = with_ratios(seen, lambda place, _: torch.where(place == 0, -9.0, 1.0))
    found = audited(seen, evidence)["first token"]
    assert (found.found, found.setting) == (True, "method.views")

    def proposed(status: str) -> Any:
        judged = [
            replace(each, status=status) if each.criterion == PRIVILEGE else each
            for each in verdicts(evidence)
        ]
        return propose(seen, judged, [found], Gradients(), run)

    assert proposed("fit").changes[0].value is None  # the context helps who reads it
    proposal = proposed("unfit")
    assert (proposal.changes[0].key, proposal.changes[0].value) == ("method.views", [])
    file = tmp_path / "proposal.toml"
    file.write_text(proposal.toml)
    method = build_method(load(file))
    assert [view.context for view in method.views] == [""]
    assert method.objective == seen.method.objective


def test_a_self_that_is_told_more_has_no_other_prompt_to_read(tmp_path: Path) -> None:
    """Without what it is told it would be the student."""
    told = {"name": "teacher", "source": "initial_student", "context": "{prompt}1"}
    run = tiny_run(tmp_path, TEACHER, {"method": {**LONGER, "views": [told]}})
    seen = look(open_session(run), SMALL)
    evidence = with_ratios(seen, lambda place, _: torch.where(place == 0, -9.0, 1.0))
    found = audited(seen, evidence)["first token"]
    proposal = propose(seen, verdicts(evidence), [found], Gradients(), run)
    assert (proposal.changes[0].key, proposal.changes[0].value) == ("method.views", None)


def test_a_row_on_which_one_of_the_two_cannot_end_is_counted(tiny: Pilot) -> None:
    evidence = replace(_bare(tiny), rows=row_numbers(tiny)[0])
    assert not audited(tiny, evidence)["end of answers"].found
    values = evidence.row("eos_divergence").clone()
    values[:3] = math.inf
    planted = replace(evidence, rows={**evidence.rows, "eos_divergence": values})
    found = audited(tiny, planted)["end of answers"]
    assert (found.found, found.numbers["infinite"]) == (True, 3)


def test_a_prompt_that_a_teacher_would_write_otherwise_is_shown_at_its_first_token(
    tiny: Pilot,
) -> None:
    """A tokenizer that puts no beginning-of-text token in front; a session would refuse it."""
    teacher = tiny.session.opened.own
    assert isinstance(teacher, LoadedModel)
    bare = copy.deepcopy(teacher.tokenizer)
    bare.bos_token = None
    evidence = replace(_bare(tiny), rows=row_numbers(tiny)[0])
    assert not audited(tiny, evidence)["prompts as teacher renders them"].found
    tiny.session.opened.own = replace(teacher, tokenizer=bare)
    found = audited(tiny, evidence)["prompts as teacher renders them"]
    assert found.found
    assert "at token 0: '<bos>' and 'S'" in found.message
    assert found.setting == "data.chat_template_kwargs"


# --------------------------------------------------------------------------------------------
# What cannot be probed


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 responses, got 4; raise --responses"):
        PilotSettings(responses=4)


def test_a_method_without_a_teacher_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, TEACHER, {"method": {"name": "sft"}})
    session = open_session(run)
    with pytest.raises(ConfigError, match="compares the student with no teacher"):
        subject(*first_step(session))


def test_a_single_held_out_prompt_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, TEACHER, {"evaluate": {"prompts": 1}})
    with pytest.raises(DataError, match="two held-out prompts"):
        look(open_session(run), SMALL)


# --------------------------------------------------------------------------------------------
# Planted faults on the embedded default


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The embedded default's student after its warm-up: the healthy one."""
    torch.set_num_threads(1)
    folder = str(tmp_path_factory.mktemp("warmup"))
    return warm_up(open_session(quiet(load(), folder)))


def judged(
    student: LoadedModel | None,
    teacher: LoadedModel | Teacher | None = None,
    *overrides: str,
) -> tuple[Pilot, Evidence, dict[str, Verdict]]:
    run = load(None, ["--evaluate.test_prompts", "1", *overrides])
    seen = look(open_session(run, student=student, teacher=teacher), PilotSettings())
    evidence = gather(seen)
    return seen, evidence, {each.criterion: each for each in verdicts(evidence)}


@pytest.mark.slow
def test_the_healthy_default_is_fit(warmed: LoadedModel) -> None:
    seen, evidence, found = judged(warmed)
    assert {each.status for each in found.values()} == {"fit", "not applicable"}
    gradients = measure_gradients(seen)
    assert 0 < gradients.verifier_cosine.value < gradients.verifier_cosine.high < 1
    interface = audits(seen, evidence, profiles(evidence), gradients)
    assert not [each.name for each in interface if each.found]
    proposal = propose(seen, list(found.values()), interface, gradients, load())
    assert proposal.first == "nothing has to change"


def real_teacher(session: Session) -> LoadedModel:
    assert isinstance(session.opened.own, LoadedModel)
    return session.opened.own


FAULTS: dict[str, tuple[Callable[[LoadedModel], LoadedModel | Teacher | None], list[str]]] = {
    "noise": (lambda _: None, ["--teacher.model", "builtin:sort-teacher-init"]),
    "another task": (lambda _: None, ["--teacher.model", "builtin:add-teacher"]),
    "permuted vocabulary": (permuted, []),
    "shifted positions": (shifted, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_teacher_is_unfit_and_named(warmed: LoadedModel, fault: str) -> None:
    make, overrides = FAULTS[fault]
    teacher = make(load_model("builtin:sort-teacher"))
    _, _, found = judged(warmed, teacher, *overrides)
    state = found[STATE]
    assert (state.status, state.setting) == ("unfit", "teacher.model")
    assert found[INFORMATION].status == "unfit"
    assert found[ALIGNMENT].status in ("unfit", "doubtful")


@pytest.mark.slow
def test_an_unwarmed_student_is_unfit_and_asks_for_a_warm_up() -> None:
    off = ["--warmup.steps", "0"]
    seen, evidence, found = judged(None, None, *off)
    for criterion in (STATE, INFORMATION):
        assert (found[criterion].status, found[criterion].setting) == ("unfit", "warmup.steps")
    gradients = measure_gradients(seen)
    interface = audits(seen, evidence, profiles(evidence), gradients)
    proposal = propose(seen, list(found.values()), interface, gradients, load(None, off))
    assert proposal.first == (
        "warmup.steps = 120: the student's states are outside what the teacher knows"
    )


@pytest.mark.slow
def test_a_teacher_that_is_the_student_has_nothing_to_tell(warmed: LoadedModel) -> None:
    seen, evidence, found = judged(warmed, frozen_copy(warmed))
    information = found[INFORMATION]
    assert (information.status, information.name) == ("unfit", "something_to_learn")
    assert information.number == pytest.approx(0.0, abs=1e-5)
    assert information.setting == "teacher.model"
    assert found[STATE].name != "student_overlap_mass" or found[STATE].status == "fit"
    interface = audits(seen, evidence, profiles(evidence), Gradients())
    assert not [each.name for each in interface if each.found]
    proposal = propose(seen, list(found.values()), interface, Gradients(), load())
    assert proposal.first == "teacher.model: the teacher says what the student says already"


@pytest.mark.slow
def test_a_template_with_one_more_token_shows_at_the_first_token(
    warmed: LoadedModel, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    default = load()
    method = replace(default.config.method, **LONGER)
    file.write_text(to_toml(replace(default.config, method=method)))
    run: Run = load(file)
    seen = look(open_session(run, student=warmed), PilotSettings())
    evidence = gather(seen)
    healthy = audited(*judged(warmed)[:2])["first token"].numbers
    planted = audited(seen, evidence)
    numbers = planted["first token"].numbers
    assert healthy["first"] - healthy["later"] < 0 < FIRST_TOKEN
    assert numbers["first"] - numbers["later"] > 1.4 * FIRST_TOKEN
    found = verdicts(evidence)
    assert (found[2].status, found[2].setting) == ("unfit", "method.views")
    changes = propose(seen, found, list(planted.values()), Gradients(), run).changes
    assert (changes[0].key, changes[0].value) == ("method.views", [])


@pytest.mark.slow
def test_two_likeliest_tokens_without_the_rest_are_not_the_whole(
    warmed: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly the same gradient, and half of the divergence."""
    monkeypatch.setattr(pilot_gradients, "RESPONSES", 64)
    seen = short_list(judged(warmed)[0], "renormalise")
    tried = {**measured(seen, ""), **measured(seen, "support")}
    own = tried["this run"]
    assert own.cosine > 0.93
    assert 0.5 < own.seen < 0.7
    others = [each for name, each in tried.items() if name != "this run"]
    best = _better(Gradients((replace(own, cosine=1.0), *others)))
    assert best is not None
    assert best.seen > 0.95


# --------------------------------------------------------------------------------------------
# The proposal


def test_a_cheaper_or_better_support_is_offered_and_noise_is_not() -> None:
    dense_one, sampled = reverse_kl_opd().objective, sampled_token_opd().objective

    def offered(own: Neighbour, *others: Neighbour) -> str | None:
        best = _better(Gradients((own, *others)))
        return None if best is None else best.name

    own = Neighbour("this run", "", dense_one, 1.0, 0.3)
    assert offered(own, Neighbour("top", "support", dense_one, 0.99, 0.25)) is None
    assert offered(own, Neighbour("top", "support", dense_one, 0.99, 0.1)) == "top"
    assert offered(own, Neighbour("top", "support", dense_one, 0.5, 0.01)) is None
    assert offered(own, Neighbour("jsd", "divergence", dense_one, 0.99, 0.01)) is None
    for variable in ("state source", "privilege", "regulariser", "gate"):
        assert offered(own, Neighbour("other", variable, dense_one, 1.0, 0.01)) is None
    short = replace(own, cosine=0.96, seen=0.6)
    whole = Neighbour("full", "support", dense_one, 1.0, 0.3, seen=1.0)
    assert offered(short, whole) == "full"
    assert offered(replace(short, seen=0.97), whole) is None
    assert offered(replace(short, seen=math.nan), whole) is None
    assert offered(short, replace(whole, seconds=0.6)) is None
    blind = Neighbour("top", "support", dense_one, 0.99, 0.1, seen=0.8)
    assert offered(own, blind) is None
    noisy = Neighbour("this run", "", sampled, 0.7, 0.3)
    assert offered(noisy, Neighbour("dense", "update route", dense_one, 1.0, 0.3)) == "dense"


def test_where_the_teacher_prefers_what_is_wrong_the_outcome_gates_what_is_learnt(
    tiny: Pilot, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, TEACHER)
    judged = [
        Verdict(name, "unfit", why="it prefers what is wrong") if name == ALIGNMENT else each
        for name, each in ((each.criterion, each) for each in verdicts(gather(tiny)))
    ]
    proposal = propose(tiny, judged, [], Gradients(), run)
    assert "method.objective: it prefers what is wrong" in map(str, proposal.changes)
    file = tmp_path / "proposal.toml"
    file.write_text(proposal.toml)
    objective = build_method(load(file)).objective
    assert objective == proposal.objective
    (term,) = objective.terms
    assert term.weights == (Bound.of(weight.correct),)


def test_all_reasons_to_change_the_objective_are_given_with_the_one_that_answers_them(
    tiny: Pilot, tmp_path: Path
) -> None:
    """A cheaper list, a gate by the outcome, and no list where suppression has no direction."""
    judged = [
        Verdict(name, "unfit", why=f"bad {name}")
        if name in (ALIGNMENT, ROUTABILITY)
        else Verdict(name, "fit")
        for name in CRITERIA
    ]
    top = Dense(
        divergence=divergence.reverse_kl, support=partial(support.student_top_k, k=4), tail="bucket"
    )
    own = Neighbour("this run", "", tiny.method.objective, 1.0, 0.3)
    cheap = Neighbour("top 4", "support", Objective(top), 0.99, 0.1)
    run = tiny_run(tmp_path, TEACHER)
    proposal = propose(tiny, judged, [], Gradients((own, cheap)), run)
    (change,) = proposal.changes
    assert change.key == "method.objective"
    for reason in ("top 4: cosine 0.99", f"bad {ALIGNMENT}", f"bad {ROUTABILITY}"):
        assert reason in change.why
    assert change.value == objective_to_tree(proposal.objective)
    (term,) = proposal.objective.terms
    assert isinstance(term, Dense)
    assert (term.tail, term.weights) == ("", (Bound.of(weight.correct),))


def test_scoring_goes_through_the_methods_own_views(tiny: Pilot) -> None:
    """A reference at step 0 is the student: its distance to it is zero, through `scored`."""
    method = Method(
        Objective(Dense(divergence=divergence.reverse_kl, against="reference")),
        views=(TeacherView("reference", "initial_student"),),
    )
    judge = _Judge(replace(tiny, method=method), frozen_batch(tiny))
    gradient: dict[str, Tensor] = dict(judge.gradient(method.objective))
    assert max(float(value.abs().max()) for value in gradient.values()) < 1e-6
    assert scored(tiny.session, method, tiny.rollout).token.views.keys() == {"reference"}

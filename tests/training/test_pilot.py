"""A probe's evidence against models read by hand, and planted faults through the whole pipe."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd.diagnose.evidence import Evidence
from opd.diagnose.profiles import profiles
from opd.diagnose.verdicts import ALIGNMENT, INFORMATION, STATE, Verdict, verdicts
from opd.errors import ConfigError, DataError
from opd.formula import divergence, reward, weight
from opd.methods import reverse_kl_opd, sampled_token_opd
from opd.methods.variables import nine_variables
from opd.models import LoadedModel, load_model
from opd.objective import Dense, Method, Objective, Sampled
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
from opd.training.pilot_gradients import (
    Gradients,
    Neighbour,
    _Judge,
    cosine,
    frozen_batch,
    measure_gradients,
    neighbours,
)
from opd.training.pilot_interface import FIRST_TOKEN, Audit, audits
from opd.training.pilot_proposal import _better, propose
from opd.training.session import Session, build_method, open_session
from opd.types import Bound, Teacher, TeacherView
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
    own = nine_variables(tiny.method)
    objectives = {each.name: each for each in neighbours(tiny)}
    assert {each.variable for each in objectives.values()} == {
        "",
        "support",
        "divergence",
        "update route",
        "gate",
    }
    for each in objectives.values():
        method = Method(each.objective, tiny.method.states, tiny.method.views)
        changed = {name for name, text in nine_variables(method).items() if text != own[name]}
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
    seen, _, found = judged(warmed, frozen_copy(warmed))
    information = found[INFORMATION]
    assert (information.status, information.name) == ("unfit", "something_to_learn")
    assert information.number == pytest.approx(0.0, abs=1e-5)
    assert information.setting == "teacher.model"
    assert found[STATE].name != "student_overlap_mass" or found[STATE].status == "fit"
    proposal = propose(seen, list(found.values()), [], Gradients(), load())
    assert proposal.first == "teacher.model: the teacher says what the student says already"


@pytest.mark.slow
def test_a_template_with_one_more_token_shows_at_the_first_token(
    warmed: LoadedModel, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    default = load()
    method = replace(
        default.config.method,
        name="custom",
        objective={"terms": [{"kind": "dense", "divergence": "reverse_kl"}]},
        views=[{"name": "teacher", "source": "teacher", "context": "{prompt}1"}],
    )
    file.write_text(to_toml(replace(default.config, method=method)))
    run: Run = load(file)
    evidence = gather(look(open_session(run, student=warmed), PilotSettings()))
    spike = profiles(evidence).spike
    healthy = profiles(judged(warmed)[1]).spike
    assert healthy < 1 < FIRST_TOKEN < spike
    privilege = verdicts(evidence)[2]
    assert (privilege.status, privilege.setting) == ("unfit", "method.views")


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

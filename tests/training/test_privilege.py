"""What views with a context read: of a rollout, of held-out prompts, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.cli.output import console
from opd.cli.run import print_outcome
from opd.data.prompts import PromptSettings, load_prompts
from opd.errors import ConfigError
from opd.formula import credit, divergence, reward
from opd.head import log_probs_of
from opd.objective import Dense, Method, Objective, Sampled
from opd.rollout.edit import take
from opd.rollout.local import LocalSampler
from opd.rollout.pack import pack_rollout
from opd.student import Student
from opd.teacher.context import ContextEncoder, siblings
from opd.teacher.local import LocalTeacher
from opd.training import privilege
from opd.training import step as steps
from opd.training.check import check
from opd.training.config import Run
from opd.training.evaluate import evaluate
from opd.training.explain import explain
from opd.training.plan import AskedEntries, make_plan
from opd.training.session import Session, open_session, sampler_settings
from opd.types import (
    Batch,
    Prompt,
    SamplerSettings,
    TeacherRequest,
    TeacherScores,
    TeacherView,
    Verdict,
)
from tests.models_zoo import END_THINK, PAD, THINK, thinking_tokenizer, tiny, tiny_tokenizer
from tests.training.runs import finish, tiny_run

REVERSE_KL = Dense(divergence=divergence.reverse_kl)
RETURNS = Sampled(reward=reward.teacher_log_ratio, credit=credit.return_to_go)
BY_SIBLING = TeacherView(source="student", context="{prompt}#{sibling}|")
RECORDS = [{"prompt": f"S{n}:", "answer": "1"} for n in (3, 21, 312)]
SAMPLES = 3
VERDICTS = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
"""Of three prompts: two right responses, one, and none."""


class Told:
    """A rollout of three samples for each of three prompts, judged as `VERDICTS` says."""

    def __init__(
        self,
        term: Any = REVERSE_KL,
        view: TeacherView = BY_SIBLING,
        verdicts: Sequence[float] = VERDICTS,
    ) -> None:
        self.method = Method(Objective(term), views=(view,))
        self.student = Student(tiny("llama"))
        settings = SamplerSettings(max_new_tokens=6, samples_per_prompt=SAMPLES)
        self.plan = make_plan(self.method, settings)
        prompts = load_prompts(RECORDS, tokenizer=tiny_tokenizer()).prompts
        generator = torch.Generator().manual_seed(2)
        sampler = LocalSampler(self.student.loaded)
        drawn = sampler.sample(prompts, self.plan.sampler, generator=generator)
        self.rollout = replace(drawn, verdict=torch.tensor(verdicts))
        self.batch = pack_rollout(self.rollout, pad_id=PAD)
        encoder = ContextEncoder(tiny_tokenizer(), PromptSettings())
        self.contexts = steps.privileged(self.rollout, self.batch, self.plan, encoder, pad_id=PAD)
        self.teacher = LocalTeacher(self.student.loaded, vocab_size=53, max_tokens=40)

    def score(self, **changes: Any) -> Batch:
        settings: dict[str, Any] = {"contexts": self.contexts, **changes}
        return steps.score(
            {"teacher": self.teacher}, self.batch, self.method.objective, self.plan, **settings
        )

    def answered(self) -> Tensor:
        """Which rows have a sibling that is right, by the definition."""
        has = torch.tensor([other is not None for other in siblings(self.rollout)])
        return has[:, None].expand_as(self.rollout.mask)[self.rollout.mask]

    def by_hand(self) -> Tensor:
        """Log-probabilities of every answered row, one forward per sequence, no packing."""
        tokenizer, rows = tiny_tokenizer(), []
        lengths = self.rollout.lengths.tolist()
        for b, other in enumerate(siblings(self.rollout)):
            if other is None:
                continue
            told = tokenizer.decode(
                self.rollout.tokens[other, : lengths[other]].tolist(), skip_special_tokens=True
            )
            text = f"{self.rollout.prompts[b].text}#{told}|"
            ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
            response = self.rollout.tokens[b, : lengths[b]].tolist()
            model: Any = self.student.model
            logits = model(torch.tensor([ids + response])).logits[0].detach()
            rows += [logits[len(ids) + t - 1].log_softmax(-1) for t in range(len(response))]
        return torch.stack(rows)

    def plain(self) -> Tensor:
        """The student's own log-probabilities of every row."""
        scores = self.teacher.score(TeacherRequest(self.batch))
        return distribution(scores)

    def update(self, batch: Batch) -> tuple[float, float]:
        """Loss and gradient norm."""
        objective = self.method.objective
        batch = steps.signal(self.student, batch, objective, self.plan, 1000, fresh=True)
        self.student.zero_grad(set_to_none=True)
        stats = steps.update(self.student, batch, objective, 40, step=1)
        norms = [p.grad.norm() for p in self.student.trainable().values() if p.grad is not None]
        losses = [stat.total for name, stat in stats.items() if name.startswith("loss/")]
        return sum(losses), float(torch.stack(norms).norm())


def distribution(scores: TeacherScores) -> Tensor:
    assert scores.hidden is not None
    assert scores.unembedding is not None
    return log_probs_of(scores.hidden, scores.unembedding).detach()


# --------------------------------------------------------------------------------------------
# Sequences with and without a context


def test_a_view_answers_for_the_sequences_whose_sibling_is_right() -> None:
    step = Told()
    assert siblings(step.rollout)[6:] == [None, None, None]
    assert siblings(step.rollout)[4] is None  # the only right one of its prompt
    scores = step.score().token.views["teacher"]
    assert scores.row_index is not None
    assert ((scores.row_index >= 0) == step.answered()).all()
    assert scores.row_index[step.answered()].tolist() == list(range(int(step.answered().sum())))
    assert (distribution(scores) - step.by_hand()).abs().max() <= 1e-5


def test_terms_skip_the_rows_without_a_context_and_their_denominator_counts_them() -> None:
    step = Told()
    own, told = step.plain()[step.answered()], step.by_hand()
    expected = float((own.exp() * (own - told)).sum())
    loss, gradient = step.update(step.score())
    assert loss == pytest.approx(expected, rel=1e-4)
    assert gradient > 1e-3


def test_where_no_sequence_has_a_context_nothing_is_learnt() -> None:
    step = Told(verdicts=[0.0] * 9)
    scores = step.score().token.views["teacher"]
    assert scores.row_index is not None
    assert (scores.row_index == -1).all()
    assert step.contexts["teacher"].sequences == (0,)
    loss, gradient = step.update(step.score())
    assert (loss, gradient) == (0.0, 0.0)


def test_where_every_sequence_has_one_the_view_answers_all() -> None:
    step = Told(verdicts=[1.0] * 9)
    scores = step.score().token.views["teacher"]
    assert scores.row_index is None
    assert (distribution(scores) - step.by_hand()).abs().max() <= 1e-5


def test_a_signal_takes_what_was_told_of_some_rows_without_a_visit() -> None:
    step = Told(RETURNS)
    assert not [p for p in step.plan.passes if p.name == "signal"]
    batch, mask = step.score(), step.batch.token.mask

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the student was visited")

    objective, student = step.method.objective, step.student
    student.forward = never  # type: ignore[method-assign]
    settled = steps.signal(student, batch, objective, step.plan, 1000, fresh=True)
    chosen = step.batch.token.tokens[mask]
    ratio = torch.zeros(len(chosen))
    told = step.by_hand().gather(-1, chosen[step.answered()].unsqueeze(-1)).squeeze(-1)
    own = step.rollout.sampler_logp[mask]
    ratio[step.answered()] = told - own[step.answered()]
    lengths = step.rollout.lengths.tolist()
    expected = torch.cat([part.flip(0).cumsum(0).flip(0) for part in torch.split(ratio, lengths)])
    advantage = settled.token.coupled["advantage.sampled"][mask]
    assert (advantage - expected).abs().max() <= 1e-4


def test_ids_and_prompts_are_asked_for_the_same_sequences() -> None:
    """What an answer by entries, and a route, read of a request is of the sequences it holds."""
    step = Told(RETURNS)
    asked: list[TeacherRequest] = []

    class Listening(LocalTeacher):
        def score(self, request: TeacherRequest) -> TeacherScores:
            asked.append(request)
            return super().score(request)

    step.teacher = Listening(step.student.loaded, vocab_size=53)
    scores = step.score(
        entries={"teacher": AskedEntries(own_token=True)}, prompts=step.rollout.prompts
    ).token.views["teacher"]
    (request,) = asked
    has = [b for b, other in enumerate(siblings(step.rollout)) if other is not None]
    assert [p.id for p in request.prompts] == [step.rollout.prompts[b].id for b in has]
    chosen = step.batch.token.tokens[step.batch.token.mask][step.answered()]
    assert request.ids is not None
    assert request.ids.squeeze(-1).tolist() == chosen.tolist()
    told = step.by_hand().gather(-1, chosen.unsqueeze(-1))
    assert scores.ids_logp is not None
    assert (scores.ids_logp - told).abs().max() <= 1e-5


def test_metrics_count_sequences_without_a_context_and_what_is_copied() -> None:
    step = Told()
    metrics = privilege.metrics_of(step.rollout, step.contexts, step.plan.views)
    without = metrics["teacher/teacher/without_context"]
    assert (without.total, without.count) == (4, 9)
    copied = metrics["teacher/teacher/copied"]
    assert copied.count == 5
    assert 0 <= copied.mean <= 1
    same = take(step.rollout, [0, 0, 0])  # each is told what it says itself
    batch = pack_rollout(same, pad_id=PAD)
    encoder = ContextEncoder(tiny_tokenizer(), PromptSettings())
    contexts = steps.privileged(same, batch, step.plan, encoder, pad_id=PAD)
    metrics = privilege.metrics_of(same, contexts, step.plan.views)
    assert metrics["teacher/teacher/copied"].mean == 1.0
    assert metrics["teacher/teacher/mostly_copied"].mean == 1.0


def test_a_context_of_columns_has_no_metric_of_what_is_missing() -> None:
    step = Told(view=replace(BY_SIBLING, context="{prompt}{answer}"))
    metrics = privilege.metrics_of(step.rollout, step.contexts, step.plan.views)
    assert set(metrics) == {"teacher/teacher/copied", "teacher/teacher/mostly_copied"}


# --------------------------------------------------------------------------------------------
# The thinking boundary


@pytest.mark.parametrize(
    ("own", "of_view", "ending"),
    [
        (True, {}, [THINK]),
        (False, {}, [THINK, END_THINK]),
        (False, {"thinking": False}, [THINK, END_THINK]),
        (True, {"thinking": True}, [THINK]),
    ],
)
@pytest.mark.parametrize("role", ["user", "system"])
def test_rows_are_read_after_exactly_the_generation_prompt(
    own: bool, of_view: Mapping[str, Any], ending: list[int], role: str
) -> None:
    """Row n of what the view reads predicts the very token that row n of the batch predicts."""
    tokenizer = thinking_tokenizer()
    student = Student(replace(tiny("llama", vocab_size=55), tokenizer=tokenizer))
    settings = PromptSettings(chat_template_kwargs={"thinking": own})
    records = [
        {"messages": [{"role": "user", "content": text}], "answer": answer}
        for text, answer in (("S312", "123"), ("S21", "12"), ("S9", "9"))
    ]
    prompts = load_prompts(records, tokenizer=tokenizer, settings=settings).prompts
    view = TeacherView(
        source="student",
        context="{prompt}#{answer}",
        context_role=role,
        chat_template_kwargs=tuple(of_view.items()),
    )
    method = Method(Objective(REVERSE_KL), views=(view,))
    plan = make_plan(method, SamplerSettings(max_new_tokens=5, samples_per_prompt=2))
    rollout = LocalSampler(student.loaded).sample(
        prompts, plan.sampler, generator=torch.Generator().manual_seed(0)
    )
    batch = pack_rollout(rollout, pad_id=PAD)
    encoder = ContextEncoder(tokenizer, settings)
    encoder.check_thinking(prompts, view)
    reading = steps.privileged(rollout, batch, plan, encoder, pad_id=PAD)["teacher"]
    for each in (batch, reading.batch):
        following = each.input_ids.flatten()[each.row_index + 1]
        assert following.tolist() == rollout.tokens[rollout.mask].tolist()
    header = [*tokenizer("A:")["input_ids"], *ending]
    for b, ids in enumerate(reading.prompt_ids):
        assert list(ids[-len(header) :]) == header
        assert list(rollout.prompt_ids[b][-len(header) :]) == header
        told = "#" + str(rollout.prompts[b].answer)
        assert told in tokenizer.decode(list(ids))
    teacher = LocalTeacher(student.loaded, vocab_size=55)
    scores = steps.score(
        {"teacher": teacher}, batch, method.objective, plan, contexts={"teacher": reading}
    ).token.views["teacher"]
    model: Any = student.model
    rows = []
    for b, length in enumerate(rollout.lengths.tolist()):
        whole = [*reading.prompt_ids[b], *rollout.tokens[b, :length].tolist()]
        logits = model(torch.tensor([whole])).logits[0].detach().log_softmax(-1)
        rows.append(logits[len(whole) - length - 1 : -1])
    assert (distribution(scores) - torch.cat(rows)).abs().max() <= 1e-5


# --------------------------------------------------------------------------------------------
# Runs


def begins_low(prompt: Prompt, response: str, *, finished: bool) -> Verdict:
    """About half of an untrained student's responses are right, and it says so."""
    low = response[:1] < "M"
    return Verdict(float(low), "" if low else "BEGINS HIGH")


def told_run(output: Path, view: Mapping[str, Any], *changes: Mapping[str, Any]) -> Run:
    """A tiny run without a teacher."""
    table = {"name": "teacher", "source": "student", **view}
    terms = [{"kind": "dense", "divergence": "reverse_kl"}]
    method = {"name": "custom", "objective": {"terms": terms}, "views": [table]}
    sampler = {"sampler": {"samples_per_prompt": 3}}
    return tiny_run(output, {"teacher": {"model": ""}, "method": method}, sampler, *changes)


TWO_STEPS = {"train": {"steps": 2}}


@pytest.mark.parametrize("context", ["{sibling}#{prompt}", "{feedback}{prompt}"])
def test_a_run_whose_rollouts_tell_the_teacher(tmp_path: Path, context: str) -> None:
    run = told_run(tmp_path, {"context": context}, TWO_STEPS)
    session = open_session(run, verifier=begins_low)
    reports = [report for report in finish(run, session=session) if report.metrics]
    for report in reports:
        without = report.metrics["teacher/teacher/without_context"]
        assert without.count == 4 * 3
        assert (without.total > 0) == ("unanswered/teacher" in report.metrics)
    assert any(0 < r.metrics["teacher/teacher/without_context"].mean < 1 for r in reports)
    assert any(r.metrics["loss/dense"].mean > 1e-3 for r in reports)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["privilege"] == {"start": {}, "final": {}}  # known after a rollout alone
    assert summary["teachers"] == {}  # one context is not several teachers


@pytest.mark.parametrize(
    ("context", "changes", "words"),
    [
        (
            "{sibling}#{prompt}",
            {"sampler": {"samples_per_prompt": 1}},
            r"reads {sibling}, a right response .* sampler.samples_per_prompt is 1",
        ),
        ("{sibling}#{prompt}", {"data": {"verifier": "none"}}, "{sibling}.* there is no verifier"),
        (
            "{feedback}#{prompt}",
            {"data": {"verifier": "none"}},
            "reads {feedback}, the verifier's reason .* there is no verifier",
        ),
        (
            "{feedback}#{prompt}",
            {"method": {"states": {"student": 0.0, "data": 1.0}}},
            "{feedback}.*method.states.student is 0",
        ),
    ],
)
def test_what_no_rollout_of_the_run_can_tell_is_refused(
    tmp_path: Path, context: str, changes: Mapping[str, Any], words: str
) -> None:
    run = told_run(tmp_path, {"context": context}, changes)
    with pytest.raises(ConfigError, match=words):
        open_session(run)
    found = [str(finding) for finding in check(run) if finding.level == "error"]
    assert len(found) == 1
    assert "the view 'teacher' reads" in found[0]


def test_a_sibling_counts_as_long_as_a_response_can_be(tmp_path: Path) -> None:
    limit = {"sampler": {"max_new_tokens": 130, "samples_per_prompt": 2}}
    run = told_run(tmp_path, {"context": "{sibling}#{prompt}"}, limit)
    with pytest.raises(ConfigError, match=r"more than the \d+ positions of its model"):
        open_session(run)
    assert not [
        f
        for f in check(told_run(tmp_path, {"context": "{answer}#{prompt}"}, limit))
        if f.level == "error"
    ]


def test_a_system_context_of_plain_prompts_is_refused_by_the_check(tmp_path: Path) -> None:
    run = told_run(tmp_path, {"context": "{answer}", "context_role": "system"})
    found = [str(finding) for finding in check(run) if finding.level == "error"]
    assert len(found) == 1
    assert "data.as_chat = true" in found[0]


def test_explain_says_how_a_context_is_read(tmp_path: Path) -> None:
    view = {"context": "{answer}", "context_role": "system"}
    variables = {"chat_template_kwargs": {"thinking": False}}
    said = explain(told_run(tmp_path, view | variables)).variables["teacher privilege"]
    expected = "reads '{answer}' as its system message, chat template with thinking = False"
    assert said == f"'teacher' {expected}"


# --------------------------------------------------------------------------------------------
# Evaluation


HINTED = {"context": "{response}#{prompt}"}
PRIVILEGED = {"evaluate": {"privileged": True, "prompts": 8, "test_prompts": 8}}


def reading_by_hand(session: Session) -> float:
    """Greedy accuracy of the student on prompts that are rewritten here."""
    prompts = []
    for prompt in session.test.prompts:
        text = f"{prompt.response_text}#{prompt.text}"
        ids = (session.tokenizer.bos_token_id, *session.tokenizer(text)["input_ids"])
        prompts.append(replace(prompt, prompt_ids=ids))
    return evaluate(
        session.student_sampler,
        prompts,
        verifier=begins_low,
        tokenizer=session.tokenizer,
        settings=sampler_settings(session.config),
        seed=0,
    ).accuracy.value


def test_the_student_is_measured_with_and_without_privilege(tmp_path: Path) -> None:
    run = told_run(tmp_path, HINTED, TWO_STEPS, PRIVILEGED)
    session = open_session(run, verifier=begins_low)
    start = reading_by_hand(session)
    finish(run, session=session)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = summary["privilege"]
    for when, accuracy in (("start", start), ("final", reading_by_hand(session))):
        told = found[when]["teacher"]
        assert told["reading"]["value"] == pytest.approx(accuracy)
        assert told["reading"]["n"] == 8
        for share in (told["copied"], told["reading"]["copied"], told["mostly_copied"]):
            assert 0 <= share <= 1
    events = [
        json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    ]
    validated = [e["evaluation"] for e in events if "metrics" in e.get("evaluation", {})]
    assert validated
    assert set(validated[0]["metrics"]) == {
        "teacher/teacher/copied",
        "teacher/teacher/mostly_copied",
    }


def test_the_closing_table_shows_the_reader_beside_the_student(tmp_path: Path) -> None:
    score = {"value": 0.5, "low": 0.2, "high": 0.8, "n": 8}
    summary: dict[str, Any] = {
        **{f"{who}_accuracy": score for who in ("start", "final", "teacher")},
        "gain": 0.0,
        "method": "custom",
        "seconds": 1.0,
        "tokens": 1,
        "peak_mb": 1.0,
        "notes": [],
        "privilege": {
            "start": {"teacher": {"copied": 0.1, "reading": score}},
            "final": {"teacher": {"copied": 0.1, "reading": {**score, "value": 0.75}}},
        },
    }

    def shown() -> str:
        screen = console()
        with screen.capture() as caught:
            print_outcome(screen, tmp_path, summary, None)
        return caught.get()

    lines = [" ".join(line.split()) for line in shown().splitlines()]
    assert any(line.startswith("start, context read 0.500") for line in lines)
    assert any(line.startswith("end, context read 0.750") for line in lines)
    for when in ("start", "final"):
        summary["privilege"][when]["teacher.hint"] = {"copied": 0.0, "reading": score}
    assert "end, context of teacher.hint read" in shown()
    summary["privilege"] = {"start": {"teacher": {"copied": 0.1}}, "final": {}}
    assert "context read" not in shown()


def test_without_asking_the_student_is_not_measured_with_privilege(tmp_path: Path) -> None:
    run = told_run(tmp_path, HINTED, {"train": {"steps": 1}})
    finish(run)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["privilege"]["final"]["teacher"]) == {"copied", "mostly_copied"}


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"context": "{sibling}{prompt}"}, "known only after a rollout, so nothing is measured"),
        ({"source": "ema_student", "decay": 0.9}, "no view has a context, so there is nothing"),
    ],
)
def test_what_cannot_be_measured_with_privilege_is_noted(
    tmp_path: Path, view: Mapping[str, Any], words: str
) -> None:
    run = told_run(tmp_path, view, PRIVILEGED)
    notes = [f.message for f in check(run) if f.where == "evaluate.privileged"]
    assert len(notes) == 1
    assert words in notes[0]
    assert any(words in note for note in open_session(run).notes)


def test_held_out_prompts_without_the_column_are_noted(tmp_path: Path) -> None:
    told = [{"prompt": f"S{n}:", "answer": "1", "hint": "1"} for n in range(20, 30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    bare = [{"prompt": "S21:", "answer": "12"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(each) + "\n" for each in bare))
    data = {"data": {"prompts": "train.jsonl", "test": "test.jsonl", "held_out": 2}}
    run = told_run(tmp_path, {"context": "{prompt}{hint}"}, data, PRIVILEGED)
    session = open_session(run)
    assert session.held_out is not None
    assert session.held_out.views == ()
    (note,) = session.held_out.notes
    assert "not measured on held-out prompts" in note
    assert "reads the column 'hint'" in note


def test_a_reader_without_room_is_refused(tmp_path: Path) -> None:
    encoder = ContextEncoder(tiny_tokenizer(), PromptSettings())
    prompts = load_prompts(RECORDS, tokenizer=tiny_tokenizer()).prompts
    view = TeacherView(source="student", context="{prompt}{prompt}")
    for limit, refused in ((None, False), (17, False), (16, True)):
        settings = {"answered": True, "limit": limit, "new": 6}
        if refused:
            with pytest.raises(ConfigError, match=r"up to 11 tokens.*more than the 16 positions"):
                privilege.held_out([view], prompts, encoder, **settings)  # type: ignore[arg-type]
        else:
            privilege.held_out([view], prompts, encoder, **settings)  # type: ignore[arg-type]

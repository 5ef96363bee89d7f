"""Views that are made here: combinations, and the student as its own teacher."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.data.prompts import PromptSettings, load_prompts
from opd.errors import ConfigError, DataError
from opd.formula import credit, divergence, reward
from opd.head import log_probs_of
from opd.objective import Dense, Method, Objective, Sampled
from opd.rollout.local import LocalSampler
from opd.rollout.pack import pack_rollout, with_token
from opd.schedule import Linear
from opd.student import Student
from opd.teacher.context import ContextEncoder
from opd.teacher.local import LocalTeacher
from opd.teacher.self_teacher import AverageTeacher
from opd.training import step as steps
from opd.training.check import check, examine
from opd.training.config import Run, load
from opd.training.explain import explain
from opd.training.loop import train_run
from opd.training.plan import Plan, make_plan
from opd.training.session import open_session
from opd.types import Batch, Rollout, SamplerSettings, TeacherScores, TeacherView
from tests.models_zoo import PAD, tiny, tiny_tokenizer
from tests.training.runs import abandon, finish, outcome, tiny_run

REVERSE_KL = Dense(divergence=divergence.reverse_kl)
LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)
RETURNS = replace(LOG_RATIO, credit=credit.return_to_go)
LIVE = TeacherView(source="student")
HINTED = TeacherView(source="student", context="{prompt}#{answer}")
BIG, START = TeacherView("teacher.big"), TeacherView("reference", "initial_student")
RECORDS = [{"prompt": f"S{n}:", "answer": "1" * (n % 4 + 1)} for n in (3, 21, 312, 9, 75)]
PLAIN = dict.fromkeys(range(len(RECORDS)), "")


def method_of(*terms: Any, views: Sequence[TeacherView]) -> Method:
    return Method(Objective(*terms), views=tuple(views))


class Prepared:
    """A rollout of real prompts, packed, with the plan of a method and its contexts."""

    def __init__(self, method: Method, updates: int = 1) -> None:
        self.method = method
        self.student = Student(tiny("llama"))
        self.plan: Plan = make_plan(
            method, SamplerSettings(max_new_tokens=6), updates_per_rollout=updates
        )
        prompts = load_prompts(RECORDS, tokenizer=tiny_tokenizer()).prompts
        sampler = LocalSampler(self.student.loaded)
        generator = torch.Generator().manual_seed(1)
        self.rollout: Rollout = sampler.sample(prompts, self.plan.sampler, generator=generator)
        self.batch = pack_rollout(self.rollout, pad_id=PAD)
        encoder = ContextEncoder(tiny_tokenizer(), PromptSettings())
        self.contexts = steps.privileged(self.rollout, self.batch, self.plan, encoder, pad_id=PAD)
        scorer = LocalTeacher(self.student.loaded, vocab_size=53, max_tokens=40)
        self.teachers = {
            "teacher": scorer,
            "teacher.big": LocalTeacher(tiny("llama", seed=1), vocab_size=53),
            "reference": LocalTeacher(tiny("llama", seed=2), vocab_size=53),
        }

    def score(self, batch: Batch | None = None, *, again: bool = False) -> Batch:
        return steps.score(
            self.teachers,
            self.batch if batch is None else batch,
            self.method.objective,
            self.plan,
            contexts=self.contexts,
            again=again,
        )

    def update(self, batch: Batch) -> tuple[float, float]:
        """Loss and gradient norm of the first term."""
        objective = self.method.objective
        batch = steps.signal(self.student, batch, objective, self.plan, 1000, fresh=True)
        self.student.zero_grad(set_to_none=True)
        stats = steps.update(self.student, batch, objective, 40, step=1)
        gradients = [p.grad.norm() for p in self.student.trainable().values() if p.grad is not None]
        loss = next(stat.mean for name, stat in stats.items() if name.startswith("loss/"))
        return loss, float(torch.stack(gradients).norm())

    def by_hand(self, suffixes: Mapping[int, str] | None = None) -> Tensor:
        """Log-probabilities of every response row, one forward per sequence, no packing."""
        tokenizer, rows = tiny_tokenizer(), []
        for b, prompt in enumerate(self.rollout.prompts):
            text = prompt.text + (f"#{prompt.answer}" if suffixes is None else suffixes[b])
            ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
            response = self.rollout.tokens[b, : int(self.rollout.lengths[b])].tolist()
            model: Any = self.student.model
            logits = model(torch.tensor([ids + response])).logits[0].detach()
            rows += [logits[len(ids) + t - 1].log_softmax(-1) for t in range(len(response))]
        return torch.stack(rows)


def distribution(scores: TeacherScores) -> Tensor:
    assert scores.hidden is not None
    assert scores.unembedding is not None
    return log_probs_of(scores.hidden, scores.unembedding).detach()


# --------------------------------------------------------------------------------------------
# The live self


@pytest.mark.parametrize("term", [REVERSE_KL, LOG_RATIO, RETURNS])
def test_a_live_self_without_context_teaches_nothing(term: Any) -> None:
    step = Prepared(method_of(term, views=[LIVE]))
    assert not any(part.name == "score" for part in step.plan.passes)
    loss, gradient = step.update(step.score())
    assert abs(loss) <= 1e-6
    other = Prepared(method_of(replace(term, against="teacher.big"), views=[BIG]))
    assert gradient <= 1e-5 * other.update(other.score())[1]
    if term is REVERSE_KL:  # the others may read the sampler's own rounding of a log-probability
        assert gradient <= 1e-6


def test_a_live_self_with_context_scores_the_same_tokens_after_the_rewritten_prompt() -> None:
    step = Prepared(method_of(REVERSE_KL, views=[HINTED]))
    scores = step.score().token.views["teacher"]
    assert (distribution(scores) - step.by_hand()).abs().max() <= 1e-5
    assert scores.provenance["context"] == "{prompt}#{answer}"
    assert scores.provenance["source"] == "student"
    ours = step.by_hand(PLAIN)
    assert (ours - step.by_hand()).abs().max() > 0.1
    kl = (ours.exp() * (ours - step.by_hand())).sum(-1).mean()
    loss, gradient = step.update(step.score())
    assert loss == pytest.approx(float(kl), rel=1e-4)
    assert gradient > 1e-2


def test_numbers_of_the_chosen_token_come_from_the_rewritten_prompt_too() -> None:
    step = Prepared(method_of(LOG_RATIO, views=[HINTED]))
    scores = step.score().token.views["teacher"]
    tokens = step.batch.token.tokens[step.batch.token.mask]
    by_hand = step.by_hand().gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert scores.hidden is None
    assert scores.sampled_logp is not None
    assert (scores.sampled_logp - by_hand).abs().max() <= 1e-5


def test_a_context_that_changes_nothing_is_the_view_without_it() -> None:
    step = Prepared(method_of(REVERSE_KL, views=[replace(HINTED, context="{prompt}")]))
    loss, _ = step.update(step.score())
    assert abs(loss) <= 1e-6


def test_before_a_second_update_what_moves_is_scored_again_and_what_stands_still_is_kept() -> None:
    big = TeacherView("teacher.big", context="{answer}{prompt}")
    term = replace(REVERSE_KL, against="teacher.big")
    step = Prepared(method_of(REVERSE_KL, term, views=[HINTED, big]), updates=2)
    visits = {p.model: p.per_rollout for p in step.plan.passes if p.name == "score"}
    assert visits == {"teacher": 2, "teacher.big": 1}
    first = step.score()
    before = distribution(first.token.views["teacher"]).clone()
    with torch.no_grad():
        for parameter in step.student.trainable().values():
            parameter.add_(0.02)
    second = step.score(first, again=True)
    assert second.token.views["teacher.big"] is first.token.views["teacher.big"]
    now = distribution(second.token.views["teacher"])
    assert (now - step.by_hand()).abs().max() <= 1e-5
    assert (now - before).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------
# Combinations


def combination(**parts: Any) -> TeacherView:
    named = {name.replace("__", "."): weight for name, weight in parts.items()}
    return TeacherView("teacher.mix", "combination", parts=tuple(named.items()))


@pytest.mark.parametrize("term", [REVERSE_KL, LOG_RATIO, RETURNS])
def test_extrapolation_by_one_is_training_on_the_plain_teacher(term: Any) -> None:
    mix = combination(teacher__big=1.0, reference=0.0)
    ours = Prepared(method_of(replace(term, against="teacher.mix"), views=[BIG, START, mix]))
    plain = Prepared(method_of(replace(term, against="teacher.big"), views=[BIG]))
    for one, other in zip(ours.update(ours.score()), plain.update(plain.score()), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_bridge_to_the_student_is_closer_to_it_than_the_teacher_at_every_update() -> None:
    """Veto's target q * s^b / Z: its reverse KL by hand, at the weights of each update."""
    mix = combination(teacher__big=1.0, student=0.5)
    term = replace(REVERSE_KL, against="teacher.mix")
    step = Prepared(method_of(term, views=[BIG, mix]), updates=2)
    batch = step.score()
    teacher = distribution(batch.token.views["teacher.big"])
    for _ in range(2):
        student = step.by_hand(PLAIN)
        target = (teacher + 0.5 * student).log_softmax(-1)
        expected = (student.exp() * (student - target)).sum(-1).mean()
        loss, gradient = step.update(batch)
        assert loss == pytest.approx(float(expected), rel=1e-4)
        assert gradient > 1e-3
        with torch.no_grad():
            for parameter in step.student.trainable().values():
                parameter.add_(0.02)
        batch = step.score(batch, again=True)


def test_a_signal_reads_a_combination_from_a_visit_because_nobody_tells_its_numbers() -> None:
    mix = combination(teacher__big=1.25, reference=-0.25)
    term = replace(RETURNS, against="teacher.mix")
    step = Prepared(method_of(term, views=[BIG, START, mix]))
    assert [p.per_rollout for p in step.plan.passes if p.name == "signal"] == [1]
    batch = step.score()
    parts = [distribution(batch.token.views[name]) for name in ("teacher.big", "reference")]
    target = (1.25 * parts[0] - 0.25 * parts[1]).log_softmax(-1)
    student = step.by_hand(PLAIN)
    token = step.batch.token
    chosen = token.tokens[token.mask].unsqueeze(-1)
    ratio = (target - student).gather(-1, chosen).squeeze(-1)
    settled = steps.signal(
        step.student, batch, step.method.objective, step.plan, 1000, fresh=True
    ).token.coupled["advantage.sampled"]
    lengths = step.rollout.lengths.tolist()
    returns = [part.flip(0).cumsum(0).flip(0) for part in torch.split(ratio, lengths)]
    assert (settled[token.mask] - torch.cat(returns)).abs().max() <= 1e-4


def test_what_a_view_says_of_some_rows_reaches_the_right_returns() -> None:
    step = Prepared(method_of(RETURNS, views=[TeacherView()]))
    mask, rows = step.batch.token.mask, int(step.batch.token.mask.sum())
    index = torch.arange(rows).flip(0)
    index[0] = -1
    told = -torch.rand(rows)  # of row n it says told[index[n]], of the first nothing
    reply = TeacherScores(sampled_logp=told, row_index=index)
    batch = with_token(step.batch, views={"teacher": reply})
    settled = steps.signal(
        step.student, batch, step.method.objective, step.plan, 1000, fresh=True
    ).token.coupled["advantage.sampled"]
    student = step.by_hand(PLAIN).gather(-1, batch.token.tokens[mask].unsqueeze(-1)).squeeze(-1)
    reward_ = told[index.clamp(min=0)] - student
    reward_[0] = 0.0  # passed over
    lengths = step.rollout.lengths.tolist()
    returns = [part.flip(0).cumsum(0).flip(0) for part in torch.split(reward_, lengths)]
    expected = torch.cat(returns)
    expected[0] = 0.0
    assert (settled[mask] - expected).abs().max() <= 1e-4


def test_scheduled_weights_are_settled_with_the_method() -> None:
    mix = combination(teacher__big=1.0, student=Linear(0.8, 0.0, 4))
    method = method_of(replace(REVERSE_KL, against="teacher.mix"), views=[BIG, mix])
    halfway, _ = method.at(2, {}, None)
    assert dict(halfway.views[1].parts) == {"teacher.big": 1.0, "student": pytest.approx(0.4)}
    assert halfway.at(3, {}, None)[0] == halfway


# --------------------------------------------------------------------------------------------
# Whole runs


def self_run(output: Path, view: Mapping[str, Any], *changes: Mapping[str, Any]) -> Run:
    """A tiny run without a teacher, whose student is told the worked solution."""
    table = {"name": "teacher", "context": "{response}#{prompt}", **view}
    terms = [{"kind": "dense", "divergence": "reverse_kl"}]
    method = {"name": "custom", "objective": {"terms": terms}, "views": [table]}
    return tiny_run(output, {"teacher": {"model": ""}, "method": method}, *changes)


SELVES: Mapping[str, Mapping[str, Any]] = {
    "live": {"source": "student"},
    "average": {"source": "ema_student", "decay": 0.8},
    "frozen": {"source": "initial_student"},
}
LORA = {"student": {"lora": {"r": 2}}}
WARM = {"warmup": {"steps": 1, "prompts_per_step": 4, "source": "data", "learning_rate": 1e-3}}
TWICE = {"train": {"steps": 2, "updates_per_rollout": 2}}
SHORT = {"evaluate": {"every": 0, "prompts": 1, "test_prompts": 1}}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("live", [TWICE]),
        ("average", [TWICE]),
        ("average", [TWICE, LORA, WARM]),
        ("frozen", [TWICE, LORA]),
        ("frozen", [TWICE, LORA, WARM]),
    ],
    ids=["live", "average", "average of an adapter", "adapter off", "frozen adapter"],
)
def test_a_resumed_self_teacher_ends_as_if_never_stopped(
    tmp_path: Path, kind: str, changes: list[Mapping[str, Any]]
) -> None:
    whole, cut = (
        self_run(tmp_path / name, SELVES[kind], SHORT, *changes) for name in ("whole", "cut")
    )
    finish(whole)
    abandon(cut, 3 if WARM in changes else 2)  # the start, one step of training; then gone
    finish(cut, resume=tmp_path / "cut" / "run")
    assert outcome(tmp_path / "whole" / "run") == outcome(tmp_path / "cut" / "run")


@pytest.mark.parametrize("changes", [[], [LORA]], ids=["all weights", "adapter"])
def test_the_average_of_a_run_follows_its_updates(
    tmp_path: Path, changes: list[Mapping[str, Any]]
) -> None:
    run = self_run(tmp_path, SELVES["average"], *changes)
    session = open_session(run)
    trained = session.student.trainable()
    expected = {name: p.detach().clone() for name, p in trained.items()}
    updates = 0
    for report in itertools.islice(train_run(run, session=session), 4):
        if report.step:
            updates += 1
            for name, parameter in trained.items():
                expected[name] = 0.8 * expected[name] + 0.2 * parameter.detach()
    assert updates == 3
    teacher = session.teachers["teacher"]
    assert isinstance(teacher, AverageTeacher)
    assert teacher.average.keys() == expected.keys()
    for name, value in expected.items():
        assert (teacher.average[name] - value).abs().max() <= 1e-6, name
    assert any((teacher.average[n] - p).abs().max() > 1e-5 for n, p in trained.items())


def test_with_an_adapter_only_its_factors_are_averaged_and_saved_and_the_base_is_the_students(
    tmp_path: Path,
) -> None:
    """End to end: the live teacher, what a checkpoint holds of it, and what it reads."""
    run = self_run(tmp_path, SELVES["average"], LORA, {"train": {"steps": 2}})
    session = open_session(run)
    finish(run, session=session)
    teacher = session.teachers["teacher"]
    assert isinstance(teacher, AverageTeacher)
    student_model: Any = session.student.loaded.model
    teacher_model: Any = teacher.loaded.model
    own, held = dict(student_model.named_parameters()), dict(teacher_model.named_parameters())
    factors = {name for name in own if ".lora_A." in name or ".lora_B." in name}
    assert factors == set(teacher.average) == set(session.student.trainable())
    assert all(held[name] is own[name] for name in own.keys() - factors)
    assert all(held[name] is not own[name] for name in factors)
    newest = tmp_path / "run" / "checkpoints" / "step-2"
    saved = torch.load(newest / "tensors.pt", weights_only=True)["averages"]["teacher"]
    assert set(saved) == factors
    assert all(torch.equal(saved[name], held[name].float()) for name in factors)


def test_a_frozen_self_compares_with_the_student_at_the_start_of_the_train_phase(
    tmp_path: Path,
) -> None:
    # alone the divergence would be 0 and stay there: something else has to move the student
    terms = [
        {"kind": "dense", "divergence": "reverse_kl"},
        {"kind": "regulariser", "penalty": "entropy_bonus", "coef": 0.1},
    ]
    away = {"method": {"objective": {"terms": terms}}}
    view = {"source": "initial_student", "context": "{prompt}"}
    reports = finish(self_run(tmp_path, view, WARM, away))
    losses = [r.metrics["loss/dense"].mean for r in reports if r.phase == "train" and r.metrics]
    assert abs(losses[0]) <= 1e-6
    assert losses[-1] > losses[0] + 1e-6


def test_a_run_against_a_combination_with_the_student_needs_no_second_forward(
    tmp_path: Path,
) -> None:
    terms = [{"kind": "dense", "divergence": "reverse_kl", "against": "teacher.bridge"}]
    weight = {"schedule": "linear", "start": 0.8, "end": 0.0, "steps": 4}
    view = {"name": "teacher.bridge", "source": "combination"}
    view["parts"] = {"teacher": 1.0, "student": weight}  # type: ignore[assignment]
    method = {"name": "custom", "objective": {"terms": terms}, "views": [view]}
    run = tiny_run(tmp_path, {"method": method})
    plan = explain(run)
    assert [p.model for p in plan.passes if p.name == "score"] == ["teacher"]
    words = plan.variables["feedback source"]
    assert "linear(start=0.8, end=0, steps=4) x log student + log teacher" in words
    reports = finish(run)
    assert reports[-1].summary is not None
    assert len(reports) == 1 + 4 + 1


def test_a_context_whose_column_is_missing_stops_the_run_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    records = [{"prompt": "S21:", "hint": "1"}] * 5 + [{"prompt": "S3:", "answer": "3"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"data": {"prompts": "prompts.jsonl", "held_out": 1, "verifier": "none"}}
    run = self_run(tmp_path, {"source": "student", "context": "{prompt}{hint}"}, data)
    named = r"prompts\.jsonl:6: the context '\{prompt\}\{hint\}' reads the column 'hint'"
    with pytest.raises(DataError, match=named):
        open_session(run)
    found = [str(finding) for finding in check(run) if finding.level == "error"]
    assert len(found) == 1
    assert "prompts.jsonl:6: the context" in found[0]
    assert not (tmp_path / "run").exists()


def test_a_context_that_leaves_no_room_for_a_response_is_refused(tmp_path: Path) -> None:
    run = self_run(tmp_path, {"source": "student", "context": "{prompt}" * 100})
    with pytest.raises(ConfigError, match=r"more than the \d+ positions of its model"):
        open_session(run)
    assert any("positions of its model" in str(finding) for finding in check(run))


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"source": "student"}, "zero everywhere, so it teaches nothing"),
        ({"source": "ema_student", "decay": 0.9}, "teaches nothing new"),
    ],
)
def test_a_self_without_context_is_warned_about(
    tmp_path: Path, view: Mapping[str, Any], words: str
) -> None:
    run = self_run(tmp_path, {**view, "context": ""})
    notes = [finding for finding in check(run) if finding.where == "method.views"]
    assert [finding.level for finding in notes] == ["note"]
    assert words in notes[0].message
    assert any(words in note for note in open_session(run).notes)


def test_a_self_teacher_needs_no_teacher_and_a_part_may_need_one(tmp_path: Path) -> None:
    assert not [f for f in check(self_run(tmp_path, SELVES["live"])) if f.level == "error"]
    parts = {"parts": {"teacher": 1.0, "student": 0.5}, "name": "teacher.mix", "context": ""}
    term = {"kind": "dense", "divergence": "reverse_kl", "against": "teacher.mix"}
    objective = {"method": {"objective": {"terms": [term]}}}
    run = self_run(tmp_path, {"source": "combination", **parts}, objective)
    assert any(f.where == "teacher.model" and f.level == "error" for f in check(run))
    with pytest.raises(ConfigError, match="needs a teacher"):
        open_session(run)


def test_the_memory_estimate_counts_what_views_hold(tmp_path: Path) -> None:
    parts = {
        kind: {part.what: part.bytes for part in examine(self_run(tmp_path, view)).memory}
        for kind, view in SELVES.items()
    }
    student = parts["live"]["student weights"]
    assert "average weights" not in parts["live"]
    assert "reference weights" not in parts["live"]
    assert parts["average"]["average weights"] == student
    assert parts["frozen"]["reference weights"] == student
    for kind in SELVES:
        assert parts[kind]["teacher's hidden states"] > 0


def test_explain_says_whose_distribution_a_view_is_and_what_it_reads(tmp_path: Path) -> None:
    said = explain(self_run(tmp_path, SELVES["average"], TWICE))
    assert said.variables["feedback source"] == "the moving average of the student, decay 0.8"
    assert said.variables["teacher privilege"] == "'teacher' reads '{response}#{prompt}'"
    (scored,) = (part for part in said.passes if part.name == "score")
    assert (scored.model, scored.per_rollout) == ("teacher", 2)
    assert "{response}#{prompt}" in scored.why


# --------------------------------------------------------------------------------------------
# Further teachers


def two_teachers(tmp_path: Path, *overrides: str, **teachers: str) -> Run:
    run_file = tmp_path / "run.toml"
    tables = "".join(f'[teachers.{name}]\nmodel = "{model}"\n' for name, model in teachers.items())
    run_file.write_text(
        '[student]\nmodel = "builtin:sort-student"\n[teacher]\nmodel = "builtin:sort-teacher"\n'
        f'{tables}[data]\nprompts = "task:sort"\nheld_out = 2\n[method]\nname = "compass_opd"\n'
        "[train]\nsteps = 2\nprompts_per_step = 4\nsave_every = 0\n[sampler]\nmax_new_tokens = 8\n"
        "[evaluate]\nevery = 0\nprompts = 2\ntest_prompts = 2\nteacher = false\n"
        "[log]\nsamples_per_step = 0\n"
    )
    return load(run_file, ["--output", str(tmp_path / "runs"), "--device", "cpu", *overrides])


def test_a_further_teacher_scores_the_view_of_its_name(tmp_path: Path) -> None:
    run = two_teachers(tmp_path, before="builtin:sort-student")
    session = open_session(run)
    scorers = session.teachers
    assert set(scorers) == {"teacher", "teacher.before"}
    assert scorers["teacher"] is not scorers["teacher.before"]
    reports = [report for report in train_run(run, session=session) if report.step]
    assert [report.step for report in reports][:2] == [1, 2]
    memory = {part.what for part in examine(run).memory}
    assert {"teacher weights", "further teachers' weights"} <= memory


def test_a_combination_of_a_model_with_itself_is_refused_and_found_by_the_check(
    tmp_path: Path,
) -> None:
    run = two_teachers(tmp_path)
    with pytest.raises(ConfigError, match=r"'teacher' and 'teacher.before', which are the same"):
        open_session(run)
    assert any("[teachers.before]" in finding.message for finding in check(run))


def test_a_further_teacher_that_nobody_asks_is_refused(tmp_path: Path) -> None:
    run = two_teachers(tmp_path, before="builtin:sort-student", after="builtin:sort-student")
    with pytest.raises(ConfigError, match=r"\[teachers.after\] scores .*'teacher.after', which"):
        open_session(run)


def test_a_further_teacher_takes_overrides_and_knows_its_keys(tmp_path: Path) -> None:
    run = two_teachers(tmp_path, "--teachers.before.model", "builtin:sort-student")
    assert run.config.teachers["before"].model == "builtin:sort-student"
    with pytest.raises(ConfigError, match=r"teachers.before.modle"):
        two_teachers(tmp_path, "--teachers.before.modle", "x")

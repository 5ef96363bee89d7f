"""The ways out that `docs/what_does_not_fit.md` shows for methods that are no sum of terms."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import opd
from opd import Dense, Method, Objective, Sampled
from opd.cli.main import main
from opd.data.prompts import PromptStream, load_prompts
from opd.data.verifiers import verifier_of
from opd.fastpath import response_states
from opd.formula import divergence, support
from opd.head import linear_head, log_probs_of
from opd.models import LoadedModel, backbone, load_model, unembedding, wrap_model
from opd.rollout.edit import put, take
from opd.rollout.local import LocalSampler
from opd.rollout.pack import pack_rollout, split, with_token
from opd.student import Student
from opd.teacher.local import LocalTeacher
from opd.training import step as steps
from opd.training.evaluate import verify_rollout
from opd.training.loop import train_run
from opd.training.plan import make_plan
from opd.training.session import build_method, open_session, sampler_settings
from opd.types import (
    Batch,
    FieldKey,
    Need,
    Prompt,
    Provenance,
    Rollout,
    SamplerSettings,
    Stat,
    Teacher,
    TeacherRequest,
    TeacherScores,
    pack_rows,
    unpack_rows,
)
from tests.builders import STUDENT, TEACHER, Case, identity, settle
from tests.test_docs import blocks, command_lines, files_of, module_from, words_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/what_does_not_fit.md"
RECIPE = ROOT / "recipes/rubric.toml"
SHORT: Mapping[str, Any] = {
    "train.prompts_per_step": 8,
    "train.save_every": 0,
    "evaluate.every": 0,
    "evaluate.prompts": 4,
    "evaluate.test_prompts": 4,
    "sampler.max_new_tokens": 24,
    "threads": 1,
}
SHORT_RUBRIC = {**SHORT, "warmup.steps": 10, "warmup.prompts_per_step": 32, "train.steps": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the page shows and the recipe that it names."""
    folder = tmp_path_factory.mktemp("page")
    files_of(PAGE, folder)
    (folder / "recipes").mkdir()
    for name in ("rubric.toml", "rubric.py"):
        shutil.copy(ROOT / "recipes" / name, folder / "recipes" / name)
    return folder


@pytest.fixture(scope="module")
def walk(files: Path) -> Iterator[dict[str, Any]]:
    """What is left in memory after all that the page says to type, from top to bottom."""
    names: dict[str, Any] = {"__name__": "page"}
    before = set(sys.modules)
    sys.path.insert(0, str(files))
    torch.set_num_threads(1)
    try:
        with contextlib.chdir(files):
            for block in (block for block in blocks(PAGE) if block.marker == "run"):
                if block.language == "python":
                    exec(compile(block.text, block.place, "exec"), names)
                for words in command_lines(block) if block.language == "sh" else ():
                    shorter = words_of(SHORT_RUBRIC if words[1] == "run" else {})
                    assert main([*words[1:], *shorter]) == 0, f"{block.place}: {shlex.join(words)}"
        yield names
    finally:
        sys.path.remove(str(files))
        for name in {"hidden", "pairs"} & (set(sys.modules) - before):
            del sys.modules[name]


@pytest.fixture(scope="module")
def hidden(files: Path) -> ModuleType:
    return module_from("page_hidden", files / "hidden.py")


@pytest.fixture(scope="module")
def pairs(files: Path) -> ModuleType:
    return module_from("page_pairs", files / "pairs.py")


def builtin(role: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoadedModel:
    loaded = load_model(f"builtin:sort-{role}", seed=seed)
    model: Any = loaded.model
    return wrap_model(model.to(dtype), loaded.tokenizer, reference=loaded.reference)


def stream(loaded: LoadedModel) -> PromptStream:
    return PromptStream(load_prompts("task:sort", tokenizer=loaded.tokenizer), 0)


def sampled(loaded: LoadedModel, prompts: int = 6, samples: int = 1) -> Rollout:
    """What the model writes to some training prompts, the same at every call."""
    return LocalSampler(loaded).sample(
        stream(loaded).take(prompts, with_responses=False),
        SamplerSettings(max_new_tokens=24, samples_per_prompt=samples),
        generator=torch.Generator().manual_seed(0),
    )


def gradients(student: Student, loss: Tensor) -> dict[str, Tensor]:
    named = student.trainable()
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


# --------------------------------------------------------------------------------------------
# The page


def test_the_page_runs_from_top_to_bottom(walk: Mapping[str, Any], files: Path) -> None:
    for name in ("rubric", "hidden"):
        summary = json.loads((files / "runs" / name / "summary.json").read_text())
        assert summary["exit_reason"] == "finished"


# --------------------------------------------------------------------------------------------
# A grader's score


def test_the_grade_is_the_weighted_share_of_criteria() -> None:
    grade = module_from("recipe_rubric", ROOT / "recipes/rubric.py").grade
    prompt = Prompt(id="1", prompt_ids=(1,), text="S312:", answer="123")
    assert grade(prompt, "1|32>123", finished=True) == 1.0
    assert grade(prompt, "1|32>132", finished=True) == pytest.approx(3 / 6)
    assert grade(prompt, "1|32>321", finished=False) == pytest.approx(2 / 6)
    assert grade(prompt, "7", finished=True) == pytest.approx(1 / 6)
    assert grade(prompt, "7", finished=False) == 0.0


IN_ONE_TERM = [
    {
        "kind": "sampled",
        "name": "rubric",
        "reward": "teacher_log_ratio",
        "outcome": [{"use": "add_group_advantage", "scale": 0.5}],
    }
]


def terms_of(form: str) -> list[dict[str, Any]]:
    if form == "in one term":
        return IN_ONE_TERM
    found: list[dict[str, Any]] = opd.load(RECIPE).config.method.objective["terms"]
    return found


@pytest.mark.parametrize("form", ["a term of its own", "in one term"])
def test_the_grade_reaches_the_gradient(form: str) -> None:
    """Turned around it adds the opposite, and a grade that is always the same adds nothing."""
    run = opd.load(RECIPE)
    objective = {"terms": terms_of(form)}
    config = replace(run.config, method=replace(run.config.method, objective=objective))
    method = build_method(replace(run, config=config))
    plan = make_plan(method, sampler_settings(config))
    student, teacher = Student(builtin("student")), builtin("teacher")
    scorer: dict[str, Teacher] = {"teacher": LocalTeacher(teacher, vocab_size=student.vocab_size)}
    rollout = sampled(student.loaded, samples=4)

    def gradient(grade: Callable[..., float]) -> dict[str, Tensor]:
        judged, _ = verify_rollout(rollout, verifier_of(grade, "grade"), student.loaded.tokenizer)
        batch = pack_rollout(judged, pad_id=student.loaded.pad_id)
        batch = steps.score(scorer, batch, method.objective, plan)
        batch = steps.signal(student, batch, method.objective, plan, 4096, fresh=True)
        out = student(batch, method.objective)
        return gradients(student, out.loss)

    def short(prompt: Prompt, response: str, *, finished: bool) -> float:
        return 1 / (1 + len(response))

    graded = gradient(short)
    reversed_ = gradient(lambda *args, finished: 1 - short(*args, finished=finished))
    plain = gradient(lambda *args, finished: 0.5)
    for name, value in plain.items():
        effect = graded[name] - value
        size = value.abs().max()
        assert effect.abs().max() > 1e-2 * size, name
        torch.testing.assert_close(
            reversed_[name] - value, -effect, rtol=1e-3, atol=float(1e-4 * size), msg=name
        )


def test_two_graders_train_two_students(tmp_path: Path) -> None:
    (tmp_path / "graders.py").write_text(
        "def short(prompt, response, *, finished):\n    return 1 / (1 + len(response))\n\n\n"
        "def same(prompt, response, *, finished):\n    return 0.5\n"
    )
    shutil.copy(RECIPE, tmp_path / "run.toml")
    settings = {**SHORT, "output": tmp_path, "train.learning_rate": 1e-2, "train.steps": 2}
    settings |= {"warmup.steps": 0}
    found = {}
    for name in ("short", "same"):
        own = {"name": name, "data.verifier": f"graders:{name}"}
        run = opd.load(tmp_path / "run.toml", words_of(settings | own))
        reports = [report for report in opd.train(run) if report.phase == "train"]
        measured = [report.metrics["loss/rubric"] for report in reports if report.metrics]
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        found[name] = measured, model.lm_head.weight
    assert all(stat.total == 0 for stat in found["same"][0])
    assert all(stat.total != 0 for stat in found["short"][0])
    assert not torch.allclose(found["same"][1], found["short"][1])


# --------------------------------------------------------------------------------------------
# Hidden states


@dataclass(frozen=True)
class Scene:
    """A student with the term, its teacher, and one batch with the teacher's answers."""

    student: Any
    teacher: LoadedModel
    batch: Batch
    objective: Objective
    projection: Tensor

    @classmethod
    def made(cls, hidden: ModuleType, *, coef: float, dtype: torch.dtype = torch.float64) -> Scene:
        teacher, loaded = builtin("teacher", dtype=dtype), builtin("student", dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        projection = torch.randn((64, 96), generator=generator, dtype=dtype) / 8
        student = hidden.HiddenStudent(loaded, projection, coef=coef)
        batch = pack_rollout(sampled(builtin("student")), pad_id=loaded.pad_id)
        reply = LocalTeacher(teacher, vocab_size=student.vocab_size).score(TeacherRequest(batch))
        objective = Objective(Dense(divergence=divergence.reverse_kl))
        batch = with_token(batch, views={"teacher": reply})
        return cls(student, teacher, batch, objective, projection)

    def loss(self, max_tokens: int = 10**6) -> Tensor:
        parts = split(self.batch, max_tokens=max_tokens)
        return torch.stack([self.student(part.batch, self.objective).loss for part in parts]).sum()

    def plain_loss(self, coef: float) -> Tensor:
        """The same loss from the models' own outputs and autograd, the whole batch at once."""
        row = self.batch.row_index

        def states_and_logp(model: Any) -> tuple[Tensor, Tensor]:
            out = model(input_ids=self.batch.input_ids, output_hidden_states=True)
            logits = out.logits[..., : self.student.vocab_size].flatten(0, 1)[row]
            return out.hidden_states[-1].flatten(0, 1)[row], logits.log_softmax(-1)

        own, student_logp = states_and_logp(self.student.model)
        with torch.no_grad():
            theirs, teacher_logp = states_and_logp(self.teacher.model)
        kl = functional.kl_div(teacher_logp, student_logp, reduction="none", log_target=True)
        distance = functional.mse_loss(own @ self.projection, theirs)
        return kl.sum(-1).mean() + coef * distance


@pytest.mark.parametrize("coef", [0.0, 0.7])
@pytest.mark.parametrize("max_tokens", [1, 60, 10**6])
def test_the_hidden_term_has_the_gradient_of_plain_autograd(
    hidden: ModuleType, coef: float, max_tokens: int
) -> None:
    scene = Scene.made(hidden, coef=coef)
    loss, plain = scene.loss(max_tokens), scene.plain_loss(coef)
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=0.0)
    ours, theirs = gradients(scene.student, loss), gradients(scene.student, plain)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=1e-11, msg=name)


def test_the_hidden_term_has_the_slope_of_finite_differences(hidden: ModuleType) -> None:
    scene = Scene.made(hidden, coef=3.0)
    generator = torch.Generator().manual_seed(2)
    directions = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in scene.student.trainable().items()
    }
    # torch gives the embedding of the padding token no gradient, and an untrained student writes it
    directions["model.embed_tokens.weight"][scene.student.loaded.pad_id] = 0.0
    found = gradients(scene.student, scene.loss())
    slope = float(sum((found[name] * way).sum() for name, way in directions.items()))

    @torch.no_grad()
    def moved(by: float) -> float:
        for name, value in scene.student.trainable().items():
            value.add_(directions[name], alpha=by)
        return float(scene.loss())

    step = 1e-4  # the norms of the model compute in float32
    ahead = moved(step)
    behind = moved(-2 * step)
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-3)


def test_the_hidden_term_alone_lowers_the_distance_on_the_same_text(hidden: ModuleType) -> None:
    ends = {}
    for coef in (0.0, 1.0):
        scene = Scene.made(hidden, coef=coef, dtype=torch.float32)
        weights = list(scene.student.trainable().values())
        optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.0)
        seen = []
        for _ in range(30):
            out = scene.student(scene.batch, scene.objective)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(out.stats["loss/hidden"].mean)
        ends[coef] = seen[0], seen[-1]
    assert ends[0.0][0] == ends[1.0][0]
    assert ends[1.0][1] < 0.6 * ends[1.0][0]
    assert ends[1.0][1] < 0.8 * ends[0.0][1]


def test_the_run_of_the_page_lowers_the_distance(walk: Mapping[str, Any], files: Path) -> None:
    lines = (files / "runs/hidden/events.jsonl").read_text().splitlines()
    stats = [json.loads(line).get("metrics", {}).get("loss/hidden") for line in lines]
    means = [Stat(*pair).mean for pair in stats if pair]
    assert len(means) == 12
    assert means[-1] < 0.9 * means[0]
    assert AutoModelForCausalLM.from_pretrained(files / "runs/hidden/model")


def test_a_step_whose_objective_is_off_leaves_the_hidden_term_out_too(hidden: ModuleType) -> None:
    scene = Scene.made(hidden, coef=1.0)
    off = Objective(Dense(divergence=divergence.reverse_kl, coef=0.0))
    steps.update(scene.student, scene.batch, off, 4096, step=1)
    assert all(weight.grad is None for weight in scene.student.trainable().values())


def test_a_visit_without_loss_is_that_of_the_plain_student(hidden: ModuleType) -> None:
    scene = Scene.made(hidden, coef=1.0)
    assert scene.student(scene.batch).loss is None
    assert not any(module._forward_hooks for module in scene.student.modules())


# --------------------------------------------------------------------------------------------
# Pairs


def test_the_reward_of_a_pair_has_the_gradient_of_dpo(pairs: ModuleType) -> None:
    case = Case.random(
        0, writers=(STUDENT, TEACHER), lengths=(4, 3, 6, 1, 5), views=("reference",), gaps=False
    )
    beta, group = 0.7, torch.tensor([0, 0, 0, 1, 1])
    verdict = torch.tensor([1.0, 0.5, 0.0, 0.0, 1.0], dtype=torch.float64)
    term = Sampled(
        reward=partial(pairs.preferred, beta=beta), against="reference", reduction="sequence_sum"
    )
    objective = Objective(term)
    batch = settle(case, objective, case.batch(group=group, verdict=verdict))
    logits = case.rows(case.student_logits).requires_grad_()
    loss = linear_head(logits, identity(case.vocab_size), batch, objective).loss
    assert loss is not None
    (ours,) = torch.autograd.grad(loss, logits)

    chosen = case.rows(case.tokens).unsqueeze(-1)
    student = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
    reference = case.rows(case.teacher_logits["reference"]).log_softmax(-1)
    ratio = student - reference.gather(-1, chosen).squeeze(-1)
    score = unpack_rows(ratio, case.mask).sum(1)
    better = [(0, 1), (0, 2), (1, 2), (4, 3)]
    plain = sum(-functional.logsigmoid(beta * (score[i] - score[j])) for i, j in better)
    assert isinstance(plain, Tensor)
    (theirs,) = torch.autograd.grad(plain / 5, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_run_file_prefers_what_the_verifier_prefers(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "pairs.py", tmp_path)
    shutil.copy(files / "recipes/rubric.py", tmp_path)
    text = (files / "recipes/rubric.toml").read_text()
    start, end = text.index("[[method.objective.terms]]"), text.index("[warmup]")
    term = (
        '[[method.objective.terms]]\nkind = "sampled"\nagainst = "reference"\n'
        'reduction = "sequence_sum"\nreward = { use = "pairs:preferred", beta = 0.5 }\n\n'
    )
    (tmp_path / "run.toml").write_text(text[:start] + term + text[end:])
    settings = {**SHORT, "output": tmp_path, "warmup.steps": 0, "train.steps": 2}
    reports = list(opd.train(opd.load(tmp_path / "run.toml", words_of(settings))))
    measured = [report.metrics["advantage/sampled"] for report in reports if report.metrics]
    assert len(measured) == 2
    assert all(stat.total != 0 for stat in measured)


def paired_log_odds(
    student_log_probs: Tensor, teacher_log_probs: Tensor, *, limit: float
) -> Tensor:
    """Huber of the gap in log-odds over all pairs of a row, weighted by the student's mass."""
    gap = student_log_probs - teacher_log_probs
    odds = gap.unsqueeze(-1) - gap.unsqueeze(-2)
    mass = student_log_probs.detach().exp()
    loss = functional.huber_loss(odds, torch.zeros_like(odds), reduction="none", delta=limit)
    return (mass.unsqueeze(-1) * mass.unsqueeze(-2) * loss).sum((-1, -2))


def test_a_divergence_of_a_users_own_compares_pairs_of_candidates() -> None:
    case = Case.random(3, gaps=False)
    full = Dense(divergence=partial(paired_log_odds, limit=0.5))
    few = replace(full, support=partial(support.student_top_k, k=4), tail="renormalise")
    for term in (full, few):
        logits = case.rows(case.student_logits).requires_grad_()
        head = identity(case.vocab_size)
        out = linear_head(logits, head, case.batch(), Objective(term))
        assert out.loss is not None
        (ours,) = torch.autograd.grad(out.loss, logits)
        ids = logits.detach().topk(4, -1).indices if term is few else None
        sides = [logits, case.rows(case.teacher_logits["teacher"])]
        sides = [side if ids is None else side.gather(-1, ids) for side in sides]
        student, teacher = (side.log_softmax(-1) for side in sides)
        (theirs,) = torch.autograd.grad(paired_log_odds(student, teacher, limit=0.5).mean(), logits)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_loop_of_the_page_comes_to_prefer_the_teachers_text(walk: Mapping[str, Any]) -> None:
    student, batch = walk["student"], walk["batch"]
    logp = FieldKey("student_logp")
    now = student(batch, wanted=frozenset({logp})).fields[logp]
    before = batch.token.views["reference"].sampled_logp
    margin = unpack_rows(now - before, batch.token.mask).sum(1)
    theirs, own = margin[: len(margin) // 2], margin[len(margin) // 2 :]
    assert float((theirs - own).mean()) > 0.5
    assert set(batch.token.provenance.unique().tolist()) == {
        int(Provenance.PADDING),
        int(Provenance.STUDENT),
        int(Provenance.TEACHER),
    }


# --------------------------------------------------------------------------------------------
# Further ways out that the table names


class Helped:
    """A sampler in which the teacher writes the first response of every call, except greedily."""

    def __init__(self, student: Any, teacher: Any) -> None:
        self.student, self.teacher = student, teacher

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: SamplerSettings,
        *,
        generator: torch.Generator,
        policy_version: int = 0,
    ) -> Rollout:
        own: Rollout = self.student.sample(
            prompts, settings, generator=generator, policy_version=policy_version
        )
        if settings.temperature == 0:
            return own
        return put(own, [0], take(self.teacher.sample(prompts, settings, generator=generator), [0]))


class Probing:
    """A teacher that runs the student too, and answers with the mean of their log-probabilities."""

    def __init__(self, teacher: Teacher, student: LoadedModel) -> None:
        self.teacher, self.student = teacher, student

    def can(self, need: Need) -> bool:
        return True

    @torch.no_grad()
    def score(self, request: TeacherRequest) -> TeacherScores:
        reply = self.teacher.score(request)
        assert reply.hidden is not None
        assert reply.unembedding is not None
        theirs = log_probs_of(reply.hidden, reply.unembedding)
        states = response_states(self.student.model, request.batch)
        own = log_probs_of(states, unembedding(self.student.model, theirs.shape[-1]))
        return TeacherScores(log_probs=((own + theirs) / 2).log_softmax(-1))


def test_a_run_takes_a_sampler_and_a_teacher_of_a_users_own(tmp_path: Path) -> None:
    settings = {**SHORT, "output": tmp_path, "warmup.steps": 0, "train.steps": 2}
    firsts, texts = [], []
    for own in (False, True):
        run = opd.load(None, words_of(settings | {"name": f"own-{own}"}))
        session = open_session(run)
        if own:
            assert session.teacher_sampler is not None
            session.student_sampler = Helped(session.student_sampler, session.teacher_sampler)
            plain = session.teachers["teacher"]
            session.teachers["teacher"] = Probing(plain, session.student.loaded)
        *reports, last = train_run(run, session=session)
        assert last.summary is not None
        assert last.summary["exit_reason"] == "finished"
        firsts.append(
            next(report.metrics["loss/dense"].mean for report in reports if report.metrics)
        )
        lines = (last.folder / "samples.jsonl").read_text().splitlines()
        texts.append(json.loads(lines[0])["response"])
    assert firsts[1] < 0.6 * firsts[0]  # the student's own half of the mean
    assert texts[0] != texts[1]


@dataclass(frozen=True)
class Multiplier:
    """A Lagrange multiplier: grows while a statistic is above its target, and shrinks below it."""

    start: float
    rate: float
    target: float
    statistic: str
    most: float

    def at(
        self, step: int, stats: Mapping[str, Any], state: float | None
    ) -> tuple[float, float | None]:
        value = self.start if state is None else state
        if self.statistic in stats:
            value += self.rate * (stats[self.statistic].mean - self.target)
        value = min(max(value, 0.0), self.most)
        return value, value

    def reachable(self) -> tuple[float, float]:
        return 0.0, self.most


def test_a_schedule_of_a_users_own_follows_what_is_measured(tmp_path: Path) -> None:
    statistic = "student/entropy"
    multiplier: Any = Multiplier(0.5, 0.1, 3.0, statistic, 5.0)
    method = Method(
        Objective(
            Dense(divergence=divergence.reverse_kl),
            Dense(divergence=divergence.forward_kl, coef=multiplier, name="drift"),
        )
    )
    settings = {**SHORT, "train.steps": 4, "output": str(tmp_path), "name": "made"}
    reports = opd.train(
        "builtin:sort-student", "builtin:sort-teacher", "task:sort", method, **settings
    )
    metrics = [report.metrics for report in reports if report.metrics]
    saved = (tmp_path / "made/checkpoints/step-4").glob("*.json")
    states = [json.loads(file.read_text()) for file in saved]
    (kept,) = [state["progress"]["schedule"] for state in states if "progress" in state]
    expected = 0.5 + sum(0.1 * (m[statistic].mean - 3.0) for m in metrics[:-1])
    assert next(value for name, value in kept.items() if "drift" in name) == pytest.approx(expected)


def test_two_students_teach_each_other() -> None:
    loaded = [builtin("student", seed=seed) for seed in (0, 1)]
    students = [Student(one) for one in loaded]
    teachers = [LocalTeacher(one, vocab_size=one.vocab_size) for one in loaded]
    optimizers = [torch.optim.AdamW(one.trainable().values(), lr=3e-3) for one in students]
    objective = Objective(Dense(divergence=divergence.reverse_kl))
    batch = pack_rollout(sampled(loaded[0]), pad_id=loaded[0].pad_id)
    seen = []
    for _ in range(12):
        losses = []
        for me, other in ((0, 1), (1, 0)):
            reply = teachers[other].score(TeacherRequest(batch))
            loss = students[me](with_token(batch, views={"teacher": reply}), objective).loss
            loss.backward()
            losses.append(float(loss.detach()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(sum(losses))
    assert seen[-1] < 0.7 * seen[0]


class QuantisedLinear(nn.Linear):
    """A linear layer that computes with weights of 4 bits, and learns as if it did not."""

    def forward(self, input: Tensor) -> Tensor:
        step = self.weight.detach().abs().amax() / 7
        rounded = (self.weight / step).round() * step
        return functional.linear(input, self.weight + (rounded - self.weight).detach(), self.bias)


def test_a_student_with_layers_of_a_users_own_trains_and_is_saved(tmp_path: Path) -> None:
    loaded = load_model("builtin:sort-student")
    for module in backbone(loaded.model).modules():
        if type(module) is nn.Linear:
            module.__class__ = QuantisedLinear
    assert Student(loaded).path == LocalSampler(loaded).path == "generic"
    settings = {**SHORT, "train.steps": 2, "output": str(tmp_path), "name": "made"}
    *_, last = opd.train(loaded, "builtin:sort-teacher", "task:sort", **settings)
    saved: Any = AutoModelForCausalLM.from_pretrained(last.folder / "model")
    trained: Any = loaded.model
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(saved.state_dict()[name], trained.state_dict()[name])


def test_a_decoder_with_a_hook_is_trained_and_sampled_as_it_is() -> None:
    loaded = builtin("student")
    model: Any = loaded.model
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: 3 * output)
    prompts = stream(loaded).take(4, with_responses=False)
    rollout = LocalSampler(loaded, fast=False).sample(
        prompts, SamplerSettings(max_new_tokens=8), generator=torch.Generator().manual_seed(0)
    )
    batch, logp = pack_rollout(rollout, pad_id=loaded.pad_id), FieldKey("student_logp")
    found = Student(loaded)(batch, wanted=frozenset({logp})).fields[logp]
    torch.testing.assert_close(found, pack_rows(rollout.sampler_logp, rollout.mask))


def test_one_token_of_room_gives_one_sequence_at_a_time() -> None:
    batch = pack_rollout(sampled(builtin("student")), pad_id=0)
    assert [len(part.batch.lengths) for part in split(batch, max_tokens=1)] == [1] * 6

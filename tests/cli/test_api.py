"""The same from Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import opd
from opd.errors import ConfigError, DataError, TeacherError
from opd.formula import divergence
from opd.methods import vopd
from opd.models import LoadedModel, LoraSettings, load_model
from opd.objective import Dense, Method, Objective
from opd.teacher.local import LocalTeacher
from opd.types import Prompt, TeacherRequest, TeacherScores, TeacherView
from tests.cli.conftest import SETTINGS

PROMPTS: list[Any] = ["S4312:", {"prompt": "S2019:"}, "S7777:", "S8123:", "S1221:"]
SHORT: Mapping[str, Any] = {
    "train": {"steps": 1, "prompts_per_step": 2, "learning_rate": 1e-3},
    "data": {"held_out": 1},
    "sampler.max_new_tokens": 8,
}


@pytest.fixture
def student() -> LoadedModel:
    return load_model("builtin:sort-student")


@pytest.fixture
def teacher() -> LoadedModel:
    return load_model("builtin:sort-teacher")


def test_importing_opd_imports_nothing_heavy() -> None:
    code = (
        "import sys, opd; opd.load(); print({'torch', 'transformers'} & sys.modules.keys());"
        "opd.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()"
    assert "module 'opd' has no attribute 'nothing'" in done.stderr


def test_every_public_name_is_there() -> None:
    for name in opd.__all__:
        assert getattr(opd, name).__name__ == name


def test_a_run_is_loaded_checked_explained_and_trained(tmp_path: Path) -> None:
    words = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    run = opd.load(None, [*words, "--warmup.steps", "0", "--output", str(tmp_path)])
    assert {finding.level for finding in opd.check(run)} <= {"note"}
    assert "The nine variables" in str(opd.explain(run))
    reports = list(opd.train(run))
    assert [report.step for report in reports] == [0, 1, 2, 2]
    assert reports[-1].summary is not None
    assert reports[-1].folder == tmp_path / "sort-1"


def test_a_model_in_hand_is_trained_in_place(
    student: LoadedModel, teacher: LoadedModel, tmp_path: Path
) -> None:
    model: Any = student.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    reports = list(
        opd.train(
            student.model,
            teacher.model,
            PROMPTS,
            method="vopd",
            tokenizer=student.tokenizer,
            verifier=lambda prompt, response, *, finished: len(response) > 0,
            output=str(tmp_path),
            **SHORT,
        )
    )
    summary = reports[-1].summary
    assert summary is not None
    assert summary["method"] == "vopd"
    assert summary["final_accuracy"]["value"] in (0.0, 1.0)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(frozen[n], v) for n, v in teacher.model.state_dict().items())


def test_methods_teachers_and_chats_may_be_objects(
    student: LoadedModel, teacher: LoadedModel, tmp_path: Path
) -> None:
    scorer = LocalTeacher(teacher, vocab_size=teacher.vocab_size)
    half = Method(Objective(Dense(divergence=divergence.reverse_kl, coef=0.5)))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    student.tokenizer.chat_template = template
    chats = [[{"role": "user", "content": text}] for text in ("S12:", "S13:", "S21:")]
    reports = list(opd.train(student, scorer, chats, half, output=str(tmp_path), **SHORT))
    last = reports[-1].summary
    assert last is not None
    assert last["composition_hash"] == half.composition_hash
    assert last["teacher_accuracy"] is None  # an object that only scores cannot write
    again = opd.load(reports[-1].folder)
    assert opd.explain(again).composition_hash == half.composition_hash


def test_a_method_object_of_the_library_is_recorded_by_its_name(
    student: LoadedModel, tmp_path: Path
) -> None:
    reports = opd.train(
        student, "builtin:sort-teacher", PROMPTS, vopd(), output=str(tmp_path), **SHORT
    )
    *_, last = reports
    assert opd.load(last.folder).config.method.name == "vopd"


@pytest.mark.parametrize(
    ("arguments", "settings", "part"),
    [
        (("builtin:sort-student", "builtin:sort-teacher"), {}, "needs prompts"),
        ((torch.nn.Linear(2, 2), None, PROMPTS), {}, "give its tokenizer"),
        (("builtin:sort-student", None, PROMPTS), {}, "needs a teacher"),
        (("builtin:sort-student", None, PROMPTS), {"train": {"stesp": 3}}, "'steps'"),
        (("builtin:sort-student", None, PROMPTS), {"trian": {"steps": 3}}, "'train'"),
        (("builtin:sort-student", None, PROMPTS), {"student": {"model": "x"}}, "give it once"),
        (("builtin:sort-student", None, PROMPTS, "vpod"), {}, "'vopd'"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(
    arguments: tuple[Any, ...], settings: dict[str, Any], part: str
) -> None:
    train: Any = opd.train
    with pytest.raises(ConfigError, match=part):
        train(*arguments, **settings)


def test_a_run_takes_no_further_settings() -> None:
    train: Any = opd.train
    with pytest.raises(ConfigError, match=r"opd\.load"):
        train(opd.load(), train={"steps": 3})


def test_measure_gives_named_sets(finished: Path) -> None:
    (found,) = opd.measure(finished, sets={"mine": "task:sort"}, samples=2, limit=3)
    assert (found.name, found.verified, found.evaluation.accuracy.n) == ("mine", True, 3)
    assert [k for k, _ in found.evaluation.pass_at_k] == [1]


def test_a_verifier_of_the_users_sees_prompt_response_and_whether_it_ended(
    student: LoadedModel, teacher: LoadedModel, tmp_path: Path
) -> None:
    seen: list[tuple[str, str, bool]] = []

    def judge(prompt: Prompt, response: str, *, finished: bool) -> float:
        seen.append((prompt.text, response, finished))
        return 0.5

    *_, last = opd.train(student, teacher, PROMPTS, verifier=judge, output=str(tmp_path), **SHORT)
    assert last.summary is not None
    assert {text for text, _, _ in seen} <= {"S4312:", "S2019:", "S7777:", "S8123:", "S1221:"}
    assert last.summary["final_accuracy"]["value"] == 0.5


def quiet_settings(folder: Path, name: str) -> dict[str, Any]:
    return {**SHORT, "output": str(folder), "name": name, "device": "cpu"}


def test_the_reference_of_an_adapter_in_hand_is_the_student_with_it(tmp_path: Path) -> None:
    """The adapter has been trained before: switching it off would not give the student back."""
    student = load_model("builtin:sort-student", lora=LoraSettings(r=2))
    with torch.no_grad():
        for name, weight in student.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.5)
    term = Dense(divergence=divergence.reverse_kl, against="reference")
    method = Method(Objective(term), views=(TeacherView("reference", "initial_student"),))
    reports = list(
        opd.train(student, None, PROMPTS, method=method, **quiet_settings(tmp_path, "lora"))
    )
    assert abs(reports[1].metrics["loss/dense"].mean) < 1e-6


def test_a_student_without_a_weight_to_train_is_refused(
    teacher: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no weight that can be trained: all are frozen"):
        list(opd.train(teacher, teacher, PROMPTS, **quiet_settings(tmp_path, "frozen")))


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda: 5.0, "returned 5.0 for prompt"), (lambda: 1 / 0, "ZeroDivisionError")],
)
def test_a_verifier_in_hand_that_gives_no_score_is_named(
    answer: Any, message: str, student: LoadedModel, teacher: LoadedModel, tmp_path: Path
) -> None:
    def judge(prompt: Prompt, response: str, *, finished: bool) -> float:
        return float(answer())

    with pytest.raises(DataError, match=f"verifier .*judge .*{message}"):
        list(
            opd.train(
                student, teacher, PROMPTS, verifier=judge, **quiet_settings(tmp_path, "judged")
            )
        )


def test_a_run_takes_no_further_arguments() -> None:
    for further in ({"method": "vopd"}, {"verifier": "none"}, {"tokenizer": object()}):
        with pytest.raises(ConfigError, match="takes its settings from the run"):
            opd.train(opd.load(), **further)  # type: ignore[call-overload]


class Answering:
    """A teacher with a fixed way of answering."""

    def __init__(self, scores: Any) -> None:
        self._scores = scores

    def can(self, need: object) -> bool:
        return True

    def score(self, request: TeacherRequest) -> TeacherScores:
        reply: TeacherScores = self._scores(request.batch.row_index.shape[0])
        return reply


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda n: TeacherScores(hidden=torch.zeros(n, 4)), "without the unembedding"),
        (lambda n: TeacherScores(log_probs=torch.zeros(n - 1, 53)), r"rows, but was asked for \d+"),
        (lambda n: TeacherScores(log_probs=torch.zeros(n, 60)), "60 tokens, but 53 are compared"),
    ],
)
def test_a_reply_that_cannot_be_read_is_an_error_of_the_teacher(
    scores: Any, message: str, student: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=message):
        list(
            opd.train(student, Answering(scores), PROMPTS, **quiet_settings(tmp_path, "answering"))
        )


def halved(extra_level: Any) -> Any:
    return 0.5 * extra_level


def test_a_column_of_the_data_reaches_a_formula(student: LoadedModel, tmp_path: Path) -> None:
    def losses(name: str, *weights: Any, **column: Any) -> float:
        records = [{"prompt": prompt, **column} for prompt in ("S43:", "S20:", "S77:", "S81:")]
        term = Dense(divergence=divergence.reverse_kl, weights=weights)
        reports = list(
            opd.train(
                load_model("builtin:sort-student"),
                load_model("builtin:sort-teacher"),
                records,
                method=Method(Objective(term)),
                **quiet_settings(tmp_path, name),
            )
        )
        return reports[1].metrics["loss/dense"].mean

    assert losses("weighted", halved, level=0.5) == pytest.approx(0.25 * losses("plain"))
    with pytest.raises(DataError, match=r"extra_level, so the column 'level' must hold a number"):
        losses("missing", halved, levle=0.5)

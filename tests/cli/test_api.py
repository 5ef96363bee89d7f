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
from opd.errors import ConfigError
from opd.formula import divergence
from opd.methods import vopd
from opd.models import LoadedModel, load_model
from opd.objective import Dense, Method, Objective
from opd.teacher.local import LocalTeacher
from opd.types import Prompt
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

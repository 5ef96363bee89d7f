"""When the fold is taken, and that its kernels do what the portable path does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.formula import credit, divergence, reward, routing, support, weight
from opd.head import fold
from opd.objective import Dense, Objective, Routed, Sampled, Term
from opd.types import FieldKey, TeacherScores, Unembedding

MODEL = TeacherScores(hidden=torch.zeros(2, 4), unembedding=Unembedding(torch.zeros(7, 4), 7))
VIEWS = {"teacher": MODEL}
REVERSE_KL = Dense(divergence.reverse_kl)
LOG_RATIO = Sampled(reward=reward.teacher_log_ratio)
TOP = {"support": partial(support.student_top_k, k=2), "tail": "bucket"}


def jsd(teacher_weight: float) -> Dense:
    return Dense(partial(divergence.generalized_jsd, teacher_weight=teacher_weight))


@pytest.fixture
def forget() -> Any:
    """Whether Triton is there is asked once; here it is asked anew."""
    fold.is_available.cache_clear()
    yield
    fold.is_available.cache_clear()


def why_not_interpreted() -> str:
    """Why Triton's interpreter cannot be used here; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    triton, numpy = (_release(name) for name in ("triton", "numpy"))
    if triton < (3, 9) and numpy >= (2, 4):
        return "this Triton's interpreter does not run with NumPy 2.4"
    return ""


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())
def test_the_kernels_pass_their_tests_in_tritons_interpreter() -> None:
    file = Path(__file__).with_name("fold_interpreted.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OPD_SHAPES": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([REVERSE_KL], 0.0),
        ([Dense(divergence.forward_kl), jsd(0.3)], 0.3),
        ([LOG_RATIO], 0.0),
        ([replace(LOG_RATIO, baseline=credit.expected_reward)], 0.0),
        ([replace(LOG_RATIO, credit=credit.return_to_go)], 0.0),
        ([replace(REVERSE_KL, weights=(partial(weight.student_entropy_above, nats=1.0),))], 0.0),
        ([jsd(0.3), jsd(0.4)], None),
        ([Dense(divergence.total_variation)], None),
        ([replace(REVERSE_KL, **TOP)], None),
        ([replace(REVERSE_KL, smoothing=0.1)], None),
        ([replace(REVERSE_KL, against="reference")], None),
        ([replace(LOG_RATIO, weights=(partial(weight.top_k_overlap, k=2),))], None),
        ([Routed(LOG_RATIO, routing.endorsed_and_reachable)], None),
    ],
)
def test_a_fold_serves_what_it_knows_and_nothing_else(
    terms: list[Term], expected: float | None
) -> None:
    assert fold.fold_weight(Objective(*terms), (), VIEWS, 7) == expected


@pytest.mark.parametrize(
    "reply",
    [
        TeacherScores(log_probs=torch.zeros(2, 7)),
        TeacherScores(sampled_logp=torch.zeros(2)),
        replace(MODEL, row_index=torch.tensor([0, -1])),
        replace(MODEL, id_map=torch.arange(7)),
        replace(MODEL, unembedding=Unembedding(torch.zeros(6, 4), 6)),
    ],
)
def test_a_view_that_is_no_model_of_the_same_vocabulary_is_not_folded(reply: TeacherScores) -> None:
    assert fold.fold_weight(Objective(REVERSE_KL), (), {"teacher": reply}, 7) is None


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (FieldKey("forward_kl", "teacher"), 0.0),
        (FieldKey("forward_kl", "teacher", smoothing=0.1), None),
        (FieldKey("total_variation", "teacher"), None),
        (FieldKey("top1_agreement", "teacher"), None),
    ],
)
def test_what_is_wanted_beside_the_loss_must_be_known_too(
    key: FieldKey, expected: float | None
) -> None:
    assert fold.fold_weight(Objective(REVERSE_KL), (key,), VIEWS, 7) == expected


def test_a_cpu_takes_the_portable_path_and_says_nothing(forget: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fold.serves(torch.zeros(1), torch.zeros(1))


def test_without_triton_cuda_takes_the_portable_path_and_says_so_once(
    forget: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # stands for a CUDA device
    with pytest.warns(fold.TritonMissing, match="pip install triton"):
        assert not fold.serves(torch.zeros(1), torch.zeros(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fold.serves(torch.zeros(1), torch.zeros(1))

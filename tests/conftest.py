"""Shapes and types are checked while tests run; everything runs on one thread."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  (the hook looks it up by name)

if os.environ.get("OPD_SHAPES", "1") == "1":
    install_import_hook("opd", "tests.shapes.check")

import hypothesis
import pytest
import torch

# A busy machine is no failure, and every run draws the same examples.
hypothesis.settings.register_profile("opd", deadline=None, derandomize=True)
hypothesis.settings.load_profile("opd")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)

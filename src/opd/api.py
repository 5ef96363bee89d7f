"""Training from Python: a run, or a model and a teacher in hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import ConfigError
from opd.models import LoadedModel, LoraSettings, add_adapter, load_model, resolve_device, wrap_model
from opd.objective import Method
from opd.training.config import Run, RunConfig, from_tree
from opd.training.loop import StepReport, train_run
from opd.training.session import open_session
from opd.types import Teacher, Verifier

IN_HAND = "<in hand>"

Model = PreTrainedModel | LoadedModel | str | Path
Prompts = Sequence[str | Mapping[str, Any] | Sequence[Mapping[str, Any]]]

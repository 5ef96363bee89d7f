"""Measuring a run or a model on named sets of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.data.prompts import PromptSet
from opd.errors import ConfigError
from opd.models import BUILTIN, LoadedModel, load_model, resolve_device
from opd.rollout.local import LocalSampler
from opd.training.config import Run, from_tree, load, overridden, parse_overrides
from opd.training.evaluate import Evaluation, evaluate
from opd.training.folder import RunFolder
from opd.training.session import (
    find_verifier,
    load_run_prompts,
    load_set,
    sampler_settings,
)
from opd.training.students import end_student
from opd.types import Verifier

DEFAULT_KS = (1, 4, 8)


@dataclass(frozen=True)
class Measured:
    """One model on one set of prompts.

    Attributes:
        name: of the set.
        source: where its prompts come from.
        weights: what was measured.
        verified: whether there is a verifier; without one only lengths mean something.
    """

    name: str
    source: str
    weights: str
    verified: bool
    evaluation: Evaluation


def measure(
    target: str | Path,
    *,
    sets: Mapping[str, str] | None = None,
    samples: int = 8,
    ks: Sequence[int] | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
) -> list[Measured]:
    """Greedy accuracy, mean of `samples` at temperature 1 and pass@k, with 95 % intervals.

    Args:
        target: a run folder, a model folder or a hub id.
        sets: sources of prompts by name, as in `data.prompts`; of a task its test prompts.
            Without them a run folder is measured on its test prompts and `evaluate.sets`.
        samples: responses per prompt at temperature 1.
        ks: for pass@k; 1, 4 and 8 as far as `samples` goes if not given.
        limit: at most that many prompts per set.
        overrides: `--section.key`, value, ... as on the command line.

    Raises:
        ConfigError: no such target or set, a k above `samples`, a model without any set.
    """
    ks = _checked_ks(ks, samples)
    folder = RunFolder(Path(target))
    is_run = folder.config.exists()
    run = load(folder.path, overrides) if is_run else _run_for_model(str(target), sets, overrides)
    if limit:
        shorter = dataclasses.replace(
            run.config.evaluate, test_prompts=min(limit, run.config.evaluate.test_prompts)
        )
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, evaluate=shorter))
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    loaded, weights = end_student(run, folder) if is_run else (_model(run), str(target))
    found = []
    for name, prompts, verifier in _sets(run, loaded, sets):
        prompts = dataclasses.replace(prompts, prompts=prompts.prompts[:limit])
        evaluation = evaluate(
            LocalSampler(loaded),
            prompts.prompts,
            verifier=verifier,
            tokenizer=loaded.tokenizer,
            settings=sampler_settings(run.config),
            seed=run.config.seed,
            samples=samples,
            ks=ks,
            max_sequences=run.config.sampler.max_sequences,
        )
        found.append(Measured(name, prompts.source, weights, verifier is not None, evaluation))
    return found


def _checked_ks(ks: Sequence[int] | None, samples: int) -> tuple[int, ...]:
    if ks is None:
        return tuple(k for k in DEFAULT_KS if k <= samples)
    for k in ks:
        if not 1 <= k <= samples:
            raise ConfigError(f"pass@{k} needs 1 <= k <= samples, and samples is {samples}")
    return tuple(ks)


def _run_for_model(target: str, sets: Mapping[str, str] | None, overrides: Sequence[str]) -> Run:
    folder = Path(target)
    files = ("config.json", "adapter_config.json")
    if folder.is_dir() and not any((folder / file).exists() for file in files):
        raise ConfigError(
            f"{target} is neither a run folder (no config.toml) nor a model folder (no config.json)"
        )
    if not sets:
        raise ConfigError(
            f"{target} is a model: say what to measure it on with --set NAME=SOURCE, for instance "
            "--set sort=task:sort or --set math=problems.jsonl"
        )
    tree: dict[str, Any] = {
        "student": {"model": target},
        "data": {"prompts": next(iter(sets.values()))},
    }
    tree = overridden(tree, parse_overrides(overrides), source="command line")
    return Run(from_tree(tree, source=target), Path.cwd(), target)


def _model(run: Run) -> LoadedModel:
    config = run.config.student
    reference = config.model if config.model.startswith(BUILTIN) else run.path(config.model)
    return load_model(
        reference,
        dtype=config.dtype,
        device=str(resolve_device(run.config.device)),
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        revision=config.revision or None,
        seed=run.config.seed,
    )


def _sets(
    run: Run, loaded: LoadedModel, sets: Mapping[str, str] | None
) -> list[tuple[str, PromptSet, Verifier | None]]:
    if sets:
        here = dataclasses.replace(run, base=Path.cwd())
        chosen = {name: load_set(here, source, loaded) for name, source in sets.items()}
        return [(name, found, find_verifier(run, found)) for name, found in chosen.items()]
    train, _, test = load_run_prompts(run, loaded, None, ())
    verifier = find_verifier(run, train)
    further = {
        name: load_set(run, source, loaded) for name, source in run.config.evaluate.sets.items()
    }
    return [(name, found, verifier) for name, found in {"test": test, **further}.items()]

"""Whether a run folder can be continued, and from where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opd.errors import ConfigError
from opd.training.checkpoint import Checkpoint, find_checkpoints
from opd.training.config import Run, from_tree, load, to_json
from opd.training.folder import RunFolder

FINISHED = "finished"
MAY_DIFFER = ("output", "name", "monitor")
"""Of what a run says and watches; nothing that it learns from, unless an alarm acts."""
WHERE_A_TEACHER_IS = ("url", "key_env", "client")
"""Of a served teacher's table: what decides nothing that it says."""


def last_checkpoint(folder: RunFolder, run: Run) -> Checkpoint | None:
    """The checkpoint to continue from; None: the run was stopped before its first.

    Raises:
        ConfigError: no run folder, a run with another config, or one that is finished.
    """
    if not folder.config.exists():
        raise ConfigError(
            f"{folder.path} is no run folder: it has no config.toml; resume one of `opd list runs`"
        )
    found = find_checkpoints(folder)
    wrote = found[-1].state["config"] if found else to_json(load(folder.path).config)
    # a key that a later version brought counts as its default
    complete = to_json(from_tree(json.loads(wrote), source=str(folder.path)))
    _check_config(folder, json.loads(complete), json.loads(to_json(run.config)))
    if folder.read_summary().get("exit_reason") == FINISHED:
        raise ConfigError(
            f"the run {folder.path} is finished: there is nothing to resume. Its model is in "
            f"{folder.model}, which a new run can start from as student.model"
        )
    return found[-1] if found else None


def check_revisions(
    folder: RunFolder, checkpoint: Checkpoint, revisions: Mapping[str, str]
) -> None:
    """Refuse served teachers that have other weights than when the checkpoint was written.

    Args:
        revisions: of the teachers, by view, as their servers say.

    Raises:
        ConfigError: names the teacher.
    """
    before = checkpoint.state.get("teachers", {})
    for view, revision in revisions.items():
        if before.get(view, revision) != revision:
            raise ConfigError(
                f"{folder.path} was begun with the weights {before[view]} behind the view "
                f"{view!r}, and its server now has {revision}; serve the same weights, or start a "
                "new run"
            )


def _check_config(folder: RunFolder, wrote: dict[str, Any], now: dict[str, Any]) -> None:
    for config in (wrote, now):
        for key in MAY_DIFFER:
            del config[key]
        for table in (config["teacher"], *config["teachers"].values()):
            del table["cache"]  # where answers are kept decides nothing that they say
            if table["url"]:
                table.update(dict.fromkeys(WHERE_A_TEACHER_IS, "elsewhere"))
    different = first_difference(wrote, now)
    if not different:
        return
    reason = ""
    if different.startswith(("train.steps ", "warmup.steps ")):
        reason = " (the decay of the learning rate depends on the number of steps)"
    raise ConfigError(
        f"{folder.path} was begun with another config: {different}{reason}; resume with the "
        "settings of the run folder, or start a new run"
    )


def first_difference(one: Any, other: Any, path: str = "") -> str:
    """The first key whose values differ, with both; empty where there is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in (*one, *(key for key in other if key not in one)):
            below = f"{path}.{key}" if path else key
            found = first_difference(one.get(key), other.get(key), below)
            if found:
                return found
        return ""
    return "" if one == other else f"{path} was {one!r}, now {other!r}"

"""TensorBoard, Weights & Biases and trackio, besides the run folder's own records; extras."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from opd.errors import ConfigError

PROJECT = "opd"


@runtime_checkable
class Tracker(Protocol):
    """Receives the averages of every step."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers(AbstractContextManager["Trackers"]):
    """All trackers a run file asks for, as one.

    Args:
        names: of `log.trackers`.
        folder: the run folder; TensorBoard's and W&B's files go into it.
        config: of the run, shown beside its curves.

    Raises:
        ConfigError: a tracker that does not start: nobody is logged in, say.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._open = [_opened(name, folder, config) for name in names]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write named averages at a step counted over all phases."""
        for tracker in self._open:
            tracker.log(values, step)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for tracker in self._open:
            tracker.close()


def _opened(name: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    try:
        return _TRACKERS[name](folder, config)
    except Exception as error:  # trackers are foreign code and may raise anything
        raise ConfigError(
            f"log.trackers names {name!r}, which does not start: {type(error).__name__}: {error}; "
            "mend that, or leave it out"
        ) from error


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        module: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A resumed run continues under its own id."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        name = folder.resolve().name
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            id=name,
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._trackio.init(
            project=PROJECT, name=folder.resolve().name, config=dict(config), resume="allow"
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


_TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed, without importing any.

    Raises:
        ConfigError: names the extra that brings it.
    """
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.trackers names {name!r}, which is not installed: "
                f'pip install "opd[{name}]", or leave it out'
            )

"""Writers besides the run folder's own: TensorBoard, Weights & Biases, trackio. Each is an extra."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from opd.errors import ConfigError

PROJECT = "opd"


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
        ConfigError: a tracker whose extra is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._open = [_TRACKERS[name](folder, config) for name in names]

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


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        _import("tensorboard", extra="tensorboard")
        writer: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = writer.SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A resumed run continues under its own id."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        wandb = _import("wandb", extra="wandb")
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
        self._trackio = _import("trackio", extra="trackio")
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


def _import(module: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f'log.trackers names {extra!r}, which is not installed: pip install "opd[{extra}]", '
            "or leave it out"
        ) from None

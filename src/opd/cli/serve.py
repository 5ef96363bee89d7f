"""`opd serve`: a model as a teacher for runs elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
from argparse import Namespace
from types import FrameType
from typing import TYPE_CHECKING

from opd.cli.output import console
from opd.errors import ConfigError

if TYPE_CHECKING:
    from opd.teacher.server import Listening

PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def main(arguments: Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; then finish what has begun."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"opd serve needs the package {package}; pip install 'opd[serve]'")
    import torch

    from opd.models import load_model, resolve_device, scoring_dtype
    from opd.teacher.server import Listening, ScoringServer, ServeSettings, listen_at

    settings = ServeSettings(
        host=arguments.host,
        port=arguments.port,
        key=_key(arguments.key_env),
        max_tokens=arguments.max_tokens,
        receive_s=arguments.receive_s,
        drain_s=arguments.drain_s,
    )
    listen_at(settings).close()  # whether it can be, before a model loads for minutes
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    loaded = load_model(
        arguments.model,
        dtype=scoring_dtype(arguments.dtype, device),
        device=str(device),
        revision=arguments.revision or None,
        trust_remote_code=arguments.trust_remote_code,
    )
    loaded.model.requires_grad_(False).eval()
    server = ScoringServer(loaded, settings, name=arguments.name)
    stopped = _stop_signals()
    found = Listening(server)
    try:
        _announce(found, arguments)
        stopped.wait()
    finally:
        print("finishing what has begun", file=sys.stderr)
        found.stop()
    return 0


def _key(variable: str) -> str:
    key = os.environ.get(variable, "")
    if variable and not key:
        raise ConfigError(
            f"--key-env {variable}: that environment variable is not set; set it to the key that "
            "clients must show"
        )
    return key


def _stop_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set; a second one ends the process at once."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped


def _announce(found: Listening, arguments: Namespace) -> None:
    told = found.server.identity
    if arguments.json:
        print(json.dumps({"url": found.url, "model": told.model, "revision": told.revision}))
    else:
        console().print(
            f"{told.model} ({told.vocab_size} tokens, {told.dtype}, revision {told.revision}) "
            f"scores at {found.url}\n"
            f"  opd run ... --teacher.url {found.url}\n"
            f"  opd check ... --teacher.url {found.url} --live\n"
            "Ctrl-C finishes what has begun and stops.",
            soft_wrap=True,
        )
    sys.stdout.flush()

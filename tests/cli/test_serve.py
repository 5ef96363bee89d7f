"""`opd serve`: a process of its own, asked, stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from opd.cli.main import COMMANDS, main
from opd.models import load_model
from opd.teacher.identity import identity
from tests.teacher.queries import query
from tests.teacher.served import QUICK, endpoint


@contextmanager
def process(
    *words: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server, and what it said when it was ready."""
    command = [sys.executable, "-m", "opd", "serve", *words, "--port", "0", "--json"]
    running = subprocess.Popen(
        [*command, "--threads", "1", "--drain-s", "10"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert running.stdout is not None
        yield running, json.loads(running.stdout.readline())
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_serves_until_it_is_told_to_stop(number: signal.Signals) -> None:
    words = ["builtin:sort-student", "--name", "mine", "--key-env", "OPD_TEST_KEY"]
    with process(*words, OPD_TEST_KEY="secret") as (running, said):
        assert said["model"] == "mine"
        assert httpx.get(said["url"] + "/info").status_code == 401
        with endpoint(said["url"], replace(QUICK, timeout_s=20, key="secret")) as client:
            own = identity(load_model("builtin:sort-student", dtype="float32"))
            assert client.describe().vocabulary == own.vocabulary
            assert client.describe().dtype == "float32"
            assert len(client.score(query(vocab_size=53))) == 3
        running.send_signal(number)
        _, errors = running.communicate(timeout=30)
        assert running.returncode == 0, errors
        assert "finishing what has begun" in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["builtin:sort-student", "--host", "0.0.0.0"], "--host 0.0.0.0 is open to others"),
        (["builtin:sort-student", "--key-env", "OPD_NOT_SET"], "OPD_NOT_SET: that environment"),
        (["no/such/model"], "no/such/model"),
        (["builtin:sort-student", "--port", "-1"], "must be a whole number >= 0"),
        (["builtin:sort-student", "--port", "99999"], "--port 99999: ports go from 1 to 65535"),
        ([], "MODEL"),
    ],
)
def test_mistakes_are_told_before_anything_listens(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "uvicorn" else find(name, *a)
    )
    assert main(["serve", "builtin:sort-student"]) == 2
    assert "needs the package uvicorn; pip install 'opd[serve]'" in capsys.readouterr().err


def test_the_port_is_8765_and_the_address_loopback_unless_told() -> None:
    arguments = COMMANDS["serve"].parser("serve").read(["builtin:sort-student"])
    assert (arguments.host, arguments.port) == ("127.0.0.1", 8765)


def test_check_live_asks_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with process("builtin:sort-teacher") as (_, said):
        words = ["check", "--live", "--json", "--teacher.url", said["url"]]
        assert main([*words, "--teacher.local_copy", "builtin:sort-teacher"]) == 0
        found = json.loads(capsys.readouterr().out)
        told = [one["message"] for one in found if one["where"] == "teacher.url"]
        assert told[0] == "it agrees with the local copy to 0 nats"
        assert "tokens/s" in told[1]
        assert main([*words, "--teacher.local_copy", "builtin:add-teacher"]) == 2
        found = json.loads(capsys.readouterr().out)
        assert "differs from the local copy by up to" in found[0]["message"]
    assert main([*words, "--teacher.client.retry_s", "0.1"]) == 2
    assert "ConnectError" in capsys.readouterr().out


def test_a_port_that_is_taken_is_told_before_the_model_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "no/such/model", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"--port {port} is taken; stop what listens there, or take another" in said
    assert "Traceback" not in said


def test_a_key_that_no_client_could_show_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPD_TEST_KEY", "two words")
    assert main(["serve", "builtin:sort-student", "--key-env", "OPD_TEST_KEY"]) == 2
    assert "the server's key has ' ' as character 4 of 9" in capsys.readouterr().err

"""`opd sample`: start, end and teacher on the same prompts, and an honest word on each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opd.cli.main import main


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["sample", *words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def recorded(finished: Path) -> list[dict[str, Any]]:
    """Test rows of the run's own samples.jsonl."""
    lines = (finished / "samples.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("split") == "test"]


def test_what_is_written_again_is_what_the_run_recorded(
    finished: Path, recorded: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(capsys, str(finished), "--prompts", "3")
    assert len(found) == 3
    for row, kept in zip(found, recorded, strict=False):
        assert row["prompt"] == kept["prompt"]
        for who in ("start", "end", "teacher"):
            assert row[who]["text"] == kept[who]
            assert row[who]["origin"].startswith("written now, greedily, by ")
        assert row["end"]["score"] == kept["verdict"]
    assert "warmup-1" in found[0]["start"]["origin"]
    assert "builtin:sort-teacher" in found[0]["teacher"]["origin"]


def test_a_start_that_was_not_kept_is_taken_from_the_record_and_says_so(
    finished: Path,
    recorded: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "warmup-1")
    found = rows(capsys, str(copy), "--prompts", "2")
    for row, kept in zip(found, recorded, strict=False):
        assert row["start"]["text"] == kept["start"]
        assert row["start"]["score"] == kept["start_verdict"]
    assert "recorded in samples.jsonl" in found[0]["start"]["origin"]
    (copy / "samples.jsonl").unlink()
    (row,) = rows(capsys, str(copy), "--prompts", "1")
    assert row["start"]["text"] is None
    assert "not available" in row["start"]["origin"]


def test_an_unfinished_run_shows_its_last_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "model")
    (row,) = rows(capsys, str(copy), "--prompts", "1")
    assert row["end"]["origin"].endswith("step-2")
    shutil.rmtree(copy / "checkpoints")
    assert main(["sample", str(copy)]) == 2
    assert "neither a model nor a checkpoint" in capsys.readouterr().err


def test_every_response_is_shown_with_its_mark(
    finished: Path, recorded: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(finished), "--prompts", "8"]) == 0
    shown = capsys.readouterr().out
    right = sum(
        (row[key] or 0) >= 1
        for row in recorded
        for key in ("start_verdict", "verdict", "teacher_verdict")
    )
    assert 0 < right < 24
    assert shown.count("✓") == right
    assert shown.count("✗") == 24 - right
    assert all(row["prompt"] in shown for row in recorded)

"""The main job on the embedded default, shortened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd.cli.main import main


def test_a_short_default_run_learns_and_leaves_a_whole_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            *("run", "--output", str(tmp_path), "--warmup.steps", "20", "--train.steps", "20"),
            *("--evaluate.every", "10", "--evaluate.prompts", "64"),
            *("--evaluate.test_prompts", "64", "--train.save_every", "10"),
            *("--train.prompts_per_step", "16", "--warmup.prompts_per_step", "16"),
        ]
    )

    assert code == 0
    folder = tmp_path / "sort-1"
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("start_accuracy", "final_accuracy", "teacher_accuracy"):
        assert set(summary[key]) == {"value", "low", "high", "n"}
    assert summary["teacher_accuracy"]["value"] > 0.9
    assert {"gain", "seconds", "tokens", "peak_mb", "exit_reason"} <= set(summary)
    for name in ("config.toml", "events.jsonl", "samples.jsonl", "curves.png"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "checkpoints" / "step-20" / "student" / "model.safetensors").exists()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    divergence = [
        total / count
        for event in events
        if event["phase"] == "train"
        for total, count in [event.get("metrics", {}).get("loss/dense", (0, 0))]
        if count
    ]
    assert sum(divergence[-5:]) < sum(divergence[:5])
    printed = capsys.readouterr().out
    assert "teacher" in printed
    assert str(folder.name) in printed


def test_the_default_run_says_it_is_in_the_way_of_itself_only_for_an_explicit_name(
    tmp_path: Path,
) -> None:
    tiny = [
        *("--output", str(tmp_path), "--warmup.steps", "1", "--train.steps", "1"),
        *("--evaluate.prompts", "4", "--evaluate.test_prompts", "4"),
        *("--train.prompts_per_step", "4"),
    ]
    assert main(["run", *tiny]) == 0
    assert main(["run", *tiny]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"sort-1", "sort-2"}
    assert main(["run", *tiny, "--name", "sort-1"]) == 2

"""Two teachers that know one task each, routed right and wrong, from the recipes as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "several_teachers"


def told(recipe: str, output: Path) -> tuple[dict[str, Any], str]:
    """Every route of a run by its task, and what the run printed."""
    command = [sys.executable, "-m", "opd", "run", str(RECIPES / f"{recipe}.toml")]
    command += ["--output", str(output), "--name", recipe]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    summary = json.loads((output / recipe / "summary.json").read_text(encoding="utf-8"))
    routes = {row["task"]: row for row in summary["teachers"]["routes"]}
    return {**routes, "conflict": summary["teachers"].get("conflict")}, " ".join(
        done.stdout.split()
    )


@pytest.mark.slow
def test_right_routing_lifts_both_tasks_and_wrong_routing_ruins_one_and_says_so(
    tmp_path: Path,
) -> None:
    right, printed = told("right_routing", tmp_path)
    for task in ("add", "sort"):
        assert right[task]["teacher"] == task
        assert right[task]["start"]["n"] == 500
        assert right[task]["final"]["low"] > right[task]["start"]["high"], task
        assert right[task]["change"] == "rose"
        assert f"the task '{task}'" not in printed
    (pair,) = right["conflict"]
    assert pair["kl"] > 5
    assert pair["cosine"] < 0.2
    wrong, printed = told("wrong_routing", tmp_path)
    assert wrong["add"]["start"] == right["add"]["start"], "the same student begins"
    assert wrong["add"]["final"]["value"] <= 0.01
    assert wrong["add"]["change"] == "fell"
    assert wrong["sort"]["change"] == "rose"
    assert "note: the teacher 'sort' solves 0.000 (0.000–0.008) of the task 'add', and" in printed
    start, final = (wrong["add"][at] for at in ("start", "final"))
    begun = f"{start['value']:.3f} ({start['low']:.3f}–{start['high']:.3f})"
    ended = f"{final['value']:.3f} ({final['low']:.3f}–{final['high']:.3f})"
    assert f"note: the task 'add' fell from {begun} to {ended} while the teacher 'sort'" in printed
    assert "note: the task 'sort' fell" not in printed

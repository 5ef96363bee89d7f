"""Two teachers that know one task each, routed right and wrong: accuracy of either task over seeds.

    python benchmarks/two_teachers.py --result benchmarks/results/two_teachers.json

Runs `recipes/several_teachers/*_routing.toml`. Both runs of a seed begin with the same warm-up of
one student. Finished runs in --output are read, not repeated, so the script can be stopped and
continued.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import parser, write_asked

ARMS = ("right_routing", "wrong_routing")
RECIPES = Path(__file__).parents[1] / "recipes" / "several_teachers"


def run_arm(arm: str, seed: int, output: Path, extra: Sequence[str]) -> list[dict[str, Any]]:
    """One run in a process of its own; a row per task."""
    name = f"{arm}-{seed}"
    summary = output / name / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "opd", "run", str(RECIPES / f"{arm}.toml")]
        command += ["--seed", str(seed), "--output", str(output), "--name", name, *extra]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    told: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    pair = (told["teachers"].get("conflict") or [{}])[0]
    models = told["teachers"]["models"]
    print(f"{name:18} {told['seconds']:.0f} s", flush=True)
    return [
        {
            "case": f"seed {seed}, {row['task']}",
            "system": arm,
            "scored_by": row["teacher"],
            "start": row["start"],
            "end": row["final"],
            "teacher": row["teacher_accuracy"],
            "change": row["change"],
            "share": models[row["teacher"]]["share"],
            "cosine": pair.get("cosine"),
            "kl": pair.get("kl"),
            "kl_back": pair.get("kl_back"),
            "named": any(f"the task {row['task']!r} fell" in note for note in told["notes"]),
            "seconds": told["seconds"],
            "tokens": told["tokens"],
        }
        for row in told["teachers"]["routes"]
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as a Markdown table, one line per seed and task."""
    lines = [
        "| | start | right routing | wrong routing | named as fallen by the wrong run |",
        "|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = {row["system"]: row for row in rows if row["case"] == case}
        cells = [_words(own[ARMS[0]]["start"])]
        cells += [_words(own[arm]["end"]) if arm in own else "" for arm in ARMS]
        named = own[ARMS[1]]["named"] if ARMS[1] in own else False
        lines.append(f"| {case} | {' | '.join(cells)} | {'yes' if named else 'no'} |")
    return "\n".join(lines)


def _words(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} ({score['low']:.3f}–{score['high']:.3f})"


def main() -> None:
    arguments = parser("Two teachers, routed right and wrong.")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--output", type=Path, default=Path("runs/two_teachers"))
    options = arguments.parse_args()
    extra: list[str] = []
    if options.quick:
        options.seeds, options.output = [0], options.output / "quick"
        extra = ["--warmup.steps", "5", "--train.steps", "5", "--evaluate.test_prompts", "64"]
    rows = [
        row
        for seed in options.seeds
        for arm in ARMS
        for row in run_arm(arm, seed, options.output, extra)
    ]
    print("\n" + table(rows))
    write_asked(rows, options)


if __name__ == "__main__":
    main()

"""The embedded default over seeds, beside its two controls: start, end and gain on test prompts.

    python benchmarks/default_run.py --jobs 2 --result benchmarks/results/default_run.json

Every arm of a seed begins with the same warm-up of the same student and sees the same number of
steps, prompts per step and test prompts; learning rates are those of the default for all arms.
Finished runs in --output are read, not repeated, so the script can be stopped and continued.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import parser, write_asked

ARMS = ("reverse_kl_opd", "offpolicy_kd", "sft_on_teacher")


def run_arm(arm: str, seed: int, output: Path, extra: list[str]) -> dict[str, Any]:
    """One run in a process of its own; its summary."""
    name = f"{arm}-{seed}"
    summary = output / name / "summary.json"
    if not finished(summary):
        new = [*("--method.name", arm, "--seed", str(seed)), *extra]
        new += ["--output", str(output), "--name", name]
        resume = ["--resume", str(output / name)]
        begun = (output / name / "config.toml").exists()
        command = [sys.executable, "-m", "opd", "run", *(resume if begun else new)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    row: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    print(
        f"{name:24} start {row['start_accuracy']['value']:.3f}  "
        f"end {row['final_accuracy']['value']:.3f}  {row['seconds']:.0f} s",
        flush=True,
    )
    return {
        "case": f"seed {seed}",
        "system": arm,
        "start": row["start_accuracy"],
        "end": row["final_accuracy"],
        "teacher": row["teacher_accuracy"],
        "gain": row["gain"],
        "seconds": row["seconds"],
        "tokens": row["tokens"],
    }


def finished(summary: Path) -> bool:
    """Whether a run has come to its end."""
    return summary.exists() and json.loads(summary.read_text())["exit_reason"] == "finished"


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, one line per seed and the mean."""
    seeds = sorted({row["case"] for row in rows})
    lines = ["| | start |" + "".join(f" {arm} |" for arm in ARMS), "|---|" + "---|" * 4]
    for seed in seeds:
        own = {row["system"]: row for row in rows if row["case"] == seed}
        ends = "".join(
            f" {own[arm]['end']['value']:.3f} ({own[arm]['gain']:+.3f}) |" if arm in own else " |"
            for arm in ARMS
        )
        lines.append(f"| {seed} | {own[ARMS[0]]['start']['value']:.3f} |{ends}")
    means = []
    for arm in ARMS:
        mine = [row for row in rows if row["system"] == arm]
        mean = statistics.mean(row["end"]["value"] for row in mine) if mine else float("nan")
        gain = statistics.mean(row["gain"] for row in mine) if mine else float("nan")
        means.append(f" **{mean:.3f}** ({gain:+.3f}) |")
    start = statistics.mean(r["start"]["value"] for r in rows if r["system"] == ARMS[0])
    return "\n".join([*lines, f"| mean | {start:.3f} |{''.join(means)}"])


def main() -> None:
    arguments = parser("The embedded default over seeds, beside its controls.")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments.add_argument("--output", type=Path, default=Path("runs/default_run"))
    arguments.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    options = arguments.parse_args()
    extra: list[str] = []
    if options.quick:
        options.seeds = [0]
        options.output = options.output / "quick"
        extra = ["--warmup.steps", "5", "--train.steps", "5", "--evaluate.test_prompts", "64"]
    jobs = [(arm, seed) for seed in options.seeds for arm in ARMS]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda job: run_arm(job[0], job[1], options.output, extra), jobs))
    print("\n" + table(rows))
    write_asked(rows, options)


if __name__ == "__main__":
    main()

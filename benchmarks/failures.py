"""Failures and what mends them: the pairs of `recipes/failures`, run as they are.

    python benchmarks/failures.py --result benchmarks/results/failures.json

Each mechanism of Table 6 of arXiv:2606.22793 has a run that shows it and one in which it is mended,
in as few settings as that takes. Finished runs in --output are read, not repeated, so the script
can be stopped and continued; `--part 1/2` makes every second run, for two cores. Equal runs are
made once.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import add_part, cpu_seconds, in_part, one_thread, parser, write_asked
from opd.diagnose.alarms import History, privilege_leak, raised
from opd.training.config import Run, load
from opd.training.folder import RunFolder
from opd.training.loop import train_run
from opd.types import Stat

RECIPES = Path(__file__).parents[1] / "recipes" / "failures"
READER = Path("../../runs/reader/model")
"""The student of the pairs about privilege, seen from their folder."""
FIXED = "_fixed"


@dataclass(frozen=True)
class Pair:
    """A failure and its remedy.

    Attributes:
        name: of the run file; the remedy's ends in `_fixed`.
        mechanism: as the survey's Table 6 calls it.
        alarm: that names it; empty where none does.
        remedy: what the second run changes.
    """

    name: str
    mechanism: str
    alarm: str
    remedy: str


PAIRS = (
    Pair("flawed_prefix", "Flawed-prefix trap", "misaligned_events", "a warm-up"),
    Pair("long_horizon", "Long-horizon variance", "length_collapse", "immediate credit"),
    Pair("no_target", "Negative feedback without target", "", "a vocabulary route"),
    Pair("truncated_support", "Truncated-support bias", "length_inflation", "a tail bucket"),
    Pair("another_template", "Tokenizer artifact", "foreign_template", "the student's own prompt"),
    Pair("cached_teacher", "Cached-teacher inconsistency", "stale_sampler",
         "rewards taken anew, clipped ratios"),
    Pair("privilege_mismatch", "Privilege mismatch", "golden_regression",
         "a hint that belongs to the prompt"),
    Pair("conflicting_teachers", "Multi-teacher conflict", "conflicting_teachers",
         "the teacher of the task alone"),
    Pair("wrong_outcome", "Signal-outcome mismatch", "misranked_outcome", "the verifier's reward"),
    Pair("rewarded_certainty", "Calibration and certainty drift", "calibration_drift",
         "no reward for certainty"),
    Pair("length_inflation", "Length and repetition drift", "length_inflation",
         "no reward for a token as such"),
)  # fmt: skip


def settled(file: Path, seed: int, extra: Sequence[str]) -> Run:
    """A run file, with the seed."""
    return load(file, ["--seed", str(seed), *extra])


def key(run: Run) -> str:
    """Runs with the same key say the same, whatever they are called."""
    told = asdict(replace(run.config, name="", output=""))
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]


def finished(run: Run, output: Path) -> Path:
    """The folder of the run, made where it is not there."""
    folder = output / key(run)
    if not _is_whole(folder):
        if folder.exists():  # a run that was stopped in the middle of it
            shutil.rmtree(folder)
        config = replace(run.config, output=str(output.resolve()), name=folder.name)
        for _ in train_run(replace(run, config=config)):
            pass
    return folder


def _is_whole(folder: Path) -> bool:
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["exit_reason"] == "finished"


def prepared(seed: int, output: Path, extra: Sequence[str]) -> list[str]:
    """Makes the files and the student of the pairs about privilege; how these find it."""
    if not (RECIPES / "puzzles.jsonl").exists():
        runpy.run_path(str(RECIPES / "hints.py"), run_name="__main__")
    folder = finished(settled(RECIPES / "reader.toml", seed, extra), output)
    return ["--student.model", str((folder / "model").resolve())]


def measured(
    pair: Pair, name: str, seed: int, output: Path, extra: Sequence[str]
) -> dict[str, Any]:
    """One run of a pair, in a row."""
    words = list(extra)
    if pair.name == "privilege_mismatch":
        words += prepared(seed, output, extra)
    started = cpu_seconds()
    folder = finished(settled(RECIPES / f"{name}.toml", seed, words), output)
    told = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    taken = cpu_seconds() - started
    print(f"{name:28} seed {seed}  {taken:.0f} CPU-s", flush=True)
    alarms, copied = replayed(folder)
    reading = told["privilege"]["start"].get("teacher.told", {}).get("reading")
    return {
        "case": f"{pair.name}, seed {seed}",
        "system": "fixed" if name.endswith(FIXED) else "failure",
        "mechanism": pair.mechanism,
        "alarm": pair.alarm,
        "start": told["start_accuracy"],
        "end": told["final_accuracy"],
        "reading": reading,
        "copied": copied if reading else None,
        "alarms": alarms,
    }


def replayed(folder: Path) -> tuple[dict[str, int], float]:
    """The alarms of a run by the thresholds of now, with the first step of each, and the most by
    which copying of a context rose as `privilege_leak` sees it."""
    history, first, copied = History(), dict[str, int](), 0.0
    for event in RunFolder(folder).read_events():
        if event.get("phase") != "train" or "metrics" not in event:
            continue
        known = {name: pair for name, pair in event["metrics"].items() if None not in pair}
        history.add({name: Stat(*pair) for name, pair in known.items()})
        for alarm in raised(history):
            first.setdefault(alarm.name, event["step"])
        copied = max(copied, privilege_leak(history))  # not taken where it is NaN
    return first, copied


# --------------------------------------------------------------------------------------------
# The table


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per pair, as Markdown: the means over the seeds."""
    lines = [
        "| mechanism | pair | before | failure | mended | the alarm that names it | mended by |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        own = [row for row in rows if row["case"].partition(",")[0] == pair.name]
        bad = [row for row in own if row["system"] == "failure"]
        good = [row for row in own if row["system"] == "fixed"]
        if bad and good:
            ends = " | ".join(_mean(some, "end") for some in (bad, good))
            before = _mean(bad, "start")
            named = _named(pair, bad, good)
            start = f"| {pair.mechanism} | `{pair.name}` | {before} | {ends} "
            lines.append(f"{start}| {named} | {pair.remedy} |")
    return "\n".join(lines)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [row[name]["value"] for row in rows]
    return f"{sum(values) / len(values):.3f}"


def _named(pair: Pair, bad: Sequence[Mapping[str, Any]], good: Sequence[Mapping[str, Any]]) -> str:
    if not pair.alarm:
        return "none"
    steps = [row["alarms"][pair.alarm] for row in bad if pair.alarm in row["alarms"]]
    again = sum(pair.alarm in row["alarms"] for row in good)
    words = f"`{pair.alarm}`, {len(steps)} of {len(bad)}"
    words += f", from step {min(steps)}" if steps else ""
    return words + (f"; mended, {again} of {len(good)}" if again else "")


def main() -> None:
    arguments = parser("Failures of the survey's Table 6, and what mends them.")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments.add_argument("--only", action="append", default=[], help="a pair; several times")
    add_part(arguments)
    arguments.add_argument("--output", type=Path, default=Path("runs/failures"))
    options = arguments.parse_args()
    one_thread()
    extra: list[str] = []
    if options.quick:
        options.seeds, options.output = [0], options.output / "quick"
        extra = ["--train.steps", "5", "--evaluate.test_prompts", "64"]
    pairs = [pair for pair in PAIRS if not options.only or pair.name in options.only]
    runs = [
        (pair, name, seed)
        for seed in options.seeds
        for pair in pairs
        for name in (pair.name, pair.name + FIXED)
    ]
    rows = [
        measured(pair, name, seed, options.output, extra)
        for pair, name, seed in in_part(runs, options)
    ]
    print("\n" + table(rows))
    write_asked(rows, options)


if __name__ == "__main__":
    main()

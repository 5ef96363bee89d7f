"""Alarms: which planted faults they name, and whether healthy runs are silent.

Every run is 40 steps of 32 prompts, from a warm start that the runs of a task share (some healthy
ones go on to the end of the embedded default). Thresholds are fixed on seeds below 20: halfway
between the nearest healthy run and the nearest run of the alarm's own faults. The figures come from
seeds of 100 and more, and from strengths of the faults that were not used for fixing. What each
step measured of what the alarms read is kept in `results/alarms/`, a file per run, so that a run
that is there is not made again and `--quick` scores the kept ones anew in seconds.
`benchmarks/alarm_worlds.py` says what is planted.

    python benchmarks/alarms.py [--quick] [--json FILE] [--result FILE]
    python benchmarks/alarms.py --only "stale sampler" --seeds 1
    python benchmarks/alarms.py --part 1/2 & python benchmarks/alarms.py --part 2/2
"""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alarm_worlds import FAULTS, HEALTHY, Changes, World, merged
from common import add_part, cpu_seconds, in_part, one_thread, parser, write_asked
from opd.diagnose.alarms import THRESHOLDS, History, raised
from opd.training.config import Run, from_tree
from opd.training.loop import train_run
from opd.training.session import open_session
from opd.types import Stat

FOLDER = Path(__file__).parent / "results" / "alarms"
STEPS = 40
FIXING, TESTING = 0, 100
"""First seeds of the two groups."""
FAULT_SEEDS, HEALTHY_SEEDS = 3, 7
"""Seeds of each group: of a fault at every strength, of a healthy kind."""
RATIOS = ("entropy_collapse", "length_collapse")
"""Alarms whose number is a ratio, with 1 as the number of a run that changes nothing."""
DIGITS = 4
"""Significant digits of what is kept."""

Step = dict[str, list[float]]


@dataclass(frozen=True)
class Planned:
    """One run to be made or found."""

    world: World
    strength: float
    seed: int

    @property
    def file(self) -> Path:
        name = f"{self.world.name} {self.strength:g} seed {self.seed}".replace(" ", "_")
        return FOLDER / f"{name}.json.gz"


def planned(seeds: int, only: Sequence[str]) -> Iterator[Planned]:
    """All runs, those that fix thresholds first."""
    for first, strengths in ((FIXING, "fixing"), (TESTING, "testing")):
        for world in (*HEALTHY, *FAULTS):
            if only and world.name not in only:
                continue
            count = min(world.seeds, FAULT_SEEDS if world.alarms else HEALTHY_SEEDS)
            for strength in getattr(world, strengths):
                for seed in range(first, first + min(seeds, count)):
                    yield Planned(world, strength, seed)


# --------------------------------------------------------------------------------------------
# Runs


def settings(task: str, folder: Path, seed: int) -> Changes:
    """A short run of a built-in task that measures nothing at its ends."""
    return {
        "student": {"model": f"builtin:{task}-student"},
        "teacher": {"model": f"builtin:{task}-teacher", "max_tokens": 1024},
        "data": {"prompts": f"task:{task}"},
        "sampler": {"max_new_tokens": 64},
        "train": {
            "steps": STEPS,
            "prompts_per_step": 32,
            "learning_rate": 1.5e-3,
            "max_tokens": 1024,
            "save_every": 0,
        },
        "evaluate": {"every": 0, "prompts": 1, "test_prompts": 1, "teacher": False},
        "log": {"token_share": 0.0, "samples_per_step": 0},
        "output": str(folder),
        "name": "run",
        "device": "cpu",
        "threads": 1,
        "seed": seed,
    }


def warm_start(task: str, folder: Path) -> str:
    """The student after its warm-up, made once for all runs of a task."""
    place = folder / task
    if not (place / "run" / "model").is_dir():
        warm_up = {
            "warmup": {"steps": 120, "learning_rate": 3e-3, "decay": "linear", "final_share": 0.1},
            "train": {"steps": 0},
        }
        run = Run(from_tree(merged(settings(task, place, 0), warm_up)), folder)
        for _ in train_run(run):
            pass
    return str(place / "run" / "model")


def measured(plan: Planned, warm: Path) -> list[Step]:
    """What alarms read of every step of a run."""
    world = plan.world
    start = {"student": {"model": warm_start(world.task, warm)}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tree = merged(settings(world.task, folder, plan.seed), start, world.changes)
        session = open_session(Run(from_tree(tree), folder))
        if world.plant is not None:
            world.plant(session, plan.strength)
        reports = train_run(session.run, session=session)
        return [kept(report.metrics) for report in reports if report.metrics]


def kept(metrics: Mapping[str, Stat]) -> Step:
    """Sum and count of what alarms read, rounded."""
    read = History()
    read.add(metrics)
    pairs = {name: entries[-1] for name, entries in read.last.items()}
    return {name: [_rounded(total), _rounded(count)] for name, (total, count) in pairs.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def read(file: Path) -> list[Step]:
    steps: list[Step] = json.loads(gzip.decompress(file.read_bytes()))
    return steps


def write(file: Path, steps: list[Step]) -> None:
    """The same bytes for the same steps."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps(steps, separators=(",", ":"))
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    temporary.replace(file)


# --------------------------------------------------------------------------------------------
# Scores


def given(steps: Sequence[Step]) -> dict[str, int]:
    """By alarm the first step at which it is given."""
    history = History()
    found: dict[str, int] = {}
    for number, step in enumerate(steps, 1):
        history.add({name: Stat(*pair) for name, pair in step.items()})
        for alarm in raised(history):
            found.setdefault(alarm.name, number)
    return found


def extremes(steps: Sequence[Step], name: str) -> float:
    """The value of a run that is nearest to an alarm, or furthest beyond it."""
    from opd.diagnose import alarms

    side = THRESHOLDS[name][0]
    history, values = History(), []
    for step in steps:
        history.add({metric: Stat(*pair) for metric, pair in step.items()})
        value = alarms._number(getattr(alarms, name), history)
        values += [value] if math.isfinite(value) else []
    if not values:
        return math.nan
    return max(values) if side == "above" else min(values)


def row_of(world: World, group: str, runs: Sequence[Planned]) -> dict[str, Any]:
    """How many runs of a world an alarm names, and which others are given."""
    found = [given(read(plan.file)) for plan in runs]
    right = [alarms for alarms in found if world.alarms and set(world.alarms) & alarms.keys()]
    others: dict[str, int] = {}
    for alarms in found:
        for name in alarms.keys() - set(world.alarms):
            others[name] = others.get(name, 0) + 1
    firsts = sorted(min(a[n] for n in world.alarms if n in a) for a in right)
    return {
        "case": f"{world.name}, {group}",
        "system": "opd",
        "runs": len(found),
        "named": len(right),
        "silent": sum(not alarms for alarms in found),
        "recall": len(right) / len(found) if world.alarms else None,
        "first_step": firsts[len(firsts) // 2] if firsts else None,
        "others": dict(sorted(others.items())),
    }


def limits(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    """By alarm, how near the healthy runs of fixing come, and where its own faults are."""
    rows = []
    for name, (side, threshold, _) in THRESHOLDS.items():
        near, far = (max, min) if side == "above" else (min, max)
        healthy = _all(runs, name, lambda world: not world.alarms)
        faults = _all(runs, name, lambda world, own=name: world.alarms[:1] == (own,))
        ends = (near(healthy) if healthy else None, far(faults) if faults else None)
        rows.append(
            {
                "case": f"threshold of {name}",
                "system": "opd",
                "side": side,
                "threshold": threshold,
                "healthy": ends[0],
                "faults": ends[1],
                "halfway": halfway(name, near(healthy), far(faults))
                if healthy and faults
                else None,
            }
        )
    return rows


def halfway(name: str, healthy: float, fault: float) -> float:
    """Where the threshold belongs; of ratios on the scale of their logarithms."""
    return math.sqrt(healthy * fault) if name in RATIOS else (healthy + fault) / 2


def _all(runs: Sequence[Planned], name: str, chosen: Any) -> list[float]:
    values = (extremes(read(plan.file), name) for plan in runs if chosen(plan.world))
    return [value for value in values if math.isfinite(value)]


def main() -> None:
    words = parser("Which faults the alarms name, and whether healthy runs are silent.")
    words.add_argument("--seeds", type=int, default=20, help="at most so many of each group")
    add_part(words)
    words.add_argument("--only", action="append", default=[], help="a world; several times")
    options = words.parse_args()
    one_thread()
    plans = list(planned(options.seeds, options.only))
    if not options.quick:
        with tempfile.TemporaryDirectory() as warm:
            for number, plan in in_part(list(enumerate(plans, 1)), options):
                if plan.file.exists():
                    continue
                start = cpu_seconds()
                write(plan.file, measured(plan, Path(warm)))
                seconds = cpu_seconds() - start
                print(f"{number}/{len(plans)}  {plan.file.stem}  {seconds:.1f} CPU-s", flush=True)
    plans = [plan for plan in plans if plan.file.exists()]
    table = scored(plans)
    show(table)
    write_asked(table, options)


def scored(plans: Sequence[Planned]) -> list[dict[str, Any]]:
    """A row per world and group, then one per threshold."""
    fixing = [plan for plan in plans if plan.seed < TESTING]
    rows = []
    for world in (*HEALTHY, *FAULTS):
        for group, runs in (
            ("seeds that fix thresholds", fixing),
            ("others", [plan for plan in plans if plan.seed >= TESTING]),
        ):
            if own := [plan for plan in runs if plan.world is world]:
                rows.append(row_of(world, group, own))
    return [*rows, *limits(fixing)]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the runs that fix nothing come to, then the thresholds."""
    others = [row for row in rows if row["case"].endswith(", others")]
    healthy = [row for row in others if row["recall"] is None]
    faults = [row for row in others if row["recall"] is not None]
    runs, silent = (sum(row[key] for row in healthy) for key in ("runs", "silent"))
    planted, named = (sum(row[key] for row in faults) for key in ("runs", "named"))
    lines = [
        f"{silent} of {runs} healthy runs of {len(healthy)} kinds ended without an alarm; of "
        f"{planted} runs with a planted fault {named} ({named / max(1, planted):.1%}) were given "
        "an alarm that names it.",
        "",
        "| planted fault | runs | named | first step, median | also given |",
        "|---|---:|---:|---:|---|",
    ]
    for row in faults:
        also = ", ".join(f"`{name}` {count}" for name, count in row["others"].items())
        name = row["case"].removesuffix(", others")
        lines.append(
            f"| {name} | {row['runs']} | {row['named']} | {row['first_step'] or '-'} | {also} |"
        )
    lines += [
        "",
        f"Healthy kinds: {', '.join(row['case'].removesuffix(', others') for row in healthy)}.",
    ]
    lines += [
        "",
        "| alarm | given | nearest healthy run | nearest of its faults | halfway |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        if "threshold" in row:
            name = row["case"].removeprefix("threshold of ")
            ends = (row["healthy"], row["faults"], row["halfway"])
            told = " | ".join("-" if end is None else f"{end:.3g}" for end in ends)
            lines.append(f"| `{name}` | {row['side']} {row['threshold']:g} | {told} |")
    return "\n".join(lines)


def show(table: Sequence[Mapping[str, Any]]) -> None:
    drawn = Table("case", "runs", "named", "silent", "first step", "other alarms")
    bounds = Table("alarm", "given", "nearest healthy run", "nearest fault", "halfway")
    for row in table:
        if "runs" in row:
            others = ", ".join(f"{name} {count}" for name, count in row["others"].items())
            named = "-" if row["recall"] is None else str(row["named"])
            first = "" if row["first_step"] is None else str(row["first_step"])
            drawn.add_row(row["case"], str(row["runs"]), named, str(row["silent"]), first, others)
        else:
            ends = (row["healthy"], row["faults"], row["halfway"])
            told = ("-" if end is None else f"{end:.3g}" for end in ends)
            where = f"{row['side']} {row['threshold']:g}"
            bounds.add_row(row["case"].removeprefix("threshold of "), where, *told)
    screen = Console(width=140)
    screen.print(drawn)
    screen.print(bounds)


if __name__ == "__main__":
    main()

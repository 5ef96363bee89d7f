"""`opd run`: distil, show what happens, say where everything is and what to try next."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opd.cli.output import console, duration, interval, number, print_json, table
from opd.errors import ConfigError
from opd.training.config import Run, load

INTERRUPTED = 130


def main(arguments: Namespace) -> int:
    """Train, or continue a run folder."""
    run = load_run(arguments)
    # The torch import, one second or two, comes after the run file has been checked.
    from opd.cli.live import Track, open_view
    from opd.training.loop import StepReport, train_run
    from opd.training.session import build_method, make_phases

    screen = console(stderr=arguments.json)
    resume = arguments.resume
    report: StepReport | None = None
    phases = make_phases(run.config, build_method(run))
    track = Track({phase.name: phase for phase in phases})
    with open_view(track, screen) as view:
        view.doing(_first_act(run, resume))
        try:
            for report in train_run(run, resume=resume):
                track.add(report)
                for note in report.notes:
                    screen.print(f"note: {note}")
                for alarm in report.alarms:
                    screen.print(f"alarm: step {report.step}: {alarm}", soft_wrap=True)
                if report.summary is None:
                    view.show()
                coming = _next_act(run, report)
                if coming:
                    view.doing(coming)
        except KeyboardInterrupt:
            interrupted = True
        else:
            interrupted = False
    folder = report.folder if report else Path(resume) if resume else None
    if interrupted:
        print(_how_to_go_on(folder), file=sys.stderr)
        return INTERRUPTED
    assert report is not None
    assert report.summary is not None
    if arguments.json:
        print_json([{"folder": str(report.folder), **report.summary}])
    else:
        again = f"{resume} --name NEW" if resume else arguments.file
        print_outcome(screen, report.folder, report.summary, again)
    return 0


def load_run(arguments: Namespace) -> Run:
    """The run file, or the folder to continue, with the command line's settings."""
    if arguments.resume is None:
        return load(arguments.file, arguments.overrides)
    if arguments.file is not None:
        raise ConfigError(
            f"--resume {arguments.resume} brings its own settings; leave out {arguments.file}"
        )
    if not Path(arguments.resume).is_dir():
        raise ConfigError(
            f"there is no run folder {arguments.resume}; `opd list runs` shows those there are"
        )
    return load(arguments.resume, arguments.overrides)


def print_outcome(
    screen: Console, folder: Path, summary: Mapping[str, Any], file: str | None
) -> None:
    """Start, end, teacher, gain, cost; where everything is; one thing to try next."""
    figures = table("", "accuracy", "95 % interval", "prompts", right=("accuracy", "prompts"))
    start, end = summary["start_accuracy"], summary["final_accuracy"]
    for who, score in (("start", start), ("end", end), ("teacher", summary["teacher_accuracy"])):
        if score and score["value"] is not None:
            figures.add_row(who, number(score["value"]), interval(score), f"{score['n']:,}")
    for who, score in _readers(summary.get("privilege", {})):
        figures.add_row(who, number(score["value"]), interval(score), f"{score['n']:,}")
    if summary["gain"] is not None:
        figures.add_row("gain", f"{summary['gain']:+.3f}")
    if figures.row_count:
        screen.print(figures)
    else:
        screen.print("no accuracy: the prompts have neither answers nor a verifier")
    for part in _teachers(summary.get("teachers", {})):
        screen.print(part)
    screen.print(
        f"{summary['method']}: {duration(summary['seconds'])}, {summary['tokens']:,} tokens, "
        f"{summary['peak_mb']:,.0f} MB at the peak"
    )
    for name, told in summary.get("alarms", {}).items():
        steps = "1 step" if told["steps"] == 1 else f"{told['steps']} steps"
        screen.print(f"alarm: {name}, {steps} from step {told['first_step']} on", soft_wrap=True)
    for note in summary["notes"]:
        screen.print(f"note: {note}")
    screen.print(
        f"\nEverything is in {folder}: model/ (the student), curves.png, samples.jsonl, "
        "summary.json",
        soft_wrap=True,
    )
    screen.print(f"Next: {_what_to_try(folder, summary, file)}", soft_wrap=True)


def _readers(known: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The student that reads what a view reads, at start and end, where that was measured."""
    several = len(known.get("start", {}) | known.get("final", {})) > 1
    for when in ("start", "final"):
        for view, found in known.get(when, {}).items():
            score = found.get("reading")
            if score and score["value"] is not None:
                as_whom = f" of {view}" if several else ""
                yield f"{'start' if when == 'start' else 'end'}, context{as_whom} read", score


def _teachers(known: Mapping[str, Any]) -> Iterator[Table]:
    """Of several teachers: how each route fared, what each had to say, how far they disagree."""
    if routes := known.get("routes"):
        made = table("task", "teacher", "its own", "start", "end", "", right=("its own",))
        for row in routes:
            own = row["teacher_accuracy"]
            made.add_row(
                row["task"] or "-",
                row["teacher"],
                number(own["value"]) if own else "-",
                *(f"{number(row[at]['value'])} ({interval(row[at])})" for at in ("start", "final")),
                "" if row["change"] == "same" else row["change"],
            )
        yield made
    if models := known.get("models"):
        columns = {"share": "share of tokens", "log_ratio": "log-ratio", "seconds": "s per step"}
        made = table("teacher", *columns.values(), right=tuple(columns.values()))
        for name, row in models.items():
            made.add_row(name, *(number(row.get(key)) for key in columns))
        yield made
    if pairs := known.get("conflict"):
        made = table("A", "B", "KL(A || B)", "KL(B || A)", "cosine of gradients")
        for row in pairs:
            figures = (row.get(key) for key in ("kl", "kl_back", "cosine"))
            made.add_row(row["first"], row["second"], *map(number, figures))
        yield made


def _what_to_try(folder: Path, summary: Mapping[str, Any], file: str | None) -> str:
    again = "opd run" + (f" {file}" if file else "")
    gain = summary["gain"]
    if gain is not None and gain <= 0:
        return f"no gain; try another learning rate: {again} --train.learning_rate VALUE"
    if file is None and summary["method"] == "reverse_kl_opd":
        return f"see what changed: opd sample {folder}; or another method: {again} --method gkd"
    return f"see what changed: opd sample {folder}"


def _how_to_go_on(folder: Path | None) -> str:
    from opd.training.checkpoint import find_checkpoints
    from opd.training.folder import RunFolder

    if folder is None:
        return "stopped before the first step; nothing was lost"
    found = find_checkpoints(RunFolder(folder))
    saved = f"saved in {found[-1].path}" if found else "nothing was saved yet"
    return f"stopped; {saved}. Continue with: opd run --resume {folder}"


def _first_act(run: Run, resume: str | None) -> str:
    if resume:
        return f"loading models and prompts, to continue {resume}"
    then = "" if run.config.warmup.steps else f", {_measuring_start(run)}"
    return f"loading models and prompts of {run.source}{then}"


def _measuring_start(run: Run) -> str:
    teacher = run.config.teacher
    is_here = bool(teacher.model) and not teacher.cache.offline and run.config.evaluate.teacher
    return f"measuring {'student and teacher' if is_here else 'the student'} before the first step"


def _next_act(run: Run, report: Any) -> str:
    """What the loop does after this report, where it takes a while and is no step."""
    if report.summary is not None or report.step < report.steps:
        return ""
    return (
        _measuring_start(run)
        if report.phase == "warmup"
        else "measuring the end and saving the model"
    )

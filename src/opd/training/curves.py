"""The picture of a run: accuracy, loss, length and entropy over its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.training.folder import RunFolder, disk_advice

INK, TEAL, AMBER, GREY = "#22303c", "#12737a", "#c9741a", "#8a949c"


def draw_curves(folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """Write curves.png from events.jsonl and the figures of summary.json."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = folder.read_events()
    train = [event for event in events if event["phase"] == "train" and "metrics" in event]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    _accuracy(axes[0], events, train, summary)
    losses = sorted(
        {name for event in train for name in event["metrics"] if name.startswith("loss/")}
    )
    colours = (TEAL, AMBER, INK, GREY)
    for place, name in enumerate(losses):
        label = name.removeprefix("loss/")
        words = summary.get("terms", {}).get(label, label)
        _line(axes[1], train, name, words, colours[place % 4])
    axes[1].set_title("loss per token, nats", loc="left", fontsize=10, color=INK)
    if losses and all(_mean(event, losses[0]) > 0 for event in train):
        axes[1].set_yscale("log")
    _line(axes[2], train, "rollout/length", "length (tokens)", TEAL)
    twin = axes[2].twinx()
    _line(twin, train, "student/entropy", "entropy (nats, right)", AMBER)
    axes[2].set_title("rollouts", loc="left", fontsize=10, color=INK)
    handles = [*axes[2].get_lines(), *twin.get_lines()]
    axes[2].legend(handles=handles, frameon=False, fontsize=8)
    axes[2].set_ylim(bottom=0)
    twin.set_ylim(bottom=0)
    for axis in (*axes, twin):
        axis.spines[["top"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8, colors=INK)
        axis.set_xlabel("step", fontsize=8, color=INK)
    for axis in axes[:2]:
        axis.spines[["right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(_headline(summary), x=0.01, ha="left", fontsize=11, color=INK)
    temporary = folder.path / ".curves.png.tmp"
    with disk_advice(folder.curves):
        figure.savefig(temporary, dpi=130, format="png")
        temporary.replace(folder.curves)
    plt.close(figure)


def _accuracy(axis: Any, events: list[Any], train: list[Any], summary: Mapping[str, Any]) -> None:
    axis.set_title("accuracy", loc="left", fontsize=10, color=INK)
    if summary["start_accuracy"] is None or summary["start_accuracy"]["value"] is None:
        axis.text(0.5, 0.5, "no verifier", ha="center", transform=axis.transAxes, color=GREY)
        return
    _line(axis, train, "rollout/accuracy", "rollouts, sampled", GREY, width=0.8)
    points = [
        (event["step"], event["evaluation"]["validation"])
        for event in events
        if event["phase"] == "train" and "evaluation" in event
    ]
    steps = [step for step, _ in points]
    axis.plot(steps, [p["value"] for _, p in points], "o-", color=TEAL, ms=3, label="validation")
    low, high = [p["low"] for _, p in points], [p["high"] for _, p in points]
    axis.fill_between(steps, low, high, color=TEAL, alpha=0.15, lw=0)
    teacher = summary["teacher_accuracy"]
    if teacher and teacher["value"] is not None:
        axis.axhline(teacher["value"], color=AMBER, lw=1.2, ls="--", label="teacher, test")
    axis.set_ylim(0, 1.02)


def _line(
    axis: Any, events: list[Any], name: str, label: str, colour: str, width: float = 1.4
) -> None:
    points = [(event["step"], _mean(event, name)) for event in events if name in event["metrics"]]
    if points:
        axis.plot(*zip(*points, strict=True), color=colour, lw=width, label=label)


def _mean(event: Any, name: str) -> float:
    total, count = event["metrics"].get(name, (0.0, 0.0))
    return float(total / count) if count and total is not None else float("nan")


def _headline(summary: Mapping[str, Any]) -> str:
    start, end, teacher = (summary[f"{who}_accuracy"] for who in ("start", "final", "teacher"))
    if not (start and end and start["value"] is not None):
        return f"{summary['method']}: {summary['tokens']:,} tokens in {summary['seconds']:.0f} s"
    text = f"{summary['method']}: test accuracy {start['value']:.3f} → {end['value']:.3f}"
    if teacher and teacher["value"] is not None:
        text += f" (teacher {teacher['value']:.3f})"
    return f"{text}, {summary['seconds']:.0f} s"

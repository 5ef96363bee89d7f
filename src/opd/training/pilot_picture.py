"""The picture of a probe: six panels, one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.diagnose import align_auc, quantiles
from opd.diagnose.evidence import Evidence
from opd.diagnose.maps import DisagreementMap
from opd.diagnose.profiles import BINS, Profiles
from opd.training.curves import AMBER, GREY, INK, TEAL
from opd.training.folder import disk_advice
from opd.training.pilot_gradients import Gradients
from opd.types import PASS_MARK


def draw_probe(
    file: Path,
    evidence: Evidence,
    along: Profiles,
    maps: Sequence[DisagreementMap],
    gradients: Gradients,
    title: str,
) -> None:
    """Write probe.png: along the answers, log ratios, neighbours, rescues, and maps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(16, 7.6), constrained_layout=True)
    twin = _along(axes[0, 0], along)
    _ratios(axes[0, 1], evidence)
    _neighbours(axes[1, 0], gradients)
    if evidence.recoveries:
        _rescues(axes[1, 1], evidence)
    else:
        _aligned(axes[1, 1], evidence)
    for axis, shown in zip(axes[:, 2], (*maps, None, None), strict=False):
        if shown is None:
            axis.set_axis_off()
        else:
            _map(axis, shown)
    for axis in (*axes.flat, twin):
        axis.spines[["top"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8, colors=INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    temporary = file.with_name(f".{file.name}.tmp")
    with disk_advice(file):
        figure.savefig(temporary, dpi=130, format="png")
        temporary.replace(file)
    plt.close(figure)


def _titled(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel(below, fontsize=8, color=INK)


def _along(axis: Any, along: Profiles) -> Any:
    places = [(bin + 0.5) / BINS for bin in range(BINS)]
    name = "reverse_kl" if "reverse_kl" in along.relative else "teacher_surprise"
    axis.plot(places, along.relative[name], color=TEAL, label=f"{name.replace('_', ' ')}, nats")
    twin = axis.twinx()
    if "teacher_confidence" in along.relative:
        twin.plot(
            places,
            along.relative["teacher_confidence"],
            color=AMBER,
            label="teacher's confidence (right)",
        )
    twin.set_ylim(0, 1.02)
    axis.set_ylim(bottom=0)
    handles = [*axis.get_lines(), *twin.get_lines()]
    names = [line.get_label() for line in handles]
    axis.legend(handles, names, frameon=False, fontsize=8, loc="lower center")
    _titled(axis, "along the answers", "share of the answer")
    return twin


def _ratios(axis: Any, evidence: Evidence) -> None:
    ratio = evidence.row("log_ratio")
    ratio = ratio[ratio.isfinite()]
    axis.hist(ratio.tolist(), bins=60, color=TEAL, alpha=0.7, log=True)
    for number, (share, value) in enumerate(quantiles(ratio).items()):
        axis.axvline(value, color=AMBER, lw=0.8)
        axis.annotate(
            f" {share:.0%}",
            (value, 0.98 - 0.06 * number),  # a step down each: two may be close
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=7,
            color=INK,
        )
    _titled(axis, "log ratio of the sampled tokens", "log teacher - log student, nats")


def _neighbours(axis: Any, gradients: Gradients) -> None:
    shown = [each for each in gradients.neighbours if each.cosine == each.cosine]
    for place, each in enumerate(shown, 1):
        own = not each.variable
        axis.plot(each.seconds, each.cosine, "o", color=AMBER if own else TEAL, ms=5)
        axis.annotate(
            str(place),
            (each.seconds, each.cosine),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=INK,
        )
    named = [f"{place} {each.name}" for place, each in enumerate(shown, 1)] or ["no gradient"]
    axis.text(
        0.99,
        0.03,
        "\n".join(named),
        ha="right",
        va="bottom",
        fontsize=7,
        color=GREY,
        transform=axis.transAxes,
    )
    if shown:
        seconds = [each.seconds for each in shown]
        axis.set_xlim(0.9 * min(seconds), min(seconds) + 2.2 * (max(seconds) - min(seconds)) + 1e-9)
        axis.set_ylim(top=1.1)
    _titled(
        axis,
        "gradient against that of the full reverse KL",
        "CPU-seconds of a step, and its waiting",
    )


def _rescues(axis: Any, evidence: Evidence) -> None:
    depths = [each.depth for each in evidence.recoveries]
    teacher = [float(each.teacher.nanmean()) for each in evidence.recoveries]
    student = [float(each.student.nanmean()) for each in evidence.recoveries]
    axis.plot(depths, teacher, "o-", color=TEAL, label="ended by the teacher")
    axis.plot(depths, student, "--", color=GREY, label="ended by the student")
    axis.set_ylim(0, 1.02)
    axis.legend(frameon=False, fontsize=8)
    _titled(axis, "accuracy of answers that the student begins", "share written by the student")


def _aligned(axis: Any, evidence: Evidence) -> None:
    score = evidence.per_response("log_ratio")
    right, wrong = evidence.verdict >= PASS_MARK, evidence.verdict < PASS_MARK
    for chosen, label, colour in ((right, "right", TEAL), (wrong, "wrong", AMBER)):
        values = score[chosen & score.isfinite()].tolist()
        if values:
            axis.hist(values, bins=20, alpha=0.6, color=colour, label=label)
    if bool(right.any()) and bool(wrong.any()):
        axis.legend(
            frameon=False,
            fontsize=8,
            title=f"AUROC {align_auc(score, evidence.verdict):.2f}",
            title_fontsize=8,
        )
    _titled(axis, "answers by outcome", "mean log ratio, nats")


NAMED = {
    "teacher_entropy": "the teacher's entropy",
    "reverse_kl": "their reverse KL",
    "log_ratio": "the size of their log ratio",
}


def _map(axis: Any, shown: DisagreementMap) -> None:
    """Shares of the disagreement as shades, with those of the tokens below."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shares", ["white", TEAL])
    shares, tokens = shown.disagreement, shown.tokens
    most = max(map(max, shares))
    axis.imshow(shares, cmap=shades, origin="lower", aspect="auto", vmin=0, vmax=most or 1)
    for row, of_row in enumerate(shares):
        for column, share in enumerate(of_row):
            axis.annotate(
                f"{share:.0%}\n({tokens[row][column]:.0%})",
                (column, row),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if share > 0.6 * most else INK,
            )
    quarters = range(len(shares))
    axis.set_xticks(quarters, _quarters(shown.column_edges))
    axis.set_yticks(quarters, _quarters(shown.student_edges))
    axis.set_ylabel("the student's entropy, nats", fontsize=8, color=INK)
    _titled(
        axis,
        f"share of {NAMED[shown.of]} (of the tokens)",
        f"{NAMED[shown.columns]}, nats",
    )


def _quarters(edges: Sequence[float]) -> list[str]:
    """Between which values each quarter lies."""
    low, high = ["0", *(f"{edge:.2g}" for edge in edges)], [f"{edge:.2g}" for edge in edges]
    return [f"{a} - {b}" for a, b in zip(low, high, strict=False)] + [f"> {high[-1]}"]

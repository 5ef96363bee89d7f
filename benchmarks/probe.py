"""What a probe sees of the embedded default and of planted faults, and its cost: the origin of the
thresholds of `opd.diagnose.verdicts` and `opd.training.pilot_interface`.

    python benchmarks/probe.py --result benchmarks/results/probe.json
    python benchmarks/probe.py --only interface --result benchmarks/results/probe.json

A bound lies between the worst healthy seed and the best seed of the faults that the number tells
apart: `unfit` about half of the way, `doubtful` a quarter of the way from the healthy side.

Two parts: `criteria`, the numbers of the verdicts on the embedded default, and `interface`, those
of the audits of first tokens and of special ids, on three tasks, because how hard the first token
of an answer is depends on the task. One part alone leaves the other's rows in the result.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from alarm_worlds import renamed_end
from common import command_line, cpu_seconds, one_thread, parser, write_json, write_result
from opd.diagnose.evidence import Evidence
from opd.diagnose.profiles import profiles
from opd.diagnose.verdicts import THRESHOLDS, verdicts
from opd.models import LoadedModel, load_model
from opd.teacher.local import LocalTeacher
from opd.training.config import DEFAULT_FILE, Run, from_tree, load, overridden, read_toml
from opd.training.folder import plain
from opd.training.loop import train_run
from opd.training.pilot import PilotSettings, gather, look, quiet, warm_up
from opd.training.pilot_gradients import Gradients
from opd.training.pilot_interface import FIRST_TOKEN, SPECIAL_IDS, audits
from opd.training.pilot_report import probe
from opd.training.session import Session, open_session
from opd.types import Need, Teacher, TeacherRequest, TeacherScores

SETTINGS = PilotSettings()
SHOWN = ("student_overlap_mass", "excess_surprise", "marginal_info", "teacher_overlap_mass")
TEMPLATE = {
    "name": "custom",
    "objective": {"terms": [{"kind": "dense", "divergence": "reverse_kl"}]},
    "views": [{"name": "teacher", "source": "teacher", "context": "{prompt}1"}],
}


class Shifted:
    """Answers every row with what it would say one row earlier."""

    def __init__(self, inner: Teacher) -> None:
        self._inner = inner

    def can(self, need: Need) -> bool:
        return self._inner.can(need)

    def score(self, request: TeacherRequest) -> TeacherScores:
        reply = self._inner.score(replace(request, distribution=True, sampled=False))
        assert reply.hidden is not None
        return replace(reply, hidden=reply.hidden.roll(1, 0))


def permuted(loaded: LoadedModel) -> LoadedModel:
    """The same model over another vocabulary."""
    model: Any = copy.deepcopy(loaded.model)
    weight = model.get_input_embeddings().weight
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight.copy_(weight[order])
    return replace(loaded, model=model)


def faults(
    seed: int, student: LoadedModel
) -> Iterator[tuple[str, Run, LoadedModel | None, LoadedModel | Teacher | None]]:
    """Name, run, student and teacher of every planted fault."""
    run = default(seed)
    teacher = load_model("builtin:sort-teacher")
    own: Any = copy.deepcopy(student.model)
    own.requires_grad_(False)
    yield "unwarmed student", default(seed, "--warmup.steps", "0"), None, None
    noise = default(seed, "--teacher.model", "builtin:sort-teacher-init")
    yield "noise teacher", noise, student, None
    other = default(seed, "--teacher.model", "builtin:add-teacher")
    yield "teacher of another task", other, student, None
    yield "permuted vocabulary", run, student, permuted(teacher)
    local = LocalTeacher(teacher, vocab_size=teacher.vocab_size)
    yield "shifted positions", run, student, Shifted(local)
    yield "teacher = student", run, student, replace(student, model=own)
    tree = read_toml(DEFAULT_FILE)
    tree = overridden(tree, [("seed", seed), ("evaluate.test_prompts", 1)], source="here")
    template = Run(from_tree({**tree, "method": TEMPLATE}), Path.cwd())
    yield "another template", template, student, None


def default(seed: int, *overrides: str) -> Run:
    """The embedded default, without its many test prompts."""
    return load(None, ["--seed", str(seed), "--evaluate.test_prompts", "1", *overrides])


def row_of(case: str, seed: int, evidence: Evidence, seconds: float) -> dict[str, Any]:
    """Every judged number of a probe, with its interval, and what the criteria come to."""
    judged = verdicts(evidence)
    numbers: dict[str, Any] = {
        name: asdict(evidence.mean_of_rows(evidence.row(row)))
        for name, row in (
            ("student_overlap_mass", "student_overlap_mass"),
            ("excess_surprise", "excess_surprise"),
            ("marginal_info", "reverse_kl"),
            ("teacher_overlap_mass", "teacher_overlap_mass"),
            ("leak", "leak"),
        )
    }
    for verdict in judged:
        if verdict.name not in numbers and verdict.name:
            numbers[verdict.name] = {
                "value": verdict.number,
                "low": verdict.low,
                "high": verdict.high,
            }
    row = {
        "case": case,
        "seed": seed,
        "statuses": {verdict.criterion: verdict.status for verdict in judged},
        "settings": {verdict.criterion: verdict.setting for verdict in judged if verdict.setting},
        "numbers": numbers,
        "first_token_spike": profiles(evidence).spike,
        "teacher_on_data": float(evidence.teacher_on_data.nanmean()),
        "student_accuracy": float(evidence.verdict.nanmean()),
        "teacher_accuracy": float(evidence.teacher_verdict.nanmean()),
        "log_mismatch": float(
            (evidence.row("sampler_logp") - evidence.row("student_logp")).abs().mean()
        ),
        "seconds": seconds,
    }
    made: dict[str, Any] = plain(row)
    return made


def measured(seed: int, settings: PilotSettings) -> Iterator[dict[str, Any]]:
    """The healthy default and every fault of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        found = probe(default(seed), settings, folder=Path(folder))
    student = found.pilot.session.student.loaded
    healthy = row_of("healthy", seed, found.evidence, found.cpu_seconds)
    healthy["first_change"] = found.proposal.first
    healthy["audits_found"] = [audit.name for audit in found.audits if audit.found]
    healthy["cosines"] = {
        each.name: [each.cosine, each.seconds] for each in found.gradients.neighbours
    }
    healthy["seen"] = {each.name: each.seen for each in found.gradients.neighbours}
    healthy["noise_to_signal"] = {
        each.name: each.noise_to_signal for each in found.gradients.credits
    }
    healthy["self_gradient"] = found.gradients.self_gradient
    yield plain(healthy)
    for case, run, pupil, teacher in faults(seed, student):
        start = cpu_seconds()
        evidence = gather(look(open_session(run, student=pupil, teacher=teacher), settings))
        yield row_of(case, seed, evidence, cpu_seconds() - start)


def trained(seed: int) -> dict[str, Any]:
    """The default's student at the end of its run: what is left to learn then."""
    with tempfile.TemporaryDirectory() as folder:
        run = quiet(default(seed, "--evaluate.every", "0", "--train.save_every", "0"), folder)
        session = open_session(run)
        for _ in train_run(run, session=session):
            pass
    start = cpu_seconds()
    student = session.student.loaded
    evidence = gather(look(open_session(default(seed), student=student), SETTINGS))
    return row_of("end of the run", seed, evidence, cpu_seconds() - start)


def bounds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every number with bounds from here: the worst healthy and the best fault."""
    found = []
    for name, told in TOLD_APART.items():
        higher = THRESHOLDS[name].higher
        key = "marginal_info" if name == "something_to_learn" else name
        # the least that was still worth learning is what is left at the end of a run
        fine = "end of the run" if name == "something_to_learn" else "healthy"
        healthy = [_number(r, key) for r in rows if r["case"] == fine]
        faulty = [_number(r, key) for r in rows if r["case"] in told]
        if not healthy or not faulty:
            continue
        worst = min(healthy) if higher else max(healthy)
        best = max(faulty) if higher else min(faulty)
        found.append(
            {
                "case": f"bounds of {name}",
                "worst_healthy": worst,
                "best_fault": best,
                "half_way": (worst + best) / 2,
                "a_quarter": worst + (best - worst) / 4,
                "doubtful": THRESHOLDS[name].doubtful,
                "unfit": THRESHOLDS[name].unfit,
                "separates": best < THRESHOLDS[name].unfit < worst
                if higher
                else worst < THRESHOLDS[name].unfit < best,
            }
        )
    return found


WRONG = ("noise teacher", "teacher of another task", "permuted vocabulary", "shifted positions")
TOLD_APART: Mapping[str, tuple[str, ...]] = {
    "student_overlap_mass": (*WRONG, "unwarmed student"),
    "excess_surprise": (*WRONG[1:], "unwarmed student"),  # a uniform teacher is not surprised
    "marginal_info": (*WRONG, "unwarmed student"),
    "something_to_learn": ("teacher = student",),
    "teacher_overlap_mass": (*WRONG, "unwarmed student"),
    "routable_share": ("noise teacher",),
}


# --------------------------------------------------------------------------------------------
# Audits of the interface, on three tasks

RECIPES = Path(__file__).parents[1] / "recipes"
TASKS: Mapping[str, Path] = {
    "sort": DEFAULT_FILE,
    "add": RECIPES / "add.toml",
    "chain": RECIPES / "chain.toml",
}
STRANGERS = {"sort": "add", "add": "sort", "chain": "sort"}
"""Whose teacher is the wrong one."""
AUDITED = {
    "first_token": (FIRST_TOKEN, "another template"),
    "special_ids": (SPECIAL_IDS, "renamed end token"),
}
"""The bound of a number, and the fault that it tells from every other case."""


def interfaces(
    seed: int, settings: PilotSettings, tasks: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The numbers of the audits on tasks: healthy, with their two faults, and with others."""
    for task in tasks:
        with tempfile.TemporaryDirectory() as folder:
            student = warm_up(open_session(quiet(_of_task(task, seed), folder)))
        healthy = _of_task(task, seed)
        template = _of_task(task, seed, ("method", TEMPLATE))
        renamed = open_session(healthy, student=student)
        renamed_end(renamed, float(seed))  # another id for every seed
        stranger = f"builtin:{STRANGERS[task]}-teacher"
        other = _of_task(task, seed, ("teacher.model", stranger))
        for case, session in (
            ("healthy", open_session(healthy, student=student)),
            ("another template", open_session(template, student=student)),
            ("renamed end token", renamed),
            ("unwarmed student", open_session(_of_task(task, seed, ("warmup.steps", 0)))),
            ("teacher of another task", open_session(other, student=student)),
        ):
            yield _audited(case, task, seed, session, settings)


def _of_task(task: str, seed: int, *changes: tuple[str, Any]) -> Run:
    tree = read_toml(TASKS[task])
    shared = [("seed", seed), ("evaluate.test_prompts", 1), *changes]
    return Run(from_tree(overridden(tree, shared, source=task), source=task), Path.cwd(), task)


def _audited(
    case: str, task: str, seed: int, session: Session, settings: PilotSettings
) -> dict[str, Any]:
    start = cpu_seconds()
    pilot = look(session, replace(settings, continued=2))  # no audit asks how answers go on
    evidence = gather(pilot)
    found = {each.name: each for each in audits(pilot, evidence, profiles(evidence), Gradients())}
    first, ids = found["first token"], found["ids that differ most"]
    session.opened.close()
    row = {
        "part": "interface",
        "case": case,
        "task": task,
        "seed": seed,
        "first_token": first.numbers["first"] - first.numbers["later"],
        "first_token_spike": first.numbers["first_token_spike"],
        "special_ids": ids.numbers["excess"],
        "found": [each.name for each in (first, ids) if each.found],
        "seconds": cpu_seconds() - start,
    }
    made: dict[str, Any] = plain(row)
    return made


def audit_bounds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every number of an audit: the worst where it is to be silent, and the mildest fault."""
    made = []
    for name, (bound, fault) in AUDITED.items():
        known = [row for row in rows if row.get(name) is not None]
        silent = [row[name] for row in known if row["case"] != fault]
        healthy = [row[name] for row in known if row["case"] == "healthy"]
        faulty = [row[name] for row in known if row["case"] == fault]
        worst, best = max(silent), min(faulty)
        made.append(
            {
                "part": "interface",
                "case": f"bound of {name}",
                "worst_healthy": max(healthy),
                "worst_silent": worst,
                "best_fault": best,
                "half_way": (worst + best) / 2,
                "bound": bound,
                "separates": worst < bound < best,
            }
        )
    return made


def _number(row: Mapping[str, Any], name: str) -> float:
    return float(row["numbers"][name]["value"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per case: ranges over seeds, and the statuses that were seen."""
    lines = [f"{'case':26}" + "".join(f"{name:>24}" for name in SHOWN) + "  statuses"]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        cells = ""
        for name in SHOWN:
            values = [_number(row, name) for row in own]
            cells += f"{min(values):14.3f} to {max(values):6.3f}"
        seen = zip(*(row["statuses"].values() for row in own), strict=True)
        lines.append(f"{case:26}{cells}  " + ", ".join("/".join(sorted(set(s))) for s in seen))
    return "\n".join(lines)


PARTS = ("criteria", "interface")


def criteria_rows(seeds: Sequence[int], settings: PilotSettings, *, quick: bool) -> list[Any]:
    """The verdicts' numbers, and the bounds that they give."""
    rows = []
    for seed in seeds:
        for row in measured(seed, settings):
            rows.append(row)
            print(f"seed {seed}, {row['case']}: {row['seconds']:.1f} s", flush=True)
    if not quick:
        rows.append(trained(seeds[0]))
    print("\n" + table(rows))
    limits = bounds(rows)
    for each in limits:
        print(
            f"{each['case']:36} worst healthy {each['worst_healthy']:.3g}, best fault "
            f"{each['best_fault']:.3g}: doubtful {each['doubtful']:g}, unfit {each['unfit']:g}"
        )
    return [*rows, *limits]


def interface_rows(
    seeds: Sequence[int], settings: PilotSettings, tasks: Sequence[str]
) -> list[Any]:
    """The audits' numbers, and the bounds that they give."""
    rows = []
    for seed in seeds:
        for row in interfaces(seed, settings, tasks):
            rows.append(row)
            numbers = ", ".join(
                f"{name} {'-' if row[name] is None else format(row[name], '.2f')}"
                for name in (*AUDITED, "first_token_spike")
            )
            found = ", ".join(row["found"]) or "nothing"
            print(f"{row['task']}, seed {seed}, {row['case']}: {numbers}; found: {found}")
    limits = audit_bounds(rows)
    for each in limits:
        print(
            f"{each['case']:36} worst healthy {each['worst_healthy']:.3g}, worst silent "
            f"{each['worst_silent']:.3g}, best fault {each['best_fault']:.3g}: {each['bound']:g}"
        )
    return [*rows, *limits]


def kept(file: Path, parts: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Rows of a result that these parts do not make anew, and the commands that made them."""
    if not file.exists():
        return [], []
    former = json.loads(file.read_text(encoding="utf-8"))
    rows = [row for row in former["rows"] if row.get("part", PARTS[0]) not in parts]
    return rows, former["command"].split("; ") if rows else []


def main() -> None:
    arguments = parser("Probes of the built-in tasks, healthy and with planted faults.")
    arguments.add_argument("--seeds", type=int, nargs="+", help="0 to 4; of the interface 0 and 1")
    arguments.add_argument("--only", choices=PARTS, help="one part of the two")
    options = arguments.parse_args()
    one_thread()
    seeds = [0] if options.quick else options.seeds
    settings = PilotSettings(responses=64, continued=16) if options.quick else SETTINGS
    parts = (options.only,) if options.only else PARTS[:1] if options.quick else PARTS
    tasks = list(TASKS)[:1] if options.quick else list(TASKS)
    rows: list[Any] = []
    if "criteria" in parts:
        rows += criteria_rows(seeds or [0, 1, 2, 3, 4], settings, quick=options.quick)
    if "interface" in parts:
        rows += interface_rows(seeds or [0, 1], settings, tasks)
    if options.json:
        write_json(rows, options.json)
    if options.result:
        others, commands = kept(options.result, parts)
        write_result(options.result, [*others, *rows], "; ".join([*commands, command_line()]))


if __name__ == "__main__":
    main()

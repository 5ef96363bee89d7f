"""A whole probe: from a run file to verdicts, a proposal, audits, and a folder that holds them."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from opd.diagnose.evidence import Evidence
from opd.diagnose.maps import DisagreementMap, disagreement_maps
from opd.diagnose.profiles import Profiles, profiles
from opd.diagnose.verdicts import THRESHOLDS, Verdict, verdicts
from opd.errors import ConfigError
from opd.models import LoadedModel
from opd.objective import Objective
from opd.spec import objective_to_tree, states_to_tree
from opd.training.config import Run
from opd.training.folder import disk_advice, plain, write_text
from opd.training.pilot import Doing, Pilot, PilotSettings, gather, look, nothing, quiet, warm_up
from opd.training.pilot_cost import PlanCost, ProbeCost, cost_of_plan, cost_of_probe
from opd.training.pilot_gradients import Gradients, measure_gradients
from opd.training.pilot_interface import Audit, audits
from opd.training.pilot_picture import draw_probe
from opd.training.pilot_proposal import Proposal, propose
from opd.training.pilot_steps import Steps, forget_steps, take_steps
from opd.training.session import Session, open_session
from opd.types import StateSource, Teacher

REPORT, PICTURE, PROPOSAL = "probe.json", "probe.png", "proposal.toml"


@dataclass(frozen=True)
class Probe:
    """All that a probe knows.

    Attributes:
        maps: where the two disagree, by how sure they are.
        cost: of the probe itself, as it was said before.
        plan: cost of the run as planned.
        steps: what the first steps did, where they were asked for.
        seconds, cpu_seconds: that the probe took, the run's own warm-up included.
    """

    run: Run
    pilot: Pilot
    evidence: Evidence
    verdicts: tuple[Verdict, ...]
    proposal: Proposal
    audits: tuple[Audit, ...]
    along: Profiles
    maps: tuple[DisagreementMap, ...]
    gradients: Gradients
    cost: ProbeCost
    plan: PlanCost
    steps: Steps | None
    seconds: float
    cpu_seconds: float


def probe(
    run: Run,
    settings: PilotSettings,
    *,
    folder: Path,
    steps: int = 0,
    teacher: LoadedModel | Teacher | None = None,
    say: Callable[[ProbeCost], None] | None = None,
    doing: Doing = nothing,
) -> Probe:
    """Probe a run, and write what was found into a folder: before the steps, and again after them.

    Nothing is trained but what the run file itself has before distillation, its warm-up, and the
    first steps where they are asked for.

    Args:
        folder: there, and empty or a former probe's, whose own steps are removed for new ones.
        steps: of distillation to take at the end; 0: none.
        teacher: takes the place of the run file's.
        say: is told the cost before anything that costs.
        doing: is told what happens next.

    Raises:
        OpdError: whatever a run with these settings would raise.
    """
    started, cpu = time.perf_counter(), time.process_time()
    doing("loading models and prompts")
    session, cost, warmup_s = _opened(run, settings, steps, teacher, say, doing)
    try:
        pilot = look(session, settings, doing)
        evidence = gather(pilot, doing)
        gradients = measure_gradients(pilot, doing)
        evidence = replace(evidence, gradient_cosine=gradients.verifier_cosine)
        along, judged = profiles(evidence), verdicts(evidence)
        doing("auditing the interface")
        interface = audits(pilot, evidence, along, gradients)
        proposal = propose(pilot, judged, interface, gradients, run)
        plan = cost_of_plan(pilot, gradients, run, warmup_s)
    finally:
        session.opened.close()
    found = Probe(
        run,
        pilot,
        evidence,
        judged,
        proposal,
        interface,
        along,
        disagreement_maps(evidence),
        gradients,
        cost,
        plan,
        None,
        time.perf_counter() - started,
        time.process_time() - cpu,
    )
    doing("writing and drawing")
    if steps and (folder / REPORT).exists():
        forget_steps(folder)
    _write(found, folder)
    if not steps:
        return found
    # what is known by now stays, however the steps end
    student = session.student.loaded
    taken = take_steps(run, student, evidence, settings, steps, folder, doing, teacher)
    found = replace(
        found,
        steps=taken,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
    )
    _write_report(found, folder)
    return found


def _opened(
    run: Run,
    settings: PilotSettings,
    steps: int,
    teacher: LoadedModel | Teacher | None,
    say: Callable[[ProbeCost], None] | None,
    doing: Doing,
) -> tuple[Session, ProbeCost, float]:
    """A session whose student is where distillation begins, and what the way there took."""
    with tempfile.TemporaryDirectory(prefix="opd-probe-") as folder:
        session = open_session(quiet(run, folder), teacher=teacher)
        try:
            cost = cost_of_probe(session, settings, steps)
            if say is not None:
                say(cost)
            if not run.config.warmup.steps:
                session.run = run
                return session, cost, 0.0
            started = time.perf_counter()
            student = warm_up(session, doing)
            spent = time.perf_counter() - started
        except BaseException:
            session.opened.close()
            raise
    return open_session(run, student=student, teacher=teacher), cost, spent


def probe_folder(output: str, given: str | None) -> Path:
    """Where a probe writes: the folder given, or the next free `probe-<n>` of the run folders.

    Raises:
        ConfigError: it holds something else than a probe.
    """
    if given is None:
        folder = next(path for n in count(1) if not (path := Path(output) / f"probe-{n}").exists())
    else:
        folder = Path(given)
        if folder.is_file() or (
            folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT).exists()
        ):
            raise ConfigError(
                f"--output {given} holds something else than a probe; name a new folder"
            )
    with disk_advice(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


# --------------------------------------------------------------------------------------------
# What is written


def _write(found: Probe, folder: Path) -> None:
    write_text(folder / PROPOSAL, found.proposal.toml)
    title = f"{found.run.source}: {found.proposal.first}"
    short = title if len(title) < 120 else f"{title[:117]}..."
    draw_probe(folder / PICTURE, found.evidence, found.along, found.maps, found.gradients, short)
    _write_report(found, folder)


def _write_report(found: Probe, folder: Path) -> None:
    report = json.dumps(as_tree(found), indent=2, ensure_ascii=False)
    write_text(folder / REPORT, report + "\n")


def as_tree(found: Probe) -> dict[str, Any]:
    """Everything a probe knows, as plain data."""
    evidence = found.evidence
    rows = {
        name: asdict(evidence.mean_of_rows(values))
        for name, values in evidence.rows.items()
        if not bool(values.isinf().any())
    }
    tree = {
        "run": found.run.source,
        "method": found.pilot.session.phases[-1].method.name,
        "view": found.pilot.view,
        "responses": len(evidence.stop_reason),
        "prompts": evidence.prompts,
        "tokens": len(evidence.row("log_ratio")),
        "k": evidence.k,
        "verdicts": [_plain(verdict) for verdict in found.verdicts],
        "proposal": {
            "first": found.proposal.first,
            "changes": [_plain(change) for change in found.proposal.changes],
            "box": dict(found.proposal.box),
            "objective": objective_to_tree(found.proposal.objective),
        },
        "audits": [_plain(audit) for audit in found.audits],
        "rows": rows,
        "absent": dict(evidence.absent),
        "notes": list(found.pilot.session.notes),
        "recoverability": [
            {
                "depth": each.depth,
                "teacher": float(each.teacher.nanmean()),
                "student": float(each.student.nanmean()),
                "answers": len(each.teacher),
            }
            for each in evidence.recoveries
        ],
        "along": _plain(found.along),
        "maps": _plain(found.maps),
        "gradients": _plain(found.gradients),
        "credit_noise_to_signal": {
            each.name: each.noise_to_signal for each in found.gradients.credits
        },
        "cost": {
            "probe": {
                **_plain(found.cost),
                "took_seconds": found.seconds,
                "took_cpu_seconds": found.cpu_seconds,
            },
            "run": _plain(found.plan),
        },
        "steps": None if found.steps is None else _plain(found.steps),
        "thresholds": {name: _plain(bounds) for name, bounds in THRESHOLDS.items()},
    }
    made: dict[str, Any] = plain(tree)
    return made


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and paths as what JSON knows."""
    if isinstance(value, Objective):
        return _plain(objective_to_tree(value))
    if isinstance(value, StateSource):
        return _plain(states_to_tree(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist()
    return value if not isinstance(value, float) or math.isfinite(value) else None

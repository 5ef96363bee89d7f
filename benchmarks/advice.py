"""Does the first proposal of `opd probe` help? Mis-set runs, with it and without it.

Every case is a recipe of a built-in task, shortened to 80 steps of 32 prompts, with one mistake of
a user in its run file. The probe looks at the mis-set run, its warm-up included; the first change
that it proposes is made, and no other; then the mis-set run and the changed one train with the same
seed. Where a change has no value, because another teacher is for a user to choose, the value is the
`way_out` of the case, which names the key of the mistake and no other: advice to turn another
screw counts as no help, and so does no advice, or advice that the run refuses. Mistakes that a look
before the first step cannot see are in the list too.

A student is judged by what the recipe wants, whatever the mistake: its verifier, its limit on
answers, its test prompts, greedily. `raised` counts every higher accuracy, `apart` those where the
95 % intervals do not touch.

The list stood before the first result and is not changed for one. The seed is not among those from
which the thresholds of the probe are. A file per case in `results/advice/` holds what came out, so
that a case that is there is not run again and `--quick` tells the kept ones in a second.

    python benchmarks/advice.py [--quick] [--json FILE] [--result FILE]
    python benchmarks/advice.py --only "no warm-up, sort" --only "healthy sort"
    python benchmarks/advice.py --part 1/2 & python benchmarks/advice.py --part 2/2
"""

from __future__ import annotations

import json
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import add_part, cpu_seconds, in_part, one_thread, parser, write_asked
from opd.errors import OpdError
from opd.models import LoadedModel
from opd.training.config import DEFAULT_FILE, Run, from_tree, overridden, read_toml
from opd.training.evaluate import evaluate
from opd.training.loop import train_run
from opd.training.pilot import PilotSettings
from opd.training.pilot_proposal import Change
from opd.training.pilot_report import PROPOSAL, probe
from opd.training.session import open_session, sampler_settings

FOLDER = Path(__file__).parent / "results" / "advice"
RECIPES = Path(__file__).parents[1] / "recipes"
SEED = 100
"""The thresholds of the probe are from seeds 0 to 4."""
TEST_PROMPTS = 500
BAR = 0.75
"""Share of the cases that following the first proposal is to raise."""

Settings = Mapping[str, Any]
"""Dotted keys of a run file and their values, as on the command line."""

HEALTHY: Mapping[str, Path] = {
    "sort": DEFAULT_FILE,
    "add": RECIPES / "add.toml",
    "chain": RECIPES / "chain.toml",
    "add+sort": RECIPES / "several_teachers" / "right_routing.toml",
}
"""The run file without a mistake, by its prompts."""

SHORT: Settings = {
    "train.steps": 80,
    "train.prompts_per_step": 32,
    "train.max_tokens": 1024,
    "train.save_every": 0,
    "teacher.max_tokens": 1024,
    "evaluate.every": 0,
    "evaluate.test_prompts": TEST_PROMPTS,
    "evaluate.teacher": False,
    "monitor.on": False,
    "log.token_share": 0.0,
    "log.samples_per_step": 0,
    "device": "cpu",
    "threads": 1,
    "name": "run",
    "seed": SEED,
}
UNMEASURED: Settings = {"evaluate.prompts": 1, "evaluate.test_prompts": 1}
"""While training: who is judged is judged afterwards, all alike."""


# --------------------------------------------------------------------------------------------
# The list


@dataclass(frozen=True)
class Case:
    """A run with a mistake.

    Attributes:
        name: the mistake in a few words.
        changes: that make the mistake, to the recipe of the prompts.
        task: whose recipe.
        way_out: by the key that the probe has to name what a user then sets; only for changes that
            come without a value.
        files: of the user's own, beside the run file.
        checkpoint: whether `warm/model` beside the run file is the recipe's student after its
            warm-up.
    """

    name: str
    changes: Settings
    task: str = "sort"
    way_out: Mapping[str, Settings] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    checkpoint: bool = False


def terms(*each: Settings, **method: Any) -> dict[str, Any]:
    """A custom objective."""
    own: dict[str, Any] = {"method.name": "custom", "method.objective": {"terms": list(each)}}
    return own | {f"method.{key}": value for key, value in method.items()}


REVERSE_KL = {"kind": "dense", "divergence": "reverse_kl"}
LONGER_PROMPT = {"name": "teacher", "source": "teacher", "context": "{prompt}1"}
DESCENDING = '''"""What a right answer is."""


def descending(prompt, response, *, finished):
    """The digits of the prompt, the largest first."""
    digits = sorted(prompt.text.strip("S:"), reverse=True)
    return finished and response.rpartition(">")[2] == "".join(digits)
'''

CASES = (
    Case("no warm-up, sort", {"warmup.steps": 0}),
    Case("no warm-up, add", {"warmup.steps": 0}, task="add"),
    Case("no warm-up, chain", {"warmup.steps": 0}, task="chain"),
    Case("a warm-up of 10 steps", {"warmup.steps": 10}),
    Case(
        "the teacher of another task",
        {"teacher.model": "builtin:sort-teacher"},
        task="add",
        way_out={"teacher.model": {"teacher.model": "builtin:add-teacher"}},
    ),
    Case(
        "a teacher that was never trained",
        {"teacher.model": "builtin:sort-teacher-init"},
        way_out={"teacher.model": {"teacher.model": "builtin:sort-teacher"}},
    ),
    Case(
        "one more token in the teacher's prompt",
        terms(REVERSE_KL, views=[LONGER_PROMPT]),
        way_out={"method.views": {"method.views": []}},
    ),
    Case("answers cut at 16 tokens", {"sampler.max_new_tokens": 16}),
    Case("sampled at temperature 0.2, compared at 1", {"sampler.temperature": 0.2}),
    Case("the sampled token alone", {"method.name": "sampled_token_opd"}, task="add"),
    Case(
        "the student's 2 likeliest tokens, the rest left out",
        terms(
            REVERSE_KL | {"support": {"use": "student_top_k", "k": 2}, "tail": "renormalise"},
        ),
    ),
    Case(
        "the first tenth of the answers",
        terms(REVERSE_KL | {"weights": [{"use": "prefix_share", "share": 0.1}]}),
    ),
    Case(
        "the student as its own teacher",
        {"student.model": "warm/model", "teacher.model": "warm/model", "warmup.steps": 0},
        way_out={"teacher.model": {"teacher.model": "builtin:sort-teacher"}},
        checkpoint=True,
    ),
    Case(
        "right answers alone, by a verifier that wants the opposite order",
        terms(REVERSE_KL | {"weights": ["correct"]}) | {"data.verifier": "order:descending"},
        way_out={"data.verifier": {"data.verifier": "auto"}},
        files={"order.py": DESCENDING},
    ),
    Case(
        "the mean of two teachers of two tasks",
        {
            "teacher.route": "",
            "method.name": "deepseek_v4",
            "method.options": {"teachers": ["add", "sort"]},
            "check.declared": ["conflicting-teachers"],
        },
        task="add+sort",
        # a route is behind the view `teacher`, so the method has to be one that follows it
        way_out={"teacher.route": {"teacher.route": "task", "method.name": "reverse_kl_opd"}},
    ),
    Case(
        "a learning rate 100 times too low",
        {"train.learning_rate": 1.5e-5},
        task="add",
        way_out={"train.learning_rate": {"train.learning_rate": 1.5e-3}},
    ),
)
"""No probe is expected to see the first tenth of the answers and the learning rate."""


# --------------------------------------------------------------------------------------------
# Runs


def run_of(task: str, folder: Path, *settings: Settings) -> Run:
    """The recipe of some prompts, shortened, with the settings made one after the other."""
    tree = read_toml(HEALTHY[task])
    for each in (SHORT, {"output": str(folder)}, *settings):
        tree = overridden(tree, each.items(), source=task)
    return Run(from_tree(tree, source=task), folder, task)


def prepared(case: Case, folder: Path) -> Run:
    """The mis-set run, with what its file needs beside it."""
    for name, text in case.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if case.checkpoint and not (folder / "warm").exists():
        trained(run_of(case.task, folder, {"train.steps": 0, "name": "warm"}))
    return run_of(case.task, folder, case.changes)


def trained(run: Run) -> LoadedModel:
    """The student at the end of a run."""
    tree = overridden(_tree(run), UNMEASURED.items(), source=run.source)
    session = open_session(Run(from_tree(tree, source=run.source), run.base, run.source))
    for _ in train_run(session.run, session=session):
        pass
    return session.student.loaded


def accuracy(task: str, student: LoadedModel) -> dict[str, Any]:
    """On the test prompts, as the recipe judges."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(run_of(task, Path(folder)), student=student)
        found = evaluate(
            session.student_sampler,
            session.test.prompts,
            verifier=session.verifier,
            tokenizer=session.tokenizer,
            settings=sampler_settings(session.config),
            seed=SEED,
        )
        session.opened.close()
    return found.accuracy.as_dict()


def way(case: Case, change: Change, run: Run, proposal: Settings) -> Settings | None:
    """What a user sets who makes one change; None where the probe leaves them without a value.

    Args:
        proposal: the proposed run file.
    """
    if change.key == "method.objective":
        merged = run.config.method.merge_stop_ids  # a change of its own
        return {"method": {**proposal["method"], "merge_stop_ids": merged}}
    if change.value is not None:
        return {change.key: change.value}
    return case.way_out.get(change.key)


def measured(case: Case) -> dict[str, Any]:
    """What became of a case."""
    row: dict[str, Any] = {"case": case.name, "task": case.task, "changes": case.changes}
    clock = _Clock()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            run = prepared(case, folder)
            (folder / "probe").mkdir()
            found = probe(run, PilotSettings(), folder=folder / "probe")
            clock.lap("probe")
            before = accuracy(case.task, _in(folder / "before", run))
            clock.lap("before")
        except OpdError as error:
            return row | {"cannot_run": str(error)}
        row |= {
            "first": found.proposal.first,
            "changes_proposed": [change.key for change in found.proposal.changes],
            "before": before,
            "after": None,
        }
        proposal = tomllib.loads((folder / "probe" / PROPOSAL).read_text(encoding="utf-8"))
        if found.proposal.changes:
            made = way(case, found.proposal.changes[0], run, proposal)
            row |= {"key": found.proposal.changes[0].key, "made": made}
            if made is not None:
                try:
                    changed = run_of(case.task, folder, case.changes, made)
                    row["after"] = accuracy(case.task, _in(folder / "after", changed))
                except OpdError as error:
                    row["refused"] = str(error)
            clock.lap("after")
    return row | {"cpu_seconds": clock.laps}


def healthy(task: str) -> dict[str, Any]:
    """How far the recipe comes without a mistake."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as temporary:
        student = trained(run_of(task, Path(temporary)))
        row = {"case": f"healthy {task}", "task": task, "accuracy": accuracy(task, student)}
    clock.lap("healthy")
    return row | {"cpu_seconds": clock.laps}


def _in(output: Path, run: Run) -> LoadedModel:
    """The student of a run whose records go to another folder."""
    tree = overridden(_tree(run), [("output", str(output))], source=run.source)
    return trained(Run(from_tree(tree, source=run.source), run.base, run.source))


def _tree(run: Run) -> dict[str, Any]:
    return asdict(run.config)


class _Clock:
    """CPU-seconds by part."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = cpu_seconds()

    def lap(self, name: str) -> None:
        now = cpu_seconds()
        self.laps[name] = round(now - self._last, 1)
        self._last = now


# --------------------------------------------------------------------------------------------
# What is kept, and what it comes to


def file_of(name: str) -> Path:
    """Where the result of a case, or of `healthy TASK`, is kept."""
    plain = "".join(letter if letter.isalnum() else "_" for letter in name)
    return FOLDER / f"{plain}.json"


def write(row: Mapping[str, Any]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = file_of(row["case"])
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def kept(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        if file_of(name).exists():
            yield json.loads(file_of(name).read_text(encoding="utf-8"))


def scored(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every case with whether it was raised, then the shares over those that can run."""
    judged = [dict(row) for row in rows]
    for row in judged:
        if "before" in row:
            before, after = row["before"], row["after"]
            row["raised"] = after is not None and after["value"] > before["value"]
            row["apart"] = after is not None and after["low"] > before["high"]
    ran = [row for row in judged if "before" in row]
    if ran:
        raised, apart = (sum(row[key] for row in ran) for key in ("raised", "apart"))
        total = {
            "case": "all",
            "runs": len(ran),
            "cannot_run": sum("cannot_run" in row for row in judged),
            "raised": raised,
            "apart": apart,
            "share_raised": raised / len(ran),
            "share_apart": apart / len(ran),
            "bar": BAR,
        }
        judged.append(total)
    return judged


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every case, as Markdown."""
    lines = ["| mistake | the first proposal | before | after | raised |", "|---|---|---|---|---|"]
    last = ""
    for row in rows:
        if "before" in row:
            after = _words(row["after"]) if row["after"] else _not_made(row)
            answer = "yes, apart" if row["apart"] else "yes" if row["raised"] else "no"
            first = row["first"].partition(":")[0].replace("|", "\\|")
            case = f"{row['case']} ({row['task']})"
            cells = (case, f"`{first}`", _words(row["before"]), after, answer)
            lines.append(f"| {' | '.join(cells)} |")
        elif "runs" in row:
            last = (
                f"Raised in {row['raised']} of {row['runs']} runs, beyond both 95 % intervals in "
                f"{row['apart']}."
            )
    healthy = "; ".join(
        f"{row['task']} {row['accuracy']['value']:.3f}" for row in rows if "accuracy" in row
    )
    return "\n".join([*lines, "", f"{last} Without a mistake: {healthy}."])


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    drawn = Table("mistake", "the probe's first proposal", "before", "after", "raised")
    reference = Table("without a mistake", "accuracy")
    last = f"no result yet; there are {len(CASES)} cases"
    for row in rows:
        if "accuracy" in row:
            reference.add_row(row["task"], _words(row["accuracy"]))
        elif "cannot_run" in row and "runs" not in row:
            drawn.add_row(row["case"], f"cannot run: {row['cannot_run']}", "-", "-", "left out")
        elif "before" in row:
            after = _words(row["after"]) if row["after"] else f"- ({_not_made(row)})"
            answer = "yes, apart" if row["apart"] else "yes" if row["raised"] else "no"
            drawn.add_row(
                f"{row['case']} ({row['task']})", row["first"], _words(row["before"]), after, answer
            )
        else:
            last = (
                f"raised: {row['raised']} of {row['runs']} ({row['share_raised']:.0%}; the bar is "
                f"{row['bar']:.0%}), beyond both intervals: {row['apart']} "
                f"({row['share_apart']:.0%}); cannot run: {row['cannot_run']}; in the list: "
                f"{len(CASES)}"
            )
    screen = Console(width=160)
    screen.print(reference)
    screen.print(drawn)
    print(last)


def _not_made(row: Mapping[str, Any]) -> str:
    """Why there is no changed run."""
    if "refused" in row:
        return f"refused: {row['refused']}"
    return f"{row['key']}: no way out" if "key" in row else "nothing proposed"


def _words(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} ({score['low']:.3f}–{score['high']:.3f})"


def main() -> None:
    words = parser("Does following the first proposal of a probe raise the accuracy?")
    add_part(words)
    words.add_argument("--only", action="append", default=[], help="a case; several times")
    options = words.parse_args()
    one_thread()
    known = [f"healthy {task}" for task in HEALTHY] + [case.name for case in CASES]
    for name in options.only:
        if name not in known:
            words.error(f"--only {name!r} is no case; there are {', '.join(map(repr, known))}")
    names = [name for name in known if not options.only or name in options.only]
    if not options.quick:
        by_name = {case.name: case for case in CASES}
        for number, name in in_part(list(enumerate(names, 1)), options):
            if file_of(name).exists():
                continue
            task = name.removeprefix("healthy ")
            start = cpu_seconds()
            write(measured(by_name[name]) if name in by_name else healthy(task))
            print(f"{number}/{len(names)}  {name}  {cpu_seconds() - start:.0f} CPU-s", flush=True)
    table = scored(list(kept(names)))
    show(table)
    write_asked(table, options)


if __name__ == "__main__":
    main()

"""Write `recipes/methods/NAME.toml`, a run file per method, and the data that some need.

python docs/make_method_recipes.py
"""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path

from opd import catalog, methods
from opd.audit.rules import RunFacts, examine
from opd.data.tasks import TASKS
from opd.fields import positional_names
from opd.objective import Method, Sampled
from opd.types import with_parts

FOLDER = Path(__file__).parents[1] / "recipes" / "methods"
DATA = "sort.jsonl"
MOST_TOKENS = 32
"""Likeliest tokens that are compared: the task has 53 of them."""

FEW_TOKENS = 16
CONTEXTS = {
    "context": "{response}#{prompt}",
    "wrong_context": "{wrong}#{prompt}",
    "partial_context": "{answer}#{prompt}",
    "probe_context": "{response}#",
}
CONTEXT_NOTE = """\
# The privileged self reads the solution before the prompt. A model this small has never seen such a
# prompt, so the recipe shows the mechanics and not the gain.
"""
COLUMNS_NOTE = """\
# The columns that it reads are drawn at random in sort.jsonl: the recipe shows the mechanics.
"""
BEFORE_NOTE = """\
# A model of random weights stands in for the teacher before it learnt what it is to teach.
"""
SPECIALISTS = ("sort", "add")
SEVERAL_NOTE = """\
# The teacher of additions knows nothing of sorting: the recipe shows the mechanics, and what
# averaging teachers costs that disagree. docs/several_teachers.md has the figures of a route.
"""
NOTES = {
    "lightning_opd": "# The worked solutions stand in for text that the student wrote before.\n"
}
TASK_TOKENS = 64
SAMPLED_RATE, DENSE_RATE = "3e-4", "1.5e-3"


def recipe(name: str) -> str:
    """The run file of one method."""
    made: Method = getattr(methods, name)()
    reads = {
        field
        for _, term in made.objective.parts()
        for _, bound in term.slots()
        for field in positional_names(bound.function)
    }
    views = with_parts(made.objective.views(), made.views)
    options = _options(name)
    summary = catalog.methods()[name].summary
    lines = [f"# {summary}", f"#   opd run recipes/methods/{name}.toml", f"#   opd explain {name}"]
    if any(view.context for view in views):
        lines.append(CONTEXT_NOTE.rstrip())
    columns = any(field.startswith("extra_") for field in reads) or "wrong_context" in options
    before = any(view.name == "teacher.before" for view in views)
    plain = [view.name for view in views if view.source == "teacher"]
    several = [
        name.removeprefix("teacher.") for name in plain if name not in ("teacher", "teacher.before")
    ]
    lines += [COLUMNS_NOTE.rstrip()] if any(field.startswith("extra_") for field in reads) else []
    lines += [BEFORE_NOTE.rstrip()] if before else []
    lines += [SEVERAL_NOTE.rstrip()] if several else []
    lines += [NOTES[name].rstrip()] if name in NOTES else []
    lines += ["", "threads = 1", "", "[student]", 'model = "builtin:sort-student"', ""]
    asked = any(view.source == "teacher" for view in made.views) and len(plain) > len(several)
    if asked or made.states.teacher_writes:
        lines += ["[teacher]", 'model = "builtin:sort-teacher"', ""]
    if before:
        lines += ["[teachers.before]  # what the teacher was", 'model = "builtin:sort-student"', ""]
    for number, other in enumerate(several):
        model = SPECIALISTS[number % len(SPECIALISTS)]
        lines += [f"[teachers.{other}]", f'model = "builtin:{model}-teacher"', ""]
    lines += ["[data]", f'prompts = "{DATA if columns else "task:sort"}"']
    lines += ['verifier = "task"', "held_out = 32"] if columns else []
    lines += ["", "[method]", f'name = "{name}"', ""]
    if options:
        lines += [
            "[method.options]",
            *(f"{key} = {json.dumps(v)}" for key, v in options.items()),
            "",
        ]
    grouped = "group" in reads
    sampler = ["samples_per_prompt = 4"] if grouped else []
    sampler += [f"max_new_tokens = {TASK_TOKENS}"] if columns else []
    lines += ["[sampler]", *sampler, ""] if sampler else []
    lines += ["[warmup]", "steps = 120", "learning_rate = 3e-3", "", "[train]", "steps = 240"]
    lines += ["prompts_per_step = 16"] if grouped else []
    scored = any(isinstance(term, Sampled) for _, term in made.objective.parts())
    lines += [f"learning_rate = {SAMPLED_RATE if scored else DENSE_RATE}", "save_every = 60", ""]
    lines += ["[evaluate]", "every = 40"]
    if declared := _declared(made):
        lines += ["", "[check]  # as published; `opd list rules` says what is to be known of it"]
        lines += [f"declared = {json.dumps(declared)}"]
    return "\n".join(lines) + "\n"


def records(count: int = 288) -> list[dict[str, object]]:
    """Sorting problems with what the methods' columns hold."""
    task, draw = TASKS["sort"], random.Random(0)
    found = []
    for number in range(count):
        example = task.item("train", seed=0, index=number)
        wrong = example.solution[:-1] + str((int(example.solution[-1]) + 1) % 10)
        found.append(
            {
                "task": "sort",
                "prompt": example.prompt,
                "response": example.solution,
                "answer": example.solution.partition(">")[2],
                "wrong": wrong,
                "teacher_pass": draw.choice([0.0, 0.5, 1.0, 1.0]),
                "span": draw.choice([0, 1]),
                "consensus": draw.choice([0, 1, 1]),
            }
        )
    return found


def _options(name: str) -> dict[str, object]:
    """Options that the task needs: contexts its tokens can write, and supports it can fill."""
    found: dict[str, object] = {}
    for parameter in inspect.signature(getattr(methods, name)).parameters.values():
        if parameter.name in CONTEXTS:
            found[parameter.name] = CONTEXTS[parameter.name]
        if parameter.name == "k" and parameter.default > MOST_TOKENS:
            found["k"] = FEW_TOKENS
    return found


def _declared(method: Method) -> list[str]:
    """The composition rules that the method, run as its recipe runs it, breaks on purpose."""
    remarks = examine(method, RunFacts(samples_per_prompt=4, max_new_tokens=TASK_TOKENS, steps=240))
    return [
        remark.rule
        for remark in remarks
        if remark.level == "must be declared" and not remark.declared
    ]


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in methods.__all__:
        (FOLDER / f"{name}.toml").write_text(recipe(name), encoding="utf-8")
    text = "".join(json.dumps(record) + "\n" for record in records())
    (FOLDER / DATA).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""`opd audit`: what a loss really descends, whether that is what it claims, and what is wrong."""

from __future__ import annotations

import ast
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from opd.cli.output import console, number, print_json, table
from opd.errors import ConfigError
from opd.user_code import find_function, is_user_code

if TYPE_CHECKING:
    from opd.audit.loss import Loss
    from opd.audit.verdict import Verdict

HOLDS, DOES_NOT_HOLD = 0, 1
"""Exit codes; 2, could not run, is every command's for a mistake the user can mend."""


def main(arguments: Namespace) -> int:
    """Audit losses; the exit code says whether all claims hold."""
    if arguments.self_test:
        return _print_self_test(as_json=arguments.json)
    if not arguments.targets:
        raise ConfigError(
            "name a loss as module:function, for instance "
            "opd.audit.specimens:k3_called_reverse_kl; or give --self-test"
        )
    if arguments.card and len(arguments.targets) != 1:
        raise ConfigError("--card is one page about one loss; audit one at a time")
    if arguments.written_by not in ("student", "teacher"):
        raise ConfigError(f"--written-by is 'student' or 'teacher', got {arguments.written_by!r}")
    options = dict(_option(text) for text in arguments.set)
    verdicts = [_audit(target, arguments, options) for target in arguments.targets]
    if arguments.card:
        from opd.audit.card import card

        Path(arguments.card).write_text(card(verdicts[-1]), encoding="utf-8")
    if arguments.json:
        print_json([as_row(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            _print(verdict, brief=len(verdicts) > 1)
        if arguments.card:
            print(f"card: {arguments.card}")
    return DOES_NOT_HOLD if any(verdict.holds is False for verdict in verdicts) else HOLDS


def as_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict for programs."""
    return {
        "name": verdict.name,
        "claim": verdict.claim,
        "holds": verdict.holds,
        "descends": verdict.descends,
        "verdict": verdict.sentence,
        "cosine": verdict.match.cosine if verdict.match else None,
        "factor": verdict.match.scale if verdict.match else None,
        "cosines": dict(verdict.cosines),
        "findings": [
            {"level": "fault" if found.is_fault else "caution", **asdict(found)}
            for found in verdict.findings
        ],
        "checks": [
            {
                "name": check.name,
                "status": check.status,
                "message": check.message,
                "figures": check.figures,
            }
            for check in verdict.checks
        ],
        "seconds": verdict.seconds,
    }


def _audit(target: str, arguments: Namespace, options: dict[str, Any]) -> Verdict:
    from opd.audit.adapters import adapt
    from opd.audit.verdict import audit_loss

    if is_user_code(target):
        function = find_function(target, Path.cwd())
        loss = adapt(function, target, arguments.adapter, **options)
    else:
        loss = _objective(target, arguments.overrides)
    try:
        return audit_loss(loss, claim=arguments.claim, writer=arguments.written_by)
    except ConfigError:
        raise
    except Exception as error:  # a loss under audit may raise anything
        if arguments.debug:
            raise
        raise ConfigError(
            f"{target} cannot be run on ordinary rows: {type(error).__name__}: {error}; see "
            "`opd audit --help` for what it is called with, and --debug for the traceback"
        ) from error


def _print_self_test(*, as_json: bool) -> int:
    """Audit the known mistakes that come with opd: is each found, and called what it is?"""
    from opd.audit.adapters import adapt
    from opd.audit.specimens import SPECIMENS
    from opd.audit.verdict import audit_loss

    rows: list[dict[str, Any]] = []
    for specimen in SPECIMENS:
        loss = adapt(specimen.function, specimen.name, specimen.adapter)
        verdict = audit_loss(loss, claim=None if specimen.claim == "none" else specimen.claim)
        named = {finding.name for finding in verdict.findings}
        rows.append(
            {
                "name": specimen.name,
                "claim": specimen.claim,
                "mistake": ", ".join(specimen.finds),
                "found": set(specimen.finds) <= named,
                "descends": verdict.descends,
                "seconds": verdict.seconds,
            }
        )
    missed = [row for row in rows if not row["found"]]
    if as_json:
        print_json(rows)
    else:
        made = table("known mistake", "claim", "to be found", "", "it descends")
        for row in rows:
            said = "found" if row["found"] else "MISSED"
            made.add_row(row["name"], row["claim"], row["mistake"], said, row["descends"])
        console().print(made)
        print(f"{len(rows) - len(missed)} of {len(rows)} found")
    return DOES_NOT_HOLD if missed else HOLDS


def _objective(target: str, overrides: list[str]) -> Loss:
    """What a published method or a run file descends at its first step."""
    from opd.audit.own import objective_loss
    from opd.cli.explain import find_run
    from opd.training.session import build_method

    method = build_method(find_run(target, overrides))
    first, _ = method.objective.at(0, {}, None)
    return objective_loss(first, target)


def _option(text: str) -> tuple[str, Any]:
    """`beta=0.5` as a name and a Python value; what is no value is text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--set takes NAME=VALUE, as in beta=0.5; got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _print(verdict: Verdict, *, brief: bool) -> None:
    screen = console()
    colour = {None: "bold", True: "bold green", False: "bold red"}[verdict.holds]
    screen.print(Text.assemble((verdict.name, "bold"), "\n  ", (verdict.sentence, colour)))
    for finding in verdict.findings:
        level, tint = ("fault", "red") if finding.is_fault else ("caution", "yellow")
        screen.print(Text.assemble("  ", (f"{level}: {finding.name}: ", tint), finding.message))
    if brief:
        return
    from opd.audit.targets import words

    made = table("gradient of", "cosine", right=("cosine",))
    for text, cosine in verdict.cosines.items():
        made.add_row(words(text), number(cosine))
    screen.print(made)
    made = table("check", "", "seen")
    for check in verdict.checks:
        made.add_row(check.name, check.status, check.message)
    screen.print(made)

"""`opd audit`: what a loss really descends, whether that is what it claims, and what is wrong."""

from __future__ import annotations

import ast
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from opd.audit.verdict import Verdict, audit_loss
from opd.cli.output import console, number, print_json, table
from opd.errors import ConfigError
from opd.user_code import find_function, is_user_code

if TYPE_CHECKING:
    from opd.audit.loss import Loss

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
    if arguments.written_by not in (None, "student", "teacher"):
        raise ConfigError(f"--written-by is 'student' or 'teacher', got {arguments.written_by!r}")
    options = dict(_option(text) for text in arguments.set)
    found = {target: _tried(target, arguments, options) for target in arguments.targets}
    verdicts = [verdict for verdict in found.values() if isinstance(verdict, Verdict)]
    if arguments.card and verdicts:
        from opd.audit.card import card

        Path(arguments.card).write_text(card(verdicts[-1]), encoding="utf-8")
    if arguments.json:
        print_json([as_row(target, verdict) for target, verdict in found.items()])
    else:
        for verdict in verdicts:
            _print(verdict, brief=len(found) > 1)
        if arguments.card and verdicts:
            print(f"card: {arguments.card}")
    refused = [error for error in found.values() if isinstance(error, ConfigError)]
    if refused:
        raise ConfigError("\nerror: ".join(map(str, refused)))
    return DOES_NOT_HOLD if any(verdict.holds is False for verdict in verdicts) else HOLDS


def as_row(target: str, verdict: Verdict | ConfigError) -> dict[str, Any]:
    """A verdict for programs, or why there is none."""
    if isinstance(verdict, ConfigError):
        return {"name": target, "error": str(verdict)}
    return {
        "name": verdict.name,
        "claim": verdict.claim,
        "holds": verdict.holds,
        "descends": verdict.descends,
        "verdict": verdict.sentence,
        "settings": list(verdict.settings),
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


def _tried(target: str, arguments: Namespace, options: dict[str, Any]) -> Verdict | ConfigError:
    """A verdict, or why there is none: the other targets have theirs all the same."""
    try:
        # a loss may print; what is asked for is the verdict alone
        with redirect_stdout(sys.stderr):
            return _audit(target, arguments, options)
    except ConfigError as error:
        if arguments.debug:
            raise
        return error


def _audit(target: str, arguments: Namespace, options: dict[str, Any]) -> Verdict:
    from opd.audit.adapters import adapt

    if is_user_code(target):
        if arguments.overrides:
            raise ConfigError(
                f"{arguments.overrides[0]} is for a method or a run file; what the function "
                f"{target} is told is set by --set NAME=VALUE"
            )
        function = find_function(target, Path.cwd())
        loss = adapt(function, target, arguments.adapter, **options)
    else:
        if options or arguments.adapter != "rows":
            raise ConfigError(
                f"{'--set' if options else '--adapter'} is for functions, and {target} is not "
                "written module:function; a method's options are set by --method.options.NAME VALUE"
            )
        loss = _method(target, arguments.overrides)
    try:
        return audit_loss(loss, claim=arguments.claim, writer=arguments.written_by)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a loss under audit may raise anything
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


def _method(target: str, overrides: list[str]) -> Loss:
    """What a published method or a run file descends at its first step."""
    module, _, function = target.rpartition(".")
    is_dotted = module and target.replace(".", "").isidentifier() and function != "toml"
    if is_dotted and not Path(target).exists():
        raise ConfigError(
            f"{target!r} is neither a run file nor a method; a function is written "
            f"{module}:{function}"
        )
    from opd.audit.own import method_loss
    from opd.cli.explain import find_run
    from opd.training.session import build_method

    first, _ = build_method(find_run(target, overrides)).at(0, {}, None)
    keys = [word.lstrip("-").partition("=")[0].rpartition(".")[2] for word in overrides]
    return method_loss(first, target, keep_k=any(k == "k" or k.endswith("_k") for k in keys))


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

    if verdict.cosines:
        made = table("gradient of", "cosine", right=("cosine",))
        for text, cosine in verdict.cosines.items():
            made.add_row(words(text), number(cosine))
        screen.print(made)
    made = table("check", "", "seen")
    for check in verdict.checks:
        made.add_row(check.name, check.status, check.message)
    screen.print(made)

"""Which commands there are, how their words are read, and how mistakes are told.

Imports nothing heavy: help, listings and errors in a run file must not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from opd import __version__
from opd.catalog import constants
from opd.errors import ConfigError, OpdError, TrainingError, nearest

USAGE_ERROR, TRAINING_ERROR, INTERRUPTED = 2, 1, 130

SECTIONS = (
    "student",
    "teacher",
    "teachers",
    "data",
    "method",
    "sampler",
    "warmup",
    "train",
    "critic",
    "evaluate",
    "log",
    "monitor",
    "check",
)
PLAIN_KEYS = ("name", "output", "seed", "device", "threads", "method")
"""Keys of a run file that stand in no section, and `method`, which is short for `method.name`."""

OVERRIDES = """\
Any key of the run file can be given as --section.key VALUE, for instance
  --train.steps 50   --student.model path-or-hub-id   --method vopd   --seed 3
"""

EXAMPLES = """\
examples:
  opd run                              distil the embedded default, in about a minute
  opd init && opd run my_run.toml      begin with a run file of your own
  opd run my_run.toml --train.steps 50 --student.model path-or-hub-id
  opd run --resume runs/my_run         go on after an interruption
  opd explain vopd                     what a method computes, and where it is from
"""


def _audit_help() -> str:
    """How losses are called and claims are written, from where both are defined."""

    def listed(file: str, name: str) -> str:
        forms = constants(file)[name]
        width = 2 + max(map(len, forms))
        return "\n".join(f"  {key:<{width}}{form}" for key, form in forms.items())

    return f"""\
claims:
{listed("audit/targets.py", "CLAIM_FORMS")}

adapters:
{listed("audit/adapters.py", "FORMS")}

Row n's logits predict token n. Of mask [N], old_logp [N], temperature and count (rows that count,
over all micro-batches) a loss is told those that it names. rows, reduced, linear, pair and logp
take --set teacher_first=True where the teacher's come first.

examples:
  opd audit my_losses:reverse_kl --claim reverse_kl
  opd audit my_losses:jsd --set beta=0.3 --claim jsd:0.3 --card jsd.html
  opd audit my_losses:likelihood --written-by teacher --claim forward_kl
  opd audit opd.audit.specimens:k3_called_reverse_kl --claim reverse_kl   a known mistake
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` and knows the names of its flags."""

    def __init__(self, command: str, description: str, *, overrides: bool = False) -> None:
        super().__init__(
            prog=f"opd {command}",
            description=description,
            epilog=OVERRIDES if overrides else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.flags = ["--help", "--debug"]
        self.overrides = overrides
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def flag(self, name: str, help: str, *, metavar: str = "", default: str | None = None) -> None:
        """An option with a text value, or without a metavar a switch."""
        self.flags.append(name)
        if metavar:
            self.add_argument(name, metavar=metavar, default=default, help=help)
        else:
            self.add_argument(name, action="store_true", help=help)

    def number(
        self, name: str, help: str, *, default: int | None = None, or_zero: bool = False
    ) -> None:
        """An option with a whole number >= 1, or >= 0."""
        self.flags.append(name)
        read = _at_least_zero if or_zero else _at_least_one
        self.add_argument(name, type=read, metavar="N", default=default, help=help)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The command's arguments; `overrides` holds what belongs to the run file.

        Raises:
            ConfigError: names what cannot be understood, and the nearest flag.
        """
        own, overrides = split_overrides(words) if self.overrides else (list(words), [])
        arguments, unknown = self.parse_known_args(own)
        if unknown:
            valid = [*self.flags]
            if self.overrides:
                valid += [f"--{key}" for key in (*PLAIN_KEYS, *SECTIONS)]
            hint = _nearest_key(unknown[0]) if self.overrides else ""
            raise ConfigError(
                f"{self.prog} has no option {unknown[0]!r}. {hint or nearest(unknown[0], valid)}"
                if unknown[0].startswith("-")
                else f"{self.prog} takes no further argument, got {unknown[0]!r}"
            )
        arguments.overrides = overrides
        return arguments

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _nearest_key(word: str) -> str:
    """For a section alone and for a key without its section: how it is written; else empty."""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    if name in SECTIONS:
        return f"It is a section; its keys are written --{name}.KEY VALUE."
    from opd.training.config import dotted_keys

    keys = [f"--{key}" for key in dotted_keys() if key.rpartition(".")[2] == name]
    return f"Did you mean {' or '.join(keys)}?" if keys else ""


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own words, and those that are `--section.key VALUE` or a plain key."""
    own: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key = word[2:].partition("=")[0] if word.startswith("--") else ""
        if "." in key or key in PLAIN_KEYS:
            overrides.append(word)
            if "=" not in word and rest and not rest[0].startswith("--"):
                overrides.append(rest.pop(0))
        else:
            own.append(word)
    return own, overrides


@dataclass(frozen=True)
class Command:
    """A command: the module of `opd.cli` whose `main` does it, and how its words are read."""

    module: str
    summary: str
    add: Callable[[Parser], None]
    overrides: bool = False

    def parser(self, name: str) -> Parser:
        parser = Parser(name, self.summary, overrides=self.overrides)
        self.add(parser)
        return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `opd`; those of the process if not given.

    Returns:
        The exit code: 0; 2 for a mistake the user can mend; 1 for a run that had to stop; 130
        after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except (OpdError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):  # whoever read our output, `head` say, is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if "--debug" in words:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
            return INTERRUPTED
        print(f"error: {_message(error)}", file=sys.stderr)
        return TRAINING_ERROR if isinstance(error, TrainingError) else USAGE_ERROR


def _dispatch(words: list[str]) -> int:
    if words == ["--debug"]:
        words = []
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"opd {__version__}")
        return 0
    if words[0] == "--debug":
        words = [*words[1:], words[0]]
    name, *rest = words
    if name not in COMMANDS:
        raise ConfigError(f"there is no command {name!r}. {nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    arguments = command.parser(name).read(rest)
    module = importlib.import_module(f"opd.cli.{command.module}")
    code: int = module.main(arguments)
    return code


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, OpdError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: opd COMMAND ...\n\n"
        "On-policy distillation of language models.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        f"{EXAMPLES}\n"
        "`opd COMMAND --help` explains a command; --debug shows the traceback of an error."
    )


def _at_least_one(text: str) -> int:
    return _whole(text, 1)


def _at_least_zero(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return int(text)


# --------------------------------------------------------------------------------------------
# The words of each command


def _file(parser: Parser) -> None:
    parser.add_argument(
        "file", nargs="?", metavar="RUN.toml", help="a run file; without one, the embedded default"
    )


def _json(parser: Parser) -> None:
    parser.flag("--json", "print a list of objects in place of a table")


def _run(parser: Parser) -> None:
    _file(parser)
    parser.flag("--resume", "continue this run folder from its last checkpoint", metavar="FOLDER")
    _json(parser)


def _init(parser: Parser) -> None:
    parser.add_argument("file", nargs="?", default="my_run.toml", metavar="FILE")


def _check(parser: Parser) -> None:
    parser.add_argument(
        "files", nargs="*", metavar="RUN.toml", help="run files; without one, the embedded default"
    )
    parser.flag("--live", "also ask the teachers that have a url, as the run will")
    _json(parser)


def _probe(parser: Parser) -> None:
    _file(parser)
    parser.number("--responses", "answers to held-out prompts (default 256)", default=256)
    parser.number(
        "--steps",
        "also train for so many first steps and compare (default 0)",
        default=0,
        or_zero=True,
    )
    parser.flags.append("--output")  # read among the overrides, where it is the run folders'
    _json(parser)


def _explain(parser: Parser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        metavar="RUN.toml|METHOD",
        help="a run file or a method's name; without one, the embedded default",
    )
    _json(parser)


def _diff(parser: Parser) -> None:
    for which in ("first", "second"):
        parser.add_argument(which, metavar="RUN.toml|METHOD", help="a run file or a method's name")
    _json(parser)


def _audit(parser: Parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _audit_help()
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="MODULE:FUNCTION",
        help="a loss of yours or of a package; or a method or run file of opd, at its first step",
    )
    parser.flag(
        "--claim",
        "what it should descend (below); sets the exit code: 0 holds, 1 does not, 2 could not be "
        "run",
        metavar="NAME",
    )
    parser.flag("--adapter", "how a function is called (below)", metavar="NAME", default="rows")
    parser.flags.append("--set")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the function is told besides; may be repeated",
    )
    parser.flag(
        "--written-by",
        "who wrote the tokens: student or teacher; by default the student, for a method whom its "
        "state source says",
        metavar="WHO",
    )
    parser.flag("--card", "write the verdict as an HTML page", metavar="FILE")
    parser.flag("--self-test", "audit the known mistakes that come with opd")
    _json(parser)


def _list(parser: Parser) -> None:
    parser.add_argument("what", metavar="methods|formulas|diagnostics|alarms|rules|tasks|runs")
    parser.flag(
        "--variable",
        "methods: show what each chose for this one of the nine variables, equal choices "
        "together; a part of its name will do",
        metavar="NAME",
    )
    parser.flag("--level", "methods: only of evidence E0, E1, E2, E3 or M", metavar="LEVEL,LEVEL")
    parser.flag(
        "--formula",
        "methods: only with formulas from code, paper or note, or inferred",
        metavar="SOURCE,SOURCE",
    )
    parser.flag("--output", "folder of the run folders", metavar="FOLDER", default="runs")
    _json(parser)


def _eval(parser: Parser) -> None:
    parser.add_argument(
        "target", metavar="TARGET", help="a run folder, or a model folder or hub id"
    )
    parser.flags.append("--set")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="prompts to measure on, as in data.prompts; may be repeated. "
        "Default for a run folder: its test prompts and evaluate.sets",
    )
    parser.number("--samples", "responses per prompt at temperature 1 (default 8)", default=8)
    parser.flag("--k", "for pass@k (default 1,4,8 as far as --samples goes)", metavar="K,K")
    parser.number("--limit", "at most that many prompts per set")
    _json(parser)


def _serve(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or builtin:sort-teacher")
    parser.flag("--host", "to listen on (default 127.0.0.1)", metavar="HOST", default="127.0.0.1")
    parser.number("--port", "0 takes a free one (default 8765)", default=8765, or_zero=True)
    parser.flag(
        "--key-env",
        "environment variable that holds the key clients must show; needed for any other host",
        metavar="NAME",
        default="",
    )
    parser.flag("--name", "what clients are told the model is called", metavar="NAME", default="")
    parser.flag("--device", "auto, cpu, cuda or cuda:N", metavar="DEVICE", default="auto")
    parser.flag("--dtype", "auto, float32, bfloat16 or float16", metavar="DTYPE", default="auto")
    parser.flag("--revision", "of a hub id", metavar="REVISION", default="")
    parser.flag("--trust-remote-code", "run code that comes with the model")
    parser.number("--max-tokens", "padded tokens per forward (default 16384)", default=16384)
    parser.number("--receive-s", "seconds in which a request must arrive (default 30)", default=30)
    parser.number("--drain-s", "seconds to finish in when stopped (default 60)", default=60)
    parser.number("--threads", "CPU threads (default: PyTorch's choice)", default=0, or_zero=True)
    _json(parser)


def _sample(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.number("--prompts", "so many test prompts (default 4)", default=4)
    _json(parser)


def _query(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "query",
        nargs="?",
        metavar="SQL|NAME",
        help="one query in SQL, or a ready-made one by its name; without it, these are listed",
    )
    parser.number("--limit", "at most that many rows (default 20; of SQL with --json all)")
    parser.number("--threads", "CPU threads (default: DuckDB's choice)", default=0, or_zero=True)
    _json(parser)


COMMANDS: dict[str, Command] = {
    "run": Command("run", "distil a student; shows what it does", _run, overrides=True),
    "init": Command("init", "write a run file that works, to edit", _init),
    "eval": Command(
        "evaluate", "measure a run or a model: greedy, mean@n, pass@k", _eval, overrides=True
    ),
    "sample": Command("sample", "start, end and teacher side by side on the same prompts", _sample),
    "query": Command("query", "SQL on what a run recorded of every token", _query),
    "check": Command(
        "check", "all that can be known before weights load, and the memory", _check, overrides=True
    ),
    "probe": Command(
        "probe",
        "whether this teacher can help this student, before you spend",
        _probe,
        overrides=True,
    ),
    "explain": Command(
        "explain", "the nine variables, formulas and passes of a run", _explain, overrides=True
    ),
    "audit": Command(
        "audit", "what a loss really descends, whatever its name", _audit, overrides=True
    ),
    "serve": Command("serve", "score for runs elsewhere: a teacher behind a URL", _serve),
    "diff": Command("diff", "the variables in which two methods differ", _diff),
    "list": Command(
        "listing", "methods, formulas, diagnostics, alarms, rules, tasks or runs", _list
    ),
}

if __name__ == "__main__":
    sys.exit(main())

"""`opd eval`: how good a run's student, or any model, is on named sets of prompts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from opd.cli.output import console, interval, number, print_json, table
from opd.errors import ConfigError

if TYPE_CHECKING:
    from opd.training.measure import Measured


def main(arguments: Namespace) -> int:
    """Measure and print one row per set."""
    sets, ks = parse_sets(arguments.set), parse_ks(arguments.k)
    from opd.training.measure import measure

    found = measure(
        arguments.target,
        sets=sets,
        samples=arguments.samples,
        ks=ks,
        limit=arguments.limit,
        overrides=arguments.overrides,
    )
    rows = [_row(measured, arguments.samples) for measured in found]
    if arguments.json:
        print_json(rows)
        return 0
    screen = console()
    screen.print(_draw(rows, arguments.samples))
    screen.print(f"weights: {found[0].weights}; brackets: 95 % intervals over prompts")
    for measured in found:
        if not measured.verified:
            screen.print(
                f"note: {measured.name} has neither answers nor a verifier, so only lengths were "
                "measured; set --data.verifier"
            )
    return 0


def parse_sets(words: Sequence[str]) -> dict[str, str]:
    """`name=source` pairs."""
    sets: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"--set takes NAME=SOURCE, for instance sort=task:sort, got {word!r}")
        if name in sets:
            raise ConfigError(f"two sets are called {name!r}; give each its own name")
        sets[name] = source
    return sets


def parse_ks(text: str | None) -> list[int] | None:
    """`1,4,8` as numbers."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--k takes whole numbers with commas, such as 1,4,8, got {text!r}") from None


def _row(measured: Measured, samples: int) -> dict[str, Any]:
    evaluation = measured.evaluation
    mean = evaluation.mean_at_n
    return {
        "set": measured.name,
        "source": measured.source,
        "weights": measured.weights,
        "prompts": evaluation.accuracy.n,
        "greedy": evaluation.accuracy.as_dict(),
        "samples": samples,
        "mean_at_n": mean.as_dict() if mean else None,
        "pass_at_k": {str(k): score.as_dict() for k, score in evaluation.pass_at_k},
        "length": evaluation.length,
        "truncated": evaluation.truncated,
    }


def _draw(rows: Sequence[Mapping[str, Any]], samples: int) -> Table:
    ks = list(rows[0]["pass_at_k"])
    figures = ["prompts", "greedy", f"mean@{samples}", *(f"pass@{k}" for k in ks), "length", "cut"]
    made = table("set", *figures, right=figures)
    for row in rows:
        made.add_row(
            row["set"],
            f"{row['prompts']:,}",
            _with_interval(row["greedy"]),
            _with_interval(row["mean_at_n"]),
            *(_with_interval(row["pass_at_k"].get(k)) for k in ks),
            number(row["length"], 1),
            f"{row['truncated']:.1%}",
        )
    return made


def _with_interval(score: Mapping[str, Any] | None) -> str:
    if score is None or number(score["value"]) == "-":
        return "-"
    return f"{number(score['value'])}\n[{interval(score)}]"

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
    screen.print(_draw(rows))
    screen.print(f"weights: {found[0].weights}; greedy, and {arguments.samples} samples per prompt")
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
        raise ConfigError(
            f"--k takes whole numbers with commas, such as 1,4,8, got {text!r}"
        ) from None


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


def _draw(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = table("set", "figure", "value", "95 % interval", right=("value",))
    for row in rows:
        scores = {"greedy": row["greedy"], f"mean@{row['samples']}": row["mean_at_n"]}
        scores |= {f"pass@{k}": score for k, score in row["pass_at_k"].items()}
        label = f"{row['set']}, {row['prompts']:,} prompts"
        for name, score in scores.items():
            if score is not None and number(score["value"]) != "-":
                made.add_row(label, name, number(score["value"]), interval(score))
                label = ""
        made.add_row(label, "length, tokens", number(row["length"], 1))
        made.add_row("", "cut by the limit", number(row["truncated"]), end_section=True)
    return made

"""`opd diff`: the variables in which two compositions differ. Published ones import no torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opd.cli.listing import method_rows
from opd.cli.output import console, print_json, table


@dataclass(frozen=True)
class Composition:
    """What a method or a run file chose.

    Attributes:
        name: as the user gave it.
        variables: the nine, in the survey's order.
        composition_hash: equal for equal compositions.
    """

    name: str
    variables: Mapping[str, str]
    composition_hash: str


def main(arguments: Namespace) -> int:
    """Print the variables in which two compositions differ."""
    first, second = find_composition(arguments.first), find_composition(arguments.second)
    rows = differences(first, second)
    if arguments.json:
        print_json(rows)
    elif rows:
        made = table("variable", first.name, second.name)
        for row in rows:
            made.add_row(row["variable"], row["first"], row["second"])
        console().print(made)
    else:
        print(_alike(first, second))
    return 0


def find_composition(what: str) -> Composition:
    """A published method with its defaults, from the index, or a run file's composition.

    Raises:
        ConfigError: neither a run file nor a method; names the nearest.
    """
    if not Path(what).exists():  # as for `opd explain`, a file of that name comes first
        for row in method_rows():
            if row["name"] == what:
                return Composition(what, row["variables"], row["composition_hash"])
    from opd.cli.explain import find_run

    run = find_run(what, [])
    from opd.training.explain import explain

    found = explain(run)
    return Composition(what, found.variables, found.composition_hash)


def differences(first: Composition, second: Composition) -> list[dict[str, str]]:
    """The variables in which the two differ, with what each chose."""
    return [
        {"variable": variable, "first": choice, "second": second.variables[variable]}
        for variable, choice in first.variables.items()
        if choice != second.variables[variable]
    ]


def _alike(first: Composition, second: Composition) -> str:
    """One line for two that choose the same in all nine variables."""
    if first.composition_hash == second.composition_hash:
        return f"{first.name} and {second.name} are the same composition, {first.composition_hash}"
    return (
        f"{first.name} ({first.composition_hash}) and {second.name} ({second.composition_hash}) "
        "choose the same in all nine variables, but differ in what these words leave out, such "
        "as a temperature: compare `opd explain` of both"
    )

"""Names, signatures and docstrings of the library's own functions, read without importing them.

`--help`, `opd list` and config errors must not wait for torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
FORMULA_MODULES = (
    "support",
    "divergence",
    "reward",
    "outcome",
    "credit",
    "surrogate",
    "routing",
    "weight",
    "selection",
    "response",
    "regulariser",
    "reduce",
)
DIAGNOSTIC_MODULES = (
    "compatibility",
    "along",
    "interface",
    "signal",
    "update",
    "routing",
    "outcome",
    "staleness",
    "drift",
)


@dataclass(frozen=True)
class Entry:
    """One function of the library.

    Attributes:
        name: the function's name.
        module: the module that defines it.
        arguments: positional arguments: the fields it needs.
        knobs: keyword-only arguments.
        docstring: cleaned.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    knobs: tuple[str, ...]
    docstring: str

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return self.docstring.split("\n", 1)[0]

    def section(self, title: str) -> str:
        """The text after `TITLE:` in the docstring, up to a blank line or the next title."""
        found = re.search(
            rf"^{title}: (.*?)(?=\n\s*\n|\n[A-Z][a-z]+(?: [a-z]+)?: |\Z)",
            self.docstring,
            re.M | re.S,
        )
        return " ".join(found.group(1).split()) if found else ""

    @property
    def equation(self) -> str:
        """The indented lines of the docstring before its sections."""
        body = re.split(r"^(?:Args|Returns|Source|Attributes):", self.docstring, flags=re.M)[0]
        return "\n".join(line.strip() for line in body.splitlines() if line.startswith("    "))


@dataclass(frozen=True)
class Rule:
    """One composition rule.

    Attributes:
        name: as a run file spells it.
        function: the function of `opd.audit.rules` that looks for it.
        level: `refused`, `must be declared`, `note` or `allowed`.
        says: one line.
        reason: why.
        way_out: what to do instead.
        source: who says so.
    """

    name: str
    function: str
    level: str
    says: str
    reason: str
    way_out: str
    source: str


@dataclass(frozen=True)
class Diagnostic:
    """One measure of what a teacher's feedback does.

    Attributes:
        name: the function's, in `opd.diagnose`.
        id: what the survey's table of diagnostics calls it; several functions may share one.
        module: the module of `opd.diagnose` that defines it.
        arguments: positional arguments.
        knobs: keyword-only arguments.
        measures: one line.
        formula: what is computed.
        unit: of the result, and its shape where it is not one number.
        reading: what a value says.
        action: what to do about it.
        cost: what has to be known for it.
        source: who says so.
    """

    name: str
    id: str
    module: str
    arguments: tuple[str, ...]
    knobs: tuple[str, ...]
    measures: str
    formula: str
    unit: str
    reading: str
    action: str
    cost: str
    source: str


@dataclass(frozen=True)
class Alarm:
    """One failure that a run looks out for.

    Attributes:
        name: as a run file spells it; the function of `opd.diagnose.alarms` that looks for it.
        says: one line.
        mechanism: what goes wrong.
        rule: the number that is compared.
        side: `above` or `below`: where the alarm is given.
        threshold: that number's.
        origin: where the threshold is from.
        action: what to do.
        source: who describes the failure.
        reads: the metrics.
    """

    name: str
    says: str
    mechanism: str
    rule: str
    side: str
    threshold: float
    origin: str
    action: str
    source: str
    reads: tuple[str, ...]


@cache
def rules() -> dict[str, Rule]:
    """Composition rules by name, in the order of their module."""
    file = PACKAGE / "audit" / "rules.py"
    exported = _exported(file)
    found = {}
    for entry in _functions(file, "opd.audit.rules"):
        if entry.name in exported:
            name = entry.name.replace("_", "-")
            level, reason, way_out, source = map(
                entry.section, ("Level", "Reason", "Way out", "Source")
            )
            found[name] = Rule(name, entry.name, level, entry.summary, reason, way_out, source)
    return found


@cache
def methods() -> dict[str, Entry]:
    """Published methods by name."""
    exported = _exported(PACKAGE / "methods" / "__init__.py")
    found = {}
    for file in sorted((PACKAGE / "methods").glob("*.py")):
        for entry in _functions(file, f"opd.methods.{file.stem}"):
            if entry.name in exported:
                found[entry.name] = entry
    return dict(sorted(found.items()))


@cache
def formulas() -> dict[str, Entry]:
    """Formulas by `module.name`, in the order of the modules."""
    found = {}
    for module in FORMULA_MODULES:
        file = PACKAGE / "formula" / f"{module}.py"
        exported = _exported(file)
        for entry in _functions(file, f"opd.formula.{module}"):
            if entry.name in exported:
                found[f"{module}.{entry.name}"] = entry
    return found


@cache
def diagnostics() -> dict[str, Diagnostic]:
    """Diagnostics by name, in the order of the modules."""
    found = {}
    for module in DIAGNOSTIC_MODULES:
        file = PACKAGE / "diagnose" / f"{module}.py"
        exported = _exported(file)
        for entry in _functions(file, module):
            if entry.name in exported:
                sections = map(
                    entry.section, ("Formula", "Unit", "Reading", "Action", "Cost", "Source")
                )
                found[entry.name] = Diagnostic(
                    entry.name,
                    entry.section("Id") or entry.name,
                    module,
                    entry.arguments,
                    entry.knobs,
                    entry.summary,
                    *sections,
                )
    return found


@cache
def alarms() -> dict[str, Alarm]:
    """Alarms by name, in the order of their table of thresholds."""
    file = PACKAGE / "diagnose" / "alarms.py"
    thresholds = constants("diagnose/alarms.py")["THRESHOLDS"]
    entries = {entry.name: entry for entry in _functions(file, "opd.diagnose.alarms")}
    found = {}
    for name, (side, threshold, origin) in thresholds.items():
        entry = entries[name]
        found[name] = Alarm(
            name=name,
            says=entry.summary,
            mechanism=entry.section("Mechanism"),
            rule=entry.section("Rule"),
            side=side,
            threshold=threshold,
            origin=origin,
            action=entry.section("Action"),
            source=entry.section("Source"),
            reads=_metrics_read(file, name),
        )
    return found


def _metrics_read(file: Path, name: str) -> tuple[str, ...]:
    """The metrics that a function names: the texts with a slash, its docstring apart."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            texts = [
                n.value
                for part in node.body[1:]
                for n in ast.walk(part)
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
            return tuple(dict.fromkeys(text for text in texts if "/" in text))
    return ()


@cache
def constants(file: str) -> dict[str, Any]:
    """The constants of a module of the library that are written out, by name.

    Args:
        file: the module's, from the package's folder.
    """
    found = {}
    for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                with suppress(ValueError):  # what is computed is no constant
                    found[ast.unparse(target)] = ast.literal_eval(node.value)
    return found


def _functions(file: Path, module: str) -> Iterator[Entry]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield Entry(
                node.name,
                module,
                tuple(argument.arg for argument in node.args.args),
                tuple(argument.arg for argument in node.args.kwonlyargs),
                ast.get_docstring(node) or "",
            )


def _exported(file: Path) -> frozenset[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            names: list[str] = ast.literal_eval(node.value)
            return frozenset(names)
    return frozenset()

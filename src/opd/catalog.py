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

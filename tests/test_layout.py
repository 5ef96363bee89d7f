"""Who may import whom, walked with the syntax tree: every import counts, late ones too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import opd

PACKAGE = Path(opd.__file__).parent
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    .removesuffix("__init__")
    .rstrip("."): file
    for file in PACKAGE.rglob("*.py")
}

TOP = {"types", "errors", "fields", "schedule"}
CORE = TOP | {"user_code", "formula", "terms", "objective", "methods", "spec", "catalog"}
PARTS = {"head", "models", "fastpath", "student", "data", "rollout", "teacher", "critic", "audit"}
ALL_PARTS = CORE | PARTS

# A part and what it may import; a part may always import itself.
MAY_IMPORT: dict[str, set[str]] = {
    # a state source holds schedules; those of a mixture's weights may go wrong in a run
    "types": {"schedule", "errors"},
    "errors": set(),
    "user_code": {"errors"},
    "schedule": {"errors"},
    "fields": set(),
    "catalog": set(),
    # what the files of the token records are called: whoever writes and whoever reads them
    "token_columns": set(),
    "formula": TOP,
    "terms": TOP | {"formula"},
    "objective": TOP | {"formula", "terms"},
    # the index of methods is made of their docstrings
    "methods": TOP | {"formula", "objective", "catalog"},
    "spec": TOP | {"formula", "terms", "objective", "methods", "user_code"},
    "head": TOP | {"formula", "terms", "objective"},
    # a built-in model reads and writes with the tokenizer of its task
    "models": {"types", "errors", "formula", "data"},
    # another way through a backbone, for whoever runs one
    "fastpath": {"types", "errors", "models"},
    "student": TOP | {"formula", "objective", "head", "models", "fastpath"},
    "data": {"types", "errors", "user_code"},
    # pack counts the rows of each kind, which the objective defines
    "rollout": {"types", "errors", "data", "models", "fastpath", "objective"},
    # a local teacher scores micro-batches, which pack cuts; a router may be a user's function
    "teacher": {
        "types",
        "errors",
        "formula",
        "data",
        "models",
        "head",
        "rollout",
        "fastpath",
        "user_code",
    },
    "critic": TOP | {"formula"},
    # the oracle enumerates through the very path that trains: pack, signal phase and head
    # the rules are told by their docstrings
    "audit": TOP | {"formula", "objective", "head", "rollout", "catalog"},
    "diagnose": ALL_PARTS | {"token_columns"},
    "training": ALL_PARTS | {"diagnose", "token_columns"},
    "report": {"types", "errors", "token_columns"},
    "lab": ALL_PARTS | {"diagnose", "training", "report"},
    "api": ALL_PARTS | {"diagnose", "training"},
    # for whoever tests a loss with pytest
    "pytest_plugin": {"audit", "user_code"},
    "cli": ALL_PARTS | {"diagnose", "training", "report", "lab", "api"},
}
NOBODY_IMPORTS = {"integrations", "cli", "pytest_plugin"}
TORCH_FREE = (
    "",
    "errors",
    "schedule",
    "fields",
    "catalog",
    "training.config",
    "cli.main",
    "cli.query",
    "report.queries",
    "pytest_plugin",
)
"""What `--help`, a mistake in a run file and `opd query` may wait for."""


def part(module: str) -> str:
    return module.split(".")[0]


def imports(file: Path) -> Iterator[str]:
    """Absolute names a file imports, wherever in it; names of `from` imports joined on."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(file: Path) -> set[str]:
    """Parts of the library that a file imports."""
    names = (name.removeprefix("opd.") for name in imports(file) if name.startswith("opd."))
    return {part(name) for name in names if not name.startswith("__")}


def test_every_part_has_a_place_in_the_order() -> None:
    known = set(MAY_IMPORT) | {"integrations", ""}
    unknown = {part(module) for module in MODULES if not part(module).startswith("__")} - known
    assert not unknown, f"say in tests/test_layout.py what {sorted(unknown)} may import"


def test_imports_point_one_way() -> None:
    wrong = {
        f"{module} imports {other}"
        for module, file in MODULES.items()
        for other in own_imports(file)
        if part(module) in MAY_IMPORT
        and other != part(module)
        and other not in MAY_IMPORT[part(module)]
    }
    assert not wrong


def test_the_allowed_imports_have_no_cycle() -> None:
    placed: set[str] = set()
    left = dict(MAY_IMPORT)
    while left:
        free = {name for name, may in left.items() if may - {name} <= placed}
        assert free, f"a cycle among {sorted(left)}"
        placed |= free
        left = {name: may for name, may in left.items() if name not in free}


def test_formulas_import_torch_and_the_four_top_files_only() -> None:
    allowed = {"torch", "jaxtyping", "math", "types", "__future__", "collections"}
    for module, file in MODULES.items():
        if part(module) != "formula":
            continue
        for name in imports(file):
            if name.startswith("opd."):
                assert name.split(".")[1] in TOP | {"formula"}, f"{module} imports {name}"
            else:
                assert name.split(".")[0] in allowed, f"{module} imports {name}"


def test_the_catalog_needs_the_standard_library_only() -> None:
    for name in imports(MODULES["catalog"]):
        assert name.split(".")[0] in sys.stdlib_module_names, name


def test_nothing_imports_what_stands_at_the_end() -> None:
    for module, file in MODULES.items():
        ends = own_imports(file) & NOBODY_IMPORTS - {part(module)}
        assert not ends or module == "__main__", f"{module} imports {ends}"


def top_level_imports(file: Path) -> set[str]:
    """What runs on import: not inside a function, not for type checkers only."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_what_help_and_config_errors_read_loads_no_torch() -> None:
    heavy = {"torch", "transformers", "jaxtyping", "peft", "datasets", "matplotlib"}
    for start in TORCH_FREE:
        seen, queue = set(), [start]
        while queue:
            module = queue.pop()
            if module in seen or module not in MODULES:
                continue
            seen.add(module)
            for name in top_level_imports(MODULES[module]):
                assert name.split(".")[0] not in heavy, f"{start} loads {name} through {module}"
                if name.startswith("opd."):
                    parts = name.removeprefix("opd.").split(".")
                    queue += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def test_no_public_name_shares_a_modules_name() -> None:
    modules = {part(module) for module in MODULES}
    assert {"training", "formula", "objective"} <= modules
    assert not modules & set(opd.__all__)

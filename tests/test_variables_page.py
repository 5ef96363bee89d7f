"""The page of the nine variables names what exists, and leaves out no formula."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from opd import catalog
from opd.formula.support import TAILS
from opd.methods.variables import VARIABLES
from opd.terms import MODES, REDUCTIONS, TERMS
from opd.types import ROW_KINDS, VIEW_SOURCES, StateSource, TeacherView

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/variables.md"
INDEX = ROOT / "src/opd/methods/index.json"
OUTCOME = "outcome coupling"
SECTIONS = (*VARIABLES, OUTCOME)
PARTS = ("Choices", "Methods", "Look at", "Failures", "Recipes", "Open")
FORMULAS_ELSEWHERE = ("reduce",)

OTHER_NAMES = frozenset(
    {
        "prompt",  # columns that a context may name
        "Hint",
        "answer",
        "sibling",  # what a rollout puts into one
        "feedback",
        "anchor",  # keys of a run file
        "route",
        "merge_stop_ids",
        "reference",  # a view that is always there
        "schedule",  # in place of a number
        "switch",
        "arithmetic",  # a way to mix views
    }
)
"""What the lists of choices and methods may name beside formulas, methods and settings."""


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


@cache
def sections() -> dict[str, str]:
    found = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text(), re.M | re.S)
    return {title.lower(): body for title, body in found}


def part(section: str, name: str) -> str:
    """What stands after the bold name, up to the next of them."""
    names = "|".join(PARTS)
    (body,) = re.findall(
        rf"^- \*\*{name}\*\*(.*?)(?=^- \*\*(?:{names})\*\*|\Z)", sections()[section], re.M | re.S
    )
    assert isinstance(body, str)
    return body


def in_backticks(body: str) -> list[str]:
    return re.findall(r"`([^`]+)`", body)


def names_in(body: str) -> set[str]:
    """Every identifier in backticks."""
    return {name for span in in_backticks(body) for name in re.findall(r"[A-Za-z_]\w*", span)}


def formula_names() -> set[str]:
    return {entry.name for entry in catalog.formulas().values()}


def setting_names() -> set[str]:
    """Fields of states, views and terms, the values that they choose from, and knobs."""
    kept = {field.name for kind in (StateSource, TeacherView) for field in fields(kind)}
    for kind, term in TERMS.items():
        kept |= {kind, *(field.name for field in fields(term))}
    kept |= {"kind", *TAILS, *MODES, *REDUCTIONS, *ROW_KINDS, *VIEW_SOURCES}
    return kept | {knob for entry in catalog.formulas().values() for knob in entry.knobs}


def test_the_sections_are_the_nine_variables_in_the_survey_s_order_and_outcome_coupling() -> None:
    assert tuple(sections()) == SECTIONS
    table = text().split("\n## ", 1)[0]
    rows = re.findall(r"^\| \[(.+?)\]\(#(.+?)\)", table, re.M)
    assert tuple(name for name, _ in rows) == SECTIONS


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_says_what_it_decides_and_has_every_part(section: str) -> None:
    body = sections()[section]
    assert re.findall(r"^- \*\*(.+?)\*\*", body, re.M) == list(PARTS)
    decides = body.split("- **", 1)[0].strip()
    assert 2 <= len(re.findall(r"\.(?:\s|$)", re.sub(r"Eq\. ", "", decides))) <= 4


@pytest.mark.parametrize("section", SECTIONS)
def test_every_name_among_the_choices_and_the_methods_exists(section: str) -> None:
    known = formula_names() | set(catalog.methods()) | setting_names() | OTHER_NAMES
    named = names_in(part(section, "Choices") + part(section, "Methods"))
    assert named
    assert named <= known


def test_every_other_name_that_is_allowed_is_used() -> None:
    named = set[str]()
    for section in SECTIONS:
        named |= names_in(part(section, "Choices") + part(section, "Methods"))
    assert named >= OTHER_NAMES


@pytest.mark.parametrize("section", SECTIONS)
def test_the_methods_are_methods(section: str) -> None:
    named = in_backticks(part(section, "Methods"))
    assert len(named) == len(set(named)) >= 4
    assert set(named) <= set(catalog.methods())


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_methods_depart_from_the_commonest_choice_of_their_variable(variable: str) -> None:
    rows = {row["name"]: row["variables"][variable] for row in json.loads(INDEX.read_text())}
    ((common, _),) = Counter(rows.values()).most_common(1)
    for name in in_backticks(part(variable, "Methods")):
        assert rows[name] != common, f"{name} is {common}"


def test_every_formula_of_a_slot_is_named_among_the_choices() -> None:
    named = set[str]()
    for section in SECTIONS:
        named |= names_in(part(section, "Choices"))
    missing = {
        name
        for name, entry in catalog.formulas().items()
        if name.partition(".")[0] not in FORMULAS_ELSEWHERE and entry.name not in named
    }
    assert not missing


def test_formulas_of_one_kind_stand_under_their_variable() -> None:
    places = {
        "support": "support",
        "divergence": "update route",
        "surrogate": "update route",
        "credit": "temporal credit",
        "weight": "gate / weight",
        "selection": "gate / weight",
        "response": "gate / weight",
        "routing": "vocabulary routing",
        "regulariser": "regulariser",
        "outcome": OUTCOME,
    }
    for name, entry in catalog.formulas().items():
        if place := places.get(name.partition(".")[0]):
            assert entry.name in names_in(part(place, "Choices")), name


@pytest.mark.parametrize("section", SECTIONS)
def test_every_recipe_exists(section: str) -> None:
    named = in_backticks(part(section, "Recipes"))
    assert named
    for name in named:
        places = (ROOT / f"recipes/{name}.toml", ROOT / f"recipes/methods/{name}.toml")
        assert any(place.is_file() for place in places), name


def test_every_metric_is_one_of_the_run_folder() -> None:
    page = (ROOT / "docs/run_folder.md").read_text(encoding="utf-8")
    known = set(in_backticks(re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)))
    for section in SECTIONS:
        metrics = {
            name
            for name in in_backticks(part(section, "Look at"))
            if re.fullmatch(r"[a-z]+/[\w/]+", name)
        }
        unknown = metrics - known - {"changed/TERM/smoothing"}
        assert not unknown, (section, unknown)


def test_every_file_in_the_table_exists() -> None:
    paths = [name for name in in_backticks(text()) if name.startswith(("src/", "docs/"))]
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path

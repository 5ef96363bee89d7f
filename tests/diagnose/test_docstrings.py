"""What `opd list diagnostics` and the page say is complete, and says who says so."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from opd import catalog, diagnose
from tests.test_docs import module_from

ROOT = Path(__file__).parents[2]

# The rows of the survey's tables of state compatibility, and of concrete diagnostics. The log-ratio
# histogram goes by `log_ratio`, the hedging rate by `hedging`.
COMPATIBILITY = """overlap overlap_mass overlap_advantage entropy_gap teacher_nll excess_surprise
    teacher_confidence dispersion drift_profile change_point recoverability tokenizer
    chat_template"""
CONCRETE = """rkl fkl log_ratio neg_frac neg_mass grad_concentration routable_frac leak
    realised_routing support_gap marginal_info align_auc split_delta grad_cos critic credit_var
    stale cache_drift prefix_suffix length trunc_frac rep_n entropy ece hedging priv_gap
    teacher_conflict self_distill_zero"""

SECTIONS = ("Formula", "Unit", "Reading", "Action", "Cost", "Source")

ALL = catalog.diagnostics()


def test_the_ids_are_those_of_the_survey_and_none_is_left_out() -> None:
    assert {each.id for each in ALL.values()} == {*COMPATIBILITY.split(), *CONCRETE.split()}


def test_what_is_listed_is_what_can_be_imported() -> None:
    assert sorted(ALL) == sorted(diagnose.__all__)
    for name, each in ALL.items():
        function = getattr(diagnose, name)
        assert function.__module__ == f"opd.diagnose.{each.module}"
        parameters = inspect.signature(function).parameters.values()
        knobs = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        assert (each.arguments, each.knobs) == (
            tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY),
            knobs,
        )


@pytest.mark.parametrize("name", ALL)
def test_a_docstring_has_its_sections_in_their_order(name: str) -> None:
    text = inspect.getdoc(getattr(diagnose, name)) or ""
    titles = re.findall(r"^([A-Z][a-z]+): ", text, re.M)
    assert titles in ([*SECTIONS], [*SECTIONS, "Id"])
    each = ALL[name]
    assert text.startswith(f"{each.measures}\n\nFormula: ")
    assert each.measures.endswith(".")
    for part in (each.formula, each.unit, each.reading, each.action, each.cost, each.source):
        assert part
    # Whole: what the sections hold is all there is.
    parts = [each.measures, each.formula, each.unit, each.reading, each.action, each.cost]
    words = " ".join([*parts, each.source, each.id if "Id" in titles else ""]).split()
    assert re.sub(r"^[A-Z][a-z]+: ", "", text, flags=re.M).split() == words


PUBLISHED = """top_k_overlap student_overlap_mass teacher_top_mass overlap_advantage entropy_gap
    teacher_surprise teacher_confidence teacher_margin dispersion_by_bin change_point recoverability
    reverse_kl forward_kl log_ratio calibration_error"""
"""Measures that are somebody's; all others are derived from the words of the survey."""


def test_a_source_names_the_part_of_the_survey_and_whose_the_formula_is() -> None:
    for each in ALL.values():
        assert "arXiv:2606.22793" in each.source
        assert re.search(r"section|Table|Eqs?\.|case studies", each.source), each.name
    ours = {name for name, each in ALL.items() if "our own derivation" in each.source}
    assert set(ALL) - ours == set(PUBLISHED.split())


def test_the_page_is_up_to_date() -> None:
    make = module_from("make_diagnostics_page", ROOT / "docs/make_diagnostics_page.py")
    page = (ROOT / "docs/diagnostics.md").read_text(encoding="utf-8")
    assert page == make.page(), "python docs/make_diagnostics_page.py"
    assert re.findall(r"^### `(\w+)`$", page, re.M) == [
        name for module in make.TITLES for name, each in ALL.items() if each.module == module
    ]
    assert set(make.TITLES) == set(catalog.DIAGNOSTIC_MODULES)

"""`docs/results/audit.md` and the results behind it: current, and as the sources say."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from opd.audit.adapters import ADAPTERS
from opd.audit.targets import claim_of
from opd.cli.main import COMMANDS
from opd.errors import ConfigError
from tests.test_docs import ROOT, module_from

RESULT = json.loads((ROOT / "benchmarks/results/audit_packages.json").read_text())["packages"]
ROWS = [row for found in RESULT.values() for row in found["rows"]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return module_from("audit_packages", ROOT / "benchmarks/audit_packages.py")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_is_up_to_date() -> None:
    make = module_from("make_audit_page", ROOT / "docs/make_audit_page.py")
    said = "python docs/make_audit_page.py"
    assert (ROOT / "docs/results/audit.md").read_text(encoding="utf-8") == make.page(), said


def test_every_case_has_a_result_and_every_result_a_case(script: ModuleType) -> None:
    assert list(RESULT) == list(script.PACKAGES)
    said = "python benchmarks/audit_packages.py --result benchmarks/results/audit_packages.json"
    assert [row["command"] for row in ROWS] == [case.command for case in script.cases()], said
    assert [row["called"] for row in ROWS] == [case.called for case in script.cases()], said


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['package']}: {row['called']}")
def test_the_verdict_is_what_the_source_says(row: dict[str, Any]) -> None:
    assert row["agrees"], row


@pytest.mark.parametrize("package", RESULT)
def test_a_result_says_where_it_is_from(package: str) -> None:
    found = RESULT[package]
    assert f"--package {package}" in found["command"]
    assert {"python", "torch"} <= set(found["versions"])
    assert found["version"]
    assert found["install"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["command"])
def test_a_command_can_be_typed(row: dict[str, Any]) -> None:
    words = shlex.split(row["command"])
    assert words[:2] == ["opd", "audit"]
    arguments = COMMANDS["audit"].parser("audit").read(words[2:])
    assert arguments.targets == [row["target"]]
    assert arguments.adapter in ADAPTERS
    assert (arguments.written_by or "student") == row["writer"]
    if row["claim"]:
        assert claim_of(arguments.claim).text == row["claim"]


def test_a_package_that_is_missing_is_not_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = script.Package("Gone", "not_to_be_found", "not-to-be-found", "pip install it")
    monkeypatch.setitem(script.PACKAGES, "trl", gone)
    assert script.run(["trl"]) == {}
    assert capsys.readouterr().out == "trl: not installed\n"
    monkeypatch.setattr(sys, "argv", ["audit_packages.py", "--package", "trl"])
    with pytest.raises(ConfigError, match="trl cannot be imported by"):
        script.main()


def test_one_package_replaces_its_own_results_alone(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    script.merge(file, {"verl": {"version": "1"}, "trl": {"version": "1"}})
    script.merge(file, {"verl": {"version": "2"}})
    told = json.loads(file.read_text())["packages"]
    assert list(told) == ["trl", "verl"]
    assert [found["version"] for found in told.values()] == ["1", "2"]


def test_a_row_says_what_was_found_or_why_nothing_was(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "ROOT", ROOT)

    def case(name: str, **rest: Any) -> Any:
        target = f"opd.audit.specimens:{name}"
        return script.Case("trl", target, "rows", "it: reverse KL", "reverse_kl", **rest)

    audited: Callable[[Any], dict[str, Any]] = script.audited
    row = audited(case("k3_called_reverse_kl", known="forward KL", faults=("another-divergence",)))
    assert row["agrees"]
    assert row["holds"] is False
    assert "does not hold" in script._line(row)
    row = audited(case("k3_called_reverse_kl", known="reverse KL"))
    assert not row["agrees"]
    assert "NOT WHAT IS KNOWN" in script._line(row)
    row = audited(case("no_such_loss"))
    assert row["status"].startswith("ConfigError: ")
    assert not row["agrees"]
    assert row["status"] in script._line(row)
    assert audited(case("no_such_loss", refused=True))["agrees"]

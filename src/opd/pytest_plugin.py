"""The pytest plug-in: losses audited beside the tests they belong to. Imports no torch by itself.

    pytest --opd-audit my_losses:reverse_kl=reverse_kl --opd-audit my_losses:jsd=jsd:0.5

adds one test per loss, and the fixture `opd_audit` does the same from inside a test:

    def test_my_loss(opd_audit):
        opd_audit(my_losses.reverse_kl, claim="reverse_kl")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from opd.audit.verdict import Verdict

__all__ = ["opd_audit", "pytest_addoption", "pytest_collection_modifyitems"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--opd-audit` and `--opd-adapter`."""
    group = parser.getgroup("opd", "audit of distillation losses")
    group.addoption(
        "--opd-audit",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION[=CLAIM]",
        help="audit this loss as a test: it descends what it claims and has no fault; may be "
        "repeated",
    )
    group.addoption(
        "--opd-adapter",
        default="rows",
        metavar="NAME",
        help="how the losses of --opd-audit are called; see `opd audit --help`",
    )


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add one test per loss that was named on the command line."""
    items.extend(_audits(session, config))


def _audits(session: pytest.Session, config: pytest.Config) -> Iterator[_AuditItem]:
    for text in config.getoption("--opd-audit"):
        target, _, claim = text.partition("=")
        yield _AuditItem.from_parent(
            session,
            name=f"opd-audit[{text}]",
            target=target,
            claim=claim or None,
            adapter=config.getoption("--opd-adapter"),
        )


class _AuditItem(pytest.Item):
    def __init__(self, *, target: str, claim: str | None, adapter: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.target, self.claim, self.adapter = target, claim, adapter

    def runtest(self) -> None:
        from opd.user_code import find_function

        function = find_function(self.target, Path.cwd())
        _hold(_audit(function, self.target, self.claim, self.adapter, {}))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The verdict alone; a traceback of what is not an assertion."""
        if isinstance(excinfo.value, AssertionError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


@pytest.fixture
def opd_audit() -> Callable[..., Verdict]:
    """Audit a loss and fail the test if it has a fault or does not descend what it claims.

    Called as `opd_audit(loss, claim="reverse_kl", adapter="rows", **options)`; returns the
    verdict.
    """

    def check(
        loss: Callable[..., Any],
        *,
        claim: str | None = None,
        adapter: str = "rows",
        **options: Any,
    ) -> Verdict:
        name = getattr(loss, "__name__", type(loss).__name__)
        return _hold(_audit(loss, name, claim, adapter, options))

    return check


def _audit(
    loss: Callable[..., Any], name: str, claim: str | None, adapter: str, options: dict[str, Any]
) -> Verdict:
    from opd.audit.adapters import adapt
    from opd.audit.verdict import audit_loss

    return audit_loss(adapt(loss, name, adapter, **options), claim=claim)


def _hold(verdict: Verdict) -> Verdict:
    """Fail with everything that is at fault."""
    lines = [f"{verdict.name} {verdict.sentence}"]
    lines += [f"  {fault.name}: {fault.message}" for fault in verdict.faults]
    assert not verdict.faults, "\n".join(lines)
    return verdict

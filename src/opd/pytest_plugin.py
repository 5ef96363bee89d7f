"""The pytest plug-in: losses audited beside the tests they belong to. Imports no torch by itself.

    pytest --opd-audit my_losses:reverse_kl=reverse_kl --opd-audit my_losses:jsd=jsd:0.5

adds one test per loss, and the fixture `opd_audit` does the same from inside a test:

    def test_my_loss(opd_audit):
        opd_audit(my_losses.reverse_kl, claim="reverse_kl")

A test needs something to hold a loss to: a divergence, or `none`, which is that there is no fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from opd.audit.loss import Writer
    from opd.audit.verdict import Verdict

__all__ = ["opd_audit", "pytest_addoption", "pytest_collection_modifyitems"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--opd-audit` and `--opd-adapter`."""
    group = parser.getgroup("opd", "audit of distillation losses")
    group.addoption(
        "--opd-audit",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION=CLAIM",
        help="audit this loss as a test: it descends what it claims, or with `none` as its claim "
        "has no fault; may be repeated",
    )
    group.addoption(
        "--opd-adapter",
        default="rows",
        metavar="NAME",
        help="how the losses of --opd-audit are called; see `opd audit --help`",
    )
    group.addoption(
        "--opd-written-by",
        default="student",
        choices=("student", "teacher"),
        help="who wrote the tokens of the losses of --opd-audit",
    )


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add one test per loss that was named on the command line."""
    items.extend(_audits(session, config))


def _audits(session: pytest.Session, config: pytest.Config) -> Iterator[_AuditItem]:
    for text in config.getoption("--opd-audit"):
        target, _, claim = text.partition("=")
        if not claim:
            raise pytest.UsageError(
                f"--opd-audit {text}: say what it should descend, as in {text}=reverse_kl, or "
                f"{text}=none for no fault; see `opd audit --help`"
            )
        yield _AuditItem.from_parent(
            session,
            name=f"opd-audit[{text}]",
            target=target,
            claim=claim,
            adapter=config.getoption("--opd-adapter"),
            writer=config.getoption("--opd-written-by"),
        )


class _AuditItem(pytest.Item):
    def __init__(
        self, *, target: str, claim: str, adapter: str, writer: Writer, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.target, self.claim, self.adapter, self.writer = target, claim, adapter, writer

    def runtest(self) -> None:
        from opd.user_code import find_function

        function = find_function(self.target, Path.cwd())
        _hold(_audit(function, self.target, self.claim, self.adapter, self.writer, {}))

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


@pytest.fixture
def opd_audit() -> Callable[..., Verdict]:
    """Audit a loss and fail the test if it does not descend what it claims, or has a fault.

    Called as `opd_audit(loss, claim="reverse_kl", adapter="rows", writer="student", **options)`;
    returns the verdict. The claim "none" asks for no fault alone.
    """

    def check(
        loss: Callable[..., Any],
        *,
        claim: str,
        adapter: str = "rows",
        writer: Writer = "student",
        **options: Any,
    ) -> Verdict:
        name = getattr(loss, "__name__", type(loss).__name__)
        return _hold(_audit(loss, name, claim, adapter, writer, options))

    return check


def _audit(
    loss: Callable[..., Any],
    name: str,
    claim: str,
    adapter: str,
    writer: Writer,
    options: dict[str, Any],
) -> Verdict:
    from opd.audit.adapters import adapt
    from opd.audit.verdict import audit_loss

    return audit_loss(adapt(loss, name, adapter, **options), claim=claim, writer=writer)


def _hold(verdict: Verdict) -> Verdict:
    """Fail with everything that is at fault."""
    if not verdict.holds:
        lines = [f"{verdict.name} {verdict.sentence}"]
        lines += [f"  {fault.name}: {fault.message}" for fault in verdict.faults]
        pytest.fail("\n".join(lines), pytrace=False)
    return verdict

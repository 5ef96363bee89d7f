"""The frameworks' run files compute what their heads and the page say. They train in tests/e2e."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import pytest
import torch

import opd
from opd import catalog, methods
from opd.audit import compare, expectation, local_gradient, random_tree
from opd.cli.main import main
from opd.formula import divergence
from opd.formula import reward as rewards
from opd.formula import surrogate as surrogates
from opd.methods.variables import VARIABLES
from opd.objective import Sampled
from opd.types import Bound
from opd.user_code import find_function
from tests.test_docs import module_from

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes/frameworks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.toml"))
PAGE = ROOT / "docs/frameworks.md"

EXACTLY = {
    "trl": "reverse_kl",
    "verl": "none",
    "verl_examples": "reverse_kl",
    "slime": "reverse_kl",
    "nemo_rl": "none",
    "ms_swift": "jensen_shannon",
    "skyrl": "reverse_kl",
    "prime_rl": "reverse_kl",
    "roll": "reverse_kl",
    "tinker_cookbook": "reverse_kl",
    "cosmos_rl": "reverse_kl",
    "kdflow": "forward_kl",
}


@pytest.fixture(scope="module")
def make() -> ModuleType:
    return module_from("make_framework_page", ROOT / "docs/make_framework_page.py")


@pytest.fixture(autouse=True)
def _shapes_unchecked() -> Iterator[None]:
    """Formulas run thousands of times on tiny tensors: shapes are checked where they live."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def formula(name: str) -> Callable[..., Any]:
    return find_function(f"formulas:{name}", FOLDER)


# --------------------------------------------------------------------------------------------
# Heads and page


def test_every_run_file_is_on_the_page_and_none_besides(make: ModuleType) -> None:
    assert sorted(make.FRAMEWORKS) == NAMES == sorted(EXACTLY)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_is_complete(make: ModuleType, name: str) -> None:
    said = make.head(name)
    assert all(said.values())
    assert said["evidence"] == "E1"
    assert re.search(r"\d", said["version"]), said["version"]
    assert re.search(r"\w+/\w+", said["source"])


def test_a_head_that_is_incomplete_or_has_another_line_is_refused(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    (tmp_path / "short.toml").write_text("# framework: x\n\nthreads = 1\n")
    with pytest.raises(ValueError, match="its head says framework; say framework, version"):
        make.head("short")
    (tmp_path / "other.toml").write_text("# framework: x\n# and more\n\nthreads = 1\n")
    with pytest.raises(ValueError, match="is no line of its head"):
        make.head("other")


def test_the_page_is_up_to_date(make: ModuleType) -> None:
    said = "python docs/make_framework_page.py"
    assert PAGE.read_text(encoding="utf-8") == make.page(), said


def test_the_page_names_methods_that_exist(make: ModuleType) -> None:
    named = {here.strip("`") for _, _, here in make.OTHERS if ":" not in here}
    assert named <= set(catalog.methods())


# --------------------------------------------------------------------------------------------
# What they descend


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_descends_exactly_what_the_head_says(make: ModuleType, name: str) -> None:
    found = make.measured(name)
    claim, _, instead = make.head(name)["descends"].partition(", but ")
    assert claim == found.descends == EXACTLY[name]
    assert bool(instead) == (claim == "none")
    if claim == "none":
        assert all(max(each) < 1 - 1e-4 for each in found.cosines.values())
    else:
        assert min(found.cosines[found.descends]) >= 1 - 1e-9


def test_the_length_is_right_too() -> None:
    """A cosine does not see a factor: a sampled step has the divergence's own size."""
    world = random_tree(5, vocab_size=4)
    target = local_gradient(world, divergence.reverse_kl)
    for name in ("verl_examples", "slime", "skyrl", "prime_rl", "tinker_cookbook", "cosmos_rl"):
        gradient = expectation(load_method(name).objective, world).gradient
        assert compare(gradient, target).relative_error < 1e-10, name


def test_without_its_bound_verls_default_descends_the_forward_kl(make: ModuleType) -> None:
    assert make.measure(methods.k3_opd().objective).descends == "forward_kl"


def test_only_a_log_ratio_of_the_moment_survives_older_text(make: ModuleType) -> None:
    assert make.measured("prime_rl").older > 1 - 1e-3
    assert make.measured("skyrl").older < 1 - 1e-3
    assert make.measured("slime").older < make.measured("skyrl").older


# --------------------------------------------------------------------------------------------
# Formulas beside the run files


def test_bounded_k3_is_k3_inside_its_bounds_and_flat_outside() -> None:
    student = torch.tensor([-1.0, -4.0, -1.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-1.5, -1.0, -20.0], dtype=torch.float64)
    knobs = {"most_nats": 10.0, "largest_log_ratio": 20.0}
    value = formula("bounded_k3")(student, teacher, **knobs)
    inside = math.exp(-0.5) - 1 + 0.5
    assert value.tolist() == pytest.approx([inside, 10.0, 10.0])
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.tolist() == pytest.approx([1 - math.exp(-0.5), 0.0, 0.0])
    plain = divergence.forward_kl_k3(student, teacher)
    assert value[0].item() == pytest.approx(plain[0].item())
    held = formula("bounded_k3").counted(student, teacher, **knobs)  # type: ignore[attr-defined]
    assert held.tolist() == [False, True, True]
    far = formula("bounded_k3")(student, teacher, most_nats=1e9, largest_log_ratio=2.0)
    assert far.tolist() == pytest.approx([inside, math.exp(2) - 3, math.exp(-2) + 1])


def test_formulas_of_the_engine_are_the_librarys_where_engine_and_trainer_agree() -> None:
    draw = torch.Generator().manual_seed(0)
    student, old, teacher, advantage = (
        torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(4)
    )
    ratio = formula("engine_log_ratio")(teacher, old)
    assert torch.equal(ratio, rewards.cached_log_ratio(teacher, old))
    loss = formula("engine_importance")(student, old, advantage)
    assert torch.equal(loss, surrogates.importance(student, old, advantage))


def test_the_gate_closes_where_a_probability_fell_far_and_drift_is_its_square() -> None:
    now = torch.tensor([0.5, 0.29, 0.31, 0.9], dtype=torch.float64).log().requires_grad_()
    then = torch.tensor([0.5, 0.5, 0.5, 0.1], dtype=torch.float64).log()
    gate = formula("not_fallen_far")(now, then, most=0.2)
    assert gate.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert not gate.requires_grad
    drift = formula("squared_drift")(now, then)
    assert drift.tolist() == pytest.approx(((now - then) ** 2).tolist())
    (gradient,) = torch.autograd.grad(drift.sum(), now)
    assert gradient[0] == 0
    assert gradient.tolist() == pytest.approx((2 * (now - then)).tolist())


# --------------------------------------------------------------------------------------------
# As run files


def load_method(name: str) -> Any:
    from opd.training.session import build_method

    return build_method(opd.load(FOLDER / f"{name}.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stands_in_the_way_of_a_run(name: str) -> None:
    findings = opd.check(opd.load(FOLDER / f"{name}.toml"))
    assert [finding for finding in findings if finding.level == "error"] == []


def test_two_of_them_can_be_compared() -> None:
    words = ["diff", str(FOLDER / "trl.toml"), str(FOLDER / "verl.toml"), "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(words) == 0
    rows = json.loads(said.getvalue())
    assert {row["variable"] for row in rows} <= set(VARIABLES)
    route = next(row for row in rows if row["variable"] == "update route")
    assert "reverse_kl" in route["first"]
    assert "bounded_k3" in route["second"]


def test_a_framework_and_a_method_that_are_alike_are_said_to_be() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["diff", str(FOLDER / "trl.toml"), "reverse_kl_opd"]) == 0
    assert "are the same composition" in said.getvalue()


def test_who_freezes_the_log_ratio_at_rollout_time() -> None:
    frozen = {
        name
        for name in NAMES
        for term in load_method(name).objective.terms
        if isinstance(term, Sampled)
        and Bound.of(term.reward).short_name in ("cached_log_ratio", "engine_log_ratio")
    }
    assert frozen == {"slime", "skyrl", "roll", "tinker_cookbook", "cosmos_rl"}

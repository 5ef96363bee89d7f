"""What the audit says of the losses of TRL, Liger and torchrl, as they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import config

from opd.audit.adapters import adapt
from opd.audit.subject import response
from opd.audit.verdict import Verdict, audit_loss
from opd.user_code import find_function

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

GKD = "trl.experimental.gkd.gkd_trainer:GKDTrainer.generalized_jsd_loss"
GOLD = "trl.experimental.gold.gold_trainer:GOLDTrainer.generalized_jsd_loss"
IW_OPD = "trl.experimental.iw_opd.iw_opd_trainer:IWOPDTrainer.generalized_jsd_loss"
CHUNKED = "trl.kernels.chunked_divergence:ChunkedDivergenceFunction"
SDPO = "trl.experimental.sdpo.loss_utils:compute_full_logit_self_distillation_loss"
LIGER = "liger_kernel.chunked_loss:LigerFusedLinearJSDLoss"
TORCHRL = "torchrl.objectives.llm:DistillationLoss"
K3 = "torchrl.objectives.llm:k3_kl_token_estimate"

CLAIMS = {0.0: "forward_kl", 0.3: "jsd:0.3", 0.5: "jsd:0.5", 1.0: "reverse_kl"}
PURE = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}


@pytest.fixture(autouse=True)
def _shapes_unchecked() -> Iterator[None]:
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def audited(
    target: str, adapter: str, claim: str, writer: Any = "student", **options: Any
) -> Verdict:
    pytest.importorskip(target.partition(".")[0])
    loss = adapt(find_function(target, Path("nowhere")), target, adapter, **options)
    return audit_loss(loss, claim=claim, writer=writer)


def faults(verdict: Verdict) -> set[str]:
    return {finding.name for finding in verdict.faults}


def statuses(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.status for check in verdict.checks}


@pytest.mark.parametrize("beta", CLAIMS)
@pytest.mark.parametrize("target", [GKD, GOLD, IW_OPD])
def test_trls_dense_divergences_are_what_they_are_called(target: str, beta: float) -> None:
    verdict = audited(target, "trl", CLAIMS[beta], beta=beta)
    assert verdict.holds, verdict.findings
    found = statuses(verdict)
    for check in ("mask", "micro-batches", "temperature", "padded vocabulary", "own row"):
        assert found[check] == "ok", check


@pytest.mark.parametrize("beta", CLAIMS)
def test_trls_chunked_divergence_is_what_it_is_called(beta: float) -> None:
    verdict = audited(CHUNKED, "trl_chunked", CLAIMS[beta], beta=beta)
    assert verdict.holds, verdict.findings
    assert statuses(verdict)["temperature"] == "ok"
    assert statuses(verdict)["bfloat16"] == "ok"


def test_trls_self_distillation_is_what_it_is_called() -> None:
    assert audited(SDPO, "pair", "reverse_kl", distillation_alpha=1.0).holds


@pytest.mark.parametrize("beta", CLAIMS)
def test_ligers_jsd_alone_is_what_it_is_called_but_for_padding(beta: float) -> None:
    verdict = audited(LIGER, "liger", CLAIMS[beta], beta=beta, **PURE)
    assert faults(verdict) == {"padding-has-mass"}
    found = statuses(verdict)
    for check in ("claim", "mask", "temperature"):
        assert found[check] == "ok", check


def test_half_of_ligers_default_is_a_cross_entropy() -> None:
    verdict = audited(LIGER, "liger", "jsd:0.5")
    assert "hard-labels" in faults(verdict)
    assert statuses(verdict)["claim"] == "ok"


@pytest.mark.parametrize(
    ("direction", "writer", "claim", "descends"),
    [
        ("reverse", "student", "reverse_kl", "forward KL"),
        ("forward", "teacher", "forward_kl", "forward KL"),
        ("forward", "student", "forward_kl", "alpha divergence, alpha -1"),
    ],
)
def test_torchrls_loss_descends_forward_kl_on_the_text_it_is_meant_for(
    direction: str, writer: str, claim: str, descends: str
) -> None:
    verdict = audited(TORCHRL, "torchrl", claim, writer, kl_direction=direction)
    assert verdict.descends == descends
    assert verdict.holds is (claim == "forward_kl" and descends == "forward KL")
    assert statuses(verdict)["mask"] == "ok"


def test_torchrls_k3_descends_forward_kl() -> None:
    verdict = audited(K3, "logp", "reverse_kl", teacher_first=True)
    assert verdict.descends == "forward KL"
    assert faults(verdict) == {"another-divergence"}


def test_a_loss_per_entry_and_a_mean_are_the_same_loss() -> None:
    pytest.importorskip("trl")
    function, rows = find_function(GKD, Path("nowhere")), response(5, 6, torch.float64)
    entries = adapt(function, "it", "trl", beta=1.0, reduction="none").call(rows)
    mean = adapt(function, "it", "trl", beta=1.0).call(rows)
    assert entries.shape == (6,)
    assert float(entries.mean()) == pytest.approx(float(mean), rel=1e-12)

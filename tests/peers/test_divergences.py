"""Our head and formulas beside those of TRL, Liger and torchrl, on the same numbers.

Where conventions differ, the mapping is part of the test: TRL's and Liger's `beta` is our
`teacher_weight`, with the forward KL at 0 and the reverse KL at 1, where the divergence of ours
would be 0; a temperature divides the logits and no T^2 follows; their means are over the tokens
that are looked at, our `token_mean`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from opd.formula import divergence
from opd.head import HeadOutput, linear_head
from opd.objective import Dense, Objective
from opd.rollout.pack import with_token
from opd.types import TeacherScores, Unembedding
from tests.builders import Case, evaluate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FLOAT64, FLOAT32 = 1e-12, 1e-5
"""Relative to the length of the peer's result; sums over some hundred terms."""

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)

Record = Callable[[str, object], None]


def of_beta(beta: float) -> Callable[..., Tensor]:
    ends = {0.0: divergence.forward_kl, 1.0: divergence.reverse_kl}
    return ends.get(beta) or partial(divergence.generalized_jsd, teacher_weight=beta)


def disagreement(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def agree(record: Record, bound: float, **pairs: tuple[Tensor, Tensor]) -> None:
    for name, (ours, theirs) in pairs.items():
        error = disagreement(ours.detach(), theirs.detach())
        record(name, error)
        assert error < bound, name


# --------------------------------------------------------------------------------------------
# Logits


@pytest.fixture
def gkd() -> Any:
    return pytest.importorskip("trl.experimental.gkd").GKDTrainer


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_and_gradients_are_those_of_trls_generalized_jsd(
    gkd: Any, beta: float, temperature: float, record_property: Record
) -> None:
    case = Case.random(0, vocab_size=50)
    found = evaluate(case, Objective(Dense(of_beta(beta)), temperature=temperature))
    logits = case.student_logits.clone().requires_grad_()
    labels = torch.where(case.mask, case.tokens, -100)
    theirs = gkd.generalized_jsd_loss(
        logits, case.teacher_logits["teacher"], labels, beta=beta, temperature=temperature
    )
    theirs.backward()
    assert logits.grad is not None
    agree(
        record_property,
        FLOAT64,
        value=(torch.tensor(found.loss, dtype=torch.float64), theirs),
        gradient=(found.gradient, case.rows(logits.grad)),
    )


@pytest.mark.parametrize("beta", BETAS)
def test_a_padded_vocabulary_changes_nothing_here_against_trl_without_padding(
    gkd: Any, beta: float, record_property: Record
) -> None:
    draw = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 20, generator=draw).double() for _ in range(2))
    theirs = gkd.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1)
    padded = [
        torch.nn.functional.pad(logits, (0, 4), value=-torch.inf) for logits in (student, teacher)
    ]
    live = padded[0].requires_grad_()
    ours = of_beta(beta)(live.log_softmax(-1), padded[1].log_softmax(-1))
    agree(record_property, FLOAT64, value=(ours, theirs))
    ours.sum().backward()
    assert live.grad is not None
    assert bool(live.grad.isfinite().all())


@pytest.mark.parametrize("seed", range(3))
def test_k3_is_torchrls_token_estimate(seed: int, record_property: Record) -> None:
    torchrl = pytest.importorskip("torchrl.objectives.llm")
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (-3 * torch.rand(200, generator=draw).double() for _ in range(2))
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    our_value = divergence.forward_kl_k3(ours, teacher)
    their_value = torchrl.k3_kl_token_estimate(teacher, theirs)
    our_value.sum().backward()
    their_value.sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    agree(
        record_property,
        FLOAT64,
        value=(our_value, their_value),
        gradient=(ours.grad, theirs.grad),
    )


# --------------------------------------------------------------------------------------------
# Hidden states


class Projected(NamedTuple):
    """Hidden states of response rows and the unembeddings of both sides, float32."""

    case: Case
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def random(cls, vocab_size: int, width: int = 24) -> Projected:
        case = Case.random(3, vocab_size=vocab_size, lengths=(9, 0, 14))
        draw = torch.Generator().manual_seed(4)
        rows = int(case.mask.sum())

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        return cls(
            case,
            normal(rows, width),
            normal(vocab_size, width) / width**0.5,
            normal(rows, width),
            1.5 * normal(vocab_size, width) / width**0.5,
        )

    def ours(self, objective: Objective, **transformed: float) -> tuple[HeadOutput, Tensor, Tensor]:
        """The head's output and the gradients of hidden states and unembedding."""
        hidden, weight = (value.clone().requires_grad_() for value in (self.hidden, self.weight))
        size = len(weight)
        teacher = TeacherScores(
            hidden=self.teacher_hidden,
            unembedding=Unembedding(self.teacher_weight, size, **transformed),  # type: ignore[arg-type]
        )
        batch = with_token(self.case.batch(dtype=torch.float32), views={"teacher": teacher})
        unembedding = Unembedding(weight, size, **transformed)  # type: ignore[arg-type]
        out = linear_head(hidden, unembedding, batch, objective)
        assert out.loss is not None
        out.loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return out, hidden.grad, weight.grad


@pytest.fixture
def chunked() -> ModuleType:
    module: ModuleType = pytest.importorskip("trl.kernels.chunked_divergence")
    return module


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("tile", "transformed"),
    [
        (32_768, {}),
        (32_768, {"logit_scale": 0.5, "soft_cap": 3.0}),
        (128, {}),
    ],
    ids=["one tile", "scaled and capped", "three tiles"],
)
def test_the_head_is_trls_chunked_divergence(
    chunked: ModuleType,
    tile: int,
    transformed: dict[str, float],
    beta: float,
    record_property: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked, "VOCAB_CHUNK_SIZE", tile)
    made = Projected.random(300)
    out, hidden_gradient, weight_gradient = made.ours(
        Objective(Dense(of_beta(beta))), **transformed
    )
    hidden, weight = (value.clone().requires_grad_() for value in (made.hidden, made.weight))
    scale, cap = transformed.get("logit_scale", 1.0), transformed.get("soft_cap")
    per_row, entropy = chunked.ChunkedDivergenceFunction.apply(
        hidden,
        weight,
        None,
        made.teacher_hidden,
        made.teacher_weight,
        None,
        beta,
        1.0,
        scale,
        cap,
        scale,
        cap,
    )
    per_row.mean().backward()
    agree(
        record_property,
        FLOAT32,
        value=(out.rows["loss/dense"], per_row),
        entropy=(out.rows["student_entropy"], entropy),
        hidden_gradient=(hidden_gradient, hidden.grad),
        weight_gradient=(weight_gradient, weight.grad),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_head_is_ligers_chunked_jsd(
    beta: float, temperature: float, record_property: Record
) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    made = Projected.random(500)
    objective = Objective(Dense(of_beta(beta)), temperature=temperature)
    out, hidden_gradient, weight_gradient = made.ours(objective)
    hidden, weight = (value.clone().requires_grad_() for value in (made.hidden, made.weight))
    fused = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=temperature,
        compiled=False,
        chunk_size=8,
    )
    labels = made.case.rows(made.case.tokens)
    theirs = fused(hidden, weight, made.teacher_hidden, made.teacher_weight, labels)
    theirs.backward()
    assert out.loss is not None
    agree(
        record_property,
        FLOAT32,
        value=(out.loss, theirs),
        hidden_gradient=(hidden_gradient, hidden.grad),
        weight_gradient=(weight_gradient, weight.grad),
    )

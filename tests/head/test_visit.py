"""What a visit does, not what it finds: products, memory, buffers, sharded and adapted operands."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd.errors import ConfigError
from opd.formula import divergence, regulariser, reward, routing, support
from opd.head import HeadOutput, linear_head, products, visit
from opd.objective import Dense, Objective, Regulariser, Routed, Sampled
from opd.rollout.pack import split, with_token
from opd.types import Batch, FieldKey, Provenance, TeacherScores, Unembedding
from tests.builders import Case

VOCAB, WIDTH, TEACHER_WIDTH = 60, 12, 16
REVERSE_KL = Objective(Dense(divergence.reverse_kl))
TOP = {"support": partial(support.student_top_k, k=4), "tail": "bucket"}
SUM = Objective(
    Dense(divergence.reverse_kl, **TOP),
    Sampled(reward=reward.teacher_log_ratio),
    Regulariser(regulariser.entropy_bonus, coef=0.1),
)
OBJECTIVES = {
    "closed": REVERSE_KL,
    "differentiated": Objective(Dense(divergence.total_variation)),
    "sum": SUM,
    "routed": Objective(
        Routed(
            Sampled(reward=reward.teacher_log_ratio, name="ratio"),
            routing.all_others,
            support=partial(support.student_top_k, k=4),
            tail="renormalise",
        )
    ),
}


class Setting:
    """Response rows of two small models, float32."""

    def __init__(self, *, lengths: tuple[int, ...] = (9, 0, 14), bias: bool = False) -> None:
        self.case = Case.random(3, vocab_size=VOCAB, lengths=lengths)
        draw = torch.Generator().manual_seed(4)
        rows = int(self.case.mask.sum())
        self.hidden = torch.randn(rows, WIDTH, generator=draw)
        self.weight = torch.randn(VOCAB + 3, WIDTH, generator=draw) / 3
        self.bias = torch.randn(VOCAB + 3, generator=draw) if bias else None
        self.teacher = TeacherScores(
            hidden=torch.randn(rows, TEACHER_WIDTH, generator=draw),
            unembedding=Unembedding(torch.randn(VOCAB, TEACHER_WIDTH, generator=draw) / 3, VOCAB),
        )

    def batch(self) -> Batch:
        return with_token(self.case.batch(dtype=torch.float32), views={"teacher": self.teacher})

    def operands(self) -> tuple[Tensor, Unembedding]:
        leaf = [
            None if value is None else value.clone().requires_grad_()
            for value in (self.hidden, self.weight, self.bias)
        ]
        hidden, weight, bias = leaf
        assert hidden is not None
        assert weight is not None
        return hidden, Unembedding(weight, VOCAB, bias)

    def answer(self, objective: Objective, **options: Any) -> tuple[HeadOutput, list[Tensor]]:
        hidden, unembedding = self.operands()
        out = linear_head(hidden, unembedding, self.batch(), objective, **options)
        assert out.loss is not None
        out.loss.backward()
        operands = (hidden, unembedding.weight, unembedding.bias)
        return out, [leaf.grad for leaf in operands if leaf is not None and leaf.grad is not None]


def bytes_of_rows(rows: int) -> int:
    """A budget for so many rows, the student's and the teacher's logits together."""
    return 2 * 4 * VOCAB * rows


# --------------------------------------------------------------------------------------------
# Products and memory


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row_is_projected_once_by_each_model_and_differentiated_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, int] = {}

    def counted(function: Callable[..., Any], rows_of: int) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            width = args[-1].weight.shape[1] if isinstance(args[-1], Unembedding) else WIDTH
            key = f"{function.__name__} {width}"
            made[key] = made.get(key, 0) + len(args[rows_of])
            return function(*args, **kwargs)

        return count

    for function, place in (
        (products.logits_into, 0),
        (products.hidden_gradient_into, 0),
        (products.add_weight_gradient, 1),
    ):
        monkeypatch.setattr(products, function.__name__, counted(function, place))
    setting = Setting()
    setting.answer(OBJECTIVES[name], chunk_bytes=bytes_of_rows(4))
    rows = len(setting.hidden)
    assert rows < setting.case.mask.numel()  # tool results and padding are no rows
    assert made == {
        f"logits_into {WIDTH}": rows,
        f"logits_into {TEACHER_WIDTH}": rows,
        f"hidden_gradient_into {WIDTH}": rows,
        f"add_weight_gradient {WIDTH}": rows,
    }


def test_a_frozen_head_makes_no_product_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the gradient of a frozen weight was computed")

    setting = Setting()
    expected = setting.answer(REVERSE_KL)[1][0]
    monkeypatch.setattr(products, "add_weight_gradient", never)
    hidden, unembedding = setting.operands()
    frozen = Unembedding(unembedding.weight.detach(), VOCAB)
    out = linear_head(hidden, frozen, setting.batch(), REVERSE_KL)
    assert out.loss is not None
    out.loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, expected)


def test_a_view_that_nothing_asks_for_is_not_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: set[int] = set()
    project = products.logits_into

    def seen(out: Tensor, hidden: Tensor, unembedding: Unembedding) -> None:
        widths.add(hidden.shape[1])
        project(out, hidden, unembedding)

    monkeypatch.setattr(products, "logits_into", seen)
    setting = Setting()
    wanted = frozenset({FieldKey("student_logp")})
    linear_head(setting.hidden, Unembedding(setting.weight, VOCAB), setting.batch(), wanted=wanted)
    assert widths == {WIDTH}


class Largest(TorchDispatchMode):
    """The most entries that a tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.entries = max([self.entries, *sizes])
        return result


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_a_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(lengths=(90, 40, 70))
    rows = 20
    assert len(setting.hidden) > 5 * rows
    batch = setting.batch()
    with Largest() as largest:
        hidden, unembedding = setting.operands()
        out = linear_head(
            hidden, unembedding, batch, OBJECTIVES[name], chunk_bytes=bytes_of_rows(rows)
        )
        assert out.loss is not None
        out.loss.backward()
    allowed = max(rows * VOCAB, hidden.numel(), unembedding.weight.numel())
    assert largest.entries <= allowed + rows * 2  # a support's mass outside pads a row by two


@pytest.mark.parametrize("name", OBJECTIVES)
def test_memory_is_written_before_it_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(bias=True)
    out, gradients = setting.answer(OBJECTIVES[name], chunk_bytes=bytes_of_rows(5))
    poured: list[int] = []

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        poured.append(math.prod(shape))
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    monkeypatch.setattr(visit, "scratch", poisoned)
    again, poisoned_gradients = setting.answer(OBJECTIVES[name], chunk_bytes=bytes_of_rows(5))
    assert len(poured) > 5  # two models' logits, three gradients, and what is found of each row
    assert torch.equal(again.loss, out.loss)  # type: ignore[arg-type]
    for ours, clean in zip(poisoned_gradients, gradients, strict=True):
        assert torch.equal(ours, clean)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_block_is_freed_without_the_garbage_collector(name: str) -> None:
    setting = Setting()
    hidden, unembedding = setting.operands()
    batch = setting.batch()
    gc.collect()
    gc.disable()
    try:
        out = linear_head(
            hidden, unembedding, batch, OBJECTIVES[name], chunk_bytes=bytes_of_rows(5)
        )
        alive = [o.shape for o in gc.get_objects() if type(o) is Tensor and o.shape == (5, VOCAB)]
    finally:
        gc.enable()
    assert out.loss is not None
    assert alive == []


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (2,)])
def test_no_row_and_few_rows_have_a_loss_and_gradients(lengths: tuple[int, ...]) -> None:
    setting = Setting(lengths=lengths, bias=True)
    out, gradients = setting.answer(SUM)
    assert out.loss is not None
    assert out.loss.isfinite()
    assert len(gradients) == 3
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert bool(gradient.any()) == bool(len(setting.hidden))


# --------------------------------------------------------------------------------------------
# Operands


def test_an_adapter_on_the_head_gets_its_gradient() -> None:
    setting = Setting()
    draw = torch.Generator().manual_seed(8)
    down = torch.randn(2, WIDTH, generator=draw).requires_grad_()
    up = torch.randn(VOCAB + 3, 2, generator=draw).requires_grad_()
    hidden, unembedding = setting.operands()
    weight = unembedding.weight.detach() + up @ down
    out = linear_head(hidden, Unembedding(weight, VOCAB), setting.batch(), REVERSE_KL)
    assert out.loss is not None
    out.loss.backward()

    plain = (setting.weight + up.detach() @ down.detach()).requires_grad_()
    student = (setting.hidden @ plain[:VOCAB].T).log_softmax(-1)
    teacher_head = setting.teacher.unembedding
    assert teacher_head is not None
    assert setting.teacher.hidden is not None
    teacher = (setting.teacher.hidden @ teacher_head.weight.T).log_softmax(-1)
    divergence.reverse_kl(student, teacher).mean().backward()
    assert plain.grad is not None
    for factor, expected in (
        (up, plain.grad @ down.detach().T),
        (down, up.detach().T @ plain.grad),
    ):
        assert factor.grad is not None
        assert (factor.grad - expected).norm() <= 1e-6 * expected.norm()


def test_a_loss_without_the_student_has_no_gradient_to_give() -> None:
    setting = Setting()
    hidden, unembedding = setting.operands()
    constant = Objective(Dense(_constant))
    out = linear_head(hidden, unembedding, setting.batch(), constant)
    assert out.loss is not None
    assert not out.loss.requires_grad


def _constant(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    return teacher_log_probs.detach()[..., 0]


def test_the_gradients_norm_is_of_an_objective() -> None:
    setting = Setting()
    key = frozenset({FieldKey("logit_gradient_norm")})
    with pytest.raises(ConfigError, match="logit_gradient_norm is of an objective's loss"):
        linear_head(setting.hidden, Unembedding(setting.weight, VOCAB), setting.batch(), wanted=key)


def test_the_gradients_norm_needs_no_gradient_to_be_kept() -> None:
    setting = Setting()
    key = FieldKey("logit_gradient_norm")
    kept = setting.answer(SUM, wanted=frozenset({key}))[0].fields[key]
    assert bool((kept > 0).all())
    frozen = Unembedding(setting.weight, VOCAB)
    out = linear_head(setting.hidden, frozen, setting.batch(), SUM, wanted=frozenset({key}))
    assert torch.equal(out.fields[key], kept)
    assert out.loss is not None
    assert not out.loss.requires_grad


@pytest.mark.parametrize(
    ("formula", "shape"), [(lambda s: s.sum(), r"\[\]"), (lambda s: s, r"\[\d+, 60\]")]
)
def test_a_formula_must_return_one_number_per_row(
    formula: Callable[[Tensor], Tensor], shape: str
) -> None:
    def wrong(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return formula(student_log_probs)

    with pytest.raises(ConfigError, match=f"returned the shape {shape} for .* one number per tok"):
        Setting().answer(Objective(Dense(wrong)))


def test_a_row_in_no_term_spoils_no_gradient_however_steep_its_loss() -> None:
    setting = Setting()
    first = torch.zeros(len(setting.hidden), dtype=torch.bool)
    first[0] = True

    def steep(student_logp: Tensor) -> Tensor:
        nothing = torch.where(first, student_logp - student_logp.detach(), 1.0)
        return student_logp * nothing.sqrt()  # whose slope is infinite where it is nothing

    provenance = setting.case.provenance.clone()
    place = tuple(setting.case.mask.nonzero()[0].tolist())
    provenance[place] = int(Provenance.TEACHER)
    batch = with_token(setting.batch(), provenance=provenance)
    hidden, unembedding = setting.operands()
    objective = Objective(Regulariser(steep, rows="student"))
    out = linear_head(hidden, unembedding, batch, objective)
    assert out.loss is not None
    out.loss.backward()
    for gradient in (hidden.grad, unembedding.weight.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
    assert hidden.grad is not None
    assert not hidden.grad[0].any()
    assert hidden.grad[1:].any(-1).all()


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.5])
def test_a_mixture_of_one_side_alone_is_refused_in_closed_form_too(weight: float) -> None:
    term = Dense(partial(divergence.generalized_jsd, teacher_weight=weight))
    with pytest.raises(ConfigError, match=r"generalized_jsd .*strictly between 0 and 1"):
        Setting().answer(Objective(term))


def test_memory_beyond_the_gradients_does_not_grow_with_the_rows() -> None:
    """Of a process each: what it holds at its peak less what it hands back."""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(rows)], capture_output=True, text=True, check=True
            ).stdout
        )
        for rows in (1024, 2560)
    ]
    assert peaks[0] > 2**28  # a chunk of logits on each side
    assert peaks[1] <= 1.1 * peaks[0]


PEAK = """
import sys, torch
from opd.formula import divergence
from opd.head import linear_head
from opd.objective import Dense, Objective
from opd.rollout.pack import pack_rollout, with_token
from opd.types import Rollout, TeacherScores, Unembedding

def status(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

torch.set_num_threads(1)
rows, width, vocab = int(sys.argv[1]), 32, 65_536
tokens = torch.zeros((1, rows), dtype=torch.long)
rollout = Rollout(
    prompt_ids=((1,),), tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool),
    provenance=torch.ones_like(tokens), sampler_logp=torch.zeros(1, rows),
    policy_version=tokens, group=torch.zeros(1, dtype=torch.long), stop_reason=("length",),
    verdict=torch.zeros(1),
)
def operand(*shape):
    return torch.randn(shape) / 8

batch = pack_rollout(rollout, pad_id=0)
head = Unembedding(operand(vocab, width), vocab)
teacher = TeacherScores(hidden=operand(rows, width), unembedding=head)
batch = with_token(batch, views={"teacher": teacher})
hidden, weight = operand(rows, width).requires_grad_(), operand(vocab, width).requires_grad_()
objective = Objective(Dense(divergence.reverse_kl))
before = status("VmRSS")
out = linear_head(hidden, Unembedding(weight, vocab), batch, objective, chunk_bytes=2**28)
out.loss.backward()
print(status("VmHWM") - before - 4 * (hidden.numel() + weight.numel()))
"""


# --------------------------------------------------------------------------------------------
# A head in shards


def test_the_gradients_of_a_sharded_head_are_summed_over_the_ranks(tmp_path: Any) -> None:
    setting = Setting(lengths=(8, 7))
    expected = setting.answer(SUM)[1]
    multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    weight = torch.cat([shard["weight"] for shard in shards])
    hidden = torch.cat([shard["hidden"] for shard in shards])
    assert (hidden - expected[0]).norm() <= 1e-6 * expected[0].norm()
    assert (weight - expected[1]).norm() <= 1e-6 * expected[1].norm()


def _rank(rank: int, folder: str) -> None:
    """One of two ranks: a sequence of the batch, half of the weight."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    setting = Setting(lengths=(8, 7))
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(setting.weight, mesh, [Shard(0)]))
    part = split(setting.batch(), max_tokens=9)[rank]
    hidden = setting.hidden[part.rows].clone().requires_grad_()
    out = linear_head(hidden, Unembedding(weight, VOCAB), part.batch, SUM)
    assert out.loss is not None
    out.loss.backward()
    grad: Any = weight.grad
    torch.save({"weight": grad.to_local(), "hidden": hidden.grad}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()

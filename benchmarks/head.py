"""The loss head beside TRL, Liger and plain autograd: time, memory and exactness.

One run is `linear_head`, or a peer's loss, and its backward down to the gradients of the hidden
states and of the unembedding. Hidden states are standard normal, logits of standard deviation 1
(student) and 1.5 (teacher); tokens are drawn from the student, and the likeliest ids of both sides
are chosen beforehand, as they are for a rollout. On a CPU: one thread, float32, widths 512
(student) and 896 (teacher). On a CUDA device, if there is one: bfloat16, widths 2,048 and 4,096.

    python benchmarks/head.py [--quick] [--only cpu|cuda] [--peers-everywhere] [--json FILE]
                              [--result FILE]

`seconds` are CPU-seconds; on CUDA, seconds of the device between two events.

`peak_mb` is memory beyond inputs and returned gradients. On a CPU every run has a process of its
own, forked from this one, so that nothing depends on what another system left behind: after a run
on a few rows, which loads code and whatever libraries keep, freed memory goes back to the system
and the kernel's high-water mark of resident memory is reset; the mark after the run, less the
resident memory before it and the gradients handed back, is the peak. Memory that was freed but
kept by the allocator counts. Naive autograd shows that the measure is right: at its highest it
holds five tensors of N x V and no gradient yet. On CUDA the mark is `max_memory_allocated`.

`ratio` is, beside peers, that system's time over ours (`floor`: the time of the products that no
exact system can avoid, three with the student's unembedding and one with the teacher's); of
another objective, its time over the reverse KL's; of a shape, its time per row and token of the
vocabulary over the first shape's. `grad_error` is the length of the difference over that of the
reference, of the hidden states' gradient or of the unembedding's, whichever is worse, against naive
autograd in float64 on the same rounded operands. Handed back in bfloat16, an exact gradient is off
by 0.17 % from that rounding alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import (
    OURS,
    Measure,
    Options,
    Row,
    compare,
    cpu_seconds,
    interleaved,
    one_thread,
    parser,
    report,
)
from opd.formula import divergence, support
from opd.head import linear_head
from opd.methods import vopd
from opd.objective import Dense, Objective
from opd.rollout.pack import pack_rollout, with_token
from opd.training.config import load
from opd.training.session import build_method
from opd.types import Batch, FieldKey, Provenance, Rollout, TeacherScores, Unembedding
from peers.head_peers import LIGER, NAIVE, PEERS, TRL, Operands, naive_loss

RECIPES = Path(__file__).parents[1] / "recipes"
SEQUENCES = 8
TOP_K = 64
FEW_ROWS, FEW_TOKENS = 16, 1024
"""Size of the run that warms a process up."""

KLS = (2e-4, 1.6e-3)
"""Divergences at which students on their own text spend most tokens, in nats."""

FLOOR = "floor: its four products"
REFERENCE = "reverse KL + 0.1 reference"

DIRECTIONS: Mapping[str, tuple[float, Objective]] = {
    "reverse KL": (1.0, Objective(Dense(divergence.reverse_kl))),
    "forward KL": (0.0, Objective(Dense(divergence.forward_kl))),
}
"""Each with the `beta` by which the peers know it."""

REVERSE_KL = DIRECTIONS["reverse KL"][1]


def recipe(name: str) -> Objective:
    """The objective of a run file."""
    return build_method(load(RECIPES / f"{name}.toml")).objective


OTHERS: Mapping[str, Objective] = {
    "student top-64 reverse KL, bucket": Objective(
        Dense(divergence.reverse_kl, support=partial(support.student_top_k, k=TOP_K), tail="bucket")
    ),
    "teacher top-64 forward KL, bucket": Objective(
        Dense(divergence.forward_kl, support=partial(support.teacher_top_k, k=TOP_K), tail="bucket")
    ),
    "generalized JSD 0.5": Objective(
        Dense(partial(divergence.generalized_jsd, teacher_weight=0.5))
    ),
    "sampled token, per-state baseline": vopd().objective,
    "CR-OPD": recipe("cr_opd"),
    "GAE-OPD's actor": recipe("gae_opd"),
    REFERENCE: Objective(
        Dense(divergence.reverse_kl), Dense(divergence.reverse_kl, against="reference", coef=0.1)
    ),
}


# --------------------------------------------------------------------------------------------
# What is computed on


@dataclass(frozen=True)
class Shape:
    """Of one comparison."""

    rows: int
    vocab_size: int
    student_width: int = 512
    teacher_width: int = 896
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        name = f"N {self.rows:,}, V {self.vocab_size:,}, {str(self.dtype).removeprefix('torch.')}"
        return f"{name}, {torch.cuda.get_device_name()}" if self.device == "cuda" else name


@dataclass(frozen=True)
class Problem:
    """Operands, and the batch that our head reads beside the student's."""

    shape: Shape
    operands: Operands
    batch: Batch

    @property
    def unembedding(self) -> Unembedding:
        """The student's, without a gradient."""
        return Unembedding(self.operands.weight, self.shape.vocab_size)


def normal(shape: Shape, rows: int, width: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of this standard deviation, rounded to the shape's dtype."""
    return (torch.randn(rows, width, device=shape.device) * scale).to(shape.dtype)


def random_operands(shape: Shape, weights: tuple[Tensor, Tensor] | None = None) -> Operands:
    """Logits of standard deviation 1 (student) and 1.5 (teacher), independent of each other."""
    student_width, teacher_width = shape.student_width, shape.teacher_width
    student_weight, teacher_weight = weights or (
        normal(shape, shape.vocab_size, student_width, student_width**-0.5),
        normal(shape, shape.vocab_size, teacher_width, 1.5 * teacher_width**-0.5),
    )
    return Operands(
        normal(shape, shape.rows, student_width),
        student_weight,
        normal(shape, shape.rows, teacher_width),
        teacher_weight,
    )


def near_operands(shape: Shape, kl: float) -> Operands:
    """A teacher at about this KL: the student's logits plus independent noise.

    Its further columns hold the noise. Noise of variance s^2 on every logit makes both KLs s^2 / 2,
    up to higher orders.
    """
    student, other = random_operands(shape), shape.teacher_width - shape.student_width
    hidden_noise = normal(shape, shape.rows, other, (2 * kl) ** 0.5)
    weight_noise = normal(shape, shape.vocab_size, other, other**-0.5)
    return student._replace(
        teacher_hidden=torch.cat([student.hidden, hidden_noise], 1),
        teacher_weight=torch.cat([student.weight, weight_noise], 1),
    )


def build_problem(shape: Shape, operands: Operands, *, choose: bool = False) -> Problem:
    """A batch of eight responses by the student, the teacher answering with hidden states.

    Args:
        choose: draw the tokens from the student and choose the likeliest ids of both sides;
            otherwise tokens are any, and the objectives that read such ids cannot be evaluated.
    """
    tokens = torch.randint(shape.vocab_size, (shape.rows,), device=shape.device)
    top_ids: tuple[Tensor | None, Tensor | None] = (None, None)
    if choose:
        tokens, student_top_ids = chosen(operands.hidden, operands.weight)
        top_ids = student_top_ids, chosen(operands.teacher_hidden, operands.teacher_weight)[1]
    teacher = TeacherScores(
        hidden=operands.teacher_hidden,
        unembedding=Unembedding(operands.teacher_weight, shape.vocab_size),
        top_ids=top_ids[1],
    )
    packed = pack_rollout(
        rollout_of(tokens.view(SEQUENCES, -1)), pad_id=0, special_ids=(0,), device=shape.device
    )
    batch = with_token(packed, student_top_ids=top_ids[0], views={"teacher": teacher})
    return Problem(shape, operands, batch)


def chosen(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A token drawn from each row's distribution, and the row's likeliest ids."""
    tokens, top_ids = [], []
    for rows in torch.split(hidden, 256):
        logits = (rows @ weight.T).float()
        tokens.append(torch.multinomial(logits.softmax(-1), 1).squeeze(1))
        top_ids.append(logits.topk(TOP_K).indices)
    return torch.cat(tokens), torch.cat(top_ids)


def rollout_of(tokens: Tensor) -> Rollout:
    """Responses cut off at their last token, every token the student's own."""
    sequences = tokens.shape[0]
    return Rollout(
        prompt_ids=((0,),) * sequences,
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        provenance=torch.full_like(tokens, int(Provenance.STUDENT)),
        sampler_logp=torch.zeros(tokens.shape, device=tokens.device),
        policy_version=torch.zeros_like(tokens),
        group=torch.arange(sequences, device=tokens.device),
        stop_reason=("length",) * sequences,
        verdict=torch.full((sequences,), torch.nan, device=tokens.device),
    )


def with_rows(problem: Problem, rows: int) -> Problem:
    """A problem of so many rows on the same unembeddings."""
    operands = problem.operands
    shape = replace(problem.shape, rows=rows)
    return build_problem(shape, random_operands(shape, (operands.weight, operands.teacher_weight)))


def small_problem(shape: Shape) -> Problem:
    """A few rows and tokens, to warm up on."""
    small = replace(shape, rows=FEW_ROWS, vocab_size=FEW_TOKENS)
    return build_problem(small, random_operands(small), choose=True)


def with_reference(problem: Problem) -> Problem:
    """With a second view of the student's width, not far from the student."""
    shape, student = problem.shape, problem.operands
    noise = normal(shape, shape.vocab_size, shape.student_width, 0.1 * shape.student_width**-0.5)
    reference = TeacherScores(
        hidden=student.hidden + normal(shape, shape.rows, shape.student_width, 0.1),
        unembedding=Unembedding(student.weight + noise, shape.vocab_size),
    )
    views = {**problem.batch.token.views, "reference": reference}
    return replace(problem, batch=with_token(problem.batch, views=views))


def settled(problem: Problem, objective: Objective) -> Problem:
    """With what the update finds settled: log-probabilities at rollout time, coupled advantages.

    A critic's values are random: what they are changes no time.
    """
    if not objective.coupled and "old_logp" not in objective.field_names():
        return problem
    token, student_logp = problem.batch.token, FieldKey("student_logp")
    values = -torch.randn(token.tokens.shape, device=token.tokens.device).abs()
    batch = with_token(problem.batch, values=values, bootstrap_value=values[:, -1])
    keys = objective.signal_keys() | {student_logp}
    fields = linear_head(problem.operands.hidden, problem.unembedding, batch, wanted=keys).fields
    old_logp = fields[student_logp].view(token.tokens.shape)
    coupled = objective.signal(batch.token, fields)
    return replace(problem, batch=with_token(batch, old_logp=old_logp, coupled=coupled))


# --------------------------------------------------------------------------------------------
# What runs

Loss = Callable[[Problem, Tensor, Tensor], Tensor]
"""The loss of a problem at these hidden states and this unembedding of the student."""

Work = Callable[[], Sequence[Tensor]]
"""Does something, and returns what it hands back to its caller."""


def our_loss(objective: Objective, problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    """The head's."""
    unembedding = Unembedding(weight, problem.shape.vocab_size)
    loss = linear_head(hidden, unembedding, problem.batch, objective).loss
    assert loss is not None
    return loss


def peer_loss(name: str, beta: float, problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    """A peer's."""
    return PEERS[name](problem.operands._replace(hidden=hidden, weight=weight), beta)


def losses(direction: str, peers: Sequence[str]) -> dict[str, Loss]:
    """Ours and these peers' of a KL divergence; a peer that is not installed is not among them."""
    beta, objective = DIRECTIONS[direction]
    found: dict[str, Loss] = {OURS: partial(our_loss, objective)}
    return found | {name: partial(peer_loss, name, beta) for name in peers if name in PEERS}


def gradients(loss: Loss, problem: Problem) -> tuple[Tensor, Tensor]:
    """Forward and backward: the gradients of hidden states and unembedding."""
    hidden = problem.operands.hidden.detach().requires_grad_()
    weight = problem.operands.weight.detach().requires_grad_()
    torch.autograd.backward(loss(problem, hidden, weight))
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad


def floor_products(operands: Operands) -> Sequence[Tensor]:
    """The products that every exact system makes: to logits on both sides, and back."""
    hidden, weight, teacher_hidden, teacher_weight = operands
    torch.mm(teacher_hidden, teacher_weight.T)
    logits = torch.mm(hidden, weight.T)
    return torch.mm(logits, weight), torch.mm(logits.T, hidden)


def view_product(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
    """The logits of a view, a chunk of rows at a time on a CPU, written into one tile."""
    rows = hidden.shape[0] if hidden.is_cuda else 256
    tile = hidden.new_empty(rows, weight.shape[0])
    for chunk in torch.split(hidden, rows):
        torch.mm(chunk, weight.T, out=tile[: chunk.shape[0]])
    return ()


# --------------------------------------------------------------------------------------------
# Time and memory of one run


def timed_loss(loss: Loss, problem: Problem) -> Callable[[], Measure]:
    """One forward and backward, timed."""
    few = small_problem(problem.shape)
    return timed(problem.shape, partial(gradients, loss, problem), partial(gradients, loss, few))


def timed_objective(objective: Objective, problem: Problem) -> Callable[[], Measure]:
    """Our head on a problem that is settled; warmed up with the reverse KL."""
    few = small_problem(problem.shape)
    return timed(
        problem.shape,
        partial(gradients, partial(our_loss, objective), problem),
        partial(gradients, partial(our_loss, REVERSE_KL), few),
    )


def timed(shape: Shape, work: Work, warm_up: Work) -> Callable[[], Measure]:
    """What `interleaved` runs: in a process of its own, or on the CUDA device."""
    if shape.device == "cuda":
        return partial(on_cuda, work)
    return partial(in_child, partial(on_cpu, work, warm_up))


def in_child(run: Callable[[], Measure]) -> Measure:
    """The measure, taken in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(run, sender))
    child.start()
    sender.close()  # the child's own end is open, so that a child that dies is noticed
    measure = receiver.recv()
    child.join()
    assert isinstance(measure, Measure)
    return measure


def _send(run: Callable[[], Measure], sender: Connection) -> None:
    gc.freeze()  # what the imports made is searched no more
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or autograd starts a thread for each device
    sender.send(run())


def on_cpu(work: Work, warm_up: Work) -> Measure:
    """CPU-seconds, and the rise of the high-water mark less what is handed back."""
    warm_up()
    before = _reset_high_water()
    start = cpu_seconds()
    returned = work()
    seconds = cpu_seconds() - start
    if before is None:
        return Measure(seconds)
    return Measure(seconds, peak_mb=_mb(_status_bytes("VmHWM") - before, returned))


def on_cuda(work: Work) -> Measure:
    """Seconds between two events, and the rise of the allocator's mark less what is handed back."""
    gc.collect()
    cuda: Any = torch.cuda
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    returned = work()
    end.record()
    cuda.synchronize()
    peak_mb = _mb(cuda.max_memory_allocated() - before, returned)
    return Measure(start.elapsed_time(end) / 1e3, peak_mb=peak_mb)


def _mb(rise: int, returned: Sequence[Tensor]) -> float:
    return (rise - sum(value.numel() * value.element_size() for value in returned)) / 1e6


def _reset_high_water() -> int | None:
    """Resident bytes, freed memory given back and the mark set to them; None where not on Linux."""
    switch = Path("/proc/self/clear_refs")
    if not switch.exists():
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
    switch.write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _keep_freed_memory() -> None:
    """As a training session does: lets glibc keep freed blocks of up to 32 MiB, in every system."""
    torch.empty(31 * 2**20, dtype=torch.uint8)


# --------------------------------------------------------------------------------------------
# Rows


def divergence_rows(
    problem: Problem, direction: str, peers: Sequence[str], *, repeats: int
) -> list[Row]:
    """A KL divergence beside the peers, and the floor under all of them."""
    shape, few = problem.shape, small_problem(problem.shape)
    systems = {name: timed_loss(loss, problem) for name, loss in losses(direction, peers).items()}
    systems[FLOOR] = timed(
        shape, partial(floor_products, problem.operands), partial(floor_products, few.operands)
    )
    medians = _interleaved(shape, systems, repeats)
    medians[FLOOR] = replace(medians[FLOOR], peak_mb=None)  # of no system
    return compare(f"{direction}, {problem.shape}", medians)


def shape_rows(direction: str, problems: Sequence[Problem], *, repeats: int) -> list[Row]:
    """A KL divergence on several shapes, each per row and token of the vocabulary."""
    loss: Loss = partial(our_loss, DIRECTIONS[direction][1])
    systems = {str(problem.shape): timed_loss(loss, problem) for problem in problems}
    shapes = {str(problem.shape): problem.shape for problem in problems}
    medians = _interleaved(problems[0].shape, systems, repeats)
    unit = {
        name: medians[name].seconds / (shape.rows * shape.vocab_size)
        for name, shape in shapes.items()
    }
    return [
        Row(
            f"{direction} per row and token, {name}",
            OURS,
            seconds=measure.seconds,
            peak_mb=measure.peak_mb,
            ratio=unit[name] / unit[str(problems[0].shape)],
        )
        for name, measure in medians.items()
    ]


def objective_rows(problem: Problem, *, repeats: int) -> list[Row]:
    """Other objectives beside the reverse KL, and the second view's share of the last one."""
    second = with_reference(problem)
    view = second.batch.token.views["reference"]
    assert view.hidden is not None
    assert view.unembedding is not None
    product = partial(view_product, view.hidden, view.unembedding.weight)
    systems = {"reverse KL": timed_loss(partial(our_loss, REVERSE_KL), problem)}
    for name, objective in OTHERS.items():
        given = settled(second if name == REFERENCE else problem, objective)
        systems[name] = timed_objective(objective, given)
    systems["product"] = timed(problem.shape, product, product)
    medians = _interleaved(problem.shape, systems, repeats)
    product_seconds = medians.pop("product").seconds
    medians[f"{REFERENCE}, less the product of that view"] = Measure(
        medians[REFERENCE].seconds - product_seconds
    )
    base = medians.pop("reverse KL")
    return [
        Row(
            f"{name}, {problem.shape}",
            OURS,
            seconds=measure.seconds,
            peak_mb=measure.peak_mb,
            ratio=measure.seconds / base.seconds,
        )
        for name, measure in medians.items()
    ]


def gradient_rows(shape: Shape) -> list[Row]:
    """Every system's gradient against float64: in float32, and in bfloat16 at small divergences."""
    rows: list[Row] = []
    for direction in DIRECTIONS:
        rows += _gradient_rows(direction, shape, random_operands(shape), (TRL, LIGER, NAIVE))
        rounded = replace(shape, dtype=torch.bfloat16)
        for kl in KLS:
            rows += _gradient_rows(direction, rounded, near_operands(rounded, kl), (TRL, LIGER))
    return rows


def _gradient_rows(
    direction: str, shape: Shape, operands: Operands, peers: Sequence[str]
) -> Iterator[Row]:
    beta, _ = DIRECTIONS[direction]
    problem = build_problem(shape, operands)
    exact = Operands(*(value.double() for value in operands))
    reference = gradients(partial(peer_loss, NAIVE, beta), replace(problem, operands=exact))
    kl = float(naive_loss(exact, beta))
    for name, loss in losses(direction, peers).items():
        error = max(
            float((found.double() - exactly).norm() / exactly.norm())
            for found, exactly in zip(gradients(loss, problem), reference, strict=True)
        )
        case = f"gradient of the {direction} of {kl:.1e} nats, {shape}"
        yield Row(case, name, grad_error=error)


def _interleaved(
    shape: Shape, systems: Mapping[str, Callable[[], Measure]], repeats: int
) -> dict[str, Measure]:
    """On CUDA after a run of each, which compiles; on a CPU every process warms up by itself."""
    return interleaved(systems, repeats, warm=shape.device == "cuda")


# --------------------------------------------------------------------------------------------
# Devices


def cpu_rows(*, quick: bool, peers_everywhere: bool) -> list[Row]:
    """Everything on one CPU thread in float32.

    Gradients come last: they run in this process, and a process must not fork after autograd has
    started threads for an accelerator.
    """
    shape = Shape(256 if quick else 2048, 32_768)
    problem = build_problem(shape, random_operands(shape), choose=True)
    everyone = (TRL, LIGER, NAIVE)
    rows = divergence_rows(problem, "reverse KL", everyone, repeats=1 if quick else 3)
    rows += divergence_rows(problem, "forward KL", everyone, repeats=1 if quick else 2)
    rows += objective_rows(problem, repeats=1 if quick else 2)
    if not quick:
        fewer = [with_rows(problem, rows) for rows in (512, 1024)]
        rows += shape_rows("reverse KL", [problem, *fewer], repeats=3)
        large_shape = replace(shape, vocab_size=151_936)
        large = build_problem(large_shape, random_operands(large_shape))
        for direction in DIRECTIONS:
            rows += shape_rows(direction, [problem, large], repeats=1)
        if peers_everywhere:
            rows += divergence_rows(large, "reverse KL", everyone, repeats=1)
    return rows + gradient_rows(Shape(64, 2048) if quick else Shape(256, 8192))


def cuda_rows(*, quick: bool) -> list[Row]:
    """Everything on the CUDA device in bfloat16: times and peaks there, every objective."""
    shape = Shape(1024 if quick else 8192, 151_936, 2048, 4096, torch.bfloat16, "cuda")
    problem = build_problem(shape, random_operands(shape), choose=True)
    repeats = 3 if quick else 11
    rows: list[Row] = []
    for direction in DIRECTIONS:
        rows += divergence_rows(problem, direction, (TRL, LIGER), repeats=repeats)
    rows += objective_rows(problem, repeats=repeats)
    return rows + gradient_rows(Shape(256, 8192, device="cuda"))


def parse() -> argparse.Namespace:
    """The shared arguments and those of this script."""
    arguments = parser("The loss head beside TRL, Liger and plain autograd.")
    arguments.add_argument("--only", choices=("cpu", "cuda"), help="the rows of one device")
    arguments.add_argument(
        "--peers-everywhere",
        action="store_true",
        help="on the CPU, the reverse KL of the peers at V 151,936 too: four more minutes, 8 GB",
    )
    return arguments.parse_args()


def main() -> None:
    options = parse()
    one_thread()
    torch.manual_seed(0)
    _keep_freed_memory()
    rows: list[Row] = []
    if options.only != "cuda":
        rows += cpu_rows(quick=options.quick, peers_everywhere=options.peers_everywhere)
    if options.only != "cpu" and torch.cuda.is_available():
        rows += cuda_rows(quick=options.quick)
    elif options.only != "cpu":
        print("no CUDA device here: its rows are left out")
    report(rows, Options(options.quick, options.json, options.result))


if __name__ == "__main__":
    main()

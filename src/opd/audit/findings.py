"""What can be wrong with a loss, and each check that looks for it.

A *fault* makes a loss something else than it should be. A *caution* is a limit that a user of the
loss should know, and does not decide whether a claim holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.audit.loss import Loss, Rows, derivative
from opd.audit.targets import match
from opd.audit.toys import ORDINARY, REGIMES, Expected, Toy, Writer, expected

__all__ = [
    "CAUTIONS",
    "CHECKS",
    "EXPECTATIONS",
    "FAULTS",
    "Check",
    "Coupling",
    "Finding",
    "Subject",
    "subject_of",
]

SILENT = "it has no gradient"

Status = Literal["ok", "found", "not applicable"]

FAULTS = {
    "no-teacher-gradient": "its expected gradient is zero although teacher and student differ",
    "another-divergence": "it does not descend what it claims",
    "not-stationary": "it moves a student that equals its teacher",
    "dead-rows": "rows on which teacher and student differ have no gradient at all",
    "hard-labels": "a cross-entropy of the tokens written is part of it",
    "undetached": "an advantage carries a gradient of its own",
    "off-by-one": "a row reads its neighbour's teacher or token instead of its own",
    "discount": "a reward's weight depends on its place in the response, not on its distance",
    "temperature": "the temperature does not divide the logits of both models",
    "masked-rows": "rows that do not count teach or weigh, or rows that count are dropped",
    "mean-of-means": "told the count of all micro-batches, it divides by another",
    "missing-scores": "a missing score of the teacher becomes a number, and is not reported",
    "padding-has-mass": "entries that pad the smaller vocabulary get probability",
    "padding-copied": "entries that pad the smaller vocabulary are copied from the other model",
}
CAUTIONS = {
    "padding": "models of different width are neither refused nor cut to what they share",
    "low-precision": "with bfloat16 logits rounding is larger than a small gradient",
    "not-finite": "zero mass, or no row that counts, gives NaN",
    "teacher-gradient": "a gradient flows into the teacher",
    "unbounded-ratio": "the weight of a token that the writer found unlikely has no bound",
    "reads-other-rows": "a row's gradient depends on other rows",
    "own-count": "a mean over the rows of one call: micro-batches of different size weigh alike",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: of `FAULTS` or `CAUTIONS`.
        message: what was seen, with its figures.
    """

    name: str
    message: str

    @property
    def is_fault(self) -> bool:
        return self.name in FAULTS


@dataclass(frozen=True)
class Check:
    """One look at a loss.

    Attributes:
        name: what was looked at.
        status: `not applicable` where the signature cannot express it.
        message: what was seen.
        figures: the numbers behind it.
        findings: none where all is well.
    """

    name: str
    status: Status
    message: str
    figures: dict[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def _ok(name: str, message: str, **figures: float) -> Check:
    return Check(name, "ok", message, figures)


def _not_applicable(name: str, message: str) -> Check:
    return Check(name, "not applicable", message)


def _found(name: str, finding: str, message: str, **figures: float) -> Check:
    return Check(name, "found", message, figures, (Finding(finding, message),))


# --------------------------------------------------------------------------------------------
# What every check may need, measured once


@dataclass(frozen=True, eq=False)
class Coupling:
    """Which rows a row's gradient depends on: `[n, m]` is True where row n sees row m.

    Attributes:
        base: the gradient of five rows of one response, all different.
    """

    student: Bool[Tensor, "N N"]
    teacher: Bool[Tensor, "N N"]
    token: Bool[Tensor, "N N"]
    base: Float[Tensor, "N V"]

    @property
    def is_separable(self) -> bool:
        """Whether every row looks at itself alone."""
        off = ~torch.eye(len(self.base), dtype=torch.bool)
        return not bool(((self.student | self.teacher | self.token) & off).any())

    @property
    def is_ahead(self) -> bool:
        """Whether rows look at themselves and at later rows alone, as credit does."""
        past = torch.ones_like(self.teacher).tril(-1)
        return not bool(((self.teacher | self.token) & past).any())


@dataclass(frozen=True, eq=False)
class Subject:
    """A loss with what has been measured of it.

    Attributes:
        ordinary: of the ordinary toy, one call per row.
        batched: whether one call on all rows of a toy gives the same, up to a factor.
        is_exact: whether it computes in the precision of its logits, not in a lower one.
    """

    loss: Loss
    writer: Writer
    coupling: Coupling
    ordinary: Expected
    batched: bool
    is_exact: bool

    @property
    def tolerance(self) -> float:
        """Relative error that is taken for rounding, where nothing magnifies it."""
        return 1e2 * self.loss.tolerance

    @property
    def rough_tolerance(self) -> float:
        """The same where probabilities are as small as e^-16."""
        return self.tolerance if self.is_exact else 1e-2

    def expected(self, toy: Toy, **options: Any) -> Expected:
        """Its expectation on a toy, in one call where that is known to be the same."""
        return expected(self.loss, toy, writer=self.writer, batched=self.batched, **options)

    @property
    def single(self) -> bool:
        """Whether what it does follows from single rows."""
        return self.is_silent or (self.coupling.is_separable and self.ordinary.size > 0)

    @property
    def is_silent(self) -> bool:
        """Whether what gradient it has is rounding."""
        noise = 64 * torch.finfo(self.loss.dtype).eps
        return max(self.ordinary.size, float(self.coupling.base.abs().max())) <= noise

    @property
    def unit(self) -> float:
        """The length that gradients of this loss have."""
        return max(self.ordinary.size, 1e-300)


def subject_of(loss: Loss, writer: Writer) -> Subject:
    """Measure what all checks need."""
    seen, found = coupling(loss), expected(loss, ORDINARY, writer=writer)
    batched = False
    if seen.is_separable:
        together = expected(loss, ORDINARY, writer=writer, batched=True).pieces
        batched = match(together, found.pieces).residual <= loss.tolerance
    return Subject(loss, writer, seen, found, batched, _is_exact(loss))


def _is_exact(loss: Loss) -> bool:
    """Whether logits that differ by 1e-11 give gradients that differ by about as much."""
    if loss.dtype != torch.float64:
        return False
    rows = response(23, 4, loss.dtype)
    nudged = replace(rows, student=rows.student * (1 + 1e-11))
    base = derivative(loss, rows).student
    moved = float((derivative(loss, nudged).student - base).norm() / base.norm().clamp(min=1e-300))
    return 1e-14 < moved < 1e-9


def response(seed: int, length: int, dtype: torch.dtype, *, vocabulary: int = 8) -> Rows:
    """A response of random rows, all different."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(length, vocabulary, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    return Rows(
        student=student.to(dtype),
        teacher=(1.5 * teacher).to(dtype),
        tokens=torch.randint(vocabulary, (length,), generator=draw),
        mask=torch.ones(length, dtype=torch.bool),
    )


def coupling(loss: Loss) -> Coupling:
    """Change one row at a time and see which rows' gradients change."""
    length = 5
    rows, other = response(21, length, loss.dtype), response(22, length, loss.dtype)
    base = derivative(loss, rows).student
    seen = {}
    for name in ("student", "teacher", "tokens"):
        before, drawn = getattr(rows, name), getattr(other, name)
        drawn = torch.where(drawn == before, (drawn + 1) % 8, drawn) if name == "tokens" else drawn
        sees = torch.zeros(length, length, dtype=torch.bool)
        for m in range(length):
            changed = before.clone()
            changed[m] = drawn[m]
            moved = derivative(loss, _changed(rows, name, changed)).student
            sees[:, m] = _differ(moved, base, loss)
        seen[name] = sees
    return Coupling(seen["student"], seen["teacher"], seen["tokens"], base)


def _changed(rows: Rows, field_name: str, value: Tensor) -> Rows:
    changes: dict[str, Any] = {field_name: value}
    return replace(rows, **changes)


def _differ(one: Tensor, other: Tensor, loss: Loss) -> Bool[Tensor, " N"]:
    scale = max(float(one.abs().max()), float(other.abs().max()), 1e-300)
    return ((one - other).abs().amax(-1) > 1e-2 * loss.tolerance * scale).cpu()


# --------------------------------------------------------------------------------------------
# The checks. Each takes a subject and returns what it saw.


def rows_apart(subject: Subject) -> Check:
    """Own rows, neighbours, later rows, everything."""
    name, seen = "own row", subject.coupling
    if subject.is_silent:
        return _not_applicable(name, SILENT)
    silent = (seen.base == 0).all(-1)
    figures = {"rows_without_gradient": float(silent.double().mean())}
    for what, sees in (("teacher", seen.teacher), ("token", seen.token)):
        shift = _shift_of(sees)
        if shift is not None:
            side = "next" if shift > 0 else "previous"
            return _found(
                name, "off-by-one", f"row n reads the {what} of the {side} row", **figures
            )
    if seen.is_separable:
        return _ok(name, "every row looks at itself alone", **figures)
    if seen.is_ahead:
        return _ok(name, "a row looks at itself and at later rows, as credit does", **figures)
    message = "a row's gradient depends on rows before it: a statistic of the call, or a slip"
    return _found(name, "reads-other-rows", message, **figures)


def _shift_of(sees: Bool[Tensor, "N N"]) -> int | None:
    """The distance d, of one row, at which every row reads and nowhere else."""
    length = len(sees)
    if bool(sees.diagonal().any()):
        return None
    for shift in (1, -1):
        inner = sees.diagonal(shift)
        around = sees.roll(-shift, 1).diagonal()
        elsewhere = int(sees.sum()) - int(around.sum())
        if int(inner.sum()) >= length - 2 and elsewhere == 0:
            return shift
    return None


def teaches(subject: Subject) -> Check:
    """Whether anything is left of the gradient once the tokens are summed over."""
    name, found = "teaches", subject.ordinary
    share = float(found.gradient.norm()) / subject.unit
    figures = {"expected_over_sampled": share}
    if subject.is_silent:
        return _found(name, "no-teacher-gradient", SILENT, **figures)
    if share > subject.tolerance:
        return _ok(
            name, f"its expected gradient is {share:.2g} of what single rows have", **figures
        )
    why = "the same advantage for every token" if _is_one_advantage(found) else "it cancels"
    message = (
        f"its gradient is zero in expectation ({why}): {share:.1e} of what single rows have, so "
        "the teacher moves nothing but noise"
    )
    return _found(name, "no-teacher-gradient", message, **figures)


def _is_one_advantage(found: Expected) -> bool:
    """Whether a state's rows all are one number times the score."""
    weight, left = _score_weight(found, found.gradient * 0)
    return bool((left < 1e-6).all()) and bool((weight.abs() > 0).any())


def _score_weight(found: Expected, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Per state the c of `pieces = rest + c * (student - e_v)`, and what it leaves, relatively."""
    vocabulary = found.pieces.shape[-1]
    score = found.weights[:, None, :] - torch.eye(vocabulary, dtype=torch.float64)
    pieces = found.pieces - rest[:, None, :]
    weight = (pieces * score).sum((1, 2)) / (score * score).sum((1, 2))
    left = (pieces - weight[:, None, None] * score).norm(dim=(1, 2))
    scale = found.pieces.norm(dim=(1, 2)).clamp(min=1e-300)
    return weight, left / scale


def mixed(subject: Subject) -> Check:
    """A cross-entropy of the tokens, hidden in a loss that otherwise looks at distributions."""
    name, found = "tokens", subject.ordinary
    if subject.is_silent:
        return _not_applicable(name, SILENT)
    spread = (found.pieces - found.gradient[:, None, :]).norm() / found.pieces.norm().clamp(
        min=1e-300
    )
    figures = {"spread_over_tokens": float(spread)}
    if float(spread) <= subject.tolerance:
        return _ok(name, "the tokens do not matter: it compares distributions", **figures)
    if subject.writer == "teacher" or float(found.gradient.norm()) <= 1e-4 * subject.unit:
        return _ok(name, "the gradient depends on the token that was written", **figures)
    weight, left = _score_weight(found, found.gradient)
    explained = not bool((left > subject.tolerance).any())
    largest = float(weight.abs().max())
    if explained and float((weight + found.value).abs().max()) <= 1e-4 * largest:
        message = "an advantage, the same for every token, carries a gradient, which is all it does"
        return _found(name, "undetached", message, **figures)
    if not explained or float((weight - weight.mean()).abs().max()) > 1e-4 * largest:
        return _ok(name, "the gradient depends on the token that was written", **figures)
    share = float(weight.mean())
    message = (
        f"{share:.3g} x the cross-entropy of the token is part of it: zero in expectation on the "
        "student's own text, and imitation of whoever wrote any other"
    )
    return _found(name, "hard-labels", message, weight=share, **figures)


def advantage(subject: Subject) -> Check:
    """What multiplies the score of the token, and whether it is held fixed.

    An advantage A that carries a gradient adds `log student(token) * grad A` to the policy
    gradient. If A is the log-ratio, what is left is `log teacher - 2 log student` times the score.
    """
    name, found = "advantage", subject.ordinary
    if subject.is_silent:
        return _not_applicable(name, SILENT)
    vocabulary = found.pieces.shape[-1]
    score = found.weights[:, None, :] - torch.eye(vocabulary, dtype=torch.float64)
    paid = (found.pieces * score).sum(-1) / score.square().sum(-1)
    left = (found.pieces - paid[..., None] * score).norm() / found.pieces.norm()
    tolerance = subject.tolerance
    student, teacher = ORDINARY.student.log_softmax(-1), ORDINARY.teacher.log_softmax(-1)
    if float(left) <= tolerance:
        live = paid - (teacher - 2 * student)
        scale = float((teacher - 2 * student).std())
        if float((live - live.mean(1, keepdim=True)).abs().max()) <= tolerance * scale:
            message = "the log-ratio it multiplies the score with carries a gradient: detach it"
            return _found(name, "undetached", message)
        return _ok(name, "a number of each token times its score, held fixed")
    # pieces(v) = c * score(v) + log student(v) * h, with a number c and a vector h per state
    share = 0.0
    for state in range(len(paid)):
        direct = score[state].flatten()[:, None]
        live = torch.kron(student[state][:, None], torch.eye(vocabulary, dtype=torch.float64))
        basis = torch.cat([direct, live], 1)
        target = found.pieces[state].flatten()[:, None]
        fitted = torch.linalg.lstsq(basis, target, driver="gelsd").solution
        unexplained = float((target - basis @ fitted).norm() / target.norm().clamp(min=1e-300))
        if unexplained > tolerance:
            return _ok(name, "there is none: it is no policy gradient")
        share = max(share, float((live @ fitted[1:]).norm() / target.norm()))
    if share <= tolerance:
        return _ok(name, "one number per row times the score, held fixed")
    message = "the number it multiplies the score with carries a gradient: detach it"
    return _found(name, "undetached", message, share=share)


def stationary(subject: Subject) -> Check:
    """Teacher = student, on the ordinary toy and on a sharp one."""
    name, shares = "teacher = student", []
    if subject.is_silent:
        return _not_applicable(name, SILENT)
    for toy in (ORDINARY, REGIMES["rows where the student is surer than its teacher"]):
        found = subject.expected(toy.at_teacher())
        shares.append(float(found.gradient.norm()) / max(subject.unit, found.size))
    share = max(shares)
    if share <= subject.tolerance:
        return _ok(name, "no gradient in expectation", share=share)
    message = (
        f"its gradient there is {share:.2g} of the usual length: a student that equals its teacher "
        "is moved away"
    )
    return _found(name, "not-stationary", message, share=share)


def alive(subject: Subject) -> Check:
    """Rows without any gradient, in every regime."""
    name, figures = "rows with a gradient", {}
    if subject.is_silent:
        return _not_applicable(name, SILENT)
    worst, where = 0.0, ""
    for label, toy in REGIMES.items():
        dead = subject.expected(toy).dead
        figures[label] = dead
        if dead > worst:
            worst, where = dead, label
    if not worst:
        return _ok(name, "every row that differs has one", **figures)
    message = (
        f"{worst:.0%} of the {where} have none: a clamp, a cap or a selection removes them"
        if where.startswith("rows")
        else f"{worst:.0%} of {where} have none: a clamp, a cap or a selection removes them"
    )
    return _found(name, "dead-rows", message, **figures)


def temperature(subject: Subject) -> Check:
    """At temperature 2: the gradient's direction is that of halved logits."""
    name, loss = "temperature", subject.loss
    if "temperature" not in loss.takes:
        return _not_applicable(name, "it takes no temperature")
    by = 2.0
    toy = ORDINARY
    at = subject.expected(toy, temperature=by).pieces
    halved = {
        "both": Toy(toy.student / by, toy.teacher / by),
        "the student alone": Toy(toy.student / by, toy.teacher),
        "the teacher alone": Toy(toy.student, toy.teacher / by),
        "neither": toy,
    }
    left = {
        who: match(at, subject.expected(version).pieces).residual for who, version in halved.items()
    }
    best = min(left, key=lambda who: left[who])
    figures = {f"residual if it divides {who}": value for who, value in left.items()}
    if best == "both" and left[best] <= subject.tolerance:
        return _ok(name, "it divides the logits of both", **figures)
    if left[best] <= subject.tolerance:
        return _found(name, "temperature", f"it divides the logits of {best}", **figures)
    return _found(
        name, "temperature", "it changes the gradient, but not as divided logits would", **figures
    )


def masks(subject: Subject) -> Check:
    """Rows that do not count have no gradient and no weight; those that do are all there."""
    name, loss = "mask", subject.loss
    if subject.is_silent:
        return _not_applicable(name, SILENT)
    rows = response(31, 6, loss.dtype)
    full = derivative(loss, rows).student
    silent = (full == 0).all(-1)
    if bool(silent.any()) and not bool(silent.all()):
        which = _places(silent)
        return _found(name, "masked-rows", f"of 6 rows that count, {which} got no gradient")
    if "mask" not in loss.takes:
        return _not_applicable(name, "it takes no mask")
    mask = torch.tensor([True, True, False, True, False, True])
    masked = derivative(loss, replace(rows, mask=mask)).student
    if bool(masked[~mask].any()):
        return _found(name, "masked-rows", "rows that are masked have a gradient")
    other = response(32, 6, loss.dtype)
    moved = replace(
        rows,
        mask=mask,
        student=torch.where(mask[:, None], rows.student, other.student),
        teacher=torch.where(mask[:, None], rows.teacher, other.teacher),
    )
    if bool(_differ(derivative(loss, moved).student[mask], masked[mask], loss).any()):
        return _found(name, "masked-rows", "what stands in masked rows changes the others")
    silent = (masked[mask] == 0).all(-1)
    if bool(silent.any()):
        which = _places(silent)
        return _found(name, "masked-rows", f"of the rows that count, {which} got no gradient")
    if subject.single:
        alone = derivative(loss, rows.at(mask.nonzero().flatten())).student
        scale = match(masked[mask], alone).scale
        if abs(scale - 1) > subject.tolerance:
            message = f"masked rows count in the mean: the others weigh {scale:.3g} of their share"
            return _found(name, "masked-rows", message, weight=scale)
    return _ok(name, "masked rows have no gradient and no weight")


def _places(silent: Tensor) -> str:
    where = silent.nonzero().flatten().tolist()
    if where == [0]:
        return "the first"
    if where == [len(silent) - 1]:
        return "the last"
    return f"{len(where)}"


def micro_batches(subject: Subject) -> Check:
    """One call and two smaller calls add up to the same gradient."""
    name, loss = "micro-batches", subject.loss
    rows = response(41, 6, loss.dtype)
    whole = derivative(loss, rows)
    parts = [torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5])]

    def split(total: int | None) -> Tensor:
        calls = [derivative(loss, replace(rows.at(part), count=total)) for part in parts]
        return torch.cat([call.student for call in calls])

    if whole.value.dim() and subject.single:
        off = _off(split(None), whole.student)
        return _ok(name, "a loss per row: the sum over rows is the trainer's", off=off)
    if not subject.single:
        return _not_applicable(name, "its rows belong together: only whole responses can be split")
    if "count" in loss.takes:
        off = _off(split(6), whole.student)
        if off <= subject.tolerance:
            return _ok(name, "split calls add up, told the count of all", off=off)
        message = f"told the count of all micro-batches, split calls are off by {off:.2g}"
        return _found(name, "mean-of-means", message, off=off)
    off = _off(split(None), whole.student)
    if off <= subject.tolerance:
        return _ok(name, "a sum: split calls add up", off=off)
    message = (
        "it divides by the rows of its own call, so the mean over micro-batches is not the mean "
        "over rows unless they are all of one size: weigh each by its rows"
    )
    return _found(name, "own-count", message, off=off)


def _off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-300))


def zero_mass(subject: Subject) -> Check:
    """Ids that neither model gives any mass, as a vocabulary that is padded with -inf has."""
    name, loss = "zero mass", subject.loss
    if loss.is_linear:
        return _not_applicable(name, "its logits are products, which are finite")
    rows = response(51, 4, loss.dtype)
    inside = rows.tokens % 6
    shut = rows.student.new_full((4, 2), -math.inf)
    narrow = replace(rows, student=rows.student[:, :6], teacher=rows.teacher[:, :6], tokens=inside)
    padded = replace(
        rows,
        student=torch.cat([narrow.student, shut], 1),
        teacher=torch.cat([narrow.teacher, shut], 1),
        tokens=inside,
    )
    try:
        found, wanted = derivative(loss, padded), derivative(loss, narrow)
    except Exception as error:  # anything may be raised by a loss under audit
        return _ok(name, f"it refuses logits of -inf: {_first_line(error)}")
    if bool(found.value.isnan().any()) or bool(found.student.isnan().any()):
        where = "value" if bool(found.value.isnan().any()) else "gradient"
        return _found(name, "not-finite", f"ids with logits of -inf in both make the {where} NaN")
    off = _off(found.student[:, :6], wanted.student)
    if off <= subject.tolerance:
        return _ok(name, "ids with logits of -inf in both models change nothing", off=off)
    message = f"ids with logits of -inf in both models change the others' gradient by {off:.2g}"
    return _found(name, "not-finite", message, off=off)


def no_rows(subject: Subject) -> Check:
    """A response of which no row counts."""
    name, loss = "no rows", subject.loss
    rows = response(52, 3, loss.dtype)
    if "mask" in loss.takes:
        empty = replace(rows, mask=torch.zeros(3, dtype=torch.bool), count=None)
    else:
        empty = rows.at(torch.zeros(0, dtype=torch.long))
    try:
        found = derivative(loss, empty)
    except Exception as error:  # anything may be raised by a loss under audit
        return _ok(name, f"it refuses a response of which no row counts: {_first_line(error)}")
    if not bool(found.value.isfinite().all()) or not bool(found.student.isfinite().all()):
        return _found(name, "not-finite", "a response of which no row counts gives NaN")
    if bool(found.student.any()):
        return _found(name, "masked-rows", "a response of which no row counts has a gradient")
    return _ok(name, "a response of which no row counts adds nothing")


def missing(subject: Subject) -> Check:
    """A teacher's row of NaN must be refused, or be seen in what comes out."""
    name, loss = "missing scores", subject.loss
    rows = response(53, 4, loss.dtype)
    teacher = rows.teacher.clone()
    teacher[1] = math.nan
    try:
        found = derivative(loss, replace(rows, teacher=teacher))
    except Exception as error:  # anything may be raised by a loss under audit
        return _ok(name, f"it refuses them: {_first_line(error)}")
    if not bool(found.value.isfinite().all()) or not bool(found.student.isfinite().all()):
        return _ok(name, "they show as NaN")
    moved = bool(found.student[1].any())
    message = "a row without scores gets " + ("a gradient all the same" if moved else "none")
    return _found(name, "missing-scores", f"{message}, and nothing says so")


def vocabularies(subject: Subject) -> Check:
    """Models whose vocabularies are padded to different widths."""
    name, loss = "padded vocabulary", subject.loss
    rows = response(61, 4, loss.dtype)
    rows = replace(rows, tokens=rows.tokens % 6)
    extra = response(62, 4, loss.dtype).student[:, :2]
    narrow = replace(rows, student=rows.student[:, :6], teacher=rows.teacher[:, :6])
    wanted = derivative(loss, narrow).student
    said = []
    for who in ("teacher", "student"):
        logits = torch.cat([getattr(narrow, who), extra], 1)
        wide = _changed(narrow, who, logits)
        try:
            found = derivative(loss, wide).student[:, :6]
        except Exception as error:  # anything may be raised by a loss under audit
            said.append(f"a wider {who} is refused ({_first_line(error)})")
            continue
        off = _off(found, wanted)
        if off <= subject.tolerance:
            said.append(f"a wider {who} is cut to what both have")
            continue
        return _padding(subject, narrow, wide, who, found, off)
    return _ok(name, "; ".join(said))


def _padding(
    subject: Subject, narrow: Rows, wide: Rows, who: str, found: Tensor, off: float
) -> Check:
    """Which padding explains a gradient that differs."""
    name, loss = "padded vocabulary", subject.loss
    small = "student" if who == "teacher" else "teacher"
    added = getattr(wide, who)[:, 6:]
    guesses = {
        "": (torch.full_like(added, -40.0), "nothing"),
        "padding-has-mass": (torch.zeros_like(added), "logits of 0, which have probability"),
        "padding-copied": (added, "copies of the other's logits"),
    }
    for finding, (padding, words) in guesses.items():
        padded = _changed(wide, small, torch.cat([getattr(narrow, small), padding], 1))
        try:
            guessed = derivative(loss, padded).student[:, :6]
        except Exception:  # a guess that cannot be called explains nothing
            continue
        if _off(found, guessed) > subject.tolerance:
            continue
        if not finding:
            return _ok(name, f"entries that only the {who} has count in its own softmax alone")
        return _found(name, finding, f"a narrower {small} is padded with {words}", off=off)
    return _found(
        name, "padding", f"with a wider {who} the shared entries' gradient is off by {off:.2g}"
    )


def low_precision(subject: Subject) -> Check:
    """bfloat16 logits at a KL of 2e-4, against the same logits in float64."""
    name, loss = "bfloat16", subject.loss
    draw = torch.Generator().manual_seed(71)
    rows_, vocabulary = 64, 512
    teacher = 2.0 * torch.randn(rows_, vocabulary, generator=draw, dtype=torch.float64)
    noise = torch.randn(rows_, vocabulary, generator=draw, dtype=torch.float64)
    student, teacher = (teacher + 0.02 * noise).bfloat16(), teacher.bfloat16()
    tokens = torch.multinomial(student.double().softmax(-1), 1, generator=draw).squeeze(1)
    mask = torch.ones(rows_, dtype=torch.bool)
    rows = Rows(student, teacher, tokens, mask)
    exact = replace(rows, student=student.to(loss.dtype), teacher=teacher.to(loss.dtype))
    try:
        found = derivative(loss, rows).student.double()
    except Exception as error:  # anything may be raised by a loss under audit
        return _not_applicable(name, f"it cannot be called: {_first_line(error)}")
    off = _off(found, derivative(loss, exact).student.double())
    if off <= 0.05:
        return _ok(name, f"a small gradient is off by {off:.2%}", off=off)
    message = (
        f"at a KL of about 2e-4 the gradient is off by {off:.0%}; a softmax of float32 logits is "
        "not"
    )
    return _found(name, "low-precision", message, off=off)


def detached(subject: Subject) -> Check:
    """Whether a gradient would flow into the teacher."""
    name, loss = "teacher detached", subject.loss
    found = derivative(loss, response(81, 4, loss.dtype), teacher=True)
    assert found.teacher is not None
    share = float(found.teacher.norm() / found.student.norm().clamp(min=1e-300))
    if not share:
        return _ok(name, "no gradient flows into the teacher")
    message = (
        "a gradient flows into the teacher: harmless while it is frozen, wrong where it is the "
        "student itself"
    )
    return _found(name, "teacher-gradient", message, share=share)


def ratios(subject: Subject) -> Check:
    """A token that whoever wrote it found e^14 times unlikelier than the student does."""
    name, loss = "importance ratio", subject.loss
    if "old_logp" not in loss.takes:
        return _not_applicable(name, "it takes no old_logp")
    rows = response(91, 6, loss.dtype)
    on_policy = derivative(loss, rows).student.norm(dim=-1)
    growth = 0.0
    for n in range(len(on_policy)):
        old = rows.old.clone()
        old[n] -= 14.0
        stale = derivative(loss, replace(rows, old_logp=old)).student[n].norm()
        growth = max(growth, float(stale / on_policy[n].clamp(min=1e-300)))
    if growth > 1e4:
        message = f"a token whose ratio is e^14 weighs {growth:.1e} times as much as on policy"
        return _found(name, "unbounded-ratio", message, growth=growth)
    return _ok(
        name, f"a token whose ratio is e^14 weighs {growth:.2g} times as much", growth=growth
    )


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 100 else f"{line[:97]}..."


CHECKS: tuple[Callable[[Subject], Check], ...] = (
    rows_apart,
    masks,
    micro_batches,
    temperature,
    zero_mass,
    no_rows,
    missing,
    vocabularies,
    low_precision,
    detached,
    ratios,
)
"""Looks that need no expectation."""

EXPECTATIONS: tuple[Callable[[Subject], Check], ...] = (
    teaches,
    mixed,
    advantage,
    stationary,
    alive,
)
"""Looks at the sum over tokens, for losses of single rows."""

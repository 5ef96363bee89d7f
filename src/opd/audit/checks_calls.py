"""Checks of single calls: which rows a row reads, masks, splits, rows and scores that lack."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from opd.audit.findings import Check, fine, flagged, inapplicable
from opd.audit.loss import derivative
from opd.audit.subject import SILENT, Subject, differ, distance, first_line, response
from opd.audit.targets import match

__all__ = ["company", "masks", "micro_batches", "missing", "no_rows", "rows_apart"]


def rows_apart(subject: Subject) -> Check:
    """Own rows, neighbours, later rows, everything."""
    name, seen = "own row", subject.coupling
    if subject.is_silent:
        return inapplicable(name, SILENT)
    silent = (seen.base == 0).all(-1)
    figures = {"rows_without_gradient": float(silent.double().mean())}
    for what, sees in (("teacher", seen.teacher), ("token", seen.token)):
        shift = _shift_of(sees)
        if shift is not None:
            side = "next" if shift > 0 else "previous"
            return flagged(
                name, "off-by-one", f"row n reads the {what} of the {side} row", **figures
            )
    if seen.is_separable:
        return fine(name, "every row looks at itself alone", **figures)
    if seen.is_ahead:
        return fine(name, "a row looks at itself and at later rows, as credit does", **figures)
    message = "a row's gradient depends on rows before it: a statistic of the call, or a slip"
    return flagged(name, "reads-other-rows", message, **figures)


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


def masks(subject: Subject) -> Check:
    """Rows that do not count have no gradient and no weight; those that do are all there."""
    name, loss = "mask", subject.loss
    rows = response(31, 6, loss.dtype)
    mask = torch.tensor([True, True, False, True, False, True])
    takes = "mask" in loss.takes
    masked = derivative(loss, replace(rows, mask=mask)).student if takes else rows.student
    if takes and bool(masked[~mask].any()) and not bool(masked[mask].any()):
        message = "the mask is inverted: rows that count have no gradient, the others have one"
        return flagged(name, "masked-rows", message)
    if subject.is_silent:
        return inapplicable(name, SILENT)
    full = derivative(loss, rows).student
    silent = (full == 0).all(-1)
    other = response(32, 6, loss.dtype)
    elsewhere = derivative(loss, replace(other, tokens=rows.tokens)).student
    # by its place or its token; what the models say of a row is for the check of dead rows
    is_told_apart = torch.equal(silent, (elsewhere == 0).all(-1))
    if bool(silent.any()) and not bool(silent.all()) and is_told_apart:
        which = _places(silent)
        return flagged(name, "masked-rows", f"of 6 rows that count, {which} got no gradient")
    if not takes:
        return inapplicable(name, "it takes no mask")
    if bool(masked[~mask].any()):
        return flagged(name, "masked-rows", "rows that are masked have a gradient")
    moved = replace(
        rows,
        mask=mask,
        student=torch.where(mask[:, None], rows.student, other.student),
        teacher=torch.where(mask[:, None], rows.teacher, other.teacher),
    )
    if bool(differ(derivative(loss, moved).student[mask], masked[mask], loss).any()):
        return flagged(name, "masked-rows", "what stands in masked rows changes the others")
    lost = (masked[mask] == 0).all(-1) & ~silent[mask]
    if bool(lost.any()):
        which = _places(lost)
        return flagged(name, "masked-rows", f"of the rows that count, {which} got no gradient")
    if subject.single:
        alone = derivative(loss, rows.at(mask.nonzero().flatten())).student
        scale = match(masked[mask], alone).scale
        if abs(scale - 1) > subject.tolerance:
            message = f"masked rows count in the mean: the others weigh {scale:.3g} of their share"
            return flagged(name, "masked-rows", message, weight=scale)
    return fine(name, "masked rows have no gradient and no weight")


def _places(silent: Tensor) -> str:
    where = silent.nonzero().flatten().tolist()
    if where == [0]:
        return "the first"
    if where == [len(silent) - 1]:
        return "the last"
    return f"{len(where)}"


def company(subject: Subject) -> Check:
    """Rows that look at themselves alone: one call on many against a call for each."""
    name, together = "among other rows", subject.together
    if together is None or not subject.single:
        return inapplicable(name, "its rows belong together")
    if subject.is_silent:
        return inapplicable(name, SILENT)
    if subject.company == "alike":
        return fine(name, "a row teaches the same beside others as alone, up to one factor")
    alone = subject.ordinary.pieces
    factors = (together.pieces * alone).sum(-1) / alone.square().sum(-1).clamp(min=1e-300)
    figures = {"least_factor": float(factors.min()), "largest_factor": float(factors.max())}
    turned = float((factors[..., None] * alone - together.pieces).norm() / alone.norm())
    if turned > 1e-3 * max(map(abs, figures.values())):
        seen = "beside others a row has another gradient than alone"
    elif figures["least_factor"] < 0:
        opposite = f"{int((factors < 0).sum())} of {factors.numel()} rows"
        seen = f"in one call {opposite} have the opposite of the gradient that they have alone"
    else:
        least, largest = figures.values()
        seen = f"beside others a row weighs {least:.3g} to {largest:.3g} of what it weighs alone"
    if subject.company in ("chance", "neighbours"):
        by = {"chance": "a draw", "neighbours": "what stands beside it: a statistic of the call"}
        message = f"{seen}, by {by[subject.company]}"
        return flagged(name, "reads-other-rows", message, **figures)
    return flagged(name, "place-in-call", f"{seen}, by its place in the call", **figures)


def micro_batches(subject: Subject) -> Check:
    """One call and two smaller calls add up to the same gradient."""
    name, loss = "micro-batches", subject.loss
    rows = response(41, 6, loss.dtype)
    whole = derivative(loss, rows)
    parts = [torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5])]
    if not subject.single:
        return inapplicable(name, "its rows belong together: only whole responses can be split")
    if subject.company != "alike":
        return inapplicable(name, "what a row weighs is not its own to begin with")
    is_told = "count" in loss.takes
    count = 6 if is_told else None
    split = [derivative(loss, replace(rows.at(part), count=count)).student for part in parts]
    gap = distance(torch.cat(split), whole.student)
    if gap <= subject.tolerance:
        told = "split calls add up, told the count of all"
        alone = "a loss per row: the sum over rows is the trainer's"
        summed = alone if whole.value.dim() else "a sum: split calls add up"
        return fine(name, told if is_told else summed, off=gap)
    if is_told:
        message = f"told the count of all micro-batches, split calls are off by {gap:.2g}"
        return flagged(name, "mean-of-means", message, off=gap)
    each = "each row's loss" if whole.value.dim() else "it"
    message = (
        f"{each} {'is divided' if whole.value.dim() else 'divides'} by the rows of its own call, "
        "so the mean over micro-batches is not the mean over rows unless they are all of one "
        "size: weigh each by its rows"
    )
    return flagged(name, "own-count", message, off=gap)


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
        return fine(name, f"it refuses a response of which no row counts: {first_line(error)}")
    if not bool(found.value.isfinite().all()) or not bool(found.student.isfinite().all()):
        return flagged(name, "not-finite", "a response of which no row counts gives NaN")
    if bool(found.student.any()):
        return flagged(name, "masked-rows", "a response of which no row counts has a gradient")
    return fine(name, "a response of which no row counts adds nothing")


def missing(subject: Subject) -> Check:
    """A teacher's row of NaN must be refused, or be seen in what comes out."""
    name, loss = "missing scores", subject.loss
    if not subject.coupling.teacher.any():
        return inapplicable(name, "it reads no score of the teacher's")
    rows = response(53, 4, loss.dtype)
    teacher = rows.teacher.clone()
    teacher[1] = math.nan
    try:
        found = derivative(loss, replace(rows, teacher=teacher))
    except Exception as error:  # anything may be raised by a loss under audit
        return fine(name, f"it refuses them: {first_line(error)}")
    if not bool(found.value.isfinite().all()) or not bool(found.student.isfinite().all()):
        return fine(name, "they show as NaN")
    if not bool(found.student[1].any()):
        message = "a row without scores has no gradient: it is left out, and nothing says so"
        return flagged(name, "skipped-scores", message)
    message = "a row without scores gets a gradient all the same, and nothing says so"
    return flagged(name, "missing-scores", message)

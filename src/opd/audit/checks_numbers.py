"""Checks of numbers: temperature, zero mass, padding, precision, the teacher's side, ratios."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from opd.audit.findings import Check, fine, flagged, inapplicable, noted
from opd.audit.loss import Rows, derivative
from opd.audit.subject import Subject, distance, first_line, response, with_field
from opd.audit.targets import match
from opd.audit.toys import ORDINARY, Toy

__all__ = ["detached", "low_precision", "ratios", "temperature", "vocabularies", "zero_mass"]


def temperature(subject: Subject) -> Check:
    """At temperature 2: the gradient's direction is that of halved logits."""
    name, loss = "temperature", subject.loss
    if "temperature" not in loss.takes:
        return inapplicable(name, "it takes no temperature")
    by = 2.0
    toy = ORDINARY
    at = subject.expected(toy, temperature=by).pieces
    halved = {
        "both": Toy(toy.student / by, toy.teacher / by),
        "the student alone": Toy(toy.student / by, toy.teacher),
        "the teacher alone": Toy(toy.student, toy.teacher / by),
        "neither": toy,
    }
    seen = {who: match(at, subject.expected(version).pieces) for who, version in halved.items()}
    left = {who: found.residual for who, found in seen.items()}
    best = min(left, key=lambda who: left[who])
    figures = {f"residual if it divides {who}": value for who, value in left.items()}
    if best == "both" and left[best] <= subject.tolerance:
        factor = seen[best].scale * by  # the derivative of halved logits has 1/2 of its own
        said = f"; its gradient is {factor:.3g} x theirs at T = 2"
        for power, words in (
            (0, ", and no factor T^2 makes up for it: the gradient fades with T"),
            (2, ", and the factor T^2 makes up for it"),
            (4, ", and the factor is T^4, where T^2 makes up for it"),
        ):
            if abs(factor / by**power - 1) < 1e-3:
                said = words
        is_usual = abs(factor - 1) < 1e-3 or abs(factor / by**2 - 1) < 1e-3
        message = f"it divides the logits of both{said}"
        return (fine if is_usual else noted)(name, message, factor=factor, **figures)
    if left[best] <= subject.tolerance:
        return flagged(name, "temperature", f"it divides the logits of {best}", **figures)
    return flagged(
        name, "temperature", "it changes the gradient, but not as divided logits would", **figures
    )


def zero_mass(subject: Subject) -> Check:
    """Ids that neither model gives any mass, as a vocabulary that is padded with -inf has."""
    name, loss = "zero mass", subject.loss
    if loss.is_linear:
        return inapplicable(name, "its logits are products, which are finite")
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
        return fine(name, f"it refuses logits of -inf: {first_line(error)}")
    if bool(found.value.isnan().any()) or bool(found.student.isnan().any()):
        where = "value" if bool(found.value.isnan().any()) else "gradient"
        return flagged(name, "not-finite", f"ids with logits of -inf in both make the {where} NaN")
    off = distance(found.student[:, :6], wanted.student)
    if off <= subject.tolerance:
        return fine(name, "ids with logits of -inf in both models change nothing", off=off)
    message = f"ids with logits of -inf in both models change the others' gradient by {off:.2g}"
    return flagged(name, "not-finite", message, off=off)


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
        wide = with_field(narrow, who, logits)
        try:
            found = derivative(loss, wide).student[:, :6]
        except Exception as error:  # anything may be raised by a loss under audit
            said.append(f"a wider {who} is refused ({first_line(error)})")
            continue
        off = distance(found, wanted)
        if off <= subject.tolerance:
            said.append(f"a wider {who} is cut to what both have")
            continue
        return _padding(subject, narrow, wide, who, found, off)
    return fine(name, "; ".join(said))


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
        padded = with_field(wide, small, torch.cat([getattr(narrow, small), padding], 1))
        try:
            guessed = derivative(loss, padded).student[:, :6]
        except Exception:  # a guess that cannot be called explains nothing
            continue
        if distance(found, guessed) > subject.tolerance:
            continue
        if not finding:
            return fine(name, f"entries that only the {who} has count in its own softmax alone")
        return flagged(name, finding, f"a narrower {small} is padded with {words}", off=off)
    return flagged(
        name, "padding", f"with a wider {who} the shared entries' gradient is off by {off:.2g}"
    )


def low_precision(subject: Subject) -> Check:
    """bfloat16 logits at a KL of 2e-4, against the same logits in float64."""
    name, loss = "bfloat16", subject.loss
    if subject.precision == "half":
        message = (
            "it computes in bfloat16 or float16 whatever its logits are in: its gradient is off by "
            "up to 1%, and a small one is all rounding"
        )
        return flagged(name, "low-precision", message)
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
        return inapplicable(name, f"it cannot be called: {first_line(error)}")
    off = distance(found, derivative(loss, exact).student.double())
    if off <= 0.05:
        return fine(name, f"a small gradient is off by {off:.2%}", off=off)
    message = (
        f"at a KL of about 2e-4 the gradient is off by {off:.0%}; a softmax of float32 logits is "
        "not"
    )
    return flagged(name, "low-precision", message, off=off)


def detached(subject: Subject) -> Check:
    """Whether a gradient would flow into the teacher."""
    name, loss = "teacher detached", subject.loss
    found = derivative(loss, response(81, 4, loss.dtype), teacher=True)
    assert found.teacher is not None
    share = float(found.teacher.norm() / found.student.norm().clamp(min=1e-300))
    if not share:
        return fine(name, "no gradient flows into the teacher")
    message = (
        "a gradient flows into the teacher: harmless while it is frozen, wrong where it is the "
        "student itself"
    )
    return flagged(name, "teacher-gradient", message, share=share)


def ratios(subject: Subject) -> Check:
    """A token that whoever wrote it found e^14 times unlikelier than the student does."""
    name, loss = "importance ratio", subject.loss
    if "old_logp" not in loss.takes:
        return inapplicable(name, "it takes no old_logp")
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
        return flagged(name, "unbounded-ratio", message, growth=growth)
    return fine(
        name, f"a token whose ratio is e^14 weighs {growth:.2g} times as much", growth=growth
    )

"""Checks of the sum over tokens, for losses of single rows.

Axes: S states, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from opd.audit.findings import Check, fine, flagged, inapplicable
from opd.audit.subject import SILENT, Subject
from opd.audit.toys import ORDINARY, REGIMES, SURER_ROWS, Expected

__all__ = ["advantage", "alive", "mixed", "stationary", "teaches"]


def teaches(subject: Subject) -> Check:
    """Whether anything is left of the gradient once the tokens are summed over."""
    name, found = "teaches", subject.ordinary
    share = float(found.gradient.norm()) / subject.unit
    figures = {"expected_over_sampled": share}
    if subject.is_silent:
        return flagged(name, "no-teacher-gradient", SILENT, **figures)
    if share > subject.tolerance:
        return fine(
            name, f"its expected gradient is {share:.2g} of what single rows have", **figures
        )
    why = "the same advantage for every token" if _is_one_advantage(found) else "it cancels"
    message = (
        f"its gradient is zero in expectation ({why}): {share:.1e} of what single rows have, so "
        "the teacher moves nothing but noise"
    )
    return flagged(name, "no-teacher-gradient", message, **figures)


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
        return inapplicable(name, SILENT)
    spread = (found.pieces - found.gradient[:, None, :]).norm() / found.pieces.norm().clamp(
        min=1e-300
    )
    figures = {"spread_over_tokens": float(spread)}
    if float(spread) <= subject.tolerance:
        return fine(name, "the tokens do not matter: it compares distributions", **figures)
    if subject.writer == "teacher" or float(found.gradient.norm()) <= 1e-4 * subject.unit:
        return fine(name, "the gradient depends on the token that was written", **figures)
    weight, left = _score_weight(found, found.gradient)
    explained = not bool((left > subject.tolerance).any())
    largest = float(weight.abs().max())
    if explained and float((weight + found.value).abs().max()) <= 1e-4 * largest:
        message = "an advantage, the same for every token, carries a gradient, which is all it does"
        return flagged(name, "undetached", message, **figures)
    if not explained or float((weight - weight.mean()).abs().max()) > 1e-4 * largest:
        return fine(name, "the gradient depends on the token that was written", **figures)
    share = float(weight.mean())
    message = (
        f"{share:.3g} x the cross-entropy of the token is part of it: zero in expectation on the "
        "student's own text, and imitation of whoever wrote any other"
    )
    return flagged(name, "hard-labels", message, weight=share, **figures)


def advantage(subject: Subject) -> Check:
    """What multiplies the score of the token, and whether it is held fixed.

    An advantage A that carries a gradient adds `log student(token) * grad A` to the policy
    gradient. If A is the log-ratio, what is left is `log teacher - 2 log student` times the score.
    """
    name, found = "advantage", subject.ordinary
    if subject.is_silent:
        return inapplicable(name, SILENT)
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
            return flagged(name, "undetached", message)
        held = _held_in(paid, teacher - student)
        if held is not None:
            bounds = [
                f"{side} {bound:.3g}"
                for side, bound in zip(("above", "below"), held, strict=True)
                if math.isfinite(bound)
            ]
            message = (
                f"the log-ratio is held {' and '.join(bounds)}: what lies beyond weighs no more"
            )
            return flagged(name, "bounded-reward", message, lowest=held[0], highest=held[1])
        return fine(name, "a number of each token times its score, held fixed")
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
            return fine(name, "there is none: it is no policy gradient")
        share = max(share, float((live @ fitted[1:]).norm() / target.norm()))
    if share <= tolerance:
        return fine(name, "one number per row times the score, held fixed")
    message = "the number it multiplies the score with carries a gradient: detach it"
    return flagged(name, "undetached", message, share=share)


def _held_in(
    paid: Float[Tensor, "S V"], log_ratio: Float[Tensor, "S V"]
) -> tuple[float, float] | None:
    """The bounds in which an advantage is the log-ratio, up to a factor; None if there are none."""
    low, high = float(paid.min()), float(paid.max())
    near = 1e-6 * (high - low)
    inside = (paid > low + near) & (paid < high - near)
    if int(inside.sum()) < 4 or high <= low:
        return None
    factor = float((paid * log_ratio)[inside].sum() / log_ratio[inside].square().sum())
    free = factor * log_ratio
    if factor <= 0 or float((free.clamp(low, high) - paid).abs().max()) > 1e-4 * (high - low):
        return None
    lowest = low / factor if float(free.min()) < low - near else -math.inf
    highest = high / factor if float(free.max()) > high + near else math.inf
    return (lowest, highest) if math.isfinite(lowest) or math.isfinite(highest) else None


def stationary(subject: Subject) -> Check:
    """Teacher = student, on the ordinary toy and on a sharp one."""
    name, shares = "teacher = student", []
    if subject.is_silent:
        return inapplicable(name, SILENT)
    for toy in (ORDINARY, REGIMES[SURER_ROWS]):
        found = subject.expected(toy.at_teacher())
        shares.append(float(found.gradient.norm()) / max(subject.unit, found.size))
    share = max(shares)
    if share <= subject.tolerance:
        return fine(name, "no gradient in expectation", share=share)
    message = (
        f"its gradient there is {share:.2g} of the usual length: a student that equals its teacher "
        "is moved away"
    )
    return flagged(name, "not-stationary", message, share=share)


def alive(subject: Subject) -> Check:
    """Rows without any gradient, in every regime."""
    name, figures = "rows with a gradient", {}
    if subject.is_silent:
        return inapplicable(name, SILENT)
    worst, where = 0.0, ""
    for label, toy in REGIMES.items():
        dead = subject.expected(toy).dead
        figures[label] = dead
        if dead > worst:
            worst, where = dead, label
    if not worst:
        return fine(name, "every row that differs has one", **figures)
    message = f"{worst:.0%} of {where} have none: a clamp, a cap or a selection removes them"
    return flagged(name, "dead-rows", message, **figures)

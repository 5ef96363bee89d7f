"""Checks against a divergence: the one that a loss claims, or that it was found to descend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from opd.audit.findings import Check, fine, flagged, inapplicable, noted
from opd.audit.loss import derivatives
from opd.audit.subject import Subject, distance
from opd.audit.targets import PLAIN, Claim, Match, claim_of, match, toy_gradient, words
from opd.audit.toys import ORDINARY, Expected, Toy, expected, rows_of

__all__ = ["direction", "divergence_of", "stale", "value"]


def divergence_of(text: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Of a claim that is one."""
    found = claim_of(text).divergence
    assert found is not None
    return found


def direction(named: Match | None) -> Check:
    """Towards the teacher, or away from it."""
    name = "direction"
    if named is None or not named.is_claim:
        return inapplicable(name, "there is no divergence that it descends")
    if named.scale > 0:
        return fine(name, f"down the {named.in_words}")
    message = f"it descends the opposite of {named.in_words}: the student is driven away"
    return flagged(name, "ascent", message)


def _compared(claim: Claim, named: Match | None) -> str:
    """The divergence that a loss is compared with: what it claims, or else what it descends."""
    if claim.divergence:
        return claim.text
    return named.text if named and named.is_claim else ""


def value(found: Expected, claim: Claim, named: Match | None) -> Check:
    """Whether the number that is logged is the divergence that is descended or claimed."""
    name, text = "value", _compared(claim, named)
    if not bool(found.value.isfinite().all()):
        message = "the number that it returns on ordinary rows is not finite; its gradient is"
        return flagged(name, "not-finite", message)
    if not text:
        return inapplicable(name, "there is no divergence to compare it with")
    wanted = divergence_of(text)(ORDINARY.student.log_softmax(-1), ORDINARY.teacher.log_softmax(-1))
    factor = float((found.value * wanted).sum() / wanted.square().sum())
    left = float((found.value - factor * wanted).norm() / wanted.norm())
    if left <= 1e-4 * abs(factor):
        times = "" if abs(factor - 1) <= 1e-4 else f"{factor:.4g} x "
        message = f"in expectation it is {times}the {words(text)}"
        return fine(name, message) if factor > 0 else noted(name, message, factor=factor)
    message = f"in expectation it is not the {words(text)}, by {left:.2g}: do not read it as one"
    return noted(name, message, left=left, factor=factor)


def stale(subject: Subject, claim: Claim, named: Match | None) -> Check:
    """Text by an older student, whose log-probabilities the loss is told.

    By one so near that no clip binds, so that a right ratio is exact.
    """
    name = "stale text"
    if "old_logp" not in subject.loss.takes:
        return inapplicable(name, "it takes no old_logp")
    text = _compared(claim, named)
    if not text:
        return inapplicable(name, "there is no divergence to compare it with")
    if named is None or named.text != text or named.scale < 0:
        return inapplicable(name, "it is another gradient on the student's own text already")
    draw = torch.Generator().manual_seed(13)
    noise = torch.randn(ORDINARY.student.shape, generator=draw, dtype=torch.float64)
    near, far = (ORDINARY.student + step * noise for step in (0.02, 0.5))
    target = toy_gradient(ORDINARY, divergence_of(text))
    frozen = target - toy_gradient(Toy(ORDINARY.student, near), PLAIN["reverse_kl"])
    found = list(_by_another(subject, near))
    own = subject.ordinary.pieces
    if distance(found[0].pieces, own) <= 1e-9:
        return fine(name, "it does not look at old_logp: for the student's own text alone")
    plain = match((found[0].weights[..., None] * own).sum(1), target).residual
    left = min(match(one.gradient, target).residual for one in found)
    left_if_frozen = min(match(one.gradient, frozen).residual for one in found)
    at_far = max(
        (match(one.gradient, target) for one in _by_another(subject, far)),
        key=lambda one: one.cosine,
    )
    figures = {"residual": left, "without_ratio": plain}
    least = max(0.1 * plain, subject.tolerance)
    if left > least and text == "reverse_kl" and left_if_frozen <= least:
        message = "tokens are weighed by their ratio; the advantage is that of the rollout"
        return noted(name, message, **figures)
    if left > least:
        message = (
            "tokens of a policy that differs by 2% are not weighed by their ratio: the gradient is "
            f"off by {left:.2g}, and by {plain:.2g} without any ratio; on older text its cosine "
            f"with {words(text)} is {at_far.cosine:.3f}"
        )
        return flagged(name, "stale-text", message, **figures)
    if at_far.residual <= subject.tolerance:
        return fine(name, "corrected exactly, the prefixes being those of the old text", **figures)
    message = (
        "corrected exactly where the ratio is near 1; on older text a bound holds it back, and the "
        f"cosine with {words(text)} is {at_far.cosine:.3f}"
    )
    lost = _lost(subject) if text == "reverse_kl" else 0.0
    if lost:  # as a mask of both sides does, and PPO's clip without its minimum
        message += (
            f"; of the tokens that have gone against the teacher by a factor of e {lost:.0%} have "
            "no gradient, so nothing brings them back"
        )
        return noted(name, message, lost=lost, **figures)
    return fine(name, message, **figures)


def _by_another(subject: Subject, behaviour: Float[Tensor, "S V"]) -> Iterator[Expected]:
    """On text of another policy: every token a response of its own, and all of them one.

    Some ratios are those of whole responses, and some shares are of many tokens.
    """
    for batched in (False, True) if subject.company == "alike" else (False,):
        yield expected(
            subject.loss, ORDINARY, writer=subject.writer, behaviour=behaviour, batched=batched
        )


def _lost(subject: Subject) -> float:
    """The share without a gradient of tokens that moved against their log-ratio, by a factor e."""
    rows = rows_of(ORDINARY, subject.loss.dtype)
    logp, teacher = (
        side.log_softmax(-1).gather(-1, rows.tokens[:, None]).squeeze(-1)
        for side in (rows.student, rows.teacher)
    )
    ratio = teacher - logp
    against = replace(rows, old_logp=logp + ratio.sign())
    called = derivatives(
        subject.loss, [against.at(row) for row in torch.arange(len(logp))[:, None]]
    )
    dead = (torch.cat([one.student for one in called]) == 0).all(-1)
    alive = ~(subject.ordinary.pieces == 0).all(-1).flatten()
    wanted = alive & (ratio.abs() > 1.5)
    return float((dead & wanted).sum() / wanted.sum().clamp(min=1))

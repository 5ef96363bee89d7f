"""The audit of a loss: what it descends, whether that is what it claims, and what is wrong.

Every number is a finite sum over small worlds, in float64 unless the loss insists on less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.audit.findings import (
    CHECKS,
    EXPECTATIONS,
    Check,
    Finding,
    Subject,
    subject_of,
)
from opd.audit.loss import Loss, bare
from opd.audit.targets import (
    NO_CLAIM,
    PLAIN,
    SEQUENCE,
    Claim,
    Match,
    claim_of,
    credit_weights,
    depth_of,
    identify,
    match,
    nearest_match,
    toy_gradient,
    tree_target,
    words,
)
from opd.audit.toys import ORDINARY, ORDINARY_ROWS, REGIMES, Expected, Writer, of_tree, tree
from opd.audit.worlds import World

__all__ = ["Verdict", "audit_loss"]


Points = Mapping[str, tuple[tuple[float, float], ...]]


@dataclass(frozen=True)
class Verdict:
    """What an audit found.

    Attributes:
        name: of the loss.
        claim: what it is said to descend, as written; `none` where nothing was claimed.
        descends: what it does descend, in words.
        match: how its gradient compares with that; None where nothing with a name fits.
        cosines: with the named gradients, on the ordinary toy or the tree.
        holds: whether it descends what it claims and has no fault; None where nothing was claimed.
        checks: everything that was looked at.
        points: by kind of rows, of each entry the claimed gradient (or the nearest with a name)
            and the loss's, in units of the largest entry.
        seconds: of the process's time.
    """

    name: str
    claim: str
    descends: str
    match: Match | None
    cosines: Mapping[str, float]
    holds: bool | None
    checks: tuple[Check, ...]
    points: Points
    seconds: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Faults first."""
        found = [finding for check in self.checks for finding in check.findings]
        return tuple(sorted(found, key=lambda finding: not finding.is_fault))

    @property
    def faults(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.is_fault)

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        told = f"descends {self.descends}"
        if self.match is not None:
            told += f" (cosine {self.match.cosine:.3f})"
        if self.claim == NO_CLAIM:
            return told
        told += f"; named {words(self.claim)}: "
        if self.holds:
            return f"{told}holds"
        is_named_so = self.match is not None and self.match.text == self.claim
        why = ", ".join(dict.fromkeys(fault.name for fault in self.faults))
        return f"{told}does not hold{f' ({why})' if is_named_so else ''}"


def audit_loss(
    loss: Loss | Callable[..., Any],
    *,
    claim: str | None = None,
    writer: Writer = "student",
    name: str = "",
) -> Verdict:
    """Find out what a loss descends.

    Args:
        loss: `f(student_logits [N, V], teacher_logits [N, V], tokens [N])` to a loss per row or to
            one number, or a `Loss` that an adapter made.
        claim: what it should descend, such as `reverse_kl` or `jsd:0.3`.
        writer: who wrote the tokens; `teacher` for losses of supervised or off-policy training.

    Raises:
        ConfigError: there is no such claim, or the loss is not of that form.
        Exception: whatever the loss itself raises on ordinary rows.
    """
    started = time.process_time()
    if not isinstance(loss, Loss):
        loss = bare(loss, name or getattr(loss, "__name__", type(loss).__name__))
    claimed = claim_of(NO_CLAIM if claim is None else claim)
    subject = subject_of(loss, writer)
    looks = [check(subject) for check in CHECKS]
    if subject.single:
        looks += [check(subject) for check in EXPECTATIONS]
        found = _single_rows(subject, claimed)
    else:
        found = _responses(subject, claimed)
    checks = (*found.checks, *looks)
    bad = any(finding.is_fault for check in checks for finding in check.findings)
    return Verdict(
        name=loss.name,
        claim=claimed.text,
        descends=found.descends,
        match=found.match,
        cosines=found.cosines,
        holds=None if claim is None else not bad,
        checks=checks,
        points=found.points,
        seconds=time.process_time() - started,
    )


@dataclass(frozen=True)
class _Found:
    descends: str
    match: Match | None
    cosines: dict[str, float]
    checks: tuple[Check, ...]
    points: Points


def _points(gradient: Tensor, target: Tensor, scale: float) -> tuple[tuple[float, float], ...]:
    unit = float(target.abs().max())
    pairs = torch.stack([target.flatten(), gradient.flatten() / (scale or 1.0)], 1) / unit
    return tuple((float(x), float(y)) for x, y in pairs)


# --------------------------------------------------------------------------------------------
# Losses of single rows


def _single_rows(subject: Subject, claim: Claim) -> _Found:
    loss, tolerance = subject.loss, subject.tolerance
    found = subject.ordinary
    vanishes = subject.is_silent or float(found.gradient.norm()) <= tolerance * found.size
    named = None if vanishes else identify(found.gradient, tolerance=tolerance)
    near = None if vanishes else nearest_match(found.gradient)
    targets = {
        **{text: toy_gradient(ORDINARY, what) for text, what in PLAIN.items()},
        "jsd:0.5": toy_gradient(ORDINARY, _divergence("jsd:0.5")),
    }
    if claim.divergence is not None:
        targets[claim.text] = toy_gradient(ORDINARY, claim.divergence)
    cosines = {text: match(found.gradient, target).cosine for text, target in targets.items()}
    checks = [_value(found, claim, named)]
    if claim.name == SEQUENCE:
        world = tree()
        gradient, target = of_tree(loss, world).gradient, tree_target(world, claim)
        told = match(gradient, target, claim.text)
        cosines[SEQUENCE] = told.cosine
        checks.insert(0, _claim_check(told, claim, named, near, tolerance, "whole responses"))
    elif claim.divergence is not None:
        checks.insert(0, _claim_in_regimes(subject, claim, named, near))
    checks.append(_stale(subject, claim, named))
    shown = claim.text if claim.text in targets else near.text if near else "reverse_kl"
    drawn = {label: subject.expected(toy).gradient for label, toy in REGIMES.items()}
    wanted = {label: toy_gradient(toy, _divergence(shown)) for label, toy in REGIMES.items()}
    scale = match(drawn[ORDINARY_ROWS], wanted[ORDINARY_ROWS]).scale
    points = {label: _points(drawn[label], wanted[label], scale) for label in REGIMES}
    return _Found(
        _descends(named, near),
        named or near,
        cosines,
        tuple(checks),
        points,
    )


def _divergence(text: str) -> Callable[[Tensor, Tensor], Tensor]:
    found = claim_of(text).divergence
    assert found is not None
    return found


def _descends(named: Match | None, near: Match | None) -> str:
    if named is not None:
        return f"{'' if named.scale > 0 else 'the opposite of '}{named.in_words}"
    if near is None or math.isnan(near.cosine):
        return "nothing: its expected gradient is zero"
    return f"nothing that has a name here; nearest {near.in_words}"


def _claim_in_regimes(
    subject: Subject, claim: Claim, named: Match | None, near: Match | None
) -> Check:
    """Whether the claimed gradient is the loss's, wherever student and teacher are."""
    assert claim.divergence is not None
    tolerance = subject.tolerance
    told = {}
    for label, toy in REGIMES.items():
        gradient = subject.expected(toy).gradient
        told[label] = match(gradient, toy_gradient(toy, claim.divergence), claim.text)
    ordinary = told[ORDINARY_ROWS]
    if not _is(ordinary, tolerance):
        return _claim_check(ordinary, claim, named, near, tolerance, "ordinary rows")
    figures = {f"residual on {label}": found.residual for label, found in told.items()}
    for label, found in told.items():
        rough = subject.rough_tolerance
        if not _is(found, rough) or abs(found.scale / ordinary.scale - 1) > rough:
            message = f"it descends {claim.in_words} on ordinary rows, but on {label} " + (
                f"the cosine is {found.cosine:.3f}"
                if found.cosine < 0.9995
                else f"it is off by {found.residual:.1e}"
            )
            fault = Finding("another-divergence", message)
            return Check("claim", "found", message, figures, (fault,))
    message = f"its gradient is {ordinary.scale:.4g} x that of {claim.in_words}"
    return Check("claim", "ok", message, figures)


def _is(found: Match, tolerance: float) -> bool:
    return found.residual <= tolerance and found.scale > 0


def _claim_check(
    told: Match,
    claim: Claim,
    named: Match | None,
    near: Match | None,
    tolerance: float,
    where: str,
) -> Check:
    figures = {"cosine": told.cosine, "factor": told.scale, "residual": told.residual}
    if _is(told, tolerance):
        message = f"its gradient is {told.scale:.4g} x that of {claim.in_words}"
        return Check("claim", "ok", message, figures)
    message = (
        f"on {where} it descends {_descends(named, near)}; with {claim.in_words} its cosine is "
        f"{told.cosine:.3f}"
    )
    fault = Finding("another-divergence", message)
    return Check("claim", "found", message, figures, (fault,))


def _value(found: Expected, claim: Claim, named: Match | None) -> Check:
    """Whether the number that is logged is the divergence that is descended or claimed."""
    text = claim.text if claim.divergence else named.text if named and named.is_claim else ""
    if not text or not bool(found.value.isfinite().all()):
        return Check("value", "not applicable", "there is no divergence to compare it with")
    what = _divergence(text)
    wanted = what(ORDINARY.student.log_softmax(-1), ORDINARY.teacher.log_softmax(-1))
    factor = float((found.value * wanted).sum() / wanted.square().sum())
    left = float((found.value - factor * wanted).norm() / wanted.norm())
    if left <= 1e-4 and factor > 0:
        times = "" if abs(factor - 1) <= 1e-4 else f"{factor:.4g} x "
        return Check("value", "ok", f"in expectation it is {times}the {words(text)}")
    message = f"it is not the {words(text)}, by {left:.2g}: do not read it as one"
    return Check("value", "ok", message, {"left": left, "factor": factor})


def _stale(subject: Subject, claim: Claim, named: Match | None) -> Check:
    """Text by an older student, whose log-probabilities the loss is told."""
    name = "stale text"
    if "old_logp" not in subject.loss.takes:
        return Check(name, "not applicable", "it takes no old_logp")
    text = claim.text if claim.divergence else named.text if named and named.is_claim else ""
    if not text:
        return Check(name, "not applicable", "there is no divergence to compare it with")
    draw = torch.Generator().manual_seed(13)
    noise = torch.randn(ORDINARY.student.shape, generator=draw, dtype=torch.float64)
    found = subject.expected(ORDINARY, behaviour=ORDINARY.student + 0.5 * noise)
    told = match(found.gradient, toy_gradient(ORDINARY, _divergence(text)), text)
    if _is(told, subject.tolerance):
        return Check(name, "ok", "corrected exactly, the prefixes being those of the old text")
    message = f"not corrected exactly: there its cosine with {words(text)} is {told.cosine:.3f}"
    return Check(name, "ok", message, {"cosine": told.cosine, "residual": told.residual})


# --------------------------------------------------------------------------------------------
# Losses that look along a response


def _responses(subject: Subject, claim: Claim) -> _Found:
    loss, tolerance = subject.loss, subject.tolerance
    world = tree()
    gradient, size = of_tree(loss, world)
    claims = [claim_of(text) for text in (SEQUENCE, "reverse_kl", "forward_kl", "jsd:0.5")]
    if claim.name != NO_CLAIM and claim.text not in [known.text for known in claims]:
        claims.append(claim)
    told = {known.text: match(gradient, tree_target(world, known), known.text) for known in claims}
    fitting = [found for found in told.values() if _is(found, tolerance)]
    named = fitting[0] if fitting else None
    cosines = {text: found.cosine for text, found in told.items()}
    known_cosines = {text: found for text, found in told.items() if not math.isnan(found.cosine)}
    near = max(known_cosines.values(), key=lambda found: found.cosine, default=None)
    weights, left = credit_weights(gradient, world)
    checks = [
        _credit(weights, left, tolerance),
        _teaches(gradient, size, world, tolerance),
        _still(loss, gradient, tolerance),
    ]
    if claim.name != NO_CLAIM:
        checks.insert(
            0, _claim_check(told[claim.text], claim, named, near, tolerance, "whole responses")
        )
    descends = _descends(named, near)
    if named is None and left <= tolerance:
        descends = f"log-ratios credited {_credit_in_words(weights)}"
        near = None
    shown = tree_target(world, claim_of(SEQUENCE if claim.name == NO_CLAIM else claim.text))
    points = {"whole responses": _points(gradient, shown, match(gradient, shown).scale)}
    return _Found(descends, named or near, cosines, tuple(checks), points)


def _credit(weights: Tensor, left: float, tolerance: float) -> Check:
    """How a token is credited for later log-ratios: by distance, or by their place."""
    name = "credit"
    if not left <= tolerance:
        return Check(name, "not applicable", "it is no sum of log-ratios, each with a weight")
    figures = {
        f"token {t}, reward {k}": float(weights[t, k])
        for t in range(len(weights))
        for k in range(t, len(weights))
    }
    lags = [weights.diagonal(lag) for lag in range(len(weights))]
    even = all(float((lag - lag.mean()).abs().max()) <= 1e-4 for lag in lags)
    said = _credit_in_words(weights)
    if even:
        return Check(name, "ok", f"log-ratios credited {said}", figures)
    message = f"a log-ratio weighs by where it stands, not by how far it is: {said}"
    return Check(name, "found", message, figures, (Finding("discount", message),))


def _credit_in_words(weights: Tensor) -> str:
    lags = [weights.diagonal(lag) for lag in range(len(weights))]
    if all(float((lag - lag.mean()).abs().max()) <= 1e-4 for lag in lags):
        return ", ".join(f"{float(lag.mean()):.3g}" for lag in lags) + " by distance"
    rows = [
        " ".join(f"{weight:.3g}" for weight in weights[t, t:].tolist()) for t in range(len(weights))
    ]
    return "; ".join(f"token {t}: {row}" for t, row in enumerate(rows))


def _teaches(gradient: Tensor, size: Tensor, world: World, tolerance: float) -> Check:
    """Whether a row moves towards its own teacher: the last rows, which have no later ones, do."""
    name = "teaches"
    last = depth_of(world) == world.horizon - 1
    share = float(gradient[last].norm() / size[last].sum().clamp(min=1e-300))
    if share > tolerance:
        return Check(name, "ok", "rows move by their own teacher", {"expected_over_sampled": share})
    whole = float(gradient.norm() / size.sum().clamp(min=1e-300))
    message = (
        "its expected gradient over whole responses is zero"
        if whole <= tolerance
        else "a row's own teacher moves nothing in expectation, only what its token does to later "
        "rows"
    )
    return Check(
        name,
        "found",
        message,
        {"expected_over_sampled": share},
        (Finding("no-teacher-gradient", message),),
    )


def _still(loss: Loss, gradient: Tensor, tolerance: float) -> Check:
    """Teacher = student over whole responses."""
    name, world = "teacher = student", tree()
    size = float(gradient.norm())
    same = replace(world, views={"teacher": world.student_logits})
    length = float(of_tree(loss, same).gradient.norm())
    if length <= tolerance * max(size, 1.0):
        return Check(name, "ok", "no gradient in expectation", {"length": length})
    message = f"its gradient there has {length / size:.2g} of the length it has elsewhere"
    return Check(name, "found", message, {}, (Finding("not-stationary", message),))

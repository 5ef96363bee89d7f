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

from opd.audit.checks import CHECKS, EXPECTATIONS
from opd.audit.checks_named import direction, divergence_of, stale, value
from opd.audit.findings import FAULTS, Check, Finding, fine, flagged, inapplicable
from opd.audit.loss import Loss, Writer, bare
from opd.audit.subject import Subject, repeats, subject_of
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
from opd.audit.toys import (
    ORDINARY,
    ORDINARY_ROWS,
    REGIMES,
    of_tree,
    tree,
)
from opd.audit.worlds import World
from opd.errors import ConfigError

__all__ = ["Verdict", "audit_loss"]


def cosine_in_words(cosine: float) -> str:
    """With three digits, and more where these would call it 1."""
    short_of_one = 1 - cosine
    return f"1 - {short_of_one:.0e}" if 1e-9 < short_of_one < 5e-4 else f"{cosine:.3f}"


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
        settings: how the loss had to be changed to be audited, in words.
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
    settings: tuple[str, ...] = ()

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
            told += f" (cosine {cosine_in_words(self.match.cosine)})"
        if self.claim != NO_CLAIM:
            told += f"; named {words(self.claim)}: {self._held}"
        return "; audited ".join([told, ", ".join(self.settings)]) if self.settings else told

    @property
    def _held(self) -> str:
        if self.holds:
            return "holds"
        is_named_so = self.match is None or self.match.text == self.claim
        why = ", ".join(dict.fromkeys(fault.name for fault in self.faults))
        return f"does not hold{f' ({why})' if is_named_so else ''}"


def audit_loss(
    loss: Loss | Callable[..., Any],
    *,
    claim: str | None = None,
    writer: Writer | None = None,
    name: str = "",
) -> Verdict:
    """Find out what a loss descends.

    Args:
        loss: `f(student_logits [N, V], teacher_logits [N, V], tokens [N])` to a loss per row or to
            one number, or a `Loss` that an adapter made.
        claim: what it should descend, such as `reverse_kl` or `jsd:0.3`.
        writer: who wrote the tokens; `teacher` for losses of supervised or off-policy training.
            Whom the loss says if None, which is the student for all that are no method of ours.

    Raises:
        ConfigError: there is no such claim, the loss is not of that form, or
            it teaches nothing because it was not given all that it reads.
        Exception: whatever the loss itself raises on ordinary rows.
    """
    started = time.process_time()
    if not isinstance(loss, Loss):
        loss = bare(loss, name or getattr(loss, "__name__", type(loss).__name__))
    claimed = claim_of(NO_CLAIM if claim is None else claim)
    before = repeats(loss)
    if before.findings:
        return _unjudged(loss, claimed, before, time.process_time() - started)
    subject = subject_of(loss, writer or loss.writer)
    looks = [before, *(check(subject) for check in CHECKS)]
    if subject.single:
        looks += [check(subject) for check in EXPECTATIONS]
        found = _single_rows(subject, claimed)
    else:
        found = _responses(subject, claimed)
    checks = (*found.checks, *looks)
    named = {finding.name for check in checks for finding in check.findings}
    if "no-teacher-gradient" in named:
        _check_played(loss, subject)
    after = repeats(loss)
    if after.findings:
        return _unjudged(loss, claimed, after, time.process_time() - started)
    bad = not named.isdisjoint(FAULTS)
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
        settings=loss.settings,
    )


def _check_played(loss: Loss, subject: Subject) -> None:
    """Whether a loss that teaches nothing was given what it needs to.

    Raises:
        ConfigError: it was not.
    """
    if loss.unplayed:
        raise ConfigError(
            f"{loss.name} cannot be audited: it reads {loss.unplayed}, and where there is none "
            "nothing of it teaches"
        )
    if loss.gates and not subject.ordinary.size:
        raise ConfigError(
            f"{loss.name} cannot be audited: its weights ({', '.join(loss.gates)}) are 0 on all "
            "the rows of an audit, which are the first of a response, of models that are not sure"
        )


def _unjudged(loss: Loss, claim: Claim, check: Check, seconds: float) -> Verdict:
    """Of a loss that no figure can be had of: it is not finite, draws, or remembers."""
    return Verdict(
        name=loss.name,
        claim=claim.text,
        descends="nothing that can be told",
        match=None,
        cosines={},
        holds=None if claim.name == NO_CLAIM else False,
        checks=(check,),
        points={},
        seconds=seconds,
        settings=loss.settings,
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
        "jsd:0.5": toy_gradient(ORDINARY, divergence_of("jsd:0.5")),
    }
    if claim.divergence is not None:
        targets[claim.text] = toy_gradient(ORDINARY, claim.divergence)
    cosines = {text: match(found.gradient, target).cosine for text, target in targets.items()}
    checks = [value(found, claim, named)]
    if claim.name == SEQUENCE:
        world = tree()
        gradient, target = of_tree(loss, world).gradient, tree_target(world, claim)
        told = match(gradient, target, claim.text)
        cosines[SEQUENCE] = told.cosine
        checks.insert(0, _claim_check(told, claim, named, near, tolerance, "whole responses"))
    elif claim.divergence is not None:
        checks.insert(0, _claim_in_regimes(subject, claim, named, near))
    checks += [direction(named), stale(subject, claim, named)]
    shown = claim.text if claim.text in targets else near.text if near else "reverse_kl"
    drawn = {label: subject.expected(toy).gradient for label, toy in REGIMES.items()}
    wanted = {label: toy_gradient(toy, divergence_of(shown)) for label, toy in REGIMES.items()}
    scale = match(drawn[ORDINARY_ROWS], wanted[ORDINARY_ROWS]).scale
    points = {label: _points(drawn[label], wanted[label], scale) for label in REGIMES}
    return _Found(
        _descends(named, near),
        named or near,
        cosines,
        tuple(checks),
        points,
    )


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
                f"the cosine is {cosine_in_words(found.cosine)}"
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
    message = f"on {where} it descends {_descends(named, near)}"
    if not math.isnan(told.cosine) and not message.endswith("is zero"):
        message += f"; with {claim.in_words} its cosine is {cosine_in_words(told.cosine)}"
    fault = Finding("another-divergence", message)
    return Check("claim", "found", message, figures, (fault,))


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
    fitting = [found for found in told.values() if found.residual <= tolerance]
    named = fitting[0] if fitting else None
    cosines = {text: found.cosine for text, found in told.items()}
    known_cosines = {text: found for text, found in told.items() if not math.isnan(found.cosine)}
    near = max(known_cosines.values(), key=lambda found: found.cosine, default=None)
    weights, left = credit_weights(gradient, world)
    dropped = bool((subject.coupling.base == 0).all(-1).any())
    checks = [
        _credit(weights, left, tolerance, dropped),
        _teaches(gradient, size, world, tolerance, dropped),
        direction(named),
        _still(loss, gradient, tolerance),
        _sums_alive(gradient, world, left, tolerance),
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


DROPPED = "rows have no gradient at all, so that a token's credit cannot be told from its place"


def _credit(weights: Tensor, left: float, tolerance: float, dropped: bool) -> Check:
    """How a token is credited for later log-ratios: by distance, or by their place."""
    name = "credit"
    if not left <= tolerance:
        return inapplicable(name, "it is no sum of log-ratios, each with a weight")
    figures = {
        f"token {t}, reward {k}": round(float(weights[t, k]), 9)
        for t in range(len(weights))
        for k in range(t, len(weights))
    }
    said = _credit_in_words(weights)
    if _is_even(weights):
        return fine(name, f"log-ratios credited {said}", **figures)
    if dropped:
        return inapplicable(name, DROPPED)
    message = f"a log-ratio weighs by where it stands, not by how far it is: {said}"
    return flagged(name, "discount", message, **figures)


def _is_even(weights: Tensor) -> bool:
    lags = [weights.diagonal(lag) for lag in range(len(weights))]
    return all(float((lag - lag.mean()).abs().max()) <= 1e-4 for lag in lags)


def _credit_in_words(weights: Tensor) -> str:
    def said(weight: float) -> str:
        return f"{round(weight, 9) + 0.0:.3g}"  # rounding is no credit, and 0 has no sign

    if _is_even(weights):
        lags = [weights.diagonal(lag) for lag in range(len(weights))]
        return ", ".join(said(float(lag.mean())) for lag in lags) + " by distance"
    rows = [" ".join(map(said, weights[t, t:].tolist())) for t in range(len(weights))]
    return "; ".join(f"token {t}: {row}" for t, row in enumerate(rows))


def _sums_alive(gradient: Tensor, world: World, left: float, tolerance: float) -> Check:
    """Whether the log-ratios that are summed carry a gradient."""
    name = "advantage"
    if left <= tolerance:
        return fine(name, "sums of log-ratios times the score, held fixed")
    weights, unexplained = credit_weights(gradient, world, live=True)
    if not unexplained <= tolerance:
        return inapplicable(name, "it is no sum of log-ratios, each with a weight")
    message = (
        "the log-ratios that it sums and multiplies the score with carry a gradient: detach them; "
        f"they are credited {_credit_in_words(weights)}"
    )
    return flagged(name, "undetached", message)


def _teaches(
    gradient: Tensor, size: Tensor, world: World, tolerance: float, dropped: bool
) -> Check:
    """Whether a row moves towards its own teacher: the last rows, which have no later ones, do."""
    name = "teaches"
    last = depth_of(world) == world.horizon - 1
    share = float(gradient[last].norm() / size[last].sum().clamp(min=1e-300))
    if share > tolerance:
        return fine(name, "rows move by their own teacher", expected_over_sampled=share)
    whole = float(gradient.norm() / size.sum().clamp(min=1e-300))
    if whole > tolerance and dropped:
        return inapplicable(name, DROPPED)
    message = (
        "its expected gradient over whole responses is zero"
        if whole <= tolerance
        else "a row's own teacher moves nothing in expectation, only what its token does to later "
        "rows"
    )
    return flagged(name, "no-teacher-gradient", message, expected_over_sampled=share)


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

"""Combinations of distributions, log-linear and arithmetic, a chunk of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.errors import TeacherError
from opd.types import WEIGHT_SLACK


def log_linear(
    view: str,
    parts: Mapping[str, Float[Tensor, "n V"]],
    weights: Mapping[str, float],
) -> Float[Tensor, "n V"]:
    """The log-linear combination of whole distributions, normalised over the vocabulary.

        log q = sum_k weight_k * log part_k - logsumexp_v(sum_k weight_k * log part_k)

    Weights have any sign and any sum: beyond [0, 1] the combination extrapolates. One part of
    weight 1 is that part, bit for bit; a part of weight 0 does not count. Zero mass: a token has
    none where a part of positive weight, or every part, gives it none; where only a part of
    negative weight does, the combination would be infinite, which is an error.

    Args:
        view: the combination's name, for messages.
        parts: log-probabilities by name, over the same tokens; those of weight 0 may be left out.
        weights: one per part.

    Raises:
        TeacherError: infinite mass, or a row whose tokens all have none; names part and token.

    Source: the geometric bridge of Veto, arXiv:2601.07155; reward extrapolation of G-OPD,
        arXiv:2602.12125.
    """
    counted = {name: weight for name, weight in weights.items() if weight != 0}
    if len(counted) == 1 and 1.0 in counted.values():
        return parts[next(iter(counted))]
    total = torch.stack([weight * parts[name] for name, weight in counted.items()]).sum(0)
    if not bool(total.isfinite().all()):
        chosen = {name: parts[name] for name in counted}
        empty = _without_mass(view, chosen, counted)
        finite = [w * chosen[name].masked_fill(empty, 0.0) for name, w in counted.items()]
        total = torch.stack(finite).sum(0).masked_fill(empty, -math.inf)
    return total.log_softmax(-1)


def log_mean(
    view: str, parts: Mapping[str, Float[Tensor, "*n"]], weights: Mapping[str, float]
) -> Float[Tensor, "*n"]:
    """The log of the weighted mean of probabilities: the arithmetic mixture.

        log q = log sum_k weight_k * part_k

    Entry by entry, so it says of single tokens what it says of the whole vocabulary, and is
    normalised where its parts are. One part of weight 1 is that part, bit for bit; a part of weight
    0 does not count. Zero mass: an entry has none where no part gives it any.

    Args:
        view: the combination's name, for messages.
        parts: log-probabilities by name; those of weight 0 may be left out.
        weights: one per part, >= 0, 1 in all.

    Raises:
        TeacherError: weights that are no shares.

    Source: the mixture of experts' distributions, Hinton et al., arXiv:1503.02531, section 2; the
        minimiser of the weighted sum of forward KLs, table 6 of arXiv:2606.22793.
    """
    total = sum(weights.values())
    if min(weights.values()) < 0 or abs(total - 1) > WEIGHT_SLACK:
        raise TeacherError(
            f"the view {view!r} is an arithmetic mixture, whose weights are >= 0 and sum to 1; "
            f"got {dict(weights)}"
        )
    counted = {name: weight for name, weight in weights.items() if weight != 0}
    if len(counted) == 1:
        return parts[next(iter(counted))]
    weighed = [parts[name] + math.log(weight) for name, weight in counted.items()]
    return torch.stack(weighed).logsumexp(0)


def log_sum(
    view: str, parts: Mapping[str, Float[Tensor, "*n"]], weights: Mapping[str, float]
) -> Float[Tensor, "*n"]:
    """The weighted sum of log-probabilities of the same tokens, not normalised.

        log q = sum_k weight_k * log part_k

    A score of single tokens: with weights 1 and -1 the log-ratio of two views.

    Args:
        view: the combination's name, for messages.
        parts: log-probabilities by name; those of weight 0 may be left out.
        weights: one per part.

    Raises:
        TeacherError: a part of negative weight gives a token no mass; names the part.

    Source: reward extrapolation of G-OPD, arXiv:2602.12125.
    """
    counted = {name: weight for name, weight in weights.items() if weight != 0}
    for name, weight in counted.items():
        if weight < 0 and bool(parts[name].isneginf().any()):
            raise TeacherError(
                f"the view {view!r} is infinite: the part {name!r} has weight {weight:g} and gives "
                f"{int(parts[name].isneginf().sum())} of the tokens no mass; combine with a part "
                "that gives every token mass, or make its weight positive"
            )
    return torch.stack([weight * parts[name] for name, weight in counted.items()]).sum(0)


def _without_mass(
    view: str, parts: Mapping[str, Float[Tensor, "n V"]], weights: Mapping[str, float]
) -> Bool[Tensor, "n V"]:
    """Where the combination has no mass, or an error where it would have infinite mass."""
    absent = {name: part.isneginf() for name, part in parts.items()}
    empty = torch.stack(list(absent.values())).all(0)
    for name, weight in weights.items():
        if weight > 0:
            empty = empty | absent[name]
    for name, weight in weights.items():
        infinite = absent[name] & ~empty
        if weight < 0 and bool(infinite.any()):
            row, token = infinite.nonzero()[0].tolist()
            raise TeacherError(
                f"the view {view!r} is infinite at {int(infinite.sum())} entries, the first at "
                f"token id {token}, row {row} of its chunk: the part {name!r} has weight "
                f"{weight:g} and gives that token no mass, while the parts of positive weight do; "
                "combine with a part that gives every token mass, or make its weight positive"
            )
    if bool(empty.all(-1).any()):
        row = int(empty.all(-1).nonzero()[0])
        raise TeacherError(
            f"the view {view!r} has no mass at all in row {row} of its chunk: there is no token "
            f"to which every part of positive weight ({', '.join(n for n in weights)}) gives mass"
        )
    return empty

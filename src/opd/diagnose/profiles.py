"""How a probe's numbers run along the answers: by absolute place, and by share of the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from opd.diagnose.along import change_point, dispersion_by_bin, first_token_spike, suffix_fade
from opd.diagnose.along import profile as by_place
from opd.diagnose.evidence import Evidence
from opd.diagnose.numbers import bin_means, relative_bins

FOLLOWED = (
    "reverse_kl",
    "log_ratio",
    "teacher_surprise",
    "teacher_confidence",
    "top_k_overlap",
    "student_entropy",
)
"""What is followed along the answers, where it is known."""
BINS = 20
"""Equal parts of an answer."""


@dataclass(frozen=True)
class Profiles:
    """Means along the answers, by the name of the number.

    Attributes:
        edges: bin i of `absolute` holds the tokens edges[i] ... edges[i + 1] - 1.
        absolute: by place in the answer.
        relative: by share of the answer, in `BINS` equal parts.
        dispersion: standard deviation of the log ratio by share, over that of the first part.
        fade: last third over first third.
        spike: first token over all later ones, of |log_ratio|.
        change_point: share of the answer from which on the teacher's margin has dropped for good;
            None where it has not, or is not known.
    """

    edges: tuple[int, ...]
    absolute: Mapping[str, tuple[float, ...]]
    relative: Mapping[str, tuple[float, ...]]
    dispersion: tuple[float, ...]
    fade: Mapping[str, float]
    spike: float
    change_point: float | None


def profiles(evidence: Evidence) -> Profiles:
    """Everything that can be followed along the answers of a probe."""
    edges = _edges(evidence.mask.shape[1])
    absolute, relative, fade = {}, {}, {}
    for name in FOLLOWED:
        if name in evidence.rows:
            values, known = evidence.per_token(name)
            absolute[name] = tuple(by_place(values, known, edges).tolist())
            relative[name] = tuple(_by_share(evidence, name))
            fade[name] = suffix_fade(values.abs(), known)
    ratio, known = evidence.per_token("log_ratio")
    return Profiles(
        edges,
        MappingProxyType(absolute),
        MappingProxyType(relative),
        tuple(dispersion_by_bin(ratio, known, BINS).tolist()),
        MappingProxyType(fade),
        first_token_spike(ratio.abs(), known),
        _change_point(evidence),
    )


def _edges(longest: int) -> tuple[int, ...]:
    """The first tokens one by one, then in steps that grow."""
    edges = [0, 1, 2, 4, 8]
    while edges[-1] < longest:
        edges.append(edges[-1] + max(4, edges[-1] // 2))
    inside = [edge for edge in edges if edge < longest]
    return (*inside, max(longest, 1))


def _by_share(evidence: Evidence, name: str) -> list[float]:
    values, known = evidence.per_token(name)
    found: list[float] = bin_means(values[known], relative_bins(known, BINS), BINS).tolist()
    return found


def _change_point(evidence: Evidence) -> float | None:
    """Twentieths of the answers stand for the sentences of arXiv:2605.13643."""
    if "teacher_margin" not in evidence.rows:
        return None
    margins = torch.tensor(_by_share(evidence, "teacher_margin"), dtype=torch.float64)
    places = torch.where(~margins.isnan())[0]
    found = change_point(margins[places])
    return None if found is None else float(places[found]) / BINS if len(places) else math.nan

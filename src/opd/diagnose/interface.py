"""Whether teacher, student and cache mean the same events: ids, end tokens, texts, kept answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.diagnose.numbers import check_paired, difference, wide
from opd.errors import ConfigError

__all__ = ["cache_drift", "eos_divergence", "excess_id_ratio", "retokenised_share"]

Rows = Float[Tensor, "N V"]


@torch.no_grad()
def eos_divergence(
    student_log_probs: Rows, teacher_log_probs: Rows, eos_ids: Sequence[int]
) -> Float[Tensor, " N"]:
    """By how much teacher and student differ in whether the response ends here.

    Formula: |log student(EOS) - log teacher(EOS)| of the mass of all end tokens together; 0 where
        both have none, inf where one has
    Unit: nats, per row
    Reading: 0 where both would stop alike. Large at the ends of responses: the two stop with
        different ids, or a template keeps the teacher from stopping; length then drifts.
    Action: one set of end tokens for both, merge their mass, mask the rows of end tokens
    Cost: both log-probabilities of the end tokens
    Source: tokenizer artifacts, Table 6 of arXiv:2606.22793, which has them from arXiv:2603.25562;
        the check of the end tokens is our own derivation
    Id: tokenizer
    """
    ids, vocabulary = sorted(set(eos_ids)), student_log_probs.shape[-1]
    if ids and not 0 <= ids[0] <= ids[-1] < vocabulary:
        raise ConfigError(f"eos_ids must lie in 0 ... {vocabulary - 1}, got {ids}")
    student, teacher = (
        log_probs[:, ids].logsumexp(-1) for log_probs in (student_log_probs, teacher_log_probs)
    )
    return difference(student, teacher).abs()


def excess_id_ratio(
    r: Float[Tensor, " N"], tokens: Int[Tensor, " N"], top: int
) -> list[tuple[int, int, float]]:
    """The ids on which teacher and student differ most.

    Formula: the ids of the largest mean |r|, of equal ones the lower id first
    Unit: (id, rows that sampled it, mean |r| in nats)
    Reading: unremarkable words with means like that of all rows where nothing is wrong. A few
        special, template or end ids with a huge mean: the two spell the same text with other
        tokens. Rare ids come up by chance: look at the count.
    Action: mask these ids, align templates, merge ids that mean the same
    Cost: the log ratios that the step has
    Source: the special-token audit in Table 7 of arXiv:2606.22793, artifacts as in
        arXiv:2603.25562; our own derivation
    Id: tokenizer
    """
    if top < 1:
        raise ConfigError(f"top must be at least 1, got {top}")
    ids, place, count = torch.unique(tokens, return_inverse=True, return_counts=True)
    sums = torch.bincount(place, weights=wide(r).abs(), minlength=len(ids))
    means = sums / count
    order = means.argsort(descending=True, stable=True)[:top]
    listed = zip(*(each[order].tolist() for each in (ids, count, means)), strict=True)
    return [(int(token), int(rows), float(size)) for token, rows, size in listed]


def retokenised_share(ids: Sequence[Sequence[int]], again: Sequence[Sequence[int]]) -> float:
    """The share of texts that come back as the same tokens once decoded and encoded again.

    Formula: mean of [encode(decode(ids)) = ids]
    Unit: a share in [0, 1] of the texts
    Reading: 1 where tokens and text say the same. Below: whoever reads the text, a served teacher
        for one, scores other tokens than those that were sampled, and positions shift from there.
    Action: send ids, not text; the teacher's own tokenizer behind a map of ids
    Cost: the tokenizer alone, on a sample of responses
    Source: the scoring replay in Table 7 of arXiv:2606.22793; our own derivation
    Id: tokenizer
    """
    check_paired("the texts and what comes back of them", len(ids), len(again))
    equal = [list(one) == list(other) for one, other in zip(ids, again, strict=True)]
    return sum(equal) / len(equal) if equal else math.nan


def cache_drift(kept: Float[Tensor, "*n"], again: Float[Tensor, "*n"]) -> tuple[float, float]:
    """By how much a teacher's kept answers differ from what it says now.

    Formula: (mean, max) of |log teacher kept - log teacher now|; two equal -inf differ by 0
    Unit: nats
    Reading: within the engine's noise where nothing has changed. Above: another checkpoint,
        template, tokenizer or temperature answered then. A large maximum beside a small mean: some
        entries are stale or belong to other rows.
    Action: version the cache, refresh it, score a held-out slice again after every change
    Cost: the teacher on a slice of the cached rows
    Source: cache consistency in Table 7 of arXiv:2606.22793; our own derivation
    """
    if not kept.numel():
        return math.nan, math.nan
    off = difference(wide(kept), wide(again)).abs()
    return float(off.mean()), float(off.max())

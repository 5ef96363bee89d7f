"""How much of a response is copied from what a privileged teacher reads and the student does not.

    copied = longest run of the response's tokens that stands in what was told and not in the
             student's own prompt, over the tokens of the response

What was told is the privileged prompt without the beginning and the end that it has in common with
the student's own. The student has not read it: a high share says that it has learnt to write it all
the same, or that a right response is that text and no other.

Source: privilege leakage in Table 6 and section 9 of arXiv:2606.22793; the measure is ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opd.types import Provenance, Rollout, Stat

__all__ = ["MOSTLY", "NO_TOKEN", "copied_stats", "longest_run", "told_tokens"]

MOSTLY = 0.5
"""From this share on a response counts as mostly copied."""

NO_TOKEN = sys.maxunicode
"""Stands in a response for a token that is not the student's; no vocabulary is that large."""

PIECE = 4
"""Tokens at the end of a run that are looked up before the run is searched for."""

Ids = Sequence[int]


def copied_stats(rollout: Rollout, privileged: Sequence[Ids]) -> tuple[Stat, Stat]:
    """Mean copied share of the responses, and the share of them that is mostly copied.

    Of the student's own tokens, an end token left out; responses without any do not count.

    Args:
        privileged: what was read in place of the prompt, by sequence; empty: nothing was told.
    """
    shares = []
    for own, told, prompt in zip(_own_tokens(rollout), privileged, rollout.prompt_ids, strict=True):
        length = len(own) - own.count(NO_TOKEN)
        if told and length:
            shares.append(longest_run(own, told_tokens(told, prompt), prompt) / length)
    count, many = float(len(shares)), float(sum(share >= MOSTLY for share in shares))
    return Stat(sum(shares, 0.0), count), Stat(many, count)


def told_tokens(privileged: Ids, own: Ids) -> Ids:
    """The tokens of a privileged prompt between what it begins and ends with like the own one."""
    most = min(len(privileged), len(own))
    begin = next((i for i in range(most) if privileged[i] != own[i]), most)
    left = most - begin
    end = next((i for i in range(left) if privileged[-1 - i] != own[-1 - i]), left)
    return privileged[begin : len(privileged) - end]


def longest_run(response: Ids, told: Ids, known: Ids) -> int:
    """Tokens of the longest run of a response that stands in `told` and not in `known`.

    A run that stands in `known` has no part that does not, so of the runs from one token on the
    longest in `told` decides; and its end never moves back as its beginning moves on. Where the
    last few tokens of a longer run than the best stand nowhere, the run does not either.
    """
    text, source, read = _as_text(response), _as_text(told), _as_text(known)
    best = end = size = 0
    pieces: set[str] = set()
    for begin in range(len(text)):
        longer = begin + best + 1
        if longer > len(text):
            break
        if end < longer:
            if size < min(best + 1, PIECE):
                size = min(best + 1, PIECE)
                pieces = {source[i : i + size] for i in range(len(source) - size + 1)}
            if text[longer - size : longer] not in pieces or text[begin:longer] not in source:
                continue
            end = longer
        end = _furthest(text, begin, end, source)
        if text[begin:end] not in read:
            best = end - begin
    return best


def _furthest(text: str, begin: int, end: int, source: str) -> int:
    """Where the longest run from `begin` on ends that stands in `source`; one up to `end` does."""
    while end < len(text) and (at := source.find(text[begin : end + 1])) >= 0:
        ahead = at - begin
        end += 1
        while end < len(text) and end + ahead < len(source) and text[end] == source[end + ahead]:
            end += 1
    return end


def _as_text(ids: Ids) -> str:
    """A text with one character per token: Python searches texts in compiled code."""
    return "".join(map(chr, ids))


def _own_tokens(rollout: Rollout) -> list[list[int]]:
    """The tokens of every response, `NO_TOKEN` for an end token and for everyone else's."""
    lengths = rollout.lengths.tolist()
    own = (rollout.provenance == Provenance.STUDENT).tolist()
    found = []
    for b, tokens in enumerate(rollout.tokens.tolist()):
        length = lengths[b] - (rollout.stop_reason[b] == "eos")
        pairs = zip(tokens[:length], own[b], strict=False)
        found.append([token if mine else NO_TOKEN for token, mine in pairs])
    return found

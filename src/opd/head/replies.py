"""What a view replied: whether it can be read, and replies that hold some entries, not all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import TeacherError
from opd.formula.support import ABSENT
from opd.types import TeacherScores

EXCESS = 1e-3
"""By how much the known entries may exceed a mass of 1 before the reply is taken for broken."""


def check_reply(view: str, scores: TeacherScores, *, rows: int) -> None:
    """Refuse a reply for other rows, or one that speaks of rows or tokens that are not there.

    Args:
        view: whose reply it is, for messages.
        rows: how many it was asked for.

    Raises:
        TeacherError: says what is wrong and what would be right.
    """
    index, counts = scores.row_index, set(scores.row_counts())
    answers = rows if index is None else max(counts, default=0)
    if wrong := sorted(counts - {answers}):
        raise TeacherError(
            f"the view {view!r} answered for {wrong[0]} rows, but was asked for {answers}: one per "
            "token of the responses, in their order"
        )
    if index is not None and len(index) != rows:
        raise TeacherError(
            f"the row_index of the view {view!r} is of {len(index)} rows, but there are {rows}"
        )
    if index is not None and rows and int(index.max()) >= answers:
        raise TeacherError(
            f"the row_index of the view {view!r} names row {int(index.max())}, and it has "
            f"{answers} rows of answers; -1 stands for a row without one"
        )
    if scores.hidden is not None and not scores.unembeddings and scores.log_probs is None:
        raise TeacherError(
            f"the view {view!r} returned hidden states without the unembedding that turns them "
            "into logits; return both, or log_probs"
        )
    if scores.names or scores.heads or scores.answered_by is not None:
        _check_models(view, scores, scores.answered_by)
    if scores.id_map is not None:
        _check_id_map(view, scores, scores.id_map)


def _check_models(view: str, scores: TeacherScores, answered_by: Int[Tensor, " M"] | None) -> None:
    """Several models: each row names one of them, and each has a head that fits, or none has."""
    names, heads = scores.names, scores.heads
    if answered_by is None or not names or (heads and len(heads) != len(names)):
        raise TeacherError(
            f"the view {view!r} is answered by several models: names, heads and answered_by belong "
            f"together, one head per name or none; got {len(names)} names, {len(heads)} heads and "
            f"{'no ' if answered_by is None else ''}answered_by"
        )
    if len(answered_by) and not 0 <= int(answered_by.min()) <= int(answered_by.max()) < len(names):
        raise TeacherError(
            f"answered_by of the view {view!r} names the model {int(answered_by.max())}, and there "
            f"are {len(names)}, from 0 on"
        )
    known = {name: head for name, head in zip(names, heads, strict=False) if head is not None}
    if heads and len(answered_by):
        for place in answered_by.bincount().nonzero().squeeze(-1).tolist():
            if heads[place] is None:
                raise TeacherError(
                    f"the view {view!r} has rows that {names[place]!r} answered, and no head of it"
                )
    sizes = {name: head.vocab_size for name, head in known.items()}
    if len(set(sizes.values())) > 1:
        raise TeacherError(
            f"the view {view!r} is answered by models of different vocabularies: {sizes} tokens"
        )
    wide = 0 if scores.hidden is None else scores.hidden.shape[-1]
    for name, head in known.items():
        if scores.hidden is not None and head.weight.shape[1] > wide:
            raise TeacherError(
                f"the view {view!r}: the head of {name!r} reads {head.weight.shape[1]} hidden "
                f"units, and hidden has {wide}; pad it to the widest"
            )


def _check_id_map(view: str, scores: TeacherScores, id_map: Int[Tensor, " V"]) -> None:
    known = None if scores.log_probs is None else scores.log_probs.shape[-1]
    if known is None and scores.unembeddings:
        known = scores.unembeddings[0].vocab_size
    highest = int(id_map.max())
    if highest < 0 or (known is not None and highest >= known):
        named = "no token" if highest < 0 else f"token {highest}"
        raise TeacherError(
            f"the id_map of the view {view!r} names {named}, and it has {known} tokens; map at "
            "least one of the student's tokens to one of those, and those without one to -1"
        )


@dataclass(frozen=True)
class Entries:
    """Log-probabilities by token id, row by row.

    Attributes:
        view: whose they are, for messages.
        ids: distinct within a row; -1 where absent.
        logp: of these ids.
    """

    view: str
    ids: Int[Tensor, "n J"]
    logp: Float[Tensor, "n J"]

    @classmethod
    def of(
        cls, view: str, scores: TeacherScores, merge_ids: tuple[tuple[int, ...], ...]
    ) -> Entries | None:
        """What a reply knows of single tokens; None where it names none.

        Raises:
            TeacherError: more mass than 1, or mass under an id that is merged into another.
        """
        ids, logp = [], []
        if scores.ids is not None and scores.ids_logp is not None:
            ids, logp = [scores.ids], [scores.ids_logp]
        if scores.top_ids is not None and scores.top_logp is not None:
            ids, logp = [*ids, scores.top_ids], [*logp, scores.top_logp]
        if not ids:
            return None
        entries = cls(view, _once(torch.cat(ids, -1)), torch.cat(logp, -1))
        for group in merge_ids:
            entries._check_merged(group)
        entries._check_mass()
        return entries

    def at(
        self, ids: Int[Tensor, "n K"], unanswered: Bool[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n K"]:
        """The log-probabilities of these ids; -inf where an id is absent (-1).

        Args:
            unanswered: True on rows where nothing has to be there.

        Raises:
            TeacherError: an id that the view did not score.
        """
        logp, found = self.find(ids)
        missing = ~found & (ids != ABSENT)
        if unanswered is not None:
            missing = missing & ~unanswered.unsqueeze(-1)
        if bool(missing.any()):
            row, entry = missing.nonzero()[0].tolist()
            raise TeacherError(
                f"the view {self.view!r} scored {self.ids.shape[-1]} tokens a row, but "
                f"{int(missing.sum())} that are compared are not among them, the first token id "
                f"{int(ids[row, entry])} in row {row} of its chunk; ask it for the ids of the "
                "support, or use a support that it can answer"
            )
        return torch.where(found, logp, -torch.inf)

    def find(self, ids: Int[Tensor, "n K"]) -> tuple[Float[Tensor, "n K"], Bool[Tensor, "n K"]]:
        """The log-probabilities of these ids, and which of them are there at all."""
        if not self.ids.shape[-1]:
            return torch.zeros_like(ids, dtype=self.logp.dtype), torch.zeros_like(ids).bool()
        same = (ids.unsqueeze(-1) == self.ids.unsqueeze(-2)) & (ids != ABSENT).unsqueeze(-1)
        found, place = same.max(-1)
        return self.logp.gather(-1, place), found

    def _check_merged(self, group: tuple[int, ...]) -> None:
        others = torch.tensor(group[1:], device=self.ids.device)
        wrong = torch.isin(self.ids, others) & (self.logp > -torch.inf)
        if bool(wrong.any()):
            raise TeacherError(
                f"the view {self.view!r} gives mass to token id {int(self.ids[wrong][0])}, but "
                f"the ids {group} count as one token: sum their mass under {group[0]}"
            )

    def _check_mass(self) -> None:
        inside = torch.where(self.ids == ABSENT, -torch.inf, self.logp)
        if not inside.shape[-1] or not len(inside):
            return
        mass = inside.logsumexp(-1).exp()
        if bool((mass > 1 + EXCESS).any()):
            row = int(mass.argmax())
            raise TeacherError(
                f"the view {self.view!r} gives the tokens it scored a mass of {float(mass[row]):g} "
                f"in row {row} of its chunk, which is more than 1: they are no probabilities"
            )


def _once(ids: Int[Tensor, "n J"]) -> Int[Tensor, "n J"]:
    """Ids that stand there again, in a row that has them already, made absent."""
    same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    return torch.where(same.tril(-1).any(-1), ABSENT, ids)

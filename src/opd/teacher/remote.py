"""A teacher elsewhere as one of a run: batches in, scores out, whatever protocol lies between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from opd.errors import TeacherError
from opd.teacher.query import ARRAYS, Answer, Asked, Endpoint, Query, bits
from opd.types import Batch, Need, Provenance, TeacherRequest, TeacherScores, Unembedding


@dataclass(frozen=True)
class RemoteSettings:
    """How a batch is cut into requests.

    Attributes:
        tokens_per_request: most tokens of one request; a longer sequence is one of its own.
        concurrency: requests in flight at once.
        compress: ask for compressed replies.
    """

    tokens_per_request: int = 65536
    concurrency: int = 8
    compress: bool = False


class RemoteTeacher:
    """Asks an endpoint for the response rows of a batch.

    Args:
        endpoint: the protocol's client.
        vocab_size: tokens that student and teacher share.
    """

    def __init__(
        self, endpoint: Endpoint, *, vocab_size: int, settings: RemoteSettings = RemoteSettings()
    ) -> None:
        self.endpoint = endpoint
        self.vocab_size = vocab_size
        self.settings = settings

    def can(self, need: Need) -> bool:
        """Whether the protocol can carry this need, as hidden states or as entries."""
        wanted = self.endpoint.limits.wanted
        if "hidden" in wanted:
            return True
        return {
            "logp": "sampled" in wanted,
            "top_ids": "top" in wanted,
            "teacher_entropy": "entropy" in wanted,
        }.get(need.field, need.support != "full" and bool(wanted & {"top", "ids"}))

    def score(self, request: TeacherRequest) -> TeacherScores:
        """Scores of the N response rows of the request's batch, in their order.

        Raises:
            TeacherError: names the endpoint, the request and the fault.
        """
        self._check(request)
        asked = list(_asked(request))
        queries = self._queries([one for one in asked if len(one.response)], request)
        with ThreadPoolExecutor(self.settings.concurrency, "teacher") as pool:
            answers = [one for some in pool.map(self.endpoint.score, queries) for one in some]
        return self._scores(request, answers)

    def _check(self, request: TeacherRequest) -> None:
        limits, batch = self.endpoint.limits, request.batch
        name = self.endpoint.name
        for field in sorted(_wanted(request) - limits.wanted):
            raise TeacherError(
                f"{name} cannot give {field!r}: "
                + limits.why_not.get(field, "its protocol has no field for it")
            )
        if request.temperature != 1.0 and not limits.temperature:
            raise TeacherError(
                f"{name} scores at temperature 1 alone, and {request.temperature:g} was asked for; "
                "compare at temperature 1, or serve the teacher with `opd serve`"
            )
        if batch.merge_ids and not limits.merge_ids:
            raise TeacherError(
                f"{name} cannot count the tokens {batch.merge_ids[0]} as one; set "
                "method.merge_stop_ids = false, or serve the teacher with `opd serve`"
            )
        if batch.model_inputs:
            raise TeacherError(
                f"{name} reads token ids alone, and the batch has {sorted(batch.model_inputs)[0]}"
            )
        if limits.top_k is not None and request.top_k > limits.top_k:
            raise TeacherError(
                f"{name} returns at most {limits.top_k} of its likeliest tokens, and "
                f"{request.top_k} were asked for; lower k"
            )

    def _queries(self, asked: Sequence[Asked], request: TeacherRequest) -> list[Query]:
        """Requests of about as many tokens each; sequences keep their order."""
        parts: list[list[Asked]] = []
        left = 0
        for one in asked:
            if one.length > left:
                parts.append([])
                left = self.settings.tokens_per_request
            parts[-1].append(one)
            left -= one.length
        return [
            Query(
                tuple(part),
                top_k=request.top_k,
                temperature=request.temperature,
                merge_ids=request.batch.merge_ids,
                compress=self.settings.compress,
            )
            for part in parts
        ]

    def _scores(self, request: TeacherRequest, answers: Sequence[Answer]) -> TeacherScores:
        device = request.batch.input_ids.device
        found: dict[str, Tensor] = {}
        for field in _wanted(request):
            for array in ARRAYS[field]:
                parts = [answer.values[array] for answer in answers]
                whole = torch.cat(parts).to(device)
                found[array] = whole if whole.is_floating_point() else whole.long()
        revisions = {answer.revision for answer in answers}
        return TeacherScores(
            **found,  # type: ignore[arg-type]
            ids=request.ids if "ids_logp" in found else None,
            unembedding=self._head(device) if request.distribution else None,
            provenance={"reference": self.endpoint.name, "revision": ", ".join(sorted(revisions))},
        )

    def _head(self, device: torch.device) -> Unembedding:
        head = self.endpoint.head()
        if head is None:
            raise TeacherError(f"{self.endpoint.name} hands out no unembedding")
        return replace(
            head,
            weight=head.weight.to(device),
            bias=None if head.bias is None else head.bias.to(device),
            vocab_size=min(head.vocab_size, self.vocab_size),
        )


def _wanted(request: TeacherRequest) -> frozenset[str]:
    """Fields of `opd.teacher.query.WANTED` that answer a request."""
    asks = {
        "hidden": request.distribution,
        "sampled": request.sampled and not request.distribution,
        "top": bool(request.top_k) and not request.distribution,
        "ids": request.ids is not None and not request.distribution,
        "entropy": request.entropy and not request.distribution,
    }
    return frozenset(name for name, is_asked in asks.items() if is_asked)


def _asked(request: TeacherRequest) -> Iterator[Asked]:
    """The sequences of a batch as a teacher is asked about them."""
    batch, mask = request.batch, request.batch.token.mask.cpu()
    ids = _by_sequence(request.ids, batch) if request.ids is not None else None
    written = (batch.token.provenance != Provenance.PADDING).sum(1).tolist()
    input_ids, lengths = batch.input_ids.cpu().int(), batch.lengths.tolist()
    want = bits(_wanted(request))
    for row, (length, count) in enumerate(zip(lengths, written, strict=True)):
        own = input_ids[row, :length]
        yield Asked(
            prompt=own[: length - count],
            response=own[length - count :],
            want=(mask[row, :count] * want).to(torch.uint8),
            ids=None if ids is None else ids[row],
        )


def _by_sequence(ids: Int[Tensor, "N K"], batch: Batch) -> Sequence[Tensor]:
    counts = batch.token.mask.sum(1).tolist()
    return torch.split(ids.cpu().int(), counts)

"""A teacher elsewhere as one of a run: batches in, scores out, whatever protocol lies between."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from opd.errors import TeacherError
from opd.teacher.query import ARRAYS, Answer, Asked, Endpoint, Query, bits, too_long
from opd.types import Batch, Need, Provenance, TeacherRequest, TeacherScores, Unembedding


@dataclass(frozen=True)
class RemoteSettings:
    """How a batch is cut into requests.

    Attributes:
        tokens_per_request: most tokens of one request; a longer sequence is one of its own. What
            the server takes at once may be less, and is kept to as well.
        concurrency: requests in flight at once.
        compress: ask for compressed replies.
    """

    tokens_per_request: int = 65536
    concurrency: int = 8
    compress: bool = False


@dataclass(frozen=True)
class _Size:
    """How much of everything that is limited a request has."""

    tokens: int
    sequences: int
    bytes: int

    def __add__(self, other: _Size) -> _Size:
        return _Size(
            self.tokens + other.tokens, self.sequences + other.sequences, self.bytes + other.bytes
        )

    def fits(self, most: _Size) -> bool:
        return (
            self.tokens <= most.tokens
            and self.sequences <= most.sequences
            and self.bytes <= most.bytes
        )


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
        self._is_described = False

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
        self._describe()
        self._check(request)
        asked = [one for one in _asked(request) if bool(one.want.any())]
        self._check_lengths(asked)
        queries = self._queries(asked, request)
        with ThreadPoolExecutor(self.settings.concurrency, "teacher") as pool:
            answers = [one for some in pool.map(self.endpoint.score, queries) for one in some]
        return self._scores(request, answers)

    def _describe(self) -> None:
        """Let the endpoint learn what its server takes."""
        if not self._is_described:
            self.endpoint.describe()
            self._is_described = True

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
        columns = 0 if request.ids is None else request.ids.shape[1]
        if limits.ids is not None and columns > limits.ids:
            raise TeacherError(
                f"{name} scores at most {limits.ids} ids per token, and {columns} were asked for; "
                "lower k"
            )

    def _check_lengths(self, asked: Sequence[Asked]) -> None:
        """Refuse a batch with a sequence that is too long before any of it is sent."""
        limit = self.endpoint.limits.sequence_tokens
        longest = max(asked, key=lambda one: one.length, default=None)
        if limit is not None and longest is not None and longest.length > limit:
            said = too_long(limit, len(longest.prompt), len(longest.response))
            raise TeacherError(f"{self.endpoint.name} {said}")

    def _queries(self, asked: Sequence[Asked], request: TeacherRequest) -> list[Query]:
        """Requests of about as many tokens each; sequences keep their order."""
        limits = self.endpoint.limits
        most = _Size(
            min(self.settings.tokens_per_request, limits.query_tokens or sys.maxsize),
            limits.sequences or sys.maxsize,
            limits.query_bytes or sys.maxsize,
        )
        parts: list[list[Asked]] = []
        size = _Size(0, 0, 0)
        for one in asked:
            own = _Size(one.length, 1, one.wire_bytes)
            size = size + own
            if not parts or not size.fits(most):
                parts.append([])
                size = own
            parts[-1].append(one)
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
        head = self._head(device) if request.distribution else None
        found: dict[str, Tensor] = {}
        for field in _wanted(request):
            for array in ARRAYS[field]:
                parts = [answer.values[array] for answer in answers]
                whole = torch.cat(parts or [_no_rows(array, request, head)]).to(device)
                found[array] = whole if whole.is_floating_point() else whole.long()
        revisions = {answer.revision for answer in answers}
        return TeacherScores(
            **found,  # type: ignore[arg-type]
            ids=request.ids if "ids_logp" in found else None,
            unembedding=head,
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


def _no_rows(array: str, request: TeacherRequest, head: Unembedding | None) -> Tensor:
    """An array of an answer where nothing was asked."""
    if array in ("top_ids", "top_logp"):
        return torch.empty((0, request.top_k), dtype=torch.long if array == "top_ids" else None)
    if array == "ids_logp" and request.ids is not None:
        return torch.empty((0, request.ids.shape[1]))
    if array == "hidden" and head is not None:
        return head.weight.new_empty((0, head.weight.shape[1]))
    return torch.empty(0)


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

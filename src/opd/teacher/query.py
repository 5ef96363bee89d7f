"""What is asked of a teacher elsewhere and what it answers, whatever protocol carries them.

A query holds sequences of token ids, and for every response token the fields that are wanted of
it. An answer holds those fields for one sequence, a row per token that asked for them, in the
order of the tokens.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from opd.types import Unembedding

WANTED = ("sampled", "top", "ids", "logsumexp", "entropy", "hidden")
"""What may be wanted of a response token; the place of a name is its bit in `Asked.want`."""

ARRAYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sampled": ("sampled_logp",),
        "top": ("top_ids", "top_logp"),
        "ids": ("ids_logp",),
        "logsumexp": ("logsumexp",),
        "entropy": ("entropy",),
        "hidden": ("hidden",),
    }
)
"""By what is wanted: the arrays of an answer, as `TeacherScores` names them."""


@dataclass(frozen=True)
class Asked:
    """One sequence: the tokens a teacher reads, and what it is asked about the response.

    Attributes:
        prompt: token ids before the response, at least one.
        response: token ids of the response.
        want: bits of `WANTED` per response token; 0 where nothing is asked.
        ids: token ids to score, a row per response token that wants `ids`.
    """

    prompt: Int[Tensor, " P"]
    response: Int[Tensor, " T"]
    want: UInt8[Tensor, " T"]
    ids: Int[Tensor, "R J"] | None = None

    @property
    def length(self) -> int:
        """Tokens, the prompt's included."""
        return len(self.prompt) + len(self.response)

    @property
    def wire_bytes(self) -> int:
        """Most bytes it takes in a query of the scoring protocol, with a prompt of its own."""
        ids = 0 if self.ids is None else self.ids.numel()
        return 4 * (len(self.prompt) + ids + 3) + 5 * len(self.response)

    def rows(self, name: str) -> Bool[Tensor, " T"]:
        """Which response tokens want a field."""
        return (self.want & bit(name)) != 0


def bit(name: str) -> int:
    """The bit of a field in `Asked.want`."""
    return 1 << WANTED.index(name)


def bits(names: Sequence[str] | frozenset[str]) -> int:
    """The bits of several fields."""
    return sum(bit(name) for name in names)


@dataclass(frozen=True)
class Query:
    """Sequences, and how they are scored.

    Attributes:
        sequences: those of one prompt stand together, so that its prefill can be shared.
        top_k: how many of the teacher's likeliest tokens `top` holds.
        temperature: divides the logits, before everything but `hidden`.
        merge_ids: groups of ids whose mass is summed into the first.
        compress: whether the reply may be compressed on its way.
        name: told in logs and errors, the same in every try. What tells tries apart is up to the
            protocol.
    """

    sequences: tuple[Asked, ...]
    top_k: int = 0
    temperature: float = 1.0
    merge_ids: tuple[tuple[int, ...], ...] = ()
    compress: bool = False
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def tokens(self) -> int:
        """Tokens the teacher is sent, a shared prompt counted with every response."""
        return sum(asked.length for asked in self.sequences)

    def wants(self, name: str) -> bool:
        """Whether any token wants a field."""
        return any(bool(asked.rows(name).any()) for asked in self.sequences)


@dataclass(frozen=True)
class Answer:
    """What a teacher says of one sequence.

    Attributes:
        revision: of the weights that answered.
        values: arrays by name, one row per response token that wanted them.
    """

    revision: str
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class Limits:
    """What a protocol can carry and a server takes, known before a run.

    What depends on the server is there once the endpoint has described itself.

    Attributes:
        wanted: fields it has.
        top_k: most of the teacher's own tokens; None: it says only when asked for too many.
        temperature: whether it scores at other temperatures than 1.
        merge_ids: whether it can count several ids as one.
        why_not: per field it lacks, the reason and the way out, for messages.
        sequence_tokens: most tokens of one sequence; None, here and below: it does not say.
        sequences, query_tokens, query_bytes: most of one query.
        ids: most ids to score at one token.
    """

    wanted: frozenset[str]
    top_k: int | None = None
    temperature: bool = True
    merge_ids: bool = True
    why_not: Mapping[str, str] = field(default_factory=dict)
    sequence_tokens: int | None = None
    sequences: int | None = None
    query_tokens: int | None = None
    query_bytes: int | None = None
    ids: int | None = None


def too_long(limit: int, prompt: int, response: int) -> str:
    """Why a server does not take a sequence, and the way out, after the words for the server.

    Args:
        limit: most tokens of one sequence.
        prompt, response: tokens that it has.
    """
    room = limit - prompt
    way_out = (
        f"lower sampler.max_new_tokens to {room}, or shorten the prompts"
        if room > 0
        else "shorten the prompts, and lower sampler.max_new_tokens"
    )
    return (
        f"takes {limit} tokens per sequence, and a prompt of {prompt} with a response of "
        f"{response} has {prompt + response}; {way_out}"
    )


@dataclass(frozen=True)
class Described:
    """What an endpoint says of its model; empty where its protocol does not say.

    Attributes:
        model: as the endpoint names it.
        revision: changes with the weights.
        vocab_size: tokens that carry mass; 0: not said.
        vocabulary: hash of the token strings by id.
        template: hash of the chat template.
        special: token ids by role, such as `eos`.
        dtype: of its weights.
        max_tokens: longest sequence; 0: not said.
        extra: whatever else it says.
    """

    model: str = ""
    revision: str = ""
    vocab_size: int = 0
    vocabulary: str = ""
    template: str = ""
    special: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: str = ""
    max_tokens: int = 0
    extra: Mapping[str, object] = field(default_factory=dict)


@runtime_checkable
class Endpoint(Protocol):
    """A teacher behind a protocol. Safe for use by several threads at once."""

    @property
    def name(self) -> str:
        """Where it is, for messages: protocol and address."""
        ...

    @property
    def limits(self) -> Limits: ...

    def describe(self) -> Described:
        """What it says of its model.

        Raises:
            TeacherError: it cannot be reached, or refuses the key.
        """
        ...

    def score(self, query: Query) -> list[Answer]:
        """Answers in the order of the query's sequences, each checked with `check_answer`.

        Tries again what may succeed, within the connection's budget, and never uses a part of an
        earlier try.

        Raises:
            TeacherError: names the endpoint, the request and what is wrong.
        """
        ...

    def head(self) -> Unembedding | None:
        """What turns hidden states into logits; None where the protocol hands out none."""
        ...

    def close(self) -> None: ...


SLACK = 1e-3
"""How far rounding in a teacher's arithmetic may take a mass above 1."""

TOLD_TWICE = 2e-2
"""How far apart two numbers for one token may be, relative to 1 + |log p|: bfloat16's rounding."""


class AnswerError(ValueError):
    """What is wrong with an answer; whoever asked says whose it is and of which request."""


def check_answer(
    asked: Asked, query: Query, values: Mapping[str, Tensor], *, vocab_size: int = 0
) -> None:
    """Refuse an answer that lacks what was wanted, or says what cannot be.

    Args:
        vocab_size: tokens there are; 0: not known.

    Raises:
        AnswerError: names the array and the row.
    """
    for name in WANTED:
        rows = int(asked.rows(name).sum())
        for array in ARRAYS[name] if rows else ():
            if array not in values:
                raise AnswerError(f"{array} is missing, though {rows} tokens asked for it")
            _check_shape(array, values[array], rows, asked, query)
            _check_values(array, values[array], vocab_size, merged=bool(query.merge_ids))
    if asked.rows("ids").any() and asked.ids is not None:
        again = _said_before(_firsts(asked.ids, query))
        _check_mass("ids_logp", values["ids_logp"].masked_fill(again, -torch.inf))
    if asked.rows("top").any():
        _refuse(_said_before(values["top_ids"]), "top_ids names a token twice", values["top_ids"])
        _check_mass("top_logp", values["top_logp"])
        if asked.rows("sampled").any():
            _check_sampled(asked, query, values)


def _check_shape(array: str, value: Tensor, rows: int, asked: Asked, query: Query) -> None:
    expected: tuple[int, ...] = (rows,)
    if array in ("top_ids", "top_logp"):
        expected = (rows, query.top_k)
    elif array == "ids_logp":
        expected = () if asked.ids is None else tuple(asked.ids.shape)
    elif array == "hidden":
        expected = (rows, *value.shape[1:2]) if value.dim() == 2 and value.shape[1] else (rows, 1)
    if tuple(value.shape) != expected:
        raise AnswerError(
            f"{array} has the shape {list(value.shape)}, but {list(expected)} was asked for"
        )


def _check_values(array: str, value: Tensor, vocab_size: int, *, merged: bool) -> None:
    is_right = value.is_floating_point()
    if array == "top_ids":
        is_right = value.dtype in (torch.int32, torch.int64)
    if not is_right:
        raise AnswerError(f"{array} is {value.dtype}")
    if array == "top_ids":
        value = value.long()  # a comparison wraps a bound that the dtype cannot hold
        outside = (value < 0) | (value >= (vocab_size or 2**31))
        _refuse(outside, "top_ids names a token that there is not", value)
        return
    _refuse(value.isnan(), f"{array} is NaN", value)
    if array in ("hidden", "logsumexp", "entropy"):
        _refuse(value.isinf(), f"{array} is infinite", value)
        if array == "hidden":
            _refuse((value == 0).all(-1), "hidden is zero throughout", value[..., 0])
        if array == "entropy":
            _refuse(value < -SLACK, "an entropy is negative", value)
        return
    _refuse(value > SLACK, f"{array} is above 0, and no log-probability is", value)
    if not (merged and array == "top_logp"):  # the others of a group are left with no mass
        _refuse(value.isneginf(), f"{array} says that there is no mass at all", value)


def _refuse(wrong: Tensor, what: str, value: Tensor) -> None:
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise AnswerError(f"{what} in row {place[0]}: {value[tuple(place)].item():g}")


def _said_before(ids: Int[Tensor, "R K"]) -> Bool[Tensor, "R K"]:
    """True where an id stands in its row once already."""
    ordered, order = torch.sort(ids, dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(again).scatter(-1, order, again)


def _check_mass(array: str, logp: Float[Tensor, "R K"]) -> None:
    mass = logp.to(torch.promote_types(logp.dtype, torch.float32)).logsumexp(-1).exp()
    _refuse(mass > 1 + SLACK, f"{array} has a mass of more than 1", mass)


def _check_sampled(asked: Asked, query: Query, values: Mapping[str, Tensor]) -> None:
    """A token among the likeliest ones has the same number in both places."""
    both = asked.rows("top") & asked.rows("sampled")
    logp = values["sampled_logp"][both[asked.rows("sampled")]]
    rows = both[asked.rows("top")]
    ids, top = values["top_ids"][rows], values["top_logp"][rows]
    tokens = _firsts(asked.response[both], query)
    same = ids == tokens.unsqueeze(-1)
    told = torch.where(same, top, -torch.inf).max(-1).values
    apart = same.any(-1) & ((told - logp).abs() > TOLD_TWICE * (1 + logp.abs()))
    _refuse(apart, "sampled_logp and top_logp disagree on the same token", logp)


def _firsts(tokens: Int[Tensor, "*n"], query: Query) -> Int[Tensor, "*n"]:
    """Tokens as an answer counts them: every id of a group is its first."""
    for first, *others in query.merge_ids:
        for other in others:
            tokens = torch.where(tokens == other, first, tokens)
    return tokens

"""Queries and answers through frames: the same afterwards, or refused in words."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.teacher.messages import (
    QueryLimits,
    answer_frame,
    digest,
    query_frame,
    read_answer,
    read_query,
)
from opd.teacher.query import (
    ARRAYS,
    WANTED,
    Answer,
    AnswerError,
    Asked,
    Query,
    bits,
    check_answer,
)
from opd.teacher.wire import Frame, WireError, decode, encode
from tests.teacher import wire_reference as reference

VOCAB = 50
LIMITS = QueryLimits(
    vocab_size=VOCAB,
    max_tokens=16,
    max_query_tokens=40,
    max_sequences=5,
    max_top_k=6,
    max_ids=8,
)
VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "wire_vectors.json").read_text(encoding="utf-8")
)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def asked(
    prompt: Sequence[int],
    response: Sequence[int],
    want: Sequence[int],
    ids: Sequence[Sequence[int]] | None = None,
) -> Asked:
    rows = None if ids is None else torch.tensor(ids, dtype=torch.int32)
    return Asked(ints(*prompt), ints(*response), ints(*want, dtype=torch.uint8), rows)


QUERY = Query(
    (
        asked((5, 9, 2), (7, 1, 4), (35, 0, 5), ((4, 3),)),
        asked((5, 9), (2, 7), (2, 8)),
        asked((5, 9, 2), (7, 8), (2, 4), ((8, 7),)),
        asked((5, 9, 2), (), ()),
    ),
    top_k=2,
    temperature=0.7,
    merge_ids=((3, 4), (6, 10, 11)),
    compress=True,
    name="step 3",
)


def same(one: Query, other: Query) -> bool:
    def parts(query: Query) -> list[Any]:
        return [
            [None if t is None else t.tolist() for t in (a.prompt, a.response, a.want, a.ids)]
            for a in query.sequences
        ]

    def settings(query: Query) -> Query:
        return replace(query, sequences=())

    return settings(one) == settings(other) and parts(one) == parts(other)


def through(query: Query, limits: QueryLimits = LIMITS, *, compress: bool = False) -> Query:
    read, tried = read_query(decode(encode(query_frame(query, "t1"), compress=compress)), limits)
    assert tried == "t1"
    return read


# --------------------------------------------------------------------------------------------
# Queries


@pytest.mark.parametrize("compress", [False, True])
def test_a_query_comes_out_as_it_went_in(compress: bool) -> None:
    assert same(through(QUERY, compress=compress), QUERY)


@st.composite
def queries(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a query: the types of a tuple are checked at a random place when it is made."""
    columns, prompts = draw(st.integers(1, 8)), draw(st.lists(st.integers(1, 7), min_size=1))
    token = st.integers(0, VOCAB - 1)
    found = []
    for _ in range(draw(st.integers(1, 5))):
        response = draw(st.lists(token, max_size=1))
        want = draw(st.lists(st.integers(0, 63), min_size=len(response), max_size=len(response)))
        rows = sum(bool(one & 4) for one in want)
        row = st.lists(token, min_size=columns, max_size=columns)
        ids = draw(st.lists(row, min_size=rows, max_size=rows)) if rows else None
        length = draw(st.sampled_from(prompts))
        found.append(asked([length] * length, response, want, ids))
    merged = draw(st.lists(token, unique=True, min_size=2, max_size=8))
    return {
        "sequences": tuple(found),
        "top_k": draw(st.integers(1, 6)),
        "temperature": draw(st.floats(1e-3, 1e3)),
        "merge_ids": draw(st.sampled_from([(), (tuple(merged),), (tuple(merged[:2]),)])),
        "compress": draw(st.booleans()),
    }


@given(queries())
def test_any_query_comes_out_as_it_went_in(drawn: dict[str, Any]) -> None:
    query = Query(**drawn)
    read = through(query)
    assert same(read, query)
    assert [digest(one) for one in read.sequences] == [digest(one) for one in query.sequences]


@given(queries())
def test_the_reference_reads_the_same_sequences(drawn: dict[str, Any]) -> None:
    query = Query(**drawn)
    found = reference.sequences(reference.decode(encode(query_frame(query, "t"))))
    assert len(found) == len(query.sequences)
    for theirs, ours in zip(found, query.sequences, strict=True):
        assert theirs.prompt == ours.prompt.tolist()
        assert theirs.response == ours.response.tolist()
        assert theirs.want == ours.want.tolist()
        assert theirs.ids == ([] if ours.ids is None else ours.ids.tolist())
        assert reference.digest(theirs) == digest(ours)
        for name in WANTED:
            assert theirs.rows(name) == ours.rows(name).nonzero().squeeze(-1).tolist()


def test_token_ids_of_any_width_are_the_same_query() -> None:
    wide = [
        Asked(a.prompt.long(), a.response.long(), a.want, None if a.ids is None else a.ids.long())
        for a in QUERY.sequences
    ]
    query = replace(QUERY, sequences=tuple(wide))
    assert encode(query_frame(query, "t")) == encode(query_frame(QUERY, "t"))
    assert list(map(digest, wide)) == list(map(digest, QUERY.sequences))


def test_a_shared_prompt_travels_once() -> None:
    arrays = query_frame(QUERY, "t").arrays
    assert arrays["prompts"].tolist() == [5, 9, 2, 5, 9]
    assert arrays["prompt_lengths"].tolist() == [3, 2]
    assert arrays["prompt_of"].tolist() == [0, 1, 0, 0]
    assert arrays["ids"].tolist() == [[4, 3], [8, 7]]
    sequences = tuple(asked(range(1, 16), (7,), (1,)) for _ in range(64))
    one = encode(query_frame(Query(sequences[:1]), "t"))
    assert len(encode(query_frame(Query(sequences), "t"))) - len(one) < 64 * (4 + 4 + 4 + 1) + 64
    limits = QueryLimits(VOCAB, max_tokens=16)
    assert same(through(Query(sequences, name="n"), limits), Query(sequences, name="n"))


def test_the_vectors_are_the_query_and_the_answer_that_the_page_explains() -> None:
    frames = [decode(bytes.fromhex(vector["hex"])) for vector in VECTORS]
    query, tried = read_query(frames[0], LIMITS)
    expected = (
        asked((5, 9, 2), (7, 1, 4), (35, 0, 5), ((4, 3),)),
        asked((5, 9, 2), (7, 8), (2, 4), ((8, 7),)),
    )
    assert same(query, Query(expected, top_k=2, name="step 3"))
    number, answer = read_answer(frames[1], query, tried, {0, 1})
    check_answer(query.sequences[number], query, answer.values, vocab_size=VOCAB)
    assert answer.values["hidden"].dtype == torch.bfloat16


def test_what_meta_may_leave_out_has_its_default() -> None:
    frame = replace(query_frame(Query((asked((1,), (2,), (1,)),)), "t"), meta={"later": [1]})
    query, tried = read_query(frame, LIMITS)
    assert (tried, query.name, query.top_k, query.temperature) == ("", "", 0, 1.0)
    assert (query.merge_ids, query.compress) == ((), False)


# --------------------------------------------------------------------------------------------
# What a query must not say


def changed(
    meta: Mapping[str, Any] | None = None, *, without: str = "", kind: str = "query", **arrays: Any
) -> Frame:
    frame = query_frame(QUERY, "t1")
    found = {**frame.arrays, **arrays}
    found.pop(without, None)
    return Frame(kind, {**frame.meta, **(meta or {})}, found)


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


TOP_K = "takes 0 to 6"
TEMPERATURE = "and it must lie between 0 and a million"
MERGE = "merge_ids must be lists of two or more ids, each id in one of them"
TEXT = "must be a text of at most 200 printable characters"
SPLIT = "entries, which is not the sum of"

REFUSED: dict[str, tuple[Frame, str]] = {
    "another kind": (changed(kind="answer"), "a frame of kind 'answer' where a query was expected"),
    "another array": (changed(hidden=zeros(1)), "a query with the array hidden"),
    **{
        f"no {name}": (changed(without=name), f"the array {name} is missing")
        for name in query_frame(QUERY, "t").arrays
    },
    **{
        f"int64 {name}": (
            changed(**{name: array.long()}),
            f"the array {name} is {array.dim()}-dimensional torch.int64",
        )
        for name, array in query_frame(QUERY, "t").arrays.items()
    },
    **{
        f"{name} with a dimension more": (
            changed(**{name: array.unsqueeze(0)}),
            f"the array {name} is {array.dim() + 1}-dimensional {array.dtype}",
        )
        for name, array in query_frame(QUERY, "t").arrays.items()
    },
    "prompts too short": (changed(prompts=zeros(4)), f"prompts has 4 {SPLIT} prompt_lengths"),
    "prompts too long": (changed(prompts=zeros(6)), f"prompts has 6 {SPLIT} prompt_lengths"),
    "responses too long": (changed(responses=zeros(8)), f"8 {SPLIT} response_lengths"),
    "a negative length": (changed(prompt_lengths=ints(6, -1)), f"prompts has 5 {SPLIT}"),
    "lengths that wrap": (
        changed(prompt_lengths=ints(2**31 - 1, 2**31 - 1, 7)),
        f"prompts has 5 {SPLIT}",
    ),
    "an empty prompt": (
        changed(prompt_lengths=ints(5, 0)),
        "a prompt is empty, so nothing predicts the first token after it",
    ),
    "too few owners": (
        changed(prompt_of=ints(0, 1, 0)),
        "4 responses, and 3 say which prompt is theirs",
    ),
    "nothing at all": (
        Frame(
            "query",
            {"try": "t"},
            {
                **{name: zeros(0) for name in query_frame(QUERY, "t").arrays if name != "ids"},
                "want": zeros(0).to(torch.uint8),
            },
        ),
        "0 responses, and 0 say which prompt is theirs",
    ),
    "an owner beyond": (
        changed(prompt_of=ints(0, 1, 2, 0)),
        "prompt_of names a prompt beyond the 2 that there are",
    ),
    "a negative owner": (
        changed(prompt_of=ints(0, 1, -1, 0)),
        "prompt_of names a prompt beyond the 2 that there are",
    ),
    "too many responses": (
        changed(response_lengths=ints(3, 2, 2, 0, 0, 0), prompt_of=zeros(6)),
        "6 responses in one query, and this server takes 5",
    ),
    "too many prompts": (
        changed(prompt_lengths=zeros(1000)),
        "1000 prompts in one query, and this server takes 5",
    ),
    "want too short": (
        changed(want=torch.ones(6, dtype=torch.uint8)),
        "want has 6 entries for 7 response tokens",
    ),
    "a bit too many": (
        changed(want=ints(35, 0, 5, 2, 8, 2, 68, dtype=torch.uint8)),
        "or bits that version 1 does not have",
    ),
    "a negative token": (
        changed(prompts=ints(5, 9, 2, 5, -1)),
        "prompts has the token id -1, and the vocabulary has 50 tokens",
    ),
    "a token too large": (
        changed(responses=ints(7, 1, 4, 2, 7, 7, 50)),
        "responses has the token id 50, and the vocabulary has 50 tokens",
    ),
    "an id too large": (
        changed(ids=ints(4, 3, 2**31 - 1, 7).reshape(2, 2)),
        "ids has the token id 2147483647, and the vocabulary has 50 tokens",
    ),
    "ids for nobody": (
        changed(want=ints(35, 0, 1, 2, 8, 2, 1, dtype=torch.uint8)),
        "ids has 2 rows of 2, 0 tokens want them",
    ),
    "a row of ids too many": (
        changed(ids=zeros(6).reshape(3, 2)),
        "ids has 3 rows of 2, 2 tokens want them",
    ),
    "rows without ids": (
        changed(ids=zeros(0).reshape(2, 0)),
        "ids has 2 rows of 0, 2 tokens want them, and this server takes up to 8",
    ),
    "too many ids": (
        changed(ids=zeros(18).reshape(2, 9)),
        "ids has 2 rows of 9, 2 tokens want them, and this server takes up to 8",
    ),
    "a sequence too long": (
        changed(prompts=zeros(20), prompt_lengths=ints(3, 17)),
        "sequence 1 has 19 tokens, and this server takes 16",
    ),
    "too many tokens": (
        changed(prompts=zeros(14), prompt_lengths=ints(12, 2)),
        "45 tokens in one query, and this server takes 40",
    ),
    "top of none": (changed({"top_k": 0}), "top is wanted with top_k = 0"),
    "top_k too large": (changed({"top_k": 7}), f"top_k = 7, and this server {TOP_K}"),
    "top_k negative": (changed({"top_k": -1}), f"top_k = -1, and this server {TOP_K}"),
    "top_k true": (changed({"top_k": True}), f"top_k = True, and this server {TOP_K}"),
    "top_k broken": (changed({"top_k": 2.0}), f"top_k = 2.0, and this server {TOP_K}"),
    "top_k null": (changed({"top_k": None}), f"top_k = None, and this server {TOP_K}"),
    "top_k huge": (changed({"top_k": 10**4000}), f"0, and this server {TOP_K}"),
    "temperature 0": (changed({"temperature": 0}), f"temperature = 0, {TEMPERATURE}"),
    "temperature negative": (changed({"temperature": -0.1}), f"temperature = -0.1, {TEMPERATURE}"),
    "temperature huge": (changed({"temperature": 10**400}), TEMPERATURE),
    "temperature a million": (changed({"temperature": 1e6}), f"1000000.0, {TEMPERATURE}"),
    "temperature infinite": (changed({"temperature": float("inf")}), f"inf, {TEMPERATURE}"),
    "temperature NaN": (changed({"temperature": float("nan")}), f"nan, {TEMPERATURE}"),
    "temperature true": (changed({"temperature": True}), f"True, {TEMPERATURE}"),
    "temperature in words": (changed({"temperature": "1"}), f"'1', {TEMPERATURE}"),
    "one merged": (changed({"merge_ids": [[3]]}), MERGE),
    "merged twice": (changed({"merge_ids": [[3, 4], [5, 3]]}), MERGE),
    "merged with itself": (changed({"merge_ids": [[3, 3]]}), MERGE),
    "merged beyond": (changed({"merge_ids": [[3, 50]]}), MERGE),
    "merged negative": (changed({"merge_ids": [[3, -1]]}), MERGE),
    "merged broken": (changed({"merge_ids": [[3, 4.0]]}), MERGE),
    "merged lists": (changed({"merge_ids": [[[3], [4]]]}), MERGE),
    "merged flat": (changed({"merge_ids": [3, 4]}), MERGE),
    "merged object": (changed({"merge_ids": {"3": [3, 4]}}), MERGE),
    "merged text": (changed({"merge_ids": ["34"]}), MERGE),
    "merged null": (changed({"merge_ids": None}), MERGE),
    "too many merged": (changed({"merge_ids": [list(range(9))]}), MERGE),
    "a long try": (changed({"try": "x" * 201}), f"try {TEXT}"),
    "a try that is no text": (changed({"try": 5}), f"try {TEXT}"),
    "a name of two lines": (changed({"name": "a\nb"}), f"name {TEXT}"),
    "half a character": (changed({"name": "\ud800"}), f"name {TEXT}"),
    "a nested name": (changed({"name": [[[]]]}), f"name {TEXT}"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_query_that_cannot_be_is_refused_by_its_name(what: str) -> None:
    frame, message = REFUSED[what]
    with pytest.raises(WireError, match=re.escape(message)):
        read_query(frame, LIMITS)


def test_every_limit_can_be_reached() -> None:
    query = Query(
        (
            asked(range(10), range(6), [6] * 6, [range(8)] * 6),
            *(asked((1, 2, 3), (4, 5, 49), (0, 0, 63), [range(8)]) for _ in range(4)),
        ),
        top_k=6,
        merge_ids=(tuple(range(8)),),
        name="x" * 200,
    )
    assert query.tokens == LIMITS.max_query_tokens
    assert same(through(query), query)


def test_the_vocabulary_limits_k() -> None:
    query = Query((asked((1,), (2,), (2,)),), top_k=3)
    assert through(query, QueryLimits(3)).top_k == 3
    with pytest.raises(WireError, match="top_k = 4, and this server takes 0 to 3"):
        through(replace(query, top_k=4), QueryLimits(3))


def test_a_million_prompts_of_nothing_are_refused_before_they_are_cut() -> None:
    frame = changed(prompts=zeros(0), prompt_lengths=zeros(2**24))
    with pytest.raises(WireError, match="16777216 prompts in one query"):
        read_query(frame, LIMITS)


# --------------------------------------------------------------------------------------------
# Mutated queries


class Mutator:
    """Query frames with some of their arrays and of their meta replaced."""

    numbers = (-(2**31), -1, 0, 1, 2, 3, 5, 6, 7, 8, 9, 49, 50, 51, 255, 2**24, 2**31 - 1)
    values = (
        *(None, True, False, "", "x", "x" * 200, "x" * 201, "\n", "\ud800", [], {}, [[]], [[1, 2]]),
        *([[1, 2], [3, 4, 5]], [[1]], [[1, 1]], [1], [[[1]], [[2]]], [[1, 2.0]], [[True, 2]]),
        *(0.5, 1.0, 2.0, 1e-300, 1e6, 1e300, float("inf"), float("nan"), 10**400, -0.0),
    )

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        plain = Query((asked((1, 2), (3, 4), (1, 2)),), top_k=1)
        self.frames = [query_frame(QUERY, "t"), query_frame(plain, "t")]

    def __call__(self) -> Frame:
        draw, frame = self.draw, self.draw.choice(self.frames)
        meta, arrays = dict(frame.meta), dict(frame.arrays)
        for _ in range(draw.choice((1, 1, 2, 3))):
            if draw.random() < 0.35:
                meta[draw.choice(list(meta))] = draw.choice((*self.values, *self.numbers))
            elif draw.random() < 0.1:
                arrays.pop(draw.choice(list(arrays)))
            elif draw.random() < 0.1:
                arrays[draw.choice(("hidden", "top_ids", "ids"))] = self.array()
            else:
                name = draw.choice(list(arrays))
                arrays[name] = self.other(arrays[name])
            if not arrays:
                break
        return Frame(frame.kind if draw.random() < 0.98 else "answer", meta, arrays)

    def array(self) -> Tensor:
        draw = self.draw
        shape = [draw.choice((0, 1, 2, 3, 5)) for _ in range(draw.randint(0, 3))]
        dtypes = (torch.int32, torch.int32, torch.uint8, torch.int64, torch.float32)
        return torch.zeros(shape).to(draw.choice(dtypes))

    def other(self, array: Tensor) -> Tensor:
        """Nearly the same array."""
        draw, count = self.draw, array.numel()
        match draw.randrange(7):
            case 0 | 1 | 2 if count:
                flat = array.flatten().clone()
                value = draw.choice(self.numbers)
                flat[draw.randrange(count)] = value % 256 if array.dtype == torch.uint8 else value
                return flat.reshape(array.shape)
            case 3 if count:
                return array[: draw.randrange(len(array))] if array.dim() else array
            case 4 if array.dim() and count:
                more = array[:1].expand(draw.choice((1, 2, 3, 40)), *array.shape[1:])
                return torch.cat([array, more])
            case 5:
                return array.unsqueeze(draw.randint(0, array.dim())) if array.dim() < 3 else array
            case 6 if array.dim():
                return array[torch.tensor(draw.sample(range(len(array)), len(array))).long()]
            case _:
                return self.array()


def assert_within_limits(query: Query, limits: QueryLimits = LIMITS) -> None:
    """All that a server relies on afterwards."""
    assert 0 < len(query.sequences) <= limits.max_sequences
    assert sum(one.length for one in query.sequences) <= limits.max_query_tokens
    assert 0 <= query.top_k <= min(limits.max_top_k, limits.vocab_size)
    assert query.top_k or not query.wants("top")
    assert 0 < query.temperature < 1e6
    assert isinstance(query.temperature, float)
    merged = [one for group in query.merge_ids for one in group]
    assert len(set(merged)) == len(merged) <= limits.max_ids
    assert all(type(one) is int and 0 <= one < limits.vocab_size for one in merged)
    assert len(query.name) <= 200
    columns = {one.ids.shape[1] for one in query.sequences if one.ids is not None}
    assert len(columns) <= 1
    assert all(0 < count <= limits.max_ids for count in columns)
    for one in query.sequences:
        assert len(one.prompt)
        assert one.length <= limits.max_tokens
        assert len(one.want) == len(one.response)
        assert not len(one.want) or int(one.want.max()) < 64
        assert (0 if one.ids is None else len(one.ids)) == int(one.rows("ids").sum())
        for ids in (one.prompt, one.response, *(() if one.ids is None else (one.ids,))):
            assert ids.dtype == torch.int32
            assert bool(((ids >= 0) & (ids < limits.vocab_size)).all())


def fuzz(count: int, seed: int) -> None:
    mutated, met = Mutator(seed), Counter[str]()
    for _ in range(count):
        frame = mutated()
        try:
            query, tried = read_query(frame, LIMITS)
        except WireError as error:
            met[re.sub(r"\d+|'.*'", "", str(error))[:24]] += 1
            continue
        met["read"] += 1
        assert tried == frame.meta["try"]
        assert_within_limits(query)
        if met["read"] % 8 == 0:
            again, _ = read_query(decode(encode(query_frame(query, tried))), LIMITS)
            assert same(again, query)
    assert met["read"] > count // 20
    assert len(met) > 25, met


def test_ten_thousand_mutated_queries_are_refused_or_within_the_limits() -> None:
    fuzz(10_000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_mutated_queries_are_refused_or_within_the_limits(seed: int) -> None:
    fuzz(100_000, seed=seed)


# --------------------------------------------------------------------------------------------
# Answers


def logp(*values: float) -> Tensor:
    return torch.tensor(values)


VALUES = {
    "sampled_logp": logp(-0.5, -2.0),
    "top_ids": ints(7, 3).reshape(1, 2),
    "top_logp": logp(-0.5, -1.25).reshape(1, 2),
    "ids_logp": logp(-2.0, -2.0).reshape(1, 2),
    "hidden": logp(1.5, -2.0, 0.25).reshape(1, 3),
}
"""What can be answered to the first sequence of `QUERY`."""


def answered(
    values: Mapping[str, Tensor] = VALUES, *, number: int = 0, tried: str = "t1", **meta: Any
) -> Frame:
    frame = answer_frame(
        QUERY.sequences[number], Answer("b6e1", values), number=number, tried=tried
    )
    return replace(frame, meta={**frame.meta, **meta})


def test_an_answer_comes_out_as_it_went_in() -> None:
    for compress in (False, True):
        frame = decode(encode(answered(), compress=compress))
        number, answer = read_answer(frame, QUERY, "t1", {0, 1})
        assert (number, answer.revision) == (0, "b6e1")
        assert answer.values.keys() == VALUES.keys()
        assert all(torch.equal(answer.values[name], value) for name, value in VALUES.items())
        check_answer(QUERY.sequences[0], QUERY, answer.values, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (answered(tried="t2"), "an answer to another request: 't2', not 't1'"),
        (answered(**{"try": None}), "an answer to another request: None, not 't1'"),
        (answered(number=1), "an answer for sequence 1, which is not waited for"),
        (answered(sequence=2), "sequence 2 was answered for other tokens than were asked"),
        (answered(sequence=4), "an answer for sequence 4, which is not waited for"),
        (answered(sequence=-1), "an answer for sequence -1, which is not waited for"),
        (answered(sequence=False), "an answer for sequence False, which is not waited for"),
        (answered(sequence=0.0), "an answer for sequence 0.0, which is not waited for"),
        (answered(sequence=[0]), "an answer for sequence [0], which is not waited for"),
        (answered(sequence=None), "an answer for sequence None, which is not waited for"),
        (answered(digest=1), "sequence 0 was answered for other tokens than were asked"),
        (answered(digest=None), "sequence 0 was answered for other tokens than were asked"),
        (answered({"prompts": ints(1)}), "an answer with the array prompts"),
    ],
    ids=lambda value: "" if isinstance(value, Frame) else value[:40],
)
def test_an_answer_to_something_else_is_refused(frame: Frame, message: str) -> None:
    with pytest.raises(WireError, match=re.escape(message)):
        read_answer(decode(encode(frame)), QUERY, "t1", {0, 2, 3})


def test_a_second_answer_is_refused() -> None:
    missing = {0, 1, 2, 3}
    number, _ = read_answer(answered(), QUERY, "t1", missing)
    missing.discard(number)
    with pytest.raises(WireError, match="an answer for sequence 0, which is not waited for"):
        read_answer(answered(), QUERY, "t1", missing)


def test_the_digest_is_that_of_the_whole_question() -> None:
    one = asked((1, 2), (3, 4), (4, 5), ((6, 7), (8, 9)))
    others = [
        asked((1, 3), (3, 4), (4, 5), ((6, 7), (8, 9))),
        asked((1, 2), (4, 3), (4, 5), ((6, 7), (8, 9))),
        asked((1, 2), (3, 4), (5, 4), ((6, 7), (8, 9))),
        asked((1, 2), (3, 4), (4, 5), ((6, 7), (9, 8))),
        asked((1, 2), (3, 4), (4, 5)),
    ]
    assert digest(one) not in map(digest, others)
    assert len(set(map(digest, others))) == len(others)


def test_the_digest_knows_where_the_response_begins() -> None:
    one, other = asked((1, 2, 3), (4,), (5,)), asked((1,), (2, 3), (4, 5))
    assert digest(one) != digest(other)


# --------------------------------------------------------------------------------------------
# What cannot be true


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_answers_of_any_precision_are_taken(dtype: torch.dtype) -> None:
    values = {n: v.to(dtype) if v.is_floating_point() else v for n, v in VALUES.items()}
    check_answer(QUERY.sequences[0], QUERY, values, vocab_size=VOCAB)


@pytest.mark.parametrize("vocab_size", [0, VOCAB])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_width_are_taken(dtype: torch.dtype, vocab_size: int) -> None:
    values = {**VALUES, "top_ids": VALUES["top_ids"].to(dtype)}
    check_answer(QUERY.sequences[0], QUERY, values, vocab_size=vocab_size)


WRONG: dict[str, tuple[Mapping[str, Tensor], str]] = {
    **{
        f"no {name}": ({n: v for n, v in VALUES.items() if n != name}, f"{name} is missing")
        for name in VALUES
    },
    **{
        f"{name} with a dimension less": ({**VALUES, name: value[0]}, f"{name} has the shape")
        for name, value in VALUES.items()
    },
    **{
        f"{name} without rows": ({**VALUES, name: value[:0]}, f"{name} has the shape")
        for name, value in VALUES.items()
    },
    **{
        f"{name} of another kind": (
            {**VALUES, name: value.float() if name == "top_ids" else value.int()},
            f"{name} is torch",
        )
        for name, value in VALUES.items()
    },
    **{
        f"{name} NaN": ({**VALUES, name: value * torch.nan}, f"{name} is NaN in row 0")
        for name, value in VALUES.items()
        if name != "top_ids"
    },
    "ids that are NaN": (
        {**VALUES, "top_ids": VALUES["top_ids"] * torch.nan},
        "top_ids is torch.float32",
    ),
    "ids of one byte": (
        {**VALUES, "top_ids": VALUES["top_ids"].to(torch.uint8)},
        "top_ids is torch.uint8",
    ),
    "hidden without width": (
        {**VALUES, "hidden": torch.zeros(1, 0)},
        "hidden has the shape [1, 0]",
    ),
    "hidden without columns": ({**VALUES, "hidden": logp(0.0)}, "hidden has the shape [1]"),
    "hidden a number": ({**VALUES, "hidden": torch.tensor(0.0)}, "hidden has the shape []"),
    "hidden zero": ({**VALUES, "hidden": torch.zeros(1, 3)}, "hidden is zero throughout in row 0"),
    "hidden infinite": (
        {**VALUES, "hidden": torch.full((1, 3), torch.inf)},
        "hidden is infinite in row 0: inf",
    ),
    "above 0": ({**VALUES, "sampled_logp": logp(-0.5, 0.1)}, "sampled_logp is above 0"),
    "a token twice": ({**VALUES, "top_ids": ints(7, 7).reshape(1, 2)}, "a token twice in row 0: 7"),
    "a token beyond": (
        {**VALUES, "top_ids": ints(7, 50).reshape(1, 2)},
        "top_ids names a token that there is not in row 0: 50",
    ),
    "a negative token": (
        {**VALUES, "top_ids": ints(7, -1).reshape(1, 2)},
        "top_ids names a token that there is not in row 0: -1",
    ),
    "too much mass": (
        {**VALUES, "top_logp": logp(-0.5, -0.5).reshape(1, 2)},
        "top_logp has a mass of more than 1 in row 0",
    ),
    "two numbers for one token": (
        {**VALUES, "sampled_logp": logp(-0.6, -2.0)},
        "sampled_logp and top_logp disagree on the same token in row 0: -0.6",
    ),
    "a sampled token without mass": (
        {**VALUES, "sampled_logp": logp(-torch.inf, -2.0)},
        "sampled_logp says that there is no mass at all in row 0: -inf",
    ),
    "an asked token without mass": (
        {**VALUES, "ids_logp": logp(-2.0, -torch.inf).reshape(1, 2)},
        "ids_logp says that there is no mass at all in row 0: -inf",
    ),
    "a token with mass that has none": (
        {**VALUES, "top_logp": logp(-torch.inf, -1.25).reshape(1, 2)},
        "sampled_logp and top_logp disagree on the same token in row 0: -0.5",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_answer_that_cannot_be_is_refused_by_its_name(what: str) -> None:
    values, message = WRONG[what]
    with pytest.raises(AnswerError, match=re.escape(message)):
        check_answer(QUERY.sequences[0], QUERY, values, vocab_size=VOCAB)


def test_merged_ids_have_the_mass_of_their_group_and_one_of_them_counts() -> None:
    """3 and 4 are one token, so a row that asks for both is told of its mass twice."""
    values = {**VALUES, "ids_logp": logp(-0.1, -0.1).reshape(1, 2)}
    check_answer(QUERY.sequences[0], QUERY, values, vocab_size=VOCAB)
    with pytest.raises(AnswerError, match="ids_logp has a mass of more than 1 in row 0"):
        check_answer(QUERY.sequences[0], replace(QUERY, merge_ids=()), values, vocab_size=VOCAB)


def test_the_others_of_a_group_may_be_among_the_likeliest_without_mass() -> None:
    top = {"top_ids": ints(7, 4).reshape(1, 2), "top_logp": logp(-0.5, -torch.inf).reshape(1, 2)}
    check_answer(QUERY.sequences[0], QUERY, {**VALUES, **top}, vocab_size=VOCAB)
    plain = replace(QUERY, merge_ids=())
    with pytest.raises(AnswerError, match="top_logp says that there is no mass at all in row 0"):
        check_answer(QUERY.sequences[0], plain, {**VALUES, **top}, vocab_size=VOCAB)


def answer_to(one: Asked, query: Query, draw: random.Random) -> dict[str, Tensor]:
    """Arrays of nearly the right shapes, with numbers that are sometimes possible."""
    found = {}
    wanted = [name for name in WANTED if bool(one.rows(name).any())]
    for name in (*wanted, *draw.sample(WANTED, draw.choice((0, 0, 1)))):
        for array in ARRAYS[name]:
            shape = [int(one.rows(name).sum())]
            if name in ("top", "ids", "hidden"):
                shape.append(3 if name == "hidden" else 2)
            if draw.random() < 0.15:
                change = draw.choice(([], [0], [2], [0, 0], [1, 0], [1, 2], [1, 2, 1], [2, 3]))
                shape = list(change)
            value = torch.full(shape, draw.choice((-3.0, -2.5, 0.0, 7.0, -torch.inf, torch.nan)))
            dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
            if array == "top_ids":
                value = torch.arange(value.numel(), dtype=torch.float).reshape(shape)
                value = value + draw.choice((0, 0, 0, 48, -1))
                dtypes = [torch.int32, torch.int64]
            if draw.random() < 0.1:
                value = value.nan_to_num(1.0, 1.0, 1.0)
                dtypes = [torch.uint8, torch.int32, torch.float32]
            found[array] = value.to(draw.choice(dtypes))
    return found


def test_mutated_answers_are_refused_or_have_the_shapes_that_were_asked_for() -> None:
    draw, met = random.Random(0), Counter[str]()
    for _ in range(1_500):
        number = draw.randrange(4)
        one = QUERY.sequences[number]
        meta: dict[str, Any] = {}
        if draw.random() < 0.1:
            key = draw.choice(("try", "sequence", "revision", "digest"))
            meta[key] = draw.choice((None, True, [], {}, "x", 0, 1, -1, 2**70, 0.0))
        frame = answered(answer_to(one, QUERY, draw), number=number, **meta)
        try:
            read, answer = read_answer(frame, QUERY, "t1", {0, 1, 2, 3})
            check_answer(one, QUERY, answer.values, vocab_size=draw.choice((0, VOCAB)))
        except (WireError, AnswerError) as error:
            met[re.sub(r"\d+", "", str(error))[:30]] += 1
            continue
        met["read"] += 1
        assert read == number
        for name in WANTED:
            rows = int(one.rows(name).sum())
            for array in ARRAYS[name] if rows else ():
                value = answer.values[array]
                assert len(value) == rows
                assert value.is_floating_point() == (array != "top_ids")
                assert not value.isnan().any()
    assert met["read"] > 100
    assert len(met) > 20, met


def test_bits_of_names_are_those_of_the_page() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/wire.md").read_text(encoding="utf-8")
    for name in WANTED:
        arrays = ", ".join(f"`{array}`" for array in ARRAYS[name])
        assert f"| {bits([name])} | `{name}` | {arrays} |" in page

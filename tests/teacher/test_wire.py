"""Frames: what goes in comes out, and whatever else arrives is refused in words.

`wire_reference` reads and writes the same format from `docs/wire.md` alone.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import random
import re
import struct
import sys
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.errors import ConfigError
from opd.teacher import wire
from opd.teacher.identity import vocabulary_hash
from opd.teacher.wire import (
    ARRAYS,
    DTYPES,
    ENTRY,
    HEADER,
    KINDS,
    MAGIC,
    Frame,
    FrameReader,
    WireError,
    decode,
    encode,
)
from tests.teacher import wire_reference as reference

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/wire.md"
VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "wire_vectors.json").read_text(encoding="utf-8")
)
NAMES = {name: code for code, name in ARRAYS.items()}
SHAPES = [(), (0,), (1,), (5,), (0, 3), (3, 0), (2, 3), (0, 0, 0), (2, 0, 4), (2, 3, 4)]


def noise(dtype: torch.dtype, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Any bits: infinities, subnormal numbers, NaN with a payload."""
    count = int(np.prod(shape, dtype=int))
    data = bytearray(random.Random(seed).randbytes(count * dtype.itemsize))
    flat = torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return flat.reshape(tuple(shape))


def bits(array: Tensor) -> bytes:
    flat = array.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def told(frame: Frame) -> tuple[Any, ...]:
    """All of a frame, to be compared bit by bit."""
    arrays = [(n, a.dtype, tuple(a.shape), bits(a)) for n, a in frame.arrays.items()]
    return frame.kind, json.dumps(dict(frame.meta)), arrays


def told_by_reference(frame: reference.Frame) -> tuple[Any, ...]:
    arrays = [
        (name, getattr(torch, a.dtype), tuple(a.values.shape), reference.array_bytes(a))
        for name, a in frame.arrays.items()
    ]
    return frame.kind, json.dumps(frame.meta), arrays


def as_reference(frame: Frame) -> reference.Frame:
    def one(array: Tensor) -> reference.Array:
        name = str(array.dtype).removeprefix("torch.")
        wide = array.float() if array.dtype == torch.bfloat16 else array
        return reference.Array(name, wide.numpy())

    arrays = {name: one(array) for name, array in frame.arrays.items()}
    return reference.Frame(frame.kind, dict(frame.meta), arrays)


FRAMES = [
    Frame("end"),
    Frame("error", {"try": "a", "message": 'no memory, "é" \n 😀'}),
    Frame(
        "query",
        {"try": "b", "merge_ids": [[1, 2], [3, 4, 5]], "temperature": 0.5, "none": None},
        {
            "prompts": noise(torch.int32, (7,), 1),
            "want": noise(torch.uint8, (5,), 2),
            "ids": noise(torch.int32, (2, 3), 3),
        },
    ),
    Frame(
        "answer",
        {"try": "c", "sequence": 3},
        {
            name: noise(dtype, shape, 4)
            for name, dtype, shape in zip(
                list(ARRAYS.values())[7:], DTYPES.values(), SHAPES[3:], strict=False
            )
        },
    ),
]


# --------------------------------------------------------------------------------------------
# What goes in comes out


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_and_shape_survives(
    dtype: torch.dtype, shape: tuple[int, ...], compress: bool
) -> None:
    frame = Frame("answer", {"sequence": 1}, {"hidden": noise(dtype, shape)})
    data = encode(frame, compress=compress)
    assert told(decode(data)) == told(frame)
    assert len(data) % 8 == 0 or compress


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_kind_and_name_survives(kind: str) -> None:
    for name in ARRAYS.values():
        frame = Frame(kind, {}, {name: torch.arange(3)})
        assert told(decode(encode(frame))) == told(frame)


def test_a_view_and_a_parameter_are_written_as_what_they_show() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    shown = {"hidden": whole.t()[1:], "entropy": torch.nn.Parameter(whole[:, 1])}
    read = decode(encode(Frame("answer", {}, shown))).arrays
    assert torch.equal(read["hidden"], whole.t()[1:])
    assert torch.equal(read["entropy"], whole[:, 1])


def test_arrays_may_be_written_into_and_share_nothing_with_what_was_fed() -> None:
    data = bytearray(encode(FRAMES[2]))
    before = bytes(data)
    decode(data).arrays["prompts"].zero_()
    assert data == before


arrays_drawn = st.dictionaries(
    st.sampled_from(list(NAMES)),
    st.builds(
        noise,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 4), max_size=3),
        st.integers(0, 2**32),
    ),
)
meta_drawn = st.dictionaries(
    st.text(max_size=9),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=9,
    ),
    max_size=4,
)
frames_drawn = st.builds(Frame, st.sampled_from(list(KINDS.values())), meta_drawn, arrays_drawn)


@given(frames_drawn, st.booleans())
def test_any_frame_survives_and_agrees_with_the_reference(frame: Frame, compress: bool) -> None:
    ours, theirs = encode(frame, compress=compress), as_reference(frame)
    assert told(decode(ours)) == told(frame)
    assert told_by_reference(reference.decode(ours)) == told(frame)
    assert told(decode(reference.encode(theirs, compress=compress))) == told(frame)
    assert compress or ours == reference.encode(theirs)


def test_a_compressed_frame_is_smaller_where_it_can_be() -> None:
    frame = Frame("answer", {}, {"hidden": torch.zeros(64, 64)})
    assert len(encode(frame, compress=True)) < 100 < 64 * 64 * 4 < len(encode(frame))


# --------------------------------------------------------------------------------------------
# The page


def described_frame(described: dict[str, Any]) -> Frame:
    arrays = {
        name: torch.tensor(a["values"], dtype=getattr(torch, a["dtype"])).reshape(a["shape"])
        for name, a in described["arrays"].items()
    }
    return Frame(described["kind"], described["meta"], arrays)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_vectors_are_read_and_written_as_they_say(vector: dict[str, Any]) -> None:
    data, frame = bytes.fromhex(vector["hex"]), described_frame(vector)
    assert told(decode(data)) == told(frame)
    assert told_by_reference(reference.decode(data)) == told(frame)
    assert encode(frame) == data == reference.encode(as_reference(frame))


def test_the_page_shows_the_vectors_of_the_file() -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(
        r"^```(\w*)\n(.*?)^```$", text[text.index("## Test vectors") :], re.M | re.S
    )
    shown = [
        {"hex": "".join(hexadecimal.split()), **json.loads(read)}
        for (_, hexadecimal), (_, read) in zip(blocks[::2], blocks[1::2], strict=True)
    ]
    assert shown == [{k: v for k, v in one.items() if k != "name"} for one in VECTORS]
    for vector in VECTORS:
        assert f"### {vector['name']}".lower() in text.lower()


def test_the_page_has_every_code_and_limit() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for code, name in ARRAYS.items():
        assert f"| `{name}` | {code} |" in text
    for code, dtype in DTYPES.items():
        assert f"| {str(dtype).removeprefix('torch.')} | {code} |" in text
    kinds = ", ".join(f"{code} {kind}" for code, kind in KINDS.items())
    assert kinds in text
    assert f"at most {wire.MOST_META_BYTES:,}, then filling" in text
    assert f"at most {wire.MOST_META_DEPTH} objects and lists deep" in text
    assert wire.MOST_ENTRIES == 2**40
    assert "is at most 2^40" in text


def test_the_page_hashes_a_vocabulary_as_the_library_does() -> None:
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 1, "<pad>": 0})
    shown = re.search(
        r"`(\[\[0, .+?\]\])` has the hash `(\w{16})`", PAGE.read_text(encoding="utf-8")
    )
    assert shown
    assert json.loads(shown[1]) == [[0, "<pad>"], [1, "a"]]
    assert vocabulary_hash(tokenizer) == shown[2]


# --------------------------------------------------------------------------------------------
# Piece by piece


def test_frames_arrive_byte_by_byte() -> None:
    parts = [encode(frame, compress=number % 2 == 1) for number, frame in enumerate(FRAMES)]
    ends = {sum(map(len, parts[: n + 1])): frame for n, frame in enumerate(FRAMES)}
    reader, held = FrameReader(), 0
    for place, byte in enumerate(b"".join(parts), 1):
        found = list(reader.feed(bytes([byte])))
        held = 0 if place in ends else held + 1
        assert [told(one) for one in found] == [told(ends[p]) for p in (place,) if p in ends]
        assert reader.pending == held
    reader.close()


def test_frames_arrive_in_pieces_of_any_size() -> None:
    draw, data = random.Random(0), b"".join(map(encode, FRAMES)) * 3
    for _ in range(50):
        reader, found, place = FrameReader(), [], 0
        while place < len(data):
            size = draw.choice([0, 1, 31, 32, 33, 200, 1000])
            found += list(reader.feed(data[place : place + size]))
            place += size
        assert list(map(told, found)) == list(map(told, FRAMES)) * 3
        assert not reader.pending


def test_a_frame_that_is_cut_off_anywhere_is_missed() -> None:
    data = encode(FRAMES[2])
    for length in range(1, len(data)):
        reader = FrameReader()
        assert not list(reader.feed(data[:length]))
        with pytest.raises(WireError, match=f"cut off: {length} bytes of it arrived"):
            reader.close()
        with pytest.raises(WireError, match="cut off"):
            decode(data[:length])


@pytest.mark.parametrize(("count", "data"), [(0, b""), (2, encode(FRAMES[0]) * 2)])
def test_one_frame_is_one_frame(count: int, data: bytes) -> None:
    with pytest.raises(WireError, match=f"one frame was expected, and there are {count}"):
        decode(data)


def test_a_header_over_the_limit_is_refused_before_its_body_arrives() -> None:
    reader = FrameReader(limit=1000)
    with pytest.raises(WireError, match="a frame of 1001 bytes, and at most 1000 are read"):
        list(reader.feed(header(body_bytes=1001, raw_bytes=1001)))


def test_nothing_is_read_after_a_damaged_frame() -> None:
    damaged = bytearray(encode(FRAMES[2]))
    damaged[-1] ^= 1
    reader = FrameReader()
    for data in (bytes(damaged), encode(FRAMES[0])):
        with pytest.raises(WireError, match="checksum"):
            list(reader.feed(data))


# --------------------------------------------------------------------------------------------
# Damage


def header(
    magic: bytes = MAGIC,
    version: int = 1,
    kind: int = 1,
    flags: int = 0,
    arrays: int = 0,
    body_bytes: int = 0,
    raw_bytes: int = 0,
    checksum: int = 0,
    zero: int = 0,
) -> bytes:
    return HEADER.pack(magic, version, kind, flags, arrays, body_bytes, raw_bytes, checksum, zero)


def framed(body: bytes, **said: Any) -> bytes:
    """A body behind the header that fits it, save for what is said otherwise."""
    fits = {"body_bytes": len(body), "raw_bytes": len(body), "checksum": zlib.crc32(body)}
    return header(**{**fits, **said}) + body


def zipped(body: bytes, *, sent: bytes | None = None, **said: Any) -> bytes:
    compressed = zstandard.ZstdCompressor().compress(body) if sent is None else sent
    return framed(compressed, **{"flags": 1, "raw_bytes": len(body), **said})


def unsized(body: bytes) -> bytes:
    """Compressed without a word on how large it was."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(body)


def entry(
    name: int = 1, dtype: int = 5, dimensions: int = 1, zero: int = 0, sizes: Sequence[int] = (1,)
) -> bytes:
    return ENTRY.pack(name, dtype, dimensions, zero, *sizes, *(0,) * (3 - len(sizes)))


def body(*entries: bytes, meta: bytes = b"{}", says: int | None = None, data: bytes = b"") -> bytes:
    told_length = struct.pack("<I", len(meta) if says is None else says)
    found = b"".join(entries) + told_length + meta
    return found + bytes(-len(found) % 8) + data


ONE = body(entry(), data=bytes(8))
"""One array of one int32, with its filling."""
BIG = 2**32 - 1


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


DAMAGE: dict[str, tuple[bytes, str]] = {
    "magic": (framed(ONE, magic=b"HTTP"), "not a frame of opd's scoring protocol: .*b'HTTP'"),
    "version 0": (framed(ONE, version=0), "a frame of version 0; this is version 1"),
    "version 2": (framed(ONE, version=2), "a frame of version 2; this is version 1"),
    "kind 0": (framed(ONE, kind=0), "kind 0 with flags 0, which version 1 does not have"),
    "kind 5": (framed(ONE, kind=5), "kind 5 with flags 0, which version 1 does not have"),
    "flag 2": (framed(ONE, flags=2), "kind 1 with flags 2, which version 1 does not have"),
    "flag 128": (framed(ONE, flags=129), "kind 1 with flags 129, which version 1 does not have"),
    "zero": (framed(ONE, zero=7), "a header that ends with 7, where version 1 has 0"),
    "body limit": (framed(ONE, body_bytes=2**63), f"of {2**63} bytes, and at most 65536 are read"),
    "raw limit": (zipped(ONE, raw_bytes=2**64 - 1), f"{2**64 - 1} bytes, and at most 65536 are"),
    "two lengths": (framed(ONE, raw_bytes=33), "a body of 32 bytes that says it has 33"),
    "checksum": (framed(ONE, checksum=1), "the checksum of a frame does not match"),
    "empty body": (framed(b""), "the length of a frame's meta is cut off"),
    "table": (
        framed(entry() + entry(name=2) + b"12345678", arrays=3),
        "the table of arrays is longer than its frame",
    ),
    "table and no meta": (framed(entry(), arrays=1), "the length of a frame's meta is cut off"),
    "name 0": (framed(body(entry(name=0)), arrays=1), "array of name 0 and dtype 5, which version"),
    "name 8": (framed(body(entry(name=8)), arrays=1), "array of name 8 and dtype 5, which version"),
    "dtype 0": (framed(body(entry(dtype=0)), arrays=1), "name 1 and dtype 0, which version 1 does"),
    "dtype 8": (framed(body(entry(dtype=8)), arrays=1), "name 1 and dtype 8, which version 1 does"),
    "zero of the table": (
        framed(body(entry(zero=9)), arrays=1),
        "the array prompts has 9 in its table, where version 1 has 0",
    ),
    "4 dimensions": (
        framed(body(entry(dimensions=4, sizes=(1, 1, 1))), arrays=1),
        r"the array prompts has 4 dimensions of sizes \[1, 1, 1\]",
    ),
    "a size too many": (
        framed(body(entry(sizes=(1, 2))), arrays=1),
        r"the array prompts has 1 dimensions of sizes \[1, 2, 0\]",
    ),
    "twice": (
        framed(body(entry(), entry(), data=bytes(16)), arrays=2),
        "the array prompts is there twice",
    ),
    "an empty one twice": (
        framed(body(entry(sizes=(0,)), entry(sizes=(0,))), arrays=2),
        "the array prompts is there twice",
    ),
    "product overflows": (
        framed(body(entry(dimensions=3, sizes=(BIG, BIG, BIG)), data=bytes(8)), arrays=1),
        "the array prompts of sizes .* is larger than any array",
    ),
    "product wraps to 0": (
        framed(body(entry(dimensions=3, sizes=(2**31, 2**31, 4))), arrays=1),
        "the array prompts of sizes .* is larger than any array",
    ),
    "product wraps to 4": (
        framed(
            body(entry(dimensions=3, sizes=(49477, 111620, 3340214413)), data=bytes(16)), arrays=1
        ),
        "the array prompts of sizes .* is larger than any array",
    ),
    "strides overflow": (
        framed(body(entry(dimensions=3, sizes=(0, BIG, BIG))), arrays=1),
        "the array prompts of sizes .* is larger than any array",
    ),
    "array": (
        framed(body(entry(sizes=(3,)), data=bytes(8)), arrays=1),
        r"the array prompts of shape \[3\] is longer than its frame",
    ),
    "second array": (
        framed(
            body(entry(), entry(name=2, sizes=(1, 2**20), dimensions=2), data=bytes(8)), arrays=2
        ),
        r"the array prompt_lengths of shape \[1, 1048576\] is longer than its frame",
    ),
    "no filling": (framed(ONE[:-4], arrays=1), "a frame of 28 bytes whose arrays end at 32"),
    "no filling of meta": (framed(body(meta=b'{"a":1}')[:-5]), "11 bytes whose arrays end at 16"),
    "trailing bytes": (
        framed(ONE + bytes(8), arrays=1),
        "a frame of 40 bytes whose arrays end at 32",
    ),
    "meta longer than frame": (
        framed(body(says=13)),
        "a frame's meta of 13 bytes is longer than its frame",
    ),
    "meta too long": (
        framed(body(meta=b"1" * 65537), body_bytes=65544, raw_bytes=65544),
        "a frame of 65544 bytes, and at most 65536 are read",
    ),
    "meta too long for a higher limit": (
        framed(body(says=65537)),
        "a frame's meta of 65537 bytes, and at most 65536 are read",
    ),
    "meta of 4 GB": (framed(body(says=BIG)), f"meta of {BIG} bytes, and at most 65536 are read"),
    "no JSON": (framed(body(meta=b"{'a':1}")), "a frame's meta is no JSON: "),
    "no meta": (framed(body(meta=b"")), "a frame's meta is no JSON: "),
    "two objects": (framed(body(meta=b"{}{}")), "a frame's meta is no JSON: Extra data"),
    "UTF-16": (framed(body(meta="{}".encode("utf-16"))), "a frame's meta is no JSON: "),
    "byte order mark": (framed(body(meta=b"\xef\xbb\xbf{}")), "a frame's meta is no JSON: "),
    "no UTF-8": (framed(body(meta=b'{"a":"\xff"}')), "a frame's meta is no JSON: "),
    "surrogate": (framed(body(meta=b'{"a":"\xed\xa0\x80"}')), "a frame's meta is no JSON: "),
    "NaN": (framed(body(meta=b'{"a":NaN}')), "no JSON: NaN is no number of JSON"),
    "Infinity": (framed(body(meta=b'{"a":[-Infinity]}')), "-Infinity is no number of JSON"),
    "a key twice": (framed(body(meta=b'{"a":[{"b":1,"b":1}]}')), "an object has a key twice"),
    "an endless number": (framed(body(meta=b'{"a":' + b"9" * 5000 + b"}")), "is no JSON: "),
    "a list": (framed(body(meta=b"[]")), "a frame's meta is no JSON object"),
    "null": (framed(body(meta=b"null")), "a frame's meta is no JSON object"),
    "17 deep": (framed(body(meta=nested(17))), "nested more than 16 deep"),
    "17 objects deep": (
        framed(body(meta=b'{"a":' * 16 + b"{}" + b"}" * 16)),
        "nested more than 16 deep",
    ),
    "500 deep": (framed(body(meta=nested(500))), "nested more than 16 deep"),
    "30000 deep": (framed(body(meta=nested(30000))), "no JSON|nested more than 16 deep"),
    "no Zstandard frame": (zipped(ONE, sent=ONE), "a compressed body that cannot be read: "),
    "empty compressed body": (zipped(ONE, sent=b""), "a compressed body that cannot be read: "),
    "Zstandard frame cut off": (
        zipped(ONE, sent=zstandard.ZstdCompressor().compress(ONE)[:-3]),
        "a compressed body that cannot be read: ",
    ),
    "after the Zstandard frame": (
        zipped(ONE, sent=zstandard.ZstdCompressor().compress(ONE) + b"more"),
        "a compressed body that cannot be read: .*unused data",
    ),
    "two Zstandard frames": (
        zipped(ONE, sent=unsized(ONE) * 2),
        "a compressed body that cannot be read: .*unused data",
    ),
    "a skipped Zstandard frame": (
        zipped(ONE, sent=struct.pack("<II", 0x184D2A50, 8) + bytes(8)),
        "a compressed body that says 8 bytes under a header that says 32",
    ),
    "Zstandard's checksum": (
        zipped(
            ONE,
            sent=zstandard.ZstdCompressor(write_checksum=True).compress(ONE)[:-1] + b"?",
        ),
        "a compressed body that cannot be read: ",
    ),
    "a window of 1 GiB": (
        zipped(ONE, sent=b"\x28\xb5\x2f\xfd\x00\xa0" + struct.pack("<I", 1 | 32 << 3)[:3] + ONE),
        "a compressed body that cannot be read: ",
    ),
    "bomb": (
        zipped(bytes(2**22), raw_bytes=1000, arrays=0),
        f"a compressed body that says {2**22} bytes under a header that says 1000",
    ),
    "bomb of unknown size": (
        zipped(b"", sent=unsized(bytes(2**22)), raw_bytes=1000),
        "a compressed body that cannot be read: ",
    ),
    "bomb over the limit": (
        zipped(bytes(2**22)),
        f"a frame of {2**22} bytes, and at most 65536 are read",
    ),
    "less than it says": (
        zipped(b"", sent=unsized(ONE), raw_bytes=64),
        "a compressed body that is not the 64 bytes it says it is",
    ),
    "more than it says": (
        zipped(b"", sent=unsized(ONE), raw_bytes=31),
        "a compressed body that cannot be read: ",
    ),
    "nothing, compressed": (zipped(b""), "the length of a frame's meta is cut off"),
    "damage in a compressed body": (
        zipped(body(entry(sizes=(3,)), data=bytes(8)), arrays=1),
        r"the array prompts of shape \[3\] is longer than its frame",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_its_name(damage: str) -> None:
    data, message = DAMAGE[damage]
    with pytest.raises(WireError, match=message):
        decode(data, limit=2**16)
    with pytest.raises(reference.RefusedError):
        reference.decode(data, limit=2**16)


def test_what_damage_is_measured_against_is_no_damage() -> None:
    for data in (
        framed(ONE, arrays=1),
        zipped(ONE, arrays=1),
        zipped(ONE, sent=unsized(ONE), arrays=1),
        framed(ONE[:-4] + b"xyz!", arrays=1),
        framed(body(meta=nested(16))),
        framed(body(meta=b" {\n} ")),
        framed(body(entry(dimensions=3, sizes=(0, 2**20, 2**20))), arrays=1),
        framed(body(entry(dimensions=0, sizes=()), data=bytes(8)), arrays=1),
        framed(body(meta=b'{"a":"' + b"x" * (2**16 - 8) + b'"}')),
    ):
        assert told(decode(data)) == told_by_reference(reference.decode(data))


def test_without_zstandard_plain_frames_are_read_and_others_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert told(decode(framed(ONE, arrays=1)))
    with pytest.raises(WireError, match="compressed frames need the package zstandard"):
        decode(zipped(ONE, arrays=1))
    with pytest.raises(ConfigError, match="compressed frames need the package zstandard"):
        encode(Frame("end"), compress=True)


# --------------------------------------------------------------------------------------------
# Mutations

LIMIT = 2**14
"""Small, so that mutations meet it."""

SEEDS = [encode(frame) for frame in FRAMES] + [bytes.fromhex(vector["hex"]) for vector in VECTORS]
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 127, 128, 255, 256, 2**15, 2**16, LIMIT, LIMIT + 1]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


class Mutator:
    """Frames with something wrong: in four of five cases behind a header that fits."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.compressor = zstandard.ZstdCompressor(level=1)
        self.ways: list[Callable[[bytearray], None]] = [
            self.flip,
            self.truncate,
            self.insert,
            self.delete,
            self.repeat,
            self.number,
            self.number,
            self.table,
            self.text,
            self.splice,
            self.noise,
        ]

    def __call__(self) -> bytes:
        draw = self.draw
        if draw.random() < 0.03:
            return self.random_header()
        data = bytearray(draw.choice(SEEDS))
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            draw.choice(self.ways)(data)
        if draw.random() < 0.8 and len(data) >= HEADER.size:
            return self.mended(data)
        return bytes(data)

    def mended(self, data: bytearray) -> bytes:
        """The same body behind a header with its lengths and checksum, sometimes compressed."""
        draw = self.draw
        rest, count = bytes(data[HEADER.size :]), data[7]
        said: dict[str, Any] = {"kind": data[5], "arrays": count, "version": data[4]}
        if draw.random() < 0.8:
            said.update(kind=draw.randint(1, 4), version=1)
        if draw.random() < 0.85:
            return framed(rest, **said)
        sent = bytearray(self.compressor.compress(rest) if draw.random() < 0.8 else unsized(rest))
        if draw.random() < 0.3:
            draw.choice(self.ways[:6])(sent)
        if draw.random() < 0.2:
            said["raw_bytes"] = draw.choice((*NUMBERS, len(rest) + draw.randint(-3, 3))) % 2**64
        return zipped(rest, sent=bytes(sent), **said)

    def random_header(self) -> bytes:
        draw, rest = self.draw, self.draw.randbytes(self.draw.choice((0, 8, 40, 200)))
        said: dict[str, Any] = {
            "kind": draw.randint(0, 5),
            "flags": draw.choice((0, 0, 1, 2, 255)),
            "arrays": draw.choice((0, 1, 2, 255)),
        }
        for name in ("body_bytes", "raw_bytes"):
            if draw.random() < 0.3:
                said[name] = draw.choice(NUMBERS)
        return framed(rest, **said)

    def place(self, data: bytearray) -> int:
        return self.draw.randrange(len(data) + 1)

    def flip(self, data: bytearray) -> None:
        for _ in range(self.draw.choice((1, 1, 2, 8)) if data else 0):
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)

    def truncate(self, data: bytearray) -> None:
        del data[self.place(data) :]

    def insert(self, data: bytearray) -> None:
        place = self.place(data)
        data[place:place] = self.draw.randbytes(self.draw.choice((1, 2, 4, 8, 16, 99)))

    def delete(self, data: bytearray) -> None:
        place = self.place(data)
        del data[place : place + self.draw.choice((1, 2, 4, 8, 16, 99))]

    def repeat(self, data: bytearray) -> None:
        place, size = self.place(data) & ~7, self.draw.choice((8, 16, 32))
        data[place:place] = data[place : place + size]

    def number(self, data: bytearray) -> None:
        """A number that is a limit somewhere, where a number may stand."""
        width = self.draw.choice((1, 4, 4, 8))
        if len(data) >= width:
            place = self.draw.randrange(len(data) - width + 1) & ~(width - 1)
            value = self.draw.choice(NUMBERS) % 256**width
            data[place : place + width] = value.to_bytes(width, "little")

    def table(self, data: bytearray) -> None:
        """Sizes of an array that is there."""
        draw, count = self.draw, data[7] if len(data) > 7 else 0
        place = HEADER.size + ENTRY.size * draw.randrange(max(1, min(count, 14)))
        if count and len(data) >= place + ENTRY.size:
            name, dtype, dimensions, _, *sizes = ENTRY.unpack_from(data, place)
            if draw.random() < 0.5:
                dimensions = draw.randint(0, 4)
            if draw.random() < 0.3:
                dtype = draw.randint(0, 8)
            used = min(dimensions, 3)
            sizes = [
                draw.choice((0, 1, 2, 3, size, 2**31, BIG)) if at < used else 0
                for at, size in enumerate(sizes)
            ]
            ENTRY.pack_into(data, place, name, dtype, dimensions, 0, *sizes)

    def text(self, data: bytearray) -> None:
        """Another JSON, with its length or with another."""
        draw, count = self.draw, data[7] if len(data) > 7 else 0
        start = HEADER.size + ENTRY.size * count
        if len(data) < start + 4:
            return
        (length,) = struct.unpack_from("<I", data, start)
        end = start + 4 + min(length, len(data))
        meta = draw.choice(
            (
                b"[]",
                b"{}",
                b"",
                b'{"a":1e999}',
                b'{"a":NaN}',
                b'{"a":1,"a":2}',
                nested(draw.choice((15, 17, 400, 3000))),
                b'{"\\ud800":"\xff"}',
                b'{"a":' + b"1" * draw.choice((9, 4299, 4301)) + b"}",
            )
        )
        says = len(meta) if draw.random() < 0.8 else draw.choice(NUMBERS) % 2**32
        new = struct.pack("<I", says) + meta
        data[start : end + -(end - HEADER.size) % 8] = new + bytes(-(start - 32 + len(new)) % 8)

    def splice(self, data: bytearray) -> None:
        other = self.draw.choice(SEEDS)
        data[self.place(data) :] = other[self.draw.randrange(len(other)) :]

    def noise(self, data: bytearray) -> None:
        data[self.place(data) :] = self.draw.randbytes(self.draw.choice((1, 8, 64)))


REASONS = (
    "begins with",
    "; this is version 1",
    "a frame of kind",
    "a header that ends with",
    "that says it has",
    "checksum",
    "table of arrays is longer",
    "an array of name",
    "in its table",
    "dimensions of sizes",
    "larger than any array",
    "is there twice",
    "is longer than its frame",
    "whose arrays end at",
    "meta is cut off",
    "a frame's meta of",
    "is no JSON:",
    "is no JSON object",
    "deep",
    "a compressed body that cannot be read",
    "a compressed body that says",
    "a compressed body that is not",
    "was cut off",
    "one frame was expected",
    "are read",
    "read",
)


def unchecked() -> ModuleType:
    """The module as it is outside of tests: checking its annotations is most of a test's time."""
    spec = importlib.util.spec_from_file_location("tests.teacher.unchecked_wire", wire.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(data: bytes, *, limit: int = LIMIT, by: ModuleType = wire) -> str:
    """Why these bytes are refused; `read` if they are a frame after all."""
    try:
        frame = by.decode(data, limit=limit)
    except by.WireError as error:
        said = str(error)
        return next(reason for reason in REASONS if reason in said)
    assert frame.kind in KINDS.values()
    assert all(array.nbytes <= len(data) + limit for array in frame.arrays.values())
    return "read"


def fuzz(count: int, seed: int) -> None:
    mutated, by = Mutator(seed), unchecked()
    met = Counter(outcome(mutated(), by=by) for _ in range(count))
    rare = {reason: met[reason] for reason in REASONS if met[reason] < count // 10_000}
    assert not rare, "the mutations do not reach these"


def test_a_hundred_thousand_mutations_are_refused_or_read() -> None:
    fuzz(100_000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_millions_of_mutations_are_refused_or_read(seed: int) -> None:
    fuzz(300_000, seed=seed)


def agree(count: int, seed: int) -> None:
    mutated, met = Mutator(seed), Counter[bool]()
    for _ in range(count):
        data = mutated()
        try:
            theirs = told_by_reference(reference.decode(data, limit=LIMIT))
        except reference.RefusedError as refused:
            with pytest.raises(WireError):
                pytest.fail(f"{refused}: {data.hex()} is {decode(data, limit=LIMIT)}")
            met[False] += 1
        else:
            assert told(decode(data, limit=LIMIT)) == theirs
            met[True] += 1
    assert min(met[True], met[False]) > count // 20


def test_the_reference_refuses_the_same_mutations() -> None:
    agree(4_000, seed=100)


@pytest.mark.slow
def test_the_reference_refuses_the_same_of_many_mutations() -> None:
    agree(200_000, seed=101)


def test_in_pieces_the_same_mutations_are_refused() -> None:
    mutated, draw = Mutator(200), random.Random(200)
    for _ in range(3_000):
        data = mutated()
        reader, place, found = FrameReader(limit=LIMIT), 0, []
        try:
            while place < len(data):
                size = draw.choice((1, 7, 32, 1000))
                found += list(reader.feed(data[place : place + size]))
                assert reader.pending <= len(data)
                place += size
            reader.close()
        except WireError as error:
            with pytest.raises(WireError, match=f"^{re.escape(str(error))}$"):
                decode(data, limit=LIMIT)
        else:
            assert len(found) != 1 or told(found[0]) == told(decode(data, limit=LIMIT))


# --------------------------------------------------------------------------------------------
# Memory


@dataclass
class Peak:
    """The most bytes that were held at once within a block: Python's, and the whole process's."""

    python: int = 0
    resident: int = 0


@contextmanager
def measured() -> Iterator[Peak]:
    """What the block needs beyond what is there before it."""
    gc.collect()
    peak, before = Peak(), _status("VmRSS") if _reset_resident_peak() else None
    tracemalloc.start()
    try:
        yield peak
    finally:
        peak.python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if before is not None:
            peak.resident = _status("VmHWM") - before


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: Python's own memory is measured all the same
        return False
    return True


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.M)
    assert found
    return int(found[1]) * 1024


def lies() -> Iterator[bytes]:
    """Small frames that claim to be large."""
    for size in (2**20, 2**30 - 8, 2**30, 2**40, 2**63, 2**64 - 1):
        yield framed(ONE, body_bytes=size, raw_bytes=size)
        yield framed(ONE, raw_bytes=size)
        yield zipped(bytes(2**26), raw_bytes=size)
        yield zipped(bytes(2**26), sent=unsized(bytes(2**26)), raw_bytes=min(size, 1000))
        yield framed(body(says=size % 2**32))
    for sizes in ((BIG, 1, 1), (BIG, BIG, BIG), (0, BIG, 1), (0, BIG, BIG), (2**28, 1, 1)):
        for dtype in DTYPES:
            yield framed(body(entry(dtype=dtype, dimensions=3, sizes=sizes)), arrays=1)
    yield framed(ONE, arrays=255)
    yield framed(body(meta=nested(30_000)))


def test_lengths_that_lie_cost_nothing() -> None:
    frames = list(lies())
    with measured() as peak:
        for data in frames:
            outcome(data, limit=2**30)
    assert peak.python < 2**22
    assert peak.resident < 2**25


def test_a_bomb_costs_its_limit_and_no_more() -> None:
    limit = 2**22
    frames = [
        zipped(bytes(2**26), raw_bytes=limit),
        zipped(bytes(2**26), sent=unsized(bytes(2**26)), raw_bytes=limit),
        zipped(bytes(limit), raw_bytes=limit),
        zipped(b"", sent=unsized(b"small"), raw_bytes=limit),
    ]
    with measured() as peak:
        for data in frames:
            with pytest.raises(WireError):
                decode(data, limit=limit)
    assert peak.python < 2 * limit + 2**20
    assert peak.resident < 2 * limit + 2**25


def test_mutations_allocate_no_more_than_they_are_and_the_limit() -> None:
    mutated = Mutator(300)
    frames = [mutated() for _ in range(2_000)]
    with measured() as peak:
        for data in frames:
            outcome(data)
    assert peak.python < 2 * LIMIT + 2**20
    assert peak.resident < 2**25


def test_an_honest_frame_is_held_twice_at_the_most() -> None:
    data = encode(Frame("answer", {}, {"hidden": torch.zeros(2**20)}))
    with measured() as peak:
        frame = decode(data)
    assert peak.python < 2.3 * len(data)
    assert frame.arrays["hidden"].untyped_storage().nbytes() <= len(data)

"""The frames of `docs/wire.md` read and written slowly, from that page alone.

Nothing here imports the library. What the page forbids, `decode` refuses. Numbers go through
`struct` one by one; bfloat16 is widened to float32, of which it is the upper half.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ["query", "answer", "end", "error"]
DTYPES = ["float32", "float16", "bfloat16", "float64", "int32", "int64", "uint8"]
FORMATS = {
    "float32": "<f",
    "float16": "<e",
    "float64": "<d",
    "int32": "<i",
    "int64": "<q",
    "uint8": "<B",
}
NAMES = {
    1: "prompts",
    2: "prompt_lengths",
    3: "prompt_of",
    4: "responses",
    5: "response_lengths",
    6: "want",
    7: "ids",
    16: "sampled_logp",
    17: "top_ids",
    18: "top_logp",
    19: "ids_logp",
    20: "logsumexp",
    21: "entropy",
    22: "hidden",
}
WANTED = ["sampled", "top", "ids", "logsumexp", "entropy", "hidden"]


class RefusedError(Exception):
    """What the page does not allow."""


@dataclass
class Array:
    dtype: str
    values: np.ndarray


@dataclass
class Frame:
    kind: str
    meta: dict[str, Any]
    arrays: dict[str, Array]


def need(condition: bool, what: str) -> None:
    if not condition:
        raise RefusedError(what)


# --------------------------------------------------------------------------------------------
# Reading


def decode(data: bytes, *, limit: int = 2**30) -> Frame:
    need(len(data) >= 32, "header")
    need(data[0:4] == b"\x4f\x50\x44\x46", "magic")
    version, kind, flags, count = data[4], data[5], data[6], data[7]
    body_bytes, raw_bytes = struct.unpack("<Q", data[8:16])[0], struct.unpack("<Q", data[16:24])[0]
    checksum, zero = struct.unpack("<I", data[24:28])[0], struct.unpack("<I", data[28:32])[0]
    need(version == 1, "version")
    need(1 <= kind <= 4, "kind")
    need(flags in (0, 1), "flags")
    need(zero == 0, "zero")
    need(body_bytes <= limit and raw_bytes <= limit, "limit")
    need(len(data) == 32 + body_bytes, "body bytes")
    body = data[32:]
    need(zlib.crc32(body) == checksum, "checksum")
    if flags == 1:
        body = decompressed(body, raw_bytes)
    need(len(body) == raw_bytes, "raw bytes")

    table = []
    for number in range(count):
        entry = body[16 * number : 16 * number + 16]
        need(len(entry) == 16, "table")
        name, dtype, dimensions, entry_zero = entry[0], entry[1], entry[2], entry[3]
        sizes = [struct.unpack("<I", entry[at : at + 4])[0] for at in (4, 8, 12)]
        need(name in NAMES, "name")
        need(1 <= dtype <= 7, "dtype")
        need(dimensions <= 3, "dimensions")
        need(entry_zero == 0, "zero of the table")
        need(all(size == 0 for size in sizes[dimensions:]), "sizes beyond the dimensions")
        product = 1
        for size in sizes:
            product *= size or 1
        need(product <= 2**40, "product of the sizes")
        need(NAMES[name] not in [other for other, _, _ in table], "twice")
        table.append((NAMES[name], DTYPES[dtype - 1], sizes[:dimensions]))

    place = 16 * count
    need(len(body) >= place + 4, "length of the meta")
    length = struct.unpack("<I", body[place : place + 4])[0]
    need(length <= 65536, "meta too long")
    need(len(body) >= place + 4 + length, "meta cut off")
    meta = read_meta(body[place + 4 : place + 4 + length])
    place = filled_up(place + 4 + length)

    arrays = {}
    for name_, dtype_, sizes in table:
        entries = 1
        for size in sizes:
            entries *= size
        width = width_of(dtype_)
        need(len(body) >= place + width * entries, "array")
        parts = [body[place + width * at : place + width * (at + 1)] for at in range(entries)]
        arrays[name_] = Array(dtype_, numbers(dtype_, parts).reshape(sizes))
        place = filled_up(place + width * entries)
    need(place == len(body), "end of the body")
    return Frame(KINDS[kind - 1], meta, arrays)


def filled_up(place: int) -> int:
    while place % 8:
        place += 1
    return place


def width_of(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else struct.calcsize(FORMATS[dtype])


def numbers(dtype: str, parts: list[bytes]) -> np.ndarray:
    if dtype == "bfloat16":
        words = [struct.unpack("<I", b"\0\0" + part)[0] for part in parts]
        return np.array(words, dtype=np.uint32).view(np.float32)
    found = np.zeros(len(parts), dtype=dtype)
    for at, part in enumerate(parts):
        # as bits: a Python float would quieten a NaN
        found[at : at + 1].view(np.uint8)[:] = list(part)
    return found


def read_meta(text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len({key for key, _ in pairs}) == len(pairs), "key twice")
        return dict(pairs)

    def never(word: str) -> Any:
        raise RefusedError(word)

    try:
        meta = json.loads(str(text, "utf-8"), object_pairs_hook=once, parse_constant=never)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"JSON: {error}") from None
    need(isinstance(meta, dict), "object")
    need(depth(meta, 17) <= 16, "depth")
    return meta


def depth(value: Any, most: int) -> int:
    if not isinstance(value, dict | list) or most == 0:
        return 0
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + max([depth(one, most - 1) for one in inner], default=0)


def decompressed(body: bytes, raw_bytes: int) -> bytes:
    import zstandard

    try:
        reader = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
        raw = b""
        for at in range(len(body)):
            raw += reader.decompress(body[at : at + 1])
            need(len(raw) <= raw_bytes, "raw bytes")
            if reader.eof:
                need(at == len(body) - 1, "after the Zstandard frame")
        need(reader.eof, "Zstandard frame cut off")
    except zstandard.ZstdError as error:
        raise RefusedError(f"Zstandard: {error}") from None
    return raw


# --------------------------------------------------------------------------------------------
# Writing


def encode(frame: Frame, *, compress: bool = False) -> bytes:
    codes = {name: code for code, name in NAMES.items()}
    body = b""
    for name, array in frame.arrays.items():
        shape = list(array.values.shape)
        sizes = shape + [0] * (3 - len(shape))
        body += bytes([codes[name], DTYPES.index(array.dtype) + 1, len(shape), 0])
        body += b"".join(struct.pack("<I", size) for size in sizes)
    meta = json.dumps(frame.meta, separators=(",", ":")).encode("utf-8")
    body += struct.pack("<I", len(meta)) + meta
    body += b"\0" * (filled_up(len(body)) - len(body))
    for array in frame.arrays.values():
        body += array_bytes(array)
        body += b"\0" * (filled_up(len(body)) - len(body))
    raw_bytes = len(body)
    if compress:
        body = stored(body)
    header = b"OPDF" + bytes([1, KINDS.index(frame.kind) + 1, int(compress), len(frame.arrays)])
    header += struct.pack("<Q", len(body)) + struct.pack("<Q", raw_bytes)
    header += struct.pack("<I", zlib.crc32(body)) + struct.pack("<I", 0)
    return header + body


def array_bytes(array: Array) -> bytes:
    if array.dtype == "bfloat16":
        words = np.ascontiguousarray(array.values, dtype=np.float32).reshape(-1).view(np.uint32)
        return b"".join(struct.pack("<I", int(word))[2:] for word in words)
    flat = np.ascontiguousarray(array.values, dtype=array.dtype).reshape(-1)
    unsigned = {1: ("<B", np.uint8), 2: ("<H", np.uint16), 4: ("<I", np.uint32)}
    form, bits = unsigned.get(flat.itemsize, ("<Q", np.uint64))
    return b"".join(struct.pack(form, int(word)) for word in flat.view(bits))


def stored(body: bytes) -> bytes:
    """A Zstandard frame of blocks that are not compressed (RFC 8878)."""
    found = struct.pack("<I", 0xFD2FB528) + bytes([0xE0]) + struct.pack("<Q", len(body))
    pieces = [body[at : at + 2**17] for at in range(0, len(body), 2**17)] or [b""]
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        found += struct.pack("<I", int(last) | len(piece) << 3)[:3] + piece
    return found


# --------------------------------------------------------------------------------------------
# What a query means


@dataclass
class Sequence:
    prompt: list[int]
    response: list[int]
    want: list[int]
    ids: list[list[int]]

    def rows(self, field: str) -> list[int]:
        """Response tokens that have a row in the arrays of a field."""
        bit = 2 ** WANTED.index(field)
        return [token for token, bits in enumerate(self.want) if bits // bit % 2]

    def predicted_at(self, token: int) -> int:
        """The position whose output is the distribution of a response token."""
        return len(self.prompt) + token - 1


def sequences(query: Frame) -> list[Sequence]:
    def listed(name: str) -> list[Any]:
        found: list[Any] = query.arrays[name].values.tolist()
        return found

    def cut(values: list[int], lengths: list[int]) -> list[list[int]]:
        found = []
        for length in lengths:
            found.append(values[:length])
            values = values[length:]
        return found

    prompts = cut(listed("prompts"), listed("prompt_lengths"))
    responses = cut(listed("responses"), listed("response_lengths"))
    want = listed("want")
    ids = listed("ids") if "ids" in query.arrays else []
    found = []
    for prompt, response in zip(listed("prompt_of"), responses, strict=True):
        own = Sequence(prompts[prompt], response, want[: len(response)], [])
        want = want[len(response) :]
        rows = len(own.rows("ids"))
        own.ids, ids = ids[:rows], ids[rows:]
        found.append(own)
    return found


def digest(sequence: Sequence) -> int:
    values = [len(sequence.prompt), len(sequence.response)]
    values += sequence.prompt + sequence.response + sequence.want
    for row in sequence.ids:
        values += row
    return zlib.crc32(b"".join(struct.pack("<i", value) for value in values))

"""The frames of the scoring protocol: a small header, a table of arrays, raw little-endian numbers.

`docs/wire.md` describes the same format for other implementations, with test vectors. Nothing in
a frame is executed, and no length in it is believed before it is checked against a limit.

    header   32 bytes: magic "OPDF", version u8, kind u8, flags u8, arrays u8,
             body bytes u64, raw bytes u64, checksum u32, zero u32
    body     the table: per array name u8, dtype u8, dimensions u8, zero u8, three sizes u32
             meta: length u32, that many bytes of JSON, zeros up to a multiple of 8
             the arrays in the table's order, each filled up with zeros to a multiple of 8

The checksum is the CRC-32 of the body as sent. With flag 1 the body is one Zstandard frame of
`raw bytes` bytes; without it both lengths are the same. Writers fill up with zeros, and readers do
not look at what the filling is.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd.errors import ConfigError

VERSION = 1
MAGIC = b"OPDF"
HEADER = struct.Struct("<4sBBBBQQII")
ENTRY = struct.Struct("<BBBBIII")
LENGTH = struct.Struct("<I")

KINDS = {1: "query", 2: "answer", 3: "end", 4: "error"}
DTYPES = {
    1: torch.float32,
    2: torch.float16,
    3: torch.bfloat16,
    4: torch.float64,
    5: torch.int32,
    6: torch.int64,
    7: torch.uint8,
}
ARRAYS = {
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
_KIND_CODES = {name: code for code, name in KINDS.items()}
_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ARRAY_CODES = {name: code for code, name in ARRAYS.items()}

COMPRESSED = 1
MOST_DIMENSIONS = 3
MOST_ENTRIES = 2**40
"""Product of an array's sizes, a 0 counted as 1: beyond it even an empty array has no strides."""
MOST_META_BYTES = 2**16
MOST_META_DEPTH = 16
"""Objects and lists within each other, the outermost counted; nothing recursive meets more."""
LIMIT = 2**30
"""Bytes that a body may have, before and after decompression, unless a caller says otherwise."""


class WireError(ValueError):
    """Bytes that are no frame, or a frame that this version does not read."""


@dataclass(frozen=True)
class Frame:
    """One message.

    Attributes:
        kind: `query`, `answer`, `end` or `error`.
        meta: a JSON object.
        arrays: by name; at most three dimensions.
    """

    kind: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """What stands in front of a body."""

    kind: str
    compressed: bool
    arrays: int
    body_bytes: int
    raw_bytes: int
    checksum: int


def encode(frame: Frame, *, compress: bool = False) -> bytes:
    """The bytes of a frame.

    Args:
        compress: with Zstandard, which needs the package `zstandard`.
    """
    body = bytearray()
    for name, array in frame.arrays.items():
        sizes = (*array.shape, *(0,) * (MOST_DIMENSIONS - array.dim()))
        body += ENTRY.pack(_ARRAY_CODES[name], _DTYPE_CODES[array.dtype], array.dim(), 0, *sizes)
    meta = json.dumps(frame.meta, separators=(",", ":"), allow_nan=False).encode()
    body += LENGTH.pack(len(meta)) + meta
    body += bytes(-len(body) % 8)
    for array in frame.arrays.values():
        body += _raw(array)
        body += bytes(-len(body) % 8)
    sent = zstandard().ZstdCompressor().compress(bytes(body)) if compress else bytes(body)
    header = HEADER.pack(
        MAGIC,
        VERSION,
        _KIND_CODES[frame.kind],
        COMPRESSED if compress else 0,
        len(frame.arrays),
        len(sent),
        len(body),
        zlib.crc32(sent),
        0,
    )
    return header + sent


def _raw(array: Tensor) -> bytes:
    flat = array.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def decode(data: bytes | bytearray, *, limit: int = LIMIT) -> Frame:
    """The one frame that these bytes are.

    Raises:
        WireError: they are not exactly one frame, or it is larger than `limit`.
    """
    reader = FrameReader(limit=limit)
    frames = list(reader.feed(data))
    reader.close()
    if len(frames) != 1:
        raise WireError(f"one frame was expected, and there are {len(frames)}")
    return frames[0]


class FrameReader:
    """Takes bytes as they arrive, and hands out each frame when it is complete.

    Holds at most one frame's bytes beside what it was fed last.

    Args:
        limit: most bytes of a body, before and after decompression.
    """

    def __init__(self, *, limit: int = LIMIT) -> None:
        self._limit = limit
        self._bytes = bytearray()

    def feed(self, data: bytes | bytearray) -> Iterator[Frame]:
        """Frames that these bytes complete, in their order.

        Raises:
            WireError: a frame that cannot be read; nothing after it can be either.
        """
        self._bytes += data
        while len(self._bytes) >= HEADER.size:
            header = read_header(self._bytes[: HEADER.size], limit=self._limit)
            end = HEADER.size + header.body_bytes
            if len(self._bytes) < end:
                return
            frame = _read_body(header, self._bytes[HEADER.size : end])
            del self._bytes[:end]  # not before it was read: a damaged frame is met again
            yield frame

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete."""
        return len(self._bytes)

    def close(self) -> None:
        """Say that nothing follows.

        Raises:
            WireError: a frame was cut off.
        """
        if self._bytes:
            raise WireError(f"a frame was cut off: {len(self._bytes)} bytes of it arrived")


def read_header(data: bytes | bytearray, *, limit: int = LIMIT) -> Header:
    """The header that these 32 bytes are.

    Raises:
        WireError: another format, a version or a flag from the future, or a body over the limit.
    """
    magic, version, kind, flags, arrays, body_bytes, raw_bytes, checksum, zero = HEADER.unpack(data)
    if magic != MAGIC:
        raise WireError(f"not a frame of opd's scoring protocol: it begins with {bytes(magic)!r}")
    if version != VERSION:
        raise WireError(f"a frame of version {version}; this is version {VERSION}")
    if kind not in KINDS or flags & ~COMPRESSED:
        raise WireError(f"a frame of kind {kind} with flags {flags}, which version 1 does not have")
    if zero:
        raise WireError(f"a header that ends with {zero}, where version 1 has 0")
    if max(body_bytes, raw_bytes) > limit:
        raise WireError(
            f"a frame of {max(body_bytes, raw_bytes)} bytes, and at most {limit} are read"
        )
    compressed = bool(flags & COMPRESSED)
    if not compressed and body_bytes != raw_bytes:
        raise WireError(f"a body of {body_bytes} bytes that says it has {raw_bytes}")
    return Header(KINDS[kind], compressed, arrays, body_bytes, raw_bytes, checksum)


def _read_body(header: Header, body: bytearray) -> Frame:
    if zlib.crc32(body) != header.checksum:
        raise WireError("the checksum of a frame does not match: its bytes were damaged")
    if header.compressed:
        body = _decompressed(header, body)
    table = [_read_entry(body, at * ENTRY.size) for at in range(header.arrays)]
    place = header.arrays * ENTRY.size
    meta, place = _read_meta(body, place)
    arrays: dict[str, Tensor] = {}
    for name, dtype, shape in table:
        count = math.prod(shape)
        end = place + count * dtype.itemsize
        if end > len(body):
            raise WireError(f"the array {name} of shape {list(shape)} is longer than its frame")
        if name in arrays:
            raise WireError(f"the array {name} is there twice")
        arrays[name] = (
            torch.frombuffer(body, dtype=dtype, count=count, offset=place).reshape(shape)
            if count
            else torch.empty(shape, dtype=dtype)
        )
        place = end + -end % 8
    if place != len(body):
        raise WireError(f"a frame of {len(body)} bytes whose arrays end at {place}")
    return Frame(header.kind, meta, arrays)


def _decompressed(header: Header, body: bytearray) -> bytearray:
    try:
        package = zstandard()
    except ConfigError as error:
        raise WireError(str(error)) from None
    data = bytes(body)
    try:
        params = package.get_frame_parameters(data)
        if params.content_size not in (header.raw_bytes, package.CONTENTSIZE_UNKNOWN):
            raise WireError(
                f"a compressed body that says {params.content_size} bytes under a header that says "
                f"{header.raw_bytes}"
            )
        raw = package.ZstdDecompressor(max_window_size=2**27).decompress(
            data, max_output_size=header.raw_bytes, allow_extra_data=False
        )
    except package.ZstdError as error:
        raise WireError(f"a compressed body that cannot be read: {error}") from None
    if len(raw) != header.raw_bytes:
        raise WireError(f"a compressed body that is not the {header.raw_bytes} bytes it says it is")
    return bytearray(raw)


def _read_entry(body: bytearray, place: int) -> tuple[str, torch.dtype, tuple[int, ...]]:
    if place + ENTRY.size > len(body):
        raise WireError("the table of arrays is longer than its frame")
    name, dtype, dimensions, zero, *sizes = ENTRY.unpack_from(body, place)
    if name not in ARRAYS or dtype not in DTYPES:
        raise WireError(f"an array of name {name} and dtype {dtype}, which version 1 does not have")
    if zero:
        raise WireError(f"the array {ARRAYS[name]} has {zero} in its table, where version 1 has 0")
    if dimensions > MOST_DIMENSIONS or any(sizes[dimensions:]):
        raise WireError(f"the array {ARRAYS[name]} has {dimensions} dimensions of sizes {sizes}")
    if math.prod(max(size, 1) for size in sizes) > MOST_ENTRIES:
        raise WireError(f"the array {ARRAYS[name]} of sizes {sizes} is larger than any array")
    return ARRAYS[name], DTYPES[dtype], tuple(sizes[:dimensions])


def _read_meta(body: bytearray, place: int) -> tuple[dict[str, Any], int]:
    start = place + LENGTH.size
    if start > len(body):
        raise WireError("the length of a frame's meta is cut off")
    (length,) = LENGTH.unpack_from(body, place)
    end = start + length
    if length > MOST_META_BYTES:
        raise WireError(f"a frame's meta of {length} bytes, and at most {MOST_META_BYTES} are read")
    if end > len(body):
        raise WireError(f"a frame's meta of {length} bytes is longer than its frame")
    try:
        meta = json.loads(
            body[start:end].decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame's meta is no JSON: {error}") from None
    if not isinstance(meta, dict):
        raise WireError("a frame's meta is no JSON object")
    if _is_deeper(meta, MOST_META_DEPTH):
        raise WireError(f"a frame's meta is nested more than {MOST_META_DEPTH} deep")
    return meta, end + -end % 8


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _is_deeper(value: object, most: int) -> bool:
    layer = [value]
    for _ in range(most + 1):
        outer = [one for one in layer if isinstance(one, dict | list)]
        layer = [
            inner for one in outer for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not outer:
            return False
    return True


def zstandard() -> Any:
    """The package that compresses.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import zstandard as package
    except ImportError:
        raise ConfigError(
            "compressed frames need the package zstandard; pip install 'opd[serve]'"
        ) from None
    return package

"""Compressed streams: recognised, read to their very end, refused when damaged; written the same every time."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable

import pytest

from onlap import errors
from onlap.layers.stream import compression
from pure.tar_makers import END, header

DATA = b"some text " * 50_000 + bytes(300_000) + bytes(range(256)) * 100


def _zstd(data: bytes) -> bytes:
    made = compression.compressor(compression.ZSTD)
    return made.compress(data) + made.flush()


MAKERS: dict[str, Callable[[bytes], bytes]] = {
    compression.GZIP: gzip.compress,
    compression.ZSTD: _zstd,
    compression.BZIP2: bz2.compress,
    compression.XZ: lzma.compress,
}


@pytest.fixture(params=["as installed", "without isal"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """gzip by isal and by zlib."""
    if request.param == "without isal":
        monkeypatch.setitem(sys.modules, "isal", None)
    return str(request.param)


def _inflate(data: bytes, kind: str, step: int = 1 << 20) -> bytes:
    stream = io.BytesIO(data)
    inflater = compression.Inflater(lambda count: stream.read(min(count, step)), kind)
    out = []
    while chunk := inflater.chunk():
        assert len(chunk) <= compression.CHUNK
        out.append(chunk)
    return b"".join(out)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("step", [1 << 20, 1000])
def test_streams_of_several_members(kind: str, step: int, engine: str) -> None:
    made = MAKERS[kind](DATA) + MAKERS[kind](b"") + MAKERS[kind](b"end")
    assert compression.detect(made[: compression.PEEK]) == kind
    assert _inflate(made, kind, step) == DATA + b"end"


@pytest.mark.parametrize("kind", MAKERS)
def test_streams_a_byte_at_a_time(kind: str, engine: str) -> None:
    assert _inflate(MAKERS[kind](b"short") * 2, kind, 1) == b"short" * 2


def _gzip(flags: int) -> bytes:
    """A gzip stream whose header has what the flags say (RFC 1952)."""
    head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(6)
    if flags & 4:
        head += b"\5\0extra"
    if flags & 8:
        head += b"name\0"
    if flags & 16:
        head += b"a comment\0"
    if flags & 2:
        head += (zlib.crc32(head) & 0xFFFF).to_bytes(2, "little")
    return head + gzip.compress(DATA)[10:]


@pytest.mark.parametrize("flags", range(0, 32, 2))
@pytest.mark.parametrize("step", [1, 7, 13, 1 << 20])
def test_gzip_headers_wherever_they_are_cut(flags: int, step: int, engine: str) -> None:
    assert _inflate(_gzip(flags) * 2, compression.GZIP, step) == DATA * 2


@pytest.mark.parametrize(
    "data",
    [b"\x1f\x8b\x07" + bytes(20), b"\x1f\x8b\x08\xe0" + bytes(20), _gzip(2)[:10] + b"xx" + _gzip(2)[12:]],
    ids=["method", "flags", "checksum"],
)
def test_gzip_headers_that_cannot_be(data: bytes, engine: str) -> None:
    with pytest.raises(errors.DataLoss):
        _inflate(data, compression.GZIP)


def test_a_gzip_header_without_end(engine: str) -> None:
    with pytest.raises(errors.DataLoss):
        _inflate(b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (2 << 20), compression.GZIP)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_a_stream_that_is_cut(kind: str, part: float, engine: str) -> None:
    made = MAKERS[kind](os.urandom(50_000))
    with pytest.raises(errors.DataLoss):
        _inflate(made[: int(len(made) * part)], kind)


@pytest.mark.parametrize("kind", [compression.GZIP, compression.BZIP2, compression.XZ])
def test_a_stream_that_is_damaged(kind: str, engine: str) -> None:
    made = bytearray(MAKERS[kind](os.urandom(50_000)))
    made[len(made) // 2] ^= 0x55
    with pytest.raises(errors.DataLoss):
        _inflate(bytes(made), kind)


@pytest.mark.parametrize("kind", MAKERS)
def test_something_else_behind_a_stream(kind: str, engine: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        _inflate(MAKERS[kind](b"x") + b"garbage", kind)


@pytest.mark.parametrize("kind", [compression.GZIP, compression.XZ])
@pytest.mark.parametrize("step", [100, 1 << 20])
def test_zeros_that_pad_a_stream(kind: str, step: int, engine: str) -> None:
    assert _inflate(MAKERS[kind](b"x") + bytes(10_000), kind, step) == b"x"


def test_a_skippable_frame_of_zstd() -> None:
    frame = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    assert compression.detect(frame) == compression.ZSTD
    assert _inflate(frame + _zstd(b"x") + frame, compression.ZSTD) == b"x"


def test_an_archive_whose_first_name_looks_like_a_magic_number() -> None:
    for name in (b"BZh9", b"\x1f\x8b\x08", b"\xfd7zXZ"):
        assert compression.detect((header(name) + END)[: compression.PEEK]) == compression.NONE
    assert compression.detect(b"") == compression.detect(b"hello") == compression.NONE


def test_an_xz_header_that_asks_for_gigabytes() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    made = lzma.LZMACompressor(filters=[{**filters[0], "dict_size": 1 << 20}])
    data = made.compress(b"x") + made.flush()
    # The byte of the block header that tells the size of the dictionary, and the header's checksum.
    block = bytearray(data[12:24])
    block[block.index(bytes([0x21, 1])) + 2] = 38
    block[8:12] = zlib.crc32(block[:8]).to_bytes(4, "little")
    with pytest.raises(errors.DataLoss, match=r"[Mm]emory"):
        _inflate(data[:12] + bytes(block) + data[24:], compression.XZ)


@pytest.mark.parametrize(
    "kind, level, engine_name",
    [
        (compression.GZIP, None, None),
        (compression.GZIP, 9, None),
        (compression.GZIP, 9, "zlib"),
        (compression.GZIP, 0, "isal"),
        (compression.ZSTD, None, None),
        (compression.ZSTD, 19, None),
    ],
)
def test_what_is_written_is_read(kind: str, level: int | None, engine_name: str | None) -> None:
    def pack() -> bytes:
        made = compression.compressor(kind, level, engine=engine_name)
        return made.compress(memoryview(DATA)[:1000]) + made.compress(DATA[1000:]) + made.flush()

    data = pack()
    assert data == pack()
    assert _inflate(data, kind) == DATA
    if kind == compression.GZIP:
        assert data[4:8] == bytes(4), "a time in the header"


@pytest.mark.parametrize(
    "kind, level, engine_name",
    [
        ("bzip2", None, None),
        ("lz4", None, None),
        (compression.GZIP, 10, None),
        (compression.GZIP, 4, "isal"),
        (compression.GZIP, -1, "zlib"),
        (compression.GZIP, 1, "pigz"),
        (compression.ZSTD, 23, None),
        (compression.ZSTD, 0, None),
    ],
)
def test_what_is_not_written(kind: str, level: int | None, engine_name: str | None) -> None:
    with pytest.raises(errors.InvalidArgument):
        compression.compressor(kind, level, engine=engine_name)


def test_libraries_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("isal", "backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(errors.Unimplemented, match="pip install"):
        compression.Inflater(lambda count: b"", compression.ZSTD)
    with pytest.raises(errors.Unimplemented, match="pip install isal"):
        compression.compressor(compression.GZIP, engine="isal")
    made = compression.compressor(compression.GZIP)
    assert gzip.decompress(made.compress(DATA) + made.flush()) == DATA

"""Compressed streams: recognised by their first bytes on reading, made by the fastest installed library on writing.

gzip uses isal where it is installed, otherwise zlib; zstd uses the standard library from Python 3.14 on, otherwise
backports.zstd. bzip2 and xz are only read, as in Docker.

Sources: RFC 1952 (gzip), RFC 8878 (zstd), the xz file format; Docker v26.1.5, pkg/archive, ``DetectCompression``.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import Any, Literal, Protocol

from onlap import errors
from onlap.arguments import check_number
from onlap.layers.format import tar

NONE = "none"
GZIP = "gzip"
ZSTD = "zstd"
BZIP2 = "bzip2"
XZ = "xz"

# What layers are written with.
Compression = Literal["none", "gzip", "zstd"]

# The largest chunk that is passed on. A much larger new bytes object costs a page fault for each of its pages.
CHUNK = 256 * 1024
_INPUT = 128 * 1024

# How much of a stream detect() needs: one tar block.
PEEK = tar.BLOCK

# xz -9 takes 65 MiB to decompress; a header can ask for 4 GiB.
_XZ_MEMORY = 256 * 1024 * 1024


class Decompressor(Protocol):
    """One compressed stream, as :class:`bz2.BZ2Decompressor` is."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


class Compressor(Protocol):
    """One stream being compressed, as by :func:`zlib.compressobj`."""

    def compress(self, data: bytes | memoryview, /) -> bytes: ...
    def flush(self) -> bytes: ...


def detect(start: bytes) -> str:
    """How a stream that starts with these bytes (:data:`PEEK`, or all of it) is compressed."""
    if len(start) >= tar.BLOCK and _is_tar(start):
        # Checked before the magic numbers: the first file of a plain archive may be called "BZh".
        return NONE
    if start.startswith(b"\x1f\x8b"):
        return GZIP
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50):
        return ZSTD
    if start.startswith(b"BZh"):
        return BZIP2
    if start.startswith(b"\xfd7zXZ\0"):
        return XZ
    return NONE


def _is_tar(start: bytes) -> bool:
    try:
        return tar.parse_number(start[148:156]) == tar.checksum(memoryview(start)[: tar.BLOCK])
    except ValueError:
        return False


class Inflater:
    """Decompresses a stream of one or more members, in chunks.

    Args:
        read: returns up to that many bytes of the compressed stream, and none at its end.
        kind: the compression, not :data:`NONE`.

    Raises:
        Unimplemented: no library for this compression is installed.
    """

    def __init__(self, read: Callable[[int], bytes], kind: str) -> None:
        self._read = read
        self._kind = kind
        self._new, self._failures = _decompressors(kind)
        self._stream: Decompressor | None = None
        self._pending = b""
        self._started = False

    def chunk(self) -> bytes:
        """The next bytes, at most :data:`CHUNK`; none at the end.

        Raises:
            DataLoss: the stream is damaged or truncated.
            InvalidArgument: it is followed by something else.
        """
        while True:
            if self._stream is None and not self._next_stream():
                return b""
            stream = self._stream
            assert stream is not None
            data = b""
            if stream.needs_input:
                data = self._pending or self._read(_INPUT)
                self._pending = b""
                if not data:
                    raise errors.DataLoss(f"the {self._kind} stream ends too early")
            try:
                out = stream.decompress(data, CHUNK)
            except self._failures as error:
                raise errors.DataLoss(f"the {self._kind} stream is damaged: {error}") from error
            if stream.eof:
                self._pending = stream.unused_data
                self._stream = None
            if out:
                return out

    def _next_stream(self) -> bool:
        """Begin the next member; False at the end."""
        if not self._pending:
            self._pending = self._read(_INPUT)
        if self._started and self._kind in (GZIP, XZ):
            # gzip(1) and xz(1) skip zeros that pad a stream, as on a tape.
            while self._pending and not self._pending.strip(b"\0"):
                self._pending = self._read(_INPUT)
            self._pending = self._pending.lstrip(b"\0")
        if not self._pending:
            return False
        if self._started:
            self._fill(6)
            if detect(self._pending) != self._kind:
                raise errors.InvalidArgument(f"the {self._kind} stream is followed by something else")
        self._started = True
        if self._kind == GZIP:
            self._fill(4)
            if self._pending[3:4] > b"\0":
                # ISA-L 2.31 loses its place when the name, the comment or the checksum of a header lies beyond the
                # first piece of its input.
                self._fill(_INPUT)
        self._stream = self._new()
        return True

    def _fill(self, count: int) -> None:
        parts, have = [self._pending], len(self._pending)
        while have < count and (more := self._read(_INPUT)):
            parts.append(more)
            have += len(more)
        self._pending = b"".join(parts)


class _ZlibStream:
    """:func:`zlib.decompressobj` with the interface of the other decompressors."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._full

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        out = self._stream.decompress(self._stream.unconsumed_tail + data, max(max_length, 0))
        # When all input is consumed, the library may still hold output that did not fit.
        self._full = bool(self._stream.unconsumed_tail) or len(out) == max_length
        return out


def _decompressors(kind: str) -> tuple[Callable[[], Decompressor], tuple[type[Exception], ...]]:
    """A factory of decompressors, and the errors that they raise."""
    if kind == GZIP:
        try:
            from isal import igzip_lib
        except ImportError:
            return _ZlibStream, (zlib.error,)
        failure: Any = igzip_lib.IsalError
        return lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP), (failure,)
    if kind == BZIP2:
        import bz2

        return bz2.BZ2Decompressor, (OSError, ValueError, EOFError)
    if kind == XZ:
        import lzma

        return lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), (lzma.LZMAError, EOFError)
    zstd = _zstd()
    return zstd.ZstdDecompressor, (zstd.ZstdError, EOFError)


def _zstd() -> Any:
    """The module ``compression.zstd``, or its backport."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise errors.Unimplemented(
            "no library for zstd is installed", hint="pip install backports.zstd, or use Python 3.14"
        ) from None
    return zstd


GZIP_ENGINES = ("isal", "zlib")


def compressor(kind: str, level: int | None = None, *, engine: str | None = None) -> Compressor:
    """A compressor whose output depends only on its input, the level and the engine (a gzip header has no time).

    Args:
        kind: :data:`GZIP` or :data:`ZSTD`.
        level: 0 to 3 for isal, 0 to 9 for zlib, 1 to 22 for zstd; None for the library's default.
        engine: for gzip, one of :data:`GZIP_ENGINES`; None for the fastest one that is installed.

    Raises:
        InvalidArgument: there is no such kind, level or engine.
        Unimplemented: the library is not installed.
    """
    if level is not None:
        check_number(level, "level", whole=True)
    if kind == GZIP:
        return _gzip(level, engine)
    if kind != ZSTD:
        raise errors.InvalidArgument(f"layers are not written as {kind!r}", hint="use gzip, zstd or none")
    if level is not None and not 1 <= level <= 22:
        raise errors.InvalidArgument(f"zstd has no level {level}", hint="use 1 to 22")
    made: Compressor = _zstd().ZstdCompressor(level=3 if level is None else level)
    return made


def _gzip(level: int | None, engine: str | None) -> Compressor:
    if engine not in (None, *GZIP_ENGINES):
        raise errors.InvalidArgument(f"no such gzip engine: {engine!r}", hint="use isal or zlib")
    if engine != "zlib":
        try:
            from isal import isal_zlib
        except ImportError:
            if engine == "isal":
                raise errors.Unimplemented("isal is not installed", hint="pip install isal") from None
        else:
            # Unless isal was asked for, levels are zlib's: isal's three stand for the nine.
            best = 3 if engine == "isal" else 9
            if level is not None and not 0 <= level <= best:
                raise errors.InvalidArgument(f"gzip has no level {level}", hint=f"use 0 to {best}")
            if level is not None and engine is None:
                level = (level + 2) // 3
            return isal_zlib.compressobj(2 if level is None else level, wbits=31)
    if level is not None and not 0 <= level <= 9:
        raise errors.InvalidArgument(f"gzip has no level {level}", hint="use 0 to 9")
    return zlib.compressobj(-1 if level is None else level, wbits=31)

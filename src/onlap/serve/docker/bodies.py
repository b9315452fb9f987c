"""Bodies of HTTP/1.1 messages as files: with a length, or in chunks.

Source: RFC 9112, sections 6 and 7.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

# A chunk's header has a number of at most 16 digits, and perhaps extensions, which nobody uses.
_MAX_LINE = 1024
_DRAIN = 256 * 1024


class Sized(io.RawIOBase):
    """A body of known length.

    Args:
        source: the connection.
        length: in bytes.
    """

    def __init__(self, source: BinaryIO, length: int) -> None:
        self._source = source
        self._left = length

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes, none at the end; ConnectionError where the connection ends too early."""
        wanted = self._left if size is None or size < 0 else min(size, self._left)
        if not wanted:
            return b""
        data = self._source.read(wanted)
        if len(data) < wanted:
            raise ConnectionError("the request ends in its body")
        self._left -= len(data)
        return data


class Chunked(io.RawIOBase):
    """A body in chunks.

    Args:
        source: the connection.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._left = 0
        self._ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes, none at the end; ConnectionError where the connection ends too early."""
        if size is None or size < 0:
            parts = []
            while data := self.read(_DRAIN):
                parts.append(data)
            return b"".join(parts)
        if not self._left and not self._ended:
            self._next_chunk()
        wanted = min(size, self._left)
        if not wanted:
            return b""
        data = self._source.read(wanted)
        if len(data) < wanted:
            raise ConnectionError("the request ends in a chunk")
        self._left -= len(data)
        if not self._left and self._source.read(2) != b"\r\n":
            raise ConnectionError("a chunk does not end where it said")
        return data

    def _next_chunk(self) -> None:
        digits = self._line().partition(b";")[0].strip()
        try:
            self._left = int(digits, 16)
        except ValueError as error:
            raise ConnectionError("a chunk has no length") from error
        if self._left < 0:
            raise ConnectionError("a chunk has a negative length")
        if not self._left:
            self._ended = True
            while self._line():
                pass  # trailers

    def _line(self) -> bytes:
        line = self._source.readline(_MAX_LINE)
        if not line.endswith(b"\n"):
            raise ConnectionError("the request ends between chunks")
        return line.rstrip(b"\r\n")


class Joined(io.RawIOBase):
    """What was read of a body already, and the rest.

    Args:
        first: a byte, or a few.
        rest: the body.
    """

    def __init__(self, first: bytes, rest: BinaryIO) -> None:
        self._first = first
        self._rest = rest

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """As the body's."""
        first, self._first = self._first, b""
        if size is None or size < 0:
            return first + self._rest.read()
        if not first:
            return self._rest.read(size)
        self._first = first[size:]
        return first[:size]


def drain(body: io.RawIOBase) -> None:
    """Read what is left: the client reads no answer before it has sent everything."""
    while body.read(_DRAIN):
        pass


class ChunkWriter(io.RawIOBase):
    """Writes a body in chunks; the first one makes the headers go out.

    Args:
        out: the connection.
        start: sends the headers.

    Attributes:
        started: whether it has.
    """

    def __init__(self, out: BinaryIO, start: Callable[[], None]) -> None:
        self._out = out
        self._start = start
        self.started = False

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Send all of ``data``."""
        if not self.started:
            self._start()
            self.started = True
        length = len(data)
        if length:
            self._out.write(b"%x\r\n" % length)
            self._out.write(data)
            self._out.write(b"\r\n")
        return length

    def finish(self) -> None:
        """End the body."""
        self.write(b"")
        self._out.write(b"0\r\n\r\n")

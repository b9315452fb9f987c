"""Bodies of HTTP/1.1 messages as files: of known length, or in chunks.

Source: RFC 9112, sections 6 and 7.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

# A chunk's header has a number of at most 16 digits, and possibly extensions, which are not in use.
_MAX_LINE = 1024
_DRAIN = 256 * 1024


def request_body(source: BinaryIO, length: int | None) -> io.BufferedReader:
    """The body of a request; reading it raises ConnectionError where the connection ends too early.

    Args:
        source: the connection.
        length: in bytes; None for a body in chunks.
    """
    return io.BufferedReader(_Body(source, length))


class _Body(io.RawIOBase):
    def __init__(self, source: BinaryIO, length: int | None) -> None:
        self._source = source
        self._chunked = length is None
        self._ended = length is not None
        self._left = length or 0  # of the body, or of the current chunk

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        if not self._left and not self._ended:
            self._next_chunk()
        wanted = min(len(buffer), self._left)
        if not wanted:
            return 0
        data = self._source.read(wanted)
        if len(data) < wanted:
            raise ConnectionError("the request ends in its body")
        buffer[:wanted] = data
        self._left -= wanted
        if self._chunked and wanted and not self._left and self._source.read(2) != b"\r\n":
            raise ConnectionError("a chunk is longer than its length")
        return wanted

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


def drain(body: BinaryIO) -> None:
    """Read the rest: the client does not read the answer before it has sent everything."""
    while body.read(_DRAIN):
        pass


class ChunkWriter(io.RawIOBase):
    """Writes a body in chunks; the first one sends the headers.

    Args:
        out: the connection.
        start: sends the headers.

    Attributes:
        started: whether the headers have been sent.
    """

    def __init__(self, out: BinaryIO, start: Callable[[], object]) -> None:
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

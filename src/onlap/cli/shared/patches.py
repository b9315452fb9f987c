"""Unified diffs on a stream: as they are, or on a terminal in colour and without what it would act on."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import IO, BinaryIO, cast

from onlap import errors
from onlap.cli.terminal.output import is_terminal, written
from onlap.cli.terminal.text import safe

# SGR numbers, by how a line begins.
_COLOURS = {b"+": "32", b"-": "31", b"@": "36"}


def write_patch(stream: IO[str] | None, write: Callable[[BinaryIO], None]) -> None:
    """Let a function write a patch to a stream.

    Args:
        stream: standard output or standard error; None if that is closed.
        write: gets a binary file.

    Raises:
        BrokenPipeError: the reader of the pipe left, which is not an error to report.
        OnlapError: the patch cannot be made, or the stream not be written to.
    """
    if stream is None:
        return
    out = _Lines(stream) if is_terminal(stream) else _Stream(stream)
    with written("write the patch"):
        try:
            write(cast(BinaryIO, out))
            out.close()
        except errors.OnlapError:
            if out.error is not None:  # else it is not about the stream
                raise out.error from None
            raise


class _Stream(io.RawIOBase):
    """Passes on what is written to it.

    Attributes:
        error: why something could not be written.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        given = bytes(cast(bytes, data))
        try:
            self._pass_on(given)
        except OSError as error:
            self.error = error
            raise
        return len(given)

    def close(self) -> None:
        if not self.closed and self.error is None:
            self._stream.flush()
        super().close()

    def _pass_on(self, given: bytes) -> None:
        cast(io.TextIOWrapper, self._stream).buffer.write(given)


class _Lines(_Stream):
    """Shows what is written to it line by line."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self._colours = not os.environ.get("NO_COLOR")
        self._rest = b""

    def close(self) -> None:
        if not self.closed and self._rest:
            self._show(self._rest)
        super().close()

    def _pass_on(self, given: bytes) -> None:
        *lines, self._rest = (self._rest + given).split(b"\n")
        for line in lines:
            self._show(line)

    def _show(self, line: bytes) -> None:
        text = "\t".join(safe(part) for part in os.fsdecode(line).split("\t"))
        colour = _COLOURS.get(line[:1]) if self._colours else None
        self._stream.write(f"\x1b[{colour}m{text}\x1b[0m\n" if colour else f"{text}\n")

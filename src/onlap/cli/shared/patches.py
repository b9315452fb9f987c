"""Unified diffs on a stream: as they are, or on a terminal in colour and without what it would act on."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import IO, BinaryIO, cast

from onlap.cli.terminal.output import is_terminal
from onlap.cli.terminal.text import safe

# SGR numbers, by how a line begins.
_COLOURS = {b"+": "32", b"-": "31", b"@": "36"}


def write_patch(stream: IO[str] | None, write: Callable[[BinaryIO], None]) -> None:
    """Let a function write a patch to a stream.

    Args:
        stream: standard output or standard error; None if that is closed.
        write: gets a binary file.
    """
    if stream is None:
        return
    if not is_terminal(stream):
        write(cast(BinaryIO, stream.buffer))  # type: ignore[attr-defined]
        stream.flush()
        return
    lines = _Lines(stream, colours=not os.environ.get("NO_COLOR"))
    write(cast(BinaryIO, lines))
    lines.close()


class _Lines(io.RawIOBase):
    """Shows what is written to it line by line."""

    def __init__(self, stream: IO[str], *, colours: bool) -> None:
        self._stream = stream
        self._colours = colours
        self._rest = b""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        given = bytes(cast(bytes, data))
        *lines, self._rest = (self._rest + given).split(b"\n")
        for line in lines:
            self._show(line)
        return len(given)

    def close(self) -> None:
        if not self.closed and self._rest:
            self._show(self._rest)
        super().close()
        self._stream.flush()

    def _show(self, line: bytes) -> None:
        text = "\t".join(safe(part) for part in os.fsdecode(line).split("\t"))
        colour = _COLOURS.get(line[:1]) if self._colours else None
        self._stream.write(f"\x1b[{colour}m{text}\x1b[0m\n" if colour else f"{text}\n")

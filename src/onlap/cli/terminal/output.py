"""Where the command's words go: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

from onlap import errors
from onlap.cli.terminal.text import safe, skipped_text

# SGR numbers of ECMA-48; no others are used.
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


class Output:
    """What a verb says.

    Args:
        json: print JSON Lines.
        quiet: leave out warnings, notes and progress.
        verbose: how often ``-v`` was given; notes are printed from 1 on.
    """

    __slots__ = ("_styled", "json", "quiet", "verbose")

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: int = 0) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self._styled = not json and is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")

    # Results

    def line(self, text: str = "") -> None:
        """A line for people; names in it have been through :func:`onlap.errors.shown`."""
        self._write(text + "\n")

    def item(self, thing: Mapping[str, object]) -> None:
        """One thing, as a line of JSON."""
        self._write(dumped(thing) + "\n")

    def say(self, thing: Mapping[str, object], *lines: str) -> None:
        """One thing: as a line of JSON, or for people in lines, of which there may be none."""
        if self.json:
            self.item(thing)
        else:
            for line in lines:
                self.line(line)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> None:
        """Aligned columns; those numbered in ``right`` are flush right."""
        texts = [tuple(header), *map(tuple, rows)]
        numbers = frozenset(right)
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        for index, row in enumerate(texts):
            cells = [
                cell.rjust(width) if number in numbers else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            line = "  ".join(cells).rstrip()
            self.line(self.paint(line, "bold") if index == 0 else line)

    def paint(self, text: str, style: str) -> str:
        """``text`` in a style, where stdout is a terminal that wants it."""
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self._styled else text

    def _write(self, text: str) -> None:
        if sys.stdout is None:
            return  # closed before the start: nobody reads
        try:
            sys.stdout.write(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise errors.from_oserror(error, doing="write the results") from error

    def flush(self) -> None:
        """Give everything to the reader; an error of writing comes out here at the latest."""
        if sys.stdout is None:
            return
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise errors.from_oserror(error, doing="write the results") from error

    # All else

    def note(self, text: str) -> None:
        """What only the curious want to know."""
        if self.verbose and not self.quiet:
            self._tell(text, {"note": {"message": text}})

    def warn(self, text: str) -> None:
        """What the user should know, though it went well."""
        if not self.quiet:
            self._tell(f"warning: {text}", {"warning": {"message": text}})

    def not_kept(self, skipped: Mapping[str, int]) -> None:
        """Warn of files that could not be taken along, if there are any."""
        if skipped:
            self.warn(f"not kept: {skipped_text(skipped)}")

    def error(self, kind: str, message: str, key: str | None = None, hint: str | None = None) -> None:
        """What went wrong, in one line."""
        thing = {"error": {"kind": kind, "key": key, "message": message, "hint": hint}}
        self._tell(f"{message}; {hint}" if hint else message, thing)

    def onlap_error(self, error: errors.OnlapError) -> None:
        """The same, of an error of the library."""
        self.error(error.kind, error.message, error.key, error.hint)

    def _tell(self, text: str, thing: Mapping[str, object]) -> None:
        complain(dumped(thing) if self.json else f"onlap: {safe(text)}")


def complain(line: str) -> None:
    """A line on stderr; where that is closed there is nobody to tell."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        pass


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether somebody looks at it who can see colours and moving lines."""
    # None where the descriptor was closed before the start (sys.stdout's documentation).
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def can_draw() -> bool:
    """Whether stdout takes the characters that lines are drawn with."""
    encoding: str = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        "├─└│".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def dumped(thing: object) -> str:
    """JSON in one line, ASCII only, so that no name can mean anything to a terminal."""
    return json.dumps(_plain(thing), separators=(",", ":"))


def _plain(value: object) -> object:
    """The value as types of JSON: bytes, and names that are not UTF-8, become ``{"bytes": base64}``."""
    if isinstance(value, str):
        return value if _is_utf8(value) else _bytes(os.fsencode(value))
    if isinstance(value, bytes):
        return _bytes(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes(data: bytes) -> dict[str, str]:
    from base64 import b64encode

    return {"bytes": b64encode(data).decode()}

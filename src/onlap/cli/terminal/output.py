"""The command's output: results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, TypeVar

from onlap import errors
from onlap.cli.terminal.text import safe, skipped_text
from onlap.errors import shown

T = TypeVar("T")

# SGR numbers of ECMA-48; no others are used.
_STYLES = {"bold": "1", "red": "31", "green": "32", "yellow": "33"}


class Output:
    """The output of a verb.

    Args:
        json: print JSON Lines.
        quiet: leave out warnings, notes and progress.
        verbose: how often ``-v`` was given; notes are printed if at all.
    """

    __slots__ = ("_styled", "json", "quiet", "verbose")

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: int = 0) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self._styled = not json and is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")

    # Results

    def line(self, text: str = "") -> None:
        """Print a line for people; names in it must have passed :func:`onlap.errors.shown`."""
        self._write(text + "\n")

    def item(self, thing: Mapping[str, object]) -> None:
        """Print one thing as a line of JSON."""
        self._write(dumped(thing) + "\n")

    def show(self, thing: Mapping[str, object], *lines: str) -> None:
        """Print one thing: as a line of JSON, or for people as any number of lines."""
        if self.json:
            self.item(thing)
        else:
            for line in lines:
                self.line(line)

    def listing(
        self,
        things: Iterable[T],
        as_json: Callable[[T], Mapping[str, object]],
        name: Callable[[T], str],
        header: Sequence[str],
        row: Callable[[T], Sequence[str]],
        *,
        right: Iterable[int] = (),
    ) -> None:
        """List things: as lines of JSON, with ``-q`` their names only, or as a table."""
        if self.json:
            for thing in things:
                self.item(as_json(thing))
        elif self.quiet:
            for thing in things:
                self.line(shown(name(thing)))
        else:
            self.table(header, map(row, things), right=right)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> None:
        """Print aligned columns; those whose numbers are in ``right`` are right-aligned."""
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
        """``text`` in a style, if stdout is a terminal that shows styles."""
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self._styled else text

    def _write(self, text: str) -> None:
        if sys.stdout is not None:  # else it was closed before the start, and nobody reads
            with written("write the results"):
                sys.stdout.write(text)

    def flush(self) -> None:
        """Write everything that is buffered; a write error is raised here at the latest."""
        if sys.stdout is not None:
            with written("write the results"):
                sys.stdout.flush()

    # Messages

    def note(self, text: str) -> None:
        """Print what is shown with ``-v`` only."""
        if self.verbose and not self.quiet:
            self._tell(text, {"note": {"message": text}})

    def report(self, thing: Mapping[str, object], *lines: str) -> None:
        """Print what was done on stderr, where stdout belongs to the user's command."""
        if not self.quiet:
            complain(dumped(thing) if self.json else "\n".join((f"onlap: {lines[0]}", *lines[1:])))

    def warn(self, text: str) -> None:
        """Print what the user should know although the verb succeeds."""
        if not self.quiet:
            self._tell(f"warning: {text}", {"warning": {"message": text}})

    def not_kept(self, skipped: Mapping[str, int]) -> None:
        """Warn of files that could not be kept, if there are any."""
        if skipped:
            self.warn(f"not kept: {skipped_text(skipped)}")

    def error(self, kind: str, message: str, key: str | None = None, hint: str | None = None) -> None:
        """Print what failed, in one line."""
        thing = {"error": {"kind": kind, "key": key, "message": message, "hint": hint}}
        self._tell(f"{message}; {hint}" if hint else message, thing)

    def onlap_error(self, error: errors.OnlapError) -> None:
        """Print an error of the library."""
        self.error(error.kind, error.message, error.key, error.hint)

    def _tell(self, text: str, thing: Mapping[str, object]) -> None:
        complain(dumped(thing) if self.json else f"onlap: {safe(text)}")


@contextlib.contextmanager
def written(doing: str) -> Iterator[None]:
    """A block that writes to stdout: its OSErrors become ours, except that of a pipe whose reader left."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.from_oserror(error, doing=doing) from error


def complain(line: str) -> None:
    """Print a line on stderr, if that is open."""
    if sys.stderr is None:  # print() would take standard output
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        pass


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal that can show colours and redraw a line."""
    # None if the descriptor was closed before the start (documentation of sys.stdout).
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def can_draw() -> bool:
    """Whether the encoding of stdout has box-drawing characters."""
    encoding: str = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        "├─└│".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def dumped(thing: object) -> str:
    """JSON in one line, in ASCII only, so that a terminal acts on no name."""
    import json

    return json.dumps(_plain(thing), separators=(",", ":"))


def _plain(value: object) -> object:
    """The value in JSON's types: bytes, and names that are not UTF-8, become ``{"bytes": base64}``."""
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

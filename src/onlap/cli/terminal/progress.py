"""How far a long operation is, for somebody who looks at a terminal; nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from onlap.cli.terminal.output import Output, is_terminal

if TYPE_CHECKING:
    from onlap.progress import Callback, Progress

_ERASE_LINE = "\r\x1b[K"  # ECMA-48, EL

# What Copied.skipped counts, for people.
_SKIPPED = {
    "socket": ("socket", "sockets"),
    "device": ("device", "devices"),
    "owner": ("owner (recorded in an xattr)", "owners (recorded in xattrs)"),
    "xattr": ("xattr", "xattrs"),
    "mountpoint": ("mount point (an empty directory now)", "mount points (empty directories now)"),
}


@contextlib.contextmanager
def progress(out: Output) -> Iterator[Callback | None]:
    """A callback that draws on stderr, or None where nobody would see it."""
    if out.quiet or out.json or not is_terminal(sys.stderr):
        yield None
        return
    try:
        from rich.console import Console
    except ImportError:
        yield _draw
        sys.stderr.write(_ERASE_LINE)
        sys.stderr.flush()
        return
    with Console(stderr=True).status("") as status:
        # A style of its own line, without markup: nothing in a name may mean anything.
        yield lambda report: status.update(_text(report))


def _draw(report: Progress) -> None:
    sys.stderr.write(_ERASE_LINE + _text(report))
    sys.stderr.flush()


def _text(report: Progress) -> str:
    total = f" of {report.total:,}" if report.total is not None else ""
    return f"{report.stage}: {report.done:,}{total} {report.unit}"


def skipped_text(skipped: Mapping[str, int]) -> str:
    """What could not be kept, as ``2 sockets, 1 device``."""
    return ", ".join(f"{number:,} {_SKIPPED.get(kind, (kind, kind))[number != 1]}" for kind, number in skipped.items())

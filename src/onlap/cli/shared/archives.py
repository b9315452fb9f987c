"""Archives that a verb writes: their options, and what is said of them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, TypedDict

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.terminal.text import amount
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.layers.apply.archive import Applied
    from onlap.layers.diff.write import Written
    from onlap.layers.stream.compression import Compression

STANDARD_OUTPUT = "-"
# A tar has 33 bits for a time (11 octal digits), and PAX as many digits as one likes; this is 30 million years.
_MAX_DIGITS = 15


class Options(TypedDict):
    """What an archive's writer takes from the command line."""

    compression: Compression | None
    level: int | None
    epoch: int | None
    sparse: bool


def archive_arguments(parser: Parser) -> None:
    """The options of an archive."""
    parser.add_argument(
        "--compress", choices=("none", "gzip", "zstd"), help="of the archive (what its name ends in, else none)"
    )
    parser.add_argument("--level", metavar="N", type=int, help="of the compression")
    parser.add_argument("--sparse", action="store_true", help="leave holes out: for onlap and tar, not for images")


def archive_options(args: argparse.Namespace) -> Options:
    """What :func:`archive_arguments` took, and SOURCE_DATE_EPOCH."""
    return Options(compression=args.compress, level=args.level, epoch=source_date_epoch(), sparse=args.sparse)


def say_archive(call: Call, path: str, done: Written) -> None:
    """Say what an archive is that was written to a file."""
    if path != STANDARD_OUTPUT:
        said = f"{shown(path)}: {amount(done.entries, done.size)}"
        call.out.say({"file": os.path.abspath(path), **done._asdict()}, said, *digests_of(done))


def digests_of(done: Applied | Written) -> tuple[str, str]:
    """An archive's digests, in two lines."""
    return f"digest   {done.digest}", f"diff ID  {done.diff_id}"


def source_date_epoch() -> int | None:
    """SOURCE_DATE_EPOCH (reproducible-builds.org/specs/source-date-epoch): seconds; no time of what is made is later.

    Raises:
        InvalidArgument: it is not a number.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return None
    # Python counts other digits as such, and makes no number of more than 4,300.
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise errors.InvalidArgument(f"SOURCE_DATE_EPOCH is {shown(text)}", hint="it is a number of seconds")
    return int(text)


@contextlib.contextmanager
def target(path: str) -> Iterator[str | BinaryIO]:
    """Where something is written: a path, or standard output, which is called ``-``.

    Raises:
        BrokenPipeError: whoever reads it has seen enough, which is not a failure to report.
        OnlapError: standard output is closed, or takes no more.
    """
    try:
        if path != STANDARD_OUTPUT:
            yield path
        elif sys.stdout is None:
            raise errors.FailedPrecondition("standard output is closed", hint="give the path of a file")
        else:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.from_oserror(error, doing="write the archive") from error
    except errors.OnlapError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            raise error.__cause__ from None
        raise

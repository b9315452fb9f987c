"""What the verbs that write archives share, those of snapshots and those of images."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO

from onlap import errors
from onlap.cli.terminal.output import written
from onlap.errors import shown

STANDARD_OUTPUT = "-"
# A tar has 33 bits for a time (11 octal digits), and PAX any number of digits; this is 30 million years.
_MAX_DIGITS = 15


def source_date_epoch() -> int | None:
    """SOURCE_DATE_EPOCH (reproducible-builds.org/specs/source-date-epoch): seconds, the latest time in what is made.

    Raises:
        InvalidArgument: it is not a number.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return None
    # Python accepts other digits too, and converts no number of more than 4,300.
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise errors.InvalidArgument(f"SOURCE_DATE_EPOCH is {shown(text)}", hint="it must be a number of seconds")
    return int(text)


@contextlib.contextmanager
def destination(path: str) -> Iterator[str | BinaryIO]:
    """Where an archive is written: a path, or standard output for ``-``.

    Raises:
        BrokenPipeError: the reader of the pipe left, which is not an error to report.
        OnlapError: standard output is closed, or cannot be written to.
    """
    try:
        with written("write the archive"):
            if path != STANDARD_OUTPUT:
                yield path
            elif sys.stdout is None:
                raise errors.FailedPrecondition("standard output is closed", hint="give the path of a file")
            else:
                yield sys.stdout.buffer
                sys.stdout.buffer.flush()
    except errors.OnlapError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            raise error.__cause__ from None
        raise

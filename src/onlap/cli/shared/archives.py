"""Archives that a verb writes: their options, and what is said of them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, TypedDict, cast

from onlap import errors
from onlap.catalog.runs import writing
from onlap.cli.call import Call
from onlap.cli.parser import Parser, UsageError
from onlap.cli.terminal.progress import progress
from onlap.cli.terminal.text import amount
from onlap.errors import shown
from onlap.trees import whole

if TYPE_CHECKING:
    from onlap.layers.apply.archive import Applied
    from onlap.layers.diff.write import Written
    from onlap.progress import Callback
    from onlap.store import Store

STANDARD_OUTPUT = "-"
# A tar has 33 bits for a time (11 octal digits), and PAX as many digits as one likes; this is 30 million years.
_MAX_DIGITS = 15


class Options(TypedDict):
    """What an archive's writer takes from the command line."""

    compression: str
    level: int | None
    epoch: int | None
    sparse: bool
    progress: Callback | None


def archive_arguments(parser: Parser, option: str | None, help: str = "") -> None:
    """The options of an archive; ``option`` names its file, where that is an option."""
    if option is not None:
        parser.add_argument(option, metavar="FILE", help=help)
    parser.add_argument("--compress", choices=("none", "gzip", "zstd"), help="of the archive (none)")
    parser.add_argument("--level", metavar="N", type=int, help="of the compression")
    parser.add_argument("--sparse", action="store_true", help="leave holes out: for onlap and tar, not for images")


def check_no_archive(call: Call, needs: str, *options: str) -> None:
    """Raise UsageError where an option was given that says how an archive is written, and none is."""
    args = call.args
    for option in ("--compress", "--level", "--sparse", *options):
        value = getattr(args, option.lstrip("-"))
        if value is not None and value is not False:
            raise UsageError(f"{option} is for an archive: {needs}")


def write(call: Call, path: str, action: Callable[[Store, BinaryIO, Options], Written]) -> None:
    """Write an archive to a file, or to standard output, and say what it is.

    A file appears under its name only when it is whole. What is there and is no file (a device,
    a pipe) is written to.
    """
    args, out = call.args, call.out
    compression = args.compress or "none"
    if args.level is not None and compression == "none":
        raise UsageError("--level is that of a compression: give --compress")
    with call.store() as store, progress(out) as report, _opened(store, path) as file:
        options = Options(
            compression=compression,
            level=args.level,
            epoch=source_date_epoch(),
            sparse=args.sparse,
            progress=report,
        )
        try:
            done = action(store, file, options)
        except errors.OnlapError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # whoever reads it has seen enough: no failure to report
            raise
    out.not_kept(done.skipped)
    if path == STANDARD_OUTPUT:
        return
    said = f"{shown(path)}: {amount(done.entries, done.size)}"
    out.say({"file": os.path.abspath(path), **done._asdict()}, said, *digests_of(done))


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
def standard_output() -> Iterator[BinaryIO]:
    """Standard output, for an archive.

    Raises:
        BrokenPipeError: whoever reads it has seen enough, which is no failure to report.
        OnlapError: it is closed, or takes no more.
    """
    if sys.stdout is None:
        raise errors.FailedPrecondition("standard output is closed", hint="give the path of a file")
    try:
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


@contextlib.contextmanager
def _opened(store: Store, path: str) -> Iterator[BinaryIO]:
    if path == STANDARD_OUTPUT:
        with standard_output() as out:
            yield out
        return
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb", buffering=0) as device:
                yield cast("BinaryIO", device)
        else:
            # Through a symlink, as a shell's ">" goes.
            with writing(store.snapshotter.catalog) as note, whole.new_file(os.path.realpath(path), note) as file:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.from_oserror(error, doing="write the archive", key=path) from error

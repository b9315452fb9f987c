"""``onlap image import``."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.archives import source_date_epoch
from onlap.cli.shared.images import images_of, platform_argument, show_image
from onlap.cli.terminal.progress import progress

if TYPE_CHECKING:
    from onlap.store import Store

_STANDARD_INPUT = "-"


def arguments(parser: Parser) -> None:
    parser.explain(
        "Take images in from SOURCE: an OCI image layout (a directory or an archive), an archive of docker save, or a\n"
        "plain root filesystem (an archive or a directory), which becomes an image of one layer. Their layers are\n"
        "unpacked into snapshots. The root is made where there is none.",
        "docker save app:1 | onlap image import -",
        "onlap image import ./rootfs --name localhost/base",
    )
    parser.add_argument("source", metavar="SOURCE", help="an archive or a directory, or - for standard input")
    parser.add_argument("--name", metavar="N", help="what to call the one image; by default as it is called there")
    platform_argument(parser)


def run(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(create=True, sweep=True) as store:
        images = images_of(store)
        with progress(out) as report, _to_seek_in(store, args.source) as source:
            found = images.import_(
                source, name=args.name, platform=args.platform, epoch=source_date_epoch(), progress=report
            )
    for image in found:
        show_image(out, image)


@contextlib.contextmanager
def _to_seek_in(store: Store, source: str) -> Iterator[str]:
    """The path of the archive; what comes through a pipe is kept in a file until the end of the block."""
    staging = store.snapshotter.catalog.staging
    try:
        if source != _STANDARD_INPUT and not (os.path.exists(source) and stat.S_ISFIFO(os.stat(source).st_mode)):
            yield source
            return
        if source == _STANDARD_INPUT and sys.stdin is None:
            raise errors.FailedPrecondition("standard input is closed", hint="give the path of an archive")
        directory = staging.new()
        try:
            # Whose name cannot be an image's: where the archive does not say one, the user has to.
            path = os.path.join(directory, _STANDARD_INPUT)
            with contextlib.ExitStack() as stack:
                pipe = sys.stdin.buffer if source == _STANDARD_INPUT else stack.enter_context(open(source, "rb"))
                shutil.copyfileobj(pipe, stack.enter_context(open(path, "xb")))
            yield path
        finally:
            staging.discard(directory)
    except OSError as error:
        raise errors.from_oserror(error, doing="read the archive", key=source) from error

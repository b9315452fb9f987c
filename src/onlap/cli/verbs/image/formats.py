"""``onlap image import`` and ``onlap image export``."""

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
from onlap.cli.shared.archives import STANDARD_OUTPUT, destination, source_date_epoch
from onlap.cli.shared.images import images_of, platform_argument, show_image
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.store import Store

_STANDARD_INPUT = "-"


def import_arguments(parser: Parser) -> None:
    parser.explain(
        "Import images from SOURCE: an OCI image layout (a directory or an archive), an archive of docker save, or a\n"
        "plain root filesystem (an archive or a directory), which becomes an image of one layer. Their layers are\n"
        "unpacked into snapshots. The root is made if it does not exist.",
        "docker save app:1 | onlap image import -",
        "onlap image import ./rootfs --name localhost/base",
    )
    parser.add_argument("source", metavar="SOURCE", help="an archive or a directory, or - for standard input")
    parser.add_argument("--name", metavar="N", help="the name of a single image; by default the one in SOURCE")
    platform_argument(parser)


def import_(call: Call) -> None:
    args = call.args
    with call.store(create=True, sweep=True) as store:
        images = images_of(store)
        with call.progress() as report, _seekable(store, args.source) as source:
            found = images.import_(
                source, name=args.name, platform=args.platform, epoch=source_date_epoch(), progress=report
            )
    for image in found:
        show_image(call.out, image)


@contextlib.contextmanager
def _seekable(store: Store, source: str) -> Iterator[str]:
    """The path of the archive; the content of a pipe is kept in a file until the end of the block."""
    staging = store.snapshotter.catalog.staging
    with errors.translated("read the archive", key=source):
        if source != _STANDARD_INPUT and not (os.path.exists(source) and stat.S_ISFIFO(os.stat(source).st_mode)):
            yield source
            return
        if source == _STANDARD_INPUT and sys.stdin is None:
            raise errors.FailedPrecondition("standard input is closed", hint="give the path of an archive")
        directory = staging.new()
        try:
            # A name that no image can have: if the archive names none, the user has to.
            path = os.path.join(directory, _STANDARD_INPUT)
            with contextlib.ExitStack() as stack:
                pipe = sys.stdin.buffer if source == _STANDARD_INPUT else stack.enter_context(open(source, "rb"))
                shutil.copyfileobj(pipe, stack.enter_context(open(path, "xb")))
            yield path
        finally:
            staging.discard(directory)


def export_arguments(parser: Parser) -> None:
    parser.explain(
        "Export images to an archive, on standard output for -; or, as an OCI image layout, to the directory OUT, if\n"
        "that is an empty directory or ends in a slash. The format docker is for docker load, podman load and skopeo.\n"
        "OUT appears when it is complete.",
        "onlap image export app:1 app.tar --format docker && docker load -i app.tar",
        "onlap image export app:1 - --format docker | docker load",
        "onlap image export app:1 ./layout/",
    )
    parser.image("names", nargs="+", help="the images")
    parser.add_argument("target", metavar="OUT", help="a new archive, a directory, or -")
    parser.add_argument("--format", choices=("oci", "docker"), default="oci", help="of the archive (oci)")


def export(call: Call) -> None:
    args, out = call.args, call.out
    with call.store() as store:
        images = images_of(store)
        with call.progress() as report, destination(args.target) as target:
            images.export(args.names, target, format=args.format, progress=report)
    if args.target == STANDARD_OUTPUT:
        return
    if out.json:
        out.item({"names": args.names, "target": os.path.abspath(args.target), "format": args.format})
    else:
        out.note(f"wrote {shown(args.target)}")

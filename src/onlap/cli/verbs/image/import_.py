"""``onlap image import``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.archives import source_date_epoch
from onlap.cli.shared.images import images_of, platform_argument, show_image
from onlap.cli.terminal.progress import progress


def arguments(parser: Parser) -> None:
    parser.explain(
        "Take images in from SOURCE: an OCI image layout (a directory or an archive), an archive of docker save, or a\n"
        "plain root filesystem (an archive or a directory), which becomes an image of one layer. Their layers are\n"
        "unpacked into snapshots. The root is made where there is none.",
        "docker save app:1 > app.tar && onlap image import app.tar",
        "onlap image import ./rootfs --name localhost/base",
    )
    parser.add_argument("source", metavar="SOURCE", help="an archive or a directory")
    parser.add_argument("--name", metavar="N", help="what to call the one image; by default as it is called there")
    platform_argument(parser)


def run(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(create=True, sweep=True) as store:
        images = images_of(store)
        with progress(out) as report:
            found = images.import_(
                args.source, name=args.name, platform=args.platform, epoch=source_date_epoch(), progress=report
            )
    for image in found:
        show_image(out, image)

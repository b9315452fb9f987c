"""``onlap image export``."""

from __future__ import annotations

import os

from onlap.cli.bars import bars
from onlap.cli.call import Call
from onlap.cli.images import images_of
from onlap.cli.parser import Parser
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Write images into an archive; or, as an OCI image layout, into OUT when that is an empty directory, or ends\n"
        "in a slash. The format docker can be read by docker load, podman load and skopeo.",
        "onlap image export app:1 app.tar --format docker && docker load -i app.tar",
        "onlap image export app:1 ./layout/",
    )
    parser.add_argument("names", metavar="IMAGE", nargs="+", help="the images")
    parser.add_argument("target", metavar="OUT", help="a new archive, or a directory")
    parser.add_argument("--format", choices=("oci", "docker"), default="oci", help="of the archive (oci)")


def run(call: Call) -> None:
    args, out = call.args, call.out
    with call.store() as store:
        images = images_of(store)
        with bars(out) as report:
            images.export(args.names, args.target, format=args.format, progress=report)
    if out.json:
        out.item({"names": args.names, "target": os.path.abspath(args.target), "format": args.format})
    else:
        out.note(f"wrote {shown(args.target)}")

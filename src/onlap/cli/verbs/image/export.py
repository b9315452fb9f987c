"""``onlap image export``."""

from __future__ import annotations

import os

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.archives import STANDARD_OUTPUT, target
from onlap.cli.shared.images import images_of
from onlap.cli.terminal.progress import progress
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Write images into an archive, on standard output for -; or, as an OCI image layout, into OUT when\n"
        "that is an empty directory, or ends in a slash. The format docker is for docker load, podman load and\n"
        "skopeo. OUT appears when it is whole.",
        "onlap image export app:1 app.tar --format docker && docker load -i app.tar",
        "onlap image export app:1 - --format docker | docker load",
        "onlap image export app:1 ./layout/",
    )
    parser.add_argument("names", metavar="IMAGE", nargs="+", help="the images")
    parser.add_argument("target", metavar="OUT", help="a new archive, a directory, or -")
    parser.add_argument("--format", choices=("oci", "docker"), default="oci", help="of the archive (oci)")


def run(call: Call) -> None:
    args, out = call.args, call.out
    with call.store() as store:
        images = images_of(store)
        with progress(out) as report, target(args.target) as to:
            images.export(args.names, to, format=args.format, progress=report)
    if args.target == STANDARD_OUTPUT:
        return
    if out.json:
        out.item({"names": args.names, "target": os.path.abspath(args.target), "format": args.format})
    else:
        out.note(f"wrote {shown(args.target)}")

"""``onlap image digest``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.each import each
from onlap.cli.shared.images import images_of


def arguments(parser: Parser) -> None:
    parser.explain(
        "Print the digest of each image's manifest: what a registry knows the image by, and what a reference names\n"
        "behind @. A failure is said, and the next one is tried.",
        "onlap image digest debian:13",
    )
    parser.add_argument("names", metavar="IMAGE", nargs="+", help="the images, by name or the beginning of a digest")


def run(call: Call) -> int:
    with call.store() as store:
        images = images_of(store)

        def show(name: str) -> None:
            image = images.get(name)
            call.out.say({"name": image.name, "digest": image.digest}, image.digest)

        return each(call, call.args.names, show)

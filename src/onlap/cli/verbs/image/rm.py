"""``onlap image rm``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.each import each
from onlap.cli.shared.images import images_of


def arguments(parser: Parser) -> None:
    parser.explain(
        "Remove images, and the snapshots of their layers that neither another image nor another snapshot needs. The\n"
        "blobs are deleted by onlap cleanup. A failure is said, and the next one is tried.",
        "onlap image rm app:1 app:2",
    )
    parser.add_argument("names", metavar="IMAGE", nargs="+", help="the images")


def run(call: Call) -> int:
    with call.store(sweep=True) as store:
        images = images_of(store)

        def remove(name: str) -> None:
            images.remove(name)
            call.out.say({"removed": name})

        return each(call, call.args.names, remove)

"""``onlap image push``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.images import access, images_of, registry_arguments
from onlap.cli.terminal.progress import progress
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "Send an image to a registry: to where its name says, or to TARGET. What is there already is not sent again.",
        "onlap image push registry.example/team/app:1",
        "onlap image push app:1 localhost:5000/team/app:1",
    )
    parser.add_argument("name", metavar="IMAGE", help="the image")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="what to call it there, registry and all")
    registry_arguments(parser)


def run(call: Call) -> None:
    args, out = call.args, call.out
    with call.store() as store:
        images = images_of(store)
        name = images.get(args.name).name
        with progress(out) as report:
            digest = images.push(name, args.target, access=access(call), progress=report)
    target = args.target or name
    out.say({"name": name, "target": target, "digest": digest}, f"{shown(target)} {digest}")

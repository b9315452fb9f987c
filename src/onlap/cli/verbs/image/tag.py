"""``onlap image tag``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.images import image_as_json, images_of


def arguments(parser: Parser) -> None:
    parser.explain(
        "Give an image another name besides. What was called NEW before loses that name.",
        "onlap image tag app:1 registry.example/team/app:1",
    )
    parser.add_argument("name", metavar="IMAGE", help="the image")
    parser.add_argument("new", metavar="NEW", help="its other name")


def run(call: Call) -> None:
    with call.store() as store:
        image = images_of(store).tag(call.args.name, call.args.new)
    call.out.say(image_as_json(image))

"""``onlap image ls``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.images import image_as_json, images_of, platform_of, short
from onlap.cli.terminal.text import size
from onlap.errors import shown


def arguments(parser: Parser) -> None:
    parser.explain(
        "List the images by name. DIGEST is the beginning of that of the manifest, SIZE that of the layers as they\n"
        "are transferred. With -q: names only.",
        "onlap image ls",
        "onlap image ls --json | jq -r .digest",
    )


def run(call: Call) -> None:
    out = call.out
    with call.store() as store:
        found = images_of(store).list()
    if out.json:
        for image in found:
            out.item(image_as_json(image))
    elif out.quiet:
        for image in found:
            out.line(shown(image.name))
    else:
        rows = [
            (
                shown(image.name),
                short(image.digest),
                platform_of(image),
                str(len(image.layers)),
                size(image.size),
                shown((image.created or "-")[:10]),
            )
            for image in found
        ]
        out.table(("NAME", "DIGEST", "PLATFORM", "LAYERS", "SIZE", "CREATED"), rows, right=(3, 4))

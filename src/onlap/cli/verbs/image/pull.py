"""``onlap image pull``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.images import access, images_of, platform_argument, registry_arguments, show_image
from onlap.cli.terminal.progress import progress


def arguments(parser: Parser) -> None:
    parser.explain(
        "Fetch an image from a registry, and unpack its layers into snapshots meanwhile. Layers that are there are\n"
        "neither fetched nor unpacked again, and a pull that was interrupted goes on where it stopped. Who logged in\n"
        "with docker login or podman login is known here too. The root is made where there is none.",
        "onlap image pull debian:13",
        "onlap image pull localhost:5000/team/app@sha256:...",
    )
    parser.add_argument("reference", metavar="IMAGE", help="as debian:13, or registry.example/team/app:1")
    platform_argument(parser)
    registry_arguments(parser)


def run(call: Call) -> None:
    args, out = call.args, call.out
    with call.store(create=True, sweep=True) as store:
        images = images_of(store)
        with progress(out) as report:
            image = images.pull(
                args.reference,
                platform=args.platform,
                access=access(call),
                progress=report,
            )
    show_image(out, image)

"""``onlap image pull`` and ``onlap image push``."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.images import images_of, platform_argument, registry_access, registry_arguments, show_image
from onlap.errors import shown


def pull_arguments(parser: Parser) -> None:
    parser.explain(
        "Pull an image from a registry, and unpack its layers into snapshots meanwhile. Layers that exist are neither\n"
        "pulled nor unpacked again, and an interrupted pull is resumed. The credentials of docker login and podman\n"
        "login are used. The root is made if it does not exist.",
        "onlap image pull debian:13",
        "onlap image pull localhost:5000/team/app@sha256:...",
    )
    parser.image("reference", help="as debian:13, or registry.example/team/app:1")
    platform_argument(parser)
    registry_arguments(parser)


def pull(call: Call) -> None:
    args = call.args
    with call.store(create=True, sweep=True) as store, call.progress() as report:
        image = images_of(store).pull(
            args.reference, platform=args.platform, access=registry_access(call), progress=report
        )
    show_image(call.out, image)


def push_arguments(parser: Parser) -> None:
    parser.explain(
        "Push an image to the registry in its name, or to TARGET. What the registry has is not pushed again.",
        "onlap image push registry.example/team/app:1",
        "onlap image push app:1 localhost:5000/team/app:1",
    )
    parser.image("name", help="the image")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="its name there, including the registry")
    registry_arguments(parser)


def push(call: Call) -> None:
    args = call.args
    with call.store() as store, call.progress() as report:
        images = images_of(store)
        name = images.get(args.name).name
        digest = images.push(name, args.target, access=registry_access(call), progress=report)
    target = args.target or name
    call.out.show({"name": name, "target": target, "digest": digest}, f"{shown(target)} {digest}")

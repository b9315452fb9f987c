"""The verbs for the images of a root: ls, inspect, digest, tag and rm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.images import image_as_json, images_of, platform_of, short
from onlap.cli.terminal.text import NOTHING, count, for_shell, size
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.images import Image
    from onlap.images.spec.model import Execution


def ls_arguments(parser: Parser) -> None:
    parser.explain(
        "List the images by name. DIGEST is the beginning of the manifest's digest, SIZE that of the layers as they\n"
        "are transferred. With -q: names only.",
        "onlap image ls",
        "onlap image ls --json | jq -r .digest",
    )


def ls(call: Call) -> None:
    with call.store() as store:
        found = images_of(store).list()
    call.out.listing(
        found,
        image_as_json,
        lambda image: image.name,
        ("NAME", "DIGEST", "PLATFORM", "LAYERS", "SIZE", "CREATED"),
        lambda image: (
            shown(image.name),
            short(image.digest),
            platform_of(image),
            str(len(image.layers)),
            size(image.size),
            shown((image.created or NOTHING)[:10]),
        ),
        right=(3, 4),
    )


def inspect_arguments(parser: Parser) -> None:
    parser.explain(
        "Show everything about images: digests, platform, layers, and what a container of each does. With --json also\n"
        "the manifest and the configuration, in full. After a failure the next one is tried.",
        "onlap image inspect debian:13",
        "onlap image inspect debian:13 --json | jq .config.config.Env",
    )
    parser.image("names", nargs="+", help="the images, by name or the beginning of a digest")


def inspect(call: Call) -> int:
    from onlap.images.spec import model

    out = call.out
    with call.store() as store:
        images = images_of(store)

        def show(name: str) -> None:
            image = images.get(name)
            unpacked = not image.chain_ids or image.chain_ids[-1] in store
            if out.json:
                manifest = model.decode(images.manifest_data(image), dict[str, Any], image.digest)
                config = model.decode(images.config_data(image), dict[str, Any], image.config_digest)
                out.item({**image_as_json(image), "unpacked": unpacked, "manifest": manifest, "config": config})
                return
            if name != call.args.names[0]:
                out.line()
            for word, text in _lines(image, images.config(image).execution, unpacked):
                out.line(f"{word:<12} {text}".rstrip())

        return call.each(call.args.names, show)


def _lines(image: Image, execution: Execution, unpacked: bool) -> Iterator[tuple[str, str]]:
    yield "name", shown(image.name)
    yield "digest", image.digest
    yield "media type", shown(image.media_type)
    yield "config", image.config_digest
    yield "platform", platform_of(image)
    yield "created", shown(image.created or NOTHING)
    where = "unpacked" if unpacked else "not unpacked"
    yield "size", f"{size(image.size)} in {count(len(image.layers), 'layer')}, {where}"
    single = {"user": execution.user, "directory": execution.working_dir, "stop signal": execution.stop_signal}
    for word, text in single.items():
        if text:
            yield word, shown(text)
    for word, words in (("entry point", execution.entrypoint), ("command", execution.cmd)):
        if words:
            yield word, " ".join(map(for_shell, words))
    labels = [f"{key}={value}" for key, value in (execution.labels or {}).items()]
    several = {
        "environment": execution.env,
        "port": execution.exposed_ports,
        "volume": execution.volumes,
        "label": labels,
    }
    for word, things in several.items():
        for thing in things or ():
            yield word, shown(thing)
    for number, (layer, diff_id) in enumerate(zip(image.layers, image.diff_ids, strict=True), 1):
        yield f"layer {number}", f"{size(layer.size):>10}  {layer.digest}"
        yield "", f"{'diff ID':>10}  {diff_id}"


def digest_arguments(parser: Parser) -> None:
    parser.explain(
        "Print the digest of each image's manifest: what a registry identifies the image by, and what stands behind @\n"
        "in a reference. After a failure the next one is tried.",
        "onlap image digest debian:13",
    )
    parser.image("names", nargs="+", help="the images, by name or the beginning of a digest")


def digest(call: Call) -> int:
    with call.store() as store:
        images = images_of(store)

        def show(name: str) -> None:
            image = images.get(name)
            call.out.show({"name": image.name, "digest": image.digest}, image.digest)

        return call.each(call.args.names, show)


def tag_arguments(parser: Parser) -> None:
    parser.explain(
        "Give an image an additional name. If another image has the name NEW, it loses it.",
        "onlap image tag app:1 registry.example/team/app:1",
    )
    parser.image("name", help="the image")
    parser.add_argument("new", metavar="NEW", help="the additional name")


def tag(call: Call) -> None:
    with call.store() as store:
        image = images_of(store).tag(call.args.name, call.args.new)
    call.out.show(image_as_json(image))


def rm_arguments(parser: Parser) -> None:
    parser.explain(
        "Remove images, and the snapshots of their layers that no other image and no other snapshot needs. onlap\n"
        "cleanup deletes the blobs. After a failure the next one is tried.",
        "onlap image rm app:1 app:2",
    )
    parser.image("names", nargs="+", help="the images")


def rm(call: Call) -> int:
    with call.store(sweep=True) as store:
        return call.remove_each(call.args.names, images_of(store).remove)

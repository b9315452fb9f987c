"""``onlap image inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from onlap.cli.call import Call
from onlap.cli.parser import Parser
from onlap.cli.shared.each import each
from onlap.cli.shared.images import image_as_json, images_of, platform_of
from onlap.cli.terminal.text import count, for_shell, size
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.images import Image
    from onlap.images.spec.model import Execution


def arguments(parser: Parser) -> None:
    parser.explain(
        "All that is known of images: digests, platform, layers, and what a container of each does. With --json also\n"
        "the manifest and the configuration, with whatever they hold. A failure is said, and the next one is tried.",
        "onlap image inspect debian:13",
        "onlap image inspect debian:13 --json | jq .config.config.Env",
    )
    parser.add_argument("names", metavar="IMAGE", nargs="+", help="the images, by name or the beginning of a digest")


def run(call: Call) -> int:
    from onlap.images.spec import model

    out = call.out
    with call.store() as store:
        images = images_of(store)

        def show(name: str) -> None:
            image = images.get(name)
            unpacked = not image.chain_ids or image.chain_ids[-1] in store
            if out.json:
                manifest = model.decode_any(images.manifest_data(image), dict[str, Any], image.digest)
                config = model.decode_any(images.config_data(image), dict[str, Any], image.config_digest)
                out.item({**image_as_json(image), "unpacked": unpacked, "manifest": manifest, "config": config})
                return
            if name != call.args.names[0]:
                out.line()
            for word, text in _lines(image, images.config(image).execution, unpacked):
                out.line(f"{word:<12} {text}".rstrip())

        return each(call, call.args.names, show)


def _lines(image: Image, said: Execution, unpacked: bool) -> Iterator[tuple[str, str]]:
    yield "name", shown(image.name)
    yield "digest", image.digest
    yield "media type", shown(image.media_type)
    yield "config", image.config_digest
    yield "platform", platform_of(image)
    yield "created", shown(image.created or "-")
    where = "unpacked" if unpacked else "not unpacked"
    yield "size", f"{size(image.size)} in {count(len(image.layers), 'layer')}, {where}"
    for word, text in (("user", said.user), ("directory", said.working_dir), ("stop signal", said.stop_signal)):
        if text:
            yield word, shown(text)
    for word, words in (("entry point", said.entrypoint), ("command", said.cmd)):
        if words:
            yield word, " ".join(map(for_shell, words))
    labels = [f"{key}={value}" for key, value in (said.labels or {}).items()]
    several = {"environment": said.env, "port": said.exposed_ports, "volume": said.volumes, "label": labels}
    for word, things in several.items():
        for thing in things or ():
            yield word, shown(thing)
    for number, (layer, diff_id) in enumerate(zip(image.layers, image.diff_ids, strict=True), 1):
        yield f"layer {number}", f"{size(layer.size):>10}  {layer.digest}"
        yield "", f"{'diff ID':>10}  {diff_id}"

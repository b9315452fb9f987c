"""What the verbs of images share: the images of a root, and how one is shown."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.parser import Parser
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.cli.call import Call
    from onlap.cli.terminal.output import Output
    from onlap.images import Access, Image, Images
    from onlap.store import Store

# Enough of a digest to tell images apart, as git and Docker show it.
_SHORT = 12


def images_of(store: Store) -> Images:
    """The images of a root.

    Raises:
        Unimplemented: a library that images need is not installed.
    """
    try:
        return store.images
    except ModuleNotFoundError as error:
        raise errors.Unimplemented(
            f"images need the library {error.name}", hint=f"install it: pip install {error.name}"
        ) from error


def short(digest: str) -> str:
    """The beginning of a digest."""
    return shown(digest.partition(":")[2][:_SHORT])


def platform_of(image: Image) -> str:
    """What an image runs on, as ``linux/arm64/v8``."""
    return shown("/".join(part for part in (image.os, image.architecture, image.variant) if part) or "-")


def image_as_json(image: Image) -> dict[str, object]:
    """An image as a JSON object."""
    return {
        "name": image.name,
        "digest": image.digest,
        "media_type": image.media_type,
        "config_digest": image.config_digest,
        "os": image.os,
        "architecture": image.architecture,
        "variant": image.variant,
        "layers": [
            {"digest": layer.digest, "size": layer.size, "diff_id": diff_id, "chain_id": chain_id}
            for layer, diff_id, chain_id in zip(image.layers, image.diff_ids, image.chain_ids, strict=True)
        ],
        "created": image.created,
        "size": image.size,
    }


def show_image(out: Output, image: Image) -> None:
    """Say which image there is now."""
    out.say(image_as_json(image), f"{shown(image.name)} {image.digest}")


def access(call: Call) -> Access:
    """How the user reaches registries: the options of :func:`registry_arguments`, the environment, and its files."""
    from onlap.images.registry.access import from_environment

    args = call.args
    return from_environment(
        os.environ,
        user=os.geteuid(),
        plain_http=True if args.plain_http else None,
        insecure=args.insecure,
        ca_file=args.ca_file,
    )


def registry_arguments(parser: Parser) -> None:
    """The options of a verb that talks to a registry."""
    parser.add_argument("--plain-http", action="store_true", help="HTTP without TLS; on localhost it is found out")
    parser.add_argument(
        "--insecure", action="store_true", help="do not verify certificates; without TLS if it has none"
    )
    parser.add_argument("--ca-file", metavar="FILE", help="certificates of authorities (PEM), besides the system's")


def platform_argument(parser: Parser) -> None:
    """The option ``--platform``."""
    parser.add_argument("--platform", metavar="P", help="as linux/arm64; this machine's by default")

"""What the verbs for images share: the images of a root, their output, and access to registries."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from onlap import errors
from onlap.cli.parser import Parser
from onlap.cli.terminal.text import NOTHING
from onlap.errors import shown

if TYPE_CHECKING:
    from onlap.cli.call import Call
    from onlap.cli.terminal.output import Output
    from onlap.images import Access, Image, Images
    from onlap.store import Store

# Digits of a digest that are shown, as git and Docker do.
_SHORT = 12


def images_of(store: Store) -> Images:
    """The images of a root.

    Raises:
        Unimplemented: a library that images need is not installed.
    """
    try:
        return store.images
    except errors.Unavailable as error:
        cause = error.__cause__
        if not isinstance(cause, ModuleNotFoundError):
            raise
        raise errors.Unimplemented(
            f"images need the library {cause.name}", hint=f"install it: pip install {cause.name}"
        ) from error


def short(digest: str) -> str:
    """The beginning of a digest."""
    return shown(digest.partition(":")[2][:_SHORT])


def platform_of(image: Image) -> str:
    """The platform of an image, as ``linux/arm64/v8``."""
    return shown("/".join(part for part in (image.os, image.architecture, image.variant) if part) or NOTHING)


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
    """Print an image that was made or changed."""
    out.show(image_as_json(image), f"{shown(image.name)} {image.digest}")


def registry_access(call: Call) -> Access:
    """Access to registries: from the options of :func:`registry_arguments`, the environment, and its files."""
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
    """Add the options of a verb that uses a registry."""
    parser.add_argument("--plain-http", action="store_true", help="HTTP without TLS; detected on localhost")
    parser.add_argument("--insecure", action="store_true", help="do not verify certificates; fall back to HTTP")
    parser.add_argument("--ca-file", metavar="FILE", help="more CA certificates (PEM), besides the system's")


def platform_argument(parser: Parser) -> None:
    """Add the option ``--platform``."""
    parser.add_argument("--platform", metavar="P", help="as linux/arm64; by default this machine's")

"""The JSON documents of images: descriptors, manifests, indexes, configurations.

Sources: the OCI image specification 1.1 (descriptor.md, manifest.md, image-index.md, config.md, media-types.md);
Docker's "Image Manifest Version 2, Schema 2" and its image specification v1.2.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct, field

from onlap import errors
from onlap.errors import shown
from onlap.images.spec import media
from onlap.layers.stream.digests import check_digest, digest_of

# Bytes. The distribution specification asks registries to accept manifests of 4 MiB; it sets no limit for
# configurations, of which containerd reads up to 8 MiB.
MAX_MANIFEST = 4 << 20
MAX_CONFIG = 8 << 20
# Layers of one image: the kernel merges up to 500, and Docker makes at most 127.
MAX_LAYERS = 500

T = TypeVar("T")


class Platform(Struct, frozen=True, omit_defaults=True):
    """What the programs of an image run on."""

    architecture: str = ""
    os: str = ""
    os_version: str = field(default="", name="os.version")
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(Struct, frozen=True, omit_defaults=True, rename="camel"):
    """A reference to content: what it is, its digest, and its size in bytes."""

    media_type: str
    digest: str
    size: int
    urls: list[str] | None = None
    annotations: dict[str, str] | None = None
    platform: Platform | None = None
    artifact_type: str | None = None

    def __hash__(self) -> int:
        return hash(self.digest)


class Manifest(Struct, frozen=True, omit_defaults=True, rename="camel"):
    """One image for one platform."""

    schema_version: int
    config: Descriptor
    layers: list[Descriptor]
    media_type: str | None = None
    annotations: dict[str, str] | None = None
    artifact_type: str | None = None

    @property
    def is_docker(self) -> bool:
        """Whether it has Docker's media types."""
        return self.config.media_type == media.DOCKER_CONFIG


class Index(Struct, frozen=True, omit_defaults=True, rename="camel"):
    """Several manifests, mostly one per platform."""

    schema_version: int
    manifests: list[Descriptor]
    media_type: str | None = None
    annotations: dict[str, str] | None = None


class History(Struct, frozen=True, omit_defaults=True):
    """How a layer, or an empty step, was made."""

    created: str | None = None
    created_by: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False


class RootFS(Struct, frozen=True):
    """The layers, by the digests of their uncompressed archives, lowest first."""

    type: str = "layers"
    diff_ids: list[str] = []


class Execution(Struct, frozen=True, omit_defaults=True, rename="pascal"):
    """The defaults for containers of an image: the member ``config``."""

    user: str = ""
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str = ""
    labels: dict[str, str] | None = None
    volumes: dict[str, Any] | None = None
    exposed_ports: dict[str, Any] | None = None
    stop_signal: str = ""
    shell: list[str] | None = None


class Config(Struct, frozen=True, omit_defaults=True):
    """An image's configuration."""

    architecture: str = ""
    os: str = ""
    rootfs: RootFS = RootFS()
    variant: str = ""
    os_version: str = field(default="", name="os.version")
    created: str | None = None
    author: str = ""
    config: Execution | None = None
    history: list[History] | None = None

    @property
    def execution(self) -> Execution:
        """The defaults for containers; empty where the image has none."""
        return self.config or Execution()

    @property
    def platform(self) -> Platform:
        """What its programs run on."""
        return Platform(self.architecture, self.os, self.os_version, self.variant)


class Documents(NamedTuple):
    """An image's documents.

    Attributes:
        descriptor: of the manifest.
        manifest: what it says.
        manifest_data: its bytes.
        config: what the configuration says.
        config_data: its bytes.
    """

    descriptor: Descriptor
    manifest: Manifest
    manifest_data: bytes
    config: Config
    config_data: bytes


def assemble(config_data: bytes, layers: list[Descriptor], *, docker: bool) -> Documents:
    """The documents of a new image, with Docker's media types or OCI's.

    Raises:
        InvalidArgument, Unimplemented: the configuration or a layer is not one of an image.
    """
    config_type, manifest_type = (
        (media.DOCKER_CONFIG, media.DOCKER_MANIFEST) if docker else (media.OCI_CONFIG, media.OCI_MANIFEST)
    )
    manifest = Manifest(2, describe(config_data, config_type), layers, media_type=manifest_type)
    manifest_data = encode(manifest)
    descriptor = describe(manifest_data, manifest_type)
    check_manifest(manifest, descriptor.digest)
    return Documents(descriptor, manifest, manifest_data, decode_config(config_data, manifest), config_data)


def decode_document(data: bytes, media_type: str, digest: str) -> Manifest | Index:
    """Read a manifest or an index.

    Args:
        data: its bytes.
        media_type: as its descriptor or the registry says; may be empty.
        digest: for messages.

    Raises:
        InvalidArgument: it is neither, or it contradicts itself.
        Unimplemented: it is of a kind that is not supported; the message says which.
    """
    document = decode(data, dict[str, Any], digest)
    own_type = document.get("mediaType")
    if own_type is not None and not isinstance(own_type, str):
        raise _bad(digest, "its media type is not a string")
    # Two readers must not find two different images in the same bytes (CVE-2021-41190).
    if "manifests" in document and ("layers" in document or "config" in document):
        raise _bad(digest, "it is a manifest and an index at once")
    if media_type and own_type and media_type != own_type and media.is_document(media_type):
        raise _bad(digest, f"its descriptor says {shown(media_type)}, and it says {shown(own_type)}")
    kind = own_type or media_type
    if kind in media.SCHEMA_1 or document.get("schemaVersion") == 1:
        raise errors.Unimplemented(
            f"{digest} is a Docker manifest of schema 1, which registries no longer support",
            key=digest,
            hint="push the image again with a newer client",
        )
    if document.get("schemaVersion") != 2:
        raise _bad(digest, "its schemaVersion is not 2")
    if "manifests" in document:
        if kind and kind not in media.INDEXES:
            raise errors.Unimplemented(f"{digest} has the unknown media type {shown(kind)}", key=digest)
        index = decode(data, Index, digest)
        for descriptor in index.manifests:
            check_descriptor(descriptor)
        return index
    if kind and kind not in media.MANIFESTS:
        raise errors.Unimplemented(f"{digest} has the unknown media type {shown(kind)}", key=digest)
    manifest = decode(data, Manifest, digest)
    check_manifest(manifest, digest)
    return manifest


def check_manifest(manifest: Manifest, digest: str) -> None:
    """Raise InvalidArgument or Unimplemented where a manifest is not that of a container image that can be unpacked."""
    check_descriptor(manifest.config)
    media.check_config(manifest.config.media_type, digest)
    check_layer_count(len(manifest.layers), digest)
    for layer in manifest.layers:
        check_descriptor(layer)
        media.check_layer(layer.media_type, layer.digest)


def check_layer_count(count: int, digest: str) -> None:
    """Raise InvalidArgument where an image has more layers than can be merged."""
    if count > MAX_LAYERS:
        raise _bad(digest, f"it has {count} layers, and {MAX_LAYERS} are the most that can be merged")


def decode_config(data: bytes, manifest: Manifest) -> Config:
    """Read the configuration that a manifest names.

    Raises:
        InvalidArgument: it is not one, or it does not have one diff ID per layer.
    """
    digest = manifest.config.digest
    config = decode(data, Config, digest)
    if config.rootfs.type != "layers":
        raise _bad(digest, f"its root filesystem is of the type {shown(config.rootfs.type)}")
    for diff_id in config.rootfs.diff_ids:
        check_digest(diff_id)
    have, want = len(config.rootfs.diff_ids), len(manifest.layers)
    if have != want:
        raise _bad(digest, f"it has {have} diff IDs for {want} layers")
    return config


def check_descriptor(descriptor: Descriptor) -> None:
    """Raise InvalidArgument where a descriptor has an impossible digest or size."""
    check_digest(descriptor.digest)
    if descriptor.size < 0:
        raise _bad(descriptor.digest, f"its descriptor says that it has {descriptor.size} bytes")


def encode(value: Struct | Mapping[str, Any] | Sequence[Struct]) -> bytes:
    """JSON, always the same for the same value; raises InvalidArgument where a text is not valid UTF-8."""
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument(f"{shown(error.object)} is not valid UTF-8, as JSON must be") from error


def describe(data: bytes, media_type: str) -> Descriptor:
    """The descriptor of bytes."""
    return Descriptor(media_type, digest_of(data), len(data))


# By the type that they decode. msgspec inspects a class when a decoder for it is made: a segmentation fault was seen in
# threads that made a process's first decoders at the same time. So each is made once, and one at a time.
_decoders: dict[object, msgspec.json.Decoder[Any]] = {}
_making = threading.Lock()


def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    found = _decoders.get(kind)
    if found is None:
        with _making:
            found = _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    return found


for _kind in (dict[str, Any], Index, Manifest, Config):
    _decoder(_kind)
_ENCODER = msgspec.json.Encoder()


def decode(data: bytes, kind: type[T], what: str) -> T:
    """Read JSON.

    Raises:
        InvalidArgument: it is not JSON, or not of this kind; the message names it as ``what``.
    """
    try:
        return _decoder(kind).decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(what, str(error)) from error


def _bad(digest: str, why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"{shown(digest)} is not a valid document of an image: {why}", key=digest, hint="ask who made the image"
    )

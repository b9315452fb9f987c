"""Archives of ``docker save`` in its older form: a ``manifest.json`` that names a configuration and layers by path.

Since version 25 Docker writes an OCI layout with a ``manifest.json`` beside it, which is read as a layout; so is
an export for Docker. The form without ``manifest.json`` (Docker before 1.10) is refused.

Source: Docker v26.1.5, image/tarexport; its image specification v1.2, "Combined Image JSON + Filesystem Changeset
Format".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from onlap import errors
from onlap.content.lease import Lease
from onlap.content.store import ContentStore
from onlap.errors import shown
from onlap.images.formats.files import ImageFiles
from onlap.images.formats.oci_layout import StoredImage, blob_path
from onlap.images.index import Image
from onlap.images.spec import media, model, names, platforms
from onlap.images.spec.model import Config, Descriptor, Documents, Platform
from onlap.layers.stream import compression
from onlap.layers.stream.digests import check_content

MANIFEST_FILE = "manifest.json"
_MAX_IMAGES = 1000


class Entry(Struct, rename="pascal"):
    """One image of a ``manifest.json``."""

    config: str
    layers: list[str] | None = None
    repo_tags: list[str] | None = None


def is_saved(source: ImageFiles) -> bool:
    """Whether the files are those of ``docker save``, and not of a root filesystem with files of these names."""
    entries = source.peek(MANIFEST_FILE, list[dict[str, Any]])
    return any("Config" in entry and "Layers" in entry for entry in entries) or _is_oldest(source)


def _is_oldest(source: ImageFiles) -> bool:
    if source.has(MANIFEST_FILE):
        return False
    repositories = source.peek("repositories", dict[str, dict[str, str]])
    return any(source.has(f"{identifier}/layer.tar") for tags in repositories.values() for identifier in tags.values())


def images(
    source: ImageFiles,
    content: ContentStore,
    lease: Lease,
    wanted: Platform | None,
    name: str | None,
    fallback: str | None,
) -> list[StoredImage]:
    """The images of an archive.

    Such an archive does not give the digests of its layers. That of a plain layer is its diff ID; a compressed layer is
    put into the content store here, to learn it.

    Args:
        source: its files.
        content: where compressed layers are put.
        lease: pins them.
        wanted: the platform that the images must be for; None: any.
        name: for the one image, whatever the archive calls it.
        fallback: a name for images without one.

    Raises:
        InvalidArgument: it is damaged or hostile; the message says what.
        NotFound: a file is missing, or it has no image for the platform.
        Unimplemented: it is of the oldest form.
    """
    if not source.has(MANIFEST_FILE):
        raise errors.Unimplemented(
            f"the archive has no {MANIFEST_FILE}: Docker before 1.10 wrote it",
            hint="load it into Docker and save it again",
        )
    data = source.read(MANIFEST_FILE, model.MAX_MANIFEST)
    entries = model.decode(data, list[Entry], MANIFEST_FILE)
    count = sum(len(entry.repo_tags or ("",)) for entry in entries)
    if count > _MAX_IMAGES:
        raise errors.InvalidArgument(f"the archive has {count} images")
    found: list[StoredImage] = []
    others: list[str] = []
    known: dict[str, Descriptor] = {}
    for entry in entries:
        documents, paths = _image(source, content, lease, entry, known)
        if wanted is not None and not platforms.matches(wanted, documents.config.platform):
            others.append(str(documents.config.platform))
            continue
        tags: list[str | None] = [names.normalized(tag) for tag in entry.repo_tags or ()]
        if name is not None:
            if len(entries) > 1:
                raise errors.InvalidArgument(f"there are {len(entries)} images", key=name, hint="give no name")
            tags = [names.normalized(name)]
        elif not tags and fallback is not None:
            tags = [names.normalized(fallback)]
        found += [StoredImage(tag, documents, paths) for tag in tags or [None]]
    if not found:
        there = f" for {wanted}; there is: {shown(', '.join(others))}" if others else ""
        raise errors.NotFound(f"the archive has no image{there}")
    return found


def _image(
    source: ImageFiles, content: ContentStore, lease: Lease, entry: Entry, known: dict[str, Descriptor]
) -> tuple[Documents, dict[str, str]]:
    """One image, with its layers' paths by digest.

    ``known`` has the compressed layers that were stored already, by their paths.
    """
    config_data = source.read(entry.config, model.MAX_CONFIG)
    config = model.decode(config_data, Config, entry.config)
    paths = entry.layers or []
    diff_ids = config.rootfs.diff_ids
    if len(paths) != len(diff_ids):
        raise errors.InvalidArgument(
            f"{shown(entry.config)} has {len(diff_ids)} diff IDs for {len(paths)} layers", key=entry.config
        )
    model.check_layer_count(len(paths), entry.config)  # before any of them is stored
    layers = [
        _layer(source, content, lease, path, diff_id, known) for path, diff_id in zip(paths, diff_ids, strict=True)
    ]
    where = {layer.digest: path for layer, path in zip(layers, paths, strict=True)}
    return model.assemble(config_data, layers, docker=True), where


def _layer(
    source: ImageFiles, content: ContentStore, lease: Lease, path: str, diff_id: str, known: dict[str, Descriptor]
) -> Descriptor:
    if path in known:
        return known[path]
    with source.open(path) as file:
        kind = compression.detect(file.read(compression.PEEK))
    if kind == compression.NONE:
        return Descriptor(media.layer_type(docker=True, compression="none"), diff_id, source.size(path))
    if kind not in (compression.GZIP, compression.ZSTD):
        raise errors.Unimplemented(f"the layer {shown(path)} is compressed with {kind}", key=path)
    with source.open(path) as file:
        blob = content.put(file, lease=lease)
    check_content(blob.digest, blob.size, size=source.size(path))
    known[path] = Descriptor(media.layer_type(docker=True, compression=kind), blob.digest, blob.size)
    return known[path]


def manifest_of(images: Sequence[Image]) -> bytes:
    """The ``manifest.json`` beside a layout, for Docker, Podman and skopeo."""
    entries: dict[str, Entry] = {}
    for image in images:
        layers = [blob_path(layer.digest) for layer in image.layers]
        entry = entries.setdefault(image.digest, Entry(blob_path(image.config_digest), layers, []))
        if names.parse(image.name).tag is not None and entry.repo_tags is not None:
            entry.repo_tags.append(names.familiar(image.name))
    return model.encode(list(entries.values()))

"""OCI image layouts: an index, and blobs by digest, in a directory or an archive.

Sources: the OCI image specification, image-layout.md; containerd v1.7.24, images/archive (the annotation that holds a
full name).
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import msgspec

from onlap import errors
from onlap.errors import shown
from onlap.images.formats.files import ImageFiles
from onlap.images.index import Image
from onlap.images.spec import media, model, names, resolve
from onlap.images.spec.model import Descriptor, Documents, Index, Platform
from onlap.layers.stream.digests import check_digest

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
ANNOTATION_NAME = "io.containerd.image.name"
ANNOTATION_REF = "org.opencontainers.image.ref.name"
_MAX_IMAGES = 1000


class StoredImage(NamedTuple):
    """An image in a layout or an archive.

    Attributes:
        name: in its full form; None where it has none.
        documents: its own.
        paths: those of the layers' blobs, by digest, where they are not the layout's.
    """

    name: str | None
    documents: Documents
    paths: dict[str, str]


def blob_path(digest: str) -> str:
    """The path of a blob in a layout."""
    return f"blobs/sha256/{check_digest(digest)}"


def is_layout(source: ImageFiles) -> bool:
    """Whether the files are a layout's, and not those of a root filesystem that happen to have these names."""
    return source.has(INDEX_FILE) and "imageLayoutVersion" in source.peek(LAYOUT_FILE, dict[str, Any])


def images(source: ImageFiles, wanted: Platform, name: str | None, fallback: str | None) -> list[StoredImage]:
    """The images of a layout.

    Args:
        source: its files.
        wanted: the platform to choose where there is a choice.
        name: for the one image, whatever the layout calls it.
        fallback: the repository, in its full form, of images that have only a tag, or no name.

    Raises:
        InvalidArgument: it is damaged or hostile, or has several images for one name; the message says what.
        NotFound: it has no image, or none for the platform.
        DataLoss: a blob is not what its digest says.
    """
    version = model.decode(source.read(LAYOUT_FILE, 4096), dict[str, Any], LAYOUT_FILE)
    if version.get("imageLayoutVersion") != "1.0.0":
        raise errors.Unimplemented(f"the layout has the unknown version {shown(version.get('imageLayoutVersion'))}")
    data = source.read(INDEX_FILE, model.MAX_MANIFEST)
    index = model.decode_document(data, "", INDEX_FILE)
    if not isinstance(index, Index):
        raise errors.InvalidArgument(f"the {INDEX_FILE} is not an index")
    # Entries of one name are one image for several platforms, laid out flat.
    groups: dict[str | None, list[Descriptor]] = {}
    for descriptor in index.manifests:
        groups.setdefault(name_of(descriptor, fallback), []).append(descriptor)
    if len(groups) > _MAX_IMAGES:
        raise errors.InvalidArgument(f"the {INDEX_FILE} has {len(groups)} images")
    if name is not None and len(groups) > 1:
        raise errors.InvalidArgument(
            f"there are {len(groups)} images: {shown(', '.join(map(str, groups)))}", key=name, hint="give no name"
        )

    def get(descriptor: Descriptor, limit: int) -> bytes:
        return source.read(blob_path(descriptor.digest), limit)

    found = []
    for own, descriptors in groups.items():
        try:
            if len(descriptors) == 1:
                documents = resolve.resolve(get, descriptors[0], wanted)
            else:
                documents = resolve.choose(get, Index(2, descriptors), wanted, own or INDEX_FILE)
        except errors.NotFound:
            # A layout may also hold images for other platforms; one that holds nothing else is an error.
            if len(groups) == 1:
                raise
        else:
            found.append(StoredImage(names.normalized(name) if name is not None else own, documents, {}))
    if not found:
        raise errors.NotFound(f"the layout has no image for {wanted}", hint="choose with --platform")
    return found


def name_of(descriptor: Descriptor, fallback: str | None) -> str | None:
    """The name of an entry of a layout's index, in its full form.

    Raises:
        InvalidArgument: it is not a name of an image.
    """
    annotations = descriptor.annotations or {}
    full = annotations.get(ANNOTATION_NAME)
    reference = annotations.get(ANNOTATION_REF)
    bare = reference and "/" not in reference and ":" not in reference
    if full:
        named = names.parse(full)
        # umoci gives a new image a tag of its own, and all other annotations of the one that it was made from.
        return str(named._replace(tag=names.parse(f"x:{reference}").tag) if bare and named.tag else named)
    if reference and not bare:
        return names.normalized(reference)
    if fallback is None:
        return None
    return names.normalized(f"{fallback}:{reference}" if reference else fallback)


def index_of(images: list[tuple[Image, Descriptor]]) -> bytes:
    """The index of a layout with these images, each with the descriptor of its manifest."""
    tags = [names.parse(image.name).tag for image, _ in images]
    entries = []
    for (image, descriptor), tag in zip(images, tags, strict=True):
        # umoci and skopeo choose by the tag alone, which must then belong to one image only.
        short = tag if tag and tags.count(tag) == 1 else names.familiar(image.name)
        annotations = {ANNOTATION_NAME: image.name, ANNOTATION_REF: short}
        entries.append(msgspec.structs.replace(descriptor, annotations=annotations))
    return model.encode(Index(2, entries, media.OCI_INDEX))


def fallback(path: str) -> str | None:
    """The repository named like the last part of a path, in its full form; None where no repository can be."""
    stem = os.path.basename(os.path.abspath(path)).lower()
    for suffix in (".gz", ".zst", ".tar", ".tgz", ".oci"):
        stem = stem.removesuffix(suffix)
    try:
        reference = names.parse(stem)
    except errors.InvalidArgument:
        return None
    return f"{reference.registry}/{reference.repository}"

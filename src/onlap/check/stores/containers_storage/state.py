"""All records of a containers/storage root at one moment: what there is, what stands on what, and who on whom.

Layers without a record, because the file that had it is damaged, are told from their directories, and from the
configurations and manifests of the images on them.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from onlap.check.stores.containers_storage import records
from onlap.check.stores.containers_storage.links import LINKS, MAX_DEPTH, Links
from onlap.check.stores.containers_storage.records import (
    Base,
    ContainerRow,
    Damaged,
    ImageRow,
    LayerRow,
    Table,
)
from onlap.check.stores.cycles import cycles

LAYERS_FILE = "layers.json"
VOLATILE_LAYERS_FILE = "volatile-layers.json"
IMAGES_FILE = "images.json"
CONTAINERS_FILE = "containers.json"
VOLATILE_CONTAINERS_FILE = "volatile-containers.json"
SPLIT_SUFFIX = ".tar-split.gz"
# drivers/overlay/check.go: layers to try mounts with
_TRIAL = re.compile("(?:opaque-bug-check|metacopy-check|volatile-check|compat)[0-9]+")
# overlay.go, stagingDir; internal/tempdir and drivers/overlay of 1.60: what is being made, or removed
STAGING = "staging"
TEMPORARY = "tempdirs"

# A configuration or a manifest; registries take 4 MiB.
DOCUMENT_LIMIT = 16 << 20


class Bases(NamedTuple):
    """The directories of a root."""

    overlay: Base
    layers: Base
    images: Base
    containers: Base
    root: Base


def bases(directory: str) -> Bases:
    """The directories of a root, by its path."""
    overlay, layers, images, containers = (
        Base(f"{directory}/overlay{part}") for part in ("", "-layers", "-images", "-containers")
    )
    return Bases(overlay, layers, images, containers, Base(directory))


class Tree(NamedTuple):
    """What is there of a layer.

    Attributes:
        missing: what is not there, in words; ``""`` if nothing is.
        foreign: its tree belongs to an additional layer store, and is only linked.
        plain: the tree holds what the layer's archive says: not so for composefs, which keeps the contents of files by
            their digests, and for a copy of a layer with other owners, which has only what had to be copied.
        split_lost: what is wrong with its tar-split file, in words; ``""`` if it is there and not empty.
    """

    missing: str
    foreign: bool
    plain: bool
    split_lost: str


class State:
    """The records, read once.

    Args:
        bases: the directories of the root.
        others: those of the additional image stores that the tools were told of; only their records are read.

    Attributes:
        layer_tables: ``layers.json`` and the volatile one; the others in the same way.
        layers: all rows by id, also those of containers and incomplete ones; each after what it stands on.
        parents: what each layer of ``layers`` stands on: its parent by the record; but a copy of a layer with other
            owners stands on that layer (``overlay.go``, ``CreateFromTemplate``).
        images: by id.
        containers: by id.
        writable: the layers of containers, which are not committed.
        users: the images and containers that stand on a layer.
        image_names: the names of the images that a layer belongs to.
        used: the layers that something stands on.
        templates: the layers that are copies of others, for a user namespace: of which.
        elsewhere: the layers and images of the other stores.
        unrecorded: the directories of layers that have no record.
        trials: those in which a tool tries what it can mount.

    Raises:
        OSError: something cannot be looked at.
    """

    def __init__(self, bases: Bases, others: Iterable[Bases] = ()) -> None:
        self.bases = bases
        self.elsewhere: set[str] = set()
        for other in others:
            self.elsewhere.update(records.read_layers(other.layers, LAYERS_FILE).rows)
            self.elsewhere.update(records.read_images(other.images, IMAGES_FILE).rows)
        # Containers before images before layers: what is removed meanwhile is removed in this order, so that what
        # stands on something is not seen without it.
        self.container_tables = (
            records.read_containers(bases.containers, CONTAINERS_FILE),
            records.read_containers(bases.containers, VOLATILE_CONTAINERS_FILE),
        )
        self.image_table = records.read_images(bases.images, IMAGES_FILE)
        self.layer_tables = (
            records.read_layers(bases.layers, LAYERS_FILE),
            records.read_layers(bases.layers, VOLATILE_LAYERS_FILE),
        )
        self.containers = records.joined(*self.container_tables)
        self.images = self.image_table.rows
        rows = records.joined(*self.layer_tables)
        self.templates = {
            mapped: image.top for image in self.images.values() if image.top is not None for mapped in image.mapped
        }
        found = [name for name in self._directories() if name not in rows]
        self.trials = [name for name in found if _TRIAL.fullmatch(name)]
        self.unrecorded = [name for name in found if name not in self.trials]
        self.layers_lost = not all(table.whole for table in self.layer_tables) or (
            self.layer_tables[0].missing and bool(self.unrecorded)
        )
        guesses = self._guesses(rows) if self.layers_lost and self.unrecorded else set()
        self.parents = {layer: row.parent for layer, row in rows.items()}
        self.parents |= {copy: of for copy, of in self.templates.items() if copy in rows and of in rows and copy != of}
        on_images = {layer for image in self.images.values() for layer in _up_to(self.parents, image.top, MAX_DEPTH)}
        # A container's layer is not made from an archive; and a record cannot turn an image's layer into one.
        self.writable = {each.layer for each in self.containers.values() if each.layer is not None}
        self.writable |= {each for each in guesses if bases.layers.status(each + SPLIT_SUFFIX) is None}
        self.writable -= on_images
        self.layers = {layer: rows[layer] for layer in _parents_first(self.parents)}
        self.cycles = frozenset(cycles(self.parents))
        self.users, self.image_names, self.used = self._users()

    def chain(self, layer: str, limit: int = MAX_DEPTH + 1) -> list[str]:
        """The layers below one, uppermost first; those that have records, and no more than ``limit``."""
        return _chain(self.parents, layer, limit)

    def is_whole(self, layer: str, chain: Sequence[str]) -> bool:
        """Whether a chain ends with a lowest layer: no record of a parent is lost, and there is no cycle."""
        return self.parents[chain[-1] if chain else layer] is None

    def tree(self, layer: str) -> Tree:
        """What is there of a layer.

        Raises:
            OSError: it cannot be looked at.
        """
        overlay = self.bases.overlay
        missing, foreign = "", False
        if not overlay.is_directory(layer):
            missing = "its directory"
        else:
            status = overlay.status(f"{layer}/diff")
            # overlay.go, redirectDiffIfAdditionalLayer
            foreign = status is not None and stat.S_ISLNK(status.st_mode)
            if not foreign and (status is None or not stat.S_ISDIR(status.st_mode)):
                missing = "diff"
        plain = layer not in self.templates and not any(
            overlay.status(f"{layer}/{other}") for other in ("composefs-data", "diff1")
        )
        split = self.bases.layers.status(layer + SPLIT_SUFFIX)
        lost = "it is missing" if split is None or not stat.S_ISREG(split.st_mode) else ""
        if split is not None and not lost and split.st_size == 0:
            lost = "it is empty"
        return Tree(missing, foreign, plain, lost)

    def _directories(self) -> list[str]:
        """The directories of layers (overlay.go, ``ListLayers``)."""
        overlay = self.bases.overlay
        return [
            name
            for name in overlay.names()
            if name not in (LINKS, STAGING, TEMPORARY) and records.is_id(name) and overlay.is_directory(name)
        ]

    def _users(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]], set[str]]:
        users: dict[str, dict[str, None]] = {}
        names: dict[str, dict[str, None]] = {}
        used: set[str] = set()

        def stand(tops: Iterable[str | None], called: Sequence[str], known: Sequence[str]) -> None:
            for top in tops:
                for layer in _up_to(self.parents, top, MAX_DEPTH):
                    users.setdefault(layer, {}).update(dict.fromkeys(called))
                    names.setdefault(layer, {}).update(dict.fromkeys(known))
                while top is not None and top in self.parents and top not in used:
                    used.add(top)
                    top = self.parents[top]

        for image in self.images.values():
            stand((image.top, *image.mapped), image.names or (image.label,), image.names)
        for container in self.containers.values():
            stand((container.layer,), (container.label,), ())
        return (
            {layer: tuple(called) for layer, called in users.items()},
            {layer: tuple(called) for layer, called in names.items()},
            used,
        )

    # Guesses

    def _guesses(self, rows: dict[str, LayerRow]) -> set[str]:
        """Add rows for the layers that have none; returns which."""
        links = Links(self.bases.overlay)
        for name in self.unrecorded:
            rows[name] = LayerRow(name, links.parent_in_list(name), None, guessed=True)
        for image in self.images.values():
            self._guess_digests(image, rows)
        return set(self.unrecorded)

    def _guess_digests(self, image: ImageRow, found: dict[str, LayerRow]) -> None:
        """Take the digests of guessed layers from an image's configuration, if it has as many layers."""
        layers = list(_up_to({layer: row.parent for layer, row in found.items()}, image.top, MAX_DEPTH))[::-1]
        if not any(found[each].guessed for each in layers):
            return
        filesystem = self._document(image, f"sha256:{image.id}").get("rootfs")
        diff_ids = filesystem.get("diff_ids") if isinstance(filesystem, dict) else None
        if not isinstance(diff_ids, list) or len(diff_ids) != len(layers):
            return
        for layer, diff_id in zip(layers, diff_ids, strict=True):
            if found[layer].guessed and records.is_digest(diff_id):
                found[layer] = found[layer]._replace(diff_id=diff_id)

    def blobs(self) -> dict[str, tuple[str, ...]]:
        """The digests of the blobs of layers: of those that they were made from, and of those in images' manifests.

        A layer that was made from the table of contents of a blob does not say which; and an image that was pulled
        from elsewhere may have the same layer in another compression.

        Raises:
            OSError: a manifest cannot be looked at.
        """
        found = {layer: [row.blob] if row.blob else [] for layer, row in self.layers.items()}
        for image in self.images.values():
            described = self._document(image, "manifest").get("layers")
            layers = list(_up_to(self.parents, image.top, MAX_DEPTH))[::-1]
            if not isinstance(described, list) or len(described) != len(layers):
                continue
            for layer, each in zip(layers, described, strict=True):
                digest = each.get("digest") if isinstance(each, dict) else None
                if isinstance(digest, str) and records.is_digest(digest) and digest not in found[layer]:
                    found[layer].append(digest)
        return {layer: tuple(digests) for layer, digests in found.items()}

    def _document(self, image: ImageRow, item: str) -> dict[str, object]:
        try:
            document = records.load(self.bases.images.read(f"{image.id}/{records.file_name(item)}", DOCUMENT_LIMIT))
        except (FileNotFoundError, Damaged):
            return {}
        return document if isinstance(document, dict) else {}


def _up_to(parents: Mapping[str, str | None], top: str | None, limit: int) -> Iterator[str]:
    """A layer, and those below it."""
    if top is not None and top in parents:
        yield top
        yield from _chain(parents, top, limit)


def _chain(parents: Mapping[str, str | None], layer: str, limit: int) -> list[str]:
    found: dict[str, None] = {}
    at = parents.get(layer)
    while at is not None and at in parents and at != layer and at not in found and len(found) < limit:
        found[at] = None
        at = parents[at]
    return list(found)


def _parents_first(parents: Mapping[str, str | None]) -> Iterable[str]:
    """The layers, each after its parent; otherwise in their order."""
    found: dict[str, None] = {}
    for start in parents:
        waiting: dict[str, None] = {}
        at: str | None = start
        while at is not None and at in parents and at not in found and at not in waiting:
            waiting[at] = None
            at = parents[at]
        found.update(dict.fromkeys(reversed(waiting)))
    return found


def whole(tables: Sequence[Table[LayerRow] | Table[ImageRow] | Table[ContainerRow]]) -> bool:
    """Whether no record in these files is damaged."""
    return all(table.whole for table in tables)

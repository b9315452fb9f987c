"""Whether the records of a containers/storage root fit together, and with its directories.

Source: containers/storage 1.57.2, ``check.go`` (what its own check looks at), ``drivers/overlay/overlay.go``.
"""

from __future__ import annotations

import calendar
import hashlib
import time
from collections.abc import Container, Iterator

from onlap.check.findings import Finding
from onlap.check.stores.containers_storage import records, state
from onlap.check.stores.containers_storage.links import MAX_DEPTH, Links
from onlap.check.stores.containers_storage.locks import is_locked
from onlap.check.stores.containers_storage.records import (
    Base,
    ContainerRow,
    Damaged,
    ImageRow,
    Item,
    LayerRow,
    Table,
)
from onlap.check.stores.containers_storage.state import State
from onlap.errors import shown

# check.go, defaultMaximumUnreferencedLayerAge, in seconds: a pull writes the record of its image last.
_UNUSED_AGE = 24 * 3600
# So much of an image's documents is read.
_ITEM_LIMIT = 256 << 20
_TEMPORARY_FILE = ".tmp-"


class Structure:
    """What does not fit in a state.

    Args:
        known: the state.
        quiet: no tool was changing the store while it was read, nor does it now.
    """

    def __init__(self, known: State, *, quiet: bool) -> None:
        self._quiet = quiet
        self._state = known
        self._bases = known.bases
        self._links = Links(known.bases.overlay)

    def findings(self) -> Iterator[Finding]:
        """All of it.

        Raises:
            OSError: something cannot be looked at.
        """
        yield from self._tables()
        for layer, row in self._state.layers.items():
            yield from self._layer(layer, row)
        yield from self._unknown()
        yield from self._links.dangling(self._state.layers)
        for image in self._state.images.values():
            yield from self._image(image)
        for container in self._state.containers.values():
            yield from self._container(container)
        if self._quiet:
            yield from self._leftovers()

    # Records

    def _tables(self) -> Iterator[Finding]:
        known = self._state
        layers, volatile_layers = known.layer_tables
        containers, volatile_containers = known.container_tables
        bases = self._bases
        layers_missing = layers.missing and bool(known.unrecorded)
        yield from _table(f"overlay-layers/{state.LAYERS_FILE}", layers, missing=layers_missing)
        yield from _table(f"overlay-layers/{state.VOLATILE_LAYERS_FILE}", volatile_layers)
        images_missing = known.image_table.missing and bool(_unrecorded(bases.images, known.images))
        yield from _table(f"overlay-images/{state.IMAGES_FILE}", known.image_table, missing=images_missing)
        containers_missing = containers.missing and bool(_unrecorded(bases.containers, known.containers))
        yield from _table(f"overlay-containers/{state.CONTAINERS_FILE}", containers, missing=containers_missing)
        yield from _table(f"overlay-containers/{state.VOLATILE_CONTAINERS_FILE}", volatile_containers)

    def _unknown(self) -> Iterator[Finding]:
        known, bases = self._state, self._bases
        if not self._quiet:
            return  # their records may just be being written
        if not known.layers_lost:
            yield from (Finding("tree-unknown", f"overlay/{name}") for name in known.unrecorded)
        # Of a file that is damaged or missing, its finding says it for all.
        if known.image_table.whole and not known.image_table.missing:
            for name in _unrecorded(bases.images, known.images):
                yield Finding("tree-unknown", f"overlay-images/{name}")
        if state.whole(known.container_tables) and not known.container_tables[0].missing:
            for name in _unrecorded(bases.containers, known.containers):
                yield Finding("tree-unknown", f"overlay-containers/{name}")

    # Layers

    def _layer(self, layer: str, row: LayerRow) -> Iterator[Finding]:
        known = self._state
        if row.incomplete:
            if self._quiet:  # else it may just be being made or removed
                yield Finding("staging-left", layer, detail="the layer is incomplete")
            return
        users = known.users.get(layer, ())
        parent = None if row.parent is None else known.layers.get(row.parent)
        lost = row.parent is not None and row.parent not in known.elsewhere
        if lost and (parent is None or parent.incomplete):
            detail = f"layer {row.parent}" + ("" if parent is None else ", which is incomplete")
            yield Finding("parent-missing", layer, detail=detail, users=users)
        elif layer in known.cycles:
            yield Finding("parent-cycle", layer, users=users)
        tree = known.tree(layer)
        if tree.missing:
            yield Finding("tree-missing", layer, detail=tree.missing, users=users)
        else:
            yield from self._links_of(layer, row, users)
        committed = layer not in known.writable
        # A layer that came by its table of contents may have none; a guessed one has its digest from an image.
        if committed and row.diff_id and not row.by_contents and not tree.foreign and tree.split_lost:
            yield Finding("split-damaged", layer, detail=tree.split_lost, users=users)
        for item in row.items:
            if self._bases.layers.status(f"{layer}/{records.file_name(item.name)}") is None:
                yield Finding("record-damaged", layer, detail=f"its item {shown(item.name)} is missing", users=users)
        if layer not in known.used and not row.guessed and self._is_old(row):
            yield Finding("layer-unused", layer)

    def _links_of(self, layer: str, row: LayerRow, users: tuple[str, ...]) -> Iterator[Finding]:
        known = self._state
        detail = self._links.missing(layer)
        if detail:
            yield Finding("link-missing", layer, detail=detail, users=users)
        chain = known.chain(layer)
        if len(chain) > MAX_DEPTH:
            yield Finding("too-deep", layer, detail=f"more than {MAX_DEPTH}", users=users)
            return
        if row.guessed or not known.is_whole(layer, chain):
            return  # its parents were told from the list itself, or are lost, or a cycle
        wrong = self._links.wrong_lower(layer, chain)
        if wrong:
            yield Finding("lower-wrong", layer, detail=wrong, users=users)

    def _is_old(self, row: LayerRow) -> bool:
        """Whether nothing that is being done explains that nothing stands on a layer."""
        known = self._state
        if not state.whole((known.image_table,)) or not state.whole(known.container_tables):
            return False
        if (known.image_table.missing and _unrecorded(self._bases.images, known.images)) or (
            known.container_tables[0].missing and _unrecorded(self._bases.containers, known.containers)
        ):
            return False
        try:
            made = calendar.timegm(time.strptime(row.created[:19], "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            return True  # nothing will ever say
        return made + _UNUSED_AGE < time.time()

    # Images and containers

    def _image(self, image: ImageRow) -> Iterator[Finding]:
        known = self._state
        users = tuple(each.label for each in known.containers.values() if each.image == image.id)
        for layer in (image.top, *image.mapped):
            row = None if layer is None else known.layers.get(layer)
            if layer is not None and layer not in known.elsewhere and (row is None or row.incomplete):
                detail = f"layer {layer} is " + ("gone" if row is None else "incomplete")
                yield Finding("image-damaged", image.label, detail=detail, users=users)
        for item in image.items:
            wrong = _item(self._bases.images, image.id, item)
            if wrong:
                yield Finding("image-damaged", image.label, detail=f"its item {shown(item.name)} {wrong}", users=users)

    def _container(self, container: ContainerRow) -> Iterator[Finding]:
        known = self._state
        row = None if container.layer is None else known.layers.get(container.layer)
        if container.layer is not None and (row is None or row.incomplete):
            detail = f"its layer {container.layer} is " + ("gone" if row is None else "incomplete")
            yield Finding("record-wrong", container.label, detail=detail)
        # What a damaged file no longer says is not another finding.
        told = known.image_table.whole and not known.image_table.missing
        known_image = container.image is None or container.image in known.images or container.image in known.elsewhere
        if told and not known_image:
            yield Finding("record-wrong", container.label, detail=f"its image {container.image} is gone")
        for item in container.items:
            wrong = _item(self._bases.containers, container.id, item)
            if wrong:
                yield Finding("record-damaged", container.label, detail=f"its item {shown(item.name)} {wrong}")

    # What programs leave

    def _leftovers(self) -> Iterator[Finding]:
        overlay = self._bases.overlay
        for name in self._state.trials:
            yield Finding("staging-left", f"overlay/{name}")
        for name in overlay.names(state.STAGING):
            # overlay.go, stagingLockFile: held by whoever unpacks in it
            if not is_locked(overlay, f"{state.STAGING}/{name}/staging.lock"):
                yield Finding("staging-left", f"overlay/{state.STAGING}/{name}")
        for base, called in ((overlay, "overlay"), (self._bases.layers, "overlay-layers")):
            for name in base.names(state.TEMPORARY):
                prefix, _, last = name.rpartition("temp-dir-")
                if last and not prefix and not is_locked(base, f"{state.TEMPORARY}/lock-{last}"):
                    yield Finding("staging-left", f"{called}/{state.TEMPORARY}/{name}")
        for base, called in (
            (self._bases.layers, "overlay-layers"),
            (self._bases.images, "overlay-images"),
            (self._bases.containers, "overlay-containers"),
        ):
            for name in base.names():
                if name.startswith(_TEMPORARY_FILE):
                    yield Finding("staging-left", f"{called}/{name}")


def _table(
    thing: str, table: Table[LayerRow] | Table[ImageRow] | Table[ContainerRow], *, missing: bool = False
) -> Iterator[Finding]:
    if missing:
        yield Finding("record-damaged", thing, detail="it is missing")
    if table.damage:
        yield Finding("record-damaged", thing, detail=table.damage)
    for name, detail in table.wrong:
        yield Finding("record-damaged", thing, detail=f"{name}: {detail}" if name else detail)


def _unrecorded(base: Base, rows: Container[str]) -> list[str]:
    """The directories of images or containers that have no record (``GarbageCollect`` in ``images.go``)."""
    return [
        name
        for name in base.names()
        if len(name) == 64 and not name.strip("0123456789abcdef") and name not in rows and base.is_directory(name)
    ]


def _item(base: Base, owner: str, item: Item) -> str:
    """What is wrong with a file beside a record, in words; ``""`` if nothing is."""
    path = f"{owner}/{records.file_name(item.name)}"
    status = base.status(path)
    if status is None:
        return "is missing"
    if item.size is not None and status.st_size != item.size:
        return f"has {status.st_size} bytes instead of {item.size}"
    if item.digest is None:
        return ""
    algorithm, _, expected = item.digest.partition(":")
    digest = hashlib.new(algorithm)
    try:
        for chunk in base.chunks(path, _ITEM_LIMIT):
            digest.update(chunk)
    except FileNotFoundError:
        return "is missing"
    except Damaged as error:
        return f"is damaged: {error}"
    if digest.hexdigest() == expected or _is_signed(base, path, item):
        return ""
    return "is not what its digest says"


def _is_signed(base: Base, path: str, item: Item) -> bool:
    """Whether it is a manifest of Docker's schema 1, whose digest is that of a part of it."""
    if not item.name.startswith("manifest"):
        return False
    try:
        document = records.load(base.read(path, state.DOCUMENT_LIMIT))
    except (FileNotFoundError, Damaged):
        return False
    return isinstance(document, dict) and document.get("schemaVersion") == 1 and "signatures" in document

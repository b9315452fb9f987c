"""Where the bytes of a damaged layer are: in its own tree, in the blob that it was unpacked from, in other layers."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack

from onlap import errors
from onlap.catalog.disk.layout import QUARANTINE
from onlap.catalog.records import COMMITTED, Condition, Record
from onlap.check.refill import open_in_tree
from onlap.content.store import ContentStore
from onlap.images.index import Image, Index
from onlap.images.records import LABEL_LAYER
from onlap.snapshots.contexts import prepared
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.snapshots.transfer.archives import apply_layer
from onlap.syscalls.files import is_directory
from onlap.trees.manifest import Entry
from onlap.trees.walk import opened

# Places of one content that are tried: each is read, and the first that is whole is taken.
_ENOUGH = 8
# Fetches what is damaged or gone of an image, by its name.
Fetch = Callable[[str], object]


class Sources:
    """What one layer can be made of; used inside a ``with`` block.

    Args:
        snapshotter: of the root.
        content: of the root.
        record: the committed snapshot of the layer.
        listed: its manifest.
        fetch: the registry, as the last of the sources; None to do without it.
    """

    def __init__(
        self,
        snapshotter: RecordedSnapshotter,
        content: ContentStore,
        record: Record,
        listed: Collection[Entry] = (),
        fetch: Fetch | None = None,
    ) -> None:
        self.snapshotter = snapshotter
        self.content = content
        self.record = record
        self._fetch = fetch
        self._stack = ExitStack()
        self._groups: dict[int, list[str]] = {}
        for entry in listed:
            if entry.link:
                self._groups.setdefault(entry.link, []).append(entry.path)
        self._wanted = {(entry.digest, entry.size) for entry in listed if entry.size}
        self._unpacked: list[tuple[str, str]] | None = None
        self._elsewhere: dict[tuple[str, int], list[tuple[int, str]]] | None = None

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def candidates(self, entry: Entry) -> Iterator[tuple[str, int]]:
        """Where the bytes of a file may be: what to call the place, and an open file."""
        layout = self.snapshotter.catalog.layout
        own = self._groups.get(entry.link) or [entry.path]
        for path in own:
            yield from _open("the layer itself", layout.tree(self.record.id), path)
        aside = f"{layout.snapshot(self.record.id)}/{QUARANTINE}"
        for name in sorted(os.listdir(aside)) if is_directory(aside) else ():
            for path in own:
                yield from _open(f"{QUARANTINE}/{name}", f"{aside}/{name}/fs", path)
        for where, tree in self.unpacked():
            yield from _open(where, tree, entry.path)
        for identifier, path in self._others().get((entry.digest, entry.size), ()):
            yield from _open(f"the layer {identifier}", layout.tree(identifier), path)
        if self._fetch is not None and not self.unpacked():
            for where, tree in self.unpacked(fetch=True):
                yield from _open(where, tree, entry.path)

    def unpacked(self, *, fetch: bool = False) -> list[tuple[str, str]]:
        """The layer, unpacked again from its blob: what to call it, and its tree; none where there is no whole blob.

        Args:
            fetch: fetch the blob where it is damaged or gone.
        """
        if self._unpacked is None or (fetch and not self._unpacked):
            self._unpacked = []
            diff_id = self.record.labels.get(LABEL_LAYER)
            for image in Index(self.snapshotter, self.content).list() if diff_id else ():
                for layer, found in zip(image.layers, image.diff_ids, strict=True):
                    if found == diff_id and not self._unpacked:
                        with contextlib.suppress(errors.OnlapError):  # then it is no source
                            self._unpack(image, layer.digest, found, fetch)
        return self._unpacked

    def _unpack(self, image: Image, digest: str, diff_id: str, fetch: bool) -> None:
        if not self.content.is_whole(digest):
            if not fetch or self._fetch is None:
                return
            self._fetch(image.name)
        parent = self.snapshotter.parent(self.record)
        key = self._stack.enter_context(
            prepared(self.snapshotter, parent.name if parent is not None else None, "repair")
        )
        apply_layer(self.snapshotter, key, self.content.path(digest), digest=digest, diff_id=diff_id)
        assert self._unpacked is not None
        tree = self.snapshotter.catalog.layout.tree(self.snapshotter.record(key).id)
        self._unpacked.append((f"the blob {digest}", tree))

    def _others(self) -> dict[tuple[str, int], list[tuple[int, str]]]:
        """By digest and size: other layers, and the paths there, by their manifests."""
        if self._elsewhere is None:
            self._elsewhere = {}
            catalog = self.snapshotter.catalog
            for record in catalog.walk(None, Condition("s.kind = ?", (COMMITTED,))):
                with contextlib.suppress(errors.OnlapError):  # one that is damaged is no source
                    for entry in catalog.manifests.entries(record) or ():
                        if (entry.digest, entry.size) in self._wanted:
                            found = self._elsewhere.setdefault((entry.digest, entry.size), [])
                            if len(found) < _ENOUGH:
                                found.append((record.id, entry.path))
        return self._elsewhere


def _open(where: str, tree: str, path: str) -> Iterator[tuple[str, int]]:
    with ExitStack() as stack:
        try:
            top = stack.enter_context(opened(tree))
            fd = open_in_tree(top, path)
            stack.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return
        except OSError:
            return  # it is not there
        yield where, fd

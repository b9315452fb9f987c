"""The history of an image, how two images differ, where each file of an image comes from and what it hides.

All of it is read from the layers' directories; nothing is mounted. Layers are numbered from 1 for the lowest.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from onlap import errors
from onlap.errors import shown
from onlap.images.inspection import origins
from onlap.images.inspection.origins import Hidden, Tree
from onlap.layers.apply.lowers import Lowers
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.compare import ADDED, DELETED, MODIFIED, Change
from onlap.trees.meta import Meta

if TYPE_CHECKING:
    from onlap.images import Image
    from onlap.images.spec.model import Config, History


class Step(NamedTuple):
    """One step of an image's history.

    Attributes:
        command: what was done, in the words of the tool that did it; empty where the history does not say.
        created: when, in the form of RFC 3339.
        author: who did it.
        comment: further remarks.
        layer: the number of the layer that it made; None where it made none. So are the next five.
        digest: of the layer's blob.
        size: of the blob, in bytes.
        added: files, directories and links that the layer added.
        changed: those that it changed.
        deleted: those that it removed; of a directory only the directory counts.
    """

    command: str
    created: str | None
    author: str
    comment: str
    layer: int | None = None
    digest: str | None = None
    size: int | None = None
    added: int | None = None
    changed: int | None = None
    deleted: int | None = None


class Difference(NamedTuple):
    """A path that differs between two images.

    Attributes:
        change: how.
        before: bytes of content that were removed; for a directory, of everything in it. A file with several names
            counts once, and only when all of its names have changed or are gone.
        after: bytes of content that were added; likewise.
    """

    change: Change
    before: int
    after: int


class File(NamedTuple):
    """A file of an image, or one that a layer has and the image does not show.

    Attributes:
        path: from the top, without ``/`` before the first name.
        layer: the layer that it comes from; None where a later layer removed it.
        size: its bytes of content.
        hid: the files that it hides in the layers below, the lowest first.
    """

    path: str
    layer: int | None
    size: int
    hid: tuple[Hidden, ...] = ()

    @property
    def wasted(self) -> int:
        """Bytes that are stored and transferred, but never visible."""
        return sum(each.size for each in self.hid)


class LayerTotal(NamedTuple):
    """The totals of one layer.

    Attributes:
        layer: its number.
        files: how many files it has that are not directories.
        size: their bytes of content; further names of a file do not count.
        wasted: how many of these bytes the layers above hide.
    """

    layer: int
    files: int
    size: int
    wasted: int


class Files(NamedTuple):
    """Every file of an image, sorted by path, and the layers' totals."""

    files: list[File]
    layers: list[LayerTotal]


def history(snapshotter: RecordedSnapshotter, image: Image, config: Config) -> Iterator[Step]:
    """The steps of an image's history, the first one first.

    Raises:
        NotFound: a layer is not unpacked.
        OnlapError: of another kind: the filesystem failed.
    """
    from onlap.images.spec.model import History

    number = 0
    for step in config.history or ():
        if step.empty_layer or number >= len(image.layers):
            yield Step(step.created_by, step.created, step.author, step.comment)
        else:
            number += 1
            yield _layer_step(snapshotter, image, number, step)
    # The history is optional, and may be incomplete (config.md: "history ... OPTIONAL").
    while number < len(image.layers):
        number += 1
        yield _layer_step(snapshotter, image, number, History())


def _layer_step(snapshotter: RecordedSnapshotter, image: Image, number: int, step: History) -> Step:
    counts = {ADDED: 0, MODIFIED: 0, DELETED: 0}
    for change in snapshotter.diff(image.chain_ids[number - 1]):
        # A directory on the way to a change has not changed itself.
        if change.kind != MODIFIED or change.what:
            counts[change.kind] += 1
    layer = image.layers[number - 1]
    made = counts[ADDED], counts[MODIFIED], counts[DELETED]
    return Step(step.created_by, step.created, step.author, step.comment, number, layer.digest, layer.size, *made)


def diff(snapshotter: RecordedSnapshotter, one: str, other: str) -> Iterator[Difference]:
    """How the tree of one snapshot differs from that of another, sorted by path, with bytes.

    Args:
        snapshotter: of the root.
        one: the name of a snapshot: the topmost layer of an image.
        other: likewise.

    Raises:
        NotFound: there is no such snapshot.
        OnlapError: of another kind: the filesystem failed.
    """
    changed = _Changed(snapshotter, one, other)
    with closing(_Side(snapshotter, one, changed)) as before, closing(_Side(snapshotter, other, changed)) as after:
        for change in snapshotter.diff(other, base=one):
            gone = change.before if not _is_replaced(change) else None
            size = before.below(change.path) if gone is None and change.before else before.at(change.path, gone)
            yield Difference(change, size, after.at(change.path, change.after))


def _is_replaced(change: Change) -> bool:
    """Whether it was a directory, and its content has no changes of its own."""
    return change.before is not None and change.before.is_dir and not (change.after is not None and change.after.is_dir)


class _Changed:
    """The paths that differ between two snapshots; compared when the first file with several names comes.

    Args:
        snapshotter: of the root.
        one: the name of a snapshot.
        other: likewise.
    """

    def __init__(self, snapshotter: RecordedSnapshotter, one: str, other: str) -> None:
        self._snapshotter = snapshotter
        self._one, self._other = one, other
        self._paths: frozenset[str] | None = None
        self._replaced: frozenset[str] = frozenset()

    def __contains__(self, path: str) -> bool:
        if self._paths is None:
            changes = list(self._snapshotter.diff(self._other, base=self._one))
            self._paths = frozenset(change.path for change in changes)
            self._replaced = frozenset(change.path for change in changes if _is_replaced(change))
        if path in self._paths:
            return True
        return any(path[:end] in self._replaced for end, letter in enumerate(path) if letter == "/")


class _Side:
    """The content on one side of a difference; a file with several names counts once, unless one stays the same.

    Args:
        snapshotter: of the root.
        name: of the snapshot.
        changed: the paths that differ.

    Raises:
        NotFound: there is no such snapshot.
    """

    def __init__(self, snapshotter: RecordedSnapshotter, name: str, changed: _Changed) -> None:
        self._snapshotter = snapshotter
        self._name = name
        self._changed = changed
        self._seen: set[tuple[int, int]] = set()
        self._names: defaultdict[tuple[int, int], list[str]] | None = None
        layers = snapshotter.layers(snapshotter.record(name))
        with snapshotter.translated("measure snapshot", name):
            self._tree = Lowers(layers, snapshotter.markers)

    def close(self) -> None:
        """Close all layers."""
        self._tree.close()

    def at(self, path: str, meta: Meta | None) -> int:
        """Bytes of the file at ``path`` that were added or removed."""
        if meta is None or not stat.S_ISREG(meta.mode) or not meta.size:
            return 0
        with self._snapshotter.translated("measure snapshot", self._name):
            directory, _, name = path.rpartition("/")
            found = self._tree.lookup(directory, name)
            return 0 if found is None else self._own(path, found.status)

    def below(self, path: str) -> int:
        """Bytes of all files below the directory at ``path`` that were added or removed."""
        with self._snapshotter.translated("measure snapshot", self._name):
            return sum(self._own(each, status) for each, status in self._files(path))

    def _own(self, path: str, status: os.stat_result) -> int:
        if not stat.S_ISREG(status.st_mode):
            return 0
        if status.st_nlink > 1:
            file = status.st_dev, status.st_ino
            if file in self._seen:
                return 0
            self._seen.add(file)
            if not all(name in self._changed for name in self._names_of(file)):
                return 0
        return status.st_size

    def _names_of(self, file: tuple[int, int]) -> list[str]:
        if self._names is None:
            self._names = defaultdict(list)
            for path, status in self._files(""):
                if status.st_nlink > 1:
                    self._names[status.st_dev, status.st_ino].append(path)
        return self._names[file]

    def _files(self, path: str) -> Iterator[tuple[str, os.stat_result]]:
        """All files below a directory, without recursion: a tree may be deeper than Python's stack."""
        left = [path]
        while left:
            above = left.pop()
            here = self._tree.directory(above)
            if here is None:
                raise FileNotFoundError(errno.ENOENT, "the directory vanished", above)
            for found in [here.lookup(name) for name in here.names()]:
                if found is None:
                    continue
                inside = f"{above}/{found.name}" if above else found.name
                if stat.S_ISDIR(found.status.st_mode):
                    left.append(inside)
                else:
                    yield inside, found.status


def files(snapshotter: RecordedSnapshotter, layers: Sequence[str], path: str | None = None) -> Files:
    """Where each file of an image comes from, and what it hides.

    A file that a layer repeats without any change counts as wasted on an overlay root; on a root of native copies it is
    not found.

    Args:
        snapshotter: of the root.
        layers: the names of the snapshots, lowest first: the image's chain IDs.
        path: only this file, or what is in this directory.

    Raises:
        NotFound: a layer is not unpacked; or no layer has anything at the path.
        OnlapError: of another kind: the filesystem failed.
    """
    tree = Tree()
    for number, name in enumerate(layers, 1):
        origins.add_layer(tree, snapshotter, name, number)
    shows = tree.files()
    hid = tree.hidden
    wanted = None if path is None else os.path.normpath(path).strip("/")
    found = []
    for each in sorted(shows.keys() | hid.keys(), key=os.fsencode):
        if wanted is None or wanted in ("", ".", each) or each.startswith(wanted + "/"):
            origin = shows.get(each)
            below = tuple(hid.get(each, ()))
            found.append(File(each, None, 0, below) if origin is None else File(each, origin.layer, origin.size, below))
    if path is not None and not found and not tree.has_directory(wanted or ""):
        raise errors.NotFound(f"there is no {shown(path)} in the image", key=path, hint="see: onlap image files IMAGE")
    totals = [
        LayerTotal(number, tree.counts[number].files, tree.counts[number].size, _wasted(hid, number))
        for number in range(1, len(layers) + 1)
    ]
    return Files(found, totals)


def _wasted(hid: dict[str, list[Hidden]], layer: int) -> int:
    return sum(each.size for below in hid.values() for each in below if each.layer == layer)

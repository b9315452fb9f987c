"""Looking into images: what a step did, how two differ, where each file comes from and what it hides.

All of it is read from the layers' directories; nothing is mounted. Layers have numbers, from 1 for the lowest.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from onlap import errors
from onlap.errors import shown
from onlap.images.inspection import origins
from onlap.images.inspection.origins import Hidden, Tree
from onlap.overlayfs.merged import MergedDirectory, Stack
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.compare import ADDED, DELETED, MODIFIED, Change
from onlap.trees.meta import Meta

if TYPE_CHECKING:
    from onlap.images import Image
    from onlap.images.spec.model import Config, History


class Step(NamedTuple):
    """One step of an image's making.

    Attributes:
        command: what was done, in the words of the tool that did it; empty where nothing is said.
        created: when, as RFC 3339 has it.
        author: who did it.
        comment: what else is said.
        layer: the number of the layer that it made; None where it made none. The next four likewise.
        digest: of the layer's blob.
        size: of the blob, in bytes.
        added: files, directories and links that the layer added.
        changed: of which it changed anything.
        deleted: that it removed; of a directory only the directory counts.
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
        before: bytes of content that went with it; of a removed directory with all that was in it. Of a file with
            several names they count once, and only when all of them are changed or gone.
        after: bytes that came with it, likewise.
    """

    change: Change
    before: int
    after: int


class File(NamedTuple):
    """A file of an image, or one that some layer has and the image does not show.

    Attributes:
        path: from the top, without ``/`` before the first name.
        layer: the layer that it comes from; None where a later one removed it.
        size: its bytes of content.
        hid: what lies below it, unseen, the lowest first.
    """

    path: str
    layer: int | None
    size: int
    hid: tuple[Hidden, ...] = ()

    @property
    def wasted(self) -> int:
        """Bytes that are stored and transferred, and that nobody sees."""
        return sum(each.size for each in self.hid)


class LayerTotal(NamedTuple):
    """One layer in figures.

    Attributes:
        layer: its number.
        files: how many it holds that are not directories.
        size: their bytes of content; another name of the same file counts nothing.
        wasted: how many of them layers above hide.
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
    """The steps of an image's making, the first one first.

    Raises:
        NotFound: a layer is not unpacked.
        OnlapError: of another kind, for what the filesystem says.
    """
    number = 0
    for said in config.history or ():
        if said.empty_layer or number >= len(image.layers):
            yield Step(said.created_by, said.created, said.author, said.comment)
        else:
            number += 1
            yield _layer_step(snapshotter, image, number, said)
    # Nothing forces a history to be there, or to be whole (config.md: "history ... OPTIONAL").
    while number < len(image.layers):
        number += 1
        yield _layer_step(snapshotter, image, number, None)


def _layer_step(snapshotter: RecordedSnapshotter, image: Image, number: int, said: History | None) -> Step:
    counts = {ADDED: 0, MODIFIED: 0, DELETED: 0}
    for change in snapshotter.diff(image.chain_ids[number - 1]):
        # A directory that is only on the way to a change is none itself.
        if change.kind != MODIFIED or change.what:
            counts[change.kind] += 1
    layer = image.layers[number - 1]
    command, created, author, comment = "", None, "", ""
    if said is not None:
        command, created, author, comment = said.created_by, said.created, said.author, said.comment
    return Step(
        command,
        created,
        author,
        comment,
        number,
        layer.digest,
        layer.size,
        counts[ADDED],
        counts[MODIFIED],
        counts[DELETED],
    )


def diff(snapshotter: RecordedSnapshotter, one: str, other: str) -> Iterator[Difference]:
    """How the tree of one snapshot differs from that of another, sorted by path, with bytes.

    Args:
        snapshotter: of the root.
        one: the name of a snapshot: the topmost layer of an image.
        other: likewise.

    Raises:
        NotFound: there is no such snapshot.
        OnlapError: of another kind, for what the filesystem says.
    """
    changed = _Changed(snapshotter, one, other)
    with _Side(snapshotter, one, changed) as before, _Side(snapshotter, other, changed) as after:
        for change in snapshotter.diff(other, base=one):
            gone = change.before if not _is_replaced(change) else None
            size = before.below(change.path) if gone is None and change.before else before.at(change.path, gone)
            yield Difference(change, size, after.at(change.path, change.after))


def _is_replaced(change: Change) -> bool:
    """Whether it was a directory, whose content the change does not name."""
    return change.before is not None and change.before.is_dir and not (change.after is not None and change.after.is_dir)


class _Changed:
    """Which paths differ between two snapshots; found out when the first file with several names is met.

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
    """The content on one side of a difference; a file with several names counts once, and not while one of them stays.

    A context manager; raises NotFound when there is no such snapshot.

    Args:
        snapshotter: of the root.
        name: of the snapshot.
        changed: the paths that differ.
    """

    def __init__(self, snapshotter: RecordedSnapshotter, name: str, changed: _Changed) -> None:
        self._snapshotter = snapshotter
        self._name = name
        self._changed = changed
        self._seen: set[tuple[int, int]] = set()
        self._names: defaultdict[tuple[int, int], list[str]] | None = None
        layers = snapshotter.layers(snapshotter.record(name))
        with snapshotter.translated("measure snapshot", name):
            self._stack = Stack(layers, snapshotter.markers)
            self._top = self._here = self._stack.top()
        self._path = ""

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._stack.close()

    def at(self, path: str, meta: Meta | None) -> int:
        """Bytes of the file at ``path`` that came or went with it."""
        if meta is None or not stat.S_ISREG(meta.mode) or not meta.size:
            return 0
        with self._snapshotter.translated("measure snapshot", self._name):
            directory, _, name = path.rpartition("/")
            found = self._open(directory).lookup(name)
            return 0 if found is None else self._own(path, found.status)

    def below(self, path: str) -> int:
        """The same of all files in the directory at ``path``."""
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
        """All below a directory that are none, without recursion: a tree may be deeper than Python's stack."""
        left = [path]
        while left:
            above = left.pop()
            here = self._open(above)
            for found in [here.lookup(name) for name in here.names()]:
                if found is None:
                    continue
                inside = f"{above}/{found.name}" if above else found.name
                if stat.S_ISDIR(found.status.st_mode):
                    left.append(inside)
                else:
                    yield inside, found.status

    def _open(self, path: str) -> MergedDirectory:
        """A directory, valid until another is asked for: most questions are about neighbours."""
        if path != self._path:
            here = self._top
            for name in path.split("/") if path else ():
                above, below = here, here.open(name)
                if above is not self._top:
                    above.close()
                if below is None:
                    raise FileNotFoundError(errno.ENOENT, "the directory vanished", path)
                here = below
            self._close()
            self._path, self._here = path, here
        return self._here

    def _close(self) -> None:
        if self._here is not self._top:
            self._here.close()
        self._path, self._here = "", self._top


def files(snapshotter: RecordedSnapshotter, layers: Sequence[str], path: str | None = None) -> Files:
    """Where each file of an image comes from, and what it hides.

    On a root of native copies a file that a layer holds once more without any change does not show; on an overlay root
    it does, as what it is: wasted.

    Args:
        snapshotter: of the root.
        layers: the names of the snapshots, lowest first: the image's chain IDs.
        path: only this file, or what is in this directory.

    Raises:
        NotFound: a layer is not unpacked; or there is nothing at the path, and never was.
        OnlapError: of another kind, for what the filesystem says.
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

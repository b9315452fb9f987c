"""Looking into images: what a step did, how two differ, where each file comes from and what it hides.

All of it is read from the layers' directories; nothing is mounted. Layers have numbers, from 1 for the lowest.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from onlap import errors
from onlap.errors import shown
from onlap.images import origins
from onlap.images.origins import Hidden, Tree
from onlap.overlayfs.merged import MergedDirectory, Stack
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.compare import ADDED, DELETED, MODIFIED, Change
from onlap.trees.meta import Meta

if TYPE_CHECKING:
    from onlap.images import Image
    from onlap.images.model import Config, History


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
        before: bytes of content that were there; of a removed directory with all that was in it.
        after: bytes that are there now.
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
        files: how many it holds that are no directories.
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
    for change in snapshotter.changes(image.chain_ids[number - 1]):
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
    before: Stack | None = None
    try:
        for change in snapshotter.changes(one, other):
            gone = change.before
            if gone is not None and gone.is_dir and (change.after is None or not change.after.is_dir):
                with snapshotter.translated("measure snapshot", one):
                    if before is None:
                        before = Stack(snapshotter.layers(snapshotter.record(one)), snapshotter.markers)
                    size = _size_below(before, change.path)
            else:
                size = _content(gone)
            yield Difference(change, size, _content(change.after))
    finally:
        if before is not None:
            before.close()


def _content(meta: Meta | None) -> int:
    return meta.size if meta is not None and stat.S_ISREG(meta.mode) else 0


def _size_below(stack: Stack, path: str) -> int:
    """Bytes of content in the directory at ``path`` of a stack."""
    here: MergedDirectory | None = stack.top()
    for name in path.split("/"):
        above = here
        if above is None:
            return 0
        here = above.open(name)
        above.close()
    if here is None:
        return 0
    with here:
        return _sum(here)


def _sum(directory: MergedDirectory) -> int:
    total = 0
    for name in directory.names():
        found = directory.lookup(name)
        if found is None:
            continue
        if stat.S_ISREG(found.status.st_mode):
            total += found.status.st_size
        elif stat.S_ISDIR(found.status.st_mode):
            below = directory.open(name)
            if below is not None:
                with below:
                    total += _sum(below)
    return total


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

"""Layers merged in memory: which layer each visible file comes from, and what it hides.

An overlay's layers are walked as they are, so that copies without any change are found. Where directories were renamed
(redirect_dir), and on native roots, whose layers are whole trees, the differences between layers are used.
"""

from __future__ import annotations

import stat
from collections import defaultdict
from typing import NamedTuple

from onlap.overlayfs.markers import OPAQUE_XATTR_WHITEOUTS, OPAQUE_YES, Markers, get_xattr, is_whiteout
from onlap.snapshots.overlay import OverlaySnapshotter
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.compare import DELETED
from onlap.trees.walk import Entry, opened, path_of, walk


class Hidden(NamedTuple):
    """A file that a layer has and a later one hides.

    Attributes:
        layer: the number of the layer that has it.
        size: its bytes of content; 0 for a further name of a file that is counted already.
        by: the layer that hides it.
    """

    layer: int
    size: int
    by: int


class Origin(NamedTuple):
    """A visible file.

    Attributes:
        layer: where it comes from.
        size: its bytes of content.
        own: the same; 0 for a further name of a file that is counted already.
    """

    layer: int
    size: int
    own: int


class Count(NamedTuple):
    """How much a layer has: names of files, and bytes of content."""

    files: int = 0
    size: int = 0


class Tree:
    """The merged tree, layer by layer from the lowest.

    Attributes:
        hidden: the hidden files, by path.
        counts: of each layer.
    """

    def __init__(self) -> None:
        self.hidden: defaultdict[str, list[Hidden]] = defaultdict(list)
        self.counts: defaultdict[int, Count] = defaultdict(Count)
        self._top: _Directory = {}

    def put(self, path: str, layer: int, size: int, own: int) -> None:
        """Add a layer's file that is not a directory."""
        directory, name = self._parent(path, layer)
        self._hide(directory, name, path, layer)
        directory[name] = Origin(layer, size, own)
        count = self.counts[layer]
        self.counts[layer] = Count(count.files + 1, count.size + own)

    def put_directory(self, path: str, layer: int, *, opaque: bool = False) -> None:
        """Add a layer's directory; an opaque one hides those below."""
        directory, name = self._parent(path, layer)
        if opaque or not isinstance(directory.get(name), dict):
            self._hide(directory, name, path, layer)
            directory[name] = {}

    def remove(self, path: str, layer: int) -> None:
        """Remove what is at ``path``, with all below it, as a layer does."""
        directory, name = self._parent(path, layer)
        self._hide(directory, name, path, layer)

    def files(self) -> dict[str, Origin]:
        """Every visible file that is not a directory, by its path."""
        found: dict[str, Origin] = {}
        todo: list[tuple[str, _Directory]] = [("", self._top)]
        while todo:
            prefix, directory = todo.pop()
            for name, node in directory.items():
                if isinstance(node, dict):
                    todo.append((f"{prefix}{name}/", node))
                else:
                    found[prefix + name] = node
        return found

    def has_directory(self, path: str) -> bool:
        """Whether a directory is visible at ``path``."""
        here: _Node | None = self._top
        for name in path.split("/"):
            if name in ("", "."):
                continue
            if not isinstance(here, dict):
                return False
            here = here.get(name)
        return isinstance(here, dict)

    def _parent(self, path: str, layer: int) -> tuple[_Directory, str]:
        *above, name = path.split("/")
        here = self._top
        for number, step in enumerate(above):
            below = here.get(step)
            if not isinstance(below, dict):
                # A layer has the directories above a file first: this is a file that its directory replaces.
                self._hide(here, step, "/".join(above[: number + 1]), layer)
                below = here[step] = {}
            here = below
        return here, name

    def _hide(self, directory: _Directory, name: str, path: str, layer: int) -> None:
        node = directory.pop(name, None)
        todo = [(path, node)] if node is not None else []
        while todo:
            where, each = todo.pop()
            if isinstance(each, dict):
                todo += [(f"{where}/{below}", inside) for below, inside in each.items()]
            else:
                self.hidden[where].append(Hidden(each.layer, each.own, layer))


_Directory = dict[str, "_Node"]
_Node = Origin | _Directory


def add_layer(tree: Tree, snapshotter: RecordedSnapshotter, name: str, number: int) -> None:
    """Merge the layer of a committed snapshot into a tree that has all layers below it.

    Args:
        tree: the tree.
        snapshotter: of the root.
        name: of the snapshot.
        number: of the layer.

    Raises:
        NotFound: there is no such snapshot.
        OnlapError: of another kind: the filesystem failed.
    """
    if isinstance(snapshotter, OverlaySnapshotter) and not snapshotter.properties.redirect_dir:
        record = snapshotter.record(name)
        with snapshotter.catalog.hold([record.id]), snapshotter.translated("look into snapshot", name):
            _add_directory(tree, snapshotter.catalog.layout.tree(record.id), snapshotter.markers, number)
        return
    for change in snapshotter.diff(name):
        if change.path == ".":
            continue
        if change.kind == DELETED or change.after is None:
            tree.remove(change.path, number)
        elif change.after.is_dir:
            tree.put_directory(change.path, number)
        elif change.what or change.before is None:
            size = change.after.size if stat.S_ISREG(change.after.mode) else 0
            tree.put(change.path, number, size, size)


def _add_directory(tree: Tree, top: str, markers: Markers, number: int) -> None:
    linked: set[tuple[int, int]] = set()
    # Directories whose empty files may be whiteouts, by their paths (overlayfs.rst, "whiteouts").
    with_xattr_whiteouts: set[str] = set()
    with opened(top) as fd:
        if get_xattr(fd, markers.opaque) == OPAQUE_XATTR_WHITEOUTS:
            with_xattr_whiteouts.add("")
        for entry in walk(fd):
            status = entry.status
            if stat.S_ISDIR(status.st_mode):
                opaque = get_xattr(path_of(entry.dir_fd, entry.name), markers.opaque)
                if opaque == OPAQUE_XATTR_WHITEOUTS:
                    with_xattr_whiteouts.add(entry.path)
                tree.put_directory(entry.path, number, opaque=opaque == OPAQUE_YES)
            elif is_whiteout(status) or _is_xattr_whiteout(entry, with_xattr_whiteouts, markers):
                tree.remove(entry.path, number)
            else:
                size = status.st_size if stat.S_ISREG(status.st_mode) else 0
                again = status.st_nlink > 1 and (status.st_dev, status.st_ino) in linked
                linked.add((status.st_dev, status.st_ino))
                tree.put(entry.path, number, size, 0 if again else size)


def _is_xattr_whiteout(entry: Entry, directories: set[str], markers: Markers) -> bool:
    if entry.path.rpartition("/")[0] not in directories:
        return False
    if entry.status.st_size or not stat.S_ISREG(entry.status.st_mode):
        return False
    return get_xattr(path_of(entry.dir_fd, entry.name), markers.whiteout) is not None

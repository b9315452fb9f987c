"""A stack of layers by paths, such as that below the layer being written; read only when needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from onlap.layers import paths
from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import Found, MergedDirectory, Stack

# The size of the cache of directories, in parts of some 200 bytes each; a path may count as many.
_MAX_PARTS = 1 << 16
_PART = 200


class Lowers:
    """The merged view of layers, without what a new layer on them hides.

    Args:
        layers: their top directories, topmost first; may be empty.
        markers: the flavour of the markers in them.
        beside: another, with which this one shares the limit of open descriptors.

    Raises:
        OSError: a layer cannot be opened.
    """

    def __init__(self, layers: Sequence[str], markers: Markers | None, *, beside: Lowers | None = None) -> None:
        self._stack: Stack | None = None
        self._hidden = paths.PathSet()
        self._known: OrderedDict[str, MergedDirectory | None] = OrderedDict()
        self._parts = 0
        if layers and markers is not None:
            self._stack = Stack(layers, markers, beside=beside._stack if beside is not None else None)

    def __bool__(self) -> bool:
        return self._stack is not None

    def close(self) -> None:
        """Close all layers."""
        self._known.clear()
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def hide(self, path: str) -> None:
        """Hide everything at ``path`` and below: the new layer has an opaque directory there."""
        self._hidden.add(path)

    def show(self, path: str) -> None:
        """Undo this at ``path`` and below: the new layer's opaque directories there were removed."""
        self._hidden.discard_below(path)

    def directory(self, path: str) -> MergedDirectory | None:
        """The merged directory at ``path``; None if there is none."""
        if self._stack is None or (self._hidden and self._hidden.covers(path)):
            return None
        # From the nearest directory in the cache: usually one step, however deep the path is.
        here, names = path, []
        while here and here not in self._known:
            here, _, name = here.rpartition("/")
            names.append(name)
        if here:
            self._known.move_to_end(here)
        directory = self._known[here] if here else self._stack.top()
        while names and directory is not None:
            name = names.pop()
            here = paths.join(here, name)
            directory = directory.open(name)
            self._keep(here, directory)
        if names:
            self._keep(path, None)
        return directory

    def lookup(self, directory: str, name: str) -> Found | None:
        """The file ``name`` in ``directory``; None if there is none."""
        if self._stack is None or (self._hidden and self._hidden.covers(paths.join(directory, name))):
            return None
        merged = self.directory(directory)
        return None if merged is None else merged.lookup(name)

    def _keep(self, path: str, directory: MergedDirectory | None) -> None:
        self._known[path] = directory
        self._parts += _cost(path, directory)
        while self._parts > _MAX_PARTS and len(self._known) > 1:
            oldest, of = self._known.popitem(last=False)
            self._parts -= _cost(oldest, of)


def _cost(path: str, directory: MergedDirectory | None) -> int:
    return 1 + len(path) // _PART + (len(directory.parts) if directory is not None else 0)

"""What lies below the layer that is written: looked up only when it matters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from onlap.layers import paths
from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import Found, MergedDirectory, Stack

# Parts of directories that are remembered, of some 200 bytes each.
_MAX_PARTS = 1 << 16


class Lowers:
    """The merged view of the layers below, with what the new layer hides of it.

    Args:
        layers: their top directories, topmost first; there may be none.
        markers: the flavour of the markers in them.

    Raises:
        OSError: a layer cannot be opened.
    """

    def __init__(self, layers: Sequence[str], markers: Markers | None) -> None:
        self._stack: Stack | None = None
        self._hidden = paths.PathSet()
        self._known: OrderedDict[str, MergedDirectory | None] = OrderedDict()
        self._parts = 0
        if layers and markers is not None:
            self._stack = Stack(layers, markers)

    def __bool__(self) -> bool:
        return self._stack is not None

    def close(self) -> None:
        """Close all layers."""
        self._known.clear()
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def hide(self, path: str) -> None:
        """From now on nothing shows at ``path`` and below: the new layer has an opaque directory there."""
        self._hidden.add(path)

    def show(self, path: str) -> None:
        """What the new layer had at ``path`` and below was removed, and its opaque marks with it."""
        self._hidden.discard_below(path)

    def directory(self, path: str) -> MergedDirectory | None:
        """The merged directory at ``path``; None where there is none."""
        if self._stack is None or (self._hidden and self._hidden.covers(path)):
            return None
        if path in self._known:
            self._known.move_to_end(path)
            return self._known[path]
        here = ""
        directory: MergedDirectory | None = self._stack.top()
        for name in path.split("/") if path else ():
            if directory is None:
                break
            here = paths.join(here, name)
            if here in self._known:
                self._known.move_to_end(here)
                directory = self._known[here]
            else:
                directory = directory.open(name)
                self._keep(here, directory)
        return directory

    def lookup(self, directory: str, name: str) -> Found | None:
        """What ``name`` is in ``directory``."""
        if self._stack is None or (self._hidden and self._hidden.covers(paths.join(directory, name))):
            return None
        merged = self.directory(directory)
        return None if merged is None else merged.lookup(name)

    def _keep(self, path: str, directory: MergedDirectory | None) -> None:
        self._known[path] = directory
        self._parts += 1 + (len(directory.parts) if directory is not None else 0)
        while self._parts > _MAX_PARTS and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._parts -= 1 + (len(oldest.parts) if oldest is not None else 0)

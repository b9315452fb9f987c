"""What lies below the layer that is written: looked up only when it matters, with few descriptors open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from onlap.layers import paths
from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import Found, MergedDirectory, Stack

# Descriptors of directories in layers that are kept open.
_MAX_DESCRIPTORS = 256


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
        self._hidden: set[str] = set()
        self._open: OrderedDict[str, MergedDirectory | None] = OrderedDict()
        self._descriptors = 0
        if layers and markers is not None:
            self._stack = Stack(layers, markers)

    def __bool__(self) -> bool:
        return self._stack is not None

    def close(self) -> None:
        """Close all layers."""
        self._drop("")
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def hide(self, path: str) -> None:
        """From now on nothing shows at ``path`` and below: the new layer has an opaque directory there."""
        self._hidden.add(path)
        self._drop(path)

    def show(self, path: str) -> None:
        """What the new layer had at ``path`` and below was removed, and its opaque marks with it."""
        if self._hidden:
            self._hidden = {hidden for hidden in self._hidden if not paths.is_below(hidden, path)}
            self._drop(path)

    def directory(self, path: str) -> MergedDirectory | None:
        """The merged directory at ``path``; None where there is none. Valid until the next call."""
        if self._stack is None:
            return None
        known = self._known(path)
        here, directory = known
        for name in path[len(here) :].split("/"):
            if not name:
                continue
            if directory is None:
                return None
            here = paths.join(here, name)
            directory = None if here in self._hidden else directory.open(name)
            self._keep(here, directory)
        return directory

    def lookup(self, directory: str, name: str) -> Found | None:
        """What ``name`` is in ``directory``. Valid until the next call."""
        if self._stack is None or paths.join(directory, name) in self._hidden:
            return None
        merged = self.directory(directory)
        return None if merged is None else merged.lookup(name)

    def _known(self, path: str) -> tuple[str, MergedDirectory | None]:
        """The longest part of ``path`` that is open."""
        here = path
        while here:
            if here in self._open:
                self._open.move_to_end(here)
                return here, self._open[here]
            here = here.rpartition("/")[0]
        if "" not in self._open:
            assert self._stack is not None
            self._open[""] = self._stack.top()
        return "", self._open[""]

    def _keep(self, path: str, directory: MergedDirectory | None) -> None:
        self._open[path] = directory
        if directory is not None:
            self._descriptors += len(directory.parts)
        while (self._descriptors > _MAX_DESCRIPTORS or len(self._open) > _MAX_DESCRIPTORS) and len(self._open) > 2:
            oldest = next(key for key in self._open if key)
            if oldest == path:
                return
            self._forget(oldest)

    def _drop(self, path: str) -> None:
        for key in [key for key in self._open if paths.is_below(key, path)]:
            self._forget(key)

    def _forget(self, key: str) -> None:
        directory = self._open.pop(key)
        if directory is not None:
            if key:
                self._descriptors -= len(directory.parts)
            directory.close()

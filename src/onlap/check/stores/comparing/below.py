"""The layers below a layer, as the kernel merges them."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack

from onlap.check.stores.contract import StoreLayer
from onlap.overlayfs.markers import get_xattr
from onlap.overlayfs.merged import Found, MergedDirectory, Stack
from onlap.trees.walk import path_of


class Below:
    """The layers below, opened when they are needed."""

    def __init__(self, stack: ExitStack, layer: StoreLayer) -> None:
        self._stack = stack
        self._layer = layer
        self._top: MergedDirectory | None = None

    def has(self, path: str) -> bool:
        """Whether the layers below show a file of that path; also if they cannot be read."""
        try:
            return self._lookup(path) is not None
        except OSError:
            return True

    def link(self, path: str) -> str | None:
        """The target of a symlink that the layers below show; None also if they cannot be read."""
        try:
            found = self._lookup(path)
            if found is None or not stat.S_ISLNK(found.status.st_mode):
                return None
            return os.readlink(found.name, dir_fd=found.dir_fd)
        except OSError:
            return None

    def status(self, path: str) -> os.stat_result | None:
        """The status of what the layers below show; raises OSError."""
        found = self._lookup(path)
        return None if found is None else found.status

    def xattr(self, path: str, name: str) -> bytes | None:
        """An xattr of what the layers below show; raises OSError."""
        found = self._lookup(path)
        return None if found is None else get_xattr(path_of(found.dir_fd, found.name), name)

    def names(self, path: str) -> set[str]:
        """The names in a directory that the layers below show; none if they show no directory. Raises OSError."""
        directory = self._directory(path.split("/"))
        return set() if directory is None else set(directory.names())

    def _lookup(self, path: str) -> Found | None:
        *above, base = path.split("/")
        directory = self._directory(above)
        return None if directory is None else directory.lookup(base)

    def _directory(self, names: list[str]) -> MergedDirectory | None:
        if not self._layer.lowers:
            return None
        if self._top is None:
            self._top = self._stack.enter_context(Stack(self._layer.lowers, self._layer.markers)).top()
        directory: MergedDirectory | None = self._top
        for name in names:
            directory = None if directory is None else directory.open(name)
        return directory

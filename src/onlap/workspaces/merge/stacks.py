"""Files of a stack of layers by their paths."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from onlap.layers.apply.lowers import Lowers
from onlap.overlayfs.markers import Markers
from onlap.overlayfs.merged import Found
from onlap.trees.meta import Meta, read_directory_meta, read_meta
from onlap.workspaces.merge.entries import TOP


class Paths(Lowers):
    """A stack of layers, with the attributes and the content of its files; to be closed.

    Args:
        layers: their top directories, topmost first.
        markers: the flavour of the markers in them.
        beside: another, with which this one shares the limit of open descriptors.

    Raises:
        OSError: a layer cannot be opened.
    """

    def __init__(self, layers: Sequence[str], markers: Markers, *, beside: Paths | None = None) -> None:
        super().__init__(layers, markers, beside=beside)
        self._recorded = markers.recorded

    def find(self, path: str) -> Found | None:
        """The file ``path``; None if there is none."""
        above, _, name = path.rpartition("/")
        return self.lookup(above, name)

    def meta(self, path: str) -> Meta | None:
        """The attributes of ``path``, ``"."`` for the top; None if there is no such file."""
        if path == TOP:
            top = self.directory("")
            return None if top is None else read_directory_meta(top.parts[0].fd, recorded=self._recorded)
        found = self.find(path)
        return None if found is None else self._meta(found)

    def data(self, path: str) -> int:
        """Open a regular file's content.

        Raises:
            OSError: it cannot be opened, or there is no such file.
        """
        above, _, name = path.rpartition("/")
        directory = self.directory(above)
        found = directory.lookup(name) if directory is not None else None
        if directory is None or found is None or not stat.S_ISREG(found.status.st_mode):
            raise FileNotFoundError(2, os.strerror(2), path)
        return directory.data(found, path)

    def below(self, path: str) -> Iterator[tuple[str, Meta]]:
        """All below a directory, each with its attributes, a directory before its contents."""
        left = [path]
        while left:
            here = left.pop()
            directory = self.directory(here)
            inside = []
            for found in [directory.lookup(name) for name in directory.names()] if directory is not None else ():
                if found is None:
                    continue
                yield f"{here}/{found.name}", self._meta(found)
                if stat.S_ISDIR(found.status.st_mode):
                    inside.append(f"{here}/{found.name}")
            left += reversed(inside)

    def _meta(self, found: Found) -> Meta:
        return read_meta(found.dir_fd, found.name, found.status, recorded=self._recorded)

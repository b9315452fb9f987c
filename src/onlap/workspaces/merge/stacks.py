"""Files of a stack of layers by their paths."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from onlap.layers.paths import is_below
from onlap.overlayfs.merged import Found, MergedDirectory, Stack
from onlap.trees.meta import Meta, read_directory_meta, read_meta


class Paths:
    """Looks up paths in a stack; those in one directory, or near each other, in few steps.

    Args:
        stack: the stack, which stays open meanwhile.
    """

    def __init__(self, stack: Stack) -> None:
        self._recorded = stack.markers.recorded
        self._open: list[tuple[str, MergedDirectory]] = [("", stack.top())]

    def lookup(self, path: str) -> tuple[MergedDirectory, Found] | None:
        """The directory that holds ``path``, and the file in it; None if there is none."""
        above, _, name = path.rpartition("/")
        directory = self._directory(above)
        found = directory.lookup(name) if directory is not None else None
        return None if directory is None or found is None else (directory, found)

    def meta(self, path: str) -> Meta | None:
        """The attributes of ``path``, ``"."`` for the top; None if there is no such file."""
        if path == ".":
            return read_directory_meta(self._open[0][1].parts[0].fd, recorded=self._recorded)
        at = self.lookup(path)
        return None if at is None else self._meta(at[1])

    def data(self, path: str) -> int:
        """Open a regular file's content.

        Raises:
            OSError: it cannot be opened, or there is no such file.
        """
        at = self.lookup(path)
        if at is None or not stat.S_ISREG(at[1].status.st_mode):
            raise FileNotFoundError(2, os.strerror(2), path)
        directory, found = at
        return directory.data(found, path)

    def below(self, path: str) -> Iterator[tuple[str, Meta]]:
        """All below a directory, each with its attributes, a directory before its contents."""
        left = [path]
        while left:
            here = left.pop()
            directory = self._directory(here)
            inside = []
            for name in directory.names() if directory is not None else ():
                found = directory.lookup(name) if directory is not None else None
                if found is None:
                    continue
                yield f"{here}/{name}", self._meta(found)
                if stat.S_ISDIR(found.status.st_mode):
                    inside.append(f"{here}/{name}")
            left += reversed(inside)

    def _meta(self, found: Found) -> Meta:
        return read_meta(found.dir_fd, found.name, found.status, recorded=self._recorded)

    def _directory(self, path: str) -> MergedDirectory | None:
        while not is_below(path, self._open[-1][0]):
            self._open.pop()[1].close()
        here, directory = self._open[-1]
        for name in path[len(here) :].strip("/").split("/") if path != here else ():
            below = directory.open(name)
            if below is None:
                return None
            here = f"{here}/{name}" if here else name
            directory = below
            self._open.append((here, directory))
        return directory

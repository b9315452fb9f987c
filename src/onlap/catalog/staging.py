"""Where trees are built before they have a record: a directory a process, held by the process's flock."""

from __future__ import annotations

import itertools
import os
import secrets

from onlap.catalog.locks import open_directory, try_lock
from onlap.trees.remove import remove


class Staging:
    """This process's part of ROOT/staging, made when it is first needed.

    Args:
        directory: ROOT/staging.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._fresh()

    def _fresh(self) -> None:
        self._numbers = itertools.count(1)
        self._own: str | None = None
        self._fd = -1

    def after_fork(self) -> None:
        """In the child: the parent goes on using its directory, we take one of our own."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fresh()

    def new(self) -> str:
        """A new empty directory, 0700.

        Raises:
            OSError: it cannot be made.
        """
        own = self._own or self._claim()
        path = f"{own}/{next(self._numbers)}"
        os.mkdir(path, 0o700)
        return path

    def _claim(self) -> str:
        while True:
            path = f"{self._directory}/{os.getpid()}-{secrets.token_hex(4)}"
            os.mkdir(path, 0o700)
            fd = open_directory(path)
            # Between our mkdir and our flock a cleanup may have taken it for a dead process's: then the name is gone.
            if try_lock(fd) and _still_at(fd, path):
                self._own, self._fd = path, fd
                return path
            os.close(fd)

    def discard(self, path: str) -> None:
        """Remove a directory that :meth:`new` gave, if it is still there."""
        parent, name = os.path.split(path)
        fd = open_directory(parent)
        try:
            remove(fd, name)
        finally:
            os.close(fd)

    def collect(self) -> int:
        """Remove what dead processes left; returns the number of directories."""
        removed = 0
        top = open_directory(self._directory)
        try:
            for name in os.listdir(top):
                path = f"{self._directory}/{name}"
                if path == self._own:
                    continue
                try:
                    fd = open_directory(path)
                except FileNotFoundError:
                    continue
                try:
                    if try_lock(fd):
                        remove(top, name)
                        removed += 1
                finally:
                    os.close(fd)
        finally:
            os.close(top)
        return removed

    def close(self) -> None:
        """Remove our own directory when it is empty, and give its lock back."""
        if self._own is None:
            return
        try:
            os.rmdir(self._own)
        except OSError:
            # ENOTEMPTY: something that is being built was given up; cleanup takes it once the lock is free.
            pass
        os.close(self._fd)
        self._fresh()


def _still_at(fd: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

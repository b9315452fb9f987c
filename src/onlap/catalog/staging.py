"""Where trees are built before they have a record: a directory a process, held by the process's flock."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable

from onlap.catalog.locks import Held, claim_directory, lock_directory, open_directory
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
        self._mutex = threading.Lock()
        self._numbers = itertools.count(1)
        self._own: str | None = None
        self._held: Held | None = None

    def after_fork(self) -> None:
        """In the child: the parent goes on using its directory, we take one of our own."""
        self._fresh()

    def new(self) -> str:
        """A new empty directory, 0700.

        Raises:
            OSError: it cannot be made.
        """
        with self._mutex:
            own = self._own or self._claim()
        path = f"{own}/{next(self._numbers)}"
        os.mkdir(path, 0o700)
        return path

    def _claim(self) -> str:
        while True:
            path = f"{self._directory}/{os.getpid()}-{os.urandom(4).hex()}"
            held = claim_directory(path)
            if held is not None:
                self._own, self._held = path, held
                return path

    def discard(self, path: str) -> None:
        """Remove a directory that :meth:`new` gave, if it is still there."""
        parent, name = os.path.split(path)
        fd = open_directory(parent)
        try:
            remove(fd, name)
        finally:
            os.close(fd)

    def collect(self, put: Callable[[str], None]) -> None:
        """Hand what dead processes left to ``put``, which moves it away."""
        for name in os.listdir(self._directory):
            path = f"{self._directory}/{name}"
            if path == self._own:
                continue
            try:
                held = lock_directory(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                put(path)  # no directory of a process
                continue
            if held is not None:
                with held:
                    put(path)

    def close(self) -> None:
        """Remove our own directory when it is empty, and give its lock back."""
        if self._own is None or self._held is None:
            return
        try:
            os.rmdir(self._own)
        except OSError:
            # ENOTEMPTY: something that is being built was given up; cleanup takes it once the lock is free.
            pass
        self._held.release()
        self._fresh()

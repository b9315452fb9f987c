"""Where trees are built before they have a record: one directory per process, which holds its flock."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from onlap.locks import Flock, abandoned, claim_directory
from onlap.trees.remove import remove_at

_OWN = "own"
_DISCARDED = ".discarded"


class Staging:
    """This process's part of ROOT/staging, created when it is first needed.

    Args:
        directory: ROOT/staging.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._fresh()

    def _fresh(self) -> None:
        self._numbers = itertools.count(1)
        # One entry at most, added in a single step: there is no lock that an interrupt could leave taken.
        self._claimed: dict[str, tuple[str, Flock]] = {}

    def after_fork(self) -> None:
        """In the child: the parent keeps using its directory, and the child creates another."""
        self._fresh()

    def new(self) -> str:
        """A new empty directory, 0700.

        Raises:
            OSError: it cannot be created.
        """
        path = f"{self._own or self._claim()}/{next(self._numbers)}"
        os.mkdir(path, 0o700)
        return path

    @contextlib.contextmanager
    def file(self, path: str) -> Iterator[BinaryIO]:
        """A file to write, 0600, that takes the place of what is at ``path`` at the end of the block.

        Raises:
            OSError: it cannot be made, or has no place there.
        """
        partial = f"{self._own or self._claim()}/{next(self._numbers)}"
        try:
            with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                yield file
            os.rename(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    @property
    def _own(self) -> str | None:
        claimed = self._claimed.get(_OWN)
        return claimed and claimed[0]

    def _claim(self) -> str:
        while True:
            path = f"{self._directory}/{os.getpid()}-{os.urandom(4).hex()}"
            held = claim_directory(path)
            if held is not None:
                own = self._claimed.setdefault(_OWN, (path, held))[0]
                if own != path:  # another thread was faster
                    os.rmdir(path)
                    held.release()
                return own

    def discard(self, path: str) -> None:
        """Remove a directory that :meth:`new` returned, if it is still there.

        Raises:
            OSError: it cannot be removed.
        """
        try:
            # A single step decides: a transaction that is still running gets all of it or nothing.
            os.rename(path, path + _DISCARDED)
        except FileNotFoundError:
            return
        remove_at(path + _DISCARDED)

    def collect(self, put: Callable[[str], None]) -> None:
        """Call ``put``, which moves it away, for everything that dead processes left."""
        for name in abandoned(self._directory):
            put(f"{self._directory}/{name}")

    def close(self) -> None:
        """Remove our own directory if it is empty, and release its lock."""
        claimed = self._claimed.pop(_OWN, None)
        if claimed is None:
            return
        path, held = claimed
        try:
            os.rmdir(path)
        except OSError:
            # ENOTEMPTY: a tree being built was abandoned; cleanup takes it once the lock is free.
            pass
        held.release()

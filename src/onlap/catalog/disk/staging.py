"""Where trees are built before they have a record: one directory per process, held by its flock."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

from onlap.locks import Flock, abandoned, claim_directory
from onlap.trees.remove import remove_at

_OWN = "own"
_DISCARDED = ".discarded"


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
        # One entry at most, made in a single step: there is no lock that an interrupt could leave taken.
        self._claimed: dict[str, tuple[str, Flock]] = {}

    def after_fork(self) -> None:
        """In the child: the parent goes on using its directory, we take one of our own."""
        self._fresh()

    def new(self) -> str:
        """A new empty directory, 0700.

        Raises:
            OSError: it cannot be made.
        """
        path = f"{self._own or self._claim()}/{next(self._numbers)}"
        os.mkdir(path, 0o700)
        return path

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
        """Remove a directory that :meth:`new` gave, if it is still there.

        Raises:
            OSError: it cannot be removed.
        """
        try:
            # One step decides: a transaction that is still going on gets it whole, or not at all.
            os.rename(path, path + _DISCARDED)
        except FileNotFoundError:
            return
        remove_at(path + _DISCARDED)

    def collect(self, put: Callable[[str], None]) -> None:
        """Hand what dead processes left to ``put``, which moves it away."""
        for name in abandoned(self._directory):
            put(f"{self._directory}/{name}")

    def close(self) -> None:
        """Remove our own directory when it is empty, and give its lock back."""
        claimed = self._claimed.pop(_OWN, None)
        if claimed is None:
            return
        path, held = claimed
        try:
            os.rmdir(path)
        except OSError:
            # ENOTEMPTY: something that is being built was given up; cleanup takes it once the lock is free.
            pass
        held.release()

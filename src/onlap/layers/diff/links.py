"""Which names in a tree are one file, asked only where two trees are compared of which neither stands on the other."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable

from onlap.overlayfs.merged import Found

_Identity = tuple[int, int]


class Links:
    """How the hard links of one tree differ from those of another.

    Args:
        names: what each name is in the one and in the other, of all that the other has.

    Raises:
        OSError: something cannot be read.
    """

    def __init__(self, names: Iterable[tuple[str, Found | None, Found | None]]) -> None:
        self._files: dict[str, tuple[_Identity, _Identity]] = {}
        # The names that a file has now, and those of them that were names of one file before.
        self._names: Counter[_Identity] = Counter()
        self._kept: Counter[tuple[_Identity, _Identity]] = Counter()
        # The files that names of one file are now, by attributes.
        self._alike: dict[object, set[_Identity]] = {}
        for path, old, new in names:
            if new is None or stat.S_ISDIR(new.status.st_mode):
                continue
            if new.status.st_nlink == 1 and (old is None or old.status.st_nlink == 1):
                continue
            now = identity(new.status)
            self._names[now] += 1
            if old is not None and not stat.S_ISDIR(old.status.st_mode):
                before = identity(old.status)
                self._files[path] = now, before
                self._kept[now, before] += 1
                self._alike.setdefault((before, signature(new.status)), set()).add(now)

    def differ(self, path: str, status: os.stat_result) -> bool:
        """Whether a file that is else the same has to be written for its links to come out right.

        Not where another of its names is gone or is another file now: that change is written at that name.

        Args:
            path: the file's.
            status: what it is now.
        """
        if path not in self._files:
            return False
        now, before = self._files[path]
        if self._kept[now, before] < self._names[now]:
            return True
        # What was a link is a file of its own now, else unchanged.
        return len(self._alike[before, signature(status)]) > 1


def identity(status: os.stat_result) -> _Identity:
    """What tells one file from another."""
    return status.st_dev, status.st_ino


def signature(status: os.stat_result) -> object:
    """What the copy of a file has in common with it."""
    return status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns

"""Which names of a tree are hard links of one file; needed only to compare two trees, neither on top of the other."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable

from onlap.overlayfs.merged import Found

_Identity = tuple[int, int]


class Links:
    """How the hard links of a new tree differ from those of an old one.

    Args:
        names: each name of the new tree, with its file in the old tree and in the new one.

    Raises:
        OSError: something cannot be read.
    """

    def __init__(self, names: Iterable[tuple[str, Found | None, Found | None]]) -> None:
        self._files: dict[str, tuple[_Identity, _Identity]] = {}
        # How many names a file has now, and how many of them were names of one file before.
        self._names: Counter[_Identity] = Counter()
        self._kept: Counter[tuple[_Identity, _Identity]] = Counter()
        # The files that the names of one old file are now, by attributes.
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
        """Whether an otherwise unchanged file must be written so that its links come out right.

        Not if another of its names is gone or is another file now: that change is written at that name.

        Args:
            path: the file's path.
            status: its status in the new tree.
        """
        if path not in self._files:
            return False
        now, before = self._files[path]
        if self._kept[now, before] < self._names[now]:
            return True
        # A link became a file of its own and is otherwise unchanged.
        return len(self._alike[before, signature(status)]) > 1


def identity(status: os.stat_result) -> _Identity:
    """The device and inode, which identify a file."""
    return status.st_dev, status.st_ino


def signature(status: os.stat_result) -> object:
    """The attributes that a copy of a file shares with it."""
    return status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns

"""Which names in a tree are one file, asked only where two trees are compared that share no inodes."""

from __future__ import annotations

import errno
import os
import stat

from onlap.overlayfs.merged import Found, MergedDirectory

_NONE: frozenset[str] = frozenset()


class Links:
    """The hard links of two merged trees; both are walked when the first file with several names is asked for.

    Args:
        before: the top directory of the one.
        after: the top directory of the other.

    Raises:
        OSError: something cannot be read.
    """

    def __init__(self, before: MergedDirectory, after: MergedDirectory) -> None:
        self._after = after
        self._old = _groups(before)
        self._new = _groups(after)

    def differ(self, path: str, status: os.stat_result) -> bool:
        """Whether a file that is else the same has to be written for its links to come out right.

        Not where another of its names is gone or is another file now: that change is written at that name.

        Args:
            path: the file's.
            status: what it is now.
        """
        old, new = self._old.get(path, _NONE), self._new.get(path, _NONE)
        if new - old - {path}:
            return True
        return any(self._is_copy(other, status) for other in old - new - {path})

    def _is_copy(self, path: str, status: os.stat_result) -> bool:
        """Whether what was a link is a file of its own now, else unchanged."""
        found = _lookup(self._after, path)
        if found is None:
            return False
        other = found.status
        return (other.st_mode, other.st_uid, other.st_gid, other.st_size, other.st_mtime_ns) == (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_size,
            status.st_mtime_ns,
        )


def descend(top: MergedDirectory, path: str) -> MergedDirectory:
    """Open a directory by its path from the top; to be closed, unless it is the top itself.

    Raises:
        FileNotFoundError: there is none (any more).
        OSError: it cannot be opened.
    """
    here = top
    for name in path.split("/"):
        if not name:
            continue
        below = here.open(name)
        if here is not top:
            here.close()
        if below is None:
            raise FileNotFoundError(errno.ENOENT, "the directory vanished while it was compared", path)
        here = below
    return here


def _lookup(top: MergedDirectory, path: str) -> Found | None:
    directory, _, name = path.rpartition("/")
    try:
        here = descend(top, directory)
    except FileNotFoundError:
        return None
    found = here.lookup(name)
    if here is not top:
        here.close()
    return found


def _groups(top: MergedDirectory) -> dict[str, frozenset[str]]:
    """By path, the names of each file that has several in the tree."""
    files: dict[tuple[int, int], list[str]] = {}
    left = [""]
    while left:
        prefix = left.pop()
        here = descend(top, prefix)
        try:
            for name in here.names():
                found = here.lookup(name)
                if found is None:
                    continue
                status = found.status
                if stat.S_ISDIR(status.st_mode):
                    left.append(f"{prefix}{name}/")
                elif status.st_nlink > 1:
                    files.setdefault((status.st_dev, status.st_ino), []).append(prefix + name)
        finally:
            if here is not top:
                here.close()
    groups = [frozenset(names) for names in files.values() if len(names) > 1]
    return {name: group for group in groups for name in group}

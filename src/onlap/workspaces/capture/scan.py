"""Reading one directory: its names and the stats of its entries, and what of it belongs to a capture."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple

from onlap.arguments import check_texts
from onlap.syscalls import files
from onlap.workspaces.capture.clock import now_ns
from onlap.workspaces.capture.fingerprint import CTIME, SUBDIRECTORY, Listed, directory_row, packed

# The directories of merges that are under way, beside what they bring into place; see onlap.workspaces.merge.
_MERGE_STARTS, _MERGE_ENDS = ".", ".onlap-merge"

# From the one up to the other, a mode is that of a regular file or a symlink, which are always kept.
_REGULAR, _SOCKET = stat.S_IFREG, stat.S_IFSOCK


class Scan(NamedTuple):
    """What a directory held.

    Attributes:
        listed: its names and rows.
        below: the names of its subdirectories.
        linked: the files with several names, each as its device, inode and name.
        started_ns: when the reading began, by the kernel's clock.
        newest_ns: the latest ctime in it.
    """

    listed: Listed
    below: list[str]
    linked: list[tuple[int, int, str]]
    started_ns: int
    newest_ns: int


class Scanner:
    """Reads directories.

    Args:
        exclude: :mod:`fnmatch` patterns for the path from the top or the last name.
        avoid: a directory, as ``(st_dev, st_ino)``, that is left out.

    Attributes:
        skipped: how many sockets, and devices that would be whiteouts, the last pass left out.

    Raises:
        InvalidArgument: the patterns are none.
    """

    def __init__(self, exclude: Collection[str], avoid: tuple[int, int]) -> None:
        check_texts(exclude, "list of patterns to exclude")
        self._excluded: Callable[[str], object] | None = None
        if exclude:
            self._excluded = re.compile("|".join(fnmatch.translate(pattern) for pattern in exclude)).match
        self._avoid = avoid
        self.skipped: Counter[str] = Counter()

    def read(self, fd: int, prefix: str) -> Scan:
        """Read an open directory.

        Args:
            fd: the directory.
            prefix: its path from the top, with a slash; empty for the top.

        Raises:
            OSError: it cannot be read.
        """
        started_ns = now_ns()
        # Before its entries: what is added or removed from here on gives it a later ctime.
        values = directory_row(os.fstat(fd))
        names: list[str] = []
        below: list[str] = []
        linked: list[tuple[int, int, str]] = []
        newest_ns = values[CTIME]
        listed = files.list_directory(fd)
        listed.sort(key=_name)
        for entry in listed:
            name = entry.name
            if entry.is_dir(follow_symlinks=False):
                if self._left_out(entry, prefix):
                    continue
                names.append(name)
                below.append(name)
                values += SUBDIRECTORY
                continue
            if self._excluded is not None and self._is_excluded(prefix, name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # the directory's own ctime shows it to the next pass
            mode, ctime_ns = status.st_mode, status.st_ctime_ns
            if not _REGULAR <= mode < _SOCKET and self._skips(status):
                continue
            names.append(name)
            values += (mode, status.st_ino, status.st_size, status.st_mtime_ns, ctime_ns)
            if ctime_ns > newest_ns:
                newest_ns = ctime_ns
            if status.st_nlink > 1:
                linked.append((status.st_dev, status.st_ino, name))
        return Scan(Listed(os.fsencode("\0".join(names)), packed(values)), below, linked, started_ns, newest_ns)

    def _left_out(self, entry: os.DirEntry[str], prefix: str) -> bool:
        name = entry.name
        if name.startswith(_MERGE_STARTS) and name.endswith(_MERGE_ENDS):
            return True
        if entry.inode() == self._avoid[1]:
            status = entry.stat(follow_symlinks=False)
            if (status.st_dev, status.st_ino) == self._avoid:
                return True
        return self._excluded is not None and self._is_excluded(prefix, name)

    def _is_excluded(self, prefix: str, name: str) -> bool:
        assert self._excluded is not None
        return bool(self._excluded(prefix + name) or self._excluded(name))

    def _skips(self, status: os.stat_result) -> bool:
        if stat.S_ISSOCK(status.st_mode):
            self.skipped["socket"] += 1
            return True
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            # In a layer it would be a whiteout.
            self.skipped["device"] += 1
            return True
        return False


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name

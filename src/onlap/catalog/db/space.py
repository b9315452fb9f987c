"""Disk space for SQLite's shared memory, without which a process that touches it is killed.

SQLite maps ``catalog.db-shm``. A write to a page that gets no disk space cannot return an error: the process gets
SIGBUS. This happens on btrfs, which writes every page to a new place, and where blocks are smaller than pages, so that
the byte that SQLite writes to each page in advance allocates only a part of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3

from onlap.syscalls.files import BTRFS, filesystem_magic
from onlap.trees.walk import opened

# Bytes. With more than this left, nothing else is checked.
_ENOUGH = 1 << 20
# The initial size of the shared memory, in bytes (sqlite.org/walformat.html).
_SHARED_MEMORY = 32768


class NoSpace(sqlite3.OperationalError):
    """SQLite must not touch its shared memory now; the cause says why."""

    sqlite_errorcode = sqlite3.SQLITE_CANTOPEN


def check_space(path: str, *, fresh: bool = False) -> None:
    """Raise NoSpace if SQLite might be killed, instead of failing, as it uses the catalog at ``path``.

    Args:
        path: catalog.db.
        fresh: whether the shared memory is created now.
    """
    try:
        left = os.statvfs(path)
        if left.f_bavail * left.f_frsize >= _ENOUGH:
            return
        with opened(os.path.dirname(path)) as above:  # never the catalog itself, whose POSIX locks a close would drop
            is_btrfs = filesystem_magic(above) == BTRFS
        if is_btrfs or (fresh and left.f_frsize < os.sysconf("SC_PAGE_SIZE")):
            try_files(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("no space for shared memory") from error


def try_files(path: str) -> None:
    """Create a file beside the catalog as SQLite creates its own, and remove it; the OSError says what is wrong."""
    path += "-try"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _SHARED_MEMORY)
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):  # other processes use the same name
            os.unlink(path)

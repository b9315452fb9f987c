"""Room for SQLite's shared memory, without which the kernel kills whoever touches it.

SQLite maps ``catalog.db-shm``. Where a page of it finds no room as it is written to, there is no error to return, and
the process gets SIGBUS: on btrfs, which writes every page to a new place, and where blocks are smaller than pages, so
that the byte that SQLite writes to each page in advance allocates a part of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3

from onlap.syscalls.files import BTRFS, filesystem_magic
from onlap.trees.walk import opened

# Bytes. With more than this left it is not looked at any closer.
_ENOUGH = 1 << 20
# What the shared memory takes at first (sqlite.org/walformat.html).
_SHARED_MEMORY = 32768


class NoSpace(sqlite3.OperationalError):
    """SQLite must not be let at its shared memory now; the cause says why."""

    sqlite_errorcode = sqlite3.SQLITE_CANTOPEN


def check_space(path: str, *, fresh: bool = False) -> None:
    """Raise NoSpace where SQLite might be killed as it uses the catalog at ``path``, rather than fail.

    Args:
        path: catalog.db.
        fresh: whether the shared memory is made now.
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
            raise NoSpace("no room for shared memory") from error


def try_files(path: str) -> None:
    """Make a file beside the catalog as SQLite makes its own, and remove it; the OSError says what ails the disk."""
    path += "-try"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _SHARED_MEMORY)
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):  # others try as well
            os.unlink(path)

"""Walking a tree by directory descriptors, sorted by the names' bytes, without recursion.

Names are opened one component at a time, relative to an open directory, so that no concurrent rename and no symlink can
lead the walk out of the tree.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from onlap.syscalls import files

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def opened(path: str, flags: int = OPEN_DIRECTORY, *, dir_fd: int | None = None) -> Iterator[int]:
    """Open a directory, or a file with other flags, for the duration of a block; a new one is 0600. Raises OSError."""
    fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


# How many directories a walk keeps open, since the usual limit is 1024 descriptors per process; those further up are
# closed, and opened again by ".." on the way back.
MAX_OPEN = 200


class Descent:
    """The open directories from the top of a walk down to its current directory; a limited number at a time.

    Args:
        top: a descriptor of the top directory, which is never closed.
    """

    __slots__ = ("_fds", "_identities")

    def __init__(self, top: int) -> None:
        self._fds: list[int] = [top]
        self._identities: list[tuple[int, int]] = [_identity(top)]

    @property
    def fd(self) -> int:
        """The current directory."""
        return self._fds[-1]

    def enter(self, fd: int) -> None:
        """Go into a directory; takes over its descriptor."""
        self._fds.append(fd)
        self._identities.append(_identity(fd))
        far = len(self._fds) - MAX_OPEN
        if far > 0 and self._fds[far] >= 0:  # otherwise it was closed on an earlier descent
            os.close(self._fds[far])
            self._fds[far] = -1

    def leave(self) -> None:
        """Go back up.

        Raises:
            OSError: ESTALE: the directory was moved meanwhile, so there is no way back.
        """
        fd = self._fds.pop()
        self._identities.pop()
        try:
            if self._fds[-1] < 0:
                above = os.open("..", OPEN_DIRECTORY, dir_fd=fd)
                self._fds[-1] = above
                if _identity(above) != self._identities[-1]:
                    raise OSError(errno.ESTALE, "a directory was moved while the tree was walked")
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close all but the top."""
        for fd in self._fds[1:]:
            if fd >= 0:
                os.close(fd)
        del self._fds[1:]


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


class Entry(NamedTuple):
    """A file found by a walk.

    Attributes:
        path: relative to the top of the walk, without a leading ``/``.
        name: its last component, relative to ``dir_fd``.
        dir_fd: the directory that holds it; open until the walk continues.
        status: its own status; a symlink is not followed.
    """

    path: str
    name: str
    dir_fd: int
    status: os.stat_result


def walk(top: int, *, ordered: bool = True) -> Iterator[Entry]:
    """Every file below ``top``, a directory before its contents; ``top`` itself is not included.

    Args:
        top: a descriptor of a directory, open for reading; left open.
        ordered: sort each directory by its names' bytes; otherwise the order is the filesystem's.

    Raises:
        OSError: a directory cannot be read. A file that vanishes meanwhile is skipped.
    """
    descent = Descent(top)
    stack: list[tuple[str, Iterator[os.DirEntry[str]]]] = [("", _entries(top, ordered))]
    try:
        while stack:
            prefix, entries = stack[-1]
            for listed in entries:
                try:
                    # Not the entry's own stat(), which uses the descriptor that it was listed with.
                    status = os.stat(listed.name, dir_fd=descent.fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                entry = Entry(prefix + listed.name, listed.name, descent.fd, status)
                yield entry
                if listed.is_dir(follow_symlinks=False):
                    try:
                        child = os.open(listed.name, OPEN_DIRECTORY, dir_fd=descent.fd)
                    except (FileNotFoundError, NotADirectoryError):
                        continue
                    descent.enter(child)
                    stack.append((entry.path + "/", _entries(child, ordered)))
                    break
            else:
                stack.pop()
                if stack:
                    descent.leave()
    finally:
        descent.close()


def _entries(fd: int, ordered: bool) -> Iterator[os.DirEntry[str]]:
    entries = files.list_directory(fd)
    if ordered:
        entries.sort(key=lambda entry: os.fsencode(entry.name))
    return iter(entries)


def open_on_mount(dir_fd: int, name: str, flags: int = OPEN_DIRECTORY) -> int:
    """Open a directory that is neither a symlink nor a mount point; st_dev does not tell a bind of the same filesystem.

    Raises:
        OSError: EXDEV where something is mounted; ELOOP or ENOTDIR where it is not a directory.
    """
    try:
        return files.openat2(name, flags, dir_fd=dir_fd, resolve=files.RESOLVE_NO_XDEV | files.RESOLVE_NO_SYMLINKS)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    # Before Linux 5.6 there is no openat2: the mount can be checked only afterwards.
    fd = os.open(name, flags, dir_fd=dir_fd)
    if files.mount_id(fd) == files.mount_id(dir_fd):
        return fd
    os.close(fd)
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)


def path_of(dir_fd: int, name: str) -> str:
    """A path for calls that take no ``dir_fd`` (those for xattrs); valid while ``dir_fd`` is open."""
    return f"/proc/self/fd/{dir_fd}/{name}"

"""Walking a tree by directory descriptors, in the order of the names' bytes, without recursion.

Names are opened one component at a time relative to an open directory, so that a rename or a symlink put in the way
while we walk cannot lead us out of the tree.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from onlap.syscalls import files

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def opened(path: str, flags: int = OPEN_DIRECTORY, *, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of a directory, or with other flags of a file, for the time of a block; raises OSError."""
    fd = os.open(path, flags, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


# A walk keeps at most this many directories open, since the usual limit is 1024 descriptors a process; those further up
# are closed, and opened again by ".." on the way back.
MAX_OPEN = 200


class Descent:
    """The open directories from the top of a walk down to where it is; few of them at a time.

    Args:
        top: a descriptor of the top directory, which is never closed.
    """

    __slots__ = ("_fds", "_identities")

    def __init__(self, top: int) -> None:
        self._fds: list[int] = [top]
        self._identities: list[tuple[int, int]] = [_identity(top)]

    @property
    def fd(self) -> int:
        """The directory where the walk is."""
        return self._fds[-1]

    def enter(self, fd: int) -> None:
        """Go into a directory; its descriptor is the descent's from now on."""
        self._fds.append(fd)
        self._identities.append(_identity(fd))
        far = len(self._fds) - MAX_OPEN
        if far > 0 and self._fds[far] >= 0:  # else it was closed on an earlier way down
            os.close(self._fds[far])
            self._fds[far] = -1

    def leave(self) -> None:
        """Go back up.

        Raises:
            OSError: ESTALE: the directory was moved elsewhere meanwhile, so that there is no way back.
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
    """A file met on the way.

    Attributes:
        path: from the top of the walk, with ``/`` between names and none before the first.
        name: its last component; relative to ``dir_fd``, which is open until the walk goes on.
        dir_fd: the directory that holds it.
        status: its own, not that of what a symlink points to.
    """

    path: str
    name: str
    dir_fd: int
    status: os.stat_result


def walk(top: int, *, descend: Callable[[Entry], bool] | None = None, ordered: bool = True) -> Iterator[Entry]:
    """Every file below ``top``, a directory before what is in it; ``top`` itself is not among them.

    Args:
        top: a descriptor of a directory, open for reading; left open.
        descend: asked for every directory whether to go into it.
        ordered: sort each directory by its names' bytes; else they come as the filesystem gives them.

    Raises:
        OSError: a directory cannot be read. A file that vanishes while its directory is read is passed over.
    """
    descent = Descent(top)
    stack: list[tuple[str, Iterator[os.DirEntry[str]]]] = [("", _entries(top, ordered))]
    try:
        while stack:
            prefix, entries = stack[-1]
            for listed in entries:
                try:
                    # Not the entry's own stat(), which remembers the descriptor that it was listed with.
                    status = os.stat(listed.name, dir_fd=descent.fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                entry = Entry(prefix + listed.name, listed.name, descent.fd, status)
                yield entry
                if listed.is_dir(follow_symlinks=False) and (descend is None or descend(entry)):
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
    # Before Linux 5.6 there is no openat2: which mount it is on can be asked only afterwards.
    fd = os.open(name, flags, dir_fd=dir_fd)
    if files.mount_id(fd) == files.mount_id(dir_fd):
        return fd
    os.close(fd)
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)


def path_of(dir_fd: int, name: str) -> str:
    """A path for the calls that take no ``dir_fd`` (the xattr ones); valid while ``dir_fd`` is open."""
    return f"/proc/self/fd/{dir_fd}/{name}"

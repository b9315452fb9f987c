"""Removing a tree without ever leaving it: neither through a symlink nor into a mount.

Each directory is opened by :func:`~onlap.trees.walk.open_on_mount`, which enters no mount, not even one of the same
filesystem.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from onlap.syscalls import files
from onlap.trees.walk import OPEN_DIRECTORY, open_on_mount, opened

# Deeper directories are moved to the top of the tree and removed there, so that the number of open descriptors stays
# below the usual limit of 1024.
_MAX_DEPTH = 128


def remove(dir_fd: int, name: str, *, pace: Callable[[], None] | None = None) -> None:
    """Remove ``name`` in ``dir_fd`` with its contents.

    Args:
        dir_fd: the directory that holds it.
        name: a file or directory; nothing happens if it does not exist.
        pace: called after every removed file, to limit the rate; an exception from it aborts the removal.

    Raises:
        OSError: EXDEV or EBUSY if something is mounted inside; the rest can be removed later.
    """
    top = _open(dir_fd, name)
    if top is None:
        return
    try:
        moved = 0
        while True:
            deep = _empty(top, pace, moved)
            if deep == moved:
                break
            moved = deep
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=dir_fd)


def remove_at(path: str) -> None:
    """The same by path; if its last component is a symlink, it is not followed."""
    above, name = os.path.split(path)
    with opened(above, OPEN_DIRECTORY & ~os.O_NOFOLLOW) as fd:
        remove(fd, name)


def empty(fd: int) -> None:
    """Remove the contents of an open directory, which may become writable; raises OSError as :func:`remove`."""
    _make_writable(fd)
    for entry in files.list_directory(fd):
        remove(fd, entry.name)


# What unlink and rmdir answer for a directory with contents, and for what is of another type than it was listed with.
_TO_OPEN = (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EBUSY)


def _open_if_full(dir_fd: int, entry: os.DirEntry[str]) -> int | None:
    """A descriptor as from :func:`_open` of a directory with contents; None for all else, which is removed.

    Most of a tree takes one call each then, and only the rest an open, which tells mounts.
    """
    try:
        if entry.is_dir(follow_symlinks=False):
            os.rmdir(entry.name, dir_fd=dir_fd)
        else:
            os.unlink(entry.name, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _TO_OPEN:
            raise
        return _open(dir_fd, entry.name)
    return None


def _open(dir_fd: int, name: str) -> int | None:
    """A descriptor of the directory ``name``, made writable; None if it was not a directory, and was unlinked."""
    fd = _open_if_directory(dir_fd, name)
    if fd is not None:
        try:
            _make_writable(fd)
        except BaseException:
            os.close(fd)
            raise
    return fd


def _make_writable(fd: int) -> None:
    """As its owner, we may make our directory writable. Root needs no permission."""
    if os.geteuid() != 0:
        status = os.fstat(fd)
        if status.st_mode & 0o700 != 0o700 and status.st_uid == os.geteuid():
            os.fchmod(fd, 0o700)


def _open_if_directory(dir_fd: int, name: str) -> int | None:
    try:
        return open_on_mount(dir_fd, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            try:
                os.unlink(name, dir_fd=dir_fd)
            except FileNotFoundError:
                pass
            return None
        if error.errno != errno.EACCES:
            raise
    # The kernel's work/work has mode 000, and layers may hold such directories too; as their owner we may change that.
    # O_PATH needs no permission of the directory itself.
    fd = open_on_mount(dir_fd, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)
    return open_on_mount(dir_fd, name)


def _empty(top: int, pace: Callable[[], None] | None, moved: int) -> int:
    """Remove the contents of ``top``; too deep directories are moved to ``top``. Returns the last number used."""
    stack = [(top, "", files.list_directory(top))]
    try:
        while stack:
            fd, name, entries = stack[-1]
            if not entries:
                stack.pop()
                if fd != top:
                    os.close(fd)
                    os.rmdir(name, dir_fd=stack[-1][0])
                    if pace is not None:
                        pace()
                continue
            entry = entries.pop()
            child = _open_if_full(fd, entry)
            if child is None:
                if pace is not None:
                    pace()
            elif len(stack) < _MAX_DEPTH:
                below: list[os.DirEntry[str]] = []
                stack.append((child, entry.name, below))  # first, so that an error closes it
                below += files.list_directory(child)
            else:
                os.close(child)
                moved = _move_up(fd, entry.name, top, moved)
    finally:
        for fd, _, _ in stack:
            if fd != top:
                os.close(fd)
    return moved


def _move_up(dir_fd: int, name: str, top: int, number: int) -> int:
    while True:
        number += 1
        try:
            # RENAME_NOREPLACE: the tree may have a name like ours.
            files.renameat2(dir_fd, name, top, f"onlap-deep-{number}", files.RENAME_NOREPLACE)
        except FileExistsError:
            continue
        return number

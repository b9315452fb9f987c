"""Files of a tree that nobody trusts, opened as a process inside it would see them and never outside of it.

A symlink in an image may point anywhere; here "/" and ".." end at the top of the tree. The kernel does that
(openat2(2), RESOLVE_IN_ROOT, Linux 5.6), since nothing that checks first and opens then can.
"""

from __future__ import annotations

import errno
import os
import stat

from onlap.syscalls import files

_RESOLVE = files.RESOLVE_IN_ROOT | files.RESOLVE_NO_MAGICLINKS
# Account files have some kilobytes; an image's could be endless (a sparse file of a terabyte).
_MAX_TEXT = 8 << 20


def open_inside(root: int, path: str, flags: int) -> int:
    """A descriptor of ``path`` in the tree that ``root`` is the top of; raises OSError."""
    return files.openat2(path, flags, dir_fd=root, resolve=_RESOLVE)


def status(root: int, path: str) -> os.stat_result | None:
    """What is at ``path`` in the tree, symlinks followed inside it; None where nothing is.

    Raises:
        OSError: of another kind than "there is no such file".
    """
    try:
        fd = open_inside(root, path, os.O_PATH)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def read_text(root: int, path: str) -> str:
    """The text of a regular file in the tree; empty where there is none, or something else.

    Raises:
        OSError: it cannot be read.
    """
    try:
        # Looked at before it is opened: to open a FIFO waits for its other end, and a device may act on it.
        fd = open_inside(root, path, os.O_PATH)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return ""
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            return os.fsdecode(file.read(_MAX_TEXT))
    finally:
        os.close(fd)


def missing_parts(root: int, path: str) -> list[str]:
    """Which directories on the way to ``path`` the tree lacks, ``path`` included, the topmost first; raises OSError."""
    found: list[str] = []
    here = ""
    for name in path.strip("/").split("/"):
        here = f"{here}/{name}"
        if found or status(root, here) is None:
            found.append(here)
    return found


def remove_if_empty(root: int, path: str) -> None:
    """Remove an empty directory, or a file without content, at ``path``; leave anything else; raises OSError."""
    above, _, name = path.rpartition("/")
    try:
        parent = open_inside(root, above or "/", os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISDIR(there.st_mode):
            os.rmdir(name, dir_fd=parent)
        elif stat.S_ISREG(there.st_mode) and there.st_size == 0:
            os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    finally:
        os.close(parent)

"""Files of a tree that nobody trusts, opened as a process inside it would see them and never outside of it.

A symlink in an image may point anywhere; here "/" and ".." end at the top of the tree. The kernel does that
(openat2(2), RESOLVE_IN_ROOT, Linux 5.6), since nothing that checks first and opens then can.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from onlap.syscalls import files
from onlap.trees.walk import opened

_RESOLVE = files.RESOLVE_IN_ROOT | files.RESOLVE_NO_MAGICLINKS
# Account files have some kilobytes; an image's could be endless (a sparse file of a terabyte).
_MAX_TEXT = 8 << 20
# As many as the kernel follows (path_resolution(7)).
_MAX_LINKS = 40


def opened_top(path: str) -> contextlib.AbstractContextManager[int]:
    """A descriptor of a tree's top directory, for the time of a block; raises OSError."""
    return opened(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def open_inside(root: int, path: str, flags: int) -> int:
    """A descriptor of ``path`` in the tree that ``root`` is the top of; raises OSError."""
    return files.openat2(path, flags, dir_fd=root, resolve=_RESOLVE)


def status(root: int, path: str) -> os.stat_result | None:
    """What is at ``path`` in the tree, symlinks followed inside it; None where nothing is.

    Raises:
        OSError: of another kind than "there is no such file".
    """
    with _found(root, path) as fd:
        return None if fd is None else os.fstat(fd)


@contextlib.contextmanager
def _found(root: int, path: str) -> Iterator[int | None]:
    """A descriptor of what is there, which nothing can be read from."""
    try:
        fd = open_inside(root, path, os.O_PATH)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def read_text(root: int, path: str) -> str:
    """The text of a regular file in the tree; empty where there is none, or something else.

    Raises:
        OSError: it cannot be read.
    """
    # Looked at before it is opened: to open a FIFO waits for its other end, and a device may act on it.
    with _found(root, path) as fd:
        if fd is None or not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            return os.fsdecode(file.read(_MAX_TEXT))


def missing_parts(root: int, path: str) -> list[str]:
    """Which directories on the way to ``path`` the tree lacks, ``path`` included, the topmost first; raises OSError."""
    found: list[str] = []
    here = ""
    for name in path.strip("/").split("/"):
        here = f"{here}/{name}"
        if found or status(root, here) is None:
            found.append(here)
    return found


def real_path(root: int, path: str) -> str:
    """``path`` without symlinks, as the kernel would find it inside the tree; also where it ends in nothing.

    Raises:
        OSError: the tree refuses; ELOOP: too many symlinks.
    """
    todo = path.split("/")[::-1]
    done: list[str] = []
    followed = 0
    while todo:
        name = todo.pop()
        if name in ("", "."):
            continue
        if name == "..":
            done = done[:-1]
            continue
        target = _link(root, "/" + "/".join(done), name)
        if target is None:
            done.append(name)
            continue
        followed += 1
        if followed > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if target.startswith("/"):
            done = []
        todo += target.split("/")[::-1]
    return "/" + "/".join(done)


def _link(root: int, above: str, name: str) -> str | None:
    """Where a symlink leads; None where there is none."""
    try:
        with _directory(root, above) as parent:
            return os.readlink(name, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def check_directory(root: int, path: str) -> None:
    """Raise OSError where there is no directory at ``path``."""
    with _directory(root, path):
        pass


def make(root: int, path: str, *, is_directory: bool) -> None:
    """Make an empty directory or file, as a runtime makes what it mounts at; raises OSError."""
    above, _, name = path.rpartition("/")
    with _directory(root, above or "/") as parent:
        if is_directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent))


def set_changed(root: int, path: str, changed_ns: int) -> None:
    """Give a directory another time of change; raises OSError."""
    with _directory(root, path) as fd:
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, changed_ns))


@contextlib.contextmanager
def _directory(root: int, path: str) -> Iterator[int]:
    fd = open_inside(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def remove_if_empty(root: int, path: str) -> None:
    """Remove an empty directory, or a file without content, at ``path``; leave anything else; raises OSError."""
    above, _, name = path.rpartition("/")
    try:
        with _directory(root, above or "/") as parent:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(there.st_mode):
                os.rmdir(name, dir_fd=parent)
            elif stat.S_ISREG(there.st_mode) and there.st_size == 0:
                os.unlink(name, dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY):
            raise

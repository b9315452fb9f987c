"""Files of an untrusted tree, found as a process inside it would find them, and never outside of it.

A symlink in an image may point anywhere; here "/" and ".." end at the top of the tree. The kernel guarantees that
(openat2(2), RESOLVE_IN_ROOT, Linux 5.6); a check before the opening could not.
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
# Bytes. Account files have some kilobytes; an image's may be a sparse file of a terabyte.
_MAX_TEXT = 8 << 20
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
# As many as the kernel follows (path_resolution(7)).
_MAX_LINKS = 40


def opened_top(path: str) -> contextlib.AbstractContextManager[int]:
    """A descriptor of a tree's top directory, for the time of a block; raises OSError."""
    return opened(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


@contextlib.contextmanager
def opened_inside(root: int, path: str, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> Iterator[int]:
    """A descriptor of ``path`` in the tree that ``root`` is the top of, for the time of a block; raises OSError."""
    fd = files.openat2(path, flags, dir_fd=root, resolve=_RESOLVE)
    try:
        yield fd
    finally:
        os.close(fd)


def status(root: int, path: str) -> os.stat_result | None:
    """The status of ``path`` in the tree, with symlinks followed inside it; None where there is nothing.

    Raises:
        OSError: it cannot be looked up.
    """
    try:
        with opened_inside(root, path, os.O_PATH) as fd:
            return os.fstat(fd)
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise


def read_text(root: int, path: str) -> str:
    """The text of a regular file in the tree; empty where there is none, or something else.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with opened_inside(root, path, os.O_PATH) as fd:
            # Checked before it is opened to read: opening a FIFO waits for its other end, and a device may act on it.
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return ""
            with open(f"/proc/self/fd/{fd}", "rb") as file:
                return os.fsdecode(file.read(_MAX_TEXT))
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return ""
        raise


def missing_parts(root: int, path: str) -> list[str]:
    """The parts of ``path`` that the tree lacks, with ``path`` itself, the topmost first; raises OSError."""
    found: list[str] = []
    here = ""
    for name in path.strip("/").split("/"):
        here = f"{here}/{name}"
        if found or status(root, here) is None:
            found.append(here)
    return found


def real_path(root: int, path: str) -> str:
    """``path`` without symlinks, as the kernel would resolve it inside the tree; also where nothing is there.

    Raises:
        OSError: it cannot be resolved; ELOOP: there are too many symlinks.
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
    """The target of a symlink; None where there is none."""
    try:
        with opened_inside(root, above) as parent:
            return os.readlink(name, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def make(root: int, path: str, *, is_directory: bool) -> None:
    """Make an empty directory or file, as a runtime makes what it mounts at; raises OSError."""
    above, _, name = path.rpartition("/")
    with opened_inside(root, above or "/") as parent:
        if is_directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent))


def set_mtime(root: int, path: str, mtime_ns: int) -> None:
    """Set the modification time of a directory, in ns; raises OSError."""
    with opened_inside(root, path) as fd:
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))


def remove_if_empty(root: int, path: str) -> None:
    """Remove an empty directory, or a file without content, at ``path``; leave anything else; raises OSError."""
    above, _, name = path.rpartition("/")
    try:
        with opened_inside(root, above or "/") as parent:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(there.st_mode):
                os.rmdir(name, dir_fd=parent)
            elif stat.S_ISREG(there.st_mode) and there.st_size == 0:
                os.unlink(name, dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY):
            raise

"""The lock files of the tools, by which they exclude each other: locks of fcntl(2) on whole files.

Who writes holds a write lock, also for as long as it unpacks a layer; who reads holds a read lock.

Source: containers/storage 1.57.2, ``pkg/lockfile/lockfile_unix.go``, ``store.go`` (``startUsingGraphDriver``,
``writeToAllStores``: the order).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator

from onlap import errors
from onlap.check.stores.containers_storage.records import Base
from onlap.check.stores.containers_storage.state import Bases

LAYERS_LOCK = "layers.lock"

# Seconds to wait for the tools: to mend, and to look at what they do not change meanwhile.
_PATIENCE = 10.0
_LOOK_PATIENCE = 2.0
_PAUSE = 0.05

# A process loses its lock (fcntl(2)) when it closes any descriptor of the file: only one of ours at a time.
_ours = threading.RLock()


@contextlib.contextmanager
def locked(base: Base, name: str) -> Iterator[None]:
    """A block in which no tool reads or changes what a lock file of theirs protects.

    Raises:
        Busy: a tool holds it for longer than we wait.
        OSError: it cannot be locked.
    """
    with _ours:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(f"{base.directory}/{name}", flags, 0o644)
        try:
            if not _wait(fd, fcntl.LOCK_EX, time.monotonic() + _PATIENCE):
                raise errors.Busy(
                    f"the store's {name} is locked", key=base.directory, hint="let its tools end, and try again"
                )
            yield
        finally:
            os.close(fd)


@contextlib.contextmanager
def quiet(bases: Bases) -> Iterator[bool]:
    """A block in which no tool changes the store; what it yields says whether that could be had.

    Raises:
        OSError: that cannot be told.
    """
    wanted = (
        (bases.root, "storage.lock"),
        (bases.layers, LAYERS_LOCK),
        (bases.images, "images.lock"),
        (bases.containers, "containers.lock"),
    )
    with _ours, contextlib.ExitStack() as held:
        end = time.monotonic() + _LOOK_PATIENCE
        got = True
        for base, name in wanted:
            fd = _open(base, name)
            if fd is None:
                continue  # no tool has come to it yet
            held.callback(os.close, fd)
            if not _wait(fd, fcntl.LOCK_SH, end):
                got = False
                held.close()
                break
        yield got


def is_locked(base: Base, path: str) -> bool:
    """Whether a tool holds this lock file to write; False if there is none.

    Not for a file of :func:`quiet` in its block.

    Raises:
        OSError: that cannot be told.
    """
    with _ours:
        fd = _open(base, path)
        if fd is None:
            return False
        try:
            return not _try(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)


def _open(base: Base, path: str) -> int | None:
    fd = base.find(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if fd is None:
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def _wait(fd: int, kind: int, end: float) -> bool:
    while not _try(fd, kind):
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.lockf(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True

"""flock(2): locks that end with their process, however it ends.

A lock belongs to an open file description: two opens of one file exclude each other also inside a process, and a
rename of the file changes nothing.
"""

from __future__ import annotations

import fcntl
import os
import threading

from onlap import errors


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file or directory if nobody holds it the other way."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_directory(path: str) -> int:
    """A descriptor of a directory to lock."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def claim_directory(path: str) -> int | None:
    """Make a directory and hold its lock; None when somebody holds it already.

    Returns:
        The descriptor to keep open. Whoever takes the directory away for dead takes its lock first.
    """
    while True:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        try:
            fd = open_directory(path)
        except FileNotFoundError:
            continue
        if not try_lock(fd):
            os.close(fd)
            return None
        # Between mkdir and flock somebody may have taken it for a dead one's: then the name is gone, or another's.
        if _still_at(fd, path):
            return fd
        os.close(fd)


def _still_at(fd: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


class FileLock:
    """An exclusive lock on a file, waited for in the order of arrival.

    Args:
        path: the file; made when it does not exist.
        timeout: how many seconds to wait for other processes.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            Unavailable: another process has held it all the time.
        """
        if not try_lock(self._fd):
            self._wait()

    def release(self) -> None:
        """Give it back."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file, and so give the lock back."""
        os.close(self._fd)

    def _wait(self) -> None:
        # flock(2) has no timeout, and asking again and again would let others overtake us (16 processes behind
        # SQLite's busy handler: a wait of 2.1 s at worst; queued in the kernel: 88 ms). So a thread waits in the
        # kernel's queue, for a descriptor of its own that it gives back if we have gone meanwhile.
        waiter = _Waiter(self._path)
        if not waiter.wait(self._timeout):
            raise errors.Unavailable(
                f"another process has held {self._path} for {self._timeout:g} s",
                hint="see who with: fuser -v, then try again",
            )
        fd, self._fd = self._fd, waiter.fd
        os.close(fd)


class _Waiter:
    """One blocking flock(2), in a thread that the caller may abandon."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._mutex = threading.Lock()
        self._taken = threading.Event()
        self._abandoned = False
        threading.Thread(target=self._run, name="onlap-lock", daemon=True).start()

    def wait(self, timeout: float) -> bool:
        if self._taken.wait(timeout):
            return True
        with self._mutex:
            if self._taken.is_set():
                return True
            self._abandoned = True
            return False

    def _run(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        with self._mutex:
            if self._abandoned:
                os.close(self.fd)
            else:
                self._taken.set()

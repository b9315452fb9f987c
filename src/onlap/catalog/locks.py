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

    The file's first bytes hold a number for whoever has the lock; it is kept by nobody through a crash.

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
        """Give it back and close the file."""
        # Said aloud: a forked child may have the same open file, which would keep the lock.
        self.release()
        os.close(self._fd)

    def abandon(self) -> None:
        """In a forked child: close the file that it shares with its parent, and leave the parent's lock alone."""
        os.close(self._fd)

    @property
    def number(self) -> int:
        """The number in the file; 0 when there is none."""
        return int.from_bytes(os.pread(self._fd, 8, 0), "little")

    @number.setter
    def number(self, value: int) -> None:
        os.pwrite(self._fd, value.to_bytes(8, "little"), 0)

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


class BriefLock(FileLock):
    """A FileLock that is opened for one use."""

    def __exit__(self, *_: object) -> None:
        self.close()


class _Waiter:
    """One blocking flock(2), in a thread that the caller may abandon."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._mutex = threading.Lock()
        self._taken = threading.Event()
        self._abandoned = False
        _waiting.add(self.fd)
        threading.Thread(target=self._run, name="onlap-lock", daemon=True).start()

    def wait(self, timeout: float) -> bool:
        try:
            if self._taken.wait(timeout):
                return True
        except BaseException:
            # A signal (KeyboardInterrupt): nobody will use the lock that the thread is going to get.
            if not self._abandon():
                fcntl.flock(self.fd, fcntl.LOCK_UN)
                os.close(self.fd)
            raise
        return not self._abandon()

    def _abandon(self) -> bool:
        """Leave the thread alone with the lock; False when it has it already."""
        with self._mutex:
            if self._taken.is_set():
                return False
            self._abandoned = True
            return True

    def _run(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        with self._mutex:
            _waiting.discard(self.fd)
            if self._abandoned:
                fcntl.flock(self.fd, fcntl.LOCK_UN)
                os.close(self.fd)
            else:
                self._taken.set()


# Descriptors that threads wait with: a child has them too, and no thread that would give them back.
_waiting: set[int] = set()


def _after_fork_in_child() -> None:
    for fd in _waiting:
        os.close(fd)
    _waiting.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)

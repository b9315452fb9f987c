"""flock(2): locks that end with their process, however it ends.

A lock belongs to an open file description: two opens of one file exclude each other within one process as well, and
renaming the file changes nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack

from onlap.trees.meta import drop_acls

# Never through a symlink, and never inherited by a new program.
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


class Flock:
    """An open file or directory and this process's flock on it; a context manager that releases both.

    A forked child shares the open file and would keep the lock for as long as it lives. So a process knows all of its
    locks, and a child closes those that it inherited: there ``fd`` is -1, and :meth:`release` does nothing.

    Args:
        path: what to open; a directory unless ``flags`` say otherwise.
        flags: of open(2); ``O_NOFOLLOW`` and ``O_CLOEXEC`` are added.
        dir_fd: what ``path`` is relative to.

    Attributes:
        fd: the descriptor; -1 after :meth:`release`.
    """

    fd = -1

    def __init__(self, path: str | os.PathLike[str], flags: int = _DIRECTORY, *, dir_fd: int | None = None) -> None:
        self._pid = os.getpid()
        self.fd = fd = os.open(path, flags | _FLAGS, 0o600, dir_fd=dir_fd)
        # An exception (KeyboardInterrupt) may come before anyone can release it. Not __del__, which also runs for
        # released ones, and in which Python drops what a signal handler raises.
        _open_flocks[fd] = weakref.ref(self, lambda _: _close_forgotten(fd))

    def __enter__(self) -> Flock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def lock(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Take the lock, or change it to the other kind; False if a conflicting lock is held.

        Args:
            shared: take a shared lock.
            wait: wait for it, however long that takes.

        Raises:
            OSError: the filesystem refuses (ENOLCK).
        """
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        """Release the lock and keep the file open.

        Raises:
            OSError: the filesystem refuses (ENOLCK).
        """
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def release(self) -> None:
        """Release the lock and close the file; idempotent, and never fails."""
        fd = self.fd
        if fd < 0:
            return
        # An interrupt comes as a call begins or ends: all calls are inside this block.
        try:
            _open_flocks.pop(fd, None)
            # The close alone is not enough: a child between fork and exec has the same open file, and would keep the
            # lock. But a child that was forked behind Python's back must not release its parent's.
            if self._pid == os.getpid():
                fcntl.flock(fd, fcntl.LOCK_UN)
        except OSError:
            pass  # ENOLCK: the close releases it as well
        finally:
            # Again, if an interrupt kept it: the number is soon another file's, which would be closed then.
            if fd in _open_flocks:
                del _open_flocks[fd]  # noqa: RUF051 - an interrupt comes as a call ends
            self.fd = -1
            try:
                os.close(fd)
            except OSError:
                pass  # EIO, EINTR: it is closed all the same (close(2))

    def leave(self) -> None:
        """Close the file, and leave the lock to a process that was given the descriptor; it ends with the last one."""
        _open_flocks.pop(self.fd, None)
        self._forget()

    def is_at(self, path: str) -> bool:
        """Whether the path still leads to it: the previous holder of the lock may have moved it away."""
        try:
            return os.path.samestat(os.lstat(path), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def _forget(self) -> None:
        """Only close it. In a forked child LOCK_UN would take the lock from the parent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


# By descriptor. Weak: an unreferenced one is closed, which releases its lock.
_open_flocks: dict[int, weakref.ref[Flock]] = {}


def _close_forgotten(fd: int) -> None:
    _open_flocks.pop(fd, None)
    os.close(fd)


def _after_fork_in_child() -> None:
    try:
        _forget_all()
    except BaseException:
        # A signal, whose exception Python only prints, as it does those of all such hooks.
        _forget_all()
        raise


def _forget_all() -> None:
    for reference in list(_open_flocks.values()):
        held = reference()
        if held is not None:
            held._forget()
    _open_flocks.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def lock_directory(path: str, *, shared: bool = False) -> Flock | None:
    """Open a directory and take its lock; None if a conflicting lock is held.

    Raises:
        OSError: it cannot be opened, or the filesystem refuses.
    """
    held = Flock(path)
    if held.lock(shared=shared):
        return held
    held.release()
    return None


def claim_directory(path: str) -> Flock | None:
    """Make a directory and take its lock; None if the lock is held.

    Whoever removes an abandoned directory takes its lock first.

    Raises:
        OSError: it cannot be made, or the filesystem refuses.
    """
    while True:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        try:
            held = Flock(path)
        except FileNotFoundError:
            continue
        with ExitStack() as on_error:
            on_error.callback(held.release)
            if not held.lock():
                return None
            # Between mkdir and flock it may have been removed as abandoned: then the name is gone, or another's.
            if held.is_at(path):
                # Trees built in it must not inherit any.
                drop_acls(held.fd)
                os.chmod(held.fd, 0o700)
                on_error.pop_all()
                return held


def abandoned(directory: str, prefixes: tuple[str, ...] = ("",)) -> Iterator[str]:
    """The names in ``directory`` that begin with one of ``prefixes`` and are not locked.

    A directory among them is locked until the next name is requested. What is not a directory cannot be locked.

    Raises:
        OSError: the directory, or one in it, cannot be opened.
    """
    for name in sorted(os.listdir(directory)):
        if not name.startswith(prefixes):
            continue
        try:
            held = lock_directory(f"{directory}/{name}")
        except FileNotFoundError:
            continue  # its owner has removed it
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            yield name
            continue
        if held is not None:
            with held:
                yield name


def _open(path: str) -> Flock:
    try:
        return Flock(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        # A file need not be open for writing to be locked; only its number cannot change.
        return Flock(path, os.O_RDONLY)


class FileLock:
    """An exclusive lock on a file, for one thread at a time; the kernel queues the waiting processes.

    The file's first bytes hold a number for the holder of the lock; a crash may lose it.

    Args:
        path: the file; created if it does not exist.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._held: Flock | None = None
        self._number: int | None = None  # as it is in the file; None if that must be read

    def acquire(self, *, wait: bool) -> bool:
        """Take the lock; False if another process has it.

        Args:
            wait: wait for it, however long that takes. Polling would let others overtake us (16 processes behind
                SQLite's busy handler waited 2.1 s at worst; queued in the kernel, 88 ms).

        Raises:
            OSError: the filesystem refuses.
        """
        if self._held is None:
            self._held = _open(self._path)
        self._number = None  # others may have changed it
        return self._held.lock(wait=wait)

    def release(self) -> None:
        """Release the lock; never fails."""
        if self._held is None:
            return
        try:
            self._held.unlock()
        except OSError:
            self.close()  # ENOLCK: closing the file releases it as well

    def close(self) -> None:
        """Release the lock and close the file, which the next :meth:`acquire` opens again."""
        held, self._held = self._held, None
        if held is not None:
            held.release()

    @property
    def number(self) -> int:
        """The number in the file, 0 if there is none; only for the holder of the lock."""
        assert self._held is not None
        if self._number is None:
            self._number = int.from_bytes(os.pread(self._held.fd, 8, 0), "little")
        return self._number

    @number.setter
    def number(self, value: int) -> None:
        assert self._held is not None
        self._number = None
        os.pwrite(self._held.fd, value.to_bytes(8, "little"), 0)
        self._number = value

"""Writing blobs: each is complete and verified before it is visible.

A blob of a known digest that comes over a network is written as a *partial*, which another attempt, in this process or
another, can resume. All others are written into the staging directory of the process, and never resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from onlap import errors
from onlap.catalog.disk.staging import Staging
from onlap.content.lease import Lease
from onlap.forks import unless_forked
from onlap.layers.stream.digests import PREFIX, check_content
from onlap.locks import Flock
from onlap.syscalls.files import write_all

_CHUNK = 1 << 20
# Seconds between two attempts at the lock of a partial that another process writes.
_PAUSE = 0.1


class Blob(NamedTuple):
    """A blob that is in the store.

    Attributes:
        digest: ``"sha256:..."``.
        size: in bytes.
    """

    digest: str
    size: int


class Writer:
    """A blob being written; a context manager that leaves nothing unless :meth:`commit` was called.

    Args:
        staging: where it is written.
        publish: moves the finished file to its place, by its digest.
    """

    def __init__(self, staging: Staging, publish: Callable[[str, str], None]) -> None:
        self._directory = staging.new()
        self._discard = unless_forked(staging.discard)
        self._publish = publish
        self._path = f"{self._directory}/blob"
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._discard(self._directory)

    def write(self, data: bytes | memoryview) -> int:
        """Add all of ``data``.

        Raises:
            OSError: it cannot be written.
        """
        self._hash.update(data)
        self.size += len(data)
        write_all(self._fd, data)
        return len(data)

    def commit(self, digest: str | None = None, size: int | None = None, *, lease: Lease | None = None) -> Blob:
        """Make it durable and visible.

        Args:
            digest: what it must have.
            size: what it must have, in bytes.
            lease: pins it before it could be collected.

        Raises:
            DigestMismatch: it is something else; nothing is kept.
            OSError: it cannot be written.
        """
        found = PREFIX + self._hash.hexdigest()
        check_content(found, self.size, digest, size)
        if lease is not None:
            lease.pin(found)
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._publish(self._path, found)
        return Blob(found, self.size)


class Partial:
    """A blob of a known digest that is being fetched; a context manager. What an interrupted attempt received is kept.

    Args:
        path: of the partial; waited for while another process writes it.
        digest: what the blob must have.
        size: what it must have, in bytes.
        present: tells whether the blob is in the store.
        publish: moves the finished file to its place, by its digest.

    Attributes:
        done: whether the blob is in the store already, so that there is nothing to do.
        offset: bytes that are there.
    """

    def __init__(
        self,
        path: str,
        digest: str,
        size: int,
        present: Callable[[], bool],
        publish: Callable[[str, str], None],
    ) -> None:
        self._path = path
        self._digest = digest
        self._size = size
        self._publish = publish
        self._hash = hashlib.sha256()
        self.offset = 0
        self._held = _open_locked(path, present)
        try:
            self.done = self._held is None or present()
            if self.done:
                self.close()
            else:
                self._read_present()
        except BaseException:
            self.close()  # the next attempt, also of this process, would wait for it
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others resume it."""
        if self._held is not None:
            self._held.release()

    @property
    def _fd(self) -> int:
        return -1 if self._held is None else self._held.fd

    def _read_present(self) -> None:
        """Hash what an earlier attempt has left, since the digest is that of the whole blob."""
        if os.fstat(self._fd).st_size > self._size:
            os.ftruncate(self._fd, 0)
        while data := os.read(self._fd, _CHUNK):
            self._hash.update(data)
            self.offset += len(data)

    def restart(self) -> None:
        """Start again at the first byte."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self.offset = 0

    def write(self, data: bytes | memoryview) -> int:
        """Add all of ``data``.

        Raises:
            DigestMismatch: there is more than the blob's size; nothing is kept.
            OSError: it cannot be written.
        """
        if self.offset + len(data) > self._size:
            self._drop()
            raise errors.DigestMismatch(
                f"{self._digest} has more than {self._size} bytes", key=self._digest, hint="fetch it again"
            )
        self._hash.update(data)
        self.offset += len(data)
        write_all(self._fd, data)
        return len(data)

    def commit(self) -> Blob:
        """Make it durable and visible.

        Raises:
            DigestMismatch: it is something else; nothing is kept, so that the next attempt starts from nothing.
            OSError: it cannot be written.
        """
        try:
            check_content(PREFIX + self._hash.hexdigest(), self.offset, self._digest, self._size)
        except errors.DigestMismatch:
            self._drop()
            raise
        try:
            os.fsync(self._fd)
        except OSError:
            # The kernel reports it once, and what it could not write counts as clean: it must not be resumed.
            self._drop()
            raise
        self._publish(self._path, self._digest)
        self.done = True
        self.close()
        return Blob(self._digest, self._size)

    def _drop(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self.close()


def _open_locked(path: str, present: Callable[[], bool]) -> Flock | None:
    """The partial, locked; None when the blob came while another process wrote it."""
    while True:
        held = Flock(path, os.O_RDWR | os.O_CREAT)
        with contextlib.ExitStack() as stack:
            stack.enter_context(held)
            if held.lock() and held.is_at(path):
                stack.pop_all()
                return held
        if present():
            return None
        time.sleep(_PAUSE)

"""Reading a layer's archive so that reading, inflating, hashing and writing overlap.

hashlib, the decompressors and the system calls release the interpreter's lock, so that two cores are used by threads:
one reads, hashes what it read and inflates; one hashes what was inflated; the caller writes files. An archive without
compression has one hash and takes one thread less. A small one takes none: starting threads would cost more than they
save.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import deque
from typing import BinaryIO, NamedTuple

from onlap import errors
from onlap.arguments import check_file, check_path
from onlap.layers.stream import compression

_CHUNK = compression.CHUNK

# Compressed bytes up to which no thread is started.
_SMALL = 1 << 20

# Chunks that wait between two threads: enough that neither waits for the other's unevenness, 2 MiB of memory.
_DEPTH = 8


class Digests(NamedTuple):
    """What went through a pipeline.

    Attributes:
        digest: of the stream as it was read, ``"sha256:..."``.
        diff_id: of the archive in it, without compression.
        size: bytes as read.
        uncompressed: bytes of the archive.
    """

    digest: str
    diff_id: str
    size: int
    uncompressed: int


class _Closed(Exception):
    """The other side of a channel has left."""


class _Channel:
    """A bounded queue between two threads."""

    def __init__(self) -> None:
        self._items: deque[bytes | BaseException] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: bytes | BaseException) -> None:
        """Add an item, waiting for room."""
        with self._changed:
            while len(self._items) >= _DEPTH and not self._closed:
                self._changed.wait()
            if self._closed:
                raise _Closed
            self._items.append(item)
            self._changed.notify()

    def get(self) -> bytes:
        """The next item, none once the channel is closed and empty; an exception that was put is raised."""
        with self._changed:
            while not self._items:
                if self._closed:
                    return b""
                self._changed.wait()
            item = self._items.popleft()
            self._changed.notify()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Let both sides end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Input:
    """The bytes of a file or stream, with what was read ahead to look at; counted and hashed."""

    def __init__(self, source: BinaryIO | str | bytes | os.PathLike[str]) -> None:
        self._fd = -1
        self._file: BinaryIO | None = None
        if isinstance(source, (str, os.PathLike)):
            source = check_path(source, "path of the archive")
        if isinstance(source, (str, bytes)):
            self._fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        else:
            check_file(source, "archive", "read")
            self._file = source
        self._start = b""
        self.hash = hashlib.sha256()
        self.count = 0

    def close(self) -> None:
        """Close what was opened here."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def total(self) -> int | None:
        """How many bytes there are to read, where that is known."""
        try:
            fd = self._fd if self._file is None else self._file.fileno()
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return None
            return status.st_size - (0 if self._file is None else self._file.tell())
        except (
            OSError,
            AttributeError,
        ):  # io.UnsupportedOperation is an OSError; a stream may have no fileno at all
            return None

    def look(self, count: int) -> bytes:
        """The first ``count`` bytes, or all if there are fewer; they are still to be read."""
        parts = [self._start]
        have = len(self._start)
        while have < count and (data := self._raw(count - have)):
            parts.append(data)
            have += len(data)
        self._start = b"".join(parts)
        return self._start

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes; none at the end."""
        if self._start:
            data, self._start = self._start[:count], self._start[count:]
        else:
            data = self._raw(count)
        self.hash.update(data)
        self.count += len(data)
        return data

    def _raw(self, count: int) -> bytes:
        if self._file is None:
            return os.read(self._fd, count)
        data = self._file.read(count)
        if not isinstance(data, bytes):
            # None from a non-blocking file, str from a text file
            raise errors.InvalidArgument("a layer is read from a blocking binary file")
        return data


class Pipeline:
    """An archive on its way from a file to its reader. A context manager.

    The caller's file is read from another thread while the pipeline is open; leaving the block waits for the read
    that is under way.

    Args:
        source: a path, or a binary file that is read from where it stands to its end.

    Attributes:
        compression: what was found, as the constants of :mod:`onlap.layers.stream.compression`.
        total: bytes to read, None where that is not known.
        produced: bytes of the archive handed out so far.

    Raises:
        OSError: the path cannot be opened or read.
        Unimplemented: no library for its compression is installed.
    """

    def __init__(self, source: BinaryIO | str | bytes | os.PathLike[str]) -> None:
        self._input = Input(source)
        self._threads: list[threading.Thread] = []
        self._out = _Channel()
        self._to_hash = _Channel()
        self._inflater: compression.Inflater | None = None
        self._ended = False
        self.produced = 0
        try:
            self.total = self._input.total
            start = self._input.look(_SMALL)
            self.compression = compression.detect(start[: compression.PEEK])
            if self.compression == compression.NONE:
                self._hash = self._input.hash
            else:
                self._inflater = compression.Inflater(self._input.read, self.compression)
                self._hash = hashlib.sha256()
        except BaseException:
            self._input.close()
            raise
        if len(start) == _SMALL:
            self._start(self._produce)
            if self._inflater is not None:
                self._start(self._hash_inflated)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def consumed(self) -> int:
        """Bytes read so far, before decompression."""
        return self._input.count

    def chunk(self) -> bytes:
        """The next bytes of the archive, at most 256 KiB; none at the end.

        Raises:
            DataLoss: the compressed stream is damaged.
            OSError: it cannot be read.
        """
        if self._ended:
            return b""
        if self._threads:
            data = self._out.get()
        else:
            data = self._next()
            if self._inflater is not None:
                self._hash.update(data)
        self.produced += len(data)
        self._ended = not data
        return data

    def digests(self) -> Digests:
        """The digests and sizes; only after :meth:`chunk` gave the end."""
        self._join()
        return Digests(
            "sha256:" + self._input.hash.hexdigest(),
            "sha256:" + self._hash.hexdigest(),
            self._input.count,
            self.produced,
        )

    def close(self) -> None:
        """End the threads and close what was opened."""
        self._out.close()
        self._to_hash.close()
        self._join()
        self._input.close()

    def _start(self, target: object) -> None:
        thread = threading.Thread(target=target, name="onlap-layer", daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _next(self) -> bytes:
        return self._input.read(_CHUNK) if self._inflater is None else self._inflater.chunk()

    def _produce(self) -> None:
        try:
            while True:
                data = self._next()
                if self._inflater is not None:
                    self._to_hash.put(data)
                self._out.put(data)
                if not data:
                    return
        except _Closed:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        try:
            if self._inflater is not None:
                self._to_hash.put(b"")
            self._out.put(error)
        except _Closed:
            return

    def _hash_inflated(self) -> None:
        while data := self._to_hash.get():
            self._hash.update(data)

"""Reading a layer's archive so that reading, decompressing, hashing and writing overlap.

hashlib, the decompressors and the system calls release the GIL, so threads can use two cores: one reads, hashes what it
read and decompresses; one hashes the decompressed archive; the caller writes files. An uncompressed archive has one
hash and needs one thread less. If it is a file, the caller also reads it, since hashing alone takes as long as reading
and writing big files. A small archive is read without threads: starting them would cost more than they save.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from onlap import errors
from onlap.arguments import check_file, check_path
from onlap.layers.stream import compression
from onlap.layers.stream.channel import Channel, Closed
from onlap.layers.stream.digests import PREFIX
from onlap.layers.stream.hashing import HashedReader

# Archives with fewer compressed bytes are read without threads.
_SMALL = 1 << 20


class Digests(NamedTuple):
    """What went through a pipeline.

    Attributes:
        digest: of the stream as read, ``"sha256:..."``.
        diff_id: of the archive without compression; empty if it was not asked for.
        size: bytes read.
        uncompressed: bytes of the archive without compression.
    """

    digest: str
    diff_id: str
    size: int
    uncompressed: int


class Input:
    """The bytes of a file or stream, counted and hashed; its start can be peeked at."""

    def __init__(self, source: BinaryIO | str | os.PathLike[str]) -> None:
        self._opened = isinstance(source, (str, os.PathLike))
        if isinstance(source, (str, os.PathLike)):
            self._file: BinaryIO = io.FileIO(check_path(source, "path of the archive"))
        else:
            check_file(source, "archive", "read")
            self._file = source
        self._start = b""
        self.hash = hashlib.sha256()
        self.count = 0

    def close(self) -> None:
        """Close what was opened here."""
        if self._opened:
            self._file.close()

    @property
    def total(self) -> int | None:
        """How many bytes there are to read; None if unknown."""
        try:
            status = os.fstat(self._file.fileno())
            return status.st_size - self._file.tell() if stat.S_ISREG(status.st_mode) else None
        except (OSError, AttributeError):
            return None  # io.UnsupportedOperation is an OSError; a stream may have no fileno at all

    def peek(self, count: int) -> bytes:
        """The first ``count`` bytes, or all if there are fewer; :meth:`read` returns them again."""
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

    @property
    def is_file(self) -> bool:
        """Whether it is a file on a disk, which can be read into buffers, and keeps nobody waiting for long."""
        return self.total is not None and hasattr(self._file, "readinto")

    def read_into(self, buffer: memoryview) -> int:
        """Fill a buffer from its start, and return how many bytes; 0 at the end. The caller is to hash them."""
        if self._start:
            data, self._start = self._start[: len(buffer)], self._start[len(buffer) :]
            buffer[: len(data)] = data
            count = len(data)
        else:
            count = self._file.readinto(buffer)  # type: ignore[attr-defined]
            if not isinstance(count, int):
                raise errors.InvalidArgument("a layer is read from a blocking binary file")
        self.count += count
        return count

    def _raw(self, count: int) -> bytes:
        data = self._file.read(count)
        if not isinstance(data, bytes):
            # None from a non-blocking file, str from a text file.
            raise errors.InvalidArgument("a layer is read from a blocking binary file")
        return data


class Pipeline:
    """The uncompressed bytes of an archive, read from a file. A context manager.

    While the pipeline is open, another thread may read the caller's file; leaving the block waits for the current read.

    Args:
        source: a path, or a binary file, which is read from its position to its end.
        diff_id: whether the digest of a compressed archive without its compression is asked for; it costs more than
            the other, which proves the same where it is known.

    Attributes:
        compression: one of the constants of :mod:`onlap.layers.stream.compression`.
        total: bytes to read; None if unknown.
        produced: bytes of the archive returned so far.

    Raises:
        OSError: the path cannot be opened or read.
        Unimplemented: no library for its compression is installed.
    """

    def __init__(self, source: BinaryIO | str | os.PathLike[str], *, diff_id: bool = True) -> None:
        self._input = Input(source)
        self._hashes = diff_id
        self._threads: list[threading.Thread] = []
        self._out = Channel()
        self._to_hash = Channel()
        self._inflater: compression.Inflater | None = None
        self._hashed: HashedReader | None = None
        self._ended = False
        self.produced = 0
        try:
            self.total = self._input.total
            start = self._input.peek(_SMALL)
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
            if self._inflater is None and self._input.is_file:
                self._hashed = HashedReader(self._input.read_into, self._hash)
                return
            self._start(self._produce)
            if self._inflater is not None and self._hashes:
                self._start(self._hash_inflated)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def consumed(self) -> int:
        """Bytes read so far, before decompression."""
        return self._input.count

    def chunk(self) -> bytes | memoryview:
        """The next bytes of the archive, at most 1 MiB, valid until the next call; none at the end.

        Raises:
            DataLoss: the compressed stream is damaged.
            OSError: it cannot be read.
        """
        if self._ended:
            return b""
        data: bytes | memoryview
        if self._hashed is not None:
            data = self._hashed.chunk()
        elif self._threads:
            data = self._out.get()
        else:
            data = self._next()
            if self._inflater is not None and self._hashes:
                self._hash.update(data)
        self.produced += len(data)
        self._ended = not data
        return data

    def digests(self) -> Digests:
        """The digests and sizes; only after :meth:`chunk` reached the end."""
        self._join()
        hashed = self._inflater is None or self._hashes
        diff_id = PREFIX + self._hash.hexdigest() if hashed else ""
        return Digests(PREFIX + self._input.hash.hexdigest(), diff_id, self._input.count, self.produced)

    def close(self) -> None:
        """Stop the threads and close the path that was opened."""
        self._out.close()
        self._to_hash.close()
        self._join()
        self._input.close()

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="onlap-layer", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _join(self) -> None:
        if self._hashed is not None:
            self._hashed.join()
        for thread in self._threads:
            thread.join()

    def _next(self) -> bytes:
        return self._input.read(compression.CHUNK) if self._inflater is None else self._inflater.chunk()

    def _produce(self) -> None:
        try:
            while True:
                data = self._next()
                if self._inflater is not None and self._hashes:
                    self._to_hash.put(data)
                self._out.put(data)
                if not data:
                    return
        except Closed:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._to_hash.close()
            with contextlib.suppress(Closed):
                self._out.put(error)

    def _hash_inflated(self) -> None:
        while data := self._to_hash.get():
            self._hash.update(data)

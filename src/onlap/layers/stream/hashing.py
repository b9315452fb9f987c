"""Reading a file while another thread hashes what was read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

# A thread that hashes needs the GIL twice per buffer, and then takes it from one that makes a system call every few
# microseconds. So these are larger than the chunks of other streams. They are filled again and again, since the pages
# of new memory would cost more than reading into it.
_SIZE = 1 << 20
_BUFFERS = 4


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> object: ...


class HashedReader:
    """Reads in the caller's thread, and hashes in its own.

    Args:
        read_into: fills a buffer from its start, and returns how many bytes; 0 at the end.
        hash: gets all of it.
    """

    def __init__(self, read_into: Callable[[memoryview], int], hash: _Hash) -> None:
        self._read_into = read_into
        self._hash = hash
        self._made = 0
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        # Each with how much of it is filled: nothing at the end.
        self._filled: SimpleQueue[tuple[memoryview, int]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="onlap-layer", daemon=True)
        self._thread.start()

    def chunk(self) -> memoryview:
        """The next bytes, at most 1 MiB, valid until the next call; none at the end.

        Raises:
            OSError: they cannot be read.
        """
        if self._made < _BUFFERS and self._free.empty():
            self._made += 1
            buffer = memoryview(bytearray(_SIZE))
        else:
            buffer = self._free.get()
        count = self._read_into(buffer)
        self._filled.put((buffer, count))
        return buffer[:count]

    def join(self) -> None:
        """Wait until everything is hashed; before the end, only what was read so far."""
        self._filled.put((memoryview(b""), 0))
        self._thread.join()

    def _run(self) -> None:
        while True:
            buffer, count = self._filled.get()
            if not count:
                return
            self._hash.update(buffer[:count])
            self._free.put(buffer)

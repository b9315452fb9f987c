"""A bounded queue of bytes between two threads, which either side can close."""

from __future__ import annotations

from queue import SimpleQueue

# How many items may wait: enough to even out both sides; 2 MiB of memory for chunks of 256 KiB.
_DEPTH = 8


class Closed(Exception):
    """The channel was closed."""


class Channel:
    """A bounded queue between two threads.

    A :class:`threading.Condition` would take several times as long, as both threads compete for the interpreter's lock.
    """

    def __init__(self) -> None:
        self._items: SimpleQueue[bytes | BaseException] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()  # one per item that may still be added
        self._closed = False
        for _ in range(_DEPTH):
            self._room.put(None)

    def put(self, item: bytes | BaseException) -> None:
        """Add an item; wait while the channel is full.

        Raises:
            Closed: the channel is closed.
        """
        if not self._closed:
            self._room.get()
        if self._closed:
            raise Closed
        self._items.put(item)

    def get(self) -> bytes:
        """The next item; raised if it is an exception. Empty once the channel is closed and no item is left."""
        if self._closed and self._items.empty():
            return b""
        item = self._items.get()
        self._room.put(None)
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Close it, and wake both sides."""
        self._closed = True
        self._room.put(None)
        self._items.put(b"")

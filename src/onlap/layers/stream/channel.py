"""A bounded queue of bytes between two threads, which either side can close."""

from __future__ import annotations

import threading
from collections import deque

# How many items may wait: enough to even out both sides; 2 MiB of memory for chunks of 256 KiB.
_DEPTH = 8


class Closed(Exception):
    """The channel was closed."""


class Channel:
    """A bounded queue between two threads."""

    def __init__(self) -> None:
        self._items: deque[bytes | BaseException] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: bytes | BaseException) -> None:
        """Add an item; wait while the channel is full.

        Raises:
            Closed: the channel is closed.
        """
        with self._changed:
            while len(self._items) >= _DEPTH and not self._closed:
                self._changed.wait()
            if self._closed:
                raise Closed
            self._items.append(item)
            self._changed.notify()

    def get(self) -> bytes:
        """The next item; raised if it is an exception. Empty once the channel is closed and no item is left."""
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
        """Close it, and wake both sides."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

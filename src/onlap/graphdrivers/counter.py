"""How often each layer is in use, by Docker's rule; and one lock per id.

Source: moby v26.1.5, daemon/graphdriver/counter.go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Counter:
    """Counts uses per key. The first use of a key that is already mounted counts the mount as another use.

    So a daemon that is restarted under running containers does not unmount them with the first Put.

    Args:
        is_mounted: called for a key that is used for the first time.
        counts: known counts; ``is_mounted`` is not called for these keys.
    """

    def __init__(self, is_mounted: Callable[[str], bool], counts: Mapping[str, int] | None = None) -> None:
        self._is_mounted = is_mounted
        self._counts = dict(counts or {})
        self._mutex = threading.Lock()

    def increment(self, key: str) -> int:
        """Add one use; return the new count."""
        return self._add(key, 1)

    def decrement(self, key: str) -> int:
        """Remove one use; return the new count. At zero the key is forgotten."""
        return self._add(key, -1)

    def forget(self, key: str) -> None:
        """Forget a key."""
        with self._mutex:
            self._counts.pop(key, None)

    def clear(self) -> None:
        """Forget all keys."""
        with self._mutex:
            self._counts.clear()

    def counts(self) -> dict[str, int]:
        """All counts."""
        with self._mutex:
            return dict(self._counts)

    def _add(self, key: str, number: int) -> int:
        with self._mutex:
            if key not in self._counts:
                self._counts[key] = 1 if self._is_mounted(key) else 0
            count = self._counts[key] = self._counts[key] + number
            if count <= 0:
                del self._counts[key]
            return count


class Locks:
    """One lock per id; it exists only while a thread holds it or waits for it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def held(self, id: str) -> Iterator[None]:
        """Hold the lock of ``id`` in a block."""
        with self._mutex:
            lock, users = self._locks.get(id, (None, 0))
            lock = lock or threading.Lock()
            self._locks[id] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._mutex:
                lock, users = self._locks[id]
                if users == 1:
                    del self._locks[id]
                else:
                    self._locks[id] = lock, users - 1

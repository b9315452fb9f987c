"""How often each layer is in use, by Docker's rule; and one lock per id.

Source: moby v26.1.5, daemon/graphdriver/counter.go.

An interrupt (KeyboardInterrupt, which a signal's handler raises in the main thread between any two bytecodes) leaves no
lock taken: what is shared changes in single steps, and what has been done can be told from it.
"""

from __future__ import annotations

from _queue import Empty, SimpleQueue
from collections.abc import Callable, Mapping
from typing import TypeVar

from onlap.forks import restarted_in_children

T = TypeVar("T")

# Seconds after which a waiting thread looks again: an interrupted one may have got the word and not passed it on.
_LOOK = 1.0


class Counter:
    """Counts uses per key. The first use of a key that is already mounted counts the mount as another use.

    So a daemon that is restarted under running containers does not unmount them with the first Put. Of the callers that
    count a key, one at a time may do so.

    Args:
        is_mounted: called for a key that is used for the first time.
        counts: known counts; ``is_mounted`` is not called for these keys.
    """

    def __init__(self, is_mounted: Callable[[str], bool], counts: Mapping[str, int] | None = None) -> None:
        self._is_mounted = is_mounted
        self._counts = dict(counts or {})

    def increment(self, key: str) -> int:
        """Add one use; return the new count."""
        return self._add(key, 1)

    def decrement(self, key: str) -> int:
        """Remove one use; return the new count. At zero the key is forgotten."""
        return self._add(key, -1)

    def count(self, key: str) -> int:
        """The count of a key; 0 if it is not known."""
        return self._counts.get(key, 0)

    def restore(self, key: str, count: int) -> None:
        """Let the count of a key be what :meth:`count` said, after something has failed."""
        if count:
            self._counts[key] = count
        else:
            self.forget(key)

    def forget(self, key: str) -> None:
        """Forget a key."""
        self._counts.pop(key, None)

    def clear(self) -> None:
        """Forget all keys."""
        self._counts.clear()

    def counts(self) -> dict[str, int]:
        """All counts."""
        return self._counts.copy()

    def _add(self, key: str, number: int) -> int:
        count = self._counts.get(key)
        if count is None:
            count = 1 if self._is_mounted(key) else 0
        count += number
        self.restore(key, max(count, 0))
        return count


class Locks:
    """One lock per id; it exists only while a thread holds it. A forked child begins with none taken."""

    def __init__(self) -> None:
        self.after_fork()
        restarted_in_children(self)

    def after_fork(self) -> None:
        """In a forked child: the threads that hold them stayed with the parent."""
        # By id, whose turn it is.
        self._turns: dict[str, SimpleQueue[None]] = {}

    def hold(self, id: str, action: Callable[[], T]) -> T:
        """Do something, and return its result, while no other thread does anything with ``id``.

        Raises:
            BaseException: its error.
        """
        # Not a context manager: an interrupt may come between its __enter__ and the block whose end calls __exit__.
        turn: SimpleQueue[None] = SimpleQueue()
        try:
            try:
                self._take(id, turn)
                return action()
            finally:
                self._give_back(id, turn)
        except BaseException as error:
            self._give_back(id, turn)  # the interrupt may have come in the other call
            if not isinstance(error, Exception):
                # It may have come before a with block that would release the lock of a directory (Flock). That is
                # released when nothing refers to it: not when somebody lets go of the interrupt.
                import traceback

                traceback.clear_frames(error.__traceback__)
            raise

    def _take(self, id: str, turn: SimpleQueue[None]) -> None:
        while (other := self._turns.setdefault(id, turn)) is not turn:
            try:
                other.get(timeout=_LOOK)
                other.put(None)  # for all others that wait
            except Empty:
                pass

    def _give_back(self, id: str, turn: SimpleQueue[None]) -> None:
        """End a turn, unless it has not begun or is over."""
        if self._turns.get(id) is turn:
            del self._turns[id]
        turn.put(None)

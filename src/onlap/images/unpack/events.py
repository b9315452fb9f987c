"""What threads and worker processes tell the thread that waits for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from onlap.images.unpack.jobs import Outcome

# Seconds that the waiting thread sleeps at most, so that Ctrl-C is heard (CPython runs signal handlers between two
# bytecodes of the main thread; a wait without a timeout is interrupted, but not on every platform).
PATIENCE = 1.0


class Event(NamedTuple):
    """One message.

    Attributes:
        layer: which layer, counted from the lowest.
        fetched: bytes that have come; or
        present: it is in the content store; or
        read: bytes of it that were unpacked; or
        outcome: it was unpacked; or
        failure: what went wrong.
    """

    layer: int
    fetched: int | None = None
    present: bool = False
    read: int | None = None
    outcome: Outcome | None = None
    failure: BaseException | None = None


Events = queue.SimpleQueue[Event]
Tell = Callable[[Event], None]


class Stopped(Exception):
    """The work was given up by the thread that waits for it."""


def stoppable(halt: threading.Event) -> Callable[[float], None]:
    """A rest of so many seconds that ends with :class:`Stopped` when the work is given up."""

    def pause(seconds: float) -> None:
        if halt.wait(seconds):
            raise Stopped

    return pause

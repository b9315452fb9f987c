"""From start to stop: what every server does around its calls."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from onlap.errors import shown
from onlap.serve import systemd

_log = logging.getLogger("onlap.serve")

# Seconds from one try to the next to take a connection for which no descriptor was left; there is no event for one.
PAUSE = 0.5


def until_stopped(start: Callable[[], None], socket: str) -> int:
    """Start, say so, and return the exit status when SIGTERM or SIGINT comes; in the main thread only.

    Args:
        start: makes the socket and answers in the background; what it raises goes up.
        socket: where that is, for the log.
    """
    with _signals(signal.SIGTERM, signal.SIGINT) as told:  # before anybody can see the socket
        start()
        systemd.notify("READY=1")
        _log.info("serving", extra={"fields": {"socket": shown(socket), "pid": os.getpid()}})
        os.read(told, 1)
    systemd.notify("STOPPING=1")
    _log.info("stopping")
    return 0


@contextmanager
def _signals(*numbers: int) -> Iterator[int]:
    """A descriptor from which a byte can be read for each of these signals; they stay without other effect.

    Not an Event that a handler sets: Python runs handlers in the main thread, between two of its instructions, so that
    a signal in the moment before it goes to wait does not wake it (3 of 3,000 tries hung). The byte is written by the
    C handler, in whichever thread the kernel interrupts.
    """
    told, telling = os.pipe()
    os.set_blocking(telling, False)
    signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    try:
        for number in numbers:
            signal.signal(number, lambda *_: None)
        yield told
    finally:
        signal.set_wakeup_fd(-1)
        os.close(told)
        os.close(telling)

"""From start to stop: what every server does around its calls."""

from __future__ import annotations

import logging
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

from onlap.errors import shown
from onlap.serve import sockets, systemd

_log = logging.getLogger("onlap.serve")

# Seconds from one try to the next to take a connection for which no descriptor was left; there is no event for one.
PAUSE = 0.5

# What runs when SIGTERM comes may finish: a commit, or an ApplyDiff, that waits for a slow disk is the longest. systemd
# kills after 90 s.
GRACE = 60.0


class BaseServer(ABC):
    """A server's, on one socket: a context manager that stops it.

    Args:
        socket: where it listens.
        mode: permissions of the socket.
        group: who gets the group's permissions of it.

    Attributes:
        socket: where it listens.
    """

    def __init__(self, socket: str, mode: int = 0o600, group: str | None = None) -> None:
        self.socket = socket
        self._access = (mode, group)
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more calls, finish those that run, and let go of the socket and of what else is held."""
        self._cleanup.close()

    @abstractmethod
    def start(self) -> None:
        """Listen, and answer in the background.

        Raises:
            Unavailable: somebody listens there.
            OnlapError: of another kind, when the socket cannot be made.
        """

    @contextmanager
    def _listening(self) -> Iterator[str]:
        """Gives the name at which to listen by the end of the block; from then on the socket is there."""
        sockets.claim(self.socket)
        with sockets.made(self.socket, *self._access) as new:
            yield new
        self._cleanup.callback(sockets.remove, self.socket, sockets.identity(self.socket))

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status. Only in the main thread.

        Raises:
            OnlapError: as :meth:`start`.
        """
        with _signals(signal.SIGTERM, signal.SIGINT) as signalled:  # before anybody can see the socket
            self.start()
            systemd.notify("READY=1")
            _log.info("serving", extra={"fields": {"socket": shown(self.socket), "pid": os.getpid()}})
            os.read(signalled, 1)
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
    signalled, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        for number in numbers:
            signal.signal(number, lambda *_: None)
        yield signalled
    finally:
        signal.set_wakeup_fd(-1)
        os.close(signalled)
        os.close(write_end)

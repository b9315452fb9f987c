"""The life of every server, from start to stop."""

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

# Seconds before a connection is accepted again after there was no descriptor for it; there is no event to wait for.
PAUSE = 0.5

# Seconds for calls that run when SIGTERM comes: the longest is a commit or an ApplyDiff on a slow disk. systemd kills
# after 90 s.
GRACE = 60.0


class BaseServer(ABC):
    """A server on one socket: a context manager that stops it.

    Args:
        socket: the path of the socket.
        mode: permissions of the socket.
        group: the group of the socket.

    Attributes:
        socket: the path of the socket.
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
        """Accept no more calls, finish the running ones, and release the socket and other resources."""
        self._cleanup.close()

    @abstractmethod
    def start(self) -> None:
        """Listen, and answer in the background.

        Raises:
            Unavailable: another server listens there.
            OnlapError: of another kind, if the socket cannot be created.
        """

    @contextmanager
    def _listening(self) -> Iterator[str]:
        """Yields the path at which to listen by the end of the block; the socket gets its own path then."""
        sockets.claim(self.socket)
        with sockets.made(self.socket, *self._access) as new:
            yield new
        self._cleanup.callback(sockets.remove, self.socket, sockets.identity(self.socket))

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status. Only in the main thread.

        Raises:
            OnlapError: as :meth:`start`.
        """
        with _signals(signal.SIGTERM, signal.SIGINT) as signalled:  # before the socket is visible
            self.start()
            systemd.notify("READY=1")
            _log.info("serving", extra={"fields": {"socket": shown(self.socket), "pid": os.getpid()}})
            os.read(signalled, 1)
        systemd.notify("STOPPING=1")
        _log.info("stopping")
        return 0


@contextmanager
def _signals(*numbers: int) -> Iterator[int]:
    """A descriptor from which a byte can be read for each of these signals, which have no other effect.

    Not an Event that a handler sets: Python runs handlers in the main thread, between two of its instructions, so a
    signal just before the main thread waits does not wake it (3 of 3,000 attempts hung). The C handler writes the byte,
    in whichever thread the kernel interrupts.
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

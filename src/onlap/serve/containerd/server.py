"""The life of the server: the owner's lock, the socket, readiness, and a quick end."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from onlap.errors import shown
from onlap.serve import sockets, systemd
from onlap.serve.containerd.calls import Calls, Observer
from onlap.serve.containerd.service import Service, check_root
from onlap.serve.containerd.transport import Transport
from onlap.snapshots.recorded import RecordedSnapshotter

_log = logging.getLogger("onlap.serve")

# What runs when SIGTERM comes may finish: a commit that waits for a slow disk is the longest. systemd kills after 90 s.
_GRACE = 60.0


class Server:
    """The snapshotter of one owner, on one socket; a context manager.

    Args:
        snapshotter: what to serve; closed by its owner, after the server.
        socket: where to listen.
        mode: permissions of the socket.
        group: who gets the group's permissions of it.
        observer: told of every call.

    Raises:
        FailedPrecondition: the root cannot be served, or the owner is served already.
    """

    def __init__(
        self,
        snapshotter: RecordedSnapshotter,
        socket: str,
        *,
        mode: int = 0o600,
        group: str | None = None,
        observer: Observer | None = None,
    ) -> None:
        check_root(snapshotter)
        self._socket = os.path.abspath(socket)
        self._access = (mode, group)
        self._cleanup = ExitStack()
        self._cleanup.enter_context(snapshotter.catalog.serve(snapshotter.owner))
        self._transport = Transport(Calls(Service(snapshotter), observer))
        self._cleanup.callback(self._transport.stop, _GRACE)
        for record in snapshotter.catalog.lost:
            _log.error(
                "a snapshot has lost its tree; remove it, leaf first, and pull its image again",
                extra={"fields": {"name": record.name, "owner": record.owner, "id": record.id}},
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more calls, finish those that run, and let go of the socket and the lock."""
        self._cleanup.close()

    def start(self) -> None:
        """Listen, and answer in the background.

        Raises:
            FailedPrecondition: somebody listens there.
            OnlapError: of another kind, when the socket cannot be made.
        """
        sockets.claim(self._socket)
        # The socket is made by the library: nobody else may connect in the moment before its mode is set.
        with _umask(0o177):
            self._transport.start(self._socket)
        self._cleanup.callback(self._remove_socket)
        sockets.grant(self._socket, *self._access)

    def _remove_socket(self) -> None:
        try:
            os.unlink(self._socket)
        except FileNotFoundError:
            pass  # the library removes it too

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status. Only in the main thread.

        Raises:
            OnlapError: as :meth:`start`.
        """
        with _signals(signal.SIGTERM, signal.SIGINT) as told:  # before anybody can see the socket
            self.start()
            systemd.notify("READY=1")
            _log.info("serving", extra={"fields": {"socket": shown(self._socket), "pid": os.getpid()}})
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


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)

"""The server: the owner's lock, the socket, its start and its stop."""

from __future__ import annotations

import logging
import os
import re
import sys
from functools import partial
from socket import socket as Socket

from onlap.catalog import records
from onlap.serve import sockets
from onlap.serve.containerd.calls import Calls, Observer
from onlap.serve.containerd.methods import Service
from onlap.serve.containerd.relay import Relay
from onlap.serve.containerd.service import SnapshotsService, check_root, namespace
from onlap.serve.containerd.transport import Transport
from onlap.serve.lifecycle import GRACE, BaseServer
from onlap.snapshots.recorded import RecordedSnapshotter

_log = logging.getLogger("onlap.serve")

# Seconds after which a thread has to let another one run. Python's default is 5 ms, in which a call that only reads the
# catalog could be answered ten times. With 16 clients this gives 15 % more cycles per second.
_SWITCH_INTERVAL = 0.0002


class Server(BaseServer):
    """The snapshotter of one owner, on one socket; a context manager.

    Args:
        snapshotter: what to serve; its owner closes it after the server.
        socket: where to listen; its directory is created.
        listener: an inherited socket that already listens there, to be used instead; it is left unchanged.
        mode: permissions of the socket.
        group: the group of the socket.
        observer: notified of every call.
        containerd: the path of containerd's own socket, to be its differ as well; None: only its snapshotter.

    Raises:
        FailedPrecondition: the root cannot be served, or the owner is served already.
    """

    def __init__(
        self,
        snapshotter: RecordedSnapshotter,
        socket: str,
        *,
        listener: Socket | None = None,
        mode: int = 0o600,
        group: str | None = None,
        observer: Observer | None = None,
        containerd: str | None = None,
    ) -> None:
        check_root(snapshotter)
        super().__init__(os.path.abspath(socket), mode, group)
        self._listener = listener
        self._cleanup.enter_context(snapshotter.catalog.serve(snapshotter.owner))
        services: list[Service] = [SnapshotsService(snapshotter)]
        if containerd is not None:
            from onlap.serve.containerd.diff.service import DiffService

            services.append(self._cleanup.enter_context(DiffService(containerd, partial(_namespace_of, snapshotter))))
        self._transport = Transport(Calls(services, observer))
        self._cleanup.callback(self._transport.stop, GRACE)
        for record in snapshotter.catalog.lost:
            _log.error(
                "a snapshot has lost its tree; remove it, children first, and pull its image again",
                extra={"fields": {"name": record.name, "owner": record.owner, "id": record.id}},
            )

    def start(self) -> None:
        if self._listener is not None:
            sockets.check_length(self.socket)
            # Always the same path, so that the leftover of a killed server is replaced.
            inner = f"{self.socket}.inner"
            with sockets.private():
                self._transport.start(inner)
            self._cleanup.callback(sockets.remove, inner)
            self._cleanup.callback(Relay(self._listener, inner).stop)
            return
        with self._listening() as new:
            self._transport.start(new)

    def run(self) -> int:
        sys.setswitchinterval(_SWITCH_INTERVAL)  # the whole process is the server's
        return super().run()


def _namespace_of(snapshotter: RecordedSnapshotter, directory: str) -> str:
    """containerd's namespace to which the tree in ``directory`` belongs; empty if it is none of these snapshots."""
    layout = snapshotter.catalog.layout
    match = re.fullmatch(re.escape(layout.snapshots) + r"/([0-9]{1,18})/fs", directory)
    if match is None:
        return ""
    record = snapshotter.catalog.database.read(partial(records.by_id, identifier=int(match[1])))
    return namespace(record.name) if record is not None and record.owner == snapshotter.owner else ""

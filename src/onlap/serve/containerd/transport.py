"""The gRPC server: it accepts connections, and has threads for their calls.

The HTTP/2 is libnghttp2's (:mod:`onlap.serve.containerd.connection`; docs/adr/0002-grpc-library.md has measurements).
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from queue import SimpleQueue

from onlap import errors
from onlap.serve.containerd.calls import Calls
from onlap.serve.containerd.connection import Call, Connection, Route
from onlap.serve.lifecycle import PAUSE

_log = logging.getLogger("onlap.serve")

# Calls that wait for the disk share a commit with each other, so that more threads than processors are worthwhile; with
# more than 16 they wait for the interpreter's lock rather than for the disk.
_THREADS = 16


class Transport:
    """A gRPC server on a unix socket.

    Args:
        calls: answers the requests.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._routes = {
            f"/{service.name}/{name}".encode(): Route(name, method)
            for service in calls.services
            for name, method in service.methods.items()
        }
        self._queue: SimpleQueue[Call | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._connections: set[Connection] = set()
        self._stop_read, self._stop_write = os.pipe()
        self._listener: socket.socket | None = None
        self._accepting = threading.Thread(target=self._accept, name="onlap-accept", daemon=True)

    def listen(self, path: str) -> None:
        """Listen on a new socket at ``path``, and answer.

        Raises:
            Unavailable: it cannot be listened on.
            ResourceExhausted: no thread can be started.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            listener.listen(socket.SOMAXCONN)
        except OSError as error:
            listener.close()
            raise errors.Unavailable(
                f"cannot listen on {errors.shown(path)}: {error.strerror}",
                key=path,
                hint="check that its directory exists and is yours",
            ) from error
        self.start(listener)

    def start(self, listener: socket.socket) -> None:
        """Answer on a socket that listens already; it is closed in the end, for this process.

        Raises:
            ResourceExhausted: no thread can be started.
        """
        # While one server replaces another, both may accept on it.
        listener.setblocking(False)
        self._listener = listener
        threads = [threading.Thread(target=self._work, name="onlap-call", daemon=True) for _ in range(_THREADS)]
        try:
            for thread in (*threads, self._accepting):
                thread.start()
        except RuntimeError as error:
            raise errors.ResourceExhausted(
                f"cannot serve: {error}", hint="raise the limit on threads (ulimit -u, TasksMax)"
            ) from error

    def stop(self, grace: float) -> None:
        """Accept no new calls, give the running ones ``grace`` seconds to finish, and return.

        New clients of an inherited socket wait for the next server.
        """
        os.close(self._stop_write)
        if self._accepting.ident is not None:
            self._accepting.join()
        os.close(self._stop_read)
        if self._listener is not None:
            self._listener.close()
        deadline = time.monotonic() + grace
        for connection in self._now():
            connection.finish()
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, deadline - time.monotonic())
        for connection in self._now():
            connection.abort()
        for _ in range(_THREADS):
            self._queue.put(None)

    def _now(self) -> list[Connection]:
        with self._changed:
            return list(self._connections)

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            ready, _, _ = select.select([self._listener.fileno(), self._stop_read], [], [])
            if self._stop_read in ready:
                return
            try:
                client, _ = self._listener.accept()
                self._begin(client)
            except (BlockingIOError, ConnectionError):
                continue  # the client is gone again, or another server was faster
            except (OSError, RuntimeError) as error:
                # No descriptor or no thread is left: clients wait until another has disconnected.
                _log.warning("cannot accept a connection", extra={"fields": {"error": error}})
                select.select([self._stop_read], [], [], PAUSE)

    def _begin(self, client: socket.socket) -> None:
        """Have a connection served; raises OSError, and RuntimeError if no thread can be started."""
        connection = Connection(client, self._routes, self._calls, self._queue.put)
        thread = threading.Thread(target=self._serve, args=(connection,), name="onlap-connection", daemon=True)
        with self._changed:
            self._connections.add(connection)
        try:
            thread.start()
        except RuntimeError:
            self._forget(connection)
            client.close()
            raise

    def _serve(self, connection: Connection) -> None:
        try:
            connection.serve()
        finally:
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call.connection.answer(call)
            except Exception as error:  # noqa: BLE001 - a thread that ends answers nobody
                _log.error("a call was not answered", exc_info=error)
                call.connection.abort()

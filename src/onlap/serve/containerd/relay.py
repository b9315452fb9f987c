"""Relays the connections of an inherited socket, which outlives the server, to gRPC's own socket.

grpcio creates its listening sockets itself and cannot use an inherited one (grpc/grpc#19133: only if its C core is
built with libsystemd, as in no wheel). So connections on an inherited socket are accepted here, and their bytes copied,
in both directions, to gRPC's own socket, which only its owner can reach. Without an inherited one, clients connect to
gRPC's socket directly (docs/adr/0011-sockets.md).
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from contextlib import ExitStack

from onlap.serve.lifecycle import PAUSE

_log = logging.getLogger("onlap.serve")

# Bytes. containerd has one connection, with messages of a few hundred bytes; a list has some ten thousand.
_CHUNK = 64 * 1024


class Relay:
    """Accepts connections in the background.

    Args:
        listener: the inherited socket; closed in the end, which does not affect other processes that have it.
        inner: the path of gRPC's socket.
    """

    def __init__(self, listener: socket.socket, inner: str) -> None:
        self._listener = listener
        # While one server replaces another, both may accept on it.
        self._listener.setblocking(False)
        self._inner = inner
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._accept, name="onlap-accept", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Accept no more: new clients wait for the next server. Existing connections stay."""
        os.close(self._stop_write)
        self._thread.join()
        os.close(self._stop_read)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            ready, _, _ = select.select([self._listener.fileno(), self._stop_read], [], [])
            if self._stop_read in ready:
                return
            try:
                self._accept_one()
            except (BlockingIOError, ConnectionError):
                continue  # the client is gone again, or another server was faster
            except (OSError, RuntimeError) as error:
                # No descriptor or no thread is left: clients wait until another has disconnected.
                _log.warning("cannot accept a connection", extra={"fields": {"error": error}})
                select.select([self._stop_read], [], [], PAUSE)

    def _accept_one(self) -> None:
        """Accept one connection; raises OSError, and RuntimeError if no thread can be started."""
        with ExitStack() as on_error:
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            on_error.callback(_end, server)
            client, _ = self._listener.accept()
            on_error.callback(_end, client)
            client.setblocking(True)
            server.connect(self._inner)
            there = threading.Thread(target=_copy, args=(client, server), name="onlap-relay", daemon=True)
            back = threading.Thread(target=_back, args=(server, client, there), name="onlap-relay", daemon=True)
            there.start()
            back.start()
            on_error.pop_all()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(_CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # One side is gone, and nothing from the other can be delivered.
        _shut(source)
        _shut(target)


def _back(server: socket.socket, client: socket.socket, there: threading.Thread) -> None:
    _copy(server, client)
    there.join()
    server.close()
    client.close()


def _end(connection: socket.socket) -> None:
    _shut(connection)  # a thread may be waiting to receive from it
    connection.close()


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is not connected, or no longer

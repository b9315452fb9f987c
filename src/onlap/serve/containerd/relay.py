"""From a socket that outlives the server to the one that gRPC made.

grpcio makes its listening sockets itself and takes none over (grpc/grpc#19133: only where the C core was built with
libsystemd, as no wheel is). So the connections of a socket that was handed over are accepted here, and their bytes
passed on, both ways, to gRPC's own socket, which only its owner can reach. Where nothing was handed over, clients talk
to gRPC's socket itself (docs/adr/0011-sockets.md).
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

# containerd has one connection, whose messages are some hundred bytes; a list has some ten thousand.
_CHUNK = 64 * 1024


class Relay:
    """Accepts in the background.

    Args:
        listener: the socket that was handed over; closed in the end, which those who also have it do not notice.
        inner: the path of the socket that answers.
    """

    def __init__(self, listener: socket.socket, inner: str) -> None:
        self._listener = listener
        # Another server may accept on it, too, in the moment when one follows the other.
        self._listener.setblocking(False)
        self._inner = inner
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._accept, name="onlap-accept", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Accept no more: who connects from now on waits for the next server. What is connected stays so."""
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
                self._take()
            except (BlockingIOError, ConnectionError):
                continue  # it has gone again, or another server was faster
            except (OSError, RuntimeError) as error:
                # No descriptor or no thread is left: who connects waits, until somebody else has gone.
                _log.warning("cannot take a connection", extra={"fields": {"error": error}})
                select.select([self._stop_read], [], [], PAUSE)

    def _take(self) -> None:
        """Take one connection; raises OSError, and RuntimeError where no thread can be had."""
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
        # One side is gone; nothing that the other one sends can arrive.
        _shut(source)
        _shut(target)


def _back(server: socket.socket, client: socket.socket, there: threading.Thread) -> None:
    _copy(server, client)
    there.join()
    server.close()
    client.close()


def _end(connection: socket.socket) -> None:
    _shut(connection)  # a thread may wait for what comes from it
    connection.close()


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is not connected, or not any more

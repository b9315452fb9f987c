"""The plugin protocol over HTTP/1.1: a thread per keep-alive connection, which reads, calls and answers.

Source: moby v26.1.5, pkg/plugins/client.go and docs/extend/plugin_api.md.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs

from onlap import errors
from onlap.errors import shown
from onlap.serve.docker.bodies import ChunkWriter, drain, request_body
from onlap.serve.docker.requests import Head, RequestError, read_head
from onlap.serve.docker.service import Service
from onlap.serve.lifecycle import PAUSE

_log = logging.getLogger("onlap.serve")

_ANSWER = b"HTTP/1.1 %d %s\r\nContent-Type: application/vnd.docker.plugins.v1.2+json\r\nContent-Length: %d\r\n\r\n"
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-tar\r\nTransfer-Encoding: chunked\r\n\r\n"
# Bytes; an ordinary request has a few hundred.
_MAX_REQUEST = 1 << 20
_BUFFER = 256 * 1024
# Calls that may have an empty body.
_WITHOUT_BODY = ("Plugin.Activate", "GraphDriver.Capabilities", "GraphDriver.Status", "GraphDriver.Cleanup")


class Handler(socketserver.BaseRequestHandler):
    """One connection."""

    request: socket.socket
    server: HttpServer

    def handle(self) -> None:
        """Answer one request after the other."""
        with cast(BinaryIO, self.request.makefile("rb", _BUFFER)) as source:
            self._keep = True
            while self._keep:
                try:
                    head = read_head(source)
                except RequestError as error:
                    _log.warning("bad request", extra={"fields": {"message": str(error)}})
                    self._refuse(400, str(error))
                    return
                if head is None:
                    return
                self._keep = head.keep
                if head.method != "POST":
                    self._refuse(501, f"there is no method {shown(head.method)}")
                    return
                if head.waits:
                    self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._call(head, request_body(source, head.length))

    def _call(self, head: Head, body: io.BufferedReader) -> None:
        path, _, query = head.target.partition("?")
        name = path.strip("/")
        started = time.perf_counter()
        with self.server.call():
            try:
                failure = self._answer(name, query, body, _MAX_REQUEST if head.length is None else head.length)
            except ConnectionError as error:
                # The client is gone.
                self._keep = False
                failure = str(error)
        self._log_call(name, started, failure)

    def _answer(self, name: str, query: str, body: io.BufferedReader, length: int) -> str:
        service = self.server.service
        try:
            if name == "GraphDriver.ApplyDiff":
                asked = parse_qs(query, keep_blank_values=True)
                id, parent = (asked.get(key, [""])[0] for key in ("id", "parent"))
                response = service.apply_diff(id, parent, body)
            elif name == "GraphDriver.Diff":
                return self._diff(_request(name, body, length))
            elif name in service.calls:
                response = service.calls[name](_request(name, body, length))
            else:
                drain(body)
                self._reply(404, {"Err": f"no such call: {shown(name)}"})
                return "404"
        except Exception as error:  # noqa: BLE001 - every error becomes an answer
            failure = _message(name, error)
            drain(body)
            self._reply(200, {"Err": failure})
            return failure
        drain(body)
        self._reply(200, response)
        return ""

    def _diff(self, request: dict[str, Any]) -> str:
        with cast(BinaryIO, self.request.makefile("wb", _BUFFER)) as connection:
            out = ChunkWriter(connection, lambda: connection.write(_STREAM))
            try:
                self.server.service.diff(request, cast(BinaryIO, out))
            except Exception as error:  # noqa: BLE001 - every error becomes an answer
                failure = _message("GraphDriver.Diff", error)
                if out.started:
                    # The client must not take what it has for a complete archive: the body ends without its last chunk.
                    self._keep = False
                else:
                    # The status distinguishes an error from an archive.
                    self._reply(500, {"Err": failure})
                return failure
            out.finish()
        return ""

    def _refuse(self, status: int, failure: str) -> None:
        self._keep = False
        self._reply(status, {"Err": failure})

    def _reply(self, status: int, value: dict[str, object]) -> None:
        # ASCII only: a byte that is not UTF-8 becomes a lone surrogate, which Go reads as U+FFFD.
        data = json.dumps(value).encode()
        # In one piece: the client wakes up once.
        self.request.sendall(_ANSWER % (status, HTTPStatus(status).phrase.encode(), len(data)) + data)

    def _log_call(self, name: str, started: float, failure: str) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            milliseconds = f"{(time.perf_counter() - started) * 1000:.1f}"
            fields = {"call": name, "ms": milliseconds, **({"error": failure} if failure else {})}
            _log.debug("call", extra={"fields": fields})


def _request(name: str, body: BinaryIO, length: int) -> dict[str, Any]:
    data = body.read(min(length, _MAX_REQUEST))
    if not data.strip():
        if name in _WITHOUT_BODY:
            return {}
        # It repeats a call whose connection broke with the same reader, which is at its end by then
        # (pkg/plugins/client.go, callWithRetry).
        raise errors.InvalidArgument(
            f"{name}: empty request: when the plugin is killed during a call, dockerd repeats it without a body",
            hint="repeat the docker command",
        )
    try:
        value = json.loads(data)
    except ValueError as error:
        raise errors.InvalidArgument("the request is not valid JSON") from error
    if not isinstance(value, dict):
        raise errors.InvalidArgument("the request is not a JSON object")
    return value


def _message(name: str, error: Exception) -> str:
    if isinstance(error, errors.OnlapError) and error.kind != "Internal":
        return str(error)
    if not isinstance(error, ConnectionError):
        _log.error("call failed", exc_info=error, extra={"fields": {"call": name}})
    return f"{type(error).__name__}: {error}"


class HttpServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Listens on a unix socket.

    Args:
        path: where; it must not exist.
        service: answers the calls.
        listener: a listening socket to use instead.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, path: str, service: Service, listener: socket.socket | None = None) -> None:
        self.service = service
        self._changed = threading.Condition()
        self._calls = 0
        self._connections: set[socket.socket] = set()
        super().__init__(path, Handler, bind_and_activate=listener is None)
        if listener is not None:
            self.socket.close()
            self.socket = listener
            # While one server replaces another, both may accept on it.
            self.socket.setblocking(False)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept one connection."""
        try:
            return super().get_request()
        except (BlockingIOError, ConnectionError):
            raise  # the client is gone again, or another server was faster
        except OSError as error:
            # No descriptor is left: clients wait until another has disconnected.
            _log.warning("cannot accept a connection", extra={"fields": {"error": error}})
            time.sleep(PAUSE)
            raise

    @contextmanager
    def call(self) -> Iterator[None]:
        """Surrounds each call, so that :meth:`stop` can wait for the running ones."""
        with self._changed:
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one connection, from its first request to its end."""
        with self._changed:
            self._connections.add(request)
        try:
            super().finish_request(request, client_address)
        except ConnectionError:
            return  # dockerd disconnected
        finally:
            with self._changed:
                self._connections.discard(request)

    def stop(self, grace: float) -> None:
        """Accept no more connections, let running calls end, and close idle connections."""
        self.shutdown()
        self.server_close()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._calls, grace):
                _log.warning("calls are still running", extra={"fields": {"calls": self._calls}})
            for connection in self._connections:
                # This wakes a thread that waits for the next request, and does not truncate an answer being sent.
                try:
                    connection.shutdown(socket.SHUT_RD)
                except OSError as error:
                    _log.debug("a connection was closed", extra={"fields": {"error": os.strerror(error.errno or 0)}})

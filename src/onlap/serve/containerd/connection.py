"""One client's connection: gRPC's calls, over HTTP/2 as libnghttp2 speaks it.

ngh2 turns bytes into events and back, without threads or sockets of its own; frames, header compression, flow control
and limits against floods are libnghttp2's. What gRPC adds to HTTP/2 is here: a path names the method, five bytes
precede a message, trailers carry the status.

Source: gRPC's doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable, Mapping
from socket import SHUT_RDWR, SO_SNDTIMEO, SOL_SOCKET
from socket import socket as Socket
from typing import NamedTuple
from urllib.parse import quote

import ngh2

from onlap.serve.containerd.calls import Calls, Failure
from onlap.serve.containerd.methods import Method
from onlap.serve.containerd.status import CODES

_log = logging.getLogger("onlap.serve")

Headers = tuple[tuple[bytes, bytes], ...]

# containerd's defaults.DefaultMaxRecvMsgSize and DefaultMaxSendMsgSize: 16 MiB both ways.
_MESSAGE_SIZE = 16 << 20
# Calls of one connection at the same time; a client keeps others back. grpc-go's servers have no limit.
_STREAMS = 1024
# Bytes that are received at once.
_CHUNK = 64 * 1024
# Bytes of a stream that wait for the client to take them, before the next message is asked for.
_AHEAD = 256 * 1024
# Seconds after which a client that takes nothing off its socket is given up.
_PATIENCE = 60
# Characters of an error's text: clients refuse headers that are too long (grpcio above 8 KiB).
_TEXT = 2_000

_ANSWER: Headers = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_DONE: Headers = ((b"grpc-status", b"0"),)
# What needs no percent-encoding in the text of a status.
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class Route(NamedTuple):
    """What answers the calls of one path."""

    name: str
    method: Method


class Call:
    """A call that is being received or answered; a :class:`~onlap.serve.containerd.methods.Caller`.

    Attributes:
        connection: where its answer goes.
        stream: its number there.
        route: what answers it; None once it was refused.
        body: what has been received of the request.
        answered: whether its answer has begun.
        gone: whether nobody waits for the answer any more.
    """

    __slots__ = ("_actions", "_headers", "answered", "body", "connection", "gone", "route", "stream")

    def __init__(self, connection: Connection, stream: int, headers: dict[bytes, bytes], route: Route) -> None:
        self.connection = connection
        self.stream = stream
        self.route: Route | None = route
        self.body = bytearray()
        self.answered = False
        self.gone = False
        self._headers = headers
        self._actions: list[Callable[[], None]] = []

    def header(self, name: str) -> str:
        return self._headers.get(name.encode(), b"").decode("utf-8", "replace")

    def when_gone(self, action: Callable[[], None]) -> None:
        self._actions.append(action)
        if self.gone:
            self.end()

    def end(self) -> None:
        """Nobody waits any more; in any thread."""
        self.gone = True
        while self._actions:
            try:
                action = self._actions.pop()
            except IndexError:
                return  # another thread does it
            action()


class Connection:
    """A connection that was accepted; :meth:`serve` is its thread.

    Args:
        socket: the connection; closed in the end.
        routes: what answers which path.
        calls: answers the requests.
        later: has a call answered by :meth:`answer` in another thread.
    """

    def __init__(
        self, socket: Socket, routes: Mapping[bytes, Route], calls: Calls, later: Callable[[Call], None]
    ) -> None:
        self._socket = socket
        self._routes = routes
        self._answers = calls
        self._later = later
        self._engine = ngh2.Connection(ngh2.Role.SERVER)
        # Guards the engine, and keeps what it writes in order.
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)
        self._calls: dict[int, Call] = {}
        self._last = 0
        socket.setblocking(True)
        # Not settimeout(), which counts for receiving too.
        socket.setsockopt(SOL_SOCKET, SO_SNDTIMEO, struct.pack("@ll", _PATIENCE, 0))

    def serve(self) -> None:
        """Receive until the client closes the connection, or :meth:`finish` has ended it."""
        try:
            with self._lock:
                self._engine.initiate_connection({ngh2.Setting.MAX_CONCURRENT_STREAMS: _STREAMS})
            self._exchange(b"")
            while data := self._socket.recv(_CHUNK):
                for call in self._exchange(data):
                    if call.route is not None and call.route.method.quick:
                        self.answer(call)
                    else:
                        self._later(call)
        except (OSError, ngh2.NGH2Error) as error:  # the client is gone, or does not speak HTTP/2
            self._give_up(error)
        finally:
            self._close()

    def finish(self) -> None:
        """Accept no more calls, and end the connection when those that run are answered.

        The client knows then which calls were not accepted, and makes them again on another connection (GOAWAY).
        """
        with self._lock:
            try:
                self._engine.send_goaway(last_stream_id=self._last)
            except ngh2.NGH2Error:
                return  # it has ended
        try:
            self._exchange(b"")
        except (OSError, ngh2.NGH2Error) as error:
            self._give_up(error)

    def abort(self) -> None:
        """End the connection now."""
        try:
            self._socket.shutdown(SHUT_RDWR)  # its thread may be waiting to receive
        except OSError:
            pass  # it has ended

    def answer(self, call: Call) -> None:
        """Answer one call, whatever comes of it."""
        route = call.route
        if route is None or call.gone:
            return
        name, method = route
        try:
            data = _message(call.body)
            if not method.streams:
                answer = self._answers.answer(name, method, data, call)
                _check_size(answer)
                self._put(call, answer, _DONE)
                return
            for each in self._answers.stream(name, method, data):
                _check_size(each)
                if not self._put(call, each, None):
                    return
        except Failure as failure:
            self._put(call, None, _status(failure.code, failure.message))
            return
        self._put(call, None, _DONE)

    # Receiving

    def _exchange(self, data: bytes) -> list[Call]:
        """Take in what was received, write what is to be written; returns the calls that are complete.

        Raises:
            OSError: the client is gone.
            ngh2.NGH2Error: it does not speak HTTP/2.
        """
        with self._lock:
            try:
                if data:
                    self._engine.receive_data(data)
            finally:  # what is wrong is told to the client
                complete, ended = self._flush()
            self._moved.notify_all()
        for call in ended:
            call.end()
        return complete

    def _flush(self) -> tuple[list[Call], list[Call]]:
        """Under the lock: the calls that are complete, and those that have ended."""
        complete: list[Call] = []
        ended: list[Call] = []
        while True:
            events = self._engine.events()
            for event in events:
                self._handle(event, complete, ended)
            data = self._engine.data_to_send()
            if data:
                self._socket.sendall(data)
            elif not events:
                break
        if not self._engine.want_read and not self._engine.want_write:
            self.abort()  # after GOAWAY, of either side
        return complete, ended

    def _handle(self, event: ngh2.Event, complete: list[Call], ended: list[Call]) -> None:
        if isinstance(event, ngh2.RequestReceived):
            self._begin(event)
        elif isinstance(event, ngh2.DataReceived):
            call = self._calls.get(event.stream_id)
            if call is None or call.route is None:
                return
            call.body += event.data
            if len(call.body) > 5 and _length(call.body) > _MESSAGE_SIZE:
                text = f"the request has {_length(call.body)} bytes, and may have {_MESSAGE_SIZE}"
                self._refuse(call.stream, "ResourceExhausted", text)
                call.route = None
                call.body = bytearray()
            elif event.end_stream:
                complete.append(call)
        elif isinstance(event, ngh2.StreamClosed):
            call = self._calls.pop(event.stream_id, None)
            if call is not None:
                ended.append(call)
        elif isinstance(event, ngh2.ConnectionClosed):
            self.abort()

    def _begin(self, event: ngh2.RequestReceived) -> None:
        headers = {each[0]: each[1] for each in event.headers}
        path = headers.get(b":path", b"")
        route = self._routes.get(path)
        self._last = max(self._last, event.stream_id)
        if not headers.get(b"content-type", b"").startswith(b"application/grpc"):
            self._engine.send_response(event.stream_id, [(b":status", b"415")], end_stream=True)
        elif route is None:
            self._refuse(event.stream_id, "Unimplemented", f"there is no method {path.decode('utf-8', 'replace')}")
        elif headers.get(b"grpc-encoding", b"identity") != b"identity":
            self._refuse(event.stream_id, "Unimplemented", "messages must not be compressed")
        elif event.end_stream:
            self._refuse(event.stream_id, "InvalidArgument", "the request has no message")
        else:
            self._calls[event.stream_id] = Call(self, event.stream_id, headers, route)

    # Sending

    def _put(self, call: Call, message: bytes | None, status: Headers | None) -> bool:
        """Send a message, the status that ends the call, or both; False if nobody waits any more."""
        with self._lock:
            while call.stream in self._calls and self._engine.queued_body_size(call.stream) > _AHEAD:
                self._moved.wait()
            if call.stream not in self._calls:
                return False
            try:
                if message is None and status is not None and not call.answered:
                    self._engine.send_response(call.stream, [*_ANSWER, *status], end_stream=True)
                else:
                    if not call.answered:
                        self._engine.send_response(call.stream, _ANSWER)
                    if message is not None:
                        self._engine.send_data(call.stream, b"\0" + len(message).to_bytes(4, "big") + message)
                    if status is not None:
                        self._engine.send_trailers(call.stream, status)
                call.answered = True
                _, ended = self._flush()
            except (OSError, ngh2.NGH2Error) as error:
                self._give_up(error)
                return False
        for each in ended:
            each.end()
        return True

    def _refuse(self, stream: int, kind: str, text: str) -> None:
        """Under the lock: answer a call that nothing was done for."""
        self._engine.send_response(stream, [*_ANSWER, *_status(CODES[kind], text)], end_stream=True)

    def _give_up(self, error: Exception) -> None:
        _log.debug("a connection has ended", extra={"fields": {"error": error}})
        self.abort()

    def _close(self) -> None:
        with self._lock:
            left = list(self._calls.values())
            self._calls.clear()
            self._moved.notify_all()
            self._socket.close()
        for call in left:
            call.end()


def _status(code: int, text: str) -> Headers:
    quoted = quote(text[:_TEXT], safe=_PLAIN, errors="replace")
    return ((b"grpc-status", b"%d" % code), (b"grpc-message", quoted.encode()))


def _check_size(message: bytes) -> None:
    if len(message) > _MESSAGE_SIZE:
        text = f"the answer has {len(message)} bytes, and may have {_MESSAGE_SIZE}"
        raise Failure(CODES["ResourceExhausted"], text)


def _length(body: bytearray) -> int:
    return int.from_bytes(body[1:5], "big")


def _message(body: bytearray) -> bytes:
    """The one message of a request; raises Failure."""
    if len(body) < 5 or len(body) != 5 + _length(body) or body[0] > 1:
        raise Failure(CODES["Internal"], "the request is not one message")
    if body[0]:
        raise Failure(CODES["Unimplemented"], "messages must not be compressed")
    return bytes(body[5:])

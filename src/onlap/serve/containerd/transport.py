"""The server's only user of the gRPC library: all other code of it handles bytes.

The library is grpcio, the reference implementation (docs/adr/0002-grpc-library.md has measurements). Its codecs are
identity functions, so that messages are encoded and decoded together with the call, and errors there become statuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from onlap import errors
from onlap.serve.containerd.calls import Calls, Failure
from onlap.serve.containerd.methods import Method

# containerd's defaults.DefaultMaxRecvMsgSize and DefaultMaxSendMsgSize: 16 MiB both ways.
_MESSAGE_SIZE = 16 << 20

# Calls that wait for the disk share a commit with each other, so that more threads than processors are worthwhile; with
# more than 16 they wait for the interpreter's lock rather than for the disk.
_THREADS = 16

# A slow call's thread only waits for a worker process. The 65th call that comes at the same time waits for a thread.
_SLOW_THREADS = 64

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Transport:
    """A gRPC server on a unix socket.

    Args:
        calls: answers the requests.
    """

    def __init__(self, calls: Calls) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="onlap-call")
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, thread_name_prefix="onlap-slow-call")
        self._server = grpc.server(
            self._pool,
            options=[
                ("grpc.max_receive_message_length", _MESSAGE_SIZE),
                ("grpc.max_send_message_length", _MESSAGE_SIZE),
                # With it, two servers on one socket would answer in turn; the second is refused before this point.
                ("grpc.so_reuseport", 0),
            ],
        )
        for service in calls.services:
            handlers = {name: self._handler(calls, name, method) for name, method in service.methods.items()}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.name, handlers),))

    def start(self, socket: str) -> None:
        """Listen, and answer in the background.

        Args:
            socket: the path; a socket that a killed server left there is replaced.

        Raises:
            Unavailable: it cannot be listened on.
        """
        try:
            self._server.add_insecure_port(f"unix:{socket}")
        except RuntimeError as error:
            raise errors.Unavailable(
                f"cannot listen on {errors.shown(socket)}",
                key=socket,
                hint="check that its directory exists and is yours",
            ) from error
        self._server.start()

    def stop(self, grace: float) -> None:
        """Accept no new calls, give the running ones ``grace`` seconds to finish, and return."""
        self._server.stop(grace).wait()
        for pool in (self._pool, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)

    def _handler(self, calls: Calls, name: str, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
        if method.streams:

            def stream(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
                try:
                    yield from calls.stream(name, method, data)
                except Failure as failure:
                    context.abort(_CODES[failure.code], failure.message)

            return grpc.unary_stream_rpc_method_handler(stream, None, None)

        def unary(data: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                return calls.answer(name, method, data, _Caller(context))
            except Failure as failure:
                context.abort(_CODES[failure.code], failure.message)
                raise

        if method.slow:
            # grpc/_server.py, _select_thread_pool_for_behavior; it is the only way to give a method threads of its own.
            unary.experimental_thread_pool = self._slow  # type: ignore[attr-defined]
        return grpc.unary_unary_rpc_method_handler(unary, None, None)


class _Caller:
    """See :class:`onlap.serve.containerd.methods.Caller`."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context

    def header(self, name: str) -> str:
        for key, value in self._context.invocation_metadata():
            if key == name:
                return value if isinstance(value, str) else ""
        return ""

    def when_gone(self, action: Callable[[], None]) -> None:
        if not self._context.add_callback(action):
            action()

"""gRPC over our own connections, with grpcio as the client: what is at its edges."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

from onlap import errors
from onlap.serve.containerd.calls import Calls
from onlap.serve.containerd.methods import Caller, Method
from onlap.serve.containerd.transport import Transport

MAX = 16 << 20
# Tag and length before the bytes of a BytesValue that is nearly that large.
FRAME = 5


class Echo:
    """Answers with what it gets."""

    name = "test.Echo"

    def __init__(self) -> None:
        self.methods = {
            "Same": Method(BytesValue, lambda request: request, str),
            "Quick": Method(BytesValue, lambda request: request, str, quick=True),
            "Twice": Method(BytesValue, lambda request: BytesValue(value=request.value * 2), str),
            "Fails": Method(BytesValue, self.fails, str),
            "Waits": Method(BytesValue, self.waits, str, asks=True),
            "Many": Method(Int64Value, self.many, str, streams=True),
        }
        self.begun = threading.Event()
        self.gone = threading.Event()
        self.go_on = threading.Event()
        self.made = 0

    def fails(self, request: BytesValue) -> BytesValue:
        raise errors.NotFound(request.value.decode())

    def waits(self, request: BytesValue, caller: Caller) -> BytesValue:
        caller.when_gone(self.gone.set)
        self.begun.set()
        assert self.go_on.wait(20)
        return BytesValue(value=caller.header("who").encode())

    def many(self, request: Int64Value) -> Iterator[BytesValue]:
        for self.made in range(request.value):
            yield BytesValue(value=bytes(100_000))
        raise errors.DataLoss("the last one")


@contextmanager
def serving(path: Path, echo: Echo) -> Iterator[Transport]:
    transport = Transport(Calls([echo]))
    transport.listen(str(path))
    try:
        yield transport
    finally:
        echo.go_on.set()
        transport.stop(20)


@contextmanager
def connected(path: Path) -> Iterator[grpc.Channel]:
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"unix:{path}", options=limits) as channel:
        yield channel


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def channel(tmp_path: Path, echo: Echo) -> Iterator[grpc.Channel]:
    with serving(tmp_path / "s", echo), connected(tmp_path / "s") as channel:
        yield channel


def call(channel: grpc.Channel, method: str, value: bytes, **options: object) -> bytes:
    function = channel.unary_unary(f"/test.Echo/{method}", BytesValue.SerializeToString, BytesValue.FromString)
    answer: BytesValue = function(BytesValue(value=value), **options)  # type: ignore[arg-type]
    return answer.value


def refused(channel: grpc.Channel, method: str, value: bytes = b"", **options: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, value, **options)
    return caught.value.code(), caught.value.details() or ""


@pytest.mark.parametrize("method", ["Same", "Quick"])
def test_messages_of_all_sizes(channel: grpc.Channel, method: str) -> None:
    """More than the windows that HTTP/2 begins with, and as much as containerd sends at most."""
    for size in (0, 1, 65_536, 1_000_000, MAX - FRAME):
        assert len(call(channel, method, bytes(size))) == size
    code, text = refused(channel, method, bytes(MAX))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX) in text
    assert call(channel, method, b"next") == b"next"


def test_an_answer_that_is_too_large(channel: grpc.Channel) -> None:
    code, text = refused(channel, "Twice", bytes(9 << 20))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "answer" in text


def test_what_is_not_there(channel: grpc.Channel) -> None:
    assert refused(channel, "Other")[0] == grpc.StatusCode.UNIMPLEMENTED
    assert refused(channel, "Same", b"x" * 100, compression=grpc.Compression.Gzip)[0] == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("text", ["50 % of é\n", "x" * 100_000])
def test_the_text_of_an_error(channel: grpc.Channel, text: str) -> None:
    code, found = refused(channel, "Fails", text.encode())
    assert code == grpc.StatusCode.NOT_FOUND
    assert text.startswith(found)
    assert len(found) >= min(len(text), 2_000)


def test_a_header_arrives(channel: grpc.Channel, echo: Echo) -> None:
    echo.go_on.set()
    assert call(channel, "Waits", b"", metadata=[("who", "me")]) == b"me"
    assert echo.gone.wait(20)


def test_a_canceled_call_is_told(channel: grpc.Channel, echo: Echo) -> None:
    function = channel.unary_unary("/test.Echo/Waits", BytesValue.SerializeToString, BytesValue.FromString)
    future = function.future(BytesValue())
    assert echo.begun.wait(20)
    future.cancel()
    assert echo.gone.wait(20)
    assert call(channel, "Same", b"next") == b"next"


def test_a_lost_connection_is_told(tmp_path: Path, echo: Echo) -> None:
    with serving(tmp_path / "s", echo):
        with connected(tmp_path / "s") as channel:
            function = channel.unary_unary("/test.Echo/Waits", BytesValue.SerializeToString, BytesValue.FromString)
            future = function.future(BytesValue())
            assert echo.begun.wait(20)
        assert future.code() == grpc.StatusCode.CANCELLED
        assert echo.gone.wait(20)


def test_a_stream_goes_no_faster_than_its_client(channel: grpc.Channel, echo: Echo) -> None:
    """A hundred megabytes are not all made at once; all arrive, and then the error."""
    stream = channel.unary_stream("/test.Echo/Many", Int64Value.SerializeToString, BytesValue.FromString)
    answers = stream(Int64Value(value=1_000))
    next(answers)
    assert call(channel, "Quick", b"beside it") == b"beside it"
    assert echo.made < 900
    assert len(list(itertools.islice(answers, 999))) == 999
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    answers = stream(Int64Value(value=1_000))
    next(answers)
    answers.cancel()
    assert call(channel, "Same", b"next") == b"next"


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1_000])
def test_what_is_not_http_2_ends_its_connection_only(channel: grpc.Channel, tmp_path: Path, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(tmp_path / "s"))
        other.sendall(sent)
        try:
            while other.recv(1_000):
                pass
        except ConnectionResetError:
            pass  # with bytes of ours unread
    assert call(channel, "Same", b"next") == b"next"


def test_a_stop_finishes_what_runs_and_the_next_server_gets_the_rest(tmp_path: Path) -> None:
    """The client learns at once that the old server accepts no more calls, not when it has ended."""
    path, old, new = tmp_path / "s", Echo(), Echo()
    first = Transport(Calls([old]))
    first.listen(str(path))
    with ThreadPoolExecutor(2) as pool, connected(path) as channel, ExitStack() as stack:
        stack.callback(old.go_on.set)
        running = pool.submit(call, channel, "Waits", b"", metadata=[("who", "old")])
        assert old.begun.wait(20)
        path.unlink()
        new.go_on.set()
        stack.enter_context(serving(path, new))
        told = threading.Event()
        channel.subscribe(lambda state: told.set() if state == grpc.ChannelConnectivity.IDLE else None)
        stopped = pool.submit(first.stop, 20)
        assert told.wait(20)
        assert call(channel, "Waits", b"", metadata=[("who", "new")], wait_for_ready=True) == b"new"
        assert new.begun.is_set()
        assert not running.done()
        old.go_on.set()
        assert running.result(20) == b"old"
        stopped.result(20)

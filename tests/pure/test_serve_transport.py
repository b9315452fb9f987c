"""The gRPC server, with a service of the test's own."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from onlap.serve.containerd.calls import Calls
from onlap.serve.containerd.methods import Method
from onlap.serve.containerd.transport import Transport

# More than the server has threads for all other calls.
MANY = 20


class Service:
    """One call that waits, and one that does not."""

    name = "test.Service"

    def __init__(self) -> None:
        self.released = threading.Event()
        self.began = threading.Semaphore(0)
        self.methods = {
            "Wait": Method(Empty, self.wait, lambda _: "", slow=True),
            "Answer": Method(Empty, lambda _: Empty(), lambda _: ""),
        }

    def wait(self, _: Message) -> Message:
        self.began.release()
        assert self.released.wait(60)
        return Empty()


def method(channel: grpc.Channel, name: str) -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
    return channel.unary_unary(f"/{Service.name}/{name}", None, None)


def test_no_call_waits_for_slow_ones(tmp_path: Path) -> None:
    service = Service()
    transport = Transport(Calls([service]))
    transport.start(str(tmp_path / "s"))
    try:
        with grpc.insecure_channel(f"unix:{tmp_path}/s") as channel:
            wait, answer = (method(channel, name) for name in ("Wait", "Answer"))
            waiting = [wait.future(b"") for _ in range(MANY)]
            for _ in waiting:
                assert service.began.acquire(timeout=60)
            assert answer(b"", timeout=60) == b""
            service.released.set()
            assert [each.result(60) for each in waiting] == [b""] * MANY
    finally:
        service.released.set()
        transport.stop(1)


@pytest.mark.parametrize("name", ["Wait", "Answer"])
def test_an_unreadable_request_is_an_error(tmp_path: Path, name: str) -> None:
    transport = Transport(Calls([Service()]))
    transport.start(str(tmp_path / "s"))
    try:
        with grpc.insecure_channel(f"unix:{tmp_path}/s") as channel, pytest.raises(grpc.RpcError) as failure:
            method(channel, name)(b"\xff", timeout=60)
        assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    finally:
        transport.stop(1)

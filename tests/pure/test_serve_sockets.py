"""Servers for which no descriptor or thread is left go on when there is one again."""

from __future__ import annotations

import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onlap.serve.containerd import relay
from onlap.serve.docker import http
from onlap.serve.docker.service import Service
from onlap.serve.docker.state import StateFile


class Refused(logging.Handler):
    """Notices that a connection could not be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "cannot take" in record.getMessage():
            self.seen.set()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Refused]:
    for module in (relay, http):
        monkeypatch.setattr(module, "PAUSE", 0.01)
    handler, log = Refused(), logging.getLogger("onlap.serve")
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


@contextmanager
def no_descriptor() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def no_thread() -> Iterator[None]:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_the_relay_waits_for_a_descriptor(tmp_path: Path, refused: Refused) -> None:
    with (
        listening(tmp_path / "outer") as outer,
        listening(tmp_path / "inner") as inner,
        socket.socket(socket.AF_UNIX) as client,
    ):
        passing = relay.Relay(outer.dup(), str(tmp_path / "inner"))
        with no_descriptor():
            client.connect(str(tmp_path / "outer"))
            assert refused.seen.wait(20)
        with inner.accept()[0] as answering:
            client.sendall(b"hello")
            assert answering.recv(10) == b"hello"
        assert client.recv(10) == b""
        passing.stop()


def test_the_relay_waits_for_a_thread(tmp_path: Path, refused: Refused) -> None:
    with listening(tmp_path / "outer") as outer, listening(tmp_path / "inner") as inner:
        passing = relay.Relay(outer.dup(), str(tmp_path / "inner"))
        with no_thread(), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "outer"))
            assert client.recv(10) == b""
            assert refused.seen.wait(20)
            inner.accept()[0].close()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "outer"))
            client.sendall(b"hello")
            with inner.accept()[0] as answering:
                assert answering.recv(10) == b"hello"
        passing.stop()


def test_the_plugin_waits_for_a_descriptor(tmp_path: Path, refused: Refused) -> None:
    service = Service("overlay2", "none", StateFile(str(tmp_path), "p"))
    server = http.HttpServer(str(tmp_path / "p.sock"), service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.socket(socket.AF_UNIX) as client:
        with no_descriptor():
            client.connect(str(tmp_path / "p.sock"))
            assert refused.seen.wait(20)
        client.sendall(b"POST /Plugin.Activate HTTP/1.1\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    server.stop(10)
    thread.join()

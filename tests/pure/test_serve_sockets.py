"""The sockets of servers: what is left there, what is handed over; and what happens when descriptors run out."""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from onlap import errors
from onlap.serve import sockets, systemd
from onlap.serve.containerd import relay
from onlap.serve.docker import http
from onlap.serve.docker.service import Service
from onlap.serve.docker.state import StateFile
from onlap.serve.metrics import Metrics
from onlap.snapshots.native import NativeSnapshotter


class Refused(logging.Handler):
    """Notices that a connection could not be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "cannot accept" in record.getMessage():
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


def test_what_a_killed_server_left_beside_its_socket_goes(tmp_path: Path) -> None:
    """Whoever had made it has gone; what is in use, or is not a socket, stays."""
    for name in (f"s.{os.getpid()}", "s.1234567", "s.x", "other.5"):
        listening(tmp_path / name).close()
    (tmp_path / "s.77").touch()
    with listening(tmp_path / "s.1"):
        sockets.claim(str(tmp_path / "s"))
        assert sorted(os.listdir(tmp_path)) == ["other.5", "s.1", "s.77", "s.x"]


def test_a_server_that_does_not_accept_is_one_all_the_same(tmp_path: Path) -> None:
    """It is not waited for until it does: it may have been stopped."""
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen(0)
        client.connect(str(tmp_path / "s"))
        with pytest.raises(errors.Unavailable, match="listens"):
            sockets.claim(str(tmp_path / "s"))


@pytest.mark.parametrize("group", ["²", "9" * 5000, "4294967295", "a\0b", "\udcff", "-1", ""])
def test_what_is_no_group(tmp_path: Path, group: str) -> None:
    with pytest.raises(errors.NotFound, match="no group"), sockets.made(str(tmp_path / "s"), 0o600, group) as new:
        listening(Path(new)).close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("port", ["²", "9" * 5000, "65536", "", "-1"])
def test_what_is_no_port(metrics: Metrics, port: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="HOST:PORT"):
        metrics.serve(f"127.0.0.1:{port}")


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "\udcff"])
def test_what_is_no_host(metrics: Metrics, host: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="no valid host name"):
        metrics.serve(f"{host}:0")


@pytest.fixture
def metrics(root: Path) -> Iterator[Metrics]:
    with NativeSnapshotter(root / "store", sync="none") as snapshotter, closing(Metrics(snapshotter)) as found:
        yield found


def test_the_reference_has_every_figure(metrics: Metrics) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "metrics.md").read_text()
    documented = {name.removesuffix("_total") for name in re.findall(r"`(onlap_\w+)(?:\{[^`]*)?`", page)}
    served = {family.name for family in metrics.registry.collect() if family.name.startswith("onlap_")}
    assert documented == served


def test_a_socket_without_a_path_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0onlap-test-{os.getpid()}")
        listener.listen()
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setattr(sockets, "_FIRST", os.dup(listener.fileno()))
        with pytest.raises(errors.InvalidArgument, match="not an absolute path"):
            sockets.inherited(None)


@pytest.mark.parametrize("address", ["/nonexistent", "@" + "x" * 200, "/dev/null"])
def test_systemd_that_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("READY=1")
    assert "cannot tell systemd" in caplog.text

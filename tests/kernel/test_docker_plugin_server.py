"""The graph driver plugin as a server: what it knows after a restart, what it refuses, how it ends."""

from __future__ import annotations

import errno
import http.client
import io
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from graphdriver_suite.cases import archive
from graphdriver_suite.plugin import PluginDriver, PluginError
from onlap import errors
from onlap.graphdrivers import Driver, open_driver
from onlap.serve.docker import Server
from onlap.serve.docker import service as service_module
from onlap.serve.docker.service import Service
from onlap.serve.docker.state import FILE, StateFile

pytestmark = pytest.mark.needs("overlay")


@pytest.fixture(autouse=True)
def no_mounts_left() -> Iterator[None]:
    before = Path("/proc/self/mountinfo").read_bytes()
    yield
    assert Path("/proc/self/mountinfo").read_bytes() == before


class Listening(Server):
    """A server that is started where a block begins."""

    def __enter__(self) -> Listening:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self


def serve(root: Path, driver: str = "overlay2", name: str = "p") -> Listening:
    return Listening(name, driver, socket_dir=str(root / "s"), sync="none")


class Reconnected(PluginDriver):
    """dockerd after a restart of the plugin: it goes on without Init."""

    def __init__(self, path: str) -> None:
        self._path = path


def mounted(path: str) -> bool:
    return os.path.ismount(path)


def test_names_of_dockers_own_are_refused(root: Path) -> None:
    for name in ("overlay", "overlay2", "aufs", "devicemapper", "btrfs", "zfs", "vfs", "fuse-overlayfs"):
        with pytest.raises(errors.InvalidArgument, match="built-in driver"):
            serve(root, name=name)
    for name in ("", "a/b", "..", "-x", "x y"):
        with pytest.raises(errors.InvalidArgument, match="not a valid name"):
            serve(root, name=name)
    assert not (root / "s").exists()


def test_a_restarted_plugin_knows_what_it_was_told(root: Path) -> None:
    home = str(root / "home")
    with serve(root) as server:
        driver = PluginDriver(server.socket, home, options=["overlay2.size=0"])
        driver.create("base")
        driver.create_read_write("layer", "base")
        path = driver.get("layer")
        driver.get("layer")
    assert mounted(path)
    with serve(root) as server:
        again = Reconnected(server.socket)
        assert again.exists("layer")
        again.put("layer")
        assert mounted(path), "the count of two is known after the restart"
        again.put("layer")
        assert not mounted(path)


def test_a_new_init_counts_a_mount_as_one(root: Path) -> None:
    """dockerd has restarted, and knows of no use any more."""
    home = str(root / "home")
    with serve(root) as server:
        driver = PluginDriver(server.socket, home)
        driver.create("base")
        driver.create_read_write("layer", "base")
        path = driver.get("layer")
        driver.get("layer")
        driver.get("layer")
        driver = PluginDriver(server.socket, home)
        driver.put("layer")
        assert not mounted(path)


def test_counts_of_another_boot_are_forgotten(root: Path) -> None:
    home = root / "home"
    with serve(root) as server:
        driver = PluginDriver(server.socket, str(home))
        driver.create("base")
        driver.create_read_write("layer", "base")
        path = driver.get("layer")
        driver.get("layer")
    state = json.loads((home / FILE).read_text())
    assert state["counts"] == {"layer": 2}
    (home / FILE).write_text(json.dumps({**state, "boot": "another"}))
    with serve(root) as server:
        Reconnected(server.socket).put("layer")
        assert not mounted(path)


def test_before_init_and_with_another_driver(root: Path) -> None:
    with serve(root) as server:
        with pytest.raises(PluginError, match="no home yet"):
            Reconnected(server.socket).create("x")
        PluginDriver(server.socket, str(root / "home"))
    with pytest.raises(errors.FailedPrecondition, match="written by the driver overlay2"):
        serve(root, "overlay")
    with serve(root, "overlay", "q") as server, pytest.raises(PluginError, match="written by the driver overlay2"):
        PluginDriver(server.socket, str(root / "home"))
    (root / "home" / FILE).write_text("{")
    with pytest.raises(errors.DataLoss, match="damaged"):
        StateFile(str(root / "s"), "p").load()


def test_only_one_server_a_socket(root: Path) -> None:
    with serve(root) as server:
        with pytest.raises(errors.Unavailable, match="listens"):
            serve(root)
        assert os.stat(server.socket).st_mode & 0o777 == 0o600
    assert not os.path.exists(server.socket)


def request(server: Server, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """Raw bytes of one request, and the answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.socket)
        lines = [f"POST /{path} HTTP/1.1", "Host: x", *(f"{key}: {value}" for key, value in headers.items())]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        connection.shutdown(socket.SHUT_WR)
        with closing(http.client.HTTPResponse(connection)) as response:
            response.begin()
            return response.status, response.read()


def test_what_is_no_call_of_the_protocol(root: Path) -> None:
    with serve(root) as server:
        PluginDriver(server.socket, str(root / "home"))
        status, answer = request(server, "GraphDriver.Unknown", b"", {})
        assert (status, "no such call" in answer.decode()) == (404, True)
        status, answer = request(server, "GraphDriver.Get", b"{", {"Content-Length": "1"})
        assert (status, "not valid JSON" in answer.decode()) == (200, True)
        status, answer = request(server, "GraphDriver.Get", b'{"ID": 5}', {"Content-Length": "9"})
        assert (status, "is a string" in answer.decode()) == (200, True)
        status, answer = request(server, "GraphDriver.Get", b"", {"Content-Length": "x"})
        assert (status, json.loads(answer)["Err"]) == (400, "it has no usable length")
        status, answer = request(server, "GraphDriver.Diff", b'{"ID": "nobody"}', {"Content-Length": "16"})
        assert (status, "nobody" in json.loads(answer)["Err"]) == (500, True)


def test_what_other_clients_send(root: Path) -> None:
    """A GET; a client that asks whether it may send its body, as curl does; HTTP/1.0, and one that closes."""
    with serve(root) as server:
        PluginDriver(server.socket, str(root / "home"))
        for text, answers in (
            (b"GET /Plugin.Activate HTTP/1.1\r\nHost: x\r\n\r\n", [b"501 Not Implemented"]),
            (b"POST /Plugin.Activate HTTP/1.0\r\n\r\n" * 2, [b"200 OK"]),
            (b"POST /Plugin.Activate HTTP/1.1\r\nConnection: close\r\n\r\n" * 2, [b"200 OK"]),
            (b"POST /Plugin.Activate HTTP/1.1\r\n\r\n" * 2, [b"200 OK", b"200 OK"]),
            (b"POST /Plugin.Activate HTTP/1.1\r\nExpect: 100-continue\r\n\r\n", [b"100 Continue", b"200 OK"]),
        ):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(server.socket)
                connection.sendall(text)
                connection.shutdown(socket.SHUT_WR)
                with connection.makefile("rb") as answer:
                    assert re.findall(rb"HTTP/1.1 (.*)\r\n", answer.read()) == answers


def test_a_connection_is_kept_over_an_error_in_apply_diff(root: Path) -> None:
    """The whole body is read also when it is refused at once: else the next request begins in its middle."""
    with serve(root) as server:
        PluginDriver(server.socket, str(root / "home"))
        connection = http.client.HTTPConnection("x")
        with socket.socket(socket.AF_UNIX) as connection.sock:
            connection.sock.connect(server.socket)
            for _ in range(3):
                body = iter([b"no archive" * 100_000] * 3)
                connection.request("POST", "/GraphDriver.ApplyDiff?id=nobody&parent=", body, encode_chunked=True)
                assert "nobody" in json.loads(connection.getresponse().read())["Err"]


def test_a_body_that_breaks_off_is_no_layer(root: Path) -> None:
    data = archive(("f", {"content": b"1" * 10_000})).read()
    with serve(root) as server:
        driver = PluginDriver(server.socket, str(root / "home"))
        driver.create("x")
        half = b"%x\r\n" % 5120 + data[:5120] + b"\r\n"
        with pytest.raises(http.client.HTTPException):
            request(server, "GraphDriver.ApplyDiff?id=x&parent=", half, {"Transfer-Encoding": "chunked"})
        assert os.listdir(driver.get("x")) == []
        assert driver.apply_diff("x", "", io.BytesIO(data)) == 10_000


def test_a_call_that_is_repeated_without_its_body(root: Path) -> None:
    """dockerd repeats a call whose connection broke with a reader that it has read to its end, or in part."""
    data = archive(("f", {"content": b"1" * 10_000}), ("g", {"content": b"2"})).read()
    with serve(root) as server:
        driver = PluginDriver(server.socket, str(root / "home"))
        for name in ("Create", "Remove", "Get", "Put", "Changes"):
            status, answer = request(server, f"GraphDriver.{name}", b"", {"Content-Length": "0"})
            assert (status, "empty request" in json.loads(answer)["Err"]) == (200, True)
        assert driver.status()
        driver.create("x")
        # What a kill in the middle leaves, and then the rest of the archive, which begins at an entry by chance.
        (root / "home/.onlap-applying-x").touch()
        rest = data[512 + 10_240 :]
        for part in (b"", rest):
            chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(part), part) if part else b"0\r\n\r\n"
            path = "GraphDriver.ApplyDiff?id=x&parent="
            _, answer = request(server, path, chunks, {"Transfer-Encoding": "chunked"})
            assert "the beginning of layer" in json.loads(answer)["Err"]
        assert os.listdir(driver.get("x")) == []
        driver.remove("x")
        driver.create("x")
        assert driver.apply_diff("x", "", io.BytesIO(data)) == 10_001
        driver.create("y")
    with serve(root) as server:  # it cannot know whether the one before was killed in the call
        _, answer = request(server, "GraphDriver.ApplyDiff?id=y&parent=", b"", {"Content-Length": "0"})
        assert "the beginning of layer" in json.loads(answer)["Err"]
        assert Reconnected(server.socket).apply_diff("y", "", io.BytesIO(data)) == 10_001


def test_a_socket_that_was_handed_over_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call between two servers waits for the second; neither removes the socket."""
    (root / "s").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "s/p.sock"))
        listener.listen()
        monkeypatch.setattr("onlap.serve.sockets.inherited", lambda _: listener.dup())

        def activated() -> Listening:
            return Listening("p", "overlay2", socket_dir=str(root / "s"), sync="none", inherit=True)

        with activated() as server:
            PluginDriver(server.socket, str(root / "home")).create("x")
        found: list[bool] = []
        call = threading.Thread(target=lambda: found.append(Reconnected(server.socket).exists("x")))
        call.start()
        with activated():
            call.join(20)
        assert found == [True]
        assert os.path.exists(server.socket)


def test_a_request_in_chunks(root: Path) -> None:
    with serve(root) as server:
        PluginDriver(server.socket, str(root / "home")).create("x")
        body = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"ID": "x"}') + b"0\r\n\r\n"
        status, answer = request(server, "GraphDriver.Exists", body, {"Transfer-Encoding": "chunked"})
        assert (status, json.loads(answer)) == (200, {"Exists": True})


def test_a_full_disk_keeps_no_layer_in_use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What frees goes on; what uses more is refused, and then not in use, as dockerd believes."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serve(root) as server:
        driver = PluginDriver(server.socket, str(root / "home"))
        driver.create("base")
        for name in ("one", "two"):
            driver.create_read_write(name, "base")
        used = [driver.get("one"), driver.get("one"), driver.get("two")]
        with monkeypatch.context() as patch:
            patch.setattr("onlap.serve.docker.state.write_all", full)
            with pytest.raises(PluginError, match="No space left"):
                driver.get("two")
            driver.put("two")
            driver.put("one")
            driver.put("one")
            assert not any(map(mounted, used))
            driver.remove("one")
        assert not driver.exists("one")
        for _ in range(2):
            assert mounted(driver.get("two"))
        assert json.loads((root / "home" / FILE).read_text())["counts"] == {"two": 2}
        for _ in range(2):
            driver.put("two")
        assert json.loads((root / "home" / FILE).read_text())["counts"] == {}


def test_what_mounts_say_is_not_saved(root: Path) -> None:
    """One use of a layer costs no write of the state, and is known after a restart all the same."""
    home = root / "home"
    with serve(root) as server:
        driver = PluginDriver(server.socket, str(home))
        driver.create("base")
        driver.create_read_write("layer", "base")
        before = (home / FILE).stat()
        path = driver.get("layer")
        assert (home / FILE).stat().st_ino == before.st_ino
    with serve(root) as server:
        again = Reconnected(server.socket)
        again.get("layer")
        again.put("layer")
        assert mounted(path)
        again.put("layer")
        assert not mounted(path)


@pytest.mark.parametrize("text", ["", "[]", "\0" * 99, "[" * 99_999, '"counts": {"x": Infinity}', '"counts": []'])
def test_a_damaged_state_is_named(root: Path, text: str) -> None:
    with serve(root) as server:
        PluginDriver(server.socket, str(root / "home"))
    whole = (root / "home" / FILE).read_text()
    (root / "home" / FILE).write_text(whole.replace('"counts": {}', text) if "counts" in text else text)
    with pytest.raises(errors.DataLoss, match="damaged"):
        serve(root)
    (root / "home" / FILE).unlink()
    (root / "s/.p.home").write_bytes(bytes(9))
    with pytest.raises(errors.DataLoss, match=r"\.p\.home is damaged"):
        serve(root)


def test_a_client_that_leaves_in_the_middle_of_diff(root: Path) -> None:
    with serve(root) as server:
        driver = PluginDriver(server.socket, str(root / "home"))
        driver.create("x")
        driver.apply_diff("x", "", archive(("f", {"content": bytes(20 << 20)})))
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(server.socket)
            body = b'{"ID": "x"}'
            connection.sendall(b"POST /GraphDriver.Diff HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        out = io.BytesIO()
        driver.diff("x", "", out)
        assert len(out.getvalue()) > 20 << 20


def test_the_end_waits_for_what_runs(root: Path) -> None:
    """A running ApplyDiff is finished and answered; an idle connection is closed."""
    started, release = threading.Event(), threading.Event()
    sizes: list[int] = []

    class Slow(io.BytesIO):
        """Stops when more was sent than a socket holds, so that the server must be reading."""

        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 4 << 20:
                started.set()
                release.wait(20)
            return super().read(size)

    data = archive(("f", {"content": b"1" * (8 << 20)})).read()
    with serve(root) as server, socket.socket(socket.AF_UNIX) as idle:
        driver = PluginDriver(server.socket, str(root / "home"))
        driver.create("x")
        idle.connect(server.socket)
        apply = threading.Thread(target=lambda: sizes.append(driver.apply_diff("x", "", Slow(data))))
        apply.start()
        assert started.wait(20)
        end = threading.Thread(target=server.close)
        end.start()
        release.set()
        end.join(20)
        apply.join(20)
        assert sizes == [8 << 20]
        assert idle.recv(1) == b""


def test_of_two_inits_at_once_no_driver_is_left_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, whose driver it closes."""
    service = Service("overlay2", "none", StateFile(str(root), "p"))
    entered: list[None] = []
    opened: list[Driver] = []
    second = threading.Event()

    class Announced:
        """A lock that says that somebody waits for it."""

        def __init__(self) -> None:
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            if not self._lock.acquire(blocking=False):
                second.set()
                self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()

    def open_slowly(*arguments: Any, **named: Any) -> Driver:
        entered.append(None)
        if len(entered) == 2:
            second.set()
        opened.append(driver := open_driver(*arguments, **named))
        assert second.wait(30)
        return driver

    monkeypatch.setattr(service, "_opening", Announced(), raising=False)
    monkeypatch.setattr(service_module, "open_driver", open_slowly)
    with ThreadPoolExecutor(2) as threads, closing(service):
        calls = [threads.submit(service.calls["GraphDriver.Init"], {"Home": str(root / "home")}) for _ in range(2)]
        assert [call.result() for call in calls] == [{}, {}]
        assert sum(driver._home_fd >= 0 for driver in opened) == 1  # type: ignore[attr-defined]


def test_an_empty_archive_after_a_new_init_is_no_layer(root: Path) -> None:
    """dockerd has restarted, and has begun no call for a layer that it knew before."""
    with serve(root) as server:
        driver = PluginDriver(server.socket, str(root / "home"))
        driver.create("layer")
        driver = PluginDriver(server.socket, str(root / "home"))
        with pytest.raises(PluginError, match="the beginning of layer layer is missing"):
            driver.apply_diff("layer", "", io.BytesIO())

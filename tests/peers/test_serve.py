"""The server: its socket, its life, what it answers, and many clients at once."""

from __future__ import annotations

import errno
import grp
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import grpc
import pytest

from onlap import errors
from onlap.catalog import records
from onlap.mounts.plan import Mount
from onlap.serve.containerd.protocol import snapshots_pb2 as pb
from onlap.serve.containerd.server import Server
from onlap.serve.containerd.status import status
from onlap.snapshots.contract import Info
from onlap.snapshots.native import NativeSnapshotter
from onlap.store import open_snapshotter
from peers import gobuild
from peers.daemons import ONLAP_ENVIRONMENT, Onlap, eventually, onlap_command, run
from peers.remote import Remote, RemoteSnapshotter, status_of

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(root: Path) -> Iterator[Onlap]:
    """A server of a native root, which needs no privilege."""
    with Onlap(root, "--sync", "none", kind="native") as daemon:
        yield daemon


@pytest.fixture
def client(server: Onlap) -> Iterator[RemoteSnapshotter]:
    with RemoteSnapshotter(server.socket) as snapshotter:
        yield snapshotter


# ---------------------------------------------------------------------------------------- the socket and its life


def refused(*words: str, store: Path) -> str:
    """What a server says that does not start."""
    return run(*onlap_command(store, "serve", "containerd", *words), ok=False, environment=ONLAP_ENVIRONMENT)


def test_a_second_server_is_refused(server: Onlap, root: Path, client: RemoteSnapshotter) -> None:
    """On the same socket with another root, and of the same owner on another socket; the first goes on."""
    said = refused("--socket", str(server.socket), "--snapshotter", "native", store=root / "other")
    assert "listens on" in said
    said = refused("--socket", str(root / "other.sock"), store=server.store)
    assert "another server serves" in said
    assert not (root / "other.sock").exists()
    client.prepare("key")
    assert client.stat("key").kind == "active"


def test_two_owners_share_a_root(server: Onlap, root: Path, client: RemoteSnapshotter) -> None:
    with Onlap(root, "--owner", "second", kind="native", name="second") as second:
        with RemoteSnapshotter(second.socket) as other:
            client.prepare("key")
            assert [info.name for info in other.walk()] == []
            other.prepare("key")
            other.remove("key")
            assert client.stat("key").kind == "active"
        assert {(info.name, info.owner) for info in server.all()} == {("key", "containerd")}


def test_a_stale_socket_is_replaced(server: Onlap, client: RemoteSnapshotter) -> None:
    client.prepare("key")
    server.kill()
    assert server.socket.exists()
    server.start()
    with RemoteSnapshotter(server.socket) as again:
        assert again.stat("key").kind == "active"


def test_what_is_no_socket_is_left_alone(root: Path) -> None:
    path = root / "file"
    path.write_text("precious")
    assert "not a socket" in refused("--socket", str(path), "--snapshotter", "native", store=root / "store")
    assert path.read_text() == "precious"
    below = str(root / "file/s.sock")
    assert str(path) in refused("--socket", below, "--snapshotter", "native", store=root / "store")


def test_the_directory_of_the_socket_is_made(root: Path) -> None:
    """Others may pass through it, as far as the socket's own mode lets them; nobody sees what else is in it."""
    (root / "new").mkdir()
    with Onlap(root, kind="native") as daemon:
        daemon.stop()
        daemon.socket = root / "new/run/onlap/s.sock"
        daemon.command[daemon.command.index("--socket") + 1] = str(daemon.socket)
        daemon.start()
        assert stat.filemode(daemon.socket.parent.stat().st_mode) == "drwx--x--x"
        assert os.listdir(daemon.socket.parent) == ["s.sock"]


def test_what_cannot_be_listened_on_is_one_line(root: Path) -> None:
    """Of ours: none of the gRPC library's own."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for words in (("--socket", "/proc/s.sock"), ("--socket", str(root / "s"), "--metrics", address)):
            command = onlap_command(root / "store", "serve", "containerd", "--snapshotter", "native", *words)
            done = subprocess.run(command, env={**os.environ, **ONLAP_ENVIRONMENT}, capture_output=True, check=False)
            assert done.returncode == 9
            assert re.fullmatch(rb"onlap: cannot [^\n]+\n", done.stderr)


@pytest.mark.parametrize("killed", [False, True])
def test_a_socket_that_was_handed_over_outlives_the_server(root: Path, killed: bool) -> None:
    """A call between two servers waits for the second; neither touches the socket."""
    daemon = Onlap(root, kind="native")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(daemon.socket))
        os.chmod(daemon.socket, 0o640)
        listener.listen()
        daemon.hand_over(listener)
        with daemon, RemoteSnapshotter(daemon.socket) as client, ThreadPoolExecutor(1) as pool:
            client.prepare("key")
            if killed:
                daemon.kill()
            else:
                assert daemon.stop() == 0
            answer = pool.submit(client.stat, "key")
            daemon.start()
            assert answer.result().kind == "active"
            assert len(list(client.walk())) == 1
            assert stat.filemode(os.stat(daemon.socket).st_mode) == "srw-r-----"
            daemon.command[daemon.command.index("--socket") + 1] = str(root / "other")
            daemon.stop()
            daemon.start()
            assert daemon.process.wait(20) == 6
            assert "inherited" in daemon.tail()
    assert daemon.socket.exists()


def test_the_owner_alone_may_connect(server: Onlap) -> None:
    status = os.stat(server.socket)
    assert stat.filemode(status.st_mode) == "srw-------"
    assert status.st_uid == os.geteuid()


def test_a_group_may_connect(root: Path) -> None:
    group = grp.getgrgid(os.getgroups()[0] if os.getgroups() else os.getegid())
    options = ("--socket-mode", "0660", "--socket-group", group.gr_name)
    with Onlap(root, *options, kind="native") as daemon:

        def may_connect() -> bool:
            status = os.stat(daemon.socket)
            return (stat.filemode(status.st_mode), status.st_gid) == ("srw-rw----", group.gr_gid)

        # The socket is there, for its owner alone, a moment before the group gets at it.
        eventually(may_connect, "the group may connect")
    said = refused("--socket", str(root / "s.sock"), "--socket-group", "no-such-group", store=root / "store")
    assert "no-such-group" in said
    assert not (root / "s.sock").exists()


def test_sigterm_finishes_what_it_answers(server: Onlap, client: RemoteSnapshotter) -> None:
    """A prepare that copies a large parent is answered well, and its snapshot is there; then the server has gone."""
    (plan,) = client.prepare("key")
    for number in range(4_000):
        Path(plan.source, str(number)).touch()
    client.commit("base", "key")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.prepare, "child", "base")
        eventually(lambda: list(server.store.glob("staging/*/*/fs")) or answer.done(), "the copy has begun")
        assert server.stop() == 0
        (plan,) = answer.result()
    assert len(os.listdir(plan.source)) == 4_000
    assert not server.socket.exists()
    assert {info.name for info in server.all()} == {"base", "child"}


def test_sigint_ends_it_too(server: Onlap) -> None:
    assert server.stop(signal.SIGINT) == 0


SIGNALLED = """
import os, random, signal, time
from onlap.serve.lifecycle import _signals

for number in range(1500):
    ready, say = os.pipe()
    child = os.fork()
    if not child:
        with _signals(signal.SIGTERM) as told:
            os.write(say, b"x")
            os.read(told, 1)
        os._exit(0)
    os.read(ready, 1)
    moment = time.perf_counter() + random.random() * 60e-6
    while time.perf_counter() < moment:
        pass
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(say)
"""


def test_no_signal_is_lost_on_the_way_to_the_wait() -> None:
    """With an Event that the handler sets, one in a thousand was, and the server hung."""
    run(sys.executable, "-W", "error", "-c", SIGNALLED, environment=ONLAP_ENVIRONMENT)


def test_systemd_is_told(root: Path) -> None:
    """The protocol of NOTIFY_SOCKET (sd_notify(3)): ready when it answers, stopping when it stops."""
    address = str(root / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(20)
        with Onlap(root, kind="native", environment={"NOTIFY_SOCKET": address}) as daemon:
            assert manager.recv(100) == b"READY=1"
            with RemoteSnapshotter(daemon.socket) as client:
                client.prepare("key")
        assert manager.recv(100) == b"STOPPING=1"


def test_what_is_broken_is_named_and_the_rest_works(server: Onlap, client: RemoteSnapshotter) -> None:
    """After a power cut that took a tree: the server starts, says which, and serves the others."""
    for name in ("whole", "broken"):
        (plan,) = client.prepare(f"{name}-key")
        Path(plan.source, "f").write_text(name)
        client.commit(name, f"{name}-key")
    server.stop()
    with open_snapshotter(server.store, create=False, owner="containerd") as snapshotter:
        tree = snapshotter.catalog.layout.snapshot(snapshotter.record("broken").id)
        snapshotter.catalog.database.write(lambda c: records.put_setting(c, "epoch", "of another boot"))
    shutil.rmtree(tree)
    server.start()
    assert re.search(r"level=error .*name=broken", server.tail())
    assert "name=whole" not in server.tail()
    with RemoteSnapshotter(server.socket) as again:
        (plan,) = again.prepare("on-whole", "whole")
        assert Path(plan.source, "f").read_text() == "whole"
        with pytest.raises(errors.DataLoss):
            again.prepare("on-broken", "broken")
        again.remove("broken")
        assert {info.name for info in again.walk()} == {"whole", "on-whole"}


def test_figures_and_a_line_a_call(root: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*probe.getsockname())
    with Onlap(root, "--metrics", address, kind="native") as daemon:
        with RemoteSnapshotter(daemon.socket) as client:
            client.prepare("default/7/key of ours")
            with pytest.raises(errors.NotFound):
                client.stat("nobody")
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
            figures = answer.read().decode()
        log = daemon.tail()
    assert 'onlap_calls_total{code="OK",method="Prepare"} 1.0' in figures
    assert 'onlap_calls_total{code="NotFound",method="Stat"} 1.0' in figures
    assert 'onlap_call_duration_seconds_count{method="Prepare"} 1.0' in figures
    assert 'onlap_snapshots{kind="active",owner="containerd"} 1.0' in figures
    assert 'onlap_store_bytes{owner="containerd"} 0.0' in figures
    assert 'onlap_store_inodes{owner="containerd"} 0.0' in figures
    assert re.search(r'^onlap_build_info\{.*version="\d.*\} 1\.0$', figures, re.MULTILINE)
    assert re.search(r"^onlap_trash_trees 0\.0$", figures, re.MULTILINE)
    # Each has a type and a text, and a unit of Prometheus's where it has one.
    names = {line.split()[2] for line in figures.splitlines() if line.startswith("# TYPE")}
    assert names == {line.split()[2] for line in figures.splitlines() if line.startswith("# HELP") and line.split()[3:]}
    assert not [name for name in names if name.endswith(("_ms", "_kb", "_percent"))]
    assert re.search(
        r'^time=\S+Z level=debug msg=call method=Prepare key="default/7/key of ours" namespace=default code=0 ms=\S+$',
        log,
        re.MULTILINE,
    )
    assert re.search(r"method=Stat key=nobody namespace=\S* code=5 ms=\S+ error=", log)


# ----------------------------------------------------------------------------------------------------- the answers


class Raising(NativeSnapshotter):
    """Answers every call with the next error."""

    error: BaseException

    def stat(self, key: str) -> Info:
        raise self.error

    def walk(self, *filters: str) -> Iterator[Info]:
        raise self.error

    def prepare(self, key: str, parent: object = None, labels: object = None) -> list[Mount]:
        raise self.error


@pytest.fixture
def raising(root: Path) -> Iterator[tuple[Raising, Remote]]:
    with (
        Raising(root / "store", owner="containerd", sync="none") as snapshotter,
        Server(snapshotter, str(root / "s.sock")) as server,
        Remote(root / "s.sock") as client,
    ):
        server.start()
        yield snapshotter, client


CALLS: dict[str, Callable[[Remote], object]] = {
    "Stat": lambda client: client.call("Stat", pb.StatSnapshotRequest(key="k"), pb.StatSnapshotResponse),
    "List": lambda client: list(client.blocks()),
    "Prepare": lambda client: client.call("Prepare", pb.PrepareSnapshotRequest(key="k"), pb.PrepareSnapshotResponse),
}

# containerd's errgrpc: what each kind of error is on the wire.
CODES = {
    errors.InvalidArgument: "INVALID_ARGUMENT",
    errors.NotFound: "NOT_FOUND",
    errors.AlreadyExists: "ALREADY_EXISTS",
    errors.FailedPrecondition: "FAILED_PRECONDITION",
    errors.Busy: "FAILED_PRECONDITION",
    errors.PermissionDenied: "PERMISSION_DENIED",
    errors.ResourceExhausted: "RESOURCE_EXHAUSTED",
    errors.Unavailable: "UNAVAILABLE",
    errors.Unimplemented: "UNIMPLEMENTED",
    errors.Canceled: "CANCELLED",
    errors.Internal: "INTERNAL",
    errors.DataLoss: "DATA_LOSS",
    errors.DigestMismatch: "DATA_LOSS",
}


def test_every_kind_of_error_has_its_code(raising: tuple[Raising, Remote]) -> None:
    snapshotter, client = raising
    assert set(CODES) == {getattr(errors, name) for name in errors.__all__ if name[0].isupper()} - {errors.OnlapError}
    for kind, code in CODES.items():
        snapshotter.error = kind("this is what happened", hint="do this")
        for name, call in CALLS.items():
            with pytest.raises(grpc.RpcError) as caught:
                call(client)
            assert status_of(caught.value) == (code, "this is what happened; do this"), name


def test_no_other_error_is_unknown(raising: tuple[Raising, Remote]) -> None:
    snapshotter, client = raising
    others = [OSError(number, os.strerror(number), "/path") for number in errno.errorcode]
    others += [OSError("without a number"), TimeoutError()]
    unforeseen = [ValueError("x"), KeyError("x"), AssertionError(), RecursionError(), MemoryError(), StopIteration()]
    for error in [*others, *unforeseen]:
        snapshotter.error = error
        for name, call in CALLS.items():
            with pytest.raises(grpc.RpcError) as caught:
                call(client)
            code, text = status_of(caught.value)
            assert code not in ("UNKNOWN", "OK"), (name, error)
            assert text
            if error in unforeseen:
                assert (code, "bug" in text) == ("INTERNAL", True), (name, error)


def test_no_text_is_misread() -> None:
    """A client of containerd takes a FAILED_PRECONDITION that ends so for another class of error."""
    for ending in (": conflict", ": not modified"):
        assert not status(errors.FailedPrecondition(f"x{ending}"))[1].endswith(ending)


def test_what_cannot_be_decoded_is_an_invalid_argument(raising: tuple[Raising, Remote]) -> None:
    class Garbage:
        def SerializeToString(self) -> bytes:
            return b"\x0a\xff"

    with pytest.raises(grpc.RpcError) as caught:
        raising[1].call("Stat", Garbage())
    assert status_of(caught.value)[0] == "INVALID_ARGUMENT"
    with pytest.raises(grpc.RpcError) as caught:
        raising[1].call("Frobnicate", pb.CleanupRequest())
    assert status_of(caught.value)[0] == "UNIMPLEMENTED"


def test_a_list_comes_in_blocks(client: RemoteSnapshotter) -> None:
    for number in range(250):
        client.prepare(f"key-{number}", labels={"odd": "yes"} if number % 2 else {})
    assert [len(block) for block in client.blocks()] == [100, 100, 50]
    assert [len(block) for block in client.blocks("labels.odd==yes,kind==active")] == [100, 25]
    assert [len(block) for block in client.blocks("name==key-7", "name==key-8")] == [2]
    assert list(client.blocks("kind==committed")) == []
    with pytest.raises(errors.InvalidArgument):
        client.walk("name==")


def test_keys_and_times_arrive_whole(client: RemoteSnapshotter) -> None:
    """Spaces, slashes and colons; labels with dots; nanoseconds."""
    keys = [
        "default/3/extract-736031383-3MYp sha256:" + "e" * 64,
        "k8s.io/4/sha256:" + "d" * 64,
        "../../etc/passwd",
        'a: b, c="d" \\ é 🗻',
        "x" * 3000,
    ]
    labels = {"containerd.io/snapshot.ref": "sha256:abc", "empty": "", "sp ace/é": "a=b,c"}
    before = time.time_ns()
    for key in keys:
        client.prepare(key, labels=labels)
    stamps = set()
    for info in client.walk():
        assert info == client.stat(info.name)
        assert before <= info.created_ns == info.updated_ns <= time.time_ns()
        assert {key: info.labels.get(key, "") for key in labels} == labels
        stamps.add(info.created_ns % 1000)
    assert {info.name for info in client.walk()} == set(keys)
    assert stamps != {0}, "nanoseconds, not microseconds"


def test_a_root_that_containerd_would_misread_is_refused(root: Path) -> None:
    for name in ("a:b", "a,b", 'a"b', "a\\b"):
        said = refused("--socket", str(root / "s.sock"), "--snapshotter", "native", store=root / name)
        assert "which containerd does not support" in said
    with open_snapshotter(root / "redirecting", snapshotter="native"):
        pass
    said = refused("--socket", str(root / "s.sock"), "--snapshotter", "overlay", store=root / "redirecting")
    assert "native" in said


# ----------------------------------------------------------------------------------------------------- many at once


def under_load(server: Onlap, seconds: float) -> int:
    """56 clients in cycles without an error, 8 that ask for errors and get those; returns how many cycles."""
    load = gobuild.build(REPOSITORY / "peers" / "go" / "snapshotclient")
    command = [load, "-socket", server.socket, "-clients", "56", "-seconds", str(seconds)]
    over = Event()

    def ask_for_errors(number: int) -> int:
        asked = 0
        with RemoteSnapshotter(server.socket) as client:
            key, base = f"errors/{number}/key", f"errors/{number}/base"
            client.prepare(key)
            client.commit(base, key)
            client.prepare(key, base)
            while not over.is_set():
                for wanted, call in (
                    (errors.NotFound, lambda: client.stat("nobody")),
                    (errors.AlreadyExists, lambda: client.prepare(key, base)),
                    (errors.FailedPrecondition, lambda: client.remove(base)),
                    (errors.InvalidArgument, lambda: client.view("new", key)),
                    (errors.FailedPrecondition, lambda: client.mounts(base)),
                ):
                    with pytest.raises(errors.OnlapError) as caught:
                        call()
                    assert caught.value.kind == wanted.kind
                    asked += 1
            client.remove(key)
            client.remove(base)
        return asked

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask_for_errors, number) for number in range(8)]
        try:
            done = subprocess.run(
                [str(word) for word in command], capture_output=True, text=True, timeout=seconds + 50, check=False
            )
        finally:
            over.set()
        assert all(future.result() > 0 for future in asking)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["cycles"])


def load_and_weigh(server: Onlap, seconds: float) -> None:
    # The first run fills caches, pools and the allocator's arenas.
    under_load(server, seconds)
    before = server.memory()
    assert under_load(server, seconds) > 64
    grown = server.memory() - before
    assert grown < 12 << 20, f"{grown >> 20} MiB more after the second run"
    with RemoteSnapshotter(server.socket) as client:
        assert [info.name for info in client.walk()] == ["default/1/base"]
    assert "level=error" not in server.log.read_text()


@pytest.mark.needs("overlay", "gopkg:github.com/containerd/containerd")
def test_64_clients(onlap: Onlap) -> None:
    load_and_weigh(onlap, 4)


@pytest.mark.long
@pytest.mark.needs("overlay", "gopkg:github.com/containerd/containerd")
def test_64_clients_for_long(onlap: Onlap) -> None:
    load_and_weigh(onlap, 60)

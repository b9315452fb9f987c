"""The differ when somebody dies in the middle of a layer: a worker, the server, containerd, or the client.

The layer comes from a FIFO in containerd's content directory, so that the test decides how far it is.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import grpc
import pytest

from peers.daemons import Containerd, Onlap, eventually
from peers.differs import Site, blob_path, children, ingest, is_alive, site
from peers.images import Layer, write
from peers.remote import NAMESPACE, RemoteDiffer, status_of

pytestmark = pytest.mark.needs("overlay", "peer:containerd", "peer:ctr")

DIFFER = True
CORES = len(os.sched_getaffinity(0))


class Slow:
    """A layer whose bytes come when the test says so.

    Args:
        containerd: whose content store has it.
        name: of its first file; a second one follows.
    """

    def __init__(self, containerd: Containerd, name: str) -> None:
        # Larger than what a FIFO and the reader's buffers hold, so that the second file is not there before its time.
        self.first, self.second = f"{name}-first", f"{name}-second"
        self.content = Layer().file(self.first, os.urandom(8 << 20)).file(self.second, os.urandom(8 << 20)).done()
        (self.blob,) = ingest(containerd, self.content)
        self.path = blob_path(containerd, self.blob.digest)
        self._write: BinaryIO | None = None
        self.path.unlink()
        os.mkfifo(self.path, 0o600)

    def begin(self, target: Path | None = None) -> None:
        """Wait for a reader, and give it so much that the first file is in the directory ``target``."""
        eventually(self._open, "somebody reads the layer")
        assert self._write is not None
        _send(self._write, self.content[: 9 << 20])
        if target is not None:
            eventually(lambda: os.path.lexists(target / self.first), "the first file is there")

    def _open(self) -> bool:
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False
        os.set_blocking(fd, True)
        self._write = open(fd, "wb", buffering=0)  # noqa: SIM115 - until finish()
        return True

    def finish(self) -> None:
        """Give the reader the rest."""
        assert self._write is not None
        with self._write:
            _send(self._write, self.content[9 << 20 :])

    def is_abandoned(self) -> bool:
        """Whether nobody reads it any more."""
        assert self._write is not None
        try:
            self._write.write(bytes(512))
        except BrokenPipeError:
            self._write.close()
            return True
        return False

    def restore(self) -> None:
        """Make it a file, as containerd has it."""
        self.path.unlink()
        self.path.write_bytes(self.content)


def _send(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@pytest.fixture
def slow(containerd: Containerd, request: pytest.FixtureRequest) -> Slow:
    return Slow(containerd, request.node.name.replace("[", "-").replace("]", ""))


def workers(onlap: Onlap) -> list[int]:
    """The pids of its worker processes."""
    return [pid for pid in children(onlap.process.pid) if b"onlap.workers" in _words(pid)]


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def reading(onlap: Onlap, path: Path) -> int:
    """The worker that has a file open."""
    (found,) = (pid for pid in workers(onlap) if str(path) in _open_files(pid))
    return found


def _open_files(pid: int) -> list[str]:
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            pass  # closed meanwhile
    return found


def applies(differ: RemoteDiffer, containerd: Containerd, target: Site) -> None:
    """The differ works."""
    differ.apply(ingest(containerd, Layer().file("works", b"1").done())[0], target.mounts)
    assert (target.upper / "works").exists()


@pytest.mark.parametrize("overlay", [True, False], ids=["overlay", "directory"])
def test_a_worker_is_killed(
    overlay: bool, differ: RemoteDiffer, onlap: Onlap, containerd: Containerd, slow: Slow, root: Path
) -> None:
    """That call fails; one in another worker does not, and the next one works."""
    target, second = site(root / "target", overlay=overlay), site(root / "second")
    also = Slow(containerd, f"also-{overlay}")
    call = differ.applying(slow.blob, target.mounts)
    slow.begin(target.upper)
    other = None
    if CORES > 1:
        other = differ.applying(also.blob, second.mounts)
        also.begin(second.upper)
    os.kill(reading(onlap, slow.path), signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as raised:
        call.result()
    code, said = status_of(raised.value)
    assert code == "UNAVAILABLE"
    assert "ended with status -9" in said
    # exit_group(2) ends the first thread of a process before the last one, with which its files are closed.
    eventually(slow.is_abandoned, "nobody reads the layer")
    if other is not None:
        also.finish()
        assert other.result().applied.digest == also.blob.digest
    applies(differ, containerd, site(root / "next"))
    slow.restore()
    assert differ.apply(slow.blob, site(root / "again").mounts).digest == slow.blob.digest


def test_a_canceled_call(differ: RemoteDiffer, onlap: Onlap, containerd: Containerd, slow: Slow, root: Path) -> None:
    """Its worker ends, so that nothing is written into the tree any more."""
    target = site(root / "target")
    call = differ.applying(slow.blob, target.mounts)
    slow.begin(target.upper)
    worker = reading(onlap, slow.path)
    call.cancel()
    eventually(slow.is_abandoned, "its worker does not read any more")
    eventually(lambda: not is_alive(worker), "its worker has ended")
    assert worker not in workers(onlap)
    applies(differ, containerd, site(root / "next"))


def test_a_call_that_is_canceled_before_its_turn(
    differ: RemoteDiffer, onlap: Onlap, containerd: Containerd, root: Path
) -> None:
    """It never gets a worker, and the calls before it are left alone."""
    slow = [Slow(containerd, f"turn-{number}") for number in range(CORES + 1)]
    sites = [site(root / f"{number}") for number in range(len(slow))]
    calls = []
    for layer, target in zip(slow[:-1], sites, strict=False):
        calls.append(differ.applying(layer.blob, target.mounts))
        layer.begin(target.upper)
    waiting = differ.applying(slow[-1].blob, sites[-1].mounts)
    waiting.cancel()
    for layer, call in zip(slow, calls, strict=False):
        layer.finish()
        assert call.result().applied.digest == layer.blob.digest
    applies(differ, containerd, site(root / "next"))
    assert not os.listdir(sites[-1].upper)


def test_several_layers_at_once(differ: RemoteDiffer, onlap: Onlap, containerd: Containerd, root: Path) -> None:
    """As many as there are cores are unpacked at the same time, each in a process of its own, and no more."""
    slow = [Slow(containerd, f"several-{number}") for number in range(2 * CORES + 1)]
    sites = [site(root / f"{number}") for number in range(len(slow))]
    mutex, full = threading.Lock(), threading.Event()
    running = most = 0

    def feed(layer: Slow, target: Site) -> None:
        nonlocal running, most
        layer.begin(target.upper)
        with mutex:
            running += 1
            most = max(most, running)
            if running == CORES:
                full.set()
        assert full.wait(60), "not as many layers as cores are unpacked at once"
        with mutex:
            running -= 1
        layer.finish()

    calls = [differ.applying(layer.blob, target.mounts) for layer, target in zip(slow, sites, strict=True)]
    with ThreadPoolExecutor(len(slow)) as pool:
        for fed in [*map(pool.submit, [feed] * len(slow), slow, sites)]:
            fed.result()
    for call, layer in zip(calls, slow, strict=True):
        assert call.result().applied.digest == layer.blob.digest
    assert most == CORES
    assert len(workers(onlap)) == CORES


def test_sigterm_in_the_middle_of_a_layer(
    differ: RemoteDiffer, onlap: Onlap, containerd: Containerd, slow: Slow, root: Path
) -> None:
    """The call is answered, and then no process is left."""
    target = site(root / "target")
    call = differ.applying(slow.blob, target.mounts)
    slow.begin(target.upper)
    processes = [onlap.process.pid, *workers(onlap)]
    assert len(processes) > 1
    os.kill(onlap.process.pid, signal.SIGTERM)
    eventually(lambda: "msg=stopping" in onlap.tail(), "it stops")
    slow.finish()
    assert call.result().applied.digest == slow.blob.digest
    assert onlap.stop() == 0
    assert not [pid for pid in processes if is_alive(pid)]
    onlap.start()


def test_the_server_is_killed(
    differ: RemoteDiffer, onlap: Onlap, containerd: Containerd, slow: Slow, root: Path
) -> None:
    """Its workers end with it, also in the middle of a layer: the next server may be given the same tree."""
    target = site(root / "target")
    call = differ.applying(slow.blob, target.mounts)
    slow.begin(target.upper)
    processes = workers(onlap)
    onlap.kill()
    with pytest.raises(grpc.RpcError) as raised:
        call.result()
    assert status_of(raised.value)[0] == "UNAVAILABLE"
    eventually(lambda: not [pid for pid in processes if is_alive(pid)], "no worker is left")
    # exit_group(2) ends the first thread of a process before the last one, with which its files are closed.
    eventually(slow.is_abandoned, "nobody reads the layer")
    onlap.start()
    with RemoteDiffer(onlap.socket, NAMESPACE) as client:
        applies(client, containerd, site(root / "next"))


# --------------------------------------------------------------------------------------------------- whole imports


class Unpacking:
    """``ctr`` unpacks an image, of which the second layer is slow, and mounts it.

    Args:
        containerd: the daemon.
        snapshotter: of the snapshots.
        slow: the second layer.
        place: an empty directory.
    """

    def __init__(self, containerd: Containerd, snapshotter: str, slow: Slow, place: Path) -> None:
        self._containerd = containerd
        self._snapshotter = snapshotter
        self._slow = slow
        self._mounted = place / "mounted"
        self._mounted.mkdir()
        self._reference = f"localhost/slow:{snapshotter}"
        layers = (Layer().file("base", b"1").done(), slow.content)
        slow.restore()
        archive = write(place / "slow.tar", self._reference, layers, ("", "")).archive
        containerd.ctr("images", "import", "--no-unpack", archive)
        slow.path.unlink()
        os.mkfifo(slow.path, 0o600)

    @property
    def _words(self) -> list[str | Path]:
        return ["images", "mount", "--snapshotter", self._snapshotter, self._reference, self._mounted]

    @contextmanager
    def half_done(self) -> Iterator[subprocess.Popen[str]]:
        """The command, in the middle of the slow layer."""
        command = ["ctr", "--address", str(self._containerd.socket), *map(str, self._words)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                self._slow.begin()
                yield process
            finally:
                process.kill()

    def again(self) -> None:
        """Unpack it from the start: it is complete, and in the end nothing is left."""
        ctr, mounted = self._containerd.ctr, self._mounted
        self._slow.restore()

        def works() -> bool:
            # containerd's connection to a proxy comes back by itself, after at most three seconds.
            command = ["ctr", "--address", str(self._containerd.socket), *map(str, self._words)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0 or "unavailable" in done.stderr.lower(), done.stderr
            return done.returncode == 0

        eventually(works, "it is unpacked")
        try:
            assert (mounted / "base").read_bytes() == b"1"
            assert {path.name for path in mounted.iterdir()} == {"base", self._slow.first, self._slow.second}
            assert (mounted / self._slow.second).read_bytes() in self._slow.content
        finally:
            ctr("images", "unmount", "--snapshotter", self._snapshotter, "--rm", mounted)
        ctr("images", "rm", "--sync", self._reference)
        left = ["snapshots", "--snapshotter", self._snapshotter, "ls"]
        eventually(lambda: not ctr(*left).splitlines()[1:], "its snapshots are gone")


@pytest.mark.parametrize("snapshotter", ["onlap", "overlayfs", "native"])
def test_the_server_is_killed_during_an_unpack(
    snapshotter: str, onlap: Onlap, containerd: Containerd, slow: Slow, tmp_path: Path
) -> None:
    """The client hears of it, and after a restart the same again succeeds."""
    unpacking = Unpacking(containerd, snapshotter, slow, tmp_path)
    with unpacking.half_done() as client:
        onlap.kill()
        said, _ = client.communicate(timeout=30)
        assert client.returncode != 0
        assert "unavailable" in said.lower()
    eventually(slow.is_abandoned, "no worker is left")
    onlap.start()
    unpacking.again()
    if snapshotter == "onlap":
        onlap.onlap("cleanup")
        eventually(onlap.is_bare, "the root is bare")


@pytest.mark.parametrize("snapshotter", ["onlap", "overlayfs", "native"])
def test_containerd_is_killed_during_an_unpack(
    snapshotter: str, onlap: Onlap, containerd: Containerd, slow: Slow, tmp_path: Path
) -> None:
    """The work for it ends; started again, it unpacks the image again, with the same server."""
    unpacking = Unpacking(containerd, snapshotter, slow, tmp_path)
    with unpacking.half_done() as client:
        worker = reading(onlap, slow.path)
        containerd.kill()
        eventually(slow.is_abandoned, "the work for it has ended")
        eventually(lambda: not is_alive(worker), "its worker has ended")
        client.communicate(timeout=30)
        assert client.returncode != 0
    containerd.start()
    unpacking.again()


def test_the_client_is_killed_during_an_unpack(
    onlap: Onlap, containerd: Containerd, slow: Slow, tmp_path: Path
) -> None:
    """containerd ends the call, and the call its worker."""
    unpacking = Unpacking(containerd, "onlap", slow, tmp_path)
    with unpacking.half_done() as client:
        client.kill()
        eventually(slow.is_abandoned, "the work for it has ended")
    unpacking.again()

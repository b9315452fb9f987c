"""The daemons of these tests: Onlap's server, containerd and dockerd, each a child of pytest, in a place of its own.

They run in the mount namespace of the pytest process, so that what they mount goes with it. They are found by the
pid that started them, and waited for; nothing of the machine's own daemons is touched.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from onlap.snapshots.contract import Info

SOURCES = Path(__file__).resolve().parents[1] / "src"

# Seconds. A busy machine is no defect; a daemon that says nothing for so long is.
PATIENCE = 20.0

# What has been started and not stopped, for the logs of a failed test.
running: list[Daemon] = []


class Daemon:
    """A process in the foreground with a log; it may be stopped and started again.

    Args:
        name: for messages, and of the log.
        place: an existing directory of its own.
        socket: it listens here when it is ready.
        command: how to start it.
        environment: variables besides ours.
    """

    def __init__(
        self, name: str, place: Path, socket: Path, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self.place = place
        self.socket = socket
        self.command = list(command)
        self.log = place / f"{name}.log"
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        # Descriptors that it gets, under the same numbers.
        self.passed: tuple[int, ...] = ()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running process."""
        assert self._process is not None, f"{self.name} does not run"
        return self._process

    def start(self) -> None:
        """Start it, and return when it accepts connections."""
        assert self._process is None, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                pass_fds=self.passed,
            )
        running.append(self)
        await_socket(self.socket, self._process)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal, and return its exit status; SIGKILL and an AssertionError if it stays."""
        return self._end(number)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop it well, and start it again."""
        assert self.stop() == 0, self.tail()
        self.start()

    def _end(self, number: int) -> int:
        process, self._process = self.process, None
        running.remove(self)
        process.send_signal(number)
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{self.name} did not end on signal {number}:\n{self.tail()}") from None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.stop()

    def tail(self, lines: int = 60) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def await_socket(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when somebody accepts on a unix socket; AssertionError when the process ends before.

    Connecting is the test: the file is there before anybody listens.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                pass  # not yet
            else:
                return
        try:
            status = process.wait(0.02)
        except subprocess.TimeoutExpired:
            assert time.monotonic() < deadline, f"nobody listens on {path}"
        else:
            raise AssertionError(f"it ended with status {status} before it listened on {path}")


def eventually(condition: Callable[[], object], what: str) -> None:
    """Return when ``condition`` holds; for what other processes do and tell nobody of."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {PATIENCE:.0f} s: {what}"
        time.sleep(0.05)


def output(
    *command: str | Path, ok: bool = True, given: bytes = b"", environment: dict[str, str] | None = None
) -> bytes:
    """The standard output of a command that must succeed, or with ``ok=False`` must fail (then also its errors)."""
    done = subprocess.run(
        [str(word) for word in command],
        input=given,
        capture_output=True,
        env={**os.environ, **(environment or {})},
        timeout=2 * PATIENCE,
        check=False,
    )
    everything = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, (
        f"{' '.join(map(str, command))}: status {done.returncode}\n{everything.decode(errors='replace')}"
    )
    return done.stdout if ok else everything


def run(*command: str | Path, ok: bool = True, text: str = "", environment: dict[str, str] | None = None) -> str:
    """The same as text."""
    return output(*command, ok=ok, given=text.encode(), environment=environment).decode()


# ----------------------------------------------------------------------------------------------------- Onlap's


def onlap_command(store: Path, *words: str) -> list[str]:
    """The command line of Onlap on a root; it wants ``PYTHONPATH`` (:data:`ONLAP_ENVIRONMENT`)."""
    return [sys.executable, "-m", "onlap", "--root", str(store), *words]


ONLAP_ENVIRONMENT = {"PYTHONPATH": str(SOURCES)}


_ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execve(sys.argv[2], sys.argv[2:], {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
"""


class Onlap(Daemon):
    """``onlap serve containerd``.

    Args:
        place: where root, socket and log are.
        options: more words of the command line.
        kind: of the root.
        name: of log and socket.
        environment: variables besides ours.
        differ: whether it is also a differ, of the containerd in the same place.
    """

    def __init__(
        self,
        place: Path,
        *options: str,
        kind: str = "overlay",
        name: str = "onlap",
        environment: dict[str, str] | None = None,
        differ: bool = False,
    ) -> None:
        self.store = place / "store"
        self.differ = differ
        if differ:
            options = (*options, "--differ", "--containerd", str(place / CONTAINERD_SOCKET))
        listen = place / f"{name}.sock"
        command = onlap_command(
            self.store, "-v", "serve", "containerd", "--socket", str(listen), "--snapshotter", kind, *options
        )
        super().__init__(name, place, listen, command, {**ONLAP_ENVIRONMENT, **(environment or {})})

    def hand_over(self, listener: socket.socket) -> None:
        """Give it, at each start, a socket that listens already, as systemd does (sd_listen_fds(3))."""
        self.passed = (listener.fileno(),)
        self.command = [sys.executable, "-c", _ACTIVATE, str(listener.fileno()), *self.command]

    def onlap(self, *words: str) -> str:
        """The output of the command on the served root."""
        return run(*onlap_command(self.store, *words), environment=ONLAP_ENVIRONMENT)

    def all(self) -> list[Info]:
        """Every snapshot in the root, whoever owns it: what another process sees."""
        from onlap.store import open_snapshotter

        with open_snapshotter(self.store, create=False) as snapshotter:
            return [record.info for record in snapshotter.catalog.walk(None)]

    def is_bare(self) -> bool:
        """Whether nothing is left in the root: no record, no tree, no garbage."""
        left = [name for part in ("snapshots", "trash") for name in os.listdir(self.store / part)]
        return not left and not self.all()

    def answers(self, method: str) -> list[str]:
        """The numbers of the statuses with which it has answered the calls of a method, oldest first."""
        return re.findall(rf" method={method} .*? code=(\d+) ", self.log.read_text(errors="replace"))

    def memory(self) -> int:
        """Bytes that are resident (VmRSS of proc(5))."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) << 10


# ------------------------------------------------------------------------------------------------- containerd's

CONTAINERD_SOCKET = "containerd.sock"

CONTAINERD_CONFIG = """\
version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]

[debug]
  level = "warn"

[grpc]
  address = "{socket}"

[plugins."io.containerd.internal.v1.opt"]
  path = "{place}/opt"

[proxy_plugins.onlap]
  type = "snapshot"
  address = "{onlap}"
  capabilities = ["rebase"]
  [proxy_plugins.onlap.exports]
    root = "{store}"
"""


# What the server does not know is left to containerd's own.
DIFFER_CONFIG = """
[proxy_plugins.onlap-differ]
  type = "diff"
  address = "{onlap}"

[plugins."io.containerd.service.v1.diff-service"]
  default = ["onlap-differ", "walking"]
"""


class Containerd(Daemon):
    """containerd with Onlap as a proxy snapshotter called ``onlap``, and as its differ where the server is one."""

    def __init__(self, place: Path, onlap: Onlap) -> None:
        listen = place / CONTAINERD_SOCKET
        config = place / "config.toml"
        text = CONTAINERD_CONFIG + (DIFFER_CONFIG if onlap.differ else "")
        config.write_text(text.format(place=place, socket=listen, onlap=onlap.socket, store=onlap.store))
        super().__init__("containerd", place, listen, ["containerd", "--config", str(config)])

    def ctr(self, *words: str | Path, ok: bool = True, text: str = "") -> str:
        """The output of ``ctr``, in the namespace ``default``."""
        return run("ctr", "--address", self.socket, *words, ok=ok, text=text)

    def snapshots(self, *words: str | Path, snapshotter: str = "onlap", ok: bool = True) -> str:
        """The output of ``ctr snapshots``."""
        return self.ctr("snapshots", "--snapshotter", snapshotter, *words, ok=ok)

    def __exit__(self, *exc: object) -> None:
        with ExitStack() as stack:
            stack.callback(super().__exit__, *exc)
            self.end_shims()

    def end_shims(self) -> None:
        """End what containers a failed test has left: their shims outlive containerd, and are found by its address."""
        for pid in shims(self.socket):
            children = [int(word) for word in _read(f"/proc/{pid}/task/{pid}/children").split()]
            for each in (pid, *children):
                try:
                    os.kill(each, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it ended by itself


def shims(address: Path) -> list[int]:
    """The pids of the shims that a containerd has started."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        words = _read(f"/proc/{name}/cmdline").split("\0")
        if os.path.basename(words[0]).startswith("containerd-shim") and str(address) in words:
            found.append(int(name))
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""  # the process has ended


# ---------------------------------------------------------------------------------------------------- dockerd's


class Dockerd(Daemon):
    """dockerd on a containerd, with the containerd image store.

    Args:
        place: an existing directory of its own.
        containerd: the socket.
        snapshotter: the containerd's.
    """

    def __init__(self, place: Path, containerd: Path, snapshotter: str = "onlap") -> None:
        listen = place / "docker.sock"
        config = place / "daemon.json"
        config.write_text(
            json.dumps(
                {"features": {"containerd-snapshotter": True}, "storage-driver": snapshotter, "live-restore": True}
            )
        )
        flags = {
            "config-file": config,
            "containerd": containerd,
            "data-root": place / "data",
            "exec-root": place / "exec",
            "host": f"unix://{listen}",
            "pidfile": place / "docker.pid",
            "bridge": "none",
            "iptables": "false",
            "ip6tables": "false",
        }
        super().__init__("dockerd", place, listen, ["dockerd", *(f"--{name}={value}" for name, value in flags.items())])

    def start(self) -> None:
        """Also wait until the API answers: the socket is there before."""
        super().start()
        self.docker("version")

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        # With live-restore, dockerd leaves its bind of the data root to itself.
        while str(self.place / "data") in _read("/proc/self/mountinfo"):
            run("umount", self.place / "data")

    def docker(self, *words: str | Path, ok: bool = True, text: str = "", **variables: str) -> str:
        """The output of ``docker``; ``variables`` are added to its environment."""
        command = ["docker", "--host", f"unix://{self.socket}", *map(str, words)]
        return run(*command, ok=ok, text=text, environment=variables)

"""Debian's docker-registry on loopback, and a cable to it that can be cut."""

from __future__ import annotations

import ctypes
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peers.daemons import eventually

USER, PASSWORD = "onlap", "sesame"

_CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {place}/data}}
http: {{addr: "{host}"{tls}}}
{auth}
"""
_TLS = ", tls: {{certificate: {0}/server.cert, key: {0}/server.key, clientcas: [{0}/ca.crt]}}"
_AUTH = 'auth: {{htpasswd: {{realm: r, path: "{place}/htpasswd"}}}}'


@contextmanager
def registry(place: Path, *, password: bool = False, certificates: Path | None = None) -> Iterator[str]:
    """A running registry with its data in ``place``; gives its host and port.

    Args:
        place: a new directory.
        password: of :data:`USER`; without it everybody is let in.
        certificates: of :func:`make_certificates`: TLS, which shows one and asks for one.
    """
    place.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    if password:
        (place / "htpasswd").write_text(f"{USER}:{_bcrypt(PASSWORD)}\n")
    tls = "" if certificates is None else _TLS.format(certificates)
    auth = _AUTH.format(place=place) if password else ""
    (place / "config.yml").write_text(_CONFIG.format(place=place, host=host, auth=auth, tls=tls))
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(place / "config.yml")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        eventually(lambda: process.poll() is not None or _listens(host), "docker-registry listens")
        assert process.poll() is None, (place / "log").read_text()
        yield host
    finally:
        process.terminate()
        process.wait(20)


def make_certificates(directory: Path) -> Path:
    """An authority (``ca.crt``), and what it signed: a ``server`` on 127.0.0.1 and a ``client``, as ``.cert`` and
    ``.key``."""
    directory.mkdir(parents=True)

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True, text=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=tests")
    for name, usage in (("server", "serverAuth"), ("client", "clientAuth")):
        openssl(
            *("req", "-x509", *new, "-CA", "ca.crt", "-CAkey", "ca.key", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.cert"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-addext", f"extendedKeyUsage={usage}"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
        )
    return directory


def _listens(host: str) -> bool:
    address, _, port = host.partition(":")
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def _bcrypt(password: str) -> str:
    """What htpasswd(1) -B makes; crypt(3) of libxcrypt has it."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    made: bytes | None = crypt(password.encode(), b"$2y$05$abcdefghijklmnopqrstuu")
    assert made is not None
    return made.decode()


class Cable:
    """Forwards connections to a registry, and cuts them as told.

    Args:
        host: where to.

    Attributes:
        host: its own address.
        cuts: how many bytes to let back through a connection before it is cut; one that nobody takes cuts none.
        cut: how many were.
        hold: bytes after which a connection stands still, until the cable goes; None: none does.
        sent: bytes that went forth.
    """

    def __init__(self, host: str, cuts: list[int], hold: int | None = None) -> None:
        self.hold = hold
        self._gone = threading.Event()
        self._target = host.partition(":")
        self._server = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.cuts = cuts
        self.cut = 0
        self.sent = 0
        self._mutex = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Cable:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._gone.set()
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return  # closed
            far = socket.create_connection((self._target[0], int(self._target[2])))
            threading.Thread(target=self._forth, args=(near, far), daemon=True).start()
            threading.Thread(target=self._back, args=(far, near), daemon=True).start()

    def _forth(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            try:
                while data := near.recv(1 << 16):
                    far.sendall(data)
                    with self._mutex:
                        self.sent += len(data)
            except OSError:
                return  # cut

    def _back(self, far: socket.socket, near: socket.socket) -> None:
        passed = 0
        try:
            while data := far.recv(1 << 16):
                near.sendall(data)
                passed += len(data)
                if self.hold is not None and passed >= self.hold:
                    self._gone.wait()
                with self._mutex:
                    if self.cuts and passed >= self.cuts[0]:
                        self.cuts.pop(0)
                        self.cut += 1
                        break
            for end in (near, far):
                end.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other side has gone
